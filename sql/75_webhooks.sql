-- Webhooks: telling other systems what was decided.
--
-- An operator names endpoints and the events each one wants. record() puts a message into the outbox, in the
-- transaction that decides: what is rolled back is never told, and what is committed is told at least once. The worker
-- claims what is due, sends it, and reports how that went. Claimed is leased: where a worker is killed between the
-- sending and the report, the message is sent again when the lease ends, under the same id, by which its receiver
-- knows it. What fails is tried ten times over three days, and is dead after that; replay_webhooks() sends it again.
--
-- In nobody's way. A halt only reads the endpoints and adds rows of its own: no foreign keys, whose checks wait for
-- whoever holds an endpoint, and fail under SERIALIZABLE for a neighbour's sake; no notification; no row that others
-- change. And what takes something away goes ahead of all else that an endpoint has still to get.
--
-- Secrets sign what is sent, and are here as ciphertext alone: AES-256-GCM under a key that the worker and the operator's
-- command have and the database has not, over the key's bytes, with this installation's and the endpoint's
-- id as associated data. A copy of a database that was made an installation of its own cannot read them, and so
-- sends nothing to the receivers of the first.
--
-- certificate.expired is an event like the others, but nobody decides it: the worker asks expire_certificates()
-- which certificates have expired since.

create table kakunin_private.webhook_endpoints (
  endpoint_id     uuid primary key,
  url             text not null check (url collate "C" ~ '^https?://[!-~]+$' and octet_length(url) <= 1000),
  event_types     text[] collate "C" not null check (cardinality(event_types) > 0),
  secret          bytea not null check (octet_length(secret) between 52 and 92),
  previous_secret bytea check (octet_length(previous_secret) between 52 and 92),
  previous_until  timestamptz,
  created_at      timestamptz not null,
  created_by      name not null,
  disabled_at     timestamptz,
  check ((previous_secret is null) = (previous_until is null))
);
comment on table kakunin_private.webhook_endpoints is 'Who is told of what';
comment on column kakunin_private.webhook_endpoints.secret is
  'Nonce (12 bytes), ciphertext and tag (16 bytes) of 24 to 64 bytes, AES-256-GCM; the key is not in the database';
comment on column kakunin_private.webhook_endpoints.previous_secret is 'The one before it, which signs as well until previous_until';

create table kakunin_private.webhook_messages (
  message_id text collate "C" primary key,
  event_type text collate "C" not null,
  payload    text not null,
  created_at timestamptz not null
);
create index webhook_messages_created_at on kakunin_private.webhook_messages (created_at);
comment on table kakunin_private.webhook_messages is 'The outbox: what is sent, byte for byte';

create table kakunin_private.webhook_deliveries (
  message_id      text collate "C" not null,
  endpoint_id     uuid not null,
  urgent          boolean not null,
  state           text collate "C" not null default 'pending' check (state in ('pending', 'delivered', 'dead')),
  attempts        integer not null default 0,
  created_at      timestamptz not null,
  next_attempt_at timestamptz not null,
  leased_until    timestamptz,
  last_attempt_at timestamptz,
  last_status     integer,
  last_error      text,
  primary key (message_id, endpoint_id)
);
create index webhook_deliveries_due on kakunin_private.webhook_deliveries (endpoint_id, urgent, next_attempt_at)
  include (created_at) where state = 'pending';
create index webhook_deliveries_leased on kakunin_private.webhook_deliveries (endpoint_id, leased_until) where leased_until is not null;
create index webhook_deliveries_dead on kakunin_private.webhook_deliveries (endpoint_id) where state = 'dead';
comment on table kakunin_private.webhook_deliveries is 'How far each message is with each endpoint';
comment on column kakunin_private.webhook_deliveries.urgent is 'Whether it is sent before others that are due';
comment on column kakunin_private.webhook_deliveries.attempts is 'Counted when one begins, so that one that ends the worker counts as well';
comment on column kakunin_private.webhook_deliveries.leased_until is 'Until when nobody else sends it; NULL where nobody does';

create table kakunin_private.expirations (
  serial    text collate "C" primary key,
  not_after timestamptz not null
);
comment on table kakunin_private.expirations is
  'Certificates whose expiry is on record, from a day before expiry_sweep on: a registration that was committed late is found still';

