"""The ledger: what entries are, who appends and reads them, and how they are sealed, signed and proved."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import itertools
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Agent, Database, LedgerKey, _ca, fresh_database, one, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from forge import ALTERNATIVE, BASIC, SUBJECT_ID, USAGE, Certificate, name, rsa_key, usage
from forge import Authority as ForgedAuthority
from psycopg import sql

from kakunin_db import CertificateAuthority, LocalSigner
from kakunin_db.ca import Revocation
from kakunin_db.migrate import downgrade, migrate
from kakunin_db.resources import install_sql, sql_dir

Connection = psycopg.Connection[Any]

APPEND = "select kakunin.audit_log_append(%s, %s, %s)"
SEAL = "select kakunin.seal_ledger(%s)"
PUBLISH = "select kakunin.publish_tree_head(%s, %s, %s, %s)"
PROTECT = "select kakunin.protect(%s, audit => true)"
NOBODY = "00000000-0000-0000-0000-000000000000"
MEMBERS = [
    "kakunin", "installation", "event_id", "recorded_at", "event_type", "agent_id", "serial", "login",
    "session_id", "chain", "sequence", "prev", "risk", "metadata",
]  # fmt: skip


# Helpers --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def acting(database: Database, agent: Agent, login: str = "agent_1", **kwargs: Any) -> Iterator[Connection]:
    """A connection bound to the agent's certificate for as long as its ticket is good."""
    ticket = database.ticket(agent, login)
    with database.connect(login, **kwargs) as session:
        session.execute("select kakunin.bind_session(%s, false)", [ticket])
        session.commit()
        yield session


def append(
    session: Connection,
    event_type: str | None = "api_call",
    metadata: Any = "{}",
    session_id: str | None = None,
) -> dict[str, Any]:
    return one(session, APPEND, [event_type, metadata, session_id])


def newest(database: Database) -> int:
    """The id of the newest entry that is committed."""
    return database.value("postgres", "select coalesce(max(event_id), 0) from kakunin_private.ledger")


def entries(database: Database, after: int = 0) -> list[dict[str, Any]]:
    """Committed entries after this one, parsed, and read around the kit."""
    query = "select entry from kakunin_private.ledger where event_id > %s order by event_id"
    return [parsed(entry) for (entry,) in database.run("postgres", query, [after])]


def parsed(entry: str) -> dict[str, Any]:
    """Numbers of thousands of digits, which int() refuses, stay what they are."""
    return json.loads(entry, parse_int=lambda digits: int(digits) if len(digits) < 100 else digits)


def events(database: Database, after: int) -> list[tuple[str, str | None, Any]]:
    return [(e["event_type"], e["agent_id"], e["metadata"]) for e in entries(database, after)]


def leaf_hash(entry: str) -> bytes:
    return hashlib.sha256(b"\0" + entry.encode()).digest()


def check_chains(rows: list[str]) -> None:
    """Entries in an order in which every chain has to be whole."""
    chains: dict[int, tuple[int, str, Any]] = {}
    for row in rows:
        entry = parsed(row)
        assert list(entry) == MEMBERS
        sequence, head, event_id = chains.get(entry["chain"], (0, "0" * 64, 0))
        assert (entry["sequence"], entry["prev"]) == (sequence + 1, head), row
        assert entry["event_id"] > event_id
        chains[entry["chain"]] = (entry["sequence"], leaf_hash(row).hex(), entry["event_id"])


@pytest.fixture(scope="module")
def agent(database: Database) -> Agent:
    return database.agent("one")


@pytest.fixture(scope="module")
def other(database: Database) -> Agent:
    return database.agent("other")


@pytest.fixture(scope="module")
def key(database: Database) -> LedgerKey:
    return database.ledger_key()


@pytest.fixture
def movable(cluster: Cluster) -> Iterator[tuple[Database, Callable[[str], None]]]:
    """A database whose clock can be moved, and what moves it."""
    with fresh_database(cluster) as database:
        database.make_clock_movable()
        yield database, database.move_clock


# Appending ------------------------------------------------------------------------------------------


def test_append_returns_what_the_entry_says(database: Database, agent: Agent) -> None:
    before = newest(database)
    with acting(database, agent) as session:
        first = append(session, "data_access", '{"b": 1, "a": [null, "x"]}', "s-1")
        second = append(session)
        session.commit()
    rows = database.run(
        "postgres",
        "select event_id, recorded_at, agent_id, entry from kakunin_private.ledger where event_id > %s"
        " order by event_id",
        [before],
    )
    assert len(rows) == 2
    for (event_id, recorded_at, agent_id, text), result in zip(rows, (first, second), strict=True):
        entry = json.loads(text)
        assert list(entry) == MEMBERS
        moment = recorded_at.astimezone(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        assert entry["kakunin"] == "entry/1"
        assert entry["installation"] == str(database.installation_id)
        assert entry["recorded_at"] == moment
        assert (entry["agent_id"], agent_id) == (str(agent.agent_id), agent.agent_id)
        assert (entry["serial"], entry["login"]) == (agent.serial, "agent_1")
        risk = {"score", "band", "factors", "agent_score", "agent_band"}  # tests/test_risk.py
        assert {k: v for k, v in result.items() if k not in risk} == {
            "event_id": event_id,
            "event_type": entry["event_type"],
            "agent_id": entry["agent_id"],
            "recorded_at": moment,
            "chain": entry["chain"],
            "sequence": entry["sequence"],
            "hash": leaf_hash(text).hex(),
            "prev": entry["prev"],
        }
        assert result.keys() >= risk
        assert entry["event_id"] == event_id
        # Byte for byte as docs/ledger-format.md has it.
        head, _, rest = text.partition('"risk":')
        assert head == json.dumps({k: entry[k] for k in MEMBERS[:-2]}, separators=(",", ":"))[:-1] + ","
        assert rest.startswith(
            '{"band": "low", "score": 0.1000, "factors": {}, "agent_band": "low", "agent_score": 0.0000},'
            '"metadata":'
        )
        assert entry["risk"] == {name: result[name] for name in risk}
    assert rows[0][3].endswith(',"metadata":{"a": [null, "x"], "b": 1}}')
    assert (json.loads(rows[0][3])["session_id"], json.loads(rows[1][3])["session_id"]) == ("s-1", None)
    assert json.loads(rows[1][3])["metadata"] == {}
    assert second["prev"] == first["hash"]
    assert second["sequence"] == first["sequence"] + 1


def test_the_first_entry_of_a_chain_follows_zeros(database: Database) -> None:
    with acting(database, database.agent()) as session:
        result = append(session)
    assert (result["sequence"], result["prev"]) == (1, "0" * 64)


def test_what_is_rolled_back_leaves_a_gap_and_no_hole_in_the_chain(database: Database) -> None:
    agent = database.agent()
    kept = []
    with acting(database, agent) as session:
        kept.append(append(session))
        with contextlib.suppress(ZeroDivisionError), session.transaction():
            append(session, "undone")
            append(session, "undone")
            raise ZeroDivisionError
        kept.append(append(session))
        with session.transaction():
            kept.append(append(session))
            with contextlib.suppress(ZeroDivisionError), session.transaction():
                append(session, "undone")
                raise ZeroDivisionError
            kept.append(append(session))
        session.commit()
        append(session, "undone")
        session.rollback()
        kept.append(append(session))
        session.commit()
    assert [e["sequence"] for e in kept] == [1, 2, 3, 4, 5]
    assert len({e["chain"] for e in kept}) == 1
    assert [b["prev"] for b in kept[1:]] == [a["hash"] for a in kept[:-1]]
    ids = [e["event_id"] for e in kept]
    assert ids == sorted(ids)
    assert ids[-1] - ids[0] == 8
    of_agent = (
        "select entry from kakunin_private.ledger where agent_id = %s and xid is not null order by event_id"
    )
    rows = [row for (row,) in database.run("postgres", of_agent, [agent.agent_id])]
    rows = [row for row in rows if json.loads(row)["serial"]]  # the rest was decided about it
    assert [json.loads(row)["event_id"] for row in rows] == ids
    check_chains(rows)


def test_transactions_of_one_agent_at_once_take_chains_of_their_own(database: Database) -> None:
    agent = database.agent()
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(acting(database, agent)) for _ in range(4)]
        for session in sessions:
            session.execute("set lock_timeout = '1ms'")  # whoever waits, fails
            session.commit()
        at_once = [append(session) for session in sessions]
        again = [append(session) for session in sessions]
        assert len({e["chain"] for e in at_once}) == 4
        assert [e["chain"] for e in again] == [e["chain"] for e in at_once]
        assert {e["sequence"] for e in at_once} == {1}
        for session in sessions[1:]:
            session.commit()
        sessions[0].rollback()
        # One after the other they all take the first, also where it was rolled back.
        later = []
        for session in sessions:
            later.append(append(session))
            session.commit()
    assert {e["chain"] for e in later} == {min(e["chain"] for e in at_once) + 1}
    assert [e["sequence"] for e in later] == [3, 4, 5, 6]


def test_an_agent_and_another_never_share_a_chain(database: Database, agent: Agent, other: Agent) -> None:
    with acting(database, agent) as first, acting(database, other, "agent_2") as second:
        chains = {append(first)["chain"]}, {append(second)["chain"]}
    assert chains[0].isdisjoint(chains[1])


def test_two_certificates_of_an_agent_share_its_chain(database: Database) -> None:
    agent = database.agent()
    with acting(database, agent) as session:
        first = append(session)
        session.commit()
    with acting(database, database.renew(agent)) as session:
        second = append(session)
        session.commit()
    assert (second["chain"], second["prev"]) == (first["chain"], first["hash"])


LONGEST = '{"m": "' + "x" * (16384 - 9) + '"}'


@pytest.mark.parametrize(
    ("event_type", "metadata", "session_id"),
    [
        ("a", "{}", None),
        ("A" * 64, LONGEST, "s" * 200),
        ("Z0_:-", "null", ""),
        ("api_call", "[1, 2]", "\u00e9" * 100),
        ("api_call", '"text"', None),
        ("api_call", None, None),
        ("api_call", "1e16383", None),
    ],
    ids=["shortest", "longest", "marks", "utf8", "scalar", "null", "number"],
)
def test_the_limits_themselves_are_taken(
    database: Database, agent: Agent, event_type: str, metadata: str | None, session_id: str | None
) -> None:
    with acting(database, agent) as session:
        result = append(session, event_type, metadata, session_id)
        session.commit()
    [entry] = [e for e in entries(database, result["event_id"] - 1) if e["event_id"] == result["event_id"]]
    assert (entry["event_type"], entry["session_id"]) == (event_type, session_id)
    assert entry["metadata"] == ("1" + "0" * 16383 if metadata == "1e16383" else json.loads(metadata or "{}"))


@pytest.mark.parametrize(
    ("event_type", "metadata", "session_id"),
    [
        (None, "{}", None),
        ("", "{}", None),
        ("A" * 65, "{}", None),
        ("certificate.issued", "{}", None),
        ("1x", "{}", None),
        ("_x", "{}", None),
        ("a b", "{}", None),
        ("a\n", "{}", None),
        ("\na", "{}", None),
        ("a\nb", "{}", None),
        ("\u00e4", "{}", None),
        ("a\u00e4", "{}", None),
        ('a"', "{}", None),
        ("a\\", "{}", None),
        ("api_call", LONGEST[:-2] + 'x"}', None),
        ("api_call", '{"m": "' + "\u00e9" * 8192 + '"}', None),
        ("api_call", "1e16384", None),
        ("api_call", "1e131071", None),
        ("api_call", "{}", "s" * 201),
        ("api_call", "{}", "\u00e9" * 101),
    ],
    ids=itertools.count(),
)
def test_what_is_outside_the_limits_is_ka010(
    database: Database, agent: Agent, event_type: str | None, metadata: str, session_id: str | None
) -> None:
    before = newest(database)
    with acting(database, agent) as session, refused("KA010"):
        append(session, event_type, metadata, session_id)
    assert newest(database) == before


