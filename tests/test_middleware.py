"""The gateway middleware in real frameworks: who is admitted, and that everybody else is not.

Every test that expects a refusal also expects that no handler ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import hashlib
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import Agent, Database, Vault
from gateways import FRAMEWORKS, SERIAL, SOCKETS, Proxy, Site, raw, serial_of, site

from kakunin_db import BadInputError
from kakunin_db.middleware import AsyncGateway, Gateway, Refused
from kakunin_db.middleware.asgi import KakuninMiddleware
from kakunin_db.middleware.core import Rules, is_ambiguous, permits
from kakunin_db.middleware.wsgi import KakuninMiddleware as WSGIMiddleware

every = pytest.mark.parametrize("framework", FRAMEWORKS)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


def local(database: Database, port: int, user: str = "gateway") -> str:
    return f"host=127.0.0.1 port={port} dbname={database.name} user={user}"


@every
async def test_an_agent_is_admitted_and_its_handler_sees_its_rows(framework: str, vault: Vault) -> None:
    async with site(framework, vault.database) as app:
        answer = await app.send("GET", "/whoami", serial_of(vault.one))
        assert answer.status == 200
        assert answer.json == {
            "serial": vault.one.serial, "agent": str(vault.one.agent_id), "proof": "serial", "reads": True,
        }  # fmt: skip
        for agent, rows in ((vault.one, ["one-a", "one-b"]), (vault.two, ["two-a", "two-b"])):
            assert (await app.send("GET", "/vault", serial_of(agent))).json == rows
        content = [b"a" * 70_000, b"", b"b"]
        answer = await app.send("POST", "/echo", serial_of(vault.one), content)
        assert answer.json["sha256"] == hashlib.sha256(b"".join(content)).hexdigest()


@every
async def test_a_serial_in_any_form_is_one_agent(framework: str, database: Database) -> None:
    agent = database.agent()
    plain = agent.serial.replace(":", "")
    async with site(framework, database) as app:
        for text in (
            agent.serial, agent.serial.lower(), plain, f"0x{plain}", f" {agent.serial} ",
            f"\t{agent.serial}\t",
        ):  # fmt: skip
            answer = await app.send("GET", "/whoami", [(SERIAL, text)])
            assert (text, answer.status, answer.json["serial"]) == (text, 200, agent.serial)


@every
async def test_what_is_no_serial_is_refused(framework: str, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    malformed = [
        "zz", "null", "*", f"{agent.serial},", f"{agent.serial}, {other.serial}", f"{agent.serial};q=1",
        f"{agent.serial}\u00a0", agent.serial.replace(":", "\u2236"), "\uff13A", f'"{agent.serial}"', "0",
        "0x", "00:00", ":", "A" * 41, "A" * 5000, f"{agent.serial}\x00", f"{agent.serial}' or '1'='1",
        "3A\t:F2", "3A::F2",
    ]  # fmt: skip
    async with site(framework, database) as app:
        for text in malformed:
            answer = await app.send("GET", "/whoami", [(SERIAL, text)])
            assert (text, answer.outcome) == (text, (400, "malformed_cert_serial"))
        for headers in ([], [(SERIAL, "")], [(SERIAL, "  ")], [("Kakunin-Cert-Serial", agent.serial)]):
            answer = await app.send("GET", "/whoami", headers)
            assert answer.outcome == (401, "missing_cert_serial")
            assert answer.headers["www-authenticate"] == "Kakunin"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["cache-control"] == "no-store"
        twice = [
            [(SERIAL, agent.serial), (SERIAL, other.serial)],
            [(SERIAL, agent.serial), (SERIAL.lower(), agent.serial)],
            [(SERIAL, ""), (SERIAL, agent.serial)],
        ]
        for headers in twice:
            answer = await app.send("GET", "/whoami", headers)
            assert answer.outcome == (400, "malformed_cert_serial")
        assert app.ran == []


@every
async def test_only_a_certificate_that_may_be_used_now(framework: str, database: Database) -> None:
    revoked, suspended = database.agent(), database.agent()
    early = database.agent(not_before=dt.datetime.now(dt.timezone.utc) + dt.timedelta(hours=1))
    async with site(framework, database) as app:
        ends = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) + dt.timedelta(seconds=3)
        minute = dt.timedelta(minutes=1)
        expired = database.agent(not_before=ends - minute, lifetime=minute)
        for agent in (revoked, suspended, expired):
            assert (await app.send("GET", "/whoami", serial_of(agent))).status == 200
        app.ran.clear()
        revoked.revoke()
        suspended.suspend()
        await asyncio.sleep(max(0, (ends - dt.datetime.now(dt.timezone.utc)).total_seconds() + 0.1))
        for agent, outcome in (
            (revoked, (403, "agent_revoked")),
            (suspended, (403, "agent_suspended")),
            (early, (403, "agent_not_yet_valid")),
            (expired, (403, "agent_expired")),
        ):

            async def refused(agent: Agent = agent, outcome: Any = outcome) -> bool:
                return (await app.send("GET", "/whoami", serial_of(agent))).outcome == outcome

            await until(refused, 1.0)
            app.ran.clear()
            for method, path in (
                ("GET", "/whoami"),
                ("HEAD", "/whoami"),
                ("GET", "/vault"),
                ("POST", "/echo"),
            ):
                answer = await app.send(method, path, serial_of(agent), b"x" if method == "POST" else b"")
                assert answer.refused(*outcome)
            assert app.ran == []
        assert (await app.send("GET", "/whoami", [(SERIAL, "01:02:03")])).outcome == (
            401,
            "unknown_cert_serial",
        )
        database.run("operator", "select kakunin.reinstate_agent(%s)", [suspended.agent_id])

        async def back() -> bool:
            return (await app.send("GET", "/whoami", serial_of(suspended))).status == 200

        await until(back, 1.0)


@every
async def test_scopes_by_application_path_and_method(framework: str, database: Database) -> None:
    reader = database.agent(permitted_actions=["site:use", "vault:read"])
    admin = database.agent(permitted_actions=["site:*", "admin:*"])
    nobody = database.agent(permitted_actions=[])
    scopes = {
        "/whoami": (), "PUT /whoami": "admin:write", "/admin": "admin:read", "/admin/open": [],
        "/vault": ["vault:read", "site:use"], "GET /echo": (),
    }  # fmt: skip
    violation = (403, "scope_violation")
    async with site(framework, database, required_scope="site:use", scopes=scopes) as app:
        for agent, method, path, outcome in (
            (nobody, "GET", "/whoami", violation),
            (reader, "GET", "/whoami", 200),
            (reader, "PUT", "/whoami", violation),
            (reader, "put", "/whoami", violation),
            (admin, "PUT", "/whoami", 200),
            (reader, "GET", "/admin", violation),
            (reader, "GET", "/admin/users", violation),
            (reader, "GET", "/admin/openly", violation),
            (reader, "GET", "/admin/open", 200),
            (reader, "GET", "/admin/open/x", 200),
            (admin, "GET", "/admin/users", 200),
            (admin, "GET", "/vault", violation),
            (reader, "POST", "/echo", 200),
            (nobody, "POST", "/echo", violation),
        ):
            app.ran.clear()
            answer = await app.send(method, path, serial_of(agent))
            if outcome == 200:
                assert (method, path, answer.status) == (method, path, 200)
            else:
                assert (method, path, answer.refused(*outcome)) == (method, path, True)
            assert bool(app.ran) == (outcome == 200)
        assert (await app.send("PUT", "/whoami", serial_of(reader))).json == {
            "error": "scope_violation", "message": "The certificate does not permit admin:write.",
            "required": ["site:use", "admin:write"],
        }  # fmt: skip
    async with site(framework, database, scopes={"/whoami": "site:use", "POST /echo": ()}) as app:
        assert (await app.send("GET", "/whoami", serial_of(reader))).status == 200
        app.ran.clear()
        for method, path in (("GET", "/vault"), ("GET", "/admin/x"), ("PUT", "/echo"), ("OPTIONS", "/echo")):
            assert (await app.send(method, path, serial_of(admin))).refused(*violation)
        assert app.ran == []


@every
async def test_no_spelling_of_a_path_gets_around_its_scope(framework: str, database: Database) -> None:
    agent = database.agent(permitted_actions=["site:use"])
    async with site(
        framework, database, required_scope="site:use", scopes={"/admin": "admin:read"}, public=["/healthz"]
    ) as app:
        for path in (
            "/admin", "/admin/", "/admin/x", "/%61dmin", "/%61dmin/x", "/admin%2Fx", "/admin?",
            "/admin?x=/whoami",
            "//admin", "/x/../admin", "/./admin", "/%2e/admin", "/x/%2e%2e/admin", "/admin//x", "/\\admin",
            "/%5cadmin", "/admin\\..\\whoami", "/admin/..", "/admin/%00", "/x/..%2fadmin",
            "/healthz/../admin", "/healthz%2F..%2Fadmin",
        ):  # fmt: skip
            answer = await app.send("GET", path, serial_of(agent))
            # Some are of no handler, or a redirect to another path: what counts is that no handler ran.
            assert (path, answer.status in (307, 308, 400, 403, 404)) == (path, True)
        assert app.ran == []
        answer = await app.send("GET", "/healthz")
        assert answer.json == {"serial": None}
        for path in ("/whoami", "/admin/healthz", "/healthz/", "/healthz/x", "/HEALTHZ"):
            assert (await app.send("GET", path)).refused(401, "missing_cert_serial")


@every
async def test_a_mounted_application_is_under_its_whole_path(framework: str, database: Database) -> None:
    agent = database.agent(permitted_actions=["site:use"])
    path = "/mounted/whoami"
    async with site(
        framework, database, required_scope="site:use", scopes={"/mounted": "mounted:use"}
    ) as app:
        assert (await app.send("GET", path, serial_of(agent))).outcome == (403, "scope_violation")
        assert (await app.send("GET", path)).outcome == (401, "missing_cert_serial")
        assert app.ran == []
    async with site(framework, database, required_scope="site:use", scopes={"/whoami": "no:body"}) as app:
        answer = await app.send("GET", path, serial_of(agent))
        if framework == "litestar":  # its middleware is shown the path without the mount: that counts as well
            assert answer.outcome == (403, "scope_violation")
        else:
            assert answer.json["serial"] == agent.serial


def test_a_mount_named_in_the_request_gets_around_no_scope(database: Database) -> None:
    """gunicorn takes SCRIPT_NAME from a field of that name, and applications route by what is left."""
    agent = database.agent(permitted_actions=["orders:read"])
    ran: list[str] = []

    def application(environ: Any, start_response: Any) -> list[bytes]:
        ran.append(environ["PATH_INFO"])
        start_response("200 OK", [])
        return []

    def send(mount: str, path: str, *, named: bool, serial: str | None = agent.serial) -> str:
        environ = {"REQUEST_METHOD": "GET", "SCRIPT_NAME": mount, "PATH_INFO": path, "RAW_URI": mount + path}
        environ |= {"HTTP_SCRIPT_NAME": mount} if named else {}
        environ |= {"HTTP_X_KAKUNIN_CERT_SERIAL": serial} if serial else {}
        said: list[str] = []
        list(middleware(environ, lambda status, headers: said.append(status[:3])))
        return said[0]

    with contextlib.closing(Gateway(database.dsn("gateway"))) as gateway:
        middleware = WSGIMiddleware(
            application, gateway, proof="serial",
            scopes={"/": (), "/admin": "admin:all", "/api/orders": "orders:read"},
            public=["/open/admin", "/open"],
        )  # fmt: skip
        for mount, path in (
            ("/x", "/admin"), ("/x", "/admin/users"), ("/api/orders", "/admin"), ("/open", "/admin"),
        ):  # fmt: skip
            assert send(mount, path, named=True) == "403", (mount, path)
        assert send("/open", "/admin", named=True, serial=None) == "401"
        assert send("/ope", "n", named=True, serial=None) == "400"
        assert ran == []
        # A proxy's, which says the same of what everybody may; and the server's own configuration.
        assert send("/api", "/orders", named=True) == "200"
        assert send("/x", "/admin", named=False) == "200"
        assert ran == ["/orders", "/admin"]


@every
async def test_a_revocation_is_seen_at_once(framework: str, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    async with site(framework, database, options={"ttl": 3600}) as app:
        for who in (agent, other):
            assert (await app.send("GET", "/whoami", serial_of(who))).status == 200
        agent.revoke()
        committed = time.monotonic()

        async def refused() -> bool:
            return (await app.send("GET", "/whoami", serial_of(agent))).status == 403

        await until(refused, 2.0)
        assert time.monotonic() - committed < 1.0  # benchmarks/middleware.py measures it
        for _ in range(20):
            assert await refused()
        assert (await app.send("GET", "/whoami", serial_of(other))).status == 200


@every
async def test_what_the_database_says_in_a_handler_is_answered_alike(framework: str, vault: Vault) -> None:
    async with site(framework, vault.database) as app:
        answer = await app.send("GET", "/halted", serial_of(vault.one))
        assert answer.outcome == (403, "agent_revoked")


@every
async def test_without_a_database_nobody_gets_through(framework: str, database: Database) -> None:
    agent = database.agent()
    async with site(framework, database, dsn=local(database, 1)) as app:
        for _ in range(2):
            answer = await app.send("GET", "/whoami", serial_of(agent))
            assert answer.outcome == (503, "verify_unavailable")
            assert answer.headers["retry-after"] == "1"
            assert "1" not in answer.json["message"]  # nothing of where it is
        # A malformed one is still told so, and what is public stays so.
        assert (await app.send("GET", "/whoami", [(SERIAL, "x")])).status == 400
        assert app.ran == []
    for wrong in (
        local(database, database.cluster.port, "stranger"),
        f"{local(database, database.cluster.port)}x",
    ):
        async with site(framework, database, dsn=wrong) as app:
            assert (await app.send("GET", "/whoami", serial_of(agent))).outcome == (503, "verify_unavailable")
            assert app.ran == []


@every
async def test_a_database_that_goes_away_takes_everybody_with_it(framework: str, database: Database) -> None:
    agent = database.agent()
    async with contextlib.AsyncExitStack() as stack:
        proxy = stack.enter_context(Proxy(database.cluster.port))
        dsn = local(database, proxy.port)
        app = await stack.enter_async_context(site(framework, database, dsn=dsn, options={"ttl": 3600}))
        assert (await app.send("GET", "/whoami", serial_of(agent))).status == 200
        proxy.cut()

        async def refused() -> bool:
            return (await app.send("GET", "/whoami", serial_of(agent))).outcome == (503, "verify_unavailable")

        await until(refused, 2.0)
        app.ran.clear()
        for _ in range(3):
            assert await refused()
        assert app.ran == []


@every
async def test_a_silent_database_is_believed_no_longer_than_the_ttl(
    framework: str, database: Database
) -> None:
    """Nothing arrives any more, and nothing says so: neither answers nor notifications."""
    agent, other = database.agent(), database.agent()
    options = {"ttl": 1.0, "deadline": 0.3}
    async with contextlib.AsyncExitStack() as stack:
        proxy = stack.enter_context(Proxy(database.cluster.port))
        dsn = local(database, proxy.port)
        app = await stack.enter_async_context(site(framework, database, dsn=dsn, options=options))
        await app.send("GET", "/whoami", serial_of(agent))
        asked = time.monotonic()
        assert (await app.send("GET", "/whoami", serial_of(agent))).status == 200
        proxy.stall()
        agent.revoke()
        began = time.monotonic()
        assert (await app.send("GET", "/whoami", serial_of(other))).outcome == (503, "verify_unavailable")
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(max(0.0, asked + 1.05 - time.monotonic()))
        app.ran.clear()
        answers = await asyncio.gather(*(app.send("GET", "/whoami", serial_of(agent)) for _ in range(5)))
        assert {answer.outcome for answer in answers} == {(503, "verify_unavailable")}
        assert app.ran == []
        proxy.flow()

        async def told() -> bool:
            return (await app.send("GET", "/whoami", serial_of(agent))).outcome == (403, "agent_revoked")

        await until(told)


@every
async def test_agents_at_the_same_time_are_not_mixed_up(framework: str, vault: Vault) -> None:
    agents = [vault.one, vault.two] * 10
    async with site(framework, vault.database) as app:
        answers = await asyncio.gather(*(app.send("GET", "/vault", serial_of(agent)) for agent in agents))
        assert [answer.json[0] for answer in answers] == ["one-a", "two-a"] * 10


@every
async def test_a_preflight_is_a_request_like_any_other(framework: str, database: Database) -> None:
    """It carries no serial: what answers preflights stands before this."""
    headers = [("Origin", "https://app.test"), ("Access-Control-Request-Method", "GET")]
    async with site(framework, database) as app:
        answer = await app.send("OPTIONS", "/whoami", headers)
        assert answer.outcome == (401, "missing_cert_serial")
        assert app.ran == []


async def test_around_the_whole_of_litestar(database: Database) -> None:
    agent = database.agent(permitted_actions=["site:use"])
    async with site("litestar", database) as app:
        gateway = AsyncGateway(database.dsn("gateway"))
        rules = {"proof": "serial", "scopes": {"/whoami": "site:use", "/mounted/whoami": ()}}
        app.app = KakuninMiddleware(app.app, gateway, **rules)
        assert (await app.send("GET", "/whoami", serial_of(agent))).json["serial"] == agent.serial
        assert (await app.send("GET", "/mounted/whoami", serial_of(agent))).json["serial"] == agent.serial
        app.ran.clear()
        for method, path in (("GET", "//whoami"), ("OPTIONS", "/nowhere"), ("GET", "/mounted/x")):
            assert (await app.send(method, path, serial_of(agent))).status in (400, 403)
        assert (await app.send("GET", "/nowhere")).outcome == (401, "missing_cert_serial")
        assert app.ran == []
        await gateway.close()


async def test_with_cors_before_it_preflights_are_answered_and_refusals_can_be_read(
    database: Database,
) -> None:
    from starlette.middleware.cors import CORSMiddleware

    async with site("starlette", database) as app:
        app.app = CORSMiddleware(app.app, allow_origins=["https://app.test"], allow_headers=[SERIAL])
        origin = ("Origin", "https://app.test")
        preflight = [
            origin, ("Access-Control-Request-Method", "GET"),
            ("Access-Control-Request-Headers", SERIAL.lower()),
        ]  # fmt: skip
        answer = await app.send("OPTIONS", "/whoami", preflight)
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        answer = await app.send("GET", "/whoami", [origin])
        assert answer.outcome == (401, "missing_cert_serial")
        assert answer.headers["access-control-allow-origin"] == "https://app.test"
        assert app.ran == []


@every
async def test_nothing_of_the_senders_is_taken_for_the_agent(framework: str, database: Database) -> None:
    agent = database.agent()
    headers = [("kakunin.agent", "x"), ("Kakunin-Agent", "x"), ("X-Kakunin-Agent", agent.serial)]
    async with site(framework, database, public=["/healthz"]) as app:
        assert (await app.send("GET", "/whoami", headers)).outcome == (401, "missing_cert_serial")
        assert (await app.send("GET", "/healthz", headers)).json == {"serial": None}


# Websockets ------------------------------------------------------------------------------------------


class Socket:
    """A websocket's client, as a server shows it to an application."""

    def __init__(self, app: Site, path: str, headers: Any, **scope: Any) -> None:
        self._in: asyncio.Queue[Any] = asyncio.Queue()
        self.out: asyncio.Queue[Any] = asyncio.Queue()
        self._in.put_nowait({"type": "websocket.connect"})
        scope = {
            "type": "websocket", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "ws",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": raw(headers), "client": ("127.0.0.1", 1), "server": ("gateway.test", 80),
            "subprotocols": [], "state": {}, **scope,
        }  # fmt: skip
        self.task = asyncio.create_task(app.app(scope, self._in.get, self.out.put))

    def say(self, text: str) -> None:
        self._in.put_nowait({"type": "websocket.receive", "text": text})

    async def hear(self) -> Any:
        return await asyncio.wait_for(self.out.get(), 5)

    async def end(self) -> None:
        self._in.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await asyncio.wait_for(self.task, 5)


