"""A finding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

# From the gravest.
SEVERITIES: Final = ("critical", "warning", "notice")


@dataclass(frozen=True)
class Finding:
    """Something to mend.

    ``object`` is quoted as SQL has it. What mends it is ``sql``, to be run as it stands by a superuser or
    whoever owns the object, or a ``command`` outside of SQL. A ``guess`` was read out of a text that need not
    mean it.
    """

    id: str
    severity: str
    object: str
    reason: str
    sql: str | None = None
    command: str | None = None
    guess: bool = False

    def document(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "severity": self.severity,
            "object": self.object,
            "reason": self.reason,
            "sql": self.sql,
            "command": self.command,
            "guess": self.guess,
        }
