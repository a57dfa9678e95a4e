"""Binding SQLAlchemy connections, sessions, engines and sessionmakers, of both kinds.

Each transaction is bound from an event as it begins, so no call site can forget it: ``begin`` for a
Connection, ``after_begin`` for a Session. psycopg and asyncpg send parameters to the server by
themselves; other drivers may write them into the statement's text, where a ticket must never be, and are
refused.
"""

from __future__ import annotations

import contextlib
import secrets
import ssl
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo
from sqlalchemy import Connection, Dialect, Engine, ExceptionContext, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction, sessionmaker
from sqlalchemy.util import await_only

from ..conninfo import dsn_of
from ..errors import BadInputError, named
from . import psycopg_
from .bearer import Bearer, Left, Query, Rollback, SetAutocommit, Steps, wrong_answer
from .core import Channel, Core


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        ours = named(error)
        if ours is None:
            raise
        raise ours from error


class _AsyncpgChannel:
    """SQLAlchemy's adapter of an asyncpg connection, as core.Channel and a runner of steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._adapted: Any = connection.connection.dbapi_connection
        url = connection.engine.url
        self.login = url.username or ""
        self.address = f"{url.host}:{url.port}/{url.database}"
        self._failed = False

    @property
    def idle(self) -> bool:
        return not self._adapted.driver_connection.is_in_transaction()

    @property
    def failed(self) -> bool:
        return self._failed

    @property
    def closed(self) -> bool:
        return bool(self._adapted.driver_connection.is_closed())

    @property
    def autocommit(self) -> bool:
        return bool(self._adapted.autocommit)

    def _perform(self, step: Any) -> Any:
        if isinstance(step, SetAutocommit):
            self._adapted.autocommit = step.value
        elif isinstance(step, Rollback):
            self._adapted.rollback()
            self._failed = False
        elif isinstance(step, Query):
            cursor = self._adapted.cursor()
            # asyncpg prepares what it sends and keeps it by its text. A text that never comes again is
            # never looked up under a name that SQL on this connection could have put a statement of its
            # own under, to be handed the ticket.
            text = step.sql.replace("%s", "$1") + f" -- {secrets.token_hex(8)}"
            try:
                cursor.execute(text, () if step.parameter is None else (step.parameter,))
                (answer,) = cursor.fetchone() or (None,)
            except Exception:
                self._failed = not self.idle
                raise
            finally:
                cursor.close()
            if (wrong := wrong_answer(step, answer)) is not None:
                self._connection.invalidate()
                raise wrong
            return answer
        else:
            return step()
        return None

    def run(self, steps: Steps) -> None:
        with _named_errors(), contextlib.suppress(StopIteration):
            step = next(steps)
            while True:
                try:
                    outcome = self._perform(step)
                except Exception as error:  # SQLAlchemy's adapter raises its own translation of asyncpg's
                    step = steps.throw(error)
                else:
                    step = steps.send(outcome)


def _channel(connection: Connection) -> tuple[Channel, Any]:
    """The channel of a connection's driver, and what runs steps on it."""
    driver = connection.dialect.driver
    raw: Any = connection.connection.driver_connection
    if driver in ("psycopg", "psycopg_async"):
        if raw.autocommit:
            raise BadInputError(
                "a binding lasts for a transaction, and this connection has the isolation level AUTOCOMMIT",
                "Use another isolation level, or psycopg's own connection.",
            )
        channel = psycopg_.PsycopgChannel(raw)
        if isinstance(raw, psycopg.AsyncConnection):
            return channel, lambda steps: await_only(psycopg_.run_async(raw, steps))
        return channel, lambda steps: psycopg_.run(raw, steps)
    if driver == "asyncpg":
        asyncpg = _AsyncpgChannel(connection)
        if asyncpg.autocommit:
            raise BadInputError(
                "a binding lasts for a transaction, and this connection has the isolation level AUTOCOMMIT",
                "Use another isolation level.",
            )
        return asyncpg, asyncpg.run
    raise BadInputError(
        f"the driver {driver} is not supported", "Use postgresql+psycopg or postgresql+asyncpg in the URL."
    )


