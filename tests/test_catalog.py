"""What holds for every object of the kit, read from the catalog, and what a hostile caller can make of it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from conftest import Agent, Database, Vault, _ca, fresh_database
from cryptography.hazmat.primitives import serialization

from kakunin_db import CertificateAuthority, LocalSigner

SCHEMAS = "('kakunin'::regnamespace, 'kakunin_private'::regnamespace)"
ROLES = [f"kakunin_{name}" for name in ("agent", "auditor", "gateway", "operator", "registrar", "worker")]
# What a policy may call, whether it asks or refuses.
ASKED_BY_POLICIES = ["current_cert_serial", "current_agent_id", "has_scope"]
RAISED_BY_POLICIES = [
    "require_session",
    "require_scope",
]  # and require_risk_below() and require_spend(), which write


@pytest.fixture(scope="module")
def catalog(database: Database) -> Callable[[str], list[Any]]:
    """The first column of a query over the catalog; FUNCTIONS and RELATIONS stand for the kit's own."""

    def read(query: str) -> list[Any]:
        query = query.replace("FUNCTIONS", f"(select * from pg_proc where pronamespace in {SCHEMAS})")
        query = query.replace("RELATIONS", f"(select * from pg_class where relnamespace in {SCHEMAS})")
        return [row[0] for row in database.run("postgres", query)]

    return read


Catalog = Callable[[str], list[Any]]


def test_the_queries_below_see_the_kit(catalog: Catalog) -> None:
    assert len(catalog("select p.oid from FUNCTIONS p")) > 30
    assert len(catalog("select c.oid from RELATIONS c where relkind = 'r'")) >= 6


# Privileges -----------------------------------------------------------------------------------------


def test_public_may_execute_nothing(catalog: Catalog) -> None:
    assert catalog("select p.oid::regprocedure::text from FUNCTIONS p where proacl is null") == []
    granted = "select p.oid::regprocedure::text from FUNCTIONS p, aclexplode(proacl) g where g.grantee = 0"
    assert catalog(granted) == []
    assert (
        catalog("select p.oid from FUNCTIONS p where has_function_privilege('stranger', p.oid, 'execute')")
        == []
    )


def test_only_the_owner_reaches_the_private_schema(catalog: Catalog) -> None:
    for kind in ("usage", "create"):
        # pg_read_all_data and pg_write_all_data see every schema there is: whom a superuser gives them to.
        query = (
            "select rolname from pg_roles where not rolsuper and rolname !~ '^pg_'"
            f" and has_schema_privilege(oid, 'kakunin_private', '{kind}')"
        )
        assert catalog(query) == ["installer"], kind
    others = (
        "select p.oid::regprocedure::text from FUNCTIONS p, aclexplode(proacl) g where g.grantee <> proowner"
    )
    assert catalog(f"{others} and pronamespace = 'kakunin_private'::regnamespace") == []


def test_only_the_owner_has_any_privilege_on_a_table(catalog: Catalog) -> None:
    """But for SELECT on the views that are there to look things up."""
    granted = (
        "select c.relname || ' ' || g.grantee::regrole || ' ' || g.privilege_type"
        " from RELATIONS c, aclexplode(relacl) g where g.grantee <> relowner"
    )
    readers = {"kakunin_auditor", "kakunin_operator", "kakunin_registrar"}
    risk = {"kakunin_agent", "kakunin_gateway", "kakunin_operator", "kakunin_auditor"}
    views = {
        "agents": readers,
        "certificates": readers,
        "authorities": ROLES,
        "crls": ROLES,
        "halts": {*readers, "kakunin_worker"},
        "audit_log": {"kakunin_agent", "kakunin_gateway", "kakunin_auditor"},
        "chains": {"kakunin_auditor"},
        "ledger_keys": ROLES,
        "tree_heads": ROLES,
        "webhook_endpoints": {"kakunin_operator"},
        "webhook_deliveries": {"kakunin_operator"},
        **dict.fromkeys(("risk_by_hour", "risk_by_day", "risk_contributions"), risk),
        "risk_reviews": {"kakunin_auditor", "kakunin_operator"},
        "api_keys": {"kakunin_operator"},
        "agent_descriptions": readers,
        "decision_chains": {"kakunin_gateway", "kakunin_auditor"},
        "decision_chain_events": {"kakunin_auditor"},
        "reports": {"kakunin_auditor"},
    }
    assert set(catalog(granted)) == {f"{view} {role} SELECT" for view in views for role in views[view]}
    columns = "select attname from RELATIONS c join pg_attribute on attrelid = c.oid where attacl is not null"
    assert catalog(columns) == []
    readable = (
        "select relname || ' ' || rolname from RELATIONS c, pg_roles r"
        " where relkind = 'r' and not rolsuper and rolname <> 'installer' and rolname !~ '^pg_'"
        " and has_table_privilege(r.oid, c.oid, 'select,insert,update,delete,truncate,references,trigger')"
    )
    assert catalog(readable) == []


def test_roles_use_the_public_schema_of_the_kit_and_create_nothing_there(catalog: Catalog) -> None:
    acl = "from pg_namespace n, aclexplode(nspacl) g where nspname = 'kakunin' and g.grantee <> nspowner"
    assert sorted(catalog(f"select g.grantee::regrole::text {acl}")) == ROLES
    assert set(catalog(f"select privilege_type {acl}")) == {"USAGE"}
    assert catalog(f"select g.grantee {acl} and is_grantable") == []


def test_nothing_is_granted_with_the_right_to_grant_it_on(catalog: Catalog) -> None:
    query = "select p.oid::regprocedure::text from FUNCTIONS p, aclexplode(proacl) g"
    assert catalog(f"{query} where is_grantable and grantee <> proowner") == []


def test_the_kits_roles_are_plain(catalog: Catalog) -> None:
    names = "rolname like 'kakunin\\_%'"
    assert sorted(catalog(f"select rolname from pg_roles where {names}")) == ROLES
    powers = "rolcanlogin or rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls"
    assert catalog(f"select rolname from pg_roles where {names} and ({powers})") == []
    inherited = (
        "select member::regrole::text from pg_auth_members where member::regrole::text like 'kakunin\\_%'"
    )
    assert catalog(inherited) == []  # none of them is a member of anything


