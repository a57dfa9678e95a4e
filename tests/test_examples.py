"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import Database

from kakunin_db.resources import sql_dir

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_an_agent_is_registered_and_reads_its_rows(database: Database, tmp_path: Path) -> None:
    def run(example: str, *arguments: str) -> str:
        command = [sys.executable, EXAMPLES / example, *arguments]
        environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "correct horse"}
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    database.run("app", (sql_dir() / "policies" / "agent_vault.sql").read_text())
    printed = run("register_agent.py", database.dsn("registrar"), "atlas", "vault:read")
    values = dict(line.split() for line in printed.splitlines())
    assert database.value("registrar", "select kakunin.installation_id()::text") == values["installation_id"]
    out = run(
        "bound_session.py", database.dsn("agent_1"), values["agent_id"], values["serial"],
        values["installation_id"], str(tmp_path / "atlas.pem"),
    )  # fmt: skip
    assert out.count("written by psycopg") == 3
    assert (tmp_path / "atlas.pem").stat().st_mode & 0o777 == 0o600
