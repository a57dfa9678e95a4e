"""``Monitor``: an agent's events, recorded beside what it does and not before it.

Whether an agent may act is decided while it waits (:mod:`kakunin_db.scope`). What it did is told afterwards,
and must not slow it down: an event goes into a queue, and a thread appends it to the ledger on a connection
of its own. The queue is bounded; what finds it full, or is refused, is counted, logged
(``kakunin_db.monitoring``), and told with the next event that can be recorded (its ``unrecorded``).
"""

from __future__ import annotations

import atexit
import datetime as dt
import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from .client import AsyncKakunin, Kakunin
from .errors import BadInputError, KakuninError, SignerUnavailableError
from .logs import why

# Seconds.
AT_EXIT: Final = 5.0
_ON_TIME = 10.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
# Recorded later than this, an event says when it occurred.
_LATE = 5.0

_log = logging.getLogger("kakunin_db.monitoring")
_monitors: weakref.WeakSet[Monitor] = weakref.WeakSet()
_inherited: list[Kakunin] = []


@dataclass
class _Noted:
    event_type: str
    metadata: dict[str, Any]
    session_id: str | None
    noted: float


class Monitor:
    """Records events of the agent that a client acts for, in their order, at least once.

    :param kakunin: the client; the monitor opens a connection like the client's when there is something to
        record.
    :param size: how many events may wait.

    ``counters`` has ``noted``, ``recorded``, ``dropped`` (the queue was full, or the database refused) and
    ``failures`` (tries). Raises BadInputError for a client that acts for nobody.
    """

    def __init__(self, kakunin: Kakunin | AsyncKakunin, *, size: int = 1000) -> None:
        if size < 1:
            raise BadInputError("a monitor keeps one event at least")
        self._dsn, self._credential = kakunin.acts_as()
        self._size = size
        self._begin()
        _monitors.add(self)

    def _begin(self) -> None:
        """As new; in a forked child too, where the thread, the connection and what waits are the parent's."""
        self._client = Kakunin(self._dsn, credential=self._credential, timeout=_ON_TIME)
        self.counters = dict.fromkeys(("noted", "recorded", "dropped", "failures"), 0)
        self._changed = threading.Condition()
        self._waiting: deque[_Noted] = deque()
        self._recording = self._closed = False
        self._draining = 0
        self._unrecorded = 0
        self._thread: threading.Thread | None = None

    def record(
        self, event_type: str, metadata: Mapping[str, Any] | None = None, *, session_id: str | None = None
    ) -> bool:
        """Notes an event; returns whether it was taken. Never raises, and never waits for the database.

        What of ``metadata`` JSON cannot say becomes its ``str()``.
        """
        try:
            said = json.loads(json.dumps(dict(metadata or {}), default=str, allow_nan=False))
        except Exception as error:
            said = {"metadata_error": type(error).__name__}
        event = _Noted(event_type, said, session_id, time.monotonic())
        with self._changed:
            self.counters["noted"] += 1
            if self._closed or len(self._waiting) >= self._size:
                self._drop("the monitor is closed" if self._closed else "the queue is full")
                return False
            self._waiting.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kakunin-monitor", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def flush(self, timeout: float = AT_EXIT) -> bool:
        """Returns whether all that waited was recorded, or given up, within ``timeout`` seconds. Runs by
        itself as the interpreter exits. Blocks: in asyncio call it in a thread."""
        end = time.monotonic() + timeout
        with self._changed:
            self._draining += 1
            self._changed.notify_all()
            try:
                while self._waiting or self._recording:
                    left = end - time.monotonic()
                    if left <= 0:
                        return False
                    self._changed.wait(left)
                return True
            finally:
                self._draining -= 1

    def close(self, timeout: float = AT_EXIT) -> bool:
        """:meth:`flush`, and the end of the thread and its connection. What is noted later is dropped."""
        flushed = self.flush(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return flushed

    def _drop(self, reason: str) -> None:
        """The lock is held."""
        if self._unrecorded == 0:
            _log.warning("events are dropped: %s", reason)
        self.counters["dropped"] += 1
        self._unrecorded += 1

    def _work(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._recording = False
                self._changed.notify_all()
                end = time.monotonic() + pause
                while not self._waiting or (time.monotonic() < end and not self._draining):
                    if self._closed:
                        self._client.close()
                        return
                    self._changed.wait(end - time.monotonic() if self._waiting else None)
                event, unrecorded = self._waiting[0], self._unrecorded
                self._recording = True
            try:
                self._append(event, unrecorded)
            except Exception as error:
                # What the database refuses it will refuse again, as a revoked agent's.
                final = isinstance(error, (KakuninError, psycopg.Error)) and not isinstance(
                    error, (psycopg.OperationalError, SignerUnavailableError)
                )
                with self._changed:
                    self.counters["failures"] += 1
                    if final:
                        self._waiting.popleft()
                        self._drop(why(error))
                    elif pause == 0.0:
                        _log.warning("an event was not recorded yet: %s", why(error))
                pause = 0.0 if final else min(max(pause * 2, _FIRST_PAUSE), _LONGEST_PAUSE)
                if not final:
                    time.sleep(_FIRST_PAUSE if self._draining else 0)  # and not as fast as it can be refused
            else:
                with self._changed:
                    self._waiting.popleft()
                    self.counters["recorded"] += 1
                    self._unrecorded -= unrecorded
                pause = 0.0

    def _append(self, event: _Noted, unrecorded: int) -> None:
        metadata = event.metadata | ({"unrecorded": unrecorded} if unrecorded else {})
        late = time.monotonic() - event.noted
        occurred_at = None
        if late > _LATE:
            occurred_at = dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=late)
        self._client.events.create(
            event.event_type, metadata, session_id=event.session_id, occurred_at=occurred_at
        )


def _at_exit() -> None:
    end = time.monotonic() + AT_EXIT
    for monitor in list(_monitors):
        if not monitor.flush(max(end - time.monotonic(), 0)):
            _log.warning("%d events were not recorded as the program ended", len(monitor._waiting))


def _in_child() -> None:
    for monitor in list(_monitors):
        _inherited.append(monitor._client)  # kept, so that nothing closes what is the parent's
        monitor._begin()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
