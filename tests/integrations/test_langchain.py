"""LangChain's tools and chains, guarded."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import psycopg
import pytest

pytest.importorskip("langchain", exc_type=ImportError)

from conftest import Vault
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, CallbackManagerForToolRun
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, ToolCall, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableGenerator, RunnableLambda, RunnableParallel
from langchain_core.tools import (
    BaseTool,
    InjectedToolArg,
    InjectedToolCallId,
    StructuredTool,
    Tool,
    ToolException,
    tool,
)
from langchain_core.utils.function_calling import convert_to_openai_tool

from integrations.conftest import PERMITTED, Scene, adrain, drain
from kakunin_db import (
    BadInputError,
    CertificateRevokedError,
    Kakunin,
    KakuninError,
    ScopeViolationError,
    bind_agent_session,
)
from kakunin_db.integrations.langchain import (
    KakuninToolGuard,
    ToolScopeViolationError,
    langchain_scope_callback,
)

CALL = ToolCall(name="execute_order", args={"order_details": "x", "lots": 2}, id="call_1", type="tool_call")


def order_tool(ran: list[str], kind: str = "both") -> BaseTool:
    def execute_order(order_details: str, lots: int = 1) -> str:
        """Execute order request."""
        ran.append(order_details)
        return f"{lots} lots: {order_details}"

    async def aexecute_order(order_details: str, lots: int = 1) -> str:
        """Execute order request."""
        return execute_order(order_details, lots)

    return StructuredTool.from_function(
        func=None if kind == "async" else execute_order,
        coroutine=None if kind == "sync" else aexecute_order,
        name="execute_order",
    )


class Model(GenericFakeChatModel):
    """Says what it is told to, and keeps what tools it was offered."""

    offered: list[Any] = []  # noqa: RUF012

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        self.offered[:] = [convert_to_openai_tool(each) for each in tools]
        return self


def model(*messages: Any) -> Model:
    return Model(messages=iter(messages), offered=[])


class Seen(BaseCallbackHandler):
    """Keeps what a tool's callbacks are called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def on_tool_start(self, serialized: Any, input_str: str, *, inputs: Any = None, **kwargs: Any) -> None:
        self.calls.append(
            ("start", serialized, input_str, inputs, kwargs.get("tags"), kwargs.get("metadata"))
        )

    def on_tool_end(self, output: Any, **kwargs: Any) -> None:
        self.calls.append(("end", output))

    def on_tool_error(self, error: BaseException, **kwargs: Any) -> None:
        self.calls.append(("error", error))


# The tool -------------------------------------------------------------------------------------------------

WAYS: dict[str, Callable[[BaseTool], Any]] = {
    "invoke": lambda each: each.invoke({"order_details": "x"}),
    "call": lambda each: each.invoke(CALL),
    "run": lambda each: each.run({"order_details": "x"}),
    "stream": lambda each: drain(each.stream({"order_details": "x"})),
    "batch": lambda each: each.batch([{"order_details": "x"}]),
    "chain": lambda each: (RunnableLambda(lambda x: x) | each).invoke({"order_details": "x"}),
    "func": lambda each: each.func(order_details="x"),  # type: ignore[attr-defined]
}
ASYNC_WAYS: dict[str, Callable[[BaseTool], Any]] = {
    "ainvoke": lambda each: each.ainvoke({"order_details": "x"}),
    "acall": lambda each: each.ainvoke(CALL),
    "arun": lambda each: each.arun({"order_details": "x"}),
    "astream": lambda each: adrain(each.astream({"order_details": "x"})),
    "astream_events": lambda each: adrain(each.astream_events({"order_details": "x"}, version="v2")),
    "abatch": lambda each: each.abatch([{"order_details": "x"}]),
    "achain": lambda each: (RunnableLambda(lambda x: x) | each).ainvoke({"order_details": "x"}),
}


@pytest.mark.parametrize("way", ["invoke", "stream"])
def test_refused(scene: Scene, way: str) -> None:
    guard = KakuninToolGuard(
        kakunin=scene.client(),
        agent_id=str(scene.agent.agent_id),
        tool=order_tool(scene.ran),
        required_scopes=scene.scopes,
    )
    scene.refused(lambda: WAYS[way](guard))


@pytest.mark.parametrize("client", ["sync", "async"])
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_refused_async(scene: Scene, kind: str, client: str) -> None:
    kakunin = scene.client() if client == "sync" else scene.async_client()
    tool = order_tool(scene.ran, kind)
    guard = KakuninToolGuard(kakunin=kakunin, tool=tool, required_scopes=scene.scopes)
    await scene.arefused(lambda: ASYNC_WAYS["ainvoke"](guard))
    if client == "async":
        await kakunin.aclose()  # type: ignore[union-attr]


