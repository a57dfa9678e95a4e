"""bind_agent_session() over every kind of client, from one set of tests.

The tests are asynchronous; a synchronous client is driven through the same few operations. G2, G3 and G8
of the design are shown here as an application sees them; tests/test_attack_*.py show them in SQL.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import far_away
from conftest import Agent, Database, Vault
from psycopg_pool import AsyncConnectionPool, ConnectionPool
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

import kakunin_db
from kakunin_db import AgentCredential, bind_agent_session

FACTORIES = ["pool", "engine", "sessionmaker"]
KINDS = [
    f"{driver}-{kind}"
    for driver, kinds in {
        "psycopg": ["connection", "autocommit", "pool"],
        "psycopg_async": ["connection", "autocommit", "pool"],
        "sqlalchemy": ["connection", "session", "engine", "sessionmaker"],
        "sqlalchemy_async": ["connection", "session", "engine", "sessionmaker"],
        "asyncpg": ["connection", "session"],
    }.items()
    for kind in kinds
]


async def done(value: Any) -> Any:
    """The value itself, or what it gives when it must be awaited."""
    return await value if inspect.isawaitable(value) else value


@contextlib.asynccontextmanager
async def entered(manager: Any) -> AsyncIterator[Any]:
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


class Client:
    """A client of one kind, and the operations the tests need on what bind_agent_session() lends."""

    def __init__(self, kind: str, database: Database, user: str) -> None:
        self.driver, self.kind = kind.split("-")
        self.database = database
        self.user = user
        self.autocommit = self.kind == "autocommit"
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Client:
        self.client = await getattr(self, "_" + self.driver)()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    async def _psycopg(self) -> Any:
        dsn = self.database.dsn(self.user)
        if self.kind == "pool":
            return self._stack.enter_context(ConnectionPool(dsn, min_size=1, max_size=1, open=True))
        return self._stack.enter_context(psycopg.connect(dsn, autocommit=self.autocommit))

    async def _psycopg_async(self) -> Any:
        dsn = self.database.dsn(self.user)
        if self.kind == "pool":
            pool = AsyncConnectionPool(dsn, min_size=1, max_size=1, open=False)
            return await self._stack.enter_async_context(pool)
        connection = await psycopg.AsyncConnection.connect(dsn, autocommit=self.autocommit)
        return await self._stack.enter_async_context(connection)

    async def _sqlalchemy(self) -> Any:
        engine = create_engine(self.database.url(self.user), pool_size=1, max_overflow=0)
        self._stack.callback(engine.dispose)
        if self.kind == "connection":
            return self._stack.enter_context(engine.connect())
        if self.kind == "session":
            return self._stack.enter_context(sessionmaker(engine)())
        return engine if self.kind == "engine" else sessionmaker(engine)

    async def _sqlalchemy_async(self, driver: str = "postgresql+psycopg") -> Any:
        engine = create_async_engine(self.database.url(self.user, driver), pool_size=1, max_overflow=0)
        self._stack.push_async_callback(engine.dispose)
        if self.kind == "connection":
            return await self._stack.enter_async_context(engine.connect())
        if self.kind == "session":
            return await self._stack.enter_async_context(async_sessionmaker(engine)())
        return engine if self.kind == "engine" else async_sessionmaker(engine)

    async def _asyncpg(self) -> Any:
        return await self._sqlalchemy_async("postgresql+asyncpg")

    def bound(self, who: AgentCredential | str) -> Any:
        return entered(bind_agent_session(self.client, who))

    def unbound(self) -> Any:
        """What the next user of the same connection gets, without a binding."""
        if self.kind == "pool":
            return entered(self.client.connection())
        if self.kind == "engine":
            return entered(self.client.connect())
        if self.kind == "sessionmaker":
            return entered(self.client())
        return contextlib.nullcontext(self.client)

    async def rows(self, handle: Any, sql: str = "select content from vault order by content") -> list[str]:
        query: Any = sql if self.driver.startswith("psycopg") else text(sql)
        result = await done(handle.execute(query))
        return [row[0] for row in await done(result.fetchall())]

    async def run(self, handle: Any, sql: str) -> None:
        await done(handle.execute(sql if self.driver.startswith("psycopg") else text(sql)))

    async def commit(self, handle: Any) -> None:
        await done(handle.commit())

    async def rollback(self, handle: Any) -> None:
        await done(handle.rollback())


@pytest.fixture(params=KINDS)
async def client(request: pytest.FixtureRequest, vault: Vault) -> AsyncIterator[Client]:
    async with Client(request.param, vault.database, "pooled") as client:
        yield client


ONE = ["one-a", "one-b"]
TWO = ["two-a", "two-b"]


async def test_every_transaction_of_a_long_block_is_bound(client: Client, vault: Vault) -> None:
    async with client.bound(vault.one.credential) as handle:
        for _ in range(3):
            assert await client.rows(handle) == ONE
            await client.commit(handle)
            assert await client.rows(handle) == ONE
            await client.rollback(handle)


async def test_g2_nothing_of_the_binding_is_left_after_the_block(client: Client, vault: Vault) -> None:
    async with client.unbound() as handle:
        pid = await client.rows(handle, "select pg_backend_pid()")
        await client.rollback(handle)
    async with client.bound(vault.one.credential) as handle:
        assert await client.rows(handle, "select pg_backend_pid()") == pid
        assert await client.rows(handle) == ONE
    async with client.unbound() as handle:
        assert await client.rows(handle, "select pg_backend_pid()") == pid
        assert await client.rows(handle) == []
        assert await client.rows(handle, "select current_setting('kakunin.session', true)") == [""]
        await client.rollback(handle)
    async with client.bound(vault.two.credential) as handle:
        await client.rollback(handle)
        assert await client.rows(handle) == TWO


@pytest.mark.parametrize("statement", ["select 1/0", None], ids=["failed statement", "application's error"])
async def test_g2_an_exception_leaves_the_connection_clean(
    client: Client, vault: Vault, statement: str | None
) -> None:
    with pytest.raises(Exception, match="division by zero|the application's own"):
        async with client.bound(vault.one.credential) as handle:
            assert await client.rows(handle) == ONE
            if statement:
                await client.run(handle, statement)
            raise RuntimeError("the application's own")
    async with client.unbound() as handle:
        await client.rollback(handle)
        assert await client.rows(handle) == []
        await client.rollback(handle)
    async with client.bound(vault.two.credential) as handle:
        assert await client.rows(handle) == TWO


async def test_bound_rows_can_be_written_and_others_not(client: Client, vault: Vault) -> None:
    async with client.bound(vault.one.credential) as handle:
        insert = "insert into vault (permitted_agent_serial, content) values ('{}', 'new')"
        await client.run(handle, insert.format(vault.one.serial))
        await client.commit(handle)
        with pytest.raises(Exception, match="row-level security"):
            await client.run(handle, insert.format(vault.two.serial))
        await client.rollback(handle)
        assert await client.rows(handle) == ["new", *ONE]


async def test_g3_a_revoked_certificate_cannot_begin_a_transaction(client: Client, vault: Vault) -> None:
    async with client.bound(vault.one.credential) as handle:
        assert await client.rows(handle) == ONE
        await client.commit(handle)
        vault.one.revoke()
        if client.autocommit:  # its session is bound until the ticket expires, and sees nothing
            assert await client.rows(handle) == []
        else:
            with pytest.raises(kakunin_db.CertificateRevokedError) as caught:
                await client.rows(handle)
            assert caught.value.hint
            await client.rollback(handle)
    async with client.bound(vault.two.credential) as handle:
        assert await client.rows(handle) == TWO


async def test_g8_each_refusal_has_its_class(client: Client, vault: Vault) -> None:
    database = vault.database
    suspended = database.agent("suspended")
    suspended.suspend()
    unknown = AgentCredential(uuid.uuid4(), "AA:BB", vault.one.signer)
    impostor = AgentCredential(vault.two.agent_id, vault.two.serial, database.agent("impostor").signer)
    elsewhere = AgentCredential(vault.one.agent_id, vault.one.serial, vault.one.signer, uuid.uuid4())
    for credential, error in [
        (suspended.credential, kakunin_db.AgentSuspendedError),
        (unknown, kakunin_db.UnknownCertificateError),
        (impostor, kakunin_db.CredentialRejectedError),
        (elsewhere, kakunin_db.CredentialRejectedError),
    ]:
        with pytest.raises(error):
            async with client.bound(credential) as handle:
                await client.rows(handle)
        async with client.unbound() as handle:
            await client.rollback(handle)
            assert await client.rows(handle) == []
            await client.rollback(handle)


async def test_tickets_renew_before_they_expire(
    client: Client, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential = vault.one.credential
    signed = 0
    sign = credential.signer.sign

    def counted(digest: bytes) -> bytes:
        nonlocal signed
        signed += 1
        return sign(digest)

    monkeypatch.setattr(credential.signer, "sign", counted)
    clock = 0.0
    monkeypatch.setattr("kakunin_db.tickets.time.monotonic", lambda: clock)
    monkeypatch.setattr("kakunin_db.binding.bearer.time.monotonic", lambda: clock)
    async with client.bound(credential) as handle:
        for moment, expected in [(0, 1), (10, 1), (239, 1), (241, 2), (400, 2), (490, 3)]:
            clock = moment
            assert await client.rows(handle) == ONE
            await client.commit(handle)
            assert signed == expected
    if not client.autocommit:
        # A credential keeps its ticket from one binding to the next.
        async with client.bound(credential) as handle:
            assert await client.rows(handle) == ONE
    assert signed == 3


async def test_a_ticket_of_a_retired_key_is_replaced(client: Client, vault: Vault) -> None:
    credential = vault.one.credential
    async with client.bound(credential) as handle:
        assert await client.rows(handle) == ONE
        await client.rollback(handle)
    vault.database.run("operator", "select kakunin.rotate_session_key('0')")
    async with client.bound(credential) as handle:
        assert await client.rows(handle) == ONE


@pytest.mark.parametrize("client", [k for k in KINDS if k.split("-")[1] not in FACTORIES], indirect=True)
async def test_binding_twice_is_refused(client: Client, vault: Vault) -> None:
    async with client.bound(vault.one.credential) as handle:
        with pytest.raises(kakunin_db.BadInputError, match="bound already"):
            async with client.bound(vault.two.credential):
                pass
        assert await client.rows(handle) == ONE


@pytest.mark.parametrize(
    "client", [k for k in KINDS if k.split("-")[1] not in [*FACTORIES, "autocommit"]], indirect=True
)
async def test_binding_inside_an_open_transaction_ends_with_the_block(client: Client, vault: Vault) -> None:
    assert await client.rows(client.client) == []
    async with client.bound(vault.one.credential) as handle:
        assert await client.rows(handle) == ONE
    assert await client.rows(client.client) == []
    await client.rollback(client.client)


async def test_a_kit_error_leaving_the_block_is_named(client: Client, vault: Vault) -> None:
    with pytest.raises(kakunin_db.ScopeViolationError) as caught:
        async with client.bound(vault.one.credential) as handle:
            await client.run(handle, "select kakunin.require_scope('launch:missiles')")
    assert caught.value.sqlstate == "KA005"
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.endswith("autocommit")])
async def test_a_gateway_binds_by_serial(kind: str, vault: Vault) -> None:
    async with Client(kind, vault.database, "gateway") as client:
        for agent, rows in [(vault.one, ONE), (vault.two, TWO)]:
            async with client.bound(agent.serial.lower().replace(":", "")) as handle:
                assert await client.rows(handle) == rows
                await client.commit(handle)
                assert await client.rows(handle) == rows
                await client.commit(handle)


@pytest.mark.parametrize("kind", KINDS)
async def test_g2_an_agent_cannot_bind_by_serial(kind: str, vault: Vault) -> None:
    async with Client(kind, vault.database, "agent_1") as client:
        with pytest.raises(Exception, match="permission denied|autocommit"):
            async with client.bound(vault.two.serial) as handle:
                await client.rows(handle)


# psycopg's own ways to run statements and begin transactions ------------------------------------------


def test_every_way_to_run_a_statement_is_bound(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        with bind_agent_session(connection, vault.one.credential):
            query = "select content from vault order by content"
            with connection.cursor() as cursor:
                assert [r[0] for r in cursor.stream(query)] == ONE
                connection.rollback()
                with cursor.copy("copy (select content from vault order by content) to stdout") as copy:
                    assert [r[0] for r in copy.rows()] == ONE
                connection.rollback()
                cursor.executemany(
                    "select content from vault where content = %s", [["one-a"]], returning=True
                )
                assert cursor.fetchall() == [("one-a",)]
                connection.rollback()
            with connection.cursor("named") as cursor:
                assert [r[0] for r in cursor.execute(query)] == ONE
            connection.rollback()
            with connection.pipeline():
                assert [r[0] for r in connection.execute(query).fetchall()] == ONE
            connection.rollback()
        assert connection.execute(query).fetchall() == []


@pytest.mark.parametrize("autocommit", [False, True])
def test_transaction_blocks_are_bound(vault: Vault, autocommit: bool) -> None:
    query = "select content from vault order by content"
    with vault.database.connect("pooled", autocommit=autocommit) as connection:
        with bind_agent_session(connection, vault.one.credential):
            for _ in range(2):
                with connection.transaction():
                    assert [r[0] for r in connection.execute(query)] == ONE
                    with pytest.raises(ZeroDivisionError), connection.transaction():
                        raise ZeroDivisionError
                    assert [r[0] for r in connection.execute(query)] == ONE
        assert connection.execute(query).fetchall() == []


async def test_async_transaction_blocks_are_bound(vault: Vault) -> None:
    query = "select content from vault order by content"
    async with await psycopg.AsyncConnection.connect(vault.database.dsn("pooled")) as connection:
        async with bind_agent_session(connection, vault.one.credential):
            for _ in range(2):
                async with connection.transaction():
                    assert [r[0] async for r in await connection.execute(query)] == ONE
            async with connection.cursor() as cursor:
                assert [r[0] async for r in cursor.stream(query)] == ONE
                async with cursor.copy("copy (select content from vault order by content) to stdout") as copy:
                    assert [r[0] async for r in copy.rows()] == ONE
        assert await (await connection.execute(query)).fetchall() == []


def test_a_gateway_may_use_transaction_blocks_in_autocommit(vault: Vault) -> None:
    with vault.database.connect("gateway", autocommit=True) as connection:
        with bind_agent_session(connection, vault.one.serial):
            with connection.transaction():
                assert len(connection.execute("select from vault").fetchall()) == 2
            with pytest.raises(kakunin_db.BadInputError, match="autocommit"):
                connection.execute("select from vault")


def test_g2_a_session_binding_does_not_come_back_with_a_rollback(vault: Vault) -> None:
    """A transaction begun by hand is rolled back with the block: later, that would restore the binding."""
    with vault.database.connect("pooled", autocommit=True) as connection:
        with bind_agent_session(connection, vault.one.credential):
            assert len(connection.execute("select from vault").fetchall()) == 2
            connection.execute("begin")
        assert connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert connection.execute("select from vault").fetchall() == []
        assert type(connection.cursor()) is psycopg.Cursor


def test_g2_a_savepoint_rolled_back_after_the_block_brings_nothing_back(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        connection.execute("savepoint outside")
        with bind_agent_session(connection, vault.one.credential):
            assert len(connection.execute("select from vault").fetchall()) == 2
        connection.execute("rollback to outside")
        assert connection.execute("select from vault").fetchall() == []


def test_read_only_connections_bind(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        connection.read_only = True
        with bind_agent_session(connection, vault.one.credential):
            assert len(connection.execute("select from vault").fetchall()) == 2


def test_binding_costs_no_round_trip(vault: Vault) -> None:
    def round_trips(connection: psycopg.Connection[Any]) -> int:
        """How often the client waits for the server in a transaction of one statement."""
        with tempfile.NamedTemporaryFile() as trace:
            connection.pgconn.trace(trace.fileno())
            connection.execute("select 1")
            connection.rollback()
            connection.pgconn.untrace()
            senders = [line.split("\t")[1] for line in Path(trace.name).read_text().splitlines()]
        return sum(a == "F" and b == "B" for a, b in itertools.pairwise(senders))

    cluster, name = vault.database.cluster, vault.database.name
    with (
        far_away(cluster.port, 0.02) as port,
        psycopg.connect(host="127.0.0.1", port=port, dbname=name, user="pooled", prepare_threshold=None) as c,
    ):
        unbound = round_trips(c)
        with bind_agent_session(c, vault.one.credential):
            c.execute("select 1")
            c.rollback()
            assert round_trips(c) == unbound


def test_g2_the_ticket_never_stands_in_a_statements_text(vault: Vault) -> None:
    """pg_stat_activity shows a statement's text to every session of the same login."""
    connection = vault.database.connect("pooled", cursor_factory=psycopg.ClientCursor)
    with connection, vault.database.connect("pooled", autocommit=True) as watcher:
        with bind_agent_session(connection, vault.one.credential), connection.transaction():
            query = "select query from pg_stat_activity where pid = %s"
            (text_seen,) = watcher.execute(query, [connection.info.backend_pid]).fetchone()
        assert "kakunin.bind_session($1, true)" in text_seen


