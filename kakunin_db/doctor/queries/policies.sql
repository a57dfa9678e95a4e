select p.oid::bigint as oid, quote_ident(p.polname) as ident, p.polrelid::bigint as relid, p.polrelid::regclass::text as "table",
       p.polpermissive as permissive, p.polcmd::text as command, p.polroles::bigint[] as roles,
       coalesce(p.polqual::text, '') as qual, coalesce(p.polwithcheck::text, '') as "check",
       exists (select from pg_depend d join pg_proc f on f.oid = d.refobjid
                where d.classid = 'pg_policy'::regclass and d.objid = p.oid and d.refclassid = 'pg_proc'::regclass
                  and f.pronamespace = to_regnamespace('kakunin')) as asks
  from pg_policy p join pg_class c on c.oid = p.polrelid
 where c.relnamespace not in (select n.oid from pg_namespace n where n.nspname in ('kakunin', 'kakunin_private'))
   and (c.oid = any ({tables})
        or exists (select from aclexplode(c.relacl) g where g.grantee = any ({agents_reach}) and g.grantee <> c.relowner))
