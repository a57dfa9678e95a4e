select r.oid::bigint as oid, r.rolname::text as name, quote_ident(r.rolname) as ident, r.rolsuper as superuser, r.rolbypassrls as bypassrls,
       r.rolcreaterole as createrole, r.rolreplication as replication, r.rolcanlogin as login,
       r.rolconnlimit as connections
  from pg_roles r
