"""Attacks on risk scoring, as the agent's login with any SQL it likes: not to be scored or stopped, to harm somebody
else by it, to keep operators or the worker waiting, to make scoring fail, and to spend what the certificate forbids."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database

Connection = psycopg.Connection[Any]

SERIAL = "select kakunin.current_cert_serial()"
APPEND = "select kakunin.audit_log_append(%s, %s)"
SCOPE = {"max_single_trade_usd": 1000, "max_daily_usd": 3000, "permitted_venues": ["XLON"], "max_leverage": 2}
# One alone is not critical and two are not; three are.
ATTEMPT = "unauthorized_access_attempt"


@pytest.fixture(scope="module")
def kit(cluster: Cluster) -> Iterator[Database]:
    """A database of its own whose clock can be moved."""
    with fresh_database(cluster) as database:
        with database.connect("installer") as owner:
            owner.execute("create table kakunin_private.shift as select interval '0' as ahead")
            owner.execute(
                "create or replace function kakunin_private.clock() returns timestamptz language sql volatile"
                " parallel safe as 'select clock_timestamp() + ahead from kakunin_private.shift'"
            )
        yield database


@pytest.fixture
def clock(kit: Database) -> Iterator[Callable[[str], None]]:
    """Moves the database's clock; it is back in its place afterwards."""

    def move(ahead: str) -> None:
        kit.run("installer", "update kakunin_private.shift set ahead = %s::interval", [ahead])

    yield move
    move("0")


@pytest.fixture
def agent(kit: Database) -> Agent:
    return kit.agent(permitted_actions=["trade:*"], financial_scope=SCOPE)


def one(connection: Connection, query: str, params: Any = None) -> Any:
    row = connection.execute(query, params).fetchone()
    assert row
    return row[0]


@contextlib.contextmanager
def refused(*states: str) -> Iterator[None]:
    with pytest.raises(psycopg.Error) as caught:
        yield
    assert caught.value.sqlstate in states, caught.value


def bind(connection: Connection, agent: Agent, is_local: bool = True) -> None:
    ticket = agent.database.ticket(agent, "agent_1")
    connection.execute("select kakunin.bind_session(%s, %s)", [ticket, is_local])


@contextlib.contextmanager
def session(agent: Agent, level: str = "read committed") -> Iterator[Connection]:
    """A session in an open transaction, bound; rolled back unless it commits."""
    ticket = agent.database.ticket(agent, "agent_1")
    with agent.database.connect("agent_1") as connection:
        connection.execute(f"set transaction isolation level {level}")
        connection.execute("select kakunin.bind_session(%s)", [ticket])
        yield connection
        connection.rollback()


def append(connection: Connection, kind: str = ATTEMPT, **metadata: Any) -> Any:
    return one(connection, APPEND, [kind, json.dumps(metadata)])


def attempts(agent: Agent, number: int) -> Any:
    """Each in a transaction of its own."""
    result = None
    for _ in range(number):
        with session(agent) as connection:
            result = append(connection)
            connection.commit()
    return result


def side_by_side(agent: Agent, transactions: int, each: int = 2) -> None:
    """Attempts in transactions that do not see each other, so that none is critical by itself."""
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(session(agent)) for _ in range(transactions)]
        for connection in sessions:
            for _ in range(each):
                assert append(connection)["agent_band"] != "critical"
        for connection in sessions:
            connection.commit()


def status(agent: Agent) -> str:
    query = "select kakunin.verify_certificate(%s) ->> 'status'"
    return agent.database.value("operator", query, [agent.serial])


def stopped(agent: Agent) -> bool:
    query = "select count(*) from kakunin_private.risk_stops where agent_id = %s"
    return agent.database.value("postgres", query, [agent.agent_id]) == 1


def settle(kit: Database) -> int:
    with kit.connect("worker", autocommit=True) as worker:
        worker.execute("set statement_timeout = '10s'")
        return one(worker, "select kakunin.settle_risk()")


def history(agent: Agent, days: int = 20) -> None:
    """So much of it that what is unusual counts."""
    agent.database.run(
        "operator",
        "select kakunin.import_events(%s, (select jsonb_agg(jsonb_build_object('occurred_at',"
        " to_char((now() - make_interval(hours => h)) at time zone interval '0', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'),"
        " 'event_type', 'api_call', 'metadata', jsonb_build_object('tool', 'usual', 'amount_usd', 100)))"
        " from generate_series(1, %s) h))",
        [agent.agent_id, days * 24],
    )


# Not to be stopped ------------------------------------------------------------------------------------


