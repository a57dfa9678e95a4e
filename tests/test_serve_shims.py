"""The published SDK's framework shims against `kakunin-db serve`: what they guard does not run for an agent
that was stopped, and what they emit is in the ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from api import Server, api_key, served
from conftest import Agent, Database

pytest.importorskip("kakunin", reason="the SDK is not installed")
import kakunin
from kakunin import exceptions
from kakunin.integrations.camel import KakuninToolkit
from kakunin.integrations.google_antigravity import get_kakunin_hooks
from kakunin.integrations.langchain import KakuninToolGuard, langchain_scope_callback
from kakunin.integrations.langgraph import kakunin_node
from kakunin.integrations.llamaindex import KakuninFunctionToolGuard
from kakunin.integrations.openai_assistants import handle_assistants_requires_action


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Server]:
    with served(database) as server:
        yield server


@pytest.fixture
def sdk(server: Server) -> kakunin.Kakunin:
    return server.sdk(api_key(server.database, "agents:read", "events:write"))


@pytest.fixture
def agent(database: Database) -> Agent:
    return database.agent("atlas", permitted_actions=["trade.execute"])


def events(agent: Agent) -> list[str]:
    query = (
        "select event_type from kakunin.audit_log where agent_id = %s and risk is not null order by event_id"
    )
    return [row[0] for row in agent.database.run("auditor", query, [agent.agent_id])]


async def emitted() -> None:
    """Waits for what shims do beside what they guard. Of an agent that was stopped nothing is recorded."""
    while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.gather(*tasks, return_exceptions=True)


def suspended(agent: Agent) -> None:
    agent.suspend()


def revoked(agent: Agent) -> None:
    agent.revoke()


STOPS: list[Callable[[Agent], None]] = [suspended, revoked]


class Tool:
    """What LangChain's tools look like."""

    name = "execute_order"
    description = "Execute an order."

    def __init__(self) -> None:
        self.ran = 0

    def _run(self, order: str) -> str:
        self.ran += 1
        return f"executed {order}"

    async def _arun(self, order: str) -> str:
        return self._run(order)


@pytest.mark.parametrize("stop", STOPS)
def test_a_guarded_function(sdk: kakunin.Kakunin, agent: Agent, stop: Callable[[Agent], None]) -> None:
    ran: list[str] = []
    guard = kakunin.verify_agent_scope(sdk, str(agent.agent_id), required_scopes=["trade.execute"])

    @guard
    def trade(order: str) -> str:
        ran.append(order)
        return order

    assert [trade("a"), trade("b"), trade("c")] == ["a", "b", "c"]  # a loop of its own each time
    missing = kakunin.verify_agent_scope(sdk, str(agent.agent_id), required_scopes=["trade.execute", "admin"])
    with pytest.raises(exceptions.ScopeViolationError) as refused:
        missing(trade)("d")
    assert refused.value.missing_scopes == ["admin"]
    stop(agent)
    for scopes in (["trade.execute"], None):
        guarded = kakunin.verify_agent_scope(sdk, str(agent.agent_id), required_scopes=scopes)(trade)
        with pytest.raises(exceptions.ScopeViolationError) as refused:
            guarded("e")
        assert refused.value.agent_status == "suspended"
    assert ran == ["a", "b", "c"]


@pytest.mark.parametrize("stop", STOPS)
async def test_guarded_tools(sdk: kakunin.Kakunin, agent: Agent, stop: Callable[[Agent], None]) -> None:
    name, scopes = str(agent.agent_id), ["trade.execute"]
    tool = Tool()
    guard = KakuninToolGuard(sdk, name, tool, required_scopes=scopes)
    index = KakuninFunctionToolGuard(sdk, name, tool._run, name="order", required_scopes=scopes)
    asynchronous = kakunin.verify_agent_scope(sdk, name, required_scopes=scopes)(tool._arun)
    calls: list[Callable[[], Any]] = [
        lambda: guard._arun("1"), lambda: index._arun("1"), lambda: asynchronous("1"),
        lambda: index.acall(SimpleNamespace(kwargs={"order": "1"})),
    ]  # fmt: skip
    for call in calls:
        assert await call() == "executed 1"
    denied = KakuninToolGuard(sdk, name, tool, required_scopes=["admin"])
    with pytest.raises(exceptions.ScopeViolationError):
        await denied._arun("1")
    stop(agent)
    for call in calls:
        with pytest.raises(exceptions.ScopeViolationError):
            await call()
    assert tool.ran == len(calls)


