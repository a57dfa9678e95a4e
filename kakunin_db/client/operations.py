"""What the clients do, without a driver: generators that yield a query or a call and are sent the outcome.

That keeps the synchronous and the asynchronous client the same. A call may wait for a KMS; no transaction of
the client's own is open meanwhile, because each query commits by itself.

The keys are not the database's, so what it says is not believed where a key is used: an authority certifies
what the caller names, or what it has signed before (:func:`rotate`).
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import partial
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from ..ca import AgentCertificate, CertificateAuthority, Revocation
from ..credential import Payload, SignResult, payload_bytes, sign_payload
from ..errors import (
    AgentSuspendedError,
    BadInputError,
    CredentialRejectedError,
    KakuninError,
    ScopeViolationError,
    SignerError,
    SignerUnavailableError,
    UnknownCertificateError,
    VerificationUnavailableError,
    with_sqlstate,
)
from ..jsonb import loads
from ..results import (
    Agent,
    AgentRisk,
    AgentUpdate,
    Authority,
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
)
from ..serials import normalize_serial
from ..signers import KeyStore, Signer, open_keys, subject_key_id

T = TypeVar("T")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Query:
    """One statement; its outcome is its rows."""

    sql: str
    parameters: Sequence[Any] | Mapping[str, Any] = ()


@dataclass(frozen=True)
class Whole:
    """A call that makes or takes away keys: its outcome is waited for even when all is cancelled."""

    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


Step = Query | Callable[[], Any]
Steps = Generator[Step, Any, T]

AgentId = uuid.UUID | str


@dataclass(frozen=True, repr=False)  # a URI may have a PIN in it
class Setup:
    """Where keys are, and what certificates are to say beyond what each call gives.

    ``in_transaction`` is whether the caller's own transaction is open around each query, ``acting`` whether
    the client acts for an agent.
    """

    keys: KeyStore | str | None
    ca_keys: KeyStore | str | None
    crl_url: str | None
    in_transaction: Callable[[], bool]
    acting: Callable[[], bool]
    _opened: dict[str, KeyStore] = field(default_factory=dict)

    def store(self, *, ca: bool) -> KeyStore:
        """Opened once, when it is needed. Raises BadInputError when none was named."""
        keys = self.ca_keys if ca and self.ca_keys is not None else self.keys
        if keys is None:
            raise BadInputError(
                "no key store is named",
                "Give keys='awskms:', 'file:<folder>' or 'pkcs11:...' (KAKUNIN_KEYS for the command line).",
            )
        if not isinstance(keys, str):
            return keys
        return self._opened.get(keys) or self._opened.setdefault(keys, open_keys(keys))

    def crl_url_of(self, key_id: str) -> str | None:
        """Where this authority's revocation list will be."""
        if self.crl_url is None:
            return None
        return self.crl_url.replace("{key_id}", key_id.replace(":", "").lower())


def _columns(result: type[Any], *leave_out: str) -> str:
    return ", ".join(field.name for field in fields(result) if field.name not in leave_out)


