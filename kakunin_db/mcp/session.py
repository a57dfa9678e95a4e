"""The agent's session: transactions of the kit's own statements, bound by proof, one after the other."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, TypeVar

import psycopg
from psycopg.rows import tuple_row

from ..binding.attempts import LIMITS, recorder
from ..binding.bearer import Bearer
from ..binding.core import Core
from ..binding.psycopg_ import PsycopgChannel, run
from ..conninfo import is_gone, lasting
from ..credential import AgentCredential
from ..deadline import wait_until
from ..errors import BadInputError, UnknownCertificateError, named
from ..signers import Signer

T = TypeVar("T")

# Seconds.
CALL_WITHIN: Final = 10.0
_AT_ONCE: Final = 1.0


class Session:
    """An agent on a database.

    ``bearer`` is what other connections of the same login are bound with: they share its tickets.
    ``address`` is the login and the database.
    """

    def __init__(self, dsn: str, serial: str, signer: Signer, installation_id: str | None = None) -> None:
        """Connects and binds once, so that what is wrong with the configuration is told as the server starts.

        Raises the errors of :mod:`kakunin_db.errors` and psycopg's.
        """
        self.dsn = lasting(dsn, application_name="kakunin-db mcp")
        self._lock = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._committing = False
        self.address = ""
        found = self.on_time(lambda c: self._value(c, "select kakunin.verify_certificate(%s)", [serial]))
        agent_id = found.get("agent_id")
        if agent_id is None:
            raise UnknownCertificateError(
                f"certificate {found['serial_number']} is not registered in this database",
                "Check KAKUNIN_CERT_SERIAL and KAKUNIN_DSN.",
            )
        self.credential = AgentCredential(uuid.UUID(agent_id), serial, signer, installation_id)
        self.bearer = Bearer(self.credential, recorder=recorder)
        self.call("select kakunin.require_session()")

    def call(self, query: str, parameters: tuple[Any, ...] = ()) -> Any:
        """The value of one of the kit's statements, in a bound transaction of its own that is committed.

        Raises the kit's errors or psycopg's; psycopg.OperationalError also where the database does not answer
        in CALL_WITHIN seconds. What was to be recorded may have been, then.
        """

        def bound(connection: psycopg.Connection[Any]) -> Any:
            run(connection, Core(PsycopgChannel(connection), self.bearer).begin())
            self._value(connection, LIMITS)
            value = self._value(connection, query, parameters)
            self._committing = True
            connection.commit()
            return value

        return self.on_time(bound)

    def close(self) -> None:
        with self._lock:
            self._disconnect()

    @staticmethod
    def _value(connection: psycopg.Connection[Any], query: str, parameters: Any = ()) -> Any:
        cursor = psycopg.Cursor(connection, row_factory=tuple_row)
        row = cursor.execute(query.encode(), parameters, prepare=False).fetchone()
        return None if row is None else row[0]

    def on_time(self, do: Callable[[psycopg.Connection[Any]], T]) -> T:
        """What ``do`` makes of the connection, outside a transaction and unbound. Raises as call().

        A connection that was lost without our noticing is replaced, and ``do`` done again: until it says
        COMMIT, nothing has happened.
        """
        began = time.monotonic()
        if not self._lock.acquire(timeout=CALL_WITHIN):
            raise psycopg.OperationalError("the database did not answer in time")
        try:
            try:
                return self._do(do, began + CALL_WITHIN)
            except psycopg.OperationalError as error:
                lost = error.sqlstate is None or error.sqlstate.startswith("57P")
                if self._committing or not lost or time.monotonic() - began > _AT_ONCE:
                    raise
                return self._do(do, began + CALL_WITHIN)
        except psycopg.Error as error:
            if (ours := named(error)) is not None:
                raise ours from error
            if isinstance(error, psycopg.DataError) and error.sqlstate is None:
                raise BadInputError("a text has a character that Postgres does not store, a NUL") from error
            raise
        finally:
            self._lock.release()

    def _do(self, do: Callable[[psycopg.Connection[Any]], T], until: float) -> T:
        self._committing = False
        try:
            connection = self._connected()
            wait_until(connection, until)
            value = do(connection)
            connection.rollback()
        except BaseException:
            self._disconnect()
            raise
        return value

    def _connected(self) -> psycopg.Connection[Any]:
        connection = self._connection
        if connection is None or is_gone(connection):
            self._disconnect()
            connection = self._connection = psycopg.connect(self.dsn, prepare_threshold=None)
            connection.read_only = False
            connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            channel = PsycopgChannel(connection)
            self.address = f"{channel.login}@{channel.address}"
        return connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