def test_drivers_that_interpolate_are_refused(vault: Vault) -> None:
    engine = create_engine("sqlite://")
    with (
        pytest.raises(kakunin_db.BadInputError, match="driver"),
        bind_agent_session(engine, vault.one.credential) as c,
    ):
        c.execute(text("select 1"))
    engine.dispose()  # sqlite3's connections say from Python 3.13 on where they are not closed
    with pytest.raises(kakunin_db.BadInputError, match="cannot bind"):
        bind_agent_session(object(), vault.one.credential)  # type: ignore[call-overload]


def test_sqlalchemy_autocommit_is_refused(vault: Vault) -> None:
    engine = create_engine(vault.database.url("pooled"), isolation_level="AUTOCOMMIT")
    with (
        pytest.raises(kakunin_db.BadInputError, match="AUTOCOMMIT"),
        bind_agent_session(engine, vault.one.credential) as c,
    ):
        c.execute(text("select 1"))
    engine.dispose()


def test_savepoints_of_a_session_keep_the_binding(vault: Vault) -> None:
    engine = create_engine(vault.database.url("pooled"))
    with bind_agent_session(sessionmaker(engine), vault.one.credential) as session:
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            assert len(session.execute(text("select from vault")).all()) == 2
            raise ZeroDivisionError
        assert len(session.execute(text("select from vault")).all()) == 2
    engine.dispose()