STRANGE = {
    "quotes": "'\"`",
    "backslashes": '\\ \\\\ \\n \\u0041 \\"',
    "control": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "json": '","metadata":{"forged":true},"x":"',
    "line": 'a\nb\r\n{"kakunin":"end/1"}',
    "astral": "\U0001f512\U0010ffff\u2028\u2029\ufeff\ufffe",
    "combining": "e\u0301 \u00e9",
    "format": "%s %I %% $1 {}",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_any_text_stays_what_it_was(database: Database, agent: Agent, text: str) -> None:
    metadata = {text: text, "nested": [{text: text}]}
    with acting(database, agent) as session:
        result = append(session, "api_call", json.dumps(metadata), text)
        session.commit()
    query = "select entry from kakunin_private.ledger where event_id = %s"
    raw = database.value("postgres", query, [result["event_id"]])
    assert "\n" not in raw
    assert "\r" not in raw
    entry = json.loads(raw, object_pairs_hook=lambda pairs: (dict(pairs), len(pairs)))[0]
    assert entry["session_id"] == text
    assert json.loads(raw)["metadata"] == metadata
    assert result["hash"] == leaf_hash(raw).hex()


@pytest.mark.parametrize(
    "login", ['say "hi"', "back\\slash", "it's", "\u00e9t\u00e9", "a,b:{}"], ids=range(5)
)
def test_a_logins_name_is_quoted(database: Database, login: str) -> None:
    agent = database.agent()
    role = sql.Identifier(login)
    with database.cluster.connect(autocommit=True) as admin:
        admin.execute(sql.SQL("create role {} login in role kakunin_agent").format(role))
    try:
        info = psycopg.conninfo.make_conninfo(database.dsn("x"), user=login)
        with psycopg.connect(info, autocommit=True) as session:
            ticket = one(session, "select kakunin.open_session(%s)", [agent.assertion()])
            session.execute("select kakunin.bind_session(%s, false)", [ticket])
            result = append(session)
            [shown] = session.execute(
                "select login, event_id from kakunin.audit_log where login is not null and serial is not null"
            )
        assert shown == (login, result["event_id"])
        [entry] = entries(database, result["event_id"] - 1)
        assert (entry["login"], list(entry)) == (login, MEMBERS)
    finally:
        with database.cluster.connect(autocommit=True) as admin:
            admin.execute(sql.SQL("drop role {}").format(role))


def test_without_a_binding_nothing_is_appended(database: Database) -> None:
    before = newest(database)
    with database.connect("agent_1") as session, refused("KA004", match="no certificate is bound"):
        append(session)
    assert newest(database) == before


def test_a_gateway_appends_for_whom_it_is_bound_to(database: Database, agent: Agent) -> None:
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
        result = append(session)
        assert result["agent_id"] == str(agent.agent_id)
        assert [
            e
            for (e,) in session.execute(
                "select login from kakunin.audit_log where event_id = %s", [result["event_id"]]
            )
        ] == ["gateway"]


@pytest.mark.parametrize(("how", "state"), [("revoke", "KA002"), ("suspend", "KA008")])
def test_who_lost_access_appends_nothing_from_the_next_statement_on(
    database: Database, how: str, state: str
) -> None:
    agent = database.agent()
    with acting(database, agent) as session:
        append(session)
        getattr(agent, how)()
        with refused(state):
            append(session)


def test_an_expired_certificate_appends_nothing(movable: tuple[Database, Callable[[str], None]]) -> None:
    database, move = movable
    agent = database.agent(lifetime=dt.timedelta(hours=1))
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
        append(session)
        move("2 hours")
        with refused("KA003"):
            append(session)


# Reading --------------------------------------------------------------------------------------------


def test_an_agent_reads_its_own_entries_and_an_auditor_all(database: Database) -> None:
    agents = [database.agent(), database.agent()]
    made = []
    for agent, login in zip(agents, ("agent_1", "agent_2"), strict=True):
        with acting(database, agent, login) as session:
            made.append(append(session, "mine", '{"of": 1}', "s")["event_id"])
            session.commit()
    for agent, login, mine in zip(agents, ("agent_1", "agent_2"), made, strict=True):
        with acting(database, agent, login) as session:
            rows = session.execute("select * from kakunin.audit_log where event_type = 'mine'").fetchall()
            [(entry,)] = database.run(
                "postgres", "select entry from kakunin_private.ledger where event_id = %s", [mine]
            )
            said = json.loads(entry)
            [row] = rows
            assert row[0] == mine
            assert row[2:] == (
                "mine", agent.agent_id, agent.serial, login, "s", {"of": 1}, said["risk"],
                said["chain"], said["sequence"], said["prev"], leaf_hash(entry).hex(), entry,
            )  # fmt: skip
            everything = session.execute("select distinct agent_id from kakunin.audit_log").fetchall()
            # What was decided about it is its own to read as well.
            assert everything == [(agent.agent_id,)]
            types = {t for (t,) in session.execute("select event_type from kakunin.audit_log")}
            assert types == {"agent.created", "certificate.issued", "mine"}
    for login in ("agent_1", "gateway"):
        assert database.run(login, "select * from kakunin.audit_log") == []
    seen = database.run("auditor", "select event_id from kakunin.audit_log order by 1")
    assert seen == database.run("postgres", "select event_id from kakunin_private.ledger order by 1")
    assert set(made) <= {event_id for (event_id,) in seen}


def test_a_revoked_agent_reads_nothing(database: Database) -> None:
    agent = database.agent()
    with acting(database, agent) as session:
        append(session)
        session.commit()
        agent.revoke()
        assert session.execute("select * from kakunin.audit_log").fetchall() == []


def test_an_agents_query_goes_by_the_index(database: Database, agent: Agent) -> None:
    with acting(database, agent) as session:
        session.execute("set enable_seqscan = off")
        plan = "\n".join(
            r
            for (r,) in session.execute(
                "explain (analyze, timing off, costs off) select * from kakunin.audit_log"
            )
        )
    assert "agent_id_event_id_idx" in plan
    # The auditor's branch is not run, and neither is a scan of a whole partition.
    scans = [line for line in plan.splitlines() if "Seq Scan" in line]
    assert all("never executed" in line for line in scans), plan


# What was decided -----------------------------------------------------------------------------------


def test_every_decision_is_an_entry(cluster: Cluster) -> None:
    with fresh_database(cluster) as database:
        with database.connect("installer") as owner:
            authority = CertificateAuthority.create(LocalSigner.generate(), "another")
            owner.commit()
        at = newest(database)

        def happened() -> list[tuple[str, str | None, Any]]:
            nonlocal at
            found = events(database, at)
            new = entries(database, at)
            assert all(e["serial"] is None and e["session_id"] is None for e in new)
            at = newest(database)
            return found

        run, value = database.run, database.value
        create = "select kakunin.create_agent(%s, model => 'm', model_hash => %s)"
        model_hash = "sha256:" + "0A" * 32
        agent_id = value("registrar", create, ["n\u00e9", model_hash])
        who = str(agent_id)
        assert happened() == [
            ("agent.created", who, {
                "name": "n\u00e9", "tenant": None, "model": "m", "model_version": None,
                "model_hash": model_hash.lower(),
            }),
        ]  # fmt: skip
        [about] = run(
            "postgres",
            "select agent_id, entry::json ->> 'login' from kakunin_private.ledger"
            " order by event_id desc limit 1",
        )
        assert about == (agent_id, "registrar")

        run("registrar", "select kakunin.update_agent(%s, 'renamed', model => 'n')", [agent_id])
        assert happened() == [("agent.updated", who, {"name": "renamed", "model": "n"})]

        agent = database.agent("second")
        who = str(agent.agent_id)
        sha256 = hashlib.sha256(agent.issued.der).hexdigest()
        until = agent.issued.certificate.not_valid_after_utc.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        assert happened()[1:] == [
            ("certificate.issued", who, {
                "serial": agent.serial, "sha256": sha256, "issuer_key_id": _ca().key_id, "not_after": until,
            }),
        ]  # fmt: skip

        renewed = database.renew(agent)
        kinds = [(kind, data["serial"], data.get("reason")) for kind, _, data in happened()]
        assert kinds == [
            ("certificate.issued", renewed.serial, None),
            ("certificate.revoked", agent.serial, "superseded"),
        ]

        at_once = value(
            "operator", "select kakunin.revoke_certificate(%s, 'keyCompromise')", [renewed.serial]
        )
        [(kind, about_whom, data)] = happened()
        moment = at_once.astimezone(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        assert (kind, about_whom) == ("certificate.revoked", who)
        assert data == {"serial": renewed.serial, "reason": "keyCompromise", "revoked_at": moment}
        run("operator", "select kakunin.revoke_certificate(%s)", [renewed.serial])
        assert happened() == []

        run("operator", "select kakunin.suspend_agent(%s, 'why')", [agent.agent_id])
        run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
        assert happened() == [
            ("agent.suspended", who, {"reason": "why"}),
            ("agent.reinstated", who, {}),
        ]

        halted = value("operator", "select kakunin.halt_agent(%s, 'stop \"it\"')", [agent.agent_id])
        found = happened()
        assert [kind for kind, _, _ in found] == ["agent.suspended", "certificate.revoked", "agent.halted"]
        assert found[-1] == ("agent.halted", who, {
            "halt_id": halted["halt_id"], "reason": 'stop "it"', "certificates": [agent.serial],
        })  # fmt: skip

        signature = _ca().signer.sign(hashlib.sha256(halted["receipt"].encode()).digest())
        for _ in range(2):  # the first signature stays, and is the one that is recorded
            run(
                "registrar",
                "select kakunin.sign_halt(%s, %s, %s)",
                [halted["halt_id"], _ca().key_id, signature],
            )
        assert happened() == [
            ("halt.signed", who, {
                "halt_id": halted["halt_id"], "key_id": _ca().key_id, "signature": signature.hex(),
            }),
        ]  # fmt: skip

        revoked = [
            Revocation(*row)
            for row in run("operator", "select * from kakunin.revocations(%s)", [_ca().key_id])
        ]
        crl = _ca().revocation_list(revoked, 7).public_bytes(serialization.Encoding.DER)
        run("registrar", "select kakunin.publish_crl(%s)", [crl])
        assert happened() == [
            (
                "crl.published",
                None,
                {"key_id": _ca().key_id, "number": 7, "sha256": hashlib.sha256(crl).hexdigest()},
            ),
        ]

        run("operator", "select kakunin.rotate_session_key('1 hour')")
        run("installer", "select kakunin.set_gateway_logins('{authenticator}')")
        assert happened() == [
            ("key.rotated", None, {"key": "session", "grace": "01:00:00"}),
            ("settings.changed", None, {"gateway_logins": ["authenticator"], "hooked": []}),
        ]

        run("operator", "select kakunin.trust_ca(%s)", [authority.der])
        run("operator", "select kakunin.distrust_ca(%s, 'superseded')", [authority.key_id])
        [trusted, distrusted] = happened()
        assert trusted[0] == "authority.trusted"
        assert trusted[2]["key_id"] == authority.key_id
        assert trusted[2]["sha256"] == hashlib.sha256(authority.der).hexdigest()
        assert distrusted == (
            "authority.distrusted",
            None,
            {"key_id": authority.key_id, "reason": "superseded"},
        )

        key = database.ledger_key()
        run("operator", "select kakunin.revoke_ledger_key(%s, 'superseded')", [key.key_id])
        run("operator", "select kakunin.revoke_ledger_key(%s, 'keyCompromise')", [key.key_id])
        [registered, gone] = happened()
        assert registered[0] == "ledger.key_registered"
        assert registered[2]["key_id"] == key.key_id
        assert registered[2]["sha256"] == hashlib.sha256(key.der).hexdigest()
        assert gone == ("ledger.key_revoked", None, {"key_id": key.key_id, "reason": "superseded"})

        run("app", 'create table "T a" (permitted_agent_serial text)')
        run("app", "select kakunin.protect('\"T a\"', write_scope => 'a:b', force => true)")
        run("app", "select kakunin.unprotect('\"T a\"')")
        [(on, _, protected), (off, _, unprotected)] = happened()
        assert (on, off) == ("policy.protected", "policy.unprotected")
        assert protected["table"] == unprotected["table"] == 'public."T a"'
        assert (protected["row_security"], protected["forced"], protected["audit"]) == (True, True, False)
        assert sorted(protected["policies"]) == [
            "kakunin_delete_scope", "kakunin_insert_scope", "kakunin_isolation", "kakunin_update_scope",
        ]  # fmt: skip
        assert protected["policies"]["kakunin_isolation"]["permissive"] is True
        assert "current_cert_serial" in protected["policies"]["kakunin_isolation"]["using"]
        assert "a:b" in protected["policies"]["kakunin_insert_scope"]["check"]
        assert (unprotected["row_security"], unprotected["policies"]) == (False, {})

        run("auditor", "select kakunin.record_read('export', '{\"from\": 0}')")
        assert happened() == [("ledger.read", None, {"command": "export", "details": {"from": 0}})]
        before = str(database.installation_id)
        run("installer", "select kakunin.renew_installation()")
        assert happened() == [
            ("key.rotated", None, {"key": "session", "grace": "00:00:00"}),
            ("installation.renewed", None, {"before": before}),
        ]
        assert entries(database)[-1]["installation"] == str(database.installation_id) != before
        check_chains(
            [row for (row,) in run("postgres", "select entry from kakunin_private.ledger order by event_id")]
        )


def test_a_decision_that_is_rolled_back_is_no_entry(database: Database) -> None:
    agent = database.agent()
    before = newest(database)
    with database.connect("operator") as operator:
        operator.execute("select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
        operator.rollback()
    assert newest(database) == before


def test_what_is_refused_is_no_entry(database: Database) -> None:
    before = newest(database)
    for login, call in {
        "registrar": "select kakunin.register_certificate('x')",
        "operator": "select kakunin.suspend_agent(gen_random_uuid(), 'why')",
        "installer": "select kakunin.set_gateway_logins('{nobody_at_all}')",
    }.items():
        with refused("KA010"):
            database.run(login, call)
    assert newest(database) == before


# Audited tables -------------------------------------------------------------------------------------


@pytest.fixture
def audited(database: Database, agent: Agent) -> Iterator[Callable[..., list[Any]]]:
    """Makes a table `audited` with this definition; runs statements; gives the entries they made."""
    with database.connect("app", autocommit=True) as app:

        def run(*statements: str, session: Connection | None = None) -> list[Any]:
            before = newest(database)
            for statement in statements:
                (session or app).execute(statement)
            return [(kind, who, data) for kind, who, data in events(database, before)]

        app.execute("drop table if exists audited cascade")
        yield run
        app.execute("drop table if exists audited cascade")


TABLE = (
    "create table audited (id int primary key, permitted_agent_serial text, content text)",
    "create index on audited (permitted_agent_serial)",
    "grant all on audited to kakunin_agent",
)
ROWS = "insert into audited select i from generate_series({}, {}) i"


def changed(operation: str, rows: int | None = None, table: str = "public.audited", **more: Any) -> Any:
    data: dict[str, Any] = {"table": table, "operation": operation, **more}
    if rows is not None:
        data["rows"] = rows
    return (f"table.{operation.lower()}", None, data)


def test_each_statement_that_changes_rows_is_one_entry(audited: Callable[..., list[Any]]) -> None:
    audited(*TABLE, "select kakunin.protect('audited', audit => true)")
    assert audited(ROWS.format(1, 5)) == [changed("INSERT", 5)]
    assert audited("update audited set content = 'x' where id < 4") == [changed("UPDATE", 3)]
    assert audited("delete from audited where id = 1") == [changed("DELETE", 1)]
    assert audited("truncate audited") == [changed("TRUNCATE")]
    for nothing in (
        "insert into audited select 1 where false",
        "update audited set id = 1",
        "delete from audited",
    ):
        assert audited(nothing) == []
    assert audited("begin", ROWS.format(1, 2), "rollback") == []
    assert audited(
        "begin", "savepoint s", ROWS.format(1, 2), "rollback to s", ROWS.format(3, 3), "commit"
    ) == [changed("INSERT", 1)]
    upsert = "insert into audited values (3), (4) on conflict (id) do update set content = 'again'"
    assert sorted(e[2]["operation"] + str(e[2]["rows"]) for e in audited(upsert)) == ["INSERT1", "UPDATE1"]
    cte = "with gone as (delete from audited where id = 3 returning 1) insert into audited select 9 from gone"
    assert sorted(e[0] for e in audited(cte)) == ["table.delete", "table.insert"]
    merge = (
        "merge into audited a using (values (4), (9), (10)) v(id) on v.id = a.id"
        " when matched and a.id = 4 then delete when matched then update set content = 'm'"
        " when not matched then insert (id) values (v.id)"
    )
    assert sorted(e[0] for e in audited(merge)) == ["table.delete", "table.insert", "table.update"]


def test_copy_is_an_insert(database: Database, audited: Callable[..., list[Any]]) -> None:
    audited(*TABLE, "select kakunin.protect('audited', audit => true)")
    before = newest(database)
    with database.connect("app") as app, app.cursor() as cursor:
        with cursor.copy("copy audited (id) from stdin") as copy:
            for i in range(7):
                copy.write_row([i])
    assert events(database, before) == [changed("INSERT", 7)]


def test_a_bound_agents_changes_are_its_own(
    database: Database, agent: Agent, audited: Callable[..., list[Any]]
) -> None:
    audited(*TABLE, "select kakunin.protect('audited', audit => true)")
    before = newest(database)
    with acting(database, agent) as session:
        said = append(session)
        session.execute("insert into audited values (1, %s)", [agent.serial])
        with contextlib.suppress(psycopg.Error), session.transaction():
            session.execute("insert into audited values (2, 'AA')")
        session.commit()
    [first, second] = entries(database, before)
    assert first["event_type"] == "api_call"
    assert (second["event_type"], second["agent_id"], second["serial"], second["login"]) == (
        "table.insert", str(agent.agent_id), agent.serial, "agent_1",
    )  # fmt: skip
    assert (second["chain"], second["prev"]) == (said["chain"], said["hash"])
    with acting(database, agent) as session:
        types = session.execute(
            "select event_type from kakunin.audit_log where event_id > %s order by event_id", [before]
        )
        assert types.fetchall() == [("api_call",), ("table.insert",)]


def test_without_a_binding_the_login_is_named(database: Database, audited: Callable[..., list[Any]]) -> None:
    audited(*TABLE, "select kakunin.protect('audited', audit => true)", ROWS.format(1, 1))
    entry = entries(database)[-1]
    assert (entry["agent_id"], entry["serial"], entry["login"]) == (None, None, "app")
    query = "select agent_id from kakunin.chains where chain = %s"
    assert database.value("auditor", query, [entry["chain"]]) is None


def test_audit_keys_records_primary_keys(audited: Callable[..., list[Any]]) -> None:
    audited(
        'create table audited (b text, "a \'" int, permitted_agent_serial text, primary key ("a \'", b))',
        "select kakunin.protect('audited', audit_keys => true)",
    )
    keys = [["1", "x"], ["2", 'q"\\\n']]
    assert audited("insert into audited values ('x', 1), (E'q\"\\\\\\n', 2)") == [
        changed("INSERT", 2, keys=keys, keys_omitted=0)
    ]
    assert audited('update audited set "a \'" = 7 where "a \'" = 2') == [
        changed("UPDATE", 1, keys=[["7", 'q"\\\n']], keys_omitted=0)
    ]
    assert audited("delete from audited where b = 'x'") == [
        changed("DELETE", 1, keys=[["1", "x"]], keys_omitted=0)
    ]
    assert audited("truncate audited") == [changed("TRUNCATE")]


def test_a_hundred_keys_are_recorded_and_shortened(audited: Callable[..., list[Any]]) -> None:
    audited(*TABLE, "select kakunin.protect('audited', audit_keys => true)")
    for rows in (100, 101, 250):
        [(_, _, data)] = audited(ROWS.format(1, rows))
        assert data["keys"] == [[str(i)] for i in range(1, 101)]
        assert (data["rows"], data["keys_omitted"]) == (rows, rows - 100)
        audited("truncate audited")
    audited("alter table audited alter id type text")
    [(_, _, data)] = audited("insert into audited values (repeat('\u00e9', 2000))")
    assert data["keys"] == [["\u00e9" * 100]]


def test_keys_of_a_table_without_a_primary_key_are_ka010(audited: Callable[..., list[Any]]) -> None:
    audited("create table audited (id int unique, permitted_agent_serial text)")
    with refused("KA010", match="no primary key"):
        audited("select kakunin.protect('audited', audit_keys => true)")
    assert audited("select kakunin.protect('audited', audit => true)")
    assert audited("insert into audited values (1)") == [changed("INSERT", 1)]


def test_unprotect_and_protect_without_audit_take_it_away(
    database: Database, audited: Callable[..., list[Any]]
) -> None:
    triggers = "select tgname from pg_trigger where tgname like 'kakunin_audit_%'"
    audited(*TABLE, "select kakunin.protect('audited', audit => true)")
    assert len(database.run("postgres", triggers)) == 4
    audited("select kakunin.protect('audited', audit_keys => true)")  # repeated
    assert len(database.run("postgres", triggers)) == 4
    [(_, _, policy)] = audited("select kakunin.protect('audited')")
    assert policy["audit"] is False
    assert database.run("postgres", triggers) == []
    assert audited(ROWS.format(1, 1)) == []
    audited("select kakunin.protect('audited', audit => true)", "select kakunin.unprotect('audited')")
    assert database.run("postgres", triggers) == []
    assert audited(ROWS.format(2, 2)) == []


def test_partitions_are_audited_by_the_name_that_was_used(audited: Callable[..., list[Any]]) -> None:
    audited(
        "create table audited (id int primary key, permitted_agent_serial text) partition by range (id)",
        "create table audited_1 partition of audited for values from (0) to (10)",
        "create table audited_2 partition of audited for values from (10) to (20)",
        "select kakunin.protect('audited', audit_keys => true)",
    )
    both = changed("INSERT", 2, keys=[["1"], ["11"]], keys_omitted=0)
    assert audited("insert into audited values (1), (11)") == [both]
    one_key = {"keys": [["2"]], "keys_omitted": 0}
    assert audited("insert into audited_1 values (2)") == [
        changed("INSERT", 1, "public.audited_1", **one_key)
    ]
    # From one partition to the other it is still one update.
    moved = audited("update audited set id = 12 where id = 2")
    assert [(kind, data["table"], data["keys"]) for kind, _, data in moved] == [
        ("table.update", "public.audited", [["12"]])
    ]
    assert [kind for kind, _, _ in audited("delete from audited_2")] == ["table.delete"]
    # Partitions that are emptied with their parent have triggers of their own.
    assert {data["table"] for _, _, data in audited("truncate audited")} == {
        "public.audited", "public.audited_1", "public.audited_2",
    }  # fmt: skip


def test_inheritance_children_are_audited(audited: Callable[..., list[Any]]) -> None:
    audited(
        "create table audited (id int primary key, permitted_agent_serial text)",
        "create table audited_child (primary key (id)) inherits (audited)",
        "select kakunin.protect('audited', audit => true)",
    )
    assert audited("insert into audited_child values (1)") == [changed("INSERT", 1, "public.audited_child")]
    assert audited("update audited set id = 2") == [changed("UPDATE", 1)]


def test_a_cascade_is_an_entry_of_the_table_it_reaches(audited: Callable[..., list[Any]]) -> None:
    audited(
        *TABLE,
        "create table audited_line (id int primary key, of int references audited on delete cascade,"
        " permitted_agent_serial text)",
        "select kakunin.protect('audited_line', audit => true)",
        ROWS.format(1, 1),
        "insert into audited_line values (1, 1), (2, 1)",
    )
    try:
        assert audited("delete from audited") == [changed("DELETE", 2, "public.audited_line")]
    finally:
        audited("drop table audited_line")


# Append-only ----------------------------------------------------------------------------------------


TABLES = [
    "ledger", "ledger_default", "PARTITION", "batches", "tree_heads", "tree_nodes", "exports",
]  # fmt: skip
KEYS = {
    "batches": "tree_size", "tree_heads": "tree_size", "exports": "tree_size", "tree_nodes": "level",
}  # fmt: skip
CONFLICTS = {"batches": "tree_size", "tree_heads": "tree_size", "tree_nodes": "level, index"}


@pytest.fixture(scope="module")
def filled(cluster: Cluster) -> Iterator[Database]:
    """A database in whose ledger there is something of everything."""
    with fresh_database(cluster) as database:
        with database.connect("postgres") as admin:
            add_entries(admin, 300)
        size, _ = database.seal_and_sign(database.ledger_key())
        database.run("auditor", "select kakunin.record_export(%s, 0, repeat('0', 64))", [size])
        yield database


def add_entries(admin: Connection, count: int) -> None:
    """Entries by a superuser: as append() adds them, but quicker."""
    admin.execute(
        "insert into kakunin_private.ledger (event_id, recorded_at, xid, entry)"
        " select nextval('kakunin_private.event_ids'), clock_timestamp(), pg_current_xact_id(), 'entry ' || i"
        "  from generate_series(1, %s) i",
        [count],
    )


def contents(database: Database) -> Any:
    tables = ["ledger", "batches", "tree_heads", "tree_nodes", "exports"]
    kept = ", ".join(
        f"(select md5(string_agg(t::text, ' ' order by t::text)) from kakunin_private.{t} t)" for t in tables
    )
    return database.run("postgres", f"select {kept}")


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("login", ["installer", "postgres", "replica"])
def test_nothing_that_was_added_is_changed_by_anybody(filled: Database, login: str, table: str) -> None:
    before = contents(filled)
    if table == "PARTITION":
        table = "ledger_" + dt.datetime.now(dt.timezone.utc).strftime("%Y%m")
    column = KEYS.get(table, "event_id")
    qualified = f"kakunin_private.{table}"
    copy = f"select * from {qualified}"
    statements = [
        f"update {qualified} set {column} = {column}",
        f"update {qualified} set {column} = {column} where false",
        f"delete from {qualified}",
        f"delete from only {qualified} where false",
        f"truncate {qualified} cascade",
        f"merge into {qualified} t using (select 1 as x) s on true when matched then delete",
        f"merge into {qualified} t using (select 1) s on false when matched then update set {column} = 0",
        f"with gone as (delete from {qualified} returning 1) select * from gone",
    ]
    if table != "exports":  # it has no key
        target = CONFLICTS.get(table, "event_id, recorded_at")
        conflict = f"on conflict ({target}) do update set {column} = excluded.{column}"
        statements += [
            f"insert into {qualified} {copy} {conflict}",
            f"insert into {qualified} select * from ({copy} limit 0) x {conflict}",
        ]
    with filled.connect("postgres" if login == "replica" else login, autocommit=True) as session:
        if login == "replica":
            session.execute("set session_replication_role = replica")
        for statement in statements:
            with refused("KA006", match="append-only"):
                session.execute(statement)
    assert contents(filled) == before


GUARD = (sql_dir() / "superuser" / "guard_ledger.sql").read_text()


@pytest.fixture(scope="module")
def guarded(cluster: Cluster) -> Iterator[Database]:
    with fresh_database(cluster) as database:
        database.run("postgres", GUARD)
        database.run("postgres", GUARD)  # can be repeated
        yield database


def test_guarding_is_for_a_superuser(database: Database) -> None:
    for login in ("installer", "operator"):
        with refused("42501"):
            database.run(login, GUARD)


UNGUARDING = [
    "alter table kakunin_private.ledger detach partition kakunin_private.{partition}",
    "alter table kakunin_private.ledger detach partition kakunin_private.ledger_default",
    "drop table kakunin_private.{partition}",
    "drop table kakunin_private.ledger_default",
    "drop table kakunin_private.ledger cascade",
    "alter table kakunin_private.{partition} rename to elsewhere",
    "alter table kakunin_private.ledger_default rename to elsewhere",
    "alter table kakunin_private.{partition} set schema public",
    "alter table kakunin_private.{partition} disable trigger append_only",
    "alter table kakunin_private.{partition} disable trigger all",
    "alter table kakunin_private.{partition} disable trigger user",
    "alter table kakunin_private.{partition} enable trigger append_only",
    "alter table kakunin_private.{partition} enable replica trigger append_only",
    "alter table kakunin_private.ledger disable trigger append_only",
    "alter table kakunin_private.ledger_default disable trigger append_only",
    "drop trigger append_only on kakunin_private.{partition}",
    "drop trigger append_only on kakunin_private.ledger",
    "alter trigger append_only on kakunin_private.ledger rename to elsewhere",
    "drop function kakunin_private.refuse_change() cascade",
    "create table kakunin_private.more partition of kakunin_private.ledger"
    " for values from ('2020-01-01') to ('2020-02-01')",
    "create table public.more (like kakunin_private.ledger); alter table kakunin_private.ledger"
    " attach partition public.more for values from ('2020-01-01') to ('2020-02-01')",
    "drop view kakunin.audit_log cascade; alter table kakunin_private.ledger"
    " alter column entry type text collate \"C\" using replace(entry, 'halted', 'praised')",
    "alter table kakunin_private.batches alter column root type bytea using decode('00', 'hex')",
    "alter table kakunin_private.tree_nodes alter column hash type bytea using sha256(hash)",
    "alter table kakunin_private.{partition} set unlogged",
    "alter table kakunin_private.batches drop column root",
    "alter table kakunin_private.ledger drop column agent_id cascade",
    "alter table kakunin_private.ledger rename column entry to elsewhere",
]


@pytest.mark.parametrize("statement", UNGUARDING, ids=range(len(UNGUARDING)))
@pytest.mark.parametrize("login", ["installer", "postgres"])
def test_ddl_that_would_unguard_the_ledger_is_ka006(guarded: Database, login: str, statement: str) -> None:
    partition = "ledger_" + dt.datetime.now(dt.timezone.utc).strftime("%Y%m")
    with guarded.connect(login) as session, refused("KA006", match="append-only"):
        session.execute(statement.format(partition=partition))


def test_a_partition_is_not_detached_concurrently(guarded: Database) -> None:
    partition = "ledger_" + dt.datetime.now(dt.timezone.utc).strftime("%Y%m")
    with guarded.connect("installer", autocommit=True) as session, pytest.raises(psycopg.Error):
        session.execute(
            f"alter table kakunin_private.ledger detach partition kakunin_private.{partition} concurrently"
        )


def test_guarded_everything_else_goes_on(guarded: Database) -> None:
    agent = guarded.agent()
    with guarded.connect("app") as app:
        app.execute(
            "create table mine (id int primary key, permitted_agent_serial text) partition by list (id)"
        )
        app.execute("create table mine_1 partition of mine for values in (1)")
        app.execute("create function nothing() returns trigger language plpgsql as 'begin return new; end'")
        app.execute("create trigger t before insert on mine for each row execute function nothing()")
        app.execute(
            "alter table mine disable trigger t; alter trigger t on mine rename to u; drop trigger u on mine"
        )
        app.execute(
            "alter table mine detach partition mine_1; drop table mine_1, mine; create temp table t (a int)"
        )
    # The kit's own DDL too: stops, triggers and partitions.
    guarded.run("app", "create table mine (permitted_agent_serial text)")
    guarded.run("app", "select kakunin.protect('mine', audit => true)")
    guarded.run("app", "select kakunin.unprotect('mine')")
    guarded.run("operator", "select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
    assert guarded.value("worker", "select kakunin.make_partitions('5 months')")
    guarded.run("installer", "create index on kakunin_private.ledger (recorded_at)")


@pytest.mark.parametrize("cascade", [True, False], ids=["script", "drop"])
def test_guarded_it_can_be_taken_away(cluster: Cluster, cascade: bool) -> None:
    with cluster.connect(autocommit=True) as admin:
        admin.execute("create database guarded template template0")
        admin.execute("grant create on database guarded to installer")
    try:
        dsn = cluster.dsn("guarded", "installer")
        migrate(dsn)
        with cluster.connect("guarded", autocommit=True) as admin:
            admin.execute(GUARD)
            with refused("KA006"), cluster.connect("guarded", "installer") as installer:
                installer.execute("drop schema kakunin_private cascade")
            admin.execute("drop schema kakunin_guard cascade")
            if cascade:
                downgrade(dsn)
            else:
                with cluster.connect("guarded", "installer") as installer:
                    installer.execute("drop schema kakunin cascade; drop schema kakunin_private cascade")
            assert admin.execute(
                "select count(*) from pg_namespace where nspname like 'kakunin%'"
            ).fetchone() == (0,)
            admin.execute("create table still (works int)")
            assert admin.execute("select count(*) from pg_event_trigger").fetchone() == (0,)
        with cluster.connect("guarded", "installer") as installer:
            installer.execute(install_sql().encode())
    finally:
        with cluster.connect(autocommit=True) as admin:
            admin.execute("drop database guarded with (force)")


# Partitions -----------------------------------------------------------------------------------------


def months(first: dt.datetime, count: int) -> list[dt.datetime]:
    made = [first.replace(day=1, hour=0, minute=0, second=0, microsecond=0)]
    while len(made) < count:
        made.append((made[-1] + dt.timedelta(days=32)).replace(day=1))
    return made


@pytest.mark.parametrize("style", ["ISO", "German", "SQL, DMY", "Postgres"])
@pytest.mark.parametrize("zone", ["UTC", "Pacific/Kiritimati", "America/St_Johns"])
def test_partitions_are_months_of_utc(cluster: Cluster, zone: str, style: str) -> None:
    with fresh_database(cluster) as database:
        with database.connect("worker", autocommit=True) as worker:
            worker.execute("select set_config('TimeZone', %s, false)", [zone])
            worker.execute("select set_config('DateStyle', %s, false)", [style])
            made = one(worker, "select kakunin.make_partitions('5 months')")
            assert one(worker, "select kakunin.make_partitions('5 months')") == []
        now = dt.datetime.now(dt.timezone.utc)
        last = months(now, 6)[-1]
        assert made == [m.strftime("ledger_%Y%m") for m in months(now, 6)[4:]]
        rows = database.run(
            "postgres", "select name, from_at, to_at, archived_at from kakunin_private.partitions"
        )
        assert sorted(rows) == [
            (m.strftime("ledger_%Y%m"), m, (m + dt.timedelta(days=32)).replace(day=1), None)
            for m in months(now, 6)
        ]
        bound = "select pg_get_expr(c.relpartbound, c.oid) from pg_class c where c.relname = %s"
        with database.connect("postgres") as admin:
            admin.execute("set TimeZone = 'UTC'; set DateStyle = 'ISO'")
            following = (last + dt.timedelta(days=32)).replace(day=1)
            assert one(admin, bound, [made[-1]]) == (
                f"FOR VALUES FROM ('{last:%Y-%m-%d} 00:00:00+00') TO ('{following:%Y-%m-%d} 00:00:00+00')"
            )


@pytest.mark.parametrize("ahead", [None, "-1 second", "10 years 1 day"])
def test_partitions_are_made_up_to_ten_years_ahead(database: Database, ahead: str | None) -> None:
    with refused("KA010"):
        database.run("worker", "select kakunin.make_partitions(%s)", [ahead])


def test_two_at_once_make_partitions_once(cluster: Cluster) -> None:
    with fresh_database(cluster) as database, ThreadPoolExecutor(4) as pool:
        make = "select kakunin.make_partitions('12 months')"
        made = list(pool.map(lambda _: database.value("worker", make), range(4)))
        assert sum(map(len, made)) == 9
        assert sorted(map(len, made))[:3] == [0, 0, 0]


def test_entries_go_on_while_partitions_are_made(cluster: Cluster) -> None:
    """A transaction that has appended, and one that has read the ledger, and those that come after."""
    with fresh_database(cluster) as database:
        agent, other = database.agent(), database.agent()
        with acting(database, agent) as session, acting(database, other, "agent_2") as second:
            append(session)
            made = database.value("worker", "select kakunin.make_partitions('4 months')")
            assert len(made) == 1
            append(session)
            with database.connect("worker") as worker:
                worker.execute("select kakunin.make_partitions('5 months')")
                # Not committed yet: appends and decisions do not wait for that.
                second.execute("set lock_timeout = '1s'")
                append(second)
                second.commit()
                with database.connect("operator") as operator:
                    operator.execute("set lock_timeout = '1s'")
                    operator.execute("select kakunin.halt_agent(%s, 'why')", [other.agent_id])


def test_a_partition_for_the_month_takes_its_entries(movable: tuple[Database, Callable[[str], None]]) -> None:
    database, move = movable
    agent = database.agent()
    place = "select tableoid::regclass::text from kakunin_private.ledger where event_id = %s"
    for ahead, _ in (("0", 0), ("1 month", 1), ("2 months", 2)):
        move(ahead)
        with database.connect("gateway") as session:
            session.execute("select kakunin.bind_serial(%s)", [agent.serial])
            result = append(session)
        month = result["recorded_at"][:7].replace("-", "")
        assert database.value("postgres", place, [result["event_id"]]) == f"kakunin_private.ledger_{month}"
    assert not database.value("worker", "select kakunin.ledger_status() -> 'in_default_partition'")


def test_what_no_partition_was_made_for_goes_to_the_default_one(
    movable: tuple[Database, Callable[[str], None]],
) -> None:
    database, move = movable
    agent = database.agent(lifetime=dt.timedelta(days=365))
    key = database.ledger_key()
    move("6 months")
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
        result = append(session)
    halt = database.value("operator", "select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
    assert halt["certificates_revoked"] == [agent.serial]
    place = "select tableoid::regclass::text from kakunin_private.ledger where event_id >= %s"
    assert set(database.run("postgres", place, [result["event_id"]])) == {("kakunin_private.ledger_default",)}
    status = database.value("worker", "select kakunin.ledger_status()")
    assert status["in_default_partition"] is True
    size, _ = database.seal_and_sign(key)
    assert size == len(entries(database))
    # The months after it are made nevertheless, and its own from the next one on.
    made = database.value("worker", "select kakunin.make_partitions('2 months')")
    assert len(made) >= 2
    move("8 months")
    with database.connect("gateway") as session, refused("KA002"):
        session.execute("select kakunin.bind_serial(%s)", [agent.serial])
    result_id = newest(database)
    database.run("registrar", "select kakunin.create_agent('later')")
    later = set(database.run("postgres", place, [result_id + 1]))
    assert len(later) == 1
    assert later != {("kakunin_private.ledger_default",)}


# Archiving ------------------------------------------------------------------------------------------


def test_a_partition_is_archived_once_its_time_has_passed_and_it_was_exported(
    movable: tuple[Database, Callable[[str], None]],
) -> None:
    database, move = movable
    agent = database.agent(lifetime=dt.timedelta(days=300))
    partition = "ledger_" + dt.datetime.now(dt.timezone.utc).strftime("%Y%m")
    archive = "select kakunin.archive_partition(%s)"
    key = database.ledger_key()
    for missing in ("ledger_200001", "ledger", "ledger_default", "partitions", None):
        with refused("KA010", match="no partition"):
            database.run("operator", archive, [missing])
    with refused("KA006", match="its time has not passed"):
        database.run("operator", archive, [partition])
    count = len(entries(database))
    move("2 months")
    with refused("KA006", match=f"{count} of its entries are not covered"):
        database.run("operator", archive, [partition])
    size, root = database.seal_and_sign(key)
    assert size == count
    with refused("KA006", match=f"{count} of its entries are not covered"):
        database.run("operator", archive, [partition])
    # A later part alone is no export of what came before it.
    database.run("auditor", "select kakunin.record_export(%s, %s, repeat('0', 64))", [size, size])
    with refused("KA006", match="are not covered"):
        database.run("operator", archive, [partition])
    leaves = "select index, leaf_hash, event_id, entry, archived from kakunin.ledger_leaves(0, 1000)"
    before = database.run("auditor", leaves)
    sha256 = "0" * 64
    database.run("auditor", "select kakunin.record_export(%s, 0, %s)", [size, sha256])
    with refused("42501"):
        database.run("worker", archive, [partition])
    assert database.value("operator", archive, [partition]) == count
    assert events(database, count)[-3:] == [
        ("ledger.exported", None, {"first_index": size, "tree_size": size, "sha256": sha256}),
        ("ledger.exported", None, {"first_index": 0, "tree_size": size, "sha256": sha256}),
        ("ledger.archived", None, {
            "partition": partition, "entries": count, "leaves": f"{{[0,{count})}}", "exported_size": size,
        }),
    ]  # fmt: skip
    with refused("KA010", match="no partition"):
        database.run("operator", archive, [partition])
    # It is a table of its own now, with what it had; the tree stays as it was.
    kept = database.run(
        "installer", f"select event_id, entry from kakunin_private.{partition} order by event_id"
    )
    assert [(event_id, entry) for _, _, event_id, entry, _ in before] == kept
    after = database.run("auditor", leaves)
    assert after == [(index, leaf, event_id, None, True) for index, leaf, event_id, _, _ in before]
    assert database.run("auditor", "select entry from kakunin.audit_log where event_id <= %s", [count]) == []
    with refused("KA010", match="no event 1"):
        database.run("auditor", "select kakunin.inclusion_proof(1)")
    later, _ = database.seal_and_sign(key)
    rows = database.run("auditor", "select leaf_hash, entry, archived from kakunin.ledger_leaves(%s)", [size])
    assert [archived for _, _, archived in rows] == [False] * (later - size)
    assert all(leaf == leaf_hash(entry) for leaf, entry, _ in rows)
    path = database.value("auditor", "select kakunin.consistency_proof(%s, %s)", [size, later])["path"]
    tree = Tree([leaf for _, leaf, _, _, _ in before] + [leaf for leaf, _, _ in rows])
    assert [bytes.fromhex(p) for p in path] == tree.consistency(size, later)
    assert tree.root(size) == root
    assert database.run("auditor", "select * from kakunin.stray_entries()") == []
    # Nobody changes the archived table either, until its owner moves or drops it.
    with refused("KA006"):
        database.run("installer", f"delete from kakunin_private.{partition}")
    database.run("installer", f"drop table kakunin_private.{partition}")
    append_to = database.agent()
    assert append_to
    assert agent


def test_an_export_names_a_signed_size_and_a_hash(filled: Database) -> None:
    size = filled.value("auditor", "select max(tree_size) from kakunin.tree_heads")
    record = "select kakunin.record_export(%s, %s, %s)"
    for parameters in (
        [size + 1, 0, None], [None, 0, None], [size, -1, None], [size, size + 1, None], [size, None, None],
        [size, 0, "0" * 63], [size, 0, "G" * 64], [size, 0, "0" * 64 + "\n"], [size, 0, ""],
    ):  # fmt: skip
        with refused("KA010"):
            filled.run("auditor", record, parameters)


@pytest.mark.parametrize(
    ("command", "details"),
    [(None, "{}"), ("", "{}"), ("Export", "{}"), ("a b", "{}"), ("x" * 21, "{}"), ("x\n", "{}"),
     ("x", '"' + "y" * 1999 + '"'), ("x", "[" * 65 + "]" * 65), ("x", "[" * 990 + "]" * 990)],
    ids=range(9),
)  # fmt: skip
def test_a_reading_is_recorded_by_name(filled: Database, command: str | None, details: str) -> None:
    with refused("KA010"):
        filled.run("auditor", "select kakunin.record_read(%s, %s)", [command, details])


def test_a_description_is_nested_no_deeper_than_whoever_reads_the_ledger_can_follow(filled: Database) -> None:
    query, agent_id = "select kakunin.describe_agent(%s, %s, %s)", filled.agent().agent_id
    accepted, deeper = ('{"permitted_venues":' + "[" * depth + "]" * depth + "}" for depth in (63, 64))
    filled.run("registrar", query, [agent_id, accepted, accepted])
    for metadata, scope in ((deeper, "{}"), ("{}", deeper)):
        with refused("KA010", match="nested at most 64 deep"):
            filled.run("registrar", query, [agent_id, metadata, scope])


# Sealing --------------------------------------------------------------------------------------------


def leaves_of(database: Database) -> list[tuple[int, bytes]]:
    """Event and hash of every leaf, in the tree's order, and that each batch is where it says."""
    rows = database.run(
        "postgres",
        "select first_index, tree_size, event_ids, leaf_hashes from kakunin_private.batches order by 1",
    )
    found: list[tuple[int, bytes]] = []
    for first, size, ids, listed in rows:
        assert first == len(found)
        assert size == first + len(ids)
        found += [(i, listed[n * 32 : n * 32 + 32]) for n, i in enumerate(ids)]
    return found


def check_sealed(database: Database) -> None:
    """Every entry is a leaf, once; chains are whole in leaf order; the newest root is the leaves'."""
    kept = dict(database.run("postgres", "select event_id, entry from kakunin_private.ledger"))
    leaves = leaves_of(database)
    assert len(leaves) == len(kept)
    assert {event_id for event_id, _ in leaves} == set(kept)
    assert all(leaf_hash(kept[event_id]) == digest for event_id, digest in leaves)
    check_chains([kept[event_id] for event_id, _ in leaves])
    root = "select root from kakunin_private.batches order by tree_size desc limit 1"
    assert database.value("postgres", root) == Tree([digest for _, digest in leaves]).root(len(leaves))
    assert database.run("auditor", "select * from kakunin.stray_entries()") == []
    assert database.run("auditor", "select * from kakunin.unsealed_entries()") == []


@pytest.fixture
def fresh(cluster: Cluster) -> Iterator[Database]:
    with fresh_database(cluster) as database:
        yield database


def test_sealing_takes_what_is_committed_and_says_so(fresh: Database) -> None:
    agent = fresh.agent()
    start = fresh.seal()
    assert fresh.value("worker", SEAL, [10]) == {"sealed": 0, "more": False, "tree_size": start}
    assert fresh.run("worker", "select * from kakunin.tree_head_to_sign()")[0][0] == start
    with acting(fresh, agent) as session:
        first = append(session)
        unsealed = "select event_id, agent_id, entry from kakunin.unsealed_entries()"
        assert fresh.run("auditor", unsealed) == []
        session.commit()
        [(event_id, agent_id, _)] = fresh.run("auditor", unsealed)
        assert (event_id, agent_id) == (first["event_id"], agent.agent_id)
        assert fresh.value("worker", SEAL, [10]) == {"sealed": 1, "more": False, "tree_size": start + 1}
        append(session)
        session.rollback()
        assert fresh.value("worker", SEAL, [10])["sealed"] == 0
    check_sealed(fresh)


@pytest.mark.parametrize("size", [None, 0, -1, 1000001])
def test_a_batch_has_limits(fresh: Database, size: int | None) -> None:
    with refused("KA010"):
        fresh.run("worker", SEAL, [size])


def test_batches_are_no_larger_than_asked(fresh: Database) -> None:
    with fresh.connect("postgres") as admin:
        add_entries(admin, 25)
    total = newest(fresh)
    done = 0
    while True:
        answer = fresh.value("worker", SEAL, [10])
        done += answer["sealed"]
        assert answer["sealed"] <= 10
        assert (answer["more"], answer["tree_size"]) == (answer["sealed"] == 10, done)
        if not answer["more"]:
            break
        # What comes in between is for the next time.
        assert len(fresh.run("auditor", "select event_id from kakunin.unsealed_entries()")) == total - done
        if done == 10:
            fresh.agent()
            total += 2
    assert fresh.seal() == total
    assert [
        len(ids) for (ids,) in fresh.run("postgres", "select event_ids from kakunin_private.batches")
    ] == [10, 10, total - 20 - 2, 2]


def test_a_long_transaction_of_somebody_else_delays_nothing(fresh: Database) -> None:
    agent, other = fresh.agent(), fresh.agent()
    with acting(fresh, agent) as long, acting(fresh, other, "agent_2") as short, fresh.connect("app") as app:
        app.execute("create table mine (a int)")  # a transaction without entries, too
        early = append(long)
        later = append(short)
        short.commit()
        size = fresh.seal()
        assert later["event_id"] in dict(leaves_of(fresh))
        assert early["event_id"] not in dict(leaves_of(fresh))
        append(short)
        short.commit()
        assert fresh.seal() == size + 1
        append(long)
        long.commit()
        assert fresh.seal() == size + 3
    check_sealed(fresh)


def test_prepared_transactions_are_sealed_when_they_are_committed(fresh: Database) -> None:
    agent = fresh.agent()
    gid = fresh.name
    ticket = fresh.ticket(agent, "agent_1")
    with fresh.connect("agent_1") as session:
        for number in range(3):
            session.execute("select kakunin.bind_session(%s)", [ticket])
            append(session)
            session.execute(f"prepare transaction '{gid}_{number}'")
            session.commit()
    size = fresh.seal()
    with fresh.connect("agent_1", autocommit=True) as session:
        session.execute(f"commit prepared '{gid}_2'")
        session.execute(f"rollback prepared '{gid}_1'")
        assert fresh.seal() == size + 1
        session.execute(f"commit prepared '{gid}_0'")
    assert fresh.seal() == size + 2
    check_sealed(fresh)


def test_sealing_beside_what_one_has_appended_oneself(fresh: Database) -> None:
    """The owner may do both in one transaction."""
    fresh.seal()
    with fresh.connect("installer") as owner:
        owner.execute("select kakunin.create_agent('one')")
        assert one(owner, SEAL, [100])["sealed"] == 0
        with owner.transaction():
            owner.execute("select kakunin.create_agent('two')")
            assert one(owner, SEAL, [100])["sealed"] == 0
        other = fresh.agent()
        assert one(owner, SEAL, [100])["sealed"] == 2
        owner.execute("select kakunin.suspend_agent(%s, 'three')", [other.agent_id])
        owner.commit()
    fresh.seal()
    check_sealed(fresh)


def test_sealing_is_for_transactions_that_see_what_is_committed(fresh: Database) -> None:
    for level in ("repeatable read", "serializable"):
        with fresh.connect("worker") as worker, refused("KA010", match="READ COMMITTED"):
            worker.execute(f"set transaction isolation level {level}")
            worker.execute(SEAL, [1])


def test_two_sealers_at_once_make_one_tree(fresh: Database) -> None:
    with fresh.connect("postgres") as admin:
        add_entries(admin, 300)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fresh.seal, [7, 11, 100, 1]))
    leaves = leaves_of(fresh)
    assert sorted(event_id for event_id, _ in leaves) == list(range(1, newest(fresh) + 1))
    # One that is rolled back leaves nothing, and the other goes on.
    fresh.agent()
    with fresh.connect("worker") as worker:
        worker.execute(SEAL, [100])
        worker.rollback()
    assert fresh.seal() == len(leaves) + 2


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_commits_is_in_the_tree_exactly_once(fresh: Database, seed: int) -> None:
    """Writers that roll back, keep transactions open and prepare them, against two sealers."""
    agents = [fresh.agent(f"agent {n}") for n in range(3)]
    for agent in agents[1:]:
        agent.database = fresh
    fresh.run("app", "create table audited (id int, permitted_agent_serial text)")
    fresh.run("app", PROTECT, ["audited"])
    stop = threading.Event()
    kept: list[int] = []

    def write(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        agent = agents[number % len(agents)]
        tickets = fresh.ticket(agent, "agent_1")
        with contextlib.ExitStack() as stack:
            # Three at a time, whose ends are in any order.
            sessions = [stack.enter_context(fresh.connect("agent_1")) for _ in range(3)]
            mine: list[list[int]] = [[] for _ in sessions]
            for step in range(60):
                at = rng.randrange(len(sessions))
                session = sessions[at]
                if session.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
                    session.execute("select kakunin.bind_session(%s)", [tickets])
                choice = rng.random()
                if choice < 0.5:
                    mine[at] += [append(session)["event_id"] for _ in range(rng.randint(1, 4))]
                elif choice < 0.6:
                    with contextlib.suppress(ZeroDivisionError), session.transaction():
                        append(session, "undone")
                        raise ZeroDivisionError
                elif choice < 0.65:
                    with session.transaction():
                        mine[at].append(append(session)["event_id"])
                elif choice < 0.75:
                    session.rollback()
                    mine[at] = []
                elif choice < 0.85:
                    name = f"{fresh.name}_{number}_{step}"
                    session.execute(f"prepare transaction '{name}'")
                    session.commit()
                    if rng.random() < 0.7:
                        fresh.run("agent_1", f"commit prepared '{name}'")
                        kept.extend(mine[at])
                    else:
                        fresh.run("agent_1", f"rollback prepared '{name}'")
                    mine[at] = []
                else:
                    session.commit()
                    kept.extend(mine[at])
                    mine[at] = []
            for session in sessions:
                session.rollback()

    def decide() -> None:
        for number in range(25):
            fresh.run("app", "insert into audited values (%s)", [number])
            fresh.run("operator", "select kakunin.rotate_session_key()")

    def seal(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        with fresh.connect("worker", autocommit=True) as worker:
            while not stop.is_set():
                worker.execute(SEAL, [rng.choice([1, 3, 20, 100000])])

    with ThreadPoolExecutor(8) as pool:
        sealers = [pool.submit(seal, number) for number in range(2)]
        writers = [pool.submit(write, number) for number in range(4)] + [pool.submit(decide)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        for sealer in sealers:
            sealer.result()
    fresh.seal()
    check_sealed(fresh)
    ids = {event_id for event_id, _ in leaves_of(fresh)}
    assert len(kept) > 100
    assert set(kept) <= ids
    undone = "select count(*) from kakunin.audit_log where event_type = 'undone'"
    assert fresh.value("auditor", undone) == 0
    appended = "select event_id from kakunin.audit_log where event_type = 'api_call'"
    assert {event_id for (event_id,) in fresh.run("auditor", appended)} == set(kept)
    assert fresh.value("postgres", "select count(*) from kakunin_private.batches") > 20


# Tree heads -----------------------------------------------------------------------------------------


def to_sign(database: Database) -> tuple[int, int, bytes]:
    database.agent()
    database.seal()
    return database.run("worker", 'select tree_size, "timestamp", root from kakunin.tree_head_to_sign()')[0]


def test_a_signed_head_is_stored_as_it_was_signed(fresh: Database) -> None:
    key = fresh.ledger_key()
    size, timestamp, root = to_sign(fresh)
    assert abs(timestamp - dt.datetime.now(dt.timezone.utc).timestamp() * 1000) < 60_000
    key.publish(size, timestamp, root)
    columns = 'tree_size, "timestamp", root, key_id, signature, published_by'
    expected = (size, timestamp, root, key.key_id, key.sign(size, timestamp, root), "worker")
    for login in ("agent_1", "gateway", "registrar", "operator", "worker", "auditor"):
        assert fresh.run(login, f"select {columns} from kakunin.tree_heads") == [expected]
    assert fresh.run("worker", "select * from kakunin.tree_head_to_sign()") == []
    # What anybody verifies it with.
    head = b"\0\1" + timestamp.to_bytes(8, "big") + size.to_bytes(8, "big") + root
    certificate = x509.load_der_x509_certificate(key.der)
    certificate.public_key().verify(expected[4], head, padding.PKCS1v15(), hashes.SHA256())
    assert root == Tree([digest for _, digest in leaves_of(fresh)]).root(size)


def test_the_newest_batch_is_to_be_signed_and_covers_those_before_it(fresh: Database) -> None:
    key = fresh.ledger_key()
    for _ in range(3):
        size, timestamp, root = to_sign(fresh)
    oldest = "select min(recorded_at) from kakunin_private.ledger"
    since = fresh.value("worker", "select since from kakunin.tree_head_to_sign()")
    assert since == fresh.value("postgres", oldest)
    key.publish(size, timestamp, root)
    fresh.agent()
    fresh.seal()
    again, after, _, since = fresh.run("worker", "select * from kakunin.tree_head_to_sign()")[0]
    assert again == size + 2
    assert after > timestamp
    [(expected,)] = fresh.run(
        "postgres",
        "select min(recorded_at) from kakunin_private.ledger where event_id > %s",
        [newest(fresh) - 2],
    )
    assert since == expected


def test_a_head_that_is_not_of_this_tree_is_refused(fresh: Database) -> None:
    key, second = fresh.ledger_key(), fresh.ledger_key()
    first, at, first_root = to_sign(fresh)
    key.publish(first, at, first_root)
    between, _, between_root = to_sign(fresh)
    size, timestamp, root = to_sign(fresh)
    good = key.sign(size, timestamp, root)
    now = timestamp

    def attempt(size: int | None, timestamp: int | None, key_id: str | None, signature: bytes | None) -> None:
        with refused("KA010"):
            fresh.run("worker", PUBLISH, [size, timestamp, key_id, signature])

    bad: list[tuple[Any, ...]] = [
        (None, timestamp, key.key_id, good),
        (size, None, key.key_id, good),
        (size, timestamp, None, good),
        (size, timestamp, key.key_id, None),
        (size, timestamp, key.key_id, b""),
        (size, timestamp, key.key_id, bytes(256)),
        (size, timestamp, key.key_id, good[:-1]),
        (size, timestamp, key.key_id, b"\0" + good),
        (size, timestamp, key.key_id, bytes([good[0], good[1] ^ 1]) + good[2:]),
        # Another key's, by its own name and by the other's; another root, size, version, timestamp.
        (size, timestamp, key.key_id, second.sign(size, timestamp, root)),
        (size, timestamp, second.key_id, good),
        (size, timestamp, key.key_id, key.sign(size, timestamp, first_root)),
        (size, timestamp, key.key_id, key.sign(size + 1, timestamp, root)),
        (size, timestamp + 1, key.key_id, good),
        (size, timestamp, key.key_id, key.signer.sign(hashlib.sha256(root).digest())),
        (size, timestamp, _ca().key_id, _ca().signer.sign(hashlib.sha256(b"x").digest())),
        # A size that no batch ended at, a size of before, a time of before and one far from now.
        (size + 1, timestamp, key.key_id, key.sign(size + 1, timestamp, root)),
        (size - 1, timestamp, key.key_id, key.sign(size - 1, timestamp, root)),
        (0, timestamp, key.key_id, key.sign(0, timestamp, hashlib.sha256(b"").digest())),
        (-1, timestamp, key.key_id, good),
        (first, timestamp, key.key_id, key.sign(first, timestamp, first_root)),
        (size, at, key.key_id, key.sign(size, at, root)),
        (size, at - 1, key.key_id, key.sign(size, at - 1, root)),
        (size, 0, key.key_id, key.sign(size, 0, root)),
        (size, now + 600_000, key.key_id, key.sign(size, now + 600_000, root)),
        (size, now - 600_000, key.key_id, key.sign(size, now - 600_000, root)),
        (size, 2**63 - 1, key.key_id, key.sign(size, 2**63 - 1, root)),
    ]
    for arguments in bad:
        attempt(*arguments)
    assert fresh.run("worker", "select tree_size from kakunin.tree_heads") == [(first,)]
    key.publish(size, timestamp, root)
    # Skipped, it is not signed any more.
    attempt(between, timestamp + 1, key.key_id, key.sign(between, timestamp + 1, between_root))
    attempt(size, timestamp + 1, key.key_id, key.sign(size, timestamp + 1, root))
    with fresh.connect("worker") as worker, refused("KA010", match="READ COMMITTED"):
        worker.execute("set transaction isolation level repeatable read")
        worker.execute(PUBLISH, [size, timestamp, key.key_id, good])


def test_a_revoked_key_signs_no_more_and_is_on_the_list(fresh: Database) -> None:
    key, second = fresh.ledger_key(), fresh.ledger_key()
    size, timestamp, root = to_sign(fresh)
    revoke = "select kakunin.revoke_ledger_key(%s, %s)"
    at = fresh.value("operator", revoke, [key.key_id, "superseded"])
    assert fresh.value("operator", revoke, [key.key_id, "keyCompromise"]) == at
    with refused("KA010", match="was revoked"):
        key.publish(size, timestamp, root)
    second.publish(size, timestamp, root)
    certificate = x509.load_der_x509_certificate(key.der)
    serial = fresh.value("operator", "select serial from kakunin.ledger_keys where key_id = %s", [key.key_id])
    assert int(serial.replace(":", ""), 16) == certificate.serial_number
    rows = fresh.run("operator", "select * from kakunin.revocations(%s)", [_ca().key_id])
    assert (serial, at, "superseded") in rows
    assert fresh.run("operator", "select key_id from kakunin.crls_due()") == [(_ca().key_id,)]
    crl = _ca().revocation_list([Revocation(*row) for row in rows], 1)
    fresh.run("registrar", "select kakunin.publish_crl(%s)", [crl.public_bytes(serialization.Encoding.DER)])
    assert fresh.run("operator", "select key_id from kakunin.crls_due()") == []
    for parameters in (
        [key.key_id, "removeFromCRL"],
        [key.key_id, None],
        ["00:00", "superseded"],
        [None, "superseded"],
    ):
        with refused("KA010"):
            fresh.run("operator", revoke, parameters)


def test_an_expired_key_signs_no_more(movable: tuple[Database, Callable[[str], None]]) -> None:
    database, move = movable
    key = database.ledger_key(lifetime=dt.timedelta(days=1))
    size, timestamp, root = to_sign(database)
    move("2 days")
    later = timestamp + 2 * 86400 * 1000
    with refused("KA010", match="expired"):
        key.publish(size, later, root)
    move("0")
    key.publish(size, timestamp, root)


def test_a_key_is_good_for_one_installation(fresh: Database) -> None:
    key = fresh.ledger_key()
    fresh.run("installer", "select kakunin.renew_installation()")
    size, timestamp, root = to_sign(fresh)
    with refused("KA010", match="not one of this ledger's"):
        key.publish(size, timestamp, root)
    fresh.ledger_key().publish(size, timestamp, root)


@pytest.mark.parametrize(
    ("reason", "good"), [("cACompromise", False), ("keyCompromise", False), ("superseded", True)]
)
def test_a_key_is_as_good_as_its_authority(fresh: Database, reason: str, good: bool) -> None:
    key = fresh.ledger_key()
    size, timestamp, root = to_sign(fresh)
    fresh.run("operator", "select kakunin.distrust_ca(%s, %s)", [_ca().key_id, reason])
    if good:
        key.publish(size, timestamp, root)
    else:
        with refused("KA010"):
            key.publish(size, timestamp, root)
    with refused("KA010", match="not trusted"):
        fresh.ledger_key()


# Ledger keys ----------------------------------------------------------------------------------------


def forged(
    database: Database, *, number: int = 5, names: list[x509.GeneralName] | None = None
) -> Certificate:
    """A certificate for a ledger key as the test's authority issues them, to be made a bad one."""
    issuer = ForgedAuthority(
        _ca().signer._key, _ca().certificate.subject, bytes.fromhex(_ca().key_id.replace(":", ""))
    )
    public_key = rsa_key(number).public_key()
    urn = x509.UniformResourceIdentifier(f"urn:kakunin:ledger:{database.installation_id}")
    extensions: dict[str, Any] = {
        BASIC: (x509.BasicConstraints(False, None), True),
        USAGE: (usage("digital_signature"), True),
        SUBJECT_ID: (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
        AUTHORITY_ID: (x509.AuthorityKeyIdentifier(issuer.key_id, None, None), False),
        ALTERNATIVE: (x509.SubjectAlternativeName([urn] if names is None else names), False),
    }
    return Certificate(issuer, public_key, name("ledger"), extensions, not_before=NOW)


REGISTER = "select kakunin.register_ledger_key(%s)"
AUTHORITY_ID = "2.5.29.35"
NOW = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) - dt.timedelta(minutes=1)


def test_a_certificate_for_this_ledger_is_registered(fresh: Database) -> None:
    der = forged(fresh).der
    key_id = fresh.value("operator", REGISTER, [der])
    rows = fresh.run(
        "agent_1", "select key_id, installation_id, issuer_key_id, revoked_at, der from kakunin.ledger_keys"
    )
    assert rows == [(key_id, fresh.installation_id, _ca().key_id, None, der)]
    for again in (der, forged(fresh).der):  # the same, and another certificate for the same key
        with refused("KA010", match="registered already"):
            fresh.run("operator", REGISTER, [again])


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def test_a_certificate_for_anything_else_is_refused(fresh: Database) -> None:
    ours = f"urn:kakunin:ledger:{fresh.installation_id}"
    agent = fresh.agent()
    impostor = CertificateAuthority.create(LocalSigner.generate(), "Test CA")
    bad: dict[str, bytes] = {
        "an agent's": agent.issued.der,
        "an authority's": _ca().der,
        "of another installation": forged(fresh, names=[uri(f"urn:kakunin:ledger:{uuid.uuid4()}")]).der,
        "of an agent": forged(fresh, names=[uri(f"urn:kakunin:agent:{agent.agent_id}")]).der,
        "upper case": forged(fresh, names=[uri(ours.upper())]).der,
        "longer": forged(fresh, names=[uri(ours + "x")]).der,
        "dns": forged(fresh, names=[x509.DNSName(ours)]).der,
        "one more name": forged(fresh, names=[uri(ours), x509.DNSName("example.com")]).der,
        "twice": forged(fresh, names=[uri(ours), uri(ours)]).der,
        "no name": forged(fresh).put(ALTERNATIVE, None).der,
        "self-signed": CertificateAuthority.create(LocalSigner.generate(), "self").der,
        "of an authority unknown here": impostor.issue_ledger_key(
            fresh.installation_id, LocalSigner.generate().public_key()
        ).public_bytes(serialization.Encoding.DER),
        "cA": forged(fresh).put(BASIC, x509.BasicConstraints(True, None), True).der,
        "no usage": forged(fresh).put(USAGE, None).der,
        "signs certificates": forged(fresh).put(USAGE, usage("digital_signature", "key_cert_sign"), True).der,
        "signs lists": forged(fresh).put(USAGE, usage("digital_signature", "crl_sign"), True).der,
        "does not sign": forged(fresh).put(USAGE, usage("key_encipherment"), True).der,
        "unknown critical": forged(fresh).put("1.2.3.4", b"\x05\x00", True).der,
        "no key id": forged(fresh).put(SUBJECT_ID, None).der,
        "expired": forged(fresh).changed(not_before=NOW, not_after=NOW + dt.timedelta(seconds=1)).der,
        "not yet": forged(fresh).changed(not_before=NOW + dt.timedelta(days=1)).der,
        "small": forged(fresh).changed(public_key=rsa_key(6, bits=1024).public_key()).der,
        "an agent's key": _ca().issue_ledger_key(
            fresh.installation_id, agent.signer.public_key()
        ).public_bytes(serialization.Encoding.DER),
        "the authority's key": forged(fresh).changed(public_key=_ca().signer.public_key()).der,
        "nothing": b"",
        "no DER": b"x" * 100,
        "truncated": forged(fresh).der[:-1],
    }  # fmt: skip
    for what, der in bad.items():
        with pytest.raises(psycopg.Error) as caught:
            fresh.run("operator", REGISTER, [der])
        assert caught.value.sqlstate == "KA010", (what, caught.value)
    with refused("KA010"):
        fresh.run("operator", REGISTER, [None])
    assert fresh.run("operator", "select * from kakunin.ledger_keys") == []


def test_the_ledgers_key_is_nobody_elses(fresh: Database) -> None:
    key = fresh.ledger_key()
    agent_id = fresh.value("registrar", "select kakunin.create_agent('thief')")
    issued = _ca().issue(agent_id, key.signer.public_key())
    with refused("KA010", match="its key is an authority's, or the ledger's"):
        fresh.run("registrar", "select kakunin.register_certificate(%s)", [issued.der])
    root = CertificateAuthority.create(key.signer, "another")
    below = CertificateAuthority.create(key.signer, "below", issuer=_ca()) if _ca_has_room() else root
    for authority in (root, below):
        with refused("KA010"):
            fresh.run("operator", "select kakunin.trust_ca(%s)", [authority.der])


def _ca_has_room() -> bool:
    constraints = _ca().certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    return constraints.path_length != 0


# Proofs ---------------------------------------------------------------------------------------------


class Tree:
    """RFC 6962 section 2.1 word for word; subtrees are remembered."""

    def __init__(self, leaves: list[bytes]) -> None:
        self.leaves = leaves
        self.known: dict[tuple[int, int], bytes] = {}

    @staticmethod
    def split(count: int) -> int:
        return 1 << (count - 1).bit_length() - 1

    def hash(self, first: int, end: int) -> bytes:
        if end - first == 0:
            return hashlib.sha256(b"").digest()
        if end - first == 1:
            return self.leaves[first]
        if (first, end) not in self.known:
            middle = first + self.split(end - first)
            both = self.hash(first, middle) + self.hash(middle, end)
            self.known[first, end] = hashlib.sha256(b"\1" + both).digest()
        return self.known[first, end]

    def root(self, size: int) -> bytes:
        return self.hash(0, size)

    def path(self, index: int, first: int, end: int) -> list[bytes]:
        if end - first == 1:
            return []
        middle = first + self.split(end - first)
        if index < middle:
            return [*self.path(index, first, middle), self.hash(middle, end)]
        return [*self.path(index, middle, end), self.hash(first, middle)]

    def inclusion(self, index: int, size: int) -> list[bytes]:
        return self.path(index, 0, size)

    def subproof(self, size: int, first: int, end: int, whole: bool) -> list[bytes]:
        if size == end:
            return [] if whole else [self.hash(first, end)]
        middle = first + self.split(end - first)
        if size <= middle:
            return [*self.subproof(size, first, middle, whole), self.hash(middle, end)]
        return [*self.subproof(size, middle, end, False), self.hash(first, middle)]

    def consistency(self, size: int, end: int) -> list[bytes]:
        return self.subproof(size, 0, end, True)

    def frontier(self, size: int) -> list[bytes]:
        edge, first = [], 0
        for level in reversed(range(size.bit_length())):
            if size >> level & 1:
                edge.append(self.hash(first, first + (1 << level)))
                first += 1 << level
        return edge


def fake_heads(database: Database, key: LedgerKey) -> None:
    """A head for every batch, without the cost of its signature."""
    database.run(
        "postgres",
        'insert into kakunin_private.tree_heads (tree_size, "timestamp", root, key_id, signature,'
        " published_at, published_by) select tree_size, tree_size, root, %s, 'x', now(), 'postgres'"
        " from kakunin_private.batches",
        [key.key_id],
    )


def check_proofs(
    auditor: Connection, tree: Tree, ids: list[int], rng: random.Random, sizes: list[int], many: int
) -> None:
    for _ in range(many):
        size = rng.choice(sizes)
        index = rng.choice([0, size - 1, rng.randrange(size)])
        proof = one(auditor, "select kakunin.inclusion_proof(%s, %s)", [ids[index], size])
        assert (proof["index"], proof["tree_size"]) == (index, size)
        assert [bytes.fromhex(p) for p in proof["path"]] == tree.inclusion(index, size), (index, size)
        assert leaf_hash(proof["entry"]) == tree.leaves[index]
        first, second = sorted((rng.choice(sizes), rng.choice(sizes)))
        proof = one(auditor, "select kakunin.consistency_proof(%s, %s)", [first, second])
        assert (proof["first_size"], proof["second_size"]) == (first, second)
        assert [bytes.fromhex(p) for p in proof["path"]] == tree.consistency(first, second), (first, second)


def test_roots_and_proofs_of_trees_of_1_to_600_leaves(fresh: Database) -> None:
    key = fresh.ledger_key()
    with fresh.connect("postgres") as admin:
        add_entries(admin, 600 - newest(fresh))
        admin.commit()
        admin.execute("do $$ begin for i in 1..601 loop perform kakunin.seal_ledger(1); end loop; end $$")
        admin.commit()
    fake_heads(fresh, key)
    leaves = leaves_of(fresh)
    ids, tree = [i for i, _ in leaves], Tree([digest for _, digest in leaves])
    entries_ = dict(fresh.run("postgres", "select event_id, entry from kakunin_private.ledger"))
    assert [leaf_hash(entries_[i]) for i in ids] == tree.leaves
    roots = fresh.run("postgres", "select tree_size, root from kakunin_private.batches order by 1")
    assert roots == [(size, tree.root(size)) for size in range(1, 601)]
    rng = random.Random(6962)
    with fresh.connect("auditor", autocommit=True) as auditor:
        for size in range(1, 601):
            assert one(auditor, "select kakunin.frontier(%s)", [size]) == tree.frontier(size)
        check_proofs(auditor, tree, ids, rng, list(range(1, 601)), 600)
        for size in (255, 256, 257, 511, 512, 513, 600):  # every leaf at the edges of what is kept
            check_proofs(auditor, tree, ids, rng, [size], 20)
        # By default the first signed tree that an entry is in.
        for index in (0, 254, 255, 599):
            assert one(auditor, "select kakunin.inclusion_proof(%s)", [ids[index]])["tree_size"] == index + 1
        for query, parameters in (
            ("inclusion_proof(%s, %s)", [ids[9], 9]),
            ("inclusion_proof(%s, %s)", [ids[9], 601]),
            ("inclusion_proof(%s, %s)", [ids[9], 0]),
            ("inclusion_proof(%s, %s)", [10**9, 600]),
            ("inclusion_proof(%s, %s)", [None, 600]),
            ("consistency_proof(%s, %s)", [20, 10]),
            ("consistency_proof(%s, %s)", [0, 10]),
            ("consistency_proof(%s, %s)", [10, 601]),
            ("consistency_proof(%s, %s)", [None, 10]),
            ("consistency_proof(%s, %s)", [10, None]),
            ("frontier(%s)", [0]),
            ("frontier(%s)", [601]),
            ("frontier(%s)", [None]),
        ):
            with refused("KA010"):
                auditor.execute(f"select kakunin.{query}", parameters)
    nodes = fresh.run("postgres", "select level, index, hash from kakunin_private.tree_nodes order by 1, 2")
    assert nodes == [(8, i, tree.hash(i * 256, i * 256 + 256)) for i in range(2)]


def test_roots_and_proofs_of_a_tree_of_70000_leaves(fresh: Database) -> None:
    key = fresh.ledger_key()
    rng = random.Random(70000)
    with fresh.connect("postgres") as admin:
        add_entries(admin, 70_000)
    with fresh.connect("worker", autocommit=True) as worker:
        more = True
        while more:
            more = one(worker, SEAL, [rng.choice([1, 255, 256, 257, 4096, 30_000])])["more"]
    fake_heads(fresh, key)
    leaves = leaves_of(fresh)
    assert len(leaves) > 70_000
    ids, tree = [i for i, _ in leaves], Tree([digest for _, digest in leaves])
    roots = fresh.run("postgres", "select tree_size, root from kakunin_private.batches order by 1")
    assert roots == [(size, tree.root(size)) for size, _ in roots]
    sizes = [size for size, _ in roots]
    with fresh.connect("auditor", autocommit=True) as auditor:
        check_proofs(auditor, tree, ids, rng, sizes, 60)
        check_proofs(auditor, tree, ids, rng, sizes[-2:], 20)
        for size in sizes:
            assert one(auditor, "select kakunin.frontier(%s)", [size]) == tree.frontier(size)
        first = len(leaves) - 1500
        page = auditor.execute(
            "select index, leaf_hash, event_id, archived from kakunin.ledger_leaves(%s)", [first]
        ).fetchall()
        assert page == [(first + n, tree.leaves[first + n], ids[first + n], False) for n in range(1000)]
        assert auditor.execute("select * from kakunin.ledger_leaves(%s)", [len(leaves)]).fetchall() == []
    nodes = fresh.run("postgres", "select level, index, hash from kakunin_private.tree_nodes order by 1, 2")
    assert [(level, index) for level, index, _ in nodes] == [(8, i) for i in range(len(leaves) // 256)] + [
        (16, 0)
    ]
    assert all(digest == tree.hash(i << level, i + 1 << level) for level, i, digest in nodes)


def test_an_agent_proves_its_own_entries(fresh: Database) -> None:
    key = fresh.ledger_key()
    agent = fresh.agent()
    prove = "select kakunin.inclusion_proof(%s)"
    with acting(fresh, agent) as session:
        mine = append(session)["event_id"]
        session.commit()
        with refused("KA010", match="not covered"):
            session.execute(prove, [mine])
        session.rollback()
        size, root = fresh.seal_and_sign(key)
        proof = one(session, prove, [mine])
        assert json.loads(proof["entry"])["event_id"] == mine
        tree = Tree([digest for _, digest in leaves_of(fresh)])
        assert [bytes.fromhex(p) for p in proof["path"]] == tree.inclusion(proof["index"], size)
        assert tree.root(size) == root


# Copies ---------------------------------------------------------------------------------------------


def test_a_copy_with_an_identity_of_its_own_goes_on(fresh: Database, cluster: Cluster) -> None:
    key = fresh.ledger_key()
    agent = fresh.agent()
    before, root = fresh.seal_and_sign(key)
    fresh.agent()  # not sealed when it is copied
    unsealed = len(entries(fresh)) - before
    with fresh_database(cluster, fresh.name) as copy:
        # Whoever was an agent there is one here, for assertions that name this copy.
        agent.database = copy
        renewed = copy.value("installer", "select kakunin.renew_installation()")
        assert renewed != fresh.installation_id
        # What was not sealed is, and what renewing recorded comes next.
        assert copy.value("postgres", "select tree_size from kakunin_private.tree") >= before + unsealed
        with refused("KA010"):
            copy.run("worker", PUBLISH, [before + unsealed, 1, key.key_id, b"x"])
        with acting(copy, agent) as session:
            append(session)
            session.commit()
        size, again = copy.seal_and_sign(copy.ledger_key())
        check_sealed(copy)
        tree = Tree([digest for _, digest in leaves_of(copy)])
        assert (tree.root(before), tree.root(size)) == (root, again)
    assert fresh.seal() == before + unsealed
    check_sealed(fresh)


def test_a_copy_whose_transactions_are_behind_is_noticed(fresh: Database) -> None:
    """As a dump restored on a younger server has it: what was sealed there lies in this one's future."""
    before = fresh.seal(3)
    fresh.run(
        "postgres",
        "update kakunin_private.tree set sealed = format('%s:%s:', x, x)::pg_snapshot"
        " from (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 1000000 as x) f",
    )
    fresh.agent()
    for _ in range(2):
        with refused("KA007", match="this is a copy"):
            fresh.run("worker", SEAL, [100])
    fresh.run("installer", "select kakunin.renew_installation()")
    fresh.agent()
    assert fresh.seal() == len(entries(fresh)) > before
    check_sealed(fresh)


def test_a_restored_copy_of_rows_from_the_future_goes_on(fresh: Database) -> None:
    """The rows' own transactions lie ahead as well, sealed and not."""
    future = "(pg_current_xact_id()::text::bigint + 1000000)::text::xid8"
    fresh.run(
        "postgres",
        "insert into kakunin_private.ledger (event_id, recorded_at, xid, entry)"
        f" select nextval('kakunin_private.event_ids'), clock_timestamp(), {future}, 'entry ' || i"
        "  from generate_series(1, 5) i",
    )
    fresh.run("installer", "select kakunin.renew_installation()")
    fresh.agent()
    fresh.seal()
    leaves = [event_id for event_id, _ in leaves_of(fresh)]
    kept = [event_id for (event_id,) in fresh.run("postgres", "select event_id from kakunin_private.ledger")]
    assert sorted(leaves) == sorted(kept)
    assert fresh.run("auditor", "select * from kakunin.unsealed_entries()") == []
    assert fresh.run("auditor", "select * from kakunin.stray_entries()") == []


def test_renewing_loses_no_entry_of_those_who_append_meanwhile(fresh: Database) -> None:
    """One waits for the renewal with its id drawn; another, which the renewal waits for, draws the next."""
    agent, other = fresh.agent(), fresh.agent()
    waiting = "select count(*) from pg_stat_activity where datname = %s and wait_event_type = 'Lock'"

    def until(count: int) -> None:
        while fresh.value("postgres", waiting, [fresh.name]) < count and not done.is_set():
            pass

    done = threading.Event()
    with (
        acting(fresh, agent) as first,
        acting(fresh, other, "agent_2") as second,
        ThreadPoolExecutor(2) as pool,
    ):
        append(second)
        renewal = pool.submit(fresh.run, "installer", "select kakunin.renew_installation()")
        until(1)

        def late() -> None:
            append(first)
            first.commit()
            done.set()

        appending = pool.submit(late)
        until(2)
        append(second)
        second.commit()
        renewal.result(60)
        appending.result(60)
    fresh.seal()
    check_sealed(fresh)


# Strays, chains, status -----------------------------------------------------------------------------


def test_an_entry_slipped_in_around_the_kit_is_a_stray(fresh: Database) -> None:
    fresh.seal()
    fresh.run(
        "postgres",
        "insert into kakunin_private.ledger (event_id, recorded_at, xid, entry)"
        " values (-1, now(), '3', 'forged')",
    )
    assert fresh.run("auditor", "select event_id, entry from kakunin.stray_entries()") == [(-1, "forged")]
    assert fresh.seal() == len(leaves_of(fresh))
    assert fresh.run("auditor", "select * from kakunin.unsealed_entries()") == []


def test_the_auditor_sees_where_chains_stand(fresh: Database) -> None:
    agent = fresh.agent()
    with acting(fresh, agent) as session:
        result = append(session)
        session.commit()
    chains = {chain: rest for chain, *rest in fresh.run("auditor", "select * from kakunin.chains")}
    assert chains[result["chain"]] == [agent.agent_id, 1, bytes.fromhex(result["hash"])]
    rows = [
        row for (row,) in fresh.run("postgres", "select entry from kakunin_private.ledger order by event_id")
    ]
    heads = {json.loads(row)["chain"]: (json.loads(row)["sequence"], leaf_hash(row)) for row in rows}
    assert {chain: (sequence, head) for chain, (_, sequence, head) in chains.items()} == heads
    assert {a for a, _, _ in chains.values()} == {None, agent.agent_id}


def test_the_status_says_how_far_it_is(movable: tuple[Database, Callable[[str], None]]) -> None:
    database, move = movable
    key = database.ledger_key()

    def status(login: str = "operator") -> dict[str, Any]:
        return database.value(login, "select kakunin.ledger_status()")

    total = len(entries(database))
    now = status()
    assert (now["tree_size"], now["signed_size"], now["lag_entries"]) == (0, 0, total)
    assert (now["leader"], now["leader_since"], now["last_signed_at"], now["exported_size"]) == (
        None,
        None,
        None,
        0,
    )
    move("100 seconds")
    assert status()["lag_seconds"] >= 100
    database.seal()
    now = status("worker")
    assert (now["tree_size"], now["signed_size"], now["lag_entries"]) == (total, 0, total)
    assert now["lag_seconds"] >= 100
    database.seal_and_sign(key)
    now = status("auditor")
    assert (now["tree_size"], now["signed_size"], now["lag_entries"], now["lag_seconds"]) == (
        total,
        total,
        0,
        0,
    )
    assert now["last_signed_at"]
    database.agent()
    assert status()["lag_entries"] == 2
    database.run("auditor", "select kakunin.record_export(%s, 0, repeat('0', 64))", [total])
    now = status()
    assert (now["exported_size"], now["lag_entries"], now["in_default_partition"]) == (total, 3, False)
    month = months(dt.datetime.now(dt.timezone.utc), 5)[-1]
    assert dt.datetime.fromisoformat(now["partitions_until"]) == month
    not_after = x509.load_der_x509_certificate(key.der).not_valid_after_utc
    assert dt.datetime.fromisoformat(now["key_expires_at"]) == not_after
    database.run("operator", "select kakunin.revoke_ledger_key(%s)", [key.key_id])
    assert status()["key_expires_at"] is None


LEAD = "select kakunin.lead_ledger(%s, %s, %s)"


def test_one_worker_leads_until_it_stops_saying_so(movable: tuple[Database, Callable[[str], None]]) -> None:
    database, move = movable
    one_, two = uuid.uuid4(), uuid.uuid4()

    def lead(worker: uuid.UUID, name_: str, lease: str = "6 seconds") -> bool:
        return database.value("worker", LEAD, [worker, name_, lease])

    def leader() -> tuple[str | None, str | None]:
        status = database.value("worker", "select kakunin.ledger_status()")
        return status["leader"], status["leader_since"]

    assert leader() == (None, None)
    assert lead(one_, "one", "1 minute")
    since = leader()
    assert since[0] == "one"
    assert not lead(two, "two")
    assert lead(one_, "one", "1 minute")
    assert leader() == since
    move("50 seconds")
    assert not lead(two, "two")
    assert lead(one_, "one", "1 minute")
    move("100 seconds")
    assert not lead(two, "two")
    move("10 minutes")
    assert leader() == (None, None)
    assert lead(two, "two", "1 minute")
    assert leader()[0] == "two"
    assert not lead(one_, "one")
    # Given up, it is free at once.
    assert lead(two, "two", "0")
    assert lead(one_, "x" * 300)
    assert leader()[0] == "x" * 200
    for parameters in (
        [None, "n", "6 seconds"],
        [two, "n", None],
        [two, "n", "-1 second"],
        [two, "n", "6 minutes"],
    ):
        with refused("KA010"):
            database.run("worker", LEAD, parameters)


def test_of_workers_that_ask_at_once_one_leads(fresh: Database) -> None:
    with ThreadPoolExecutor(4) as pool:
        led = list(
            pool.map(lambda n: fresh.value("worker", LEAD, [uuid.uuid4(), str(n), "5 minutes"]), range(8))
        )
    assert sum(led) == 1


def test_the_next_entry_wakes_a_worker_that_sleeps_once(fresh: Database) -> None:
    agent, other = fresh.agent(), fresh.agent()
    asleep = "select asleep from kakunin_private.sleeper"
    sleep = "select kakunin.sleep_ledger()"
    with fresh.connect("worker", autocommit=True) as worker:
        worker.execute("listen kakunin_ledger")

        def woken() -> int:
            worker.execute("select 1")
            return len(list(worker.notifies(timeout=0)))

        with acting(fresh, agent) as session, acting(fresh, other, "agent_2") as second:
            append(session)
            session.commit()
            assert woken() == 0
            assert one(worker, sleep)
            assert not one(worker, sleep)  # it does already
            append(session)
            # Another one goes on meanwhile, and leaves the waking to the first.
            second.execute("set lock_timeout = '1ms'")
            append(second)
            second.commit()
            assert woken() == 0
            # And the worker, which is about to be woken, does not wait for it either.
            worker.execute("set lock_timeout = '1ms'")
            assert not one(worker, sleep)
            append(session)
            session.commit()
            assert list(worker.notifies(timeout=5, stop_after=1))
            assert woken() == 0
            assert not fresh.value("postgres", asleep)
            # Rolled back, it sleeps on.
            assert one(worker, sleep)
            append(session)
            session.rollback()
            assert fresh.value("postgres", asleep)
            append(second)
            second.commit()
            assert list(worker.notifies(timeout=5, stop_after=1))
