-- Policies: putting row-level security on a table of yours.
--
-- protect() writes what sql/policies/agent_vault.sql shows by hand: one permissive policy that lets a
-- bound session see and change the rows whose serial column equals its own. Where that column is a uuid it
-- holds the agent's id instead, and the rows stay the agent's when its certificate is renewed. A role the policy does not
-- name, and a session without a binding, sees no row. With write_scope, three restrictive policies
-- refuse aloud (KA005) any write, by anybody, without a certificate that permits that action.
--
-- Both functions run with their caller's rights: only a table's owner can protect it. They keep no list
-- of their own. The policies in the catalog are the record, so a dump carries it and nothing can drift;
-- the four named in c_policies are theirs. Partitions and inheritance children get the same
-- policies, because a query that names a child goes by the child's policies and not by the parent's.
-- Run protect() again after adding a partition.
--
-- With audit, triggers put every statement that changed rows of the table into the ledger, in the same transaction, as
-- the bound agent's or, without a binding, with the login alone.
--
-- Row security does not cover everything that can be granted. TRUNCATE ignores it, TRIGGER lets the
-- grantee run code on other agents' rows, REFERENCES lets a foreign key probe for them, and MAINTAIN (from
-- 17) lets it lock them away: protect() takes these from the roles it lets in, and unprotect() does not
-- give them back.

-- Runs as the owner of the kit, so nothing in it may run code of the table's owner: keys are written by their types'
-- output functions, which only a superuser can make, and not by casts, which anybody can.
create function kakunin.record_changes() returns trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
-- What keys read as is not up to the session.
set datestyle = 'ISO, YMD' set intervalstyle = 'iso_8601' set timezone = 'UTC' set bytea_output = 'hex'
set extra_float_digits = 1 set quote_all_identifiers = off
as $$
declare
  v_serial   text collate "C" := kakunin.current_cert_serial();
  v_role     constant name := coalesce(nullif(current_setting('role'), 'none')::name, session_user);
  v_agent_id uuid;
  v_rows     bigint;
  v_keys     jsonb;
  v_metadata jsonb := jsonb_build_object(
    'table', format('%I.%I', tg_table_schema, tg_table_name), 'operation', tg_op);
