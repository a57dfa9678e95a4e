"""What a DBA should know about a live database: findings, each with its object, the reason and what mends it.

Everything is read in one read-only transaction, from the catalogs and from what the kit tells the login that
asks. What that login may not see is not passed over: it is ``not_checked``, with what is needed to see it.
The checks are a catalog, :data:`kakunin_db.doctor.checks.CHECKS`; docs/doctor.md has them in a table.

Names, comments and function bodies in the database may be an attacker's. They are compared and quoted, and
never run: the search path is pg_catalog alone, expressions are read as the parser left them, and of the kit's
own functions and views only those are asked that cannot be somebody else's code with our rights
(:meth:`Facts.refusal`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from ..errors import BadInputError
from .checks import CHECKS, Check
from .facts import Facts
from .findings import SEVERITIES, Finding

__all__ = ["CHECKS", "FORMAT", "SEVERITIES", "Check", "Finding", "Report", "Thresholds", "examine"]

FORMAT: Final = "kakunin-doctor/1"

# Our names alone, whatever the login, the database or an earlier client of the same backend have set; and
# texts that read the same everywhere. Any writer of a table can lock it, and so stop a check.
_SESSION: Final = """
    set local search_path = pg_catalog, pg_temp;
    set local quote_all_identifiers = off;
    set local standard_conforming_strings = on;
    set local datestyle = 'ISO, YMD';
    set local intervalstyle = 'iso_8601';
    set local timezone = 'UTC';
    set local client_min_messages = error;
    set local jit = off;
    set local lock_timeout = '2s';
    set local statement_timeout = '60s'
"""


@dataclass(frozen=True)
class Thresholds:
    """From where on something is a finding. Seconds."""

    lag: float = 30.0
    skew: float = 5.0
    webhooks: float = 300.0


@dataclass(frozen=True)
class NotChecked:
    """A check, or a part of one, that this login or this version of the kit did not allow."""

    id: str
    needs: str


@dataclass(frozen=True)
class Report:
    """What :func:`examine` found. ``not_checked`` is what this login could not see, ``ignored`` the findings
    that were to be left out, and ``unmatched`` what was to be left out and was not there."""

    database: str
    server_version: str
    login: str
    checked_at: dt.datetime
    findings: list[Finding]
    not_checked: list[NotChecked]
    ignored: list[Finding] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)

    @property
    def worst(self) -> str | None:
        """The gravest severity among the findings; None without any."""
        return next((s for s in SEVERITIES if any(f.severity == s for f in self.findings)), None)

    def count(self, severity: str) -> int:
        return sum(f.severity == severity for f in self.findings)

    def document(self) -> dict[str, Any]:
        """The report as JSON has it; docs/doctor.md describes it."""
        return {
            "format": FORMAT,
            "database": self.database,
            "server_version": self.server_version,
            "login": self.login,
            "checked_at": self.checked_at.isoformat(),
            "checks": len(CHECKS),
            "worst": self.worst,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [f.document() for f in self.findings],
            "not_checked": [{"id": n.id, "needs": n.needs} for n in self.not_checked],
            "ignored": [{"id": f.id, "object": f.object} for f in self.ignored],
        }


def examine(
    connection: psycopg.Connection[Any], *, thresholds: Thresholds | None = None, ignore: Iterable[str] = ()
) -> Report:
    """Reads the database and reports.

    :param connection: in autocommit mode, or outside of a transaction. Nothing is written.
    :param ignore: findings to leave out: a check's id, or ``id=object`` with the object as it is reported.
    :raises BadInputError: the kit is not in this database, or ``ignore`` names no check.
    :raises psycopg.Error: the server cannot be asked at all.
    """
    thresholds, ignore = thresholds or Thresholds(), list(ignore)
    for entry in ignore:
        if entry.partition("=")[0] not in {check.id for check in CHECKS}:
            raise BadInputError(
                f"there is no check {entry.partition('=')[0]!r}", hint="docs/doctor.md has them all."
            )
    findings: list[Finding] = []
    not_checked: list[NotChecked] = []
    with connection.transaction():
        # What is compared is to be of one moment.
        connection.execute("set transaction isolation level repeatable read, read only")
        for setting in _SESSION.split(";"):
            connection.execute(setting.encode())
        facts = Facts.read(connection, thresholds.lag, thresholds.skew, thresholds.webhooks)
        for check in CHECKS:
            refusals = [why for need in check.needs if (why := facts.refusal(need))]
            if refusals:
                not_checked.append(NotChecked(check.id, refusals[0]))
                continue
            found, why = _attempt(connection, lambda check=check: check.run(facts))  # type: ignore[misc]
            findings += found
            if why:
                not_checked.append(NotChecked(check.id, why))
        not_checked += [NotChecked(id_, needs) for id_, needs in facts.unseen]
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), f.id, f.object))
    kept: list[Finding] = []
    ignored: list[Finding] = []
    matched: set[str] = set()
    for finding in findings:
        names = {finding.id, f"{finding.id}={finding.object}"} & set(ignore)
        (ignored if names else kept).append(finding)
        matched |= names
    return Report(
        database=facts.database,
        server_version=facts.server_version,
        login=facts.login,
        checked_at=dt.datetime.now(dt.timezone.utc),
        findings=kept,
        not_checked=not_checked,
        ignored=ignored,
        unmatched=[entry for entry in ignore if entry not in matched],
    )


def _attempt(
    connection: psycopg.Connection[Any], run: Callable[[], list[Finding]]
) -> tuple[list[Finding], str | None]:
    """What a check finds; or nothing, and why it could not look."""
    try:
        with connection.transaction():
            return run(), None
    except psycopg.errors.LockNotAvailable:
        return [], "a lock that another session holds on a table or view to be let go of"
    except psycopg.errors.QueryCanceled:
        return [], "more than the 60 s that a check is given"
    except psycopg.Error as error:
        if connection.closed:
            raise
        return [], f"an answer other than {error.diag.message_primary or error} ({error.sqlstate})"
