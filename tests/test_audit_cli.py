"""The commands about the ledger, end to end."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Database, _ca, fresh_database
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from test_worker import running

from kakunin_db import AsyncKakunin, Kakunin, LocalKeys
from kakunin_db.cli import main
from kakunin_db.ledger import TreeHead
from kakunin_db.ledger.worker import Settings, Worker


@pytest.fixture(scope="module")
def ledger(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Database, Path]]:
    """Some entries, sealed and signed in three rounds, and the root's certificate in a file."""
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "root.pem").write_bytes(_ca().certificate.public_bytes(serialization.Encoding.PEM))
    with fresh_database(cluster) as database:
        key = database.ledger_key()
        for _ in range(3):
            database.agent()
            database.seal_and_sign(key)
        yield database, folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_g6_exported_and_verified_elsewhere(
    ledger: tuple[Database, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    database, folder = ledger
    bundle = tmp_path / "ledger.jsonl"
    dsn = database.dsn("auditor")
    code, out, _ = run(capsys, "audit", "export", "--dsn", dsn, "--out", str(bundle), "--json")
    assert code == 0
    exported = json.loads(out)
    lines = [json.loads(line) for line in bundle.read_text().split("\n")[:-1]]
    assert {line["kakunin"] for line in lines} == {
        "bundle/1", "authority/1", "ledger_key/1", "certificate/1", "leaves/1", "entry/1", "tree_head/1",
        "end/1",
    }  # fmt: skip
    assert sum(line["kakunin"] == "entry/1" for line in lines) == exported["tree_size"]
    # Reading and exporting are on record.
    code, out, _ = run(capsys, "audit", "list", "--dsn", dsn, "--json", "--limit", "3")
    kinds = [json.loads(line)["event_type"] for line in out.splitlines()]
    assert kinds == ["ledger.read", "ledger.exported", "ledger.read"]
    # No database and no network.
    monkeypatch.delenv("KAKUNIN_DSN", raising=False)
    monkeypatch.setattr("socket.socket.connect", None)
    verify = ["audit", "verify", str(bundle), "--ca", str(folder / "root.pem")]
    code, out, _ = run(capsys, *verify, "--json")
    assert (code, json.loads(out)["valid"]) == (0, True)
    content = bundle.read_text()
    bundle.write_text(content.replace('"name": "agent"', '"name": "other"', 1))
    code, out, _ = run(capsys, *verify)
    assert code == 1
    assert "altered" in out
    code, _, err = run(capsys, "audit", "verify", str(bundle))
    assert code == 2
    assert "--ca" in err
    code, _, err = run(capsys, "audit", "export", "--dsn", dsn, "--out", str(bundle))
    assert code == 1


def test_g6_proofs_and_what_openssl_says_of_a_head(
    ledger: tuple[Database, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, folder = ledger
    dsn, ca = database.dsn("auditor"), str(folder / "root.pem")
    event_id = database.value("auditor", "select min(event_id) from kakunin.audit_log")
    sizes = [row[0] for row in database.run("auditor", "select tree_size from kakunin.tree_heads order by 1")]
    for arguments in (["prove", str(event_id)], ["consistency", str(sizes[0]), str(sizes[2])]):
        code, out, _ = run(capsys, "audit", *arguments, "--dsn", dsn)
        assert code == 0
        proof = tmp_path / f"{arguments[0]}.json"
        proof.write_text(out)
        code, out, _ = run(capsys, "audit", "verify", str(proof), "--ca", ca)
        assert code == 0
        proof.write_text(proof.read_text().replace('"path":["', '"path":["00', 1))
        code, out, _ = run(capsys, "audit", "verify", str(proof), "--ca", ca)
        assert code == 1
    row = database.run(
        "auditor", 'select tree_size, "timestamp", root, signature from kakunin.tree_heads limit 1'
    )
    size, timestamp, root, signature = row[0]
    der = database.value("auditor", "select der from kakunin.ledger_keys")
    key = x509.load_der_x509_certificate(der).public_key()
    (tmp_path / "key.pem").write_bytes(
        key.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )  # fmt: skip
    (tmp_path / "head").write_bytes(TreeHead.bytes_to_sign(size, timestamp, bytes(root)))
    (tmp_path / "head.sig").write_bytes(signature)
    try:
        done = subprocess.run(
            ["openssl", "dgst", "-sha256", "-verify", "key.pem", "-signature", "head.sig", "head"],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.stdout.strip() == "Verified OK"


def test_verifying_a_database(ledger: tuple[Database, Path], capsys: pytest.CaptureFixture[str]) -> None:
    database, folder = ledger
    command = ["audit", "verify", "--dsn", database.dsn("auditor"), "--ca", str(folder / "root.pem")]
    code, out, err = run(capsys, *command, "--json")
    assert (code, json.loads(out)["findings"]) == (0, [])
    assert "not signed yet" in err  # that it is being read, to begin with


_ENDPOINT = (
    "insert into kakunin_private.webhook_endpoints"
    " (endpoint_id, url, event_types, secret, created_at, created_by, disabled_at)"
    " values (gen_random_uuid(), 'https://hooks.example', '{agent.suspended}',"
    " decode(repeat('00', 60), 'hex'), now(), user, DISABLED) returning endpoint_id"
)
_DELIVERY = (
    f"with e as ({_ENDPOINT}) insert into kakunin_private.webhook_deliveries"
    " (message_id, endpoint_id, urgent, state, created_at, next_attempt_at)"
    " select 'm' || endpoint_id, endpoint_id, true, STATE, now() - interval '61 minutes', now() from e"
).replace("DISABLED", "null")
UNDELIVERED = [
    (_ENDPOINT.replace("DISABLED", "now()"), "1 webhook endpoints are disabled and told nothing"),
    (_DELIVERY.replace("STATE", "'dead'"), "1 webhook deliveries were given up"),
    (_DELIVERY.replace("STATE", "'pending'"), "1 webhook deliveries wait, the oldest for 36"),
]


def test_a_key_is_made_and_the_health_of_a_ledger(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "password")
    with fresh_database(cluster) as database:
        operator, keys = database.dsn("app"), f"file:{tmp_path}/keys"
        database.run("postgres", "grant kakunin_registrar, kakunin_auditor to app")
        code, out, _ = run(capsys, "health", "--dsn", database.dsn("auditor"), "--json")
        assert code == 1
        assert any("audit init" in problem for problem in json.loads(out)["problems"])
        run(capsys, "ca", "init", "--another", "--dsn", operator, "--keys", keys)
        code, out, err = run(capsys, "audit", "init", "--dsn", operator, "--keys", keys, "--json")
        assert code == 0, err
        code, _, err = run(capsys, "audit", "init", "--dsn", operator, "--keys", keys)
        assert code == 1
        assert "has a key already" in err
        store = LocalKeys(tmp_path / "keys", b"password")
        with running(Worker(database.dsn("worker"), store, settings=Settings(interval=0.1, poll=0.1))):
            from test_worker import signed, until

            until(signed(database), "the signature")
            code, out, _ = run(capsys, "health", "--dsn", database.dsn("worker"))
            assert code == 0, out
            for change, said in UNDELIVERED:
                database.run("installer", change)
                for login in ("worker", "auditor", "operator"):
                    code, out, _ = run(capsys, "health", "--dsn", database.dsn(login))
                    assert (code, said in out) == (1, True), out
                database.run("installer", "delete from kakunin_private.webhook_endpoints")
                assert run(capsys, "health", "--dsn", database.dsn("worker"))[0] == 0
        database.run("postgres", "revoke kakunin_registrar, kakunin_auditor from app")


async def test_the_clients_have_the_ledger(cluster: Any, tmp_path: Path) -> None:
    with fresh_database(cluster) as database:
        database.run("postgres", "grant kakunin_registrar, kakunin_auditor to app")
        keys = LocalKeys(tmp_path / "keys", b"password")
        with Kakunin(database.dsn("app"), keys=keys) as kakunin:
            kakunin.authorities.create()
            made = kakunin.ledger.create_key()
            (known,) = kakunin.ledger.keys()
            assert known == made
            assert kakunin.ledger.status().signed_size == 0
        async with AsyncKakunin(database.dsn("app"), keys=keys) as client:
            second = await client.ledger.create_key()
            revoked = await client.ledger.revoke_key(made.key_id, "superseded")
            keys_now = {key.key_id: key.revoked_at for key in await client.ledger.keys()}
            assert keys_now == {made.key_id: revoked, second.key_id: None}
            assert (await client.ledger.status()).leader is None
        database.run("postgres", "revoke kakunin_registrar, kakunin_auditor from app")


@pytest.mark.parametrize("command", ["witness-sql", "guard-sql"])
def test_what_is_printed_for_psql_runs(
    cluster: Any, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with fresh_database(cluster) as database:
        code, out, _ = run(capsys, "audit", command)
        assert code == 0
        database.run("postgres", out)


def test_a_worker_that_cannot_begin_says_why(
    database: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "password")
    keys = f"file:{tmp_path}"
    code, _, err = run(capsys, "worker", "--dsn", database.dsn("stranger"), "--keys", keys)
    assert code == 1
    assert "kakunin_worker" in err
    code, _, err = run(capsys, "worker", "--dsn", database.dsn("worker"))
    assert code == 2


def test_g5_numbers_that_python_has_no_value_for_are_no_tampering(
    ledger: tuple[Database, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An agent can write them. Its own next reader and an auditor's may neither stop there nor cry wolf."""
    database, folder = ledger
    agent, key = database.agent(), database.ledger_key()
    with database.connect("agent_1", autocommit=True) as session:
        session.execute("select kakunin.bind_session(%s, false)", [database.ticket(agent, "agent_1")])
        for metadata in ('{"n": 1e5000}', '{"rows": 1e400, "n": -1.5e-6000}', '{"n": 1.5e400}', "{}"):
            session.execute("select kakunin.audit_log_append('api_call', %s)::text", [metadata])
    with Kakunin(database.dsn("agent_1"), credential=agent.credential) as client:
        events = client.events.list()
    assert [event.metadata for event in events][::3] == [{}, {"n": "1" + "0" * 5000}]
    dsn, ca = database.dsn("auditor"), str(folder / "root.pem")
    for state in ("not sealed yet", "signed"):
        if state == "signed":
            database.seal_and_sign(key)
        code, out, _ = run(capsys, "audit", "verify", "--dsn", dsn, "--ca", ca, "--json")
        assert (code, json.loads(out)["findings"]) == (0, []), state
    for event in events:
        code, _, err = run(capsys, "audit", "prove", str(event.event_id), "--dsn", dsn)
        assert code == 0, err
    assert run(capsys, "audit", "list", "--dsn", dsn, "--json")[0] == 0
    bundle = str(tmp_path / "bundle.jsonl")
    assert run(capsys, "audit", "export", "--dsn", dsn, "--out", bundle)[0] == 0
    assert run(capsys, "audit", "verify", bundle, "--ca", ca)[0] == 0
