"""Through a real PostgREST: who sees and changes what, what is refused and how, and what a forger gets."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from conftest import Agent, Database, Vault
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from postgrest_server import PostgREST, Response, base64url, jwt

HEADER = "X-Kakunin-Cert-Serial"
KAKUNIN = {"Content-Profile": "kakunin"}
API = ["kakunin_agent", "anon", "authenticated"]


@dataclass
class Api:
    """The vault and notes that refer to its rows, of two agents, and PostgREST before them."""

    rest: PostgREST
    database: Database
    one: Agent
    two: Agent

    def token(self, agent: Agent, role: str = "kakunin_agent", **claims: Any) -> str:
        claims = {"sub": str(agent.agent_id), "kakunin_cert_serial": agent.serial, **claims}
        return self.rest.token(role, **claims)

    def get(self, path: str, agent: Agent | None = None, role: str = "kakunin_agent", **kwargs: Any) -> Any:
        answer = self.request("GET", path, agent, role=role, **kwargs)
        assert answer.status in (200, 206), answer
        return answer.json

    def request(
        self,
        method: str,
        path: str,
        agent: Agent | None,
        body: Any = None,
        role: str = "kakunin_agent",
        **headers: str,
    ) -> Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        token = self.token(agent, role) if agent else None
        return self.rest.request(method, path, body, token=token, headers=given)

    def rows(self, agent: Agent | None, role: str = "kakunin_agent") -> list[str]:
        return [row["content"] for row in self.get("vault?order=id", agent, role)]


@pytest.fixture
def api(vault: Vault, postgrest: PostgREST) -> Iterator[Api]:
    database = vault.database
    with database.connect("app") as app:
        app.execute("select kakunin.protect('vault', roles => %s)", [API])
        app.execute(f"grant select, insert, update, delete on vault to {', '.join(API)}, service_role")
        app.execute(
            "create table note (id int primary key, vault_id int references vault,"
            " permitted_agent_serial text, text text)"
        )
        app.execute("insert into note select id, id, permitted_agent_serial, 'about ' || content from vault")
        app.execute("select kakunin.protect('note', roles => %s)", [API])
        app.execute(f"grant select, insert, update, delete on note to {', '.join(API)}, service_role")
    postgrest.reload()
    yield Api(postgrest, database, vault.one, vault.two)
    database.run("app", "drop table note")


def refused(answer: Response, status: int, code: str, text: str = "") -> None:
    assert answer.status == status, answer
    error = answer.json
    assert set(error) == {"code", "message", "details", "hint"}
    assert error["code"] == code, error
    assert text in error["message"]
    assert error["hint"]
    assert ("www-authenticate" in answer.headers) == (status == 401)


# Isolation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["kakunin_agent", "authenticated", "anon"])
def test_g1_select(api: Api, role: str) -> None:
    assert api.rows(api.one, role) == ["one-a", "one-b"]
    assert api.rows(api.two, role) == ["two-a", "two-b"]
    # Filters choose among what is visible, whatever they ask for.
    assert api.get("vault?permitted_agent_serial=eq." + api.two.serial, api.one, role) == []
    assert api.get("vault?or=(id.gt.0,content.like.*)&select=content&content=like.two*", api.one, role) == []


def test_g8_anybody_else_sees_nothing(api: Api) -> None:
    assert api.rows(None) == []
    for role in ("anon", "authenticated"):
        assert api.rest.request("GET", "vault", token=api.rest.token(role)).json == []
    everything = api.rest.request("GET", "vault", token=api.rest.service_key)
    assert len(everything.json) == 5  # BYPASSRLS, as docs/supabase-trust.md says


def test_g1_insert(api: Api) -> None:
    own = {"permitted_agent_serial": api.one.serial, "content": "mine"}
    answer = api.request("POST", "vault", api.one, own, Prefer="return=representation")
    assert answer.status == 201
    assert [row["content"] for row in answer.json] == ["mine"]
    for serial in (api.two.serial, None, "", "*"):
        answer = api.request("POST", "vault", api.one, {**own, "permitted_agent_serial": serial})
        assert (answer.status, answer.json["code"]) == (403, "42501")
    # One row of another's among many, and nothing is written.
    answer = api.request("POST", "vault", api.one, [own, {**own, "permitted_agent_serial": api.two.serial}])
    assert answer.status == 403
    assert api.rows(api.one) == ["one-a", "one-b", "mine"]
    assert api.rows(api.two) == ["two-a", "two-b"]
    assert api.request("POST", "vault", None, own).status == 401  # PostgREST's answer to anon


def test_g1_update(api: Api) -> None:
    answer = api.request("PATCH", "vault?id=gt.0", api.one, {"content": "x"}, Prefer="return=representation")
    assert [row["permitted_agent_serial"] for row in answer.json] == [api.one.serial] * 2
    assert api.rows(api.two) == ["two-a", "two-b"]
    # Handing a row over, or taking one.
    answer = api.request("PATCH", "vault?id=gt.0", api.one, {"permitted_agent_serial": api.two.serial})
    assert (answer.status, answer.json["code"]) == (403, "42501")
    taking = f"vault?permitted_agent_serial=eq.{api.two.serial}"
    answer = api.request(
        "PATCH", taking, api.one, {"permitted_agent_serial": api.one.serial}, Prefer="return=representation"
    )
    assert answer.json == []
    assert api.rows(api.two) == ["two-a", "two-b"]


def test_g1_upsert(api: Api) -> None:
    note = {"id": 1, "vault_id": 1, "permitted_agent_serial": api.one.serial, "text": "again"}
    merge = {"Prefer": "resolution=merge-duplicates,return=representation"}
    answer = api.request("POST", "note", api.one, note, **merge)
    assert (answer.status, answer.json[0]["text"]) in [(200, "again"), (201, "again")]
    # Row 3 is another's: neither taken over nor silently left as it is.
    answer = api.request("POST", "note", api.one, {**note, "id": 3, "vault_id": 3}, **merge)
    assert (answer.status, answer.json["code"]) == (403, "42501")
    answer = api.request("PUT", "note?id=eq.3", api.one, {**note, "id": 3})
    assert (answer.status, answer.json["code"]) == (403, "42501")
    assert [n["text"] for n in api.get("note?order=id", api.two)] == ["about two-a", "about two-b"]
    # "Ignore duplicates" tells that the key is taken, as any unique index does, and changes nothing.
    ignore = {"Prefer": "resolution=ignore-duplicates,return=representation"}
    assert api.request("POST", "note", api.one, {**note, "id": 3, "vault_id": 3}, **ignore).json == []


def test_g1_delete(api: Api) -> None:
    api.database.run("app", "delete from note")
    answer = api.request("DELETE", "vault?id=gt.0", api.one, Prefer="return=representation")
    assert [row["content"] for row in answer.json] == ["one-a", "one-b"]
    assert api.rows(api.one) == []
    assert api.rows(api.two) == ["two-a", "two-b"]
    assert api.database.value("app", "select count(*) from vault") == 3


def test_g1_embedded_resources(api: Api) -> None:
    embedded = api.get("vault?select=content,note(text)&order=id", api.one)
    assert embedded == [
        {"content": "one-a", "note": [{"text": "about one-a"}]},
        {"content": "one-b", "note": [{"text": "about one-b"}]},
    ]
    # A note of one's own about another's row: the row is not shown through it.
    api.database.run("app", "insert into note values (9, 3, %s, 'foreign')", [api.one.serial])
    foreign = api.get("note?select=text,vault(content)&id=eq.9", api.one)
    assert foreign == [{"text": "foreign", "vault": None}]
    assert api.get("note?select=text,vault!inner(content)&vault.content=like.two*", api.one) == []
    # And another's note about one's own row.
    api.database.run("app", "insert into note values (10, 1, %s, 'theirs')", [api.two.serial])
    assert api.get("vault?select=note(text)&id=eq.1", api.one) == [{"note": [{"text": "about one-a"}]}]


@pytest.mark.parametrize("count", ["exact", "planned", "estimated"])
def test_g1_count(api: Api, count: str) -> None:
    for agent, total in ((api.one, "2"), (None, "0")):
        answer = api.request("GET", "vault?limit=1", agent, Prefer=f"count={count}")
        shown = answer.headers["content-range"].split("/")[1]
        if count == "exact":
            assert shown == total
        assert len(answer.json) == min(1, int(total))
    head = api.request("HEAD", "vault", api.two, Prefer="count=exact")
    assert head.headers["content-range"] == "0-1/2"


def test_g1_csv_and_other_forms(api: Api) -> None:
    csv = api.request("GET", "vault?select=content&order=id", api.one, Accept="text/csv")
    assert csv.text.splitlines() == ["content", "one-a", "one-b"]
    single = api.request("GET", "vault?id=eq.3", api.one, Accept="application/vnd.pgrst.object+json")
    assert single.status == 406
    forged = f"permitted_agent_serial,content\n{api.two.serial},forged\n".encode()
    answer = api.request("POST", "vault", api.one, forged, Content_Type="text/csv")
    assert (answer.status, answer.json["code"]) == (403, "42501")
    assert api.rows(api.two) == ["two-a", "two-b"]


def test_g1_two_agents_at_once(api: Api) -> None:
    """Few sessions of the database, shared by all: nobody's rows come with another's token."""

    def ask(n: int) -> bool:
        agent, rows = [(api.one, ["one-a", "one-b"]), (api.two, ["two-a", "two-b"]), (None, [])][n % 3]
        return api.rows(agent) == rows

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(240)))


def test_rpc_runs_under_the_policies(api: Api) -> None:
    with api.database.connect("app") as app:
        app.execute(
            "create function contents() returns setof text stable language sql"
            " as 'select content from vault order by id'"
        )
        app.execute(f"grant execute on function contents() to {', '.join(API)}")
    try:
        api.rest.reload()
        assert api.request("POST", "rpc/contents", api.one, {}).json == ["one-a", "one-b"]
        assert api.get("rpc/contents", api.two) == ["two-a", "two-b"]
        assert api.request("POST", "rpc/contents", None, {}).json == []
    finally:
        api.database.run("app", "drop function contents()")


# The three tools and verification as RPC ---------------------------------------------------------------


@pytest.mark.parametrize("role", ["kakunin_agent", "authenticated", "anon"])
def test_tools_are_rpc(api: Api, role: str) -> None:
    def call(name: str, **arguments: Any) -> Any:
        answer = api.request("POST", f"rpc/{name}", api.one, arguments, role, **KAKUNIN)
        assert answer.status == 200, answer
        return answer.json

    assert call("current_agent_id") == str(api.one.agent_id)
    assert call("verify_agent_scope", action="orders:create")["allowed"] is True
    denied = call(
        "verify_agent_scope", action="admin:drop", amount_usd=1, venue="x", instrument="y", leverage=1
    )
    assert (denied["allowed"], denied["code"]) == (False, "KA005")
    assert call("check_risk_score")["agent_id"] == str(api.one.agent_id)
    event = call("audit_log_append", event_type="api_call", metadata={"path": "/x"}, session_id="s")
    assert event["agent_id"] == str(api.one.agent_id)
    look = "select agent_id, serial, login, metadata from kakunin.audit_log where event_id = %s"
    [entry] = api.database.run("auditor", look, [event["event_id"]])
    assert entry == (api.one.agent_id, api.one.serial, "authenticator", {"path": "/x"})
    assert call("verify_certificate", serial=api.two.serial)["valid"] is True
    payload = b"what was said"
    signature = api.one.signer.sign(hashlib.sha256(payload).digest())
    message = {"payload": "\\x" + payload.hex(), "signature": "\\x" + signature.hex()}
    assert call("verify_message", serial=api.one.serial, **message)["valid"] is True
    message["payload"] += "00"
    assert call("verify_message", serial=api.one.serial, **message)["valid"] is False


def test_tools_without_an_agent(api: Api) -> None:
    for name, arguments in (
        ("verify_agent_scope", {"action": "x:y"}),
        ("check_risk_score", {}),
        ("audit_log_append", {"event_type": "x"}),
    ):
        answer = api.request("POST", f"rpc/{name}", None, arguments, **KAKUNIN)
        if name == "verify_agent_scope":
            assert (answer.status, answer.json["allowed"], answer.json["code"]) == (200, False, "KA004")
        else:
            assert (answer.status, answer.json["code"]) == (400, "KA004"), answer
    verified = api.request("POST", "rpc/verify_certificate", None, {"serial": api.one.serial}, **KAKUNIN)
    assert verified.json["valid"] is True


ADMINISTRATION: list[tuple[str, dict[str, Any]]] = [
    ("create_agent", {"name": "x"}),
    ("revoke_certificate", {"serial": "3A"}),
    ("bind_serial", {"serial": "3A"}),
    ("set_gateway_logins", {"logins": ["authenticator"]}),
    ("rotate_session_key", {}),
    ("halt_agent", {"agent_id": "00000000-0000-0000-0000-000000000000", "reason": "x"}),
    ("installation_id", {}),
]


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
@pytest.mark.parametrize(("name", "arguments"), ADMINISTRATION, ids=[n for n, _ in ADMINISTRATION])
def test_api_roles_administer_nothing(api: Api, role: str, name: str, arguments: dict[str, Any]) -> None:
    answer = api.rest.request("POST", f"rpc/{name}", arguments, token=api.rest.token(role), headers=KAKUNIN)
    assert answer.json["code"] == "42501", answer
    assert answer.status in (401, 403)


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role", "kakunin_agent"])
@pytest.mark.parametrize("view", ["agents", "certificates", "webhook_endpoints", "halts", "chains"])
def test_api_roles_read_no_register(api: Api, role: str, view: str) -> None:
    answer = api.rest.request("GET", view, token=api.rest.token(role), headers={"Accept-Profile": "kakunin"})
    assert answer.json["code"] == "42501", answer


def test_an_agent_reads_its_own_entries(api: Api) -> None:
    for agent in (api.one, api.two):
        api.request("POST", "rpc/audit_log_append", agent, {"event_type": "own"}, **KAKUNIN)
    entries = api.get("audit_log?event_type=eq.own&select=agent_id", api.one, Accept_Profile="kakunin")
    assert {entry["agent_id"] for entry in entries} == {str(api.one.agent_id)}


# At the next request -----------------------------------------------------------------------------------


SET_LOGINS = "select kakunin.set_gateway_logins(%s::name[], %s::name[])"


def unhook(api: Api, *, hooked: bool, hook: bool) -> None:
    logins = ["authenticator"]
    api.database.run("installer", SET_LOGINS, [logins, logins if hooked else []])
    api.rest.restart(hook=hook)


@pytest.fixture
def without_hook(api: Api) -> Iterator[Api]:
    """PostgREST does not call pre_request(), and the claims are believed as they stand."""
    unhook(api, hooked=False, hook=False)
    yield api
    unhook(api, hooked=True, hook=True)


STOPS = {
    "revoked": ("select kakunin.revoke_certificate(%(serial)s, 'keyCompromise')", "KA002", "keyCompromise"),
    "suspended": ("select kakunin.suspend_agent(%(agent)s, 'under review')", "KA008", "under review"),
    "halted": ("select kakunin.halt_agent(%(agent)s, 'stop')", "KA002", "was revoked"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_g3_a_token_made_before_gets_nothing_after(api: Api, stop: str) -> None:
    statement, code, reason = STOPS[stop]
    token = api.token(api.one)
    assert len(api.rest.request("GET", "vault", token=token).json) == 2
    parameters = {"serial": api.one.serial, "agent": api.one.agent_id}
    if stop == "revoked":  # the key of another agent's certificate as well: not as compromised
        statement = statement.replace("keyCompromise", "superseded")
        reason = "superseded"
    api.database.run("operator", statement, parameters)
    for method, path, body in (
        ("GET", "vault", None),
        ("GET", "", None),
        ("POST", "vault", {"permitted_agent_serial": api.one.serial}),
        ("PATCH", "vault?id=gt.0", {"content": "x"}),
        ("DELETE", "vault?id=gt.0", None),
        ("POST", "rpc/check_risk_score", {}),
    ):
        headers = KAKUNIN if path.startswith("rpc/") else {}
        refused(api.rest.request(method, path, body, token=token, headers=headers), 403, code, reason)
    assert api.rows(api.two) == ["two-a", "two-b"]
    if stop == "suspended":
        api.database.run("operator", "select kakunin.reinstate_agent(%s)", [api.one.agent_id])
        assert len(api.rest.request("GET", "vault", token=token).json) == 2


@pytest.mark.parametrize("stop", STOPS)
def test_g3_without_the_hook_there_are_no_rows(without_hook: Api, stop: str) -> None:
    api = without_hook
    token = api.token(api.one)
    assert len(api.rest.request("GET", "vault", token=token).json) == 2
    statement = STOPS[stop][0].replace("keyCompromise", "superseded")
    api.database.run("operator", statement, {"serial": api.one.serial, "agent": api.one.agent_id})
    assert api.rest.request("GET", "vault", token=token).json == []
    assert api.rest.request("DELETE", "vault?id=gt.0", token=token).status == 204
    own = {"permitted_agent_serial": api.one.serial}
    assert api.rest.request("POST", "vault", own, token=token).status == 403
    assert api.database.value("app", "select count(*) from vault") == 5
    assert api.rows(api.two) == ["two-a", "two-b"]


def test_g8_a_hooked_login_without_the_hook_has_nothing(api: Api) -> None:
    unhook(api, hooked=True, hook=False)
    try:
        assert api.rows(api.one) == []
        answer = api.request("POST", "rpc/check_risk_score", api.one, {}, **KAKUNIN)
        assert answer.json["code"] == "KA004"
    finally:
        unhook(api, hooked=True, hook=True)


def test_g3_a_certificate_that_expires(api: Api) -> None:
    now = dt.datetime.now(dt.timezone.utc)
    brief = api.database.agent("brief", not_before=now, lifetime=dt.timedelta(seconds=3))
    token = api.token(brief)
    assert api.rest.request("GET", "vault", token=token).status == 200
    time.sleep(4)
    refused(api.rest.request("GET", "vault", token=token), 403, "KA003", "has expired")


def test_g3_revocation_between_requests_in_flight(api: Api) -> None:
    """From some request on all are refused, and that is once the revocation has committed."""
    token = api.token(api.one)
    done: list[float] = []

    def ask(_: int) -> tuple[float, int]:
        begun = time.monotonic()
        return begun, api.rest.request("GET", "vault", token=token).status

    def revoke() -> None:
        time.sleep(0.3)
        api.one.revoke()
        done.append(time.monotonic())

    with ThreadPoolExecutor(5) as pool:
        revoking = pool.submit(revoke)
        answers = list(pool.map(ask, range(400)))
        revoking.result()
    assert {status for _, status in answers} == {200, 403}
    assert {status for begun, status in answers if begun > done[0]} == {403}


@pytest.mark.parametrize("serial", ["3A:F2", "not a serial", "", "1, 2", 7, ["3A"], {"a": 1}, True])
def test_g8_a_claim_that_names_no_certificate(api: Api, serial: Any) -> None:
    token = api.token(api.one, kakunin_cert_serial=serial)
    answer = api.rest.request("GET", "vault", token=token)
    if serial in ("3A:F2", 7):
        refused(answer, 403, "KA001", "is not registered here")
    else:
        refused(answer, 401, "KA004")


# Headers -----------------------------------------------------------------------------------------------


def test_the_header_may_be_in_any_form_of_the_claims_serial(api: Api) -> None:
    for form in (
        api.one.serial,
        api.one.serial.lower(),
        api.one.serial.replace(":", ""),
        "0x" + api.one.serial.replace(":", ""),
    ):
        answer = api.rest.request("GET", "vault", token=api.token(api.one), headers={HEADER: form})
        assert len(answer.json) == 2


@pytest.mark.parametrize("forged", ["other", "not a serial", "", "3A:F2", "both"])
def test_g2_a_forged_header(api: Api, forged: str) -> None:
    value = {"other": api.two.serial, "both": f"{api.one.serial}, {api.two.serial}"}.get(forged, forged)
    answer = api.rest.request("GET", "vault", token=api.token(api.one), headers={HEADER: value})
    refused(answer, 401, "KA004", HEADER)
    # Without the claim no header says anything.
    for token in (
        None,
        api.rest.token("authenticated"),
        api.rest.token("kakunin_agent"),
        api.rest.service_key,
    ):
        answer = api.rest.request("GET", "vault", token=token, headers={HEADER: value})
        refused(answer, 401, "KA004", HEADER)


def test_g2_a_header_alone_is_not_believed_without_the_hook(without_hook: Api) -> None:
    answer = without_hook.rest.request("GET", "vault", headers={HEADER: without_hook.one.serial})
    assert answer.json == []


def test_g8_an_unconfigured_login_is_told_so(api: Api) -> None:
    api.database.run("installer", "select kakunin.set_gateway_logins('{}')")
    try:
        refused(api.request("GET", "vault", api.one), 403, "KA004", "authenticator")
        assert api.rows(None) == []
    finally:
        unhook(api, hooked=True, hook=True)


# Tokens ------------------------------------------------------------------------------------------------


def tampered(token: str) -> str:
    head, payload, mac = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    claims["role"] = "service_role"
    return ".".join((head, base64url(json.dumps(claims).encode()), mac))


def test_g2_tokens_that_were_not_signed_by_the_project(api: Api) -> None:
    good = {"role": "kakunin_agent", "kakunin_cert_serial": api.one.serial, "exp": int(time.time()) + 60}
    secret = api.rest.jwt_secret
    assert len(api.rest.request("GET", "vault", token=jwt(good, secret)).json) == 2
    forged = {
        "another key": jwt(good, "x" * 64),
        "empty key": jwt(good, ""),
        "alg none": jwt(good, None),
        "alg None": jwt(good, None, alg="None"),
        "alg none, signed": jwt(good, secret, alg="none"),
        "another alg": jwt(good, secret, alg="RS256"),
        "tampered": tampered(jwt(good, secret)),
        "no signature": jwt(good, secret).rpartition(".")[0] + ".",
        "the API key's signature": jwt(good, secret).rpartition(".")[0]
        + "."
        + api.rest.anon_key.split(".")[2],
        "expired": jwt({**good, "exp": int(time.time()) - 60}, secret),
        "not yet": jwt({**good, "nbf": int(time.time()) + 600}, secret),
    }
    for kind, token in forged.items():
        answer = api.rest.request("GET", "vault", token=token)
        assert answer.status == 401, (kind, answer)
    for role in ("postgres", "installer", "kakunin_operator", "kakunin_gateway"):
        answer = api.rest.request("GET", "vault", token=jwt({**good, "role": role}, secret))
        assert (answer.status, answer.json["code"]) == (403, "42501"), (role, answer)


def test_g2_asymmetric_keys_and_the_confusion_of_algorithms(api: Api) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048)
    ec_key = ec.generate_private_key(ec.SECP256R1())
    numbers, point = rsa_key.public_key().public_numbers(), ec_key.public_key().public_numbers()
    number = lambda n, size: base64url(n.to_bytes(size, "big"))  # noqa: E731
    jwks = [
        {"kty": "RSA", "kid": "r", "alg": "RS256", "use": "sig", "n": number(numbers.n, 256), "e": "AQAB"},
        {
            "kty": "EC",
            "kid": "e",
            "alg": "ES256",
            "crv": "P-256",
            "x": number(point.x, 32),
            "y": number(point.y, 32),
        },
    ]
    claims = {"role": "kakunin_agent", "kakunin_cert_serial": api.one.serial, "exp": int(time.time()) + 60}

    def signed(alg: str, kid: str, sign: Any) -> str:
        head = base64url(json.dumps({"alg": alg, "typ": "JWT", "kid": kid}).encode())
        text = f"{head}.{base64url(json.dumps(claims).encode())}"
        return f"{text}.{base64url(sign(text.encode()))}"

    def es256(data: bytes) -> bytes:
        r, s = decode_dss_signature(ec_key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    rs256 = lambda data: rsa_key.sign(data, padding.PKCS1v15(), hashes.SHA256())  # noqa: E731
    tokens = [signed("RS256", "r", rs256), signed("ES256", "e", es256)]
    for token in tokens:
        assert api.rest.request("GET", "vault", token=token).status == 401
    api.rest.restart(jwks=jwks)
    try:
        for token in [*tokens, api.token(api.one)]:
            assert len(api.rest.request("GET", "vault", token=token).json) == 2
        public = rsa_key.public_key()
        for form in (serialization.Encoding.PEM, serialization.Encoding.DER):
            secret = public.public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo)
            token = signed("HS256", "r", lambda data, s=secret: hmac.digest(s, data, "sha256"))
            assert api.rest.request("GET", "vault", token=token).status == 401
    finally:
        api.rest.restart(jwks=[])


# SQL that the caller wrote -------------------------------------------------------------------------------


@pytest.fixture
def dynamic(api: Api) -> Iterator[Api]:
    """A function that no project should have: it runs what it is given."""
    with api.database.connect("app") as app:
        app.execute(
            "create function run(query text) returns jsonb language plpgsql as $$"
            " declare r jsonb; s text; begin"
            "  foreach s in array string_to_array(query, ';;') loop"
            "   if s ~* '^ *select' then execute 'select jsonb_agg(t) from (' || s || ') t' into r;"
            "   else execute s; end if;"
            "  end loop; return r; end $$"
        )
        app.execute(f"grant execute on function run(text) to {', '.join(API)}")
    api.rest.reload()
    yield api
    api.database.run("app", "drop function run(text)")


def forgeries(victim: str) -> dict[str, str]:
    claims = json.dumps({"role": "kakunin_agent", "kakunin_cert_serial": victim})
    forge = f"select set_config('request.jwt.claims', '{claims}', true)"
    forge_session = forge.replace(", true)", ", false)")
    unbind = "select set_config('kakunin.session', '', true)"
    look = "select content from vault"
    hook = """do $$ begin execute 'select "kakunin"."pre_request"()'; end $$"""
    do = forge.replace("select", "perform"), unbind.replace("select", "perform")
    return {
        "claims": f"{forge};;{look}",
        "claims of the session": f"{forge_session};;{look}",
        "unbound": f"{unbind};;{forge};;{look}",
        "unbound, session": f"select set_config('kakunin.session', '', false);;{forge_session};;{look}",
        "reset": f"reset kakunin.session;;{forge};;{look}",
        "reset all": f"reset all;;{forge};;{look}",
        "unbind_session": f"select kakunin.unbind_session();;{forge};;{look}",
        "hook again": f"{unbind};;{forge};;select kakunin.pre_request();;{look}",
        "hook again, as a whole": f"{unbind};;{forge};;{hook};;{look}",
        "local role": f"set local role authenticated;;{unbind};;{forge};;{look}",
        "authorization": f"set session authorization default;;{unbind};;{forge};;{look}",
        "bind_serial": f"select kakunin.bind_serial('{victim}');;{look}",
        "gateway": f"set local role kakunin_gateway;;select kakunin.bind_serial('{victim}');;{look}",
        "operator": f"set local role kakunin_operator;;{look}",
        "settings": f"select kakunin.set_gateway_logins('{{authenticator}}');;{unbind};;{forge};;{look}",
        "row security off": f"set local row_security = off;;{look}",
        "do": f"do $do$ begin {'; '.join(do)}; end $do$;;{look}",
    }  # fmt: skip


@pytest.mark.parametrize("role", ["kakunin_agent", "anon"])
def test_g1_sql_of_the_callers_does_not_become_another_agent(dynamic: Api, role: str) -> None:
    for name, query in forgeries(dynamic.two.serial).items():
        answer = dynamic.request("POST", "rpc/run", dynamic.one, {"query": query}, role)
        assert "two-" not in answer.text, name
        if answer.status != 200:
            assert answer.json["code"] in ("42501", "KA004"), (name, answer)
        # Nor does it leave anything to whoever comes next on one of the sessions.
        for _ in range(4):
            assert dynamic.rows(dynamic.two) == ["two-a", "two-b"], name
            assert dynamic.rows(None) == [], name
            assert dynamic.rows(dynamic.one) == ["one-a", "one-b"], name


def test_sql_of_the_callers_becomes_anybody_where_the_login_is_not_hooked(dynamic: Api) -> None:
    """What hooking ends, and that the forgeries above are ones."""
    unhook(dynamic, hooked=False, hook=False)
    try:
        query = forgeries(dynamic.two.serial)["claims"]
        assert "two-a" in dynamic.request("POST", "rpc/run", dynamic.one, {"query": query}).text
    finally:
        unhook(dynamic, hooked=True, hook=True)


def test_g1_sql_of_the_callers_sees_its_own(dynamic: Api) -> None:
    answer = dynamic.request(
        "POST", "rpc/run", dynamic.one, {"query": "select content from vault order by id"}
    )
    assert [row["content"] for row in answer.json] == ["one-a", "one-b"]


@pytest.fixture
def narrow(dynamic: Api) -> Iterator[Api]:
    """The same through a login that is a member of the agents' role and of no other, on one session."""
    database = dynamic.database
    with database.cluster.connect(autocommit=True) as admin:
        admin.execute("create role agents_api login noinherit")
        admin.execute("grant kakunin_agent to agents_api")
    database.run("installer", SET_LOGINS, [["agents_api"]] * 2)
    try:
        settings = {"DB_ANON_ROLE": "kakunin_agent", "DB_POOL": "1"}
        with PostgREST(database.cluster, database.name, login="agents_api", settings=settings) as rest:
            there = Api(rest, database, dynamic.one, dynamic.two)
            assert there.rows(there.one) == ["one-a", "one-b"]
            yield there
    finally:
        unhook(dynamic, hooked=True, hook=True)
        with database.cluster.connect(autocommit=True) as admin:
            admin.execute("drop role agents_api")


