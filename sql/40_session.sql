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
--             setting, so it is believed only where session_user is a configured gateway login, and where
--             that login is hooked, only by pre_request() before the request's own SQL (46_postgrest.sql).
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

create table kakunin_private.gateway_logins (login name primary key, hooked boolean not null default false);
comment on table kakunin_private.gateway_logins is
  'Logins whose request.jwt.claims are believed, because only PostgREST connects as them';
comment on column kakunin_private.gateway_logins.hooked is
  'Believed by pre_request() alone: what SQL of the request sets later is not';

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
comment on function kakunin_private.session_mac(bytea, bytea, text) is 'HMAC-SHA256 (RFC 2104) in hexadecimal, from the pads that session_keys keeps';

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
  perform kakunin_private.record('key.rotated', null, jsonb_build_object('key', 'session', 'grace', rotate_session_key.grace::text));
end
$$;
comment on function kakunin.rotate_session_key(interval) is
  'Makes a new session key; what the old one signed stays good for the grace, or for nothing at 0. For kakunin_operator';

create function kakunin.renew_installation() returns uuid
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '5s'  -- appends queue up behind reseal()
as $$
declare
  v_before constant uuid := kakunin.installation_id();
begin
  update kakunin_private.installation set installation_id = gen_random_uuid();
  perform kakunin.rotate_session_key('0');
  perform kakunin_private.reseal();
  perform kakunin_private.record('installation.renewed', null, jsonb_build_object('before', v_before));
  return kakunin.installation_id();
end
$$;
comment on function kakunin.renew_installation() is
  'For a copy of a database: a new installation id and session key, so that no assertion, ticket or binding is good in both. Returns the id. For the owner alone';

create function kakunin.set_gateway_logins(logins name[], hooked name[] default '{}') returns void
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
  elsif set_gateway_logins.hooked is null or not set_gateway_logins.hooked <@ set_gateway_logins.logins then
    raise exception using errcode = 'KA010',
      message = 'the hooked logins are some of the gateway logins',
      hint = 'Hooked are those whose PostgREST has db-pre-request = kakunin.pre_request.';
  end if;
  delete from kakunin_private.gateway_logins;
  insert into kakunin_private.gateway_logins
  select distinct l, l = any (set_gateway_logins.hooked) from unnest(set_gateway_logins.logins) l;
  perform kakunin_private.record('settings.changed', null, jsonb_build_object(
    'gateway_logins', to_jsonb(set_gateway_logins.logins), 'hooked', to_jsonb(set_gateway_logins.hooked)));
end
$$;
comment on function kakunin.set_gateway_logins(name[], name[]) is
  'Sets the logins whose request.jwt.claims are believed, and which of them only by pre_request(). For the owner alone: who may call this can become any agent';

create function kakunin.set_replica_lag(max_lag interval) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if set_replica_lag.max_lag < interval '5 seconds' or set_replica_lag.max_lag > interval '1 day' then
    raise exception using errcode = 'KA010',
      message = 'the limit of a standby''s lag is 5 seconds to 1 day, or NULL',
      hint = 'A worker commits every two seconds on an idle primary; a shorter limit would close what is up to date.';
  end if;
  update kakunin_private.replicas r set max_lag = set_replica_lag.max_lag;
  perform kakunin_private.record('settings.changed', null, jsonb_build_object('max_lag', set_replica_lag.max_lag::text));
end
$$;
comment on function kakunin.set_replica_lag(interval) is
  'Sets how far behind a standby may be that answers agents (1 minute at first): beyond it they see no row there, and KA012. NULL: any lag will do. For kakunin_operator';

-- Reading a binding ---------------------------------------------------------------------------------

create function kakunin_private.serial_from_claims(p_claims text) returns text
language plpgsql stable parallel restricted
as $$
declare
  v_serial text;
begin
  if p_claims is null or p_claims = ''
    or not exists (select from kakunin_private.gateway_logins g where g.login = session_user and not g.hooked) then
    return null;
  end if;
  -- No EXCEPTION block: a policy may call this in parallel mode, where Postgres before 17 has no
  -- subtransactions. PostgREST writes valid JSON; what is not ends the statement.
  v_serial := p_claims::json ->> 'kakunin_cert_serial';
  return case when v_serial is not null then kakunin.normalize_serial(v_serial) end;
end
$$;
comment on function kakunin_private.serial_from_claims(text) is
  'The kakunin_cert_serial claim, where session_user is a configured gateway login that is not hooked; otherwise NULL';

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

