"""Taking the kit away without opening a table.

Row security stays on wherever the kit's policies were: without a policy nobody reads a row of a table but its
owner and whom row security does not bind. Policies, triggers and the kit itself go in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import psycopg

from . import migrate
from .errors import BadInputError

# Policies that ask the kit, with what the table would have without them; a trigger for each other row.
_OUTSIDE = r"""
with kit as (
  select 'pg_proc'::regclass as classid, p.oid from pg_proc p join pg_namespace n on n.oid = p.pronamespace
   where n.nspname in ('kakunin', 'kakunin_private')
  union all
  select 'pg_class'::regclass, c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
   where n.nspname in ('kakunin', 'kakunin_private')
  union all
  select 'pg_type'::regclass, t.oid from pg_type t join pg_namespace n on n.oid = t.typnamespace
   where n.nspname in ('kakunin', 'kakunin_private')
), leaving as (
  select y.oid, y.polrelid, y.polname, y.polpermissive, y.polcmd
    from pg_policy y
   where exists (select from pg_depend d join kit k on k.classid = d.refclassid and k.oid = d.refobjid
                  where d.classid = 'pg_policy'::regclass and d.objid = y.oid)
), audited as (
  select t.tgrelid, t.tgname
    from pg_trigger t join kit k on k.classid = 'pg_proc'::regclass and k.oid = t.tgfoid
    join pg_class c on c.oid = t.tgrelid join pg_namespace n on n.oid = c.relnamespace
   where not t.tgisinternal and t.tgparentid = 0 and n.nspname not in ('kakunin', 'kakunin_private')
)
select format('%I.%I', n.nspname, c.relname) as name, c.relrowsecurity as enabled,
       case when not pg_has_role(c.relowner, 'USAGE') then pg_get_userbyid(c.relowner) end as owner,
       (select format('the restrictive policy %I goes and the permissive policy %I stays',
                      l.polname, q.polname)
          from leaving l join pg_policy q on q.polrelid = c.oid and q.polpermissive
         where c.relrowsecurity and l.polrelid = c.oid and not l.polpermissive
           and (l.polcmd = '*' or q.polcmd = '*' or l.polcmd = q.polcmd)
           and not exists (select from leaving o where o.oid = q.oid)
         order by l.polname, q.polname limit 1) as opened,
       array(select format('drop policy %I on %I.%I', l.polname, n.nspname, c.relname)
               from leaving l where l.polrelid = c.oid order by l.polpermissive desc, l.polname)
       || array(select format('drop trigger %I on %I.%I', a.tgname, n.nspname, c.relname)
                  from audited a where a.tgrelid = c.oid order by a.tgname)
       || array(select format('revoke all on %I.%I from %I', n.nspname, c.relname, r.rolname)
                  from pg_roles r
                 where r.rolname in ('kakunin_agent', 'kakunin_gateway', 'kakunin_registrar',
                                     'kakunin_operator', 'kakunin_worker', 'kakunin_auditor')
                   and exists (select from pg_shdepend s
                                where s.refclassid = 'pg_authid'::regclass and s.refobjid = r.oid
                                  and s.deptype = 'a' and s.classid = 'pg_class'::regclass and s.objid = c.oid
                                  and s.dbid = (select d.oid from pg_database d
                                                 where d.datname = current_database()))
                 order by r.rolname) as statements,
       array(select format('(%s::oid, %L)', c.oid, l.polcmd) from leaving l
              where l.polrelid = c.oid and not l.polpermissive order by l.polcmd) as restricted
  from pg_class c join pg_namespace n on n.oid = c.relnamespace
 where c.oid in (select polrelid from leaving union all select tgrelid from audited)
 order by 1"""

# What an export itself puts on record comes after it.
_NOT_EXPORTED = """
select count(*)
  from kakunin_private.ledger l
 where l.event_id not in (
         select unnest(b.event_ids) from kakunin_private.batches b
          where b.tree_size <= (select max(e.tree_size) from kakunin_private.exports e))
   and l.entry::jsonb ->> 'event_type' not in ('ledger.exported', 'ledger.read')"""


# Both were looked at when the plan was made, which may be long ago: again where nobody can add to them any
# more. Names may have any characters, so there are none in here.
_STILL_EXPORTED = f"""\
do $still_exported$
begin
  lock table kakunin_private.ledger in access exclusive mode;
  if ({_NOT_EXPORTED}) > 0 then
    raise exception using errcode = 'KA010',
      message = 'entries of the ledger are in no export, and would be lost',
      hint = 'kakunin-db audit export, and print the script again; or say --without-export.';
  end if;
