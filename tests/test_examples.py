"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from cluster import Cluster
from conftest import fresh_database

from kakunin_db.resources import install_sql, sql_dir

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(folder: Path, example: str, *arguments: str) -> str:
    command = [sys.executable, EXAMPLES / example, *arguments]
    environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "correct horse"}
    done = subprocess.run(command, env=environment, cwd=folder, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_agent_is_registered_reads_its_rows_and_is_halted(cluster: Cluster, tmp_path: Path) -> None:
    with fresh_database(cluster, "template1") as database:
        with database.connect("installer") as installer:
            installer.execute(install_sql())
        database.run("app", (sql_dir() / "policies" / "agent_vault.sql").read_text())
        owner = database.dsn("installer")
        printed = run(tmp_path, "register_agent.py", owner, "atlas", "vault:read")
        values = dict(line.split(maxsplit=1) for line in printed.splitlines())
        keys = list((tmp_path / "keys").iterdir())
        assert len(keys) == 3  # the two authorities' and the agent's
        assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}

        out = run(
            tmp_path, "bound_session.py", database.dsn("agent_1"), "atlas.pem", str(database.installation_id)
        )
        assert out.count("written by psycopg") == 3

        out = run(
            tmp_path,
            "guarded_function.py",
            database.dsn("agent_1"),
            "atlas.pem",
            str(database.installation_id),
        )
        assert "read the vault: event" in out
        assert "refused: the certificate does not permit 'vault:erase'" in out
        assert "erased" not in out
        assert "Proceed." in out

        out = run(tmp_path, "halt_agent.py", owner, values["agent_id"], "odd trades")
        assert values["serial"] in out
        (receipt,), (signature,) = tmp_path.glob("*.json"), tmp_path.glob("*.sig")
        der = database.value("installer", "select der from kakunin.authorities where key_id <> issuer_key_id")
        command = ["openssl", "x509", "-inform", "DER", "-noout", "-pubkey"]
        public = subprocess.run(command, input=der, check=True, capture_output=True).stdout
        (tmp_path / "ca.pub").write_bytes(public)
        checked = subprocess.run(
            ["openssl", "dgst", "-sha256", "-verify", tmp_path / "ca.pub", "-signature", signature, receipt],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert checked.stdout == "Verified OK\n"
