-- A partition's index is its parent's.
select case when c.relkind = 'p' or c.relpages >= 128 then 'warning' else 'notice' end as severity,
       'table ' || c.oid::regclass as object,
       format('no index begins with %I, so a policy on it reads the whole table', t.column) as reason,
       format('create index %s on %s (%I);', case c.relkind when 'r' then 'concurrently' else '' end, c.oid::regclass, t.column) as sql
  from ({columns}) t(oid, "column")
  join pg_class c on c.oid = t.oid
  join pg_attribute a on a.attrelid = c.oid and a.attname = t.column
 where c.relkind in ('r', 'p') and c.relrowsecurity and not c.relispartition
   and not exists (select from pg_index x where x.indrelid = c.oid and x.indkey[0] = a.attnum
                      and x.indisvalid and x.indpred is null)
