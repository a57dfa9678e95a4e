"""The same small application in every framework, behind the middleware, and a client that can misbehave.

Its paths: GET /whoami, POST /echo (the SHA-256 of the content), GET /vault (the agent's rows, by the one line
that binds), GET /halted (revokes the caller's own certificate and then reads rows), GET /healthz (public
where a test says so), GET /admin and whatever is below. ``ran`` counts what got through.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import socket
import threading
import types
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from conftest import Agent, Database

from kakunin_db import KakuninError, bind_agent_session
from kakunin_db.middleware import AsyncGateway, Gateway, refusal
from kakunin_db.middleware.asgi import KakuninMiddleware as ASGIMiddleware
from kakunin_db.middleware.wsgi import AGENT
from kakunin_db.middleware.wsgi import KakuninMiddleware as WSGIMiddleware

ASGI = ["starlette", "fastapi", "litestar", "django-async"]
WSGI = ["flask", "django"]
FRAMEWORKS = ASGI + WSGI
SOCKETS = ["starlette", "fastapi", "litestar"]

ROWS = "select content from vault order by content"
SERIAL = "X-Kakunin-Cert-Serial"
PATHS = ["/whoami", "/healthz", "/admin", "/admin/{rest:path}"]


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def outcome(self) -> Any:
        """200, or the status and the error's name."""
        return self.status if self.status == 200 else (self.status, self.json.get("error"))

    def refused(self, status: int, error: str) -> bool:
        """Whether it is this. Litestar looks for a handler first, and refuses where it finds none."""
        return self.outcome in ((status, error), (404, None), (405, None))


@dataclass
class Site:
    """An application, what it is reached by, and what its handlers do."""

    framework: str
    dsn: str
    revoke: Callable[[str], None]
    ran: list[str] = field(default_factory=list)
    app: Any = None

    @property
    def asgi(self) -> bool:
        return self.framework in ASGI

    def seen(self, agent: Any) -> dict[str, Any]:
        self.ran.append("whoami")
        if agent is None:
            return {"serial": None}
        return {
            "serial": agent.serial,
            "agent": str(agent.agent_id),
            "proof": agent.proof,
            "reads": agent.has_scope("vault:read"),
        }

    def echo(self, content: bytes) -> dict[str, Any]:
        self.ran.append("echo")
        return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}

    def rows(self, agent: Any) -> list[str]:
        self.ran.append("vault")
        with psycopg.connect(self.dsn) as connection, bind_agent_session(connection, agent):
            return [content for (content,) in connection.execute(ROWS)]

    async def rows_async(self, agent: Any) -> list[str]:
        self.ran.append("vault")
        async with (
            await psycopg.AsyncConnection.connect(self.dsn) as connection,
            bind_agent_session(connection, agent),
        ):
            return [content async for (content,) in await connection.execute(ROWS)]

    async def send(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]] = (),
        content: bytes | Sequence[bytes] = b"",
        **environment: Any,
    ) -> Response:
        """As a server would hand it on; ``environment`` goes over what this makes of it."""
        chunks = [content] if isinstance(content, bytes) else list(content)
        if self.asgi:
            return await self._send_asgi(method, target, headers, chunks, environment)
        return await asyncio.to_thread(self._send_wsgi, method, target, headers, chunks, environment)

    async def _send_asgi(
        self, method: str, target: str, headers: Any, chunks: list[bytes], environment: dict[str, Any]
    ) -> Response:
        path, _, query = target.partition("?")
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
            "scheme": "http", "path": urllib.parse.unquote(path), "raw_path": path.encode(),
            "query_string": query.encode(), "root_path": "", "headers": raw(headers),
            "client": ("127.0.0.1", 1), "server": ("gateway.test", 80), "state": {}, **environment,
        }  # fmt: skip
        messages: list[Any] = []
        waiting = list(chunks)
        ended = asyncio.Event()

        async def receive() -> Any:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                ended.set()

        await self.app(scope, receive, send)
        start = messages[0]
        return Response(
            start["status"],
            {name.decode().lower(): value.decode() for name, value in start["headers"]},
            b"".join(message.get("body", b"") for message in messages[1:]),
        )

    def _send_wsgi(
        self, method: str, target: str, headers: Any, chunks: list[bytes], environment: dict[str, Any]
    ) -> Response:
        path, _, query = target.partition("?")
        content = b"".join(chunks)
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "QUERY_STRING": query, "RAW_URI": target,
            "PATH_INFO": urllib.parse.unquote_to_bytes(path).decode("latin-1"),
            "SERVER_NAME": "gateway.test", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1",
            "wsgi.version": (1, 0), "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(content),
            "wsgi.errors": io.StringIO(), "wsgi.multithread": True, "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }  # fmt: skip
        if content:
            environ["CONTENT_LENGTH"] = str(len(content))
        for name, value in headers:
            key = name.upper().replace("-", "_")
            key = key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"
            sent = value.encode("utf-8").decode("latin-1")
            environ[key] = f"{environ[key]},{sent}" if key in environ and key.startswith("HTTP_") else sent
        environ |= environment
        started: list[Any] = []

        def start_response(status: str, fields: Any, error: Any = None) -> Any:
            started[:] = [int(status.split(maxsplit=1)[0]), {name.lower(): value for name, value in fields}]

        body = self.app(environ, start_response)
        try:
            content = b"".join(body)  # only now may it have started
            return Response(*started, content)
        finally:
            if hasattr(body, "close"):
                body.close()


