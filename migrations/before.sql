-- Before every migration, in its transaction: one migration at a time, a login that may do it, and a place
-- for Alembic's version table. The table lives in kakunin_private, so nothing is asked of schema public.
set local search_path = pg_catalog, pg_temp;
set local client_min_messages = warning;  -- IF NOT EXISTS would tell of the schema made below

do $before$
declare
  c_lock   constant bigint := 30224936667605358;
  v_owner  name;
  v_wait   text;
  v_others text;
begin
  -- 'kakunin' as a number; held until commit. One migration waits for another as long as that takes; but any login can
  -- take the lock, and for nobody else is waited.
  v_wait := current_setting('lock_timeout');
  perform set_config('lock_timeout', '1s', true);
  loop
    select string_agg(format('%s (%s)', coalesce('process ' || l.pid, 'a prepared transaction'), coalesce(a.usename, 'unknown')), ', ' order by l.pid)
      into v_others
      from pg_locks l left join pg_stat_activity a on a.pid = l.pid
     where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
       and l.classid::bigint = c_lock >> 32 and l.objid::bigint = c_lock & 4294967295
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and not coalesce(pg_has_role(a.usesysid,
             coalesce((select n.nspowner from pg_namespace n where n.nspname = 'kakunin'), current_user::regrole), 'member'), false);
    if v_others is not null then
      raise exception using errcode = 'KA010',
        message = format('the lock by which migrations wait for each other is held by %s, which is none', v_others),
        hint = 'End it: select pg_terminate_backend(<process>). Then run the migration again.';
    end if;
    begin
      perform pg_advisory_xact_lock(c_lock);
      exit;
    exception
      when lock_not_available then null;
    end;
  end loop;
  -- And for nobody else: what waits for a lock has everybody else wait behind it. Whoever said how long is right.
  perform set_config('lock_timeout', case v_wait when '0' then '5s' else v_wait end, true);

  -- A superuser may run it too, but what it makes must be the owner's: a SECURITY DEFINER function runs as
  -- whoever made it.
  select pg_get_userbyid(n.nspowner) into v_owner from pg_namespace n where n.nspname = 'kakunin';
  if v_owner <> current_user then
    execute format('set local role %I', v_owner);
  end if;

  -- Said here, with the remedy, because half way through it would be a bare "permission denied".
  if v_owner is null then
    if not has_database_privilege(current_database(), 'CREATE') then
      raise exception using errcode = 'insufficient_privilege',
        message = format('%I may not create schemas in database %I', current_user, current_database()),
        hint = format('Have its owner run: grant create on database %I to %I;', current_database(), current_user);
    end if;
    if not (select r.rolcreaterole or r.rolsuper from pg_roles r where r.rolname = current_user)
      and (select count(*) from pg_roles r where r.rolname in (
        'kakunin_agent', 'kakunin_gateway', 'kakunin_registrar', 'kakunin_operator', 'kakunin_worker',
        'kakunin_auditor')) < 6 then
      raise exception using errcode = 'insufficient_privilege',
        message = format('%I may not create roles', current_user),
        hint = format('Have a superuser run: alter role %I createrole; or have the six roles made beforehand.', current_user);
    end if;
  end if;

  -- IF NOT EXISTS would ask for CREATE on the database even where there is nothing to create.
  if to_regnamespace('kakunin_private') is null then
    create schema kakunin_private;
  elsif v_owner is null
    and (select n.nspowner from pg_namespace n where n.nspname = 'kakunin_private') <> current_user::regrole then
    -- Its owner could drop what is made in it, and put functions of its own beside those that run as ours.
    raise exception using errcode = 'insufficient_privilege',
      message = format('schema kakunin_private is there already, and is not of %I', current_user),
      hint = 'Look at what is in it and who made it, and drop it.';
  end if;
end
$before$;
