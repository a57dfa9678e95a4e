"""The clients ``Kakunin`` and ``AsyncKakunin``: agents, certificates, authorities, events, verify.

Each method is one operation of operations.py; both clients share those, and their methods are the same.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from decimal import Decimal
from types import TracebackType
from typing import TYPE_CHECKING, Any, List, TypeVar

import psycopg

from ..ca import ONE_DAY
from ..credential import AgentCredential, Payload, SignResult
from ..results import (
    Agent,
    AgentRisk,
    AgentUpdate,
    Authority,
    Band,
    Certificate,
    CertificateVerification,
    Event,
    HaltReceipt,
    LedgerKey,
    LedgerStatus,
    MessageVerification,
    Pending,
    RevocationList,
    RevocationResult,
    ScopeDecision,
    write_receipt,
)
from ..signers import KeyStore
from . import operations as ops
from .connectors import AsyncConnector, Connector
from .operations import AgentId, Setup

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool, ConnectionPool

__all__ = [
    "Agent",
    "AgentRisk",
    "AgentUpdate",
    "AsyncKakunin",
    "Authority",
    "Certificate",
    "CertificateVerification",
    "Event",
    "HaltReceipt",
    "Kakunin",
    "LedgerKey",
    "LedgerStatus",
    "MessageVerification",
    "Pending",
    "RevocationList",
    "RevocationResult",
    "ScopeDecision",
    "SignResult",
    "write_receipt",
]

T = TypeVar("T")

ONE_HOUR = dt.timedelta(hours=1)


class _Resource:
    def __init__(self, connector: Connector, setup: Setup) -> None:
        self._connector = connector
        self._setup = setup

    def _run(self, steps: ops.Steps[T]) -> T:
        return self._connector.run(steps)


class _AsyncResource:
    def __init__(self, connector: AsyncConnector, setup: Setup) -> None:
        self._connector = connector
        self._setup = setup

    async def _run(self, steps: ops.Steps[T]) -> T:
        return await self._connector.run(steps)


class Authorities(_Resource):
    """Certificate authorities the database trusts. To make, pin or distrust one needs kakunin_operator."""

    def create(
        self, name: str = "Kakunin CA", *, intermediate: str | None = None, path_length: int = 0
    ) -> List[Authority]:
        """Makes a root, and below it an intermediate where that is named: key, certificate, pinned by
        ``trust_ca()``. Agents are then certified by the lowest. Returns all authorities.

        :param path_length: of a root without an intermediate: how many authorities may come below it."""
        return self._run(
            ops.create_authority(self._setup, name, intermediate=intermediate, path_length=path_length)
        )

    def list(self) -> List[Authority]:
        """All of them, distrusted ones too."""
        return self._run(ops.list_authorities())

    def trust(self, der: bytes) -> str:
        """Pins an authority by its certificate (DER); returns its key id. BadInputError for what is none."""
        return self._run(ops.trust(der))

    def distrust(self, key_id: str, reason: str = "unspecified") -> tuple[str, ...]:
        """Registers nothing more that it, or one below it, signed. With ``keyCompromise`` or
        ``cACompromise`` their certificates are revoked; returns the serials of those."""
        return self._run(ops.distrust(key_id, reason))

    def sign_pending(self, *, lifetime: dt.timedelta = ops.CRL_LIFETIME) -> Pending:
        """Signs and stores the revocation lists that are due (good for ``lifetime``) and the receipts
        without a signature. What could not be signed is in ``waiting``, with the reason. Needs
        kakunin_worker, kakunin_registrar or kakunin_operator."""
        return self._run(ops.sign_pending(self._setup, lifetime=lifetime))

    def revocation_lists(self) -> List[RevocationList]:
        """The newest revocation list of each authority."""
        return self._run(ops.revocation_lists())


class Agents(_Resource):
    """Agents and what they hold. Needs kakunin_registrar; suspending and halting need kakunin_operator."""

    def create(
        self,
        name: str,
        *,
        model: str | None = None,
        version: str | None = None,
        model_hash: str | None = None,
        tenant: str | None = None,
    ) -> Agent:
        """Makes an agent. It can do nothing until it is certified."""
        return self._run(
            ops.create_agent(name, model=model, version=version, model_hash=model_hash, tenant=tenant)
        )

    def get(self, agent_id: AgentId) -> Agent:
        """Raises BadInputError when there is none."""
        return self._run(ops.get_agent(agent_id))

    def list(
        self, *, status: str | None = None, limit: int = 50, before: dt.datetime | Agent | None = None
    ) -> List[Agent]:
        """The newest first, of those with this status (``active``, ``suspended``) made before a moment.

        :param before: the moment; or the last agent of a page, for the next."""
        return self._run(ops.list_agents(status, limit, before))

    def update(
        self,
        agent_id: AgentId,
        *,
        name: str | None = None,
        model: str | None = None,
        version: str | None = None,
        model_hash: str | None = None,
        tenant: str | None = None,
    ) -> AgentUpdate:
        """Changes what is given. A certificate that names another model, model hash or tenant is revoked
        in the same commit, and ``next`` says what to do."""
        return self._run(
            ops.update_agent(
                self._setup,
                agent_id,
                name=name,
                model=model,
                version=version,
                model_hash=model_hash,
                tenant=tenant,
            )
        )

    def certify(
        self,
        agent_id: AgentId | Agent,
        *,
        permitted_actions: Sequence[str] = (),
        financial_scope: Mapping[str, Any] | None = None,
        lifetime: dt.timedelta = 90 * ONE_DAY,
        overlap: dt.timedelta | None = None,
        authority: str | None = None,
    ) -> Certificate:
        """Makes the agent's own key in the key store and a certificate for it, and registers that.

        Actions and financial scope are what is given here. Model, model hash and tenant are what the agent's
        row says at this moment, which a registrar may change.

        :param agent_id: or the agent as :meth:`get` returned it: refused where it has changed since.
        :param permitted_actions: such as ``orders:read`` or ``orders:*``.
        :param financial_scope: a JSON object, such as ``{"max_single_trade_usd": 10000}``.
        :param lifetime: at most 365 days.
        :param overlap: how long an active certificate still counts; without it, having one is an error.
        :param authority: the key id of the authority to issue it; by default one that has none below it.
        :raises SignerError: a key could not be made or could not sign. Nothing was registered.

        Whatever fails, the new key is taken away again. Not so when a transaction of yours is rolled back."""
        return self._run(
            ops.certify(
                self._setup,
                agent_id,
                permitted_actions=permitted_actions,
                financial_scope=financial_scope,
                lifetime=lifetime,
                overlap=overlap,
                authority=authority,
            )
        )

    def rotate(
        self,
        agent_id: AgentId,
        *,
        overlap: dt.timedelta = ONE_HOUR,
        lifetime: dt.timedelta | None = None,
    ) -> Certificate:
        """A new key and certificate with what the present one says; that counts for the ``overlap``.

        The authority is the one that issued the present one, and its signature on that is checked. Another
        authority, or another scope, is for :meth:`certify`.

        :raises BadInputError: also when the registered certificate is not what that authority signed."""
        return self._run(ops.rotate(self._setup, agent_id, overlap=overlap, lifetime=lifetime))

    def sign(self, agent_id: AgentId, payload: Payload) -> SignResult:
        """Signs a message with the agent's key out of the key store. An agent that has its own signer uses
        :meth:`AgentCredential.sign`.

        The key of the authority that certified the agent has to be in its store too: that it signed the
        certificate is how the client knows which key is the agent's, whatever the database says.

        :raises AgentSuspendedError, UnknownCertificateError: it has no certificate that it may use.
        :raises BadInputError: the payload could be a session assertion, a signed HTTP request, or a
            certificate to be signed."""
        return self._run(ops.sign(self._setup, agent_id, payload))

    def suspend(self, agent_id: AgentId, reason: str) -> Agent:
        """Stops its certificates until :meth:`reinstate`."""
        return self._run(ops.suspend(agent_id, reason))

    def reinstate(self, agent_id: AgentId) -> Agent:
        """Lifts a suspension; what was revoked stays so."""
        return self._run(ops.reinstate(agent_id))

    def halt(self, agent_id: AgentId, reason: str, *, terminate: bool = False) -> HaltReceipt:
        """The kill switch: suspends the agent and revokes its certificates at once, and with ``terminate``
        ends the backends bound to them. Then an authority signs the receipt; where its key is out of reach
        the halt stands all the same, and ``pending`` says why.

        Waits for the signature as long as the key store's timeout lets it. To halt many, use a client without
        ``keys``, or one transaction of yours, and then :meth:`Authorities.sign_pending`."""
        return self._run(ops.halt(self._setup, agent_id, reason, terminate=terminate))

    def halts(self, agent_id: AgentId | None = None) -> List[HaltReceipt]:
        """Every halt, of one agent or of all, the oldest first."""
        return self._run(ops.halts(agent_id))

    def risk(self, agent_id: AgentId) -> AgentRisk:
        """Where its risk stands, over 30 days. Needs kakunin_operator or kakunin_auditor; an agent asks
        :meth:`Kakunin.check_risk_score` of itself. Raises BadInputError: no such agent."""
        return self._run(ops.agent_risk(agent_id))


class Certificates(_Resource):
    """Agents' certificates. Revoking needs kakunin_operator."""

    def get(self, serial: str) -> Certificate:
        """Raises UnknownCertificateError when it is not registered."""
        return self._run(ops.get_certificate(serial))

    def list(self, agent_id: AgentId | None = None) -> List[Certificate]:
        """Of one agent or of all, the newest first."""
        return self._run(ops.list_certificates(agent_id))

    def revoke(self, serial: str, reason: str = "unspecified") -> RevocationResult:
        """For good, at the next statement of every session. Reasons are those of RFC 5280, such as
        ``keyCompromise``. The revocation list follows as far as the authority's key can be reached."""
        return self._run(ops.revoke(self._setup, serial, reason))


