"""Attacks on the ledger, as the logins that would make them, with any SQL they like."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from conftest import Agent, Database, Vault, fresh_database, refused, start_cluster

from kakunin_db import bind_agent_session
from kakunin_db.errors import named


@pytest.fixture
def audited(vault: Vault) -> Vault:
    vault.database.run("app", "select kakunin.protect('vault', audit => true)")
    return vault


def entries(database: Database, kind: str) -> list[dict[str, Any]]:
    query = "select entry from kakunin.audit_log where event_type = %s order by event_id"
    return [json.loads(row[0]) for row in database.run("auditor", query, [kind])]


def test_g5_many_at_once_fork_no_chain(cluster: Any) -> None:
    """Whoever continues a chain continues its newest entry, also one newer than the snapshot."""
    with fresh_database(cluster) as database:
        agent = database.agent()
        ready = threading.Barrier(6)

        def write() -> None:
            with database.connect("agent_1", autocommit=True) as session:
                ready.wait()
                for _ in range(60):
                    with bind_agent_session(session, agent.credential):
                        session.execute("select kakunin.audit_log_append('api_call')")

        writers = [threading.Thread(target=write) for _ in range(6)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        made = entries(database, "api_call")
        assert len(made) == 360
        assert set(Counter((e["chain"], e["sequence"]) for e in made).values()) == {1}
        by_place = {(e["chain"], e["sequence"]): e for e in made}
        for (chain, sequence), entry in by_place.items():
            if sequence > 1:
                assert by_place[chain, sequence - 1]["event_id"] < entry["event_id"]
        assert database.value("postgres", "select count(*) from kakunin_private.chains") <= 8


@pytest.mark.parametrize(
    "unbind",
    [
        "set_config('kakunin.session', '', false)",
        "(select kakunin.unbind_session())::text",
    ],
)
def test_g6_an_agent_cannot_change_an_audited_table_as_nobody(audited: Vault, unbind: str) -> None:
    database = audited.database
    before = database.run("app", "select * from vault order by id")
    with database.connect("agent_1") as session:
        with bind_agent_session(session, audited.one.credential), pytest.raises(psycopg.Error) as caught:
            session.execute(f"update vault set content = 'mine' returning {unbind}".encode())
        session.rollback()
    error = named(caught.value) or caught.value
    assert error.sqlstate == "KA004"
    assert database.run("app", "select * from vault order by id") == before
    assert entries(database, "table.update") == []


def test_g6_a_revocation_in_the_midst_of_a_statement_stops_it(audited: Vault) -> None:
    database = audited.database
    with database.connect("agent_1") as session:
        with bind_agent_session(session, audited.one.credential), pytest.raises(psycopg.Error) as caught:
            begun = threading.Timer(0.5, audited.one.revoke)
            begun.start()
            session.execute("update vault set content = 'mine' from pg_sleep(2)")
        session.rollback()
        begun.join()
    error = named(caught.value) or caught.value
    assert error.sqlstate == "KA002"


def test_g4_the_trigger_of_audit_runs_no_code_of_a_tables_owner(database: Database) -> None:
    """Without its transition table the name would be anybody's: a view with a function in it."""
    with database.connect("operator") as attacker:
        attacker.execute("create table mine (a int)")
        attacker.execute(
            "create function evil() returns boolean language plpgsql as"
            " $$begin raise exception 'evil as %', current_user; end$$"
        )
        attacker.execute("create temp view kakunin_rows as select 1 as a where public.evil()")
        attacker.execute("grant select on kakunin_rows to public")
        attacker.execute(
            "create trigger t after insert on mine for each statement"
            " execute function kakunin.record_changes()"
        )
        with pytest.raises(psycopg.Error) as caught:
            attacker.execute("insert into mine values (1)")
    assert caught.value.sqlstate == "KA010"


def test_g4_keys_are_written_without_casts_that_somebody_made(database: Database) -> None:
    with database.connect("app") as owner:
        owner.execute("create type odd as (x int)")
        owner.execute(
            "create function evil_text(odd) returns text language plpgsql as"
            " $$begin raise exception 'evil as %', current_user; end$$"
        )
        owner.execute("create cast (odd as text) with function evil_text(odd) as implicit")
        owner.execute("create table odd_keys (k odd primary key, permitted_agent_serial text)")
        owner.execute("select kakunin.protect('odd_keys', audit_keys => true)")
        owner.execute("insert into odd_keys values (row(7), null)")
        owner.commit()
    assert entries(database, "table.insert")[-1]["metadata"]["keys"] == [["(7)"]]


