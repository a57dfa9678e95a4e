"""What the commands about identity do and print: ``ca``, ``agent``, ``verify``, ``crl``, ``model-hash``
and ``jwks``.

cli.py reads the command line and reports what is raised here. A command that writes a file makes sure that it
can before it does anything else, and never writes over one; ``crl`` alone replaces a list by a newer one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import hashlib
import importlib.util
import json
import os
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .errors import AgentSuspendedError, BadInputError, KakuninError

if TYPE_CHECKING:
    import psycopg

    from .client import Agent, Authority, Certificate, HaltReceipt, Kakunin, Pending, RevocationList

_KEYS = "awskms:, file:/path/folder or pkcs11:..."


class Refused(Exception):  # noqa: N818
    """What cli.py prints; ``status`` is 2 where the command line is at fault."""

    def __init__(self, message: str, hint: str | None = None, *, status: int = 1) -> None:
        super().__init__(message)
        self.hint = hint
        self.status = status


def run(options: argparse.Namespace) -> int:
    """Performs the command; returns its exit status."""
    if options.needs == "nothing":
        done: int = options.do(options)
        return done
    options.dsn = checked_dsn(options)
    if options.needs == "keys" and not options.keys:
        raise Refused("no key store is named", f"Give --keys or set KAKUNIN_KEYS: {_KEYS}", status=2)
    if options.needs == "authority's key" and not (options.ca_keys or options.keys):
        raise Refused(
            "no key store is named",
            f"Give --ca-keys or --keys, or set KAKUNIN_CA_KEYS or KAKUNIN_KEYS: {_KEYS}",
            status=2,
        )
    status: int = options.do(options)
    return status


def checked_dsn(options: argparse.Namespace) -> str:
    from .migrate import check_dsn  # noqa: PLC0415

    if not options.dsn:
        raise Refused("no database is named", "Give --dsn or set KAKUNIN_DSN.", status=2)
    try:
        return check_dsn(options.dsn)
    except BadInputError as error:
        raise Refused(str(error), error.hint, status=2) from error


def _client(options: argparse.Namespace, connection: psycopg.Connection[Any] | None = None) -> Kakunin:
    from .client import Kakunin  # noqa: PLC0415

    return Kakunin(
        connection or options.dsn, keys=options.keys, ca_keys=options.ca_keys, crl_url=options.crl_url
    )


# Answers ----------------------------------------------------------------------------------------------

Pairs = Iterable[tuple[str, Any]]


def _answer(options: argparse.Namespace, document: Any, pairs: Pairs) -> None:
    """One JSON document; or a line for each value, and none for what is None or empty."""
    if options.json:
        print(json.dumps(_plain(document), indent=2))
        return
    lines = []
    for label, value in pairs:
        values = value if isinstance(value, (list, tuple, map)) else [value]
        shown = [_shown(v) for v in values if v is not None]
        lines += [(label if n == 0 else "", text) for n, text in enumerate(shown)]
    _print_aligned(lines)


def _answer_rows(options: argparse.Namespace, document: Any, rows: Iterable[Sequence[Any]]) -> None:
    """One JSON document; or a line for each row, its columns below each other."""
    if options.json:
        print(json.dumps(_plain(document), indent=2))
    else:
        _print_aligned([["-" if v is None else _shown(v) for v in row] for row in rows])


def _print_aligned(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]  # noqa: B905  (all have the same length)
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())  # noqa: B905


def _plain(value: Any) -> Any:
    """What JSON has: a result's fields, with its certificate or list as PEM instead of DER."""
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if f.name != "der"]
        names += [n for n in ("name", "status", "pem") if isinstance(getattr(type(value), n, None), property)]
        return {name: _plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dt.datetime):
        return value.astimezone(dt.timezone.utc).isoformat()
    return str(value) if isinstance(value, (uuid.UUID, Path)) else value


def _shown(value: Any) -> str:
    if isinstance(value, dt.datetime):
        return f"{value.astimezone(dt.timezone.utc):%Y-%m-%d %H:%M:%SZ}"
    return printable(json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value))


