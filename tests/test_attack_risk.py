"""Attacks on risk scoring, as the agent's login with any SQL it likes: not to be scored or stopped, to harm
somebody else by it, to keep operators or the worker waiting, to make scoring fail, and to spend what the
certificate forbids."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from cluster import ROOT, Cluster
from conftest import Agent, Database, _ca, _signers, fresh_database, one, refused

Connection = psycopg.Connection[Any]

SERIAL = "select kakunin.current_cert_serial()"
APPEND = "select kakunin.audit_log_append(%s, %s)"
SCOPE = {
    "max_single_trade_usd": 1000,
    "daily_limit_usd": 3000,
    "permitted_venues": ["XLON"],
    "max_leverage_ratio": 2,
}
# One alone is medium, two are high by the settings here, three are critical.
ATTEMPT = "unauthorized_access_attempt"


@pytest.fixture(scope="module")
def kit(cluster: Cluster) -> Iterator[Database]:
    """A database of its own whose clock can be moved."""
    with fresh_database(cluster) as database:
        database.make_clock_movable()
        database.run("installer", "select kakunin.set_gateway_logins('{authenticator}')")
        database.run("operator", "select kakunin.set_risk('{\"high\": 0.7}')")
        database.run("postgres", "grant kakunin_agent to anon")
        yield database
        database.run("postgres", "revoke kakunin_agent from anon")


@pytest.fixture
def clock(kit: Database) -> Iterator[Callable[[str], None]]:
    """Moves the database's clock; it is back in its place afterwards."""
    yield kit.move_clock
    kit.move_clock("0")


@pytest.fixture
def agent(kit: Database) -> Agent:
    return kit.agent(permitted_actions=["trade:*"], financial_scope=SCOPE)


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
        " to_char((now() - make_interval(hours => h)) at time zone interval '0',"
        ' \'YYYY-MM-DD"T"HH24:MI:SS"Z"\'),'
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
    """Another certificate for it, DER, that is not registered."""
    return _ca().issue(agent.agent_id, next(_signers()).public_key()).der


@pytest.mark.parametrize("holder", ["operator", "registrar"])
def test_g7_settling_leaves_out_whom_somebody_is_deciding_about(
    kit: Database, agent: Agent, holder: str
) -> None:
    """A transaction about one agent that stays open must not keep the others of their revocation."""
    side, other = kit.agent("side"), kit.agent("other")
    side_by_side(side, 2)
    attempts(agent, 3)
    attempts(other, 3)
    with kit.connect(holder) as connection:
        for who in (agent, side):
            if holder == "operator":
                connection.execute("select kakunin.suspend_agent(%s, 'why')", [who.agent_id])
            else:
                overlap = "select kakunin.register_certificate(%s, '1 hour')"
                connection.execute(overlap, [_renewal(who)])
        settle(kit)
        assert stopped(agent)
        assert not stopped(other)
        assert status(other) == "revoked"
        assert status(agent) == "revoked"
        connection.rollback()
    assert settle(kit) == 2
    assert not stopped(agent)
    assert status(side) == "revoked"


@pytest.mark.parametrize("way", ["gateway", "claims"])
def test_g7_whatever_it_was_bound_by(kit: Database, agent: Agent, way: str) -> None:
    with kit.connect("gateway" if way == "gateway" else "authenticator") as connection:
        if way == "gateway":
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
        else:
            connection.execute("set local role anon")
            claims = json.dumps({"role": "anon", "kakunin_cert_serial": agent.serial})
            connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
        for _ in range(3):
            result = append(connection)
        assert result["revoked"] is True
        assert one(connection, SERIAL) is None
        with refused("KA002"):
            append(connection, "api_call")


def test_g7_every_certificate_of_the_agent_stops_and_is_revoked(kit: Database, agent: Agent) -> None:
    """The one that is superseded, the one after it, and one that is registered before the stop is settled."""
    renewed = kit.renew(agent, permitted_actions=["trade:*"])
    with session(agent) as old, session(renewed) as new:
        append(old)
        append(old)
        old.commit()
        bind(old, agent)
        assert append(new)["revoked"] is True
        new.commit()
        assert one(old, SERIAL) is None
    third = kit.renew(agent, permitted_actions=["trade:*"])
    with refused("KA002"):
        kit.ticket(third, "agent_1")
    settle(kit)
    kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    for who in (agent, renewed, third):
        with refused("KA002"):
            kit.ticket(who, "agent_1")


