"""A model's SQL: any query it likes, which can do nothing but what the agent may.

What keeps it within that is the server, not a pattern over its text:

- the login is nothing but kakunin_agent (``login.py``), and the transaction is bound by proof;
- each call has a connection of its own, which is closed after it: no setting, temporary table, prepared
  statement, cursor, lock or role outlives the call. A new connection costs a few milliseconds;
- a statement is sent by the extended protocol, which takes exactly one, and before it is run the server has
  parsed it behind EXPLAIN: its grammar takes there what a query is (SELECT, VALUES, INSERT, UPDATE, DELETE,
  MERGE, ...) and neither COMMIT, SET, DO, COPY, LISTEN nor DDL;
- it runs in a READ ONLY transaction that is always rolled back. To write takes ``write`` and a certificate
  that permits WRITE_SCOPE;
- beside statement_timeout, which SQL can change, there is a deadline of the client's: it cancels, then
  terminates;
- no more than a number of rows and bytes is ever read (``wire.py``).

Before anything of a call runs, the call is in the ledger, with the SHA-256 of each statement, in a
transaction of its own; without that entry nothing runs. A statement that a policy, a privilege or a scope
refuses is an ``unauthorized_access_attempt`` as well, as in bind_agent_session().
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from ..binding.attempts import flush_attempts, recorder, statement_hash
from ..binding.core import Core
from ..binding.psycopg_ import PsycopgChannel, run
from ..deadline import wait_until
from ..errors import KakuninError
from ..logs import why
from .login import check_login
from .session import Session
from .wire import Answer, LimitError, Wire

WRITE_SCOPE: Final = "sql:write"
MOST_STATEMENTS: Final = 20
MOST_TEXT: Final = 100_000
# Seconds that the server has to cancel by itself before the client does.
_GRACE = 1.0
_CANCEL_WITHIN = 2.0

_APPEND = "select kakunin.audit_log_append(%s, %s::pg_catalog.jsonb)"
# client_connection_check_interval: what a client that is gone has begun is ended. Not every system has it.
_LIMITS = """
select pg_catalog.set_config('statement_timeout', %(timeout)s, true),
       pg_catalog.set_config('lock_timeout', %(timeout)s, true),
       pg_catalog.set_config('idle_in_transaction_session_timeout', %(timeout)s, true),
       case when pg_catalog.version() like '%%linux%%'
         then pg_catalog.set_config('client_connection_check_interval', '1000', true) end
"""
_BACKEND = """
select a.pid, a.backend_start::pg_catalog.text from pg_catalog.pg_stat_activity a
 where a.pid = pg_catalog.pg_backend_pid()
"""
_TERMINATE = """
select pg_catalog.count(pg_catalog.pg_terminate_backend(a.pid)) from pg_catalog.pg_stat_activity a
 where a.pid = %s and a.backend_start = %s::pg_catalog.timestamptz and a.usename = session_user
"""
_TABLES = """
select n.nspname as schema, c.relname as name,
       case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table'
         else 'table' end as kind,
       c.relrowsecurity as row_security,
       (select pg_catalog.json_agg(p.privilege)
          from (values ('select'), ('insert'), ('update'), ('delete')) p(privilege)
         where pg_catalog.has_table_privilege(c.oid, p.privilege) or p.privilege <> 'delete'
           and pg_catalog.has_any_column_privilege(c.oid, p.privilege)) as privileges,
       pg_catalog.obj_description(c.oid, 'pg_class') as comment,
       (select pg_catalog.json_agg(pg_catalog.json_strip_nulls(pg_catalog.json_build_object(
                 'name', a.attname, 'type', pg_catalog.format_type(a.atttypid, a.atttypmod),
                 'nullable', not a.attnotnull, 'comment', pg_catalog.col_description(c.oid, a.attnum)))
               order by a.attnum)
          from pg_catalog.pg_attribute a
         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped) as columns,
       (select pg_catalog.json_agg(pg_catalog.pg_get_constraintdef(k.oid) order by k.contype desc, k.conname)
          from pg_catalog.pg_constraint k
         where k.conrelid = c.oid and k.contype in ('p', 'u', 'f', 'c')) as constraints
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p', 'v', 'm', 'f') and not c.relispartition
   and n.nspname not in ('pg_catalog', 'information_schema') and n.nspname !~ '^pg_'
   and pg_catalog.has_schema_privilege(n.oid, 'usage')
   and (pg_catalog.has_table_privilege(c.oid, 'select, insert, update, delete')
        or pg_catalog.has_any_column_privilege(c.oid, 'select, insert, update'))
   and ($1 = '' or $1 in (c.relname, n.nspname || '.' || c.relname))
 order by n.nspname = 'kakunin', 1, 2
