"""What is tried against `kakunin-db serve`: keys, scopes, content, paths, floods, a database that is gone."""

from __future__ import annotations

import contextlib
import datetime as dt
import inspect
import io
import json
import logging
import os
import re
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from api import HASH, SCOPES, Server, api_key, login, served
from cluster import Cluster
from conftest import Agent, Database, fresh_database

from kakunin_db.logs import JSONFormatter
from kakunin_db.serve import app as serve_app
from kakunin_db.serve.app import openapi
from kakunin_db.serve.keys import ApiKey
from kakunin_db.serve.limits import RateLimit
from kakunin_db.serve.routes import ROUTES

pytest.importorskip("kakunin", reason="the SDK is not installed")
from kakunin import Kakunin

DOCUMENTATION = (Path(__file__).parent.parent / "docs" / "api.md").read_text()


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Server]:
    with served(database) as server:
        yield server


@pytest.fixture
def agent(database: Database) -> Agent:
    return database.agent("atlas", permitted_actions=["orders:*"])


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client(api_key(server.database)) as client:
        yield client


NOBODY = str(uuid.UUID(int=7))
BODIES: dict[str, Any] = {
    "create_agent": {"name": "x", "model": "m", "version": "1"},
    "update_agent": {"name": "x"},
    "sign": {"payload": {}},
    "create_event": {"agentId": NOBODY, "actionType": "api_call"},
    "create_chain": {"name": "x"},
    "create_report": {"agentId": NOBODY},
}


def ask(client: httpx.Client, route: Any, **more: Any) -> httpx.Response:
    path = re.sub(r"{\w+_id}", NOBODY, route.path).replace("{serial}", "01:02")
    if route.method != "GET":
        more.setdefault("json", BODIES.get(route.handler.__name__, {}))
    return client.request(route.method, path, **more)


PRIVATE = [route for route in ROUTES if route.scope]


# Keys ---------------------------------------------------------------------------------------------------


