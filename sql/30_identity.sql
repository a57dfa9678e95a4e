-- Identity: certificate authorities, agents and their X.509 certificates.
--
-- Postgres checks the certificate. trust_ca() pins a certificate authority by its certificate; from then on
-- register_certificate() takes the DER of an agent's certificate and nothing else, verifies that a pinned
-- key signed it, and takes every field from what was signed. So a login with kakunin_registrar can register
-- what the authority issued, and cannot make an identity, widen a scope or extend a validity.
--
-- An agent is a row; what it may do is in its certificate. A certificate row is never edited to mean
-- something else: the only change it ever sees is its revocation, which is final. Suspension is the
-- agent's, can be lifted, and stops every certificate the agent has. Both take effect at the next
-- statement of every session, because current_cert_serial() looks here each time it is asked.
--
-- An agent has one active certificate. Registering the next one says for how long the one before it still
-- counts: its revocation is written at once, with a time that lies ahead.
--
-- A serial has one text form everywhere, that of the X-Kakunin-Cert-Serial header: upper-case hex bytes
-- joined by colons, no leading zero byte (3A:F2:91:CC).

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
  'The canonical form of a certificate serial, 3A:F2:91:CC, from any common hexadecimal form; KA010 for anything else. For all the kit''s roles';

create table kakunin_private.agents (
  agent_id         uuid primary key default gen_random_uuid(),
  name             text not null check (length(name) between 1 and 200),
  tenant           text check (length(tenant) between 1 and 200),
  model            text check (length(model) between 1 and 200),
  model_version    text check (length(model_version) between 1 and 200),
  model_hash       text collate "C" check (model_hash ~ '^sha256:[0-9a-f]{64}$'),
  created_at       timestamptz not null default now(),
  suspended_at     timestamptz,
  suspended_reason text,
  risk_exempt      boolean not null default false,
  risk_factor      double precision not null default 1 check (risk_factor between 0.1 and 10),
  risk_epoch       integer not null default 0,
  reinstated_at    timestamptz,
  check ((suspended_at is null) = (suspended_reason is null)),
  check (model is not null or model_hash is null)
);
comment on table kakunin_private.agents is 'One row an agent. Suspension stops all its certificates and can be lifted';
comment on column kakunin_private.agents.risk_exempt is 'Scored, but nothing follows from it';
comment on column kakunin_private.agents.risk_factor is 'What its excess is multiplied by: above 1 it is judged more severely';
comment on column kakunin_private.agents.risk_epoch is 'Counts reinstatements: what was scored before the last one is not held against it';
comment on column kakunin_private.agents.reinstated_at is 'The last one: drift is of what came after it';
comment on column kakunin_private.agents.model_hash is
  'What the agent is to run, as compute_model_hash() gives it; a certificate for another is not registered';

create table kakunin_private.authorities (
  key_id             text collate "C" primary key check (key_id ~ '^[0-9A-F]{2}(:[0-9A-F]{2}){7,31}$'),
  der                bytea not null,
  serial             text collate "C" not null,
  subject            bytea not null,
  issuer_key_id      text collate "C" not null references kakunin_private.authorities,
  public_key_modulus bytea not null,
  not_before         timestamptz not null,
  not_after          timestamptz not null,
  path_length        integer,
  trusted_at         timestamptz not null default now(),
  trusted_by         name not null,
  distrusted_at      timestamptz,
  distrust_reason    text,
  check ((distrusted_at is null) = (distrust_reason is null))
);
comment on table kakunin_private.authorities is
  'Pinned certificate authorities. A root is its own issuer; an intermediate is below one that was pinned before it';
comment on column kakunin_private.authorities.key_id is 'The subject key identifier (RFC 5280 section 4.2.1.2), which certificates name their issuer by';
comment on column kakunin_private.authorities.path_length is
  'How many authorities may be below it, the constraints of those above it included; NULL is any number';

create table kakunin_private.certificates (
  serial             text collate "C" primary key check (serial ~ '^[0-9A-F]{2}(:[0-9A-F]{2}){0,19}$'),
  agent_id           uuid not null references kakunin_private.agents,
  issuer_key_id      text collate "C" not null references kakunin_private.authorities,
  der                bytea not null check (octet_length(der) between 1 and 16384),
  public_key_modulus bytea not null,
  not_before         timestamptz not null,
  not_after          timestamptz not null check (not_after > not_before),
  model              text,
  model_hash         text collate "C",
  permitted_actions  text[] collate "C" not null,
  tenant             text,
  financial_scope    jsonb,
  registered_at      timestamptz not null default now(),
  registered_by      name not null,
  revoked_at         timestamptz,
  revocation_reason  text,
  check ((revoked_at is null) = (revocation_reason is null))
);
create index certificates_agent_id on kakunin_private.certificates (agent_id);
create index certificates_public_key_modulus on kakunin_private.certificates (public_key_modulus);
create index certificates_revoked on kakunin_private.certificates (issuer_key_id) where revoked_at is not null;
comment on table kakunin_private.certificates is
  'Certificates the kit accepts, each signed by a pinned authority. Rows are added by register_certificate, changed only by revocation, never deleted';
comment on column kakunin_private.certificates.permitted_actions is
  'Scopes the certificate carries; has_scope() reads them. prefix:* covers every action below prefix:';
