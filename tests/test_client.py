"""The clients: an agent's whole life through Kakunin and AsyncKakunin, and what goes wrong on the way.

One set of tests for both: `Client` runs the asynchronous one's coroutines in a loop of its own. Every login
holds the one role that the documentation of a method names.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import functools
import hashlib
import inspect
import itertools
import json
import subprocess
import sys
import threading
import time
import types
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest
from clients import HOW, Client, Kind, Methods, Opener, opener
from cluster import Cluster
from conftest import Database, fresh_database
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509 import ocsp
from kms import HSM, PASS, Answer, Fault, Wire, error, good, instead, quick_key, serve_kms, softhsm
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from kakunin_db import (
    AgentCertificate,
    AgentCredential,
    AgentSuspendedError,
    AsyncKakunin,
    BadInputError,
    CertificateAuthority,
    Kakunin,
    KeyStore,
    LocalKeys,
    LocalSigner,
    Signer,
    SignerError,
    SignerUnavailableError,
    UnknownCertificateError,
    ca,
    results,
)
from kakunin_db import client as clients
from kakunin_db.ca import _der
from kakunin_db.client import connectors, operations, write_receipt
from kakunin_db.credential import sign_payload
from kakunin_db.signers import subject_key_id

HOUR = dt.timedelta(hours=1)
DAY = dt.timedelta(days=1)
NOBODY = uuid.UUID(int=7)
HASH = "sha256:" + "ab" * 32
OTHER_HASH = "sha256:" + "cd" * 32
SCOPE = {"max_single_trade_usd": 10000, "permitted_venues": ["NYSE", "東京"]}
# Logins of this module beside conftest's, with the role they hold.
LOGINS = {"client_auditor": "kakunin_auditor", "client_worker": "kakunin_worker"}


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def alternating(name: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """Each of the values with one kind of client: for what does not depend on it."""
    kinds = itertools.cycle(["sync", "async"])
    return pytest.mark.parametrize(("kind", name), [(next(kinds), value) for value in values])


@contextlib.contextmanager
def bare_database(cluster: Cluster) -> Iterator[Database]:
    """One that trusts no authority yet."""
    with fresh_database(cluster) as database:
        database.run("installer", "delete from kakunin_private.authorities")
        with cluster.connect(autocommit=True) as admin:
            for login, role in LOGINS.items():
                with contextlib.suppress(psycopg.errors.DuplicateObject):
                    admin.execute(f"create role {login} login")
                    admin.execute(f"grant {role} to {login}")
        yield database


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Database]:
    with bare_database(cluster) as database:
        yield database


@dataclass
class Place:
    """A database, a store of keys, and in both a root and an intermediate authority."""

    database: Database
    owner: psycopg.Connection[Any]
    keys: KeyStore
    found: Callable[[], set[str]]
    root: CertificateAuthority
    ca: CertificateAuthority

    def run(self, query: str, *parameters: Any) -> None:
        """As the owner of the kit."""
        self.owner.execute(query, parameters)

    def certificates(self, agent_id: uuid.UUID) -> int:
        counting = "select count(*) from kakunin.certificates where agent_id = %s"
        return (self.owner.execute(counting, [agent_id]).fetchone() or (0,))[0]

    @contextlib.contextmanager
    def unchanged(self, *agents: Any) -> Iterator[None]:
        """No key is left behind, and nothing registered for these."""
        before = self.found(), [self.certificates(agent.agent_id) for agent in agents]
        yield
        assert (self.found(), [self.certificates(agent.agent_id) for agent in agents]) == before


@contextlib.contextmanager
def settled(cluster: Cluster, keys: KeyStore, found: Callable[[], set[str]]) -> Iterator[Place]:
    with (
        bare_database(cluster) as database,
        database.connect("installer", autocommit=True) as owner,
        Kakunin(database.dsn("operator"), keys=keys) as operator,
    ):
        operator.authorities.create("Client Root CA", intermediate="Client Agents CA")
        assert operator.authorities.sign_pending().waiting == ()
        made = {a.issuer_key_id == a.key_id: a for a in operator.authorities.list()}
        root, ca = (
            CertificateAuthority(keys.open(certificate.public_key()), certificate)
            for certificate in (x509.load_der_x509_certificate(made[top].der) for top in (True, False))
        )
        yield Place(database, owner, keys, found, root, ca)


class Memory:
    """A store without the wait: agents are given one of a few keys, authorities one of their own."""

    def __init__(self) -> None:
        self.signers: dict[int, LocalSigner] = {}
        self.numbers = itertools.count()

    def create(self, label: str) -> LocalSigner:
        signer = LocalSigner(quick_key()) if "authority" in label else next(_few())
        self.signers[next(self.numbers)] = signer
        return signer

    def numbers_of(self, public_key: rsa.RSAPublicKey) -> list[int]:
        return [number for number, signer in self.signers.items() if signer.public_key() == public_key]

    def open(self, public_key: rsa.RSAPublicKey) -> LocalSigner:
        numbers = self.numbers_of(public_key)
        if not numbers:
            raise SignerError(f"no key {subject_key_id(public_key)} is here")
        return self.signers[numbers[-1]]

    def discard(self, signer: Signer) -> None:
        del self.signers[self.numbers_of(signer.public_key())[-1]]

    def found(self) -> set[str]:
        return {str(number) for number in self.signers}


@functools.cache
def _few() -> Iterator[LocalSigner]:
    return itertools.cycle([LocalSigner(quick_key()) for _ in range(8)])


@pytest.fixture(scope="module")
def local(cluster: Cluster) -> Iterator[Place]:
    keys = Memory()
    with settled(cluster, keys, keys.found) as place:
        yield place


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def filed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("keys")
    with settled(cluster, LocalKeys(folder, b"p"), lambda: files(folder)) as place:
        yield place


@pytest.fixture(scope="module")
def _wire() -> Iterator[Wire]:
    with serve_kms() as wire:
        yield wire


@pytest.fixture
def wire(_wire: Wire) -> Iterator[Wire]:
    _wire.faults.clear()
    _wire.calls.clear()
    yield _wire
    _wire.faults.clear()


@pytest.fixture(scope="module")
def _aws(cluster: Cluster, _wire: Wire) -> Iterator[Place]:
    with settled(cluster, _wire.keys(attempts=1, timeout=8), _wire.found) as place:
        yield place


@pytest.fixture
def aws(_aws: Place, wire: Wire) -> Place:
    return _aws


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HSM]:
    with softhsm(tmp_path_factory.mktemp("hsm")) as hsm:
        yield hsm


@pytest.fixture(scope="module")
def token(cluster: Cluster, hsm: HSM) -> Iterator[Place]:
    with settled(cluster, hsm.keys(), hsm.found) as place:
        yield place


@pytest.fixture
def client(kind: Kind, local: Place) -> Iterator[Opener]:
    with opener(kind, local.database, keys=local.keys) as opened:
        yield opened


@pytest.fixture
def kms_client(kind: Kind, aws: Place) -> Iterator[Opener]:
    with opener(kind, aws.database, keys=aws.keys) as opened:
        yield opened


# Results ------------------------------------------------------------------------------------------------


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that is written."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return type(value) is tuple and all(fits(each, arguments[0]) for each in value)
    if origin is list:
        return type(value) is list and all(fits(each, arguments[0]) for each in value)
    if origin is dict:
        return type(value) is dict and all(fits(each, arguments[0]) for each in value)
    if hint is Any:
        return True
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return type(value) is hint and all(
            fits(getattr(value, field.name), hints[field.name]) for field in dataclasses.fields(hint)
        )
    return type(value) is (type(None) if hint is None else hint) and (
        hint is not dt.datetime or value.tzinfo is not None
    )


@functools.cache
def returned(method: Callable[..., Any]) -> Any:
    return typing.get_type_hints(method)["return"]


@pytest.fixture(autouse=True)
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every test of this module, each field of each result is of the type that is written."""

    def checked(self: Methods, name: str) -> Callable[..., Any]:
        call = plain(self, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            found = call(*args, **kwargs)
            hint = returned(getattr(type(self.resource), name))
            assert fits(found, hint), f"{name} returned {found!r} and not {hint}"
            return found

        return method

    plain = Methods.__getattr__
    monkeypatch.setattr(Methods, "__getattr__", checked)


def test_the_check_of_types_finds_what_is_wrong() -> None:
    moment = dt.datetime.now(dt.timezone.utc)
    good_one = clients.RevocationResult("3A", moment, None)
    assert fits(good_one, clients.RevocationResult)
    for wrong in ({"serial_number": b"3A"}, {"revoked_at": moment.replace(tzinfo=None)}, {"crl_pending": 1}):
        assert not fits(dataclasses.replace(good_one, **wrong), clients.RevocationResult)
    assert not fits([1], tuple[str, ...])
    assert not fits((1,), tuple[str, ...])
    assert not fits("other", results.Status)


# The whole life -----------------------------------------------------------------------------------------


def openssl(folder: Path, certificate_pem: str, message: bytes, signature: bytes) -> bool:
    """Whether openssl finds the signature to be by the certificate's key."""
    for name, content in {"c.pem": certificate_pem.encode(), "message": message, "sig": signature}.items():
        (folder / name).write_bytes(content)
    public = subprocess.run(
        ["openssl", "x509", "-in", "c.pem", "-noout", "-pubkey"], cwd=folder, check=True, capture_output=True
    )
    (folder / "public.pem").write_bytes(public.stdout)
    command = ["openssl", "dgst", "-sha256", "-verify", "public.pem", "-signature", "sig", "message"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True).stdout == b"Verified OK\n"


@pytest.mark.parametrize("how", HOW)
def test_the_whole_life_of_an_agent(kind: Kind, how: str, empty: Database, tmp_path: Path) -> None:
    keys = LocalKeys(tmp_path / "keys", b"p") if how == "dsn" else Memory()
    with opener(kind, empty, keys=keys, crl_url="http://crl.example/{key_id}.crl") as client:
        operator, registrar = client("operator", how), client("registrar", how)
        # These have no keys, and need none.
        auditor, worker, anybody = (
            client(user, how, keys=None) for user in ("client_auditor", "client_worker", "agent_1")
        )

        # Authorities
        assert anybody.authorities.list() == []
        made = operator.authorities.create("Life Root CA", intermediate="Life Agents CA")
        assert made == anybody.authorities.list()
        root, ca = sorted(made, key=lambda a: a.path_length, reverse=True)
        assert (root.name, root.issuer_key_id, root.path_length) == ("CN=Life Root CA", root.key_id, 1)
        assert (ca.name, ca.issuer_key_id, ca.path_length) == ("CN=Life Agents CA", root.key_id, 0)
        assert (root.distrusted_at, root.distrust_reason) == (None, None)
        assert root.pem.startswith("-----BEGIN CERTIFICATE-----\n")
        pending = operator.authorities.sign_pending()
        assert (set(pending.crls), pending.receipts, pending.waiting) == ({root.key_id, ca.key_id}, (), ())
        lists = {crl.key_id: crl for crl in anybody.authorities.revocation_lists()}
        assert {n: (crl.number, crl.entries) for n, crl in lists.items()} == dict.fromkeys(lists, (1, 0))
        assert lists[ca.key_id].pem.startswith("-----BEGIN X509 CRL-----\n")

        # Agents
        agent = registrar.agents.create("atlas", model="gpt-4o", version="1", model_hash=HASH, tenant="acme")
        assert (agent.name, agent.tenant, agent.model, agent.model_version, agent.model_hash) == (
            "atlas", "acme", "gpt-4o", "1", HASH,
        )  # fmt: skip
        assert (agent.suspended_at, agent.suspended_reason, agent.status) == (None, None, "active")
        assert auditor.agents.get(agent.agent_id) == auditor.agents.get(str(agent.agent_id)) == agent
        other = registrar.agents.create("other")
        assert auditor.agents.list() == [other, agent]
        assert auditor.agents.list(limit=1) == [other]
        assert auditor.agents.list(before=other.created_at) == [agent]
        assert auditor.agents.list(status="suspended") == []
        renamed = registrar.agents.update(agent.agent_id, name="Atlas", version="2")
        assert (renamed.agent.name, renamed.agent.model_version, renamed.agent.tenant) == (
            "Atlas", "2", "acme",
        )  # fmt: skip
        assert (renamed.certificates_revoked, renamed.next, renamed.crl_pending) == ((), None, None)

        # A certificate
        before = dt.datetime.now(dt.timezone.utc)
        first = registrar.agents.certify(
            agent.agent_id,
            permitted_actions=["orders:read", "trade:*"],
            financial_scope=SCOPE,
            lifetime=10 * DAY,
        )
        assert (first.agent_id, first.status, first.issuer_key_id) == (agent.agent_id, "active", ca.key_id)
        assert (first.model, first.model_hash, first.tenant) == ("gpt-4o", HASH, "acme")
        assert (first.permitted_actions, first.financial_scope) == (("orders:read", "trade:*"), SCOPE)
        assert first.not_after - first.not_before == 10 * DAY
        assert before - HOUR < first.not_before <= before
        assert (first.revoked_at, first.revocation_reason) == (None, None)
        read = AgentCertificate.from_der(first.der)
        assert (read.agent_id, read.serial) == (agent.agent_id, first.serial_number)
        assert keys.open(read.public_key).key_id == first.key_id
        point = read.certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
        assert point[0].full_name[0].value == f"http://crl.example/{ca.key_id.replace(':', '').lower()}.crl"
        shown = dataclasses.replace(first, key_id=None)
        assert auditor.certificates.get(first.serial_number) == shown
        assert auditor.certificates.get(first.serial_number.replace(":", "").lower()) == shown
        assert auditor.certificates.list(agent.agent_id) == auditor.certificates.list() == [shown]
        assert auditor.certificates.list(other.agent_id) == []

        # It is used
        signed = registrar.agents.sign(agent.agent_id, {"order": 17, "amount_usd": 250})
        assert (signed.certificate_serial, signed.algorithm) == (
            first.serial_number, "RSASSA_PKCS1_V1_5_SHA_256",
        )  # fmt: skip
        body = b'{"amount_usd":250,"order":17}'
        assert signed.payload_hash == "sha256:" + hashlib.sha256(body).hexdigest()
        question = {
            "payload": {"amount_usd": 250, "order": 17},
            "signature": signed.signature,
            "certificate_serial": signed.certificate_serial,
        }
        answer = anybody.verify.message(**question)
        assert (answer.valid, answer.signature_valid, answer.certificate_status) == (True, True, "active")
        assert (answer.agent_id, answer.agent_name, answer.model_hash) == (agent.agent_id, "Atlas", HASH)
        verified = anybody.verify.certificate(first.serial_number)
        assert (verified.valid, verified.status, verified.agent_name) == (True, "active", "Atlas")
        assert (verified.permitted_actions, verified.financial_scope) == (first.permitted_actions, SCOPE)
        assert (verified.not_after, verified.issuer_key_id) == (first.not_after, ca.key_id)
        credential = AgentCredential.from_certificate(first.pem, keys)
        empty.value(
            "agent_1", "select kakunin.open_session(%s)", [credential.assertion(empty.installation_id)]
        )

        # It is renewed
        second = registrar.agents.rotate(agent.agent_id, overlap=2 * HOUR)
        assert (second.permitted_actions, second.financial_scope, second.tenant, second.model_hash) == (
            first.permitted_actions, first.financial_scope, first.tenant, first.model_hash,
        )  # fmt: skip
        assert second.not_after - second.not_before == 10 * DAY
        assert second.key_id != first.key_id
        superseded = auditor.certificates.get(first.serial_number)
        assert (superseded.status, superseded.revocation_reason) == ("active", "superseded")
        assert superseded.revoked_at - second.not_before > HOUR
        assert [c.serial_number for c in auditor.certificates.list(agent.agent_id)] == [
            second.serial_number, first.serial_number,
        ]  # fmt: skip
        assert registrar.agents.sign(agent.agent_id, "x").certificate_serial == second.serial_number

        # It is suspended, and reinstated
        suspended = operator.agents.suspend(agent.agent_id, "under review")
        assert (suspended.status, suspended.suspended_reason) == ("suspended", "under review")
        assert auditor.agents.list(status="suspended") == [suspended]
        assert auditor.agents.list(status="active") == [other]
        assert anybody.verify.certificate(second.serial_number).status == "suspended"
        assert anybody.verify.message(**question).valid is False
        assert operator.agents.reinstate(agent.agent_id).status == "active"
        assert anybody.verify.message(**question).valid is True

        # It is halted
        receipt = operator.agents.halt(agent.agent_id, 'unusual "volatility" — 東京\n\x01')
        assert receipt.certificates_revoked == tuple(sorted([first.serial_number, second.serial_number]))
        assert (receipt.backends_terminated, receipt.backends_not_terminated, receipt.hint) == (0, 0, None)
        assert json.loads(receipt.receipt)["reason"] == 'unusual "volatility" — 東京\n\x01'
        assert auditor.agents.get(agent.agent_id).status == "suspended"
        if how == "transaction":
            assert receipt.signature is None
            assert "not committed" in receipt.pending
            assert "not committed" in receipt.crl_pending
            unsigned = auditor.agents.halts()[0]
            assert (unsigned.signature, unsigned.pending is None) == (None, False)
            pending = registrar.authorities.sign_pending()
            assert (pending.crls, pending.receipts, pending.waiting) == ((ca.key_id,), (receipt.halt_id,), ())
        [kept] = auditor.agents.halts(agent.agent_id)
        assert (kept.pending, kept.key_id, kept.receipt) == (None, ca.key_id, receipt.receipt)
        if how != "transaction":
            assert (receipt.pending, receipt.crl_pending) == (None, None)
            assert (receipt.signature, receipt.key_id) == (kept.signature, ca.key_id)
        assert worker.agents.halts() == [kept]
        assert auditor.agents.halts(other.agent_id) == []
        body_path, signature_path = write_receipt(kept, tmp_path)
        assert signature_path is not None
        assert openssl(tmp_path, ca.pem, body_path.read_bytes(), signature_path.read_bytes())
        assert anybody.verify.message(**question).certificate_status == "revoked"

        # What the world is told
        [crl] = [c for c in anybody.authorities.revocation_lists() if c.key_id == ca.key_id]
        listed = x509.load_der_x509_crl(crl.der)
        assert (crl.number, crl.entries, len(listed)) == (2, 2, 2)
        assert listed.is_signature_valid(x509.load_der_x509_certificate(ca.der).public_key())
        assert listed.get_revoked_certificate_by_serial_number(read.certificate.serial_number)

        # Another certificate, revoked by itself; and one whose agent changes
        operator.agents.reinstate(agent.agent_id)
        third = registrar.agents.certify(agent.agent_id)
        assert (third.permitted_actions, third.financial_scope) == ((), None)
        revoked = operator.certificates.revoke(third.serial_number.lower(), "keyCompromise")
        assert revoked.serial_number == third.serial_number
        assert (revoked.crl_pending is None) == (how != "transaction")
        assert auditor.certificates.get(third.serial_number).status == "revoked"
        fourth = registrar.agents.certify(agent.agent_id)
        changed = registrar.agents.update(agent.agent_id, model_hash=OTHER_HASH)
        assert (changed.agent.model_hash, changed.certificates_revoked) == (
            OTHER_HASH, (fourth.serial_number,),
        )  # fmt: skip
        assert "Certify the agent anew" in changed.next
        assert (changed.crl_pending is None) == (how != "transaction")

        # The end of the authority
        fifth = registrar.agents.certify(agent.agent_id)
        assert operator.authorities.distrust(ca.key_id, "keyCompromise") == (fifth.serial_number,)
        gone = {a.key_id: a for a in anybody.authorities.list()}
        assert gone[ca.key_id].distrust_reason == "keyCompromise"
        assert gone[ca.key_id].distrusted_at is not None
        assert gone[root.key_id].distrusted_at is None
        assert operator.authorities.trust(root.der) == root.key_id
        with pytest.raises(BadInputError, match="no certificate authority for agents is trusted here"):
            registrar.agents.certify(other.agent_id)  # not by the root instead


# Roles and arguments ------------------------------------------------------------------------------------

EVERY = ["registrar", "operator", "client_auditor", "client_worker", "agent_1", "gateway"]
# Who may, of the logins in EVERY. Names of what a call is about are in the test.
MAY: dict[str, tuple[Callable[[Client, Any], Any], list[str]]] = {
    "authorities.list": (lambda c, _: c.authorities.list(), EVERY),
    "authorities.revocation_lists": (lambda c, _: c.authorities.revocation_lists(), EVERY),
    "authorities.create": (lambda c, _: c.authorities.create("Yet another CA"), ["operator"]),
    "authorities.trust": (lambda c, x: c.authorities.trust(x.place.root.der), ["operator"]),
    "authorities.distrust": (lambda c, x: c.authorities.distrust(x.spare, "keyCompromise"), ["operator"]),
    "authorities.sign_pending": (
        lambda c, _: c.authorities.sign_pending(),
        ["registrar", "operator", "client_worker"],
    ),
    "agents.create": (lambda c, _: c.agents.create("x"), ["registrar"]),
    "agents.get": (lambda c, x: c.agents.get(x.agent_id), ["registrar", "operator", "client_auditor"]),
    "agents.list": (lambda c, _: c.agents.list(), ["registrar", "operator", "client_auditor"]),
    "agents.update": (lambda c, x: c.agents.update(x.agent_id, name="y"), ["registrar", "operator"]),
    "agents.certify": (lambda c, x: c.agents.certify(x.agent_id, overlap=HOUR), ["registrar"]),
    "agents.rotate": (lambda c, x: c.agents.rotate(x.agent_id), ["registrar"]),
    "agents.sign": (
        lambda c, x: c.agents.sign(x.agent_id, "x"),
        ["registrar", "operator", "client_auditor"],
    ),
    "agents.suspend": (lambda c, x: c.agents.suspend(x.agent_id, "x"), ["operator"]),
    "agents.reinstate": (lambda c, x: c.agents.reinstate(x.agent_id), ["operator"]),
    "agents.halts": (
        lambda c, _: c.agents.halts(),
        ["registrar", "operator", "client_auditor", "client_worker"],
    ),
    "certificates.get": (
        lambda c, x: c.certificates.get(x.serial),
        ["registrar", "operator", "client_auditor"],
    ),
    "certificates.list": (lambda c, _: c.certificates.list(), ["registrar", "operator", "client_auditor"]),
    "verify.certificate": (lambda c, x: c.verify.certificate(x.serial), EVERY),
    "verify.message": (
        lambda c, x: c.verify.message(payload=b"x", signature=b"y", certificate_serial=x.serial),
        EVERY,
    ),
    "certificates.revoke": (lambda c, x: c.certificates.revoke(x.serial), ["operator"]),
    "agents.risk": (lambda c, x: c.agents.risk(x.agent_id), ["operator", "client_auditor"]),
    "agents.halt": (lambda c, x: c.agents.halt(x.agent_id, "x"), ["operator"]),
}


@dataclass
class About:
    """What the calls of a test are about."""

    place: Place
    agent_id: uuid.UUID
    serial: str
    spare: str


def test_each_method_needs_the_role_that_is_documented_and_no_other(client: Opener, local: Place) -> None:
    asked = {user: client(user) for user in EVERY}
    agent = asked["registrar"].agents.create("roles")
    first = asked["registrar"].agents.certify(agent.agent_id)
    spare = asked["operator"].authorities.trust(false_ca("Spare CA").der)
    about = About(local, agent.agent_id, first.serial_number, spare)
    for name, (call, allowed) in MAY.items():
        for user in sorted(EVERY, key=lambda user: user in allowed):
            if user in allowed:
                call(asked[user], about)
                continue
            before = local.found(), local.certificates(agent.agent_id)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                call(asked[user], about)
            assert (local.found(), local.certificates(agent.agent_id)) == before, (name, user)
    resources = ("authorities", "agents", "certificates", "verify")
    methods = {f"{r}.{m}" for r in resources for m in public(getattr(Kakunin("x"), r))}
    assert MAY.keys() == methods


def public(resource: Any) -> list[str]:
    return [name for name in dir(resource) if not name.startswith("_")]


OPERATIONS = {
    "authorities.create": operations.create_authority,
    "authorities.list": operations.list_authorities,
    "agents.create": operations.create_agent,
    "agents.get": operations.get_agent,
    "agents.list": operations.list_agents,
    "agents.update": operations.update_agent,
    "agents.risk": operations.agent_risk,
    "events.create": operations.create_event,
    "events.list": operations.list_events,
    "certificates.get": operations.get_certificate,
    "certificates.list": operations.list_certificates,
    "verify.certificate": operations.verify_certificate,
    "verify.message": operations.verify_message,
}


@pytest.mark.parametrize("name", [*MAY, "events.create", "events.list"])
def test_both_clients_and_the_operation_take_the_same(name: str) -> None:
    resource, _, method = name.partition(".")
    one = getattr(type(getattr(Kakunin("x"), resource)), method)
    other = getattr(type(getattr(AsyncKakunin("x"), resource)), method)
    assert inspect.signature(one) == inspect.signature(other)
    assert inspect.iscoroutinefunction(other)
    assert not inspect.iscoroutinefunction(one)
    assert other.__doc__ == f"See :meth:`{one.__qualname__}`."
    operation = OPERATIONS.get(name) or getattr(operations, method)
    taken = list(inspect.signature(operation).parameters)
    given = [parameter for parameter in inspect.signature(one).parameters if parameter != "self"]
    assert [parameter for parameter in taken if parameter != "setup"] == given


def test_both_clients_have_the_same_resources_and_arguments() -> None:
    assert public(Kakunin("x")) == sorted(n.replace("aclose", "close") for n in public(AsyncKakunin("x")))
    one, other = (inspect.signature(kind.__init__).parameters for kind in (Kakunin, AsyncKakunin))
    assert list(one) == list(other)
    for resource in ("authorities", "agents", "certificates", "events", "verify"):
        assert public(getattr(Kakunin("x"), resource)) == public(getattr(AsyncKakunin("x"), resource))
    assert clients.__all__ == sorted(clients.__all__)


def test_what_is_no_database_is_refused(kind: Kind, local: Place) -> None:
    made = {"sync": Kakunin, "async": AsyncKakunin}[kind]
    with local.database.connect("registrar") as connection:
        if kind == "async":
            with pytest.raises(BadInputError, match="not Connection"):
                made(connection)
        wrong_pool = (AsyncConnectionPool if kind == "sync" else ConnectionPool)(
            local.database.dsn("registrar"), open=False
        )
        with pytest.raises(BadInputError, match="and not .*ConnectionPool"):
            made(wrong_pool)
        for wrong in (None, 5, b"dbname=x", object()):
            with pytest.raises(BadInputError, match="a client takes a DSN"):
                made(wrong)


def test_arguments_that_are_none_are_refused_before_a_key_is_made(client: Opener, local: Place) -> None:
    registrar = client("registrar")
    agent = registrar.agents.create("x")
    with local.unchanged(agent):
        for wrong in ("x", "", 5, None, b"x"):
            for method in ("get", "certify", "rotate"):
                with pytest.raises(BadInputError, match="an agent id is a UUID"):
                    getattr(registrar.agents, method)(wrong)
        for method in ("get", "certify"):
            with pytest.raises(BadInputError, match=f"no agent {NOBODY}"):
                getattr(registrar.agents, method)(NOBODY)
        for method in ("rotate", "sign"):
            arguments = ("x",) if method == "sign" else ()
            for agent_id in (NOBODY, agent.agent_id):
                with pytest.raises(UnknownCertificateError, match="no active certificate"):
                    getattr(registrar.agents, method)(agent_id, *arguments)
        with pytest.raises(BadInputError, match="no authority AB:CD is trusted here"):
            registrar.agents.certify(agent.agent_id, authority="AB:CD")
        with pytest.raises(BadInputError, match="active or suspended"):
            registrar.agents.list(status="halted")
        with pytest.raises(UnknownCertificateError):
            registrar.certificates.get("AB:CD")
        with pytest.raises(BadInputError, match="serial"):
            registrar.certificates.get("zz")
        for wrong in ("é", "abc", "a==="):
            with pytest.raises(BadInputError, match="base64"):
                registrar.verify.message(payload="x", signature=wrong, certificate_serial="AB")
        nameless = client("registrar", keys=None)
        for call in (
            functools.partial(nameless.agents.certify, agent.agent_id),
            client("operator", keys=None).authorities.create,
        ):
            with pytest.raises(BadInputError, match="no key store is named"):
                call()
    # What only the authority finds wrong: by then there is a key, and it is taken away again.
    with local.unchanged(agent):
        for wrong in (
            {"permitted_actions": ["a b"]},
            {"lifetime": 366 * DAY},
            {"lifetime": dt.timedelta(0)},
            {"financial_scope": {"x": float("nan")}},
        ):
            with pytest.raises(BadInputError):
                registrar.agents.certify(agent.agent_id, **wrong)


def test_errors_of_the_database_are_the_kits_with_the_drivers_as_cause(client: Opener) -> None:
    operator = client("operator")
    with pytest.raises(BadInputError, match="no agent") as caught:
        operator.agents.suspend(NOBODY, "x")
    assert isinstance(caught.value.__cause__, psycopg.Error)
    assert caught.value.__cause__.sqlstate == "KA010"
    assert caught.value.hint == "Create it with kakunin.create_agent()."


@pytest.mark.parametrize("how", ["dsn", "autocommit", "transaction"])
def test_pages_leave_no_agent_out_that_was_made_at_the_same_moment(client: Opener, how: str) -> None:
    registrar = client("registrar", "transaction")
    registrar.commits = False
    made = {registrar.agents.create(f"page {n}").agent_id for n in range(5)}  # in one transaction
    registrar.run(registrar.target.commit())
    asked = client("registrar", how)
    found: list[Any] = []
    page = asked.agents.list(limit=2)
    while page and len(found) < 50:
        found += page
        page = asked.agents.list(limit=2, before=page[-1])
    assert len({agent.created_at for agent in found if agent.agent_id in made}) == 1
    assert made <= {agent.agent_id for agent in found}
    assert len({agent.agent_id for agent in found}) == len(found)


# Connections --------------------------------------------------------------------------------------------


def test_a_client_closes_its_own_connection_and_never_one_it_was_given(kind: Kind, local: Place) -> None:
    def backends() -> int:
        return local.database.value(
            "installer",
            "select count(*) from pg_stat_activity where application_name = 'kakunin-db client'"
            " and usename = 'agent_1'",
        )

    with opener(kind, local.database) as client:
        own, given, pool = (client("agent_1", how) for how in ("dsn", "autocommit", "pool"))
        for each in (own, given, pool):
            each.authorities.list()
            if kind == "sync":
                with each.real:
                    pass
            else:
                each.run(each.real.__aexit__(None, None, None))
        deadline = time.monotonic() + 10
        while backends() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert backends() == 0
        assert not given.target.closed
        assert not pool.target.closed
        given.authorities.list()
        pool.authorities.list()
        own.authorities.list()  # it connects again
        assert backends() == 1


def test_a_connection_that_ended_while_it_was_idle_is_made_anew(client: Opener, local: Place) -> None:
    """The kill switch is pressed once, also after a failover."""
    operator, registrar = client("operator"), client("registrar")
    agent = registrar.agents.create("idle")
    operator.agents.get(agent.agent_id)
    ended = local.database.run(
        "installer",
        "select pid from pg_stat_activity where usename = 'operator' and datname = current_database()",
    )
    with local.database.cluster.connect(autocommit=True) as admin:
        for (pid,) in ended:
            admin.execute("select pg_terminate_backend(%s, 5000)", [pid])
    assert ended
    assert operator.agents.halt(agent.agent_id, "x").pending is None


@pytest.mark.parametrize("given", ["atlas.pem", b"0", Path("atlas.pem")])
def test_a_credential_is_made_of_a_certificate_and_not_of_its_path(given: Any) -> None:
    with pytest.raises(BadInputError) as caught:
        AgentCredential.from_certificate(given, "file:keys")
    assert "read_bytes()" in (caught.value.hint or "")


def test_a_credential_names_its_installation_by_a_uuid() -> None:
    with pytest.raises(BadInputError) as caught:
        AgentCredential(uuid.uuid4(), "3A", LocalSigner.generate(), "production")
    assert "kakunin.installation_id()" in (caught.value.hint or "")


def test_a_client_serves_many_threads(local: Place) -> None:
    with (
        Kakunin(local.database.dsn("registrar"), keys=local.keys) as registrar,
        ThreadPoolExecutor(8) as pool,
    ):
        agents = list(pool.map(lambda n: registrar.agents.create(f"thread {n}"), range(24)))
        assert [agent.name for agent in agents] == [f"thread {n}" for n in range(24)]


async def test_an_asynchronous_client_serves_many_tasks(local: Place) -> None:
    async with AsyncKakunin(local.database.dsn("registrar"), keys=local.keys) as registrar:
        agents = await asyncio.gather(*(registrar.agents.create(f"task {n}") for n in range(24)))
    assert [agent.name for agent in agents] == [f"task {n}" for n in range(24)]


def test_the_rows_of_the_callers_connection_stay_as_it_has_them(client: Opener, local: Place) -> None:
    with local.database.connect("registrar", row_factory=psycopg.rows.scalar_row) as connection:
        connection.cursor_factory = psycopg.RawCursor
        assert Kakunin(connection).agents.create("x").name == "x"
        assert connection.execute("select $1::int", [5]).fetchone() == 5


def test_what_the_caller_rolls_back_did_not_happen(client: Opener, local: Place) -> None:
    registrar = client("registrar", "transaction")
    registrar.commits = False
    agent = registrar.agents.create("rolled back")
    certificate = registrar.agents.certify(agent.agent_id)
    assert registrar.certificates.get(certificate.serial_number).status == "active"
    registrar.run(registrar.target.rollback())
    with pytest.raises(BadInputError, match="no agent"):
        registrar.agents.get(agent.agent_id)
    # The documented rest: this key is the caller's to discard.
    local.keys.discard(local.keys.open(AgentCertificate.from_der(certificate.der).public_key))


def test_a_refusal_in_the_callers_transaction_leaves_no_key(client: Opener, local: Place) -> None:
    registrar = client("registrar", "transaction")
    agent = registrar.agents.create("x")
    registrar.agents.certify(agent.agent_id)
    for timeout, error_of in (("0", BadInputError), ("1ms", psycopg.errors.QueryCanceled)):
        with local.unchanged(agent), pytest.raises(error_of):
            registrar.run(registrar.target.execute(f"set local lock_timeout = '{timeout}'"))
            held = psycopg.connect(local.database.dsn("installer"))
            if timeout != "0":
                held.execute(
                    "select from kakunin_private.agents where agent_id = %s for update", [agent.agent_id]
                )
                registrar.run(registrar.target.execute("set local statement_timeout = '300ms'"))
                registrar.run(registrar.target.execute("set local lock_timeout = 0"))
            with contextlib.closing(held):
                registrar.agents.certify(agent.agent_id)
        registrar.run(registrar.target.rollback())


# Stores -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["filed", "aws", "token"])
def place(request: pytest.FixtureRequest, cluster: Cluster) -> Place:
    return request.getfixturevalue(request.param)


def test_each_agent_has_a_key_of_its_own_in_the_store(kind: Kind, place: Place, tmp_path: Path) -> None:
    with opener(kind, place.database, keys=place.keys) as client:
        registrar, operator = client("registrar"), client("operator")
        before = place.found()
        certified = []
        for name in ("one", "two"):
            agent = registrar.agents.create(name)
            certified.append(registrar.agents.certify(agent.agent_id, permitted_actions=["a:b"]))
        publics = [AgentCertificate.from_der(c.der).public_key for c in certified]
        assert publics[0] != publics[1]
        new = " ".join(place.found() - before)
        for certificate, public in zip(certified, publics, strict=True):
            assert subject_key_id(public) in new
            opened = place.keys.open(public)
            assert opened.public_key() == public
            x509.load_der_x509_certificate(certificate.der).verify_directly_issued_by(place.ca.certificate)
            signed = registrar.agents.sign(certificate.agent_id, b"\0\xff")
            assert openssl(tmp_path, certificate.pem, b"\0\xff", base64.b64decode(signed.signature))
        receipt = operator.agents.halt(certified[0].agent_id, "x")
        assert (receipt.pending, receipt.crl_pending) == (None, None)
        signature = base64.b64decode(receipt.signature)
        assert openssl(tmp_path, x509_pem(place.ca.certificate), receipt.receipt.encode(), signature)


def x509_pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def test_with_kms_no_private_key_is_in_the_process(
    kms_client: Opener, aws: Place, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of a key but the public one was ever loaded or made here. (moto's are, in this process too.)"""
    registrar = kms_client("registrar")
    agent = registrar.agents.create("x")
    wire.calls.clear()
    made = threading.Event()

    def refuse(*_: Any, **__: Any) -> Any:
        if "moto" in repr([f.filename for f in inspect.stack()]):
            return generate(*_, **__)
        made.set()
        raise AssertionError("a private key is made in the process")

    generate = rsa.generate_private_key
    monkeypatch.setattr(rsa, "generate_private_key", refuse)
    monkeypatch.setattr(serialization, "load_pem_private_key", refuse)
    certificate = registrar.agents.certify(agent.agent_id)
    registrar.agents.sign(agent.agent_id, "x")
    assert not made.is_set()
    calls = [(call[0], call[1].get("KeyId", "")) for call in wire.calls]
    theirs = f"alias/kakunin/{subject_key_id(AgentCertificate.from_der(certificate.der).public_key)}"
    of_ca = f"alias/kakunin/{subject_key_id(aws.ca.signer.public_key())}"
    assert [name for name, _ in calls] == [
        "GetPublicKey", "CreateKey", "GetPublicKey", "CreateAlias", "Sign",
        "GetPublicKey", "GetPublicKey", "Sign",  # the authority's first: it must have signed the certificate
    ]  # fmt: skip
    assert [key for name, key in calls if name == "Sign"] == [of_ca, theirs]
    assert wire.key(theirs).description == f"agent {agent.agent_id}"


def test_a_store_by_its_uri_is_opened_once(
    kind: Kind, filed: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "p")
    opened: list[str] = []

    def counted(uri: str) -> KeyStore:
        opened.append(uri)
        return real(uri)

    real = operations.open_keys
    monkeypatch.setattr(operations, "open_keys", counted)
    folder = filed.keys._folder  # type: ignore[attr-defined]
    uris = {"keys": f"file:{tmp_path}/agents", "ca_keys": f"file:{folder}"}
    with opener(kind, filed.database, **uris) as client:
        registrar = client("registrar")
        agent = registrar.agents.create("x")
        with filed.unchanged():
            registrar.agents.certify(agent.agent_id)
            registrar.agents.rotate(agent.agent_id)
            registrar.agents.sign(agent.agent_id, "x")
        assert sorted(opened) == sorted(uris.values())
        assert len(files(tmp_path / "agents")) == 2
        assert "agents" not in repr(registrar.real.agents._setup)  # a URI may hold a PIN


# A KMS that fails ---------------------------------------------------------------------------------------


def of_key(fault: Fault, signer: Signer) -> Fault:
    """The fault for requests about this key; others are answered."""
    name = subject_key_id(signer.public_key())
    return lambda request: fault(request) if name in request.get("KeyId", "") else PASS


def silent(_: dict[str, Any]) -> None:
    time.sleep(1.4)


def hung_up(_: dict[str, Any]) -> None:
    pass


@functools.cache
def _stranger() -> LocalSigner:
    return LocalSigner(quick_key())


def by_another(_: dict[str, Any]) -> Answer:
    """A signature, by another key."""
    return instead(KeyId="another", Signature=_stranger().sign(b"d" * 32))(_)


THROTTLED, DENIED, DISABLED = map(
    error, ("ThrottlingException", "AccessDeniedException", "DisabledException")
)
WRONG_SPEC = instead(
    KeySpec="ECC_NIST_P256", KeyUsage="SIGN_VERIFY", SigningAlgorithms=["ECDSA_SHA_256"], PublicKey=b"x"
)
# The request that fails, whether only the authority's key is meant, and how.
FAULTS: dict[str, tuple[str, bool, Fault, type[SignerError], str]] = {
    "opening, throttled": ("GetPublicKey", True, THROTTLED, SignerUnavailableError, "Throttling"),
    "opening, disabled": ("GetPublicKey", True, DISABLED, SignerError, "Disabled"),
    "opening, wrong spec": ("GetPublicKey", True, WRONG_SPEC, SignerError, "ECC_NIST_P256"),
    "making, throttled": ("CreateKey", False, THROTTLED, SignerUnavailableError, "Throttling"),
    "making, denied": ("CreateKey", False, DENIED, SignerError, "AccessDenied"),
    "making, hung up": ("CreateKey", False, hung_up, SignerUnavailableError, "did not answer"),
    "naming, denied": ("CreateAlias", False, DENIED, SignerError, "AccessDenied"),
    "signing, throttled": ("Sign", True, THROTTLED, SignerUnavailableError, "Throttling"),
    "signing, timed out": ("Sign", True, silent, SignerUnavailableError, "did not answer"),
    "signing, denied": ("Sign", True, DENIED, SignerError, "AccessDenied"),
    "signing, disabled": ("Sign", True, DISABLED, SignerError, "Disabled"),
    "signing, another key": ("Sign", True, by_another, SignerError, "not by the key"),
}


@alternating("moment", FAULTS)
def test_when_kms_fails_nothing_is_registered_and_no_key_left(
    kms_client: Opener, aws: Place, wire: Wire, moment: str
) -> None:
    operation, of_ca, fault, cls, said = FAULTS[moment]
    keys = wire.keys(attempts=1, timeout=1) if fault is silent else aws.keys
    registrar, operator = kms_client("registrar", keys=keys), kms_client("operator", keys=keys)
    agent = registrar.agents.create("x")
    wire.fault(operation, of_key(fault, aws.ca.signer) if of_ca else fault)
    with aws.unchanged(agent), pytest.raises(SignerError, match=said) as caught:
        registrar.agents.certify(agent.agent_id)
    assert type(caught.value) is cls
    assert caught.value.hint
    assert "left behind" not in caught.value.hint
    if not of_ca:
        # The same for an authority: neither the root nor the intermediate.
        known = operator.authorities.list()
        with aws.unchanged(), pytest.raises(cls, match=said):
            operator.authorities.create("A", intermediate="B")
        assert operator.authorities.list() == known
    wire.faults.clear()
    with_new = kms_client("registrar")
    certificate = with_new.agents.certify(agent.agent_id)
    if of_ca:
        wire.fault(operation, of_key(fault, aws.ca.signer))
        with aws.unchanged(agent), pytest.raises(cls, match=said):
            registrar.agents.rotate(agent.agent_id)
        assert with_new.certificates.get(certificate.serial_number).revoked_at is None


def test_an_authority_is_made_whole_or_not_at_all(kms_client: Opener, aws: Place, wire: Wire) -> None:
    """The second key, the second signature, and the database's refusal."""
    operator = kms_client("operator")
    known = operator.authorities.list()
    for operation, faults in (
        ("CreateKey", [good, THROTTLED]),
        ("CreateAlias", [good, DENIED]),
        ("Sign", [good, DENIED]),
    ):
        wire.faults.clear()
        wire.fault(operation, *faults)
        with aws.unchanged(), pytest.raises(SignerError):
            operator.authorities.create("A", intermediate="B")
        assert operator.authorities.list() == known
    wire.faults.clear()
    with aws.unchanged(), pytest.raises(psycopg.errors.InsufficientPrivilege):
        kms_client("registrar").authorities.create("A", intermediate="B")
    with aws.unchanged(), pytest.raises(BadInputError, match="1 to 64 characters"):
        operator.authorities.create("A", intermediate="B" * 65)
    assert operator.authorities.list() == known


@pytest.mark.parametrize("refused", ["active already", "suspended", "privilege"])
def test_what_the_database_refuses_leaves_no_key(client: Opener, local: Place, refused: str) -> None:
    registrar, operator = client("registrar"), client("operator")
    agent = registrar.agents.create("x")
    cls: type[Exception] = BadInputError
    if refused == "active already":
        registrar.agents.certify(agent.agent_id)
    elif refused == "suspended":
        operator.agents.suspend(agent.agent_id, "x")
        cls = AgentSuspendedError
    else:
        registrar, cls = operator, psycopg.errors.InsufficientPrivilege
    with local.unchanged(agent), pytest.raises(cls):
        registrar.agents.certify(agent.agent_id)


class Wrapped:
    """A store that a test changes."""

    def __init__(self, keys: KeyStore) -> None:
        self.keys = keys

    def create(self, label: str) -> Signer:
        return self.keys.create(label)

    def open(self, public_key: rsa.RSAPublicKey) -> Signer:
        return self.keys.open(public_key)

    def discard(self, signer: Signer) -> None:
        self.keys.discard(signer)


class Keeping(Wrapped):
    """A store that does not let go."""

    def __init__(self, keys: KeyStore, why: Exception) -> None:
        super().__init__(keys)
        self.why = why
        self.left: list[Signer] = []

    def discard(self, signer: Signer) -> None:
        self.left.append(signer)
        raise self.why


@pytest.mark.parametrize("why", [SignerError("kept", "Ask."), OSError("broken")], ids=["named", "any"])
def test_a_key_that_cannot_be_discarded_is_named_by_the_error_that_led_there(
    client: Opener, local: Place, why: Exception
) -> None:
    keys = Keeping(local.keys, why)
    registrar, operator = client("registrar", keys=keys), client("operator", keys=keys)
    agent = registrar.agents.create("x")
    registrar.agents.certify(agent.agent_id)
    with pytest.raises(BadInputError, match="has an active one already") as caught:
        registrar.agents.certify(agent.agent_id)
    reason = "kept. Ask." if isinstance(why, SignerError) else "broken"
    assert caught.value.hint == (
        "Revoke that, or give the overlap after which it is superseded."
        f" The new key {keys.left[0].key_id} is left behind ({reason}): delete it."
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege) as denied:
        operator.agents.certify(agent.agent_id)
    if hasattr(denied.value, "__notes__"):  # from Python 3.11 on
        assert keys.left[1].key_id in denied.value.__notes__[0]
    # Of two keys, each is tried.
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        registrar.authorities.create("A", intermediate="B")
    assert len({signer.key_id for signer in keys.left}) == 4
    for signer in keys.left:
        local.keys.discard(signer)


def test_in_kms_as_well(kms_client: Opener, aws: Place, wire: Wire) -> None:
    registrar = kms_client("registrar")
    agent = registrar.agents.create("x")
    wire.fault("Sign", THROTTLED)
    wire.fault("ScheduleKeyDeletion", DENIED)
    with pytest.raises(SignerUnavailableError, match="kms:Sign") as caught:
        registrar.agents.certify(agent.agent_id)
    assert "is left behind (AWS KMS refuses kms:ScheduleKeyDeletion" in (caught.value.hint or "")


# Answers that were lost ---------------------------------------------------------------------------------


def answering(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, change: Callable[[str, list[dict[str, Any]]], Any]
) -> None:
    """``change`` has each query, which was performed, and its rows; it returns those the client has."""
    name = "_rows" if kind == "sync" else "_rows_async"
    real = getattr(connectors, name)

    def fetch(connection: Any, query: Any) -> Any:
        return change(query.sql, real(connection, query))

    async def fetch_async(connection: Any, query: Any) -> Any:
        return change(query.sql, await real(connection, query))

    monkeypatch.setattr(connectors, name, fetch if kind == "sync" else fetch_async)


def losing(statement: str, *losses: BaseException) -> Callable[[str, Any], Any]:
    """The answer to this statement is lost, and those to the queries that come next."""
    left = list(losses)

    def change(sql: str, rows: Any) -> Any:
        if left and (statement in sql or len(left) < len(losses)):
            raise left.pop(0)
        return rows

    return change


def test_a_certificate_that_was_registered_though_the_answer_got_lost_keeps_its_key(
    client: Opener, kind: Kind, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = client("registrar")
    agent = registrar.agents.create("x")
    answering(monkeypatch, kind, losing("register_certificate", psycopg.OperationalError("lost")))
    certificate = registrar.agents.certify(agent.agent_id)
    assert certificate.status == "active"
    registrar.agents.sign(agent.agent_id, "x")


def test_an_authority_that_was_pinned_though_the_answer_got_lost_keeps_its_key(
    client: Opener, kind: Kind, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = client("operator")
    known = {a.key_id for a in operator.authorities.list()}
    answering(monkeypatch, kind, losing("trust_ca", psycopg.OperationalError("lost")))
    [new] = [a for a in operator.authorities.create("Lost CA") if a.key_id not in known]
    local.keys.open(x509.load_der_x509_certificate(new.der).public_key())  # type: ignore[arg-type]
    operator.authorities.distrust(new.key_id)


def test_where_nobody_can_say_whether_it_was_registered_the_key_is_kept(
    client: Opener, kind: Kind, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = client("registrar")
    agent = registrar.agents.create("x")
    lost = psycopg.OperationalError("lost")
    answering(monkeypatch, kind, losing("register_certificate", lost, psycopg.OperationalError("still away")))
    with pytest.raises(psycopg.OperationalError, match="lost") as caught:
        registrar.agents.certify(agent.agent_id)
    assert caught.value is lost
    if hasattr(caught.value, "__notes__"):  # from Python 3.11 on
        assert "is not known, so the new key was kept: local:" in caught.value.__notes__[0]
    registrar.agents.sign(agent.agent_id, "x")  # it was


# Halting without a KMS ----------------------------------------------------------------------------------

HALT_FAULTS: dict[str, tuple[str, list[Fault], str, bool]] = {
    # the request that fails, how, what is said, and whether the receipt is signed all the same
    "opening, throttled": ("GetPublicKey", [THROTTLED], "Throttling", False),
    "opening, hung up": ("GetPublicKey", [hung_up], "did not answer", False),
    "opening, disabled": ("GetPublicKey", [DISABLED], "Disabled", False),
    "opening, wrong spec": ("GetPublicKey", [WRONG_SPEC], "ECC_NIST_P256", False),
    "receipt, throttled": ("Sign", [THROTTLED], "Throttling", False),
    "receipt, timed out": ("Sign", [silent], "did not answer", False),
    "receipt, denied": ("Sign", [DENIED], "AccessDenied", False),
    "receipt, another key": ("Sign", [by_another], "not by the key", False),
    "list, throttled": ("Sign", [good, THROTTLED], "Throttling", True),
    "list, hung up": ("Sign", [good, hung_up], "did not answer", True),
    "list, another key": ("Sign", [good, by_another], "not by the key", True),
}


@alternating("moment", HALT_FAULTS)
def test_a_halt_stands_and_what_is_to_be_signed_waits(
    kms_client: Opener, aws: Place, wire: Wire, moment: str, tmp_path: Path
) -> None:
    operation, faults, said, signed = HALT_FAULTS[moment]
    keys = wire.keys(attempts=1, timeout=1) if silent in faults else aws.keys
    registrar, operator = kms_client("registrar"), kms_client("operator", keys=keys)
    assert operator.authorities.sign_pending().waiting == ()
    agent = registrar.agents.create("x")
    certificate = registrar.agents.certify(agent.agent_id)
    wire.fault(operation, *faults)
    wire.calls.clear()
    start = time.monotonic()
    receipt = operator.agents.halt(agent.agent_id, "why")
    assert time.monotonic() - start < 5
    assert receipt.certificates_revoked == (certificate.serial_number,)
    assert registrar.agents.get(agent.agent_id).status == "suspended"
    assert registrar.certificates.get(certificate.serial_number).status == "revoked"
    assert (receipt.pending is None, receipt.signature is not None) == (signed, signed)
    assert said in (receipt.pending or said)
    assert said in receipt.crl_pending
    if moment.endswith(("throttled", "timed out", "hung up")):
        # What is out of reach is asked once.
        assert wire.count(operation) == len(faults)
    [kept] = operator.agents.halts(agent.agent_id)
    assert (kept.signature is not None) == signed

    wire.calls.clear()
    still = operator.authorities.sign_pending() if faults[-1] is not by_another else None
    if moment.endswith(("throttled", "timed out", "hung up")):
        assert wire.count(operation) == 1
    if still:
        assert (still.receipts, len(still.waiting)) == ((), 1 if signed else 2)
        assert all(said in each for each in still.waiting)
    wire.faults.clear()
    done = kms_client("client_worker").authorities.sign_pending()
    assert done.receipts == (() if signed else (receipt.halt_id,))
    assert (done.crls, done.waiting) == ((aws.ca.key_id,), ())
    [kept] = operator.agents.halts(agent.agent_id)
    assert (kept.pending, kept.key_id) == (None, aws.ca.key_id)
    signature = base64.b64decode(kept.signature)
    assert openssl(tmp_path, x509_pem(aws.ca.certificate), receipt.receipt.encode(), signature)


@pytest.mark.parametrize("how", ["transaction", "autocommit"])
def test_a_halt_in_the_callers_transaction_does_not_ask_the_kms(
    kind: Kind, aws: Place, wire: Wire, how: str
) -> None:
    with opener(kind, aws.database, keys=aws.keys) as client:
        operator, registrar = client("operator", how), client("registrar")
        operator.commits = False
        agent = registrar.agents.create("x")
        certificate = registrar.agents.certify(agent.agent_id)
        wire.calls.clear()
        if how == "autocommit":
            operator.run(operator.target.execute("begin"))
        halted = operator.agents.halt(agent.agent_id, "why")
        revoked = operator.certificates.revoke(certificate.serial_number)
        assert wire.calls == []
        assert "not committed yet" in halted.pending
        assert "not committed yet" in halted.crl_pending
        assert "not committed yet" in revoked.crl_pending
        assert registrar.agents.get(agent.agent_id).status == "active"
        operator.run(operator.target.commit())
        assert registrar.agents.get(agent.agent_id).status == "suspended"
        done = client("operator").authorities.sign_pending()
        assert (done.crls, done.receipts, done.waiting) == ((aws.ca.key_id,), (halted.halt_id,), ())


def test_a_halt_that_stands_is_returned_whatever_happens_after_it(
    kms_client: Opener, aws: Place, wire: Wire
) -> None:
    """The connection ends while the receipt is being signed."""
    registrar, operator = kms_client("registrar"), kms_client("operator")
    agent = registrar.agents.create("x")
    registrar.agents.certify(agent.agent_id)

    def ending(_: dict[str, Any]) -> Answer:
        with aws.database.cluster.connect(autocommit=True) as admin:
            admin.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where usename = 'operator' and datname = %s",
                [aws.database.name],
            )
        return PASS

    given = kms_client("operator", "autocommit")
    wire.fault("Sign", ending, good)
    receipt = given.agents.halt(agent.agent_id, "why")
    assert given.target.closed
    for pending in (receipt.pending, receipt.crl_pending):
        assert pending is not None
        assert "not committed" not in pending
    assert operator.agents.get(agent.agent_id).status == "suspended"
    assert operator.authorities.sign_pending().receipts == (receipt.halt_id,)
    # One's own connection is made anew.
    operator.agents.reinstate(agent.agent_id)
    wire.fault("Sign", ending, good)
    again = operator.agents.halt(agent.agent_id, "why")
    assert (again.pending, again.crl_pending) == (None, None)


def test_a_halt_needs_no_keys(client: Opener, local: Place) -> None:
    operator = client("operator", keys=None)
    agent = client("registrar").agents.create("x")
    receipt = operator.agents.halt(agent.agent_id, "why")
    assert "no key store is named" in receipt.pending
    assert receipt.crl_pending is None  # nothing was revoked
    assert receipt.halt_id in client("operator").authorities.sign_pending().receipts


def test_one_receipt_that_cannot_be_signed_holds_up_no_other(client: Opener, local: Place) -> None:
    operator, registrar = client("operator", keys=None), client("registrar")
    first, second = (
        operator.agents.halt(registrar.agents.create(f"{n}").agent_id, "why").halt_id for n in range(2)
    )
    change = "update kakunin_private.halts set receipt = %s where halt_id = %s"
    [receipt] = [h.receipt for h in operator.agents.halts() if h.halt_id == first]
    local.run(change, receipt.replace("kakunin.halt", "else"), first)
    done = registrar.authorities.sign_pending()
    assert done.receipts == (second,)
    [waits] = done.waiting
    assert str(first) in waits
    assert "not the receipt of a halt" in waits
    local.run(change, receipt, first)
    assert registrar.authorities.sign_pending().receipts == (first,)


@pytest.mark.parametrize("offline_first", [True, False])
def test_a_root_whose_key_is_elsewhere_is_no_hindrance(
    kind: Kind, empty: Database, offline_first: bool
) -> None:
    """Offline, as roots should be: the authority below it publishes revocations and signs receipts."""
    keys = Memory()
    with opener(kind, empty, keys=keys) as client:
        operator, registrar = client("operator"), client("registrar")
        while True:
            made = [a for a in operator.authorities.create("Root", intermediate="CA") if not a.distrusted_at]
            root, ca = sorted(made, key=lambda a: a.issuer_key_id != a.key_id)
            if (root.key_id < ca.key_id) == offline_first:
                break
            operator.authorities.distrust(root.key_id, "keyCompromise")
        keys.discard(keys.open(x509.load_der_x509_certificate(root.der).public_key()))  # type: ignore[arg-type]
        agent = registrar.agents.create("x")
        certificate = registrar.agents.certify(agent.agent_id)
        assert operator.certificates.revoke(certificate.serial_number).crl_pending is None
        assert [(c.key_id, c.entries) for c in operator.authorities.revocation_lists()] == [(ca.key_id, 1)]
        again = registrar.agents.certify(agent.agent_id)
        changed = registrar.agents.update(agent.agent_id, tenant="acme")
        assert (changed.certificates_revoked, changed.crl_pending) == ((again.serial_number,), None)
        registrar.agents.certify(agent.agent_id)
        receipt = operator.agents.halt(agent.agent_id, "x")
        assert (receipt.pending, receipt.crl_pending, receipt.key_id) == (None, None, ca.key_id)
        [waiting] = operator.authorities.sign_pending().waiting
        assert waiting.startswith(f"revocation list of {root.key_id}: no key ")


def test_the_root_does_not_step_in_for_an_authority_whose_key_is_denied(
    kms_client: Opener, aws: Place, wire: Wire
) -> None:
    registrar = kms_client("registrar")
    agent = registrar.agents.create("x")
    wire.fault("GetPublicKey", of_key(DISABLED, aws.ca.signer))
    with aws.unchanged(agent), pytest.raises(SignerError, match="Disabled"):
        registrar.agents.certify(agent.agent_id)
    by_root = registrar.agents.certify(agent.agent_id, authority=aws.root.key_id)
    assert by_root.issuer_key_id == aws.root.key_id


# A database that was tampered with ----------------------------------------------------------------------


@dataclass
class Tampered:
    """An agent of a certificate that may read orders, and an owner of the database who wants it to do all."""

    place: Place
    agent: Any
    certificate: Any

    def edit(self, der: bytes, **columns: Any) -> None:
        with contextlib.suppress(ValueError):
            columns = {"serial": AgentCertificate.from_der(der).serial} | columns
        columns |= {"der": der}
        changes = ", ".join(f"{column} = %s" for column in columns)
        self.place.run(
            f"update kakunin_private.certificates set {changes} where agent_id = %s",
            *columns.values(), self.agent.agent_id,
        )  # fmt: skip

    def plant(self, ca: CertificateAuthority) -> None:
        self.place.run(
            "insert into kakunin_private.authorities"
            " (key_id, der, serial, subject, issuer_key_id, public_key_modulus, not_before, not_after,"
            " trusted_by) select x.key_id, %s, x.serial, x.subject, x.key_id, x.modulus, x.not_before,"
            " x.not_after, 'x' from kakunin_private.x509_read_certificate(%s) x",
            ca.der, ca.der,
        )  # fmt: skip

    @property
    def signer(self) -> Signer:
        """The agent's own, which the agent may use."""
        return self.place.keys.open(AgentCertificate.from_der(self.certificate.der).public_key)


@pytest.fixture
def tampered(client: Opener, local: Place) -> Iterator[Tampered]:
    registrar = client("registrar")
    agent = registrar.agents.create("x", tenant="acme")
    yield Tampered(local, agent, registrar.agents.certify(agent.agent_id, permitted_actions=["orders:read"]))
    # What was planted is not there for the next test.
    local.run("delete from kakunin_private.certificates where agent_id = %s", agent.agent_id)
    local.run("delete from kakunin_private.authorities where trusted_by = 'x'")


def wide(ca: CertificateAuthority, agent: Any, **changes: Any) -> AgentCertificate:
    fields = {"permitted_actions": ["trade:*"], "tenant": "acme"} | changes
    agent_id = fields.pop("agent_id", agent.agent_id)
    return ca.issue(agent_id, fields.pop("public_key", _stranger().public_key()), **fields)


def false_ca(name: str = "Client Agents CA") -> CertificateAuthority:
    """By default of the same name as the real one."""
    return CertificateAuthority.create(LocalSigner(quick_key()), name)


def test_rotating_reads_what_was_signed_and_not_the_row(client: Opener, tampered: Tampered) -> None:
    tampered.edit(
        tampered.certificate.der,
        permitted_actions=["trade:*"],
        financial_scope='{"max_single_trade_usd": 1e9}',
        model="gpt-6",
    )
    rotated = client("registrar").agents.rotate(tampered.agent.agent_id)
    assert rotated.permitted_actions == ("orders:read",)
    assert (rotated.financial_scope, rotated.model, rotated.tenant) == (None, None, "acme")


def test_a_scope_that_nothing_enforces_is_not_renewed_and_can_be_superseded(
    client: Opener, tampered: Tampered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a certificate from before such were refused."""
    with monkeypatch.context() as patch:
        patch.setattr(ca, "_LIMITS", (*ca._LIMITS, "max_transaction_usdd"))
        old = wide(tampered.place.ca, tampered.agent, financial_scope={"max_transaction_usdd": 100})
    tampered.edit(old.der, financial_scope='{"max_transaction_usdd": 100}')
    registrar = client("registrar")
    with (
        tampered.place.unchanged(tampered.agent),
        pytest.raises(BadInputError, match="what nothing enforces: max_transaction_usdd"),
    ):
        registrar.agents.rotate(tampered.agent.agent_id)
    renewed = registrar.agents.certify(
        tampered.agent.agent_id,
        permitted_actions=["trade:*"],
        financial_scope={"max_single_trade_usd": 100},
        overlap=dt.timedelta(0),
    )
    assert renewed.financial_scope == {"max_single_trade_usd": 100}
    assert registrar.certificates.get(old.serial).revocation_reason == "superseded"


FORGERIES: dict[str, Callable[[Tampered], bytes]] = {
    "self-signed": lambda t: wide(false_ca(), t.agent).der,
    "by the agent's key": lambda t: (
        wide(CertificateAuthority.create(t.signer, "Client Agents CA"), t.agent).der
    ),
    "for another agent": lambda t: wide(t.place.ca, t.agent, agent_id=NOBODY).der,
    "for another tenant": lambda t: wide(t.place.ca, t.agent, tenant="other").der,
    "by the root": lambda t: wide(t.place.root, t.agent).der,
    "expired": lambda t: (
        wide(
            t.place.ca,
            t.agent,
            not_before=t.place.ca.certificate.not_valid_before_utc,
            lifetime=2 * DAY / 1e4,
        ).der
    ),
    "of another serial": lambda t: wide(t.place.ca, t.agent).der,
    "the authority's own": lambda t: t.place.ca.der,
    "the root's own": lambda t: t.place.root.der,
    "one bit": lambda t: t.certificate.der.replace(b"orders:read", b"orders:reae"),
    "no certificate": lambda _: b"\x30\x00",
}


@alternating("forgery", FORGERIES)
def test_a_certificate_that_was_exchanged_is_not_renewed(
    client: Opener, tampered: Tampered, forgery: str
) -> None:
    der = FORGERIES[forgery](tampered)
    tampered.edit(
        der, **{"serial": tampered.certificate.serial_number} if forgery == "of another serial" else {}
    )
    signed = count_signatures(tampered.place)
    with tampered.place.unchanged(tampered.agent), pytest.raises(BadInputError) as caught:
        client("registrar").agents.rotate(tampered.agent.agent_id)
    if forgery != "for another tenant":  # the database itself refuses that one, in the end
        assert "is not what its authority signed" in str(caught.value)
        assert "tampered" in caught.value.hint
    assert signed() == (1 if forgery == "for another tenant" else 0)


def count_signatures(place: Place) -> Callable[[], int]:
    """How many signatures the authorities make from now on, in this process."""
    made: list[bytes] = []
    real = LocalSigner.sign
    authorities = [signer.public_key() for signer in (place.ca.signer, place.root.signer)]

    def sign(self: LocalSigner, digest: bytes) -> bytes:
        if self.public_key() in authorities:
            made.append(digest)
        return real(self, digest)

    LocalSigner.sign = sign  # type: ignore[method-assign]

    def stop() -> int:
        LocalSigner.sign = real  # type: ignore[method-assign]
        return len(made)

    return stop


def test_an_authority_somebody_else_pinned_does_not_widen_what_ours_renews(
    client: Opener, tampered: Tampered
) -> None:
    """With the operator's and the registrar's role, and no key of ours: nothing is edited, all is regular."""
    evil = false_ca("Evil CA")
    operator, registrar = client("operator"), client("registrar")
    operator.authorities.trust(evil.der)
    operator.certificates.revoke(tampered.certificate.serial_number)
    with tampered.place.database.connect("registrar") as connection:
        wide(evil, tampered.agent).register(connection)
    signed = count_signatures(tampered.place)
    with tampered.place.unchanged(tampered.agent), pytest.raises(SignerError):
        registrar.agents.rotate(tampered.agent.agent_id)
    assert signed() == 0
    operator.authorities.distrust(evil.key_id, "keyCompromise")


def test_nor_does_an_agents_key_that_passes_for_an_authoritys(client: Opener, tampered: Tampered) -> None:
    """The agent signs a wider certificate with its own key, which the store has; the owner pins that key."""
    evil = CertificateAuthority.create(tampered.signer, "Evil CA")
    tampered.plant(evil)
    tampered.edit(wide(evil, tampered.agent).der, issuer_key_id=evil.key_id)
    signed = count_signatures(tampered.place)
    rotated = client("registrar").agents.rotate(tampered.agent.agent_id)
    assert signed() == 0  # the agent's key has signed once more, and nobody believes that but its owner
    assert rotated.issuer_key_id == evil.key_id


@alternating("exchanged", ["the authority's own", "with its key", "with its key, by the agent's"])
def test_an_authoritys_key_is_not_taken_for_an_agents(
    client: Opener, tampered: Tampered, exchanged: str
) -> None:
    """The owner has the row name the authority's key, and somebody asks to sign what a certificate is."""
    ca = tampered.place.ca
    if exchanged == "the authority's own":
        tampered.edit(ca.der)
    elif exchanged == "with its key":
        tampered.edit(wide(false_ca(), tampered.agent, public_key=ca.signer.public_key()).der)
    else:
        # With the agent's help, whose key passes for an authority's: then only what is signed tells. Not so
        # where authorities' keys are in a store of their own.
        evil = CertificateAuthority.create(tampered.signer, "Evil CA")
        tampered.plant(evil)
        forged = wide(evil, tampered.agent, public_key=ca.signer.public_key())
        tampered.edit(forged.der, issuer_key_id=evil.key_id)
    loot = wide(false_ca(), tampered.agent).certificate.tbs_certificate_bytes
    registrar = client("registrar")
    apart = client("registrar", ca_keys=tampered.place.keys, keys=Memory())
    signed = count_signatures(tampered.place)
    with pytest.raises(BadInputError):
        registrar.agents.sign(tampered.agent.agent_id, loot)
    if "by the agent's" not in exchanged:
        with pytest.raises(BadInputError):
            registrar.agents.sign(tampered.agent.agent_id, "x")
    with pytest.raises((SignerError, BadInputError)):
        apart.agents.sign(tampered.agent.agent_id, "x")
    assert signed() == 0


def test_another_agents_key_is_not_taken_for_an_agents(client: Opener, tampered: Tampered) -> None:
    other = client("registrar").agents.create("other", tenant="acme")
    theirs = client("registrar").agents.certify(other.agent_id)
    forged = wide(false_ca(), tampered.agent, public_key=AgentCertificate.from_der(theirs.der).public_key)
    for der, serial in ((theirs.der, tampered.certificate.serial_number), (forged.der, forged.serial)):
        tampered.edit(der, serial=serial)
        with pytest.raises(BadInputError, match="is not what its authority signed"):
            client("registrar").agents.sign(tampered.agent.agent_id, "x")


def test_an_agent_that_changed_since_it_was_looked_at_is_not_certified(client: Opener, local: Place) -> None:
    """The registrar makes agents, and must not have the authority sign more than its keeper has seen."""
    registrar = client("registrar")
    agent = registrar.agents.create("x", model="gpt-4o", model_hash=HASH, tenant="acme")
    for change in ({"tenant": "other"}, {"model": "gpt-6"}, {"model_hash": OTHER_HASH}):
        registrar.agents.update(agent.agent_id, **change)
        with local.unchanged(agent), pytest.raises(BadInputError, match="is not what it was"):
            registrar.agents.certify(agent)
        agent = registrar.agents.get(agent.agent_id)
    registrar.agents.update(agent.agent_id, name="another name")  # no certificate says it
    certificate = registrar.agents.certify(agent)
    assert (certificate.tenant, certificate.model, certificate.model_hash) == ("other", "gpt-6", OTHER_HASH)


def test_a_certificate_is_for_the_agent_that_was_asked_for(
    client: Opener, kind: Kind, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the database answers for another."""
    registrar = client("registrar")
    asked, other = registrar.agents.create("asked"), registrar.agents.create("other")

    def lie(sql: str, rows: list[dict[str, Any]]) -> Any:
        return [row | {"agent_id": other.agent_id} for row in rows] if "agent_id = " in sql else rows

    answering(monkeypatch, kind, lie)
    for method in (registrar.agents.certify, registrar.agents.rotate):
        certificate = AgentCertificate.from_der(method(asked.agent_id).der)
        assert certificate.agent_id == asked.agent_id
    assert registrar.agents.sign(asked.agent_id, "x").certificate_serial == certificate.serial


def test_what_a_certificate_points_to_is_not_up_to_the_database(
    client: Opener, kind: Kind, local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = client("registrar", crl_url="http://crl.example/{key_id}.crl")
    agent = registrar.agents.create("x")

    def lie(sql: str, rows: list[dict[str, Any]]) -> Any:
        return [row | {"key_id": "../x"} for row in rows] if "kakunin.authorities" in sql else rows

    answering(monkeypatch, kind, lie)
    certificate = x509.load_der_x509_certificate(registrar.agents.certify(agent.agent_id).der)
    point = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value[0]
    assert (
        point.full_name[0].value == f"http://crl.example/{subject_key_id(local.ca.signer.public_key())}.crl"
    )


# Rotation -----------------------------------------------------------------------------------------------


def test_rotating_carries_over_and_overlaps(client: Opener, local: Place) -> None:
    registrar, auditor = client("registrar"), client("client_auditor")
    agent = registrar.agents.create("x", model="gpt-4o", model_hash=HASH, tenant="acme")
    one = registrar.agents.certify(
        agent.agent_id, permitted_actions=["a:b", "c:*"], financial_scope=SCOPE, lifetime=3 * DAY
    )
    two = registrar.agents.rotate(agent.agent_id)
    for name in ("permitted_actions", "financial_scope", "model", "model_hash", "tenant", "issuer_key_id"):
        assert getattr(two, name) == getattr(one, name), name
    assert (two.not_after - two.not_before, two.status) == (3 * DAY, "active")
    old = auditor.certificates.get(one.serial_number)
    assert (old.status, old.revocation_reason) == ("active", "superseded")
    assert abs(old.revoked_at - dt.datetime.now(dt.timezone.utc) - HOUR) < 5 * DAY / 1440
    three = registrar.agents.rotate(agent.agent_id, overlap=dt.timedelta(0), lifetime=DAY)
    assert three.not_after - three.not_before == DAY
    assert auditor.certificates.get(two.serial_number).status == "revoked"
    assert auditor.certificates.get(one.serial_number).status == "active"  # its hour is not over
    with local.unchanged(agent), pytest.raises(BadInputError, match="0 to 30 days"):
        registrar.agents.rotate(agent.agent_id, overlap=31 * DAY)
    with local.unchanged(agent), pytest.raises(BadInputError, match="365 days"):
        registrar.agents.rotate(agent.agent_id, lifetime=dt.timedelta(0))
    client("operator").agents.suspend(agent.agent_id, "x")
    for call in (registrar.agents.rotate, lambda agent_id: registrar.agents.sign(agent_id, "x")):
        with local.unchanged(agent), pytest.raises(AgentSuspendedError):
            call(agent.agent_id)


def test_the_authority_that_renews_is_the_one_that_issued(client: Opener, local: Place) -> None:
    registrar, operator = client("registrar"), client("operator")
    agent = registrar.agents.create("x")
    registrar.agents.certify(agent.agent_id)
    made = operator.authorities.create("Newer CA")
    [newer] = [a.key_id for a in made if a.name == "CN=Newer CA" and a.distrusted_at is None]
    assert registrar.agents.rotate(agent.agent_id).issuer_key_id == local.ca.key_id
    moved = registrar.agents.certify(agent.agent_id, overlap=HOUR, authority=newer)
    assert moved.issuer_key_id == newer
    operator.authorities.distrust(newer)
    with local.unchanged(agent), pytest.raises(BadInputError, match=f"no authority {newer} is trusted"):
        registrar.agents.rotate(agent.agent_id)


# Messages -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _signing(local: Place) -> Any:
    with Kakunin(local.database.dsn("registrar"), keys=local.keys) as registrar:
        return registrar.agents.certify(registrar.agents.create("signs").agent_id)


@pytest.fixture
def signing(client: Opener, _signing: Any) -> tuple[Client, Any]:
    """A client, and a certificate that stays."""
    return client("registrar"), _signing


def test_messages_of_every_form(signing: tuple[Client, Any], tmp_path: Path) -> None:
    registrar, certificate = signing
    payloads: list[tuple[Any, bytes]] = [
        ({"b": 1.0, "a": "é\n", "c": [True, None], "\U0001f600": 1e21, "\uff5e": 0}, b""),
        ({}, b"{}"),
        ("text é", "text é".encode()),
        ("", b""),
        (b"", b""),
        (b"\x00\xff", b"\x00\xff"),
        ("0" * 50, b"0" * 50),  # in DER, a structure of this length
        ("1.5", b"1.5"),
        ("example.com", b"example.com"),
        ("eyes.are.open", b"eyes.are.open"),
        (b"x" * 100_000, b"x" * 100_000),
    ]
    for payload, body in payloads:
        if isinstance(payload, dict) and payload:
            body = '{"a":"é\\n","b":1,"c":[true,null],"😀":1e+21,"～":0}'.encode()  # noqa: PLW2901, RUF001
        signed = registrar.agents.sign(certificate.agent_id, payload)
        assert signed.payload_hash == "sha256:" + hashlib.sha256(body).hexdigest()
        raw = base64.b64decode(signed.signature, validate=True)
        if not isinstance(payload, str):
            assert openssl(tmp_path, certificate.pem, body, raw)
        for signature in (signed.signature, raw):
            for asked in (payload, body):
                question = {"signature": signature, "certificate_serial": certificate.serial_number}
                assert registrar.verify.message(payload=asked, **question).valid
        assert not registrar.verify.message(payload=body + b"x", **question).signature_valid
    assert not openssl(tmp_path, certificate.pem, body + b"x", raw)
    now = dt.datetime.now(dt.timezone.utc)
    assert abs(now - signed.signed_at) < HOUR


def test_whose_message_it_is(client: Opener, signing: tuple[Client, Any]) -> None:
    registrar, certificate = signing
    anybody = client("agent_1")
    signed = registrar.agents.sign(certificate.agent_id, "x")
    question = {
        "payload": "x",
        "signature": signed.signature,
        "certificate_serial": certificate.serial_number,
    }
    for agent_id in (certificate.agent_id, str(certificate.agent_id), None):
        assert anybody.verify.message(**question, agent_id=agent_id).valid
    of_another = anybody.verify.message(**question, agent_id=NOBODY)
    assert (of_another.valid, of_another.signature_valid) == (False, True)
    assert of_another.agent_id == certificate.agent_id
    with pytest.raises(BadInputError, match="UUID"):
        anybody.verify.message(**question, agent_id="me")
    unknown = anybody.verify.message(**question | {"certificate_serial": "AB:CD"}, agent_id=NOBODY)
    assert (unknown.valid, unknown.certificate_status, unknown.agent_id) == (False, "unknown", None)
    assert anybody.verify.certificate("AB:CD").status == "unknown"
    for wrong in (b"", b"x", base64.b64decode(signed.signature)[:-1], b"\0" * 256):
        assert not anybody.verify.message(**question | {"signature": wrong}).signature_valid


@pytest.mark.parametrize(
    "payload",
    [
        [], [("a", 1)], None, 5, bytearray(b"x"), {"a": float("nan")}, {"a": 2**60}, {1: 2}, {"a": b"x"},
        {"a": "\ud800"}, "\ud800",
    ],
    ids=repr,
)  # fmt: skip
def test_what_has_no_one_form_is_not_signed(local: Place, payload: Any) -> None:
    with pytest.raises(BadInputError):
        sign_payload(_stranger(), "AB", payload)


def test_what_is_nested_too_deep_for_a_form_is_not_signed() -> None:
    payload: dict[str, Any] = {}
    for _ in range(10_000):
        payload = {"a": payload}
    with pytest.raises(BadInputError, match="no canonical JSON form"):
        sign_payload(_stranger(), "AB", payload)


def b64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# Headers of an assertion, with what is put in for the certificate's serial. A `!` is before those that the
# database takes for none.
HEADERS: dict[str, bytes | Callable[[bytes], bytes]] = {
    "plain": b'{"alg":"RS256","typ":"JWT","kid":"%s"}',
    "spaces": b' \n\t\r{ "alg" :\n"RS256" , "kid":"%s" } \n',
    "more members": b'{"alg":"RS256","kid":"%s","x":{"y":[1,2.5e3,null,true]}}',
    "twice": b'{"alg":"none","alg":"RS256","kid":"x","kid":"%s"}',
    "escapes": b'{"\\u0061lg":"\\u0052S256","kid":"%s","e":"\\ud83d\\ude00"}',
    "a number of 4301 digits": b'{"alg":"RS256","kid":"%s","n":' + b"1" * 4301 + b"}",
    "a negative number of 5000 digits": b'{"alg":"RS256","kid":"%s","n":-' + b"9" * 5000 + b"}",
    "a fraction of 5000 digits": b'{"alg":"RS256","kid":"%s","n":0.' + b"1" * 5000 + b"}",
    "a big exponent": b'{"alg":"RS256","kid":"%s","n":1e131071}',
    "deep": b'{"alg":"RS256","kid":"%s","n":' + b"[" * 900 + b"]" * 900 + b"}",
    "deeper": b'{"alg":"RS256","kid":"%s","n":' + b"[" * 2500 + b"]" * 2500 + b"}",
    "long": b'{"alg":"RS256","kid":"%s","n":"' + b"x" * 5000 + b'"}',
    "utf-8": '{"alg":"RS256","kid":"%s","é":"東"}'.encode(),
    "delete and c1": b'{"alg":"RS256","kid":"%s","n":"\x7f\xc2\x85\xc2\xa0\xe2\x80\xa8"}',
    "! control characters": b'{"alg":"RS256","kid":"%s","n":"\n\x01"}',
    "! not utf-8": b'{"alg":"RS256","kid":"%s","n":"\xff\xfe"}',
    "! no base64url": lambda kid: (
        b64url(b'{"alg":"RS256","kid":"%s","n":"??>>"}' % kid).replace(b"_", b"/").replace(b"-", b"+")
    ),
    "! padding": lambda kid: b64url(b'{"alg":"RS256","kid":"%s"}' % kid) + b"==",
    "! white space": lambda kid: b64url(b'{"alg":"RS256","kid":"%s"}' % kid).replace(b"J", b"J\n "),
}


@alternating("name", HEADERS)
def test_what_could_open_a_session_is_not_signed(
    client: Opener, signing: tuple[Client, Any], local: Place, name: str
) -> None:
    registrar, certificate = signing
    signer = local.keys.open(AgentCertificate.from_der(certificate.der).public_key)
    kid = certificate.serial_number.encode()
    header = HEADERS[name]
    first = header(kid) if callable(header) else b64url(header.replace(b"%s", kid))
    now = int(time.time())
    urn = f"urn:kakunin:agent:{certificate.agent_id}"
    claims = {"iss": urn, "sub": urn, "aud": f"kakunin:{local.database.installation_id}", "iat": now}
    claims |= {"exp": now + 60, "jti": str(uuid.uuid4())}
    message = first + b"." + b64url(json.dumps(claims).encode())

    # What would come of it.
    signature = signer.sign(hashlib.sha256(message).digest())
    ask = "select kakunin.open_session(%s)"
    assertion = (message + b"." + b64url(signature)).decode()
    if name.startswith("!"):
        with pytest.raises(psycopg.Error):
            local.database.value("agent_1", ask, [assertion])
    else:
        assert local.database.value("agent_1", ask, [assertion])

    payloads: list[Any] = [message, message + b".", message + b".x", first + b".", first + b".any thing"]
    with contextlib.suppress(UnicodeDecodeError):
        payloads.append(message.decode())
    for payload in payloads:
        with pytest.raises(BadInputError, match="could be a session assertion"):
            registrar.agents.sign(certificate.agent_id, payload)
    with pytest.raises(BadInputError, match="could be a session assertion"):
        AgentCredential(certificate.agent_id, certificate.serial_number, signer).sign(message)
    # The hint's way out.
    held = {"message": base64.b64encode(message).decode()}
    assert registrar.agents.sign(certificate.agent_id, held).signature


def signed_parts() -> dict[str, bytes]:
    """What is signed of everything an authority's key may sign, but receipts."""
    key = _stranger()._key
    authority = LocalSigner.generate()
    ca = CertificateAuthority.create(authority, "A CA")
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "x")])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    certificate = ca.issue(NOBODY, _stranger().public_key(), permitted_actions=["a:*"]).certificate
    answer = (
        ocsp.OCSPResponseBuilder()
        .add_response(
            certificate, ca.certificate, hashes.SHA256(), ocsp.OCSPCertStatus.GOOD,
            dt.datetime.now(dt.timezone.utc), None, None, None,
        )
        .responder_id(ocsp.OCSPResponderEncoding.HASH, ca.certificate)
        .sign(authority._key, hashes.SHA256())
    )  # fmt: skip
    signed = certificate.tbs_certificate_bytes
    revoked = ca.revocation_list([], 1).tbs_certlist_bytes

    def content(der: bytes) -> bytes:
        return der[2 + (der[1] & 0x7F if der[1] >= 0x80 else 0) :]

    return {
        "authority": ca.certificate.tbs_certificate_bytes,
        "agent": signed,
        "list": revoked,
        "request": request.tbs_certrequest_bytes,
        "answer": answer.tbs_response_bytes,
        # Of version 1, which is not said: a certificate begins with its serial, a list with its algorithm.
        "version 1": _der(0x30, content(signed)[5:]),
        "list, version 1": _der(0x30, content(revoked)[3:]),
        "indefinite length": b"\x30\x80" + content(signed) + b"\0\0",
    }


def test_what_could_be_a_certificate_is_not_signed() -> None:
    for name, message in signed_parts().items():
        with pytest.raises(BadInputError, match="could be a certificate"):
            sign_payload(_stranger(), "AB", message)
        for other in (message[:-1], message + b"x", b"x" + message, {"held": message.hex()}, message.hex()):
            if name != "indefinite length":
                assert sign_payload(_stranger(), "AB", other).signature


# Two at once --------------------------------------------------------------------------------------------


class Together(Wrapped):
    """A store in which two keys are made at the same time, after all that is looked at before."""

    def __init__(self, keys: KeyStore) -> None:
        super().__init__(keys)
        self.barrier = threading.Barrier(2, timeout=10)

    def create(self, label: str) -> Signer:
        self.barrier.wait()
        return super().create(label)


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What each returned or raised."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(outcome, calls))


def test_of_two_that_certify_one_agent_at_once_exactly_one_wins(client: Opener, local: Place) -> None:
    keys = Together(local.keys)
    one, two = client("registrar", keys=keys), client("registrar", keys=keys)
    agent = one.agents.create("x")
    before = local.found()
    done = at_once(*(lambda c=c: c.agents.certify(agent.agent_id) for c in (one, two)))
    [won] = [d for d in done if isinstance(d, clients.Certificate)]
    [lost] = [d for d in done if isinstance(d, BadInputError)]
    assert f"has an active one already, {won.serial_number}" in str(lost)
    assert local.certificates(agent.agent_id) == 1
    assert len(local.found() - before) == 1
    one.agents.sign(agent.agent_id, "x")


def test_two_that_rotate_one_agent_at_once_both_win_and_one_certificate_stays(
    client: Opener, local: Place
) -> None:
    one = client("registrar")
    agent = one.agents.create("x")
    one.agents.certify(agent.agent_id, permitted_actions=["a:b"])
    keys = Together(local.keys)
    rotating = [client("registrar", keys=keys) for _ in range(2)]
    done = at_once(*(lambda c=c: c.agents.rotate(agent.agent_id) for c in rotating))
    assert [d.permitted_actions for d in done] == [("a:b",)] * 2
    left = [c for c in one.certificates.list(agent.agent_id) if c.revoked_at is None]
    assert len(left) == 1
    assert one.agents.sign(agent.agent_id, "x").certificate_serial == left[0].serial_number


class Meeting(Signer):
    """A signer whose signatures are made when two are asked for."""

    def __init__(self, signer: Signer, barrier: threading.Barrier) -> None:
        self.signer, self.barrier = signer, barrier

    @property
    def key_id(self) -> str:
        return self.signer.key_id

    def public_key(self) -> rsa.RSAPublicKey:
        return self.signer.public_key()

    def sign(self, digest: bytes) -> bytes:
        with contextlib.suppress(threading.BrokenBarrierError):
            self.barrier.wait(timeout=1)
        return self.signer.sign(digest)


class Met(Wrapped):
    def __init__(self, keys: KeyStore) -> None:
        super().__init__(keys)
        self.barrier = threading.Barrier(2)

    def open(self, public_key: rsa.RSAPublicKey) -> Signer:
        return Meeting(self.keys.open(public_key), self.barrier)


def test_two_that_sign_what_is_pending_at_once_are_both_fine(client: Opener, local: Place) -> None:
    registrar, halting = client("registrar"), client("operator", keys=None)
    registrar.authorities.sign_pending()
    agent = registrar.agents.create("x")
    certificate = registrar.agents.certify(agent.agent_id)
    receipt = halting.agents.halt(agent.agent_id, "why")
    keys = Met(local.keys)
    signing = [client(user, keys=keys) for user in ("client_worker", "operator")]
    done = at_once(*(lambda c=c: c.authorities.sign_pending() for c in signing))
    assert [d.waiting for d in done] == [(), ()]
    assert sorted(itertools.chain(*(d.crls for d in done))) == [local.ca.key_id]  # one was quicker
    assert {*itertools.chain(*(d.receipts for d in done))} == {receipt.halt_id}
    [crl] = [c for c in registrar.authorities.revocation_lists() if c.key_id == local.ca.key_id]
    serial = AgentCertificate.from_der(certificate.der).certificate.serial_number
    assert x509.load_der_x509_crl(crl.der).get_revoked_certificate_by_serial_number(serial)
    [kept] = registrar.agents.halts(agent.agent_id)
    public = local.ca.signer.public_key()
    public.verify(
        base64.b64decode(kept.signature), kept.receipt.encode(), padding.PKCS1v15(), hashes.SHA256()
    )


# asyncio ------------------------------------------------------------------------------------------------


async def until(reached: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not reached():  # of a thread, or of another process
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_the_loop_goes_on_while_the_kms_is_slow(aws: Place, wire: Wire) -> None:
    """The KMS waits for what only the loop does."""
    asked, answer = threading.Event(), threading.Event()

    def slow(_: dict[str, Any]) -> Answer:
        asked.set()
        in_time.append(answer.wait(5))
        answer.clear()
        return PASS

    in_time: list[bool] = []
    async with AsyncKakunin(aws.database.dsn("registrar"), keys=aws.keys) as registrar:
        agent = await registrar.agents.create("x")
        for operation in ("GetPublicKey", "CreateKey", "CreateAlias", "Sign"):
            wire.fault(operation, slow)
        for work in (registrar.agents.certify(agent.agent_id), registrar.agents.sign(agent.agent_id, "x")):
            task = asyncio.ensure_future(work)
            while not task.done():
                await until(lambda task=task: asked.is_set() or task.done())
                asked.clear()
                answer.set()
            await task
    assert in_time == [True] * 8


class Held(Wrapped):
    """A store whose ``create`` and signatures are done, but return only when they are let."""

    def __init__(self, keys: KeyStore, *, create: bool = False, sign: bool = False) -> None:
        super().__init__(keys)
        self.holds_create, self.holds_sign = create, sign
        self.reached, self.release = threading.Event(), threading.Event()
        self.discarded: list[Signer] = []

    def hold(self) -> None:
        self.reached.set()
        assert self.release.wait(10)

    def create(self, label: str) -> Signer:
        signer = self.keys.create(label)
        if self.holds_create:
            self.hold()
        return signer

    def open(self, public_key: rsa.RSAPublicKey) -> Signer:
        signer = self.keys.open(public_key)
        return HeldSigner(signer, threading.Barrier(1), self) if self.holds_sign else signer

    def discard(self, signer: Signer) -> None:
        self.keys.discard(signer)
        self.discarded.append(signer)


class HeldSigner(Meeting):
    def __init__(self, signer: Signer, barrier: threading.Barrier, store: Held) -> None:
        super().__init__(signer, barrier)
        self.store = store

    def sign(self, digest: bytes) -> bytes:
        self.store.hold()
        return self.signer.sign(digest)


@pytest.mark.parametrize("made", ["certificate", "authority"])
@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_while_a_key_is_made_waits_for_it_and_takes_it_away(
    local: Place, made: str, times: int
) -> None:
    keys = Held(local.keys, create=True)
    user = "registrar" if made == "certificate" else "operator"
    async with AsyncKakunin(local.database.dsn("registrar")) as registrar:
        agent = await registrar.agents.create("x")
    async with AsyncKakunin(local.database.dsn(user), keys=keys) as client:
        known = await client.authorities.list()
        signed = count_signatures(local)
        with local.unchanged(agent):
            work = (
                client.agents.certify(agent.agent_id)
                if made == "certificate"
                else client.authorities.create()
            )
            task = asyncio.ensure_future(work)
            await until(keys.reached.is_set)
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0.02)
            assert not task.done()
            keys.release.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert signed() == 0  # nor is anything signed for it
        assert len(keys.discarded) == 1
        assert await client.authorities.list() == known


async def test_cancelled_while_the_authority_signs_does_not_wait_for_it(local: Place) -> None:
    keys = Held(local.keys, sign=True)
    async with AsyncKakunin(local.database.dsn("registrar"), keys=keys) as client:
        agent = await client.agents.create("x")
        with local.unchanged(agent):
            task = asyncio.ensure_future(client.agents.certify(agent.agent_id))
            await until(keys.reached.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        keys.release.set()  # and not before
        await asyncio.sleep(0.05)
        assert local.certificates(agent.agent_id) == 0


async def test_cancelled_while_the_database_registers(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more while the client looks whether that was done."""
    looking = threading.Event()
    real = connectors._rows_async

    async def fetch(connection: Any, query: Any) -> Any:
        if query.sql.startswith("select from kakunin.certificates"):
            looking.set()
            await asyncio.sleep(0.05)
        return await real(connection, query)

    monkeypatch.setattr(connectors, "_rows_async", fetch)
    async with AsyncKakunin(local.database.dsn("registrar"), keys=local.keys) as client:
        agent = await client.agents.create("x")
        with local.database.connect("installer") as held:
            held.execute(
                "select from kakunin_private.agents where agent_id = %s for update", [agent.agent_id]
            )
            with local.unchanged(agent):
                task = asyncio.ensure_future(client.agents.certify(agent.agent_id))
                with local.database.cluster.connect(autocommit=True) as watching:
                    waits = "usename = 'registrar' and wait_event_type = 'Lock'"
                    asked = f"select from pg_stat_activity where {waits}"
                    await until(lambda: watching.execute(asked).fetchall())
                task.cancel()
                await until(looking.is_set)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        assert (await client.agents.certify(agent.agent_id)).status == "active"


async def test_cancelled_when_it_was_registered_already_keeps_the_key(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with AsyncKakunin(local.database.dsn("registrar"), keys=local.keys) as client:
        agent = await client.agents.create("x")
        answering(monkeypatch, "async", losing("register_certificate", asyncio.CancelledError()))
        with pytest.raises(asyncio.CancelledError):
            await client.agents.certify(agent.agent_id)
        assert local.certificates(agent.agent_id) == 1
        await client.agents.sign(agent.agent_id, "x")


def test_interrupted_when_it_was_registered_already_keeps_the_key(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Kakunin(local.database.dsn("registrar"), keys=local.keys) as client:
        agents = [client.agents.create(name) for name in "ab"]
        answering(monkeypatch, "sync", losing("register_certificate", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            client.agents.certify(agents[0].agent_id)
        client.agents.sign(agents[0].agent_id, "x")
        # Before that, it is as if nothing had been.
        for statement in ("kakunin.agents", "kakunin.authorities"):
            answering(monkeypatch, "sync", losing(statement, KeyboardInterrupt()))
            with local.unchanged(agents[1]), pytest.raises(KeyboardInterrupt):
                client.agents.certify(agents[1].agent_id)


def test_a_loop_that_ends_meanwhile_leaves_no_key(local: Place) -> None:
    """asyncio.run() cancels every task when its own is done, as on Ctrl-C."""
    keys = Held(local.keys, create=True)

    async def main() -> None:
        agent = await client.agents.create("x")
        tasks.append(asyncio.ensure_future(client.agents.certify(agent.agent_id)))
        await until(keys.reached.is_set)
        asyncio.get_running_loop().call_later(0.1, keys.release.set)
        await client.aclose()

    client = AsyncKakunin(local.database.dsn("registrar"), keys=keys)
    tasks: list[asyncio.Future[Any]] = []
    with local.unchanged():
        asyncio.run(main())
    assert tasks[0].cancelled()
    assert len(keys.discarded) == 1


async def test_cancelled_while_the_key_is_taken_away_is_taken_away_and_cancelled(local: Place) -> None:
    class Slow(Wrapped):
        def __init__(self, keys: KeyStore) -> None:
            super().__init__(keys)
            self.reached = threading.Event()

        def discard(self, signer: Signer) -> None:
            self.reached.set()
            time.sleep(0.2)
            super().discard(signer)

    keys = Slow(local.keys)
    async with AsyncKakunin(local.database.dsn("registrar"), keys=keys) as client:
        agent = await client.agents.create("x")
        with local.unchanged(agent):
            task = asyncio.ensure_future(client.agents.certify(agent.agent_id, permitted_actions=["no such"]))
            await until(keys.reached.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
        # Python 3.10 raises one made from the task's.
        raised = caught.value if sys.version_info >= (3, 11) else caught.value.__context__
        assert isinstance(getattr(raised, "__cause__", None), BadInputError)


async def test_a_halt_that_is_cancelled_stands(local: Place) -> None:
    keys = Held(local.keys, sign=True)
    async with AsyncKakunin(local.database.dsn("registrar"), keys=local.keys) as registrar:
        agent = await registrar.agents.create("x")
        certificate = await registrar.agents.certify(agent.agent_id)
        async with AsyncKakunin(local.database.dsn("operator"), keys=keys) as operator:
            task = asyncio.ensure_future(operator.agents.halt(agent.agent_id, "why"))
            await until(keys.reached.is_set)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            keys.release.set()
        assert (await registrar.certificates.get(certificate.serial_number)).status == "revoked"
        [halt] = await registrar.agents.halts(agent.agent_id)
        assert halt.signature is None
        assert (await registrar.authorities.sign_pending()).receipts == (halt.halt_id,)
