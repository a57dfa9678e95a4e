"""Whom the risk score catches, and whom it stops for nothing, over months of simulated traffic.

    python benchmarks/risk.py [--full] [--seed 1] [--mistakes 1] [--bin DIRECTORY]

Starts a throw-away server (the embedded Postgres 18, or the one whose programs are in DIRECTORY), installs
the kit and has its own functions score every event of `traffic.py`, with the clock moved: clock() of the
private schema is replaced, and assess() is called as audit_log_append() calls it, one event after another of
each agent. Baselines, rates, drift, stops and alerts are the kit's. Left out is what does not bear on a
score: the session's binding and the entries of the ledger. An agent has one chain here.

Compared over the same events:

  thresholds  3 high events in 15 minutes. High is a refused attempt, an amount over the certificate's limit,
              and what is over the 99.9th percentile of all benign agents' rows or amounts: set with
              hindsight, in its favour
  weekly      a job each Monday: chi-squared of the last week's event types against up to four weeks before,
              at p < 0.001
  weekly*     the same, its threshold set with hindsight so that it flags benign agents as often as the kit

Without --full it takes a minute or two. Prints the benign agents first: high (an alert, read-only under a
risk-adaptive policy) and revoked. Then for each attack whom it found out, after how long, and how many of the
attack's events there had been; and what share of benign agents is flagged in as long a time.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import psycopg
import traffic
from cluster import Cluster, binaries, server_major
from results import record
from traffic import ATTACKS, DAY, HOUR, KINDS, START, WEEK, Agent, Event

from kakunin_db.migrate import migrate

HISTORY = 45  # days before an attack, at least

# The present is where the event is. Setting a parameter is all that is needed to move it.
SETUP = """
create or replace function kakunin_private.clock() returns timestamptz language sql volatile parallel safe
return coalesce(nullif(current_setting('benchmark.clock', true), '')::timestamptz, clock_timestamp());
create schema benchmark;
create unlogged table benchmark.events (
  agent_id uuid, number integer, at timestamptz, event_type text, metadata jsonb,
  primary key (agent_id, number));
create unlogged table benchmark.flags (
  agent_id uuid, number integer, at timestamptz, risk jsonb,
  drift double precision, hard double precision, soft double precision);

-- Events in order, as audit_log_append() has them scored. What is flagged: the first event of each stretch at
-- high, and each stop. A stop ends it; but one before the attack, whose first event is p_attack, was for
-- nothing, and an operator reinstates the agent.
create function benchmark.run(p_agent_id uuid, p_scope jsonb, p_attack integer) returns bigint
language plpgsql as $$
declare
  v_bound  kakunin_private.bound;
  v_scored kakunin_private.assessed;
  v_event  record;
  v_was    boolean;
  v_count  bigint := 0;
begin
  v_bound.serial := 'AA';
  v_bound.agent_id := p_agent_id;
  v_bound.financial_scope := p_scope;
  v_bound.risk_exempt := false;
  v_bound.risk_factor := 1;
  v_bound.risk_epoch := 0;
  insert into kakunin_private.agents (agent_id, name) values (p_agent_id, 'agent');
  v_scored.chain := (kakunin_private.take_chain(p_agent_id)).chain;
  for v_event in select * from benchmark.events e where e.agent_id = p_agent_id order by e.number loop
    perform set_config('benchmark.clock', v_event.at::text, true);
    v_was := (v_scored.chain).alerted;
    v_scored := kakunin_private.assess(
      v_scored.chain, v_event.event_type, v_event.metadata, v_bound, v_event.at, v_event.at);
    v_count := v_count + 1;
    if v_scored.risk ? 'revoked' and (not v_was or v_scored.risk ->> 'revoked' = 'true') then
      insert into benchmark.flags values (p_agent_id, v_event.number, v_event.at, v_scored.risk,
        (v_scored.chain).drift, (v_scored.chain).hard, (v_scored.chain).soft);
    end if;
    if v_scored.risk ->> 'revoked' = 'true' then
      exit when v_event.number >= p_attack;
      delete from kakunin_private.risk_stops r where r.agent_id = p_agent_id;
      v_bound.risk_epoch := v_bound.risk_epoch + 1;
      v_scored.chain.drift := 0;
      update kakunin_private.agents a set reinstated_at = v_event.at where a.agent_id = p_agent_id;
    end if;
  end loop;
  return v_count;
