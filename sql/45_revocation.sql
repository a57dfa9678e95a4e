-- Revocation: taking an agent's access away, and telling the world.
--
-- Three ways, from the mildest:
--
--   suspend_agent()       stops all certificates of an agent until reinstate_agent()
--   revoke_certificate()  ends one certificate for good
--   halt_agent()          the kill switch: suspends the agent, revokes all its certificates and records both, at
--                         once; with terminate => true it also ends the backends bound to them
--
-- None of them waits for a signature, and all take effect at the next statement of every session. What other
-- systems are told is signed by the authority's key, which is not in the database, so it follows: a
-- certificate revocation list (RFC 5280 section 5) for each authority, and for each halt a receipt. The
-- signer reads what is due (crls_due(), kakunin.halts), signs, and hands it in; the database verifies the
-- signature with the pinned key, and that a list leaves nothing out, before it stores it.
--
-- A receipt is the UTF-8 of a JSON text in canonical form (RFC 8785), so that a verifier hashes the bytes as
-- they are. What is due to be signed is a question. Caches of certificates' states are told at once, on the channel
-- kakunin_revocation and with the agent's id; but any login can fill the queue of notifications, and no revocation may
-- fail by it or wait for it, so none is sent where it is half full or held: a cache must not keep an answer for long anyhow.
--
-- Which backend is bound to what is known from locks, which a binding takes: mark_bound() in the file on sessions.

create function kakunin_private.check_revocation_reason(p_reason text) returns void
language plpgsql immutable parallel safe
as $$
begin
  -- RFC 5280 section 5.3.1. certificateHold and removeFromCRL are left out: a hold is a suspension,
  -- which is the agent's, and nothing is ever taken off the list.
  if p_reason is null or p_reason collate "C" not in
    ('unspecified', 'keyCompromise', 'cACompromise', 'affiliationChanged', 'superseded',
     'cessationOfOperation', 'privilegeWithdrawn', 'aACompromise') then
    raise exception using errcode = 'KA010',
      message = 'not a revocation reason of RFC 5280',
      hint = 'Use unspecified, keyCompromise, cACompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn or aACompromise.';
  end if;
end
$$;
comment on function kakunin_private.check_revocation_reason(text) is 'KA010 unless it is a reason of RFC 5280 that can be given for good';

-- Who notifies holds, as it commits, a lock on "all databases" (object 0 of pg_database, 1262) and the queue's own, and where
-- the queue is half full warns its client meanwhile: any login can come to a halt there by not reading, and cannot even be
-- terminated. Whoever then so much as asks how full the queue is waits with it, and is not to be cancelled. So the lock is
-- looked for first. Where others notify all the time somebody always holds it, and not always the same one.
create function kakunin_private.may_notify() returns boolean
language plpgsql volatile parallel unsafe
as $$
declare
  v_holder  text collate "C";
  v_before  text collate "C";
  v_changes integer := 0;
begin
  for i in 1..10 loop
    v_holder := (select l.virtualtransaction from pg_locks l
                  where l.locktype = 'object' and l.database = 0::oid and l.classid = 1262::oid and l.objid = 0::oid and l.granted);
    v_changes := v_changes + case when v_holder <> v_before then 1 else 0 end;
    if v_holder is null or v_changes = 2 then
      return pg_notification_queue_usage() < 0.5;
    end if;
    v_before := v_holder;
    perform pg_sleep(0.005);
  end loop;
  return false;
end
$$;
comment on function kakunin_private.may_notify() is
  'Whether a notification would be taken at once: the queue is less than half full, and nobody is stuck in it';

-- Asked once for however many: an authority that is distrusted may have certified thousands.
create function kakunin_private.notify_revocation(p_agent_ids uuid[]) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  if kakunin_private.may_notify() then
    perform pg_notify('kakunin_revocation', a::text) from unnest(p_agent_ids) a;
  end if;
end
$$;
comment on function kakunin_private.notify_revocation(uuid[]) is
  'Tells whoever listens on kakunin_revocation that these agents, or certificates of theirs, were stopped or let go on';

