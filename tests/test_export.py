"""The kit as files, applied as they are meant: a project's migration, one plain file, an extension."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster, binaries
from postgrest_server import PostgREST

from kakunin_db import CertificateAuthority, LocalSigner, cli
from kakunin_db.export_commands import extension_files, plain_sql, supabase_sql
from kakunin_db.migrate import Change, migrate

PSQL = shutil.which("psql")
DUMP = shutil.which("pg_dump")
HOOK = "alter role authenticator set pgrst.db_pre_request = 'kakunin.pre_request'"
_names = itertools.count(1)


@pytest.fixture(scope="module")
def project(cluster: Cluster) -> Iterator[Cluster]:
    """A server as Supabase has it: `postgres` is not superuser, and the roles and schemas of its services are
    there before anything of ours."""
    bindir = binaries(cluster.major)
    assert bindir is not None
    server = Cluster(cluster.major, bindir)
    try:
        server.init()
        server.start()
        with server.connect(autocommit=True) as first:
            first.execute("create role renaming superuser login")
        with server.connect(user="renaming", autocommit=True) as admin:
            admin.execute("alter role postgres rename to supabase_admin")
        with server.connect(user="supabase_admin", autocommit=True) as admin:
            admin.execute("drop role renaming")
            admin.execute("create role postgres login createdb createrole replication bypassrls")
            for role in ("anon nologin", "authenticated nologin", "service_role nologin bypassrls"):
                admin.execute(f"create role {role} noinherit")
            admin.execute("create role authenticator login noinherit")
            admin.execute("grant anon, authenticated, service_role to authenticator")
            admin.execute("grant anon, authenticated, service_role to postgres with admin option")
            for role in ("supabase_auth_admin", "supabase_storage_admin"):
                admin.execute(f"create role {role} login noinherit createrole")
        yield server
    finally:
        server.destroy()


@pytest.fixture
def database(project: Cluster) -> Iterator[str]:
    name = f"project_{next(_names)}"
    with project.connect("template1", "supabase_admin", autocommit=True) as admin:
        admin.execute(f"create database {name} owner postgres")
    with project.connect(name, "supabase_admin", autocommit=True) as admin:
        admin.execute("create schema auth authorization supabase_auth_admin")
        admin.execute(
            "create function auth.jwt() returns jsonb stable language sql"
            " as $$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb $$"
        )
        admin.execute("create table auth.users (id uuid primary key)")
        admin.execute("grant usage on schema auth, public to anon, authenticated, service_role")
        admin.execute(
            "alter default privileges for role postgres in schema public"
            " grant all on tables to anon, authenticated, service_role"
        )
    yield name
    with project.connect("template1", "supabase_admin", autocommit=True) as admin:
        admin.execute(f"alter role authenticator in database {name} reset all")
        admin.execute("alter role authenticator reset all")
        admin.execute(f"drop database {name} with (force)")


def psql(server: Cluster, database: str, *arguments: str | Path, user: str = "postgres") -> Any:
    assert PSQL, "psql is needed, and `make system` installs it"
    return subprocess.run(
        [PSQL, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", server.dsn(database, user), *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def write(folder: Path, text: str) -> Path:
    path = folder / "kit.sql"
    path.write_text(text)
    return path


def objects(server: Cluster, database: str) -> list[tuple[Any, ...]]:
    """Everything outside our two schemas that a migration could have touched, and who may do what with it."""
    with server.connect(database, "supabase_admin") as admin:
        return admin.execute(
            "select 'class', n.nspname, c.relname::text, c.relacl::text from pg_class c"
            " join pg_namespace n on n.oid = c.relnamespace"
            " where n.nspname not like 'kakunin%' and n.nspname not like 'pg_%'"
            " union all select 'proc', n.nspname, p.oid::regprocedure::text, p.proacl::text from pg_proc p"
            " join pg_namespace n on n.oid = p.pronamespace"
            " where n.nspname not like 'kakunin%' and n.nspname not like 'pg_%'"
            " union all select 'schema', nspname, pg_get_userbyid(nspowner), nspacl::text from pg_namespace"
            " where nspname not like 'kakunin%' and nspname not like 'pg_%'"
            " union all select 'acl', '', defaclrole::regrole::text, defaclacl::text from pg_default_acl"
            " union all select 'extension', '', extname::text, '' from pg_extension"
            " union all select 'policy', schemaname, tablename::text, policyname::text from pg_policies"
            " order by 1, 2, 3, 4"
        ).fetchall()


def agent_of(server: Cluster, database: str, user: str = "postgres") -> Any:
    """An authority, an agent and its certificate, made by the owner of the kit."""
    authority = CertificateAuthority.create(LocalSigner.generate(), "Project CA")
    with server.connect(database, user, autocommit=True) as owner:
        authority.trust(owner)
        row = owner.execute("select kakunin.create_agent('agent')").fetchone()
        assert row
        issued = authority.issue(row[0], LocalSigner.generate().public_key(), permitted_actions=["orders:*"])
        issued.register(owner)
    return issued


# Supabase ----------------------------------------------------------------------------------------------


def test_the_migration_applies_as_postgres_and_touches_nothing_else(
    project: Cluster, database: str, tmp_path: Path
) -> None:
    before = objects(project, database)
    done = psql(project, database, "-f", write(tmp_path, supabase_sql()))
    assert done.returncode == 0, done.stderr
    assert objects(project, database) == before
    with project.connect(database, "postgres") as owner:
        owners = (
            "select distinct proowner::regrole::text from pg_proc"
            " where pronamespace = 'kakunin'::regnamespace"
        )
        assert owner.execute(owners).fetchall() == [("postgres",)]
        assert owner.execute("select * from kakunin_private.gateway_logins").fetchall() == [
            ("authenticator", True)
        ]
        assert not owner.execute("select rolsuper from pg_roles where rolname = 'postgres'").fetchone()[0]  # type: ignore[index]


@pytest.mark.parametrize("defaults", [False, True], ids=["", "default-privileges"])
def test_api_roles_get_what_is_listed_and_no_more(
    project: Cluster, database: str, tmp_path: Path, defaults: bool
) -> None:
    if defaults:  # of the role that migrates, in no schema in particular: whatever it makes is granted to all
        with project.connect(database, "postgres", autocommit=True) as owner:
            for kind in ("functions", "tables", "sequences", "schemas"):
                for grantee in ("public", "anon, authenticated, service_role"):
                    owner.execute(f"alter default privileges grant all on {kind} to {grantee}".encode())
    assert psql(project, database, "-f", write(tmp_path, supabase_sql())).returncode == 0
    with project.connect(database, "supabase_admin") as admin:
        for role in ("anon", "authenticated", "service_role"):
            callable_ = admin.execute(
                "select array_agg(proname::text order by proname) from pg_proc"
                " where pronamespace in ('kakunin'::regnamespace, 'kakunin_private'::regnamespace)"
                " and has_function_privilege(%s, oid, 'execute')",
                [role],
            ).fetchone()
            assert callable_ == (
                [
                    "audit_log_append", "check_risk_score", "current_agent_id", "current_cert_serial",
                    "has_scope", "normalize_serial", "pre_request", "require_risk_below", "require_scope",
                    "require_session", "require_spend", "verify_agent_scope", "verify_certificate",
                    "verify_message",
                ],
            )  # fmt: skip
            readable = admin.execute(
                "select count(*) from pg_class where relnamespace in"
                " ('kakunin'::regnamespace, 'kakunin_private'::regnamespace) and relkind in ('r', 'v', 'p')"
                " and has_any_column_privilege(%s, oid, 'select, insert, update, references')",
                [role],
            ).fetchone()
            assert readable == (0,)
            schemas = (
                "select has_schema_privilege(%(role)s, 'kakunin_private', 'usage'),"
                " has_schema_privilege(%(role)s, 'kakunin', 'create')"
            )
            assert admin.execute(schemas, {"role": role}).fetchone() == (False, False)
        # An agent's role has nothing of theirs, nor they of its.
        for role, of in itertools.permutations(["kakunin_agent", "anon", "authenticated", "service_role"], 2):
            assert admin.execute("select pg_has_role(%s, %s, 'member')", [role, of]).fetchone() == (False,)


def test_twice_is_refused_and_changes_nothing(project: Cluster, database: str, tmp_path: Path) -> None:
    path = write(tmp_path, supabase_sql())
    assert psql(project, database, "-f", path).returncode == 0
    look = (
        "select installation_id, (select count(*) from kakunin_private.ledger)"
        " from kakunin_private.installation"
    )
    with project.connect(database, "postgres", autocommit=True) as owner:
        before = owner.execute(look).fetchone()
        again = psql(project, database, "-f", path)
        assert again.returncode == 3
        assert "this script starts from revision base and the database is at 0001" in again.stderr
        # Even by a psql that goes on after an error.
        assert PSQL
        subprocess.run([PSQL, "-X", "-q", "-d", owner.info.dsn, "-f", path], capture_output=True, check=False)
        assert owner.execute(look).fetchone() == before
    assert migrate(project.dsn(database, "postgres")) == Change("0001", "0001")


def statements(sql: str) -> list[str]:
    """As Supabase's command line tells them apart (supabase/cli, pkg/parser), its mistakes with nested
    parentheses and with END included: a stack of what was opened, of which one delimiter may end several."""
    found: list[str] = []
    opened: list[str] = []
    start = at = 0
    quoted = re.compile(
        r"""--[^\n]*\n|/\*.*?\*/|'(?:[^']|'')*'|"(?:[^"]|"")*"|(\$\w*\$).*?\1|\\.""", re.DOTALL
    )
    while at < len(sql):
        if match := quoted.match(sql, at):
            at = match.end()
            continue
        at += 1
        if sql[at - 1] == "(":
            opened.append(")")
        elif re.search(r"\bbegin\s+atomic$", sql[max(at - 40, 0) : at], re.IGNORECASE):
            opened.append("end")
        elif opened:
            while opened and sql[at - len(opened[-1]) : at].lower() == opened[-1]:
                opened.pop()
        elif sql[at - 1] == ";":
            found.append(sql[start:at].strip())
            start = at
    return [*found, rest] if (rest := sql[start:].strip()) else found


