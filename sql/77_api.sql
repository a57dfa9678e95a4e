-- API: what `kakunin-db serve` keeps in the database (docs/api.md).
--
-- Keys. An API key is 256 random bits behind a prefix that finds it. The database has its SHA-256: what that many random bits
-- hash to tells nothing of them, so nothing slower is needed. Whoever reads this table, or a backup, has no key. A key has scopes,
-- ends at a moment if it was given one, and may be one agent's: then it is good for that agent alone, and for no scope that
-- reaches beyond it. authenticate_api_key() is asked by every request, so a revocation counts for the next one.
--
-- Descriptions. What an application says of its agents, and what it asks their certificates to permit. Nothing here
-- is believed: what an agent may do is in its certificate, and kakunin-db serve certifies nothing that its own
-- configuration does not let it.
--
-- Decision chains group events, of several agents perhaps, that led to one decision. Such an event is an entry of the ledger like any
-- other, and names its chain. A decision chain has a hash: 32 zero bytes before the first event, and with each event SHA-256 of the
-- hash so far and the entry's leaf hash (RFC 6962 section 2.1). Closing one puts that into the ledger. Not to be confused
-- with the chains of 60_ledger.sql, which order one agent's entries.
--
-- Reports are what the database knows of an agent and a period, as JSON; the ledger has their SHA-256.

-- Keys -------------------------------------------------------------------------------------------------

create table kakunin_private.api_keys (
  key_id       uuid primary key default gen_random_uuid(),
  prefix       text collate "C" not null unique check (prefix ~ '^[0-9a-f]{16}$'),
  digest       bytea not null check (octet_length(digest) = 32),
  name         text not null,
  scopes       text[] collate "C" not null check (cardinality(scopes) > 0),
  agent_id     uuid references kakunin_private.agents,
  created_at   timestamptz not null,
  created_by   name not null,
  expires_at   timestamptz,
  revoked_at   timestamptz,
  last_used_at timestamptz
);
comment on table kakunin_private.api_keys is 'API keys. Revoked ones stay, so that what was done with them can be told';
comment on column kakunin_private.api_keys.prefix is 'The part of the key that is no secret and finds it';
comment on column kakunin_private.api_keys.digest is 'SHA-256 of the whole key';
comment on column kakunin_private.api_keys.agent_id is 'The only agent it is good for; NULL for all';
comment on column kakunin_private.api_keys.last_used_at is 'To the minute or so: servers tell it together, not with each request';

create function kakunin_private.api_scopes() returns text[]
language sql immutable parallel safe
return array['agents:read', 'agents:write', 'agents:certify', 'agents:sign', 'agents:suspend', 'agents:halt',
             'events:read', 'events:write', 'chains:read', 'chains:write', 'reports:read', 'reports:write']::text[];
comment on function kakunin_private.api_scopes() is 'Scopes that an API key may have';

create function kakunin.create_api_key(
  prefix text, digest bytea, name text, scopes text[], agent_id uuid default null, expires_at timestamptz default null
) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now    constant timestamptz := kakunin_private.clock();
  v_prefix text collate "C" := create_api_key.prefix;
  v_scopes text[] collate "C";
  v_key_id uuid;
begin
  perform kakunin_private.check_text('a key''s name', create_api_key.name, 200);
  if not coalesce(v_prefix ~ '^[0-9a-f]{16}$' and octet_length(create_api_key.digest) = 32, false) then
    raise exception using errcode = 'KA010', message = 'a key has a prefix of 16 hexadecimal digits and a SHA-256 of 32 bytes',
      hint = 'kakunin-db serve keys create makes them.';
  end if;
  v_scopes := array(select distinct s collate "C" from unnest(create_api_key.scopes) s order by 1);
  if cardinality(v_scopes) = 0 or not v_scopes <@ kakunin_private.api_scopes() then
    raise exception using errcode = 'KA010', message = 'a key has scopes, and only those there are',
      hint = array_to_string(kakunin_private.api_scopes(), ', ');
  end if;
  if create_api_key.agent_id is not null then
    perform kakunin_private.check_known_agent(create_api_key.agent_id);
    if not v_scopes <@ array['agents:read', 'agents:sign', 'agents:halt', 'events:read', 'events:write']::text[] then
      raise exception using errcode = 'KA010', message = 'a key of one agent has scopes that are about that agent alone',
        hint = 'agents:read, agents:sign, agents:halt, events:read, events:write';
    end if;
  end if;
  if create_api_key.expires_at <= v_now then
    raise exception using errcode = 'KA010', message = 'a key that has expired is of no use';
  end if;
  insert into kakunin_private.api_keys (prefix, digest, name, scopes, agent_id, created_at, created_by, expires_at)
  values (v_prefix, create_api_key.digest, create_api_key.name, v_scopes, create_api_key.agent_id, v_now, session_user, create_api_key.expires_at)
  on conflict on constraint api_keys_prefix_key do nothing
  returning key_id into v_key_id;
  if not found then
    raise exception using errcode = 'KA010', message = 'there is a key with this prefix already', hint = 'Make another.';
  end if;
  perform kakunin_private.record('api_key.created', create_api_key.agent_id, jsonb_build_object(
    'key_id', v_key_id, 'prefix', v_prefix, 'name', create_api_key.name, 'scopes', to_jsonb(v_scopes),
    'expires_at', kakunin_private.rfc3339(create_api_key.expires_at)));
  return v_key_id;
