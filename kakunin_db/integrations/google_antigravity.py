"""Hooks for the Google Antigravity SDK: a turn begins, and a tool is called, only while the agent may.

    hooks = get_kakunin_hooks(kakunin, tool_scopes_mapping={"execute_trade": ["trade.execute"]})
    LocalAgentConfig(tools=[execute_trade], hooks=hooks)

The SDK blocks a tool whose hook raises, its own tools and those of MCP servers too, and tells the model why.
It goes on after a session's hook that raises, so the turn is where an agent that may not act is stopped.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from google.antigravity.hooks import (
    HookContext,
    OnSessionEndHook,
    OnSessionStartHook,
    OnToolErrorHook,
    PostToolCallHook,
    PostTurnHook,
    PreToolCallDecideHook,
    PreTurnHook,
)
from google.antigravity.types import HookResult, ToolCall, ToolResult, normalize_builtin_tool_name

from ..client import AsyncKakunin, Kakunin
from ..errors import BadInputError, KakuninError
from ..monitoring import Monitor
from .base import Guarded

FRAMEWORK: Final = "google_antigravity"
OTHERS: Final = "*"


class _Hook:
    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self  # an Agent copies its config, and then takes the hooks as they were

    def _note(self, **about: Any) -> None:
        self._guarded.note(self._guarded.event_type, about)


class KakuninSessionStartHook(_Hook, OnSessionStartHook):
    """The agent proves who it is as a session starts, and that is recorded.

    A refusal is raised, and logged by the SDK, which goes on to :class:`KakuninPreTurnHook`."""

    async def run(self, context: HookContext, data: None) -> None:
        await self._guarded.acheck(stage="session_start")
        self._note(stage="session_start")


class KakuninSessionEndHook(_Hook, OnSessionEndHook):
    """Records that a session ended."""

    async def run(self, context: HookContext, data: None) -> None:
        self._note(stage="session_end")


class KakuninPreTurnHook(_Hook, PreTurnHook):
    """A turn begins, and the model is asked, only while the agent may act: otherwise ``chat()`` fails with
    the reason. Records how long the prompt is."""

    async def run(self, context: HookContext, data: Any) -> HookResult:
        try:
            await self._guarded.acheck(stage="turn")
        except KakuninError as error:
            return HookResult(allow=False, message=str(error))
        self._note(stage="turn", prompt_chars=_characters(data))
        return HookResult(allow=True)


class KakuninPostTurnHook(_Hook, PostTurnHook):
    """Records how long the answer is."""

    async def run(self, context: HookContext, data: str) -> None:
        self._note(stage="answer", answer_chars=_characters(data))


class KakuninPreToolCallDecideHook(_Hook, PreToolCallDecideHook):
    """A tool is called only while the certificate may be used and permits what the tool needs.

    :param tools: what asks, by the tool's name; ``*`` for those not named, and without it ``guarded``.

    Raises ScopeViolationError, CertificateRevokedError, AgentSuspendedError, VerificationUnavailableError or
    another of :meth:`~kakunin_db.ScopeGuard.check`, and the SDK does not call the tool."""

    def __init__(self, guarded: Guarded, tools: Mapping[str, Guarded]) -> None:
        super().__init__(guarded)
        self._tools = dict(tools)

    async def run(self, context: HookContext, data: ToolCall) -> HookResult:
        name = _text(data.name)
        asks = self._tools.get(name) or self._tools.get(OTHERS) or self._guarded
        await asks.acheck(tool=name)
        return HookResult(allow=True)


class KakuninPostToolCallHook(_Hook, PostToolCallHook):
    """Records that a tool was called."""

    async def run(self, context: HookContext, data: ToolResult) -> None:
        self._note(tool=_text(data.name), outcome="returned")


class KakuninOnToolErrorHook(_Hook, OnToolErrorHook):
    """Records that a tool failed; what the model is told stays the SDK's."""

    async def run(self, context: HookContext, data: Exception) -> None:
        tool = _text(getattr(data, "tool_name", "") or "")
        self._note(tool=tool, outcome="raised", error=type(data).__name__)


def get_kakunin_hooks(
    kakunin: Kakunin | AsyncKakunin,
    agent_id: uuid.UUID | str | None = None,
    tool_scopes_mapping: Mapping[str, Sequence[str]] | None = None,
    *,
    required_scopes: Sequence[str] | None = None,
    monitor: Monitor | None = None,
    monitored: bool = True,
) -> list[Any]:
    """The hooks for ``hooks=`` of an agent's config.

    :param tool_scopes_mapping: the scopes that each tool needs, by its name as the SDK has it; ``*`` has
        those of tools that are not named. Without either, a certificate that may be used is enough.
    :param required_scopes: what sessions, turns and all tools need.

    The others are those of :class:`~kakunin_db.integrations.base.Guarded`. Raises BadInputError.
    """

    def guarded(scopes: Sequence[str]) -> Guarded:
        return Guarded(FRAMEWORK, kakunin, agent_id, scopes, monitor=monitor, monitored=monitored)

    everywhere = guarded(required_scopes or ())
    tools: dict[str, Guarded] = {}
    for name, scopes in (tool_scopes_mapping or {}).items():
        if not isinstance(name, str) or isinstance(scopes, str) or scopes is None:
            raise BadInputError(
                "tool_scopes_mapping has a list of actions for each tool's name,"
                " such as {'execute_trade': ['trade.execute']}"
            )
        tools[_text(normalize_builtin_tool_name(name))] = tools[_text(name)] = guarded(
            (*everywhere.scope.required_scopes, *scopes)
        )
    return [
        KakuninSessionStartHook(everywhere),
        KakuninSessionEndHook(everywhere),
        KakuninPreTurnHook(everywhere),
        KakuninPostTurnHook(everywhere),
        KakuninPreToolCallDecideHook(everywhere, tools),
        KakuninPostToolCallHook(everywhere),
        KakuninOnToolErrorHook(everywhere),
    ]


def _text(name: str) -> str:
    """The SDK's own tools are named by an enumeration."""
    return str.__str__(name)


def _characters(content: Any) -> int:
    """Of the text in a prompt that may have pictures too."""
    parts = content if isinstance(content, (list, tuple)) else [content]
    return sum(len(part) for part in parts if isinstance(part, str))