# The dialects whose errors are seen here, and for whom connections are bound. SQLAlchemy tells of errors by
# dialect only.
_watched: weakref.WeakSet[Dialect] = weakref.WeakSet()
_watching = threading.Lock()
_bearers: weakref.WeakKeyDictionary[Connection, Bearer] = weakref.WeakKeyDictionary()


def _watch(connection: Connection, bearer: Bearer) -> None:
    """Has the connection's failed statements noted as attempts and their errors named."""
    with _watching:
        if connection.dialect not in _watched:
            _watched.add(connection.dialect)
            event.listen(connection.engine, "handle_error", _on_error, retval=True)
    _bearers[connection] = bearer


def _on_error(context: ExceptionContext) -> BaseException | None:
    connection, error = context.connection, context.sqlalchemy_exception
    bearer = None if connection is None else _bearers.get(connection)
    if connection is None or error is None or bearer is None:
        return None
    url = connection.engine.url
    address = f"{url.username}@{url.host}:{url.port}/{url.database}"
    return bearer.refused(error, context.statement, address, lambda: _dsn(connection))


def _dsn(connection: Connection) -> str | None:
    """What opens another connection like this one; None where that cannot be seen from it."""
    raw: Any = connection.connection.driver_connection
    if connection.dialect.driver != "asyncpg":
        return dsn_of(raw)
    # asyncpg's connection has no public memory of how it was made, and its URL only what stands in it.
    url = connection.engine.url
    _, given = connection.dialect.create_connect_args(url)
    tls = getattr(getattr(raw, "_transport", None), "get_extra_info", lambda _: None)("ssl_object")
    verified = tls is not None and tls.context.verify_mode != ssl.CERT_NONE
    if "host" not in given or "user" not in given or (verified and "ssl" not in given):
        return None

    def joined(value: Any) -> str | None:
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value and str(value)

    return make_conninfo(
        host=joined(given["host"]),
        port=joined(given.get("port")),
        user=given["user"],
        password=given.get("password"),
        dbname=given.get("database"),
        sslmode=given.get("ssl"),
    )


def _bind(connection: Connection, bearer: Bearer) -> None:
    channel, run = _channel(connection)
    core = Core(channel, bearer)
    _watch(connection, bearer)
    run(core.begin() if channel.idle else core.enter_transaction(_left.get(connection)))


def _unbind(connection: Connection, bearer: Bearer) -> None:
    """Takes the binding off an open transaction; a finished one has none left."""
    if connection.closed or connection.invalidated or not connection.in_transaction():
        return
    channel, run = _channel(connection)
    # A failed transaction can only be rolled back, by whoever began it, and the binding goes with it.
    if channel.failed:
        return
    core = Core(channel, bearer)
    try:
        run(core.leave())
        if core.left is not None:
            _left[connection] = core.left
    except Exception as error:
        # asyncpg does not tell beforehand that a transaction has failed.
        if getattr(getattr(error, "orig", error), "sqlstate", None) != "25P02":
            raise


# Objects bound now. Not kept in Connection.info, which belongs to the pooled connection below and outlives
# the block.
_bound: weakref.WeakSet[Connection | Session] = weakref.WeakSet()


# What the last block left, where a transaction was open as it ended.
_left: weakref.WeakKeyDictionary[Connection, Left] = weakref.WeakKeyDictionary()


def _mark(target: Connection | Session) -> None:
    if target in _bound:
        raise BadInputError(
            "this connection or session is bound already",
            "End the first bind_agent_session() before another.",
        )
    _bound.add(target)


class _ConnectionBinding:
    def __init__(self, connection: Connection, bearer: Bearer) -> None:
        self.connection = connection
        self.bearer = bearer
        self._refusal: Exception | None = None

    def enter(self) -> None:
        _mark(self.connection)
        try:
            if self.connection.in_transaction():
                _bind(self.connection, self.bearer)
        except BaseException:
            _bound.discard(self.connection)
            raise
        event.listen(self.connection, "begin", self._on_begin)
        event.listen(self.connection, "before_cursor_execute", self._on_statement)

    def leave(self) -> None:
        _bearers.pop(self.connection, None)
        event.remove(self.connection, "begin", self._on_begin)
        event.remove(self.connection, "before_cursor_execute", self._on_statement)
        _bound.discard(self.connection)
        _unbind(self.connection, self.bearer)

    def _on_begin(self, connection: Connection) -> None:
        # An exception out of this event would leave SQLAlchemy's connection unable to begin again, so it
        # waits for the transaction's first statement. Until then nothing is bound and nothing is seen.
        self._refusal = None
        try:
            _bind(connection, self.bearer)
        except Exception as error:
            self._refusal = error

    def _on_statement(self, *_: Any) -> None:
        if self._refusal is not None:
            raise self._refusal