# Owners, extensions, comments -----------------------------------------------------------------------


def test_one_owner_who_is_not_superuser_owns_everything(catalog: Catalog) -> None:
    owners = (
        "select proowner::regrole::text from FUNCTIONS p"
        " union select relowner::regrole::text from RELATIONS c"
        f" union select typowner::regrole::text from pg_type where typnamespace in {SCHEMAS}"
        f" union select nspowner::regrole::text from pg_namespace where oid in {SCHEMAS}"
    )
    assert catalog(owners) == ["installer"]
    attributes = (
        "select (rolsuper or rolbypassrls or rolreplication) from pg_roles where rolname = 'installer'"
    )
    assert catalog(attributes) == [False]


def test_g10_no_extension_is_needed(catalog: Catalog) -> None:
    assert catalog("select extname from pg_extension") == ["plpgsql"]
    needs = "select d.refobjid from pg_depend d where d.refclassid = 'pg_extension'::regclass and d.objid in"
    assert catalog(f"{needs} (select p.oid from FUNCTIONS p union select c.oid from RELATIONS c)") == []
    languages = "select distinct lanname from FUNCTIONS p join pg_language l on l.oid = prolang"
    assert sorted(catalog(languages)) == ["plpgsql", "sql"]


@pytest.mark.parametrize(
    "bare",
    [
        "select p.oid::regprocedure::text from FUNCTIONS p where obj_description(p.oid, 'pg_proc') is null",
        "select relname from RELATIONS c where relkind in ('r', 'p', 'v', 'm', 'S')"
        " and obj_description(c.oid, 'pg_class') is null",
        f"select nspname from pg_namespace where oid in {SCHEMAS}"
        " and obj_description(oid, 'pg_namespace') is null",
        "select rolname from pg_roles where starts_with(rolname, 'kakunin_')"
        " and shobj_description(oid, 'pg_authid') is null",
    ],
    ids=["functions", "relations", "schemas", "roles"],
)
def test_everything_has_a_comment(catalog: Catalog, bare: str) -> None:
    assert catalog(bare) == []


# Functions ------------------------------------------------------------------------------------------


PATH = "search_path=pg_catalog, pg_temp"
# What these set beside the path: DDL that waits for a lock keeps everybody waiting who comes after it.
ALSO_SET = {
    # Planning one of its statements anew takes longer than running them all.
    "kakunin.audit_log_append(text,jsonb,text,timestamp with time zone)": [
        "plan_cache_mode=force_generic_plan"
    ],
    "kakunin.archive_partition(name)": ["lock_timeout=200ms"],
    "kakunin.make_partitions(interval)": ["lock_timeout=200ms"],
    "kakunin.renew_installation()": ["lock_timeout=5s"],
    "kakunin.continue_ledger()": ["lock_timeout=5s"],
    # What a session has set must not show in an entry.
    "kakunin.record_changes()": [
        "DateStyle=ISO, YMD",
        "IntervalStyle=iso_8601",
        "TimeZone=UTC",
        "bytea_output=hex",
        "extra_float_digits=1",
        "quote_all_identifiers=off",
    ],
    "kakunin.record_policy(regclass)": ["quote_all_identifiers=off"],
    # A plan for any transaction id reads the whole ledger.
    "kakunin.seal_ledger(integer)": ["plan_cache_mode=force_custom_plan"],
}


def settings_of(database: Database, functions: str) -> dict[str, list[str]]:
    """What functions set, those that only set the path left out."""
    query = "select p.oid::regprocedure::text, coalesce(proconfig, '{}') from pg_proc p"
    rows = database.run("postgres", f"{query} where pronamespace in {SCHEMAS} and {functions}")
    assert len(rows) >= 15
    return {name: settings for name, settings in rows if settings != [PATH]}


def test_every_security_definer_function_sets_the_path_in_that_order(database: Database) -> None:
    expected = {name: [PATH, *also] for name, also in ALSO_SET.items()}
    assert settings_of(database, "prosecdef") == expected


def test_every_function_others_may_call_sets_the_path(database: Database) -> None:
    """Those that run with the caller's rights too: protect(), unprotect() and normalize_serial()."""
    expected = {name: [PATH, *also] for name, also in ALSO_SET.items()}
    assert settings_of(database, "pronamespace = 'kakunin'::regnamespace") == expected


def test_private_functions_are_not_security_definer(catalog: Catalog) -> None:
    """They run inside one that is; another border to guard would be one too many.

    But for triggers, which nobody can call, nor put on anything else.
    """
    query = "select p.oid::regprocedure::text from FUNCTIONS p where prosecdef"
    private = f"{query} and pronamespace = 'kakunin_private'::regnamespace"
    assert catalog(private) == ["kakunin_private.refuse_change()"]
    assert catalog(f"{private} and prorettype not in ('trigger'::regtype, 'event_trigger'::regtype)") == []


def test_names_in_sql_functions_were_resolved_when_they_were_made(catalog: Catalog) -> None:
    sql = "select p.oid::regprocedure::text from FUNCTIONS p join pg_language l on l.oid = prolang"
    sql += " where lanname = 'sql'"
    assert len(catalog(sql)) >= 5
    assert catalog(f"{sql} and prosqlbody is null") == []


def callers(database: Database, pattern: str) -> set[str]:
    """Functions of the kit whose body, without comments, has this in it."""
    query = (
        "select p.oid::regprocedure::text, coalesce(pg_get_function_sqlbody(oid), prosrc)"
        f" from pg_proc p where pronamespace in {SCHEMAS}"
    )
    rows = database.run("postgres", query)
    flags = re.IGNORECASE | re.DOTALL
    return {name for name, body in rows if re.search(pattern, re.sub("--.*", "", body), flags)}


APPEND = "kakunin_private.append(text,uuid,text,text,text,uuid)"
AUDIT_LOG_APPEND = "kakunin.audit_log_append(text,jsonb,text,timestamp with time zone)"
WRITE = "kakunin_private.write_entry(kakunin_private.chains,uuid,text,uuid,text,text,text,jsonb)"


