"""Installing the kit, bringing it to another revision, and taking it away.

Alembic does it underneath, with the environment in ``migrations/``; ``alembic upgrade head`` in a checkout
is the same thing. A run is one transaction: it happens whole or not at all.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psycopg
from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import conninfo
from sqlalchemy.exc import DBAPIError

from . import resources
from .errors import BadInputError, named

_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """What a run did: the revision before and after it, None for a database without the kit."""

    before: str | None
    after: str | None


def migrate(dsn: str, revision: str = "head", *, on_notice: Callable[[str], None] | None = None) -> Change:
    """Takes a database to a revision, by default the newest. Does nothing where it is there already.

    :param dsn: libpq's form (``host=... dbname=...``) or a URL; ``postgresql+psycopg://`` is a URL too.
    :param on_notice: receives the text of each notice of the server; without it they are logged.
    :raises BadInputError: the DSN cannot be read.
    :raises psycopg.Error: what the server refuses, or no connection. The database is as it was.
    :raises alembic.util.CommandError: no such revision.
    """
    return _run(command.upgrade, dsn, revision, on_notice)


def downgrade(
    dsn: str,
    revision: str = "base",
    *,
    on_notice: Callable[[str], None] | None = None,
    before: Sequence[str] = (),
) -> Change:
    """Takes a database back to an earlier revision. ``base`` removes the kit **and all its data**.

    Roles that somebody else uses stay, and a notice says why. Arguments are those of :func:`migrate`;
    ``before`` are statements that run first, in the same transaction.

    :raises BadInputError: objects outside the kit's schemas still use it. Nothing was changed.
    """
    return _run(command.downgrade, dsn, revision, on_notice, before)


def migrate_sql(revision: str = "head") -> str:
    """The script of :func:`migrate` for ``psql``. ``<from>:<to>`` starts at a revision other than base."""
    output = io.StringIO()
    command.upgrade(_config(output), revision, sql=True)
    return output.getvalue()


def downgrade_sql(revision: str = "base", *, before: Sequence[str] = ()) -> str:
    """The script of :func:`downgrade` for ``psql``. ``<from>:<to>`` starts elsewhere than at the newest."""
    output = io.StringIO()
    config = _config(output)
    config.attributes["first"] = before
    if ":" not in revision:
        revision = f"{ScriptDirectory.from_config(config).get_current_head()}:{revision}"
    command.downgrade(config, revision, sql=True)
    return output.getvalue()


def _config(output: io.StringIO | None = None) -> Config:
    config = Config(output_buffer=output) if output else Config()
    # Alembic interpolates %(...)s, and a folder may have a percent sign in its name.
    config.set_main_option("script_location", str(resources.migrations_dir()).replace("%", "%%"))
    return config


def _run(
    step: Callable[[Config, str], None],
    dsn: str,
    revision: str,
    on_notice: Callable[[str], None] | None,
    first: Sequence[str] = (),
) -> Change:
    config = _config()
    # Not as sqlalchemy.url: a DSN is no URL, and its percent signs are not to be interpolated.
    config.attributes.update(dsn=check_dsn(dsn), on_notice=on_notice or _log.info, first=first)
    try:
        step(config, revision)
    except (psycopg.Error, DBAPIError) as error:
        refused = named(error)
        if refused:
            raise refused from error
        original = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(original, psycopg.errors.LockNotAvailable):
            raise BadInputError(
                "the migration waited in vain for a lock and changed nothing:"
                f" {holders(config.attributes['dsn'])}",
                "Run it again when that transaction has ended, or end it: select"
                " pg_terminate_backend(<process>). PGOPTIONS='-c lock_timeout=60s' waits longer; while it"
                " waits, others wait behind it.",
            ) from error
        if isinstance(original, psycopg.Error):
            raise original from None
        raise
    return Change(_only(config.attributes["before"]), _only(config.attributes["after"]))


# Whoever holds a lock on what a migration changes: something of the kit's, or a table with policies or
# triggers that ask it. A prepared transaction has no process.
_HOLDERS = """
select string_agg(format('%s (%s) holds %s on %s', coalesce('process ' || pid, 'a prepared transaction'),
                         login, mode, name), '; ' order by pid, name)
  from (select l.pid, coalesce(a.usename, 'unknown') as login, l.mode,
               format('%I.%I', n.nspname, c.relname) as name
          from pg_locks l join pg_class c on c.oid = l.relation join pg_namespace n on n.oid = c.relnamespace
          left join pg_stat_activity a on a.pid = l.pid
         where l.granted and l.pid is distinct from pg_backend_pid() and c.relkind in ('r', 'p', 'v', 'S')
           and l.database = (select d.oid from pg_database d where d.datname = current_database())
           and (n.nspname in ('kakunin', 'kakunin_private')
                or exists (select from pg_depend d join pg_proc p on p.oid = d.refobjid
                             join pg_namespace k on k.oid = p.pronamespace
                            where d.refclassid = 'pg_proc'::regclass
                              and k.nspname in ('kakunin', 'kakunin_private')
                              and (d.classid = 'pg_policy'::regclass
                                   and d.objid in (select y.oid from pg_policy y where y.polrelid = c.oid)
                                   or d.classid = 'pg_trigger'::regclass
                                   and d.objid in (select t.oid from pg_trigger t where t.tgrelid = c.oid))))
         order by l.pid, c.relname limit 5) h"""


def holders(dsn: str) -> str:
    """Who is waited for in vain; they may be gone by now."""
    with connect(dsn) as connection:
        row = connection.execute(_HOLDERS).fetchone()
    return row[0] if row and row[0] else "whoever held it is gone by now"


def _only(heads: tuple[str, ...]) -> str | None:
    return ", ".join(sorted(heads)) or None


# For migrations/env.py and the revisions ------------------------------------------------------------


def check_dsn(dsn: str) -> str:
    """The DSN in the form libpq reads.

    :raises BadInputError: libpq would not read it, or not as it is meant. The message never quotes it,
        because a password that is not escaped ends up in any of its parts.
    """
    scheme, separator, rest = dsn.partition("://")
    if separator and scheme.split("+")[0] in ("postgresql", "postgres"):
        dsn = f"postgresql://{rest}"
    refusal = BadInputError(
        "the DSN is neither a libpq connection string nor a URL",
        "In a URL write special characters of a password as %40, %2F and so on; else put it in quotes.",
    )
    try:
        parts = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        raise refusal from None
    port, host, dbname = (str(parts.get(name) or "") for name in ("port", "host", "dbname"))
    # An unescaped @ or / in a password, and libpq takes the rest of it for one of these.
    if port.strip("0123456789,") or "@" in host.removeprefix("@") + dbname:  # @name is an abstract socket
        raise refusal
    return dsn


def connect(dsn: str, on_notice: Callable[[str], None] | None = None) -> psycopg.Connection[Any]:
    """A connection that hands the server's notices on, by default to the log."""
    connection = psycopg.connect(check_dsn(dsn), fallback_application_name="kakunin-db migrate")
    receive = on_notice or _log.info
    connection.add_notice_handler(lambda diagnostic: receive(diagnostic.message_primary or ""))
    return connection


def run_text(context: MigrationContext, text: str) -> None:
    """Runs SQL exactly as it is written, or prints it in offline mode.

    Neither goes through SQLAlchemy's text(), to which ``:name`` is a parameter, nor through parameter
    processing of the driver, to which ``%`` is one.
    """
    if context.as_sql:
        context.impl.static_output(text)
    else:
        assert context.connection is not None  # noqa: S101  (Alembic's type is optional for offline mode)
        driver: psycopg.Connection[Any] = context.connection.connection.driver_connection  # type: ignore[assignment]
        driver.execute(text.encode(), prepare=False)


def run_file(revision_file: str, direction: Literal["up", "down"]) -> None:
    """Runs the frozen SQL that lies beside a revision's Python file."""
    path = Path(revision_file).with_suffix(f".{direction}.sql")
    run_text(op.get_context(), path.read_text(encoding="utf-8"))
