"""CertificateCache and AsyncCertificateCache on a real server: what they may answer, and what they must not.

Most tests are asynchronous and run for both kinds. How soon a revocation is seen is measured by
benchmarks/cache.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import gc
import inspect
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest
from conftest import Agent, Database
from psycopg_pool import AsyncConnectionPool, ConnectionPool

from kakunin_db import (
    AgentSuspendedError,
    AsyncCertificateCache,
    BadInputError,
    CertificateCache,
    CertificateRevokedError,
    CertificateValidityError,
    UnknownCertificateError,
)
from kakunin_db import (
    cache as cache_module,
)


async def done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Cache:
    """A cache of either kind; a synchronous one's calls are made in threads."""

    def __init__(self, kind: str, target: Any, **options: Any) -> None:
        self.cache: Any = (CertificateCache if kind == "sync" else AsyncCertificateCache)(target, **options)
        self.queries = 0
        self.after: Callable[[], Any] | None = None  # between the answer of a query and its landing
        query = self.cache._connector.query

        def counted(question: Any) -> Any:
            self.queries += 1
            rows = query(question)
            if self.after is not None:
                self.after()
            return rows

        async def counted_async(question: Any) -> Any:
            self.queries += 1
            rows = await query(question)
            if self.after is not None:
                await done(self.after())
            return rows

        self.cache._connector.query = counted if kind == "sync" else counted_async
        self.sync = kind == "sync"

    async def call(self, name: str, *args: Any) -> Any:
        if self.sync:
            return await asyncio.to_thread(getattr(self.cache, name), *args)
        return await getattr(self.cache, name)(*args)

    async def status(self, serial: Any) -> str:
        return (await self.call("status", serial)).status

    async def require(self, serial: Any) -> Any:
        return await self.call("require", serial)

    async def ready(self) -> Cache:
        assert await self.call("start", 10.0)
        return self

    async def until(self, condition: Callable[[], bool], timeout: float = 10) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.005)


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
async def make(kind: str, database: Database) -> AsyncIterator[Callable[..., Cache]]:
    made: list[Cache] = []

    def make(target: Any = None, **options: Any) -> Cache:
        made.append(Cache(kind, target or database.dsn("gateway"), **options))
        return made[-1]

    yield make
    for cache in made:
        await cache.call("close")


LISTENERS = (
    "select pid from pg_stat_activity"
    " where datname = current_database() and query = 'listen kakunin_revocation'"
)


def brief(database: Database) -> Agent:
    """An agent whose certificate expires in three seconds."""
    now = dt.datetime.now(dt.timezone.utc)
    return database.agent(not_before=now, lifetime=dt.timedelta(seconds=3))


def kill_listeners(database: Database) -> int:
    return len(database.run("postgres", f"select pg_terminate_backend(pid) from ({LISTENERS}) l"))


def notify(database: Database, payload: str, user: str = "stranger") -> None:
    database.run(user, "select pg_notify('kakunin_revocation', %s)", [payload])


async def test_an_answer_is_kept_and_copied(make: Any, database: Database) -> None:
    agent = database.agent(permitted_actions=["a:b"], financial_scope={"permitted_venues": {"XLON": 1}})
    cache = await make(ttl=60).ready()
    first = await cache.require(agent.serial)
    assert first.valid
    assert (first.agent_id, first.permitted_actions) == (agent.agent_id, ("a:b",))
    first.financial_scope["permitted_venues"]["XLON"] = 10**9  # a caller's own
    plain = agent.serial.replace(":", "")
    for form in (agent.serial.lower(), plain, f"0x{plain}", int(plain, 16), f" {agent.serial} "):
        again = await cache.require(form)
        assert again.financial_scope == {"permitted_venues": {"XLON": 1}}
        again.financial_scope.clear()
    assert cache.cache.kept(plain) == dataclasses.replace(
        first, financial_scope={"permitted_venues": {"XLON": 1}}
    )
    assert cache.queries == 1
    cache.cache.clear()
    assert cache.cache.kept(agent.serial) is None
    assert cache.queries == 1
    await cache.require(agent.serial)
    assert cache.queries == 2


