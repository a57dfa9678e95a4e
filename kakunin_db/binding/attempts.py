"""Attempts: what a policy or a scope refused a bound session, recorded where no rollback reaches it.

An agent that is refused rolls back, and what its transaction appended to the ledger goes with it. So the
attempt is appended from a connection of its own, by a session of the same agent, and as nothing but facts:
the SQLSTATE, the names of table and schema that the error gives, and the statement's SHA-256.

The application never waits for it. A statement that fails leaves a note in memory; one daemon thread a
process, started by the first note, brings notes to the database. Everything is bounded: of an agent at most
BURST entries at once and one every REFILL seconds afterwards, further attempts being counted in the last
one's ``attempts``; AGENTS agents; ON_TIME seconds for an entry. What could not be recorded is counted, logged
(``kakunin_db.attempts``), and told with the next entry that can be (``unrecorded``).
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from ..conninfo import lasting
from ..deadline import wait_until
from ..errors import CredentialRejectedError, KakuninError, SignerUnavailableError, about
from ..logs import why
from .bearer import Bearer
from .core import Core
from .psycopg_ import PsycopgChannel, run

AGENTS: Final = 100
BURST: Final = 5
# Seconds.
REFILL: Final = 10.0
ON_TIME: Final = 10.0
GIVE_UP_AFTER: Final = 300.0
KEEP_CONNECTION: Final = 10.0
AT_EXIT: Final = 2.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_LOCK_WITHIN = 0.05

# Longer ones are not hashed: the caller would wait for it.
_LONGEST_STATEMENT = 1 << 20

# Local to the transaction, and before anything else in it: the login's own settings may be any.
LIMITS = (
    "select pg_catalog.set_config('statement_timeout', '5000', true),"
    " pg_catalog.set_config('lock_timeout', '2000', true),"
    " pg_catalog.set_config('idle_in_transaction_session_timeout', '10000', true)"
)
_APPEND = (
    "select pg_catalog.pg_current_xact_id()::pg_catalog.text,"
    " kakunin.audit_log_append('unauthorized_access_attempt', %s::pg_catalog.jsonb, null)"
)
_COMMITTED = "select pg_catalog.pg_xact_status(%s::pg_catalog.xid8)"

_log = logging.getLogger("kakunin_db.attempts")


def statement_hash(statement: str | bytes | None) -> str | None:
    """``sha256:<hex>`` of a statement's text in UTF-8, as it was given and without its parameters."""
    if statement is None or len(statement) > _LONGEST_STATEMENT:
        return None
    data = statement.encode("utf-8", "surrogatepass") if isinstance(statement, str) else bytes(statement)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass
class _Attempt:
    facts: dict[str, Any]
    made: float
    attempts: int = 1
    transaction: str | None = None  # that was told to commit, and may have
    told: int = 0  # of those unrecorded, in that transaction


@dataclass
class _Agent:
    """An agent on a database: what waits to be recorded, and how much may be at once."""

    bearer: Bearer
    dsn: str = field(repr=False)
    tokens: float = BURST
    refilled: float = field(default_factory=time.monotonic)
    waiting: list[_Attempt] = field(default_factory=list)
    pause: float = 0.0
    not_before: float = 0.0

    def refill(self, now: float) -> None:
        self.tokens = min(BURST, self.tokens + (now - self.refilled) / REFILL)
        self.refilled = now

    def add(self, attempt: _Attempt) -> None:
        full = len(self.waiting) >= max(1, int(self.tokens))
        if full and self.waiting[-1].transaction is None:  # one that may be recorded already counts no more
            self.waiting[-1].attempts += attempt.attempts
        else:
            self.waiting.append(attempt)

    def due(self, *, draining: bool) -> float | None:
        """When the first one may be recorded (time.monotonic()); None where nothing waits."""
        if not self.waiting:
            return None
        filled = self.refilled + max(0.0, 1.0 - self.tokens) * REFILL
        return self.not_before if draining else max(self.not_before, filled)


