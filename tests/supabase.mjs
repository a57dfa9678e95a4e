// Scenarios with the published supabase-js, bound as examples/supabase/kakunin.mjs binds it. The first argument
// names one; what it needs of the other side it says in a line on stdout, and waits for one on stdin.

import assert from "node:assert/strict";
import { createHmac } from "node:crypto";
import { createRequire } from "node:module";
import { createInterface } from "node:readline/promises";
import { setTimeout as sleep } from "node:timers/promises";

const example = new URL("../examples/supabase/", import.meta.url);
const require = createRequire(new URL("package.json", example));
globalThis.WebSocket ??= require("ws");
const { createClient } = require("@supabase/supabase-js");
const { KakuninError, bindAgentSession, hs256 } = await import(new URL("kakunin.mjs", example));

const { URL_, ANON, SERVICE, SECRET, SERIAL, OTHER, AGENT_ID } = process.env;
const supabase = createClient(URL_, ANON);
const key = hs256(SECRET);
const bind = (serial = SERIAL, options = {}) => bindAgentSession(supabase, serial, { key, ...options });

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();
const asked = async (what) => {
  console.log(what);
  await lines.next();
};
const contents = ({ data, error }) => {
  assert.equal(error, null);
  return data.map((row) => row.content).sort();
};
const refused = async (code, answer) => {
  const { data, error } = await answer;
  assert.equal(data, null);
  assert.equal(error.code, code);
  return error;
};

