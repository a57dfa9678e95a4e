"""kakunin-db: cryptographic identity and row-level isolation for AI agents, inside Postgres."""

from __future__ import annotations

from .binding import bind_agent_session
from .ca import AgentCertificate, LocalCA
from .credential import AgentCredential
from .errors import (
    AgentSuspendedError,
    BadInputError,
    CertificateRevokedError,
    CertificateValidityError,
    CredentialRejectedError,
    KakuninError,
    LedgerAppendOnlyError,
    LedgerIntegrityError,
    ScopeViolationError,
    SpendLimitError,
    UnknownCertificateError,
)
from .serials import normalize_serial
from .signers import LocalSigner, Signer

__all__ = [
    "AgentCertificate",
    "AgentCredential",
    "AgentSuspendedError",
    "BadInputError",
    "CertificateRevokedError",
    "CertificateValidityError",
    "CredentialRejectedError",
    "KakuninError",
    "LedgerAppendOnlyError",
    "LedgerIntegrityError",
    "LocalCA",
    "LocalSigner",
    "ScopeViolationError",
    "Signer",
    "SpendLimitError",
    "UnknownCertificateError",
    "bind_agent_session",
    "normalize_serial",
]
