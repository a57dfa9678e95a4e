"""What ends access: rotation, changed agents, revocation lists, distrust, halts. And verification."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import itertools
import json
import random
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
import rfc8785
from cluster import Cluster
from conftest import LOGINS, Agent, Database, _ca, fresh_database, one, refused
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from forge import SHA256_RSA, resigned, sequence, sign, split, tlv
from pkilint import loader, pkix
from pkilint.pkix import certificate as pkix_certificate
from pkilint.pkix import crl as pkix_crl
from pkilint.pkix import extension as pkix_extension
from pkilint.pkix import name as pkix_name

from kakunin_db import (
    AgentCertificate,
    BadInputError,
    CertificateAuthority,
    LocalSigner,
    ca,
    normalize_serial,
)
from kakunin_db.ca import Revocation

Connection = psycopg.Connection[Any]

SECOND, MINUTE, HOUR, DAY = (dt.timedelta(**{u: 1}) for u in ("seconds", "minutes", "hours", "days"))
HASH_1, HASH_2 = ("sha256:" + digit * 64 for digit in "12")
ROLES = ["agent", "gateway", "registrar", "operator", "worker", "auditor"]
REASONS = {
    "unspecified": None, "keyCompromise": "Key Compromise", "cACompromise": "CA Compromise",
    "affiliationChanged": "Affiliation Changed", "superseded": "Superseded",
    "cessationOfOperation": "Cessation Of Operation", "privilegeWithdrawn": "Privilege Withdrawn",
    "aACompromise": "AA Compromise",
}  # fmt: skip

SERIAL = "select kakunin.current_cert_serial()"
BIND = "select kakunin.bind_serial(%s)"
REGISTER = "select kakunin.register_certificate(%s, %s::interval)"
REVOKE = "select kakunin.revoke_certificate(%s, %s)"
VERIFY = "select kakunin.verify_certificate(%s)"
HALT = "select kakunin.halt_agent(%s, %s)"
SIGN_HALT = "select kakunin.sign_halt(%s, %s, %s)"
DISTRUST = "select kakunin.distrust_ca(%s, %s)"
PUBLISH = "select kakunin.publish_crl(%s)"


@dataclass
class Kit(Database):
    """Keeps a session of each login: most of what a short statement takes is its connection."""

    sessions: dict[str, Connection] = field(default_factory=dict)

    def run(self, user: str, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        if user not in self.sessions:
            self.sessions[user] = self.connect(user, autocommit=True)
        cursor = self.sessions[user].execute(query, params)
        return cursor.fetchall() if cursor.description else []

    def register(self, issued: AgentCertificate) -> None:
        self.run("registrar", REGISTER, [issued.der, None])


@pytest.fixture(scope="module")
def kit(cluster: Cluster) -> Iterator[Database]:
    """A database of its own whose clock can be moved."""
    with fresh_database(cluster) as plain, contextlib.ExitStack() as stack:
        database = Kit(cluster, plain.name)
        stack.callback(lambda: [session.close() for session in database.sessions.values()])
        database.make_clock_movable()
        yield database


@pytest.fixture
def clock(kit: Database) -> Iterator[Callable[[Any], None]]:
    """Moves the database's clock; it is back in its place afterwards."""
    yield kit.move_clock
    kit.move_clock("0")


def state(kit: Database) -> Any:
    """All that is kept about agents, and the names that reach beyond snapshots."""
    tables = ["agents", "authorities", "certificates", "crls", "halts"]
    kept = ", ".join(
        f"(select md5(string_agg(t::text, ' ' order by t::text)) from kakunin_private.{t} t)" for t in tables
    )
    stops = "select array_agg(typname order by 1) from pg_type where typtype = 'd'"
    return kit.run("installer", f"select {kept}, ({stops})")


@contextlib.contextmanager
def changes_nothing(kit: Database) -> Iterator[None]:
    before = state(kit)
    yield
    assert state(kit) == before


def usable(kit: Database, serial: str) -> str:
    """'yes', or the SQLSTATE that says why this certificate cannot be bound now."""
    try:
        kit.run("gateway", BIND, [serial])
    except psycopg.Error as error:
        return error.sqlstate or ""
    return "yes"


def revocation(kit: Database, serial: str) -> tuple[dt.datetime | None, str | None]:
    query = "select revoked_at, revocation_reason from kakunin.certificates where serial = %s"
    return kit.run("operator", query, [serial])[0]


def now(kit: Database) -> dt.datetime:
    return kit.value("installer", "select kakunin_private.clock()")


def another(agent: Agent, **certificate: Any) -> AgentCertificate:
    """One more certificate for the agent, and its key."""
    return _ca().issue(agent.agent_id, agent.signer.public_key(), **certificate)


def register(
    kit: Database, issued: AgentCertificate, overlap: str | None = None, login: str = "registrar"
) -> str:
    return kit.value(login, REGISTER, [issued.der, overlap])


def verified(kit: Database, serial: str, login: str = "operator") -> dict[str, Any]:
    return kit.value(login, VERIFY, [serial])


@functools.cache
def signer(name: str) -> LocalSigner:
    """One key to a name: keys are slow to make."""
    return LocalSigner.generate()


def authority(
    kit: Database, name: str, issuer: CertificateAuthority | None = None, **options: Any
) -> CertificateAuthority:
    """Pinned, below an issuer or as a root."""
    made = CertificateAuthority.create(signer(name), name, issuer=issuer, **options)
    with kit.connect("operator") as operator:
        made.trust(operator)
    return made


def certified(kit: Database, by: CertificateAuthority, key_name: str = "agents", **certificate: Any) -> Agent:
    """A new agent with a certificate of this authority. A compromised key is never certified again."""
    key = signer(key_name)
    agent_id = kit.value("registrar", "select kakunin.create_agent('agent')")
    issued = by.issue(agent_id, key.public_key(), **certificate)
    kit.register(issued)
    return Agent(kit, issued, key)


class Meanwhile(threading.Thread):
    """A statement that runs beside the test; `outcome` is its value, or its SQLSTATE."""

    def __init__(self, connection: Connection, query: str, params: Any = None) -> None:
        super().__init__()
        self.connection, self.query, self.params = connection, query, params
        self.outcome: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.outcome = one(self.connection, self.query, self.params)
        except psycopg.Error as error:
            self.outcome = error.sqlstate

    def waits(self, kit: Database) -> None:
        """Returns once it waits for another session."""
        pid = self.connection.info.backend_pid
        end = time.monotonic() + 20
        while not kit.value("postgres", "select cardinality(pg_blocking_pids(%s)) > 0", [pid]):
            assert self.is_alive(), f"did not wait: {self.outcome}"
            assert time.monotonic() < end

    def result(self) -> Any:
        self.join(30)
        assert not self.is_alive()
        return self.outcome


# Rotation -------------------------------------------------------------------------------------------


def test_an_agent_has_one_active_certificate(kit: Database) -> None:
    agent = kit.agent()
    second = another(agent)
    with changes_nothing(kit), refused("KA010", match=f"has an active one already, {agent.serial}"):
        register(kit, second)
    assert [usable(kit, s) for s in (agent.serial, second.serial)] == ["yes", "KA001"]
    agent.revoke()
    assert register(kit, second) == second.serial
    assert [usable(kit, s) for s in (agent.serial, second.serial)] == ["KA002", "yes"]


def test_one_that_has_expired_is_not_active(kit: Database, clock: Callable[[Any], None]) -> None:
    agent = kit.agent(lifetime=2 * HOUR)
    second, third = another(agent), another(agent)
    clock("119 minutes")
    assert usable(kit, agent.serial) == "KA003"
    assert register(kit, second) == second.serial
    # The overlap is with what is active, and what has expired is not revoked for it.
    register(kit, third, "1 hour")
    assert [revocation(kit, a.serial)[1] for a in (agent, second, third)] == [None, "superseded", None]


def test_one_that_is_not_valid_yet_counts_as_active(kit: Database) -> None:
    agent = kit.agent(not_before=dt.datetime.now(dt.timezone.utc) + 10 * DAY)
    with refused("KA010", match="active one already"):
        register(kit, another(agent))


def test_a_suspended_agent_is_not_certified_anew(kit: Database) -> None:
    agent = kit.agent()
    agent.suspend()
    with changes_nothing(kit), refused("KA008"):
        register(kit, another(agent), "1 hour")
    kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    register(kit, another(agent), "1 hour")


@pytest.mark.parametrize("overlap", ["0", "1 second", "90 minutes", "30 days"])
def test_the_old_certificate_works_until_the_overlap_is_over(
    kit: Database, clock: Callable[[Any], None], overlap: str
) -> None:
    length = {"0": 0 * DAY, "1 second": SECOND, "90 minutes": 90 * MINUTE, "30 days": 30 * DAY}[overlap]
    agent = kit.agent()
    new = another(agent)
    with kit.connect("gateway") as session:
        session.execute(BIND, [agent.serial])
        earliest = now(kit)
        register(kit, new, overlap)
        at, reason = revocation(kit, agent.serial)
        assert reason == "superseded"
        assert at
        assert earliest + length <= at <= now(kit) + length
        assert revocation(kit, new.serial) == (None, None)
        if length > SECOND:
            clock(length - 10 * SECOND)
            assert usable(kit, agent.serial) == "yes"
            assert one(session, SERIAL) == agent.serial
            assert verified(kit, agent.serial)["status"] == "active"
        clock(length + SECOND)
        assert [usable(kit, s) for s in (agent.serial, new.serial)] == ["KA002", "yes"]
        assert one(session, SERIAL) is None
        with refused("KA002", match="was revoked: superseded"):
            session.execute("select kakunin.require_session()")
        session.rollback()
    assert verified(kit, agent.serial)["status"] == "revoked"


def test_the_overlap_is_over_to_the_microsecond(kit: Database) -> None:
    agent = kit.agent()
    new = kit.renew(agent, HOUR)
    at, _ = revocation(kit, agent.serial)
    query = (
        "select kakunin_private.is_usable(serial, revoked_at, not_before, not_after, agent_id, null)"
        " from kakunin_private.certificates where agent_id = %s order by registered_at"
    )
    with kit.connect("installer") as owner:
        owner.execute("create table kakunin_private.stopped (at timestamptz)")
        owner.execute("insert into kakunin_private.stopped values (null)")
        owner.execute(
            "create or replace function kakunin_private.clock() returns timestamptz language sql volatile"
            " parallel safe as 'select at from kakunin_private.stopped'"
        )
        seen = []
        for offset in ("-1 microsecond", "0", "1 microsecond"):
            owner.execute("update kakunin_private.stopped set at = %s + %s::interval", [at, offset])
            seen.append([row[0] for row in owner.execute(query, [new.agent_id])])
        owner.rollback()
    assert seen == [[True, True], [False, True], [False, True]]


LONGER = ["30 days 00:00:00.000001", "31 days", "1 month 1 day", "1 year", "178000000 years", "720:00:01"]
NEGATIVE = ["-1 microsecond", "-1 second", "-30 days", "-1 month", "1 day -25:00"]


@pytest.mark.parametrize("overlap", [*LONGER, *NEGATIVE, "infinity", "-infinity"])
def test_an_overlap_is_0_to_30_days(kit: Database, overlap: str) -> None:
    if "infinity" in overlap and kit.cluster.major < 17:
        pytest.skip("an interval is finite before Postgres 17")
    agent = kit.agent()
    new = another(agent)
    with changes_nothing(kit), refused("KA010", match="0 to 30 days"):
        register(kit, new, overlap)
    assert [usable(kit, s) for s in (agent.serial, new.serial)] == ["yes", "KA001"]
    register(kit, new, "30 days")


@pytest.mark.parametrize("overlap", ["1 month", "1 month -1 day", "720:00", "29 days 24:00"])
def test_an_overlap_of_days_or_months_is_no_longer_than_it_says(kit: Database, overlap: str) -> None:
    """A month counts as thirty days when intervals are compared, so it must not last for thirty-one."""
    agent = kit.agent()
    register(kit, another(agent), overlap)
    at, _ = revocation(kit, agent.serial)
    assert at
    assert at <= now(kit) + 30 * DAY


def test_an_overlap_needs_no_certificate_to_follow(kit: Database) -> None:
    """A script may always give one. But a wrong one is refused also where nothing overlaps."""
    agent_id = kit.value("registrar", "select kakunin.create_agent('first')")
    issued = [_ca().issue(agent_id, signer("agents").public_key()) for _ in range(2)]
    with refused("KA010"):
        register(kit, issued[0], "-1 day")
    assert register(kit, issued[0], "1 hour") == issued[0].serial
    assert revocation(kit, issued[0].serial) == (None, None)