comment on column kakunin_private.certificates.public_key_modulus is
  'RSA modulus, big-endian; the public exponent is always 65537';
comment on column kakunin_private.certificates.revoked_at is
  'From this moment on it is revoked. It lies ahead where another certificate takes its place after an overlap';

-- Written in the agent's own transaction, which may stay open: so it locks nothing that an operator's decision needs, nor
-- another transaction of the agent, each of which has a chain of its own.
create table kakunin_private.risk_stops (
  agent_id   uuid not null,
  chain_id   bigint not null,
  stopped_at timestamptz not null,
  reason     text not null,
  primary key (agent_id, chain_id)
);
comment on table kakunin_private.risk_stops is
  'Agents that their own score has revoked (62_risk.sql), until settle_risk() has revoked their certificates. No foreign key: checking one locks the agent''s row';

-- Stops: a transaction that keeps its snapshot (REPEATABLE READ, SERIALIZABLE) does not see a revocation
-- committed since, and SET TRANSACTION SNAPSHOT hands an old snapshot to ever new transactions. But names in
-- the catalog are looked up as committed, whatever the snapshot. So every revocation, suspension and
-- retired session key also leaves a name there, and is asked for it in such transactions only. The name is a
-- domain's, because making one takes no lock that an agent's own DDL could hold against a revocation. The longest
-- is that of a serial with 'end ' before it: 63 bytes, and no name may be longer.
-- A reinstatement takes the suspension's name away, and leaves one that carries its number: what a snapshot from before
-- it shows of the agent's risk is of the epoch before, and counted by nobody.
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
  'Makes known beyond snapshots a revocation (name: serial), one that lies ahead (end and the serial), a suspension (agent id), a stop by risk (risk and the agent id), a reinstatement (epoch, the agent id and its number), a retired session key (key and its id) or that risk is observed alone (risk observed)';

create function kakunin_private.is_stopped(p_name text) returns boolean
language sql stable parallel safe
return to_regtype('kakunin_private.' || quote_ident(p_name)) is not null;
comment on function kakunin_private.is_stopped(text) is 'Whether stop() was committed for this name, whatever the snapshot shows';

create function kakunin_private.snapshot_is_fresh() returns boolean
language sql stable parallel safe
return current_setting('transaction_isolation') in ('read committed', 'read uncommitted');
comment on function kakunin_private.snapshot_is_fresh() is
  'Whether each statement takes a snapshot of its own, so that what it sees is what is committed';

create function kakunin_private.check_snapshot_is_fresh(p_what text) returns void
language plpgsql stable parallel safe
as $$
begin
  if not kakunin_private.snapshot_is_fresh() then
    raise exception using errcode = 'KA010',
      message = format('%s is for READ COMMITTED transactions: in this one (%s) it might miss what was decided since it began',
        p_what, current_setting('transaction_isolation')),
      hint = 'Begin the transaction READ COMMITTED.';
  end if;
end
$$;
comment on function kakunin_private.check_snapshot_is_fresh(text) is 'KA010 where what is committed may differ from what this transaction sees';

create function kakunin_private.is_reinstated_since(p_agent_id uuid) returns boolean
language sql stable parallel safe
begin atomic
  select exists (
    select from kakunin_private.agents a
     where a.agent_id = p_agent_id and kakunin_private.is_stopped('epoch ' || p_agent_id || ' ' || a.risk_epoch + 1));
end;
comment on function kakunin_private.is_reinstated_since(uuid) is
  'Whether the agent was reinstated after this transaction took its snapshot';

-- A snapshot taken before a revocation that lies ahead was written shows none, and cannot tell when it comes: refused.
create function kakunin_private.is_stopped_since(p_serial text, p_revoked_at timestamptz, p_agent_id uuid) returns boolean
language plpgsql stable parallel safe
as $$
begin
  -- First the one that settle() replaces by the others: between two looks it may do so.
  return kakunin_private.is_stopped('risk ' || p_agent_id)
    or kakunin_private.is_stopped(p_serial) or kakunin_private.is_stopped(p_agent_id::text)
    or (p_revoked_at is null and kakunin_private.is_stopped('end ' || p_serial))
    or kakunin_private.is_reinstated_since(p_agent_id);
end
$$;
comment on function kakunin_private.is_stopped_since(text, timestamptz, uuid) is
  'Whether certificate or agent was stopped, or the agent reinstated, after this transaction took its snapshot. Apart from is_usable() because whatever is inlined there costs every statement, and few transactions keep their snapshot';

-- The one definition of "this certificate may be used now"; bind and every statement's check share it.
-- notAfter is the last moment of validity, not the first one after it (RFC 5280 section 4.1.2.5).
-- Plain columns, not row types, so that the planner can inline it.
create function kakunin_private.is_usable(
  p_serial text, p_revoked_at timestamptz, p_not_before timestamptz, p_not_after timestamptz,
  p_agent_id uuid, p_suspended_at timestamptz
) returns boolean
language sql volatile parallel safe
return coalesce(p_revoked_at > kakunin_private.clock(), true)
   and p_suspended_at is null
   and kakunin_private.clock() between p_not_before and p_not_after
   and (kakunin_private.snapshot_is_fresh() or not kakunin_private.is_stopped_since(p_serial, p_revoked_at, p_agent_id));
