"""`kakunin-db mcp` as MCP clients start it: a process, and its stdin and stdout."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from conftest import Agent
from mcp import Client, StdioServerParameters, stdio_client

PASSWORD = "correct horse"
# Beside the interpreter where the package is installed; and by module where it is only on the path.
COMMAND = [sys.executable, "-m", "kakunin_db.cli"]


def environment(agent: Agent, folder: Path, login: str, **more: str) -> dict[str, str]:
    """What a client's configuration would say of this agent; its key is in the folder."""
    key = folder / f"{agent.serial.replace(':', '')}.pem"
    if not key.exists():
        agent.signer.save(key, PASSWORD.encode())
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return {
        **kept,
        "KAKUNIN_DSN": agent.database.dsn(login),
        "KAKUNIN_CERT_SERIAL": agent.serial,
        "KAKUNIN_SIGNER": f"file:{key}",
        "KAKUNIN_KEY_PASSWORD": PASSWORD,
        "KAKUNIN_INSTALLATION_ID": str(agent.database.installation_id),
        **more,
    }


class Tools:
    """A client of one server. A call returns the structured result, and checks what all results have."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def __call__(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        result = await self.client.call_tool(name, arguments or {})
        assert not result.is_error, result.structured_content
        return self._content(result)

    async def refused(self, name: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        result = await self.client.call_tool(name, arguments or {})
        assert result.is_error, result.structured_content
        content = self._content(result)
        assert content["code"]
        assert content["error"]
        assert "Traceback" not in json.dumps(content)
        return content

    @staticmethod
    def _content(result: Any) -> dict[str, Any]:
        (text,) = result.content
        assert json.loads(text.text) == result.structured_content
        return result.structured_content


@contextlib.asynccontextmanager
async def serving(
    variables: dict[str, str], *arguments: str, log: Path | None = None
) -> AsyncIterator[Tools]:
    """A client of `kakunin-db mcp` with these variables."""
    command, *rest = COMMAND
    parameters = StdioServerParameters(command=command, args=[*rest, "mcp", *arguments], env=variables)
    async with Client(stdio_client(parameters)) as client:
        yield Tools(client)
