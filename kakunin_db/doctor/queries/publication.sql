-- Rows leave with it, and policies do not bind who subscribes. The keys of sessions are the kit's own.
with published as (
  select p.oid, p.pubname, p.puballtables, c.oid as relid, c.relname, n.nspname,
         r.prrelid is not null as by_name, s.pnnspid is not null as by_schema
    from pg_publication p
    cross join pg_class c
    join pg_namespace n on n.oid = c.relnamespace
    left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid
    left join pg_publication_namespace s on s.pnpubid = p.oid and s.pnnspid = c.relnamespace
   where (c.oid = any ({tables}) or n.nspname = 'kakunin_private' and c.relname = 'session_keys')
     and c.relkind in ('r', 'p') and c.relpersistence = 'p'
     and (p.puballtables or r.prrelid is not null or s.pnnspid is not null)
)
select case when nspname = 'kakunin_private' then 'critical' else 'warning' end as severity,
       format('publication %I: %s', pubname, relid::regclass) as object,
       case when nspname = 'kakunin_private' then 'whoever subscribes has the key that bindings are made with'
            else 'whoever subscribes has rows of every agent' end as reason,
       case when puballtables then format('drop publication %I;', pubname)
            when by_name then format('alter publication %I drop table %s;', pubname, relid::regclass)
            else format('alter publication %I drop tables in schema %I;', pubname, nspname) end as sql
  from published
