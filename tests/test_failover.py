"""G9: a primary that dies and a standby that is promoted, under a worker whose DSN names both.

With synchronous replication nothing that was acknowledged is missing, and the tree goes on. Without it the
standby may lack a tree head that was signed: then nothing may be signed over it.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import Database, OneKey, _ca
from cryptography.hazmat.primitives.serialization import Encoding
from test_crash import Writer, answered, check, durable, writing
from test_worker import QUICK, append, running, signed, status, until, verify

from kakunin_db import bind_agent_session
from kakunin_db.ledger import TreeHead, open_witness, verify_bundle
from kakunin_db.ledger.export import bundle_lines
from kakunin_db.ledger.worker import Worker


@dataclass
class Pair:
    """A primary and its standby."""

    primary: Database
    standby: Database

    def dsn(self, user: str) -> str:
        """Names both."""
        one, two = self.primary.cluster, self.standby.cluster
        return (
            f"host={one.host},{two.host} port={one.port},{two.port} dbname={self.primary.name} user={user}"
            " target_session_attrs=read-write"
        )

    def synchronous(self) -> None:
        with self.primary.connect("postgres", autocommit=True) as admin:
            admin.execute("alter system set synchronous_standby_names = '*'")
            admin.execute("select pg_reload_conf()")
        query = "select exists (select from pg_stat_replication where sync_state = 'sync')"
        until(lambda: self.primary.value("postgres", query), "the synchronous standby")

    def cut(self) -> None:
        """The standby receives nothing more."""
        hba = self.primary.cluster.data / "pg_hba.conf"
        kept = [line for line in hba.read_text().splitlines() if "replication" not in line]
        hba.write_text("\n".join(kept) + "\n")
        with self.primary.connect("postgres", autocommit=True) as admin:
            admin.execute("select pg_reload_conf()")
            query = "select count(pg_terminate_backend(pid)) from pg_stat_replication"
            until(lambda: admin.execute(query).fetchone() == (0,), "the end of replication")

    def fail_over(self) -> None:
        cluster = self.standby.cluster
        self.primary.cluster.stop("immediate")
        cluster.run("pg_ctl", "-w", "-D", cluster.data, "promote")

    def received(self, size: int) -> bool:
        newest = "select coalesce(max(tree_size), 0) from kakunin.tree_heads"
        return bool(self.standby.value("worker", newest) >= size)


@pytest.fixture
def pair(cluster: Cluster) -> Iterator[Pair]:
    with durable(cluster) as database:
        database.run("postgres", "checkpoint")  # so that the base backup's own has little to do
        standby = database.cluster.standby()
        try:
            yield Pair(database, Database(standby, database.name))
        finally:
            standby.destroy()


def audit_verify(database: Database, tmp_path: Path, witness: Path) -> subprocess.CompletedProcess[str]:
    root = tmp_path / "root.pem"
    root.write_bytes(_ca().certificate.public_bytes(Encoding.PEM))
    command = [
        sys.executable, "-m", "kakunin_db.cli", "audit", "verify", "--dsn", database.dsn("auditor"),
        "--ca", str(root), "--witness", f"file:{witness}",
    ]  # fmt: skip
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_g9_a_synchronous_standby_is_promoted(pair: Pair, tmp_path: Path) -> None:
    """Under load: all that was acknowledged and all that was signed before is in the tree that goes on."""
    pair.synchronous()
    agent, keys = pair.primary.agent(), OneKey(pair.primary.ledger_key())
    path = tmp_path / "heads.jsonl"
    witness = open_witness(f"file:{path}")
    workers = [Worker(pair.dsn("worker"), keys, settings=QUICK, witnesses=[witness]) for _ in range(2)]
    writer = Writer(pair.dsn("agent_1"), agent)
    with running(workers[0]), running(workers[1]):
        with writing(writer):
            until(lambda: len(list(witness.heads(pair.primary.installation_id))) >= 3, "tree heads")
            acknowledged = len(writer.acknowledged)
            newest = newest_head(pair.primary)
            pair.fail_over()
            until(lambda: len(writer.acknowledged) > acknowledged + 20, "entries at the other host")
            until(lambda: status(pair.standby)["signed_size"] > newest.tree_size, "a signature there")
        until(signed(pair.standby), "the signature of everything")
        assert not any(worker.metrics.errors["integrity"] for worker in workers)
    assert newest in stored_heads(pair.standby)
    check(pair.standby, [writer], path)
    verified = audit_verify(pair.standby, tmp_path, path)
    assert verified.returncode == 0, verified.stderr + verified.stdout


def test_g9_what_the_standby_has_not_is_not_signed(pair: Pair) -> None:
    """Also where the worker's login was set not to wait for it."""
    pair.synchronous()
    agent, keys = pair.primary.agent(), OneKey(pair.primary.ledger_key())
    pair.primary.run("postgres", "alter role worker set synchronous_commit = local")
    with running(Worker(pair.dsn("worker"), keys, settings=QUICK)) as worker:
        until(signed(pair.primary), "the signature")
        size = status(pair.primary)["tree_size"]
        pair.standby.cluster.stop()
        with (
            pair.primary.connect(
                "agent_1", autocommit=True, options="-c synchronous_commit=local"
            ) as session,
            bind_agent_session(session, agent.credential),
        ):
            session.execute("select kakunin.audit_log_append('api_call')")
        until(lambda: waits_for_standby(pair.primary), "the worker, who waits")
        assert (status(pair.primary)["tree_size"], status(pair.primary)["signed_size"]) == (size, size)
        assert status(pair.primary)["lag_entries"] == 1
        pair.standby.cluster.start()
        until(signed(pair.primary), "the signature")
        assert not worker.metrics.errors["integrity"]
    assert pair.received(size + 1)
    assert not pair.received(size + 2)


