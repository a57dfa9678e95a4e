"""protect(), unprotect() and the ready-made policies: what they let through, refuse, and leave behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from conftest import Agent, Database
from psycopg import sql

from kakunin_db.resources import sql_dir


@dataclass
class Table:
    """A table of app's with two rows of `one`, two of `two`, one of nobody; agents may use it."""

    database: Database
    schema: str
    name: str
    column: str
    one: Agent
    two: Agent

    @property
    def id(self) -> sql.Identifier:
        return sql.Identifier(self.schema, self.name)

    @property
    def text(self) -> str:
        """As regclass reads it."""
        return self.id.as_string(None)

    def protect(self, *, user: str = "app", **arguments: Any) -> list[str]:
        """protect() on this table; returns its notices."""
        return self._call(user, "protect", {"target": self.text, "serial_column": self.column} | arguments)

    def unprotect(self, *, user: str = "app") -> list[str]:
        return self._call(user, "unprotect", {"target": self.text})

    def _call(self, user: str, function: str, arguments: dict[str, Any]) -> list[str]:
        notices: list[str] = []
        with self.database.connect(user) as connection:
            connection.add_notice_handler(lambda n: notices.append(n.message_primary or ""))
            names = sql.SQL(", ").join(sql.SQL("{} => %s").format(sql.Identifier(name)) for name in arguments)
            connection.execute(
                sql.SQL("select kakunin.{}({})").format(sql.Identifier(function), names),
                list(arguments.values()),
            )
        return notices

    def refusal(self, *, user: str = "app", function: str = "protect", **arguments: Any) -> str:
        """The SQLSTATE of a call that must leave everything as it was."""
        before = catalog(self.database)
        with pytest.raises(psycopg.Error) as caught:
            getattr(self, function)(user=user, **arguments)
        assert catalog(self.database) == before
        return caught.value.sqlstate or ""

    def run(self, query: str, user: str = "app") -> None:
        """A statement with {t} for the table and {c} for the column."""
        with self.database.connect(user) as connection:
            connection.execute(self.fill(query))

    def fill(self, query: str, **parts: sql.Composable) -> sql.Composed:
        return sql.SQL(query).format(t=self.id, c=sql.Identifier(self.column), **parts)

    def seen(self, agent: Agent | None, login: str = "agent_1", relation: str = "{t}") -> set[str]:
        with session(self.database, agent, login) as connection:
            rows = connection.execute(self.fill(f"select content from {relation}")).fetchall()
            return {content for (content,) in rows}


EVERYTHING = {"one-a", "one-b", "two-a", "two-b", "nobody"}


@contextlib.contextmanager
def session(
    database: Database, agent: Agent | None, login: str = "agent_1"
) -> Iterator[psycopg.Connection[Any]]:
    """A transaction bound to the agent, rolled back at its end."""
    ticket = agent and database.ticket(agent, login)
    with database.connect(login) as connection, connection.transaction(force_rollback=True):
        if ticket:
            connection.execute("select kakunin.bind_session(%s)", [ticket])
        yield connection


def catalog(database: Database) -> Any:
    """Everything protect() may touch, of every table that is not the system's."""
    return database.run(
        "postgres",
        "select c.oid::regclass::text, c.relrowsecurity, c.relforcerowsecurity, c.relacl::text[], array("
        "  select row(polname, polcmd, polpermissive, polroles::regrole[], pg_get_expr(polqual, polrelid),"
        "             pg_get_expr(polwithcheck, polrelid), obj_description(p.oid, 'pg_policy'))::text"
        "    from pg_policy p where polrelid = c.oid order by polname)"
        " from pg_class c where relnamespace::regnamespace::text !~ '^(pg_|information_schema|kakunin)'"
        " order by c.oid",
    )


def policies(table: Table) -> set[str]:
    query = "select polname from pg_policy where polrelid = %s::regclass"
    return {name for (name,) in table.database.run("app", query, [table.text])}


def secured(table: Table, relation: str | None = None) -> tuple[bool, bool]:
    """(row security enabled, forced)"""
    query = "select relrowsecurity, relforcerowsecurity from pg_class where oid = %s::regclass"
    return table.database.run("app", query, [relation or table.text])[0]


@pytest.fixture(scope="module")
def agents(database: Database) -> tuple[Agent, Agent]:
    return (
        database.agent("one", permitted_actions=["orders:write", "trade:*"]),
        database.agent("two", permitted_actions=["orders:writes", "trade", "orders"]),
    )


PLAIN = "create table {t} (id int generated always as identity primary key, {c} text, content text)"


