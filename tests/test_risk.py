"""Risk: how events are scored, how an agent's score rolls, and what follows from it, in whose transaction."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kakunin_db import errors
from kakunin_db.resources import sql_dir

Connection = psycopg.Connection[Any]

APPEND = "select kakunin.audit_log_append(%s, %s::jsonb, null, %s)"
SERIAL = "select kakunin.current_cert_serial()"
SETTLE = "select kakunin.settle_risk()"
ATTEMPT = "unauthorized_access_attempt"
# The article's table, and what is not in it.
BANDS = {
    "api_call": "low",
    "data_access": "low",
    "data_mutation": "medium",
    "transaction_initiated": "medium",
    "unauthorized_access_attempt": "high",
    "transaction_anomaly": "high",
    "anything_else": "medium",
}
SCOPE = {
    "max_single_trade_usd": 1000,
    "daily_limit_usd": 3000,
    "max_leverage_ratio": 2,
    "permitted_venues": ["XLON"],
    "permitted_instruments": ["GILT"],
}
# Tomorrow at ten (UTC): hours and days begin where the tests say, and certificates are good by then.
NOON = dt.datetime.now(dt.timezone.utc).replace(hour=10, minute=0, second=0, microsecond=0) + dt.timedelta(1)
HOUR, DAY, MINUTE = dt.timedelta(hours=1), dt.timedelta(days=1), dt.timedelta(minutes=1)


# Helpers --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(*states: str, match: str | None = None) -> Iterator[None]:
    with pytest.raises(psycopg.Error, match=match) as caught:
        yield
    assert caught.value.sqlstate in states, caught.value


def one(connection: Connection, query: str, params: Any = None) -> Any:
    row = connection.execute(query, params).fetchone()
    assert row
    return row[0]


def append(
    session: Connection, event_type: str, metadata: Any = None, at: dt.datetime | None = None
) -> dict[str, Any]:
    """`metadata` as text is sent as it stands."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata or {})
    return one(session, APPEND, [event_type, text, at])


class Kit:
    """A database whose clock stands still where a test puts it, and a gateway that acts for any agent."""

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.connect("installer") as owner:
            owner.execute("create table kakunin_private.moment (at timestamptz)")
            owner.execute("insert into kakunin_private.moment values (%s)", [NOON])
            owner.execute(
                "create or replace function kakunin_private.clock() returns timestamptz language sql volatile"
                " parallel safe as 'select coalesce(at, clock_timestamp()) from kakunin_private.moment'"
            )
        self.gateway = database.connect("gateway", autocommit=True)
        self.installer = database.connect("installer", autocommit=True)
        self.operator = database.connect("operator", autocommit=True)
        self.at = NOON

    def close(self) -> None:
        for connection in (self.gateway, self.installer, self.operator):
            connection.close()

    def move(self, at: dt.datetime) -> None:
        self.installer.execute("update kakunin_private.moment set at = %s", [at])
        self.at = at

    def ask(self, query: str, params: Any = None) -> Any:
        """As the operator."""
        return one(self.operator, query, params)

    def agent(self, **certificate: Any) -> Agent:
        return self.database.agent("agent", **certificate)

    @contextlib.contextmanager
    def bound(self, agent: Agent, login: str = "gateway", isolation: str = "") -> Iterator[Connection]:
        """A transaction of its own on a connection of its own; what it did is committed if nothing raises."""
        with self.database.connect(login) as session:
            if isolation:
                session.execute(f"set transaction isolation level {isolation}")
            bind(session, agent)
            yield session

    def event(
        self, agent: Agent, event_type: str, metadata: Any = None, at: dt.datetime | None = None
    ) -> dict[str, Any]:
        """One event in a transaction of its own."""
        with self.gateway.transaction():
            bind(self.gateway, agent)
            return append(self.gateway, event_type, metadata, at)

    def call(self, agent: Agent, query: str, params: Any = None) -> Any:
        with self.gateway.transaction():
            bind(self.gateway, agent)
            return one(self.gateway, query, params)

    def profile(self, agent: Agent) -> dict[str, Any]:
        return self.ask("select kakunin.agent_risk(%s)", [agent.agent_id])

    def entries(self, agent: Agent) -> list[dict[str, Any]]:
        query = "select entry::jsonb from kakunin_private.ledger where agent_id = %s order by event_id"
        return [row[0] for row in self.installer.execute(query, [agent.agent_id])]

    def types(self, agent: Agent) -> list[str]:
        return [entry["event_type"] for entry in self.entries(agent)]

    def status(self, agent: Agent) -> str:
        return self.ask("select kakunin.verify_certificate(%s)", [agent.serial])["status"]

    def reviews(self, agent: Agent) -> list[tuple[Any, ...]]:
        query = "select review_id, score, decision from kakunin.risk_reviews where agent_id = %s order by 1"
        return self.operator.execute(query, [agent.agent_id]).fetchall()

    def history(self, agent: Agent, days: int = 10, an_hour: int = 1, **metadata: Any) -> None:
        """The same events every hour until now, brought in by the operator."""
        events = [
            {
                "occurred_at": (self.at - hours * HOUR + 5 * MINUTE).isoformat(),
                "event_type": "api_call",
                "metadata": metadata,
            }
            for hours in range(1, days * 24 + 1)
            for _ in range(an_hour)
        ]
        for first in range(0, len(events), 10_000):
            part = json.dumps(events[first : first + 10_000])
            self.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, part])


def bind(session: Connection, agent: Agent) -> None:
    session.execute("select kakunin.bind_serial(%s)", [agent.serial])


@pytest.fixture(scope="module")
def module_kit(cluster: Cluster) -> Iterator[Kit]:
    with fresh_database(cluster) as database:
        kit = Kit(database)
        yield kit
        kit.close()


@pytest.fixture
def kit(module_kit: Kit) -> Iterator[Kit]:
    """With the settings and the clock as they were at the beginning."""
    settings_now = module_kit.ask("select kakunin.set_risk('{}')")
    module_kit.move(NOON)
    module_kit.operator.execute(SETTLE)
    yield module_kit
    module_kit.operator.execute("select kakunin.set_risk(%s)", [json.dumps(settings_now)])


def excess(score: float) -> float:
    return -math.log(1 - min(max(score - 0.525, 0) / 0.475, 0.999))


def rolling(*events: tuple[float, dt.timedelta]) -> float:
    """R of events by score and age, by its definition: a product over all of them."""
    product = 1.0
    for score, age in events:
        product *= math.exp(-excess(score)) ** (0.5 ** (age / DAY))
    return 1 - product


# The score of an event ------------------------------------------------------------------------------


@pytest.mark.parametrize(("event_type", "band"), BANDS.items())
def test_an_event_has_the_band_of_its_type(kit: Kit, event_type: str, band: str) -> None:
    risk = kit.event(kit.agent(), event_type, {"tool": "search"})
    assert (risk["band"], risk["factors"]) == (band, {})
    assert risk["agent_score"] == pytest.approx(rolling((risk["score"], 0 * DAY)), abs=1e-4)


def test_append_says_what_became_of_event_and_agent(kit: Kit) -> None:
    agent = kit.agent()
    risk = kit.event(agent, ATTEMPT)
    assert risk.keys() >= {"score", "band", "factors", "agent_score", "agent_band", "event_id", "hash"}
    assert (risk["score"], risk["band"], risk["agent_band"]) == (0.75, "high", "medium")
    assert risk["agent_score"] == pytest.approx(0.4737)
    assert kit.profile(agent)["score"] == risk["agent_score"]


@pytest.mark.parametrize(
    ("metadata", "violated", "score"),
    [
        ({"amount_usd": 1000, "venue": "XLON", "instrument": "GILT", "leverage": 2}, [], 0.3),
        ({"amount_usd": 1000.01}, ["amount"], 0.75),
        ({"amountUsd": "9999"}, ["amount", "daily_amount"], 0.75),
        ({"amount_usd": 1, "amountUsd": 1001}, ["amount"], 0.75),  # two spellings: the larger counts
        ({"amount_usd": 10000}, ["amount", "daily_amount"], 0.95),
        ({"amount_usd": 999999999999999999}, ["amount", "daily_amount"], 0.95),
        ({"amount_usd": 3001}, ["amount", "daily_amount"], 0.75),
        ({"leverage": 2.5}, ["leverage"], 0.75),
        ({"leverage": 20}, ["leverage"], 0.95),
        *[
            ({"venue": venue}, ["venue"], 0.75)
            for venue in ("XLO", "XLON2", "xlon", "XLON ", "*", "\uff38LON")
        ],
        ({"instrument": "GILTS"}, ["instrument"], 0.75),
        ({"symbol": "GIL"}, ["instrument"], 0.75),
        ({"venue": "XPAR", "instrument": "X", "amount_usd": 1001}, ["amount", "instrument", "venue"], 0.75),
    ],
)
def test_the_certificates_financial_scope(
    kit: Kit, metadata: dict[str, Any], violated: list[str], score: float
) -> None:
    agent = kit.agent(financial_scope=SCOPE)
    risk = kit.event(agent, "transaction_initiated", metadata)
    assert (sorted(risk["factors"]), risk["score"]) == (violated, score)
    if score > 0.85:
        assert (risk["band"], risk["revoked"], kit.status(agent)) == ("critical", True, "revoked")
    else:
        assert (risk["band"], kit.status(agent)) == ("high" if violated else "medium", "active")


@pytest.mark.parametrize(
    "scope", [{"max_single_trade_usd": "many"}, {"max_single_trade_usd": -1}, {"daily_limit_usd": []}]
)
def test_a_limit_that_cannot_be_read_permits_nothing(kit: Kit, scope: dict[str, Any]) -> None:
    assert kit.event(kit.agent(financial_scope=scope), "transaction_initiated", {"amount_usd": 1})["revoked"]


