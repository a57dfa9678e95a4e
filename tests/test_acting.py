"""Clients that act for an agent: events, its risk, and guarded functions. Fail closed, whatever fails."""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from clients import HOW, Client, Kind, Opener, opener, pooled
from conftest import Database
from psycopg_pool import ConnectionPool, PoolTimeout

from kakunin_db import (
    AgentCredential,
    AgentSuspendedError,
    AsyncKakunin,
    BadInputError,
    CertificateRevokedError,
    CertificateValidityError,
    CredentialRejectedError,
    Kakunin,
    KakuninError,
    LocalSigner,
    ScopeGuard,
    ScopeViolationError,
    SignerUnavailableError,
    UnknownCertificateError,
    VerificationUnavailableError,
    bind_agent_session,
    verify_agent_scope,
)

SCOPES = ["trade.execute", "data:*"]


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def open_client(kind: Kind, database: Database) -> Iterator[Opener]:
    with opener(kind, database) as open_client:
        yield open_client


# Events ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_an_event_of_the_agent(open_client: Opener, database: Database, how: str) -> None:
    agent = database.agent()
    client = open_client("agent_1", how, credential=agent.credential)
    before = dt.datetime.now(dt.timezone.utc) - dt.timedelta(minutes=1)
    made = client.events.create("data_access", {"table": "orders", "rows": 12}, session_id="s-1")
    assert (made.agent_id, made.event_type, made.session_id) == (agent.agent_id, "data_access", "s-1")
    assert (made.score, made.band, made.agent_score, made.agent_band) == (0.1, "low", 0.0, "low")
    assert made.factors == {}
    assert made.revoked is None
    assert made.metadata == {"table": "orders", "rows": 12}
    assert before < made.recorded_at < dt.datetime.now(dt.timezone.utc) + dt.timedelta(minutes=1)
    second = client.events.ingest("unauthorized_access_attempt", agent_id=agent.agent_id)
    assert (second.prev, second.sequence, second.metadata) == (made.hash, made.sequence + 1, {})
    assert (second.score, second.band) == (0.75, "high")
    # What is listed is what was returned.
    assert client.events.list() == [second, made]


def test_what_an_auditor_lists(open_client: Opener, database: Database) -> None:
    agents = [database.agent(), database.agent()]
    made = []
    for agent in agents:
        acting = open_client("agent_1", credential=agent.credential)
        made += [acting.events.create("api_call", {"n": n}) for n in range(3)]
        made.append(acting.events.create("transaction_anomaly"))
    # Newest first.
    made.reverse()
    auditor = open_client("auditor")
    assert auditor.events.list(limit=8) == made
    assert auditor.events.list(agent_id=agents[0].agent_id) == made[4:]
    assert auditor.events.list(agent_id=str(agents[1].agent_id), band="high") == made[:1]
    assert auditor.events.list(event_type="api_call", before=made[2].event_id, limit=2) == [made[3], made[5]]
    assert auditor.events.list(event_type="unheard_of") == []
    recorded = database.value(
        "auditor",
        "select metadata from kakunin.audit_log where event_type = 'ledger.read'"
        " order by event_id desc limit 1",
    )
    assert recorded == {"command": "list", "details": {"event_type": "unheard_of"}}
    # An agent sees its own, whatever it asks for.
    acting = open_client("agent_1", credential=agents[0].credential)
    assert acting.events.list(agent_id=agents[1].agent_id) == []
    assert acting.events.list(limit=100) == made[4:]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        open_client("agent_1").events.list()


def test_an_agent_whose_login_is_an_auditors_lists_its_own(open_client: Opener, database: Database) -> None:
    """Who acts for an agent reads as it: what all wrote is for an auditor, whose reading is recorded."""
    agent, other = database.agent(), database.agent()
    open_client("agent_1", credential=other.credential).events.create("api_call")
    with database.connect("postgres", autocommit=True) as admin:
        admin.execute("grant kakunin_auditor to agent_2")
        try:
            acting = open_client("agent_2", credential=agent.credential)
            made = acting.events.create("api_call")
            assert acting.events.list() == [made]
            assert acting.events.list(agent_id=other.agent_id) == []
        finally:
            admin.execute("revoke kakunin_auditor from agent_2")


