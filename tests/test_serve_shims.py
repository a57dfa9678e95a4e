"""The published SDK's framework shims against `kakunin-db serve`: what they guard does not run for an agent
that was stopped, and what they emit is in the ledger.

`make frameworks` runs this with each framework; without one, what needs it is skipped and says so. What does
not work whatever the server is shown here not to (docs/api.md)."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from api import Server, api_key, served
from conftest import Agent, Database

pytest.importorskip("kakunin", reason="the SDK is not installed")
import kakunin
from kakunin import exceptions, integrations
from kakunin.integrations import google_antigravity
from kakunin.integrations.autogen import KakuninConversableAgent, KakuninHttpxMixin
from kakunin.integrations.camel import KakuninCamelAgent, KakuninToolkit
from kakunin.integrations.crewai import KakuninCrewAgent
from kakunin.integrations.google_antigravity import get_kakunin_hooks
from kakunin.integrations.langchain import KakuninToolGuard, langchain_scope_callback
from kakunin.integrations.langgraph import kakunin_node
from kakunin.integrations.llamaindex import KakuninFunctionToolGuard
from kakunin.integrations.openai_assistants import handle_assistants_requires_action


def test_every_shim_is_here() -> None:
    source = inspect.getsource(sys.modules[__name__]).partition("\n\n\n")[2]  # after the imports
    hooks = {type(hook).__name__ for hook in get_kakunin_hooks(kakunin.Kakunin(api_key="x"), "a", {"t": []})}
    shims = set()
    for module in pkgutil.iter_modules(integrations.__path__):
        if not module.name.startswith("_"):
            loaded = importlib.import_module(f"{integrations.__name__}.{module.name}")
            shims |= {
                name
                for name, member in vars(loaded).items()
                if getattr(member, "__module__", "") == loaded.__name__
                and not name.startswith("_")
                and (inspect.isfunction(member) or name.startswith("Kakunin"))
            }
    assert len(shims) >= 18
    assert [name for name in sorted(shims - hooks) if not re.search(rf"\b{name}\b", source)] == []


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


def test_a_tool_of_langchain_is_guarded_where_langchain_does_not_call_it(
    sdk: kakunin.Kakunin, agent: Agent
) -> None:
    tools = pytest.importorskip("langchain_core.tools", reason="LangChain is not installed")
    ran: list[str] = []

    @tools.tool  # type: ignore[untyped-decorator]
    def execute_order(order: str) -> str:
        """Execute an order."""
        ran.append(order)
        return order

    guard = KakuninToolGuard(sdk, str(agent.agent_id), execute_order, required_scopes=["trade.execute"])
    with pytest.raises(TypeError, match="config"):
        guard._run(order="1")
    agent.revoke()
    with pytest.raises(exceptions.ScopeViolationError):
        guard._run(order="2")
    assert ran == []
    # What LangChain calls is what the guard hands on to the tool.
    assert guard.invoke({"order": "3"}) == "3"
    assert ran == ["3"]


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
    if not google_antigravity.HAS_ANTIGRAVITY:  # whose result has a message, and none of this
        assert "suspended" in refused.reason


def test_an_agent_of_antigravity_does_not_take_the_hooks(sdk: kakunin.Kakunin, agent: Agent) -> None:
    """It copies its configuration, and the hooks have the SDK's HTTP client, which cannot be copied."""
    antigravity = pytest.importorskip("google.antigravity", reason="Google Antigravity is not installed")
    hooks = get_kakunin_hooks(sdk, str(agent.agent_id), {"trade": ["trade.execute"]})
    with pytest.raises(TypeError, match="cannot pickle"):
        antigravity.Agent(config=antigravity.LocalAgentConfig(hooks=hooks))


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


async def test_a_graph_of_langgraph(sdk: kakunin.Kakunin, agent: Agent) -> None:
    graphs = pytest.importorskip("langgraph.graph", reason="LangGraph is not installed", exc_type=ImportError)

    @kakunin_node(sdk, agent_id=str(agent.agent_id), action_type="data_access")
    async def node(state: Any) -> Any:
        return {"n": state["n"] + 1}

    graph = graphs.StateGraph(dict)
    graph.add_node("node", node)
    graph.add_edge(graphs.START, "node")
    graph.add_edge("node", graphs.END)
    assert await graph.compile().ainvoke({"n": 1}) == {"n": 2}
    await emitted()
    assert events(agent) == ["data_access"]


