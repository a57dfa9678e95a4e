"""On a hot standby: G1, G2 and G3 where nothing can be written."""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from cluster import Cluster
from conftest import Agent, Database, OneKey, fresh_database, one, refused
from test_worker import running, until

from kakunin_db import CertificateCache, CredentialRejectedError, ReplicaLagError, bind_agent_session
from kakunin_db.ledger.worker import Worker

COUNT = "select count(*) from vault"
SERIAL = "select kakunin.current_cert_serial()"
REQUIRE = "select kakunin.require_session()"


@dataclass
class Replicated:
    """The vault on a primary, and the same database on its streaming replica."""

    primary: Database
    replica: Database

    def caught_up(self) -> None:
        """Returns when the replica has replayed what the primary has written so far."""
        target = self.primary.value("postgres", "select pg_current_wal_insert_lsn()")
        end = time.monotonic() + 20
        while not self.replica.value("postgres", "select pg_last_wal_replay_lsn() >= %s::pg_lsn", [target]):
            assert time.monotonic() < end, "the standby does not catch up"

    def agent(self) -> Agent:
        agent = self.primary.agent("agent")
        self.primary.run("app", "insert into vault values (%(s)s, 'a'), (%(s)s, 'b')", {"s": agent.serial})
        return agent


@pytest.fixture(scope="module")
def replicated(cluster: Cluster) -> Iterator[Replicated]:
    with fresh_database(cluster) as primary:
        with primary.connect("app") as app:
            app.execute("create table vault (permitted_agent_serial text, content text)")
            app.execute("create index on vault (permitted_agent_serial)")
            app.execute("select kakunin.protect('vault')")
            app.execute("grant select, insert, update, delete on vault to kakunin_agent, kakunin_gateway")
        primary.run("postgres", "checkpoint")  # so that the base backup's own has little to do
        standby = cluster.standby()
        try:
            yield Replicated(primary, Database(standby, primary.name))
        finally:
            standby.destroy()


def test_g1_a_ticket_of_the_primary_binds_and_isolates(replicated: Replicated) -> None:
    agents = [replicated.agent() for _ in range(2)]
    tickets = [replicated.primary.ticket(a, "agent_1") for a in agents]
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as connection:
        assert one(connection, "select pg_is_in_recovery()")
        assert one(connection, COUNT) == 0
        for agent, ticket in zip(agents, tickets, strict=True):
            assert one(connection, "select kakunin.bind_session(%s)", [ticket]) == agent.serial
            assert one(connection, REQUIRE) == agent.serial
            assert one(connection, "select kakunin.current_agent_id()") == agent.agent_id
            seen = connection.execute("select distinct permitted_agent_serial from vault").fetchall()
            assert seen == [(agent.serial,)]
        connection.commit()
        assert one(connection, COUNT) == 0
        assert one(connection, SERIAL) is None
    with replicated.replica.connect("agent_2") as other, refused("KA004"):
        other.execute("select kakunin.bind_session(%s)", [tickets[0]])


def test_g1_session_gateway_and_claims_bindings(replicated: Replicated) -> None:
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.primary.run("postgres", "grant kakunin_agent to anon")
    replicated.primary.run("installer", "select kakunin.set_gateway_logins('{authenticator}')")
    try:
        replicated.caught_up()
        with replicated.replica.connect("agent_1", autocommit=True) as connection:
            connection.execute("select kakunin.bind_session(%s, false)", [ticket])
            assert one(connection, COUNT) == 2
            connection.execute("select kakunin.unbind_session()")
            assert one(connection, COUNT) == 0
        with replicated.replica.connect("gateway") as connection:
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
            assert one(connection, COUNT) == 2
        with replicated.replica.connect("authenticator") as connection:
            connection.execute("set local role anon")
            connection.execute(
                "select set_config('request.jwt.claims', %s, true)",
                [f'{{"kakunin_cert_serial": "{agent.serial}"}}'],
            )
            assert one(connection, COUNT) == 2
    finally:
        replicated.primary.run("postgres", "revoke kakunin_agent from anon")
        replicated.primary.run("installer", "select kakunin.set_gateway_logins('{}')")


def test_g2_open_session_is_refused(replicated: Replicated) -> None:
    """The single use of the assertion cannot be recorded there; it stays good for the primary."""
    agent = replicated.agent()
    replicated.caught_up()
    assertion = agent.assertion()
    with replicated.replica.connect("agent_1") as connection:
        with refused("KA004"):
            connection.execute("select kakunin.open_session(%s)", [assertion])
        connection.rollback()
        with refused("0A000"):
            connection.execute("set transaction read write")
    assert replicated.primary.value("agent_1", "select kakunin.open_session(%s)", [assertion])


