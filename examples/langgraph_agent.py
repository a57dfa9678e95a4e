"""LangGraph: a graph with a guarded node, and a tool node whose tools are guarded, each by scopes of its own.

    KAKUNIN_KEY_PASSWORD=... python examples/langgraph_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. A script stands
for a model.
Needs kakunin-db with the extras binary and langgraph.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import psycopg
from langchain_core.messages import AIMessage
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import tools_condition

from kakunin_db import AgentCredential, Kakunin, bind_agent_session
from kakunin_db.integrations.langgraph import KakuninToolNode, kakunin_node


def call(name: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": {}, "id": name}])


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)
    script = iter([call("read_vault"), call("erase_vault"), AIMessage("I could read, and not erase.")])

    def read_vault() -> str:
        """Reads the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("select content from agent_vault").fetchall())

    def erase_vault() -> str:
        """Erases the vault."""
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("delete from agent_vault").rowcount)

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:

        @kakunin_node(kakunin, required_scopes=["vault:read"])
        def model(state: MessagesState) -> dict[str, Any]:
            return {"messages": [next(script)]}

        tools = KakuninToolNode(
            [read_vault, erase_vault],
            kakunin=kakunin,
            required_scopes={"read_vault": ["vault:read"], "erase_vault": ["vault:erase"]},
            # The model is told of a tool that is not permitted; a revoked agent's graph stops in any case.
            handle_tool_errors=True,
        )
        graph = StateGraph(MessagesState)
        graph.add_node("model", model)
        graph.add_node("tools", tools)
        graph.add_edge(START, "model")
        graph.add_conditional_edges("model", tools_condition)
        graph.add_edge("tools", "model")
        for message in graph.compile().invoke({"messages": ["Read the vault, then erase it."]})["messages"]:
            print(f"{message.type}: {message.text}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