end
$$;
comment on function kakunin.create_api_key(text, bytea, text, text[], uuid, timestamptz) is
  'Takes in an API key by its SHA-256, with scopes, and where given for one agent or until a moment; returns its id. For kakunin_operator';

create function kakunin.revoke_api_key(key_id uuid) returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_key kakunin_private.api_keys;
  v_now constant timestamptz := kakunin_private.clock();
begin
  update kakunin_private.api_keys k set revoked_at = v_now
   where k.key_id = revoke_api_key.key_id and k.revoked_at is null
  returning * into v_key;
  if found then
    perform kakunin_private.record('api_key.revoked', v_key.agent_id, jsonb_build_object(
      'key_id', v_key.key_id, 'prefix', v_key.prefix, 'name', v_key.name));
    return v_now;
  end if;
  select * into v_key from kakunin_private.api_keys k where k.key_id = revoke_api_key.key_id;
  if not found then
    raise exception using errcode = 'KA010', message = format('no API key %s', coalesce(revoke_api_key.key_id::text, 'given')),
      hint = 'kakunin-db serve keys list has them.';
  end if;
  return v_key.revoked_at;
end
$$;
comment on function kakunin.revoke_api_key(uuid) is
  'Ends an API key for good, from the next request on; returns when it was first revoked. For kakunin_operator';

create function kakunin.authenticate_api_key(prefix text, digest bytea) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text collate "C" := authenticate_api_key.prefix;
  v_salt   constant bytea := uuid_send(gen_random_uuid());
  v_now    constant timestamptz := kakunin_private.clock();
  v_key    kakunin_private.api_keys;
begin
  perform kakunin_private.check_replica();
  select * into v_key from kakunin_private.api_keys k where k.prefix = v_prefix;
  -- What is compared are hashes under a salt of this call: how long it takes tells nothing of the digest. Where there
  -- is no such key the same is done.
  if not coalesce(sha256(v_salt || coalesce(v_key.digest, sha256(v_salt))) = sha256(v_salt || authenticate_api_key.digest), false)
    or v_key.key_id is null then
    return null;
  end if;
  return jsonb_build_object(
    'key_id', v_key.key_id, 'prefix', v_key.prefix, 'name', v_key.name, 'scopes', to_jsonb(v_key.scopes), 'agent_id', v_key.agent_id,
    'status', case when v_key.revoked_at is not null then 'revoked' when v_key.expires_at <= v_now then 'expired' else 'active' end);
end
$$;
comment on function kakunin.authenticate_api_key(text, bytea) is
  'The key with this prefix and SHA-256: its id, name, scopes, agent and whether it is active, revoked or expired; NULL where there is none. For kakunin_gateway';

create function kakunin.note_api_keys(key_ids uuid[]) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_noted integer;
begin
  -- In the order of ids, and nobody waits: two servers tell of the same keys at once.
  update kakunin_private.api_keys k set last_used_at = kakunin_private.clock()
   where k.key_id = any (array(select l.key_id from kakunin_private.api_keys l
                                where l.key_id = any (note_api_keys.key_ids) order by l.key_id for no key update skip locked));
  get diagnostics v_noted = row_count;
  return v_noted;