"""

_UNKNOWN = "Whether it was committed is not known: look before trying again."

_log = logging.getLogger("kakunin_db.mcp")


@dataclass(frozen=True)
class Limits:
    """Of one call: rows and bytes that are read, and seconds that it takes."""

    rows: int = 500
    bytes: int = 250_000
    seconds: float = 15.0


class CallError(Exception):
    """A call that failed: ``told`` is what the model is told."""

    def __init__(self, code: str, error: str, hint: str | None = None, **more: Any) -> None:
        super().__init__(error)
        self.told = {"code": code, "error": error, "hint": hint, **more}


class SQLTool:
    """``query``, ``explain`` and ``describe_schema`` of an agent. Each may be called from any thread."""

    def __init__(self, session: Session, limits: Limits) -> None:
        """Raises LoginRefusedError, and psycopg's errors."""
        self.session = session
        self.limits = limits
        if tables := self.check_login():
            _log.warning("readable without row-level security: %s", ", ".join(tables))

    def check_login(self) -> list[str]:
        """On the session's connection, whose caches are warm: a new one takes ten times as long."""
        return self.session.on_time(lambda c: check_login(c, self.session.credential.serial))

    def query(self, statements: Sequence[str], *, write: bool, stop: threading.Event) -> dict[str, Any]:
        """Runs the statements in one transaction.

        :param stop: when set, the call is given up.
        :raises CallError: with what went wrong; nothing was changed then.
        """
        call = _Call(self, "query", statements, write=write, stop=stop)
        answers = call.run([(statement.encode(), ()) for statement in statements])
        return {
            "results": [_result(answer, truncated) for answer, truncated in answers],
            "read_only": not write,
            "event_id": call.event_id,
        }

    def explain(self, statement: str, *, analyze: bool, stop: threading.Event) -> dict[str, Any]:
        """The plan of a statement; with ``analyze`` it is run, read-only. Raises as query()."""
        call = _Call(self, "explain", [statement], write=False, stop=stop)
        prefix = b"explain (analyze %s) " % (b"true" if analyze else b"false")
        ((answer, truncated),) = call.run([(prefix + statement.encode(), ())], gate=[statement.encode()])
        lines = [(row[0] or b"").decode("utf-8", "replace") for row in answer.rows]
        return {"plan": lines, "truncated": truncated, "event_id": call.event_id}

    def describe_schema(self, table: str, *, stop: threading.Event) -> dict[str, Any]:
        """The tables and views that the agent may use, or those of this name. Raises as query()."""
        call = _Call(self, "describe_schema", [_TABLES], write=False, stop=stop)
        ((answer, truncated),) = call.run([(_TABLES.encode(), (table.encode(),))])
        tables = [
            {
                name: _value(value, kind)
                for name, value, kind in zip(answer.columns, row, answer.types, strict=True)
            }
            for row in answer.rows
        ]
        return {"tables": tables, "truncated": truncated, "event_id": call.event_id}

    @contextlib.contextmanager
    def _connect(self) -> Iterator[psycopg.Connection[Any]]:
        connection = psycopg.connect(self.session.dsn, prepare_threshold=None, client_encoding="utf8")
        try:
            yield connection
        finally:
            connection.close()


