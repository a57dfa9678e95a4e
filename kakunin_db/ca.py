"""A certificate authority for agents (RFC 5280), its key held by any signer.

An agent's certificate carries what the agent is and what it may do, in extensions below
``1.3.6.1.4.1.61411.1``: the agent's URN (.1), its model and model hash (.2), its permitted actions (.3), its
tenant (.4) and its financial scope (.5). sql/24_x509.sql has their types. The database reads them from there
and nowhere else.

What is signed is built here, by ``cryptography``, from values: an authority never signs bytes it was handed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import re
import secrets
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import BadInputError, SignerError, named
from .model_hash import check_model_hash
from .serials import normalize_serial
from .signers import Signer, check_rsa_key

ARC = "1.3.6.1.4.1.61411.1"
AGENT_URN = x509.ObjectIdentifier(f"{ARC}.1")
MODEL = x509.ObjectIdentifier(f"{ARC}.2")
PERMITTED_ACTIONS = x509.ObjectIdentifier(f"{ARC}.3")
TENANT = x509.ObjectIdentifier(f"{ARC}.4")
FINANCIAL_SCOPE = x509.ObjectIdentifier(f"{ARC}.5")

ALGORITHM = "RSASSA_PKCS1_V1_5_SHA_256"

ONE_DAY = dt.timedelta(days=1)
_ACTION = re.compile(r"[A-Za-z0-9_.:/-]{1,128}|[A-Za-z0-9_.:/-]{1,126}:\*")
_RECEIPT = {
    "agent_id", "certificates", "halt_id", "halted_at", "halted_by", "installation", "reason", "type"
}  # fmt: skip
# What is enforced (docs/risk.md), and so all that a financial scope may have: no other name limits anything.
_LIMITS = (
    "max_single_trade_usd", "daily_limit_usd", "leverage_permitted", "max_leverage_ratio", "permitted_venues",
    "permitted_instruments",
)  # fmt: skip
_MAX_SIZE = 16384
# The CA's and the database's clocks may differ a little; a certificate is good from just before now.
_BACKDATE = dt.timedelta(minutes=5)


def _scope(scope: Mapping[str, Any]) -> str:
    text = canonical_json(scope).decode()
    if re.search(r"(?<!\\)(\\\\)*\\u0000", text):
        raise BadInputError("the financial scope has a zero character in it, which no database holds")
    if unknown := [str(name) for name in scope if name not in _LIMITS]:
        raise BadInputError(
            f"the financial scope has what nothing enforces: {', '.join(unknown)}",
            f"It may have {', '.join(_LIMITS)}.",
        )
    return text


def agent_urn(agent_id: uuid.UUID) -> str:
    """``urn:kakunin:agent:<uuid>``, the agent's name in certificates and assertions."""
    return f"urn:kakunin:agent:{agent_id}"


def ledger_urn(installation: uuid.UUID) -> str:
    """``urn:kakunin:ledger:<uuid>``, the name in the certificate of the key that signs its tree heads."""
    return f"urn:kakunin:ledger:{installation}"


def _der(tag: int, content: bytes) -> bytes:
    """One DER element with a definite length (X.690 section 8.1)."""
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _utf8(text: str) -> bytes:
    return _der(0x0C, text.encode())


def _sequence(texts: Iterable[str]) -> bytes:
    return _der(0x30, b"".join(map(_utf8, texts)))


def _texts(der: bytes) -> list[str]:
    """The UTF8Strings of what :func:`_sequence` or :func:`_utf8` wrote."""
    texts, at = [], 0
    while at < len(der):
        tag, size = der[at], der[at + 1]
        at += 2
        if size >= 0x80:
            count = size & 0x7F
            size, at = int.from_bytes(der[at : at + count], "big"), at + count
        if tag == 0x30:
            texts += _texts(der[at : at + size])
        elif tag == 0x0C:
            texts.append(der[at : at + size].decode())
        else:
            raise BadInputError("an extension of the certificate is not what this version writes")
        at += size
    return texts


