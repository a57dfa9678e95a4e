"""Everything at once, for as long as `make soak` says.

Agents at work on a protected table and in the ledger, thieves, a standby that is read, revocations and
renewals, new session keys, workers killed and a server restarted. At the end nothing has leaked, what was
acknowledged is signed, and nothing has grown that should not.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database
from test_crash import durable
from test_worker import signed, stored_key, until, verify

from kakunin_db import bind_agent_session, flush_attempts
from kakunin_db.errors import KakuninError
from kakunin_db.ledger import open_witness

SECONDS = int(os.environ.get("KAKUNIN_SOAK_SECONDS", "0"))
SEED = os.environ.get("KAKUNIN_SOAK_SEED", "1")
AGENTS = 6
# What a connection dies of when its server is restarted, and what commands meet while it is away.
GONE = (psycopg.OperationalError, psycopg.InterfaceError)
# The ledger, its tree and the history of decisions grow. All else of the kit's stays small, whatever goes on.
GROWING = {
    "ledger",
    "tree",
    "batches",
    "certificates",
    "certificate_",
    "revo",
    "halts",
    "session_keys",
    "partitions",
}

pytestmark = pytest.mark.skipif(SECONDS == 0, reason="takes its time: make soak, or set KAKUNIN_SOAK_SECONDS")


class Post:
    """An agent's place: whose certificate is in use there now."""

    def __init__(self, agent: Agent, login: str) -> None:
        self.lock = threading.Lock()
        self.agent, self.login = agent, login
        self.changed = threading.Event()


class Life(threading.Thread):
    """Something that goes on until it is told to stop; what it raises fails the test."""

    def __init__(self, name: str, turn: Callable[[], None], pause: float = 0) -> None:
        super().__init__(name=name, daemon=True)
        self._turn, self._pause = turn, pause
        self.done, self.failed, self.turns = threading.Event(), None, 0

    failed: BaseException | None

    def run(self) -> None:
        while not self.done.is_set():
            try:
                self._turn()
                self.turns += 1
            except GONE:
                self.done.wait(0.2)
            except BaseException as error:  # the test's own thread raises it
                self.failed = error
                return
            self.done.wait(self._pause)


