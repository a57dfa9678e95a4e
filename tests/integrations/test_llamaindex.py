"""LlamaIndex's function tool, guarded.

Without `from __future__ import annotations`: LlamaIndex finds a Context only by the class itself.
"""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("llama_index.core", exc_type=ImportError)

from llama_index.core.agent.workflow import FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM
from llama_index.core.tools import FunctionTool, ToolOutput
from llama_index.core.tools.calling import call_tool
from llama_index.core.workflow import Context

from integrations.conftest import PERMITTED, Scene
from kakunin_db import BadInputError, KakuninError
from kakunin_db.integrations.llamaindex import KakuninFunctionToolGuard

# LlamaIndex's agents use what pydantic, and LlamaIndex itself, deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def options(ran: list[str], kind: str = "sync") -> dict[str, Any]:
    def read_portfolio(user_id: str, limit: int = 3) -> str:
        """Retrieve portfolio details.

        Args:
            user_id (str): whose
        """
        ran.append(user_id)
        return f"{limit} of {user_id}"

    async def aread_portfolio(user_id: str, limit: int = 3) -> str:
        """Retrieve portfolio details."""
        return read_portfolio(user_id, limit)

    named: dict[str, Any] = {"name": "read_portfolio", "description": "Fetch portfolio data."}
    return {
        "sync": {"fn": read_portfolio, **named},
        "async": {"fn": aread_portfolio, **named},
        "only async": {"async_fn": aread_portfolio, **named},
        "both": {"fn": read_portfolio, "async_fn": aread_portfolio},
        "unnamed": {"fn": read_portfolio},
        "partial": {"fn": read_portfolio, "partial_params": {"limit": 7}},
        "callback": {"fn": read_portfolio, "callback": lambda result: f"{result}, called back"},
        "async callback": {"fn": read_portfolio, "async_callback": _called_back, "return_direct": True},
    }[kind]


async def _called_back(result: Any) -> str:
    return f"{result}, called back"


KINDS = ["sync", "async", "only async", "both", "unnamed", "partial", "callback", "async callback"]


def described(tool: FunctionTool) -> Any:
    return (
        tool.metadata.name,
        tool.metadata.description,
        tool.metadata.return_direct,
        tool.metadata.get_parameters_dict(),
        tool.metadata.to_openai_tool(),
        tool.partial_params,
        tool.requires_context,
    )


def said(output: ToolOutput) -> Any:
    return output.content, output.tool_name, output.raw_input, output.raw_output, output.is_error


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_the_tool_that_it_guards(revoked: Scene, kind: str) -> None:
    plain = FunctionTool.from_defaults(**options([], kind))
    guard = KakuninFunctionToolGuard(
        kakunin=revoked.client(),
        agent_id=str(revoked.agent.agent_id),
        required_scopes=["data:read"],
        **options(revoked.ran, kind),
    )
    assert isinstance(guard, FunctionTool)
    assert described(guard) == described(plain)
    assert said(await guard.acall(user_id="u")) == said(await plain.acall(user_id="u"))
    assert revoked.ran == ["u"]
    if kind not in ("async", "only async"):  # there, call() is no more than acall() in another thread
        assert said(guard("u")) == said(plain("u"))
        assert said(guard.call(user_id="u")) == said(plain.call(user_id="u"))
        assert said(call_tool(guard, {"user_id": "u"})) == said(call_tool(plain, {"user_id": "u"}))
        assert revoked.ran == ["u"] * 4
    revoked.ran.clear()
    revoked.strike()
    with pytest.raises(revoked.error):
        await guard.acall(user_id="u")
    with pytest.raises(revoked.error):
        guard.call(user_id="u")
    with pytest.raises(revoked.error):
        await guard.async_fn(user_id="u")
    for function in (guard.fn, guard.real_fn):
        with pytest.raises(revoked.error):
            returned = function(user_id="u")
            await returned  # type: ignore[misc]
    assert revoked.ran == []


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_refused(scene: Scene, kind: str) -> None:
    guard = KakuninFunctionToolGuard(
        kakunin=scene.client(), required_scopes=scene.scopes, **options(scene.ran, kind)
    )
    scene.refused(lambda: guard.call(user_id="u"))


