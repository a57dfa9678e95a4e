"""Behind pgbouncer in transaction mode: G1 and G2 where many agents take turns on few server sessions."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import SERVER_USER, Cluster, free_port
from conftest import Agent, Database, fresh_database

PGBOUNCER = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(
    PGBOUNCER is None, reason="no pgbouncer on this machine: apt install pgbouncer"
)

AGENTS = 8
TRANSACTIONS = 100
POOL_SIZE = 2


@dataclass
class Pooled:
    """The vault behind the pooler, and agents that share one login."""

    database: Database
    port: int
    agents: list[Agent]

    def connect(self, **kwargs: Any) -> psycopg.Connection[Any]:
        # Prepared statements off: those of the protocol would stay in a session that others use next.
        return psycopg.connect(
            f"host=127.0.0.1 port={self.port} dbname={self.database.name} user=pooled",
            prepare_threshold=None,
            **kwargs,
        )


@pytest.fixture(scope="module")
def pooled(cluster: Cluster) -> Iterator[Pooled]:
    with fresh_database(cluster) as database:
        agents = [database.agent(f"agent {i}") for i in range(AGENTS)]
        with database.connect("app") as app:
            app.execute("create table vault (permitted_agent_serial text, content text)")
            app.execute("create index on vault (permitted_agent_serial)")
            app.execute("select kakunin.protect('vault')")
            app.execute("grant select, insert, update, delete on vault to kakunin_agent")
            for agent in agents:
                app.execute("insert into vault values (%(s)s, 'a'), (%(s)s, 'b')", {"s": agent.serial})
        base = Path(tempfile.mkdtemp(prefix="kkb-", dir="/tmp"))
        port = free_port()
        (base / "users").write_text('"pooled" ""\n')
        (base / "ini").write_text(
            f"[databases]\n{database.name} = host={cluster.host} port={cluster.port}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {base}/users\nlogfile = {base}/log\n"
            f"pool_mode = transaction\ndefault_pool_size = {POOL_SIZE}\nmax_client_conn = 100\n"
        )
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(base, SERVER_USER)
        process = subprocess.Popen(
            [str(PGBOUNCER), "-q", str(base / "ini")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **({"user": SERVER_USER, "group": _group(), "extra_groups": []} if os.geteuid() == 0 else {}),
        )
        try:
            result = Pooled(database, port, agents)
            _wait(result, process)
            yield result
        finally:
            process.terminate()
            process.wait(10)
            shutil.rmtree(base)


def _group() -> int:
    return pwd.getpwnam(SERVER_USER).pw_gid


def _wait(pooled: Pooled, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            pooled.connect().close()
        except psycopg.OperationalError:
            assert process.poll() is None, "pgbouncer has ended"
            assert time.monotonic() < end, "pgbouncer does not answer"
        else:
            return


def rows(connection: psycopg.Connection[Any]) -> set[str]:
    return {r[0] for r in connection.execute("select permitted_agent_serial from vault").fetchall()}


def work(pooled: Pooled, agent: Agent, start: threading.Barrier, *, is_local: bool = True) -> dict[str, Any]:
    """Many transactions of one agent, every third of them unbound; what went wrong, and where it ran."""
    mixed: list[str] = []
    backends = set()
    with pooled.connect() as connection:
        ticket = connection.execute("select kakunin.open_session(%s)", [agent.assertion()]).fetchone()
        assert ticket
        connection.commit()
        start.wait(20)
        for n in range(TRANSACTIONS):
            if n % 3 == 2:
                seen = rows(connection)
                if seen:
                    mixed.append(f"unbound saw {seen}")
            else:
                bound = connection.execute(
                    "select kakunin.bind_session(%s, %s)", [ticket[0], is_local]
                ).fetchone()
                if bound != (agent.serial,):
                    mixed.append(f"bound to {bound}")
                for _ in range(2):
                    seen = rows(connection)
                    if seen != {agent.serial}:
                        mixed.append(f"saw {seen}")
                if connection.execute("update vault set content = content").rowcount != 2:
                    mixed.append("changed other rows")
            pid = connection.execute("select pg_backend_pid()").fetchone()
            backends.add(pid)
            connection.commit() if n % 2 else connection.rollback()
    return {"mixed": mixed, "backends": backends}


def work_all(pooled: Pooled, **kwargs: Any) -> list[dict[str, Any]]:
    start = threading.Barrier(len(pooled.agents))
    with ThreadPoolExecutor(len(pooled.agents)) as threads:
        futures = [threads.submit(work, pooled, agent, start, **kwargs) for agent in pooled.agents]
        return [f.result(60) for f in futures]


def test_g2_agents_taking_turns_on_the_same_sessions(pooled: Pooled) -> None:
    """Every transaction sees its own agent's rows, and one that has not bound sees none."""
    results = work_all(pooled)
    assert [r["mixed"] for r in results] == [[]] * AGENTS
    # Not by luck: the sessions were fewer than the agents, and went from hand to hand.
    assert len(set().union(*(r["backends"] for r in results))) <= POOL_SIZE
    assert sum(len(r["backends"]) for r in results) > POOL_SIZE


