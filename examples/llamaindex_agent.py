"""LlamaIndex: an agent with two guarded function tools, of which its certificate permits one.

    KAKUNIN_KEY_PASSWORD=... python examples/llamaindex_agent.py DSN NAME.pem INSTALLATION_ID

The arguments are those of examples/bound_session.py. The agent needs the action vault:read. LlamaIndex's mock
model, scripted, stands for a real one.
Needs kakunin-db with the extras binary and llamaindex.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import psycopg
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ToolCallBlock
from llama_index.core.llms.mock import MockFunctionCallingLLM

from kakunin_db import AgentCredential, Kakunin, bind_agent_session
from kakunin_db.integrations.llamaindex import KakuninFunctionToolGuard


async def ask(dsn: str, credential: AgentCredential) -> None:
    def read_vault() -> str:
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("select content from agent_vault").fetchall())

    def erase_vault() -> str:
        with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
            return str(connection.execute("delete from agent_vault").rowcount)

    script = iter(
        [
            ToolCallBlock(tool_name="read_vault", tool_kwargs={}),
            ToolCallBlock(tool_name="erase_vault", tool_kwargs={}),
            TextBlock(text="I could read, and not erase."),
        ]
    )

    def model(messages: Any, **kwargs: Any) -> ChatMessage:
        return ChatMessage(role="assistant", blocks=[next(script)])

    with Kakunin(dsn, credential=credential, timeout=5) as kakunin:
        tools = [
            KakuninFunctionToolGuard(
                kakunin=kakunin,
                fn=read_vault,
                name="read_vault",
                description="Reads the vault.",
                required_scopes=["vault:read"],
            ),
            KakuninFunctionToolGuard(
                kakunin=kakunin,
                fn=erase_vault,
                name="erase_vault",
                description="Erases the vault.",
                required_scopes=["vault:erase"],
            ),
        ]
        llm = MockFunctionCallingLLM(response_generator=model, is_chat_model=True)
        running = FunctionAgent(tools=tools, llm=llm, streaming=False).run("Read the vault, then erase it.")
        async for event in running.stream_events():
            if isinstance(event, ToolCallResult):
                print(f"{event.tool_name}: {event.tool_output.content}")
        print(await running)


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)
    asyncio.run(ask(dsn, credential))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