def printable(text: str) -> str:
    """``text`` without what a terminal would obey or the locale cannot write: names come from a database."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _note(text: str) -> None:
    """Not an error: something that is to be known all the same."""
    print(f"kakunin-db: {printable(' '.join(text.split()))}", file=sys.stderr)


def _day(moment: dt.datetime) -> str:
    return f"{moment.astimezone(dt.timezone.utc):%Y-%m-%d}"


# Files ------------------------------------------------------------------------------------------------


def _cannot(path: str, verb: str, error: OSError | ValueError, hint: str | None = None) -> Refused:
    return Refused(f"{path} cannot be {verb}: {getattr(error, 'strerror', None) or error}", hint)


def _read(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise _cannot(path, "read", error) from error


@contextlib.contextmanager
def _new_file(path: str | None, afterwards: str) -> Iterator[Callable[[str], str | None]]:
    """Makes the file at once, so that nothing is made that then has no place, and takes it away again where
    nothing came of it. ``afterwards`` says where else there is what could not be written after all."""
    if path is None:
        yield lambda text: None
        return
    try:
        file = open(path, "xb")  # noqa: SIM115
    except FileExistsError as error:
        raise Refused(
            f"{path} is there already, and nothing is written over it", "Name another file."
        ) from error
    except (OSError, ValueError) as error:
        raise _cannot(path, "written", error, "Nothing was done.") from error
    done = False

    def write(text: str) -> str:
        nonlocal done
        try:
            with file:
                file.write(text.encode())
        except OSError as error:
            raise _cannot(path, "written", error, afterwards) from error
        done = True
        return str(path)

    try:
        yield write
    finally:
        if not done:
            with contextlib.suppress(OSError):
                file.close()
            with contextlib.suppress(OSError):
                os.unlink(path)


# Authorities ------------------------------------------------------------------------------------------


def ca_init(options: argparse.Namespace) -> int:
    if options.intermediate == options.name:
        raise Refused("a root and its intermediate have different names", status=2)
    elsewhere = "The authority stands, and kakunin-db ca list --json has its certificate."
    with _new_file(options.out, elsewhere) as write, _client(options) as kakunin:
        before = kakunin.authorities.list()
        trusted = [a for a in before if _trust(a) == "trusted"]
        if trusted and not options.another:
            raise BadInputError(
                f"an authority is trusted here already: {trusted[0].key_id}, {trusted[0].name}",
                "kakunin-db ca list shows it; --another makes one more.",
            )
        after = kakunin.authorities.create(options.name, intermediate=options.intermediate)
        known = {a.key_id for a in before}
        made = [a for a in after if a.key_id not in known]
        chain = _chain(_leaves(made)[0], made)
        written = None
        try:
            written = write("".join(a.pem for a in chain))
        finally:
            _answer(
                options,
                {"authorities": chain, "written": written},
                [("authority", map(_one_line, chain)), ("written", written)],
            )
    return 0


def _one_line(authority: Authority) -> str:
    return f"{authority.key_id}  until {_day(authority.not_after)}  {authority.name}"


def _trust(authority: Authority) -> str:
    if authority.distrusted_at is not None:
        return "distrusted"
    now = dt.datetime.now(dt.timezone.utc)
    if now < authority.not_before:
        return "not_yet_valid"
    return "trusted" if now <= authority.not_after else "expired"


def _leaves(authorities: Sequence[Authority]) -> list[Authority]:
    """Those that have none below them, so that agents are certified by them; the likeliest first."""
    above = {a.issuer_key_id for a in authorities if a.issuer_key_id != a.key_id}
    return sorted(
        (a for a in authorities if a.key_id not in above),
        key=lambda a: (_trust(a) != "trusted", a.issuer_key_id == a.key_id, -a.not_after.timestamp()),
    )


def _chain(authority: Authority, authorities: Sequence[Authority]) -> list[Authority]:
    """From this one to its root."""
    by_key = {a.key_id: a for a in authorities}
    chain = [authority]
    while (above := by_key.get(chain[-1].issuer_key_id)) is not None and above not in chain:
        chain.append(above)
    return chain


def ca_list(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        authorities = kakunin.authorities.list()
    names = {a.key_id: a.name for a in authorities}

    def row(a: Authority) -> tuple[str, ...]:
        trust = f"distrusted: {a.distrust_reason}" if a.distrust_reason else _trust(a)
        above = (
            "" if a.issuer_key_id == a.key_id else f", below {names.get(a.issuer_key_id, a.issuer_key_id)}"
        )
        return a.key_id, trust, f"until {_day(a.not_after)}", a.name + above

    _answer_rows(options, authorities, map(row, authorities))
    if not authorities:
        _note("no authority is trusted here. kakunin-db ca init makes one.")
    return 0


def ca_trust(options: argparse.Namespace) -> int:
    """A file may have several, such as the chain that ``ca init`` writes; issuers are pinned first."""
    certificates = _certificates(options.file)
    with _client(options) as kakunin:
        key_ids = [kakunin.authorities.trust(der) for der in certificates]
        made = {a.key_id: a for a in kakunin.authorities.list()}
    pinned = [made[key_id] for key_id in key_ids]
    _answer(options, pinned, [("trusted", map(_one_line, pinned))])
    return 0


def _certificates(path: str) -> list[bytes]:
    """The certificates in a file, an issuer before what it issued."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    content = _read(path)
    try:
        pem = b"-----BEGIN" in content
        found = x509.load_pem_x509_certificates(content) if pem else [x509.load_der_x509_certificate(content)]
        waiting = [(c.subject, c.issuer, c.public_bytes(serialization.Encoding.DER)) for c in found]
    except ValueError as error:
        raise BadInputError(
            f"{path} is not a certificate", "Give the certificate of an authority, PEM or DER."
        ) from error
    ordered: list[bytes] = []
    while waiting:
        subjects = [subject for subject, *_ in waiting]
        # Those in a circle come as they are, for the database to refuse.
        ready = [entry for entry in waiting if entry[0] == entry[1] or entry[1] not in subjects] or waiting
        ordered += [der for *_, der in ready]
        waiting = [entry for entry in waiting if entry not in ready]
    return ordered