SERVICE_ROLE = {"query": "set local role service_role;;select content from vault"}


def test_sql_of_the_callers_has_the_roles_of_the_login(dynamic: Api) -> None:
    """The boundary that docs/supabase-trust.md draws: what PostgREST's login may become, such SQL becomes."""
    assert "two-a" in dynamic.request("POST", "rpc/run", dynamic.one, SERVICE_ROLE).text


def test_sql_of_the_callers_does_not_become_another_agent_in_its_own_request(narrow: Api) -> None:
    assert narrow.request("POST", "rpc/run", narrow.one, SERVICE_ROLE).json["code"] == "42501"
    for name, sql in forgeries(narrow.two.serial).items():
        assert "two-" not in narrow.request("POST", "rpc/run", narrow.one, {"query": sql}).text, name


def run(api: Api, query: str) -> Any:
    answer = api.request("POST", "rpc/run", api.one, {"query": query})
    assert answer.status == 200, answer
    return answer.json


def test_sql_of_the_callers_runs_in_the_next_request_of_its_session(narrow: Api) -> None:
    """The rest of that boundary: PostgREST names types as they are found in pg_temp first."""
    run(
        narrow,
        "create temp table loot (content pg_catalog.text);;"
        "create function pg_temp.look(pg_catalog.text) returns boolean language plpgsql as"
        " 'begin insert into loot select content from public.vault; return true; end';;"
        "create domain pg_temp.text as pg_catalog.text check (pg_temp.look(value))",
    )
    own = {"permitted_agent_serial": narrow.two.serial, "content": "x"}
    assert narrow.request("POST", "vault", narrow.two, own).status == 201
    assert {"content": "two-a"} in run(narrow, "select content from loot")


