"""What the ledger costs, against a plain insert of the same rows, with the worker sealing and signing.

    python benchmarks/ledger.py [--bin DIRECTORY] [--seconds 5] [--clients 1,8,16] [--supa-audit FILE]
    python benchmarks/ledger.py [--bin DIRECTORY] --grow 10000,100000

Starts a throw-away server with its defaults (fsync and synchronous_commit on; the embedded Postgres 18, or
the one whose programs are in DIRECTORY), a worker with a key of its own, and compares with pgbench, in turns:

  plain       an insert of such a row into a table with the ledger's columns and indexes, a transaction
              each
  ledger      kakunin.audit_log_append(), each client an agent bound for its session, a transaction each
  bound       the same two in a transaction that binds first: what an agent's transaction costs with either
  supa_audit  an insert into a table with supa_audit's trigger, if its SQL is in FILE. It is no part of
              this project: whoever runs this fetches it, and uuid-ossp has to be among the server's
              extensions

Prints transactions per second (medians), the ratio to plain, how many entries a signature covered, and how
long an entry waited for one at most. With --grow, what sealing, a root and an append cost as the ledger
grows.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg
from cryptography.hazmat.primitives import serialization

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, server_major
from results import record

from kakunin_db import AgentCredential, CertificateAuthority, LocalSigner
from kakunin_db.ledger.worker import Settings, Worker
from kakunin_db.migrate import migrate

METADATA = '{"tool": "orders.search", "table": "orders", "rows": 12, "amount_usd": 125.50, "venue": "XLON"}'
ENTRY = (
    f'{{"kakunin":"entry/1","installation":"{uuid.UUID(int=1)}","event_id":1000,'
    '"recorded_at":"2026-11-23T08:15:00.123456Z","event_type":"data_access",'
    f'"agent_id":"{uuid.UUID(int=2)}","serial":"{":".join(["3A"] * 16)}","login":"agent","session_id":"s-1",'
    f'"chain":3,"sequence":2,"prev":"{"5" * 64}",'
    '"risk":{"band": "low", "score": 0.1000, "factors": {}, "agent_band": "low", "agent_score": 0.0000},'
    f'"metadata":{METADATA}}}'
)
ROUNDS = 5


class Keys:
    """A key store of one key."""

    def __init__(self, signer: LocalSigner) -> None:
        self.signer = signer
        self.signatures = 0

    def open(self, public_key: Any) -> Keys:
        return self

    def sign(self, digest: bytes) -> bytes:
        self.signatures += 1
        return self.signer.sign(digest)


def prepare(cluster: Cluster, clients: int, supa_audit: Path | None) -> tuple[list[AgentCredential], Keys]:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole")
        admin.execute("grant create on database postgres to installer")
    migrate(cluster.dsn(user="installer"))
    signer, keys = LocalSigner.generate(), Keys(LocalSigner.generate())
    authority = CertificateAuthority.create(LocalSigner.generate())
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role agent login in role kakunin_agent")
        admin.execute("create role worker login in role kakunin_worker")
        authority.trust(admin)
        (installation,) = admin.execute("select kakunin.installation_id()").fetchone()
        certificate = authority.issue_ledger_key(installation, keys.signer.public_key())
        der = certificate.public_bytes(serialization.Encoding.DER)
        admin.execute("select kakunin.register_ledger_key(%s)", [der])
        credentials = []
        for _ in range(clients):
            (agent_id,) = admin.execute("select kakunin.create_agent('benchmark')").fetchone()
            issued = authority.issue(agent_id, signer.public_key())
            issued.register(admin)
            credentials.append(AgentCredential(agent_id, issued.serial, signer, installation))
        for table in ("plain", "audited"):
            admin.execute(
                f"create table {table} (event_id bigint generated always as identity,"
                " recorded_at timestamptz not null default now(), agent_id uuid,"
                " xid xid8 not null default pg_current_xact_id(), entry text not null,"
                " primary key (event_id, recorded_at))"
            )
            admin.execute(f"create index on {table} (agent_id, event_id)")
            admin.execute(f"create index on {table} (xid, event_id)")
            admin.execute(f"grant all on {table} to agent")
        if supa_audit is not None:
            admin.execute('create extension if not exists "uuid-ossp"')
            # Only CREATE EXTENSION may run these, which say what a dump has.
            text = re.sub(r"select pg_catalog\.pg_extension_config_dump\(.*?\);", "", supa_audit.read_text())
            admin.execute(text.encode())
            admin.execute("select audit.enable_tracking('public.audited')")
            # Its trigger runs with the rights of whoever writes.
            admin.execute(
                "grant usage on schema audit to agent; grant all on all tables in schema audit to agent"
            )
            admin.execute("grant all on all sequences in schema audit to agent")
    return credentials, keys


def per_client(lines: list[str]) -> str:
    """A statement of each client's own."""
    text = "".join(f"\\{'elif' if at else 'if'} :client_id = {at}\n{line}\n" for at, line in enumerate(lines))
    return text + "\\endif\n"


