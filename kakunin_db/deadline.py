"""Waiting for the server no longer than until a moment."""

from __future__ import annotations

import time
from typing import TypeVar

import psycopg
from psycopg.abc import PQGen

T = TypeVar("T")


class LateError(psycopg.OperationalError):
    """The server has not answered in time. What it answers later is nobody's: close the connection."""


def until(gen: PQGen[T], moment: float, seconds: float) -> PQGen[T]:
    """The same generator for ``connection.wait()``, which looks in ten times a second.

    It raises LateError after ``moment`` (``time.monotonic()``), ``seconds`` after it began.
    """
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if time.monotonic() > moment:
                gen.close()
                raise LateError(f"the database did not answer within {seconds} s")
            wanted = gen.send(ready)
    except StopIteration as stop:
        result: T = stop.value
        return result