def test_no_private_route_answers_without_a_good_key(server: Server) -> None:
    database = server.database
    good = api_key(database)
    revoked = api_key(database)
    database.run(
        "operator",
        "select kakunin.revoke_api_key(key_id) from kakunin.api_keys where prefix = %s",
        [revoked.prefix],
    )
    expired = api_key(database, expires=dt.timedelta(milliseconds=1))
    time.sleep(0.01)
    other = ApiKey.generate()
    wrong = [
        "", "x", "kak_live_", good.text[:-1], good.text + "x", good.text.upper(), revoked.text, expired.text,
        other.text, other.text.replace(other.prefix, good.prefix),
        good.text.replace(good.prefix, other.prefix),
        f"{good.text} {good.text}", good.digest.hex(), f"kak_live_{good.prefix}_' or '1'='1",
    ]  # fmt: skip
    for text in wrong:
        headers = {"Authorization": f"Bearer {text}".strip()}
        answer = httpx.get(f"{server.url}/v1/agents", headers=headers)
        assert answer.status_code == 401, text
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for headers in (
        [("Authorization", f"Basic {good.text}")], [("Authorization", good.text)], [("X-Api-Key", good.text)],
        [("Authorization", f"Bearer {good.text}"), ("Authorization", f"Bearer {good.text}")],
    ):  # fmt: skip
        assert httpx.get(f"{server.url}/v1/agents", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/v1/agents?key={good.text}").status_code == 401
    with server.client(other) as client:
        for route in PRIVATE:
            assert ask(client, route).status_code == 401, route.path
    assert len(PRIVATE) == 19
    with server.client(good) as client:
        assert client.get("/v1/agents").status_code == 200


def test_a_revocation_counts_for_the_next_request(server: Server) -> None:
    key = api_key(server.database)
    with server.client(key) as client:
        assert client.get("/v1/agents").status_code == 200
        server.database.run(
            "operator",
            "select kakunin.revoke_api_key(key_id) from kakunin.api_keys where prefix = %s",
            [key.prefix],
        )
        refused = client.get("/v1/agents")
    assert refused.status_code == 401
    assert "revoked" in refused.json()["error"]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_key_does_what_its_scopes_say_and_nothing_else(server: Server, scope: str) -> None:
    with server.client(api_key(server.database, scope)) as client:
        for route in PRIVATE:
            body = {"status": "active"} if (route.method, scope) == ("PATCH", "agents:suspend") else None
            status = ask(client, route, **({"json": body} if body else {})).status_code
            mine = scope in str(route.scope).split("|")
            assert (status != 403) == mine, (scope, route.method, route.path, status)
            assert status < 500


def test_status_and_the_rest_of_an_agent_are_two_scopes(server: Server, agent: Agent) -> None:
    path = f"/v1/agents/{agent.agent_id}"
    with server.client(api_key(server.database, "agents:write")) as writer:
        assert writer.patch(path, json={"name": "n", "status": "suspended"}).status_code == 403
        assert writer.patch(path, json={"name": "n"}).status_code == 200
    with server.client(api_key(server.database, "agents:suspend")) as suspender:
        assert suspender.patch(path, json={"name": "m", "status": "suspended"}).status_code == 403
        assert suspender.patch(path, json={"metadata": {"scopes": ["orders:*"]}}).status_code == 403
        assert suspender.patch(path, json={"status": "suspended"}).json()["data"]["name"] == "n"


def test_a_key_of_one_agent_knows_no_other(server: Server, agent: Agent) -> None:
    other = server.database.agent("other")
    scopes = ("agents:read", "agents:sign", "agents:halt", "events:read", "events:write")
    with server.client(api_key(server.database)) as everybody:
        event = {"agentId": str(other.agent_id), "actionType": "api_call"}
        assert everybody.post("/v1/events", json=event).status_code == 201
    with server.client(api_key(server.database, *scopes, agent=agent.agent_id)) as client:
        assert [one["id"] for one in client.get("/v1/agents").json()["data"]] == [str(agent.agent_id)]
        assert client.get(f"/v1/agents/{agent.agent_id}").status_code == 200
        assert client.get("/v1/events").json()["data"] == []
        theirs = f"/v1/agents/{other.agent_id}"
        for answer in (
            client.get(theirs), client.get(f"{theirs}/risk"), client.get(f"{theirs}/certificates"),
            client.post(f"{theirs}/halt", json={}), client.post(f"{theirs}/sign", json={"payload": {}}),
            client.post("/v1/events", json=event), client.get(f"/v1/events?agent_id={other.agent_id}"),
            client.get(f"/v1/certificates/{other.serial}"), client.get(f"/v1/agents?before={other.agent_id}"),
        ):  # fmt: skip
            assert answer.status_code == 404
        mine = event | {"agentId": str(agent.agent_id)}
        assert client.post("/v1/events", json=mine).status_code == 201
        assert [one["agent_id"] for one in client.get("/v1/events").json()["data"]] == [mine["agentId"]]
    status = server.database.value(
        "auditor", "select kakunin.verify_certificate(%s) ->> 'status'", [other.serial]
    )
    assert status == "active"


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("scopes", []), ("scopes", ["agents:everything"]), ("scopes", ["agents:read", None]),
        ("scopes", None), ("scopes", ["*"]), ("name", " "), ("name", "x" * 201),
        ("prefix", "ABCDEF0123456789"),
        ("prefix", "0123"), ("prefix", None), ("digest", b"short"), ("digest", None),
        ("agent_id", uuid.uuid4()), ("expires_at", dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)),
        ("reach", None),
    ],
)  # fmt: skip
def test_keys_that_are_not_taken_in(database: Database, agent: Agent, change: str, value: Any) -> None:
    key = ApiKey.generate()
    given = {
        "prefix": key.prefix, "digest": key.digest, "name": "n", "scopes": ["agents:read"], "agent_id": None,
        "expires_at": None,
    }  # fmt: skip
    given |= (
        {"agent_id": agent.agent_id, "scopes": ["agents:write"]} if change == "reach" else {change: value}
    )
    with pytest.raises(psycopg.Error) as refused:
        database.run(
            "operator",
            "select kakunin.create_api_key(%(prefix)s, %(digest)s, %(name)s, %(scopes)s, %(agent_id)s,"
            " %(expires_at)s)",
            given,
        )
    assert refused.value.sqlstate == "KA010"


def test_what_the_database_has_of_a_key_opens_nothing(database: Database, server: Server) -> None:
    key = api_key(database)
    with database.connect("postgres") as admin:
        dump = admin.execute("select * from kakunin_private.api_keys").fetchall()
        log = admin.execute("select entry from kakunin_private.ledger").fetchall()
    secret = key.text[-43:]
    assert key.digest in [value for row in dump for value in row]
    assert secret not in repr(dump)
    for text in (secret, key.digest.hex()):
        assert text not in repr(log)
    assert repr(key).count(key.text) == 0
    # An operator sees which keys there are, and nothing to try them with.
    columns = database.run("operator", "select * from kakunin.api_keys where prefix = %s", [key.prefix])
    assert key.digest not in columns[0]


def test_how_long_a_refusal_takes_tells_nothing(database: Database) -> None:
    """Of digests that share no byte with the key's, 31 bytes, or all but belong to no key at all. What is
    compared are salted hashes, so no prefix of a digest can be found out by the clock: this catches a
    comparison whose cost depends on it grossly, such as a loop."""
    key = api_key(database)
    tried = {
        "none": (key.prefix, bytes(32)), "most": (key.prefix, key.digest[:-1] + b"\0"),
        "nobody": ("0" * 16, key.digest),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in tried}
    with database.connect("gateway", autocommit=True) as session:
        for _ in range(300):
            for name, parameters in tried.items():
                began = time.perf_counter()
                row = session.execute("select kakunin.authenticate_api_key(%s, %s)", parameters).fetchone()
                times[name].append(time.perf_counter() - began)
                assert row == (None,)
    medians = [statistics.median(found) for found in times.values()]
    assert max(medians) < 2 * min(medians)
    [(body,)] = database.run(
        "postgres", "select prosrc from pg_proc where oid = 'kakunin.authenticate_api_key'::regproc"
    )
    assert re.findall(r"digest\s*=", body) == []  # no digest is compared as it is


