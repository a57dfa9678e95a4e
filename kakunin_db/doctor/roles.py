"""Checks of roles: what a login that works for agents is, and what it can become."""

from __future__ import annotations

from .facts import KIT_ROLES, Facts, Membership
from .findings import Finding

# Reads more than an agent should, and opens nothing.
_READING = {
    "kakunin_auditor",
    "pg_monitor",
    "pg_read_all_settings",
    "pg_read_all_stats",
    "pg_stat_scan_tables",
}


def attributes(facts: Facts) -> list[Finding]:
    found = []
    logins = facts.agents | facts.gateways
    kit = {oid for oid, role in facts.roles.items() if role.name in ("kakunin_agent", "kakunin_gateway")}
    reached = facts.becomes([*logins, *kit])
    for oid in reached:
        role = facts.roles[oid]
        words = [word for word in ("superuser", "bypassrls") if getattr(role, word)]
        if oid in facts.agents_reach:
            words += [word for word in ("replication", "createrole") if getattr(role, word)]
        if not words:
            continue
        what = " and ".join(word.upper() for word in words)
        if oid in logins | kit:
            sql = f"alter role {role.ident} {' '.join('no' + word for word in words)};"
            found.append(
                Finding(
                    "agent-attribute",
                    "critical",
                    f"role {role.ident}",
                    f"it works for agents and has {what}",
                    sql,
                )
            )
        for edge in facts.memberships:
            if edge.role == oid and edge.member in reached and oid not in logins | kit:
                found.append(
                    Finding(
                        "agent-attribute",
                        "critical",
                        f"role {role.ident} granted to {facts.name(edge.member)}",
                        f"{_who(facts, edge)} can become {role.ident}, which has {what}",
                        _revoke(facts, edge),
                    )
                )
    return found


def memberships(facts: Facts) -> list[Finding]:
    found = []
    requests = facts.becomes(facts.postgrest)
    for edge in facts.memberships:
        role = facts.roles[edge.role]
        for_agents = edge.member in facts.agents_reach
        kits = role.name in KIT_ROLES - {"kakunin_agent"}
        if not (
            (for_agents and (kits or role.name.startswith("pg_") or edge.role == facts.kit_owner))
            or (edge.member in requests and kits)
        ):
            continue
        severity = "warning" if role.name in _READING else "critical"
        whose = "" if for_agents else ", and with it whoever PostgREST sets that role for"
        found.append(
            Finding(
                "agent-role",
                severity,
                f"role {role.ident} granted to {facts.name(edge.member)}",
                f"{_who(facts, edge)} has what {role.ident} has{whose}",
                _revoke(facts, edge),
            )
        )
    return found


def admin(facts: Facts) -> list[Finding]:
    return [
        Finding(
            "agent-admin",
            "warning",
            f"role {facts.name(edge.role)} granted to {facts.name(edge.member)}",
            f"{_who(facts, edge)} may grant {facts.name(edge.role)} to others and to itself",
            f"revoke admin option for {_grant(facts, edge)} cascade;",
        )
        for edge in facts.memberships
        if edge.admin and edge.member in facts.agents_reach
    ]


def _who(facts: Facts, edge: Membership) -> str:
    """The member; or, of a group, a login that comes to it."""
    name = facts.name(edge.member)
    through = sorted(
        facts.name(a) for a in facts.agents | facts.gateways if edge.member in facts.becomes([a])
    )
    return (
        name if edge.member in facts.agents | facts.gateways or not through else f"{through[0]}, as {name},"
    )


def _grant(facts: Facts, edge: Membership) -> str:
    # From 16 on a grant is its grantor's; before, whoever revoked one revoked it.
    by = (
        f" granted by {facts.name(edge.grantor)}"
        if facts.version >= 160000 and edge.grantor in facts.roles
        else ""
    )
    return f"{facts.name(edge.role)} from {facts.name(edge.member)}{by}"


def _revoke(facts: Facts, edge: Membership) -> str:
    return f"revoke {_grant(facts, edge)}{' cascade' if edge.admin else ''};"
