"""What an agent does with its rows, in Python.

SUPABASE_URL, SUPABASE_ANON_KEY and SUPABASE_JWT_SECRET are the project's, AGENT_SERIAL is the agent's
certificate. Needs kakunin-db with the extras binary and supabase.
"""

from __future__ import annotations

import asyncio
import os

from supabase import acreate_client, create_client

from kakunin_db import bind_agent_session

URL, ANON_KEY = os.environ["SUPABASE_URL"], os.environ["SUPABASE_ANON_KEY"]
SECRET, SERIAL = os.environ["SUPABASE_JWT_SECRET"], os.environ["AGENT_SERIAL"]


def with_client() -> None:
    supabase = create_client(URL, ANON_KEY)
    with bind_agent_session(supabase, SERIAL, jwt_secret=SECRET) as agent:
        agent.table("agent_vault").insert({"content": "written by Python"}).execute()
        rows = agent.table("agent_vault").select("content").order("id").execute().data
        print([row["content"] for row in rows])
        scope = agent.schema("kakunin").rpc("verify_agent_scope", {"action": "vault:read"}).execute().data
        print("vault:read is", "allowed" if scope["allowed"] else "not allowed")


async def with_async_client() -> None:
    supabase = await acreate_client(URL, ANON_KEY)
    async with bind_agent_session(supabase, SERIAL, jwt_secret=SECRET) as agent:
        await agent.table("agent_vault").insert({"content": "written by asyncio"}).execute()
        rows = (await agent.table("agent_vault").select("content").order("id").execute()).data
        print([row["content"] for row in rows])


if __name__ == "__main__":
    with_client()
    asyncio.run(with_async_client())
