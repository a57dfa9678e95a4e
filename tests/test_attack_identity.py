"""Attacks on identity: G4. No certificate is registered that a pinned authority's key did not sign as it is.

Whoever attacks has a login and may send any SQL. Nobody but the owner reaches the tables,
so what is left is to
bring a certificate that is not genuine, to bring one at the wrong moment,
or to change what the functions see. Each
attack is next to the same thing done properly, which works.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Database, _ca, fresh_database
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from forge import (
    ACTIONS,
    AUTHORITY_ID,
    DAY,
    MODEL,
    SCOPE,
    SHA256_RSA,
    SUBJECT_ID,
    TENANT,
    URN,
    Authority,
    Certificate,
    Parts,
    authority,
    certified,
    modulus,
    name,
    oid,
    rsa_key,
    sequence,
    split,
    tlv,
    utf8,
)

Connection = psycopg.Connection[Any]

REGISTER = "select kakunin.register_certificate(%s)"
OVERLAPPING = "select kakunin.register_certificate(%s, '1 hour')"
TRUST = "select kakunin.trust_ca(%s)"
DENIED = "42501"
REFUSED = "KA010"
LOGINS = ["registrar", "gateway", "agent_1", "operator", "stranger"]


def pinned() -> Authority:
    """The authority every database trusts, with its key."""
    ca = _ca()
    return Authority(
        ca.signer._key, ca.certificate.subject, bytes.fromhex(ca.key_id.replace(":", "")), ca.der
    )


def start() -> dt.datetime:
    return _ca().certificate.not_valid_before_utc


def genuine(agent_id: uuid.UUID, number: int = 41, **changes: Any) -> Certificate:
    """A certificate of the pinned authority."""
    end = start() + 90 * DAY
    changes = {"not_before": start(), "not_after": end, **changes}
    return certified(pinned(), agent_id, rsa_key(number).public_key(), **changes)


def new_agent(database: Database, **agent: Any) -> uuid.UUID:
    arguments = {"name": "attacked", **agent}
    named = ", ".join(f"{key} => %({key})s" for key in arguments)
    return database.value("registrar", f"select kakunin.create_agent({named})", arguments)


_owners: dict[str, Connection] = {}


@pytest.fixture(scope="module")
def database(database: Database) -> Iterator[Database]:
    """The module's, with a connection kept open that looks what has changed."""
    with database.connect("installer", autocommit=True) as owner:
        _owners[database.name] = owner
        yield database
        del _owners[database.name]


def state(database: Database) -> Any:
    """All that says who may do what."""
    query = (
        "select (select jsonb_agg(to_jsonb(a) order by agent_id) from kakunin_private.agents a),"
        " (select jsonb_agg(to_jsonb(c) order by serial) from kakunin_private.certificates c),"
        " (select jsonb_agg(to_jsonb(i) order by key_id) from kakunin_private.authorities i)"
    )
    if database.name in _owners:
        return _owners[database.name].execute(query).fetchall()
    return database.run("installer", query)


@contextmanager
def nothing_changes(database: Database) -> Iterator[None]:
    before = state(database)
    yield
    assert state(database) == before


def sqlstate(database: Database, login: str, query: str, params: Any = None) -> str:
    """'' or the SQLSTATE of one statement as this login; when it fails, nothing has changed."""
    before = state(database)
    try:
        database.run(login, query, params)
    except psycopg.Error as error:
        assert state(database) == before
        return error.sqlstate or "?"
    return ""


def registered(database: Database, agent_id: uuid.UUID) -> list[tuple[Any, ...]]:
    query = (
        "select serial, permitted_actions, not_after, tenant from kakunin.certificates where agent_id = %s"
    )
    return database.run("registrar", query, [agent_id])


# What is not genuine ------------------------------------------------------------------------------------


def own(certificate: Certificate, **issuer: Any) -> Certificate:
    """Signed with a key of one's own, under whatever name and key id."""
    known = {"key": rsa_key(50), "subject": name("Attacker"), "key_id": None, **issuer}
    made = certificate.changed(issuer=Authority(**known))
    return made.put(AUTHORITY_ID, x509.AuthorityKeyIdentifier(made.issuer.key_id, None, None))


NOT_GENUINE: dict[str, Callable[[Certificate], Certificate]] = {
    "self-signed": lambda c: own(c.changed(public_key=rsa_key(50).public_key()), subject=c.subject),
    "of one's own authority": own,
    "of an authority of the same name": lambda c: own(c, subject=c.issuer.subject),
    "of an authority of the same key id": lambda c: own(c, key_id=c.issuer.key_id),
    "of an authority of the same name and key id": lambda c: own(
        c, subject=c.issuer.subject, key_id=c.issuer.key_id
    ),
    "signed with the agent's own key": lambda c: own(
        c.changed(public_key=rsa_key(50).public_key()), subject=c.issuer.subject, key_id=c.issuer.key_id
    ),
    "naming no key": lambda c: own(c, subject=c.issuer.subject).put(AUTHORITY_ID, None),
}


