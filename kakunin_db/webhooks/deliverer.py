"""Delivers what is in the outbox; the worker runs it in a thread, with a connection of its own.

The database says what is due, how often it is tried and when it is given up. Any number of deliverers may
run: what one has claimed is leased, and no other sends it before the lease ends. Attempts run in threads, at
most four at once for an endpoint, so that one that does not answer keeps nobody else waiting.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import datetime as dt
import importlib.metadata
import logging
import ssl
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.rows import dict_row

from ..conninfo import lasting
from ..errors import BadInputError, named
from ..ledger.worker import Metrics
from ..logs import say, why
from .sending import Network, Unsent, post
from .signatures import SecretKeys, signed_headers

# As many as are claimed at most: four for each of 32 endpoints.
_THREADS = 128
# Seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_MARGIN = 20.0  # of a lease over an attempt
_STATUS_EVERY = 5.0
_CLEAN_EVERY = 600.0
_MOST_CLEANED = 1000  # by one call


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set, in seconds.

    ``poll`` is how often it looks: no decision waits for a notification, so none is sent. ``timeout`` bounds
    an attempt, from resolving the name to the head of the answer.
    """

    poll: float = 0.5
    timeout: float = 10.0


@dataclasses.dataclass(frozen=True)
class _Delivery:
    message_id: str
    endpoint_id: uuid.UUID
    attempt: int
    url: str
    secrets: list[bytes]
    payload: str


