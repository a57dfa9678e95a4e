"""What a login may be that a model's SQL runs as: a member of kakunin_agent, and nothing else."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.rows import tuple_row

from ..errors import KakuninError

# Each row says what the login is or may beyond that, and what takes it away. The roles it can become are
# those it is a member of, with or without inheriting them, and kakunin_agent's own.
_EXCESS = """
with recursive reach(oid) as (
  select r.oid from pg_catalog.pg_roles r where r.rolname = session_user
  union
  select m.roleid from pg_catalog.pg_auth_members m join reach on reach.oid = m.member
), roles as (
  select r.*, pg_catalog.quote_ident(r.rolname) as name
    from pg_catalog.pg_roles r join reach on reach.oid = r.oid
), login as (
  select r.name, pg_catalog.concat_ws(', ', 'public', 'kakunin_agent', r.name) as grantees
    from roles r where r.rolname = session_user
)
select pg_catalog.format('it acts as %I', current_user), pg_catalog.format('alter role %s reset role', l.name)
  from login l where current_user <> session_user
union all
select pg_catalog.format('%s is %s', r.name, a.attribute),
       pg_catalog.format('alter role %s no%s', r.name, a.attribute)
  from roles r, lateral (values
    ('superuser', r.rolsuper), ('bypassrls', r.rolbypassrls), ('createrole', r.rolcreaterole),
    ('createdb', r.rolcreatedb), ('replication', r.rolreplication)) a(attribute, has)
 where a.has
union all
select pg_catalog.format('%s is a member of %I', mine.name, r.rolname),
       pg_catalog.format('revoke %I from %s', r.rolname, mine.name)
  from pg_catalog.pg_auth_members m
  join roles mine on mine.oid = m.member
  join pg_catalog.pg_roles r on r.oid = m.roleid
 where r.rolname <> 'kakunin_agent'
union all
select pg_catalog.format('%s may grant kakunin_agent', mine.name),
       pg_catalog.format('revoke admin option for kakunin_agent from %s', mine.name)
  from pg_catalog.pg_auth_members m
  join roles mine on mine.oid = m.member
  join pg_catalog.pg_roles r on r.oid = m.roleid
 where r.rolname = 'kakunin_agent' and m.admin_option
union all
select 'it is no member of kakunin_agent', pg_catalog.format('grant kakunin_agent to %s', l.name)
  from login l where not exists (select from roles r where r.rolname = 'kakunin_agent')
union all
(select pg_catalog.format(
          '%s owns %s', r.name, pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)),
        pg_catalog.format('reassign owned by %s to another role', r.name)
   from pg_catalog.pg_shdepend d join roles r on r.oid = d.refobjid
  where d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass and d.deptype = 'o'
    and d.dbid in (
      0, (select b.oid from pg_catalog.pg_database b where b.datname = pg_catalog.current_database()))
  limit 5)
union all
select pg_catalog.format('it may create in schema %I', n.nspname),
       pg_catalog.format('revoke create on schema %I from %s', n.nspname, l.grantees)
  from pg_catalog.pg_namespace n, login l
 where n.nspname !~ '^pg_(toast_)?temp_' and pg_catalog.has_schema_privilege(n.oid, 'create')
union all
select 'it may create schemas in this database',
       pg_catalog.format('revoke create on database %I from %s', pg_catalog.current_database(), l.grantees)
  from login l where pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')
union all
select 'it may use schema kakunin_private',
       pg_catalog.format('revoke usage on schema kakunin_private from %s', l.grantees)
  from login l where pg_catalog.has_schema_privilege('kakunin_private', 'usage')
union all
select pg_catalog.format('it may call %s', p.oid::pg_catalog.regprocedure),
       pg_catalog.format('revoke execute on function %s from %s', p.oid::pg_catalog.regprocedure, l.grantees)
  from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace, login l
  -- CASE, so that privileges are not looked up for all functions there are.
 where case
   -- Whom a function is for, the end of its comment says: kakunin_agent itself may have been granted more.
   when n.nspname = 'kakunin' then pg_catalog.has_function_privilege(p.oid, 'execute')
     and pg_catalog.regexp_replace(coalesce(pg_catalog.obj_description(p.oid, 'pg_proc'), ''), '^.*For ', '')
       !~ 'kakunin_agent|all the kit''s roles'
   when p.proname in (
     'pg_read_file', 'pg_read_binary_file', 'pg_ls_dir', 'pg_stat_file', 'lo_import', 'lo_export',
     'pg_reload_conf', 'pg_file_write', 'dblink_connect_u')
     then pg_catalog.has_function_privilege(p.oid, 'execute')
   end
union all
select pg_catalog.format('it may set %s', p.parname),
       pg_catalog.format('revoke all on parameter %s from %s', p.parname, l.grantees)
  from pg_catalog.pg_parameter_acl p, login l
 where exists (select from pg_catalog.aclexplode(p.paracl) a
                where a.grantee = 0 or a.grantee in (select r.oid from roles r))
"""

# A gateway's login is believed whatever claims it sets: with this agent's own, nothing is lost by trying.
_BELIEVED = """
select kakunin.current_cert_serial() is not null from pg_catalog.set_config('request.jwt.claims',
  pg_catalog.json_build_object('kakunin_cert_serial', %s::pg_catalog.text)::pg_catalog.text, true)
"""

_READABLE = """
select pg_catalog.format('%I.%I', n.nspname, c.relname)
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p', 'f', 'm') and not c.relrowsecurity
   and n.nspname not in ('pg_catalog', 'information_schema') and n.nspname !~ '^pg_'
   and pg_catalog.has_schema_privilege(n.oid, 'usage')
   and pg_catalog.has_any_column_privilege(c.oid, 'select')
 order by 1 limit 20
"""


class LoginRefusedError(KakuninError):
    """The login is more than kakunin_agent, so no model's SQL runs as it. No SQLSTATE."""


def check_login(connection: psycopg.Connection[Any], serial: str) -> list[str]:
    """Raises LoginRefusedError unless the connection's login is nothing but a member of kakunin_agent.

    :returns: the tables without row-level security that it may read, 20 at most.
    """
    cursor = psycopg.Cursor(connection, row_factory=tuple_row)
    with connection.transaction(force_rollback=True):
        cursor.execute(
            "select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true)", prepare=False
        )
        excess = cursor.execute(_EXCESS, prepare=False).fetchall()
        if not excess and cursor.execute(_BELIEVED, [serial], prepare=False).fetchone() != (False,):
            excess = [("its claims are believed", "take it out of kakunin.set_gateway_logins()")]
        if excess:
            found, remedies = zip(*dict.fromkeys(excess), strict=True)
            raise LoginRefusedError(
                f"the login {connection.info.user} is more than kakunin_agent: {'; '.join(found)}",
                f"A model's SQL runs as a login that is nothing else. {'; '.join(dict.fromkeys(remedies))}.",
            )
        return [name for (name,) in cursor.execute(_READABLE, prepare=False).fetchall()]