-- Which backend is bound to what, for halt_agent(terminate => true): an advisory lock of the transaction. The
-- agent's SQL cannot let go of it but by rolling back to a savepoint, and may then put the binding back, which it
-- can read. So current_cert_serial() takes the lock too: what a transaction has read or written as an agent, and
-- not undone, it holds the lock for. Its second number is a hash of the serial. The first is one that nobody
-- else can tell beforehand, to hold the lock and so keep a binding from being made.
create function kakunin_private.mark_bound(p_binding text, p_serial text) returns boolean
language sql volatile parallel restricted
return pg_try_advisory_xact_lock_shared(
  hashtext(p_binding collate "C") # timestamp_hash(transaction_timestamp() at time zone interval '0'), hashtext(p_serial collate "C"));
comment on function kakunin_private.mark_bound(text, text) is 'Marks this transaction as bound to the serial; false where another session holds the lock';

create type kakunin_private.bound as (
  serial text, agent_id uuid, financial_scope jsonb, risk_exempt boolean, risk_factor double precision, risk_epoch integer
);
comment on type kakunin_private.bound is 'What a session is bound to, and what scoring its events needs';

-- The certificate behind a binding, if the binding is genuine and the certificate may be used now; no row otherwise.
-- bound_serial() and is_usable() in one, written to be inlined: every statement on a protected table pays for this, and
-- a second query would double that.
create function kakunin_private.bound_certificate(p_binding text) returns setof kakunin_private.bound
language sql stable parallel restricted rows 1
begin atomic
  select c.serial, c.agent_id, c.financial_scope, a.risk_exempt, a.risk_factor, a.risk_epoch
    from kakunin_private.session_keys k
    join kakunin_private.certificates c on c.serial = split_part(p_binding, '|', 2)
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where octet_length(p_binding) <= 250
     and k.key_id = split_part(p_binding, '|', 1)
     and kakunin_private.key_is_good(k.key_id, k.valid_until)
     and kakunin_private.binding_is_genuine(k.inner_pad, k.outer_pad, p_binding)
     and (split_part(p_binding, '|', 3) = 'x' or kakunin_private.is_future(split_part(p_binding, '|', 4)))
     and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
     and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
     and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id);
end;
comment on function kakunin_private.bound_certificate(text) is
  'Serial and agent of a binding that this session may use now. Whoever believes it marks the transaction: mark_bound()';

create function kakunin_private.usable_serial(p_serial text) returns setof text
language sql stable parallel restricted rows 1
begin atomic
  select c.serial
    from kakunin_private.certificates c
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where c.serial = p_serial
     and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
     and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
     and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id);
end;
comment on function kakunin_private.usable_serial(text) is 'The serial, in its canonical form, if its certificate may be used now; no row otherwise. Inlined';

create function kakunin.current_cert_serial() returns text
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_binding text collate "C" := current_setting('kakunin.session', true);
  v_claims  text collate "C";
  v_serial  text collate "C";
begin
  if v_binding <> '' then
    return (
      select case when kakunin_private.mark_bound(v_binding, b.serial) then b.serial end
        from kakunin_private.bound_certificate(v_binding) b);
  end if;
  v_claims := current_setting('request.jwt.claims', true);
  if v_claims is null or strpos(v_claims, 'kakunin_cert_serial') = 0 then
    return null;
  end if;
  -- As almost every claim is: the canonical serial, in one statement. Claims are read as JSON only where the login is one that is believed.
  v_serial := (
    select u.serial
      from kakunin_private.gateway_logins g,
           kakunin_private.usable_serial(case when g.login = session_user then v_claims::json ->> 'kakunin_cert_serial' end) u(serial)
     where g.login = session_user and not g.hooked);
  if v_serial is not null then
    return v_serial;
  end if;
  v_serial := kakunin_private.serial_from_claims(v_claims);
  if v_serial is null then
    return null;
  end if;
  return (select u.serial from kakunin_private.usable_serial(v_serial) u(serial));
end
$$;
comment on function kakunin.current_cert_serial() is
  'The serial bound to this session if its certificate may be used now, otherwise NULL. In a policy write (select kakunin.current_cert_serial()), which runs once a statement. For kakunin_agent and kakunin_gateway';

create function kakunin.current_agent_id() returns uuid
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.current_cert_serial();
begin
  return (select c.agent_id from kakunin_private.certificates c where c.serial = v_serial);
end
$$;
comment on function kakunin.current_agent_id() is
  'The agent of the certificate bound to this session, or NULL as current_cert_serial(). For kakunin_agent and kakunin_gateway; views call it for kakunin_operator and kakunin_auditor';

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
  v_serial text collate "C" := kakunin_private.bound_serial();
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
  'current_cert_serial(), but where that is NULL the named error says why: KA004, KA001, KA002, KA003, KA008 or KA012. For kakunin_agent and kakunin_gateway';

create function kakunin.require_scope(scope text) returns boolean
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.require_session();
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
  'True where has_scope() is; otherwise raises KA005, or what require_session() raises. For policies that refuse aloud. For kakunin_agent and kakunin_gateway';

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