comment on function kakunin_private.is_usable(text, timestamptz, timestamptz, timestamptz, uuid, timestamptz) is
  'Certificate not revoked, agent not suspended, and now inside the validity';

create function kakunin_private.check_certificate(p_serial text) returns void
language plpgsql volatile parallel restricted
as $$
declare
  v_certificate kakunin_private.certificates;
  v_agent       kakunin_private.agents;
  v_risk        text;
  v_now         timestamptz := kakunin_private.clock();
begin
  perform kakunin_private.check_replica();
  select * into v_certificate from kakunin_private.certificates c where c.serial = p_serial;
  if not found then
    raise exception using errcode = 'KA001',
      message = format('certificate %s is not registered here', p_serial),
      hint = 'Register it with kakunin.register_certificate(der), or check that this is the right database.';
  end if;
  select * into v_agent from kakunin_private.agents a where a.agent_id = v_certificate.agent_id;
  select r.reason into v_risk from kakunin_private.risk_stops r where r.agent_id = v_certificate.agent_id order by r.stopped_at limit 1;
  if v_risk is not null or v_certificate.revoked_at <= v_now or kakunin_private.is_stopped('risk ' || v_certificate.agent_id) or kakunin_private.is_stopped(p_serial)
    or (v_certificate.revoked_at is null and not kakunin_private.snapshot_is_fresh()
        and kakunin_private.is_stopped('end ' || p_serial)) then
    raise exception using errcode = 'KA002',
      message = format('certificate %s was revoked: %s', p_serial,
        coalesce(v_risk, v_certificate.revocation_reason, 'after this transaction took its snapshot')),
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
  elsif not kakunin_private.snapshot_is_fresh() and kakunin_private.is_reinstated_since(v_agent.agent_id) then
    raise exception using errcode = 'KA008',
      message = format('agent %s was reinstated after this transaction took its snapshot', v_agent.agent_id),
      hint = 'Begin another transaction.';
  end if;
end
$$;
comment on function kakunin_private.check_certificate(text) is
  'Returns when the certificate may be used now; otherwise KA001, KA002, KA003 or KA008 says why not';

create function kakunin_private.check_text(p_what text, p_value text, p_max integer) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_value text collate "C" := p_value;
begin
  if v_value is null or v_value !~ '[^[:space:]]' or length(v_value) > p_max then
    raise exception using errcode = 'KA010',
      message = format('%s must be 1 to %s characters', p_what, p_max);
  end if;
  return v_value;
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

create function kakunin_private.check_model_hash(p_value text) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_value text collate "C" := lower(p_value);
begin
  if v_value !~ '^sha256:[0-9a-f]{64}$' then
    raise exception using errcode = 'KA010',
      message = 'a model hash is sha256: and 64 hexadecimal digits',
      hint = 'compute_model_hash() in Python, or kakunin-db model-hash, makes one.';
  end if;
  return v_value;
end
$$;
comment on function kakunin_private.check_model_hash(text) is 'The hash in lower case, or KA010; NULL for NULL';

-- Authorities ------------------------------------------------------------------------------------------

-- The authority whose key made this signature, as far as what it signs lies inside its own certificate.
create function kakunin_private.issuer_of(p_certificate kakunin_private.x509_certificate) returns kakunin_private.authorities
language plpgsql volatile parallel restricted
as $$
declare
  c_what      constant text := 'the certificate';
  v_now       constant timestamptz := kakunin_private.clock();
  v_authority kakunin_private.authorities;
begin
  perform kakunin_private.check_snapshot_is_fresh('trusting or registering a certificate');
  if p_certificate.authority_key_id is null then
    perform kakunin_private.refuse(c_what, 'it does not name the key that signed it (authorityKeyIdentifier)');
  end if;
  -- The lock makes distrust_ca() wait for this transaction, or this one for it: distrust reaches all there is.
  select * into v_authority from kakunin_private.authorities a
   where a.key_id = p_certificate.authority_key_id and a.distrusted_at is null
     for key share;
  if not found then
    perform kakunin_private.refuse(c_what,
      format('the authority with key id %s is not trusted here', p_certificate.authority_key_id),
      'An operator pins it with kakunin.trust_ca(der), if it is to be trusted.');
  end if;
  if not kakunin_private.rsa_pkcs1_sha256_verify(
    v_authority.public_key_modulus, 65537, p_certificate.tbs, p_certificate.signature) then
    perform kakunin_private.refuse(c_what, 'its signature is not that of the authority it names');
  end if;
  if v_authority.subject <> p_certificate.issuer then
    perform kakunin_private.refuse(c_what, 'its issuer is not the subject of the authority that signed it');
  end if;
  if v_now not between v_authority.not_before and v_authority.not_after
    or p_certificate.not_before < v_authority.not_before or p_certificate.not_after > v_authority.not_after then
    perform kakunin_private.refuse(c_what, 'its validity is not inside that of its authority, or the authority''s has ended',
      'Issue it for a shorter time, or renew the authority''s certificate.');
  end if;
  return v_authority;
end
$$;
comment on function kakunin_private.issuer_of(kakunin_private.x509_certificate) is
  'The trusted authority that signed this certificate; KA010 when there is none, or its constraints forbid it';

create function kakunin.trust_ca(der bytea) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what   constant text := 'the certificate';
  v_ca     kakunin_private.x509_certificate := kakunin_private.x509_read_certificate(trust_ca.der);
  v_issuer kakunin_private.authorities;
  v_length integer;
  v_value  bytea;
