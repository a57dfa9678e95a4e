-- An open transaction of a registrar's that has changed an agent holds the agent's rows, and a halt waits for it.
select 'role ' || quote_ident(r.rolname) as object,
       'a transaction that it leaves open holds up revocations and halts: it has no idle_in_transaction_session_timeout' as reason,
       format('alter role %I set idle_in_transaction_session_timeout = ''30s'';', r.rolname) as sql
  from pg_roles r
 where r.oid = any ({registrars})
   and not exists (select from pg_db_role_setting s, unnest(s.setconfig) c(setting)
                    where s.setrole in (0, r.oid)
                      and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database()))
                      and c.setting ~ '^idle_in_transaction_session_timeout=.*[1-9]')
   and not exists (select from pg_settings g where g.name = 'idle_in_transaction_session_timeout'
                      and g.source in ('configuration file', 'command line') and g.reset_val <> '0')
