"""Binding psycopg connections and pools.

A connection's transactions begin in three ways, and each is met at a public place: with a statement of a
cursor that the connection makes (``cursor_factory`` and ``server_cursor_factory``), with
``conn.transaction()``, and, on an autocommit connection, with every statement by itself.

BEGIN and the statement that binds travel together in libpq's pipeline mode, so that a bound transaction
takes no more round trips than an unbound one.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.abc import PQGen
from psycopg.rows import tuple_row
from psycopg.sql import Composable
from psycopg.waiting import Wait

from ..conninfo import dsn_of
from ..credential import AgentCredential
from ..errors import BadInputError, named
from .bearer import Bearer, Left, Query, Rollback, SetAutocommit, Steps, wrong_answer
from .core import Core

_AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]

# What a connection is waited for: the binding whose statement it is, and that statement; or the binding's own
# steps, which are no attempts of the agent's.
_STEPS: Final = object()
_doing: ContextVar[Any] = ContextVar("kakunin_doing", default=None)


class PsycopgChannel:
    """A psycopg connection of either kind, as core.Channel."""

    def __init__(self, connection: _AnyConnection) -> None:
        self.connection = connection
        info = connection.info
        self.login = info.user
        self.address = f"{info.host}:{info.port}/{info.dbname}"

    @property
    def _status(self) -> int:
        return self.connection.pgconn.transaction_status

    @property
    def idle(self) -> bool:
        return self._status == pq.TransactionStatus.IDLE

    @property
    def failed(self) -> bool:
        return self._status == pq.TransactionStatus.INERROR

    @property
    def closed(self) -> bool:
        return self.connection.closed or self._status == pq.TransactionStatus.UNKNOWN

    @property
    def autocommit(self) -> bool:
        return self.connection.autocommit

    @property
    def pipelining(self) -> bool:
        return self.connection.pgconn.pipeline_status != pq.PipelineStatus.OFF

    @property
    def can_begin(self) -> bool:
        """Whether _begin_and() may be used."""
        return self.idle and not self.autocommit and not self.pipelining and psycopg.Pipeline.is_supported()


def _arguments(query: Query) -> tuple[bytes, tuple[str, ...]]:
    return query.sql.encode(), () if query.parameter is None else (query.parameter,)


def _begin_and(connection: _AnyConnection, query: Query) -> PQGen[bytes | None]:
    """Sends BEGIN and the query together and waits once; for connection.wait().

    psycopg's own pipeline waits for the BEGIN it adds, so this one is made of libpq's calls. BEGIN says
    what psycopg's would: the connection's isolation level, read_only and deferrable.
    """
    begin = ["BEGIN"]
    if connection.isolation_level is not None:
        begin.append("ISOLATION LEVEL " + connection.isolation_level.name.replace("_", " "))
    if connection.read_only is not None:
        begin.append("READ ONLY" if connection.read_only else "READ WRITE")
    if connection.deferrable is not None:
        begin.append("DEFERRABLE" if connection.deferrable else "NOT DEFERRABLE")
    sql, parameters = _arguments(query)
    pgconn = connection.pgconn
    refusal: psycopg.Error | None = None
    answer: bytes | None = None
    pgconn.enter_pipeline_mode()
    pgconn.send_query_params(" ".join(begin).encode(), None)
    pgconn.send_query_params(sql.replace(b"%s", b"$1"), [p.encode() for p in parameters])
    pgconn.pipeline_sync()
    while pgconn.flush():
        yield Wait.W
    while True:
        while pgconn.is_busy():
            yield Wait.R
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:  # between the results of two statements
            if pgconn.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError("the connection was lost while beginning a transaction")
            continue
        if result.status == pq.ExecStatus.PIPELINE_SYNC:
            break
        if result.status == pq.ExecStatus.FATAL_ERROR:
            refusal = psycopg.errors.error_from_result(result)
        elif result.status == pq.ExecStatus.TUPLES_OK:
            answer = result.get_value(0, 0)
    pgconn.exit_pipeline_mode()
    if refusal is not None:
        raise refusal
    return answer


def _text(query: Any, connection: _AnyConnection) -> str | bytes | None:
    """A statement as it was given; None for what has no text without its parameters."""
    if isinstance(query, Composable):
        return query.as_bytes(connection)
    return query if isinstance(query, (str, bytes)) else None


def run(connection: psycopg.Connection[Any], steps: Steps) -> None:
    """Performs steps on a connection. Raises the kit's errors, or psycopg's."""
    channel = PsycopgChannel(connection)

    def perform(step: Any) -> Any:
        if isinstance(step, SetAutocommit):
            connection.autocommit = step.value
        elif isinstance(step, Rollback):
            # Inside conn.transaction() psycopg forbids it, and that block rolls back by itself.
            with contextlib.suppress(psycopg.ProgrammingError):
                connection.rollback()
        elif isinstance(step, Query):
            # psycopg's own cursor, not the connection's class: that one is hooked, and might put the
            # parameter into the statement's text, where pg_stat_activity shows it. Never prepared: SQL that
            # ran on this connection before could have put another statement under psycopg's name for it,
            # and would be handed the ticket.
            cursor = psycopg.Cursor(connection, row_factory=tuple_row)
            if step.with_begin and channel.can_begin:
                with connection.lock:
                    answer = connection.wait(_begin_and(connection, step))
            else:
                cursor.execute(*_arguments(step), prepare=False)
                if step.with_begin and channel.pipelining:
                    return None  # in the caller's pipeline nobody waits; an error reaches the next statement
                (answer,) = cursor.fetchone() or (None,)
            if (wrong := wrong_answer(step, answer)) is not None:
                connection.close()
                raise wrong
            return answer
        else:
            return step()
        return None

    doing = _doing.set(_STEPS)
    try:
        step = next(steps)
        while True:
            try:
                outcome = perform(step)
            except psycopg.Error as error:
                step = steps.throw(error)
            else:
                step = steps.send(outcome)
    except StopIteration:
        return
    except psycopg.Error as error:
        if (ours := named(error)) is not None:
            raise ours from error
        raise
    finally:
        _doing.reset(doing)


async def run_async(connection: psycopg.AsyncConnection[Any], steps: Steps) -> None:
    """run() for an asynchronous connection; signing, which may wait for a KMS, happens in a thread."""
    channel = PsycopgChannel(connection)

    async def perform(step: Any) -> Any:
        if isinstance(step, SetAutocommit):
            await connection.set_autocommit(step.value)
        elif isinstance(step, Rollback):
            with contextlib.suppress(psycopg.ProgrammingError):
                await connection.rollback()
        elif isinstance(step, Query):
            cursor = psycopg.AsyncCursor(connection, row_factory=tuple_row)
            if step.with_begin and channel.can_begin:
                async with connection.lock:
                    answer = await connection.wait(_begin_and(connection, step))
            else:
                await cursor.execute(*_arguments(step), prepare=False)
                if step.with_begin and channel.pipelining:
                    return None
                (answer,) = await cursor.fetchone() or (None,)
            if (wrong := wrong_answer(step, answer)) is not None:
                await connection.close()
                raise wrong
            return answer
        else:
            return await asyncio.to_thread(step)
        return None

    doing = _doing.set(_STEPS)
    try:
        step = next(steps)
        while True:
            try:
                outcome = await perform(step)
            except psycopg.Error as error:
                step = steps.throw(error)
            else:
                step = steps.send(outcome)
    except StopIteration:
        return
    except psycopg.Error as error:
        if (ours := named(error)) is not None:
            raise ours from error
        raise
    finally:
        _doing.reset(doing)


class _Hooks(ABC):
    """Puts the binding between a connection and its statements, and takes it out again."""

    def __init__(self, connection: Any, bearer: Bearer) -> None:
        self.connection = connection
        self.channel = PsycopgChannel(connection)
        self.bearer = bearer
        self.core = Core(self.channel, bearer)

    def install(self) -> None:
        connection = self.connection
        if getattr(connection, "_kakunin_binding", None) is not None:
            raise BadInputError(
                "this connection is bound already",
                "End the first bind_agent_session() before another, or use a second connection.",
            )
        if self.channel.failed:
            raise BadInputError(
                "the connection is in a failed transaction, and nothing can be bound in it",
                "Roll back first.",
            )
        self._factories = (connection.cursor_factory, connection.server_cursor_factory)
        connection.cursor_factory = self._hooked(connection.cursor_factory)
        connection.server_cursor_factory = self._hooked(connection.server_cursor_factory)
        self._transaction = connection.transaction
        # On the instance, over the class's methods.
        self._wait = connection.wait
        connection.transaction, connection.wait = self.transaction, self.wait
        connection._kakunin_binding = self

    def uninstall(self) -> None:
        connection = self.connection
        connection.cursor_factory, connection.server_cursor_factory = self._factories
        del connection.transaction, connection.wait
        connection._kakunin_binding = None

    def left_before(self) -> Left | None:
        return getattr(self.connection, "_kakunin_left", None)

    def refused(self, error: psycopg.Error) -> Exception | None:
        """The error to raise in place of one that any wait for the server has ended with, if there is one."""
        doing = _doing.get()
        if doing is _STEPS:
            return None
        mine = doing is not None and doing[0] is self
        statement = _text(doing[1], self.connection) if mine else None
        address = f"{self.channel.login}@{self.channel.address}"
        return self.bearer.refused(error, statement, address, lambda: dsn_of(self.connection))

    @contextlib.contextmanager
    def doing(self, query: Any) -> Iterator[None]:
        """Says, for its block, which statement answers are for."""
        before = _doing.get()
        # In the caller's pipeline it may be for an earlier one, and which is not known here.
        _doing.set((self, None if self.channel.pipelining else query))
        try:
            yield
        finally:
            _doing.set(before)  # and no reset(): a generator may be closed in another context

    @abstractmethod
    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        """The connection's wait(), through which every answer of the server comes."""

    @abstractmethod
    def _hooked(self, factory: Any) -> Any:
        """A subclass of the cursor factory that binds before each statement."""

    @abstractmethod
    def transaction(self, savepoint_name: str | None = None, force_rollback: bool = False) -> Any:
        """The connection's transaction(), whose outermost block is bound as it begins."""


