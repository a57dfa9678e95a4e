"""What answers in a Supabase project's place where it is the client that is tested: it records what it is
asked, and answers as a test has it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt

SECRET = "the JWT secret of a project that does not exist"
VERIFY = "/rest/v1/rpc/verify_certificate"


def api_key(role: str) -> str:
    return jwt.encode({"role": role, "iss": "supabase", "exp": 2_000_000_000}, SECRET, "HS256")


ANON = api_key("anon")


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    at: float = field(default_factory=time.time)

    @property
    def token(self) -> str:
        scheme, _, token = self.headers["authorization"].partition(" ")
        assert scheme == "Bearer"
        return token

    @property
    def claims(self) -> dict[str, Any]:
        """Those of a token that was good when it came."""
        claims = jwt.decode(
            self.token, SECRET, algorithms=["HS256"], audience="authenticated", options={"verify_exp": False}
        )
        assert claims["exp"] > self.at
        return claims


@dataclass
class Answer:
    status: int = 200  # 0 hangs up
    body: Any = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


class Project:
    """At ``url``. ``certificate`` is what verify_certificate() answers."""

    def __init__(self, certificate: dict[str, Any]) -> None:
        self.certificate = certificate
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Answer | None] = lambda _: None
        project = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path.partition("?")[0], headers, body)
                project.requests.append(request)
                answer = project.answer(request)
                if answer is None:
                    answer = Answer(body=project.certificate) if request.path == VERIFY else Answer()
                if answer.status == 0:
                    self.close_connection = True
                    return
                raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that went
                    self.send_response(answer.status)
                    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do_HEAD = do  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def asked(self) -> list[Request]:
        """What was asked about the certificate."""
        return [request for request in self.requests if request.path == VERIFY]

    @property
    def done(self) -> list[Request]:
        """Everything else."""
        return [request for request in self.requests if request.path != VERIFY]

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def serve(certificate: dict[str, Any]) -> Iterator[Project]:
    project = Project(certificate)
    yield project
    project.stop()
