"""Events recorded beside what an agent does: none is lost unseen, and none slows it down."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import psycopg
import pytest
from conftest import Database
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from kakunin_db import AsyncKakunin, BadInputError, Kakunin, Monitor, bind_agent_session

EVENTS = (
    "select event_type, metadata, session_id from kakunin.audit_log"
    " where agent_id = %s and risk is not null order by event_id"
)


def recorded(database: Database, agent: Any) -> list[Any]:
    return database.run("auditor", EVENTS, [agent.agent_id])


def test_events_are_recorded_in_order(database: Database) -> None:
    agent = database.agent()
    monitor = Monitor(Kakunin(database.dsn("agent_1"), credential=agent.credential))
    for n in range(50):
        assert monitor.record("api_call", {"n": n}, session_id="s")
    assert monitor.flush(30)
    assert recorded(database, agent) == [("api_call", {"n": n}, "s") for n in range(50)]
    assert monitor.counters == {"noted": 50, "recorded": 50, "dropped": 0, "failures": 0}
    assert monitor.close()
    assert not monitor.record("api_call")


@pytest.mark.parametrize("how", ["dsn", "async", "pool", "bound", "gateway"])
def test_a_connection_like_the_clients(database: Database, how: str) -> None:
    agent = database.agent()
    dsn = database.dsn("agent_1")

    async def asynchronous() -> None:
        async with AsyncConnectionPool(
            dsn, kwargs={"autocommit": True}, min_size=0, max_size=1, open=False
        ) as pool:
            monitor = Monitor(AsyncKakunin(pool, credential=agent.credential))
            monitor.record("api_call")
            assert await asyncio.to_thread(monitor.close, 30)

    if how == "async":
        asyncio.run(asynchronous())
    elif how == "pool":
        with ConnectionPool(
            "", kwargs=psycopg.conninfo.conninfo_to_dict(dsn), min_size=0, max_size=1, open=True
        ) as pool:
            monitor = Monitor(Kakunin(pool, credential=agent.credential))
            monitor.record("api_call")
            assert monitor.close(30)
    elif how == "bound":
        with (
            database.connect("agent_1") as connection,
            bind_agent_session(connection, agent.credential) as bound,
        ):
            monitor = Monitor(Kakunin(bound))
            monitor.record("api_call")
            assert monitor.close(30)
            bound.rollback()
    else:
        login, credential = ("agent_1", agent.credential) if how == "dsn" else ("gateway", agent.serial)
        monitor = Monitor(Kakunin(database.dsn(login), credential=credential))  # type: ignore[arg-type]
        monitor.record("api_call")
        assert monitor.close(30)
    assert recorded(database, agent) == [("api_call", {}, None)]


def test_what_is_noted_does_not_wait(database: Database) -> None:
    """Not for a database that holds everything up; and what waits is recorded afterwards."""
    agent = database.agent()
    monitor = Monitor(Kakunin(database.dsn("agent_1"), credential=agent.credential), size=10)
    with database.connect("postgres") as admin:
        admin.execute("lock table kakunin_private.certificates in access exclusive mode")
        begun = time.monotonic()
        taken = [monitor.record("api_call", {"n": n}) for n in range(30)]
        assert time.monotonic() - begun < 2
        assert taken == [True] * 10 + [False] * 20
        assert not monitor.flush(0.2)
    assert monitor.flush(60)
    assert monitor.counters["dropped"] == 20
    monitor.record("api_call", {"n": "next"})
    assert monitor.close(30)
    events = [metadata for _, metadata, _ in recorded(database, agent)]
    assert [metadata["n"] for metadata in events] == [*range(10), "next"]
    # The agent's own ledger says how many are missing.
    assert sum(metadata.get("unrecorded", 0) for metadata in events) == 20


def test_a_database_that_comes_back(database: Database) -> None:
    agent = database.agent()
    target = psycopg.conninfo.conninfo_to_dict(database.dsn("agent_1"))
    monitor = Monitor(Kakunin(database.dsn("agent_1"), credential=agent.credential))
    monitor.record("api_call", {"n": 0})
    assert monitor.flush(30)
    database.run(
        "postgres",
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'agent_1' and datname = %s",
        [target["dbname"]],
    )
    monitor.record("api_call", {"n": 1})
    assert monitor.close(30)
    assert [metadata["n"] for _, metadata, _ in recorded(database, agent)] == [0, 1]


def test_a_revoked_agent_records_nothing_more(database: Database) -> None:
    agent = database.agent()
    monitor = Monitor(Kakunin(database.dsn("agent_1"), credential=agent.credential))
    monitor.record("api_call")
    assert monitor.flush(30)
    agent.revoke()
    monitor.record("api_call")
    monitor.record("api_call")
    assert monitor.close(30)
    assert (monitor.counters["recorded"], monitor.counters["dropped"]) == (1, 2)


class Odd:
    def __str__(self) -> str:
        raise RuntimeError


def test_whatever_is_noted(database: Database) -> None:
    agent = database.agent()
    monitor = Monitor(Kakunin(database.dsn("agent_1"), credential=agent.credential))
    for event_type, metadata in (
        ("api_call", {"at": time.struct_time(range(9)), "thread": threading.current_thread().__class__}),
        ("api_call", {"nan": float("nan")}),
        ("api_call", {("a", "b"): 1}),
        ("api_call", {"odd": Odd()}),
        ("api_call", {"zero": "\x00"}),
        ("api_call", {"long": "x" * 20000}),
        ("agent.halted", {}),
        ("data_access", {"rows": 1}),
    ):
        assert monitor.record(event_type, metadata)
    assert monitor.close(30)
    events = recorded(database, agent)
    assert events[1:3] == [
        ("api_call", {"metadata_error": "ValueError"}, None),
        ("api_call", {"metadata_error": "TypeError"}, None),
    ]
    assert events[-1][0] == "data_access"
    assert monitor.counters["recorded"] + monitor.counters["dropped"] == 8
    assert monitor.counters["dropped"] == 3  # the kit's own name, what is too long, and what no text may hold


def test_who_acts_for_nobody(database: Database) -> None:
    with pytest.raises(BadInputError, match="acts for nobody"):
        Monitor(Kakunin(database.dsn("agent_1")))
    with pytest.raises(BadInputError):
        Monitor(Kakunin(database.dsn("agent_1"), credential=database.agent().credential), size=0)


@pytest.mark.parametrize("fork", [False, True])
def test_recorded_as_the_program_ends(database: Database, tmp_path: Any, fork: bool) -> None:
    agent = database.agent()
    agent.signer.save(tmp_path / "key.pem", b"x")
    program = f"""
        import os, sys
        from kakunin_db import AgentCredential, Kakunin, LocalSigner, Monitor
        signer = LocalSigner.load({str(tmp_path / "key.pem")!r}, b"x")
        credential = AgentCredential({str(agent.agent_id)!r}, {agent.serial!r}, signer)
        monitor = Monitor(Kakunin({database.dsn("agent_1")!r}, credential=credential))
        monitor.record("api_call", {{"n": 0}})
        if {fork}:
            monitor.flush(30)
            child = os.fork()
            if child == 0:
                monitor.record("api_call", {{"n": 1}})
                sys.exit(0)
            os.waitpid(child, 0)
            monitor.record("api_call", {{"n": 2}})
    """
    subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        check=True,
        timeout=60,
        env=os.environ,
    )
    assert [metadata["n"] for _, metadata, _ in recorded(database, agent)] == ([0, 1, 2] if fork else [0])
