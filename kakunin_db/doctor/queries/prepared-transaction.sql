select 'prepared transaction ' || quote_literal(x.gid) as object,
       format('prepared by %I at %s: it can be committed after its agent was halted', x.owner, date_trunc('second', x.prepared)) as reason,
       format('rollback prepared %L;', x.gid) as sql
  from pg_prepared_xacts x join pg_roles r on r.rolname = x.owner
 where x.database = current_database() and r.oid = any ({reach})
