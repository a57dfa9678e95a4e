"""What the API does in the database beyond the operations of :mod:`kakunin_db.client`, and as they do it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from ..client.operations import _AGENT, Query, Rows, Steps, as_uuid
from ..results import Agent

# Keys -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """Whose key a request came with. ``agent_id`` is the only agent the key is good for, None for all."""

    key_id: uuid.UUID
    prefix: str
    name: str
    scopes: frozenset[str]
    agent_id: uuid.UUID | None
    status: str

    def may_see(self, agent_id: uuid.UUID) -> bool:
        return self.agent_id in (None, agent_id)


def authenticate(prefix: str, digest: bytes) -> Steps[Caller | None]:
    rows = yield Query("select kakunin.authenticate_api_key(%s, %s) as key", [prefix, digest])
    key = rows[0]["key"]
    if key is None:
        return None
    agent_id = key["agent_id"]
    return Caller(
        uuid.UUID(key["key_id"]),
        key["prefix"],
        key["name"],
        frozenset(key["scopes"]),
        None if agent_id is None else uuid.UUID(agent_id),
        key["status"],
    )


def note_keys(key_ids: Sequence[uuid.UUID]) -> Steps[None]:
    yield Query("select kakunin.note_api_keys(%s)", [list(key_ids)])


# Agents -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """An agent, what is said of it, and the certificate it may use now, the newest of two."""

    agent: Agent
    metadata: dict[str, Any]
    financial_scope: dict[str, Any] | None
    serial: str | None
    permitted_actions: tuple[str, ...]
    status: str


# Retired is suspended for that reason: the API's, or an operator's who gives the same.
RETIRED = "retired"

_DESCRIBED = (
    f"select * from (select a.*, d.metadata, d.financial_scope, c.serial, c.permitted_actions,"
    f" case when a.suspended_reason = '{RETIRED}' then 'retired'"
    "      when a.suspended_at is not null or c.serial is null then 'suspended' else 'active' end as status"
    f" from ({_AGENT}) a"
    " left join kakunin.agent_descriptions d on d.agent_id = a.agent_id"
    " left join lateral (select c.serial, c.permitted_actions from kakunin.certificates c"
    "   where c.agent_id = a.agent_id and (kakunin.verify_certificate(c.serial) -> 'valid')::boolean"
    "   order by c.registered_at desc, c.serial limit 1) c on true) a"
)


def _described(row: dict[str, Any]) -> Described:
    more = {
        name: row.pop(name)
        for name in ("metadata", "financial_scope", "serial", "permitted_actions", "status")
    }
    more["metadata"] = more["metadata"] or {}
    more["permitted_actions"] = tuple(more["permitted_actions"] or ())
    return Described(Agent(**row), **more)


def get_described(agent_id: uuid.UUID) -> Steps[Described | None]:
    rows = yield Query(f"{_DESCRIBED} where agent_id = %s", [agent_id])
    return _described(rows[0]) if rows else None


def list_described(
    status: str | None, limit: int, before: Agent | None, only: uuid.UUID | None
) -> Steps[list[Described]]:
    last = (None, None) if before is None else (before.created_at, before.agent_id)
    rows = yield Query(
        f"{_DESCRIBED} where (%s::text is null or status = %s) and (%s::uuid is null or agent_id = %s)"
        " and (%s::timestamptz is null or (created_at, agent_id) < (%s, %s))"
        " order by created_at desc, agent_id desc limit %s",
        [status, status, only, only, last[0], *last, limit],
    )
    return [_described(row) for row in rows]


def create_described(
    name: str,
    *,
    tenant: str | None,
    model: str,
    version: str,
    model_hash: str | None,
    metadata: dict[str, Any],
    financial_scope: dict[str, Any] | None,
) -> Steps[uuid.UUID]:
    """The agent and what is said of it, or neither."""
    rows = yield Query(
        "with made as materialized (select kakunin.create_agent(%s, %s, %s, %s, %s) as agent_id)"
        " select agent_id, kakunin.describe_agent(agent_id, %s, %s) from made",
        [
            name,
            tenant,
            model,
            version,
            model_hash,
            _json(metadata),
            None if financial_scope is None else _json(financial_scope),
        ],
    )
    return as_uuid(rows[0]["agent_id"])


def describe(agent_id: uuid.UUID, metadata: dict[str, Any]) -> Steps[None]:
    yield Query("select kakunin.describe_agent(%s, %s)", [agent_id, _json(metadata)])


def _json(value: dict[str, Any]) -> Jsonb:
    """What is not JSON (NaN) is refused here and not by the server, which would quote it."""

    def dumps(value: Any) -> str:
        try:
            return json.dumps(value, allow_nan=False)
        except ValueError as error:
            raise psycopg.DataError("a number is not finite") from error

    return Jsonb(value, dumps)


def retire(agent_id: uuid.UUID, *, suspended: bool) -> Steps[None]:
    """The first reason of a suspension stays until that is lifted: in the same statement, so that the agent
    is at no moment, and after no failure, one that may be certified."""
    lifted = "kakunin.reinstate_agent(a.agent_id)," if suspended else ""
    yield Query(
        f"select {lifted} kakunin.suspend_agent(a.agent_id, %s) from (select %s::uuid as agent_id) a",
        [RETIRED, agent_id],
    )


def counts(agent_id: uuid.UUID, days: int) -> Steps[dict[str, Any]]:
    """Of the agent's events in the last days."""
    rows = yield Query(
        "select count(*) as events, coalesce(avg((risk ->> 'score')::float8), 0) as average,"
        " count(*) filter (where risk ->> 'band' in ('high', 'critical')) as high,"
        " count(*) filter (where risk ->> 'band' = 'medium') as medium"
        " from kakunin.audit_log"
        " where agent_id = %s and risk is not null and recorded_at > now() - make_interval(days => %s)",
        [agent_id, days],
    )
    counted: dict[str, Any] = rows[0]
    return counted