class Ledger(_Resource):
    """The ledger's keys, and how far its signatures are. Making and revoking a key needs kakunin_operator."""

    def create_key(self, *, lifetime: dt.timedelta | None = None) -> LedgerKey:
        """Makes the key that signs tree heads, in ``keys``, certified by an authority (default: for 5 years,
        or what that has left) and registered. Earlier keys stay good. Raises SignerError, BadInputError."""
        return self._run(ops.create_ledger_key(self._setup, lifetime=lifetime))

    def keys(self) -> List[LedgerKey]:
        """All of them, the newest first."""
        return self._run(ops.ledger_keys())

    def revoke_key(self, key_id: str, reason: str = "unspecified") -> dt.datetime:
        """Takes no more tree heads by this key; returns when it was first revoked."""
        return self._run(ops.revoke_ledger_key(key_id, reason))

    def status(self) -> LedgerStatus:
        """How far sealing and signing are. Needs kakunin_worker, kakunin_operator or kakunin_auditor."""
        return self._run(ops.ledger_status())


class Events(_Resource):
    """What agents do, in the ledger. A client records events of the agent it acts for."""

    def create(
        self,
        event_type: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        session_id: str | None = None,
        occurred_at: dt.datetime | None = None,
        agent_id: AgentId | None = None,
    ) -> Event:
        """Appends an event and scores it (``kakunin.audit_log_append()``).

        :param event_type: such as ``api_call``, ``data_access`` or ``transaction_initiated``.
        :param metadata: what JSON can say, 16384 bytes of it at most; ``amount_usd``, ``venue``, ``rows``,
            ``tool`` and ``table`` are scored (docs/risk.md).
        :param occurred_at: when that was not now; within 30 days.
        :param agent_id: whose it must be, when that is known.

        Raises BadInputError, ScopeViolationError when the client acts for another agent, and those of
        :func:`~kakunin_db.bind_agent_session`."""
        return self._run(
            ops.create_event(
                event_type, metadata, session_id=session_id, occurred_at=occurred_at, agent_id=agent_id
            )
        )

    ingest = create

    def list(
        self,
        *,
        agent_id: AgentId | None = None,
        event_type: str | None = None,
        band: Band | None = None,
        limit: int = 50,
        before: int | None = None,
    ) -> List[Event]:
        """The newest first; ``before`` is an event's id, for the next page. Of the agent that the client acts
        for, or, for kakunin_auditor, of all: that reading is put on record."""
        return self._run(ops.list_events(self._setup, agent_id, event_type, band, limit=limit, before=before))


