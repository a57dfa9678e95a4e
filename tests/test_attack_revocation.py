"""Attacks on revocation: G3. A certificate that may no longer be used loses access at the next statement.

That holds for whatever the session still has: a ticket, a binding, a prepared statement, an open transaction.
What keeps a snapshot keeps what was seen in it: a cursor, and a transaction above READ COMMITTED to its end.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database, one, refused

Connection = psycopg.Connection[Any]

WAYS = ["ticket", "session", "gateway", "claims"]
SERIAL = "select kakunin.current_cert_serial()"
COUNT = "select count(*) from vault"
REQUIRE = "select kakunin.require_session()"


@pytest.fixture(scope="module")
def kit(cluster: Cluster) -> Iterator[Database]:
    """A database of its own whose clock can be moved, with a protected vault and PostgREST's login."""
    with fresh_database(cluster) as database:
        database.make_clock_movable()
        database.run("installer", "select kakunin.set_gateway_logins('{authenticator}')")
        with database.connect("app") as app:
            app.execute("create table vault (permitted_agent_serial text, content text)")
            app.execute("create index on vault (permitted_agent_serial)")
            app.execute("select kakunin.protect('vault')")
            app.execute("grant select, insert, update, delete on vault to kakunin_agent, kakunin_gateway")
        database.run("postgres", "grant kakunin_agent to anon")
        yield database
        database.run("postgres", "revoke kakunin_agent from anon")


@pytest.fixture
def clock(kit: Database) -> Iterator[Callable[[str], None]]:
    """Moves the database's clock; it is back in its place afterwards."""
    yield kit.move_clock
    kit.move_clock("0")


@pytest.fixture
def holder(kit: Database) -> Agent:
    """An agent with two rows."""
    agent = kit.agent("holder", permitted_actions=["vault:read"])
    kit.run("app", "insert into vault values (%(s)s, 'a'), (%(s)s, 'b')", {"s": agent.serial})
    return agent


def bind(connection: Connection, holder: Agent, way: str, ticket: str | None = None) -> None:
    if way == "claims":
        connection.execute("set local role anon")
        claims = json.dumps({"role": "anon", "kakunin_cert_serial": holder.serial})
        connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
    elif way == "gateway":
        connection.execute("select kakunin.bind_serial(%s)", [holder.serial])
    else:
        ticket = ticket or holder.database.ticket(holder, "agent_1")
        connection.execute("select kakunin.bind_session(%s, %s)", [ticket, way == "ticket"])


@contextlib.contextmanager
def session(
    holder: Agent, way: str, level: str = "read committed", bound: bool = True
) -> Iterator[Connection]:
    """A session in an open transaction, bound."""
    login = {"gateway": "gateway", "claims": "authenticator"}.get(way, "agent_1")
    ticket = holder.database.ticket(holder, "agent_1") if way in ("ticket", "session") else None
    with holder.database.connect(login) as connection:
        connection.execute(f"set transaction isolation level {level}")
        if bound:
            bind(connection, holder, way, ticket)
            if way == "session":  # a rollback would take it off
                connection.commit()
                connection.execute(f"set transaction isolation level {level}")
            assert one(connection, COUNT) == 2
        yield connection
        connection.rollback()


def revoke(holder: Agent) -> None:
    holder.revoke()


def suspend(holder: Agent) -> None:
    holder.suspend()


def reinstate(holder: Agent) -> None:
    holder.database.run("operator", "select kakunin.reinstate_agent(%s)", [holder.agent_id])