class Recorder:
    """The process's recorder of attempts. ``counters`` has ``noted``, ``recorded``, ``entries``, ``lost``,
    ``failures`` and ``skipped`` (attempts on connections whose password or host cannot be known)."""

    def __init__(self) -> None:
        self.counters = dict.fromkeys(("noted", "recorded", "entries", "lost", "failures", "skipped"), 0)
        self._told = False
        self._forget()

    def _forget(self) -> None:
        """As new; in a forked child too, which has no thread, and where what waits is the parent's."""
        self.counters = dict.fromkeys(self.counters, 0)
        self._changed = threading.Condition()
        self._agents: OrderedDict[tuple[str, str], _Agent] = OrderedDict()
        self._unrecorded = 0
        self._draining = 0
        self._recording = False
        self._thread: threading.Thread | None = None
        self._connection: psycopg.Connection[Any] | None = None
        self._connected_to: tuple[str, str] | None = None
        self._used = 0.0

    # The application's side: never raises, never waits for more than a lock of this module -------------

    def note(
        self,
        bearer: Bearer,
        error: KakuninError,
        statement: str | bytes | None,
        address: str,
        dsn: Callable[[], str | None],
    ) -> None:
        """Notes an attempt of the bearer's agent: ``error`` as :func:`errors.refused` made it.

        :param address: the database and login, to tell agents apart.
        :param dsn: what a connection is made from; not asked while others of the agent wait. None: it is
            not known.
        """
        try:
            self._note(bearer, error, statement, address, dsn)
        except Exception as failure:  # the application has its own error to see to
            self.counters["failures"] += 1
            _log.warning("an attempt could not be noted: %s", type(failure).__name__)

    def _note(
        self,
        bearer: Bearer,
        error: KakuninError,
        statement: str | bytes | None,
        address: str,
        dsn: Callable[[], str | None],
    ) -> None:
        facts: dict[str, Any] = {"sqlstate": error.sqlstate, **about(error)}
        if (hashed := statement_hash(statement)) is not None:
            facts["statement"] = hashed
        key = (bearer.serial, bearer.attempts_dsn or address)
        agent = self._agents.get(key)
        if agent is None or not agent.waiting or agent.pause:  # a password may have changed since
            found = bearer.attempts_dsn or dsn()
            if found is None:
                self._skip()
                return
            if agent is None:
                agent = _Agent(bearer, found)
            agent.dsn = found
        if not self._changed.acquire(timeout=_LOCK_WITHIN):  # in a signal handler, say
            self._lose(1)
            return
        try:
            now = time.monotonic()
            self.counters["noted"] += 1
            if key not in self._agents and not self._room(now):
                self._lose(1)
                return
            agent = self._agents.setdefault(key, agent)
            agent.bearer = bearer
            agent.refill(now)
            agent.add(_Attempt(facts, now))
            if self._thread is None:
                self._start()
            self._changed.notify_all()
        finally:
            self._changed.release()

    def _room(self, now: float) -> bool:
        if len(self._agents) < AGENTS:
            return True
        for key, agent in self._agents.items():
            agent.refill(now)
            if not agent.waiting and agent.tokens >= BURST:
                del self._agents[key]
                return True
        return False

    def _lose(self, attempts: int) -> None:
        self._unrecorded += attempts
        self.counters["lost"] += attempts

    def _skip(self) -> None:
        self.counters["skipped"] += 1
        if not self._told:
            self._told = True
            _log.warning(
                "attempts are not recorded: how this connection was made cannot be seen from it. "
                "Give bind_agent_session(..., attempts_dsn=...)."
            )

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="kakunin-attempts", daemon=True)
        thread.start()
        self._thread = thread

    def flush(self, timeout: float) -> bool:
        """Records what waits, without regard to the rate; returns whether all was within ``timeout`` seconds.
        What failed is tried once more, and then again when its time comes."""
        until = time.monotonic() + timeout
        if not self._changed.acquire(timeout=timeout):
            return False
        try:
            self._draining += 1
            for agent in self._agents.values():
                agent.not_before = 0.0
            self._changed.notify_all()
            while self._recording or any(agent.waiting for agent in self._agents.values()):
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True
        finally:
            self._draining -= 1
            self._changed.release()

    # The thread's side --------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._recording = False
                self._changed.notify_all()
                key, agent, attempt, unrecorded = self._next()
                self._recording = True
            try:
                self._record(key, agent, attempt, unrecorded)
            except Exception as error:
                self._failed(agent, attempt, unrecorded, error)
            else:
                self.counters["recorded"] += attempt.attempts
                self.counters["entries"] += 1
                agent.pause = 0.0

    def _next(self) -> tuple[tuple[str, str], _Agent, _Attempt, int]:
        """Waits until an attempt is due, and takes it. The lock is held."""
        while True:
            now = time.monotonic()
            first: tuple[float, tuple[str, str]] | None = None
            for key, agent in self._agents.items():
                agent.refill(now)
                due = agent.due(draining=self._draining > 0)
                if due is not None and (first is None or due < first[0]):
                    first = due, key
            if first is not None and first[0] <= now:
                key = first[1]
                agent = self._agents[key]
                self._agents.move_to_end(key)
                agent.tokens = max(0.0, agent.tokens - 1.0)
                unrecorded, self._unrecorded = self._unrecorded, 0
                return key, agent, agent.waiting.pop(0), unrecorded
            wait = None if first is None else first[0] - now
            if self._connection is not None:
                idle = self._used + KEEP_CONNECTION - now
                if idle <= 0:
                    self._disconnect()
                    continue
                wait = idle if wait is None else min(wait, idle)
            self._changed.wait(wait)

    def _failed(self, agent: _Agent, attempt: _Attempt, unrecorded: int, error: Exception) -> None:
        self._disconnect()
        now = time.monotonic()
        # What the database refuses it will refuse again: a revoked agent has no session to record with.
        later = (psycopg.OperationalError, SignerUnavailableError)
        final = isinstance(error, (KakuninError, psycopg.Error)) and not isinstance(error, later)
        with self._changed:
            self.counters["failures"] += 1
            self._unrecorded += unrecorded
            if final or now - attempt.made > GIVE_UP_AFTER:
                self._lose(attempt.attempts)
            else:
                agent.waiting.insert(0, attempt)
                while len(agent.waiting) > BURST + 1:
                    agent.waiting[-2].attempts += agent.waiting.pop().attempts
                agent.pause = min(max(agent.pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                agent.not_before = now + agent.pause
        _log.warning(
            "an attempt of the agent with certificate %s was not recorded%s: %s",
            agent.bearer.serial,
            "" if final else " yet",
            why(error),
        )

    def _record(self, key: tuple[str, str], agent: _Agent, attempt: _Attempt, unrecorded: int) -> None:
        metadata = {**attempt.facts, "attempts": attempt.attempts}
        if unrecorded:
            metadata["unrecorded"] = unrecorded
        try:
            self._append(key, agent, attempt, metadata)
        except CredentialRejectedError:  # a ticket of a retired key, or expired on the way: once more
            self._disconnect()
            self._append(key, agent, attempt, metadata)
        self._used = time.monotonic()

    def _append(
        self, key: tuple[str, str], agent: _Agent, attempt: _Attempt, metadata: dict[str, Any]
    ) -> None:
        connection = self._connected(key, agent)
        wait_until(connection, time.monotonic() + ON_TIME)
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        cursor.execute(LIMITS, prepare=False)
        if attempt.transaction is not None:
            # The answer to its commit was lost. Twice in the ledger, it would count twice against the agent.
            status = cursor.execute(_COMMITTED, [attempt.transaction], prepare=False).fetchone()
            if status == ("committed",):
                connection.rollback()
                with self._changed:
                    self._unrecorded += max(0, metadata.get("unrecorded", 0) - attempt.told)
                return
            if status == ("in progress",):
                raise psycopg.OperationalError("the transaction before is not over")
            attempt.transaction = None
        run(connection, Core(PsycopgChannel(connection), agent.bearer).bind_here())
        row = cursor.execute(_APPEND, [Jsonb(metadata)], prepare=False).fetchone()
        attempt.transaction, attempt.told = row[0] if row else None, metadata.get("unrecorded", 0)
        connection.commit()

    def _connected(self, key: tuple[str, str], agent: _Agent) -> psycopg.Connection[Any]:
        connection = self._connection
        if connection is None or connection.closed or self._connected_to != key:
            self._disconnect()
            # Not "read-write", by which a setting of the agent's own login could keep this out.
            dsn = lasting(agent.dsn)
            dsn = make_conninfo(
                dsn, connect_timeout=5, application_name="kakunin-db attempts", target_session_attrs="primary"
            )
            connection = psycopg.connect(dsn, prepare_threshold=None)
            connection.read_only = False
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            self._connection, self._connected_to = connection, key
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


recorder: Final = Recorder()
_inherited: list[Any] = []


def _in_child() -> None:
    _inherited.append(recorder._connection)  # kept, so that nothing closes what is the parent's
    recorder._forget()


atexit.register(recorder.flush, AT_EXIT)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def flush_attempts(timeout: float = 5.0) -> bool:
    """Records the attempts that wait, at once; returns whether none is left after ``timeout`` seconds.

    Runs by itself, with two seconds, as the interpreter exits. Blocks: in asyncio call it in a thread.
    """
    return recorder.flush(timeout)
