"""Both agents against the tests' PostgREST, with nothing to set up: make supabase-example

Starts a Postgres with Supabase's roles and a PostgREST, makes two agents, runs agent.py and agent.mjs as each
of them, revokes one and runs them again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))

from conftest import Agent, fresh_database, start_cluster  # noqa: E402
from postgrest_server import PostgREST, prepare  # noqa: E402

NODE = ["node", HERE / "agent.mjs"]
PYTHON = [sys.executable, HERE / "agent.py"]


def act(rest: PostgREST, name: str, agent: Agent) -> None:
    environment = {
        **os.environ,
        "SUPABASE_URL": rest.url,
        "SUPABASE_ANON_KEY": rest.anon_key,
        "SUPABASE_JWT_SECRET": rest.jwt_secret,
        "AGENT_SERIAL": agent.serial,
    }
    for command in (PYTHON, NODE):
        print(f"{name}, {Path(command[-1]).name}:", flush=True)
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)  # noqa: S603
        errors = [line for line in done.stderr.splitlines() if "Error: " in line]
        print(done.stdout if done.returncode == 0 else "\n".join(errors) or done.stderr, flush=True)


def main() -> None:
    cluster = start_cluster(int(os.environ.get("KAKUNIN_TEST_PG", "18").split(",")[-1]))
    try:
        with fresh_database(cluster) as database:
            prepare(database)
            with database.connect("app", autocommit=True) as app:
                app.execute((HERE / "schema.sql").read_bytes())
            with PostgREST(cluster, database.name) as rest:
                atlas = database.agent("atlas", permitted_actions=["vault:read"])
                hermes = database.agent("hermes")
                act(rest, "atlas", atlas)
                act(rest, "hermes", hermes)
                atlas.revoke()
                act(rest, "atlas, revoked", atlas)
    finally:
        cluster.destroy()


if __name__ == "__main__":
    main()
