"""The ASGI application: who asks, whether they may, how often, and what is answered when something is wrong.

Every way out of a request is an answer of a route or a :class:`~.models.Problem`. What others' exceptions say
goes to the log at most (:func:`kakunin_db.logs.why`), and never to whoever asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Any, Final

import psycopg
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import to_jsonable_python
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route as StarletteRoute

from ..errors import (
    AgentSuspendedError,
    BadInputError,
    CertificateRevokedError,
    CertificateValidityError,
    KakuninError,
    RiskTooHighError,
    ScopeViolationError,
    SignerError,
    SpendLimitError,
    UnknownCertificateError,
    named,
)
from ..logs import why
from . import models as m
from . import operations as ops
from .backend import Backend, RoleMissingError, Settings
from .keys import ApiKey
from .limits import AtOnce, RateLimit
from .operations import Caller
from .routes import MEDIA_TYPES, ROUTES, Call, ProblemError, Route

# Seconds between two tellings of which keys were used.
_NOTE_EVERY: Final = 60.0
# Seconds that a request's content may take to come.
_CONTENT_WITHIN: Final = 10.0

# Its guards of synchronous functions run each check in an event loop of its own, with one HTTP client for
# all. A connection that is kept open would belong to a loop that is closed, and every second check fail.
_SDK: Final = "kakunin-python/"

_UUIDS: Final = re.compile(r"{((?:agent|chain|report)_id)}")

_log = logging.getLogger("kakunin_db.serve")

# Of the kit's errors, those that are about what was asked. The others are the server's own trouble.
_STATUS: Final[dict[type[KakuninError], int]] = {
    BadInputError: 400,
    RoleMissingError: 403,
    UnknownCertificateError: 422,
    CertificateRevokedError: 422,
    CertificateValidityError: 422,
    AgentSuspendedError: 422,
    ScopeViolationError: 422,
    SpendLimitError: 422,
    RiskTooHighError: 422,
}


class App:
    """What the routes share. ``asgi`` is the application; its lifespan opens the connections."""

    def __init__(self, settings: Settings) -> None:
        self.backend = Backend(settings)
        self.settings = settings
        self._of_key = RateLimit(settings.per_minute)
        self._of_address = RateLimit(settings.public_per_minute)
        self._refused = RateLimit(settings.public_per_minute)
        # Digests of keys that were good: each is asked about again, but not made to wait for others' guesses.
        self._good: set[bytes] = set()
        # One connection of each role is left to others.
        self._at_once = AtOnce(max(1, settings.connections - 1))
        self._used: set[uuid.UUID] = set()
        self._document = json.dumps(openapi()).encode()
        routes = [
            StarletteRoute(_UUIDS.sub(r"{\1:uuid}", r.path), self._endpoint(r), methods=[r.method])
            for r in ROUTES
        ]
        routes.append(StarletteRoute("/openapi.json", self._openapi, methods=["GET"]))
        self.asgi = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_problem},
        )
        self.asgi.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        await self.backend.open()
        noting = asyncio.create_task(self._note())
        try:
            yield
        finally:
            noting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await noting
            await self._tell()
            await self.backend.close()

    async def _note(self) -> None:
        while True:
            await asyncio.sleep(_NOTE_EVERY)
            await self._tell()

    async def _tell(self) -> None:
        used, self._used = self._used, set()
        if used:
            try:
                await self.backend.about_keys(ops.note_keys(sorted(used)))
            except (KakuninError, psycopg.Error) as error:  # told with the next ones
                self._used |= used
                _log.warning("last uses of API keys were not noted: %s", why(error))

    # A request ----------------------------------------------------------------------------------------

    def _endpoint(self, route: Route) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            began = time.monotonic()
            caller: list[Caller] = []
            try:
                response = await self._perform(route, request, caller)
            except Exception as error:
                response = _answer(error)
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            if request.headers.get("user-agent", "").startswith(_SDK):
                response.headers["Connection"] = "close"
            # The template of the path, ids that are UUIDs, and the key's prefix: no query and no key.
            _log.info(
                "%s %s %d",
                route.method,
                route.path,
                response.status_code,
                extra={
                    "event": "request",
                    "fields": {
                        "key": caller[0].prefix if caller else None,
                        "address": _address(request),
                        **{n: v for n, v in request.path_params.items() if isinstance(v, uuid.UUID)},
                        "ms": round((time.monotonic() - began) * 1000, 1),
                    },
                },
            )
            return response

        return endpoint

    async def _perform(self, route: Route, request: Request, seen: list[Caller]) -> Response:
        address = _network(_address(request))
        caller = None
        if route.scope is None:
            if wait := self._of_address.wait(address):
                raise _too_many(wait)
        else:
            caller = await self._authenticate(request, address)
            seen.append(caller)
            if wait := self._of_key.wait((caller.key_id, route.urgent)):
                raise _too_many(wait)
            if not caller.scopes & set(route.scope.split("|")):
                raise ProblemError(
                    403, f"this key does not have the scope {route.scope.replace('|', ' or ')}"
                )
            for role in route.roles:
                self.backend.client(role)  # or RoleMissingError, before anything is done
        asked = await self._asked(route, request)
        path = {name: str(value) for name, value in request.path_params.items()}
        if any("\0" in value or len(value) > 200 for value in path.values()):
            raise ProblemError(404, "there is nothing at this path")
        async with self._turn(route, address if caller is None else caller.key_id):
            result = await route.handler(Call(self.backend, caller, path, asked))
        if isinstance(result, Response):
            return result
        if route.path.startswith("/v1/"):
            result = result if route.page else {"data": result}
        return JSONResponse(to_jsonable_python(result), route.status, media_type=MEDIA_TYPES[route.kind])

    @contextlib.asynccontextmanager
    async def _turn(self, route: Route, who: Hashable) -> AsyncIterator[None]:
        if route.urgent:
            yield
            return
        turns = self._at_once.of(who)
        try:
            await asyncio.wait_for(turns.acquire(), self.settings.timeout)
        except asyncio.TimeoutError:
            raise _too_many(1) from None
        try:
            yield
        finally:
            turns.release()

    async def _authenticate(self, request: Request, address: str) -> Caller:
        fields = request.headers.getlist("authorization")
        scheme, _, text = (fields[0] if len(fields) == 1 else "").partition(" ")
        key = ApiKey.parse(text.strip()) if scheme.lower() == "bearer" else None
        caller = None
        if (key is None or key.digest not in self._good) and (
            wait := self._refused.wait(address, take=False)
        ):
            raise _too_many(wait)
        if key is not None:
            caller = await self.backend.about_keys(ops.authenticate(key.prefix, key.digest))
        if key is None or caller is None or caller.status != "active":
            if key is not None:
                self._good.discard(key.digest)
            self._refused.wait(address)
            raise ProblemError(
                401,
                "this API key has expired or was revoked" if caller else "send an API key that is good here",
                hint="Authorization: Bearer kak_live_...",
                headers={"WWW-Authenticate": "Bearer"},
            )
        self._good.add(key.digest)
        self._used.add(caller.key_id)
        return caller

    async def _asked(self, route: Route, request: Request) -> BaseModel | None:
        query = request.query_params
        if len(query.multi_items()) != len(query):
            raise ProblemError(400, "a parameter is there more than once")
        if route.method == "GET":
            content = await self._content(request)
            if content:
                raise ProblemError(400, "a GET has no content")
            if route.asked is None:
                if query:
                    raise ProblemError(400, "this path takes no parameters")
                return None
            return _valid(lambda model: model.model_validate(dict(query)), route.asked)
        if query:
            raise ProblemError(400, "this path takes no parameters")
        content = await self._content(request)
        if content and not _is_json(request.headers.get("content-type", "")):
            raise ProblemError(415, "the content is not application/json")
        assert route.asked is not None  # noqa: S101 - every route with content has a model
        return _valid(lambda model: model.model_validate_json(content or b"{}"), route.asked)

    async def _content(self, request: Request) -> bytes:
        too_large = ProblemError(413, f"the content has more than {self.settings.max_body} bytes")
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.settings.max_body:
            raise too_large
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ProblemError(415, "the content is encoded")
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            async for part in request.stream():
                size += len(part)
                if size > self.settings.max_body:
                    raise too_large
                parts.append(part)

        try:
            await asyncio.wait_for(read(), _CONTENT_WITHIN)
        except (asyncio.TimeoutError, ClientDisconnect):
            raise ProblemError(408, "the content did not come") from None
        return b"".join(parts)

    async def _openapi(self, _: Request) -> Response:
        return Response(self._document, media_type="application/json")


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _network(address: str) -> str:
    """Whom an address stands for: of IPv6 a whole /64 is one host's."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(address).version == 6:
            return str(ipaddress.ip_network(f"{address.partition('%')[0]}/64", strict=False))
    return address