def test_the_last_use_of_a_key_is_noted_afterwards(database: Database) -> None:
    key = api_key(database)
    with served(database) as server, server.client(key) as client:
        assert client.get("/v1/agents").status_code == 200
        last = "select last_used_at from kakunin.api_keys where prefix = %s"
        assert database.value("operator", last, [key.prefix]) is None
    assert database.value("operator", last, [key.prefix]) is not None


def test_the_commands(database: Database) -> None:
    def run(*arguments: str, status: int = 0) -> Any:
        command = [sys.executable, "-m", "kakunin_db.cli", "serve", "keys", *arguments, "--json"]
        environment = {**os.environ, "KAKUNIN_DSN": database.dsn("operator")}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout) if status == 0 else done.stderr

    made = run("create", "console", "--scopes", "agents:read, events:read", "--expires", "90d")
    key = ApiKey.parse(made["key"])
    assert key is not None
    found = database.value("gateway", "select kakunin.authenticate_api_key(%s, %s)", [key.prefix, key.digest])
    assert (found["status"], found["scopes"]) == ("active", ["agents:read", "events:read"])
    [listed] = [one for one in run("list") if one["key_id"] == made["key_id"]]
    assert (listed["name"], listed["revoked_at"]) == ("console", None)
    assert key.text not in json.dumps(listed)
    assert run("revoke", made["key_id"])["revoked_at"]
    assert "KA010" in run("create", "x", "--scopes", "everything", status=1)
    assert "UUID" in run("revoke", key.text, status=2)
    types = "select event_type from kakunin.audit_log where metadata ->> 'key_id' = %s order by event_id"
    recorded = database.run("auditor", types, [made["key_id"]])
    assert recorded == [("api_key.created",), ("api_key.revoked",)]


# The server's own rights --------------------------------------------------------------------------------


def test_what_its_login_does_not_hold_the_server_cannot_do(database: Database, agent: Agent) -> None:
    dsn = login(database, "api_reader", ("gateway", "auditor"))
    with served(database, dsn) as server, server.client(api_key(database)) as client:
        for route in PRIVATE:
            refused = ask(client, route)
            without = {"registrar", "operator"} & set(route.roles)
            if without:
                assert refused.status_code == 403, route.path
                assert "its login does not hold kakunin_" in refused.json()["error"]
        path = f"/v1/agents/{agent.agent_id}"
        assert client.patch(path, json={"name": "x"}).status_code == 403
        assert client.patch(path, json={"status": "suspended"}).status_code == 403
        assert client.get(path).json()["data"]["status"] == "active"


