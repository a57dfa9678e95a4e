"""The JWT an agent's requests carry to a Supabase project (RFC 7519), the keys that sign it, and their JWKS.

Whoever holds a key that the project trusts can be anybody there, ``service_role`` included: it is the
project's, or that of server code the project trusts, and never an agent's. What a token says is good for
minutes; whether its certificate still is, the database decides at each request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from .credential import base64url
from .errors import BadInputError, CertificateValidityError
from .results import CertificateVerification
from .signers import ECDSASigner, Signer, check_ec_key, check_rsa_key, open_jwt_signer

# Seconds. The longest life of an agent's token, and that of one that only asks about a certificate.
LIFETIME: Final = 300
_ASKING: Final = 60
# A token is renewed once this much of its life is over.
_RENEW_AFTER: Final = 0.8
# Bytes: RFC 7518 section 3.2, and PostgREST takes none shorter.
_SHORTEST_SECRET: Final = 32

AGENT_ROLE: Final = "kakunin_agent"
# Roles that row security does not bind, or that a request could become any other from.
PRIVILEGED: Final = ("service_role", "authenticator", "postgres", "supabase_admin")


def _number(value: int) -> str:
    """Base64urlUInt (RFC 7518 section 2)."""
    return base64url(value.to_bytes((value.bit_length() + 7) // 8, "big"))


PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


def _members(key: PublicKey) -> dict[str, str]:
    """What RFC 7638 section 3.2 says a thumbprint is of, in its order (RFC 7518 sections 6.2.1 and 6.3.1).

    :raises BadInputError: neither an RSA key of 2048 to 4096 bits with the exponent 65537 nor a P-256 one.
    """
    if isinstance(key, ec.EllipticCurvePublicKey):
        check_ec_key(key)
        point = key.public_numbers()
        x, y = (base64url(each.to_bytes(32, "big")) for each in (point.x, point.y))
        return {"crv": "P-256", "kty": "EC", "x": x, "y": y}
    check_rsa_key(key)
    numbers = key.public_numbers()
    return {"e": _number(numbers.e), "kty": "RSA", "n": _number(numbers.n)}


def _alg(key: PublicKey) -> str:
    return "ES256" if isinstance(key, ec.EllipticCurvePublicKey) else "RS256"


def thumbprint(key: PublicKey) -> str:
    """The key's name in a JWKS: its JWK thumbprint with SHA-256 (RFC 7638). Raises as :func:`jwk`."""
    return base64url(hashlib.sha256(json.dumps(_members(key), separators=(",", ":")).encode()).digest())


def jwk(key: PublicKey) -> dict[str, str]:
    """The public key as a JWK (RFC 7517) that verifies RS256 or ES256.

    :raises BadInputError: neither an RSA key of 2048 to 4096 bits with the exponent 65537 nor a P-256 one.
    """
    return {**_members(key), "use": "sig", "alg": _alg(key), "kid": thumbprint(key)}


def jwks(keys: Sequence[PublicKey]) -> dict[str, list[dict[str, str]]]:
    """The JWK set (RFC 7517 section 5) of these keys, in this order, each once."""
    return {"keys": list({one["kid"]: one for one in map(jwk, keys)}.values())}


class SecretKey:
    """HS256 with the project's secret: a text, whose UTF-8 it is, or bytes. Signs at once."""

    alg: Final = "HS256"
    blocking: Final = False

    def __init__(self, secret: str | bytes, kid: str | None = None) -> None:
        try:
            self._secret = secret.encode() if isinstance(secret, str) else secret
        except UnicodeEncodeError:  # which quotes it
            raise BadInputError("the JWT secret has no UTF-8") from None
        if not isinstance(self._secret, bytes):
            raise BadInputError("the JWT secret is a text or bytes")
        if len(self._secret) < _SHORTEST_SECRET:
            raise BadInputError(
                f"the JWT secret has fewer than {_SHORTEST_SECRET} bytes",
                "Give the project's own, from its settings.",
            )
        self._kid = kid

    @property
    def kid(self) -> str | None:
        return self._kid

    def sign(self, message: bytes) -> bytes:
        return hmac.digest(self._secret, message, "sha256")

    def __repr__(self) -> str:
        return "<SecretKey>"


