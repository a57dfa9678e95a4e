"""``bind_agent_session``: the one name application code uses."""

from __future__ import annotations

import sys
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

import psycopg
from psycopg.conninfo import conninfo_to_dict

from ..credential import AgentCredential
from ..errors import BadInputError
from ..signers import ECDSASigner, Signer
from ..tickets import Admission
from ..tokens import AGENT_ROLE, LIFETIME, Minter, key_of
from . import psycopg_
from .attempts import flush_attempts, recorder
from .bearer import Bearer

if TYPE_CHECKING:
    import supabase
    from psycopg_pool import AsyncConnectionPool, ConnectionPool
    from sqlalchemy import Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

    from ..cache import AsyncCertificateCache, CertificateCache
    from .supabase_ import BoundAsyncClient, BoundClient

__all__ = ["bind_agent_session", "flush_attempts"]

_Who = AgentCredential | Admission | str


@overload
def bind_agent_session(
    client: psycopg.Connection[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractContextManager[psycopg.Connection[Any]]: ...
@overload
def bind_agent_session(
    client: psycopg.AsyncConnection[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]: ...
@overload
def bind_agent_session(
    client: ConnectionPool[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractContextManager[psycopg.Connection[Any]]: ...
@overload
def bind_agent_session(
    client: AsyncConnectionPool[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]: ...
@overload
def bind_agent_session(
    client: Connection | Engine,
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractContextManager[Connection]: ...
@overload
def bind_agent_session(
    client: AsyncConnection | AsyncEngine,
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractAsyncContextManager[AsyncConnection]: ...
@overload
def bind_agent_session(
    client: Session | sessionmaker[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractContextManager[Session]: ...
@overload
def bind_agent_session(
    client: AsyncSession | async_sessionmaker[Any],
    credential_or_serial: _Who,
    *,
    record_attempts: bool = ...,
    attempts_dsn: str | None = ...,
) -> AbstractAsyncContextManager[AsyncSession]: ...
@overload
def bind_agent_session(
    client: supabase.Client,
    credential_or_serial: _Who,
    *,
    jwt_secret: str | bytes | None = ...,
    jwt_signer: Signer | ECDSASigner | str | None = ...,
    jwt_key_id: str | None = ...,
    role: str = ...,
    audience: str | None = ...,
    issuer: str | None = ...,
    lifetime: int = ...,
    certificates: CertificateCache | None = ...,
) -> BoundClient: ...
@overload
def bind_agent_session(
    client: supabase.AsyncClient,
    credential_or_serial: _Who,
    *,
    jwt_secret: str | bytes | None = ...,
    jwt_signer: Signer | ECDSASigner | str | None = ...,
    jwt_key_id: str | None = ...,
    role: str = ...,
    audience: str | None = ...,
    issuer: str | None = ...,
    lifetime: int = ...,
    certificates: AsyncCertificateCache | None = ...,
) -> BoundAsyncClient: ...
def bind_agent_session(
    client: Any,
    credential_or_serial: _Who,
    *,
    record_attempts: bool = True,
    attempts_dsn: str | None = None,
    **supabase_options: Any,
) -> Any:
    """Binds every transaction on ``client`` to an agent's certificate, for as long as the block lasts.

    A connection or session is given back as it came; a pool, engine or sessionmaker lends one for the
    block. ``async with`` for the asynchronous kinds. The binding is renewed with each transaction, tickets
    before they expire, and nothing of it is left when the block ends, whichever way it ends.

    With an :class:`AgentCredential` the agent's key proves who it is. With a serial, the login must hold
    ``kakunin_gateway``, and the database takes the caller's word for it: only for server code that has
    verified its caller and sends no SQL an agent wrote. What :mod:`kakunin_db.middleware` puts on a request
    is bound by the ticket for the agent's assertion where it has one, and by serial otherwise.

    On a psycopg connection in autocommit mode the binding is the session's until its ticket expires;
    never use that through a pooler in transaction mode.

    A statement that a policy or a missing privilege refuses (42501), or a scope (KA005), is an attempt: it is
    recorded in the ledger on another connection, as an ``unauthorized_access_attempt`` of the agent, without
    holding up the caller. Its error is ``PolicyViolationError`` or ``ScopeViolationError``, and of the
    driver's or SQLAlchemy's own class as well.

    :param record_attempts: False leaves them unrecorded.
    :param attempts_dsn: where they are recorded; by default with what ``client`` is connected with.

    **Supabase.** A ``supabase.Client`` or ``AsyncClient`` is left as it is, and a new one comes back whose
    requests carry ``X-Kakunin-Cert-Serial`` and a JWT of the agent, renewed before it expires; it can be
    used in a block, or closed. The certificate is verified first, and at each renewal, with a question to
    the project or, where ``certificates`` is given, to that cache. An ``AsyncClient`` does so before its
    first request, or at once where it is awaited: ``await bind_agent_session(...)``. The two keywords above
    are not for Supabase, and these for nothing else:

    :param jwt_secret: the project's JWT secret; signs with HS256. This or ``jwt_signer``.
    :param jwt_signer: a signer, or its URI (:func:`open_signer`), whose JWKS the project trusts: RS256, or
        ES256 with a P-256 key.
    :param jwt_key_id: the ``kid``; by default none with a secret, and the key's RFC 7638 thumbprint.
    :param role: the database's role for the requests; by default ``kakunin_agent``.
    :param audience: ``aud``; by default ``authenticated``, and None leaves it out.
    :param issuer: ``iss``; by default none.
    :param lifetime: seconds that a token lives at most, 1 to 300.
    :param certificates: an open ``CertificateCache``, or ``AsyncCertificateCache`` for an ``AsyncClient``.

    Raises the errors of :mod:`kakunin_db.errors`: when a transaction begins that cannot be bound
    (``UnknownCertificateError``, ``CertificateRevokedError``, ``CertificateValidityError``,
    ``CredentialRejectedError``, ``AgentSuspendedError``), ``BadInputError`` for a client it cannot bind,
    and, in place of the driver's, any of the kit's that leaves the block. For Supabase the same, and
    ``VerificationUnavailableError`` and ``SignerError``, also by the request that needed another token.
    """
    if (library := sys.modules.get("supabase")) is not None:
        for kind, name in ((library.Client, "bind"), (library.AsyncClient, "bind_async")):
            if isinstance(client, kind):
                if attempts_dsn is not None or not record_attempts:
                    raise TypeError("attempts are not recorded for a client of Supabase's")
                return _bound(client, credential_or_serial, name, **supabase_options)
    if supabase_options:
        raise TypeError(
            f"bind_agent_session() takes {', '.join(supabase_options)} with a client of Supabase's only"
        )
    if attempts_dsn is not None:
        try:
            conninfo_to_dict(attempts_dsn)
        except psycopg.ProgrammingError:  # which quotes what it does not understand
            raise BadInputError("attempts_dsn is not a connection string of libpq") from None
    bearer = Bearer(
        credential_or_serial,
        recorder=recorder if record_attempts else None,
        attempts_dsn=attempts_dsn,
    )
    binders: list[tuple[Any, Any]] = [
        (psycopg.Connection, psycopg_.Binding),
        (psycopg.AsyncConnection, psycopg_.AsyncBinding),
    ]
    # Not imported unless the caller has: the pool is an extra, and SQLAlchemy takes half a second.
    if (pool := sys.modules.get("psycopg_pool")) is not None:
        binders += [
            (pool.ConnectionPool, psycopg_.bind_pool),
            (pool.AsyncConnectionPool, psycopg_.bind_async_pool),
        ]
    if "sqlalchemy" in sys.modules:
        from .sqlalchemy_ import BINDERS  # noqa: PLC0415

        binders += BINDERS
    for kind, binder in binders:
        if isinstance(client, kind):
            return binder(client, bearer)
    raise BadInputError(
        f"cannot bind a {type(client).__module__}.{type(client).__qualname__}",
        "Give psycopg's connection or pool, SQLAlchemy's Connection, Engine, Session or sessionmaker, or"
        " Supabase's Client or AsyncClient.",
    )


def _bound(
    client: Any,
    credential_or_serial: _Who,
    binder: str,
    *,
    jwt_secret: str | bytes | None = None,
    jwt_signer: Signer | ECDSASigner | str | None = None,
    jwt_key_id: str | None = None,
    role: str = AGENT_ROLE,
    audience: str | None = "authenticated",
    issuer: str | None = None,
    lifetime: int = LIFETIME,
    certificates: Any = None,
) -> Any:
    from . import supabase_  # noqa: PLC0415  (an extra)

    key = key_of(jwt_secret, jwt_signer, jwt_key_id)
    minter = Minter(key, role=role, audience=audience, issuer=issuer, lifetime=lifetime)
    return getattr(supabase_, binder)(client, credential_or_serial, minter, certificates)
