"""What a bound session costs, against the plain-Postgres way of doing the same.

    python benchmarks/session.py [--bin DIRECTORY]

Starts a throw-away server (the embedded Postgres 18, or the one whose programs are in DIRECTORY), and
compares in one run, taking turns so that a slow moment of the machine hits both sides:

  transaction   bind_session() and one indexed query on a protected table, against a bare set_config()
                and the same query under a policy that reads that setting
  python        the same through bind_agent_session(), against BEGIN, set_config() and the query; and with
                the server half a millisecond away, because binding saves a round trip
  scan          a sequential scan of a protected table, against a hand-written `where` and against the
                article's policy, which reads and parses the claims at every row
  open_session  the exchange of an assertion for a ticket, RSA-2048 signature check included

Prints medians and the ratio of each round's pair (median, and the 10th and 90th percentile).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, far_away, server_major
from results import record

from kakunin_db import AgentCredential, CertificateAuthority, LocalSigner, bind_agent_session
from kakunin_db.migrate import migrate

ROWS = 200_000
AGENTS = 200


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compare(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, each: int = 1
) -> tuple[float, float]:
    """Runs both in turn and prints their medians and the ratio of each pair; returns the median of ours, in
    seconds, and of the ratios."""
    a: list[float] = []
    b: list[float] = []
    for _ in range(rounds + rounds // 10):
        a.append(statistics.median(timed(ours) for _ in range(each)))
        b.append(statistics.median(timed(theirs) for _ in range(each)))
    del a[: rounds // 10], b[: rounds // 10]  # warming up
    ratios = sorted(x / y for x, y in zip(a, b, strict=True))
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    print(
        f"{name:<46} {statistics.median(a) * 1e6:>10.0f} {statistics.median(b) * 1e6:>10.0f}"
        f"   {statistics.median(ratios):.2f}  ({low:.2f} to {high:.2f})"
    )
    return statistics.median(a), statistics.median(ratios)


def prepare(cluster: Cluster) -> AgentCredential:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole")
        admin.execute("grant create on database postgres to installer")
    migrate(cluster.dsn(user="installer"))
    signer = LocalSigner.generate()
    authority = CertificateAuthority.create(LocalSigner.generate())
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role agent login in role kakunin_agent")
        (agent_id,) = admin.execute("select kakunin.create_agent('benchmark')").fetchone()
        authority.trust(admin)
        issued = authority.issue(agent_id, signer.public_key())
        issued.register(admin)
        for table in ("protected", "plain", "by_setting", "by_claims"):
            admin.execute(f"create table {table} (id int, permitted_agent_serial text, payload text)")
            admin.execute(
                f"insert into {table} select i,"
                f" case when i % {AGENTS} = 0 then %s else md5((i % {AGENTS})::text) end, repeat('x', 60)"
                f" from generate_series(1, {ROWS}) i".replace("%", "%%").replace("%%s", "%s"),
                [issued.serial],
            )
            admin.execute(f"create index on {table} (permitted_agent_serial, id)")
            admin.execute(f"grant select on {table} to agent")
            admin.execute(f"vacuum analyze {table}")
        admin.execute("select kakunin.protect('protected')")
        admin.execute("alter table by_setting enable row level security")
        admin.execute("alter table by_claims enable row level security")
        admin.execute(
            "create policy p on by_setting using"
            " (permitted_agent_serial = (select current_setting('app.serial', true)))"
        )
        admin.execute(
            "create policy p on by_claims using (permitted_agent_serial ="
            " current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial')"
        )
    return AgentCredential(agent_id, issued.serial, signer)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bin", type=Path, default=binaries(18), help="folder of a server's programs")
    bindir = options.parse_args().bin
    major = server_major(bindir)
    cluster = Cluster(major, bindir)
    cluster.init()
    cluster.start()
    try:
        credential = prepare(cluster)
        print(f"Postgres {major}, {ROWS} rows of {AGENTS} agents, Unix socket, times in microseconds\n")
        print(f"{'':<46} {'kakunin':>10} {'other':>10}   ratio  (10th to 90th percentile)")
        measure(cluster, credential)
    finally:
        cluster.destroy()


def python_api(name: str, dsn: str, credential: AgentCredential) -> None:
    query = "select payload from {} where id = 200"
    with (
        psycopg.connect(dsn) as plain,
        psycopg.connect(dsn) as connection,
        bind_agent_session(connection, credential),
    ):

        def bound() -> None:
            connection.execute(query.format("protected")).fetchall()
            connection.commit()

        def setting() -> None:
            plain.execute("select set_config('app.serial', %s, true)", [credential.serial])
            plain.execute(query.format("by_setting")).fetchall()
            plain.commit()

        median, ratio = compare(name, bound, setting, 200, 5)
        record(
            name.split(",", maxsplit=1)[0],
            f"{median * 1e6:.0f} µs",
            "set_config() and a policy that reads it",
            ratio,
        )


def measure(cluster: Cluster, credential: AgentCredential) -> None:
    serial = credential.serial
    with cluster.connect(user="agent", autocommit=True) as c:
        (installation,) = c.execute("select kakunin.installation_id()").fetchone()

        def open_session() -> str:
            return c.execute("select kakunin.open_session(%s)", [assertions.pop()]).fetchone()[0]

        assertions = [credential.assertion(installation, 300) for _ in range(220)]
        ticket = open_session()

        def bound() -> None:
            c.execute("begin")
            c.execute("select kakunin.bind_session(%s)", [ticket])
            c.execute("select payload from protected where id = 200").fetchall()
            c.execute("commit")

        def setting() -> None:
            c.execute("begin")
            c.execute("select set_config('app.serial', %s, true)", [serial])
            c.execute("select payload from by_setting where id = 200").fetchall()
            c.execute("commit")

        median, ratio = compare("transaction, against set_config", bound, setting, 300, 5)
        record(
            "bound transaction, one indexed query, in SQL",
            f"{median * 1e6:.0f} µs",
            "set_config() and a policy that reads it",
            ratio,
        )

        python_api("bind_agent_session, against set_config", cluster.dsn(user="agent"), credential)
        with far_away(cluster.port, 0.0005) as port:
            away = f"host=127.0.0.1 port={port} dbname=postgres user=agent"
            python_api("the same with the server 0.5 ms away", away, credential)

        # One transaction for the scans, so that binding is not in them; no index, no parallel workers.
        c.execute("set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off")
        c.execute("set max_parallel_workers_per_gather = 0")
        with c.transaction():
            c.execute("select kakunin.bind_session(%s)", [ticket])

            def scan(table: str, where: str = "") -> Callable[[], Any]:
                return lambda: c.execute(f"select count(payload) from {table} {where}").fetchone()

            where = scan("plain", f"where permitted_agent_serial = '{serial}'")
            median, ratio = compare("scan, against a hand-written where", scan("protected"), where, 40)
            record(f"scan of {ROWS:,} rows", f"{median * 1e3:.1f} ms", "a hand-written where", ratio)
            median, ratio = compare(
                "scan, against the article's policy", scan("protected"), scan("by_claims"), 20
            )
            record("the same", f"{median * 1e3:.1f} ms", "the article's policy", ratio)

        times = [timed(open_session) for _ in range(len(assertions))]
        print(f"{'open_session':<46} {statistics.median(times) * 1e6:>10.0f}")
        record(
            "open_session(), RSA-2048 signature check included", f"{statistics.median(times) * 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()
