-- Guard: DDL on the ledger, refused to everybody.
--
-- The kit's triggers refuse UPDATE, DELETE and TRUNCATE. To detach a partition, drop one, put another in its place or take the
-- triggers away is DDL, which only an event trigger can refuse, and event triggers are a superuser's. The kit's owner
-- is none, on purpose. So this is for a superuser to run, once, as it stands here; it is not part of the
-- installation, and everything in it belongs to that superuser: whatever runs at a superuser's DDL must not be
-- another one's to replace. It reads the catalogs, and its own table, and nothing that is the owner's.
--
-- From then on kakunin.archive_partition() needs two people: a superuser first says
--
--   select kakunin_guard.release('ledger_202611');
--
-- To remove the kit, remove the guard first: drop schema kakunin_guard cascade. Run this file again after an upgrade
-- of the kit. A superuser can take the guard away like anything else, and then verification shows what was done.

begin;
set local search_path = pg_catalog, pg_temp;

drop schema if exists kakunin_guard cascade;
create schema kakunin_guard;
comment on schema kakunin_guard is 'kakunin-db: refuses DDL on the ledger. A superuser''s, and nobody else''s to use';

create function kakunin_guard.columns_of(relation oid) returns text
language sql stable parallel safe set search_path = pg_catalog, pg_temp
return (select md5(string_agg(concat_ws(' ', a.attname, a.atttypid, a.atttypmod, a.attcollation, a.attgenerated), ',' order by a.attname))
          from pg_attribute a where a.attrelid = relation and a.attnum > 0 and not a.attisdropped);
comment on function kakunin_guard.columns_of(oid) is 'What columns a table has: a digest of their names and types';

create table kakunin_guard.relations (name name primary key, partition boolean not null, columns text not null);
comment on table kakunin_guard.relations is 'What is guarded: the tables of the ledger and of its tree, and each partition since it was attached';
insert into kakunin_guard.relations
select c.relname, false, kakunin_guard.columns_of(c.oid) from pg_class c
 where c.relnamespace = 'kakunin_private'::regnamespace and c.relname in ('ledger', 'batches', 'tree_nodes', 'tree_heads', 'exports');

create table kakunin_guard.functions (name name primary key, source text not null);
comment on table kakunin_guard.functions is 'The functions of the triggers, as they were when the guard was installed';
insert into kakunin_guard.functions
select p.proname, md5(p.prosrc) from pg_proc p
 where p.pronamespace = 'kakunin_private'::regnamespace and p.proname = 'refuse_change';

create function kakunin_guard.check_ledger() returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_private constant oid := (select n.oid from pg_namespace n where n.nspname = 'kakunin_private');
  v_ledger  constant oid := (select c.oid from pg_class c where c.relnamespace = v_private and c.relname = 'ledger');
  v_wrong   text;
begin
  -- A partition is guarded from the moment it is one.
  insert into kakunin_guard.relations (name, partition, columns)
  select c.relname, true, kakunin_guard.columns_of(c.oid) from pg_inherits i join pg_class c on c.oid = i.inhrelid
   where i.inhparent = v_ledger and c.relnamespace = v_private and c.relname collate "C" ~ '^ledger_(default|[0-9]{6})$'
  on conflict do nothing;
  select r.name into v_wrong
    from kakunin_guard.relations r
    left join pg_class c on c.relnamespace = v_private and c.relname = r.name and c.relkind in ('r', 'p')
   where c.oid is null or c.relrowsecurity or c.relhasrules or r.columns <> kakunin_guard.columns_of(c.oid)
      or (r.partition and not exists (select from pg_inherits i where i.inhrelid = c.oid and i.inhparent = v_ledger and not i.inhdetachpending))
      or not exists (
        select from pg_trigger t join pg_proc p on p.oid = t.tgfoid
         where t.tgrelid = c.oid and t.tgname = 'append_only' and t.tgenabled = 'A'
           and t.tgtype = 58 and t.tgqual is null  -- before, for each statement; update, delete, truncate
           and p.pronamespace = v_private and p.proname = 'refuse_change')
   limit 1;
  if v_wrong is null then
    select c.relname into v_wrong from pg_inherits i join pg_class c on c.oid = i.inhrelid
     where i.inhparent = v_ledger
       and not exists (select from kakunin_guard.relations r where r.name = c.relname and c.relnamespace = v_private)
     limit 1;
  end if;
  if v_wrong is null then
    select f.name into v_wrong from kakunin_guard.functions f
     where not exists (select from pg_proc p
                        where p.pronamespace = v_private and p.proname = f.name and md5(p.prosrc) = f.source and p.prosecdef
                          and p.prolang = (select l.oid from pg_language l where l.lanname = 'plpgsql'))
     limit 1;
  end if;
  if v_wrong is not null then
    raise exception using errcode = 'KA006',
      message = format('the ledger is append-only: %I of kakunin_private, and its trigger, stay as they are', v_wrong),
      hint = 'A partition to be archived is released by a superuser first: select kakunin_guard.release(name).';
  end if;