@pytest.mark.parametrize("framework", SOCKETS)
async def test_a_websocket_of_nobody_is_never_accepted(framework: str, database: Database) -> None:
    revoked = database.agent()
    revoked.revoke()
    async with site(framework, database, scopes={"/talk": "talk:use"}) as app:
        for headers, error, status in (
            ([], "missing_cert_serial", 401),
            ([(SERIAL, "x")], "malformed_cert_serial", 400),
            (serial_of(revoked), "agent_revoked", 403),
            (serial_of(database.agent()), "scope_violation", 403),
        ):
            client = Socket(app, "/talk", headers)
            assert await client.hear() == {"type": "websocket.close", "code": 1008, "reason": error}
            await client.end()
            client = Socket(app, "/talk", headers, extensions={"websocket.http.response": {}})
            start, body = await client.hear(), await client.hear()
            assert (start["type"], start["status"]) == ("websocket.http.response.start", status)
            assert error.encode() in body["body"]
            await client.end()
        assert app.ran == []
    async with site(framework, database, dsn=local(database, 1)) as app:
        client = Socket(app, "/talk", serial_of(revoked))
        assert (await client.hear())["reason"] == "verify_unavailable"
        await client.end()
        assert app.ran == []


@pytest.mark.parametrize("framework", SOCKETS)
async def test_a_revocation_closes_a_websocket_before_its_next_message(
    framework: str, database: Database
) -> None:
    agent = database.agent(permitted_actions=["talk:use"])
    async with site(framework, database, scopes={"/talk": "talk:use", "/whoami": ()}) as app:
        client = Socket(app, "/talk", serial_of(agent))
        assert (await client.hear())["type"] == "websocket.accept"
        client.say("hello")
        assert (await client.hear())["text"] == f"{agent.serial} hello"
        agent.revoke()

        async def refused() -> bool:
            return (await app.send("GET", "/whoami", serial_of(agent))).status == 403

        await until(refused)
        client.say("still here")
        assert await client.hear() == {"type": "websocket.close", "code": 1008, "reason": "agent_revoked"}
        await asyncio.wait_for(client.task, 5)
        assert client.out.empty()
        assert [ran for ran in app.ran if ran != "whoami"] == ["accept", "hello"]