def waits_for_standby(database: Database) -> bool:
    query = "select exists (select from pg_stat_activity where usename = 'worker' and wait_event = 'SyncRep')"
    return bool(database.value("postgres", query))


def stored_heads(database: Database) -> list[TreeHead]:
    columns = 'installation_id, tree_size, "timestamp", root, key_id, signature'
    rows = database.run("worker", f"select {columns} from kakunin.tree_heads order by tree_size")
    return [TreeHead(*row) for row in rows]


def newest_head(database: Database) -> TreeHead:
    return stored_heads(database)[-1]


@pytest.mark.parametrize("remembered_by", ["the leader", "the other worker", "a witness"])
def test_g8_what_a_failover_lost_is_not_signed_over(pair: Pair, tmp_path: Path, remembered_by: str) -> None:
    """A worker refuses: the one that signed it, one that saw it, one that a witness tells of it."""
    agent, keys = pair.primary.agent(), OneKey(pair.primary.ledger_key())
    witness = open_witness(f"file:{tmp_path}/heads.jsonl")
    witnesses = [witness] if remembered_by == "a witness" else []

    def worker() -> Worker:
        return Worker(pair.dsn("worker"), keys, settings=QUICK, witnesses=witnesses)

    def fail_over() -> None:
        pair.fail_over()
        append(pair.standby, agent, 60)  # so that the tree outgrows what was lost

    with contextlib.ExitStack() as follower:
        with running(worker()) as leader:
            append(pair.primary, agent, 20)
            until(signed(pair.primary), "the signature")
            until(lambda: pair.received(status(pair.primary)["signed_size"]), "the standby")
            if remembered_by == "the other worker":
                other = follower.enter_context(running(worker()))
                until(lambda: other.metrics.gauges["kakunin_worker_connected"], "the other worker")
            pair.cut()
            append(pair.primary, agent, 20)
            until(signed(pair.primary), "the signature")
            lost = newest_head(pair.primary)
            if witnesses:
                until(lambda: lost in witness.heads(lost.installation), "the witness")
            if remembered_by == "the other worker":
                until(lambda: other._last == (lost.tree_size, lost.root), "its memory")
            if remembered_by == "the leader":
                fail_over()
                refused_by(leader, pair.standby, lost)
        if remembered_by == "the other worker":
            fail_over()
            refused_by(other, pair.standby, lost)
    if witnesses:
        fail_over()
        with running(worker()) as fresh:
            refused_by(fresh, pair.standby, lost)
        # Whoever audits is told by the witness as well.
        with pair.standby.connect("auditor", autocommit=True) as auditor:
            lines = list(bundle_lines(auditor))
        heads = list(witness.heads(lost.installation))
        assert not verify_bundle(lines, [_ca().certificate], witnesses=heads).ok


def refused_by(worker: Worker, database: Database, lost: TreeHead) -> None:
    """Entries are accepted and sealed, and none is signed."""
    until(lambda: worker.metrics.errors["integrity"] >= 2, "the refusal")
    until(lambda: status(database)["tree_size"] > lost.tree_size, "sealing")
    assert status(database)["signed_size"] < lost.tree_size
    assert status(database)["lag_entries"] > 0


def test_g8_after_such_a_failover_it_is_a_ledger_of_its_own(pair: Pair, tmp_path: Path) -> None:
    """What docs/ledger.md has an operator do: the worker, still running, goes on by itself."""
    agent, keys = pair.primary.agent(), OneKey(pair.primary.ledger_key())
    path = tmp_path / "heads.jsonl"
    witness = open_witness(f"file:{path}")
    with running(Worker(pair.dsn("worker"), keys, settings=QUICK, witnesses=[witness])) as worker:
        append(pair.primary, agent, 20)
        until(signed(pair.primary), "the signature")
        kept = newest_head(pair.primary)
        until(lambda: pair.received(kept.tree_size), "the standby")
        pair.cut()
        append(pair.primary, agent, 20)
        until(signed(pair.primary), "the signature")
        lost = newest_head(pair.primary)
        until(lambda: lost in witness.heads(lost.installation), "the witness")
        pair.fail_over()
        append(pair.standby, agent, 60)
        refused_by(worker, pair.standby, lost)
        installation = pair.standby.value("installer", "select kakunin.renew_installation()")
        keys.key = pair.standby.ledger_key()
        append(pair.standby, agent)
        until(lambda: answered(signed(pair.standby)), "the signature")
        until(lambda: list(witness.heads(installation)), "the witness")
    assert newest_head(pair.standby).installation == installation
    assert kept in stored_heads(pair.standby)
    verify(pair.standby, witnesses=list(witness.heads(installation)))
    verified = audit_verify(pair.standby, tmp_path, path)
    assert verified.returncode == 0, verified.stderr + verified.stdout
