"""The SQL tool over real stdio: any SQL a model likes, and nothing that the agent may not."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database
from test_mcp import crash, events, server_with, start

pytest.importorskip("mcp", reason="the mcp extra is not installed")
from mcp_client import Tools, environment, serving

from kakunin_db.mcp.login import LoginRefusedError, check_login


@pytest.fixture(scope="module")
def database(cluster: Cluster) -> Iterator[Database]:
    """Where agents' logins may create nothing. Attempts are scored and nobody is revoked for them."""
    with fresh_database(cluster) as database:
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute("revoke create on schema public from public")
            admin.execute("grant create on schema public to app")
        database.run("operator", """select kakunin.set_risk('{"mode": "observe"}')""")
        database.run("app", "create table secrets (token text)")
        database.run("app", "insert into secrets values ('tok_live_1'), ('tok_live_2')")
        database.run(
            "app", "create table notes (permitted_agent_serial text, note text, amount numeric(20, 4))"
        )
        database.run("app", "comment on table notes is 'What agents keep'")
        database.run("app", "select kakunin.protect('notes')")
        database.run("app", "grant select, insert, update, delete on notes to kakunin_agent")
        database.run("app", "create procedure wreck() language plpgsql as 'begin commit; end'")
        yield database


@pytest.fixture
def agent(database: Database) -> Agent:
    return database.agent("atlas", permitted_actions=["notes:read"])


@pytest.fixture
def writer(database: Database) -> Agent:
    return database.agent("scribe", permitted_actions=["sql:write"])


def digest(statement: str) -> str:
    return "sha256:" + hashlib.sha256(statement.encode()).hexdigest()


def add_notes(agent: Agent, *notes: str) -> None:
    for note in notes:
        agent.database.run("app", "insert into notes values (%s, %s, 1.5)", [agent.serial, note])


def notes(agent: Agent) -> list[str]:
    query = "select note from notes where permitted_agent_serial = %s order by note"
    return [note for (note,) in agent.database.run("app", query, [agent.serial])]


async def rows(tools: Tools, sql: str) -> list[list[Any]]:
    answer = await tools("query", {"sql": sql})
    ((result),) = answer["results"]
    return result["rows"]


async def test_the_agent_reads_its_own_rows(agent: Agent, writer: Agent, tmp_path: Path) -> None:
    add_notes(agent, "mine")
    add_notes(writer, "another's")
    statement = (
        "select note, amount, null as nothing, 1 as one, 12345678901234567890 as big from notes -- all"
    )
    async with serving(environment(agent, tmp_path, "agent_1"), "--sql") as tools:
        answer = await tools("query", {"sql": statement})
        (result,) = answer["results"]
        assert result["rows"] == [["mine", "1.5000", None, 1, "12345678901234567890"]]
        assert [c["name"] for c in result["columns"]] == ["note", "amount", "nothing", "one", "big"]
        assert [c["type"] for c in result["columns"]] == ["text", "numeric", "text", "int4", "numeric"]
        assert (result["command"], result["row_count"], result["truncated"]) == ("SELECT 1", 1, None)
        assert answer["read_only"] is True
        assert events(agent)[-1] == (
            "data_access",
            {"tool": "query", "read_only": True, "statement": digest(statement)},
        )

        values = (
            "select true, 'NaN'::float8, 1.5::float8, 9007199254740993,"
            """ '{"a": [1, null]}'::jsonb, '{"n": 1e999}'::json"""
        )
        assert await rows(tools, values) == [
            [True, "NaN", 1.5, "9007199254740993", {"a": [1, None]}, '{"n": 1e999}']
        ]

        batch = ["select 1", "select count(*) from notes;"]
        answer = await tools("query", {"statements": batch})
        assert [result["rows"] for result in answer["results"]] == [[[1]], [[1]]]
        assert events(agent)[-1][1]["statements"] == [digest(s) for s in batch]

        plan = (await tools("explain", {"sql": "select * from notes"}))["plan"]
        assert any("Scan" in line for line in plan)
        plan = (await tools("explain", {"sql": "select * from notes", "analyze": True}))["plan"]
        assert any("actual" in line for line in plan)

        (table,) = (await tools("describe_schema", {"table": "notes"}))["tables"]
        assert table["comment"] == "What agents keep"
        assert table["row_security"] is True
        assert table["privileges"] == ["select", "insert", "update", "delete"]
        assert [c["name"] for c in table["columns"]] == ["permitted_agent_serial", "note", "amount"]
        names = {(t["schema"], t["name"]) for t in (await tools("describe_schema"))["tables"]}
        assert ("public", "notes") in names
        assert ("kakunin", "audit_log") in names
        assert ("public", "secrets") not in names
        assert [kind for kind, _ in events(agent)] == ["data_access"] * 7