def test_statement_by_statement_as_supabase_db_push_has_it(project: Cluster, database: str) -> None:
    """Each is sent by the extended protocol, which takes one statement at a time, in one pipeline."""
    parts = statements(supabase_sql())
    assert len(parts) > 500
    # The bodies are what it could not take apart.
    with pytest.raises(psycopg.errors.SyntaxError), project.connect(database, "postgres") as owner:
        for part in statements(plain_sql()):
            owner.execute(part.encode(), prepare=True)
    with project.connect(database, "postgres", autocommit=True) as owner:
        with owner.pipeline():
            for part in parts:
                owner.execute(part.encode(), prepare=True)
        assert owner.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    issued = agent_of(project, database)
    with project.connect(database, "postgres") as owner:
        row = owner.execute("select kakunin.verify_certificate(%s)", [issued.serial]).fetchone()
        assert row
        assert row[0]["valid"]


def test_a_project_after_the_migration(project: Cluster, database: str, tmp_path: Path) -> None:
    """PostgREST takes the hook from its login's settings, as a project's does. Then an agent."""
    # Supabase lets `postgres` configure the login, by a library of the server's. Here by what that means.
    with project.connect(database, "supabase_admin", autocommit=True) as admin:
        admin.execute("grant authenticator to postgres with admin option")
        admin.execute("grant set on parameter pgrst.db_pre_request to postgres")
    done = psql(project, database, "-f", write(tmp_path, supabase_sql()))
    assert done.returncode == 0, done.stderr
    assert "agents have no rows until" not in done.stderr
    issued = agent_of(project, database)
    with project.connect(database, "postgres", autocommit=True) as owner:
        owner.execute("create table agent_vault (permitted_agent_serial text, content text)")
        owner.execute("insert into agent_vault values (%s, 'mine'), ('3A:F2', 'theirs')", [issued.serial])
        owner.execute("select kakunin.protect('agent_vault', roles => '{kakunin_agent,anon,authenticated}')")
        owner.execute("grant select on agent_vault to kakunin_agent")
    settings = {"DB_SCHEMAS": "public,kakunin"}
    with PostgREST(project, database, hook=False, db_config=True, settings=settings) as rest:
        for role in ("kakunin_agent", "authenticated", "anon"):
            token = rest.token(role, kakunin_cert_serial=issued.serial)
            answer = rest.request("GET", "agent_vault?select=content", token=token)
            assert answer.json == [{"content": "mine"}]
        assert rest.request("GET", "agent_vault").json == []
        assert len(rest.request("GET", "agent_vault", token=rest.service_key).json) == 2
        headers = {"Content-Profile": "kakunin"}
        scope = rest.request(
            "POST", "rpc/verify_agent_scope", {"action": "orders:x"}, token=token, headers=headers
        )
        assert scope.json["allowed"] is True
        with project.connect(database, "postgres", autocommit=True) as owner:
            owner.execute("select kakunin.revoke_certificate(%s)", [issued.serial])
        refused = rest.request("GET", "agent_vault", token=token)
        assert (refused.status, refused.json["code"]) == (403, "KA002")
    with project.connect(database, "supabase_admin", autocommit=True) as admin:
        admin.execute("revoke authenticator from postgres")
        admin.execute("revoke set on parameter pgrst.db_pre_request from postgres")


