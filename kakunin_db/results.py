"""What the client's methods return. Times are aware; ids are UUIDs; serials are in their canonical form."""

from __future__ import annotations

import base64
import datetime as dt
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from .ca import ALGORITHM

Band = Literal["low", "medium", "high", "critical"]
Status = Literal["active", "revoked", "expired", "not_yet_valid", "suspended", "unknown"]


@dataclass(frozen=True)
class Agent:
    """An agent as its row has it. It can do nothing without a certificate."""

    agent_id: uuid.UUID
    name: str
    tenant: str | None
    model: str | None
    model_version: str | None
    model_hash: str | None
    created_at: dt.datetime
    suspended_at: dt.datetime | None
    suspended_reason: str | None

    @property
    def status(self) -> Literal["active", "suspended"]:
        return "active" if self.suspended_at is None else "suspended"


@dataclass(frozen=True)
class AgentRisk:
    """An agent's risk at this moment, over 30 days. ``score`` is from 0 to 1; ``by_event_type`` has of each
    type its ``events`` and its ``contribution``; ``drift`` is None while there is too little to compare."""

    agent_id: uuid.UUID
    score: float
    band: Band
    window_days: int
    events: int
    by_event_type: dict[str, dict[str, Any]]
    trend: Literal["rising", "falling", "stable", "insufficient_data"]
    drift: dict[str, Any] | None
    recommendation: str


@dataclass(frozen=True)
class Event:
    """An event in the ledger, with what it was scored with; scores are from 0 to 1. ``revoked`` is whether it
    took its agent's access, where the agent's score was high, and None elsewhere."""

    event_id: int
    agent_id: uuid.UUID
    event_type: str
    recorded_at: dt.datetime
    session_id: str | None
    metadata: Any
    score: float
    band: Band
    factors: dict[str, float]
    agent_score: float
    agent_band: Band
    revoked: bool | None
    chain: int
    sequence: int
    hash: str
    prev: str


@dataclass(frozen=True)
class ScopeDecision:
    """Whether an agent's certificate permits an action. ``code`` is the SQLSTATE of why not; risk and the
    certificate's serial are None where no certificate could be used."""

    allowed: bool
    action: str
    reason: str
    code: str | None
    agent_id: uuid.UUID | None = None
    certificate_serial: str | None = None
    risk_score: float | None = None
    risk_band: Band | None = None


@dataclass(frozen=True)
class LedgerKey:
    """A key that signs the ledger's tree heads."""

    key_id: str
    serial: str
    installation_id: uuid.UUID
    issuer_key_id: str
    not_before: dt.datetime
    not_after: dt.datetime
    registered_at: dt.datetime
    registered_by: str
    revoked_at: dt.datetime | None
    revocation_reason: str | None
    der: bytes = field(repr=False)

    @property
    def pem(self) -> str:
        return _pem(self.der)


@dataclass(frozen=True)
class LedgerStatus:
    """How far sealing and signing are. ``lag_seconds`` is the age of the oldest committed entry without a
    signature; ``leader`` the worker that leads, None where none does, and ``problem`` what it fails at."""

    tree_size: int
    signed_size: int
    lag_entries: int
    lag_seconds: float
    last_signed_at: dt.datetime | None
    leader: str | None
    leader_since: dt.datetime | None
    exported_size: int
    partitions_until: dt.datetime | None
    in_default_partition: bool
    key_expires_at: dt.datetime | None
    problem: str | None = None


@dataclass(frozen=True)
class AgentUpdate:
    """``next`` says what to do when certificates were revoked."""

    agent: Agent
    certificates_revoked: tuple[str, ...]
    next: str | None
    crl_pending: str | None