async def test_what_json_or_the_protocol_cannot_have_is_text(agent: Agent, tmp_path: Path) -> None:
    async with serving(environment(agent, tmp_path, "agent_1"), "--sql") as tools:
        halves = ('["\\ud800"]', '{"\\udc80": 1}')  # of a surrogate pair
        for value in ('{"a": 1, "a": 2}', *halves, *("[" * deep + "]" * deep for deep in (66, 300, 900))):
            assert await rows(tools, f"select '{value}'::json") == [[value]]
        ((value,),) = await rows(tools, f"select '{'[' * 60}{']' * 60}'::json")
        assert isinstance(value, list)


async def test_writing_takes_a_scope_and_the_word(agent: Agent, writer: Agent, tmp_path: Path) -> None:
    insert = "insert into notes select kakunin.current_cert_serial(), 'new' returning note"
    async with serving(environment(agent, tmp_path, "agent_1"), "--sql") as tools:
        refused = await tools.refused("query", {"sql": insert})
        assert refused["code"] == "25006"
        assert "sql:write" in refused["hint"]
        refused = await tools.refused("query", {"sql": insert, "write": True})
        assert (refused["code"], refused["recorded"]) == ("KA005", True)
        assert events(agent)[-1][0] == "unauthorized_access_attempt"
        assert events(agent)[-1][1] == {"sqlstate": "KA005", "statement": digest(insert), "attempts": 1}
    assert notes(agent) == []
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql") as tools:
        refused = await tools.refused("query", {"sql": insert})
        assert refused["code"] == "25006"
        answer = await tools("query", {"sql": insert, "write": True})
        assert answer["results"][0]["rows"] == [["new"]]
        assert answer["read_only"] is False
        assert events(writer)[-1] == (
            "data_mutation", {"tool": "query", "read_only": False, "statement": digest(insert)},
        )  # fmt: skip
        # All of a batch or nothing.
        refused = await tools.refused("query", {"statements": [insert, "select 1/0"], "write": True})
        assert (refused["code"], refused["statement"]) == ("22012", 2)
        assert notes(writer) == ["new"]
        moved = (
            "with gone as (delete from notes returning *) insert into notes select * from gone returning note"
        )
        assert (await tools("query", {"sql": moved, "write": True}))["results"][0]["row_count"] == 1
        # Another's row.
        other = "insert into notes values ('AA:BB', 'planted')"
        refused = await tools.refused("query", {"sql": other, "write": True})
        assert refused["code"] == "42501"
        assert events(writer)[-1][1]["statement"] == digest(other)
    assert notes(writer) == ["new"]


# Attacks ----------------------------------------------------------------------------------------------

