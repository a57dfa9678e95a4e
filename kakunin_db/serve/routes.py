"""The routes: method, path, scope, what is asked and what is answered. Nothing else names them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from cryptography import x509
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from .. import results
from ..client.operations import NoAuthorityError
from ..errors import BadInputError, UnknownCertificateError
from ..jsonb import loads
from ..middleware.core import permits
from ..tokens import jwks
from . import models as m
from . import operations as ops
from .backend import Backend, Role
from .operations import Caller, Described


class ProblemError(Exception):
    """What is answered instead: a status and :class:`~.models.Problem`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.problem = m.Problem(error=message, code=code, hint=hint)
        self.headers = headers or {}


@dataclass
class Call:
    """A request that was let in. ``caller`` is None on a public route; ``asked`` is of the route's model."""

    backend: Backend
    caller: Caller | None
    path: dict[str, str]
    asked: Any

    @property
    def key(self) -> Caller:
        assert self.caller is not None  # noqa: S101 - the route has a scope
        return self.caller

    def id(self, what: str) -> uuid.UUID:
        try:
            return uuid.UUID(self.path[f"{what}_id"])
        except ValueError:
            raise unknown(what, self.path[f"{what}_id"]) from None

    async def agent(self, agent_id: uuid.UUID | None = None, role: Role = "auditor") -> Described:
        """The agent, if the caller's key is good for it: for any other there is none."""
        agent_id = self.id("agent") if agent_id is None else agent_id
        found = None
        if self.key.may_see(agent_id):
            found = await self.backend.run(role, ops.get_described(agent_id))
        if found is None:
            raise unknown("agent", agent_id)
        return found


def unknown(what: str, name: object) -> ProblemError:
    return ProblemError(404, f"no {what} {str(name)[:64]!r} here")


Handler = Callable[[Call], Awaitable[Any]]
Kind = Literal["json", "pem", "der", "document", "jwks"]
MEDIA_TYPES: Final[dict[str, str]] = {
    "json": "application/json",
    "pem": "application/pem-certificate-chain",
    "der": "application/pkix-crl",
    "document": "application/json",
    "jwks": "application/jwk-set+json",
}


@dataclass(frozen=True)
class Route:
    """``scope`` is None for a public route. ``asked`` is the content's model, or the query's for a GET;
    ``answer`` the model of ``data``, with ``page`` of a list of it. ``problems`` are statuses beyond those
    of every route like it, and ``unavailable`` what a 503 may say here besides. What is ``urgent`` waits
    for nothing else of its key."""

    method: str
    path: str
    handler: Handler
    summary: str
    scope: str | None = None
    asked: type[BaseModel] | None = None
    answer: Any = None
    page: bool = False
    status: int = 200
    kind: Kind = "json"
    roles: tuple[Role, ...] = ("auditor",)
    urgent: bool = False
    problems: tuple[int, ...] = ()
    unavailable: str = ""


ROUTES: list[Route] = []


def route(method: str, path: str, **more: Any) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        ROUTES.append(Route(method, path, handler, (handler.__doc__ or "").strip(), **more))
        return handler

    return add


# Agents -----------------------------------------------------------------------------------------------


def _agent(found: Described, **more: Any) -> m.Agent:
    agent = found.agent
    metadata = {name: value for name, value in found.metadata.items() if name not in _OURS}
    return m.Agent(
        id=agent.agent_id,
        name=agent.name,
        model=agent.model or "",
        version=agent.model_version or "",
        status=found.status,  # type: ignore[arg-type]  # a case expression of exactly these
        model_hash=agent.model_hash,
        metadata={
            **metadata,
            "scopes": list(found.permitted_actions) if found.status == "active" else [],
            "requested_scopes": found.metadata.get("scopes", []),
            **more,
        },
        created_at=agent.created_at,
        tenant=agent.tenant,
        suspended_reason=agent.suspended_reason,
        certificate_serial=found.serial if found.status == "active" else None,
    )


# Members of metadata that the server says, whatever an application has said.
_OURS = ("scopes", "requested_scopes", "risk_score")


async def _shown(call: Call, agent_id: uuid.UUID) -> m.Agent:
    found = await call.agent(agent_id)
    risk = await call.backend.client("auditor").agents.risk(agent_id)
    return _agent(found, risk_score=risk.score)


