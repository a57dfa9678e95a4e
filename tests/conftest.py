"""A real server of every major under test, a database with the kit for every module, and logins to be."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import itertools
import os
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import MAJORS, Cluster, binaries
from cryptography.hazmat.primitives import serialization
from postgrest_server import PostgREST, prepare, required

from kakunin_db import AgentCertificate, AgentCredential, CertificateAuthority, LocalSigner
from kakunin_db.resources import install_sql

# Logins of the cluster and the roles they hold. `installer` owns the kit and is not superuser;
# `app` owns the application's tables; agent_1 and agent_2 are agents' logins, `pooled` one they share.
LOGINS = {
    "app": ["kakunin_operator"],
    "agent_1": ["kakunin_agent"],
    "agent_2": ["kakunin_agent"],
    "pooled": ["kakunin_agent"],
    "gateway": ["kakunin_gateway"],
    "registrar": ["kakunin_registrar"],
    "operator": ["kakunin_operator"],
    "worker": ["kakunin_worker"],
    "auditor": ["kakunin_auditor"],
    "stranger": [],
}
# Logins that tests prepare and look with, and that attack nothing.
STAFF = {"app", "auditor", "installer", "operator", "registrar", "worker"}
# PostgREST's and Supabase's.
API_ROLES = ["anon", "authenticated"]

# Files of few tests that take long. Processes begin with these and go on with the files of the most tests, so
# that at the end none waits long for another.
FIRST = {
    "test_attack_halt", "test_audit_cli", "test_cache", "test_cli", "test_crash", "test_demo",
    "test_examples", "test_failover", "test_install", "test_ledger_tamper", "test_mcp", "test_mcp_sql",
    "test_mcp_ts", "test_pgbouncer", "test_postgrest", "test_recovery", "test_standby", "test_supabase",
    "test_supabase_js", "test_supabase_wire", "test_wheel", "test_worker",
}  # fmt: skip


# Where several majors are tested in one run, as by `make test`, the newest has everything and the others have
# these: what differs from one version to another before anything else does. `make test-all` has everything on
# each.
EVERYWHERE = {"test_catalog", "test_install", "test_mcp_wire"}


@pytest.hookimpl(optionalhook=True)  # where xdist is not installed
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: much of what is tested waits for something."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)  # the tests of a file and major stay together, as pytest's fixtures have them
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("cluster", MAJORS[-1]) != MAJORS[-1]
        and item.path.stem not in EVERYWHERE
    ]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        left_out = set(elsewhere)
        items[:] = [item for item in items if item not in left_out]
    if hasattr(config, "workerinput"):  # with --dist loadfile --no-loadscope-reorder
        size = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.stem not in FIRST, -size[item.path], item.path))


def start_cluster(major: int, bindir: Path | None = None, **settings: str) -> Cluster:
    bindir = bindir or binaries(major)
    if bindir is None:
        pytest.skip(f"no Postgres {major} on this machine: make postgres, or set KAKUNIN_PG{major}_BIN")
    cluster = Cluster(major, bindir, settings={"max_prepared_transactions": "20", **settings})
    cluster.init()
    cluster.start()
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create role installer login createrole nosuperuser nobypassrls")
        admin.execute("create database kit_template")
        admin.execute("grant create on database kit_template to installer")
    with cluster.connect("kit_template", "installer") as installer:
        installer.execute(install_sql())
        _ca().trust(installer)
    for template in ("kit_template", "template1"):
        with cluster.connect(template, autocommit=True) as admin:
            admin.execute("grant create on schema public to public")
    with cluster.connect(autocommit=True) as admin:
        for login, roles in LOGINS.items():
            admin.execute(f"create role {login} login")
            for role in roles:
                admin.execute(f"grant {role} to {login}")
        admin.execute("create role authenticator login noinherit")
        for role in API_ROLES:
            admin.execute(f"create role {role} nologin")
            admin.execute(f"grant {role} to authenticator")
    return cluster


@pytest.fixture(scope="session")
def clusters() -> Iterator[dict[int, Cluster]]:
    """By major. A parametrised fixture ends when the next parameter's turn comes, and with `--dist loadfile`
    that is twice a file: what took a server with the kit seconds to become stays here."""
    started: dict[int, Cluster] = {}
    yield started
    for cluster in started.values():
        cluster.destroy()


@pytest.fixture(scope="session", params=MAJORS, ids=lambda m: f"pg{m}")
def cluster(request: pytest.FixtureRequest, clusters: dict[int, Cluster]) -> Cluster:
    if request.param not in clusters:
        clusters[request.param] = start_cluster(request.param)
    return clusters[request.param]


_names = itertools.count(1)


@contextlib.contextmanager
def refused(*states: str, match: str | None = None) -> Iterator[None]:
    """The statement fails with one of these SQLSTATEs."""
    with pytest.raises(psycopg.Error, match=match) as caught:
        yield
    assert caught.value.sqlstate in states, caught.value


def one(connection: psycopg.Connection[Any], query: Any, params: Any = None) -> Any:
    """The first column of the first row, which has to be there."""
    row = connection.execute(query, params).fetchone()
    assert row
    return row[0]


@dataclass
class Database:
    """A database with the kit installed by `installer`. Everybody may create in its schema public."""

    cluster: Cluster
    name: str

    def dsn(self, user: str) -> str:
        return self.cluster.dsn(self.name, user)

    def url(self, user: str, driver: str = "postgresql+psycopg") -> str:
        return self.cluster.url(self.name, user, driver)

    def connect(self, user: str, **kwargs: Any) -> psycopg.Connection[Any]:
        return self.cluster.connect(self.name, user, **kwargs)

    def run(self, user: str, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        """One statement in its own transaction, as this login, in its own session if not staff."""
        with self._session(user) as connection:
            cursor = connection.execute(query, params)
            return cursor.fetchall() if cursor.description else []

    def _session(self, user: str) -> contextlib.AbstractContextManager[psycopg.Connection[Any]]:
        if user in STAFF:
            return self.cluster.session(self.name, user)
        return self.connect(user, autocommit=True)

    def value(self, user: str, query: str, params: Any = None) -> Any:
        return self.run(user, query, params)[0][0]

    def make_clock_movable(self) -> None:
        """For :meth:`move_clock`. What is ahead stands in a table: a running transaction sees the new row,
        where it may keep its plan of a function that was replaced."""
        with self.connect("installer") as owner:
            owner.execute("create table kakunin_private.shift as select interval '0' as ahead")
            owner.execute(
                "create or replace function kakunin_private.clock() returns timestamptz language sql volatile"
                " parallel safe as 'select clock_timestamp() + ahead from kakunin_private.shift'"
            )

    def move_clock(self, ahead: Any) -> None:
        """Has the kit's time be this interval ahead of the server's."""
        self.run("installer", "update kakunin_private.shift set ahead = %s::interval", [ahead])

    @property
    def installation_id(self) -> uuid.UUID:
        return self.value("installer", "select kakunin.installation_id()")

    def agent(self, name: str = "agent", *, signer: LocalSigner | None = None, **certificate: Any) -> Agent:
        """A new agent with a registered certificate; keyword arguments go to CertificateAuthority.issue()."""
        agent_id = self.value("registrar", "select kakunin.create_agent(%s)", [name])
        signer = signer or next(_signers())
        issued = _ca().issue(agent_id, signer.public_key(), **certificate)
        self.register(issued)
        return Agent(self, issued, signer)

    def renew(self, agent: Agent, overlap: dt.timedelta = dt.timedelta(hours=1), **certificate: Any) -> Agent:
        """The same agent with a new key and certificate, registered with this overlap."""
        signer = next(_signers())
        issued = _ca().issue(agent.agent_id, signer.public_key(), **certificate)
        with self._session("registrar") as connection:
            issued.register(connection, overlap)
        return Agent(self, issued, signer)

    def register(self, issued: AgentCertificate) -> None:
        with self._session("registrar") as connection:
            issued.register(connection)

    def ticket(self, agent: Agent, user: str) -> str:
        return self.value(user, "select kakunin.open_session(%s)", [agent.assertion()])

    def ledger_key(self, **certificate: Any) -> LedgerKey:
        """A new key for tree heads, registered; keyword arguments go to issue_ledger_key()."""
        signer = LocalSigner.generate()
        issued = _ca().issue_ledger_key(self.installation_id, signer.public_key(), **certificate)
        der = issued.public_bytes(serialization.Encoding.DER)
        key_id = self.value("operator", "select kakunin.register_ledger_key(%s)", [der])
        return LedgerKey(self, key_id, der, signer)

    def seal(self, max_entries: int = 100_000) -> int:
        """Seals until there is nothing more to seal; returns the tree's size."""
        with self._session("worker") as worker:
            while True:
                row = worker.execute("select kakunin.seal_ledger(%s)", [max_entries]).fetchone()
                assert row
                if not row[0]["more"]:
                    return row[0]["tree_size"]

    def seal_and_sign(self, key: LedgerKey) -> tuple[int, bytes]:
        """Seals what is committed and signs the tree, unless all of it is signed; returns size and root."""
        size = self.seal()
        row = next(iter(self.run("worker", "select * from kakunin.tree_head_to_sign()")), None)
        if row is not None:
            key.publish(row[0], row[1], row[2])
            assert row[0] == size
        heads = "select tree_size, root from kakunin.tree_heads order by tree_size desc limit 1"
        return self.run("worker", heads)[0]