@contextlib.contextmanager
def make_table(
    database: Database,
    agents: tuple[Agent, Agent],
    names: tuple[str, str, str] = ("public", "notes", "permitted_agent_serial"),
    definition: str = PLAIN,
) -> Iterator[Table]:
    table = Table(database, *names, *agents)
    with database.connect("app", autocommit=True) as app:
        if table.schema != "public":
            app.execute(sql.SQL("create schema {}").format(sql.Identifier(table.schema)))
            app.execute(
                sql.SQL("grant usage on schema {} to kakunin_agent, kakunin_gateway").format(
                    sql.Identifier(table.schema)
                )
            )
        app.execute(table.fill(definition))
        for content in sorted(EVERYTHING):
            agent = {"one": table.one, "two": table.two}.get(content[:3])
            values = sql.SQL(", ").join([sql.Literal(agent and agent.serial), sql.Literal(content)])
            app.execute(table.fill("insert into {t} ({c}, content) values ({v})", v=values))
        app.execute(
            table.fill("grant select, insert, update, delete on {t} to kakunin_agent, kakunin_gateway")
        )
        try:
            yield table
        finally:
            app.execute(table.fill("drop table if exists {t} cascade"))
            if table.schema != "public":
                app.execute(sql.SQL("drop schema {} cascade").format(sql.Identifier(table.schema)))


@pytest.fixture
def table(database: Database, agents: tuple[Agent, Agent]) -> Iterator[Table]:
    with make_table(database, agents) as table:
        yield table


@pytest.fixture(scope="module", autouse=True)
def app_may_create_schemas(database: Database) -> None:
    database.run("postgres", f"grant create on database {database.name} to app")


# Isolation ------------------------------------------------------------------------------------------


def test_g1_a_session_sees_and_changes_only_rows_of_its_certificate(table: Table) -> None:
    assert table.seen(None) == EVERYTHING  # so it is protect() that hides them
    table.protect()
    assert table.seen(table.one) == table.seen(table.one, "gateway") == {"one-a", "one-b"}
    assert table.seen(table.two) == {"two-a", "two-b"}
    assert table.seen(None) == set()
    with session(table.database, table.one) as connection:
        assert connection.execute(table.fill("update {t} set content = content || '!'")).rowcount == 2
        assert connection.execute(table.fill("delete from {t}")).rowcount == 2
    for statement in (
        "insert into {t} ({c}) values (%(two)s)",
        "insert into {t} ({c}) values (null)",
        "update {t} set {c} = %(two)s",
        "update {t} set {c} = null",
        "merge into {t} using (values (0)) v(x) on false when not matched then insert ({c}) values (%(two)s)",
    ):
        with session(table.database, table.one) as connection, pytest.raises(psycopg.Error) as caught:
            connection.execute(table.fill(statement), {"two": table.two.serial})
        assert caught.value.sqlstate == "42501", statement
    with session(table.database, None) as connection:
        assert connection.execute(table.fill("delete from {t}")).rowcount == 0
        assert connection.execute(table.fill("update {t} set content = 'x'")).rowcount == 0


def test_a_role_the_policy_does_not_name_sees_nothing(table: Table) -> None:
    table.run("grant select on {t} to public")
    table.protect(roles=["kakunin_gateway"])
    assert table.seen(table.one, "gateway") == {"one-a", "one-b"}
    assert table.seen(table.one, "agent_1") == set()
    assert table.seen(None, "stranger") == set()
    assert table.seen(None, "app") == EVERYTHING  # the owner, whom row security does not bind unless forced


def test_protect_asks_for_the_serial_once_a_statement(table: Table) -> None:
    table.protect()
    with session(table.database, table.one) as connection:
        plan = "\n".join(
            row[0] for row in connection.execute(table.fill("explain (costs off) select from {t}"))
        )
    assert "InitPlan 1" in plan
    assert "current_cert_serial()" not in plan


@pytest.mark.parametrize(
    "arguments", [{}, {"write_scope": "orders:write"}, {"force": True}, {"roles": ["public"]}], ids=str
)
def test_protect_can_be_repeated(table: Table, arguments: dict[str, Any]) -> None:
    table.protect(**arguments)
    once = catalog(table.database)
    table.protect(**arguments)
    assert catalog(table.database) == once
    table.unprotect()
    off = catalog(table.database)
    assert off != once
    assert table.unprotect() == []
    assert catalog(table.database) == off
    table.protect(**arguments)
    assert catalog(table.database) == once


def test_a_repeated_protect_replaces_what_it_wrote(table: Table) -> None:
    table.protect(write_scope="orders:write")
    scope = {"kakunin_insert_scope", "kakunin_update_scope", "kakunin_delete_scope"}
    assert policies(table) == {"kakunin_isolation"} | scope
    table.protect(roles=["kakunin_gateway"])
    assert policies(table) == {"kakunin_isolation"}
    assert table.seen(table.one, "agent_1") == set()
    assert table.seen(table.one, "gateway") == {"one-a", "one-b"}


def test_a_missing_index_is_pointed_out(table: Table) -> None:
    assert [n for n in table.protect() if "no index" in n]
    table.run("create index on {t} ({c})")
    assert not [n for n in table.protect() if "no index" in n]