# What the server's grammar does not take behind EXPLAIN, or takes for more than one statement.
NOT_QUERIES = [
    "commit", "commit and chain", "rollback", "rollback and chain", "begin", "savepoint a", "end",
    "prepare transaction 'x'", "set transaction read write", "start transaction read write",
    "set role app", "set session authorization postgres", "reset role", "reset all", "discard all",
    "set statement_timeout = 0", "set session characteristics as transaction read write",
    "listen secrets", "notify secrets, 'x'", "unlisten *", "load 'plpgsql'", "show all", "checkpoint",
    "copy secrets to program 'id'", "copy notes from program 'id'", "copy notes to stdout",
    "copy (select 1) to '/tmp/kakunin_copied'", "copy notes from stdin",
    "do $$ begin commit; end $$", "do language plpgsql $$ begin end $$", "call wreck()",
    "prepare p as select 1", "deallocate all", "fetch all from c", "close all", "move all from c",
    "lock table notes in access exclusive mode", "vacuum", "analyze", "analyze values (a)", "cluster",
    "drop table notes", "drop owned by kakunin_agent", "reassign owned by app to agent_1", "truncate notes",
    "alter role current_user password 'x'", "alter role current_user set role = 'app'",
    "alter system set log_statement = 'all'", "grant select on secrets to public",
    "create temp table t (a int)",
    "create function pg_temp.f() returns int language sql return 1", "create extension dblink",
    "security label on table notes is 'x'", "comment on table notes is 'x'", "explain analyze select 1",
    "explain (analyze) insert into notes values ('a', 'b')", 
    "import foreign schema s from server x into public",
    "", ";", "-- nothing", "; select 1", "/* commit */", "create table t as select 1; commit",
]  # fmt: skip
SEVERAL = [
    "commit; drop table notes", "select 1; select 2", "select 1; commit", "; select 1; drop table notes;",
    "select 1 \\; commit; drop schema public cascade", "rollback; begin; select 1",
    "select 1)); drop table notes --",
    "select ';'; commit --';", "$$;$$; commit", "select 1 --\n; drop table notes", "select /* ; */ 1; commit",
]  # fmt: skip


async def test_what_is_not_one_query_does_not_run(writer: Agent, tmp_path: Path) -> None:
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql") as tools:
        for write in (False, True):
            for statement in NOT_QUERIES + SEVERAL:
                arguments = {"statements": ["select 1", statement, "select 1"], "write": write}
                refused = await tools.refused("query", arguments)
                assert refused["code"] in {"not_a_query", "42601", "KA010"}, (statement, refused)
        for statement in SEVERAL:
            assert (await tools.refused("explain", {"sql": statement}))["code"] in {"not_a_query", "42601"}
        assert (await tools.refused("explain", {"sql": "(analyze) insert into notes values ('a')"}))[
            "code"
        ] == "42601"
        assert (await tools.refused("query", {"sql": "select 1 \0; commit"}))["code"] == "KA010"
        assert (await tools.refused("query", {"sql": "execute p"}))["code"] == "26000"
        assert await rows(tools, "select count(*) from notes") == [[0]]
    assert not os.path.exists("/tmp/kakunin_copied")  # noqa: ASYNC240
    # None of it was an attempt, and each call was recorded before it was looked at.
    kinds = [kind for kind, _ in events(writer)]
    assert "unauthorized_access_attempt" not in kinds
    assert kinds.count("data_mutation") == sum(len(statement) > 0 for statement in NOT_QUERIES + SEVERAL)


@pytest.fixture(scope="module")
def traps(database: Database) -> Database:
    """What a database may have that agents can call: a function that writes as its owner, and dblink."""
    database.run("app", "create table written (by text)")
    database.run(
        "app",
        "create function write_it(by text) returns text security definer language sql"
        " begin atomic insert into written values ($1) returning by; end",
    )
    database.run("app", "create sequence counter")
    database.run("app", "grant usage on sequence counter to kakunin_agent")
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute("create extension if not exists dblink")
    return database


