"""Attacks on halts: G3. halt_agent(terminate => true) ends the agent's backends, whatever its SQL does about
it, and nobody else's; and nothing an agent holds keeps a halt from being made.

What is at stake is what a transaction has not committed yet, and the statement that runs: access itself is
gone at the next statement either way.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database, one, refused, start_cluster

Connection = psycopg.Connection[Any]

BIND = "select kakunin.bind_session(%s)"
BIND_FOR_THE_SESSION = "select kakunin.bind_session(%s, false)"
BINDING = "select current_setting('kakunin.session')"
SET_BINDING = "select set_config('kakunin.session', %s, %s)"
SERIAL = "select kakunin.current_cert_serial()"
COUNT = "select count(*) from vault"
HALT = "select kakunin.halt_agent(%s, 'why', terminate => true)"
INSERT = "insert into vault values (%s, %s)"
LOCK = "classid::int8::bit(32)::int, objid::int8::bit(32)::int"
OWN_LOCKS = "from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"


def furnish(database: Database) -> None:
    with database.connect("app") as app:
        app.execute("create table vault (permitted_agent_serial text, content text)")
        app.execute("create index on vault (permitted_agent_serial)")
        app.execute("select kakunin.protect('vault')")
        app.execute("grant select, insert, update, delete on vault to kakunin_agent, kakunin_gateway")


@pytest.fixture(scope="module")
def kit(cluster: Cluster) -> Iterator[Database]:
    """A protected vault, and an owner who may end backends."""
    with fresh_database(cluster) as database:
        furnish(database)
        database.run("postgres", "grant pg_signal_backend to installer")
        yield database
        database.run("postgres", "revoke pg_signal_backend from installer")


@dataclass
class Halted:
    """An agent that is going to be halted."""

    kit: Database
    agent: Agent
    ticket: str

    @property
    def serial(self) -> str:
        return self.agent.serial

    def halt(self) -> dict[str, Any]:
        return self.kit.value("operator", HALT, [self.agent.agent_id])

    def written(self) -> list[str]:
        query = "select content from vault where permitted_agent_serial = %s order by 1"
        return [row[0] for row in self.kit.run("app", query, [self.serial])]


Steps = Callable[[Connection, Halted], None]


def agent_of(kit: Database, login: str = "agent_1") -> Halted:
    agent = kit.agent()
    kit.run("app", INSERT, [agent.serial, "before"])
    return Halted(kit, agent, kit.ticket(agent, login))


@pytest.fixture
def halted(kit: Database) -> Halted:
    return agent_of(kit)


def gone(kit: Database, connection: Connection) -> None:
    """Returns once its backend has ended."""
    end = time.monotonic() + 20
    query = "select count(*) from pg_stat_activity where pid = %s"
    while kit.value("postgres", query, [connection.info.backend_pid]):
        assert time.monotonic() < end, "the backend was not ended"
    with pytest.raises(psycopg.OperationalError):
        connection.execute("select")


def marked(kit: Database, connection: Connection, serial: str) -> bool:
    bound = kit.value("installer", "select kakunin_private.bound_backends(array[%s])", [serial])
    return connection.info.backend_pid in bound


# Whom it ends ---------------------------------------------------------------------------------------


def bind(connection: Connection, halted: Halted, way: str) -> None:
    connection.execute(BIND if way == "transaction" else BIND_FOR_THE_SESSION, [halted.ticket])
    if way == "session, idle":
        connection.commit()


def bind_serial(connection: Connection, halted: Halted) -> None:
    connection.execute("select kakunin.bind_serial(%s)", [halted.serial])


@pytest.mark.parametrize("login", ["agent_1", "pooled"])
@pytest.mark.parametrize("way", ["transaction", "session", "session, idle"])
def test_g3_it_ends_the_backends_bound_to_the_agent(kit: Database, way: str, login: str) -> None:
    ends_both(agent_of(kit, login), login, lambda connection, halted: bind(connection, halted, way))


def test_g3_also_those_a_gateway_has_bound(kit: Database) -> None:
    ends_both(agent_of(kit), "gateway", bind_serial)


def ends_both(halted: Halted, login: str, bind: Steps) -> None:
    kit = halted.kit
    with kit.connect(login) as first, kit.connect(login) as second:
        bind(first, halted)
        bind(second, halted)
        told = halted.halt()
        assert (told["backends_terminated"], told["backends_not_terminated"]) == (2, 0)
        assert told["hint"] is None
        gone(kit, first)
        gone(kit, second)


def test_g3_of_every_certificate_the_agent_has(kit: Database) -> None:
    old = agent_of(kit)
    new = kit.renew(old.agent)
    with kit.connect("gateway") as first, kit.connect("gateway") as second:
        first.execute("select kakunin.bind_serial(%s)", [old.serial])
        second.execute("select kakunin.bind_serial(%s)", [new.serial])
        assert old.halt()["backends_terminated"] == 2
        gone(kit, first)
        gone(kit, second)


def test_g3_also_one_whose_certificate_was_revoked_before(kit: Database, halted: Halted) -> None:
    """It sees nothing any more, but what it wrote before it could still commit."""
    with kit.connect("agent_1") as agent:
        agent.execute(BIND, [halted.ticket])
        agent.execute(INSERT, [halted.serial, "after"])
        halted.agent.revoke()
        assert halted.halt()["backends_terminated"] == 1
        gone(kit, agent)
    assert halted.written() == ["before"]


def test_g3_what_was_not_committed_is_undone(kit: Database, halted: Halted) -> None:
    with kit.connect("agent_1") as agent:
        agent.execute(BIND, [halted.ticket])
        agent.execute(INSERT, [halted.serial, "after"])
        halted.halt()
        with pytest.raises(psycopg.OperationalError):
            agent.commit()
    assert halted.written() == ["before"]


def test_g3_a_statement_that_runs_is_ended(kit: Database, halted: Halted) -> None:
    with kit.connect("agent_1") as agent:
        agent.execute(BIND, [halted.ticket])
        outcome: list[str | None] = []

        def run() -> None:
            try:
                agent.execute("select content, pg_sleep(60) from vault")
            except psycopg.Error as error:
                outcome.append(error.sqlstate)

        thread = threading.Thread(target=run)
        thread.start()
        sleeping = "select count(*) from pg_stat_activity where pid = %s and wait_event = 'PgSleep'"
        while not kit.value("postgres", sleeping, [agent.info.backend_pid]):
            assert thread.is_alive()
        halted.halt()
        thread.join(20)
        assert outcome == ["57P01"]


def test_g3_it_ends_nobody_else(kit: Database, halted: Halted) -> None:
    bystander = agent_of(kit)
    with contextlib.ExitStack() as stack:

        def session(login: str = "agent_1", **options: Any) -> Connection:
            return stack.enter_context(kit.connect(login, **options))

        bound = session()
        bound.execute(BIND, [halted.ticket])

        unbound = session()
        unbound.execute("select")
        other = session()
        other.execute(BIND, [bystander.ticket])
        other_for_the_session = session(autocommit=True)
        other_for_the_session.execute(BIND_FOR_THE_SESSION, [bystander.ticket])
        committed = session()  # back in its pool
        committed.execute(BIND, [halted.ticket])
        committed.commit()
        rolled_back = session()
        rolled_back.execute(BIND, [halted.ticket])
        rolled_back.rollback()
        next_ones = session()
        next_ones.execute(BIND, [halted.ticket])
        next_ones.commit()
        next_ones.execute(BIND, [bystander.ticket])
        unbound_again = session(autocommit=True)
        unbound_again.execute(BIND_FOR_THE_SESSION, [halted.ticket])
        unbound_again.execute("select kakunin.unbind_session()")
        discarded = session(autocommit=True)
        discarded.execute(BIND_FOR_THE_SESSION, [halted.ticket])
        discarded.execute("discard all")
        refused_one = session()
        with refused("KA004"):
            refused_one.execute(BIND, [halted.ticket + "0"])
        elsewhere = stack.enter_context(kit.cluster.connect("postgres", "agent_1"))
        elsewhere.execute("select pg_advisory_lock_shared(0, hashtext(%s))", [halted.serial])

        operator = session("operator")
        told = one(operator, HALT, [halted.agent.agent_id])
        operator.commit()
        assert (told["backends_terminated"], told["backends_not_terminated"]) == (1, 0)
        gone(kit, bound)
        refused_one.rollback()
        for connection in (unbound, committed, rolled_back, unbound_again, discarded, refused_one, elsewhere):
            assert one(connection, "select 1") == 1
        for connection in (other, other_for_the_session, next_ones):
            assert one(connection, SERIAL) == bystander.serial


def test_g3_nor_the_caller(kit: Database, halted: Halted) -> None:
    with kit.connect("postgres") as caller:
        caller.execute("select kakunin.bind_serial(%s)", [halted.serial])
        assert one(caller, SERIAL) == halted.serial
        told = one(caller, HALT, [halted.agent.agent_id])
        assert (told["backends_terminated"], told["backends_not_terminated"]) == (0, 0)
        caller.commit()
    with refused("KA002"):
        kit.run("gateway", "select kakunin.bind_serial(%s)", [halted.serial])


def test_g3_a_transaction_that_was_unbound_is_still_the_agents(kit: Database, halted: Halted) -> None:
    """What it wrote while it was bound is not committed yet."""
    with kit.connect("agent_1") as agent:
        agent.execute(BIND, [halted.ticket])
        agent.execute(INSERT, [halted.serial, "after"])
        agent.execute("select kakunin.unbind_session()")
        assert halted.halt()["backends_terminated"] == 1
        gone(kit, agent)
    assert halted.written() == ["before"]


def test_g3_without_the_privilege_the_halt_stands_and_says_so(kit: Database, halted: Halted) -> None:
    kit.run("postgres", "revoke pg_signal_backend from installer")
    try:
        with kit.connect("agent_1") as agent, kit.connect("installer") as owners:
            agent.execute(BIND, [halted.ticket])
            owners.execute("select kakunin.bind_serial(%s)", [halted.serial])
            told = halted.halt()
            assert (told["backends_terminated"], told["backends_not_terminated"]) == (1, 1)
            assert "grant pg_signal_backend to installer" in told["hint"]
            assert one(agent, COUNT) == 0
            assert one(agent, SERIAL) is None
            gone(kit, owners)  # its own it may end
            halts = "select count(*) from kakunin.halts where agent_id = %s"
            assert kit.value("operator", halts, [halted.agent.agent_id]) == 1
            # Granted, and asked again:
            kit.run("postgres", "grant pg_signal_backend to installer")
            assert halted.halt()["backends_terminated"] == 1
            gone(kit, agent)
    finally:
        kit.run("postgres", "grant pg_signal_backend to installer")


def test_g3_a_backend_that_is_ended_counts_once(kit: Database) -> None:
    """It is looked for twice, and takes its time to end."""
    for _ in range(5):
        other = agent_of(kit)
        with contextlib.ExitStack() as stack:
            sessions = []
            for _ in range(3):
                connection = stack.enter_context(kit.connect("agent_1"))
                connection.execute(BIND, [other.ticket])
                connection.execute("create temp table slow as select generate_series(1, 20000)")
                sessions.append(connection)
            assert other.halt()["backends_terminated"] == 3
            for connection in sessions:
                gone(kit, connection)


def test_g3_only_a_halt_that_asks_for_it_ends_backends(kit: Database, halted: Halted) -> None:
    with kit.connect("agent_1") as agent:
        agent.execute(BIND, [halted.ticket])
        told = kit.value("operator", "select kakunin.halt_agent(%s, 'why')", [halted.agent.agent_id])
        assert (told["backends_terminated"], told["backends_not_terminated"]) == (0, 0)
        assert one(agent, SERIAL) is None
        assert halted.halt()["backends_terminated"] == 1  # afterwards, as many times as it takes
        gone(kit, agent)


def test_limit_a_halt_that_is_rolled_back_has_ended_them(kit: Database, halted: Halted) -> None:
    with kit.connect("agent_1") as agent, kit.connect("operator") as operator:
        agent.execute(BIND, [halted.ticket])
        operator.execute(HALT, [halted.agent.agent_id])
        operator.rollback()
        gone(kit, agent)
    assert kit.value("agent_1", BIND, [halted.ticket]) == halted.serial


# Steps --------------------------------------------------------------------------------------------
#
# Each leaves the session in a transaction that has written as the agent, or raises; the halt must see to it
# that this is never committed.


def write(agent: Connection, halted: Halted) -> None:
    agent.execute(INSERT, [halted.serial, "after"])


def unlock_all(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND, [halted.ticket])
    write(agent, halted)
    agent.execute("select pg_advisory_unlock_all()")


def unlock_each(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND, [halted.ticket])
    write(agent, halted)
    agent.execute(f"select pg_advisory_unlock_shared({LOCK}) {OWN_LOCKS}")


def binding_put_back(agent: Connection, halted: Halted) -> None:
    """Bound, read, rolled back with its lock, and set by hand: it is a true one, of this transaction."""
    agent.execute("savepoint s")
    agent.execute(BIND, [halted.ticket])
    binding = one(agent, BINDING)
    agent.execute("rollback to s")
    assert one(agent, SERIAL) is None
    assert one(agent, f"select count(*) {OWN_LOCKS}") == 0
    agent.execute(SET_BINDING, [binding, True])
    write(agent, halted)


def binding_put_back_for_the_session(agent: Connection, halted: Halted) -> None:
    agent.execute("savepoint s")
    agent.execute(BIND_FOR_THE_SESSION, [halted.ticket])
    binding = one(agent, BINDING)
    agent.execute("rollback to s")
    agent.execute("select pg_advisory_unlock_all()")
    agent.execute(SET_BINDING, [binding, False])
    write(agent, halted)


def binding_put_back_twice(agent: Connection, halted: Halted) -> None:
    binding_put_back(agent, halted)
    agent.execute("savepoint t")
    write(agent, halted)
    agent.execute("rollback to t")
    agent.execute("select pg_advisory_unlock_all()")


def written_in_a_subtransaction(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND, [halted.ticket])
    binding = one(agent, BINDING)
    agent.execute("savepoint s")
    agent.execute("select kakunin.unbind_session()")
    agent.execute(SET_BINDING, [binding, True])
    write(agent, halted)
    agent.execute("release s")


def in_an_exception_block(agent: Connection, halted: Halted) -> None:
    agent.execute("select set_config('my.ticket', %s, false)", [halted.ticket])
    agent.execute(
        "do $$ declare binding text; begin"
        " begin perform kakunin.bind_session(current_setting('my.ticket'));"
        " binding := current_setting('kakunin.session'); raise division_by_zero;"
        " exception when division_by_zero then null; end;"
        " perform set_config('kakunin.session', binding, true); end $$"
    )
    write(agent, halted)


def in_one_message(agent: Connection, halted: Halted) -> None:
    """Transactions of one message share their start, so the binding of one is good in the next."""
    agent.rollback()
    ticket = psycopg.sql.Literal(halted.ticket).as_string(agent)
    serial = psycopg.sql.Literal(halted.serial).as_string(agent)
    agent.pgconn.exec_(
        f"begin; select kakunin.bind_session({ticket});"
        " select set_config('my.binding', current_setting('kakunin.session'), false); commit;"
        " begin; select set_config('kakunin.session', current_setting('my.binding'), true);"
        f" insert into vault values ({serial}, 'after')".encode()
    )
    assert agent.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
    assert one(agent, SERIAL) == halted.serial


def chained(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND, [halted.ticket])
    binding = one(agent, BINDING)
    agent.execute("commit and chain")
    agent.execute(SET_BINDING, [binding, True])
    write(agent, halted)


def bound_many_times(agent: Connection, halted: Halted) -> None:
    for _ in range(300):
        agent.execute(BIND, [halted.ticket])
    write(agent, halted)
    assert one(agent, f"select count(*) {OWN_LOCKS}") <= 2  # the lock table is everybody's


def with_a_seed(agent: Connection, halted: Halted) -> None:
    for _ in range(2):
        agent.execute("select setseed(0.5)")
        agent.execute(BIND, [halted.ticket])
    write(agent, halted)


def under_another_clock(agent: Connection, halted: Halted) -> None:
    agent.execute("set timezone = 'Asia/Kathmandu'; set datestyle = 'sql, dmy'; set extra_float_digits = -15")
    agent.execute(BIND, [halted.ticket])
    agent.execute("set timezone = 'America/Caracas'")
    write(agent, halted)


def bound_to_another_since(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND, [halted.ticket])
    write(agent, halted)
    agent.execute(BIND, [agent_of(halted.kit).ticket])


def above_read_committed(agent: Connection, halted: Halted) -> None:
    agent.rollback()
    agent.execute("set transaction isolation level serializable")
    binding_put_back(agent, halted)


def for_the_session(agent: Connection, halted: Halted) -> None:
    agent.execute(BIND_FOR_THE_SESSION, [halted.ticket])
    agent.commit()
    agent.execute("select pg_advisory_unlock_all()")
    write(agent, halted)
    agent.execute("select pg_advisory_unlock_all()")


def with_names_of_its_own(agent: Connection, halted: Halted) -> None:
    agent.execute(
        "create function pg_temp.hashtext(text) returns int language sql as 'select 1';"
        "create function pg_temp.pg_try_advisory_xact_lock_shared(int, int) returns boolean"
        " language sql as 'select true'; set search_path = pg_temp, pg_catalog, public"
    )
    agent.execute(BIND, [halted.ticket])
    write(agent, halted)


EVASIONS: list[Steps] = [
    unlock_all, unlock_each, binding_put_back, binding_put_back_for_the_session, binding_put_back_twice,
    written_in_a_subtransaction, in_an_exception_block, in_one_message, chained, bound_many_times,
    with_a_seed, under_another_clock, bound_to_another_since, above_read_committed, for_the_session,
    with_names_of_its_own,
]  # fmt: skip


@pytest.mark.parametrize("evasion", EVASIONS, ids=lambda e: e.__name__)
def test_g3_nothing_written_as_the_agent_is_committed_after_the_halt(kit: Database, evasion: Steps) -> None:
    evades_in_vain(agent_of(kit), evasion, "agent_1")


@pytest.mark.parametrize("evasion", [binding_put_back, in_one_message, for_the_session])
def test_g3_nor_on_a_login_that_agents_share(kit: Database, evasion: Steps) -> None:
    evades_in_vain(agent_of(kit, "pooled"), evasion, "pooled")


def evades_in_vain(halted: Halted, evasion: Steps, login: str) -> None:
    kit = halted.kit
    with kit.connect(login) as agent:
        try:
            evasion(agent, halted)
        except psycopg.errors.InsufficientPrivilege:  # it could not write: it was not bound
            assert evasion is chained
            return
        assert evasion is not chained
        assert marked(kit, agent, halted.serial)
        halted.halt()
        with contextlib.suppress(psycopg.Error):
            agent.execute("commit")
    assert halted.written() == ["before"]


def test_g3_it_evades_alone_not_with_a_friend(kit: Database, halted: Halted) -> None:
    """Another connection takes the lock while the binding is off; it cannot be put back then."""
    with kit.connect("agent_1") as agent, kit.connect("agent_1", autocommit=True) as friend:
        agent.execute("savepoint s")
        agent.execute(BIND, [halted.ticket])
        binding = one(agent, BINDING)
        (lock,) = agent.execute(f"select {LOCK} {OWN_LOCKS}").fetchall()
        agent.execute("rollback to s")
        assert one(friend, "select pg_try_advisory_lock(%s, %s)", lock)
        agent.execute("savepoint t")
        agent.execute(SET_BINDING, [binding, True])
        assert one(agent, SERIAL) is None
        assert one(agent, COUNT) == 0
        with refused("42501"):
            write(agent, halted)
        agent.execute("rollback to t")
        with refused("KA004"):
            agent.execute(BIND, [halted.ticket])


@pytest.mark.parametrize("way", [BIND, BIND_FOR_THE_SESSION])
def test_g3_nor_by_locks_taken_beforehand(kit: Database, halted: Halted, way: str) -> None:
    """Of all the numbers it can think of."""
    with kit.connect("agent_1", autocommit=True) as friend, kit.connect("agent_1") as agent:
        friend.execute(
            "select count(pg_advisory_lock(n, hashtext(%s))) from generate_series(-1500, 1500) n",
            [halted.serial],
        )
        agent.execute("select pg_backend_pid()")
        agent.execute(way, [halted.ticket])
        write(agent, halted)
        assert marked(kit, agent, halted.serial)
        halted.halt()
        gone(kit, agent)
        assert one(friend, "select 1") == 1
    assert halted.written() == ["before"]


def test_limit_an_idle_session_can_let_go_of_its_lock(kit: Database, halted: Halted) -> None:
    """Nothing is at stake in it: its next statement sees nothing."""
    with kit.connect("agent_1", autocommit=True) as agent:
        agent.execute(BIND_FOR_THE_SESSION, [halted.ticket])
        agent.execute("select pg_advisory_unlock_all()")
        assert halted.halt()["backends_terminated"] == 0
        assert one(agent, COUNT) == 0
        with refused("42501"):
            write(agent, halted)


# Abuse ----------------------------------------------------------------------------------------------


def test_g3_a_halt_of_one_ends_no_innocent_for_an_attackers_locks(kit: Database, halted: Halted) -> None:
    """Locks are held by who takes them: only a backend of its own can the attacker make look bound."""
    innocent = agent_of(kit)
    with (
        kit.connect("agent_2", autocommit=True) as attacker,
        kit.connect("agent_1") as bound,
        kit.connect("agent_1", autocommit=True) as bound_for_the_session,
        kit.connect("agent_1") as waiting,
    ):
        bound.execute(BIND, [innocent.ticket])
        bound_for_the_session.execute(BIND_FOR_THE_SESSION, [innocent.ticket])
        taken = bound.execute(f"select classid::int8::bit(32)::int {OWN_LOCKS}").fetchall()
        for number in (0, 1, *(row[0] for row in taken)):
            attacker.execute("select pg_advisory_lock_shared(%s, hashtext(%s))", [number, halted.serial])
        # Exclusive ones, ones of a single number, and waiting for one, are no mark.
        waiting.execute("set lock_timeout = '1ms'")
        with refused("55P03"):
            waiting.execute("select pg_advisory_lock(0, hashtext(%s))", [halted.serial])
        waiting.rollback()
        waiting.execute("select pg_advisory_lock(77, hashtext(%s))", [halted.serial])
        waiting.execute("select pg_advisory_lock_shared(hashtext(%s)::bigint)", [halted.serial])
        assert halted.halt()["backends_terminated"] == 1
        gone(kit, attacker)
        assert one(bound, SERIAL) == one(bound_for_the_session, SERIAL) == innocent.serial
        assert one(waiting, "select 1") == 1


@pytest.mark.parametrize("way", [BIND, BIND_FOR_THE_SESSION])
def test_g3_nobody_is_kept_from_binding_by_locks_seen_in_pg_locks(kit: Database, way: str) -> None:
    """The attacker asks for each lock it sees, and gets it when its holder lets go. The next is another."""
    innocent = agent_of(kit)
    seen = f"select {LOCK} from pg_locks where locktype = 'advisory' and mode = 'ShareLock' and pid = %s"
    with (
        kit.connect("agent_1") as agent,
        kit.connect("agent_2", autocommit=True) as attacker,
        kit.connect("agent_2", autocommit=True) as watcher,
    ):
        for _ in range(8):
            assert one(agent, way, [innocent.ticket]) == innocent.serial
            assert one(agent, COUNT) == 1
            for lock in watcher.execute(seen, [agent.info.backend_pid]).fetchall():
                thread = threading.Thread(target=_wait_for, args=(attacker, lock))
                thread.start()
                waits = "select count(*) from pg_locks where pid = %s and not granted"
                while thread.is_alive() and not kit.value("postgres", waits, [attacker.info.backend_pid]):
                    pass
                assert one(agent, SERIAL) == innocent.serial  # who holds it need not queue for it
                agent.commit()
                thread.join(0.2)
                if thread.is_alive():  # it waits for the lock of the session
                    kit.run("postgres", "select pg_cancel_backend(%s)", [attacker.info.backend_pid])
                    thread.join(20)
            agent.commit()
        if way == BIND_FOR_THE_SESSION:
            agent.execute("select kakunin.unbind_session()")
            agent.commit()
            attacker.execute("select pg_advisory_lock(0, hashtext(%s))", [innocent.serial])
            assert one(agent, way, [innocent.ticket]) == innocent.serial
            agent.commit()
            assert one(agent, COUNT) == 1


def _wait_for(attacker: Connection, lock: tuple[int, int]) -> None:
    with contextlib.suppress(psycopg.errors.QueryCanceled):
        attacker.execute("select pg_advisory_lock(%s, %s)", lock)


@pytest.mark.parametrize("login", ["agent_1", "agent_2", "pooled", "gateway"])
def test_g3_an_agent_cannot_ask_who_is_bound_or_end_anybody(
    kit: Database, halted: Halted, login: str
) -> None:
    for call in (
        "kakunin.halt_agent(%(agent_id)s, 'why', true)",
        "kakunin_private.terminate(array[%(serial)s], '{}')",
        "kakunin_private.bound_backends(array[%(serial)s])",
        "kakunin_private.mark_bound('x', %(serial)s)",
        "kakunin_private.mark_session(%(serial)s, true)",
    ):
        with refused("42501"):
            kit.run(login, f"select {call}", {"agent_id": halted.agent.agent_id, "serial": halted.serial})


# Nothing an agent holds delays or stops a halt ------------------------------------------------------

MODES = [
    "access share", "row share", "row exclusive", "share update exclusive", "share", "share row exclusive",
    "exclusive", "access exclusive",
]  # fmt: skip
RELATIONS = [
    "vault", "pg_catalog.pg_type", "pg_catalog.pg_namespace", "pg_catalog.pg_depend", "pg_catalog.pg_class",
    "pg_catalog.pg_shdepend", "pg_catalog.pg_locks", "pg_catalog.pg_stat_activity", "kakunin.authorities",
    "kakunin.crls", "kakunin.agents", "kakunin.certificates", "kakunin.halts", "kakunin_private.agents",
    "kakunin_private.certificates", "kakunin_private.halts", "kakunin_private.authorities",
]  # fmt: skip


def all_it_can_hold(agent: Connection, halted: Halted) -> None:
    """Every kind of lock that a login without rights gets, in one transaction left open."""
    for relation in RELATIONS:
        for mode in MODES:
            with contextlib.suppress(psycopg.Error), agent.transaction():
                agent.execute(f"lock table {relation} in {mode} mode nowait")
    agent.execute(BIND, [halted.ticket])
    for statement in (
        "create table public.own (id int primary key, x text); insert into public.own values (1, 'x')",
        "select * from public.own for update",
        "create type public.own_type as enum ('a'); create domain public.own_domain as boolean",
        'create domain pg_temp.own_domain as boolean; create collation pg_temp.own_collation from "C"',
        "create function public.own_function() returns int language sql return 1",
        "alter role current_user set work_mem = '1MB'",
        "alter default privileges grant select on tables to kakunin_agent",
        "grant all on public.own to kakunin_agent, kakunin_operator; comment on table public.own is 'x'",
        "declare own cursor for select * from vault for update; fetch own",
        "update vault set content = content",
        "select * from kakunin.authorities, kakunin.crls",
        "listen kakunin_crl; notify own; notify kakunin_crl",
    ):
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege), agent.transaction():
            agent.execute(statement)
    agent.execute("select pg_export_snapshot()")
    agent.execute(
        "select count(pg_advisory_xact_lock(n, hashtext(%s))) from generate_series(-200, 200) n",
        [halted.serial],
    )
    agent.execute("select count(pg_advisory_lock(n)) from generate_series(-200, 200) n")


@pytest.mark.parametrize("level", ["read committed", "serializable"])
def test_g3_no_lock_of_an_agent_delays_a_halt(cluster: Cluster, level: str) -> None:
    """What a halt waits for is another decision about the same agent: a registration, a change, a halt."""
    with fresh_database(cluster) as kit:
        furnish(kit)
        halted, other = agent_of(kit), agent_of(kit, "agent_2")
        with (
            kit.connect("agent_1") as agent,
            kit.connect("agent_2") as second,
            kit.connect("agent_1") as third,
            kit.connect("operator") as operator,
        ):
            agent.execute(f"set transaction isolation level {level}")
            all_it_can_hold(agent, halted)
            second.execute("select kakunin.open_session(%s)", [other.agent.assertion()])
            third.execute("select kakunin.open_session(%s)", [halted.agent.assertion()])
            operator.execute("set statement_timeout = '3s'")
            for call in ("revoke_certificate(%(serial)s)", "suspend_agent(%(id)s, 'why')"):
                operator.execute(
                    f"select kakunin.{call}", {"serial": other.serial, "id": other.agent.agent_id}
                )
            told = one(operator, "select kakunin.halt_agent(%s, 'why', true)", [halted.agent.agent_id])
            assert told["backends_terminated"] + told["backends_not_terminated"] == 1
            operator.commit()
            agent.close()
            assert kit.value("operator", "select count(*) from kakunin.halts") == 1


@pytest.fixture(scope="module")
def narrow(cluster: Cluster) -> Iterator[Database]:
    """A server with little room for notifications and locks, and with prepared transactions."""
    server = start_cluster(cluster.major)
    try:
        server.settings |= {"max_prepared_transactions": "4", "max_locks_per_transaction": "20"}
        server.settings |= {"max_connections": "20"}
        if server.major >= 17:
            server.settings["max_notify_queue_pages"] = "64"
        server.stop()
        server.start()
        with fresh_database(server) as database:
            furnish(database)
            database.run("postgres", "grant pg_signal_backend to installer")
            yield database
    finally:
        server.destroy()


def test_g3_a_queue_of_notifications_that_is_full_stops_no_halt(narrow: Database) -> None:
    """Any login can fill it: it listens, and never ends its transaction."""
    if narrow.cluster.major < 17:
        pytest.skip("the queue holds 8 GiB before Postgres 17, where max_notify_queue_pages is new")
    halted, other = agent_of(narrow), agent_of(narrow)
    with (
        narrow.connect("agent_1", autocommit=True) as listener,
        narrow.connect("agent_1", autocommit=True) as sender,
    ):
        listener.execute("listen own")
        listener.execute("begin")
        listener.execute("select 1")
        with refused("54000"):
            for n in range(1000):
                sender.execute("select pg_notify('own', %s)", [f"{n:07900}"])
        assert one(sender, "select pg_notification_queue_usage()") > 0.9
        narrow.run("operator", "select kakunin.revoke_certificate(%s)", [other.serial])
        told = halted.halt()
        assert told["certificates_revoked"] == [halted.serial]
        for gone_one in (halted, other):
            with refused("KA002"):
                narrow.run("agent_1", BIND, [gone_one.ticket])


NOTIFYING = """
select exists (select from pg_locks
                where locktype = 'object' and database = 0 and classid = 1262 and objid = 0 and granted)