ENDS = {"KA002": revoke, "KA008": suspend}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", ENDS)
def test_g3_at_the_next_statement_of_an_open_transaction(holder: Agent, way: str, state: str) -> None:
    with session(holder, way) as agent:
        agent.execute("update vault set content = content")
        ENDS[state](holder)
        assert one(agent, COUNT) == 0
        assert one(agent, SERIAL) is None
        assert one(agent, "select kakunin.current_agent_id()") is None
        assert one(agent, "select kakunin.has_scope('vault:read')") is False
        assert agent.execute("update vault set content = 'x'").rowcount == 0
        assert agent.execute("delete from vault").rowcount == 0
        agent.execute("savepoint s")
        with refused("42501"):
            agent.execute("insert into vault values (%s, 'after')", [holder.serial])
        agent.execute("rollback to s")
        with refused(state):
            agent.execute(REQUIRE)


@pytest.mark.parametrize("way", WAYS)
def test_g3_a_change_not_committed_is_none(holder: Agent, way: str) -> None:
    """And rolled back it never was."""
    database = holder.database
    with session(holder, way) as agent, database.connect("operator") as operator:
        operator.execute("select kakunin.revoke_certificate(%s)", [holder.serial])
        assert one(agent, COUNT) == 2
        operator.rollback()
        assert one(agent, COUNT) == 2
        operator.execute("select kakunin.revoke_certificate(%s)", [holder.serial])
        operator.commit()
        assert one(agent, COUNT) == 0


@pytest.mark.parametrize("way", WAYS)
def test_g3_suspension_is_lifted_at_the_next_statement_too(holder: Agent, way: str) -> None:
    with session(holder, way) as agent:
        for _ in range(2):
            suspend(holder)
            assert one(agent, COUNT) == 0
            reinstate(holder)
            assert one(agent, COUNT) == 2
        suspend(holder)
        revoke(holder)
        reinstate(holder)
        assert one(agent, COUNT) == 0  # revocation stays
        with refused("KA002"):
            agent.execute(REQUIRE)


@pytest.mark.parametrize("way", WAYS)
def test_g3_expiry_inside_an_open_transaction(holder: Agent, way: str, clock: Callable[[str], None]) -> None:
    kit = holder.database
    kit.run(
        "installer",
        "update kakunin_private.certificates set not_after = now() + interval '100 s' where serial = %s",
        [holder.serial],
    )
    with session(holder, way) as agent:
        clock("90 seconds")
        assert one(agent, COUNT) == 2
        clock("101 seconds")
        assert one(agent, COUNT) == 0
        with refused("KA003") if way != "session" else refused("KA004"):  # its ticket ended with it
            agent.execute(REQUIRE)


@pytest.mark.parametrize("way", WAYS)
def test_g3_not_yet_valid(holder: Agent, way: str, clock: Callable[[str], None]) -> None:
    """A clock set back takes access away too, and right again gives it back."""
    holder.database.run(
        "installer",
        "update kakunin_private.certificates set not_before = now() - interval '1 min' where serial = %s",
        [holder.serial],
    )
    with session(holder, way) as agent:
        clock("-2 minutes")
        assert one(agent, COUNT) == 0
        agent.execute("savepoint s")
        with refused("KA003"):
            agent.execute(REQUIRE)
        agent.execute("rollback to s")
        clock("0")
        assert one(agent, COUNT) == 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state", ["KA002", "KA003", "KA008"])
@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_g3_no_new_binding_afterwards(
    holder: Agent, way: str, state: str, level: str, clock: Callable[[str], None]
) -> None:
    """In a transaction that begins after the change, at any isolation level."""
    kit = holder.database
    with session(holder, way, bound=False) as agent:
        ticket = kit.ticket(holder, "agent_1")
        agent.rollback()
        if state == "KA003":
            kit.run(
                "installer",
                "update kakunin_private.certificates set not_after = now() - interval '1 s'"
                " where serial = %s",
                [holder.serial],
            )
        else:
            ENDS[state](holder)
        agent.execute(f"set transaction isolation level {level}")
        if way == "claims":
            bind(agent, holder, way)
            assert one(agent, COUNT) == 0
            with refused(state):
                agent.execute(REQUIRE)
        else:
            with refused(state):
                bind(agent, holder, way, ticket)


