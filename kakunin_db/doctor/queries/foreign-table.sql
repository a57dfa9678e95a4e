select 'foreign table ' || c.oid::regclass as object, 'row security cannot be on it, and agents may ' || m.may as reason,
       m.undo as sql
  from pg_class c cross join lateral ({grants}) m
 where c.oid = any ({tables}) and c.relkind = 'f' and m.may is not null
