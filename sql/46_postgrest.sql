-- PostgREST: what runs before each of its requests, and what it answers an agent that may not go on.
--
-- PostgREST verifies a JWT, takes its role and puts its claims into request.jwt.claims. The policies do without
-- what is below: a certificate that may not be used is nobody's (40_session.sql), and there are no rows. A client
-- told "no rows" cannot know why, so pre_request(), configured as db-pre-request, looks first and says it:
--
--   401  the header X-Kakunin-Cert-Serial does not name the certificate that the token names
--   403  the token's certificate may not be used now; the error's code is the KA... that says why
--   503  a standby is too far behind the primary to tell (KA012)
--
-- Requests without the claim and without the header are none of its business and pass.
--
-- It also binds the transaction to the certificate, before any of the request's own SQL. Where the login is hooked
-- (set_gateway_logins()) nothing else believes the claims: a function that runs SQL its caller wrote can set them to
-- another agent's, and gets no rows for it. For that the hook itself must not be such SQL's to call again, so it
-- binds only where it is the whole of the statement that the client sent, `select "kakunin"."pre_request"()` or a
-- function of the project's that calls it. PostgREST's other statements begin with WITH, and the names in them are
-- all that a request contributes to their text.
--
-- That is for the request alone. What SQL of the caller's can still do there is what PostgREST's login can do, `set role`
-- to any role that it is a member of, service_role with its BYPASSRLS among them; and what it leaves on PostgREST's
-- session, prepared statements and temporary types for two, runs in others' requests. See docs/supabase-trust.md.

create function kakunin_private.refuse_request(p_status integer, p_code text, p_message text, p_hint text) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- PostgREST makes its answer of these two (docs.postgrest.org, "Errors: RAISE errors with HTTP status codes").
  raise exception using errcode = 'PGRST',
    message = json_build_object('code', p_code, 'message', p_message, 'details', null, 'hint', p_hint)::text,
    detail = json_build_object('status', p_status, 'headers', case p_status
      when 401 then json_build_object('WWW-Authenticate', 'Bearer error="invalid_token"')  -- RFC 6750 section 3
      else json_build_object() end)::text;
end
$$;
comment on function kakunin_private.refuse_request(integer, text, text, text) is
  'Ends the request with this HTTP status and PostgREST''s JSON error';

create function kakunin.pre_request() returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_claim   text collate "C" := nullif(current_setting('request.jwt.claims', true), '')::json ->> 'kakunin_cert_serial';
  v_header  text collate "C" := nullif(current_setting('request.headers', true), '')::json ->> 'x-kakunin-cert-serial';
  v_serial  text collate "C";
  v_binding text;
  v_hooked  boolean;
  v_is_hook boolean := current_query() collate "C" ~ '^select ("[^"]+"[.])?"[^"]+"[(][)]$';
  v_code    text;
  v_message text;
  v_hint    text;
begin
  if v_claim is null and v_header is null then
    -- PostgREST's sessions are shared, and SQL of an earlier request's may have left something.
    if v_is_hook and current_setting('kakunin.session', true) <> '' then
      perform set_config('kakunin.session', '', true);
    end if;
    return;
  elsif v_is_hook and v_header = v_claim is not false then
    -- As almost every request has it: the canonical serial of a certificate that may be used. One statement, and the
    -- claims stay as they are; whatever is otherwise goes on below.
    select kakunin_private.make_binding(k.inner_pad, k.outer_pad, k.key_id || '|' || u.serial || '|x|0', true)
      into v_binding
      from kakunin_private.gateway_logins g, kakunin_private.session_keys k, kakunin_private.usable_serial(v_claim) u(serial)
     where g.login = session_user and k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
    if found and kakunin_private.mark_bound(v_binding, v_claim) then
      perform set_config('kakunin.session', v_binding, true);
      return;
    end if;
  end if;
  if v_claim is null then
    perform kakunin_private.refuse_request(401, 'KA004',
      'the header X-Kakunin-Cert-Serial names a certificate and the token names none',
      'Send a token with the claim kakunin_cert_serial. The header by itself proves nothing.');
  end if;
  select g.hooked into v_hooked from kakunin_private.gateway_logins g where g.login = session_user;
  if not found then
    perform kakunin_private.refuse_request(403, 'KA004',
      format('the claims that %s brings are not believed', quote_ident(session_user)),
      'The owner of the kit names PostgREST''s login: kakunin.set_gateway_logins().');
  elsif v_hooked and not v_is_hook then
    perform kakunin_private.refuse_request(403, 'KA004',
      'pre_request() binds only as the whole of a statement, which a request''s own SQL is not',
      'Name it, or a function of yours that calls it, in PostgREST''s db-pre-request.');
  end if;
  begin
    v_serial := kakunin.normalize_serial(v_claim);
    if v_header is not null and kakunin.normalize_serial(v_header) <> v_serial then
      v_serial := null;
    end if;
  exception when sqlstate 'KA010' then
    v_serial := null;
  end;
  if v_serial is null then
    perform kakunin_private.refuse_request(401, 'KA004',
      'the header X-Kakunin-Cert-Serial does not name the certificate that the token names',
      'Send the serial of the claim kakunin_cert_serial, as upper-case hex bytes joined by colons, or no header.');
  end if;
  begin
    perform kakunin_private.check_certificate(v_serial);
  exception when sqlstate 'KA001' or sqlstate 'KA002' or sqlstate 'KA003' or sqlstate 'KA008' or sqlstate 'KA012' then
    get stacked diagnostics v_code = returned_sqlstate, v_message = message_text, v_hint = pg_exception_hint;
  end;
  if v_code is not null then
    perform kakunin_private.refuse_request(case v_code when 'KA012' then 503 else 403 end, v_code, v_message, v_hint);
  elsif v_is_hook then
    perform kakunin_private.bind_transaction(v_serial);
  end if;
end
$$;
comment on function kakunin.pre_request() is
  'For PostgREST''s db-pre-request: binds the request to the token''s certificate; 403 where that may not be used now, 503 on a standby that is too far behind, 401 for a header that is not the claim''s. For kakunin_agent and kakunin_gateway';