async def test_known_ways_around_read_only(
    agent: Agent, writer: Agent, traps: Database, tmp_path: Path
) -> None:
    add_notes(writer, "another's")
    forged = json.dumps({"kakunin_cert_serial": writer.serial})
    server = f"host=127.0.0.1 port={traps.cluster.port} dbname={traps.name}"
    refusals = {
        "select write_it('read-only')": {"25006"},
        "select nextval('counter')": {"25006"},
        "with w as (insert into notes values ('a', 'b') returning 1) select * from w": {"25006"},
        "create temp table t as select 1": {"25006"},
        "select 1 as a into temp t": {"25006"},
        "select set_config('transaction_read_only', 'off', true)": {"25001"},
        "select set_config('transaction_read_only', 'off', false)": {"25001"},
        "select set_config('role', 'app', false)": {"42501"},
        "select set_config('session_authorization', 'postgres', false)": {"42501"},
        "select set_config('session_replication_role', 'replica', false)": {"42501"},
        "select set_config('log_statement', 'none', false)": {"42501"},
        "select * from secrets": {"42501"},
        "select * from kakunin_private.session_keys": {"42501"},
        f"select kakunin.bind_serial('{writer.serial}')": {"42501"},
        f"select kakunin.bind_session('kkn1.1.{writer.serial}.1.9999999999.{'0' * 64}')": {"KA004"},
        "select query_to_xml('select * from secrets', true, true, '')": {"42501"},
        "select query_to_xml('insert into notes values (1, 2)', true, true, '')": {"25006", "0A000"},
        "select pg_read_file('/etc/passwd')": {"42501"},
        "select pg_read_binary_file('postgresql.conf')": {"42501"},
        "select pg_ls_dir('.')": {"42501"},
        "select lo_import('/etc/passwd')": {"42501", "25006"},
        "select lo_export(1, '/tmp/kakunin_lo')": {"42501", "25006"},
        f"select * from dblink('{server} user=postgres', 'select 1') t(a int)": {"2F003"},
        f"select dblink_connect('c', '{server} user=postgres password=x')": {"2F003", "08001"},
        "select dblink_connect_u('c', 'user=postgres')": {"42501"},
        "select pg_reload_conf()": {"42501"},
        "select pg_current_logfile()": {"42501"},
    }  # fmt: skip
    async with serving(environment(agent, tmp_path, "agent_1"), "--sql") as tools:
        for statement, codes in refusals.items():
            refused = await tools.refused("query", {"sql": statement})
            assert refused["code"] in codes, (statement, refused)
            assert refused.get("recorded") is (True if refused["code"] == "42501" else None)

        for batch in (
            [f"select set_config('request.jwt.claims', $${forged}$$, true)"],
            [
                f"select set_config('request.jwt.claims', $${forged}$$, false)",
                "select kakunin.unbind_session()",
            ],
            ["select kakunin.unbind_session()"],
            ["select set_config('row_security', 'off', true)"],
            [f"select set_config('kakunin.session', '1|{writer.serial}|x|0|{'0' * 64}', true)"],
        ):
            result = await tools.client.call_tool("query", {"statements": [*batch, "select * from notes"]})
            content = result.structured_content
            assert content.get("code") == "42501" or content["results"][-1]["rows"] == [], batch
        # A binding read out is of no use in the next call, nor to another backend.
        ((binding,),) = await rows(tools, "select current_setting('kakunin.session')")
        again = [
            "select kakunin.unbind_session()",
            f"select set_config('kakunin.session', '{binding}', false)",
            "select kakunin.current_cert_serial()",
        ]
        answer = await tools("query", {"statements": again})
        assert answer["results"][-1]["rows"] == [[None]]
        # Nor is there a ticket to read.
        seen = await rows(tools, "select query from pg_stat_activity where usename = session_user")
        assert not any("kkn1." in str(row) for row in seen)

        assert [k for k, _ in events(agent)].count("unauthorized_access_attempt") >= 10
        await tools.client.call_tool(
            "query", {"sql": "select lo_from_bytea(4711, 'x')"}
        )  # 15 lets it be written
    for count in ("select count(*) from written", "select count(*) from pg_largeobject_metadata"):
        assert traps.value("app", count) == 0


