"""What the gateway middleware lets through after a revocation, and what it costs.

    python benchmarks/middleware.py [--bin DIRECTORY] [--agents N] [--revocations N]

Starts a throw-away server (the embedded Postgres 18, or the one whose programs are in DIRECTORY) and a
process that revokes one certificate after the other. Meanwhile every agent sends requests here without pause,
through the ASGI middleware (a task an agent) and then through the WSGI middleware (threads). For each
revocation this prints by how much its last admitted request came after the commit, measured where the handler
runs, by CLOCK_MONOTONIC, which Linux shares among processes; 0 where none did. The commit is taken at when
the revoking process has its answer. Then: how many requests were admitted whose decision began after the
cache was told, which is to be none, and what a request with a kept answer costs beyond the application alone.
Exits with 1 where a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import results
from cache import prepare, revoker
from cluster import Cluster, binaries, server_major

from kakunin_db.middleware import AsyncGateway, Gateway
from kakunin_db.middleware.asgi import KakuninMiddleware as ASGIMiddleware
from kakunin_db.middleware.wsgi import KakuninMiddleware as WSGIMiddleware

PROMISED = 0.1  # seconds, at the 99th percentile
HIT = 100e-6
THREADS = 8


class Record:
    """What was admitted when, and when the cache was told what."""

    def __init__(self) -> None:
        self.begun: dict[str, float] = {}  # of the last admitted request: when its decision began
        self.ran: dict[str, float] = {}  # and when its handler ran
        self.told: dict[str, float] = {}
        self.commits: dict[str, float] = {}
        self.late = 0  # admitted, and begun after the cache was told
        self.requests = 0

    def admitted(self, serial: str, begun: float) -> None:
        self.ran[serial] = time.monotonic()
        self.begun[serial] = begun
        if begun > self.told.get(serial, float("inf")):
            self.late += 1

    def listen_to(self, cache: Any, serial_of: dict[str, str]) -> None:
        hear = cache._answers.hear

        def heard(payloads: Iterable[bytes]) -> None:
            payloads = list(payloads)
            hear(payloads)
            now = time.monotonic()
            for agent in payloads:
                if (serial := serial_of.get(agent.decode())) is not None:
                    self.told.setdefault(serial, now)

        cache._answers.hear = heard

    def show(self, name: str, seconds: float) -> bool:
        delays = sorted(max(0.0, self.ran.get(s, 0.0) - at) for s, at in self.commits.items())
        told = sorted(max(0.0, self.told[s] - at) for s, at in self.commits.items() if s in self.told)
        points = [delays[min(len(delays) - 1, int(len(delays) * p / 100))] for p in (50, 90, 99)]
        text = "  ".join(f"p{p} {v * 1e3:6.2f} ms" for p, v in zip((50, 90, 99), points, strict=True))
        print(f"{name}: {self.requests / seconds:,.0f} requests/s, {len(delays)} revocations")
        results.record(
            f"{name}: last admitted after the commit, 99th percentile", f"{points[-1] * 1e3:.1f} ms"
        )
        results.record(f"{name}: admitted once the cache was told", str(self.late))
        print(f"  last admitted after the commit   {text}  max {delays[-1] * 1e3:6.2f} ms")
        heard = f"p50 {statistics.median(told) * 1e3:6.2f} ms  max {told[-1] * 1e3:6.2f} ms"
        print(f"  the cache was told               {heard}")
        print(f"  admitted after the cache was told: {self.late}")
        return points[-1] <= PROMISED and self.late == 0 and len(told) == len(delays)


class Revocations(threading.Thread):
    """Has them revoked one after the other, and notes the commits."""

    def __init__(self, cluster: Cluster, serials: list[str], record: Record, pause: float) -> None:
        super().__init__(daemon=True)
        self._process: subprocess.Popen[str] = revoker(cluster)
        self._serials, self._record, self._pause = serials, record, pause

    def run(self) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        for serial in self._serials:
            stdin.write(serial + "\n")
            stdin.flush()
            self._record.commits[serial] = float(stdout.readline())
            time.sleep(self._pause)
        time.sleep(0.5)
        stdin.close()
        self._process.wait()


def scope_of(serial: str) -> dict[str, Any]:
    return {
        "type": "http", "method": "GET", "path": "/orders/1", "raw_path": b"/orders/1", "query_string": b"",
        "headers": [
            (b"host", b"gateway.test"), (b"accept", b"*/*"), (b"x-kakunin-cert-serial", serial.encode())
        ],
    }  # fmt: skip


async def nothing_more() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def asgi(cluster: Cluster, slots: list[list[str]], agents: dict[str, str], pause: float) -> bool:
    record = Record()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        record.admitted(scope["state"]["kakunin"].serial, scope["begun"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gateway = AsyncGateway(cluster.dsn(user="gateway"))
    assert await gateway.start(10)
    record.listen_to(gateway._here().cache, agents)
    served = ASGIMiddleware(app, gateway, proof="serial", scopes={"/orders": ()})
    revocations = Revocations(cluster, order(slots), record, pause)

    async def agent(serials: list[str]) -> None:
        status = 0

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        current = iter(serials)
        serial = next(current)
        while revocations.is_alive():
            await served({**scope_of(serial), "begun": time.monotonic()}, nothing_more, send)
            record.requests += 1
            if status == 403:
                serial = next(current, serial)
            await asyncio.sleep(0)

    revocations.start()
    start = time.monotonic()
    await asyncio.gather(*(agent(serials) for serials in slots))
    kept = record.show("ASGI", time.monotonic() - start)

    scope = {**scope_of(slots[0][-1]), "begun": 0.0}
    known: list[Any] = []

    async def keep(scope: Any, receive: Any, send: Any) -> None:
        known.append(scope["state"])

    async def bare(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": known[0]}, receive, send)

    async def swallow(message: Any) -> None:
        pass

    await ASGIMiddleware(keep, gateway, proof="serial")(scope, nothing_more, swallow)

    async def timed(call: Any) -> float:
        start = time.perf_counter()
        for _ in range(5000):
            await call(scope, nothing_more, swallow)
        return (time.perf_counter() - start) / 5000

    cost = statistics.median([await timed(served) - await timed(bare) for _ in range(7)])
    await gateway.close()
    results.record("... a kept answer costs a request", f"{cost * 1e6:.0f} µs")
    print(f"  a request with a kept answer costs {cost * 1e6:.1f} us more")
    return kept and cost <= HIT


def environ_of(serial: str) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/orders/1", "QUERY_STRING": "",
        "SERVER_NAME": "gateway.test", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_ACCEPT": "*/*",
        "HTTP_HOST": "gateway.test", "HTTP_X_KAKUNIN_CERT_SERIAL": serial, "wsgi.input": io.BytesIO(),
        "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http", "RAW_URI": "/orders/1",
    }  # fmt: skip


def wsgi(cluster: Cluster, slots: list[list[str]], agents: dict[str, str], pause: float) -> bool:
    record = Record()

    def app(environ: Any, start_response: Any) -> list[bytes]:
        record.admitted(environ["kakunin.agent"].serial, environ["begun"])
        start_response("200 OK", [])
        return [b""]

    gateway = Gateway(cluster.dsn(user="gateway"))
    assert gateway.cache.start(10)
    record.listen_to(gateway.cache, agents)
    served = WSGIMiddleware(app, gateway, proof="serial", scopes={"/orders": ()})
    revocations = Revocations(cluster, order(slots), record, pause)

    def work(mine: list[list[str]]) -> None:
        statuses: list[str] = []
        left = [iter(serials) for serials in mine]
        current = [next(serials) for serials in left]
        while revocations.is_alive():
            for i, serial in enumerate(current):
                served(
                    {**environ_of(serial), "begun": time.monotonic()},
                    lambda status, _: statuses.append(status),
                )
                record.requests += 1
                if statuses.pop().startswith("403"):
                    current[i] = next(left[i], serial)

    threads = [threading.Thread(target=work, args=(slots[i::THREADS],)) for i in range(THREADS)]
    revocations.start()
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = record.show(f"WSGI, {THREADS} threads", time.monotonic() - start)
    environ = {**environ_of(slots[0][-1]), "begun": 0.0}
    served(environ, lambda *_: None)
    known = environ["kakunin.agent"]

    def timed(call: Callable[..., Any], **more: Any) -> float:
        start = time.perf_counter()
        for _ in range(5000):
            call({**environ, **more}, lambda *_: None)
        return (time.perf_counter() - start) / 5000

    cost = statistics.median(timed(served) - timed(app, **{"kakunin.agent": known}) for _ in range(7))
    gateway.close()
    results.record("... a kept answer costs a request", f"{cost * 1e6:.0f} µs")
    print(f"  a request with a kept answer costs {cost * 1e6:.1f} us more")
    return kept and cost <= HIT


def order(slots: list[list[str]]) -> list[str]:
    """What is revoked: of each agent one certificate after the other, but for its last."""
    longest = max(map(len, slots))
    return [serials[i] for i in range(longest) for serials in slots if i < len(serials) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bin", type=Path)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--revocations", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.1, help="seconds between two revocations")
    options = parser.parse_args()
    bindir = options.bin or binaries(18)
    if bindir is None:
        sys.exit("no Postgres 18 on this machine: give --bin")
    cluster = Cluster(server_major(bindir), bindir)
    try:
        cluster.init()
        cluster.start()
        each = options.agents + options.revocations
        serials = prepare(cluster, 2 * each)
        with cluster.connect() as admin:
            rows = admin.execute("select agent_id::text, serial from kakunin.certificates").fetchall()
        kept = []
        for i, run in enumerate((lambda *a: asyncio.run(asgi(*a)), wsgi)):
            slots: dict[int, list[str]] = defaultdict(list)
            for n, serial in enumerate(serials[i * each : (i + 1) * each]):
                slots[n % options.agents].append(serial)
            kept.append(run(cluster, list(slots.values()), dict(rows), options.pause))
    finally:
        cluster.destroy()
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
