"""How a client reaches its database: by a DSN, a pool, or a connection of the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.conninfo import make_conninfo
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

from ..binding import bind_agent_session
from ..binding.psycopg_ import bound_as, hooked
from ..conninfo import dsn_of, is_gone
from ..credential import AgentCredential
from ..deadline import LateError, until
from ..errors import BadInputError, named
from .operations import Query, Rows, Step, Steps, Whole

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

T = TypeVar("T")

# For a connection of the client's own. A pooler between may not know prepared statements.
_OWN: dict[str, Any] = {
    "autocommit": True,
    "prepare_threshold": None,
    "fallback_application_name": "kakunin-db client",
}


def _is_pool(target: object, *, asynchronous: bool) -> bool:
    """Without importing psycopg_pool, which is an extra."""
    getconn = getattr(target, "getconn", None)
    return callable(getconn) and inspect.iscoroutinefunction(getconn) is asynchronous


def _not_this(target: object, wanted: str) -> BadInputError:
    return BadInputError(f"a client takes a DSN, {wanted}, and not {type(target).__name__}")


class _Deadline:
    """When the answer to one query must have come; never, without a timeout."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._until = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        """Seconds."""
        return None if self._seconds is None else max(self._until - time.monotonic(), 0)

    @property
    def to_connect(self) -> dict[str, Any]:
        """libpq's parameter, which is in whole seconds and two at least."""
        return {} if self._seconds is None else {"connect_timeout": max(2, math.ceil(self._seconds))}

    def error(self) -> LateError:
        return LateError(f"another query of this client did not end within {self._seconds} s")

    def within(self, gen: PQGen[T]) -> PQGen[T]:
        """The same, for connection.wait()."""
        return until(gen, self._until)


def _seconds(timeout: float | None) -> float | None:
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise BadInputError("a timeout is a number of seconds above zero")
    return timeout


class Connector:
    """One query after the other; on a connection of its own or of a pool, each is a transaction.

    With a credential or a serial each is bound to that. With a timeout, a connection of its own or of a pool
    whose server has not answered a query by then is closed.
    """

    def __init__(
        self,
        target: str | psycopg.Connection[Any] | ConnectionPool[Any],
        credential: AgentCredential | str | None = None,
        timeout: float | None = None,
    ) -> None:
        if not (isinstance(target, (str, psycopg.Connection)) or _is_pool(target, asynchronous=False)):
            raise _not_this(target, "a psycopg.Connection or a ConnectionPool")
        self._target = target
        self._credential = credential
        self._timeout = _seconds(timeout)
        self._own: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()

    def in_transaction(self) -> bool:
        return isinstance(self._target, psycopg.Connection) and _in_transaction(self._target)

    def acting(self) -> bool:
        """Whether queries are those of an agent."""
        return self._credential is not None or (
            isinstance(self._target, psycopg.Connection) and bound_as(self._target) is not None
        )

    def acts_as(self) -> tuple[str, AgentCredential | str]:
        """What opens another connection, and whom that would act for. Raises BadInputError."""
        return _acts_as(self._target, self._credential)

    def query(self, query: Query) -> Rows:
        if isinstance(self._target, psycopg.Connection):
            # Of several clients on one connection, none is to run in what another has bound.
            with _lock_of(self._target, threading.RLock):
                return self._fetch(self._target, query)
        deadline = _Deadline(self._timeout)
        if isinstance(self._target, str):
            if not self._lock.acquire(timeout=-1 if deadline.left is None else deadline.left):
                raise deadline.error()
            try:
                if self._own is None or is_gone(self._own):
                    self._own = psycopg.connect(self._target, **_OWN | deadline.to_connect)
                with _watched(self._own, deadline):
                    return self._fetch(self._own, query)
            finally:
                self._lock.release()
        with self._target.connection(deadline.left) as connection, _watched(connection, deadline):
            return self._fetch(connection, query)

    def _fetch(self, connection: psycopg.Connection[Any], query: Query) -> Rows:
        if self._credential is not None:
            # A transaction, so that it is the same through a pooler and with a serial.
            with (
                bind_agent_session(connection, self._credential, record_attempts=False) as bound,
                bound.transaction(),
            ):
                return _rows(bound, query)
        return _rows(connection, query)

    def run(self, steps: Steps[T]) -> T:
        """Performs an operation's steps. Raises the kit's errors, or psycopg's."""

        try:
            step = next(steps)
            while True:
                try:
                    outcome = self.query(step) if isinstance(step, Query) else step()
                except BaseException as error:  # whatever it is, the operation has keys to take back
                    step = steps.throw(_ours(error))
                else:
                    step = steps.send(outcome)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def close(self) -> None:
        """Closes the connection this made; never the caller's."""
        if self._own is not None:
            self._own.close()