class _SigningKey(rsa.RSAPrivateKey):
    """A signer in the shape ``cryptography``'s builders sign with. There is no private key in it."""

    def __init__(self, signer: Signer) -> None:
        self._signer = signer

    def sign(self, data: Any, padding_: Any, algorithm: Any) -> bytes:
        if not isinstance(padding_, padding.PKCS1v15) or not isinstance(algorithm, hashes.SHA256):
            raise NotImplementedError("a signer makes RSASSA-PKCS1-v1_5 signatures with SHA-256 only")
        return self._signer.sign(hashlib.sha256(data).digest())

    def public_key(self) -> rsa.RSAPublicKey:
        return self._signer.public_key()

    @property
    def key_size(self) -> int:
        return self.public_key().key_size

    def _absent(self, *_: Any) -> Any:
        raise NotImplementedError("the private key is not here")

    decrypt = private_numbers = private_bytes = _absent  # type: ignore[assignment]

    def __copy__(self) -> _SigningKey:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _SigningKey:
        return self


class Revocation(NamedTuple):
    """An entry of a revocation list, as ``kakunin.revocations()`` gives it."""

    serial: str
    revoked_at: dt.datetime
    reason: str


@dataclass(frozen=True)
class AgentCertificate:
    """An agent's certificate, and what its extensions say."""

    certificate: x509.Certificate

    @classmethod
    def from_der(cls, der: bytes) -> AgentCertificate:
        return cls(x509.load_der_x509_certificate(der))

    def _texts(self, oid: x509.ObjectIdentifier) -> list[str]:
        try:
            extension = self.certificate.extensions.get_extension_for_oid(oid)
        except x509.ExtensionNotFound:
            return []
        assert isinstance(extension.value, x509.UnrecognizedExtension)  # noqa: S101  (not an OID cryptography knows)
        return _texts(extension.value.value)

    @property
    def agent_id(self) -> uuid.UUID:
        return uuid.UUID(self._texts(AGENT_URN)[0].removeprefix("urn:kakunin:agent:"))

    @property
    def model(self) -> str | None:
        return next(iter(self._texts(MODEL)), None)

    @property
    def model_hash(self) -> str | None:
        return next(iter(self._texts(MODEL)[1:]), None)

    @property
    def permitted_actions(self) -> tuple[str, ...]:
        return tuple(self._texts(PERMITTED_ACTIONS))

    @property
    def tenant(self) -> str | None:
        return next(iter(self._texts(TENANT)), None)

    @property
    def financial_scope(self) -> dict[str, Any] | None:
        texts = self._texts(FINANCIAL_SCOPE)
        return json.loads(texts[0]) if texts else None

    @property
    def serial(self) -> str:
        return normalize_serial(self.certificate.serial_number)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def public_key(self) -> rsa.RSAPublicKey:
        key = self.certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise BadInputError("the certificate's key is not RSA")
        return key

    def register(self, connection: psycopg.Connection[Any], overlap: dt.timedelta | None = None) -> str:
        """Registers it through ``kakunin.register_certificate()``, as a login with ``kakunin_registrar``, in
        the connection's transaction; returns the serial. Raises BadInputError for what SQL refuses."""
        try:
            connection.execute("select kakunin.register_certificate(%s, %s)", (self.der, overlap))
        except psycopg.Error as error:
            raise named(error) or error from error
        return self.serial