@pytest.mark.parametrize(
    "binding", ["{serial}", "1|{serial}|x|0|{zeros}", "1|{serial}|s|9999999999|{zeros}", "x"]
)
def test_g2_forged_bindings(replicated: Replicated, binding: str) -> None:
    agent = replicated.agent()
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as connection:
        connection.execute(
            "select set_config('kakunin.session', %s, true)",
            [binding.format(serial=agent.serial, zeros="0" * 64)],
        )
        assert one(connection, SERIAL) is None
        assert one(connection, COUNT) == 0
        with refused("KA004"):
            connection.execute(REQUIRE)


@pytest.mark.parametrize("is_local", [True, False])
def test_g2_a_binding_of_the_primary_is_no_use(replicated: Replicated, is_local: bool) -> None:
    """It is one backend's, and that one is elsewhere. A changed ticket is none either."""
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.caught_up()
    with replicated.primary.connect("agent_1") as first, replicated.replica.connect("agent_1") as second:
        first.execute("select kakunin.bind_session(%s, %s)", [ticket, is_local])
        binding = one(first, "select current_setting('kakunin.session')")
        second.execute("select set_config('kakunin.session', %s, true)", [binding])
        assert one(second, COUNT) == 0
        with refused("KA004"):
            second.execute(
                "select kakunin.bind_session(%s)", [ticket[:-1] + ("0" if ticket[-1] != "0" else "1")]
            )


@pytest.mark.parametrize(
    ("statement", "state"),
    [
        ("select kakunin.revoke_certificate(%(serial)s)", "KA002"),
        ("select kakunin.suspend_agent(%(agent_id)s, 'under review')", "KA008"),
    ],
)
@pytest.mark.parametrize("is_local", [True, False])
def test_g3_revocation_arrives_with_replication(
    replicated: Replicated, statement: str, state: str, is_local: bool
) -> None:
    """In an open transaction at its next statement, once the standby has replayed it."""
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as connection:
        connection.execute("select kakunin.bind_session(%s, %s)", [ticket, is_local])
        assert one(connection, COUNT) == 2
        replicated.primary.run("operator", statement, {"serial": agent.serial, "agent_id": agent.agent_id})
        replicated.caught_up()
        assert one(connection, COUNT) == 0
        with refused(state):
            connection.execute(REQUIRE)
        connection.rollback()
        with refused(state):
            connection.execute("select kakunin.bind_session(%s)", [ticket])


def test_g3_a_snapshot_does_not_outlive_a_revocation(replicated: Replicated) -> None:
    """REPEATABLE READ keeps its rows, and shows them to nobody once the revocation is there."""
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select kakunin.bind_session(%s)", [ticket])
        assert one(connection, COUNT) == 2
        agent.revoke()
        replicated.caught_up()
        assert one(connection, COUNT) == 0
        with refused("KA002"):
            connection.execute(REQUIRE)


def test_g3_a_cache_keeps_no_answer_of_a_standby(replicated: Replicated) -> None:
    """The notification comes from the primary, and the answer after it may be from before it."""
    agent = replicated.agent()
    replicated.caught_up()
    login = "gateway"
    with (
        replicated.replica.connect("postgres", autocommit=True) as admin,
        CertificateCache(
            replicated.replica.dsn(login), ttl=60, listen_dsn=replicated.primary.dsn(login)
        ) as cache,
    ):
        assert cache.start(10)
        admin.execute("select pg_wal_replay_pause()")
        try:
            agent.revoke()
            assert cache.status(agent.serial).valid  # as far as the standby knows
            assert cache.kept(agent.serial) is None
        finally:
            admin.execute("select pg_wal_replay_resume()")
        replicated.caught_up()
        assert cache.status(agent.serial).status == "revoked"


def test_g2_a_retired_session_key_arrives_too(replicated: Replicated) -> None:
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as connection:
        connection.execute("select kakunin.bind_session(%s)", [ticket])
        assert one(connection, COUNT) == 2
        replicated.primary.run("operator", "select kakunin.rotate_session_key('0')")
        replicated.caught_up()
        assert one(connection, COUNT) == 0
        with refused("KA004"):
            connection.execute("select kakunin.bind_session(%s)", [ticket])


def test_g1_a_standby_writes_nothing(replicated: Replicated) -> None:
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.caught_up()
    for login, statement in (
        ("agent_1", "insert into vault values ('AA', 'x')"),
        ("operator", f"select kakunin.revoke_certificate('{agent.serial}')"),
        ("operator", "select kakunin.rotate_session_key()"),
    ):
        with replicated.replica.connect(login) as connection:
            if login == "agent_1":
                connection.execute("select kakunin.bind_session(%s)", [ticket])
            with refused("25006"):
                connection.execute(statement)


