"""`kakunin-db serve` as a process, with keys in a folder, and the example of the published SDK on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from cluster import Cluster, free_port
from conftest import fresh_database
from test_examples import run

from kakunin_db.resources import install_sql

pytest.importorskip("kakunin", reason="the SDK is not installed")
from api import SCOPES, login


def test_the_sdk_on_a_server_of_ones_own(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_database(cluster, "template1") as database:
        with database.connect("installer") as installer:
            installer.execute(install_sql())
        run(tmp_path, "register_agent.py", database.dsn("installer"), "atlas")  # and an authority
        command = [sys.executable, "-m", "kakunin_db.cli", "serve"]
        environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "correct horse"}
        scopes = ",".join(scope for scope in SCOPES if scope != "events:read")
        made = subprocess.run(
            [*command, "keys", "create", "example", "--scopes", scopes, "--json"],
            env={**environment, "KAKUNIN_DSN": database.dsn("operator")},
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        key = json.loads(made.stdout)["key"]
        port = free_port()
        options = ["--keys", "file:keys", "--permits", "trade.execute", "--listen", f"127.0.0.1:{port}"]
        with (tmp_path / "log").open("w") as log:
            server = subprocess.Popen(
                [*command, "--dsn", login(database, "api"), *options],
                env=environment, cwd=tmp_path, stdout=log, stderr=log,
            )  # fmt: skip
        try:
            until = time.monotonic() + 30
            while time.monotonic() < until:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/healthz").raise_for_status()
                except httpx.TransportError:
                    time.sleep(0.1)
                else:
                    break
            monkeypatch.setenv("KAKUNIN_API_KEY", key)
            printed = run(tmp_path, "sdk_agent.py", f"http://127.0.0.1:{port}/v1")
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) in (0, -signal.SIGTERM)
        for line in (
            "traded 4000: event ", "chain of 2 events, verified True", "message valid True", "signed True",
            "refused: Agent ", "2 events in 7 days; risk low",
        ):  # fmt: skip
            assert line in printed
        written = (tmp_path / "log").read_text()
        assert key[-43:] not in written
        lines = [json.loads(line) for line in written.splitlines()]
        assert lines[0]["message"] == f"listening on http://127.0.0.1:{port}"
        assert "POST /v1/agents/{agent_id}/halt 200" in {line["message"] for line in lines}
        used = database.value("operator", "select last_used_at from kakunin.api_keys")
        assert used is not None
