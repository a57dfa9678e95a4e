"""CrewAI: an agent that takes a task, and uses its tools, only while it may.

    KAKUNIN_KEY_PASSWORD=... OPENAI_BASE_URL=... OPENAI_API_KEY=... \\
      python examples/crewai_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. The model is one
behind OpenAI's API, also on this machine.
Needs kakunin-db with the extras binary and crewai.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg
from crewai import LLM, Crew, Task
from crewai.tools import tool

from kakunin_db import AgentCredential, Kakunin, KakuninError, bind_agent_session
from kakunin_db.integrations.crewai import KakuninCrewAgent


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)

    @tool("read_vault")
    def read_vault() -> str:
        """Reads the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("select content from agent_vault").fetchall())

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        for scope in ("vault:read", "vault:erase"):
            keeper = KakuninCrewAgent(
                kakunin=kakunin,
                required_scopes=[scope],
                role="Keeper",
                goal="Know what the vault has",
                backstory="Careful with what is not its own",
                llm=LLM(model="openai/m", base_url=os.environ["OPENAI_BASE_URL"]),
                tools=[read_vault],
            )
            task = Task(description="Read the vault.", expected_output="What it has.", agent=keeper)
            try:
                print(Crew(agents=[keeper], tasks=[task]).kickoff().raw)
            except KakuninError as error:
                print(f"refused: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
