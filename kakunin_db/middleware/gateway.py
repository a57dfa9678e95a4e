"""What the decision (core.py) has to know, from the database: for threads and for asyncio.

Whatever goes wrong on the way to an answer is a refusal: 503, and the reason in the log. Nothing is waited
for longer than the deadline, nor by more than so many at a time: a database that hangs would otherwise
collect every request there is.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from cryptography import x509

from ..ca import AgentCertificate
from ..cache import TTL, AsyncCertificateCache, CertificateCache
from ..client.connectors import AsyncConnector, Connector
from ..client.operations import Query
from ..conninfo import lasting
from ..errors import BadInputError, KakuninError, named
from ..logs import why
from ..tickets import Ticket, read_ticket
from .core import (
    OpenSession,
    PublicKey,
    Refused,
    Request,
    Rules,
    Status,
    Step,
    UseNonce,
    VerifiedAgent,
    admit,
    check,
    rejected,
    unavailable,
)

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

T = TypeVar("T")

# Seconds for one question.
DEADLINE: Final = 2.0
_MOST_WAITING: Final = 1000
_MOST_KEYS: Final = 10_000
# Of one agent within the time a signature counts.
_MOST_NONCES: Final = 10_000

_log = logging.getLogger("kakunin_db.middleware")


class Nonces(Protocol):
    """Remembers nonces. Several processes behind one address share one, such as a Redis with SET NX EX."""

    def use(self, serial: str, nonce: str, seconds: float) -> bool | Awaitable[bool]:
        """Whether this agent's nonce is new, atomically; it is remembered for so many seconds. May raise."""
        ...