@route(
    "POST", "/v1/agents", scope="agents:write", asked=m.CreateAgent, answer=m.Agent, status=201,
    roles=("registrar", "auditor"),
)  # fmt: skip
async def create_agent(call: Call) -> Any:
    """Make an agent. It can do nothing until it is certified."""
    asked: m.CreateAgent = call.asked
    agent_id = await call.backend.run(
        "registrar",
        ops.create_described(
            asked.name,
            tenant=asked.tenant,
            model=asked.model,
            version=asked.version,
            model_hash=asked.modelHash,
            metadata=asked.metadata or {},
            financial_scope=None if asked.financialScope is None else asked.financialScope.limits(),
        ),
    )
    return await _shown(call, agent_id)


@route(
    "GET", "/v1/agents", scope="agents:read", asked=m.ListAgents, answer=m.Agent, page=True, problems=(404,)
)
async def list_agents(call: Call) -> Any:
    """List agents, the newest first."""
    asked: m.ListAgents = call.asked
    before = None if asked.before is None else (await call.agent(asked.before)).agent
    found = await call.backend.run(
        "auditor", ops.list_described(asked.status, asked.limit + 1, before, call.key.agent_id)
    )
    return _page(asked.limit, [_agent(one) for one in found], lambda agent: agent.id)


@route("GET", "/v1/agents/{agent_id}", scope="agents:read", answer=m.Agent, problems=(404,))
async def get_agent(call: Call) -> Any:
    """An agent, and in its metadata what its certificate permits and its risk score."""
    return await _shown(call, call.id("agent"))


@route(
    "PATCH", "/v1/agents/{agent_id}", scope="agents:write|agents:suspend", asked=m.UpdateAgent,
    answer=m.Agent, problems=(404, 422),
)  # fmt: skip
async def update_agent(call: Call) -> Any:
    """Change what is given. A certificate that names another model hash is revoked."""
    asked: m.UpdateAgent = call.asked
    described = {"name": asked.name, "modelHash": asked.modelHash, "metadata": asked.metadata}
    if asked.status is not None:
        need(call.key, "agents:suspend")
        call.backend.client("operator")
    if any(value is not None for value in described.values()):
        need(call.key, "agents:write")
        call.backend.client("registrar")
    found = await call.agent()
    agent_id = found.agent.agent_id
    if asked.status is not None:
        await _set_status(call, found, asked.status)
    if asked.name is not None or asked.modelHash is not None:
        await call.backend.client("registrar").agents.update(
            agent_id, name=asked.name, model_hash=asked.modelHash
        )
    if asked.metadata is not None:
        await call.backend.run("registrar", ops.describe(agent_id, asked.metadata))
    return await _shown(call, agent_id)


async def _set_status(call: Call, found: Described, status: str) -> None:
    client, agent_id = call.backend.client("operator"), found.agent.agent_id
    suspended = found.agent.suspended_at is not None
    if found.status == "retired":
        if status != "retired":
            raise ProblemError(422, "a retired agent stays retired", hint="Make another.")
    elif status == "retired":
        for certificate in await client.certificates.list(agent_id):
            if certificate.status in ("active", "suspended", "not_yet_valid"):
                await client.certificates.revoke(certificate.serial_number, "cessationOfOperation")
        await call.backend.run("operator", ops.retire(agent_id, suspended=suspended))
    elif status == "suspended" and not suspended:
        await client.agents.suspend(agent_id, _by(call, "suspended"))
    elif status == "active" and suspended:
        await client.agents.reinstate(agent_id)


def _by(call: Call, what: str) -> str:
    return f"{what} with API key {call.key.prefix}"


def _certificate(certificate: results.Certificate) -> m.Certificate:
    return m.Certificate(
        id=certificate.serial_number,
        agent_id=certificate.agent_id,
        serial_number=certificate.serial_number,
        status=_status(certificate.status) or "revoked",
        pem=certificate.pem,
        issued_at=certificate.not_before,
        expires_at=certificate.not_after,
        permitted_actions=list(certificate.permitted_actions),
        financial_scope=certificate.financial_scope,
        revoked_at=certificate.revoked_at,
        revocation_reason=certificate.revocation_reason,
    )


