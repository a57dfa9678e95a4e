"""Supabase's published Python client, sync and async, bound to agents, against a real PostgREST.

A scenario is written once, as a generator that yields requests and is sent their answers.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import httpx
import jwt
import postgrest as client_of_postgrest
import pytest
import supabase
from cluster import ROOT
from conftest import Agent, Database
from kms import Wire, serve_kms
from orders import Tables, create_tables
from postgrest_server import PostgREST

from kakunin_db import (
    AgentCredential,
    AgentSuspendedError,
    AsyncCertificateCache,
    CertificateCache,
    CertificateRevokedError,
    CertificateValidityError,
    CredentialRejectedError,
    KakuninError,
    LocalSigner,
    ScopeViolationError,
    UnknownCertificateError,
    VerificationUnavailableError,
    bind_agent_session,
)
from kakunin_db.errors import named
from kakunin_db.signers import ECDSASigner, LocalECDSASigner, Signer, open_jwt_signer
from kakunin_db.tokens import jwks

APIError = client_of_postgrest.APIError
# supabase-py's own parts warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter:DeprecationWarning")

Scenario = Callable[[Any, "Orders"], Generator[Any, Any, None]]


class Orders(Tables):
    """The tables, and clients for them."""

    def client(self, **options: Any) -> supabase.Client:
        return supabase.create_client(self.rest.url, self.rest.anon_key, **options)

    async def async_client(self) -> supabase.AsyncClient:
        return await supabase.acreate_client(self.rest.url, self.rest.anon_key)

    def bind(self, who: Agent | str, **options: Any) -> Any:
        given = self.client()
        try:
            return bind_agent_session(given, _who(who), **{"jwt_secret": self.rest.jwt_secret, **options})
        finally:
            given.auth.close()

    async def bind_async(self, who: Agent | str, **options: Any) -> Any:
        given = await self.async_client()
        await given.auth.close()
        return await bind_agent_session(given, _who(who), **{"jwt_secret": self.rest.jwt_secret, **options})


def _who(who: Agent | str) -> AgentCredential | str:
    return who.credential if isinstance(who, Agent) else who


@pytest.fixture(scope="module")
def tables(database: Database, postgrest: PostgREST) -> Database:
    create_tables(database, postgrest)
    return database


@pytest.fixture
def orders(tables: Database, postgrest: PostgREST) -> Orders:
    postgrest.requests.clear()
    return Orders(tables, postgrest)


def run(bound: Any, scenario: Generator[Any, Any, None]) -> None:
    try:
        step = next(scenario)
        while True:
            try:
                outcome = step.execute()
            except APIError as error:
                step = scenario.throw(error)
            else:
                step = scenario.send(outcome)
    except StopIteration:
        pass


async def run_async(bound: Any, scenario: Generator[Any, Any, None]) -> None:
    try:
        step = next(scenario)
        while True:
            try:
                outcome = await step.execute()
            except APIError as error:
                step = scenario.throw(error)
            else:
                step = scenario.send(outcome)
    except StopIteration:
        pass


def contents(answer: Any) -> list[str]:
    return [row["content"] for row in answer.data]


# What an agent sees and may do ------------------------------------------------------------------------


def reading(client: Any, orders: Orders) -> Generator[Any, Any, None]:
    assert contents((yield client.table("orders").select("*").order("id"))) == ["one-a", "one-b"]
    theirs = client.table("orders").select("*").eq("permitted_agent_serial", orders.two.serial)
    assert (yield theirs).data == []
    assert (yield client.table("orders").select("*").neq("permitted_agent_serial", "x")).data
    counted = yield client.table("orders").select("*", count="exact").limit(1)
    assert (counted.count, len(counted.data)) == (2, 1)
    assert (yield client.table("orders").select("*", count="exact", head=True)).count == 2
    embedded = (yield client.table("orders").select("content, items(content)").order("id")).data
    assert embedded == [
        {"content": "one-a", "items": [{"content": "one-a item"}]},
        {"content": "one-b", "items": [{"content": "one-b item"}]},
    ]
    upwards = (yield client.table("items").select("content, orders(content)")).data
    assert {row["orders"]["content"] for row in upwards} == {"one-a", "one-b"}
    lines = (yield client.table("orders").select("content").order("id").csv()).data.splitlines()
    assert lines == ["content", "one-a", "one-b"]
    assert (yield client.rpc("count_orders", {})).data == 2
    assert (yield client.rpc("count_orders", {}, get=True)).data == 2


def writing(client: Any, orders: Orders) -> Generator[Any, Any, None]:
    two = orders.two.serial
    made = (yield client.table("orders").insert({"content": "one-c"})).data
    assert made[0]["permitted_agent_serial"] == orders.one.serial
    for theirs in (
        client.table("orders").insert({"content": "x", "permitted_agent_serial": two}),
        client.table("orders").insert(
            [{"content": "y"}, {"content": "x", "permitted_agent_serial": two}], default_to_null=False
        ),
        client.table("orders").update({"permitted_agent_serial": two}).eq("content", "one-c"),
        client.table("orders").upsert({"content": "two-a"}, on_conflict="content"),
    ):
        with pytest.raises(APIError) as raised:
            yield theirs
        assert raised.value.code == "42501"
    assert (yield client.table("orders").update({"content": "x"}).eq("content", "two-a")).data == []
    assert (yield client.table("orders").delete().eq("permitted_agent_serial", two)).data == []
    merged = {"content": "one-c", "permitted_agent_serial": orders.one.serial}
    assert len((yield client.table("orders").upsert(merged, on_conflict="content")).data) == 1
    assert contents((yield client.table("orders").delete().eq("content", "one-b"))) == ["one-b"]


def tools(client: Any, orders: Orders) -> Generator[Any, Any, None]:
    kakunin = client.schema("kakunin")
    assert (yield kakunin.rpc("current_agent_id", {})).data == str(orders.one.agent_id)
    scope = (yield kakunin.rpc("verify_agent_scope", {"action": "orders:write"})).data
    assert scope["allowed"] is True
    scope = (yield kakunin.rpc("verify_agent_scope", {"action": "trade:execute"})).data
    assert scope["allowed"] is False
    risk = (yield kakunin.rpc("check_risk_score", {})).data
    assert risk["band"] == "low"
    arguments = {"event_type": "api_call", "metadata": {"path": "/orders"}}
    event = (yield kakunin.rpc("audit_log_append", arguments)).data
    assert event["event_id"]
    answer = (yield kakunin.rpc("verify_certificate", {"serial": orders.two.serial})).data
    assert (answer["valid"], answer["agent_id"]) == (True, str(orders.two.agent_id))


def dynamic_sql(client: Any, orders: Orders) -> Generator[Any, Any, None]:
    count = "select to_json(count(*)) from orders"
    assert (yield client.rpc("run_sql", {"query": count})).data == 2
    claims = f'{{"kakunin_cert_serial": "{orders.two.serial}"}}'
    for trick in (
        f"select to_json(set_config('request.jwt.claims', '{claims}', true))",
        f"select to_json(set_config('kakunin.session', '{orders.two.serial}', true))",
    ):
        found = f"with trick as materialized ({trick}) select to_json(json_agg(content)) from trick, orders"
        answer = (yield client.rpc("run_sql", {"query": found})).data or []
        assert not [content for content in answer if content.startswith("two")]


SCENARIOS: list[Scenario] = [reading, writing, tools, dynamic_sql]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_agent_has_its_own_rows_and_tools(orders: Orders, scenario: Scenario) -> None:
    with orders.bind(orders.one) as bound:
        run(bound, scenario(bound, orders))
    assert_sent(orders, orders.one)


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_an_agent_has_its_own_rows_and_tools_async(orders: Orders, scenario: Scenario) -> None:
    async with await orders.bind_async(orders.one) as bound:
        await run_async(bound, scenario(bound, orders))
    assert_sent(orders, orders.one)


def assert_sent(orders: Orders, agent: Agent) -> None:
    asked, *sent = orders.rest.requests
    assert "verify_certificate" in asked.path
    assert sent
    for request in sent:
        assert request.headers["x-kakunin-cert-serial"] == agent.serial
        assert request.headers["apikey"] == orders.rest.anon_key
        token = request.headers["authorization"].removeprefix("Bearer ")
        claims = jwt.decode(token, orders.rest.jwt_secret, algorithms=["HS256"], audience="authenticated")
        assert claims["sub"] == str(agent.agent_id)
        assert claims["exp"] - claims["iat"] <= 300


def test_rows_of_others_are_untouched(orders: Orders) -> None:
    with orders.bind(orders.one) as bound:
        run(bound, writing(bound, orders))
    assert orders.contents == ["one-a", "two-a", "two-b", "one-c"]


def test_the_client_that_was_given_sees_nothing(orders: Orders) -> None:
    given = orders.client()
    with bind_agent_session(given, orders.one.serial, jwt_secret=orders.rest.jwt_secret) as bound:
        assert len(bound.table("orders").select("*").execute().data) == 2
        assert given.table("orders").select("*").execute().data == []
    assert given.table("orders").select("*").execute().data == []
    given.postgrest.session.close()
    given.auth.close()


def test_the_other_services_are_told_the_same(orders: Orders) -> None:
    with orders.bind(orders.one) as bound:
        bound.storage.from_("bucket").download("file")
        bound.functions.invoke("hello")
    assert_sent(orders, orders.one)
    assert [request.path for request in orders.rest.requests[1:]] == [
        "/storage/v1/object/bucket/file",
        "/functions/v1/hello",
    ]


def test_authenticated_can_be_the_role(orders: Orders) -> None:
    with orders.bind(orders.one, role="authenticated") as bound:
        assert len(bound.table("orders").select("*").execute().data) == 2
        with pytest.raises(APIError) as raised:  # what only agents may
            bound.rpc("count_orders", {}).execute()
    assert raised.value.code == "42501"


# Two at once ------------------------------------------------------------------------------------------


def test_two_agents_at_once_see_their_own(orders: Orders) -> None:
    wrong: list[Any] = []

    def work(agent: Agent, name: str) -> None:
        with orders.bind(agent) as bound:
            for _ in range(25):
                found = contents(bound.table("orders").select("*").order("id").execute())
                if found != [f"{name}-a", f"{name}-b"]:
                    wrong.append(found)

    threads = [threading.Thread(target=work, args=a) for a in ((orders.one, "one"), (orders.two, "two")) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


async def test_two_agents_at_once_see_their_own_async(orders: Orders) -> None:
    async with await orders.bind_async(orders.one) as one, await orders.bind_async(orders.two) as two:
        answers = await asyncio.gather(
            *(client.table("orders").select("*").order("id").execute() for client in (one, two) * 20)
        )
    assert [contents(answer)[0] for answer in answers] == ["one-a", "two-a"] * 20


# The database decides, at the next request --------------------------------------------------------------


def test_a_revocation_ends_what_a_token_was_good_for(orders: Orders) -> None:
    with orders.bind(orders.one) as bound:
        assert len(bound.table("orders").select("*").execute().data) == 2
        orders.one.revoke()
        sent = len(orders.rest.requests)
        for request in (
            bound.table("orders").select("*"),
            bound.table("orders").insert({"content": "late"}),
            bound.rpc("count_orders", {}),
            bound.schema("kakunin").rpc("check_risk_score", {}),
        ):
            with pytest.raises(APIError) as raised:
                request.execute()
            assert raised.value.code == "KA002"
            assert isinstance(named(raised.value), CertificateRevokedError)
        assert len(orders.rest.requests) == sent + 4  # refused by the database: the token was good still
    with pytest.raises(CertificateRevokedError):
        orders.bind(orders.one)
    assert "late" not in orders.contents


async def test_a_revocation_ends_what_a_token_was_good_for_async(orders: Orders) -> None:
    async with await orders.bind_async(orders.one) as bound:
        assert len((await bound.table("orders").select("*").execute()).data) == 2
        orders.one.revoke()
        with pytest.raises(APIError) as raised:
            await bound.table("orders").select("*").execute()
        assert raised.value.code == "KA002"
    with pytest.raises(CertificateRevokedError):
        await orders.bind_async(orders.one)


def test_a_suspension_lasts_until_the_agent_is_reinstated(orders: Orders) -> None:
    with orders.bind(orders.one) as bound:
        orders.one.suspend()
        with pytest.raises(APIError) as raised:
            bound.table("orders").select("*").execute()
        assert isinstance(named(raised.value), AgentSuspendedError)
        with pytest.raises(AgentSuspendedError):
            orders.bind(orders.one)
        orders.database.run("operator", "select kakunin.reinstate_agent(%s)", [orders.one.agent_id])
        assert len(bound.table("orders").select("*").execute().data) == 2


async def test_renewal_asks_the_database_again(orders: Orders) -> None:
    with orders.bind(orders.one, lifetime=1) as bound:
        async with await orders.bind_async(orders.two, lifetime=1) as bound_async:
            orders.one.revoke()
            orders.two.suspend()
            await asyncio.sleep(1)
            orders.rest.requests.clear()
            with pytest.raises(CertificateRevokedError):
                bound.table("orders").select("*").execute()
            with pytest.raises(AgentSuspendedError):
                await bound_async.table("orders").select("*").execute()
    assert [request.path for request in orders.rest.requests] == ["/rest/v1/rpc/verify_certificate"] * 2


def test_a_token_ends_with_its_certificate(orders: Orders) -> None:
    short = orders.database.agent("short", lifetime=dt.timedelta(seconds=303))  # it began 300 s ago
    with orders.bind(short) as bound:
        bound.table("orders").select("*").execute()
        ends = short.issued.certificate.not_valid_after_utc.timestamp()
        assert orders.rest.requests[-1].claims["exp"] <= ends
        time.sleep(max(0.0, ends + 1.1 - time.time()))
        with pytest.raises(CertificateValidityError):
            bound.table("orders").select("*").execute()
    with pytest.raises(CertificateValidityError):
        orders.bind(short)


async def test_programs_that_go_on_for_long_go_on(orders: Orders) -> None:
    with orders.bind(orders.one, lifetime=2) as one:
        async with await orders.bind_async(orders.two, lifetime=2) as two:
            end = time.monotonic() + 5
            while time.monotonic() < end:
                assert len(one.table("orders").select("*").execute().data) == 2
                assert len((await two.table("orders").select("*").execute()).data) == 2
                await asyncio.sleep(0.05)
    tokens = {r.headers["authorization"] for r in orders.rest.requests if "verify" not in r.path}
    assert len(tokens) >= 6


@pytest.fixture
def without_hook(orders: Orders) -> Iterator[Orders]:
    orders.rest.restart(hook=False)
    yield orders
    orders.rest.restart(hook=True)


async def test_without_the_hook_policies_return_nothing(without_hook: Orders) -> None:
    orders = without_hook
    async with await orders.bind_async(orders.one) as bound:
        orders.one.revoke()
        assert (await bound.table("orders").select("*", count="exact").execute()).count == 0
        with pytest.raises(APIError):
            await bound.table("orders").insert({"content": "late"}).execute()


# Keys, and who is asked ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serve_kms() as wire:
        yield wire


@pytest.fixture(params=[("RS256", "RSA_2048"), ("ES256", "ECC_NIST_P256")], ids=lambda param: param[0])
def published(
    request: pytest.FixtureRequest, orders: Orders, wire: Wire
) -> Iterator[tuple[Orders, Signer | ECDSASigner]]:
    """A project that trusts a key in KMS beside its own secret."""
    alg, spec = request.param
    signer = open_jwt_signer(f"awskms:{wire.made(spec)}?endpoint={wire.url}")
    keys = jwks([signer.public_key()])["keys"]
    assert [key["alg"] for key in keys] == [alg]
    orders.rest.restart(jwks=keys)
    yield orders, signer
    orders.rest.restart(jwks=[])


async def test_a_key_in_kms_signs_for_a_project_that_has_its_jwks(
    published: tuple[Orders, Signer | ECDSASigner],
) -> None:
    orders, signer = published
    by_kms = {"jwt_secret": None, "jwt_signer": signer}
    with orders.bind(orders.one, **by_kms) as bound:
        assert contents(bound.table("orders").select("*").order("id").execute()) == ["one-a", "one-b"]
        orders.one.revoke()
        with pytest.raises(APIError, match="revoked"):
            bound.table("orders").select("*").execute()
    async with await orders.bind_async(orders.two, **by_kms) as bound_async:
        answer = await bound_async.table("orders").select("*").order("id").execute()
        assert contents(answer) == ["two-a", "two-b"]
    with orders.bind(orders.two) as bound:  # the secret goes on being good
        assert bound.rpc("count_orders", {}).execute().data == 2


async def test_a_key_that_the_project_does_not_trust_binds_nobody(orders: Orders) -> None:
    for key in (
        {"jwt_secret": secrets.token_hex(32)},
        {"jwt_secret": None, "jwt_signer": LocalSigner.generate()},
        {"jwt_secret": None, "jwt_signer": LocalECDSASigner.generate()},
        {"jwt_secret": None, "jwt_signer": orders.one.signer},  # an agent's own is nobody's but its own
    ):
        with pytest.raises(CredentialRejectedError, match="does not accept"):
            orders.bind(orders.one, **key)
        with pytest.raises(CredentialRejectedError, match="does not accept"):
            await orders.bind_async(orders.one, **key)


def test_a_token_of_another_audience_is_taken_where_the_project_has_none(orders: Orders) -> None:
    with orders.bind(orders.one, audience="agents", issuer="https://agents.example") as bound:
        assert bound.rpc("count_orders", {}).execute().data == 2
    assert orders.rest.requests[-1].claims["iss"] == "https://agents.example"


async def test_a_cache_can_be_asked_in_the_project_s_place(orders: Orders) -> None:
    dsn = orders.database.dsn("gateway")
    with CertificateCache(dsn) as cache:
        with orders.bind(orders.one, certificates=cache) as bound:
            assert bound.rpc("count_orders", {}).execute().data == 2
        orders.one.revoke()
        with pytest.raises(CertificateRevokedError):
            orders.bind(orders.one, certificates=cache)
    async with AsyncCertificateCache(dsn) as async_cache:
        async with await orders.bind_async(orders.two, certificates=async_cache) as bound_async:
            assert (await bound_async.rpc("count_orders", {}).execute()).data == 2
        orders.two.suspend()
        with pytest.raises(AgentSuspendedError):
            await orders.bind_async(orders.two, certificates=async_cache)
    assert "verify_certificate" not in [request.path.rpartition("/")[2] for request in orders.rest.requests]


def test_a_serial_nobody_registered_is_not_bound(orders: Orders) -> None:
    with pytest.raises(UnknownCertificateError):
        orders.bind("AA:BB:CC")
    assert len(orders.rest.requests) == 1


@pytest.fixture
def stopped(orders: Orders) -> Iterator[Orders]:
    orders.rest.stop()
    yield orders
    orders.rest.start()


def test_without_postgrest_nobody_is_bound(stopped: Orders) -> None:
    with pytest.raises(VerificationUnavailableError):
        stopped.bind(stopped.one)


def test_a_schema_that_is_not_exposed_is_named(orders: Orders) -> None:
    with PostgREST(orders.database.cluster, orders.database.name, schemas="public") as hidden:
        given = supabase.create_client(hidden.url, hidden.anon_key)
        with pytest.raises(KakuninError) as raised:
            bind_agent_session(given, orders.one.serial, jwt_secret=hidden.jwt_secret)
        assert raised.value.hint
        assert "Expose the schema kakunin" in raised.value.hint
        given.auth.close()


def test_a_request_that_names_another_certificate_than_its_token_is_refused(orders: Orders) -> None:
    """As an agent would that got hold of its own token."""

    def forge(request: httpx.Request) -> None:
        if "verify_certificate" not in request.url.path:
            request.headers["X-Kakunin-Cert-Serial"] = orders.two.serial

    with httpx.Client(event_hooks={"request": [forge]}) as http:
        given = orders.client(options=supabase.lib.client_options.SyncClientOptions(httpx_client=http))
        with bind_agent_session(given, orders.one.serial, jwt_secret=orders.rest.jwt_secret) as bound:
            with pytest.raises(APIError) as raised:
                bound.table("orders").select("*").execute()
    assert isinstance(named(raised.value), CredentialRejectedError)


def test_scopes_are_refused_by_name(orders: Orders) -> None:
    with orders.bind(orders.two) as bound:
        with pytest.raises(APIError) as raised:
            bound.schema("kakunin").rpc("require_scope", {"scope": "orders:write"}).execute()
    assert isinstance(named(raised.value), ScopeViolationError)


# From the article's policy ------------------------------------------------------------------------------


def test_the_way_from_the_article_s_policy_is_as_the_docs_have_it(orders: Orders) -> None:
    text = (ROOT / "docs" / "supabase.md").read_text().partition("## From the article's policy")[2]
    article, move = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    database, one, two = orders.database, orders.one, orders.two
    with database.cluster.session(database.name, "app") as app:
        app.execute(
            "create table agent_vault (id bigint generated always as identity primary key,"
            " permitted_agent_serial text, content text); alter table agent_vault enable row level security;"
            " grant select, insert, update, delete on agent_vault to anon, authenticated"
        )
        app.execute(article)
        app.execute(
            "insert into agent_vault (permitted_agent_serial, content) values (%s, 'a'), (%s, 'b'),"
            " (%s, 'c')",
            [one.serial, one.serial.replace(":", "").lower(), two.serial],
        )
    orders.rest.reload()
    select = "agent_vault?select=content&order=id"
    claims = {"role": "authenticated", "kakunin_cert_serial": one.serial}
    token = orders.rest.token(**claims)
    assert orders.rest.request("GET", select, token=token).json == [{"content": "a"}]
    with database.connect("app", autocommit=True) as app:
        app.execute(move)
    assert orders.rest.request("GET", select, token=token).json == [{"content": "a"}, {"content": "b"}]
    with orders.bind(one) as bound:
        assert contents(bound.table("agent_vault").select("content").order("id").execute()) == ["a", "b"]
        made = bound.table("agent_vault").insert({"content": "d"}).execute().data
        assert made[0]["permitted_agent_serial"] == one.serial
    one.revoke()
    assert orders.rest.request("GET", select, token=token).status == 403
    orders.rest.restart(hook=False)
    assert orders.rest.request("GET", select, token=token).json == []
    orders.rest.restart(hook=True)
    with orders.bind(two) as bound:
        assert contents(bound.table("agent_vault").select("*").execute()) == ["c"]
    with database.connect("app", autocommit=True) as app:
        app.execute("drop table agent_vault")