@contextlib.contextmanager
def cut_off(upstream: Database) -> Iterator[None]:
    """No standby of this server receives anything."""
    hba = upstream.cluster.data / "pg_hba.conf"
    before = hba.read_text()
    hba.write_text("\n".join(line for line in before.splitlines() if "replication" not in line) + "\n")
    try:
        upstream.run("postgres", "select pg_reload_conf()")
        until(
            lambda: (
                not upstream.value(
                    "postgres", "select count(pg_terminate_backend(pid)) from pg_stat_replication"
                )
            ),
            "the end of replication",
        )
        yield
    finally:
        hba.write_text(before)
        upstream.run("postgres", "select pg_reload_conf()")


def test_g8_a_standby_that_is_cut_off_closes(replicated: Replicated) -> None:
    """Open transactions, sessions, gateways and new bindings alike, whatever it believes of itself; and all
    are back with the next commit that it replays."""
    agent = replicated.agent()
    credential = agent.credential
    ticket = replicated.primary.ticket(agent, "agent_1")
    with replicated.primary.connect("agent_1") as writer, bind_agent_session(writer, credential):
        writer.execute(COUNT)  # so that the credential has a ticket
    replicated.primary.run("operator", "select kakunin.set_replica_lag('5 seconds')")
    replicated.caught_up()
    with (
        replicated.replica.connect("postgres", autocommit=True) as admin,
        replicated.replica.connect("agent_1") as transaction,
        replicated.replica.connect("agent_1", autocommit=True) as session,
        replicated.replica.connect("gateway") as gateway,
    ):
        transaction.execute("select kakunin.bind_session(%s)", [ticket])
        session.execute("select kakunin.bind_session(%s, false)", [ticket])
        gateway.execute("select kakunin.bind_serial(%s)", [agent.serial])
        bound = (transaction, session, gateway)
        assert [one(c, COUNT) for c in bound] == [2, 2, 2]
        try:
            with cut_off(replicated.primary):
                end = time.monotonic() + 20
                while any(one(c, COUNT) for c in bound):
                    assert time.monotonic() < end, "it stays open"
                    time.sleep(0.1)
                age = one(admin, "select clock_timestamp() - pg_last_xact_replay_timestamp()")
                assert dt.timedelta(seconds=5) <= age < dt.timedelta(seconds=8)
                # What it is said to be behind is nothing.
                assert one(admin, "select pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn()")
                for connection in bound:
                    assert one(connection, SERIAL) is None
                with refused("KA012"):
                    transaction.execute(REQUIRE)
                for login, query, parameter in (
                    ("agent_1", "select kakunin.bind_session(%s)", ticket),
                    ("gateway", "select kakunin.bind_serial(%s)", agent.serial),
                    ("auditor", "select kakunin.verify_certificate(%s)", agent.serial),
                    ("gateway", "select kakunin.authenticate_api_key('kkn', %s)", b"x"),
                ):
                    with replicated.replica.connect(login) as connection, refused("KA012"):
                        connection.execute(query, [parameter])
                with (
                    replicated.replica.connect("agent_1") as reader,
                    pytest.raises(ReplicaLagError, match="has replayed what was committed until"),
                    bind_agent_session(reader, credential),
                ):
                    reader.execute(COUNT)
        finally:
            replicated.primary.run("operator", "select kakunin.set_replica_lag('1 minute')")
        replicated.caught_up()
        assert [one(c, COUNT) for c in (session,)] == [2]