begin
  perform kakunin_private.x509_check_critical(v_ca.extensions, '{2.5.29.15,2.5.29.19}', c_what);
  if not v_ca.ca or not exists (select from unnest(v_ca.extensions) x where x.oid = '2.5.29.19' and x.critical) then
    perform kakunin_private.refuse(c_what, 'it is not that of an authority (basicConstraints, critical, with cA)');
  end if;
  if coalesce(v_ca.key_usage & 6, 0) <> 6 then
    perform kakunin_private.refuse(c_what, 'its keyUsage lacks keyCertSign or cRLSign');
  end if;
  if v_ca.key_id is null then
    perform kakunin_private.refuse(c_what, 'it has no subjectKeyIdentifier of its own');
  end if;
  -- Constraints that other verifiers would apply to what it signs, and that are not applied here.
  if exists (select from unnest(v_ca.extensions) x where x.oid in ('2.5.29.30', '2.5.29.36', '2.5.29.54')) then
    perform kakunin_private.refuse(c_what, 'name and policy constraints are not understood here');
  end if;
  v_value := kakunin_private.x509_extension_value(v_ca.extensions, '2.5.29.37');
  if v_value is not null
    and not kakunin_private.der_children(v_value, 48, 'extKeyUsage')
      && array[decode('06082b06010505070302', 'hex'), decode('0604551d2500', 'hex')] then  -- clientAuth, any
    perform kakunin_private.refuse(c_what, 'its extKeyUsage does not have clientAuth');
  end if;
  if exists (select from kakunin_private.authorities a where a.public_key_modulus = v_ca.modulus and a.key_id <> v_ca.key_id)
    or exists (select from kakunin_private.certificates c where c.public_key_modulus = v_ca.modulus)
    or exists (select from kakunin_private.ledger_keys k where k.public_key_modulus = v_ca.modulus) then
    perform kakunin_private.refuse(c_what, 'its key is that of another authority here, of an agent or of the ledger');
  end if;
  v_length := v_ca.path_length;
  if v_ca.subject = v_ca.issuer then
    if v_ca.authority_key_id <> v_ca.key_id
      or not kakunin_private.rsa_pkcs1_sha256_verify(v_ca.modulus, 65537, v_ca.tbs, v_ca.signature) then
      perform kakunin_private.refuse(c_what, 'it says that it signed itself, and its key did not');
    end if;
  else
    v_issuer := kakunin_private.issuer_of(v_ca);
    if v_issuer.path_length = 0 then
      perform kakunin_private.refuse(c_what, 'the authority that signed it may have none below it (pathLenConstraint 0)');
    end if;
    v_length := least(v_length, v_issuer.path_length - 1);
  end if;
  if kakunin_private.clock() not between v_ca.not_before and v_ca.not_after then
    perform kakunin_private.refuse(c_what, 'it has expired, or is not valid yet');
  end if;
  insert into kakunin_private.authorities as a
    (key_id, der, serial, subject, issuer_key_id, public_key_modulus, not_before, not_after, path_length, trusted_by)
  values
    (v_ca.key_id, trust_ca.der, v_ca.serial, v_ca.subject, coalesce(v_issuer.key_id, v_ca.key_id), v_ca.modulus,
     v_ca.not_before, v_ca.not_after, v_length, session_user)
  on conflict on constraint authorities_pkey do update
    set der = excluded.der, serial = excluded.serial, issuer_key_id = excluded.issuer_key_id,
        not_before = excluded.not_before, not_after = excluded.not_after, path_length = excluded.path_length,
        trusted_at = now(), trusted_by = session_user
    where a.distrusted_at is null and a.subject = excluded.subject and a.public_key_modulus = excluded.public_key_modulus;
  if not found then
    perform kakunin_private.refuse(c_what,
      format('key id %s is that of another authority here, or of one no longer trusted', v_ca.key_id),
      'Distrust is final. Make an authority with a new key.');
  end if;
  perform kakunin_private.record('authority.trusted', null, jsonb_build_object(
    'key_id', v_ca.key_id, 'serial', v_ca.serial, 'sha256', encode(sha256(trust_ca.der), 'hex')));
  return v_ca.key_id;
end
$$;
comment on function kakunin.trust_ca(bytea) is
  'Pins a certificate authority by its certificate (DER) and returns its key id: a root, or an intermediate below one that is pinned. Its renewal, same key and subject, replaces it. For kakunin_operator';

-- Agents ---------------------------------------------------------------------------------------------

create function kakunin.create_agent(
  name text, tenant text default null, model text default null, model_version text default null, model_hash text default null
) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_agent_id uuid;
begin
  if create_agent.model is null and create_agent.model_hash is not null then
    raise exception using errcode = 'KA010', message = 'a model hash is that of a model, and none is named',
      hint = 'Give the model with it.';
  end if;
  insert into kakunin_private.agents (name, tenant, model, model_version, model_hash)
  values (
    kakunin_private.check_text('an agent''s name', create_agent.name, 200),
    case when create_agent.tenant is not null
      then kakunin_private.check_text('a tenant', create_agent.tenant, 200) end,
    case when create_agent.model is not null
      then kakunin_private.check_text('a model', create_agent.model, 200) end,
    case when create_agent.model_version is not null
      then kakunin_private.check_text('a model''s version', create_agent.model_version, 200) end,
    kakunin_private.check_model_hash(create_agent.model_hash))
  returning agent_id into v_agent_id;
  perform kakunin_private.record('agent.created', v_agent_id, jsonb_build_object(
    'name', create_agent.name, 'tenant', create_agent.tenant, 'model', create_agent.model,
    'model_version', create_agent.model_version, 'model_hash', lower(create_agent.model_hash)));
  return v_agent_id;
