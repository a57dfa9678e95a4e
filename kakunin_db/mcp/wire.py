"""How much of the server's answer is read: rows, bytes and seconds, whatever the statement is.

libpq reads a message whole before it gives anything of it away, and one value, or one error message, may have
a gigabyte. So for the time of a model's statements libpq's socket is one end of a pair, and what the server
sends is passed on through the other, up to a number of bytes. That holds below every kind of statement, with
TLS as well, and asks nothing of the SQL. What is not read is never fetched: the connection is closed.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.errors import error_from_result

_CHUNK: Final = 65536
# Seconds between two looks at whether the call was given up.
_LOOK: Final = 0.1
# Bytes that any refusal fits into. Nothing is sent without them: what was used up before would hide it.
ROOM: Final = 4096


@dataclass
class Answer:
    """A statement's. Values are as the server wrote them; ``types`` are the oids of the columns' types."""

    columns: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    rows: list[list[bytes | None]] = field(default_factory=list)
    command: str = ""


class LimitError(Exception):
    """What ended a call: ``kind`` is rows, bytes, time or stopped, and ``answer`` what had been read."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind
        self.answer = Answer()


class Wire:
    """libpq's connection, metered for the block.

    :param most_bytes: of all answers together; above ROOM.
    :param until: ``time.monotonic()`` after which nothing is waited for.
    :param stop: set by whoever gives the call up.
    """

    def __init__(self, pgconn: Any, most_bytes: int, until: float, stop: threading.Event) -> None:
        self._pgconn = pgconn
        self._left = most_bytes
        self._until = until
        self._stop = stop
        self._to_server = b""
        self._to_client = b""

    def __enter__(self) -> Wire:
        self._fd = self._pgconn.socket
        self._server = os.dup(self._fd)
        near, far = socket.socketpair()
        for end in (near, far):
            end.setblocking(False)
        self._near = near
        os.dup2(far.fileno(), self._fd, inheritable=False)
        far.close()
        return self

    def __exit__(self, *_: object) -> None:
        os.dup2(self._server, self._fd, inheritable=False)
        os.close(self._server)
        self._near.close()

    def require_room(self) -> None:
        """Raises LimitError where the server's refusal of what is sent next might not be read."""
        if self._left < ROOM:
            raise LimitError("bytes")

    def parse(self, statement: bytes) -> None:
        """Has the server read a statement, which must be one, and not run it. Raises psycopg.Error, and
        LimitError."""
        self.require_room()
        self._pgconn.send_prepare(b"", statement)
        self._results(0)

    def run(self, statement: bytes, parameters: tuple[bytes, ...], most_rows: int) -> Answer:
        """Runs one statement; the protocol, not its text, sees to it that it is one.

        Raises psycopg.Error, and LimitError with the rows read so far as its ``answer``.
        """
        self.require_room()
        self._pgconn.send_query_params(statement, list(parameters) or None)
        self._pgconn.set_single_row_mode()
        return self._results(most_rows)

    def _results(self, most_rows: int) -> Answer:
        answer = Answer()
        failure: psycopg.Error | None = None
        try:
            while (result := self._next()) is not None:
                if result.status == pq.ExecStatus.FATAL_ERROR:
                    failure = error_from_result(result)
                if result.nfields and not answer.columns:
                    answer.columns = [
                        (result.fname(n) or b"").decode("utf-8", "replace") for n in range(result.nfields)
                    ]
                    answer.types = [result.ftype(n) for n in range(result.nfields)]
                for row in range(result.ntuples):
                    answer.rows.append([result.get_value(row, n) for n in range(result.nfields)])
                if len(answer.rows) > most_rows:
                    del answer.rows[most_rows:]
                    raise LimitError("rows")  # noqa: TRY301
                answer.command = (result.command_status or b"").decode("ascii", "replace")
        except LimitError as limit:
            limit.answer = answer
            raise
        except psycopg.OperationalError:
            if failure is None:  # which says why the server has closed the connection
                raise
        if failure is not None:
            raise failure
        return answer

    def _next(self) -> Any:
        while self._pgconn.flush():
            self._pass_on()
        while self._pgconn.is_busy():
            if select.select([self._fd], [], [], 0)[0]:  # libpq takes no more than it has room for
                self._pgconn.consume_input()
            else:
                self._pass_on()
        return self._pgconn.get_result()

    def _pass_on(self) -> None:
        """Waits for something to pass on in either direction, and passes it on."""
        if self._stop.is_set():
            raise LimitError("stopped")
        left = self._until - time.monotonic()
        if left <= 0:
            raise LimitError("time")
        near, server = self._near.fileno(), self._server
        readable, _, _ = select.select(
            ([] if self._to_server else [near]) + ([] if self._to_client else [server]),
            ([server] if self._to_server else []) + ([near] if self._to_client else []),
            [],
            min(left, _LOOK),
        )
        try:
            if near in readable:
                self._to_server = os.read(near, _CHUNK)
            if server in readable:
                # Only when libpq wants more: what it has may be all that it needs.
                if not self._left:
                    raise LimitError("bytes")
                self._to_client = os.read(server, min(_CHUNK, self._left))
                if not self._to_client:
                    raise psycopg.OperationalError("the server closed the connection")
                self._left -= len(self._to_client)
            self._to_server = self._to_server[_write(server, self._to_server) :]
            self._to_client = self._to_client[_write(near, self._to_client) :]
        except OSError as error:
            raise psycopg.OperationalError("the connection was lost") from error


def _write(fd: int, data: bytes) -> int:
    try:
        return os.write(fd, data) if data else 0
    except BlockingIOError:
        return 0