def test_g7_no_statement_after_the_one_that_made_it_critical(kit: Database, agent: Agent) -> None:
    """In its own transaction, in others that are open, and above READ COMMITTED."""
    with (
        session(agent) as other,
        session(agent, "repeatable read") as keeper,
        session(agent) as own,
    ):
        assert one(keeper, SERIAL) == agent.serial
        for _ in range(2):
            assert not append(own).get("revoked")
        assert append(own)["revoked"] is True
        assert one(own, SERIAL) is None
        own.execute("savepoint s")
        with refused("KA002"):
            append(own, "api_call")
        own.execute("rollback to s")
        assert one(other, SERIAL) == agent.serial  # not committed
        own.commit()
        for connection in (other, keeper):
            assert one(connection, SERIAL) is None
            with refused("KA002"):
                append(connection, "api_call")
    with refused("KA002"):
        kit.ticket(agent, "agent_1")


def test_g7_settling_waits_for_no_transaction_of_an_agent(kit: Database, agent: Agent) -> None:
    """One that made itself critical stays open, while what others committed is critical too."""
    with session(agent) as holder:
        side_by_side(agent, 2)
        assert append(holder)["revoked"] is True
        other = kit.agent("other")
        attempts(other, 3)
        settle(kit)
        assert status(other) == "revoked"
        assert status(agent) == "revoked"
        holder.commit()
    settle(kit)
    assert not stopped(agent)
    assert status(agent) == "revoked"


@pytest.mark.parametrize("level", ["read committed", "repeatable read"])
def test_g7_no_operator_waits_for_an_agent_that_made_itself_critical(
    kit: Database, agent: Agent, level: str
) -> None:
    """Everything an operator, registrar or worker does about it, while its transaction stays open."""
    agent_id = agent.agent_id
    renewed = _renewal(agent)
    with session(agent, level) as holder:
        append(holder, tool="t", venue="XLON", table="x")
        one(holder, "select kakunin.require_spend(1, 'XLON')")
        for _ in range(2):
            append(holder)
        assert one(holder, SERIAL) is None
        with kit.connect("operator", autocommit=True) as operator:
            operator.execute("set statement_timeout = '5s'; set lock_timeout = '2s'")
            one(operator, "select kakunin.set_agent_risk(%s, 'why', exempt => true)", [agent_id])
            one(operator, "select kakunin.set_agent_risk(%s, 'why', exempt => false)", [agent_id])
            one(operator, 'select kakunin.set_risk(\'{"mode": "observe"}\')')
            one(operator, 'select kakunin.set_risk(\'{"mode": "enforce"}\')')
            one(operator, "select kakunin.agent_risk(%s)", [agent_id])
            history(agent, 3)
            one(operator, "select kakunin.settle_risk()")
            one(operator, "select kakunin.suspend_agent(%s, 'why')", [agent_id])
            one(operator, "select kakunin.reinstate_agent(%s)", [agent_id])
            with kit.connect("registrar", autocommit=True) as registrar:
                registrar.execute("set statement_timeout = '5s'")
                one(registrar, "select kakunin.register_certificate(%s, '1 hour')", [renewed])
            one(operator, "select kakunin.revoke_certificate(%s)", [agent.serial])
            one(operator, "select kakunin.halt_agent(%s, 'why')", [agent_id])
            one(operator, "select kakunin.halt_agent(%s, 'why', terminate => true)", [agent_id])
    assert status(agent) == "revoked"


def _renewal(agent: Agent) -> bytes:
    from conftest import _ca, _signers

    return _ca().issue(agent.agent_id, next(_signers()).public_key()).der


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_g7_a_stop_that_commits_after_a_reinstatement_stops(kit: Database, agent: Agent, end: str) -> None:
    """An operator reinstates an agent whose open transaction has made itself critical."""
    with session(agent) as holder:
        for _ in range(3):
            append(holder)
        kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
        holder.execute(end)
    assert stopped(agent) is (end == "commit")
    assert status(agent) == ("revoked" if end == "commit" else "active")
    settle(kit)
    assert not stopped(agent)
    if end == "rollback":
        with session(agent) as connection:
            assert append(connection)["agent_score"] < 0.6


def test_g7_a_reinstatement_takes_no_stop_away_that_it_has_not_seen(kit: Database, agent: Agent) -> None:
    """What a snapshot cannot show is known by name, and the name must outlast a reinstatement that saw no stop."""
    with (
        session(agent, "repeatable read") as keeper,
        kit.connect("operator") as operator,
        kit.connect("installer", autocommit=True) as owner,
    ):
        assert one(keeper, SERIAL) == agent.serial
        operator.execute("set transaction isolation level repeatable read")
        one(operator, "select 1")
        attempts(agent, 3)
        assert one(keeper, SERIAL) is None
        with contextlib.suppress(psycopg.Error):
            operator.execute("select kakunin.reinstate_agent(%s)", [agent.agent_id])
            operator.commit()
        assert stopped(agent)
        assert one(owner, "select kakunin_private.is_stopped(%s)", [f"risk {agent.agent_id}"])
        assert one(keeper, SERIAL) is None