def test_where_the_hook_cannot_be_set_it_says_so_and_agents_have_nothing(
    project: Cluster, database: str, tmp_path: Path
) -> None:
    done = psql(project, database, "-f", write(tmp_path, supabase_sql()))
    assert done.returncode == 0, done.stderr
    assert "postgres may not configure PostgREST's login, and agents have no rows until" in done.stderr
    assert HOOK in done.stderr
    issued = agent_of(project, database)
    with project.connect(database, "postgres", autocommit=True) as owner:
        owner.execute("create table agent_vault (permitted_agent_serial text)")
        owner.execute("insert into agent_vault values (%s)", [issued.serial])
        owner.execute("select kakunin.protect('agent_vault')")
        owner.execute("grant select on agent_vault to kakunin_agent")
    with PostgREST(project, database, hook=False, db_config=True) as rest:
        token = rest.token("kakunin_agent", kakunin_cert_serial=issued.serial)
        assert rest.request("GET", "agent_vault", token=token).json == []
        rest.stop()
        with project.connect(database, "supabase_admin", autocommit=True) as admin:
            admin.execute(HOOK)
        rest.start()
        assert len(rest.request("GET", "agent_vault", token=token).json) == 1


def test_a_hook_that_is_there_already_stays(project: Cluster, database: str, tmp_path: Path) -> None:
    with project.connect(database, "supabase_admin", autocommit=True) as admin:
        admin.execute(
            f"alter role authenticator in database {database} set pgrst.db_pre_request = 'public.ours'"
        )
    done = psql(project, database, "-f", write(tmp_path, supabase_sql()))
    assert done.returncode == 0, done.stderr
    assert "PostgREST calls public.ours before each request already" in done.stderr
    with project.connect(database, "supabase_admin") as admin:
        settings = "select setconfig from pg_db_role_setting where setrole = 'authenticator'::regrole"
        assert admin.execute(settings).fetchall() == [(["pgrst.db_pre_request=public.ours"],)]