def _is_json(content_type: str) -> bool:
    return (
        re.fullmatch(r'application/json\s*(;\s*charset="?utf-8"?\s*)?', content_type.strip(), re.I)
        is not None
    )


def _valid(validate: Callable[[type[BaseModel]], BaseModel], model: type[BaseModel]) -> BaseModel:
    try:
        return validate(model)
    except ValidationError as error:
        # What was given is not repeated: it may be anything.
        said = [
            f"{'.'.join(str(part)[:64] for part in one['loc']) or 'content'}: {one['msg']}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)[:5]
        ]
        raise ProblemError(400, "; ".join(said)[:1000]) from None


# Answers ----------------------------------------------------------------------------------------------


def _problem(error: ProblemError) -> Response:
    return JSONResponse(error.problem.model_dump(), error.status, headers=error.headers)


def _too_many(wait: int) -> ProblemError:
    return ProblemError(429, f"too many requests: try again in {wait} s", headers={"Retry-After": str(wait)})


def _unavailable(error: Exception, what: str) -> Response:
    _log.warning("503: %s", why(error), extra={"event": "unavailable", "fields": {}})
    return _problem(ProblemError(503, f"{what} at the moment: try again later", headers={"Retry-After": "1"}))


def _answer(error: Exception) -> Response:
    if isinstance(error, ProblemError):
        return _problem(error)
    ours = error if isinstance(error, KakuninError) else named(error)
    if ours is not None:
        status = next((status for cls, status in _STATUS.items() if isinstance(ours, cls)), None)
        if status is not None:
            code = ours.sqlstate or None
            return _problem(ProblemError(status, str(ours)[:1000], code=code, hint=ours.hint))
        what = "the key cannot sign" if isinstance(ours, SignerError) else "the database does not answer"
        return _unavailable(ours, what)
    if isinstance(error, psycopg.DataError):
        return _problem(ProblemError(400, "a value is not one that the database can store"))
    read_only = isinstance(error, psycopg.errors.ReadOnlySqlTransaction)
    if read_only or isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
        return _unavailable(error, f"the database {'takes no writes' if read_only else 'does not answer'}")
    frames = "".join(traceback.format_tb(error.__traceback__))
    _log.error("500: %s\n%s", type(error).__name__, frames, extra={"event": "error", "fields": {}})
    return _problem(ProblemError(500, "the server failed"))