@pytest.mark.parametrize("overlap", ["0", "1 day"])
def test_before_a_certificate_begins_the_old_one_works(
    kit: Database, clock: Callable[[Any], None], overlap: str
) -> None:
    """The overlap begins where the new one does: there is no gap."""
    agent = kit.agent()
    start = dt.datetime.now(dt.timezone.utc).replace(microsecond=0) + 10 * DAY
    new = another(agent, not_before=start)
    register(kit, new, overlap)
    length = DAY if overlap != "0" else 0 * DAY
    assert revocation(kit, agent.serial) == (start + length, "superseded")
    expected = {-MINUTE: ["yes", "KA003"], MINUTE: ["yes" if length else "KA002", "yes"]}
    expected[length + MINUTE] = ["KA002", "yes"]
    for offset, outcome in expected.items():
        clock(start + offset - dt.datetime.now(dt.timezone.utc))
        assert [usable(kit, s) for s in (agent.serial, new.serial)] == outcome


def test_a_third_certificate_supersedes_the_second_and_leaves_the_firsts_moment(kit: Database) -> None:
    first = kit.agent()
    second = kit.renew(first, HOUR)
    moment = revocation(kit, first.serial)
    third = kit.renew(second, DAY)
    assert revocation(kit, first.serial) == moment
    assert revocation(kit, second.serial)[1] == "superseded"
    assert [usable(kit, a.serial) for a in (first, second, third)] == ["yes", "yes", "yes"]
    with refused("KA010", match=third.serial):
        register(kit, another(first))


BROUGHT_FORWARD = {
    "revoke": lambda kit, agent: kit.run("operator", REVOKE, [agent.serial, "cessationOfOperation"]),
    "halt": lambda kit, agent: kit.run("operator", HALT, [agent.agent_id, "why"]),
    "update": lambda kit, agent: kit.run(
        "operator", "select kakunin.update_agent(%s, tenant => 'other')", [agent.agent_id]
    ),
}


@pytest.mark.parametrize("how", BROUGHT_FORWARD)
def test_a_revocation_is_brought_forward(kit: Database, how: str) -> None:
    reasons = {"revoke": "cessationOfOperation", "halt": "privilegeWithdrawn", "update": "affiliationChanged"}
    agent = kit.agent()
    kit.renew(agent, 30 * DAY)
    assert usable(kit, agent.serial) == "yes"
    before = now(kit)
    BROUGHT_FORWARD[how](kit, agent)
    at, reason = revocation(kit, agent.serial)
    assert at
    assert before <= at <= now(kit)
    assert reason == reasons[how]
    assert usable(kit, agent.serial) == "KA002"


def test_a_revocation_is_never_put_off(kit: Database, clock: Callable[[Any], None]) -> None:
    agent = kit.agent()
    at = kit.value("operator", REVOKE, [agent.serial, "cessationOfOperation"])
    with changes_nothing(kit):
        assert kit.value("operator", REVOKE, [agent.serial, "superseded"]) == at
    kit.renew(agent, 30 * DAY)
    assert revocation(kit, agent.serial) == (at, "cessationOfOperation")
    # Not by one that had lain ahead and has come either.
    second = kit.agent()
    third = kit.renew(second, HOUR)
    moment = revocation(kit, second.serial)
    clock(2 * HOUR)
    with changes_nothing(kit):
        assert kit.value("operator", REVOKE, [second.serial, "cessationOfOperation"]) == moment[0]
    kit.run("operator", HALT, [third.agent_id, "why"])
    assert revocation(kit, second.serial) == moment


# Two registrations at once --------------------------------------------------------------------------


@pytest.mark.parametrize(("ends", "gets"), [("commit", "KA010"), ("rollback", "serial")])
def test_of_two_first_certificates_at_once_one_is_registered(kit: Database, ends: str, gets: str) -> None:
    agent_id = kit.value("registrar", "select kakunin.create_agent('twice')")
    issued = [_ca().issue(agent_id, signer("agents").public_key()) for _ in range(2)]
    with kit.connect("registrar") as first, kit.connect("registrar", autocommit=True) as second:
        first.execute(REGISTER, [issued[0].der, None])
        meanwhile = Meanwhile(second, REGISTER, [issued[1].der, None])
        meanwhile.waits(kit)
        getattr(first, ends)()
        assert meanwhile.result() == (issued[1].serial if gets == "serial" else gets)


def test_of_two_rotations_at_once_the_second_supersedes_the_first(kit: Database) -> None:
    agent = kit.agent()
    new = [another(agent) for _ in range(2)]
    with kit.connect("registrar") as first, kit.connect("registrar", autocommit=True) as second:
        first.execute(REGISTER, [new[0].der, "1 hour"])
        meanwhile = Meanwhile(second, REGISTER, [new[1].der, "1 hour"])
        meanwhile.waits(kit)
        first.commit()
        assert meanwhile.result() == new[1].serial
    reasons = [revocation(kit, s)[1] for s in (agent.serial, new[0].serial, new[1].serial)]
    assert reasons == ["superseded", "superseded", None]


@pytest.mark.parametrize("overlap", [None, "1 hour"])
def test_many_registrations_at_once_leave_one_active(kit: Database, overlap: str | None) -> None:
    agent_id = kit.value("registrar", "select kakunin.create_agent('many')")
    # All from one second: a certificate is not registered after another one that begins later.
    start = _ca().certificate.not_valid_before_utc
    issued = [_ca().issue(agent_id, signer("agents").public_key(), not_before=start) for _ in range(6)]
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(kit.connect("registrar", autocommit=True)) for _ in issued]
        threads = [Meanwhile(s, REGISTER, [i.der, overlap]) for s, i in zip(sessions, issued, strict=True)]
        outcomes = [thread.result() for thread in threads]
    expected = {"KA010"} if overlap is None else set()
    assert {o for o in outcomes if o not in {i.serial for i in issued}} == expected
    active = "select count(*) from kakunin.certificates where agent_id = %s and revoked_at is null"
    assert kit.value("registrar", active, [agent_id]) == 1


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_registration_is_not_made_on_an_old_snapshot(kit: Database, level: str) -> None:
    """Where it would not see the one before it."""
    agent_id = kit.value("registrar", "select kakunin.create_agent('snapshot')")
    issued = [_ca().issue(agent_id, signer("agents").public_key()) for _ in range(2)]
    with kit.connect("registrar") as late:
        late.execute(f"set transaction isolation level {level}")
        late.execute("select from kakunin.agents")
        register(kit, issued[0])
        with changes_nothing(kit), refused("KA010", match="READ COMMITTED"):
            late.execute(REGISTER, [issued[1].der, None])
    assert usable(kit, issued[0].serial) == "yes"


@pytest.mark.parametrize("call", [HALT, "select kakunin.update_agent(%s, tenant => %s)"])
def test_what_ends_an_agents_certificates_does_not_miss_one_on_an_old_snapshot(
    kit: Database, call: str
) -> None:
    agent_id = kit.value("registrar", "select kakunin.create_agent('snapshot')")
    with kit.connect("operator") as late:
        late.execute("set transaction isolation level repeatable read")
        late.execute("select from kakunin.agents")
        register(kit, _ca().issue(agent_id, signer("agents").public_key()))
        with refused("40001"):
            late.execute(call, [agent_id, "x"])


# Old snapshots --------------------------------------------------------------------------------------

