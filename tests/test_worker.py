"""The worker against real servers: what it seals and signs, and what it survives."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster, free_port
from conftest import Agent, Database, OneKey, _ca, fresh_database
from cryptography.hazmat.primitives.serialization import Encoding
from kms import PASS, Wire, error, good, serve_kms

from kakunin_db import KMSKeys, LocalKeys, LocalSigner, SignerUnavailableError, bind_agent_session
from kakunin_db.cli import main
from kakunin_db.ledger import TreeHead, Witness, WitnessUnavailableError, open_witness, verify_bundle
from kakunin_db.ledger import worker as module
from kakunin_db.ledger.export import bundle_lines
from kakunin_db.ledger.worker import Metrics, Settings, Worker
from kakunin_db.logs import JSONFormatter

QUICK = Settings(interval=0.1, poll=0.2, lease=1.0, witness_every=0.1)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for something that has to come, for as long as a slow machine may take."""
    for _ in range(1800):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come")


@contextlib.contextmanager
def running(worker: Worker) -> Iterator[Worker]:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(30)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def status(database: Database) -> dict[str, Any]:
    return database.value("worker", "select kakunin.ledger_status()")


def signed(database: Database) -> Callable[[], bool]:
    return lambda: status(database)["lag_entries"] == 0


def append(database: Database, agent: Agent, count: int = 1) -> None:
    with (
        database.connect("agent_1", autocommit=True) as session,
        bind_agent_session(session, agent.credential),
    ):
        session.execute(
            "select count(kakunin.audit_log_append('api_call')) from generate_series(1, %s)", [count]
        )


def verify(database: Database, **options: Any) -> None:
    with database.connect("auditor", autocommit=True) as auditor:
        report = verify_bundle(bundle_lines(auditor), [_ca().certificate], **options)
    assert report.ok, report.findings


@pytest.fixture
def ledger(cluster: Cluster) -> Iterator[tuple[Database, OneKey, Agent]]:
    with fresh_database(cluster) as database:
        yield database, OneKey(database.ledger_key()), database.agent()