end
$$;
comment on function kakunin_guard.check_ledger() is 'KA006 unless every table of the ledger is where it was, with the trigger that refuses changes';

-- Looks only where a command touched the kit's private schema, so that nobody else's DDL can be held up by it; and not
-- at types, because a revocation makes one, and must not be held up either.
create function kakunin_guard.after_command() returns event_trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from pg_event_trigger_ddl_commands() d
              where d.object_type <> 'type'
                and (d.schema_name = 'kakunin_private' or d.object_identity collate "C" ~ 'kakunin_private'
                     -- renamed, or moved to another schema, it goes by that one's name
                     or d.object_type = 'schema'
                     or exists (select from pg_class c join kakunin_guard.relations r on r.name = c.relname
                                 where d.classid = 'pg_class'::regclass and c.oid = d.objid))) then
    perform kakunin_guard.check_ledger();
  end if;
end
$$;
comment on function kakunin_guard.after_command() is 'Event trigger: checks after DDL in kakunin_private';

create function kakunin_guard.after_drop() returns event_trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from pg_event_trigger_dropped_objects() d
              where d.object_type <> 'type'
                and (d.schema_name = 'kakunin_private' or d.object_identity collate "C" ~ 'kakunin_private')) then
    perform kakunin_guard.check_ledger();
  end if;
end
$$;
comment on function kakunin_guard.after_drop() is 'Event trigger: checks after a DROP in kakunin_private';

-- ALTER TABLE ... TYPE ... USING writes every row anew, and fires no trigger of the table's.
create function kakunin_guard.on_rewrite() returns event_trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_name name;
begin
  select c.relname into v_name from pg_class c
    join pg_namespace n on n.oid = c.relnamespace and n.nspname = 'kakunin_private'
    join kakunin_guard.relations r on r.name = c.relname
   where c.oid = pg_event_trigger_table_rewrite_oid();
  if found then
    raise exception using errcode = 'KA006',
      message = format('the ledger is append-only: rows of %I of kakunin_private are not written anew', v_name),
      hint = 'What is wrong in it is corrected by another entry.';
  end if;
end
$$;
comment on function kakunin_guard.on_rewrite() is 'Event trigger: KA006 where DDL would write the rows of a table of the ledger anew';

create function kakunin_guard.release(partition name) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
begin
  delete from kakunin_guard.relations r where r.name = release.partition and r.partition and r.name <> 'ledger_default';
  if not found then
    raise exception using errcode = 'KA010', message = format('%I is not a partition that is guarded', release.partition),
      hint = 'kakunin_guard.relations shows them.';
  end if;
end
$$;
comment on function kakunin_guard.release(name) is
  'Lets kakunin.archive_partition() take this partition out of the ledger. It comes back under the guard with the next DDL while it is attached';

revoke all on all functions in schema kakunin_guard from public;
select kakunin_guard.check_ledger();

create event trigger kakunin_guard_command on ddl_command_end execute function kakunin_guard.after_command();
create event trigger kakunin_guard_drop on sql_drop execute function kakunin_guard.after_drop();
create event trigger kakunin_guard_rewrite on table_rewrite execute function kakunin_guard.on_rewrite();
-- Also with session_replication_role = replica.
alter event trigger kakunin_guard_command enable always;
alter event trigger kakunin_guard_drop enable always;
alter event trigger kakunin_guard_rewrite enable always;
comment on event trigger kakunin_guard_command is 'KA006 where DDL would detach, add or unguard a table of kakunin''s ledger';
comment on event trigger kakunin_guard_drop is 'KA006 where DROP would take away a table of kakunin''s ledger, or its trigger';
comment on event trigger kakunin_guard_rewrite is 'KA006 where DDL would write the rows of kakunin''s ledger anew';

commit;
