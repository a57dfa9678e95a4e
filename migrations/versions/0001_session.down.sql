-- Takes the kit away: both schemas with everything in them, and the roles nobody else uses.
set local search_path = pg_catalog, pg_temp;

-- First what would break outside. DROP ... CASCADE would take a policy away from a user's table, and a
-- table whose policies are gone is either empty to everybody or, with another policy left, open to too many.
do $outside$
declare
  v_list  text;
  v_count bigint;
begin
  with recursive kit as (
    select d.classid, d.objid
      from pg_depend d
     where d.refclassid = 'pg_namespace'::regclass and d.deptype = 'n'
       and d.refobjid in (select n.oid from pg_namespace n where n.nspname in ('kakunin', 'kakunin_private'))
    union
    -- parts of those: indexes, constraints, defaults, rules, sequences of a column
    select d.classid, d.objid
      from pg_depend d join kit k on d.refclassid = k.classid and d.refobjid = k.objid
     where d.deptype in ('a', 'i', 'P', 'S')
  ), outside as (
    select distinct
           -- a view depends through its rule, and it is the view that people know
           case when v.oid is not null then pg_describe_object('pg_class'::regclass, v.oid, 0)
                else pg_describe_object(d.classid, d.objid, d.objsubid) end as name
      from pg_depend d
      join kit k on d.refclassid = k.classid and d.refobjid = k.objid
      left join pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
      left join pg_class v on v.oid = r.ev_class and v.relkind in ('v', 'm')
     where d.deptype = 'n'
       and not exists (select from kit o where o.classid = d.classid and o.objid = d.objid)
  ), numbered as (
    select name, row_number() over (order by name) as n, count(*) over () as total from outside
  )
  select string_agg(name, ', ' order by n), max(total) into v_list, v_count from numbered where n <= 20;
  if v_count > 0 then
    raise exception using errcode = 'KA010',
      message = format('the kit is in use outside its schemas: %s%s',
                       v_list, case when v_count > 20 then format(' and %s more', v_count - 20) else '' end),
      hint = 'kakunin-db uninstall takes policies and triggers off and leaves the tables closed. What else is listed has to be dropped, a default by: alter table <table> alter <column> drop default;';
  end if;
end
$outside$;

-- Alembic still has its version table to write to, so that one is set aside while its schema goes.
set local client_min_messages = warning;  -- DROP ... CASCADE would name every function it takes
create schema kakunin_leaving;
alter table kakunin_private.alembic_version set schema kakunin_leaving;
drop schema kakunin cascade;
drop schema kakunin_private cascade;
alter schema kakunin_leaving rename to kakunin_private;
set local client_min_messages = notice;

-- Roles belong to the cluster. One that somebody else uses stays, and a notice says who.
--
-- The login that creates a role on Postgres 16 or later is its member with ADMIN OPTION and nothing else,
-- granted by the bootstrap superuser (oid 10): that is bookkeeping and not use. The two columns that tell it
-- are not in pg_auth_members before 16, hence the detour by jsonb. Only a holder of ADMIN OPTION may drop
-- the role there; before 16 anybody with CREATEROLE may.
do $roles$
declare
  v_role name;
  v_oid  oid;
  v_uses text;
begin
  foreach v_role in array
    '{kakunin_agent,kakunin_gateway,kakunin_registrar,kakunin_operator,kakunin_worker,kakunin_auditor}'::name[]
  loop
    select r.oid into v_oid from pg_roles r where r.rolname = v_role;
    continue when not found;

    select string_agg(u.use, ', ' order by u.use) into v_uses
      from (
        select format('%I is a member', m.rolname)
          from pg_auth_members a join pg_roles m on m.oid = a.member
         where a.roleid = v_oid and m.rolname <> current_user
           and not (a.grantor = 10 and a.admin_option
                    and coalesce(to_jsonb(a) ->> 'inherit_option' = 'false' and to_jsonb(a) ->> 'set_option' = 'false', false))
        union
        select format('it is a member of %I', g.rolname)
          from pg_auth_members a join pg_roles g on g.oid = a.roleid
         where a.member = v_oid
        union
        select case when d.dbid in (0, c.oid) then pg_describe_object(d.classid, d.objid, d.objsubid)
                    else format('database %I', coalesce(b.datname, d.dbid::text)) end
          from pg_shdepend d
          join pg_database c on c.datname = current_database()
          left join pg_database b on b.oid = d.dbid
         where d.refclassid = 'pg_authid'::regclass and d.refobjid = v_oid
           and d.classid <> 'pg_auth_members'::regclass  -- counted above
      ) as u(use);
    if v_uses is not null then
      raise notice 'role % stays, because it is in use: %', v_role, v_uses;
      continue;
    end if;

    begin
      execute format('drop role %I', v_role);
    exception
      when undefined_object then
        null;  -- another database's downgrade was quicker
      when insufficient_privilege or dependent_objects_still_exist or object_in_use then
        raise notice 'role % stays: %', v_role, sqlerrm;
    end;
  end loop;
end
$roles$;