def test_g3_a_prepared_statement(holder: Agent) -> None:
    for mode in ("force_generic_plan", "force_custom_plan"):
        with session(holder, "ticket") as agent:
            agent.execute(f"set plan_cache_mode = {mode}")
            agent.execute("prepare rows as select count(*) from vault")
            agent.execute("prepare writes as update vault set content = content")
            for _ in range(6):
                assert one(agent, "execute rows") == 2
            suspend(holder)
            assert one(agent, "execute rows") == 0
            assert agent.execute("execute writes").rowcount == 0
            reinstate(holder)


def test_g3_the_statements_inside_a_function(holder: Agent) -> None:
    """Each statement of a volatile function is a statement; it does not hide from revocation in a loop."""
    kit = holder.database
    with session(holder, "ticket") as agent, kit.connect("postgres", autocommit=True) as gate:
        # The loop waits for a lock in its middle, where the revocation takes place.
        gate.execute("select pg_advisory_lock(7)")
        agent.execute(
            "create function pg_temp.loops() returns text language plpgsql as $$"
            " declare before bigint; after bigint; begin"
            " select count(*) into before from vault;"
            " perform pg_advisory_xact_lock(7);"
            " select count(*) into after from vault;"
            " return before || ' ' || after; end $$"
        )
        with kit.connect("operator", autocommit=True) as operator:
            seen = _during(agent, "select pg_temp.loops()", gate, operator, holder)
        assert seen == "2 0"


def _during(agent: Connection, query: str, gate: Connection, operator: Connection, holder: Agent) -> Any:
    """Runs the query, revokes while it waits for the gate, and opens the gate."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(one(agent, query)))
    thread.start()
    for _ in range(2000):
        waiting = gate.execute(
            "select 1 from pg_locks where locktype = 'advisory' and not granted and pid = %s",
            [agent.info.backend_pid],
        ).fetchone()
        if waiting:
            break
    operator.execute("select kakunin.revoke_certificate(%s)", [holder.serial])
    gate.execute("select pg_advisory_unlock(7)")
    thread.join(10)
    return result[0]


def test_g3_do_blocks_and_commits_inside_them(holder: Agent) -> None:
    """A loop that binds again by itself with the ticket it holds is refused with the reason."""
    kit = holder.database
    ticket = kit.ticket(holder, "agent_1")
    with kit.connect("agent_1", autocommit=True) as agent:
        agent.execute("select set_config('my.ticket', %s, false)", [ticket])
        block = (
            "do $$ begin for i in 1..3 loop"
            " perform kakunin.bind_session(current_setting('my.ticket')); commit;"
            " end loop; end $$"
        )
        agent.execute(block)
        revoke(holder)
        with refused("KA002"):
            agent.execute(block)


# What keeps a snapshot ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("state", ENDS)
def test_g3_above_read_committed_when_the_transaction_ends(
    holder: Agent, way: str, level: str, state: str
) -> None:
    """Documented: such a transaction sees the database as it was, the certificate's state included, or
    is refused sooner. Its end is the end of access."""
    with session(holder, way, level) as agent:
        ENDS[state](holder)
        with contextlib.suppress(psycopg.errors.SerializationFailure):
            assert one(agent, COUNT) in (2, 0)
        agent.rollback()
        if way == "session":
            assert one(agent, COUNT) == 0
            with refused(state):
                agent.execute(REQUIRE)
        elif way == "claims":
            bind(agent, holder, way)
            assert one(agent, COUNT) == 0
        else:
            with refused(state):
                bind(agent, holder, way)


@pytest.mark.parametrize("state", ENDS)
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_g3_no_new_ticket_under_an_old_snapshot(holder: Agent, level: str, state: str) -> None:
    """Else a revoked agent with one old transaction open renews its ticket for ever."""
    with session(holder, "ticket", level) as agent:
        ENDS[state](holder)
        with refused("KA002", "KA004", "KA008", "40001"):
            agent.execute("select kakunin.open_session(%s)", [holder.assertion()])


@pytest.mark.parametrize("way", ["ticket", "session"])
@pytest.mark.parametrize("state", ENDS)
def test_g3_an_exported_snapshot_gives_no_new_transaction_access(holder: Agent, way: str, state: str) -> None:
    """SET TRANSACTION SNAPSHOT lets other connections begin, after the revocation, where it has not
    happened yet, as long as any transaction holds that snapshot: and passes it on, without end."""
    kit = holder.database
    ticket = kit.ticket(holder, "agent_1")
    with session(holder, "ticket", "repeatable read") as keeper, kit.connect("agent_1") as late:
        if way == "session":
            bind(late, holder, way, ticket)
            late.commit()
        snapshot = one(keeper, "select pg_export_snapshot()")
        ENDS[state](holder)
        late.execute("set transaction isolation level repeatable read")
        late.execute(f"set transaction snapshot '{snapshot}'")
        try:
            if way == "ticket":
                bind(late, holder, way, ticket)
            rows = one(late, COUNT)
            late.execute("savepoint s")
            late.execute("insert into vault values (%s, 'after revocation')", [holder.serial])
        except psycopg.Error as error:
            rows = 0
            state_seen = error.sqlstate
        else:
            state_seen = None
        late.rollback()
        assert rows == 0, "rows seen and written in a transaction begun after the revocation"
        assert state_seen


def test_g3_what_was_written_before_is_committed_after(holder: Agent) -> None:
    """Revocation ends access, it does not undo. To stop the commit as well, end the session's backend."""
    with session(holder, "ticket") as agent:
        agent.execute("insert into vault values (%s, 'before')", [holder.serial])
        revoke(holder)
        agent.commit()
    contents = holder.database.run(
        "app", "select content from vault where permitted_agent_serial = %s order by 1", [holder.serial]
    )
    assert contents == [("a",), ("b",), ("before",)]


