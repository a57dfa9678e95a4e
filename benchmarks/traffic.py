"""Months of agent traffic, and attacks on top of it, from a seed.

An agent is a stream of events. `benign()` draws one of a kind (`KINDS`) and `attacked()` adds one of
`ATTACKS` to it. What is drawn depends on the seed, the agent's number and its kind alone, so an agent is the
same in every run.

Time is in seconds from `START`, a Monday at midnight, UTC.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

START = dt.datetime(2025, 1, 6, tzinfo=dt.timezone.utc)
HOUR, DAY, WEEK = 3600.0, 86400.0, 604800.0
MONTH = 30 * DAY
MISTAKE = "unauthorized_access_attempt"


class Event(NamedTuple):
    """One call of audit_log_append()."""

    at: float
    type: str
    tool: str | None = None
    table: str | None = None
    rows: int | None = None
    amount: float | None = None
    venue: str | None = None
    hostile: bool = False


@dataclass
class Kind:
    """What agents of a kind have in common; each agent draws its own numbers around these."""

    name: str
    a_month: float  # events, before growth and seasons
    mix: dict[str, float]  # of event types
    hours: Callable[[int, int], float]  # weight of an hour, by weekday (Monday is 0) and hour of the day
    burst: float = 0.35  # standard deviation of the logarithm of an hour's level
    growth: tuple[float, float] = (0.95, 1.1)  # factor a month
    season: float = 0.15  # amplitude of a slow wave of two to four months
    month_end: tuple[float, float] = (1.0, 1.2)  # factor of the last two days and the first
    rows: float = 20.0  # median of a read
    rows_spread: float = 1.0  # standard deviation of the logarithm
    amounts: bool = False
    late: float = 0.0  # evenings a month that work goes on until midnight
    nights: float = 0.0  # nights a month that are worked


def _round_the_clock(weekday: int, hour: int) -> float:
    level = 1 + 0.6 * math.sin((hour - 8) / 24 * 2 * math.pi)
    return level * (0.7 if weekday >= 5 else 1.0)


def _office(weekday: int, hour: int) -> float:
    if weekday >= 5 or not 8 <= hour < 18:
        return 0.0
    return 0.5 if hour in (8, 12, 17) else 1.0


def _nightly(weekday: int, hour: int) -> float:
    return {1: 1.0, 2: 0.6}.get(hour, 0.0)


def _market(weekday: int, hour: int) -> float:
    if weekday >= 5 or not 8 <= hour < 17:
        return 0.0
    return 1.6 if hour in (8, 16) else 1.0


KINDS = {
    kind.name: kind
    for kind in (
        Kind("service", 900, {"api_call": 70, "data_access": 22, "data_mutation": 7, "health_check": 1},
             _round_the_clock),
        Kind("growing", 250, {"api_call": 60, "data_access": 25, "data_mutation": 15}, _round_the_clock,
             growth=(2.0, 3.0)),
        Kind("analyst", 600, {"data_access": 70, "api_call": 25, "report": 5}, _office, burst=0.6, rows=150,
             rows_spread=1.3, month_end=(1.5, 3.0), late=2.0, nights=0.15),
        Kind("batch", 1200, {"data_access": 45, "data_mutation": 50, "api_call": 5}, _nightly, burst=0.3,
             rows=500, rows_spread=0.8, month_end=(1.0, 2.5)),
        Kind("trading", 900, {"transaction_initiated": 45, "data_access": 35, "api_call": 20}, _market,
             burst=0.5, rows=10, amounts=True, month_end=(1.0, 1.8)),
        Kind("rare", 120, {"api_call": 50, "data_access": 35, "data_mutation": 15}, _office, burst=1.0,
             rows=40),
    )
}  # fmt: skip


@dataclass
class Agent:
    """An agent and all that it did, in order."""

    name: str
    kind: Kind
    events: list[Event] = field(default_factory=list)
    limit: float | None = None  # max_single_trade_usd of its certificate
    venues: list[str] = field(default_factory=list)
    attack: str | None = None
    attacked_at: float = math.inf

    @property
    def attack_number(self) -> int | None:
        """Which of its events is the attack's first."""
        return next((number for number, event in enumerate(self.events) if event.hostile), None)