@pytest.mark.parametrize(
    ("event_type", "options"),
    [
        ("agent.halted", {}),
        ("", {}),
        ("x", {"metadata": {"a": object()}}),
        ("x", {"metadata": {"a": float("nan")}}),
        ("x", {"metadata": {"a": "x" * 20000}}),
        ("x", {"occurred_at": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)}),
        ("x", {"agent_id": "nobody"}),
    ],
    ids=["kit's", "none", "object", "nan", "large", "long ago", "agent"],
)
def test_an_event_that_is_none(
    open_client: Opener, database: Database, event_type: str, options: dict[str, Any]
) -> None:
    agent = database.agent()
    client = open_client("agent_1", credential=agent.credential)
    with pytest.raises(BadInputError):
        client.events.create(event_type, **options)
    assert client.events.list() == []


def test_an_event_is_of_the_agent_that_is_meant(open_client: Opener, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    client = open_client("agent_1", credential=agent.credential)
    with pytest.raises(ScopeViolationError, match=str(other.agent_id)):
        client.events.create("x", agent_id=other.agent_id)
    assert client.events.list() == []


def test_nobody_acts_without_a_binding(open_client: Opener, database: Database) -> None:
    client = open_client("agent_1")
    for call in (lambda: client.events.create("x"), lambda: client.run(client.real.check_risk_score())):
        with pytest.raises(CredentialRejectedError):
            call()


@pytest.mark.parametrize("how", HOW)
def test_a_gateway_acts_by_serial(open_client: Opener, database: Database, how: str) -> None:
    agent = database.agent()
    made = open_client("gateway", how, credential=agent.serial).events.create("api_call")
    assert made.agent_id == agent.agent_id
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        open_client("agent_1", how, credential=agent.serial).events.create("api_call")


def test_a_connection_that_is_bound_already(database: Database) -> None:
    agent = database.agent()
    with database.connect("agent_1") as connection, bind_agent_session(connection, agent.credential) as bound:
        client = Kakunin(bound)
        made = client.events.create("api_call")
        assert client.events.list() == [made]
        assert client.check_risk_score().agent_id == agent.agent_id
        bound.rollback()
        assert client.events.list() == []  # it was in the caller's transaction

    async def asynchronous() -> None:
        async with (
            await psycopg.AsyncConnection.connect(database.dsn("agent_1")) as connection,
            bind_agent_session(connection, agent.credential) as bound,
        ):
            client = AsyncKakunin(bound)
            made = await client.events.create("api_call")
            assert await client.events.list() == [made]

    asyncio.run(asynchronous())


def test_nothing_is_left_bound(database: Database) -> None:
    agent = database.agent()
    with ConnectionPool(database.dsn("agent_1"), min_size=1, max_size=1, open=True) as pool:
        Kakunin(pool, credential=agent.credential).events.create("api_call")
        with pool.connection() as connection:
            assert connection.execute("select kakunin.current_cert_serial()").fetchone() == (None,)
            assert connection.execute("select current_setting('kakunin.session', true)").fetchone() in [
                ("",),
                (None,),
            ]
    with database.connect("agent_1", autocommit=True) as connection:
        Kakunin(connection, credential=agent.credential).events.create("api_call")
        assert connection.execute("select kakunin.current_cert_serial()").fetchone() == (None,)


def test_clients_that_share_a_connection_do_not_act_for_each_other(database: Database) -> None:
    """One acts for an agent and another for nobody, from threads of their own."""
    agent = database.agent()
    with database.connect("agent_1", autocommit=True) as connection:
        acting, nobody = Kakunin(connection, credential=agent.credential), Kakunin(connection)
        done = threading.Event()
        wrong: list[BaseException] = []

        def act() -> None:
            try:
                for _ in range(100):
                    acting.require_agent_scope()
            except BaseException as error:
                wrong.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=act)
        thread.start()
        asked = 0
        while not done.is_set() or asked < 100:
            with pytest.raises(CredentialRejectedError):
                nobody.require_agent_scope()
            asked += 1
        thread.join()
        assert not wrong


