"""Certificates' states, kept for a few seconds: ``CertificateCache`` and ``AsyncCertificateCache``.

The database decides at every statement and needs no cache. This one is for code beside it (a gateway, an API)
that asks about a certificate far more often than the answer changes.

What it answers is never older than ``ttl`` and, while notifications arrive, no older than the newest of
them: revoking, suspending and reinstating notify ``kakunin_revocation`` with the agent's id. A notification
is a hint and nothing more. Anybody may send one, so it only ever takes answers away, and the database leaves
it out where its queue is half full, so answers age all the same.

Where it cannot know, it asks: while the listening connection is not there nothing is kept and each call is a
query of its own. Letting answers age by ``ttl`` alone would do too for an outage, but one that an attacker
brings about (by ending that backend, say) would then buy the time. And where it cannot ask, it raises.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime as dt
import logging
import math
import os
import re
import selectors
import socket
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import psycopg

from .client.connectors import AsyncConnector, Connector
from .client.operations import VERIFY_CERTIFICATE, Query, verification
from .conninfo import dsn_of, lasting
from .errors import (
    AgentSuspendedError,
    BadInputError,
    CertificateRevokedError,
    CertificateValidityError,
    KakuninError,
    UnknownCertificateError,
)
from .logs import why
from .results import CertificateVerification
from .serials import normalize_serial

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

CHANNEL: Final = "kakunin_revocation"
# Seconds.
TTL: Final = 5.0
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
# Between two looks at what was notified. Anybody may notify, as often as they like.
_SHORTEST_PAUSE = 0.005

_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

_log = logging.getLogger("kakunin_db.cache")

F = TypeVar("F")
_Outcome = concurrent.futures.Future[CertificateVerification]


class _Flight(Generic[F]):
    """A query under way for a serial, and whoever waits for it."""

    def __init__(self, outcome: F) -> None:
        self.outcome = outcome
        self.begun: int | None = None  # how much had been heard; None where nothing was listened to
        self.overtaken = False  # its answer's agent, or everybody, was notified since it began


class _Answers(Generic[F]):
    """What is kept, and the queries under way. Safe to use from several threads."""

    def __init__(self, ttl: float, max_entries: int) -> None:
        self.ttl = ttl
        self.max_entries = max_entries
        self.listening = False
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[CertificateVerification, float]] = OrderedDict()
        self._serials: dict[str, set[str]] = {}  # of an agent
        self._flights: dict[str, _Flight[F]] = {}
        self._times = 0  # something was heard
        self._last: OrderedDict[str, int] = OrderedDict()  # at which of them an agent was, bounded
        self._last_of_all = 0  # and everybody, or one of whom that is not known any more

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, serial: str) -> CertificateVerification | _Flight[F] | None:
        """An answer, or a query that others have begun and nothing was notified since."""
        with self._lock:
            if not self.listening:
                return None
            if (kept := self._kept.get(serial)) is not None:
                if time.monotonic() < kept[1]:
                    self._kept.move_to_end(serial)
                    return kept[0]
                self._drop(serial)
            return self._flights.get(serial)

    def begin(self, serial: str, flight: _Flight[F]) -> _Flight[F]:
        """Makes it the query that others wait for, unless there is one already. Returns that one."""
        with self._lock:
            if not self.listening:
                return flight
            flight.begun = self._times
            return self._flights.setdefault(serial, flight)

    def land(
        self, serial: str, flight: _Flight[F], answer: CertificateVerification | None, until: float
    ) -> None:
        """Keeps the answer, unless its agent was notified since its query began; None for one that failed."""
        with self._lock:
            if self._flights.get(serial) is flight:
                del self._flights[serial]
            if answer is None or flight.begun is None:
                return
            last = max(self._last_of_all, self._last.get(str(answer.agent_id), 0))
            flight.overtaken = flight.begun < last
            if flight.overtaken or until <= time.monotonic():
                return
            self._kept[serial] = answer, until
            if answer.agent_id is not None:
                self._serials.setdefault(str(answer.agent_id), set()).add(serial)
            while len(self._kept) > self.max_entries:
                self._drop(next(iter(self._kept)))

    def hear(self, payloads: Iterable[bytes]) -> None:
        """Drops what is kept of these agents, or everything where one of them is no agent's id. What is being
        asked is not kept where it turns out to be of one of them; until then nobody else waits for it."""
        heard = set(payloads)
        with self._lock:
            if not all(_UUID.fullmatch(agent) for agent in heard):
                self._clear()
                return
            self._times += 1
            self._flights.clear()
            for agent in map(bytes.decode, heard):
                for serial in list(self._serials.get(agent, ())):
                    self._drop(serial)
                self._last[agent] = self._times
                self._last.move_to_end(agent)
            while len(self._last) > self.max_entries:
                _, self._last_of_all = self._last.popitem(last=False)

    def listen(self, listening: bool) -> None:
        with self._lock:
            self.listening = listening
            self._clear()

    def _clear(self) -> None:
        self._times += 1
        self._last_of_all = self._times
        self._last.clear()
        self._kept.clear()
        self._serials.clear()
        self._flights.clear()

    def _drop(self, serial: str) -> None:
        answer, _ = self._kept.pop(serial)
        agent = str(answer.agent_id)
        if (serials := self._serials.get(agent)) is not None:
            serials.discard(serial)
            if not serials:
                del self._serials[agent]


def _query(serial: str) -> Query:
    # The server's clock beside its answer: what is left of a certificate's time is the difference.
    return Query(
        f"select clock_timestamp() as asked_at, pg_is_in_recovery() as is_replica, {VERIFY_CERTIFICATE}",
        [serial],
    )


def _landed(row: dict[str, Any], begun: float, ttl: float) -> tuple[CertificateVerification, float]:
    """The answer, and until when it may be kept (time.monotonic()): never past a moment that changes it, and
    not at all where it is a standby's, who may not have what was notified of already."""
    asked_at: dt.datetime = row.pop("asked_at")
    if row.pop("is_replica"):
        ttl = 0.0
    answer = verification(row)
    moments = (answer.not_before, answer.not_after, answer.revoked_at)
    ahead = [(m - asked_at).total_seconds() for m in moments if m is not None and m > asked_at]
    return answer, begun + min([ttl, *ahead])


