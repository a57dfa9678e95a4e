select case when c.relrowsecurity then 'notice' when m.may is not null or c.relowner = any ({reach}) then 'critical' else 'warning' end as severity,
       'table ' || c.oid::regclass as object,
       format('its column %I says whose a row is, and ', t.column)
         || case when c.relrowsecurity then 'row security is on without a policy: agents see nothing'
                 when m.may is not null then 'no policy does: agents may ' || m.may
                 else 'no policy does' end as reason,
       case when l.collisdeterministic is false
            then format('alter table %s alter column %I type %s collate "C"; ', c.oid::regclass, t.column, format_type(a.atttypid, a.atttypmod)) else '' end
         || format('select kakunin.protect(%L, %L%s);', c.oid::regclass, t.column, case when c.relforcerowsecurity then ', force => true' else '' end) as sql
  from ({columns}) t(oid, "column")
  join pg_class c on c.oid = t.oid
  join pg_attribute a on a.attrelid = c.oid and a.attname = t.column
  left join pg_collation l on l.oid = a.attcollation
  cross join lateral ({grants}) m
 where not exists (select from pg_policy p where p.polrelid = c.oid)
   and not exists (select from pg_inherits i join pg_policy p on p.polrelid = i.inhparent where i.inhrelid = c.oid)
   and c.relkind in ('r', 'p') and not c.relispartition