end
$still_exported$"""

_STILL_CLOSED = """\
do $still_closed$
declare
  v_open text;
begin
  select string_agg(distinct format('%s (%I)', y.polrelid::regclass, y.polname), ', ') into v_open
    from (values {}) r(polrelid, polcmd)
    join pg_class c on c.oid = r.polrelid and c.relrowsecurity
    join pg_policy y on y.polrelid = r.polrelid and y.polpermissive
     and (r.polcmd = '*' or y.polcmd = '*' or r.polcmd::"char" = y.polcmd);
  if v_open is not null then
    raise exception using errcode = 'KA010',
      message = format('rows would become readable or could be changed, by policies made since: %s',
                       v_open),
      hint = 'Drop the permissive policy, or put a restrictive one of your own beside it.';
  end if;
end
$still_closed$"""


class Plan(NamedTuple):
    """``closed`` are the tables that keep row security, ``unprotected`` those that had none; ``statements``
    come before the downgrade, in its transaction."""

    closed: list[str]
    unprotected: list[str]
    statements: list[str]


def plan(dsn: str, *, without_export: bool = False) -> Plan:
    """What :func:`uninstall` does outside the kit's schemas. Reads only.

    :raises BadInputError: a table would be opened, or is somebody else's; or entries of the ledger, which
        goes, are in no export.
    :raises psycopg.Error: what the server refuses, or no connection.
    """
    with migrate.connect(dsn) as connection:
        connection.execute("set search_path = pg_catalog, pg_temp")
        connection.execute("set transaction isolation level repeatable read, read only")
        rows = connection.execute(_OUTSIDE).fetchall()
        if not without_export:
            _check_exported(connection)
    opened = [f"{name} ({opened})" for name, _, _, opened, *_ in rows if opened]
    if opened:
        raise BadInputError(
            f"rows would become readable or could be changed that are not now: {'; '.join(opened)}",
            "Drop the permissive policy, or put a restrictive one of your own beside it, such as: create"
            " policy closed on <table> as restrictive using (false).",
        )
    others = [f"{name} ({owner})" for name, _, owner, *_ in rows if owner]
    if others:
        raise BadInputError(
            f"only their owners can take policies and triggers off these tables: {', '.join(others)}",
            "Run it as a superuser, or as a member of these roles and of the kit's owner.",
        )
    restricted = [each for *_, restricted in rows for each in restricted]
    return Plan(
        [name for name, enabled, *_ in rows if enabled],
        [name for name, enabled, *_ in rows if not enabled],
        [
            "set local search_path = pg_catalog, pg_temp",
            *(statement for *_, statements, _ in rows for statement in statements),
            *([_STILL_CLOSED.format(", ".join(restricted))] if restricted else []),
            *([] if without_export else [_STILL_EXPORTED]),
        ],
    )


def _check_exported(connection: psycopg.Connection[Any]) -> None:
    row = connection.execute(_NOT_EXPORTED).fetchone()
    if row and row[0]:
        raise BadInputError(
            f"{row[0]} entries of the ledger are in no export, and would be lost",
            "kakunin-db audit export first, once the worker has signed all of them; or say --without-export.",
        )


def script(steps: Plan) -> str:
    """The same for ``psql``, the downgrade included."""
    return migrate.downgrade_sql(before=steps.statements)


def uninstall(dsn: str, steps: Plan, *, on_notice: Callable[[str], None] | None = None) -> migrate.Change:
    """Takes away what :func:`plan` found and then the kit **with all its data**, in one transaction.

    :raises BadInputError: something else outside the kit's schemas uses it. Nothing was changed.
    """
    return migrate.downgrade(dsn, on_notice=on_notice, before=steps.statements)
