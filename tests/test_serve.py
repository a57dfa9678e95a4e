"""The published SDK's whole surface against `kakunin-db serve`, unchanged."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.metadata
import inspect
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from api import HASH, Server, api_key, served
from cluster import Cluster
from conftest import Database, _ca, fresh_database
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from kakunin_db import CertificateAuthority
from kakunin_db.ca import canonical_json

pytest.importorskip("kakunin", reason="the SDK is not installed")
import kakunin
from kakunin import exceptions, models


@pytest.fixture(scope="module")
def server(database: Database) -> Iterator[Server]:
    with served(database) as server:
        yield server


@pytest.fixture
async def sdk(server: Server) -> AsyncIterator[kakunin.Kakunin]:
    async with server.sdk() as client:
        yield client


async def certified(sdk: kakunin.Kakunin, *scopes: str, **more: Any) -> models.Agent:
    made = await sdk.agents.create(
        name="TradeBot-1", model="gpt-4o", version="2024-11", model_hash=HASH,
        metadata={"scopes": list(scopes or ["trade.execute"])}, **more,
    )  # fmt: skip
    await sdk.agents.certify(made.id)
    return await sdk.agents.get(made.id)


def test_it_is_the_published_sdk() -> None:
    assert importlib.metadata.version("kakunin") == "0.2.0"


def test_its_whole_surface_is_driven_here() -> None:
    client = kakunin.Kakunin(api_key="x")
    surface = {
        f"{name}.{method}"
        for name in ("agents", "events", "chains", "reports", "verify")
        for method, _ in inspect.getmembers(getattr(client, name), inspect.iscoroutinefunction)
    }
    assert {name for name in vars(client) if not name.startswith("_")} == {
        name.partition(".")[0] for name in surface
    }
    source = inspect.getsource(inspect.getmodule(test_its_whole_surface_is_driven_here))  # type: ignore[arg-type]
    assert [name for name in sorted(surface) if f"sdk.{name}(" not in source] == []


async def test_an_agents_life(server: Server, sdk: kakunin.Kakunin) -> None:
    scope = {"max_single_trade_usd": 10_000, "permitted_venues": ["XLON"]}
    made = await sdk.agents.create(
        name="TradeBot-1", model="gpt-4o", version="2024-11", model_hash=HASH, financial_scope=scope,
        metadata={"scopes": ["trade.execute", "orders:write"], "desk": "rates", "risk_score": 0.9},
    )  # fmt: skip
    assert (made.name, made.model, made.version, made.model_hash) == ("TradeBot-1", "gpt-4o", "2024-11", HASH)
    # Nothing is certified yet, so it may do nothing, whatever was asked for.
    assert made.status is models.AgentStatus.suspended
    assert made.metadata == {
        "scopes": [],
        "requested_scopes": ["trade.execute", "orders:write"],
        "desk": "rates",
        "risk_score": 0.0,
    }
    certificate = await sdk.agents.certify(made.id)
    assert certificate.agent_id == made.id
    assert certificate.status is models.CertificateStatus.active
    assert certificate.pem is not None
    assert certificate.pem.startswith("-----BEGIN CERTIFICATE-----")
    assert (certificate.expires_at - certificate.issued_at).days in (89, 90)
    [(actions, limits)] = server.database.run(
        "auditor",
        "select permitted_actions, financial_scope from kakunin.certificates where serial = %s",
        [certificate.serial_number],
    )
    assert (actions, limits) == (["trade.execute", "orders:write"], scope)
    agent = await sdk.agents.get(made.id)
    assert agent.status is models.AgentStatus.active
    assert agent.metadata is not None
    assert agent.metadata["scopes"] == ["trade.execute", "orders:write"]

    renamed = await sdk.agents.update(made.id, name="TradeBot-2", metadata={"scopes": ["data.read"]})
    assert renamed.name == "TradeBot-2"
    assert renamed.metadata is not None
    # What it may do is what was signed, not what is said of it since.
    assert renamed.metadata["scopes"] == ["trade.execute", "orders:write"]
    assert renamed.metadata["requested_scopes"] == ["data.read"]

    suspended = await sdk.agents.update(made.id, status="suspended")
    assert suspended.status is models.AgentStatus.suspended
    assert (await sdk.agents.update(made.id, status="active")).status is models.AgentStatus.active

    # Another model is another agent: its certificate is revoked, and a new one can be made.
    changed = await sdk.agents.update(made.id, model_hash="sha256:" + "cd" * 32)
    assert changed.status is models.AgentStatus.suspended
    assert (await sdk.verify.certificate(certificate.serial_number))["status"] == "revoked"
    another = await sdk.agents.certify(made.id)
    assert another.serial_number != certificate.serial_number
    assert (await sdk.agents.get(made.id)).metadata["scopes"] == ["data.read"]  # type: ignore[index]

    retired = await sdk.agents.update(made.id, status="retired")
    assert retired.status is models.AgentStatus.retired
    assert (await sdk.verify.certificate(another.serial_number))["valid"] is False
    for refused in (
        sdk.agents.update(made.id, status="active"),
        sdk.agents.certify(made.id),
        sdk.agents.sign(made.id, payload={}),
        sdk.events.create(agent_id=made.id, action_type="api_call"),
    ):
        with pytest.raises(exceptions.UnprocessableError):
            await refused


async def test_messages(sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    payload = {"order": 7, "amount": 12.5, "note": "Ünïcode ☃", "nested": {"b": [1, None], "a": True}}
    signed = await sdk.agents.sign(agent.id, payload=payload)
    assert signed.payload_hash == f"sha256:{hashlib.sha256(canonical_json(payload)).hexdigest()}"
    assert signed.certificate_serial is not None

    async def verify(**changed: Any) -> models.MessageVerifyResult:
        asked = {
            "agent_id": agent.id, "payload": payload, "signature": signed.signature,
            "certificate_serial": signed.certificate_serial,
        }  # fmt: skip
        return await sdk.verify.message(**asked | changed)

    good = await verify()
    assert good.valid
    assert (good.certificate_status, good.agent_id, good.agent_name, good.model_hash) == (
        models.CertificateStatus.active, agent.id, "TradeBot-1", HASH,
    )  # fmt: skip
    assert not (await verify(payload=payload | {"order": 8})).valid
    assert not (await verify(agent_id=str(uuid.uuid4()))).valid
    unknown = await verify(certificate_serial="01:02")
    assert (unknown.valid, unknown.certificate_status, unknown.agent_id) == (False, None, None)
    await sdk.agents.halt(agent.id)
    halted = await verify()
    assert (halted.valid, halted.certificate_status) == (False, models.CertificateStatus.revoked)
    with pytest.raises(exceptions.ValidationError):
        await verify(signature="not base64!")


async def test_a_halt_is_at_once_and_signed(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    serial = agent.metadata and (await sdk.agents.sign(agent.id, payload={})).certificate_serial
    receipt = await sdk.agents.halt(agent.id, reason="Unusual volatility")
    assert (receipt.agent_id, receipt.certificate_serial) == (agent.id, serial)
    [(text, reason)] = server.database.run(
        "operator", "select receipt, reason from kakunin.halts where halt_id = %s", [receipt.halt_event_id]
    )
    assert reason == "Unusual volatility"
    _ca().certificate.public_key().verify(  # type: ignore[union-attr, call-arg]
        base64.b64decode(receipt.signature), text.encode(), padding.PKCS1v15(), hashes.SHA256()
    )
    assert (await sdk.agents.get(agent.id)).status is models.AgentStatus.suspended
    with pytest.raises(exceptions.UnprocessableError):
        await sdk.events.create(agent_id=agent.id, action_type="api_call")


async def test_a_halt_stands_when_the_kms_is_down(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    server.keys.down = True
    try:
        receipt = await sdk.agents.halt(agent.id)
        with pytest.raises(exceptions.ServerError) as refused:
            await sdk.agents.sign((await certified_elsewhere(server)).id, payload={})
    finally:
        server.keys.down = False
    assert receipt.signature == ""
    assert refused.value.status_code == 503
    assert "kms-internal" not in str(refused.value)
    assert (await sdk.agents.get(agent.id)).status is models.AgentStatus.suspended


async def certified_elsewhere(server: Server) -> Any:
    """By another than this server."""
    found = server.database.agent("elsewhere", permitted_actions=["data.read"])
    return models.Agent.model_construct(id=str(found.agent_id))


async def test_events_and_risk(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk, financial_scope={"max_single_trade_usd": 1000})
    low = await sdk.events.create(agent_id=agent.id, action_type="api_call", session_id="s-1")
    assert (low.action_type, low.risk_band, low.payload) == ("api_call", models.RiskBand.low, {})
    medium = await sdk.events.create(
        agent_id=agent.id, action_type="transaction_initiated", details={"amount_usd": 10, "venue": "XLON"}
    )
    assert medium.risk_band is models.RiskBand.medium
    occurred = await sdk.events.create(
        agent_id=agent.id, action_type="api_call", occurred_at=medium.occurred_at.isoformat()
    )
    assert occurred.occurred_at == medium.occurred_at
    [(entry, session)] = server.database.run(
        "auditor", "select serial, session_id from kakunin.audit_log where event_id = %s", [int(low.id)]
    )
    assert (entry is not None, session) == (True, "s-1")

    risk = await sdk.agents.risk(agent.id)
    assert (risk.window_days, risk.event_count, risk.medium_risk_count, risk.high_risk_count) == (7, 3, 1, 0)
    assert risk.risk_band is models.RiskBand.low
    assert risk.drift is not None
    assert risk.drift.drift_score is None
    assert (await sdk.agents.risk(agent.id, window_days=30)).window_days == 30

    # Far over the certified limit: critical, and revoked with it. The SDK knows no such band.
    gross = await sdk.events.create(
        agent_id=agent.id, action_type="transaction_initiated", details={"amount_usd": 50_000}
    )
    assert gross.risk_band is models.RiskBand.high
    assert gross.risk_score >= 0.85
    stopped = await sdk.agents.get(agent.id)
    assert stopped.status is models.AgentStatus.suspended
    assert stopped.metadata is not None
    assert stopped.metadata["scopes"] == []
    assert (await sdk.agents.risk(agent.id)).risk_band is models.RiskBand.high

    listed, pagination = await sdk.events.list(agent_id=agent.id)
    assert [event.id for event in listed] == [gross.id, occurred.id, medium.id, low.id]
    assert listed[1] == occurred
    assert not pagination.has_next_page
    high, _ = await sdk.events.list(agent_id=agent.id, band=models.RiskBand.high)
    assert [event.id for event in high] == [gross.id]
    calls, _ = await sdk.events.list(agent_id=agent.id, action_type="api_call", band="low")
    assert [event.id for event in calls] == [occurred.id, low.id]


async def test_pages(sdk: kakunin.Kakunin) -> None:
    agents = [await certified(sdk) for _ in range(3)]
    for _ in range(5):
        await sdk.events.create(agent_id=agents[0].id, action_type="api_call")
    seen: list[Any] = []
    before = None
    while True:
        page, pagination = await sdk.events.list(agent_id=agents[0].id, limit=2, before=before)
        seen += [event.id for event in page]
        before = pagination.next_cursor
        assert (before is not None) is pagination.has_next_page
        if before is None:
            break
    assert len(seen) == len(set(seen)) == 5
    newest, pagination = await sdk.agents.list(limit=2)
    assert [agent.id for agent in newest] == [agents[2].id, agents[1].id]
    following, _ = await sdk.agents.list(limit=1, before=pagination.next_cursor)
    assert [agent.id for agent in following] == [agents[0].id]
    await sdk.agents.update(agents[1].id, status="suspended")
    active, _ = await sdk.agents.list(status="active", limit=2)
    assert [agent.id for agent in active] == [agents[2].id, agents[0].id]
    suspended, _ = await sdk.agents.list(status="suspended", limit=1)
    assert [agent.id for agent in suspended] == [agents[1].id]


async def test_decision_chains(server: Server, sdk: kakunin.Kakunin) -> None:
    one, two = await certified(sdk), await certified(sdk)
    chain = await sdk.chains.create(name="trade T-1", description="why", metadata={"desk": "rates"})
    assert (chain.status, chain.event_count, chain.chain_hash) == (models.ChainStatus.open, 0, None)
    for agent in (one, two, one):
        event = await sdk.events.create(
            agent_id=agent.id, action_type="data_access", chain_id=chain.chain_id, details={"table": "t"}
        )
        assert event.payload == {"table": "t", "decision_chain": chain.chain_id}
    open_one = await sdk.verify.chain(chain.chain_id)
    assert (open_one.verified, open_one.status, open_one.event_count) == (True, models.ChainStatus.open, 3)
    closed = await sdk.chains.close(chain.chain_id)
    assert closed.status is models.ChainStatus.closed
    assert closed.chain_hash is not None
    whole = await sdk.chains.get(chain.chain_id)
    assert whole.events is not None
    assert whole.participating_agents is not None
    assert [event.sequence for event in whole.events] == [1, 2, 3]
    assert [event.agent_id for event in whole.events] == [one.id, two.id, one.id]
    assert {agent.agent_id for agent in whole.participating_agents} == {one.id, two.id}
    assert whole.metadata == {"desk": "rates"}

    # Anybody can work it out from the ledger's leaves.
    leaves = server.database.run(
        "auditor",
        "select hash from kakunin.audit_log where metadata ->> 'decision_chain' = %s order by event_id",
        [chain.chain_id],
    )
    digest = bytes(32)
    for (leaf,) in leaves:
        digest = hashlib.sha256(digest + bytes.fromhex(leaf)).digest()
    assert digest.hex() == closed.chain_hash
    verified = await sdk.verify.chain(chain.chain_id)
    assert (verified.verified, verified.chain_hash, verified.note) == (True, closed.chain_hash, None)
    with pytest.raises(exceptions.ConflictError):
        await sdk.chains.close(chain.chain_id)
    with pytest.raises(exceptions.ConflictError):
        await sdk.events.create(agent_id=one.id, action_type="api_call", chain_id=chain.chain_id)
    listed, pagination = await sdk.chains.list(status="closed", limit=1)
    assert [found.chain_id for found in listed] == [chain.chain_id]
    assert pagination.next_cursor is None
    assert await sdk.chains.list(status="open") == ([], models.Pagination(limit=50, has_next_page=False))

    # A superuser who rewrites an entry is found out.
    with server.database.connect("postgres") as admin:
        admin.execute("alter table kakunin_private.ledger disable trigger all")
        partitions = (
            "select inhrelid::regclass::text from pg_inherits"
            " where inhparent = 'kakunin_private.ledger'::regclass"
        )
        for (name,) in admin.execute(partitions).fetchall():
            admin.execute(f"alter table {name} disable trigger all")
        admin.execute(
            'update kakunin_private.ledger set entry = replace(entry, \'"table": "t"\', \'"table": "u"\')'
            " where event_id = %s",
            [int(whole.events[1].event_id)],
        )
    forged = await sdk.verify.chain(chain.chain_id)
    assert forged.verified is False


async def test_reports(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    await sdk.events.create(agent_id=agent.id, action_type="api_call")
    report = await sdk.reports.create(
        agent_id=agent.id, window_days=7, notes="quarterly",
        standards_frameworks=[models.StandardsFramework.iso_27001, "nist_csf"],
    )  # fmt: skip
    assert report.status is models.ReportStatus.ready
    assert (report.period_end - report.period_start).days == 7
    assert report.summary is not None
    assert report.summary.startswith("1 events in 7 days; risk low")
    assert await sdk.reports.get(report.id) == report
    with server.client(api_key(server.database)) as client:
        whole = client.get(f"/v1/reports/{report.id}").json()["data"]
        document = client.get(f"/v1/reports/{report.id}/document")
    assert hashlib.sha256(document.content).hexdigest() == whole["sha256"]
    assert document.json() == whole["report"]
    assert whole["report"]["notes"] == "quarterly"
    assert whole["report"]["events"]["by_type"] == {"api_call": 1}
    assert set(whole["report"]["standards"]) == {"iso_27001", "nist_csf"}
    members = {
        m for controls in whole["report"]["standards"].values() for ms in controls.values() for m in ms
    }
    assert members <= set(whole["report"])
    recorded = server.database.value(
        "auditor",
        "select metadata ->> 'sha256' from kakunin.audit_log where event_type = 'report.created'"
        " and metadata ->> 'report_id' = %s",
        [report.id],
    )
    assert recorded == whole["sha256"]


async def test_certificates_are_verified_by_anybody(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    certificate = (await sdk.agents.sign(agent.id, payload={})).certificate_serial
    assert certificate is not None
    async with kakunin.Kakunin(api_key="none at all", base_url=f"{server.url}/v1") as nobody:
        found = await nobody.verify.certificate(certificate)
        assert (found["valid"], found["status"], found["agent_id"]) == (True, "active", agent.id)
        assert found["permitted_actions"] == ["trade.execute"]
        assert (await nobody.verify.certificate(certificate.replace(":", "").lower()))["valid"] is True
        with pytest.raises(exceptions.NotFoundError):
            await nobody.verify.certificate("01:02")
        with pytest.raises(exceptions.AuthenticationError):
            await nobody.agents.get(agent.id)


async def test_each_exception_of_the_sdk(server: Server, sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    nobody = str(uuid.uuid4())
    for name in (nobody, "agt-123"):
        for missing in (
            sdk.agents.get(name), sdk.agents.certify(name), sdk.agents.halt(name), sdk.agents.risk(name),
            sdk.agents.update(name, name="x"), sdk.agents.sign(name, payload={}), sdk.chains.get(name),
            sdk.chains.close(name), sdk.reports.get(name), sdk.verify.chain(name),
        ):  # fmt: skip
            with pytest.raises(exceptions.NotFoundError):
                await missing
    for missing in (
        sdk.events.create(agent_id=nobody, action_type="api_call"), sdk.reports.create(agent_id=nobody),
        sdk.events.create(agent_id=agent.id, action_type="api_call", chain_id=nobody),
    ):  # fmt: skip
        with pytest.raises(exceptions.NotFoundError):
            await missing
    for malformed in (
        sdk.agents.create(name="", model="m", version="1", model_hash=HASH),
        sdk.agents.create(name="x", model="m", version="1", model_hash="sha256:abc"),
        sdk.agents.create(name="x", model="m", version="1", model_hash=HASH, financial_scope={"max_usd": 1}),
        sdk.agents.list(limit=0), sdk.agents.list(limit=1000), sdk.agents.list(status="lost"),
        sdk.events.list(band="critical"), sdk.events.list(before="x"), sdk.events.list(agent_id="x"),
        sdk.events.create(agent_id=agent.id, action_type="certificate.revoked"),
        sdk.events.create(agent_id=agent.id, action_type="api_call", details={"x": "y" * 20_000}),
        sdk.events.create(agent_id=agent.id, action_type="api_call", occurred_at="yesterday"),
        sdk.events.create(agent_id=agent.id, action_type="api_call", occurred_at="2020-01-01T00:00:00Z"),
        sdk.agents.risk(agent.id, window_days=0), sdk.reports.create(agent_id=agent.id, window_days=1000),
    ):  # fmt: skip
        with pytest.raises(exceptions.ValidationError):
            await malformed
    with pytest.raises(exceptions.ConflictError):  # it has one
        await sdk.agents.certify(agent.id)
    asked = await sdk.agents.create(
        name="x", model="m", version="1", model_hash=HASH, metadata={"scopes": ["launch:missiles"]}
    )
    with pytest.raises(exceptions.UnprocessableError, match="does not certify launch:missiles"):
        await sdk.agents.certify(asked.id)
    async with server.sdk(api_key(server.database, "agents:read")) as reader:
        with pytest.raises(exceptions.KakuninError, match="scope agents:halt") as denied:
            await reader.agents.halt(agent.id)
        assert denied.value.status_code == 403
    assert (await sdk.agents.get(agent.id)).status is models.AgentStatus.active


async def test_without_an_authority_it_is_said_which_command_makes_one(cluster: Cluster) -> None:
    """Neither malformed, as 400 would say, nor certified already (409)."""
    with fresh_database(cluster) as database:
        database.run("operator", "select kakunin.distrust_ca(%s, 'superseded')", [_ca().key_id])
        with served(database) as server:
            async with server.sdk() as sdk:
                made = await sdk.agents.create(name="x", model="m", version="1", model_hash=HASH)
                with pytest.raises(exceptions.ServerError, match="kakunin-db ca init makes one") as refused:
                    await sdk.agents.certify(made.id)
                assert refused.value.status_code == 503
                signer = server.keys.create("authority")
                authority = CertificateAuthority.create(signer, "Another CA")
                with database.connect("operator") as operator:
                    authority.trust(operator)
                certificate = await sdk.agents.certify(made.id)
                assert certificate.status is models.CertificateStatus.active
            with server.client(api_key(database)) as client:
                described = client.get("/openapi.json").json()["paths"]
    certify = described["/v1/agents/{agent_id}/certify"]["post"]["responses"]
    assert "kakunin-db ca init" in certify["503"]["description"]
    assert "kakunin-db" not in described["/v1/agents"]["get"]["responses"]["503"]["description"]


async def test_many_at_once(sdk: kakunin.Kakunin) -> None:
    agent = await certified(sdk)
    made = await asyncio.gather(
        *(sdk.events.create(agent_id=agent.id, action_type="api_call") for _ in range(40))
    )
    assert len({event.id for event in made}) == 40
    assert (await sdk.agents.risk(agent.id)).event_count == 40
