select 'role ' || quote_ident(r.rolname) as object,
       'one agent can take every connection and fill the server''s table of locks: it has no connection limit' as reason,
       format('alter role %I connection limit 20;', r.rolname) as sql
  from pg_roles r where r.oid = any ({agents}) and r.rolconnlimit < 0 and not r.rolsuper
