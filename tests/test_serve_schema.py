"""schemathesis against the OpenAPI document of `kakunin-db serve`: what it makes up is answered as the
document says, and never with a 5xx."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api import Server, api_key, served
from conftest import Database

pytest.importorskip("schemathesis", reason="schemathesis is not installed")

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,ignored_auth,unsupported_method"
)
# Examples of each operation. `make fuzz` takes more, and also has ids made up.
EXAMPLES = os.environ.get("KAKUNIN_FUZZ_EXAMPLES")


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Server]:
    with served(database) as server:
        yield server


def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    agent = server.database.agent("atlas", permitted_actions=["orders:*"])
    key = api_key(server.database)
    headers = {"Authorization": f"Bearer {key.text}"}
    chain = httpx.post(f"{server.url}/v1/chains", json={"name": "x"}, headers=headers).json()["data"]
    report = httpx.post(
        f"{server.url}/v1/reports/compliance", json={"agentId": str(agent.agent_id)}, headers=headers
    ).json()["data"]
    # What there is, so that more than 404 is seen.
    (tmp_path / "schemathesis.toml").write_text(
        "[parameters]\n"
        f'"path.agent_id" = "{agent.agent_id}"\n'
        f'"path.chain_id" = "{chain["chain_id"]}"\n'
        f'"path.report_id" = "{report["id"]}"\n'
        f'"path.serial" = "{agent.serial}"\n'
    )
    for configured in (True, False) if EXAMPLES else (True,):
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli",
                *(["--config-file", tmp_path / "schemathesis.toml"] if configured else []),
                "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--max-examples", EXAMPLES or "6",
                "--phases", "examples,coverage,fuzzing", "--seed", "7", "--generation-database", "none",
                "--no-color", "--warnings", "off", "-H", f"Authorization: Bearer {key.text}",
            ],
            check=False, capture_output=True, text=True, cwd=tmp_path, timeout=3600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    with server.client(key) as client:
        assert client.get("/v1/agents").status_code == 200