def test_nothing_notifies_but_an_entry_of_an_agent_and_a_revocation(database: Database) -> None:
    """One lock for the whole cluster, which any login can hold up, and a queue that any login can fill.

    So none is made where the queue is half full: where it is full NOTIFY fails, and the transaction with it.
    """
    assert callers(database, "perform ")
    notifying = {"kakunin_private.wake_worker()", "kakunin_private.notify_revocation(uuid[])"}
    assert callers(database, r"\bpg_notify\b|\bnotify (?!a human)") == notifying
    assert callers(database, r"if kakunin_private\.may_notify\(\) then\s.*\bpg_notify\b") == notifying
    assert callers(database, r"\bpg_notify\b.*\bpg_notify\b") == set()
    assert callers(database, "wake_worker") == {APPEND, AUDIT_LOG_APPEND}
    assert callers(database, r"kakunin_private\.append\b") == {
        "kakunin.record_changes()",
        "kakunin_private.record(text,uuid,jsonb)",
        "kakunin_private.refused(boolean,uuid,text,text,text,text)",
    }
    [(append, record)] = database.run(
        "postgres",
        "select (select prosrc from pg_proc where oid = 'kakunin_private.append'::regproc),"
        " (select prosrc from pg_proc where oid = 'kakunin_private.record'::regproc)",
    )
    # What is decided goes to the chains of nobody, and those wake nobody.
    nobody = "'00000000-0000-0000-0000-000000000000'"
    assert "if v_taken.asleep and p_serial is not null then" in append
    assert append.count("wake_worker") == 1
    assert record.count("kakunin_private.append(") == 1
    assert nobody in record
    # And no function takes its own way to the table.
    assert callers(database, r"insert into kakunin_private\.ledger\b") == {WRITE}
    assert callers(database, r"kakunin_private\.write_entry\b") == {APPEND, AUDIT_LOG_APPEND}


def test_no_decision_notifies_and_an_agents_entry_does(cluster: Any) -> None:
    """The same, seen from outside: with the worker asleep, and somebody who listens."""
    with fresh_database(cluster) as database, database.connect("worker", autocommit=True) as worker:
        agent, other = database.agent(), database.agent()
        key = database.ledger_key()
        database.run("app", "create table changed (permitted_agent_serial text)")
        database.run("app", "select kakunin.protect('changed', audit => true)")
        ticket = database.ticket(agent, "agent_1")
        worker.execute("listen kakunin_ledger")
        worker.execute("select kakunin.sleep_ledger()")
        authority = CertificateAuthority.create(LocalSigner.generate(), "another")
        overlap = "select kakunin.register_certificate(%s, '1 hour')"
        der = _ca().issue(other.agent_id, LocalSigner.generate().public_key()).der
        halt = "select kakunin.halt_agent(%s, 'why', true) ->> 'halt_id'"
        decisions: list[tuple[str, str, list[Any]]] = [
            ("app", "insert into changed values (null)", []),
            ("app", "select kakunin.unprotect('changed')", []),
            ("registrar", overlap, [der]),
            ("operator", "select kakunin.suspend_agent(%s, 'why')", [agent.agent_id]),
            ("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id]),
            ("operator", "select kakunin.revoke_certificate(%s)", [other.serial]),
            ("operator", halt, [other.agent_id]),
            ("operator", "select kakunin.rotate_session_key()", []),
            ("operator", "select kakunin.trust_ca(%s)", [authority.der]),
            ("operator", "select kakunin.distrust_ca(%s, 'cACompromise')", [authority.key_id]),
            ("operator", "select kakunin.revoke_ledger_key(%s)", [key.key_id]),
            ("registrar", "select kakunin.update_agent(%s, 'renamed')", [agent.agent_id]),
            ("installer", "select kakunin.set_gateway_logins('{}')", []),
            ("auditor", "select kakunin.record_read('export')", []),
        ]
        for login, query, parameters in decisions:
            database.run(login, query, parameters)
        assert database.value("postgres", "select asleep from kakunin_private.sleeper")
        assert list(worker.notifies(timeout=0)) == []
        # The session key was rotated with a grace, so the ticket is still good.
        with database.connect("agent_1") as session:
            session.execute("select kakunin.bind_session(%s)", [ticket])
            session.execute("select kakunin.audit_log_append('x'), kakunin.audit_log_append('y')")
            session.commit()
        worker.execute("select 1")
        assert [(n.channel, n.payload) for n in worker.notifies(timeout=5, stop_after=1)] == [
            ("kakunin_ledger", "")
        ]
        assert list(worker.notifies(timeout=0)) == []
        assert not database.value("postgres", "select asleep from kakunin_private.sleeper")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (ASKED_BY_POLICIES, "stable, restricted"),
        # These raise, so they must not be planned away; but they leave parallel plans possible too.
        (RAISED_BY_POLICIES, "volatile, restricted"),
    ],
)
def test_functions_that_policies_call_are_marked(catalog: Catalog, names: list[str], kind: str) -> None:
    query = (
        "select case provolatile when 's' then 'stable' when 'v' then 'volatile' end || ', ' ||"
        " case proparallel when 'r' then 'restricted' end from FUNCTIONS p where proname = "
    )
    assert {name: catalog(f"{query} '{name}'") for name in names} == {name: [kind] for name in names}


def test_nothing_that_policies_call_is_parallel_unsafe(database: Database) -> None:
    rows = database.run(
        "postgres",
        "select pronamespace::regnamespace || '.' || proname, proparallel,"
        " coalesce(pg_get_function_sqlbody(oid), prosrc)"
        f" from pg_proc where pronamespace in {SCHEMAS}",
    )
    strings_and_comments = re.compile("--.*|'[^']*'")
    kit = {name: (parallel, strings_and_comments.sub("", body)) for name, parallel, body in rows}
    reached: set[str] = set()
    ahead = [f"kakunin.{name}" for name in ASKED_BY_POLICIES + RAISED_BY_POLICIES]
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += set(re.findall(r"\bkakunin(?:_private)?\.\w+(?=\()", kit[name][1])) & kit.keys()
    assert {"kakunin_private.bound_serial", "kakunin_private.session_mac", "kakunin_private.clock"} <= reached
    assert [name for name in reached if kit[name][0] == "u"] == []
    # Before 17, a parallel plan has no subtransactions.
    assert [name for name in reached if re.search(r"^\s*exception\s*$", kit[name][1], re.MULTILINE)] == []