-- Reads no catalog that databases share: locking one takes room in the lock table, and an agent may have used it up.
create function kakunin_private.bound_backends(p_serials text[]) returns integer[]
language sql stable parallel restricted
return coalesce((
  select array_agg(distinct l.pid)
    from pg_locks l, unnest(p_serials) s
   where l.locktype = 'advisory' and l.objsubid = 2 and l.mode = 'ShareLock' and l.granted
     and l.database = (select o.database from pg_locks o
                        where o.pid = pg_backend_pid() and o.locktype = 'relation' and o.relation = 'pg_locks'::regclass)
     and l.pid <> pg_backend_pid()
     and l.objid = (hashtext(s collate "C")::bigint & 4294967295)::oid), '{}');
comment on function kakunin_private.bound_backends(text[]) is 'Other backends whose transaction or session is bound to one of these serials';

-- The lock of a session cannot be protected from its own SQL, and need not be drawn anew: taken once, at 0.
create function kakunin_private.mark_session(p_serial text, p_bound boolean) returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_lock constant integer := hashtext(p_serial collate "C");
  v_held constant boolean := exists (
    select from pg_locks l
     where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 2 and l.classid = 0::oid
       and l.objid = (v_lock::bigint & 4294967295)::oid and l.granted);
begin
  if p_bound and not v_held then
    perform pg_try_advisory_lock_shared(0, v_lock);
  elsif v_held and not p_bound then
    perform pg_advisory_unlock_shared(0, v_lock);
  end if;
end
$$;
comment on function kakunin_private.mark_session(text, boolean) is 'Takes, or lets go of, the lock of a session-scoped binding';

create function kakunin_private.not_marked() returns text
language plpgsql stable parallel restricted
as $$
begin
  raise exception using errcode = 'KA004',
    message = format('the lock that marks a binding of backend %s is held by another one', pg_backend_pid()),
    hint = 'Bind again.';
end
$$;
comment on function kakunin_private.not_marked() is 'Raises KA004: the binding could not be marked, which takes a collision of random numbers';

-- One expression that reads no table: evaluated without the cost of a statement, a third of the whole here.
create function kakunin_private.bind(p_serial text, p_binding text, p_is_local boolean) returns text
language plpgsql volatile parallel unsafe
as $$
begin
  if not p_is_local then
    if exists (select from kakunin_private.gateway_logins g where g.login = session_user) then
      raise exception using errcode = 'KA010',
        message = format('a session of %s is not bound beyond a transaction: others use it next', quote_ident(session_user)),
        hint = 'Bind each transaction: kakunin.bind_session(ticket).';
    end if;
    perform kakunin_private.mark_session(p_serial, true);
  end if;
  return case when
    kakunin_private.mark_bound(p_binding, p_serial)
    and set_config('kakunin.session', p_binding, p_is_local) is not null
    and set_config('request.jwt.claims', kakunin_private.claims_with(
      case when p_is_local then current_setting('request.jwt.claims', true) end, p_serial), p_is_local) is not null
    then p_serial else kakunin_private.not_marked() end;
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
         kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
           and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
           and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id) as usable,
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
  'Binds this transaction (or, not local, this session until the ticket expires) to the ticket''s certificate and returns its serial. Pass the ticket as a bound parameter only. For kakunin_agent and kakunin_gateway';

create function kakunin_private.bind_transaction(p_serial text) returns text
language plpgsql volatile parallel unsafe
as $$
declare
  v_binding text;
begin
  select kakunin_private.make_binding(k.inner_pad, k.outer_pad, k.key_id || '|' || p_serial || '|x|0', true)
    into v_binding from kakunin_private.session_keys k
   where k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
  if not found then
    perform kakunin_private.no_session_key();
  end if;
  return kakunin_private.bind(p_serial, v_binding, true);
end
$$;
comment on function kakunin_private.bind_transaction(text) is
  'Binds this transaction to a serial, which the caller has found usable, without a ticket; returns the serial';

create function kakunin.bind_serial(serial text) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(bind_serial.serial);
begin
  perform kakunin_private.check_certificate(v_serial);
  return kakunin_private.bind_transaction(v_serial);
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
    perform kakunin_private.mark_session(split_part(v_binding, '|', 2), false);
    perform set_config('request.jwt.claims', '{}', false);
  elsif v_claims <> '' then
    perform set_config('request.jwt.claims', (kakunin_private.claims_object(v_claims) - 'kakunin_cert_serial')::text, true);
  end if;
end
$$;
comment on function kakunin.unbind_session() is 'Takes the binding off this session and this transaction. For kakunin_agent and kakunin_gateway';

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
  -- Once more: this may have begun long ago, because a client can have its backend pause (it prints plans and waits for them
  -- to be read), and an earlier use have been swept meanwhile.
  v_now := extract(epoch from kakunin_private.clock());
  if v_exp <= v_now then
    raise exception 'the assertion is refused: it has expired'
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
  'Exchanges an assertion signed by the agent''s key (RFC 7523) for a ticket of at most 300 seconds. Pass it as a bound parameter. For kakunin_agent and kakunin_gateway';