# Risk ------------------------------------------------------------------------------------------------


def test_the_risk_of_an_agent(open_client: Opener, database: Database) -> None:
    agent = database.agent()
    acting = open_client("agent_1", credential=agent.credential)
    risk = acting.run(acting.real.check_risk_score())
    assert (risk.agent_id, risk.score, risk.band, risk.events) == (agent.agent_id, 0.0, "low", 0)
    assert (risk.trend, risk.drift, risk.window_days) == ("insufficient_data", None, 30)
    acting.events.create("transaction_anomaly")
    acting.events.create("transaction_anomaly")
    said = open_client("operator").agents.risk(agent.agent_id)
    assert 0.5 < said.score < 0.85
    assert said.by_event_type["transaction_anomaly"]["events"] == 2
    assert said.recommendation
    with pytest.raises(BadInputError, match="no agent"):
        open_client("operator").agents.risk(uuid.UUID(int=7))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        acting.agents.risk(agent.agent_id)


# What is permitted ---------------------------------------------------------------------------------------


def test_whether_it_may(open_client: Opener, database: Database) -> None:
    agent = database.agent(
        permitted_actions=SCOPES, financial_scope={"max_single_trade_usd": 1000, "permitted_venues": ["XLON"]}
    )
    client = open_client("agent_1", credential=agent.credential)

    def ask(*args: Any, **kwargs: Any) -> Any:
        return client.run(client.real.verify_agent_scope(*args, **kwargs))

    decision = ask("trade.execute", amount_usd=900, venue="XLON")
    assert decision.allowed
    assert (decision.agent_id, decision.certificate_serial) == (agent.agent_id, agent.serial)
    assert (decision.code, decision.risk_band) == (None, "low")
    for refused in (
        ask("trade.cancel"),
        ask("trade.execute.all"),
        ask("trade.execute", amount_usd=1001),
        ask("trade.execute", venue="XNYS"),
    ):
        assert not refused.allowed
        assert refused.code == "KA005"
        assert refused.reason
    agent.revoke()
    # The binding says it.
    with pytest.raises(CertificateRevokedError):
        ask("trade.execute")


def guard_of(client: Client, agent: Any = None, **options: Any) -> Callable[[], Any]:
    """Calls a guarded function of the client's kind; it counts in ``ran`` how often its body has run."""
    options = {"required_scopes": ["trade.execute", "data:read"]} | options
    if client.loop:

        @verify_agent_scope(client.real, agent, **options)
        async def body() -> str:
            call.ran += 1  # type: ignore[attr-defined]
            return "done"
    else:

        @verify_agent_scope(client.real, agent, **options)
        def body() -> str:
            call.ran += 1  # type: ignore[attr-defined]
            return "done"

    def call() -> Any:
        return client.run(body())

    call.ran = 0  # type: ignore[attr-defined]
    return call


@pytest.mark.parametrize("how", HOW)
def test_a_guarded_function(open_client: Opener, database: Database, how: str) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    client = open_client("agent_1", how, credential=agent.credential)
    for guarded in (
        guard_of(client),
        guard_of(client, agent.agent_id),
        guard_of(client, str(agent.agent_id)),
    ):
        assert guarded() == "done"
        assert guarded.ran == 1  # type: ignore[attr-defined]
    assert guard_of(client, required_scopes=None)() == "done"
    for scopes in (
        ["trade.execute", "admin"],
        ["trade"],
        ["trade.execute "],
        ["data"],
        ["*"],
        ["data:*", "x:*"],
    ):
        refused = guard_of(client, required_scopes=scopes)
        with pytest.raises(ScopeViolationError) as caught:
            refused()
        assert caught.value.hint == "Have the agent certified for this action, or do not attempt it."
        assert refused.ran == 0  # type: ignore[attr-defined]
    another = guard_of(client, uuid.UUID(int=7))
    with pytest.raises(ScopeViolationError, match="acts for agent"):
        another()
    assert another.ran == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("scopes", [None, ["trade.execute"]])
