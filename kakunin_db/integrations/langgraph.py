"""LangGraph: nodes, and a tool node, that run only while their agent may."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.tools import BaseTool, tool
from langgraph.prebuilt import ToolNode

from ..client import AsyncKakunin, Kakunin
from ..errors import BadInputError
from ..monitoring import Monitor
from .base import Guarded
from .langchain import KakuninToolGuard, ending


def kakunin_node(
    kakunin: Kakunin | AsyncKakunin,
    agent_id: uuid.UUID | str | None = None,
    *,
    required_scopes: Sequence[str] | None = None,
    event_type: str = "api_call",
    monitor: Monitor | None = None,
    monitored: bool = True,
) -> Callable[[Any], Any]:
    """Decorator: a node that runs only if, at that moment, its agent's certificate may be used and permits
    every one of ``required_scopes``; otherwise the graph raises what :meth:`ScopeGuard.check` does.

    Takes what ``add_node()`` takes, a graph or another Runnable too. An AsyncKakunin guards nodes of graphs
    that are run with ``ainvoke()`` and ``astream()``, and these have to be async functions or Runnables.

    :param kakunin: as ``agent_id`` and ``required_scopes``, those of :class:`~kakunin_db.ScopeGuard`.
    :param event_type: as ``monitor`` and ``monitored``, those of
        :class:`~kakunin_db.integrations.base.Guarded`.

    Raises BadInputError.
    """
    guarded = Guarded(
        "langgraph",
        kakunin,
        agent_id,
        required_scopes,
        event_type=event_type,
        monitor=monitor,
        monitored=monitored,
    )

    def decorate(node: Any) -> Any:
        if isinstance(node, Runnable):
            name = node.get_name()

            def invoke(state: Any, config: RunnableConfig) -> Any:
                with guarded.call(node=name):
                    return node.invoke(state, config)

            async def ainvoke(state: Any, config: RunnableConfig) -> Any:
                async with guarded.call(node=name):
                    return await node.ainvoke(state, config)

            return RunnableLambda(invoke, ainvoke, name=name)
        if not callable(node):
            raise BadInputError(f"a node is a function or a Runnable, and not {type(node).__name__}")
        return guarded.wrap(node, node=getattr(node, "__name__", type(node).__name__))

    return decorate


class KakuninToolNode(ToolNode):
    """A ToolNode whose tools are each guarded (:class:`~kakunin_db.integrations.langchain.KakuninToolGuard`).

    :param tools: as ``options``, those of ToolNode.
    :param required_scopes: of every tool; or of each by its name, and then for all of them.

    ``handle_tool_errors`` applies to a tool that no scope permits, for the model to choose another, and to
    VerificationUnavailableError. What ends the agent's run, such as CertificateRevokedError, leaves the node
    in any case, and the graph stops.

    Raises BadInputError.
    """

    def __init__(
        self,
        tools: Sequence[BaseTool | Callable[..., Any]],
        *,
        kakunin: Kakunin | AsyncKakunin,
        agent_id: uuid.UUID | str | None = None,
        required_scopes: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        event_type: str = "api_call",
        monitor: Monitor | None = None,
        monitored: bool = True,
        **options: Any,
    ) -> None:
        made = [each if isinstance(each, BaseTool) else tool(each) for each in tools]
        scopes = required_scopes
        if isinstance(scopes, Mapping) and set(scopes) != {each.name for each in made}:
            raise BadInputError(
                "required_scopes has to name the tools, and all of them: "
                + ", ".join(sorted(set(scopes) ^ {each.name for each in made})),
                "Give a tool that needs no scope an empty list.",
            )
        super().__init__(
            [
                KakuninToolGuard(
                    kakunin,
                    agent_id,
                    tool=each,
                    required_scopes=scopes[each.name] if isinstance(scopes, Mapping) else scopes,
                    event_type=event_type,
                    monitor=monitor,
                    monitored=monitored,
                )
                for each in made
            ],
            **options,
        )

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ToolNode's. Raises what ended the agent's run."""
        with ending():
            return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ToolNode's. Raises what ended the agent's run."""
        with ending():
            return await super().ainvoke(input, config, **kwargs)