def test_a_protected_table_is_still_read_in_parallel(vault: Vault) -> None:
    read = "select count(*) from vault"
    ticket = vault.database.ticket(vault.one, "agent_1")
    with vault.database.connect("agent_1") as session:
        for setting in ("parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size"):
            session.execute(f"set {setting} = 0")
        for setting in ("enable_indexscan", "enable_indexonlyscan", "enable_bitmapscan"):
            session.execute(f"set {setting} = off")
        session.execute("select kakunin.bind_session(%s)", [ticket])
        plan = "\n".join(row[0] for row in session.execute(f"explain (costs off) {read}"))
        assert "Gather" in plan
        assert session.execute(read).fetchone() == (2,)


def test_plpgsql_check_finds_nothing(cluster: Any) -> None:
    with fresh_database(cluster) as database:
        if not database.value(
            "postgres", "select count(*) from pg_available_extensions where name = 'plpgsql_check'"
        ):
            pytest.skip("plpgsql_check is not installed for this server")
        database.run("postgres", "create extension plpgsql_check")
        # What checks a trigger's function needs a table it is on.
        database.run("app", "create table checked (permitted_agent_serial text)")
        database.run("app", "select kakunin.protect('checked', audit => true)")
        found = database.run(
            "postgres",
            f"""
            select p.oid::regprocedure::text, f.*
              from pg_proc p
              join pg_language l on l.oid = p.prolang
              left join pg_trigger t on t.tgfoid = p.oid and not t.tgisinternal
              cross join lateral plpgsql_check_function_tb(
                p.oid, coalesce(t.tgrelid, 0),
                newtable => case p.proname when 'record_changes' then 'kakunin_rows' end,
                fatal_errors => false, extra_warnings => true, performance_warnings => true,
                -- protect(), unprotect() and audit_changes() build statements from names that %I, %L or
                -- regclass has quoted one step earlier, in a variable, where the checker cannot see it.
                security_warnings => p.proname not in ('protect', 'unprotect', 'audit_changes')) f
             where p.pronamespace in {SCHEMAS} and l.lanname = 'plpgsql'
            """,
        )
        assert found == []


# A hostile caller -----------------------------------------------------------------------------------

