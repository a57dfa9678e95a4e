"""The middleware behind real servers: what arrives there is what was sent, however it was sent."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import websockets.exceptions
from cluster import Cluster, free_port
from conftest import Agent, Database, fresh_database
from gateways import SERIAL
from werkzeug.serving import WSGIRequestHandler, make_server

from kakunin_db.middleware.asgi import KakuninMiddleware as ASGIMiddleware
from kakunin_db.middleware.signature import sign_request
from kakunin_db.middleware.wsgi import AGENT, read_content
from kakunin_db.middleware.wsgi import KakuninMiddleware as WSGIMiddleware
from kakunin_db.resources import install_sql, sql_dir

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:websockets", "ignore::DeprecationWarning:uvicorn"
)


async def lifespan(receive: Any, send: Any) -> None:
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})


class Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Server:
    def __init__(self, port: int, ran: list[str]) -> None:
        self.port, self.ran = port, ran

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(self, text: bytes) -> tuple[int, bytes]:
        """The bytes of a request, and the answer's status and the rest; 0 where there is none."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=3) as client:
            client.sendall(text)
            answer = b""
            with contextlib.suppress(
                ConnectionError, TimeoutError
            ):  # werkzeug waits for what it did not read
                while part := client.recv(65536):
                    answer += part
        return (int(answer.split()[1]) if answer.startswith(b"HTTP/") else 0), answer

    def request(
        self, method: str, target: str, headers: dict[str, str] | list[tuple[str, str]], content: bytes = b""
    ) -> tuple[int, bytes]:
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", "Connection: close"]
        fields = list(headers.items()) if isinstance(headers, dict) else headers
        lines += [f"{name}: {value}" for name, value in fields]
        if content:
            lines.append(f"Content-Length: {len(content)}")
        return self.send("\r\n".join([*lines, "", ""]).encode() + content)


@contextlib.contextmanager
def uvicorn_server(app: Any, ran: list[str]) -> Iterator[Server]:
    config = uvicorn.Config(app, port=0, log_level="critical", ws="websockets-sansio", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Server(server.servers[0].sockets[0].getsockname()[1], ran)
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(params=["uvicorn", "werkzeug"])
def serve(request: pytest.FixtureRequest, database: Database) -> Any:
    @contextlib.contextmanager
    def serving(**rules: Any) -> Iterator[Server]:
        ran: list[str] = []

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await lifespan(receive, send)
                return
            content, more = b"", True
            while more:
                message = await receive()
                content += message.get("body", b"")
                more = message.get("more_body", False)
            ran.append(scope["state"]["kakunin"].serial)
            body = content or scope["path"].encode()
            headers = [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

        def wsgi(environ: Any, start_response: Any) -> Any:
            ran.append(environ[AGENT].serial)
            body = read_content(environ, 1 << 20) or environ["PATH_INFO"].encode("latin-1")
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]

        with contextlib.ExitStack() as stack:
            if request.param == "uvicorn":
                app: Any = ASGIMiddleware(asgi, database.dsn("gateway"), **rules)
                yield stack.enter_context(uvicorn_server(app, ran))
            else:
                made = WSGIMiddleware(wsgi, database.dsn("gateway"), **rules)
                stack.callback(made.gateway.close)
                server = make_server("127.0.0.1", 0, made, threaded=True, request_handler=Quiet)
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                stack.callback(server.server_close)
                stack.callback(thread.join)
                stack.callback(server.shutdown)
                yield Server(server.server_port, ran)

    return serving


def test_no_way_of_writing_a_request_gets_around_it(serve: Any, database: Database) -> None:
    agent, other = database.agent(permitted_actions=["a:b"]), database.agent()
    gone = database.agent()
    gone.revoke()
    with serve(proof="serial", scopes={"/open": (), "/closed": "admin:x"}) as server:
        assert server.request("GET", "/open", {SERIAL: agent.serial})[0] == 200
        assert server.request("GET", "/open", {SERIAL.lower(): f"  {agent.serial}\t"})[0] == 200
        server.ran.clear()
        for headers in (
            [], [(SERIAL, "")], [(SERIAL, agent.serial), (SERIAL, other.serial)],
            [(SERIAL, agent.serial), (SERIAL.upper(), gone.serial)],
            [(SERIAL, f"{agent.serial},{agent.serial}")],
            [(SERIAL, gone.serial)], [(SERIAL, "\u00e9")], [(f"{SERIAL} ", agent.serial)],
            [(SERIAL, f"{agent.serial}\x00")], [(SERIAL, f"\x0b{agent.serial}")],
            [("X-Kakunin\x00-Cert-Serial", agent.serial)],
        ):  # fmt: skip
            status, answer = server.request("GET", "/open", headers)
            assert (headers, status in (0, 400, 401, 403)) == (headers, True), answer
        for target in (
            "/closed", "//closed", "/./closed", "/open/../closed", "/%63losed", "/open/%2e%2e/closed",
            "/closed/", "/closed#/open", "/closed?/open", "/Closed", "/open/..%5cclosed",
            "http://gateway.test/closed",
            "//closed/open", "/;/closed", "/closed;open", "/closed%00",
            "*", "closed",
        ):  # fmt: skip
            status, answer = server.request("GET", target, {SERIAL: agent.serial})
            assert (target, status in (0, 400, 403, 404)) == (target, True), answer
        # A field of the one that follows, or a second request in what the first claims as its content.
        inside = f"GET /closed HTTP/1.1\r\nHost: x\r\n{SERIAL}: {agent.serial}\r\nConnection: close\r\n\r\n"
        head = f"POST /open HTTP/1.1\r\nHost: x\r\n{SERIAL}: {agent.serial}\r\n"
        server.send(f"{head}Content-Length: {len(inside)}\r\nConnection: close\r\n\r\n{inside}".encode())
        assert server.ran == [agent.serial]
        server.ran.clear()
        named = f"{SERIAL}: {agent.serial}\r\nConnection: close\r\n\r\n"
        for smuggled in (
            f"{head}Content-Length: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n12345",
            f"GET /open HTTP/1.1\r\nHost: x\r\nX-A: b\r\n {named}",
            f"GET /open HTTP/1.1\r\nHost: x\r\nX-A: b{named}",
        ):
            server.send(smuggled.encode())
        assert server.ran in (
            [],
            [agent.serial],
        )  # by the one with two lengths, where the server takes it


def test_signed_content_arrives_whole_and_in_pieces(serve: Any, database: Database) -> None:
    agent = database.agent()
    url = "https://api.test"
    content = b"0123456789" * 5000

    def signed(method: str, target: str, content: bytes = b"", media: str | None = None) -> dict[str, str]:
        headers = {} if media is None else {"Content-Type": media}
        return headers | sign_request(agent.credential, method, url + target, headers, content)

    with serve(proof="signature", public_url=url, max_content=len(content)) as server:
        headers = signed("GET", "/a%20b/c?d=%2F")
        status, answer = server.request("GET", "/a%20b/c?d=%2F", headers)
        assert (status, answer.rpartition(b"\r\n\r\n")[2]) == (200, b"/a b/c")
        assert server.request("GET", "/a%20b/c?d=%2F", headers)[0] == 401
        status, answer = server.request("POST", "/x", signed("POST", "/x", content, "text/plain"), content)
        assert (status, answer.endswith(content)) == (200, True)
        fields = signed("POST", "/x", content, "text/plain")
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (content[:7], content[7:])) + b"0\r\n\r\n"
        lines = [f"{name}: {value}" for name, value in fields.items()]
        head = [
            "POST /x HTTP/1.1",
            "Host: x",
            "Connection: close",
            "Transfer-Encoding: chunked",
            *lines,
            "",
            "",
        ]
        status, answer = server.send("\r\n".join(head).encode() + chunks)
        assert (status, answer.endswith(content)) == (200, True)
        server.ran.clear()
        fields = signed("POST", "/x", content, "text/plain")
        assert server.request("POST", "/x", fields, content[:-1] + b"x")[0] == 401
        over = content + b"x"
        assert server.request("POST", "/x", signed("POST", "/x", over, "text/plain"), over)[0] in (0, 413)
        assert server.request("GET", "/A", signed("GET", "/a"))[0] == 401
        assert server.ran == []