def _http_problem(_: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these
    said = {404: "there is nothing at this path", 405: "this path does not have this method"}
    message = said.get(error.status_code, "the request is malformed")
    return _problem(ProblemError(error.status_code, message, headers=dict(error.headers or {})))


# OpenAPI ----------------------------------------------------------------------------------------------


_ALWAYS: Final = {
    400: "What was asked is malformed",
    401: "The API key is missing, unknown, expired or revoked",
    403: "The key does not have the scope, or the server may not",
    404: "There is none",
    408: "The content did not come in time",
    409: "It is in another state than this needs",
    413: "The content is too large",
    415: "The content is not application/json",
    422: "A rule forbids it",
    429: "Too many requests; Retry-After says when",
    503: "The database or a key does not answer",
}


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document, of ROUTES and their models."""
    wrapped = {id(route): _envelope(route) for route in ROUTES}
    used: dict[Any, Any] = {}
    for route in ROUTES:
        if route.method != "GET" and route.asked is not None:
            used[route.asked, "validation"] = None
        if wrapped[id(route)] is not None:
            used[wrapped[id(route)], "serialization"] = None
    used[m.Problem, "serialization"] = None
    names, definitions = models_json_schema(list(used), ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        answer = wrapped[id(route)]
        schema = names[answer, "serialization"] if answer is not None else _UNNAMED[route.kind]
        operation: dict[str, Any] = {
            "operationId": route.handler.__name__,
            "summary": route.summary,
            "security": [{"key": []}] if route.scope else [],
            "parameters": _parameters(route),
            "responses": {
                str(route.status): {
                    "description": "Done",
                    "content": {MEDIA_TYPES[route.kind]: {"schema": schema}},
                },
                **{
                    str(status): {
                        "description": _ALWAYS[status] + (route.unavailable if status == 503 else ""),
                        "content": {"application/json": {"schema": names[m.Problem, "serialization"]}},
                    }
                    for status in sorted(_statuses(route))
                },
            },
        }
        if route.scope:
            operation["x-scope"] = route.scope.split("|")
        if route.method != "GET" and route.asked is not None:
            fields = route.asked.model_fields.values()
            operation["requestBody"] = {
                "required": any(field.is_required() for field in fields),
                "content": {"application/json": {"schema": names[route.asked, "validation"]}},
            }
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "kakunin-db",
            "version": importlib.metadata.version("kakunin-db"),
            "description": "Identity, ledger and risk of AI agents.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "bearerFormat": "kak_live_..."}},
            "schemas": definitions["$defs"],
        },
    }


_UNNAMED: Final[dict[str, Any]] = {
    "pem": {"type": "string"},
    "der": {"type": "string", "format": "binary"},
    "document": {"type": "object"},
}


def _envelope(route: Route) -> Any:
    if route.answer is None or route.kind == "document":
        return None
    if not route.path.startswith("/v1/"):
        return route.answer
    return m.Page[route.answer] if route.page else m.Data[route.answer]  # type: ignore[name-defined]


def _statuses(route: Route) -> set[int]:
    found = {400, 408, 413, 415, 429, 503, *route.problems}
    return found | {401, 403} if route.scope else found


def _parameters(route: Route) -> list[dict[str, Any]]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _path_schema(name)}
        for name in re.findall(r"{(\w+)}", route.path)
    ]
    if route.method == "GET" and route.asked is not None:
        schema = route.asked.model_json_schema()
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": _without_null(one)}
            for name, one in schema["properties"].items()
        ]
    return parameters


def _path_schema(name: str) -> dict[str, Any]:
    if _UUIDS.fullmatch(f"{{{name}}}"):
        return {"type": "string", "format": "uuid"}
    return {"type": "string", "minLength": 1, "maxLength": 100}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is left out is left out; there is no null in a query."""
    kept = {name: value for name, value in schema.items() if name not in ("anyOf", "default", "title")}
    for one in schema.get("anyOf", ()):
        if one.get("type") != "null":
            kept |= one
    return kept
