-- Ledger: what agents did and what was decided about them, append-only.
--
-- An entry is one line of JSON, built here once and never built again: its UTF-8 bytes are what is hashed, sealed,
-- exported and verified (docs/ledger-format.md). The columns beside it are for finding it; verification
-- compares them with what the entry says.
--
-- Who writes. audit_log_append() for the agent bound to the session; the triggers of protect(..., audit => true) for
-- changes of a protected table; and the functions of this kit, for what they decide (certificate.issued, agent.halted,
-- settings.changed, ...). A name with a dot in it is the kit's own, so an agent cannot make an entry look like a decision.
--
-- Chains. Each entry has the hash of the one before it in its chain. An agent has a chain of its own, and one
-- more for each of its transactions that append at the same time: whoever appends takes the first
-- chain that nobody holds, so nobody ever waits for another transaction, least of all a halt. What is decided goes to
-- chains that no agent can hold.
--
-- Never changed. Triggers that fire ALWAYS refuse UPDATE, DELETE and TRUNCATE to everybody, the owner included;
-- other roles have no privilege on the table either. Detaching a partition is DDL, which only an event trigger can
-- refuse, and only a superuser can make one: sql/superuser/guard_ledger.sql. A superuser can take all of this away. That is
-- what the signed tree in the next file is for: it does not prevent, it proves.
--
-- Partitions are by month, made ahead by make_partitions(). Where that was forgotten the default partition takes the
-- entries: an append, and with it a halt, must not fail for want of a table.

create type kakunin_private.baseline as (n double precision, mean double precision, square double precision);
comment on type kakunin_private.baseline is
  'What is usual of a number: how often it was given, the mean of its logarithm and the sum of squared differences from that';

create table kakunin_private.chains (
  chain_id bigint generated always as identity primary key,
  agent_id uuid not null,
  sequence bigint not null,
  head     bytea not null,  -- no checks here: they are parsed anew by every append
  -- What the events appended to it add to the risk of their agent: 62_risk.sql.
  risk_epoch    integer not null default 0,
  risk_at       timestamptz not null default 'epoch',  -- not infinity, which 15 and 16 cannot subtract
  hard          double precision not null default 0,
  soft          double precision not null default 0,
  drift         double precision not null default 0,
  alerted       boolean not null default false,
  hour          timestamptz,
  hour_soft     double precision not null default 0,
  hour_events   bigint not null default 0,
  counts        jsonb not null default '{}',
  expected      double precision,
  usual_amount  kakunin_private.baseline not null default row(0, 0, 0),
  usual_read    kakunin_private.baseline not null default row(0, 0, 0),
  usual_written kakunin_private.baseline not null default row(0, 0, 0),
  known         integer not null default 0,
  spent_on      timestamptz,
  spent_usd     numeric not null default 0
) with (fillfactor = 50);  -- room for its next version on the same page
create index chains_agent_id on kakunin_private.chains (agent_id, chain_id);
comment on table kakunin_private.chains is 'The chains of the ledger and where each one stands';
comment on column kakunin_private.chains.agent_id is 'Whose it is; the nil UUID for decisions, and the one of ones for changes of a table by others than agents';
comment on column kakunin_private.chains.head is 'The hash of its newest entry; zeros before the first';
comment on column kakunin_private.chains.hard is 'Excess of its events at risk_at, what is certain; soft what is unusual, hour_soft its part in this hour, of hour_events events';
comment on column kakunin_private.chains.drift is 'Excess that drift stands for, at the beginning of the hour; it fades as well';
comment on column kakunin_private.chains.alerted is 'Whether an alert was sent since its agent was last clearly below high';
comment on column kakunin_private.chains.counts is
  'By event type, what this hour had: events, excess, amounts, their sum, the sum of their logarithms and of those squared';
comment on column kakunin_private.chains.expected is 'Events that are not unusual in this hour; NULL while the history is too short';
comment on column kakunin_private.chains.usual_amount is 'Of amounts in USD; usual_read of rows read, usual_written of rows written';
comment on column kakunin_private.chains.known is 'Rows it has added to risk_known';
comment on column kakunin_private.chains.spent_usd is 'Amounts of transaction_initiated on the day spent_on (UTC)';

