"""What is asked and answered. The OpenAPI document has these as its schemas.

Members that the SDK sends are in camelCase, and those it reads in snake_case; that is how it is published.
Answers have more members than it reads, where the database knows more than its models can say.
"""

from __future__ import annotations

import datetime as dt
import uuid
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from ..ca import ALGORITHM

T = TypeVar("T")


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("a text has no NUL")
    return text


Text = Annotated[str, AfterValidator(_storable)]
Name = Annotated[Text, Field(min_length=1, max_length=200)]
Hash = Annotated[Text, Field(pattern="^sha256:[0-9a-f]{64}$")]
Action = Annotated[
    Text, Field(max_length=128, pattern=r"^([A-Za-z0-9_.:/-]{1,128}|[A-Za-z0-9_.:/-]{1,126}:\*)$")
]
Limit = Annotated[int, Field(ge=1, le=200)]


def _in_utc(given: dt.datetime) -> dt.datetime:
    if given.tzinfo is None:
        raise ValueError("it has no time zone")
    try:
        return given.astimezone(dt.timezone.utc)
    except OverflowError:
        raise ValueError("in UTC it is of no year from 1 to 9999") from None


Moment = Annotated[dt.datetime, AfterValidator(_in_utc)]


def _value(given: object) -> object:
    return given.removeprefix("RiskBand.") if isinstance(given, str) else given


AgentStatus = Literal["active", "suspended", "retired"]
CertificateStatus = Literal["active", "revoked", "expired"]
Band = Literal["low", "medium", "high"]
KitBand = Literal["low", "medium", "high", "critical"]
ChainStatus = Literal["open", "closed"]
Framework = Literal["iso_27001", "nist_csf"]


class Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Query(BaseModel):
    model_config = ConfigDict(extra="forbid")


# Asked ----------------------------------------------------------------------------------------------


class Nothing(Asked):
    """An empty object, or no content."""


Amount = Annotated[int | float, Field(ge=0, le=1e18)]


