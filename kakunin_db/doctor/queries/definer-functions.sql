-- What an extension brings is its author's matter. Triggers cannot be called.
select p.oid::regprocedure::text as name, p.proowner::bigint as owner, p.prosrc as source,
       p.prosqlbody is not null as standard,
       array(select distinct d.refobjid::bigint from pg_depend d
              where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.refclassid = 'pg_class'::regclass) as relations
  from pg_proc p
  join pg_namespace n on n.oid = p.pronamespace
 where p.prosecdef and n.nspname not in ('pg_catalog', 'information_schema', 'kakunin', 'kakunin_private')
   and p.prorettype not in ('trigger'::regtype, 'event_trigger'::regtype)
   and not exists (select from pg_depend e where e.classid = 'pg_proc'::regclass and e.objid = p.oid and e.deptype = 'e')
   and exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                where a.privilege_type = 'EXECUTE' and a.grantee = any ({reach}) and a.grantee <> p.proowner)
