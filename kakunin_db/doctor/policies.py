"""Checks of policies. Their expressions are read as the parser left them, a tree of nodes, so neither a name
nor a string in them can pass for a call; only what mends one is written from its text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from .facts import Facts
from .findings import Finding

# As pg_get_expr() writes what the first policies of this kind have.
_CLAIMS: Final = r"current_setting\('request\.jwt\.claims'::text(?:, (?:true|false))?\)"
_CLAIM: Final = re.compile(
    rf"\(\((?:NULLIF\({_CLAIMS}, ''::text\)|{_CLAIMS})\)::jsonb? ->> 'kakunin_cert_serial'::text\)"
)
_TOKEN: Final = re.compile(r"[{}()]|(?:\\.|[^\s{}()\\])+", re.DOTALL)


@dataclass
class Call:
    """A function's call. ``once``: it is inside a subselect; ``of_row``: a column is in its arguments."""

    function: int
    once: bool
    of_row: bool


def calls(tree: str) -> list[Call]:
    """The calls in a pg_node_tree."""
    found: list[Call] = []
    nodes: list[tuple[str, Call | None]] = []
    expecting = wants = False
    for token in _TOKEN.findall(tree):
        if token == "{":  # noqa: S105
            expecting = True
        elif expecting:
            expecting = False
            call = None
            if token == "FUNCEXPR":  # noqa: S105
                call = Call(0, any(name == "SUBLINK" for name, _ in nodes), False)
                found.append(call)
            elif token == "VAR":  # noqa: S105
                for _, above in nodes:
                    if above is not None:
                        above.of_row = True
            nodes.append((token, call))
        elif token == "}":  # noqa: S105
            nodes.pop()
        elif wants:
            wants = False
            call = nodes[-1][1]
            if call is not None and call.function == 0:
                call.function = int(token)
        elif token == ":funcid":  # noqa: S105
            wants = bool(nodes) and nodes[-1][1] is not None
    return found


def _constant(tree: str) -> bool | None:
    """What an expression that is a constant says."""
    found = re.fullmatch(r"\{CONST .*:constvalue 1 \[ ([01]) .*\}", tree, re.DOTALL)
    return found[1] == "1" if found and tree.count("{") == 1 else None


class _Policies:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.all = facts.rows("policies")
        self._texts: dict[int, dict[str, str | None] | None] = {}
        self.settings = {row["oid"] for row in facts.rows("settings")}
        for policy in self.all:
            policy["qual_calls"], policy["check_calls"] = calls(policy["qual"]), calls(policy["check"])
        wanted = {c.function for p in self.all for c in p["qual_calls"] + p["check_calls"]}
        self.functions = {row["oid"]: row for row in facts.rows("functions", functions=wanted)}

    def applies(self, policy: dict[str, Any]) -> bool:
        """To agents or gateways."""
        return bool(set(policy["roles"]) & self.facts.reach)

    def reads(self, policy: dict[str, Any]) -> tuple[str, bool] | None:
        """What in the policy reads a setting, and whether that is a guess."""
        guessed = None
        for call in policy["qual_calls"] + policy["check_calls"]:
            if call.function in self.settings:
                return "current_setting()", False
            function = self.functions.get(call.function)
            if function is None or function["schema"] in ("pg_catalog", "kakunin"):
                continue
            if any(c.function in self.settings for c in calls(function["body"])):
                return f"{function['name']}(), which reads a setting", False
            if re.search(r"\bcurrent_setting\b", function["source"], re.IGNORECASE):
                guessed = f"{function['name']}(), which seems to read a setting", True
        return guessed

    def rewritten(self, policy: dict[str, Any], change: Callable[[str], str]) -> str | None:
        """What gives the policy its expressions anew; None where nothing changes, or they cannot be read."""
        texts = self.texts(policy) or {}
        clauses = "".join(
            f" {clause} ({change(text)})"
            for clause, which in (("using", "qual"), ("with check", "check"))
            if (text := texts.get(which)) is not None and change(text) != text
        )
        return f"alter policy {policy['ident']} on {policy['table']}{clauses};" if clauses else None

    def texts(self, policy: dict[str, Any]) -> dict[str, str | None] | None:
        """The expressions as SQL; None while another session, an agent's perhaps, has a lock on the table."""
        if policy["oid"] not in self._texts:
            text = None
            with contextlib.suppress(psycopg.errors.LockNotAvailable), self.facts.connection.transaction():
                text = next(iter(self.facts.rows("expressions", policy=[policy["oid"]])), None)
            if text is None:  # however many are locked
                self.facts.connection.execute("set local lock_timeout = '10ms'")
            self._texts[policy["oid"]] = text
        return self._texts[policy["oid"]]