def _status(status: str | None) -> m.CertificateStatus | None:
    """The SDK knows three. What may not be used now is never active."""
    if status in (None, "unknown"):
        return None
    return status if status in ("active", "expired") else "revoked"  # type: ignore[return-value]


@route(
    "POST", "/v1/agents/{agent_id}/certify", scope="agents:certify", asked=m.Certify, answer=m.Certificate,
    status=201, roles=("registrar", "auditor"), problems=(404, 409, 422),
    unavailable=", or no authority is trusted: kakunin-db ca init makes one",
)  # fmt: skip
async def certify(call: Call) -> Any:
    """Make a key for the agent and a certificate for it."""
    asked: m.Certify = call.asked
    _signing(call)
    found = await call.agent()
    agent = found.agent
    if agent.suspended_at is not None:
        raise ProblemError(
            422, f"agent {agent.agent_id} is {'retired' if found.status == 'retired' else 'suspended'}"
        )
    if agent.model_hash is None:
        raise ProblemError(422, "the agent has no model hash", hint="Set modelHash with PATCH first.")
    settings = call.backend.settings
    actions: Any = asked.permittedActions
    if actions is None:
        actions = found.metadata.get("scopes", [])
    if not (isinstance(actions, list) and all(isinstance(action, str) for action in actions)):
        raise ProblemError(422, "metadata.scopes is not a list of texts")
    refused = [a for a in actions if "*" not in settings.permits and not permits(settings.permits, a)]
    if refused:
        raise ProblemError(
            422,
            f"this server does not certify {', '.join(refused)[:300]}",
            hint="What it may certify is in its configuration (--permits).",
        )
    if found.serial is not None:
        raise ProblemError(
            409,
            f"agent {agent.agent_id} has an active certificate, {found.serial}",
            hint="Revoke that, or have an operator renew it with kakunin-db agent rotate.",
        )
    scope = found.financial_scope if asked.financialScope is None else asked.financialScope.limits()
    try:
        certificate = await call.backend.client("registrar").agents.certify(
            agent, permitted_actions=actions, financial_scope=scope, lifetime=settings.lifetime
        )
    except NoAuthorityError as error:
        # Not 409, by which the SDK says that an agent is certified already. It shows the message alone.
        raise ProblemError(503, f"{error}: kakunin-db ca init makes one", hint=error.hint) from error
    return _certificate(certificate)


def _signing(call: Call) -> None:
    if call.backend.settings.keys is None:
        raise ProblemError(403, "this server may not: it has no key store")


@route(
    "GET", "/v1/agents/{agent_id}/certificates", scope="agents:read", answer=list[m.Certificate],
    problems=(404,),
)  # fmt: skip
async def list_certificates(call: Call) -> Any:
    """The agent's certificates, the newest first."""
    found = await call.agent()
    certificates = await call.backend.client("auditor").certificates.list(found.agent.agent_id)
    return [_certificate(one) for one in certificates]


@route("GET", "/v1/certificates/{serial}", scope="agents:read", answer=m.Certificate, problems=(404,))
async def get_certificate(call: Call) -> Any:
    """A certificate, by its serial number."""
    try:
        found = await call.backend.client("auditor").certificates.get(call.path["serial"])
    except (UnknownCertificateError, BadInputError):
        found = None
    if found is None or not call.key.may_see(found.agent_id):
        raise unknown("certificate", call.path["serial"])
    return _certificate(found)


@route(
    "POST", "/v1/agents/{agent_id}/sign", scope="agents:sign", asked=m.Sign, answer=m.SignResult,
    problems=(404, 422),
)  # fmt: skip
async def sign(call: Call) -> Any:
    """Sign a message with the agent's key: its canonical JSON (RFC 8785)."""
    _signing(call)
    found = await call.agent()
    signed = await call.backend.client("auditor").agents.sign(found.agent.agent_id, call.asked.payload)
    return m.SignResult(
        signature=signed.signature,
        algorithm=signed.algorithm,
        certificate_serial=signed.certificate_serial,
        payload_hash=signed.payload_hash,
        signed_at=signed.signed_at,
    )