def test_sql_of_the_callers_replaces_what_sets_the_claims(narrow: Api) -> None:
    """And it is read by pre_request() as PostgREST's own. Or such SQL takes the login for itself."""
    [sets] = run(
        narrow,
        "select name, statement, parameter_types::text as types from pg_prepared_statements"
        " where starts_with(statement, 'select set_config(') and statement ~ 'request.jwt.claims'",
    )
    name, types = sets["name"], sets["types"].strip("{}")
    claims = json.dumps({"kakunin_cert_serial": narrow.two.serial})
    run(
        narrow,
        f'deallocate "{name}";;prepare "{name}" ({types}) as'
        f" {sets['statement']}, set_config('request.jwt.claims', '{claims}', true)",
    )
    assert narrow.rows(narrow.one) == ["two-a", "two-b"]
    run(narrow, "set local role none;;alter role agents_api password 'known'")


def test_g2_a_shared_session_is_bound_for_no_longer_than_a_request(api: Api) -> None:
    """Binding by ticket is an agent's to call, and must not outlast the request."""
    answer = api.request("POST", "rpc/open_session", api.one, {"assertion": api.one.assertion()}, **KAKUNIN)
    ticket = answer.json
    for is_local, code in ((False, "KA010"), (True, None)):
        body = {"ticket": ticket, "is_local": is_local}
        answer = api.request("POST", "rpc/bind_session", api.one, body, **KAKUNIN)
        assert (answer.json.get("code") if isinstance(answer.json, dict) else None) == code, answer
        for _ in range(12):
            assert api.rows(None) == []
            assert api.rows(api.two) == ["two-a", "two-b"]