def test_every_way(revoked: Scene) -> None:
    guard = KakuninToolGuard(revoked.client(), tool=order_tool(revoked.ran), required_scopes=PERMITTED[:1])
    for way in WAYS.values():
        revoked.ran.clear()
        way(guard)
        assert revoked.ran == ["x"]
    revoked.ran.clear()
    revoked.strike()
    for way in WAYS.values():
        with pytest.raises(revoked.error):
            way(guard)
    (returned,) = guard.batch([{"order_details": "x"}], return_exceptions=True)
    assert isinstance(returned, revoked.error)
    assert revoked.ran == []


async def test_every_way_async(revoked: Scene) -> None:
    guard = KakuninToolGuard(revoked.client(), tool=order_tool(revoked.ran), required_scopes=PERMITTED[:1])
    for way in ASYNC_WAYS.values():
        revoked.ran.clear()
        await way(guard)
        assert revoked.ran == ["x"]
    revoked.ran.clear()
    revoked.strike()
    for way in ASYNC_WAYS.values():
        with pytest.raises(revoked.error):
            await way(guard)
    with pytest.raises(revoked.error):
        await guard.coroutine(order_details="x")  # type: ignore[misc]
    assert revoked.ran == []


class Custom(BaseTool):
    """A tool of a class of its own, which asks for the configuration by another name."""

    name: str = "custom"
    description: str = "What it does."
    tags: list[str] | None = ["a"]  # noqa: RUF012
    metadata: dict[str, Any] | None = {"m": 1}  # noqa: RUF012

    def _run(
        self, query: str, settings: RunnableConfig, run_manager: CallbackManagerForToolRun | None = None
    ) -> str:
        return f"{query} {settings['metadata']['user']} {run_manager is not None}"


def shapes() -> Iterator[tuple[BaseTool, Any]]:
    """Tools of every shape, and an input for each."""

    @tool
    def injected(
        query: str,
        secret: Annotated[str, InjectedToolArg],
        call_id: Annotated[str, InjectedToolCallId],
        config: RunnableConfig,
        *,
        limit: int = 3,
    ) -> str:
        """Has arguments that no model sees."""
        return f"{query} {secret} {call_id} {limit} {config['metadata']['user']}"

    @tool(response_format="content_and_artifact", return_direct=True, parse_docstring=True)
    def artifact(query: str) -> tuple[str, list[int]]:
        """Has an artifact.

        Args:
            query: What is asked.
        """
        return query, [1, 2]

    call = {"name": "x", "id": "call_1", "type": "tool_call"}
    yield injected, {**call, "args": {"query": "q", "secret": "s"}}
    yield artifact, {**call, "args": {"query": "q"}}
    yield artifact, {"query": "q"}
    yield Custom(), {"query": "q"}
    yield Custom(), "q"
    yield Tool("simple", lambda text: text.upper(), "A tool of one text."), "q"
    yield Tool("simple", lambda text: text.upper(), "A tool of one text."), {"__arg1": "q"}
    yield order_tool([], "both"), {**call, "args": {"order_details": "x", "lots": "2"}}
    schema = {"title": "t", "type": "object", "properties": {"order_details": {"type": "string"}}}
    yield (
        StructuredTool(name="t", description="d", args_schema=schema, func=lambda order_details: 1),
        {"order_details": "x"},
    )


def offer(each: BaseTool) -> dict[str, Any]:
    """What a model is told of a tool, but for the title of a Tool's argument, which is its name again."""
    said = convert_to_openai_tool(each)
    said["function"]["parameters"]["properties"].get("__arg1", {}).pop("title", None)
    return said


@pytest.mark.parametrize("shape", list(shapes()), ids=lambda shape: shape[0].name)
async def test_it_is_the_tool_that_it_guards(revoked: Scene, shape: tuple[BaseTool, Any]) -> None:
    plain, given = shape
    guard = KakuninToolGuard(revoked.client(), tool=plain)
    assert isinstance(guard, BaseTool)
    for name in BaseTool.model_fields:
        if (name, type(plain)) != ("args_schema", Tool):
            assert getattr(guard, name) == getattr(plain, name), name
    assert offer(guard) == offer(plain)
    assert guard.args == plain.args
    assert guard.is_single_input == plain.is_single_input
    assert guard.get_input_jsonschema() == plain.get_input_jsonschema()
    results, seen = [], []
    for each in (plain, guard):
        seen.append(Seen())
        config: RunnableConfig = {"callbacks": [seen[-1]], "metadata": {"user": "u"}, "tags": ["t"]}
        results.append([each.invoke(given, config), await each.ainvoke(given, config)])
    assert results[0] == results[1]
    assert len(seen[0].calls) == 4
    assert seen[0].calls == seen[1].calls


