"""Model hashes, against digests made by other tools, and files of every kind."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kakunin_db.errors import BadInputError
from kakunin_db.model_hash import check_model_hash, compute_model_hash

bounded = settings(max_examples=200, deadline=None, database=None)

# As JSON.stringify() of node 20 writes the article's object, and sha256sum of that. Its keys are not sorted.
ARTICLE = (
    '{"provider":"openai","model":"gpt-4o","version":"2024-08-06",'
    '"system_prompt":"You are a compliant system agent."}'
)
ARTICLE_HASH = "sha256:d663fed208e03fa272baf005fd9070c8a6930ce2c5896fa879a39a8d02d37073"
# printf '%s' '{"model":"gpt-4o","provider":...}' | sha256sum, with the keys in order.
ARTICLE_CANONICAL_HASH = "sha256:d265b8556e8888af11efe7d6851aa84f94b13cb58504a5b8e8698c2ab202b69f"
EMPTY_HASH = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
MIB = 1 << 20
# head -c 314572800 /dev/zero | sha256sum
ZEROS_300_MIB = "sha256:17a88af83717f68b8bd97873ffcf022c8aed703416fe9b08e0fa9e3287692bf0"

# RFC 8785 section 3.2.2, and section 3.2.4's bytes of it.
RFC_SAMPLE = r"""
{
  "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
  "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
  "literals": [null, true, false]
}
"""
RFC_SAMPLE_CANONICAL = """
7b 22 6c 69 74 65 72 61 6c 73 22 3a 5b 6e 75 6c 6c 2c 74 72 75 65 2c 66 61 6c 73 65 5d 2c 22 6e
75 6d 62 65 72 73 22 3a 5b 33 33 33 33 33 33 33 33 33 2e 33 33 33 33 33 33 33 2c 31 65 2b 33 30
2c 34 2e 35 2c 30 2e 30 30 32 2c 31 65 2d 32 37 5d 2c 22 73 74 72 69 6e 67 22 3a 22 e2 82 ac 24
5c 75 30 30 30 66 5c 6e 41 27 42 5c 22 5c 5c 5c 5c 5c 22 2f 22 7d
"""
# Section 3.2.3: keys in order of UTF-16 code units, where the emoji is before the Hebrew letter.
RFC_SORTED = [
    ("\r", "Carriage Return"),
    ("1", "One"),
    ("\u0080", "Control"),
    ("\u00f6", "Latin Small Letter O With Diaeresis"),
    ("\u20ac", "Euro Sign"),
    ("\U0001f600", "Emoji: Grinning Face"),
    ("\ufb33", "Hebrew Letter Dalet With Dagesh"),
]
# Appendix B: the double's bits and its text.
RFC_NUMBERS = [
    ("0000000000000000", "0"),
    ("8000000000000000", "0"),
    ("0000000000000001", "5e-324"),
    ("8000000000000001", "-5e-324"),
    ("7fefffffffffffff", "1.7976931348623157e+308"),
    ("ffefffffffffffff", "-1.7976931348623157e+308"),
    ("4340000000000000", "9007199254740992"),
    ("c340000000000000", "-9007199254740992"),
    ("4430000000000000", "295147905179352830000"),
    ("44b52d02c7e14af5", "9.999999999999997e+22"),
    ("44b52d02c7e14af6", "1e+23"),
    ("44b52d02c7e14af7", "1.0000000000000001e+23"),
    ("444b1ae4d6e2ef4e", "999999999999999700000"),
    ("444b1ae4d6e2ef4f", "999999999999999900000"),
    ("444b1ae4d6e2ef50", "1e+21"),
    ("3eb0c6f7a0b5ed8c", "9.999999999999997e-7"),
    ("3eb0c6f7a0b5ed8d", "0.000001"),
    ("41b3de4355555553", "333333333.3333332"),
    ("41b3de4355555554", "333333333.33333325"),
    ("41b3de4355555555", "333333333.3333333"),
    ("41b3de4355555556", "333333333.3333334"),
    ("41b3de4355555557", "333333333.33333343"),
    ("becbf647612f3696", "-0.0000033333333333333333"),
    ("43143ff3c1cb0959", "1424953923781206.2"),
]


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


# Text, bytes and mappings ---------------------------------------------------------------------------------


def test_article_example() -> None:
    assert compute_model_hash(ARTICLE) == ARTICLE_HASH
    assert compute_model_hash(ARTICLE.encode()) == ARTICLE_HASH


def test_mapping_is_hashed_in_canonical_form() -> None:
    content = json.loads(ARTICLE)
    assert compute_model_hash(content) == ARTICLE_CANONICAL_HASH
    assert compute_model_hash(dict(reversed(content.items()))) == ARTICLE_CANONICAL_HASH
    # The text is hashed as it is written, so only canonical text has the mapping's hash.
    assert ARTICLE_CANONICAL_HASH != ARTICLE_HASH
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert compute_model_hash(canonical) == ARTICLE_CANONICAL_HASH


def test_text_is_hashed_as_it_is_written() -> None:
    assert compute_model_hash("") == compute_model_hash(b"") == EMPTY_HASH
    assert compute_model_hash("é\n") == sha256(b"\xc3\xa9\n")
    assert compute_model_hash("e\u0301") != compute_model_hash("é")
    assert compute_model_hash(ARTICLE + "\n") != ARTICLE_HASH


def test_text_is_never_a_path(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"w")
    assert compute_model_hash(str(weights)) == sha256(os.fsencode(weights))
    assert compute_model_hash(weights) == sha256(b"w")


def test_rfc_8785_sample() -> None:
    assert compute_model_hash(json.loads(RFC_SAMPLE)) == sha256(bytes.fromhex(RFC_SAMPLE_CANONICAL))


def test_rfc_8785_order_of_keys() -> None:
    text = "{" + ",".join(f"{json.dumps(k, ensure_ascii=False)}:{json.dumps(v)}" for k, v in RFC_SORTED) + "}"
    assert compute_model_hash(dict(reversed(RFC_SORTED))) == compute_model_hash(text)


@pytest.mark.parametrize(("bits", "text"), RFC_NUMBERS)
def test_rfc_8785_numbers(bits: str, text: str) -> None:
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert compute_model_hash({"n": number}) == compute_model_hash(f'{{"n":{text}}}')


def test_what_is_the_same_in_json_has_the_same_hash() -> None:
    assert compute_model_hash({"a": [1.0, -0.0, (2, 3)]}) == compute_model_hash('{"a":[1,0,[2,3]]}')
    frozen = MappingProxyType({"b": MappingProxyType({"c": [MappingProxyType({})]}), "a": 2**53 - 1})
    assert compute_model_hash(frozen) == compute_model_hash('{"a":9007199254740991,"b":{"c":[{}]}}')


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
    | st.sampled_from([0, 1, 1.0, -0.0, "1", "true", "null", "", 1e21, 2**53 - 1])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(max_size=2), values, max_size=4)


def json_value(value: Any) -> Any:
    """What two values of Python have equal exactly when they are the same in JSON."""
    if isinstance(value, dict):
        return "object", frozenset((key, json_value(item)) for key, item in value.items())
    if isinstance(value, list):
        return "array", tuple(map(json_value, value))
    return ("number" if type(value) in (int, float) else type(value).__name__), value


def reordered(value: Any, turn: Callable[[list[Any]], list[Any]]) -> Any:
    if isinstance(value, dict):
        return {key: reordered(item, turn) for key, item in turn(list(value.items()))}
    return [reordered(item, turn) for item in value] if isinstance(value, list) else value


@bounded
@given(mappings, st.randoms(use_true_random=False))
def test_order_of_keys_never_matters(model: dict[str, Any], random: Any) -> None:
    shuffled = reordered(model, lambda items: random.sample(items, len(items)))
    assert compute_model_hash(shuffled) == compute_model_hash(model)


@bounded
@given(mappings)
def test_text_of_json_and_back_has_the_same_hash(model: dict[str, Any]) -> None:
    assert compute_model_hash(json.loads(json.dumps(model, indent=1))) == compute_model_hash(model)


@bounded
@given(values, values)
def test_hashes_are_equal_exactly_when_the_values_are(one: Any, other: Any) -> None:
    same = compute_model_hash({"v": one}) == compute_model_hash({"v": other})
    assert same == (json_value(one) == json_value(other))


# What is refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, 1, 1.5, True, ["a"], ("a",), bytearray(b"a"), memoryview(b"a"), {1}])
def test_another_type(model: Any) -> None:
    with pytest.raises(BadInputError, match=f"(?m)^a model is not {type(model).__name__}$"):
        compute_model_hash(model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a": float("nan")}, "model['a'] is not JSON: nan "),
        ({"a": [0, {"b": float("inf")}]}, "model['a'][1]['b'] is not JSON: inf "),
        ({"a": -float("inf")}, "model['a'] is not JSON: -inf "),
        ({"a": 2**53}, "model['a'] is not JSON: 9007199254740992 exceeds"),
        ({"a": -(2**53)}, "model['a'] is not JSON: -9007199254740992 exceeds"),
        ({"a": 10**5000}, "model['a'] is not JSON: "),
        ({"a": b"b"}, "model['a'] is not JSON: unsupported type: <class 'bytes'>"),
        ({"a": {1}}, "model['a'] is not JSON: unsupported type: <class 'set'>"),
        ({"a": "\ud800"}, "model['a'] is not JSON: "),
        ({"a": {"\udfff": 1}}, "a key of model['a'] is not JSON: "),
        ("\ud800", "the model's text is not Unicode: "),
    ],
)
def test_no_json(model: Any, message: str) -> None:
    with pytest.raises(BadInputError, match="^" + re.escape(message)) as refused:
        compute_model_hash(model)
    assert refused.value.sqlstate == "KA010"
    str(refused.value).encode()  # it can be printed
    assert isinstance(refused.value.__cause__, ValueError)


def test_key_that_is_not_text() -> None:
    with pytest.raises(BadInputError, match="(?m)^a key of model is int, not str$"):
        compute_model_hash({1: 1})  # type: ignore[dict-item]
    with pytest.raises(BadInputError, match=r"(?m)^a key of model\['a'\]\[0\] is NoneType, not str$"):
        compute_model_hash({"a": [{None: 1}]})


def test_nesting_without_end() -> None:
    model: dict[str, Any] = {}
    model["a"] = [model]
    with pytest.raises(BadInputError, match="nested too deeply or contains itself"):
        compute_model_hash(model)


# Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 7])
def test_file_of_every_size(tmp_path: Path, size: int) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    weights = tmp_path / "weights"
    weights.write_bytes(data[:size])
    assert compute_model_hash(weights) == sha256(data[:size])


def test_great_file_in_constant_memory(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.touch()
    os.truncate(weights, 300 * MIB)
    tracemalloc.start()
    try:
        assert compute_model_hash(weights) == ZEROS_300_MIB
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot read '.*weights': No such file") as refused:
        compute_model_hash(tmp_path / "weights")
    assert isinstance(refused.value.__cause__, FileNotFoundError)


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot read '.*': Is a directory") as refused:
        compute_model_hash(tmp_path)
    assert isinstance(refused.value.__cause__, IsADirectoryError)


def test_name_with_nul() -> None:
    with pytest.raises(BadInputError, match="null"):
        compute_model_hash(Path("a\0b"))


def test_fifo_and_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refusals: list[str] = []

    def attempt() -> None:
        for path in tmp_path / "fifo", Path("/dev/zero"):
            try:
                compute_model_hash(path)
            except BadInputError as error:
                refusals.append(str(error))

    # A thread of its own: open() of a FIFO without a writer would wait for ever.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert refusals == [f"'{tmp_path}/fifo' is not a regular file", "'/dev/zero' is not a regular file"]


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(MIB))
    os.utime(path, (0, 0))  # only the size tells


def shrink(path: Path) -> None:
    os.truncate(path, 1)
    os.utime(path, (0, 0))


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [append, shrink, rewrite])
def test_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(3 * MIB))
    os.utime(weights, (0, 0))  # or the rewriting may fall into the same tick of the clock
    updates: list[int] = []

    class Changing:
        """A hash during whose every update the file changes; `append` makes it one without an end."""

        def update(self, data: memoryview) -> None:
            updates.append(len(data))
            assert len(updates) < 10, "reads a growing file for ever"
            change(weights)

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr("kakunin_db.model_hash.hashlib.sha256", Changing)
    with pytest.raises(BadInputError, match="(?m)weights' changed while it was read$"):
        compute_model_hash(weights)


# The bar --------------------------------------------------------------------------------------------------


def test_bar_where_stderr_is_no_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w[red].bin"
    weights.write_bytes(bytes(3 * MIB))
    assert compute_model_hash(weights, progress=True) == sha256(bytes(3 * MIB))
    out, err = capfd.readouterr()
    assert out == ""
    assert "'w[red].bin'" in err
    assert "100%" in err
    assert "3.1/3.1 MB" in err


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.touch()
    os.truncate(weights, 300 * MIB)
    program = (
        "import pathlib, sys; from kakunin_db.model_hash import compute_model_hash;"
        "print(compute_model_hash(pathlib.Path(sys.argv[1]), progress=True))"
    )
    master, slave = pty.openpty()
    drawn = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # Linux's end of a terminal: EIO
                return
            if not data:
                return
            drawn.extend(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": "100"}
    command = [sys.executable, "-c", program, str(weights)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, env=environment, check=True)
    os.close(slave)
    reader.join(10)
    os.close(master)
    assert done.stdout.decode().strip() == ZEROS_300_MIB
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    percentages = [int(p) for p in re.findall(r"(\d+)%", plain)]
    assert percentages == sorted(percentages)
    assert len(set(percentages)) > 1  # drawn again while the file was read
    assert percentages[-1] == 100


def test_bar_obeys_no_name_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / os.fsdecode(b"\x1b[2J\xff")
    weights.write_bytes(b"w")
    assert compute_model_hash(weights, progress=True) == sha256(b"w")
    assert r"'\x1b[2J\udcff'" in capfd.readouterr().err


def test_bar_without_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"w")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(BadInputError, match="(?m)^a progress bar needs rich$") as refused:
        compute_model_hash(weights, progress=True)
    assert refused.value.hint == "Run: pip install 'kakunin-db[demo]'"
    assert isinstance(refused.value.__cause__, ImportError)
    # Only a bar needs it.
    assert compute_model_hash(weights) == sha256(b"w")
    assert compute_model_hash("w", progress=True) == sha256(b"w")


# check_model_hash -----------------------------------------------------------------------------------------


def test_check_model_hash() -> None:
    assert check_model_hash(ARTICLE_HASH) == ARTICLE_HASH
    assert check_model_hash(ARTICLE_HASH.upper()) == ARTICLE_HASH


@pytest.mark.parametrize(
    "value",
    [
        "",
        ARTICLE_HASH[:-1],
        ARTICLE_HASH + "0",
        ARTICLE_HASH + "\n",
        " " + ARTICLE_HASH,
        ARTICLE_HASH[7:],
        "sha512:" + ARTICLE_HASH[7:],
        "sha256:" + "g" * 64,
        "sha256:" + "\uff11" * 64,  # full-width digits
        "\u017fha256:" + ARTICLE_HASH[7:],  # the long s
        None,
        ARTICLE_HASH.encode(),
    ],
)
def test_check_model_hash_refuses(value: Any) -> None:
    with pytest.raises(BadInputError, match="64 hexadecimal digits"):
        check_model_hash(value)
