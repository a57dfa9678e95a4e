"""KakuninConversableAgent in AutoGen's own chats, with a model client that is scripted."""

from __future__ import annotations

import asyncio
import json
import types
from collections.abc import Callable
from typing import Annotated, Any

import pytest

from .chat_server import chat_server
from .conftest import events, permitted, refusals, refused

pytest.importorskip("autogen")
import pydantic
from autogen import ConversableAgent, GroupChat, GroupChatManager, UserProxyAgent
from autogen.agentchat import initiate_group_chat
from autogen.agentchat.group.patterns import DefaultPattern

from kakunin_db import AsyncKakunin, BadInputError, CertificateRevokedError, KakuninError, bind_agent_session
from kakunin_db.integrations.autogen import KakuninConversableAgent, KakuninHttpxMixin

pytestmark = pytest.mark.filterwarnings("default")

Turn = str | list[tuple[str, dict[str, Any]]]
TRADE: Turn = [("trade", {"order": "one"})]


class SecureAgent(KakuninHttpxMixin, KakuninConversableAgent):
    pass


class Message(pydantic.BaseModel):
    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class Scripted:
    """A ModelClient of AutoGen's. Says ``turns`` in their order, and keeps what it was asked."""

    turns: list[Turn]
    asked: list[dict[str, Any]]

    def __init__(self, config: dict[str, Any], **kwargs: Any) -> None:
        pass

    def create(self, params: dict[str, Any]) -> Any:
        self.asked.append(params)
        turn = self.turns.pop(0)
        message: dict[str, Any] = {"role": "assistant", "content": turn if isinstance(turn, str) else None}
        if not isinstance(turn, str):
            message["tool_calls"] = [
                {
                    "id": f"call_{n}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                }
                for n, (name, arguments) in enumerate(turn)
            ]
        return types.SimpleNamespace(
            choices=[types.SimpleNamespace(message=Message(**message))], model="m", usage=None
        )

    def message_retrieval(self, response: Any) -> list[Any]:
        return [c.message if c.message.content is None else c.message.content for c in response.choices]

    def cost(self, response: Any) -> float:
        return 0.0

    @staticmethod
    def get_usage(response: Any) -> dict[str, Any]:
        return {}


def scripted(agent: ConversableAgent, *turns: Turn) -> type[Scripted]:
    cls = type("Scripted", (Scripted,), {"turns": list(turns), "asked": []})
    agent.register_model_client(model_client_cls=cls)
    return cls


LLM = {"config_list": [{"model": "m", "model_client_cls": "Scripted"}]}


def secure(kakunin: Any, agent: Any, *turns: Turn, **options: Any) -> tuple[Any, type[Scripted]]:
    options = {"required_scopes": ["trade.execute"], "name": "RiskEngine", "llm_config": LLM} | options
    made = SecureAgent(
        kakunin=kakunin, agent_id=agent.agent_id, human_input_mode="NEVER", silent=True, **options
    )
    return made, scripted(made, *turns)


def other(**options: Any) -> Any:
    return ConversableAgent(
        "Other",
        llm_config=False,
        human_input_mode="NEVER",
        silent=True,
        default_auto_reply="go on",
        **options,
    )


class Trade:
    """A tool, and what it did."""

    def __init__(self, then: Any = None) -> None:
        self.ran: list[str] = []

        def trade(order: Annotated[str, "which order"]) -> str:
            """Executes a trade."""
            self.ran.append(order)
            if then:
                then()
            return f"traded {order}"

        async def a_trade(order: Annotated[str, "which order"]) -> str:
            """Executes a trade."""
            return trade(order)

        self.tool, self.a_tool = trade, a_trade


def chat(kind: str, sender: Any, recipient: Any, **options: Any) -> Any:
    if kind == "sync":
        return sender.initiate_chat(recipient, **options)
    return asyncio.run(sender.a_initiate_chat(recipient, **options))


kinds = pytest.mark.parametrize("kind", ["sync", "async"])


@kinds
@pytest.mark.parametrize("tool", ["tool", "a_tool"])
def test_it_replies_and_its_tools_run_once(database: Any, kind: str, tool: str) -> None:
    agent, kakunin = permitted(database)
    trade = Trade()
    secured, model = secure(kakunin, agent, "done")
    secured.register_for_execution(name="trade")(getattr(trade, tool))
    user = other(max_consecutive_auto_reply=0)
    call = {"id": "1", "type": "function", "function": {"name": "trade", "arguments": '{"order": "one"}'}}
    result = chat(kind, user, secured, message={"content": None, "tool_calls": [call]}, max_turns=1)
    assert trade.ran == ["one"]
    assert result.chat_history[-1]["content"] == "traded one"
    result = chat(kind, user, secured, message="hello", max_turns=1)
    assert result.chat_history[-1]["content"] == "done"
    assert len(model.asked) == 1
    recorded = events(database, agent, kakunin)
    assert [metadata.get("tool") or metadata["stage"] for _, metadata in recorded] == [
        "trade",
        "reply",
        "reply",
    ]
    assert {(kind, metadata["outcome"]) for kind, metadata in recorded} == {("api_call", "returned")}
    assert "one" not in str(recorded)


def test_what_the_model_is_told_of_the_tools_is_what_it_was(database: Any) -> None:
    agent, kakunin = permitted(database)
    trade = Trade()
    secured, _ = secure(kakunin, agent, functions=[trade.tool])
    plain = ConversableAgent("plain", llm_config=LLM, functions=[trade.tool])
    assert secured.llm_config["tools"] == plain.llm_config["tools"]
    assert [tool.name for tool in secured.tools] == ["trade"]
    secured.register_for_execution()(secured.tools[0])
    assert secured.can_execute_function("trade")
    secured.register_function({"trade": None})
    assert not secured.can_execute_function("trade")
    secured.remove_tool_for_llm(secured.tools[0])
    assert secured.tools == []


@kinds
@refusals
def test_no_message_no_model_and_no_tool_of_one_that_may_not(database: Any, how: str, kind: str) -> None:
    with refused(database, how) as case:
        trade = Trade()
        secured, model = secure(case.client(), case.agent, "done", monitored=False)
        secured.register_for_execution(name="trade")(trade.tool)
        user = other()
        for message in ("hello", {"content": None, "tool_calls": [_call()]}):
            with pytest.raises(case.error, match=case.reason):
                chat(kind, user, secured, message=message, max_turns=1)
        with pytest.raises(case.error):
            chat(kind, secured, user, message="hello", max_turns=1)
        with pytest.raises(case.error):
            secured.generate_reply(messages=[{"role": "user", "content": "hello"}])
        with pytest.raises(case.error):
            asyncio.run(secured.a_generate_reply(messages=[{"role": "user", "content": "hello"}]))
        # As whoever executes its tools does it: the reason is the answer.
        done, answer = secured.execute_function({"name": "trade", "arguments": '{"order": "one"}'})
        assert not done
        assert case.reason in answer["content"]
        assert (trade.ran, model.asked, user.chat_messages[secured]) == ([], [], [])


def _call() -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "trade", "arguments": '{"order": "one"}'}}