@pytest.mark.parametrize("how", NOT_GENUINE)
def test_g4_a_certificate_that_the_pinned_key_did_not_sign(database: Database, how: str) -> None:
    agent_id = new_agent(database)
    certificate = genuine(agent_id)
    forged = NOT_GENUINE[how](certificate).der
    for login in LOGINS:
        assert sqlstate(database, login, REGISTER, [forged]) == (REFUSED if login == "registrar" else DENIED)
    assert registered(database, agent_id) == []
    for login in LOGINS[1:]:
        assert sqlstate(database, login, REGISTER, [certificate.der]) == DENIED
    assert sqlstate(database, "registrar", REGISTER, [certificate.der]) == ""


def edited(der: bytes, edit: Callable[[Parts], Any]) -> bytes:
    """What is signed changed, and the signature as it was."""
    tbs, algorithm, bits = split(der)
    parts = Parts(split(tbs), algorithm, rsa_key(50))
    edit(parts)
    return sequence(sequence(*parts.fields), parts.algorithm, bits)


def put_extension(parts: Parts, dotted: str, value: bytes) -> None:
    made = sequence(oid(dotted), tlv(4, value))
    parts.extensions = [e for e in parts.extensions if split(e)[0] != oid(dotted)] + [made]


def longer(validity: bytes) -> bytes:
    """By a year."""
    first, last = split(validity)
    return sequence(first, last[:2] + b"%02d" % (int(last[2:4]) + 1) + last[4:])


OTHER = uuid.UUID(int=7)
EDITS: dict[str, Callable[[Parts], Any]] = {
    "a wider scope": lambda p: put_extension(p, ACTIONS, sequence(utf8("everything:*"))),
    "a wider scope of the same length": lambda p: p.__dict__.update(
        fields=split(sequence(*p.fields).replace(b"orders:read", b"orders:*aaa"))
    ),
    "one more action": lambda p: put_extension(
        p, ACTIONS, sequence(*map(utf8, ("orders:read", "vault:*", "a")))
    ),
    "a longer validity": lambda p: p.fields.__setitem__(4, longer(p.fields[4])),
    "another serial": lambda p: p.fields.__setitem__(1, b"\2\1\1"),
    "another key": lambda p: p.fields.__setitem__(
        6, split(split(genuine(OTHER, 51).der)[0])[6]
    ),
    "another agent": lambda p: put_extension(p, URN, utf8(f"urn:kakunin:agent:{OTHER}")),
    "a tenant": lambda p: put_extension(p, TENANT, utf8("acme")),
    "a financial scope": lambda p: put_extension(p, SCOPE, utf8('{"daily_limit_usd": 1000000}')),
    "a model": lambda p: put_extension(p, MODEL, sequence(utf8("m"), utf8("sha256:" + "0" * 64))),
    "no extKeyUsage": lambda p: setattr(p, "extensions", p.extensions[:2] + p.extensions[3:]),
    "another order": lambda p: setattr(p, "extensions", p.extensions[::-1]),
}  # fmt: skip


@pytest.mark.parametrize("what", EDITS)
def test_g4_what_was_signed_is_edited(database: Database, what: str) -> None:
    agent_id = new_agent(database)
    der = genuine(agent_id).der
    changed = edited(der, EDITS[what])
    assert changed != der
    assert sqlstate(database, "registrar", REGISTER, [changed]) == REFUSED
    # Nor once the genuine one is there, in its place or after it.
    assert sqlstate(database, "registrar", REGISTER, [der]) == ""
    before = registered(database, agent_id)
    for query in (REGISTER, OVERLAPPING):
        assert sqlstate(database, "registrar", query, [changed]) == REFUSED
    assert registered(database, agent_id) == before
    assert before[0][1:] == (["orders:read", "vault:*"], start() + 90 * DAY, None)


def test_g4_the_signature_of_one_certificate_for_another(database: Database) -> None:
    one, two = new_agent(database), new_agent(database)
    (tbs, algorithm, bits), (other, _, other_bits) = split(genuine(one).der), split(genuine(two).der)
    for der in (sequence(tbs, algorithm, other_bits), sequence(other, algorithm, bits)):
        assert sqlstate(database, "registrar", REGISTER, [der]) == REFUSED
    for der in (sequence(tbs, algorithm, bits), sequence(other, algorithm, other_bits)):
        assert sqlstate(database, "registrar", REGISTER, [der]) == ""