class AsymmetricKey:
    """RS256 with a :class:`Signer`, ES256 with an :class:`ECDSASigner`, or the one of a URI
    (:func:`open_jwt_signer`), opened at its first use.

    ``kid`` is the key's thumbprint (RFC 7638), as ``kakunin-db jwks`` has it, unless another is given.
    """

    blocking: Final = True

    def __init__(self, signer: Signer | ECDSASigner | str, kid: str | None = None) -> None:
        self._given = signer
        self._kid = kid
        self._opening = threading.Lock()
        self._opened: Signer | ECDSASigner | None = None

    @property
    def _signer(self) -> Signer | ECDSASigner:
        with self._opening:
            if self._opened is None:
                opened = open_jwt_signer(self._given) if isinstance(self._given, str) else self._given
                jwk(opened.public_key())  # which it has, or cannot be published
                self._opened = opened
            return self._opened

    @property
    def alg(self) -> str:
        """Raises SignerError where the key cannot be opened."""
        return _alg(self._signer.public_key())

    @property
    def kid(self) -> str | None:
        """Raises SignerError where the key cannot be opened."""
        return self._kid or thumbprint(self._signer.public_key())

    def sign(self, message: bytes) -> bytes:
        """Raises SignerError where the key cannot sign."""
        return self._signer.sign(hashlib.sha256(message).digest())

    def __repr__(self) -> str:
        return "<AsymmetricKey>"


Key = SecretKey | AsymmetricKey


def key_of(secret: str | bytes | None, signer: Signer | ECDSASigner | str | None, kid: str | None) -> Key:
    """The one key that is given.

    :raises BadInputError: none is given, or both.
    """
    if secret is not None and signer is not None:
        raise BadInputError("a token is signed with jwt_secret or with jwt_signer, and not with both")
    if secret is not None:
        return SecretKey(secret, kid)
    if signer is not None:
        return AsymmetricKey(signer, kid)
    raise BadInputError(
        "no key to sign the agent's token with",
        "Give jwt_secret, the project's JWT secret, or jwt_signer, a key whose JWKS the project trusts.",
    )


@dataclass(frozen=True)
class Token:
    """An agent's token. ``expires`` is in seconds since the epoch."""

    text: str = field(repr=False)
    expires: int
    _renew_at: float  # time.monotonic()
    _renew_at_wall: float  # time.time(), which goes on while the machine sleeps

    @property
    def seconds_left(self) -> float:
        """Until it should be renewed; 0 or less once it should be."""
        return min(self._renew_at - time.monotonic(), self._renew_at_wall - time.time())

    @property
    def fresh(self) -> bool:
        return self.seconds_left > 0

    @property
    def expired(self) -> bool:
        return time.time() >= self.expires


class Minter:
    """Makes the tokens of agents.

    :param role: the database's role for the request, which ``authenticator`` must be granted.
    :param lifetime: seconds, 1 to 300; less where the certificate ends before.
    """

    def __init__(
        self,
        key: Key,
        *,
        role: str = AGENT_ROLE,
        audience: str | None = "authenticated",
        issuer: str | None = None,
        lifetime: int = LIFETIME,
    ) -> None:
        if not isinstance(lifetime, int) or not 0 < lifetime <= LIFETIME:
            raise BadInputError(f"a token lives 1 to {LIFETIME} seconds")
        if not isinstance(role, str) or not role:
            raise BadInputError("role is the name of a role of the database")
        if role in PRIVILEGED:
            raise BadInputError(
                f"the role {role} is not bound by row security, or can become any other",
                f"Leave it out: {AGENT_ROLE} has what an agent needs. Or give authenticated.",
            )
        self.key = key
        self._role = role
        self._more = {"aud": audience, "iss": issuer}
        self._lifetime = lifetime

    def mint(self, certificate: CertificateVerification) -> Token:
        """The token of a certificate that was found to be usable. It never outlives the certificate.

        :raises CertificateValidityError: the certificate ends within this second.
        :raises SignerError: the key cannot sign.
        """
        if not certificate.valid or certificate.agent_id is None or certificate.not_after is None:
            raise BadInputError(f"certificate {certificate.serial_number} was not found to be usable")
        begun = time.monotonic()
        now = time.time()
        issued = int(now)
        expires = min(issued + self._lifetime, math.floor(certificate.not_after.timestamp()))
        if expires <= now:
            raise CertificateValidityError(
                f"certificate {certificate.serial_number} has expired", "Certify the agent anew."
            )
        text = self._signed(
            {
                "sub": str(certificate.agent_id),
                "kakunin_cert_serial": certificate.serial_number,
                "scopes": list(certificate.permitted_actions),
                "iat": issued,
                "exp": expires,
            }
        )
        wait = (expires - now) * _RENEW_AFTER
        return Token(text, expires, begun + wait, now + wait)

    def asking(self) -> str:
        """A token that is no agent's, to ask the project about a certificate."""
        now = int(time.time())
        return self._signed({"iat": now, "exp": now + _ASKING})

    def _signed(self, claims: dict[str, Any]) -> str:
        header = {"alg": self.key.alg, "typ": "JWT", "kid": self.key.kid}
        claims = {"role": self._role, **claims, **self._more}
        message = ".".join(
            base64url(json.dumps({k: v for k, v in part.items() if v is not None}).encode())
            for part in (header, claims)
        )
        return f"{message}.{base64url(self.key.sign(message.encode()))}"