def test_arguments_are_validated_as_before(revoked: Scene) -> None:
    plain = order_tool(revoked.ran)
    plain.handle_validation_error = True
    guard = KakuninToolGuard(revoked.client(), tool=plain)
    assert guard.invoke({"order_details": "x", "lots": "many"}) == "Tool input validation error"
    assert revoked.ran == []


def test_the_models_turn(denied: Scene) -> None:
    """handle_tool_error tells the model of a tool that is not permitted; nothing hides the agent's end."""
    plain = order_tool(denied.ran)
    client = denied.client()
    guard = KakuninToolGuard(client, tool=plain, required_scopes=denied.scopes)
    seen = Seen()
    with pytest.raises(ToolScopeViolationError, match="'admin'") as caught:
        guard.invoke(CALL, {"callbacks": [seen]})
    assert isinstance(caught.value, ScopeViolationError)
    assert isinstance(caught.value, ToolException)
    assert seen.calls[-1] == ("error", caught.value)
    plain.handle_tool_error = True
    guard = KakuninToolGuard(client, tool=plain, required_scopes=denied.scopes)
    message = guard.invoke(CALL)
    assert isinstance(message, ToolMessage)
    assert message.status == "error"
    assert "does not permit 'admin'" in message.content
    denied.agent.revoke()
    with pytest.raises(KakuninError, match="revoked"):
        guard.invoke(CALL)
    assert denied.ran == []


async def test_an_agents_run(revoked: Scene) -> None:
    """It is revoked between two calls of the tool; the second does not happen, and the run ends."""
    ran = revoked.ran

    @tool
    def execute_order(order_details: str) -> str:
        """Execute order request."""
        ran.append(order_details)
        if order_details == "second":
            revoked.strike()
        return "done"

    def script() -> Model:
        call = {"name": "execute_order", "id": "1"}
        said = [
            AIMessage("", tool_calls=[{**call, "args": {"order_details": n}}])
            for n in ("first", "second", "third")
        ]
        return model(*said, AIMessage("finished"))

    async_client = revoked.async_client()
    first = script()
    guards = [
        KakuninToolGuard(each, tool=execute_order, required_scopes=["data:read"])
        for each in (revoked.client(), async_client)
    ]
    with pytest.raises(revoked.error):
        create_agent(first, [guards[0]]).invoke({"messages": ["go"]})
    assert ran == ["first", "second"]
    assert first.offered == [convert_to_openai_tool(execute_order)]
    for guard in guards:
        with pytest.raises(revoked.error):
            await adrain(create_agent(script(), [guard]).astream({"messages": ["go"]}))
    assert ran == ["first", "second"]
    await async_client.aclose()


def test_what_is_recorded(denied: Scene) -> None:
    client = denied.client()

    @tool
    def fails(secret: str) -> str:
        """Fails."""
        raise ValueError(secret)

    KakuninToolGuard(client, tool=order_tool(denied.ran), event_type="data_mutation").invoke(
        {"order_details": "hidden"}
    )
    with pytest.raises(ValueError, match="hidden"):
        KakuninToolGuard(client, tool=fails).invoke("hidden")
    with pytest.raises(ScopeViolationError):
        KakuninToolGuard(client, tool=fails, required_scopes=denied.scopes).invoke("hidden")
    with pytest.raises(ScopeViolationError, match="acts for agent"):
        KakuninToolGuard(client, uuid.UUID(int=7), tool=fails).invoke("hidden")
    KakuninToolGuard(client, tool=order_tool(denied.ran), monitored=False).invoke({"order_details": "x"})
    events = denied.events()
    assert "hidden" not in repr(events)
    for _, metadata in events[:2]:
        assert 0 <= metadata.pop("seconds") < 60
    assert events == [
        ("data_mutation", {"framework": "langchain", "tool": "execute_order", "outcome": "returned"}),
        ("api_call", {"framework": "langchain", "tool": "fails", "outcome": "raised", "error": "ValueError"}),
        ("unauthorized_access_attempt", {"framework": "langchain", "tool": "fails", "sqlstate": "KA005"}),
    ]


