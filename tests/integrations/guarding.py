"""What tests of guards share: agents that may not, databases that do not answer, and what was recorded."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from cluster import far_away, free_port

from kakunin_db import (
    AgentSuspendedError,
    CertificateRevokedError,
    Kakunin,
    KakuninError,
    ScopeViolationError,
    VerificationUnavailableError,
)
from kakunin_db.integrations.base import monitor_of

SCOPES = ["trade.execute", "data:*"]

REFUSALS: dict[str, type[KakuninError]] = {
    "scope denied": ScopeViolationError,
    "suspended": AgentSuspendedError,
    "revoked": CertificateRevokedError,
    "database down": VerificationUnavailableError,
    "database slow": VerificationUnavailableError,
}
refusals = pytest.mark.parametrize("why", REFUSALS)
EVENTS = (
    "select event_type, metadata from kakunin.audit_log"
    " where agent_id = %s and risk is not null order by event_id"
)

_clients: list[Any] = []


@dataclass
class Refused:
    agent: Any
    kakunin: Kakunin
    error: type[KakuninError]
    # What the framework shows is to have some of it.
    reason: str


@contextlib.contextmanager
def refused(database: Any, why: str, client: Any = Kakunin) -> Iterator[Refused]:
    """An agent that may not do what SCOPES permit, or about which that cannot be found out."""
    agent = database.agent(permitted_actions=["data:read"] if why == "scope denied" else SCOPES)
    dsn, timeout = database.dsn("agent_1"), 10.0
    target = psycopg.conninfo.conninfo_to_dict(dsn)
    reason = {
        "scope denied": "does not permit 'trade.execute'",
        "suspended": "suspended",
        "revoked": "revoked",
    }.get(why, "could not be found out")
    with contextlib.ExitStack() as stack:
        if why == "suspended":
            agent.suspend()
        elif why == "revoked":
            agent.revoke()
        elif why == "database down":
            dsn, timeout = f"host=127.0.0.1 port={free_port()} dbname=x user=agent_1", 1.0
        elif why == "database slow":
            port = stack.enter_context(far_away(database.cluster.port, 0.8))
            dsn, timeout = f"host=127.0.0.1 port={port} dbname={target['dbname']} user=agent_1", 0.4
        yield Refused(agent, client(dsn, credential=agent.credential, timeout=timeout), REFUSALS[why], reason)


def permitted(database: Any, client: Any = Kakunin) -> tuple[Any, Any]:
    """An agent that SCOPES are permitted, and its client."""
    agent = database.agent(permitted_actions=SCOPES)
    kakunin = client(database.dsn("agent_1"), credential=agent.credential, timeout=30)
    _clients.append(kakunin)
    return agent, kakunin


def events(database: Any, agent: Any, kakunin: Any) -> list[tuple[str, dict[str, Any]]]:
    """What was recorded, without how long it took."""
    assert monitor_of(kakunin).flush(30)
    return [
        (event_type, {k: v for k, v in metadata.items() if k not in ("seconds", "framework")})
        for event_type, metadata in database.run("auditor", EVENTS, [agent.agent_id])
    ]


@pytest.fixture(autouse=True)
def closing() -> Iterator[None]:
    """Closes the clients of a test, whatever the framework still holds. What that leaves open itself is
    collected here, where the warning of it is no error."""
    yield
    for kakunin in _clients:
        monitor_of(kakunin).close(0)
        if isinstance(kakunin, Kakunin):
            kakunin.close()
    _clients.clear()
    gc.collect()