def _own(answer: CertificateVerification) -> CertificateVerification:
    """A copy where the caller could change what others are given."""
    if answer.financial_scope is None:
        return answer
    return dataclasses.replace(answer, financial_scope=copy.deepcopy(answer.financial_scope))


def required(answer: CertificateVerification) -> CertificateVerification:
    """The answer, of a certificate that may be used now; raises the error of any other."""
    serial = answer.serial_number
    if answer.valid and answer.status == "active":
        return answer
    if answer.status == "revoked":
        raise CertificateRevokedError(
            f"certificate {serial} was revoked: {answer.revocation_reason or 'just now'}",
            "Revocation is final. Certify the agent anew.",
        )
    if answer.status == "suspended":
        raise AgentSuspendedError(
            f"agent {answer.agent_id} of certificate {serial} is suspended",
            "An operator has to reinstate it.",
        )
    if answer.status == "expired":
        raise CertificateValidityError(f"certificate {serial} has expired", "Certify the agent anew.")
    if answer.status == "not_yet_valid":
        raise CertificateValidityError(
            f"certificate {serial} is not valid yet", "Wait for its notBefore, or compare clocks."
        )
    if answer.status == "unknown":
        raise UnknownCertificateError(
            f"certificate {serial} is not registered here",
            "Register it with kakunin.register_certificate(der), or check that this is the right database.",
        )
    raise KakuninError(f"certificate {serial} may not be used: {answer.status}")


def _checked(ttl: float, max_entries: int) -> tuple[float, int]:
    if not (math.isfinite(ttl) and ttl >= 0):
        raise BadInputError("ttl is a number of seconds, 0 or more")
    if max_entries < 1:
        raise BadInputError("max_entries is 1 or more")
    return ttl, max_entries


def _addresses(target: Any, listen_dsn: str | None) -> tuple[Any, str | None]:
    """What is asked, and what is listened with; None where a connection says it, once there is one."""
    if isinstance(target, (psycopg.Connection, psycopg.AsyncConnection)) and not target.autocommit:
        raise BadInputError(
            "a cache on a connection of yours needs it in autocommit mode",
            "Otherwise its transaction would stay open. Give a DSN or a pool, or set autocommit.",
        )
    if not isinstance(target, str):
        return target, None if listen_dsn is None else _listening_dsn(listen_dsn)
    return lasting(target), _listening_dsn(target if listen_dsn is None else listen_dsn)