def test_g8_a_flood_grows_nothing_and_shuts_out_nobody(kit: Database, agent: Agent) -> None:
    """Of names nobody knows, in one transaction: its state stays of a size, and it is high and not revoked.
    Another agent, whose names are the same, is as it was."""
    history(agent)
    flood = (
        "select kakunin.audit_log_append('type_' || i, jsonb_build_object('tool', 't' || i, 'venue', 'XLON',"
        " 'table', 'x' || i, 'rows', i, 'amount_usd', 1)) from generate_series(1, 800) i"
    )
    with session(agent) as connection:
        connection.execute(flood)
        result = append(connection, "api_call")
        assert (result["agent_band"], result["agent_score"]) == ("high", 0.82)
        connection.commit()
    settle(kit)
    assert status(agent) == "active"
    sizes = (
        "select (select count(*) from kakunin_private.risk_known k where k.agent_id = c.agent_id),"
        " (select count(*) from jsonb_object_keys(c.counts)), octet_length(c.counts::text),"
        " (select count(*) from kakunin_private.risk_reviews r where r.agent_id = c.agent_id)"
        " from kakunin_private.chains c where c.agent_id = %s"
    )
    [(known, types, size, reviews)] = kit.run("postgres", sizes, [agent.agent_id])
    assert known <= 256 + 3
    assert types <= 7
    assert size < 2000
    assert reviews == 1
    with session(kit.agent("other")) as connection:
        assert append(connection, "api_call", tool="t1")["agent_score"] == 0


def test_limit_what_is_rolled_back_is_not_scored(kit: Database, agent: Agent) -> None:
    """An agent reads what an event would do and takes it back. What it attempted is for others to record."""
    with session(agent) as connection:
        for _ in range(5):
            connection.execute("savepoint s")
            append(connection)
            append(connection)
            assert append(connection)["revoked"] is True
            connection.execute("rollback to s")
        assert append(connection, "api_call")["agent_score"] == 0
        connection.commit()
    settle(kit)
    assert status(agent) == "active"


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
    """What a snapshot cannot show is known by name, and the name must outlast a reinstatement that saw no
    stop."""
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


@pytest.mark.parametrize(
    ("chains", "expected"), [("(1.0, 0), (1.0, 0)", "revoked"), ("(1.0, 0), (0, 1.6)", "active")]
)
def test_g7_certain_in_two_chains_is_settled_and_unusual_is_not(
    kit: Database, agent: Agent, chains: str, expected: str
) -> None:
    """Side by side, so that no event sees both."""
    kit.run(
        "installer",
        "insert into kakunin_private.chains (agent_id, sequence, head, risk_at, hour, hard, soft)"
        " select %s, 0, decode(repeat('00', 32), 'hex'), kakunin_private.clock(),"
        " date_bin('1 hour', kakunin_private.clock(), 'epoch'), h, s"
        f" from (values {chains}) v(h, s)",
        [agent.agent_id],
    )
    settle(kit)
    assert status(agent) == expected
    risk = kit.value("operator", "select kakunin.agent_risk(%s)", [agent.agent_id])
    assert (risk["band"], risk["score"]) == (
        ("critical", pytest.approx(0.8647, abs=1e-3)) if expected == "revoked" else ("high", 0.82)
    )


def test_g7_backdated_events_are_a_history_too(
    kit: Database, agent: Agent, clock: Callable[[str], None]
) -> None:
    """An agent that says of all its events that they occurred an hour ago would never have a baseline, and
    without one nothing is unusual."""
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
    """Products too small for a number are an error in Postgres: years without an attempt must not end
    appends."""
    attempts(agent, 1)
    kit.run(
        "installer", "update kakunin_private.chains set drift = 1.6 where agent_id = %s", [agent.agent_id]
    )
    for years in (1, 2, 3, 4, 8):
        clock(f"{years} years")
        kit.run(
            "installer",
            "update kakunin_private.certificates set not_after = kakunin_private.clock() + '1 day'"
            " where serial = %s",
            [agent.serial],
        )
        kit.run("installer", "select kakunin.make_partitions()")
        with kit.connect("gateway") as connection:
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
            assert append(connection, "api_call")["agent_score"] == 0


@pytest.mark.parametrize(
    ("kind", "member"), [("api_call", "amount_usd"), ("api_call", "rows"), ("data_mutation", "rows")]
)
def test_g8_equal_amounts_for_ever(kit: Database, agent: Agent, kind: str, member: str) -> None:
    """Their mean comes so near to the logarithm of 1 that its square is too small for a number, after a
    million."""
    with session(agent) as connection:
        append(connection, "api_call", amount_usd=2, rows=2)
        connection.commit()
    kit.run(
        "installer",
        "update kakunin_private.chains"
        " set usual_amount = row(2001, 1e-200, (usual_amount).square),"
        " usual_read = row(2001, 1e-200, (usual_read).square),"
        " usual_written = row(2001, 1e-200, (usual_written).square)"
        " where agent_id = %s",
        [agent.agent_id],
    )
    with session(agent) as connection:
        append(connection, kind, **{member: 1})