create table kakunin_private.expiry_sweep (
  only_row    boolean primary key default true check (only_row),
  swept_until timestamptz not null default now()
);
insert into kakunin_private.expiry_sweep default values;
comment on table kakunin_private.expiry_sweep is 'One row. Every expiry before it, but for those of its last day, is on record';
create index certificates_not_after on kakunin_private.certificates (not_after);

-- The outbox -----------------------------------------------------------------------------------------

create function kakunin_private.webhook_events() returns text[]
language sql immutable parallel safe
return array['agent.created', 'agent.high_risk', 'agent.suspended',
             'certificate.expired', 'certificate.issued', 'certificate.revoked'];
comment on function kakunin_private.webhook_events() is 'The events an endpoint can have; names of the ledger';

create function kakunin_private.queue_webhook(p_event_type text, p_agent_id uuid, p_metadata jsonb, p_entry jsonb, p_endpoint_id uuid) returns text
language plpgsql volatile parallel unsafe
as $$
declare
  v_now        constant timestamptz := kakunin_private.clock();
  v_message_id text collate "C";
begin
  with wanted as materialized (
    select e.endpoint_id from kakunin_private.webhook_endpoints e
     where e.disabled_at is null
       and case when p_endpoint_id is null then p_event_type collate "C" = any (e.event_types) else e.endpoint_id = p_endpoint_id end
  ), message as (
    insert into kakunin_private.webhook_messages as m (message_id, event_type, payload, created_at)
    select 'msg_' || translate(gen_random_uuid()::text, '-', ''), p_event_type,
           concat('{"type":', to_json(p_event_type),
             ',"timestamp":"', coalesce(p_entry ->> 'recorded_at', kakunin_private.rfc3339(v_now)), '","data":',
             p_metadata || jsonb_build_object(
               'installation', kakunin.installation_id(), 'event_id', p_entry -> 'event_id', 'agent_id', p_agent_id), '}'),
           v_now
     where exists (select from wanted)
    returning m.message_id
  ), queued as (
    insert into kakunin_private.webhook_deliveries (message_id, endpoint_id, urgent, created_at, next_attempt_at)
    select m.message_id, w.endpoint_id,
           p_event_type collate "C" in ('agent.high_risk', 'agent.suspended', 'certificate.revoked'), v_now, v_now
      from message m, wanted w
  )
  select m.message_id into v_message_id from message m;
  return v_message_id;
end
$$;
comment on function kakunin_private.queue_webhook(text, uuid, jsonb, jsonb, uuid) is
  'Puts a message into the outbox for the enabled endpoints that want it, or for this one; returns its id, NULL where nobody does. Waits for nobody';

create function kakunin.expire_certificates(max_certificates integer default 1000) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now         constant timestamptz := kakunin_private.clock();
  v_from        timestamptz;
  v_until       timestamptz;
  v_certificate record;
  v_count       integer := 0;
begin
  if coalesce(expire_certificates.max_certificates not between 1 and 10000, true) then
    raise exception using errcode = 'KA010', message = 'expiries are recorded 1 to 10000 at a time';
  end if;
  perform kakunin_private.check_snapshot_is_fresh('recording expiries');
  -- One at a time, and no certificate's row is touched: a revocation would wait for it.
  select s.swept_until into v_from from kakunin_private.expiry_sweep s for update skip locked;
  if not found then
    return 0;
  end if;
  for v_certificate in
    select c.serial, c.agent_id, c.not_after from kakunin_private.certificates c
     where c.not_after >= v_from - interval '24 hours' and c.not_after < v_now
       and coalesce(c.revoked_at > c.not_after, true)
       and not exists (select from kakunin_private.expirations x where x.serial = c.serial)
     order by c.not_after
     limit expire_certificates.max_certificates
  loop
    insert into kakunin_private.expirations (serial, not_after) values (v_certificate.serial, v_certificate.not_after);
    perform kakunin_private.record('certificate.expired', v_certificate.agent_id, jsonb_build_object(
      'serial', v_certificate.serial, 'not_after', kakunin_private.rfc3339(v_certificate.not_after)));
    v_until := v_certificate.not_after;
    v_count := v_count + 1;
  end loop;
  v_until := greatest(v_from, case when v_count < expire_certificates.max_certificates then v_now else v_until end);
  update kakunin_private.expiry_sweep s set swept_until = v_until where s.only_row;
  delete from kakunin_private.expirations x where x.not_after < v_until - interval '24 hours';
  return v_count;
