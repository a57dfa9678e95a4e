"""The published SDK (pip install kakunin), unchanged, on a server of one's own.

    KAKUNIN_KEY_PASSWORD=... kakunin-db serve --dsn DSN --keys file:keys --permits trade.execute
    kakunin-db serve keys create example --dsn OPERATOR_DSN --scopes \\
      agents:read,agents:write,agents:certify,agents:sign,agents:halt,events:write,chains:read,chains:write,reports:write
    KAKUNIN_API_KEY=kak_live_... python examples/sdk_agent.py http://127.0.0.1:8400/v1

The server's login holds kakunin_gateway, kakunin_registrar, kakunin_operator and kakunin_auditor
(docs/api.md), OPERATOR_DSN's kakunin_operator. There has to be an authority: kakunin-db ca init.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys

from kakunin import Kakunin, ScopeViolationError, verify_agent_scope


async def main(base_url: str) -> None:
    async with Kakunin(api_key=os.environ["KAKUNIN_API_KEY"], base_url=base_url) as client:
        agent = await client.agents.create(
            name="TradeBot-1",
            model="gpt-4o",
            version="2024-11",
            model_hash=f"sha256:{hashlib.sha256(b'its configuration').hexdigest()}",
            financial_scope={"max_single_trade_usd": 10_000},
            metadata={"scopes": ["trade.execute"]},
        )
        certificate = await client.agents.certify(agent.id)
        print(f"certified {certificate.serial_number}")

        @verify_agent_scope(client, agent.id, required_scopes=["trade.execute"])
        async def trade(amount_usd: int) -> str:
            event = await client.events.create(
                agent_id=agent.id,
                action_type="transaction_initiated",
                chain_id=chain.chain_id,
                details={"amount_usd": amount_usd, "venue": "XLON"},
            )
            return f"traded {amount_usd}: event {event.id}, {event.risk_band.value}"

        chain = await client.chains.create(name="order 7")
        print(await trade(2_500))
        print(await trade(4_000))
        closed = await client.chains.close(chain.chain_id)
        verified = await client.verify.chain(chain.chain_id)
        print(f"chain of {closed.event_count} events, verified {verified.verified}")

        order = {"order": 7, "amount_usd": 6_500}
        signed = await client.agents.sign(agent.id, payload=order)
        message = await client.verify.message(
            agent_id=agent.id,
            payload=order,
            signature=signed.signature,
            certificate_serial=certificate.serial_number,
        )
        print(f"message valid {message.valid}")

        receipt = await client.agents.halt(agent.id, reason="Unusual volatility.")
        print(f"halted {receipt.halted_at}, signed {bool(receipt.signature)}")
        try:
            print(await trade(100))
        except ScopeViolationError as error:
            print(f"refused: {error}")
        report = await client.reports.create(agent_id=agent.id, window_days=7)
        print(f"report {report.id}: {report.summary}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(main(sys.argv[1]))
