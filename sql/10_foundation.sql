-- Foundation: schemas, roles, the installation and the clock.
--
-- Two schemas. `kakunin` is what others may call: functions and views, nothing else. `kakunin_private`
-- holds tables, keys and helpers; nobody but the owner has USAGE on it, so a function there can be
-- reached only from inside one of ours.
--
-- The owner is the login that installs. It needs CREATEROLE and CREATE on the database and is not
-- superuser. Functions that touch the private tables are SECURITY DEFINER and run as that owner, each
-- with `search_path = pg_catalog, pg_temp`. The order matters: with an empty path pg_temp is searched
-- first for types and tables, and a caller's `create temp table jsonb(...)` would change what `::jsonb`
-- means inside the function.
--
-- Six roles, none of which can log in. The DBA grants them to real logins:
--
--   kakunin_agent      an agent's own session: opens, binds, asks who it is
--   kakunin_gateway    trusted server code that has verified its caller and may bind by serial
--   kakunin_registrar  registers agents and certificates
--   kakunin_operator   suspends, revokes, rotates the session key, protects tables
--   kakunin_worker     the signer
--   kakunin_auditor    reads the ledger and its proofs
--
-- Roles belong to the cluster, not to the database: they may exist already (a second database with the
-- kit) and they are kept at uninstallation while anybody uses them.
--
-- Two more things a caller brings along. Text arguments come with the caller's collation, and a
-- nondeterministic one can make any two texts equal: columns that decide something are collate "C", and so
-- are the variables that are compared with them. Bodies of functions have no backslash outside
-- E'...': what it means elsewhere is up to the caller's standard_conforming_strings.
--
-- Errors carry their own SQLSTATEs, one class a cause (docs/errors.md, kakunin_db/errors.py):
--   KA001 unknown certificate       KA006 the ledger is append-only
--   KA002 certificate revoked       KA007 ledger integrity
--   KA003 outside its validity      KA008 agent suspended
--   KA004 assertion or ticket       KA009 spend limit
--   KA005 outside certified scope   KA010 bad input
--   KA011 risk too high             KA012 the standby is too far behind

-- The files of this folder are applied in name order in one transaction (psql -1, or `kakunin-db migrate`).
-- Names below resolve here and nowhere else, whatever search_path the installing session came with.
set local search_path = pg_catalog, pg_temp;

create schema if not exists kakunin_private;  -- may hold the migration's version table already
create schema kakunin;
comment on schema kakunin is 'kakunin-db: functions an application, an operator or a policy may call';
comment on schema kakunin_private is 'kakunin-db: tables, keys and helpers. No role but the owner has USAGE, on purpose';

do $roles$
declare
  v_role record;
begin
  for v_role in
    select * from (values
      ('kakunin_agent',     'an agent''s session: opens, binds, asks who it is'),
      ('kakunin_gateway',   'trusted server code that has verified its caller and may bind by serial'),
      ('kakunin_registrar', 'registers agents and certificates'),
      ('kakunin_operator',  'suspends, revokes, rotates the session key, protects tables'),
      ('kakunin_worker',    'the signer of the ledger'),
      ('kakunin_auditor',   'reads the ledger and its proofs')
    ) as r(name, purpose)
  loop
    -- Made beforehand, by a DBA for an installer without CREATEROLE or by another database's installation.
    continue when to_regrole(v_role.name) is not null;
    begin
      execute format('create role %I nologin', v_role.name);
      execute format('comment on role %I is %L', v_role.name, 'kakunin-db: ' || v_role.purpose);
    exception
      -- another database's installation makes the same role at this very moment
      when duplicate_object or unique_violation then null;
    end;
  end loop;
end
$roles$;

create table kakunin_private.installation (
  only_row        boolean primary key default true check (only_row),
  installation_id uuid not null default gen_random_uuid(),
  installed_at    timestamptz not null default now()
);
comment on table kakunin_private.installation is
  'One row. The id is the audience of assertions, so that one made for another database is refused here';
insert into kakunin_private.installation default values;

create function kakunin.installation_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select i.installation_id from kakunin_private.installation i);
end
$$;
comment on function kakunin.installation_id() is
  'This installation''s id. Assertions name it as their audience: kakunin:<installation id>. For all the kit''s roles';

-- Everything that asks for the time asks here, so that a test can move the clock by replacing one
-- function instead of sleeping. It is the wall clock, not the transaction's start: a certificate must
-- expire inside a long transaction too.
create function kakunin_private.clock() returns timestamptz
language sql volatile parallel safe
return clock_timestamp();
comment on function kakunin_private.clock() is 'The present time, for every check the kit makes';

-- A standby answers by what it has replayed, so a revocation that it has not got yet is none there. How far behind it is
-- says the newest commit it has replayed: everything committed on the primary before that is there. Nothing is
-- committed on an idle primary but the worker's lease, every two seconds, and that is enough of a heartbeat. A standby that
-- is cut off, paused or behind sees no commit, and is closed once the newest is older than max_lag, whatever
-- state it believes replication to be in.
create table kakunin_private.replicas (
  only_row boolean primary key default true check (only_row),
  max_lag  interval default '1 minute'
);
comment on table kakunin_private.replicas is 'How far behind a standby may be that answers agents';
comment on column kakunin_private.replicas.max_lag is 'Age of the newest commit it has replayed; NULL where any age will do';
insert into kakunin_private.replicas default values;

-- Asked only in recovery, and apart from what is inlined: on a primary a statement pays for pg_is_in_recovery() alone.
create function kakunin_private.replica_is_fresh() returns boolean
language plpgsql volatile parallel safe
as $$
begin
  return coalesce((select r.max_lag is null or pg_last_xact_replay_timestamp() > kakunin_private.clock() - r.max_lag
                     from kakunin_private.replicas r), false);
end
$$;
comment on function kakunin_private.replica_is_fresh() is
  'On a standby: whether what it has replayed is no older than the limit. False as well where it has replayed no commit since it started';

create function kakunin_private.check_replica() returns void
language plpgsql volatile parallel safe
as $$
begin
  if pg_is_in_recovery() and not kakunin_private.replica_is_fresh() then
    raise exception using errcode = 'KA012',
      message = format('this standby has replayed what was committed until %s, and is closed to agents when that is more than %s ago',
        coalesce(to_char(pg_last_xact_replay_timestamp() at time zone interval '0', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), '(nothing yet)'),
        (select r.max_lag from kakunin_private.replicas r)),
      hint = 'Ask the primary, or wait. If nothing is behind, no worker runs on the primary, or the clocks differ. kakunin.set_replica_lag() sets the limit.';
  end if;
end
$$;
comment on function kakunin_private.check_replica() is 'KA012 on a standby that is too far behind';