def _poisson(r: random.Random, mean: float) -> int:
    if mean > 50:
        return max(0, round(r.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), r.random(), 0
    while product > limit:
        product *= r.random()
        count += 1
    return count


class _Simulation:
    """One agent's days; its attributes are what an attack on it has to know."""

    def __init__(self, seed: int, name: str, kind: Kind, days: int, mistakes: float) -> None:
        self.r = r = random.Random(f"{seed}/{kind.name}/{name}")
        self.days, self.kind = days, kind
        self.agent = Agent(name, kind)
        self.level = r.lognormvariate(0, 0.4)
        self.growth = math.exp(r.uniform(*map(math.log, kind.growth)))
        self.season = (r.uniform(0, kind.season), r.uniform(60, 120) * DAY, r.uniform(0, 2 * math.pi))
        self.month_end = r.uniform(*kind.month_end)
        self.shift = r.choice((0, 0, 1, -1, 2)) if kind.hours is not _round_the_clock else r.randrange(24)
        self.mix = {t: w * r.lognormvariate(0, 0.3) for t, w in kind.mix.items()}
        self.mixes: list[tuple[float, dict[str, float]]] = [(0.0, dict(self.mix))]
        self.rows = math.log(kind.rows) + r.gauss(0, 0.5)
        self.names = {
            "tool": [f"{kind.name}.tool{i}" for i in range(r.randint(4, 10))],
            "table": [f"{kind.name}_table{i}" for i in range(r.randint(4, 12))],
        }
        if kind.amounts:
            self.amount = math.log(r.lognormvariate(math.log(2000), 0.8))
            self.amount_spread = r.uniform(0.5, 0.9)
            self.agent.venues = ["XLON", "XPAR", "XETR"]
            self.agent.limit = round(math.exp(self.amount + 4 * self.amount_spread), 2)
        self.deviation = 0.0  # of amounts, wandering from day to day
        # How prone to mistakes: most weeks have none, some one, few two; half of those within minutes.
        self.prone = r.choice((0.0, 0.1, 0.2, 0.4, 0.7)) * mistakes
        weights = [kind.hours(int(h // 24) % 7, int(h - self.shift) % 24) for h in range(7 * 24)]
        self.usual = [w * 168 / sum(weights) for w in weights]

    # One event --------------------------------------------------------------------------------------

    def pick(self, mix: dict[str, float]) -> str:
        return self.r.choices(list(mix), list(mix.values()))[0]

    def mix_at(self, at: float) -> dict[str, float]:
        return next(mix for since, mix in reversed(self.mixes) if at >= since)

    def event(
        self, at: float, kind: str, hostile: bool = False, rows: float = 1.0, amount: float = 1.0
    ) -> Event:
        r = self.r
        if kind == "transaction_initiated":
            usd = math.exp(r.gauss(self.amount + self.deviation, self.amount_spread)) * amount
            # The agent keeps to its limit, as its code asks for before it trades.
            usd = min(usd, (self.agent.limit or math.inf) * 0.95)
            return Event(at, kind, "trade", None, None, round(usd, 2), r.choice(self.agent.venues), hostile)
        if kind == "data_access":
            count = math.exp(r.gauss(self.rows, self.kind.rows_spread)) * rows
            return Event(at, kind, "query", self.name("table"), max(1, round(count)), hostile=hostile)
        if kind == "data_mutation":
            return Event(at, kind, "write", self.name("table"), 1 + int(r.expovariate(0.5)), hostile=hostile)
        return Event(at, kind, self.name("tool"), hostile=hostile)

    def name(self, what: str) -> str:
        names = self.names[what]
        return names[min(int(self.r.paretovariate(0.8)) - 1, len(names) - 1)]

    # A life -----------------------------------------------------------------------------------------

    def mistake(self, at: float) -> Event:
        r = self.r
        if self.agent.limit and r.random() < 0.3:  # a trade beyond the limit, which policies refuse
            usd = round(self.agent.limit * r.uniform(1.01, 1.6), 2)
            return Event(at, "transaction_initiated", "trade", None, None, usd, r.choice(self.agent.venues))
        return Event(at, MISTAKE, self.name("tool"), self.name("table") if r.random() < 0.5 else None)

    def active(self, week: int) -> float:
        """A moment of this week, among the hours the agent works."""
        hour = self.r.choices(range(168), self.usual)[0]
        return week * WEEK + (hour + self.r.random()) * HOUR

    def expected(self, at: float) -> float:
        """Events in the hour that begins at this moment."""
        amplitude, period, phase = self.season
        mean = self.kind.a_month / (MONTH / HOUR) * self.level * self.usual[int(at // HOUR) % 168]
        mean *= math.exp(math.log(self.growth) * at / MONTH) * (
            1 + amplitude * math.sin(2 * math.pi * at / period + phase)
        )
        return mean * (self.month_end if self.at_month_end(at) else 1.0)

    @staticmethod
    def at_month_end(at: float) -> bool:
        moment = START + dt.timedelta(seconds=at)
        return moment.day == 1 or (moment + dt.timedelta(days=2)).day <= 2

    def live(self) -> None:
        r, kind, events = self.r, self.kind, self.agent.events
        until = self.days * DAY
        # Deploys change the mix a bit, and now and then bring a type that is new.
        at = r.expovariate(1 / (20 * DAY))
        while at < until:
            mix = {t: w * r.lognormvariate(0, 0.25) for t, w in self.mixes[-1][1].items()}
            if r.random() < 0.15:
                mix[f"feature{len(self.mixes)}"] = sum(mix.values()) * r.uniform(0.01, 0.08)
            self.mixes.append((at, mix))
            at += r.expovariate(1 / (20 * DAY))
        # An outage holds events up; what was held up is done in the hour or two after it.
        outages = []
        at = r.expovariate(1 / (35 * DAY))
        while at < until:
            outages.append((at, at + r.uniform(0.5, 8) * HOUR, r.uniform(0.5, 2) * HOUR))
            at += r.expovariate(1 / (35 * DAY))
        # Work at hours that are not the agent's.
        late: dict[int, tuple[int, int]] = {}
        for day in range(self.days):
            if r.random() < kind.late / 30:
                late[day] = (18, 24)
            elif r.random() < kind.nights / 30:
                late[day] = (0, r.randint(2, 5))
        daily = 0.0
        new_names = r.uniform(0.2, 2) / (WEEK / HOUR)
        for hour in range(self.days * 24):
            start = hour * HOUR
            if hour % 24 == 0:
                daily = 0.7 * daily + r.gauss(0, 0.15)
                self.deviation = 0.8 * self.deviation + r.gauss(0, 0.1)
            mean = self.expected(start) * math.exp(daily + r.gauss(0, kind.burst) - kind.burst**2 / 2)
            hours = late.get(hour // 24)
            if hours and hours[0] <= hour % 24 < hours[1]:
                mean += kind.a_month * self.level / 200 * r.uniform(0.3, 1)
            if kind.name == "rare":  # all of a day's work at once, on some days
                mean *= 6 if random.Random(f"{self.agent.name}/{hour // 24}").random() < 1 / 6 else 0
            count = _poisson(r, mean)
            if count and r.random() < new_names:
                what = r.choice(("tool", "table"))
                self.names[what].append(f"{kind.name}_{what}{len(self.names[what])}")
                events.append(Event(start + r.random() * HOUR, "api_call", self.names["tool"][-1]))
            mix = self.mix_at(start)
            wide = 2.0 if self.at_month_end(start) and self.month_end > 1.4 else 1.0
            for _ in range(count):
                events.append(self.event(start + r.random() * HOUR, self.pick(mix), rows=wide))
        for begin, end, catch_up in outages:
            for i, event in enumerate(events):
                if begin <= event.at < end:
                    events[i] = event._replace(at=end + r.random() * catch_up)
        for week in range(self.days // 7 + 1):
            if r.random() < self.prone:
                first = self.active(week)
                events.append(self.mistake(first))
                if r.random() < 0.3:
                    near = first + r.uniform(5, 300)
                    events.append(self.mistake(near if r.random() < 0.5 else self.active(week)))
            # The same call again and again, after a time-out or for a bad answer.
            if r.random() < 0.4:
                first = self.active(week)
                call = self.event(first, "api_call")
                events.extend(call._replace(at=first + r.random() * 900) for _ in range(r.randint(20, 120)))
            # A large export that is meant.
            if "data_access" in self.mix and r.random() < 0.25:
                events.append(self.event(self.active(week), "data_access", rows=r.uniform(10, 50)))
        self.agent.events = sorted((e for e in events if e.at < until), key=lambda event: event.at)


# Attacks --------------------------------------------------------------------------------------------


def _probing(s: _Simulation, begin: float) -> Iterator[Event]:
    """Credential probing: an attempt every half minute to three minutes, whenever the agent works."""
    at = s.active(int(begin // WEEK))
    for i in range(40):
        yield Event(at, MISTAKE, f"probe{i % 7}", hostile=True)
        at += s.r.uniform(30, 180)


def _bulk(s: _Simulation, begin: float) -> Iterator[Event]:
    """Bulk reads: tables it knows, 30 to 300 times as many rows, every 20 to 90 seconds for 3 hours."""
    begin = at = s.active(int(begin // WEEK))
    while at < begin + 3 * HOUR:
        yield s.event(at, "data_access", True, rows=s.r.uniform(30, 300))
        at += s.r.uniform(20, 90)


def _creep(s: _Simulation, begin: float) -> Iterator[Event]:
    """Amount creep: every amount 4 % larger each day, up to eight times, and always below the limit."""
    for event in s.agent.events:
        if event.at >= begin and event.amount:
            factor = min(1.04 ** ((event.at - begin) / DAY), 8)
            if event.amount < (s.agent.limit or math.inf):
                usd = min(round(event.amount * factor, 2), round((s.agent.limit or math.inf) * 0.95, 2))
                yield event._replace(amount=usd, hostile=True)


def _mix(s: _Simulation, begin: float) -> Iterator[Event]:
    """Slow drift of actions: over 30 days half of the events become mutations, transfers and exports."""
    for event in s.agent.events:
        if event.at >= begin and s.r.random() < 0.5 * min((event.at - begin) / MONTH, 1):
            kind = s.r.choice(("data_mutation", "export", "transfer"))
            yield s.event(event.at, kind, True)


def _slow(s: _Simulation, begin: float) -> Iterator[Event]:
    """Low and slow: an attempt every 6 to 18 hours for three weeks, day and night, and a read after it."""
    at = begin + s.r.uniform(0, 12) * HOUR
    while at < begin + 3 * WEEK:
        yield Event(at, MISTAKE, s.name("tool"), hostile=True)
        yield s.event(at + s.r.uniform(60, 600), "data_access", True)
        at += s.r.uniform(6, 18) * HOUR


def _night(s: _Simulation, begin: float) -> Iterator[Event]:
    """A stolen certificate: for two hours in each of seven nights 20 to 60 usual calls and reads an hour."""
    quiet = [
        h
        for h in range(24)
        if not any(s.usual[d * 24 + (h + k) % 24] for d in range(5) for k in (-1, 0, 1, 2))
    ]
    start = quiet[len(quiet) // 2]
    for night in range(7):
        at = begin + night * DAY + start * HOUR + s.r.uniform(0, 1800)
        end, pause = at + 2 * HOUR, HOUR / s.r.uniform(20, 60)
        while at < end:
            kind = "data_access" if s.r.random() < 0.8 else "api_call"
            yield s.event(at, kind, True, rows=s.r.uniform(1, 3))
            at += s.r.expovariate(1 / pause)


#: What is done, to agents of which kinds, and for how many days it is watched.
ATTACKS: dict[str, tuple[Callable[[_Simulation, float], Iterator[Event]], tuple[str, ...], int]] = {
    "probing": (_probing, ("service", "growing", "analyst", "batch", "trading", "rare"), 8),
    "bulk reads": (_bulk, ("service", "analyst", "batch", "trading"), 8),
    "amount creep": (_creep, ("trading",), 60),
    "mix drift": (_mix, ("service", "growing", "analyst", "trading"), 50),
    "low and slow": (_slow, ("service", "analyst", "batch", "trading"), 28),
    "stolen at night": (_night, ("analyst", "trading", "batch"), 10),
}


def benign(seed: int, number: int, kind: str, days: int, mistakes: float = 1.0) -> Agent:
    """An agent nobody attacks. `mistakes` multiplies how often it tries what it may not."""
    simulation = _Simulation(seed, str(number), KINDS[kind], days, mistakes)
    simulation.live()
    return simulation.agent


def attacked(seed: int, number: int, attack: str, history: int) -> Agent:
    """An agent with so many days of its own behind it, and the attack on top of what it goes on doing."""
    make, kinds, watched = ATTACKS[attack]
    kind = KINDS[kinds[number % len(kinds)]]
    history += number % 14  # not all on one day of the week or month
    simulation = _Simulation(seed, f"{attack}/{number}", kind, history + watched, 1.0)
    simulation.live()
    agent = simulation.agent
    hostile = list(make(simulation, history * DAY))
    if attack in ("amount creep", "mix drift"):  # in place of what it would have done
        instead = {event.at for event in hostile}
        agent.events = [event for event in agent.events if event.at not in instead]
    agent.attack = attack
    agent.events = sorted([*agent.events, *hostile], key=lambda event: event.at)
    agent.attacked_at = min(event.at for event in hostile)
    return agent