def test_a_pinned_installation_is_kept_to(vault: Vault) -> None:
    one: Agent = vault.one
    pinned = AgentCredential(one.agent_id, one.serial, one.signer, vault.database.installation_id)
    with vault.database.connect("pooled") as connection, bind_agent_session(connection, pinned):
        assert len(connection.execute("select from vault").fetchall()) == 2


def test_a_server_that_goes_away_is_an_error_and_not_a_hang(vault: Vault) -> None:
    with vault.database.connect("pooled") as connection:
        with pytest.raises(psycopg.OperationalError), bind_agent_session(connection, vault.one.credential):
            connection.execute("select 1")
            connection.rollback()
            pid = connection.info.backend_pid
            vault.database.run("postgres", "select pg_terminate_backend(%s, 10000)", [pid])
            connection.execute("select 1")
        assert connection.closed


@pytest.mark.parametrize("autocommit", [False, True])
def test_g2_a_planted_prepared_statement_is_not_handed_the_ticket(vault: Vault, autocommit: bool) -> None:
    """psycopg's names for prepared statements can be guessed, and SQL can put others under them."""
    agent = vault.one.credential
    with vault.database.connect("pooled", prepare_threshold=0, autocommit=autocommit) as connection:
        with bind_agent_session(connection, vault.two.credential):
            connection.execute("create temp table loot (ticket text)")
            connection.execute("deallocate all")
            for i in range(40):
                connection.execute(f"prepare _pg3_{i}(text) as insert into loot values ($1)", prepare=False)
            connection.commit()
        with bind_agent_session(connection, agent):
            connection.execute("select 1", prepare=False)
            assert connection.execute("select * from loot", prepare=False).fetchall() == []