class AsyncConnector:
    """:class:`Connector` for asyncio. Calls, which may wait for a KMS, happen in a thread."""

    def __init__(
        self,
        target: str | psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any],
        credential: AgentCredential | str | None = None,
        timeout: float | None = None,
    ) -> None:
        if not (isinstance(target, (str, psycopg.AsyncConnection)) or _is_pool(target, asynchronous=True)):
            raise _not_this(target, "a psycopg.AsyncConnection or an AsyncConnectionPool")
        self._target = target
        self._credential = credential
        self._timeout = _seconds(timeout)
        self._own: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    def in_transaction(self) -> bool:
        return isinstance(self._target, psycopg.AsyncConnection) and _in_transaction(self._target)

    def acting(self) -> bool:
        """Whether queries are those of an agent."""
        return self._credential is not None or (
            isinstance(self._target, psycopg.AsyncConnection) and bound_as(self._target) is not None
        )

    def acts_as(self) -> tuple[str, AgentCredential | str]:
        """What opens another connection, and whom that would act for. Raises BadInputError."""
        return _acts_as(self._target, self._credential)

    async def query(self, query: Query) -> Rows:
        if isinstance(self._target, psycopg.AsyncConnection):
            async with _lock_of(self._target, asyncio.Lock):
                return await self._fetch(self._target, query)
        deadline = _Deadline(self._timeout)
        if isinstance(self._target, str):
            try:
                await asyncio.wait_for(self._lock.acquire(), deadline.left)
            except asyncio.TimeoutError:
                raise deadline.error() from None
            try:
                if self._own is None or is_gone(self._own):
                    connect = psycopg.AsyncConnection.connect
                    self._own = await connect(self._target, **_OWN | deadline.to_connect)
                with _watched(self._own, deadline):
                    return await self._fetch(self._own, query)
            finally:
                self._lock.release()
        async with self._target.connection(deadline.left) as connection:
            with _watched(connection, deadline):
                return await self._fetch(connection, query)

    async def _fetch(self, connection: psycopg.AsyncConnection[Any], query: Query) -> Rows:
        if self._credential is not None:
            async with (
                bind_agent_session(connection, self._credential, record_attempts=False) as bound,
                bound.transaction(),
            ):
                return await _rows_async(bound, query)
        return await _rows_async(connection, query)

    async def run(self, steps: Steps[T]) -> T:
        """Performs an operation's steps. Raises the kit's errors, or psycopg's.

        Cancelled, the step under way is given up, except for one that makes or takes away keys: its outcome
        is waited for, and the operation has it when it is cancelled. So is what that does then to leave
        nothing behind.
        """
        waiting: asyncio.CancelledError | None = None  # to be thrown after the step
        cancelled = False
        try:
            step = next(steps)
            while True:
                try:
                    doing = self._perform(step)
                    while (cancelled or isinstance(step, Whole)) and not doing.done():
                        try:
                            await asyncio.wait([doing])
                        except asyncio.CancelledError as error:
                            waiting = error
                    outcome = await doing
                except BaseException as error:
                    cancelled = cancelled or isinstance(error, asyncio.CancelledError)
                    step = steps.throw(_ours(error))
                else:
                    step = steps.send(outcome)
                    if waiting is not None and not cancelled:
                        cancelled = True
                        step = steps.throw(waiting)
        except StopIteration as stop:
            if waiting is not None:
                raise waiting from None
            result: T = stop.value
            return result
        except Exception as error:
            if waiting is not None:
                raise waiting from error
            raise

    def _perform(self, step: Step) -> asyncio.Future[Any]:
        if isinstance(step, Query):
            return asyncio.ensure_future(self.query(step))
        # As asyncio.to_thread() does, but no task, which the end of the loop would cancel.
        return asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, step)

    async def close(self) -> None:
        """Closes the connection this made; never the caller's."""
        if self._own is not None:
            await self._own.close()


_locks: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _lock_of(connection: Any, kind: Callable[[], Any]) -> Any:
    """The lock of a caller's connection, for all clients that were given it."""
    return _locks.get(connection) or _locks.setdefault(connection, kind())


@contextlib.contextmanager
def _watched(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any], deadline: _Deadline
) -> Iterator[None]:
    """Closes the connection when the deadline has passed: what it would answer later is nobody's."""
    if deadline.left is None:
        yield
        return
    real: Any = connection.wait

    def wait(gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        try:
            result: T = real(deadline.within(gen), *args, **kwargs)
        except LateError:
            connection.close()
            raise
        return result

    async def wait_async(gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        try:
            result: T = await real(deadline.within(gen), *args, **kwargs)
        except LateError:
            await connection.close()  # type: ignore[misc]
            raise
        return result

    connection.__dict__["wait"] = wait if isinstance(connection, psycopg.Connection) else wait_async
    try:
        yield
    finally:
        connection.__dict__.pop("wait", None)  # a binding takes its own away, and this with it


def _rows(connection: psycopg.Connection[Any], query: Query) -> Rows:
    # Whatever kind of cursor the caller's connection makes.
    with hooked(connection, psycopg.Cursor)(connection, row_factory=dict_row) as cursor:
        cursor.execute(query.sql.encode(), query.parameters)
        rows: Rows = cursor.fetchall()
        return rows


async def _rows_async(connection: psycopg.AsyncConnection[Any], query: Query) -> Rows:
    async with hooked(connection, psycopg.AsyncCursor)(connection, row_factory=dict_row) as cursor:
        await cursor.execute(query.sql.encode(), query.parameters)
        rows: Rows = await cursor.fetchall()
        return rows


def _acts_as(target: Any, credential: AgentCredential | str | None) -> tuple[str, AgentCredential | str]:
    is_connection = isinstance(target, (psycopg.Connection, psycopg.AsyncConnection))
    if credential is None and is_connection:
        credential = bound_as(target)
    if credential is None:
        raise BadInputError("this client acts for nobody", "Make it with the credential of an agent.")
    if isinstance(target, str):
        return target, credential
    if is_connection:
        return dsn_of(target), credential
    if not isinstance(target.conninfo, str):
        raise BadInputError("what this pool connects to cannot be known", "Give it a DSN, and no function.")
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    given = {name: value for name, value in (target.kwargs or {}).items() if name in known}
    return make_conninfo(target.conninfo, **given), credential


def _ours(error: BaseException) -> BaseException:
    ours = named(error)
    if ours is None:
        return error
    ours.__cause__ = error
    return ours


def _in_transaction(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    outside = (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)  # the latter when it has ended
    return connection.info.transaction_status not in outside
