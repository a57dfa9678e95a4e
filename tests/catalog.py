"""What the catalog says about some schemas, in a form that two databases can be compared by."""

from __future__ import annotations

from typing import Any

import psycopg

# Alembic's table is there after a migration and not after applying sql/ by hand.
_NOT_ALEMBIC = "not (n.nspname = 'kakunin_private' and c.relname like 'alembic_version%%')"
_OURS = f"n.nspname = any (%(schemas)s) and {_NOT_ALEMBIC}"
_IN = "join pg_namespace n on n.oid = c.relnamespace"

# Every query gives a text that identifies the object, then what is to be equal.
_QUERIES = {
    "schemas": """
        select n.nspname, pg_get_userbyid(n.nspowner), n.nspacl::text, obj_description(n.oid, 'pg_namespace')
          from pg_namespace n where n.nspname = any (%(schemas)s)""",
    "functions": """
        select p.oid::regprocedure::text, p.prosrc, p.provolatile, p.proparallel, p.prosecdef, p.proisstrict,
               p.proleakproof, p.proretset, p.prokind, p.procost, p.prorows, p.proconfig, l.lanname,
               pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
               case when p.prokind <> 'a' then pg_get_functiondef(p.oid) end,
               pg_get_userbyid(p.proowner), p.proacl::text, obj_description(p.oid, 'pg_proc')
          from pg_proc p join pg_namespace n on n.oid = p.pronamespace join pg_language l on l.oid = p.prolang
         where n.nspname = any (%(schemas)s)""",
    "relations": f"""
        select c.oid::regclass::text, c.relkind, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity,
               c.reloptions, c.relreplident, pg_get_userbyid(c.relowner), c.relacl::text,
               obj_description(c.oid, 'pg_class'),
               case when c.relkind in ('v', 'm') then pg_get_viewdef(c.oid) end
          from pg_class c {_IN} where {_OURS}""",
    "columns": f"""
        select c.oid::regclass::text || '.' || a.attname, a.attnum, format_type(a.atttypid, a.atttypmod),
               a.attnotnull, a.attidentity, a.attgenerated, a.attcollation::regcollation::text, a.attstorage,
               pg_get_expr(d.adbin, d.adrelid), a.attacl::text, col_description(c.oid, a.attnum)
          from pg_class c {_IN}
          join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
          left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
         where c.relkind <> 'i' and {_OURS}""",
    "constraints": f"""
        select c.oid::regclass::text || ' ' || k.conname, k.contype, k.convalidated, k.condeferrable,
               pg_get_constraintdef(k.oid), obj_description(k.oid, 'pg_constraint')
          from pg_constraint k join pg_class c on c.oid = k.conrelid {_IN}
         where {_OURS}""",
    "indexes": f"""
        select c.oid::regclass::text, pg_get_indexdef(c.oid), i.indisunique, i.indisprimary, i.indisvalid
          from pg_index i join pg_class c on c.oid = i.indexrelid {_IN}
         where {_OURS}""",
    "sequences": f"""
        select c.oid::regclass::text, s.seqtypid::regtype::text, s.seqstart, s.seqincrement, s.seqmin,
               s.seqmax, s.seqcache, s.seqcycle
          from pg_sequence s join pg_class c on c.oid = s.seqrelid {_IN}
         where {_OURS}""",
    "triggers": f"""
        select c.oid::regclass::text || ' ' || t.tgname, pg_get_triggerdef(t.oid), t.tgenabled,
               obj_description(t.oid, 'pg_trigger')
          from pg_trigger t join pg_class c on c.oid = t.tgrelid {_IN}
         where not t.tgisinternal and {_OURS}""",
    "rules": f"""
        select c.oid::regclass::text || ' ' || r.rulename, pg_get_ruledef(r.oid)
          from pg_rewrite r join pg_class c on c.oid = r.ev_class {_IN}
         where {_OURS}""",
    "policies": f"""
        select c.oid::regclass::text || ' ' || p.polname, p.polpermissive, p.polcmd,
               p.polroles::regrole[]::text[], pg_get_expr(p.polqual, p.polrelid),
               pg_get_expr(p.polwithcheck, p.polrelid), obj_description(p.oid, 'pg_policy')
          from pg_policy p join pg_class c on c.oid = p.polrelid {_IN}
         where {_OURS}""",
    "types": """
        select t.oid::regtype::text, t.typtype, pg_get_userbyid(t.typowner), t.typacl::text,
               array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid order by e.oid),
               obj_description(t.oid, 'pg_type')
          from pg_type t join pg_namespace n on n.oid = t.typnamespace
         where n.nspname = any (%(schemas)s) and t.typname not in ('alembic_version', '_alembic_version')""",
    "defaults": """
        select coalesce(n.nspname, 'everywhere') || ' ' || a.defaclobjtype::text, a.defaclacl::text
          from pg_default_acl a left join pg_namespace n on n.oid = a.defaclnamespace""",
    "event triggers": "select evtname, evtevent, evtenabled from pg_event_trigger",
    "roles": """
        select r.rolname, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcreatedb, r.rolcanlogin,
               r.rolreplication, r.rolbypassrls, r.rolconnlimit, r.rolconfig,
               shobj_description(r.oid, 'pg_authid')
          from pg_roles r where starts_with(r.rolname, 'kakunin_')""",
}

KIT = ("kakunin", "kakunin_private")
ROLES = {f"kakunin_{name}" for name in ("agent", "gateway", "registrar", "operator", "worker", "auditor")}


def snapshot(dsn: str, *schemas: str) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Everything about these schemas, by kind and by the object's name; by default about the kit's."""
    with psycopg.connect(dsn) as connection:
        # Names are written with their schema, whoever asks.
        connection.execute("set search_path = pg_catalog")
        return {
            kind: {
                row[0]: row[1:]
                for row in connection.execute(query.encode(), {"schemas": list(schemas or KIT)})
            }
            for kind, query in _QUERIES.items()
        }


def everything(dsn: str) -> set[str]:
    """The name of every object and of every role that did not come with the server."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("""
            select 'function ' || oid::regprocedure from pg_proc where oid >= 16384
            union select 'relation ' || oid::regclass from pg_class where oid >= 16384
            union select 'type ' || oid::regtype from pg_type where oid >= 16384
            union select 'schema ' || nspname from pg_namespace where oid >= 16384
            union select 'policy ' || polname from pg_policy
            union select 'role ' || rolname from pg_roles where oid >= 16384
            union select 'setting ' || array_to_string(setconfig, ' ') from pg_db_role_setting
            union select 'default privileges ' || defaclacl::text from pg_default_acl""")
        return {row[0] for row in rows}
