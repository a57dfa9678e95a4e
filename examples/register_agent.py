"""Makes a certificate authority, an agent, its key and its certificate, and registers the certificate.

    KAKUNIN_KEY_PASSWORD=... python examples/register_agent.py DSN NAME [ACTION ...]

DSN names a login with kakunin_registrar. Writes the agent's key, encrypted, to NAME.pem and prints what
AgentCredential needs. The authority lives only as long as this program: fit for trying things out.
"""

from __future__ import annotations

import os
import sys

import psycopg

from kakunin_db import LocalCA, LocalSigner


def main(dsn: str, name: str, *actions: str) -> None:
    password = os.environ["KAKUNIN_KEY_PASSWORD"].encode()
    signer = LocalSigner.generate()
    with psycopg.connect(dsn) as connection:
        (agent_id,) = connection.execute("select kakunin.create_agent(%s)", [name]).fetchone()
        issued = LocalCA.create().issue(agent_id, signer.public_key(), permitted_actions=actions)
        issued.register(connection)
        (installation_id,) = connection.execute("select kakunin.installation_id()").fetchone()
        signer.save(f"{name}.pem", password)  # before the commit: no certificate without its key
    print(f"agent_id        {agent_id}")
    print(f"serial          {issued.serial}")
    print(f"installation_id {installation_id}")


if __name__ == "__main__":
    main(*sys.argv[1:])
