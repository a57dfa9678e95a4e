-- PUBLIC and others have nothing of the kit's that its own migration did not grant. Whom a public function is for, the end
-- of its comment says: a role of the kit's that it does not name has it from somebody else. Another role is its owner's to judge,
-- but where the function is for nobody, or makes who may call it any agent.
with ours(kind, name, owner, acl, namespace, whose) as (
  select 'schema', quote_ident(n.nspname), n.nspowner, n.nspacl, n.nspname, '' from pg_namespace n where n.nspname = 'kakunin_private'
  union all
  select case c.relkind when 'S' then 'sequence' else 'table' end, c.oid::regclass::text, c.relowner, c.relacl, n.nspname, ''
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = 'kakunin_private' and c.relkind in ('r', 'p', 'v', 'S')
  union all
  select 'function', p.oid::regprocedure::text, p.proowner, coalesce(p.proacl, acldefault('f', p.proowner)), n.nspname,
         regexp_replace(coalesce(obj_description(p.oid, 'pg_proc'), ''), '^.*For ', '')
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname in ('kakunin', 'kakunin_private')
)
select o.kind || ' ' || o.name as object,
       format('%s has %s on it, which the kit grants to nobody but itself',
         case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         string_agg(distinct lower(a.privilege_type), ', ')) as reason,
       format('revoke all on %s %s from %s%s;', o.kind, o.name,
         case when a.grantor <> o.owner then quote_ident(pg_get_userbyid(a.grantor))
              when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         case when a.grantor <> o.owner then ' cascade' else '' end) as sql
  from ours o, aclexplode(o.acl) a left join pg_roles r on r.oid = a.grantee
 where a.grantee <> o.owner
   and (o.namespace = 'kakunin_private' or a.grantee = 0
        or case when r.rolname ~ '^kakunin_(agent|gateway|registrar|operator|worker|auditor)$'
                then o.whose !~ ('\m' || r.rolname || '\M') and o.whose !~ 'all the kit''s roles'
                else o.whose ~ 'the owner alone' or o.name = 'kakunin.bind_serial(text)' end)
 group by o.kind, o.name, o.owner, a.grantee, a.grantor
