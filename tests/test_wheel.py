"""The wheel, installed where there is no checkout, can do all that the checkout can."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from catalog import KIT, snapshot
from cluster import ROOT, Cluster

from kakunin_db.migrate import migrate_sql
from kakunin_db.resources import install_sql


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the environment that runs the tests may show the way to the checkout.
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "KAKUNIN_"))
    }
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, env=inherited | environment
    )  # fmt: skip


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@dataclass
class Installed:
    """An environment with the wheel, and an empty directory to work in."""

    bin: Path
    cwd: Path

    def python(self, code: str) -> str:
        done = run(self.bin / "python", "-c", code, cwd=self.cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cli(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.bin / "kakunin-db", *arguments, cwd=self.cwd, **environment)


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment)
    done = run(
        sys.executable, "-m", "pip", "--python", environment, "install", "--quiet",
        "--disable-pip-version-check", "-c", ROOT / "constraints.txt",
        f"kakunin-db[binary] @ {wheel.as_uri()}", cwd=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Installed(environment / "bin", tmp_path_factory.mktemp("empty"))


@pytest.fixture
def dsn(cluster: Cluster) -> Iterator[str]:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create database from_wheel template template0")
        admin.execute("grant create on database from_wheel to installer")
    yield cluster.dsn("from_wheel", "installer")
    with cluster.connect(autocommit=True) as admin:
        admin.execute("drop database from_wheel with (force)")


def test_wheel_carries_sql_and_migrations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = {name: archive.read(name) for name in archive.namelist()}
    for folder in ("sql", "migrations"):
        files = [
            path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert files
        for path in files:
            assert carried[f"kakunin_db/{path.relative_to(ROOT)}"] == path.read_bytes()
    assert "kakunin_db/py.typed" in carried
    foreign = [name for name in carried if name.partition("/")[0].partition("-")[0] != "kakunin_db"]
    assert foreign == []
    assert not [name for name in carried if "__pycache__" in name or name.startswith("kakunin_db/tests")]


def test_import_without_a_checkout(installed: Installed) -> None:
    out = installed.python(
        "import sys, kakunin_db, kakunin_db.resources as r; print(kakunin_db.__file__);"
        "print(r.sql_dir()); print(r.migrations_dir()); print(*sys.path, sep='\\n')"
    )
    package, sql, migrations, *path = out.splitlines()
    for place in (package, sql, migrations):
        assert Path(place).is_relative_to(installed.bin.parent)
    assert not [entry for entry in path if (installed.cwd / entry).resolve() == ROOT]
    assert installed.python(
        "import sys; from kakunin_db.resources import install_sql; sys.stdout.write(install_sql())"
    ) == install_sql()  # fmt: skip


def test_script_from_the_wheel_is_that_of_the_checkout(installed: Installed) -> None:
    done = installed.cli("migrate", "--sql")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == migrate_sql()
    assert list(installed.cwd.iterdir()) == []


def test_migrates_from_an_empty_directory(installed: Installed, dsn: str) -> None:
    done = installed.cli("migrate", "--dsn", dsn)
    assert (done.returncode, done.stdout, done.stderr) == (0, "from base to 0001\n", "")
    assert set(snapshot(dsn)["schemas"]) == set(KIT)
    again = installed.cli("migrate", KAKUNIN_DSN=dsn)
    assert (again.returncode, again.stdout) == (0, "already at 0001\n")
    down = installed.cli("downgrade", "--dsn", dsn)
    assert (down.returncode, down.stdout) == (0, "from 0001 to base\n")
    assert snapshot(dsn)["schemas"] == {}
    assert list(installed.cwd.iterdir()) == []


def test_missing_extra_is_named(installed: Installed) -> None:
    demo = installed.cli("demo")
    assert demo.returncode == 1
    assert demo.stderr.count("\n") == 1
    assert demo.stderr.endswith("Run: pip install 'kakunin-db[demo]'\n")


def test_version(installed: Installed, wheel: Path) -> None:
    assert installed.cli("--version").stdout.split() == ["kakunin-db", wheel.name.split("-")[1]]