class Verify(_Resource):
    """What anybody may ask."""

    def certificate(self, serial: str) -> CertificateVerification:
        """Whether it may be used now, and what it says. An unknown one has the status ``unknown``."""
        return self._run(ops.verify_certificate(serial))

    def message(
        self,
        *,
        payload: Payload,
        signature: str | bytes,
        certificate_serial: str,
        agent_id: AgentId | None = None,
    ) -> MessageVerification:
        """Whether the certificate's key signed the payload and the certificate may be used now.

        :param signature: bytes, or their base64.
        :param agent_id: whose it must be, when that is known."""
        return self._run(ops.verify_message(payload, signature, certificate_serial, agent_id))


class Kakunin:
    """Identity for agents, in a database that has the kit.

    :param database: a DSN; a psycopg pool; or a connection, in whose transaction everything then happens.
    :param keys: where agents' keys are made and found: a key store, or its URI (``awskms:``,
        ``file:<folder>``, ``pkcs11:...``). Only what signs needs it.
    :param ca_keys: the same for the authorities' keys, where those are elsewhere. Keep them apart, as by a
        ``prefix`` in KMS: then no row in the database can have an authority's key taken for an agent's.
    :param crl_url: where the revocation list will be served; goes into certificates. ``{key_id}`` in it
        stands for the authority's key id in hexadecimal.
    :param credential: the agent that this client acts for, by its key; or, where the login holds
        ``kakunin_gateway``, its serial. Without it a connection that ``bind_agent_session()`` has bound acts
        for that agent.
    :param timeout: seconds that the database has for an answer, connecting apart, before
        ``psycopg.OperationalError``. Not on a connection of yours.

    Methods raise the errors in docs/errors.md, or psycopg's own.
    """

    def __init__(
        self,
        database: str | psycopg.Connection[Any] | ConnectionPool[Any],
        *,
        keys: KeyStore | str | None = None,
        ca_keys: KeyStore | str | None = None,
        crl_url: str | None = None,
        credential: AgentCredential | str | None = None,
        timeout: float | None = None,
    ) -> None:
        self._connector = Connector(database, credential, timeout)
        setup = Setup(keys, ca_keys, crl_url, self._connector.in_transaction, self._connector.acting)
        self.authorities = Authorities(self._connector, setup)
        self.agents = Agents(self._connector, setup)
        self.certificates = Certificates(self._connector, setup)
        self.events = Events(self._connector, setup)
        self.ledger = Ledger(self._connector, setup)
        self.verify = Verify(self._connector, setup)

    def verify_agent_scope(
        self,
        action: str,
        *,
        amount_usd: Decimal | float | None = None,
        venue: str | None = None,
        instrument: str | None = None,
        leverage: Decimal | float | None = None,
    ) -> ScopeDecision:
        """Whether the certificate of the agent that this acts for permits the action, now. It decides nothing
        by itself: policies do, and :func:`kakunin_db.verify_agent_scope` guards a function."""
        return self._connector.run(ops.verify_agent_scope(action, amount_usd, venue, instrument, leverage))

    def require_agent_scope(self, *actions: str, agent_id: AgentId | None = None) -> None:
        """Returns if the certificate of the agent that this acts for may be used now, permits every action,
        and the agent is ``agent_id`` where that is given.

        Raises what says why not: CertificateRevokedError, CertificateValidityError, AgentSuspendedError,
        UnknownCertificateError, CredentialRejectedError (also where nobody is bound), ScopeViolationError;
        VerificationUnavailableError within a transaction of the caller's above READ COMMITTED."""
        self._connector.run(
            ops.require_agent_scope(agent_id, actions, in_transaction=self._connector.in_transaction())
        )

    def check_risk_score(self) -> AgentRisk:
        """Where the risk of the agent that this acts for stands, and what it had better do."""
        return self._connector.run(ops.check_risk_score())

    def acts_as(self) -> tuple[str, AgentCredential | str]:
        """A DSN like this client's, and the credential or serial it acts by. Raises BadInputError where it
        acts for nobody."""
        return self._connector.acts_as()

    def close(self) -> None:
        """Closes the connection that this made; never one it was given."""
        self._connector.close()

    def __enter__(self) -> Kakunin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncAuthorities(_AsyncResource):
    """:class:`Authorities` for asyncio."""

    async def create(
        self, name: str = "Kakunin CA", *, intermediate: str | None = None, path_length: int = 0
    ) -> List[Authority]:
        """See :meth:`Authorities.create`."""
        return await self._run(
            ops.create_authority(self._setup, name, intermediate=intermediate, path_length=path_length)
        )

    async def list(self) -> List[Authority]:
        """See :meth:`Authorities.list`."""
        return await self._run(ops.list_authorities())

    async def trust(self, der: bytes) -> str:
        """See :meth:`Authorities.trust`."""
        return await self._run(ops.trust(der))

    async def distrust(self, key_id: str, reason: str = "unspecified") -> tuple[str, ...]:
        """See :meth:`Authorities.distrust`."""
        return await self._run(ops.distrust(key_id, reason))

    async def sign_pending(self, *, lifetime: dt.timedelta = ops.CRL_LIFETIME) -> Pending:
        """See :meth:`Authorities.sign_pending`."""
        return await self._run(ops.sign_pending(self._setup, lifetime=lifetime))

    async def revocation_lists(self) -> List[RevocationList]:
        """See :meth:`Authorities.revocation_lists`."""
        return await self._run(ops.revocation_lists())


