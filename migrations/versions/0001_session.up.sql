-- Foundation: schemas, roles, the installation and the clock.
--
-- Two schemas. `kakunin` is what others may call: functions and views, nothing else. `kakunin_private`
-- holds tables, keys and helpers; nobody but the owner has USAGE on it, so a function there can be
-- reached only from inside one of ours.
--
-- The owner is the login that installs. It needs CREATEROLE and CREATE on the database and is not
-- superuser. Functions that touch the private tables are SECURITY DEFINER and run as that owner, each
-- with `search_path = pg_catalog, pg_temp`. The order matters: with an empty path pg_temp is searched
-- first for types and tables, and a caller's `create temp table jsonb(...)` would change what `::jsonb`
-- means inside the function.
--
-- Six roles, none of which can log in. The DBA grants them to real logins:
--
--   kakunin_agent      an agent's own session: opens, binds, asks who it is
--   kakunin_gateway    trusted server code that has verified its caller and may bind by serial
--   kakunin_registrar  registers agents and certificates
--   kakunin_operator   suspends, revokes, rotates the session key, protects tables
--   kakunin_worker     the signer
--   kakunin_auditor    reads the ledger and its proofs
--
-- Roles belong to the cluster, not to the database: they may exist already (a second database with the
-- kit) and they are kept at uninstallation while anybody uses them.
--
-- Two more things a caller brings along. Text arguments come with the caller's collation, and a
-- nondeterministic one can make any two texts equal: columns that decide something are collate "C", and so
-- are the variables that are compared with them. Bodies of functions have no backslash outside
-- E'...': what it means elsewhere is up to the caller's standard_conforming_strings.
--
-- Errors carry their own SQLSTATEs, one class a cause (docs/errors.md, kakunin_db/errors.py):
--   KA001 unknown certificate       KA006 the ledger is append-only
--   KA002 certificate revoked       KA007 ledger integrity
--   KA003 outside its validity      KA008 agent suspended
--   KA004 assertion or ticket       KA009 spend limit
--   KA005 outside certified scope   KA010 bad input

-- The files of this folder are applied in name order in one transaction (psql -1, or `kakunin-db migrate`).
-- Names below resolve here and nowhere else, whatever search_path the installing session came with.
set local search_path = pg_catalog, pg_temp;

create schema if not exists kakunin_private;  -- may hold the migration's version table already
create schema kakunin;
comment on schema kakunin is 'kakunin-db: functions an application, an operator or a policy may call';
comment on schema kakunin_private is 'kakunin-db: tables, keys and helpers. No role but the owner has USAGE, on purpose';

do $roles$
declare
  v_role record;
begin
  for v_role in
    select * from (values
      ('kakunin_agent',     'an agent''s session: opens, binds, asks who it is'),
      ('kakunin_gateway',   'trusted server code that has verified its caller and may bind by serial'),
      ('kakunin_registrar', 'registers agents and certificates'),
      ('kakunin_operator',  'suspends, revokes, rotates the session key, protects tables'),
      ('kakunin_worker',    'the signer of the ledger'),
      ('kakunin_auditor',   'reads the ledger and its proofs')
    ) as r(name, purpose)
  loop
    -- Made beforehand, by a DBA for an installer without CREATEROLE or by another database's installation.
    continue when to_regrole(v_role.name) is not null;
    begin
      execute format('create role %I nologin', v_role.name);
      execute format('comment on role %I is %L', v_role.name, 'kakunin-db: ' || v_role.purpose);
    exception
      -- another database's installation makes the same role at this very moment
      when duplicate_object or unique_violation then null;
    end;
  end loop;
end
$roles$;

create table kakunin_private.installation (
  only_row        boolean primary key default true check (only_row),
  installation_id uuid not null default gen_random_uuid(),
  installed_at    timestamptz not null default now()
);
comment on table kakunin_private.installation is
  'One row. The id is the audience of assertions, so that one made for another database is refused here';
insert into kakunin_private.installation default values;

create function kakunin.installation_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select i.installation_id from kakunin_private.installation i);
end
$$;
comment on function kakunin.installation_id() is
  'This installation''s id. Assertions name it as their audience: kakunin:<installation id>';

-- Everything that asks for the time asks here, so that a test can move the clock by replacing one
-- function instead of sleeping. It is the wall clock, not the transaction's start: a certificate must
-- expire inside a long transaction too.
create function kakunin_private.clock() returns timestamptz
language sql volatile parallel safe
return clock_timestamp();
comment on function kakunin_private.clock() is 'The present time, for every check the kit makes';

-- Cryptography from core functions only: no pgcrypto, no extension at all.
--
-- Core has sha256() and arbitrary-precision numeric, and that is enough for what the kit checks:
--
--   HMAC-SHA256 (RFC 2104)            session tickets and bindings
--   base64url (RFC 4648 section 5)    the three parts of a JWT
--   RSASSA-PKCS1-v1_5 with SHA-256    (RFC 8017 section 8.2.2) assertions, later certificates and tree heads
--
-- Verification only ever uses public values, so it needs no constant-time arithmetic. The encoded
-- message is built from the digest and compared whole, as a number; the padding a signature carries is
-- never parsed. Parsing it is how forgeries with e = 3 and garbage after the hash were possible.

create function kakunin_private.hmac_sha256(p_key bytea, p_message bytea) returns bytea
language plpgsql immutable strict parallel safe
as $$
declare
  v_key   bytea := case when length(p_key) > 64 then sha256(p_key) else p_key end;
  v_inner bytea;
  v_outer bytea;
