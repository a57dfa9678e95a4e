"""Proof at the gateway: signed requests and assertions, as their forger would have it."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import json
import re
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from conftest import Agent, Database, Vault
from gateways import FRAMEWORKS, SERIAL, serial_of, site
from http_message_signatures import HTTPMessageSigner, algorithms
from psycopg_pool import ConnectionPool

from kakunin_db import AgentCredential, BadInputError, bind_agent_session
from kakunin_db.middleware import Gateway, MemoryNonces, Refused
from kakunin_db.middleware.core import Request, Rules
from kakunin_db.middleware.signature import TAG, sign_request

every = pytest.mark.parametrize("framework", FRAMEWORKS)

HERE = "https://api.test"
JSON = ("Content-Type", "application/json")
INVALID = (401, "invalid_signature")

Headers = list[tuple[str, str]]


def signed(
    agent: Agent,
    method: str = "GET",
    target: str = "/whoami",
    content: bytes = b"",
    headers: Headers | None = None,
    *,
    url: str = HERE,
    **more: Any,
) -> Headers:
    """All the fields of a request that the agent signs."""
    headers = headers or []
    added = sign_request(agent.credential, method, url + target, dict(headers), content, **more)
    return [*headers, *added.items()]


class Message:
    def __init__(self, method: str, url: str, headers: dict[str, str]) -> None:
        self.method, self.url, self.headers = method, url, headers


def forged(
    agent: Agent,
    *,
    covered: tuple[str, ...] = ("@method", "@target-uri"),
    signer: Agent | None = None,
    content: bytes | None = None,
    headers: dict[str, str] | None = None,
    edit: Callable[[str], str] = str,
    **parameters: Any,
) -> Headers:
    """A request for /whoami signed in any way there is; ``edit`` changes what is sent of its parameters."""
    fields = {**(headers or {})}
    message = Message("GET", f"{HERE}/whoami", fields)
    library = HTTPMessageSigner(signature_algorithm=algorithms.RSA_V1_5_SHA256)
    options = {"key_id": agent.serial, "nonce": "n" * 22, "tag": TAG, **parameters}
    prepared = library.prepare(message, covered_component_ids=covered, body=content, **options)
    key = (signer or agent).signer
    library.apply(message, prepared, key.sign(hashlib.sha256(prepared.signature_base).digest()))
    fields["Signature-Input"] = edit(fields["Signature-Input"])
    return [(SERIAL, agent.serial), *fields.items()]


def without(headers: Headers, *names: str) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]


def instead(headers: Headers, name: str, value: str) -> Headers:
    return [*without(headers, name.lower()), (name, value)]


def at_signatures(framework: str, database: Database, **rules: Any) -> Any:
    return site(framework, database, proof="signature", public_url=HERE, **rules)


@every
async def test_a_signed_request_is_admitted_once(framework: str, vault: Vault) -> None:
    agent = vault.one
    async with at_signatures(framework, vault.database) as app:
        headers = signed(agent)
        answer = await app.send("GET", "/whoami", headers)
        assert (answer.status, answer.json["proof"]) == (200, "signature")
        assert (await app.send("GET", "/whoami", headers)).outcome == INVALID
        assert (await app.send("GET", "/vault", signed(agent, target="/vault"))).json == ["one-a", "one-b"]
        content = b'{"amount": 5}'
        headers = signed(agent, "POST", "/echo?x=1&y=%20", content, [JSON])
        answer = await app.send("POST", "/echo?x=1&y=%20", headers, [content[:3], b"", content[3:]])
        assert answer.json == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert app.ran == ["whoami", "vault", "echo"]
        for target in ("/admin/a%20b", "/admin/%C3%A9", "/admin/a%2Fb?x"):
            assert (await app.send("GET", target, signed(agent, target=target))).status == 200


@every
async def test_the_serial_alone_is_no_proof(framework: str, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    async with at_signatures(framework, database) as app:
        answer = await app.send("GET", "/whoami", serial_of(agent))
        assert answer.outcome == (401, "missing_signature")
        assert f'tag="{TAG}"' in answer.headers["accept-signature"]
        headers = signed(agent)
        for name in ("signature", "signature-input"):
            assert (await app.send("GET", "/whoami", without(headers, name))).outcome[0] == 401
        assert (
            await app.send("GET", "/whoami", [*serial_of(agent), ("X-Kakunin-Signature", "x")])
        ).outcome == (
            401,
            "missing_signature",
        )
        # Another's signature, another's serial, and a serial of nobody.
        assert (await app.send("GET", "/whoami", instead(headers, SERIAL, other.serial))).outcome == INVALID
        assert (await app.send("GET", "/whoami", forged(agent, signer=other))).outcome == INVALID
        assert (await app.send("GET", "/whoami", forged(agent, key_id=other.serial))).outcome == INVALID
        assert (await app.send("GET", "/whoami", instead(headers, SERIAL, "01:02"))).outcome == (
            401,
            "unknown_cert_serial",
        )
        assert app.ran == []
        # Nothing of that has used the nonce up.
        assert (await app.send("GET", "/whoami", headers)).status == 200


@every
async def test_a_signature_is_of_one_request(framework: str, database: Database) -> None:
    """What was signed for one is sent with something else."""
    agent = database.agent()
    content = b'{"amount": 5}'
    async with at_signatures(framework, database, signed_headers=["X-Amount"]) as app:
        empty = signed(agent, "POST", "/echo")
        get, post = signed(agent), signed(agent, "POST", "/echo", content, [JSON])
        amount = signed(agent, headers=[("X-Amount", "5")], signed_headers=["X-Amount"])
        elsewhere = signed(agent, url="https://other.test")
        for method, target, headers, body in (
            ("PUT", "/whoami", get, b""),
            ("HEAD", "/whoami", get, b""),
            ("GET", "/vault", get, b""),
            ("GET", "/admin", get, b""),
            ("GET", "/whoami?admin=1", get, b""),
            ("GET", "/%77hoami", get, b""),
            ("GET", "/mounted/whoami", get, b""),
            ("GET", "/whoami", elsewhere, b""),
            ("GET", "/whoami", [("Host", "other.test"), *elsewhere], b""),
            ("GET", "/whoami", [("X-Forwarded-Host", "other.test"), *elsewhere], b""),
            ("GET", "/whoami", signed(agent, url="http://api.test"), b""),
            ("GET", "/whoami", signed(agent, url="https://api.test:8443"), b""),
            ("GET", "/whoami", [("X-Amount", "5"), *get], b""),
            ("GET", "/whoami", instead(amount, "X-Amount", "6"), b""),
            ("GET", "/whoami", without(amount, "x-amount"), b""),
            ("POST", "/echo", post, b'{"amount": 6}'),
            ("POST", "/echo", post, b""),
            ("POST", "/echo", post, content + b" "),
            ("POST", "/echo", instead(post, "Content-Type", "text/plain"), content),
            ("POST", "/echo", without(post, "content-type"), content),
            ("POST", "/echo", [*post, ("Content-Encoding", "gzip")], content),
            ("POST", "/echo", without(post, "content-digest"), content),
            ("POST", "/echo", instead(post, "Content-Digest", digest(b"{}")), b"{}"),
            # Signed without content, sent with one, with and without a digest that nobody signed.
            ("POST", "/echo", empty, content),
            ("POST", "/echo", [*empty, ("Content-Digest", digest(content))], content),
        ):  # fmt: skip
            answer = await app.send(method, target, headers, body)
            assert (method, target, answer.refused(*INVALID)) == (method, target, True)
        assert app.ran == []
        assert (await app.send("GET", "/whoami", [("Host", "other.test"), *get])).status == 200
        assert (await app.send("GET", "/whoami", amount)).status == 200
        assert (await app.send("POST", "/echo", post, content)).status == 200


def digest(content: bytes, algorithm: str = "sha-256") -> str:
    name = algorithm.replace("-", "")
    return f"{algorithm}=:{base64.b64encode(hashlib.new(name, content).digest()).decode()}:"


async def test_a_signature_has_to_be_all_that_it_should(database: Database) -> None:
    agent = database.agent()
    now = dt.datetime.now(dt.timezone.utc)

    soon = int(time.time()) + 1

    def ago(seconds: float) -> dt.datetime:
        return now - dt.timedelta(seconds=seconds)

    wrong = {
        "method not covered": forged(agent, covered=("@target-uri",)),
        "target not covered": forged(agent, covered=("@method",)),
        "path for target": forged(agent, covered=("@method", "@path", "@query")),
        "authority for target": forged(agent, covered=("@method", "@authority", "@path")),
        "nothing covered": forged(agent, covered=()),
        "too old": forged(agent, created=ago(70)),
        "in the future": forged(agent, created=ago(-60)),
        "expired": forged(agent, expires=ago(10)),
        "no nonce": forged(agent, nonce=None),
        "short nonce": forged(agent, nonce="n" * 15),
        "long nonce": forged(agent, nonce="n" * 129),
        "other tag": forged(agent, tag="web-bot-auth"),
        "no tag": forged(agent, tag=None),
        "other algorithm": forged(agent, edit=lambda p: p.replace("rsa-v1_5-sha256", "rsa-pss-sha512")),
        "hmac": forged(agent, edit=lambda p: p.replace("rsa-v1_5-sha256", "hmac-sha256")),
        "edited time": forged(agent, edit=lambda p: re.sub(r"created=\d+", f"created={soon}", p)),
        "edited nonce": forged(agent, edit=lambda p: p.replace("n" * 22, "m" * 22)),
        "no time": forged(agent, edit=lambda p: re.sub(r";created=\d+", "", p)),
        "text time": forged(agent, edit=lambda p: re.sub(r"created=(\d+)", r'created="\1"', p)),
        "huge time": forged(agent, edit=lambda p: re.sub(r"created=\d+", "created=999999999999999", p)),
        "unknown parameter": forged(agent, edit=lambda p: f"{p};admin"),
        "key named badly": forged(agent, key_id="not a serial"),
        "no list": forged(agent, edit=lambda p: "kakunin=1"),
        "no dictionary": forged(agent, edit=lambda p: "%%%"),
        "twice": forged(agent, edit=lambda p: f"{p}, {p}"),
        "other label": forged(agent, edit=lambda p: p.replace("pyhms=", "x=")),
        "digest of nothing": forged(agent, content=b"something"),
        "unknown digest": [*forged(agent), ("Content-Digest", "md5=:AAAA:")],
    }  # fmt: skip
    async with at_signatures("starlette", database) as app:
        for name, headers in wrong.items():
            answer = await app.send("GET", "/whoami", headers)
            assert (name, answer.outcome) == (name, INVALID)
        long = instead(forged(agent), "Signature", f"x=:{'A' * 9000}:")
        assert (await app.send("GET", "/whoami", long)).outcome == (400, "malformed_request")
        for name in ("Signature", "Signature-Input"):
            for value in ("", "\u00e9", "x", "kakunin=:AAAA:", 'kakunin=("@method")'):
                answer = await app.send("GET", "/whoami", instead(forged(agent), name, value))
                assert (name, value, answer.outcome) == (name, value, INVALID)
        assert app.ran == []
        # Other parties' signatures beside it are none of its business, but there is only one of this kind.
        theirs = ', proxy=("@method");created=1;keyid="p";tag="proxy"'
        headers = forged(agent, edit=lambda p: p + theirs)
        headers = instead(headers, "Signature", dict(headers)["Signature"] + ", proxy=:AAAA:")
        assert (await app.send("GET", "/whoami", headers)).status == 200
        again = forged(agent, nonce="x" * 22, edit=lambda p: f"{p}, b={p.partition('=')[2]}")
        again = instead(
            again, "Signature", f"{dict(again)['Signature']}, b={dict(again)['Signature'].partition('=')[2]}"
        )
        assert (await app.send("GET", "/whoami", again)).outcome == INVALID
        assert app.ran == ["whoami"]


@every
async def test_content_is_held_up_to_a_limit(framework: str, database: Database) -> None:
    agent = database.agent()
    small, large = b"x" * 1000, b"x" * 1001
    async with at_signatures(framework, database, max_content=1000) as app:
        for content, status in ((small, 200), (large, 413)):
            headers = signed(agent, "POST", "/echo", content, [("Content-Type", "text/plain")])
            chunks = [content[i : i + 100] for i in range(0, len(content), 100)]
            answer = await app.send("POST", "/echo", headers, chunks)
            assert answer.status == status
            declared = [*signed(agent, "POST", "/echo", content, [("Content-Type", "text/plain")])]
            answer = await app.send(
                "POST", "/echo", [*declared, ("Content-Length", str(len(content)))], content
            )
            assert answer.status == status
        assert app.ran == ["echo", "echo"]
        for length in ("-1", "x", "1e3", "+5", "5, 5", "9" * 30, "\u0665"):
            headers = signed(agent, "POST", "/echo", b"12345", [("Content-Type", "text/plain")])
            answer = await app.send("POST", "/echo", [*headers, ("Content-Length", length)], b"12345")
            assert (length, answer.outcome) == (length, (400, "malformed_request"))
        assert app.ran == ["echo", "echo"]


@pytest.mark.parametrize("framework", ["flask", "django"])
async def test_content_that_ends_early_or_has_no_length(framework: str, database: Database) -> None:
    agent = database.agent()
    async with at_signatures(framework, database, max_content=1000) as app:

        def post(content: bytes) -> Headers:
            return signed(agent, "POST", "/echo", content, [("Content-Type", "text/plain")])

        answer = await app.send("POST", "/echo", post(b"12345"), b"1234", CONTENT_LENGTH="5")
        assert answer.status in (400, 401)
        assert app.ran == []
        if framework == "flask":
            chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": ""}
            answer = await app.send("POST", "/echo", post(b"12345"), b"12345", **chunked)
            assert answer.outcome == (411, "length_required")
            chunked["wsgi.input_terminated"] = True
            answer = await app.send("POST", "/echo", post(b"12345"), b"12345", **chunked)
            assert answer.json["bytes"] == 5
            answer = await app.send("POST", "/echo", post(b"x" * 1001), b"x" * 1001, **chunked)
            assert answer.status == 413
            assert app.ran == ["echo"]


async def test_a_revocation_while_content_arrives_counts(database: Database) -> None:
    agent = database.agent()
    content = b"slowly"
    async with at_signatures("starlette", database) as app:
        headers = signed(agent, "POST", "/echo", content)
        inner, parts = app.app, [content[:3], content[3:]]
        messages: list[Any] = []

        async def receive() -> Any:
            if len(parts) == 1:
                agent.revoke()
                await asyncio.sleep(0.5)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/echo", "raw_path": b"/echo", "query_string": b"",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
        }  # fmt: skip
        await inner(scope, receive, send)
        assert messages[0]["status"] == 403
        assert b"agent_revoked" in messages[1]["body"]
        assert app.ran == []


async def test_a_replay_whose_content_comes_when_its_nonce_is_forgotten(database: Database) -> None:
    """The signature counts as the request begins, and no more when the rest of it comes."""
    agent, nonces = database.agent(), MemoryNonces()
    async with at_signatures("starlette", database, max_age=1, options={"nonces": nonces}) as app:
        # Good for another two seconds or three: one of max_age and five between the clocks.
        headers = forged(agent, created=dt.datetime.now(dt.timezone.utc) - dt.timedelta(seconds=3))
        assert (await app.send("GET", "/whoami", headers)).status == 200
        messages: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(3.5)
            nonces._used.clear()  # as they would be twelve seconds after the first use
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http", "method": "GET", "path": "/whoami", "raw_path": b"/whoami", "query_string": b"",
            "headers": [(k.lower().encode(), v.encode()) for k, v in headers],
        }  # fmt: skip
        app.ran.clear()
        await app.app(scope, receive, send)
        assert messages[0]["status"] == 401
        assert b"invalid_signature" in messages[1]["body"]
        assert app.ran == []


async def test_a_middleware_below_another_does_not_ask_for_the_nonce_again(database: Database) -> None:
    from kakunin_db.middleware import AsyncGateway
    from kakunin_db.middleware.asgi import KakuninMiddleware

    agent, gateway = database.agent(permitted_actions=["a:b"]), AsyncGateway(database.dsn("gateway"))
    options: dict[str, Any] = {"proof": "signature", "public_url": HERE}
    async with at_signatures("starlette", database) as app:
        whole = app.app
        app.app = KakuninMiddleware(whole, gateway, required_scope="a:b", **options)
        headers = signed(agent)
        assert (await app.send("GET", "/whoami", headers)).status == 200
        assert (await app.send("GET", "/whoami", headers)).outcome == INVALID
        # One that demands less in front is no reason to demand less behind.
        app.app = KakuninMiddleware(whole, gateway, proof="serial")
        app.ran.clear()
        assert (await app.send("GET", "/whoami", serial_of(agent))).outcome == (401, "missing_signature")
        assert app.ran == []
        await gateway.close()


def test_nonces_are_remembered_while_they_count_and_one_agent_fills_only_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    nonces = MemoryNonces(most=3)
    assert [nonces.use("A", n, 60) for n in "xyxzy"] == [True, True, False, True, False]
    with pytest.raises(Refused) as refused:
        nonces.use("A", "w", 60)
    assert (refused.value.status, refused.value.error) == (429, "too_many_requests")
    assert nonces.use("B", "x", 60)
    now += 59
    assert not nonces.use("A", "x", 60)
    now += 2
    assert nonces.use("A", "x", 60)
    now += 200
    nonces.use("C", "x", 60)
    assert list(nonces._used) == ["C"]


@every
async def test_nonces_that_cannot_be_remembered_let_nobody_through(
    framework: str, database: Database
) -> None:
    agent = database.agent()

    class Broken:
        def use(self, serial: str, nonce: str, seconds: float) -> bool:
            raise ConnectionError

    class Vague:
        def use(self, serial: str, nonce: str, seconds: float) -> Any:
            return "OK"

    for nonces, outcome in ((Broken(), (503, "verify_unavailable")), (Vague(), INVALID)):
        async with at_signatures(framework, database, options={"nonces": nonces}) as app:
            assert (await app.send("GET", "/whoami", signed(agent))).outcome == outcome
            assert app.ran == []


async def test_nonces_can_be_shared_by_processes(database: Database) -> None:
    agent = database.agent()
    used: set[tuple[str, str]] = set()

    class Shared:
        async def use(self, serial: str, nonce: str, seconds: float) -> bool:
            await asyncio.sleep(0)
            new = (serial, nonce) not in used
            used.add((serial, nonce))
            return new

    options = {"nonces": Shared()}
    async with (
        at_signatures("starlette", database, options=options) as one,
        at_signatures("starlette", database, options=options) as two,
    ):
        headers = signed(agent)
        assert (await one.send("GET", "/whoami", headers)).status == 200
        assert (await two.send("GET", "/whoami", headers)).outcome == INVALID


async def test_a_proxy_may_take_a_path_away(database: Database) -> None:
    agent = database.agent()
    async with site("starlette", database, proof="signature", public_url=f"{HERE}:443/v1/") as app:
        assert (await app.send("GET", "/whoami", signed(agent, url=f"{HERE}/v1"))).status == 200
        assert (await app.send("GET", "/whoami", signed(agent, url=HERE))).outcome == INVALID


def test_without_what_was_sent_the_routed_path_counts(database: Database) -> None:
    agent = database.agent()
    gateway = Gateway(database.dsn("gateway"))
    rules = Rules(proof="signature", public_url=HERE)

    def admitted(target: str, path: str, raw: str | None, query: str = "") -> bool:
        headers = [(name.lower(), value) for name, value in signed(agent, target=target)]
        try:
            gateway.admit(rules, Request("GET", path, raw, query, headers), lambda limit: b"")
        except Refused as refused:
            assert refused.status in (400, 401)  # noqa: PT017 - and not 503
            return False
        return True

    assert admitted("/a%20b", "/a b", None)
    assert admitted("/%C3%A9", "/\u00e9", None)
    assert admitted("/a%2fb", "/a/b", "/a%2fb")
    assert not admitted("/a%2fb", "/a/b", None)
    assert not admitted("/a", "/a", "/a#b")
    assert not admitted("/a", "/a", "/a?b")
    assert not admitted("/a", "/a#b", None)
    assert not admitted("/a", "/a", "/a", "x#y")
    assert not admitted("/a", "/a", "http://other.test/a")
    gateway.close()


def test_an_agent_signs_no_message_as_a_request(database: Database) -> None:
    """Who has an agent sign messages would otherwise have it sign requests."""
    agent = database.agent()
    message = Message("GET", f"{HERE}/whoami", {})
    library = HTTPMessageSigner(signature_algorithm=algorithms.RSA_V1_5_SHA256)
    base = library.prepare(
        message,
        key_id=agent.serial,
        nonce="n" * 22,
        tag=TAG,
        covered_component_ids=("@method", "@target-uri"),
    ).signature_base
    for payload in (base, base.decode(), b'"@signature-params": ()', b'x\n"@signature-params": ()'):
        with pytest.raises(BadInputError, match="HTTP request"):
            agent.credential.sign(payload)
    agent.credential.sign({"base": base.decode()})
    agent.credential.sign(b' "@signature-params": ()')


def test_what_cannot_be_signed_is_said(database: Database) -> None:
    agent = database.agent()
    for url in ("/whoami", "api.test/x", "ftp://api.test/", "https://api.test/a b", "https://u:p@api.test/"):
        with pytest.raises(BadInputError):
            sign_request(agent.credential, "GET", url)
    with pytest.raises(BadInputError):
        sign_request(agent.credential, "GET", f"{HERE}/", {"Content-Type": "a\nb"})


def test_another_implementation_verifies_it(database: Database) -> None:
    """What is signed is RFC 9421's, read here from the fields alone, by its text."""
    agent = database.agent()
    headers = dict(signed(agent, "POST", "/echo?a=b", b"{}", [JSON]))
    label, _, parameters = headers["Signature-Input"].partition("=")
    signature = base64.b64decode(headers["Signature"].partition("=:")[2].rstrip(":"))
    base = "\n".join(
        [
            '"@method": POST',
            f'"@target-uri": {HERE}/echo?a=b',
            '"content-type": application/json',
            f'"content-digest": {digest(b"{}")}',
            f'"@signature-params": {parameters}',
        ]
    )
    assert (label, headers["Content-Digest"]) == ("kakunin", digest(b"{}"))
    query = "select kakunin.verify_message(%s, %s, %s)"
    assert database.value("gateway", query, [agent.serial, base.encode(), signature])["valid"]


