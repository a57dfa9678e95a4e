-- Privileges: who may call what, all in one place.
--
-- PUBLIC may call nothing. What a role may call is named here and nowhere else; a function that is not
-- listed belongs to the owner alone: set_gateway_logins(), because who may say whose claims are believed can
-- become any agent, and renew_installation() and continue_ledger(), which say what a copy of a database is.

revoke all on all functions in schema kakunin, kakunin_private from public;

-- Default privileges of the login that installs (ALTER DEFAULT PRIVILEGES) are granted on what it makes, to anybody:
-- bind_serial() or the session key would be theirs with it.
do $defaults$
declare
  v_grantee text;
begin
  for v_grantee in
    select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
      from (select n.oid as schema, n.nspowner as owner, n.nspacl as acl from pg_namespace n
            union all select c.relnamespace, c.relowner, c.relacl from pg_class c
            union all select p.pronamespace, p.proowner, p.proacl from pg_proc p) o,
           aclexplode(o.acl) a
     where o.schema in ('kakunin'::regnamespace, 'kakunin_private'::regnamespace) and a.grantee <> o.owner
  loop
    execute format('revoke all on all functions in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on all tables in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on all sequences in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on schema kakunin, kakunin_private from %s', v_grantee);
  end loop;
end
$defaults$;

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

-- PostgREST calls it in the role of the request: the owner also grants it to every role that a token may name.
grant execute on function kakunin.pre_request() to kakunin_agent, kakunin_gateway;

grant execute on function
  kakunin.create_agent(text, text, text, text, text), kakunin.register_certificate(bytea, interval)
  to kakunin_registrar;

grant execute on function kakunin.update_agent(uuid, text, text, text, text, text) to kakunin_registrar, kakunin_operator;

-- Verification tells what a certificate says, which its holder shows to everybody.
grant execute on function kakunin.verify_certificate(text), kakunin.certificate_der(text), kakunin.verify_message(text, bytea, bytea) to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant select on kakunin.authorities, kakunin.crls to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant select on kakunin.agents, kakunin.certificates to kakunin_registrar, kakunin_operator, kakunin_auditor;

-- What the holder of an authority's key has to sign, and brings back. The database verifies the signatures.
grant select on kakunin.halts to kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.crls_due(), kakunin.revocations(text) to
  kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.publish_crl(bytea), kakunin.sign_halt(uuid, text, bytea) to
  kakunin_registrar, kakunin_operator, kakunin_worker;

grant execute on function kakunin.audit_log_append(text, jsonb, text, timestamptz) to kakunin_agent, kakunin_gateway;
grant select on kakunin.audit_log to kakunin_agent, kakunin_gateway, kakunin_auditor;
grant execute on function kakunin.current_agent_id() to kakunin_auditor, kakunin_operator;  -- the view calls it, and a view's functions are its reader's to call

-- Risk: the three tools of an agent, what policies ask, and what follows.
grant execute on function
  kakunin.check_risk_score(), kakunin.verify_agent_scope(text, numeric, text, text, numeric),
  kakunin.require_spend(numeric, text, text, numeric, boolean), kakunin.require_risk_below(text, boolean)
  to kakunin_agent, kakunin_gateway;
grant execute on function kakunin.agent_risk(uuid) to kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.set_risk(jsonb), kakunin.set_agent_risk(uuid, text, boolean, double precision), kakunin.review_risk(bigint, text),
  kakunin.import_events(uuid, jsonb)
  to kakunin_operator;
grant execute on function kakunin.settle_risk() to kakunin_worker, kakunin_operator;
grant execute on function kakunin.risk_window() to kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor;  -- a view calls it
grant select on kakunin.risk_by_hour, kakunin.risk_by_day, kakunin.risk_contributions to
  kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor;
grant select on kakunin.risk_reviews to kakunin_operator, kakunin_auditor;

