"""An agent's credential: its certificate serial and the signer that holds its key."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
import uuid

from .ca import agent_urn
from .errors import BadInputError
from .serials import normalize_serial
from .signers import Signer
from .tickets import TicketCache

_MAX_LIFETIME = 300


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


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
            raise BadInputError("agent_id and installation_id are UUIDs") from error
        self.serial = normalize_serial(serial)
        self.signer = signer
        self.tickets = TicketCache()

    def assertion(self, installation_id: uuid.UUID | str, lifetime: int = 60) -> str:
        """A JWT (RFC 7523, RS256) for one exchange at this installation, good for ``lifetime`` seconds."""
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
        message = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = self.signer.sign(hashlib.sha256(message.encode()).digest())
        return f"{message}.{_base64url(signature)}"

    def __repr__(self) -> str:
        return f"<AgentCredential agent {self.agent_id} certificate {self.serial}>"
