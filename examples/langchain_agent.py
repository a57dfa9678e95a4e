"""LangChain: an agent with two guarded tools, of which its certificate permits one, and a guarded chain.

    KAKUNIN_KEY_PASSWORD=... python examples/langchain_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. A scripted model
stands for a real one.
Needs kakunin-db with the extras binary and langchain.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psycopg
from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.tools import tool

from kakunin_db import AgentCredential, Kakunin, bind_agent_session
from kakunin_db.integrations.langchain import KakuninToolGuard, langchain_scope_callback


class Scripted(GenericFakeChatModel):
    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self


def call(name: str, **args: Any) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": name}])


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)

    @tool
    def read_vault(contains: str) -> str:
        """Reads the vault."""
        query = "select content from agent_vault where content like '%%' || %s || '%%'"
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute(query, [contains]).fetchall())

    @tool
    def erase_vault() -> str:
        """Erases the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("delete from agent_vault").rowcount)

    # A tool that is not permitted is told to the model; a revoked agent's run ends in any case.
    erase_vault.handle_tool_error = True
    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        tools = [
            KakuninToolGuard(kakunin=kakunin, tool=read_vault, required_scopes=["vault:read"]),
            KakuninToolGuard(kakunin=kakunin, tool=erase_vault, required_scopes=["vault:erase"]),
        ]
        script = [
            call("read_vault", contains=""),
            call("erase_vault"),
            AIMessage("I could read, and not erase."),
        ]
        agent = create_agent(Scripted(messages=iter(script)), tools)
        guarded = agent.with_config(callbacks=[langchain_scope_callback(kakunin)])
        for message in guarded.invoke({"messages": ["Read the vault, then erase it."]})["messages"]:
            print(f"{message.type}: {message.text}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
