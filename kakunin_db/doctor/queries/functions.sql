select p.oid::bigint as oid, case when n.nspname <> 'pg_catalog' then quote_ident(n.nspname) || '.' else '' end || quote_ident(p.proname) as name, n.nspname::text as schema, p.provolatile::text as volatility,
       l.lanname::text as language, p.prosecdef or p.proconfig is not null or l.lanname <> 'sql' as opaque, p.prosrc as source,
       coalesce(p.prosqlbody::text, '') as body
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
 where p.oid = any ({functions})