def test_g3_between_two_calls(open_client: Opener, database: Database, scopes: list[str] | None) -> None:
    """Suspended, reinstated, revoked: each holds from the next call on."""
    agent = database.agent(permitted_actions=SCOPES)
    guarded = guard_of(open_client("agent_1", credential=agent.credential), required_scopes=scopes)
    assert guarded() == "done"
    database.run("operator", "select kakunin.suspend_agent(%s, 'why')", [agent.agent_id])
    with pytest.raises(AgentSuspendedError):
        guarded()
    database.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert guarded() == "done"
    agent.revoke()
    for _ in range(2):
        with pytest.raises(CertificateRevokedError):
            guarded()
    assert guarded.ran == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", ["REPEATABLE_READ", "SERIALIZABLE"])
def test_g3_a_snapshot_is_no_answer(database: Database, level: str) -> None:
    """In a transaction of the caller's that still sees how things were."""
    agent = database.agent(permitted_actions=SCOPES)
    with database.connect("agent_1") as connection:
        connection.isolation_level = psycopg.IsolationLevel[level]
        with bind_agent_session(connection, agent.credential):
            guard = ScopeGuard(Kakunin(connection), None, SCOPES[:1])
            guard.check()
            agent.revoke()
            for _ in range(2):
                with pytest.raises(VerificationUnavailableError, match="how things were when it began"):
                    guard.check()
            connection.rollback()
            with pytest.raises(CertificateRevokedError):
                guard.check()

    async def asynchronous() -> None:
        agent = database.agent(permitted_actions=SCOPES)
        async with await psycopg.AsyncConnection.connect(database.dsn("agent_1")) as connection:
            await connection.set_isolation_level(psycopg.IsolationLevel[level])
            async with bind_agent_session(connection, agent.credential):
                guard = ScopeGuard(AsyncKakunin(connection))
                await guard.acheck()
                agent.revoke()
                with pytest.raises(VerificationUnavailableError):
                    await guard.acheck()

    asyncio.run(asynchronous())


def test_who_cannot_prove_it(open_client: Opener, database: Database) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    expired = database.agent(permitted_actions=SCOPES)
    database.run(
        "postgres",
        "update kakunin_private.certificates set not_after = now() - interval '1 second' where serial = %s",
        [expired.serial],
    )
    for credential, error in (
        (AgentCredential(agent.agent_id, agent.serial, LocalSigner.generate()), CredentialRejectedError),
        (AgentCredential(agent.agent_id, "0A:0B", agent.signer), UnknownCertificateError),
        (expired.credential, CertificateValidityError),
        (None, CredentialRejectedError),
    ):
        guarded = guard_of(open_client("agent_1", credential=credential))
        with pytest.raises(error):
            guarded()
        assert guarded.ran == 0  # type: ignore[attr-defined]


def test_a_key_that_does_not_answer(open_client: Opener, database: Database) -> None:
    class Down(LocalSigner):
        def sign(self, message: bytes) -> bytes:
            raise SignerUnavailableError("the KMS does not answer")

    agent = database.agent(permitted_actions=SCOPES)
    signer = Down(agent.signer._key)
    credential = AgentCredential(agent.agent_id, agent.serial, signer)
    guarded = guard_of(open_client("agent_1", credential=credential))
    with pytest.raises(SignerUnavailableError):
        guarded()
    assert guarded.ran == 0  # type: ignore[attr-defined]


def test_g8_a_database_that_is_down(kind: Kind, database: Database) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        dsn = f"host=127.0.0.1 port={unused.getsockname()[1]} dbname=x user=agent_1"
        client = Client(kind, dsn, credential=agent.credential, timeout=1)
        guarded = guard_of(client)
        with pytest.raises(VerificationUnavailableError) as caught:
            guarded()
        assert isinstance(caught.value.__cause__, psycopg.OperationalError)
        assert guarded.ran == 0  # type: ignore[attr-defined]
        client.close()