"""


def unread(database: Database, query: str) -> Connection:
    """A session whose answer to the query nobody reads."""
    connection = database.connect("agent_1", autocommit=True)
    connection.pgconn.send_query(query.encode())
    while connection.pgconn.flush():
        pass
    return connection


def room(database: Database, admin: Connection) -> int:
    """How long a text fits between a backend and a client that does not read, to two thousand characters."""
    fits, blocks = 10_000, 20_000_000
    while blocks - fits > 2000:
        size = (fits + blocks) // 2
        with contextlib.closing(unread(database, f"select repeat('x', {size})")) as connection:
            time.sleep(0.2)
            waits = "select wait_event = 'ClientWrite' from pg_stat_activity where pid = %s"
            if one(admin, waits, [connection.info.backend_pid]):
                blocks = size
            else:
                fits = size
    return fits


def test_g3_who_is_stuck_in_the_queue_of_notifications_delays_no_halt(narrow: Database) -> None:
    """Where the queue is half full, NOTIFY warns its client as it commits, and has the queue locked then. A
    client that does not read keeps it there, and not even pg_terminate_backend() ends it."""
    if narrow.cluster.major < 17:
        pytest.skip("the queue holds 8 GiB before Postgres 17, where max_notify_queue_pages is new")
    halted = agent_of(narrow)
    with (
        narrow.connect("agent_1", autocommit=True) as listener,
        narrow.connect("agent_1", autocommit=True) as sender,
        narrow.connect("postgres", autocommit=True) as admin,
        narrow.connect("operator", autocommit=True) as operator,
    ):
        listener.execute("listen own")
        listener.execute("begin")
        listener.execute("select 1")
        while one(sender, "select pg_notification_queue_usage()") < 0.5:
            sender.execute("select pg_notify('own', repeat('n', 7900))")
        size = room(narrow, admin)
        told: list[Any] = []
        halt = threading.Thread(target=lambda: told.append(one(operator, HALT, [halted.agent.agent_id])))
        for more in (3000, 5000, 1000, 7000):
            time.sleep(5.1)  # it warns once in five seconds
            query = f"begin; notify own; select repeat('n', {size + more}); commit"
            with contextlib.closing(unread(narrow, query)):
                time.sleep(0.5)
                if one(admin, NOTIFYING):
                    halt.start()
                    halt.join(10)
                    assert one(admin, NOTIFYING)
                    assert [t["certificates_revoked"] for t in told] == [[halted.serial]]
                    return
        pytest.fail("nobody was stuck")


def test_g3_an_agent_that_takes_all_locks_is_halted(narrow: Database) -> None:
    """With all of the server's lock table in use nothing can be written, so its backend is ended first.

    The limit: nobody can connect either, and ending a backend looks up roles. So this needs an operator's
    session that has done it before; and a halt that fails ends the backend all the same, and is repeated.
    """
    first, halted = agent_of(narrow), agent_of(narrow)
    with (
        narrow.connect("operator", autocommit=True) as operator,
        narrow.connect("agent_1") as another,
        narrow.connect("agent_1") as agent,
    ):
        another.execute(BIND, [first.ticket])
        assert one(operator, HALT, [first.agent.agent_id])["backends_terminated"] == 1
        gone(narrow, another)
        agent.execute(BIND, [halted.ticket])
        write(agent, halted)
        agent.execute("savepoint s")
        with refused("53200"):
            for n in range(1000):
                agent.execute("select count(pg_advisory_lock(x, %s)) from generate_series(1, 100) x", [n])
        agent.execute("rollback to s")
        outcomes = []
        while "halted" not in outcomes and len(outcomes) < 200:
            try:
                one(operator, HALT, [halted.agent.agent_id])
                outcomes.append("halted")
            except psycopg.errors.OutOfMemory:
                outcomes.append("no room")
        assert outcomes[-1] == "halted"
        with pytest.raises(psycopg.OperationalError):
            agent.commit()
    assert halted.written() == ["before"]


def test_limit_a_prepared_transaction_is_no_backend(narrow: Database) -> None:
    """Where prepared transactions are allowed, which is not the default, one that was prepared before the
    halt can be committed after it."""
    halted = agent_of(narrow)
    with narrow.connect("agent_1", autocommit=True) as agent:
        agent.execute("begin")
        agent.execute(BIND, [halted.ticket])
        write(agent, halted)
        agent.execute("prepare transaction 'own'")
        told = halted.halt()
        assert (told["backends_terminated"], told["backends_not_terminated"]) == (0, 0)
        assert one(agent, SERIAL) is None
        assert narrow.value("postgres", "select gid from pg_prepared_xacts") == "own"
        agent.execute("commit prepared 'own'")
    assert halted.written() == ["after", "before"]


def test_g3_a_prepared_transaction_delays_no_halt(narrow: Database) -> None:
    halted = agent_of(narrow)
    with narrow.connect("agent_1", autocommit=True) as agent:
        agent.execute("begin")
        agent.execute(BIND, [halted.ticket])
        write(agent, halted)
        agent.execute("lock table vault in access exclusive mode")
        agent.execute("select count(pg_advisory_xact_lock(n, n)) from generate_series(1, 50) n")
        agent.execute("prepare transaction 'own'")
        try:
            with narrow.connect("operator") as operator:
                operator.execute("set statement_timeout = '3s'")
                operator.execute(HALT, [halted.agent.agent_id])
        finally:
            agent.execute("rollback prepared 'own'")


# On a standby ---------------------------------------------------------------------------------------


def test_limit_a_halt_ends_no_backend_of_a_standby(cluster: Cluster) -> None:
    """It takes access there as soon as it has been replayed. To end them, the owner asks the standby.

    An agent can hold replay up, by a lock on the standby that what it did on the primary conflicts with: for
    max_standby_streaming_delay, 30 seconds by default. With 0 its statement or its backend gives way at once.
    """
    with fresh_database(cluster) as primary:
        furnish(primary)
        halted = agent_of(primary)
        primary.run("agent_1", "create table own ()")
        primary.run("postgres", "checkpoint")
        cluster.settings["max_standby_streaming_delay"] = "0"
        try:
            standby = cluster.standby()
        finally:
            del cluster.settings["max_standby_streaming_delay"]
        try:
            replica = Database(standby, primary.name)

            def caught_up() -> None:
                primary.run("registrar", "select kakunin.create_agent('beat')")  # closed until a commit
                target = primary.value("postgres", "select pg_current_wal_flush_lsn()")
                end = time.monotonic() + 20
                query = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
                while not replica.value("postgres", query, [target]):
                    assert time.monotonic() < end, "replay is held up"

            caught_up()
            with (
                replica.connect("agent_1") as bound,
                replica.connect("agent_1", autocommit=True) as other,
                replica.connect("agent_1") as holder,
            ):
                bound.execute(BIND, [halted.ticket])
                other.execute(BIND_FOR_THE_SESSION, [halted.ticket])
                assert one(bound, COUNT) == one(other, COUNT) == 1
                assert marked(replica, bound, halted.serial)
                assert marked(replica, other, halted.serial)
                holder.execute("lock table own in access share mode")
                primary.run("agent_1", "drop table own")
                assert halted.halt()["backends_terminated"] == 0
                caught_up()
                holder.close()
                assert one(bound, COUNT) == one(other, COUNT) == 0
                assert one(bound, SERIAL) is None
                with replica.connect("operator") as operator, refused("25006"):
                    operator.execute(HALT, [halted.agent.agent_id])
                replica.run("postgres", "select kakunin_private.terminate(array[%s], '{}')", [halted.serial])
                gone(replica, bound)
                gone(replica, other)
        finally:
            standby.destroy()
