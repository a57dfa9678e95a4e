"""The examples of the MCP server: a desktop client's configuration, and the incident of 2025 replayed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT
from conftest import Agent
from test_mcp import events
from test_mcp_sql import database  # noqa: F401  (where agents may create nothing)

pytest.importorskip("mcp", reason="the mcp extra is not installed")
from mcp import Client, StdioServerParameters, stdio_client
from mcp_client import COMMAND, environment

EXAMPLES = ROOT / "examples" / "mcp"


@pytest.fixture
def agent(database) -> Agent:  # type: ignore[no-untyped-def]  # noqa: F811
    return database.agent("support", permitted_actions=["sql:write"])


@pytest.fixture
def variables(agent: Agent, tmp_path: Path) -> dict[str, str]:
    """Those of the agent, with `kakunin-db` on the PATH."""
    command = tmp_path / "bin" / "kakunin-db"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    found = environment(agent, tmp_path, "agent_1")
    return {**found, "PATH": f"{command.parent}{os.pathsep}{found['PATH']}"}


async def test_the_desktop_configuration(variables: dict[str, str]) -> None:
    configuration = json.loads((EXAMPLES / "claude_desktop_config.json").read_text())
    server = configuration["mcpServers"]["kakunin"]
    assert server["command"] == "kakunin-db"
    assert set(server["env"]) <= set(variables)
    env = {"PATH": variables["PATH"], "PYTHONPATH": variables.get("PYTHONPATH", "")}
    env |= {name: variables[name] for name in server["env"]}
    parameters = StdioServerParameters(command=server["command"], args=server["args"], env=env)
    async with Client(stdio_client(parameters)) as client:
        answer = await client.call_tool("verify_agent_scope", {"action": "sql:write"})
        assert answer.structured_content["allowed"] is True
        answer = await client.call_tool("query", {"sql": "select 1"})
        assert answer.structured_content["results"][0]["rows"] == [[1]]


def test_the_incident_leaks_elsewhere_and_not_here(agent: Agent, variables: dict[str, str]) -> None:
    agent.database.run("postgres", f"grant create on database {agent.database.name} to app")
    command = [sys.executable, EXAMPLES / "incident.py", agent.database.dsn("app")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    common, ours = done.stdout.split("kakunin-db mcp --sql:")
    assert "the customer reads: Acme: tok_live_acme, Globex: tok_live_globex | We are on it." in common
    assert "the customer reads: We are on it." in ours
    assert "tok_live" not in ours
    assert ours.count("'code': '42501'") == 2
    assert "leaked before: True; leaked with kakunin-db: False" in ours

    # Both attempts are in the ledger, with the hashes of the statements that the ticket had the model send.
    recorded = events(agent)
    attempts = [metadata for kind, metadata in recorded if kind == "unauthorized_access_attempt"]
    assert [(attempt["sqlstate"], attempt["attempts"]) for attempt in attempts] == [
        ("42501", 1),
        ("42501", 1),
    ]
    called = [m["statement"] for kind, m in recorded if kind in ("data_access", "data_mutation")]
    assert {attempt["statement"] for attempt in attempts} < set(called)
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", statement) for statement in called)
