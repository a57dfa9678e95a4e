-- An owner switches row security off, replaces the function that a policy calls, and reads past policies.
with safe as (select quote_ident(pg_get_userbyid(({safe_owner})[1])) as owner)
select 'critical' as severity, 'table ' || c.oid::regclass as object,
       format('its owner %I works for agents, or a login that does can become it: policies do not bind an owner%s',
         pg_get_userbyid(c.relowner), case when c.relforcerowsecurity then ' who switches them off' else '' end) as reason,
       case when c.relowner = any ({agents_reach}) then format('alter table %s owner to %s;', c.oid::regclass, safe.owner)
            else format('alter table %s force row level security;', c.oid::regclass) end as sql
  from pg_class c, safe
 where c.oid = any ({tables}) and c.relowner = any ({reach}) and c.relkind <> 'f'
   and (c.relowner = any ({agents_reach}) or not c.relforcerowsecurity)
union all
select 'critical', 'schema ' || quote_ident(n.nspname),
       format('its owner %I is an agent''s login, or one can become it', pg_get_userbyid(n.nspowner)),
       format('alter schema %I owner to %s;', n.nspname, safe.owner)
  from pg_namespace n, safe where n.nspowner = any ({agents_reach}) and n.nspname !~ '^pg_(temp|toast)'
   and exists (select from pg_class c where c.oid = any ({tables}) and c.relnamespace = n.oid)
union all
select 'critical', 'database ' || quote_ident(d.datname),
       format('its owner %I is an agent''s login, or one can become it', pg_get_userbyid(d.datdba)),
       format('alter database %I owner to %s;', d.datname, safe.owner)
  from pg_database d, safe where d.datname = current_database() and d.datdba = any ({agents_reach})
union all
select distinct 'critical', 'function ' || p.oid::regprocedure,
       format('a policy on a table of agents'' rows calls it, and its owner %I is an agent''s login, or one can become it', pg_get_userbyid(p.proowner)),
       format('alter routine %s owner to %s;', p.oid::regprocedure, safe.owner)
  from pg_policy y
  join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = y.oid and d.refclassid = 'pg_proc'::regclass
  join pg_proc p on p.oid = d.refobjid, safe
 where y.polrelid = any ({tables}) and p.proowner = any ({agents_reach})