def test_g4_what_the_authority_signed_for_another_purpose(database: Database) -> None:
    """Lists of revocations and authorities below it are signed with the same key, and are not agents."""
    agent_id = new_agent(database)
    crl = _ca().revocation_list([], 1)
    below = authority(rsa_key(52), "below", issuer=pinned(), not_before=start(), not_after=start() + DAY)[
        1
    ].der
    (tbs, algorithm, bits) = split(crl.public_bytes(serialization.Encoding.DER))
    certificate = genuine(agent_id).der
    for der in (
        sequence(tbs, algorithm, bits), below, _ca().der, sequence(split(certificate)[0], algorithm, bits),
        sequence(tbs, SHA256_RSA, split(certificate)[2]),
    ):  # fmt: skip
        assert sqlstate(database, "registrar", REGISTER, [der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [certificate]) == ""


def test_g4_an_agent_of_another_installation(cluster: Cluster, database: Database) -> None:
    with fresh_database(cluster) as other:  # which trusts the same authority
        agent_id = new_agent(other)
        der = genuine(agent_id).der
        assert sqlstate(database, "registrar", REGISTER, [der]) == REFUSED
        assert sqlstate(other, "registrar", REGISTER, [der]) == ""
        # And one that trusts another.
        theirs, certificate = authority(rsa_key(53), "Theirs", not_after=start() + 900 * DAY)
        assert sqlstate(other, "operator", TRUST, [certificate.der]) == ""
        here, there = new_agent(database), new_agent(other)
        assert sqlstate(database, "registrar", REGISTER, [certified(theirs, here).der]) == REFUSED
        assert sqlstate(other, "registrar", REGISTER, [certified(theirs, there).der]) == ""
    assert sqlstate(database, "registrar", REGISTER, [genuine(here).der]) == ""


def test_g4_an_agents_key_issues_nothing(database: Database) -> None:
    agent_id = new_agent(database)
    leaf = genuine(agent_id, 54)
    holder = Authority(rsa_key(54), leaf.subject)
    leaf.put(SUBJECT_ID, x509.SubjectKeyIdentifier(holder.key_id or b""))
    assert sqlstate(database, "registrar", REGISTER, [leaf.der]) == ""
    other = new_agent(database)
    for issuer in (
        holder,
        Authority(rsa_key(54), leaf.subject, pinned().key_id),
        Authority(rsa_key(54), pinned().subject, pinned().key_id),
    ):
        assert sqlstate(database, "registrar", REGISTER, [certified(issuer, other).der]) == REFUSED
    # Nor does an operator make an authority of it.
    _, claimed = authority(rsa_key(54), str(agent_id))
    _, signed = authority(rsa_key(54), "below", issuer=pinned(), not_before=start(), not_after=start() + DAY)
    for certificate in (leaf, claimed, signed):
        assert sqlstate(database, "operator", TRUST, [certificate.der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [genuine(other).der]) == ""


# Whom to trust ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", [login for login in LOGINS if login != "operator"])
def test_g4_only_an_operator_says_whom_to_trust(database: Database, login: str) -> None:
    made, certificate = authority(rsa_key(55), f"Of {login}")
    assert sqlstate(database, login, TRUST, [certificate.der]) == DENIED
    for call in ("kakunin.trust_ca('\\x00')", f"kakunin.distrust_ca('{_ca().key_id}')"):
        for query in (
            f"select {call}",
            f"do $$ begin perform {call}; end $$",
            f"set role kakunin_operator; select {call}",
            f"create function pg_temp.f() returns text language sql security definer as"
            f" $$ select {call}::text $$; select pg_temp.f()",
        ):
            assert sqlstate(database, login, query) == DENIED
    agent_id = new_agent(database)
    assert sqlstate(database, "registrar", REGISTER, [certified(made, agent_id).der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).der]) == ""


def test_g4_what_an_operator_trusts_signs(cluster: Cluster) -> None:
    """The control of the tests around it."""
    with fresh_database(cluster) as database:
        made, certificate = authority(rsa_key(55), "Trusted")
        assert sqlstate(database, "operator", TRUST, [certificate.der]) == ""
        assert sqlstate(database, "registrar", REGISTER, [certified(made, new_agent(database)).der]) == ""


def usurper() -> Authority:
    """Another key under the pinned authority's name and key id."""
    return Authority(rsa_key(56), pinned().subject, pinned().key_id)


def renewed(**changes: Any) -> Certificate:
    """The pinned authority's certificate made anew, ten days longer."""
    ca = _ca()
    end = ca.certificate.not_valid_after_utc + 10 * DAY
    same = {"key_id": pinned().key_id, "path_length": 0, "not_before": start(), "not_after": end}
    _, certificate = authority(pinned().key, "x", **same)
    certificate.subject = pinned().subject
    certificate.issuer = pinned()
    return certificate.changed(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        # another key, signed with it
        lambda: {"public_key": rsa_key(56).public_key(), "issuer": usurper()},
        # another key, signed with the old one
        lambda: {"public_key": rsa_key(56).public_key()},
        # the old key, signed with another
        lambda: {"issuer": usurper()},
        # the old key under another name
        lambda: {
            "subject": name("Renamed"), "issuer": Authority(pinned().key, name("Renamed"), pinned().key_id),
        },
        # expired, and not good yet: it would be nobody's authority from now on
        lambda: {"not_before": start() - 2 * DAY, "not_after": start() - DAY},
        lambda: {"not_before": start() + DAY},
    ],
    ids=["its own key", "another key", "another signer", "another name", "expired", "not yet"],
)  # fmt: skip
def test_g4_renewal_puts_no_other_in_the_authoritys_place(
    cluster: Cluster, changes: Callable[[], dict[str, Any]]
) -> None:
    with fresh_database(cluster) as database:
        assert sqlstate(database, "operator", TRUST, [renewed(**changes()).der]) == REFUSED
        agent_id = new_agent(database)
        assert sqlstate(database, "registrar", REGISTER, [certified(usurper(), agent_id).der]) == REFUSED
        assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).der]) == ""
        assert sqlstate(database, "operator", TRUST, [renewed().der]) == ""
        query = "select not_after from kakunin.authorities where key_id = %s"
        assert database.value("operator", query, [_ca().key_id]) == renewed().not_after
        assert sqlstate(database, "registrar", REGISTER, [genuine(new_agent(database)).der]) == ""
        # Distrust is final: not even the genuine renewal brings it back.
        database.run("operator", "select kakunin.distrust_ca(%s)", [_ca().key_id])
        assert sqlstate(database, "operator", TRUST, [renewed().der]) == REFUSED
        assert sqlstate(database, "operator", TRUST, [_ca().der]) == REFUSED
        assert sqlstate(database, "registrar", REGISTER, [genuine(new_agent(database)).der]) == REFUSED


