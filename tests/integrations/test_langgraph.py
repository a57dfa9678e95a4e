"""LangGraph's nodes and tool node, guarded."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import pytest

pytest.importorskip("langgraph", exc_type=ImportError)

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import InjectedState, ToolNode, tools_condition
from langgraph.runtime import Runtime
from langgraph.types import Command, interrupt
from typing_extensions import TypedDict

from integrations.conftest import PERMITTED, Scene, adrain, drain
from kakunin_db import BadInputError, VerificationUnavailableError
from kakunin_db.integrations.langchain import KakuninToolGuard
from kakunin_db.integrations.langgraph import KakuninToolNode, kakunin_node


class State(TypedDict):
    value: str


def graph_of(node: Any, **options: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("trade", node)
    graph.add_edge(START, "trade")
    graph.add_edge("trade", END)
    return graph.compile(**options)


def nodes(ran: list[str]) -> dict[str, Any]:
    def plain(state: State) -> State:
        ran.append("ran")
        return {"value": state["value"] + "!"}

    async def asynchronous(state: State) -> State:
        return plain(state)

    def asks(state: State, config: RunnableConfig, runtime: Runtime[Any]) -> State:
        assert config["metadata"]["user"] == "u"
        if sys.version_info >= (3, 11):  # before that, LangGraph has no writer in a graph that is async
            runtime.stream_writer("written")
        return plain(state)

    class Node:
        def __call__(self, state: State) -> State:
            return plain(state)

    class AsyncNode:
        async def __call__(self, state: State) -> State:
            return plain(state)

    def generator(state: State) -> Any:
        yield plain(state)

    return {
        "plain": plain,
        "async": asynchronous,
        "asks": asks,
        "object": Node(),
        "async object": AsyncNode(),
        "partial": functools.partial(lambda more, state: plain(state), 1),
        "runnable": RunnableLambda(plain, asynchronous),
        "graph": graph_of(plain),
        "generator": generator,
    }


CONFIG: RunnableConfig = {"metadata": {"user": "u"}}
GIVEN: Any = {"value": "x"}
ONLY_ASYNC = ("async", "async object")


@pytest.mark.parametrize("name", nodes([]))
async def test_a_node(revoked: Scene, name: str) -> None:
    """What it returns is what it did; once revoked, it does not run, whatever the way."""
    node = nodes(revoked.ran)[name]
    plain = graph_of(node)
    guarded = graph_of(
        kakunin_node(revoked.client(), agent_id=revoked.agent.agent_id, required_scopes=PERMITTED[:1])(node)
    )
    assert guarded.get_input_jsonschema() == plain.get_input_jsonschema()
    ways: list[Callable[[Any], Any]] = [
        lambda graph: graph.invoke(GIVEN, CONFIG),
        lambda graph: drain(graph.stream(GIVEN, CONFIG, stream_mode=["updates", "custom"])),
    ]
    async_ways: list[Callable[[Any], Any]] = [
        lambda graph: graph.ainvoke(GIVEN, CONFIG),
        lambda graph: adrain(graph.astream(GIVEN, CONFIG, stream_mode=["updates", "custom"])),
    ]
    if name in ONLY_ASYNC:
        ways = []
    for way in ways:
        expected = way(plain)
        revoked.ran.clear()
        assert way(guarded) == expected
        assert revoked.ran == ["ran"]
    for way in async_ways:
        expected = await way(plain)
        revoked.ran.clear()
        assert await way(guarded) == expected
        assert revoked.ran == ["ran"]
    revoked.strike()
    revoked.ran.clear()
    for way in ways:
        with pytest.raises(revoked.error):
            way(guarded)
    for way in async_ways:
        with pytest.raises(revoked.error):
            await way(guarded)
    assert revoked.ran == []


def test_a_node_refused(scene: Scene) -> None:
    guard = kakunin_node(scene.client(), required_scopes=scene.scopes)
    graph = graph_of(guard(nodes(scene.ran)["plain"]))
    scene.refused(lambda: graph.invoke(GIVEN))


@pytest.mark.parametrize("client", ["sync", "async"])
@pytest.mark.parametrize("name", ["async", "runnable"])
async def test_a_node_refused_async(scene: Scene, name: str, client: str) -> None:
    kakunin = scene.client() if client == "sync" else scene.async_client()
    graph = graph_of(kakunin_node(kakunin, required_scopes=scene.scopes)(nodes(scene.ran)[name]))
    await scene.arefused(lambda: graph.ainvoke(GIVEN))
    if client == "async":
        await kakunin.aclose()  # type: ignore[union-attr]


def test_an_interrupt_and_what_is_recorded(revoked: Scene) -> None:
    """A node that waits for somebody is asked for again when it goes on."""

    @kakunin_node(revoked.client(), event_type="data_mutation")
    def approve(state: State) -> State:
        answer = interrupt("may I?")
        revoked.ran.append(answer)
        return {"value": answer}

    graph = graph_of(approve, checkpointer=InMemorySaver())
    threads: list[RunnableConfig] = [{"configurable": {"thread_id": n}} for n in ("1", "2")]
    for thread in threads:
        assert "__interrupt__" in graph.invoke(GIVEN, thread)
    assert graph.invoke(Command(resume="yes"), threads[0])["value"] == "yes"
    events = revoked.events()
    revoked.strike()
    with pytest.raises(revoked.error):
        graph.invoke(Command(resume="yes"), threads[1])
    assert revoked.ran == ["yes"]
    assert [(event, metadata["outcome"]) for event, metadata in events] == [
        ("data_mutation", "raised"),
        ("data_mutation", "raised"),
        ("data_mutation", "returned"),
    ]
    assert {metadata["node"] for _, metadata in events} == {"approve"}
    assert events[0][1]["error"] == "GraphInterrupt"


# The tool node --------------------------------------------------------------------------------------------


class Model(GenericFakeChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def loop_of(node: Any, *calls: str) -> Any:
    """A model that calls these tools, one after the other, until it has no more."""
    said = [AIMessage("", tool_calls=[{"name": c, "args": {"order": c}, "id": c}]) for c in calls]
    model = Model(messages=iter([*said, AIMessage("finished")]))
    graph = StateGraph(MessagesState)
    graph.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    graph.add_node("tools", node)
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", tools_condition)
    graph.add_edge("tools", "model")
    return graph.compile()


def tools_of(ran: list[str]) -> list[Any]:
    @tool
    def execute(order: str, state: Annotated[MessagesState, InjectedState]) -> str:
        """Executes an order."""
        ran.append(order)
        get_stream_writer()("written")
        return f"{order} after {len(state['messages'])}"

    def look(order: str) -> str:
        """Looks at an order."""
        ran.append(order)
        return order

    return [execute, look]


GO: Any = {"messages": ["go"]}
HANDLING: dict[str, dict[str, Any]] = {
    "default": {},
    "all": {"handle_tool_errors": True},
    "none": {"handle_tool_errors": False},
    "text": {"handle_tool_errors": "it went wrong"},
    "class": {"handle_tool_errors": Exception},
}


def messages(result: Any) -> list[tuple[Any, ...]]:
    return [(m.type, m.content, getattr(m, "status", None)) for m in result["messages"]]


async def test_a_tool_node(revoked: Scene) -> None:
    plain = ToolNode(tools_of([]))
    guarded = KakuninToolNode(tools_of(revoked.ran), kakunin=revoked.client(), required_scopes=PERMITTED[:1])
    assert isinstance(guarded, ToolNode)
    assert list(guarded.tools_by_name) == list(plain.tools_by_name)
    assert all(isinstance(each, KakuninToolGuard) for each in guarded.tools_by_name.values())
    calls = ("execute", "look", "nothing")
    expected = messages(loop_of(plain, *calls).invoke(GO))
    assert messages(loop_of(guarded, *calls).invoke(GO)) == expected
    assert messages(await loop_of(guarded, *calls).ainvoke(GO)) == expected
    assert revoked.ran == ["execute", "look"] * 2
    assert drain(loop_of(guarded, *calls).stream(GO, stream_mode="custom")) == ["written"]


@pytest.mark.parametrize("handling", HANDLING)
async def test_g3_a_revoked_agents_graph_stops(revoked: Scene, handling: str) -> None:
    """Also where errors of tools are handled by telling the model of them."""
    node = KakuninToolNode(tools_of(revoked.ran), kakunin=revoked.client(), **HANDLING[handling])
    loop_of(node, "look").invoke(GO)
    revoked.strike()
    for graph in (loop_of(node, "look", "look"), loop_of(node, "execute")):
        with pytest.raises(revoked.error):
            graph.invoke(GO)
    with pytest.raises(revoked.error):
        drain(loop_of(node, "look").stream(GO))
    with pytest.raises(revoked.error):
        await loop_of(node, "look").ainvoke(GO)
    with pytest.raises(revoked.error):
        await adrain(loop_of(node, "look").astream(GO))
    assert revoked.ran == ["look"]


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_tool_refused(scene: Scene, way: str) -> None:
    kakunin = scene.client() if way == "sync" else scene.async_client()
    node = KakuninToolNode(tools_of(scene.ran), kakunin=kakunin, required_scopes=scene.scopes)
    if way == "sync":
        scene.refused(lambda: loop_of(node, "look").invoke(GO))
    else:
        await scene.arefused(lambda: loop_of(node, "look").ainvoke(GO))
        await kakunin.aclose()  # type: ignore[union-attr]


def test_asked_again(revoked: Scene) -> None:
    """What a tool is called by may try again when the database was away, and what it did then is kept."""

    def again(request: Any, execute: Callable[[Any], Any]) -> Any:
        try:
            return execute(request)
        except VerificationUnavailableError:
            revoked.relay.mend()
            return execute(request)

    options: dict[str, Any] = {"kakunin": revoked.client(), "handle_tool_errors": False}
    node = KakuninToolNode(tools_of(revoked.ran), wrap_tool_call=again, **options)
    revoked.relay.cut()
    assert loop_of(node, "look").invoke(GO)["messages"][2].content == "look"
    assert revoked.ran == ["look"]


def test_the_model_chooses_another(denied: Scene) -> None:
    node = KakuninToolNode(
        tools_of(denied.ran),
        kakunin=denied.client(),
        required_scopes={"execute": ["admin"], "look": []},
        handle_tool_errors=True,
    )
    result = loop_of(node, "execute", "look").invoke(GO)
    assert denied.ran == ["look"]
    refusal = result["messages"][2]
    assert isinstance(refusal, ToolMessage)
    assert refusal.status == "error"
    assert "does not permit 'admin'" in refusal.content
    assert [(event, metadata["tool"]) for event, metadata in denied.events()] == [
        ("unauthorized_access_attempt", "execute"),
        ("api_call", "look"),
    ]


def test_what_cannot_be_guarded(revoked: Scene) -> None:
    client, made = revoked.client(), tools_of([])
    assert isinstance(made[0], BaseTool)
    for scopes in (
        {"execute": ["a"]},
        {"execute": [], "look": [], "other": []},
        "look",
        {"execute": "a", "look": []},
    ):
        with pytest.raises(BadInputError):
            KakuninToolNode(made, kakunin=client, required_scopes=scopes)  # type: ignore[arg-type]
    with pytest.raises(BadInputError):
        kakunin_node(client)("no node")
    with pytest.raises(BadInputError):
        kakunin_node(client, "agt-123")


def test_the_example(example: Callable[[str], list[str]]) -> None:
    lines = example("langgraph_agent.py")
    assert lines[2] == "tool: [('written for atlas',)]"
    assert lines[4].startswith("tool: Error: ToolScopeViolationError")
    assert "does not permit 'vault:erase'" in lines[4]
    assert lines[-1] == "ai: I could read, and not erase."