class AsyncAgents(_AsyncResource):
    """:class:`Agents` for asyncio."""

    async def create(
        self,
        name: str,
        *,
        model: str | None = None,
        version: str | None = None,
        model_hash: str | None = None,
        tenant: str | None = None,
    ) -> Agent:
        """See :meth:`Agents.create`."""
        return await self._run(
            ops.create_agent(name, model=model, version=version, model_hash=model_hash, tenant=tenant)
        )

    async def get(self, agent_id: AgentId) -> Agent:
        """See :meth:`Agents.get`."""
        return await self._run(ops.get_agent(agent_id))

    async def list(
        self, *, status: str | None = None, limit: int = 50, before: dt.datetime | Agent | None = None
    ) -> List[Agent]:
        """See :meth:`Agents.list`."""
        return await self._run(ops.list_agents(status, limit, before))

    async def update(
        self,
        agent_id: AgentId,
        *,
        name: str | None = None,
        model: str | None = None,
        version: str | None = None,
        model_hash: str | None = None,
        tenant: str | None = None,
    ) -> AgentUpdate:
        """See :meth:`Agents.update`."""
        return await self._run(
            ops.update_agent(
                self._setup,
                agent_id,
                name=name,
                model=model,
                version=version,
                model_hash=model_hash,
                tenant=tenant,
            )
        )

    async def certify(
        self,
        agent_id: AgentId | Agent,
        *,
        permitted_actions: Sequence[str] = (),
        financial_scope: Mapping[str, Any] | None = None,
        lifetime: dt.timedelta = 90 * ONE_DAY,
        overlap: dt.timedelta | None = None,
        authority: str | None = None,
    ) -> Certificate:
        """See :meth:`Agents.certify`."""
        return await self._run(
            ops.certify(
                self._setup,
                agent_id,
                permitted_actions=permitted_actions,
                financial_scope=financial_scope,
                lifetime=lifetime,
                overlap=overlap,
                authority=authority,
            )
        )

    async def rotate(
        self,
        agent_id: AgentId,
        *,
        overlap: dt.timedelta = ONE_HOUR,
        lifetime: dt.timedelta | None = None,
    ) -> Certificate:
        """See :meth:`Agents.rotate`."""
        return await self._run(ops.rotate(self._setup, agent_id, overlap=overlap, lifetime=lifetime))

    async def sign(self, agent_id: AgentId, payload: Payload) -> SignResult:
        """See :meth:`Agents.sign`."""
        return await self._run(ops.sign(self._setup, agent_id, payload))

    async def suspend(self, agent_id: AgentId, reason: str) -> Agent:
        """See :meth:`Agents.suspend`."""
        return await self._run(ops.suspend(agent_id, reason))

    async def reinstate(self, agent_id: AgentId) -> Agent:
        """See :meth:`Agents.reinstate`."""
        return await self._run(ops.reinstate(agent_id))

    async def halt(self, agent_id: AgentId, reason: str, *, terminate: bool = False) -> HaltReceipt:
        """See :meth:`Agents.halt`."""
        return await self._run(ops.halt(self._setup, agent_id, reason, terminate=terminate))

    async def halts(self, agent_id: AgentId | None = None) -> List[HaltReceipt]:
        """See :meth:`Agents.halts`."""
        return await self._run(ops.halts(agent_id))

    async def risk(self, agent_id: AgentId) -> AgentRisk:
        """See :meth:`Agents.risk`."""
        return await self._run(ops.agent_risk(agent_id))