end
$$;
comment on function kakunin.note_api_keys(uuid[]) is
  'Says that these keys were used just now; returns how many that was noted of. For kakunin_gateway';

create view kakunin.api_keys with (security_barrier = true) as
  select k.key_id, k.prefix, k.name, k.scopes, k.agent_id, k.created_at, k.created_by, k.expires_at, k.revoked_at, k.last_used_at
    from kakunin_private.api_keys k;
comment on view kakunin.api_keys is 'API keys, without what would let anybody in. For kakunin_operator';

-- Descriptions -----------------------------------------------------------------------------------------

create table kakunin_private.agent_descriptions (
  agent_id        uuid primary key references kakunin_private.agents,
  metadata        jsonb not null,
  financial_scope jsonb
);
comment on table kakunin_private.agent_descriptions is 'What an application says of its agents. It decides nothing';
comment on column kakunin_private.agent_descriptions.financial_scope is 'What its certificate is asked to limit it to';

create function kakunin.describe_agent(agent_id uuid, metadata jsonb, financial_scope jsonb default null) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_size constant integer := octet_length(metadata::text) + coalesce(octet_length(financial_scope::text), 0);
begin
  if coalesce(jsonb_typeof(metadata) <> 'object', true) or v_size > 16384
    or kakunin_private.is_too_deep(metadata) or kakunin_private.is_too_deep(financial_scope) then
    raise exception using errcode = 'KA010',
      message = 'metadata and financial scope are JSON objects of at most 16384 bytes together, nested at most 64 deep';
  end if;
  perform kakunin_private.check_financial_scope(financial_scope);
  perform kakunin_private.check_known_agent(describe_agent.agent_id);
  insert into kakunin_private.agent_descriptions as d (agent_id, metadata, financial_scope)
  values (describe_agent.agent_id, describe_agent.metadata, describe_agent.financial_scope)
  on conflict on constraint agent_descriptions_pkey do update
    set metadata = excluded.metadata, financial_scope = coalesce(excluded.financial_scope, d.financial_scope);
  perform kakunin_private.record('agent.described', describe_agent.agent_id, jsonb_strip_nulls(jsonb_build_object(
    'metadata_sha256', encode(sha256(convert_to(metadata::text, 'UTF8')), 'hex'),
    'scopes', metadata -> 'scopes', 'financial_scope', financial_scope)));
end
$$;
comment on function kakunin.describe_agent(uuid, jsonb, jsonb) is
  'Keeps what an application says of an agent, in place of what it said before; a financial scope that is not given stays. For kakunin_registrar';

create view kakunin.agent_descriptions with (security_barrier = true) as
  select d.agent_id, d.metadata, d.financial_scope from kakunin_private.agent_descriptions d;
comment on view kakunin.agent_descriptions is 'What applications say of their agents. For kakunin_registrar, kakunin_operator, kakunin_auditor';

-- Decision chains --------------------------------------------------------------------------------------

create table kakunin_private.decision_chains (
  chain_id    uuid primary key default gen_random_uuid(),
  name        text not null,
  description text,
  metadata    jsonb,
  created_at  timestamptz not null,
  created_by  name not null,
  closed_at   timestamptz,
  events      integer not null default 0,
  hash        bytea not null default decode(repeat('00', 32), 'hex')
);
create index decision_chains_created_at on kakunin_private.decision_chains (created_at, chain_id);
comment on table kakunin_private.decision_chains is 'Groups of events that led to one decision';
comment on column kakunin_private.decision_chains.hash is 'SHA-256 of what it was before the newest event and that event''s leaf hash';

create table kakunin_private.decision_chain_events (
  chain_id uuid not null references kakunin_private.decision_chains,
  sequence integer not null,
  event_id bigint not null,
  primary key (chain_id, sequence)
);
comment on table kakunin_private.decision_chain_events is 'Which entries of the ledger a decision chain has, in their order';

create function kakunin.open_decision_chain(name text, description text default null, metadata jsonb default null) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain_id uuid;
begin
  if length(description) > 2000 or jsonb_typeof(metadata) <> 'object' or octet_length(metadata::text) > 16384
    or kakunin_private.is_too_deep(metadata) then
    raise exception using errcode = 'KA010',
      message = 'a description is at most 2000 characters, and metadata a JSON object of at most 16384 bytes, nested at most 64 deep';
  end if;
  insert into kakunin_private.decision_chains (name, description, metadata, created_at, created_by)
  values (kakunin_private.check_text('a decision chain''s name', open_decision_chain.name, 200), description, metadata, kakunin_private.clock(), session_user)
  returning chain_id into v_chain_id;
  perform kakunin_private.record('chain.opened', null, jsonb_build_object('chain_id', v_chain_id, 'name', open_decision_chain.name));
  return v_chain_id;