@pytest.mark.parametrize(
    "client", [k for k in KINDS if k.split("-")[1] not in [*FACTORIES, "autocommit"]], indirect=True
)
async def test_g2_two_agents_do_not_share_a_transaction(client: Client, vault: Vault) -> None:
    """What the first one's SQL leaves for the commit would run under the second one's binding."""
    async with client.bound(vault.one.credential) as handle:
        assert await client.rows(handle) == ONE
    with pytest.raises(kakunin_db.BadInputError, match="open transaction"):
        async with client.bound(vault.two.credential) as handle:
            await client.rows(handle)
    async with client.bound(vault.one.credential) as handle:
        assert await client.rows(handle) == ONE
    await client.commit(client.client)
    assert await client.rows(client.client) == []  # opens another transaction, which nobody was bound in
    async with client.bound(vault.two.credential) as handle:
        assert await client.rows(handle) == TWO


def test_a_transaction_left_open_by_hand_does_not_keep_the_next_agent_out(vault: Vault) -> None:
    dsn = vault.database.dsn("pooled")
    with ConnectionPool(dsn, min_size=1, max_size=1, kwargs={"autocommit": True}) as pool:
        with pytest.raises(ZeroDivisionError), bind_agent_session(pool, vault.one.credential) as connection:
            connection.execute("select 1")
            connection.execute("begin")
            raise ZeroDivisionError
        with bind_agent_session(pool, vault.two.credential) as connection:
            cursor = psycopg.Cursor(connection)
            assert cursor.execute("select from vault").fetchall() == []  # no hook, no binding
            assert len(connection.execute("select from vault").fetchall()) == 2


