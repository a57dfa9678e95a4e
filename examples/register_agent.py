"""Makes an agent, its key and its certificate; where there is none yet, a certificate authority first.

    KAKUNIN_KEY_PASSWORD=... python examples/register_agent.py DSN NAME [ACTION ...]

DSN names the owner of the kit, or a login with kakunin_registrar and kakunin_operator. Keys go, encrypted,
into the folder keys/; KAKUNIN_KEYS=awskms: keeps them in AWS KMS. Writes NAME.pem, the
certificate, and with a new authority ca.pem, for kakunin-db audit verify.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from kakunin_db import Kakunin, compute_model_hash

MODEL = {"provider": "openai", "model": "gpt-4o", "system_prompt": "You are a compliant system agent."}


def main(dsn: str, name: str, *actions: str) -> None:
    with Kakunin(dsn, keys=os.environ.get("KAKUNIN_KEYS", "file:keys")) as kakunin:
        if not kakunin.authorities.list():
            authorities = kakunin.authorities.create("Example Root CA", intermediate="Example Issuing CA")
            Path("ca.pem").write_text("".join(authority.pem for authority in authorities))
        agent = kakunin.agents.create(name, model="gpt-4o", model_hash=compute_model_hash(MODEL))
        certificate = kakunin.agents.certify(agent.agent_id, permitted_actions=actions)
    Path(f"{name}.pem").write_text(certificate.pem)
    print(f"agent_id {agent.agent_id}")
    print(f"serial   {certificate.serial_number}")
    print(f"key      {certificate.key_id}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