def test_a_function_of_the_projects_may_be_the_hook(api: Api) -> None:
    with api.database.connect("app") as app:
        app.execute(
            "create function checks() returns void language plpgsql"
            " as $$ begin perform kakunin.pre_request(); end $$"
        )
    api.rest.stop()
    before = dict(api.rest._settings)
    api.rest._settings["DB_PRE_REQUEST"] = "public.checks"
    try:
        api.rest.start()
        assert api.rows(api.one) == ["one-a", "one-b"]
        # Called by a request it is not the hook.
        answer = api.request("POST", "rpc/checks", api.one, {})
        refused(answer, 403, "KA004", "whole of a statement")
    finally:
        api.rest._settings = before
        api.rest.restart()
        api.database.run("app", "drop function checks()")


def test_the_articles_policy_is_bound_too(api: Api) -> None:
    """It reads the claim as text: with the hook any form of the serial is the canonical one by then."""
    with api.database.connect("app") as app:
        app.execute("create table agent_vault (permitted_agent_serial text, content text)")
        app.execute(
            "insert into agent_vault values (%s, 'mine'), (%s, 'theirs')", [api.one.serial, api.two.serial]
        )
        app.execute("alter table agent_vault enable row level security")
        app.execute(
            "create policy agent_vault_isolation on agent_vault for all to authenticated, anon using"
            " (permitted_agent_serial ="
            "  current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial')"
        )
        app.execute("grant select on agent_vault to anon, authenticated")
    try:
        api.rest.reload()
        for serial in (api.one.serial, api.one.serial.replace(":", "").lower()):
            token = api.token(api.one, "anon", kakunin_cert_serial=serial)
            assert [r["content"] for r in api.rest.request("GET", "agent_vault", token=token).json] == [
                "mine"
            ]
        assert api.get("agent_vault", None) == []
    finally:
        api.database.run("app", "drop table agent_vault")