async def test_nothing_outlives_a_call(
    writer: Agent, agent: Agent, database: Database, tmp_path: Path
) -> None:
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql") as tools:
        leave = [
            "select set_config('statement_timeout', '0', false), set_config('search_path', 'nowhere', false)",
            "select set_config('standard_conforming_strings', 'off', false)",
            "select set_config('datestyle', 'German', false)",
            "select set_config('kakunin.mine', 'left', false)",
            "create temp table notes as select 'fake' as note",
            "create temp table left_over as select 1",
            "select pg_advisory_lock(4711), pg_advisory_lock_shared(4712)",
            "declare held cursor with hold for select 1",
        ]
        await tools("query", {"statements": leave, "write": True})
        left = (
            "select current_setting('statement_timeout'), current_setting('kakunin.mine', true),"
            " current_setting('datestyle'), to_regclass('left_over'), to_regclass('pg_temp.notes'),"
            " (select count(*) from pg_cursors where name <> ''),"
            " (select count(*) from pg_prepared_statements),"
            " (select count(*) from pg_locks where locktype = 'advisory' and objid in (4711, 4712))"
        )
        assert await rows(tools, left) == [["15s", None, "ISO, MDY", None, None, 0, 0, 0]]
        # Nobody's notifications are sent by a call that only reads.
        with database.connect("app", autocommit=True) as listener:
            listener.execute("listen forged")
            await rows(tools, "select pg_notify('forged', 'x')")
            assert list(listener.notifies(timeout=0.5)) == []
        # Its login's other sessions can be ended by it: the server's own is opened again.
        kill = (
            "select count(pg_terminate_backend(pid)) from pg_stat_activity"
            " where usename = session_user and pid <> pg_backend_pid()"
        )
        assert (await rows(tools, kill))[0][0] >= 1
        assert await rows(tools, "select 1") == [[1]]
        await tools("check_risk_score")


async def test_limits_hold_whatever_the_statement(writer: Agent, database: Database, tmp_path: Path) -> None:
    variables = environment(writer, tmp_path, "agent_1", KAKUNIN_TEST="limits")
    options = ["--sql", "--max-rows", "100", "--max-bytes", "50000", "--timeout", "2"]
    async with serving(variables, *options) as tools:
        memory = peak_memory("KAKUNIN_TEST=limits")

        async def timed(arguments: dict[str, Any]) -> dict[str, Any]:
            began = time.monotonic()
            result = await tools.client.call_tool("query", arguments)
            assert time.monotonic() - began < 8, arguments
            return result.structured_content

        (result,) = (await timed({"sql": "select generate_series(1, 1000000000)"}))["results"]
        assert (result["row_count"], result["truncated"]) == (100, "rows")
        # A function in FROM is worked out whole before its first row.
        assert (await timed({"sql": "select * from generate_series(1, 1000000000)"}))["code"] == "57014"
        (result,) = (await timed({"sql": "select repeat('x', 1000), generate_series(1, 1000000000)"}))[
            "results"
        ]
        assert result["truncated"] == "bytes"
        assert 40 <= result["row_count"] <= 50
        for large in (
            "select repeat('x', 100000000)",
            "select repeat('x', 30000000)::int",  # in the error's message
            "select generate_series(1, 1000000000) --" + "x" * 40_000,
            f"select {', '.join(f'1 as {chr(97 + n % 26) * 60}' for n in range(1000))}",
        ):
            answer = await timed({"sql": large})
            assert answer.get("code") == "result_too_large" or answer["results"][0]["truncated"] == "rows", (
                large[:60],
                answer,
            )
        for slow in (
            ["select pg_sleep(600)"],
            ["select count(*) from generate_series(1, 1000000000) a, generate_series(1, 1000000000) b"],
            ["select set_config('statement_timeout', '0', false)", "select pg_sleep(600)"],
            [
                "select set_config('client_connection_check_interval', '0', false)",
                "select set_config('statement_timeout', '0', true)",
                "select pg_sleep(600)",
            ],
        ):  # fmt: skip
            assert (await timed({"statements": slow}))["code"] == "57014", slow
        # To write, all or nothing.
        add_notes(writer, *map(str, range(3)))
        answer = await timed({"sql": "delete from notes returning repeat('x', 30000)", "write": True})
        assert answer["code"] == "result_too_large"
        assert len(notes(writer)) == 3
        assert peak_memory("KAKUNIN_TEST=limits") - memory < 40_000_000
    assert busy(database, 0)


