"""squawk, a linter of migrations, finds nothing in what the kit prints but what has a reason here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kakunin_db.export_commands import plain_sql, supabase_sql
from kakunin_db.migrate import downgrade_sql, migrate_sql

SCRIPTS = {
    "migrate": migrate_sql,
    "downgrade": downgrade_sql,
    "export sql": plain_sql,
    "export supabase": supabase_sql,
}
# A rule, and why it is not kept.
REASONS = {
    "require-lock-timeout": "set_config() sets it, once the run has waited for another migration"
    " (before.sql); a file that is applied by hand runs on a database where nobody uses the kit yet",
    "require-statement-timeout": "no statement scans a table of the user's; on the kit's own, a migration"
    " takes as long as there is data, and a limit would only mean that it never succeeds",
    "prefer-bigint-over-int": "counts of attempts, epochs and types of composites, which stay small",
    "prefer-bigint-over-smallint": "the level of a node in a tree: 64 at most",
    "prefer-text-field": "Alembic's version table, as Alembic makes it",
    "ban-drop-schema": "what a downgrade to base is for; it refuses while anything outside uses them",
    "ban-set-schema": "Alembic's version table leaves its schema while that is dropped",
    "renaming-object": "and that schema is the kit's own again, until the run ends",
}


def squawk() -> str:
    program = shutil.which("squawk") or str(Path(sys.executable).with_name("squawk"))
    if not Path(program).exists():
        pytest.skip("squawk is not installed: pip install squawk-cli")
    return program


@pytest.mark.parametrize("name", SCRIPTS)
def test_squawk_is_clean(name: str, tmp_path: Path) -> None:
    file = tmp_path / "script.sql"
    file.write_text(SCRIPTS[name](), encoding="utf-8")
    options = ["--reporter", "json", "--pg-version", "15"]
    if "BEGIN;" not in file.read_text(encoding="utf-8"):
        options.append("--assume-in-transaction")  # psql -1, or the tool that applies it
    done = subprocess.run(
        [squawk(), *options, str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    found = json.loads(done.stdout)
    assert [f for f in found if f["rule_name"] not in REASONS] == []
    # It has read the file: one of each that a reason is given for is there.
    if name in ("migrate", "downgrade"):
        assert "require-statement-timeout" in {f["rule_name"] for f in found}


def test_squawk_would_notice(tmp_path: Path) -> None:
    file = tmp_path / "script.sql"
    file.write_text("alter table app.orders alter column amount type bigint;\n")
    done = subprocess.run(
        [squawk(), "--reporter", "json", str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "changing-column-type" in {f["rule_name"] for f in json.loads(done.stdout)}
