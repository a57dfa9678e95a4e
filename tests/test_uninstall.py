"""Taking the kit away opens no table, loses no entry unsaid, and happens whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import psycopg.sql
import pytest
from catalog import everything
from cluster import ROOT, Cluster
from conftest import Database, _ca, fresh_database
from cryptography.hazmat.primitives.serialization import Encoding
from test_worker import append

from kakunin_db.cli import main
from kakunin_db.errors import BadInputError
from kakunin_db.migrate import downgrade
from kakunin_db.uninstall import plan, script, uninstall

OTHERS = ("agent_1", "gateway", "stranger", "operator")


@pytest.fixture
def database(cluster: Cluster) -> Iterator[Database]:
    """With a protected table and a template of sql/policies beside it, as an owner of tables has them."""
    with fresh_database(cluster) as database:
        # Installed by install_sql(), so Alembic is told.
        with database.connect("installer") as installer:
            installer.execute(
                "create table kakunin_private.alembic_version (version_num varchar(32) primary key)"
            )
            installer.execute("insert into kakunin_private.alembic_version values ('0001')")
        agent = database.agent()
        with database.connect("app") as app:
            app.execute("create table notes (permitted_agent_serial text, content text)")
            app.execute("insert into notes values (%s, 'ours')", [agent.serial])
            app.execute("create table parted (permitted_agent_serial text, n int) partition by range (n)")
            app.execute("create table parted_1 partition of parted default")
            app.execute("insert into parted values (%s, 1)", [agent.serial])
            app.execute("create table own (serial text)")
            app.execute("insert into own values ('AA')")
            app.execute("alter table own enable row level security")
            app.execute("create policy mine on own using (serial = (select kakunin.current_cert_serial()))")
            app.execute("select kakunin.protect('notes', write_scope => 'notes:write', audit => true)")
            app.execute("select kakunin.protect('parted')")
            for name in ("notes", "parted", "parted_1", "own"):
                app.execute(f"grant select, insert on {name} to kakunin_agent")
                app.execute(f"grant all on {name} to public")
        append(database, agent, 3)
        yield database


def seen(database: Database, name: str, login: str) -> int:
    """How many rows a login sees; -1 where it may not even look."""
    try:
        return int(database.value(login, f"select count(*) from {name}"))
    except psycopg.errors.InsufficientPrivilege:
        return -1


def tables(database: Database) -> list[tuple[object, ...]]:
    return database.run(
        "postgres",
        "select c.relname, c.relrowsecurity, (select count(*) from pg_policy y where y.polrelid = c.oid),"
        "       (select count(*) from pg_trigger t where t.tgrelid = c.oid)"
        "  from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')"
        " order by 1",
    )


def test_no_row_is_seen_that_was_not(database: Database) -> None:
    """Even where everybody has all privileges: row security stays on, without a policy."""
    dsn = database.dsn("postgres")
    steps = plan(dsn, without_export=True)
    assert steps.closed == ["public.notes", "public.own", "public.parted", "public.parted_1"]
    uninstall(dsn, steps)
    assert tables(database) == [(name, True, 0, 0) for name in ("notes", "own", "parted", "parted_1")]
    for name in ("notes", "own", "parted", "parted_1"):
        assert [seen(database, name, login) for login in OTHERS] == [0] * len(OTHERS)
        assert seen(database, name, "app") == 1
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            database.run("stranger", f"insert into {name} values ('AA')")
    kit = "select count(*) from pg_namespace where nspname like 'kakunin%%'"
    assert database.value("postgres", kit) == 0


def test_what_stays_and_is_taken_away_by_hand(database: Database) -> None:
    """docs/recovery.md: a forced table stays shut to its owner as well, until that is taken away by name."""
    said = (ROOT / "docs/recovery.md").read_text()
    [look] = re.findall(r"```sql\n(select c\.oid.*?)```", said, re.DOTALL)
    database.run("app", "select kakunin.protect('notes', force => true)")
    database.run("app", "create policy claims on own for insert with check (serial is not null)")
    uninstall(database.dsn("postgres"), plan(database.dsn("postgres"), without_export=True))
    rows = {row[0]: row[1:4] for row in database.run("postgres", look)}
    assert rows == {
        "notes": ("app", True, []),
        "own": ("app", False, ["claims"]),
        "parted": ("app", False, []),
        "parted_1": ("app", False, []),
    }
    assert [seen(database, "notes", login) for login in ("app", *OTHERS)] == [0] * (len(OTHERS) + 1)
    for statement, owner, others in (
        ("alter table {} no force row level security;", 1, 0),
        ("alter table {} disable row level security;", 1, 1),
    ):
        assert statement.format("vault") in said
        database.run("app", statement.format("notes"))
        assert seen(database, "notes", "app") == owner
        assert [seen(database, "notes", login) for login in OTHERS] == [others] * len(OTHERS)
    assert "drop policy agent_vault on vault;" in said
    database.run("app", "drop policy claims on own;")
    assert [row for row in database.run("postgres", look) if row[3]] == []


def test_it_refuses_what_would_open_a_table(database: Database) -> None:
    """A permissive policy of somebody else's stays; what restricted it goes."""
    dsn = database.dsn("postgres")
    with database.connect("app") as app:
        app.execute("create policy everybody on notes for insert to public with check (true)")
    before = everything(dsn)
    with pytest.raises(BadInputError, match=r"public\.notes .*kakunin_insert_scope goes .*everybody stays"):
        plan(dsn, without_export=True)
    assert everything(dsn) == before
    # Of another command it opens nothing that was closed.
    database.run("app", "drop policy everybody on notes")
    database.run("app", "create policy everybody on notes for select to public using (true)")
    steps = plan(dsn, without_export=True)
    uninstall(dsn, steps)
    assert seen(database, "notes", "stranger") == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        database.run("stranger", "insert into notes values ('AA')")


