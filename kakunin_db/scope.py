"""``verify_agent_scope``: a function that runs only while its agent may do that."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any, TypeVar, cast

from .client import AsyncKakunin, Kakunin
from .client.operations import as_uuid
from .errors import BadInputError, KakuninError, VerificationUnavailableError

F = TypeVar("F", bound=Callable[..., Any])


class ScopeGuard:
    """Asks the database, before each call, whether an agent may act; one statement, never a kept answer.

    :param kakunin: a client that acts for the agent: made with its ``credential``.
    :param agent_id: the agent it must be; None takes the client's.
    :param required_scopes: actions that its certificate must permit, every one of them, exactly or by
        ``prefix:*``. Without any, a certificate that may be used is enough.

    Raises BadInputError for what is none of these.
    """

    def __init__(
        self,
        kakunin: Kakunin | AsyncKakunin,
        agent_id: uuid.UUID | str | None = None,
        required_scopes: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(kakunin, (Kakunin, AsyncKakunin)):
            raise BadInputError(
                f"a guard asks a Kakunin or an AsyncKakunin, and not {type(kakunin).__name__}"
            )
        scopes = tuple(required_scopes or ())
        if isinstance(required_scopes, str) or not all(isinstance(s, str) and s for s in scopes):
            raise BadInputError("required_scopes is a list of actions, such as ['trade.execute']")
        self.kakunin = kakunin
        self.agent_id = None if agent_id is None else as_uuid(agent_id)
        self.required_scopes = scopes

    def check(self) -> None:
        """Returns if the agent may. Raises ScopeViolationError, CertificateRevokedError,
        CertificateValidityError, AgentSuspendedError or another of the kit's that says why not, and
        VerificationUnavailableError where that could not be found out."""
        if not isinstance(self.kakunin, Kakunin):
            raise BadInputError(
                "an AsyncKakunin guards functions that are async",
                "Make the function async, or guard it with a Kakunin.",
            )
        try:
            self.kakunin.require_agent_scope(*self.required_scopes, agent_id=self.agent_id)
        except KakuninError:
            raise
        except Exception as error:
            raise _unavailable(error) from error

    async def acheck(self) -> None:
        """:meth:`check` for asyncio; with a Kakunin it is asked in a thread."""
        if isinstance(self.kakunin, Kakunin):
            await asyncio.to_thread(self.check)
            return
        try:
            await self.kakunin.require_agent_scope(*self.required_scopes, agent_id=self.agent_id)
        except KakuninError:
            raise
        except Exception as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> VerificationUnavailableError:
    return VerificationUnavailableError(
        f"whether the agent may do this could not be found out ({type(error).__name__}), so it may not",
        "See whether the database answers; its error is the cause of this one.",
    )


class _Asked:
    """A block that is entered if the agent may."""

    def __init__(self, guard: ScopeGuard) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.check()

    def __exit__(self, *_: object) -> None:
        pass

    async def __aenter__(self) -> None:
        await self._guard.acheck()

    async def __aexit__(self, *_: object) -> None:
        pass


def verify_agent_scope(
    kakunin: Kakunin | AsyncKakunin,
    agent_id: uuid.UUID | str | None = None,
    *,
    required_scopes: Sequence[str] | None = None,
) -> Callable[[F], F]:
    """Decorator: the function's body runs only if the agent's certificate may be used at that moment and
    permits every one of ``required_scopes``. The arguments are those of :class:`ScopeGuard`.

    For functions of every kind; the body of a generator begins, and is guarded, with its first item. A
    function that is not async needs a ``Kakunin``; an async one takes either.

    The function raises what :meth:`ScopeGuard.check` raises; the decorator BadInputError.
    """
    guard = ScopeGuard(kakunin, agent_id, required_scopes)

    def decorate(function: F) -> F:
        if isinstance(kakunin, AsyncKakunin) and not is_async(function):
            raise BadInputError(
                "an AsyncKakunin guards functions that are async",
                "Make the function async, or guard it with a Kakunin.",
            )
        return cast(F, run_within(function, lambda: _Asked(guard)))

    return decorate


def run_within(function: Callable[..., Any], block: Callable[[], Any]) -> Callable[..., Any]:
    """The function, of its own kind and signature, each call of it in a ``block()``: by ``async with`` where
    it is async, and by ``with`` otherwise. A generator enters its block with its first item."""
    wrapper: Callable[..., Any]
    if _is(function, inspect.isasyncgenfunction):

        async def async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            async with block(), contextlib.aclosing(function(*args, **kwargs)) as items:
                with contextlib.suppress(StopAsyncIteration):
                    item = await items.asend(None)
                    while True:
                        try:
                            sent = yield item
                        except GeneratorExit:
                            raise
                        except BaseException as error:
                            item = await items.athrow(error)
                        else:
                            item = await items.asend(sent)

        wrapper = async_generator
    elif _is(function, inspect.iscoroutinefunction):

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            async with block():
                return await function(*args, **kwargs)

        wrapper = coroutine
    elif _is(function, inspect.isgeneratorfunction):

        def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            with block():
                return (yield from function(*args, **kwargs))

        wrapper = generator
    else:

        def plain(*args: Any, **kwargs: Any) -> Any:
            with block():
                return function(*args, **kwargs)

        wrapper = plain
    return functools.wraps(function)(wrapper)


def is_async(function: object) -> bool:
    return _is(function, inspect.isasyncgenfunction) or _is(function, inspect.iscoroutinefunction)


def _is(function: Any, kind: Callable[[Any], bool]) -> bool:
    """Also of objects that are called, and of functools.partial."""
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or (not isinstance(function, type) and kind(getattr(function, "__call__", None)))  # noqa: B004
