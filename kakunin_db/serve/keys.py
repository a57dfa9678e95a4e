"""API keys: ``kak_live_``, 16 hexadecimal digits that find it, ``_``, and 256 random bits in base64url."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, field

_FORM = re.compile(r"kak_live_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class ApiKey:
    """A key as its holder has it. The database has ``prefix`` and ``digest``."""

    text: str = field(repr=False)
    prefix: str

    @classmethod
    def generate(cls) -> ApiKey:
        prefix = secrets.token_hex(8)
        return cls(f"kak_live_{prefix}_{secrets.token_urlsafe(32)}", prefix)

    @classmethod
    def parse(cls, text: str) -> ApiKey | None:
        """None for what has not the form of one, which is asked of no database."""
        found = _FORM.fullmatch(text)
        return found and cls(text, found[1])

    @property
    def digest(self) -> bytes:
        """SHA-256."""
        return hashlib.sha256(self.text.encode()).digest()