LEVELS = ["repeatable read", "serializable"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_transaction_older_than_the_rotation_loses_the_certificate_at_once(
    kit: Database, level: str
) -> None:
    """It cannot see when the overlap ends, so it must not go on until who knows when."""
    agent, bystander = kit.agent(), kit.agent()
    with kit.connect("gateway") as old, kit.connect("gateway") as other:
        for session, bound in ((old, agent), (other, bystander)):
            session.execute(f"set transaction isolation level {level}")
            session.execute(BIND, [bound.serial])
            assert one(session, SERIAL) == bound.serial
        kit.renew(agent, HOUR)
        assert one(old, SERIAL) is None
        assert one(other, SERIAL) == bystander.serial
        with refused("KA002", match="after this transaction took its snapshot"):
            old.execute("select kakunin.require_session()")
    assert usable(kit, agent.serial) == "yes"


@pytest.mark.parametrize("level", LEVELS)
def test_no_transaction_begins_with_it_on_a_snapshot_from_before(kit: Database, level: str) -> None:
    agent, bystander = kit.agent(), kit.agent()
    with kit.connect("agent_1") as keeper, kit.connect("gateway") as late:
        for session in (keeper, late):
            session.execute(f"set transaction isolation level {level}")
        snapshot = one(keeper, "select pg_export_snapshot()")
        new = kit.renew(agent, HOUR)
        late.execute(f"set transaction snapshot '{snapshot}'")
        told = one(late, VERIFY, [agent.serial])
        assert (told["valid"], told["status"], told["revoked_at"]) == (False, "revoked", None)
        assert one(late, VERIFY, [new.serial])["status"] == "unknown"
        assert one(late, VERIFY, [bystander.serial])["valid"] is True
        assert one(late, BIND, [bystander.serial]) == bystander.serial
        with refused("KA002"):
            late.execute(BIND, [agent.serial])


def test_a_snapshot_that_shows_the_moment_keeps_the_certificate_until_it_is_brought_forward(
    kit: Database,
) -> None:
    agent = kit.agent()
    kit.renew(agent, HOUR)
    with kit.connect("gateway") as late:
        late.execute("set transaction isolation level repeatable read")
        assert one(late, BIND, [agent.serial]) == agent.serial
        assert one(late, SERIAL) == agent.serial
        kit.run("operator", REVOKE, [agent.serial, "cessationOfOperation"])
        assert one(late, SERIAL) is None
        assert one(late, VERIFY, [agent.serial])["status"] == "revoked"
        with refused("KA002"):
            late.execute("select kakunin.require_session()")


def test_a_rotation_that_is_rolled_back_leaves_no_name(kit: Database) -> None:
    agent = kit.agent()
    new = another(agent)
    with changes_nothing(kit), kit.connect("registrar") as registrar:
        registrar.execute(REGISTER, [new.der, "1 hour"])
        registrar.rollback()
    with kit.connect("gateway") as session:
        session.execute("set transaction isolation level repeatable read")
        assert one(session, BIND, [agent.serial]) == agent.serial


def test_the_longest_serials_are_told_apart_beyond_snapshots(
    kit: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty bytes; and a name in the catalog has 63 characters, a longer one would be cut off."""
    serials = [(0x7F << 152) + 0xA0 + n for n in range(4)]
    monkeypatch.setattr(ca, "_random_serial", lambda: serials.pop(0))
    agent, neighbour = kit.agent(), kit.agent()
    notices: list[str | None] = []
    with kit.connect("gateway") as session, kit.connect("registrar", autocommit=True) as registrar:
        registrar.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        session.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        session.execute("set transaction isolation level repeatable read")
        assert one(session, BIND, [neighbour.serial]) == neighbour.serial
        registrar.execute(REGISTER, [another(agent).der, "1 hour"])
        assert one(session, SERIAL) == neighbour.serial
        with refused("KA002"):
            session.execute(BIND, [agent.serial])
    assert notices == []


# Changed agents -------------------------------------------------------------------------------------

FACTS = {"tenant": "acme", "model": "gpt", "model_hash": HASH_1}
CHANGES: dict[str, dict[str, Any]] = {
    "model hash": {"model_hash": HASH_2},
    "tenant": {"tenant": "umbrella"},
    "model": {"model": "opus"},
    "all": {"tenant": "umbrella", "model": "opus", "model_hash": HASH_2},
}


def create(kit: Database, **facts: Any) -> uuid.UUID:
    named = "".join(f", {name} => %({name})s" for name in facts)
    return kit.value("registrar", f"select kakunin.create_agent('agent'{named})", facts)


def update(connection: Connection, agent_id: Any, **facts: Any) -> dict[str, Any]:
    named = "".join(f", {name} => %({name})s" for name in facts)
    return one(
        connection, f"select kakunin.update_agent(%(agent_id)s{named})", facts | {"agent_id": agent_id}
    )


def as_it_is(kit: Database, **changes: Any) -> Agent:
    """An agent whose certificate says what the agent's row says."""
    facts = FACTS | changes
    agent_id = create(kit, **facts)
    key = signer("agents")
    issued = _ca().issue(agent_id, key.public_key(), **facts)
    register(kit, issued)
    return Agent(kit, issued, key)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("login", ["registrar", "operator"])
def test_a_changed_agent_loses_its_certificates_in_the_same_commit(
    kit: Database, change: str, login: str
) -> None:
    agent, bystander = as_it_is(kit), as_it_is(kit)
    register(kit, another(agent, **FACTS), "1 hour")
    serials = sorted(
        row[0]
        for row in kit.run("operator", "select serial from kakunin.certificates where agent_id = %s",
                           [agent.agent_id])
    )  # fmt: skip
    with kit.connect("gateway") as session, kit.connect(login) as connection:
        session.execute(BIND, [agent.serial])
        told = update(connection, agent.agent_id, **CHANGES[change])
        assert one(session, SERIAL) == agent.serial
        connection.commit()
        assert one(session, SERIAL) is None
        with refused("KA002", match="affiliationChanged"):
            session.execute("select kakunin.require_session()")
    assert told["agent_id"] == str(agent.agent_id)
    assert told["certificates_revoked"] == serials
    assert "Certify the agent anew" in told["next"]
    assert [revocation(kit, s)[1] for s in serials] == ["affiliationChanged"] * 2
    assert usable(kit, bystander.serial) == "yes"
    # Only as it is now can it be certified.
    with changes_nothing(kit), refused("KA010"):
        register(kit, another(agent, **FACTS))
    register(kit, another(agent, **FACTS | CHANGES[change]))


@pytest.mark.parametrize(
    "unchanged",
    [
        {}, FACTS, {"model_hash": HASH_1.upper().replace("SHA", "sha")}, {"model_hash": HASH_1.upper()},
        {"tenant": "acme"}, {"model": "gpt"}, {"name": "renamed"}, {"model_version": "2026-01"},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_certificate_does_not_contradict_revokes_nothing(
    kit: Database, unchanged: dict[str, Any]
) -> None:
    agent = as_it_is(kit)
    with kit.connect("operator") as operator:
        told = update(operator, agent.agent_id, **unchanged)
    assert told == {"agent_id": str(agent.agent_id), "certificates_revoked": [], "next": None}
    assert usable(kit, agent.serial) == "yes"
    row = kit.run(
        "operator",
        "select name, tenant, model, model_version, model_hash from kakunin.agents where agent_id = %s",
        [agent.agent_id],
    )
    expected = {"name": "agent", "model_version": None} | FACTS | unchanged | {"model_hash": HASH_1}
    assert row == [tuple(expected[k] for k in ("name", "tenant", "model", "model_version", "model_hash"))]


def test_what_has_expired_or_is_revoked_already_is_not_revoked_again(
    kit: Database, clock: Callable[[Any], None]
) -> None:
    agent = as_it_is(kit)
    short = another(agent, **FACTS, lifetime=HOUR)
    kit.run("operator", REVOKE, [agent.serial, "superseded"])
    register(kit, short)
    clock(2 * HOUR)
    register(kit, another(agent, **FACTS))
    with kit.connect("operator") as operator:
        told = update(operator, agent.agent_id, tenant="umbrella")
    assert len(told["certificates_revoked"]) == 1
    assert revocation(kit, short.serial) == (None, None)
    assert revocation(kit, agent.serial)[1] == "superseded"


@pytest.mark.parametrize(
    "facts",
    [
        {"model_hash": "1" * 64}, {"model_hash": "sha256:" + "g" * 64}, {"model_hash": HASH_1 + "\n"},
        {"model_hash": "sha1:" + "1" * 40}, {"model_hash": ""}, {"name": ""}, {"name": " \t"},
        {"name": "x" * 201}, {"tenant": ""}, {"tenant": "x" * 201}, {"model": " "}, {"model": "x" * 201},
        {"model_version": ""}, {"model_version": "x" * 201},
        # One good change among the bad is not made either.
        {"tenant": "umbrella", "model_version": ""}, {"model_hash": HASH_2, "name": "  "},
    ],
    ids=lambda f: ascii(f)[:60],
)  # fmt: skip
def test_a_bad_change_changes_nothing(kit: Database, facts: dict[str, Any]) -> None:
    agent = as_it_is(kit)
    with changes_nothing(kit), kit.connect("operator") as operator, refused("KA010"):
        update(operator, agent.agent_id, **facts)
    assert usable(kit, agent.serial) == "yes"


def test_a_hash_is_that_of_a_model(kit: Database) -> None:
    agent_id = create(kit)
    with kit.connect("operator", autocommit=True) as operator:
        with changes_nothing(kit), refused("KA010", match="none is named"):
            update(operator, agent_id, model_hash=HASH_1)
        update(operator, agent_id, model="gpt", model_hash=HASH_1)
        for unknown in (None, uuid.uuid4()):
            with changes_nothing(kit), refused("KA010", match="no agent"):
                update(operator, unknown, name="x")
    with changes_nothing(kit), refused("KA010"):
        create(kit, model_hash=HASH_1)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_hash": HASH_2}, {"model": None, "model_hash": None}, {"tenant": "umbrella"}, {"tenant": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_certificate_that_says_otherwise_is_not_registered(kit: Database, changes: dict[str, Any]) -> None:
    agent_id = create(kit, **FACTS)
    issued = _ca().issue(agent_id, signer("agents").public_key(), **FACTS | changes)
    with changes_nothing(kit), refused("KA010", match="not the agent's"):
        register(kit, issued)
    register(kit, _ca().issue(agent_id, signer("agents").public_key(), **FACTS))


def test_an_agent_without_a_hash_takes_a_certificate_with_one(kit: Database) -> None:
    agent_id = create(kit)
    issued = _ca().issue(agent_id, signer("agents").public_key(), model="gpt", model_hash=HASH_1)
    register(kit, issued)
    with kit.connect("operator") as operator:
        assert update(operator, agent_id, model="gpt", model_hash=HASH_1)["certificates_revoked"] == []
        assert update(operator, agent_id, model_hash=HASH_2)["certificates_revoked"] == [issued.serial]


def test_a_change_and_a_registration_at_once(kit: Database) -> None:
    """One waits for the other: no certificate of the old model slips through."""
    agent = as_it_is(kit)
    new = another(agent, **FACTS)
    with kit.connect("operator") as operator, kit.connect("registrar", autocommit=True) as registrar:
        update(operator, agent.agent_id, model_hash=HASH_2)
        meanwhile = Meanwhile(registrar, REGISTER, [new.der, "1 hour"])
        meanwhile.waits(kit)
        operator.commit()
        assert meanwhile.result() == "KA010"
    agent, new = (a := as_it_is(kit)), another(a, **FACTS)
    with kit.connect("operator", autocommit=True) as operator, kit.connect("registrar") as registrar:
        registrar.execute(REGISTER, [new.der, "1 hour"])
        query = "select kakunin.update_agent(%s, model_hash => %s)"
        meanwhile = Meanwhile(operator, query, [agent.agent_id, HASH_2])
        meanwhile.waits(kit)
        registrar.commit()
        assert meanwhile.result()["certificates_revoked"] == sorted([agent.serial, new.serial])


# Verification ---------------------------------------------------------------------------------------


def test_it_tells_what_the_certificate_says(kit: Database) -> None:
    venues = ["NYSE", "\u65e5\u672c"]
    scope = {
        "max_single_trade_usd": 10000,
        "permitted_venues": venues,
        "leverage_permitted": True,
        "daily_limit_usd": None,
    }
    agent_id = create(kit, **FACTS)
    issued = _ca().issue(
        agent_id, signer("agents").public_key(),
        permitted_actions=["trade:*", "orders:read"], financial_scope=scope, **FACTS,
    )  # fmt: skip
    register(kit, issued)
    told = verified(kit, issued.serial.lower().replace(":", ""))
    certificate = issued.certificate
    for name, at in (
        ("not_before", certificate.not_valid_before_utc),
        ("not_after", certificate.not_valid_after_utc),
    ):
        assert dt.datetime.fromisoformat(told.pop(name)) == at
    assert told == {
        "serial_number": issued.serial, "valid": True, "status": "active", "agent_id": str(agent_id),
        "agent_name": "agent", **FACTS, "permitted_actions": ["trade:*", "orders:read"],
        "financial_scope": scope, "revoked_at": None, "revocation_reason": None,
        "issuer_key_id": _ca().key_id,
    }  # fmt: skip
    bare = verified(kit, kit.agent().serial)
    absent = ("tenant", "model", "model_hash", "financial_scope")
    assert {field: bare[field] for field in absent} == dict.fromkeys(absent)
    assert bare["permitted_actions"] == []


STATUSES = ["active", "revoked", "expired", "not_yet_valid", "suspended", "unknown", "superseded later"]


def in_status(kit: Database, clock: Callable[[Any], None], status: str) -> Agent:
    start = dt.datetime.now(dt.timezone.utc) + 10 * DAY if status == "not_yet_valid" else None
    agent = kit.agent(lifetime=HOUR if status == "expired" else DAY, not_before=start)
    if status == "revoked":
        agent.revoke()
    elif status == "expired":
        clock(2 * HOUR)
    elif status == "suspended":
        agent.suspend()
    elif status == "superseded later":
        kit.renew(agent, HOUR)
    elif status == "unknown":
        agent = Agent(kit, another(agent), agent.signer)
    return agent


@pytest.mark.parametrize("status", STATUSES)
def test_a_true_signature_counts_while_the_certificate_does(
    kit: Database, clock: Callable[[Any], None], status: str
) -> None:
    agent = in_status(kit, clock, status)
    told = verified(kit, agent.serial)
    good = status in ("active", "superseded later")
    assert (told["valid"], told["status"]) == (good, "active" if good else status)
    if status == "unknown":
        assert told == {"serial_number": agent.serial, "valid": False, "status": "unknown"}
    else:
        assert (told["revoked_at"] is not None) == (status in ("revoked", "superseded later"))
        assert (told["revocation_reason"] is not None) == (status in ("revoked", "superseded later"))
    signature = agent.signer.sign(hashlib.sha256(b"payload").digest())
    query = "select kakunin.verify_message(%s, %s, %s)"
    message = kit.value("operator", query, [agent.serial, b"payload", signature])
    known = status != "unknown"
    assert message == {
        "valid": good, "signature_valid": known, "certificate_status": told["status"],
        "certificate_serial": agent.serial, "agent_id": str(agent.agent_id) if known else None,
        "agent_name": "agent" if known else None, "model_hash": None,
    }  # fmt: skip
    other = kit.value("operator", query, [agent.serial, b"payloae", signature])
    assert (other["valid"], other["signature_valid"]) == (False, False)
    assert other["certificate_status"] == told["status"]


def test_of_two_causes_the_one_that_is_final_is_told(kit: Database, clock: Callable[[Any], None]) -> None:
    agent = kit.agent(lifetime=HOUR)
    agent.suspend()
    agent.revoke()
    clock(2 * HOUR)
    assert verified(kit, agent.serial)["status"] == "revoked"
    other = kit.agent(lifetime=3 * HOUR)
    other.suspend()
    clock(4 * HOUR)
    assert verified(kit, other.serial)["status"] == "expired"


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 1_000_000, 6_000_000])
def test_payloads_of_any_size(kit: Database, size: int) -> None:
    agent = kit.agent()
    payload = random.Random(size).randbytes(size)
    signature = agent.signer.sign(hashlib.sha256(payload).digest())
    query = "select (kakunin.verify_message(%s, %s, %s) ->> 'valid')::boolean"
    assert kit.value("agent_1", query, [agent.serial, payload, signature])
    assert not kit.value("agent_1", query, [agent.serial, payload + b"\0", signature])
    if size:
        flipped = bytes([payload[0] ^ 1]) + payload[1:]
        assert not kit.value("agent_1", query, [agent.serial, flipped, signature])
        assert not kit.value("agent_1", query, [agent.serial, payload[:-1], signature])


def test_it_agrees_with_openssl_on_any_signature(kit: Database) -> None:
    """Right ones, and ones that are cut, longer, changed, of another key, hash, padding or message."""
    source = random.Random(20)
    agents = [kit.agent() for _ in range(3)]
    checks: list[tuple[str, bytes, bytes]] = []
    expected: list[bool] = []
    for _ in range(400):
        agent, other = source.sample(agents, 2)
        payload = source.randbytes(source.choice([0, 1, 32, 100, 1000]))
        key, signed, signature = agent.signer._key, payload, b""
        how = source.randrange(12)
        if how == 0:
            key = other.signer._key
        elif how == 1:
            signed = payload + b"x"
        if how == 2:
            signature = key.sign(signed, padding.PKCS1v15(), hashes.SHA512())
        elif how == 3:
            signature = key.sign(signed, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
        elif how == 4:
            signature = source.randbytes(source.choice([0, 1, 255, 256, 257]))
        else:
            signature = sign(key, signed)
        if how == 5:
            signature = signature[: source.randrange(256)]
        elif how == 6:
            signature += b"\0"
        elif how == 7:
            at = source.randrange(256)
            flipped = signature[at] ^ 1 << source.randrange(8)
            signature = signature[:at] + bytes([flipped]) + signature[at + 1 :]
        elif how == 8:
            number = int.from_bytes(signature, "big") + int.from_bytes(agent.modulus, "big")
            signature = number.to_bytes(257, "big")
        checks.append((agent.serial, payload, signature))
        try:
            agent.signer.public_key().verify(signature, payload, padding.PKCS1v15(), hashes.SHA256())
            expected.append(True)
        except InvalidSignature:
            expected.append(False)
    assert 50 < sum(expected) < 350
    rows = kit.run(
        "gateway",
        "select v ->> 'signature_valid', v ->> 'valid'"
        " from unnest(%s::text[], %s::bytea[], %s::bytea[]) with ordinality as u(s, p, g, at),"
        " kakunin.verify_message(s, p, g) v order by at",
        [list(column) for column in zip(*checks, strict=True)],
    )
    assert rows == [(str(e).lower(),) * 2 for e in expected]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("verify_certificate(%s)", [None]),
        ("verify_certificate(%s)", ["zz"]),
        ("verify_message(%s, %s, %s)", [None, b"", b""]),
        ("verify_message(%s, %s, %s)", ["01", None, b""]),
        ("verify_message(%s, %s, %s)", ["01", b"", None]),
    ],
)
def test_what_cannot_be_verified_is_refused(kit: Database, call: str, arguments: list[Any]) -> None:
    with refused("KA010"):
        kit.run("agent_1", f"select kakunin.{call}", arguments)


def as_role(kit: Database, role: str) -> contextlib.AbstractContextManager[Connection]:
    """A session with this role of the kit, or as PUBLIC."""

    @contextlib.contextmanager
    def session() -> Iterator[Connection]:
        login = next((name for name, roles in LOGINS.items() if f"kakunin_{role}" in roles), None)
        with kit.connect(login or ("stranger" if role == "public" else "postgres")) as connection:
            if login is None and role != "public":
                connection.execute(f"set role kakunin_{role}")
            yield connection
            connection.rollback()

    return session()


@pytest.mark.parametrize("role", [*ROLES, "public"])
def test_all_the_kits_roles_may_verify_and_nobody_else(kit: Database, role: str) -> None:
    agent = kit.agent()
    signature = agent.signer.sign(hashlib.sha256(b"payload").digest())
    for query, arguments in (
        (VERIFY, [agent.serial]),
        ("select kakunin.verify_message(%s, 'payload', %s)", [agent.serial, signature]),
    ):
        with as_role(kit, role) as connection:
            if role == "public":
                with refused("42501"):
                    connection.execute(query, arguments)
            else:
                assert one(connection, query, arguments)["valid"] is True


def test_it_is_about_the_serial_asked_for_whoever_asks(kit: Database) -> None:
    """Neither claims nor a binding change the answer, nor are they changed by asking."""
    agent, revoked = kit.agent(), kit.agent()
    revoked.revoke()
    with kit.connect("gateway") as connection:
        plain = [one(connection, VERIFY, [a.serial]) for a in (agent, revoked)]
        connection.execute(BIND, [agent.serial])
        for claims in (json.dumps({"kakunin_cert_serial": revoked.serial}), "{}", "no json", ""):
            connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
            assert [one(connection, VERIFY, [a.serial]) for a in (agent, revoked)] == plain
            assert one(connection, "select current_setting('request.jwt.claims')") == claims
        assert one(connection, SERIAL) == agent.serial


# Revocation lists -----------------------------------------------------------------------------------


def openssl(*arguments: str | Path, data: bytes | None = None) -> tuple[int, str]:
    done = subprocess.run(["openssl", *arguments], input=data, capture_output=True, check=False)
    return done.returncode, (done.stdout + done.stderr).decode()


def pem(path: Path, *things: Any) -> Path:
    path.write_bytes(b"".join(t.public_bytes(serialization.Encoding.PEM) for t in things))
    return path


def der(thing: Any) -> bytes:
    return thing.public_bytes(serialization.Encoding.DER)


def entries(kit: Database, by: CertificateAuthority, login: str = "registrar") -> list[Revocation]:
    rows = kit.run(login, "select serial, revoked_at, reason from kakunin.revocations(%s)", [by.key_id])
    return [Revocation(*row) for row in rows]


def due(kit: Database, by: CertificateAuthority) -> int | None:
    rows = kit.run("registrar", "select next_number from kakunin.crls_due() where key_id = %s", [by.key_id])
    return int(rows[0][0]) if rows else None


def published(kit: Database, by: CertificateAuthority) -> int:
    """The number of the newest list, 0 where there is none."""
    query = "select coalesce(max(number), 0) from kakunin.crls where key_id = %s"
    return int(kit.value("operator", query, [by.key_id]))


def publish(
    kit: Database, by: CertificateAuthority, number: int | None = None, **options: Any
) -> x509.CertificateRevocationList:
    """The list that is due, made and published."""
    made = by.revocation_list(entries(kit, by), number or due(kit, by) or 0, **options)
    assert kit.value("registrar", PUBLISH, [der(made)]) == published(kit, by)
    return made


def test_openssl_takes_the_list_and_refuses_the_revoked_certificate(kit: Database, tmp_path: Path) -> None:
    root = authority(kit, "Root", crl_url="http://crl.example/root.crl")
    good, bad, later = (certified(kit, root, f"openssl {n}") for n in range(3))
    kit.run("operator", REVOKE, [bad.serial, "keyCompromise"])
    register(kit, root.issue(later.agent_id, later.signer.public_key()), "1 hour")
    assert due(kit, root) == 1
    made = publish(kit, root)
    assert due(kit, root) is None
    stored = "select der, number, entries, this_update, next_update from kakunin.crls where key_id = %s"
    expected = (der(made), 1, 1, made.last_update_utc, made.next_update_utc)
    assert kit.run("agent_1", stored, [root.key_id]) == [expected]
    ca_file = pem(tmp_path / "root.pem", root.certificate)
    list_file = pem(tmp_path / "crl.pem", made)
    assert "verify OK" in openssl("crl", "-verify", "-CAfile", ca_file, "-in", list_file, "-noout")[1]
    impostor = pem(tmp_path / "x.pem", CertificateAuthority.create(signer("impostor"), "Root").certificate)
    assert "verify OK" not in openssl("crl", "-verify", "-CAfile", impostor, "-in", list_file, "-noout")[1]
    check = ["verify", "-x509_strict", "-crl_check", "-CRLfile", list_file, "-CAfile", ca_file]
    for agent, said in ((good, "OK"), (later, "OK"), (bad, "certificate revoked")):
        code, out = openssl(*check, pem(tmp_path / "agent.pem", agent.issued.certificate))
        assert said in out
        assert (code == 0) == (said == "OK")


def test_openssl_follows_the_chain_through_an_intermediate(kit: Database, tmp_path: Path) -> None:
    root = authority(kit, "Chain root", path_length=1, crl_url="http://crl.example/root.crl")
    middle = authority(kit, "Chain middle", root, crl_url="http://crl.example/middle.crl")
    good, bad = certified(kit, middle), certified(kit, middle)
    bad.revoke()
    lists = [publish(kit, root), publish(kit, middle)]
    ca_file = pem(tmp_path / "root.pem", root.certificate)
    chain = pem(tmp_path / "middle.pem", middle.certificate)
    good_file = pem(tmp_path / "good.pem", good.issued.certificate)
    bad_file = pem(tmp_path / "bad.pem", bad.issued.certificate)

    def check(file: Path) -> str:
        crls = pem(tmp_path / "crls.pem", *lists)
        options = ["-x509_strict", "-crl_check_all", "-CRLfile", crls, "-CAfile", ca_file]
        return openssl("verify", *options, "-untrusted", chain, file)[1]

    assert check(good_file).endswith("OK\n")
    assert "certificate revoked" in check(bad_file)
    # Distrusted, the intermediate is on its root's list, and what is below it falls with it.
    assert kit.value("operator", DISTRUST, [middle.key_id, "cessationOfOperation"]) == []
    assert due(kit, root) == 2
    lists[0] = publish(kit, root)
    assert [entry.serial_number for entry in lists[0]] == [middle.certificate.serial_number]
    assert "error 23 at 1 depth lookup: certificate revoked" in check(good_file)


def test_every_reason_is_on_the_list_as_openssl_spells_it(kit: Database) -> None:
    by = authority(kit, "Reasons")
    agents = {reason: certified(kit, by, f"for {reason}") for reason in REASONS}
    for reason, agent in agents.items():
        kit.run("operator", REVOKE, [agent.serial, reason])
    made = publish(kit, by)
    text = openssl("crl", "-inform", "DER", "-noout", "-text", data=der(made))[1]
    said = {}
    for block in text.split("    Serial Number: ")[1:]:
        lines = [line.strip() for line in block.split("Signature Algorithm")[0].splitlines()]
        said[lines[0]] = lines[lines.index("X509v3 CRL Reason Code:") + 1] if len(lines) > 2 else None
    assert said == {agent.serial.replace(":", ""): REASONS[reason] for reason, agent in agents.items()}
    for reason, agent in agents.items():
        entry = made.get_revoked_certificate_by_serial_number(agent.issued.certificate.serial_number)
        at, _ = revocation(kit, agent.serial)
        assert at
        assert entry
        assert entry.revocation_date_utc == at.replace(microsecond=0)
        assert len(entry.extensions) == (reason != "unspecified")


def test_numbers_increase(kit: Database) -> None:
    by = authority(kit, "Numbers")
    assert due(kit, by) == 1
    first = by.revocation_list([], 5)
    publish(kit, by, 7)
    for number in (1, 6, 7):
        with changes_nothing(kit), refused("KA010", match="not newer"):
            kit.run("registrar", PUBLISH, [der(by.revocation_list([], number))])
    certified(kit, by).revoke()
    assert due(kit, by) == 8
    publish(kit, by, 2**159 - 1)  # twenty octets
    assert published(kit, by) == 2**159 - 1
    certified(kit, by).revoke()
    assert due(kit, by) == 2**159
    # Nor is it older by its date, whatever its number.
    other = authority(kit, "Other numbers")
    publish(kit, other)
    earlier = patched(other, der(other.revocation_list([], 9)), {3: utc_time(first.last_update_utc - HOUR)})
    with changes_nothing(kit), refused("KA010", match="not newer"):
        kit.run("registrar", PUBLISH, [earlier])


def test_of_two_lists_at_once_one_is_published(kit: Database) -> None:
    by = authority(kit, "Two at once")
    made = der(by.revocation_list([], 1))
    with kit.connect("registrar") as first, kit.connect("operator", autocommit=True) as second:
        assert one(first, PUBLISH, [made]) == 1
        meanwhile = Meanwhile(second, PUBLISH, [made])
        meanwhile.waits(kit)
        first.commit()
        assert meanwhile.result() == "KA010"


def test_a_list_is_due_after_a_revocation_and_before_it_is_stale(
    kit: Database, clock: Callable[[Any], None]
) -> None:
    by = authority(kit, "Due")
    agent = certified(kit, by)
    publish(kit, by)
    for ahead, number in (("3 days 11 hours", None), ("3 days 13 hours", 2), ("8 days", 2), ("0", None)):
        clock(ahead)
        assert due(kit, by) == number
    register(kit, by.issue(agent.agent_id, agent.signer.public_key()), "1 hour")
    assert due(kit, by) is None  # the revocation lies ahead
    clock("61 minutes")
    assert due(kit, by) == 2
    assert [e.serial for e in entries(kit, by)] == [agent.serial]
    publish(kit, by)
    assert due(kit, by) is None
    with kit.connect("operator") as operator:
        operator.execute(REVOKE, [agent.serial, "cessationOfOperation"])  # changes nothing
    assert due(kit, by) is None


def test_a_revocation_committed_after_the_list_but_dated_before_it_makes_it_due_again(kit: Database) -> None:
    by = authority(kit, "Late commit")
    agent = certified(kit, by)
    with kit.connect("operator") as operator:
        at = one(operator, REVOKE, [agent.serial, "cessationOfOperation"])
        made = publish(kit, by)
        assert at.replace(microsecond=0) <= made.last_update_utc
        assert list(made) == []
        assert due(kit, by) is None
        operator.commit()
    assert due(kit, by) == 2
    (entry,) = publish(kit, by)
    assert entry.revocation_date_utc == at.replace(microsecond=0)
    assert due(kit, by) is None


def test_a_list_made_before_a_revocation_and_handed_in_after_it_is_refused(kit: Database) -> None:
    by = authority(kit, "Overtaken")
    made = by.revocation_list(entries(kit, by), 1)
    agent = certified(kit, by)
    agent.revoke()
    with changes_nothing(kit), refused("KA010", match=agent.serial):
        kit.run("registrar", PUBLISH, [der(made)])


def test_what_has_expired_leaves_the_list_a_week_later(kit: Database, clock: Callable[[Any], None]) -> None:
    by = authority(kit, "Leaving")
    short, long = certified(kit, by, lifetime=DAY), certified(kit, by)
    for agent in (short, long):
        agent.revoke()
    lifetime = 30 * DAY
    listed_first = entries(kit, by)
    both = by.revocation_list(listed_first, 1, lifetime=lifetime)
    clock("7 days 23 hours")
    assert {e.serial for e in entries(kit, by)} == {short.serial, long.serial}
    kit.run("registrar", PUBLISH, [der(both)])
    clock("8 days 1 hour")
    assert [e.serial for e in entries(kit, by)] == [long.serial]
    assert due(kit, by) is None  # one more than is needed is no reason
    gone = next(e for e in listed_first if e.serial == short.serial)
    with refused("KA010", match=short.serial):
        made = by.revocation_list([*entries(kit, by), gone], 2, lifetime=lifetime)
        kit.run("registrar", PUBLISH, [der(made)])
    publish(kit, by, 2, lifetime=lifetime)


def test_two_thousand_revocations(cluster: Cluster) -> None:
    with fresh_database(cluster) as kit:
        by = authority(kit, "Many")
        agent = certified(kit, by)
        with kit.connect("installer") as owner:
            owner.execute(
                "insert into kakunin_private.certificates (serial, agent_id, issuer_key_id, der,"
                " public_key_modulus, not_before, not_after, permitted_actions, registered_by)"
                " select kakunin.normalize_serial('10' || substr(md5(i::text), 1, 30)),"
                " %s, %s, 'x', 'x', now() - interval '1 day', now() + interval '90 days', '{}', 'test'"
                " from generate_series(1, 2000) i",
                [agent.agent_id, by.key_id],
            )
        times = {}
        with kit.connect("operator", autocommit=True) as operator:
            operator.execute("set statement_timeout = '60s'")

            def timed(what: str, query: str, *params: Any) -> Any:
                start = time.perf_counter()
                rows = operator.execute(query, params).fetchall()
                times[what] = time.perf_counter() - start
                return rows

            timed("halt", HALT, agent.agent_id, "all of them")
            rows = timed("revocations", "select * from kakunin.revocations(%s)", by.key_id)
            assert len(rows) == 2001
            made = der(by.revocation_list([Revocation(*row) for row in rows], 1))
            timed("publish", PUBLISH, made)
            assert by.key_id not in [row[0] for row in timed("due", "select * from kakunin.crls_due()")]
        print(f"\n2,001 revocations, {len(made)} bytes:", {k: f"{v:.3f} s" for k, v in times.items()})


@pytest.mark.parametrize("role", [*ROLES, "public"])
def test_who_may_read_and_bring_lists(kit: Database, role: str) -> None:
    by = authority(kit, "Roles")
    reads = {"registrar", "operator", "worker", "auditor"}
    brings = {"registrar", "operator", "worker"}
    made = der(by.revocation_list([], published(kit, by) + 1))
    calls: list[tuple[set[str], str, list[Any]]] = [
        (set(ROLES), "select count(*) from kakunin.crls", []),
        (reads, "select count(*) from kakunin.crls_due()", []),
        (reads, "select count(*) from kakunin.revocations(%s)", [by.key_id]),
        (brings, PUBLISH, [made]),
    ]
    for roles, query, arguments in calls:
        with as_role(kit, role) as connection:
            if role in roles:
                connection.execute(query, arguments)
            else:
                with refused("42501"):
                    connection.execute(query, arguments)


# Lists that are refused


def utc_time(at: dt.datetime) -> bytes:
    return tlv(0x17, at.strftime("%y%m%d%H%M%SZ").encode())


def generalized(text: str) -> bytes:
    return tlv(0x18, text.encode())


Changes = dict[int, bytes | None]  # of the fields that follow
VERSION, ALGORITHM, ISSUER, THIS, NEXT, ENTRIES, EXTENSIONS = range(7)


def patched(by: CertificateAuthority, list_: bytes, changes: Changes, key: Any = None) -> bytes:
    """The list with other fields, signed again; None takes a field away."""
    fields: list[bytes | None] = [*split(split(list_)[0])]
    for at, value in changes.items():
        fields[at] = value
    tbs = sequence(*(field for field in fields if field is not None))
    return resigned(tbs, key or by.signer._key)


def extension(dotted: str, value: bytes, critical: bool = False) -> bytes:
    der_oid = x509.ObjectIdentifier(dotted)
    packed = x509.Extension(der_oid, critical, x509.UnrecognizedExtension(der_oid, value))
    named = encoded_oid(packed.oid.dotted_string)
    return sequence(named, *([b"\x01\x01\xff"] if critical else []), tlv(0x04, value))


def encoded_oid(dotted: str) -> bytes:
    assert dotted.startswith("2.5.29.")  # each number below 128
    return tlv(0x06, bytes([0x55, 0x1D, int(dotted.rsplit(".", 1)[1])]))


class Listed:
    """An authority with two revoked certificates, and the list that has to be."""

    def __init__(self, kit: Database) -> None:
        self.kit = kit
        self.by = authority(kit, "Listed")
        self.agents = [certified(kit, self.by, f"listed {n}") for n in range(4)]
        kit.run("operator", REVOKE, [self.agents[0].serial, "keyCompromise"])
        kit.run("operator", REVOKE, [self.agents[1].serial, "unspecified"])
        register(kit, self.by.issue(self.agents[3].agent_id, signer("agents").public_key()), "1 hour")
        self.entries = sorted(entries(kit, self.by), key=lambda e: e.reason)
        self.der = self.made(self.entries)
        self.fields = split(split(self.der)[0])
        self.now = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)

    def made(self, entries: Iterable[Revocation], number: int = 1, **options: Any) -> bytes:
        return der(self.by.revocation_list(entries, number, **options))

    def patched(self, changes: Changes, key: Any = None) -> bytes:
        return patched(self.by, self.der, changes, key)

    def times(self, begins: dt.timedelta, ends: dt.timedelta) -> bytes:
        return self.patched({THIS: utc_time(self.now + begins), NEXT: utc_time(self.now + ends)})

    def extended(self, *more: bytes, drop: str = "") -> bytes:
        kept = [
            e for e in split(split(self.fields[EXTENSIONS])[0]) if not drop or encoded_oid(drop) not in e[:10]
        ]
        return self.patched({EXTENSIONS: tlv(0xA0, sequence(*kept, *more))})

    def entry(self, *parts: bytes | None) -> bytes:
        """The first entry with other parts (serial, date, extensions)."""
        first, *others = split(self.fields[ENTRIES])
        pairs = itertools.zip_longest(parts, split(first))
        changed = sequence(*(old if part is None else part for part, old in pairs))
        return self.patched({ENTRIES: sequence(changed, *others)})

    def hashed(self, algorithm: hashes.HashAlgorithm, **options: Any) -> bytes:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.by.certificate.subject)
            .last_update(self.now)
            .next_update(self.now + DAY)
            .add_extension(self.by._authority_key_identifier(), critical=False)
            .add_extension(x509.CRLNumber(1), critical=False)
        )
        for entry in x509.load_der_x509_crl(self.der):
            builder = builder.add_revoked_certificate(entry)
        return der(builder.sign(self.by.signer._key, algorithm, **options))


