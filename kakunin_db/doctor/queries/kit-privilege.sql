-- PUBLIC and others have nothing of the kit's that its own migration did not grant.
with ours(kind, name, owner, acl, namespace) as (
  select 'schema', quote_ident(n.nspname), n.nspowner, n.nspacl, n.nspname from pg_namespace n where n.nspname = 'kakunin_private'
  union all
  select case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relowner, c.relacl, n.nspname
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'kakunin_private' and c.relkind in ('r', 'p', 'v', 'S')
  union all
  select 'function', p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), n.nspname
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
   where n.nspname = 'kakunin_private'
      or n.nspname = 'kakunin' and (p.proacl is null or p.proname in ('bind_serial', 'set_gateway_logins', 'renew_installation', 'continue_ledger'))
      or n.nspname = 'kakunin' and exists (select from aclexplode(p.proacl) a where a.grantee = 0)
)
select o.kind || ' ' || o.name as object,
       format('%s has %s on it, which the kit grants to nobody but itself',
         case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         string_agg(distinct lower(a.privilege_type), ', ')) as reason,
       format('revoke all on %s %s from %s%s;', o.kind, o.name,
         case when a.grantor <> o.owner then quote_ident(pg_get_userbyid(a.grantor))
              when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         case when a.grantor <> o.owner then ' cascade' else '' end) as sql
  from ours o, aclexplode(o.acl) a
 where a.grantee <> o.owner
   and not (o.name = 'kakunin.bind_serial(text)' and a.grantee = (select r.oid from pg_roles r where r.rolname = 'kakunin_gateway'))
   and (o.namespace = 'kakunin_private' or a.grantee = 0 or o.name ~ '^kakunin[.](bind_serial|set_gateway_logins|renew_installation|continue_ledger)[(]')
 group by o.kind, o.name, o.owner, a.grantee, a.grantor