ODD = [
    "My Table", "select", 'quo"te', "quo'te", "back\\slash", "%I %s %1$s %%", "semi;colon -- /*", "$$",
    "$tag$", "new\nline", "\u00fcn\u00ef \u8868", "UPPER", "pg_class", "CURRENT_USER", "x" * 63, '"',
    "''; drop table notes; --",
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_any_name_is_quoted(database: Database, agents: tuple[Agent, Agent], odd: str) -> None:
    with (
        make_table(database, agents) as bystander,
        make_table(database, agents, (f"s{odd}"[:63], odd, odd)) as table,
    ):
        bystander.protect()
        before = secured(bystander)
        table.protect(write_scope="trade:x")
        table.protect(write_scope="trade:x")
        assert table.seen(table.one) == {"one-a", "one-b"}
        assert table.seen(None) == set()
        table.unprotect()
        assert secured(table) == (False, False)
        assert secured(bystander) == before


@pytest.mark.parametrize("odd", ["Odd Role", 'r"o', "r'o", "user", "none; drop", "public "])
def test_any_role_is_quoted(table: Table, odd: str) -> None:
    role = sql.Identifier(odd)
    with table.database.connect("postgres", autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} in role kakunin_agent").format(role))
        admin.execute(sql.SQL("grant {} to agent_2").format(role))
        try:
            table.run("grant truncate on {t} to kakunin_agent")
            table.protect(roles=[odd])
            assert table.seen(table.one, "agent_2") == {"one-a", "one-b"}
            assert table.seen(table.one, "agent_1") == set()
        finally:
            table.unprotect()
            admin.execute(sql.SQL("drop owned by {}").format(role))
            admin.execute(sql.SQL("drop role {}").format(role))


@pytest.mark.parametrize(
    "arguments",
    [
        {"serial_column": "content = '' or true) --"},
        {"serial_column": 'content" or true --'},
        {"roles": ["kakunin_agent) using (true) --"]},
        {"roles": ["public, stranger"]},
        {"write_scope": "x')) or (select true) --"},
        {"write_scope": "x'"},
        {"write_scope": ""},
        {"write_scope": "a b"},
        {"write_scope": "trade:*"},
        {"write_scope": "a\n"},
        {"write_scope": "x" * 129},
        {"roles": []},
        {"roles": ["nobody_of_that_name"]},
        {"roles": ["kakunin_agent", None]},
        {"roles": [None]},
        {"roles": ["PUBLIC"]},
        {"roles": [""]},
        {"roles": None},
        {"target": None},
        {"serial_column": None},
        {"serial_column": ""},
        {"serial_column": "no_such_column"},
        {"serial_column": "ctid"},
        {"serial_column": "tableoid"},
        {"serial_column": "id"},
        {"serial_column": "PERMITTED_AGENT_SERIAL"},
        {"force": None},
        {"keep_policies": None},
    ],
    ids=lambda a: ascii(a)[:50],
)
def test_a_bad_argument_changes_nothing(table: Table, arguments: dict[str, Any]) -> None:
    assert table.refusal(**arguments) == "KA010"


@pytest.mark.parametrize(
    "name", ["notes; drop table notes", "notes, pg_class", "no_such_table", '"notes', ""]
)
def test_a_target_that_names_no_table_changes_nothing(table: Table, name: str) -> None:
    # regclass itself refuses these, before any function runs
    assert table.refusal(target=name) in {"42P01", "42602", "42601"}


def test_unprotect_needs_a_table(database: Database) -> None:
    with pytest.raises(psycopg.Error) as caught:
        database.run("app", "select kakunin.unprotect(null)")
    assert caught.value.sqlstate == "KA010"


@pytest.mark.parametrize("column", ["text", "varchar", "varchar(59)", "serial_domain"])
def test_a_serial_column_is_text(database: Database, agents: tuple[Agent, Agent], column: str) -> None:
    database.run("app", "create domain serial_domain as text check (value ~ '^[0-9A-F:]+$')")
    try:
        with make_table(
            database, agents, definition=f"create table {{t}} ({{c}} {column}, content text)"
        ) as table:
            table.protect()
            assert table.seen(table.one) == {"one-a", "one-b"}
            assert table.seen(None) == set()
    finally:
        database.run("app", "drop domain serial_domain cascade")


@pytest.mark.parametrize(
    "column", ["char(59)", "name", "text[]", "bytea", "json", "int", "uuid[]", "int_domain"]
)
def test_a_column_of_another_type_is_refused(table: Table, column: str) -> None:
    table.run("create domain int_domain as int")
    try:
        table.run(f"alter table {{t}} add column other {column}")
        assert table.refusal(serial_column="other") == "KA010"
    finally:
        table.run("drop domain int_domain cascade")


def test_rows_of_an_agent_stay_its_own_when_its_certificate_is_renewed(database: Database) -> None:
    """A uuid column holds the agent's id."""
    one, two = database.agent("one"), database.agent("two")
    with database.connect("app") as app:
        app.execute("create table by_agent (permitted_agent_id uuid, content text)")
        app.execute(
            "insert into by_agent values (%s, 'one'), (%s, 'two'), (null, 'nobody')",
            [one.agent_id, two.agent_id],
        )
        app.execute("select kakunin.protect('by_agent', 'permitted_agent_id')")
        app.execute("grant select, insert on by_agent to kakunin_agent")
    try:
        renewed = database.renew(one)

        def seen(agent: Agent | None) -> set[str]:
            with session(database, agent) as connection:
                return {content for (content,) in connection.execute("select content from by_agent")}

        assert (seen(one), seen(renewed), seen(two), seen(None)) == ({"one"}, {"one"}, {"two"}, set())
        with session(database, renewed) as connection:
            connection.execute("insert into by_agent values (%s, 'mine')", [one.agent_id])
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("insert into by_agent values (%s, 'not mine')", [two.agent_id])
        one.revoke()
        assert (seen(renewed), seen(two)) == ({"one"}, {"two"})
        with pytest.raises(psycopg.Error, match="revoked"):
            seen(one)
    finally:
        database.run("app", "drop table by_agent")


def test_a_dropped_column_is_refused(table: Table) -> None:
    table.run("alter table {t} drop column {c}")
    assert table.refusal() == "KA010"


# What can be protected ------------------------------------------------------------------------------


@pytest.fixture
def relations(table: Table) -> Iterator[Table]:
    """Beside the table: things that are like one."""
    admin_rights = (
        "create foreign data wrapper nowhere", "create server nowhere foreign data wrapper nowhere",
        "grant usage on foreign server nowhere to app",
    )  # fmt: skip
    for statement in admin_rights:
        table.run(statement, "postgres")
    table.run("create view a_view as select * from {t}")
    table.run("create materialized view a_matview as select * from {t}")
    table.run("create foreign table a_foreign_table ({c} text) server nowhere")
    table.run("create type a_type as ({c} text)")
    table.run("create index an_index on {t} ({c})")
    table.run("create sequence a_sequence")
    yield table
    table.run("drop foreign table a_foreign_table; drop type a_type; drop sequence a_sequence")
    table.run("drop foreign data wrapper nowhere cascade", "postgres")


@pytest.mark.parametrize(
    "relation", ["a_view", "a_matview", "a_foreign_table", "a_type", "an_index", "a_sequence"]
)
def test_what_is_not_a_table_is_refused(relations: Table, relation: str) -> None:
    assert relations.refusal(target=f"public.{relation}") == "KA010"


@pytest.mark.parametrize("user", ["app", "postgres"])
@pytest.mark.parametrize(
    ("relation", "column", "sqlstate"),
    [
        ("pg_catalog.pg_class", "relname", "KA010"),
        ("information_schema.tables", "table_name", "KA010"),
        ("pg_catalog.pg_description", "description", "42501"),  # the server's own refusal
    ],
)
def test_system_tables_are_refused(
    table: Table, user: str, relation: str, column: str, sqlstate: str
) -> None:
    assert table.refusal(user=user, target=relation, serial_column=column) == sqlstate


def test_a_temporary_table_can_be_protected(database: Database) -> None:
    with database.connect("app") as app:
        # With a name that hides one of the catalogs protect() reads.
        app.execute("create temp table pg_policy (permitted_agent_serial text)")
        app.execute("select kakunin.protect('pg_temp.pg_policy')")
        row = app.execute(
            "select relrowsecurity from pg_class where oid = 'pg_temp.pg_policy'::regclass"
        ).fetchone()
        assert row == (True,)


PARTITIONED = "create table {t} ({c} text, content text) partition by list (content)"


@pytest.fixture
def family(database: Database, agents: tuple[Agent, Agent]) -> Iterator[Table]:
    """Partitions two levels deep, every row in the deepest."""
    definition = (
        PARTITIONED + ";"
        " create table middle partition of {t} for values in ('one-a', 'two-a', 'nobody', 'one-b', 'two-b')"
        " partition by list ({c});"
        " create table deepest partition of middle default;"
        " grant all on middle, deepest to kakunin_agent"
    )
    with make_table(database, agents, definition=definition) as table:
        yield table


@pytest.mark.parametrize("relation", ["{t}", "middle", "deepest"])
def test_a_partition_is_filtered_when_it_is_queried_itself(family: Table, relation: str) -> None:
    assert family.seen(None, relation=relation) == EVERYTHING
    family.protect(write_scope="orders:write")
    assert family.seen(family.one, relation=relation) == {"one-a", "one-b"}
    assert family.seen(None, relation=relation) == set()
    with session(family.database, family.two) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(family.fill(f"delete from {relation}"))
    assert caught.value.sqlstate == "KA005"
    with session(family.database, family.one) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(family.fill(f"truncate {relation}"))
    assert caught.value.sqlstate == "42501"
    family.unprotect()
    assert family.seen(None, relation=relation) == EVERYTHING


def test_protecting_again_covers_a_new_partition(family: Table) -> None:
    family.protect()
    family.run("create table late partition of {t} default; grant select on late to kakunin_agent")
    family.run("insert into {t} values ('AA', 'new')")
    assert family.seen(family.one) == {"one-a", "one-b"}  # the parent's policy holds already
    assert family.seen(family.one, relation="late") == {"new"}
    family.protect()
    assert family.seen(family.one, relation="late") == set()


def test_inheritance_children_are_filtered_too(table: Table) -> None:
    table.run("create table child () inherits ({t}); grant select on child to kakunin_agent")
    table.run("create table other_parent (x int); create table grandchild () inherits (child, other_parent)")
    table.run("grant select on grandchild to kakunin_agent")
    for name in ("child", "grandchild"):
        table.run(f"insert into {name} (id, {{c}}, content) values (9, '{table.two.serial}', '{name}')")
    table.protect()
    for name in ("child", "grandchild"):
        assert table.seen(table.one, relation=name) == set()
        assert name in table.seen(table.two, relation=name)
    assert secured(table, "other_parent") == (False, False)
    table.unprotect()
    assert table.seen(None, relation="grandchild") == {"grandchild"}
    table.run("drop table grandchild, child, other_parent")


def test_a_child_that_cannot_be_protected_stops_it_all(table: Table) -> None:
    table.run("create table child () inherits ({t})")
    table.run("alter table child owner to stranger", "postgres")
    assert table.refusal() == "42501"
    table.run("drop table child", "postgres")
    table.run("create table child () inherits ({t}); create policy open on child using (true)")
    assert table.refusal() == "KA010"


# What would quietly undo it -------------------------------------------------------------------------


def test_another_permissive_policy_is_refused_unless_it_is_meant(table: Table) -> None:
    table.run("create policy staff on {t} for select to kakunin_agent using (content = 'nobody')")
    assert table.refusal() == "KA010"
    table.protect(keep_policies=True)
    assert table.seen(table.one) == {"one-a", "one-b", "nobody"}
    assert table.refusal() == "KA010"  # a repeated one asks again
    table.unprotect()
    assert policies(table) == {"staff"}


def test_a_restrictive_policy_is_kept_and_narrows(table: Table) -> None:
    table.run("create policy narrow on {t} as restrictive using (content like '%-a')")
    table.protect()
    assert table.seen(table.one) == {"one-a"}
    table.unprotect()
    assert policies(table) == {"narrow"}


def test_a_permissive_policy_is_not_taken_for_the_kits_by_its_name(table: Table) -> None:
    table.run("create policy kakunin_open on {t} using (true)")
    assert table.refusal() == "KA010"


def test_force_that_slept_is_not_woken_unasked(table: Table) -> None:
    table.run("alter table {t} force row level security")
    assert table.refusal() == "KA010"
    table.protect(force=True)
    assert secured(table) == (True, True)


def test_force_binds_the_owner(table: Table) -> None:
    table.protect(force=True, roles=["kakunin_agent", "app"])
    table.run("grant kakunin_agent to app", "postgres")
    try:
        assert table.seen(None, "app") == set()
        assert table.seen(table.one, "app") == {"one-a", "one-b"}
    finally:
        table.run("revoke kakunin_agent from app", "postgres")


UNCOVERED = ["truncate", "trigger", "references"]


@pytest.mark.parametrize("grantee", ["kakunin_agent", "kakunin_gateway", "agent_1", "public"])
@pytest.mark.parametrize("privilege", UNCOVERED)
def test_a_privilege_that_row_security_does_not_cover_is_taken(
    table: Table, privilege: str, grantee: str
) -> None:
    table.run(f"grant {privilege} on {{t}} to {grantee}")
    query = f"select has_table_privilege('agent_1', %s, '{privilege}')"
    holder = "gateway" if grantee == "kakunin_gateway" else "agent_1"
    query = query.replace("agent_1", holder)
    assert table.database.value("app", query, [table.text])
    assert [n for n in table.protect() if "revoked" in n and f"from {grantee}" in n]
    assert not table.database.value("app", query, [table.text])
    assert not [n for n in table.protect() if "revoked" in n]
    assert table.seen(table.one) == {"one-a", "one-b"}  # the rest of the privileges stay


def test_a_privilege_held_through_another_role_is_taken(table: Table) -> None:
    table.run("create role writers role agent_1", "postgres")
    try:
        table.run("grant truncate on {t} to writers")
        table.protect()
        query = "select has_table_privilege('agent_1', %s, 'truncate')"
        assert not table.database.value("app", query, [table.text])
    finally:
        table.run("drop owned by writers; drop role writers", "postgres")


def test_references_on_a_column_alone_is_taken(table: Table) -> None:
    table.run("grant references (id) on {t} to kakunin_agent")
    query = "select has_column_privilege('agent_1', %s, 'id', 'references')"
    assert table.database.value("app", query, [table.text])
    table.protect()
    assert not table.database.value("app", query, [table.text])


def test_a_privilege_granted_on_by_another_does_not_stay_unnoticed(table: Table) -> None:
    table.run("grant truncate on {t} to stranger with grant option")
    table.run("grant truncate on {t} to kakunin_agent", "stranger")
    with contextlib.suppress(psycopg.Error):
        table.protect()
    held = table.database.value("app", "select has_table_privilege('agent_1', %s, 'truncate')", [table.text])
    assert not (held and secured(table)[0])  # taken, or refused as a whole


def test_the_privileges_of_others_stay(table: Table) -> None:
    table.run("grant truncate, trigger, references on {t} to stranger")
    table.protect()
    for privilege in UNCOVERED:
        query = f"select has_table_privilege('stranger', %s, '{privilege}')"
        assert table.database.value("app", query, [table.text])


# Write scope ----------------------------------------------------------------------------------------

WRITES = {
    "insert": "insert into {t} ({c}, content) values (%(serial)s, 'new')",
    "insert returning": "insert into {t} ({c}) values (%(serial)s) returning id",
    "update": "update {t} set content = 'x'",
    "delete": "delete from {t}",
    "for update": "select from {t} for update",
    "for no key update": "select from {t} for no key update",
    "for share": "select from {t} for share",
    "merge update": "merge into {t} using (values (0)) v(x) on {t}.content > ''"
    " when matched then update set content = 'x'",
    "merge delete": "merge into {t} using (values (0)) v(x) on {t}.content > '' when matched then delete",
    "merge insert": "merge into {t} using (values (0)) v(x) on false"
    " when not matched then insert ({c}) values (%(serial)s)",
    "upsert": "insert into {t} (id, {c}) overriding system value select id, %(serial)s from {t}"
    " on conflict (id) do update set content = 'x'",
    "writable cte": "with d as (delete from {t} returning id) select count(*) from d",
}


@pytest.mark.parametrize("scope", ["orders:write", "trade:a:b"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_needs_the_scope_and_says_so(table: Table, write: str, scope: str) -> None:
    table.protect(write_scope=scope)
    with session(table.database, table.one) as connection:
        connection.execute(table.fill(WRITES[write]), {"serial": table.one.serial})
    with session(table.database, table.two) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(table.fill(WRITES[write]), {"serial": table.two.serial})
    assert caught.value.sqlstate == "KA005"
    assert scope in str(caught.value)
    assert table.seen(table.two) == {"two-a", "two-b"}  # reading needs none


@pytest.mark.parametrize(
    "scope", ["trade", "trade:", "orders", "order:write", "orders:write:all", "ORDERS:WRITE"]
)
def test_a_scope_is_exact_or_below_its_prefix(table: Table, scope: str) -> None:
    table.protect(write_scope=scope)
    with session(table.database, table.one) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(table.fill(WRITES["delete"]))
    assert caught.value.sqlstate == "KA005"


@pytest.mark.parametrize("write", ["insert", "update", "delete", "for update"])
def test_g8_a_write_without_a_good_binding_is_refused_by_name(table: Table, write: str) -> None:
    table.protect(write_scope="orders:write")
    agent = table.database.agent("third", permitted_actions=["orders:write"])
    table.run(f"insert into {{t}} ({{c}}) values ('{agent.serial}')")
    statement = table.fill(WRITES[write])

    def outcome(connection: psycopg.Connection[Any]) -> str | None:
        with pytest.raises(psycopg.Error) as caught, connection.transaction():
            connection.execute(statement, {"serial": agent.serial})
        return caught.value.sqlstate

    # The server checks a new row against isolation first, and names that itself.
    insert = write == "insert"
    with session(table.database, None) as connection:
        assert outcome(connection) == ("42501" if insert else "KA004")
    with session(table.database, agent) as connection:
        agent.suspend()
        assert outcome(connection) == ("42501" if insert else "KA008")
        agent.revoke()
        assert outcome(connection) == ("42501" if insert else "KA002")


def test_copy_needs_the_scope_too(table: Table) -> None:
    table.protect(write_scope="orders:write")
    copy = table.fill("copy {t} ({c}, content) from stdin")
    for agent, passes in ((table.one, True), (table.two, False)):
        # Postgres has no COPY FROM on a table whose row security applies: the same answer for both.
        with session(table.database, agent) as connection, pytest.raises(psycopg.Error) as caught:
            with connection.cursor().copy(copy) as stream:
                stream.write_row([agent.serial, "copied"])
        assert caught.value.sqlstate == "0A000", passes


# Unprotect ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("times", [1, 2])
def test_unprotect_restores_what_was(table: Table, enabled: bool, forced: bool, times: int) -> None:
    if enabled:
        table.run("alter table {t} enable row level security")
    if forced:
        table.run("alter table {t} force row level security")
    before = catalog(table.database)
    for _ in range(times):
        table.protect(force=forced, write_scope="orders:write")
    assert secured(table) == (True, forced)
    assert catalog(table.database) != before
    table.unprotect()
    assert catalog(table.database) == before


def test_unprotect_takes_back_force_that_protect_set(table: Table) -> None:
    before = catalog(table.database)
    table.protect(force=True)
    table.protect(force=True)
    table.unprotect()
    assert catalog(table.database) == before


def test_unprotect_keeps_row_security_on_for_other_policies(table: Table) -> None:
    table.protect()
    table.run("create policy narrow on {t} as restrictive using (content like '%-a')")
    assert [n for n in table.unprotect() if "keeps row security on" in n]
    assert secured(table) == (True, False)
    assert policies(table) == {"narrow"}
    assert table.seen(table.one) == set()


def test_unprotect_leaves_policies_that_only_sound_like_the_kits(table: Table) -> None:
    table.protect()
    table.run("create policy kakunin_mine on {t} as restrictive using (true)")
    table.unprotect()
    assert policies(table) == {"kakunin_mine"}


def test_unprotect_stays_closed_where_nobody_knows_how_it_stood(table: Table) -> None:
    table.protect(force=True)
    table.run("comment on policy kakunin_isolation on {t} is null")
    table.unprotect()
    assert secured(table) == (True, True)
    assert policies(table) == set()


def test_unprotect_says_when_it_opens_a_table(table: Table) -> None:
    table.protect()
    assert [n for n in table.unprotect() if "row security is off" in n]


def test_unprotect_of_an_unprotected_table_does_nothing(table: Table) -> None:
    table.run("alter table {t} enable row level security; create policy mine on {t} using (true)")
    before = catalog(table.database)
    assert table.unprotect() == []
    assert catalog(table.database) == before


# Who and when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["operator", "agent_1", "gateway", "stranger"])
@pytest.mark.parametrize("function", ["protect", "unprotect"])
def test_only_the_owner_protects(table: Table, user: str, function: str) -> None:
    if function == "unprotect":
        table.protect()
    assert table.refusal(user=user, function=function) == "42501"


def test_what_is_rolled_back_is_not_protected(table: Table) -> None:
    before = catalog(table.database)
    with table.database.connect("app") as app:
        app.execute("select kakunin.protect(%s, write_scope => 'a:b')", [table.text])
        assert policies(table) == set()  # nor seen by others before the commit
        app.rollback()
    assert catalog(table.database) == before
    table.protect()
    protected = catalog(table.database)
    with table.database.connect("app") as app:
        app.execute("select kakunin.unprotect(%s)", [table.text])
        app.rollback()
    assert catalog(table.database) == protected


def test_protect_works_under_any_path_and_any_string_syntax(table: Table) -> None:
    before = catalog(table.database)
    with table.database.connect("app") as app:
        app.execute("set search_path = ''")
        app.execute("set standard_conforming_strings = off")
        app.execute("set quote_all_identifiers = on")
        app.execute("select kakunin.protect('public.notes', write_scope => 'orders:write')")
        app.execute("select kakunin.protect('public.notes', write_scope => 'orders:write')")
        app.execute("select kakunin.unprotect('public.notes')")
    assert catalog(table.database) == before


# The ready-made files -------------------------------------------------------------------------------


@pytest.fixture
def ready_made(request: pytest.FixtureRequest, database: Database) -> Iterator[str]:
    """The table a file of sql/policies/ makes, applied by app as the file stands."""
    name, relation = request.param
    with database.connect("app", autocommit=True) as app:
        app.execute((sql_dir() / "policies" / f"{name}.sql").read_text())
        try:
            yield relation
        finally:
            app.execute(f"drop table {relation}")


FILES = {
    "agent_vault": ("agent_vault", "content", "'note'"),
    "scope_gated_writes": ("agent_orders", "amount", "1"),
}
# What these refuse depends on risk: test_risk.py.
RISK_FILES = {"spend_limits", "risk_adaptive"}


def test_every_ready_made_file_is_tested_here() -> None:
    assert {path.stem for path in (sql_dir() / "policies").glob("*.sql")} == {*FILES, *RISK_FILES}


@pytest.mark.parametrize(
    ("ready_made", "column", "value"),
    [((name, relation), column, value) for name, (relation, column, value) in FILES.items()],
    indirect=["ready_made"],
    ids=list(FILES),
)
def test_g1_a_ready_made_file_isolates(
    database: Database, agents: tuple[Agent, Agent], ready_made: str, column: str, value: str
) -> None:
    writer = database.agent("writer", permitted_actions=["orders:write"])
    reader = database.agent("reader", permitted_actions=["orders:read"])
    insert = f"insert into {ready_made} ({column}) values ({value}) returning permitted_agent_serial"
    count = f"select count(*) from {ready_made}"

    def bound(agent: Agent, login: str) -> contextlib.AbstractContextManager[psycopg.Connection[Any]]:
        connection = database.connect(login)
        connection.execute("select kakunin.bind_session(%s)", [database.ticket(agent, login)])
        return connection

    # The default fills in who it is.
    with bound(writer, "agent_1") as first, bound(agents[0], "agent_2") as second:
        assert first.execute(insert).fetchone() == (writer.serial,)
        assert second.execute(insert).fetchone() == (agents[0].serial,)
    with bound(writer, "agent_1") as first, bound(reader, "agent_2") as second:
        assert first.execute(count).fetchone() == (1,)
        assert second.execute(count).fetchone() == (0,)
        assert first.execute(f"update {ready_made} set {column} = {value}").rowcount == 1
        with pytest.raises(psycopg.Error) as caught:
            first.execute(f"update {ready_made} set permitted_agent_serial = %s", [reader.serial])
        assert caught.value.sqlstate == "42501"
    with database.connect("agent_1") as unbound:
        assert unbound.execute(count).fetchone() == (0,)
        with pytest.raises(psycopg.Error):
            unbound.execute(insert)
    with database.connect("agent_1") as agent:
        for privilege in UNCOVERED:
            row = agent.execute("select has_table_privilege(%s, %s)", [ready_made, privilege]).fetchone()
            assert row == (False,)
    if ready_made == "agent_orders":
        # With a row of its own: a statement that meets no row of the agent's has nothing to refuse.
        database.run(
            "app",
            f"insert into {ready_made} (permitted_agent_serial, amount) values (%s, 1)",
            [reader.serial],
        )
        for statement in (insert, f"update {ready_made} set amount = 2", f"delete from {ready_made}"):
            with bound(reader, "agent_1") as connection, pytest.raises(psycopg.Error) as caught:
                connection.execute(statement)
            assert caught.value.sqlstate == "KA005"


@pytest.mark.parametrize(
    ("ready_made", "arguments"),
    [
        (("agent_vault", "agent_vault"), {}),
        (("scope_gated_writes", "agent_orders"), {"write_scope": "orders:write"}),
    ],
    indirect=["ready_made"],
    ids=list(FILES),
)
def test_protect_writes_the_same_as_the_file(
    database: Database, ready_made: str, arguments: dict[str, Any]
) -> None:
    query = (
        "select replace(polname, %s, 'kakunin'), polcmd, polpermissive, polroles,"
        " pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)"
        " from pg_policy where polrelid = %s::regclass order by 1"
    )
    by_hand = database.run("app", query, [ready_made, ready_made])
    with database.connect("app", autocommit=True) as app:
        for row in database.run(
            "app", "select polname from pg_policy where polrelid = %s::regclass", [ready_made]
        ):
            app.execute(
                sql.SQL("drop policy {} on {}").format(sql.Identifier(row[0]), sql.Identifier(ready_made))
            )
        call = "select kakunin.protect(%s, write_scope => %s)"
        app.execute(call, [ready_made, arguments.get("write_scope")])
    assert database.run("app", query, ["kakunin", ready_made]) == by_hand


def test_the_articles_own_policy_isolates_sessions_bound_by_the_kit(
    database: Database, agents: tuple[Agent, Agent]
) -> None:
    with make_table(database, agents, ("public", "agent_vault", "permitted_agent_serial")) as table:
        table.run("alter table {t} enable row level security")
        with database.connect("app") as app:
            app.execute(
                "CREATE POLICY agent_vault_isolation ON agent_vault FOR ALL TO authenticated, anon USING"
                " (permitted_agent_serial ="
                " current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial');"
            )
        table.run("create role article_agent login in role authenticated, kakunin_agent", "postgres")
        try:
            assert table.seen(table.one, "article_agent") == {"one-a", "one-b"}
            assert table.seen(table.two, "article_agent") == {"two-a", "two-b"}
            assert table.seen(None, "article_agent") == set()
            assert table.seen(table.one, "agent_1") == set()  # not a member: the policy is not for it
            with session(database, table.one, "article_agent") as connection:
                connection.execute("select kakunin.unbind_session()")
                assert connection.execute(table.fill("select from {t}")).fetchall() == []
            with session(database, table.one, "article_agent") as connection:
                assert connection.execute(table.fill("delete from {t}")).rowcount == 2
                with pytest.raises(psycopg.Error) as caught:
                    connection.execute(table.fill("insert into {t} ({c}) values (%s)"), [table.two.serial])
                assert caught.value.sqlstate == "42501"
        finally:
            table.run("drop role article_agent", "postgres")
