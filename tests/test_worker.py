"""The worker against real servers: what it seals and signs, and what it survives."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster, free_port
from conftest import Agent, Database, OneKey, _ca, fresh_database

from kakunin_db import LocalKeys, LocalSigner, SignerUnavailableError, bind_agent_session
from kakunin_db.ledger import open_witness, verify_bundle
from kakunin_db.ledger.export import bundle_lines
from kakunin_db.ledger.worker import JSONFormatter, Metrics, Settings, Worker

QUICK = Settings(interval=0.1, poll=0.2, lease=1.0, witness_every=0.1)


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for something that has to come, for as long as a slow machine may take."""
    for _ in range(600):
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
    from cryptography.hazmat.primitives.serialization import Encoding

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
