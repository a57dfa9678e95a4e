"""The published supabase-js, bound as examples/supabase binds it, against a real PostgREST; the example."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster
from conftest import Database
from orders import Tables, create_tables
from postgrest_server import PostgREST, required

SCRIPT = Path(__file__).with_name("supabase.mjs")
EXAMPLE = ROOT / "examples" / "supabase"


@pytest.fixture(scope="module", autouse=True)
def node() -> str:
    required()
    found = shutil.which("node")
    if found is not None and (EXAMPLE / "node_modules/@supabase/supabase-js").exists():
        return found
    missing = "no Node or no supabase-js on this machine: make supabase-js"
    if os.environ.get("KAKUNIN_REQUIRE_POSTGREST"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def tables(database: Database, postgrest: PostgREST) -> Database:
    create_tables(database, postgrest)
    return database


@pytest.fixture
def orders(tables: Database, postgrest: PostgREST) -> Tables:
    postgrest.requests.clear()
    return Tables(tables, postgrest)


def play(node: str, orders: Tables, scenario: str) -> None:
    environment = {
        **os.environ,
        "URL_": orders.rest.url,
        "ANON": orders.rest.anon_key,
        "SERVICE": orders.rest.service_key,
        "SECRET": orders.rest.jwt_secret,
        "SERIAL": orders.one.serial,
        "OTHER": orders.two.serial,
        "AGENT_ID": str(orders.one.agent_id),
    }
    with subprocess.Popen(
        [node, SCRIPT, scenario],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if said[-1] in ("revoke", "suspend"):
                getattr(orders.one, said[-1])()
                process.stdin.write("done\n")
                process.stdin.flush()
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    assert said[-1] == "ok"


@pytest.mark.parametrize(
    "scenario",
    [
        "reading",
        "writing",
        "tools",
        "twoAtOnce",
        "dynamicSQL",
        "revoked",
        "refusedKeys",
        "anotherHeader",
        "anotherAnswer",
    ],
)
def test_supabase_js(node: str, orders: Tables, scenario: str) -> None:
    play(node, orders, scenario)


def test_what_supabase_js_sends_is_the_agent_s(node: str, orders: Tables) -> None:
    play(node, orders, "services")
    asked, *sent = orders.rest.requests
    assert asked.path == "/rest/v1/rpc/verify_certificate"
    assert "x-kakunin-cert-serial" not in asked.headers
    assert [request.path for request in sent] == ["/storage/v1/object/bucket/file", "/functions/v1/hello"]
    for request in sent:
        assert request.headers["x-kakunin-cert-serial"] == orders.one.serial
        assert request.claims["kakunin_cert_serial"] == orders.one.serial
        assert request.claims["role"] == "kakunin_agent"
        assert request.claims["scopes"] == ["orders:read", "orders:write"]
        assert request.claims["exp"] - request.claims["iat"] == 300


def test_supabase_js_renews_and_never_falls_back_to_the_api_key(node: str, orders: Tables) -> None:
    play(node, orders, "renewed")
    tokens = {
        request.headers["authorization"] for request in orders.rest.requests if "/orders" in request.path
    }
    assert len(tokens) >= 3
    for request in orders.rest.requests:
        assert request.headers["authorization"] != f"Bearer {orders.rest.anon_key}"


def test_the_example_runs_with_one_command(node: str, cluster: Cluster) -> None:
    environment = {**os.environ, "KAKUNIN_TEST_PG": str(cluster.major), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, EXAMPLE / "run.py"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said.count("['written by Python', 'written by asyncio']") == 2
    assert said.count("[ 'written by Python', 'written by asyncio', 'written by JavaScript' ]") == 2
    assert said.count("vault:read is allowed") == said.count("vault:read is not allowed") == 2
    revoked = done.stdout.partition("atlas, revoked, agent.py:")[2]
    assert "CertificateRevokedError" in revoked
    assert f"KakuninError: certificate {revoked.split()[2]} is revoked" in revoked