# Types, tables and views whose names a function of the kit uses.
SHADOWED_TYPES = [
    "jsonb", "json", "text", "bytea", "uuid", "numeric", "int4", "int8", "bool", "timestamptz", "interval",
    "name", "regclass", "bit", "float8", "record", "xid8", "pg_snapshot", "int8range", "int8multirange",
]  # fmt: skip
SHADOWED_TABLES = [
    "pg_roles", "pg_class", "pg_policy", "pg_inherits", "pg_attribute", "pg_type", "pg_index", "agents",
    "certificates", "session_keys", "installation", "gateway_logins", "used_assertions", "pg_trigger",
    "ledger", "chains", "sleeper", "partitions", "tree", "tree_nodes", "tree_heads", "ledger_keys", "batches",
    "leader", "exports", "kakunin_rows", "webhook_endpoints", "webhook_messages", "webhook_deliveries",
    "expirations", "expiry_sweep", "risk_settings", "risk_hours", "risk_known", "risk_reviews", "risk_stops",
    "api_keys", "agent_descriptions", "decision_chains", "decision_chain_events", "reports",
    "spending", "baseline", "bound", "taken", "assessed",
]  # fmt: skip
# Exact signatures beat the variadic and polymorphic functions of pg_catalog wherever both are in the path.
EXACT = [
    "format(text, text)", "format(text, text, text)", "format(text, uuid)", "format(text, integer)",
    "format(text, text, integer)", "format(text, regclass)", "jsonb_build_object(text, text)",
    "jsonb_build_array(text)", "to_jsonb(text)", "cardinality(text[])", "array_ndims(text[])",
    "unnest(text[])", "quote_ident(name)", "to_json(text)", "concat(text)", "format(text, name, name)",
    "format(text, bigint)", "jsonb_build_object(text, bigint)", "jsonb_build_object(text, uuid)",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(cluster: Any) -> Iterator[Database]:
    """A database in which a schema `evil` has a look-alike of whatever the kit calls, each of them an alarm.

    An alarm counts itself in a sequence, which no rollback undoes, and raises.
    """
    with fresh_database(cluster) as database, database.connect("postgres", autocommit=True) as admin:
        admin.execute("create schema evil authorization agent_1")
        admin.execute("grant usage on schema evil to public")
        with database.connect("agent_1", autocommit=True) as agent:
            agent.execute("create sequence evil.alarms")
            agent.execute("grant usage, select on sequence evil.alarms to public")
            make_alarms(agent)
        database.run("app", "create table public.shadowed (permitted_agent_serial text primary key)")
        database.seal_and_sign(database.ledger_key())
        yield database


def make_alarms(agent: psycopg.Connection[Any]) -> None:
    body = (
        "language plpgsql as $alarm$ begin perform pg_catalog.nextval('evil.alarms');"
        " raise exception 'an alarm ran as %', current_user; end $alarm$"
    )
    # Every function of pg_catalog whose name occurs in the kit, and every operator on the types it uses.
    source = agent.execute(
        f"select string_agg(prosrc, ' ') from pg_proc where pronamespace in {SCHEMAS}"
    ).fetchone()
    assert source is not None
    words = sorted({*re.findall(r"[a-z_0-9]+(?=\()", source[0]), "clock_timestamp", "transaction_timestamp"})
    functions = agent.execute(
        "select quote_ident(proname) || '(' || pg_get_function_identity_arguments(oid) || ')',"
        "       pg_get_function_result(oid)"
        "  from pg_proc where pronamespace = 'pg_catalog'::regnamespace and proname = any (%s)"
        "   and prokind = 'f' and provariadic = 0"
        "   and prorettype <> all (array['internal', 'cstring', 'record', 'void']::regtype[])"
        "   and not proargtypes::oid[] && array['internal', 'cstring', '\"any\"']::regtype[]::oid[]",
        [words],
    ).fetchall()
    operators = agent.execute(
        "select oprname, oprleft::regtype::text, oprright::regtype::text, oprresult::regtype::text"
        " from pg_operator where oprnamespace = 'pg_catalog'::regnamespace and oprleft <> 0"
        " and oprleft = any (%(types)s::regtype[]) and oprright = any (%(types)s::regtype[])",
        {"types": ["text", "name", "bytea", "numeric", "integer", "bigint", "jsonb", "json", "boolean",
                   "uuid", "oid", "timestamptz", "interval", "text[]", "float8"]},
    ).fetchall()  # fmt: skip
    made = 0
    with agent.transaction():
        for signature, result in [*functions, *((exact, "text") for exact in EXACT)]:
            with contextlib.suppress(psycopg.Error), agent.transaction():
                agent.execute(f"create function evil.{signature} returns {result} {body}")
                made += 1
        for number, (symbol, left, right, result) in enumerate(operators):
            agent.execute(f"create function evil.alarm_{number}({left}, {right}) returns {result} {body}")
            agent.execute(
                f"create operator evil.{symbol}"
                f" (leftarg = {left}, rightarg = {right}, function = evil.alarm_{number})"
            )
        for name in SHADOWED_TYPES + SHADOWED_TABLES:
            agent.execute(f'create table evil."{name}" (evil int)')
        # Casts by assignment and by implication, from types the kit uses.
        agent.execute("create type evil.trap as (x int)")
        for source_type in ("text", "bytea", "jsonb", "uuid", "numeric"):
            agent.execute(f"create function evil.cast_{source_type}({source_type}) returns evil.trap {body}")
            agent.execute(
                f"create cast ({source_type} as evil.trap)"
                f" with function evil.cast_{source_type}({source_type}) as implicit"
            )
    assert made > 40
    assert len(operators) > 150


def poison(session: psycopg.Connection[Any], path: str) -> None:
    """Temporary look-alikes in this session, and its search path."""
    for name in SHADOWED_TYPES + SHADOWED_TABLES:
        session.execute(f'create temp table "{name}" (evil pg_catalog.int4)')
    session.execute(f"set search_path = {path}")


def alarms(database: Database) -> int:
    return database.value(
        "postgres", "select case when is_called then last_value else 0 end from evil.alarms"
    )


Calls = list[tuple[str, list[Any]]]
VOLATILE_RESULT = re.compile(r"^kkn1\.\d+\.([0-9A-F:]+)\..*$")


RISK = " operator(pg_catalog.-) '{event_id,recorded_at,sequence,chain,hash,prev}'::pg_catalog.text[]"
TRADE = (
    '{"amount_usd": 12.5, "venue": "XLON", "instrument": "GILT", "leverage": 2, "tool": "t", "table": "u"}'
)


def agents_calls(agent: Agent, ticket: str) -> Calls:
    return [
        ("select kakunin.installation_id()", []),
        ("select kakunin.normalize_serial('3af291cc')", []),
        ("select kakunin.open_session(%s)", [agent.assertion()]),
        ("select kakunin.open_session(%s)", [agent.assertion()[:-4] + "AAAA"]),
        ("select kakunin.open_session('x.y.z')", []),
        ("select kakunin.current_cert_serial()", []),
        ("select kakunin.bind_session(%s)", [ticket]),
        ("select kakunin.bind_session(%s)", [ticket[:-1] + ("0" if ticket[-1] != "0" else "1")]),
        ("select kakunin.current_cert_serial()", []),
        ("select kakunin.current_agent_id()", []),
        (
            "select kakunin.has_scope('orders:write'), kakunin.has_scope('other'),"
            " kakunin.has_scope('orders')",
            [],
        ),
        ("select kakunin.require_session()", []),
        ("select kakunin.require_scope('orders:write')", []),
        ("select kakunin.require_scope('vault:write')", []),
        ("select pg_catalog.jsonb_typeof(kakunin.audit_log_append('x', '{\"a\": 1}', 's'))", []),
        ("select kakunin.audit_log_append('transaction_initiated', %s)" + RISK, [TRADE]),
        ("select kakunin.audit_log_append('api_call', '{\"rows\": \"x\"}')" + RISK, []),
        ("select kakunin.check_risk_score()", []),
        ("select kakunin.verify_agent_scope('orders:write', 5, 'XLON', 'GILT', 2)", []),
        ("select kakunin.verify_agent_scope('vault:write', 1e30)", []),
        ("select kakunin.require_spend(5, 'XLON', 'GILT', 2)", []),
        ("select kakunin.require_spend(-5)", []),
        ("select kakunin.require_spend(-5, observe => true)", []),
        ("select kakunin.require_risk_below('high')", []),
        ("select kakunin.require_risk_below('lower')", []),
        (
            "select event_type, events, late, imported, amount_usd, events_30_days"
            " from kakunin.risk_by_hour order by 1",
            [],
        ),
        ("select events, excess_30_days, trend from kakunin.risk_by_day order by 1", []),
        (
            "select event_type, events, excess, contribution from kakunin.risk_contributions order by 1",
            [],
        ),
        ("select kakunin.risk_window() is null", []),
        (
            "select event_type, agent_id, serial, session_id, metadata, risk from kakunin.audit_log"
            " order by event_id",
            [],
        ),
        ("select kakunin.inclusion_proof(1)", []),
        ("select tree_size, root from kakunin.tree_heads", []),
        ("select key_id from kakunin.ledger_keys", []),
        ("select kakunin.unbind_session()", []),
        ("select kakunin.current_cert_serial()", []),
        ("select kakunin.require_session()", []),
        ("select kakunin.audit_log_append('x')", []),
        ("select kakunin.inclusion_proof(1)", []),
    ]


@functools.cache
def ledger_signer() -> LocalSigner:
    return LocalSigner.generate()


IMPORTED = '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": "x", "metadata": {"amount_usd": 5}}]'


def servers_calls(login: str, agent: Agent) -> Calls:
    """What the other roles may call, with what changes the agent undone again."""
    authority = _ca()
    issued = authority.issue(
        agent.agent_id,
        agent.signer.public_key(),
        permitted_actions=["a:*"],
        financial_scope={"daily_limit_usd": 1},
    )
    register = "select pg_catalog.length(kakunin.register_certificate(%s, '1 hour'))"
    signature = agent.signer.sign(hashlib.sha256(b"payload").digest())
    key_id = authority.key_id
    crl = authority.revocation_list([], 1).public_bytes(serialization.Encoding.DER)
    halt = "select pg_catalog.jsonb_typeof(kakunin.halt_agent(%s, 'why', true))"
    model_hash = "sha256:" + "0" * 64
    database = agent.database
    size = database.value("worker", "select tree_size from kakunin.tree_heads")
    ledger_key = authority.issue_ledger_key(database.installation_id, ledger_signer().public_key())
    ledger_der = ledger_key.public_bytes(serialization.Encoding.DER)
    hook, secret = agent.agent_id, bytes(60)
    key = (
        "select kakunin.create_api_key(%s, pg_catalog.sha256('x'), 'k', '{agents:read}', %s,"
        " pg_catalog.now() operator(pg_catalog.+) %s::pg_catalog.interval) is null"
    )
    in_chain = "select {} from kakunin.decision_chains where name operator(pg_catalog.=) 'x'"
    return {
        "gateway": [
            ("select kakunin.bind_serial(%s)", [agent.serial]),
            ("select kakunin.current_cert_serial()", []),
            ("select kakunin.bind_serial('01:02')", []),
            ("select kakunin.pre_request()", []),
            ("select kakunin.authenticate_api_key('0123456789abcdef', 'x') is null", []),
            ("select kakunin.note_api_keys(%s)", [[agent.agent_id]]),
            ("select kakunin.open_decision_chain('x', 'y', '{\"a\": 1}') is null", []),
            ("select kakunin.open_decision_chain('')", []),
            ("select kakunin.append_to_decision_chain(%s, 'x', '{}', 's')", [agent.agent_id]),
            (in_chain.format("kakunin.append_to_decision_chain(chain_id, 'x', '{}', 's') is null"), []),
            (in_chain.format("pg_catalog.length(kakunin.close_decision_chain(chain_id))"), []),
            ("select kakunin.close_decision_chain(%s)", [agent.agent_id]),
            ("select kakunin.verify_decision_chain(%s)", [agent.agent_id]),
            (
                "select kakunin.verify_decision_chain(chain_id)"
                " operator(pg_catalog.-) '{chain_id,created_at,closed_at,chain_hash}'::pg_catalog.text[]"
                " from kakunin.decision_chains",
                [],
            ),
        ],
        "registrar": [
            ("select kakunin.verify_certificate(%s)", [agent.serial]),
            ("select pg_catalog.length(kakunin.certificate_der(%s))", [agent.serial]),
            ("select kakunin.certificate_der('01:02')", []),
            ("select kakunin.verify_message(%s, 'payload', %s)", [agent.serial, signature]),
            ("select kakunin.create_agent('x', 't') is null", []),
            ("select kakunin.create_agent('')", []),
            (register, [issued.der]),
            (register, [issued.der]),
            (register, [issued.der[:-1]]),
            ("select kakunin.crls_due()", []),
            ("select kakunin.revocations(%s) is null", [key_id]),
            ("select kakunin.describe_agent(%s, '{\"scopes\": [\"a:b\"]}', '{}')", [agent.agent_id]),
            ("select kakunin.describe_agent(%s, '[]')", [agent.agent_id]),
            ("select metadata from kakunin.agent_descriptions", []),
            ("select kakunin.publish_crl(%s)", [crl]),
            ("select kakunin.sign_halt(%s, %s, %s)", [agent.agent_id, key_id, signature]),
            ("select kakunin.update_agent(%s, model => 'm', model_hash => %s)", [agent.agent_id, model_hash]),
        ],
        "operator": [
            ("select kakunin.suspend_agent(%s, 'why')", [agent.agent_id]),
            ("select kakunin.reinstate_agent(%s)", [agent.agent_id]),
            ("select kakunin.rotate_session_key()", []),
            ("select kakunin.set_replica_lag('1 minute')", []),
            ("select kakunin.revoke_certificate('01:02')", []),
            ("select kakunin.trust_ca(%s)", [authority.der]),
            ("select kakunin.trust_ca(%s)", [issued.der]),
            (halt, [agent.agent_id]),
            ("select pg_catalog.cardinality(kakunin.distrust_ca(%s, 'cACompromise')) is null", [key_id]),
            ("select kakunin.revoke_certificate(%s, 'superseded') is null", [agent.serial]),
            ("select kakunin.register_ledger_key(%s)", [issued.der]),
            ("select kakunin.register_ledger_key(%s)", [ledger_der]),
            ("select kakunin.revoke_ledger_key('00')", []),
            ("select pg_catalog.jsonb_typeof(kakunin.ledger_status())", []),
            ("select pg_catalog.jsonb_typeof(kakunin.ledger_home())", []),
            ("select kakunin.make_partitions('4 months')", []),
            ("select kakunin.archive_partition('ledger_200001')", []),
            (key, ["0123456789abcdef", hook, "1 hour"]),
            (key, ["0123456789abcdef", hook, "1 hour"]),
            (key, ["0123456789abcde0", None, "-1 hour"]),
            (key, ["x", None, None]),
            ("select kakunin.revoke_api_key(key_id) is null from kakunin.api_keys", []),
            ("select kakunin.revoke_api_key(%s)", [hook]),
            ("select kakunin.add_webhook(%s, 'https://a.test/x?y', '{agent.created}', %s)", [hook, secret]),
            ("select kakunin.add_webhook(%s, 'ftp://a.test', '{agent.created}', %s)", [hook, secret]),
            ("select kakunin.rotate_webhook(%s, %s, '1 hour')", [hook, secret]),
            ("select kakunin.test_webhook(%s) is null", [hook]),
            ("select kakunin.replay_webhooks(endpoint_id => %s)", [hook]),
            ("select kakunin.enable_webhook(%s, false)", [hook]),
            ("select endpoint_id, pending from kakunin.webhook_endpoints", []),
            ("select endpoint_id, state from kakunin.webhook_deliveries", []),
            ("select pg_catalog.jsonb_typeof(kakunin.webhook_status())", []),
            ("select kakunin.remove_webhook(%s)", [hook]),
            ("select kakunin.import_events(%s, %s)", [agent.agent_id, IMPORTED]),
            ("select kakunin.import_events(%s, '[{}]')", [agent.agent_id]),
            ("select kakunin.agent_risk(%s)", [agent.agent_id]),
            ("select kakunin.set_risk('{\"half_life\": \"12 hours\", \"base\": {\"other\": 0.5}}')", []),
            ("select kakunin.set_risk('{\"high\": 2}')", []),
            ("select kakunin.set_agent_risk(%s, 'why', true, 2)", [agent.agent_id]),
            ("select kakunin.review_risk(0, 'seen')", []),
            ("select kakunin.settle_risk()", []),
            ("select * from kakunin.risk_reviews", []),
            ("select pg_catalog.count(*) from kakunin.risk_contributions", []),
        ],
        "worker": [
            ("select kakunin.expire_certificates(10)", []),
            ("select pg_catalog.count(*) from kakunin.claim_webhooks()", []),
            ("select kakunin.report_webhook('m', %s, 1, 200)", [agent.agent_id]),
            ("select kakunin.clean_webhooks()", []),
            ("select kakunin.lead_ledger(%s, 'w')", [agent.agent_id]),
            ("select kakunin.seal_ledger(2)", []),
            ("select kakunin.seal_ledger()", []),
            ("select tree_size, root from kakunin.tree_head_to_sign()", []),
            ("select kakunin.publish_tree_head(%s, 0, %s, %s)", [size, key_id, signature]),
            ("select kakunin.publish_tree_head(1, 0, %s, %s)", [key_id, signature]),
            ("select kakunin.sleep_ledger()", []),
            ("select kakunin.settle_risk()", []),
            ("select pg_catalog.jsonb_typeof(kakunin.ledger_status())", []),
            ("select pg_catalog.jsonb_typeof(kakunin.ledger_home())", []),
            ("select kakunin.make_partitions('4 months')", []),
        ],
        "auditor": [
            (
                "select event_type, agent_id, chain, hash, metadata from kakunin.audit_log"
                " where event_id operator(pg_catalog.=) 1",
                [],
            ),
            ("select chain, head from kakunin.chains", []),
            ("select kakunin.current_agent_id()", []),
            ("select kakunin.agent_risk(%s)", [agent.agent_id]),
            ("select pg_catalog.jsonb_typeof(kakunin.webhook_status())", []),
            ("select kakunin.inclusion_proof(1)", []),
            ("select kakunin.inclusion_proof(1, %s)", [size]),
            ("select kakunin.inclusion_proof(null)", []),
            ("select kakunin.consistency_proof(%s, %s)", [size, size]),
            ("select kakunin.frontier(%s)", [size]),
            ("select * from kakunin.ledger_leaves(0, 3)", []),
            ("select pg_catalog.count(*) from kakunin.unsealed_entries()", []),
            ("select pg_catalog.count(*) from kakunin.stray_entries()", []),
            ("select kakunin.create_report(%s, 30, 'n', '{iso_27001}') is null", [agent.agent_id]),
            ("select kakunin.create_report(%s, 0)", [agent.agent_id]),
            ("select kakunin.verify_decision_chain(%s)", [agent.agent_id]),
            ("select pg_catalog.count(*) from kakunin.reports", []),
            ("select kakunin.record_read('export')", []),
            ("select kakunin.record_export(%s, 0, %s)", [size, "0" * 64]),
        ],
        "app": [
            ("select kakunin.protect('public.shadowed', write_scope => 'a:b')", []),
            ("select kakunin.protect('public.shadowed', audit_keys => true)", []),
            ("insert into public.shadowed values ('a') returning permitted_agent_serial", []),
            ("update public.shadowed set permitted_agent_serial = 'b' returning permitted_agent_serial", []),
            ("delete from public.shadowed returning permitted_agent_serial", []),
            ("select kakunin.record_changes()", []),
            ("select kakunin.audit_changes('public.shadowed', true, true)", []),
            ("select kakunin.record_policy('public.shadowed')", []),
            ("select kakunin.unprotect('public.shadowed')", []),
            ("select kakunin.protect('public.shadowed', 'none')", []),
        ],
        "installer": [
            ("select kakunin.set_gateway_logins('{authenticator}')", []),
            ("select kakunin.set_gateway_logins('{authenticator}', '{authenticator}')", []),
            ("select kakunin.set_gateway_logins('{nobody_at_all}')", []),
            ("select kakunin.set_gateway_logins('{}')", []),
            ("select kakunin.renew_installation() is null", []),
            ("select pg_catalog.jsonb_typeof(kakunin.continue_ledger())", []),
        ],
    }[login]  # fmt: skip


def answers(session: psycopg.Connection[Any], calls: Calls) -> list[Any]:
    """What each call gives: its rows or its SQLSTATE and message. A ticket stands for its serial alone."""

    def steady(value: Any) -> Any:
        return VOLATILE_RESULT.sub(r"ticket \1", value) if isinstance(value, str) else value

    given: list[Any] = []
    with session.transaction(force_rollback=True):
        for query, parameters in calls:
            try:
                with session.transaction():
                    rows = session.execute(query, parameters).fetchall()
                given.append([tuple(steady(value) for value in row) for row in rows])
            except psycopg.Error as error:
                given.append((error.sqlstate, error.diag.message_primary))
    return given


SERVERS = ["gateway", "registrar", "operator", "worker", "auditor", "app", "installer"]
PATHS = ["evil, pg_temp, pg_catalog", "pg_temp, evil, pg_catalog", "evil", "pg_catalog, evil, pg_temp", "''"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("login", ["agent_1", *SERVERS])
def test_g2_look_alikes_in_the_callers_path_change_nothing(hostile: Database, login: str, path: str) -> None:
    agent = hostile.agent("shadowed", permitted_actions=["vault:read", "orders:*"])
    ticket = hostile.ticket(agent, "agent_1")

    fixed = [] if login == "agent_1" else servers_calls(login, agent)

    def calls() -> Calls:
        return fixed or agents_calls(agent, ticket)  # an assertion serves once

    with hostile.connect(login, autocommit=True) as clean:
        expected = answers(clean, calls())
    with hostile.connect(login, autocommit=True) as session:
        poison(session, path)
        before = alarms(hostile)
        assert answers(session, calls()) == expected
        assert alarms(hostile) == before


def test_the_alarms_ring(hostile: Database) -> None:
    """So that silence above means something: a function of the owner's without a fixed path does run one."""
    with hostile.connect("installer") as installer:
        installer.execute(
            "create function public.careless(text) returns text language plpgsql security definer"
            " as $$ begin return left($1, 1); end $$"
        )
    with hostile.connect("agent_1", autocommit=True) as session:
        poison(session, "evil, pg_temp, pg_catalog")
        before = alarms(hostile)
        with pytest.raises(psycopg.Error, match="an alarm ran as installer"):
            session.execute("select public.careless('abc')")
        assert alarms(hostile) > before
        with pytest.raises(psycopg.Error):
            session.execute("select 'a' || 'b'::pg_catalog.text")


def test_the_hostile_calls_cover_every_function_others_may_call(hostile: Database) -> None:
    agent = hostile.agent()
    calls = agents_calls(agent, "x")
    for login in SERVERS:
        calls += servers_calls(login, agent)
    called = {name for query, _ in calls for name in re.findall(r"kakunin\.(\w+)\(", query)}
    names = "select proname from pg_proc where pronamespace = 'kakunin'::regnamespace"
    assert called == {name for (name,) in hostile.run("postgres", names)}


SETTINGS = {
    "bytea_output": "escape",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Pacific/Kiritimati",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "backslash_quote": "on",
    "escape_string_warning": "off",
    "standard_conforming_strings": "off",
    "quote_all_identifiers": "on",
    "row_security": "off",
    "xmloption": "document",
    "plan_cache_mode": "force_generic_plan",
    "plpgsql.extra_errors": "all",
    "lc_numeric": "C",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "check_function_bodies": "off",
    "from_collapse_limit": "1",
    "enable_indexscan": "off",
    "enable_seqscan": "off",
    "jit": "on",
}


@pytest.mark.parametrize(("setting", "value"), SETTINGS.items())
def test_no_setting_an_agent_may_change_changes_an_answer(vault: Vault, setting: str, value: str) -> None:
    ticket = vault.database.ticket(vault.one, "agent_1")
    with vault.database.connect("agent_1", autocommit=True) as session:
        expected = answers(session, agents_calls(vault.one, ticket))
        session.execute("select set_config(%s, %s, false)", [setting, value])
    with vault.database.connect("agent_1", autocommit=True) as session:  # where nothing is compiled yet
        session.execute("select set_config(%s, %s, false)", [setting, value])
        calls = agents_calls(vault.one, ticket)
        found = answers(session, calls)
    if setting == "default_transaction_isolation":  # it refuses what it cannot know
        asked = [query for query, _ in calls].index("select kakunin.require_risk_below('high')")
        assert found[asked][0] == "KA010"
        found[asked] = expected[asked]
    assert found == expected


def test_no_body_has_a_backslash_whose_meaning_is_the_callers(catalog: Catalog) -> None:
    """Outside E'...', standard_conforming_strings decides what it means, and the caller sets that."""
    bodies = catalog("select p.proname || ': ' || prosrc from FUNCTIONS p")
    outside = [re.sub("--.*|\\bE'[^']*'", "", body) for body in bodies]
    assert [body.partition(":")[0] for body in outside if "\\" in body] == []


@pytest.fixture
def all_equal(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """An agent's session with a collation of its own making, by which all serials are equal."""
    with database.connect("agent_1", autocommit=True) as session:
        # Before 16, a collation cannot have rules of its own; what remains ignores only letter case.
        rules = ", rules = '&0=1=2=3=4=5=6=7=8=9=A=B=C=D=E=F'" if database.cluster.major >= 16 else ""
        try:
            session.execute(
                "create collation pg_temp.all_equal"
                f" (provider = icu, locale = 'und-u-ks-level1', deterministic = false{rules})"
            )
        except psycopg.errors.FeatureNotSupported:
            pytest.skip("this server was built without ICU")
        yield session


def test_g2_the_callers_collation_does_not_choose_another_certificate(
    database: Database, all_equal: psycopg.Connection[Any]
) -> None:
    agents = [database.agent(name) for name in ("first", "middle", "last")]
    for agent in agents:
        ticket = database.ticket(agent, "agent_1")
        for query, parameter in {
            "select kakunin.bind_session(%s collate pg_temp.all_equal)": ticket,
            "select kakunin.open_session(%s collate pg_temp.all_equal)": agent.assertion(),
        }.items():
            with all_equal.transaction(force_rollback=True):
                with contextlib.suppress(psycopg.Error), all_equal.transaction():
                    row = all_equal.execute(query, [parameter]).fetchone()
                    assert row is not None
                    assert agent.serial in row[0]
                bound = all_equal.execute("select kakunin.current_cert_serial()").fetchone()
                assert bound in [(agent.serial,), (None,)]


def test_g3_the_callers_collation_does_not_pass_a_revoked_certificate_as_a_good_one(
    database: Database, all_equal: psycopg.Connection[Any]
) -> None:
    database.agent("good")
    revoked = database.agent("revoked")
    ticket = database.ticket(revoked, "agent_1")
    revoked.revoke()
    for query, parameter in {
        "select kakunin.bind_session(%s collate pg_temp.all_equal)": ticket,
        "select kakunin.open_session(%s collate pg_temp.all_equal)": revoked.assertion(),
    }.items():
        with pytest.raises(psycopg.Error):
            all_equal.execute(query, [parameter])
