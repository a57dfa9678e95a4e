"""The MCP server over real stdio: three tools of one agent, and nothing let through undecided."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import Agent, Database, fresh_database

pytest.importorskip("mcp", reason="the mcp extra is not installed")
from mcp_client import COMMAND, PASSWORD, environment, serving

SCOPE = {"max_single_trade_usd": 10_000, "permitted_venues": ["XLON"]}


@pytest.fixture
def agent(database: Database) -> Agent:
    return database.agent("atlas", permitted_actions=["orders:write"], financial_scope=SCOPE)


def events(agent: Agent) -> list[tuple[str, dict[str, Any]]]:
    query = (
        "select event_type, metadata from kakunin.audit_log where agent_id = %s and event_type !~ '[.]'"
        " order by event_id"
    )
    return agent.database.run("auditor", query, [agent.agent_id])


async def test_the_three_tools(agent: Agent, tmp_path: Path) -> None:
    async with serving(environment(agent, tmp_path, "agent_1")) as tools:
        listed = (await tools.client.list_tools()).tools
        assert [tool.name for tool in listed] == [
            "verify_agent_scope",
            "check_risk_score",
            "audit_log_append",
        ]
        assert all(tool.input_schema["additionalProperties"] is False for tool in listed)

        allowed = await tools(
            "verify_agent_scope", {"action": "orders:write", "amount_usd": 9000.5, "venue": "XLON"}
        )
        assert allowed["allowed"] is True
        assert allowed["certificate_serial"] == agent.serial
        denied = await tools(
            "verify_agent_scope", {"action": "orders:write", "amount_usd": 10_000.01, "venue": "XNYS"}
        )
        assert denied["allowed"] is False
        assert denied["code"] == "KA005"
        assert "10000" in denied["reason"]
        assert "XNYS" in denied["reason"]
        assert (await tools("verify_agent_scope", {"action": "launch:missiles"}))["allowed"] is False

        risk = await tools("check_risk_score")
        assert (risk["band"], risk["recommendation"]) == ("low", "Proceed.")

        metadata = {"action": "orders:write", "amountUsd": 9000, "venue": "XLON", "note": "Ünïcode ☃"}
        entry = await tools("audit_log_append", {"event_type": "transaction_initiated", "metadata": metadata})
        assert entry["band"] == "medium"
        assert isinstance(entry["event_id"], int)
        assert events(agent) == [("transaction_initiated", metadata)]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("verify_agent_scope", {}),
    ("verify_agent_scope", {"action": "orders:write", "agent_id": "another"}),
    ("verify_agent_scope", {"action": "orders:write", "serial": "AA:BB"}),
    ("verify_agent_scope", {"action": "orders:write", "amount_usd": "many"}),
    ("verify_agent_scope", {"action": "orders:write", "amount_usd": True}),
    ("verify_agent_scope", {"action": ["orders:write"]}),
    ("verify_agent_scope", {"action": "nul \0"}),
    ("check_risk_score", {"agent_id": "another"}),
    ("audit_log_append", {"event_type": "certificate.revoked"}),
    ("audit_log_append", {"event_type": "api_call", "metadata": "text"}),
    ("audit_log_append", {"event_type": "api_call", "metadata": {"nul": "\0"}}),
    ("audit_log_append", {"event_type": "api_call", "metadata": {"long": "x" * 20_000}}),
    ("audit_log_append", {"event_type": "api_call", "occurred_at": "2020-01-01"}),
    ("audit_log_append", {"event_type": "api_call", "agent_id": "another"}),
    ("query", {"sql": "select 1"}),
    ("no_such_tool", {}),
]


async def test_arguments_are_refused(agent: Agent, tmp_path: Path) -> None:
    async with serving(environment(agent, tmp_path, "agent_1")) as tools:
        for tool, arguments in REFUSED:
            refused = await tools.refused(tool, arguments)
            assert refused["code"] in {"KA010", "22P05"}, (tool, arguments)
            assert refused.get("allowed") is (False if tool == "verify_agent_scope" else None)
    assert events(agent) == []


async def test_a_revocation_reaches_the_next_call(agent: Agent, tmp_path: Path) -> None:
    async with serving(environment(agent, tmp_path, "agent_1")) as tools:
        assert (await tools("verify_agent_scope", {"action": "orders:write"}))["allowed"] is True
        agent.revoke()
        answer = await tools("verify_agent_scope", {"action": "orders:write"})
        assert (answer["allowed"], answer["code"]) == (False, "KA002")
        assert "revoked" in answer["reason"]
        for tool, arguments in (("check_risk_score", {}), ("audit_log_append", {"event_type": "api_call"})):
            refused = await tools.refused(tool, arguments)
            assert refused["code"] == "KA002"
        assert events(agent) == []


async def test_a_suspension_holds_until_it_is_lifted(agent: Agent, tmp_path: Path) -> None:
    async with serving(environment(agent, tmp_path, "agent_1")) as tools:
        agent.suspend()
        answer = await tools("verify_agent_scope", {"action": "orders:write"})
        assert (answer["allowed"], answer["code"]) == (False, "KA008")
        agent.database.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
        assert (await tools("verify_agent_scope", {"action": "orders:write"}))["allowed"] is True


async def test_the_server_comes_back_with_the_database(cluster: Cluster, tmp_path: Path) -> None:
    """Down, nothing is allowed and nothing is said to be recorded; up again, the same process serves."""
    with fresh_database(cluster) as database:
        agent = database.agent("atlas", permitted_actions=["orders:write"])
        async with serving(environment(agent, tmp_path, "agent_1")) as tools:
            assert (await tools("verify_agent_scope", {"action": "orders:write"}))["allowed"] is True
            await asyncio.to_thread(crash, cluster)
            try:
                refused = await tools.refused("verify_agent_scope", {"action": "orders:write"})
                assert refused["allowed"] is False
                assert refused["code"] == "unavailable"
                assert refused["reason"]
                assert (await tools.refused("check_risk_score"))["code"] == "unavailable"
                appended = await tools.refused("audit_log_append", {"event_type": "api_call"})
                assert appended["code"] == "unavailable"
            finally:
                await asyncio.to_thread(cluster.start)
            assert (await tools("verify_agent_scope", {"action": "orders:write"}))["allowed"] is True
            await tools("audit_log_append", {"event_type": "api_call"})
            assert [kind for kind, _ in events(agent)] == ["api_call"]


async def test_a_slow_database_is_past_its_deadline(agent: Agent, tmp_path: Path) -> None:
    """Somebody holds what the call needs: it ends, and nothing was allowed."""
    async with serving(environment(agent, tmp_path, "agent_1")) as tools:
        with agent.database.connect("postgres") as admin:
            admin.execute("lock table kakunin_private.certificates in access exclusive mode")
            began = time.monotonic()
            refused = await tools.refused("verify_agent_scope", {"action": "orders:write"})
            assert time.monotonic() - began < 15
            assert refused["allowed"] is False
            assert refused["code"] in {"unavailable", "55P03", "57014"}
        assert (await tools("verify_agent_scope", {"action": "orders:write"}))["allowed"] is True


async def test_a_server_killed_in_a_call_has_recorded_nothing(agent: Agent, tmp_path: Path) -> None:
    variables = environment(agent, tmp_path, "agent_1", KAKUNIN_TEST="killed")
    with agent.database.connect("postgres") as admin:
        with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever the client makes of a lost server)
            async with serving(variables) as tools:
                admin.execute("lock table kakunin_private.chains in access exclusive mode")
                call = asyncio.ensure_future(
                    tools.client.call_tool("audit_log_append", {"event_type": "api_call"})
                )
                await asyncio.to_thread(waiting, agent.database)
                os.kill(server_with("KAKUNIN_TEST=killed"), signal.SIGKILL)
                await asyncio.wait_for(call, 10)
        assert not isinstance(caught.value, (AssertionError, TimeoutError))
    assert events(agent) == []


def crash(cluster: Cluster) -> None:
    # A sequence of a database copied from a template goes back in a crash before its first checkpoint.
    with cluster.connect(autocommit=True) as admin:
        admin.execute("checkpoint")
    cluster.stop("immediate")


def waiting(database: Database) -> None:
    """Returns when a backend waits for a lock."""
    query = "select count(*) from pg_stat_activity where datname = %s and wait_event_type = 'Lock'"
    with database.connect("postgres", autocommit=True) as admin:
        for _ in range(100):
            if admin.execute(query, [database.name]).fetchone() != (0,):
                return
            time.sleep(0.05)
    raise AssertionError("nobody waits")


def server_with(variable: str, argument: str = "mcp") -> int:
    """The process that was started with this in its environment and this argument."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found = variable.encode() in (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if found and argument.encode() in command and b"node" not in command[0]:
            return int(entry.name)
    raise AssertionError("no such process")