# One plain file ----------------------------------------------------------------------------------------


def test_plain_sql_applies_with_psql(project: Cluster, database: str, tmp_path: Path) -> None:
    path = write(tmp_path, plain_sql())
    assert psql(project, database, "-f", path).returncode == 0
    assert psql(project, database, "-f", path).returncode == 3
    assert migrate(project.dsn(database, "postgres")) == Change("0001", "0001")
    with project.connect(database, "postgres") as owner:
        # Nothing here is for Supabase's roles.
        assert owner.execute("select count(*) from kakunin_private.gateway_logins").fetchone() == (0,)
        granted = "select has_schema_privilege('anon', 'kakunin', 'usage')"
        assert owner.execute(granted).fetchone() == (False,)


# The extension -----------------------------------------------------------------------------------------


@pytest.fixture
def extension(project: Cluster) -> Iterator[str]:
    """The version, its files where the server looks for them."""
    with project.connect("template1", "supabase_admin") as admin:
        row = admin.execute("select setting from pg_config where name = 'SHAREDIR'").fetchone()
    assert row
    folder = Path(row[0]) / "extension"
    if not os.access(folder, os.W_OK):
        pytest.skip(f"{folder} is not to be written by this account")
    files = extension_files()
    for name, text in files.items():
        with (folder / name).open("x") as file:
            file.write(text)
        (folder / name).chmod(0o644)
    try:
        [version] = re.findall(r"default_version = '(.+)'", files["kakunin.control"])
        yield version
    finally:
        for name in files:
            (folder / name).unlink()