comment on sequence kakunin_private.chains_chain_id_seq is 'Ids of chains';

create sequence kakunin_private.event_ids;
comment on sequence kakunin_private.event_ids is 'Ids of events. What was rolled back leaves a gap';

create table kakunin_private.ledger (
  event_id    bigint not null,
  recorded_at timestamptz not null,
  agent_id    uuid,
  xid         xid8 not null,
  entry       text collate "C" not null,
  primary key (event_id, recorded_at)  -- a key of a partitioned table has the partition's column in it
) partition by range (recorded_at);
create index ledger_agent_id on kakunin_private.ledger (agent_id, event_id);
create index ledger_xid on kakunin_private.ledger (xid, event_id);
comment on table kakunin_private.ledger is 'The entries. Rows are added and nothing else';
comment on column kakunin_private.ledger.agent_id is 'The agent that did it, or whom it is about';
comment on column kakunin_private.ledger.xid is 'The transaction that wrote it: what tells the sealer which entries are committed';
comment on column kakunin_private.ledger.entry is 'The entry. Its bytes in UTF-8 are what is hashed and signed';

create table kakunin_private.partitions (
  name        name primary key,
  from_at     timestamptz not null,
  to_at       timestamptz not null,
  archived_at timestamptz,
  archived    int8multirange,
  check ((archived_at is null) = (archived is null))
);
comment on table kakunin_private.partitions is 'The partitions of the ledger by time: those that are live, and those that were archived';
comment on column kakunin_private.partitions.archived is 'Which leaves of the tree its entries are';

-- A row each for what is written at different moments by different people: none waits for another.
create table kakunin_private.sleeper (
  only_row boolean primary key default true check (only_row),
  asleep   boolean not null default false
) with (fillfactor = 10);
insert into kakunin_private.sleeper default values;
comment on table kakunin_private.sleeper is 'Whether the worker sleeps and is to be notified of the next entry';

-- Never changed --------------------------------------------------------------------------------------

create function kakunin_private.refuse_change() returns trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'KA006',
    message = format('%s of %I.%I is refused: the ledger is append-only', tg_op, tg_table_schema, tg_table_name),
    hint = 'What is wrong in it is corrected by another entry. Partitions leave by kakunin.archive_partition().';
end
$$;
comment on function kakunin_private.refuse_change() is 'Trigger: KA006, whatever the statement and whoever sends it';

create function kakunin_private.make_append_only(p_table regclass) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- A statement's trigger fires where the table is named, so a partition has its own; and when no row is touched.
  execute format('create trigger append_only before update or delete or truncate on %s'
    ' for each statement execute function kakunin_private.refuse_change()', p_table);
  -- ALWAYS: also with session_replication_role = replica.
  execute format('alter table %s enable always trigger append_only', p_table);
  execute format('comment on trigger append_only on %s is %L', p_table, 'KA006 for every change');
end
$$;
comment on function kakunin_private.make_append_only(regclass) is 'Puts the trigger on a table that refuses every change but INSERT';

do $$ begin perform kakunin_private.make_append_only('kakunin_private.ledger'); end $$;

create table kakunin_private.ledger_default partition of kakunin_private.ledger default;
comment on table kakunin_private.ledger_default is 'Entries of a time for which no partition was made ahead';
do $$ begin perform kakunin_private.make_append_only('kakunin_private.ledger_default'); end $$;

create function kakunin.make_partitions(ahead interval default '3 months') returns name[]
language plpgsql volatile parallel unsafe security definer
-- Attaching waits for whoever has read the default partition and has not ended; others queue up behind that.
set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  v_month timestamp := date_trunc('month', kakunin_private.clock() at time zone interval '0');
  v_end   timestamp;
  v_name  text;
  v_made  name[] := '{}'::name[];
