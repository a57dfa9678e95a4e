"""kakunin-db: cryptographic identity and row-level isolation for AI agents, inside Postgres."""

from __future__ import annotations

try:
    import psycopg as _  # noqa: F401
except ImportError as error:  # it says so at import when it finds no libpq
    raise ImportError(
        f"{error}\nInstall libpq (Debian: libpq5) or run: pip install 'kakunin-db[binary]'"
    ) from error

from .binding import bind_agent_session, flush_attempts
from .ca import AgentCertificate, CertificateAuthority
from .cache import AsyncCertificateCache, CertificateCache
from .client import AsyncKakunin, Kakunin
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
    PolicyViolationError,
    ReplicaLagError,
    RiskTooHighError,
    ScopeViolationError,
    SignerError,
    SignerUnavailableError,
    SpendLimitError,
    UnknownCertificateError,
    VerificationUnavailableError,
    WebhookVerificationError,
)
from .model_hash import compute_model_hash
from .monitoring import Monitor
from .scope import ScopeGuard, verify_agent_scope
from .serials import normalize_serial
from .signers import (
    KeyStore,
    KMSKeys,
    KMSSigner,
    LocalKeys,
    LocalSigner,
    PKCS11Keys,
    PKCS11Signer,
    Signer,
    open_keys,
    open_signer,
)
from .webhooks import verify_webhook

__all__ = [
    "AgentCertificate",
    "AgentCredential",
    "AgentSuspendedError",
    "AsyncCertificateCache",
    "AsyncKakunin",
    "BadInputError",
    "CertificateAuthority",
    "CertificateCache",
    "CertificateRevokedError",
    "CertificateValidityError",
    "CredentialRejectedError",
    "KMSKeys",
    "KMSSigner",
    "Kakunin",
    "KakuninError",
    "KeyStore",
    "LedgerAppendOnlyError",
    "LedgerIntegrityError",
    "LocalKeys",
    "LocalSigner",
    "Monitor",
    "PKCS11Keys",
    "PKCS11Signer",
    "PolicyViolationError",
    "ReplicaLagError",
    "RiskTooHighError",
    "ScopeGuard",
    "ScopeViolationError",
    "Signer",
    "SignerError",
    "SignerUnavailableError",
    "SpendLimitError",
    "UnknownCertificateError",
    "VerificationUnavailableError",
    "WebhookVerificationError",
    "bind_agent_session",
    "compute_model_hash",
    "flush_attempts",
    "normalize_serial",
    "open_keys",
    "open_signer",
    "verify_agent_scope",
    "verify_webhook",
]