class MemoryNonces:
    """This process's own. Safe to use from several threads."""

    def __init__(self, most: int = _MOST_NONCES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._used: dict[str, OrderedDict[str, float]] = {}
        self._swept = time.monotonic()

    def use(self, serial: str, nonce: str, seconds: float) -> bool:
        now = time.monotonic()
        with self._lock:
            if now > self._swept + seconds:
                self._swept = now
                for agent in [s for s, used in self._used.items() if max(used.values()) < now]:
                    del self._used[agent]
            used = self._used.setdefault(serial, OrderedDict())
            while used and next(iter(used.values())) < now:
                used.popitem(last=False)
            if nonce in used:
                return False
            if len(used) >= self._most:  # none is forgotten to make room
                raise Refused(429, "too_many_requests", "Too many signed requests.", ("Retry-After", "10"))
            used[nonce] = now + seconds
            return True


class _Keys:
    """Certificates' keys. A serial's certificate never changes, so they are kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: OrderedDict[str, Any] = OrderedDict()

    def get(self, serial: str) -> Any:
        with self._lock:
            if (key := self._keys.get(serial)) is not None:
                self._keys.move_to_end(serial)
            return key

    def put(self, serial: str, der: bytes | None) -> Any:
        if der is None:
            raise unavailable()  # it was there a moment ago
        certificate = AgentCertificate(x509.load_der_x509_certificate(der))
        if certificate.serial != serial:
            raise unavailable()
        with self._lock:
            self._keys[serial] = certificate.public_key
            if len(self._keys) > _MOST_KEYS:
                self._keys.popitem(last=False)
        return certificate.public_key


def _der(serial: str) -> Query:
    return Query("select kakunin.certificate_der(%s) as der", [serial])


def _open(assertion: str) -> Query:
    return Query("select kakunin.open_session(%s) as ticket", [assertion])


def _ticket(rows: list[dict[str, Any]], begun: float) -> Ticket:
    text = rows[0]["ticket"]
    return Ticket(text, begun + read_ticket(text)[1])


def _refused(error: Exception, step: Step) -> Refused:
    """Whatever a step raised, as a refusal."""
    if isinstance(error, Refused):
        return error
    ours = error if isinstance(error, KakuninError) else named(error)
    if isinstance(step, OpenSession) and ours is not None:
        return rejected(ours)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        _log.warning("%s: no answer in time", type(step).__name__)
    else:
        _log.warning("%s: %s", type(step).__name__, why(error))
    return unavailable()


def _checked_deadline(deadline: float) -> float:
    if not 0 < deadline <= 60:
        raise BadInputError("deadline is a number of seconds, at most 60")
    return deadline


def _target(target: Any) -> Any:
    if isinstance(target, str):
        return lasting(target)
    if callable(getattr(target, "getconn", None)):
        return target
    raise BadInputError("the middleware takes a DSN or a pool", "A connection is one request's at a time.")


class Gateway:
    """The certificates of one database, for requests in threads. Middlewares of a process can share one.

    :param target: a DSN or a ``psycopg_pool.ConnectionPool`` of a login with ``kakunin_gateway`` (with
        assertions ``kakunin_agent`` does).
    :param ttl: seconds for which an answer is kept at most; see :class:`kakunin_db.CertificateCache`.
    :param deadline: seconds after which the database counts as away.
    :param nonces: where signatures' nonces are remembered; by default in this process.
    :param listen_dsn: what revocations are heard with; by default what ``target`` is connected with.
    """

    def __init__(
        self,
        target: str | ConnectionPool[Any],
        *,
        ttl: float = TTL,
        deadline: float = DEADLINE,
        nonces: Nonces | None = None,
        listen_dsn: str | None = None,
    ) -> None:
        target = _target(target)
        self.cache = CertificateCache(target, ttl=ttl, listen_dsn=listen_dsn)
        self._target = target
        self._deadline = _checked_deadline(deadline)
        self._nonces = nonces if nonces is not None else MemoryNonces()
        self._keys = _Keys()
        self._process = 0
        self._here()

    def _here(self) -> None:
        """Connections and locks are a process's own: a server may fork after it has loaded the
        application."""
        if self._process != os.getpid():
            self._waiting = threading.BoundedSemaphore(_MOST_WAITING)
            self._connector = Connector(self._target)
            self._process = os.getpid()

    def admit(
        self, rules: Rules, request: Request, content: Callable[[int], bytes | None], outer: Any = None
    ) -> VerifiedAgent | None:
        """The request's agent; None for a public path. Raises Refused, and nothing else."""
        steps = admit(rules, request, outer)
        try:
            step = next(steps)
            while True:
                try:
                    known = self._know(step, content)
                except Exception as error:
                    raise _refused(error, step) from error
                step = steps.send(known)
        except StopIteration as stop:
            agent: VerifiedAgent | None = stop.value
            return agent
        except Refused:
            raise
        except Exception as error:
            _log.exception("a request could not be decided")
            raise unavailable() from error

    def _know(self, step: Step, content: Callable[[int], bytes | None]) -> Any:
        if isinstance(step, Status):
            return self.cache.kept(step.serial) or self._ask(self.cache.status, step.serial)
        if isinstance(step, PublicKey):
            if (key := self._keys.get(step.serial)) is not None:
                return key
            return self._keys.put(step.serial, self._ask(self._query, _der(step.serial))[0]["der"])
        if isinstance(step, OpenSession):
            begun = time.monotonic()
            return _ticket(self._ask(self._query, _open(step.assertion)), begun)
        if isinstance(step, UseNonce):
            return self._nonces.use(step.serial, step.nonce, step.seconds) is True
        return content(step.limit)

    def _query(self, query: Query) -> Any:
        return self._connector.query(query)

    def _ask(self, question: Callable[..., T], *args: Any) -> T:
        """In a thread, because psycopg waits for as long as the server takes."""
        self._here()
        waiting = self._waiting
        if not waiting.acquire(blocking=False):
            raise TimeoutError
        outcome: list[T | Exception] = []
        done = threading.Event()

        def ask() -> None:
            try:
                outcome.append(question(*args))
            except Exception as error:
                outcome.append(error)
            finally:
                waiting.release()
                done.set()

        try:
            threading.Thread(target=ask, name="kakunin-gateway", daemon=True).start()
        except BaseException:
            waiting.release()
            raise
        if not done.wait(self._deadline):
            raise TimeoutError
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def close(self) -> None:
        """Ends listening and closes its connections; every request afterwards is refused."""
        self.cache.close()
        if self._process == os.getpid():
            self._connector.close()


class _Here:
    """What an event loop has of its own."""

    def __init__(self, cache: AsyncCertificateCache, connector: AsyncConnector) -> None:
        self.cache = cache
        self.connector = connector
        self.waiting: set[asyncio.Task[Any]] = set()

    def asked(self, task: asyncio.Task[Any]) -> None:
        self.waiting.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    def abandon(self) -> None:
        """Once the loop is closed, which can close nothing itself any more."""
        for connector in (self.connector, self.cache._connector):
            if connector._own is not None:
                connector._own.pgconn.finish()


class AsyncGateway:
    """:class:`Gateway` for asyncio, with a DSN or an ``AsyncConnectionPool``."""

    def __init__(
        self,
        target: str | AsyncConnectionPool[Any],
        *,
        ttl: float = TTL,
        deadline: float = DEADLINE,
        nonces: Nonces | None = None,
        listen_dsn: str | None = None,
    ) -> None:
        self._target = _target(target)
        self._options: dict[str, Any] = {"ttl": ttl, "listen_dsn": listen_dsn}
        self._deadline = _checked_deadline(deadline)
        self._nonces = nonces if nonces is not None else MemoryNonces()
        self._keys = _Keys()
        self._lock = threading.Lock()
        self._loops: dict[asyncio.AbstractEventLoop, _Here] = {}
        self._process = 0
        self._closed = False
        AsyncCertificateCache(self._target, **self._options)  # says now what is wrong with them

    def _here(self) -> _Here:
        """Connections are an event loop's own, and servers make theirs after they have loaded the
        application."""
        if self._closed:
            raise BadInputError("the gateway is closed")
        loop = asyncio.get_running_loop()
        if self._process == os.getpid() and (here := self._loops.get(loop)) is not None:
            return here
        with self._lock:
            if self._process != os.getpid():
                self._loops.clear()
            self._process = os.getpid()
            self._abandon()
            cache = AsyncCertificateCache(self._target, **self._options)
            return self._loops.setdefault(loop, _Here(cache, AsyncConnector(self._target)))

    async def start(self, timeout: float = 0.0) -> bool:
        """Begins to listen for revocations; returns whether it does. The first request does so as well."""
        return await self._here().cache.start(timeout)

    async def check(self, serial: str) -> None:
        """Raises Refused unless the certificate may be used now."""
        step = Status(serial)
        try:
            check(await self._know(step, _no_content), serial)
        except Exception as error:
            raise _refused(error, step) from error

    async def admit(
        self,
        rules: Rules,
        request: Request,
        content: Callable[[int], Awaitable[bytes | None]],
        outer: Any = None,
    ) -> VerifiedAgent | None:
        """See :meth:`Gateway.admit`."""
        steps = admit(rules, request, outer)
        try:
            step = next(steps)
            while True:
                try:
                    known = await self._know(step, content)
                except Exception as error:
                    raise _refused(error, step) from error
                step = steps.send(known)
        except StopIteration as stop:
            agent: VerifiedAgent | None = stop.value
            return agent
        except Refused:
            raise
        except Exception as error:
            _log.exception("a request could not be decided")
            raise unavailable() from error

    async def _know(self, step: Step, content: Callable[[int], Awaitable[bytes | None]]) -> Any:
        here = self._here()
        if isinstance(step, Status):
            return here.cache.kept(step.serial) or await self._ask(here, here.cache.status(step.serial))
        if isinstance(step, PublicKey):
            if (key := self._keys.get(step.serial)) is not None:
                return key
            rows = await self._ask(here, here.connector.query(_der(step.serial)))
            return self._keys.put(step.serial, rows[0]["der"])
        if isinstance(step, OpenSession):
            begun = time.monotonic()
            return _ticket(await self._ask(here, here.connector.query(_open(step.assertion))), begun)
        if isinstance(step, UseNonce):
            new = self._nonces.use(step.serial, step.nonce, step.seconds)
            return (await asyncio.wait_for(new, self._deadline) if inspect.isawaitable(new) else new) is True
        return await content(step.limit)

    async def _ask(self, here: _Here, question: Any) -> Any:
        """Given up at the deadline, and not cancelled: that would wait for the server once more."""
        if len(here.waiting) >= _MOST_WAITING:
            question.close()
            raise TimeoutError
        task = asyncio.ensure_future(question)
        here.waiting.add(task)
        task.add_done_callback(here.asked)
        done, _ = await asyncio.wait([task], timeout=self._deadline)
        if not done:
            raise TimeoutError
        return task.result()

    async def close(self) -> None:
        """Ends listening and closes its connections; every request afterwards is refused."""
        self._closed = True
        self._abandon()
        if (here := self._loops.pop(asyncio.get_running_loop(), None)) is not None:
            for task in list(here.waiting):
                task.cancel()
            await here.cache.close()
            await here.connector.close()

    def _abandon(self) -> None:
        for ended in [loop for loop in self._loops if loop.is_closed()]:
            self._loops.pop(ended).abandon()


async def _no_content(limit: int) -> bytes | None:
    raise NotImplementedError