def test_g1_g3_g8_a_standby_of_a_standby(replicated: Replicated) -> None:
    """Sessions bind there, revocations arrive there, and it closes with the one before it, or by itself."""
    middle = replicated.replica
    conninfo = f"host={middle.cluster.host} port={middle.cluster.port} user=postgres"
    # The log of these servers has no whole pages, so that no backup can be made of a standby.
    server = replicated.primary.cluster.backup(primary_conninfo=conninfo)
    (server.data / "standby.signal").touch()
    try:
        server.start()
        far = Database(server, replicated.primary.name)
        chain = Replicated(replicated.primary, far)
        agents = [replicated.agent() for _ in range(2)]
        tickets = [replicated.primary.ticket(a, "agent_1") for a in agents]
        chain.caught_up()
        cascading = "select application_name, state from pg_stat_replication"
        assert [state for _, state in middle.run("postgres", cascading)] == ["streaming"]
        with far.connect("agent_1") as connection:
            for agent, ticket in zip(agents, tickets, strict=True):
                connection.execute("select kakunin.bind_session(%s)", [ticket])
                assert connection.execute(
                    "select count(*), min(permitted_agent_serial), max(permitted_agent_serial) from vault"
                ).fetchone() == (2, agent.serial, agent.serial)
            agents[1].revoke()
            chain.caught_up()
            assert one(connection, COUNT) == 0
            with refused("KA002"):
                connection.execute(REQUIRE)

        replicated.primary.run("operator", "select kakunin.set_replica_lag('5 seconds')")
        chain.caught_up()
        with (
            middle.connect("agent_1", autocommit=True) as near,
            far.connect("agent_1", autocommit=True) as distant,
        ):
            for connection in (near, distant):
                connection.execute("select kakunin.bind_session(%s, false)", [tickets[0]])
                assert one(connection, COUNT) == 2

            def come_to(counts: list[int]) -> None:
                """While the primary goes on: how far behind a standby is, the last commit there tells."""
                end = time.monotonic() + 30
                while [one(connection, COUNT) for connection in (near, distant)] != counts:
                    assert time.monotonic() < end, f"it does not come to {counts}"
                    replicated.primary.run("app", "insert into vault values ('AA', 'a heartbeat')")
                    time.sleep(0.1)

            for upstream, closed in ((middle, [2, 0]), (replicated.primary, [0, 0])):
                with cut_off(upstream):
                    come_to(closed)
                    with refused("KA012"):
                        distant.execute(REQUIRE)
                come_to([2, 2])
    finally:
        server.destroy()
        replicated.primary.run("operator", "select kakunin.set_replica_lag('1 minute')")
        replicated.primary.run("app", "delete from vault where permitted_agent_serial = 'AA'")


def test_g8_an_idle_primary_with_a_worker_keeps_its_standby_open(replicated: Replicated) -> None:
    """Nobody commits anything but the worker its lease."""
    agent, keys = replicated.agent(), OneKey(replicated.primary.ledger_key())
    ticket = replicated.primary.ticket(agent, "agent_1")
    replicated.primary.run("operator", "select kakunin.set_replica_lag('5 seconds')")
    try:
        with (
            running(Worker(replicated.primary.dsn("worker"), keys)),
            replicated.replica.connect("agent_1", autocommit=True) as session,
        ):
            replicated.caught_up()
            session.execute("select kakunin.bind_session(%s, false)", [ticket])
            end = time.monotonic() + 8
            while time.monotonic() < end:
                assert one(session, COUNT) == 2
                time.sleep(0.1)
    finally:
        replicated.primary.run("operator", "select kakunin.set_replica_lag('1 minute')")


def test_g8_the_limit_is_a_setting(replicated: Replicated) -> None:
    """A minute at first; NULL, and it answers as of whenever that was."""
    for limit in ("'1 second'", "'2 days'", "'-1 minute'"):
        with replicated.primary.connect("operator") as connection, refused("KA010"):
            connection.execute(f"select kakunin.set_replica_lag({limit})")
    agent = replicated.agent()
    ticket = replicated.primary.ticket(agent, "agent_1")
    clock = (
        "create or replace function kakunin_private.clock() returns timestamptz"
        " language sql volatile parallel safe return clock_timestamp() + interval '{}'"
    )
    replicated.primary.run("installer", clock.format("2 minutes"))
    try:
        replicated.caught_up()
        with replicated.replica.connect("agent_1") as session, refused("KA012"):
            session.execute("select kakunin.bind_session(%s)", [ticket])
        replicated.primary.run("operator", "select kakunin.set_replica_lag(null)")
        replicated.caught_up()
        with replicated.replica.connect("agent_1") as session:
            session.execute("select kakunin.bind_session(%s)", [ticket])
            assert one(session, COUNT) == 2
    finally:
        replicated.primary.run("installer", clock.format("0"))
        replicated.primary.run("operator", "select kakunin.set_replica_lag('1 minute')")
        replicated.caught_up()


def test_g1_a_credential_bound_on_the_primary_binds_on_the_standby(replicated: Replicated) -> None:
    """bind_agent_session() keeps its ticket by installation and login, so both hosts share it."""
    credential = replicated.agent().credential
    replicated.caught_up()
    with replicated.replica.connect("agent_1") as reader:
        with (
            pytest.raises(CredentialRejectedError, match="read-only"),
            bind_agent_session(reader, credential),
        ):
            reader.execute(COUNT)
        with replicated.primary.connect("agent_1") as writer, bind_agent_session(writer, credential):
            assert writer.execute(COUNT).fetchone() == (2,)
        with bind_agent_session(reader, credential):
            assert reader.execute(COUNT).fetchone() == (2,)