def peak_memory(variable: str) -> int:
    status = Path(f"/proc/{server_with(variable)}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def busy(database: Database, expected: int, seconds: float = 6) -> bool:
    """Whether, in time, so many backends run a statement that takes long."""
    query = (
        "select count(*) from pg_stat_activity where datname = %s and usename = 'agent_1'"
        " and state = 'active' and query ~ 'pg_sleep|generate_series'"
    )
    with database.connect("postgres", autocommit=True) as admin:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if admin.execute(query, [database.name]).fetchone() == (expected,):
                return True
            time.sleep(0.05)
    return False


async def test_no_refusal_is_hidden_behind_a_limit(
    writer: Agent, agent: Agent, traps: Database, tmp_path: Path
) -> None:
    """What uses the bytes up first is not followed by a statement whose refusal would not be read."""
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql", "--max-bytes", "50000") as tools:

        def attempts() -> int:
            return [kind for kind, _ in events(writer)].count("unauthorized_access_attempt")

        for left in (0, 50, 150, 300, 1000, 3000, 3900, 4300, 6000):
            fill = f"select repeat('x', {50_000 - left - 200})"
            plant = f"insert into notes values ('{agent.serial}', 'planted')"
            for statement in ("select * from secrets", "select * from kakunin_private.ledger", plant):
                before = attempts()
                write = statement is plant
                refused = await tools.refused("query", {"statements": [fill, statement], "write": write})
                assert (refused["code"], attempts() - before) in {("42501", 1), ("result_too_large", 0)}
                if refused["code"] == "42501":
                    assert refused["recorded"] is True
                else:
                    assert left < 5000
        # Such a statement was not sent: what it would have made is not there, nor is it said to be unknown.
        ((before,),) = traps.run("app", "select last_value from counter")
        late = "select nextval('counter')"  # no rollback takes it back
        for left in range(0, 4000, 500):
            statements = [f"select repeat('x', {50_000 - left - 200})", late]
            refused = await tools.refused("query", {"statements": statements, "write": True})
            assert refused["code"] == "result_too_large"
            assert "nothing was changed" in refused["error"]
        assert traps.run("app", "select last_value from counter") == [(before,)]
        # And where it is the commit for which there is no room.
        insert = "insert into notes select kakunin.current_cert_serial(), 'a' returning repeat('x', 47000)"
        refused = await tools.refused("query", {"sql": insert, "write": True})
        assert refused["code"] == "result_too_large"
        assert "nothing was changed" in refused["error"]
    assert notes(writer) == []


# When something ends ----------------------------------------------------------------------------------


async def test_a_revocation_reaches_the_next_call(writer: Agent, tmp_path: Path) -> None:
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql") as tools:
        await rows(tools, "select 1")
        writer.revoke()
        for name, arguments in (
            ("query", {"sql": "select 1"}),
            ("query", {"sql": "insert into notes values ('a', 'b')", "write": True}),
            ("explain", {"sql": "select 1"}),
            ("describe_schema", {}),
        ):
            assert (await tools.refused(name, arguments))["code"] == "KA002"


async def test_a_call_that_cannot_be_recorded_does_not_run(writer: Agent, tmp_path: Path) -> None:
    insert = "insert into notes select kakunin.current_cert_serial(), 'unrecorded'"
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql") as tools:
        with writer.database.connect("postgres") as admin:
            admin.execute("lock table kakunin_private.ledger in access exclusive mode")
            refused = await tools.refused("query", {"sql": insert, "write": True})
            assert refused["code"] in {"55P03", "57014", "unavailable"}
        assert notes(writer) == []
        await tools("query", {"sql": insert, "write": True})
        assert notes(writer) == ["unrecorded"]


async def test_a_database_that_hangs_is_not_waited_for(
    agent: Agent, database: Database, tmp_path: Path
) -> None:
    """Past the ledger entry, at what comes before the statement."""
    options = ["--sql", "--timeout", "2"]
    async with serving(environment(agent, tmp_path, "agent_1"), *options) as tools:
        with database.connect("postgres") as admin:
            admin.execute(
                "lock table pg_parameter_acl in access exclusive mode"
            )  # read by what looks at the login
            began = time.monotonic()
            refused = await tools.refused("query", {"sql": "select 1"})
            assert refused["code"] == "unavailable"
            assert time.monotonic() - began < 20
        assert await rows(tools, "select 1") == [[1]]


async def test_a_call_given_up_by_the_client_is_ended(
    writer: Agent, database: Database, tmp_path: Path
) -> None:
    async with serving(environment(writer, tmp_path, "agent_1"), "--sql", "--timeout", "60") as tools:
        batch = ["insert into notes select kakunin.current_cert_serial(), 'given up'", "select pg_sleep(50)"]
        call = asyncio.ensure_future(tools("query", {"statements": batch, "write": True}))
        assert await asyncio.to_thread(busy, database, 1)
        call.cancel()
        assert await asyncio.to_thread(busy, database, 0)
        assert await rows(tools, "select 1") == [[1]]
    assert notes(writer) == []


async def test_a_server_killed_in_a_call_changes_nothing(
    writer: Agent, database: Database, tmp_path: Path
) -> None:
    variables = environment(writer, tmp_path, "agent_1", KAKUNIN_TEST="sql killed")
    batch = ["insert into notes select kakunin.current_cert_serial(), 'killed'", "select pg_sleep(50)"]
    with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever the client makes of a lost server)
        async with serving(variables, "--sql", "--timeout", "60") as tools:
            call = asyncio.ensure_future(tools("query", {"statements": batch, "write": True}))
            assert await asyncio.to_thread(busy, database, 1)
            os.kill(server_with("KAKUNIN_TEST=sql killed"), signal.SIGKILL)
            await asyncio.wait_for(call, 10)
    assert not isinstance(caught.value, (AssertionError, TimeoutError))
    assert busy(database, 0)
    assert notes(writer) == []
    assert events(writer)[-1][1]["statements"] == [digest(s) for s in batch]


