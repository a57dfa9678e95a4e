"""A FastAPI application that serves certified agents their rows of agent_vault.

    GATEWAY_DSN="host=db dbname=app user=gateway" PUBLIC_URL=http://127.0.0.1:8000 \
        uvicorn --app-dir examples/gateway server:app

The DSN names a login with kakunin_gateway, and the table is that of sql/policies/agent_vault.sql. Agents sign
their requests (agent.py), because a serial is no proof. Needs fastapi, uvicorn and kakunin-db with the extras
binary, http and pool.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from psycopg_pool import AsyncConnectionPool

from kakunin_db import bind_agent_session
from kakunin_db.middleware.asgi import KakuninMiddleware

pool = AsyncConnectionPool(os.environ["GATEWAY_DSN"], open=False)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with pool:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(
    KakuninMiddleware,
    gateway=os.environ["GATEWAY_DSN"],
    proof="signature",
    public_url=os.environ["PUBLIC_URL"],
    scopes={"GET /vault": "vault:read", "POST /vault": "vault:write"},
    public=["/healthz"],
)


@app.get("/healthz")
async def healthz() -> str:
    return "ok"


@app.get("/vault")
async def read(request: Request) -> list[str]:
    async with bind_agent_session(pool, request.state.kakunin) as connection:
        cursor = await connection.execute("select content from agent_vault order by content")
        return [content for (content,) in await cursor.fetchall()]


@app.post("/vault")
async def write(request: Request, note: dict[str, Any]) -> str:
    async with bind_agent_session(pool, request.state.kakunin) as connection:
        await connection.execute("insert into agent_vault (content) values (%s)", [note["content"]])
    return "written"