def test_g6_what_keys_read_as_is_not_up_to_the_session(database: Database) -> None:
    database.run("app", "create table dated (d date primary key, permitted_agent_serial text)")
    database.run("app", "select kakunin.protect('dated', audit_keys => true)")
    with database.connect("app", autocommit=True) as owner:
        owner.execute("set datestyle = 'SQL, DMY'; set quote_all_identifiers = on")
        owner.execute("insert into dated values ('2026-02-01')")
    metadata = entries(database, "table.insert")[-1]["metadata"]
    assert (metadata["keys"], metadata["table"]) == ([["2026-02-01"]], "public.dated")


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_g3_no_open_transaction_of_an_agent_holds_up_a_halt(audited: Vault, isolation: str) -> None:
    database = audited.database
    with database.connect("agent_1") as session, database.connect("operator") as operator:
        operator.execute(f"set transaction isolation level {isolation}".encode())
        operator.execute("select 1")
        with bind_agent_session(session, audited.one.credential):
            session.execute("select kakunin.audit_log_append('api_call')")
            session.execute("update vault set content = 'mine'")
            # Other decisions come between.
            database.agent()
            operator.execute("set lock_timeout = '2s'")
            operator.execute("select kakunin.halt_agent(%s, 'why')", [audited.one.agent_id])
            operator.commit()
            session.rollback()
    assert entries(database, "agent.halted")[-1]["agent_id"] == str(audited.one.agent_id)


def test_g6_a_root_that_may_still_be_undone_is_not_signed(cluster: Any) -> None:
    with fresh_database(cluster) as database, database.connect("worker") as worker:
        key = database.ledger_key()
        database.agent()
        worker.execute("select kakunin.seal_ledger()")
        assert worker.execute("select * from kakunin.tree_head_to_sign()").fetchone() is None
        worker.rollback()
        assert database.seal_and_sign(key)[0] > 0


@pytest.mark.parametrize(
    ("metadata", "state"),
    [("[" * 65 + "]" * 65, "KA010"), ("[" * 64 + "]" * 64, None), (f'["{"[" * 500}"]', None)],
    ids=["65", "64", "in a text"],
)
def test_g8_metadata_that_readers_choke_on_is_refused(vault: Vault, metadata: str, state: str | None) -> None:
    with vault.database.connect("agent_1") as session, bind_agent_session(session, vault.one.credential):
        if state is None:
            session.execute("select kakunin.audit_log_append('x', %s)", [metadata])
        else:
            with pytest.raises(psycopg.Error) as caught:
                session.execute("select kakunin.audit_log_append('x', %s)", [metadata])
            error = named(caught.value) or caught.value
            assert error.sqlstate == state
            session.rollback()


# Forging --------------------------------------------------------------------------------------------

AGENTS = ("agent_1", "gateway")
LOGINS = (*AGENTS, "registrar", "operator", "worker", "auditor", "stranger")
APPEND = "select kakunin.audit_log_append(%s, %s, %s)"


@contextlib.contextmanager
def acting(database: Database, agent: Agent, login: str = "agent_1") -> Iterator[psycopg.Connection[Any]]:
    """A session bound until its ticket expires, in whatever transactions it begins."""
    ticket = database.ticket(agent, login)
    with database.connect(login) as session:
        session.execute("select kakunin.bind_session(%s, false)", [ticket])
        session.commit()
        yield session
        session.rollback()


def append(session: psycopg.Connection[Any], kind: str = "api_call", metadata: str = "{}") -> dict[str, Any]:
    row = session.execute(APPEND, [kind, metadata, None]).fetchone()
    assert row is not None
    return row[0]


def raw(database: Database, event_id: int) -> str:
    return database.value(
        "postgres", "select entry from kakunin_private.ledger where event_id = %s", [event_id]
    )


def count(database: Database) -> int:
    return database.value("postgres", "select count(*) from kakunin_private.ledger")


PRIVATE_CALLS = [
    "kakunin_private.append('x', null, null, null, '{}', gen_random_uuid())",
    "kakunin_private.record('agent.halted', null, '{}')",
    "kakunin_private.add_batch('{1}', '', now())",
    "kakunin_private.reseal()",
    "kakunin_private.wake_worker()",
    "nextval('kakunin_private.event_ids')",
    "setval('kakunin_private.event_ids', 1)",
    "kakunin_private.make_append_only('pg_class')",
]
PRIVATE_TABLES = [
    "ledger", "ledger_default", "chains", "sleeper", "partitions", "tree", "batches", "tree_nodes",
    "tree_heads", "ledger_keys", "exports", "leader",
]  # fmt: skip


@pytest.mark.parametrize("login", LOGINS)
def test_g5_nobody_but_the_owner_reaches_what_the_ledger_is_made_of(database: Database, login: str) -> None:
    with database.connect(login) as session:
        for call in PRIVATE_CALLS:
            with refused("42501"), session.transaction():
                session.execute(f"select {call}".encode())
        for table in PRIVATE_TABLES:
            for statement in (
                "select from {}", "insert into {} default values", "delete from {}", "truncate {}",
                "lock table {} in access share mode", "copy {} to stdout", "copy {} from stdin",
                "create table mine (like {})", "create table mine () inherits ({})",
                "create rule r as on insert to {} do instead nothing", "alter table {} disable trigger all",
                "create trigger t before insert on {} execute function pg_catalog.tsvector_update_trigger()",
                "create table mine (a bigint references {})",
                "create view mine as select * from {}; select * from mine",
            ):  # fmt: skip
                with refused("42501"), session.transaction():
                    session.execute(statement.format(f"kakunin_private.{table}").encode())


VIEWS = {"audit_log": "entry", "chains": "head", "tree_heads": "root", "ledger_keys": "der"}