@route(
    "POST", "/v1/agents/{agent_id}/halt", scope="agents:halt", asked=m.Halt, answer=m.HaltReceipt,
    roles=("operator",), urgent=True, problems=(404,),
)  # fmt: skip
async def halt(call: Call) -> Any:
    """The kill switch: suspend the agent and revoke its certificates, at once."""
    found = await call.agent(role="operator")  # and nothing else that others might keep waiting
    reason = call.asked.reason or _by(call, "halted")
    receipt = await call.backend.client("operator").agents.halt(found.agent.agent_id, reason)
    revoked = list(receipt.certificates_revoked)
    return m.HaltReceipt(
        agent_id=receipt.agent_id,
        halt_event_id=receipt.halt_id,
        certificate_serial=found.serial if found.serial in revoked else next(iter(revoked), None),
        halted_at=receipt.halted_at,
        signature=receipt.signature or "",
        receipt=receipt.receipt,
        key_id=receipt.key_id,
        # Why is the log's, which the signer's words are for.
        pending=receipt.pending and "No authority has signed the receipt yet. The halt stands.",
        certificates_revoked=revoked,
    )


def _band(band: str) -> m.Band:
    """The SDK knows three."""
    return "high" if band == "critical" else band  # type: ignore[return-value]


@route(
    "GET", "/v1/agents/{agent_id}/risk", scope="agents:read", asked=m.RiskWindow, answer=m.AgentRisk,
    problems=(404,),
)  # fmt: skip
async def risk(call: Call) -> Any:
    """The agent's risk now, and its events of the last days."""
    agent_id = (await call.agent()).agent.agent_id
    days = call.asked.window_days
    found = await call.backend.client("auditor").agents.risk(agent_id)
    counts = await call.backend.run("auditor", ops.counts(agent_id, days))
    now = dt.datetime.now(dt.timezone.utc)
    return m.AgentRisk(
        agent_id=agent_id,
        risk_score=found.score,
        risk_band=_band(found.band),
        band=found.band,
        event_count=counts["events"],
        high_risk_count=counts["high"],
        medium_risk_count=counts["medium"],
        avg_risk_score=counts["average"],
        drift=_drift(found, now),
        window_days=days,
        computed_at=now,
        recommendation=found.recommendation,
    )


def _drift(risk: results.AgentRisk, now: dt.datetime) -> m.Drift:
    if risk.drift is None:
        return m.Drift(computed_at=now, drift_trend=risk.trend, note="There is too little to compare yet.")
    score = float(risk.drift["score"])
    factors = risk.drift["factors"]
    return m.Drift(
        drift_score=score,
        drift_band="stable" if score < 0.3 else "moderate" if score < 0.75 else "significant",
        contributing_factors=[name for name in ("event_mix", "amount", "rate") if factors.get(name)],
        computed_at=now,
        drift_trend=risk.trend,
    )


# Events -----------------------------------------------------------------------------------------------


def _event(event: results.Event) -> m.Event:
    metadata = event.metadata
    occurred = metadata.get("occurred_at") if isinstance(metadata, dict) else None
    return m.Event(
        id=str(event.event_id),
        agent_id=event.agent_id,
        action_type=event.event_type,
        risk_score=event.score,
        risk_band=_band(event.band),
        band=event.band,
        occurred_at=_moment(occurred, event.recorded_at),
        payload=metadata if isinstance(metadata, dict) else {"value": metadata},
        session_id=event.session_id,
        hash=event.hash,
        agent_risk_score=event.agent_score,
        agent_band=event.agent_band,
        revoked=event.revoked,
    )


# Members of what append_to_decision_chain() answers that a result has as they are.
_WRITTEN = (
    "event_id", "event_type", "score", "band", "factors", "agent_score", "agent_band", "chain", "sequence",
    "hash", "prev",
)  # fmt: skip

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")


def _moment(said: object, recorded: dt.datetime) -> str:
    """When it occurred, if it says so in the form audit_log_append() gives that: an agent writes what it
    likes."""
    if isinstance(said, str) and _RFC3339.fullmatch(said):
        try:
            dt.datetime.fromisoformat(said.replace("Z", "+00:00"))
        except ValueError:
            pass
        else:
            return said
    return recorded.astimezone(dt.timezone.utc).isoformat().replace("+00:00", "Z")


