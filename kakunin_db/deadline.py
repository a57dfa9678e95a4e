"""Waiting for the server no longer than until a moment, which is one of ``time.monotonic()``."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

T = TypeVar("T")


class LateError(psycopg.OperationalError):
    """The server has not answered in time. What it answers later is nobody's: close the connection."""


def until(gen: PQGen[T], moment: float) -> PQGen[T]:
    """The same generator for ``connection.wait()``, which looks in ten times a second; raises LateError."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if time.monotonic() > moment:
                gen.close()
                raise LateError("the database did not answer in time")
            wanted = gen.send(ready)
    except StopIteration as stop:
        result: T = stop.value
        return result


def wait_until(connection: psycopg.Connection[Any], moment: float) -> None:
    """From now on, ends whatever the connection waits for after this moment with LateError."""
    wait = type(connection).wait

    def on_time(gen: PQGen[Any], *args: Any, **kwargs: Any) -> Any:
        return wait(connection, until(gen, moment), *args, **kwargs)

    connection.wait = on_time  # type: ignore[method-assign]