@pytest.mark.parametrize("login", LOGINS)
@pytest.mark.parametrize("view", VIEWS)
def test_g5_no_view_is_written_or_locked(database: Database, login: str, view: str) -> None:
    """Not even with a lock that conflicts with an append."""
    acl = f"select relacl::text from pg_class where oid = 'kakunin.{view}'::regclass"
    before = database.run("postgres", acl)
    with database.connect(login) as session:
        for statement in (
            "insert into {0} ({1}) values (null)", "update {0} set {1} = null", "delete from {0}",
            "truncate {0}",
            "create trigger t instead of insert on {0} for each row"
            " execute function pg_catalog.suppress_redundant_updates_trigger()",
            "create or replace view {0} as select 1", "drop view {0}", "alter view {0} owner to {2}",
            "alter view {0} set (security_barrier = false)",
            "create rule r as on insert to {0} do instead nothing",
        ):  # fmt: skip
            # Those that nobody can write say so before they look at privileges.
            with refused("42501", "55000", "42809"), session.transaction():
                session.execute(statement.format(f"kakunin.{view}", VIEWS[view], login).encode())
        with contextlib.suppress(psycopg.Error), session.transaction():
            session.execute(f"grant all on kakunin.{view} to public".encode())
        for mode in (
            "row share", "row exclusive", "share update exclusive", "share", "share row exclusive",
            "exclusive", "access exclusive",
        ):  # fmt: skip
            with refused("42501"), session.transaction():
                session.execute(f"lock table kakunin.{view} in {mode} mode".encode())
        session.commit()
    assert database.run("postgres", acl) == before


@pytest.mark.parametrize(
    "kind",
    ["agent.halted", "certificate.revoked", "table.update", "ledger.exported", "a.b", "a\u2024b", ".x", "x."],
    ids=range(8),
)
def test_g5_an_agent_cannot_name_its_event_like_a_decision(vault: Vault, kind: str) -> None:
    before = count(vault.database)
    with acting(vault.database, vault.one) as session, refused("KA010"):
        append(session, kind)
    assert count(vault.database) == before


FORGERIES = [
    {"agent_id": "x", "prev": "0", "chain": 1, "event_type": "agent.halted", "kakunin": "entry/1"},
    {'","agent_id":"x': 1},
    {'"},"metadata":{': '"}\n{"kakunin":"end/1"}'},
    ["}", "]", '"', "\\", "\u0000"[:0], "\u2028"],
    'null}\n{"kakunin":"tree_head/1"',
]


@pytest.mark.parametrize("metadata", FORGERIES, ids=range(len(FORGERIES)))
def test_g5_metadata_and_session_id_stay_inside_their_member(vault: Vault, metadata: Any) -> None:
    with acting(vault.database, vault.one) as session:
        row = session.execute(APPEND, ["x", json.dumps(metadata), json.dumps(metadata)[:50]]).fetchone()
        assert row is not None
        session.commit()
    text = raw(vault.database, row[0]["event_id"])
    assert "\n" not in text
    members = json.loads(text, object_pairs_hook=list)
    names = [name for name, _ in members]
    assert len(names) == len(set(names)) == 14
    entry = json.loads(text)
    assert (entry["agent_id"], entry["event_type"]) == (str(vault.one.agent_id), "x")
    assert (entry["metadata"], entry["session_id"]) == (metadata, json.dumps(metadata)[:50])


def test_g5_a_binding_of_another_appends_nothing(vault: Vault) -> None:
    database = vault.database
    before = count(database)
    with acting(database, vault.two, "agent_1") as theirs, database.connect("agent_1") as session:
        copied = theirs.execute("select current_setting('kakunin.session')").fetchone()
        assert copied is not None
        for binding in (
            copied[0],
            copied[0].replace(vault.two.serial, vault.one.serial),
            f"1|{vault.two.serial}|x|0|" + "0" * 64,
        ):
            session.execute("select set_config('kakunin.session', %s, false)", [binding])
            session.commit()
            with refused("KA004"):
                append(session)
            session.rollback()
        session.execute("select set_config('kakunin.session', '', false)")
        claims = json.dumps({"kakunin_cert_serial": vault.two.serial})
        session.execute("select set_config('request.jwt.claims', %s, false)", [claims])
        with refused("KA004"):
            append(session)
    assert count(database) == before


@pytest.mark.parametrize(
    "trick",
    [
        "set role kakunin_auditor", "set role kakunin_worker", "set role installer", "set role postgres",
        "set session authorization auditor", "set session authorization postgres",
        "set role kakunin_operator",
        "grant kakunin_auditor to agent_1", "reassign owned by installer to agent_1",
        "drop owned by installer",
        "alter function kakunin.audit_log_append(text, jsonb, text, timestamptz) security invoker",
        "create or replace function kakunin.audit_log_append(text, jsonb, text, timestamptz) returns jsonb"
        " language sql"
        " return '{}'::jsonb",
        "create event trigger e on ddl_command_end"
        " execute function pg_catalog.suppress_redundant_updates_trigger()",
        "alter database postgres set kakunin.session = ''", "set session_replication_role = replica",
        "load 'auto_explain'",
    ],
    ids=range(16),
)  # fmt: skip
def test_g5_no_role_trick_helps_an_agent(vault: Vault, trick: str) -> None:
    with acting(vault.database, vault.one) as session, refused("42501", "42809", "42P17"):
        session.execute(trick.encode())