@pytest.fixture(scope="module")
def listed(kit: Database) -> Listed:
    return Listed(kit)


def altered(entry: Revocation, **changes: Any) -> Revocation:
    return entry._replace(**changes)


SHA384_RSA = SHA256_RSA.replace(b"\x01\x0b", b"\x01\x0c")
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
REFUSED: dict[str, Callable[[Listed], bytes | None]] = {
    "misses one": lambda x: x.made(x.entries[:1]),
    "misses the other": lambda x: x.made(x.entries[1:]),
    "misses all": lambda x: x.made([]),
    "empty sequence of entries": lambda x: x.patched({ENTRIES: sequence()}),
    "lists a stranger": lambda x: x.made([*x.entries, Revocation("0A:0B", x.now, "unspecified")]),
    "lists a good one": lambda x: x.made([*x.entries, Revocation(x.agents[2].serial, x.now, "unspecified")]),
    "lists one whose moment lies ahead": lambda x: x.made(
        [*x.entries, Revocation(x.agents[3].serial, x.now, "superseded")]
    ),
    "lists one of another authority": lambda x: x.made([*x.entries, strange(x)]),
    "lists itself": lambda x: x.made(
        [*x.entries, Revocation(f"{x.by.certificate.serial_number:X}", x.now, "superseded")]
    ),
    "one twice": lambda x: x.made([*x.entries, x.entries[0]]),
    "one twice with two reasons": lambda x: x.made([*x.entries, altered(x.entries[0], reason="superseded")]),
    "one instead of the other": lambda x: x.made([x.entries[0], x.entries[0]]),
    "a second later": lambda x: x.made(
        [altered(x.entries[0], revoked_at=x.entries[0].revoked_at + SECOND), x.entries[1]]
    ),
    "a second earlier": lambda x: x.made(
        [altered(x.entries[0], revoked_at=x.entries[0].revoked_at - SECOND), x.entries[1]]
    ),
    "dates exchanged": lambda x: x.entry(None, utc_time(x.now - DAY)),
    "another reason": lambda x: x.made([altered(e, reason="superseded") for e in x.entries]),
    "a reason where there is none": lambda x: x.made([altered(e, reason="keyCompromise") for e in x.entries]),
    "no reason where there is one": lambda x: x.made([altered(e, reason="unspecified") for e in x.entries]),
    "on hold": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x0a\x01\x06"))),
    "removed": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x0a\x01\x08"))),
    "reason 11": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x0a\x01\x0b"))),
    "reason -1": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x0a\x01\xff"))),
    "reason 257": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x0a\x02\x01\x01"))),
    "reason an integer": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b"\x02\x01\x01"))),
    "reason nothing": lambda x: x.entry(None, None, sequence(extension("2.5.29.21", b""))),
    "entry with a critical issuer": lambda x: x.entry(
        None, None,
        sequence(extension("2.5.29.21", b"\x0a\x01\x01"), extension("2.5.29.29", b"\x30\x00", True)),
    ),
    "entry with four parts": lambda x: x.entry(None, None, None, b"\x05\x00"),
    "entry of nothing": lambda x: x.patched({ENTRIES: sequence(sequence())}),
    "entry that is a number": lambda x: x.patched({ENTRIES: sequence(b"\x02\x01\x01")}),
    "negative serial": lambda x: x.entry(b"\x02\x01\xff"),
    "serial zero": lambda x: x.entry(b"\x02\x01\x00"),
    "serial of 21 bytes": lambda x: x.entry(tlv(0x02, b"\x01" * 21)),
    "date of no day": lambda x: x.entry(None, tlv(0x17, b"250230000000Z")),
    "date as text": lambda x: x.entry(None, tlv(0x0C, b"250228000000Z")),
    "another issuer": lambda x: x.patched({ISSUER: der_name("Somebody")}),
    "issuer in other letters": lambda x: x.patched({ISSUER: der_name("LISTED")}),
    "empty issuer": lambda x: x.patched({ISSUER: sequence()}),
    "issuer of another authority": lambda x: x.patched({ISSUER: _ca().certificate.subject.public_bytes()}),
    "signed by another": lambda x: x.patched({}, signer("impostor")._key),
    "signed by a pinned one": lambda x: x.patched({}, _ca().signer._key),
    "signed by an agent": lambda x: x.patched({}, signer("agents")._key),
    "of an authority that is not pinned": lambda x: der(
        CertificateAuthority.create(signer("impostor"), "Listed").revocation_list(x.entries, 1)
    ),
    "sha384": lambda x: x.hashed(hashes.SHA384()),
    "sha512": lambda x: x.hashed(hashes.SHA512()),
    "pss": lambda x: x.hashed(hashes.SHA256(), rsa_padding=PSS),
    "another algorithm outside": lambda x: sequence(
        split(x.der)[0], SHA384_RSA, split(x.der)[2]
    ),
    "another algorithm inside": lambda x: x.patched({ALGORITHM: SHA384_RSA}),
    "an algorithm without its null": lambda x: x.patched({ALGORITHM: sequence(SHA256_RSA[2:-2])}),
    "signature changed": lambda x: x.der[:-1] + bytes([x.der[-1] ^ 1]),
    "signature cut": lambda x: sequence(*split(x.der)[:2], tlv(0x03, split(x.der)[2][5:-1])),
    "no signature": lambda x: sequence(*split(x.der)[:2], tlv(0x03, b"\0")),
    "signature of unused bits": lambda x: sequence(*split(x.der)[:2], tlv(0x03, b"\x04" + b"\xf0" * 256)),
    "no version": lambda x: x.patched({VERSION: None}),
    "version 1": lambda x: x.patched({VERSION: b"\x02\x01\x00"}),
    "version 3": lambda x: x.patched({VERSION: b"\x02\x01\x02"}),
    "no next update": lambda x: x.patched({NEXT: None}),
    "no this update": lambda x: x.patched({THIS: None}),
    "no extensions": lambda x: x.patched({EXTENSIONS: None}),
    "extensions in [1]": lambda x: x.patched({EXTENSIONS: b"\xa1" + x.fields[EXTENSIONS][1:]}),
    "two lists of extensions": lambda x: x.patched(
        {EXTENSIONS: tlv(0xA0, *split(x.fields[EXTENSIONS]), sequence())}
    ),
    "one field more": lambda x: x.patched({EXTENSIONS: x.fields[EXTENSIONS] + b"\x05\x00"}),
    "expired": lambda x: x.times(-2 * DAY, -MINUTE),
    "ahead of time": lambda x: x.times(10 * MINUTE, DAY),
    "ends before it begins": lambda x: x.times(0 * DAY, -SECOND),
    "for too long": lambda x: x.times(0 * DAY, 90 * DAY + SECOND),
    "generalized time too early": lambda x: x.patched({THIS: generalized("20250101000000Z")}),
    "time with a fraction": lambda x: x.patched({THIS: generalized("20550101000000.5Z")}),
    "time with an offset": lambda x: x.patched({THIS: tlv(0x17, b"250101000000+0000")}),
    "time without seconds": lambda x: x.patched({THIS: tlv(0x17, b"2501010000Z")}),
    "time of nothing": lambda x: x.patched({THIS: tlv(0x17)}),
    "hour 24": lambda x: x.patched({THIS: tlv(0x17, b"250101240000Z")}),
    "second 60": lambda x: x.patched({THIS: tlv(0x17, b"250101000060Z")}),
    "year 9999": lambda x: x.patched({NEXT: generalized("99991231235959Z")}),
    "no number": lambda x: x.extended(drop="2.5.29.20"),
    "number zero": lambda x: x.extended(extension("2.5.29.20", b"\x02\x01\x00"), drop="2.5.29.20"),
    "number negative": lambda x: x.extended(extension("2.5.29.20", b"\x02\x01\xfe"), drop="2.5.29.20"),
    "number too long": lambda x: x.extended(extension("2.5.29.20", tlv(2, b"\x01" * 21)), drop="2.5.29.20"),
    "number no integer": lambda x: x.extended(extension("2.5.29.20", b"\x0c\x01\x31"), drop="2.5.29.20"),
    "number twice": lambda x: x.extended(extension("2.5.29.20", b"\x02\x01\x09")),
    "number with something after it": lambda x: x.extended(
        extension("2.5.29.20", b"\x02\x01\x09\x05\x00"), drop="2.5.29.20"
    ),
    "no key id": lambda x: x.extended(drop="2.5.29.35"),
    "empty key id": lambda x: x.extended(extension("2.5.29.35", b"\x30\x00"), drop="2.5.29.35"),
    "key id of another authority": lambda x: x.extended(
        extension("2.5.29.35", sequence(tlv(0x80, bytes.fromhex(_ca().key_id.replace(":", ""))))),
        drop="2.5.29.35",
    ),
    "delta": lambda x: x.extended(extension("2.5.29.27", b"\x02\x01\x01", True)),
    "of one distribution point": lambda x: x.extended(extension("2.5.29.28", b"\x30\x00", True)),
    "of agents only": lambda x: x.extended(extension("2.5.29.28", b"\x30\x03\x81\x01\xff", True)),
    "unknown critical": lambda x: x.extended(extension("2.5.29.99", b"\x05\x00", True)),
    "a certificate": lambda x: x.by.der,
    "nothing": lambda x: b"",
    "null": lambda x: None,
    "text": lambda x: b"revoked: none",
    "pem": lambda x: x509.load_der_x509_crl(x.der).public_bytes(serialization.Encoding.PEM),
    "zeros": lambda x: bytes(1000),
    "a byte after it": lambda x: x.der + b"\0",
    "a byte before it": lambda x: b"\0" + x.der,
    "half": lambda x: x.der[: len(x.der) // 2],
    "twice": lambda x: x.der * 2,
    "indefinite length": lambda x: b"\x30\x80" + x.der[4:] + b"\0\0",
    "length in more bytes": lambda x: b"\x30\x83\x00" + x.der[2:],
    "length of four bytes": lambda x: b"\x30\x84\x00\x00" + x.der[2:],
    "deep": lambda x: functools.reduce(lambda inner, _: sequence(inner), range(40), b""),
    "8 MiB and a byte": lambda x: bytes(8388609),
}  # fmt: skip


