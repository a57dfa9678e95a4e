"""The catalog of checks. Adding one is adding an entry: an id, its gravest severity, a title, what finds it.

That is a function, or else the query ``queries/<id>.sql``. A query's columns are ``object`` and ``reason``,
and where there is one ``severity`` (else the check's), ``sql``, ``command`` and ``guess``. It runs with
search_path = pg_catalog, has what :meth:`Facts.rows` puts in the place of names in braces, and calls nothing
that is not the server's but for what the check says it ``needs``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from . import functions, policies, roles, state
from .facts import Facts
from .findings import Finding


@dataclass(frozen=True)
class Check:
    """``severity`` is the gravest that it gives; ``needs`` are functions, views and tables of the kit."""

    id: str
    severity: str
    title: str
    find: Callable[[Facts], list[Finding]] | None = None
    needs: tuple[str, ...] = ()

    def run(self, facts: Facts) -> list[Finding]:
        if self.find is not None:
            return self.find(facts)
        return [Finding(self.id, **{"severity": self.severity, **row}) for row in facts.rows(self.id)]


CHECKS: Final[tuple[Check, ...]] = (
    # Tables
    Check("table-without-policy", "critical", "a table whose rows are agents' has no policy"),
    Check("row-security-off", "critical", "a table has policies and row security is off"),
    Check(
        "relative-without-policy",
        "critical",
        "a partition, child or parent of a protected table has no row security",
    ),
    Check("foreign-table", "critical", "agents may use a foreign table with agents' rows"),
    Check("privilege-beyond-policies", "critical", "agents hold TRUNCATE, TRIGGER, REFERENCES or MAINTAIN"),
    Check("index-missing", "warning", "no index begins with the column that says whose a row is"),
    # Policies
    Check(
        "policy-forgeable",
        "critical",
        "a policy believes a setting that a direct connection can set",
        policies.forgeable,
    ),
    Check(
        "policy-unbound",
        "critical",
        "a permissive policy lets agents through without asking who is bound",
        policies.unbound,
    ),
    Check(
        "policy-per-row",
        "warning",
        "a policy calls a function for every row that it could call once",
        policies.per_row,
    ),
    Check("policy-observes", "warning", "a policy observes where it could refuse", policies.observing),
    # What reads past policies
    Check("view-without-invoker", "critical", "a view reads protected tables as its owner"),
    Check("materialized-view", "critical", "agents may read a materialized view over protected tables"),
    Check(
        "definer-function",
        "critical",
        "a SECURITY DEFINER function that agents may call reads past policies",
        functions.definers,
    ),
    Check("publication", "critical", "a publication sends agents' rows, or the session key, elsewhere"),
    Check("prepared-transaction", "warning", "a prepared transaction of an agent's waits"),
    # Roles
    Check("agent-owns", "critical", "a login that works for agents owns what it must not"),
    Check(
        "agent-attribute",
        "critical",
        "agents can become superuser, BYPASSRLS, REPLICATION or CREATEROLE",
        roles.attributes,
    ),
    Check(
        "agent-role",
        "critical",
        "agents hold a role of the kit's or the server's beside kakunin_agent",
        roles.memberships,
    ),
    Check("agent-admin", "warning", "agents may hand a role on", roles.admin),
    Check("schema-create", "warning", "agents may create in a schema or the database"),
    Check("agent-setting", "warning", "a login of agents' begins its sessions with settings of its own"),
    Check("agent-connections", "notice", "a login of agents' has no connection limit"),
    Check("registrar-timeout", "notice", "a registrar's login may leave transactions open"),
    Check("kit-privilege", "critical", "others than the kit may use what is the kit's own"),
    # PostgREST
    Check(
        "postgrest-hook",
        "warning",
        "PostgREST's login is not hooked, or its hook is not set",
        needs=("kakunin_private.gateway_logins",),
    ),
    Check("postgrest-setting", "warning", "PostgREST is set to let clients roll back, or see plans"),
    # The kit at work
    Check("server-outdated", "warning", "the server has a known hole in row security", state.outdated),
    Check("clock", "critical", "clocks disagree: the server's, the client's, the ledger's", state.clock),
    Check("risk-observed", "warning", "risk is observed, and nothing follows from it"),
    Check(
        "ledger-lag",
        "critical",
        "entries of the ledger wait for a signature",
        state.lag,
        needs=("kakunin.ledger_status()",),
    ),
    Check(
        "ledger-worker",
        "critical",
        "the worker that leads cannot sign, or not show it to a witness",
        state.worker,
        needs=("kakunin.ledger_status()",),
    ),
    Check(
        "ledger-place",
        "critical",
        "the ledger is a copy, or was moved, put back or promoted",
        state.place,
        needs=("kakunin.ledger_home()", "kakunin.ledger_status()"),
    ),
    Check(
        "ledger-key",
        "critical",
        "the ledger has no key, or one that is about to expire",
        state.ledger_key,
        needs=("kakunin.ledger_status()",),
    ),
    Check(
        "ledger-partitions",
        "warning",
        "partitions of the ledger are not made ahead",
        state.partitions,
        needs=("kakunin.ledger_status()",),
    ),
    Check(
        "crl",
        "warning",
        "a revocation list is stale, or leaves revocations out",
        needs=("kakunin.crls", "kakunin.authorities", "kakunin.crls_due()", "kakunin.certificates"),
    ),
    Check("halt-unsigned", "warning", "the receipt of a halt is not signed", needs=("kakunin.halts",)),
    Check(
        "authority-expiry",
        "critical",
        "no authority is good for long",
        state.authorities,
        needs=("kakunin.authorities",),
    ),
    Check(
        "certificate-expiry",
        "warning",
        "an agent's certificate is about to expire",
        needs=("kakunin.certificates", "kakunin.agents"),
    ),
    Check("session-key", "notice", "the session key is old", needs=("kakunin_private.session_keys",)),
    Check(
        "webhooks",
        "warning",
        "webhooks were given up, or wait",
        state.webhooks,
        needs=("kakunin.webhook_status()",),
    ),
)