async def test_what_cannot_be_guarded(revoked: Scene) -> None:
    client, async_client = revoked.client(), revoked.async_client()
    plain = order_tool(revoked.ran)
    for options in (
        {"kakunin": client, "tool": lambda: None},
        {"kakunin": client, "tool": plain, "required_scopes": "trade.execute"},
        {"kakunin": client, "tool": plain, "agent_id": "agt-123"},
        {"kakunin": Kakunin(revoked.dsn), "tool": plain},
        {"kakunin": None, "tool": plain},
        {"kakunin": client, "tool": plain, "monitor": object()},
    ):
        with pytest.raises(BadInputError):
            KakuninToolGuard(**options)  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="async"):
        KakuninToolGuard(async_client, tool=plain).invoke({"order_details": "x"})
    with pytest.raises(BadInputError, match="a callback asks a Kakunin"):
        langchain_scope_callback(async_client)  # type: ignore[arg-type]
    assert revoked.ran == []


# The chain ------------------------------------------------------------------------------------------------


class Docs(BaseRetriever):
    ran: Any

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        self.ran.append("retriever")
        return [Document(query)]


class Said(GenericFakeChatModel):
    ran: Any

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.ran.append("model")
        return super()._generate(*args, **kwargs)


def said(ran: list[str]) -> Said:
    def forever() -> Iterator[AIMessage]:
        while True:
            yield AIMessage("ok")

    return Said(messages=forever(), ran=ran)


def chains(ran: list[str]) -> dict[str, Any]:
    def note(value: Any) -> Any:
        ran.append("step")
        return value

    async def anote(value: Any) -> Any:
        return note(value)

    def each(values: Iterator[Any]) -> Iterator[Any]:
        ran.append("generator")
        yield from values

    async def aeach(values: AsyncIterator[Any]) -> AsyncIterator[Any]:
        ran.append("generator")
        async for value in values:
            yield value

    step = RunnableLambda(note, anote)
    return {
        "sequence": ChatPromptTemplate.from_template("{x}") | step | said(ran) | StrOutputParser(),
        "step": step,
        "parallel": RunnableParallel(a=step, b=step),
        "generator": RunnableGenerator(each, aeach),
        "model": ChatPromptTemplate.from_template("{x}") | said(ran),
        "retriever": RunnableLambda(lambda x: x["x"]) | Docs(ran=ran),
        "retry": step.with_retry(stop_after_attempt=2, wait_exponential_jitter=False),
        "fallback": step.with_fallbacks([step]),
        "map": RunnableLambda(lambda x: [x, x]) | step.map(),
    }


CHAINS = list(chains([]))
INPUT = {"x": "x"}


@pytest.mark.parametrize("name", CHAINS)
async def test_g3_a_revoked_agents_chain_does_not_run(revoked: Scene, name: str) -> None:
    chain = chains(revoked.ran)[name].with_config(
        callbacks=[langchain_scope_callback(revoked.client(), agent_id=revoked.agent.agent_id)]
    )
    ways: list[Callable[[], Any]] = [
        lambda: chain.invoke(INPUT),
        lambda: drain(chain.stream(INPUT)),
        lambda: chain.batch([INPUT, INPUT]),
        lambda: chain.invoke(INPUT, {"callbacks": [Seen()]}),
    ]
    async_ways: list[Callable[[], Any]] = [
        lambda: chain.ainvoke(INPUT),
        lambda: adrain(chain.astream(INPUT)),
        lambda: chain.abatch([INPUT, INPUT]),
        lambda: adrain(chain.astream_events(INPUT, version="v2")),
    ]
    for way in ways:
        revoked.ran.clear()
        way()
        assert revoked.ran
    for way in async_ways:
        revoked.ran.clear()
        await way()
        assert revoked.ran
    revoked.strike()
    revoked.ran.clear()
    for way in ways:
        with pytest.raises(revoked.error):
            way()
    for way in async_ways:
        with pytest.raises(revoked.error):
            await way()
    assert revoked.ran == []


