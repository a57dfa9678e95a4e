"""G9: the worker and the server killed at any moment, while agents append.

Nothing acknowledged is lost, nothing is sealed twice, and no tree head forks from one before it. A few rounds
in the suite, hundreds in `make soak`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, OneKey, _ca, fresh_database
from test_worker import QUICK, process, running, signed, status, stored_key, until, verify

from kakunin_db import bind_agent_session
from kakunin_db.ledger import open_witness
from kakunin_db.ledger.worker import Worker
from kakunin_db.resources import install_sql

ROUNDS = int(os.environ.get("KAKUNIN_CRASH_ROUNDS", "2"))
CRASHES = random.Random(os.environ.get("KAKUNIN_CRASH_SEED", "1"))


@contextlib.contextmanager
def durable(cluster: Cluster) -> Iterator[Database]:
    """A server of its own that keeps what it acknowledges, and the kit in it."""
    own = Cluster(cluster.major, cluster.bin, settings={"fsync": "on"})
    own.init()
    own.start()
    try:
        with own.connect(autocommit=True) as admin:
            admin.execute("create role installer login superuser")
        database = Database(own, "postgres")
        database.run("installer", install_sql())
        with database.connect("installer") as installer:
            _ca().trust(installer)
        for login in ("registrar", "operator", "worker", "auditor"):
            database.run("installer", f"create role {login} login in role kakunin_{login}")
        for login in ("agent_1", "agent_2"):
            database.run("installer", f"create role {login} login in role kakunin_agent")
        yield database
    finally:
        own.destroy()


class Writer:
    """Appends as an agent, rolls some of it back, and remembers what was acknowledged."""

    def __init__(self, dsn: str, agent: Agent) -> None:
        # By hash: ids that were rolled back, a server that crashed gives out again.
        self.acknowledged: list[str] = []
        self.rolled_back: list[str] = []
        self._done = threading.Event()
        self._dsn, self._agent = dsn, agent
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        query = "select kakunin.audit_log_append('api_call') ->> 'hash' from generate_series(1, 3)"
        turns = itertools.count(1)
        while not self._done.is_set():
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._dsn) as session:
                while not self._done.is_set():
                    with bind_agent_session(session, self._agent.credential):
                        hashes = [row[0] for row in session.execute(query).fetchall()]
                        # Of what the server died over nothing is known.
                        if next(turns) % 4 == 0:
                            session.rollback()
                            self.rolled_back += hashes
                        else:
                            session.commit()
                            self.acknowledged += hashes
            self._done.wait(0.05)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


@contextlib.contextmanager
def writing(*writers: Writer) -> Iterator[None]:
    try:
        yield
    finally:
        for writer in writers:
            writer.stop()


def answered(ask: Callable[[], Any]) -> Any:
    """None where the server is not there."""
    try:
        return ask()
    except psycopg.OperationalError:
        return None


def check(database: Database, writers: list[Writer], witness: Path) -> None:
    """Every acknowledged entry is in the tree once, nothing that was rolled back is, no head was forked."""
    rows = database.run(
        "auditor", "select encode(leaf_hash, 'hex'), event_id from kakunin.ledger_leaves(0, 10000000)"
    )
    leaves = {row[0] for row in rows}
    assert len(rows) == len(leaves) == len({row[1] for row in rows})
    for writer in writers:
        assert writer.acknowledged
        assert set(writer.acknowledged) <= leaves
        assert not set(writer.rolled_back) & leaves
    heads = list(open_witness(f"file:{witness}").heads(database.installation_id))
    assert heads
    verify(database, witnesses=heads)
    acknowledged = sum(len(writer.acknowledged) for writer in writers)
    signatures = database.value("auditor", "select count(*) from kakunin.tree_heads")
    print(f"{acknowledged} entries acknowledged, {len(rows)} in the tree, {signatures} tree heads")


def test_g9_workers_that_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    """Two processes; each round one of them, or both, end by SIGKILL somewhere in a round of theirs."""
    witness = tmp_path / "heads.jsonl"
    with fresh_database(cluster) as database, contextlib.ExitStack() as stack:
        keys = stored_key(database, tmp_path / "keys")
        writer = Writer(database.dsn("agent_1"), database.agent())

        def start() -> Any:
            options = ("--witness", f"file:{witness}", "--witness-every", "1")
            return stack.enter_context(process(database, keys, *options))

        workers = [start(), start()]
        with writing(writer):
            for _ in range(ROUNDS):
                size = status(database)["signed_size"]
                until(lambda size=size: status(database)["signed_size"] > size, "a signature")
                time.sleep(CRASHES.random() / 5)
                for at in CRASHES.choice([(0,), (1,), (0, 1)]):
                    workers[at].send_signal(signal.SIGKILL)
                    workers[at].communicate()
                    workers[at] = start()
        until(signed(database), "the signature of everything")
        check(database, [writer], witness)


def kill_a_process(database: Database) -> None:
    """SIGKILL to any of the server's processes but the postmaster, which then restarts all of them."""
    kinds = "('client backend', 'checkpointer', 'background writer', 'walwriter')"
    query = f"select pid from pg_stat_activity where backend_type in {kinds} and pid <> pg_backend_pid()"
    pids = until(lambda: answered(lambda: database.run("installer", query)), "the server")
    with contextlib.suppress(ProcessLookupError):
        os.kill(CRASHES.choice(pids)[0], signal.SIGKILL)


@pytest.mark.parametrize("how", ["immediate", "sigkill"])
def test_g9_a_server_that_is_killed(cluster: Cluster, tmp_path: Path, how: str) -> None:
    witness = tmp_path / "heads.jsonl"
    with durable(cluster) as database:
        agents = [database.agent("one"), database.agent("two")]
        keys = OneKey(database.ledger_key())
        options: dict[str, Any] = {"settings": QUICK, "witnesses": [open_witness(f"file:{witness}")]}
        workers = [Worker(database.dsn("worker"), keys, **options) for _ in range(2)]
        writers = [
            Writer(database.dsn(f"agent_{at}"), agent)
            for at, agent in ((1, agents[0]), (2, agents[1]), (1, agents[0]))
        ]

        def signatures() -> float:
            return sum(worker.metrics.counters["kakunin_worker_signatures"] for worker in workers)

        with running(workers[0]), running(workers[1]):
            with writing(*writers):
                for _ in range(ROUNDS):
                    before = signatures()
                    until(lambda before=before: signatures() > before, "a signature")
                    time.sleep(CRASHES.random() / 5)
                    if how == "immediate":
                        database.cluster.stop("immediate")
                        database.cluster.start()
                    else:
                        kill_a_process(database)
            until(lambda: answered(signed(database)), "the signature of everything")
            assert not any(worker.metrics.errors["integrity"] for worker in workers)
        check(database, writers, witness)