create function kakunin_private.revoke(p_serials text[], p_reason text, p_at timestamptz default null) returns text[]
language plpgsql volatile parallel unsafe
as $$
declare
  v_now     constant timestamptz := kakunin_private.clock();
  v_at      constant timestamptz := coalesce(p_at, v_now);
  v_serials text[];
  v_serial  text;
begin
  -- A revocation is brought forward, but never put off: the first moment and reason are the ones that count.
  with revoked as (
    update kakunin_private.certificates c
       set revoked_at = v_at, revocation_reason = p_reason
     where c.serial = any (p_serials) and coalesce(c.revoked_at > v_at, true)
    returning c.serial
  )
  select coalesce(array_agg(r.serial order by r.serial), '{}') into v_serials from revoked r;
  foreach v_serial in array v_serials loop
    perform kakunin_private.stop(case when v_at > v_now then 'end ' else '' end || v_serial);
    perform kakunin_private.record('certificate.revoked', c.agent_id, jsonb_build_object(
              'serial', c.serial, 'reason', p_reason, 'revoked_at', kakunin_private.rfc3339(v_at)))
       from kakunin_private.certificates c where c.serial = v_serial;
  end loop;
  if v_serials <> '{}' then
    perform kakunin_private.notify_revocation(array(
      select distinct c.agent_id from kakunin_private.certificates c where c.serial = any (v_serials)));
  end if;
  return v_serials;
end
$$;
comment on function kakunin_private.revoke(text[], text, timestamptz) is
  'Revokes certificates from a moment on, by default now; returns those for which this changed anything';

create function kakunin.revoke_certificate(serial text, reason text default 'unspecified') returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial     text collate "C" := kakunin.normalize_serial(revoke_certificate.serial);
  v_revoked_at timestamptz;