class Deliverer:
    """Delivers until :meth:`stop`.

    :param dsn: of a login with ``kakunin_worker``.
    :param keys: what endpoints' secrets are encrypted under.
    :param allowed: networks that are not public and may be sent to.
    :param context: for TLS; by default the system's authorities, or those ``SSL_CERT_FILE`` names.
    """

    def __init__(
        self,
        dsn: str,
        keys: SecretKeys,
        *,
        settings: Settings | None = None,
        allowed: Sequence[Network] = (),
        context: ssl.SSLContext | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._dsn = lasting(
            dsn, target_session_attrs="read-write", fallback_application_name="kakunin-db worker"
        )
        self._keys = keys
        self._settings = settings or Settings()
        self._allowed = list(allowed)
        self._context = context or ssl.create_default_context()
        self.metrics = metrics or Metrics()
        self._agent = f"kakunin-db/{importlib.metadata.version('kakunin-db')}"
        self._woken = threading.Event()
        self._stopping = False
        self._rounds = 0
        self._flying: dict[concurrent.futures.Future[int], _Delivery] = {}
        self._status_at = 0.0
        self._clean_at = 0.0

    def stop(self) -> None:
        """Ends :meth:`run` once the attempts under way have been reported; for another thread to call."""
        self._stopping = True
        self._woken.set()

    def run(self) -> None:
        """Works until :meth:`stop`, whatever happens to the database or the receivers.

        What a connection that was made refuses before it has served raises, so that a missing role is seen.
        """
        pause = _FIRST_PAUSE
        with _threads() as threads:
            while not self._stopping:
                rounds = self._rounds
                try:
                    with self._connect() as connection:
                        self._serve(connection, threads)
                except psycopg.Error as error:
                    if not self._rounds and not isinstance(error, psycopg.OperationalError):
                        raise named(error) or error from error
                    self.metrics.errors["database"] += 1
                    if self._rounds > rounds:
                        pause = _FIRST_PAUSE
                    say(logging.WARNING, "webhooks_disconnected", why(error, hint=True), retry_in=pause)
                    self._pause(pause)
                    pause = min(pause * 2, _LONGEST_PAUSE)

    def deliver(self, connection: psycopg.Connection[Any]) -> int:
        """One round: sends what is due now and reports it, failures as well; returns how many attempts.

        :param connection: in autocommit mode, so that nothing is held while it sends.
        """
        with _threads() as threads:
            self._begin(connection, threads)
            count = len(self._flying)
            while self._flying:
                concurrent.futures.wait(self._flying, return_when=concurrent.futures.FIRST_COMPLETED)
                self._settle(connection)
        return count

    # A round ------------------------------------------------------------------------------------------

    def _connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self._dsn, autocommit=True, prepare_threshold=None)

    def _serve(
        self, connection: psycopg.Connection[Any], threads: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        while not self._stopping:
            self._woken.clear()
            self._settle(connection)
            if not self._stopping:
                self._begin(connection, threads)
            self._look_after(connection)
            self._rounds += 1
            self._pause(self._settings.poll)
        concurrent.futures.wait(self._flying, timeout=self._settings.timeout + 1)
        self._settle(connection)

    def _pause(self, seconds: float) -> None:
        if not self._stopping:
            self._woken.wait(seconds)

    def _begin(
        self, connection: psycopg.Connection[Any], threads: concurrent.futures.ThreadPoolExecutor
    ) -> None:
        lease = dt.timedelta(seconds=self._settings.timeout + _MARGIN)
        with connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(
                "select message_id, endpoint_id, attempt, url, secrets, payload"
                " from kakunin.claim_webhooks(%s)",
                [lease],
            ).fetchall()
            if not rows:
                return
            found = cursor.execute("select kakunin.installation_id() as id").fetchone()
        assert found is not None  # noqa: S101
        for row in rows:
            delivery = _Delivery(**row)
            attempt = threads.submit(self._attempt, delivery, found["id"])
            self._flying[attempt] = delivery
            attempt.add_done_callback(lambda _: self._woken.set())

    def _attempt(self, delivery: _Delivery, installation_id: uuid.UUID) -> int:
        secrets = [
            self._keys.decrypt(bytes(secret), installation_id, delivery.endpoint_id)
            for secret in delivery.secrets
        ]
        body = delivery.payload.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": self._agent,
            **signed_headers(body, secrets, delivery.message_id),
        }
        return post(
            delivery.url,
            body,
            headers,
            timeout=self._settings.timeout,
            allowed=self._allowed,
            context=self._context,
        )

    def _settle(self, connection: psycopg.Connection[Any]) -> None:
        """Reports the attempts that have ended. One whose report fails is reported after reconnecting."""
        for attempt in [attempt for attempt in self._flying if attempt.done()]:
            delivery = self._flying[attempt]
            failure, status, reason = attempt.exception(), None, None
            if failure is None:
                status = attempt.result()
            elif isinstance(failure, Unsent):
                status, reason = failure.status, str(failure)
            elif isinstance(failure, BadInputError):  # the secret
                status, reason = None, str(failure)
                self.metrics.errors["webhooks"] += 1
            else:
                reason = type(failure).__name__
                self.metrics.errors["webhooks"] += 1
            row = connection.execute(
                "select kakunin.report_webhook(%s, %s, %s, %s, %s)",
                [delivery.message_id, delivery.endpoint_id, delivery.attempt, status, reason],
            ).fetchone()
            del self._flying[attempt]
            self._tell(delivery, row[0] if row else None, status, reason)

    def _tell(self, delivery: _Delivery, state: str | None, status: int | None, reason: str | None) -> None:
        about = {
            "message_id": delivery.message_id,
            "endpoint_id": delivery.endpoint_id,
            "attempt": delivery.attempt,
            "status": status,
        }
        if reason is None:
            self.metrics.counters["kakunin_webhooks_delivered"] += 1
            say(logging.DEBUG, "webhook_delivered", "delivered a webhook", **about)
            return
        self.metrics.counters["kakunin_webhooks_failed_attempts"] += 1
        dead = state == "dead"
        say(
            logging.ERROR if dead else logging.WARNING,
            "webhook_dead" if dead else "webhook_failed",
            f"a webhook was {'given up' if dead else 'not delivered'}: {reason}",
            **about,
        )

    def _look_after(self, connection: psycopg.Connection[Any]) -> None:
        now = time.monotonic()
        if now >= self._clean_at:
            row = connection.execute("select kakunin.clean_webhooks()").fetchone()
            if not row or row[0] < _MOST_CLEANED:  # otherwise more of them in the next round
                self._clean_at = now + _CLEAN_EVERY
        if now >= self._status_at:
            self._status_at = now + _STATUS_EVERY
            row = connection.execute("select kakunin.webhook_status()").fetchone()
            status = row[0] if row else {}
            for member in ("pending", "dead", "oldest_pending_seconds"):
                self.metrics.gauges[f"kakunin_webhooks_{member}"] = float(status[member])


def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="kakunin webhook")