@pytest.fixture
def silent(database: Database) -> Iterator[Any]:
    """Takes connections to the database through, until told to say nothing more."""
    target = psycopg.conninfo.conninfo_to_dict(database.dsn("agent_1"))
    quiet = threading.Event()
    path = f"{target['host']}/.s.PGSQL.{target['port']}"
    listener = socket.create_server(("127.0.0.1", 0))
    open_sockets: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket, mute: bool) -> None:
        try:
            while data := source.recv(65536):
                if mute and quiet.is_set():
                    continue
                sink.sendall(data)
        except OSError:
            pass

    def serve() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(path)
            open_sockets.extend((near, far))
            threading.Thread(target=pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=pump, args=(far, near, True), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    port = listener.getsockname()[1]
    yield f"host=127.0.0.1 port={port} dbname={target['dbname']} user=agent_1 sslmode=disable", quiet
    for each in open_sockets:
        each.close()


@pytest.mark.parametrize("how", ["dsn", "pool"])
def test_g8_a_database_that_says_nothing_more(kind: Kind, database: Database, silent: Any, how: str) -> None:
    """A deadline ends the wait, and with it the connection: a late answer is no one's."""
    dsn, quiet = silent
    agent = database.agent(permitted_actions=SCOPES)
    target = dsn if how == "dsn" else pooled(dsn)
    client = Client(kind, target, credential=agent.credential, timeout=1)
    guarded = guard_of(client)
    assert guarded() == "done"
    quiet.set()
    begun = time.monotonic()
    with pytest.raises(VerificationUnavailableError, match="LateError"):
        guarded()
    assert 0.9 < time.monotonic() - begun < 15
    assert guarded.ran == 1  # type: ignore[attr-defined]
    quiet.clear()
    assert guarded() == "done"
    client.close()


def test_g8_a_statement_past_its_deadline(open_client: Opener, database: Database) -> None:
    """Something holds what the check has to read."""
    agent = database.agent(permitted_actions=SCOPES)
    client = open_client("agent_1", credential=agent.credential, timeout=1)
    guarded = guard_of(client)
    with database.connect("postgres") as admin:
        admin.execute("lock table kakunin_private.certificates in access exclusive mode")
        with pytest.raises(VerificationUnavailableError, match="LateError"):
            guarded()
    assert guarded.ran == 0  # type: ignore[attr-defined]
    assert guarded() == "done"


def test_g8_a_pool_has_none_left(database: Database) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    with (
        ConnectionPool(database.dsn("agent_1"), min_size=1, max_size=1, open=True) as pool,
        pool.connection(),
    ):
        guard = ScopeGuard(Kakunin(pool, credential=agent.credential, timeout=0.5))
        with pytest.raises(VerificationUnavailableError) as caught:
            guard.check()
        assert isinstance(caught.value.__cause__, PoolTimeout)


def test_the_lock_is_waited_for_no_longer(database: Database, silent: Any) -> None:
    """One connection for many threads: those behind one that waits are refused as well, and in time."""
    dsn, quiet = silent
    agent = database.agent(permitted_actions=SCOPES)
    with Kakunin(dsn, credential=agent.credential, timeout=1) as kakunin:
        guard = ScopeGuard(kakunin)
        guard.check()
        quiet.set()
        ended: list[float] = []

        def check() -> None:
            begun = time.monotonic()
            with pytest.raises(VerificationUnavailableError):
                guard.check()
            ended.append(time.monotonic() - begun)

        threads = [threading.Thread(target=check) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ended) == 4
        assert max(ended) < 15


def test_functions_of_every_kind(database: Database) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    ran: list[str] = []

    async def asynchronous() -> None:
        with Kakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
            async with AsyncKakunin(database.dsn("agent_1"), credential=agent.credential) as both:
                for client in (kakunin, both):

                    @verify_agent_scope(client)
                    async def coroutine(x: int) -> int:
                        ran.append("coroutine")
                        return x

                    @verify_agent_scope(client)
                    async def items(x: int) -> Any:
                        ran.append("items")
                        yield x

                    assert inspect.iscoroutinefunction(coroutine)
                    assert inspect.isasyncgenfunction(items)
                    assert await coroutine(7) == 7
                    assert [x async for x in items(8)] == [8]
                    calls.append((coroutine, items))

                @verify_agent_scope(kakunin)
                def generator(x: int) -> Any:
                    ran.append("generator")
                    got = yield x
                    return got

                class Tool:
                    @verify_agent_scope(kakunin, required_scopes=["trade.execute"])
                    def method(self, x: int) -> int:
                        """What it does."""
                        ran.append("method")
                        return x

                assert inspect.isgeneratorfunction(generator)
                running = generator(1)
                assert next(running) == 1
                with pytest.raises(StopIteration) as stop:
                    running.send("sent")
                assert stop.value.value == "sent"
                assert Tool().method(3) == 3
                assert Tool.method.__doc__ == "What it does."
                begun = generator(1)
                agent.revoke()
                ran.clear()
                with pytest.raises(CertificateRevokedError):
                    next(begun)
                with pytest.raises(CertificateRevokedError):
                    Tool().method(3)
                for coroutine, items in calls:
                    with pytest.raises(CertificateRevokedError):
                        await coroutine(1)
                    with pytest.raises(CertificateRevokedError):
                        await anext(items(1))
                assert ran == []

    calls: list[tuple[Any, Any]] = []
    asyncio.run(asynchronous())


def test_a_guarded_generator_is_the_function_s(database: Database) -> None:
    """What is sent and thrown arrives, and its end is at once."""
    agent = database.agent()
    ran: list[Any] = []

    async def asynchronous() -> None:
        async with AsyncKakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:

            @verify_agent_scope(kakunin)
            async def items() -> Any:
                try:
                    ran.append((yield 1))
                    try:
                        yield 2
                    except KeyError as error:
                        ran.append(error.args[0])
                    yield 3
                finally:
                    ran.append("closed")

            running = items()
            assert await anext(running) == 1
            assert await running.asend("sent") == 2
            assert await running.athrow(KeyError("thrown")) == 3
            await running.aclose()
            assert ran == ["sent", "thrown", "closed"]
            assert [x async for x in items()] == [1, 2, 3]

    asyncio.run(asynchronous())


def test_what_cannot_be_guarded(database: Database) -> None:
    agent = database.agent(permitted_actions=SCOPES)
    client = AsyncKakunin(database.dsn("agent_1"), credential=agent.credential)
    with pytest.raises(BadInputError, match="async"):
        verify_agent_scope(client)(lambda: None)
    with pytest.raises(BadInputError, match="async"):
        ScopeGuard(client).check()
    for guard in (
        lambda: ScopeGuard(None),  # type: ignore[arg-type]
        lambda: ScopeGuard(Kakunin(database.dsn("agent_1")), "no uuid"),
        lambda: ScopeGuard(Kakunin(database.dsn("agent_1")), required_scopes="trade.execute"),
        lambda: ScopeGuard(Kakunin(database.dsn("agent_1")), required_scopes=[""]),
        lambda: ScopeGuard(Kakunin(database.dsn("agent_1")), required_scopes=[None]),  # type: ignore[list-item]
        lambda: Kakunin(database.dsn("agent_1"), timeout=0),
        lambda: AsyncKakunin(database.dsn("agent_1"), timeout=float("inf")),
    ):
        with pytest.raises(BadInputError):
            guard()


def test_an_answer_of_another_kind_is_no_permission(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in between, the body does not run."""
    agent = database.agent(permitted_actions=SCOPES)
    ran = []
    with Kakunin(database.dsn("agent_1"), credential=agent.credential) as kakunin:
        guarded = verify_agent_scope(kakunin, required_scopes=["trade.execute"])(lambda: ran.append(1))
        for answer in (
            [],
            [{}],
            [{"agent_id": None, "decision": None}],
            [{"agent_id": None, "decision": {}}],
            None,
        ):
            monkeypatch.setattr(kakunin._connector, "query", lambda _, answer=answer: answer)
            with pytest.raises(KakuninError):
                guarded()
        assert not ran