def test_a_limit_that_is_not_known_permits_nothing(kit: Kit) -> None:
    """It is not registered any more: written here as a dump from before would have it."""
    agent = kit.agent(permitted_actions=["trade:*"], financial_scope=SCOPE)
    kit.installer.execute(
        "update kakunin_private.certificates set financial_scope = financial_scope || %s where serial = %s",
        [json.dumps({"max_transaction_usdd": 100}), agent.serial],
    )
    said = 'nothing enforces "max_transaction_usdd" of its financial scope'
    for call in ("'trade:x', 1", "'trade:x', null, 'XLON'", "'trade:x', instrument => 'GILT'"):
        answer = kit.call(agent, f"select kakunin.verify_agent_scope({call})")
        assert (answer["allowed"], answer["code"], answer["reason"]) == (False, "KA005", said)
    assert kit.call(agent, "select kakunin.verify_agent_scope('trade:x')")["allowed"]
    with refused("KA009", match=said):
        kit.call(agent, "select kakunin.require_spend(1, 'XLON', 'GILT')")
    risk = kit.event(agent, "transaction_initiated", {"amount_usd": 1})
    assert (risk["factors"], risk["band"]) == ({"unknown_limit": 0.75}, "high")
    assert kit.event(agent, "data_mutation", {"rows": 1})["factors"] == {}


@pytest.mark.parametrize(
    ("permitted", "leverage", "violated"),
    [(False, 1, False), (False, 1.01, True), (True, 5, False), ("yes", 2, True), (None, 2, True)],
)
def test_leverage_that_is_not_permitted(kit: Kit, permitted: Any, leverage: float, violated: bool) -> None:
    agent = kit.agent(permitted_actions=["trade:x"], financial_scope={"leverage_permitted": permitted})
    factors = kit.event(agent, "transaction_initiated", {"leverage": leverage})["factors"]
    assert factors.keys() == ({"leverage"} if violated else set())
    answer = kit.call(agent, f"select kakunin.verify_agent_scope('trade:x', leverage => {leverage})")
    assert answer["allowed"] is not violated
    assert ("is not permitted" in answer["reason"]) == violated


def test_a_list_that_is_none_permits_nothing(kit: Kit) -> None:
    agent = kit.agent(financial_scope={"permitted_venues": "XLON"})
    assert kit.event(agent, "api_call", {"venue": "XLON"})["factors"].keys() == {"venue"}


def test_without_a_financial_scope_there_is_nothing_to_violate(kit: Kit) -> None:
    risk = kit.event(
        kit.agent(), "transaction_initiated", {"amount_usd": 1e15, "venue": "X", "leverage": 500}
    )
    assert (risk["factors"], risk["score"]) == ({}, 0.3)


def test_the_daily_limit_is_of_transactions_and_of_a_day(kit: Kit) -> None:
    agent = kit.agent(financial_scope=SCOPE)
    for _ in range(3):
        kit.event(agent, "api_call", {"amount_usd": 1000})  # says an amount, and moves none
        assert kit.event(agent, "transaction_initiated", {"amount_usd": 1000})["factors"] == {}
    assert kit.event(agent, "transaction_initiated", {"amount_usd": 1})["factors"].keys() == {"daily_amount"}
    kit.move(NOON.replace(hour=23, minute=59))
    assert kit.event(agent, "transaction_initiated", {"amount_usd": 1})["factors"].keys() == {"daily_amount"}
    kit.move(NOON.replace(hour=0) + DAY)
    assert kit.event(agent, "transaction_initiated", {"amount_usd": 1000})["factors"] == {}


def test_what_is_unusual_is_so_for_this_agent(kit: Kit) -> None:
    agent = kit.agent()
    kit.history(agent, tool="search", venue="XLON", table="notes", amount_usd=100)
    usual = kit.event(
        agent, "api_call", {"tool": "search", "venue": "XLON", "table": "notes", "amount_usd": 110}
    )
    assert (usual["factors"], usual["score"]) == ({}, 0.1)
    for name in ("tool", "venue", "table"):
        novel = kit.event(agent, "api_call", {name: "another"})
        assert novel["factors"] == {"novelty": 0.25}
        assert novel["score"] == pytest.approx(1 - 0.9 * 0.75, abs=1e-4)
        assert kit.event(agent, "api_call", {name: "another"})["factors"] == {}  # it is known now
    deviations = []
    for digits in (3, 5, 9, 15):
        with kit.bound(agent) as session:
            risk = append(session, "api_call", {"amount_usd": 10**digits})
            deviations.append(risk["factors"]["amount_deviation"])
            session.rollback()  # or it would be part of what is usual
    assert deviations == sorted(deviations)
    assert 0 < deviations[0] < deviations[-1] < 0.6
    assert kit.event(agent, "api_call", {"amount_usd": 1})["factors"] == {}  # less than usual is no risk


def test_more_rows_than_usual(kit: Kit) -> None:
    agent = kit.agent()
    kit.history(agent, an_hour=20)
    for _ in range(30):
        assert kit.event(agent, "data_access", {"rows": 10})["factors"] == {}
    assert kit.event(agent, "data_access", {"row_count": 10**6})["factors"].keys() == {"rows"}


@pytest.mark.parametrize("late", [False, True])
def test_more_events_than_in_this_hour_of_the_days_before(kit: Kit, late: bool) -> None:
    """Also where the agent says that they occurred some time ago."""
    agent = kit.agent()
    kit.history(agent, an_hour=15)
    at = kit.at - 3 * HOUR if late else None
    with kit.bound(agent) as session:
        risks = [append(session, "api_call", {}, at) for _ in range(60)]
    rates = [risk["factors"].get("rate", 0) for risk in risks]
    assert rates[:30] == [0] * 30  # twice what there was
    assert rates[30] > 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.9 * (1 - 30 / 60), abs=1e-3)
    # In an hour that had a hundred that is nothing.
    busy = kit.agent()
    kit.history(busy, an_hour=100)
    with kit.bound(busy) as session:
        assert [append(session, "api_call", {}, at)["factors"] for _ in range(60)] == [{}] * 60


def test_a_new_agent_has_no_baseline(kit: Kit) -> None:
    agent = kit.agent()
    for number in range(50):
        risk = kit.event(
            agent, "api_call", {"tool": f"t{number}", "amount_usd": 10 ** (number % 18), "rows": number}
        )
        assert risk["factors"] == {}
    profile = kit.profile(agent)
    assert (profile["trend"], profile["drift"]) == ("insufficient_data", "insufficient_data")
    assert (profile["band"], profile["events"], profile["recommendation"]) == ("low", 50, "Proceed.")


def test_what_is_merely_unusual_revokes_nobody(kit: Kit) -> None:
    agent = kit.agent()
    kit.history(agent, amount_usd=1)
    for hour in range(12):
        kit.move(NOON + hour * HOUR)
        metadata = {"amount_usd": 10**17, "rows": "x", "tool": f"t{hour}", "venue": f"v{hour}"}
        with kit.bound(agent) as session:
            risks = [append(session, "data_mutation", metadata) for _ in range(60)]
    assert max(risk["score"] for risk in risks) < 0.85
    assert (risks[-1]["agent_band"], kit.status(agent)) == ("high", "active")
    assert risks[-1]["agent_score"] == pytest.approx(0.82, abs=0.001)


def test_what_is_unusual_counts_beside_attempts_and_revokes_nobody(kit: Kit) -> None:
    """Whatever the agent's factor: beyond the limit only what is certain counts."""
    agent = kit.agent()
    kit.history(agent, tool="t", amount_usd=1)
    for _ in range(2):
        risk = kit.event(agent, ATTEMPT, {"tool": "t"})
    assert (risk["agent_band"], risk["agent_score"]) == ("medium", pytest.approx(0.723, abs=1e-4))
    for _ in range(5):
        risk = kit.event(agent, "data_mutation", {"tool": "t", "amount_usd": 10**17})
        assert (risk["agent_band"], risk["agent_score"]) == ("high", 0.82)
    assert kit.status(agent) == "active"
    risk = kit.event(agent, ATTEMPT, {"tool": "another"})  # a mistake is often one with what is new
    assert risk["agent_score"] == pytest.approx(rolling(*[(0.75, 0 * DAY)] * 3), abs=1e-4)
    assert risk["revoked"]
    severe = kit.agent()
    kit.history(severe, amount_usd=1)
    kit.ask("select kakunin.set_agent_risk(%s, 'why', null, 10)::text", [severe.agent_id])
    for _ in range(5):
        risk = kit.event(severe, "data_mutation", {"amount_usd": 10**17})
    assert (risk["agent_score"], kit.status(severe)) == (0.82, "active")


@pytest.mark.parametrize("member", ["rows", "amount_usd"])
def test_what_is_far_beyond_counts_each_time_and_does_not_become_usual(kit: Kit, member: str) -> None:
    agent = kit.agent()
    kit.history(agent, an_hour=40)
    for number in range(60):
        assert kit.event(agent, "data_access", {member: 10 + number % 3})["factors"] == {}
    kit.move(NOON + HOUR)
    risks = [kit.event(agent, "data_access", {member: 10_000}) for _ in range(8)]
    (name,) = risks[0]["factors"]
    factors = [risk["factors"][name] for risk in risks]
    assert min(factors) > 0.8 * factors[0]
    totals = [risk["agent_score"] for risk in risks]
    assert totals == sorted(totals)
    assert risks[0]["agent_band"] != "high"
    assert risks[-1]["agent_band"] == "high"
    assert kit.status(agent) == "active"


def test_rows_written_are_not_compared_with_rows_read(kit: Kit) -> None:
    agent = kit.agent()
    kit.history(agent, an_hour=40)
    for _ in range(35):
        kit.event(agent, "data_access", {"rows": 10_000})
    for _ in range(35):
        assert kit.event(agent, "data_mutation", {"rows": 2})["factors"] == {}
    assert kit.event(agent, "data_mutation", {"rows": 10_000})["factors"].keys() == {"rows"}
    assert kit.event(agent, "data_access", {"rows": 10_000})["factors"] == {}


def test_at_hours_at_which_an_agent_does_not_work_few_events_are_unusual(kit: Kit) -> None:
    agent = kit.agent()
    # Ten days of 8 to 17 o'clock; the night before a thief's.
    events = [
        {"occurred_at": (NOON.replace(hour=hour) - days * DAY).isoformat(), "event_type": "api_call"}
        for days in range(1, 11)
        for hour in range(8, 18)
        for _ in range(5)
    ]
    night = NOON.replace(hour=2) + DAY
    events += [{"occurred_at": (night - DAY).isoformat(), "event_type": "api_call"}] * 60
    kit.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, json.dumps(events)])
    rates = [kit.event(agent, "api_call")["factors"] for _ in range(20)]
    assert rates == [{}] * 20
    kit.move(night)
    rates = [kit.event(agent, "api_call")["factors"].get("rate", 0) for _ in range(20)]
    assert rates[:4] == [0] * 4
    assert rates[-1] == pytest.approx(0.9 * (1 - 4 / 20), abs=1e-3)