@route(
    "POST", "/v1/events", scope="events:write", asked=m.CreateEvent, answer=m.Event, status=201,
    roles=("gateway", "auditor"), problems=(404, 409, 422),
)  # fmt: skip
async def create_event(call: Call) -> Any:
    """Append an event of an agent to the ledger, and score it."""
    asked: m.CreateEvent = call.asked
    found = await call.agent(asked.agentId)
    if found.serial is None:
        raise ProblemError(
            422,
            f"agent {asked.agentId} has no certificate that it may use",
            hint="Certify it; where it is suspended, an operator reinstates it first.",
        )
    details = asked.details or {}
    # As the ledger has it.
    entered = dict(details)
    if asked.occurredAt is not None:
        moment = asked.occurredAt.isoformat(timespec="microseconds")
        entered["occurred_at"] = moment.replace("+00:00", "Z")
    if asked.chainId is None:
        event = await call.backend.client("gateway", found.serial).events.create(
            asked.actionType,
            details,
            session_id=asked.sessionId,
            occurred_at=asked.occurredAt,
            agent_id=asked.agentId,
        )
        return _event(dataclasses.replace(event, metadata=entered))
    chain = await _open_chain(call, asked.chainId)
    entered["decision_chain"] = str(chain)
    written = await call.backend.run(
        "gateway",
        ops.append_to_chain(chain, asked.actionType, details, asked.sessionId, asked.occurredAt),
        found.serial,
    )
    return _event(
        results.Event(
            **{name: written[name] for name in _WRITTEN},
            agent_id=uuid.UUID(written["agent_id"]),
            recorded_at=dt.datetime.fromisoformat(written["recorded_at"].replace("Z", "+00:00")),
            session_id=asked.sessionId,
            metadata=entered,
            revoked=written.get("revoked"),
        )
    )


@route(
    "GET", "/v1/events", scope="events:read", asked=m.ListEvents, answer=m.Event, page=True, problems=(404,)
)
async def list_events(call: Call) -> Any:
    """List agents' events, the newest first. The reading is put on record."""
    asked: m.ListEvents = call.asked
    agent_id = asked.agent_id or call.key.agent_id
    if agent_id is not None and not call.key.may_see(agent_id):
        raise unknown("agent", agent_id)
    client = call.backend.client("auditor")
    found: list[results.Event] = []
    for band in ("high", "critical") if asked.band == "high" else (asked.band,):
        found += await client.events.list(
            agent_id=agent_id,
            event_type=asked.action_type,
            band=band,
            limit=asked.limit + 1,
            before=asked.before,
        )
    found.sort(key=lambda event: -event.event_id)
    return _page(asked.limit, [_event(event) for event in found[: asked.limit + 1]], lambda event: event.id)


def _page(limit: int, found: list[Any], cursor: Callable[[Any], Any]) -> dict[str, Any]:
    """Of one more than was asked for."""
    more = len(found) > limit
    shown = found[:limit]
    pagination = m.Pagination(
        limit=limit, has_next_page=more, next_cursor=str(cursor(shown[-1])) if more else None
    )
    return {"data": shown, "pagination": pagination}


# Decision chains --------------------------------------------------------------------------------------


async def _chain(call: Call, chain_id: uuid.UUID) -> dict[str, Any]:
    found = await call.backend.run("gateway", ops.get_chain(chain_id))
    if found is None:
        raise unknown("chain", chain_id)
    return found


async def _open_chain(call: Call, chain_id: uuid.UUID) -> uuid.UUID:
    if (await _chain(call, chain_id))["status"] == "closed":
        raise ProblemError(409, f"chain {chain_id} is closed")
    return chain_id


@route(
    "POST", "/v1/chains", scope="chains:write", asked=m.CreateChain, answer=m.Chain, status=201,
    roles=("gateway",),
)  # fmt: skip
async def create_chain(call: Call) -> Any:
    """Open a decision chain, for events that lead to one decision."""
    asked: m.CreateChain = call.asked
    chain_id = await call.backend.run(
        "gateway", ops.open_chain(asked.name, asked.description, asked.metadata)
    )
    return m.Chain(**await _chain(call, chain_id))


@route(
    "GET", "/v1/chains", scope="chains:read", asked=m.ListChains, answer=m.Chain, page=True,
    roles=("gateway",), problems=(404,),
)  # fmt: skip
async def list_chains(call: Call) -> Any:
    """List decision chains, the newest first."""
    asked: m.ListChains = call.asked
    before = None if asked.before is None else await _chain(call, asked.before)
    found = await call.backend.run("gateway", ops.list_chains(asked.status, asked.limit + 1, before))
    return _page(asked.limit, [m.Chain(**one) for one in found], lambda chain: chain.chain_id)