METADATA = [
    "null",
    "[]",
    "5",
    '"amount_usd"',
    '["amount_usd", "venue"]',
    "{}",
    '{"amount_usd": null}',
    '{"amount_usd": 1e16000}',
    '{"amount_usd": 1e-16000}',
    '{"amount_usd": -1}',
    '{"amount_usd": "NaN"}',
    '{"amount_usd": "Infinity"}',
    '{"amount_usd": "1e5"}',
    '{"amount_usd": ""}',
    '{"amount_usd": "\\uff11\\uff12"}',
    '{"amount_usd": 0.000000000000000001}',
    '{"amount_usd": 999999999999999999.999999999999999999}',
    '{"amount_usd": "00000000000000000.0"}',
    '{"rows": 0.000000000000000001}',
    '{"rows": 0}',
    '{"rows": -0}',
    '{"rows": {"a": 1}}',
    '{"leverage": 1e17}',
    '{"leverage": [1]}',
    '{"venue": ""}',
    '{"venue": {}}',
    '{"venue": "\\u0001\\ud83d\\ude00"}',
    '{"tool": true, "action": [], "table": 7}',
    '{"amount_usd": 1, "amountUsd": "x"}',
    '{"venue": "' + "x" * 15000 + '"}',
    '{"a":' * 63 + "1" + "}" * 63,
]


def test_g8_whatever_the_metadata_the_event_is_scored(kit: Database) -> None:
    agent = kit.agent(
        financial_scope={"max_single_trade_usd": 0, "daily_limit_usd": "x", "permitted_venues": {}}
    )
    kit.run("operator", "select kakunin.set_agent_risk(%s, 'test', true)", [agent.agent_id])
    history(agent)
    for kind in ("transaction_initiated", "data_mutation", "never_heard_of", "x:" + "y" * 62):
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
    "extra_float_digits = -15",
    "timezone = 'X167Y-167,M1.1.0,M12.1.0'",
    "datestyle = 'SQL, DMY'",
    "intervalstyle = 'sql_standard'",
    "search_path = pg_temp, public",
    "plan_cache_mode = force_custom_plan",
    "work_mem = 64",
    "lc_numeric = 'C'",
    "standard_conforming_strings = off",
    "array_nulls = off",
    "transform_null_equals = on",
    "quote_all_identifiers = on",
    "bytea_output = 'escape'",
    "xmloption = document",
    "row_security = off",
    "enable_indexscan = off",
    "jit_above_cost = 0",
    "plpgsql.extra_errors = 'all'",
    "debug_parallel_query = on",
    "force_parallel_mode = on",
    "check_function_bodies = off",
    "client_min_messages = debug5",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_g7_the_same_score_whatever_the_session_is_set_to(kit: Database, agent: Agent, setting: str) -> None:
    if setting.startswith("debug_parallel_query" if kit.cluster.major < 16 else "force_parallel_mode"):
        pytest.skip("it has another name here")
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
            "select round(hard::numeric, 6), round(soft::numeric, 6), counts, expected,"
            " round((usual_amount).mean::numeric, 6), spent_usd, known"
            " from kakunin_private.chains where agent_id = %s and hour is not null",
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


# To spend more, and to write when high -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(kit: Database) -> Database:
    """The two templates as they stand, by their owner, and a table whose amounts and venues are whatever is
    given."""
    with kit.connect("app", autocommit=True) as app:
        for name in ("spend_limits", "risk_adaptive"):
            app.execute((ROOT / f"sql/policies/{name}.sql").read_bytes())
        app.execute("create table loose (amount numeric, venue text, leverage numeric)")
        app.execute("alter table loose enable row level security")
        app.execute(
            "create policy loose_all on loose for all to kakunin_agent using (true) with check (true)"
        )
        app.execute(
            "create policy loose_spend on loose as restrictive for insert to public"
            " with check (kakunin.require_spend(amount, venue, null, leverage))"
        )
        app.execute("grant select, insert, update, delete on loose to kakunin_agent")
    return kit


SPEND = "insert into loose values (%s::numeric, %s, %s::numeric)"


