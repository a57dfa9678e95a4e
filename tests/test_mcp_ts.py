"""The MCP server with the official TypeScript SDK's client, over real stdio."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from conftest import Agent, Database
from test_mcp import SCOPE, events, server_with
from test_mcp_sql import busy, database  # noqa: F401  (the same database)

pytest.importorskip("mcp", reason="the mcp extra is not installed")
from mcp_client import COMMAND, environment

SDK = "@modelcontextprotocol/sdk@1.32.2"


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where the SDK is, installed by npm on first use."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("no node and npm on this machine: the TypeScript client is not run")
    folder = ROOT / ".npm" / SDK.replace("/", "_")
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ["--no-save", "--no-audit", "--no-fund", "--no-update-notifier", "--loglevel=error"]
        command = ["npm", "install", "--prefix", folder, "--ignore-scripts", *quiet, SDK]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            pytest.skip(f"npm cannot install {SDK}: {done.stderr[-200:]}")
        (folder / "installed").touch()
    return folder


def script(folder: Path, source: Path) -> Path:
    """A copy beside the SDK, where node finds it from."""
    return Path(shutil.copy(source, folder))


class Driver:
    def __init__(self, folder: Path, variables: dict[str, str], *arguments: str) -> None:
        command = ["node", script(folder, ROOT / "tests" / "mcp_driver.mjs"), *COMMAND, "mcp", *arguments]
        self.process = subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tools = {tool["name"]: tool for tool in self.read()}

    def read(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def send(self, name: str, arguments: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.send(name, arguments)
        answer: dict[str, Any] = self.read()
        return answer


@pytest.fixture
def agent(database: Database) -> Agent:  # noqa: F811
    return database.agent("atlas", permitted_actions=["orders:write", "sql:write"], financial_scope=SCOPE)


@pytest.fixture
def driver(agent: Agent, folder: Path, tmp_path: Path) -> Iterator[Driver]:
    variables = environment(agent, tmp_path, "agent_1", KAKUNIN_TEST="ts", HOME=str(tmp_path))
    driver = Driver(folder, variables, "--sql", "--timeout", "60")
    yield driver
    with driver.process as process:
        process.terminate()


def test_tools_results_errors_and_a_revocation(driver: Driver, agent: Agent) -> None:
    assert list(driver.tools) == [
        "verify_agent_scope", "check_risk_score", "audit_log_append", "query", "explain", "describe_schema",
    ]  # fmt: skip
    order = {"action": "orders:write", "amount_usd": 9000.5, "venue": "XLON"}
    answer = driver.call("verify_agent_scope", order)
    assert answer["structuredContent"]["allowed"] is True
    assert json.loads(answer["content"][0]["text"]) == answer["structuredContent"]
    assert driver.call("check_risk_score", {})["structuredContent"]["band"] == "low"
    entry = driver.call("audit_log_append", {"event_type": "api_call", "metadata": {"tool": "quotes"}})
    assert entry["structuredContent"]["event_id"]
    assert events(agent) == [("api_call", {"tool": "quotes"})]
    (result,) = driver.call("query", {"sql": "select 40 + 2 as answer"})["structuredContent"]["results"]
    assert result["rows"] == [[42]]

    refused = driver.call("verify_agent_scope", {**order, "agent_id": "another"})
    assert refused["isError"] is True
    assert refused["structuredContent"]["code"] == "KA010"
    assert refused["structuredContent"]["allowed"] is False
    assert driver.call("query", {"sql": "commit"})["structuredContent"]["code"] == "not_a_query"

    agent.revoke()
    answer = driver.call("verify_agent_scope", order)
    assert (answer["structuredContent"]["allowed"], answer["structuredContent"]["code"]) == (False, "KA002")
    for name, arguments in (("check_risk_score", {}), ("query", {"sql": "select 1"})):
        refused = driver.call(name, arguments)
        assert (refused["isError"], refused["structuredContent"]["code"]) == (True, "KA002")


def test_a_server_killed_in_a_call_is_an_error_to_the_client(
    driver: Driver,
    database: Database,  # noqa: F811
) -> None:
    driver.send("query", {"sql": "select pg_sleep(50)"})
    assert busy(database, 1)
    os.kill(server_with("KAKUNIN_TEST=ts"), signal.SIGKILL)
    assert "lost" in driver.read()
    assert busy(database, 0)


def test_the_loop_of_the_example(agent: Agent, folder: Path, tmp_path: Path) -> None:
    shim = tmp_path / "kakunin-db"
    shim.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    shim.chmod(0o755)
    variables = environment(agent, tmp_path, "agent_1", KAKUNIN_COMMAND=str(shim))
    loop = script(folder, ROOT / "examples" / "mcp" / "agent_loop.mjs")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["node", loop, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)

    done = run("orders:write", "9000", "XLON")
    assert (done.returncode, done.stderr) == (0, "")
    assert "band medium" in done.stdout
    for arguments, said in (
        (("orders:write", "10001", "XLON"), "blocked: "),
        (("launch:missiles", "1", "XLON"), "does not permit 'launch:missiles'"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert said in done.stderr
    agent.suspend()
    done = run("orders:write", "9000", "XLON")  # the server does not even start
    assert done.returncode == 1
    assert "suspended" in done.stderr
    assert [kind for kind, _ in events(agent)] == ["transaction_initiated"]
