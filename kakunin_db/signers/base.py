"""What a signer and a key store are, and what all of them check."""

from __future__ import annotations

from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from ..errors import BadInputError, SignerError


class Signer(Protocol):
    """RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017) over a digest made by the caller."""

    @property
    def key_id(self) -> str:
        """Names the key for people and logs. Never secret."""
        ...

    def public_key(self) -> rsa.RSAPublicKey: ...

    def sign(self, digest: bytes) -> bytes:
        """Signs a SHA-256 digest (32 bytes); returns the signature, as many bytes as the modulus.

        Raises BadInputError for a digest of another length, SignerError when the key cannot sign, and of
        those SignerUnavailableError when trying again later may help.
        """
        ...


class ECDSASigner(Protocol):
    """ECDSA with P-256 and SHA-256 over a digest made by the caller. For JWTs (ES256) and nothing else:
    whatever the database verifies itself is signed by a :class:`Signer`."""

    @property
    def key_id(self) -> str:
        """Names the key for people and logs. Never secret."""
        ...

    def public_key(self) -> ec.EllipticCurvePublicKey: ...

    def sign(self, digest: bytes) -> bytes:
        """Signs a SHA-256 digest (32 bytes); returns r and s, each 32 bytes (RFC 7518 section 3.4).

        Raises as :meth:`Signer.sign` does.
        """
        ...


class KeyStore(Protocol):
    """Where keys are made and found again, by the subject key identifier of their public half.

    There is no other registry: whoever has the certificate can find the key.
    """

    def create(self, label: str) -> Signer:
        """A new RSA key of 2048 bits; ``label`` tells people what it is for. Raises SignerError."""
        ...

    def open(self, public_key: rsa.RSAPublicKey) -> Signer:
        """The key whose public half this is. Raises SignerError when the store has none."""
        ...

    def discard(self, signer: Signer) -> None:
        """Takes away a key just made, when what it was made for failed. Raises SignerError."""
        ...


def check_rsa_key(key: rsa.RSAPublicKey) -> None:
    """Raises BadInputError unless the database verifies signatures of such a key."""
    exponent = key.public_numbers().e
    if not 2048 <= key.key_size <= 4096 or exponent != 65537:
        raise BadInputError(
            f"an RSA key of {key.key_size} bits with exponent {exponent} is not supported",
            "Use 2048 to 4096 bits and the exponent 65537.",
        )


def check_ec_key(key: ec.EllipticCurvePublicKey) -> None:
    """Raises BadInputError unless ES256 can be verified with it."""
    if not isinstance(key.curve, ec.SECP256R1):
        raise BadInputError(f"an elliptic-curve key on {key.curve.name} is not supported", "Use P-256.")


def subject_key_id(key: rsa.RSAPublicKey) -> str:
    """The key's name in every store: what its certificate carries, 40 hexadecimal digits in lower case."""
    return x509.SubjectKeyIdentifier.from_public_key(key).digest.hex()


def check_digest(digest: bytes) -> None:
    """Raises BadInputError unless this can be a SHA-256 digest."""
    if len(digest) != 32:
        raise BadInputError(f"a SHA-256 digest has 32 bytes and this one {len(digest)}")


def check_signature(key: rsa.RSAPublicKey, signature: bytes, digest: bytes, wrong: SignerError) -> None:
    """Raises ``wrong`` unless the signature is this key's."""
    try:
        key.verify(signature, digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))
    except InvalidSignature as error:
        raise wrong from error


def joined(signature: bytes) -> bytes:
    """r and s of a DER-encoded ECDSA signature (RFC 3279 section 2.2.3) as RFC 7518 section 3.4 has them."""
    return b"".join(number.to_bytes(32, "big") for number in utils.decode_dss_signature(signature))