# At the wrong moment ------------------------------------------------------------------------------------


def test_g4_a_suspended_agent_gets_no_certificate(database: Database) -> None:
    agent_id = new_agent(database)
    der = genuine(agent_id).der
    database.run("operator", "select kakunin.suspend_agent(%s, 'why')", [agent_id])
    for query in (REGISTER, OVERLAPPING):
        assert sqlstate(database, "registrar", query, [der]) == "KA008"
    for login in ("registrar", "agent_1", "gateway"):
        assert sqlstate(database, login, "select kakunin.reinstate_agent(%s)", [agent_id]) == DENIED
    database.run("operator", "select kakunin.reinstate_agent(%s)", [agent_id])
    assert sqlstate(database, "registrar", REGISTER, [der]) == ""


def test_g4_what_was_revoked_or_superseded_does_not_come_back(database: Database) -> None:
    agent_id = new_agent(database)
    first, second = genuine(agent_id).der, genuine(agent_id, 42).der
    assert sqlstate(database, "registrar", REGISTER, [first]) == ""
    assert sqlstate(database, "registrar", OVERLAPPING, [second]) == ""
    for der in (first, second):
        for query in (REGISTER, OVERLAPPING):
            assert sqlstate(database, "registrar", query, [der]) == REFUSED
    for serial, *_ in registered(database, agent_id):
        database.run("operator", "select kakunin.revoke_certificate(%s)", [serial])
    for der in (first, second):
        assert sqlstate(database, "registrar", REGISTER, [der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id, 43).der]) == ""


def test_g4_what_was_issued_before_is_too_late_after(database: Database) -> None:
    """What was issued and not registered cannot be revoked: it must not outlast a later one's revocation."""
    agent_id = new_agent(database)
    wide = genuine(agent_id).put(ACTIONS, sequence(utf8("everything:*")))
    narrow = genuine(agent_id, 42, not_before=start() + dt.timedelta(seconds=1))
    assert sqlstate(database, "registrar", REGISTER, [narrow.der]) == ""
    assert sqlstate(database, "registrar", OVERLAPPING, [wide.der]) == REFUSED
    database.run("operator", "select kakunin.revoke_certificate(%s)", [registered(database, agent_id)[0][0]])
    assert sqlstate(database, "registrar", REGISTER, [wide.der]) == REFUSED
    again = genuine(agent_id, 43, not_before=start() + dt.timedelta(seconds=1))
    assert sqlstate(database, "registrar", REGISTER, [again.der]) == ""


