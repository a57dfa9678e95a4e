"""Keys in encrypted files on this machine. For laptops and tests."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from ..errors import BadInputError, SignerError
from .base import Signer, check_digest, check_ec_key, check_rsa_key, joined, subject_key_id

_Key = TypeVar("_Key", rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)


class _LocalKey(Generic[_Key]):
    def __init__(self, key: _Key, key_id: str | None = None) -> None:
        self._key: _Key = key
        self._key_id = key_id or "local:" + self._fingerprint()[:16]

    def _fingerprint(self) -> str:
        der = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

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

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key_id}>"


class LocalSigner(_LocalKey[rsa.RSAPrivateKey]):
    """An RSA key on this machine, kept in an encrypted PKCS #8 file. For laptops and tests.

    The key is in this process's memory: for production use a key that never leaves a KMS.
    """

    def __init__(self, key: rsa.RSAPrivateKey, key_id: str | None = None) -> None:
        check_rsa_key(key.public_key())
        super().__init__(key, key_id)

    @classmethod
    def generate(cls, key_size: int = 2048) -> LocalSigner:
        """A new key of ``key_size`` bits."""
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=key_size))

    @classmethod
    def load(cls, path: str | Path, password: bytes) -> LocalSigner:
        """Reads what :meth:`save` wrote. Raises :class:`BadInputError` for another file or password."""
        signer = _loaded(path, password)
        if not isinstance(signer, LocalSigner):
            raise BadInputError(f"{path} is not an RSA key", "Make one with LocalSigner.generate().")
        return signer

    def public_key(self) -> rsa.RSAPublicKey:
        return self._key.public_key()

    def sign(self, digest: bytes) -> bytes:
        check_digest(digest)
        return self._key.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))


class LocalECDSASigner(_LocalKey[ec.EllipticCurvePrivateKey]):
    """A P-256 key on this machine, for JWTs (ES256); otherwise as :class:`LocalSigner`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, key_id: str | None = None) -> None:
        check_ec_key(key.public_key())
        super().__init__(key, key_id)

    @classmethod
    def generate(cls) -> LocalECDSASigner:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    def sign(self, digest: bytes) -> bytes:
        check_digest(digest)
        return joined(self._key.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))


def _loaded(path: str | Path, password: bytes) -> LocalSigner | LocalECDSASigner:
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password)
    except (ValueError, TypeError) as error:
        raise BadInputError(f"{path} is not a key that this password opens", "Check both.") from error
    if isinstance(key, rsa.RSAPrivateKey):
        return LocalSigner(key)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return LocalECDSASigner(key)
    raise BadInputError(f"{path} is neither an RSA nor an elliptic-curve key")


class LocalKeys:
    """A folder of encrypted keys, each in ``<subject key id>.pem``. Their labels are not kept.

    An opened key is in this process's memory: for production use a store whose keys never leave it.
    """

    def __init__(self, folder: str | Path, password: bytes) -> None:
        if not password:
            raise BadInputError("keys are not kept without a password")
        self._folder = Path(folder)
        self._password = password

    def path(self, public_key: rsa.RSAPublicKey) -> Path:
        """The file that a key is in, if it is here."""
        return self._folder / f"{subject_key_id(public_key)}.pem"

    def create(self, label: str) -> LocalSigner:
        signer = LocalSigner.generate()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            signer.save(self.path(signer.public_key()), self._password)
        except OSError as error:
            raise SignerError(
                f"no key can be kept in {self._folder}: {error.strerror}", "Check the folder and its owner."
            ) from error
        return signer

    def open(self, public_key: rsa.RSAPublicKey) -> LocalSigner:
        """Raises SignerError when the folder has no such key, BadInputError when the password is another."""
        path = self.path(public_key)
        signer = load_signer(path, self._password)
        if signer.public_key() != public_key:
            raise SignerError(f"{path} holds another key than its name says", "Restore the file.")
        return signer

    def discard(self, signer: Signer) -> None:
        path = self.path(signer.public_key())
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise SignerError(
                f"the key {path} cannot be deleted: {error.strerror}", "Check the folder and its owner."
            ) from error

    def __repr__(self) -> str:
        return f"<LocalKeys {self._folder}>"


def load_signer(path: str | Path, password: bytes) -> LocalSigner:
    """LocalSigner.load(), with a SignerError where the file cannot be read."""
    with _readable(path):
        return LocalSigner.load(path, password)


def load_jwt_signer(path: str | Path, password: bytes) -> LocalSigner | LocalECDSASigner:
    """The same for a key of either kind."""
    with _readable(path):
        return _loaded(path, password)


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        raise SignerError(
            f"{path} is a folder of keys, and this is to be one of them",
            "Name its file: the certificate's subject key identifier, small letters, no colons, and .pem.",
        ) from error
    except OSError as error:
        raise SignerError(
            f"the key {path} cannot be read: {error.strerror}", "Check the path and the file's owner."
        ) from error