@dataclass
class Agent:
    database: Database
    issued: AgentCertificate
    signer: LocalSigner

    @property
    def agent_id(self) -> uuid.UUID:
        return self.issued.agent_id

    @property
    def serial(self) -> str:
        return self.issued.serial

    @property
    def modulus(self) -> bytes:
        """Big-endian."""
        return self.signer.public_key().public_numbers().n.to_bytes(256, "big")

    @property
    def credential(self) -> AgentCredential:
        return AgentCredential(self.agent_id, self.serial, self.signer)

    def assertion(self, lifetime: int = 60) -> str:
        return self.credential.assertion(self.database.installation_id, lifetime)

    def revoke(self) -> None:
        self.database.run("operator", "select kakunin.revoke_certificate(%s)", [self.serial])

    def suspend(self) -> None:
        self.database.run("operator", "select kakunin.suspend_agent(%s, 'under review')", [self.agent_id])


@dataclass
class LedgerKey:
    """A key that signs tree heads, and its certificate."""

    database: Database
    key_id: str
    der: bytes
    signer: LocalSigner

    def sign(self, size: int, timestamp: int, root: bytes) -> bytes:
        """RFC 6962 section 3.5."""
        head = b"\0\1" + timestamp.to_bytes(8, "big") + size.to_bytes(8, "big") + root
        return self.signer.sign(hashlib.sha256(head).digest())

    def publish(self, size: int, timestamp: int, root: bytes, user: str = "worker") -> None:
        signature = self.sign(size, timestamp, root)
        publish = "select kakunin.publish_tree_head(%s, %s, %s, %s)"
        self.database.run(user, publish, [size, timestamp, self.key_id, signature])