def test_a_view_is_its_readers_only_as_security_invoker(api: Api) -> None:
    """The owner of these is no owner of the table, so the policies apply; which, is up to who is asking."""
    with api.database.cluster.connect(api.database.name, autocommit=True) as admin:
        admin.execute("create view as_owner as select content from vault")
        admin.execute("create view as_reader with (security_invoker = true) as select content from vault")
        admin.execute("grant select on as_owner, as_reader to kakunin_agent, anon")
    try:
        api.rest.reload()
        assert [r["content"] for r in api.get("as_reader", api.one)] == ["one-a", "one-b"]
        assert api.get("as_reader") == []
        assert len(api.get("as_owner")) == 5  # as docs/supabase-trust.md says of every view that is not
    finally:
        api.database.run("postgres", "drop view as_owner, as_reader")


@pytest.mark.parametrize("hooked", [None, True, False])
def test_a_service_that_sets_claims_itself(api: Api, hooked: bool | None) -> None:
    """As Storage and Realtime do, from logins of their own: believed where the owner of the kit says so."""
    with api.database.cluster.connect(autocommit=True) as admin:
        admin.execute("create role storage_admin login noinherit")
        admin.execute("grant kakunin_agent to storage_admin")
    try:
        if hooked is not None:
            logins = ["authenticator", "storage_admin"]
            api.database.run("installer", SET_LOGINS, [logins, logins[: 1 + hooked]])
        with api.database.connect("storage_admin") as service:
            service.execute(
                "select set_config('role', 'kakunin_agent', true),"
                " set_config('request.jwt.claims', %s, true)",
                [json.dumps({"kakunin_cert_serial": api.one.serial})],
            )
            rows = service.execute("select content from vault order by id").fetchall()
            assert [row[0] for row in rows] == (["one-a", "one-b"] if hooked is False else [])
    finally:
        api.database.run("installer", SET_LOGINS, [["authenticator"]] * 2)
        with api.database.cluster.connect(autocommit=True) as admin:
            admin.execute("drop role storage_admin")


def test_pre_request_on_a_direct_connection_binds_nothing(api: Api) -> None:
    claims = json.dumps({"kakunin_cert_serial": api.two.serial})
    with api.database.connect("agent_1", autocommit=True) as attacker:
        attacker.execute("select set_config('request.jwt.claims', %s, false)", [claims])
        with pytest.raises(Exception, match="not believed") as error:
            attacker.execute('select "kakunin"."pre_request"()')
        assert error.value.sqlstate == "PGRST"  # type: ignore[attr-defined]
        assert attacker.execute("select kakunin.current_cert_serial()").fetchone() == (None,)