def raw(headers: Sequence[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("utf-8")) for name, value in headers]


def serial_of(agent: Agent) -> list[tuple[str, str]]:
    return [(SERIAL, agent.serial)]


@contextlib.asynccontextmanager
async def site(
    framework: str,
    database: Database,
    *,
    user: str = "gateway",
    dsn: str | None = None,
    options: dict[str, Any] | None = None,
    **rules: Any,
) -> AsyncIterator[Site]:
    """The application behind a gateway of its own, which connects with ``dsn`` and has ``options``."""

    def revoke(serial: str) -> None:
        database.run("operator", "select kakunin.revoke_certificate(%s)", [serial])

    made = Site(framework, database.dsn(user), revoke)
    rules.setdefault("proof", "serial")
    kind = AsyncGateway if made.asgi else Gateway
    gateway: Any = kind(dsn or database.dsn(user), **(options or {}))
    with BUILD[framework](made, gateway, rules):
        try:
            yield made
        finally:
            await gateway.close() if made.asgi else gateway.close()


@contextlib.contextmanager
def starlette(site: Site, gateway: Any, rules: Any) -> Iterator[None]:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse
    from starlette.routing import Mount, Route, WebSocketRoute

    async def whoami(request: Any) -> Any:
        return JSONResponse(site.seen(request.state.kakunin))

    async def echo(request: Any) -> Any:
        return JSONResponse(site.echo(await request.body()))

    async def vault(request: Any) -> Any:
        return JSONResponse(await site.rows_async(request.state.kakunin))

    async def halted(request: Any) -> Any:
        await asyncio.to_thread(site.revoke, request.state.kakunin.serial)
        return JSONResponse(await site.rows_async(request.state.kakunin))

    async def talk(websocket: Any) -> None:
        await websocket.accept()
        site.ran.append("accept")
        async for text in websocket.iter_text():
            site.ran.append(text)
            await websocket.send_text(f"{websocket.state.kakunin.serial} {text}")

    routes = [
        Route("/whoami", whoami, methods=["GET", "PUT"]), Route("/echo", echo, methods=["POST"]),
        Route("/vault", vault), Route("/halted", halted), Route("/healthz", whoami),
        Route("/admin", whoami), Route("/admin/{rest:path}", whoami),
        Mount("/mounted", routes=[Route("/whoami", whoami)]), WebSocketRoute("/talk", talk),
    ]  # fmt: skip
    site.app = Starlette(routes=routes, middleware=[Middleware(ASGIMiddleware, gateway=gateway, **rules)])
    yield