def test_g5_the_login_that_is_named_is_who_connected(database: Database) -> None:
    agent = database.agent()
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute(
            "create role double login in role kakunin_agent;"
            " create role mask in role kakunin_agent role double"
        )
    try:
        with acting(database, agent, "double") as session:
            session.execute("set role mask")
            result = append(session)
            session.commit()
        assert json.loads(raw(database, result["event_id"]))["login"] == "double"
    finally:
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute("drop role double, mask")


# What a session may set -------------------------------------------------------------------------------

SETTINGS = {
    "bytea_output": "escape",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Pacific/Kiritimati",
    "extra_float_digits": "-15",
    "transform_null_equals": "on",
    "backslash_quote": "on",
    "standard_conforming_strings": "off",
    "quote_all_identifiers": "on",
    "row_security": "off",
    "xmlbinary": "hex",
    "xmloption": "document",
    "lc_numeric": "C",
    "lc_time": "C",
    "client_encoding": "LATIN1",
    "plan_cache_mode": "force_generic_plan",
    "plpgsql.variable_conflict": "use_column",
    "synchronous_commit": "off",
    "jit_above_cost": "0",
    "enable_indexscan": "off",
    "enable_material": "off",
    "enable_nestloop": "off",
    "from_collapse_limit": "1",
    "debug_parallel_query": "on",
    "force_parallel_mode": "on",
    "default_transaction_isolation": "serializable",
    "timezone_abbreviations": "India",
    "search_path": "pg_temp, public",
}


@pytest.mark.parametrize(("setting", "value"), SETTINGS.items())
def test_g5_no_setting_changes_what_an_entry_looks_like(vault: Vault, setting: str, value: str) -> None:
    database = vault.database
    with acting(database, vault.one) as session:
        try:
            session.execute("select set_config(%s, %s, false)", [setting, value])
        except psycopg.Error:
            pytest.skip("not a setting of this server, or not this login's to change")
        session.commit()
        metadata = {"a": [1.5, 1e-7, True, None], "b": "2026-02-01", "c": "'\\'"}
        row = session.execute(APPEND, ["x", json.dumps(metadata), "s'\\"]).fetchone()
        session.commit()
    assert row is not None
    text = raw(database, row[0]["event_id"])
    entry = json.loads(text)
    assert row[0]["hash"] == hashlib.sha256(b"\0" + text.encode()).hexdigest()
    assert entry["metadata"] == metadata
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["recorded_at"])
    moment = database.value(
        "postgres",
        "select to_char(recorded_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')"
        " from kakunin_private.ledger where event_id = %s",
        [entry["event_id"]],
    )
    assert entry["recorded_at"] == moment
    # Byte for byte, but for what jsonb makes of the metadata.
    head, _, rest = text.partition(',"risk":')
    del entry["metadata"], entry["risk"]
    assert head == json.dumps(entry, separators=(",", ":"))[:-1]
    assert re.match(
        r'\{"band": "[a-z]+", "score": 0\.[0-9]{4}, "factors": \{.*?\}, "agent_band": "[a-z]+",'
        r' "agent_score": [01]\.[0-9]{4}\},"metadata":\{',
        rest,
    )


# Reading what is another's ----------------------------------------------------------------------------


def test_g1_no_leaky_function_sees_anothers_entry(vault: Vault) -> None:
    database = vault.database
    with acting(database, vault.two, "agent_2") as session:
        secret = append(session, "secret", '{"secret": "hidden"}')["event_id"]
        session.commit()
    seen: list[str] = []
    with acting(database, vault.one) as session:
        append(session, "own", '{"secret": "shown"}')
        session.commit()
        session.add_notice_handler(lambda notice: seen.append(str(notice.message_primary)))
        session.execute(
            "create function pg_temp.peek(text) returns boolean language plpgsql immutable cost 0.0000001 as"
            " $$ begin raise notice 'peek %', $1; return true; end $$"
        )
        session.execute(
            "create function pg_temp.peek_id(bigint) returns boolean language plpgsql cost 0.0000001 as"
            " $$ begin raise notice 'peek %', $1; return true; end $$"
        )
        for query in (
            "select * from kakunin.audit_log where pg_temp.peek(entry)",
            "select * from kakunin.audit_log where pg_temp.peek(metadata::text) and event_type = 'secret'",
            "select * from kakunin.audit_log where pg_temp.peek_id(event_id)",
            "select * from kakunin.audit_log a join (values (1)) v on pg_temp.peek(a.entry)",
            "select * from kakunin.audit_log order by pg_temp.peek(entry)",
            "select count(*) filter (where pg_temp.peek(entry)) from kakunin.audit_log",
        ):  # fmt: skip
            session.execute(query.encode())
        assert seen
        assert not [line for line in seen if "hidden" in line or line == f"peek {secret}"]
        # An error would tell as well as a notice.
        for query in (
            "select 1 / (event_id - %s) from kakunin.audit_log where event_id = %s",
            "select (metadata ->> 'secret')::int from kakunin.audit_log where event_id in (%s, %s)",
        ):
            assert session.execute(query.encode(), [secret, secret]).fetchall() == []
        seen.clear()
        session.execute("select kakunin.unbind_session()")
        session.execute("select * from kakunin.audit_log where pg_temp.peek(entry)")
        assert seen == []
    for login in ("agent_1", "gateway", "worker", "operator", "registrar", "stranger"):
        with database.connect(login) as session:
            if login in AGENTS:
                assert session.execute("select * from kakunin.audit_log").fetchall() == []
            else:
                with refused("42501"):
                    session.execute("select * from kakunin.audit_log")