def test_g4_a_compromised_key_gets_no_other_certificate(database: Database) -> None:
    agent_id, other = new_agent(database), new_agent(database)
    assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id, 57).der]) == ""
    revoke = "select kakunin.revoke_certificate(%s, 'keyCompromise')"
    database.run("operator", revoke, [registered(database, agent_id)[0][0]])
    for whose in (agent_id, other):
        assert sqlstate(database, "registrar", REGISTER, [genuine(whose, 57).der]) == REFUSED
        assert sqlstate(database, "registrar", REGISTER, [genuine(whose, 58).der]) == ""


def test_g4_a_registrar_who_changes_the_agent_widens_nothing(database: Database) -> None:
    """It may say that the agent is another's. What the certificate said is then revoked, and the next is the
    authority's to sign."""
    agent_id = new_agent(database, tenant="poor")
    poor = genuine(agent_id).put(TENANT, utf8("poor"))
    assert sqlstate(database, "registrar", REGISTER, [poor.der]) == ""
    serial = registered(database, agent_id)[0][0]
    database.run("registrar", "select kakunin.update_agent(%s, tenant => 'rich')", [agent_id])
    status = database.value("registrar", "select kakunin.verify_certificate(%s) ->> 'status'", [serial])
    assert status == "revoked"
    richer = edited(poor.der, lambda p: put_extension(p, TENANT, utf8("rich")))
    for der in (poor.der, richer, genuine(agent_id).put(TENANT, utf8("poor")).der):
        assert sqlstate(database, "registrar", REGISTER, [der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).put(TENANT, utf8("rich")).der]) == ""


# At once ------------------------------------------------------------------------------------------------


def all_at_once(database: Database, login: str, calls: list[tuple[str, Any]]) -> list[str]:
    """'' or the SQLSTATE of each, all sent at the same moment on connections of their own."""
    found: list[str] = [""] * len(calls)
    barrier = threading.Barrier(len(calls))

    def call(at: int) -> None:
        with database.connect(login, autocommit=True) as connection:
            barrier.wait(timeout=30)
            try:
                connection.execute(*calls[at])
            except psycopg.Error as error:
                found[at] = error.sqlstate or "?"

    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found


@pytest.mark.parametrize("round_", range(3))
def test_g4_of_many_at_once_one_is_registered(database: Database, round_: int) -> None:
    agent_id = new_agent(database)
    der = genuine(agent_id).der
    assert sorted(all_at_once(database, "registrar", [(REGISTER, [der])] * 8)) == ["", *[REFUSED] * 7]
    # Different ones for one agent
    agent_id = new_agent(database)
    calls = [(REGISTER, [genuine(agent_id, 41 + n).der]) for n in range(8)]
    assert sorted(all_at_once(database, "registrar", calls)) == ["", *[REFUSED] * 7]
    assert len(registered(database, agent_id)) == 1
    # One serial for different agents
    agents = [new_agent(database) for _ in range(8)]
    serial = int.from_bytes(uuid.uuid4().bytes, "big") >> 8
    calls = [(REGISTER, [genuine(agent, serial=serial).der]) for agent in agents]
    assert sorted(all_at_once(database, "registrar", calls)) == ["", *[REFUSED] * 7]
    # One after the other, as they come: one is active in the end
    agent_id = new_agent(database)
    calls = [(OVERLAPPING, [genuine(agent_id, 41 + n).der]) for n in range(8)]
    assert all_at_once(database, "registrar", calls) == [""] * 8
    query = "select count(*) from kakunin.certificates where agent_id = %s and revoked_at is null"
    assert database.value("registrar", query, [agent_id]) == 1


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_g4_an_old_snapshot_registers_nothing(database: Database, level: str) -> None:
    """It would not see that the agent has a certificate or is suspended, or the authority distrusted."""
    agent_id = new_agent(database)
    with database.connect("registrar") as old:
        old.execute(f"set transaction isolation level {level}")
        old.execute("select count(*) from kakunin.agents")
        assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).der]) == ""
        with nothing_changes(database), pytest.raises(psycopg.Error) as caught:
            old.execute(REGISTER, [genuine(agent_id, 42).der])
    assert caught.value.sqlstate in (REFUSED, "40001")
    assert len(registered(database, agent_id)) == 1


