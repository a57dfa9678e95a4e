-- Whoever names a child goes by the child's policies, and whoever names a parent by the parent's.
select case when m.may is not null then 'critical' else 'warning' end as severity, 'table ' || c.oid::regclass as object,
       format('it shows rows of %s, which has row security, and has none itself', min(o.oid::regclass::text))
         || coalesce('. Agents may ' || m.may, '') as reason,
       format('alter table %s enable row level security;', c.oid::regclass) as sql
  from pg_class c
  join pg_inherits i on c.oid in (i.inhrelid, i.inhparent)
  join pg_class o on o.oid in (i.inhrelid, i.inhparent) and o.oid <> c.oid and o.relrowsecurity
  cross join lateral ({grants}) m
 where c.oid = any ({protected}) and not c.relrowsecurity and c.relkind <> 'f'
   and not exists (select from pg_policy p where p.polrelid = c.oid)
   and exists (select from pg_policy p where p.polrelid = o.oid)
 group by c.oid, m.may