end
$$;
comment on function kakunin.expire_certificates(integer) is
  'Records certificate.expired once for each certificate that has expired and was not revoked before; returns how many. The worker calls it. For kakunin_worker';

-- Delivering -----------------------------------------------------------------------------------------

create function kakunin_private.webhook_delay(p_attempts integer) returns interval
language sql immutable parallel safe
return (array['5 seconds', '5 minutes', '30 minutes', '2 hours', '5 hours', '10 hours', '14 hours', '20 hours', '24 hours']::interval[])[p_attempts];
comment on function kakunin_private.webhook_delay(integer) is
  'How long to wait after so many failed attempts, as Standard Webhooks advises; NULL after the last';

create function kakunin.claim_webhooks(lease interval default '30 seconds')
returns table (message_id text, endpoint_id uuid, attempt integer, url text, secrets bytea[], payload text)
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_at_once constant integer := 4;
  v_now     constant timestamptz := kakunin_private.clock();
begin
  if coalesce(claim_webhooks.lease not between interval '1 second' and interval '10 minutes', true) then
    raise exception using errcode = 'KA010', message = 'a delivery is leased for 1 second to 10 minutes';
  end if;
  -- A few for each endpoint: one that does not answer keeps no other waiting, and what is claimed is sent at once.
  return query
    with due as materialized (
      select p.message_id, p.endpoint_id
        from kakunin_private.webhook_endpoints e,
             lateral (select d.message_id, d.endpoint_id from kakunin_private.webhook_deliveries d
                       where d.endpoint_id = e.endpoint_id and d.state = 'pending' and d.next_attempt_at <= v_now
                         and coalesce(d.leased_until <= v_now, true)
                       order by d.urgent desc, d.next_attempt_at
                       limit greatest(0, c_at_once - (
                         select count(*) from kakunin_private.webhook_deliveries l
                          where l.endpoint_id = e.endpoint_id and l.leased_until > v_now))
                         for update of d skip locked) p
       where e.disabled_at is null
    ), claimed as (
      update kakunin_private.webhook_deliveries d
         set attempts = d.attempts + 1,
             state = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null then 'pending' else 'dead' end,
             leased_until = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null
               then v_now + claim_webhooks.lease end,
             last_error = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null
               then d.last_error else 'the worker ended during the last attempt' end,
             last_attempt_at = v_now
        from due u
       where d.message_id = u.message_id and d.endpoint_id = u.endpoint_id
      returning d.message_id, d.endpoint_id, d.attempts, d.state
    )
    select c.message_id, c.endpoint_id, c.attempts, e.url,
           array[e.secret] || case when e.previous_until > v_now then array[e.previous_secret] else '{}' end,
           m.payload
      from claimed c
      join kakunin_private.webhook_endpoints e on e.endpoint_id = c.endpoint_id
      join kakunin_private.webhook_messages m on m.message_id = c.message_id
     where c.state = 'pending';
end
$$;
comment on function kakunin.claim_webhooks(interval) is
  'Leases what is due, at most four deliveries at once to an endpoint, with the ciphertexts of the secrets to sign it with. For kakunin_worker';

create function kakunin.report_webhook(message_id text, endpoint_id uuid, attempt integer, status integer default null, error text default null)
returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   constant timestamptz := kakunin_private.clock();
  v_state text collate "C";
begin
  -- A failure of an attempt that has been overtaken says nothing; a success always counts.
  update kakunin_private.webhook_deliveries d
     set state = case when report_webhook.error is null then 'delivered'
                      when kakunin_private.webhook_delay(d.attempts) is null then 'dead'
                      else 'pending' end,
         -- A fifth earlier or later, so that what failed together does not come back together.
         next_attempt_at = v_now + coalesce(kakunin_private.webhook_delay(d.attempts), '0') * (0.8 + 0.4 * random()),
         leased_until = null,
         last_status = case when report_webhook.status between 100 and 599 then report_webhook.status end,
         last_error = left(report_webhook.error, 200)
   where d.message_id = report_webhook.message_id collate "C" and d.endpoint_id = report_webhook.endpoint_id
     and (report_webhook.error is null and d.state <> 'delivered'
          or d.state = 'pending' and d.attempts = report_webhook.attempt and d.leased_until is not null)
  returning d.state into v_state;
  return v_state;