-- The worker seals and signs. It reads no entry.
grant execute on function
  kakunin.seal_ledger(integer), kakunin.tree_head_to_sign(), kakunin.publish_tree_head(bigint, bigint, text, bytea),
  kakunin.lead_ledger(uuid, text, interval, text), kakunin.sleep_ledger(), kakunin.consistency_proof(bigint, bigint)
  to kakunin_worker;
grant execute on function kakunin.make_partitions(interval) to kakunin_worker, kakunin_operator;
grant execute on function kakunin.ledger_status(), kakunin.ledger_home() to kakunin_worker, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.register_ledger_key(bytea), kakunin.revoke_ledger_key(text, text), kakunin.archive_partition(name)
  to kakunin_operator;

-- The worker delivers webhooks, and has their secrets encrypted. What is sent to whom is the operator's to see.
grant execute on function
  kakunin.expire_certificates(integer), kakunin.claim_webhooks(interval),
  kakunin.report_webhook(text, uuid, integer, integer, text), kakunin.clean_webhooks()
  to kakunin_worker;
grant execute on function kakunin.webhook_status() to kakunin_worker, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.add_webhook(uuid, text, text[], bytea), kakunin.enable_webhook(uuid, boolean), kakunin.remove_webhook(uuid),
  kakunin.rotate_webhook(uuid, bytea, interval), kakunin.test_webhook(uuid), kakunin.replay_webhooks(text, uuid)
  to kakunin_operator;
grant select on kakunin.webhook_endpoints, kakunin.webhook_deliveries to kakunin_operator;

-- Proof is for whoever asks; what it is about, for the auditor, and an agent for its own.
grant select on kakunin.ledger_keys, kakunin.tree_heads to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.inclusion_proof(bigint, bigint) to kakunin_agent, kakunin_gateway, kakunin_auditor;
grant select on kakunin.chains to kakunin_auditor;
grant execute on function
  kakunin.consistency_proof(bigint, bigint), kakunin.ledger_leaves(bigint, integer), kakunin.frontier(bigint),
  kakunin.unsealed_entries(), kakunin.stray_entries(), kakunin.record_read(text, jsonb), kakunin.record_export(bigint, bigint, text)
  to kakunin_auditor;

-- The API. Its server is a gateway; keys are made and ended by the operator.
grant execute on function
  kakunin.authenticate_api_key(text, bytea), kakunin.note_api_keys(uuid[]), kakunin.open_decision_chain(text, text, jsonb),
  kakunin.append_to_decision_chain(uuid, text, jsonb, text, timestamptz), kakunin.close_decision_chain(uuid)
  to kakunin_gateway;
grant execute on function kakunin.verify_decision_chain(uuid) to kakunin_gateway, kakunin_auditor;
grant select on kakunin.decision_chains to kakunin_gateway, kakunin_auditor;
grant select on kakunin.decision_chain_events, kakunin.reports to kakunin_auditor;
grant execute on function kakunin.create_report(uuid, integer, text, text[]) to kakunin_auditor;
grant execute on function kakunin.describe_agent(uuid, jsonb, jsonb) to kakunin_registrar;
grant select on kakunin.agent_descriptions to kakunin_registrar, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.create_api_key(text, bytea, text, text[], uuid, timestamptz), kakunin.revoke_api_key(uuid)
  to kakunin_operator;
grant select on kakunin.api_keys to kakunin_operator;

-- protect() and unprotect() run with the caller's rights: the privilege alone protects no table. An owner of
-- tables who is no operator is granted the two, the three below them that they call, and USAGE on schema kakunin, by name.
grant execute on function
  kakunin.trust_ca(bytea), kakunin.distrust_ca(text, text),
  kakunin.revoke_certificate(text, text), kakunin.suspend_agent(uuid, text), kakunin.reinstate_agent(uuid),
  kakunin.halt_agent(uuid, text, boolean),
  kakunin.rotate_session_key(interval), kakunin.set_replica_lag(interval),
  kakunin.protect(regclass, name, name[], text, boolean, boolean, boolean, boolean), kakunin.unprotect(regclass),
  kakunin.audit_changes(regclass, boolean, boolean), kakunin.record_policy(regclass), kakunin.record_changes()
  to kakunin_operator;
