"""What is done to a database as a whole: ``recover`` and ``uninstall``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .commands import Refused, _answer, _connect, _note, _read

if TYPE_CHECKING:
    import uuid

    import psycopg
    from cryptography import x509

# Of those that witnesses kept, which the tree here does not have.
_LOST = """
select w.tree_size
  from unnest(%s::bigint[], %s::bytea[]) w(tree_size, root)
 where not exists (select from kakunin_private.batches b where b.tree_size = w.tree_size and b.root = w.root)
 order by w.tree_size"""

# A revocation may lie ahead here (an overlap), and have been brought forward since.
_REVOKE = (
    "select kakunin.revoke_certificate(c.serial, %(reason)s) from kakunin.certificates c"
    " where c.serial = %(serial)s and c.issuer_key_id = %(issuer)s"
    "   and coalesce(c.revoked_at > clock_timestamp(), true)",
    "select kakunin.revoke_ledger_key(k.key_id, %(reason)s) from kakunin.ledger_keys k"
    " where k.serial = %(serial)s and k.issuer_key_id = %(issuer)s and k.revoked_at is null",
)
_KNOWN = (
    "select from kakunin.certificates c where c.serial = %(serial)s and c.issuer_key_id = %(issuer)s",
    "select from kakunin.ledger_keys k where k.serial = %(serial)s and k.issuer_key_id = %(issuer)s",
)

# What was published is the newest list, whatever the database remembers.
_NEWEST = """
insert into kakunin_private.crls as l
  (key_id, number, this_update, next_update, serials, der, published_at, published_by)
