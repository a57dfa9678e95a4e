select case when m.may is null then 'notice'
            when r.rolsuper or r.rolbypassrls or exists (
              select from pg_class t where t.oid = any ({tables}) and not t.relforcerowsecurity
                 and pg_has_role(c.relowner, t.relowner, 'usage')) then 'critical'
            else 'warning' end as severity,
       'view ' || c.oid::regclass as object,
       format('it reads tables of agents'' rows as its owner %I, whom policies may not bind', r.rolname)
         || coalesce('. Agents may ' || m.may, '') as reason,
       format('alter view %s set (security_invoker = true);', c.oid::regclass) as sql
  from pg_class c join pg_roles r on r.oid = c.relowner cross join lateral ({grants}) m
 where c.oid = any ({views}) and c.relkind = 'v' and c.relpersistence <> 't'
   and not exists (select from pg_options_to_table(c.reloptions) o
                    where o.option_name = 'security_invoker' and o.option_value::boolean)