class Soak:
    """What is shared: the database, who is where, and what was seen."""

    def __init__(self, database: Database, replica: Database) -> None:
        self.database, self.replica = database, replica
        self.posts = [Post(database.agent(f"agent {at}"), f"agent_{at % 2 + 1}") for at in range(AGENTS)]
        self.acknowledged: list[list[str]] = [[] for _ in self.posts]
        self.rolled_back: list[list[str]] = [[] for _ in self.posts]
        self.seen: Counter[str] = Counter()
        # By serial: when the last statement began that got rows, and when its revocation was answered.
        self.served: dict[str, float] = {}
        self.revoked: dict[str, float] = {}

    def work(self, at: int, dice: random.Random) -> Callable[[], None]:
        post = self.posts[at]

        def turn() -> None:
            with post.lock:
                agent = post.agent
            post.changed.clear()
            with psycopg.connect(self.database.dsn(post.login)) as session:
                try:
                    with bind_agent_session(session, agent.credential):
                        for _ in range(50):
                            if post.changed.is_set():
                                self.again(session, agent.serial)
                                return
                            self.one(session, at, agent.serial, dice)
                except KakuninError:  # it was revoked, or it waits in vain for the next one
                    self.seen["refused"] += 1
                    until(lambda: agent is not post.agent, "a new certificate")

        return turn

    def again(self, session: psycopg.Connection[Any], serial: str) -> None:
        """As what was revoked, with the session that was bound before: nothing."""
        began = time.monotonic()
        with contextlib.suppress(KakuninError):
            if session.execute("select content from vault").fetchall():
                self.served[serial] = began
        session.rollback()
        self.seen["tried again"] += 1

    def one(self, session: psycopg.Connection[Any], at: int, serial: str, dice: random.Random) -> None:
        began = time.monotonic()
        rows = session.execute("select permitted_agent_serial, content from vault").fetchall()
        assert all(row == (serial, f"of {serial}") for row in rows)
        if rows:
            self.served[serial] = began
        kind = dice.randrange(4)
        if kind == 0:
            session.execute("insert into vault (content) values (%s)", [f"of {serial}"])
            if len(rows) > 200:
                session.execute("delete from vault")
        elif kind == 1:
            session.execute("update vault set content = content")
        elif kind == 2:  # a thief's: other agents' rows, another's place, another's binding
            other = self.posts[dice.randrange(AGENTS)].agent.serial
            stolen = session.execute(
                "select count(*) from vault where permitted_agent_serial = %s", [other]
            ).fetchone()
            assert stolen == (0,) or other == serial
            with (
                contextlib.suppress(KakuninError, psycopg.errors.InsufficientPrivilege),
                session.transaction(),
            ):
                session.execute("insert into vault values ('planted', %s)", [other])
                assert other == serial, "planted a row with another agent"
                raise psycopg.Rollback
            self.seen["thefts"] += 1
        appended = session.execute(
            "select kakunin.audit_log_append('data_access', %s) ->> 'hash'", ['{"table": "vault", "rows": 3}']
        ).fetchone()
        assert appended
        if dice.randrange(4) == 0:
            session.rollback()
            self.rolled_back[at].append(appended[0])
        else:
            session.commit()
            self.acknowledged[at].append(appended[0])
        self.seen["transactions"] += 1

    def read_elsewhere(self, dice: random.Random) -> Callable[[], None]:
        """On the standby, with a ticket of the primary."""

        def turn() -> None:
            post = dice.choice(self.posts)
            agent = post.agent
            try:
                ticket = self.database.value(
                    post.login, "select kakunin.open_session(%s)", [agent.assertion()]
                )
            except psycopg.Error as error:
                if not str(error.sqlstate).startswith(("KA", "57", "08")):
                    raise
                return
            with psycopg.connect(self.replica.dsn(post.login)) as session:
                for _ in range(20):
                    with contextlib.suppress(KakuninError, psycopg.DatabaseError):
                        session.execute("select kakunin.bind_session(%s)", [ticket])
                        rows = session.execute("select permitted_agent_serial from vault").fetchall()
                        assert {row[0] for row in rows} <= {agent.serial}
                        self.seen["on the standby"] += 1
                    session.rollback()

        return turn

    def revoke(self, dice: random.Random) -> Callable[[], None]:
        """Revokes an agent's certificate or not, and puts the next one in its place."""

        def turn() -> None:
            post = dice.choice(self.posts)
            old = post.agent
            if dice.randrange(3):
                old.revoke()
                self.revoked[old.serial] = time.monotonic()
                self.seen["revoked"] += 1
            new = self.database.renew(old)
            with post.lock:
                post.agent = new
            post.changed.set()

        return turn

    def rotate(self) -> None:
        self.database.run("operator", "select kakunin.rotate_session_key()")
        self.seen["session keys"] += 1

    def sizes(self) -> dict[str, int]:
        """Of tables in KiB; of what there are few rows, it is the row versions nobody has vacuumed."""
        rows = self.database.run(
            "postgres",
            "select relname, pg_total_relation_size(oid) / 1024 from pg_class"
            " where relnamespace = 'kakunin_private'::regnamespace and relkind = 'r'",
        )
        return {name: size for name, size in rows if not any(name.startswith(g) for g in GROWING)}


@contextlib.contextmanager
def worker(database: Database, keys: Path, log: Path, witness: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [
        sys.executable, "-m", "kakunin_db.cli", "worker", "--dsn", database.dsn("worker"),
        "--keys", f"file:{keys}", "--lease", "2", "--witness", f"file:{witness}", "--witness-every", "1",
    ]  # fmt: skip
    environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "password"}
    with log.open("ab") as file, subprocess.Popen(command, env=environment, stderr=file) as process:
        try:
            yield process
        finally:
            process.kill()


