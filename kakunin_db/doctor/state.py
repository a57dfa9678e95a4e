"""Checks of the kit at work: clocks, keys, certificates, the ledger, webhooks."""

from __future__ import annotations

import datetime as dt
from typing import Any, Final

from . import facts as facts_
from .facts import Facts
from .findings import Finding

# The first release of each major that does not give hidden rows to INSERT ... ON CONFLICT (CVE-2026-120154).
_FIXED: Final = {15: 20, 16: 16, 17: 12, 18: 7}
_SOON: Final = dt.timedelta(days=14)
_RECOVER: Final = (
    "kakunin-db recover --witness URI, and again with --continue where the original is gone for good, or with"
    " --renew where it goes on elsewhere"
)


def outdated(facts: Facts) -> list[Finding]:
    major, minor = divmod(facts.version, 10000)
    if minor >= _FIXED.get(major, 0):
        return []
    return [
        Finding(
            "server-outdated",
            "warning",
            f"server {facts.server_version}",
            "INSERT ... ON CONFLICT DO UPDATE gives its WHERE rows that policies hide (CVE-2026-120154)",
            None,
            f"update Postgres to {major}.{_FIXED[major]} or later",
        )
    ]


def clock(facts: Facts) -> list[Finding]:
    found = []
    before = facts_.now()
    server = float(facts.value("select extract(epoch from clock_timestamp())::double precision"))
    after = facts_.now()
    off = server - (before + after) / 2
    if abs(off) > facts.max_skew + (after - before) / 2:
        found.append(
            Finding(
                "clock",
                "warning",
                "server clock",
                f"it is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} this machine's:"
                " assertions, tickets and certificates are judged by it",
                None,
                "have both follow a time server, as with: chronyc makestep",
            )
        )
    if refusal := facts.refusal("kakunin.tree_heads"):
        facts.unseen.append(("clock", refusal))
        return found
    newest = facts.value('select (max(h."timestamp") / 1000.0)::double precision from kakunin.tree_heads h')
    if newest is not None and newest > server + facts.max_skew:
        found.append(
            Finding(
                "clock",
                "critical",
                "newest tree head",
                f"it was signed {newest - server:.0f} s in the future: the server's clock went back",
                None,
                "have the server follow a time server; what is published later has to be dated later",
            )
        )
    return found


def _status(facts: Facts, function: str) -> dict[str, Any]:
    if function not in facts.kept:
        facts.kept[function] = facts.value(f"select {function} as status")
    kept: dict[str, Any] = facts.kept[function]
    return kept


def _moment(text: str | None) -> dt.datetime | None:
    return None if text is None else dt.datetime.fromisoformat(text)


def _server_time(facts: Facts) -> dt.datetime:
    moment: dt.datetime = facts.value("select clock_timestamp()")
    return moment


def lag(facts: Facts) -> list[Finding]:
    status = _status(facts, "kakunin.ledger_status()")
    if status["key_expires_at"] is None:
        return []  # ledger-key has it
    found = []
    if status["lag_seconds"] > facts.max_lag:
        found.append(
            Finding(
                "ledger-lag",
                "critical" if status["lag_seconds"] > 3600 else "warning",
                "ledger",
                f"{status['lag_entries']} entries wait for a signature, the oldest for"
                f" {status['lag_seconds']:.0f} s",
                None,
                "kakunin-db worker; if it runs, its log says why it does not sign",
            )
        )
    if status["leader"] is None and not _is_replica(facts):
        found.append(Finding("ledger-lag", "warning", "worker", "none leads", None, "kakunin-db worker"))
    return found


def worker(facts: Facts) -> list[Finding]:
    status = _status(facts, "kakunin.ledger_status()")
    problem = status.get("problem")
    if problem is None:
        return []
    forked = problem.startswith("integrity:")
    return [
        Finding(
            "ledger-worker",
            "critical" if forked else "warning",
            "worker",
            f"{status['leader']} says: {problem}",
            None,
            _RECOVER if forked else "see to what it says, and to its log",
        )
    ]


def _is_replica(facts: Facts) -> bool:
    """An auditor's, by logical replication: it has the publisher's place, and is not to sign."""
    return bool(
        facts.value(
            "select exists (select from pg_subscription_rel s join pg_class c on c.oid = s.srrelid"
            " join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname = 'kakunin_private' and c.relname = 'home')"
        )
    )