class CertificateAuthority:
    """An authority: a CA certificate and the signer that holds its key.

    :raises SignerError: the signer's key is not the one the certificate is for.
    """

    def __init__(self, signer: Signer, certificate: x509.Certificate, *, crl_url: str | None = None) -> None:
        if signer.public_key() != certificate.public_key():
            raise SignerError(
                f"key {signer.key_id} is not that of the certificate {certificate.subject.rfc4514_string()}",
                "Open the signer by the certificate's public key.",
            )
        self.signer = signer
        self.certificate = certificate
        self.crl_url = crl_url

    @classmethod
    def create(
        cls,
        signer: Signer,
        name: str = "Kakunin CA",
        *,
        issuer: CertificateAuthority | None = None,
        path_length: int = 0,
        lifetime: dt.timedelta | None = None,
        crl_url: str | None = None,
    ) -> CertificateAuthority:
        """A new authority: a self-signed root (10 years by default), or one below ``issuer`` (5 years, or
        what its issuer has left).

        :param name: its common name, 1 to 64 characters (RFC 5280's ub-common-name).
        :param path_length: how many authorities there may be below it.
        :param crl_url: where its revocation list will be; goes into the certificates it issues.
        """
        public_key = signer.public_key()
        check_rsa_key(public_key)
        if not 1 <= len(name) <= 64:
            raise BadInputError("an authority's name is 1 to 64 characters")
        now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
        end = now + (lifetime or (1826 if issuer else 3652) * ONE_DAY)
        if issuer is not None and lifetime is None:
            end = min(end, issuer.certificate.not_valid_after_utc)
        if issuer is not None and end > issuer.certificate.not_valid_after_utc:
            raise BadInputError("it would outlive its issuer's certificate", "Ask for a shorter lifetime.")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.certificate.subject if issuer else subject)
            .public_key(public_key)
            .serial_number(_random_serial())
            .not_valid_before(now - _BACKDATE if issuer is None else issuer._start(now))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if issuer is not None:
            builder = issuer._point_back(builder)
        key = _SigningKey(signer if issuer is None else issuer.signer)
        return cls(signer, builder.sign(key, hashes.SHA256()), crl_url=crl_url)

    @property
    def key_id(self) -> str:
        """Its subject key identifier, in the form ``kakunin.authorities`` has it."""
        return key_id(self.certificate)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    def trust(self, connection: psycopg.Connection[Any]) -> str:
        """Pins it through ``kakunin.trust_ca()``, as the owner or a login with ``kakunin_operator``, in the
        connection's transaction; returns its key id. Raises BadInputError for what SQL refuses."""
        try:
            connection.execute("select kakunin.trust_ca(%s)", (self.der,))
        except psycopg.Error as error:
            raise named(error) or error from error
        return self.key_id

    def issue(
        self,
        agent_id: uuid.UUID,
        public_key: rsa.RSAPublicKey,
        *,
        permitted_actions: Sequence[str] = (),
        model: str | None = None,
        model_hash: str | None = None,
        tenant: str | None = None,
        financial_scope: Mapping[str, Any] | None = None,
        not_before: dt.datetime | None = None,
        lifetime: dt.timedelta = 90 * ONE_DAY,
    ) -> AgentCertificate:
        """A certificate for the agent's key, valid for ``lifetime`` (at most 365 days) from ``not_before``
        (default: five minutes ago).

        :param model_hash: as compute_model_hash() gives it; needs ``model``.
        :param financial_scope: a JSON object with limits that are enforced (docs/risk.md) and nothing else,
            written in canonical form (RFC 8785).
        :raises BadInputError: for what the database would not register.
        :raises SignerError: the authority's key could not sign.
        """
        if not dt.timedelta(0) < lifetime <= 365 * ONE_DAY:
            raise BadInputError("an agent's certificate is valid for at most 365 days")
        check_rsa_key(public_key)
        if public_key == self.signer.public_key():
            raise BadInputError("an agent's key is not its authority's", "Make one for the agent.")
        start = not_before or self._start(dt.datetime.now(dt.timezone.utc))
        if start < self.certificate.not_valid_before_utc:
            raise BadInputError("the certificate would begin before the CA's own")
        if start + lifetime > self.certificate.not_valid_after_utc:
            raise BadInputError("the certificate would outlive the CA's own", "Ask for a shorter lifetime.")
        if len(permitted_actions) > 256 or not all(map(_ACTION.fullmatch, permitted_actions)):
            raise BadInputError(
                "permitted actions are at most 256 names of 1 to 128 characters from A-Z a-z 0-9 _ . : / -",
                "Only a whole last part may be a star, as in trade:*.",
            )
        if (model is None) != (model_hash is None):
            raise BadInputError("a certificate names a model and its hash, or neither")
        urn = agent_urn(agent_id)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(agent_id))]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(_random_serial())
            .not_valid_before(start)
            .not_valid_after(start + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(urn)]), critical=False)
        )
        extensions = {AGENT_URN: _utf8(urn), PERMITTED_ACTIONS: _sequence(permitted_actions)}
        if model is not None and model_hash is not None:
            extensions[MODEL] = _sequence([_text("a model", model), check_model_hash(model_hash)])
        if tenant is not None:
            extensions[TENANT] = _utf8(_text("a tenant", tenant))
        if financial_scope is not None:
            extensions[FINANCIAL_SCOPE] = _utf8(_scope(financial_scope))
        for oid, value in extensions.items():
            builder = builder.add_extension(x509.UnrecognizedExtension(oid, value), critical=False)
        issued = AgentCertificate(self._point_back(builder).sign(_SigningKey(self.signer), hashes.SHA256()))
        if len(issued.der) > _MAX_SIZE:
            raise BadInputError(
                f"the certificate has {len(issued.der)} bytes, and the database takes {_MAX_SIZE}",
                "Permit fewer actions, as trade:* for all of trade.",
            )
        return issued

    def issue_ledger_key(
        self, installation: uuid.UUID, public_key: rsa.RSAPublicKey, *, lifetime: dt.timedelta | None = None
    ) -> x509.Certificate:
        """A certificate for the key that signs the tree heads of an installation's ledger, valid for
        ``lifetime`` (default: 5 years, or what the authority has left). Its alternative name is
        :func:`ledger_urn`, and it is good for nothing else.

        :raises BadInputError: for what the database would not register.
        :raises SignerError: the authority's key could not sign.
        """
        check_rsa_key(public_key)
        if public_key == self.signer.public_key():
            raise BadInputError("the ledger's key is not its authority's", "Make one for the ledger.")
        start = self._start(dt.datetime.now(dt.timezone.utc))
        end = start + (lifetime or 1826 * ONE_DAY)
        if lifetime is None:
            end = min(end, self.certificate.not_valid_after_utc)
        if not start < end <= self.certificate.not_valid_after_utc:
            raise BadInputError("it would outlive its issuer's certificate", "Ask for a shorter lifetime.")
        urn = ledger_urn(installation)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ledger {installation}")]))
            .issuer_name(self.certificate.subject)
            .public_key(public_key)
            .serial_number(_random_serial())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(urn)]), critical=False)
        )
        return self._point_back(builder).sign(_SigningKey(self.signer), hashes.SHA256())

    def revocation_list(
        self, revocations: Iterable[Revocation], number: int, *, lifetime: dt.timedelta = 7 * ONE_DAY
    ) -> x509.CertificateRevocationList:
        """A CRL (RFC 5280 section 5) with these entries, good for ``lifetime``."""
        now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now)
            .next_update(now + lifetime)
            .add_extension(self._authority_key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for serial, revoked_at, reason in revocations:
            entry = (
                x509.RevokedCertificateBuilder()
                .serial_number(int(serial.replace(":", ""), 16))
                .revocation_date(revoked_at.astimezone(dt.timezone.utc).replace(microsecond=0))
            )
            if reason != "unspecified":  # RFC 5280 section 5.3.1: left out rather than given
                entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags(reason)), critical=False)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(_SigningKey(self.signer), hashes.SHA256())

    def sign_receipt(self, receipt: str) -> bytes:
        """Signs the receipt of a halt, as the database wrote it.

        :raises BadInputError: it is not one. Nothing else begins as a receipt does, so no certificate and
            no assertion is signed by mistake.
        """
        try:
            content = json.loads(receipt)
            is_one = (
                isinstance(content, dict)
                and content.keys() == _RECEIPT
                and content["type"] == "kakunin.halt"
                and rfc8785.dumps(content) == receipt.encode()
            )
        except (ValueError, RecursionError):
            is_one = False
        if not is_one:
            raise BadInputError("what is to be signed is not the receipt of a halt in canonical form")
        return self.signer.sign(hashlib.sha256(receipt.encode()).digest())

    def _start(self, now: dt.datetime) -> dt.datetime:
        return max(now.replace(microsecond=0) - _BACKDATE, self.certificate.not_valid_before_utc)

    def _authority_key_identifier(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            _subject_key_identifier(self.certificate)
        )

    def _point_back(self, builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
        """What a certificate says of the authority that issues it."""
        builder = builder.add_extension(self._authority_key_identifier(), critical=False)
        if self.crl_url is None:
            return builder
        point = x509.DistributionPoint([x509.UniformResourceIdentifier(self.crl_url)], None, None, None)
        return builder.add_extension(x509.CRLDistributionPoints([point]), critical=False)


def key_id(certificate: x509.Certificate) -> str:
    """The subject key identifier in the form ``kakunin.authorities`` has it, ``9F:02:...``."""
    return _subject_key_identifier(certificate).digest.hex(":").upper()


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """RFC 8785. Raises BadInputError for what has no canonical form."""
    try:
        return rfc8785.dumps(dict(value))
    except (rfc8785.CanonicalizationError, TypeError, ValueError, RecursionError) as error:
        raise BadInputError(f"it has no canonical JSON form (RFC 8785): {error}") from error


def _subject_key_identifier(certificate: x509.Certificate) -> x509.SubjectKeyIdentifier:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound as error:
        raise BadInputError("the CA's certificate has no subject key identifier") from error


def _text(what: str, value: str) -> str:
    if not value.strip() or len(value) > 200 or "\0" in value:
        raise BadInputError(f"{what} is 1 to 200 characters")
    return value


def _random_serial() -> int:
    """128 unpredictable bits, positive (RFC 5280 section 4.1.2.2)."""
    return secrets.randbits(128) or 1


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
