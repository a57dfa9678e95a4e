"""WSGI: Flask and whatever else speaks it (PEP 3333)."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from .core import Refused, Request, Rules, refusal
from .gateway import Gateway

Environ = MutableMapping[str, Any]
StartResponse = Callable[..., Any]
App = Callable[[Any, Any], Iterable[bytes]]

AGENT: Final = "kakunin.agent"

_BODY = {"CONTENT_TYPE": "content-type", "CONTENT_LENGTH": "content-length"}


class KakuninMiddleware:
    """Admits requests of agents whose certificate may be used now, and answers all others itself.

    The agent is ``environ["kakunin.agent"]``, as a :class:`VerifiedAgent`; on a public path it is None.

    :param gateway: a :class:`Gateway`, or the DSN or pool to make one of.
    :param rules: see :class:`.core.Rules`.
    """

    def __init__(self, app: App, gateway: Any, **rules: Any) -> None:
        self.app = app
        self._rules = Rules(**rules)
        self.gateway = gateway if isinstance(gateway, Gateway) else Gateway(gateway)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        outer = environ.pop(AGENT, None)
        started = False

        def watched(*args: Any) -> Any:
            nonlocal started
            started = True
            return start_response(*args)

        try:
            agent = self.gateway.admit(
                self._rules, request_of(environ), lambda limit: read_content(environ, limit), outer
            )
            environ[AGENT] = agent
            return self.app(environ, watched)
        except Exception as error:
            refused = refusal(error)
            if refused is None or started:
                raise
            return answer(refused, start_response)


def answer(refused: Refused, start_response: StartResponse) -> Iterable[bytes]:
    """A WSGI response; ``app.register_error_handler`` of Flask takes what a view raises to
    :func:`refusal`."""
    phrase = HTTPStatus(refused.status).phrase
    start_response(f"{refused.status} {phrase}", refused.headers)
    return [refused.content]


def request_of(environ: Environ) -> Request:
    mount, routed = environ.get("SCRIPT_NAME") or "", environ.get("PATH_INFO") or ""
    # gunicorn takes it from a field of that name, which may be a proxy's and may be the sender's.
    named = bool(mount) and "HTTP_SCRIPT_NAME" in environ
    return Request(
        environ["REQUEST_METHOD"],
        _decoded(mount + routed),
        _raw_path(environ),
        environ.get("QUERY_STRING") or "",
        [*_headers(environ)],
        _decoded(routed) if named else None,
    )


def _decoded(path: str) -> str:
    return path.encode("latin-1").decode("utf-8", "surrogateescape")


def _raw_path(environ: Environ) -> str | None:
    """The path as it was sent, where the server says: most do, under one of two names."""
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI")
    return target.partition("?")[0] if isinstance(target, str) and target.startswith("/") else None


def _headers(environ: Environ) -> Iterable[tuple[str, str]]:
    """Several fields of a name are one here already, with commas between them (PEP 3333)."""
    for name, value in environ.items():
        if name.startswith("HTTP_"):
            yield name[5:].replace("_", "-").lower(), value
        elif name in _BODY and value:
            yield _BODY[name], value


def read_content(environ: Environ, limit: int) -> bytes | None:
    """The content, which the application finds unread; None where it is longer."""
    length = environ.get("CONTENT_LENGTH") or ""
    if length:
        size = int(length)  # verified to be one
        if size > limit:
            return None
        content = _read(environ["wsgi.input"], size)
        if len(content) < size:
            raise Refused(400, "malformed_request", "The content is incomplete.")
    elif environ.get("wsgi.input_terminated"):
        content = _read(environ["wsgi.input"], limit + 1)
        if len(content) > limit:
            return None
    elif environ.get("HTTP_TRANSFER_ENCODING"):
        raise Refused(411, "length_required", "Send the content with Content-Length.")
    else:
        content = b""
    environ["wsgi.input"] = io.BytesIO(content)
    environ["CONTENT_LENGTH"] = str(len(content))
    return content


def _read(stream: Any, size: int) -> bytes:
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
