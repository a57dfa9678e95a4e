"""An agent's credential: its certificate serial and the signer that holds its key."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
import re
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography import x509

from .ca import ALGORITHM, AgentCertificate, agent_urn, canonical_json
from .errors import BadInputError
from .serials import normalize_serial
from .signers import KeyStore, Signer, open_keys
from .tickets import TicketCache

_MAX_LIFETIME = 300
_READ = "Give what certify() or --out wrote: Path('atlas.pem').read_bytes()."


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


Payload = Mapping[str, Any] | bytes | str


@dataclass(frozen=True)
class SignResult:
    """``signature`` is base64, RSASSA-PKCS1-v1_5 with SHA-256 over the payload's bytes; ``payload_hash`` is
    ``sha256:<hex>`` of them."""

    signature: str
    certificate_serial: str
    payload_hash: str
    signed_at: dt.datetime
    algorithm: str = ALGORITHM


def payload_bytes(payload: Payload) -> bytes:
    """What is signed: a mapping in canonical form (RFC 8785), a text's UTF-8, bytes as they are."""
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, str):
        try:
            return payload.encode()
        except UnicodeEncodeError as error:
            raise BadInputError("a text with half of a surrogate pair has no UTF-8") from error
    if isinstance(payload, Mapping):
        return canonical_json(payload)
    raise BadInputError(f"what is signed is a mapping, a text or bytes, and not {type(payload).__name__}")


def _could_be_assertion(message: bytes) -> bool:
    """Whether a JWS signature could cover these bytes: before a dot, base64url of a JSON object.

    Wherever parsers differ it is the most lenient that counts: this one takes numbers of any length, control
    characters and what is not UTF-8, padding and white space.
    """
    header, dot, _ = message.partition(b".")
    header = b"".join(header.replace(b"=", b"").split())
    if not dot or len(header) % 4 == 1 or not re.fullmatch(rb"[A-Za-z0-9+/_-]+", header):
        return False
    text = base64.urlsafe_b64decode(header + b"=" * (-len(header) % 4)).decode("latin-1")
    try:
        return isinstance(json.loads(text, strict=False, parse_int=str, parse_float=str), dict)
    except ValueError:
        return False
    except RecursionError:
        return True


def _could_be_request(message: bytes) -> bool:
    """Whether these bytes end like the signature base of an HTTP message (RFC 9421 section 2.5)."""
    return b'\n"@signature-params": ' in b"\n" + message


def _could_be_certificate(message: bytes) -> bool:
    """Whether this is one DER structure that begins like what is signed of a certificate or a request for
    one, of a revocation list, or of an answer about one (RFC 5280, 2986, 6960)."""
    if len(message) < 4 or message[0] != 0x30 or _is_text(message):
        return False
    count = message[1] & 0x7F if message[1] >= 0x80 else 0  # of the bytes the length is in
    size = int.from_bytes(message[2 : 2 + count], "big") if count else message[1]
    whole = message[1] == 0x80 or 2 + count + size == len(message)
    return whole and message[2 + count : 3 + count] in (b"\x02", b"\x30", b"\xa0", b"\xa1", b"\xa2")


def _is_text(message: bytes) -> bool:
    """No such structure is: the object identifier of its algorithm (2A 86 48) is not UTF-8."""
    try:
        message.decode()
    except UnicodeDecodeError:
        return False
    return True


def sign_payload(signer: Signer, serial: str, payload: Payload) -> SignResult:
    """Signs with an agent's key, so that ``kakunin.verify_message()`` and openssl can check it.

    :raises BadInputError: the payload could be a session assertion, a signed HTTP request, or a certificate
        to be signed. Signing whatever somebody hands in would otherwise give them a session or a request as
        this agent, or a certificate, should an authority's key be taken for the agent's.
    :raises SignerError: the key could not sign.
    """
    message = payload_bytes(payload)
    for could_be, what in (
        (_could_be_assertion, "a session assertion"),
        (_could_be_request, "a signed HTTP request"),
        (_could_be_certificate, "a certificate or a revocation list"),
    ):
        if could_be(message):
            raise BadInputError(
                f"this payload could be {what}, and a message is never signed as one",
                "Sign a mapping that holds it, or its hash.",
            )
    digest = hashlib.sha256(message)
    signature = base64.b64encode(signer.sign(digest.digest())).decode()
    return SignResult(signature, serial, f"sha256:{digest.hexdigest()}", dt.datetime.now(dt.timezone.utc))