@kinds
def test_g3_revoked_by_the_first_of_two_tools(database: Any, kind: str) -> None:
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    secured, model = secure(kakunin, agent, "done")
    secured.register_for_execution(name="trade")(trade.tool)
    message = {"content": None, "tool_calls": [_call(), _call()]}
    with pytest.raises(CertificateRevokedError):
        chat(kind, other(), secured, message=message, max_turns=3)
    assert (trade.ran, model.asked) == (["one"], [])


def test_g3_revoked_between_two_turns(database: Any) -> None:
    agent, kakunin = permitted(database)
    secured, model = secure(kakunin, agent, "one", "two", "three")
    turns = iter([None, agent.revoke])
    user = other()
    user.register_reply([SecureAgent], lambda *a, **k: (True, (next(turns) or str)() or "go on"), position=0)
    with pytest.raises(CertificateRevokedError):
        secured.initiate_chat(user, message="hello", max_turns=5)
    assert len(model.asked) == 1


def test_tools_that_another_agent_runs(database: Any) -> None:
    """run() and groups have an executor of their own for an agent's tools; each asks for this one."""
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    secured, model = secure(kakunin, agent, [_once("one"), _once("two")], "done", functions=[trade.tool])
    pattern = DefaultPattern(initial_agent=secured, agents=[secured])
    with pytest.raises(CertificateRevokedError):
        initiate_group_chat(pattern=pattern, messages="Trade.", max_rounds=5)
    assert trade.ran == ["one"]
    assert len(model.asked) == 1


