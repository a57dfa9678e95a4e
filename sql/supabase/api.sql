-- The kit for Supabase's API: what a client may call, and whose claims are believed. Run by the owner of the kit.
--
-- An agent's token names the role kakunin_agent: it has what agents have, and nothing of what `authenticated` has.
-- The project's own roles get what policies on their tables call, the three tools of an agent, and verification.
-- Each of these decides by the certificate that the request is bound to, and is of no use without one; what a
-- certificate says, its holder shows to everybody. Nobody here may register, bind, halt or configure.

grant kakunin_agent to authenticator;

grant usage on schema kakunin to anon, authenticated, service_role;
grant execute on function
  kakunin.pre_request(), kakunin.normalize_serial(text), kakunin.current_cert_serial(), kakunin.current_agent_id(),
  kakunin.has_scope(text), kakunin.require_session(), kakunin.require_scope(text),
  kakunin.require_spend(numeric, text, text, numeric, boolean), kakunin.require_risk_below(text, boolean),
  kakunin.check_risk_score(), kakunin.verify_agent_scope(text, numeric, text, text, numeric),
  kakunin.audit_log_append(text, jsonb, text, timestamptz),
  kakunin.verify_certificate(text), kakunin.verify_message(text, bytea, bytea)
  to anon, authenticated, service_role;

-- Beside those that are believed already. Hooked: PostgREST has to call kakunin.pre_request() before each request.
select kakunin.set_gateway_logins(
  array(select g.login from kakunin_private.gateway_logins g union select 'authenticator'),
  array(select g.login from kakunin_private.gateway_logins g where g.hooked union select 'authenticator'));
