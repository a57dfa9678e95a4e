"""CAMEL: an agent whose steps are asked for, with tools that are, each by scopes of its own.

    KAKUNIN_KEY_PASSWORD=... OPENAI_BASE_URL=... OPENAI_API_KEY=... \\
      python examples/camel_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. The model is one
behind OpenAI's API, also on this machine.
Needs kakunin-db with the extras binary and camel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg
from camel.models import ModelFactory
from camel.models.stub_model import StubTokenCounter
from camel.types import ModelPlatformType

from kakunin_db import AgentCredential, Kakunin, bind_agent_session
from kakunin_db.integrations.camel import KakuninCamelAgent, KakuninToolkit


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)

    def read_vault() -> str:
        """Reads the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("select content from agent_vault").fetchall())

    def erase_vault() -> str:
        """Erases the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("delete from agent_vault").rowcount)

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        erasing = KakuninToolkit(kakunin, tools=[erase_vault], required_scopes=["vault:erase"])
        agent = KakuninCamelAgent(
            "You keep the vault.",
            ModelFactory.create(
                ModelPlatformType.OPENAI_COMPATIBLE_MODEL,
                "m",
                url=os.environ["OPENAI_BASE_URL"],
                api_key=os.environ["OPENAI_API_KEY"],
                token_counter=StubTokenCounter(),  # the default one fetches its tables from the network
            ),
            kakunin=kakunin,
            required_scopes=["vault:read"],
            tools=[read_vault, *erasing.get_tools()],
        )
        response = agent.step("Read the vault, and erase it.")
        for record in response.info["tool_calls"]:
            print(f"{record.tool_name}: {record.result}")
        print(response.msgs[0].content)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