# As it starts -----------------------------------------------------------------------------------------


def start(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "mcp", *arguments],
        env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_what_is_wrong_is_said_at_once_and_without_secrets(
    agent: Agent, database: Database, tmp_path: Path
) -> None:
    good = environment(agent, tmp_path, "agent_1")
    other = database.agent("other")
    gone = database.agent("gone")
    gone.revoke()
    its_key = environment(gone, tmp_path, "agent_1")["KAKUNIN_SIGNER"]
    for changed, said in (
        ({"KAKUNIN_CERT_SERIAL": ""}, "KAKUNIN_CERT_SERIAL"),
        ({"KAKUNIN_SIGNER": ""}, "KAKUNIN_SIGNER"),
        ({"KAKUNIN_DSN": ""}, "KAKUNIN_DSN"),
        ({"KAKUNIN_CERT_SERIAL": "not a serial"}, "KA010"),
        ({"KAKUNIN_CERT_SERIAL": "AA:BB"}, "KA001"),
        ({"KAKUNIN_CERT_SERIAL": other.serial}, "KA004"),  # another's key
        ({"KAKUNIN_CERT_SERIAL": gone.serial, "KAKUNIN_SIGNER": its_key}, "KA002"),
        ({"KAKUNIN_KEY_PASSWORD": "wrong horse"}, "password"),
        ({"KAKUNIN_INSTALLATION_ID": "00000000-0000-4000-8000-000000000000"}, "KA004"),
        ({"KAKUNIN_DSN": database.dsn("stranger")}, "kakunin_agent"),
        ({"KAKUNIN_DSN": "host=127.0.0.1 port=1 dbname=x user=u password=s3cret"}, "refused"),
    ):  # fmt: skip
        done = start({**good, **changed})
        assert done.returncode in (1, 2)
        assert said in done.stderr, (changed, done.stderr)
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert "s3cret" not in done.stderr
        assert PASSWORD not in done.stderr
    done = start(good)  # stdin is at its end
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
