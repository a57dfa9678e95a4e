"""Google Antigravity: an agent whose turns and tools are asked for by hooks.

    KAKUNIN_KEY_PASSWORD=... OPENAI_BASE_URL=... OPENAI_API_KEY=... \\
      python examples/google_antigravity_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. The model is one
behind OpenAI's API, also on this machine.
Needs kakunin-db with the extras binary and google-antigravity.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psycopg
from google.antigravity import Agent
from google.antigravity.connections.local.local_openai_connection_config import LocalOpenAIAgentConfig

from kakunin_db import AgentCredential, Kakunin, bind_agent_session
from kakunin_db.integrations.google_antigravity import get_kakunin_hooks


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
        config = LocalOpenAIAgentConfig(
            base_url=os.environ["OPENAI_BASE_URL"],
            model="m",
            tools=[read_vault, erase_vault],
            hooks=get_kakunin_hooks(
                kakunin,
                # Of the SDK's own tools, such as run_command, none.
                tool_scopes_mapping={
                    "read_vault": ["vault:read"],
                    "erase_vault": ["vault:erase"],
                    "*": ["tools:others"],
                },
            ),
        )

        async def chat() -> None:
            async with Agent(config=config) as agent:
                print(await (await agent.chat("Read the vault, and erase it.")).text())

        asyncio.run(chat())


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