begin
  perform kakunin_private.check_revocation_reason(revoke_certificate.reason);
  perform kakunin_private.revoke(array[v_serial], revoke_certificate.reason);
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
  perform kakunin_private.check_text('a reason', suspend_agent.reason, 1000);
  perform kakunin_private.lock_agent(suspend_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = coalesce(a.suspended_at, kakunin_private.clock()),
         suspended_reason = coalesce(a.suspended_reason, suspend_agent.reason)
   where a.agent_id = suspend_agent.agent_id;
  perform kakunin_private.stop(suspend_agent.agent_id::text);
  perform kakunin_private.record('agent.suspended', suspend_agent.agent_id, jsonb_build_object('reason', suspend_agent.reason));
  perform kakunin_private.notify_revocation(array[suspend_agent.agent_id]);
end
$$;
comment on function kakunin.suspend_agent(uuid, text) is
  'Stops every certificate of the agent at the next statement, until reinstate_agent(); the first moment and reason stay. For kakunin_operator';

create function kakunin.reinstate_agent(agent_id uuid) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_epoch integer;
begin
  perform kakunin_private.lock_agent(reinstate_agent.agent_id);
  -- What its score stopped is revoked first: that is final, and a reinstated agent needs another certificate.
  perform kakunin_private.settle(reinstate_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = null, suspended_reason = null, risk_epoch = a.risk_epoch + 1, reinstated_at = kakunin_private.clock()
   where a.agent_id = reinstate_agent.agent_id
  returning a.risk_epoch into v_epoch;
  -- Drift is not of one epoch. A chain that a transaction of the agent's holds keeps its own: nobody waits for that.
  update kakunin_private.chains c set drift = 0
   where c.drift > 0
     and c.chain_id = any (array(select h.chain_id from kakunin_private.chains h where h.agent_id = reinstate_agent.agent_id for update skip locked));
  perform kakunin_private.stop('epoch ' || reinstate_agent.agent_id || ' ' || v_epoch);
  execute format('drop domain if exists kakunin_private.%I', reinstate_agent.agent_id);
  perform kakunin_private.record('agent.reinstated', reinstate_agent.agent_id, '{}');
  perform kakunin_private.notify_revocation(array[reinstate_agent.agent_id]);
end
$$;
comment on function kakunin.reinstate_agent(uuid) is
  'Lifts a suspension and begins the agent''s risk score anew, drift included. Revoked certificates stay revoked, and transactions that keep a snapshot of before serve the agent no more. For kakunin_operator';

create function kakunin.distrust_ca(key_id text, reason text default 'unspecified') returns text[]
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serials text[] := '{}'::text[];
begin
  perform kakunin_private.check_revocation_reason(distrust_ca.reason);
  if not exists (select from kakunin_private.authorities a where a.key_id = distrust_ca.key_id collate "C") then
    raise exception using errcode = 'KA010',
      message = 'no authority with this key id is trusted here',
      hint = 'select key_id from kakunin.authorities lists them.';
  end if;
  perform kakunin_private.check_snapshot_is_fresh('distrust');
  -- Registrations that have begun hold their authority's row. What they register is seen by the next statement.
  lock table kakunin_private.authorities in exclusive mode;
  with recursive below as (
    select distrust_ca.key_id collate "C" as key_id
    union
    select a.key_id from kakunin_private.authorities a join below b on a.issuer_key_id = b.key_id
  ), distrusted as (
    update kakunin_private.authorities a
       set distrusted_at = coalesce(a.distrusted_at, kakunin_private.clock()), distrust_reason = distrust_ca.reason
      from below b
     where a.key_id = b.key_id
       -- One already distrusted may turn out to be compromised, but not the other way round.
       and (a.distrusted_at is null
            or (distrust_ca.reason in ('keyCompromise', 'cACompromise')
                and a.distrust_reason not in ('keyCompromise', 'cACompromise')))
  )
  select array_agg(c.serial) into v_serials
    from kakunin_private.certificates c join below b on b.key_id = c.issuer_key_id
   where distrust_ca.reason in ('keyCompromise', 'cACompromise');
  perform kakunin_private.record('authority.distrusted', null, jsonb_build_object(
    'key_id', distrust_ca.key_id, 'reason', distrust_ca.reason));
  return kakunin_private.revoke(coalesce(v_serials, '{}'), 'cACompromise');
end
$$;
comment on function kakunin.distrust_ca(text, text) is
  'Registers nothing more that this authority, or one below it, has signed. For keyCompromise and cACompromise all their certificates are revoked too; returns the serials of those. Final. For kakunin_operator';

-- Halting --------------------------------------------------------------------------------------------

create table kakunin_private.halts (
  halt_id   uuid primary key default gen_random_uuid(),
  agent_id  uuid not null references kakunin_private.agents,
  reason    text not null,
  serials   text[] collate "C" not null,
  halted_at timestamptz not null,
  halted_by name not null,
  receipt   text not null,
  key_id    text collate "C" references kakunin_private.authorities,
  signature bytea,
  signed_at timestamptz,
  check (num_nulls(key_id, signature, signed_at) in (0, 3))
);
create index halts_agent_id on kakunin_private.halts (agent_id);
comment on table kakunin_private.halts is 'Every halt, with the receipt an authority signs. The signature is added once and nothing else changes';
comment on column kakunin_private.halts.receipt is
  'What is signed: the UTF-8 of this JSON text, in canonical form (RFC 8785). RSASSA-PKCS1-v1_5 with SHA-256';

create function kakunin_private.terminate(p_serials text[], inout p_ended integer[], out p_others integer[])
language plpgsql volatile parallel unsafe
as $$
declare
  v_pid integer;
begin
  p_others := '{}';
  foreach v_pid in array kakunin_private.bound_backends(p_serials) loop
    begin
      if v_pid <> all (p_ended) and pg_terminate_backend(v_pid) then
        p_ended := p_ended || v_pid;
      end if;
    exception
      -- Ending another login's backend needs pg_signal_backend, which only a superuser can grant. The halt stands.
      when insufficient_privilege then p_others := p_others || v_pid;
    end;
  end loop;
end
$$;
comment on function kakunin_private.terminate(text[], integer[]) is
  'Ends the other backends bound to these certificates: adds them to those that are ending already, and says which ones the owner of the kit may not end';

create function kakunin.halt_agent(agent_id uuid, reason text, terminate boolean default false) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     constant timestamptz := kakunin_private.clock();
  v_halt_id constant uuid := gen_random_uuid();
  v_serials text[];
  v_all     text[];
  v_receipt text;
  v_ended   integer[] := '{}'::integer[];
  v_others  integer[] := '{}'::integer[];
begin
  perform kakunin_private.check_text('a reason', halt_agent.reason, 1000);
  if terminate is null then
    raise exception using errcode = 'KA010', message = 'terminate must be true or false';
  end if;
  -- Before anything is written as well as after: a backend of the agent's may have used up the server's locks, and
  -- then nothing can be written. Ending it does not need this transaction to succeed.
  if halt_agent.terminate then
    select t.p_ended into v_ended from kakunin_private.terminate(
      array(select c.serial from kakunin_private.certificates c where c.agent_id = halt_agent.agent_id), v_ended) t;
  end if;
  perform kakunin_private.lock_agent(halt_agent.agent_id);
  v_all := array(select c.serial from kakunin_private.certificates c where c.agent_id = halt_agent.agent_id and c.not_after >= v_now);
  perform kakunin.suspend_agent(halt_agent.agent_id, halt_agent.reason);
  v_serials := kakunin_private.revoke(v_all, 'privilegeWithdrawn');
  -- Members in the order of their names and no blanks, as RFC 8785 has it; all are texts, and what to_json()
  -- escapes in a text is what RFC 8785 has escaped.
  v_receipt := '{"agent_id":' || to_json(halt_agent.agent_id::text)
    || ',"certificates":' || coalesce((select '[' || string_agg(to_json(s)::text, ',' order by n) || ']'
                                         from unnest(v_serials) with ordinality as u(s, n)), '[]')
    || ',"halt_id":' || to_json(v_halt_id::text)
    || ',"halted_at":' || to_json(kakunin_private.rfc3339(v_now))
    || ',"halted_by":' || to_json(session_user::text)
    || ',"installation":' || to_json(kakunin.installation_id()::text)
    || ',"reason":' || to_json(halt_agent.reason)
    || ',"type":"kakunin.halt"}';
  insert into kakunin_private.halts (halt_id, agent_id, reason, serials, halted_at, halted_by, receipt)
  values (v_halt_id, halt_agent.agent_id, halt_agent.reason, v_serials, v_now, session_user, v_receipt);
  perform kakunin_private.record('agent.halted', halt_agent.agent_id, jsonb_build_object(
    'halt_id', v_halt_id, 'reason', halt_agent.reason, 'certificates', to_jsonb(v_serials)));
  if halt_agent.terminate then
    select t.p_ended, t.p_others into v_ended, v_others from kakunin_private.terminate(v_all, v_ended) t;
  end if;
  return jsonb_build_object(
    'halt_id', v_halt_id,
    'agent_id', halt_agent.agent_id,
    'halted_at', v_now,
    'certificates_revoked', to_jsonb(v_serials),
    'backends_terminated', cardinality(v_ended),
    'backends_not_terminated', cardinality(v_others),
    'hint', case when cardinality(v_others) > 0
      then format('Backends of other logins see nothing from their next statement on, but were not ended. A superuser allows it: grant pg_signal_backend to %I', current_user) end,
    'receipt', v_receipt);
end
$$;
comment on function kakunin.halt_agent(uuid, text, boolean) is
  'Suspends the agent, revokes its certificates and records it, in this transaction; terminate also ends the backends bound to them. Returns halt_id, what was done and the receipt, which an authority signs afterwards. For kakunin_operator';

create function kakunin.sign_halt(halt_id uuid, key_id text, signature bytea) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_halt    kakunin_private.halts;
  v_modulus bytea;
begin
  select * into v_halt from kakunin_private.halts h where h.halt_id = sign_halt.halt_id for update;
  if not found then
    raise exception using errcode = 'KA010', message = format('no halt %s', coalesce(sign_halt.halt_id::text, 'given')),
      hint = 'kakunin.halts shows them.';
  end if;
  select a.public_key_modulus into v_modulus from kakunin_private.authorities a
   where a.key_id = sign_halt.key_id collate "C" and a.distrusted_at is null;
  if not found or not kakunin_private.rsa_pkcs1_sha256_verify(
    v_modulus, 65537, convert_to(v_halt.receipt, 'UTF8'), sign_halt.signature) then
    perform kakunin_private.refuse('the signature', 'it is not that of a trusted authority over the receipt');
  end if;
  -- The first signature stays.
  update kakunin_private.halts h
     set key_id = sign_halt.key_id, signature = sign_halt.signature, signed_at = kakunin_private.clock()
   where h.halt_id = sign_halt.halt_id and h.signature is null;
  if found then
    perform kakunin_private.record('halt.signed', v_halt.agent_id, jsonb_build_object(
      'halt_id', sign_halt.halt_id, 'key_id', sign_halt.key_id, 'signature', encode(sign_halt.signature, 'hex')));
  end if;
end
$$;
comment on function kakunin.sign_halt(uuid, text, bytea) is
  'Adds an authority''s signature (RSASSA-PKCS1-v1_5, SHA-256) over the receipt, once it has been verified; the first one stays. For kakunin_registrar, kakunin_operator, kakunin_worker';

create view kakunin.halts with (security_barrier = true) as
  select h.halt_id, h.agent_id, h.reason, h.serials, h.halted_at, h.halted_by, h.receipt, h.key_id, h.signature, h.signed_at
    from kakunin_private.halts h;
comment on view kakunin.halts is
  'Halts and their receipts; one without a signature waits for it. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

-- Revocation lists -----------------------------------------------------------------------------------

create table kakunin_private.crls (
  key_id       text collate "C" primary key references kakunin_private.authorities,
  number       numeric not null,
  this_update  timestamptz not null,
  next_update  timestamptz not null,
  serials      text[] collate "C" not null,
  der          bytea not null,
  published_at timestamptz not null,
  published_by name not null
);
comment on table kakunin_private.crls is 'The newest list of each authority';
comment on column kakunin_private.crls.serials is
  'What it lists: a revocation that was not committed when the list was made may be dated before it';

create function kakunin.revocations(key_id text) returns table (serial text, revoked_at timestamptz, reason text)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- An entry stays for a week after its certificate has expired, so that it is on at least one list issued
  -- after that (RFC 5280 section 3.3).
  v_since constant timestamptz := kakunin_private.clock() - interval '7 days';
begin
  return query
    select c.serial, c.revoked_at, c.revocation_reason
      from kakunin_private.certificates c
     where c.issuer_key_id = revocations.key_id collate "C" and c.revoked_at <= kakunin_private.clock() and c.not_after > v_since
    union all
    select a.serial, a.distrusted_at, a.distrust_reason
      from kakunin_private.authorities a
     where a.issuer_key_id = revocations.key_id collate "C" and a.issuer_key_id <> a.key_id
       and a.distrusted_at is not null and a.not_after > v_since
    union all
    select k.serial, k.revoked_at, k.revocation_reason
      from kakunin_private.ledger_keys k
     where k.issuer_key_id = revocations.key_id collate "C" and k.revoked_at is not null and k.not_after > v_since;
end
$$;
comment on function kakunin.revocations(text) is
  'What the revocation list of the authority with this key id has to list now. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

create function kakunin.crls_due() returns table (key_id text, next_number numeric)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select a.key_id, coalesce(l.number, 0) + 1
      from kakunin_private.authorities a
      left join kakunin_private.crls l on l.key_id = a.key_id
     where a.not_after > kakunin_private.clock()
       -- Compromised, its word counts for nothing any more; distrusted for another reason, it still says what it revoked.
       and coalesce(a.distrust_reason not in ('keyCompromise', 'cACompromise'), true)
       and (l.key_id is null
            or kakunin_private.clock() > l.this_update + (l.next_update - l.this_update) / 2
            or exists (select r.serial from kakunin.revocations(a.key_id) r except select unnest(l.serials)))
     order by a.key_id;
end
$$;
comment on function kakunin.crls_due() is
  'Authorities whose list is missing, leaves a revocation out or is past half its time, and the number of the next one. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

create function kakunin.publish_crl(der bytea) returns numeric
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what       constant text := 'the CRL';
  v_now        constant timestamptz := kakunin_private.clock();
  v_outer      bytea[];
  v_fields     bytea[];
  v_parts      bytea[];
  v_extensions kakunin_private.x509_extension[];
  v_entries    bytea[] := '{}'::bytea[];
  v_entry      bytea;
  v_signature  bytea;
  v_value      bytea;
  v_this       timestamptz;
  v_next       timestamptz;
  v_number     numeric;
  v_authority  kakunin_private.authorities;
  v_serials    text[] := '{}'::text[];
  v_reasons    text[] := '{}'::text[];
  v_dates      timestamptz[] := '{}'::timestamptz[];
  v_reason     integer;
  v_wrong      text;
begin
  if publish_crl.der is null or octet_length(publish_crl.der) not between 1 and 8388608 then
    perform kakunin_private.refuse(c_what, 'it is 1 byte to 8 MiB of DER');
  elsif substr(publish_crl.der, 1, 5) = '-----' then
    perform kakunin_private.refuse(c_what, 'it is PEM', 'Give the DER that PEM wraps in base64.');
  end if;
  perform kakunin_private.check_snapshot_is_fresh('publishing a CRL');
  perform kakunin_private.der_check(publish_crl.der);
  v_outer := kakunin_private.der_children(publish_crl.der, 48, c_what);
  v_fields := kakunin_private.der_children(v_outer[1], 48, 'the TBSCertList');
  -- Version 2, algorithm, issuer, thisUpdate, nextUpdate, perhaps entries, extensions (RFC 5280 section 5.1)
  if cardinality(v_fields) not between 6 and 7 or v_fields[1] <> decode('020101', 'hex') then
    perform kakunin_private.refuse(c_what, 'it is not version 2 with nextUpdate and extensions');
  end if;
  v_signature := kakunin_private.x509_check_signed(v_outer, v_fields[2], c_what);
  v_this := kakunin_private.der_time(v_fields[4], 'thisUpdate');
  v_next := kakunin_private.der_time(v_fields[5], 'nextUpdate');
  if cardinality(v_fields) = 7 then
    v_entries := kakunin_private.der_children(v_fields[6], 48, 'the entries');
  end if;
  v_parts := kakunin_private.der_children(v_fields[cardinality(v_fields)], 160, 'the extensions');  -- [0]
  if cardinality(v_parts) <> 1 then
    perform kakunin_private.refuse('the list of extensions', 'it is not one list');
  end if;
  v_extensions := kakunin_private.x509_extensions(v_parts[1], c_what);
  perform kakunin_private.x509_check_critical(v_extensions, '{}', c_what);

  select * into v_authority from kakunin_private.authorities a
   where a.key_id = kakunin_private.x509_authority_key_id(v_extensions) and a.subject = v_fields[3]
     and coalesce(a.distrust_reason not in ('keyCompromise', 'cACompromise'), true)
     for no key update;
  if not found then
    perform kakunin_private.refuse(c_what, 'its issuer is not an authority that is trusted here');
  end if;
  if not kakunin_private.rsa_pkcs1_sha256_verify(v_authority.public_key_modulus, 65537, v_outer[1], v_signature) then
    perform kakunin_private.refuse(c_what, 'its signature is not that of its issuer');
  end if;

  v_value := kakunin_private.x509_positive(
    kakunin_private.x509_extension_value(v_extensions, '2.5.29.20'), 'the CRL number');
  if octet_length(v_value) > 20 then
    perform kakunin_private.refuse('the CRL number', 'it is longer than 20 octets');
  end if;
  v_number := kakunin_private.bytes_to_numeric(v_value);
  if exists (select from kakunin_private.crls l
              where l.key_id = v_authority.key_id and (l.number >= v_number or l.this_update > v_this)) then
    perform kakunin_private.refuse(c_what, 'it is not newer than the one that is published');
  end if;
  if v_this > v_now + interval '5 minutes' or v_next <= v_now or v_next - v_this > interval '90 days' then
    perform kakunin_private.refuse(c_what, 'it is not of now, or is to last more than 90 days');
  end if;

  foreach v_entry in array v_entries loop
    v_parts := kakunin_private.der_children(v_entry, 48, 'an entry');
    if cardinality(v_parts) not between 2 and 3 then
      perform kakunin_private.refuse('an entry', 'it is not a serial number, a date and extensions');
    end if;
    v_reason := 0;
    if cardinality(v_parts) = 3 then
      v_extensions := kakunin_private.x509_extensions(v_parts[3], 'an entry');
      perform kakunin_private.x509_check_critical(v_extensions, '{}', 'an entry');
      v_value := kakunin_private.x509_extension_value(v_extensions, '2.5.29.21');
      if v_value is not null then
        v_value := kakunin_private.der_content(v_value, 10, 'the reason');
        v_reason := case when octet_length(v_value) = 1 then get_byte(v_value, 0) else 255 end;  -- 255 is none
      end if;
    end if;
    v_serials := v_serials || kakunin_private.x509_serial(v_parts[1]);
    v_dates := v_dates || kakunin_private.der_time(v_parts[2], 'the revocation date');
    v_reasons := v_reasons || coalesce((array['unspecified', 'keyCompromise', 'cACompromise', 'affiliationChanged',
      'superseded', 'cessationOfOperation', null, null, null, 'privilegeWithdrawn', 'aACompromise'])[v_reason + 1], '');
  end loop;
  select coalesce(r.serial, e.serial) into v_wrong
    from (select * from unnest(v_serials, v_dates, v_reasons) as u(serial, revoked_at, reason)) e
    full join kakunin.revocations(v_authority.key_id) r
      on r.serial = e.serial and date_trunc('second', r.revoked_at) = e.revoked_at and r.reason = e.reason
   where r.serial is null or e.serial is null
   limit 1;
  if found or cardinality(v_serials) <> (select count(distinct s) from unnest(v_serials) s) then
    perform kakunin_private.refuse(c_what,
      format('it does not list what is revoked here, as of %s', coalesce(v_wrong, 'one that is listed twice')),
      'Make it from kakunin.revocations(key_id), at once.');
  end if;

  insert into kakunin_private.crls as l
    (key_id, number, this_update, next_update, serials, der, published_at, published_by)
  values
    (v_authority.key_id, v_number, v_this, v_next, v_serials, publish_crl.der, v_now, session_user)
  on conflict on constraint crls_pkey do update
    set number = excluded.number, this_update = excluded.this_update, next_update = excluded.next_update,
        serials = excluded.serials, der = excluded.der, published_at = excluded.published_at, published_by = excluded.published_by;
  perform kakunin_private.record('crl.published', null, jsonb_build_object(
    'key_id', v_authority.key_id, 'number', v_number, 'sha256', encode(sha256(publish_crl.der), 'hex')));
  return v_number;
end
$$;
comment on function kakunin.publish_crl(bytea) is
  'Stores a revocation list (DER) once it is known to be its authority''s, newer than the last, and to list exactly what is revoked here; returns its number. For kakunin_registrar, kakunin_operator, kakunin_worker';

create view kakunin.crls with (security_barrier = true) as
  select l.key_id, l.number, l.this_update, l.next_update, cardinality(l.serials) as entries, l.published_at, l.published_by, l.der
    from kakunin_private.crls l;
comment on view kakunin.crls is 'The newest revocation list of each authority, DER, for any node to serve. For all the kit''s roles';
