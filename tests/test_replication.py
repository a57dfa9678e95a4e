"""The ledger in a database of the auditor's, by logical replication: docs/scale.md, word for word."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from cluster import MAJORS, ROOT, Cluster, binaries
from conftest import Agent, Database, LedgerKey, OneKey, _ca, fresh_database, start_cluster
from cryptography.hazmat.primitives.serialization import Encoding
from test_recovery import head
from test_worker import QUICK, append, running, until

from kakunin_db.cli import main
from kakunin_db.ledger import open_witness
from kakunin_db.ledger.worker import Worker
from kakunin_db.resources import install_sql


def documented(begins: str) -> str:
    """The block of docs/scale.md that begins so."""
    blocks: list[str] = re.findall(r"```sql\n(.*?)```", (ROOT / "docs/scale.md").read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(begins))


@pytest.fixture(scope="module")
def application() -> Iterator[Database]:
    """Of the oldest major, and the auditor's server of the newest."""
    cluster = start_cluster(MAJORS[0], wal_level="logical")
    try:
        with fresh_database(cluster) as database:
            yield database
    finally:
        cluster.destroy()


@pytest.fixture(scope="module")
def auditors() -> Iterator[Database]:
    bindir = binaries(MAJORS[-1])
    if bindir is None:
        pytest.skip(f"no Postgres {MAJORS[-1]} on this machine")
    cluster = Cluster(MAJORS[-1], bindir)
    try:
        cluster.init()
        cluster.start()
        with cluster.connect(autocommit=True) as admin:
            admin.execute("create role installer login createrole")
            admin.execute("create database ledger owner installer")
        database = Database(cluster, "ledger")
        database.run("installer", install_sql())
        with cluster.connect(autocommit=True) as admin:
            for login in ("auditor", "worker"):
                admin.execute(f"create role {login} login in role kakunin_{login}")
        yield database
    finally:
        cluster.destroy()


def audit_verify(database: Database, folder: Path) -> int:
    root = folder / "root.pem"
    root.write_bytes(_ca().certificate.public_bytes(Encoding.PEM))
    options = ["--ca", str(root), "--witness", f"file:{folder}/heads.jsonl"]
    return main(["audit", "verify", "--dsn", database.dsn("auditor"), *options])


def signed(database: Database, agent: Agent, key: LedgerKey, folder: Path) -> int:
    append(database, agent, 10)
    size, _ = database.seal_and_sign(key)
    open_witness(f"file:{folder}/heads.jsonl").publish(head(database))
    return size


def test_g5_the_ledger_is_verified_where_its_dba_has_no_say(
    application: Database, auditors: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent, key = application.agent(), application.ledger_key()
    signed(application, agent, key, tmp_path)
    with application.connect("postgres", autocommit=True) as admin:
        admin.execute("create role ledger_reader login replication")
    publication = documented("create publication")
    tables = re.findall(r"kakunin_private\.\w+", publication)
    application.run("installer", publication)
    application.run("installer", "grant usage on schema kakunin_private to ledger_reader")
    application.run("installer", f"grant select on {', '.join(tables)} to ledger_reader")

    *deletions, subscription = documented("delete from").strip().split(";\n")
    connection = application.dsn("ledger_reader")
    with auditors.connect("postgres", autocommit=True) as admin:
        for statement in deletions:
            admin.execute(statement)
        admin.execute(subscription.replace("host=db dbname=app user=ledger_reader", connection).rstrip(";"))
        try:
            copied = "select bool_and(srsubstate = 'r') from pg_subscription_rel"
            until(lambda: admin.execute(copied).fetchone() == (True,), "the first copy")
            size = signed(application, agent, key, tmp_path)
            arrived = "select max(tree_size) from kakunin.tree_heads"
            until(lambda: auditors.value("auditor", arrived) == size, "the tree head")
            assert auditors.installation_id == application.installation_id
            entries = "select count(*) from kakunin_private.ledger"
            before = auditors.value("postgres", entries)
            assert audit_verify(auditors, tmp_path) == 0
            assert "this is a replica" in capsys.readouterr().err
            bundle = tmp_path / "bundle.jsonl"
            assert main(["audit", "export", "--dsn", auditors.dsn("auditor"), "--out", str(bundle)]) == 0
            assert main(["audit", "verify", str(bundle), "--ca", str(tmp_path / "root.pem")]) == 0
            assert auditors.value("postgres", entries) == before == application.value("postgres", entries)
            assert auditors.value("postgres", "select count(*) from kakunin_private.session_keys") == 1

            # Nobody seals it here.
            with running(Worker(auditors.dsn("worker"), OneKey(key), settings=QUICK)) as worker:
                until(lambda: worker.metrics.errors["integrity"] >= 1, "the refusal")

            # Its DBA goes around the rules, and has the last entries of the agent never been.
            with application.connect("postgres", autocommit=True) as dba:
                dba.execute("alter table kakunin_private.ledger disable trigger all")
                dba.execute("delete from kakunin_private.ledger where agent_id = %s", [agent.agent_id])
            assert audit_verify(application, tmp_path) == 1
            assert auditors.value("postgres", entries) == before
            refused = "select apply_error_count > 0 from pg_stat_subscription_stats"
            until(lambda: admin.execute(refused).fetchone() == (True,), "the refusal")
            assert auditors.value("postgres", entries) == before
            assert audit_verify(auditors, tmp_path) == 0
        finally:
            admin.execute("alter subscription kakunin_ledger disable")
            for _ in range(100):
                try:
                    admin.execute("drop subscription kakunin_ledger")
                    break
                except psycopg.errors.ObjectInUse:  # the apply worker is about to end
                    time.sleep(0.1)
