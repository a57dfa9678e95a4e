// The official TypeScript SDK's client, driven by lines of JSON: [tool, arguments] in, the result out.
import { createInterface } from 'node:readline';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';

const [command, ...args] = process.argv.slice(2);
const client = new Client({ name: 'driver', version: '1.0.0' });
await client.connect(new StdioClientTransport({ command, args, env: process.env }));
console.log(JSON.stringify((await client.listTools()).tools));
for await (const line of createInterface({ input: process.stdin })) {
  const [name, given] = JSON.parse(line);
  let answer;
  try {
    answer = await client.callTool({ name, arguments: given });
  } catch (error) {
    answer = { lost: error.message };
  }
  console.log(JSON.stringify(answer));
}
await client.close();