def test_a_chain_of_langchain(sdk: kakunin.Kakunin, agent: Agent) -> None:
    runnables = pytest.importorskip("langchain_core.runnables", reason="LangChain is not installed")
    callback = langchain_scope_callback(sdk, str(agent.agent_id), required_scopes=["trade.execute"])
    chain = runnables.RunnableLambda(lambda x: x + 1).with_config(callbacks=[callback])
    assert chain.invoke(1) == 2
    agent.revoke()
    with pytest.raises(exceptions.ScopeViolationError):
        callback.on_chain_start({}, {})
    # The published callback does not set raise_error, so LangChain swallows what it raises (docs/api.md).
    assert chain.invoke(1) == 2
    callback.raise_error = True
    with pytest.raises(exceptions.ScopeViolationError):
        chain.invoke(1)


async def test_the_hooks_of_antigravity(sdk: kakunin.Kakunin, agent: Agent) -> None:
    hooks = get_kakunin_hooks(sdk, str(agent.agent_id), {"trade": ["trade.execute"], "halt": ["admin"]})
    for hook, data in zip(hooks[:6], [None, None, "prompt", "answer", Tool(), "an error"], strict=True):
        await hook.run(SimpleNamespace(tool_name="trade"), data)
    assert events(agent) == [
        "session_started", "session_ended", "prompt_received", "response_generated", "tool_executed",
        "tool_error",
    ]  # fmt: skip
    decide = hooks[6]
    assert (await decide.run(None, SimpleNamespace(name="trade"))).allow is True
    assert (await decide.run(None, SimpleNamespace(name="halt"))).allow is False
    agent.revoke()
    refused = await decide.run(None, SimpleNamespace(name="trade"))
    assert refused.allow is False
    assert "suspended" in refused.reason


async def test_the_assistants_of_openai(sdk: kakunin.Kakunin, agent: Agent) -> None:
    ran: list[int] = []

    async def trade(amount: int) -> dict[str, int]:
        ran.append(amount)
        return {"traded": amount}

    def called(name: str) -> Any:
        function = SimpleNamespace(name=name, arguments=json.dumps({"amount": 5}))
        call = SimpleNamespace(id="call-1", function=function)
        outputs = SimpleNamespace(tool_calls=[call])
        return SimpleNamespace(required_action=SimpleNamespace(submit_tool_outputs=outputs))

    async def handle(name: str) -> Any:
        mapping = {"trade": ["trade.execute"], "other": ["admin"]}
        functions = {"trade": trade, "other": trade}
        [answer] = await handle_assistants_requires_action(
            sdk, str(agent.agent_id), called(name), mapping, functions
        )
        await emitted()
        return json.loads(answer["output"])

    assert await handle("trade") == {"traded": 5}
    assert "missing required scopes" in (await handle("other"))["error"]
    assert events(agent) == ["tool_executed", "unauthorized_access_attempt"]
    agent.suspend()
    assert "suspended" in (await handle("trade"))["error"]
    assert ran == [5]


async def test_a_node_of_langgraph(sdk: kakunin.Kakunin, server: Server, agent: Agent) -> None:
    async with server.sdk() as everybody:
        chain = await everybody.chains.create(name="a run")

        @kakunin_node(sdk, agent_id=str(agent.agent_id), action_type="data_access", chain_id=chain.chain_id)
        async def node(state: dict[str, int]) -> dict[str, int]:
            return {"n": 1 // state["n"]}

        assert await node({"n": 1}) == {"n": 1}
        await emitted()
        with pytest.raises(ZeroDivisionError):
            await node({"n": 0})
        await emitted()
        found = await everybody.chains.get(chain.chain_id)
    assert found.events is not None
    assert [event.action_type for event in found.events] == ["data_access", "transaction_anomaly"]


async def test_the_toolkit_of_camel(sdk: kakunin.Kakunin, agent: Agent) -> None:
    name, toolkit = str(agent.agent_id), KakuninToolkit(sdk)
    assert (await toolkit.verify_agent_certificate(name))["active"] is True
    assert (await toolkit.check_agent_scope(name, "trade.execute"))["allowed"] is True
    assert (await toolkit.check_agent_scope(name, "admin"))["allowed"] is False
    emitted = await toolkit.emit_behavior_event(name, "unauthorized_access_attempt")
    assert emitted["event_id"]
    risk = await toolkit.get_risk_score(name)
    assert risk["score"] > 0.3
    assert risk["band"] == "medium"
    agent.revoke()
    assert (await toolkit.verify_agent_certificate(name)) == {
        "agent_id": name, "agent_status": "suspended", "active": False, "scopes": [],
    }  # fmt: skip