# Settings -------------------------------------------------------------------------------------------


def test_settings_change_scores_and_are_ledgered(kit: Kit) -> None:
    agent = kit.agent()
    change = {"base": {"api_call": 0.62, "other": 0.2}, "medium": 0.5, "half_life": "6 hours"}
    shown = kit.ask("select kakunin.set_risk(%s)", [json.dumps(change)])
    assert shown.items() >= {"base": change["base"], "medium": 0.5, "half_life": "06:00:00"}.items()
    query = "select entry::jsonb from kakunin_private.ledger order by event_id desc limit 1"
    entry = one(kit.installer, query)
    assert (entry["event_type"], entry["metadata"], entry["login"]) == (
        "settings.changed",
        {"risk": change},
        "operator",
    )
    assert [kit.event(agent, t)["score"] for t in ("api_call", "data_mutation", "x")] == [0.62, 0.2, 0.2]
    before = kit.profile(agent)["score"]
    assert before == pytest.approx(0.2)
    kit.move(NOON + 6 * HOUR)
    assert kit.profile(agent)["score"] == pytest.approx(1 - math.sqrt(1 - before), abs=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        "null", "[]", '"x"', "5", '{"only_row": false}', '{"unknown": 1}', '{"high": 0.9}', '{"medium": 0.8}',
        '{"critical": 1}', '{"critical": "NaN"}', '{"medium": "NaN"}', '{"half_life": "abc"}',
        '{"half_life": "59 minutes"}',
        '{"half_life": "31 days"}', '{"half_life": null}', '{"mode": "off"}', '{"mode": null}', '{"base": 5}',
        '{"base": null}',
        '{"base": {}}', '{"base": {"api_call": 0.1}}', '{"base": {"other": 1}}', '{"base": {"other": -0.1}}',
        '{"base": {"other": "0.1"}}', '{"base": {"other": 0.1, "a.b": 0.1}}', '{"base": {"other": 1e-400}}',
        '{"rate_weight": 1}', '{"rate_weight": 1e400}', '{"rate_weight": "NaN"}', '{"gross": 0.8}',
        '{"violation": 0.86}',
        '{"gross_ratio": 1}', '{"gross_ratio": "NaN"}', '{"gross_ratio": "Infinity"}',
        '{"rate_floor": "NaN"}',
        '{"rate_floor": "Infinity"}', '{"quiet_floor": 0.5}', '{"quiet_floor": "NaN"}',
        '{"quiet_floor": "Infinity"}', '{"history_days": 0}', '{"history_days": 1.5}', '{"soft_limit": 1}',
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong_changes_nothing(kit: Kit, change: str) -> None:
    before = kit.ask("select kakunin.set_risk('{}')")
    entries = "select count(*) from kakunin_private.ledger"
    count = one(kit.installer, entries)
    with refused("KA010"):
        kit.ask("select kakunin.set_risk(%s)", [change])
    assert one(kit.installer, entries) == count
    assert kit.ask("select kakunin.set_risk('{}')") == before


def test_no_setting_of_the_session_changes_what_is_kept(kit: Kit) -> None:
    """extra_float_digits and the time zone are the caller's to choose."""
    kept = []
    for change in (
        [],
        ["extra_float_digits = -15", "timezone = 'X0Y-167,J1,J365'", "intervalstyle = 'sql_standard'"],
    ):
        agent = kit.agent()
        kit.history(agent, days=9, amount_usd=7)
        with kit.bound(agent) as session:
            for setting in change:
                session.execute(f"set local {setting}")
            for amount in (123.456, 9876.5, 31, 17):
                append(session, ATTEMPT if amount == 31 else "data_mutation", {"amount_usd": amount})
        query = "select counts, hard, soft, expected, drift, (usual_amount).mean from kakunin_private.chains"
        query += " where agent_id = %s"
        kept.append(kit.installer.execute(query, [agent.agent_id]).fetchall())
    assert kept[0] == kept[1]
    assert kept[0][0][3] is not None


# Untrusted metadata ---------------------------------------------------------------------------------

NAMES = ["amount_usd", "amountUsd", "rows", "row_count", "leverage", "venue", "instrument", "symbol", "tool",
         "action", "table", "occurred_at", "x", "Amount_USD", ""]  # fmt: skip
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=300)
LEAF = (
    st.none() | st.booleans() | TEXT | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["NaN", "Infinity", "-Infinity", "1e400", "0x10", "١٢", " 5", "5\n", "-1", "1_000"])
    | st.sampled_from([10**40, -(10**40), 10**18, 10**18 - 1])
)  # fmt: skip
ANY_JSON = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | TEXT, inner, max_size=6)
    ),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def exempt(module_kit: Kit) -> Agent:
    """An agent with a history and a scope, whom nothing stops."""
    module_kit.move(NOON)
    agent = module_kit.agent(financial_scope=SCOPE)
    module_kit.history(agent, amount_usd=10, tool="t")
    module_kit.ask("select kakunin.set_agent_risk(%s, 'a test', exempt => true)::text", [agent.agent_id])
    return agent


# One database serves all examples: they add to the same agent, which is what is tested.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(metadata=ANY_JSON, event_type=st.sampled_from(list(BANDS)))
def test_no_metadata_breaks_scoring(kit: Kit, exempt: Agent, metadata: Any, event_type: str) -> None:
    before = kit.profile(exempt)["score"]
    risk = kit.event(exempt, event_type, json.dumps(metadata))
    base = kit.ask("select kakunin.set_risk('{}')")["base"]
    assert base.get(event_type, base["other"]) <= risk["score"] < 1
    assert before <= risk["agent_score"] <= 1
    assert kit.profile(exempt)["score"] == risk["agent_score"]
    assert ("malformed_metadata" in risk["factors"]) or isinstance(metadata, dict)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]", "5", "null", '"amount_usd"', '["amount_usd"]', "true",
        *(f'{{"{name}": {value}}}' for name in ("amount_usd", "amountUsd", "rows", "row_count", "leverage")
          for value in ('"NaN"', "-1", "1e400",
                        "1e18", '"1e5"', "[]", "{}", "true", '""', '"\uff15"', '"5 "', '"5\\n"', "1e-30")),
        *(f'{{"{name}": {value}}}' for name in ("venue", "instrument", "symbol", "tool", "action", "table")
          for value in ('""', "5", "[]", '["XLON"]', "{}", "false", '"' + "x" * 201 + '"')),
    ],
)  # fmt: skip
def test_metadata_that_is_no_use_raises_a_factor(kit: Kit, metadata: str) -> None:
    risk = kit.event(kit.agent(), "api_call", metadata)
    assert risk["factors"] == {"malformed_metadata": 0.3}
    assert risk["score"] == pytest.approx(1 - 0.9 * 0.7)


def test_the_largest_metadata_and_the_deepest_are_scored(kit: Kit) -> None:
    agent = kit.agent()
    largest = '{"x": "' + "é" * 8187 + '"}'
    assert len(largest.encode()) == 16383
    assert kit.event(agent, "api_call", largest)["score"] == 0.1
    many = "{" + ", ".join(f'"k{n}": 1' for n in range(1200)) + "}"
    assert kit.event(agent, "api_call", many)["score"] == 0.1
    assert kit.event(agent, "api_call", '{"x":' * 64 + "1" + "}" * 64)["score"] == 0.1
    assert kit.event(agent, "api_call", '{"tool": "\\u202e\\ud83d\\ude00"}')["score"] == 0.1
    with refused("KA010"):
        kit.event(agent, "api_call", '{"x": "' + "é" * 8189 + '"}')
    with refused("KA010"):
        kit.event(agent, "api_call", '{"x":' * 65 + "1" + "}" * 65)
    # Of members of one name JSON has the last.
    assert kit.event(agent, "api_call", '{"rows": "x", "rows": 1}')["factors"] == {}
    assert kit.event(agent, "api_call", '{"rows": 1, "rows": "x"}')["factors"] == {"malformed_metadata": 0.3}


def test_metadata_that_is_null_is_empty(kit: Kit) -> None:
    assert kit.call(kit.agent(), "select kakunin.audit_log_append('api_call', null)")["factors"] == {}


# How it rolls ---------------------------------------------------------------------------------------


def test_an_event_reads_one_row_of_its_agent_and_no_history(kit: Kit) -> None:
    """After the first one of an hour, whatever there was before."""
    agent = kit.agent()
    kit.history(agent, days=29, an_hour=3, tool="t")
    # Statistics of the present transaction: what other sessions do is not in them.
    scans = (
        "select coalesce(sum(coalesce(seq_scan, 0) + coalesce(idx_scan, 0)), 0)::int"
        " from pg_stat_xact_user_tables where relname = 'risk_hours'"
    )
    with kit.bound(agent) as session:
        append(session, "api_call", {"tool": "t"})
        before = one(session, scans)
        assert before > 0
        for _ in range(20):
            append(session, "api_call", {"tool": "t"})
        assert one(session, scans) == before
    with kit.bound(agent) as session:
        for _ in range(20):
            append(session, "api_call", {"tool": "t"})
        assert one(session, scans) == 0
    chains = "select count(*) from kakunin_private.chains where agent_id = %s"
    assert one(kit.installer, chains, [agent.agent_id]) == 1
    kit.move(NOON + HOUR)
    kit.event(agent, "api_call")
    rows = "select events from kakunin_private.risk_hours where agent_id = %s and chain_id <> 0"
    assert kit.installer.execute(rows, [agent.agent_id]).fetchall() == [(41,)]


def test_g7_three_attempts_in_minutes_revoke_and_two_do_not(kit: Kit) -> None:
    agent = kit.agent()
    for number in range(3):
        kit.move(NOON + number * 3 * MINUTE)
        risk = kit.event(agent, ATTEMPT, {"tool": "t"})
        assert (risk.get("revoked", False), kit.status(agent)) == (
            (True, "revoked") if number == 2 else (False, "active")
        )
    ages = [6 * MINUTE, 3 * MINUTE, 0 * MINUTE]
    assert risk["agent_score"] == pytest.approx(rolling(*((0.75, age) for age in ages)), abs=1e-4)