async def test_no_query_for_what_is_no_serial(make: Any) -> None:
    cache = await make().ready()
    for bad in ("", "xyz", "AA:B", 0, -1, "A" * 41):
        with pytest.raises(BadInputError):
            await cache.require(bad)
    assert cache.queries == 0


async def test_revoking_suspending_and_reinstating_are_heard(make: Any, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    cache = await make(ttl=3600).ready()
    await cache.require(other.serial)
    for act, error in [
        (agent.suspend, AgentSuspendedError),
        (lambda: database.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id]), None),
        (agent.revoke, CertificateRevokedError),
    ]:
        before = await cache.status(agent.serial)
        assert await cache.status(agent.serial) == before
        act()
        await cache.until(lambda: len(cache.cache) == 1)  # the other's alone
        if error is None:
            assert (await cache.require(agent.serial)).valid
        else:
            with pytest.raises(error) as caught:
                await cache.require(agent.serial)
            assert caught.value.hint
    asked = cache.queries
    assert await cache.status(other.serial) == "active"
    assert cache.queries == asked


async def test_a_stop_by_score_is_heard(make: Any, database: Database) -> None:
    """With its commit, and not when the worker settles it. Five seconds are the default without."""
    agent = database.agent()
    cache = await make().ready()
    assert cache.cache._answers.ttl == 5
    assert await cache.status(agent.serial) == "active"
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
        for _ in range(3):
            session.execute("select kakunin.audit_log_append('unauthorized_access_attempt')")
        session.commit()
        committed = time.monotonic()
    await cache.until(lambda: len(cache.cache) == 0)
    assert time.monotonic() - committed < 2  # 5 s without the notification
    with pytest.raises(CertificateRevokedError):
        await cache.require(agent.serial)


async def test_each_refusal_has_its_class(make: Any, database: Database) -> None:
    now = dt.datetime.now(dt.timezone.utc)
    later = database.agent(not_before=now + dt.timedelta(hours=1))
    short = brief(database)
    cache = await make().ready()
    with pytest.raises(CertificateValidityError, match="not valid yet"):
        await cache.require(later.serial)
    with pytest.raises(UnknownCertificateError):
        await cache.require("AA:BB:CC")
    assert await cache.status("AA:BB:CC") == "unknown"
    assert (await cache.require(short.serial)).valid
    await asyncio.sleep(4)
    with pytest.raises(CertificateValidityError, match="expired"):
        await cache.require(short.serial)


async def test_an_answer_ages(make: Any, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = database.agent()
    cache = await make().ready()
    offset = 0.0
    clock = time.monotonic
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: clock() + offset)
    for serial in (agent.serial, "AA:BB"):  # a refusal is kept no longer
        before = cache.queries
        for moment, queries in [(0, 1), (4.0, 1), (5.01, 2), (9.0, 2), (10.1, 3)]:
            offset = moment
            await cache.status(serial)
            assert cache.queries - before == queries, (serial, moment)
        offset = 0.0
        cache.cache.clear()


async def test_no_answer_outlives_what_it_says_of_time(make: Any, database: Database) -> None:
    """not_after, and the end of an overlap, lie ahead in the answer itself: no notification comes then."""
    old = database.agent()
    database.renew(old, overlap=dt.timedelta(seconds=2))
    short = brief(database)
    soon = database.agent(not_before=dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=3))
    cache = await make(ttl=3600).ready()
    assert (await cache.require(old.serial)).revoked_at is not None
    assert (await cache.require(short.serial)).valid
    assert await cache.status(soon.serial) == "not_yet_valid"
    end = time.monotonic() + 6
    while time.monotonic() < end:
        for agent in (old, short, soon):
            (fact,) = database.run(
                "gateway", "select kakunin.verify_certificate(%s) ->> 'status'", [agent.serial]
            )
            said = await cache.status(agent.serial)
            if fact[0] in ("revoked", "expired"):
                assert said == fact[0]
        await asyncio.sleep(0.05)
    assert await cache.status(old.serial) == "revoked"
    assert await cache.status(short.serial) == "expired"
    assert await cache.status(soon.serial) == "active"


