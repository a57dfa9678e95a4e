"""Django, synchronous and asynchronous.

In the settings ``"kakunin_db.middleware.django.KakuninMiddleware"`` goes into ``MIDDLEWARE``, and what it is
to do into ``KAKUNIN``, as in ``{"gateway": "host=db dbname=app user=gateway", "proof": "serial"}``.
"""

from __future__ import annotations

from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, RequestDataTooBig
from django.http import HttpRequest, HttpResponse
from django.http.request import UnreadablePostError

from ..errors import KakuninError
from .core import Refused, Request, Rules, refusal
from .gateway import AsyncGateway, Gateway
from .wsgi import request_of


class KakuninMiddleware:
    """Admits requests of agents whose certificate may be used now, and answers all others itself.

    The agent is ``request.kakunin``, as a :class:`VerifiedAgent`; on a public path it is None. It should
    stand above whatever acts on a request, and below what answers CORS preflights.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Any) -> None:
        self._get_response = get_response
        options = dict(getattr(settings, "KAKUNIN", None) or {})
        if "gateway" not in options:
            raise ImproperlyConfigured("KAKUNIN in the settings has no 'gateway': a DSN, a pool or a Gateway")
        gateway = options.pop("gateway")
        try:
            self._rules = Rules(**options)
            self._async = iscoroutinefunction(get_response)
            kind = AsyncGateway if self._async else Gateway
            self.gateway: Any = gateway if isinstance(gateway, (Gateway, AsyncGateway)) else kind(gateway)
        except (TypeError, KakuninError) as error:
            raise ImproperlyConfigured(f"KAKUNIN in the settings: {error}") from error
        if not isinstance(self.gateway, kind):
            raise ImproperlyConfigured(f"KAKUNIN in the settings: this server needs an {kind.__name__}")
        if self._async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        if self._async:
            return self._acall(request)
        try:
            agent = self.gateway.admit(
                self._rules, _request(request), lambda limit: _content(request, limit), _outer(request)
            )
        except Refused as refused:
            return _response(refused)
        request.kakunin = agent
        return self._get_response(request)

    async def _acall(self, request: HttpRequest) -> Any:
        async def content(limit: int) -> bytes | None:
            return _content(request, limit)  # in memory or in a file by now

        try:
            agent = await self.gateway.admit(self._rules, _request(request), content, _outer(request))
        except Refused as refused:
            return _response(refused)
        request.kakunin = agent
        return await self._get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        """What the database says of the agent in a view is answered as if it had been known before."""
        refused = refusal(error)
        return None if refused is None else _response(refused)


def _outer(request: HttpRequest) -> Any:
    return getattr(request, "kakunin", None)


def _request(request: HttpRequest) -> Request:
    if (scope := getattr(request, "scope", None)) is not None:  # ASGIRequest.META merges fields
        raw_path = scope.get("raw_path")
        return Request(
            scope["method"],
            request.path,
            None if raw_path is None else raw_path.decode("latin-1"),
            scope.get("query_string", b"").decode("latin-1"),
            [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]],
        )
    return request_of(request.META)


def _content(request: HttpRequest, limit: int) -> bytes | None:
    """Django keeps what was read for the view. ``DATA_UPLOAD_MAX_MEMORY_SIZE`` is a limit too."""
    try:
        body: bytes = request.body
    except RequestDataTooBig:
        return None
    except UnreadablePostError as error:
        raise Refused(400, "malformed_request", "The content is incomplete.") from error
    return None if len(body) > limit else body


def _response(refused: Refused) -> HttpResponse:
    return HttpResponse(refused.content, status=refused.status, headers=dict(refused.headers))