async def test_a_database_lost_in_a_call_is_an_error(cluster: Cluster, tmp_path: Path) -> None:
    with fresh_database(cluster) as database:
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute("revoke create on schema public from public")
        agent = database.agent("atlas")
        async with serving(environment(agent, tmp_path, "agent_1"), "--sql") as tools:
            call = asyncio.ensure_future(tools.refused("query", {"sql": "select pg_sleep(10)"}))
            assert await asyncio.to_thread(busy, database, 1)
            await asyncio.to_thread(crash, cluster)
            try:
                lost = await call
                down = await tools.refused("query", {"sql": "select 1"})
            finally:
                await asyncio.to_thread(cluster.start)
            assert lost["code"] in {"unavailable", "57P01", "57P02"}
            assert down["code"] == "unavailable"
            assert await rows(tools, "select 1") == [[1]]


async def test_a_login_that_becomes_more_is_refused_at_the_next_call(
    agent: Agent, database: Database, tmp_path: Path
) -> None:
    async with serving(environment(agent, tmp_path, "agent_2"), "--sql") as tools:
        await rows(tools, "select 1")
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute("grant pg_read_all_data to agent_2")
            try:
                refused = await tools.refused("query", {"sql": "select * from secrets"})
            finally:
                admin.execute("revoke pg_read_all_data from agent_2")
        assert refused["code"] == "login_refused"
        assert "revoke pg_read_all_data from agent_2" in refused["hint"]
        await rows(tools, "select 1")


# Who may be the login ---------------------------------------------------------------------------------