def test_g7_certain_in_one_chain_and_unusual_in_another_is_settled(kit: Database, agent: Agent) -> None:
    """Side by side, so that no event sees both."""
    kit.run(
        "installer",
        "insert into kakunin_private.chains (agent_id, sequence, head, risk_at, hour, hard, soft)"
        " select %s, 0, decode(repeat('00', 32), 'hex'), kakunin_private.clock(),"
        " date_bin('1 hour', kakunin_private.clock(), 'epoch'), h, s from (values (0.82, 0), (0, 1.6)) v(h, s)",
        [agent.agent_id],
    )
    settle(kit)
    assert status(agent) == "revoked"


def test_g7_backdated_events_are_a_history_too(
    kit: Database, agent: Agent, clock: Callable[[str], None]
) -> None:
    """An agent that says of all its events that they occurred an hour ago would never have a baseline, and without
    one nothing is unusual."""
    query = "select kakunin.audit_log_append('api_call', %s, null, %s::timestamptz - interval '1 hour')"
    for day in range(12):
        clock(f"{day} days")
        moment = kit.value("installer", "select kakunin_private.clock()")
        with kit.connect("gateway") as connection:
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
            result = one(connection, query, [json.dumps({"tool": "a" if day < 11 else "b"}), moment])
            connection.commit()
        assert ("novelty" in result["factors"]) is (day == 11), (day, result)


def test_g7_an_alert_is_one_review_whatever_the_chains(kit: Database, agent: Agent) -> None:
    """Ten transactions side by side have ten chains, and an operator has one review to decide."""
    attempts(agent, 2)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                append(stack.enter_context(session(agent)), "api_call")
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(session(agent)) for _ in range(5)]
        for connection in sessions:
            append(connection, "api_call")
        for connection in sessions:
            connection.commit()
    with contextlib.ExitStack() as stack:
        for connection in [stack.enter_context(session(agent)) for _ in range(5)]:
            append(connection, "api_call")
            connection.commit()
    query = "select count(*) from kakunin.risk_reviews where agent_id = %s"
    assert kit.value("operator", query, [agent.agent_id]) == 1


# To make scoring fail -----------------------------------------------------------------------------------


def test_g8_no_score_is_too_large_to_work_out(kit: Database, agent: Agent) -> None:
    """exp() of a large negative number is an error in Postgres, and in settle_risk() one for every agent."""
    kit.run(
        "installer",
        "insert into kakunin_private.chains (agent_id, sequence, head, risk_at, hour, hard)"
        " select %s, 0, decode(repeat('00', 32), 'hex'), kakunin_private.clock(),"
        " date_bin('1 hour', kakunin_private.clock(), 'epoch'), 6.9 * 200 from generate_series(1, 2)",
        [agent.agent_id],
    )
    assert kit.value("operator", "select kakunin.agent_risk(%s)", [agent.agent_id])["score"] == 1
    settle(kit)
    assert status(agent) == "revoked"


def test_g8_an_exempt_agent_can_always_append(kit: Database, agent: Agent) -> None:
    """Nothing stops it, so its excess only grows."""
    kit.run("operator", "select kakunin.set_agent_risk(%s, 'test', true, 10)", [agent.agent_id])
    with session(agent) as connection:
        connection.execute(
            "select kakunin.audit_log_append('transaction_anomaly', '{\"amount_usd\": 1e17}')"
            " from generate_series(1, 200)"
        )
        assert append(connection)["agent_score"] == 1
        connection.commit()
    assert settle(kit) == 0


def test_g8_a_score_fades_to_nothing(kit: Database, agent: Agent, clock: Callable[[str], None]) -> None:
    """Products too small for a number are an error in Postgres: years without an attempt must not end appends."""
    attempts(agent, 1)
    for years in (1, 2, 3, 4, 8):
        clock(f"{years} years")
        kit.run(
            "installer",
            "update kakunin_private.certificates set not_after = kakunin_private.clock() + '1 day' where serial = %s",
            [agent.serial],
        )
        kit.run("installer", "select kakunin.make_partitions()")
        with kit.connect("gateway") as connection:
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
            assert append(connection, "api_call")["agent_score"] == 0


@pytest.mark.parametrize("member", ["amount_usd", "rows"])
def test_g8_equal_amounts_for_ever(kit: Database, agent: Agent, member: str) -> None:
    """Their mean comes so near to the logarithm of 1 that its square is too small for a number, after a million."""
    with session(agent) as connection:
        append(connection, "api_call", amount_usd=2, rows=2)
        connection.commit()
    kit.run(
        "installer",
        "update kakunin_private.chains set amount_mean = 1e-200, rows_mean = 1e-200, amount_n = 2001, rows_n = 2001"
        " where agent_id = %s",
        [agent.agent_id],
    )
    with session(agent) as connection:
        append(connection, "api_call", **{member: 1})