class _SessionBinding:
    def __init__(self, session: Session, bearer: Bearer) -> None:
        self.session = session
        self.bearer = bearer
        self._connections: set[Connection] = set()

    def enter(self) -> None:
        _mark(self.session)
        try:
            if self.session.in_transaction():
                self._on_begin(self.session, None, self.session.connection())
        except BaseException:
            _bound.discard(self.session)
            raise
        event.listen(self.session, "after_begin", self._on_begin)

    def leave(self) -> None:
        event.remove(self.session, "after_begin", self._on_begin)
        _bound.discard(self.session)
        for connection in self._connections:
            _bearers.pop(connection, None)
            _unbind(connection, self.bearer)
        self._connections.clear()

    def _on_begin(
        self, session: Session, transaction: SessionTransaction | None, connection: Connection
    ) -> None:
        if transaction is None or not transaction.nested:
            self._connections = {c for c in self._connections if not c.closed}
            self._connections.add(connection)
            _bind(connection, self.bearer)


def _entered(binding: _ConnectionBinding) -> _ConnectionBinding:
    binding.enter()
    return binding


@contextlib.contextmanager
def bind_connection(connection: Connection, bearer: Bearer) -> Iterator[Connection]:
    binding = _ConnectionBinding(connection, bearer)
    with _named_errors():
        binding.enter()
        try:
            yield connection
        finally:
            binding.leave()


@contextlib.contextmanager
def bind_session(session: Session, bearer: Bearer) -> Iterator[Session]:
    binding = _SessionBinding(session, bearer)
    with _named_errors():
        binding.enter()
        try:
            yield session
        finally:
            binding.leave()


@contextlib.contextmanager
def bind_engine(engine: Engine, bearer: Bearer) -> Iterator[Connection]:
    with engine.connect() as connection, bind_connection(connection, bearer):
        yield connection


@contextlib.contextmanager
def bind_sessionmaker(maker: sessionmaker[Any], bearer: Bearer) -> Iterator[Session]:
    with maker() as session, bind_session(session, bearer):
        yield session


@contextlib.asynccontextmanager
async def bind_async_connection(
    connection: AsyncConnection, bearer: Bearer
) -> AsyncIterator[AsyncConnection]:
    started = connection if connection.sync_connection is not None else await connection
    with _named_errors():
        binding = await started.run_sync(lambda c: _entered(_ConnectionBinding(c, bearer)))
        try:
            yield started
        finally:
            await started.run_sync(lambda _: binding.leave())


@contextlib.asynccontextmanager
async def bind_async_session(session: AsyncSession, bearer: Bearer) -> AsyncIterator[AsyncSession]:
    with _named_errors():
        binding = _SessionBinding(session.sync_session, bearer)
        await session.run_sync(lambda _: binding.enter())
        try:
            yield session
        finally:
            await session.run_sync(lambda _: binding.leave())


@contextlib.asynccontextmanager
async def bind_async_engine(engine: AsyncEngine, bearer: Bearer) -> AsyncIterator[AsyncConnection]:
    async with engine.connect() as connection, bind_async_connection(connection, bearer):
        yield connection


@contextlib.asynccontextmanager
async def bind_async_sessionmaker(
    maker: async_sessionmaker[Any], bearer: Bearer
) -> AsyncIterator[AsyncSession]:
    async with maker() as session, bind_async_session(session, bearer):
        yield session


BINDERS: tuple[tuple[Any, Any], ...] = (
    (Connection, bind_connection),
    (AsyncConnection, bind_async_connection),
    (Engine, bind_engine),
    (AsyncEngine, bind_async_engine),
    (Session, bind_session),
    (AsyncSession, bind_async_session),
    (sessionmaker, bind_sessionmaker),
    (async_sessionmaker, bind_async_sessionmaker),
)