@functools.cache
def _signers() -> Iterator[LocalSigner]:
    """RSA keys are slow to make, and tests need distinct ones only among neighbours.

    None of these may be revoked as compromised: no certificate for it is registered any more.
    """
    return itertools.cycle([LocalSigner.generate() for _ in range(6)])


@functools.cache
def _ca() -> CertificateAuthority:
    """The root that every database trusts."""
    return CertificateAuthority.create(LocalSigner.generate(), "Test CA")


@dataclass
class OneKey:
    """A key store that has the ledger's key and no other. ``error`` is what signing raises, if anything."""

    key: LedgerKey
    error: Exception | None = None
    signatures: int = 0

    def open(self, public_key: Any) -> OneKey:
        return self

    @property
    def key_id(self) -> str:
        return self.key.key_id

    def public_key(self) -> Any:
        return self.key.signer.public_key()

    def sign(self, digest: bytes) -> bytes:
        if self.error is not None:
            raise self.error
        self.signatures += 1
        return self.key.signer.sign(digest)


@contextlib.contextmanager
def fresh_database(cluster: Cluster, template: str = "kit_template") -> Iterator[Database]:
    name = f"db_{next(_names)}"
    cluster.release(template)
    with cluster.session("postgres", "postgres") as admin:
        # Half the work of going through the log.
        admin.execute(f"create database {name} template {template} strategy file_copy")
    try:
        with cluster.session("postgres", "postgres") as admin:
            admin.execute(f"grant create on database {name} to installer")
        yield Database(cluster, name)
    finally:
        cluster.release(name)
        with cluster.session("postgres", "postgres") as admin:
            admin.execute(f"drop database {name} with (force)")


@pytest.fixture(scope="module")
def database(cluster: Cluster) -> Iterator[Database]:
    with fresh_database(cluster) as database:
        yield database


@pytest.fixture(scope="module")
def postgrest(database: Database) -> Iterator[PostgREST]:
    """Over the module's database, with kakunin.pre_request() before every request."""
    required()
    prepare(database)
    with PostgREST(database.cluster, database.name) as running:
        yield running


@dataclass
class Vault:
    """A protected table `vault` owned by app: two rows each of `one` and `two`, one row of nobody."""

    database: Database
    one: Agent
    two: Agent


@pytest.fixture
def vault(database: Database) -> Iterator[Vault]:
    one = database.agent("one", permitted_actions=["vault:read", "orders:*"])
    two = database.agent("two", permitted_actions=["vault:read"])
    with database.cluster.session(database.name, "app") as app:
        app.execute(
            "create table vault (id int generated always as identity primary key,"
            " permitted_agent_serial text, content text)"
        )
        app.execute("create index on vault (permitted_agent_serial)")
        app.execute(
            "insert into vault (permitted_agent_serial, content) values"
            " (%(one)s, 'one-a'), (%(one)s, 'one-b'),"
            " (%(two)s, 'two-a'), (%(two)s, 'two-b'), (null, 'nobody')",
            {"one": one.serial, "two": two.serial},
        )
        app.execute("select kakunin.protect('vault')")
        app.execute("grant all on vault to kakunin_agent, kakunin_gateway")
        app.execute("revoke truncate, trigger, references on vault from kakunin_agent, kakunin_gateway")
    yield Vault(database, one, two)
    database.run("app", "drop table vault cascade")