async def test_one_query_for_many_callers(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make().ready()
    cache.after = (lambda: time.sleep(0.3)) if cache.sync else (lambda: asyncio.sleep(0.3))
    callers = 20
    answers = await asyncio.gather(*[cache.status(agent.serial) for _ in range(callers)])
    assert answers == ["active"] * callers
    assert cache.queries == 1


async def test_one_failure_for_many_callers(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make().ready()

    def fail() -> Any:
        raise psycopg.OperationalError("gone")

    def fail_later() -> Any:
        time.sleep(0.3)
        fail()

    async def fail_async() -> Any:
        await asyncio.sleep(0.3)
        fail()

    cache.after = fail_later if cache.sync else fail_async
    outcomes = await asyncio.gather(*[cache.status(agent.serial) for _ in range(5)], return_exceptions=True)
    assert all(isinstance(outcome, psycopg.OperationalError) for outcome in outcomes)
    assert cache.queries == 1
    cache.after = None
    assert await cache.status(agent.serial) == "active"  # and nothing is stuck


async def test_the_number_of_answers_is_bounded(make: Any) -> None:
    cache = await make(max_entries=10, ttl=60).ready()
    await cache.status("AA")
    for n in range(1, 60):
        await cache.status(n)
        await cache.status("AA")
    assert len(cache.cache) == 10
    asked = cache.queries
    await cache.status("AA")  # used all the time, so never dropped
    assert cache.queries == asked
    assert len(cache.cache._answers._serials) <= 10


async def test_a_ttl_of_zero_keeps_nothing(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make(ttl=0).ready()
    for _ in range(3):
        await cache.status(agent.serial)
    assert cache.queries == 3
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(BadInputError):
            make(ttl=bad)
    with pytest.raises(BadInputError):
        make(max_entries=0)


# Races --------------------------------------------------------------------------------------------------


async def test_an_answer_overtaken_by_its_revocation_is_neither_kept_nor_given(
    make: Any, database: Database
) -> None:
    """The query has its answer, "active"; the revocation commits and is heard; then the query returns."""
    agent = database.agent()
    cache = await make(ttl=3600).ready()
    heard: list[int] = []
    hear = cache.cache._answers.hear
    cache.cache._answers.hear = lambda payloads: (hear(payloads), heard.append(1))

    def overtaken() -> Any:
        cache.after = None
        agent.revoke()
        end = time.monotonic() + 10
        if cache.sync:
            while not heard and time.monotonic() < end:
                time.sleep(0.005)
            return None
        return cache.until(lambda: bool(heard))

    cache.after = overtaken
    with pytest.raises(CertificateRevokedError):
        await cache.require(agent.serial)
    assert cache.queries == 2
    assert await cache.status(agent.serial) == "revoked"


async def test_who_comes_after_the_notification_does_not_wait_for_the_query_before_it(
    make: Any, database: Database
) -> None:
    agent = database.agent()
    cache = await make(ttl=3600).ready()
    reached, go = threading.Event(), threading.Event()

    def held() -> Any:
        cache.after = None
        reached.set()
        if cache.sync:
            go.wait(10)
            return None
        return asyncio.to_thread(go.wait, 10)

    cache.after = held
    first = asyncio.ensure_future(cache.status(agent.serial))
    await cache.until(reached.is_set)
    if cache.sync:  # the connection is the first one's only until it has its rows
        assert cache.queries == 1
    cache.cache._answers.hear([str(agent.agent_id).encode()])
    agent.revoke()
    assert await asyncio.wait_for(cache.status(agent.serial), 5) == "revoked"
    assert not first.done()
    go.set()
    assert await first == "revoked"


async def test_notifications_of_others_cost_a_query_nothing(make: Any, database: Database) -> None:
    """Many revocations a second, and queries that take longer than from one to the next."""
    agent, unknown = database.agent(), "AB:CD"
    cache = await make(ttl=3600).ready()
    for serial, status in ((agent.serial, "active"), (unknown, "unknown")):
        cache.queries = 0
        cache.after = lambda: cache.cache._answers.hear([str(uuid.uuid4()).encode() for _ in range(3)])
        assert [await cache.status(serial) for _ in range(3)] == [status] * 3
        assert cache.queries == 1
        assert cache.cache.kept(serial).status == status


async def test_an_agent_heard_of_among_many_others_is_not_forgotten(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make(ttl=3600, max_entries=10).ready()

    def hear() -> None:
        cache.after = None
        cache.cache._answers.hear([str(agent.agent_id).encode()])
        for _ in range(30):
            cache.cache._answers.hear([str(uuid.uuid4()).encode()])

    cache.after = hear
    assert await cache.status(agent.serial) == "active"
    assert cache.queries == 2  # the first might be of before
    assert cache.cache.kept(agent.serial).valid
    assert len(cache.cache._answers._last) == 10


async def test_notifications_without_end_do_not_keep_a_caller(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make(ttl=3600).ready()

    def overtaken() -> None:
        cache.cache._answers.hear([b"nonsense"])

    cache.after = overtaken
    assert await cache.status(agent.serial) == "active"
    assert cache.queries == 2
    assert len(cache.cache) == 0


async def test_revocations_under_load_are_never_missed(make: Any, database: Database) -> None:
    """Callers ask all the time; once a revocation's notification is out, no later answer is "active"."""
    cache = await make(ttl=3600).ready()
    late: list[str] = []
    stop = False
    agents = [database.agent() for _ in range(6)]
    revoked: dict[str, float] = {}

    async def ask() -> None:
        n = 0
        while not stop:
            agent = agents[n % len(agents)]
            n += 1
            await asyncio.sleep(0.001)  # a kept answer lets nobody else run
            began = time.monotonic()
            status = await cache.status(agent.serial)
            if status == "active" and began > revoked.get(agent.serial, float("inf")) + 3:
                late.append(agent.serial)

    async def revoke() -> None:
        for agent in agents:
            await asyncio.sleep(0.1)
            await asyncio.to_thread(agent.revoke)
            revoked[agent.serial] = time.monotonic()

    callers = [asyncio.ensure_future(ask()) for _ in range(4)]
    await revoke()
    await asyncio.sleep(3.5)
    stop = True
    await asyncio.gather(*callers)
    assert late == []
    assert [await cache.status(agent.serial) for agent in agents] == ["revoked"] * len(agents)


# When it cannot know ----------------------------------------------------------------------------------


async def test_a_listener_that_is_killed_costs_every_answer(
    make: Any, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_FIRST_PAUSE", 2.0)
    agent = database.agent()
    cache = await make(ttl=3600).ready()
    await cache.require(agent.serial)
    assert kill_listeners(database) == 1
    await cache.until(lambda: not cache.cache.listening)
    assert len(cache.cache) == 0
    asked = cache.queries
    for n in range(1, 4):  # each is asked anew
        await cache.require(agent.serial)
        assert cache.queries == asked + n
    agent.revoke()  # which nobody hears
    with pytest.raises(CertificateRevokedError):
        await cache.require(agent.serial)
    await cache.until(lambda: cache.cache.listening)
    assert await cache.status(agent.serial) == "revoked"
    asked = cache.queries
    await cache.status(agent.serial)
    assert cache.queries == asked  # kept again


async def test_before_it_listens_each_answer_is_asked_anew(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = make(ttl=3600, listen_dsn="host=127.0.0.1 port=1 connect_timeout=2")
    for n in range(1, 4):
        assert await cache.status(agent.serial) == "active"
        assert cache.queries == n
    assert not cache.cache.listening
    assert len(cache.cache) == 0


async def test_a_database_that_cannot_be_asked_is_an_error(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make(ttl=1).ready()
    await cache.require(agent.serial)
    name = database.name
    with database.cluster.connect(autocommit=True) as admin:
        admin.execute(f"alter database {name} allow_connections false")
        try:
            admin.execute(
                "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
                " where datname = %s and usename = 'gateway'",
                [name],
            )
            await cache.until(lambda: not cache.cache.listening)
            for _ in range(3):
                with pytest.raises(psycopg.OperationalError):
                    await cache.status(agent.serial)
        finally:
            admin.execute(f"alter database {name} allow_connections true")
    await cache.until(lambda: cache.cache.listening)
    assert (await cache.require(agent.serial)).valid


async def test_a_login_without_a_role_is_refused(make: Any, database: Database) -> None:
    cache = make(database.dsn("stranger"))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        await cache.status("AA")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        await cache.status("AA")


# Anybody may notify -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "nonsense",
        "*",
        "{uuid}x",
        "URN:UUID:{uuid}",
        "{{{uuid}}}",
        "é" * 1000,
        "00000000000000000000000000000000",
    ],
)
async def test_a_payload_that_is_no_agents_id_costs_every_answer(
    make: Any, database: Database, payload: str
) -> None:
    agent = database.agent()
    cache = await make(ttl=3600).ready()
    await cache.require(agent.serial)
    notify(database, payload.format(uuid=uuid.uuid4()))
    await cache.until(lambda: len(cache.cache) == 0)
    assert (await cache.require(agent.serial)).valid
    assert cache.queries == 2


async def test_a_false_notification_never_makes_an_answer(make: Any, database: Database) -> None:
    agent = database.agent()
    agent.revoke()
    cache = await make(ttl=3600).ready()
    assert await cache.status(agent.serial) == "revoked"
    notify(database, str(agent.agent_id))
    notify(database, f'{{"serial": "{agent.serial}", "valid": true}}')
    await cache.until(lambda: len(cache.cache) == 0)
    assert await cache.status(agent.serial) == "revoked"


async def test_another_agents_id_costs_nothing(make: Any, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    cache = await make(ttl=3600).ready()
    await cache.require(agent.serial)
    await cache.require(other.serial)
    notify(database, str(uuid.uuid4()))
    notify(database, str(other.agent_id))
    await cache.until(lambda: len(cache.cache) == 1)
    await cache.require(agent.serial)
    assert cache.queries == 2


async def test_a_flood_neither_heats_nor_grows_it(make: Any, database: Database) -> None:
    agent = database.agent()
    cache = await make(ttl=3600).ready()
    await cache.require(agent.serial)
    calls = 0
    hear = cache.cache._answers.hear

    def counted(payloads: Any) -> None:
        nonlocal calls
        calls += 1
        hear(payloads)

    cache.cache._answers.hear = counted
    begun = time.monotonic()
    with database.connect("stranger", autocommit=True) as stranger:
        for _ in range(5):
            flood = "select pg_notify('kakunin_revocation', gen_random_uuid()::text)"
            await asyncio.to_thread(stranger.execute, f"{flood} from generate_series(1, 20000)")
        await asyncio.to_thread(agent.revoke)  # comes through behind it
    deadline = time.monotonic() + 30
    while await cache.status(agent.serial) != "revoked":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    assert calls <= (time.monotonic() - begun) / cache_module._SHORTEST_PAUSE + 1
    assert len(cache.cache._answers._serials) <= 1
    assert len(cache.cache._answers._flights) == 0


# Connections and life ---------------------------------------------------------------------------------


async def test_pools_and_connections(kind: str, database: Database) -> None:
    agent = database.agent()
    dsn = database.dsn("gateway")
    async with contextlib.AsyncExitStack() as stack:
        targets: list[Any] = []
        if kind == "sync":
            targets.append(stack.enter_context(ConnectionPool(dsn, min_size=1, open=True)))
            targets.append(stack.enter_context(psycopg.connect(dsn, autocommit=True)))
        else:
            pool = AsyncConnectionPool(dsn, min_size=1, open=False)
            targets.append(await stack.enter_async_context(pool))
            own = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
            targets.append(await stack.enter_async_context(own))
        for target in targets:
            cache = await Cache(kind, target, ttl=3600).ready()
            for _ in range(3):
                assert (await cache.require(agent.serial)).valid
            assert cache.queries == 1
            await cache.call("close")
            with pytest.raises(BadInputError, match="closed"):
                await cache.status(agent.serial)
        # What is the caller's is left open.
        assert not targets[1].closed
        # In a transaction of the caller's, an answer may be as old as that.
        cache = await Cache(kind, targets[1], ttl=3600).ready()
        await done(targets[1].execute("begin isolation level repeatable read"))
        for n in range(1, 4):
            await cache.require(agent.serial)
            assert cache.queries == n
        await done(targets[1].execute("rollback"))
        await cache.call("close")
    async with contextlib.AsyncExitStack() as stack:
        if kind == "sync":
            plain: Any = stack.enter_context(psycopg.connect(dsn))
        else:
            plain = await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn))
        with pytest.raises(BadInputError, match="autocommit"):
            Cache(kind, plain)
    with pytest.raises(BadInputError, match="DSN"):
        Cache(kind, object())


async def test_closing_leaves_no_thread_and_no_backend(make: Any, database: Database) -> None:
    before = threading.active_count()
    cache = await make().ready()
    await cache.status("AA")
    await cache.call("close")
    await cache.call("close")
    backends = "select count(*) from pg_stat_activity where datname = %s and usename = 'gateway'"
    await cache.until(lambda: database.value("postgres", backends, [database.name]) == 0)
    assert not [t for t in threading.enumerate() if t.name == "kakunin-cache"]
    assert threading.active_count() <= before + 8  # asyncio's own, for to_thread()


def test_a_forgotten_cache_stops_listening(database: Database) -> None:
    cache = CertificateCache(database.dsn("gateway"))
    assert cache.start(10)
    (thread,) = [t for t in threading.enumerate() if t.name == "kakunin-cache"]
    cache._connector.close()
    del cache
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_listens_for_itself(database: Database) -> None:
    agent: Agent = database.agent()
    with CertificateCache(database.dsn("gateway"), ttl=3600) as cache:
        assert cache.start(10)
        assert cache.require(agent.serial).valid
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert not cache.listening
                assert len(cache) == 0
                assert cache.require(agent.serial).valid
                assert cache.start(10)
                assert cache.require(agent.serial).valid
                assert len(cache) == 1
                cache.close()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert cache.listening
        assert len(cache) == 1
        asleep = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - asleep < 0.25  # nothing of the child's end keeps the listener awake
        agent.revoke()
        deadline = time.monotonic() + 10
        while cache.status(agent.serial).status != "revoked":
            assert time.monotonic() < deadline
            time.sleep(0.01)


async def test_a_cancelled_caller_takes_nobodys_answer_away(database: Database) -> None:
    agent = database.agent()
    cache = await Cache("async", database.dsn("gateway"), ttl=3600).ready()
    cache.after = lambda: asyncio.sleep(0.3)
    first = asyncio.ensure_future(cache.status(agent.serial))
    await asyncio.sleep(0.05)
    second = asyncio.ensure_future(cache.status(agent.serial))
    await asyncio.sleep(0.05)
    first.cancel()
    assert await second == "active"
    assert cache.queries == 1
    await cache.call("close")


def test_an_interrupted_caller_takes_nobodys_answer_away(database: Database) -> None:
    agent = database.agent()
    with CertificateCache(database.dsn("gateway"), ttl=3600) as cache:
        assert cache.start(10)
        query = cache._connector.query
        reached = threading.Event()

        def interrupted(question: Any) -> Any:
            cache._connector.query = query  # type: ignore[method-assign]
            reached.set()
            time.sleep(0.3)
            raise KeyboardInterrupt

        cache._connector.query = interrupted  # type: ignore[method-assign]
        answers: list[str] = []

        def wait() -> None:
            reached.wait(10)
            answers.append(cache.status(agent.serial).status)

        waiter = threading.Thread(target=wait)
        waiter.start()
        with pytest.raises(KeyboardInterrupt):
            cache.status(agent.serial)
        waiter.join(10)
        assert answers == ["active"]
