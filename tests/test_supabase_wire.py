"""What a bound client of Supabase's sends, and what it does not: the published client against a project that
records, and that answers wrongly where a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest
import supabase
from project import ANON, SECRET, Answer, Project, api_key, serve
from supabase.lib.client_options import AsyncClientOptions, SyncClientOptions
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websocket

from kakunin_db import (
    AgentCredential,
    AgentSuspendedError,
    AsyncCertificateCache,
    BadInputError,
    CertificateCache,
    CertificateRevokedError,
    CertificateValidityError,
    CredentialRejectedError,
    KakuninError,
    LocalSigner,
    SignerError,
    SignerUnavailableError,
    UnknownCertificateError,
    VerificationUnavailableError,
    bind_agent_session,
)
from kakunin_db.binding.supabase_ import BoundAsyncClient, BoundClient

SERIAL = "3A:F2:91:CC"
AGENT = "7d3b3f0c-54b1-4b7e-a6a1-9a1e0d3a0001"
# supabase-py's own parts warn of each other, and of what they use.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:ConnectionClosed:DeprecationWarning"),
]

Bind = Callable[..., BoundClient]


def certificate(**fields: Any) -> dict[str, Any]:
    now = dt.datetime.now(dt.timezone.utc)
    return {
        "serial_number": SERIAL,
        "valid": True,
        "status": "active",
        "agent_id": AGENT,
        "agent_name": "atlas",
        "permitted_actions": ["orders:read"],
        "not_before": (now - dt.timedelta(days=1)).isoformat(),
        "not_after": (now + dt.timedelta(days=1)).isoformat(),
        "revoked_at": None,
        **fields,
    }


@pytest.fixture
def project() -> Iterator[Project]:
    with serve(certificate()) as project:
        yield project


@pytest.fixture
def given(project: Project) -> Iterator[supabase.Client]:
    client = supabase.create_client(project.url, ANON)
    yield client
    client.auth.close()


@pytest.fixture
async def given_async(project: Project) -> AsyncIterator[supabase.AsyncClient]:
    client = await supabase.acreate_client(project.url, ANON)
    yield client
    await client.auth.close()


async def until(true: Callable[[], Any], seconds: float = 8) -> None:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def use(client: Any) -> list[Any]:
    """A request of each part; awaitables where the client is asynchronous."""
    return [
        client.table("vault").select("*").execute(),
        client.from_("vault").insert({"content": "x"}).execute(),
        client.table("vault").upsert({"content": "x"}).execute(),
        client.table("vault").update({"content": "x"}).eq("id", 1).execute(),
        client.table("vault").delete().eq("id", 1).execute(),
        client.rpc("f", {"a": 1}).execute(),
        client.rpc("f", {"a": 1}, get=True).execute(),
        client.schema("app").table("vault").select("*").execute(),
        client.schema("kakunin").rpc("verify_agent_scope", {"scope": "orders:read"}).execute(),
        client.storage.list_buckets(),
        client.storage.from_("bucket").download("folder/file"),
        client.storage.from_("bucket").upload("folder/file", b"bytes"),
        client.functions.invoke("hello", {"body": {"a": 1}}),
    ]


UPLOADED = {"Key": "bucket/folder/file", "Id": "1", "path": "folder/file"}
PARTS = {"rest", "storage", "functions"}


def answering_uploads(request: Any) -> Answer | None:
    return Answer(body=UPLOADED) if request.path == "/storage/v1/object/bucket/folder/file" else None


def assert_agent_s(project: Project, requests: int) -> None:
    assert len(project.done) == requests
    for request in project.done:
        claims = request.claims
        assert claims["kakunin_cert_serial"] == SERIAL, request.path
        assert (claims["role"], claims["sub"]) == ("kakunin_agent", AGENT)
        assert claims["scopes"] == ["orders:read"]
        assert request.headers["x-kakunin-cert-serial"] == SERIAL
        assert request.headers["apikey"] == ANON


def test_every_request_of_every_part_is_the_agent_s(project: Project, given: supabase.Client) -> None:
    project.answer = answering_uploads
    with bind_agent_session(given, "3af291cc", jwt_secret=SECRET) as bound:
        assert isinstance(bound, supabase.Client)
        done = use(bound)
    assert_agent_s(project, len(done))
    assert {request.path.split("/")[1] for request in project.done} == PARTS
    assert len({request.token for request in project.done}) == 1
    (asked,) = project.asked
    assert json.loads(asked.body) == {"serial": SERIAL}
    assert asked.headers["content-profile"] == "kakunin"
    assert "x-kakunin-cert-serial" not in asked.headers
    assert asked.claims.keys() == {"role", "aud", "iat", "exp"}


async def test_every_request_of_every_part_is_the_agent_s_async(
    project: Project, given_async: supabase.AsyncClient
) -> None:
    project.answer = answering_uploads
    async with bind_agent_session(given_async, SERIAL, jwt_secret=SECRET) as bound:
        assert isinstance(bound, supabase.AsyncClient)
        done = await asyncio.gather(*use(bound))
    assert_agent_s(project, len(done))
    assert {request.path.split("/")[1] for request in project.done} == PARTS
    assert len(project.asked) == 1


def test_the_client_that_was_given_stays_as_it_is(project: Project, given: supabase.Client) -> None:
    headers, options = dict(given.options.headers), given.options
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound.table("vault").select("*").execute()
        given.table("vault").select("*").execute()
    given.table("vault").select("*").execute()
    given.postgrest.session.close()
    first, second, third = project.done
    assert first.claims["kakunin_cert_serial"] == SERIAL
    for request in (second, third):
        assert request.token == ANON
        assert "x-kakunin-cert-serial" not in request.headers
    assert given.options is options
    assert dict(given.options.headers) == headers
    assert given.options.httpx_client is None


def test_a_user_s_session_is_not_carried_along(project: Project) -> None:
    options = SyncClientOptions(headers={"Authorization": "Bearer of-a-user", "X-Trace": "7"})
    given = supabase.create_client(project.url, ANON, options)
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET, role="authenticated") as bound:
        bound.table("vault").select("*").execute()
        assert bound.auth.get_session() is None
    (request,) = project.done
    assert request.claims["role"] == "authenticated"
    assert request.headers["x-trace"] == "7"
    given.auth.close()


def test_no_part_can_be_told_of_another_token(project: Project, given: supabase.Client) -> None:
    other = "eyJhbGciOiJub25lIn0.eyJyb2xlIjoic2VydmljZV9yb2xlIn0."
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound.postgrest.auth(other)
        bound.table("vault").select("*").execute()
        bound.postgrest.auth(None, username="postgres", password="x")
        bound.table("vault").select("*").execute()
        bound.table("vault").select("*").execute()
        bound.functions.set_auth(other)
        headers = {"authorization": f"Bearer {other}", "X-KAKUNIN-CERT-SERIAL": "AA:BB", "apikey": other}
        bound.functions.invoke("hello", {"headers": headers})
        bound.options.headers.update(headers)
        bound.auth._notify_all_subscribers("SIGNED_OUT", None)
        bound._postgrest = bound._storage = bound._functions = None
        bound.table("vault").select("*").execute()
        bound.storage.list_buckets()
        done = 6
    assert_agent_s(project, done)


def test_auth_is_left_to_users(project: Project, given: supabase.Client) -> None:
    project.answer = lambda r: Answer(400, {"msg": "no"}) if r.path.startswith("/auth/") else None
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        with pytest.raises(supabase.AuthError):
            bound.auth.get_user("of-a-user")
    (request,) = project.done
    assert request.token == "of-a-user"
    assert "x-kakunin-cert-serial" not in request.headers


@pytest.mark.parametrize(
    "key", [*map(api_key, ("service_role", "supabase_admin", "postgres", "authenticator")), "sb_secret_abc"]
)
def test_a_client_with_a_key_that_bypasses_row_security_is_refused(project: Project, key: str) -> None:
    given = supabase.create_client(project.url, key)
    with pytest.raises(BadInputError, match="row security"):
        bind_agent_session(given, SERIAL, jwt_secret=SECRET)
    assert project.requests == []
    given.auth.close()


def test_publishable_keys_are_taken(project: Project) -> None:
    given = supabase.create_client(project.url, "sb_publishable_abc")
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound.table("vault").select("*").execute()
    assert project.done[0].headers["apikey"] == "sb_publishable_abc"
    given.auth.close()


# Renewal ------------------------------------------------------------------------------------------------


def test_a_token_is_renewed_before_it_expires_and_the_certificate_verified_again(
    project: Project, given: supabase.Client
) -> None:
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET, lifetime=2) as bound:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            bound.table("vault").select("*").execute()
            time.sleep(0.1)
    tokens = {request.token for request in project.done}
    assert len(tokens) >= 3
    assert len(project.asked) >= len(tokens)
    assert_agent_s(project, len(project.done))


async def test_a_long_lived_asynchronous_program_renews(
    project: Project, given_async: supabase.AsyncClient
) -> None:
    bound = await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET, lifetime=2)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        await bound.table("vault").select("*").execute()
        await asyncio.sleep(0.1)
    await bound.close()
    tokens = {request.token for request in project.done}
    assert len(tokens) >= 3
    assert len(project.asked) >= len(tokens)
    assert_agent_s(project, len(project.done))


def test_threads_that_need_a_token_at_once_share_it(project: Project, given: supabase.Client) -> None:
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound._tokens._token = None
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda _: bound.table("vault").select("*").execute(), range(32)))
    assert len(project.asked) == 2
    assert_agent_s(project, 32)


async def test_tasks_that_need_a_token_at_once_share_it_and_one_cancelled_costs_the_others_nothing(
    project: Project, given_async: supabase.AsyncClient
) -> None:
    asked = threading.Event()

    def slowly(request: Any) -> Answer | None:
        if "verify" in request.path:
            asked.set()
            time.sleep(0.3)
        return None

    project.answer = slowly
    bound = bind_agent_session(given_async, SERIAL, jwt_secret=SECRET)
    tasks = [asyncio.ensure_future(bound.table("vault").select("*").execute()) for _ in range(20)]
    await asyncio.to_thread(asked.wait)
    tasks[0].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert [error for error in done[1:] if isinstance(error, BaseException)] == []
    assert len(project.asked) == 2  # the one that was cancelled, and one for all others
    await bound.close()


# Fail closed --------------------------------------------------------------------------------------------

UNUSABLE = [
    ({"status": "revoked", "revocation_reason": "keyCompromise"}, CertificateRevokedError),
    ({"status": "suspended"}, AgentSuspendedError),
    ({"status": "expired"}, CertificateValidityError),
    ({"status": "not_yet_valid"}, CertificateValidityError),
    ({"status": "unknown", "agent_id": None, "not_after": None}, UnknownCertificateError),
    ({"status": "something new"}, KakuninError),
]
STATUSES = [str(fields["status"]) for fields, _ in UNUSABLE]


@pytest.mark.parametrize(("fields", "error"), UNUSABLE, ids=STATUSES)
def test_an_unusable_certificate_is_not_bound(
    project: Project, given: supabase.Client, fields: dict[str, Any], error: type[KakuninError]
) -> None:
    project.certificate = certificate(valid=False, **fields)
    with pytest.raises(error):
        bind_agent_session(given, SERIAL, jwt_secret=SECRET)
    assert project.done == []


@pytest.mark.parametrize(("fields", "error"), UNUSABLE, ids=STATUSES)
async def test_an_unusable_certificate_sends_nothing_async(
    project: Project, given_async: supabase.AsyncClient, fields: dict[str, Any], error: type[KakuninError]
) -> None:
    project.certificate = certificate(valid=False, **fields)
    with pytest.raises(error):
        await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET)
    bound = bind_agent_session(given_async, SERIAL, jwt_secret=SECRET)
    for request in use(bound):
        with pytest.raises(error):
            await request
    await bound.close()
    assert project.done == []


@pytest.mark.parametrize(("fields", "error"), UNUSABLE, ids=STATUSES)
def test_what_became_unusable_is_not_renewed(
    project: Project, given: supabase.Client, fields: dict[str, Any], error: type[KakuninError]
) -> None:
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET, lifetime=1) as bound:
        project.certificate = certificate(valid=False, **fields)
        time.sleep(1.0)
        project.requests.clear()
        for part in (
            lambda: bound.table("vault").select("*").execute(),
            lambda: bound.schema("kakunin").rpc("f", {}).execute(),
            bound.storage.list_buckets,
            lambda: bound.functions.invoke("hello"),
        ):
            with pytest.raises(error):
                part()
        assert project.done == []
        project.certificate = certificate()
        bound.table("vault").select("*").execute()  # reinstated
    assert_agent_s(project, 1)


def raw(status: int, body: Any, **headers: str) -> Answer:
    return Answer(status, body, headers)


WRONG = {
    "no JSON": (raw(200, b"<html>"), VerificationUnavailableError),
    "null": (raw(200, None), VerificationUnavailableError),
    "a list": (raw(200, [certificate()]), VerificationUnavailableError),
    "valid as a text": (raw(200, certificate(valid="true")), VerificationUnavailableError),
    "no agent": (raw(200, certificate(agent_id=None)), VerificationUnavailableError),
    "nested too deep": (raw(200, b"[" * 200_000), VerificationUnavailableError),
    "a failure nested too deep": (raw(500, b"[" * 200_000), VerificationUnavailableError),
    "an agent that is a number": (raw(200, certificate(agent_id=7)), VerificationUnavailableError),
    "an agent that is none": (raw(200, certificate(agent_id="atlas")), VerificationUnavailableError),
    "no end": (raw(200, certificate(not_after=None)), VerificationUnavailableError),
    "an end without a zone": (raw(200, certificate(not_after="2099-01-01")), VerificationUnavailableError),
    "a past end": (raw(200, certificate(not_after="2020-01-01T00:00:00+00:00")), CertificateValidityError),
    "another serial": (raw(200, certificate(serial_number="AA:BB")), CredentialRejectedError),
    "valid and revoked": (raw(200, certificate(status="revoked")), CertificateRevokedError),
    "the key is not trusted": (
        raw(401, {"code": "PGRST301", "message": "JWSError JWSInvalidSignature"}),
        CredentialRejectedError,
    ),
    "not exposed": (raw(406, {"code": "PGRST106", "message": "The schema must be..."}), KakuninError),
    "no such function": (raw(404, {"code": "PGRST202", "message": "Could not find..."}), KakuninError),
    "not granted": (raw(403, {"code": "42501", "message": "permission denied"}), KakuninError),
    "refused by name": (raw(403, {"code": "KA008", "message": "suspended"}), AgentSuspendedError),
    "no database": (raw(503, {"code": "PGRST002", "message": "no"}), VerificationUnavailableError),
    "a failure": (raw(500, b""), VerificationUnavailableError),
    "elsewhere": (raw(307, b"", Location="http://127.0.0.1:9/steal"), VerificationUnavailableError),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_is_none_binds_nobody(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient, name: str
) -> None:
    answer, error = WRONG[name]
    project.answer = lambda _: answer
    with pytest.raises(error) as raised:
        bind_agent_session(given, SERIAL, jwt_secret=SECRET)
    with pytest.raises(error):
        await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET)
    assert raised.value.hint or name == "refused by name"
    assert project.done == []
    said = f"{raised.value} {raised.value.hint}"
    assert SECRET not in said
    assert all(request.token not in said for request in project.asked)


async def test_where_nobody_answers_nothing_is_bound_and_what_is_bound_ends(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    bound = bind_agent_session(given, SERIAL, jwt_secret=SECRET, lifetime=1)
    bound_async = await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET, lifetime=1)
    await asyncio.sleep(1.0)
    project.answer = lambda _: Answer(0)
    with pytest.raises(VerificationUnavailableError):
        bound.table("vault").select("*").execute()
    with pytest.raises(VerificationUnavailableError):
        await bound_async.table("vault").select("*").execute()
    project.stop()
    with pytest.raises(VerificationUnavailableError):
        bind_agent_session(given, SERIAL, jwt_secret=SECRET)
    with pytest.raises(VerificationUnavailableError):
        await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET)
    bound.close()
    await bound_async.close()
    assert project.done == []


async def test_a_key_that_is_missing_or_does_not_answer_binds_nobody(
    project: Project,
    given: supabase.Client,
    given_async: supabase.AsyncClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "correct horse")
    for key in ({}, {"jwt_secret": SECRET, "jwt_signer": "file:key.pem"}, {"jwt_secret": "short"}):
        with pytest.raises(BadInputError):
            bind_agent_session(given, SERIAL, **key)
    for client in (given, given_async):
        with pytest.raises(SignerError):
            outcome = bind_agent_session(client, SERIAL, jwt_signer="file:/nowhere/key.pem")
            await outcome
    assert project.requests == []


class FailingSigner(LocalSigner):
    down = False

    def sign(self, digest: bytes) -> bytes:
        if self.down:
            raise SignerUnavailableError("the KMS does not answer", "Try again later.")
        return super().sign(digest)


async def test_a_kms_that_goes_away_ends_what_is_bound_and_comes_back(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    signer = LocalSigner.generate()
    signer.__class__ = FailingSigner
    assert isinstance(signer, FailingSigner)
    bound = bind_agent_session(given, SERIAL, jwt_signer=signer, lifetime=1)
    bound_async = await bind_agent_session(given_async, SERIAL, jwt_signer=signer, lifetime=1)
    signer.down = True
    await asyncio.sleep(1.0)
    with pytest.raises(SignerUnavailableError):
        bound.table("vault").select("*").execute()
    with pytest.raises(SignerUnavailableError):
        await bound_async.table("vault").select("*").execute()
    assert project.done == []
    signer.down = False
    bound.table("vault").select("*").execute()
    await bound_async.table("vault").select("*").execute()
    assert len(project.done) == 2
    bound.close()
    await bound_async.close()


def test_a_credential_of_another_agent_is_refused(project: Project, given: supabase.Client) -> None:
    signer = LocalSigner.generate()
    mine = AgentCredential(AGENT, SERIAL, signer)
    with bind_agent_session(given, mine, jwt_secret=SECRET) as bound:
        bound.table("vault").select("*").execute()
    assert project.done[0].claims["sub"] == AGENT
    with pytest.raises(CredentialRejectedError):
        bind_agent_session(given, AgentCredential(uuid.uuid4(), SERIAL, signer), jwt_secret=SECRET)


@pytest.mark.parametrize("serial", ["", "x", "3A:F2:91:CC\r\nX-Other: 1", "\uff13\uff21", SERIAL + ":", None])
def test_what_is_no_serial_is_refused(project: Project, given: supabase.Client, serial: Any) -> None:
    with pytest.raises(BadInputError):
        bind_agent_session(given, serial, jwt_secret=SECRET)
    assert project.requests == []


async def test_keywords_are_for_the_clients_they_are_for(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    with pytest.raises(TypeError, match="jwt_secret"):
        bind_agent_session(object(), SERIAL, jwt_secret=SECRET)  # type: ignore[call-overload]
    for wrong in ({"attempts_dsn": "dbname=x"}, {"record_attempts": False}, {"nothing": 1}):
        with pytest.raises(TypeError):
            bind_agent_session(given, SERIAL, jwt_secret=SECRET, **wrong)  # type: ignore[call-overload]
    with CertificateCache("host=/nowhere") as cache, pytest.raises(BadInputError, match="AsyncCert"):
        bind_agent_session(given_async, SERIAL, jwt_secret=SECRET, certificates=cache)  # type: ignore
    async with AsyncCertificateCache("host=/nowhere") as async_cache:
        with pytest.raises(BadInputError, match="a CertificateCache"):
            bind_agent_session(given, SERIAL, jwt_secret=SECRET, certificates=async_cache)  # type: ignore
    assert project.requests == []


async def test_a_cache_that_cannot_ask_binds_nobody(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    with CertificateCache("host=/nowhere") as cache:
        with pytest.raises(VerificationUnavailableError) as raised:
            bind_agent_session(given, SERIAL, jwt_secret=SECRET, certificates=cache)
        assert isinstance(raised.value.__cause__, psycopg.OperationalError)
    async with AsyncCertificateCache("host=/nowhere") as async_cache:
        with pytest.raises(VerificationUnavailableError):
            await bind_agent_session(given_async, SERIAL, jwt_secret=SECRET, certificates=async_cache)
    assert project.requests == []


# HTTP ---------------------------------------------------------------------------------------------------

IDENTITY = {"authorization", "apikey", "x-kakunin-cert-serial"}


async def test_a_redirect_takes_the_agent_s_identity_to_no_other_origin(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    def moved(request: Any) -> Answer | None:
        if request.path == "/rest/v1/away":
            return Answer(307, b"", {"Location": f"{elsewhere.url}/rest/v1/loot"})
        if request.path == "/rest/v1/near":
            return Answer(307, b"", {"Location": "/rest/v1/here"})
        if request.path.startswith("/functions/"):
            return Answer(307, b"", {"Location": f"{elsewhere.url}/loot"})
        return None

    with serve({}) as elsewhere:
        project.answer = moved
        with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
            bound.table("away").select("*").execute()
            bound.functions.invoke("hello", {"headers": {"X-Kakunin-Cert-Serial": "AA"}})
            bound.table("near").select("*").execute()
        async with bind_agent_session(given_async, SERIAL, jwt_secret=SECRET) as bound_async:
            await bound_async.table("away").select("*").execute()
            await bound_async.storage._client.get(f"{elsewhere.url}/rest/v1/loot")
        assert len(elsewhere.requests) == 4
        for request in elsewhere.requests:
            assert not IDENTITY & request.headers.keys()
    assert [r.path for r in project.done[-2:-1]] == ["/rest/v1/here"]
    assert project.done[-2].claims["kakunin_cert_serial"] == SERIAL


async def test_a_user_in_a_url_does_not_take_the_token_s_place(
    project: Project, given: supabase.Client, given_async: supabase.AsyncClient
) -> None:
    there = project.url.replace("://", "://user:password@") + "/rest/v1/here"
    project.answer = lambda r: Answer(307, b"", {"Location": there}) if r.path == "/rest/v1/moved" else None
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound.table("moved").select("*").execute()
    async with bind_agent_session(given_async, SERIAL, jwt_secret=SECRET) as bound_async:
        await bound_async.table("moved").select("*").execute()
    assert [r.path for r in project.done] == ["/rest/v1/moved", "/rest/v1/here"] * 2
    assert_agent_s(project, 4)


def test_an_http_client_of_the_caller_s_is_used_and_outlives_the_binding(project: Project) -> None:
    seen: list[str] = []
    http = httpx.Client(
        headers={"X-Mine": "1", "Authorization": "Bearer mine"},
        auth=("someone", "else"),
        event_hooks={"request": [lambda request: seen.append(request.url.path)]},
    )
    given = supabase.create_client(project.url, ANON, SyncClientOptions(httpx_client=http))
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        bound.table("vault").select("*").execute()
        bound.storage.list_buckets()
    assert_agent_s(project, 2)
    assert all(request.headers["x-mine"] == "1" for request in project.done)
    assert len(seen) == 3
    assert not http.is_closed
    with pytest.raises(RuntimeError, match="closed"):
        bound.table("vault").select("*").execute()
    given.table("vault").select("*").execute()
    http.close()


async def test_an_http_client_of_the_caller_s_is_used_async(project: Project) -> None:
    async with httpx.AsyncClient(headers={"X-Mine": "1"}) as http:
        given = await supabase.acreate_client(project.url, ANON, AsyncClientOptions(httpx_client=http))
        async with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
            await bound.table("vault").select("*").execute()
            await bound.functions.invoke("hello")
        assert_agent_s(project, 2)
        assert all(request.headers["x-mine"] == "1" for request in project.done)
        with pytest.raises(RuntimeError, match="closed"):
            await bound.table("vault").select("*").execute()
        assert not http.is_closed


async def test_each_part_keeps_its_timeout(project: Project) -> None:
    options = {"function_client_timeout": 1, "postgrest_client_timeout": 10}
    given = supabase.create_client(project.url, ANON, SyncClientOptions(**options))  # type: ignore[arg-type]
    given_async = await supabase.acreate_client(
        project.url,
        ANON,
        AsyncClientOptions(**options),  # type: ignore[arg-type]
    )
    project.answer = lambda request: None if "verify" in request.path else time.sleep(1.5)  # type: ignore
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        with pytest.raises(httpx.ReadTimeout):
            bound.functions.invoke("slow")
        bound.table("vault").select("*").execute()
    async with bind_agent_session(given_async, SERIAL, jwt_secret=SECRET) as bound_async:
        with pytest.raises(httpx.ReadTimeout):
            await bound_async.functions.invoke("slow")
        await bound_async.table("vault").select("*").execute()
    given.auth.close()
    await given_async.auth.close()


def test_nothing_is_sent_after_the_block(project: Project, given: supabase.Client) -> None:
    with bind_agent_session(given, SERIAL, jwt_secret=SECRET) as bound:
        kept = bound.table("vault").select("*")
        inner = bound.schema("app")
    for late in (kept.execute, inner.table("vault").select("*").execute, bound.storage.list_buckets):
        with pytest.raises(RuntimeError, match="closed"):
            late()
    assert project.done == []


# Realtime -----------------------------------------------------------------------------------------------


class Realtime:
    """A server that records what it is told, and says yes."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.messages: list[dict[str, Any]] = []
        self.connections: list[ServerConnection] = []

    async def handle(self, connection: ServerConnection) -> None:
        assert connection.request
        self.paths.append(connection.request.path)
        self.connections.append(connection)
        async for text in connection:
            message = json.loads(text)
            self.messages.append(message)
            if message["event"] in ("phx_join", "phx_leave", "heartbeat"):
                answer = {"status": "ok", "response": {"postgres_changes": []}}
                await connection.send(
                    json.dumps(
                        {
                            "event": "phx_reply",
                            "payload": answer,
                            **{k: message[k] for k in ("topic", "ref", "join_ref") if k in message},
                        }
                    )
                )

    def told(self, event: str) -> list[str]:
        return [m["payload"]["access_token"] for m in self.messages if m["event"] == event]