end
$$;
comment on function kakunin.report_webhook(text, uuid, integer, integer, text) is
  'Records how an attempt went; no error is success. Returns delivered, pending (it is tried again) or dead; NULL where another attempt has overtaken it. For kakunin_worker';

create function kakunin.clean_webhooks() returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer;
begin
  with old as materialized (
    select m.message_id from kakunin_private.webhook_messages m
     where m.created_at < (select kakunin_private.clock() - interval '720 hours')  -- once, so that an index bounds it
       and not exists (select from kakunin_private.webhook_deliveries d
                         join kakunin_private.webhook_endpoints e on e.endpoint_id = d.endpoint_id
                        where d.message_id = m.message_id and d.state = 'pending' and e.disabled_at is null)
     order by m.created_at
     limit 1000
       for update of m skip locked
  ), done as (
    delete from kakunin_private.webhook_deliveries d using old o where d.message_id = o.message_id
  )
  delete from kakunin_private.webhook_messages m using old o where m.message_id = o.message_id;
  get diagnostics v_count = row_count;
  return v_count;
end
$$;
comment on function kakunin.clean_webhooks() is
  'Deletes up to 1000 messages that are older than 30 days and that nobody is still to get; returns how many. The worker calls it. For kakunin_worker';

create function kakunin.webhook_status() returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_build_object(
             'endpoints', count(*),
             'disabled', (select count(*) from kakunin_private.webhook_endpoints e where e.disabled_at is not null),
             'pending', coalesce(sum(p.pending), 0),
             'dead', coalesce(sum(d.dead), 0),
             'oldest_pending_seconds', coalesce(extract(epoch from kakunin_private.clock() - min(p.oldest)), 0))
      from kakunin_private.webhook_endpoints e,
           lateral (select count(*) as pending, min(w.created_at) as oldest from kakunin_private.webhook_deliveries w
                     where w.endpoint_id = e.endpoint_id and w.state = 'pending') p,
           lateral (select count(*) as dead from kakunin_private.webhook_deliveries w
                     where w.endpoint_id = e.endpoint_id and w.state = 'dead') d
     where e.disabled_at is null);
end
$$;
comment on function kakunin.webhook_status() is
  'How far deliveries to enabled endpoints are: endpoints, pending, dead, oldest_pending_seconds; and how many are disabled. For kakunin_worker, kakunin_operator, kakunin_auditor';

-- Endpoints ------------------------------------------------------------------------------------------

create function kakunin_private.check_webhook_secret(p_secret bytea) returns void
language plpgsql immutable parallel safe
as $$
begin
  if coalesce(octet_length(p_secret) not between 52 and 92, true) then
    raise exception using errcode = 'KA010',
      message = 'a webhook''s secret comes encrypted: 52 to 92 bytes',
      hint = 'kakunin-db webhooks makes and encrypts it.';
  end if;
end
$$;
comment on function kakunin_private.check_webhook_secret(bytea) is 'KA010 unless it has the size of an encrypted secret';

create function kakunin_private.lock_webhook(p_endpoint_id uuid) returns kakunin_private.webhook_endpoints
language plpgsql volatile parallel unsafe
as $$
declare
  v_endpoint kakunin_private.webhook_endpoints;
begin
  select * into v_endpoint from kakunin_private.webhook_endpoints e where e.endpoint_id = p_endpoint_id for update;
  if not found then
    raise exception using errcode = 'KA010',
      message = format('no webhook endpoint %s', coalesce(p_endpoint_id::text, 'given')),
      hint = 'kakunin-db webhooks list has them.';
  end if;
  return v_endpoint;
end
$$;
comment on function kakunin_private.lock_webhook(uuid) is 'The endpoint, held until the transaction ends; KA010 when there is none';

create function kakunin.add_webhook(endpoint_id uuid, url text, event_types text[], secret bytea) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_most constant integer := 32;
  v_url  text collate "C" := add_webhook.url;
