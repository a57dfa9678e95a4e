"""What the guards of all frameworks are made of, without a framework."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import subprocess
import sys
import threading
import time
import uuid
from typing import Any

import pytest
from conftest import Agent, Database

from kakunin_db import (
    AsyncKakunin,
    BadInputError,
    CertificateRevokedError,
    Kakunin,
    KakuninError,
    Monitor,
    ScopeViolationError,
)
from kakunin_db.integrations.base import Guarded, monitor_of


def recorded(database: Database, agent: Agent) -> list[tuple[str, dict[str, Any]]]:
    return database.run(
        "auditor",
        "select event_type, metadata from kakunin.audit_log where agent_id = %s and risk is not null"
        " order by event_id",
        [agent.agent_id],
    )


def functions(ran: list[str]) -> dict[str, Any]:
    def plain(x: str) -> str:
        """What it does."""
        ran.append(x)
        return x

    def generator(x: str) -> Any:
        ran.append(x)
        yield x

    async def coroutine(x: str) -> str:
        ran.append(x)
        return x

    async def async_generator(x: str) -> Any:
        ran.append(x)
        yield x

    class Called:
        def __call__(self, x: str) -> str:
            return plain(x)

    class AsyncCalled:
        async def __call__(self, x: str) -> str:
            return plain(x)

    return {
        "plain": plain,
        "generator": generator,
        "coroutine": coroutine,
        "async_generator": async_generator,
        "object": Called(),
        "async object": AsyncCalled(),
        "method": Called().__call__,
        "partial": functools.partial(plain),
        "async partial": functools.partial(functools.partial(coroutine)),
        "class": str,
    }


def exhaust(returned: Any) -> Any:
    """What a call comes to, whatever it returned."""

    async def items() -> list[Any]:
        return [item async for item in returned]

    async def result() -> Any:
        return await returned

    if inspect.isasyncgen(returned):
        return asyncio.run(items())
    if inspect.iscoroutine(returned):
        return asyncio.run(result())
    return list(returned) if inspect.isgenerator(returned) else returned


@pytest.mark.parametrize("kind", functions([]))
def test_functions_of_every_kind(database: Database, kind: str) -> None:
    agent, ran = database.agent(permitted_actions=["a"]), []
    function = functions(ran)[kind]
    with Kakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
        guarded = Guarded("x", kakunin, required_scopes=["a"]).wrap(function, tool="t")
        if kind != "class":
            assert inspect.signature(guarded) == inspect.signature(function)
        assert guarded.__doc__ == function.__doc__
        assert exhaust(guarded("in")) == exhaust(function("in"))
        assert ran == ([] if kind == "class" else ["in", "in"])
        assert monitor_of(kakunin).flush(30)
        agent.revoke()
        with pytest.raises(CertificateRevokedError):
            exhaust(guarded("in"))
        assert ran == ([] if kind == "class" else ["in", "in"])
        assert monitor_of(kakunin).close(30)
    ((event_type, metadata),) = recorded(database, agent)
    assert event_type == "api_call"
    assert metadata.pop("seconds") >= 0
    assert metadata == {"framework": "x", "tool": "t", "outcome": "returned"}


async def test_one_block_for_both(database: Database) -> None:
    agent = database.agent(permitted_actions=["a"])
    async with AsyncKakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
        guarded = Guarded("x", kakunin, event_type="data_access")
        with pytest.raises(LookupError):
            async with guarded.call(tool="t"):
                raise LookupError("secret")
        with pytest.raises(BadInputError, match="async"), guarded.call(tool="t"):
            pytest.fail("it was entered")
        assert await asyncio.to_thread(monitor_of(kakunin).close, 30)
    ((event_type, metadata),) = recorded(database, agent)
    assert event_type == "data_access"
    assert (metadata["outcome"], metadata["error"]) == ("raised", "LookupError")
    assert "secret" not in repr(metadata)


def test_attempts(database: Database) -> None:
    """What a scope refuses is one; a guard that is another agent's, or of a revoked agent, is none."""
    agent = database.agent(permitted_actions=["a"])
    with Kakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
        for guarded in (
            Guarded("x", kakunin, required_scopes=["b"]),
            Guarded("x", kakunin, required_scopes=["b"], monitored=False),
            Guarded("x", kakunin, uuid.UUID(int=7), ["a"]),
        ):
            with pytest.raises(ScopeViolationError):
                guarded.check(tool="t")
        assert monitor_of(kakunin).flush(30)
        agent.revoke()
        with pytest.raises(CertificateRevokedError):
            Guarded("x", kakunin).check(tool="t")
        monitor = monitor_of(kakunin)
        assert monitor.close(30)
        assert monitor.counters["noted"] == monitor.counters["recorded"] == 1
    assert recorded(database, agent) == [
        ("unauthorized_access_attempt", {"framework": "x", "tool": "t", "sqlstate": "KA005"})
    ]