@pytest.mark.parametrize(
    ("amount", "venue", "leverage"),
    [
        ("1001", "XLON", None),
        ("NaN", "XLON", None),
        ("Infinity", "XLON", None),
        ("-Infinity", "XLON", None),
        ("-1", "XLON", None),
        ("-1e-16383", "XLON", None),
        ("1e131071", "XLON", None),
        ("1000.00000000000000000000000000000001", "XLON", None),
        (None, "XLON", None),
        ("1", None, None),
        ("1", "", None),
        ("1", "xlon", None),
        ("1", "XLON ", None),
        ("1", "\uff38\uff2c\uff2f\uff2e", None),
        ("1", "XL\u041eN", None),
        ("1", "X\u200bLON", None),
        ("1", '["XLON"]', None),
        ("1", "permitted_venues", None),
        ("1", "XLON", "2.0000000000000000000000001"),
        ("1", "XLON", "NaN"),
        ("1", "XLON", "-1"),
        ("1", "XLON", "Infinity"),
    ],
)
def test_g8_no_amount_or_venue_but_a_permitted_one(
    tables: Database, agent: Agent, amount: str | None, venue: str | None, leverage: str | None
) -> None:
    with session(agent) as connection:
        connection.execute("savepoint s")
        with refused("KA009"):
            connection.execute(SPEND, [amount, venue, leverage])
        connection.execute("rollback to s")
        connection.execute(SPEND, ["1000", "XLON", "2"])  # as it is permitted