def test_three_attempts_in_a_morning_are_high(kit: Kit) -> None:
    agent = kit.agent()
    bands = []
    for hours in (0, 2, 4):
        kit.move(NOON + hours * HOUR)
        bands.append(kit.event(agent, ATTEMPT)["agent_band"])
    assert bands == ["medium", "medium", "high"]
    assert kit.status(agent) == "active"


def test_three_attempts_over_a_month_do_not(kit: Kit) -> None:
    agent = kit.agent()
    for day in (0, 10, 20, 30):
        kit.move(NOON + day * DAY)
        assert kit.event(agent, ATTEMPT)["agent_band"] == "medium"
    assert kit.status(agent) == "active"


# Minutes from the beginning and event types; in order, within five days.
EVENTS = st.lists(
    st.tuples(st.integers(0, 5 * 24 * 60), st.sampled_from(list(BANDS))), min_size=1, max_size=8
).map(sorted)


def scores(kit: Kit, events: list[tuple[int, str]], **certificate: Any) -> tuple[list[float], float]:
    """The agent's score after each event, and where it stands at the end of five days."""
    agent = kit.agent(**certificate)
    kit.ask("select kakunin.set_agent_risk(%s, 'a test', exempt => true)::text", [agent.agent_id])
    after = []
    for minute, event_type in events:
        kit.move(NOON + minute * MINUTE)
        after.append(kit.event(agent, event_type)["agent_score"])
    kit.move(NOON + 5 * DAY)
    return after, kit.profile(agent)["score"]


def hypothetically(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


@hypothetically(15)
@given(events=EVENTS)
def test_the_score_is_what_it_is_defined_as(kit: Kit, events: list[tuple[int, str]]) -> None:
    base = kit.ask("select kakunin.set_risk('{}')")["base"]
    after, final = scores(kit, events)
    for number, (now, _) in enumerate(events):
        known = [(base.get(t, base["other"]), (now - at) * MINUTE) for at, t in events[: number + 1]]
        assert after[number] == pytest.approx(rolling(*known), abs=2e-4)
    ages = [(base.get(t, base["other"]), 5 * DAY - at * MINUTE) for at, t in events]
    assert final == pytest.approx(rolling(*ages), abs=2e-4)


@hypothetically(15)
@given(events=EVENTS, more=EVENTS)
def test_more_frequent_never_lowers_it(
    kit: Kit, events: list[tuple[int, str]], more: list[tuple[int, str]]
) -> None:
    assert scores(kit, sorted(events + more[:2]))[1] >= scores(kit, events)[1]


@hypothetically(15)
@given(events=EVENTS, which=st.integers(0, 7), worse=st.sampled_from([ATTEMPT, "transaction_anomaly"]))
def test_more_severe_never_lowers_it(kit: Kit, events: list[tuple[int, str]], which: int, worse: str) -> None:
    minute, _ = events[which % len(events)]
    severe = [(minute, worse) if number == which % len(events) else e for number, e in enumerate(events)]
    mild, harsh = scores(kit, events), scores(kit, severe)
    assert harsh[1] >= mild[1]
    assert all(a <= b for a, b in zip(mild[0], harsh[0], strict=True))


@hypothetically(25)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 40 * 60), st.sampled_from([*BANDS, None]), ANY_JSON), min_size=2, max_size=12
    ),
    old=st.booleans(),
)
def test_an_event_never_lowers_it_and_time_never_raises_it(
    kit: Kit, steps: list[tuple[int, str | None, Any]], old: bool
) -> None:
    """Whatever the metadata, with and without a history that it drifts from."""
    kit.move(NOON)
    agent = kit.agent(financial_scope=SCOPE)
    if old:
        kit.history(agent, days=28, tool="t", amount_usd=5)
    kit.ask("select kakunin.set_agent_risk(%s, 'a test', exempt => true)::text", [agent.agent_id])
    last = kit.profile(agent)["score"]
    for minutes, event_type, metadata in steps:
        kit.move(kit.at + minutes * MINUTE)
        later = kit.profile(agent)["score"]
        assert later <= last
        last = later
        if event_type is not None:
            after = kit.event(agent, event_type, json.dumps(metadata))["agent_score"]
            assert after >= last
            last = after


def test_drift_fades_and_no_event_hurries_it(kit: Kit) -> None:
    agent = drifted(kit)
    assert kit.event(agent, "data_access")["agent_score"] == pytest.approx(0.8, abs=0.01)
    seen = []
    for hours in (1, 2, 30, 60, 200):
        kit.move(NOON + hours * HOUR)
        before = kit.profile(agent)["score"]
        after = kit.event(agent, "api_call")["agent_score"]
        assert before <= after
        seen.append((before, after))
    assert [before for before, _ in seen] == sorted((before for before, _ in seen), reverse=True)
    assert seen[-1][1] < 0.1


def drifted(kit: Kit) -> Agent:
    """23 days of one kind of event, seven of another."""
    agent = kit.agent()
    events = [
        {
            "occurred_at": (kit.at - hours * HOUR).isoformat(),
            "event_type": "data_access" if hours <= 168 else "api_call",
        }
        for hours in range(1, 720)
    ]
    assert kit.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, json.dumps(events)]) == 719
    return agent


def test_drift_of_7_days_against_what_was_before(kit: Kit) -> None:
    agent = drifted(kit)
    profile = kit.profile(agent)
    assert profile["drift"]["score"] == 1
    assert profile["drift"]["factors"].items() >= {"event_mix": 1, "event_mix_distance": 1, "rate": 0}.items()
    assert profile["drift"]["factors"]["events_a_day_ratio"] == pytest.approx(1, abs=0.02)
    assert profile["band"] == "low"  # nothing that it did here: history adds nothing
    assert kit.event(agent, "data_access")["agent_band"] == "high"  # 0.80: read-only, but not revoked
    steady = kit.agent()
    kit.history(steady, days=30)
    assert kit.profile(steady)["drift"]["score"] == 0
    growing = kit.agent()
    kit.history(growing, days=29)
    kit.history(growing, days=5, an_hour=14)
    assert kit.profile(growing)["drift"]["factors"]["rate"] == pytest.approx(0.6, abs=0.05)


def test_drift_is_against_28_to_60_days_back(kit: Kit) -> None:
    """What changes slowly has not become usual in between."""
    agent = kit.agent()
    for first, last, event_type in ((1, 27 * 24, "data_access"), (28 * 24 + 1, 50 * 24, "api_call")):
        events = [
            {"occurred_at": (kit.at - hours * HOUR).isoformat(), "event_type": event_type}
            for hours in range(first, last)
        ]
        kit.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, json.dumps(events)])
    assert kit.profile(agent)["drift"]["factors"]["event_mix"] == 1
    # A burst of the same call is no change of habits.
    steady = kit.agent()
    kit.history(steady, days=50)
    burst = [{"occurred_at": (kit.at - HOUR).isoformat(), "event_type": "data_access"}] * 200
    kit.ask("select kakunin.import_events(%s, %s)", [steady.agent_id, json.dumps(burst)])
    assert kit.profile(steady)["drift"]["factors"]["event_mix"] < 0.5


def test_drift_stays_for_as_long_as_there_is_some(kit: Kit) -> None:
    agent = drifted(kit)
    for hours in range(0, 30, 3):
        kit.move(NOON + hours * HOUR)
        assert kit.event(agent, "data_access")["agent_score"] == pytest.approx(0.8, abs=0.01)


def test_the_views_are_rolling_windows(kit: Kit) -> None:
    agent, other = kit.agent(), kit.agent()
    plan = [
        (0, "api_call"),
        (1, ATTEMPT),
        (1, "api_call"),
        (26, "api_call"),
        (24 * 20, "data_mutation"),
        (24 * 32, "api_call"),
    ]
    shares = {}
    for hour, event_type in plan:
        kit.move(NOON + hour * HOUR)
        kit.event(agent, event_type, {"amount_usd": 2})
        with kit.bound(agent) as session:
            contributions = "select event_type, events, contribution from kakunin.risk_contributions"
            shares[hour] = {row[0]: row[1:] for row in session.execute(contributions).fetchall()}
    kit.event(other, "api_call")
    with kit.bound(agent) as session:
        by_hour = session.execute(
            "select hour, event_type, events, late, imported, amount_usd, events_30_days"
            " from kakunin.risk_by_hour order by 1, 2"
        ).fetchall()
        by_day = session.execute(
            "select day, events, events_30_days, excess, excess_30_days, trend from kakunin.risk_by_day"
            " order by 1"
        ).fetchall()
    expected = [
        (0, "api_call", 1), (1, "api_call", 2), (1, ATTEMPT, 1), (26, "api_call", 3),
        (480, "data_mutation", 1),
        # Of the four calls the first three are more than thirty days ago.
        (768, "api_call", 1),
    ]  # fmt: skip
    assert by_hour == [(NOON + h * HOUR, t, 1, 0, None, 2, n) for h, t, n in expected]
    days = [(0, 3, 3), (1, 1, 4), (20, 1, 5), (32, 1, 2)]
    assert [row[:3] for row in by_day] == [(NOON.replace(hour=0) + d * DAY, n, m) for d, n, m in days]
    day_excess = [float(row[3]) for row in by_day]
    assert day_excess == pytest.approx([excess(0.75), 0, 0, 0])
    assert [float(row[4]) for row in by_day] == pytest.approx([excess(0.75)] * 3 + [0])
    assert [row[5] and float(row[5]) for row in by_day] == [None, pytest.approx(-excess(0.75)), 0, 0]
    assert shares[26] == {ATTEMPT: (1, 1), "api_call": (3, 0)}
    assert shares[24 * 32] == {"data_mutation": (1, None), "api_call": (1, None)}
    # Operators and auditors see all agents, and another agent nothing of this one.
    for login in ("operator", "auditor"):
        query = "select sum(events) from kakunin.risk_by_hour where agent_id = any (%s)"
        assert kit.database.value(login, query, [[agent.agent_id, other.agent_id]]) == 7
    assert kit.call(other, "select sum(events)::int from kakunin.risk_by_day") == 1
    with kit.database.connect("agent_1") as unbound:
        assert one(unbound, "select count(*) from kakunin.risk_by_hour") == 0


