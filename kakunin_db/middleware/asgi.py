"""ASGI: Starlette, FastAPI, Litestar."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .core import Refused, Request, Rules, VerifiedAgent, refusal
from .gateway import AsyncGateway

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

_POLICY_VIOLATION = 1008  # RFC 6455 section 7.4.1


class KakuninMiddleware:
    """Admits requests of agents whose certificate may be used now, and answers all others itself.

    The agent is ``scope["state"]["kakunin"]``, which is ``request.state.kakunin``, as a
    :class:`VerifiedAgent`; on a public path it is None. A websocket's certificate is looked at again before
    each message in either direction.

    :param gateway: an :class:`AsyncGateway`, or the DSN or pool to make one of, which is closed when the
        application's lifespan ends.
    :param rules: see :class:`.core.Rules`.
    """

    def __init__(self, app: App, gateway: Any, **rules: Any) -> None:
        self.app = app
        self._rules = Rules(**rules)
        self._owned = not isinstance(gateway, AsyncGateway)
        self.gateway: AsyncGateway = AsyncGateway(gateway) if self._owned else gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
        elif kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        else:  # nobody knows how such a thing is refused
            raise RuntimeError(f"kakunin: {kind!r} cannot be verified, so it is not passed on")

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            # Before the server hears of it: then it ends the event loop, and with it whatever is under way.
            if self._owned and message["type"].startswith("lifespan.shutdown."):
                await self.gateway.close()
            await send(message)

        await self.app(scope, receive, closing)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = _Content(receive)
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            agent = await self.gateway.admit(
                self._rules, _request(scope, scope["method"]), content.read, _outer(scope)
            )
            try:
                await self.app(_with(scope, agent), content.receive, watched)
            except Exception as error:
                refused = refusal(error)
                if refused is None or started:
                    raise
                raise refused from error
        except Refused as refused:
            await _answer(refused, send, "http.response")

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # The handshake is a GET.
            agent = await self.gateway.admit(self._rules, _request(scope, "GET"), _nothing, _outer(scope))
        except Refused as refused:
            await receive()  # websocket.connect
            if "websocket.http.response" in (scope.get("extensions") or {}):
                await _answer(refused, send, "websocket.http.response")
            else:
                await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refused.error})
            return
        if agent is None:
            await self.app(_with(scope, None), receive, send)
            return
        guard = _Guard(self.gateway, agent, receive, send)
        await self.app(_with(scope, agent), guard.receive, guard.send)


class _Guard:
    """A websocket outlives a revocation, so each of its messages asks again."""

    def __init__(self, gateway: AsyncGateway, agent: VerifiedAgent, receive: Receive, send: Send) -> None:
        self._gateway = gateway
        self._serial = agent.serial
        self._receive = receive
        self._send = send
        self._refused: Refused | None = None

    async def _check(self) -> None:
        if self._refused is None:
            try:
                await self._gateway.check(self._serial)
            except Refused as refused:
                self._refused = refused
                close = {"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refused.error}
                await self._send(close)

    async def receive(self) -> Message:
        if self._refused is None:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                return message
            await self._check()
            if self._refused is None:
                return message
        return {"type": "websocket.disconnect", "code": _POLICY_VIOLATION, "reason": self._refused.error}

    async def send(self, message: Message) -> None:
        if message["type"] != "websocket.close":
            await self._check()
        if self._refused is None:
            await self._send(message)
        elif message["type"] != "websocket.close":
            # As servers do once the client is gone.
            raise OSError(f"the websocket was closed: {self._refused.error}")


class _Content:
    """What was read to be verified, and then the rest, for the application."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: bytes | None = None

    async def read(self, limit: int) -> bytes | None:
        parts = []
        size = 0
        more = True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":
                raise Refused(400, "malformed_request", "The content is incomplete.")
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
            more = message.get("more_body", False)
        self._read = b"".join(parts)
        return self._read

    async def receive(self) -> Message:
        if self._read is None:
            return await self._receive()
        body, self._read = self._read, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _nothing(limit: int) -> bytes:
    return b""


def _request(scope: Scope, method: str) -> Request:
    raw_path = scope.get("raw_path")
    return Request(
        method,
        _path(scope),
        None if raw_path is None else raw_path.decode("latin-1"),
        scope.get("query_string", b"").decode("latin-1"),
        [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]],
    )


def _path(scope: Scope) -> str:
    """With what the application is mounted on, which is part of it as ASGI has it, and not for every
    server."""
    path: str = scope["path"]
    root: str = scope.get("root_path") or ""
    return (
        path
        if not root or path == root or path.startswith(root.rstrip("/") + "/")
        else root.rstrip("/") + path
    )


def _outer(scope: Scope) -> Any:
    return (scope.get("state") or {}).get("kakunin")


def _with(scope: Scope, agent: VerifiedAgent | None) -> Scope:
    """A state of its own: what a lifespan put there is every request's, where a server does not copy it."""
    return {**scope, "state": {**(scope.get("state") or {}), "kakunin": agent}}


async def _answer(refused: Refused, send: Send, kind: str) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in refused.headers]
    await send({"type": f"{kind}.start", "status": refused.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": refused.content})