@contextlib.contextmanager
def fastapi(site: Site, gateway: Any, rules: Any) -> Iterator[None]:
    from fastapi import FastAPI, Request, WebSocket, WebSocketDisconnect

    app = FastAPI()
    mounted = FastAPI()
    app.add_middleware(ASGIMiddleware, gateway=gateway, **rules)

    async def whoami(request: Request) -> Any:
        return site.seen(request.state.kakunin)

    async def echo(request: Request) -> Any:
        return site.echo(await request.body())

    def vault(request: Request) -> Any:  # in a thread
        return site.rows(request.state.kakunin)

    def halted(request: Request) -> Any:
        site.revoke(request.state.kakunin.serial)
        return site.rows(request.state.kakunin)

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        site.ran.append("accept")
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                text = await websocket.receive_text()
                site.ran.append(text)
                await websocket.send_text(f"{websocket.state.kakunin.serial} {text}")

    for handler in (whoami, echo, vault, halted, talk):
        handler.__annotations__ = {
            name: {"request": Request, "websocket": WebSocket}[name]
            for name in handler.__annotations__
            if name != "return"
        }
    for path in PATHS:
        app.api_route(path, methods=["GET", "PUT"])(whoami)
    app.post("/echo")(echo)
    app.get("/vault")(vault)
    app.get("/halted")(halted)
    app.websocket("/talk")(talk)
    mounted.get("/whoami")(whoami)
    app.mount("/mounted", mounted)
    site.app = app
    yield


@contextlib.contextmanager
def litestar(site: Site, gateway: Any, rules: Any) -> Iterator[None]:
    from litestar import Litestar, Request, Response, WebSocket, asgi, get, post, route
    from litestar import websocket as websocket_route
    from litestar.exceptions import WebSocketDisconnect
    from litestar.middleware import DefineMiddleware

    async def whoami(request: Any) -> Any:
        return site.seen(request.state.kakunin)

    async def echo(request: Any) -> Any:
        return site.echo(await request.body())

    async def vault(request: Any) -> Any:
        return await site.rows_async(request.state.kakunin)

    async def halted(request: Any) -> Any:
        await asyncio.to_thread(site.revoke, request.state.kakunin.serial)
        return await site.rows_async(request.state.kakunin)

    async def talk(socket: Any) -> None:
        await socket.accept()
        site.ran.append("accept")
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                text = await socket.receive_text()
                site.ran.append(text)
                await socket.send_text(f"{socket.state.kakunin.serial} {text}")

    async def mounted(scope: Any, receive: Any, send: Any) -> None:
        content = json.dumps(site.seen(scope["state"]["kakunin"])).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})

    def refused(request: Any, error: KakuninError) -> Any:
        answered = refusal(error)
        if answered is None:
            raise error
        return Response(answered.content, status_code=answered.status, headers=dict(answered.headers))

    for handler in (whoami, echo, vault, halted):
        handler.__annotations__ = {"request": Request, "return": Any}
    talk.__annotations__ = {"socket": WebSocket, "return": None}
    mounted.__annotations__ = {"scope": Any, "receive": Any, "send": Any, "return": None}
    handlers = [
        route(PATHS, http_method=["GET", "PUT"], status_code=200)(whoami),
        post("/echo", status_code=200)(echo), get("/vault")(vault),
        get("/halted")(halted), websocket_route("/talk")(talk),
        asgi("/mounted", is_mount=True, copy_scope=True)(mounted),
    ]  # fmt: skip
    site.app = Litestar(
        handlers,
        middleware=[DefineMiddleware(ASGIMiddleware, gateway=gateway, **rules)],
        exception_handlers={KakuninError: refused},
    )
    yield


