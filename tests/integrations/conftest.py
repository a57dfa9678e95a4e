"""What the guards of every framework are shown with: an agent whose permission ends in each way there is, a
database that can be taken away, and no network."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database
from test_examples import run

from kakunin_db import (
    AgentSuspendedError,
    AsyncKakunin,
    CertificateRevokedError,
    Kakunin,
    KakuninError,
    ScopeViolationError,
    VerificationUnavailableError,
)
from kakunin_db.integrations.base import monitor_of
from kakunin_db.resources import install_sql, sql_dir

# Before a framework is imported: what it would tell somebody.
os.environ.update(
    LANGSMITH_TRACING="false",
    LANGCHAIN_TRACING_V2="false",
    ANONYMIZED_TELEMETRY="false",
    DO_NOT_TRACK="1",
    OTEL_SDK_DISABLED="true",
)

PERMITTED = ["trade.execute", "data:*"]
NOT_PERMITTED = ["trade.execute", "admin"]

# How permission ends, and what says so. All but `denied` end while the program runs.
REFUSALS: dict[str, type[KakuninError]] = {
    "denied": ScopeViolationError,
    "suspended": AgentSuspendedError,
    "revoked": CertificateRevokedError,
    "down": VerificationUnavailableError,
    "late": VerificationUnavailableError,
}
refusals = pytest.mark.parametrize("how", REFUSALS)
# What a framework shows is to have some of it.
REASONS = {"denied": "does not permit 'trade.execute'", "suspended": "suspended", "revoked": "revoked"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No socket of Python's leads anywhere but to this machine; libpq has its own."""
    attempts: list[Any] = []

    def only_here(real: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
                attempts.append(address)
                raise OSError(f"a test connects to {address}")
            return real(self, address)

        return connect

    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "localhost", "127.0.0.1", "::1"):
            attempts.append(host)
            raise OSError(f"a test looks up {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", only_here(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", only_here(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    assert attempts == []


class Relay:
    """A port that leads to the server, until it is cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._up = True
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if not self._up:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._to))
                self._open += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        source.close()

    def cut(self) -> None:
        self._up = False
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._up = True

    def close(self) -> None:
        self.cut()
        self._listener.close()


@dataclass
class Scene:
    """An agent, clients that act for it, and the end of its permission."""

    database: Database
    agent: Agent
    relay: Relay
    how: str = "revoked"
    ran: list[str] = field(default_factory=list)
    """What a tool's body adds to."""
    _clients: list[Any] = field(default_factory=list)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.relay.port} dbname={self.database.name} user=agent_1"

    def client(self, kind: Any = Kakunin, timeout: float = 1) -> Any:
        self._clients.append(kind(self.dsn, credential=self.agent.credential, timeout=timeout))
        return self._clients[-1]

    def async_client(self) -> AsyncKakunin:
        """The caller closes it, in its loop."""
        return self.client(AsyncKakunin)

    @property
    def scopes(self) -> list[str]:
        return NOT_PERMITTED if self.how == "denied" else PERMITTED[:1]

    @property
    def error(self) -> type[KakuninError]:
        return REFUSALS[self.how]

    @property
    def reason(self) -> str:
        return REASONS.get(self.how, "could not be found out")

    @property
    def before(self) -> int:
        """How often a tool may run until permission ends."""
        return 0 if self.how == "denied" else 1

    def strike(self) -> None:
        """Ends the permission."""
        if self.how == "suspended":
            self.agent.suspend()
        elif self.how == "revoked":
            self.agent.revoke()
        elif self.how == "down":
            self.relay.cut()
        elif self.how == "late":
            admin = self._held.enter_context(self.database.connect("postgres"))
            admin.execute("lock table kakunin_private.certificates in access exclusive mode")

    def refused(self, call: Callable[[], Any]) -> KakuninError:
        """Calls once that is permitted, where there is such a time, and once that is not."""
        for _ in range(self.before):
            call()
        assert len(self.ran) == self.before
        self.strike()
        with pytest.raises(self.error) as caught:
            call()
        assert len(self.ran) == self.before
        return caught.value

    async def arefused(self, call: Callable[[], Any]) -> KakuninError:
        for _ in range(self.before):
            await call()
        assert len(self.ran) == self.before
        self.strike()
        with pytest.raises(self.error) as caught:
            await call()
        assert len(self.ran) == self.before
        return caught.value

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """What the monitors of the clients have recorded."""
        return _recorded(self.database, self.agent, self._clients)

    def end(self) -> None:
        self._held.close()
        self.relay.mend()
        for client in self._clients:
            assert monitor_of(client).close(30)
            if isinstance(client, Kakunin):
                client.close()
        self.relay.close()


def _recorded(database: Database, agent: Agent, clients: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    for client in clients:
        assert monitor_of(client).flush(30)
    return database.run(
        "auditor",
        "select event_type, metadata from kakunin.audit_log where agent_id = %s and risk is not null"
        " order by event_id",
        [agent.agent_id],
    )


def _scene(database: Database, how: str, actions: list[str] = PERMITTED) -> Iterator[Scene]:
    scene = Scene(database, database.agent(permitted_actions=actions), Relay(database.cluster.port), how)
    try:
        yield scene
    finally:
        scene.end()


@contextlib.contextmanager
def refused(database: Database, how: str) -> Iterator[Scene]:
    """One whose agent may not `trade.execute`, or of whom that cannot be found out, from the beginning."""
    actions = ["data:read"] if how == "denied" else PERMITTED
    with contextlib.contextmanager(_scene)(database, how, actions) as scene:
        scene.strike()
        yield scene


_permitted: list[Scene] = []


def permitted(database: Database, client: Any = Kakunin) -> tuple[Agent, Any]:
    """An agent that is permitted everything in PERMITTED, and its client, closed after the test."""
    scene = Scene(database, database.agent(permitted_actions=PERMITTED), Relay(database.cluster.port))
    _permitted.append(scene)
    return scene.agent, scene.client(client, timeout=30)


def events(database: Database, agent: Agent, kakunin: Any) -> list[tuple[str, dict[str, Any]]]:
    """What was recorded, without how long it took."""
    return [
        (event_type, {k: v for k, v in metadata.items() if k not in ("seconds", "framework")})
        for event_type, metadata in _recorded(database, agent, [kakunin])
    ]


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """What a framework leaves open itself is collected here, where the warning of it is no error."""
    yield
    while _permitted:
        _permitted.pop().end()
    gc.collect()


@pytest.fixture(params=REFUSALS)
def scene(request: pytest.FixtureRequest, database: Database) -> Iterator[Scene]:
    """Of every refusal."""
    yield from _scene(database, request.param)


@pytest.fixture
def revoked(database: Database) -> Iterator[Scene]:
    """Its agent is revoked by strike()."""
    yield from _scene(database, "revoked")


@pytest.fixture
def denied(database: Database) -> Iterator[Scene]:
    """Its scopes are not those of its agent."""
    yield from _scene(database, "denied")


@pytest.fixture
def example(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Runs an example as its first lines say, as the agent atlas, which may vault:read and has one row in
    agent_vault, as borealis has; returns the lines that it prints."""
    with fresh_database(cluster, "template1") as database:
        with database.connect("installer") as installer:
            installer.execute(install_sql())
        database.run("app", (sql_dir() / "policies" / "agent_vault.sql").read_text())
        for name in ("atlas", "borealis"):
            out = run(tmp_path, "register_agent.py", database.dsn("installer"), name, "vault:read")
            serial = dict(line.split(maxsplit=1) for line in out.splitlines())["serial"]
            row = "insert into agent_vault (permitted_agent_serial, content) values (%s, %s)"
            database.run("app", row, [serial, f"written for {name}"])

        def call(file: str) -> list[str]:
            out = run(tmp_path, file, database.dsn("agent_1"), "atlas.pem", str(database.installation_id))
            contents = database.run("app", "select content from agent_vault order by id")
            assert contents == [("written for atlas",), ("written for borealis",)]
            return out.splitlines()

        yield call


def drain(stream: Any) -> list[Any]:
    return list(stream)


async def adrain(stream: Any) -> list[Any]:
    return [item async for item in stream]