def der_name(common_name: str) -> bytes:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)]).public_bytes()


def strange(listed: Listed) -> Revocation:
    """A certificate revoked here, of another authority."""
    agent = listed.kit.agent()
    agent.revoke()
    at, reason = revocation(listed.kit, agent.serial)
    assert at
    assert reason
    return Revocation(agent.serial, at, reason)


@pytest.mark.parametrize("how", REFUSED)
def test_another_list_is_refused(kit: Database, listed: Listed, how: str) -> None:
    made = REFUSED[how](listed)
    with changes_nothing(kit), refused("KA010"):
        kit.run("registrar", PUBLISH, [made])
    assert due(kit, listed.by) == 1


ACCEPTED: dict[str, Callable[[Listed], bytes]] = {
    "as it is": lambda x: x.der,
    "turned round": lambda x: x.made(x.entries[::-1]),
    "put together by hand": lambda x: x.patched({}),
    "unspecified said": lambda x: x.patched({ENTRIES: sequence(*(
        e if len(split(e)) == 3 else sequence(*split(e), sequence(extension("2.5.29.21", b"\x0a\x01\x00")))
        for e in split(x.fields[ENTRIES])
    ))}),
    "clocks that differ": lambda x: x.times(4 * MINUTE, DAY),
    "for 90 days": lambda x: x.times(0 * DAY, 90 * DAY),
    "one more extension that is not critical": lambda x: x.extended(extension("2.5.29.99", b"\x05\x00")),
}  # fmt: skip


