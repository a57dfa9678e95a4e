"""AutoGen: an agent that takes part in a chat, and whose tools run, only while it may.

    KAKUNIN_KEY_PASSWORD=... OPENAI_BASE_URL=... OPENAI_API_KEY=... \\
      python examples/autogen_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. The model is one
behind OpenAI's API, also on this machine.
Needs kakunin-db with the extras binary and autogen.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg
from autogen import UserProxyAgent

from kakunin_db import AgentCredential, Kakunin, KakuninError, bind_agent_session
from kakunin_db.integrations.autogen import KakuninConversableAgent


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)

    def read_vault() -> str:
        """Reads the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("select content from agent_vault").fetchall())

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        for scope in ("vault:read", "vault:erase"):
            keeper = KakuninConversableAgent(
                kakunin=kakunin,
                required_scopes=[scope],
                name="Keeper",
                llm_config={"model": "m", "base_url": os.environ["OPENAI_BASE_URL"], "price": [0, 0]},
                functions=[read_vault],
                human_input_mode="NEVER",
            )
            keeper.register_for_execution()(keeper.tools[0])
            user = UserProxyAgent("User", human_input_mode="NEVER", code_execution_config=False)
            try:
                print(user.initiate_chat(keeper, message="Read the vault.", max_turns=1).summary)
                reply = keeper.generate_reply(sender=user)
                print(f"tool: {reply}")
            except KakuninError as error:
                print(f"refused: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
