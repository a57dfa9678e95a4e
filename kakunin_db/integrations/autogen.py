"""Agents for AutoGen (the ``autogen`` of AG2, which calls it classic) that take part only while they may.

class SecureAgent(KakuninHttpxMixin, KakuninConversableAgent):
    pass

agent = SecureAgent(kakunin=kakunin, required_scopes=["chat.reply"], name="RiskEngine", llm_config=...)
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import httpx
from autogen import ConversableAgent
from autogen.tools import Tool

from ..client import Kakunin
from ..credential import AgentCredential
from ..monitoring import Monitor
from ..serials import SERIAL_HEADER
from .base import Guarded, synchronous

FRAMEWORK: Final = "autogen"


class KakuninConversableAgent(ConversableAgent):
    """A ConversableAgent that takes a message, replies, sends and lets its tools run only while its
    certificate may be used and permits ``required_scopes``: each is asked for, whoever runs the tools.

    A refused message, reply or sending raises the kit's error out of ``initiate_chat()``, and out of the
    events of ``run()``. A refused tool answers the model with the error's text, as one that raises does.
    Where another agent is to run the tools, and only proposes come from this one, make that one of this class
    too. Replies and tools that ran are recorded.

    :param kakunin: a Kakunin that acts for the agent. ``agent_id``, ``required_scopes``, ``monitor`` and
        ``monitored`` are those of :class:`~kakunin_db.integrations.base.Guarded`, and the rest those of
        ConversableAgent.
    """

    def __init__(
        self,
        *args: Any,
        kakunin: Kakunin,
        agent_id: uuid.UUID | str | None = None,
        required_scopes: Sequence[str] | None = None,
        monitor: Monitor | None = None,
        monitored: bool = True,
        function_map: Mapping[str, Callable[..., Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self._guarded = Guarded(
            FRAMEWORK, synchronous(kakunin), agent_id, required_scopes, monitor=monitor, monitored=monitored
        )
        self._guarded_tools: dict[Tool, Tool] = {}
        super().__init__(*args, function_map=self._guard_functions(function_map), **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> Any:
        self._guarded.check(stage="send")
        return super().send(*args, **kwargs)

    async def a_send(self, *args: Any, **kwargs: Any) -> Any:
        await self._guarded.acheck(stage="send")
        return await super().a_send(*args, **kwargs)

    def receive(self, *args: Any, **kwargs: Any) -> Any:
        self._guarded.check(stage="receive")
        return super().receive(*args, **kwargs)

    async def a_receive(self, *args: Any, **kwargs: Any) -> Any:
        await self._guarded.acheck(stage="receive")
        return await super().a_receive(*args, **kwargs)

    def generate_reply(self, *args: Any, **kwargs: Any) -> Any:
        with self._guarded.call(stage="reply"):
            return super().generate_reply(*args, **kwargs)

    async def a_generate_reply(self, *args: Any, **kwargs: Any) -> Any:
        async with self._guarded.call(stage="reply"):
            return await super().a_generate_reply(*args, **kwargs)

    def register_function(
        self, function_map: Mapping[str, Callable[..., Any] | None], silent_override: bool = False
    ) -> None:
        super().register_function(self._guard_functions(function_map), silent_override=silent_override)

    def remove_tool_for_llm(self, tool: Tool) -> None:
        super().remove_tool_for_llm(self._guarded_tools.get(tool, tool))

    # In ConversableAgent a static method, by which both registrations make what they register. A group's or
    # run()'s executor takes the tools from there.
    def _create_tool_if_needed(self, func_or_tool: Any, name: str | None, description: str | None) -> Tool:
        tool = ConversableAgent._create_tool_if_needed(func_or_tool, name, description)
        if self._is_guarded(tool.func):
            return tool
        if tool not in self._guarded_tools:
            guarded = copy.copy(tool)
            guarded._func = self._guard_function(tool.func, tool.name)
            self._guarded_tools[tool] = guarded
        return self._guarded_tools[tool]

    def _guard_functions(self, functions: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if functions is None:
            return None
        return {name: self._guard_function(function, name) for name, function in functions.items()}

    def _guard_function(self, function: Any, name: str) -> Any:
        if function is None or self._is_guarded(function):  # None takes a function away
            return function
        guarded: Any = self._guarded.wrap(function, tool=name)
        guarded._kakunin_guarded = self._guarded
        return guarded

    def _is_guarded(self, function: Any) -> bool:
        """Also of what AutoGen has wrapped since, with functools.wraps()."""
        return getattr(function, "_kakunin_guarded", None) is self._guarded


class KakuninHttpxMixin:
    """HTTP clients for a :class:`KakuninConversableAgent`: each request has the serial of the agent's
    certificate in the header ``X-Kakunin-Cert-Serial``, and is sent only while the agent may.

    The serial says which certificate; whoever has seen it can say it too. It proves nothing by itself."""

    _guarded: Guarded

    @property
    def cert_serial(self) -> str:
        _, acts_by = self._guarded.scope.kakunin.acts_as()
        return acts_by.serial if isinstance(acts_by, AgentCredential) else acts_by

    @property
    def http_client(self) -> httpx.AsyncClient:
        """A new one each time, to be closed: ``async with agent.http_client as client``."""

        async def ask(request: httpx.Request) -> None:
            await self._guarded.acheck(stage="request")

        return httpx.AsyncClient(headers={SERIAL_HEADER: self.cert_serial}, event_hooks={"request": [ask]})

    @property
    def sync_http_client(self) -> httpx.Client:
        """:attr:`http_client` for code that is not async."""

        def ask(request: httpx.Request) -> None:
            self._guarded.check(stage="request")

        return httpx.Client(headers={SERIAL_HEADER: self.cert_serial}, event_hooks={"request": [ask]})
