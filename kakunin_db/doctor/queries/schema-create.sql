select 'schema ' || quote_ident(n.nspname) as object,
       format('%s may create in it: what it makes there, others may run or read in place of what they meant',
         case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end) as reason,
       format('revoke create on schema %I from %s%s;', n.nspname,
         case when a.grantor <> n.nspowner then quote_ident(pg_get_userbyid(a.grantor))
              when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         case when a.grantor <> n.nspowner then ' cascade' else '' end) as sql
  from pg_namespace n, aclexplode(n.nspacl) a
 where a.privilege_type = 'CREATE' and a.grantee = any ({agents_reach}) and a.grantee <> n.nspowner
   and n.nspname !~ '^pg_(temp|toast)'
union all
select 'database ' || quote_ident(d.datname),
       format('%s may create schemas in it', case a.grantee when 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end),
       format('revoke create on database %I from %s%s;', d.datname,
         case when a.grantor <> d.datdba then quote_ident(pg_get_userbyid(a.grantor))
              when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
         case when a.grantor <> d.datdba then ' cascade' else '' end)
  from pg_database d, aclexplode(d.datacl) a
 where d.datname = current_database() and a.privilege_type = 'CREATE' and a.grantee = any ({agents_reach})
   and a.grantee <> d.datdba