def as_uuid(value: AgentId) -> uuid.UUID:
    try:
        return value if isinstance(value, uuid.UUID) else uuid.UUID(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInputError("an agent id is a UUID") from error


def _reason(error: Exception) -> str:
    hint = getattr(error, "hint", None)
    return f"{error}. {hint}" if hint else str(error)


def _take_back(
    error: BaseException, store: KeyStore, signers: Sequence[Signer], registered: Query | None
) -> Steps[bool]:
    """Takes away the keys of what ``error`` has stopped, unless it was registered all the same: returns
    whether it was. Raises nothing, so that the error stays the one that is seen; it says if a key is left."""
    if registered is not None and not isinstance(error, KakuninError):
        # No answer of the database says that it refused.
        try:
            if (yield registered):
                return True
        except BaseException as unknown:
            if getattr(unknown, "sqlstate", None) != "25P02":  # the caller's transaction has failed
                kept = ", ".join(signer.key_id for signer in signers)
                _say(error, f"Whether it was registered is not known, so the new key was kept: {kept}.")
                return False

    def discard() -> None:
        for signer in signers:
            try:
                store.discard(signer)
            except Exception as left:
                _say(error, f"The new key {signer.key_id} is left behind ({_reason(left)}): delete it.")

    yield Whole(discard)
    return False


def _say(error: BaseException, more: str) -> None:
    if isinstance(error, KakuninError):
        error.hint = f"{error.hint} {more}" if error.hint else more
    elif hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(more)


# Authorities ----------------------------------------------------------------------------------------


def list_authorities() -> Steps[list[Authority]]:
    rows = yield Query(
        f"select {_columns(Authority)} from kakunin.authorities order by not_after desc, key_id"
    )
    return [Authority(**row) for row in rows]


def create_authority(
    setup: Setup, name: str, *, intermediate: str | None, path_length: int
) -> Steps[list[Authority]]:
    """A root, and below it an intermediate where one is named: keys, certificates, pinned, all or nothing."""
    store = yield lambda: setup.store(ca=True)
    signers: list[Signer] = []
    made: list[CertificateAuthority] = []
    pinned: Query | None = None
    try:
        for common_name, length in [(name, 1), (intermediate, 0)] if intermediate else [(name, path_length)]:
            signer = yield Whole(partial(store.create, f"certificate authority {common_name}"))
            signers.append(signer)
            new = partial(
                CertificateAuthority.create,
                signer,
                common_name,
                issuer=made[-1] if made else None,
                path_length=length,
                crl_url=setup.crl_url_of(subject_key_id(signer.public_key())),
            )
            made.append((yield new))
        pinned = Query("select from kakunin.authorities where key_id = %s", [made[-1].key_id])
        yield Query("select kakunin.trust_ca(der) from unnest(%s::bytea[]) der", [[a.der for a in made]])
    except BaseException as error:
        stands = yield from _take_back(error, store, signers, pinned)
        if not (stands and isinstance(error, Exception)):
            raise
    return (yield from list_authorities())


def trust(der: bytes) -> Steps[str]:
    rows = yield Query("select kakunin.trust_ca(%s) as key_id", [der])
    return str(rows[0]["key_id"])


def distrust(key_id: str, reason: str) -> Steps[tuple[str, ...]]:
    rows = yield Query("select kakunin.distrust_ca(%s, %s) as serials", [key_id, reason])
    return tuple(rows[0]["serials"])


class NoAuthorityError(BadInputError):
    """No authority is trusted here, so nothing can be certified: for an operator to mend."""


def _open_authority(
    setup: Setup, key_id: str | None = None, *, to_certify: bool = False
) -> Steps[CertificateAuthority]:
    """A trusted authority whose key the store has: the named one, or the lowest in the chain.

    ``to_certify`` passes over those that have others below them, unless named: where the key of the lowest is
    denied or disabled, the root must not certify agents instead.
    """
    rows = yield Query(
        "select a.key_id, a.der from kakunin.authorities a"
        " where a.distrusted_at is null and now() between a.not_before and a.not_after"
        "   and a.key_id = coalesce(%(key_id)s, a.key_id)"
        "   and (%(any)s or not exists (select from kakunin.authorities b"
        "                                where b.issuer_key_id = a.key_id and b.key_id <> a.key_id))"
        " order by a.issuer_key_id = a.key_id, a.not_after desc",
        {"key_id": key_id, "any": key_id is not None or not to_certify},
    )
    if not rows:
        hint = "Make one with kakunin-db ca init, or pin one with kakunin.trust_ca(der)."
        if key_id is None:
            raise NoAuthorityError("no certificate authority for agents is trusted here", hint)
        raise BadInputError(f"no authority {key_id} is trusted here", hint)
    store = yield lambda: setup.store(ca=True)
    missing: SignerError | None = None
    for row in rows:
        certificate = x509.load_der_x509_certificate(row["der"])
        try:
            signer = yield partial(store.open, certificate.public_key())
        except SignerUnavailableError:
            raise
        except SignerError as error:
            missing = missing or error
            continue
        authority = CertificateAuthority(signer, certificate)
        authority.crl_url = setup.crl_url_of(authority.key_id)
        return authority
    assert missing is not None  # noqa: S101  (rows is not empty, so one was refused)
    raise missing


CRL_LIFETIME = dt.timedelta(days=7)


def sign_pending(setup: Setup, *, lifetime: dt.timedelta) -> Steps[Pending]:
    """Signs and stores every revocation list that is due and every receipt without a signature."""
    crls: list[str] = []
    receipts: list[uuid.UUID] = []
    waiting: list[str] = []
    down: KakuninError | None = None  # why nothing more is tried
    for row in (yield Query("select key_id from kakunin.crls_due()")):
        error = down
        if down is None:
            try:
                if (yield from _publish(setup, row["key_id"], lifetime)):
                    crls.append(row["key_id"])
            except KakuninError as failed:
                error = failed
                down = failed if isinstance(failed, SignerUnavailableError) else None
        if error is not None:
            waiting.append(f"revocation list of {row['key_id']}: {_reason(error)}")
    authority: CertificateAuthority | None = None
    for row in (
        yield Query("select halt_id, receipt from kakunin.halts where signature is null order by halted_at")
    ):
        error = down
        if down is None:
            try:
                authority = authority or (yield from _open_authority(setup))
                yield from _sign_receipt(authority, row["halt_id"], row["receipt"])
                receipts.append(row["halt_id"])
            except KakuninError as failed:
                error = failed
                down = failed if authority is None or isinstance(failed, SignerError) else None
        if error is not None:
            waiting.append(f"receipt of halt {row['halt_id']}: {_reason(error)}")
    return Pending(tuple(crls), tuple(receipts), tuple(waiting))


def _sign_receipt(authority: CertificateAuthority, halt_id: uuid.UUID, receipt: str) -> Steps[bytes]:
    signature: bytes = yield lambda: authority.sign_receipt(receipt)
    yield Query("select kakunin.sign_halt(%s, %s, %s)", [halt_id, authority.key_id, signature])
    return signature


def _publish(setup: Setup, key_id: str, lifetime: dt.timedelta) -> Steps[bool]:
    """Signs and stores the authority's revocation list; returns whether it was still due."""
    # A distrusted authority still says what it revoked; its key is opened by its certificate all the same.
    rows = yield Query("select der from kakunin.authorities where key_id = %s", [key_id])
    certificate = x509.load_der_x509_certificate(rows[0]["der"])
    store = yield lambda: setup.store(ca=True)
    signer = yield lambda: store.open(certificate.public_key())
    authority = CertificateAuthority(signer, certificate)
    for attempt in (1, 2, 3):
        numbers = yield Query("select next_number from kakunin.crls_due() where key_id = %s", [key_id])
        if not numbers:
            break  # another signer was quicker
        rows = yield Query("select serial, revoked_at, reason from kakunin.revocations(%s)", [key_id])
        revocations = [Revocation(**row) for row in rows]
        number = int(numbers[0]["next_number"])
        crl = yield partial(authority.revocation_list, revocations, number, lifetime=lifetime)
        try:
            yield Query("select kakunin.publish_crl(%s)", [crl.public_bytes(serialization.Encoding.DER)])
        except BadInputError:
            # Something was revoked while this was being signed, or another signer published: look again.
            if attempt == 3 or setup.in_transaction():
                raise
        else:
            return True
    return False


def _crl_pending(setup: Setup, serials: Sequence[str]) -> Steps[str | None]:
    """Publishes the lists that these revocations have made due; says why not, where that could not be.
    Whatever happens here, the revocation stands."""
    if not serials:
        return None
    if setup.in_transaction():
        return "The revocation is not committed yet. Then: authorities.sign_pending(), or kakunin-db crl."
    try:
        due = yield Query(
            "select d.key_id from kakunin.crls_due() d where d.key_id in"
            " (select c.issuer_key_id from kakunin.certificates c where c.serial = any(%s))",
            [list(serials)],
        )
        for row in due:
            yield from _publish(setup, row["key_id"], CRL_LIFETIME)
    except Exception as error:
        return _reason(error)
    return None


def revocation_lists() -> Steps[list[RevocationList]]:
    rows = yield Query(f"select {_columns(RevocationList)} from kakunin.crls order by key_id")
    return [RevocationList(**{**row, "number": int(row["number"])}) for row in rows]


# Agents ---------------------------------------------------------------------------------------------

_AGENT = f"select {_columns(Agent)} from kakunin.agents"


def get_agent(agent_id: AgentId) -> Steps[Agent]:
    rows = yield Query(f"{_AGENT} where agent_id = %s", [as_uuid(agent_id)])
    if not rows:
        raise BadInputError(f"no agent {agent_id}", "Create it with agents.create().")
    return Agent(**rows[0])


def list_agents(status: str | None, limit: int, before: dt.datetime | Agent | None) -> Steps[list[Agent]]:
    if status not in (None, "active", "suspended"):
        raise BadInputError("an agent's status is active or suspended")
    # Agents made in one transaction are of the same moment. The nil UUID comes before every agent's.
    last = (before.created_at, before.agent_id) if isinstance(before, Agent) else (before, uuid.UUID(int=0))
    rows = yield Query(
        f"{_AGENT} where (%s::text is null or (suspended_at is null) = (%s::text = 'active'))"
        " and (%s::timestamptz is null or (created_at, agent_id) < (%s, %s))"
        " order by created_at desc, agent_id desc limit %s",
        [status, status, last[0], *last, limit],
    )
    return [Agent(**row) for row in rows]


def create_agent(
    name: str, *, model: str | None, version: str | None, model_hash: str | None, tenant: str | None
) -> Steps[Agent]:
    rows = yield Query(
        "select kakunin.create_agent(%s, %s, %s, %s, %s) as agent_id",
        [name, tenant, model, version, model_hash],
    )
    return (yield from get_agent(rows[0]["agent_id"]))


def update_agent(
    setup: Setup,
    agent_id: AgentId,
    *,
    name: str | None,
    model: str | None,
    version: str | None,
    model_hash: str | None,
    tenant: str | None,
) -> Steps[AgentUpdate]:
    """None leaves as it is."""
    rows = yield Query(
        "select r.* from jsonb_to_record(kakunin.update_agent(%s, %s, %s, %s, %s, %s))"
        " as r(certificates_revoked text[], next text)",
        [as_uuid(agent_id), name, tenant, model, version, model_hash],
    )
    revoked = tuple(rows[0]["certificates_revoked"])
    pending = yield from _crl_pending(setup, revoked)
    agent = yield from get_agent(agent_id)
    return AgentUpdate(agent, revoked, rows[0]["next"], pending)


def certify(
    setup: Setup,
    agent_id: AgentId | Agent,
    *,
    permitted_actions: Sequence[str],
    financial_scope: Mapping[str, Any] | None,
    lifetime: dt.timedelta,
    overlap: dt.timedelta | None,
    authority: str | None,
) -> Steps[Certificate]:
    asked = agent_id.agent_id if isinstance(agent_id, Agent) else as_uuid(agent_id)
    agent = yield from get_agent(asked)
    if isinstance(agent_id, Agent) and _certified(agent) != _certified(agent_id):
        raise BadInputError(
            f"agent {asked} is not what it was: its model, model hash or tenant is another now",
            "Look at agents.get(), and certify it as it is if that is right.",
        )
    ca = yield from _open_authority(setup, authority, to_certify=True)
    return (
        yield from _issue(
            setup,
            ca,
            overlap,
            agent_id=asked,
            model=agent.model if agent.model_hash else None,
            model_hash=agent.model_hash,
            tenant=agent.tenant,
            permitted_actions=permitted_actions,
            financial_scope=financial_scope,
            lifetime=lifetime,
        )
    )


def _certified(agent: Agent) -> tuple[str | None, ...]:
    """What a certificate says of the agent and only its row knows."""
    return agent.model, agent.model_hash, agent.tenant


def _issue(
    setup: Setup,
    ca: CertificateAuthority,
    overlap: dt.timedelta | None,
    *,
    agent_id: uuid.UUID,
    **certificate: Any,
) -> Steps[Certificate]:
    """The agent's own key, a certificate for it, and its registration; the key goes again if that fails."""
    store = yield lambda: setup.store(ca=False)
    signer = yield Whole(lambda: store.create(f"agent {agent_id}"))
    registered: Query | None = None
    try:
        issued: AgentCertificate = yield lambda: ca.issue(agent_id, signer.public_key(), **certificate)
        registered = Query("select from kakunin.certificates where serial = %s", [issued.serial])
        yield Query("select kakunin.register_certificate(%s, %s)", [issued.der, overlap])
    except BaseException as error:
        stands = yield from _take_back(error, store, [signer], registered)
        if not (stands and isinstance(error, Exception)):
            raise
    found = yield from get_certificate(issued.serial)
    return replace(found, key_id=signer.key_id)


# The ledger's key ------------------------------------------------------------------------------------


def ledger_keys() -> Steps[list[LedgerKey]]:
    rows = yield Query(
        f"select {_columns(LedgerKey)} from kakunin.ledger_keys order by not_before desc, key_id"
    )
    return [LedgerKey(**row) for row in rows]


def create_ledger_key(setup: Setup, *, lifetime: dt.timedelta | None) -> Steps[LedgerKey]:
    """The key, a certificate for it, and its registration; the key goes again if that fails."""
    ca: CertificateAuthority = yield from _open_authority(setup, to_certify=True)
    installation = (yield Query("select kakunin.installation_id() as id"))[0]["id"]
    store = yield lambda: setup.store(ca=False)
    signer = yield Whole(lambda: store.create(f"ledger {installation}"))
    registered: Query | None = None
    try:
        certificate = yield lambda: ca.issue_ledger_key(installation, signer.public_key(), lifetime=lifetime)
        der = certificate.public_bytes(serialization.Encoding.DER)
        registered = Query("select from kakunin.ledger_keys where der = %s", [der])
        yield Query("select kakunin.register_ledger_key(%s)", [der])
    except BaseException as error:
        stands = yield from _take_back(error, store, [signer], registered)
        if not (stands and isinstance(error, Exception)):
            raise
    return next(key for key in (yield from ledger_keys()) if key.der == der)


def revoke_ledger_key(key_id: str, reason: str) -> Steps[dt.datetime]:
    rows = yield Query("select kakunin.revoke_ledger_key(%s, %s) as revoked_at", [key_id, reason])
    revoked_at: dt.datetime = rows[0]["revoked_at"]
    return revoked_at


def ledger_status() -> Steps[LedgerStatus]:
    status = (yield Query("select kakunin.ledger_status() as status"))[0]["status"]
    for member in ("last_signed_at", "leader_since", "partitions_until", "key_expires_at"):
        if status[member] is not None:
            status[member] = dt.datetime.fromisoformat(status[member])
    return LedgerStatus(**status)


def rotate(
    setup: Setup, agent_id: AgentId, *, overlap: dt.timedelta, lifetime: dt.timedelta | None
) -> Steps[Certificate]:
    """A new key and certificate with what the present one says.

    That is read from the certificate, and only where the key that is to sign the new one has signed it too: a
    row somebody edited, or an authority somebody pinned, must not become more than it was.
    """
    present = yield from _active(agent_id)
    ca = yield from _open_authority(setup, present.issuer_key_id)
    old = _certificate_of(as_uuid(agent_id), present, ca)
    certificate = old.certificate
    if lifetime is None:
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return (
        yield from _issue(
            setup,
            ca,
            overlap,
            agent_id=old.agent_id,
            model=old.model,
            model_hash=old.model_hash,
            tenant=old.tenant,
            permitted_actions=old.permitted_actions,
            financial_scope=old.financial_scope,
            lifetime=lifetime,
        )
    )


def _active(agent_id: AgentId) -> Steps[Certificate]:
    """The agent's certificate that is not about to be superseded."""
    rows = yield Query(
        f"{_CERTIFICATE} where agent_id = %s and revoked_at is null"
        " and now() between not_before and not_after",
        [as_uuid(agent_id)],
    )
    if not rows:
        raise UnknownCertificateError(
            f"agent {agent_id} has no active certificate", "Certify it with agents.certify()."
        )
    present = _certificate(rows[0])
    if present.status == "suspended":
        raise AgentSuspendedError(
            f"agent {agent_id} is suspended", "After review, an operator lifts it with agents.reinstate()."
        )
    return present


def _certificate_of(agent_id: uuid.UUID, present: Certificate, ca: CertificateAuthority) -> AgentCertificate:
    """What the row holds, if it is the agent's certificate, still valid, and signed by this authority."""
    try:
        found = AgentCertificate.from_der(present.der)
        found.certificate.verify_directly_issued_by(ca.certificate)
        if found.agent_id != agent_id or found.serial != present.serial_number:
            raise BadInputError("it is another one")
        if dt.datetime.now(dt.timezone.utc) > found.certificate.not_valid_after_utc:
            raise BadInputError("it has expired")
    except (InvalidSignature, ValueError, TypeError, IndexError) as error:
        raise BadInputError(
            f"what is registered as certificate {present.serial_number} is not what its authority signed",
            "The database has been tampered with. Find out how; then agents.certify() makes a new one.",
        ) from error
    return found


def sign(setup: Setup, agent_id: AgentId, payload: Payload) -> Steps[SignResult]:
    """With the key of the agent's certificate. Which that is says the database, so it has to be one that an
    authority whose key is in the store has signed: else a row could point to any key there is."""
    present = yield from _active(agent_id)
    ca = yield from _open_authority(setup, present.issuer_key_id)
    certificate = _certificate_of(as_uuid(agent_id), present, ca)
    store = yield lambda: setup.store(ca=False)
    signer = yield lambda: store.open(certificate.public_key)
    result: SignResult = yield lambda: sign_payload(signer, certificate.serial, payload)
    return result


def suspend(agent_id: AgentId, reason: str) -> Steps[Agent]:
    yield Query("select kakunin.suspend_agent(%s, %s)", [as_uuid(agent_id), reason])
    return (yield from get_agent(agent_id))


def reinstate(agent_id: AgentId) -> Steps[Agent]:
    yield Query("select kakunin.reinstate_agent(%s)", [as_uuid(agent_id)])
    return (yield from get_agent(agent_id))


def halt(setup: Setup, agent_id: AgentId, reason: str, *, terminate: bool) -> Steps[HaltReceipt]:
    """The halt first, and committed; then, as far as the authority's key can be reached, its signatures."""
    rows = yield Query(
        "select r.* from jsonb_to_record(kakunin.halt_agent(%s, %s, %s)) as r(halt_id uuid, agent_id uuid,"
        " halted_at timestamptz, certificates_revoked text[], backends_terminated int,"
        " backends_not_terminated int, hint text, receipt text)",
        [as_uuid(agent_id), reason, terminate],
    )
    row = rows[0] | {"certificates_revoked": tuple(rows[0]["certificates_revoked"])}
    receipt = HaltReceipt(**row, signature=None, key_id=None)
    if setup.in_transaction():
        # Signing now would hold the halt up until the KMS has answered.
        pending = "The halt is not committed yet. Then: authorities.sign_pending(), or kakunin-db crl."
        return replace(receipt, pending=pending, crl_pending=pending)
    try:
        authority = yield from _open_authority(setup)
        signature = yield from _sign_receipt(authority, receipt.halt_id, receipt.receipt)
    except Exception as error:  # whatever it is, the halt stands
        receipt = replace(receipt, pending=_reason(error))
        if isinstance(error, SignerUnavailableError):  # and not waited for once more
            return replace(receipt, crl_pending=receipt.pending)
    else:
        receipt = replace(receipt, signature=base64.b64encode(signature).decode(), key_id=authority.key_id)
    return replace(receipt, crl_pending=(yield from _crl_pending(setup, receipt.certificates_revoked)))


def halts(agent_id: AgentId | None) -> Steps[list[HaltReceipt]]:
    rows = yield Query(
        "select halt_id, agent_id, halted_at, serials, receipt, signature, key_id from kakunin.halts"
        " where agent_id = coalesce(%s, agent_id) order by halted_at",
        [None if agent_id is None else as_uuid(agent_id)],
    )
    return [
        HaltReceipt(
            halt_id=row["halt_id"],
            agent_id=row["agent_id"],
            halted_at=row["halted_at"],
            certificates_revoked=tuple(row["serials"]),
            receipt=row["receipt"],
            signature=None if row["signature"] is None else base64.b64encode(row["signature"]).decode(),
            key_id=row["key_id"],
            pending=None
            if row["signature"]
            else "No authority has signed it yet: authorities.sign_pending().",
        )
        for row in rows
    ]


# Events, and what an agent asks before it acts ---------------------------------------------------------


def agent_risk(agent_id: AgentId) -> Steps[AgentRisk]:
    return _risk((yield Query("select kakunin.agent_risk(%s) as risk", [as_uuid(agent_id)])))


def check_risk_score() -> Steps[AgentRisk]:
    return _risk((yield Query("select kakunin.check_risk_score() as risk")))


def _risk(rows: Rows) -> AgentRisk:
    risk = rows[0]["risk"]
    drift = risk["drift"] if isinstance(risk["drift"], dict) else None  # or the text insufficient_data
    return AgentRisk(**risk | {"agent_id": uuid.UUID(risk["agent_id"]), "drift": drift})


def verify_agent_scope(
    action: str,
    amount_usd: Decimal | float | None,
    venue: str | None,
    instrument: str | None,
    leverage: Decimal | float | None,
) -> Steps[ScopeDecision]:
    rows = yield Query(
        "select kakunin.verify_agent_scope(%s, %s, %s, %s, %s) as decision",
        [action, amount_usd, venue, instrument, leverage],
    )
    return _decision(rows[0]["decision"])


def _decision(found: dict[str, Any]) -> ScopeDecision:
    agent_id = found.get("agent_id")
    return ScopeDecision(**found | {"agent_id": None if agent_id is None else uuid.UUID(agent_id)})


def require_agent_scope(
    agent_id: AgentId | None, scopes: Sequence[str], *, in_transaction: bool
) -> Steps[None]:
    """``in_transaction``: the statement is not the first of its transaction."""
    expected = None if agent_id is None else as_uuid(agent_id)
    rows = yield Query(
        "select kakunin.current_agent_id() as agent_id, kakunin.verify_agent_scope(s.scope) as decision,"
        " current_setting('transaction_isolation') as isolation"
        " from kakunin.require_session() left join unnest(%s::text[]) s(scope) on true",
        [list(scopes)],
    )
    if in_transaction and {row["isolation"] for row in rows} - {"read committed"}:
        raise VerificationUnavailableError(
            f"a transaction that is {rows[0]['isolation'].upper()} shows how things were when it began",
            "End it first, or give the client a connection in READ COMMITTED, a pool or a DSN.",
        )
    acting = {row["agent_id"] for row in rows}
    if expected is not None and acting != {expected}:
        raise ScopeViolationError(
            f"this client acts for agent {', '.join(map(str, acting))}, and not for {expected}",
            "Guard each agent's tools with a client of its own credential.",
        )
    decisions = [_decision(row["decision"]) for row in rows if scopes]
    for decision in decisions:
        if decision.allowed is not True:
            refusal = with_sqlstate(decision.code) or ScopeViolationError
            raise refusal(decision.reason, _CERTIFY if refusal is ScopeViolationError else None)
    # Permitted is what was answered, not what was not refused.
    if None in acting or len(acting) != 1 or [decision.action for decision in decisions] != list(scopes):
        raise CredentialRejectedError("the database has not answered what it was asked")


# What kakunin.require_scope() says.
_CERTIFY = "Have the agent certified for this action, or do not attempt it."

# Metadata as text: a driver's own reader fails for numbers that the database can have.
_EVENT_OF = (
    "event_id, agent_id, event_type, recorded_at, session_id, metadata::text,"
    " chain, sequence, hash, prev, risk"
)


def create_event(
    event_type: str,
    metadata: Mapping[str, Any] | None,
    *,
    session_id: str | None,
    occurred_at: dt.datetime | None,
    agent_id: AgentId | None,
) -> Steps[Event]:
    try:
        text = json.dumps({} if metadata is None else metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadInputError("an event's metadata is a mapping that JSON can say", str(error)) from error
    rows = yield Query(
        "select kakunin.audit_log_append(%s, %s::jsonb, %s, %s) as event"
        " from (select kakunin.current_agent_id() as agent_id) b"
        " where coalesce(b.agent_id = %s, true)",
        [event_type, text, session_id, occurred_at, None if agent_id is None else as_uuid(agent_id)],
    )
    if not rows:
        raise ScopeViolationError(
            f"this client does not act for agent {agent_id}",
            "Record each agent's events with its own credential.",
        )
    event = rows[0]["event"]
    return _event(
        event
        | {
            "agent_id": uuid.UUID(event["agent_id"]),
            "recorded_at": dt.datetime.fromisoformat(event["recorded_at"].replace("Z", "+00:00")),
            "session_id": session_id,
            "metadata": json.loads(text),
            "risk": event,
        }
    )


def _event(row: dict[str, Any]) -> Event:
    risk = row["risk"]
    scored = ("score", "band", "factors", "agent_score", "agent_band")
    return Event(
        **{name.name: row[name.name] for name in fields(Event) if name.name not in (*scored, "revoked")},
        **{name: risk[name] for name in scored},
        revoked=risk.get("revoked"),
    )


def list_events(
    setup: Setup,
    agent_id: AgentId | None,
    event_type: str | None,
    band: str | None,
    *,
    limit: int,
    before: int | None,
) -> Steps[list[Event]]:
    asked = {
        "agent_id": agent_id and str(as_uuid(agent_id)),
        "event_type": event_type,
        "band": band,
        "before": before,
    }
    given = {name: value for name, value in asked.items() if value is not None}
    acting = setup.acting()
    if not acting:
        yield Query("select kakunin.record_read('list', %s::jsonb)", [json.dumps(given)])
    conditions = {
        "agent_id": "agent_id = %(agent_id)s::uuid",
        "event_type": "event_type = %(event_type)s",
        "band": "risk ->> 'band' = %(band)s",
        "before": "event_id < %(before)s",
    }
    where = "".join(f" and {conditions[name]}" for name in given)
    if acting:  # the login may be an auditor's as well, who is shown all
        where += " and agent_id = (select kakunin.current_agent_id())"
    rows = yield Query(
        f"select {_EVENT_OF} from kakunin.audit_log where risk is not null{where}"
        " order by event_id desc limit %(limit)s",
        {**given, "limit": limit},
    )
    return [_event(row | {"metadata": loads(row["metadata"])}) for row in rows]


# Certificates ---------------------------------------------------------------------------------------

_CERTIFICATE = (
    f"select {_columns(Certificate, 'serial_number', 'status', 'key_id')}, serial as serial_number,"
    " kakunin.verify_certificate(serial) ->> 'status' as status from kakunin.certificates"
)


def _certificate(row: dict[str, Any]) -> Certificate:
    return Certificate(**row | {"permitted_actions": tuple(row["permitted_actions"])})


def get_certificate(serial: str) -> Steps[Certificate]:
    rows = yield Query(f"{_CERTIFICATE} where serial = %s", [normalize_serial(serial)])
    if not rows:
        raise UnknownCertificateError(f"certificate {normalize_serial(serial)} is not registered here")
    return _certificate(rows[0])


def list_certificates(agent_id: AgentId | None) -> Steps[list[Certificate]]:
    rows = yield Query(
        f"{_CERTIFICATE} where agent_id = coalesce(%s, agent_id) order by registered_at desc, serial",
        [None if agent_id is None else as_uuid(agent_id)],
    )
    return [_certificate(row) for row in rows]


def revoke(setup: Setup, serial: str, reason: str) -> Steps[RevocationResult]:
    serial = normalize_serial(serial)
    rows = yield Query("select kakunin.revoke_certificate(%s, %s) as revoked_at", [serial, reason])
    return RevocationResult(serial, rows[0]["revoked_at"], (yield from _crl_pending(setup, [serial])))


# Verification -----------------------------------------------------------------------------------------


VERIFY_CERTIFICATE = (
    "r.* from jsonb_to_record(kakunin.verify_certificate(%s)) as r(serial_number text,"
    " valid boolean, status text, agent_id uuid, agent_name text, tenant text, model text,"
    " model_hash text, permitted_actions text[], financial_scope jsonb, not_before timestamptz,"
    " not_after timestamptz, revoked_at timestamptz, revocation_reason text, issuer_key_id text)"
)


def verification(row: dict[str, Any]) -> CertificateVerification:
    actions = tuple(row["permitted_actions"] or ())
    return CertificateVerification(**row | {"permitted_actions": actions})


def verify_certificate(serial: str) -> Steps[CertificateVerification]:
    rows = yield Query(f"select {VERIFY_CERTIFICATE}", [normalize_serial(serial)])
    return verification(rows[0])


def verify_message(
    payload: Payload, signature: str | bytes, certificate_serial: str, agent_id: AgentId | None
) -> Steps[MessageVerification]:
    if isinstance(signature, str):
        try:
            signature = base64.b64decode(signature, validate=True)
        except ValueError as error:
            raise BadInputError("a signature is bytes, or their base64") from error
    expected = None if agent_id is None else as_uuid(agent_id)
    rows = yield Query(
        "select r.* from jsonb_to_record(kakunin.verify_message(%s, %s, %s)) as r(valid boolean,"
        " signature_valid boolean, certificate_status text, certificate_serial text, agent_id uuid,"
        " agent_name text, model_hash text)",
        [normalize_serial(certificate_serial), payload_bytes(payload), signature],
    )
    result = MessageVerification(**rows[0])
    if expected is not None and result.agent_id != expected:
        return replace(result, valid=False)
    return result