class Binding(_Hooks):
    """bind_agent_session() for a psycopg Connection."""

    def __enter__(self) -> Any:
        self.install()
        try:
            if not self.channel.idle:
                run(self.connection, self.core.enter_transaction(self.left_before()))
        except BaseException:
            self.uninstall()
            raise
        return self.connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()
        try:
            run(self.connection, self.core.leave())
            self.connection._kakunin_left = self.core.left
        except BaseException:
            self.connection.close()  # better no connection than one that may still be bound
            if error is None:
                raise
        if error is not None and (ours := named(error)) is not None:
            raise ours from error

    def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return self._wait(gen, *args, **kwargs)
        except psycopg.Error as error:
            if (ours := self.refused(error)) is not None:
                raise ours from error
            raise

    def before_statement(self) -> None:
        # A cursor made inside the block may be used after it.
        if self.connection._kakunin_binding is self:
            run(self.connection, self.core.before_statement())

    @contextlib.contextmanager
    def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> Iterator[psycopg.Transaction]:
        outermost = self.channel.idle
        if outermost:
            run(self.connection, self.core.refresh())
        with self._transaction(savepoint_name, force_rollback) as transaction:
            if not outermost:
                yield transaction
                return
            run(self.connection, self.core.bind_here())
            self.core.in_block = True
            try:
                yield transaction
            finally:
                self.core.in_block = False

    def _hooked(self, factory: Any) -> Any:
        binding = self

        def execute(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            binding.before_statement()
            with binding.doing(query):
                return factory.execute(cursor, query, *args, **kwargs)

        def executemany(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            binding.before_statement()
            with binding.doing(query):
                return factory.executemany(cursor, query, *args, **kwargs)

        def stream(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            binding.before_statement()
            with binding.doing(query):
                yield from factory.stream(cursor, query, *args, **kwargs)

        @contextlib.contextmanager
        def copy(cursor: Any, statement: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            binding.before_statement()
            with binding.doing(statement), factory.copy(cursor, statement, *args, **kwargs) as copying:
                yield copying

        members = {"execute": execute, "executemany": executemany, "stream": stream, "copy": copy}
        return type(factory.__name__, (factory,), {k: v for k, v in members.items() if hasattr(factory, k)})


class AsyncBinding(_Hooks):
    """bind_agent_session() for a psycopg AsyncConnection."""

    async def __aenter__(self) -> Any:
        self.install()
        try:
            if not self.channel.idle:
                await run_async(self.connection, self.core.enter_transaction(self.left_before()))
        except BaseException:
            self.uninstall()
            raise
        return self.connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()
        try:
            await run_async(self.connection, self.core.leave())
            self.connection._kakunin_left = self.core.left
        except BaseException:
            await self.connection.close()
            if error is None:
                raise
        if error is not None and (ours := named(error)) is not None:
            raise ours from error

    async def wait(self, gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return await self._wait(gen, *args, **kwargs)
        except psycopg.Error as error:
            if (ours := self.refused(error)) is not None:
                raise ours from error
            raise

    async def before_statement(self) -> None:
        if self.connection._kakunin_binding is self:
            await run_async(self.connection, self.core.before_statement())

    @contextlib.asynccontextmanager
    async def transaction(
        self, savepoint_name: str | None = None, force_rollback: bool = False
    ) -> AsyncIterator[psycopg.AsyncTransaction]:
        outermost = self.channel.idle
        if outermost:
            await run_async(self.connection, self.core.refresh())
        async with self._transaction(savepoint_name, force_rollback) as transaction:
            if not outermost:
                yield transaction
                return
            await run_async(self.connection, self.core.bind_here())
            self.core.in_block = True
            try:
                yield transaction
            finally:
                self.core.in_block = False

    def _hooked(self, factory: Any) -> Any:
        binding = self

        async def execute(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            await binding.before_statement()
            with binding.doing(query):
                return await factory.execute(cursor, query, *args, **kwargs)

        async def executemany(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
            await binding.before_statement()
            with binding.doing(query):
                return await factory.executemany(cursor, query, *args, **kwargs)

        async def stream(cursor: Any, query: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            await binding.before_statement()
            with binding.doing(query):
                async for row in factory.stream(cursor, query, *args, **kwargs):
                    yield row

        @contextlib.asynccontextmanager
        async def copy(cursor: Any, statement: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            await binding.before_statement()
            with binding.doing(statement):
                async with factory.copy(cursor, statement, *args, **kwargs) as copying:
                    yield copying

        members = {"execute": execute, "executemany": executemany, "stream": stream, "copy": copy}
        return type(factory.__name__, (factory,), {k: v for k, v in members.items() if hasattr(factory, k)})


def bound_as(connection: _AnyConnection) -> AgentCredential | str | None:
    """Whom the block that is open on it is for; None where none is."""
    binding: _Hooks | None = getattr(connection, "_kakunin_binding", None)
    return None if binding is None else binding.bearer.credential or binding.bearer.serial


def hooked(connection: _AnyConnection, factory: type[Any]) -> type[Any]:
    """The class of cursors, bound as the connection's own are where a block is open on it."""
    kind: type[Any] = connection._kakunin_binding._hooked(factory) if bound_as(connection) else factory  # type: ignore[union-attr]
    return kind


@contextlib.contextmanager
def bind_pool(pool: Any, bearer: Bearer) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the pool, bound; it goes back unbound when the block ends."""
    with pool.connection() as connection, Binding(connection, bearer):
        yield connection


@contextlib.asynccontextmanager
async def bind_async_pool(pool: Any, bearer: Bearer) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with pool.connection() as connection, AsyncBinding(connection, bearer):
        yield connection