@pytest.mark.parametrize("what", ["model", "retriever", "tool"])
async def test_g3_what_is_no_chain(revoked: Scene, what: str) -> None:
    """A callback of a model's, a retriever's or a tool's own."""
    plain: Any = {"model": said, "retriever": lambda ran: Docs(ran=ran), "tool": order_tool}[what](
        revoked.ran
    )
    guarded = plain.with_config(callbacks=[langchain_scope_callback(revoked.client())])
    given = {"order_details": "x"} if what == "tool" else "x"
    guarded.invoke(given)
    await guarded.ainvoke(given)
    assert len(revoked.ran) == 2
    revoked.strike()
    for way in (guarded.invoke, lambda x: drain(guarded.stream(x))):
        with pytest.raises(revoked.error):
            way(given)
    for way in (guarded.ainvoke, lambda x: adrain(guarded.astream(x))):
        with pytest.raises(revoked.error):
            await way(given)
    assert len(revoked.ran) == 2


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_chain_refused(scene: Scene, way: str) -> None:
    def step(value: str) -> str:
        scene.ran.append(value)
        return value

    callback = langchain_scope_callback(scene.client(), required_scopes=scene.scopes)
    chain = RunnableLambda(step).with_config(callbacks=[callback])
    if way == "sync":
        scene.refused(lambda: chain.invoke("x"))
    else:
        await scene.arefused(lambda: chain.ainvoke("x"))
    if scene.how == "denied":
        ((event_type, metadata),) = scene.events()
        assert event_type == "unauthorized_access_attempt"
        assert metadata == {"framework": "langchain", "chain": "step", "sqlstate": "KA005"}


async def test_revoked_on_the_way(revoked: Scene) -> None:
    """The step that is under way ends; no other begins."""
    ran = revoked.ran

    def first(value: str) -> str:
        ran.append("first")
        revoked.strike()
        return value

    def second(value: str) -> str:
        ran.append("second")
        return value

    chain = (RunnableLambda(first) | RunnableLambda(second)).with_config(
        callbacks=[langchain_scope_callback(revoked.client())]
    )
    with pytest.raises(revoked.error):
        chain.invoke("x")
    with pytest.raises(revoked.error):
        await chain.ainvoke("x")
    assert ran == ["first"]


async def test_a_revoked_agents_graph_does_not_run(revoked: Scene) -> None:
    guarded = create_agent(said(revoked.ran), []).with_config(
        callbacks=[langchain_scope_callback(revoked.client())]
    )
    guarded.invoke({"messages": ["go"]})
    revoked.strike()
    revoked.ran.clear()
    with pytest.raises(revoked.error):
        guarded.invoke({"messages": ["go"]})
    with pytest.raises(revoked.error):
        await guarded.ainvoke({"messages": ["go"]})
    assert revoked.ran == []


def test_why_no_handler_is_async(revoked: Scene) -> None:
    """LangChain only logs what an async handler raises in a chain that is not: shown with one that raises."""

    class Raises(AsyncCallbackHandler):
        raise_error = True

        async def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError

    assert RunnableLambda(lambda x: x).invoke("ran", {"callbacks": [Raises()]}) == "ran"


# Examples, and the second fence ---------------------------------------------------------------------------


def test_the_example(example: Callable[[str], list[str]]) -> None:
    assert example("langchain_agent.py") == [
        "human: Read the vault, then erase it.",
        "ai: ",
        "tool: [('written for atlas',)]",
        "ai: ",
        "tool: the certificate does not permit 'vault:erase'",
        "ai: I could read, and not erase.",
    ]


def test_the_example_of_the_second_fence(example: Callable[[str], list[str]]) -> None:
    assert example("double_fence.py") == [
        "guarded: refused: the certificate does not permit 'vault:query'",
        "gone around: [('written for atlas',)]",
        "gone around: [('written for atlas',)]",
        'gone around: refused: new row violates row-level security policy for table "agent_vault"',
    ]


@pytest.mark.parametrize("around", ["tool", "func", "_tool", "unbound"])
def test_the_second_fence(vault: Vault, around: str) -> None:
    """Whatever way around the guard: the agent's rows, and none once it is revoked."""
    one, dsn = vault.one, vault.database.dsn("agent_1")

    @tool
    def query(sql: str) -> list[Any]:
        """Runs SQL."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, one.credential):
            return connection.execute(sql.encode()).fetchall()

    @tool
    def unbound(sql: str) -> list[Any]:
        """Runs SQL of nobody's."""
        with psycopg.connect(dsn) as connection:
            return connection.execute(sql.encode()).fetchall()

    with Kakunin(dsn, credential=one.credential) as kakunin:
        guard = KakuninToolGuard(kakunin, tool=query, required_scopes=["admin"], monitored=False)
        sql = "select content from vault order by content"
        with pytest.raises(ScopeViolationError):
            guard.invoke(sql)
        ways: dict[str, Callable[[str], Any]] = {
            "tool": query.invoke,
            "func": query.func,  # type: ignore[attr-defined, dict-item]
            "_tool": guard._tool.invoke,
        }
        if around not in ways:
            assert unbound.invoke(sql) == []
            return
        assert ways[around](sql) == [("one-a",), ("one-b",)]
        one.revoke()
        with pytest.raises(CertificateRevokedError):
            ways[around](sql)