begin
  if add_webhook.endpoint_id is null then
    raise exception using errcode = 'KA010', message = 'an endpoint''s id is needed: its secret is encrypted for it';
  elsif v_url is null or octet_length(v_url) > 1000 or v_url !~ '^https?://([A-Za-z0-9._-]+|[[][0-9A-Fa-f:.]+[]])(:[0-9]{1,5})?([/?][!-~]*)?$'
    or strpos(v_url, '#') > 0 then
    raise exception using errcode = 'KA010',
      message = 'a webhook''s URL is http or https, at most 1000 printable ASCII characters, without a user and without a fragment';
  elsif coalesce(cardinality(add_webhook.event_types) not between 1 and 20, true)
    or not (add_webhook.event_types collate "C") <@ kakunin_private.webhook_events() then
    raise exception using errcode = 'KA010',
      message = 'an endpoint wants one or more of ' || array_to_string(kakunin_private.webhook_events(), ', ');
  end if;
  perform kakunin_private.check_webhook_secret(add_webhook.secret);
  -- Halts read the table, and are not kept by this.
  lock table kakunin_private.webhook_endpoints in share row exclusive mode;
  if (select count(*) from kakunin_private.webhook_endpoints e) >= c_most then
    raise exception using errcode = 'KA010', message = format('there are %s endpoints already, and no more than that', c_most),
      hint = 'kakunin-db webhooks remove takes one away.';
  end if;
  insert into kakunin_private.webhook_endpoints (endpoint_id, url, event_types, secret, created_at, created_by)
  values (add_webhook.endpoint_id, v_url,
          array(select distinct t from unnest(add_webhook.event_types) t order by t), add_webhook.secret, kakunin_private.clock(), session_user)
  on conflict on constraint webhook_endpoints_pkey do nothing;
  if not found then
    raise exception using errcode = 'KA010', message = format('there is an endpoint %s already', add_webhook.endpoint_id),
      hint = 'Give a new one an id of its own.';
  end if;
  -- Without its path, which may be what protects it.
  perform kakunin_private.record('webhook.added', null, jsonb_build_object(
    'endpoint_id', add_webhook.endpoint_id, 'origin', substring(v_url from '^https?://[^/?]+'), 'event_types', to_jsonb(add_webhook.event_types)));
end
$$;
comment on function kakunin.add_webhook(uuid, text, text[], bytea) is
  'Adds an endpoint: its id, URL, the events it wants, and its secret as kakunin-db has encrypted it for this id. For kakunin_operator';

create function kakunin.enable_webhook(endpoint_id uuid, enabled boolean default true) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if enable_webhook.enabled is null then
    raise exception using errcode = 'KA010', message = 'enabled must be true or false';
  end if;
  perform kakunin_private.lock_webhook(enable_webhook.endpoint_id);
  update kakunin_private.webhook_endpoints e
     set disabled_at = case when not enable_webhook.enabled then coalesce(e.disabled_at, kakunin_private.clock()) end
   where e.endpoint_id = enable_webhook.endpoint_id;
  perform kakunin_private.record(case when enable_webhook.enabled then 'webhook.enabled' else 'webhook.disabled' end, null,
    jsonb_build_object('endpoint_id', enable_webhook.endpoint_id));
end
$$;
comment on function kakunin.enable_webhook(uuid, boolean) is
  'Enables or disables an endpoint. While it is disabled it gets no new messages, and what it had still to get waits. For kakunin_operator';

create function kakunin.remove_webhook(endpoint_id uuid) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.lock_webhook(remove_webhook.endpoint_id);
  delete from kakunin_private.webhook_endpoints e where e.endpoint_id = remove_webhook.endpoint_id;
  delete from kakunin_private.webhook_deliveries d where d.endpoint_id = remove_webhook.endpoint_id;
  perform kakunin_private.record('webhook.removed', null, jsonb_build_object('endpoint_id', remove_webhook.endpoint_id));
end
$$;
comment on function kakunin.remove_webhook(uuid) is 'Takes an endpoint away, and what it had still to get. For kakunin_operator';

create function kakunin.rotate_webhook(endpoint_id uuid, secret bytea, overlap interval default '24 hours') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_seconds constant numeric := extract(epoch from rotate_webhook.overlap);
  v_until   timestamptz;
begin
  perform kakunin_private.check_webhook_secret(rotate_webhook.secret);
  if coalesce(v_seconds not between 0 and 30 * 86400, true) then
    raise exception using errcode = 'KA010', message = 'an overlap is 0 to 30 days';
  end if;
  perform kakunin_private.lock_webhook(rotate_webhook.endpoint_id);
  if v_seconds > 0 then
    v_until := kakunin_private.clock() + make_interval(secs => v_seconds::double precision);
  end if;
  update kakunin_private.webhook_endpoints e
     set previous_secret = case when v_until is not null then e.secret end, previous_until = v_until,
         secret = rotate_webhook.secret
   where e.endpoint_id = rotate_webhook.endpoint_id;
  perform kakunin_private.record('webhook.rotated', null, jsonb_build_object(
    'endpoint_id', rotate_webhook.endpoint_id, 'previous_until', kakunin_private.rfc3339(v_until)));