@contextlib.asynccontextmanager
async def realtime(project: Project, **bind: Any) -> AsyncIterator[tuple[Realtime, BoundAsyncClient]]:
    """A client whose HTTP goes to the project, and whose WebSocket to a server of its own."""
    server = Realtime()
    async with serve_websocket(server.handle, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        given = await supabase.acreate_client(project.url, ANON)
        async with bind_agent_session(given, SERIAL, jwt_secret=SECRET, **bind) as bound:
            bound.realtime.url = bound.realtime.url.replace(project.url.rpartition(":")[2], str(port))
            yield server, bound
        await given.auth.close()


def agent_of(token: str) -> str:
    import jwt

    claims = jwt.decode(token, SECRET, algorithms=["HS256"], audience="authenticated")
    return str(claims["kakunin_cert_serial"])


async def test_realtime_is_told_the_agent_s_token_and_each_next_one(project: Project) -> None:
    async with realtime(project, lifetime=2) as (server, bound):
        channel = await bound.channel("orders").subscribe()
        assert channel.is_joined
        (first,) = server.told("phx_join")
        assert agent_of(first) == SERIAL
        assert ANON in server.paths[0]
        await until(lambda: len(server.told("access_token")) >= 2)
        tokens = [first, *server.told("access_token")]
        assert len(set(tokens)) == len(tokens) >= 3
        for token in tokens[1:]:
            assert token != ANON
        assert len(project.asked) >= 3


async def test_realtime_is_left_when_the_certificate_is_revoked(project: Project) -> None:
    states: list[Any] = []
    async with realtime(project, lifetime=1) as (server, bound):
        await bound.channel("orders").subscribe(lambda state, error: states.append((state.name, error)))
        project.certificate = certificate(valid=False, status="revoked")
        await until(lambda: not bound.realtime.is_connected)
        assert not bound.realtime.is_connected
        await asyncio.wait_for(server.connections[0].wait_closed(), 5)
        assert states[0] == ("SUBSCRIBED", None)
        assert states[-1][0] == "CHANNEL_ERROR"
        assert isinstance(states[-1][1], CertificateRevokedError)
        with pytest.raises(CertificateRevokedError):
            await bound.realtime.connect()
        assert len(server.connections) == 1


async def test_realtime_waits_for_a_project_that_is_away_for_as_long_as_its_token_is_good(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kakunin_db.binding.supabase_._PAUSE", 0.1)
    async with realtime(project, lifetime=3) as (server, bound):
        await bound.channel("orders").subscribe()
        project.answer = lambda _: Answer(503, b"")
        await until(lambda: len(project.asked) >= 3)
        project.answer = lambda _: None
        await until(lambda: server.told("access_token"))
        assert bound.realtime.is_connected
        assert server.told("access_token")
        project.answer = lambda _: Answer(503, b"")
        await until(lambda: not bound.realtime.is_connected)
        assert not bound.realtime.is_connected


async def test_realtime_takes_no_other_token_and_has_none_unless_it_is_good(project: Project) -> None:
    async with realtime(project) as (server, bound):
        with pytest.raises(BadInputError):
            await bound.realtime.set_auth("other")
        bound.realtime.access_token = "other"
        await bound.channel("orders").subscribe()
        assert [agent_of(token) for token in server.told("phx_join")] == [SERIAL]
        bound._tokens.token = None
        with pytest.raises(CredentialRejectedError):
            await bound.channel("orders").http_send("event", {"a": 1})


async def test_realtime_reconnects_with_a_token_of_then(project: Project) -> None:
    async with realtime(project, lifetime=60) as (server, bound):
        bound.realtime.initial_backoff = 0.05
        await bound.channel("orders").subscribe()
        bound._tokens.token = None
        project.certificate = certificate(permitted_actions=["orders:none"])
        await server.connections[0].close(1011)
        await until(lambda: len(server.told("phx_join")) >= 2)
        first, second = server.told("phx_join")
        assert first != second
        assert agent_of(second) == SERIAL


async def test_closing_leaves_no_task_behind(project: Project) -> None:
    before = asyncio.all_tasks()
    async with realtime(project) as (_, bound):
        await bound.channel("orders").subscribe()
        keeper = bound.realtime._keeper
        assert keeper
    await asyncio.sleep(0.1)
    assert keeper.done()
    left = [task for task in asyncio.all_tasks() - before if "kakunin" in repr(task)]
    assert left == []


def test_importing_the_kit_does_not_import_supabase() -> None:
    import subprocess
    import sys

    code = (
        "import sys, kakunin_db, kakunin_db.cli;"
        " print([m for m in ('supabase', 'httpx', 'realtime') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == "[]\n"