def test_a_websocket_over_the_wire(database: Database) -> None:
    from websockets.sync.client import connect

    agent = database.agent()
    ran: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            ran.append(message["text"])
            await send({"type": "websocket.send", "text": message["text"]})

    served = ASGIMiddleware(app, database.dsn("gateway"), proof="serial")
    with uvicorn_server(served, ran) as server:
        url = f"ws://127.0.0.1:{server.port}/"
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            connect(url)
        assert refused.value.response.status_code == 401
        assert b"missing_cert_serial" in (refused.value.response.body or b"")
        with connect(url, additional_headers={SERIAL: agent.serial}) as client:
            client.send("a")
            assert client.recv(5) == "a"
            revoke(agent, server)
            client.send("b")
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                client.recv(5)
            assert (closed.value.rcvd and closed.value.rcvd.code) == 1008
        assert ran == ["a"]


def revoke(agent: Agent, server: Server) -> None:
    """And waits until it is known."""
    agent.revoke()
    time.sleep(0.5)


def test_the_example_serves_an_agent_until_it_is_revoked(cluster: Cluster, tmp_path: Path) -> None:
    environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "correct horse"}

    def run(script: str, *arguments: str) -> str:
        command = [sys.executable, EXAMPLES / script, *arguments]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    with fresh_database(cluster, "template1") as database:
        with database.connect("installer") as installer:
            installer.execute(install_sql())
        database.run("app", (sql_dir() / "policies" / "agent_vault.sql").read_text())
        database.run("app", "grant select, insert on agent_vault to kakunin_gateway")
        printed = run("register_agent.py", database.dsn("installer"), "atlas", "vault:read", "vault:write")
        serial = dict(line.split(maxsplit=1) for line in printed.splitlines())["serial"]
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "uvicorn", "--app-dir", EXAMPLES / "gateway", "server:app"]
        server = subprocess.Popen(
            [*command, "--port", str(port), "--log-level", "warning"],
            env={**environment, "GATEWAY_DSN": database.dsn("gateway"), "PUBLIC_URL": url},
        )
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthz") as answer:
                    assert answer.read() == b'"ok"'
                    break
                time.sleep(0.1)
            assert run("gateway/agent.py", url, "atlas.pem").splitlines() == [
                '200 "written"', '200 ["by way of the gateway"]',
            ]  # fmt: skip
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(urllib.request.Request(f"{url}/vault", headers={SERIAL: serial}))
            assert (refused.value.code, b"missing_signature" in refused.value.read()) == (401, True)
            refused.value.close()
            database.run("operator", "select kakunin.revoke_certificate(%s)", [serial])
            time.sleep(0.5)
            said = run("gateway/agent.py", url, "atlas.pem")
            assert said.count("403") == said.count("agent_revoked") == 2
        finally:
            server.terminate()
            server.wait(10)
