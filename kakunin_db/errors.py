"""Errors, one class to each SQLSTATE of the kit.

The database raises them (sql/10_foundation.sql lists the states); :func:`named` turns a driver's
exception into the class here. The driver's own exception stays as ``__cause__``.
"""

from __future__ import annotations

from typing import ClassVar


class KakuninError(Exception):
    """Whatever the kit refuses. ``sqlstate`` is the state in the database, ``hint`` the remedy."""

    sqlstate: ClassVar[str] = ""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownCertificateError(KakuninError):
    """KA001: the certificate is not registered in this database."""

    sqlstate = "KA001"


class CertificateRevokedError(KakuninError):
    """KA002: the certificate was revoked. Revocation is final."""

    sqlstate = "KA002"


class CertificateValidityError(KakuninError):
    """KA003: the certificate has expired or is not valid yet."""

    sqlstate = "KA003"


class CredentialRejectedError(KakuninError):
    """KA004: an assertion or ticket is malformed, stale, replayed, forged or for somebody else."""

    sqlstate = "KA004"


class ScopeViolationError(KakuninError):
    """KA005: the certificate does not permit the action."""

    sqlstate = "KA005"


class LedgerAppendOnlyError(KakuninError):
    """KA006: the ledger is append-only."""

    sqlstate = "KA006"


class LedgerIntegrityError(KakuninError):
    """KA007: the ledger does not verify."""

    sqlstate = "KA007"


class AgentSuspendedError(KakuninError):
    """KA008: the agent is suspended until an operator reinstates it."""

    sqlstate = "KA008"


class SpendLimitError(KakuninError):
    """KA009: over the certified spend limit."""

    sqlstate = "KA009"


class BadInputError(KakuninError, ValueError):
    """KA010: an argument is not what it must be; also raised in Python before anything is sent."""

    sqlstate = "KA010"


class WebhookVerificationError(KakuninError):
    """A received webhook is not signed with its endpoint's secret, too old, or malformed. No SQLSTATE."""


class SignerError(KakuninError):
    """A key cannot sign: denied, disabled, not found, of another kind, or another key signed. No SQLSTATE."""


class SignerUnavailableError(SignerError):
    """A key cannot sign now: the KMS or token does not answer, or asks to wait. Try again later."""


_BY_SQLSTATE: dict[str, type[KakuninError]] = {
    cls.sqlstate: cls
    for cls in (
        UnknownCertificateError,
        CertificateRevokedError,
        CertificateValidityError,
        CredentialRejectedError,
        ScopeViolationError,
        LedgerAppendOnlyError,
        LedgerIntegrityError,
        AgentSuspendedError,
        SpendLimitError,
        BadInputError,
    )
}


def named(error: BaseException) -> KakuninError | None:
    """The kit's error for a driver's or SQLAlchemy's exception; None where there is nothing to convert."""
    if isinstance(error, KakuninError):
        return None
    original = getattr(error, "orig", None) or error  # SQLAlchemy keeps the driver's exception there
    cls = _BY_SQLSTATE.get(getattr(original, "sqlstate", None) or "")
    if cls is None:
        return None
    # SQLAlchemy's adapter of asyncpg has an error of its own, made from asyncpg's.
    source = original.__cause__ if hasattr(original.__cause__, "sqlstate") else original
    diag = getattr(source, "diag", None)
    message = getattr(diag, "message_primary", None) or getattr(source, "message", None) or str(source)
    hint = getattr(diag, "message_hint", None) or getattr(source, "hint", None)
    return cls(message, hint)