def test_an_agent_reads_its_hours_and_no_others(kit: Kit) -> None:
    """However many agents there are, and as whichever kind of row."""
    agent = kit.agent()
    kit.history(agent, days=2)
    kit.event(agent, "api_call")
    rows = (
        "insert into kakunin_private.risk_hours (agent_id, hour, chain_id, event_type, events)"
        " select a, date_bin('1 hour', now(), 'epoch') - make_interval(hours => h), 0, 'api_call', 1"
        " from (select gen_random_uuid() as a from generate_series(1, 500)) a, generate_series(1, 20) h"
    )
    kit.installer.execute(rows)
    kit.installer.execute(
        "insert into kakunin_private.chains (agent_id, sequence, head, counts)"
        " select gen_random_uuid(), 0, '', '{\"api_call\": [1, 0, 0, 0, 0, 0]}' from generate_series(1, 2000)"
    )
    kit.installer.execute("analyze kakunin_private.risk_hours, kakunin_private.chains")

    def read(node: dict[str, Any]) -> float:
        own = (
            (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            if node.get("Relation Name") in ("risk_hours", "chains")
            else 0
        )
        return own + sum(read(below) for below in node.get("Plans", []))

    for view in ("risk_by_hour", "risk_by_day", "risk_contributions"):
        query = f"explain (analyze, format json) select * from kakunin.{view}"
        with kit.bound(agent) as session:
            assert read(one(session, query)[0]["Plan"]) <= 60, view
        with kit.database.connect("auditor") as auditor:
            assert read(one(auditor, f"{query} where agent_id = '{agent.agent_id}'")[0]["Plan"]) <= 60, view


def test_trend(kit: Kit) -> None:
    agent = kit.agent()
    kit.history(agent)
    kit.event(agent, "api_call")
    assert kit.profile(agent)["trend"] == "stable"
    kit.event(agent, ATTEMPT)
    assert kit.profile(agent)["trend"] == "rising"
    kit.move(NOON + 2 * DAY)
    assert kit.profile(agent)["trend"] == "falling"
    assert kit.profile(agent)["by_event_type"][ATTEMPT] == {"events": 1, "contribution": 1}
    kit.move(NOON + 9 * DAY)
    assert kit.profile(agent)["trend"] == "stable"


# When it was ----------------------------------------------------------------------------------------


def test_late_events_are_of_their_own_hour(kit: Kit) -> None:
    agent = kit.agent()
    for hours in (3, 1, 29 * 24, 3, 0):
        risk = kit.event(agent, ATTEMPT if hours == 1 else "api_call", {}, kit.at - hours * HOUR)
        assert risk["score"] == (0.75 if hours == 1 else 0.1)  # scored when it is recorded
    query = (
        "select hour, event_type, events, late from kakunin.risk_by_hour"
        " where agent_id = %s and events + late > 0 order by 1, 2"
    )
    rows = kit.operator.execute(query, [agent.agent_id]).fetchall()
    assert rows == [
        (NOON - 29 * DAY, "api_call", 0, 1),
        (NOON - 3 * HOUR, "api_call", 0, 2), (NOON - HOUR, ATTEMPT, 0, 1),
        (NOON, "api_call", 4, 0), (NOON, ATTEMPT, 1, 0),  # and counted where they were recorded
    ]  # fmt: skip
    said = [entry["metadata"] for entry in kit.entries(agent) if entry["event_type"] == "api_call"]
    assert said[0] == {"occurred_at": (NOON - 3 * HOUR).strftime("%Y-%m-%dT%H:%M:%S.000000Z")}
    # No baseline comes of what is said afterwards.
    kit.move(NOON + HOUR)
    assert kit.event(agent, "api_call", {"tool": "new"})["factors"] == {}
    query = "select expected from kakunin_private.chains where agent_id = %s"
    assert kit.installer.execute(query, [agent.agent_id]).fetchall() == [(None,)]


def test_backdating_fades_nothing(kit: Kit) -> None:
    agent = kit.agent()
    for days in (29, 15, 1):
        risk = kit.event(agent, ATTEMPT, {}, kit.at - days * DAY)
    assert risk["revoked"]


def test_the_future_is_refused_beyond_skew(kit: Kit) -> None:
    agent = kit.agent()
    ahead, behind = dt.timedelta(seconds=30), 30 * DAY
    kit.event(agent, "api_call", {}, kit.at + ahead)
    kit.event(agent, "api_call", {}, kit.at - behind)
    for at in (kit.at + ahead + dt.timedelta(microseconds=1), kit.at - behind - dt.timedelta(microseconds=1)):
        with refused("KA010", match="30 days"):
            kit.event(agent, "api_call", {}, at)
    for at_text in ("infinity", "-infinity"):
        with refused("KA010"):
            kit.call(agent, "select kakunin.audit_log_append('x', '{}', null, %s)", [at_text])
    assert kit.types(agent).count("api_call") == 2


def test_a_clock_that_goes_back_breaks_nothing(kit: Kit) -> None:
    agent = kit.agent()
    first = kit.event(agent, ATTEMPT)["agent_score"]
    kit.move(NOON - 2 * HOUR)
    assert kit.profile(agent)["score"] == first
    assert kit.event(agent, ATTEMPT)["agent_score"] == pytest.approx(
        rolling((0.75, 0 * DAY), (0.75, 0 * DAY)), abs=1e-4
    )


# History from elsewhere -----------------------------------------------------------------------------


def test_import_marks_what_it_brings_in(kit: Kit) -> None:
    agent = kit.agent()
    events = json.dumps(
        [
            {"occurred_at": "2020-01-01T00:00:00Z", "event_type": ATTEMPT},
            {
                "occurred_at": (NOON - 3 * HOUR).isoformat(),
                "event_type": "x",
                "metadata": {"amount_usd": 5, "tool": "t"},
            },
            {"occurred_at": (NOON - 3 * HOUR).isoformat(), "event_type": "api_call", "metadata": "no use"},
        ]
    )
    assert kit.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, events]) == 3
    query = (
        "select event_type, events, imported, amount_usd, excess from kakunin.risk_by_hour"
        " where agent_id = %s order by hour, 1"
    )
    assert kit.operator.execute(query, [agent.agent_id]).fetchall() == [
        (ATTEMPT, 1, 1, 0, 0), ("api_call", 1, 1, 0, 0), ("other", 1, 1, 5, 0),
    ]  # fmt: skip
    entry = kit.entries(agent)[-1]
    text = one(kit.installer, "select %s::jsonb::text", [events])
    assert entry["event_type"] == "events.imported"
    assert entry["metadata"] == {"events": 3, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert (kit.profile(agent)["score"], kit.profile(agent)["events"]) == (0, 2)
    assert kit.event(agent, "api_call")["agent_score"] == 0


@pytest.mark.parametrize(
    "events",
    [
        "null", "{}", "[]", "[5]", "[[]]", '[{"event_type": "x"}]',
        '[{"occurred_at": "2026-01-01T00:00:00Z"}]',
        '[{"occurred_at": "2026-01-01", "event_type": "x"}]', '[{"occurred_at": "now", "event_type": "x"}]',
        '[{"occurred_at": "infinity", "event_type": "x"}]',
        '[{"occurred_at": "2026-13-01T00:00:00Z", "event_type": "x"}]',
        '[{"occurred_at": "2026-01-01T00:00:00", "event_type": "x"}]',
        '[{"occurred_at": 5, "event_type": "x"}]',
        '[{"occurred_at": "2999-01-01T00:00:00Z", "event_type": "x"}]',
        '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": "a.b"}]',
        '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": null}]',
    ],
)  # fmt: skip
def test_import_takes_all_or_nothing(kit: Kit, events: str) -> None:
    agent = kit.agent()
    if events.startswith("[{"):
        events = '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": "x"}, ' + events[1:]
    with refused("KA010"):
        kit.ask("select kakunin.import_events(%s, %s)", [agent.agent_id, events])
    assert kit.profile(agent)["events"] == 0


def test_import_is_for_an_agent_there_is(kit: Kit) -> None:
    events = '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": "x"}]'
    for agent_id in ("00000000-0000-0000-0000-000000000001", None):
        with refused("KA010"):
            kit.ask("select kakunin.import_events(%s, %s)", [agent_id, events])
        with refused("KA010"):
            kit.ask("select kakunin.agent_risk(%s)", [agent_id])


@hypothetically(40)
@given(metadata=ANY_JSON)
def test_no_metadata_breaks_an_import(kit: Kit, exempt: Agent, metadata: Any) -> None:
    events = [{"occurred_at": NOON.isoformat(), "event_type": "api_call", "metadata": metadata}]
    assert kit.ask("select kakunin.import_events(%s, %s)", [exempt.agent_id, json.dumps(events)]) == 1


# What follows ---------------------------------------------------------------------------------------


def test_high_queues_one_check_and_one_alert(kit: Kit) -> None:
    kit.ask("select kakunin.set_risk('{\"high\": 0.7}')")  # two attempts
    agent = kit.agent()
    kit.event(agent, ATTEMPT)
    assert kit.reviews(agent) == []
    risk = kit.event(agent, ATTEMPT)
    assert (risk["agent_band"], risk["revoked"]) == ("high", False)
    kit.event(agent, "api_call")
    [(review_id, score, decision)] = kit.reviews(agent)
    assert (round(score, 4), decision) == (risk["agent_score"], None)
    [alert] = [e for e in kit.entries(agent) if e["event_type"] == "agent.high_risk"]
    assert alert["metadata"].items() >= {"agent_score": risk["agent_score"], "serial": agent.serial}.items()
    assert kit.profile(agent)["recommendation"] == "Stop writing and notify a human operator."
    # Once it has fallen, another rise is another one.
    kit.move(NOON + 2 * DAY)
    kit.event(agent, "api_call")
    kit.event(agent, ATTEMPT)
    assert len(kit.reviews(agent)) == 1
    kit.event(agent, ATTEMPT)
    assert len(kit.reviews(agent)) == 2
    kit.operator.execute("select kakunin.review_risk(%s, 'a test run')", [review_id])
    assert kit.reviews(agent)[0][2] == "a test run"
    assert kit.entries(agent)[-1]["metadata"] == {"review_id": review_id, "decision": "a test run"}
    for wrong in (review_id, 0, None):
        with refused("KA010"):
            kit.operator.execute("select kakunin.review_risk(%s, 'again')", [wrong])
    with refused("KA010"):
        kit.operator.execute("select kakunin.review_risk(%s, '')", [kit.reviews(agent)[1][0]])


@pytest.fixture
def vault(kit: Kit) -> Iterator[None]:
    with kit.database.connect("app", autocommit=True) as app:
        app.execute("create table vault (permitted_agent_serial text, content text)")
        app.execute("create index on vault (permitted_agent_serial)")
        app.execute("select kakunin.protect('vault')")
        app.execute("grant select, insert, update, delete on vault to kakunin_agent, kakunin_gateway")
        yield
        app.execute("drop table vault")


def test_g7_critical_revokes_in_the_same_commit(kit: Kit, vault: None) -> None:
    agent = kit.agent(permitted_actions=["a:b"])
    kit.database.run("app", "insert into vault values (%s, 'secret')", [agent.serial])
    count = "select count(*) from vault"
    kit.move(dt.datetime.now(dt.timezone.utc))
    ticket = kit.database.ticket(agent, "agent_1")
    with (
        kit.database.connect("agent_1", autocommit=True) as whole,
        kit.database.connect("agent_1") as open_already,
        kit.database.connect("operator", autocommit=True) as listener,
        kit.database.connect("gateway") as session,
    ):
        listener.execute("listen kakunin_revocation")
        whole.execute("select kakunin.bind_session(%s, false)", [ticket])
        open_already.execute("select kakunin.bind_session(%s)", [ticket])
        bind(session, agent)
        assert [one(s, count) for s in (whole, open_already, session)] == [1, 1, 1]
        append(session, ATTEMPT)
        append(session, ATTEMPT)
        assert one(session, count) == 1
        risk = append(session, ATTEMPT)
        assert (risk["revoked"], risk["agent_band"]) == (True, "critical")
        # In its own transaction at once, elsewhere from the commit on.
        assert one(session, SERIAL) is None
        assert one(session, count) == 0
        assert [one(s, count) for s in (whole, open_already)] == [1, 1]
        assert kit.status(agent) == "active"
        session.commit()
        assert [one(s, count) for s in (whole, open_already)] == [0, 0]
        assert [one(s, SERIAL) for s in (whole, open_already)] == [None, None]
        with refused("KA002", match="risk score"):
            whole.execute("select kakunin.require_session()")
        with refused("KA002"):
            append(whole, "api_call")
        with refused("KA002"):
            bind(kit.gateway, agent)
        with refused("KA002", "KA004"), kit.database.connect("agent_1") as again:
            again.execute("select kakunin.bind_session(%s)", [ticket])
        with refused("KA002"):
            kit.database.ticket(agent, "agent_1")
        listener.execute("select")
        assert {n.payload for n in listener.notifies(timeout=5, stop_after=1)} == {str(agent.agent_id)}
    assert kit.status(agent) == "revoked"
    assert kit.profile(agent)["band"] == "critical"
    [why] = [e["metadata"] for e in kit.entries(agent) if e["event_type"] == "agent.revoked"]
    assert (
        why.items()
        >= {"serial": agent.serial, "agent_score": risk["agent_score"], "agent_band": "critical"}.items()
    )
    # For revocation lists, and as a suspension.
    assert kit.database.value("worker", SETTLE) == 1
    assert kit.database.value("worker", SETTLE) == 0
    query = "select revocation_reason, revoked_at is not null from kakunin.certificates where serial = %s"
    assert kit.operator.execute(query, [agent.serial]).fetchall() == [("privilegeWithdrawn", True)]
    query = "select suspended_reason from kakunin.agents where agent_id = %s"
    assert kit.ask(query, [agent.agent_id]).startswith("risk score")
    assert kit.types(agent)[-4:] == ["agent.revoked", ATTEMPT, "agent.suspended", "certificate.revoked"]
    query = (
        "select reason from kakunin.revocations((select key_id from kakunin.authorities)) where serial = %s"
    )
    assert kit.ask(query, [agent.serial]) == "privilegeWithdrawn"


def test_all_its_certificates_are_stopped_and_a_new_one_as_well(kit: Kit) -> None:
    agent = kit.agent()
    with kit.database.connect("registrar"):
        second = kit.database.renew(agent, dt.timedelta(days=3))
    for _ in range(3):
        kit.event(agent, ATTEMPT)
    third = kit.database.renew(agent, dt.timedelta(hours=1))
    for holder in (agent, second, third):
        assert kit.status(holder) == "revoked"
        with refused("KA002"):
            bind(kit.gateway, holder)
    kit.operator.execute(SETTLE)
    assert {kit.status(holder) for holder in (agent, second, third)} == {"revoked"}


def test_an_operator_reinstates_and_the_score_begins_anew(kit: Kit) -> None:
    for settled in (False, True):
        agent = kit.agent()
        for _ in range(3):
            kit.event(agent, ATTEMPT)
        if settled:
            kit.operator.execute(SETTLE)
        kit.operator.execute("select kakunin.reinstate_agent(%s)", [agent.agent_id])
        assert kit.ask(SETTLE) == 0
        assert kit.status(agent) == "revoked"  # for good
        assert kit.profile(agent)["score"] == 0
        anew = kit.database.renew(agent)
        assert kit.status(anew) == "active"
        risk = kit.event(anew, ATTEMPT)
        assert (risk["agent_score"], risk["agent_band"]) == (0.4737, "medium")
        with kit.bound(anew, isolation="repeatable read") as session:
            assert one(session, SERIAL) == anew.serial
        kit.event(anew, ATTEMPT)
        assert kit.event(anew, ATTEMPT)["revoked"]
        assert kit.status(anew) == "revoked"


def test_an_operator_exempts_raises_and_lowers(kit: Kit) -> None:
    change = "select kakunin.set_agent_risk(%s, 'why', %s, %s)::text"
    exempt, severe, mild = kit.agent(financial_scope=SCOPE), kit.agent(), kit.agent()
    kit.ask(change, [exempt.agent_id, True, None])
    kit.ask(change, [severe.agent_id, None, 3])
    kit.ask(change, [mild.agent_id, None, 0.2])
    for _ in range(5):
        risk = kit.event(exempt, "transaction_initiated", {"amount_usd": 10**6})
    assert (risk["agent_band"], "revoked" in risk, kit.status(exempt)) == ("critical", False, "active")
    assert kit.reviews(exempt) == []
    first = kit.event(severe, ATTEMPT)
    assert first["agent_score"] == pytest.approx(1 - math.exp(-3 * excess(0.75)), abs=1e-4)
    assert first["revoked"]
    for _ in range(5):
        risk = kit.event(mild, ATTEMPT)
    assert risk["agent_score"] == pytest.approx(1 - math.exp(-excess(0.75)), abs=1e-4)
    entry = kit.entries(severe)[1 - len(kit.entries(severe))]
    changed = [e["metadata"] for e in kit.entries(severe) if e["event_type"] == "agent.risk_set"]
    assert changed == [{"reason": "why", "exempt": None, "factor": 3}]
    assert entry
    kit.ask(change, [exempt.agent_id, False, None])
    assert kit.event(exempt, "api_call")["revoked"]  # what it did before counts again
    for exempts, factor in ((None, None), (None, 0.05), (None, 11), (None, math.nan), (None, math.inf)):
        with refused("KA010"):
            kit.ask(change, [mild.agent_id, exempts, factor])
    for agent_id, reason in ((mild.agent_id, ""), (mild.agent_id, None), (None, "x")):
        with refused("KA010"):
            kit.ask("select kakunin.set_agent_risk(%s, %s, true)::text", [agent_id, reason])


def test_in_observe_mode_nothing_follows_but_a_record(kit: Kit) -> None:
    kit.ask('select kakunin.set_risk(\'{"mode": "observe"}\')')
    agent = kit.agent(financial_scope=SCOPE)
    for _ in range(4):
        risk = kit.event(agent, "transaction_initiated", {"amount_usd": 10**5})
    assert (risk["band"], risk["agent_band"], risk["revoked"]) == ("critical", "critical", False)
    assert (kit.status(agent), len(kit.reviews(agent)), kit.ask(SETTLE)) == ("active", 1, 0)
    assert kit.types(agent).count("agent.high_risk") == 1
    assert "agent.revoked" not in kit.types(agent)
    for call, code in (("require_spend(5000)", "KA009"), ("require_risk_below('medium')", "KA011")):
        assert kit.call(agent, f"select kakunin.{call}") is True
        assert kit.entries(agent)[-1]["event_type"] == "policy.observed"
        assert kit.entries(agent)[-1]["metadata"]["code"] == code
    kit.ask('select kakunin.set_risk(\'{"mode": "enforce"}\')')
    assert kit.event(agent, "api_call")["revoked"]


# Transactions ---------------------------------------------------------------------------------------


def test_what_is_rolled_back_did_not_happen(kit: Kit) -> None:
    agent = kit.agent()
    kit.event(agent, "api_call")
    before = one(
        kit.installer, "select c from kakunin_private.chains c where agent_id = %s", [agent.agent_id]
    )
    with kit.bound(agent) as session:
        for _ in range(3):
            append(session, ATTEMPT, {"tool": "t"})
        assert one(session, SERIAL) is None
        session.rollback()
        bind(session, agent)
        session.execute("savepoint s")
        for _ in range(3):
            append(session, ATTEMPT, {"tool": "t"})
        session.execute("rollback to s")
        assert one(session, SERIAL) == agent.serial
    query = "select c from kakunin_private.chains c where agent_id = %s"
    assert kit.installer.execute(query, [agent.agent_id]).fetchall() == [(before,)]
    assert (kit.status(agent), kit.reviews(agent), kit.profile(agent)["score"]) == ("active", [], 0)
    assert "agent.high_risk" not in kit.types(agent)
    assert kit.event(agent, "api_call")["sequence"] == 2


def in_time(connection: Connection, seconds: float = 5) -> Connection:
    """Whatever waits for a lock that long has failed."""
    connection.execute(f"set lock_timeout = '{seconds}s'")
    return connection


def test_transactions_of_one_agent_wait_for_nobody_and_add_up(kit: Kit) -> None:
    agent = kit.agent()
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(kit.bound(agent)) for _ in range(4)]
        for session in sessions:
            # Neither sees the others', so each is medium by itself.
            append(in_time(session), ATTEMPT)
            assert append(session, "api_call")["agent_score"] == pytest.approx(0.4737)
    score = kit.profile(agent)["score"]
    assert score == pytest.approx(rolling(*[(0.75, 0 * DAY)] * 4), abs=1e-4)
    assert kit.status(agent) == "active"
    assert kit.ask(SETTLE) == 1  # and not before the next event
    assert kit.status(agent) == "revoked"
    assert [t for t in kit.types(agent) if t.startswith("agent.")][1:] == ["agent.suspended", "agent.revoked"]
    assert kit.ask(SETTLE) == 0


