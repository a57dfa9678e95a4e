-- What agents, or everybody, may do with the relation c, and what takes it away from them. Not a query of its own: others
-- have it as {grants}. Who has it from somebody else than the owner loses it together with that one.
select string_agg(u.privileges, ', ') as may, string_agg(u.undo, ' ' order by u.undo) as undo
  from (select string_agg(distinct lower(g.privilege_type), ', ') as privileges,
               format('revoke %s on %s from %s%s;', string_agg(distinct lower(g.privilege_type), ', '), c.oid::regclass,
                 case when g.grantor <> c.relowner then quote_ident(pg_get_userbyid(g.grantor))
                      when g.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(g.grantee)) end,
                 case when g.grantor <> c.relowner then ' cascade' else '' end) as undo
          from (select (aclexplode(c.relacl)).*
                union all
                select (aclexplode(a.attacl)).* from pg_attribute a where a.attrelid = c.oid and a.attacl is not null) g
         where g.grantee = any ({reach}) and g.grantee <> c.relowner
         group by g.grantor, g.grantee) u