def test_it_refuses_while_entries_are_in_no_export(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dsn = database.dsn("postgres")
    with pytest.raises(BadInputError, match=r"entries of the ledger are in no export"):
        plan(dsn)
    database.seal_and_sign(database.ledger_key())
    database.seal_and_sign(database.ledger_key())
    bundle = tmp_path / "ledger.jsonl"
    assert main(["audit", "export", "--dsn", database.dsn("auditor"), "--out", str(bundle)]) == 0
    assert plan(dsn).closed
    append(database, database.agent())
    with pytest.raises(BadInputError, match=r"[3-5] entries of the ledger are in no export"):
        plan(dsn)
    assert main(["uninstall", "--dsn", dsn, "--without-export"]) == 0
    assert "public.notes: row security stays on" in capsys.readouterr().out
    root = tmp_path / "root.pem"
    root.write_bytes(_ca().certificate.public_bytes(Encoding.PEM))
    assert main(["audit", "verify", str(bundle), "--ca", str(root)]) == 0


def test_what_has_come_since_the_plan_is_looked_at_again(database: Database, tmp_path: Path) -> None:
    """A script may be applied days after it was printed: a policy, or entries, may have come since."""
    dsn = database.dsn("postgres")
    steps = plan(dsn, without_export=True)
    database.run("app", "create policy everybody on notes for all to public using (true)")
    before = everything(dsn)
    with pytest.raises(BadInputError, match=r"policies made since: public\.notes \(everybody\)"):
        uninstall(dsn, steps)
    with database.connect("postgres", autocommit=True) as admin, pytest.raises(psycopg.Error) as caught:
        admin.execute(script(steps).encode())
    assert caught.value.sqlstate == "KA010"
    assert everything(dsn) == before
    database.run("app", "drop policy everybody on notes")

    database.seal_and_sign(database.ledger_key())
    database.seal_and_sign(database.ledger_key())
    bundle = tmp_path / "ledger.jsonl"
    assert main(["audit", "export", "--dsn", database.dsn("auditor"), "--out", str(bundle)]) == 0
    steps = plan(dsn)
    append(database, database.agent())
    before = everything(dsn)
    with pytest.raises(BadInputError, match="entries of the ledger are in no export"):
        uninstall(dsn, steps)
    assert everything(dsn) == before


HOSTILE = "x\"; drop table notes; -- $still_closed$ ' \\ :dsn %s {} BEGIN;\n"


def test_names_are_names(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever makes tables and policies names them, and a superuser runs this."""
    dsn = database.dsn("postgres")
    name = psycopg.sql.Identifier(HOSTILE)
    with database.connect("app") as app:
        app.execute(psycopg.sql.SQL("alter table own rename to {}").format(name))
        app.execute(psycopg.sql.SQL("alter policy mine on {0} rename to {0}").format(name))
        app.execute(
            psycopg.sql.SQL(
                "create policy strict on {} as restrictive"
                " using ((select kakunin.current_cert_serial()) <> '')"
            ).format(name)
        )
    assert main(["uninstall", "--dsn", dsn, "--without-export", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute(printed.replace("COMMIT;", "ROLLBACK;").encode())
    uninstall(dsn, plan(dsn, without_export=True))
    assert tables(database) == [(name, True, 0, 0) for name in ("notes", "parted", "parted_1", HOSTILE)]


def test_only_owners_take_policies_off(database: Database) -> None:
    with pytest.raises(BadInputError, match=r"public\.notes \(app\), public\.own \(app\)"):
        plan(database.dsn("installer"), without_export=True)


def test_the_script_is_what_is_done(database: Database, capsys: pytest.CaptureFixture[str]) -> None:
    dsn = database.dsn("postgres")
    before = everything(dsn)
    assert main(["uninstall", "--dsn", dsn, "--without-export", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed == script(plan(dsn, without_export=True))
    assert printed.count("BEGIN;") == printed.count("COMMIT;") == 1
    assert printed.index("BEGIN;") < printed.index("drop policy kakunin_isolation on public.notes;")
    assert everything(dsn) == before
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute(printed.encode())
    assert tables(database) == [(name, True, 0, 0) for name in ("notes", "own", "parted", "parted_1")]


def test_it_happens_whole_or_not_at_all(database: Database) -> None:
    dsn = database.dsn("postgres")
    database.run("app", "create view v as select kakunin.current_cert_serial()")
    before = everything(dsn)
    with pytest.raises(BadInputError, match=r"(?m)in use outside its schemas: view public\.v$"):
        uninstall(dsn, plan(dsn, without_export=True))
    assert everything(dsn) == before


@pytest.mark.parametrize("table", ["notes", "own", "kakunin_private.ledger"])
def test_a_lock_that_is_held_is_named_and_nothing_is_done(
    database: Database, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    dsn = database.dsn("postgres")
    before = everything(dsn)
    monkeypatch.setenv("PGOPTIONS", "-c lock_timeout=300ms")
    with database.connect("postgres") as holder:
        holder.execute(f"select from {table}")
        pid = holder.info.backend_pid
        with pytest.raises(BadInputError) as refused:
            uninstall(dsn, plan(dsn, without_export=True))
        holder.rollback()
    name = table if "." in table else f"public.{table}"
    assert f"process {pid} (postgres) holds AccessShareLock on {name}" in str(refused.value)
    assert "changed nothing" in str(refused.value)
    assert everything(dsn) == before


def test_a_migration_does_not_wait_long_for_a_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five seconds where nobody says otherwise."""
    database.run("app", "drop table notes, parted, own")
    seen: list[str] = []
    with database.connect("postgres") as holder:
        holder.execute("select from kakunin_private.agents")
        with pytest.raises(BadInputError, match=r"holds AccessShareLock on kakunin_private\.agents"):
            downgrade(database.dsn("installer"), on_notice=seen.append)
