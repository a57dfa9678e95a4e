-- What runs on a login's later sessions: an agent sets its own, and the next agent of that login has it.
select 'role ' || quote_ident(pg_get_userbyid(s.setrole)) as object,
       format('every session of this login begins with %s, which it can have set itself', quote_literal(c.setting)) as reason,
       format('alter role %I%s reset %I;', pg_get_userbyid(s.setrole),
         coalesce(' in database ' || quote_ident((select d.datname from pg_database d where d.oid = s.setdatabase)), ''),
         split_part(c.setting, '=', 1)) as sql
  from pg_db_role_setting s, unnest(s.setconfig) c(setting)
 where s.setrole = any ({agents}) and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database()))
   and split_part(c.setting, '=', 1) in ('search_path', 'role', 'local_preload_libraries', 'session_authorization',
     'default_transaction_isolation', 'row_security')