def _read(facts: Facts) -> _Policies:
    """Once a report."""
    if "policies" not in facts.kept:
        facts.kept["policies"] = _Policies(facts)
    kept: _Policies = facts.kept["policies"]
    return kept


def _object(policy: dict[str, Any]) -> str:
    return f"policy {policy['ident']} on {policy['table']}"


def forgeable(facts: Facts) -> list[Finding]:
    policies = _read(facts)
    found = []
    for policy in policies.all:
        reads, ours = policies.reads(policy), policy["relid"] in facts.tables
        if reads is None or not (ours or (policy["permissive"] and policies.applies(policy))):
            continue
        gravest = ours and policy["permissive"] and policies.applies(policy)
        what, guess = reads
        sql = None
        if not guess:
            sql = policies.rewritten(
                policy, lambda text: _CLAIM.sub("( SELECT kakunin.current_cert_serial())", text)
            )
            if sql is not None and "current_setting(" in sql:
                sql = None
        if sql is None and policy["permissive"]:
            sql = f"drop policy {policy['ident']} on {policy['table']};"
            table = facts.tables.get(policy["relid"])
            if table is not None and table.column is not None and table.kind in "rp":
                force = ", force => true" if table.forced else ""
                sql += (
                    f" select kakunin.protect({table.literal}, {table.column}, keep_policies => true{force});"
                )
        found.append(
            Finding(
                "policy-forgeable",
                "critical" if gravest and not guess else "warning",
                _object(policy),
                f"it believes {what}: on a direct connection anybody sets it, and no revocation reaches it",
                sql,
                None
                if sql
                else "write it with (select kakunin.current_cert_serial()) in the setting's place",
                guess,
            )
        )
    return found


def unbound(facts: Facts) -> list[Finding]:
    policies = _read(facts)
    found = []
    for policy in policies.all:
        table = facts.tables.get(policy["relid"])
        if (
            table is None
            or not policy["permissive"]
            or policy["asks"]
            or not policies.applies(policy)
            or policies.reads(policy)
        ):
            continue
        constants = [_constant(policy[which]) for which in ("qual", "check") if policy[which]]
        if constants and not any(c is not False for c in constants):
            continue
        found.append(
            Finding(
                "policy-unbound",
                "critical" if True in constants else "warning",
                _object(policy),
                "it lets agents through beside what asks who is bound, and policies are joined by OR",
                f"drop policy {policy['ident']} on {policy['table']};",
            )
        )
    return found


