"""What kakunin.protect()'s policy costs as tables grow, against writing the same condition by hand.

    python benchmarks/policies.py [--bin DIRECTORY] [--rows 1000,10000,100000,1000000] [--rounds 31]

Starts a throw-away server with two pairs of tables, orders and their items: one pair protected, one with a
hand-written `where` in every query. Each thousandth row is the agent's, and twenty at least are. Compares in
turns, in transactions that are bound before the clock starts, so that binding (session.py) is not in it:

  index    the agent's rows of orders, by the index on the serial column
  page     twenty of the agent's rows in order of their id, by an index on both
  join     orders and their items, both protected
  scan     the agent's rows by a sequential scan, no parallel workers
  insert   a thousand rows at once
  update   all of the agent's rows
  delete   the same

Prints medians and the ratio of each round's pair (median, and the 10th and 90th percentile). What is written
is rolled back. With ten million rows it takes some minutes and 8 GB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cluster import Cluster, binaries, server_major
from results import record
from session import compare

from kakunin_db import AgentCredential, CertificateAuthority, LocalSigner
from kakunin_db.migrate import migrate

TABLES = {"protected": ("orders", "items"), "plain": ("plain_orders", "plain_items")}
BULK = 1000


def prepare(cluster: Cluster) -> AgentCredential:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole")
        admin.execute("grant create on database postgres to installer")
    migrate(cluster.dsn(user="installer"))
    signer, authority = LocalSigner.generate(), CertificateAuthority.create(LocalSigner.generate())
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role agent login in role kakunin_agent")
        (agent_id,) = admin.execute("select kakunin.create_agent('benchmark')").fetchone()
        authority.trust(admin)
        issued = authority.issue(agent_id, signer.public_key())
        issued.register(admin)
    return AgentCredential(agent_id, issued.serial, signer)


def fill(cluster: Cluster, serial: str, rows: int) -> None:
    """Each thousandth row is the agent's, and at least twenty are; two items to every order."""
    every = max(min(1000, rows // 20), 1)
    with cluster.connect(autocommit=True) as admin:
        for orders, items in TABLES.values():
            admin.execute(f"drop table if exists {items}, {orders}")
            for table in (orders, items):
                admin.execute(
                    f"create table {table} (id bigint primary key, order_id bigint,"
                    ' permitted_agent_serial text collate "C", payload text)'
                )
            insert = (
                "insert into {} select i, {}, case when {} %% {} = 0 then %s"
                " else md5(({} %% 997)::text) end, repeat('x', 60) from generate_series(1, %s) i"
            )
            admin.execute(insert.format(orders, "i", "i", every, "i"), [serial, rows])
            admin.execute(
                insert.format(items, "(i + 1) / 2", "((i + 1) / 2)", every, "((i + 1) / 2)"),
                [serial, 2 * rows],
            )
            for table in (orders, items):
                admin.execute(f"create index on {table} (permitted_agent_serial, id)")
                admin.execute(f"create index on {table} (order_id)")
                admin.execute(f"grant select, insert, update, delete on {table} to agent")
        for table in TABLES["protected"]:
            admin.execute("select kakunin.protect(%s)", [table])
        for pair in TABLES.values():
            for table in pair:
                admin.execute(f"vacuum analyze {table}")


def measure(cluster: Cluster, credential: AgentCredential, rows: int, rounds: int) -> None:
    size = f"10^{len(str(rows)) - 1}" if str(rows).strip("0") == "1" else f"{rows:,}"
    with cluster.connect(user="agent", autocommit=True) as c:
        (installation,) = c.execute("select kakunin.installation_id()").fetchone()
        (ticket,) = c.execute(
            "select kakunin.open_session(%s)", [credential.assertion(installation, 300)]
        ).fetchone()
        c.execute("set max_parallel_workers_per_gather = 0")
        mine = f"permitted_agent_serial = '{credential.serial}'"

        def pair(case: str, query: str, *, undone: bool = False, times: int = rounds) -> None:
            """{orders} and {items} are the tables; {mine} and its like the condition, where it is by hand."""
            asks: list[Callable[[], Any]] = []
            for (orders, items), by_hand in ((TABLES["protected"], "true"), (TABLES["plain"], mine)):
                text = query.format(
                    orders=orders, items=items, mine=by_hand, serial=credential.serial,
                    items_mine="true" if by_hand == "true" else f"i.{mine}",
                    orders_mine="true" if by_hand == "true" else f"o.{mine}",
                ).encode()  # fmt: skip
                asks.append(lambda text=text: _run(c, text, undone))
            with c.transaction():
                c.execute("select kakunin.bind_session(%s)", [ticket])
                median, ratio = compare(f"{size:>7} rows, {case}", asks[0], asks[1], times)
            record(f"{size} rows, {case}", _shown(median), "the same condition by hand", ratio)

        pair("the agent's, by index", "select count(payload) from {orders} where {mine}")
        pair("a page of twenty", "select payload from {orders} where {mine} order by id limit 20")
        pair(
            "join of two",
            "select count(*) from {orders} o join {items} i on i.order_id = o.id"
            " where {orders_mine} and {items_mine}",
        )
        c.execute("set enable_indexscan = off; set enable_bitmapscan = off; set enable_indexonlyscan = off")
        pair(
            "sequential scan",
            "select count(payload) from {orders} where {mine} /* its plan is another one's */",
            times=rounds if rows < 10**6 else 11,
        )
        c.execute("reset enable_indexscan; reset enable_bitmapscan; reset enable_indexonlyscan")
        pair("update of the agent's", "update {orders} set payload = 'y' where {mine}", undone=True)
        pair("delete of the agent's", "delete from {orders} where {mine}", undone=True)
        # Last, because what is undone stays in the tables.
        pair(
            f"insert of {BULK}",
            "insert into {orders} select 1000000000 + i, 1, '{serial}', repeat('x', 60)"
            f" from generate_series(1, {BULK}) i",
            undone=True,
        )


def _run(connection: psycopg.Connection[Any], text: bytes, undone: bool) -> None:
    if not undone:
        connection.execute(text).fetchall()
        return
    # In the transaction that is bound; what it wrote is undone, so that the next one finds the same.
    connection.execute("savepoint s")
    connection.execute(text)
    connection.execute("rollback to s")


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--bin", type=Path, default=binaries(18), help="folder of a server's programs")
    options.add_argument("--rows", default="1000,10000,100000,1000000")
    options.add_argument("--rounds", type=int, default=31)
    chosen = options.parse_args()
    major = server_major(chosen.bin)
    cluster = Cluster(major, chosen.bin, settings={"shared_buffers": "1GB"})
    cluster.init()
    cluster.start()
    try:
        credential = prepare(cluster)
        print(f"Postgres {major}, Unix socket, times in microseconds\n")
        print(f"{'':<46} {'kakunin':>10} {'by hand':>10}   ratio  (10th to 90th percentile)")
        for rows in (int(size) for size in chosen.rows.split(",")):
            fill(cluster, credential.serial, rows)
            measure(cluster, credential, rows, chosen.rounds)
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