def _listening_dsn(dsn: str) -> str:
    # LISTEN works on no standby.
    return lasting(dsn, target_session_attrs="primary", fallback_application_name="kakunin-db cache")


def _heard(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> list[bytes]:
    """What was notified since the last time, as far as it has arrived. Raises psycopg.OperationalError."""
    pgconn = connection.pgconn
    pgconn.consume_input()
    payloads = []
    while (notify := pgconn.notifies()) is not None:
        payloads.append(notify.extra)
    return payloads


class _Listener:
    """Listens in a thread, and tells ``answers``. Knows nothing of the cache, which may be forgotten."""

    def __init__(self, answers: _Answers[Any], target: Any, dsn: str | None) -> None:
        self._answers = answers
        self._target = target
        self._dsn = dsn
        self._stopping = threading.Event()
        self._process = os.getpid()
        self._woken, self._waker = socket.socketpair()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="kakunin-cache", daemon=True)

    def stop(self) -> None:
        if self._process != os.getpid():
            return  # the socket is the parent's too
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while not self._stopping.is_set():
                try:
                    with psycopg.connect(
                        self._address(), autocommit=True, prepare_threshold=None
                    ) as connection:
                        connection.execute(f"listen {CHANNEL}")
                        self._say(True)
                        pause = _FIRST_PAUSE
                        self._listen(connection)
                except Exception as error:
                    self._say(False)
                    if self._stopping.is_set():
                        break
                    _log.warning("not listening, so each answer is asked anew: %s", why(error))
                    self._stopping.wait(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
        finally:
            self._say(False)
            self._woken.close()
            self._waker.close()

    def _address(self) -> str:
        if self._dsn is None:
            if isinstance(self._target, psycopg.Connection):
                self._dsn = _listening_dsn(dsn_of(self._target))
            else:
                with self._target.connection() as connection:
                    self._dsn = _listening_dsn(dsn_of(connection))
        return self._dsn

    def _say(self, listening: bool) -> None:
        if self._answers.listening != listening:
            self._answers.listen(listening)
            with self.changed:
                self.changed.notify_all()

    def _listen(self, connection: psycopg.Connection[Any]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(connection.pgconn.socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._stopping.is_set():
                if payloads := _heard(connection):
                    self._answers.hear(payloads)
                    self._stopping.wait(_SHORTEST_PAUSE)
                else:
                    selector.select()


class CertificateCache:
    """Answers of ``kakunin.verify_certificate()``, kept. Safe to use from several threads.

    Close it, or use it in a ``with`` block. It listens from its first use on, on a connection of its own,
    which has to be direct: no notification passes a pooler in transaction mode.

    :param target: what queries are sent with: a DSN, a ``ConnectionPool``, or a ``Connection`` in autocommit
        mode, of a login that holds one of the kit's roles.
    :param ttl: seconds for which an answer is kept at most, by time.monotonic(); 0 keeps none.
    :param max_entries: the least recently used is dropped beyond these.
    :param listen_dsn: what to listen with; by default what ``target`` is connected with. It has to be the
        server that is asked. A standby's answers are never kept: they can be older than a notification.
    """

    def __init__(
        self,
        target: str | psycopg.Connection[Any] | ConnectionPool[Any],
        *,
        ttl: float = TTL,
        max_entries: int = 10_000,
        listen_dsn: str | None = None,
    ) -> None:
        self._limits = _checked(ttl, max_entries)
        self._target, self._listen_dsn = _addresses(target, listen_dsn)
        self._closed = False
        self._reset()
        _caches.add(self)

    def _reset(self) -> None:
        """As new; in a forked child too, where no thread listens and the connections are the parent's."""
        self._answers: _Answers[_Outcome] = _Answers(*self._limits)
        self._connector = Connector(self._target)
        self._starting = threading.Lock()
        self._listener: _Listener | None = None

    def __enter__(self) -> CertificateCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def listening(self) -> bool:
        """Whether answers are kept at this moment."""
        return self._answers.listening

    def start(self, timeout: float = 0.0) -> bool:
        """Begins to listen, if it does not yet, and waits so many seconds; returns whether it listens."""
        with self._starting:
            if self._closed:
                raise BadInputError("the cache is closed")
            if self._listener is None:
                listener = _Listener(self._answers, self._target, self._listen_dsn)
                listener.thread.start()
                self._listener = listener
                weakref.finalize(self, listener.stop)
            listener = self._listener
        if timeout > 0:
            with listener.changed:
                listener.changed.wait_for(lambda: self._answers.listening, timeout)
        return self._answers.listening

    def status(self, serial: str | int) -> CertificateVerification:
        """What ``kakunin.verify_certificate()`` says of a certificate; ``unknown`` for one not registered.

        Raises BadInputError for what is no serial number, and psycopg.Error where the database cannot be
        asked.
        """
        serial = normalize_serial(serial)
        self._started()
        again = False
        while True:
            found = self._answers.find(serial)
            if isinstance(found, CertificateVerification):
                return _own(found)
            if found is None:
                mine: _Flight[_Outcome] = _Flight(concurrent.futures.Future())
                found = self._answers.begin(serial, mine)
                if found is mine:
                    self._ask(serial, mine)
            try:
                answer = found.outcome.result()
            except concurrent.futures.CancelledError:  # whoever asked was interrupted
                continue
            # Once, or notifications could keep this here: what is asked now has begun after the one heard.
            if again or not found.overtaken:
                return _own(answer)
            again = True

    def require(self, serial: str | int) -> CertificateVerification:
        """:meth:`status` of a certificate that may be used now.

        Raises CertificateRevokedError, AgentSuspendedError, CertificateValidityError or
        UnknownCertificateError for any other, and what :meth:`status` raises.
        """
        return required(self.status(serial))

    def kept(self, serial: str | int) -> CertificateVerification | None:
        """The answer :meth:`status` would give without asking, waiting for nobody; None where it would
        ask."""
        found = self._answers.find(normalize_serial(serial))
        return _own(found) if isinstance(found, CertificateVerification) else None

    def clear(self) -> None:
        """Forgets every answer."""
        self._answers.hear([b""])

    def close(self) -> None:
        """Ends listening and closes the connections it made. Using it afterwards raises BadInputError."""
        with self._starting:
            self._closed = True
            listener = self._listener
        if listener is not None:
            listener.stop()
            listener.thread.join(1.0)
        self._connector.close()

    def _started(self) -> None:
        if self._closed or self._listener is None:
            self.start()

    def _ask(self, serial: str, flight: _Flight[_Outcome]) -> None:
        answer = None
        until = 0.0
        try:
            # In a transaction of the caller's, what is seen may be what was when it began.
            keep = not self._connector.in_transaction()
            begun = time.monotonic()
            (row,) = self._connector.query(_query(serial))
            answer, until = _landed(row, begun, self._limits[0] if keep else 0.0)
        except Exception as error:
            flight.outcome.set_exception(error)
            return
        except BaseException:
            flight.outcome.cancel()
            raise
        finally:
            self._answers.land(serial, flight, answer, until)
        flight.outcome.set_result(answer)


class AsyncCertificateCache:
    """:class:`CertificateCache` for asyncio: the same, in one event loop, on asynchronous connections.

    Close it, or use it in an ``async with`` block.
    """

    def __init__(
        self,
        target: str | psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any],
        *,
        ttl: float = TTL,
        max_entries: int = 10_000,
        listen_dsn: str | None = None,
    ) -> None:
        self._ttl, max_entries = _checked(ttl, max_entries)
        self._target, self._listen_dsn = _addresses(target, listen_dsn)
        self._connector = AsyncConnector(self._target)
        self._answers: _Answers[asyncio.Task[CertificateVerification]] = _Answers(ttl, max_entries)
        self._changed = asyncio.Condition()
        self._listener: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[CertificateVerification]] = set()
        self._process = os.getpid()
        self._closed = False

    async def __aenter__(self) -> AsyncCertificateCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def listening(self) -> bool:
        """Whether answers are kept at this moment."""
        return self._answers.listening

    async def start(self, timeout: float = 0.0) -> bool:
        """Begins to listen, if it does not yet, and waits so many seconds; returns whether it listens."""
        if self._closed:
            raise BadInputError("the cache is closed")
        if self._process != os.getpid():
            raise BadInputError("the cache was made in another process", "Make one after the fork.")
        if self._listener is None or self._listener.done():
            self._listener = asyncio.create_task(self._listen(), name="kakunin-cache")
        if timeout > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                async with self._changed:
                    await asyncio.wait_for(self._changed.wait_for(lambda: self._answers.listening), timeout)
        return self._answers.listening

    async def status(self, serial: str | int) -> CertificateVerification:
        """See :meth:`CertificateCache.status`. A call that is cancelled takes nobody's answer away."""
        serial = normalize_serial(serial)
        await self.start()
        again = False
        while True:
            found = self._answers.find(serial)
            if isinstance(found, CertificateVerification):
                return _own(found)
            if found is None:
                found = self._begin(serial)
            answer = await asyncio.shield(found.outcome)
            if again or not found.overtaken:
                return _own(answer)
            again = True

    async def require(self, serial: str | int) -> CertificateVerification:
        """See :meth:`CertificateCache.require`."""
        return required(await self.status(serial))

    def kept(self, serial: str | int) -> CertificateVerification | None:
        """The answer :meth:`status` would give without asking, waiting for nobody; None where it would
        ask."""
        found = self._answers.find(normalize_serial(serial))
        return _own(found) if isinstance(found, CertificateVerification) else None

    def clear(self) -> None:
        """Forgets every answer."""
        self._answers.hear([b""])

    async def close(self) -> None:
        """Ends listening and what is being asked, and closes the connections it made."""
        self._closed = True
        tasks = [task for task in (self._listener, *self._asking) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connector.close()

    def _begin(self, serial: str) -> _Flight[asyncio.Task[CertificateVerification]]:
        async def ask() -> CertificateVerification:
            answer = None
            until = 0.0
            try:
                keep = not self._connector.in_transaction()
                begun = time.monotonic()
                (row,) = await self._connector.query(_query(serial))
                answer, until = _landed(row, begun, self._ttl if keep else 0.0)
            finally:
                self._answers.land(serial, flight, answer, until)
            return answer

        task = asyncio.create_task(ask())
        flight = _Flight(task)
        self._asking.add(task)
        task.add_done_callback(self._asked)
        return self._answers.begin(serial, flight)

    def _asked(self, task: asyncio.Task[CertificateVerification]) -> None:
        self._asking.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where all that waited were cancelled

    async def _listen(self) -> None:
        pause = _FIRST_PAUSE
        try:
            while True:
                try:
                    connection = await psycopg.AsyncConnection.connect(
                        await self._address(), autocommit=True, prepare_threshold=None
                    )
                    async with connection:
                        await connection.execute(f"listen {CHANNEL}")
                        await self._say(True)
                        pause = _FIRST_PAUSE
                        await self._hear(connection)
                except Exception as error:
                    await self._say(False)
                    _log.warning("not listening, so each answer is asked anew: %s", why(error))
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)
        finally:
            self._answers.listen(False)

    async def _address(self) -> str:
        if self._listen_dsn is None:
            if isinstance(self._target, psycopg.AsyncConnection):
                self._listen_dsn = _listening_dsn(dsn_of(self._target))
            else:
                async with self._target.connection() as connection:
                    self._listen_dsn = _listening_dsn(dsn_of(connection))
        return self._listen_dsn

    async def _say(self, listening: bool) -> None:
        if self._answers.listening != listening:
            self._answers.listen(listening)
            async with self._changed:
                self._changed.notify_all()

    async def _hear(self, connection: psycopg.AsyncConnection[Any]) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        descriptor = connection.pgconn.socket
        loop.add_reader(descriptor, readable.set)
        try:
            while True:
                readable.clear()
                if payloads := _heard(connection):
                    self._answers.hear(payloads)
                    await asyncio.sleep(_SHORTEST_PAUSE)
                else:
                    await readable.wait()
        finally:
            loop.remove_reader(descriptor)


_caches: weakref.WeakSet[CertificateCache] = weakref.WeakSet()
# In a forked child, kept so that nothing closes what is the parent's.
_inherited: list[Any] = []


def _reset_all() -> None:
    for cache in list(_caches):
        _inherited.append((cache._connector, cache._listener))
        cache._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
