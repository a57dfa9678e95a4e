"""Errors, one class to each SQLSTATE of the kit.

The database raises them (sql/10_foundation.sql lists the states); :func:`named` turns a driver's
exception into the class here. The driver's own exception stays as ``__cause__``.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast


class KakuninError(Exception):
    """Whatever the kit refuses. ``sqlstate`` is the state in the database, ``hint`` the remedy.

    ``str()`` is the message alone, which answers and logs have beside the hint; a traceback shows both, from
    Python 3.11 on (PEP 678).
    """

    sqlstate: ClassVar[str] = ""
    _hint: str | None = None

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    @property
    def hint(self) -> str | None:
        return self._hint

    @hint.setter
    def hint(self, hint: str | None) -> None:
        notes = [note for note in getattr(self, "__notes__", ()) if note != f"hint: {self._hint}"]
        self._hint = hint
        # A list of its own: that of an error which this one was made from stays as it was.
        self.__notes__ = notes + [f"hint: {hint}"] * bool(hint)


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
    """KA009: outside the certified financial scope: amount, day, venue, instrument or leverage."""

    sqlstate = "KA009"


class BadInputError(KakuninError, ValueError):
    """KA010: an argument is not what it must be; also raised in Python before anything is sent."""

    sqlstate = "KA010"


class RiskTooHighError(KakuninError):
    """KA011: the agent's risk is too high for this, for now."""

    sqlstate = "KA011"


class ReplicaLagError(KakuninError):
    """KA012: the standby is too far behind its primary to answer agents."""

    sqlstate = "KA012"


class PolicyViolationError(KakuninError):
    """42501: row security or a missing privilege refused a statement of a bound session."""

    sqlstate = "42501"


class VerificationUnavailableError(KakuninError):
    """Whether an agent may act could not be found out: nobody answered, or not in time. So it may not.
    No SQLSTATE."""


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
        RiskTooHighError,
        ReplicaLagError,
    )
}


def named(error: BaseException) -> KakuninError | None:
    """The kit's error for a driver's, SQLAlchemy's or PostgREST's client's exception; None where there is
    nothing to convert."""
    if isinstance(error, KakuninError):
        return None
    original = getattr(error, "orig", None) or error  # SQLAlchemy keeps the driver's exception there
    state = getattr(original, "sqlstate", None) or getattr(original, "code", None)
    cls = with_sqlstate(state)
    return None if cls is None else cls(*_said(error))


def with_sqlstate(state: object) -> type[KakuninError] | None:
    """The class of one of the kit's states; None for any other."""
    return _BY_SQLSTATE.get(state) if isinstance(state, str) else None


def refused(error: BaseException) -> KakuninError | None:
    """The kit's error for a statement that failed on a policy (42501) or a scope (KA005); otherwise None.

    It is of the exception's own class as well and has its attributes, so that code which catches the
    driver's goes on to. ``str()`` is the message alone.
    """
    if isinstance(error, KakuninError):
        return None
    original = getattr(error, "orig", None) or error
    state = getattr(original, "sqlstate", None)
    cls = next((c for c in (PolicyViolationError, ScopeViolationError) if c.sqlstate == state), None)
    if cls is None:
        return None
    message, hint = _said(error)
    both: Any = _both(cls, cast(Any, type(error)))
    ours: Any = both.__new__(both, message)  # not the driver's __init__, which wants what it is made of
    ours.__dict__.update(error.__dict__)
    ours.args, ours.hint = (message,), hint
    return cast(KakuninError, ours)


@functools.cache
def _both(ours: type[KakuninError], theirs: Any) -> type[KakuninError]:
    def reduce(error: Any) -> Any:  # as ours alone: a class made here is not found by its name
        return ours, (*error.args, error.hint)

    members = {
        "__module__": ours.__module__,
        "__doc__": ours.__doc__,
        "__str__": Exception.__str__,
        "__repr__": Exception.__repr__,
        "__reduce__": reduce,
    }
    return type(ours.__name__, (ours, theirs), members)


def _source(error: BaseException) -> Any:
    """The driver's exception: SQLAlchemy has one around it, and its adapter of asyncpg another of its own."""
    original = getattr(error, "orig", None) or error
    return original.__cause__ if hasattr(original.__cause__, "sqlstate") else original


def _said(error: BaseException) -> tuple[str, str | None]:
    """The server's message and hint."""
    source = _source(error)
    diag = getattr(source, "diag", None)
    message = getattr(diag, "message_primary", None) or getattr(source, "message", None) or str(source)
    hint = getattr(diag, "message_hint", None) or getattr(source, "hint", None)
    return message, hint


def about(error: BaseException) -> dict[str, str]:
    """The names of the ``schema`` and ``table`` a driver's exception gives, cut to the length of a name."""
    source = _source(error)
    diag = getattr(source, "diag", source)
    names = {part: getattr(diag, f"{part}_name", None) for part in ("schema", "table")}
    # Whoever raises an error in SQL may give any text.
    return {part: name[:63] for part, name in names.items() if isinstance(name, str) and name}