const scenarios = {
  async reading() {
    const agent = await bind();
    const orders = () => agent.from("orders");
    assert.deepEqual(contents(await orders().select("*")), ["one-a", "one-b"]);
    assert.deepEqual(contents(await orders().select("*").eq("permitted_agent_serial", OTHER)), []);
    const { count, data } = await orders().select("*", { count: "exact" }).limit(1);
    assert.deepEqual([count, data.length], [2, 1]);
    assert.equal((await orders().select("*", { count: "exact", head: true })).count, 2);
    const embedded = await orders().select("content, items(content)").order("id");
    assert.deepEqual(embedded.data[0], { content: "one-a", items: [{ content: "one-a item" }] });
    assert.equal((await orders().select("content").order("id").csv()).data, "content\none-a\none-b");
    assert.equal((await agent.rpc("count_orders")).data, 2);
    assert.deepEqual(contents(await supabase.from("orders").select("*")), []); // as it was
  },

  async writing() {
    const agent = await bind();
    const orders = () => agent.from("orders");
    const made = await orders().insert({ content: "one-c" }).select();
    assert.equal(made.data[0].permitted_agent_serial, SERIAL);
    await refused("42501", orders().insert({ content: "x", permitted_agent_serial: OTHER }));
    await refused("42501", orders().update({ permitted_agent_serial: OTHER }).eq("content", "one-c"));
    await refused("42501", orders().upsert({ content: "two-a" }, { onConflict: "content" }));
    assert.deepEqual(contents(await orders().update({ content: "x" }).eq("content", "two-a").select()), []);
    assert.deepEqual(contents(await orders().delete().eq("permitted_agent_serial", OTHER).select()), []);
    assert.deepEqual(contents(await orders().delete().eq("content", "one-b").select()), ["one-b"]);
  },

  async tools() {
    const agent = await bind();
    const call = async (name, args) => (await agent.schema("kakunin").rpc(name, args)).data;
    assert.equal(await call("current_agent_id"), AGENT_ID);
    assert.equal((await call("verify_agent_scope", { action: "orders:write" })).allowed, true);
    assert.equal((await call("verify_agent_scope", { action: "trade:execute" })).allowed, false);
    assert.equal((await call("check_risk_score")).band, "low");
    assert.ok((await call("audit_log_append", { event_type: "api_call", metadata: { a: 1 } })).event_id);
    assert.equal((await call("verify_certificate", { serial: OTHER })).valid, true);
  },

  async twoAtOnce() {
    const [one, two] = await Promise.all([bind(), bind(OTHER)]);
    const both = Array.from({ length: 40 }, (_, n) => (n % 2 ? two : one).from("orders").select("*"));
    for (const [n, answer] of (await Promise.all(both)).entries())
      assert.deepEqual(contents(answer), n % 2 ? ["two-a", "two-b"] : ["one-a", "one-b"]);
  },

  async services() {
    const agent = await bind();
    await agent.storage.from("bucket").download("file");
    await agent.functions.invoke("hello");
  },

  async dynamicSQL() {
    const agent = await bind();
    const claims = JSON.stringify({ kakunin_cert_serial: OTHER });
    const query =
      `with t as materialized (select set_config('request.jwt.claims', '${claims}', true))` +
      " select to_json(json_agg(content)) from t, orders";
    const { data } = await agent.rpc("run_sql", { query });
    assert.deepEqual((data ?? []).filter((content) => content.startsWith("two")), []);
  },

  async revoked() {
    const agent = await bind();
    assert.equal((await agent.from("orders").select("*")).data.length, 2);
    await asked("revoke");
    const error = await refused("KA002", agent.from("orders").select("*"));
    assert.match(error.message, /revoked/);
    await refused("KA002", agent.from("orders").insert({ content: "late" }));
    await assert.rejects(bind(), (error) => error instanceof KakuninError && error.code === "KA002");
  },

  async renewed() {
    const agent = await bind(SERIAL, { lifetime: 2 });
    for (const end = Date.now() + 5000; Date.now() < end; await sleep(100))
      assert.equal((await agent.from("orders").select("*")).data.length, 2);
    await asked("suspend");
    await sleep(2000);
    // Not sent with the API key instead.
    const { data, error } = await agent.from("orders").select("*");
    assert.equal(data, null);
    assert.match(error.message, /suspended/);
  },

  async refusedKeys() {
    const other = hs256("another secret that the project does not have");
    await assert.rejects(bindAgentSession(supabase, SERIAL, { key: other }), /could not be verified/);
    const none = { alg: "none", sign: async () => "" };
    await assert.rejects(bindAgentSession(supabase, SERIAL, { key: none }), /could not be verified/);
    await assert.rejects(bind("AA:BB"), (error) => error.code === "KA001");
    await assert.rejects(bindAgentSession(createClient(URL_, SERVICE), SERIAL, { key }), /never has a key/);
    assert.throws(() => hs256("short"));
    for (const lifetime of [0, 301, NaN]) await assert.rejects(bind(SERIAL, { lifetime }), /lives/);
  },

  async anotherAnswer() {
    const { fetch } = globalThis;
    let about = OTHER;
    globalThis.fetch = (url, options) =>
      String(url).endsWith("/verify_certificate")
        ? fetch(url, { ...options, body: JSON.stringify({ serial: about }) })
        : fetch(url, options);
    await assert.rejects(bind(), /answered about another/);
    about = SERIAL;
    const plain = SERIAL.replaceAll(":", "").toLowerCase();
    for (const form of [plain, `0x${plain}`, `00${plain}`, SERIAL.replaceAll(":", "-"), ` ${SERIAL} `])
      assert.deepEqual(contents(await (await bind(form)).from("orders").select("*")), ["one-a", "one-b"]);
    const agent = await bind(SERIAL, { lifetime: 2 });
    about = OTHER; // at the renewal
    await sleep(2000);
    const { data, error } = await agent.from("orders").select("*");
    assert.equal(data, null);
    assert.match(error.message, /answered about another/);
  },

  async anotherHeader() {
    const hmac = (text) => createHmac("sha256", SECRET).update(text).digest("base64url");
    const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
    const exp = Math.floor(Date.now() / 1000) + 60;
    const text = [{ alg: "HS256", typ: "JWT" }, { role: "kakunin_agent", kakunin_cert_serial: SERIAL, exp }].map(part).join(".");
    const forged = createClient(URL_, ANON, {
      accessToken: async () => `${text}.${hmac(text)}`,
      global: { headers: { "X-Kakunin-Cert-Serial": OTHER } },
    });
    const answer = await forged.from("orders").select("*");
    assert.equal(answer.status, 401);
    assert.equal(answer.error.code, "KA004");
  },
};

await scenarios[process.argv[2]]();
console.log("ok");
process.exit(0);