class AsyncCertificates(_AsyncResource):
    """:class:`Certificates` for asyncio."""

    async def get(self, serial: str) -> Certificate:
        """See :meth:`Certificates.get`."""
        return await self._run(ops.get_certificate(serial))

    async def list(self, agent_id: AgentId | None = None) -> List[Certificate]:
        """See :meth:`Certificates.list`."""
        return await self._run(ops.list_certificates(agent_id))

    async def revoke(self, serial: str, reason: str = "unspecified") -> RevocationResult:
        """See :meth:`Certificates.revoke`."""
        return await self._run(ops.revoke(self._setup, serial, reason))


class AsyncLedger(_AsyncResource):
    """:class:`Ledger` for asyncio."""

    async def create_key(self, *, lifetime: dt.timedelta | None = None) -> LedgerKey:
        """See :meth:`Ledger.create_key`."""
        return await self._run(ops.create_ledger_key(self._setup, lifetime=lifetime))

    async def keys(self) -> List[LedgerKey]:
        """See :meth:`Ledger.keys`."""
        return await self._run(ops.ledger_keys())

    async def revoke_key(self, key_id: str, reason: str = "unspecified") -> dt.datetime:
        """See :meth:`Ledger.revoke_key`."""
        return await self._run(ops.revoke_ledger_key(key_id, reason))

    async def status(self) -> LedgerStatus:
        """See :meth:`Ledger.status`."""
        return await self._run(ops.ledger_status())