# Assertions ------------------------------------------------------------------------------------------


def asserting(agent: Agent, assertion: str | None = None) -> Headers:
    return [(SERIAL, agent.serial), ("X-Kakunin-Assertion", assertion or agent.assertion())]


@every
async def test_an_assertion_binds_without_a_gateways_word(framework: str, vault: Vault) -> None:
    """The application's login is an agent's: it can bind nobody who has not sent proof."""
    one, two = vault.one, vault.two
    async with site(framework, vault.database, user="pooled", proof="assertion") as app:
        headers = asserting(one)
        answer = await app.send("GET", "/vault", headers)
        assert answer.json == ["one-a", "one-b"]
        assert (await app.send("GET", "/whoami", asserting(one))).json["proof"] == "assertion"
        app.ran.clear()
        assert (await app.send("GET", "/vault", headers)).outcome == (401, "invalid_assertion")
        assert (await app.send("GET", "/vault", serial_of(one))).outcome == (401, "missing_assertion")
        assert (await app.send("GET", "/vault", instead(asserting(two), SERIAL, one.serial))).outcome == (
            401,
            "invalid_assertion",
        )
        assert app.ran == []
        with psycopg.connect(app.dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
            with bind_agent_session(connection, one.serial):
                connection.execute("select 1")


@every
async def test_an_assertion_that_the_database_refuses(framework: str, database: Database) -> None:
    agent, other = database.agent(), database.agent()
    suspended, revoked = database.agent(), database.agent()
    elsewhere = agent.credential.assertion("00000000-0000-0000-0000-000000000000")
    head, claims, signature = agent.assertion().split(".")
    none = (
        base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": agent.serial}).encode())
        .decode()
        .rstrip("=")
    )
    as_agent = AgentCredential(agent.agent_id, agent.serial, other.signer).assertion(database.installation_id)
    suspended_headers, revoked_headers = asserting(suspended), asserting(revoked)
    async with site(framework, database, proof="assertion") as app:
        for assertion in (
            "x", "x.y.z", "..", "a.b.c.d", "\u00e9.\u00e9.\u00e9", "A" * 9000, elsewhere, as_agent,
            f"{head}.{claims}.", f"{none}.{claims}.", f"{head}.{claims}.{signature[:-4]}AAAA",
            other.assertion(),
        ):  # fmt: skip
            answer = await app.send("GET", "/whoami", asserting(agent, assertion))
            assert (assertion[:20], answer.outcome) == (assertion[:20], (401, "invalid_assertion"))
            assert assertion not in answer.content.decode() or assertion in ("x", "..")
        twice = [*asserting(agent), ("X-Kakunin-Assertion", agent.assertion())]
        assert (await app.send("GET", "/whoami", twice)).outcome[0] in (400, 401)
        suspended.suspend()
        revoked.revoke()
        assert (await app.send("GET", "/whoami", suspended_headers)).outcome == (403, "agent_suspended")
        assert (await app.send("GET", "/whoami", revoked_headers)).outcome == (403, "agent_revoked")
        assert app.ran == []
    async with site(framework, database, proof="assertion", dsn="host=127.0.0.1 port=1") as app:
        assert (await app.send("GET", "/whoami", asserting(agent))).outcome == (503, "verify_unavailable")
        assert app.ran == []


async def test_one_assertion_at_many_gateways_at_once_serves_one(database: Database) -> None:
    agent = database.agent()
    headers = asserting(agent)
    options: dict[str, Any] = {"proof": "assertion"}
    async with (
        site("starlette", database, **options) as one,
        site("flask", database, **options) as two,
        site("django", database, **options) as three,
    ):
        answers = await asyncio.gather(
            *(app.send("GET", "/whoami", headers) for app in (one, two, three) for _ in range(4))
        )
        assert sorted(answer.status for answer in answers) == [200, *[401] * 11]
        assert len(one.ran + two.ran + three.ran) == 1


async def test_a_ticket_is_shown_to_nobody_and_of_use_to_no_other_login(vault: Vault) -> None:
    seen: list[Any] = []
    database = vault.database
    async with site("flask", database, user="pooled", proof="assertion") as app:
        keep = app.seen
        app.seen = lambda agent: seen.append(agent) or keep(agent)  # type: ignore[method-assign]
        assert (await app.send("GET", "/whoami", asserting(vault.one))).status == 200
    (agent,) = seen
    assert agent.ticket.text not in repr(agent)
    rows = "select content from vault order by content"
    with ConnectionPool(database.dsn("pooled"), open=True) as pool:
        for _ in range(2):
            with bind_agent_session(pool, agent) as connection:
                assert [row[0] for row in connection.execute(rows)] == ["one-a", "one-b"]
    with psycopg.connect(database.dsn("agent_1")) as connection, pytest.raises(Exception, match="not issued"):
        with bind_agent_session(connection, agent):
            connection.execute(rows)
    vault.one.revoke()
    with psycopg.connect(database.dsn("pooled")) as connection, pytest.raises(Exception, match="was revoked"):
        with bind_agent_session(connection, agent):
            connection.execute(rows)