end
$$;
comment on function kakunin.create_agent(text, text, text, text, text) is
  'Makes an agent and returns its id. It can do nothing until a certificate is registered for it. For kakunin_registrar';

create function kakunin.update_agent(
  agent_id uuid, name text default null, tenant text default null,
  model text default null, model_version text default null, model_hash text default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_hash    text collate "C" := kakunin_private.check_model_hash(update_agent.model_hash);
  v_serials text[];
begin
  perform kakunin_private.lock_agent(update_agent.agent_id);
  if v_hash is not null and update_agent.model is null
    and exists (select from kakunin_private.agents a where a.agent_id = update_agent.agent_id and a.model is null) then
    raise exception using errcode = 'KA010', message = 'a model hash is that of a model, and none is named',
      hint = 'Give the model with it.';
  end if;
  update kakunin_private.agents a
     set name = coalesce(kakunin_private.check_text('an agent''s name', coalesce(update_agent.name, a.name), 200), a.name),
         tenant = case when update_agent.tenant is not null
           then kakunin_private.check_text('a tenant', update_agent.tenant, 200) else a.tenant end,
         model = case when update_agent.model is not null
           then kakunin_private.check_text('a model', update_agent.model, 200) else a.model end,
         model_version = case when update_agent.model_version is not null
           then kakunin_private.check_text('a model''s version', update_agent.model_version, 200) else a.model_version end,
         model_hash = coalesce(v_hash, a.model_hash)
   where a.agent_id = update_agent.agent_id;
  -- What a certificate says of the agent is no longer so: RFC 5280 calls that affiliationChanged.
  select coalesce(array_agg(c.serial order by c.serial), '{}') into v_serials
    from kakunin_private.certificates c join kakunin_private.agents a on a.agent_id = c.agent_id
   where c.agent_id = update_agent.agent_id
     and coalesce(c.revoked_at > kakunin_private.clock(), true) and c.not_after >= kakunin_private.clock()
     and ((v_hash is not null and c.model_hash is distinct from v_hash)
          or (update_agent.model is not null and c.model is distinct from update_agent.model)
          or (update_agent.tenant is not null and c.tenant is distinct from update_agent.tenant));
  perform kakunin_private.record('agent.updated', update_agent.agent_id, jsonb_strip_nulls(jsonb_build_object(
    'name', update_agent.name, 'tenant', update_agent.tenant, 'model', update_agent.model,
    'model_version', update_agent.model_version, 'model_hash', v_hash)));
  perform kakunin_private.revoke(v_serials, 'affiliationChanged');
  return jsonb_build_object(
    'agent_id', update_agent.agent_id,
    'certificates_revoked', to_jsonb(v_serials),
    'next', case when cardinality(v_serials) > 0
      then 'The certificate named another model or tenant and is revoked. Certify the agent anew.' end);
end
$$;
comment on function kakunin.update_agent(uuid, text, text, text, text, text) is
  'Changes what is given; certificates that say otherwise of model, model hash or tenant are revoked with it. Returns agent_id, certificates_revoked and what to do next. For kakunin_registrar and kakunin_operator';

create function kakunin_private.lock_agent(p_agent_id uuid) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- Not FOR UPDATE: a transaction whose snapshot is older than what the one before it did would get that lock
  -- and not see what was done. After an update it fails (40001).
  update kakunin_private.agents a set name = a.name where a.agent_id = p_agent_id;
  perform kakunin_private.check_known_agent(p_agent_id);
end
$$;
comment on function kakunin_private.lock_agent(uuid) is
  'Takes the agent''s row: what decides about all of its certificates happens one after the other. KA010 when there is none';

-- Certificates ---------------------------------------------------------------------------------------

create function kakunin_private.limits() returns text[]
language sql immutable parallel safe
return '{max_single_trade_usd,daily_limit_usd,leverage_permitted,max_leverage_ratio,permitted_venues,permitted_instruments}'::text[];
comment on function kakunin_private.limits() is 'What a financial scope may have: the members that violations() enforces';

create function kakunin_private.unknown_limits(p_scope jsonb) returns text
language sql immutable parallel safe
return (
  select left(string_agg(to_jsonb(k)::text, ', ' order by k collate "C"), 300)
    from jsonb_object_keys(p_scope - kakunin_private.limits()) k);
comment on function kakunin_private.unknown_limits(jsonb) is 'The names in a financial scope that limit nothing, for a message; NULL when there are none';

-- A limit that is misspelt would be none. Asked where a scope comes in, and not by a constraint: rows that are there stay
-- loadable from a dump, and violations() lets them permit nothing.
create function kakunin_private.check_financial_scope(p_scope jsonb) returns jsonb
language plpgsql immutable parallel safe
as $$
declare
  c_what    constant text := 'the financial scope';
  v_unknown text;
begin
  if jsonb_typeof(p_scope) <> 'object' then
    perform kakunin_private.refuse(c_what, 'it is not a JSON object');
  end if;
  v_unknown := kakunin_private.unknown_limits(p_scope);
  if v_unknown is not null then
    perform kakunin_private.refuse(c_what, 'nothing enforces ' || v_unknown,
      format('It may have %s.', array_to_string(kakunin_private.limits(), ', ')));
  end if;
  return p_scope;
end
$$;
comment on function kakunin_private.check_financial_scope(jsonb) is
  'The scope, or KA010 when it is no object or has a member that nothing enforces; NULL for NULL';

create function kakunin_private.financial_scope(p_element bytea) returns jsonb
language plpgsql immutable parallel unsafe
as $$
begin
  return kakunin_private.check_financial_scope(kakunin_private.der_utf8(p_element, 'the financial scope')::jsonb);
exception
  -- no JSON, a number or a text jsonb cannot hold, nested too deep; an escape that 15 cannot convert to this encoding
  when invalid_text_representation or untranslatable_character or numeric_value_out_of_range or program_limit_exceeded
    or feature_not_supported then
    perform kakunin_private.refuse('the financial scope', 'it is not JSON that this database can hold');
    return null;
end
$$;
comment on function kakunin_private.financial_scope(bytea) is 'The financial scope in extension 1.3.6.1.4.1.61411.1.5; KA010 for anything else';

create function kakunin.register_certificate(der bytea, overlap interval default null) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what     constant text := 'the certificate';
  c_once     constant text := 'A serial is used once. Issue a new certificate.';
  v_now      constant timestamptz := kakunin_private.clock();
  v_read     kakunin_private.x509_certificate := kakunin_private.x509_read_certificate(register_certificate.der);
  v_issuer   kakunin_private.authorities := kakunin_private.issuer_of(v_read);
  v_value    bytea;
  v_parts    bytea[];
  v_urn      text collate "C";
  v_agent    kakunin_private.agents;
  v_model    text;
  v_hash     text collate "C";
  v_actions  text[] := '{}'::text[];
  v_tenant   text;
  v_scope    jsonb;
  v_overlap  double precision := extract(epoch from register_certificate.overlap)::double precision;
  v_active   text;
begin
  -- From here on it is known that the authority signed this; what follows is whether it may.
  perform kakunin_private.x509_check_critical(
    v_read.extensions, '{2.5.29.15,2.5.29.17,2.5.29.19,2.5.29.37}', c_what);
  if v_read.ca or coalesce(v_read.key_usage & 134, 0) <> 128 then  -- digitalSignature, and neither keyCertSign nor cRLSign
    perform kakunin_private.refuse(c_what, 'it is not one for signing alone (no cA; keyUsage digitalSignature without keyCertSign and cRLSign)');
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '2.5.29.37');
  if v_value is null
    or decode('06082b06010505070302', 'hex') <> all (kakunin_private.der_children(v_value, 48, 'extKeyUsage'))
    or exists (select from unnest(kakunin_private.der_children(v_value, 48, 'extKeyUsage')) e where get_byte(e, 0) <> 6) then
    perform kakunin_private.refuse(c_what, 'its extKeyUsage does not have clientAuth');
  end if;
  if v_read.not_after - v_read.not_before > interval '365 days' then
    perform kakunin_private.refuse(c_what, 'it is valid for more than 365 days');
  end if;
  if v_read.not_after < v_now then
    perform kakunin_private.refuse(c_what, 'it has expired', 'Issue a new one.');
  end if;

  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.1');
  if v_value is null then
    perform kakunin_private.refuse(c_what, 'it names no agent (extension 1.3.6.1.4.1.61411.1.1)');
  end if;
  v_urn := kakunin_private.der_utf8(v_value, 'the agent''s name');
  if v_urn !~ '^urn:kakunin:agent:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then
    perform kakunin_private.refuse('the agent''s name', 'it is not urn:kakunin:agent:<uuid> in lower case');
  end if;
  -- A reader of the alternative names must not find another agent there.
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '2.5.29.17');
  if v_value is not null and exists (
    select from unnest(kakunin_private.der_children(v_value, 48, 'subjectAltName')) n
     -- [0] and [4] are constructed, the others not; [6] is uniformResourceIdentifier. [3] and [5] nobody reads.
     where get_byte(n, 0) not in (160, 129, 130, 164, 134, 135, 136)
        or (get_byte(n, 0) = 134
            and kakunin_private.der_content(n, 134, 'subjectAltName') <> convert_to(v_urn, 'UTF8'))) then
    perform kakunin_private.refuse('subjectAltName', 'its URI is not the agent''s name, or it has what is no name');
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.2');
  if v_value is not null then
    v_parts := kakunin_private.der_children(v_value, 48, 'the model');
    if cardinality(v_parts) <> 2 then
      perform kakunin_private.refuse('the model', 'it is not a name and a hash');
    end if;
    v_model := kakunin_private.check_text('a model', kakunin_private.der_utf8(v_parts[1], 'the model'), 200);
    v_hash := kakunin_private.check_model_hash(kakunin_private.der_utf8(v_parts[2], 'the model hash'));
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.3');
  if v_value is not null then
    v_parts := kakunin_private.der_children(v_value, 48, 'the permitted actions');
    if cardinality(v_parts) > 256 then
      perform kakunin_private.refuse('the list of permitted actions', 'there are more than 256 of them');
    end if;
    select coalesce(array_agg(kakunin_private.der_utf8(p, 'a permitted action') order by n), '{}') into v_actions
      from unnest(v_parts) with ordinality as u(p, n);
    if exists (select from unnest(v_actions) a
                where a collate "C" !~ '^[A-Za-z0-9_.:/-]{1,128}$' and a collate "C" !~ '^[A-Za-z0-9_.:/-]{1,126}:[*]$') then
      perform kakunin_private.refuse('a permitted action',
        'it is not 1 to 128 characters from A-Z a-z 0-9 _ . : / -',
        'Only a whole last part may be a star, as in trade:*.');
    end if;
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.4');
  if v_value is not null then
    v_tenant := kakunin_private.check_text('a tenant', kakunin_private.der_utf8(v_value, 'the tenant'), 200);
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.5');
  if v_value is not null then
    v_scope := kakunin_private.financial_scope(v_value);
  end if;

  -- The agent's row is locked, so that of two certificates at once the second finds the first.
  perform kakunin_private.lock_agent(right(v_urn, 36)::uuid);
  select * into strict v_agent from kakunin_private.agents a where a.agent_id = right(v_urn, 36)::uuid;
  if v_agent.suspended_at is not null then
    raise exception using errcode = 'KA008',
      message = format('agent %s is suspended: %s', v_agent.agent_id, v_agent.suspended_reason),
      hint = 'After review, an operator lifts it with kakunin.reinstate_agent(); then register the certificate.';
  end if;
  if v_agent.model_hash <> coalesce(v_hash, '') or v_agent.model <> v_model or v_agent.tenant is distinct from v_tenant then
    perform kakunin_private.refuse(c_what, 'its model, its model hash or its tenant is not the agent''s',
      'Certify the agent as it is now, or change it with kakunin.update_agent().');
  end if;
  -- In seconds: months and days compare as if a month had 30 of them, and add as what they are.
  if v_overlap not between 0 and 30 * 86400 then
    raise exception using errcode = 'KA010', message = 'an overlap is 0 to 30 days';
  end if;
  -- The first question, because a certificate given twice is its agent's active one as well; asked again below.
  if exists (select from kakunin_private.certificates c where c.serial = v_read.serial) then
    perform kakunin_private.refuse(c_what, format('serial %s is registered already', v_read.serial), c_once);
  end if;
  select c.serial into v_active from kakunin_private.certificates c
   where c.agent_id = v_agent.agent_id and c.revoked_at is null and c.not_after >= v_now;
  if found and register_certificate.overlap is null then
    perform kakunin_private.refuse(c_what, format('agent %s has an active one already, %s', v_agent.agent_id, v_active),
      'Revoke that, or give the overlap after which it is superseded.');
  end if;
  -- What an authority issued and nobody registered cannot be revoked. So once a later one is here, or was, it is too late.
  if exists (select from kakunin_private.certificates c
              where c.agent_id = v_agent.agent_id and least(c.not_before, c.registered_at) > v_read.not_before) then
    perform kakunin_private.refuse(c_what, format('agent %s has been given a later one already', v_agent.agent_id),
      'Issue a new one.');
  end if;
  if exists (select from kakunin_private.authorities a where a.public_key_modulus = v_read.modulus)
    or exists (select from kakunin_private.certificates c
                where c.public_key_modulus = v_read.modulus and c.revocation_reason = 'keyCompromise')
    or exists (select from kakunin_private.ledger_keys k where k.public_key_modulus = v_read.modulus) then
    perform kakunin_private.refuse(c_what, 'its key is an authority''s, or the ledger''s, or one that was compromised', 'Make a new key.');
  end if;
  insert into kakunin_private.certificates
    (serial, agent_id, issuer_key_id, der, public_key_modulus, not_before, not_after,
     model, model_hash, permitted_actions, tenant, financial_scope, registered_by)
  values
    (v_read.serial, v_agent.agent_id, v_issuer.key_id, register_certificate.der, v_read.modulus, v_read.not_before, v_read.not_after,
     v_model, v_hash, v_actions, v_tenant, v_scope, session_user)
  on conflict on constraint certificates_pkey do nothing;  -- the same serial for another agent, at this moment
  if not found then
    perform kakunin_private.refuse(c_what, format('serial %s is registered already', v_read.serial), c_once);
  end if;
  perform kakunin_private.record('certificate.issued', v_agent.agent_id, jsonb_build_object(
    'serial', v_read.serial, 'sha256', encode(sha256(register_certificate.der), 'hex'), 'issuer_key_id', v_issuer.key_id,
    'not_after', kakunin_private.rfc3339(v_read.not_after)));
  if v_active is not null then
    perform kakunin_private.revoke(
      array[v_active], 'superseded', greatest(v_now, v_read.not_before) + make_interval(secs => v_overlap));
  end if;
  return v_read.serial;
