"""Attempts survive the rollback: what a policy or a scope refused a bound session is in the ledger."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy.exc
from conftest import Agent, Database, Vault
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool
from sqlalchemy import create_engine, text
from test_binding import KINDS, Client

from kakunin_db import (
    BadInputError,
    KakuninError,
    PolicyViolationError,
    ScopeViolationError,
    bind_agent_session,
    flush_attempts,
)
from kakunin_db.binding import attempts
from kakunin_db.binding.attempts import recorder
from kakunin_db.conninfo import dsn_of

ENTRIES = (
    "select metadata, serial, login from kakunin.audit_log"
    " where event_type = 'unauthorized_access_attempt' and agent_id = %s order by event_id"
)
REFUSED = "insert into vault (permitted_agent_serial, content) values ('AA:BB', 'secret-literal')"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The process's recorder as new, its thread ended with nothing left."""
    assert flush_attempts(5)
    before = dict(recorder.counters)
    recorder.counters.update(dict.fromkeys(before, 0))
    with recorder._changed:
        recorder._agents.clear()
        recorder._unrecorded = 0
    yield
    with recorder._changed:
        recorder._agents.clear()
        recorder._unrecorded = 0


@pytest.fixture
def vault(vault: Vault) -> Vault:
    """Observed: attempts make an agent critical, and here it is to go on."""
    vault.database.run("operator", 'select kakunin.set_risk(\'{"mode": "observe"}\')')
    return vault


def entries(agent: Agent) -> list[tuple[dict[str, Any], str, str]]:
    return agent.database.run("auditor", ENTRIES, [agent.agent_id])


def recorded(agent: Agent, timeout: float = 10) -> list[dict[str, Any]]:
    assert flush_attempts(timeout)
    return [metadata for metadata, _, _ in entries(agent)]


def digest(statement: str) -> str:
    return "sha256:" + hashlib.sha256(statement.encode()).hexdigest()


@pytest.fixture(params=KINDS)
async def client(request: pytest.FixtureRequest, vault: Vault) -> Any:
    async with Client(request.param, vault.database, "pooled") as client:
        yield client


async def test_an_attempt_outlives_the_rollback(client: Client, vault: Vault) -> None:
    with pytest.raises(PolicyViolationError, match="row-level security") as caught:
        async with client.bound(vault.one.credential) as handle:
            await client.run(handle, "select 1")
            await client.run(handle, REFUSED)
    assert caught.value.sqlstate == "42501"
    driver = psycopg.errors.InsufficientPrivilege if "psycopg" in client.driver else sqlalchemy.exc.DBAPIError
    assert isinstance(caught.value, driver)
    assert isinstance(caught.value.__cause__, Exception)
    assert recorded(vault.one) == [{"sqlstate": "42501", "statement": digest(REFUSED), "attempts": 1}]
    ((_, serial, login),) = entries(vault.one)
    assert (serial, login) == (vault.one.serial, "pooled")


async def test_a_scope_refused_is_an_attempt(client: Client, vault: Vault) -> None:
    statement = "select kakunin.require_scope('launch:missiles')"
    async with client.bound(vault.one.credential) as handle:
        with pytest.raises(ScopeViolationError) as caught:  # where it fails, not only leaving the block
            await client.run(handle, statement)
        assert caught.value.hint
        await client.rollback(handle)
        assert await client.rows(handle) == ["one-a", "one-b"]
    assert recorded(vault.one) == [{"sqlstate": "KA005", "statement": digest(statement), "attempts": 1}]


async def test_what_is_no_attempt_is_not_recorded(client: Client, vault: Vault) -> None:
    for statement in ("select 1/0", "select * from nowhere", "select kakunin.normalize_serial('x')"):
        with pytest.raises(Exception, match="zero|nowhere|serial"):
            async with client.bound(vault.one.credential) as handle:
                await client.run(handle, statement)
        async with client.unbound() as handle:
            await client.rollback(handle)
    async with client.unbound() as handle:
        with pytest.raises(Exception, match="row-level security") as caught:
            await client.run(handle, REFUSED)
        assert not isinstance(caught.value, KakuninError)
        await client.rollback(handle)
    assert recorder.counters["noted"] == 0


