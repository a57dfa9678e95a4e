"""JSON as the database has it, whose numbers may be longer than any of Python's."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(data: str | bytes) -> Any:
    """Like :func:`json.loads`, but a number that Python has no value for (more than 4,300 digits, or beyond
    a double) is its text. ``jsonb`` holds them, and whoever may append an event may write one there: it must
    neither stop a reader nor look like tampering.

    :raises ValueError: it is not JSON.
    """
    return json.loads(data, parse_int=_integer, parse_float=_float)


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        return digits


def _float(digits: str) -> float | str:
    value = float(digits)
    return value if math.isfinite(value) else digits