def test_g1_nobody_proves_what_is_anothers(vault: Vault) -> None:
    """A proof carries the entry: for others it is as if there were none, bound or not."""
    database = vault.database
    with acting(database, vault.two, "agent_2") as session:
        theirs = append(session)["event_id"]
        session.commit()
    database.run("operator", "select kakunin.rotate_session_key()")
    kept = "select agent_id, entry::json ->> 'event_type' from kakunin_private.ledger where event_id = %s"
    last = database.value("postgres", "select max(event_id) from kakunin_private.ledger")
    assert database.run("postgres", kept, [last]) == [(None, "key.rotated")]
    database.seal_and_sign(database.ledger_key())
    prove = "select kakunin.inclusion_proof(%s)"
    for event_id in (theirs, last, 10**12):
        told = set()
        with acting(database, vault.one) as session:
            with pytest.raises(psycopg.Error) as caught:
                session.execute(prove, [event_id])
            told.add((caught.value.sqlstate, caught.value.diag.message_primary))
        for login in AGENTS:
            with database.connect(login) as session, pytest.raises(psycopg.Error) as caught:
                session.execute(prove, [event_id])
            told.add((caught.value.sqlstate, caught.value.diag.message_primary))
        assert told == {("KA010", f"no event {event_id}")}


def test_g6_whoever_listens_hears_nothing_but_that_there_is_something(database: Database) -> None:
    agent = database.agent()
    database.run("worker", "select kakunin.sleep_ledger()")
    with database.connect("stranger", autocommit=True) as listener, acting(database, agent) as session:
        listener.execute("listen kakunin_ledger")
        append(session, "secret", '{"secret": "hidden"}')
        session.commit()
        heard = list(listener.notifies(timeout=5, stop_after=1))
    assert [(n.channel, n.payload) for n in heard] == [("kakunin_ledger", "")]


# Holding up others ------------------------------------------------------------------------------------


@pytest.fixture(params=["appended", "savepoint", "read", "prepared", "serializable", "advisory"])
def holder(request: pytest.FixtureRequest, vault: Vault) -> Iterator[Vault]:
    """An agent of login agent_2 that has done something, and does not end its transaction."""
    database = vault.database
    name = f"held_{database.name}"
    with acting(database, vault.one) as session:
        append(session)  # the worker is awake
        session.commit()
    ticket = database.ticket(vault.two, "agent_2")
    with database.connect("agent_2") as session:
        if request.param == "serializable":
            session.execute("set transaction isolation level serializable")
        session.execute("select kakunin.bind_session(%s)", [ticket])
        if request.param == "savepoint":
            session.execute("savepoint s")
        if request.param == "read":
            session.execute("select count(*) from kakunin.tree_heads, kakunin.ledger_keys")
        else:
            append(session)
        if request.param == "savepoint":
            session.execute("rollback to s")
            append(session)
        if request.param == "advisory":
            session.execute("select pg_advisory_xact_lock(x) from generate_series(-300, 300) x")
            session.execute("select pg_advisory_xact_lock(0, x) from generate_series(-300, 300) x")
        if request.param == "prepared":
            session.execute(f"prepare transaction '{name}'".encode())
            session.commit()
        yield vault
        session.rollback()
        if request.param == "prepared":
            session.autocommit = True
            session.execute(f"rollback prepared '{name}'".encode())


def test_g6_no_open_transaction_of_an_agent_holds_anything_up(holder: Vault) -> None:
    """With a lock_timeout, whoever waits fails."""
    database = holder.database
    key = database.ledger_key()
    third = database.agent()
    impatient = "set lock_timeout = '1s'"
    with acting(database, holder.one) as other, acting(database, holder.two) as same:
        for session in (other, same):
            session.execute(impatient)
            append(session)
            session.commit()
    with database.connect("worker", autocommit=True) as worker:
        worker.execute(impatient)
        worker.execute("select kakunin.lead_ledger(gen_random_uuid(), 'w', '0')")
        worker.execute("select kakunin.seal_ledger()")
        worker.execute("select kakunin.sleep_ledger()")
        worker.execute("select kakunin.ledger_status()")
    size, _ = database.seal_and_sign(key)
    with database.connect("worker", autocommit=True) as worker:
        worker.execute("select kakunin.make_partitions('9 months')")
    with database.connect("auditor", autocommit=True) as auditor:
        auditor.execute(impatient)
        auditor.execute("select kakunin.inclusion_proof(1)")
        auditor.execute("select count(*) from kakunin.audit_log")
        auditor.execute("select kakunin.record_export(%s, 0, repeat('0', 64))", [size])
    with database.connect("operator", autocommit=True) as operator:
        operator.execute(impatient)
        operator.execute("select kakunin.suspend_agent(%s, 'why')", [third.agent_id])
        operator.execute("select kakunin.revoke_certificate(%s)", [third.serial])
        operator.execute("select kakunin.rotate_session_key()")
        operator.execute("select kakunin.halt_agent(%s, 'why')", [holder.two.agent_id])


