"""Certificates of any kind, also such as nobody should issue, and DER by hand."""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)
ARC = "1.3.6.1.4.1.61411.1"
SHA256_RSA = bytes.fromhex("300d06092a864886f70d01010b0500")
BASIC, USAGE, EXTENDED, SUBJECT_ID, AUTHORITY_ID, ALTERNATIVE = (
    "2.5.29.19", "2.5.29.15", "2.5.29.37", "2.5.29.14", "2.5.29.35", "2.5.29.17",
)  # fmt: skip
URN, MODEL, ACTIONS, TENANT, SCOPE = (f"{ARC}.{n}" for n in range(1, 6))
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
ANY_USE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)

# DER ------------------------------------------------------------------------------------------------


def size(length: int) -> bytes:
    if length < 128:
        return bytes([length])
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(octets)]) + octets


def tlv(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return bytes([tag]) + size(len(content)) + content


def sequence(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def utf8(text: str) -> bytes:
    return tlv(0x0C, text.encode())


def oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    out = b""
    for number in (first * 40 + second, *rest):
        octets = [number & 0x7F]
        while number := number >> 7:
            octets.append(0x80 | number & 0x7F)
        out += bytes(reversed(octets))
    return tlv(0x06, out)


def header(der: bytes, at: int = 0) -> tuple[int, int]:
    """Where the content of the element at this byte begins and ends."""
    length, start = der[at + 1], at + 2
    if length >= 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    return start, start + length


def split(der: bytes) -> list[bytes]:
    """The elements inside a constructed one."""
    at, end = header(der)
    children = []
    while at < end:
        _, after = header(der, at)
        children.append(der[at:after])
        at = after
    return children


def raw_extension(dotted: str, value: bytes, critical: bytes = b"", *more: bytes) -> bytes:
    return sequence(oid(dotted), critical, tlv(4, value), *more)


# Keys: slow to make, so each is made once -------------------------------------------------------------


@functools.cache
def rsa_key(number: int = 0, bits: int = 2048, exponent: int = 65537) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(exponent, bits)


@functools.cache
def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def modulus(key: Any) -> bytes:
    n = key.public_numbers().n
    return n.to_bytes((n.bit_length() + 7) // 8, "big")


# Certificates -----------------------------------------------------------------------------------------

Value = x509.ExtensionType | bytes
Tweak = Callable[["Parts"], None]


def name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def usage(*bits: str) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{bit: bit in bits for bit in names})


@dataclass
class Parts:
    """A certificate taken apart. Changed, it is put together and signed again."""

    fields: list[bytes]  # of the TBSCertificate
    algorithm: bytes
    key: Any
    hash: hashes.HashAlgorithm = field(default_factory=hashes.SHA256)
    bits: Callable[[bytes], bytes] = lambda signature: signature  # what the BIT STRING holds instead

    @property
    def extensions(self) -> list[bytes]:
        return split(split(self.fields[-1])[0])

    @extensions.setter
    def extensions(self, extensions: list[bytes]) -> None:
        self.fields[-1] = tlv(0xA3, sequence(*extensions))

    @property
    def der(self) -> bytes:
        tbs = sequence(*self.fields)
        return sequence(tbs, self.algorithm, tlv(0x03, self.bits(b"\0" + sign(self.key, tbs, self.hash))))


@dataclass
class Authority:
    """Who signs. The name, the key and the key id need not belong together."""

    key: Any
    subject: x509.Name = field(default_factory=lambda: name("Forged CA"))
    key_id: bytes | None = None
    certificate: bytes = b""

    def __post_init__(self) -> None:
        if self.key_id is None:
            public = self.key.public_key()
            self.key_id = x509.SubjectKeyIdentifier.from_public_key(public).digest

    @property
    def text_id(self) -> str:
        assert self.key_id is not None
        return self.key_id.hex(":").upper()


@dataclass
class Certificate:
    """What goes into a certificate; `der` is it. Extensions of None are left out."""

    issuer: Authority
    public_key: Any
    subject: x509.Name
    extensions: dict[str, tuple[Value, bool] | None]
    not_before: dt.datetime = NOW - DAY
    not_after: dt.datetime = NOW + 90 * DAY
    serial: int | None = None
    hash: hashes.HashAlgorithm | None = field(default_factory=hashes.SHA256)
    padding: Any = None
    tweaks: list[Tweak] = field(default_factory=list)

    def put(self, dotted: str, value: Value | None, critical: bool = False) -> Certificate:
        self.extensions[dotted] = None if value is None else (value, critical)
        return self

    def changed(self, **changes: Any) -> Certificate:
        return replace(self, extensions=dict(self.extensions), tweaks=list(self.tweaks), **changes)

    @property
    def der(self) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(self.issuer.subject)
            .public_key(self.public_key)
            .serial_number(self.serial or x509.random_serial_number())
            .not_valid_before(self.not_before)
            .not_valid_after(self.not_after)
        )
        for dotted, extension in self.extensions.items():
            if extension is not None:
                value, critical = extension
                if isinstance(value, bytes):
                    value = x509.UnrecognizedExtension(x509.ObjectIdentifier(dotted), value)
                builder = builder.add_extension(value, critical)
        signed = builder.sign(self.issuer.key, self.hash, rsa_padding=self.padding)
        der = signed.public_bytes(serialization.Encoding.DER)
        return tweaked(der, self.issuer.key, *self.tweaks) if self.tweaks else der


def tweaked(der: bytes, key: Any, *tweaks: Tweak) -> bytes:
    """The certificate changed, and signed by this key."""
    tbs, algorithm, _ = split(der)
    parts = Parts(split(tbs), algorithm, key)
    for tweak in tweaks:
        tweak(parts)
    return parts.der


def resigned(tbs: bytes, key: Any) -> bytes:
    """Any bytes as what a certificate holds, signed as they are."""
    return sequence(tbs, SHA256_RSA, tlv(0x03, b"\0" + sign(key, tbs)))


def sign(key: Any, signed: bytes, hash_: hashes.HashAlgorithm | None = None) -> bytes:
    hash_ = hash_ or hashes.SHA256()
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(signed, ec.ECDSA(hash_))
    return key.sign(signed, padding.PKCS1v15(), hash_)


def authority(
    key: Any,
    common_name: str = "Forged CA",
    *,
    issuer: Authority | None = None,
    path_length: int | None = None,
    key_id: bytes | None = None,
    **changes: Any,
) -> tuple[Authority, Certificate]:
    """An authority and its certificate, self-signed without an issuer, to be changed before it is made."""
    made = Authority(key, name(common_name), key_id)
    above = issuer or made
    assert made.key_id is not None
    extensions: dict[str, tuple[Value, bool] | None] = {
        BASIC: (x509.BasicConstraints(True, path_length), True),
        USAGE: (usage("key_cert_sign", "crl_sign"), True),
        SUBJECT_ID: (x509.SubjectKeyIdentifier(made.key_id), False),
        AUTHORITY_ID: (x509.AuthorityKeyIdentifier(above.key_id, None, None), False),
    }
    certificate = Certificate(above, key.public_key(), made.subject, extensions, not_after=NOW + 3650 * DAY)
    return made, replace(certificate, **changes)


def certified(issuer: Authority, agent_id: Any, public_key: Any = None, **changes: Any) -> Certificate:
    """A good certificate for an agent, to be made a bad one."""
    urn = f"urn:kakunin:agent:{agent_id}"
    extensions: dict[str, tuple[Value, bool] | None] = {
        BASIC: (x509.BasicConstraints(False, None), True),
        USAGE: (usage("digital_signature", "content_commitment"), True),
        EXTENDED: (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        AUTHORITY_ID: (x509.AuthorityKeyIdentifier(issuer.key_id, None, None), False),
        ALTERNATIVE: (x509.SubjectAlternativeName([x509.UniformResourceIdentifier(urn)]), False),
        URN: (utf8(urn), False),
        ACTIONS: (sequence(utf8("orders:read"), utf8("vault:*")), False),
    }
    key = public_key or rsa_key(9).public_key()
    return replace(Certificate(issuer, key, name(str(agent_id)), extensions), **changes)


def nested(der: bytes, at: int = 0, end: int | None = None) -> Iterator[int]:
    """Where each element begins, those inside constructed ones too."""
    end = len(der) if end is None else end
    while at < end:
        yield at
        start, after = header(der, at)
        if der[at] in (0x30, 0x31) or 0xA0 <= der[at] <= 0xBE:
            yield from nested(der, start, after)
        at = after