@pytest.mark.parametrize("hold", ["", "with hold"])
def test_g3_an_open_cursor_keeps_the_snapshot_of_its_own_statement(holder: Agent, hold: str) -> None:
    """Documented: it goes on to the rows that statement saw; a new one sees nothing."""
    with session(holder, "ticket") as agent:
        agent.execute(f"declare early cursor {hold} for select content from vault order by content")
        assert agent.execute("fetch 1 from early").fetchall() == [("a",)]
        revoke(holder)
        agent.execute("declare late cursor for select content from vault")
        assert agent.execute("fetch all from late").fetchall() == []
        assert agent.execute("fetch all from early").fetchall() == [("b",)]
        with refused("42501"), agent.transaction():
            agent.execute("insert into vault values (%s, 'after')", [holder.serial])


def test_g3_a_cursor_cannot_write(holder: Agent) -> None:
    """An UPDATE at a cursor's place is a statement of its own."""
    with session(holder, "ticket") as agent:
        agent.execute("declare place cursor for select content from vault for update")
        agent.execute("fetch from place")
        revoke(holder)
        for statement in (
            "update vault set content = 'x' where current of place",
            "delete from vault where current of place",
        ):
            with contextlib.suppress(psycopg.Error), agent.transaction():
                assert agent.execute(statement).rowcount == 0
        agent.commit()
    assert holder.database.run(
        "app",
        "select count(*) from vault where permitted_agent_serial = %s and content <> 'x'",
        [holder.serial],
    ) == [(2,)]


# Two live connections -------------------------------------------------------------------------------


