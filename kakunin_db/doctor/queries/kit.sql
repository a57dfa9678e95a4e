-- Ours are owned by who owns the schemas. A function that is asked runs as its owner and not as us; a view has no
-- function in it but the server's. So somebody who made schemas of these names does not get our rights.
select 'function' as kind, format('%s.%s(%s)', n.nspname, p.proname, oidvectortypes(p.proargtypes)) as name,
       p.prosecdef and p.proowner = n.nspowner as genuine,
       has_function_privilege(p.oid, 'execute') and has_schema_privilege(n.oid, 'usage') as allowed
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname = 'kakunin'
union all
select 'relation', format('%s.%s', n.nspname, c.relname),
       c.relowner = n.nspowner and (c.relkind = 'r' and not c.relrowsecurity or c.relkind = 'v' and not exists (
         select from pg_rewrite r join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid
          where r.ev_class = c.oid and d.refclassid in ('pg_proc'::regclass, 'pg_operator'::regclass, 'pg_type'::regclass))),
       has_table_privilege(c.oid, 'select') and has_schema_privilege(n.oid, 'usage')
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where n.nspname in ('kakunin', 'kakunin_private') and c.relkind in ('r', 'v')
