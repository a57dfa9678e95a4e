"""Functions that run as their owner, and so past policies."""

from __future__ import annotations

import re
from typing import Final

from .facts import Facts
from .findings import Finding

_WORD: Final = re.compile(r'"((?:[^"]|"")+)"|([^\W\d][\w$]*)')


def definers(facts: Facts) -> list[Finding]:
    """What a body of BEGIN ATOMIC reads, the server knows. In other texts a table's name is a guess."""
    below: dict[int, set[int]] = {}
    for row in facts.rows("tables-below-views"):
        below.setdefault(row["view"], set()).add(row["relid"])
    named: dict[str, set[int]] = {}
    for table in facts.tables.values():
        named.setdefault(table.bare, set()).add(table.oid)
    for row in facts.rows("view-names"):
        named.setdefault(row["bare"], set()).update(below.get(row["oid"], set()))
    found = []
    for function in facts.rows("definer-functions"):
        reached = {
            oid for r in function["relations"] for oid in ({r} if r in facts.tables else below.get(r, set()))
        }
        guess = not function["standard"]
        words: set[str] = set()
        if guess:
            words = {
                m[1].replace('""', '"') if m[1] else m[2].lower() for m in _WORD.finditer(function["source"])
            }
            reached |= {oid for word in words for oid in named.get(word, set())}
        past = sorted(
            facts.tables[oid].name for oid in reached if facts.bypasses(function["owner"], facts.tables[oid])
        )
        owner = facts.name(function["owner"])
        sql = f"alter routine {function['name']} security invoker;"
        if past:
            # Or it asks who is bound, as docs/supabase-trust.md has it.
            asks = {"require_session", "current_cert_serial", "current_agent_id"} & words
            found.append(
                Finding(
                    "definer-function",
                    "notice" if asks else "warning" if guess else "critical",
                    f"function {function['name']}",
                    f"{'its text names' if guess else 'it reaches'} {', '.join(past[:3])}"
                    f"{' and more' if len(past) > 3 else ''}, and runs as {owner}, whom policies do not bind"
                    + ("; it asks who is bound: see that it filters by that" if asks else ""),
                    sql,
                    None,
                    guess,
                )
            )
        elif (
            guess
            and "execute" in words
            and any(facts.bypasses(function["owner"], t) for t in facts.tables.values())
        ):
            found.append(
                Finding(
                    "definer-function",
                    "notice",
                    f"function {function['name']}",
                    f"it runs SQL that it puts together, as {owner}, whom policies do not bind",
                    sql,
                    None,
                    True,
                )
            )
    return found
