"""An agent that signs its requests to server.py.

    KAKUNIN_KEY_PASSWORD=... python examples/gateway/agent.py URL NAME.pem

NAME.pem is what examples/register_agent.py wrote, for the actions vault:read and vault:write. KAKUNIN_KEYS as
there. Needs httpx and kakunin-db with the extra http.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import httpx

from kakunin_db import AgentCredential
from kakunin_db.middleware.signature import sign_request


class SignedRequests(httpx.Auth):
    """Signs each request as it is sent, redirects included."""

    requires_request_body = True

    def __init__(self, credential: AgentCredential) -> None:
        self.credential = credential

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers.update(
            sign_request(
                self.credential, request.method, str(request.url), dict(request.headers), request.content
            )
        )
        yield request


def main(url: str, certificate: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys)
    with httpx.Client(base_url=url, auth=SignedRequests(credential)) as client:
        for answer in (
            client.post("/vault", json={"content": "by way of the gateway"}),
            client.get("/vault"),
        ):
            print(answer.status_code, answer.text)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
