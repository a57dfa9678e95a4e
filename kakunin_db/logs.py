"""What the worker logs, and what may be logged of an exception at all."""

from __future__ import annotations

import datetime as dt
import json
import logging
from typing import Any

import psycopg

from .errors import KakuninError

_log = logging.getLogger("kakunin_db.worker")


def say(level: int, event: str, message: str, **fields: Any) -> None:
    """Logs an event of the worker, with what it is about."""
    _log.log(level, message, extra={"event": event, "fields": fields})


def why(error: Exception, *, hint: bool = False) -> str:
    """What may be logged of it: others' messages may quote anything."""
    if isinstance(error, psycopg.Error):
        return error.diag.message_primary or (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, KakuninError):
        return f"{error}. {error.hint}" if hint and error.hint else str(error)
    return type(error).__name__


class JSONFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``event``, ``message`` and what the event has."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": _time(record),
                "level": record.levelname.lower(),
                "event": getattr(record, "event", record.name),
                "message": record.getMessage(),
                **getattr(record, "fields", {}),
            },
            default=str,
        )


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        more = "".join(f" {name}={value}" for name, value in fields.items())
        return f"{_time(record)} {record.levelname.lower():<8} {record.getMessage()}{more}"


def _time(record: logging.LogRecord) -> str:
    return dt.datetime.fromtimestamp(record.created, dt.timezone.utc).isoformat(timespec="milliseconds")


def counted(entries: int) -> str:
    return "1 entry" if entries == 1 else f"{entries} entries"
