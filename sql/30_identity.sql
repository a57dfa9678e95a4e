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