def test_g3_every_session_of_the_agent_and_no_other(kit: Database) -> None:
    agents = [kit.agent(f"agent {i}") for i in range(3)]
    for agent in agents:
        kit.run("app", "insert into vault values (%(s)s, 'a'), (%(s)s, 'b')", {"s": agent.serial})
    with contextlib.ExitStack() as stack:
        sessions = [(agent, stack.enter_context(session(agent, way))) for agent in agents for way in WAYS]
        for gone in (agents[1], agents[0]):
            gone.revoke()
            revoked = {agents[1].serial, gone.serial}
            for agent, connection in sessions:
                assert one(connection, COUNT) == (0 if agent.serial in revoked else 2)


def test_g3_one_certificate_of_two(kit: Database, holder: Agent) -> None:
    """Revocation is of a certificate, suspension of an agent."""
    second = kit.agent("second")
    kit.run("app", "insert into vault values (%(s)s, 'c'), (%(s)s, 'd')", {"s": second.serial})
    kit.run(
        "installer",
        "update kakunin_private.certificates set agent_id = %s where serial = %s",
        [holder.agent_id, second.serial],
    )
    with session(holder, "gateway") as first, session(second, "gateway") as other:
        second.revoke()
        assert (one(first, COUNT), one(other, COUNT)) == (2, 0)
        suspend(holder)
        assert (one(first, COUNT), one(other, COUNT)) == (0, 0)


def test_g3_revoked_between_the_statements_of_one_message(holder: Agent) -> None:
    """A pipeline's or a message's later statements are later statements."""
    kit = holder.database
    ticket = kit.ticket(holder, "agent_1")
    with (
        kit.connect("agent_1", autocommit=True) as agent,
        kit.connect("operator", autocommit=True) as operator,
    ):
        with agent.pipeline() as pipeline:
            agent.execute("begin")
            agent.execute("select kakunin.bind_session(%s)", [ticket])
            before = agent.execute(COUNT)
            pipeline.sync()
            operator.execute("select kakunin.revoke_certificate(%s)", [holder.serial])
            after = agent.execute(COUNT)
            agent.execute("rollback")
        assert before.fetchone() == (2,)
        assert after.fetchone() == (0,)


# Nothing an agent holds delays a revocation --------------------------------------------------------


@pytest.mark.parametrize("call", ["revoke_certificate(%(serial)s)", "suspend_agent(%(agent_id)s, 'why')"])
def test_g3_no_lock_of_an_agent_delays_it(database: Database, call: str) -> None:
    """DDL of its own takes the strongest catalog locks a login without rights can get."""
    agent = database.agent()
    with database.connect("agent_1") as attacker, database.connect("operator") as operator:
        for statement in [
            'create collation pg_temp.x from pg_catalog."C"',
            "create domain pg_temp.d as boolean",
            "create type pg_temp.e as enum ('a')",
            "create table pg_temp.t (id int primary key)",
            "create function pg_temp.f() returns int language sql return 1",
            "select kakunin.open_session(%(assertion)s)",
        ]:
            attacker.execute(statement, {"assertion": agent.assertion()})
        operator.execute("set lock_timeout = '2s'")
        operator.execute(f"select kakunin.{call}", {"serial": agent.serial, "agent_id": agent.agent_id})


@pytest.mark.parametrize("call", ["bind_session(%(ticket)s)", "open_session(%(assertion)s)"])
def test_g2_a_key_rotated_away_is_gone_under_an_old_snapshot(database: Database, call: str) -> None:
    agent = database.agent()
    values = {"ticket": database.ticket(agent, "agent_1"), "assertion": agent.assertion()}
    with database.connect("agent_1") as keeper, database.connect("agent_1") as late:
        keeper.execute("set transaction isolation level repeatable read")
        (snapshot,) = keeper.execute("select pg_export_snapshot()").fetchone()
        database.run("operator", "select kakunin.rotate_session_key('0')")
        late.execute("set transaction isolation level repeatable read")
        late.execute(f"set transaction snapshot '{snapshot}'")
        with pytest.raises(psycopg.Error) as caught:
            late.execute(f"select kakunin.{call}", values)
        assert caught.value.sqlstate == "KA004"