end
$$;
comment on function kakunin.register_certificate(bytea, interval) is
  'Registers a certificate (DER) that a trusted authority signed and returns its serial; all it says is read from what was signed. With an overlap (0 to 30 days) the agent''s active certificate is superseded after it. For kakunin_registrar';

-- Verification -----------------------------------------------------------------------------------------

create function kakunin_private.certificate_status(
  p_serial text, p_revoked_at timestamptz, p_not_before timestamptz, p_not_after timestamptz,
  p_agent_id uuid, p_suspended_at timestamptz
) returns text
language sql volatile parallel safe
return case
  when exists (select from kakunin_private.risk_stops r where r.agent_id = p_agent_id) then 'revoked'
  when kakunin_private.is_usable(p_serial, p_revoked_at, p_not_before, p_not_after, p_agent_id, p_suspended_at) then 'active'
  when p_revoked_at <= kakunin_private.clock() then 'revoked'
  when kakunin_private.clock() < p_not_before then 'not_yet_valid'
  when kakunin_private.clock() > p_not_after then 'expired'
  when p_suspended_at is not null or kakunin_private.is_stopped(p_agent_id::text) then 'suspended'
  else 'revoked'  -- since the snapshot
end;
comment on function kakunin_private.certificate_status(text, timestamptz, timestamptz, timestamptz, uuid, timestamptz) is
  'active where is_usable(), otherwise what it is instead: revoked, not_yet_valid, expired or suspended';