async def test_recording_can_be_turned_off(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        with pytest.raises(PolicyViolationError):
            with bind_agent_session(connection, vault.one.credential, record_attempts=False):
                connection.execute(REFUSED)
    assert recorder.counters["noted"] == 0


def test_the_original_error_stays_catchable_inside_the_block(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            for kind in (psycopg.errors.InsufficientPrivilege, PolicyViolationError, psycopg.DatabaseError):
                with pytest.raises(kind) as caught:
                    connection.execute(REFUSED)
                error: Any = caught.value
                assert error.diag.sqlstate == error.sqlstate == "42501"
                assert "row-level" in error.diag.message_primary
                connection.rollback()
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is PolicyViolationError
        assert str(copy) == str(error) == error.diag.message_primary
    engine = create_engine(vault.database.url("pooled"))
    with pytest.raises(sqlalchemy.exc.ProgrammingError) as raised:
        with bind_agent_session(engine, vault.one.credential) as bound:
            bound.execute(text(REFUSED))
    assert isinstance(raised.value, PolicyViolationError)
    assert isinstance(raised.value.orig, psycopg.errors.InsufficientPrivilege)
    assert type(pickle.loads(pickle.dumps(raised.value))) is PolicyViolationError
    engine.dispose()


def test_every_way_to_run_a_statement_is_watched(vault: Vault) -> None:
    with vault.database.connect("app", autocommit=True) as app:
        app.execute("create table private (id int)")  # nobody else's
        # A privilege that is only missed at the commit.
        app.execute(
            "create function late() returns trigger language plpgsql as"
            " $$ begin perform kakunin.require_scope('never'); return null; end $$"
        )
        app.execute(
            "create constraint trigger late after insert on vault deferrable initially deferred"
            " for each row when (new.content = 'late') execute function late()"
        )
    denied = "select id from private"
    late = f"insert into vault (permitted_agent_serial, content) values ('{vault.one.serial}', 'late')"
    made = 0
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            cursor = connection.cursor()

            def many() -> None:
                cursor.executemany(denied, [[], []])

            def stream() -> None:
                list(cursor.stream(denied))

            def copy() -> None:
                with cursor.copy("copy private to stdout"):
                    pass

            def named() -> None:
                with connection.cursor("named") as server:
                    server.execute(denied)

            def composed() -> None:
                connection.execute(sql.SQL("select id from {}").format(sql.Identifier("private")))

            def piped() -> None:
                with connection.pipeline():
                    connection.execute(denied)

            def commit() -> None:
                connection.execute(late)
                connection.commit()

            def block() -> None:
                with connection.transaction():
                    connection.execute(late)

            for act in (many, stream, copy, named, composed, piped, commit, block):
                connection.rollback()
                with pytest.raises((PolicyViolationError, ScopeViolationError)):
                    act()
                made += 1
                assert recorder.counters["noted"] == made, act
                connection.rollback()
                time.sleep(0.02)
    found = recorded(vault.one)
    assert sum(entry["attempts"] for entry in found) == made
    assert [entry.get("statement") == digest(denied) for entry in found[:2]] == [True, True]
    with vault.database.connect("app", autocommit=True) as app:
        app.execute("drop table private")
        app.execute("drop function late cascade")


def test_gateways_record_for_the_agent_they_bound(vault: Vault) -> None:
    with vault.database.connect("gateway") as connection:
        with bind_agent_session(connection, vault.two.serial):
            with pytest.raises(PolicyViolationError):
                connection.execute(REFUSED)
            connection.rollback()
    assert len(recorded(vault.two)) == 1
    assert entries(vault.two)[0][2] == "gateway"


def test_a_binding_that_is_refused_is_no_attempt(vault: Vault) -> None:
    with vault.database.connect("agent_1") as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            with bind_agent_session(connection, vault.two.serial):
                connection.execute("select 1")
    assert not isinstance(caught.value, KakuninError)
    assert recorder.counters["noted"] == 0


def test_another_connections_error_is_not_the_agents(vault: Vault) -> None:
    """An exception that only passes through the block says nothing about the agent."""
    with vault.database.connect("pooled") as connection, vault.database.connect("stranger") as other:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            with bind_agent_session(connection, vault.one.credential):
                connection.execute("select 1")
                other.execute("select * from vault")
    assert recorder.counters["noted"] == 0


def test_another_login_can_record(vault: Vault) -> None:
    with pytest.raises(BadInputError, match="attempts_dsn"):
        bind_agent_session(object(), "AA:BB", attempts_dsn="password=hunter2 nonsense")  # type: ignore[call-overload]
    with vault.database.connect("pooled") as connection:
        dsn = vault.database.dsn("agent_2")
        with pytest.raises(PolicyViolationError):
            with bind_agent_session(connection, vault.one.credential, attempts_dsn=dsn):
                connection.execute(REFUSED)
    assert len(recorded(vault.one)) == 1
    assert entries(vault.one)[0][2] == "agent_2"


def test_a_revoked_agent_is_refused_once_and_not_again(
    vault: Vault, caplog: pytest.LogCaptureFixture
) -> None:
    victim = vault.database.agent("victim")
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, victim.credential):
            connection.execute("select 1")
            victim.revoke()
            with caplog.at_level(logging.WARNING, "kakunin_db.attempts"), pytest.raises(PolicyViolationError):
                connection.execute(REFUSED)
            assert flush_attempts(10)
            connection.rollback()
    time.sleep(0.5)
    assert recorder.counters | {"entries": 0} == recorder.counters
    assert (recorder.counters["noted"], recorder.counters["lost"], recorder.counters["failures"]) == (1, 1, 1)
    assert "was revoked" in caplog.text
    # What was lost is told with the next one that is not.
    with vault.database.connect("pooled") as connection:
        with pytest.raises(PolicyViolationError), bind_agent_session(connection, vault.one.credential):
            connection.execute(REFUSED)
    assert recorded(vault.one)[-1]["unrecorded"] == 1


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as listener:
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("how", ["down", "silent"])
def test_a_recorders_database_that_is_away_holds_up_nothing(vault: Vault, how: str) -> None:
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(silent_server()) if how == "silent" else 1
        dsn = f"host=127.0.0.1 port={port} dbname=nowhere user=nobody"
        connection = stack.enter_context(vault.database.connect("pooled"))
        with bind_agent_session(connection, vault.one.credential, attempts_dsn=dsn):
            connection.execute("select 1")
            connection.rollback()
            begun = time.monotonic()
            for _ in range(20):
                with pytest.raises(PolicyViolationError):
                    connection.execute(REFUSED)
                connection.rollback()
            assert time.monotonic() - begun < 2
            begun = time.monotonic()
            assert not flush_attempts(0.5)
            assert time.monotonic() - begun < 1.5
        assert recorder.counters["entries"] == 0
        waiting = [a for agent in recorder._agents.values() for a in agent.waiting]
        assert len(waiting) <= attempts.BURST
        # It tries again by itself, once the database is there: nothing was forgotten.
        with recorder._changed:
            for agent in recorder._agents.values():
                agent.dsn = vault.database.dsn("pooled")
    assert sum(entry["attempts"] for entry in recorded(vault.one, 20)) == 20


def test_a_server_that_hangs_is_let_go_of(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connected, and then nothing: a lock that another session holds on what the append needs."""
    monkeypatch.setattr(attempts, "ON_TIME", 1.0)
    monkeypatch.setattr(attempts, "LIMITS", "select 1")  # so that only the thread's own limit is left
    with vault.database.connect("postgres") as holder, vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            connection.execute("select 1")
            connection.rollback()
            with pytest.raises(PolicyViolationError):
                connection.execute(REFUSED)
            connection.rollback()
            assert flush_attempts(10)
            holder.execute("lock table kakunin_private.chains in access exclusive mode")
            with pytest.raises(PolicyViolationError):
                connection.execute(REFUSED)
            connection.rollback()
            assert not flush_attempts(3)
            assert recorder.counters["failures"] >= 1
            holder.rollback()
            assert len(recorded(vault.one)) == 2


def test_a_commit_whose_answer_is_lost_is_not_recorded_twice(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = psycopg.Connection.commit
    lost = 0

    def unanswered(connection: psycopg.Connection[Any]) -> None:
        nonlocal lost
        commit(connection)
        if threading.current_thread().name == "kakunin-attempts" and not lost:
            lost += 1
            raise psycopg.OperationalError("the connection was lost")

    monkeypatch.setattr(psycopg.Connection, "commit", unanswered)
    refuse_once(vault.database, vault.one)
    deadline = time.monotonic() + 10
    while not recorder.counters["failures"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    refuse_once(vault.database, vault.one)  # and is not counted into the one that is there
    assert [entry["attempts"] for entry in recorded(vault.one)] == [1, 1]
    assert (lost, recorder.counters["recorded"]) == (1, 2)


def test_a_flood_is_bounded(vault: Vault) -> None:
    """Ten thousand failures of one agent: a few entries, one thread, and every failure counted."""
    before = threading.active_count()
    begun = time.monotonic()
    failures = 10_000
    with vault.database.connect("pooled", autocommit=True) as connection:
        with bind_agent_session(connection, vault.one.credential):
            for n in range(failures):
                with contextlib.suppress(PolicyViolationError):
                    connection.execute(f"{REFUSED} -- {n}")
        assert threading.active_count() <= before + 1
    found = recorded(vault.one)
    elapsed = time.monotonic() - begun
    assert sum(entry["attempts"] for entry in found) == recorder.counters["recorded"] == failures
    assert len(found) <= attempts.BURST + elapsed / attempts.REFILL + 2
    assert recorder.counters["lost"] == 0


def test_many_agents_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "AGENTS", 3)
    error = PolicyViolationError("no")
    for n in range(1, 11):
        bearer = attempts.Bearer(f"{n:02X}", recorder=recorder)
        recorder.note(bearer, error, None, "here", lambda: "host=127.0.0.1 port=1 user=nobody")
    assert len(recorder._agents) == 3
    assert recorder.counters["lost"] == 7
    assert recorder.counters["noted"] == 10


def test_nothing_of_noting_reaches_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    bearer = attempts.Bearer("AA", recorder=recorder)
    error = PolicyViolationError("no")

    def broken() -> str:
        raise RuntimeError("password=hunter2")

    recorder.note(bearer, error, None, "here", broken)
    assert recorder.counters["failures"] == 1
    recorder.note(bearer, error, None, "here", lambda: None)
    assert recorder.counters["skipped"] == 1
    # Interrupted by a signal whose handler fails as well, in the middle of a note.
    with recorder._changed:
        holder = threading.Thread(
            target=recorder.note, args=(bearer, error, None, "here", lambda: "host=127.0.0.1 port=1")
        )
        begun = time.monotonic()
        holder.start()
        holder.join(2)
        assert not holder.is_alive()
        assert time.monotonic() - begun < 1
    assert recorder.counters["lost"] == 1


def test_the_rate_lets_three_through_at_once_and_then_one_in_a_while() -> None:
    agent = attempts._Agent(attempts.Bearer("AA"), "")
    for n in range(100):
        agent.add(attempts._Attempt({"n": n}, 0))
    assert len(agent.waiting) == attempts.BURST
    assert sum(a.attempts for a in agent.waiting) == 100
    agent.waiting.clear()
    agent.tokens = 0.5
    agent.add(attempts._Attempt({}, 0))
    agent.add(attempts._Attempt({}, 0))
    assert [a.attempts for a in agent.waiting] == [2]
    due = agent.due(draining=False)
    assert due is not None
    assert due == pytest.approx(agent.refilled + attempts.REFILL / 2)


def test_a_pool_records_with_its_password(vault: Vault) -> None:
    with ConnectionPool(vault.database.dsn("pooled"), min_size=1, max_size=1, open=True) as pool:
        with pytest.raises(PolicyViolationError), bind_agent_session(pool, vault.one.credential) as bound:
            bound.execute(REFUSED)
        assert len(recorded(vault.one)) == 1
        with pool.connection() as connection:  # and is as it was
            assert "wait" not in vars(connection)
            assert "transaction" not in vars(connection)


def test_a_connection_is_made_like_the_one_that_is_there(vault: Vault) -> None:
    dsn = f"{vault.database.dsn('pooled')} password='pa ss\\'' sslmode=disable options='-c work_mem=1MB'"
    with psycopg.connect(dsn) as connection:
        again = conninfo_to_dict(dsn_of(connection))
    wanted = conninfo_to_dict(dsn)
    assert {name: again.get(name) for name in wanted} == wanted
    with pytest.raises(psycopg.OperationalError):
        dsn_of(connection)


def test_a_sqlalchemy_creator_is_seen_through(vault: Vault) -> None:
    dsn = vault.database.dsn("pooled")
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with pytest.raises(PolicyViolationError), bind_agent_session(engine, vault.one.credential) as bound:
        bound.execute(text(REFUSED))
    engine.dispose()
    assert len(recorded(vault.one)) == 1


async def test_asyncpgs_own_creator_is_told_of(vault: Vault, caplog: pytest.LogCaptureFixture) -> None:
    import asyncpg
    from sqlalchemy.ext.asyncio import create_async_engine

    cluster = vault.database.cluster

    async def creator() -> Any:
        return await asyncpg.connect(
            host="127.0.0.1", port=cluster.port, user="pooled", database=vault.database.name
        )

    recorder._told = False
    engine = create_async_engine("postgresql+asyncpg://", async_creator=creator)
    for _ in range(2):
        with pytest.raises(PolicyViolationError):
            async with bind_agent_session(engine, vault.one.credential) as bound:
                await bound.execute(text(REFUSED))
    dsn = vault.database.dsn("pooled")
    with pytest.raises(PolicyViolationError):
        async with bind_agent_session(engine, vault.one.credential, attempts_dsn=dsn) as bound:
            await bound.execute(text(REFUSED))
    await engine.dispose()
    assert recorder.counters["skipped"] == 2
    assert caplog.text.count("attempts_dsn") == 1
    assert len(recorded(vault.one)) == 1


# What an attacker tries -------------------------------------------------------------------------------


def test_the_entry_holds_no_text_of_the_statement_or_its_parameters(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            with pytest.raises(PolicyViolationError):
                insert = (
                    "insert into vault (permitted_agent_serial, content) values ('AA:BB', %s || 'lit-s3')"
                )
                connection.execute(insert, ["parameter-s3"])
            connection.rollback()
            statement = "select kakunin.require_scope('scope-s3')"
            with pytest.raises(ScopeViolationError):
                connection.execute(statement)
            connection.rollback()
    text_of_it = json.dumps(recorded(vault.one))
    assert "s3" not in text_of_it
    assert "row-level" not in text_of_it


def test_who_triggers_the_error_chooses_no_more_than_names(vault: Vault) -> None:
    """SQL can raise any error with any fields: message, hint, detail, and names of any length."""
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            forged = (
                "do $$ begin raise exception using errcode = %s, message = 'evil-message',"
                " detail = 'evil-detail', hint = 'evil-hint', column = 'evil-column',"
                " constraint = 'evil-constraint',"
                " datatype = 'evil-type', table = repeat('t\"}', 100000), schema = repeat('é', 1000); end $$"
            )
            for state in ("'42501'", "'KA005'"):
                with pytest.raises(KakuninError, match="evil-message"):
                    connection.execute(forged.replace("%s", state))
                connection.rollback()
    for entry, state in zip(recorded(vault.one), ("42501", "KA005"), strict=True):
        assert set(entry) == {"sqlstate", "schema", "table", "statement", "attempts"}
        assert entry["sqlstate"] == state
        assert entry["table"] == ('t"}' * 21)
        assert entry["schema"] == "é" * 63
        assert "evil" not in json.dumps(entry)


def test_settings_of_the_login_do_not_keep_the_recorder_out(vault: Vault) -> None:
    """An agent may change what its login's next connections begin with."""
    try:
        with vault.database.connect("agent_1") as connection:
            for setting in (
                "default_transaction_read_only = on",
                "default_transaction_isolation = 'serializable'",
                "statement_timeout = 1",
                "search_path = nowhere",
                "client_encoding = 'LATIN1'",
            ):
                connection.execute(f"alter role agent_1 set {setting}")
            connection.commit()
            with pytest.raises(PolicyViolationError), bind_agent_session(connection, vault.one.credential):
                connection.execute(REFUSED)
        assert len(recorded(vault.one)) == 1
    finally:
        vault.database.run("postgres", "alter role agent_1 reset all")


# Processes ---------------------------------------------------------------------------------------------


def refuse_once(database: Database, agent: Agent) -> None:
    with database.connect("pooled") as connection:
        with pytest.raises(PolicyViolationError), bind_agent_session(connection, agent.credential):
            connection.execute(REFUSED)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_records_for_itself(vault: Vault) -> None:
    refuse_once(vault.database, vault.one)
    assert len(recorded(vault.one)) == 1
    parents = recorder._connection
    assert parents is not None
    # The parent's note that waits is not the child's.
    with recorder._changed:
        note = attempts._Attempt({"sqlstate": "42501"}, time.monotonic())
        agent = next(iter(recorder._agents.values()))
        agent.not_before = time.monotonic() + 60
        agent.waiting.append(note)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert recorder._thread is None
            assert not recorder._agents
            refuse_once(vault.database, vault.one)
            assert flush_attempts(10)
            assert recorder.counters["entries"] == 1
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(entries(vault.one)) == 2
    assert recorder._connection is parents
    assert len(recorded(vault.one)) == 3  # on the connection that the child has left alone
    assert recorder.counters["failures"] == 0


@pytest.mark.parametrize("away", [False, True])
def test_an_interpreter_that_exits_records_first(vault: Vault, away: bool) -> None:
    key = vault.one.signer._key if hasattr(vault.one.signer, "_key") else None
    assert key is not None
    from cryptography.hazmat.primitives import serialization

    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    program = textwrap.dedent(f"""
        import psycopg
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from kakunin_db import AgentCredential, LocalSigner, PolicyViolationError, bind_agent_session
        signer = LocalSigner(load_pem_private_key({pem!r}, None))
        credential = AgentCredential({str(vault.one.agent_id)!r}, {vault.one.serial!r}, signer)
        with psycopg.connect({vault.database.dsn("pooled")!r}) as connection:
            dsn = {"host=127.0.0.1 port=1 user=nobody" if away else None!r}
            try:
                with bind_agent_session(connection, credential, attempts_dsn=dsn):
                    for _ in range(20):
                        try:
                            connection.execute({REFUSED!r})
                        except PolicyViolationError:
                            connection.rollback()
            finally:
                connection.rollback()
    """)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begun < 20
    found = [metadata["attempts"] for metadata, _, _ in entries(vault.one)]
    assert sum(found) == (0 if away else 20)
    if away:
        assert "was not recorded yet" in done.stderr
