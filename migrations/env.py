"""The Alembic environment: one transaction for the whole run, and a version table that leaves with the kit.

The database is the first of these that is given: ``attributes["dsn"]`` of the configuration, as
kakunin_db.migrate does, ``-x dsn=...``, ``sqlalchemy.url``, the environment variable ``KAKUNIN_DSN``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from alembic import context
from alembic.util import CommandError
from sqlalchemy import create_engine, pool

from kakunin_db import migrate

HERE = Path(__file__).resolve().parent
# What waits for a lock has everybody else wait behind it. Whoever said how long is right.
SHORT_LOCKS = """select set_config('lock_timeout', '5s', true) where current_setting('lock_timeout') = '0';"""

# Only alembic's own command line sets cmd_opts; in a program the log is the program's business.
if context.config.cmd_opts is not None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(name)s] %(message)s")


def dsn() -> str:
    given = (
        context.config.attributes.get("dsn")
        or context.get_x_argument(as_dictionary=True).get("dsn")
        or context.config.get_alembic_option("sqlalchemy.url")
        or os.environ.get("KAKUNIN_DSN")
    )
    if not given:
        raise CommandError("no database is named: give -x dsn=..., sqlalchemy.url or KAKUNIN_DSN")
    return str(given)


def starts_from(heads: tuple[str, ...]) -> str:
    """SQL that refuses a database at another revision than a script was printed for."""
    expected = ", ".join(sorted(heads)) or "base"
    return f"""\
do $starts_from$
declare
  v_found text := 'base';
begin
  if to_regclass('kakunin_private.alembic_version') is not null then
    select coalesce(string_agg(version_num, ', ' order by version_num), 'base') into v_found
      from kakunin_private.alembic_version;
  end if;
  if v_found <> '{expected}' then
    raise exception using errcode = 'KA010',
      message = format('this script starts from revision {expected} and the database is at %s', v_found),
      hint = format('Print it again with --sql --revision %s:<target>.', v_found);
  end if;
end
$starts_from$;"""  # noqa: S608  (revision ids are ours)


def run() -> None:
    migration = context.get_context()
    # `alembic current` and its like only look: nothing may be created for them.
    mutates = not migration.opts.get("dont_mutate", False)
    with context.begin_transaction():
        if mutates:
            if first := context.config.attributes.get("first"):
                migrate.run_text(migration, SHORT_LOCKS)
                for statement in first:
                    migrate.run_text(migration, f"{statement};")
            migrate.run_text(migration, (HERE / "before.sql").read_text(encoding="utf-8"))
            if migration.as_sql:
                migrate.run_text(migration, starts_from(migration.get_current_heads()))
            else:
                context.config.attributes["before"] = migration.get_current_heads()
        context.run_migrations()
        if mutates:
            if not migration.as_sql:
                context.config.attributes["after"] = migration.get_current_heads()
            migrate.run_text(migration, (HERE / "after.sql").read_text(encoding="utf-8"))


OPTIONS: dict[str, Any] = {"version_table": "alembic_version", "version_table_schema": "kakunin_private"}

if context.is_offline_mode():
    context.configure(dialect_name="postgresql", **OPTIONS)
    run()
else:
    # READ COMMITTED whatever the database's default is: who has waited for the lock of before.sql must
    # see what the other one has committed.
    engine = create_engine(
        "postgresql+psycopg://",
        creator=lambda: migrate.connect(dsn(), context.config.attributes.get("on_notice")),
        poolclass=pool.NullPool,
        isolation_level="READ COMMITTED",
        use_native_hstore=False,
    )
    with engine.connect() as connection, connection.begin():
        context.configure(connection=connection, **OPTIONS)
        run()
