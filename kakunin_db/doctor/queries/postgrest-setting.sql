-- docs/supabase-trust.md says what each of them opens.
select 'role ' || quote_ident(pg_get_userbyid(s.setrole)) as object,
       case when c.setting ~* '^pgrst[.]db_plan_enabled' then 'PostgREST shows plans, and with them what is estimated of others'' rows'
            else 'PostgREST lets a client have its request rolled back, and its entries of the ledger with it' end as reason,
       format('alter role %I%s reset %s; notify pgrst, ''reload config'';', pg_get_userbyid(s.setrole),
         coalesce(' in database ' || quote_ident((select d.datname from pg_database d where d.oid = s.setdatabase)), ''),
         case when c.setting ~* '^pgrst[.]db_plan_enabled' then 'pgrst.db_plan_enabled' else 'pgrst.db_tx_end' end) as sql
  from pg_db_role_setting s, unnest(s.setconfig) c(setting)
 where s.setrole = any ({postgrest}) and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database()))
   and (c.setting ~* '^pgrst[.]db_plan_enabled=(t|true|1|on|yes)$' or c.setting ~ '^pgrst[.]db_tx_end=(commit-allow-override|rollback)')
