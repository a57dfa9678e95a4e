"""What is read of an answer is limited below libpq, with TLS as without."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from cluster import MAJORS, Cluster, binaries

from kakunin_db.mcp.wire import LimitError, Wire


@pytest.fixture(scope="module", params=MAJORS, ids=lambda major: f"pg{major}")
def dsn(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server of its own, with a certificate."""
    bindir = binaries(request.param)
    if bindir is None:
        pytest.skip(f"no Postgres {request.param} on this machine")
    cluster = Cluster(request.param, bindir)
    cluster.init()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", cluster.data / "server.key", "-out", cluster.data / "server.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    owner = cluster.data.stat()
    for name in ("server.key", "server.crt"):
        (cluster.data / name).chmod(0o600)
        os.chown(cluster.data / name, owner.st_uid, owner.st_gid)
    dsn = f"host=127.0.0.1 port={cluster.port} dbname=postgres user=postgres"
    cluster.settings["ssl"] = "on"
    try:
        cluster.start()
        dsn += " application_name=tls"
    except subprocess.CalledProcessError:
        del cluster.settings["ssl"]
        cluster.start()
    yield dsn
    cluster.destroy()


@pytest.fixture(params=["require", "disable"])
def connection(dsn: str, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection[Any]]:
    if request.param == "require" and "tls" not in dsn:
        pytest.skip("this server was built without TLS")
    connection = psycopg.connect(dsn, sslmode=request.param, autocommit=True)
    assert connection.pgconn.ssl_in_use == (request.param == "require")
    yield connection
    connection.close()


def wire(connection: psycopg.Connection[Any], most_bytes: int = 50_000, seconds: float = 20) -> Wire:
    return Wire(connection.pgconn, most_bytes, time.monotonic() + seconds, threading.Event())


def test_answers_come_through_and_the_connection_is_as_before(connection: psycopg.Connection[Any]) -> None:
    descriptor = connection.pgconn.socket
    with wire(connection, 2_000_000) as metered:
        answer = metered.run(b"select g, repeat('x', 100) from generate_series(1, 5000) g", (), 5000)
        assert [row[0] for row in answer.rows] == [str(n).encode() for n in range(1, 5001)]
        assert answer.command == "SELECT 5000"
        large = b"select length($1), '" + b"y" * 1_000_000 + b"'"
        assert metered.run(large, (b"abc",), 1).rows == [[b"3", b"y" * 1_000_000]]
        with pytest.raises(psycopg.errors.DivisionByZero):
            metered.run(b"select 1/0", (), 1)
        with pytest.raises(psycopg.errors.SyntaxError):
            metered.parse(b"select 1; select 2")
        assert metered.run(b"select 1", (), 1).rows == [[b"1"]]
    assert connection.pgconn.socket == descriptor
    assert connection.execute("select 2").fetchone() == (2,)


@pytest.mark.parametrize(
    ("statement", "kind", "rows"),
    [
        (b"select generate_series(1, 1000000000)", "rows", 100),
        (b"select repeat('x', 1000), generate_series(1, 1000000000)", "bytes", range(40, 51)),
        (b"select repeat('x', 50000000)", "bytes", 0),
        (b"select repeat('x', 20000000)::int", "bytes", 0),
        (b"select pg_sleep(60)", "time", 0),
    ],
)
def test_limits_end_a_call(
    connection: psycopg.Connection[Any], statement: bytes, kind: str, rows: Any
) -> None:
    began = time.monotonic()
    with (
        pytest.raises(LimitError) as caught,
        wire(connection, seconds=2 if kind == "time" else 20) as metered,
    ):
        metered.run(statement, (), 100)
    assert caught.value.kind == kind
    read = len(caught.value.answer.rows)
    assert read in rows if isinstance(rows, range) else read == rows
    assert time.monotonic() - began < 15
    connection.cancel_safe(timeout=5)


def test_a_server_that_is_gone_is_an_error(dsn: str, connection: psycopg.Connection[Any]) -> None:
    pid = connection.info.backend_pid
    with psycopg.connect(dsn, autocommit=True) as admin:
        timer = threading.Timer(0.3, admin.execute, [f"select pg_terminate_backend({pid})"])
        timer.start()
        with pytest.raises(psycopg.OperationalError), wire(connection) as metered:
            metered.run(b"select pg_sleep(60)", (), 1)
        timer.join()
