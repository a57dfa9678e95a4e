select 'materialized view ' || c.oid::regclass as object,
       'it keeps rows of every agent, policies cannot be on it, and agents may ' || m.may as reason, m.undo as sql
  from pg_class c cross join lateral ({grants}) m
 where c.oid = any ({views}) and c.relkind = 'm' and m.may is not null
