-- Views on them, on views on them, and so on.
with recursive over as (
  select t.oid as relid from unnest({tables}) t(oid)
  union
  select r.ev_class
    from over o
    join pg_depend d on d.refclassid = 'pg_class'::regclass and d.refobjid = o.relid and d.classid = 'pg_rewrite'::regclass
    join pg_rewrite r on r.oid = d.objid
    join pg_class c on c.oid = r.ev_class and c.relkind in ('v', 'm')
)
select o.relid::bigint as oid from over o join pg_class c on c.oid = o.relid and c.relkind in ('v', 'm')
