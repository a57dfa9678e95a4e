"""The hash of what an agent runs, its configuration or its weights. A certificate is for one such hash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rfc8785

from .errors import BadInputError

_MODEL_HASH = re.compile("sha256:[0-9a-f]{64}")
_CHUNK = 1 << 20  # bytes


def compute_model_hash(
    model: str | bytes | Mapping[str, Any] | os.PathLike[str], *, progress: bool = False
) -> str:
    """``sha256:`` and 64 lower-case hexadecimal digits, for a model's configuration or weights.

    - ``str``: its UTF-8 as it is written, never a path. So ``compute_model_hash(text)`` is
      ``Kakunin.computeModelHash(text)`` of the same ``JSON.stringify()`` text, whose order of keys counts.
    - ``bytes``: as they are.
    - a mapping: its canonical JSON (RFC 8785), so order of keys and white space do not count. The same
      content as text has the same hash only if that text is canonical; ``JSON.stringify()`` does not sort.
    - a path (:class:`pathlib.Path`): the bytes of the regular file, read in chunks of 1 MiB; ``progress``
      draws a bar on stderr meanwhile, with rich from the extra ``demo``. ``progress`` is for files only.

    Raises :class:`BadInputError` for another type, text with a lone surrogate, a mapping that is not JSON or
    has whole numbers beyond 2^53 - 1, which other readers of JSON would round, a file that cannot be read,
    one whose size or time of modification changes during reading, and a bar without rich. The exception of
    the system or of rfc8785 is its ``__cause__``.
    """
    if isinstance(model, str):
        try:
            data = model.encode()
        except UnicodeEncodeError as error:
            raise BadInputError(f"the model's text is not Unicode: {error}") from error
    elif isinstance(model, bytes):
        data = model
    elif isinstance(model, os.PathLike):
        return "sha256:" + _file_digest(model, progress)
    elif isinstance(model, Mapping):
        try:
            data = rfc8785.dumps(_plain(model, "model"))
        except RecursionError as error:
            raise BadInputError("the model's mapping is nested too deeply or contains itself") from error
    else:
        raise BadInputError(
            f"a model is not {type(model).__name__}",
            "Give its configuration as str, bytes or a mapping, or a pathlib.Path to its weights.",
        )
    return "sha256:" + hashlib.sha256(data).hexdigest()


def check_model_hash(value: str) -> str:
    """``value`` in lower case. The same as ``kakunin_private.check_model_hash()`` in SQL.

    Raises :class:`BadInputError` unless it is ``sha256:`` and 64 hexadecimal digits.
    """
    if isinstance(value, str) and _MODEL_HASH.fullmatch(value.lower()):
        return value.lower()
    raise BadInputError(
        "a model hash is sha256: and 64 hexadecimal digits",
        "compute_model_hash() in Python, or kakunin-db model-hash, makes one.",
    )


def _plain(value: Any, where: str) -> Any:
    """``value`` in dicts and lists, which rfc8785 takes. :class:`BadInputError` says where it is not JSON."""
    if isinstance(value, Mapping):
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadInputError(f"a key of {where} is {type(key).__name__}, not str")
            plain[_plain(key, f"a key of {where}")] = _plain(item, f"{where}[{key!r}]")
        return plain
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    try:
        rfc8785.dumps(value)
    except ValueError as error:  # CanonicalizationError, or the interpreter's for an int of 4300 digits
        raise BadInputError(
            f"{where} is not JSON: {error}",
            "Use null, booleans, Unicode strings, finite floats, and ints within 2^53 - 1; "
            "greater ones as strings.",
        ) from error
    return value


def _file_digest(path: os.PathLike[str], progress: bool) -> str:
    name = os.fsdecode(path)
    try:
        # Not buffered: every read is a chunk.
        with open(name, "rb", buffering=0, opener=_open_without_waiting) as file:
            before = os.fstat(file.fileno())
            _check(stat.S_ISREG(before.st_mode), f"{name!r} is not a regular file")
            digest, done, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
            bar = _bar(os.path.basename(name), before.st_size) if progress else _no_bar()
            with bar as show:
                # One that grows as fast as it is read has no end.
                while done <= before.st_size and (size := file.readinto(chunk)):
                    digest.update(chunk[:size])
                    done += size
                    show(done)
            after = os.fstat(file.fileno())
    except BadInputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise BadInputError(f"cannot read {name!r}: {reason}") from error
    _check(
        done == before.st_size == after.st_size and before.st_mtime_ns == after.st_mtime_ns,
        f"{name!r} changed while it was read",
    )
    return digest.hexdigest()


def _open_without_waiting(name: str, flags: int) -> int:
    """Opens a FIFO at once, to be refused, where open() waits for a writer. Windows has no O_NONBLOCK."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise BadInputError(message)


@contextlib.contextmanager
def _no_bar() -> Iterator[Callable[[int], None]]:
    yield lambda done: None


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr until the block ends; the function takes the bytes done so far."""
    try:
        from rich import progress  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415
    except ImportError as error:
        raise BadInputError(
            f"a progress bar needs {error.name or error}", "Run: pip install 'kakunin-db[demo]'"
        ) from error
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        # repr(): a file's name may hold what a terminal obeys.
        task = bar.add_task(repr(name), total=total)
        yield lambda done: bar.update(task, completed=done)