@route(
    "GET", "/v1/chains/{chain_id}", scope="chains:read", answer=m.WholeChain, roles=("gateway", "auditor"),
    problems=(404,),
)  # fmt: skip
async def get_chain(call: Call) -> Any:
    """A decision chain with its events and their agents. The reading is put on record."""
    found = await _chain(call, call.id("chain"))
    rows = await call.backend.run("auditor", ops.chain_events(found["chain_id"]))
    agents = {
        (row["agent_id"], row["serial"]): m.ParticipatingAgent(
            agent_id=row["agent_id"],
            agent_name=row["agent_name"],
            model_hash=row["model_hash"],
            certificate_serial=row["serial"],
            certificate_status=_status(row["certificate_status"]),
        )
        for row in rows
    }
    events = [
        m.ChainEvent(
            sequence=row["sequence"],
            event_id=str(row["event_id"]),
            agent_id=row["agent_id"],
            agent_name=row["agent_name"],
            model_hash=row["model_hash"],
            certificate_serial=row["serial"],
            action_type=row["event_type"],
            risk_score=row["risk"]["score"],
            risk_band=_band(row["risk"]["band"]),
            occurred_at=_moment(row["metadata"].get("occurred_at"), row["recorded_at"]),
            details=row["metadata"],
            hash=row["hash"],
        )
        for row in rows
    ]
    return m.WholeChain(**found, events=events, participating_agents=list(agents.values()))


@route(
    "POST", "/v1/chains/{chain_id}/close", scope="chains:write", asked=m.Nothing, answer=m.Chain,
    roles=("gateway",), problems=(404, 409),
)  # fmt: skip
async def close_chain(call: Call) -> Any:
    """Close a decision chain for good. Its hash goes into the ledger."""
    chain_id = await _open_chain(call, call.id("chain"))
    await call.backend.run("gateway", ops.close_chain(chain_id))
    return m.Chain(**await _chain(call, chain_id))


# Reports ----------------------------------------------------------------------------------------------


def _report(row: dict[str, Any]) -> m.Report:
    document = loads(row["document"])
    events, risk = document["events"], document["risk"]
    summary = (
        f"{events['total']} events in {document['period']['days']} days; risk {risk['band']}"
        f" ({risk['score']}); {len(document['certificates'])} certificates, {len(document['halts'])} halts."
    )
    return m.Report(
        id=row["report_id"],
        agent_id=row["agent_id"],
        title=f"Compliance report: {document['agent']['name']}",
        summary=summary,
        period_start=row["period_start"],
        period_end=row["period_end"],
        created_at=row["created_at"],
        updated_at=row["created_at"],
        sha256=hashlib.sha256(row["document"].encode()).hexdigest(),
        report=document,
    )


@route(
    "POST", "/v1/reports/compliance", scope="reports:write", asked=m.CreateReport, answer=m.Report,
    status=201, problems=(404,),
)  # fmt: skip
async def create_report(call: Call) -> Any:
    """Make a report of what the database knows of an agent and the last days."""
    asked: m.CreateReport = call.asked
    await call.agent(asked.agentId)
    row = await call.backend.run(
        "auditor",
        ops.create_report(asked.agentId, asked.windowDays, asked.notes, asked.standardsFrameworks or []),
    )
    assert row is not None  # noqa: S101 - it was just made
    return _report(row)


async def _found_report(call: Call) -> dict[str, Any]:
    row = await call.backend.run("auditor", ops.get_report(call.id("report")))
    if row is None:
        raise unknown("report", call.path["report_id"])
    return row


@route("GET", "/v1/reports/{report_id}", scope="reports:read", answer=m.Report, problems=(404,))
async def get_report(call: Call) -> Any:
    """A report that was made."""
    return _report(await _found_report(call))


@route(
    "GET", "/v1/reports/{report_id}/document", scope="reports:read", answer=dict[str, Any], kind="document",
    problems=(404,),
)  # fmt: skip
async def get_report_document(call: Call) -> Any:
    """A report byte for byte: what its SHA-256 is of."""
    return Response((await _found_report(call))["document"].encode(), media_type=MEDIA_TYPES["document"])