async def test_nothing_is_pushed_to_an_agent_that_was_revoked(database: Database) -> None:
    agent = database.agent()
    go = asyncio.Event()

    async def pushes(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await go.wait()
        await send({"type": "websocket.send", "text": "secret"})

    gateway = AsyncGateway(database.dsn("gateway"))
    app = Site("starlette", "", lambda _: None, app=KakuninMiddleware(pushes, gateway, proof="serial"))
    client = Socket(app, "/", serial_of(agent))
    assert (await client.hear())["type"] == "websocket.accept"
    agent.revoke()

    async def refused() -> bool:
        try:
            await gateway.check(agent.serial)
        except Refused:
            return True
        return False

    await until(refused)
    go.set()
    assert (await client.hear())["type"] == "websocket.close"
    with pytest.raises(OSError, match="agent_revoked"):
        await client.task
    assert client.out.empty()
    await gateway.close()


# What servers do --------------------------------------------------------------------------------------


async def test_what_cannot_be_verified_is_not_passed_on(database: Database) -> None:
    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError

    gateway = AsyncGateway(database.dsn("gateway"))
    app = KakuninMiddleware(never, gateway, proof="serial")
    with pytest.raises(RuntimeError, match="webtransport"):
        await app({"type": "webtransport", "headers": []}, never, never)
    await gateway.close()


async def test_a_lifespan_closes_the_gateway_that_the_middleware_made(database: Database) -> None:
    agent = database.agent()
    events: list[str] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        events.append(scope["type"])
        if scope["type"] == "lifespan":
            await receive()
            await receive()
            await send({"type": "lifespan.shutdown.complete"})

    app = KakuninMiddleware(inner, database.dsn("gateway"), proof="serial")
    messages: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.create_task(app({"type": "lifespan"}, messages.get, messages.put))
    messages.put_nowait({"type": "lifespan.startup"})
    served = Site("starlette", "", lambda _: None, app=app)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": raw(serial_of(agent))}
    await app(scope, messages.get, messages.put)
    messages.put_nowait({"type": "lifespan.shutdown"})
    await asyncio.wait_for(task, 5)
    assert events == ["lifespan", "http"]
    assert (await served.send("GET", "/", serial_of(agent))).outcome == (503, "verify_unavailable")
    assert events == ["lifespan", "http"]


async def test_a_state_that_all_requests_share_is_not_written_to(database: Database) -> None:
    agent = database.agent()
    shared: dict[str, Any] = {"pool": object()}
    async with site("starlette", database) as app:
        answer = await app.send("GET", "/whoami", serial_of(agent), state=shared)
        assert answer.json["serial"] == agent.serial
        assert list(shared) == ["pool"]


def test_an_event_loop_for_each_request_is_served(database: Database) -> None:
    """As test clients do it."""
    agent = database.agent()

    async def whole(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["kakunin"].serial.encode()})

    app = Site("starlette", "", lambda _: None)
    gateway = AsyncGateway(database.dsn("gateway"))
    app.app = KakuninMiddleware(whole, gateway, proof="serial")
    for _ in range(3):
        assert asyncio.run(app.send("GET", "/", serial_of(agent))).content.decode() == agent.serial
        assert asyncio.run(app.send("GET", "/")).status == 401
    asyncio.run(gateway.close())


