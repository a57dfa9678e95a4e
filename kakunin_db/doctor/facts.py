"""What the checks share: which roles work for agents, what these can become, which tables are of agents."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from ..errors import BadInputError

_QUERIES: Final = Path(__file__).parent / "queries"
KIT_ROLES: Final = {
    f"kakunin_{r}" for r in ("agent", "gateway", "registrar", "operator", "worker", "auditor")
}


@dataclass(frozen=True)
class Role:
    """A row of pg_roles; ``ident`` is the name quoted for SQL."""

    oid: int
    name: str
    ident: str
    superuser: bool
    bypassrls: bool
    createrole: bool
    replication: bool
    login: bool
    connections: int


@dataclass(frozen=True)
class Membership:
    """``member`` has ``role``. ``usable``: by inheritance or SET ROLE, and not to hand it on alone."""

    role: int
    member: int
    grantor: int
    admin: bool
    usable: bool


@dataclass(frozen=True)
class Table:
    """A table with agents' rows. ``name`` is qualified and quoted; ``literal`` is that as a string of SQL,
    and so is ``column``, which says whose a row is."""

    oid: int
    name: str
    literal: str
    bare: str
    kind: str
    owner: int
    enabled: bool
    forced: bool
    column: str | None


@dataclass
class Facts:
    """One database, as all the checks see it; :meth:`read` asks for it. The ``max_*`` are seconds."""

    connection: psycopg.Connection[Any]
    database: str
    server_version: str
    version: int
    login: str
    kit_owner: int
    max_lag: float
    max_skew: float
    max_webhooks: float
    roles: dict[int, Role] = field(default_factory=dict)
    memberships: list[Membership] = field(default_factory=list)
    tables: dict[int, Table] = field(default_factory=dict)
    views: list[int] = field(default_factory=list)
    # Logins that hold kakunin_agent, that hold kakunin_gateway, that PostgREST connects as, and that hold
    # kakunin_registrar.
    agents: set[int] = field(default_factory=set)
    gateways: set[int] = field(default_factory=set)
    postgrest: set[int] = field(default_factory=set)
    registrars: set[int] = field(default_factory=set)
    # What each of these can become, themselves included; 0 is PUBLIC.
    agents_reach: set[int] = field(default_factory=set)
    reach: set[int] = field(default_factory=set)
    # Parts of a check that could not be seen: its id, and what is needed.
    unseen: list[tuple[str, str]] = field(default_factory=list)
    # What a check worked out and another one needs.
    kept: dict[str, Any] = field(default_factory=dict)
    _kit: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, connection: psycopg.Connection[Any], max_lag: float, max_skew: float, max_webhooks: float
    ) -> Facts:
        row = (
            connection.cursor(row_factory=dict_row)
            .execute(
                "select current_database()::text as database,"
                " current_setting('server_version') as server_version,"
                " current_setting('server_version_num')::integer as version, current_user::text as login,"
                " (select n.nspowner::bigint from pg_namespace n join pg_namespace p using (nspowner)"
                "   where n.nspname = 'kakunin' and p.nspname = 'kakunin_private') as kit_owner"
            )
            .fetchone()
        )
        assert row  # noqa: S101
        if row["kit_owner"] is None:
            raise BadInputError(
                "the kit is not in this database", hint="Name the one it is in, or run kakunin-db migrate."
            )
        facts = cls(connection, **row, max_lag=max_lag, max_skew=max_skew, max_webhooks=max_webhooks)
        facts.roles = {r["oid"]: Role(**r) for r in facts.rows("roles")}
        facts.memberships = [Membership(**r) for r in facts.rows("memberships")]
        facts._kit = {r["name"]: r for r in facts.rows("kit")}
        facts.tables = {r["oid"]: Table(**r) for r in facts.rows("tables")}
        facts._find_agents()
        facts.views = [r["oid"] for r in facts.rows("views")]
        return facts

    def refusal(self, need: str) -> str | None:
        """Why this function, view or table of the kit's is not to be asked; None where it can be."""
        found = self._kit.get(need)
        if found is None:
            return f"a kit that has {need}: kakunin-db migrate"
        if not found["genuine"]:
            return f"{need} as the kit made it"
        if not found["allowed"]:
            private = need.startswith("kakunin_private.")
            return "the kit's owner or a superuser" if private else "kakunin_operator or kakunin_auditor"
        return None

    def rows(self, name: str, **more: Iterable[int]) -> list[dict[str, Any]]:
        """What ``queries/<name>.sql`` gives. In it ``{tables}``, ``{reach}`` and the like are arrays of oids,
        and so is what ``more`` names; ``{columns}`` is a query, and ``{grants}`` is queries/grants.sql."""
        query = _query(name).replace("{grants}", _query("grants"))
        arrays: dict[str, Iterable[int]] = {
            "tables": self.tables,
            "protected": [t.oid for t in self.tables.values() if t.kind != "f"],
            "views": self.views,
            "agents": self.agents,
            "postgrest": self.postgrest,
            "registrars": self.registrars,
            "agents_reach": self.agents_reach,
            "reach": self.reach,
            "safe_owner": [self.safe_owner()],
            **more,
        }
        for place, oids in arrays.items():
            if f"{{{place}}}" in query:
                query = query.replace(f"{{{place}}}", f"'{{{','.join(map(str, sorted(oids)))}}}'::oid[]")
        if "{columns}" in query:
            columns = [
                f"({t.oid}::oid, {t.column}::name)" for t in self.tables.values() if t.column is not None
            ]
            query = query.replace("{columns}", "values " + ", ".join(columns or ["(0::oid, ''::name)"]))
        return self.ask(query)

    def ask(self, query: str) -> list[dict[str, Any]]:
        with self.connection.cursor(row_factory=dict_row) as cursor:
            return cursor.execute(query.encode()).fetchall()

    def value(self, query: str) -> Any:
        return next(iter(self.ask(query)[0].values()))

    def name(self, oid: int) -> str:
        """The role's name, as SQL has it."""
        return "public" if oid == 0 else self.roles[oid].ident if oid in self.roles else str(oid)

    def safe_owner(self) -> int:
        """Who may own what agents must not: the kit's owner, unless agents have that as well."""
        return self.kit_owner if self.kit_owner not in self.reach else 10  # the server's first superuser

    def bypasses(self, role: int, table: Table) -> bool:
        """Whether row security of the table does not bind what runs as this role."""
        found = self.roles.get(role)
        if found is None:
            return False
        return (
            found.superuser or found.bypassrls or (not table.forced and table.owner in self.becomes([role]))
        )

    def becomes(self, start: Iterable[int]) -> set[int]:
        """These roles and what they can become, by what they hold and by what they may give themselves."""
        reached, waiting = set(start), list(start)
        below: dict[int, list[int]] = {}
        for m in self.memberships:
            if m.usable or m.admin:
                below.setdefault(m.member, []).append(m.role)
        while waiting:
            for role in below.get(waiting.pop(), []):
                if role not in reached:
                    reached.add(role)
                    waiting.append(role)
        return reached

    def _holders(self, name: str) -> set[int]:
        """Logins that hold the role. Who made a role may have given it to itself: that is no agent."""
        reached = {oid for oid, role in self.roles.items() if role.name == name}
        waiting = list(reached)
        above: dict[int, list[int]] = {}
        for m in self.memberships:
            if m.usable and m.grantor != m.member:
                above.setdefault(m.role, []).append(m.member)
        while waiting:
            for member in above.get(waiting.pop(), []):
                if member not in reached:
                    reached.add(member)
                    waiting.append(member)
        return {oid for oid in reached if self.roles[oid].login}

    def _find_agents(self) -> None:
        agents, gateways = self._holders("kakunin_agent"), self._holders("kakunin_gateway")
        if self.refusal("kakunin_private.gateway_logins") is None:
            self.postgrest = {
                r["oid"]
                for r in self.ask(
                    "select r.oid::bigint as oid from kakunin_private.gateway_logins g"
                    " join pg_roles r on r.rolname = g.login"
                )
            }
        else:
            # Anybody can have set this for itself, so it is no ground to pass anything: it is not checked.
            self.postgrest = {
                r["oid"]
                for r in self.ask(
                    "select distinct s.setrole::bigint as oid"
                    " from pg_db_role_setting s, unnest(s.setconfig) c(setting) where s.setrole <> 0 and"
                    " starts_with(c.setting, 'pgrst.')"
                )
            }
            self.unseen += [
                (
                    "agent-role",
                    "the kit's owner or a superuser, to tell PostgREST's login from an agent's:"
                    f" {self.name(oid)}",
                )
                for oid in sorted(self.postgrest & agents)
            ]
        self.registrars = self._holders("kakunin_registrar")
        self.agents = agents - self.postgrest
        self.gateways = gateways - self.postgrest
        kit = {oid for oid, role in self.roles.items() if role.name in ("kakunin_agent", "kakunin_gateway")}
        self.agents_reach = self.becomes(
            [*self.agents, *(o for o in kit if self.roles[o].name == "kakunin_agent")]
        ) | {0}
        self.reach = self.becomes([*self.agents, *self.gateways, *kit]) | {0}


@functools.cache
def _query(name: str) -> str:
    return (_QUERIES / f"{name}.sql").read_text(encoding="utf-8")


def now() -> float:
    """The client's clock, seconds since 1970."""
    return time.time()