# Decision chains --------------------------------------------------------------------------------------

_CHAIN = (
    "select chain_id, name, description, metadata, created_at, closed_at, events as event_count,"
    " case when closed_at is null then 'open' else 'closed' end as status,"
    " case when closed_at is not null then hash end as chain_hash from kakunin.decision_chains"
)


def open_chain(name: str, description: str | None, metadata: dict[str, Any] | None) -> Steps[uuid.UUID]:
    rows = yield Query(
        "select kakunin.open_decision_chain(%s, %s, %s) as chain_id",
        [name, description, None if metadata is None else _json(metadata)],
    )
    return as_uuid(rows[0]["chain_id"])


def get_chain(chain_id: uuid.UUID) -> Steps[dict[str, Any] | None]:
    rows = yield Query(f"{_CHAIN} where chain_id = %s", [chain_id])
    return rows[0] if rows else None


def list_chains(status: str | None, limit: int, before: dict[str, Any] | None) -> Steps[Rows]:
    last = (None, None) if before is None else (before["created_at"], before["chain_id"])
    rows: Rows = yield Query(
        f"{_CHAIN} where (%s::text is null or (closed_at is null) = (%s = 'open'))"
        " and (%s::timestamptz is null or (created_at, chain_id) < (%s, %s))"
        " order by created_at desc, chain_id desc limit %s",
        [status, status, last[0], *last, limit],
    )
    return rows


def chain_events(chain_id: uuid.UUID) -> Steps[Rows]:
    """With what is known of their agents. Reading them is put on record."""
    yield Query("select kakunin.record_read('chain', %s)", [_json({"chain_id": str(chain_id)})])
    rows: Rows = yield Query(
        "select e.sequence, l.event_id, l.agent_id, a.name as agent_name, c.model_hash, l.serial,"
        "       kakunin.verify_certificate(l.serial) ->> 'status' as certificate_status,"
        "       l.event_type, l.risk, l.recorded_at, l.metadata, l.hash"
        "  from kakunin.decision_chain_events e"
        "  join kakunin.audit_log l on l.event_id = e.event_id"
        "  left join kakunin.agents a on a.agent_id = l.agent_id"
        "  left join kakunin.certificates c on c.serial = l.serial"
        " where e.chain_id = %s and l.event_id = any (array("
        "         select i.event_id from kakunin.decision_chain_events i where i.chain_id = %s))"
        " order by e.sequence",
        [chain_id, chain_id],
    )
    return rows


def append_to_chain(
    chain_id: uuid.UUID, event_type: str, metadata: dict[str, Any], session_id: str | None, occurred_at: Any
) -> Steps[dict[str, Any]]:
    rows = yield Query(
        "select kakunin.append_to_decision_chain(%s, %s, %s, %s, %s) as event",
        [chain_id, event_type, _json(metadata), session_id, occurred_at],
    )
    event: dict[str, Any] = rows[0]["event"]
    return event


def close_chain(chain_id: uuid.UUID) -> Steps[None]:
    yield Query("select kakunin.close_decision_chain(%s)", [chain_id])


def verify_chain(chain_id: uuid.UUID) -> Steps[dict[str, Any] | None]:
    rows = yield Query("select kakunin.verify_decision_chain(%s) as found", [chain_id])
    found: dict[str, Any] | None = rows[0]["found"]
    return found


# Reports ----------------------------------------------------------------------------------------------


def create_report(
    agent_id: uuid.UUID, days: int, notes: str | None, frameworks: Sequence[str]
) -> Steps[dict[str, Any] | None]:
    rows = yield Query(
        "select kakunin.create_report(%s, %s, %s, %s) as report_id", [agent_id, days, notes, list(frameworks)]
    )
    return (yield from get_report(rows[0]["report_id"]))


def get_report(report_id: uuid.UUID) -> Steps[dict[str, Any] | None]:
    rows = yield Query(
        "select report_id, agent_id, period_start, period_end, created_at, document"
        " from kakunin.reports where report_id = %s",
        [report_id],
    )
    return rows[0] if rows else None
