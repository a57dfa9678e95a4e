"""Where ``sql/`` and ``migrations/`` are: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _find(name: str) -> Path:
    for place in (_PACKAGE / name, _PACKAGE.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{name}/ is missing from this installation of kakunin-db: install it again")


def sql_dir() -> Path:
    """The folder of the kit's SQL files."""
    return _find("sql")


def migrations_dir() -> Path:
    """The folder of the Alembic environment."""
    return _find("migrations")


def install_sql() -> str:
    """All of ``sql/`` in name order: what a fresh installation is."""
    return "".join(path.read_text(encoding="utf-8") + "\n" for path in sorted(sql_dir().glob("*.sql")))
