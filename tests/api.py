"""`kakunin-db serve` on loopback, in a thread, with keys in memory; and API keys for it."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from conftest import Database, _ca, _signers

from kakunin_db import LocalSigner
from kakunin_db.errors import SignerError, SignerUnavailableError
from kakunin_db.serve.app import App
from kakunin_db.serve.backend import Settings
from kakunin_db.serve.keys import ApiKey
from kakunin_db.signers import Signer, subject_key_id

pytest.importorskip("kakunin", reason="the SDK is not installed")
from kakunin import Kakunin

ROLES = ("gateway", "registrar", "operator", "auditor")
SCOPES = (
    "agents:read", "agents:write", "agents:certify", "agents:sign", "agents:suspend", "agents:halt",
    "events:read", "events:write", "chains:read", "chains:write", "reports:read", "reports:write",
)  # fmt: skip
HASH = "sha256:" + "ab" * 32
PERMITS = ("trade.execute", "orders:*", "data.read")


@dataclass
class Keys:
    """The test authority's key and those of agents. ``down`` is a KMS that does not answer."""

    signers: dict[str, LocalSigner] = field(default_factory=dict)
    down: bool = False

    def create(self, label: str) -> LocalSigner:
        self._reach()
        signer = next(_signers())
        self.signers[subject_key_id(signer.public_key())] = signer
        return signer

    def open(self, public_key: Any) -> LocalSigner:
        self._reach()
        name = subject_key_id(public_key)
        authority = _ca().signer
        if name == subject_key_id(authority.public_key()):
            return authority  # type: ignore[return-value]
        if name not in self.signers:
            raise SignerError("there is no such key")
        return self.signers[name]

    def discard(self, signer: Signer) -> None:
        pass  # others have it too

    def _reach(self) -> None:
        if self.down:
            raise SignerUnavailableError("kms-internal-7.example does not answer")


def login(database: Database, name: str, roles: Sequence[str] = ROLES) -> str:
    """The DSN of a login that holds these roles and inherits none."""
    with database.cluster.session("postgres", "postgres") as admin:
        found = admin.execute("select 1 from pg_roles where rolname = %s", [name]).fetchone()
        if found is None:
            admin.execute(f"create role {name} login noinherit")
            for role in roles:
                admin.execute(f"grant {f'kakunin_{role}' if role in ROLES else role} to {name}")
    return database.dsn(name)


def api_key(
    database: Database, *scopes: str, agent: Any = None, expires: dt.timedelta | None = None
) -> ApiKey:
    key = ApiKey.generate()
    database.run(
        "operator",
        "select kakunin.create_api_key(%s, %s, 'test', %s, %s, now() + %s)",
        [key.prefix, key.digest, list(scopes or SCOPES), agent, expires],
    )
    return key


@dataclass
class Server:
    database: Database
    app: App
    url: str
    keys: Keys

    def client(self, key: ApiKey | str) -> httpx.Client:
        text = key if isinstance(key, str) else key.text
        return httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {text}"}, timeout=20)

    def sdk(self, key: ApiKey | None = None) -> Kakunin:
        return Kakunin(api_key=(key or api_key(self.database)).text, base_url=f"{self.url}/v1")


@contextlib.contextmanager
def served(database: Database, dsn: str | None = None, **settings: Any) -> Iterator[Server]:
    keys = Keys()
    given = {"per_minute": 100_000, "public_per_minute": 100_000, "permits": PERMITS} | settings
    app = App(Settings(dsn or login(database, "api"), keys, **given))
    # As asyncio makes one itself: without its protocol it would not be set to send small answers at once.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app.asgi, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=2
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
        assert server.started
        yield Server(database, app, f"http://127.0.0.1:{listening.getsockname()[1]}", keys)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