def _once(order: str) -> tuple[str, dict[str, Any]]:
    return "trade", {"order": order}


def test_run_raises_it_with_its_events(database: Any) -> None:
    agent, kakunin = permitted(database)
    trade = Trade(then=agent.revoke)
    secured, model = secure(kakunin, agent, [_once("one"), _once("two")], "done", functions=[trade.tool])
    response = secured.run(message="Trade.", max_turns=3, user_input=False)
    with pytest.raises(CertificateRevokedError):
        list(response.events)
    assert (trade.ran, len(model.asked)) == (["one"], 1)


def test_functions_given_as_a_map(database: Any) -> None:
    with refused(database, "suspended") as case:
        trade = Trade()
        secured, _ = secure(case.client(), case.agent, "done", function_map={"trade": trade.tool})
        done, answer = secured.execute_function({"name": "trade", "arguments": '{"order": "one"}'})
        assert (done, trade.ran) == (False, [])
        assert "suspended" in answer["content"]


def test_a_group_stops_at_a_member_that_may_not(database: Any) -> None:
    agent, kakunin = permitted(database)
    secured, model = secure(kakunin, agent, "one", "two")
    user = other()
    manager = GroupChatManager(
        GroupChat([user, secured], [], max_round=4, speaker_selection_method="round_robin"), silent=True
    )
    user.initiate_chat(manager, message="hello")
    assert len(model.asked) == 2
    agent.suspend()
    with pytest.raises(KakuninError, match="suspended"):
        user.initiate_chat(manager, message="hello")
    assert len(model.asked) == 2


def test_the_agents_of_the_article(database: Any) -> None:
    agent, kakunin = permitted(database)
    secured = SecureAgent(
        kakunin=kakunin, agent_id=str(agent.agent_id), required_scopes=["trade.execute"], name="RiskEngine",
        llm_config=LLM,
    )  # fmt: skip
    scripted(secured, "fine")
    user = UserProxyAgent("User", human_input_mode="NEVER", code_execution_config=False)
    assert user.initiate_chat(secured, message="How are we?", max_turns=1).summary == "fine"


def test_whom_it_asks(database: Any) -> None:
    agent, _ = permitted(database)
    asynchronous = AsyncKakunin(database.dsn("agent_1"), credential=agent.credential)
    with pytest.raises(BadInputError, match="event loops"):
        secure(asynchronous, agent)


@kinds
def test_requests_have_the_serial(database: Any, kind: str) -> None:
    agent, kakunin = permitted(database)
    secured, _ = secure(kakunin, agent)

    async def get(url: str) -> int:
        async with secured.http_client as client:
            return (await client.get(url)).status_code

    def ask(url: str) -> int:
        if kind == "async":
            return asyncio.run(get(url))
        with secured.sync_http_client as client:
            return client.get(url).status_code

    with chat_server("x") as server:
        assert ask(f"{server.url}/models") == 200
        assert {k.lower(): v for k, v in server.headers[0].items()}["x-kakunin-cert-serial"] == agent.serial
        agent.revoke()
        with pytest.raises(CertificateRevokedError):
            ask(f"{server.url}/models")
        assert len(server.headers) == 1


def test_the_double_fence(vault: Any) -> None:
    """A tool of an agent that nothing guards gets the rows of the certificate it is bound to."""
    found: list[Any] = []

    def fetch() -> None:
        with vault.database.connect("agent_1") as connection:
            with bind_agent_session(connection, vault.one.credential) as bound:
                found.extend(bound.execute("select content from vault order by id").fetchall())
        with vault.database.connect("agent_1") as connection:
            found.extend(connection.execute("select content from vault").fetchall())

    unguarded = other()
    unguarded.register_for_execution(name="trade")(Trade(then=fetch).tool)
    done, _ = unguarded.execute_function({"name": "trade", "arguments": '{"order": "one"}'})
    assert done
    assert found == [("one-a",), ("one-b",)]


def test_the_example(example: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server([("read_vault", {})]) as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        printed = example("autogen_agent.py")
    assert any(line.startswith("tool: ") and "written for atlas" in line for line in printed)
    assert "borealis" not in str(printed)
    assert printed[-1] == "refused: the certificate does not permit 'vault:erase'"