def test_the_middlewares_need_no_framework() -> None:
    code = """
import sys
for name in "starlette fastapi litestar flask werkzeug django asgiref http_message_signatures".split():
    sys.modules[name] = None
import kakunin_db.middleware.asgi, kakunin_db.middleware.wsgi
from kakunin_db.middleware.core import Rules
Rules(proof="assertion")
try:
    Rules(proof="signature", public_url="https://x.test")
except ImportError:
    print("needs http")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "needs http\n"


def test_rules_that_say_nothing_sensible_are_refused() -> None:
    for wrong in (
        {"proof": "none"}, {"proof": "signature"}, {"proof": "serial", "public_url": "https://x.test"},
        {"proof": "serial", "required_scope": ""}, {"proof": "serial", "required_scope": "orders:*"},
        {"proof": "serial", "scopes": {"admin": "x"}}, {"proof": "serial", "scopes": {"//admin": "x"}},
        {"proof": "serial", "scopes": {"get /admin": "x"}}, 
        {"proof": "serial", "scopes": {"HEAD /admin": "x"}},
        {"proof": "serial", "scopes": {"/a/../b": "x"}}, {"proof": "serial", "public": "/healthz"},
        {"proof": "serial", "public": ["healthz"]},
        *({"proof": "signature", "public_url": url} for url in (
            "x.test", "ftp://x.test", "https://", "https://a@x.test", "https://x.test?y", "https://x.test:port",
            "https://x.test#y", "https://b\u00fccher.test",
        )),
        {"proof": "signature", "public_url": "https://x.test", "max_age": 3600},
        {"proof": "signature", "public_url": "https://x.test", "max_content": -1},
        {"proof": "signature", "public_url": "https://x.test", "signed_headers": "x-amount"},
    ):  # fmt: skip
        with pytest.raises(BadInputError):
            Rules(**wrong)
    with pytest.raises(TypeError):
        Rules()  # what is demanded is always said
    for wrong in ({"deadline": 0}, {"deadline": 61}, {"ttl": -1}):
        for kind in (Gateway, AsyncGateway):
            with pytest.raises(BadInputError):
                kind("dbname=x", **wrong)
    for kind in (Gateway, AsyncGateway):
        with pytest.raises(BadInputError, match="a DSN or a pool"):
            kind(object())


def test_a_scope_is_permitted_as_the_database_has_it(database: Database) -> None:
    cases = ["a:b", "a:bc", "a:", "a", "b:c", "b:", "b:*", "b", "a:b:c", "", "bb:c"]
    actions = ["a:b", "b:*"]
    agent = database.agent(permitted_actions=actions)
    with database.connect("agent_1") as connection:
        ticket = connection.execute("select kakunin.open_session(%s)", [agent.assertion()]).fetchone()
        assert ticket
        connection.execute("select kakunin.bind_session(%s)", [ticket[0]])
        for scope in cases:
            (known,) = connection.execute("select kakunin.has_scope(%s)", [scope]).fetchone() or ()
            assert (scope, permits(actions, scope)) == (scope, known)


def test_ambiguous_paths() -> None:
    for path in ("/", "/a", "/a/", "/a.b", "/..a", "/a/...", "/a b", "/\u00e9"):
        assert not is_ambiguous(path)
    for path in ("//", "/a//b", "/a//", "/.", "/a/.", "/a/..", "/../a", "/a\\b", "/a\x00", "/a\r\n", "//a"):
        assert is_ambiguous(path)


async def test_a_handler_can_ask_for_a_scope(database: Database) -> None:
    agent = database.agent(permitted_actions=["orders:*"])

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["kakunin"].require_scope(scope["query_string"].decode())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    gateway = AsyncGateway(database.dsn("gateway"))
    app = Site("starlette", "", lambda _: None, app=KakuninMiddleware(inner, gateway, proof="serial"))
    assert (await app.send("GET", "/?orders:write", serial_of(agent))).status == 200
    assert (await app.send("GET", "/?vault:read", serial_of(agent))).outcome == (403, "scope_violation")
    await gateway.close()