def place(facts: Facts) -> list[Finding]:
    home = _status(facts, "kakunin.ledger_home()")
    if not (home["moved"] or home["promoted"]) or _is_replica(facts):
        return []
    was, here = home["home"], home["here"]
    if home["moved"]:
        where = [
            f"table {at['ledger']} in database {at['database']} of server"
            f" {at['system_identifier'] or '(unknown)'}"
            for at in (was, here)
        ]
        return [
            Finding(
                "ledger-place",
                "critical",
                "ledger",
                f"it was sealed as {where[0]}, and this is {where[1]}: a copy, or it was moved or put back."
                " Nothing is sealed or signed here",
                None,
                _RECOVER,
            )
        ]
    late = _status(facts, "kakunin.ledger_status()")["lag_seconds"] > facts.max_lag
    return [
        Finding(
            "ledger-place",
            "warning" if late else "notice",
            "ledger",
            f"since its newest tree head the server was promoted, or recovered to a point in time (timeline"
            f" {was['timeline']}, now {here['timeline']}). Without a witness a new worker signs nothing",
            None,
            _RECOVER,
        )
    ]


def ledger_key(facts: Facts) -> list[Finding]:
    expires, now = _moment(_status(facts, "kakunin.ledger_status()")["key_expires_at"]), _server_time(facts)
    if expires is None:
        return [
            Finding(
                "ledger-key",
                "notice",
                "ledger",
                "it has no key, so nothing in it is evidence",
                None,
                "kakunin-db audit init",
            )
        ]
    if expires > now + _SOON:
        return []
    severity, verb = ("critical", "expired") if expires <= now else ("warning", "expires")
    return [
        Finding(
            "ledger-key",
            severity,
            "ledger",
            f"the last of its keys {verb} at {expires:%Y-%m-%d %H:%M:%SZ}",
            None,
            "kakunin-db audit init --another",
        )
    ]


def partitions(facts: Facts) -> list[Finding]:
    status = _status(facts, "kakunin.ledger_status()")
    until, found = _moment(status["partitions_until"]), []
    if until is None or until < _server_time(facts) + _SOON:
        said = "there are none" if until is None else f"the last one ends at {until:%Y-%m-%d}"
        found.append(
            Finding(
                "ledger-partitions",
                "warning",
                "ledger",
                f"{said}, and the worker makes them",
                "select kakunin.make_partitions();",
            )
        )
    if status["in_default_partition"]:
        found.append(
            Finding(
                "ledger-partitions",
                "notice",
                "table kakunin_private.ledger_default",
                "it has entries: there was no partition for their month. They stay there for good",
                None,
                "see that kakunin-db worker runs",
            )
        )
    return found


def authorities(facts: Facts) -> list[Finding]:
    row = facts.rows("authorities")[0]
    if row["until"] is None or row["until"] > row["now"] + dt.timedelta(days=30):
        return []
    severity, verb = ("critical", "expired") if row["until"] <= row["now"] else ("warning", "expires")
    return [
        Finding(
            "authority-expiry",
            severity,
            f"authority {row['key_id']}",
            f"the last one that certifies agents {verb} at {row['until']:%Y-%m-%d}, and with it what it"
            " signed",
            None,
            "kakunin-db ca init --another",
        )
    ]


def webhooks(facts: Facts) -> list[Finding]:
    status = _status(facts, "kakunin.webhook_status()")
    found = []
    if status["dead"]:
        found.append(
            Finding(
                "webhooks",
                "warning",
                "webhook deliveries",
                f"{status['dead']} were given up",
                None,
                "kakunin-db webhooks deliveries --state dead, and webhooks replay",
            )
        )
    if status["oldest_pending_seconds"] > facts.max_webhooks:
        found.append(
            Finding(
                "webhooks",
                "warning",
                "webhook queue",
                f"{status['pending']} wait, the oldest for {status['oldest_pending_seconds']:.0f} s",
                None,
                "kakunin-db worker --webhook-key FILE",
            )
        )
    if status["disabled"]:
        found.append(
            Finding(
                "webhooks",
                "notice",
                "webhook endpoints",
                f"{status['disabled']} are disabled",
                None,
                "kakunin-db webhooks list",
            )
        )
    return found