def test_halting_takes_no_more_than_it_is_granted(database: Database, agent: Agent) -> None:
    """With the role of docs/api.md in place of kakunin_operator, which could pin an authority of its own."""
    [statements] = re.findall("```sql\n(create role api_operator.*?)```", DOCUMENTATION, re.DOTALL)
    with database.connect("installer") as installer:
        installer.execute("set role installer")
        installer.execute(statements)
    dsn = login(database, "api_halter", ("gateway", "registrar", "auditor", "api_operator"))
    with database.connect("api_halter", autocommit=True) as session:
        session.execute("set role api_operator")
        for more in (
            "kakunin.trust_ca('')", "kakunin.set_risk('{}')", "kakunin.unprotect('pg_class')",
            "kakunin.revoke_api_key(null)", "kakunin.rotate_session_key()", "kakunin.bind_serial('01')",
        ):  # fmt: skip
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute(f"select {more}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("set role kakunin_operator")
    path = f"/v1/agents/{agent.agent_id}"
    with (
        served(database, dsn, operator="api_operator") as server,
        server.client(api_key(database)) as client,
    ):
        assert client.patch(path, json={"status": "suspended"}).json()["data"]["status"] == "suspended"
        assert client.patch(path, json={"status": "active"}).json()["data"]["status"] == "active"
        halted = client.post(f"{path}/halt", json={}).json()["data"]
        assert halted["signature"]
        assert halted["certificates_revoked"] == [agent.serial]
        assert client.patch(path, json={"status": "retired"}).json()["data"]["status"] == "retired"
    published = database.value("auditor", "select entries from kakunin.crls")
    assert published >= 1


def test_a_server_without_keys_signs_nothing(database: Database, agent: Agent) -> None:
    with served(database) as server, server.client(api_key(database)) as client:
        object.__setattr__(server.app.settings, "keys", None)
        for path in ("certify", "sign"):
            body = {"payload": {}} if path == "sign" else {}
            refused = client.post(f"/v1/agents/{agent.agent_id}/{path}", json=body)
            assert refused.status_code == 403
            assert "no key store" in refused.json()["error"]


def test_a_statement_has_the_rights_of_one_role(server: Server, database: Database) -> None:
    """The login inherits nothing: not even what it is a member of without saying so."""
    with database.connect("api") as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("select kakunin.installation_id()")
    for role in ("gateway", "registrar", "operator", "auditor"):
        pool = server.app.backend._pools[role]  # type: ignore[index]
        assert f"role=kakunin_{role}" in str(pool.conninfo)


def test_a_server_whose_login_is_no_gateway_does_not_start(database: Database) -> None:
    command = [sys.executable, "-m", "kakunin_db.cli", "serve", "--dsn", database.dsn("stranger")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "does not hold kakunin_gateway" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_whose_database_has_no_kit_does_not_start(database: Database) -> None:
    """Its login may hold the kit's roles all the same: they are the cluster's."""
    elsewhere = psycopg.conninfo.make_conninfo(database.dsn("gateway"), dbname="postgres")
    command = [sys.executable, "-m", "kakunin_db.cli", "serve", "--dsn", elsewhere]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the kit is not in this database. Run kakunin-db migrate" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_keys_are_not_sent_in_the_clear(database: Database) -> None:
    command = [sys.executable, "-m", "kakunin_db.cli", "serve", "--dsn", database.dsn("gateway")]
    done = subprocess.run(
        [*command, "--listen", "0.0.0.0:1"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "in the clear" in done.stderr


# What is sent -------------------------------------------------------------------------------------------


EVIL = [
    "' or '1'='1", "'; drop schema kakunin_private cascade; --", "%s", "%(x)s", "\\", "$1", "{}",
    "{agent_id}",
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%00", "\u202e", "a" * 3000, "1e309", "NaN", "null", "true",
    "<script>alert(1)</script>", "\r\nX-Injected: 1", "${jndi:ldap://x}",
]  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_injection(server: Server, client: httpx.Client, agent: Agent, evil: str) -> None:
    quoted = httpx.URL(server.url, params={"x": evil}).query.decode().partition("=")[2]
    for route in ROUTES:
        if "{" in route.path:
            path = re.sub(r"{\w+}", quoted, route.path)
            answer = client.request(
                route.method,
                path,
                json=None if route.method == "GET" else BODIES.get(route.handler.__name__, {}),
            )
            assert 400 <= answer.status_code < 500, (route.path, answer.status_code)
            assert "X-Injected" not in answer.headers
    for path, name in (
        ("/v1/agents", "status"), ("/v1/agents", "limit"), ("/v1/agents", "before"), ("/v1/agents", evil),
        ("/v1/events", "agent_id"), ("/v1/events", "band"), ("/v1/events", "before"),
        ("/v1/chains", "before"),
    ):  # fmt: skip
        assert client.get(path, params={name: evil}).status_code == 400, (path, name)
    assert client.get("/v1/events", params={"action_type": evil[:64]}).status_code in (200, 400)
    # Where any text is allowed it is kept as it is.
    metadata = {"note": evil, evil: [evil]}
    event = {"agentId": str(agent.agent_id), "actionType": "api_call", "details": metadata}
    made = client.post("/v1/events", json=event)
    assert made.status_code == 201
    found = client.get("/v1/events", params={"agent_id": str(agent.agent_id)}).json()["data"]
    assert [one["payload"] for one in found] == [metadata]


BAD_JSON = [
    b"{", b"[]", b"null", b'"x"', b"1", b'{"name": 1}', b"\xff\xfe", b"{" * 100_00, b"[" * 60_000,
    b'{"name": "\\ud800", "model": "m", "version": "1"}',
    b'{"name": "\\u0000", "model": "m", "version": "1"}',
    b'{"name": "x", "model": "m", "version": "1", "metadata": {"x": NaN}}',
    b'{"name": "x", "model": "m", "version": "1", "metadata": {"x": 1e400}}',
    b'{"name": "x", "model": "m", "version": "1", "metadata": {"\\u0000": 1}}',
    b'{"name": "x", "model": "m", "version": "1", "metadata": {"x": ' + b"[" * 150 + b"]" * 150 + b"}}",
    b'{"name": "x", "model": "m", "version": "1", "unknown": 1}',
    b'{"name": "x", "model": "m", "version": "1", "metadata": {"x": ' + b"9" * 5000 + b"}}",
    b'{"name": "x", "model": "m", "version": "1", "financialScope": []}',
    b'{"name": "x", "model": "m", "version": "1", "__proto__": {}}',
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda c: c[:40].decode("latin-1"))
def test_malformed_content(client: httpx.Client, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/v1/agents", content=content, headers=headers)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error", "code", "hint"}
    before = len(client.get("/v1/agents", params={"limit": 200}).json()["data"])
    assert client.post("/v1/agents", content=content, headers=headers).status_code == 400
    assert len(client.get("/v1/agents", params={"limit": 200}).json()["data"]) == before


NOT_JSON = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx",
            "application/json; charset=utf-16", "application/xml", "text/json"]  # fmt: skip


@pytest.mark.parametrize("kind", NOT_JSON)
def test_other_content(client: httpx.Client, kind: str) -> None:
    answer = client.post("/v1/agents", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415


def test_encoded_content_is_not_decoded(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert client.post("/v1/agents", content=b"\x1f\x8b", headers=headers).status_code == 415


def test_large_content(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    large = json.dumps({"name": "x" * 70_000}).encode()
    assert client.post("/v1/agents", content=large, headers=headers).status_code == 413

    def endless() -> Iterator[bytes]:  # chunked, without a length
        for _ in range(10_000):
            yield b" " * 10_000

    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        assert client.post("/v1/agents", content=endless(), headers=headers).status_code == 413
    assert client.request("GET", "/v1/agents", content=b"x" * 100).status_code == 400
    assert client.get("/v1/agents").status_code == 200


def test_content_that_never_comes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_app, "_CONTENT_WITHIN", 0.3)
    key = api_key(server.database)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"POST /v1/agents HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key.text}\r\n"
            "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{".encode()
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_paths(client: httpx.Client) -> None:
    for path in (
        "/", "/v1", "/v1/", "/v1/agents/", "/v1//agents", "/V1/agents", "/v1/agents/..",
        "/v1/../v1/agents/x/y/z",
        "/v1/agents/%2e%2e/%2e%2e/etc/passwd", "/static/../kakunin_db", "/docs", "/.git/config",
        "/v1/crl/../ca/x",
        "/v1/crl/..%2f..%2fetc%2fpasswd", "/v1/verify/", "/v1/verify/chain/", "/openapi.json/x",
    ):  # fmt: skip
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.headers["content-type"] == "application/json"
    assert client.delete("/v1/agents").status_code == 405
    assert client.put(f"/v1/agents/{NOBODY}").status_code == 405
    assert client.get("/v1/agents", params=[("limit", "1"), ("limit", "2")]).status_code == 400
    assert client.get("/v1/agents", params={"limit": 1, "other": 1}).status_code == 400


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01T00:00:00"]
)
def test_moments_that_are_none(client: httpx.Client, agent: Agent, moment: str) -> None:
    event = {"agentId": str(agent.agent_id), "actionType": "api_call", "occurredAt": moment}
    answer = client.post("/v1/events", json=event)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("occurredAt: ")


@pytest.mark.parametrize("number", ["1e5000", "-1e4400", "1" + "0" * 400 + ".5"], ids=["long", "less", "inf"])
def test_a_number_that_python_has_no_value_for_hides_nothing(
    server: Server, client: httpx.Client, agent: Agent, number: str
) -> None:
    """An agent that speaks SQL, or a registrar's login, writes what no request may."""
    database = server.database
    text = json.dumps({"n": 0}).replace("0", number)
    written = database.value("postgres", "select %s::jsonb ->> 'n'", [text])
    chain = client.post("/v1/chains", json={"name": "x"}).json()["data"]["chain_id"]
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
        session.execute("select kakunin.audit_log_append('api_call', %s::jsonb)", [text])
        session.execute("select kakunin.append_to_decision_chain(%s, 'api_call', %s::jsonb)", [chain, text])
    asked = json.dumps({"scopes": [0]}).replace("0", number)
    described = "select kakunin.describe_agent(%s, %s::jsonb)"
    database.run("registrar", described, [agent.agent_id, asked])
    path = f"/v1/agents/{agent.agent_id}"
    found = client.get("/v1/events", params={"agent_id": str(agent.agent_id)}).json()["data"]
    assert [one["payload"]["n"] for one in found] == [written] * 2
    assert client.get(f"/v1/chains/{chain}").json()["data"]["events"][0]["details"]["n"] == written
    assert client.get(path).json()["data"]["metadata"]["requested_scopes"] == [written]
    assert client.post(f"{path}/certify", json={}).status_code in (409, 422)
    made = client.post("/v1/reports/compliance", json={"agentId": str(agent.agent_id)})
    assert made.status_code == 201
    database.run("registrar", described, [agent.agent_id, "{}"])


# Agents that were stopped -------------------------------------------------------------------------------


def test_nothing_is_done_for_an_agent_that_was_stopped(client: httpx.Client, server: Server) -> None:
    suspended, revoked = server.database.agent("suspended"), server.database.agent("revoked")
    suspended.suspend()
    revoked.revoke()
    for agent in (suspended, revoked):
        path = f"/v1/agents/{agent.agent_id}"
        event = {"agentId": str(agent.agent_id), "actionType": "api_call"}
        for answer in (
            client.post("/v1/events", json=event), client.post(f"{path}/sign", json={"payload": {}}),
        ):  # fmt: skip
            assert answer.status_code == 422
        shown = client.get(path).json()["data"]
        assert (shown["status"], shown["metadata"]["scopes"]) == ("suspended", [])
        assert server.database.value("auditor", *count(agent)) == 0
    assert client.post(f"/v1/agents/{suspended.agent_id}/certify").status_code == 422


def count(agent: Agent) -> tuple[str, list[Any]]:
    return (
        "select count(*) from kakunin.audit_log where agent_id = %s and risk is not null", [agent.agent_id],
    )  # fmt: skip


def test_what_fails_halfway_leaves_an_agent_suspended(database: Database, agent: Agent) -> None:
    """To be retired for a reason, the suspension before is lifted: not where the next one fails."""
    agent.suspend()
    path = f"/v1/agents/{agent.agent_id}"
    suspended = "select suspended_at is not null from kakunin.agents where agent_id = %s"
    with served(database) as server, server.client(api_key(database)) as client:
        with database.connect("postgres", autocommit=True) as admin:
            admin.execute(
                "revoke execute on function kakunin.suspend_agent(uuid, text) from kakunin_operator"
            )
            try:
                assert client.patch(path, json={"status": "retired"}).status_code == 500
            finally:
                admin.execute(
                    "grant execute on function kakunin.suspend_agent(uuid, text) to kakunin_operator"
                )
        assert database.value("auditor", suspended, [agent.agent_id]) is True
        assert client.patch(path, json={"status": "retired"}).json()["data"]["status"] == "retired"
        assert client.patch(path, json={"status": "active"}).status_code == 422
        assert database.value("auditor", suspended, [agent.agent_id]) is True


def test_a_row_in_the_database_has_nothing_certified_that_the_configuration_does_not_permit(
    server: Server, client: httpx.Client
) -> None:
    asked = {"name": "x", "model": "m", "version": "1", "modelHash": HASH}
    for scopes in (
        ["admin"],
        ["*"],
        ["orders:read", "orders"],
        ["trade.execute:*"],
        ["trade:execute"],
        "orders:*",
    ):
        made = client.post("/v1/agents", json={**asked, "metadata": {"scopes": scopes}}).json()["data"]
        certify = f"/v1/agents/{made['id']}/certify"
        assert client.post(certify).status_code == 422, scopes
        if isinstance(scopes, list):
            assert client.post(certify, json={"permittedActions": scopes}).status_code in (400, 422), scopes
    assert client.post(certify, json={"permittedActions": ["orders:read"]}).status_code == 201


# Floods -------------------------------------------------------------------------------------------------


def test_a_key_and_an_address_may_ask_so_often(database: Database) -> None:
    with served(database, per_minute=5, public_per_minute=4) as server:
        one, two = api_key(database), api_key(database)
        with server.client(one) as client:
            statuses = [client.get("/v1/agents").status_code for _ in range(8)]
            assert statuses == [200] * 5 + [429] * 3
            refused = client.get("/v1/agents")
            assert 1 <= int(refused.headers["Retry-After"]) <= 12
        with server.client(two) as client:
            assert client.get("/v1/agents").status_code == 200
        statuses = [httpx.get(f"{server.url}/v1/ca").status_code for _ in range(6)]
        assert statuses == [200] * 4 + [429] * 2
        # Who guesses is soon asked to wait, and the database is not asked meanwhile.
        with server.client(ApiKey.generate()) as client:
            statuses = [client.get("/v1/agents").status_code for _ in range(6)]
            assert statuses == [401] * 4 + [429] * 2


def test_who_guesses_locks_out_nobody_at_the_same_address(database: Database, agent: Agent) -> None:
    with served(database, public_per_minute=3) as server:
        key = api_key(database)
        with server.client(key) as client, server.client(ApiKey.generate()) as guessing:
            assert client.get("/v1/agents").status_code == 200
            wrong = [guessing.get("/v1/agents").status_code for _ in range(5)]
            assert wrong == [401] * 3 + [429] * 2
            assert client.get("/v1/agents").status_code == 200
            assert client.post(f"/v1/agents/{agent.agent_id}/halt", json={}).status_code == 200
            # It is asked about each time, and once it is revoked it is as good as any guess.
            database.run(
                "operator",
                "select kakunin.revoke_api_key(key_id) from kakunin.api_keys where prefix = %s",
                [key.prefix],
            )
            assert [client.get("/v1/agents").status_code for _ in range(2)] == [401, 429]


def test_a_key_that_may_ask_no_more_may_still_halt(database: Database, agent: Agent) -> None:
    with served(database, per_minute=2) as server, server.client(api_key(database)) as client:
        assert [client.get("/v1/agents").status_code for _ in range(3)] == [200, 200, 429]
        path = f"/v1/agents/{agent.agent_id}/halt"
        assert [client.post(path, json={}).status_code for _ in range(3)] == [200, 200, 429]


def test_a_key_leaves_connections_to_others(database: Database, agent: Agent) -> None:
    """Requests of one key that hang, more than there are connections; and of one address."""
    with (
        served(database, timeout=8.0, connections=2) as server,
        server.client(api_key(database)) as greedy,
        server.client(api_key(database)) as client,
        database.connect("postgres") as admin,
        ThreadPoolExecutor(12) as threads,
    ):
        admin.execute("lock table kakunin_private.reports in access exclusive mode")
        admin.execute("lock table kakunin_private.decision_chains in access exclusive mode")
        hanging = [threads.submit(greedy.get, f"/v1/reports/{NOBODY}") for _ in range(6)]
        chain = f"{server.url}/v1/verify/chain/{NOBODY}"
        hanging += [threads.submit(httpx.get, chain, timeout=20) for _ in range(6)]
        time.sleep(0.5)
        began = time.monotonic()
        event = {"agentId": str(agent.agent_id), "actionType": "api_call"}
        assert client.get(f"/v1/agents/{agent.agent_id}").status_code == 200
        assert client.post("/v1/events", json=event).status_code == 201
        assert time.monotonic() - began < 4
        assert not any(one.done() for one in hanging)
        admin.rollback()
        assert {one.result().status_code for one in hanging} == {404}


def test_a_key_whose_requests_hang_is_told_to_wait(database: Database) -> None:
    with (
        served(database, timeout=1.0, connections=2) as server,
        server.client(api_key(database)) as client,
        database.connect("postgres") as admin,
        ThreadPoolExecutor(3) as threads,
    ):
        admin.execute("lock table kakunin_private.reports in access exclusive mode")
        hanging = [threads.submit(client.get, f"/v1/reports/{NOBODY}") for _ in range(3)]
        assert {one.result().status_code for one in hanging} <= {429, 503}
        admin.rollback()
        assert client.get(f"/v1/reports/{NOBODY}").status_code == 404


def test_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("kakunin_db.serve.limits.time.monotonic", lambda: now[0])
    limit = RateLimit(60, most=2)
    assert [limit.wait("a") for _ in range(61)] == [0] * 60 + [1]
    now[0] += 1
    assert [limit.wait("a") for _ in range(2)] == [0, 1]
    assert limit.wait("b", take=False) == 0
    limit.wait("c")
    limit.wait("b")
    assert set(limit._buckets) == {"b", "c"}


def test_a_halt_waits_for_nobody(database: Database, agent: Agent) -> None:
    """Requests that hang have all connections of the auditor and of the gateway."""
    with (
        served(database, timeout=8.0, connections=2) as server,
        server.client(api_key(database)) as client,
        database.connect("postgres") as admin,
        ThreadPoolExecutor(8) as threads,
    ):
        admin.execute("lock table kakunin_private.decision_chains in access exclusive mode")
        chain = f"{server.url}/v1/verify/chain/{NOBODY}"
        hanging = [threads.submit(httpx.get, chain, timeout=20) for _ in range(4)]
        admin.execute("lock table kakunin_private.reports in access exclusive mode")
        path = f"/v1/reports/{NOBODY}"
        hanging += [threads.submit(client.get, path) for _ in range(4)]
        time.sleep(0.5)
        began = time.monotonic()
        assert client.post(f"/v1/agents/{agent.agent_id}/halt", json={}).status_code == 200
        assert time.monotonic() - began < 4
        assert not any(one.done() for one in hanging)
        admin.rollback()
        assert {one.result().status_code for one in hanging} == {404}


# The log, and what is answered when something is wrong -----------------------------------------------------


def test_no_key_is_in_the_log_or_in_an_answer(server: Server, agent: Agent) -> None:
    key = api_key(server.database)
    secret = key.text[-43:]
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JSONFormatter())
    root, log = logging.getLogger(), logging.getLogger("kakunin_db.serve")
    root.addHandler(handler)
    levels = root.level, log.level
    root.setLevel(logging.DEBUG)
    log.setLevel(logging.DEBUG)
    try:
        with server.client(key) as client:
            answers = [
                client.get("/v1/agents", params={"key": key.text}), client.get(f"/v1/agents/{key.text}"),
                client.post("/v1/agents", json={"name": key.text}), client.get(f"/v1/{key.text}"),
                client.post("/v1/agents", content=key.text, headers={"Content-Type": "application/json"}),
                client.get("/v1/agents"),
            ]  # fmt: skip
    finally:
        root.removeHandler(handler)
        root.setLevel(levels[0])
        log.setLevel(levels[1])
    ours = [json.loads(line) for line in written.getvalue().splitlines() if '"event": "request"' in line]
    assert len(ours) == 4  # those that some route answers
    assert {line["key"] for line in ours} == {key.prefix}
    lines = [
        line for line in written.getvalue().splitlines() if "httpx" not in line and "httpcore" not in line
    ]
    assert [line for line in lines if secret in line] == []
    assert [a.status_code for a in answers] == [400, 404, 400, 404, 400, 200]
    with server.database.connect("postgres", autocommit=True) as admin:
        admin.execute("select 1")
    assert secret not in (server.database.cluster.base / "log").read_text(errors="replace")


def test_a_bug_says_nothing(server: Server, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("password=hunter2")

    monkeypatch.setattr(server.app.backend, "client", fail)
    answer = client.get("/v1/agents")
    assert answer.status_code == 500
    assert answer.json()["error"] == "the server failed"
    assert "hunter2" not in answer.text


def test_a_database_that_takes_no_writes(cluster: Cluster) -> None:
    """As in recovery: what only reads is answered, and what would write says when to try again."""
    with fresh_database(cluster) as database:
        key, agent = api_key(database), database.agent("atlas")
        with cluster.session("postgres", "postgres") as admin:
            admin.execute(f"alter database {database.name} set default_transaction_read_only to on")
        with served(database) as server, server.client(key) as client:
            assert client.get(f"/v1/agents/{agent.agent_id}").status_code == 200
            assert httpx.get(f"{server.url}/v1/verify/{agent.serial}").json()["data"]["valid"] is True
            event = {"agentId": str(agent.agent_id), "actionType": "api_call"}
            for answer in (
                client.post("/v1/events", json=event), client.get("/v1/events"),
                client.post(f"/v1/agents/{agent.agent_id}/halt", json={}),
                client.post("/v1/chains", json={"name": "x"}),
            ):  # fmt: skip
                assert answer.status_code == 503
                assert answer.headers["Retry-After"] == "1"
                assert "takes no writes" in answer.json()["error"]


def test_a_database_that_is_gone(cluster: Cluster) -> None:
    with fresh_database(cluster) as database:
        key, agent = api_key(database), database.agent("atlas")
        with served(database, timeout=1.0) as server, server.client(key) as client:
            path = f"/v1/agents/{agent.agent_id}"
            assert client.get(path).status_code == 200
            with database.cluster.session("postgres", "postgres") as admin:
                admin.execute(f"alter database {database.name} allow_connections false")
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = %s and pid <> pg_backend_pid()",
                    [database.name],
                )
            database.cluster.release(database.name)
            try:
                for answer in (
                    client.get(path), client.post(f"{path}/halt", json={}),
                    httpx.get(f"{server.url}/healthz"),
                    httpx.get(f"{server.url}/v1/verify/{agent.serial}"),
                ):  # fmt: skip
                    assert answer.status_code == 503
                    assert answer.headers["Retry-After"] == "1"
                    said = answer.json()["error"]
                    for told in (database.name, "api", str(database.cluster.port), database.cluster.host):
                        assert told not in said
            finally:
                with database.cluster.session("postgres", "postgres") as admin:
                    admin.execute(f"alter database {database.name} allow_connections true")
            until = time.monotonic() + 30
            while client.get(path).status_code != 200 and time.monotonic() < until:
                time.sleep(0.2)
            assert client.get(path).json()["data"]["status"] == "active"


def test_a_database_that_hangs(database: Database, agent: Agent) -> None:
    with (
        served(database, timeout=0.5) as server,
        server.client(api_key(database)) as client,
        database.connect("postgres") as admin,
    ):
        assert client.get("/v1/agents").status_code == 200
        admin.execute("lock table kakunin_private.agents in access exclusive mode")
        began = time.monotonic()
        assert client.get(f"/v1/agents/{agent.agent_id}").status_code == 503
        assert time.monotonic() - began < 5
        admin.rollback()
        assert client.get(f"/v1/agents/{agent.agent_id}").status_code == 200


# The document -------------------------------------------------------------------------------------------


def test_the_document_is_of_the_routes(server: Server) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert document == json.loads(json.dumps(openapi()))
    described = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(described) == {(route.method, route.path) for route in ROUTES}
    documented: set[str] = set()
    for route in ROUTES:
        operation = described[route.method, route.path]
        assert operation.get("x-scope", []) == ([] if route.scope is None else route.scope.split("|"))
        [row] = re.findall(
            rf"^\| `{route.method} {re.escape(route.path)}` \|.*$", DOCUMENTATION, re.MULTILINE
        )
        for scope in operation.get("x-scope", []):
            assert f"`{scope}`" in row
        for method in re.findall(r"`((?:agents|events|chains|reports|verify)\.\w+)`", row):
            documented.add(method)
        assert operation["security"] == ([] if route.scope is None else [{"key": []}])
    client: Any = Kakunin(api_key="x")
    assert documented == {
        f"{name}.{method}"
        for name, resource in vars(client).items() if not name.startswith("_")
        for method, _ in inspect.getmembers(resource, inspect.iscoroutinefunction)
    }  # fmt: skip
    named_ids = [operation["operationId"] for operation in described.values()]
    assert len(set(named_ids)) == len(named_ids)
    scopes = {scope for operation in described.values() for scope in operation.get("x-scope", [])}
    assert (
        scopes == set(SCOPES) == set(server.database.value("postgres", "select kakunin_private.api_scopes()"))
    )


def test_what_anybody_may_have(server: Server, tmp_path: Any) -> None:
    pem = httpx.get(f"{server.url}/v1/ca")
    assert pem.text.count("BEGIN CERTIFICATE") == 1
    (tmp_path / "ca.pem").write_text(pem.text)
    agent = server.database.agent("halted")
    with server.client(api_key(server.database)) as client:
        receipt = client.post(f"/v1/agents/{agent.agent_id}/halt", json={}).json()["data"]
        assert client.get("/v1/crl").status_code == 200
    key_id = receipt["key_id"].replace(":", "").lower()
    crl = httpx.get(f"{server.url}/v1/crl/{key_id}.crl")
    assert crl.headers["content-type"] == "application/pkix-crl"
    (tmp_path / "list.crl").write_bytes(crl.content)
    shown = subprocess.run(
        ["openssl", "crl", "-inform", "DER", "-in", tmp_path / "list.crl", "-CAfile", tmp_path / "ca.pem",
         "-noout", "-text"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "verify OK" in shown.stderr
    assert agent.serial.replace(":", "") in shown.stdout
    assert httpx.get(f"{server.url}/v1/crl/{'0' * 40}").status_code == 404
    jwks = httpx.get(f"{server.url}/.well-known/jwks.json").json()
    assert [one["kty"] for one in jwks["keys"]] == ["RSA"]
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