def test_an_agent_of_llamaindex_does_not_take_the_guard(sdk: kakunin.Kakunin, agent: Agent) -> None:
    workflow = pytest.importorskip("llama_index.core.agent.workflow", reason="LlamaIndex is not installed")
    llms = importlib.import_module("llama_index.core.llms")
    guard = KakuninFunctionToolGuard(sdk, str(agent.agent_id), Tool()._run, name="order")
    with pytest.raises(AttributeError, match="__name__"):
        workflow.FunctionAgent(tools=[guard], llm=llms.MockLLM())


AGENTS: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "crewai": (KakuninCrewAgent, {"role": "r", "goal": "g", "backstory": "b"}, "object layout differs"),
    "autogen": (KakuninConversableAgent, {"name": "n", "llm_config": False}, "obj must be an instance"),
    "camel": (KakuninCamelAgent, {}, "no attribute '_resolve_models'"),
}


@pytest.mark.parametrize("framework", AGENTS)
def test_agents_that_cannot_be_made(sdk: kakunin.Kakunin, agent: Agent, framework: str) -> None:
    """They become another class while they are made, which current releases do not survive."""
    make, options, said = AGENTS[framework]
    if importlib.util.find_spec(framework) is None:
        with pytest.raises(ImportError, match="is not installed"):
            make(kakunin=sdk, agent_id=str(agent.agent_id), **options)
        pytest.skip(f"{framework} is not installed")
    with pytest.raises((TypeError, AttributeError), match=said):
        make(kakunin=sdk, agent_id=str(agent.agent_id), **options)


async def test_the_serial_on_an_agents_requests(server: Server, agent: Agent) -> None:
    class Caller(KakuninHttpxMixin):
        pass

    async with Caller(cert_serial=agent.serial).http_client as client:
        answer = await client.get(f"{server.url}/v1/verify/{agent.serial}")
    assert answer.request.headers["x-kakunin-cert-serial"] == agent.serial
    assert answer.json()["data"]["valid"] is True


class Swarm:
    """What the shim meets of OpenAI's, which is on no registry: a message here names the function to call."""

    def run(self, agent: Any, messages: list[Any], **_: Any) -> Any:
        functions = {function.__name__: function for function in agent.functions}
        answers = [functions[message["content"]](5) for message in messages]
        return SimpleNamespace(messages=[{"content": str(answers)}])


async def test_a_swarm(sdk: kakunin.Kakunin, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("swarm")
    module.__dict__.update(Swarm=Swarm, Agent=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "swarm", module)
    spec = importlib.util.find_spec("kakunin.integrations.openai_swarm")
    assert spec is not None
    assert spec.loader is not None
    shim = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shim)
    ran: list[int] = []

    def trade(amount: int) -> int:
        ran.append(amount)
        return amount

    def other(amount: int) -> int:
        return trade(-amount)

    worker = SimpleNamespace(functions=[trade, other])
    swarm = shim.KakuninSwarm(sdk, str(agent.agent_id))

    def run(function: str) -> Any:
        scopes = {"trade": ["trade.execute"], "other": ["admin"]}
        try:
            return swarm.run(worker, [{"content": function}], tool_scopes_mapping=scopes)
        finally:
            assert worker.functions == [trade, other]

    assert run("trade").messages == [{"content": "[5]"}]
    await emitted()
    seen = ["prompt_received", "response_generated", "session_started", "tool_executed"]
    assert sorted(events(agent)) == seen
    with pytest.raises(exceptions.ScopeViolationError) as refused:
        run("other")
    assert refused.value.missing_scopes == ["admin"]
    await emitted()
    assert events(agent).count("unauthorized_access_attempt") == 1
    agent.revoke()
    with pytest.raises(exceptions.ScopeViolationError):
        run("trade")
    await emitted()
    assert ran == [5]


async def test_the_tools_of_camel(sdk: kakunin.Kakunin, agent: Agent) -> None:
    if importlib.util.find_spec("camel") is None:
        with pytest.raises(ImportError, match="camel-ai is not installed"):
            KakuninToolkit(sdk).get_tools()
        pytest.skip("CAMEL is not installed")
    tools = {tool.get_function_name(): tool for tool in KakuninToolkit(sdk).get_tools()}
    name = str(agent.agent_id)
    assert (await tools["check_agent_scope"].async_call(name, "trade.execute"))["allowed"] is True
    await tools["emit_behavior_event"].async_call(name, "data_access")
    assert events(agent) == ["data_access"]
    agent.revoke()
    assert (await tools["verify_agent_certificate"].async_call(name))["active"] is False


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