@contextmanager
def waiting(database: Database, login: str, query: str, params: Any) -> Iterator[list[str]]:
    """Begins a statement that has to wait for what is open; its outcome is in the list afterwards."""
    outcome: list[str] = []
    with database.connect(login, autocommit=True) as connection:

        def call() -> None:
            try:
                connection.execute(query, params)
                outcome.append("")
            except psycopg.Error as error:
                outcome.append(error.sqlstate or "?")

        thread = threading.Thread(target=call)
        thread.start()
        blocked = "select pg_blocking_pids(%s) <> '{}'"
        end = time.monotonic() + 30
        while not database.value("postgres", blocked, [connection.info.backend_pid]):
            assert thread.is_alive(), outcome
            assert time.monotonic() < end
        yield outcome
        thread.join(timeout=30)
        assert outcome


def test_g4_distrust_reaches_what_is_being_registered(cluster: Cluster) -> None:
    with fresh_database(cluster) as database:
        made, certificate = authority(rsa_key(59), "Compromised")
        database.run("operator", TRUST, [certificate.der])
        agent_id = new_agent(database)
        distrust = "select kakunin.distrust_ca(%s, 'keyCompromise')"
        with database.connect("registrar") as registrar:
            registrar.execute(REGISTER, [certified(made, agent_id).der])
            with waiting(database, "operator", distrust, [made.text_id]) as outcome:
                registrar.commit()
        assert outcome == [""]
        serial = registered(database, agent_id)[0][0]
        status = database.value("operator", "select kakunin.verify_certificate(%s) ->> 'status'", [serial])
        assert status == "revoked"
        # The other way round: what comes while it is being distrusted is not registered.
        made, certificate = authority(rsa_key(60), "Also compromised")
        database.run("operator", TRUST, [certificate.der])
        agent_id = new_agent(database)
        with database.connect("operator") as operator:
            operator.execute(distrust, [made.text_id])
            with waiting(database, "registrar", REGISTER, [certified(made, agent_id).der]) as outcome:
                operator.commit()
        assert outcome == [REFUSED]
        assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).der]) == ""


def test_g4_suspension_reaches_what_is_being_registered(database: Database) -> None:
    agent_id = new_agent(database)
    der = genuine(agent_id).der
    with database.connect("operator") as operator:
        operator.execute("select kakunin.suspend_agent(%s, 'why')", [agent_id])
        with waiting(database, "registrar", REGISTER, [der]) as outcome:
            operator.commit()
    assert outcome == ["KA008"]
    database.run("operator", "select kakunin.reinstate_agent(%s)", [agent_id])
    with database.connect("registrar") as registrar:
        registrar.execute(REGISTER, [der])
        halt = "select kakunin.halt_agent(%s, 'why')"
        with waiting(database, "operator", halt, [agent_id]) as outcome:
            registrar.commit()
    assert outcome == [""]
    query = "select revoked_at is not null from kakunin.certificates where agent_id = %s"
    assert database.run("operator", query, [agent_id]) == [(True,)]


# What the functions see ---------------------------------------------------------------------------------

SHADOWS = """
create temp table agents (agent_id uuid, name text, suspended_at timestamptz, tenant text, model text);
create temp table certificates (serial text, agent_id uuid, revoked_at timestamptz, not_after timestamptz);
create temp table authorities (key_id text, public_key_modulus bytea, subject bytea, distrusted_at date);
create temp table pg_proc (x int);
create domain pg_temp.bytea as text;
create domain pg_temp.jsonb as text;
create domain pg_temp.uuid as text;
create domain pg_temp.timestamptz as text;
create domain pg_temp."interval" as text;
create domain pg_temp."numeric" as integer;
create domain pg_temp.x509_certificate as text;
create function pg_temp.sha256(bytea) returns bytea language sql as $$ select '\\x00'::pg_catalog.bytea $$;
create function pg_temp.clock() returns pg_catalog.timestamptz
  language sql as $$ select 'infinity'::pg_catalog.timestamptz $$;
create function pg_temp.rsa_pkcs1_sha256_verify(bytea, bigint, bytea, bytea) returns boolean
  language sql as $$ select true $$;
create schema SCHEMA;
create function SCHEMA.sha256(pg_catalog.bytea) returns pg_catalog.bytea
  language sql as $$ select '\\x00'::pg_catalog.bytea $$;
create function SCHEMA.get_byte(pg_catalog.bytea, integer) returns integer language sql as $$ select 48 $$;
create function SCHEMA.octet_length(pg_catalog.bytea) returns integer language sql as $$ select 1 $$;
create function SCHEMA.never(pg_catalog.bytea, pg_catalog.bytea) returns boolean
  language sql as $$ select false $$;
create operator SCHEMA.<> (leftarg = pg_catalog.bytea, rightarg = pg_catalog.bytea, function = SCHEMA.never);
create function SCHEMA.always(pg_catalog.numeric, pg_catalog.numeric) returns boolean
  language sql as $$ select true $$;
create operator SCHEMA.= (
  leftarg = pg_catalog.numeric, rightarg = pg_catalog.numeric, function = SCHEMA.always);
"""
PATHS = [
    "pg_temp, SCHEMA, kakunin, kakunin_private, pg_catalog",
    "SCHEMA, pg_temp, pg_catalog",
    "pg_temp",
    "",
]


