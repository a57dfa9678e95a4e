"""What the documents say is there is there, and what is there is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Database

from kakunin_db import cli
from kakunin_db.resources import sql_dir

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("examples/**/README.md")),
]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    if "node_modules" in document.parts:
        pytest.skip("not ours")
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in anchors(found), f"{target} has no such heading"


def test_every_document_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text()
    assert [d.name for d in DOCS.glob("*.md") if d.name != "README.md" and f"({d.name}" not in index] == []


def test_every_variable_is_among_the_settings() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "kakunin_db").rglob("*.py"))
    variables = set(re.findall(r"\bKAKUNIN_[A-Z0-9_]*[A-Z0-9]\b", sources)) - {"KAKUNIN_TEST_PG"}
    settings = (DOCS / "settings.md").read_text()
    assert {v for v in variables if f"`{v}`" not in settings} == set()


def test_every_option_of_the_worker_is_among_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["worker", "--help"])
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help", "--json"}
    settings = (DOCS / "settings.md").read_text()
    assert {o for o in options if f"`{o}`" not in settings} == set()


def test_every_setting_of_risk_is_in_its_document(database: Database) -> None:
    columns = database.run(
        "installer",
        "select attname from pg_attribute where attrelid = 'kakunin_private.risk_settings'::regclass"
        " and attnum > 0 and attname <> 'only_row'",
    )
    text = (DOCS / "risk.md").read_text()
    assert [name for (name,) in columns if f"`{name}`" not in text] == []


def test_every_event_that_the_kit_records_is_in_its_document() -> None:
    sources = "".join(file.read_text() for file in sql_dir().glob("*.sql"))
    names = set(re.findall(r"'((?!kakunin|request)[a-z_]+\.[a-z_]+)'", sources))
    text = (DOCS / "ledger.md").read_text()
    # webhook.test is sent, and not recorded.
    assert {name for name in names if f"`{name}`" not in text} == {"webhook.test"}


def test_every_state_is_among_the_errors() -> None:
    sources = "".join(file.read_text() for file in sql_dir().glob("*.sql"))
    states = set(re.findall(r"errcode = '(KA\d{3})'", sources))
    assert states
    errors = (DOCS / "errors.md").read_text()
    assert {state for state in states if state not in errors} == set()
