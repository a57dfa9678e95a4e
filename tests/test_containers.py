"""The official Postgres images, where a Docker engine runs: install as a plain login, bind, isolate."""

from __future__ import annotations

import shutil
import subprocess

import psycopg
import pytest
from testcontainers.community.postgres import PostgresContainer

from kakunin_db import AgentCredential, CertificateAuthority, LocalSigner, bind_agent_session
from kakunin_db.migrate import downgrade, migrate


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    # Asked through its command: the library leaves a socket open where nobody answers.
    answers = shutil.which("docker") and not subprocess.call(
        ["docker", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    if not answers:
        pytest.skip("no Docker engine on this machine")


@pytest.mark.parametrize("major", [15, 16, 17, 18])
def test_the_official_image_installs_binds_and_uninstalls(major: int) -> None:
    with PostgresContainer(f"postgres:{major}-alpine", driver=None) as server:
        address = {"host": server.get_container_host_ip(), "port": server.get_exposed_port(5432)}
        admin_dsn = server.get_connection_url()
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute("create role installer login createrole password 'installer'")
            admin.execute(f"grant create on database {server.dbname} to installer")
            admin.execute("create role agent login password 'agent'")
        dsn = psycopg.conninfo.make_conninfo(
            **address, dbname=server.dbname, user="installer", password="installer"
        )
        migrate(dsn)
        signer = LocalSigner.generate()
        authority = CertificateAuthority.create(LocalSigner.generate())
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute("grant kakunin_agent to agent")
            authority.trust(admin)
            (agent_id,) = admin.execute("select kakunin.create_agent('agent')").fetchone()
            issued = authority.issue(agent_id, signer.public_key())
            issued.register(admin)
            admin.execute("create table vault (permitted_agent_serial text)")
            admin.execute("insert into vault values (%s), ('AA:BB')", [issued.serial])
            admin.execute("select kakunin.protect('vault')")
            admin.execute("grant select on vault to kakunin_agent")
        credential = AgentCredential(agent_id, issued.serial, signer)
        agent = psycopg.connect(**address, dbname=server.dbname, user="agent", password="agent")
        with agent, bind_agent_session(agent, credential):
            assert agent.execute("select * from vault").fetchall() == [(issued.serial,)]
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute("select kakunin.unprotect('vault')")
        downgrade(dsn, "base")