def test_autocommit_inside_a_transaction_block_binds_that_transaction(vault: Vault) -> None:
    with vault.database.connect("pooled", autocommit=True) as connection:
        with connection.transaction():
            with bind_agent_session(connection, vault.one.credential):
                assert len(connection.execute("select from vault").fetchall()) == 2
            assert connection.execute("select from vault").fetchall() == []
        assert connection.execute("select from vault").fetchall() == []


async def test_g2_asyncpg_keeps_no_statement_of_the_binder(vault: Vault) -> None:
    """Under a name kept for later, SQL on the connection could put a statement that takes the ticket."""
    async with Client("asyncpg-connection", vault.database, "pooled") as client:
        named = "select name from pg_prepared_statements where statement ~ 'kakunin' order by prepare_time"
        async with client.bound(vault.one.credential) as handle:
            before = set(await client.rows(handle, named))
            await client.commit(handle)
            thief = (
                "do $$ declare n text; begin for n in select name from pg_prepared_statements"
                " where statement ~ 'bind_session' loop execute format('deallocate %I', n);"
                " execute format('prepare %I(text) as select set_config(''stolen.ticket'', $1, false)', n);"
                " end loop; end $$"
            )
            await client.run(handle, thief)
            await client.commit(handle)
        assert before
        async with client.bound(vault.one.credential) as handle:
            assert await client.rows(handle) == ONE
            assert await client.rows(handle, "select current_setting('stolen.ticket', true)") == [None]


