select 'warning' as severity, 'role ' || quote_ident(g.login) as object,
       'PostgREST''s claims are believed whenever SQL of a request sets them: the login is not hooked' as reason,
       format('alter role %I set pgrst.db_pre_request = ''kakunin.pre_request''; ', g.login)
         || format('select kakunin.set_gateway_logins(%L, %L);',
           (select array_agg(a.login) from kakunin_private.gateway_logins a),
           (select array_agg(a.login) from kakunin_private.gateway_logins a where a.hooked or a.login = g.login)) as sql
  from kakunin_private.gateway_logins g where not g.hooked
union all
select 'warning', 'role ' || quote_ident(g.login),
       'the login is hooked and PostgREST is not told to call kakunin.pre_request(): agents have no rows',
       format('alter role %I set pgrst.db_pre_request = ''kakunin.pre_request''; notify pgrst, ''reload config'';', g.login)
  from kakunin_private.gateway_logins g join pg_roles r on r.rolname = g.login
 where g.hooked and not exists (
   select from pg_db_role_setting s, unnest(s.setconfig) c(setting)
    where s.setrole = r.oid and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database()))
      and starts_with(c.setting, 'pgrst.db_pre_request=') and c.setting <> 'pgrst.db_pre_request=')
