"""The worker: seals what was committed, signs tree heads, and shows them to witnesses.

All decisions are the database's: it says what is sealed, computes the root, and verifies a signature before
it stores it. So the worker may be killed at any instruction, and any number of workers may run; the one that
leads does the work, and where two believe that they lead nothing forks.

What it adds is its memory: it signs no tree head that does not continue the last one that it, a witness, or
the database before it, had seen signed. A ledger that was put back to an earlier state, by a restore or by a
failover to a standby that lacked the end of it, is not signed anew. A worker that does not lead keeps its
memory up as well, and who begins to lead, or is connected anew, asks the witnesses again. Where the server
was promoted, or recovered to a point in time, and neither it nor a witness remembers what was signed last,
it signs nothing until the owner has said that this is the ledger (kakunin.continue_ledger()).

Nothing in two copies of one database, both of which were told to go on, tells the one of the other; a witness
that both have does. So before a worker shows it a tree head it looks at what others have shown since. One
that is not of the tree here ends the signing, and not the sealing: that is behind with its signatures then,
which can be made good, and a second history under one name cannot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import logging
import os
import select
import socket
import time
import uuid
from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from cryptography import x509
from psycopg.rows import dict_row

from ..conninfo import lasting
from ..errors import BadInputError, KakuninError, LedgerIntegrityError, SignerError, named
from ..logs import counted, say, why
from .heads import TreeHead
from .merkle import verify_consistency
from .witness import Witness, WitnessError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from ..signers import KeyStore, Signer

_CHANNEL = "kakunin_ledger"
# Seconds.
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0  # between attempts to sign
_LONGEST_RECONNECT = 5.0  # a failover takes no longer for being waited for
_SHORTEST_PAUSE = 0.05
_STATUS_EVERY = 5.0
_PARTITIONS_EVERY = 3600.0
_EXPIRIES_EVERY = 30.0
_MOST_EXPIRIES = 1000
# A witness may have been shown another worker's tree head while ours was under way: within this, beside the
# time between two of ours.
_AT_THE_SAME_TIME = 600.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """What can be set, in seconds and entries.

    ``interval`` is the least time between two rounds: at a steady load an entry is signed within it and the
    time of a signature, and a KMS is asked once in it however many entries there are. ``poll`` is how often a
    worker looks that nobody has woken: decisions wake nobody, so that no halt waits for a notification.
    ``lease`` is how long a leader that has died is waited for. ``batch`` bounds a transaction: 100,000
    entries take the database about a second and 5 MB. ``witness_every`` bounds what a tail cut off may hide,
    against a request to the witness each time. ``ahead`` is how long partitions last when nobody looks.
    """

    interval: float = 1.0
    poll: float = 1.0
    lease: float = 6.0
    batch: int = 100_000
    witness_every: float = 60.0
    ahead: dt.timedelta = dt.timedelta(days=92)


class Metrics:
    """What the worker counts; served by prometheus_client where that is asked for (:meth:`serve`)."""

    def __init__(self) -> None:
        self.gauges: dict[str, float] = dict.fromkeys(_GAUGES, 0.0)
        self.counters: dict[str, float] = dict.fromkeys(_COUNTERS, 0.0)
        self.errors: dict[str, float] = dict.fromkeys(_ERRORS, 0.0)

    def collect(self) -> Any:
        """prometheus_client's interface of a collector."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=self.gauges[name])
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=self.counters[name])
        errors = CounterMetricFamily(
            "kakunin_worker_errors", "Errors, by what they came from", labels=["source"]
        )
        for source, count in self.errors.items():
            errors.add_metric([source], count)
        yield errors

    def serve(self, host: str, port: int) -> CollectorRegistry:
        """Serves them at ``http://host:port/metrics`` from a thread. Raises OSError: the port is taken."""
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415

        registry = CollectorRegistry()
        registry.register(self)
        start_http_server(port, host, registry=registry)
        return registry


