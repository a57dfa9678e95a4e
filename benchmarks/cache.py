"""How soon a revocation is seen by a cache in another process, and what a kept answer costs.

    python benchmarks/cache.py [--bin DIRECTORY] [--revocations N]

Starts a throw-away server (the embedded Postgres 18, or the one whose programs are in DIRECTORY) and a
process that revokes certificates, one after the other. This process holds a ``CertificateCache`` and asks it
about each of them, every tenth of a millisecond. The time is from the moment the revoking process has the
answer to its commit to the first refusal here, both by CLOCK_MONOTONIC, which Linux shares among processes;
0 where the refusal came first. Prints percentiles, for the synchronous and the asynchronous cache.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, server_major
from results import record

from kakunin_db import AsyncCertificateCache, CertificateAuthority, CertificateCache, LocalSigner
from kakunin_db.migrate import migrate

# Reads a serial a line, revokes it, and writes when the commit was answered.
REVOKER = """
import sys, time, psycopg
connection = psycopg.connect(sys.argv[1], autocommit=True)
print("ready", flush=True)
for line in sys.stdin:
    connection.execute("select kakunin.revoke_certificate(%s)", [line.strip()])
    print(time.monotonic(), flush=True)
"""


def prepare(cluster: Cluster, count: int) -> list[str]:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole")
        admin.execute("grant create on database postgres to installer")
    migrate(cluster.dsn(user="installer"))
    signer = LocalSigner.generate()
    authority = CertificateAuthority.create(LocalSigner.generate())
    serials = []
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role gateway login in role kakunin_gateway")
        admin.execute("create role operator login in role kakunin_operator")
        authority.trust(admin)
        for _ in range(count):
            (agent_id,) = admin.execute("select kakunin.create_agent('benchmark')").fetchone()
            issued = authority.issue(agent_id, signer.public_key())
            issued.register(admin)
            serials.append(issued.serial)
    return serials


def revoker(cluster: Cluster) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", REVOKER, cluster.dsn(user="operator")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    return process


async def measure(
    process: subprocess.Popen[str],
    serials: list[str],
    status: Callable[[str], Awaitable[Any]],
    rest: Callable[[], Awaitable[None]],
) -> list[float]:
    assert process.stdin
    assert process.stdout
    delays = []
    for serial in serials:
        assert (await status(serial)).valid
        await rest()
        process.stdin.write(serial + "\n")
        process.stdin.flush()
        while (await status(serial)).valid:  # noqa: ASYNC110 - asking is what is measured
            await asyncio.sleep(0.0001)
        seen = time.monotonic()
        delays.append(max(0.0, seen - float(process.stdout.readline())))
    return delays


def show(name: str, delays: list[float]) -> None:
    ranked = sorted(delays)
    points = [(p, ranked[min(len(ranked) - 1, int(len(ranked) * p / 100))]) for p in (50, 90, 99)]
    text = "  ".join(f"p{p} {value * 1e3:7.2f} ms" for p, value in points)
    record(f"{name}, 99th percentile", f"{points[-1][1] * 1e3:.1f} ms")
    print(f"{name:<28} n={len(ranked)}  {text}  max {ranked[-1] * 1e3:7.2f} ms")


async def run(cluster: Cluster, count: int) -> None:
    serials = prepare(cluster, 2 * count)
    dsn = cluster.dsn(user="gateway")
    process = revoker(cluster)

    async def rest() -> None:
        await asyncio.sleep(0.01)

    # Answers would be kept for an hour: what is seen is the notification.
    with CertificateCache(dsn, ttl=3600) as cache:
        assert cache.start(10)

        async def status(serial: str) -> Any:
            return cache.status(serial)

        show("commit to refusal, sync", await measure(process, serials[:count], status, rest))
        rounds = 20_000
        kept = statistics.median(timed(lambda: cache.status(serials[-1]), rounds) for _ in range(5))
    async with AsyncCertificateCache(dsn, ttl=3600) as asynchronous:
        assert await asynchronous.start(10)
        show("commit to refusal, async", await measure(process, serials[count:], asynchronous.status, rest))
    with psycopg.connect(dsn, autocommit=True) as connection:
        query = "select kakunin.verify_certificate(%s)"
        asked = statistics.median(
            timed(lambda: connection.execute(query, [serials[-1]]).fetchone(), 500) for _ in range(5)
        )
    record("a kept answer", f"{kept * 1e6:.1f} µs", "the query", kept / asked)
    print(f"a kept answer {kept * 1e6:.1f} us, against {asked * 1e6:.0f} us for the query")
    assert process.stdin
    process.stdin.close()
    process.wait()


def timed(action: Callable[[], Any], rounds: int) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        action()
    return (time.perf_counter() - start) / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--revocations", type=int, default=500)
    options = parser.parse_args()
    bindir = options.bin or binaries(18)
    if bindir is None:
        sys.exit("no Postgres 18 on this machine: give --bin")
    cluster = Cluster(server_major(bindir), bindir)
    try:
        cluster.init()
        cluster.start()
        asyncio.run(run(cluster, options.revocations))
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
