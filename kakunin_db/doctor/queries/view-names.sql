select c.oid::bigint as oid, c.relname::text as bare, c.oid::regclass::text as name from pg_class c where c.oid = any ({views})
