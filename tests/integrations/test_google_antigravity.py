"""The hooks in the SDK's own runtime, with a model on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .chat_server import ChatServer, chat_server
from .conftest import events, permitted, refusals, refused

pytest.importorskip("google.antigravity")

from google.antigravity import Agent, LocalAgentConfig
from google.antigravity.connections.local.local_openai_connection_config import LocalOpenAIAgentConfig
from google.antigravity.hooks import policy
from google.antigravity.types import AntigravityExecutionError, BuiltinTools, ToolCall

from kakunin_db import AsyncKakunin, BadInputError, Kakunin, ScopeViolationError
from kakunin_db.integrations.google_antigravity import KakuninPreToolCallDecideHook, get_kakunin_hooks

pytestmark = pytest.mark.filterwarnings("default")

MAPPING = {"execute_trade": ["trade.execute"], "read_database": ["data:read"]}


class Tools:
    def __init__(self, then: Any = None) -> None:
        self.ran: list[str] = []
        self.then = then

    def listed(self) -> list[Any]:
        def execute_trade(order: str) -> str:
            """Executes a trade."""
            self.ran.append(f"trade {order}")
            if self.then:
                self.then()
            return "traded"

        def read_database(query: str) -> str:
            """Reads the database."""
            self.ran.append(f"read {query}")
            return "rows"

        return [execute_trade, read_database]


def run(model: ChatServer, tools: Tools, hooks: list[Any], folder: Path, *prompts: str) -> list[str]:
    async def session() -> list[str]:
        config = LocalOpenAIAgentConfig(
            base_url=model.url,
            model="m",
            tools=tools.listed(),
            hooks=hooks,
            policies=[policy.allow_all()],
            workspaces=[str(folder)],
        )
        said = []
        async with Agent(config=config) as agent:
            for prompt in prompts:
                response = await agent.chat(prompt)
                said.append(await response.text())
        return said

    return asyncio.run(asyncio.wait_for(session(), 120))


TRADE = [("execute_trade", {"order": "one"})]
READ = [("read_database", {"query": "all"})]


@pytest.mark.parametrize("client", [Kakunin, AsyncKakunin])
def test_tools_run_once_while_the_agent_may(database: Any, tmp_path: Path, client: Any) -> None:
    agent, kakunin = permitted(database, client)
    tools = Tools()
    hooks = get_kakunin_hooks(kakunin, agent.agent_id, MAPPING)
    with chat_server(READ, TRADE, "done") as model:
        assert run(model, tools, hooks, tmp_path, "Trade.") == ["done"]
    assert tools.ran == ["read all", "trade one"]
    offered = {t["function"]["name"]: t["function"] for t in model.requests[0]["tools"]}
    assert offered["execute_trade"]["description"] == "Executes a trade."
    assert "order" in offered["execute_trade"]["parameters"]["properties"]
    # What was recorded has none of what was said.
    assert events(database, agent, kakunin) == [
        ("api_call", {"stage": "session_start"}),
        ("api_call", {"stage": "turn", "prompt_chars": 6}),
        ("api_call", {"tool": "read_database", "outcome": "returned"}),
        ("api_call", {"tool": "execute_trade", "outcome": "returned"}),
        ("api_call", {"stage": "answer", "answer_chars": 4}),
        ("api_call", {"stage": "session_end"}),
    ]


def test_a_tool_that_a_scope_is_missing_for(database: Any, tmp_path: Path) -> None:
    with refused(database, "denied") as case, chat_server(TRADE, READ, "done") as model:
        tools = Tools()
        kakunin = case.client()
        hooks = get_kakunin_hooks(kakunin, case.agent.agent_id, MAPPING)
        assert run(model, tools, hooks, tmp_path, "Trade.") == ["done"]
        assert tools.ran == ["read all"]
        told, _ = model.tool_messages()
        assert "ScopeViolationError" in told
        assert case.reason in told
        attempts = [m for kind, m in events(database, case.agent, kakunin) if kind != "api_call"]
        assert attempts == [{"tool": "execute_trade", "sqlstate": "KA005"}]


@refusals
def test_no_turn_of_an_agent_that_may_not(database: Any, tmp_path: Path, how: str) -> None:
    """Nor is the model asked."""
    with refused(database, how) as case, chat_server(TRADE, "done") as model:
        tools = Tools()
        hooks = get_kakunin_hooks(
            case.client(), case.agent.agent_id, MAPPING, required_scopes=["trade.execute"], monitored=False
        )
        with pytest.raises(AntigravityExecutionError, match=case.reason):
            run(model, tools, hooks, tmp_path, "Trade.")
        assert (tools.ran, model.requests) == ([], [])


@refusals
def test_no_tool_of_an_agent_that_may_not(database: Any, tmp_path: Path, how: str) -> None:
    """Also where the hook of the turn is left out."""
    with refused(database, how) as case, chat_server(TRADE, "done") as model:
        tools = Tools()
        hooks = get_kakunin_hooks(case.client(), case.agent.agent_id, MAPPING, monitored=False)
        only = [hook for hook in hooks if isinstance(hook, KakuninPreToolCallDecideHook)]
        assert run(model, tools, only, tmp_path, "Trade.") == ["done"]
        assert tools.ran == []
        (told,) = model.tool_messages()
        assert case.error.__name__ in told
        assert case.reason in told


def test_g3_revoked_between_two_tools(database: Any, tmp_path: Path) -> None:
    agent, kakunin = permitted(database)
    tools = Tools(then=agent.revoke)
    hooks = get_kakunin_hooks(kakunin, agent.agent_id, MAPPING)
    with chat_server(TRADE, READ, "done") as model:
        with pytest.raises(AntigravityExecutionError, match="revoked"):
            run(model, tools, hooks, tmp_path, "Trade.", "And again.")
        assert tools.ran == ["trade one"]
        assert "CertificateRevokedError" in model.tool_messages()[-1]
        assert len(model.requests) == 3  # of the second turn none


def test_a_tool_that_fails(database: Any, tmp_path: Path) -> None:
    agent, kakunin = permitted(database)

    def fail() -> None:
        raise RuntimeError("card 4111 1111")

    tools = Tools(then=fail)
    with chat_server(TRADE, "done") as model:
        run(model, tools, get_kakunin_hooks(kakunin, agent.agent_id, MAPPING), tmp_path, "Trade.")
        assert "4111" in model.tool_messages()[0]  # as without the hooks
    assert tools.ran == ["trade one"]
    recorded = events(database, agent, kakunin)
    failed = {"tool": "execute_trade", "outcome": "raised", "error": "ToolExecutionError"}
    assert ("api_call", failed) in recorded
    assert "4111" not in str(recorded)


def test_tools_of_the_sdk_and_those_not_named(database: Any, tmp_path: Path) -> None:
    _, kakunin = permitted(database)
    mapping = {BuiltinTools.RUN_COMMAND: ["shell"], "start_subagent": ["agents"], "*": ["data:read"]}
    hooks = get_kakunin_hooks(kakunin, tool_scopes_mapping=mapping, monitored=False)  # attempts revoke
    (decide,) = (hook for hook in hooks if isinstance(hook, KakuninPreToolCallDecideHook))

    async def asked(*names: Any) -> None:
        for name in names:
            assert (await decide.run(None, ToolCall(name=name))).allow

    asyncio.run(asked("anything", "view_file"))
    for name in (BuiltinTools.RUN_COMMAND, "run_command", "start_subagent", "invoke_subagent"):
        with pytest.raises(ScopeViolationError):
            asyncio.run(asked(name))
    proof = tmp_path / "proof"
    arguments = {"CommandLine": f"touch {proof}", "Cwd": str(tmp_path), "WaitMsBeforeAsync": 500}
    command = [("run_command", arguments)]
    with chat_server(command, "done") as model:
        run(model, Tools(), hooks, tmp_path, "Run it.")
        assert "ScopeViolationError" in model.tool_messages()[0]
        assert not proof.exists()
    with chat_server(command, "done") as model:
        run(model, Tools(), [], tmp_path, "Run it.")
        assert proof.exists()  # as it does without the hooks


@pytest.mark.parametrize("mapping", [{"a": "trade.execute"}, {"a": None}, {1: ["x"]}, {"a": [""]}])
def test_a_mapping_that_is_none(database: Any, mapping: Any) -> None:
    _, kakunin = permitted(database)
    with pytest.raises(BadInputError):
        get_kakunin_hooks(kakunin, tool_scopes_mapping=mapping)


def test_the_config_of_the_article(database: Any) -> None:
    agent, kakunin = permitted(database)
    hooks = get_kakunin_hooks(kakunin=kakunin, agent_id=str(agent.agent_id), tool_scopes_mapping=MAPPING)
    config = LocalAgentConfig(model="m", tools=Tools().listed(), hooks=hooks)
    assert config.model_copy(deep=True).hooks == hooks


def test_the_double_fence(vault: Any, tmp_path: Path) -> None:
    """A tool that no hook guards, which asks for everybody's rows, gets the agent's."""
    from kakunin_db import bind_agent_session

    found: list[Any] = []

    def fetch() -> None:
        with vault.database.connect("agent_1") as connection:
            with bind_agent_session(connection, vault.one.credential) as bound:
                found.extend(bound.execute("select content from vault order by id").fetchall())

    with chat_server(TRADE, "done") as model:
        run(model, Tools(then=fetch), [], tmp_path, "Trade.")
    assert found == [("one-a",), ("one-b",)]


def test_the_example(example: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server([("read_vault", {}), ("erase_vault", {})], "I could read, and not erase.") as model:
        monkeypatch.setenv("OPENAI_BASE_URL", model.url)
        monkeypatch.setenv("OPENAI_API_KEY", "x")
        printed = example("google_antigravity_agent.py")
        read, erased = model.tool_messages()
    assert printed == ["I could read, and not erase."]
    assert "written for atlas" in read
    assert "borealis" not in read
    assert "does not permit 'vault:erase'" in erased