METADATA = [
    "null", "[]", "5", '"amount_usd"', '["amount_usd", "venue"]', "{}", '{"amount_usd": null}',
    '{"amount_usd": 1e16000}', '{"amount_usd": 1e-16000}', '{"amount_usd": -1}', '{"amount_usd": "NaN"}',
    '{"amount_usd": "Infinity"}', '{"amount_usd": "1e5"}', '{"amount_usd": ""}', '{"amount_usd": "１２"}',
    '{"amount_usd": 0.000000000000000001}', '{"amount_usd": 999999999999999999.999999999999999999}',
    '{"amount_usd": "00000000000000000.0"}', '{"rows": 0.000000000000000001}', '{"rows": 0}', '{"rows": -0}',
    '{"rows": {"a": 1}}', '{"leverage": 1e17}', '{"leverage": [1]}', '{"venue": ""}', '{"venue": {}}',
    '{"venue": "\\u0001\\ud83d\\ude00"}', '{"tool": true, "action": [], "table": 7}', '{"amount_usd": 1, "amountUsd": "x"}',
    '{"venue": "' + "x" * 15000 + '"}', '{"a":' * 63 + "1" + "}" * 63,
]  # fmt: skip


def test_g8_whatever_the_metadata_the_event_is_scored(kit: Database) -> None:
    agent = kit.agent(
        financial_scope={"max_single_trade_usd": 0, "max_daily_usd": "x", "permitted_venues": {}}
    )
    kit.run("operator", "select kakunin.set_agent_risk(%s, 'test', true)", [agent.agent_id])
    history(agent)
    for kind in ("transaction_initiated", "never_heard_of", "x:" + "y" * 62):
        for metadata in METADATA:
            with session(agent) as connection:
                result = one(connection, APPEND, [kind, metadata])
                assert 0 <= result["score"] <= 1
                connection.commit()


@pytest.mark.parametrize(
    "moment",
    [
        "infinity",
        "-infinity",
        "294276-12-31",
        "4713-01-01 BC",
        "now() + interval '31 s'",
        "now() - interval '31 days'",
    ],
)
def test_g8_no_moment_but_one_of_late(agent: Agent, moment: str) -> None:
    value = f"({moment})" if "now" in moment else f"'{moment}'"  # as SQL
    with session(agent) as connection, refused("KA010"):
        connection.execute(f"select kakunin.audit_log_append('api_call', '{{}}', null, {value}::timestamptz)")


SETTINGS = [
    "extra_float_digits = -15", "timezone = 'X167Y-167,M1.1.0,M12.1.0'", "datestyle = 'SQL, DMY'", "intervalstyle = 'sql_standard'",
    "search_path = pg_temp, public", "plan_cache_mode = force_custom_plan", "work_mem = 64", "lc_numeric = 'C'",
    "standard_conforming_strings = off", "array_nulls = off", "transform_null_equals = on", "quote_all_identifiers = on",
    "bytea_output = 'escape'", "xmloption = document", "row_security = off", "enable_indexscan = off",
    "jit_above_cost = 0", "plpgsql.extra_errors = 'all'", "debug_parallel_query = on", "force_parallel_mode = on",
    "check_function_bodies = off", "client_min_messages = debug5",
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_g7_the_same_score_whatever_the_session_is_set_to(kit: Database, agent: Agent, setting: str) -> None:
    if setting.split("_")[0] in ("debug", "force") and setting.split(" ")[0] != (
        "force_parallel_mode" if kit.cluster.major < 16 else "debug_parallel_query"
    ):
        pytest.skip("a setting of another major")
    other = kit.agent(permitted_actions=["trade:*"], financial_scope=SCOPE)
    made = []
    for who in (other, agent):
        history(who)
        with session(who) as connection:
            if who is agent:
                connection.execute(f"set {setting}")
            result = [
                append(connection, "transaction_initiated", amount_usd=1234.56, tool="new"),
                append(connection, "api_call", rows=5),
                append(connection, "data_access", amount_usd=3),
                append(connection, "data_access", amount_usd=70),
                append(connection),
            ]
            connection.commit()
        state = kit.run(
            "postgres",
            "select round(hard::numeric, 6), round(soft::numeric, 6), counts, expected, round(amount_mean::numeric, 6),"
            " spent_usd, known from kakunin_private.chains where agent_id = %s and hour is not null",
            [who.agent_id],
        )
        fixed = ("score", "band", "factors", "agent_band", "revoked")
        made.append(([{k: r.get(k) for k in fixed} for r in result], state))
    assert made[0][0] == made[1][0]
    assert _close(made[0][1], made[1][1])


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    if a is None or isinstance(a, str):
        return bool(a == b)
    return abs(float(a) - float(b)) < 1e-3
