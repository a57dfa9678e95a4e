"""LangChain: a tool, and a chain, that run only while their agent may."""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tools import BaseTool, Tool, ToolException
from pydantic import PrivateAttr

from ..client import AsyncKakunin, Kakunin
from ..errors import (
    BadInputError,
    KakuninError,
    ScopeViolationError,
    SignerUnavailableError,
    VerificationUnavailableError,
)
from ..monitoring import Monitor
from .base import Guarded

# What ends the agent's run, where somebody collects it (kakunin_db.integrations.langgraph).
_endings: ContextVar[list[KakuninError] | None] = ContextVar("kakunin_endings", default=None)


class ToolScopeViolationError(ScopeViolationError, ToolException):
    """The certificate does not permit this tool; others it may. LangChain shows it to the model where the
    tool's ``handle_tool_error`` says so."""


class _GuardedTool(Guarded):
    def refusal(self, error: KakuninError) -> Exception:
        if isinstance(error, ScopeViolationError):
            return ToolScopeViolationError(str(error), error.hint)
        endings = _endings.get()
        # Not what may be answered when it is asked again.
        if endings is not None and not isinstance(
            error, (SignerUnavailableError, VerificationUnavailableError)
        ):
            endings.append(error)
        return error


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Raises at its end what ended the agent's run in a guarded tool, whoever has caught it in between."""
    errors: list[KakuninError] = []
    token = _endings.set(errors)
    try:
        yield
    finally:
        _endings.reset(token)
    if errors:
        raise errors[0]


class KakuninToolGuard(BaseTool):
    """A tool that runs only if, at that moment, its agent's certificate may be used and permits every one of
    ``required_scopes``. To a model, and to LangChain, it is the tool that it guards: name, description,
    schema, injected arguments, callbacks, response format and error handling.

    :param kakunin: as ``agent_id`` and ``required_scopes``, those of :class:`~kakunin_db.ScopeGuard`. An
        AsyncKakunin guards ``ainvoke()``, and has ``invoke()`` raise BadInputError.
    :param tool: any BaseTool.
    :param event_type: as ``monitor`` and ``monitored``, those of
        :class:`~kakunin_db.integrations.base.Guarded`.

    A tool that no scope permits raises :class:`ToolScopeViolationError`, which ``handle_tool_error`` applies
    to. Whatever else :meth:`ScopeGuard.check` raises ends the run: it is no ToolException, for the agent may
    use no other tool either. The constructor raises BadInputError.
    """

    _tool: BaseTool = PrivateAttr()
    _guarded_run: Callable[..., Any] = PrivateAttr()
    _guarded_arun: Callable[..., Any] = PrivateAttr()
    _func: Callable[..., Any] | None = PrivateAttr()
    _coroutine: Callable[..., Any] | None = PrivateAttr()

    def __init__(
        self,
        kakunin: Kakunin | AsyncKakunin,
        agent_id: uuid.UUID | str | None = None,
        *,
        tool: BaseTool,
        required_scopes: Sequence[str] | None = None,
        event_type: str = "api_call",
        monitor: Monitor | None = None,
        monitored: bool = True,
    ) -> None:
        if not isinstance(tool, BaseTool):
            raise BadInputError(
                f"a tool of LangChain is guarded, and not {type(tool).__name__}",
                "Make it one with langchain_core.tools.tool().",
            )
        guarded = _GuardedTool(
            "langchain",
            kakunin,
            agent_id,
            required_scopes,
            event_type=event_type,
            monitor=monitor,
            monitored=monitored,
        )
        fields = {name: getattr(tool, name) for name in BaseTool.model_fields}
        if isinstance(tool, Tool) and tool.args_schema is None:
            # What LangChain tells models of a Tool, and finds out by its class.
            argument = {"__arg1": {"type": "string"}}
            fields["args_schema"] = {"type": "object", "properties": argument, "required": ["__arg1"]}
        super().__init__(**fields)
        self._tool = tool
        self._guarded_run = guarded.wrap(tool._run, tool=tool.name)

        # LangChain gives a method what its signature asks for; BaseTool's own _arun() what _run()'s does.
        shown = tool._run if type(tool)._arun is BaseTool._arun else tool._arun

        @functools.wraps(shown)
        async def arun(*args: Any, **kwargs: Any) -> Any:
            async with guarded.call(tool=tool.name):
                return await tool._arun(*args, **kwargs)

        self._guarded_arun = arun
        # LangGraph reads off these what is to be injected. Whoever calls them is asked for as well.
        func, coroutine = getattr(tool, "func", None), getattr(tool, "coroutine", None)
        self._func = func and guarded.wrap(func, tool=tool.name)
        self._coroutine = coroutine and guarded.wrap(coroutine, tool=tool.name)

    @property
    def _run(self) -> Callable[..., Any]:
        return self._guarded_run

    @property
    def _arun(self) -> Callable[..., Any]:
        return self._guarded_arun

    @property
    def func(self) -> Callable[..., Any] | None:
        """The tool's function, guarded."""
        return self._func

    @property
    def coroutine(self) -> Callable[..., Any] | None:
        """The tool's coroutine function, guarded."""
        return self._coroutine

    @property
    def args(self) -> dict[str, Any]:
        """The tool's."""
        args: dict[str, Any] = self._tool.args
        return args

    @functools.cached_property
    def _injected_args_keys(self) -> frozenset[str]:
        keys: frozenset[str] = self._tool._injected_args_keys
        return keys

    def get_input_schema(self, config: Any = None) -> Any:
        """The tool's."""
        return self._tool.get_input_schema(config)

    def _to_args_and_kwargs(self, tool_input: Any, tool_call_id: str | None) -> Any:
        return self._tool._to_args_and_kwargs(tool_input, tool_call_id)


class ScopeCallback(BaseCallbackHandler):
    """See :func:`langchain_scope_callback`."""

    # LangChain logs what a handler raises, and runs the chain, unless this is set. Not so for coroutines of
    # handlers, whose errors chains that are not async only log: so none of the methods is one.
    raise_error = True

    def __init__(self, guarded: Guarded) -> None:
        self._guarded = guarded

    def _check(self, *args: Any, **kwargs: Any) -> None:
        self._guarded.check(chain=str(kwargs.get("name") or "chain"))

    on_chain_start = on_chat_model_start = on_llm_start = on_retriever_start = on_tool_start = _check


def langchain_scope_callback(
    kakunin: Kakunin,
    agent_id: uuid.UUID | str | None = None,
    *,
    required_scopes: Sequence[str] | None = None,
    monitor: Monitor | None = None,
    monitored: bool = True,
) -> ScopeCallback:
    """A callback for ``chain.with_config(callbacks=[...])``: the chain, and each chain, model, retriever and
    tool in it, begins only if the agent may at that moment. What does not begin raises what
    :meth:`ScopeGuard.check` does.

    :param kakunin: a Kakunin, for async chains too, which ask it in a thread: an async handler's error would
        not stop a chain that is not async.
    :param agent_id: as ``required_scopes``, that of :class:`~kakunin_db.ScopeGuard`.
    :param monitor: as ``monitored``, that of :class:`~kakunin_db.integrations.base.Guarded`; told of what a
        scope refused.

    Raises BadInputError.
    """
    if not isinstance(kakunin, Kakunin):
        raise BadInputError(
            f"a callback asks a Kakunin, and not {type(kakunin).__name__}",
            "It serves async chains as well, in a thread.",
        )
    return ScopeCallback(
        Guarded("langchain", kakunin, agent_id, required_scopes, monitor=monitor, monitored=monitored)
    )
