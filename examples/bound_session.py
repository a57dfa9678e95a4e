"""Reads an agent's own rows of agent_vault (sql/policies/agent_vault.sql), sync and async.

    KAKUNIN_KEY_PASSWORD=... python examples/bound_session.py DSN NAME.pem INSTALLATION_ID

NAME.pem is what examples/register_agent.py wrote; DSN names a login with kakunin_agent; the last is what
`select kakunin.installation_id()` says there. KAKUNIN_KEYS as in register_agent.py.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from kakunin_db import AgentCredential, bind_agent_session


def with_psycopg(dsn: str, credential: AgentCredential) -> None:
    with psycopg.connect(dsn) as connection, bind_agent_session(connection, credential):
        connection.execute("insert into agent_vault (content) values ('written by psycopg')")
        connection.commit()
        # The next transaction is bound as well.
        print(connection.execute("select content from agent_vault").fetchall())


async def with_psycopg_async(dsn: str, credential: AgentCredential) -> None:
    async with (
        await psycopg.AsyncConnection.connect(dsn) as connection,
        bind_agent_session(connection, credential),
    ):
        cursor = await connection.execute("select content from agent_vault")
        print(await cursor.fetchall())


def with_sqlalchemy(dsn: str, credential: AgentCredential) -> None:
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    with bind_agent_session(sessionmaker(engine), credential) as session:
        print(session.scalars(text("select content from agent_vault")).all())
    engine.dispose()


def main(dsn: str, certificate: str, installation_id: str) -> None:
    keys = os.environ.get("KAKUNIN_KEYS", "file:keys")
    credential = AgentCredential.from_certificate(Path(certificate).read_bytes(), keys, installation_id)
    with_psycopg(dsn, credential)
    asyncio.run(with_psycopg_async(dsn, credential))
    with_sqlalchemy(dsn, credential)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
