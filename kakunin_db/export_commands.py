"""The kit as files that others apply: ``export supabase``, ``export sql`` and ``export extension``.

All three are made of the same ``sql/``. What differs is who applies it and how.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import re
from pathlib import Path

from .commands import Refused, _answer, _new_file
from .errors import BadInputError
from .resources import install_sql, sql_dir

_COMMIT = "COMMIT;"
# A statement that makes rows or partitions, which a dump brings along for an extension restored from one.
_FIRST_ROWS = re.compile(
    r"^insert into kakunin_private\.\w+ default values;\n"
    r"|^do \$\$ begin (perform kakunin(?:_private)?\.(?:new_session_key|make_partitions)\(\);) end \$\$;\n",
    re.MULTILINE,
)


def plain_sql() -> str:
    """One file for psql: the newest revision, whole or not at all, on a database without the kit.

    The same as ``kakunin-db migrate --sql``, so ``kakunin-db migrate`` takes it on from there.
    """
    from .migrate import migrate_sql  # noqa: PLC0415  (Alembic takes a moment to import)

    return migrate_sql()


def supabase_sql() -> str:
    """A migration of a Supabase project: the kit, what the API's roles may call, and PostgREST's hook.

    For the role ``postgres`` of a project, by ``supabase db push`` or psql. One transaction.
    """
    kit = plain_sql()
    head, commit, tail = kit.rpartition(_COMMIT)
    if not commit or tail.strip() or "\n" + _COMMIT in head:
        raise AssertionError("the migration's script is not one transaction")
    parts = [(sql_dir() / "supabase" / name).read_text(encoding="utf-8") for name in ("api.sql", "hook.sql")]
    return _splittable("\n".join([head.rstrip() + "\n", *parts, _COMMIT + "\n"]))


def _splittable(sql: str) -> str:
    """The same with the bodies of BEGIN ATOMIC in dollar quotes.

    ``supabase db push`` sends a file's statements one by one, and where it looks for their ends it takes the
    first ``end`` after BEGIN ATOMIC for that of the body, be it in ``suspended_at`` or in CASE.
    """
    lines = sql.split("\n")
    while "begin atomic" in lines:
        begin = lines.index("begin atomic")
        first = next(n for n in range(begin, -1, -1) if lines[n].startswith("create function "))
        last = lines.index("end;", begin)
        lines[begin] = "begin  atomic"
        lines[first:last] = ["do $atomic$ begin execute $function$", *lines[first:last]]
        lines[last + 1] = "end; $function$; end $atomic$;"
    return "\n".join(lines).replace("begin  atomic", "begin atomic")


def extension_files() -> dict[str, str]:
    """``kakunin.control`` and the script it names, by file name.

    What pg_dump keeps of an extension is its name, the rows of tables that are said to be configuration, and
    what was made later. So every table is said to be, and the first rows and partitions come from
    ``kakunin.initialize()``: CREATE EXTENSION, which a restore runs as well, would make a second set of them.
    """
    version = importlib.metadata.version("kakunin-db")
    if not re.fullmatch(r"[0-9A-Za-z.+]+", version):
        raise AssertionError(f"{version} is no version of an extension")
    first: list[str] = []

    def take(match: re.Match[str]) -> str:
        first.append(match[1] or match[0].strip())
        return ""

    script = _FIRST_ROWS.sub(take, install_sql())
    statements = "\n".join(f"  {statement}" for statement in first)
    return {
        "kakunin.control": (
            "# Needs no superuser: CREATEROLE, and CREATE on the database.\n"
            "comment = 'Identity, row-level isolation and a signed ledger for AI agents'\n"
            f"default_version = '{version}'\n"
            "relocatable = false\n"
            "superuser = false\n"
        ),
        f"kakunin--{version}.sql": (
            '\\echo Use "create extension kakunin" to load this file. \\quit\n\n'
            f"{script}{_INITIALIZE.replace('FIRST_ROWS', statements)}"
        ),
    }


_INITIALIZE = """
-- The extension ---------------------------------------------------------------------------------------

create function kakunin.initialize() returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if exists (select from kakunin_private.installation) then
    raise exception using errcode = 'KA010',
      message = 'the kit has been initialized in this database',
      hint = 'It is done once, after CREATE EXTENSION, and not after a restore.';
  end if;
FIRST_ROWS
  return kakunin.installation_id();
end
$$;
comment on function kakunin.initialize() is
  'Once, after CREATE EXTENSION: the first rows and partitions. Returns the installation id. For the owner';
revoke all on function kakunin.initialize() from public;

do $dump$
declare
  v_name text;
begin
  for v_name in
    select c.oid::regclass::text from pg_class c
     where c.relnamespace = 'kakunin_private'::regnamespace and c.relkind in ('r', 'p', 'S')
  loop
    perform pg_extension_config_dump(v_name::regclass, '');
  end loop;
end
$dump$;
"""


# The commands -----------------------------------------------------------------------------------------


def export_supabase(options: argparse.Namespace) -> int:
    folder, sql = Path(options.out or "supabase/migrations"), supabase_sql()
    there = sorted(folder.glob("*_kakunin.sql"))
    same = [str(path) for path in there if path.read_bytes() == sql.encode()]
    if there and not same:  # which a second migration would collide with, in the middle of a push
        raise BadInputError(
            f"{there[-1]} is there already, and is of another version of the kit or was changed",
            "Where it was never applied, delete it and export again. Where it was, it stays:"
            " kakunin-db migrate --dsn ... takes the project's database to this version.",
        )
    if same:
        _answer(options, {"written": [], "unchanged": same}, [("unchanged", same)])
        return 0
    return _write(options, folder, {f"{_timestamp()}_kakunin.sql": sql})


def export_sql(options: argparse.Namespace) -> int:
    if options.out is None:
        print(plain_sql(), end="")
        return 0
    path = Path(options.out)
    return _write(options, path.parent, {path.name: plain_sql()})


def export_extension(options: argparse.Namespace) -> int:
    return _write(options, Path(options.out or "."), extension_files())


def _timestamp() -> str:
    """As `supabase migration new` names files."""
    return dt.datetime.now(dt.timezone.utc).strftime("%Y%m%d%H%M%S")


def _write(options: argparse.Namespace, folder: Path, files: dict[str, str]) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made: {error.strerror or error}", "Nothing was done.") from error
    written = []
    for name, text in files.items():
        with _new_file(str(folder / name), "Nothing else was done.") as write:
            written.append(write(text))
    _answer(options, {"written": written}, [("written", written)])
    return 0
