"""The ledger in a database of the auditor's, by logical replication: docs/scale.md, word for word."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from cluster import MAJORS, ROOT, Cluster, binaries
from conftest import Agent, Database, LedgerKey, OneKey, _ca, fresh_database, start_cluster
from cryptography.hazmat.primitives.serialization import Encoding
from test_recovery import head
from test_worker import QUICK, append, running, until

from kakunin_db.cli import main
from kakunin_db.doctor import Thresholds, examine
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
    settings = {"log_line_prefix": "%e ", "wal_retrieve_retry_interval": "200ms"}
    cluster = Cluster(MAJORS[-1], bindir, settings=settings)
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


@dataclass
class Subscribed:
    """Both, once the subscription has begun, with an agent and a ledger that is signed."""

    application: Database
    auditors: Database
    agent: Agent
    key: LedgerKey
    folder: Path

    def sign(self) -> int:
        append(self.application, self.agent, 10)
        size, _ = self.application.seal_and_sign(self.key)
        open_witness(f"file:{self.folder}/heads.jsonl").publish(head(self.application))
        return size

    def verify(self, database: Database) -> int:
        options = ["--ca", f"{self.folder}/root.pem", "--witness", f"file:{self.folder}/heads.jsonl"]
        return main(["audit", "verify", "--dsn", database.dsn("auditor"), *options])

    def arrived(self, size: int) -> bool:
        newest = "select max(tree_size) from kakunin.tree_heads"
        return bool(self.auditors.value("auditor", newest) == size)


@pytest.fixture(scope="module")
def subscribed(
    application: Database, auditors: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subscribed]:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "root.pem").write_bytes(_ca().certificate.public_bytes(Encoding.PEM))
    both = Subscribed(application, auditors, application.agent(), application.ledger_key(), folder)
    append(application, both.agent, 300)  # so that there are inner nodes
    both.sign()
    with application.connect("postgres", autocommit=True) as admin:
        admin.execute("create role ledger_reader login replication")
    publication = documented("create publication")
    application.run("installer", publication)
    application.run("installer", "grant usage on schema kakunin_private to ledger_reader")
    application.run("installer", f"grant select on {', '.join(published())} to ledger_reader")

    setup, _, subscription = documented("delete from").rpartition("create subscription")
    connection = application.dsn("ledger_reader")
    with auditors.connect("postgres", autocommit=True) as admin:
        admin.execute(setup.encode())
        subscription = subscription.replace("host=db dbname=app user=ledger_reader", connection)
        admin.execute(f"create subscription {subscription}".encode())
        try:
            copied = "select bool_and(srsubstate = 'r') from pg_subscription_rel"
            until(lambda: admin.execute(copied).fetchone() == (True,), "the first copy")
            yield both
        finally:
            admin.execute("alter subscription kakunin_ledger disable")
            for _ in range(100):
                try:
                    admin.execute("drop subscription kakunin_ledger")
                    break
                except psycopg.errors.ObjectInUse:  # the apply worker is about to end
                    time.sleep(0.1)


def published() -> list[str]:
    return re.findall(r"kakunin_private\.\w+", documented("create publication"))


def test_g5_the_ledger_is_verified_where_its_dba_has_no_say(
    subscribed: Subscribed, capsys: pytest.CaptureFixture[str]
) -> None:
    application, auditors = subscribed.application, subscribed.auditors
    size = subscribed.sign()
    until(lambda: subscribed.arrived(size), "the tree head")
    assert auditors.installation_id == application.installation_id
    entries = "select count(*) from kakunin_private.ledger"
    before = auditors.value("postgres", entries)
    assert subscribed.verify(auditors) == 0
    assert "this is a replica" in capsys.readouterr().err
    bundle = subscribed.folder / "bundle.jsonl"
    assert main(["audit", "export", "--dsn", auditors.dsn("auditor"), "--out", str(bundle)]) == 0
    assert main(["audit", "verify", str(bundle), "--ca", f"{subscribed.folder}/root.pem"]) == 0
    assert auditors.value("postgres", entries) == before == application.value("postgres", entries)
    assert auditors.value("postgres", "select count(*) from kakunin_private.session_keys") == 1

    # Nobody seals it here, and nobody is told to.
    with running(Worker(auditors.dsn("worker"), OneKey(subscribed.key), settings=QUICK)) as worker:
        until(lambda: worker.metrics.errors["integrity"] >= 1, "the refusal")
    with auditors.connect("postgres", autocommit=True) as admin:
        found = examine(admin, thresholds=Thresholds(lag=3600)).findings
        assert [f for f in found if f.id.startswith("ledger-")] == []

    # A revocation is a change that is none of what was signed.
    revoked = application.agent()
    revoked.revoke()
    query = "select revoked_at is not null from kakunin_private.certificates where serial = %s"
    until(lambda: auditors.run("postgres", query, [revoked.serial]) == [(True,)], "the revocation")


NEWEST = "(select max(event_id) from kakunin_private.ledger)"
PUT_BACK = "insert into kakunin_private.ledger select event_id, {}, agent_id, xid, entry || ' ' from kept"
ATTACKS = [
    f"update kakunin_private.ledger set entry = entry || ' ' where event_id = {NEWEST}",
    f"update kakunin_private.ledger set event_id = -1 where event_id = {NEWEST} - 1",
    f"delete from kakunin_private.ledger where event_id > {NEWEST} - 5",
    "truncate kakunin_private.ledger",
    "update kakunin_private.batches set root = sha256('x')",
    "delete from kakunin_private.batches",
    "update kakunin_private.tree_nodes set hash = sha256('x')",
    "delete from kakunin_private.tree_nodes",
    "update kakunin_private.tree_heads set root = sha256('x')",
    "alter table kakunin_private.exports replica identity full;"
    " update kakunin_private.exports set tree_size = 0"
    " where exported_at = (select min(exported_at) from kakunin_private.exports)",
    "delete from kakunin_private.exports where tree_size > 0",
    "truncate kakunin_private.batches cascade",
    "update kakunin_private.certificates set der = '\\x00'",
    "delete from kakunin_private.certificates",
    "delete from kakunin_private.authorities",
    "update kakunin_private.ledger_keys set der = '\\x00', revoked_at = now(), revocation_reason = 'x'",
    "truncate kakunin_private.ledger_keys cascade",
]


def test_g5_what_a_superuser_over_there_changes_is_refused_here(subscribed: Subscribed) -> None:
    """With the triggers off, each kind of change to all that is evidence. It stops the subscription until the
    auditor has that transaction left out, and what had arrived verifies to the end."""
    application, auditors = subscribed.application, subscribed.auditors
    size = subscribed.sign()
    for _ in range(2):
        application.run("auditor", "select kakunin.record_export(%s, 0, repeat('0', 64))", [size])
    evidence = [
        t.rpartition(".")[2]
        for t in published()
        if not t.endswith(("installation", "home", "chains", "tree"))
    ]
    for table in evidence:
        assert application.value("postgres", f"select count(*) from kakunin_private.{table}"), table
    auditors.run("installer", "select kakunin.make_partitions('1 year')")
    unguarded = (
        "select relid from pg_partition_tree('kakunin_private.ledger') p where not exists ("
        " select from pg_trigger t where t.tgrelid = p.relid and t.tgname = 'append_only_row'"
        " and t.tgenabled = 'A')"
    )
    assert auditors.run("postgres", unguarded) == []

    def copy() -> list[object]:
        return [
            auditors.value(
                "postgres",
                f"select md5(string_agg(t::text, '' order by t::text)) from kakunin_private.{table} t",
            )
            for table in evidence
        ]

    log = auditors.cluster.base / "log"
    with (
        application.connect("postgres", autocommit=True) as dba,
        auditors.connect("postgres", autocommit=True) as admin,
    ):

        def wait() -> None:
            sent = "select bool_and(replay_lsn >= pg_current_wal_lsn()) from pg_stat_replication"
            until(lambda: dba.execute(sent).fetchone() == (True,), "the subscriber")

        def refused(attack: str, state: str) -> None:
            said = len(log.read_text())
            with dba.transaction():
                dba.execute(attack.encode())
            [ended] = until(
                lambda: re.findall(
                    rf"^{state} ERROR:(?s:.*?) finished at ([0-9A-F]+/[0-9A-F]+)$",
                    log.read_text()[said:],
                    re.M,
                )[:1],
                f"the refusal of {attack}",
            )
            assert copy() == before, attack
            admin.execute(f"alter subscription kakunin_ledger skip (lsn = '{ended}')")
            skipped = "select subskiplsn = '0/0' from pg_subscription"
            until(lambda: admin.execute(skipped).fetchone() == (True,), "the skipping")

        tree = "select relid::regclass::text from pg_partition_tree('kakunin_private.ledger')"
        partitions = [name for (name,) in application.run("postgres", tree)]
        for table in [*partitions, *(f"kakunin_private.{table}" for table in evidence)]:
            dba.execute(f"alter table {table} disable trigger all")
        dba.execute(
            f"create temp table kept as select * from kakunin_private.ledger where event_id = {NEWEST} - 9"
        )
        wait()
        before = copy()
        for attack in ATTACKS:
            refused(attack, "KA006")
        # Tables that are not published refer to it, and a subscriber cascades nothing.
        refused("truncate kakunin_private.authorities cascade", "0A000")
        assert subscribed.verify(auditors) == 0
        assert subscribed.verify(application) == 1

        # Put in again otherwise: under its key, and with another time. (Verifying is an entry over there.)
        wait()
        before = copy()
        refused(PUT_BACK.format("recorded_at"), "23505")
        dba.execute(PUT_BACK.format("recorded_at + interval '1 millisecond'").encode())
        wait()
        assert copy() != before
        assert subscribed.verify(auditors) == 1