_GAUGES = {
    "kakunin_ledger_entries": "Entries in the tree",
    "kakunin_ledger_signed_entries": "Entries that the newest signed tree head covers",
    "kakunin_ledger_lag_entries": "Committed entries without a signature",
    "kakunin_ledger_lag_seconds": "Age of the oldest committed entry without a signature",
    "kakunin_ledger_partitions_until_timestamp_seconds": "Until when partitions are made",
    "kakunin_ledger_key_expires_timestamp_seconds": "When the certificate of the newest ledger key ends",
    "kakunin_worker_leader": "1 where this worker leads",
    "kakunin_worker_connected": "1 while it is connected to the database",
    "kakunin_worker_last_signature_timestamp_seconds": "When it last published a tree head",
    "kakunin_webhooks_pending": "Webhooks that enabled endpoints have still to get",
    "kakunin_webhooks_oldest_pending_seconds": "Age of the oldest of them",
    "kakunin_webhooks_dead": "Webhooks that were given up",
}
_COUNTERS = {
    "kakunin_worker_signatures": "Tree heads signed and published",
    "kakunin_worker_sealed_entries": "Entries taken into the tree",
    "kakunin_worker_rounds": "Times it looked for entries",
    "kakunin_worker_witnessed": "Tree heads kept by a witness",
    "kakunin_worker_revoked_agents": "Agents revoked because their risk became critical",
    "kakunin_worker_expired_certificates": "Certificates whose expiry it put on record",
    "kakunin_webhooks_delivered": "Webhooks delivered by this worker",
    "kakunin_webhooks_failed_attempts": "Attempts of this worker to deliver that failed",
}
_ERRORS = ("database", "signer", "integrity", "witness", "risk", "webhooks")
_GRAVEST = ("integrity", "signer", "witness", "risk")


class _Signed(NamedTuple):
    """What a tree head was signed over."""

    tree_size: int
    root: bytes


@dataclasses.dataclass
class _Shown:
    """The newest tree head that a witness was shown, when the next one is due, and over more than how many
    entries those are that are looked at before.

    ``beyond`` stays one behind ``head``: another worker that looked before that was shown may have shown a
    smaller one since.
    """

    due: float = 0.0
    head: TreeHead | None = None
    beyond: int | None = None


