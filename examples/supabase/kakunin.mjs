// Binds a Supabase client to an agent's certificate. Server code: whoever has the project's JWT secret can be
// anybody in the project, so it stays out of browsers and out of the agent's hands.

import { createHmac } from "node:crypto";
import { createClient } from "@supabase/supabase-js";

const LIFETIME = 300; // seconds
const RENEW_AFTER = 0.8; // of a token's life

/** A certificate that may not be used, or nobody to ask about it. `code` is the kit's: KA002 is revoked. */
export class KakuninError extends Error {
  constructor(message, code) {
    super(message);
    this.name = "KakuninError";
    this.code = code;
  }
}

/** The project's JWT secret as a key. For a KMS give an object of your own: `alg`, `kid`, `sign(text)`. */
export function hs256(secret) {
  if (!secret || Buffer.byteLength(secret) < 32) throw new KakuninError("no JWT secret, or a short one", "KA010");
  return { alg: "HS256", sign: async (text) => createHmac("sha256", secret).update(text).digest() };
}

/**
 * A new client, whose requests are the agent's. The certificate is verified first, and again with each renewal
 * of the token; whether it is still good, the database decides at each request.
 *
 * @param supabase a client with the project's anon or publishable key; it stays as it is
 * @param serial the agent's certificate, as 3A:F2:91:CC
 * @param options `key` (see hs256), and for the token `role` and `lifetime` in seconds
 * @throws KakuninError
 */
export async function bindAgentSession(supabase, serial, { key, role = "kakunin_agent", lifetime = LIFETIME }) {
  const [url, apiKey] = [supabase.supabaseUrl, supabase.supabaseKey];
  if (bypassesRowSecurity(apiKey)) throw new KakuninError("an agent never has a key that bypasses row security", "KA010");
  if (!(lifetime >= 1 && lifetime <= LIFETIME)) throw new KakuninError(`a token lives 1 to ${LIFETIME} seconds`, "KA010");

  const mint = async (claims) => {
    const header = { alg: key.alg, typ: "JWT", ...(key.kid && { kid: key.kid }) };
    const text = [header, { role, aud: "authenticated", ...claims }].map(base64url).join(".");
    return `${text}.${Buffer.from(await key.sign(text)).toString("base64url")}`;
  };

  const renew = async () => {
    const begun = Math.floor(Date.now() / 1000);
    const asking = await mint({ iat: begun, exp: begun + 60 });
    const { data, error } = await client(url, apiKey, async () => asking)
      .schema("kakunin")
      .rpc("verify_certificate", { serial });
    if (error) throw new KakuninError(`the certificate could not be verified: ${error.message}`, error.code);
    if (data?.valid !== true) throw new KakuninError(`certificate ${serial} is ${data?.status}`, CODES[data?.status]);
    if (digits(data.serial_number) !== digits(serial))
      throw new KakuninError(`asked about certificate ${serial}, the project answered about another`);
    const ends = Math.floor(Date.parse(data.not_after) / 1000);
    const [iat, exp] = [Math.floor(Date.now() / 1000), Math.min(Math.floor(Date.now() / 1000) + lifetime, ends)];
    if (!data.agent_id || !(exp > iat)) throw new KakuninError(`certificate ${serial} is expired`, "KA003");
    const text = await mint({
      sub: data.agent_id,
      kakunin_cert_serial: data.serial_number,
      scopes: data.permitted_actions,
      iat,
      exp,
    });
    return { text, serial: data.serial_number, renewAt: Date.now() + (exp * 1000 - Date.now()) * RENEW_AFTER };
  };

  let token = await renew();
  let renewal;
  // Never null: supabase-js would take the API key in its place.
  const accessToken = async () => {
    if (Date.now() >= token.renewAt) {
      renewal ??= renew().finally(() => (renewal = undefined));
      token = await renewal;
    }
    return token.text;
  };
  return client(url, apiKey, accessToken, { "X-Kakunin-Cert-Serial": token.serial });
}

const CODES = { unknown: "KA001", revoked: "KA002", expired: "KA003", not_yet_valid: "KA003", suspended: "KA008" };

/** Of a serial in any of its forms. */
const digits = (serial) => serial.toUpperCase().replace(/^ *0X|[: -]/g, "").replace(/^0+/, "");

const base64url = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");

const client = (url, apiKey, accessToken, headers = {}) => createClient(url, apiKey, { accessToken, global: { headers } });

function bypassesRowSecurity(apiKey) {
  if (apiKey.startsWith("sb_secret_")) return true;
  try {
    return JSON.parse(Buffer.from(apiKey.split(".")[1] ?? "", "base64url")).role === "service_role";
  } catch {
    return false;
  }
}
