"""The second fence: a guarded tool is gone around on purpose, and the database still shows the agent no row
but its own.

    KAKUNIN_KEY_PASSWORD=... python examples/double_fence.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The tool, LangChain's here, runs whatever SQL a model
writes, and its guard asks for the action vault:query.
Needs kakunin-db with the extras binary and langchain.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psycopg
from langchain_core.tools import tool

from kakunin_db import AgentCredential, Kakunin, KakuninError, bind_agent_session
from kakunin_db.integrations.langchain import KakuninToolGuard

# What a poisoned document may talk a model into.
READ = "select content from agent_vault"
FORGE = "insert into agent_vault (permitted_agent_serial, content) values ('0A', 'forged')"
TAKE = "update agent_vault set permitted_agent_serial = kakunin.current_cert_serial() returning content"


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)

    @tool
    def query(sql: str) -> str:
        """Runs SQL."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute(sql.encode()).fetchall())

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        guarded = KakuninToolGuard(kakunin=kakunin, tool=query, required_scopes=["vault:query"])
        for name, fence, sql in (
            ("guarded", guarded, READ),
            *(("gone around", query, sql) for sql in (READ, TAKE, FORGE)),
        ):
            try:
                print(f"{name}: {fence.invoke({'sql': sql})}")
            except KakuninError as error:
                print(f"{name}: refused: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