class _Call:
    """One call of a tool."""

    def __init__(
        self, tool: SQLTool, name: str, statements: Sequence[str], *, write: bool, stop: threading.Event
    ) -> None:
        """Enters the call into the ledger. The login may have become more than it was at the start."""
        self.tool = tool
        self.session = tool.session
        self.statements = statements
        self.write = write
        self.stop = stop
        self.committing = False
        if any("\0" in statement for statement in statements):  # libpq would end it there, and its hash not
            raise CallError("KA010", "a statement has a NUL in it")
        hashes = [statement_hash(statement) for statement in statements]
        metadata: dict[str, Any] = {"tool": name, "read_only": not write}
        metadata |= {"statement": hashes[0]} if len(hashes) == 1 else {"statements": hashes}
        entry = self.session.call(_APPEND, ("data_mutation" if write else "data_access", Jsonb(metadata)))
        self.event_id: int = entry["event_id"]
        tool.check_login()

    def run(
        self, statements: Sequence[tuple[bytes, tuple[bytes, ...]]], gate: Sequence[bytes] | None = None
    ) -> list[tuple[Answer, str | None]]:
        """Each answer, and by which limit it was cut off, if it was.

        :param gate: what must be queries, in place of the statements.
        """
        limits = self.tool.limits
        done: list[tuple[Answer, str | None]] = []
        try:
            with self.tool._connect() as connection:
                until = time.monotonic() + limits.seconds + _GRACE
                wait_until(connection, until)
                backend = self._begin(connection)
                try:
                    with Wire(connection.pgconn, limits.bytes, until, self.stop) as wire:
                        for number, (statement, parameters) in enumerate(statements):
                            self._check(wire, gate[number] if gate else statement)
                            left = limits.rows - sum(len(answer.rows) for answer, _ in done)
                            done.append((wire.run(statement, parameters, left), None))
                        if self.write:
                            self._commit(wire)
                except LimitError as limit:
                    self._give_up(connection, backend)
                    done.append((self._cut(limit, len(done), len(statements)), limit.kind))
        except psycopg.Error as error:
            raise self._failed(error, len(done)) from error
        except CallError as error:
            error.told["event_id"] = self.event_id
            raise
        return done

    def _begin(self, connection: psycopg.Connection[Any]) -> tuple[Any, ...]:
        """Binds a transaction; returns which backend it is."""
        connection.read_only = not self.write
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        run(connection, Core(PsycopgChannel(connection), self.session.bearer).begin())
        timeout = str(math.ceil(self.tool.limits.seconds * 1000))
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        cursor.execute(_LIMITS, {"timeout": timeout}, prepare=False)
        if self.write:
            cursor.execute("select kakunin.require_scope(%s)", [WRITE_SCOPE], prepare=False)
        return cursor.execute(_BACKEND, prepare=False).fetchone() or ()

    def _commit(self, wire: Wire) -> None:
        wire.require_room()
        self.committing = True
        if wire.run(b"commit", (), 0).command != "COMMIT":
            raise CallError("internal", "the transaction was not committed")

    @staticmethod
    def _check(wire: Wire, statement: bytes) -> None:
        """Has the server's grammar say that a statement is one, and a query."""
        wire.parse(statement)
        try:
            wire.parse(b"explain (costs off) " + statement)
        except psycopg.errors.SyntaxError:
            raise CallError(
                "not_a_query",
                "this statement is not a query",
                "Only SELECT, VALUES, INSERT, UPDATE, DELETE and MERGE run here, one to a text: no COMMIT,"
                " SET, COPY or DDL. A setting is current_setting('name'); a plan is explain's.",
            ) from None

    def _cut(self, limit: LimitError, number: int, of: int) -> Answer:
        """What there is of an answer that is too large. Raises CallError where that cannot be given."""
        limits = self.tool.limits
        if self.committing:
            raise CallError("unavailable", "the call was ended as it committed", _UNKNOWN)
        if limit.kind == "time":
            raise CallError("57014", f"the call took more than {limits.seconds:g} seconds and was ended")
        if limit.kind == "stopped":
            raise CallError("57014", "the call was given up")
        alone = of == 1 and not self.write
        if not alone or (limit.kind == "bytes" and not limit.answer.rows):
            most = f"{limits.rows} rows" if limit.kind == "rows" else f"{limits.bytes} bytes"
            where = "" if of == 1 else f" at statement {min(number + 1, of)}"
            raise CallError(
                "result_too_large",
                f"the answer has more than {most}{where}" + ("; nothing was changed" if self.write else ""),
                "Ask for fewer rows or columns, with LIMIT, aggregates or left(column, 1000).",
            )
        return limit.answer

    def _give_up(self, connection: psycopg.Connection[Any], backend: tuple[Any, ...]) -> None:
        """Ends what the server still does: first by asking, then, where SQL would not be asked, for good."""
        with contextlib.suppress(psycopg.Error):
            connection.cancel_safe(timeout=_CANCEL_WITHIN)
        connection.close()
        if backend:
            threading.Thread(target=self._terminate, args=(backend,), daemon=True).start()

    def _terminate(self, backend: tuple[Any, ...]) -> None:
        time.sleep(_CANCEL_WITHIN)
        try:
            self.session.call(_TERMINATE, backend)
        except (psycopg.Error, KakuninError) as error:
            _log.warning("a backend may still be busy with a call that was given up: %s", why(error))

    def _failed(self, error: psycopg.Error, number: int) -> CallError:
        """What the model is told; where it was refused, that is recorded first."""
        statement = self.statements[min(number, len(self.statements) - 1)]
        session = self.session
        more: dict[str, Any] = {"event_id": self.event_id}
        lost = recorder.counters["lost"]
        if session.bearer.refused(error, statement, session.address, lambda: session.dsn) is not None:
            more["recorded"] = flush_attempts() and recorder.counters["lost"] == lost
        if error.sqlstate is None:
            hint = _UNKNOWN if self.committing else "Nothing was changed. Try again later."
            said = "the database cannot be reached, or did not answer in time"
            return CallError("unavailable", said, hint, **more)
        diag = error.diag
        if 1 < len(self.statements) > number:
            more["statement"] = number + 1
        if diag.message_detail:
            more["detail"] = diag.message_detail
        told = diag.message_hint
        if error.sqlstate == "25006":
            told = f'To write, call query with "write": true; the certificate must permit {WRITE_SCOPE}.'
        return CallError(error.sqlstate, diag.message_primary or type(error).__name__, told, **more)


