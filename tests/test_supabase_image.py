"""The tests of test_supabase.py on Supabase's own Postgres image, where a Docker engine runs.

The migration is applied by the image's `postgres`, which is not superuser, and PostgREST runs beside it.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import psycopg
import pytest
import test_supabase
from cluster import Cluster
from conftest import LOGINS, Database, _ca
from postgrest_server import PostgREST, required
from testcontainers.core.container import DockerContainer

from kakunin_db.export_commands import supabase_sql

# The same tests and fixtures, over the database below.
for _name in dir(test_supabase):
    if _name.startswith("test_") or _name in ("tables", "orders", "published", "stopped", "wire"):
        globals()[_name] = getattr(test_supabase, _name)
without_hook = test_supabase.without_hook

IMAGE = "supabase/postgres:15.8.1.085"
SUPERUSER = "supabase_admin"
PASSWORD = "postgres"
pytestmark = test_supabase.pytestmark


@dataclass
class Server:
    """As much of a Cluster as is needed, of a server somebody else started and that trusts every login."""

    host: str
    port: int

    def dsn(self, dbname: str, user: str) -> str:
        user = {"installer": "postgres"}.get(user, user)
        return psycopg.conninfo.make_conninfo(host=self.host, port=self.port, dbname=dbname, user=user)

    def connect(self, dbname: str, user: str = "", **options: Any) -> psycopg.Connection[Any]:
        """As the superuser, unless another is named."""
        return psycopg.connect(self.dsn(dbname, user or SUPERUSER), **options)

    @contextlib.contextmanager
    def session(self, dbname: str, user: str) -> Iterator[psycopg.Connection[Any]]:
        with self.connect(dbname, user) as connection:
            yield connection


def adopt(server: Server) -> Database:
    """The project's database with the migration applied, and the logins of the tests."""
    with server.connect("postgres", "postgres", autocommit=True) as owner:
        owner.execute(supabase_sql().encode())
        _ca().trust(owner)
    with server.connect("postgres", autocommit=True) as admin:
        admin.execute("grant create on schema public to public")
        for login, roles in LOGINS.items():
            admin.execute(f"create role {login} login")
            for role in roles:
                admin.execute(f"grant {role} to {login}")
    return Database(cast(Cluster, server), "postgres")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    # Asked through its command: the library leaves a socket open where nobody answers.
    runs = shutil.which("docker") and not subprocess.call(
        ["docker", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if not runs:
        pytest.skip("no Docker engine on this machine")
    image = DockerContainer(IMAGE).with_env("POSTGRES_PASSWORD", PASSWORD).with_exposed_ports(5432)
    with image as container:
        found = Server(container.get_container_host_ip(), int(container.get_exposed_port(5432)))
        # While the image prepares its database it listens on a socket only.
        end = time.monotonic() + 180
        while not answers(found):
            assert time.monotonic() < end, b"\n".join(container.get_logs()).decode(errors="replace")
            time.sleep(0.5)
        trust = "echo 'host all all all trust' > /etc/postgresql/pg_hba.conf && kill -HUP 1"
        done = container.exec(["sh", "-c", trust])
        assert done.exit_code == 0, done.output
        yield found


def answers(server: Server) -> bool:
    try:
        with server.connect("postgres", password=PASSWORD, connect_timeout=3):
            return True
    except psycopg.OperationalError:
        return False


@pytest.fixture(scope="module")
def database(server: Server) -> Database:
    return adopt(server)


@pytest.fixture(scope="module")
def postgrest(server: Server, database: Database) -> Iterator[PostgREST]:
    required()
    with PostgREST(database.cluster, database.name) as running:
        yield running