@dataclass(frozen=True)
class Certificate:
    """``revoked_at`` lies ahead in a certificate that another one is about to supersede.

    ``key_id`` names the agent's key where the certificate was just made, and is None elsewhere.
    """

    serial_number: str
    agent_id: uuid.UUID
    status: Status
    issuer_key_id: str
    not_before: dt.datetime
    not_after: dt.datetime
    model: str | None
    model_hash: str | None
    permitted_actions: tuple[str, ...]
    tenant: str | None
    financial_scope: dict[str, Any] | None
    revoked_at: dt.datetime | None
    revocation_reason: str | None
    der: bytes = field(repr=False)
    key_id: str | None = None

    @property
    def pem(self) -> str:
        return _pem(self.der)


@dataclass(frozen=True)
class Authority:
    """A pinned certificate authority. ``path_length`` is how many may come below it, None without a limit."""

    key_id: str
    issuer_key_id: str
    not_before: dt.datetime
    not_after: dt.datetime
    path_length: int | None
    distrusted_at: dt.datetime | None
    distrust_reason: str | None
    der: bytes = field(repr=False)

    @property
    def pem(self) -> str:
        return _pem(self.der)

    @property
    def name(self) -> str:
        return x509.load_der_x509_certificate(self.der).subject.rfc4514_string()


@dataclass(frozen=True)
class RevocationResult:
    """``crl_pending`` says why the revocation list does not have it yet; None when it has. Access is gone
    either way."""

    serial_number: str
    revoked_at: dt.datetime
    crl_pending: str | None


@dataclass(frozen=True)
class HaltReceipt:
    """What a halt did, and an authority's signature over ``receipt`` (UTF-8, RFC 8785).

    ``signature`` is base64; while the authority's key is out of reach it is None, ``pending`` says why, and
    the halt stands. ``authorities.sign_pending()`` adds it later.
    """

    halt_id: uuid.UUID
    agent_id: uuid.UUID
    halted_at: dt.datetime
    certificates_revoked: tuple[str, ...]
    receipt: str
    signature: str | None
    key_id: str | None
    pending: str | None = None
    crl_pending: str | None = None
    backends_terminated: int = 0
    backends_not_terminated: int = 0
    hint: str | None = None
    algorithm: str = ALGORITHM


@dataclass(frozen=True)
class CertificateVerification:
    """``valid`` is whether the certificate may be used at this moment."""

    serial_number: str
    valid: bool
    status: Status
    agent_id: uuid.UUID | None
    agent_name: str | None
    tenant: str | None
    model: str | None
    model_hash: str | None
    permitted_actions: tuple[str, ...]
    financial_scope: dict[str, Any] | None
    not_before: dt.datetime | None
    not_after: dt.datetime | None
    revoked_at: dt.datetime | None
    revocation_reason: str | None
    issuer_key_id: str | None


@dataclass(frozen=True)
class MessageVerification:
    """``valid`` is ``signature_valid`` and a certificate that may be used now."""

    valid: bool
    signature_valid: bool
    certificate_status: Status
    certificate_serial: str
    agent_id: uuid.UUID | None
    agent_name: str | None
    model_hash: str | None


@dataclass(frozen=True)
class RevocationList:
    """An authority's newest revocation list (RFC 5280 section 5), and how many certificates it lists."""

    key_id: str
    number: int
    this_update: dt.datetime
    next_update: dt.datetime
    entries: int
    der: bytes = field(repr=False)

    @property
    def pem(self) -> str:
        crl = x509.load_der_x509_crl(self.der)
        return crl.public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Pending:
    """What ``sign_pending()`` signed, and what still waits and why."""

    crls: tuple[str, ...]
    receipts: tuple[uuid.UUID, ...]
    waiting: tuple[str, ...]


def _pem(der: bytes) -> str:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM).decode()


def write_receipt(receipt: HaltReceipt, folder: str | Path) -> tuple[Path, Path | None]:
    """Writes ``<halt id>.json`` and, once it is signed, ``<halt id>.sig``, for ``openssl dgst -verify``."""
    body = Path(folder) / f"{receipt.halt_id}.json"
    body.write_bytes(receipt.receipt.encode())
    if receipt.signature is None:
        return body, None
    signature = body.with_suffix(".sig")
    signature.write_bytes(base64.b64decode(receipt.signature))
    return body, signature
