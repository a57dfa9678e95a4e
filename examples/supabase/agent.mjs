// What an agent does with its rows, in JavaScript: SUPABASE_URL, SUPABASE_ANON_KEY and SUPABASE_JWT_SECRET are
// the project's, AGENT_SERIAL is the agent's certificate.

import { createClient } from "@supabase/supabase-js";
import { bindAgentSession, hs256 } from "./kakunin.mjs";

globalThis.WebSocket ??= (await import("ws")).default; // supabase-js wants one, and Node 20 has none

const { SUPABASE_URL, SUPABASE_ANON_KEY, SUPABASE_JWT_SECRET, AGENT_SERIAL } = process.env;

const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY);
const agent = await bindAgentSession(supabase, AGENT_SERIAL, { key: hs256(SUPABASE_JWT_SECRET) });

const answered = ({ data, error }) => {
  if (error) throw new Error(`${error.code}: ${error.message}`);
  return data;
};

answered(await agent.from("agent_vault").insert({ content: "written by JavaScript" }));
console.log(answered(await agent.from("agent_vault").select("content").order("id")).map((row) => row.content));
const scope = answered(await agent.schema("kakunin").rpc("verify_agent_scope", { action: "vault:read" }));
console.log("vault:read is", scope.allowed ? "allowed" : "not allowed");
