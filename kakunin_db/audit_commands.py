"""What the commands about the ledger do and print: ``audit``, ``worker`` and ``health``.

What reads the ledger out of a database puts that on record first, in the ledger; but not where it is only
replicated, because there nothing can be, or may be, added to it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from .commands import Refused, _answer, _answer_rows, _cannot, _client, _note, _read, _shown, checked_dsn
from .errors import BadInputError, KakuninError, LedgerIntegrityError
from .logs import counted

if TYPE_CHECKING:
    import psycopg
    from cryptography import x509

    from .ledger import Report, TreeHead
    from .ledger.worker import Metrics
    from .webhooks import SecretKeys


@contextlib.contextmanager
def _connected(
    options: argparse.Namespace, command: str, details: dict[str, Any] | None = None
) -> Iterator[psycopg.Connection[Any]]:
    """A connection of an auditor's, once it is on record what it is for."""
    import psycopg  # noqa: PLC0415

    name = "kakunin-db audit"
    with psycopg.connect(
        options.dsn, autocommit=True, prepare_threshold=None, fallback_application_name=name
    ) as connection:
        connection.execute("set jit = off")  # compiling takes longer than what is read here
        if _is_replica(connection):
            _note("this is a replica, where nobody can put it on record that the ledger was read")
        else:
            connection.execute(
                "select kakunin.record_read(%s, %s::jsonb)", [command, json.dumps(details or {})]
            )
        yield connection


def _is_replica(connection: psycopg.Connection[Any]) -> bool:
    """A standby, or a database to which the ledger was copied or is replicated; no session can set that."""
    row = connection.execute(
        "select pg_is_in_recovery() or (kakunin.ledger_home() -> 'moved')::boolean"
    ).fetchone()
    return bool(row and row[0])


