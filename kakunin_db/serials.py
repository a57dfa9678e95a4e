"""Certificate serial numbers in their one text form, that of the ``X-Kakunin-Cert-Serial`` header."""

from __future__ import annotations

import functools
import re
from typing import Final

from .errors import BadInputError

SERIAL_HEADER: Final = "X-Kakunin-Cert-Serial"
_SEPARATED = re.compile(r"[0-9A-F]{1,2}(?:(?::[0-9A-F]{2})*|(?:-[0-9A-F]{2})*|(?: [0-9A-F]{2})*)")
_PLAIN = re.compile(r"[0-9A-F]+")


def normalize_serial(serial: str | int) -> str:
    """``3A:F2:91:CC`` from any common hexadecimal form, or from the number itself.

    The same as ``kakunin.normalize_serial()`` in SQL. Raises :class:`BadInputError` for anything that is
    not a positive number of at most 20 octets (RFC 5280 section 4.1.2.2).
    """
    text = f"{serial:x}" if isinstance(serial, int) else serial
    return _normalized(str.__str__(text) if isinstance(text, str) else None)


@functools.lru_cache(4096)  # gateways see the same few again and again
def _normalized(text: str | None) -> str:
    # ASCII only, before upper(), which turns other letters into A to F as well.
    if text is not None and text.isascii() and len(text) <= 100:
        text = re.sub(r"\A0[xX]", "", text.strip(" ")).upper()
        if _SEPARATED.fullmatch(text) or _PLAIN.fullmatch(text):
            digits = re.sub("[: -]", "", text).lstrip("0")
            if 1 <= len(digits) <= 40:
                digits = digits.zfill(len(digits) + len(digits) % 2)
                return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))
    raise BadInputError(
        "not a certificate serial number",
        "Give 1 to 20 bytes in hexadecimal, as in 3A:F2:91:CC, 3af291cc or 0x3AF291CC.",
    )
