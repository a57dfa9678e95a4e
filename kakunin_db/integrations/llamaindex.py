"""LlamaIndex: a function tool that runs only while its agent may."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.tools import FunctionTool

from ..client import AsyncKakunin, Kakunin
from ..monitoring import Monitor
from .base import Guarded


class KakuninFunctionToolGuard(FunctionTool):
    """A FunctionTool that runs only if, at that moment, its agent's certificate may be used and permits every
    one of ``required_scopes``. Otherwise it raises what :meth:`ScopeGuard.check` does, which LlamaIndex's
    agents tell the model.

    :param kakunin: as ``agent_id`` and ``required_scopes``, those of :class:`~kakunin_db.ScopeGuard`. An
        AsyncKakunin guards ``acall()``, and has ``call()`` raise BadInputError.
    :param fn: the function, async or not. With ``async_fn``, that is for ``acall()``.
    :param event_type: as ``monitor`` and ``monitored``, those of
        :class:`~kakunin_db.integrations.base.Guarded`.
    :param options: those of ``FunctionTool.from_defaults()``, such as ``name`` and ``description``.

    Raises BadInputError, and what ``from_defaults()`` does.
    """

    def __init__(
        self,
        kakunin: Kakunin | AsyncKakunin,
        agent_id: uuid.UUID | str | None = None,
        *,
        fn: Callable[..., Any] | None = None,
        async_fn: Callable[..., Any] | None = None,
        required_scopes: Sequence[str] | None = None,
        event_type: str = "api_call",
        monitor: Monitor | None = None,
        monitored: bool = True,
        **options: Any,
    ) -> None:
        guarded = Guarded(
            "llamaindex",
            kakunin,
            agent_id,
            required_scopes,
            event_type=event_type,
            monitor=monitor,
            monitored=monitored,
        )
        plain = FunctionTool.from_defaults(fn=fn, async_fn=async_fn, **options)
        name = plain.metadata.get_name()
        if async_fn is None and inspect.iscoroutinefunction(fn):
            fn, async_fn = None, fn
        super().__init__(
            fn=None if fn is None else guarded.wrap(fn, tool=name),
            # That of a function which is not async calls it in a thread.
            async_fn=guarded.wrap(async_fn or plain.async_fn, tool=name),
            metadata=plain.metadata,
            **{each: options.get(each) for each in ("callback", "async_callback", "partial_params")},
        )