@pytest.mark.parametrize("path", PATHS)
def test_g4_objects_of_ones_own_in_the_way(database: Database, path: str) -> None:
    schema = f"shadow_{uuid.uuid4().hex[:8]}"
    database.run("postgres", f"grant create on database {database.name} to registrar")
    agent_id = new_agent(database)
    certificate = genuine(agent_id).put(SCOPE, utf8('{"daily_limit_usd": 1}'))
    with database.connect("registrar", autocommit=True) as connection:
        for statement in SHADOWS.replace("SCHEMA", schema).strip().split(";\n"):
            connection.execute(statement.encode())
        connection.execute("select set_config('search_path', %s, false)", [path.replace("SCHEMA", schema)])
        for how in ("of one's own authority", "of an authority of the same name and key id"):
            with nothing_changes(database), pytest.raises(psycopg.Error) as caught:
                connection.execute(REGISTER, [NOT_GENUINE[how](certificate).der])
            assert caught.value.sqlstate == REFUSED
        connection.execute(REGISTER, [certificate.der])
    assert registered(database, agent_id)[0][1:] == (["orders:read", "vault:*"], start() + 90 * DAY, None)


SETTINGS = {
    "standard_conforming_strings": "off", "bytea_output": "escape", "timezone": "UTC+167",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard", "transform_null_equals": "on", "extra_float_digits": "-15",
    "backslash_quote": "on", "array_nulls": "off", "lc_numeric": "C", "xmlbinary": "hex",
    "default_text_search_config": "simple", "session_replication_role": "replica", "row_security": "off",
    "check_function_bodies": "off", "plan_cache_mode": "force_generic_plan", "enable_seqscan": "off",
    "escape_string_warning": "off", "client_encoding": "LATIN1", "timezone_abbreviations": "India",
    "plpgsql.variable_conflict": "use_variable", "plpgsql.extra_errors": "all",
    "default_transaction_read_only": "on",
    "jit_above_cost": "0", "work_mem": "64",
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_g4_settings_of_ones_own(database: Database, setting: str) -> None:
    """What a session may set decides nothing, and changes nothing that is stored."""
    agent_id = new_agent(database, tenant="\u00e9")
    scope = '{"daily_limit_usd": 0.1}'
    certificate = genuine(agent_id).put(TENANT, utf8("\u00e9")).put(SCOPE, utf8(scope))
    der, other = certificate.der, certificate.der  # with serials of their own
    with database.connect("registrar", autocommit=True) as connection:
        try:
            connection.execute("select set_config(%s, %s, false)", [setting, SETTINGS[setting]])
        except psycopg.errors.InsufficientPrivilege:
            return  # it is not the registrar's to set
        forged = NOT_GENUINE["of an authority of the same name and key id"](certificate)
        for wrong in (forged.der, edited(der, EDITS["a longer validity"]), der[:-1]):
            with nothing_changes(database), pytest.raises(psycopg.Error) as caught:
                connection.execute(REGISTER, [wrong])
            assert caught.value.sqlstate in (REFUSED, "25006")
        if setting == "default_transaction_read_only":
            connection.execute(f"set {setting} = off")
        connection.execute(OVERLAPPING, [der])
        connection.execute(OVERLAPPING, [other])
    rows = database.run(
        "installer",
        "select serial, der = %s or der = %s, not_before, not_after, public_key_modulus, permitted_actions,"
        " tenant, financial_scope, revoked_at"
        " from kakunin_private.certificates where agent_id = %s order by registered_at",
        [der, other, agent_id],
    )
    expected = (
        start(), start() + 90 * DAY, modulus(rsa_key(41).public_key()), ["orders:read", "vault:*"], "\u00e9",
        {"daily_limit_usd": 0.1},
    )  # fmt: skip
    assert [row[1:8] for row in rows] == [(True, *expected)] * 2
    registered_at = database.value("installer", "select now()")
    assert dt.timedelta(minutes=50) < rows[0][8] - registered_at < dt.timedelta(minutes=61)
    assert rows[1][8] is None


# Past the functions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", [*LOGINS, "app", "pooled"])
def test_g4_nobody_reaches_the_tables_and_the_functions_behind(database: Database, login: str) -> None:
    tables = database.run(
        "installer",
        "select relname from pg_class where relnamespace = 'kakunin_private'::regnamespace and relkind = 'r'",
    )
    functions = database.run(
        "installer",
        "select proname, array(select format_type(t, null) from unnest(proargtypes) t)"
        " from pg_proc where pronamespace = 'kakunin_private'::regnamespace",
    )
    assert len(tables) >= 6
    assert len(functions) >= 40
    attempts = []
    for (table,) in tables:
        attempts += [
            f"select * from kakunin_private.{table}", f"insert into kakunin_private.{table} default values",
            f"delete from kakunin_private.{table}", f"truncate kakunin_private.{table}",
            f"do $$ begin lock table kakunin_private.{table}; end $$",
            f"alter table kakunin_private.{table} rename to x",
            f"copy kakunin_private.{table} to stdout",
            f"create trigger t after insert on kakunin_private.{table} execute function pg_temp.t()",
        ]  # fmt: skip
    for function, types in functions:
        arguments = ", ".join("null" if "kakunin_private" in t else f"null::{t}" for t in types)
        attempts.append(f"select kakunin_private.{function}({arguments})")
    attempts += [
        "set role installer", "set session authorization installer", "grant kakunin_operator to current_user",
        "grant usage on schema kakunin_private to public",
        "alter schema kakunin_private owner to current_user",
        "create or replace function kakunin.register_certificate(der bytea, overlap interval default null)"
        " returns text language sql as $$ select '01' $$",
        "create function kakunin.trust_ca(der text) returns text language sql as $$ select '01' $$",
        "create table kakunin.x (x int)", "drop function kakunin.trust_ca(bytea)",
        "create or replace view kakunin.authorities as select 1 as x",
        "update kakunin.certificates set permitted_actions = '{everything:*}'",
        "insert into kakunin.authorities (key_id) values ('x')", "delete from kakunin.crls",
        "alter function kakunin.trust_ca(bytea) security invoker",
    ]  # fmt: skip
    with nothing_changes(database), database.connect(login, autocommit=True) as connection:
        wrong = []
        for attempt in attempts:
            try:
                connection.execute(attempt.encode())
                wrong.append((attempt, "worked"))
            except psycopg.Error as error:
                if error.sqlstate != DENIED:
                    wrong.append((attempt, error.sqlstate))
    assert wrong == []


def test_g4_who_may_look_up_sees_no_secret_and_agents_see_no_other(database: Database) -> None:
    agent_id = new_agent(database)
    assert sqlstate(database, "registrar", REGISTER, [genuine(agent_id).der]) == ""
    for login in ("agent_1", "gateway", "stranger"):
        for view in ("agents", "certificates", "halts"):
            assert sqlstate(database, login, f"select from kakunin.{view}") == DENIED
    for login in ("agent_1", "gateway"):  # what whoever verifies a signature has to know
        assert database.value(login, "select count(*) from kakunin.authorities") >= 1
    # And the private keys are not in the database at all.
    secret = _ca().signer._key.private_numbers()
    for number in (secret.d, secret.p, secret.q):
        digits = number.to_bytes((number.bit_length() + 7) // 8, "big").hex()
        for table in ("authorities", "certificates", "agents"):
            query = f"select count(*) from kakunin_private.{table} t where t::text like %s"
            assert database.value("installer", query, [f"%{digits}%"]) == 0


def test_g4_an_identity_is_not_chosen(database: Database) -> None:
    """A registrar makes agents, and does not say who they are: an id that another installation's certificates
    name, or that one has in mind, it cannot have."""
    before = {row[0] for row in database.run("registrar", "select agent_id from kakunin.agents")}
    wanted = uuid.uuid4()
    for query in (
        f"select kakunin.create_agent('{wanted}')",
        f"select kakunin.create_agent('x', '{wanted}')",
        f"select kakunin.create_agent('urn:kakunin:agent:{wanted}')",
    ):
        assert sqlstate(database, "registrar", query) == ""
    for query in (
        f"select kakunin.create_agent(agent_id => '{wanted}', name => 'x')",
        f"insert into kakunin.agents (agent_id, name) values ('{wanted}', 'x')",
        f"update kakunin.agents set agent_id = '{wanted}'",
    ):
        assert sqlstate(database, "registrar", query) in (DENIED, "42883")
    made = {row[0] for row in database.run("registrar", "select agent_id from kakunin.agents")} - before
    assert len(made) == 3
    assert wanted not in made
    assert sqlstate(database, "registrar", REGISTER, [genuine(wanted).der]) == REFUSED
    assert sqlstate(database, "registrar", REGISTER, [genuine(new_agent(database)).der]) == ""
