"""What the kit costs a request through PostgREST, against the article's policy and against none.

    make postgrest; python benchmarks/postgrest.py [--bin DIRECTORY] [--seconds N]

Starts a throw-away server (the embedded Postgres 18, or the one whose programs are in DIRECTORY) and the
PostgREST of `make postgrest`, on a table of 200,000 rows of 200 agents:

  kit          kakunin.protect(), and kakunin.pre_request() before every request
  without hook kakunin.protect() alone: the claims are believed as PostgREST brings them
  article      a policy that compares the column with the claim in request.jwt.claims, for every row
  none         no policy; the request names the serial in a filter

  indexed      twenty rows by the index on the serial
  scan         the newest of all of them, by a sequential scan

One client asks each in turn, so that a slow moment of the machine hits all, and then eight at once, for some
seconds each. Prints medians, 95th percentiles, requests per second, and ratios to the article's policy.
"""

from __future__ import annotations

import argparse
import http.client
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, server_major
from postgrest_server import PostgREST
from results import record

from kakunin_db import CertificateAuthority, LocalSigner
from kakunin_db.migrate import migrate
from kakunin_db.resources import sql_dir

ROWS = 200_000
AGENTS = 200
CLIENTS = 8
CLAIM = "current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial'"

Ask = Callable[[http.client.HTTPConnection], None]


def prepare(cluster: Cluster) -> str:
    """The tables, and the serial of the agent whose rows are asked for."""
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole")
        admin.execute("grant create on database postgres to installer")
        for role in ("anon nologin", "authenticated nologin", "service_role nologin bypassrls"):
            admin.execute(f"create role {role}")
        for login in ("authenticator", "unhooked"):
            admin.execute(f"create role {login} login noinherit")
            admin.execute(f"grant anon, authenticated, service_role to {login}")
    migrate(cluster.dsn(user="installer"))
    with cluster.connect(user="installer", autocommit=True) as owner:
        owner.execute((sql_dir() / "supabase/api.sql").read_bytes())
        owner.execute("grant kakunin_agent to unhooked")
        owner.execute("select kakunin.set_gateway_logins('{authenticator,unhooked}', '{authenticator}')")
    authority = CertificateAuthority.create(LocalSigner.generate())
    with cluster.connect(autocommit=True) as admin:
        authority.trust(admin)
        (agent_id,) = admin.execute("select kakunin.create_agent('benchmark')").fetchone()
        issued = authority.issue(agent_id, LocalSigner.generate().public_key())
        issued.register(admin)
        for table in ("kit", "article", "none"):
            for kind in ("indexed", "scan"):
                name = f"{table}_{kind}"
                admin.execute(f"create table {name} (id int, permitted_agent_serial text, payload text)")
                admin.execute(
                    f"insert into {name} select i, case mod(i, {AGENTS}) when 0 then %s"
                    f" else lpad(to_hex(mod(i, {AGENTS})), 32, '0') end, repeat('x', 100)"
                    f" from generate_series(1, {ROWS}) i",
                    [issued.serial],
                )
                if kind == "indexed":
                    admin.execute(f"create index on {name} (permitted_agent_serial)")
                admin.execute(f"grant select on {name} to kakunin_agent")
                if table == "kit":
                    admin.execute(f"select kakunin.protect('{name}')")
                elif table == "article":
                    admin.execute(f"alter table {name} enable row level security")
                    admin.execute(f"create policy p on {name} using (permitted_agent_serial = {CLAIM})")
        admin.execute("vacuum analyze")
    return str(issued.serial)


def asker(path: str, token: str, rows: int) -> Ask:
    def ask(connection: http.client.HTTPConnection) -> None:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200 or content.count(b'"id"') != rows:
            raise SystemExit(f"{path}: {answer.status} {content[:200]!r}")

    return ask


def in_turn(asks: dict[str, tuple[int, Ask]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each request, of one client that asks each in turn."""
    connections = {name: http.client.HTTPConnection("127.0.0.1", port) for name, (port, _) in asks.items()}
    times: dict[str, list[float]] = {name: [] for name in asks}
    end = time.monotonic() + seconds * len(asks)
    while time.monotonic() < end:
        for name, (_, ask) in asks.items():
            start = time.perf_counter()
            ask(connections[name])
            times[name].append(time.perf_counter() - start)
    return {name: taken[len(taken) // 10 :] for name, taken in times.items()}


def at_once(port: int, ask: Ask, seconds: float) -> float:
    """Requests per second of CLIENTS clients."""
    done = [0] * CLIENTS
    end = time.monotonic() + seconds

    def client(n: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.monotonic() < end:
            ask(connection)
            done[n] += 1

    threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="The kit's cost through PostgREST.")
    parser.add_argument("--bin", type=Path, default=binaries(18), metavar="DIRECTORY")
    parser.add_argument("--seconds", type=float, default=3)
    options = parser.parse_args()
    cluster = Cluster(server_major(options.bin), options.bin)
    try:
        cluster.init()
        cluster.start()
        serial = prepare(cluster)
        with (
            PostgREST(cluster, "postgres", hook=True) as hooked,
            PostgREST(cluster, "postgres", hook=False, login="unhooked") as plain,
        ):
            for kind, query, rows in (
                ("indexed", "select=id&limit=20", 20),
                ("scan", "select=id&order=id.desc&limit=1", 1),
            ):
                asks: dict[str, tuple[int, Ask]] = {}
                for name, table, rest in (
                    ("kit", "kit", hooked),
                    ("without hook", "kit", plain),
                    ("article", "article", plain),
                    ("none", "none", plain),
                ):
                    own = f"&permitted_agent_serial=eq.{serial}" if table == "none" else ""
                    token = rest.token(
                        "kakunin_agent", kakunin_cert_serial=serial, exp=int(time.time()) + 3600
                    )
                    asks[name] = rest.port, asker(f"/{table}_{kind}?{query}{own}", token, rows)
                times = in_turn(asks, options.seconds)
                rounds: dict[str, list[float]] = {name: [] for name in asks}
                for _ in range(3):
                    for name, (port, ask) in asks.items():
                        rounds[name].append(at_once(port, ask, options.seconds / 2))
                base = statistics.median(times["article"]), statistics.median(rounds["article"])
                print(f"{kind:<10}{'median':>14}{'p95':>10}{'ratio':>8}{'requests/s':>14}{'ratio':>8}")
                for name, taken in times.items():
                    middle, rate = statistics.median(taken), statistics.median(rounds[name])
                    high = sorted(taken)[len(taken) * 95 // 100]
                    if name != "article":
                        what = {"kit": "protect(), with the hook", "without hook": "protect()"}.get(
                            name, name
                        )
                        record(
                            f"{kind}, {what}",
                            f"{middle * 1e3:.2f} ms",
                            "the article's policy",
                            middle / base[0],
                        )
                    print(
                        f"{name:<14}{middle * 1e3:>7.2f} ms{high * 1e3:>7.2f} ms{middle / base[0]:>8.2f}"
                        f"{rate:>14.0f}{rate / base[1]:>8.2f}"
                    )
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