@pytest.mark.parametrize("how", ACCEPTED)
def test_so_it_was_that_for_which_they_were_refused(kit: Database, listed: Listed, how: str) -> None:
    with kit.connect("registrar") as registrar:
        assert one(registrar, PUBLISH, [ACCEPTED[how](listed)]) == 1
        registrar.rollback()


def damaged(source: random.Random, data: bytes) -> bytes:
    """With one to three changes."""
    out = bytearray(data)
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        at = source.randrange(len(out))
        kind = source.randrange(6)
        if kind == 0:
            out[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            out[at] = source.choice([0, 1, 2, 5, 0x17, 0x18, 0x30, 0x7F, 0x80, 0x81, 0x84, 0xA0, 0xFF])
        elif kind == 2:
            del out[at : at + source.choice([1, 1, 2, 5, 20])]
        elif kind == 3:
            out[at:at] = source.randbytes(source.choice([1, 1, 2, 5]))
        elif kind == 4:
            out[at : at + source.randrange(20)] = out[at - source.randrange(at + 1) :][: source.randrange(20)]
        else:
            out = out[: max(at, 1)]
        out = out or bytearray(1)
    return bytes(out)


def reshaped(source: random.Random, data: bytes, depth: int = 0) -> bytes:
    """DER with elements changed, left out, doubled or exchanged, its lengths right again."""
    constructed = data[0] in (0x30, 0x31) or 0xA0 <= data[0] <= 0xBE
    if not constructed or (depth and source.random() < 0.1):
        return damaged(source, data) if source.random() < 0.5 else bytes([source.randrange(256)]) + data[1:]
    children = split(data)
    if not children or source.random() < 0.1:
        return tlv(data[0], *children, b"\x05\x00")
    at, other = source.randrange(len(children)), source.randrange(len(children))
    how = source.randrange(10)
    if how == 0:
        del children[at]
    elif how == 1:
        children.insert(at, children[other])
    elif how == 2:
        children[at], children[other] = children[other], children[at]
    else:
        children[at] = reshaped(source, children[at], depth + 1)
    return tlv(data[0], *children)


def test_no_damage_gives_another_error_or_another_list(kit: Database, listed: Listed) -> None:
    """Thousands of damaged lists, some signed again, so that what comes after the signature is reached.
    What is accepted all the same must say the same to another reader."""
    source = random.Random(45)
    key = listed.by.signer._key
    tbs = split(listed.der)[0]
    lists = [damaged(source, listed.der) for _ in range(1800)]
    lists += [source.randbytes(source.randrange(1, 300)) for _ in range(200)]
    lists += [resigned(damaged(source, tbs), key) for _ in range(500)]
    lists += [resigned(reshaped(source, tbs), key) for _ in range(1200)]
    with changes_nothing(kit), kit.connect("registrar") as registrar:
        registrar.execute("set statement_timeout = '60s'")
        registrar.execute(
            "create function pg_temp.try(bytea) returns text language plpgsql as $$ begin"
            " perform kakunin.publish_crl($1); raise exception 'undone' using errcode = 'KK000';"
            " exception when others then return sqlstate; end $$"
        )
        rows = registrar.execute(
            "select pg_temp.try(l) from unnest(%s::bytea[]) with ordinality as u(l, at) order by at", [lists]
        ).fetchall()
        registrar.rollback()
    outcomes = [row[0] for row in rows]
    assert set(outcomes) == {"KA010", "KK000"}
    accepted = [made for made, outcome in zip(lists, outcomes, strict=True) if outcome == "KK000"]
    assert 1 <= len(accepted) < 400
    right = {(e.serial, e.revoked_at.replace(microsecond=0), e.reason) for e in listed.entries}
    public_key = listed.by.signer.public_key()
    for made in accepted:
        read = x509.load_der_x509_crl(made)
        assert read.is_signature_valid(public_key)
        assert read.issuer == listed.by.certificate.subject
        said = set()
        for entry in read:
            reasons = [e.value.reason.value for e in entry.extensions if isinstance(e.value, x509.CRLReason)]
            serial = normalize_serial(entry.serial_number)
            said.add((serial, entry.revocation_date_utc, *(reasons or ["unspecified"])))
        assert said == right


# A linter's opinion

FINDINGS = {
    # It is how RFC 5280 section 4.2.1.2 suggests to make a key identifier.
    ("INFO", "pkix.subject_key_identifier_method_1_identified"): {"root", "middle", "full", "bare"},
    # It takes URLs with a host only. A URN is a URI (RFC 3986 section 1.1.2), with a scheme and what that is
    # specific to, as RFC 5280 section 4.2.1.6 has it.
    ("ERROR", "pkix.invalid_uri_syntax"): {"full", "bare"},
}


def certificate_findings(data: bytes) -> set[tuple[str, str]]:
    validator = pkix_certificate.create_pkix_certificate_validator_container(
        pkix_certificate.create_decoding_validators(
            pkix_name.ATTRIBUTE_TYPE_MAPPINGS, pkix_extension.EXTENSION_MAPPINGS
        ),
        [
            pkix_certificate.create_issuer_validator_container([]),
            pkix_certificate.create_validity_validator_container(),
            pkix_certificate.create_subject_validator_container([]),
            pkix_certificate.create_extensions_validator_container([]),
            pkix_certificate.create_spki_validator_container([]),
        ],
    )
    document = loader.RFC5280CertificateDocumentLoader().load_der_document(data, "certificate")
    return findings(validator.validate(document.root))


def list_findings(data: bytes) -> set[tuple[str, str]]:
    validator = pkix_crl.create_pkix_crl_validator_container(
        [
            pkix.create_attribute_decoder(pkix_name.ATTRIBUTE_TYPE_MAPPINGS),
            pkix.create_extension_decoder(pkix_extension.EXTENSION_MAPPINGS),
        ],
        [
            pkix_crl.create_issuer_validator_container([]),
            pkix_crl.create_validity_validator_container([]),
            pkix_crl.create_extensions_validator_container([]),
        ],
    )
    document = loader.RFC5280CertificateListDocumentLoader().load_der_document(data, "list")
    return findings(validator.validate(document.root))


def findings(results: Any) -> set[tuple[str, str]]:
    return {
        (str(description.finding.severity), description.finding.code)
        for result in results
        for description in result.finding_descriptions
    }


def test_a_linter_finds_nothing_but_what_is_listed_here() -> None:
    root = CertificateAuthority.create(
        signer("Root"), "Root", path_length=1, crl_url="http://a.example/r.crl"
    )
    middle = CertificateAuthority.create(
        signer("Middle"), "\u65e5\u672c CA", issuer=root, crl_url="http://a.example/m.crl"
    )
    full = middle.issue(
        uuid.uuid4(), signer("agents").public_key(), permitted_actions=["trade:*", "orders:read"], **FACTS,
        financial_scope={"daily_limit_usd": 1},
    )  # fmt: skip
    bare = CertificateAuthority.create(signer("Root"), "Root").issue(
        uuid.uuid4(), signer("agents").public_key()
    )
    documents = {"root": root.der, "middle": middle.der, "full": full.der, "bare": bare.der}
    found: dict[tuple[str, str], set[str]] = {}
    for name, data in documents.items():
        for finding in certificate_findings(data):
            found.setdefault(finding, set()).add(name)
    assert found == FINDINGS
    at = dt.datetime.now(dt.timezone.utc)
    revoked = [Revocation(f"{n:02X}:01", at, reason) for n, reason in enumerate(REASONS, 1)]
    lists = [middle.revocation_list(revoked, 2**100), root.revocation_list([], 1)]
    assert [list_findings(der(made)) for made in lists] == [set(), set()]
    # It does find what is wrong.
    wrong = x509.CertificateRevocationListBuilder().issuer_name(root.certificate.subject)
    wrong = wrong.last_update(at).next_update(at + DAY)
    assert list_findings(der(wrong.sign(signer("Root")._key, hashes.SHA256())))


# Distrust -------------------------------------------------------------------------------------------

COMPROMISED = ["keyCompromise", "cACompromise"]


@pytest.mark.parametrize("reason", REASONS)
def test_distrust_reaches_all_that_is_below(kit: Database, reason: str) -> None:
    root = authority(kit, f"D root {reason}", path_length=2)
    middle = authority(kit, f"D middle {reason}", root, path_length=1)
    bottom = authority(kit, f"D bottom {reason}", middle)
    sibling = authority(kit, f"D sibling {reason}", root)
    agents = {by.key_id: certified(kit, by) for by in (root, middle, bottom, sibling)}
    gone = certified(kit, bottom)
    at = kit.value("operator", REVOKE, [gone.serial, "superseded"])
    for by in (root, middle, bottom):
        publish(kit, by)
    revoked = kit.value("operator", DISTRUST, [middle.key_id, reason])
    below = {middle.key_id, bottom.key_id}
    expected = sorted(agents[k].serial for k in below) if reason in COMPROMISED else []
    assert sorted(revoked) == expected
    for key_id, agent in agents.items():
        assert usable(kit, agent.serial) == ("KA002" if agent.serial in expected else "yes")
        with changes_nothing(kit) if key_id in below else contextlib.nullcontext():
            by = next(b for b in (root, middle, bottom, sibling) if b.key_id == key_id)
            new = by.issue(agent.agent_id, agent.signer.public_key())
            with refused("KA010", match="not trusted here") if key_id in below else contextlib.nullcontext():
                register(kit, new, "1 hour")
    assert revocation(kit, gone.serial) == (at, "superseded")
    why = dict(kit.run("operator", "select key_id, distrust_reason from kakunin.authorities"))
    assert [why[b.key_id] for b in (root, middle, bottom, sibling)] == [None, reason, reason, None]
    # Final, also for its renewal; and nothing is pinned below it any more.
    renewed = CertificateAuthority.create(middle.signer, f"D middle {reason}", issuer=root, path_length=1)
    under = CertificateAuthority.create(signer("under"), "Under", issuer=middle)
    for made in (middle, renewed, under):
        with changes_nothing(kit), refused("KA010"):
            kit.run("operator", "select kakunin.trust_ca(%s)", [made.der])
    # What is compromised has no word in lists. Otherwise it still says what it revoked; and each is on the
    # list of the one above it.
    due_now = [by for by in (root, middle, bottom) if due(kit, by)]
    assert due_now == ([root] if reason in COMPROMISED else [root, middle])
    listed = [(e.serial, e.reason) for e in entries(kit, root)]
    assert listed == [(normalize_serial(middle.certificate.serial_number), reason)]
    publish(kit, root)
    if reason in COMPROMISED:
        with refused("KA010", match="not an authority that is trusted here"):
            publish(kit, middle, 2)
    else:
        publish(kit, middle)
        agents[middle.key_id].revoke()
        assert due(kit, middle) == 3
        assert len(list(publish(kit, middle))) == 2


def test_distrust_of_a_root(kit: Database) -> None:
    root = authority(kit, "A root")
    agent = certified(kit, root)
    assert kit.value("operator", DISTRUST, [root.key_id, "keyCompromise"]) == [agent.serial]
    assert revocation(kit, agent.serial)[1] == "cACompromise"
    with changes_nothing(kit), refused("KA010"):
        kit.run("operator", "select kakunin.trust_ca(%s)", [root.der])
    assert due(kit, root) is None


@pytest.mark.parametrize("reason", COMPROMISED)
def test_what_was_distrusted_for_less_may_turn_out_to_be_compromised(kit: Database, reason: str) -> None:
    root = authority(kit, f"Upgrade root {reason}", path_length=1)
    middle = authority(kit, f"Upgrade {reason}", root)
    agent = certified(kit, middle)
    assert kit.value("operator", DISTRUST, [middle.key_id, "superseded"]) == []
    since = "select distrusted_at, distrust_reason from kakunin.authorities where key_id = %s"
    at, why = kit.run("operator", since, [middle.key_id])[0]
    assert why == "superseded"
    assert due(kit, middle) == 1
    assert kit.value("operator", DISTRUST, [middle.key_id, reason]) == [agent.serial]
    assert kit.run("operator", since, [middle.key_id]) == [(at, reason)]
    assert due(kit, middle) is None
    with refused("KA010"):
        publish(kit, middle, 1)
    with changes_nothing(kit):
        assert kit.value("operator", DISTRUST, [middle.key_id, "superseded"]) == []  # not back again


@pytest.mark.parametrize(
    ("key_id", "reason"),
    [
        ("AA:BB:CC:DD:EE:FF:00:11", "superseded"), (None, "superseded"), ("", "superseded"),
        ("{}", None), ("{}", "certificateHold"), ("{}", ""), ("{lower}", "superseded"),
    ],
)  # fmt: skip
def test_what_cannot_be_distrusted(kit: Database, key_id: str | None, reason: str | None) -> None:
    own = authority(kit, "Refusing").key_id
    given = key_id.format(own, lower=own.lower()) if key_id else key_id
    with changes_nothing(kit), refused("KA010"):
        kit.run("operator", DISTRUST, [given, reason])


@pytest.mark.parametrize("level", LEVELS)
def test_distrust_is_not_decided_on_an_old_snapshot(kit: Database, level: str) -> None:
    by = authority(kit, f"Snapshot {level}")
    with kit.connect("operator") as operator:
        operator.execute(f"set transaction isolation level {level}")
        with refused("KA010", match="READ COMMITTED"):
            operator.execute(DISTRUST, [by.key_id, "keyCompromise"])


@pytest.mark.parametrize("warm", [0, 7])
def test_distrust_waits_for_a_registration_and_reaches_it(kit: Database, warm: int) -> None:
    by = authority(kit, f"Waiting {warm}")
    new = [kit.value("registrar", "select kakunin.create_agent('x')") for _ in range(warm + 2)]
    issued = [by.issue(agent_id, signer("agents").public_key()) for agent_id in new]
    with kit.connect("registrar") as registrar, kit.connect("operator", autocommit=True) as operator:
        for certificate in issued[:warm]:  # so that its plans are made
            registrar.execute(REGISTER, [certificate.der, None])
        registrar.commit()
        registrar.execute(REGISTER, [issued[warm].der, None])
        meanwhile = Meanwhile(operator, DISTRUST, [by.key_id, "keyCompromise"])
        meanwhile.waits(kit)
        registrar.commit()
        assert sorted(meanwhile.result()) == sorted(i.serial for i in issued[: warm + 1])
        # And the other way round.
        other = authority(kit, f"Waited for {warm}")
        late = other.issue(new[-1], signer("agents").public_key())
        with operator.transaction():
            operator.execute(DISTRUST, [other.key_id, "keyCompromise"])
            meanwhile = Meanwhile(registrar, REGISTER, [late.der, None])
            meanwhile.waits(kit)
        assert meanwhile.result() == "KA010"
        registrar.rollback()


def test_only_operators_distrust_revoke_and_halt(kit: Database) -> None:
    agent = kit.agent()
    calls: list[tuple[str, list[Any]]] = [
        (DISTRUST, [_ca().key_id, "superseded"]),
        (REVOKE, [agent.serial, "superseded"]),
        (HALT, [agent.agent_id, "why"]),
    ]
    for role in [*ROLES, "public"]:
        for query, arguments in calls:
            with as_role(kit, role) as connection:
                with refused("42501") if role != "operator" else contextlib.nullcontext():
                    connection.execute(query, arguments)
    assert usable(kit, agent.serial) == "yes"


# Halting --------------------------------------------------------------------------------------------


def test_a_halt_is_one_transaction(kit: Database) -> None:
    agent = kit.agent()
    second = kit.renew(agent, HOUR)
    revoked = sorted([agent.serial, second.serial])
    with kit.connect("gateway") as session, kit.connect("operator") as operator:
        session.execute(BIND, [second.serial])
        with changes_nothing(kit):
            one(operator, HALT, [agent.agent_id, "odd trades"])
            assert one(session, SERIAL) == second.serial
            operator.rollback()
            assert one(session, SERIAL) == second.serial
        before = now(kit)
        told = one(operator, HALT, [agent.agent_id, "odd trades"])
        assert one(session, SERIAL) == second.serial
        operator.commit()
        assert one(session, SERIAL) is None
        with refused("KA002"):
            session.execute("select kakunin.require_session()")
    assert told["certificates_revoked"] == revoked
    assert (told["agent_id"], told["hint"]) == (str(agent.agent_id), None)
    assert (told["backends_terminated"], told["backends_not_terminated"]) == (0, 0)
    at = dt.datetime.fromisoformat(told["halted_at"])
    assert before <= at <= now(kit)
    row = kit.run(
        "auditor" if "auditor" in LOGINS else "operator",
        "select agent_id, reason, serials, halted_at, halted_by, receipt, key_id, signature, signed_at"
        " from kakunin.halts where halt_id = %s",
        [told["halt_id"]],
    )
    assert row == [(agent.agent_id, "odd trades", revoked, at, "operator", told["receipt"], None, None, None)]
    assert json.loads(told["receipt"]) == {
        "agent_id": str(agent.agent_id), "certificates": revoked, "halt_id": told["halt_id"],
        "halted_at": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"), "halted_by": "operator",
        "installation": str(kit.installation_id), "reason": "odd trades", "type": "kakunin.halt",
    }  # fmt: skip
    assert [revocation(kit, s)[1] for s in revoked] == ["privilegeWithdrawn"] * 2
    suspended = "select suspended_reason from kakunin.agents where agent_id = %s"
    assert kit.value("operator", suspended, [agent.agent_id]) == "odd trades"


def test_reinstating_does_not_revive_certificates(kit: Database) -> None:
    agent = kit.agent()
    kit.run("operator", HALT, [agent.agent_id, "why"])
    with refused("KA008"):
        register(kit, another(agent))
    kit.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert usable(kit, agent.serial) == "KA002"
    new = another(agent)
    register(kit, new)
    assert usable(kit, new.serial) == "yes"


def test_a_halt_revokes_what_is_to_come_and_leaves_what_has_ended(
    kit: Database, clock: Callable[[Any], None]
) -> None:
    expired = kit.agent(lifetime=HOUR)
    clock(2 * HOUR)
    revoked = Agent(kit, another(expired), expired.signer)
    register(kit, revoked.issued)
    at = kit.value("operator", REVOKE, [revoked.serial, "superseded"])
    active = another(expired)
    register(kit, active)
    coming = another(expired, not_before=dt.datetime.now(dt.timezone.utc) + DAY)
    register(kit, coming, "30 days")
    told = kit.value("operator", HALT, [expired.agent_id, "why"])
    assert told["certificates_revoked"] == sorted([active.serial, coming.serial])
    assert revocation(kit, expired.serial) == (None, None)
    assert revocation(kit, revoked.serial) == (at, "superseded")


def test_halting_twice_is_recorded_twice(kit: Database) -> None:
    agent = kit.agent()
    first = kit.value("operator", HALT, [agent.agent_id, "first"])
    moment = revocation(kit, agent.serial)
    second = kit.value("operator", HALT, [agent.agent_id, "second"])
    assert second["certificates_revoked"] == json.loads(second["receipt"])["certificates"] == []
    assert first["halt_id"] != second["halt_id"]
    assert revocation(kit, agent.serial) == moment
    rows = "select reason from kakunin.halts where agent_id = %s order by halted_at"
    assert kit.run("operator", rows, [agent.agent_id]) == [("first",), ("second",)]
    suspended = "select suspended_reason from kakunin.agents where agent_id = %s"
    assert kit.value("operator", suspended, [agent.agent_id]) == "first"


def test_two_halts_at_once(kit: Database) -> None:
    agent = kit.agent()
    with kit.connect("operator") as first, kit.connect("operator", autocommit=True) as second:
        one(first, HALT, [agent.agent_id, "first"])
        meanwhile = Meanwhile(second, HALT, [agent.agent_id, "second"])
        meanwhile.waits(kit)
        first.commit()
        assert meanwhile.result()["certificates_revoked"] == []


def test_a_halt_under_an_old_snapshot_reaches_the_next_statement_too(kit: Database) -> None:
    agent = kit.agent()
    with kit.connect("gateway") as session:
        session.execute("set transaction isolation level repeatable read")
        session.execute(BIND, [agent.serial])
        kit.run("operator", HALT, [agent.agent_id, "why"])
        assert one(session, SERIAL) is None


@pytest.mark.parametrize(
    ("agent", "reason", "terminate"),
    [
        ("none", "why", False), ("unknown", "why", False), ("one", None, False), ("one", "", False),
        ("one", " \n\t", False), ("one", "x" * 1001, False), ("one", "why", None),
    ],
)  # fmt: skip
def test_what_cannot_be_halted(kit: Database, agent: str, reason: str | None, terminate: bool | None) -> None:
    agent_id = {"none": None, "unknown": uuid.uuid4(), "one": kit.agent().agent_id}[agent]
    with changes_nothing(kit), refused("KA010"):
        kit.run("operator", "select kakunin.halt_agent(%s, %s, %s)", [agent_id, reason, terminate])


def test_an_agent_without_a_certificate_can_be_halted(kit: Database) -> None:
    agent_id = create(kit)
    told = kit.value("operator", HALT, [agent_id, "before it begins"])
    assert told["certificates_revoked"] == []
    with refused("KA008"):
        register(kit, _ca().issue(agent_id, signer("agents").public_key()))


# Receipts

HOSTILE = [
    "plain", 'quotes " and \\ and / and \'', '","type":"kakunin.halt","reason":"', "\x01\x02\x1f\x7f\x80\x9f",
    "\b\t\n\x0b\f\r x", "\u2028 \u2029 \u00a0 \ufeff", "\U0001f6d1 \U0010ffff \ud7ff \ue000 \uffff",
    "\\u0041 \\n \\", "</script><!--", "\u65e5\u672c\u8a9e \u05d0 e\u0301 \u00e9", "x" * 1000,
    "\U0001f6d1" * 1000, "{}", "null", "%s %n $1 ${x}",
]  # fmt: skip


@pytest.mark.parametrize("reason", HOSTILE, ids=ascii)
def test_a_receipt_is_canonical_and_openssl_verifies_it(kit: Database, tmp_path: Path, reason: str) -> None:
    agent = kit.agent()
    receipt = kit.value("operator", HALT, [agent.agent_id, reason])["receipt"]
    content = json.loads(receipt)
    assert rfc8785.dumps(content) == receipt.encode()
    assert content["reason"] == reason
    signature = _ca().sign_receipt(receipt)
    kit.run("registrar", SIGN_HALT, [content["halt_id"], _ca().key_id, signature])
    (tmp_path / "receipt.json").write_bytes(receipt.encode())
    (tmp_path / "signature").write_bytes(signature)
    public_key = _ca().certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )  # fmt: skip
    (tmp_path / "key.pem").write_bytes(public_key)
    check = ["dgst", "-sha256", "-verify", tmp_path / "key.pem", "-signature", tmp_path / "signature"]
    assert openssl(*check, tmp_path / "receipt.json") == (0, "Verified OK\n")
    (tmp_path / "receipt.json").write_bytes(receipt.encode() + b"\n")
    assert openssl(*check, tmp_path / "receipt.json")[0] == 1


