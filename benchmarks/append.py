"""What one audit_log_append() costs the server, and whether that grows with the agent's history.

    python benchmarks/append.py [--bin DIRECTORY] [--history 1000,1000000] [--rounds 9]

Starts a throw-away server and measures, in turns, the CPU time of the backend (from /proc, so that other
work on the machine counts least) for a statement, prepared, in a transaction of its own:

  plain      an insert of such a row into a table with the ledger's columns and indexes
  bound      kakunin.current_cert_serial(): what every policy asks, and an append as well
  unscored   an append as the kit makes its own, by kakunin_private.append()
  scored     kakunin.audit_log_append(), for agents with as many events behind them as --history says, spread
             over 30 days

and plain and scored by ten in a transaction, which prepares for once what each of them needs.

Prints medians in microseconds, and ratios to plain and between the histories, as medians of pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, server_major
from ledger import ENTRY, METADATA, fill, prepare
from results import record

REPEATS = 300
TOGETHER = 10


def cpu(connection: psycopg.Connection[Any]) -> float:
    """Seconds that the backend has been on a core."""
    schedstat = Path(f"/proc/{connection.info.backend_pid}/schedstat").read_text()
    return int(schedstat.split()[0]) / 1e9


def history(admin: psycopg.Connection[Any], agent_id: Any, serial: str, events: int) -> None:
    """As many events, in the ledger and in the hours before this one, of five types."""
    admin.execute(
        "insert into kakunin_private.risk_hours (agent_id, hour, chain_id, event_type, events, amounts,"
        " amount_usd, log_sum, log_square)"
        " select %s, date_bin('1 hour', now(), 'epoch') - h * interval '1 hour', 0, t,"
        "        greatest(%s / 3600, 1), greatest(%s / 3600, 1), 100, 4, 16"
        "   from generate_series(1, 720) h, unnest('{api_call,data_access,data_mutation,"
        "transaction_initiated,other}'::text[]) t"
        " limit %s",
        [agent_id, events, events, events],
    )
    fill(admin, agent_id, serial, events)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bin", type=Path, default=binaries(18), help="folder of a server's programs")
    options.add_argument("--history", default="1000,1000000")
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args()
    sizes = [int(size) for size in chosen.history.split(",")]
    cluster = Cluster(server_major(chosen.bin), chosen.bin, settings={"fsync": "on"})
    cluster.init()
    cluster.start()
    try:
        credentials, _ = prepare(cluster, len(sizes), None)
        cases: dict[str, tuple[psycopg.Connection[Any], str, list[Any]]] = {}
        admin = cluster.connect(autocommit=True, prepare_threshold=0)
        for credential, size in zip(credentials, sizes, strict=True):
            history(admin, credential.agent_id, credential.serial, size)
        for credential, size in zip(credentials, sizes, strict=True):
            agent = cluster.connect(user="agent", autocommit=True, prepare_threshold=0)
            (ticket,) = agent.execute(
                "select kakunin.open_session(%s)", [credential.assertion(credential.installation_id)]
            ).fetchone()
            agent.execute("select kakunin.bind_session(%s, false)", [ticket])
            cases[f"scored, {size}"] = (
                agent,
                "select kakunin.audit_log_append('data_access', %s::jsonb, 's-1')",
                [METADATA],
            )
        agent, identity = cases[f"scored, {sizes[0]}"][0], credentials[0]
        cases["plain"] = (
            agent,
            "insert into plain (agent_id, entry) values (%s, %s)",
            [identity.agent_id, ENTRY],
        )
        cases["bound"] = (agent, "select kakunin.current_cert_serial()", [])
        cases["unscored"] = (
            admin,
            "select kakunin_private.append('data_access', %s, %s, 's-1', %s, %s)",
            [identity.agent_id, identity.serial, METADATA, identity.agent_id],
        )
        # A thousand entries a transaction leave as many dead versions of a chain, as no agent does.
        admin.execute("vacuum analyze")
        taken: dict[str, list[float]] = {}
        for _ in range(chosen.rounds):
            for name, (connection, statement, parameters) in cases.items():
                for size in (1, TOGETHER) if name in ("plain", f"scored, {sizes[0]}") else (1,):
                    for _ in range(20):
                        connection.execute(statement.encode(), parameters)
                    before = cpu(connection)
                    for _ in range(REPEATS // size):
                        with connection.transaction() if size > 1 else nullcontext():
                            for _ in range(size):
                                connection.execute(statement.encode(), parameters)
                    spent = (cpu(connection) - before) / REPEATS * 1e6
                    taken.setdefault(name if size == 1 else f"{name}, by {size}", []).append(spent)
        print(f"Postgres {server_major(chosen.bin)}, {os.cpu_count()} cores, CPU time of the backend\n")
        for name, found in taken.items():
            against = f"plain, by {TOGETHER}" if name.endswith(f", by {TOGETHER}") else "plain"
            ratio = statistics.median(a / b for a, b in zip(found, taken[against], strict=True))
            print(f"  {name:<20} {statistics.median(found):>7.1f} us   {ratio:>5.2f} of {against}")
            record(
                f"{name}, CPU time of the backend",
                f"{statistics.median(found):.0f} µs",
                "" if name == against else against,
                None if name == against else ratio,
            )
        first, last = (taken[f"scored, {size}"] for size in (sizes[0], sizes[-1]))
        growth = statistics.median(b / a for a, b in zip(first, last, strict=True))
        record(f"an append with {sizes[-1]:,} events behind it", "", f"with {sizes[0]:,}", growth)
        print(f"\n  with {sizes[-1]} events behind it, against {sizes[0]}: {growth:.2f}")
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
