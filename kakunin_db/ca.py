"""A certificate authority for agents (RFC 5280), its key held by a local signer's file.

An agent's certificate carries what the agent is and what it may do, in extensions below
``1.3.6.1.4.1.61411.1``: the agent's URN (.1), its permitted actions (.3) and its tenant (.4).
"""

from __future__ import annotations

import datetime as dt
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .errors import BadInputError, named
from .serials import normalize_serial
from .signers import check_rsa_key

ARC = "1.3.6.1.4.1.61411.1"
AGENT_URN = x509.ObjectIdentifier(f"{ARC}.1")
PERMITTED_ACTIONS = x509.ObjectIdentifier(f"{ARC}.3")
TENANT = x509.ObjectIdentifier(f"{ARC}.4")

_ACTION = re.compile(r"[A-Za-z0-9_.:/-]{1,128}|[A-Za-z0-9_.:/-]{1,126}:\*")
_ONE_DAY = dt.timedelta(days=1)
# The CA's and the database's clocks may differ a little; a certificate is good from just before now.
_BACKDATE = dt.timedelta(minutes=5)


def agent_urn(agent_id: uuid.UUID) -> str:
    """``urn:kakunin:agent:<uuid>``, the agent's name in certificates and assertions."""
    return f"urn:kakunin:agent:{agent_id}"


def _der(tag: int, content: bytes) -> bytes:
    """One DER element with a definite length (X.690 section 8.1)."""
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def _utf8(text: str) -> bytes:
    return _der(0x0C, text.encode())


@dataclass(frozen=True)
class AgentCertificate:
    """An issued certificate and the fields registration takes from it."""

    certificate: x509.Certificate
    agent_id: uuid.UUID
    permitted_actions: tuple[str, ...]

    @property
    def serial(self) -> str:
        return normalize_serial(self.certificate.serial_number)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def public_key_modulus(self) -> bytes:
        key = self.certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise BadInputError("the certificate's key is not RSA")
        modulus = key.public_numbers().n
        return modulus.to_bytes((modulus.bit_length() + 7) // 8, "big")

    def register(self, connection: psycopg.Connection[Any]) -> str:
        """Registers it through ``kakunin.register_certificate()``, as a login with ``kakunin_registrar``, in
        the connection's transaction; returns the serial. Raises BadInputError for what SQL refuses."""
        certificate = self.certificate
        fields = (
            self.agent_id,
            self.der,
            self.serial,
            self.public_key_modulus,
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            list(self.permitted_actions),
        )
        try:
            connection.execute("select kakunin.register_certificate(%s, %s, %s, %s, %s, %s, %s)", fields)
        except psycopg.Error as error:
            raise named(error) or error from error
        return self.serial


class LocalCA:
    """A self-signed root with its key in memory."""

    def __init__(self, key: rsa.RSAPrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self.certificate = certificate

    @classmethod
    def create(cls, name: str = "Kakunin local CA", days: int = 3650) -> LocalCA:
        """Makes a root whose certificate is valid for ``days`` days."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        now = dt.datetime.now(dt.timezone.utc)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(_random_serial())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + days * _ONE_DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    def issue(
        self,
        agent_id: uuid.UUID,
        public_key: rsa.RSAPublicKey,
        *,
        permitted_actions: Sequence[str] = (),
        tenant: str | None = None,
        not_before: dt.datetime | None = None,
        lifetime: dt.timedelta = 90 * _ONE_DAY,
    ) -> AgentCertificate:
        """A certificate for the agent's key, valid for ``lifetime`` (at most 365 days) from ``not_before``
        (default: five minutes ago). Raises BadInputError for what the database would not register."""
        if not dt.timedelta(0) < lifetime <= 365 * _ONE_DAY:
            raise BadInputError("an agent's certificate is valid for at most 365 days")
        check_rsa_key(public_key)
        start = not_before or dt.datetime.now(dt.timezone.utc) - _BACKDATE
        if start + lifetime > self.certificate.not_valid_after_utc:
            raise BadInputError("the certificate would outlive the CA's own", "Ask for a shorter lifetime.")
        if len(permitted_actions) > 256 or not all(map(_ACTION.fullmatch, permitted_actions)):
            raise BadInputError(
                "permitted actions are at most 256 names of 1 to 128 characters from A-Z a-z 0-9 _ . : / -",
                "Only a whole last part may be a star, as in trade:*.",
            )
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
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(urn)]), critical=False)
            .add_extension(x509.UnrecognizedExtension(AGENT_URN, _utf8(urn)), critical=False)
            .add_extension(
                x509.UnrecognizedExtension(
                    PERMITTED_ACTIONS, _der(0x30, b"".join(_utf8(a) for a in permitted_actions))
                ),
                critical=False,
            )
        )
        if tenant is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(TENANT, _utf8(tenant)), critical=False)
        return AgentCertificate(builder.sign(self._key, hashes.SHA256()), agent_id, tuple(permitted_actions))


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
