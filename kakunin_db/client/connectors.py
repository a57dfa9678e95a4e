"""How a client reaches its database: by a DSN, a pool, or a connection of the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row

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


class Connector:
    """One query after the other; on a connection of its own or of a pool, each is a transaction."""

    def __init__(self, target: str | psycopg.Connection[Any] | ConnectionPool[Any]) -> None:
        if not (isinstance(target, (str, psycopg.Connection)) or _is_pool(target, asynchronous=False)):
            raise _not_this(target, "a psycopg.Connection or a ConnectionPool")
        self._target = target
        self._own: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()

    def in_transaction(self) -> bool:
        return isinstance(self._target, psycopg.Connection) and _in_transaction(self._target)

    def query(self, query: Query) -> Rows:
        if isinstance(self._target, psycopg.Connection):
            return self._fetch(self._target, query)
        if isinstance(self._target, str):
            with self._lock:
                if self._own is None or _is_gone(self._own):
                    self._own = psycopg.connect(self._target, **_OWN)
                return self._fetch(self._own, query)
        with self._target.connection() as connection:
            return self._fetch(connection, query)

    @staticmethod
    def _fetch(connection: psycopg.Connection[Any], query: Query) -> Rows:
        with psycopg.Cursor(connection, row_factory=dict_row) as cursor:  # whatever kind the caller's are
            cursor.execute(query.sql.encode(), query.parameters)
            return cursor.fetchall()

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

    def __init__(self, target: str | psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any]) -> None:
        if not (isinstance(target, (str, psycopg.AsyncConnection)) or _is_pool(target, asynchronous=True)):
            raise _not_this(target, "a psycopg.AsyncConnection or an AsyncConnectionPool")
        self._target = target
        self._own: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    def in_transaction(self) -> bool:
        return isinstance(self._target, psycopg.AsyncConnection) and _in_transaction(self._target)

    async def query(self, query: Query) -> Rows:
        if isinstance(self._target, psycopg.AsyncConnection):
            return await self._fetch(self._target, query)
        if isinstance(self._target, str):
            async with self._lock:
                if self._own is None or _is_gone(self._own):
                    self._own = await psycopg.AsyncConnection.connect(self._target, **_OWN)
                return await self._fetch(self._own, query)
        async with self._target.connection() as connection:
            return await self._fetch(connection, query)

    @staticmethod
    async def _fetch(connection: psycopg.AsyncConnection[Any], query: Query) -> Rows:
        async with psycopg.AsyncCursor(connection, row_factory=dict_row) as cursor:
            await cursor.execute(query.sql.encode(), query.parameters)
            return await cursor.fetchall()

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


def _is_gone(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Also when the server ended it while it was idle, which libpq notices only when it looks."""
    with contextlib.suppress(psycopg.OperationalError):
        for _ in range(2):  # what the server said, and then the end
            connection.pgconn.consume_input()
    return connection.closed


def _ours(error: BaseException) -> BaseException:
    ours = named(error)
    if ours is None:
        return error
    ours.__cause__ = error
    return ours


def _in_transaction(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    outside = (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)  # the latter when it has ended
    return connection.info.transaction_status not in outside