end
$$;
"""


@dataclass
class Flag:
    """A moment at which something is said of an agent, in seconds from START."""

    at: float
    revoked: bool
    detail: str = ""


def metadata(event: Event) -> str:
    given = {
        "tool": event.tool,
        "table": event.table,
        "rows": event.rows,
        "amount_usd": event.amount,
        "venue": event.venue,
    }
    return json.dumps({name: value for name, value in given.items() if value is not None})


def score(job: tuple[str, list[Agent]]) -> list[list[Flag]]:
    """What the kit says of these agents."""
    dsn, agents = job
    found = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("set jit = off")
        for agent in agents:
            name = uuid.uuid4()
            with connection.transaction():
                with connection.cursor().copy("copy benchmark.events from stdin") as copy:
                    for number, event in enumerate(agent.events):
                        moment = START.timestamp() + event.at
                        copy.write_row((name, number, f"{_iso(moment)}", event.type, metadata(event)))
                scope = (
                    {"max_single_trade_usd": agent.limit, "permitted_venues": agent.venues}
                    if agent.limit
                    else None
                )
                connection.execute(
                    "select benchmark.run(%s, %s, %s)",
                    [name, json.dumps(scope) if scope else None, agent.attack_number],
                )
                flags = connection.execute(
                    "delete from benchmark.flags where agent_id = %s"
                    " returning number, risk, drift, hard, soft",
                    [name],
                ).fetchall()
                connection.execute("delete from benchmark.events where agent_id = %s", [name])
                connection.execute("delete from kakunin_private.risk_stops where agent_id = %s", [name])
            found.append(
                [
                    Flag(
                        agent.events[number].at,
                        bool(risk["revoked"]),
                        f"event {risk['score']} agent {risk['agent_score']} hard {hard:.2f} soft {soft:.2f}"
                        f" drift {drift:.2f} {risk['factors']}",
                    )
                    for number, risk, drift, hard, soft in sorted(flags, key=lambda flag: flag[0])
                ]
            )
    return found


def _iso(moment: float) -> str:
    return dt.datetime.fromtimestamp(moment, tz=dt.timezone.utc).isoformat()


# The baselines -------------------------------------------------------------------------------------


@dataclass
class Thresholds:
    """Fixed for all agents, over which an event is high."""

    rows: float
    amount: float

    @classmethod
    def of(cls, agents: list[Agent]) -> Thresholds:
        def most(values: Iterable[float]) -> float:
            ordered = sorted(values)
            return ordered[int(len(ordered) * 0.999)]

        return cls(
            most(e.rows for a in agents for e in a.events if e.rows),
            most(e.amount for a in agents for e in a.events if e.amount),
        )

    def is_high(self, agent: Agent, event: Event) -> bool:
        return (
            event.type == traffic.MISTAKE
            or (event.rows or 0) > self.rows
            or (event.amount or 0) > min(self.amount, agent.limit or math.inf)
        )

    def flags(self, agent: Agent) -> list[Flag]:
        found: list[Flag] = []
        high: list[float] = []
        for event in agent.events:
            if self.is_high(agent, event):
                high = [at for at in high if at > event.at - 900] + [event.at]
                if len(high) >= 3:
                    found.append(Flag(event.at, True))
                    high = []
        return found


def chi_squared_tail(statistic: float, freedom: int) -> float:
    """The probability of more than this, by Wilson and Hilferty's approximation to the normal."""
    if statistic <= 0:
        return 1.0
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def weekly(agent: Agent) -> list[tuple[float, float]]:
    """Each Monday with two weeks behind it, and -log10 of p for its last week against the four before."""
    weeks: dict[int, Counter[str]] = {}
    for event in agent.events:
        weeks.setdefault(int(event.at // WEEK), Counter())[event.type] += 1
    found = []
    for week in range(1, int(agent.events[-1].at // WEEK)):
        last = weeks.get(week, Counter())
        before: Counter[str] = Counter()
        for earlier in range(max(week - 4, 0), week):
            before.update(weeks.get(earlier, Counter()))
        n, m = sum(last.values()), sum(before.values())
        if min(n, m) < 20:
            continue
        # Types too few to test are put together.
        cells: dict[str, tuple[int, int]] = {}
        for name in last.keys() | before.keys():
            share = (last[name] + before[name]) / (n + m)
            key = name if share * min(n, m) >= 5 else "rest"
            a, b = cells.get(key, (0, 0))
            cells[key] = a + last[name], b + before[name]
        if len(cells) < 2:
            continue
        statistic = 0.0
        for a, b in cells.values():
            for seen, total in ((a, n), (b, m)):
                expected = (a + b) * total / (n + m)
                statistic += (seen - expected) ** 2 / expected
        tail = chi_squared_tail(statistic, len(cells) - 1)
        found.append(((week + 1) * WEEK, -math.log10(max(tail, 1e-300))))
    return found


# What comes of it -----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 2 * DAY else f"{seconds / DAY:.1f} d"


def detected(agents: list[Agent], flags: list[list[Flag]], revoked: bool) -> tuple[str, ...]:
    """Share found out; if any was, median and 90th percentile of time, median of attack events till then."""
    times, events = [], []
    for agent, said in zip(agents, flags, strict=True):
        begin = agent.attacked_at
        at = next((f.at for f in said if f.at >= begin and (f.revoked or not revoked)), None)
        if at is not None:
            times.append(at - begin)
            events.append(sum(e.hostile and e.at <= at for e in agent.events))
    share = f"{100 * len(times) / len(agents):.0f} %"
    if not times:
        return (share,)
    late = sorted(times)[math.ceil(0.9 * len(times)) - 1]
    return share, duration(statistics.median(times)), duration(late), f"{statistics.median(events):.0f}"


def by_chance(agents: list[Agent], flags: list[list[Flag]], kinds: tuple[str, ...], days: int) -> str:
    """The share of benign agents of these kinds with a flag in as long a window."""
    said = [
        any(HISTORY * DAY <= f.at < (HISTORY + days) * DAY for f in found)
        for agent, found in zip(agents, flags, strict=True)
        if agent.kind.name in kinds
    ]
    return f"{100 * sum(said) / len(said):.0f} %"


def report(
    fleet: list[Agent],
    days: int,
    benign: list[list[Flag]],
    attacked: dict[str, tuple[list[Agent], list[list[Flag]]]],
    verbose: bool,
) -> None:
    months = len(fleet) * days / 30
    thresholds = Thresholds.of(fleet)
    jobs = [weekly(agent) for agent in fleet]
    highs = sum(len(said) for said in benign)
    # As many as the kit's: the so-manieth largest of all that the job computed for benign agents.
    ordered = sorted((value for job in jobs for _, value in job), reverse=True)
    matched = ordered[min(highs, len(ordered) - 1)]

    def job_flags(job: list[tuple[float, float]], limit: float) -> list[Flag]:
        return [Flag(at, False) for at, value in job if value > limit]

    detectors: dict[str, tuple[list[list[Flag]], Any]] = {
        "kit": (benign, None),
        "thresholds": ([thresholds.flags(a) for a in fleet], thresholds.flags),
        "weekly": ([job_flags(job, 3) for job in jobs], lambda a: job_flags(weekly(a), 3)),
        "weekly*": ([job_flags(job, matched) for job in jobs], lambda a: job_flags(weekly(a), matched)),
    }
    events = sum(len(a.events) for a in fleet)
    print(f"\nbenign: {len(fleet)} agents, {months:.0f} agent-months, {events / months:.0f} events each")
    print(f"  thresholds: rows > {thresholds.rows:.0f}, amount > {thresholds.amount:.0f};", end=" ")
    print(f"weekly*: p < 1e-{matched:.0f}")
    print(f"{'':12} {'flags':>6} {'a month':>8} {'agents flagged':>15} {'revoked':>8}   by kind")
    for name, (said, _) in detectors.items():
        count = sum(len(found) for found in said)
        kinds = Counter(agent.kind.name for agent, found in zip(fleet, said, strict=True) for _ in found)
        revoked = sum(f.revoked for found in said for f in found) if name in ("kit", "thresholds") else "-"
        record(f"{months:.0f} benign agent-months, {name}: alerts, revoked", f"{count}, {revoked}")
        print(
            f"{name:12} {count:>6} {count / months:>8.3f} {sum(map(bool, said)):>15} {revoked:>8}   "
            + ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
        )
    if verbose:
        for agent, found in zip(fleet, benign, strict=True):
            for flag in found:
                what = "revoked" if flag.revoked else "high"
                print(f"    {agent.kind.name} {agent.name} day {flag.at / DAY:.2f} {what}: {flag.detail}")
    for attack, (agents, said) in attacked.items():
        _, kinds, watched = ATTACKS[attack]
        print(f"\n{attack}: {len(agents)} agents; found out, median time, 90 %, attack events; by chance")

        found_out: dict[str, str] = {}

        def line(
            name: str, found: tuple[str, ...], chance: str = "", found_out: dict[str, str] = found_out
        ) -> None:
            columns = "".join(f"{part:>{width}}" for part, width in zip(found, (6, 10, 9, 6), strict=False))
            print(f"  {name:14} {columns:34} {chance:>6}")
            found_out[name] = " in ".join(found[:2])

        line("kit, high", detected(agents, said, False), by_chance(fleet, benign, kinds, watched))
        line("kit, revoked", detected(agents, said, True))
        for name, (ours, flags) in detectors.items():
            if flags is not None:
                theirs = [flags(agent) for agent in agents]
                line(name, detected(agents, theirs, False), by_chance(fleet, ours, kinds, watched))
        high, revoked, *others = found_out.items()
        record(
            f"{attack} found out, median time",
            f"{high[1]}; revoked {revoked[1]}",
            "; ".join(" ".join(other) for other in others),
        )
        if verbose:
            for agent, found in zip(agents, said, strict=True):
                first = [f for f in found if f.at >= agent.attacked_at][:2]
                print(
                    f"    {agent.kind.name}: "
                    + (
                        "; ".join(f"{duration(f.at - agent.attacked_at)} {f.detail}" for f in first)
                        or "missed"
                    )
                )


def _fleet(job: tuple[int, int, str, int, float]) -> Agent:
    return traffic.benign(*job)


def _attacked(job: tuple[int, int, str, int]) -> Agent:
    return traffic.attacked(*job)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--full", action="store_true", help="over a thousand benign agent-months; ten minutes or so"
    )
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--bin", type=Path, default=binaries(18), help="folder of a server's programs")
    options.add_argument("--agents", type=int, help="benign agents; 24, or 348 with --full")
    options.add_argument("--attacks", help="only these, with commas between")
    options.add_argument("--each", type=int, help="agents to an attack; 4, or 18 with --full")
    options.add_argument(
        "--mistakes", type=float, default=1.0, help="times as many mistakes of benign agents"
    )
    options.add_argument("--settings", default="{}", help="for kakunin.set_risk(), as JSON")
    options.add_argument("--verbose", action="store_true", help="each flag and what it came of")
    chosen = options.parse_args()
    count = chosen.agents or (348 if chosen.full else 24)
    each = chosen.each or (18 if chosen.full else 4)
    days = 90 if chosen.full else 60
    names = [name for name in ATTACKS if chosen.attacks is None or name in chosen.attacks.split(",")]
    cores = os.cpu_count() or 1
    cluster = Cluster(
        server_major(chosen.bin),
        chosen.bin,
        settings={"shared_buffers": "512MB", "synchronous_commit": "off"},
    )
    cluster.init()
    cluster.start()
    began = time.monotonic()
    try:
        with cluster.connect(autocommit=True) as admin:
            admin.execute("create role installer login createrole")
            admin.execute("grant create on database postgres to installer")
        migrate(cluster.dsn(user="installer"))
        with cluster.connect(autocommit=True) as admin:
            admin.execute(SETUP)
            admin.execute("select kakunin.set_risk(%s)", [chosen.settings])
        with multiprocessing.Pool(cores) as pool:
            kinds = list(KINDS)
            fleet = pool.map(
                _fleet, [(chosen.seed, i, kinds[i % len(kinds)], days, chosen.mistakes) for i in range(count)]
            )
            victims = {
                name: pool.map(_attacked, [(chosen.seed, i, name, HISTORY) for i in range(each)])
                for name in names
            }
            everyone = [*fleet, *(agent for agents in victims.values() for agent in agents)]
            # A few agents at a time, so that no core is left with the long ones.
            batches = [(cluster.dsn(), everyone[i : i + 4]) for i in range(0, len(everyone), 4)]
            said = [flags for batch in pool.map(score, batches, chunksize=1) for flags in batch]
        scored = sum(len(agent.events) for agent in everyone)
        print(
            f"seed {chosen.seed}, mistakes x{chosen.mistakes:g}, Postgres {server_major(chosen.bin)}:",
            end=" ",
        )
        print(f"{scored} events in {time.monotonic() - began:.0f} s")
        attacked, at = {}, len(fleet)
        for name, agents in victims.items():
            attacked[name] = agents, said[at : at + len(agents)]
            at += len(agents)
        report(fleet, days, said[: len(fleet)], attacked, chosen.verbose)
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