def test_or_the_next_event_sees_the_sum(kit: Kit) -> None:
    agent = kit.agent()
    with kit.bound(agent) as first, kit.bound(agent) as second, kit.bound(agent) as third:
        for session in (first, second, third):
            append(session, ATTEMPT)
    assert kit.event(agent, "api_call")["revoked"]


def test_daily_limits_are_of_all_transactions_together(kit: Kit) -> None:
    agent = kit.agent(financial_scope=SCOPE)
    with kit.bound(agent) as first, kit.bound(agent) as second:
        for session in (first, second):
            append(session, "transaction_initiated", {"amount_usd": 1000})
    assert kit.event(agent, "transaction_initiated", {"amount_usd": 1000})["factors"] == {}
    assert kit.event(agent, "transaction_initiated", {"amount_usd": 1})["factors"].keys() == {"daily_amount"}


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_g7_a_critical_transaction_that_stays_open_delays_no_other_of_its_agent(
    kit: Kit, isolation: str
) -> None:
    """Such as the one in which attempts are recorded."""
    agent = kit.agent()
    with kit.bound(agent, isolation=isolation) as held:
        for _ in range(3):
            risk = append(held, ATTEMPT)
        assert risk["revoked"]
        with kit.bound(agent) as recorder:
            in_time(recorder)
            for _ in range(3):
                risk = append(recorder, ATTEMPT)
            assert risk["revoked"]
        assert kit.status(agent) == "revoked"
        held.rollback()
    assert kit.status(agent) == "revoked"  # by the other one
    assert kit.ask(SETTLE) == 1
    # The name that snapshots do not hide is there as well.
    assert one(kit.installer, "select kakunin_private.is_stopped(%s::text)", [agent.agent_id])


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_g7_a_snapshot_does_not_hide_the_stop(kit: Kit, vault: None, isolation: str) -> None:
    agent = kit.agent()
    kit.database.run("app", "insert into vault values (%s, 'secret')", [agent.serial])
    with kit.bound(agent, isolation=isolation) as session:
        assert one(session, "select count(*) from vault") == 1
        for _ in range(3):
            kit.event(agent, ATTEMPT)
        assert one(session, "select count(*) from vault") == 0
        assert one(session, SERIAL) is None
        with refused("KA002"):
            session.execute("select kakunin.require_session()")
    with refused("KA010", match="READ COMMITTED"), kit.database.connect("operator") as operator:
        operator.execute("set transaction isolation level repeatable read")
        operator.execute(SETTLE)


