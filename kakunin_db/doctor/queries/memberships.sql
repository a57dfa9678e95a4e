-- inherit_option and set_option are from 16; before, every membership allows SET ROLE.
select m.roleid::bigint as role, m.member::bigint as member, m.grantor::bigint as grantor, m.admin_option as admin,
       coalesce((to_jsonb(m) ->> 'inherit_option')::boolean, true)
         or coalesce((to_jsonb(m) ->> 'set_option')::boolean, true) as usable
  from pg_auth_members m