def test_g6_entries_are_sealed_and_signed(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, agent = ledger
    with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
        until(signed(database), "the signature of what was decided")
        before = keys.signatures
        append(database, agent, 5000)
        until(signed(database), "the signature")
        assert keys.signatures - before <= 2
        assert worker.metrics.counters["kakunin_worker_sealed_entries"] == status(database)["tree_size"]
    verify(database)


def test_an_entry_of_an_agent_wakes_it(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, agent = ledger
    slow = Settings(interval=0.1, poll=300, lease=300)
    with running(Worker(database.dsn("worker"), keys, settings=slow)):
        until(lambda: database.value("postgres", "select asleep from kakunin_private.sleeper"), "sleep")
        append(database, agent)
        until(signed(database), "the signature")


def test_strangers_notifications_do_not_make_it_spin(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, _ = ledger
    with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
        until(signed(database), "the signature of what was decided")
        rounds = worker.metrics.counters["kakunin_worker_rounds"]
        began = time.monotonic()
        with database.connect("agent_1", autocommit=True) as agent:
            for _ in range(2000):
                agent.execute("notify kakunin_ledger")
        taken = time.monotonic() - began
        assert worker.metrics.counters["kakunin_worker_rounds"] - rounds <= 2 + 25 * taken


def test_g9_entries_are_accepted_while_the_kms_is_out_and_signed_afterwards(
    ledger: tuple[Database, OneKey, Agent], caplog: pytest.LogCaptureFixture
) -> None:
    database, keys, agent = ledger
    keys.error = SignerUnavailableError("the KMS does not answer")
    logger = logging.getLogger("kakunin_db.worker")
    logger.propagate = True
    with (
        caplog.at_level(logging.INFO, "kakunin_db.worker"),
        running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker,
    ):
        until(lambda: worker.metrics.errors["signer"] >= 2, "a second attempt")
        append(database, agent, 100)
        until(lambda: status(database)["tree_size"] >= 100, "sealing")
        assert status(database)["lag_entries"] >= 100
        assert status(database)["lag_seconds"] > 0
        keys.error = None
        until(signed(database), "the signature")
    told = [record.message for record in caplog.records if "does not answer" in record.message]
    assert len(told) == 1
    verify(database)


def test_two_workers_never_fork_and_one_takes_over(
    ledger: tuple[Database, OneKey, Agent], tmp_path: Path
) -> None:
    database, keys, agent = ledger
    witness = open_witness(f"file:{tmp_path}/heads.jsonl")
    options: dict[str, Any] = {"settings": QUICK, "witnesses": [witness]}
    second = Worker(database.dsn("worker"), keys, **options)
    with running(second):
        with running(Worker(database.dsn("worker"), keys, **options)):
            for _ in range(10):
                append(database, agent, 10)
            until(signed(database), "the signature")
        append(database, agent)
        until(signed(database), "the signature of the one that is left")
        until(lambda: second.metrics.gauges["kakunin_worker_leader"], "its lead")
    assert status(database)["leader"] is None  # given up
    verify(database, witnesses=list(witness.heads(database.installation_id)))


def test_g9_a_lost_connection_is_made_again(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, agent = ledger
    with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
        until(signed(database), "the signature")
        database.run(
            "postgres",
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'kakunin-db worker' and datname = current_database()",
        )
        append(database, agent)
        until(signed(database), "the signature")
        assert worker.metrics.errors["database"] >= 1


def test_a_ledger_that_was_put_back_is_not_signed(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, agent = ledger
    with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
        until(signed(database), "the signature")
        first = status(database)["tree_size"]
        append(database, agent, 3)
        until(lambda: status(database)["signed_size"] >= first + 3, "the signature")
        with database.connect("postgres") as admin:
            for table in ("tree_heads", "batches", "ledger"):
                admin.execute(f"alter table kakunin_private.{table} disable trigger all")
            admin.execute("delete from kakunin_private.tree_heads where tree_size > %s", [first])
            admin.execute("delete from kakunin_private.batches where tree_size > %s", [first])
            admin.execute("update kakunin_private.tree set tree_size = %s", [first])
        until(lambda: worker.metrics.errors["integrity"], "the refusal")
    assert status(database)["signed_size"] == first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("select kakunin.revoke_ledger_key(key_id) from kakunin.ledger_keys", "no key is registered"),
        (None, "is not that of the ledger's key"),
    ],
    ids=["revoked", "another key"],
)
def test_g8_without_its_key_nothing_is_signed(
    ledger: tuple[Database, OneKey, Agent], spoil: str | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    database, keys, _ = ledger
    if spoil is None:
        keys.key.signer = LocalSigner.generate()
    else:
        database.run("operator", spoil)
    logging.getLogger("kakunin_db.worker").propagate = True
    with (
        caplog.at_level(logging.INFO),
        running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker,
    ):
        until(lambda: worker.metrics.errors["signer"], "the refusal")
    assert any(message in record.message for record in caplog.records)
    assert status(database)["signed_size"] == 0


def test_a_login_without_the_role_is_told(database: Database) -> None:
    keys: Any = None
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        Worker(database.dsn("stranger"), keys).run()


def test_logs_are_json_and_metrics_are_served() -> None:
    pytest.importorskip("prometheus_client")
    record = logging.makeLogRecord(
        {"msg": "signed", "levelname": "INFO", "event": "signed", "fields": {"tree_size": 7}}
    )
    assert json.loads(JSONFormatter().format(record)).items() >= {
        "level": "info", "event": "signed", "message": "signed", "tree_size": 7
    }.items()  # fmt: skip
    metrics = Metrics()
    metrics.errors["signer"] = 3
    metrics.gauges["kakunin_ledger_lag_seconds"] = 1.5
    with serving(metrics) as port, urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    assert 'kakunin_worker_errors_total{source="signer"} 3.0' in text
    assert "kakunin_ledger_lag_seconds 1.5" in text


@contextlib.contextmanager
def serving(metrics: Metrics) -> Iterator[int]:
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(metrics)
    port = free_port()
    server, thread = start_http_server(port, "127.0.0.1", registry=registry)
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# What goes away and comes back -------------------------------------------------------------------------


class Line:
    """A port that leads to another; cut, it drops whom it had and hangs up; silent, it takes them and never
    answers."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._state = "whole"
        self.port = int(self._listener.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._state == "cut":
                    client.close()
                    continue
                self._open.append(client)
                if self._state == "silent":
                    continue
                server = socket.create_connection(("127.0.0.1", self._port))
                self._open.append(server)
            for ends in ((client, server), (server, client)):
                self._threads.append(threading.Thread(target=self._forward, args=ends))
                self._threads[-1].start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def turn(self, state: str) -> None:
        with self._lock:
            self._state = state
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        self.turn("cut")
        for thread in self._threads:
            thread.join()
        for end in self._open:
            end.close()


@contextlib.contextmanager
def line_to(port: int) -> Iterator[Line]:
    line = Line(port)
    try:
        yield line
    finally:
        line.close()


def test_g9_a_server_that_turns_read_only(cluster: Cluster) -> None:
    """As a primary does that is about to hand over: what was a session for writing is none any more."""
    with fresh_database(cluster) as database:
        agent, keys = database.agent(), OneKey(database.ledger_key())
        with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
            until(signed(database), "the signature")
            with database.connect("postgres", autocommit=True) as admin:
                admin.execute("alter system set default_transaction_read_only = on")
                admin.execute("select pg_reload_conf()")
                try:
                    until(lambda: worker.metrics.errors["database"] >= 2, "what the server refuses")
                finally:
                    admin.execute("set default_transaction_read_only = off")
                    admin.execute("alter system reset default_transaction_read_only")
                    admin.execute("select pg_reload_conf()")
            until(lambda: worker.metrics.gauges["kakunin_worker_connected"], "the connection")
            append(database, agent)
            until(signed(database), "the signature")


def test_g9_a_line_that_breaks(ledger: tuple[Database, OneKey, Agent]) -> None:
    database, keys, agent = ledger
    with line_to(database.cluster.port) as line:
        dsn = f"host=127.0.0.1 port={line.port} dbname={database.name} user=worker"
        with running(Worker(dsn, keys, settings=QUICK)) as worker:
            for _ in range(3):
                append(database, agent)
                until(signed(database), "the signature")
                failures = worker.metrics.errors["database"]
                line.turn("cut")
                append(database, agent)
                until(lambda failures=failures: worker.metrics.errors["database"] > failures, "the break")
                assert status(database)["lag_entries"] > 0
                line.turn("whole")
            until(signed(database), "the signature")
    verify(database)


class Gone:
    """A witness that does not answer, until it does."""

    def __init__(self, witness: Witness) -> None:
        self.witness: Witness | None = None
        self._witness = witness

    def back(self) -> None:
        self.witness = self._witness

    def _answering(self) -> Witness:
        if self.witness is None:
            raise WitnessUnavailableError("the witness did not answer")
        return self.witness

    def publish(self, head: TreeHead) -> None:
        self._answering().publish(head)

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        return self._answering().heads(installation, beyond)


def test_g9_a_witness_that_is_away_when_it_starts(cluster: Cluster, tmp_path: Path) -> None:
    """Without its memory nothing is signed: it could be that the ledger was put back. Entries are sealed."""
    with fresh_database(cluster) as database:
        agent, keys = database.agent(), OneKey(database.ledger_key())
        witness = Gone(open_witness(f"file:{tmp_path}/heads.jsonl"))
        worker = Worker(database.dsn("worker"), keys, settings=QUICK, witnesses=[witness])
        with running(worker):
            append(database, agent, 5)
            until(lambda: worker.metrics.errors["witness"] >= 2, "what the witness does not answer")
            assert (keys.signatures, worker.metrics.errors["signer"]) == (0, 0)
            assert status(database)["tree_size"] >= 5
            witness.back()
            until(signed(database), "the signature")
            until(lambda: worker.metrics.counters["kakunin_worker_witnessed"], "the witness")


@pytest.mark.parametrize("answer", [b"", b"x" * 256, b"x" * 100_000, None, "text"], ids=lambda a: repr(a)[:8])
def test_g8_a_signer_that_returns_anything(cluster: Cluster, answer: object) -> None:
    with fresh_database(cluster) as database:
        keys = OneKey(database.ledger_key())
        sign = keys.sign
        keys.sign = lambda _: answer  # type: ignore[method-assign,assignment,return-value]
        with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
            until(lambda: worker.metrics.errors["signer"] >= 2, "the refusal")
            assert status(database)["signed_size"] == 0
            keys.sign = sign  # type: ignore[method-assign]
            until(signed(database), "the signature")
        verify(database)


# A KMS, over the wire ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    pytest.importorskip("moto.server")
    with serve_kms() as wire:
        yield wire


def key_in_kms(database: Database, wire: Wire) -> None:
    """Certified and registered, as `audit init` does it."""
    certificate = _ca().issue_ledger_key(
        database.installation_id, wire.keys(prefix="ledger").create("ledger").public_key()
    )
    der = certificate.public_bytes(Encoding.DER)
    database.run("operator", "select kakunin.register_ledger_key(%s)", [der])


def healthy(database: Database) -> bool:
    return main(["health", "--dsn", database.dsn("worker"), "--max-lag", "1"]) == 0


@pytest.mark.parametrize(
    "outage", ["cut", "silent", "AccessDeniedException", "ThrottlingException", "KMSInternalException"]
)
def test_g9_kms_is_out(cluster: Cluster, wire: Wire, outage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 and KMS as they are: entries are accepted and sealed, the lag is seen, and then all is signed."""
    monkeypatch.setattr(module, "_STATUS_EVERY", 0.1)
    wire.faults.clear()
    with fresh_database(cluster) as database, line_to(wire.server.server_address[1]) as line:
        key_in_kms(database, wire)
        agent = database.agent()
        keys = KMSKeys(prefix="ledger", endpoint_url=f"http://127.0.0.1:{line.port}", timeout=0.3, attempts=2)
        with running(Worker(database.dsn("worker"), keys, settings=QUICK)) as worker:
            until(signed(database), "the signature")
            until(lambda: healthy(database), "its health")
            if outage in ("cut", "silent"):
                line.turn(outage)
            else:
                for operation in ("Sign", "GetPublicKey"):
                    wire.fault(operation, error(outage, 500 if outage.startswith("KMS") else 400))
            for _ in range(2):
                before, failures = status(database)["tree_size"], worker.metrics.errors["signer"]
                append(database, agent, 100)
                until(
                    lambda failures=failures: worker.metrics.errors["signer"] > failures, "an attempt to sign"
                )
                until(lambda before=before: status(database)["tree_size"] >= before + 100, "sealing")
            assert status(database)["lag_entries"] >= 200
            until(lambda: worker.metrics.gauges["kakunin_ledger_lag_entries"] >= 200, "the lag in metrics")
            until(lambda: worker.metrics.gauges["kakunin_ledger_lag_seconds"] > 1, "the lag in metrics")
            assert not healthy(database)
            line.turn("whole")
            wire.faults.clear()
            until(signed(database), "the signature")
            until(lambda: healthy(database), "its health")
            until(lambda: not worker.metrics.gauges["kakunin_ledger_lag_entries"], "the metrics")
        verify(database)


def test_g8_a_signature_that_comes_after_another_worker_has_taken_over(
    cluster: Cluster, wire: Wire, tmp_path: Path
) -> None:
    """KMS answers one worker when its lease is long over, and the other has sealed and signed more."""
    wire.faults.clear()
    witness = open_witness(f"file:{tmp_path}/heads.jsonl")
    answered, over = threading.Event(), threading.Event()

    def late(_: dict[str, Any]) -> tuple[int, bytes]:
        answered.set()
        over.wait(60)
        return PASS

    with fresh_database(cluster) as database:
        key_in_kms(database, wire)
        agent = database.agent()

        def worker() -> Worker:
            keys = KMSKeys(prefix="ledger", endpoint_url=wire.url, timeout=60, attempts=1)
            return Worker(database.dsn("worker"), keys, settings=QUICK, witnesses=[witness])

        with running(worker()) as slow:
            until(signed(database), "the signature")
            wire.fault("Sign", late, good)
            append(database, agent, 10)
            assert answered.wait(30)
            with running(worker()) as other:
                until(lambda: other.metrics.gauges["kakunin_worker_leader"], "the other's lead")
                append(database, agent, 10)
                until(signed(database), "the other's signature")
                size = status(database)["signed_size"]
                over.set()
                until(lambda: slow.metrics.errors["signer"], "the refusal of what came late")
                assert status(database)["signed_size"] == size
                until(lambda: not slow.metrics.gauges["kakunin_worker_leader"], "one leader")
                append(database, agent, 10)
                until(signed(database), "the signature")
                assert not slow.metrics.errors["integrity"]
                assert not other.metrics.errors["integrity"]
        verify(database, witnesses=list(witness.heads(database.installation_id)))


# As a process -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def process(database: Database, keys: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "password"}
    command = [
        sys.executable, "-m", "kakunin_db.cli", "worker", "--dsn", database.dsn("worker"), "--keys",
        f"file:{keys}", "--interval", "0.1", "--poll", "0.1", "--lease", "1", *more,
    ]  # fmt: skip
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as started:
        try:
            yield started
        finally:
            started.kill()


def stored_key(database: Database, folder: Path) -> Path:
    """A key in a folder, certified and registered, as `audit init` does it."""
    signer = LocalKeys(folder, b"password").create("ledger")
    certificate = _ca().issue_ledger_key(database.installation_id, signer.public_key())
    database.run(
        "operator", "select kakunin.register_ledger_key(%s)", [certificate.public_bytes(Encoding.DER)]
    )
    return folder


def test_sigterm_ends_it_cleanly(cluster: Cluster, tmp_path: Path) -> None:
    with fresh_database(cluster) as database:
        keys = stored_key(database, tmp_path / "keys")
        with process(database, keys) as worker:
            until(signed(database), "the signature")
            worker.send_signal(signal.SIGTERM)
            _, logged = worker.communicate(timeout=30)
        assert worker.returncode == 0
        assert status(database)["leader"] is None
        events = [json.loads(line)["event"] for line in logged.splitlines()]
        assert events[0] == "connected"
        assert events[-1] == "stopped"
        assert b"password" not in logged