def seeds(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Rows by table, without those of partitions of the ledger."""
    tables = connection.execute(
        "select relname from pg_class where relnamespace = 'kakunin_private'::regnamespace and relkind = 'r'"
        " and relname <> 'alembic_version' and not relispartition"
    ).fetchall()
    count = lambda name: connection.execute(f"select count(*) from kakunin_private.{name}").fetchone()  # noqa: E731
    return {name: count(name)[0] for (name,) in tables}  # type: ignore[index]


def test_the_extension_is_the_kit(project: Cluster, database: str, extension: str, tmp_path: Path) -> None:
    with project.connect(database, "postgres", autocommit=True) as owner:
        owner.execute("create extension kakunin")
        assert owner.execute(
            "select extversion, extowner::regrole::text from pg_extension where extname = 'kakunin'"
        ).fetchone() == (extension, "postgres")
        assert set(seeds(owner).values()) == {0}
        owner.execute("select kakunin.initialize()")
        with pytest.raises(psycopg.Error, match="has been initialized") as error:
            owner.execute("select kakunin.initialize()")
        assert error.value.sqlstate == "KA010"
        made = seeds(owner)
        code = owner.execute(CODE).fetchall()
    with project.connect("template1", "supabase_admin", autocommit=True) as admin:
        admin.execute("drop database if exists plainly")
        admin.execute("create database plainly owner postgres")
    try:
        assert psql(project, "plainly", "-f", write(tmp_path, plain_sql())).returncode == 0
        with project.connect("plainly", "postgres") as owner:
            assert seeds(owner) == made
            assert owner.execute(CODE).fetchall() == code
    finally:
        with project.connect("template1", "supabase_admin", autocommit=True) as admin:
            admin.execute("drop database plainly with (force)")
    issued = agent_of(project, database)
    with project.connect(database, "postgres", autocommit=True) as owner:
        assert owner.execute(
            "select kakunin.verify_certificate(%s) ->> 'valid'", [issued.serial]
        ).fetchone() == ("true",)
        with (
            project.connect(database, "authenticator", autocommit=True) as nobody,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            nobody.execute("select kakunin.initialize()")
        owner.execute("drop extension kakunin cascade")
        assert owner.execute(
            "select to_regnamespace('kakunin'), to_regnamespace('kakunin_private')"
        ).fetchone() == (None, None)


# Functions by what they do and who may call them; initialize() is the extension's alone.
CODE = """
select p.oid::regprocedure::text, md5(pg_get_functiondef(p.oid)),
       (select array_agg(a.grantee::regrole::text || a.privilege_type order by 1) from aclexplode(p.proacl) a)
  from pg_proc p
 where p.pronamespace in (select oid from pg_namespace where nspname like 'kakunin%')
   and p.proname <> 'initialize' order by 1
"""


def test_a_dump_of_the_extension_is_whole(
    project: Cluster, database: str, extension: str, tmp_path: Path
) -> None:
    version = subprocess.check_output([DUMP, "--version"], text=True) if DUMP else " 0"
    if int(re.findall(r" (\d+)", version)[0]) < project.major:
        pytest.skip("no pg_dump as new as the server on this machine")
    with project.connect(database, "postgres", autocommit=True) as owner:
        owner.execute("create extension kakunin")
        owner.execute("select kakunin.initialize()")
    issued = agent_of(project, database)
    with project.connect(database, "postgres", autocommit=True) as owner:
        owner.execute("select kakunin.revoke_certificate(%s, 'superseded')", [issued.serial])
    dump = subprocess.run(
        [DUMP, "-d", project.dsn(database, "postgres"), "--exclude-schema=auth"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with project.connect("template1", "supabase_admin", autocommit=True) as admin:
        admin.execute("drop database if exists restored")
        admin.execute("create database restored owner postgres")
    try:
        done = psql(project, "restored", "-v", "ON_ERROR_STOP=0", "-f", write(tmp_path, dump))
        # A partition that is attached to a table of the extension's gets indexes by that. pg_dump leaves
        # out what the extension makes, and these it does not.
        there = re.compile(
            r'multiple primary keys for table "ledger_\d+"|relation "ledger_\d+_\w+" already exists'
        )
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        assert [error for error in errors if not there.search(error)] == []
        look = (
            "select (select installation_id from kakunin_private.installation),"
            " (select array_agg(entry order by event_id) from kakunin_private.ledger),"
            " (select array_agg(k order by key_id) from kakunin_private.session_keys k),"
            " (select array_agg(inhrelid::regclass::text order by 1) from pg_inherits"
            "   where inhparent = 'kakunin_private.ledger'::regclass)"
        )
        with project.connect(database, "postgres") as one, project.connect("restored", "postgres") as other:
            assert one.execute(look).fetchone() == other.execute(look).fetchone()
            assert seeds(one) == seeds(other)
            state = other.execute(
                "select kakunin.verify_certificate(%s) ->> 'status'", [issued.serial]
            ).fetchone()
            assert state == ("revoked",)
            # And it goes on: another entry, with ids after those that came along.
            other.execute("select kakunin.create_agent('next')")
    finally:
        with project.connect("template1", "supabase_admin", autocommit=True) as admin:
            admin.execute("drop database restored with (force)")


# The commands ------------------------------------------------------------------------------------------


def test_the_commands_write_files_and_never_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "supabase", "--json"]) == 0
    [written] = json.loads(capsys.readouterr().out)["written"]
    assert re.fullmatch(r"supabase/migrations/20\d{12}_kakunin\.sql", written)
    assert Path(written).read_text() == supabase_sql()

    # A second one would stop a push in the middle.
    assert cli.main(["export", "supabase"]) == 0
    assert capsys.readouterr().out.split() == ["unchanged", written]
    earlier = Path(written).read_text()
    Path(written).write_text(earlier.replace("0001", "0000"))
    assert cli.main(["export", "supabase"]) == 1
    said = capsys.readouterr().err
    assert f"{written} is there already, and is of another version of the kit or was changed" in said
    assert "delete it and export again" in said
    Path("supabase/migrations/20200101000000_kakunin.sql").write_text(earlier)  # whatever else there is
    assert cli.main(["export", "supabase", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "written": [],
        "unchanged": ["supabase/migrations/20200101000000_kakunin.sql"],
    }
    assert len(list(Path("supabase/migrations").iterdir())) == 2

    assert cli.main(["export", "sql"]) == 0
    assert capsys.readouterr().out == plain_sql()
    assert cli.main(["export", "sql", "--out", "kit.sql"]) == 0
    assert Path("kit.sql").read_text() == plain_sql()
    assert cli.main(["export", "extension", "--out", "share"]) == 0
    assert {path.name: path.read_text() for path in Path("share").iterdir()} == extension_files()
    capsys.readouterr()
    for arguments in (["sql", "--out", "kit.sql"], ["extension", "--out", "share"]):
        assert cli.main(["export", *arguments]) == 1
        assert "is there already, and nothing is written over it" in capsys.readouterr().err
    with contextlib.suppress(FileExistsError):
        Path("file").touch()
    assert cli.main(["export", "supabase", "--out", "file"]) == 1
    assert "cannot be made" in capsys.readouterr().err
