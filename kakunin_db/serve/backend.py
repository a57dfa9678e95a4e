"""The server's connections: one login, and a pool for each role it holds, set as the connection begins.

The login inherits none of them, so a statement has the rights of the one role it is for. What the login does
not hold, the server cannot do. Keys are looked up on connections of their own: whatever others wait for, a
halt is let in.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psycopg
from psycopg import conninfo
from psycopg.types.json import set_json_loads

from ..client import AsyncKakunin
from ..client.connectors import AsyncConnector
from ..conninfo import is_gone, lasting
from ..errors import KakuninError
from ..jsonb import loads
from ..signers import KeyStore

if TYPE_CHECKING:
    from psycopg_pool import AsyncConnectionPool

    from ..client.operations import Steps

T = TypeVar("T")
Role = Literal["gateway", "registrar", "operator", "auditor"]
ROLES: tuple[Role, ...] = ("gateway", "registrar", "operator", "auditor")


class RoleMissingError(KakuninError):
    """The server's login does not hold the role. No SQLSTATE."""


class KitMissingError(KakuninError):
    """The kit is not in the server's database. No SQLSTATE."""


@dataclass(frozen=True)
class Settings:
    """What an operator decides about a server.

    :param dsn: of its login.
    :param keys: where agents' keys are; ``ca_keys`` authorities', if elsewhere. Without, nothing is signed.
    :param operator: the role that suspends, revokes and halts: kakunin_operator, or one that was granted
        that alone (docs/api.md).
    :param permits: actions that it certifies at most, ``prefix:*`` for all below it and ``*`` for any. What
        agents ask for is in the database, where a registrar may write it, so that alone decides nothing.
    :param lifetime: of certificates.
    :param timeout: seconds for an answer of the database.
    :param connections: at most, of each role.
    :param per_minute: requests of one key, and ``public_per_minute`` of one address without one.
    :param max_body: bytes of a request's content.
    """

    dsn: str = field(repr=False)
    keys: KeyStore | str | None = field(default=None, repr=False)
    ca_keys: KeyStore | str | None = field(default=None, repr=False)
    crl_url: str | None = None
    operator: str = "kakunin_operator"
    permits: Sequence[str] = ()
    lifetime: dt.timedelta = dt.timedelta(days=90)
    timeout: float = 5.0
    connections: int = 4
    per_minute: int = 600
    public_per_minute: int = 120
    max_body: int = 65_536


class Backend:
    """``open()`` first, ``close()`` at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._pools: dict[Role, AsyncConnectionPool[Any]] = {}
        self._for_keys: AsyncConnectionPool[Any] | None = None
        self._clients: dict[Role, AsyncKakunin] = {}

    async def open(self) -> None:
        """Raises psycopg.Error where the database is not there, KitMissingError where it has no kit,
        RoleMissingError for a login that is no gateway."""
        from psycopg_pool import AsyncConnectionPool  # noqa: PLC0415 - an extra's

        dsn, held = await self.check()
        given = conninfo.conninfo_to_dict(dsn).get("options") or ""
        timeout = int(self.settings.timeout * 1000)

        async def opened(role: Role) -> AsyncConnectionPool[Any]:
            # Backslashes quote blanks within options.
            name = re.sub(r"([\\\s])", r"\\\1", self.name(role))
            options = f"{given} -c role={name} -c statement_timeout={timeout}".strip()
            pool: AsyncConnectionPool[Any] = AsyncConnectionPool(
                conninfo.make_conninfo(dsn, options=options),
                kwargs={"autocommit": True, "prepare_threshold": None},
                min_size=0,
                max_size=self.settings.connections,
                check=_check,
                configure=_configure,
                open=False,
            )
            await pool.open()
            return pool

        self._for_keys = await opened("gateway")
        for role in ROLES:
            if role in held:
                self._pools[role] = pool = await opened(role)
                self._clients[role] = AsyncKakunin(
                    pool,
                    keys=self.settings.keys,
                    ca_keys=self.settings.ca_keys,
                    crl_url=self.settings.crl_url,
                    timeout=self.settings.timeout,
                )

    def name(self, role: Role) -> str:
        return self.settings.operator if role == "operator" else f"kakunin_{role}"

    async def check(self) -> tuple[str, set[str]]:
        """The DSN, and the roles that its login holds. Raises as open()."""
        dsn = lasting(self.settings.dsn, application_name="kakunin-db serve")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            rows = await connection.execute(
                "select r.role from unnest(%s::text[], %s::text[]) r(role, name)"
                " where to_regrole(quote_ident(r.name)) is not null"
                "   and pg_has_role(session_user, r.name, 'member')",
                [list(ROLES), [self.name(role) for role in ROLES]],
            )
            held = {row[0] for row in await rows.fetchall()}
            # The kit's roles are the cluster's, and say nothing about this database.
            rows = await connection.execute("select from pg_catalog.pg_namespace where nspname = 'kakunin'")
            if await rows.fetchone() is None:
                raise KitMissingError(
                    "the kit is not in this database", "Run kakunin-db migrate, or name another."
                )
        if "gateway" not in held:
            raise RoleMissingError(
                "the server's login does not hold kakunin_gateway", "grant kakunin_gateway to <login>"
            )
        return dsn, held

    async def close(self) -> None:
        pools = [*self._pools.values(), *([self._for_keys] if self._for_keys else [])]
        await asyncio.gather(*(pool.close() for pool in pools))

    def client(self, role: Role, serial: str | None = None) -> AsyncKakunin:
        """With a serial (``gateway``), one that acts for that agent."""
        pool = self._pool(role)
        if serial is None:
            return self._clients[role]
        return AsyncKakunin(pool, credential=serial, timeout=self.settings.timeout)

    async def run(self, role: Role, steps: Steps[T], serial: str | None = None) -> T:
        return await AsyncConnector(self._pool(role), serial, self.settings.timeout).run(steps)

    async def about_keys(self, steps: Steps[T]) -> T:
        """As run(), for what every request needs."""
        assert self._for_keys is not None  # noqa: S101 - open() made it
        return await AsyncConnector(self._for_keys, None, self.settings.timeout).run(steps)

    def _pool(self, role: Role) -> AsyncConnectionPool[Any]:
        pool = self._pools.get(role)
        if pool is None:
            raise RoleMissingError(
                f"this server may not: its login does not hold {self.name(role)}",
                f"Where it should: grant {self.name(role)} to its login, and start it again.",
            )
        return pool


async def _configure(connection: psycopg.AsyncConnection[Any]) -> None:
    set_json_loads(loads, connection)


async def _check(connection: psycopg.AsyncConnection[Any]) -> None:
    """Without asking the server: whether it has ended the connection while that was idle."""
    if is_gone(connection):
        raise psycopg.OperationalError("the server has ended this connection")
