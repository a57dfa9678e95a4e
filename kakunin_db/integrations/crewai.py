"""An agent for CrewAI that takes a task, and uses its tools, only while it may.

auditor = KakuninCrewAgent(kakunin=kakunin, required_scopes=["compliance.verify"], role="Auditor", ...)
Crew(agents=[auditor], tasks=[Task(..., agent=auditor)]).kickoff()
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import json
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from crewai import Agent
from crewai.utilities.agent_utils import parse_tools
from pydantic import Field, PrivateAttr, SkipValidation, field_serializer

from ..errors import BadInputError, KakuninError
from .base import Guarded, synchronous

FRAMEWORK: Final = "crewai"
# Bytes of JSON, of the 16384 that an event may have.
TRACE: Final = 12_000

# What is being done already: tasks that CrewAI tries again, tools whose run() comes to their _run().
_doing: contextvars.ContextVar[frozenset[Any]] = contextvars.ContextVar("kakunin_crewai", default=frozenset())


class KakuninCrewAgent(Agent):
    """An Agent of CrewAI whose tasks, ``kickoff()`` and tools are each asked for.

    Before a task ``required_scopes`` are checked and ``api_call`` is recorded; at its end ``data_access``, or
    ``data_mutation`` with ``mutates``; where it fails ``transaction_anomaly``, with the last 12000 bytes of
    the stack trace, which has the texts of errors. Each is one event, however often CrewAI tries again. Three
    failures within an hour revoke the agent (docs/risk.md).

    Tools are asked for at each use, those of tasks, of delegation and of MCP servers too. A refused tool
    tells the model the reason, in CrewAI's way. What an agent that may not act any more says in the end is no
    result: the task fails with the kit's error. Results of tools are not cached, as a cache asks nobody.

    :param kakunin: a Kakunin that acts for the agent. ``agent_id``, ``required_scopes``, ``monitor`` and
        ``monitored`` are those of :class:`~kakunin_db.integrations.base.Guarded`, and the rest those of
        Agent.
    """

    kakunin: SkipValidation[Any] = Field(repr=False)
    agent_id: uuid.UUID | str | None = None
    required_scopes: Sequence[str] | None = None
    mutates: bool = False
    monitor: SkipValidation[Any] = Field(default=None, repr=False)
    monitored: bool = True
    _guarded: Guarded = PrivateAttr()
    _classes: dict[type, type] = PrivateAttr(default_factory=dict)

    def __init__(self, **data: Any) -> None:
        guarded = Guarded(
            FRAMEWORK,
            synchronous(data.get("kakunin")),
            data.get("agent_id"),
            data.get("required_scopes"),
            monitor=data.get("monitor"),
            monitored=data.get("monitored", True),
        )
        super().__init__(**data | {"cache": False})
        self._guarded = guarded

    @field_serializer("kakunin", "monitor", when_used="json")
    def _not_in_json(self, value: Any) -> None:
        return None

    def execute_task(self, task: Any, context: Any = None, tools: Any = None) -> Any:
        self._guarded.check(stage="task")
        with self._recorded("task", task):
            result = super().execute_task(task, context, tools)
            self._guarded.check(stage="result")
            return result

    async def aexecute_task(self, task: Any, context: Any = None, tools: Any = None) -> Any:
        await self._guarded.acheck(stage="task")
        with self._recorded("task", task):
            result = await super().aexecute_task(task, context, tools)
            await self._guarded.acheck(stage="result")
            return result

    def kickoff(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        if _in_a_loop():
            return super().kickoff(messages, *args, **kwargs)  # which is kickoff_async()
        _no_checkpoint(args, kwargs)
        self._guarded.check(stage="kickoff")
        with self._recorded("kickoff", object()):
            result = super().kickoff(messages, *args, **kwargs)
            self._guarded.check(stage="result")
            return result

    async def kickoff_async(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        _no_checkpoint(args, kwargs)
        await self._guarded.acheck(stage="kickoff")
        with self._recorded("kickoff", object()):
            result = await super().kickoff_async(messages, *args, **kwargs)
            await self._guarded.acheck(stage="result")
            return result

    # The two places where CrewAI turns tools into what is run.
    def create_agent_executor(self, tools: Any = None, task: Any = None) -> None:
        configured = self.tools or [] if tools is None else tools
        super().create_agent_executor([self._guard_tool(tool) for tool in configured], task)

    def _prepare_kickoff(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_kickoff(*args, **kwargs)
        executor = prepared[0]
        executor.original_tools = [self._guard_tool(tool) for tool in executor.original_tools]
        executor.tools = parse_tools(executor.original_tools)
        return prepared

    def _guard_tool(self, tool: Any) -> Any:
        """A copy that asks first, of a class made from the tool's."""
        kind = type(tool)
        if getattr(kind, "_kakunin_guarded", None) is self._guarded:
            return tool
        if kind not in self._classes:
            namespace: dict[str, Any] = {
                name: _asking(self._guarded, getattr(kind, name)) for name in ("run", "arun", "_run", "_arun")
            }
            namespace |= {"__module__": __name__, "__qualname__": f"Guarded{kind.__name__}"}
            metaclass: Any = type(kind)
            made = metaclass(kind.__name__, (kind,), namespace)
            made._kakunin_guarded = self._guarded
            self._classes[kind] = made
        copied = tool.model_copy()
        copied.__class__ = self._classes[kind]
        return copied

    @contextlib.contextmanager
    def _recorded(self, stage: str, task: Any) -> Iterator[None]:
        key = (id(self), id(task))
        if key in _doing.get():  # tried again
            yield
            return
        done = "data_mutation" if self.mutates else "data_access"
        self._guarded.note("api_call", {"stage": stage})
        token = _doing.set(_doing.get() | {key})
        try:
            yield
        except KakuninError:
            raise  # refused, which is no failure
        except Exception as error:
            about = {"stage": stage, "error": type(error).__name__, "stack_trace": stack_trace(error)}
            self._guarded.note("transaction_anomaly", about)
            raise
        else:
            self._guarded.note(done, {"stage": stage})
        finally:
            _doing.reset(token)


def stack_trace(error: BaseException) -> str:
    """The traceback of an error: its end, at most TRACE bytes as JSON, without what Postgres cannot store."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    trace = trace.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
    while (over := len(json.dumps(trace, ensure_ascii=False).encode()) - TRACE) > 0:
        trace = trace[max(over // 6, 1) :]  # a character is six bytes of JSON at most
    return trace


def _asking(guarded: Guarded, method: Callable[..., Any]) -> Callable[..., Any]:
    wrapper: Callable[..., Any]
    if inspect.iscoroutinefunction(method):

        async def coroutine(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) in _doing.get():
                return await method(self, *args, **kwargs)
            async with guarded.call(tool=self.name):
                with _within(id(self)):
                    return await method(self, *args, **kwargs)

        wrapper = coroutine
    else:

        def plain(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) in _doing.get():
                return method(self, *args, **kwargs)
            with guarded.call(tool=self.name), _within(id(self)):
                return method(self, *args, **kwargs)

        wrapper = plain
    return functools.wraps(method)(wrapper)


@contextlib.contextmanager
def _within(key: int) -> Iterator[None]:
    token = _doing.set(_doing.get() | {key})
    try:
        yield
    finally:
        _doing.reset(token)


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _no_checkpoint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Its agent is made anew, without a client to ask by.
    if kwargs.get("from_checkpoint") is not None or (len(args) > 2 and args[2] is not None):
        raise BadInputError("an agent that acts by a credential is not restored from a checkpoint")