def test_g1_g3_g6_g9_everything_at_once(cluster: Cluster, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    witness = tmp_path / "heads.jsonl"
    with durable(cluster) as database, contextlib.ExitStack() as stack:
        with database.connect("installer", autocommit=True) as installer:
            installer.execute("alter system set autovacuum_naptime = 1")
            installer.execute("alter system set autovacuum_vacuum_cost_delay = 0")
            installer.execute("select pg_reload_conf()")
            # A score is another test's: here each works more than its history would have it.
            installer.execute("""select kakunin.set_risk('{"mode": "observe"}')""")
            installer.execute(
                "create table vault (content text not null,"
                " permitted_agent_serial text not null default kakunin.current_cert_serial())"
            )
            installer.execute("create index on vault (permitted_agent_serial)")
            installer.execute("select kakunin.protect('vault', audit => true)")
            installer.execute("grant select, insert, update, delete on vault to kakunin_agent")
        keys = stored_key(database, tmp_path / "keys")
        standby = database.cluster.standby()
        stack.callback(standby.destroy)
        soak = Soak(database, Database(standby, database.name))

        def start(at: int) -> subprocess.Popen[bytes]:
            return stack.enter_context(worker(database, keys, tmp_path / f"worker{at}.log", witness))

        workers = [start(0), start(1)]

        def kill_a_worker() -> None:
            at = dice.randrange(2)
            workers[at].send_signal(signal.SIGKILL)
            workers[at].wait()
            workers[at] = start(at)
            soak.seen["workers killed"] += 1

        lives = [
            *(Life(f"agent {at}", soak.work(at, random.Random(f"{SEED} {at}"))) for at in range(AGENTS)),
            Life("standby", soak.read_elsewhere(random.Random(f"{SEED} standby")), 0.2),
            Life("operator", soak.revoke(random.Random(f"{SEED} operator")), 0.5),
            Life("rotation", soak.rotate, 5),
            Life("killer", kill_a_worker, 3),
        ]
        began = time.monotonic()
        for life in lives:
            life.start()
        restarts = iter([(0.4, "fast"), (0.7, "immediate"), (2, "")])
        at, how = next(restarts)
        early: dict[str, int] = {}
        connections: list[int] = []
        while (share := (time.monotonic() - began) / SECONDS) < 1 and not any(life.failed for life in lives):
            time.sleep(min(1, SECONDS / 50))
            if share >= 0.3 and not early:
                early = soak.sizes()
            if share >= at:
                database.cluster.stop(how)
                database.cluster.start()
                at, how = next(restarts)
                soak.seen["restarts"] += 1
            with contextlib.suppress(psycopg.OperationalError):
                connections.append(
                    database.value(
                        "postgres", "select count(*) from pg_stat_activity where usename is not null"
                    )
                )
        for life in lives:
            life.done.set()
        for life in lives:
            life.join(60)
            assert not life.is_alive(), f"{life.name} does not stop"
            if life.failed is not None:
                raise life.failed
            assert life.turns, f"{life.name} did nothing"
        flush_attempts(30)  # while there is a server to record them
        until(signed(database), "the signature of everything")
        print(f"\n{SECONDS} s, seed {SEED}: {dict(soak.seen)}; {max(connections)} connections at most")

        late = {
            s: soak.served.get(s, 0.0) - at for s, at in soak.revoked.items() if soak.served.get(s, 0.0) > at
        }
        assert not late, f"served so many seconds after their revocation was answered: {late}"
        assert soak.revoked.keys() & soak.served.keys(), "nobody who was revoked had been served"
        rows = database.run(
            "auditor", "select encode(leaf_hash, 'hex') from kakunin.ledger_leaves(0, 10000000)"
        )
        leaves = {row[0] for row in rows}
        assert len(rows) == len(leaves)
        assert {entry for entries in soak.acknowledged for entry in entries} <= leaves
        assert not {entry for entries in soak.rolled_back for entry in entries} & leaves
        heads = list(open_witness(f"file:{witness}").heads(database.installation_id))
        assert heads
        verify(database, witnesses=heads)
        until(
            lambda: (
                soak.replica.value("postgres", "select count(*) from kakunin_private.ledger")
                == database.value("postgres", "select count(*) from kakunin_private.ledger")
            ),
            "the standby",
        )
        # An agent, a worker and its listener, the standby, the test's own: what is lost is not kept open.
        assert max(connections) <= 3 * AGENTS + 12
        # A chain for each transaction that an agent had open at the same time, and decisions'.
        assert database.value("postgres", "select count(*) from kakunin_private.chains") <= 3 * AGENTS + 10
        grown = {
            name: (early.get(name, 0), size)
            for name, size in soak.sizes().items()
            if size > 2 * early.get(name, 0) + 1024
        }
        assert not grown, f"from a third of the time on, in KiB: {grown}"