end
$$;
comment on function kakunin.rotate_webhook(uuid, bytea, interval) is
  'Gives an endpoint another secret, encrypted; the one before it signs as well for so long (0 to 30 days). For kakunin_operator';

create function kakunin.test_webhook(endpoint_id uuid) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if (kakunin_private.lock_webhook(test_webhook.endpoint_id)).disabled_at is not null then
    raise exception using errcode = 'KA010', message = 'the endpoint is disabled', hint = 'kakunin-db webhooks enable lets it go on.';
  end if;
  return kakunin_private.queue_webhook('webhook.test', null, '{}', null, test_webhook.endpoint_id);
end
$$;
comment on function kakunin.test_webhook(uuid) is
  'Puts a message of type webhook.test into the outbox for this endpoint; returns its id. For kakunin_operator';

create function kakunin.replay_webhooks(message_id text default null, endpoint_id uuid default null) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   constant timestamptz := kakunin_private.clock();
  v_count integer;
begin
  if replay_webhooks.message_id is null and replay_webhooks.endpoint_id is null then
    raise exception using errcode = 'KA010', message = 'say what to send again: a message, an endpoint, or a message to an endpoint';
  end if;
  with again as materialized (
    select d.message_id, d.endpoint_id
      from kakunin_private.webhook_deliveries d
      join kakunin_private.webhook_endpoints e on e.endpoint_id = d.endpoint_id
     where (replay_webhooks.message_id is null or d.message_id = replay_webhooks.message_id collate "C")
       and (replay_webhooks.endpoint_id is null or d.endpoint_id = replay_webhooks.endpoint_id)
       -- What was delivered is sent again only where it is named.
       and (d.state <> 'delivered' or replay_webhooks.message_id is not null)
       and coalesce(d.leased_until <= v_now, true)
     order by d.created_at
     limit 10000
       for update of d skip locked
  )
  update kakunin_private.webhook_deliveries d
     set state = 'pending', attempts = 0, next_attempt_at = v_now, leased_until = null
    from again a
   where d.message_id = a.message_id and d.endpoint_id = a.endpoint_id;
  get diagnostics v_count = row_count;
  if v_count > 0 then
    perform kakunin_private.record('webhook.replayed', null, jsonb_build_object(
      'message_id', left(replay_webhooks.message_id, 100), 'endpoint_id', replay_webhooks.endpoint_id, 'deliveries', v_count));
  end if;
  return v_count;
end
$$;
comment on function kakunin.replay_webhooks(text, uuid) is
  'Sends again, under the same id: a message, whatever became of it; or what an endpoint did not get, the dead and what waits for another attempt. Returns how many deliveries, at most 10000 at a time. For kakunin_operator';

create view kakunin.webhook_endpoints with (security_barrier = true) as
  select e.endpoint_id, e.url, e.event_types, e.created_at, e.created_by, e.disabled_at, e.previous_until,
         (select count(*) from kakunin_private.webhook_deliveries d where d.endpoint_id = e.endpoint_id and d.state = 'pending') as pending,
         (select count(*) from kakunin_private.webhook_deliveries d where d.endpoint_id = e.endpoint_id and d.state = 'dead') as dead
    from kakunin_private.webhook_endpoints e;
comment on view kakunin.webhook_endpoints is 'Endpoints of webhooks, without their secrets. For kakunin_operator';

create view kakunin.webhook_deliveries with (security_barrier = true) as
  select d.message_id, d.endpoint_id, m.event_type, d.state, d.attempts, d.created_at, d.last_attempt_at, d.last_status, d.last_error,
         case when d.state = 'pending' then d.next_attempt_at end as next_attempt_at, m.payload
    from kakunin_private.webhook_deliveries d
    join kakunin_private.webhook_messages m on m.message_id = d.message_id;
comment on view kakunin.webhook_deliveries is 'What was sent or is to be, to whom, and how that went. For kakunin_operator';