@pytest.mark.parametrize("client", ["sync", "async"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_refused_async(scene: Scene, kind: str, client: str) -> None:
    kakunin = scene.client() if client == "sync" else scene.async_client()
    guard = KakuninFunctionToolGuard(kakunin, required_scopes=scene.scopes, **options(scene.ran, kind))
    await scene.arefused(lambda: guard.acall(user_id="u"))
    if client == "async":
        await kakunin.aclose()  # type: ignore[union-attr]


class Script:
    """A model that makes these calls, one after the other, and then ends."""

    def __init__(self, *calls: ToolCallBlock) -> None:
        self.calls = list(calls)
        self.heard: list[str] = []

    def __call__(self, messages: Any, **kwargs: Any) -> ChatMessage:
        self.heard = [str(message.content) for message in messages]
        if self.calls:
            return ChatMessage(role="assistant", blocks=[self.calls.pop(0)])
        return ChatMessage(role="assistant", blocks=[TextBlock(text="finished")])


async def results_of(agent: FunctionAgent | ReActAgent) -> list[ToolOutput]:
    running = agent.run("go")
    results = [
        event.tool_output async for event in running.stream_events() if isinstance(event, ToolCallResult)
    ]
    await running
    return results


async def test_an_agents_run(scene: Scene) -> None:
    """A tool that is refused does not run, and the model is told why, as of any error of a tool's."""
    ran = scene.ran

    async def read_portfolio(ctx: Context, user_id: str) -> str:
        """Retrieve portfolio details."""
        ran.append(user_id)
        await ctx.store.set("read", user_id)
        scene.strike()
        return user_id

    guard = KakuninFunctionToolGuard(scene.client(), fn=read_portfolio, required_scopes=scene.scopes)
    assert guard.requires_context
    assert set(guard.metadata.get_parameters_dict()["properties"]) == {"user_id"}
    calls = [
        ToolCallBlock(tool_call_id=each, tool_name="read_portfolio", tool_kwargs={"user_id": each})
        for each in ("first", "second")
    ]
    script = Script(*calls)
    agent = FunctionAgent(
        tools=[guard],
        llm=MockFunctionCallingLLM(response_generator=script, is_chat_model=True),
        streaming=False,
    )
    outputs = await results_of(agent)
    assert ran == ["first"][: scene.before]
    assert [output.is_error for output in outputs] == [scene.before == 0, True]
    error = outputs[-1].exception
    assert isinstance(error, scene.error)
    assert str(error) in script.heard


async def test_a_react_agents_run(revoked: Scene) -> None:
    """The article's agent, which reads its calls from the model's text."""
    guard = KakuninFunctionToolGuard(revoked.client(), required_scopes=["data:read"], **options(revoked.ran))
    act = 'Thought: I look.\nAction: read_portfolio\nAction Input: {"user_id": "u"}'
    said = iter([act, act, "Thought: I can answer.\nAnswer: finished"])

    def script(messages: Any, **kwargs: Any) -> ChatMessage:
        text = next(said)
        if revoked.ran:
            revoked.strike()
        return ChatMessage(role="assistant", content=text)

    llm = MockFunctionCallingLLM(response_generator=script, is_chat_model=True)
    outputs = await results_of(ReActAgent(tools=[guard], llm=llm, streaming=False))
    assert revoked.ran == ["u"]
    assert [type(output.exception) for output in outputs] == [type(None), revoked.error]


async def test_what_is_recorded(denied: Scene) -> None:
    def fails(secret: str) -> str:
        raise ValueError(secret)

    client = denied.client()
    await KakuninFunctionToolGuard(client, **options(denied.ran)).acall(user_id="hidden")
    with pytest.raises(ValueError, match="hidden"):
        KakuninFunctionToolGuard(client, fn=fails, event_type="data_access").call(secret="hidden")
    with pytest.raises(KakuninError):
        KakuninFunctionToolGuard(client, fn=fails, required_scopes=denied.scopes).call(secret="hidden")
    events = denied.events()
    assert "hidden" not in repr(events)
    assert [(event, metadata["tool"], metadata.get("outcome")) for event, metadata in events] == [
        ("api_call", "read_portfolio", "returned"),
        ("data_access", "fails", "raised"),
        ("unauthorized_access_attempt", "fails", None),
    ]
    assert {metadata["framework"] for _, metadata in events} == {"llamaindex"}


def test_what_cannot_be_guarded(revoked: Scene) -> None:
    with pytest.raises(BadInputError):
        KakuninFunctionToolGuard(revoked.client(), required_scopes="data:read", **options([]))
    with pytest.raises(BadInputError):
        KakuninFunctionToolGuard(revoked.client(), "agt-123", **options([]))
    with pytest.raises(BadInputError, match="async"):
        KakuninFunctionToolGuard(
            revoked.async_client(), required_scopes=PERMITTED[:1], **options(revoked.ran)
        ).call(user_id="u")
    assert revoked.ran == []


def test_the_example(example: Callable[[str], list[str]]) -> None:
    assert example("llamaindex_agent.py") == [
        "read_vault: [('written for atlas',)]",
        "erase_vault: the certificate does not permit 'vault:erase'",
        "I could read, and not erase.",
    ]
