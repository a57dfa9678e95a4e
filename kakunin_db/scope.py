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
        wrapper: Any
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
                await guard.acheck()
                async with contextlib.aclosing(function(*args, **kwargs)) as items:
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
        elif inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def coroutine(*args: Any, **kwargs: Any) -> Any:
                await guard.acheck()
                return await function(*args, **kwargs)

            wrapper = coroutine
        elif isinstance(kakunin, AsyncKakunin):
            raise BadInputError(
                "an AsyncKakunin guards functions that are async",
                "Make the function async, or guard it with a Kakunin.",
            )
        elif inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
                guard.check()
                return (yield from function(*args, **kwargs))

            wrapper = generator
        else:

            @functools.wraps(function)
            def plain(*args: Any, **kwargs: Any) -> Any:
                guard.check()
                return function(*args, **kwargs)

            wrapper = plain
        return cast(F, wrapper)

    return decorate