@pytest.mark.parametrize(
    "client",
    ["asyncpg-connection", *(k for k in KINDS if k.startswith("psycopg") and "autocommit" not in k)],
    indirect=True,
)
async def test_g2_a_connection_that_answers_for_another_is_closed(
    client: Client, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = "select pg_backend_pid()"
    async with client.unbound() as handle:
        before = await client.rows(handle, backend)
        await client.rollback(handle)
    monkeypatch.setattr("kakunin_db.binding.bearer.BIND_TICKET", "select coalesce('AA:BB', %s)")
    with pytest.raises(kakunin_db.CredentialRejectedError, match="in place of"):
        async with client.bound(vault.one.credential) as handle:
            await client.rows(handle, "select 1")
    monkeypatch.undo()
    if client.driver == "asyncpg":  # SQLAlchemy has taken another connection in its place
        assert await client.rows(client.client, backend) != before
    elif client.kind == "connection":
        assert client.client.closed
    else:  # the pool makes another
        async with client.bound(vault.one.credential) as handle:
            assert await client.rows(handle) == ONE


def test_client_encoding_left_by_sql_does_not_break_the_next_binding(vault: Vault) -> None:
    with vault.database.connect("pooled", autocommit=True) as connection:
        connection.execute("set client_encoding = 'SQL_ASCII'")
        with bind_agent_session(connection, vault.one.credential):
            assert len(connection.execute("select from vault").fetchall()) == 2
