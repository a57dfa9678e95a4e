"""A function that runs only while its agent may read the vault, and the events that it leaves.

    KAKUNIN_KEY_PASSWORD=... python examples/guarded_function.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kakunin_db import AgentCredential, Kakunin, KakuninError, verify_agent_scope


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)
    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:

        @verify_agent_scope(kakunin, required_scopes=["vault:read"])
        def read(what: str) -> str:
            event = kakunin.events.create("data_access", {"tool": "read", "table": "agent_vault"})
            return f"read {what}: event {event.event_id}, {event.band}"

        @verify_agent_scope(kakunin, required_scopes=["vault:erase"])
        def erase() -> str:
            return "erased"

        print(read("the vault"))
        try:
            print(erase())
        except KakuninError as error:
            print(f"refused: {error}")
        print(kakunin.check_risk_score().recommendation)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