begin
  if coalesce(make_partitions.ahead not between '0' and interval '10 years', true) then
    raise exception using errcode = 'KA010', message = 'partitions are made 0 to 10 years ahead';
  end if;
  v_end := kakunin_private.clock() at time zone interval '0' + make_partitions.ahead;
  -- One at a time: two workers at once would make the same one. Nobody but them queues up here, so this may take longer.
  perform set_config('lock_timeout', '30s', true);
  lock table kakunin_private.partitions in share row exclusive mode;
  perform set_config('lock_timeout', '200ms', true);
  while v_month <= v_end loop
    v_name := 'ledger_' || to_char(v_month, 'YYYYMM');
    -- A month that the default partition has entries of stays there: nothing is ever moved.
    if not exists (select from kakunin_private.partitions p where p.name = v_name::name)
      and not exists (select from kakunin_private.ledger_default l
                       where l.recorded_at >= v_month at time zone interval '0'
                         and l.recorded_at < (v_month + interval '1 month') at time zone interval '0') then
      insert into kakunin_private.partitions (name, from_at, to_at)
      values (v_name::name, v_month at time zone interval '0', (v_month + interval '1 month') at time zone interval '0');
      -- Made first and attached then: that lets appends to the other partitions go on.
      execute format('create table kakunin_private.%I (like kakunin_private.ledger including all)', v_name);
      execute format('comment on table kakunin_private.%I is %L', v_name, 'Entries of ' || to_char(v_month, 'YYYY-MM') || ' (UTC)');
      perform kakunin_private.make_append_only(format('kakunin_private.%I', v_name)::regclass);
      execute format('alter table kakunin_private.ledger attach partition kakunin_private.%I for values from (%L) to (%L)',
        v_name, to_char(v_month, 'YYYY-MM-DD') || ' 00:00:00+00',
        to_char(v_month + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00');
      v_made := v_made || v_name::name;
    end if;
    v_month := v_month + interval '1 month';
  end loop;
  return v_made;
end
$$;
comment on function kakunin.make_partitions(interval) is
  'Makes the ledger''s monthly partitions that are missing from now until so far ahead; returns their names. A month that came before it had one stays in the default partition. The worker calls it. For kakunin_worker, kakunin_operator';

-- Appending ------------------------------------------------------------------------------------------

create function kakunin_private.rfc3339(p_at timestamptz) returns text
language sql stable parallel safe
return to_char(p_at at time zone interval '0', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
comment on function kakunin_private.rfc3339(timestamptz) is 'The moment in UTC with microseconds, as entries have it';

create function kakunin_private.leaf_hash(p_entry text) returns bytea
language sql stable parallel safe
return sha256(E'\\x00'::bytea || convert_to(p_entry, 'UTF8'));
comment on function kakunin_private.leaf_hash(text) is 'The hash of an entry, RFC 6962 section 2.1: of a zero byte and its bytes';

-- Not in a halt's or a revocation's way: NOTIFY takes a lock of the whole cluster and fails where its queue is full (may_notify()).
create function kakunin_private.wake_worker() returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- One transaction wakes it, and the others go on. A queue that somebody else has half filled is left alone: the
  -- worker looks by itself as well.
  if kakunin_private.may_notify() then
    update kakunin_private.sleeper s set asleep = false
     where s.only_row = (select w.only_row from kakunin_private.sleeper w where w.asleep for update skip locked);
    if found then
      perform pg_notify('kakunin_ledger', '');
    end if;
  end if;
end
$$;
comment on function kakunin_private.wake_worker() is 'Notifies the worker if it sleeps and nobody has yet';

create type kakunin_private.taken as (chain kakunin_private.chains, installation uuid, asleep boolean);
comment on type kakunin_private.taken is 'A chain that this transaction has locked, and what appending to it needs to know';

create type kakunin_private.assessed as (chain kakunin_private.chains, risk jsonb);
comment on type kakunin_private.assessed is 'A chain as it is after an event, and what is said of the event';

-- Nobody ever waits here: chains that others hold are passed over, and where there is no other one it makes one.
create function kakunin_private.take_chain(p_chain_of uuid) returns kakunin_private.taken
language plpgsql volatile parallel unsafe
as $$
declare
  c_decisions constant uuid := '00000000-0000-0000-0000-000000000000'::uuid;
  -- A transaction that keeps its snapshot cannot continue a chain that went on since (40001). An agent's has to be run
  -- again, as with any row; a decision must not fail by the one before it, and begins another chain.
  v_any   constant boolean := p_chain_of <> c_decisions or kakunin_private.snapshot_is_fresh();
  v_taken kakunin_private.taken;
  v_made  bigint;  -- its xmin is that of a subtransaction, where there is one
begin
  loop
    select c as chain, (select i.installation_id from kakunin_private.installation i) as installation,
           (select s.asleep from kakunin_private.sleeper s) as asleep
      into v_taken
      from kakunin_private.chains c
     where c.agent_id = p_chain_of and (v_any or c.xmin = pg_current_xact_id()::xid or c.chain_id = v_made)
     order by c.chain_id
     limit 1
       for update of c skip locked;
    exit when found;
    insert into kakunin_private.chains (agent_id, sequence, head) values (p_chain_of, 0, decode(repeat('00', 32), 'hex'))
    returning chain_id into v_made;
  end loop;
  return v_taken;
end
$$;
comment on function kakunin_private.take_chain(uuid) is
  'Locks the first free chain of an owner (the nil UUID for decisions), or a new one, for this transaction';

create function kakunin_private.write_entry(
  p_chain kakunin_private.chains, p_installation uuid,
  p_event_type text, p_agent_id uuid, p_serial text, p_session_id text, p_metadata text, p_risk jsonb
) returns jsonb
language plpgsql volatile parallel unsafe
as $$
declare
  v_event_id    bigint;
  v_recorded_at timestamptz;
  v_entry       text;
  v_hash        bytea;
begin
  -- The id is drawn while the chain is held, so that ids rise along it; and while the ledger's table is, which the
  -- statement has from its beginning, for reseal().
  insert into kakunin_private.ledger (event_id, recorded_at, agent_id, xid, entry)
  select n.event_id, n.recorded_at, p_agent_id, pg_current_xact_id(), concat(
           '{"kakunin":"entry/1","installation":"', p_installation,
           '","event_id":', n.event_id,
           ',"recorded_at":"', kakunin_private.rfc3339(n.recorded_at),
           '","event_type":"', p_event_type,
           case when p_agent_id is null then '","agent_id":null' else '","agent_id":"' || p_agent_id || '"' end,
           case when p_serial is null then ',"serial":null' else ',"serial":"' || p_serial || '"' end,
           ',"login":', to_json(session_user::text),
           ',"session_id":', coalesce(to_json(p_session_id)::text, 'null'),
           ',"chain":', p_chain.chain_id, ',"sequence":', p_chain.sequence + 1, ',"prev":"', encode(p_chain.head, 'hex'),
           '","risk":', coalesce(p_risk::text, 'null'), ',"metadata":', p_metadata, '}')
    from (select nextval('kakunin_private.event_ids') as event_id, kakunin_private.clock() as recorded_at offset 0) n
  returning event_id, recorded_at, entry into v_event_id, v_recorded_at, v_entry;
  v_hash := kakunin_private.leaf_hash(v_entry);
  -- By its key, and not its ctid: what is locked may be a newer version of the row than a snapshot has.
  update kakunin_private.chains c
     set sequence = p_chain.sequence + 1, head = v_hash, risk_epoch = p_chain.risk_epoch, risk_at = p_chain.risk_at,
         hard = p_chain.hard, soft = p_chain.soft, drift = p_chain.drift, alerted = p_chain.alerted, hour = p_chain.hour,
         hour_soft = p_chain.hour_soft, hour_events = p_chain.hour_events, counts = p_chain.counts,
         expected = p_chain.expected, usual_amount = p_chain.usual_amount, usual_read = p_chain.usual_read,
         usual_written = p_chain.usual_written, known = p_chain.known, spent_on = p_chain.spent_on, spent_usd = p_chain.spent_usd
   where c.chain_id = p_chain.chain_id;
  return jsonb_build_object(
    'event_id', v_event_id, 'event_type', p_event_type, 'agent_id', p_agent_id,
    'recorded_at', kakunin_private.rfc3339(v_recorded_at),
    'chain', p_chain.chain_id, 'sequence', p_chain.sequence + 1, 'hash', encode(v_hash, 'hex'), 'prev', encode(p_chain.head, 'hex'));
end
$$;
comment on function kakunin_private.write_entry(kakunin_private.chains, uuid, text, uuid, text, text, text, jsonb) is
  'Appends an entry to a chain that this transaction has taken, stores the chain as it is given and says where the entry stands';

create function kakunin_private.append(
  p_event_type text, p_agent_id uuid, p_serial text, p_session_id text, p_metadata text, p_chain_of uuid
) returns jsonb
language plpgsql volatile parallel unsafe
as $$
declare
  v_taken constant kakunin_private.taken := kakunin_private.take_chain(p_chain_of);
  v_entry jsonb;
begin
  v_entry := kakunin_private.write_entry(
    v_taken.chain, v_taken.installation, p_event_type, p_agent_id, p_serial, p_session_id, p_metadata, null);
  if v_taken.asleep and p_serial is not null then  -- of an agent, and nobody else
    perform kakunin_private.wake_worker();
  end if;
  return v_entry;
end
$$;
comment on function kakunin_private.append(text, uuid, text, text, text, uuid) is
  'Appends an entry to the first free chain of its owner (the nil UUID for decisions) and says where it stands. It is not scored';

create function kakunin_private.record(p_event_type text, p_agent_id uuid, p_metadata jsonb) returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_entry constant jsonb := kakunin_private.append(
    p_event_type, p_agent_id, null, null, p_metadata::text, '00000000-0000-0000-0000-000000000000');
begin
  if p_event_type collate "C" = any (kakunin_private.webhook_events()) then
    perform kakunin_private.queue_webhook(p_event_type, p_agent_id, p_metadata, v_entry, null);
  end if;
end
$$;
comment on function kakunin_private.record(text, uuid, jsonb) is
  'Appends what was decided, and about which agent, to a chain that no agent can hold, and tells the webhooks that want to know';

-- What reads JSON stops at some depth: jq at 256, others at a thousand. Looked at only where there are brackets enough.
create function kakunin_private.is_too_deep(p_value jsonb) returns boolean
language sql immutable parallel safe
return (
  with recursive nested as (
    select p_value as value, 1 as depth
    union all
    select e.value, n.depth + 1
      from nested n,
           lateral (select v.value from jsonb_array_elements(case jsonb_typeof(n.value) when 'array' then n.value else '[]' end) v
                    union all
                    select v.value from jsonb_each(case jsonb_typeof(n.value) when 'object' then n.value else '{}' end) v) e
     where jsonb_typeof(e.value) in ('array', 'object') and n.depth <= 64
  )
  select max(n.depth) > 64 from nested n);
comment on function kakunin_private.is_too_deep(jsonb) is 'Whether arrays and objects are nested more than 64 deep';

create function kakunin_private.is_event_type(p_text text) returns boolean
language sql immutable parallel safe
return p_text collate "C" ~ '^[A-Za-z][A-Za-z0-9_:-]{0,63}$';
comment on function kakunin_private.is_event_type(text) is 'Whether an agent''s event may have this type. One with a dot is the kit''s own';

create function kakunin.audit_log_append(
  event_type text, metadata jsonb default '{}', session_id text default null, occurred_at timestamptz default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer
-- Planning one of its statements anew takes longer than running all of them.
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_now      constant timestamptz := kakunin_private.clock();
  v_type     text collate "C" := event_type;
  v_event    jsonb := coalesce(metadata, '{}');
  v_metadata text collate "C";
  v_binding  text collate "C" := current_setting('kakunin.session', true);
  v_bound    kakunin_private.bound;
  v_taken    kakunin_private.taken;
  v_scored   kakunin_private.assessed;
  v_entry    jsonb;
begin
  if v_type is null or not kakunin_private.is_event_type(v_type) then
    raise exception using errcode = 'KA010',
      message = 'an event type is 1 to 64 characters from A-Z a-z 0-9 _ : -, and begins with a letter',
      hint = 'Such as api_call, data_access or transaction_initiated. Names with a dot are the kit''s own.';
  end if;
  if audit_log_append.occurred_at is not null then
    -- Clocks differ; what is further ahead would move the agent's hours.
    if audit_log_append.occurred_at > v_now + interval '30 seconds' or audit_log_append.occurred_at < v_now - interval '720 hours' then
      raise exception using errcode = 'KA010',
        message = 'an event occurred within the last 30 days, and not later than now',
        hint = 'Compare the clocks. What is older an operator brings in with kakunin.import_events().';
    elsif jsonb_typeof(v_event) = 'object' then
      v_event := v_event || jsonb_build_object('occurred_at', kakunin_private.rfc3339(audit_log_append.occurred_at));
    end if;
  end if;
  v_metadata := v_event::text;
  -- Small enough to stay in the row's page, so that sealing and verifying read no other.
  if octet_length(v_metadata) > 16384 or octet_length(session_id) > 200 then
    raise exception using errcode = 'KA010',
      message = format('an event''s metadata is at most 16384 bytes of JSON and its session id 200; these have %s and %s',
        octet_length(v_metadata), coalesce(octet_length(session_id), 0)),
      hint = 'Keep what is large elsewhere, and put its SHA-256 here.';
  elsif length(v_metadata) - length(translate(v_metadata, '[{', '')) > 64 and kakunin_private.is_too_deep(metadata) then
    raise exception using errcode = 'KA010', message = 'an event''s metadata is nested more than 64 deep';
  end if;
  select b.* into v_bound from kakunin_private.bound_certificate(v_binding) b
   where kakunin_private.mark_bound(v_binding, b.serial);
  if not found then
    -- By another way than a binding, or it raises what is wrong.
    v_bound.serial := kakunin.require_session();
    if v_binding <> '' then
      perform kakunin_private.not_marked();
    end if;
    select c.serial, c.agent_id, c.financial_scope, a.risk_exempt, a.risk_factor, a.risk_epoch into v_bound
      from kakunin_private.certificates c join kakunin_private.agents a on a.agent_id = c.agent_id where c.serial = v_bound.serial;
  end if;
  v_taken := kakunin_private.take_chain(v_bound.agent_id);
  v_scored := kakunin_private.assess(
    v_taken.chain, v_type, v_event, v_bound, coalesce(audit_log_append.occurred_at, v_now), v_now);
  v_entry := kakunin_private.write_entry(
    v_scored.chain, v_taken.installation, v_type, v_bound.agent_id, v_bound.serial, session_id, v_metadata,
    v_scored.risk);
  if v_taken.asleep then
    perform kakunin_private.wake_worker();
  end if;
  return v_entry || v_scored.risk;
end
$$;
comment on function kakunin.audit_log_append(text, jsonb, text, timestamptz) is
  'Appends an event of the agent bound to this session to the ledger and scores it; returns event_id, chain, sequence and hashes, the event''s score, band and factors, and the agent''s agent_score and agent_band. It stands when the transaction commits. For kakunin_agent and kakunin_gateway';

-- Two branches, so that an agent reads its own by the index and an auditor scans. What an entry says is read from the
-- entry. A view's functions are called with its reader's rights, so none here is of the private schema.
create view kakunin.audit_log with (security_barrier = true) as
  select e.event_id, e.recorded_at, j.entry ->> 'event_type' as event_type, e.agent_id, j.entry ->> 'serial' as serial,
         j.entry ->> 'login' as login, j.entry ->> 'session_id' as session_id, j.entry -> 'metadata' as metadata,
         nullif(j.entry -> 'risk', 'null') as risk,
         (j.entry ->> 'chain')::bigint as chain, (j.entry ->> 'sequence')::bigint as sequence, j.entry ->> 'prev' as prev,
         encode(sha256(E'\\x00'::bytea || convert_to(e.entry, 'UTF8')), 'hex') as hash, e.entry
    from (select l.* from kakunin_private.ledger l where (select pg_has_role(current_user, 'kakunin_auditor', 'usage'))
          union all
          select l.* from kakunin_private.ledger l
           where not (select pg_has_role(current_user, 'kakunin_auditor', 'usage'))
             and l.agent_id = (select kakunin.current_agent_id())) e,
         lateral (select e.entry::jsonb as entry) j;
comment on view kakunin.audit_log is
  'The ledger''s entries: the bound agent''s own, or all of them for kakunin_auditor. For kakunin_agent, kakunin_gateway, kakunin_auditor';

do $$ begin perform kakunin.make_partitions(); end $$;
