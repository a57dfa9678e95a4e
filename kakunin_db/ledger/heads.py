"""Signed tree heads (RFC 6962 section 3.5), and whose signature counts.

Whom to trust comes from the verifier: the certificates of root authorities. Everything else that is in a
bundle or a proof (authorities below a root, keys of ledgers, agents' certificates) has to lead to one of
them.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import re
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtensionOID

from ..ca import AgentCertificate, key_id, ledger_urn
from ..errors import BadInputError, LedgerIntegrityError
from ..signers import check_rsa_key

# The database's bigint.
MAX_INTEGER = 2**63 - 1
# More than any installation has; it bounds what a bundle made to be slow can cost.
MAX_AUTHORITIES = 100
_MAX_STATES = 1000

_KEY_ID = re.compile(r"[0-9A-F]{2}(?::[0-9A-F]{2}){0,63}")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
# RFC 5280 section 4.2: a certificate with a critical extension one does not know is not used.
_KNOWN = {ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE, ExtensionOID.SUBJECT_ALTERNATIVE_NAME}
_URN = "urn:kakunin:ledger:"
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


class UntrustedKeyError(LedgerIntegrityError):
    """KA007: no root that was given vouches for the key, at the moment it was used."""


class FalseSignatureError(LedgerIntegrityError):
    """KA007: the key is good, and the signature is not its."""


def from_hex(text: Any, size: int) -> bytes:
    """``size`` bytes from lower-case hexadecimal digits. Raises LedgerIntegrityError."""
    if not isinstance(text, str) or len(text) != 2 * size or not _HEX.fullmatch(text):
        raise LedgerIntegrityError(f"a hash is not {2 * size} hexadecimal digits in lower case")
    return bytes.fromhex(text)


def from_base64(text: Any) -> bytes:
    """RFC 4648 section 4, in the one form that encoding gives. Raises LedgerIntegrityError."""
    try:
        data = base64.b64decode(text if isinstance(text, str) else "!", validate=True)
    except (binascii.Error, ValueError) as error:
        raise LedgerIntegrityError("what should be base64 is not") from error
    if base64.b64encode(data) != text.encode():
        raise LedgerIntegrityError("what should be base64 is not in the form that encoding gives")
    return data


def from_uuid(text: Any) -> uuid.UUID:
    """A UUID in lower case. Raises LedgerIntegrityError."""
    if not isinstance(text, str) or not _UUID.fullmatch(text):
        raise LedgerIntegrityError("what should be a UUID in lower case is not")
    return uuid.UUID(text)


def strict_json(text: str | bytes) -> Any:
    """JSON without duplicate members, NaN or Infinity. Raises LedgerIntegrityError."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a member is there twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(name)

    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        return json.loads(decoded, object_pairs_hook=members, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise LedgerIntegrityError("it is not JSON, or a member is there twice") from error


@dataclass(frozen=True)
class TreeHead:
    """A signed tree head: what the ledger of an installation was at a moment.

    ``timestamp`` is in milliseconds since 1970, ``key_id`` the subject key identifier of the key that signed,
    as :func:`kakunin_db.ca.key_id` gives it.

    :raises LedgerIntegrityError: a member is out of its range.
    """

    installation: uuid.UUID
    tree_size: int
    timestamp: int
    root: bytes
    key_id: str
    signature: bytes

    def __post_init__(self) -> None:
        for number in (self.tree_size, self.timestamp):
            if type(number) is not int or not 0 <= number <= MAX_INTEGER:
                raise LedgerIntegrityError("a tree head's size and time are whole numbers of 0 to 2^63 - 1")
        if len(self.root) != 32 or not 256 <= len(self.signature) <= 512:
            raise LedgerIntegrityError("a tree head's root has 32 bytes, and its signature 256 to 512")
        if not isinstance(self.key_id, str) or not _KEY_ID.fullmatch(self.key_id):
            raise LedgerIntegrityError("a tree head's key_id is not a subject key identifier")

    @staticmethod
    def bytes_to_sign(tree_size: int, timestamp: int, root: bytes) -> bytes:
        """TreeHeadSignature of RFC 6962 section 3.5: v1 (0), tree_hash (1), and these; 50 bytes."""
        return struct.pack(">BBQQ32s", 0, 1, timestamp, tree_size, root)

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return self.bytes_to_sign(self.tree_size, self.timestamp, self.root)

    def to_json(self) -> dict[str, Any]:
        """The ``tree_head/1`` object, its members in order."""
        return {
            "kakunin": "tree_head/1",
            "installation": str(self.installation),
            "tree_size": self.tree_size,
            "timestamp": self.timestamp,
            "root": self.root.hex(),
            "key_id": self.key_id,
            "signature": base64.b64encode(self.signature).decode(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str | bytes) -> TreeHead:
        """From a ``tree_head/1`` object, or its text. Raises LedgerIntegrityError for anything else."""
        content = strict_json(value) if isinstance(value, str | bytes) else value
        if not isinstance(content, Mapping) or content.get("kakunin") != "tree_head/1":
            raise LedgerIntegrityError("it is not a tree_head/1 object")
        if set(content) != _TREE_HEAD:
            raise LedgerIntegrityError("a tree head has other members than it should")
        return cls(
            from_uuid(content["installation"]),
            content["tree_size"],
            content["timestamp"],
            from_hex(content["root"], 32),
            content["key_id"],
            from_base64(content["signature"]),
        )


_TREE_HEAD = {"kakunin", "installation", "tree_size", "timestamp", "root", "key_id", "signature"}


class _Window(NamedTuple):
    """From when to when (milliseconds since 1970) a chain of certificates is valid, all of it."""

    start: int
    end: int

    def within(self, other: _Window) -> _Window:
        return _Window(max(self.start, other.start), min(self.end, other.end))


class _Authority(NamedTuple):
    certificate: x509.Certificate
    # How many authorities there may be below; None is any number.
    path_length: int | None
    window: _Window


class _LedgerKey(NamedTuple):
    installation: uuid.UUID
    public_key: rsa.RSAPublicKey
    windows: tuple[_Window, ...]


def load_certificate(der: bytes) -> x509.Certificate:
    """A certificate that can be read in every part that is looked at here. Raises LedgerIntegrityError."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        # cryptography reads these when they are asked for.
        _ = certificate.extensions, certificate.subject, certificate.issuer, certificate.serial_number
        _ = certificate.public_key(), certificate.signature_hash_algorithm, key_id(certificate)
        same = certificate.public_bytes(serialization.Encoding.DER) == der
    except Exception as error:  # of many kinds, for bytes that anybody may have made
        raise LedgerIntegrityError("a certificate cannot be read") from error
    if not same:
        raise LedgerIntegrityError("a certificate is not in DER")
    return certificate


def _window(certificate: x509.Certificate) -> _Window:
    """Whole seconds; the last one counts (RFC 5280 section 4.1.2.5)."""
    return _Window(
        int(certificate.not_valid_before_utc.timestamp()) * 1000,
        int(certificate.not_valid_after_utc.timestamp()) * 1000 + 999,
    )


def _issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether ``issuer`` is named as the issuer and its key signed the certificate (RFC 5280 section
    6.1.3)."""
    if certificate.issuer != issuer.subject or not isinstance(certificate.signature_hash_algorithm, _HASHES):
        return False
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # a false signature, or a key of another kind
        return False
    return True


def _path_length(certificate: x509.Certificate) -> int | None:
    """Raises UntrustedKeyError unless it is the certificate of an authority (RFC 5280 section 6.1.4 (k),
    (n))."""
    extensions = certificate.extensions
    try:
        basic = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound as error:
        raise UntrustedKeyError("an authority's certificate does not say what its key is for") from error
    if not basic.ca or not usage.key_cert_sign:
        raise UntrustedKeyError("an authority's certificate is not one that may sign certificates")
    _check_critical(extensions)
    _check_key(certificate)
    return basic.path_length


def _check_critical(extensions: x509.Extensions) -> None:
    if any(extension.critical and extension.oid not in _KNOWN for extension in extensions):
        raise UntrustedKeyError("a certificate has a critical extension that is not known here")


def _check_key(certificate: x509.Certificate) -> rsa.RSAPublicKey:
    key = certificate.public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise UntrustedKeyError("a certificate's key is not RSA")
    try:
        check_rsa_key(key)
    except BadInputError as error:
        raise UntrustedKeyError(str(error)) from error
    return key


class TrustAnchors:
    """What follows from the root certificates that the verifier gives: the authorities below them, and the
    keys of ledgers that those vouch for.

    An authority counts for the time in which it and all above it are valid, and only with the path length,
    key usage and critical extensions that RFC 5280 section 6.1 asks for. Revocation is not looked at: an
    authority that is no longer trusted should not be above a root that is given.

    :param roots: pinned; their own signature is not looked at, nor who issued them.
    :param authorities: of a bundle or a proof, in any order, at most 100.
    :raises BadInputError: no root was given, or one is no authority's certificate.
    :raises LedgerIntegrityError: there are too many authorities.
    """

    def __init__(
        self, roots: Sequence[x509.Certificate], authorities: Iterable[x509.Certificate] = ()
    ) -> None:
        if not roots:
            raise BadInputError(
                "nothing verifies without the certificate of a root authority", "Give one that you trust."
            )
        self._authorities: list[_Authority] = []
        self._keys: dict[str, list[_LedgerKey]] = {}
        for root in roots:
            try:
                length = _path_length(root)
            except UntrustedKeyError as error:
                raise BadInputError(f"a root certificate that was given does not do: {error}") from error
            self._authorities.append(_Authority(root, length, _window(root)))
        below = list(dict.fromkeys(authorities))
        if len(below) > MAX_AUTHORITIES:
            raise LedgerIntegrityError(f"there are {len(below)} authorities, more than {MAX_AUTHORITIES}")
        #: Those among ``authorities`` that lead to no root, and why.
        self.untrusted: list[tuple[x509.Certificate, str]] = self._grow(below)

    def _grow(self, certificates: list[x509.Certificate]) -> list[tuple[x509.Certificate, str]]:
        lengths: dict[x509.Certificate, int | None] = {}
        refused: list[tuple[x509.Certificate, str]] = []
        for certificate in certificates:
            try:
                lengths[certificate] = _path_length(certificate)
            except UntrustedKeyError as error:
                refused.append((certificate, str(error)))
        pinned = {authority.certificate for authority in self._authorities}
        reached = set(pinned)
        issued = functools.cache(_issued)
        # From the roots down, breadth first; a certificate is looked at again when another way to it says
        # more.
        for authority in self._authorities:  # grows meanwhile
            if authority.path_length == 0 or len(self._authorities) > _MAX_STATES:
                continue
            for certificate, own in lengths.items():
                if certificate in pinned or not issued(certificate, authority.certificate):
                    continue
                left = None if authority.path_length is None else authority.path_length - 1
                lengths_left = [length for length in (left, own) if length is not None]
                found = _Authority(
                    certificate,
                    min(lengths_left) if lengths_left else None,
                    _window(certificate).within(authority.window),
                )
                reached.add(certificate)
                if found.window.start <= found.window.end and not self._has(found):
                    self._authorities.append(found)
        why = "it leads to no root certificate that was given; to trust it, give its root as well (--ca)"
        return refused + [(certificate, why) for certificate in lengths if certificate not in reached]

    def _has(self, new: _Authority) -> bool:
        return any(
            old.certificate == new.certificate
            and (
                old.path_length is None
                or (new.path_length is not None and old.path_length >= new.path_length)
            )
            and old.window.within(new.window) == new.window
            for old in self._authorities
        )

    def _windows(self, certificate: x509.Certificate) -> Iterator[_Window]:
        """When its issuers were valid."""
        checked: dict[x509.Certificate, bool] = {}
        for authority in self._authorities:
            issuer = authority.certificate
            if issuer.subject != certificate.issuer:
                continue
            if issuer not in checked:
                checked[issuer] = _issued(certificate, issuer)
            if checked[issuer]:
                yield authority.window

    def add_ledger_key(self, certificate: x509.Certificate) -> str:
        """Takes a ledger's key; returns its key id. Raises UntrustedKeyError."""
        extensions = certificate.extensions
        _check_critical(extensions)
        public_key = _check_key(certificate)
        try:
            usage = extensions.get_extension_for_class(x509.KeyUsage).value
            names = list(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
        except x509.ExtensionNotFound as error:
            raise UntrustedKeyError("a ledger key's certificate does not say what it is for") from error
        try:
            ca = extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except x509.ExtensionNotFound:
            ca = False
        name = names[0].value if len(names) == 1 else None
        text = name.removeprefix(_URN) if isinstance(name, str) else ""
        is_ledger = _UUID.fullmatch(text) and names == [
            x509.UniformResourceIdentifier(ledger_urn(uuid.UUID(text)))
        ]
        if not is_ledger or ca or not usage.digital_signature:
            raise UntrustedKeyError("a ledger key's certificate is not one for signing a ledger's tree heads")
        windows = tuple(window.within(_window(certificate)) for window in self._windows(certificate))
        if not windows:
            raise UntrustedKeyError("no authority that leads to a root that was given issued a ledger key")
        key = _LedgerKey(uuid.UUID(text), public_key, windows)
        known = self._keys.setdefault(key_id(certificate), [])
        if key not in known:
            known.append(key)
        return key_id(certificate)

    @property
    def installations(self) -> set[uuid.UUID]:
        """Those whose ledger keys were taken."""
        return {key.installation for keys in self._keys.values() for key in keys}

    def check_agent(self, certificate: x509.Certificate) -> tuple[str, uuid.UUID]:
        """The serial number and the agent of an agent's certificate. Only its signature is looked at: when it
        was valid is what the ledger tells. Raises LedgerIntegrityError."""
        if not any(True for _ in self._windows(certificate)):
            raise LedgerIntegrityError(
                "an agent's certificate was issued by no authority that leads to a root that was given"
            )
        agent = AgentCertificate(certificate)
        try:
            return agent.serial, agent.agent_id
        except Exception as error:  # of many kinds; see load_certificate()
            raise LedgerIntegrityError("an agent's certificate names no agent") from error

    def verify(self, head: TreeHead) -> None:
        """Checks who signed a tree head and the signature, RSASSA-PKCS1-v1_5 with SHA-256.

        :raises UntrustedKeyError: no key of this name for this installation was good at the head's time.
        :raises FalseSignatureError: the signature is not of this key over this head.
        """
        known = self._keys.get(head.key_id)
        if known is None:
            raise UntrustedKeyError(f"no ledger key that is trusted is called {head.key_id}")
        known = [key for key in known if key.installation == head.installation]
        if not known:
            raise UntrustedKeyError(f"the key {head.key_id} is not of the installation {head.installation}")
        known = [key for key in known if any(w.start <= head.timestamp <= w.end for w in key.windows)]
        if not known:
            raise UntrustedKeyError(f"the key {head.key_id} was not valid at the time of the tree head")
        for key in known:
            try:
                key.public_key.verify(
                    head.signature, head.signed_bytes(), padding.PKCS1v15(), hashes.SHA256()
                )
            except InvalidSignature:
                continue
            return
        raise FalseSignatureError(f"the signature is not that of the key {head.key_id}")
