"""What ``doctor`` does and prints."""

from __future__ import annotations

import argparse
import json
import re
from typing import Final

from .commands import _note, checked_dsn, printable

# Exit statuses beside 0, and beside 1 and 2, which every command gives: it failed, it was not understood.
_STATUS: Final = {"notice": 5, "warning": 3, "critical": 4}
_QUOTED: Final = re.compile(r"""(E)?'((?:[^'\\]|''|\\.)*)'|"((?:[^"]|"")*)\"""", re.DOTALL)


def doctor(options: argparse.Namespace) -> int:
    import psycopg  # noqa: PLC0415

    from .doctor import SEVERITIES, Thresholds, examine  # noqa: PLC0415

    dsn = checked_dsn(options)
    thresholds = Thresholds(lag=options.max_lag, skew=options.max_skew)
    with psycopg.connect(
        dsn, autocommit=True, prepare_threshold=None, client_encoding="utf8",
        fallback_application_name="kakunin-db doctor",
    ) as connection:  # fmt: skip
        report = examine(connection, thresholds=thresholds, ignore=options.ignore)
    for entry in report.unmatched:
        _note(f"--ignore {entry} matched no finding")
    if options.json:
        print(json.dumps(report.document(), indent=2))
    else:
        for finding in report.findings:
            guess = "  (a guess, from its text)" if finding.guess else ""
            print(f"{finding.severity:<8}  {finding.id}  {printable(finding.object)}{guess}")
            print(f"          {printable(finding.reason)}")
            if finding.sql is not None:
                print(f"          sql: {printable_sql(finding.sql)}")
            if finding.command is not None:
                print(f"          do:  {printable(finding.command)}")
        for skipped in report.not_checked:
            print(f"unchecked {skipped.id}: needs {printable(skipped.needs)}")
        counts = ", ".join(f"{report.count(severity)} {severity}" for severity in SEVERITIES)
        ignored = f", {len(report.ignored)} ignored" if report.ignored else ""
        print(f"{counts}{ignored}, {len(report.not_checked)} not checked, as {printable(report.login)}")
    if options.complete and report.not_checked and report.worst in (None, "notice"):
        return _STATUS["warning"]
    if options.fail_on == "never" or report.worst is None:
        return 0
    return _STATUS[report.worst] if SEVERITIES.index(report.worst) <= SEVERITIES.index(options.fail_on) else 0


def printable_sql(sql: str) -> str:
    """The same statement in characters that a terminal prints: names and strings with others in them are
    written with escapes, U&"..." and U&'...', for which standard_conforming_strings is on, as by default."""

    def escaped(match: re.Match[str]) -> str:
        if _shown(match[0]):
            return match[0]
        if match[3] is not None:
            return f'U&"{_unicode(match[3])}"'
        text = re.sub(r"\\(.)", r"\1", match[2], flags=re.DOTALL) if match[1] else match[2]
        return f"U&'{_unicode(text)}'"

    return printable(_QUOTED.sub(escaped, sql))


def _unicode(text: str) -> str:
    return "".join(
        "\\\\"
        if c == "\\"
        else c
        if _shown(c)
        else f"\\{ord(c):04X}"
        if ord(c) < 0x10000
        else f"\\+{ord(c):06X}"
        for c in text
    )


def _shown(text: str) -> bool:
    return printable(text) == text
