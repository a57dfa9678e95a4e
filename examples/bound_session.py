"""Reads an agent's own rows of agent_vault (sql/policies/agent_vault.sql), sync and async.

    KAKUNIN_KEY_PASSWORD=... python examples/bound_session.py DSN AGENT_ID SERIAL INSTALLATION_ID KEY.pem

The values are those examples/register_agent.py printed; DSN names a login with kakunin_agent.
"""

from __future__ import annotations

import asyncio
import os
import sys

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from kakunin_db import AgentCredential, LocalSigner, bind_agent_session


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


def main(dsn: str, agent_id: str, serial: str, installation_id: str, key: str) -> None:
    signer = LocalSigner.load(key, os.environ["KAKUNIN_KEY_PASSWORD"].encode())
    credential = AgentCredential(agent_id, serial, signer, installation_id)
    with_psycopg(dsn, credential)
    asyncio.run(with_psycopg_async(dsn, credential))
    with_sqlalchemy(dsn, credential)


if __name__ == "__main__":
    main(*sys.argv[1:])
