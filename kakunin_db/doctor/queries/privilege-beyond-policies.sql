select case when bool_or(g.privilege_type in ('TRUNCATE', 'TRIGGER')) then 'critical' else 'warning' end as severity,
       'table ' || c.oid::regclass as object,
       format('%s has %s, which row security does not cover',
         case g.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(g.grantee)) end,
         string_agg(distinct lower(g.privilege_type), ', ')) as reason,
       format('revoke %s on %s from %s%s;', string_agg(distinct lower(g.privilege_type), ', '), c.oid::regclass,
         case when g.grantor <> c.relowner then quote_ident(pg_get_userbyid(g.grantor))
              when g.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(g.grantee)) end,
         case when g.grantor <> c.relowner then ' cascade' else '' end) as sql
  from pg_class c
  cross join lateral (
    select (aclexplode(c.relacl)).*
    union all
    select (aclexplode(a.attacl)).* from pg_attribute a where a.attrelid = c.oid and a.attacl is not null) g
 where c.oid = any ({tables}) and g.grantee = any ({reach}) and g.grantee <> c.relowner
   and g.privilege_type in ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
 group by c.oid, c.relowner, g.grantor, g.grantee