# Public -----------------------------------------------------------------------------------------------


@route("POST", "/v1/verify/message", asked=m.VerifyMessage, answer=m.MessageVerification, roles=("gateway",))
async def verify_message(call: Call) -> Any:
    """Whether the certificate's key signed the payload, and may be used now."""
    asked: m.VerifyMessage = call.asked
    found = await call.backend.client("gateway").verify.message(
        payload=asked.payload,
        signature=asked.signature,
        certificate_serial=asked.certificateSerial,
        agent_id=asked.agentId,
    )
    return m.MessageVerification(
        valid=found.valid,
        signature_valid=found.signature_valid,
        certificate_status=_status(found.certificate_status),
        agent_id=found.agent_id,
        agent_name=found.agent_name,
        model_hash=found.model_hash,
    )


@route("GET", "/v1/verify/chain/{chain_id}", answer=m.ChainVerification, roles=("gateway",), problems=(404,))
async def verify_chain(call: Call) -> Any:
    """Work a decision chain's hash out again from the ledger's entries."""
    found = await call.backend.run("gateway", ops.verify_chain(call.id("chain")))
    if found is None:
        raise unknown("chain", call.path["chain_id"])
    return m.ChainVerification(**found)


@route("GET", "/v1/verify/{serial}", answer=m.CertificateVerification, roles=("gateway",), problems=(404,))
async def verify_certificate(call: Call) -> Any:
    """Whether a certificate may be used now, and what it says."""
    try:
        found = await call.backend.client("gateway").verify.certificate(call.path["serial"])
    except BadInputError:
        raise unknown("certificate", call.path["serial"]) from None
    if found.status == "unknown":
        raise unknown("certificate", call.path["serial"])
    return m.CertificateVerification.model_validate(found, from_attributes=True)


@route("GET", "/v1/crl", kind="pem", roles=("gateway",))
async def crls(call: Call) -> Any:
    """The newest revocation list of each authority, PEM."""
    lists = await call.backend.client("gateway").authorities.revocation_lists()
    return Response("".join(one.pem for one in lists), media_type=MEDIA_TYPES["pem"])


@route("GET", "/v1/crl/{key_id}", kind="der", roles=("gateway",), problems=(404,))
async def crl(call: Call) -> Any:
    """The newest revocation list of an authority, DER, by its key id in hexadecimal."""
    wanted = call.path["key_id"].removesuffix(".crl").replace(":", "").upper()
    for one in await call.backend.client("gateway").authorities.revocation_lists():
        if one.key_id.replace(":", "") == wanted:
            return Response(one.der, media_type=MEDIA_TYPES["der"])
    raise unknown("authority", call.path["key_id"])


async def _trusted(call: Call) -> list[results.Authority]:
    found = await call.backend.client("gateway").authorities.list()
    return [one for one in found if one.distrusted_at is None]


@route("GET", "/v1/ca", kind="pem", roles=("gateway",))
async def authorities(call: Call) -> Any:
    """Certificates of the authorities that are trusted here, PEM; roots last."""
    found = sorted(await _trusted(call), key=lambda one: one.issuer_key_id == one.key_id)
    return Response("".join(one.pem for one in found), media_type=MEDIA_TYPES["pem"])


@route("GET", "/.well-known/jwks.json", answer=m.JWKSet, kind="jwks", roles=("gateway",))
async def jwk_set(call: Call) -> Any:
    """Keys of the authorities, which sign certificates and receipts, and of the ledger's tree heads."""
    ledger = await call.backend.client("gateway").ledger.keys()
    ders = [one.der for one in await _trusted(call)] + [k.der for k in ledger if k.revoked_at is None]
    keys: Any = [x509.load_der_x509_certificate(der).public_key() for der in ders]
    return JSONResponse(jwks(keys), media_type=MEDIA_TYPES["jwks"])


@route("GET", "/healthz", answer=m.Health, roles=("gateway",))
async def health(call: Call) -> Any:
    """Whether the database answers."""
    await call.backend.client("gateway").authorities.list()
    return m.Health()


def need(key: Caller, scope: str) -> None:
    if scope not in key.scopes:
        raise ProblemError(403, f"this key does not have the scope {scope}")
