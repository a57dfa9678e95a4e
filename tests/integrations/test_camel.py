"""KakuninToolkit and KakuninCamelAgent in CAMEL's own loop, with a model on this machine."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable
from typing import Any

os.environ |= {"CAMEL_LOGGING_DISABLED": "true", "ANONYMIZED_TELEMETRY": "false"}

import pytest

from .chat_server import ChatServer, chat_server
from .conftest import events, permitted, refusals, refused

pytest.importorskip("camel")
from camel.agents import ChatAgent
from camel.models import ModelFactory
from camel.models.stub_model import StubTokenCounter
from camel.toolkits import FunctionTool
from camel.types import ModelPlatformType

from kakunin_db import AsyncKakunin, BadInputError, CertificateRevokedError, bind_agent_session
from kakunin_db.integrations.camel import KakuninCamelAgent, KakuninToolkit

pytestmark = pytest.mark.filterwarnings("default")

TRADE = [("trade", {"order": "one"})]
AGAIN = [("trade", {"order": "two"})]


class Trade:
    """Tools of every kind, and what they did."""

    def __init__(self, then: Any = None) -> None:
        self.ran: list[str] = []

        def trade(order: str) -> str:
            """Executes a trade.

            Args:
                order: Which order.
            """
            self.ran.append(order)
            if then:
                then()
            return f"traded {order}"

        async def a_trade(order: str) -> str:
            """Executes a trade.

            Args:
                order: Which order.
            """
            return trade(order)

        def of_a_server(order: str) -> str:
            return trade(order)

        a_trade.__name__ = of_a_server.__name__ = "trade"
        of_a_server.__doc__ = trade.__doc__
        of_a_server.async_call = a_trade  # type: ignore[attr-defined]
        self.kinds = {"function": trade, "async": a_trade, "server": of_a_server}
        self.tool = trade


def model_of(server: ChatServer, **config: Any) -> Any:
    return ModelFactory.create(
        ModelPlatformType.OPENAI_COMPATIBLE_MODEL,
        "m",
        model_config_dict=config,
        token_counter=StubTokenCounter(),
        api_key="x",
        url=server.url,
        max_retries=0,
    )


def secure(kakunin: Any, agent: Any, server: ChatServer, stream: bool = False, **options: Any) -> Any:
    options = {"required_scopes": ["trade.execute"]} | options
    model = model_of(server, **({"stream": True} if stream else {}))
    return KakuninCamelAgent("You trade.", model, kakunin=kakunin, agent_id=agent.agent_id, **options)


def step(kind: str, agent: Any) -> str:
    async def asynchronous() -> str:
        response = await agent.astep("Trade.")
        if "stream" in kind:
            response = [each async for each in response][-1]
        return response.msgs[0].content

    if kind.startswith("async"):
        return asyncio.run(asynchronous())
    response = agent.step("Trade.")
    if kind == "stream":
        response = list(response)[-1]
    return response.msgs[0].content


kinds = pytest.mark.parametrize("kind", ["sync", "async", "stream", "async stream"])
tool_kinds = pytest.mark.parametrize("tool_kind", ["function", "async", "server"])


@kinds
@tool_kinds
def test_tools_run_once(database: Any, kind: str, tool_kind: str) -> None:
    agent, kakunin = permitted(database)
    trade = Trade()
    with chat_server(TRADE, "done") as server:
        secured = secure(kakunin, agent, server, "stream" in kind, tools=[trade.kinds[tool_kind]])
        assert "done" in step(kind, secured)
        assert trade.ran == ["one"]
        assert "traded one" in server.tool_messages()[0]
        plain = FunctionTool(trade.kinds[tool_kind]).get_openai_tool_schema()
        assert server.requests[0]["tools"] == [plain]
    assert events(database, agent, kakunin) == [
        ("api_call", {"tool": "trade", "outcome": "returned"}),
        ("api_call", {"stage": "step", "outcome": "returned"}),
    ]


@kinds
@refusals
def test_no_model_and_no_tool_of_one_that_may_not(database: Any, how: str, kind: str) -> None:
    with refused(database, how) as case, chat_server(TRADE, "done") as server:
        trade = Trade()
        secured = secure(
            case.client(), case.agent, server, "stream" in kind, tools=[trade.tool], monitored=False
        )
        with pytest.raises(case.error, match=case.reason):
            step(kind, secured)
        assert (trade.ran, server.requests) == ([], [])


@kinds
@tool_kinds
def test_g3_revoked_by_the_first_of_two_tools(database: Any, kind: str, tool_kind: str) -> None:
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    with chat_server(TRADE, AGAIN, "done") as server:
        secured = secure(kakunin, agent, server, "stream" in kind, tools=[trade.kinds[tool_kind]])
        if "stream" in kind:
            step(kind, secured)
        else:
            with pytest.raises(CertificateRevokedError):
                step(kind, secured)
        assert trade.ran == ["one"]
        assert "was revoked" in server.tool_messages()[-1]
        asked = len(server.requests)
        with pytest.raises(CertificateRevokedError):
            step(kind, secured)
        assert len(server.requests) == asked


@pytest.mark.parametrize("kind", ["sync", "async"])
@tool_kinds
@refusals
def test_a_guarded_tool_of_any_agent(database: Any, how: str, tool_kind: str, kind: str) -> None:
    with refused(database, how) as case, chat_server(TRADE, "done") as server:
        trade = Trade()
        toolkit = KakuninToolkit(
            case.client(), case.agent.agent_id, [trade.kinds[tool_kind]], ["trade.execute"], monitored=False
        )
        assert "done" in step(kind, ChatAgent("You trade.", model_of(server), tools=toolkit.get_tools()))
        assert trade.ran == []
        (told,) = server.tool_messages()
        assert "Tool execution failed" in told
        assert case.reason in told


def test_the_three_tools_of_the_kit(database: Any) -> None:
    agent, kakunin = permitted(database)
    trade = Trade()
    toolkit = KakuninToolkit(kakunin=kakunin, tools=[trade.tool], required_scopes=["trade.execute"])
    asks = [
        ("verify_agent_scope", {"action": "trade.execute", "amount_usd": 5, "venue": None}),
        ("verify_agent_scope", {"action": "trade.cancel", "amount_usd": None, "venue": None}),
        ("check_risk_score", {}),
        ("audit_log_append", {"event_type": "transaction_initiated", "metadata": {"amount_usd": 5}}),
    ]
    with chat_server(asks, TRADE, "done") as server:
        assert step("sync", ChatAgent("You trade.", model_of(server), tools=toolkit.get_tools())) == "done"
        allowed, denied, risk, event, traded = server.tool_messages()
    assert trade.ran == ["one"]
    assert "'allowed': True" in allowed or '"allowed": true' in allowed
    assert "trade.cancel" in denied
    assert "recommendation" in risk
    assert "event_id" in event
    assert "traded one" in traded
    recorded = [kind for kind, _ in events(database, agent, kakunin)]
    assert sorted(recorded) == ["api_call", "transaction_initiated"]
    for tool in toolkit.get_tools():
        assert "agent" not in str(tool.parameters)
        assert tool.get_function_description()


def test_tools_added_later_and_clones(database: Any) -> None:
    with refused(database, "suspended") as case, chat_server("x") as server:
        trade = Trade()
        secured = secure(case.client(), case.agent, server)
        secured.add_tool(trade.tool)
        secured.add_tools([FunctionTool(trade.tool)])
        cloned = secured.clone()
        assert isinstance(cloned, KakuninCamelAgent)
        for each in (secured, cloned):
            with pytest.raises(ValueError, match="suspended"):
                each.tool_dict["trade"](order="x")
            with pytest.raises(case.error):
                each.step("Trade.")
        assert (trade.ran, server.requests) == ([], [])
        assert inspect.signature(cloned.tool_dict["trade"].func) == inspect.signature(trade.tool)


def test_whom_it_asks(database: Any) -> None:
    agent, _ = permitted(database)
    asynchronous = AsyncKakunin(database.dsn("agent_1"), credential=agent.credential)
    with pytest.raises(BadInputError), chat_server("x") as server:
        secure(asynchronous, agent, server)
    with pytest.raises(BadInputError):
        KakuninToolkit(asynchronous)  # type: ignore[arg-type]


def test_the_double_fence(vault: Any) -> None:
    """A tool that nothing guards gets the rows of the certificate it is bound to."""
    found: list[Any] = []

    def fetch() -> None:
        with vault.database.connect("agent_1") as connection:
            with bind_agent_session(connection, vault.one.credential) as bound:
                found.extend(bound.execute("select content from vault order by id").fetchall())
        with vault.database.connect("agent_1") as connection:
            found.extend(connection.execute("select content from vault").fetchall())

    with chat_server(TRADE, "done") as server:
        step("sync", ChatAgent("You trade.", model_of(server), tools=[Trade(then=fetch).tool]))
    assert found == [("one-a",), ("one-b",)]


def test_the_example(example: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server([("read_vault", {}), ("erase_vault", {})], "I could read, and not erase.") as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        printed = example("camel_agent.py")
    read, erased, said = printed
    assert read == "read_vault: [('written for atlas',)]"
    assert "does not permit 'vault:erase'" in erased
    assert said == "I could read, and not erase."