WAYS_TO_SPEND = {
    "rows of one statement": "insert into loose select 1000, 'XLON' from generate_series(1, 4)",
    "copy": "copy loose from stdin",
    "functions": "do $$begin for i in 1..4 loop insert into loose values (1000, 'XLON'); end loop; end$$",
    "a CTE": (
        "with a as (insert into loose values (1000, 'XLON'), (1000, 'XLON')),"
        " b as (insert into loose values (1000, 'XLON'))"
        " insert into loose values (1000, 'XLON')"
    ),
    "exceptions": (
        "do $$begin for i in 1..4 loop begin insert into loose values (1000, 'XLON');"
        " begin insert into loose values (9999, 'XLON'); exception when others then null; end;"
        " end; end loop; end$$"
    ),
    "many small ones": "insert into loose select 0.5 + 1e-9, 'XLON' from generate_series(1, 6000)",
    "merge": (
        "merge into loose using generate_series(1, 4) on false"
        " when not matched then insert values (1000, 'XLON')"
    ),
    "other days of the session": (
        "set local timezone = 'Pacific/Kiritimati'; insert into loose values (1000, 'XLON'), (1000, 'XLON');"
        " set local timezone = 'Etc/GMT+12'; insert into loose values (1000, 'XLON'), (1000, 'XLON')"
    ),
    "counters of its own": (
        "create temp table spending (agent_id uuid, day timestamptz, amount_usd numeric);"
        " set search_path = pg_temp, kakunin_private;"
        " insert into public.loose select 1000, 'XLON' from generate_series(1, 4)"
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_SPEND)
def test_g8_no_more_in_a_day_than_the_certificate_has(tables: Database, agent: Agent, way: str) -> None:
    """Neither in one transaction, whatever it is made of, nor in the ones after it."""
    with session(agent) as connection:
        if way == "copy":  # refused by Postgres where row security applies
            with refused("0A000"):
                connection.execute(WAYS_TO_SPEND[way])
        else:
            with refused("KA009"):
                connection.execute(WAYS_TO_SPEND[way])
    with session(agent) as connection:
        for _ in range(3):
            connection.execute(SPEND, ["1000", "XLON", None])
        connection.commit()
    for _ in range(2):
        with session(agent) as connection, refused("KA009"):
            connection.execute(SPEND, ["0.01", "XLON", None])


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_g8_two_transactions_do_not_spend_the_same_limit(tables: Database, agent: Agent, level: str) -> None:
    """The second waits for the first, also with a snapshot from before it; savepoints give back what they
    undo."""
    with session(agent, level) as one_, session(agent, level) as two:
        one(two, "select count(*) from loose")
        one_.execute(SPEND, ["1000", "XLON", None])
        one_.execute("savepoint s")
        one_.execute(SPEND, ["1000", "XLON", None])
        one_.execute("rollback to s")
        one_.execute(SPEND, ["1000", "XLON", None])
        two.execute("set lock_timeout = '300ms'")
        two.execute("savepoint s")
        with refused("55P03"):
            two.execute(SPEND, ["1000", "XLON", None])
        two.execute("rollback to s")
        one_.commit()
        if level == "read committed":
            two.execute(SPEND, ["1000", "XLON", None])
            with refused("KA009"):
                two.execute(SPEND, ["0.01", "XLON", None])
        else:
            with refused("40001"):
                two.execute(SPEND, ["1000", "XLON", None])


def test_g8_a_renewed_certificate_is_no_new_day(tables: Database, agent: Agent) -> None:
    with session(agent) as connection:
        for _ in range(3):
            connection.execute(SPEND, ["1000", "XLON", None])
        connection.commit()
    renewed = tables.renew(agent, permitted_actions=["trade:*"], financial_scope=SCOPE)
    for who in (agent, renewed):
        with session(who) as connection, refused("KA009"):
            connection.execute(SPEND, ["1", "XLON", None])


def test_g8_an_agent_observes_nothing_but_its_own_calls(tables: Database, agent: Agent) -> None:
    """observe is what the policy says; called by hand it permits nothing, and no other agent has less to
    spend."""
    other = tables.agent(financial_scope=SCOPE)
    with session(agent) as connection:
        one(connection, "select kakunin.require_spend(1e17, 'XLON', observe => true)")
        with refused("KA009"):
            connection.execute(SPEND, ["2000", "XLON", None])
    with session(other) as connection:
        connection.execute(SPEND, ["1000", "XLON", None])


def test_g6_what_is_observed_is_bounded(tables: Database, agent: Agent) -> None:
    """Neither entries without an end, nor another chain of decisions for each transaction that keeps its
    snapshot."""
    query = "select count(*) from kakunin_private.chains"
    before = tables.value("postgres", query)
    for _ in range(5):
        with session(agent, "repeatable read") as connection:
            for amount in ("-1e131071", "0." + "1" * 16000, "1e17"):
                others = f"'v' || repeat('x', 99999), 'i', 1.{'1' * 9000}"
                one(connection, f"select kakunin.require_spend({amount}, {others}, observe => true)")
            connection.commit()
    longest = "select max(octet_length(entry)) from kakunin.audit_log where event_type = 'policy.observed'"
    assert tables.value("auditor", longest) < 2000
    assert tables.value("postgres", query) <= before + 1


NOTE = "insert into agent_notes (content) values ('x')"


def test_g8_read_only_from_the_next_statement_on(tables: Database, agent: Agent) -> None:
    """With plans and functions of before."""
    with session(agent) as connection:
        connection.prepare_threshold = None  # or psycopg deallocates them when it rolls back
        connection.execute("prepare note as insert into agent_notes (content) values ('p')")
        connection.execute("prepare change as update agent_notes set content = 'p'")
        connection.execute(
            "create function pg_temp.note() returns void language plpgsql as"
            " $$begin insert into public.agent_notes (content) values ('f'); end$$"
        )
        for _ in range(7):  # generic plans
            for query in ("execute note", "execute change", "select pg_temp.note()", NOTE):
                connection.execute(query)
        for _ in range(2):
            result = append(connection)
        assert result["agent_band"] == "high"
        assert one(connection, "select count(*) from agent_notes") == 21
        for query in (
            "execute note", "execute change", "select pg_temp.note()", NOTE, "delete from agent_notes",
            "with w as (delete from agent_notes returning 1) select count(*) from w",
            "do $$begin insert into agent_notes (content) values ('d'); end$$",
            f"set local plan_cache_mode = force_generic_plan; {NOTE}",
            f"set local row_security = off; {NOTE}",
            "merge into agent_notes n using (select 1) s on true when matched then delete",
        ):  # fmt: skip
            connection.execute("savepoint s")
            with refused("KA011", "42501"):
                connection.execute(query)
            connection.execute("rollback to s")
        assert one(connection, "select count(*) from agent_notes") == 21


def export(connection: Connection) -> str:
    connection.execute("set transaction isolation level repeatable read")
    return str(one(connection, "select pg_export_snapshot()"))


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_g8_a_snapshot_of_before_writes_no_more(tables: Database, agent: Agent, level: str) -> None:
    """What was high since a snapshot was taken is not seen in it, and an exported one is handed to ever new
    transactions. Reading goes on."""
    with tables.connect("agent_1") as exporter, session(agent, level) as kept:
        snapshot = export(exporter)
        kept.execute("savepoint s")
        with refused("KA010"):  # nothing has happened yet, which no snapshot can know
            kept.execute(NOTE)
        kept.execute("rollback to s")
        attempts(agent, 2)
        with in_snapshot(agent, snapshot) as connection:
            for each in (connection, kept):
                assert one(each, "select count(*) from agent_notes") == 0
                with refused("KA010"):
                    each.execute(NOTE)
    with session(agent, level) as connection, refused("KA011"):
        connection.execute(NOTE)


def test_g8_a_statement_that_began_before_writes_no_more(tables: Database, agent: Agent) -> None:
    """The score is that of the moment it is asked for, which is when the first row is about to be written."""
    with session(agent) as connection, tables.connect("postgres", autocommit=True) as looker:
        failed: list[psycopg.Error] = []

        def write() -> None:
            try:
                connection.execute(
                    "insert into agent_notes (content) select 'x' from (select pg_sleep(2) offset 0) s"
                )
            except psycopg.Error as error:
                failed.append(error)

        began = threading.Thread(target=write)
        began.start()
        while one(looker, "select count(*) from pg_stat_activity where wait_event = 'PgSleep'") == 0:
            pass
        attempts(agent, 2)
        assert began.is_alive()
        began.join()
        assert [error.sqlstate for error in failed] == ["KA011"]


def test_g8_a_snapshot_of_when_it_was_observed_permits_nothing(tables: Database) -> None:
    """Until then its transactions go on, whatever they keep: nothing is to fail by what only observes."""
    agent = tables.agent(financial_scope={"max_single_trade_usd": 1000})  # a day's limit has a row to lock
    trade = "insert into agent_trades (amount_usd, venue) values (5000, 'XLON')"
    tables.run("operator", 'select kakunin.set_risk(\'{"mode": "observe"}\')')
    try:
        with tables.connect("agent_1") as exporter:
            snapshot = export(exporter)
            for _ in range(2):
                with in_snapshot(agent, snapshot) as connection:
                    connection.execute(trade)
                    connection.execute(NOTE)
                    connection.commit()
            tables.run("operator", 'select kakunin.set_risk(\'{"mode": "enforce"}\')')
            for query, state in ((trade, "KA009"), (NOTE, "KA010")):
                with in_snapshot(agent, snapshot) as connection, refused(state):
                    connection.execute(query)
    finally:
        tables.run("operator", 'select kakunin.set_risk(\'{"mode": "enforce"}\')')
    observed = (
        "select metadata ->> 'code' from kakunin.audit_log"
        " where event_type = 'policy.observed' and agent_id = %s order by event_id"
    )
    codes = [row[0] for row in tables.run("auditor", observed, [agent.agent_id])]
    assert codes == ["KA009", "KA010"] * 2


@pytest.mark.parametrize("how", ["exempt", "observed"])
def test_g7_a_snapshot_in_which_nothing_followed_is_settled(kit: Database, agent: Agent, how: str) -> None:
    """One transaction with all its attempts, in the snapshot of when it was let do as it likes."""
    change = {
        "exempt": "select kakunin.set_agent_risk(%s, 'test', exempt => {})",
        "observed": "select kakunin.set_risk(jsonb_build_object('mode', {})) where %s is not null",
    }[how]
    begin, end = ("true", "false") if how == "exempt" else ("'observe'", "'enforce'")
    kit.run("operator", change.format(begin), [agent.agent_id])
    try:
        with kit.connect("agent_1") as exporter:
            snapshot = export(exporter)
            kit.run("operator", change.format(end), [agent.agent_id])
            with in_snapshot(agent, snapshot) as connection:
                for _ in range(4):
                    assert append(connection).get("revoked", False) is False
                connection.commit()
    finally:
        kit.run("operator", change.format(end), [agent.agent_id])
    settle(kit)
    assert status(agent) == "revoked"


@contextlib.contextmanager
def in_snapshot(agent: Agent, snapshot: str) -> Iterator[Connection]:
    ticket = agent.database.ticket(agent, "agent_1")
    with agent.database.connect("agent_1") as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute(f"set transaction snapshot '{snapshot}'")
        connection.execute("select kakunin.bind_session(%s)", [ticket])
        yield connection
        connection.rollback()


def test_g7_attempts_in_an_old_snapshot_are_settled(kit: Database, agent: Agent) -> None:
    """Handed to one transaction after another, with the chains it shows held by another: none sees the ones
    before it, and none is critical. settle_risk() sees them all, and the name of the suspension is seen
    in every snapshot."""
    with session(agent) as holder, kit.connect("agent_1") as exporter:
        append(holder, "api_call")
        holder.commit()
        bind(holder, agent)
        append(holder, "api_call")
        exporter.execute("set transaction isolation level repeatable read")
        snapshot = one(exporter, "select pg_export_snapshot()")
        for _ in range(2):
            with in_snapshot(agent, snapshot) as connection:
                for _ in range(2):
                    assert append(connection)["agent_band"] != "critical"
                connection.commit()
        settle(kit)
        with refused("KA008", "KA002"), in_snapshot(agent, snapshot) as connection:
            append(connection, "api_call")
        with refused("KA002"):
            append(holder, "api_call")


@pytest.mark.parametrize("times", [1, 2])
def test_g7_a_snapshot_from_before_a_reinstatement_serves_nobody(
    kit: Database, agent: Agent, times: int
) -> None:
    """What is appended in one would be of the epoch before the reinstatement, which nobody counts."""
    with kit.connect("agent_1") as exporter, session(agent, "repeatable read") as keeper:
        snapshot = export(exporter)
        assert one(keeper, SERIAL) == agent.serial
        for _ in range(times):
            agent.suspend()
            kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
        assert one(keeper, SERIAL) is None
        with refused("KA008"):
            append(keeper)
        with refused("KA008"), in_snapshot(agent, snapshot):
            pass
        with kit.connect("gateway") as gateway:
            gateway.execute("set transaction isolation level repeatable read")
            gateway.execute(f"set transaction snapshot '{snapshot}'")
            with refused("KA008"):
                gateway.execute("select kakunin.bind_serial(%s)", [agent.serial])
    with session(agent, "repeatable read") as connection:  # of now
        assert append(connection)["agent_score"] < 0.6


def test_g7_a_reinstated_agent_is_not_high_at_once_by_its_drift(
    kit: Database, agent: Agent, clock: Callable[[str], None]
) -> None:
    """What it did was looked at. What it does from then on is compared as before."""
    rows = (
        "insert into kakunin_private.risk_hours (agent_id, hour, chain_id, event_type, events)"
        " select %s, date_bin('1 hour', now(), 'epoch') - make_interval(hours => h), 0,"
        " case when h between %s and %s then 'data_mutation' else 'api_call' end, 4"
        " from generate_series(%s::integer, %s::integer) h"
    )
    kit.run("installer", rows, [agent.agent_id, 1, 168, 1, 1200])

    def score() -> Any:
        with kit.connect("gateway") as connection:
            connection.execute("select kakunin.bind_serial(%s)", [agent.serial])
            result = append(connection, "api_call")
            connection.commit()
        return result

    assert score()["agent_band"] == "high"
    with session(agent) as holder:  # the operator waits for nobody, and what is held keeps its drift
        append(holder, "api_call")
        kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert score()["agent_score"] == 0
    risk = kit.value("operator", "select kakunin.agent_risk(%s)", [agent.agent_id])
    assert (risk["band"], risk["drift"]) == ("low", "insufficient_data")
    kit.run("installer", rows, [agent.agent_id, -72, 0, -48, -1])
    clock("50 hours")
    assert score()["agent_band"] == "high"


def test_g7_prepared_the_stop_waits_for_nobody(kit: Database, agent: Agent) -> None:
    """A transaction that made itself critical notifies, and Postgres prepares none that does."""
    with session(agent) as connection:
        for _ in range(3):
            append(connection)
        with refused("0A000"):
            connection.execute("prepare transaction 'critical'")
    with session(agent) as connection:
        append(connection)
        connection.execute(f"prepare transaction 'high {agent.agent_id}'")
    try:
        side_by_side(agent, 2)
        settle(kit)
        assert status(agent) == "revoked"
    finally:
        with kit.connect("agent_1", autocommit=True) as connection:
            connection.execute(f"rollback prepared 'high {agent.agent_id}'")


def test_g7_a_binding_of_before_is_none_after_the_stop(kit: Database, agent: Agent) -> None:
    """Local or the session's, copied, put back, of another backend; and a ticket."""
    ticket = kit.ticket(agent, "agent_1")
    with kit.connect("agent_1", autocommit=True) as idle, session(agent) as opened:
        bind(idle, agent, is_local=False)
        copy = one(idle, "select current_setting('kakunin.session')")
        attempts(agent, 3)
        for connection in (idle, opened):
            assert one(connection, SERIAL) is None
            one(connection, "select set_config('kakunin.session', %s, false)", [copy])
            assert one(connection, SERIAL) is None
            answer = one(connection, "select kakunin.verify_agent_scope('trade:x')")
            assert answer["allowed"] is False
        with refused("KA002"):
            idle.execute("select kakunin.bind_session(%s)", [ticket])
        settle(kit)
        assert one(idle, SERIAL) is None


# Others -------------------------------------------------------------------------------------------------

FORBIDDEN = [
    'select kakunin.set_risk(\'{"mode": "observe"}\')',
    "select kakunin.set_agent_risk('$agent', 'why', true)",
    "select kakunin.settle_risk()",
    "select kakunin.review_risk(1, 'fine')",
    "select kakunin.import_events('$agent', '[]')",
    "select kakunin.agent_risk('$agent')",
    "select * from kakunin.risk_reviews",
    "select * from kakunin_private.risk_settings",
    "update kakunin_private.chains set hard = 0",
    "select kakunin_private.react(null, null, null, true)",
    "select kakunin_private.clock()",
    'drop domain kakunin_private."risk $agent"',
    'create domain kakunin_private."risk x" as boolean',
    "set role kakunin_operator",
    "lock table kakunin_private.risk_stops in access exclusive mode",
    "copy kakunin_private.risk_stops from stdin",
    "select setval('kakunin_private.risk_reviews_review_id_seq', 1)",
]


@pytest.mark.parametrize("query", FORBIDDEN)
def test_g7_an_agent_decides_nothing_about_risk(kit: Database, agent: Agent, query: str) -> None:
    with session(agent) as connection, refused("42501"):
        connection.execute(query.replace("$agent", str(agent.agent_id)).encode())


def test_g7_what_an_agent_does_is_no_other_agents(kit: Database, agent: Agent) -> None:
    """Whatever it names in its events; and views show it its own."""
    other = kit.agent("victim", permitted_actions=["trade:*"], financial_scope=SCOPE)
    history(other)
    with session(other) as connection:
        append(connection, "api_call", tool="usual")
        connection.commit()
    states = [
        "select * from kakunin_private.chains where agent_id = %s",
        "select * from kakunin_private.risk_hours where agent_id = %s order by hour, event_type",
        "select * from kakunin_private.risk_known where agent_id = %s order by digest",
        "select * from kakunin_private.spending where agent_id = %s",
    ]
    before = [kit.run("postgres", query, [other.agent_id]) for query in states]
    named = {"agent_id": str(other.agent_id), "serial": other.serial, "kid": other.serial, "amount_usd": 1e17}
    with session(agent) as connection:
        connection.execute("select set_config('request.jwt.claims', %s, true)",
                           [json.dumps({"kakunin_cert_serial": other.serial})])  # fmt: skip
        append(connection, "transaction_initiated", **named)
        for view in ("risk_by_hour", "risk_by_day", "risk_contributions", "audit_log"):
            assert one(connection, f"select count(*) from kakunin.{view}") == 0  # it has revoked itself
        connection.commit()
    settle(kit)
    assert [kit.run("postgres", query, [other.agent_id]) for query in states] == before
    assert (status(agent), status(other)) == ("revoked", "active")
    with session(other) as connection:
        seen = connection.execute("select distinct agent_id from kakunin.risk_by_hour").fetchall()
    assert seen == [(other.agent_id,)]


@pytest.mark.parametrize(
    ("action", "allowed"),
    [
        ("trade:x", True),
        ("trade:x:y", True),
        ("trade:", False),
        ("trade", False),
        ("TRADE:x", False),
        ("xtrade:x", False),
        (" trade:x", False),
        ("*", False),
        ("%", False),
        ("tr_de:x", False),
        ("", False),
        (None, False),
        ("read", True),
        ("reader", False),
        ("rea", False),
        ("read\n", False),
    ],
)
def test_g8_scopes_are_exact_or_below_a_prefix(kit: Database, action: str | None, allowed: bool) -> None:
    agent = kit.agent(permitted_actions=["trade:*", "read"], financial_scope=SCOPE)
    with session(agent) as connection:
        answer = one(connection, "select kakunin.verify_agent_scope(%s)", [action])
        assert answer["allowed"] is allowed
        assert (answer["code"] is None) is allowed


def test_g8_no_collation_makes_venues_or_actions_equal(tables: Database, agent: Agent) -> None:
    """A nondeterministic one, where the server has ICU."""
    with session(agent) as connection:
        try:
            connection.execute(
                "create collation pg_temp.loose (provider = icu, locale = 'und-u-ks-level1',"
                " deterministic = false)"
            )
        except psycopg.errors.FeatureNotSupported:
            pytest.skip("a server without ICU")
        for call in ("verify_agent_scope('TRADE:X' collate pg_temp.loose)",
                     "verify_agent_scope('trade:x', 1, 'xlon' collate pg_temp.loose)"):  # fmt: skip
            connection.execute("savepoint s")
            with contextlib.suppress(psycopg.Error):
                assert one(connection, f"select kakunin.{call}")["allowed"] is False
            connection.execute("rollback to s")