def ca_distrust(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        serials = kakunin.authorities.distrust(options.key_id, options.reason)
        _answer(
            options,
            {"key_id": options.key_id, "certificates_revoked": serials},
            [("distrusted", options.key_id), ("revoked", serials)],
        )
        if not (options.ca_keys or options.keys):
            _note("the revocation lists do not say so yet. kakunin-db crl publishes them.")
            return 0
        try:
            waiting = list(kakunin.authorities.sign_pending().waiting)
        except Exception as error:
            waiting = [str(error)]
        for reason in waiting:
            _note(f"the authority is not trusted any more, but not all lists say so yet: {reason}")
    return 0


# Agents -----------------------------------------------------------------------------------------------


def _agent_pairs(agent: Agent) -> Pairs:
    return [
        ("agent_id", agent.agent_id),
        ("name", agent.name),
        ("tenant", agent.tenant),
        ("model", agent.model),
        ("model_version", agent.model_version),
        ("model_hash", agent.model_hash),
        ("status", agent.status),
        ("created", agent.created_at),
        ("suspended", agent.suspended_at),
        ("reason", agent.suspended_reason),
    ]


def agent_create(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        agent = kakunin.agents.create(
            options.name,
            model=options.model,
            version=options.model_version,
            model_hash=options.model_hash,
            tenant=options.tenant,
        )
    _answer(options, agent, _agent_pairs(agent))
    return 0


def agent_certify(options: argparse.Namespace) -> int:
    with _certificate_file(options) as write, _client(options) as kakunin:
        # A key in a KMS is not made to be thrown away.
        agent = kakunin.agents.get(options.agent_id)
        if agent.suspended_at is not None:
            raise AgentSuspendedError(
                f"agent {agent.agent_id} is suspended: {agent.suspended_reason}",
                "After review, an operator lifts it: kakunin-db agent reinstate.",
            )
        active = None if options.overlap is not None else _current(kakunin.certificates.list(agent.agent_id))
        if active:
            raise BadInputError(
                f"agent {agent.agent_id} has an active certificate already, {active[0].serial_number}",
                "Give --overlap 1h, after which it is superseded, or revoke it.",
            )
        certificate = kakunin.agents.certify(
            agent.agent_id,
            permitted_actions=options.action,
            financial_scope=options.financial_scope,
            lifetime=options.days,
            overlap=options.overlap,
            authority=options.authority,
        )
        _certified(options, certificate, write)
    return 0


def agent_rotate(options: argparse.Namespace) -> int:
    with _certificate_file(options) as write, _client(options) as kakunin:
        certificate = kakunin.agents.rotate(options.agent_id, overlap=options.overlap, lifetime=options.days)
        _certified(options, certificate, write)
    return 0


def _certificate_file(
    options: argparse.Namespace,
) -> contextlib.AbstractContextManager[Callable[[str], str | None]]:
    return _new_file(
        options.out,
        f"The certificate is registered, and kakunin-db agent show {options.agent_id} --json has it.",
    )


def _certified(
    options: argparse.Namespace, certificate: Certificate, write: Callable[[str], str | None]
) -> None:
    written, signer = None, _signer_of(options.keys, certificate)
    try:
        written = write(certificate.pem)
    finally:
        _answer(
            options,
            {**_plain(certificate), "signer": signer, "written": written},
            [
                ("agent_id", certificate.agent_id),
                ("serial", certificate.serial_number),
                ("valid", f"{_shown(certificate.not_before)} to {_shown(certificate.not_after)}"),
                ("actions", certificate.permitted_actions),
                ("financial_scope", certificate.financial_scope),
                ("model", certificate.model),
                ("model_hash", certificate.model_hash),
                ("tenant", certificate.tenant),
                ("issuer", certificate.issuer_key_id),
                ("key", certificate.key_id),
                ("signer", signer),
                ("written", written),
            ],
        )


def _signer_of(keys: str, certificate: Certificate) -> str | None:
    """The URI of a key in a file, whose name nobody would guess. None for other stores."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey  # noqa: PLC0415

    from .signers import LocalKeys, open_keys  # noqa: PLC0415

    store = open_keys(keys) if keys.startswith("file:") else None
    public_key = x509.load_der_x509_certificate(certificate.der).public_key()
    if not isinstance(store, LocalKeys) or not isinstance(public_key, RSAPublicKey):
        return None
    return "file:" + quote(str(store.path(public_key).absolute()))


def _current(certificates: Iterable[Certificate]) -> list[Certificate]:
    """Those that are not about to be superseded: neither expired nor revoked, nor to be."""
    now = dt.datetime.now(dt.timezone.utc)
    return [c for c in certificates if c.revoked_at is None and c.not_after >= now]


def agent_show(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        agent = kakunin.agents.get(options.agent_id)
        certificates = kakunin.certificates.list(agent.agent_id)
        halts = kakunin.agents.halts(agent.agent_id)

    def validity(c: Certificate) -> str:
        if c.revoked_at is None:
            return c.status
        return f"{c.status}, {c.revocation_reason} {_shown(c.revoked_at)}"

    _answer(
        options,
        {**_plain(agent), "certificates": certificates, "halts": halts},
        [
            *_agent_pairs(agent),
            (
                "certificate",
                [f"{c.serial_number}  until {_shown(c.not_after)}  {validity(c)}" for c in certificates],
            ),
            ("halt", [f"{h.halt_id}  {_shown(h.halted_at)}  {_signed(h)}" for h in halts]),
        ],
    )
    return 0


def _signed(receipt: HaltReceipt) -> str:
    return f"signed by {receipt.key_id}" if receipt.signature else "not signed yet"


def agent_list(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        found = kakunin.agents.list(status=options.status, limit=options.limit + 1)
    agents = found[: options.limit]
    rows = [(a.agent_id, a.status, _day(a.created_at), a.name, a.model or "") for a in agents]
    _answer_rows(options, agents, rows)
    if len(found) > len(agents):
        _note(f"there are more than {options.limit}. --limit shows them.")
    elif not found:
        _note("no agents")
    return 0


def agent_update(options: argparse.Namespace) -> int:
    changes = {
        "name": options.name,
        "model": options.model,
        "version": options.model_version,
        "model_hash": options.model_hash,
        "tenant": options.tenant,
    }
    if all(value is None for value in changes.values()):
        raise Refused(
            "nothing is to be changed",
            "Give --name, --model, --model-version, --model-hash or --tenant.",
            status=2,
        )
    with _client(options) as kakunin:
        update = kakunin.agents.update(options.agent_id, **changes)
    _answer(
        options,
        update,
        [*_agent_pairs(update.agent), ("revoked", update.certificates_revoked), ("next", update.next)],
    )
    _say_pending(update.crl_pending)
    return 0


def _say_pending(reason: str | None) -> None:
    if reason is not None:
        _note(f"the revocation stands, and is not on the revocation list yet: {reason}")


def agent_revoke(options: argparse.Namespace) -> int:
    from .client import Kakunin  # noqa: PLC0415

    with _client(options) as kakunin:
        if options.serial is not None:
            serials = [options.serial]
        else:
            agent = kakunin.agents.get(options.agent_id)
            # One that is about to be superseded still counts, and so does one of a suspended agent.
            held = kakunin.certificates.list(agent.agent_id)
            serials = [c.serial_number for c in held if c.status not in ("revoked", "expired")]
            if not serials:
                raise BadInputError(f"agent {agent.agent_id} has no active certificate")
        if len(serials) > 1:
            # None waits for the KMS of another. Revoking again changes nothing, and publishes the list.
            with Kakunin(options.dsn) as without_keys:
                for serial in serials:
                    without_keys.certificates.revoke(serial, options.reason)
        results = [kakunin.certificates.revoke(serial, options.reason) for serial in serials]
    _answer(options, results, [("revoked", [f"{r.serial_number}  {_shown(r.revoked_at)}" for r in results])])
    _say_pending(results[-1].crl_pending)
    return 0


def agent_suspend(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        agent = kakunin.agents.suspend(options.agent_id, options.reason)
    _answer(options, agent, _agent_pairs(agent))
    return 0


def agent_reinstate(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        agent = kakunin.agents.reinstate(options.agent_id)
    _answer(options, agent, _agent_pairs(agent))
    return 0


def agent_halt(options: argparse.Namespace) -> int:
    from .client import write_receipt  # noqa: PLC0415

    if options.out is not None and not (
        os.path.isdir(options.out) and os.access(options.out, os.W_OK | os.X_OK)
    ):
        raise Refused(
            f"{options.out} is not a folder that can be written to",
            "Nothing was halted. Name another one, or leave --out away.",
        )
    with _client(options) as kakunin:
        try:
            receipt = kakunin.agents.halt(options.agent_id, options.reason, terminate=options.terminate)
        except KeyboardInterrupt as interrupted:
            # Most likely while the KMS was waited for, when all is done but the signature.
            raise Refused(
                "interrupted, and the halt may stand",
                f"kakunin-db agent show {options.agent_id} says so; kakunin-db crl signs its receipt.",
                status=130,
            ) from interrupted
    written: list[Path] = []
    try:
        if options.out is not None:
            written = [path for path in write_receipt(receipt, options.out) if path is not None]
    except OSError as error:
        raise Refused(
            f"the halt stands, but its receipt cannot be written: {error.strerror}",
            f"kakunin-db agent show {receipt.agent_id} --json has it.",
        ) from error
    finally:
        _answer(
            options,
            {**_plain(receipt), "written": written},
            [
                ("halted", receipt.agent_id),
                ("at", receipt.halted_at),
                ("halt_id", receipt.halt_id),
                ("revoked", receipt.certificates_revoked),
                ("backends", f"{receipt.backends_terminated} ended" if options.terminate else None),
                ("receipt", _signed(receipt)),
                ("written", written),
            ],
        )
    if receipt.pending is not None:
        _note(
            f"the halt stands; the signature of its receipt is pending: {receipt.pending.rstrip('.')}."
            " kakunin-db crl signs it later."
        )
    elif receipt.crl_pending is not None:
        _note(f"the halt stands; the revocation list does not have it yet: {receipt.crl_pending}")
    if receipt.backends_not_terminated:
        _note(f"the halt stands; backends not ended: {receipt.backends_not_terminated}. {receipt.hint}")
    return 0


def agent_sign(options: argparse.Namespace) -> int:
    payload = _read(options.file)
    with _client(options) as kakunin:
        result = kakunin.agents.sign(options.agent_id, payload)
    if options.json:
        _answer(options, result, [])
    else:
        print(result.signature)
    return 0


# Verification -----------------------------------------------------------------------------------------


def verify(options: argparse.Namespace) -> int:
    with _client(options) as kakunin:
        result = kakunin.verify.certificate(options.serial)
    _answer(
        options,
        result,
        [
            ("serial", result.serial_number),
            ("valid", "yes" if result.valid else "no"),
            ("status", result.status),
            ("revoked", result.revoked_at),
            ("reason", result.revocation_reason),
            ("agent_id", result.agent_id),
            ("name", result.agent_name),
            ("not_before", result.not_before),
            ("not_after", result.not_after),
            ("actions", result.permitted_actions),
            ("financial_scope", result.financial_scope),
            ("model", result.model),
            ("model_hash", result.model_hash),
            ("tenant", result.tenant),
            ("issuer", result.issuer_key_id),
        ],
    )
    return 0 if result.valid else 1


# Revocation lists and receipts ------------------------------------------------------------------------


class _ListFile:
    """The file that holds the newest revocation list of the issuing authority."""

    def __init__(self, path: str | None, authority: str | None) -> None:
        self._path = path
        self._authority = authority
        self._written: bytes | None = None
        if path is None:
            return
        if not os.access(os.path.dirname(path) or ".", os.W_OK | os.X_OK) or os.path.isdir(path):
            raise Refused(f"{path} cannot be written", "Its folder has to be there, and writable.")
        if os.path.lexists(path) and not _is_revocation_list(path):
            raise Refused(
                f"{path} is there already and is no revocation list, so it is not replaced",
                "Name another file.",
            )

    def update(self, authorities: Sequence[Authority], lists: Sequence[RevocationList]) -> str | None:
        """Replaces the file where there is a newer list; returns its path then."""
        if self._path is None:
            return None
        key_id = self._authority or next((a.key_id for a in _leaves(authorities)), None)
        newest = next((crl for crl in lists if crl.key_id == key_id), None)
        if newest is None:
            raise BadInputError(
                f"{self._path} is not written: authority {key_id} has no revocation list yet"
                if key_id
                else f"{self._path} is not written: no authority is trusted here"
            )
        if newest.der == self._written:
            return None
        data = newest.der if self._path.endswith((".crl", ".der")) else newest.pem.encode()
        folder, name = os.path.split(self._path)
        # Whoever reads it meanwhile has the old one whole, or the new one.
        beside = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")
        try:
            with open(beside, "xb") as file:
                file.write(data)
            os.replace(beside, self._path)
        except OSError as error:
            raise _cannot(self._path, "written", error) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(beside)
        self._written = newest.der
        return self._path


def _is_revocation_list(path: str) -> bool:
    from cryptography import x509  # noqa: PLC0415

    if not os.path.isfile(path):
        return False
    try:
        content = Path(path).read_bytes()
        (x509.load_pem_x509_crl if content.startswith(b"-----BEGIN") else x509.load_der_x509_crl)(content)
    except (OSError, ValueError):
        return False
    return True


def crl(options: argparse.Namespace) -> int:
    if options.watch and options.json:
        raise Refused("--watch writes lines to stderr as it goes, and no JSON", status=2)
    file = _ListFile(options.out, options.authority)
    if options.watch:
        return _watch(options, file)
    with _client(options) as kakunin:
        pending = kakunin.authorities.sign_pending(lifetime=options.days)
        lists = kakunin.authorities.revocation_lists()
        authorities = kakunin.authorities.list()
    written = None
    failed: Refused | BadInputError | None = None
    try:
        written = file.update(authorities, lists)
    except (Refused, BadInputError) as error:
        failed = error
    _answer(
        options,
        {**_plain(pending), "lists": lists, "written": written},
        [
            (
                "signed",
                [f"revocation list of {key_id}" for key_id in pending.crls]
                + [f"receipt of halt {halt_id}" for halt_id in pending.receipts],
            ),
            ("waiting", pending.waiting),
            ("written", written),
        ],
    )
    if pending.waiting:
        more = f" (and {len(pending.waiting) - 1} more)" if len(pending.waiting) > 1 else ""
        raise Refused(f"not everything could be signed{more}: {pending.waiting[0]}")
    if failed is not None:
        raise failed
    return 0


# Seconds.
_LONGEST_PAUSE = 30.0
_LONGEST_RETRY = 60.0


def _watch(options: argparse.Namespace, file: _ListFile) -> int:
    """Signs what is due until SIGTERM or SIGINT. An error in the first round ends it, and none after that."""
    import psycopg  # noqa: PLC0415

    from .conninfo import lasting  # noqa: PLC0415

    dsn = lasting(options.dsn, fallback_application_name="kakunin-db crl --watch")
    watcher = _Watcher(options, file)

    def stop(number: int, frame: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)  # the second one ends it where it is
        # psycopg takes back a query that is under way. All that is done is done whole or not at all.
        raise KeyboardInterrupt

    before = {each: signal.signal(each, stop) for each in (signal.SIGTERM, signal.SIGINT)}
    pause = 1.0
    try:
        while True:
            rounds = watcher.rounds
            try:
                with psycopg.connect(dsn, autocommit=True) as connection:
                    watcher.watch(connection)
            except Exception as error:
                if watcher.rounds == 0:
                    raise
                if watcher.rounds > rounds:
                    pause = 1.0
                _log(f"{_why(error)}; trying again in {pause:.0f} s")
                watcher.lost = True
            time.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)
    except KeyboardInterrupt:
        _log("ended")
        return 0
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _why(error: Exception) -> str:
    """What may be logged of it: others' messages may quote anything."""
    import psycopg  # noqa: PLC0415

    if isinstance(error, psycopg.Error):
        return error.diag.message_primary or str(error)
    if isinstance(error, (KakuninError, Refused)):
        return f"{error}. {error.hint}" if error.hint else str(error)
    return type(error).__name__


def _log(line: str) -> None:
    now = dt.datetime.now(dt.timezone.utc)
    print(f"{now:%Y-%m-%dT%H:%M:%SZ} {printable(' '.join(line.split()))}", file=sys.stderr, flush=True)


class _Watcher:
    """What ``crl --watch`` remembers from one connection to the next."""

    def __init__(self, options: argparse.Namespace, file: _ListFile) -> None:
        self._options = options
        self._file = file
        self._told: set[str] = set()
        self._retry = 1.0
        self.rounds = 0
        self.lost = False

    def watch(self, connection: psycopg.Connection[Any]) -> None:
        """Rounds, until something is raised."""
        kakunin = _client(self._options, connection)
        if self.lost:
            self.lost = False
            _log("connected again")
        while True:
            waiting = self._round(kakunin)
            self.rounds += 1
            every: float = self._options.every
            time.sleep(max(self._retry, every) if waiting else every)
            self._retry = min(self._retry * 2, _LONGEST_RETRY) if waiting else 1.0

    def _round(self, kakunin: Kakunin) -> bool:
        """Signs what is due and writes the file; returns whether something has to be tried again."""
        pending = kakunin.authorities.sign_pending(lifetime=self._options.days)
        lists = kakunin.authorities.revocation_lists()
        authorities = kakunin.authorities.list()
        if self.rounds == 0:
            _log(f"watching, every {self._options.every} s")
        self._report(pending, lists)
        waiting = set(pending.waiting)
        try:
            path = self._file.update(authorities, lists)
            if path is not None:
                _log(f"wrote {path}")
        except (Refused, BadInputError) as error:
            waiting.add(str(error))
        # Not again in every round.
        for reason in sorted(waiting - self._told):
            _log(f"waiting: {reason}")
        self._told = waiting
        return bool(waiting)

    @staticmethod
    def _report(pending: Pending, lists: Sequence[RevocationList]) -> None:
        by_key = {crl.key_id: crl for crl in lists}
        for key_id in pending.crls:
            crl = by_key[key_id]
            _log(f"signed revocation list {crl.number} of {key_id}, with {crl.entries} entries")
        for halt_id in pending.receipts:
            _log(f"signed the receipt of halt {halt_id}")


# Models -----------------------------------------------------------------------------------------------


def model_hash(options: argparse.Namespace) -> int:
    from .model_hash import compute_model_hash  # noqa: PLC0415

    if options.path == "-":
        digest = hashlib.sha256()
        try:
            while chunk := sys.stdin.buffer.read(1 << 20):
                digest.update(chunk)
        except OSError as error:
            raise _cannot("-", "read", error) from error
        value = f"sha256:{digest.hexdigest()}"
    else:
        # The bar is drawn with rich, which is an extra.
        progress = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
        value = compute_model_hash(Path(options.path), progress=progress)
    if options.json:
        _answer(options, {"model_hash": value}, [])
    else:
        print(value)
    return 0


def jwks(options: argparse.Namespace) -> int:
    from .signers import open_jwt_signer  # noqa: PLC0415
    from .tokens import jwks as jwk_set  # noqa: PLC0415

    # JSON with --json and without: there is no other form of it.
    print(json.dumps(jwk_set([open_jwt_signer(uri).public_key() for uri in options.signers]), indent=2))
    return 0