def test_g6_whoever_reads_the_ledger_puts_partitions_off_and_nothing_else(vault: Vault) -> None:
    """Attaching one takes a lock that a reader's transaction conflicts with: the worker gives up at once and
    tries again later, and nobody who appends or decides meanwhile waits for longer than that."""
    database = vault.database
    make = "select kakunin.make_partitions('11 months')"
    with acting(database, vault.two, "agent_2") as reader, acting(database, vault.one) as session:
        reader.execute("select count(*) from kakunin.audit_log")
        session.execute("set lock_timeout = '3s'")
        with ThreadPoolExecutor(1) as pool:
            for _ in range(3):
                made = pool.submit(database.run, "worker", make)
                append(session)
                session.commit()
                database.run("operator", "select kakunin.rotate_session_key()")
                with refused("55P03"):
                    made.result()
    assert database.value("worker", make)


def test_g6_a_full_queue_of_notifications_stops_no_entry(cluster: Any) -> None:
    """Any login can fill it: it listens, and never ends its transaction."""
    if cluster.major < 17:
        pytest.skip("the queue holds 8 GiB before Postgres 17, where max_notify_queue_pages is new")
    server = start_cluster(cluster.major)
    try:
        server.settings["max_notify_queue_pages"] = "64"
        server.stop()
        server.start()
        with fresh_database(server) as database:
            agent = database.agent()
            with (
                database.connect("agent_2", autocommit=True) as listener,
                database.connect("agent_2", autocommit=True) as sender,
                acting(database, agent) as session,
            ):
                listener.execute("listen own")
                listener.execute("begin")
                listener.execute("select 1")
                with refused("54000"):
                    for n in range(1000):
                        sender.execute("select pg_notify('own', %s)", [f"{n:07900}"])
                assert database.value("worker", "select kakunin.sleep_ledger()")
                append(session)
                session.commit()
                assert database.value("postgres", "select asleep from kakunin_private.sleeper")
            append_later = "select count(*) from kakunin.audit_log where event_type = 'api_call'"
            assert database.value("auditor", append_later) == 1
    finally:
        server.destroy()


# The owner of an audited table ------------------------------------------------------------------------

LOOT = (
    "create table loot (who text)", "grant all on loot to public",
    "create type trick as enum ('a')",
    "create function stolen(trick) returns {target} language plpgsql as"
    " $$ begin insert into public.loot values (current_user); return '1'; end $$",
    "create cast (trick as {target}) with function stolen(trick) {how}",
    "create domain strange as text check (value <> 'evil')",
    "create table trapped (id int primary key, o trick, s strange, permitted_agent_serial text)",
)  # fmt: skip