class FinancialScope(Asked):
    """What a certificate limits its agent to; null, as left out, is no limit."""

    max_single_trade_usd: Amount | None = None
    daily_limit_usd: Amount | None = None
    permitted_instruments: list[Text] | None = None
    permitted_venues: list[Text] | None = None
    leverage_permitted: bool | None = None
    max_leverage_ratio: Amount | None = None

    def limits(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class CreateAgent(Asked):
    name: Name
    model: Name
    version: Name
    modelHash: Hash | None = None  # noqa: N815
    financialScope: FinancialScope | None = Field(  # noqa: N815
        None, description="What its certificate is to limit it to."
    )
    metadata: dict[str, Any] | None = Field(
        None, description="`scopes` in it is what its certificate is to permit."
    )
    tenant: Name | None = None


class UpdateAgent(Asked):
    name: Name | None = None
    status: AgentStatus | None = Field(None, description="Needs agents:suspend; the rest, agents:write.")
    modelHash: Hash | None = None  # noqa: N815
    metadata: dict[str, Any] | None = None


class Certify(Asked):
    permittedActions: Annotated[list[Action], Field(max_length=256)] | None = Field(  # noqa: N815
        None, description="Default: metadata.scopes of the agent."
    )
    financialScope: FinancialScope | None = Field(  # noqa: N815
        None, description="Default: what the agent was created with."
    )


class Sign(Asked):
    payload: dict[str, Any]


class Halt(Asked):
    reason: Annotated[Text, Field(min_length=1, max_length=1000)] | None = None


class CreateEvent(Asked):
    agentId: uuid.UUID  # noqa: N815
    actionType: Annotated[Text, Field(pattern="^[A-Za-z][A-Za-z0-9_:-]{0,63}$")]  # noqa: N815
    chainId: uuid.UUID | None = None  # noqa: N815
    sessionId: Annotated[Text, Field(max_length=200)] | None = None  # noqa: N815
    occurredAt: Moment | None = None  # noqa: N815
    details: dict[str, Any] | None = None


class CreateChain(Asked):
    name: Name
    description: Annotated[Text, Field(max_length=2000)] | None = None
    metadata: dict[str, Any] | None = None


class CreateReport(Asked):
    agentId: uuid.UUID  # noqa: N815
    windowDays: int = Field(30, ge=1, le=366)  # noqa: N815
    notes: Annotated[Text, Field(max_length=2000)] | None = None
    standardsFrameworks: Annotated[list[Framework], Field(max_length=2)] | None = None  # noqa: N815


class VerifyMessage(Asked):
    agentId: uuid.UUID  # noqa: N815
    payload: dict[str, Any]
    signature: Annotated[Text, Field(max_length=4096)]
    certificateSerial: Annotated[Text, Field(max_length=100)]  # noqa: N815


class ListAgents(Query):
    status: AgentStatus | None = None
    limit: Limit = 50
    before: uuid.UUID | None = Field(None, description="`next_cursor` of the page before.")


class ListEvents(Query):
    agent_id: uuid.UUID | None = None
    # The SDK sends a member of its enum by its name.
    band: Annotated[Band | None, BeforeValidator(_value)] = Field(
        None, description="high has what is critical as well."
    )
    action_type: Annotated[Text, Field(max_length=64)] | None = None
    limit: Limit = 50
    before: int | None = Field(None, ge=0, le=2**63 - 1, description="`next_cursor` of the page before.")


class ListChains(Query):
    status: ChainStatus | None = None
    limit: Limit = 50
    before: uuid.UUID | None = Field(None, description="`next_cursor` of the page before.")


class RiskWindow(Query):
    window_days: int = Field(7, ge=1, le=90)


# Answered -------------------------------------------------------------------------------------------


class Data(BaseModel, Generic[T]):
    data: T


class Pagination(BaseModel):
    limit: int
    has_next_page: bool
    next_cursor: str | None


class Page(BaseModel, Generic[T]):
    data: list[T]
    pagination: Pagination


class Problem(BaseModel):
    error: str = Field(description="For people.")
    code: str | None = Field(None, description="The SQLSTATE of docs/errors.md, where there is one.")
    hint: str | None = None


class Agent(BaseModel):
    id: uuid.UUID
    name: str
    model: str
    version: str
    status: AgentStatus = Field(
        description="active: not suspended, and with a certificate that may be used now."
    )
    model_hash: str | None
    metadata: dict[str, Any] = Field(
        description="`scopes` is what the certificate permits; `requested_scopes`, what was asked for."
    )
    created_at: dt.datetime
    tenant: str | None
    suspended_reason: str | None
    certificate_serial: str | None


class Certificate(BaseModel):
    id: str
    agent_id: uuid.UUID
    serial_number: str
    status: CertificateStatus
    pem: str
    issued_at: dt.datetime
    expires_at: dt.datetime
    permitted_actions: list[str]
    financial_scope: dict[str, Any] | None
    revoked_at: dt.datetime | None
    revocation_reason: str | None


class SignResult(BaseModel):
    signature: str
    algorithm: str
    certificate_serial: str
    payload_hash: str
    signed_at: dt.datetime


class HaltReceipt(BaseModel):
    agent_id: uuid.UUID
    halt_event_id: uuid.UUID
    certificate_serial: str | None
    halted_at: dt.datetime
    signature: str = Field(
        description="Base64, over the UTF-8 of `receipt`; empty while no authority has signed."
    )
    algorithm: str = ALGORITHM
    receipt: str
    key_id: str | None
    pending: str | None
    certificates_revoked: list[str]


class Drift(BaseModel):
    drift_score: float | None = None
    drift_band: Literal["stable", "moderate", "significant"] | None = None
    contributing_factors: list[str] | None = None
    computed_at: dt.datetime
    drift_trend: str
    note: str | None = None


class AgentRisk(BaseModel):
    agent_id: uuid.UUID
    risk_score: float
    risk_band: Band
    band: KitBand
    event_count: int
    high_risk_count: int
    medium_risk_count: int
    avg_risk_score: float
    drift: Drift
    window_days: int
    computed_at: dt.datetime
    recommendation: str


class Event(BaseModel):
    id: str
    agent_id: uuid.UUID
    action_type: str
    risk_score: float
    risk_band: Band
    band: KitBand
    occurred_at: str
    source_ip: None = None
    payload: Any
    session_id: str | None
    hash: str = Field(description="The entry's leaf hash in the ledger (RFC 6962).")
    agent_risk_score: float
    agent_band: KitBand
    revoked: bool | None


class ChainEvent(BaseModel):
    sequence: int
    event_id: str
    agent_id: uuid.UUID
    agent_name: str | None
    model_hash: str | None
    certificate_serial: str | None
    action_type: str
    risk_score: float
    risk_band: Band
    occurred_at: str
    details: Any
    hash: str


class ParticipatingAgent(BaseModel):
    agent_id: uuid.UUID
    agent_name: str | None
    model_hash: str | None
    certificate_serial: str | None
    certificate_status: CertificateStatus | None


class Chain(BaseModel):
    chain_id: uuid.UUID
    name: str
    description: str | None
    status: ChainStatus
    chain_hash: str | None = Field(description="Once it is closed.")
    event_count: int
    created_at: dt.datetime
    closed_at: dt.datetime | None
    metadata: dict[str, Any] | None


class WholeChain(Chain):
    events: list[ChainEvent]
    participating_agents: list[ParticipatingAgent]


class Report(BaseModel):
    id: uuid.UUID
    agent_id: uuid.UUID
    title: str
    status: Literal["ready"] = "ready"
    summary: str
    period_start: dt.datetime
    period_end: dt.datetime
    created_at: dt.datetime
    updated_at: dt.datetime
    sha256: str = Field(description="Of the document, as it is at .../document. The ledger has it.")
    report: dict[str, Any]


class MessageVerification(BaseModel):
    valid: bool
    signature_valid: bool
    certificate_status: CertificateStatus | None
    agent_id: uuid.UUID | None
    agent_name: str | None
    model_hash: str | None


class ChainVerification(BaseModel):
    chain_id: uuid.UUID
    name: str
    status: ChainStatus
    chain_hash: str
    event_count: int
    verified: bool
    note: str | None
    created_at: dt.datetime
    closed_at: dt.datetime | None


class CertificateVerification(BaseModel):
    serial_number: str
    valid: bool
    status: Literal["active", "revoked", "expired", "not_yet_valid", "suspended"]
    agent_id: uuid.UUID | None
    agent_name: str | None
    tenant: str | None
    model: str | None
    model_hash: str | None
    permitted_actions: list[str]
    financial_scope: dict[str, Any] | None
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    revoked_at: dt.datetime | None
    revocation_reason: str | None
    issuer_key_id: str | None


class JWKSet(BaseModel):
    """RFC 7517."""

    keys: list[dict[str, str]]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