begin
  v_key := v_key || decode(repeat('00', 64 - length(v_key)), 'hex');
  v_inner := v_key;
  v_outer := v_key;
  for i in 0..63 loop
    v_inner := set_byte(v_inner, i, get_byte(v_key, i) # 54);  -- ipad, 0x36
    v_outer := set_byte(v_outer, i, get_byte(v_key, i) # 92);  -- opad, 0x5c
  end loop;
  return sha256(v_outer || sha256(v_inner || p_message));
end
$$;
comment on function kakunin_private.hmac_sha256(bytea, bytea) is
  'HMAC-SHA256 (RFC 2104). The session hot path uses stored pads instead: see session_keys';

create function kakunin_private.base64url_encode(p_bytes bytea) returns text
language sql immutable strict parallel safe
return translate(encode(p_bytes, 'base64'), E'+/=\n', '-_');
comment on function kakunin_private.base64url_encode(bytea) is 'base64url without padding (RFC 4648 section 5, RFC 7515)';

create function kakunin_private.base64url_decode(p_text text) returns bytea
language plpgsql immutable strict parallel safe
as $$
declare
  v_bytes bytea;
begin
  -- decode() alone is too kind: it skips white space and ignores stray bits in the last character.
  if p_text !~ '^[A-Za-z0-9_-]*$' or length(p_text) % 4 = 1 then
    return null;
  end if;
  v_bytes := decode(translate(p_text, '-_', '+/') || repeat('=', (4 - length(p_text) % 4) % 4), 'base64');
  if kakunin_private.base64url_encode(v_bytes) <> p_text then
    return null;
  end if;
  return v_bytes;
end
$$;
comment on function kakunin_private.base64url_decode(text) is
  'Strict base64url: NULL for anything that is not exactly what base64url_encode writes';

create function kakunin_private.bytes_to_numeric(p_bytes bytea) returns numeric
language plpgsql immutable strict parallel safe
as $$
declare
  v_hex    text := encode(p_bytes, 'hex');
  v_result numeric := 0::numeric;
  v_at     integer := 1;
  v_take   integer := length(v_hex) % 14;
begin
  -- Seven bytes at a time: the widest whole-byte chunk that a bigint holds without its sign bit.
  if v_take > 0 then
    v_result := ('x' || lpad(left(v_hex, v_take), 16, '0'))::bit(64)::bigint::numeric;
    v_at := 1 + v_take;
  end if;
  while v_at < length(v_hex) loop
    v_result := v_result * 72057594037927936  -- 2 ^ 56
      + ('x00' || substr(v_hex, v_at, 14))::bit(64)::bigint;
    v_at := v_at + 14;
  end loop;
  return v_result;
end
$$;
comment on function kakunin_private.bytes_to_numeric(bytea) is
  'OS2IP (RFC 8017 section 4.2): big-endian bytes as a non-negative number';

create function kakunin_private.check_rsa_public_key(p_modulus bytea, p_exponent bigint) returns void
language plpgsql immutable parallel safe
as $$
declare
  v_bits integer;
begin
  if p_modulus is null or p_exponent is null or length(p_modulus) = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA public key is incomplete: the modulus and the exponent are both needed';
  end if;
  if p_exponent <> 65537 then
    raise exception using errcode = 'KA010',
      message = format('RSA public exponent %s is not supported', p_exponent),
      hint = 'Use a key with public exponent 65537.';
  end if;
  if get_byte(p_modulus, 0) = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA modulus begins with a zero byte',
      hint = 'Give it big-endian, without leading zeros.';
  end if;
  v_bits := length(p_modulus) * 8 - 8 + length(ltrim(get_byte(p_modulus, 0)::bit(8)::text, '0'));
  if v_bits not between 2048 and 4096 then
    raise exception using errcode = 'KA010',
      message = format('RSA modulus of %s bits is not supported', v_bits),
      hint = 'Use a key of 2048 to 4096 bits.';
  end if;
  if get_byte(p_modulus, length(p_modulus) - 1) % 2 = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA modulus is even, so it is not the product of two odd primes';
  end if;
end
$$;
comment on function kakunin_private.check_rsa_public_key(bytea, bigint) is
  'KA010 unless the key is RSA of 2048 to 4096 bits with public exponent 65537';

create function kakunin_private.rsa_pkcs1_sha256_verify(
  p_modulus bytea, p_exponent bigint, p_message bytea, p_signature bytea
) returns boolean
language plpgsql immutable parallel safe
as $$
declare
  v_length    integer := length(p_modulus);
  v_modulus   numeric;
  v_signature numeric;
  v_power     numeric;
begin
  perform kakunin_private.check_rsa_public_key(p_modulus, p_exponent);
  if p_message is null or p_signature is null or length(p_signature) <> v_length then
    return false;
  end if;
  v_modulus := kakunin_private.bytes_to_numeric(p_modulus);
  v_signature := kakunin_private.bytes_to_numeric(p_signature);
  if v_signature >= v_modulus then
    return false;  -- RFC 8017 section 5.2.2: s and s + n must not both be signatures
  end if;
  -- 65537 = 2^16 + 1: sixteen squarings and one multiplication.
  v_power := v_signature;
  for i in 1..16 loop
    v_power := (v_power * v_power) % v_modulus;
  end loop;
  v_power := (v_power * v_signature) % v_modulus;
  -- EMSA-PKCS1-v1_5 (section 9.2): 00 01 ff..ff 00, DigestInfo of SHA-256 with its NULL, the digest.
  return v_power = kakunin_private.bytes_to_numeric(
    E'\\x0001'::bytea
    || decode(repeat('ff', v_length - 54), 'hex')
    || E'\\x003031300d060960864801650304020105000420'::bytea
    || sha256(p_message));
end
$$;
comment on function kakunin_private.rsa_pkcs1_sha256_verify(bytea, bigint, bytea, bytea) is
  'RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 section 8.2.2). False for a wrong signature, KA010 for a key it does not do';

-- Identity: agents and their X.509 certificates.
--
-- An agent is a row; what it may do is in its certificate. A certificate row is never edited to mean
-- something else: the only change it ever sees is its revocation, which is final. Suspension is the
-- agent's, can be lifted, and stops every certificate the agent has. Both take effect at the next
-- statement of every session, because current_cert_serial() looks here each time it is asked.
--
-- A serial has one text form everywhere, that of the X-Kakunin-Cert-Serial header: upper-case hex bytes
-- joined by colons, no leading zero byte (3A:F2:91:CC).
--
-- Registration takes the fields of the certificate from the registrar, whose word is trusted for them:
-- a login with kakunin_registrar can therefore create identities. Give it to the certificate authority
-- and to nobody else.

create function kakunin.normalize_serial(serial text) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_hex text collate "C" := serial;
begin
  -- Refused by length first: the patterns below never see more than this.
  if v_hex is not null and octet_length(v_hex) <= 100 then
    v_hex := upper(regexp_replace(btrim(v_hex), '^0[xX]', ''));
    if v_hex ~ '^[0-9A-F]{1,2}((:[0-9A-F]{2})*|(-[0-9A-F]{2})*|( [0-9A-F]{2})*)$' or v_hex ~ '^[0-9A-F]+$' then
      v_hex := ltrim(translate(v_hex, ':- ', ''), '0');
      if length(v_hex) between 1 and 40 then  -- RFC 5280 section 4.1.2.2: positive, at most 20 octets
        v_hex := repeat('0', length(v_hex) % 2) || v_hex;
        return rtrim(regexp_replace(v_hex, '(..)', E'\\1:', 'g'), ':');
      end if;
    end if;
  end if;
  raise exception using errcode = 'KA010',
    message = 'not a certificate serial number',
    hint = 'Give 1 to 20 bytes in hexadecimal, as in 3A:F2:91:CC, 3af291cc or 0x3AF291CC.';
end
$$;
comment on function kakunin.normalize_serial(text) is
  'The canonical form of a certificate serial, 3A:F2:91:CC, from any common hexadecimal form; KA010 for anything else';

create table kakunin_private.agents (
  agent_id         uuid primary key default gen_random_uuid(),
  name             text not null check (length(name) between 1 and 200),
  tenant           text check (length(tenant) between 1 and 200),
  created_at       timestamptz not null default now(),
  suspended_at     timestamptz,
  suspended_reason text,
  check ((suspended_at is null) = (suspended_reason is null))
);
comment on table kakunin_private.agents is 'One row an agent. Suspension stops all its certificates and can be lifted';

create table kakunin_private.certificates (
  serial             text collate "C" primary key check (serial ~ '^[0-9A-F]{2}(:[0-9A-F]{2}){0,19}$'),
  agent_id           uuid not null references kakunin_private.agents,
  der                bytea not null check (octet_length(der) between 1 and 16384),
  public_key_modulus bytea not null,
  not_before         timestamptz not null,
  not_after          timestamptz not null check (not_after > not_before),
  permitted_actions  text[] collate "C" not null,
  registered_at      timestamptz not null default now(),
  registered_by      name not null,
  revoked_at         timestamptz,
  revocation_reason  text,
  check ((revoked_at is null) = (revocation_reason is null))
);
create index certificates_agent_id on kakunin_private.certificates (agent_id);
comment on table kakunin_private.certificates is
  'Certificates the kit accepts. Rows are added by register_certificate, changed only by revocation, never deleted';
comment on column kakunin_private.certificates.permitted_actions is
  'Scopes the certificate carries; has_scope() reads them. prefix:* covers every action below prefix:';
comment on column kakunin_private.certificates.public_key_modulus is
  'RSA modulus, big-endian; the public exponent is always 65537';

-- Stops: a transaction that keeps its snapshot (REPEATABLE READ, SERIALIZABLE) does not see a revocation
-- committed since, and SET TRANSACTION SNAPSHOT hands an old snapshot to ever new transactions. But names in
-- the catalog are looked up as committed, whatever the snapshot. So every revocation, suspension and
-- retired session key also leaves a name there, and is asked for it in such transactions only. The name is a
-- domain's, because making one takes no lock that an agent's own DDL could hold against a revocation.
create function kakunin_private.stop(p_name text) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  if not kakunin_private.is_stopped(p_name) then
    execute format('create domain kakunin_private.%I as boolean', p_name);
  end if;
end
$$;
comment on function kakunin_private.stop(text) is
  'Makes a revocation (name: serial), suspension (agent id) or retired session key (key and its id) known beyond snapshots';

create function kakunin_private.is_stopped(p_name text) returns boolean
language sql stable parallel safe
return to_regtype('kakunin_private.' || quote_ident(p_name)) is not null;
comment on function kakunin_private.is_stopped(text) is 'Whether stop() was committed for this name, whatever the snapshot shows';

create function kakunin_private.snapshot_is_fresh() returns boolean
language sql stable parallel safe
return current_setting('transaction_isolation') in ('read committed', 'read uncommitted');
comment on function kakunin_private.snapshot_is_fresh() is
  'Whether each statement takes a snapshot of its own, so that what it sees is what is committed';

-- The one definition of "this certificate may be used now"; bind and every statement's check share it.
-- notAfter is the last moment of validity, not the first one after it (RFC 5280 section 4.1.2.5).
-- Plain columns, not row types, so that the planner can inline it.
create function kakunin_private.is_usable(
  p_serial text, p_revoked_at timestamptz, p_not_before timestamptz, p_not_after timestamptz,
  p_agent_id uuid, p_suspended_at timestamptz
) returns boolean
language sql volatile parallel safe
return p_revoked_at is null
   and p_suspended_at is null
   and kakunin_private.clock() between p_not_before and p_not_after
   and (kakunin_private.snapshot_is_fresh()
        or not (kakunin_private.is_stopped(p_serial) or kakunin_private.is_stopped(p_agent_id::text)));
comment on function kakunin_private.is_usable(text, timestamptz, timestamptz, timestamptz, uuid, timestamptz) is
  'Certificate not revoked, agent not suspended, and now inside the validity';

create function kakunin_private.check_certificate(p_serial text) returns void
language plpgsql volatile parallel restricted
as $$
declare
  v_certificate kakunin_private.certificates;
  v_agent       kakunin_private.agents;
  v_now         timestamptz := kakunin_private.clock();
begin
  select * into v_certificate from kakunin_private.certificates c where c.serial = p_serial;
  if not found then
    raise exception using errcode = 'KA001',
      message = format('certificate %s is not registered here', p_serial),
      hint = 'Register it with kakunin.register_certificate(), or check that this is the right database.';
  end if;
  select * into v_agent from kakunin_private.agents a where a.agent_id = v_certificate.agent_id;
  if v_certificate.revoked_at is not null or kakunin_private.is_stopped(p_serial) then
    raise exception using errcode = 'KA002',
      message = format('certificate %s was revoked: %s', p_serial,
        coalesce(v_certificate.revocation_reason, 'after this transaction took its snapshot')),
      hint = 'Revocation is final. Certify the agent anew.';
  elsif v_now < v_certificate.not_before then
    raise exception using errcode = 'KA003',
      message = format('certificate %s is not valid yet', p_serial),
      hint = 'Wait for its notBefore, or compare the clocks of the certificate authority and of this server.';
  elsif v_now > v_certificate.not_after then
    raise exception using errcode = 'KA003',
      message = format('certificate %s has expired', p_serial),
      hint = 'Certify the agent anew.';
  elsif v_agent.suspended_at is not null or kakunin_private.is_stopped(v_agent.agent_id::text) then
    raise exception using errcode = 'KA008',
      message = format('agent %s is suspended: %s', v_agent.agent_id,
        coalesce(v_agent.suspended_reason, 'after this transaction took its snapshot')),
      hint = 'After review, an operator lifts it with kakunin.reinstate_agent().';
  end if;
end
$$;
comment on function kakunin_private.check_certificate(text) is
  'Returns when the certificate may be used now; otherwise KA001, KA002, KA003 or KA008 says why not';

create function kakunin_private.check_text(p_what text, p_value text, p_max integer) returns text
language plpgsql immutable parallel safe
as $$
begin
  if p_value is null or p_value !~ '[^[:space:]]' or length(p_value) > p_max then
    raise exception using errcode = 'KA010',
      message = format('%s must be 1 to %s characters', p_what, p_max);
  end if;
  return p_value;
end
$$;
comment on function kakunin_private.check_text(text, text, integer) is 'The value, or KA010 when it is missing, blank or too long';

create function kakunin_private.check_known_agent(p_agent_id uuid) returns void
language plpgsql stable parallel restricted
as $$
begin
  if not exists (select from kakunin_private.agents a where a.agent_id = p_agent_id) then
    raise exception using errcode = 'KA010',
      message = format('no agent %s', coalesce(p_agent_id::text, 'given')),
      hint = 'Create it with kakunin.create_agent().';
  end if;
end
$$;
comment on function kakunin_private.check_known_agent(uuid) is 'KA010 when there is no such agent';

create function kakunin.create_agent(name text, tenant text default null) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_agent_id uuid;
begin
  insert into kakunin_private.agents (name, tenant)
  values (
    kakunin_private.check_text('an agent''s name', create_agent.name, 200),
    case when create_agent.tenant is not null
      then kakunin_private.check_text('a tenant', create_agent.tenant, 200) end)
  returning agent_id into v_agent_id;
  return v_agent_id;
end
$$;
comment on function kakunin.create_agent(text, text) is
  'Makes an agent and returns its id. It can do nothing until a certificate is registered for it. For kakunin_registrar';

create function kakunin.register_certificate(
  agent_id uuid, der bytea, serial text, public_key_modulus bytea,
  not_before timestamptz, not_after timestamptz, permitted_actions text[] default '{}'
) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial  text := kakunin.normalize_serial(register_certificate.serial);
  v_actions text[] := coalesce(register_certificate.permitted_actions, '{}');
begin
  perform kakunin_private.check_known_agent(register_certificate.agent_id);
  perform kakunin_private.check_rsa_public_key(register_certificate.public_key_modulus, 65537);
  if register_certificate.der is null or octet_length(register_certificate.der) not between 1 and 16384 then
    raise exception using errcode = 'KA010', message = 'a certificate is 1 to 16384 bytes of DER';
  end if;
  if not coalesce(isfinite(register_certificate.not_before) and isfinite(register_certificate.not_after), false)
    or register_certificate.not_after <= register_certificate.not_before
    or register_certificate.not_after - register_certificate.not_before > interval '365 days' then
    raise exception using errcode = 'KA010',
      message = 'a certificate is valid for at most 365 days, and notAfter comes after notBefore';
  end if;
  if array_ndims(v_actions) > 1 or cardinality(v_actions) > 256
    or exists (select from unnest(v_actions) a where a is null or a !~ '^[A-Za-z0-9_.:/-]{1,128}$' and a !~ '^[A-Za-z0-9_.:/-]{1,126}:[*]$') then
    raise exception using errcode = 'KA010',
      message = 'permitted actions are at most 256 names of 1 to 128 characters from A-Z a-z 0-9 _ . : / -',
      hint = 'Only a whole last part may be a star, as in trade:*.';
  end if;
  insert into kakunin_private.certificates
    (serial, agent_id, der, public_key_modulus, not_before, not_after, permitted_actions, registered_by)
  values
    (v_serial, register_certificate.agent_id, register_certificate.der, register_certificate.public_key_modulus,
     register_certificate.not_before, register_certificate.not_after, v_actions, session_user)
  on conflict on constraint certificates_pkey do nothing;
  if not found then
    raise exception using errcode = 'KA010',
      message = format('certificate %s is registered already', v_serial),
      hint = 'A serial is used once. Issue a new certificate.';
  end if;
  return v_serial;
end
$$;
comment on function kakunin.register_certificate(uuid, bytea, text, bytea, timestamptz, timestamptz, text[]) is
  'Registers a certificate (DER, serial, RSA modulus big-endian, at most 365 days, actions such as orders:*) and returns its serial. The registrar answers for the fields. For kakunin_registrar';

create function kakunin.revoke_certificate(serial text, reason text default 'unspecified') returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial     text := kakunin.normalize_serial(revoke_certificate.serial);
  v_revoked_at timestamptz;
begin
  -- RFC 5280 section 5.3.1. certificateHold and removeFromCRL are left out: a hold is a suspension,
  -- which is the agent's, and nothing is ever taken off the list.
  if revoke_certificate.reason is null or revoke_certificate.reason not in
    ('unspecified', 'keyCompromise', 'cACompromise', 'affiliationChanged', 'superseded',
     'cessationOfOperation', 'privilegeWithdrawn', 'aACompromise') then
    raise exception using errcode = 'KA010',
      message = 'not a revocation reason of RFC 5280',
      hint = 'Use unspecified, keyCompromise, cACompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn or aACompromise.';
  end if;
  update kakunin_private.certificates c
     set revoked_at = kakunin_private.clock(), revocation_reason = revoke_certificate.reason
   where c.serial = v_serial and c.revoked_at is null;
  if found then
    perform kakunin_private.stop(v_serial);
  end if;
  -- A second revocation changes nothing: the first moment and reason are the ones that count.
  select c.revoked_at into v_revoked_at from kakunin_private.certificates c where c.serial = v_serial;
  if not found then
    perform kakunin_private.check_certificate(v_serial);  -- says KA001
  end if;
  return v_revoked_at;
end
$$;
comment on function kakunin.revoke_certificate(text, text) is
  'Revokes a certificate for good; returns when it was first revoked. Reasons are those of RFC 5280, such as keyCompromise, superseded, cessationOfOperation. For kakunin_operator';

create function kakunin.suspend_agent(agent_id uuid, reason text) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_known_agent(suspend_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = coalesce(a.suspended_at, kakunin_private.clock()),
         suspended_reason = coalesce(
           a.suspended_reason, kakunin_private.check_text('a reason', suspend_agent.reason, 1000))
   where a.agent_id = suspend_agent.agent_id;
  perform kakunin_private.stop(suspend_agent.agent_id::text);
end
$$;
comment on function kakunin.suspend_agent(uuid, text) is
  'Stops every certificate of the agent at the next statement, until reinstate_agent(); the first moment and reason stay. For kakunin_operator';

create function kakunin.reinstate_agent(agent_id uuid) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_known_agent(reinstate_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = null, suspended_reason = null
   where a.agent_id = reinstate_agent.agent_id;
  execute format('drop domain if exists kakunin_private.%I', reinstate_agent.agent_id);
end
$$;
comment on function kakunin.reinstate_agent(uuid) is
  'Lifts a suspension. Revoked certificates stay revoked. For kakunin_operator';

-- What an operator looks up before naming an agent or a serial. Plain views: they read the private tables
-- with their owner's rights, and only the roles they are granted to can read them.
create view kakunin.agents with (security_barrier = true) as
  select a.agent_id, a.name, a.tenant, a.created_at, a.suspended_at, a.suspended_reason
    from kakunin_private.agents a;
comment on view kakunin.agents is 'Agents, and whether they are suspended. For kakunin_registrar, kakunin_operator, kakunin_auditor';

create view kakunin.certificates with (security_barrier = true) as
  select c.serial, c.agent_id, c.not_before, c.not_after, c.permitted_actions,
         c.registered_at, c.registered_by, c.revoked_at, c.revocation_reason
    from kakunin_private.certificates c;
comment on view kakunin.certificates is 'Registered certificates. For kakunin_registrar, kakunin_operator, kakunin_auditor';

-- Sessions: how a connection proves which certificate it works for, and how policies ask.
--
-- Every policy asks one function, current_cert_serial(). It answers NULL unless the session carries a
-- binding that this database made, for this backend and this transaction, and the certificate behind it
-- may be used at this moment. There are three ways to get a binding:
--
--   Proof.    The agent signs a JWT assertion (RFC 7523) with its certificate's key. open_session()
--             verifies the RSA signature and gives a ticket; bind_session(ticket) runs at the start of
--             every transaction and costs microseconds. This is the way for direct connections: it holds
--             against an agent that sends any SQL it likes.
--   Gateway.  bind_serial(serial), for server code that has verified its caller by other means. Whoever
--             may call it can become any agent: never grant kakunin_gateway to a login that runs SQL an
--             agent wrote.
--   Claims.   PostgREST verifies a JWT and puts its claims into request.jwt.claims. Anybody can set that
--             setting, so it is believed only where session_user is a configured gateway login.
--
-- A ticket is    kkn1.<key>.<serial>.<issued>.<expires>.<mac>             (times in seconds since 1970)
-- A binding is        <key>|<serial>|<x or s>|<expires>|<mac>             in the setting kakunin.session
--
-- Both MACs are HMAC-SHA256 under a key in session_keys. What they cover is more than what is written: the
-- login and the database; the binding's also the backend's pid and, with x, the transaction's start. So a
-- ticket is no use to another login, and a binding copied out of current_setting() is no use to another
-- backend or a later transaction. A binding with s is for autocommit connections: it lasts for the session,
-- but never longer than its ticket.
--
-- A transaction is told by its backend and its start time. Several transactions packed into one
-- simple-query message share that start, so whoever sent that one message could keep its binding from one
-- to the next; it held the ticket anyhow, and the next message starts another time.
--
-- Revocation does not wait for any of these to expire: the certificate is looked up again by
-- every statement.

create table kakunin_private.session_keys (
  key_id      text collate "C" primary key check (key_id ~ '^[0-9]{1,10}$'),
  inner_pad   bytea not null check (octet_length(inner_pad) = 64),
  outer_pad   bytea not null check (octet_length(outer_pad) = 64),
  created_at  timestamptz not null,
  valid_until timestamptz
);
-- At most one key makes new MACs; two rotations at once cannot both leave theirs.
create unique index session_keys_current on kakunin_private.session_keys ((true)) where valid_until is null;
comment on table kakunin_private.session_keys is
  'HMAC keys of tickets and bindings. The key without valid_until signs; the others only verify, until then';
comment on column kakunin_private.session_keys.inner_pad is
  'The key xor 0x36.. (RFC 2104 ipad), kept instead of the key so that a MAC is two sha256() calls';
comment on column kakunin_private.session_keys.outer_pad is 'The key xor 0x5c.. (RFC 2104 opad)';

create sequence kakunin_private.session_key_ids;
comment on sequence kakunin_private.session_key_ids is 'Never gives a key id twice, so an old ticket cannot meet a new key';

create table kakunin_private.used_assertions (
  serial     text collate "C" not null,
  jti        text collate "C" not null,
  expires_at timestamptz not null,
  primary key (serial, jti)
);
create index used_assertions_expires_at on kakunin_private.used_assertions (expires_at);
comment on table kakunin_private.used_assertions is
  'The jti of every assertion exchanged, until it has expired: a second exchange is a replay';

create table kakunin_private.gateway_logins (login name primary key);
comment on table kakunin_private.gateway_logins is
  'Logins whose request.jwt.claims are believed, because only PostgREST connects as them';

-- As text, and not cast: the planner may work an expression out before the MAC in front of it is checked,
-- and what a caller wrote need not be a number.
create function kakunin_private.is_future(p_seconds text) returns boolean
language sql volatile parallel safe
return lpad(p_seconds, 12, '0') > lpad(floor(extract(epoch from kakunin_private.clock()))::text, 12, '0') collate "C";
comment on function kakunin_private.is_future(text) is 'Whether whole seconds since 1970, as we wrote them, are yet to come';

create function kakunin_private.key_is_good(p_key_id text, p_valid_until timestamptz) returns boolean
language sql volatile parallel safe
return coalesce(p_valid_until > kakunin_private.clock(), true)
  and (kakunin_private.snapshot_is_fresh() or not kakunin_private.is_stopped('key ' || p_key_id));
comment on function kakunin_private.key_is_good(text, timestamptz) is 'Whether what this key has signed still counts';

create function kakunin_private.session_mac(p_inner bytea, p_outer bytea, p_message text) returns text
language sql stable strict parallel safe
return encode(sha256(p_outer || sha256(p_inner || convert_to(p_message, 'UTF8'))), 'hex');
comment on function kakunin_private.session_mac(bytea, bytea, text) is 'HMAC-SHA256 in hexadecimal, from the stored pads';

-- The login and the database come first, and quoted: neither a name with a bar in it nor what
-- a caller puts into the rest can make one message read as another. One concat_ws() for all, because every
-- operator of an expression costs something each time a transaction first uses it.
create function kakunin_private.ticket_context(p_body text) returns text
language sql stable parallel restricted
return concat_ws('|', 'ticket', quote_literal(session_user), quote_literal(current_database()), p_body);
comment on function kakunin_private.ticket_context(text) is
  'What a ticket''s MAC covers: its text, the login it was issued to and the database';

create function kakunin_private.binding_context(p_body text, p_is_local boolean) returns text
language sql stable parallel restricted
return concat_ws('|', 'binding', quote_literal(session_user), quote_literal(current_database()), p_body, pg_backend_pid(),
  case when p_is_local then extract(epoch from transaction_timestamp()) end);
comment on function kakunin_private.binding_context(text, boolean) is
  'What a binding''s MAC covers: its text, this backend, this transaction (or the session), login and database';

-- The next three are written to be inlined into a statement that reads the key from its table (not STRICT,
-- and no argument dear enough to be kept apart). That is for more than speed: a key must never be in a
-- PL/pgSQL variable. The planner puts variables into plans as constants, and anybody can have plans
-- printed (debug_print_plan, client_min_messages = log).
create function kakunin_private.make_binding(p_inner bytea, p_outer bytea, p_body text, p_is_local boolean) returns text
language sql stable parallel restricted
return p_body || '|' || kakunin_private.session_mac(
  p_inner, p_outer, kakunin_private.binding_context(p_body, p_is_local));
comment on function kakunin_private.make_binding(bytea, bytea, text, boolean) is 'The binding: p_body and its MAC';

-- Both sides of a comparison are hashed once more: that leaves no prefix to guess by timing.
create function kakunin_private.binding_is_genuine(p_inner bytea, p_outer bytea, p_binding text) returns boolean
language sql stable parallel restricted
return sha256(convert_to(p_binding, 'UTF8')) = sha256(convert_to(
  kakunin_private.make_binding(
    p_inner, p_outer, left(p_binding, -65), split_part(p_binding, '|', 3) <> 's'), 'UTF8'));
comment on function kakunin_private.binding_is_genuine(bytea, bytea, text) is
  'Whether the key made this binding for this backend, login and transaction. Says nothing of its expiry';

create function kakunin_private.ticket_is_genuine(p_inner bytea, p_outer bytea, p_ticket text) returns boolean
language sql stable parallel restricted
return sha256(convert_to(p_ticket, 'UTF8')) = sha256(convert_to(
  left(p_ticket, -65) || '.' || kakunin_private.session_mac(
    p_inner, p_outer, kakunin_private.ticket_context(left(p_ticket, -65))), 'UTF8'));
comment on function kakunin_private.ticket_is_genuine(bytea, bytea, text) is
  'Whether the key made this ticket for this login. Says nothing of its expiry';

create function kakunin_private.new_session_key() returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- Core has no random bytes, but gen_random_uuid() draws 122 bits from the server's strong source. All in
  -- one statement, so that the key is never in a variable.
  insert into kakunin_private.session_keys (key_id, inner_pad, outer_pad, created_at)
  select nextval('kakunin_private.session_key_ids')::text,
         string_agg(set_byte(E'\\x00', 0, b.byte # 54), '' order by b.at),  -- ipad, 0x36
         string_agg(set_byte(E'\\x00', 0, b.byte # 92), '' order by b.at),  -- opad, 0x5c
         kakunin_private.clock()
    from (
      select i.at, case when i.at < 32 then get_byte(r.key, i.at) else 0 end as byte
        from (select sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
                         || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())) as key offset 0) r,
             generate_series(0, 63) as i(at)) b;
end
$$;
comment on function kakunin_private.new_session_key() is 'Adds the key that signs from now on';

do $$ begin perform kakunin_private.new_session_key(); end $$;

create function kakunin_private.no_session_key() returns void
language plpgsql volatile parallel safe
as $$
begin
  raise exception using errcode = 'KA004',
    message = format('the session key was rotated after this %s transaction took its snapshot',
      current_setting('transaction_isolation')),
    hint = 'Begin another transaction.';
end
$$;
comment on function kakunin_private.no_session_key() is 'Raises KA004: the key this snapshot shows has been retired';

create function kakunin.rotate_session_key(grace interval default '1 hour') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := kakunin_private.clock();
begin
  if rotate_session_key.grace is null
    or rotate_session_key.grace < interval '0' or rotate_session_key.grace > interval '1 day' then
    raise exception using errcode = 'KA010',
      message = 'the grace of a session key is 0 to 24 hours',
      hint = 'Tickets live 5 minutes; open transactions keep their binding for the grace. Give 0 if the key may be known.';
  end if;
  -- Serialises rotations; SHARE ROW EXCLUSIVE conflicts with itself and lets readers through.
  lock table kakunin_private.session_keys in share row exclusive mode;
  perform kakunin_private.stop('key ' || k.key_id) from kakunin_private.session_keys k where k.valid_until <= v_now;
  delete from kakunin_private.session_keys k where k.valid_until <= v_now;
  -- least(): a rotation with a shorter grace also shortens that of the keys before.
  update kakunin_private.session_keys k
     set valid_until = least(coalesce(k.valid_until, 'infinity'), v_now + rotate_session_key.grace);
  perform kakunin_private.stop('key ' || k.key_id) from kakunin_private.session_keys k where k.valid_until <= v_now;
  perform kakunin_private.new_session_key();
end
$$;
comment on function kakunin.rotate_session_key(interval) is
  'Makes a new session key; what the old one signed stays good for the grace, or for nothing at 0. For kakunin_operator';

create function kakunin.renew_installation() returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  update kakunin_private.installation set installation_id = gen_random_uuid();
  perform kakunin.rotate_session_key('0');
  return kakunin.installation_id();
end
$$;
comment on function kakunin.renew_installation() is
  'For a copy of a database: a new installation id and session key, so that no assertion, ticket or binding is good in both. Returns the id. For the owner alone';

create function kakunin.set_gateway_logins(logins name[]) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_unknown name;
begin
  select l into v_unknown from unnest(set_gateway_logins.logins) l
   where l is null or not exists (select from pg_roles r where r.rolname = l and r.rolcanlogin) limit 1;
  if found or set_gateway_logins.logins is null then
    raise exception using errcode = 'KA010',
      message = format('%s is not a role that can log in', coalesce(quote_ident(v_unknown), 'NULL')),
      hint = 'Name the logins PostgREST connects as, such as authenticator, or give an empty array.';
  end if;
  delete from kakunin_private.gateway_logins;
  insert into kakunin_private.gateway_logins select distinct l from unnest(set_gateway_logins.logins) l;
end
$$;
comment on function kakunin.set_gateway_logins(name[]) is
  'Sets the logins whose request.jwt.claims are believed. For the owner alone: who may call this can become any agent';

-- Reading a binding ---------------------------------------------------------------------------------

create function kakunin_private.serial_from_claims(p_claims text) returns text
language plpgsql stable parallel restricted
as $$
declare
  v_serial text;
begin
  if p_claims is null or p_claims = ''
    or not exists (select from kakunin_private.gateway_logins g where g.login = session_user) then
    return null;
  end if;
  -- No EXCEPTION block: a policy may call this in parallel mode, where Postgres before 17 has no
  -- subtransactions. PostgREST writes valid JSON; what is not ends the statement.
  v_serial := p_claims::json ->> 'kakunin_cert_serial';
  return case when v_serial is not null then kakunin.normalize_serial(v_serial) end;
end
$$;
comment on function kakunin_private.serial_from_claims(text) is
  'The kakunin_cert_serial claim, where session_user is a configured gateway login; otherwise NULL';

-- A binding is at most 250 characters; a longer one is refused before any work is spent on it.
create function kakunin_private.bound_serial() returns text
language plpgsql stable parallel restricted
as $$
declare
  v_binding text collate "C" := current_setting('kakunin.session', true);
begin
  if v_binding <> '' then
    return (
      select split_part(v_binding, '|', 2)
        from kakunin_private.session_keys k
       where octet_length(v_binding) <= 250
         and k.key_id = split_part(v_binding, '|', 1)
         and kakunin_private.key_is_good(k.key_id, k.valid_until)
         and kakunin_private.binding_is_genuine(k.inner_pad, k.outer_pad, v_binding)
         and (split_part(v_binding, '|', 3) = 'x' or kakunin_private.is_future(split_part(v_binding, '|', 4))));
  end if;
  return kakunin_private.serial_from_claims(current_setting('request.jwt.claims', true));
end
$$;
comment on function kakunin_private.bound_serial() is
  'The serial this session is bound to, whatever the state of the certificate; NULL without a binding that verifies';

-- bound_serial() and is_usable() in one statement: every statement on a protected table pays for this one,
-- and a second query inside it would double that.
create function kakunin.current_cert_serial() returns text
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_binding text collate "C" := current_setting('kakunin.session', true);
  v_serial  text;
begin
  if v_binding <> '' then
    return (
      select c.serial
        from kakunin_private.session_keys k
        join kakunin_private.certificates c on c.serial = split_part(v_binding, '|', 2)
        join kakunin_private.agents a on a.agent_id = c.agent_id
       where octet_length(v_binding) <= 250
         and k.key_id = split_part(v_binding, '|', 1)
         and kakunin_private.key_is_good(k.key_id, k.valid_until)
         and kakunin_private.binding_is_genuine(k.inner_pad, k.outer_pad, v_binding)
         and (split_part(v_binding, '|', 3) = 'x' or kakunin_private.is_future(split_part(v_binding, '|', 4)))
         and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at));
  end if;
  v_serial := kakunin_private.serial_from_claims(current_setting('request.jwt.claims', true));
  if v_serial is null then
    return null;
  end if;
  return (
    select c.serial
      from kakunin_private.certificates c
      join kakunin_private.agents a on a.agent_id = c.agent_id
     where c.serial = v_serial
       and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at));
end
$$;
comment on function kakunin.current_cert_serial() is
  'The serial bound to this session if its certificate may be used now, otherwise NULL. In a policy write (select kakunin.current_cert_serial()), which runs once a statement';

create function kakunin.current_agent_id() returns uuid
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text := kakunin.current_cert_serial();
begin
  return (select c.agent_id from kakunin_private.certificates c where c.serial = v_serial);
end
$$;
comment on function kakunin.current_agent_id() is
  'The agent of the certificate bound to this session, or NULL as current_cert_serial(). For kakunin_agent and kakunin_gateway';

create function kakunin.has_scope(scope text) returns boolean
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.current_cert_serial();
  v_scope  text collate "C" := scope;
begin
  -- Exact, or prefix:* in the certificate; never a substring.
  return exists (
    select from kakunin_private.certificates c, unnest(c.permitted_actions) p
     where c.serial = v_serial
       and (p = v_scope
            or (right(p, 2) = ':*' and starts_with(v_scope, left(p, -1)) and length(v_scope) >= length(p))));
end
$$;
comment on function kakunin.has_scope(text) is
  'Whether the bound certificate permits the action, exactly or by prefix:*; false without a binding. For kakunin_agent and kakunin_gateway';

create function kakunin.require_session() returns text
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text := kakunin_private.bound_serial();
begin
  if v_serial is null then
    raise exception using errcode = 'KA004',
      message = 'no certificate is bound to this session',
      hint = 'Bind one in this transaction with kakunin.bind_session(ticket).';
  end if;
  perform kakunin_private.check_certificate(v_serial);
  return v_serial;
end
$$;
comment on function kakunin.require_session() is
  'current_cert_serial(), but where that is NULL the named error says why: KA004, KA001, KA002, KA003 or KA008';

create function kakunin.require_scope(scope text) returns boolean
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text := kakunin.require_session();
begin
  if not kakunin.has_scope(require_scope.scope) then
    raise exception using errcode = 'KA005',
      message = format('certificate %s does not permit %s', v_serial, coalesce(quote_literal(left(require_scope.scope, 128)), 'NULL')),
      hint = 'Have the agent certified for this action, or do not attempt it.';
  end if;
  return true;
end
$$;
comment on function kakunin.require_scope(text) is
  'True where has_scope() is; otherwise raises KA005, or what require_session() raises. For policies that refuse aloud';

-- Making a binding ----------------------------------------------------------------------------------

create function kakunin_private.claims_object(p_claims text) returns jsonb
language plpgsql immutable strict parallel unsafe
as $$
declare
  v_object jsonb := '{}'::jsonb;
begin
  if jsonb_typeof(p_claims::jsonb) = 'object' then
    v_object := p_claims::jsonb;
  end if;
  return v_object;
exception
  when others then return '{}'::jsonb;
end
$$;
comment on function kakunin_private.claims_object(text) is 'The claims as an object; an empty one when the text is not a JSON object';

-- For policies that read the claim, as the product's first ones did. Other claims of the transaction are
-- kept. On a direct connection such a policy can be forged; current_cert_serial() does not read this there.
create function kakunin_private.claims_with(p_claims text, p_serial text) returns text
language sql stable parallel unsafe
return case when p_claims <> '' then (kakunin_private.claims_object(p_claims)
    || jsonb_build_object('kakunin_cert_serial', p_serial))::text
  else '{"kakunin_cert_serial":"' || p_serial || '"}' end;
comment on function kakunin_private.claims_with(text, text) is 'These claims, with kakunin_cert_serial set to the serial';

-- One expression that reads no table: evaluated without the cost of a statement, a third of the whole here.
create function kakunin_private.bind(p_serial text, p_binding text, p_is_local boolean) returns text
language plpgsql volatile parallel unsafe
as $$
begin
  return case when
    set_config('kakunin.session', p_binding, p_is_local) is not null
    and set_config('request.jwt.claims', kakunin_private.claims_with(
      case when p_is_local then current_setting('request.jwt.claims', true) end, p_serial), p_is_local) is not null
    then p_serial end;
end
$$;
comment on function kakunin_private.bind(text, text, boolean) is
  'Puts a binding into effect, for the transaction or, not local, for the session; returns the serial';

-- Runs in every transaction, so key, certificate and the new binding come from one statement, and what
-- refuses is looked for only when something does. The binding is made with the ticket's key: it lasts no
-- longer than the grace of that key.
create function kakunin.bind_session(ticket text, is_local boolean default true) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ticket text collate "C" := ticket;
  v_found  record;
begin
  select c.serial,
         kakunin_private.is_future(split_part(v_ticket, '.', 5)) as fresh,
         kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at) as usable,
         kakunin_private.make_binding(
           k.inner_pad, k.outer_pad,
           k.key_id || '|' || c.serial || case when is_local then '|x|0' else '|s|' || split_part(v_ticket, '.', 5) end,
           is_local) as binding
    into v_found
    from kakunin_private.session_keys k
    join kakunin_private.certificates c on c.serial = split_part(v_ticket, '.', 3)
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where octet_length(v_ticket) <= 250
     and k.key_id = split_part(v_ticket, '.', 2)
     and kakunin_private.key_is_good(k.key_id, k.valid_until)
     and kakunin_private.ticket_is_genuine(k.inner_pad, k.outer_pad, v_ticket);
  if v_found.fresh and v_found.usable and is_local is not null then
    return kakunin_private.bind(v_found.serial, v_found.binding, is_local);
  elsif is_local is null then
    raise exception using errcode = 'KA010', message = 'is_local must be true or false';
  elsif v_found.serial is null then
    raise exception using errcode = 'KA004',
      message = 'the ticket was not issued by this database to this login, or its key has been retired',
      hint = 'Open a new session with kakunin.open_session(assertion).';
  elsif not v_found.fresh then
    raise exception using errcode = 'KA004',
      message = 'the ticket has expired',
      hint = 'Open a new session with kakunin.open_session(assertion).';
  end if;
  perform kakunin_private.check_certificate(v_found.serial);
  -- Usable after all: it became so between the two looks.
  return kakunin_private.bind(v_found.serial, v_found.binding, is_local);
end
$$;
comment on function kakunin.bind_session(text, boolean) is
  'Binds this transaction (or, not local, this session until the ticket expires) to the ticket''s certificate and returns its serial. Pass the ticket as a bound parameter only';

create function kakunin.bind_serial(serial text) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial  text := kakunin.normalize_serial(bind_serial.serial);
  v_binding text;
begin
  perform kakunin_private.check_certificate(v_serial);
  select kakunin_private.make_binding(k.inner_pad, k.outer_pad, k.key_id || '|' || v_serial || '|x|0', true)
    into v_binding from kakunin_private.session_keys k
   where k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
  if not found then
    perform kakunin_private.no_session_key();
  end if;
  return kakunin_private.bind(v_serial, v_binding, true);
end
$$;
comment on function kakunin.bind_serial(text) is
  'Binds this transaction to a serial on the caller''s word. For kakunin_gateway: trusted server code that sends no SQL of an agent''s making';

create function kakunin.unbind_session() returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_binding text := current_setting('kakunin.session', true);
  v_claims  text := current_setting('request.jwt.claims', true);
begin
  -- Not local: what a session-wide binding left must go too, and '' is what an unset one reads as.
  perform set_config('kakunin.session', '', false);
  if split_part(v_binding, '|', 3) = 's' then
    perform set_config('request.jwt.claims', '{}', false);
  elsif v_claims <> '' then
    perform set_config('request.jwt.claims', (kakunin_private.claims_object(v_claims) - 'kakunin_cert_serial')::text, true);
  end if;
end
$$;
comment on function kakunin.unbind_session() is 'Takes the binding off this session and this transaction';

-- Opening a session ---------------------------------------------------------------------------------

create function kakunin_private.jwt_part(p_text text) returns jsonb
language plpgsql stable strict parallel unsafe
as $$
declare
  v_object jsonb;
begin
  v_object := convert_from(kakunin_private.base64url_decode(p_text), 'UTF8')::jsonb;
  return case when jsonb_typeof(v_object) = 'object' then v_object end;
exception
  -- Not UTF-8, not JSON, nested too deep, a \u0000: one answer for all, none of them is ours to interpret.
  when others then return null;
end
$$;
comment on function kakunin_private.jwt_part(text) is 'A JWT''s header or claims set as an object, or NULL when it is not one';

create function kakunin_private.numeric_date(p_claims jsonb, p_name text) returns numeric
language sql immutable parallel safe
return case when jsonb_typeof(p_claims -> p_name) = 'number' then (p_claims ->> p_name)::numeric end;
comment on function kakunin_private.numeric_date(jsonb, text) is
  'A NumericDate claim (RFC 7519 section 2), seconds since 1970; NULL when missing or not a number';

create function kakunin.open_session(assertion text) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_leeway    constant integer := 30;   -- seconds a client's clock may run ahead
  c_longest   constant integer := 300;  -- seconds an assertion, and the ticket for it, may live
  c_remedy    constant text :=
    'Make a new one: RS256, kid = certificate serial, aud = kakunin:<installation id>, at most 300 seconds of life.';
  v_assertion text collate "C" := assertion;
  v_parts     text[] collate "C";
  v_header    jsonb;
  v_claims    jsonb;
  v_now       numeric := extract(epoch from kakunin_private.clock());
  v_iat       numeric;
  v_exp       numeric;
  v_serial    text;
  v_agent_id  uuid;
  v_modulus   bytea;
  v_until     numeric;
  v_body      text;
begin
  if current_setting('transaction_read_only')::boolean then
    raise exception 'the assertion is refused: its single use cannot be recorded in a read-only transaction'
      using errcode = 'KA004', hint = 'Open the session on the primary, in a read-write transaction; the ticket also binds on a standby.';
  end if;
  if v_assertion is null or octet_length(v_assertion) > 8192 then
    raise exception 'the assertion is refused: it is missing, or longer than 8192 bytes'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_parts := string_to_array(v_assertion, '.');
  if cardinality(v_parts) <> 3 then
    raise exception 'the assertion is refused: it is not a JWT in compact form'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_header := kakunin_private.jwt_part(v_parts[1]);
  v_claims := kakunin_private.jwt_part(v_parts[2]);
  if v_header is null or v_claims is null then
    raise exception 'the assertion is refused: its header or its claims are not base64url of a JSON object'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_header -> 'alg' is distinct from '"RS256"' then
    raise exception 'the assertion is refused: its alg is not RS256'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_header ? 'crit' then
    raise exception 'the assertion is refused: it has critical header parameters, and none is understood'
      using errcode = 'KA004', hint = c_remedy;  -- RFC 7515 section 4.1.11
  end if;
  if jsonb_typeof(v_header -> 'kid') is distinct from 'string' then
    raise exception 'the assertion is refused: it has no kid naming the certificate'
      using errcode = 'KA004', hint = c_remedy;
  end if;

  v_serial := kakunin.normalize_serial(v_header ->> 'kid');
  select c.agent_id, c.public_key_modulus, extract(epoch from c.not_after)
    into v_agent_id, v_modulus, v_until
    from kakunin_private.certificates c where c.serial = v_serial;
  if not found then
    perform kakunin_private.check_certificate(v_serial);  -- says KA001
  end if;
  -- The signature before anything else that it covers: until it is found right, nobody is told what
  -- state the certificate is in.
  if kakunin_private.rsa_pkcs1_sha256_verify(
       v_modulus, 65537,
       convert_to(v_parts[1] || '.' || v_parts[2], 'UTF8'),
       kakunin_private.base64url_decode(v_parts[3])) is not true then
    raise exception 'the assertion is refused: its signature is not that of the certificate''s key'
      using errcode = 'KA004', hint = c_remedy;
  end if;

  if v_claims -> 'iss' is distinct from to_jsonb('urn:kakunin:agent:' || v_agent_id)
    or v_claims -> 'sub' is distinct from v_claims -> 'iss' then
    raise exception 'the assertion is refused: its iss and sub are not the URN of the certificate''s agent'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  -- RFC 7519 section 4.1.3 allows a list. One with other audiences beside us could be replayed there, so
  -- a list counts only when it names nobody else.
  if v_claims -> 'aud' is distinct from to_jsonb('kakunin:' || kakunin.installation_id())
    and v_claims -> 'aud' is distinct from jsonb_build_array('kakunin:' || kakunin.installation_id()) then
    raise exception 'the assertion is refused: its aud is not this installation'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_iat := kakunin_private.numeric_date(v_claims, 'iat');
  v_exp := kakunin_private.numeric_date(v_claims, 'exp');
  if v_iat is null or v_exp is null or v_exp <= v_iat or v_exp - v_iat > c_longest then
    raise exception 'the assertion is refused: its iat and exp are missing, or more than 300 seconds apart'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_exp <= v_now then
    raise exception 'the assertion is refused: it has expired'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_iat > v_now + c_leeway
    or (v_claims ? 'nbf' and coalesce(kakunin_private.numeric_date(v_claims, 'nbf') > v_now + c_leeway, true)) then
    raise exception 'the assertion is refused: it is not valid yet'
      using errcode = 'KA004', hint = 'Compare the clocks of the agent and of this server.';
  end if;
  if jsonb_typeof(v_claims -> 'jti') is distinct from 'string' or length(v_claims ->> 'jti') not between 16 and 128 then
    raise exception 'the assertion is refused: its jti is not a string of 16 to 128 characters'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  perform kakunin_private.check_certificate(v_serial);

  -- Two exchanges at once: the second waits here for the first to commit, then finds the jti used.
  insert into kakunin_private.used_assertions (serial, jti, expires_at)
  values (v_serial, v_claims ->> 'jti', to_timestamp(v_exp::double precision))
  on conflict do nothing;
  if not found then
    raise exception 'the assertion is refused: it has been used before'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  -- Each exchange sweeps a few expired ones, so the table stays as small as the last minutes' traffic.
  delete from kakunin_private.used_assertions u
   where u.ctid = any (array(
     select e.ctid from kakunin_private.used_assertions e
      where e.expires_at < to_timestamp(v_now::double precision) order by e.expires_at limit 8 for update skip locked));

  v_now := floor(v_now);
  v_body := '.' || v_serial || '.' || v_now || '.' || floor(least(v_now + c_longest, v_until));
  select t.body || '.' || kakunin_private.session_mac(
           k.inner_pad, k.outer_pad, kakunin_private.ticket_context(t.body))
    into v_body
    from kakunin_private.session_keys k, lateral (select 'kkn1.' || k.key_id || v_body as body) t
   where k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
  if not found then
    perform kakunin_private.no_session_key();
  end if;
  return v_body;
end
$$;
comment on function kakunin.open_session(text) is
  'Exchanges an assertion signed by the agent''s key (RFC 7523) for a ticket of at most 300 seconds. Pass it as a bound parameter';

-- Policies: putting row-level security on a table of yours.
--
-- protect() writes what sql/policies/agent_vault.sql shows by hand: one permissive policy that lets a
-- bound session see and change the rows whose serial column equals its own. A role the policy does not
-- name, and a session without a binding, sees no row. With write_scope, three restrictive policies
-- refuse aloud (KA005) any write, by anybody, without a certificate that permits that action.
--
-- Both functions run with their caller's rights: only a table's owner can protect it. They keep no list
-- of their own. The policies in the catalog are the record, so a dump carries it and nothing can drift;
-- the four named in c_policies are theirs. Partitions and inheritance children get the same
-- policies, because a query that names a child goes by the child's policies and not by the parent's.
-- Run protect() again after adding a partition.
--
-- Row security does not cover everything that can be granted. TRUNCATE ignores it, TRIGGER lets the
-- grantee run code on other agents' rows, REFERENCES lets a foreign key probe for them, and MAINTAIN (from
-- 17) lets it lock them away: protect() takes these from the roles it lets in, and unprotect() does not
-- give them back.

create function kakunin.protect(
  target regclass,
  serial_column name default 'permitted_agent_serial',
  roles name[] default '{kakunin_agent,kakunin_gateway}',
  write_scope text default null,
  force boolean default false,
  keep_policies boolean default false
) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies  constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_isolation text;
  v_scope     text;
  v_roles     text;
  v_role      name;
  v_table     record;
  v_other     text;
  v_before    text;
  v_grant     record;
  v_policy    name;
begin
  if protect.target is null or serial_column is null or protect.force is null or keep_policies is null then
    raise exception using errcode = 'KA010',
      message = 'protect() needs a table, a column, and true or false for force and keep_policies';
  end if;
  select r into v_role from unnest(roles) r
   where r is null or (r <> 'public' and not exists (select from pg_roles p where p.rolname = r)) limit 1;
  if found or coalesce(cardinality(roles), 0) = 0 then
    raise exception using errcode = 'KA010',
      message = format('%s is not a role the policies can name', coalesce(quote_ident(v_role), 'NULL')),
      hint = 'Give the roles agents have, such as {kakunin_agent}.';
  end if;
  if (current_setting('server_version_num')::integer < case current_setting('server_version_num')::integer / 10000
        when 15 then 150020 when 16 then 160016 when 17 then 170012 when 18 then 180007 else 0 end) then
    raise warning 'kakunin.protect: Postgres % gives rows that policies hide to the WHERE of INSERT ... ON CONFLICT DO UPDATE (CVE-2026-120154)',
      current_setting('server_version')
      using hint = 'Update to 15.20, 16.16, 17.12, 18.7 or later, or put the serial column into every unique key.';
  end if;
  if write_scope is not null and write_scope !~ '^[A-Za-z0-9_.:/-]{1,128}$' then
    raise exception using errcode = 'KA010',
      message = 'write_scope is 1 to 128 characters from A-Z a-z 0-9 _ . : / -';
  end if;
  select string_agg(quote_ident(r), ', ') into v_roles from unnest(roles) r;
  v_isolation := format('%I = (select kakunin.current_cert_serial())', serial_column);
  v_scope := format('(select kakunin.require_scope(%L))', write_scope);

  for v_table in
    with recursive family as (
      select protect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid, c.relkind, c.relacl, c.relowner, c.relrowsecurity, c.relforcerowsecurity,
           a.attnum, coalesce(nullif(t.typbasetype, 0), t.oid) as column_type, l.collisdeterministic
      from family f
      join pg_class c on c.oid = f.relid
      left join pg_attribute a on a.attrelid = c.oid and a.attname = serial_column and a.attnum > 0 and not a.attisdropped
      left join pg_type t on t.oid = a.atttypid
      left join pg_collation l on l.oid = a.attcollation
     order by c.oid
  loop
    if v_table.relkind not in ('r', 'p') then
      raise exception using errcode = 'KA010',
        message = format('%s is not a table, and only a table can have row-level security', v_table.name),
        hint = 'Protect the tables below it; make views over them with security_invoker = true.';
    end if;
    if v_table.attnum is null or v_table.column_type not in ('text'::regtype, 'varchar'::regtype) then
      raise exception using errcode = 'KA010',
        message = format('%s has no column %I of type text or varchar', v_table.name, serial_column),
        hint = 'Add it, or name the column that holds the serial of the agent a row belongs to.';
    end if;
    if not v_table.collisdeterministic then
      raise exception using errcode = 'KA010',
        message = format('the column %I of %s has a nondeterministic collation, under which two serials may be equal',
          serial_column, v_table.name),
        hint = 'Give it collate "C".';
    end if;
    -- Turned on by ALTER TABLE ... FORCE earlier and asleep until now: enabling would bind the owner too.
    if v_table.relforcerowsecurity and not protect.force then
      raise exception using errcode = 'KA010',
        message = format('row security is forced on %s, so its owner would see only rows of a bound certificate', v_table.name),
        hint = 'Say force => true if that is meant, or ALTER TABLE ... NO FORCE ROW LEVEL SECURITY first.';
    end if;
    select string_agg(quote_ident(p.polname), ', ' order by p.polname) into v_other
      from pg_policy p
     where p.polrelid = v_table.oid and p.polpermissive and p.polname <> all (c_policies);
    if v_other is not null and not keep_policies then
      raise exception using errcode = 'KA010',
        message = format('%s has permissive policies that would let rows through beside this one: %s', v_table.name, v_other),
        hint = 'Drop them or make them restrictive; if they are meant to widen access, say keep_policies => true.';
    end if;

    -- How the table stood before the first protect(), which a repeated one must not forget.
    select substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+, [a-z]+)[.]') into v_before
      from pg_policy p where p.polrelid = v_table.oid and p.polname = 'kakunin_isolation';
    v_before := coalesce(v_before,
      case when v_table.relrowsecurity then 'on' else 'off' end || ', '
      || case when v_table.relforcerowsecurity then 'forced' else 'unforced' end);

    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    execute format('create policy kakunin_isolation on %s for all to %s using (%s) with check (%3$s)',
      v_table.name, v_roles, v_isolation);
    execute format('comment on policy kakunin_isolation on %s is %L', v_table.name,
      format('Written by kakunin.protect(): rows of the bound certificate only. Row security before: %s.', v_before));
    if write_scope is not null then
      -- To public, not to the roles: a member of a role can DROP OWNED BY it, which takes the role out of
      -- policies. Out of the permissive one that closes; out of a restrictive one it would open.
      execute format('create policy kakunin_insert_scope on %s as restrictive for insert to public with check (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_update_scope on %s as restrictive for update to public using (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_delete_scope on %s as restrictive for delete to public using (%s)',
        v_table.name, v_scope);
    end if;
    execute format('alter table %s enable row level security, %s force row level security',
      v_table.name, case when protect.force then '' else 'no' end);

    -- Everybody who may be an agent and holds one of them, directly, through another role or on a column.
    for v_grant in
      select coalesce(r.rolname, 'public') as grantee, pg_get_userbyid(g.grantor) as grantor,
             g.grantor = v_table.relowner as by_owner,
             string_agg(distinct lower(g.privilege_type), ', ') as privileges
        from (select (aclexplode(v_table.relacl)).*
              union all
              select (aclexplode(a.attacl)).* from pg_attribute a where a.attrelid = v_table.oid) g
        left join pg_roles r on r.oid = g.grantee
       where g.privilege_type in ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
         and g.grantee <> v_table.relowner
         and not coalesce(r.rolsuper, false)
         and (g.grantee = 0 or 'public' = any (roles)
              or exists (
                select from pg_roles m, unnest(roles) n
                 where not m.rolsuper and pg_has_role(m.oid, n, 'MEMBER') and pg_has_role(m.oid, g.grantee, 'MEMBER')))
       group by 1, 2, 3
       order by 1, 2
    loop
      if not v_grant.by_owner then
        raise exception using errcode = 'KA010',
          message = format('%I has %s on %s from %I, and row security does not cover that',
            v_grant.grantee, v_grant.privileges, v_table.name, v_grant.grantor),
          hint = format('First: revoke %s on %s from %I cascade', v_grant.privileges, v_table.name, v_grant.grantor);
      end if;
      execute format('revoke %s on %s from %I', v_grant.privileges, v_table.name, v_grant.grantee);
      raise notice 'kakunin.protect: revoked % on % from %: row security does not cover that',
        v_grant.privileges, v_table.name, v_grant.grantee;
    end loop;
    if not exists (select from pg_index x where x.indrelid = v_table.oid and x.indkey[0] = v_table.attnum and x.indpred is null) then
      raise notice 'kakunin.protect: no index on % begins with %, so every query reads the whole table', v_table.name, serial_column;
    end if;
  end loop;
end
$$;
comment on function kakunin.protect(regclass, name, name[], text, boolean, boolean) is
  'Enables row-level security on a table and its partitions, so that the named roles see and change only rows whose serial_column is that of their bound certificate. write_scope: writes need that scope as well; force: the owner is bound too; keep_policies: other permissive policies may widen access. Can be repeated. For the table''s owner';

create function kakunin.unprotect(target regclass) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_table    record;
  v_policy   name;
begin
  if unprotect.target is null then
    raise exception using errcode = 'KA010', message = 'unprotect() needs a table';
  end if;
  for v_table in
    with recursive family as (
      select unprotect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+), [a-z]+[.]') as enabled_before,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: [a-z]+, ([a-z]+)[.]') as forced_before
      from family f
      join pg_class c on c.oid = f.relid
      join pg_policy p on p.polrelid = c.oid and p.polname = 'kakunin_isolation'
     order by c.oid
  loop
    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    -- Without the comment nobody knows how it stood, and then closed is the safe answer.
    if v_table.forced_before = 'unforced' then
      execute format('alter table %s no force row level security', v_table.name);
    end if;
    if exists (select from pg_policy p where p.polrelid = v_table.oid) then
      raise notice 'kakunin.unprotect: % keeps row security on, for its other policies', v_table.name;
    elsif v_table.enabled_before = 'off' then
      execute format('alter table %s disable row level security', v_table.name);
      raise notice 'kakunin.unprotect: row security is off on %, so privileges alone decide who reads it', v_table.name;
    end if;
  end loop;
end
$$;
comment on function kakunin.unprotect(regclass) is
  'Takes away what protect() put on a table and its partitions, and leaves row security as it stood before, privileges as they are now. For the table''s owner';

-- Privileges: who may call what, all in one place.
--
-- PUBLIC may call nothing. What a role may call is named here and nowhere else; a function that is not
-- listed belongs to the owner alone: set_gateway_logins(), because who may say whose claims are believed can
-- become any agent, and renew_installation(), which is for a copy of a database.

revoke all on all functions in schema kakunin, kakunin_private from public;

grant usage on schema kakunin to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant execute on function kakunin.installation_id(), kakunin.normalize_serial(text) to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

-- Proof, and what policies ask. The gateway runs statements under policies too.
grant execute on function
  kakunin.open_session(text), kakunin.bind_session(text, boolean), kakunin.unbind_session(),
  kakunin.current_cert_serial(), kakunin.current_agent_id(),
  kakunin.has_scope(text), kakunin.require_session(), kakunin.require_scope(text)
  to kakunin_agent, kakunin_gateway;

grant execute on function kakunin.bind_serial(text) to kakunin_gateway;

grant execute on function
  kakunin.create_agent(text, text),
  kakunin.register_certificate(uuid, bytea, text, bytea, timestamptz, timestamptz, text[])
  to kakunin_registrar;

grant select on kakunin.agents, kakunin.certificates to kakunin_registrar, kakunin_operator, kakunin_auditor;

-- protect() and unprotect() run with the caller's rights: the privilege alone protects no table. An owner of
-- tables who is no operator is granted the two, and USAGE on schema kakunin, by name.
grant execute on function
  kakunin.revoke_certificate(text, text), kakunin.suspend_agent(uuid, text), kakunin.reinstate_agent(uuid),
  kakunin.rotate_session_key(interval),
  kakunin.protect(regclass, name, name[], text, boolean, boolean), kakunin.unprotect(regclass)
  to kakunin_operator;