def test_g2_a_session_binding_leaks_through_a_pooler(pooled: Pooled) -> None:
    """The documented hazard, and the proof that the test above can fail: what is bound to the server's
    session belongs to whoever gets that session next."""
    try:
        results = work_all(pooled, is_local=False)
        assert any(r["mixed"] for r in results)
    finally:
        # Ends what was left bound.
        pooled.database.run(
            "postgres",
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'pooled'"
            " and datname = current_database()",
        )


def test_g2_tickets_are_for_the_login_and_not_for_the_session(pooled: Pooled) -> None:
    """A ticket opened on one server session binds on another; another login's does not."""
    agent = pooled.agents[0]
    ticket = pooled.database.ticket(agent, "pooled")
    foreign = pooled.database.ticket(agent, "agent_1")
    with pooled.connect() as first, pooled.connect() as second:
        for connection in (first, second):
            connection.execute("select kakunin.bind_session(%s)", [ticket])
        assert (
            first.execute("select pg_backend_pid()").fetchone()
            != second.execute("select pg_backend_pid()").fetchone()
        )
        assert rows(first) == rows(second) == {agent.serial}
        first.rollback()
        with pytest.raises(psycopg.Error) as caught:
            first.execute("select kakunin.bind_session(%s)", [foreign])
        assert caught.value.sqlstate == "KA004"


def test_g2_a_binding_copied_to_a_later_turn(pooled: Pooled) -> None:
    """On the same server session and the same login, a transaction later: nothing."""
    agent = pooled.agents[0]
    ticket = pooled.database.ticket(agent, "pooled")
    with pooled.connect() as victim, pooled.connect() as thief:
        victim.execute("select kakunin.bind_session(%s)", [ticket])
        binding = victim.execute("select current_setting('kakunin.session')").fetchone()
        victim.commit()
        for _ in range(2 * POOL_SIZE):
            thief.execute("select set_config('kakunin.session', %s, true)", binding)
            assert rows(thief) == set()
            thief.commit()


def test_g1_a_shared_session_is_no_place_for_an_agents_own_sql(pooled: Pooled) -> None:
    """Documented hazard: rows stay apart, names do not. A temporary table left in the server's session takes
    what the next agent writes without naming the schema. Agents that send SQL need a login each, or the
    pooler server_reset_query_always."""
    attacker, victim = pooled.agents[0], pooled.agents[1]
    tickets = [pooled.database.ticket(a, "pooled") for a in (attacker, victim)]
    try:
        with pooled.connect() as connection:
            connection.execute("create temp table vault (permitted_agent_serial text, content text)")
            connection.commit()
        with pooled.connect() as connection:
            for _ in range(POOL_SIZE * 4):
                connection.execute("select kakunin.bind_session(%s)", [tickets[1]])
                connection.execute("insert into vault values (%s, 'misdirected')", [victim.serial])
                # Written with its schema it goes where it should.
                connection.execute("update public.vault set content = content")
                connection.commit()
        with pooled.connect() as first, pooled.connect() as second:
            found = []
            for connection in (first, second):
                connection.execute("select kakunin.bind_session(%s)", [tickets[0]])
                found += [r[0] for r in connection.execute("select content from vault").fetchall()]
                assert "misdirected" not in {
                    r[0] for r in connection.execute("select content from public.vault").fetchall()
                }
            assert "misdirected" in found
    finally:
        pooled.database.run(
            "postgres",
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'pooled'"
            " and datname = current_database()",
        )
        pooled.database.run("app", "delete from vault where content = 'misdirected'")