# Values ---------------------------------------------------------------------------------------------

_INTEGERS = {20, 21, 23, 26}
_FLOATS = {700, 701}
_JSON = {114, 3802}
_MOST_EXACT = 2**53 - 1
# What writes the answer gives up at 255, the answer's own levels among them.
_DEEPEST = 64


def _result(answer: Answer, truncated: str | None) -> dict[str, Any]:
    types = psycopg.adapters.types
    infos = [types.get(oid) for oid in answer.types]
    return {
        "columns": [
            {"name": name, "type": info.name if info else str(oid)}
            for name, info, oid in zip(answer.columns, infos, answer.types, strict=True)
        ],
        "rows": [[_value(v, t) for v, t in zip(row, answer.types, strict=True)] for row in answer.rows],
        "row_count": len(answer.rows),
        "truncated": truncated,
        "command": answer.command,
    }


def _value(value: bytes | None, oid: int) -> Any:
    """As JSON has it where that loses nothing; otherwise as the server wrote it."""
    if value is None:
        return None
    text = value.decode("utf-8", "replace")
    if oid == 16:
        return text == "t"
    with contextlib.suppress(ValueError, RecursionError):
        if oid in _INTEGERS and abs(int(text)) <= _MOST_EXACT:
            return int(text)
        if oid in _FLOATS and math.isfinite(float(text)):
            return float(text)
        if oid in _JSON:
            found = json.loads(text, parse_int=_exact, parse_float=_exact, object_pairs_hook=_unambiguous)
            # Of the type json half of a surrogate pair may be a text, which has no UTF-8: ValueError.
            json.dumps(_shallow(found), ensure_ascii=False).encode()
            return found
    return text


def _shallow(value: Any) -> Any:
    """Raises ValueError for what is nested too deep to be written."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            v for each in level if isinstance(each, (dict, list))
            for v in (each.values() if isinstance(each, dict) else each)
        ]  # fmt: skip
        if not level:
            return value
    raise ValueError("nested too deep")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for an object with one name twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _exact(text: str) -> int | float:
    """Raises ValueError for a number that JSON's readers would not all read as it is."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    if text.lstrip("-").isdigit():
        if abs(int(text)) > _MOST_EXACT:
            raise ValueError(text)
        return int(text)
    if len(text) > 17:
        raise ValueError(text)
    return number