ONE_EVENT = '[{"occurred_at": "2026-01-01T00:00:00Z", "event_type": "x"}]'


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_what_is_recorded_in_a_savepoint_of_an_old_snapshot(kit: Kit, isolation: str) -> None:
    """A chain made in a subtransaction has another transaction id than the transaction's."""
    agent = kit.agent(financial_scope=SCOPE)
    with kit.bound(agent, isolation=isolation) as session:
        session.execute("set statement_timeout = '5s'")
        for _ in range(2):
            with session.transaction():
                assert one(session, "select kakunin.require_spend(-1, observe => true)")
        with session.transaction():
            for _ in range(3):
                risk = append(session, ATTEMPT)
        assert risk["revoked"]
    assert kit.types(agent).count("policy.observed") == 2
    with kit.database.connect("operator") as operator:
        operator.execute(f"set transaction isolation level {isolation}")
        with operator.transaction():
            in_time(operator).execute("set statement_timeout = '5s'")
            operator.execute("select kakunin.suspend_agent(%s, 'why')", [agent.agent_id])
    assert kit.types(agent)[-1] == "agent.suspended"


DECISIONS = {
    "halt": "select kakunin.halt_agent(%(agent)s, 'why')",
    "halt, terminate": "select kakunin.halt_agent(%(agent)s, 'why', terminate => true)",
    "suspend": "select kakunin.suspend_agent(%(agent)s, 'why')",
    "revoke": "select kakunin.revoke_certificate(%(serial)s)",
    "reinstate": "select kakunin.reinstate_agent(%(agent)s)",
    "exempt": "select kakunin.set_agent_risk(%(agent)s, 'why', true)",
    "settings": "select kakunin.set_risk('{\"rate_floor\": 21}')",
    "import": f"select kakunin.import_events(%(agent)s, '{ONE_EVENT}')",
    "profile": "select kakunin.agent_risk(%(agent)s)",
    "settle": SETTLE,
}


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
@pytest.mark.parametrize("settle", ["", "before", "after"])
@pytest.mark.parametrize("decision", DECISIONS)
def test_no_decision_waits_for_a_critical_transaction_that_stays_open(
    kit: Kit, decision: str, settle: str, isolation: str
) -> None:
    agent = kit.agent()
    # The agent has stops that are committed, and others that are not: of two chains each.
    with kit.bound(agent, isolation=isolation) as held, kit.bound(agent, isolation=isolation) as second:
        for session in (held, second):
            in_time(session)
            for _ in range(3):
                append(session, ATTEMPT)
            assert one(session, SERIAL) is None
        with kit.database.connect("operator", autocommit=True) as operator:
            in_time(operator)
            if settle == "before":
                operator.execute(SETTLE)
            operator.execute(DECISIONS[decision], {"agent": agent.agent_id, "serial": agent.serial})
            if settle == "after":
                with kit.bound(agent) if decision == "exempt" else contextlib.nullcontext():
                    operator.execute(SETTLE)
        second.commit()
        with kit.database.connect("operator", autocommit=True) as operator:
            in_time(operator)
            operator.execute(SETTLE)
            operator.execute(DECISIONS[decision], {"agent": agent.agent_id, "serial": agent.serial})
            operator.execute("select kakunin.reinstate_agent(%s)", [agent.agent_id])
    # What was scored before the operator let it go on comes in only now: it stops the agent once more.
    assert kit.status(agent) == "revoked"
    kit.operator.execute(SETTLE)
    kit.operator.execute("select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert kit.status(kit.database.renew(agent)) == "active"


def test_settling_leaves_out_an_agent_that_an_operator_has(kit: Kit) -> None:
    """One who reviews it in an open transaction: it is for the next time, and nothing is undone."""
    agent, other = kit.agent(), kit.agent()
    for each in (agent, other):
        for _ in range(3):
            kit.event(each, ATTEMPT)
    with kit.database.connect("operator") as operator:
        operator.execute("select kakunin.reinstate_agent(%s)", [agent.agent_id])
        with kit.database.connect("worker", autocommit=True) as worker:
            worker.execute("set lock_timeout = '200ms'")
            assert worker.execute(SETTLE).fetchone() == (1,)
        assert kit.status(other) == "revoked"
    assert kit.ask(SETTLE) == 0
    query = "select suspended_at from kakunin.agents where agent_id = %s"
    assert kit.ask(query, [agent.agent_id]) is None


def test_an_operators_open_transaction_delays_no_agent(kit: Kit) -> None:
    agent = kit.agent()
    kit.event(agent, ATTEMPT)
    with kit.database.connect("operator") as operator:
        operator.execute("select kakunin.set_risk('{\"rate_floor\": 22}')")
        operator.execute("select kakunin.set_agent_risk(%s, 'why', false)", [agent.agent_id])
        with kit.bound(agent) as session:
            in_time(session)
            append(session, ATTEMPT)
            assert append(session, ATTEMPT)["revoked"]
        operator.rollback()


# The tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "allowed", "reason"),
    [
        ("'trade:execute'", True, "permitted"),
        ("'trade:execute', 1000, 'XLON', 'GILT', 2", True, "permitted"),
        ("'data.read'", True, "permitted"),
        ("'data.read.more'", False, "does not permit 'data.read.more'"),
        ("'data'", False, "does not permit"),
        ("'trade'", False, "does not permit"),
        ("'trade:'", False, "does not permit"),
        ("'trades:x'", False, "does not permit"),
        ("'TRADE:x'", False, "does not permit"),
        ("'*'", False, "does not permit"),
        ("null", False, "does not permit NULL"),
        ("''", False, "does not permit"),
        ("'trade:x', 1000.01", False, "exceeds max_single_trade_usd 1000"),
        ("'trade:x', 3001", False, "exceeds daily_limit_usd 3000"),
        ("'trade:x', -1", False, "zero or more"),
        ("'trade:x', 'NaN'", False, "zero or more"),
        ("'trade:x', 'Infinity'", False, "zero or more"),
        ("'trade:x', 1, 'XLONDON'", False, "venue 'XLONDON' is not in permitted_venues"),
        ("'trade:x', 1, ''", False, "permitted_venues"),
        ("'trade:x', 1, null, 'GIL'", False, "permitted_instruments"),
        ("'trade:x', 1, null, null, 2.01", False, "max_leverage_ratio"),
        ("'no', 1001, 'X'", False, "; "),
    ],
)
def test_verify_agent_scope_answers(kit: Kit, arguments: str, allowed: bool, reason: str) -> None:
    agent = kit.agent(permitted_actions=["trade:*", "data.read"], financial_scope=SCOPE)
    answer = kit.call(agent, f"select kakunin.verify_agent_scope({arguments})")
    assert answer["allowed"] is allowed
    assert reason in answer["reason"]
    assert answer["code"] == (None if allowed else "KA005")
    assert (answer["certificate_serial"], answer["agent_id"]) == (agent.serial, str(agent.agent_id))
    assert (answer["risk_score"], answer["risk_band"]) == (0, "low")


def test_verify_agent_scope_knows_the_day_so_far(kit: Kit) -> None:
    agent = kit.agent(permitted_actions=["trade:*"], financial_scope=SCOPE)
    ask = "select kakunin.verify_agent_scope('trade:x', 1000)"
    for _ in range(3):
        assert kit.call(agent, ask)["allowed"]
        kit.event(agent, "transaction_initiated", {"action": "trade:x", "amountUsd": 1000})
    answer = kit.call(agent, ask)
    assert (answer["allowed"], answer["reason"]) == (False, "4000 today exceeds daily_limit_usd 3000")


