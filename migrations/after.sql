-- After every migration, in its transaction: at base the version table goes, and its schema with it.
do $after$
begin
  if to_regclass('kakunin_private.alembic_version') is not null then
    if exists (select from kakunin_private.alembic_version) then
      return;
    end if;
    drop table kakunin_private.alembic_version;
  end if;
  -- Not empty when the kit is there and somebody stamped base: then it stays.
  if to_regnamespace('kakunin_private') is not null
    and not exists (
      select from pg_depend d
       where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'kakunin_private'::regnamespace) then
    drop schema kakunin_private;
  end if;
end
$after$;