end
$$;
comment on function kakunin.open_decision_chain(text, text, jsonb) is 'Begins a decision chain and returns its id. For kakunin_gateway';

create function kakunin_private.lock_decision_chain(p_chain_id uuid) returns kakunin_private.decision_chains
language plpgsql volatile parallel unsafe
as $$
declare
  v_chain kakunin_private.decision_chains;
begin
  perform kakunin_private.check_snapshot_is_fresh('a decision chain');
  select * into v_chain from kakunin_private.decision_chains d where d.chain_id = p_chain_id for no key update;
  if not found then
    raise exception using errcode = 'KA010', message = format('no decision chain %s', coalesce(p_chain_id::text, 'given')),
      hint = 'kakunin.decision_chains shows them.';
  elsif v_chain.closed_at is not null then
    raise exception using errcode = 'KA010', message = format('decision chain %s is closed', p_chain_id),
      hint = 'Open another.';
  end if;
  return v_chain;
end
$$;
comment on function kakunin_private.lock_decision_chain(uuid) is 'An open decision chain, locked; KA010 where there is none';

create function kakunin.append_to_decision_chain(
  chain_id uuid, event_type text, metadata jsonb default '{}', session_id text default null, occurred_at timestamptz default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain constant kakunin_private.decision_chains := kakunin_private.lock_decision_chain(append_to_decision_chain.chain_id);
  v_entry jsonb;
begin
  if coalesce(jsonb_typeof(metadata) <> 'object', true) then
    raise exception using errcode = 'KA010', message = 'the metadata of an event in a decision chain is a JSON object';
  elsif v_chain.events >= 1000 then
    raise exception using errcode = 'KA010', message = 'a decision chain has at most 1000 events', hint = 'Close it and open another.';
  end if;
  v_entry := kakunin.audit_log_append(
    event_type, metadata || jsonb_build_object('decision_chain', v_chain.chain_id), session_id, occurred_at);
  insert into kakunin_private.decision_chain_events (chain_id, sequence, event_id)
  values (v_chain.chain_id, v_chain.events + 1, (v_entry ->> 'event_id')::bigint);
  update kakunin_private.decision_chains d
     set events = d.events + 1, hash = sha256(d.hash || decode(v_entry ->> 'hash', 'hex'))
   where d.chain_id = v_chain.chain_id;
  return v_entry;
end
$$;
comment on function kakunin.append_to_decision_chain(uuid, text, jsonb, text, timestamptz) is
  'audit_log_append() of an event that belongs to this open decision chain. For kakunin_gateway';

create function kakunin.close_decision_chain(chain_id uuid) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain constant kakunin_private.decision_chains := kakunin_private.lock_decision_chain(close_decision_chain.chain_id);
begin
  update kakunin_private.decision_chains d set closed_at = kakunin_private.clock() where d.chain_id = v_chain.chain_id;
  perform kakunin_private.record('chain.closed', null, jsonb_build_object(
    'chain_id', v_chain.chain_id, 'events', v_chain.events, 'hash', encode(v_chain.hash, 'hex')));
  return encode(v_chain.hash, 'hex');
end
$$;
comment on function kakunin.close_decision_chain(uuid) is
  'Closes a decision chain for good and returns its hash, which the ledger has from now on. For kakunin_gateway';

create function kakunin.verify_decision_chain(chain_id uuid) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain  kakunin_private.decision_chains;
  v_hash   bytea := decode(repeat('00', 32), 'hex');
  v_events integer := 0;
  v_gap    integer;
  v_event  record;
begin
  select * into v_chain from kakunin_private.decision_chains d where d.chain_id = verify_decision_chain.chain_id;
  if not found then
    return null;
  end if;
  for v_event in
    select e.sequence, l.entry
      from kakunin_private.decision_chain_events e left join kakunin_private.ledger l on l.event_id = e.event_id
     where e.chain_id = v_chain.chain_id order by e.sequence
  loop
    v_events := v_events + 1;
    if v_event.entry is null or v_event.sequence <> v_events then
      v_gap := coalesce(v_gap, v_event.sequence);
    else
      v_hash := sha256(v_hash || kakunin_private.leaf_hash(v_event.entry));
    end if;
  end loop;
  return jsonb_build_object(
    'chain_id', v_chain.chain_id, 'name', v_chain.name, 'event_count', v_chain.events,
    'status', case when v_chain.closed_at is null then 'open' else 'closed' end,
    'chain_hash', encode(v_chain.hash, 'hex'), 'created_at', v_chain.created_at, 'closed_at', v_chain.closed_at,
    'verified', v_gap is null and v_hash = v_chain.hash and v_events = v_chain.events,
    'note', case when v_gap is not null then format('entry %s is not in this database: it was archived, or removed', v_gap)
                 when v_hash <> v_chain.hash or v_events <> v_chain.events then 'the ledger''s entries are not those this chain was made of'
                 when v_chain.closed_at is null then 'it is open: more events may follow' end);
end
$$;
comment on function kakunin.verify_decision_chain(uuid) is
  'Works a decision chain''s hash out again from the ledger''s entries: verified, and a note where there is something to say; NULL for one that is unknown. For kakunin_gateway and kakunin_auditor';

create view kakunin.decision_chains with (security_barrier = true) as
  select d.chain_id, d.name, d.description, d.metadata, d.created_at, d.created_by, d.closed_at, d.events, encode(d.hash, 'hex') as hash
    from kakunin_private.decision_chains d;
comment on view kakunin.decision_chains is 'Decision chains and their hashes. For kakunin_gateway and kakunin_auditor';

create view kakunin.decision_chain_events with (security_barrier = true) as
  select e.chain_id, e.sequence, e.event_id from kakunin_private.decision_chain_events e;
comment on view kakunin.decision_chain_events is 'Which entries of kakunin.audit_log a decision chain has. For kakunin_auditor';

-- Reports ----------------------------------------------------------------------------------------------

create table kakunin_private.reports (
  report_id    uuid primary key,
  agent_id     uuid not null references kakunin_private.agents,
  period_start timestamptz not null,
  period_end   timestamptz not null,
  created_at   timestamptz not null,
  created_by   name not null,
  document     text not null
);
comment on table kakunin_private.reports is 'Compliance reports as they were made';
comment on column kakunin_private.reports.document is 'JSON. The ledger has the SHA-256 of its UTF-8';

-- Where what a standard asks for is shown. Members of the report, by control.
create function kakunin_private.report_standards(p_frameworks text[]) returns jsonb
language sql immutable parallel safe
return (
  select coalesce(jsonb_object_agg(s.framework, s.controls), '{}')
    from (values
      ('iso_27001', '{"A.5.16": ["agent", "certificates"], "A.5.18": ["certificates", "decisions"], "A.5.26": ["halts", "decisions"], "A.8.15": ["events", "ledger"], "A.8.16": ["risk", "events"], "A.8.24": ["certificates", "ledger"]}'::jsonb),
      ('nist_csf', '{"PR.AA-01": ["agent", "certificates"], "PR.AA-05": ["certificates"], "PR.PS-04": ["events", "ledger"], "DE.CM-09": ["risk", "events"], "RS.MI-01": ["halts", "decisions"]}'::jsonb)
    ) s(framework, controls)
   where s.framework = any (p_frameworks));
comment on function kakunin_private.report_standards(text[]) is
  'Controls of ISO/IEC 27001:2022 annex A and NIST CSF 2.0, and the members of a report that are evidence for each';

create function kakunin.create_report(agent_id uuid, days integer default 30, notes text default null, frameworks text[] default '{}') returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now       constant timestamptz := kakunin_private.clock();
  v_report_id constant uuid := gen_random_uuid();
  v_from      timestamptz;
  v_document  text;
begin
  perform kakunin_private.check_known_agent(create_report.agent_id);
  if not coalesce(days between 1 and 366, false) or length(notes) > 2000
    or not coalesce(frameworks <@ array['iso_27001', 'nist_csf']::text[], false) then
    raise exception using errcode = 'KA010', message = 'a report is of 1 to 366 days, with notes of at most 2000 characters',
      hint = 'frameworks are iso_27001 and nist_csf';
  end if;
  v_from := v_now - make_interval(hours => 24 * days);
  v_document := (jsonb_build_object(
    'type', 'kakunin.report/1', 'report_id', v_report_id, 'installation', kakunin.installation_id(),
    'period', jsonb_build_object('start', kakunin_private.rfc3339(v_from), 'end', kakunin_private.rfc3339(v_now), 'days', days),
    'notes', notes,
    'agent', (select jsonb_build_object('agent_id', a.agent_id, 'name', a.name, 'tenant', a.tenant, 'model', a.model,
                'model_version', a.model_version, 'model_hash', a.model_hash, 'created_at', kakunin_private.rfc3339(a.created_at),
                'suspended_at', kakunin_private.rfc3339(a.suspended_at), 'suspended_reason', a.suspended_reason)
                from kakunin_private.agents a where a.agent_id = create_report.agent_id),
    'certificates', (select coalesce(jsonb_agg(
                kakunin.verify_certificate(c.serial) || jsonb_build_object('sha256', encode(sha256(c.der), 'hex'))
                order by c.registered_at), '[]')
                from kakunin_private.certificates c
               where c.agent_id = create_report.agent_id and c.not_after >= v_from),
    'risk', kakunin_private.risk_profile(create_report.agent_id),
    'halts', (select coalesce(jsonb_agg(jsonb_build_object('halt_id', h.halt_id, 'halted_at', kakunin_private.rfc3339(h.halted_at),
                'reason', h.reason, 'certificates', to_jsonb(h.serials), 'signed', h.signature is not null) order by h.halted_at), '[]')
                from kakunin_private.halts h where h.agent_id = create_report.agent_id and h.halted_at >= v_from),
    'ledger', (select jsonb_build_object('tree_size', t.tree_size, 'root', encode(t.root, 'hex'), 'key_id', t.key_id)
                from kakunin.tree_heads t order by t.tree_size desc limit 1),
    'standards', kakunin_private.report_standards(frameworks)
  ) || (
    with entries as (
      select l.event_id, l.recorded_at, l.entry::jsonb as entry
        from kakunin_private.ledger l
       where l.agent_id = create_report.agent_id and l.recorded_at >= v_from and l.recorded_at <= v_now
    ), events as (
      select e.entry ->> 'event_type' as event_type, e.entry -> 'risk' ->> 'band' as band, (e.entry -> 'risk' ->> 'score')::double precision as score
        from entries e where e.entry -> 'risk' <> 'null'
    )
    select jsonb_build_object(
      'events', jsonb_build_object(
        'total', (select count(*) from events), 'highest_score', (select max(v.score) from events v),
        'by_type', (select coalesce(jsonb_object_agg(t.event_type, t.n), '{}') from (select v.event_type, count(*) as n from events v group by 1) t),
        'by_band', (select coalesce(jsonb_object_agg(t.band, t.n), '{}') from (select v.band, count(*) as n from events v group by 1) t)),
      'decisions', (select coalesce(jsonb_agg(jsonb_build_object(
          'event_id', e.event_id, 'recorded_at', kakunin_private.rfc3339(e.recorded_at), 'event_type', e.entry -> 'event_type', 'metadata', e.entry -> 'metadata')
          order by e.event_id), '[]') from entries e
         -- What was decided about it. What it did itself (an audited table, say) is as much as it likes, and would be more than
         -- a document holds.
         where e.entry -> 'risk' = 'null' and e.entry -> 'serial' = 'null'))))::text;
  insert into kakunin_private.reports (report_id, agent_id, period_start, period_end, created_at, created_by, document)
  values (v_report_id, create_report.agent_id, v_from, v_now, v_now, session_user, v_document);
  perform kakunin_private.record('report.created', create_report.agent_id, jsonb_build_object(
    'report_id', v_report_id, 'sha256', encode(sha256(convert_to(v_document, 'UTF8')), 'hex')));
  return v_report_id;
end
$$;
comment on function kakunin.create_report(uuid, integer, text, text[]) is
  'Makes a report of what the database knows of an agent and the last days, keeps it, and returns its id. For kakunin_auditor';

create view kakunin.reports with (security_barrier = true) as
  select r.report_id, r.agent_id, r.period_start, r.period_end, r.created_at, r.created_by, r.document from kakunin_private.reports r;
comment on view kakunin.reports is 'Compliance reports. For kakunin_auditor';
