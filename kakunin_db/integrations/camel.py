"""For CAMEL: a toolkit that asks before each of its tools, and a ChatAgent that does so before each step.

toolkit = KakuninToolkit(kakunin=kakunin, tools=[execute_trade], required_scopes=["trade.execute"])
ChatAgent(model=model, tools=toolkit.get_tools())

KakuninCamelAgent(kakunin=kakunin, required_scopes=["chat.reply"], model=model, tools=[...]).step("...")
"""

from __future__ import annotations

import copy
import dataclasses
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Final

from camel.agents import ChatAgent
from camel.toolkits import FunctionTool
from camel.toolkits.base import BaseToolkit

from ..client import Kakunin
from ..monitoring import Monitor
from .base import Guarded, synchronous

FRAMEWORK: Final = "camel"


class KakuninToolkit(BaseToolkit):
    """Tools that run only while the agent may, and three by which its model learns where it stands. The agent
    is the client's: no argument of a tool chooses another.

    A refused tool tells the model the reason, as CAMEL has it with a tool that raises.

    :param kakunin: a Kakunin that acts for the agent. ``agent_id``, ``required_scopes``, ``monitor`` and
        ``monitored`` are those of :class:`~kakunin_db.integrations.base.Guarded`.
    :param tools: functions, or FunctionTools, to be guarded by ``required_scopes``.
    """

    def __init__(
        self,
        kakunin: Kakunin,
        agent_id: uuid.UUID | str | None = None,
        tools: Sequence[FunctionTool | Callable[..., Any]] = (),
        required_scopes: Sequence[str] | None = None,
        *,
        monitor: Monitor | None = None,
        monitored: bool = True,
    ) -> None:
        super().__init__(timeout=None)  # the client has its own
        self._kakunin = synchronous(kakunin)
        guarded = Guarded(FRAMEWORK, kakunin, agent_id, required_scopes, monitor=monitor, monitored=monitored)
        self._tools = [_guard(guarded, tool) for tool in tools]

    def verify_agent_scope(
        self, action: str, amount_usd: float | None = None, venue: str | None = None
    ) -> dict[str, Any]:
        """Tells whether you may do something, by your certificate's scope and limits. It does not do it.

        Args:
            action: What you want to do, such as trade.execute.
            amount_usd: The amount in US dollars, if there is one.
            venue: Where, if that matters.

        Returns:
            allowed, and the reason if it is not.
        """
        return _json(self._kakunin.verify_agent_scope(action, amount_usd=amount_usd, venue=venue))

    def check_risk_score(self) -> dict[str, Any]:
        """Tells your risk over 30 days: its score from 0 to 1, its band, its trend and what to do about it.

        Returns:
            score, band, trend and recommendation among others.
        """
        return _json(self._kakunin.check_risk_score())

    def audit_log_append(self, event_type: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
        """Records what you did in the audit log, for good.

        Args:
            event_type: Such as api_call, data_access, data_mutation or transaction_initiated.
            metadata: What there is to say about it, such as amount_usd or venue.

        Returns:
            event_id, and the score and band of the event.
        """
        return _json(self._kakunin.events.create(event_type, metadata))

    def get_tools(self) -> list[FunctionTool]:
        own = (self.verify_agent_scope, self.check_risk_score, self.audit_log_append)
        return [*self._tools, *(FunctionTool(function) for function in own)]


class KakuninCamelAgent(ChatAgent):
    """A ChatAgent whose steps and tools are each asked for: ``step()``, ``astep()`` and what they stream
    raise the kit's error before the model is called. A refused tool tells the model the reason; a step of an
    agent that may not act any more at its end raises too, unless it was streamed. Steps and tools are
    recorded.

    :param kakunin: a Kakunin that acts for the agent. ``agent_id``, ``required_scopes``, ``monitor`` and
        ``monitored`` are those of :class:`~kakunin_db.integrations.base.Guarded`, and the rest those of
        ChatAgent.
    """

    def __init__(
        self,
        *args: Any,
        kakunin: Kakunin,
        agent_id: uuid.UUID | str | None = None,
        required_scopes: Sequence[str] | None = None,
        monitor: Monitor | None = None,
        monitored: bool = True,
        **kwargs: Any,
    ) -> None:
        self._guarded = Guarded(
            FRAMEWORK, synchronous(kakunin), agent_id, required_scopes, monitor=monitor, monitored=monitored
        )
        super().__init__(*args, **kwargs)
        self._guard_tools()

    def add_tool(self, tool: FunctionTool | Callable[..., Any]) -> None:
        super().add_tool(_guard(self._guarded, tool))

    def clone(self, with_memory: bool = False) -> KakuninCamelAgent:
        made: Any = super().clone(with_memory)  # a ChatAgent, with tools that CAMEL made anew
        made.__class__ = type(self)
        made._guarded = self._guarded
        made._guard_tools()
        cloned: KakuninCamelAgent = made
        return cloned

    # What step() and astep() do, in a thread of CAMEL's or not, and what they stream.
    def _step_impl(self, *args: Any, **kwargs: Any) -> Any:
        with self._guarded.call(stage="step"):
            response = super()._step_impl(*args, **kwargs)
        self._guarded.check(stage="result")
        return response

    async def _astep_non_streaming_task(self, *args: Any, **kwargs: Any) -> Any:
        async with self._guarded.call(stage="step"):
            response = await super()._astep_non_streaming_task(*args, **kwargs)
        await self._guarded.acheck(stage="result")
        return response

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with self._guarded.call(stage="step"):
            yield from super()._stream(*args, **kwargs)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async with self._guarded.call(stage="step"):
            async for response in super()._astream(*args, **kwargs):
                yield response

    def _guard_tools(self) -> None:
        tools: dict[str, FunctionTool] = self.tool_dict
        self._internal_tools = {name: _guard(self._guarded, tool) for name, tool in tools.items()}


def _guard(guarded: Guarded, tool: FunctionTool | Callable[..., Any]) -> FunctionTool:
    """A copy that asks first, with the same schema."""
    made = copy.copy(tool) if isinstance(tool, FunctionTool) else FunctionTool(tool)
    function: Any = made.func
    if getattr(function, "_kakunin_guarded", None) is guarded:
        return made
    wrapper: Any = guarded.wrap(function, tool=made.get_function_name())
    if hasattr(function, "async_call"):  # a tool of an MCP server, which astep() calls by this
        wrapper.async_call = guarded.wrap(function.async_call, tool=made.get_function_name())
    wrapper._kakunin_guarded = guarded
    made.func = wrapper
    return made


def _json(result: Any) -> dict[str, Any]:
    """A result of the client's, as a model reads it."""
    said: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(result), default=str))
    return said
