"""The kill switch: halts an agent, and writes the signed receipt for openssl.

    KAKUNIN_KEY_PASSWORD=... python examples/halt_agent.py DSN AGENT_ID REASON

DSN names the owner of the kit, or a login with kakunin_operator. KAKUNIN_KEYS as in register_agent.py.
"""

from __future__ import annotations

import asyncio
import os
import sys

from kakunin_db import AsyncKakunin
from kakunin_db.client import write_receipt


async def main(dsn: str, agent_id: str, reason: str) -> None:
    async with AsyncKakunin(dsn, keys=os.environ.get("KAKUNIN_KEYS", "file:keys")) as kakunin:
        receipt = await kakunin.agents.halt(agent_id, reason)
    print(f"halted at {receipt.halted_at}, revoked:", *receipt.certificates_revoked)
    if receipt.signature is None:
        print(f"the halt stands; its signature is pending: {receipt.pending}")
    print("written:", *filter(None, write_receipt(receipt, ".")))


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
