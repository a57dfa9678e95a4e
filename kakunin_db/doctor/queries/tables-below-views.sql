with recursive below as (
  select v.oid as view, v.oid as relid from unnest({views}) v(oid)
  union
  select b.view, d.refobjid
    from below b
    join pg_rewrite r on r.ev_class = b.relid
    join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid and d.refclassid = 'pg_class'::regclass
)
select b.view::bigint as view, b.relid::bigint as relid from below b where b.relid = any ({tables})