def test_a_refusal_of_the_frameworks_own(database: Database) -> None:
    class TheirError(Exception):
        pass

    class Translated(Guarded):
        def refusal(self, error: KakuninError) -> Exception:
            return TheirError(str(error))

    with Kakunin(database.dsn("agent_1"), credential=database.agent().credential) as kakunin:
        guarded = Translated("x", kakunin, required_scopes=["b"], monitored=False)
        with pytest.raises(TheirError, match="'b'"):
            guarded.wrap(lambda: pytest.fail("it ran"), tool="t")()


def test_one_monitor_a_client(database: Database) -> None:
    """Shared by its guards, and gone with it; what was noted is recorded."""
    agent = database.agent()
    kakunin = Kakunin(database.dsn("agent_1"), credential=agent.credential)
    guards = [Guarded("x", kakunin), Guarded("x", kakunin)]
    own = Monitor(kakunin)
    assert guards[0].monitor is guards[1].monitor is monitor_of(kakunin)
    assert Guarded("x", kakunin, monitor=own).monitor is own
    assert Guarded("x", kakunin, monitor=own, monitored=False).monitor is None
    for guard in guards:
        guard.wrap(lambda: None, tool="t")()
    before = {thread for thread in threading.enumerate() if thread.name == "kakunin-monitor"}
    thread = monitor_of(kakunin)._thread
    assert thread in before
    kakunin.close()
    del kakunin, guards, guard
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert len(recorded(database, agent)) == 2


def test_what_cannot_guard(database: Database) -> None:
    dsn = database.dsn("agent_1")
    acting = Kakunin(dsn, credential=database.agent().credential)
    for make in (
        lambda: Guarded("x", None),  # type: ignore[arg-type]
        lambda: Guarded("x", Kakunin(dsn)),
        lambda: Guarded("x", acting, "agt-123"),
        lambda: Guarded("x", acting, required_scopes="a"),
        lambda: Guarded("x", acting, monitor=object()),  # type: ignore[arg-type]
    ):
        with pytest.raises(BadInputError):
            make()


def test_a_refusal_does_not_wait_for_the_ledger(database: Database) -> None:
    agent = database.agent()
    with Kakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
        guarded = Guarded("x", kakunin).wrap(lambda: None, tool="t")
        guarded()
        assert monitor_of(kakunin).flush(30)
        with database.connect("postgres") as admin:
            # What appending waits for, and checking does not.
            admin.execute("lock table kakunin_private.chains in exclusive mode")
            begun = time.monotonic()
            for _ in range(5):
                guarded()
            assert time.monotonic() - begun < 5
            assert len(recorded(database, agent)) == 1
        assert monitor_of(kakunin).close(30)
    assert len(recorded(database, agent)) == 6


def test_no_framework_is_imported() -> None:
    program = (
        "import sys, kakunin_db, kakunin_db.integrations, kakunin_db.integrations.base\n"
        "names = ('autogen', 'camel', 'crewai', 'google', 'langchain', 'langchain_core', 'langgraph',"
        " 'llama_index')\n"
        "assert not [name for name in names if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