@pytest.fixture
def owner(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """Somebody who owns tables and is an operator; what it makes is undone."""
    with database.connect("app") as app:
        yield app
        app.rollback()


def loot(owner: psycopg.Connection[Any]) -> list[Any]:
    return [who for (who,) in owner.execute("select who from loot where who <> 'app'").fetchall()]


@pytest.mark.parametrize(
    "argument", ["row_to_json", "to_json", "to_jsonb", "json_agg", "jsonb_agg", "num_nonnulls", "text"]
)
@pytest.mark.parametrize("target", ["json", "text"])
def test_g4_no_argument_of_the_trigger_is_a_function(
    owner: psycopg.Connection[Any], argument: str, target: str
) -> None:
    """r.name is the column, and where there is none, the function of that name: row_to_json calls casts."""
    for statement in LOOT:
        owner.execute(statement.format(target=target, how="as implicit" if target == "text" else "").encode())
    owner.execute(
        "create trigger t after insert on trapped referencing new table as kakunin_rows for each statement"
        f" execute function kakunin.record_changes('{argument}')".encode()
    )
    with contextlib.suppress(psycopg.Error), owner.transaction():
        owner.execute("insert into trapped values (1, 'a')")
    assert loot(owner) == []


@pytest.mark.parametrize("key", ["o", "s", "o, s", "d", "r", "c", "e"])
def test_g4_keys_of_any_type_run_nothing(owner: psycopg.Connection[Any], key: str) -> None:
    """Enums, domains, ranges and composites of the owner's making, with casts to what might be asked for."""
    for statement in LOOT:
        owner.execute(statement.format(target="text", how="as implicit").encode())
    owner.execute("create cast (trick as json) with inout")
    owner.execute("create type pair as (o trick, s strange)")
    owner.execute("create type spread as range (subtype = trick)")
    owner.execute(
        "create table keyed (o trick, s strange, d trick[], r spread, c pair, e strange[],"
        f" permitted_agent_serial text, primary key ({key}))".encode()
    )
    owner.execute("select kakunin.protect('keyed', audit_keys => true)")
    owner.execute("insert into keyed values ('a', 's', '{a}', '[a,a]', row('a', 's'), '{s}')")
    owner.execute("update keyed set permitted_agent_serial = 'AA'")
    owner.execute("delete from keyed")
    assert loot(owner) == []


@pytest.mark.parametrize("name", ["kakunin_rows", '"KAKUNIN_ROWS"'])
@pytest.mark.parametrize("event", ["insert", "update", "delete", "truncate", "insert or update or delete"])
@pytest.mark.parametrize("level", ["statement", "row"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_g4_a_temporary_view_is_not_the_transition_table(
    owner: psycopg.Connection[Any], when: str, level: str, event: str, name: str
) -> None:
    owner.execute("create table loot (who text); grant all on loot to public")
    owner.execute(
        "create function steal() returns boolean language plpgsql as"
        " $$ begin insert into public.loot values (current_user); return true; end $$"
    )
    owner.execute(f"create temp view {name} as select 1 as id where public.steal()".encode())
    owner.execute(f"grant select on {name} to public".encode())
    owner.execute("create table trapped (id int); insert into trapped values (1)")
    with contextlib.suppress(psycopg.Error), owner.transaction():
        owner.execute(
            (
                f"create trigger t {when} {event} on trapped for each {level}"
                " execute function kakunin.record_changes('id')"
            ).encode()
        )
        for statement in (
            "insert into trapped values (2)",
            "update trapped set id = 3",
            "delete from trapped",
            "truncate trapped",
        ):
            with contextlib.suppress(psycopg.Error), owner.transaction():
                owner.execute(statement.encode())
    assert loot(owner) == []


def test_g6_a_renamed_key_still_lets_rows_be_written_and_is_recorded(database: Database) -> None:
    with database.connect("app", autocommit=True) as app:
        app.execute("create table renamed (id int primary key, permitted_agent_serial text)")
        app.execute("select kakunin.protect('renamed', audit_keys => true)")
        app.execute("alter table renamed rename id to key_of_it")
        try:
            app.execute("insert into renamed values (7)")
        finally:
            app.execute("drop table if exists renamed")
    assert entries(database, "table.insert")[-1]["metadata"]["keys"] == [["7"]]


def test_g6_the_owners_own_trigger_runs_as_whoever_changes_rows(owner: psycopg.Connection[Any]) -> None:
    owner.execute("create table loot (who text); grant all on loot to public")
    owner.execute("create table mine (id int primary key, permitted_agent_serial text)")
    owner.execute("select kakunin.protect('mine', audit_keys => true)")
    owner.execute(
        "create function mine() returns trigger language plpgsql as"
        " $$ begin insert into public.loot values (current_user); return null; end $$"
    )
    for name_ in ("aaa", "zzz"):
        owner.execute(f"create trigger {name_} after insert on mine execute function mine()".encode())
    owner.execute("insert into mine values (1)")
    assert loot(owner) == []
    row = owner.execute("select count(*) from loot").fetchone()
    assert row == (2,)


def test_g6_a_policy_is_recorded_as_the_catalog_has_it(database: Database) -> None:
    """Whoever asks, and whatever the table's owner calls his policies."""
    record = "select kakunin.record_policy(%s::regclass)"
    with database.connect("app", autocommit=True) as app:
        app.execute("create table plain (permitted_agent_serial text)")
        app.execute("create policy kakunin_isolation on plain using (true)")
    try:
        database.run("operator", record, ["plain"])
        said = entries(database, "policy.unprotected")[-1]
        assert said["login"] == "operator"
        assert said["metadata"]["row_security"] is False
        database.run("app", "alter table plain enable row level security")
        for n in range(120):
            database.run(
                "app", f"create policy a{n:03} on plain as restrictive using (length('{'x' * 3000}') > 0)"
            )
        database.run("app", record, ["plain"])
        kind = "policy.protected"
        said = [e for e in entries(database, kind) if e["metadata"]["table"] == "public.plain"][-1]
        # No more than it takes: not what the owner made to hide the rest.
        assert len(json.dumps(said)) < 200_000
        assert len(said["metadata"]["policies"]) <= 101
    finally:
        database.run("app", "drop table plain")
    for nothing in ("pg_class_oid_index", "kakunin.audit_log"):
        with contextlib.suppress(psycopg.Error):
            database.run("app", record, [nothing])
    with refused("KA010"):
        database.run("app", "select kakunin.record_policy(0)")


def test_g6_an_audited_table_is_not_left_by_its_users(audited: Vault) -> None:
    database = audited.database
    with acting(database, audited.one) as session:
        for statement in (
            "alter table vault disable trigger kakunin_audit_update",
            "drop trigger kakunin_audit_update on vault",
            "select kakunin.audit_changes('vault', false, false)", "select kakunin.unprotect('vault')",
            "set session_replication_role = replica", "truncate vault",
            "create trigger t after insert on vault execute function kakunin.record_changes()",
            "select kakunin.record_policy('vault')",
        ):  # fmt: skip
            with refused("42501"), session.transaction():
                session.execute(statement.encode())


# The worker and the auditor ---------------------------------------------------------------------------


def test_g6_the_worker_signs_what_is_there_or_nothing(cluster: Any) -> None:
    """Even with the ledger's key: the root is computed by the database, and is none of the arguments."""
    with fresh_database(cluster) as database:
        key = database.ledger_key()
        database.seal()
        columns = 'tree_size, "timestamp", root'
        [(size, timestamp, root)] = database.run(
            "worker", f"select {columns} from kakunin.tree_head_to_sign()"
        )
        publish = "select kakunin.publish_tree_head(%s, %s, %s, %s)"
        false_root = hashlib.sha256(b"another history").digest()
        with database.connect("worker", autocommit=True) as worker:
            for bad in (
                [size, timestamp, key.key_id, key.sign(size, timestamp, false_root)],
                [size + 1, timestamp, key.key_id, key.sign(size + 1, timestamp, root)],
                [size - 1, timestamp, key.key_id, key.sign(size - 1, timestamp, root)],
            ):
                with refused("KA010"):
                    worker.execute(publish, bad)
            worker.execute(publish, [size, timestamp, key.key_id, key.sign(size, timestamp, root)])
            # A second one of that size, or of one before it, would be a fork.
            for later in (timestamp + 1, timestamp):
                with refused("KA010"):
                    worker.execute(publish, [size, later, key.key_id, key.sign(size, later, root)])
            for statement in (
                "select kakunin.audit_log_append('x')", "select * from kakunin.audit_log",
                "select * from kakunin.ledger_leaves(0)", "select kakunin.inclusion_proof(1)",
                "select kakunin.register_ledger_key('x')", "select kakunin.revoke_ledger_key('x')",
                "select kakunin.archive_partition('ledger_202611')", "select kakunin.record_export(1, 0, '')",
                "select kakunin.renew_installation()", "select kakunin.record_policy('pg_class')",
            ):  # fmt: skip
                with refused("42501"):
                    worker.execute(statement.encode())


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_g6_an_old_snapshot_makes_no_fork(cluster: Any, isolation: str) -> None:
    with fresh_database(cluster) as database:
        key = database.ledger_key()
        database.seal()
        [(size, timestamp, root)] = database.run(
            "worker", 'select tree_size, "timestamp", root from kakunin.tree_head_to_sign()'
        )
        with database.connect("worker") as worker:
            worker.execute(f"set transaction isolation level {isolation}".encode())
            worker.execute("select count(*) from kakunin.tree_heads")
            key.publish(size, timestamp, root)
            for query, parameters in (
                ("select kakunin.seal_ledger()", None),
                ("select kakunin.publish_tree_head(%s, %s, %s, %s)",
                 [size, timestamp + 1, key.key_id, key.sign(size, timestamp + 1, root)]),
            ):  # fmt: skip
                with refused("KA010"), worker.transaction():
                    worker.execute(query.encode(), parameters)


def test_g5_an_auditor_writes_nothing_but_reports_and_that_it_has_read(database: Database) -> None:
    database.seal_and_sign(database.ledger_key())
    before = database.run("postgres", "select * from kakunin_private.ledger order by event_id")
    may = {
        "inclusion_proof", "consistency_proof", "ledger_leaves", "frontier", "unsealed_entries",
        "stray_entries", "ledger_status", "ledger_home", "installation_id", "normalize_serial",
        "verify_certificate", "verify_message", "crls_due", "revocations", "current_agent_id", "agent_risk",
        "risk_window", "webhook_status", "certificate_der", "verify_decision_chain",
    }  # fmt: skip
    recording = {"record_read", "record_export", "create_report"}
    callable_ = database.run(
        "postgres",
        "select proname, provolatile from pg_proc where pronamespace = 'kakunin'::regnamespace"
        " and has_function_privilege('auditor', oid, 'execute')",
    )
    assert {name for name, _ in callable_} == may | recording
    assert {name for name, kind in callable_ if kind == "v"} - {"ledger_status", "ledger_home"} == recording
    database.run("auditor", "select kakunin.record_read('read', '{\"agent_id\": \"forged\"}')")
    after = database.run("postgres", "select * from kakunin_private.ledger order by event_id")
    assert after[:-1] == before
    said = json.loads(after[-1][-1])
    assert (said["event_type"], said["agent_id"], said["login"]) == ("ledger.read", None, "auditor")
    assert said["metadata"] == {"command": "read", "details": {"agent_id": "forged"}}


def test_g8_what_an_agent_does_is_no_decision_of_its_report(audited: Vault) -> None:
    """As much as it likes, it would be more than a document holds, and there would be no report of it."""
    with acting(audited.database, audited.one) as session:
        session.execute("update vault set content = content || '!'")
        session.commit()
    report = audited.database.value("auditor", "select kakunin.create_report(%s)", [audited.one.agent_id])
    said = "select document::jsonb from kakunin.reports where report_id = %s"
    decided = audited.database.value("auditor", said, [report])["decisions"]
    assert [entry["event_type"] for entry in decided] == ["agent.created", "certificate.issued"]