class AgentCredential:
    """Signs the assertions an agent opens its sessions with.

    ``installation_id`` pins the database the agent means to talk to, and should come from configuration:
    without it the credential trusts the id that the first database names and keeps to that one, so a
    false server met first could pass an assertion on.

    Keep one for the life of the agent: it holds the tickets its sessions were given.
    """

    def __init__(
        self,
        agent_id: uuid.UUID | str,
        serial: str | int,
        signer: Signer,
        installation_id: uuid.UUID | str | None = None,
    ) -> None:
        try:
            self.agent_id = uuid.UUID(str(agent_id))
            self.installation_id = None if installation_id is None else uuid.UUID(str(installation_id))
        except ValueError as error:
            raise BadInputError(
                "agent_id and installation_id are UUIDs",
                "select kakunin.installation_id() says the database's.",
            ) from error
        self.serial = normalize_serial(serial)
        self.signer = signer
        self.tickets = TicketCache()

    @classmethod
    def from_certificate(
        cls, certificate: str | bytes, keys: KeyStore | str, installation_id: uuid.UUID | str | None = None
    ) -> AgentCredential:
        """The credential of a certificate (PEM or DER) whose key is in this store, or in the one of this URI.

        :raises BadInputError: it is not an agent's certificate.
        :raises SignerError: the store does not have its key.
        """
        data = certificate.encode() if isinstance(certificate, str) else certificate
        if not isinstance(data, bytes):
            raise BadInputError(
                f"a certificate is the text or the bytes of its file, and not {type(data).__name__}", _READ
            )
        try:
            pem = data.lstrip().startswith(b"-----")
            parsed = x509.load_pem_x509_certificate(data) if pem else x509.load_der_x509_certificate(data)
            agent = AgentCertificate(parsed)
            agent_id, public_key = agent.agent_id, agent.public_key
        except (ValueError, IndexError) as error:
            raise BadInputError("this is not an agent's certificate in PEM or DER", _READ) from error
        store = open_keys(keys) if isinstance(keys, str) else keys
        return cls(agent_id, agent.serial, store.open(public_key), installation_id)

    def assertion(self, installation_id: uuid.UUID | str, lifetime: int = 60) -> str:
        """A JWT (RFC 7523, RS256) for one exchange at this installation, good for ``lifetime`` seconds.

        :raises BadInputError: another lifetime than 1 to 300 seconds.
        :raises SignerError: the key could not sign."""
        if not 0 < lifetime <= _MAX_LIFETIME:
            raise BadInputError(f"an assertion lives 1 to {_MAX_LIFETIME} seconds")
        now = int(time.time())
        urn = agent_urn(self.agent_id)
        header = {"alg": "RS256", "typ": "JWT", "kid": self.serial}
        claims = {
            "iss": urn,
            "sub": urn,
            "aud": f"kakunin:{installation_id}",
            "iat": now,
            "exp": now + lifetime,
            "jti": secrets.token_urlsafe(24),
        }
        message = ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = self.signer.sign(hashlib.sha256(message.encode()).digest())
        return f"{message}.{base64url(signature)}"

    def sign(self, payload: Payload) -> SignResult:
        """Signs a message as this agent; see :func:`sign_payload`."""
        return sign_payload(self.signer, self.serial, payload)

    def __repr__(self) -> str:
        return f"<AgentCredential agent {self.agent_id} certificate {self.serial}>"