def per_row(facts: Facts) -> list[Finding]:
    policies = _read(facts)
    found = []
    for policy in policies.all:
        if policy["relid"] not in facts.tables:
            continue
        names, opaque = set(), set()
        for number, call in enumerate(policy["qual_calls"] + policy["check_calls"]):
            function = policies.functions.get(call.function)
            if function is None or call.once:
                continue
            kits = function["schema"] == "kakunin"
            if not call.of_row:
                if (
                    call.function in policies.settings
                    or kits
                    or (function["schema"] != "pg_catalog" and function["volatility"] == "s")
                ):
                    names.add(function["name"])
            elif (
                number < len(policy["qual_calls"])
                and function["schema"] != "pg_catalog"
                and function["opaque"]
            ):
                opaque.add(function["name"])
        if names:
            said = ", ".join(sorted(f"{name}()" for name in names))
            # What believes a setting is mended by other SQL: this would put the setting back.
            sql = (
                None
                if policies.reads(policy)
                else policies.rewritten(policy, lambda text, names=names: _wrapped(text, names))  # type: ignore[misc]
            )
            found.append(
                Finding(
                    "policy-per-row",
                    "warning",
                    _object(policy),
                    f"it calls {said} for every row, and (select ...) calls it once",
                    sql,
                    None if sql else f"write (select ...) around {said}",
                )
            )
        if opaque:
            said = ", ".join(sorted(f"{name}()" for name in opaque))
            found.append(
                Finding(
                    "policy-per-row",
                    "notice",
                    _object(policy),
                    f"it calls {said} for every row, and the planner sees a black box",
                    None,
                    "compare a column with a (select ...), or have a plain SQL function, which is inlined",
                )
            )
    return found


def observing(facts: Facts) -> list[Finding]:
    policies = _read(facts)
    found = []
    for policy in policies.all:
        if not policy["asks"]:
            continue
        names = {
            f["name"]
            for c in policy["qual_calls"] + policy["check_calls"]
            if (f := policies.functions.get(c.function))
            and f["name"] in ("kakunin.require_spend", "kakunin.require_risk_below")
        }
        if not names:
            continue
        sql = policies.rewritten(policy, lambda text, names=names: _enforced(text, names))  # type: ignore[misc]
        if policies.texts(policy) is None:
            facts.unseen.append(("policy-observes", f"a lock on {policy['table']} to be let go of"))
        elif sql is not None:
            found.append(
                Finding(
                    "policy-observes",
                    "warning",
                    _object(policy),
                    f"{' and '.join(sorted(names))} only records what it would refuse",
                    sql,
                )
            )
    return found


# Texts as pg_get_expr() writes them ----------------------------------------------------------------

_SKIP: Final = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"")


def _called(text: str, names: set[str]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Where these functions are called: from, to, and where each argument is."""
    strings = {at for m in _SKIP.finditer(text) if m[0][0] == "'" for at in range(*m.span())}
    for name in sorted(names):
        for match in re.finditer(rf'(?<![\w."]){re.escape(name)}\(', text):
            if match.start() in strings:
                continue
            depth, at, begin, arguments = 1, match.end(), match.end(), []
            while depth:
                if (skip := _SKIP.match(text, at)) is not None:
                    at = skip.end()
                    continue
                if text[at] in "([":
                    depth += 1
                elif text[at] in ")]":
                    depth -= 1
                if (text[at] == "," and depth == 1) or depth == 0:
                    arguments.append((begin, at))
                    begin = at + 1
                at += 1
            yield match.start(), at, arguments


def _wrapped(text: str, names: set[str]) -> str:
    """The calls in subselects, but those that are the whole of one."""
    places = [(a, b) for a, b, _ in _called(text, names) if not text[:a].upper().endswith("SELECT ")]
    outer = [p for p in places if not any(o[0] < p[0] and p[1] < o[1] for o in places)]
    for begin, end in sorted(outer, reverse=True):
        text = f"{text[:begin]}( SELECT {text[begin:end]}){text[end:]}"
    return text


_OBSERVE: Final = {"kakunin.require_spend": 5, "kakunin.require_risk_below": 2}


def _enforced(text: str, names: set[str]) -> str:
    changes = []
    for name in names:
        for _, _, arguments in _called(text, {name}):
            for n, (begin, end) in enumerate(arguments, 1):
                said = text[begin:end].strip()
                if said == "observe => true" or (said == "true" and n == _OBSERVE[name]):
                    changes.append((begin, end, text[begin:end].replace("true", "false")))
    for begin, end, new in sorted(changes, reverse=True):
        text = text[:begin] + new + text[end:]
    return text