@contextlib.contextmanager
def _progress(text: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, where rich is installed (it is an extra); otherwise nothing."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.update(task, completed=done)


# The key ----------------------------------------------------------------------------------------------


def init(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        now = dt.datetime.now(dt.timezone.utc)
        status = kakunin.ledger.status()
        if status.key_expires_at is not None and status.key_expires_at > now and not options.another:
            raise BadInputError(
                f"the ledger has a key already, good until {_shown(status.key_expires_at)}",
                "--another makes one more, which the worker then takes.",
            )
        key = kakunin.ledger.create_key(lifetime=options.days)
    _answer(
        options,
        key,
        [
            ("key_id", key.key_id),
            ("valid", f"{_shown(key.not_before)} to {_shown(key.not_after)}"),
            ("issuer", key.issuer_key_id),
        ],
    )
    return 0


# Verification -----------------------------------------------------------------------------------------


def _roots(paths: list[str]) -> list[x509.Certificate]:
    from cryptography import x509  # noqa: PLC0415

    found: list[x509.Certificate] = []
    for path in paths:
        content = _read(path)
        try:
            if b"-----BEGIN" in content:
                found += x509.load_pem_x509_certificates(content)
            else:
                found.append(x509.load_der_x509_certificate(content))
        except ValueError as error:
            raise BadInputError(
                f"{path} is not a certificate", "Give that of a root authority, PEM or DER."
            ) from error
    # A chain is given as well as a root; what is below the root comes with the bundle.
    roots = [certificate for certificate in found if certificate.subject == certificate.issuer]
    return roots or found


def _witnessed(options: argparse.Namespace, installation: Any) -> list[TreeHead]:
    from .ledger import open_witness  # noqa: PLC0415

    heads: list[TreeHead] = []
    for uri in options.witness:
        found = list(open_witness(uri).heads(installation))
        if not found:
            raise Refused(
                f"a witness has no tree head of installation {installation}",
                "Where it should have some, its silence is no proof that nothing was cut off.",
            )
        heads += found
    return heads


def verify(options: argparse.Namespace) -> int:
    if options.file is None:
        return _verify_database(options)
    if not options.ca:
        raise Refused(
            "a bundle does not say whom to trust",
            "Give the certificate of the root authority: --ca root.pem.",
            status=2,
        )
    roots = _roots(options.ca)
    with _opened(options.file) as file:
        first = file.peek(128)[:128] if isinstance(file, io.BufferedReader) else b""
        if re.match(rb'\s*\{\s*"kakunin"\s*:\s*"(inclusion|consistency)_proof/1"', first):
            return _verify_proof(options, file.read(), roots)
        from .ledger import verify_bundle  # noqa: PLC0415

        about = None if file is sys.stdin.buffer else os.fstat(file.fileno())
        # A pipe does not say how far it is.
        size = about.st_size if about is not None and stat.S_ISREG(about.st_mode) else None
        witnesses = _witnessed(options, _installation(first)) if options.witness else []
        with _progress("verifying", size) as advance:
            report = verify_bundle(
                file,
                roots,
                witnesses=witnesses,
                progress=lambda _: advance(file.tell()) if size is not None else None,
            )
    return _reported(options, report)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise _cannot(path, "read", error) from error
    with file:
        yield file


def _installation(first: bytes) -> Any:
    """Whose bundle it says it is. Whether that is so, its verification finds out."""
    import uuid  # noqa: PLC0415

    found = re.match(rb'\{"kakunin":"bundle/1","installation":"([0-9a-f-]{36})"', first)
    try:
        return uuid.UUID(found[1].decode() if found else "")
    except ValueError as error:
        raise LedgerIntegrityError("this is not a bundle") from error


def _verify_proof(options: argparse.Namespace, content: bytes, roots: list[x509.Certificate]) -> int:
    from .ledger import verify_proof  # noqa: PLC0415

    try:
        head = verify_proof(content, roots)
    except KakuninError as error:
        _answer(options, {"valid": False, "reason": str(error)}, [("valid", "no"), ("reason", str(error))])
        return 1
    moment = dt.datetime.fromtimestamp(head.timestamp / 1000, dt.timezone.utc)
    _answer(
        options,
        {"valid": True, "tree_head": head.to_json()},
        [("valid", "yes"), ("tree_size", head.tree_size), ("signed", moment), ("root", head.root.hex())],
    )
    return 0


def _verify_database(options: argparse.Namespace) -> int:
    from cryptography import x509  # noqa: PLC0415

    from .ledger.export import verify_database  # noqa: PLC0415

    options.dsn = checked_dsn(options)
    with _connected(options, "verify") as connection:
        roots = _roots(options.ca)
        if not roots:
            _note(
                "the database's own root authorities are trusted; evidence is what yours say: --ca root.pem"
            )
            roots = [
                x509.load_der_x509_certificate(row[0])
                for row in connection.execute(
                    "select der from kakunin.authorities where key_id = issuer_key_id"
                ).fetchall()
            ]
        row = connection.execute("select kakunin.installation_id()").fetchone()
        witnesses = _witnessed(options, row[0] if row else None) if options.witness else []
        size = connection.execute("select max(tree_size) from kakunin.tree_heads").fetchone()
        with _progress("verifying", size[0] if size else None) as advance:
            report, unsealed = verify_database(connection, roots, witnesses=witnesses, progress=advance)
    if unsealed:
        _note(f"not signed yet: {counted(unsealed)}")
    return _reported(options, report)


def _reported(options: argparse.Namespace, report: Report) -> int:
    """Says what was found; the first thing that is wrong comes first."""
    head = report.last_head
    signed = dt.datetime.fromtimestamp(head.timestamp / 1000, dt.timezone.utc) if head else None
    _answer(
        options,
        {
            "valid": report.ok,
            "tree_size": report.tree_size,
            "entries": report.entries,
            "tree_heads": report.heads,
            "archived": report.archived,
            "last_tree_head": head.to_json() if head else None,
            "problems": report.count,
            "findings": list(report.findings),
        },
        [
            ("valid", "yes" if report.ok else "no"),
            ("entries", report.entries),
            ("tree_size", report.tree_size),
            ("tree_heads", report.heads),
            ("signed", signed),
            ("not here", f"{counted(report.archived)}, archived" if report.archived else None),
            ("problems", report.count or None),
            *(("wrong", f"{f.kind}: {f.message}") for f in report.findings[:20]),
        ],
    )
    return 0 if report.ok else 1


# Export and proofs ------------------------------------------------------------------------------------


class _Digested:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, line: bytes) -> None:
        self.sha256.update(line)
        self._file.write(line)


def export(options: argparse.Namespace) -> int:
    from .ledger.export import bundle_lines, tree_heads  # noqa: PLC0415

    details = {"first_index": options.start, "tree_size": options.size}
    with _connected(options, "export", details) as connection:
        # The export itself is not to be left without a head: those signed by now are exported.
        newest = tree_heads(connection)[-1:] if options.size is None else ()
        size = newest[0].tree_size if newest else options.size
        lines = bundle_lines(connection, first_index=options.start, tree_size=size)
        first = next(lines)  # raises where there is nothing to export, before a file is made
        with _target(options.out) as file:
            target = _Digested(file)
            target.write(first)
            with _progress("exporting", size) as advance:
                for line in lines:
                    target.write(line)
                    if line.startswith(b'{"kakunin":"leaves/1","first_index":'):
                        advance(int(line[36:].split(b",", 1)[0]))
            file.flush()
            if options.out != "-":
                os.fsync(file.fileno())
        digest = target.sha256.hexdigest()
        if not _is_replica(connection):
            connection.execute("select kakunin.record_export(%s, %s, %s)", [size, options.start, digest])
    if options.out != "-":
        _answer(
            options,
            {"tree_size": size, "first_index": options.start, "sha256": digest, "written": options.out},
            [("tree_size", size), ("sha256", digest), ("written", options.out)],
        )
    return 0


@contextlib.contextmanager
def _target(path: str) -> Iterator[BinaryIO]:
    """The file, which must be new, and is taken away again where the export did not come to its end."""
    if path == "-":
        yield sys.stdout.buffer
        return
    try:
        file = open(path, "xb")  # noqa: SIM115
    except FileExistsError as error:
        raise Refused(
            f"{path} is there already, and nothing is written over it", "Name another file."
        ) from error
    except (OSError, ValueError) as error:
        raise _cannot(path, "written", error) from error
    try:
        with file:
            yield file
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise _cannot(path, "written", error) from error
        raise


def prove(options: argparse.Namespace) -> int:
    from .ledger.export import inclusion_proof  # noqa: PLC0415

    with _connected(options, "prove", {"event_id": options.event_id}) as connection:
        print(json.dumps(inclusion_proof(connection, options.event_id, options.size), separators=(",", ":")))
    return 0


def consistency(options: argparse.Namespace) -> int:
    from .ledger.export import consistency_proof  # noqa: PLC0415

    with _connected(options, "consistency", {"sizes": [options.first, options.second]}) as connection:
        document = consistency_proof(connection, options.first, options.second)
    print(json.dumps(document, separators=(",", ":")))
    return 0


def listing(options: argparse.Namespace) -> int:
    """The newest entries that match, the oldest of them first; with --json, as they are, a line each."""
    conditions = {
        "agent_id = %(agent)s": options.agent,
        "event_type = %(type)s": options.type,
        "recorded_at >= %(since)s": options.since,
    }
    where = " and ".join(condition for condition, value in conditions.items() if value is not None)
    details = {
        name: str(value) for name, value in vars(options).items() if name in ("agent", "type") and value
    }
    with _connected(options, "list", details) as connection:
        rows = connection.execute(
            f"select event_id, recorded_at, event_type, agent_id, login, entry from kakunin.audit_log"  # noqa: S608  (of the conditions above)
            f" where {where or 'true'} order by event_id desc limit %(limit)s",
            {"agent": options.agent, "type": options.type, "since": options.since, "limit": options.limit},
        ).fetchall()
    rows.reverse()
    if options.json:
        for row in rows:
            print(row[5])
    else:
        _answer_rows(options, None, [row[:5] for row in rows])
    return 0


def witness_sql(options: argparse.Namespace) -> int:
    from . import ledger  # noqa: PLC0415

    print(ledger.witness_sql(), end="")
    return 0


def guard_sql(options: argparse.Namespace) -> int:
    from .resources import sql_dir  # noqa: PLC0415

    print((sql_dir() / "superuser" / "guard_ledger.sql").read_text(encoding="utf-8"), end="")
    return 0


# The worker -------------------------------------------------------------------------------------------

# Seconds: after the second of the attempts that come soon, and before the waiting is of hours.
_LATE_WEBHOOK = 3600


def health(options: argparse.Namespace) -> int:
    """Exit status 1 where somebody should look."""
    from .webhook_commands import status as webhook_status  # noqa: PLC0415

    with _client(options) as kakunin:
        status = kakunin.ledger.status()
    webhooks = webhook_status(options)
    now = dt.datetime.now(dt.timezone.utc)
    soon = now + dt.timedelta(days=14)
    wrong = []
    if status.lag_seconds > options.max_lag:
        wrong.append(
            f"without a signature: {counted(status.lag_entries)}, the oldest for {status.lag_seconds:.0f} s"
        )
    if status.leader is None:
        wrong.append("no worker leads: is kakunin-db worker running?")
    if status.problem is not None:
        wrong.append(f"the worker that leads: {status.problem}")
    if status.key_expires_at is None:
        wrong.append("no ledger key is registered: kakunin-db audit init")
    elif status.key_expires_at < soon:
        wrong.append(
            f"the ledger's key expires {_shown(status.key_expires_at)}: kakunin-db audit init --another"
        )
    if status.partitions_until is None or status.partitions_until < soon:
        wrong.append("partitions are not made ahead: select kakunin.make_partitions()")
    if status.in_default_partition:
        wrong.append("entries are in the default partition: none was made for their month in time")
    wrong += _undelivered(webhooks)
    _answer(
        options,
        {"healthy": not wrong, "problems": wrong, "status": status, "webhooks": webhooks},
        [
            ("healthy", "no" if wrong else "yes"),
            ("problem", wrong),
            ("entries", status.tree_size),
            ("signed", status.signed_size),
            ("lag", f"{counted(status.lag_entries)}, {status.lag_seconds:.1f} s"),
            ("last signed", status.last_signed_at),
            ("leader", status.leader),
            ("exported", status.exported_size),
            ("partitions", status.partitions_until),
            ("webhooks", f"{webhooks['pending']} to send, {webhooks['dead']} dead"),
        ],
    )
    return 1 if wrong else 0


def _undelivered(webhooks: dict[str, Any]) -> list[str]:
    """What of kakunin.webhook_status() somebody should look at."""
    wrong = []
    if webhooks["dead"]:
        wrong.append(
            f"{webhooks['dead']} webhook deliveries were given up:"
            " kakunin-db webhooks deliveries --state dead, and replay"
        )
    if webhooks["oldest_pending_seconds"] > _LATE_WEBHOOK:
        wrong.append(
            f"{webhooks['pending']} webhook deliveries wait, the oldest for"
            f" {webhooks['oldest_pending_seconds']:.0f} s: does its receiver answer, has the worker its key?"
        )
    if webhooks["disabled"]:
        wrong.append(
            f"{webhooks['disabled']} webhook endpoints are disabled and told nothing:"
            " kakunin-db webhooks enable, or remove"
        )
    return wrong


@contextlib.contextmanager
def _delivering(
    options: argparse.Namespace, keys: SecretKeys | None, metrics: Metrics, stop: Callable[[], None]
) -> Iterator[None]:
    """Webhooks are delivered meanwhile, where there is a key. What ends that ends the worker."""
    if keys is None:
        yield
        return
    from .webhooks.deliverer import Deliverer  # noqa: PLC0415

    deliverer = Deliverer(options.dsn, keys, allowed=options.allow_private_webhooks, metrics=metrics)
    failed: list[Exception] = []

    def run() -> None:
        try:
            deliverer.run()
        except Exception as error:
            failed.append(error)
            stop()

    thread = threading.Thread(target=run, name="webhooks")
    thread.start()
    try:
        yield
    finally:
        deliverer.stop()
        thread.join()
    if failed:
        raise failed[0]


def worker(options: argparse.Namespace) -> int:
    from .ledger import open_witness  # noqa: PLC0415
    from .ledger.worker import Metrics, Settings, Worker  # noqa: PLC0415
    from .logs import JSONFormatter, TextFormatter  # noqa: PLC0415
    from .signers import open_keys  # noqa: PLC0415
    from .webhook_commands import secret_keys  # noqa: PLC0415

    webhook_keys = secret_keys(options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if options.log_format == "json" else TextFormatter())
    logger = logging.getLogger("kakunin_db.worker")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    logger.propagate = False
    metrics = Metrics()
    if options.metrics is not None:
        try:
            metrics.serve(*options.metrics)
        except ImportError as error:
            raise Refused(
                "metrics need prometheus_client", "Run: pip install 'kakunin-db[metrics]'", status=2
            ) from error
        except OSError as error:
            raise Refused(f"metrics cannot be served: {error.strerror or error}") from error
    work = Worker(
        options.dsn,
        open_keys(options.keys),
        settings=Settings(
            interval=options.interval,
            poll=options.poll,
            lease=options.lease,
            batch=options.batch,
            witness_every=options.witness_every,
        ),
        witnesses=[open_witness(uri) for uri in options.witness],
        metrics=metrics,
    )

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)  # the second one ends it where it is
        work.stop()

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        with _delivering(options, webhook_keys, metrics, work.stop):
            work.run()
    finally:
        for each, was in before.items():
            signal.signal(each, was)
        logger.removeHandler(handler)
    return 0