values (%(key_id)s, %(number)s, %(this_update)s, %(next_update)s, %(serials)s, %(der)s, now(), session_user)
on conflict (key_id) do update
  set number = excluded.number, this_update = excluded.this_update, next_update = excluded.next_update,
      serials = excluded.serials, der = excluded.der, published_at = excluded.published_at,
      published_by = excluded.published_by
  where l.number < excluded.number"""


class _Witnessed(NamedTuple):
    newest: int | None  # entries that the newest tree head of a witness is over
    lost: int | None  # and the smallest one that is not of this tree


def uninstall(options: argparse.Namespace) -> int:
    from . import uninstall as module  # noqa: PLC0415

    steps = module.plan(options.dsn, without_export=options.without_export)
    if options.dry_run:
        print(module.script(steps), end="")
        return 0
    change = module.uninstall(options.dsn, steps, on_notice=_note)
    _answer(
        options,
        {"before": change.before, "closed": steps.closed, "unprotected": steps.unprotected},
        [
            ("removed", f"revision {change.before or 'base'}"),
            ("closed", [f"{name}: row security stays on" for name in steps.closed]),
            ("open", [f"{name}: had no row security before either" for name in steps.unprotected]),
        ],
    )
    return 0


def recover(options: argparse.Namespace) -> int:
    """What a restored, upgraded or promoted database is, and what its ledger is to do there. Exit status 1
    where somebody has to decide."""
    lists = list(_lists(options.crl))
    with _connect(options) as connection:
        installation, home = _one(connection, "select kakunin.installation_id(), kakunin.ledger_home()")
        witnessed = _ask(connection, installation, options.witness)
        moved = home["moved"] or home["promoted"]
        if options.action == "continue":
            _check_continues(options, witnessed)
        # First: a worker that waits would sign by a ledger key that was revoked in the lost time.
        revoked, unknown = _revoke(connection, lists)
        if options.action == "continue":
            _settle(connection, options.dsn, "select kakunin.continue_ledger()")
            moved = False
        elif options.action == "renew":
            (installation,) = _settle(connection, options.dsn, "select kakunin.renew_installation()")
            moved, witnessed = False, _Witnessed(None, None)
        (status,) = _one(connection, "select kakunin.ledger_status()")
    state = "lost" if witnessed.lost is not None else "moved" if moved else "at home"
    document = {
        "installation": installation,
        "state": state,
        **{name: home[name] for name in ("home", "here", "moved", "promoted")},
        "tree_size": status["tree_size"],
        "signed_size": status["signed_size"],
        "witnessed_size": witnessed.newest,
        "lost_from": witnessed.lost,
        "revoked": revoked,
        "unknown": unknown,
    }
    _answer(
        options,
        document,
        [
            ("installation", installation),
            ("sealed in", _place(home["home"])),
            ("this is", _place(home["here"])),
            ("state", state),
            ("entries", f"{status['tree_size']} sealed, {status['signed_size']} signed"),
            ("witnessed", witnessed.newest),
            ("not here", None if witnessed.lost is None else f"a tree head over {witnessed.lost} entries"),
            ("revoked", revoked),
            ("unknown", unknown),
        ],
    )
    if options.action == "renew":
        _note("this is a ledger of its own now: kakunin-db audit init makes its key")
    elif witnessed.lost is not None:
        _note("entries that were signed are not here: keep them if they can be had, then recover --renew")
    elif moved:
        _note(
            "if the original is gone for good: recover --continue; if it goes on elsewhere: recover --renew"
        )
    return int(state != "at home")


def _one(connection: psycopg.Connection[Any], query: str, parameters: Any = None) -> Any:
    return connection.execute(query.encode(), parameters).fetchone()


def _settle(connection: psycopg.Connection[Any], dsn: str, query: str) -> Any:
    """Any login may append and leave its transaction open, so who does is named."""
    import psycopg  # noqa: PLC0415

    from . import migrate  # noqa: PLC0415

    try:
        return _one(connection, query)
    except psycopg.errors.LockNotAvailable as error:
        raise Refused(
            f"the ledger was not settled, because others are appending: {migrate.holders(dsn)}",
            "Run it again when these transactions have ended, or end them: select"
            " pg_terminate_backend(<process>).",
        ) from error


def _place(place: dict[str, Any] | None) -> str:
    if place is None:
        return "nowhere yet"
    server = place["system_identifier"] or "(unknown)"
    timeline = place["timeline"] or "-"
    return f"table {place['ledger']} in database {place['database']} of server {server}, timeline {timeline}"


# The witnesses ----------------------------------------------------------------------------------------


def _ask(connection: psycopg.Connection[Any], installation: uuid.UUID, witnesses: list[str]) -> _Witnessed:
    from .ledger import open_witness  # noqa: PLC0415

    heads = {
        (head.tree_size, head.root) for uri in witnesses for head in open_witness(uri).heads(installation)
    }
    if not heads:
        return _Witnessed(None, None)
    sizes, roots = zip(*sorted(heads))  # noqa: B905  (pairs)
    lost = _one(connection, _LOST, [list(sizes), list(roots)])
    return _Witnessed(sizes[-1], lost[0] if lost else None)


def _check_continues(options: argparse.Namespace, witnessed: _Witnessed) -> None:
    if witnessed.lost is not None:
        raise Refused(
            f"a witness has a tree head over {witnessed.lost} entries that is not of the ledger here",
            "Going on would sign a second history under one name. Keep what is missing if it can be had, then"
            " recover --renew; or go back to the server that has it.",
        )
    if witnessed.newest is None and not options.without_witness:
        raise Refused(
            "no witness has a tree head of this installation, so nobody can tell whether the end is missing",
            "Give --witness; or say --without-witness where the original was stopped before the last backup.",
        )


# Revocations ------------------------------------------------------------------------------------------


def _lists(paths: list[str]) -> Iterator[x509.CertificateRevocationList]:
    from cryptography import x509  # noqa: PLC0415

    for path in paths:
        content = _read(path)
        try:
            if b"-----BEGIN" not in content:
                yield x509.load_der_x509_crl(content)
                continue
            for part in content.split(b"-----BEGIN X509 CRL-----")[1:]:
                yield x509.load_pem_x509_crl(b"-----BEGIN X509 CRL-----" + part)
        except ValueError as error:
            raise Refused(f"{path} is not a revocation list, PEM or DER") from error


def _revoke(
    connection: psycopg.Connection[Any], lists: list[x509.CertificateRevocationList]
) -> tuple[list[str], list[str]]:
    """Revokes what an authority's list has and the database has not; returns it, and what is unknown here.
    The next list is numbered after this one."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415

    from .ca import key_id  # noqa: PLC0415
    from .serials import normalize_serial  # noqa: PLC0415

    revoked: list[str] = []
    unknown: list[str] = []
    authorities = [
        x509.load_der_x509_certificate(row[0])
        for row in connection.execute("select der from kakunin.authorities")
    ]
    for each in lists:
        issuer = next((a for a in authorities if _signed_by(each, a)), None)
        if issuer is None:
            raise Refused("a revocation list is not signed by an authority that is trusted here")
        try:
            number = each.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        except (x509.ExtensionNotFound, ValueError) as error:
            raise Refused("a revocation list has no number (RFC 5280 section 5.2.3)") from error
        for entry in each:
            serial = normalize_serial(entry.serial_number)
            reasons = entry.extensions
            reason = (
                reasons.get_extension_for_class(x509.CRLReason).value.reason.value
                if reasons
                else "unspecified"
            )
            parameters = {"serial": serial, "issuer": key_id(issuer), "reason": reason}
            if any(_one(connection, query, parameters) for query in _REVOKE):
                revoked.append(serial)
            elif not any(_one(connection, query, parameters) for query in _KNOWN):
                unknown.append(serial)
        connection.execute(
            _NEWEST,
            {
                "key_id": key_id(issuer),
                "number": number,
                "this_update": each.last_update_utc,
                "next_update": each.next_update_utc,
                "serials": [normalize_serial(entry.serial_number) for entry in each],
                "der": each.public_bytes(serialization.Encoding.DER),
            },
        )
    return revoked, unknown


def _signed_by(revocations: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    public_key: Any = authority.public_key()
    return authority.subject == revocations.issuer and revocations.is_signature_valid(public_key)