begin
  if tg_op <> 'TRUNCATE' then
    -- Without its transition table this would be any relation of that name, a temporary view with functions in it too.
    if not exists (select from pg_trigger t where t.tgrelid = tg_relid and t.tgname = tg_name
                      and 'kakunin_rows' in (t.tgnewtable, t.tgoldtable)) then
      raise exception using errcode = 'KA010', message = 'record_changes() is for the triggers that kakunin.protect() makes';
    end if;
    select count(*) into v_rows from kakunin_rows;
    if v_rows = 0 then
      return null;
    end if;
    v_metadata := v_metadata || jsonb_build_object('rows', v_rows);
    if tg_nargs > 0 then
      -- A hundred of them, and those shortened: an entry has its limit, and a statement must not fail by it. The columns are
      -- those of the primary key now; a name that is no column would be a function of that name.
      if exists (select from pg_index x where x.indrelid = tg_relid and x.indisprimary) then
        execute format('select jsonb_agg(k.key) from (select jsonb_build_array(%s) as key from kakunin_rows r limit 100) k',
          (select string_agg(format('left(format(''%%s'', r.%I), 100)', a.attname), ', ' order by array_position(x.indkey::smallint[], a.attnum))
             from pg_index x join pg_attribute a on a.attrelid = x.indrelid and a.attnum = any (x.indkey::smallint[])
            where x.indrelid = tg_relid and x.indisprimary))
          into v_keys;
      end if;
      v_metadata := v_metadata || case when coalesce(octet_length(v_keys::text), 12001) > 12000
        then jsonb_build_object('keys_omitted', v_rows)
        else jsonb_build_object('keys', v_keys, 'keys_omitted', greatest(v_rows - 100, 0)) end;
    end if;
  end if;
  select c.agent_id into v_agent_id from kakunin_private.certificates c where c.serial = v_serial;
  -- An agent that unbinds in the midst of its statement, or is revoked in it, must not change a row as nobody. Others
  -- than agents need no binding: the owner, and whom row security does not bind.
  if v_serial is null and v_role <> current_user
    and not (select r.rolsuper or r.rolbypassrls from pg_roles r where r.rolname = v_role)
    and (pg_has_role(v_role, 'kakunin_agent', 'member') or pg_has_role(v_role, 'kakunin_gateway', 'member'))
    and not pg_has_role(v_role, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
    perform kakunin.require_session();
    perform kakunin_private.not_marked();
  end if;
  -- Changes by others have chains of their own, beside those of decisions.
  perform kakunin_private.append(
    'table.' || lower(tg_op), v_agent_id, v_serial, null, v_metadata::text, coalesce(v_agent_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff'));
  return null;
end
$$;
comment on function kakunin.record_changes() is
  'Trigger of protect(..., audit => true): an entry of the ledger for each statement that changed rows. For kakunin_operator';

create function kakunin.audit_changes(target regclass, audit boolean, keys boolean) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  v_event     text;
  v_arguments text := '';
begin
  if num_nulls(target, audit, keys) > 0 then
    raise exception using errcode = 'KA010', message = 'audit_changes() needs a table, and true or false twice';
  end if;
  foreach v_event in array '{insert,update,delete,truncate}'::text[] loop
    if exists (select from pg_trigger t where t.tgrelid = target and t.tgname = 'kakunin_audit_' || v_event) then
      execute format('drop trigger %I on %s', 'kakunin_audit_' || v_event, target);
    end if;
  end loop;
  if not audit then
    return;
  end if;
  if keys then
    if not exists (select from pg_index x where x.indrelid = target and x.indisprimary) then
      raise exception using errcode = 'KA010',
        message = format('%s has no primary key, so there are no keys to record', target),
        hint = 'Add one, or leave audit_keys away: the number of rows is recorded.';
    end if;
    v_arguments := quote_literal('keys');
  end if;
  foreach v_event in array '{insert,update,delete,truncate}'::text[] loop
    execute format('create trigger %I after %s on %s %s for each statement execute function kakunin.record_changes(%s)',
      'kakunin_audit_' || v_event, v_event, target,
      case v_event when 'truncate' then '' when 'delete' then 'referencing old table as kakunin_rows'
        else 'referencing new table as kakunin_rows' end,
      v_arguments);
    execute format('comment on trigger %I on %s is %L', 'kakunin_audit_' || v_event, target,
      'Written by kakunin.protect(audit => true): changes are entries of the ledger');
  end loop;
end
$$;
comment on function kakunin.audit_changes(regclass, boolean, boolean) is
  'What protect() calls: puts the triggers of audit on a table, or takes them away. For the table''s owner, who needs kakunin_operator';

-- Says what the catalog says, whatever its caller would have it say.
create function kakunin.record_policy(target regclass) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp set quote_all_identifiers = off
as $$
declare
  v_table    record;
  v_policies jsonb;
begin
  select format('%I.%I', n.nspname, c.relname) as name, c.relrowsecurity, c.relforcerowsecurity,
         exists (select from pg_trigger t where t.tgrelid = c.oid and t.tgfoid = 'kakunin.record_changes'::regproc) as audit
    into v_table
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  if not found then
    raise exception using errcode = 'KA010', message = 'record_policy() needs a table';
  end if;
  -- The first hundred: an entry is not to grow with what somebody else made.
  select coalesce(jsonb_object_agg(p.polname, jsonb_build_object(
           'permissive', p.polpermissive, 'using', left(pg_get_expr(p.polqual, p.polrelid), 500),
           'check', left(pg_get_expr(p.polwithcheck, p.polrelid), 500))), '{}') into v_policies
    from (select * from pg_policy y where y.polrelid = target order by y.polname <> 'kakunin_isolation', y.polname limit 100) p;
  perform kakunin_private.record(
    case when v_table.relrowsecurity and v_policies ? 'kakunin_isolation' then 'policy.protected' else 'policy.unprotected' end,
    null, jsonb_build_object('table', v_table.name, 'row_security', v_table.relrowsecurity, 'forced', v_table.relforcerowsecurity,
      'audit', v_table.audit, 'policies', v_policies));
end
$$;
comment on function kakunin.record_policy(regclass) is
  'What protect() and unprotect() call: an entry of the ledger that says how row security stands on a table. For kakunin_operator';

create function kakunin.protect(
  target regclass,
  serial_column name default 'permitted_agent_serial',
  roles name[] default '{kakunin_agent,kakunin_gateway}',
  write_scope text default null,
  force boolean default false,
  keep_policies boolean default false,
  audit boolean default false,
  audit_keys boolean default false
) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies  constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_isolation text;
  v_scope     text;
  v_roles     text;
  v_role      name;
  v_table     record;
  v_other     text;
  v_before    text;
  v_grant     record;
  v_policy    name;
begin
  if protect.target is null or serial_column is null
    or num_nulls(protect.force, keep_policies, protect.audit, audit_keys) > 0 then
    raise exception using errcode = 'KA010',
      message = 'protect() needs a table, a column, and true or false for force, keep_policies, audit and audit_keys';
  end if;
  select r into v_role from unnest(roles) r
   where r is null or (r <> 'public' and not exists (select from pg_roles p where p.rolname = r)) limit 1;
  if found or coalesce(cardinality(roles), 0) = 0 then
    raise exception using errcode = 'KA010',
      message = format('%s is not a role the policies can name', coalesce(quote_ident(v_role), 'NULL')),
      hint = 'Give the roles agents have, such as {kakunin_agent}.';
  end if;
  if (current_setting('server_version_num')::integer < case current_setting('server_version_num')::integer / 10000
        when 15 then 150020 when 16 then 160016 when 17 then 170012 when 18 then 180007 else 0 end) then
    raise warning 'kakunin.protect: Postgres % gives rows that policies hide to the WHERE of INSERT ... ON CONFLICT DO UPDATE (CVE-2026-120154)',
      current_setting('server_version')
      using hint = 'Update to 15.20, 16.16, 17.12, 18.7 or later, or put the serial column into every unique key.';
  end if;
  if write_scope is not null and write_scope !~ '^[A-Za-z0-9_.:/-]{1,128}$' then
    raise exception using errcode = 'KA010',
      message = 'write_scope is 1 to 128 characters from A-Z a-z 0-9 _ . : / -';
  end if;
  select string_agg(quote_ident(r), ', ') into v_roles from unnest(roles) r;
  v_scope := format('(select kakunin.require_scope(%L))', write_scope);

  for v_table in
    with recursive family as (
      select protect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid, c.relkind, c.relacl, c.relowner, c.relrowsecurity, c.relforcerowsecurity,
           a.attnum, coalesce(nullif(t.typbasetype, 0), t.oid) as column_type, l.collisdeterministic
      from family f
      join pg_class c on c.oid = f.relid
      left join pg_attribute a on a.attrelid = c.oid and a.attname = serial_column and a.attnum > 0 and not a.attisdropped
      left join pg_type t on t.oid = a.atttypid
      left join pg_collation l on l.oid = a.attcollation
     order by c.oid
  loop
    if v_table.relkind not in ('r', 'p') then
      raise exception using errcode = 'KA010',
        message = format('%s is not a table, and only a table can have row-level security', v_table.name),
        hint = 'Protect the tables below it; make views over them with security_invoker = true.';
    end if;
    if v_table.attnum is null or v_table.column_type not in ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype) then
      raise exception using errcode = 'KA010',
        message = format('%s has no column %I of type text, varchar or uuid', v_table.name, serial_column),
        hint = 'Add it, or name the column that holds the serial, or the agent id, that a row belongs to.';
    end if;
    v_isolation := format('%I = (select kakunin.%I())', serial_column,
      case when v_table.column_type = 'uuid'::regtype then 'current_agent_id' else 'current_cert_serial' end);
    if not v_table.collisdeterministic then
      raise exception using errcode = 'KA010',
        message = format('the column %I of %s has a nondeterministic collation, under which two serials may be equal',
          serial_column, v_table.name),
        hint = 'Give it collate "C".';
    end if;
    -- Turned on by ALTER TABLE ... FORCE earlier and asleep until now: enabling would bind the owner too.
    if v_table.relforcerowsecurity and not protect.force then
      raise exception using errcode = 'KA010',
        message = format('row security is forced on %s, so its owner would see only rows of a bound certificate', v_table.name),
        hint = 'Say force => true if that is meant, or ALTER TABLE ... NO FORCE ROW LEVEL SECURITY first.';
    end if;
    select string_agg(quote_ident(p.polname), ', ' order by p.polname) into v_other
      from pg_policy p
     where p.polrelid = v_table.oid and p.polpermissive and p.polname <> all (c_policies);
    if v_other is not null and not keep_policies then
      raise exception using errcode = 'KA010',
        message = format('%s has permissive policies that would let rows through beside this one: %s', v_table.name, v_other),
        hint = 'Drop them or make them restrictive; if they are meant to widen access, say keep_policies => true.';
    end if;

    -- How the table stood before the first protect(), which a repeated one must not forget.
    select substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+, [a-z]+)[.]') into v_before
      from pg_policy p where p.polrelid = v_table.oid and p.polname = 'kakunin_isolation';
    v_before := coalesce(v_before,
      case when v_table.relrowsecurity then 'on' else 'off' end || ', '
      || case when v_table.relforcerowsecurity then 'forced' else 'unforced' end);

    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    execute format('create policy kakunin_isolation on %s for all to %s using (%s) with check (%3$s)',
      v_table.name, v_roles, v_isolation);
    execute format('comment on policy kakunin_isolation on %s is %L', v_table.name,
      format('Written by kakunin.protect(): rows of the bound certificate only. Row security before: %s.', v_before));
    if write_scope is not null then
      -- To public, not to the roles: a member of a role can DROP OWNED BY it, which takes the role out of
      -- policies. Out of the permissive one that closes; out of a restrictive one it would open.
      execute format('create policy kakunin_insert_scope on %s as restrictive for insert to public with check (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_update_scope on %s as restrictive for update to public using (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_delete_scope on %s as restrictive for delete to public using (%s)',
        v_table.name, v_scope);
    end if;
    execute format('alter table %s enable row level security, %s force row level security',
      v_table.name, case when protect.force then '' else 'no' end);
    perform kakunin.audit_changes(v_table.name, protect.audit or audit_keys, audit_keys);
    perform kakunin.record_policy(v_table.name);

    -- Everybody who may be an agent and holds one of them, directly, through another role or on a column.
    for v_grant in
      select coalesce(r.rolname, 'public') as grantee, pg_get_userbyid(g.grantor) as grantor,
             g.grantor = v_table.relowner as by_owner,
             string_agg(distinct lower(g.privilege_type), ', ') as privileges
        from (select (aclexplode(v_table.relacl)).*
              union all
              select (aclexplode(a.attacl)).* from pg_attribute a where a.attrelid = v_table.oid) g
        left join pg_roles r on r.oid = g.grantee
       where g.privilege_type in ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
         and g.grantee <> v_table.relowner
         and not coalesce(r.rolsuper, false)
         and (g.grantee = 0 or 'public' = any (roles)
              or exists (
                select from pg_roles m, unnest(roles) n
                 where not m.rolsuper and pg_has_role(m.oid, n, 'MEMBER') and pg_has_role(m.oid, g.grantee, 'MEMBER')))
       group by 1, 2, 3
       order by 1, 2
    loop
      if not v_grant.by_owner then
        raise exception using errcode = 'KA010',
          message = format('%I has %s on %s from %I, and row security does not cover that',
            v_grant.grantee, v_grant.privileges, v_table.name, v_grant.grantor),
          hint = format('First: revoke %s on %s from %I cascade', v_grant.privileges, v_table.name, v_grant.grantor);
      end if;
      execute format('revoke %s on %s from %I', v_grant.privileges, v_table.name, v_grant.grantee);
      raise notice 'kakunin.protect: revoked % on % from %: row security does not cover that',
        v_grant.privileges, v_table.name, v_grant.grantee;
    end loop;
    if not exists (select from pg_index x where x.indrelid = v_table.oid and x.indkey[0] = v_table.attnum and x.indpred is null) then
      raise notice 'kakunin.protect: no index on % begins with %, so every query reads the whole table', v_table.name, serial_column;
    end if;
  end loop;
end
$$;
comment on function kakunin.protect(regclass, name, name[], text, boolean, boolean, boolean, boolean) is
  'Enables row-level security on a table and its partitions, so that the named roles see and change only rows whose serial_column is that of their bound certificate, or its agent where the column is a uuid. write_scope: writes need that scope as well; force: the owner is bound too; keep_policies: other permissive policies may widen access; audit: each statement that changes rows is an entry of the ledger, with the number of rows, and with audit_keys their primary keys. Can be repeated. For the table''s owner, who needs kakunin_operator';

create function kakunin.unprotect(target regclass) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_table    record;
  v_policy   name;
begin
  if unprotect.target is null then
    raise exception using errcode = 'KA010', message = 'unprotect() needs a table';
  end if;
  for v_table in
    with recursive family as (
      select unprotect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+), [a-z]+[.]') as enabled_before,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: [a-z]+, ([a-z]+)[.]') as forced_before
      from family f
      join pg_class c on c.oid = f.relid
      join pg_policy p on p.polrelid = c.oid and p.polname = 'kakunin_isolation'
     order by c.oid
  loop
    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    perform kakunin.audit_changes(v_table.name, false, false);
    -- Without the comment nobody knows how it stood, and then closed is the safe answer.
    if v_table.forced_before = 'unforced' then
      execute format('alter table %s no force row level security', v_table.name);
    end if;
    if exists (select from pg_policy p where p.polrelid = v_table.oid) then
      raise notice 'kakunin.unprotect: % keeps row security on, for its other policies', v_table.name;
    elsif v_table.enabled_before = 'off' then
      execute format('alter table %s disable row level security', v_table.name);
      raise notice 'kakunin.unprotect: row security is off on %, so privileges alone decide who reads it', v_table.name;
    end if;
    perform kakunin.record_policy(v_table.name);
  end loop;
end
$$;
comment on function kakunin.unprotect(regclass) is
  'Takes away what protect() put on a table and its partitions, and leaves row security as it stood before, privileges as they are now. For the table''s owner, who needs kakunin_operator';