create function kakunin.verify_certificate(serial text) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(verify_certificate.serial);
begin
  perform kakunin_private.check_replica();
  return coalesce((
    select jsonb_build_object(
             'serial_number', c.serial,
             'valid', s.status = 'active',
             'status', s.status,
             'agent_id', a.agent_id,
             'agent_name', a.name,
             'tenant', c.tenant,
             'model', c.model,
             'model_hash', c.model_hash,
             'permitted_actions', to_jsonb(c.permitted_actions),
             'financial_scope', c.financial_scope,
             'not_before', c.not_before,
             'not_after', c.not_after,
             'revoked_at', c.revoked_at,
             'revocation_reason', c.revocation_reason,
             'issuer_key_id', c.issuer_key_id)
      from kakunin_private.certificates c
      join kakunin_private.agents a on a.agent_id = c.agent_id
      cross join lateral (select kakunin_private.certificate_status(
        c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at) as status) s
     where c.serial = v_serial),
    jsonb_build_object('serial_number', v_serial, 'valid', false, 'status', 'unknown'));
end
$$;
comment on function kakunin.verify_certificate(text) is
  'Whether a certificate may be used now (valid), its status (active, revoked, expired, not_yet_valid, suspended, unknown), and what it says of its agent. For all the kit''s roles';

