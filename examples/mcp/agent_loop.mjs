// Check, execute, log: an agent's action between two MCP tools, with the official TypeScript SDK.
//
//     npm install @modelcontextprotocol/sdk
//     KAKUNIN_DSN=... KAKUNIN_CERT_SERIAL=... KAKUNIN_SIGNER=... node agent_loop.mjs orders:write 9000 XLON
//
// KAKUNIN_COMMAND is what starts the server, kakunin-db by default.

import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';

const [action, amount, venue] = process.argv.slice(2);
const amountUsd = Number(amount);

const transport = new StdioClientTransport({
  command: process.env.KAKUNIN_COMMAND ?? 'kakunin-db',
  args: ['mcp'],
  env: process.env,
});
const client = new Client({ name: 'mcp-secure-runner', version: '1.0.0' });
await client.connect(transport);

// An error's content has no allowed and no band, and so stops here as well.
async function call(name, args) {
  const result = await client.callTool({ name, arguments: args });
  return result.structuredContent;
}

try {
  const scope = await call('verify_agent_scope', { action, amount_usd: amountUsd, venue });
  if (scope.allowed !== true) throw new Error(`blocked: ${scope.reason}`);

  const risk = await call('check_risk_score', {});
  if (risk.band !== 'low' && risk.band !== 'medium') throw new Error(`stopped: ${risk.recommendation ?? risk.error}`);

  const transactionId = `tx-${Date.now()}`; // the action itself

  const entry = await call('audit_log_append', {
    event_type: 'transaction_initiated',
    metadata: { action, amountUsd, venue, transactionId },
  });
  if (entry.event_id === undefined) throw new Error(`not recorded: ${entry.error}`);
  console.log(`done, event ${entry.event_id}, band ${entry.band}`);
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
} finally {
  await client.close();
}