class Worker:
    """Seals and signs until :meth:`stop`.

    :param dsn: of a login with ``kakunin_worker``; may name several hosts.
    :param keys: where the ledger's key is. It is found by its certificate, among ``kakunin.ledger_keys``.
    :param witnesses: where tree heads are kept as well.
    """

    def __init__(
        self,
        dsn: str,
        keys: KeyStore,
        *,
        settings: Settings | None = None,
        witnesses: Sequence[Witness] = (),
        metrics: Metrics | None = None,
    ) -> None:
        # Of several hosts the one that can be written to is found.
        self._dsn = lasting(
            dsn, target_session_attrs="read-write", fallback_application_name="kakunin-db worker"
        )
        self._keys = keys
        self._settings = settings or Settings()
        self._witnesses = list(witnesses)
        self.metrics = metrics or Metrics()
        self._id = uuid.uuid4()
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._stopping = False
        self._served = False
        self._installation: uuid.UUID | None = None  # whose ledger the memory is of
        self._last: _Signed | None = None  # what is signed next has to continue it
        self._published: TreeHead | None = None  # what witnesses are shown
        self._asked = False  # the witnesses, since it leads on this connection
        self._remembers = False  # what was signed before this server was promoted, if it was
        self._witnessed = [_Shown() for _ in self._witnesses]
        self._signers: dict[str, Signer] = {}
        self._told: dict[str, str] = {}
        self._leading = False
        self._until = 0.0
        self._partitions_at = 0.0
        self._expiries_at = 0.0
        self._status_at = 0.0
        self._retry = 0.0
        self._not_before = 0.0

    def stop(self) -> None:
        """Ends :meth:`run` after the step under way; for a signal handler or another thread to call."""
        self._stopping = True
        with contextlib.suppress(OSError):  # full, or closed
            self._waker.send(b"\0")

    # The loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Works until :meth:`stop`, whatever happens to the database or the KMS.

        What a connection that was made refuses before it has served raises, so that a missing role is seen.
        """
        try:
            self._run()
        finally:
            self._woken.close()
            self._waker.close()
        say(logging.INFO, "stopped", "stopped")

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping:
            rounds = self.metrics.counters["kakunin_worker_rounds"]
            try:
                with self._connect() as connection:
                    self.metrics.gauges["kakunin_worker_connected"] = 1
                    say(logging.INFO, "connected", "connected", host=connection.info.host)
                    try:
                        self._serve(connection)
                    finally:
                        self._leading = False
                        self.metrics.gauges["kakunin_worker_leader"] = 0
                        self.metrics.gauges["kakunin_worker_connected"] = 0
            except psycopg.Error as error:
                if not self._served and not isinstance(error, psycopg.OperationalError):
                    raise named(error) or error from error
                self.metrics.errors["database"] += 1
                if self.metrics.counters["kakunin_worker_rounds"] > rounds:
                    pause = _FIRST_PAUSE
                say(logging.WARNING, "disconnected", why(error, hint=True), retry_in=pause)
                self._wait(None, pause)
                pause = min(pause * 2, _LONGEST_RECONNECT)

    def _connect(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self._dsn, autocommit=True, prepare_threshold=None, row_factory=dict_row)

    def _serve(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        connection.execute(f"listen {_CHANNEL}")
        # What a failover loses would make the next tree head a fork; so a role that was set to commit without
        # the standby is not taken at its word here.
        connection.execute(
            "select set_config('synchronous_commit', 'on', false)"
            " where current_setting('synchronous_commit') in ('off', 'local')"
        )
        self._asked = False
        while not self._stopping:
            self._lead(connection)
            self._status(connection)
            begun = time.monotonic()
            rest = min(self._settings.lease / 3, self._settings.poll)
            if not self._leading:
                self._follow(connection)
                self._wait(None, self._settings.lease / 3)
            elif self._busy(connection):
                self._wait(None, self._settings.interval - (time.monotonic() - begun))
            else:
                connection.execute("select kakunin.sleep_ledger()")
                # Whoever committed before it was known that this sleeps has notified nobody.
                if not self._seal(connection):
                    self._wait(connection, rest)
                # Anybody may notify, as often as they like.
                self._wait(None, _SHORTEST_PAUSE - (time.monotonic() - begun))
            self._served = True
        if self._leading:
            connection.execute("select kakunin.lead_ledger(%s, %s, '0')", [self._id, self._name])

    def _busy(self, connection: psycopg.Connection[dict[str, Any]]) -> bool:
        """A round; returns whether there were entries, or something is left to sign."""
        sealed = self.metrics.counters["kakunin_worker_sealed_entries"]
        signed = self._round(connection)
        return not signed or self.metrics.counters["kakunin_worker_sealed_entries"] > sealed

    def _value(self, connection: psycopg.Connection[dict[str, Any]], query: str, *parameters: Any) -> Any:
        row = connection.execute(query.encode(), parameters).fetchone()
        return None if row is None else next(iter(row.values()))

    def _wait(self, connection: psycopg.Connection[Any] | None, seconds: float) -> bool:
        """Waits for a notification, for stop(), or for so long; returns whether there was a notification."""
        if self._stopping or seconds <= 0:
            return False
        sources: list[Any] = [self._woken]
        if connection is not None:
            if list(connection.notifies(timeout=0)):
                return True
            sources.append(connection)
        ready, _, _ = select.select(sources, [], [], seconds)
        if self._woken in ready:
            with contextlib.suppress(BlockingIOError):
                while self._woken.recv(4096):
                    pass
        return connection is not None and connection in ready and bool(list(connection.notifies(timeout=0)))

    def _lead(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        now = time.monotonic()
        if self._leading and now < self._until:
            return
        lease = dt.timedelta(seconds=self._settings.lease)
        before = self._leading
        lead = "select kakunin.lead_ledger(%s, %s, %s, %s)"
        self._leading = bool(self._value(connection, lead, self._id, self._name, lease, self._problem()))
        self._until = now + self._settings.lease / 3
        self.metrics.gauges["kakunin_worker_leader"] = float(self._leading)
        if self._leading != before:
            self._asked = False
            self._witnessed = [_Shown() for _ in self._witnesses]  # others have shown them more since
            say(
                logging.INFO,
                "leader",
                "leads" if self._leading else "another worker leads",
                worker=self._name,
            )

    # A round ------------------------------------------------------------------------------------------

    def _round(self, connection: psycopg.Connection[dict[str, Any]]) -> bool:
        """Seals everything and signs; returns whether nothing is left without a signature."""
        self.metrics.counters["kakunin_worker_rounds"] += 1
        if time.monotonic() >= self._partitions_at:
            self._make_partitions(connection)
        self._settle(connection)
        if time.monotonic() >= self._expiries_at:
            self._expire(connection)
        try:
            while self._seal(connection) == self._settings.batch and not self._stopping:
                self._lead(connection)
            if time.monotonic() < self._not_before:
                return False
            signed = self._sign(connection)
        except (KakuninError, psycopg.Error) as error:
            ours = error if isinstance(error, KakuninError) else named(error)
            if ours is None:
                raise
            if isinstance(ours, LedgerIntegrityError):
                self._failed("integrity", ours)
            else:
                self._failed("witness" if isinstance(ours, WitnessError) else "signer", ours)
            self._retry = min(max(self._retry * 2, self._settings.interval), _LONGEST_PAUSE)
            self._not_before = time.monotonic() + self._retry
            self._signers.clear()
            return False
        self._retry = 0.0
        self._recovered("signer")
        self._recovered("integrity")
        self._witness(connection)
        return signed

    def _seal(self, connection: psycopg.Connection[dict[str, Any]]) -> int:
        sealed = self._value(connection, "select kakunin.seal_ledger(%s)", self._settings.batch)
        count = int(sealed["sealed"])
        self.metrics.counters["kakunin_worker_sealed_entries"] += count
        if count:
            say(logging.DEBUG, "sealed", "sealed", entries=count, tree_size=sealed["tree_size"])
        return count

    def _sign(self, connection: psycopg.Connection[dict[str, Any]]) -> bool:
        """Signs and publishes a tree head, if one is due. Raises KakuninError."""
        if not self._asked:
            self._learn(connection)
            for witness, shown in zip(self._witnesses, self._witnessed, strict=True):
                self._compare(connection, witness, shown)
            self._check_timeline(connection)
            self._asked = True
        due = connection.execute(
            'select tree_size, "timestamp", root, kakunin.installation_id() as installation_id'
            " from kakunin.tree_head_to_sign()"
        ).fetchone()
        if due is None:
            stored = self._learn(connection)
            if self._last is not None and (stored is None or stored.tree_size < self._last.tree_size):
                raise _behind(self._last, stored.tree_size if stored else 0)
            return True
        if due["installation_id"] != self._installation:
            self._asked = False  # it was renewed; the next round begins anew
            return False
        key_id, installation, signer = self._signer(connection)
        size, timestamp, root = due["tree_size"], due["timestamp"], due["root"]
        self._check_continues(connection, size, root)
        signature = signer.sign(sha256(TreeHead.bytes_to_sign(size, timestamp, root)).digest())
        # From here on it may have been seen, also where the connection is lost before the answer comes.
        self._last = _Signed(size, root)
        connection.execute(
            "select kakunin.publish_tree_head(%s, %s, %s, %s)", [size, timestamp, key_id, signature]
        )
        self._published = head = TreeHead(installation, size, timestamp, root, key_id, signature)
        self.metrics.counters["kakunin_worker_signatures"] += 1
        self.metrics.gauges["kakunin_worker_last_signature_timestamp_seconds"] = time.time()
        say(
            logging.INFO,
            "signed",
            "signed a tree head",
            tree_size=head.tree_size,
            root=head.root.hex(),
            key_id=key_id,
        )
        return True

    # The memory ---------------------------------------------------------------------------------------

    def _learn(self, connection: psycopg.Connection[dict[str, Any]]) -> TreeHead | None:
        """Remembers the newest tree head in the database, and returns it. Raises LedgerIntegrityError where
        that does not continue what is remembered; one that is older says nothing yet."""
        installation = self._value(connection, "select kakunin.installation_id()")
        if installation != self._installation:
            # kakunin.renew_installation() begins another ledger, and its key is another.
            self._installation, self._last, self._published, self._asked = installation, None, None, False
            self._remembers = False
            self._witnessed = [_Shown() for _ in self._witnesses]
        row = connection.execute(
            'select installation_id, tree_size, "timestamp", root, key_id, signature from kakunin.tree_heads'
            " order by tree_size desc limit 1"
        ).fetchone()
        stored = None if row is None else TreeHead(*row.values())
        if stored is None or (self._last is not None and stored.tree_size < self._last.tree_size):
            return stored
        self._check_continues(connection, stored.tree_size, stored.root)
        self._last, self._published = _Signed(stored.tree_size, stored.root), stored
        return stored

    def _compare(
        self, connection: psycopg.Connection[dict[str, Any]], witness: Witness, shown: _Shown
    ) -> None:
        """Compares what a witness has with the tree, and remembers the newest that it has. Without its answer
        nothing is signed. Raises LedgerIntegrityError where a tree head of its is of another tree."""
        assert self._installation is not None  # noqa: S101  (_learn() comes first)
        ours = self._published
        if shown.beyond is None:
            shown.beyond = -1 if ours is None else self._some_time_before(connection, ours)
        heads = list(witness.heads(self._installation, shown.beyond))
        stored = connection.execute(
            "select tree_size, root from kakunin.tree_heads where tree_size = any(%s)",
            [[head.tree_size for head in heads]],
        ).fetchall()
        known = {(row["tree_size"], row["root"]) for row in stored}
        for head in heads:
            seen = _Signed(head.tree_size, head.root)
            if seen in known:
                continue
            # What is not among the tree heads may be of the tree: a standby got the entries, and not it.
            if ours is not None and seen.tree_size <= ours.tree_size:
                try:
                    self._check_consistent(connection, seen, ours.tree_size, ours.root)
                except LedgerIntegrityError as error:
                    raise _forked(head) from error
            elif self._last is None or seen.tree_size > self._last.tree_size:
                self._last = seen
            elif seen.tree_size == self._last.tree_size and seen != self._last:
                raise _forked(head)

    def _some_time_before(self, connection: psycopg.Connection[dict[str, Any]], head: TreeHead) -> int:
        """How many entries had been signed when another worker's tree head cannot have been under way."""
        before = head.timestamp - int(1000 * (_AT_THE_SAME_TIME + 2 * self._settings.witness_every))
        query = (
            'select tree_size from kakunin.tree_heads where "timestamp" < %s'
            ' order by "timestamp" desc limit 1'
        )
        size = self._value(connection, query, before)
        return -1 if size is None else int(size)

    def _check_timeline(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        """Raises LedgerIntegrityError where nobody could tell that the end of the ledger was lost."""
        assert self._installation is not None  # noqa: S101  (_learn() comes first)
        if self._remembers:
            return
        home = self._value(connection, "select kakunin.ledger_home()")
        # A witness that has none of this ledger (a new bucket, a path mistyped) knows of none that is gone.
        if home["promoted"] and not any(
            True for witness in self._witnesses for _ in witness.heads(self._installation)
        ):
            raise LedgerIntegrityError(
                f"since the last tree head was signed on timeline {home['home']['timeline']} this server was"
                f" promoted or recovered to a point in time (timeline {home['here']['timeline']}), and"
                " neither this worker nor a witness remembers how far the ledger had come",
                "kakunin-db recover shows what is here, and goes on with it. A worker that has a --witness"
                " finds out by itself.",
            )
        self._remembers = True

    def _follow(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        """Keeps the memory of a worker that does not lead up with the one that does."""
        try:
            self._learn(connection)
            if not self._witnesses:  # who are asked when it begins to lead
                self._check_timeline(connection)
        except (LedgerIntegrityError, psycopg.Error) as error:
            ours = error if isinstance(error, LedgerIntegrityError) else named(error)
            if not isinstance(ours, LedgerIntegrityError):
                raise
            self._failed("integrity", ours)

    def _check_continues(
        self, connection: psycopg.Connection[dict[str, Any]], size: int, root: bytes
    ) -> None:
        last = self._last
        if last is None:
            return
        if size < last.tree_size or (size == last.tree_size and root != last.root):
            raise _behind(last, size)
        self._check_consistent(connection, last, size, root)

    def _check_consistent(
        self, connection: psycopg.Connection[dict[str, Any]], last: _Signed, size: int, root: bytes
    ) -> None:
        if (size, root) == last:
            return
        try:
            proof = self._value(connection, "select kakunin.consistency_proof(%s, %s)", last.tree_size, size)
        except psycopg.Error as error:
            if isinstance(named(error), BadInputError):  # no batch ended at the size that was signed
                raise _behind(last, size) from error
            raise
        path = [bytes.fromhex(node) for node in proof["path"]]
        verify_consistency(last.tree_size, size, last.root, root, path)

    def _signer(self, connection: psycopg.Connection[dict[str, Any]]) -> tuple[str, uuid.UUID, Signer]:
        rows = connection.execute(
            "select key_id, der, installation_id from kakunin.ledger_keys"
            " where revoked_at is null and now() between not_before and not_after"
            "   and installation_id = kakunin.installation_id()"
            " order by not_before desc"
        ).fetchall()
        if not rows:
            raise SignerError(
                "no key is registered for this installation's ledger", "kakunin-db audit init makes one."
            )
        missing: SignerError | None = None
        for row in rows:
            signer = self._signers.get(row["key_id"])
            if signer is None:
                public_key: Any = x509.load_der_x509_certificate(row["der"]).public_key()
                try:
                    signer = self._keys.open(public_key)
                except SignerError as error:
                    missing = missing or error
                    continue
                self._signers[row["key_id"]] = signer
            return row["key_id"], row["installation_id"], signer
        assert missing is not None  # noqa: S101  (rows is not empty, so one was refused)
        raise missing

    def _witness(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        """Shows the newest tree head to the witnesses whose time has come. One that is down stops nothing;
        one that has another tree's stops the signing, and is asked again before it goes on."""
        head = self._published
        if head is None or head.installation != self._installation:
            return
        now = time.monotonic()
        for witness, shown in zip(self._witnesses, self._witnessed, strict=True):
            if now < shown.due or (shown.head is not None and shown.head.tree_size >= head.tree_size):
                continue
            shown.due = now + self._settings.witness_every
            try:
                self._compare(connection, witness, shown)
                assert self._last is not None  # noqa: S101  (head was signed)
                if self._last.tree_size > head.tree_size:
                    raise _behind(self._last, head.tree_size)
                witness.publish(head)
            except LedgerIntegrityError as error:
                self._asked = False
                self._failed("integrity", error)
                return
            except KakuninError as error:
                self._failed("witness", error)
                continue
            self._recovered("witness")
            self.metrics.counters["kakunin_worker_witnessed"] += 1
            if shown.head is not None:
                shown.beyond = shown.head.tree_size
            shown.head = head

    def _settle(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        """Revokes the certificates of agents that their own score has stopped."""
        try:
            count = self._value(connection, "select kakunin.settle_risk()")
        except psycopg.Error as error:
            if connection.broken:
                raise
            self._failed("risk", error)
            return
        self._recovered("risk")
        if count:
            self.metrics.counters["kakunin_worker_revoked_agents"] += count
            say(logging.WARNING, "revoked", "revoked agents whose risk became critical", agents=count)

    def _make_partitions(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._partitions_at = time.monotonic() + _PARTITIONS_EVERY
        try:
            made = self._value(connection, "select kakunin.make_partitions(%s)", self._settings.ahead)
        except psycopg.errors.LockNotAvailable as error:
            self._failed("database", error)
            self._partitions_at = time.monotonic() + 60
            return
        if made:
            say(logging.INFO, "partitions", "made partitions", names=made)

    def _expire(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        self._expiries_at = time.monotonic() + _EXPIRIES_EVERY
        try:
            count = self._value(connection, "select kakunin.expire_certificates(%s)", _MOST_EXPIRIES)
        except psycopg.Error as error:
            if connection.closed:
                raise
            self._failed("database", error)  # sealing goes on
            return
        self.metrics.counters["kakunin_worker_expired_certificates"] += count
        if count == _MOST_EXPIRIES:
            self._expiries_at = 0.0  # more of them in the next round

    def _status(self, connection: psycopg.Connection[dict[str, Any]]) -> None:
        if time.monotonic() < self._status_at:
            return
        self._status_at = time.monotonic() + _STATUS_EVERY
        status = self._value(connection, "select kakunin.ledger_status()")
        for gauge, member in (
            ("entries", "tree_size"),
            ("signed_entries", "signed_size"),
            ("lag_entries", "lag_entries"),
            ("lag_seconds", "lag_seconds"),
        ):
            self.metrics.gauges[f"kakunin_ledger_{gauge}"] = float(status[member])
        for gauge, member in (("partitions_until", "partitions_until"), ("key_expires", "key_expires_at")):
            moment = status[member]
            self.metrics.gauges[f"kakunin_ledger_{gauge}_timestamp_seconds"] = (
                dt.datetime.fromisoformat(moment).timestamp() if moment else 0.0
            )

    # What is told -------------------------------------------------------------------------------------

    def _problem(self) -> str | None:
        """The gravest of what fails at the moment, for whoever asks the database how its worker is."""
        return next((f"{source}: {self._told[source]}" for source in _GRAVEST if source in self._told), None)

    def _failed(self, source: str, error: Exception) -> None:
        """Counts it, and says it once for as long as it stays the same."""
        self.metrics.errors[source] += 1
        reason = why(error, hint=True)
        if self._told.get(source) != reason:
            self._told[source] = reason
            level = logging.CRITICAL if source == "integrity" else logging.ERROR
            say(level, f"{source}_failed", reason)

    def _recovered(self, source: str) -> None:
        if self._told.pop(source, None) is not None:
            say(logging.INFO, f"{source}_recovered", "works again")


def _forked(head: TreeHead) -> LedgerIntegrityError:
    return LedgerIntegrityError(
        f"a witness has a tree head over {counted(head.tree_size)}, by the key {head.key_id}, that is not of"
        " the ledger here: two databases are signed under one name, or this one was put back",
        "Nothing is signed until that is explained. kakunin-db recover --witness shows it, here and there,"
        " and makes of a copy a ledger of its own; docs/recovery.md says when.",
    )


def _behind(last: _Signed, size: int) -> LedgerIntegrityError:
    return LedgerIntegrityError(
        f"the ledger has been put back: a tree head over {counted(last.tree_size)} was signed, and now there"
        f" are {size}, or other ones",
        "Nothing is signed until that is explained. kakunin-db recover --witness shows what is missing, and"
        " makes what is left a ledger of its own; docs/recovery.md says when.",
    )
