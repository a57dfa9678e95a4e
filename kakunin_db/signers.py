"""Signers: who holds a private key, and how a digest gets signed by it.

Everything that signs in the kit asks a :class:`Signer`, so that a key in a KMS and a key on a laptop
are used alike. An implementation may block on the network; asynchronous callers run it in a thread.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils

from .errors import BadInputError


class Signer(Protocol):
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017) over a digest made by the caller."""

    @property
    def key_id(self) -> str:
        """Names the key for people and logs. Never secret."""
        ...

    def public_key(self) -> rsa.RSAPublicKey: ...

    def sign(self, digest: bytes) -> bytes:
        """Signs a SHA-256 digest (32 bytes); returns the signature, as many bytes as the modulus."""
        ...


def check_rsa_key(key: rsa.RSAPublicKey) -> None:
    """Raises BadInputError unless the database verifies signatures of such a key."""
    exponent = key.public_numbers().e
    if not 2048 <= key.key_size <= 4096 or exponent != 65537:
        raise BadInputError(
            f"an RSA key of {key.key_size} bits with exponent {exponent} is not supported",
            "Use 2048 to 4096 bits and the exponent 65537.",
        )


class LocalSigner:
    """An RSA key on this machine, kept in an encrypted PKCS #8 file. For laptops and tests.

    The key is in this process's memory: for production use a key that never leaves a KMS.
    """

    def __init__(self, key: rsa.RSAPrivateKey, key_id: str | None = None) -> None:
        check_rsa_key(key.public_key())
        self._key = key
        self._key_id = key_id or "local:" + self._fingerprint()[:16]

    def _fingerprint(self) -> str:
        der = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

    @classmethod
    def generate(cls, key_size: int = 2048) -> LocalSigner:
        """A new key of ``key_size`` bits."""
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=key_size))

    @classmethod
    def load(cls, path: str | Path, password: bytes) -> LocalSigner:
        """Reads what :meth:`save` wrote. Raises :class:`BadInputError` for another file or password."""
        try:
            key = serialization.load_pem_private_key(Path(path).read_bytes(), password)
        except (ValueError, TypeError) as error:
            raise BadInputError(f"{path} is not a key that this password opens", "Check both.") from error
        if not isinstance(key, rsa.RSAPrivateKey):
            raise BadInputError(f"{path} is not an RSA key", "Make one with LocalSigner.generate().")
        return cls(key)

    def save(self, path: str | Path, password: bytes) -> None:
        """Writes encrypted PKCS #8 PEM, readable by this user only; never over an existing file."""
        if not password:
            raise BadInputError("a key is not saved without a password")
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(password),
        )
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)

    @property
    def key_id(self) -> str:
        return self._key_id

    def public_key(self) -> rsa.RSAPublicKey:
        return self._key.public_key()

    def sign(self, digest: bytes) -> bytes:
        return self._key.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))

    def __repr__(self) -> str:
        return f"<LocalSigner {self._key_id}>"