def test_logins_with_hostile_names_are_in_receipts_too(kit: Database) -> None:
    name = 'op "\\\n\u2028\U0001f6d1'
    quoted = psycopg.sql.Identifier(name)
    agent = kit.agent()
    with kit.connect("postgres", autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("create role {} login in role kakunin_operator").format(quoted))
        try:
            admin.execute(psycopg.sql.SQL("set session authorization {}").format(quoted))
            receipt = one(admin, HALT, [agent.agent_id, "why"])["receipt"]
        finally:
            admin.execute("reset session authorization")
            admin.execute(psycopg.sql.SQL("drop role {}").format(quoted))
    content = json.loads(receipt)
    assert content["halted_by"] == name
    assert rfc8785.dumps(content) == receipt.encode()


def halted(kit: Database) -> dict[str, Any]:
    """The content of the receipt of a new halt."""
    content: dict[str, Any] = json.loads(
        kit.value("operator", HALT, [kit.agent().agent_id, "why"])["receipt"]
    )
    return content


def text(content: Any) -> str:
    return rfc8785.dumps(content).decode()


NO_RECEIPTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda r: "",
    "a certificate": lambda r: split(_ca().der)[0].decode("latin-1"),
    "its bytes": lambda r: split(_ca().der)[0],
    "a list": lambda r: split(der(_ca().revocation_list([], 1)))[0].decode("latin-1"),
    "an assertion": lambda r: "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJ4In0",
    "a text": lambda r: '"kakunin.halt"',
    "a list of one": lambda r: text([r]),
    "a number": lambda r: "1",
    "no type": lambda r: text({k: v for k, v in r.items() if k != "type"}),
    "another type": lambda r: text(r | {"type": "kakunin.head"}),
    "the type alone": lambda r: text({"type": "kakunin.halt"}),
    "no reason": lambda r: text({k: v for k, v in r.items() if k != "reason"}),
    "one member more": lambda r: text(r | {"x": "y"}),
    "blanks": lambda r: json.dumps(r, sort_keys=True),
    "another order": lambda r: json.dumps(dict(reversed(r.items())), separators=(",", ":")),
    "a blank after it": lambda r: text(r) + " ",
    "a line end after it": lambda r: text(r) + "\n",
    "escaped where it need not be": lambda r: text(r).replace("why", "\\u0077hy"),
    "a member twice": lambda r: text(r).replace('{"agent_id"', '{"agent_id":"x","agent_id"'),
    "a number too large": lambda r: text(r).replace('"why"', "9007199254740993"),
    "not a number": lambda r: text(r).replace('"why"', "NaN"),
    "a surrogate": lambda r: text(r).replace("why", "\udc80"),
    "an escaped surrogate": lambda r: text(r).replace("why", "\\udc80"),
    "deep": lambda r: "[" * 200_000,
    "deep inside": lambda r: text(r).replace('"why"', "[" * 5_000 + "]" * 5_000),
}