class AsyncEvents(_AsyncResource):
    """:class:`Events` for asyncio."""

    async def create(
        self,
        event_type: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        session_id: str | None = None,
        occurred_at: dt.datetime | None = None,
        agent_id: AgentId | None = None,
    ) -> Event:
        """See :meth:`Events.create`."""
        return await self._run(
            ops.create_event(
                event_type, metadata, session_id=session_id, occurred_at=occurred_at, agent_id=agent_id
            )
        )

    ingest = create

    async def list(
        self,
        *,
        agent_id: AgentId | None = None,
        event_type: str | None = None,
        band: Band | None = None,
        limit: int = 50,
        before: int | None = None,
    ) -> List[Event]:
        """See :meth:`Events.list`."""
        return await self._run(
            ops.list_events(self._setup, agent_id, event_type, band, limit=limit, before=before)
        )


class AsyncVerify(_AsyncResource):
    """:class:`Verify` for asyncio."""

    async def certificate(self, serial: str) -> CertificateVerification:
        """See :meth:`Verify.certificate`."""
        return await self._run(ops.verify_certificate(serial))

    async def message(
        self,
        *,
        payload: Payload,
        signature: str | bytes,
        certificate_serial: str,
        agent_id: AgentId | None = None,
    ) -> MessageVerification:
        """See :meth:`Verify.message`."""
        return await self._run(ops.verify_message(payload, signature, certificate_serial, agent_id))


class AsyncKakunin:
    """The client for asyncio. Its arguments and methods are those of :class:`Kakunin`."""

    def __init__(
        self,
        database: str | psycopg.AsyncConnection[Any] | AsyncConnectionPool[Any],
        *,
        keys: KeyStore | str | None = None,
        ca_keys: KeyStore | str | None = None,
        crl_url: str | None = None,
        credential: AgentCredential | str | None = None,
        timeout: float | None = None,
    ) -> None:
        self._connector = AsyncConnector(database, credential, timeout)
        setup = Setup(keys, ca_keys, crl_url, self._connector.in_transaction, self._connector.acting)
        self.authorities = AsyncAuthorities(self._connector, setup)
        self.agents = AsyncAgents(self._connector, setup)
        self.certificates = AsyncCertificates(self._connector, setup)
        self.events = AsyncEvents(self._connector, setup)
        self.ledger = AsyncLedger(self._connector, setup)
        self.verify = AsyncVerify(self._connector, setup)

    async def verify_agent_scope(
        self,
        action: str,
        *,
        amount_usd: Decimal | float | None = None,
        venue: str | None = None,
        instrument: str | None = None,
        leverage: Decimal | float | None = None,
    ) -> ScopeDecision:
        """See :meth:`Kakunin.verify_agent_scope`."""
        return await self._connector.run(
            ops.verify_agent_scope(action, amount_usd, venue, instrument, leverage)
        )

    async def require_agent_scope(self, *actions: str, agent_id: AgentId | None = None) -> None:
        """See :meth:`Kakunin.require_agent_scope`."""
        await self._connector.run(
            ops.require_agent_scope(agent_id, actions, in_transaction=self._connector.in_transaction())
        )

    async def check_risk_score(self) -> AgentRisk:
        """See :meth:`Kakunin.check_risk_score`."""
        return await self._connector.run(ops.check_risk_score())

    def acts_as(self) -> tuple[str, AgentCredential | str]:
        """A DSN like this client's, and the credential or serial it acts by. Raises BadInputError where it
        acts for nobody."""
        return self._connector.acts_as()

    async def aclose(self) -> None:
        """Closes the connection that this made; never one it was given."""
        await self._connector.close()

    async def __aenter__(self) -> AsyncKakunin:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()