@contextlib.contextmanager
def flask(site: Site, gateway: Any, rules: Any) -> Iterator[None]:
    from flask import Flask, jsonify, request
    from werkzeug.middleware.dispatcher import DispatcherMiddleware

    app = Flask("application")

    def whoami(**_: Any) -> Any:
        return jsonify(site.seen(request.environ[AGENT]))

    def echo() -> Any:
        return jsonify(site.echo(request.get_data()))

    def vault() -> Any:
        return jsonify(site.rows(request.environ[AGENT]))

    def halted() -> Any:
        site.revoke(request.environ[AGENT].serial)
        return jsonify(site.rows(request.environ[AGENT]))

    app.add_url_rule("/whoami", "whoami", whoami, methods=["GET", "PUT"])
    app.add_url_rule("/healthz", "healthz", whoami)
    app.add_url_rule("/admin", "admin", whoami)
    app.add_url_rule("/admin/<path:rest>", "below", whoami)
    app.add_url_rule("/echo", "echo", echo, methods=["POST"])
    app.add_url_rule("/vault", "vault", vault)
    app.add_url_rule("/halted", "halted", halted)

    @app.errorhandler(KakuninError)
    def refused(error: KakuninError) -> Any:
        answered = refusal(error)
        if answered is None:
            raise error
        return answered.content, answered.status, answered.headers

    mounted = Flask("mounted")
    mounted.add_url_rule("/whoami", "whoami", whoami)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/mounted": mounted})  # type: ignore[method-assign]
    app.wsgi_app = WSGIMiddleware(app.wsgi_app, gateway, **rules)  # type: ignore[method-assign]
    site.app = app
    yield


@contextlib.contextmanager
def django(site: Site, gateway: Any, rules: Any) -> Iterator[None]:
    from django.conf import settings

    if not settings.configured:
        settings.configure(SECRET_KEY="-", ALLOWED_HOSTS=["*"], USE_TZ=True, LOGGING_CONFIG=None)
        import django as package

        package.setup()
    from django.core.handlers.asgi import ASGIHandler
    from django.core.handlers.wsgi import WSGIHandler
    from django.http import JsonResponse
    from django.test import override_settings
    from django.urls import path

    def whoami(request: Any, rest: str = "") -> Any:
        return JsonResponse(site.seen(request.kakunin))

    def echo(request: Any) -> Any:
        return JsonResponse(site.echo(request.body))

    def vault(request: Any) -> Any:
        return JsonResponse(site.rows(request.kakunin), safe=False)

    async def vault_async(request: Any) -> Any:
        return JsonResponse(await site.rows_async(request.kakunin), safe=False)

    def halted(request: Any) -> Any:
        site.revoke(request.kakunin.serial)
        return JsonResponse(site.rows(request.kakunin), safe=False)

    urls = types.ModuleType("urls")
    urls.urlpatterns = [  # type: ignore[attr-defined]
        path("whoami", whoami), path("healthz", whoami), path("admin", whoami),
        path("admin/<path:rest>", whoami),
        path("mounted/whoami", whoami), path("echo", echo), path("halted", halted),
        path("vault", vault_async if site.asgi else vault),
    ]  # fmt: skip
    with override_settings(
        ROOT_URLCONF=urls,
        MIDDLEWARE=["kakunin_db.middleware.django.KakuninMiddleware"],
        KAKUNIN={"gateway": gateway, **rules},
    ):
        site.app = ASGIHandler() if site.asgi else WSGIHandler()
        yield


BUILD: dict[str, Any] = {
    "starlette": starlette, "fastapi": fastapi, "litestar": litestar, "django-async": django,
    "flask": flask, "django": django,
}  # fmt: skip


class Proxy:
    """A way to the server that can be cut, or stop to pass anything on without a word."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flowing = threading.Event()
        self._flowing.set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for end in (self._listener, *self._sockets):
            end.close()

    def _start(self, target: Any, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # cut
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                self._start(self._forward, client, server)
                self._start(self._forward, server, client)

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stall(self) -> None:
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        """No connection any more, and none new."""
        self._flowing.set()
        for end in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