@pytest.mark.parametrize(("stop", "code"), [("revoke", "KA002"), ("suspend", "KA008"), ("risk", "KA002")])
def test_verify_agent_scope_answers_a_stopped_agent_too(kit: Kit, stop: str, code: str) -> None:
    agent = kit.agent(permitted_actions=["trade:*"])
    with kit.bound(agent) as session:
        if stop == "risk":
            for _ in range(3):
                kit.event(agent, ATTEMPT)
        else:
            getattr(agent, stop)()
        answer = one(session, "select kakunin.verify_agent_scope('trade:x')")
        assert (answer["allowed"], answer["code"]) == (False, code)
        with refused(code):
            session.execute("select kakunin.check_risk_score()")
    with kit.database.connect("agent_1") as unbound:
        assert one(unbound, "select kakunin.verify_agent_scope('trade:x')")["code"] == "KA004"


def test_check_risk_score_answers(kit: Kit) -> None:
    kit.ask("select kakunin.set_risk('{\"high\": 0.7}')")  # two attempts
    agent = kit.agent()
    ask = "select kakunin.check_risk_score()"
    answer = kit.call(agent, ask)
    assert answer == {
        "agent_id": str(agent.agent_id), "score": 0, "band": "low", "window_days": 30, "events": 0,
        "by_event_type": {}, "trend": "insufficient_data", "drift": "insufficient_data",
        "recommendation": "Proceed.",
    }  # fmt: skip
    kit.event(agent, ATTEMPT)
    answer = kit.call(agent, ask)
    assert (answer["band"], answer["recommendation"]) == ("medium", "Throttle: reduce transaction limits.")
    kit.event(agent, ATTEMPT)
    answer = kit.call(agent, ask)
    assert (answer["band"], answer["by_event_type"]) == ("high", {ATTEMPT: {"events": 2, "contribution": 1}})
    assert answer == kit.profile(agent)


# Policies -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ready_made(kit: Kit, name: str, table: str) -> Iterator[None]:
    """A file of sql/policies/ as it stands, applied by app."""
    with kit.database.connect("app", autocommit=True) as app:
        app.execute((sql_dir() / "policies" / f"{name}.sql").read_text())
        try:
            yield
        finally:
            app.execute(f"drop table {table}")


ORDER = "insert into agent_trades (amount_usd, venue) values (%s, %s)"


# The policy's table names no instrument, so a scope that limits them would permit nothing there.
NO_INSTRUMENT = {name: limit for name, limit in SCOPE.items() if name != "permitted_instruments"}


def test_spend_limits(kit: Kit) -> None:
    agent = kit.agent(financial_scope=NO_INSTRUMENT)
    other = kit.agent(financial_scope=NO_INSTRUMENT)
    unlimited, none = kit.agent(), kit.agent(financial_scope={"max_single_trade_usd": "?"})
    with ready_made(kit, "spend_limits", "agent_trades"):

        def order(who: Agent, amount: float | str | None, venue: str = "XLON") -> int:
            with kit.bound(who) as session:
                return session.execute(ORDER, [amount, venue]).rowcount

        assert order(agent, 1000) == 1
        for amount, venue in (
            (1001, "XLON"),
            (1, "XLO"),
            (-1, "XLON"),
            ("NaN", "XLON"),
            ("Infinity", "XLON"),
            (None, "XLON"),
        ):
            with pytest.raises(psycopg.Error) as caught:
                order(agent, amount, venue)
            assert caught.value.sqlstate == "KA009", (amount, venue)
        assert isinstance(errors.named(caught.value), errors.SpendLimitError)
        assert order(agent, 1000) == 1  # what was refused is not counted
        # Rows of one statement count one by one.
        with kit.bound(agent) as session, refused("KA009", match="today exceeds daily_limit_usd 3000"):
            session.execute(
                "insert into agent_trades (amount_usd, venue) select 400, 'XLON' from generate_series(1, 3)"
            )
        with kit.bound(agent) as session:
            session.execute(ORDER, [1000, "XLON"])
            session.rollback()
        assert order(agent, 1000) == 1
        with refused("KA009"):
            order(agent, 0.01)
        assert order(other, 1000) == 1  # another's day
        assert order(unlimited, 10**9, "anywhere") == 1
        with refused("KA009"):
            order(none, 1)
        kit.move(NOON + DAY)
        assert order(agent, 1000) == 1
        # Two transactions cannot both spend what is left, and nobody else waits.
        with kit.bound(agent) as first:
            first.execute(ORDER, [1000, "XLON"])
            with kit.bound(agent) as second, refused("55P03"):
                second.execute("set lock_timeout = '100ms'")
                second.execute(ORDER, [1000, "XLON"])
            assert order(other, 10) == 1
        with kit.bound(agent) as session:
            assert one(session, "select count(*) from agent_trades") == 5
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute("update agent_trades set amount_usd = 1")
        with kit.database.connect("agent_1") as unbound, refused("42501"):
            unbound.execute(ORDER, [1, "XLON"])


def test_a_spend_limit_that_observes(kit: Kit) -> None:
    agent = kit.agent(financial_scope=SCOPE)
    notices: list[str] = []
    with kit.bound(agent) as session:
        session.add_notice_handler(lambda n: notices.append(n.message_primary or ""))
        for amount in (1001, -1):
            assert one(session, "select kakunin.require_spend(%s, observe => true)", [amount]) is True
    assert [kind for kind in kit.types(agent) if "." in kind][-2:] == ["policy.observed"] * 2
    assert len(notices) == 2
    assert all("would be refused" in notice for notice in notices)


def test_risk_adaptive_is_read_only_from_high(kit: Kit) -> None:
    kit.ask("select kakunin.set_risk('{\"high\": 0.7}')")  # two attempts
    agent, exempt = kit.agent(), kit.agent()
    kit.ask("select kakunin.set_agent_risk(%s, 'why', true)::text", [exempt.agent_id])
    writes = [
        "insert into agent_notes (content) values ('b')",
        "update agent_notes set content = 'c'",
        "delete from agent_notes where content = 'b'",
    ]
    with ready_made(kit, "risk_adaptive", "agent_notes"):

        def write(who: Agent, statement: str) -> None:
            with kit.bound(who) as session:
                session.execute(statement)

        for who in (agent, exempt):
            for statement in writes:
                write(who, statement)
            kit.event(who, ATTEMPT)
            write(who, writes[0])  # medium
            kit.event(who, ATTEMPT)
        for statement in writes:
            with pytest.raises(psycopg.Error) as caught:
                write(agent, statement)
            assert caught.value.sqlstate == "KA011", statement
            write(exempt, statement)
        assert isinstance(errors.named(caught.value), errors.RiskTooHighError)
        assert kit.call(agent, "select count(*) from agent_notes") == 2
        kit.move(NOON + DAY)
        for statement in writes:
            write(agent, statement)
        kit.event(agent, ATTEMPT)
        kit.event(agent, ATTEMPT)
        with kit.database.connect("gateway") as session, refused("KA002"):
            bind(session, agent)
    for band in ("low", "none", "HIGH", "", None):
        with refused("KA010"):
            kit.call(exempt, "select kakunin.require_risk_below(%s)", [band])


def test_what_was_spent_is_kept_for_days_and_not_for_ever(kit: Kit) -> None:
    agent, other = kit.agent(financial_scope=SCOPE), kit.agent(financial_scope=SCOPE)
    spend = "select kakunin.require_spend(1, 'XLON', 'GILT')"
    days = "select count(*)::integer from kakunin_private.spending where agent_id = any (%s)"
    both = [[agent.agent_id, other.agent_id]]
    for day in range(4):
        kit.move(NOON + day * DAY)
        for who in (agent, other):
            kit.call(who, spend)
        kit.operator.execute(SETTLE)
    assert one(kit.installer, days, both) == 6
    with kit.bound(agent) as holder:
        one(holder, spend)  # of that day; nobody waits for it
        kit.move(NOON + 20 * DAY)
        kit.operator.execute(SETTLE)
        assert one(kit.installer, days, both) == 1
    kit.operator.execute(SETTLE)
    assert one(kit.installer, days, both) == 0


def test_changes_of_a_table_are_scored_where_a_trigger_says_them(kit: Kit) -> None:
    """What audit => true records is not scored; what the table's owner has an agent's statement say is."""
    agent = kit.agent()
    with kit.database.connect("app", autocommit=True) as app:
        app.execute("create table changed (permitted_agent_serial text, x integer)")
        app.execute("create index on changed (permitted_agent_serial)")
        app.execute("select kakunin.protect('changed', audit => true)")
        app.execute("grant insert on changed to kakunin_gateway")
        try:
            insert = "insert into changed select %s, i from generate_series(1, 7) i"
            for scored in (False, True):
                with kit.bound(agent) as session:
                    session.execute(insert, [agent.serial])
                kinds = kit.types(agent)
                assert ("data_mutation" in kinds) is scored
                assert kinds.count("table.insert") == 1 + scored
                app.execute(
                    "create or replace function say_changed() returns trigger language plpgsql as $$begin"
                    " perform kakunin.audit_log_append('data_mutation',"
                    " jsonb_build_object('table', tg_table_name, 'rows', (select count(*) from rows_now)));"
                    " return null; end$$"
                )
                app.execute(
                    "create or replace trigger say after insert on changed referencing new table as rows_now"
                    " for each statement execute function say_changed()"
                )
        finally:
            app.execute("drop table changed; drop function say_changed()")
    assert kit.profile(agent)["by_event_type"] == {"data_mutation": {"events": 1, "contribution": None}}


def test_a_policy_that_passes_no_venue_refuses_whom_a_scope_limits_to_some(kit: Kit) -> None:
    limited, free = kit.agent(financial_scope=SCOPE), kit.agent(financial_scope={"daily_limit_usd": 10})
    for call, missing in (
        ("1", "no venue is given"),
        ("1, 'XLON'", "no instrument is given"),
        ("1, null, 'GILT'", "no venue is given"),
    ):
        assert kit.call(free, f"select kakunin.require_spend({call})") is True
        with refused("KA009", match=missing):
            kit.call(limited, f"select kakunin.require_spend({call})")
    assert kit.call(limited, "select kakunin.require_spend(1, 'XLON', 'GILT')") is True


def test_a_risk_policy_that_observes(kit: Kit) -> None:
    agent = kit.agent()
    kit.event(agent, ATTEMPT)
    with refused("KA011"):
        kit.call(agent, "select kakunin.require_risk_below('medium')")
    assert kit.call(agent, "select kakunin.require_risk_below('medium', observe => true)") is True
    assert kit.entries(agent)[-1]["metadata"]["code"] == "KA011"
