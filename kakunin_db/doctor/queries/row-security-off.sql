select case when m.may is not null then 'critical' else 'warning' end as severity, 'table ' || c.oid::regclass as object,
       'it has policies, and row security is off: they do nothing' || coalesce('. Agents may ' || m.may, '') as reason,
       format('alter table %s enable row level security;', c.oid::regclass) as sql
  from pg_class c cross join lateral ({grants}) m
 where c.oid = any ({protected}) and not c.relrowsecurity
   and exists (select from pg_policy p where p.polrelid = c.oid)
