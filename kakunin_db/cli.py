"""The command line: ``kakunin-db migrate``, ``downgrade`` and ``demo``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from .errors import BadInputError, KakuninError

# Server states whose own message does not say what to do.
_REMEDIES = {
    "42501": "Run it as the login that owns the kit.",
    "42P06": "If sql/ was applied by hand, record that instead: alembic stamp <revision>.",
}


class _Failed(Exception):  # noqa: N818  (never leaves this module)
    def __init__(
        self, message: object, hint: str | None = None, sqlstate: str | None = None, status: int = 1
    ) -> None:
        # One line, whatever the driver made of it.
        text = " ".join(str(message).split()) + (f" ({sqlstate})" if sqlstate else "")
        super().__init__(f"{text}. {hint}" if hint else text)
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 when it failed, 2 when it was not understood."""
    options = _parser().parse_args(arguments)
    try:
        return _demo() if options.command == "demo" else _migrations(options)
    except _Failed as failed:
        print(f"kakunin-db: {failed}", file=sys.stderr)
        return failed.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kakunin-db",
        description="Cryptographic identity and row-level isolation for AI agents in Postgres.",
    )
    version = importlib.metadata.version("kakunin-db")
    parser.add_argument("--version", action="version", version=f"kakunin-db {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text, default in (
        ("migrate", "take a database to the newest revision, or to a given one", "head"),
        ("downgrade", "take a database back; to base, which removes the kit and all its data", "base"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument(
            "--dsn",
            default=os.environ.get("KAKUNIN_DSN"),
            help="libpq connection string or URL; default $KAKUNIN_DSN",
        )
        command.add_argument(
            "--revision", default=default, help="default: %(default)s; with --sql also FROM:TO"
        )
        command.add_argument(
            "--sql", action="store_true", help="print the script for psql and touch no database"
        )
    commands.add_parser("demo", help="start a Postgres, bind two agents, show who sees what")
    return parser


def _migrations(options: argparse.Namespace) -> int:
    try:
        import psycopg  # noqa: PLC0415
        from alembic.util import CommandError  # noqa: PLC0415

        from . import migrate  # noqa: PLC0415
    except ImportError as error:
        # psycopg says so at import when it finds no libpq.
        raise _Failed(
            error, "Install libpq (Debian: libpq5) or run: pip install 'kakunin-db[binary]'"
        ) from error

    upwards = options.command == "migrate"
    try:
        if options.sql:
            print((migrate.migrate_sql if upwards else migrate.downgrade_sql)(options.revision), end="")
            return 0
        if not options.dsn:
            raise _Failed("no database is named", "Give --dsn or set KAKUNIN_DSN.", status=2)
        _check(options.dsn)
        run = migrate.migrate if upwards else migrate.downgrade
        change = run(
            options.dsn, options.revision, on_notice=lambda text: print(f"NOTICE: {text}", file=sys.stderr)
        )
    except KakuninError as error:
        raise _Failed(error, error.hint, error.sqlstate) from error
    except psycopg.Error as error:
        hint = error.diag.message_hint or _REMEDIES.get(error.sqlstate or "")
        raise _Failed(error.diag.message_primary or error, hint, error.sqlstate) from error
    except CommandError as error:
        raise _Failed(error) from error
    before, after = change.before or "base", change.after or "base"
    print(f"already at {after}" if before == after else f"from {before} to {after}")
    return 0


def _check(dsn: str) -> None:
    from .migrate import check_dsn  # noqa: PLC0415

    try:
        check_dsn(dsn)
    except BadInputError as error:
        raise _Failed(error, error.hint, status=2) from error


def _demo() -> int:
    try:
        status: int | None = importlib.import_module("kakunin_db.demo").main()
    except ImportError as error:
        # Its own extra's packages and psycopg's libpq; a name of ours that is missing is a bug.
        if (error.name or "").startswith("kakunin_db"):
            raise
        raise _Failed(
            f"the demo needs {error.name or error}", "Run: pip install 'kakunin-db[demo]'"
        ) from error
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