PLAIN = "insert into {} (agent_id, entry) values (:agent, :entry);\n"
APPEND = "select kakunin.audit_log_append('data_access', :metadata, 's-1');\n"


def scripts(count: int, with_supa_audit: bool) -> dict[str, str]:
    bind = per_client([f"select kakunin.bind_session(:ticket{at}, false);" for at in range(count)])
    once = f"\\if :first\n{bind}\\set first 0\n\\endif\n"
    begin = "begin;\n" + per_client([f"select kakunin.bind_session(:ticket{at});" for at in range(count)])
    found = {
        "plain": PLAIN.format("plain"),
        "ledger": once + APPEND,
        "plain, bound": begin + PLAIN.format("plain") + "commit;\n",
        "ledger, bound": begin + APPEND + "commit;\n",
    }
    return found | ({"supa_audit": PLAIN.format("audited")} if with_supa_audit else {})


def pgbench(cluster: Cluster, script: str, tickets: list[str], clients: int, seconds: int) -> float:
    variables = {"first": "1", "agent": str(uuid.UUID(int=2)), "entry": ENTRY, "metadata": METADATA}
    variables |= {f"ticket{at}": ticket for at, ticket in enumerate(tickets)}
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        command = [
            cluster.bin / "pgbench", "-n", "-h", cluster.host, "-p", str(cluster.port), "-U", "agent",
            "-M", "prepared", "-c", str(clients), "-j", "1", "-T", str(seconds), "-f", file.name,
            *(f"-D{name}={value}" for name, value in variables.items()), "postgres",
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = re.search(r"tps = ([0-9.]+)", done.stdout)
    if found is None or done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return float(found[1])


class Lag:
    """The longest lag that was seen, asked for ten times a second."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.longest = 0.0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        with self._cluster.connect(autocommit=True) as admin:
            while not self._stop.wait(0.1):
                (status,) = admin.execute("select kakunin.ledger_status()").fetchone()
                self.longest = max(self.longest, status["lag_seconds"])

    def end(self) -> float:
        self._stop.set()
        self._thread.join()
        return self.longest


def compare(cluster: Cluster, options: argparse.Namespace) -> None:
    counts = [int(count) for count in options.clients.split(",")]
    credentials, keys = prepare(cluster, max(counts), options.supa_audit)
    with cluster.connect(user="agent") as agent:
        (installation,) = agent.execute("select kakunin.installation_id()").fetchone()
    worker = Worker(cluster.dsn(user="worker"), keys, settings=Settings())
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        for count in counts:
            rates: dict[str, list[float]] = {}
            lag = 0.0
            before = worker.metrics.counters["kakunin_worker_sealed_entries"], keys.signatures
            for _ in range(ROUNDS):
                for name, script in scripts(count, options.supa_audit is not None).items():
                    with cluster.connect(user="agent", autocommit=True) as agent:
                        tickets = [
                            agent.execute(
                                "select kakunin.open_session(%s)", [c.assertion(installation)]
                            ).fetchone()[0]
                            for c in credentials[:count]
                        ]
                    watch = Lag(cluster) if name == "ledger" else None
                    rates.setdefault(name, []).append(
                        pgbench(cluster, script, tickets, count, options.seconds)
                    )
                    lag = max(lag, watch.end() if watch else 0.0)
            after = worker.metrics.counters["kakunin_worker_sealed_entries"], keys.signatures
            print(f"\n{count} clients")
            for name, found in rates.items():
                against = rates["plain, bound" if name.endswith("bound") else "plain"]
                ratio = statistics.median(a / b for a, b in zip(found, against, strict=True))
                print(f"  {name:<14} {statistics.median(found):>8.0f}/s   {ratio:.2f}")
                record(
                    f"{name}, {count} client{'s' if count > 1 else ''}",
                    f"{statistics.median(found):,.0f}/s",
                    "" if found is against else "plain, bound" if name.endswith("bound") else "plain",
                    None if found is against else ratio,
                )
            record(
                f"entries a signature, {count} clients",
                f"{(after[0] - before[0]) / max(after[1] - before[1], 1):.0f}",
            )
            record(f"longest without a signature, {count} clients", f"{lag:.2f} s")
            print(
                f"  {(after[0] - before[0]) / max(after[1] - before[1], 1):.0f} entries a signature,"
                f" none without one for longer than {lag:.2f} s"
            )
    finally:
        worker.stop()
        thread.join()


def fill(admin: psycopg.Connection[Any], agent_id: uuid.UUID, serial: str, count: int) -> None:
    """Appends so many entries of an agent by the kit's own function.

    A thousand to a transaction: each walks past the versions of the chain that its transaction made before.
    """
    for done in range(0, count, 1000):
        admin.execute(
            "select count(kakunin_private.append('data_access', %s, %s, 's-1', %s, %s))"
            " from generate_series(1, %s)",
            [agent_id, serial, METADATA, agent_id, min(1000, count - done)],
        )


def grow(cluster: Cluster, sizes: list[int]) -> None:
    print(
        f"\n{'entries':>10} {'append':>10} {'seal 1000':>10} {'root':>10} {'status':>10} {'ledger, tree':>18}"
    )
    with cluster.connect(autocommit=True) as admin:
        (size,) = admin.execute("select tree_size from kakunin_private.tree").fetchone()
        for goal in sizes:
            while size < goal:
                count = min(100_000, goal - size)
                # Put there directly, or it would be hours: as large as any other, and sealed as well.
                admin.execute(
                    "insert into kakunin_private.ledger (event_id, recorded_at, agent_id, xid, entry)"
                    " select nextval('kakunin_private.event_ids'), clock_timestamp(), %s,"
                    " pg_current_xact_id(), %s || g from generate_series(1, %s) g",
                    [uuid.UUID(int=2), ENTRY, count],
                )
                while True:
                    (sealed,) = admin.execute("select kakunin.seal_ledger()").fetchone()
                    if not sealed["more"]:
                        break
                size += count
            admin.execute("analyze kakunin_private.ledger")
            seals, proofs, appends, states = [], [], [], []
            for _ in range(9):
                append = "select kakunin_private.append('data_access', null, null, null, '{}', %s)"
                appends.append(timed(admin, append, uuid.UUID(int=2)))
                admin.execute(
                    "select count(kakunin_private.append('data_access', null, null, null, '{}', %s))"
                    " from generate_series(1, 1000)", [uuid.UUID(int=2)]
                )  # fmt: skip
                seals.append(timed(admin, "select kakunin.seal_ledger()"))
                states.append(timed(admin, "select kakunin.ledger_status()"))
                (last,) = admin.execute("select tree_size from kakunin_private.tree").fetchone()
                proofs.append(timed(admin, "select kakunin_private.subtree_hash(0, %s)", last))
            (kib,) = admin.execute(
                "select (sum(pg_total_relation_size(relid)) / 1024)::bigint"
                " from pg_partition_tree('kakunin_private.ledger')"
            ).fetchone()
            (tree,) = admin.execute(
                "select ((pg_total_relation_size('kakunin_private.batches')"
                " + pg_total_relation_size('kakunin_private.tree_nodes')) / 1024)::bigint"
            ).fetchone()
            medians = "".join(
                f" {statistics.median(t) * 1e3:>7.2f} ms" for t in (appends, seals, proofs, states)
            )
            print(f"{goal:>10}{medians} {kib / 1024:>8.0f}, {tree / 1024:.0f} MiB")


def timed(connection: psycopg.Connection[Any], query: str, *parameters: Any) -> float:
    start = time.perf_counter()
    connection.execute(query.encode(), parameters)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bin", type=Path, default=binaries(18), help="folder of a server's programs")
    options.add_argument("--seconds", type=int, default=5, help="of each run of pgbench; there are 5 of each")
    options.add_argument("--clients", default="1,8,16")
    options.add_argument("--supa-audit", type=Path, help="its SQL, for comparison")
    options.add_argument("--grow", help="sizes of the ledger, such as 10000,100000; nothing else is measured")
    chosen = options.parse_args()
    major = server_major(chosen.bin)
    cluster = Cluster(major, chosen.bin, settings={"fsync": "on"})
    cluster.init()
    cluster.start()
    try:
        print(f"Postgres {major}, {os.cpu_count()} cores, Unix socket, fsync on")
        if chosen.grow:
            prepare(cluster, 1, None)
            grow(cluster, [int(size) for size in chosen.grow.split(",")])
        else:
            compare(cluster, chosen)
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