create function kakunin.certificate_der(serial text) returns bytea
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(certificate_der.serial);
begin
  return (select c.der from kakunin_private.certificates c where c.serial = v_serial);
end
$$;
comment on function kakunin.certificate_der(text) is
  'A registered certificate, whatever its status, or NULL: for who checks signatures of its key outside the database. For all the kit''s roles';

create function kakunin.verify_message(serial text, payload bytea, signature bytea) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_certificate jsonb := kakunin.verify_certificate(verify_message.serial);
  v_modulus     bytea;
  v_genuine     boolean := false;
begin
  if payload is null or signature is null then
    raise exception using errcode = 'KA010', message = 'a payload and its signature are both needed';
  end if;
  select c.public_key_modulus into v_modulus from kakunin_private.certificates c
   where c.serial = v_certificate ->> 'serial_number';
  if found then
    v_genuine := kakunin_private.rsa_pkcs1_sha256_verify(v_modulus, 65537, payload, signature);
  end if;
  return jsonb_build_object(
    'valid', v_genuine and (v_certificate -> 'valid')::boolean,
    'signature_valid', v_genuine,
    'certificate_status', v_certificate -> 'status',
    'certificate_serial', v_certificate -> 'serial_number',
    'agent_id', v_certificate -> 'agent_id',
    'agent_name', v_certificate -> 'agent_name',
    'model_hash', v_certificate -> 'model_hash');
end
$$;
comment on function kakunin.verify_message(text, bytea, bytea) is
  'Whether the agent''s key signed the payload (RSASSA-PKCS1-v1_5, SHA-256) and its certificate may be used now: valid is both. For all the kit''s roles';

-- What an operator looks up before naming an agent or a serial. Plain views: they read the private tables
-- with their owner's rights, and only the roles they are granted to can read them.
create view kakunin.agents with (security_barrier = true) as
  select a.agent_id, a.name, a.tenant, a.model, a.model_version, a.model_hash,
         a.created_at, a.suspended_at, a.suspended_reason
    from kakunin_private.agents a;
comment on view kakunin.agents is 'Agents, and whether they are suspended. For kakunin_registrar, kakunin_operator, kakunin_auditor';

create view kakunin.certificates with (security_barrier = true) as
  select c.serial, c.agent_id, c.issuer_key_id, c.not_before, c.not_after, c.model, c.model_hash, c.permitted_actions,
         c.tenant, c.financial_scope, c.registered_at, c.registered_by, c.revoked_at, c.revocation_reason, c.der
    from kakunin_private.certificates c;
comment on view kakunin.certificates is 'Registered certificates. For kakunin_registrar, kakunin_operator, kakunin_auditor';

create view kakunin.authorities with (security_barrier = true) as
  select a.key_id, a.issuer_key_id, a.serial, a.not_before, a.not_after, a.path_length,
         a.trusted_at, a.trusted_by, a.distrusted_at, a.distrust_reason, a.der
    from kakunin_private.authorities a;
comment on view kakunin.authorities is 'Pinned certificate authorities, for whoever builds a chain. For all the kit''s roles';
