"""Connection strings for connections of the kit's own, beside the caller's."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Final

import psycopg
from psycopg import conninfo

# libpq's, for those a DSN does not set: a server that is gone without a word is noticed.
LASTING: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,  # milliseconds
}


def dsn_of(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> str:
    """What opens another connection like this one, its password included.

    Raises psycopg.OperationalError when the connection is closed.
    """
    info = connection.info
    return conninfo.make_conninfo(**info.get_parameters(), password=info.password or None)


def lasting(dsn: str, **more: Any) -> str:
    """The DSN with LASTING and ``more``, where it says nothing of its own. Raises psycopg.ProgrammingError:
    it is not a DSN."""
    given = {"connect_timeout": os.environ.get("PGCONNECT_TIMEOUT"), **conninfo.conninfo_to_dict(dsn)}
    missing = {name: value for name, value in {**LASTING, **more}.items() if given.get(name) is None}
    return conninfo.make_conninfo(dsn, **missing)


def is_gone(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Also when the server ended it while it was idle, which libpq notices only when it looks."""
    with contextlib.suppress(psycopg.OperationalError):
        for _ in range(2):  # what the server said, and then the end
            connection.pgconn.consume_input()
    return connection.closed
