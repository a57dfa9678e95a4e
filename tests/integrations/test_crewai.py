"""KakuninCrewAgent in CrewAI's own crews, with a model that is scripted."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

os.environ |= {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_DISABLE_TRACKING": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "CREWAI_TESTING": "true",
    "OTEL_SDK_DISABLED": "true",
}

import pytest

from .chat_server import chat_server
from .conftest import events, permitted, refusals, refused

pytest.importorskip("crewai")
from crewai import BaseLLM, Crew, Task
from crewai.tools import BaseTool, tool
from pydantic import PrivateAttr

from kakunin_db import AsyncKakunin, BadInputError, CertificateRevokedError, bind_agent_session
from kakunin_db.integrations.crewai import TRACE, KakuninCrewAgent, stack_trace

pytestmark = pytest.mark.filterwarnings("default")

Turn = str | list[tuple[str, dict[str, Any]]] | Exception
TRADE: Turn = [("trade", {"order": "one"})]


class Scripted(BaseLLM):
    """Says its turns in their order: by native tool calls, or in the text as ReAct has it."""

    native: bool = True
    _turns: list[Turn] = PrivateAttr(default_factory=list)
    _asked: list[Any] = PrivateAttr(default_factory=list)

    def call(self, messages: Any, tools: Any = None, **kwargs: Any) -> Any:
        self._asked.append((messages, tools))
        turn = self._turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        if isinstance(turn, str):
            return turn if self.native else f"Thought: I now know\nFinal Answer: {turn}"
        if not self.native:
            ((name, arguments),) = turn
            return f"Thought: I need it\nAction: {name}\nAction Input: {json.dumps(arguments)}"
        return [
            {
                "id": f"call_{n}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments)},
            }
            for n, (name, arguments) in enumerate(turn)
        ]

    async def acall(self, messages: Any, tools: Any = None, **kwargs: Any) -> Any:
        return self.call(messages, tools, **kwargs)

    def supports_function_calling(self) -> bool:
        return self.native


def scripted(*turns: Turn, native: bool = True) -> Scripted:
    model = Scripted(model="m", native=native)
    model._turns = list(turns)
    return model


class Trade:
    """Tools of every kind, and what they did."""

    def __init__(self, then: Any = None) -> None:
        self.ran: list[str] = []

        def body(order: str) -> str:
            self.ran.append(order)
            if then:
                then()
            return f"traded {order}"

        @tool("trade")
        def trade(order: str) -> str:
            """Executes a trade."""
            return body(order)

        @tool("trade")
        async def a_trade(order: str) -> str:
            """Executes a trade."""
            return body(order)

        class OfClass(BaseTool):
            name: str = "trade"
            description: str = "Executes a trade."

            def _run(self, order: str) -> str:
                return body(order)

        class WithRun(OfClass):
            def run(self, *args: Any, **kwargs: Any) -> Any:
                return body(**kwargs)

        self.kinds = {"function": trade, "async": a_trade, "class": OfClass(), "run": WithRun()}
        self.tool = trade


def auditor(kakunin: Any, agent: Any, model: Scripted, **options: Any) -> Any:
    options = {"required_scopes": ["trade.execute"]} | options
    return KakuninCrewAgent(
        kakunin=kakunin, agent_id=agent.agent_id, role="Auditor", goal="Verify the ledger",
        backstory="Careful", llm=model, **options,
    )  # fmt: skip


def kickoff(kind: str, crew_agent: Any, **options: Any) -> str:
    if kind == "agent":
        return crew_agent.kickoff("Trade.").raw
    if kind == "agent async":
        return asyncio.run(crew_agent.kickoff_async("Trade.")).raw
    crew = Crew(
        agents=[crew_agent],
        tasks=[Task(description="Trade.", expected_output="x", agent=crew_agent, **options)],
    )
    if kind == "crew":
        return crew.kickoff().raw
    return asyncio.run(crew.akickoff()).raw


kinds = pytest.mark.parametrize("kind", ["crew", "crew async", "agent", "agent async"])


@kinds
@pytest.mark.parametrize("tool_kind", ["function", "async", "class", "run"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "react"])
def test_tools_run_once(database: Any, kind: str, tool_kind: str, native: bool) -> None:
    if (tool_kind, native) == ("run", False):
        pytest.skip("CrewAI takes _run() there")
    agent, kakunin = permitted(database)
    trade = Trade()
    model = scripted(TRADE, "done", native=native)
    assert kickoff(kind, auditor(kakunin, agent, model, tools=[trade.kinds[tool_kind]])) == "done"
    assert trade.ran == ["one"]
    stage = "task" if kind.startswith("crew") else "kickoff"
    assert events(database, agent, kakunin) == [
        ("api_call", {"stage": stage}),
        ("api_call", {"tool": "trade", "outcome": "returned"}),
        ("data_access", {"stage": stage}),
    ]
    assert "trade" in str(model._asked[0])
    assert "traded one" in str(model._asked[-1])


def test_it_says_that_it_mutates(database: Any) -> None:
    agent, kakunin = permitted(database)
    kickoff("crew", auditor(kakunin, agent, scripted("done"), mutates=True))
    assert [kind for kind, _ in events(database, agent, kakunin)] == ["api_call", "data_mutation"]


@kinds
@refusals
def test_no_model_and_no_tool_of_one_that_may_not(database: Any, how: str, kind: str) -> None:
    with refused(database, how) as case:
        trade, model = Trade(), scripted(TRADE, "done")
        secured = auditor(case.client(), case.agent, model, tools=[trade.tool], monitored=False)
        with pytest.raises(case.error, match=case.reason):
            kickoff(kind, secured)
        assert (trade.ran, model._asked) == ([], [])


@kinds
@pytest.mark.parametrize("native", [True, False], ids=["native", "react"])
@pytest.mark.parametrize("tool_kind", ["function", "async", "class"])
def test_g3_revoked_by_the_first_of_two_tools(database: Any, kind: str, tool_kind: str, native: bool) -> None:
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    model = scripted(TRADE, [("trade", {"order": "two"})], "done", "done", native=native)
    secured = auditor(kakunin, agent, model, tools=[trade.kinds[tool_kind]])
    with pytest.raises(CertificateRevokedError):
        kickoff(kind, secured)
    assert trade.ran == ["one"]
    assert "was revoked" in str(model._asked[-1])


def test_tools_of_the_task_and_by_their_own_ways(database: Any) -> None:
    with refused(database, "suspended") as case:
        trade = Trade()
        secured = auditor(case.client(), case.agent, scripted("done"), monitored=False)
        for each in trade.kinds.values():
            guarded = secured._guard_tool(each)
            assert secured._guard_tool(guarded) is guarded
            assert (guarded.name, guarded.description, guarded.args_schema) == (
                each.name,
                each.description,
                each.args_schema,
            )
            for way in (
                lambda g=guarded: g.run(order="x"),
                lambda g=guarded: g.to_structured_tool().invoke({"order": "x"}),
                lambda g=guarded: asyncio.run(g.arun(order="x")),
                lambda g=guarded: asyncio.run(g.to_structured_tool().ainvoke({"order": "x"})),
            ):
                with pytest.raises(case.error):
                    way()
        assert trade.ran == []


def test_g3_tools_of_a_task(database: Any) -> None:
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    model = scripted(TRADE, [("trade", {"order": "two"})], "done", "done")
    with pytest.raises(CertificateRevokedError):
        kickoff("crew", auditor(kakunin, agent, model), tools=[trade.tool])
    assert trade.ran == ["one"]


def test_a_failure_is_one_anomaly_with_its_trace(database: Any) -> None:
    agent, kakunin = permitted(database)
    model = scripted(*[RuntimeError("model is gone") for _ in range(9)])
    secured = auditor(kakunin, agent, model, max_retry_limit=1)
    with pytest.raises(RuntimeError, match="model is gone"):
        kickoff("crew", secured)
    (_, began), (kind, anomaly) = events(database, agent, kakunin)
    assert (began, kind, anomaly["error"]) == ({"stage": "task"}, "transaction_anomaly", "RuntimeError")
    assert "Traceback" in anomaly["stack_trace"]
    assert anomaly["stack_trace"].rstrip().endswith("RuntimeError: model is gone")
    assert len(model._asked) > 1  # it was tried again


@pytest.mark.parametrize(
    "text", ["x" * 100_000, '"\\\n' * 50_000, "é\U0001f600" * 30_000, "\x01\x00\ud800" * 40_000]
)
def test_a_trace_fits_an_event(database: Any, text: str) -> None:
    agent, kakunin = permitted(database)
    with pytest.raises(RuntimeError):
        kickoff("crew", auditor(kakunin, agent, scripted(*[RuntimeError(text)] * 9), max_retry_limit=0))
    kind, anomaly = events(database, agent, kakunin)[-1]
    assert kind == "transaction_anomaly"
    size = len(json.dumps(anomaly["stack_trace"], ensure_ascii=False).encode())
    assert TRACE - 10 < size <= TRACE
    assert stack_trace(RuntimeError("short")) == "RuntimeError: short\n"


def test_a_cache_answers_nothing(database: Any) -> None:
    agent, kakunin = permitted(database)
    trade = Trade()
    model = scripted(TRADE, "done", TRADE, "done")
    secured = auditor(kakunin, agent, model, tools=[trade.tool])
    task = Task(description="Trade.", expected_output="x", agent=secured)
    again = Task(description="Trade again.", expected_output="x", agent=secured)
    Crew(agents=[secured], tasks=[task, again], cache=True).kickoff()
    assert trade.ran == ["one", "one"]


def test_copies_and_json(database: Any) -> None:
    agent, kakunin = permitted(database)
    secured = auditor(kakunin, agent, scripted("done", "done"), tools=[Trade().tool])
    copied = secured.copy()
    assert isinstance(copied, KakuninCrewAgent)
    assert copied.kakunin is kakunin
    assert copied.required_scopes == ["trade.execute"]
    crew = Crew(agents=[secured], tasks=[Task(description="{x}", expected_output="x", agent=secured)])
    assert [each.raw for each in crew.kickoff_for_each([{"x": "a"}, {"x": "b"}])] == ["done", "done"]
    assert json.loads(secured.model_dump_json(include={"kakunin", "monitor"})) == {
        "kakunin": None,
        "monitor": None,
    }
    assert "credential" not in repr(secured)


def test_whom_it_asks(database: Any) -> None:
    agent, _ = permitted(database)
    asynchronous = AsyncKakunin(database.dsn("agent_1"), credential=agent.credential)
    for client in (asynchronous, None):
        with pytest.raises(BadInputError):
            auditor(client, agent, scripted("done"))


def test_the_double_fence(vault: Any) -> None:
    """A tool of an agent that nothing guards gets the rows of the certificate it is bound to."""
    from crewai import Agent

    found: list[Any] = []

    def fetch() -> None:
        with vault.database.connect("agent_1") as connection:
            with bind_agent_session(connection, vault.one.credential) as bound:
                found.extend(bound.execute("select content from vault order by id").fetchall())
        with vault.database.connect("agent_1") as connection:
            found.extend(connection.execute("select content from vault").fetchall())

    unguarded = Agent(
        role="r", goal="g", backstory="b", llm=scripted(TRADE, "done"), tools=[Trade(then=fetch).tool]
    )
    assert kickoff("crew", unguarded) == "done"
    assert found == [("one-a",), ("one-b",)]


def test_the_example(example: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server([("read_vault", {})], "It has one row.") as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        printed = example("crewai_agent.py")
        (read,) = model.tool_messages()
    assert "written for atlas" in read
    assert "borealis" not in read
    assert "It has one row." in printed
    assert printed[-1] == "refused: the certificate does not permit 'vault:erase'"