OWNED = "create table owned (); alter table owned owner to {login}"
GATEWAY = "select kakunin.set_gateway_logins('{{{login}}}')"
# What makes the login more, and what the refusal says; what is granted is revoked again.
MORE = {
    "alter role {login} superuser": "alter role agent_2 nosuperuser",
    "alter role {login} bypassrls": "alter role agent_2 nobypassrls",
    "alter role {login} createrole": "alter role agent_2 nocreaterole",
    "alter role {login} createdb": "alter role agent_2 nocreatedb",
    "alter role {login} replication": "alter role agent_2 noreplication",
    "grant pg_read_all_data to {login}": "revoke pg_read_all_data from agent_2",
    "grant pg_execute_server_program to {login}": "revoke pg_execute_server_program from agent_2",
    "grant pg_read_server_files to kakunin_agent": "revoke pg_read_server_files from kakunin_agent",
    "grant kakunin_gateway to {login}": "revoke kakunin_gateway from agent_2",
    "grant app to {login}": "revoke app from agent_2",
    "grant kakunin_agent to {login} with admin option": "revoke admin option for kakunin_agent",
    "grant create on schema public to kakunin_agent": "revoke create on schema public",
    "grant create on schema public to public": "revoke create on schema public",
    "grant create on database {database} to {login}": "revoke create on database",
    "grant execute on function kakunin.bind_serial(text) to {login}": "bind_serial",
    "grant execute on function kakunin.bind_serial(text) to kakunin_agent": "bind_serial",
    "grant execute on function kakunin.continue_ledger() to kakunin_agent": "continue_ledger",
    "grant execute on function kakunin.trust_ca to kakunin_agent": "trust_ca",
    "grant execute on function pg_read_file(text) to public": "pg_read_file",
    "grant set on parameter session_replication_role to {login}": "session_replication_role",
    "grant usage on schema kakunin_private to {login}": "kakunin_private",
    "alter database {database} owner to {login}": "owns database",
    OWNED: "reassign owned by agent_2",
    GATEWAY: "claims are believed",
}
UNDONE = {
    "grant kakunin_agent to {login} with admin option": "revoke admin option for kakunin_agent from {login}",
    "alter database {database} owner to {login}": "alter database {database} owner to postgres",
    OWNED: "drop table owned",
    GATEWAY: "select kakunin.set_gateway_logins('{{}}')",
}


def undo(more: str) -> str:
    if more.startswith("alter role"):
        return "alter role {login} no" + more.rpartition(" ")[2]
    return UNDONE.get(more) or more.replace("grant", "revoke", 1).replace(" to ", " from ")


@pytest.mark.parametrize(("more", "said"), MORE.items())
def test_a_login_that_is_more_is_refused(database: Database, agent: Agent, more: str, said: str) -> None:
    names = {"login": "agent_2", "database": database.name}
    with database.connect("postgres", autocommit=True) as admin:
        with database.connect("agent_2") as connection:
            assert check_login(connection, agent.serial) == []
        admin.execute(more.format(**names))
        try:
            with database.connect("agent_2") as connection:
                with pytest.raises(LoginRefusedError, match="agent_2 is more than kakunin_agent") as caught:
                    check_login(connection, agent.serial)
        finally:
            admin.execute(undo(more).format(**names))
    assert said in f"{caught.value} {caught.value.hint}"


def test_the_server_does_not_start_for_such_a_login(agent: Agent, database: Database, tmp_path: Path) -> None:
    done = start(environment(agent, tmp_path, "pooled"), "--sql")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute("grant pg_read_all_data to pooled")
        try:
            done = start(environment(agent, tmp_path, "pooled"), "--sql")
        finally:
            admin.execute("revoke pg_read_all_data from pooled")
        assert done.returncode == 1
        assert "revoke pg_read_all_data from pooled" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        # The tables without row-level security that it may read are named, and are the DBA's to decide on.
        admin.execute("grant select on secrets to kakunin_agent")
        try:
            done = start(environment(agent, tmp_path, "pooled"), "--sql")
        finally:
            admin.execute("revoke select on secrets from kakunin_agent")
        assert done.returncode == 0
        assert "without row-level security: public.secrets" in done.stderr