@pytest.mark.parametrize("what", NO_RECEIPTS)
def test_an_authority_signs_no_other_text_as_a_receipt(kit: Database, what: str) -> None:
    content = halted(kit)
    assert _ca().sign_receipt(text(content))
    with pytest.raises(BadInputError, match="not the receipt of a halt"):
        _ca().sign_receipt(NO_RECEIPTS[what](content))


def test_a_receipts_signature_is_verified_before_it_is_kept(kit: Database) -> None:
    content = halted(kit)
    halt_id, receipt = content["halt_id"], text(content)
    right = _ca().sign_receipt(receipt)
    other = authority(kit, "Other signer")
    gone = authority(kit, "Gone signer")
    kit.run("operator", DISTRUST, [gone.key_id, "superseded"])
    stranger = CertificateAuthority.create(signer("impostor"), "Impostor")
    for key_id, signature in [
        (other.key_id, right),
        (_ca().key_id, other.sign_receipt(receipt)),
        (gone.key_id, gone.sign_receipt(receipt)),
        (stranger.key_id, stranger.sign_receipt(receipt)),
        (_ca().key_id, _ca().sign_receipt(text(content | {"reason": "another"}))),
        (_ca().key_id, _ca().sign_receipt(text(halted(kit)))),
        (_ca().key_id, right[:-1]),
        (_ca().key_id, right + b"\0"),
        (_ca().key_id, b""),
        (_ca().key_id, None),
        (_ca().key_id.lower(), right),
        (None, right),
    ]:
        with changes_nothing(kit), refused("KA010"):
            kit.run("registrar", SIGN_HALT, [halt_id, key_id, signature])
    for unknown in (None, uuid.uuid4()):
        with changes_nothing(kit), refused("KA010", match="no halt"):
            kit.run("registrar", SIGN_HALT, [unknown, _ca().key_id, right])
    kit.run("registrar", SIGN_HALT, [halt_id, _ca().key_id, right])
    kept = "select key_id, signature, signed_at is not null from kakunin.halts where halt_id = %s"
    assert kit.run("operator", kept, [halt_id]) == [(_ca().key_id, right, True)]
    # The first stays, also where another is as true; and a false one is still refused.
    with changes_nothing(kit):
        kit.run("registrar", SIGN_HALT, [halt_id, other.key_id, other.sign_receipt(receipt)])
        with refused("KA010"):
            kit.run("registrar", SIGN_HALT, [halt_id, other.key_id, right])
    # Distrust of the one that signed does not take a signature away.
    with kit.connect("operator") as operator:
        operator.execute(DISTRUST, [_ca().key_id, "superseded"])
        assert operator.execute(kept, [halt_id]).fetchall() == [(_ca().key_id, right, True)]
        operator.rollback()


@pytest.mark.parametrize("role", [*ROLES, "public"])
def test_who_may_read_halts_and_sign_them(kit: Database, role: str) -> None:
    content = halted(kit)
    signature = _ca().sign_receipt(text(content))
    for roles, query, arguments in (
        ({"registrar", "operator", "worker", "auditor"}, "select receipt from kakunin.halts", None),
        ({"registrar", "operator", "worker"}, SIGN_HALT, [content["halt_id"], _ca().key_id, signature]),
    ):
        with as_role(kit, role) as connection:
            with refused("42501") if role not in roles else contextlib.nullcontext():
                connection.execute(query, arguments)


def test_nobody_but_the_owner_changes_a_halt(kit: Database) -> None:
    halted(kit)
    for statement in ("update kakunin.halts set reason = 'x'", "delete from kakunin.halts"):
        for login in ("operator", "registrar"):
            with changes_nothing(kit), refused("42501"):
                kit.run(login, statement)


def test_a_registration_in_progress_is_waited_for(kit: Database) -> None:
    """So that a halt leaves no certificate behind. Nothing else delays one: test_attack_halt.py."""
    agent = kit.agent()
    new = another(agent)
    with kit.connect("registrar") as registrar, kit.connect("operator", autocommit=True) as operator:
        registrar.execute(REGISTER, [new.der, "1 hour"])
        meanwhile = Meanwhile(operator, HALT, [agent.agent_id, "why"])
        meanwhile.waits(kit)
        registrar.commit()
        assert meanwhile.result()["certificates_revoked"] == sorted([agent.serial, new.serial])
    assert usable(kit, new.serial) == "KA002"
