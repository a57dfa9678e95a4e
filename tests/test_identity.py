"""Serials, agents, certificates, and the Python pieces that make them: authority, errors."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import random
import re
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
import sqlalchemy
from conftest import Database, _ca, fresh_database
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from forge import Authority, certified, modulus
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine

from kakunin_db import (
    AgentCertificate,
    BadInputError,
    CertificateAuthority,
    KakuninError,
    LocalSigner,
    ca,
    errors,
    normalize_serial,
)
from kakunin_db.ca import AGENT_URN, PERMITTED_ACTIONS, TENANT
from kakunin_db.resources import sql_dir
from kakunin_db.serve.models import FinancialScope

DAY = dt.timedelta(days=1)
NOW = dt.datetime.now(dt.timezone.utc).replace(microsecond=0)

# Serials --------------------------------------------------------------------------------------------

TWENTY = "7F" + "A5" * 19  # bytes, the longest serial there may be


def colons(digits: str) -> str:
    return ":".join(digits[i : i + 2] for i in range(0, len(digits), 2))


GOOD_SERIALS = {
    "3A:F2:91:CC": "3A:F2:91:CC",
    "3a:f2:91:cc": "3A:F2:91:CC",
    "3af291cc": "3A:F2:91:CC",
    "3aF291cC": "3A:F2:91:CC",
    "0x3AF291CC": "3A:F2:91:CC",
    "0X3af291cc": "3A:F2:91:CC",
    "3A-F2-91-CC": "3A:F2:91:CC",
    "3A F2 91 CC": "3A:F2:91:CC",
    "  3A:F2:91:CC ": "3A:F2:91:CC",
    "00:3A:F2:91:CC": "3A:F2:91:CC",  # DER's sign byte
    "003af291cc": "3A:F2:91:CC",
    "0x3A:F2:91:CC": "3A:F2:91:CC",
    "3:AF": "03:AF",
    "3AF": "03:AF",
    "1": "01",
    "0xF": "0F",
    "a0": "A0",
    "1e5 ": "01:E5",  # hexadecimal, whatever it looks like
    "00:00:01": "01",
    "01:00": "01:00",
    "0100": "01:00",
    TWENTY: colons(TWENTY),
    colons(TWENTY): colons(TWENTY),
    "00:" + colons(TWENTY): colons(TWENTY),
    "0" * 60 + TWENTY: colons(TWENTY),
    # A hundred bytes are looked at.
    "0" * 98 + "3A": "3A",
    " " * 98 + "3A": "3A",
}
BAD_SERIALS = [
    "", " ", "0", "00", "0x", "0x0", "00:00", "0" * 40, ":", "-", "x", "g", "3G", "0x3G", "h3", "null", "NaN",
    # separators
    "3A:", ":3A", "3A::F2", "3A:F", "3A:F29", "3AF:29", "3AF2:91CC", "3A:F2-91", "3A F2:91", "3A-F2 91",
    "3A  F2", "3A.F2", "3A,F2", "3A_F2", "3A/F2", "3A--F2", "3A'F2", "'3A'", "3A;", "\\x3A", "%3A", "3A*",
    # prefixes and signs
    "0x0x3A", "00x3A", "x3A", "0x 3A", "-3A", "+3A",
    # white space that is not the space character
    "3A\tF2", "3A\nF2", "3A:F2\n", "\n3A:F2", "3A:F2\r\n", "\t3A", "3A\x0b", "3A\x1f", "3A\x7f",
    "\u00a03A", "3A\u00a0", "3A\u2003F2", "\u20283A", "3A\u200b", "\ufeff3A",
    # digits and letters of other alphabets, and those that become ASCII in upper case
    "\uff13\uff21", "\u0663\u0661", "\u09e9", "\u00b2", "\u0406", "\u0410\u0412", "\u2160", "\U0001d7d9",
    "\ufb00", "\ufb00\ufb00", "3\ufb00", "\u0131", "\u017f", "a\u0301", "\u24b6",
    # too long
    "1" + TWENTY, "01" + TWENTY, TWENTY + "0", colons("01" + TWENTY), "A" * 100, "A" * 101, " " * 99 + "3A",
    "0" * 99 + "3A", "\u00e9" * 51,
]  # fmt: skip

REFUSED = "KA010"


def in_python(serial: Any) -> str:
    try:
        return normalize_serial(serial)
    except BadInputError:
        return REFUSED


@pytest.fixture(scope="module")
def in_sql(database: Database) -> Iterator[Callable[[list[str | None]], list[str]]]:
    with database.connect("agent_1", autocommit=True) as connection:
        connection.execute(
            "create function pg_temp.try(text) returns text language plpgsql as $$ begin"
            " return kakunin.normalize_serial($1);"
            " exception when sqlstate 'KA010' then return 'KA010'; end $$"
        )

        def normalize(serials: list[str | None]) -> list[str]:
            rows = connection.execute(
                "select pg_temp.try(s) from unnest(%s::text[]) with ordinality as u(s, at) order by at",
                [serials],
            ).fetchall()
            return [row[0] for row in rows]

        yield normalize


def test_common_forms_of_a_serial_become_one(in_sql: Callable[..., list[str]]) -> None:
    forms = list(GOOD_SERIALS)
    assert in_sql(forms) == [in_python(form) for form in forms] == list(GOOD_SERIALS.values())
    # That one stays as it is.
    assert in_sql(list(GOOD_SERIALS.values())) == list(GOOD_SERIALS.values())


@pytest.mark.parametrize("serial", [*BAD_SERIALS, None], ids=ascii)
def test_anything_else_is_refused_in_sql_and_in_python(
    in_sql: Callable[..., list[str]], serial: str | None
) -> None:
    assert in_sql([serial]) == [REFUSED]
    assert in_python(serial) == REFUSED


@pytest.mark.parametrize("collation", ["C", "POSIX", "und-x-icu", "tr-x-icu"])
def test_a_serial_is_read_alike_under_every_collation(database: Database, collation: str) -> None:
    if not database.value("installer", "select count(*) from pg_collation where collname = %s", [collation]):
        pytest.skip(f"this server was built without the collation {collation}")
    for serial, canonical in {"3i": None, "\ufb00": None, "3af291cc": "3A:F2:91:CC"}.items():
        query = f'select kakunin.normalize_serial(%s collate "{collation}")'
        if canonical is not None:
            assert database.value("agent_1", query, [serial]) == canonical
        else:
            with pytest.raises(psycopg.Error) as caught:
                database.value("agent_1", query, [serial])
            assert caught.value.sqlstate == "KA010"


def test_sql_and_python_agree_on_any_text(in_sql: Callable[..., list[str]]) -> None:
    digits = st.text("0123456789abcdefABCDEF", min_size=0, max_size=44)
    pairs = st.lists(st.text("0123456789abcdefABCDEF", min_size=1, max_size=3), max_size=22)
    separated = st.builds(lambda separator, parts: separator.join(parts), st.sampled_from(":- _."), pairs)
    prefixed = st.builds(
        lambda left, prefix, body, right: left + prefix + body + right,
        st.sampled_from(["", "", " ", "\n", "\t", "\u00a0"]),
        st.sampled_from(["", "", "0x", "0X", "00:", "x", "-"]),
        digits | separated,
        st.sampled_from(["", "", " ", "\n", "\r", ":", "\u3000"]),
    )
    confusable = st.text("0aAfF:- xX\n\t\uff10\uff21\u0660\ufb00\u0430\u0391\u017f", max_size=12)
    anything = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=110)

    @settings(max_examples=150, deadline=None, database=None)
    @given(st.lists(prefixed | confusable | anything, min_size=1, max_size=40))
    def agree(serials: list[str]) -> None:
        assert in_sql(serials) == [in_python(serial) for serial in serials]

    agree()


def test_numbers_are_serials_in_python(in_sql: Callable[..., list[str]]) -> None:
    source = random.Random(6)
    numbers = [
        1,
        15,
        16,
        255,
        256,
        2**159,
        2**160 - 1,
        *(source.getrandbits(source.randint(1, 160)) | 1 for _ in range(200)),
    ]
    assert [normalize_serial(n) for n in numbers] == in_sql([f"{n:x}" for n in numbers])
    assert [int(normalize_serial(n).replace(":", ""), 16) for n in numbers] == numbers
    assert [in_python(n) for n in (0, -1, -255, 2**160, 2**400)] == [REFUSED] * 5


# Agents and certificates --------------------------------------------------------------------------------


def state(database: Database) -> Any:
    """All that identity keeps."""
    return database.run(
        "installer",
        "select (select jsonb_agg(to_jsonb(a) order by agent_id) from kakunin_private.agents a),"
        " (select jsonb_agg(to_jsonb(c) order by serial) from kakunin_private.certificates c),"
        " (select jsonb_agg(to_jsonb(i) order by key_id) from kakunin_private.authorities i)",
    )


def refused(database: Database, login: str, query: str, params: Any = None) -> psycopg.Error:
    """The error of a call that must change nothing."""
    before = state(database)
    with pytest.raises(psycopg.Error) as caught:
        database.run(login, query, params)
    assert state(database) == before
    return caught.value


REGISTER = "select kakunin.register_certificate(%s)"
OVERLAPPING = "select kakunin.register_certificate(%s, %s)"
REVOKE = "select kakunin.revoke_certificate(%s)"
REVOKED = "select revoked_at, revocation_reason from kakunin.certificates where serial = %s"

_signer: list[LocalSigner] = []


def _any_signer() -> LocalSigner:
    if not _signer:
        _signer.append(LocalSigner.generate())
    return _signer[0]


def issue(agent_id: uuid.UUID | None = None, **certificate: Any) -> AgentCertificate:
    return _ca().issue(agent_id or uuid.uuid4(), _any_signer().public_key(), **certificate)


def new_agent(database: Database, name: str = "agent", **agent: Any) -> uuid.UUID:
    arguments = {"name": name, **agent}
    named = ", ".join(f"{key} => %({key})s" for key in arguments)
    return database.value("registrar", f"select kakunin.create_agent({named})", arguments)


def for_new_agent(database: Database, **certificate: Any) -> AgentCertificate:
    """A certificate that registers."""
    return issue(new_agent(database), **certificate)


def bindable(database: Database, serial: str) -> str:
    """'yes', or the SQLSTATE that says why this certificate cannot be bound now."""
    try:
        database.run("gateway", "select kakunin.bind_serial(%s)", [serial])
    except psycopg.Error as error:
        return error.sqlstate or ""
    return "yes"


HASH = "sha256:" + "0123456789abcdef" * 4
OTHER_HASH = "sha256:" + "f" * 64


def test_an_agent_and_its_certificate_are_kept_as_given(database: Database) -> None:
    agent = ["Agent \u30ab 'x\"; --", "t" * 200, "m" * 200, "v" * 200, HASH]
    agent_id = database.value("registrar", "select kakunin.create_agent(%s, %s, %s, %s, %s)", agent)
    scope = {"max_single_trade_usd": 1000000.5, "permitted_venues": {"\u30ab": [1, None, True]}}
    actions = ["a", "trade:*", "x.y_z/1-2:B", "a"]
    issued = issue(
        agent_id, tenant="t" * 200, model="m" * 200, model_hash=HASH, permitted_actions=actions,
        financial_scope=scope,
    )  # fmt: skip
    assert database.value("registrar", REGISTER, [issued.der]) == issued.serial
    row = database.run(
        "installer",
        "select a.name, a.tenant, a.model, a.model_version, a.model_hash, a.suspended_at,"
        " c.serial, c.agent_id, c.issuer_key_id, c.der, c.public_key_modulus, c.not_before, c.not_after,"
        " c.model, c.model_hash, c.permitted_actions, c.tenant, c.financial_scope, c.registered_by,"
        " c.revoked_at, c.revocation_reason"
        " from kakunin_private.agents a join kakunin_private.certificates c using (agent_id)"
        " where a.agent_id = %s",
        [agent_id],
    )
    assert row == [(
        *agent, None, issued.serial, agent_id, _ca().key_id, issued.der, modulus(issued.public_key),
        issued.certificate.not_valid_before_utc, issued.certificate.not_valid_after_utc, "m" * 200, HASH,
        actions, "t" * 200, scope, "registrar", None, None,
    )]  # fmt: skip
    assert bindable(database, issued.serial) == "yes"


def test_a_certificate_that_says_little_registers(database: Database) -> None:
    issued = for_new_agent(database)
    database.register(issued)
    query = (
        "select permitted_actions, model, model_hash, tenant, financial_scope"
        " from kakunin.certificates where serial = %s"
    )
    assert database.run("registrar", query, [issued.serial]) == [([], None, None, None, None)]


@pytest.mark.parametrize(
    "agent",
    [
        *({"name": v} for v in (None, "", " ", "x" * 201, "\u00e9" * 201)),
        *({"tenant": v} for v in ("", "  ", "x" * 201)),
        *({"model": v} for v in ("", "\t", "x" * 201)),
        *({"model_version": v} for v in ("", "\n", "x" * 201)),
        {"model_hash": HASH},
        *(
            {"model": "m", "model_hash": v}
            for v in ("", "sha256:", HASH[:-1], HASH + "0", HASH[7:], "sha512:" + HASH[7:], HASH + "\n",
                      "sha256:" + "g" * 64, " " + HASH, "sha256:" + "\uff10" * 64)
        ),
    ],
    ids=lambda a: ascii(a)[:60],
)  # fmt: skip
def test_a_bad_field_makes_and_changes_no_agent(database: Database, agent: dict[str, Any]) -> None:
    arguments = {"name": "x", **agent}
    named = ", ".join(f"{key} => %({key})s" for key in arguments)
    query = f"select kakunin.create_agent({named})"
    assert refused(database, "registrar", query, arguments).sqlstate == "KA010"
    if agent != {"name": None}:  # which leaves the name as it is
        arguments = {"agent_id": new_agent(database), **agent}
        named = ", ".join(f"{key} => %({key})s" for key in arguments)
        query = f"select kakunin.update_agent({named})"
        assert refused(database, "operator", query, arguments).sqlstate == "KA010"


def test_an_agents_model_hash_is_kept_in_lower_case(database: Database) -> None:
    agent_id = new_agent(database, model="m", model_hash=HASH.upper())
    issued = issue(agent_id, model="m", model_hash=HASH)
    database.register(issued)
    assert bindable(database, issued.serial) == "yes"


@pytest.mark.parametrize(
    ("agent", "certificate", "registers"),
    [
        ({}, {}, True),
        ({}, {"model": "m", "model_hash": HASH}, True),
        ({}, {"tenant": "t"}, False),
        ({"tenant": "t"}, {"tenant": "t"}, True),
        ({"tenant": "t"}, {"tenant": "T"}, False),
        ({"tenant": "t"}, {}, False),
        ({"model": "m"}, {}, True),
        ({"model": "m"}, {"model": "m", "model_hash": HASH}, True),
        ({"model": "m"}, {"model": "M", "model_hash": HASH}, False),
        ({"model": "m", "model_hash": HASH}, {"model": "m", "model_hash": HASH}, True),
        ({"model": "m", "model_hash": HASH}, {"model": "n", "model_hash": HASH}, False),
        ({"model": "m", "model_hash": HASH}, {"model": "m", "model_hash": OTHER_HASH}, False),
        ({"model": "m", "model_hash": HASH}, {}, False),
    ],
)
def test_a_certificate_is_for_the_agent_as_it_is(
    database: Database, agent: dict[str, Any], certificate: dict[str, Any], registers: bool
) -> None:
    issued = issue(new_agent(database, **agent), **certificate)
    if registers:
        assert database.value("registrar", REGISTER, [issued.der]) == issued.serial
    else:
        error = refused(database, "registrar", REGISTER, [issued.der])
        assert error.sqlstate == "KA010"
        assert "is not the agent's" in str(error)


def test_an_unknown_agents_certificate_is_refused(database: Database) -> None:
    error = refused(database, "registrar", REGISTER, [issue().der])
    assert error.sqlstate == "KA010"
    assert "no agent" in str(error)


# One active certificate ---------------------------------------------------------------------------------


def test_an_agent_has_one_active_certificate(database: Database) -> None:
    first = for_new_agent(database)
    database.register(first)
    second, third = issue(first.agent_id), issue(first.agent_id)
    error = refused(database, "registrar", REGISTER, [second.der])
    assert error.sqlstate == "KA010"
    assert first.serial in str(error)
    database.run("operator", REVOKE, [first.serial])
    database.register(second)  # after its revocation the place is free
    assert [bindable(database, i.serial) for i in (first, second)] == ["KA002", "yes"]
    assert database.value("registrar", OVERLAPPING, [third.der, "0"]) == third.serial
    assert [bindable(database, i.serial) for i in (second, third)] == ["KA002", "yes"]
    assert database.run("registrar", REVOKED, [second.serial])[0][1] == "superseded"


def test_an_overlap_without_anything_to_overlap_is_none(database: Database) -> None:
    issued = for_new_agent(database)
    database.run("registrar", OVERLAPPING, [issued.der, "1 day"])
    assert database.run("registrar", REVOKED, [issued.serial]) == [(None, None)]


@pytest.mark.parametrize(
    ("overlap", "seconds"),
    [
        ("0", 0), ("0.000001 seconds", 0.000001), ("1 hour", 3600), ("30 days", 30 * 86400),
        ("1 month", 30 * 86400), ("720 hours", 30 * 86400), ("1 month -29 days", 86400),
        ("-1 day 48 hours", 86400),
    ],
)  # fmt: skip
def test_the_certificate_before_ends_after_the_overlap(clock: Any, overlap: str, seconds: float) -> None:
    database, set_clock = clock
    start = NOW + DAY
    set_clock(start)
    first = issue(new_agent(database), not_before=start)
    database.register(first)
    second = issue(first.agent_id, not_before=start)
    database.run("registrar", OVERLAPPING, [second.der, overlap])
    end = start + dt.timedelta(seconds=seconds)
    assert database.run("registrar", REVOKED, [first.serial]) == [(end, "superseded")]
    for at, outcome in {end - TICK: "yes", end: "KA002", end + TICK: "KA002"}.items():
        if at >= start:
            set_clock(at)
            assert [bindable(database, i.serial) for i in (first, second)] == [outcome, "yes"]


@pytest.mark.parametrize(
    "overlap",
    [
        "-1 microsecond", "-1 day", "30 days 0.000001 seconds", "31 days", "1 month 1 day",
        "infinity", "-infinity",
        # What compares as a day and adds as 144 years, and what adds to no timestamp at all.
        "120000 months -3599999 days", "12 months -335 days",
        "-120000 months 3600001 days",
        "70000000 months -2100000000 days", "178000000 years", "-178000000 years",
    ],
)  # fmt: skip
def test_an_overlap_is_at_most_thirty_days(database: Database, overlap: str) -> None:
    if "infinity" in overlap and database.cluster.major < 17:
        pytest.skip("intervals are finite before Postgres 17")
    first = for_new_agent(database)
    database.register(first)
    error = refused(database, "registrar", OVERLAPPING, [issue(first.agent_id).der, overlap])
    assert error.sqlstate == "KA010"
    assert bindable(database, first.serial) == "yes"


def test_an_overlap_counts_from_when_the_next_one_is_good(clock: Any) -> None:
    database, set_clock = clock
    first = issue(new_agent(database), not_before=NOW)
    set_clock(NOW)
    database.register(first)
    later = NOW + 20 * DAY
    second = issue(first.agent_id, not_before=later)
    database.run("registrar", OVERLAPPING, [second.der, "1 day"])
    assert database.run("registrar", REVOKED, [first.serial]) == [(later + DAY, "superseded")]
    for at, outcome in {
        NOW: ["yes", "KA003"], later: ["yes", "yes"], later + DAY: ["KA002", "yes"],
    }.items():  # fmt: skip
        set_clock(at)
        assert [bindable(database, i.serial) for i in (first, second)] == outcome


def test_a_revocation_that_lies_ahead_is_brought_forward_and_never_put_off(database: Database) -> None:
    first = for_new_agent(database)
    database.register(first)
    second, third = issue(first.agent_id), issue(first.agent_id)
    database.run("registrar", OVERLAPPING, [second.der, "1 day"])
    (ahead, _), = database.run("registrar", REVOKED, [first.serial])  # fmt: skip
    # The one that is on its way out is not the active one: this supersedes the second.
    database.run("registrar", OVERLAPPING, [third.der, "2 days"])
    assert database.run("registrar", REVOKED, [first.serial]) == [(ahead, "superseded")]
    assert bindable(database, first.serial) == "yes"
    at = database.value(
        "operator", "select kakunin.revoke_certificate(%s, 'privilegeWithdrawn')", [first.serial]
    )
    assert at < ahead
    assert database.run("registrar", REVOKED, [first.serial]) == [(at, "privilegeWithdrawn")]
    assert [bindable(database, i.serial) for i in (first, second, third)] == ["KA002", "yes", "yes"]


def test_an_expired_certificate_is_in_nobodys_way(clock: Any) -> None:
    database, set_clock = clock
    first = issue(new_agent(database), not_before=NOW, lifetime=DAY)
    set_clock(NOW)
    database.register(first)
    second = issue(first.agent_id, not_before=NOW)
    set_clock(NOW + DAY)
    assert refused(database, "registrar", REGISTER, [second.der]).sqlstate == "KA010"
    set_clock(NOW + DAY + TICK)
    assert (
        refused(database, "registrar", REGISTER, [issue(not_before=NOW, lifetime=DAY).der]).sqlstate
        == "KA010"
    )
    database.register(second)
    assert [bindable(database, i.serial) for i in (first, second)] == ["KA003", "yes"]


def with_serial(agent_id: uuid.UUID, serial: str) -> bytes:
    """The test CA's certificate for an agent, with a serial it gave to another."""
    ca = _ca()
    issuer = Authority(ca.signer._key, ca.certificate.subject, bytes.fromhex(ca.key_id.replace(":", "")))
    start = ca.certificate.not_valid_before_utc
    return certified(issuer, agent_id, serial=int(serial.replace(":", ""), 16), not_before=start).der


def test_a_serial_is_registered_once(database: Database) -> None:
    first = for_new_agent(database)
    database.register(first)
    other = with_serial(new_agent(database), first.serial)
    for _ in range(2):
        for der in (first.der, other):
            error = refused(database, "registrar", REGISTER, [der])
            assert error.sqlstate == "KA010"
            assert "registered already" in str(error)
        database.run("operator", REVOKE, [first.serial])  # nor after its revocation
    agent_id = new_agent(database)
    assert database.value("registrar", REGISTER, [with_serial(agent_id, "01:02:03")]) == "01:02:03"


def at_once(database: Database, login: str, first: Any, second: Any, end: str = "commit") -> str:
    """Two calls, the second while the first's transaction is open: '' or the SQLSTATE of the second."""
    outcome: list[str] = []
    with database.connect(login) as one, database.connect(login, autocommit=True) as two:
        one.execute(*first)

        def call() -> None:
            try:
                two.execute(*second)
                outcome.append("")
            except psycopg.Error as error:
                outcome.append(error.sqlstate or "?")

        thread = threading.Thread(target=call)
        thread.start()
        pid = two.info.backend_pid
        while thread.is_alive() and not database.value(
            "postgres", "select pg_blocking_pids(%s) <> '{}'", [pid]
        ):
            pass
        assert outcome == []  # it waits for the first to end
        getattr(one, end)()
        thread.join(timeout=30)
    return outcome[0]


@pytest.mark.parametrize(("first_ends", "second_gets"), [("commit", "KA010"), ("rollback", "")])
def test_one_of_two_at_once_registers_a_serial(database: Database, first_ends: str, second_gets: str) -> None:
    one, other = for_new_agent(database), new_agent(database)
    two = with_serial(other, one.serial)
    got = at_once(database, "registrar", (REGISTER, [one.der]), (REGISTER, [two]), first_ends)
    assert got == second_gets
    query = "select agent_id from kakunin_private.certificates where serial = %s"
    owner = one.agent_id if first_ends == "commit" else other
    assert database.run("installer", query, [one.serial]) == [(owner,)]


@pytest.mark.parametrize(("first_ends", "second_gets"), [("commit", "KA010"), ("rollback", "")])
def test_one_of_two_at_once_becomes_the_active_one(
    database: Database, first_ends: str, second_gets: str
) -> None:
    one = for_new_agent(database)
    two = issue(one.agent_id)
    got = at_once(database, "registrar", (REGISTER, [one.der]), (REGISTER, [two.der]), first_ends)
    assert got == second_gets
    query = "select serial from kakunin.certificates where agent_id = %s"
    kept = one if first_ends == "commit" else two
    assert database.run("registrar", query, [one.agent_id]) == [(kept.serial,)]


def test_registered_by_is_the_login_and_not_a_role_it_took(database: Database) -> None:
    issued = for_new_agent(database)
    with database.connect("registrar") as connection:
        connection.execute("set role kakunin_registrar")
        connection.execute(REGISTER, [issued.der])
    query = "select registered_by from kakunin_private.certificates where serial = %s"
    assert database.value("installer", query, [issued.serial]) == "registrar"


# Changing an agent --------------------------------------------------------------------------------------

AGENT = "select name, tenant, model, model_version, model_hash from kakunin.agents where agent_id = %s"


@pytest.mark.parametrize("login", ["registrar", "operator"])
def test_what_is_given_changes_and_the_rest_stays(database: Database, login: str) -> None:
    agent_id = new_agent(database, "n", tenant="t", model="m", model_version="1", model_hash=HASH)
    kept = ["n", "t", "m", "1", HASH]
    changes = [
        ("name", "N"),
        ("model_version", "2"),
        ("tenant", "T"),
        ("model", "M"),
        ("model_hash", OTHER_HASH),
    ]
    for key, changed in changes:
        kept[("name", "tenant", "model", "model_version", "model_hash").index(key)] = changed
        answer = database.value(login, f"select kakunin.update_agent(%s, {key} => %s)", [agent_id, changed])
        assert answer == {"agent_id": str(agent_id), "certificates_revoked": [], "next": None}
        assert database.run(login, AGENT, [agent_id]) == [tuple(kept)]


@pytest.mark.parametrize(
    ("change", "revokes"),
    [
        ({"name": "new"}, False), ({"model_version": "2"}, False),
        ({"tenant": "t"}, False), ({"model": "m"}, False), ({"model_hash": HASH}, False),
        ({"model_hash": HASH.upper()}, False), ({"model": "m", "model_hash": HASH, "tenant": "t"}, False),
        ({"tenant": "T"}, True), ({"model": "n"}, True), ({"model_hash": OTHER_HASH}, True),
        ({"model": "m", "model_hash": OTHER_HASH}, True),
    ],
    ids=str,
)  # fmt: skip
def test_a_certificate_that_says_otherwise_is_revoked(
    database: Database, change: dict[str, Any], revokes: bool
) -> None:
    agent_id = new_agent(database, tenant="t", model="m", model_hash=HASH)
    says = {"tenant": "t", "model": "m", "model_hash": HASH}
    revoked, issued = issue(agent_id, **says), issue(agent_id, **says)
    database.register(revoked)
    database.run("operator", REVOKE, [revoked.serial])
    database.register(issued)
    named = ", ".join(f"{key} => %({key})s" for key in change)
    answer = database.value(
        "operator", f"select kakunin.update_agent(%(id)s, {named})", {"id": agent_id, **change}
    )
    assert answer["certificates_revoked"] == ([issued.serial] if revokes else [])
    assert bool(answer["next"]) == revokes
    assert bindable(database, issued.serial) == ("KA002" if revokes else "yes")
    if revokes:
        assert database.run("registrar", REVOKED, [issued.serial])[0][1] == "affiliationChanged"
        assert database.run("registrar", REVOKED, [revoked.serial])[0][1] == "unspecified"
        again = issue(agent_id, **says)  # as it no longer is
        assert refused(database, "registrar", REGISTER, [again.der]).sqlstate == "KA010"
        database.register(issue(agent_id, **{**says, **change}))


# Verification -------------------------------------------------------------------------------------------

VERIFY = "select kakunin.verify_certificate(%s)"


def test_a_certificate_is_verified_by_anybody_with_a_role(database: Database) -> None:
    agent_id = new_agent(database, "Verified", tenant="t", model="m", model_hash=HASH)
    scope = {"daily_limit_usd": 5}
    issued = issue(
        agent_id, tenant="t", model="m", model_hash=HASH, permitted_actions=["a:b"], financial_scope=scope
    )  # fmt: skip
    database.register(issued)
    for login in ("agent_1", "gateway", "registrar", "operator"):
        for form in (issued.serial, issued.serial.replace(":", "").lower()):
            answer = database.value(login, VERIFY, [form])
            assert {
                key: dt.datetime.fromisoformat(answer.pop(key)) for key in ("not_before", "not_after")
            } == {
                "not_before": issued.certificate.not_valid_before_utc,
                "not_after": issued.certificate.not_valid_after_utc,
            }
            assert answer == {
                "serial_number": issued.serial, "valid": True, "status": "active", "agent_id": str(agent_id),
                "agent_name": "Verified", "tenant": "t", "model": "m", "model_hash": HASH,
                "permitted_actions": ["a:b"], "financial_scope": scope, "revoked_at": None,
                "revocation_reason": None, "issuer_key_id": _ca().key_id,
            }  # fmt: skip
    assert refused(database, "stranger", VERIFY, [issued.serial]).sqlstate == "42501"


def test_what_is_no_serial_or_not_registered_is_not_valid(database: Database) -> None:
    unknown = {"serial_number": "01:02", "valid": False, "status": "unknown"}
    assert database.value("agent_1", VERIFY, ["0102"]) == unknown
    for serial in (None, "", "zz"):
        assert refused(database, "agent_1", VERIFY, [serial]).sqlstate == "KA010"


def test_the_status_is_what_binding_says(clock: Any) -> None:
    database, set_clock = clock
    issued = issue(new_agent(database), not_before=NOW, lifetime=DAY)
    set_clock(NOW)
    database.register(issued)

    def answer() -> tuple[bool, str, str]:
        found = database.value("agent_1", VERIFY, [issued.serial])
        return found["valid"], found["status"], bindable(database, issued.serial)

    expected = {
        NOW - TICK: (False, "not_yet_valid", "KA003"), NOW: (True, "active", "yes"),
        NOW + DAY: (True, "active", "yes"), NOW + DAY + TICK: (False, "expired", "KA003"),
    }  # fmt: skip
    for at, status in expected.items():
        set_clock(at)
        assert answer() == status
    set_clock(NOW)
    database.run("operator", "select kakunin.suspend_agent(%s, 'x')", [issued.agent_id])
    assert answer() == (False, "suspended", "KA008")
    database.run("operator", "select kakunin.reinstate_agent(%s)", [issued.agent_id])
    assert answer() == (True, "active", "yes")
    database.run("operator", REVOKE, [issued.serial])
    for at in expected:
        set_clock(at)
        if at >= NOW:
            assert answer() == (False, "revoked", "KA002")


def test_a_message_is_its_agents_while_the_certificate_is_good(database: Database) -> None:
    one, two = database.agent("one"), database.agent("two")
    payload = b"pay \x00 100"
    signature = one.signer.sign(hashlib.sha256(payload).digest())

    def verify(serial: str | None, payload: bytes | None, signature: bytes | None) -> dict[str, Any]:
        query = "select kakunin.verify_message(%s, %s, %s)"
        return database.value("agent_1", query, [serial, payload, signature])

    good = {
        "valid": True, "signature_valid": True, "certificate_status": "active",
        "certificate_serial": one.serial,
        "agent_id": str(one.agent_id), "agent_name": "one", "model_hash": None,
    }  # fmt: skip
    forged = {**good, "valid": False, "signature_valid": False}
    assert verify(one.serial, payload, signature) == good
    assert verify(one.serial.replace(":", "").lower(), payload, signature) == good
    assert verify(one.serial, payload + b" ", signature) == forged
    assert verify(one.serial, b"", signature) == forged
    for bad in (b"", signature[:-1], signature + b"\0", bytes(256), b"\xff" * 256):
        assert verify(one.serial, payload, bad) == forged
    other = verify(two.serial, payload, signature)
    assert (other["valid"], other["signature_valid"]) == (False, False)
    unknown = verify("01:02", payload, signature)
    assert (unknown["valid"], unknown["signature_valid"]) == (False, False)
    assert unknown["certificate_status"] == "unknown"
    for arguments in ((None, payload, signature), (one.serial, None, signature), (one.serial, payload, None)):
        with pytest.raises(psycopg.Error) as caught:
            verify(*arguments)
        assert caught.value.sqlstate == "KA010"
    one.suspend()
    assert verify(one.serial, payload, signature) == {
        **good,
        "valid": False,
        "certificate_status": "suspended",
    }
    one.revoke()
    assert verify(one.serial, payload, signature) == {**good, "valid": False, "certificate_status": "revoked"}


# Revocation and suspension ------------------------------------------------------------------------------


def test_revocation_is_final_and_its_first_moment_and_reason_stay(database: Database) -> None:
    agent = database.agent()
    revoke = "select kakunin.revoke_certificate(%s, %s)"
    at = database.value("operator", revoke, [agent.serial, "privilegeWithdrawn"])
    before = state(database)
    assert database.value("operator", revoke, [agent.serial.lower(), "superseded"]) == at
    assert database.value("operator", REVOKE, [agent.serial]) == at
    assert state(database) == before
    assert database.run("operator", REVOKED, [agent.serial]) == [(at, "privilegeWithdrawn")]
    agent.suspend()
    database.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert bindable(database, agent.serial) == "KA002"


def test_revocation_at_once_by_two_keeps_the_first(database: Database) -> None:
    agent = database.agent()
    revoke = "select kakunin.revoke_certificate(%s, %s)"
    again = (revoke, [agent.serial, "superseded"])
    assert at_once(database, "operator", (revoke, [agent.serial, "privilegeWithdrawn"]), again) == ""
    assert database.run("operator", REVOKED, [agent.serial])[0][1] == "privilegeWithdrawn"


@pytest.mark.parametrize(
    "reason",
    [
        "unspecified", "keyCompromise", "cACompromise", "affiliationChanged", "superseded",
        "cessationOfOperation", "privilegeWithdrawn", "aACompromise",
    ],
)  # fmt: skip
def test_the_reasons_are_those_of_rfc_5280(database: Database, reason: str) -> None:
    serial = database.agent(signer=LocalSigner.generate()).serial
    database.run("operator", "select kakunin.revoke_certificate(%s, %s)", [serial, reason])
    assert reason in {flag.value for flag in x509.ReasonFlags}  # an independent spelling of the RFC's names
    assert bindable(database, serial) == "KA002"


@pytest.mark.parametrize(
    "reason", [None, "", "KeyCompromise", "certificateHold", "removeFromCRL", "keyCompromise ", "1"]
)
def test_another_reason_revokes_nothing(database: Database, reason: str | None) -> None:
    serial = database.agent().serial
    query = "select kakunin.revoke_certificate(%s, %s)"
    assert refused(database, "operator", query, [serial, reason]).sqlstate == "KA010"
    assert bindable(database, serial) == "yes"


@pytest.mark.parametrize(
    ("serial", "sqlstate"), [("01:02", "KA001"), (None, "KA010"), ("", "KA010"), ("zz", "KA010")]
)
def test_what_is_not_there_cannot_be_revoked(database: Database, serial: str | None, sqlstate: str) -> None:
    assert refused(database, "operator", REVOKE, [serial]).sqlstate == sqlstate


def test_suspension_stops_every_certificate_of_the_agent_until_it_is_lifted(database: Database) -> None:
    one, other = for_new_agent(database), for_new_agent(database)
    two, three = issue(one.agent_id), issue(one.agent_id)
    for issued in (one, two, other):
        database.run("registrar", OVERLAPPING, [issued.der, "1 day"])
    suspend = "select kakunin.suspend_agent(%s, %s)"
    since = "select suspended_at from kakunin.agents where agent_id = %s"

    def bindables() -> list[str]:
        return [bindable(database, i.serial) for i in (one, two, other)]

    database.run("operator", suspend, [one.agent_id, "odd trades"])
    assert bindables() == ["KA008", "KA008", "yes"]
    at = database.value("operator", since, [one.agent_id])
    database.run("operator", suspend, [one.agent_id, "still odd"])
    assert database.value("operator", since, [one.agent_id]) == at
    error = refused(database, "registrar", OVERLAPPING, [three.der, "1 day"])
    assert error.sqlstate == "KA008"
    assert "odd trades" in str(error)
    for _ in range(2):  # lifting it twice is the same as once
        database.run("operator", "select kakunin.reinstate_agent(%s)", [one.agent_id])
        assert bindables() == ["yes", "yes", "yes"]
    database.run("registrar", OVERLAPPING, [three.der, "1 day"])
    database.run("operator", suspend, [one.agent_id, "again"])
    assert database.value("operator", since, [one.agent_id]) > at
    assert bindables() == ["KA008", "KA008", "yes"]
    assert bindable(database, three.serial) == "KA008"


@pytest.mark.parametrize("reason", [None, "", "   ", "x" * 1001])
def test_a_suspension_has_a_reason(database: Database, reason: str | None) -> None:
    agent = database.agent()
    query = "select kakunin.suspend_agent(%s, %s)"
    assert refused(database, "operator", query, [agent.agent_id, reason]).sqlstate == "KA010"
    assert bindable(database, agent.serial) == "yes"
    agent.suspend()
    with database.connect("operator") as operator:
        operator.execute("set plan_cache_mode = force_generic_plan")  # nothing is worked out beforehand
        with pytest.raises(psycopg.Error, match="a reason must be"):
            operator.execute(query, [agent.agent_id, reason])


@pytest.mark.parametrize("agent_id", [None, uuid.uuid4()], ids=["null", "unknown"])
@pytest.mark.parametrize(
    "call", ["suspend_agent(%s, 'x')", "reinstate_agent(%s)", "halt_agent(%s, 'x')", "update_agent(%s, 'x')"]
)
def test_an_unknown_agent_is_refused(database: Database, call: str, agent_id: uuid.UUID | None) -> None:
    assert refused(database, "operator", f"select kakunin.{call}", [agent_id]).sqlstate == "KA010"


# Validity -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clock(cluster: Any) -> Iterator[tuple[Database, Callable[[dt.datetime], None]]]:
    """A database whose time stands where the test puts it."""
    with fresh_database(cluster) as database:
        # A row and not a constant: a running transaction sees the new row, but not yet a new function.
        for statement in (
            "create table kakunin_private.test_clock (at timestamptz not null)",
            "insert into kakunin_private.test_clock values (now())",
            "create or replace function kakunin_private.clock() returns timestamptz"
            " language sql volatile parallel safe return (select at from kakunin_private.test_clock)",
        ):
            database.run("installer", statement)

        def set_clock(at: dt.datetime) -> None:
            database.run("installer", "update kakunin_private.test_clock set at = %s", [at])

        yield database, set_clock


TICK = dt.timedelta(microseconds=1)


def test_a_certificate_is_good_from_its_first_moment_to_its_last(clock: Any) -> None:
    database, set_clock = clock
    start, end = NOW + 1000 * DAY, NOW + 1090 * DAY
    set_clock(NOW)
    issued = for_new_agent(database, not_before=start, lifetime=end - start)
    database.register(issued)
    expected = {start - TICK: "KA003", start: "yes", start + TICK: "yes", end: "yes", end + TICK: "KA003"}
    for at, outcome in expected.items():
        set_clock(at)
        assert (at, bindable(database, issued.serial)) == (at, outcome)


def test_g3_validity_and_revocation_reach_an_open_session_at_its_next_statement(clock: Any) -> None:
    database, set_clock = clock
    start, end = NOW + 1000 * DAY, NOW + 1090 * DAY
    set_clock(NOW)
    issued = for_new_agent(database, not_before=start, lifetime=end - start, permitted_actions=["vault:read"])
    serial, agent_id = issued.serial, issued.agent_id
    database.register(issued)
    set_clock(start)
    with database.connect("gateway") as session:
        session.execute("select kakunin.bind_serial(%s)", [serial])

        def seen() -> tuple[str | None, uuid.UUID | None, bool]:
            row = session.execute(
                "select kakunin.current_cert_serial(), kakunin.current_agent_id(),"
                " kakunin.has_scope('vault:read')"
            ).fetchone()
            assert row is not None
            return row

        bound, nothing = (serial, agent_id, True), (None, None, False)
        for at, answer in {
            start: bound, end: bound, end + TICK: nothing, start - TICK: nothing, start + TICK: bound,
        }.items():  # fmt: skip
            set_clock(at)
            assert (at, seen()) == (at, answer)
        database.run("operator", "select kakunin.suspend_agent(%s, 'x')", [agent_id])
        assert seen() == nothing
        database.run("operator", "select kakunin.reinstate_agent(%s)", [agent_id])
        assert seen() == bound
        database.run("operator", REVOKE, [serial])
        assert seen() == nothing


# Who may call what ----------------------------------------------------------------------------------

ALL = {"agent", "gateway", "registrar", "operator", "worker", "auditor"}
SIGNING = {"registrar", "operator", "worker"}  # who may bring what an authority signed
MAY_CALL = {
    "installation_id()": ALL,
    "normalize_serial(text)": ALL,
    "open_session(text)": {"agent", "gateway"},
    "bind_session(text,boolean)": {"agent", "gateway"},
    "unbind_session()": {"agent", "gateway"},
    "current_cert_serial()": {"agent", "gateway"},
    "current_agent_id()": {"agent", "gateway", "operator", "auditor"},
    "has_scope(text)": {"agent", "gateway"},
    "require_session()": {"agent", "gateway"},
    "require_scope(text)": {"agent", "gateway"},
    "bind_serial(text)": {"gateway"},
    "verify_certificate(text)": ALL,
    "certificate_der(text)": ALL,
    "verify_message(text,bytea,bytea)": ALL,
    "create_agent(text,text,text,text,text)": {"registrar"},
    "register_certificate(bytea,interval)": {"registrar"},
    "update_agent(uuid,text,text,text,text,text)": {"registrar", "operator"},
    "trust_ca(bytea)": {"operator"},
    "distrust_ca(text,text)": {"operator"},
    "crls_due()": SIGNING | {"auditor"},
    "revocations(text)": SIGNING | {"auditor"},
    "publish_crl(bytea)": SIGNING,
    "sign_halt(uuid,text,bytea)": SIGNING,
    "revoke_certificate(text,text)": {"operator"},
    "suspend_agent(uuid,text)": {"operator"},
    "halt_agent(uuid,text,boolean)": {"operator"},
    "reinstate_agent(uuid)": {"operator"},
    "rotate_session_key(interval)": {"operator"},
    "set_replica_lag(interval)": {"operator"},
    "protect(regclass,name,name[],text,boolean,boolean,boolean,boolean)": {"operator"},
    "unprotect(regclass)": {"operator"},
    "audit_changes(regclass,boolean,boolean)": {"operator"},
    "record_changes()": {"operator"},
    "record_policy(regclass)": {"operator"},
    "audit_log_append(text,jsonb,text,timestamp with time zone)": {"agent", "gateway"},
    "check_risk_score()": {"agent", "gateway"},
    "verify_agent_scope(text,numeric,text,text,numeric)": {"agent", "gateway"},
    "require_spend(numeric,text,text,numeric,boolean)": {"agent", "gateway"},
    "require_risk_below(text,boolean)": {"agent", "gateway"},
    "agent_risk(uuid)": {"operator", "auditor"},
    "risk_window()": {"agent", "gateway", "operator", "auditor"},
    "set_risk(jsonb)": {"operator"},
    "set_agent_risk(uuid,text,boolean,double precision)": {"operator"},
    "review_risk(bigint,text)": {"operator"},
    "import_events(uuid,jsonb)": {"operator"},
    "settle_risk()": {"worker", "operator"},
    "make_partitions(interval)": {"worker", "operator"},
    "archive_partition(name)": {"operator"},
    "register_ledger_key(bytea)": {"operator"},
    "revoke_ledger_key(text,text)": {"operator"},
    "seal_ledger(integer)": {"worker"},
    "tree_head_to_sign()": {"worker"},
    "publish_tree_head(bigint,bigint,text,bytea)": {"worker"},
    "lead_ledger(uuid,text,interval,text)": {"worker"},
    "sleep_ledger()": {"worker"},
    "ledger_status()": {"worker", "operator", "auditor"},
    "ledger_home()": {"worker", "operator", "auditor"},
    "inclusion_proof(bigint,bigint)": {"agent", "gateway", "auditor"},
    "consistency_proof(bigint,bigint)": {"worker", "auditor"},
    "frontier(bigint)": {"auditor"},
    "ledger_leaves(bigint,integer)": {"auditor"},
    "unsealed_entries()": {"auditor"},
    "stray_entries()": {"auditor"},
    "record_read(text,jsonb)": {"auditor"},
    "record_export(bigint,bigint,text)": {"auditor"},
    "expire_certificates(integer)": {"worker"},
    "claim_webhooks(interval)": {"worker"},
    "report_webhook(text,uuid,integer,integer,text)": {"worker"},
    "clean_webhooks()": {"worker"},
    "webhook_status()": {"worker", "operator", "auditor"},
    "add_webhook(uuid,text,text[],bytea)": {"operator"},
    "enable_webhook(uuid,boolean)": {"operator"},
    "remove_webhook(uuid)": {"operator"},
    "rotate_webhook(uuid,bytea,interval)": {"operator"},
    "test_webhook(uuid)": {"operator"},
    "replay_webhooks(text,uuid)": {"operator"},
    "create_api_key(text,bytea,text,text[],uuid,timestamp with time zone)": {"operator"},
    "revoke_api_key(uuid)": {"operator"},
    "authenticate_api_key(text,bytea)": {"gateway"},
    "note_api_keys(uuid[])": {"gateway"},
    "describe_agent(uuid,jsonb,jsonb)": {"registrar"},
    "open_decision_chain(text,text,jsonb)": {"gateway"},
    "append_to_decision_chain(uuid,text,jsonb,text,timestamp with time zone)": {"gateway"},
    "close_decision_chain(uuid)": {"gateway"},
    "verify_decision_chain(uuid)": {"gateway", "auditor"},
    "create_report(uuid,integer,text,text[])": {"auditor"},
    "set_gateway_logins(name[],name[])": set(),
    "pre_request()": {"agent", "gateway"},
    "renew_installation()": set(),
    "continue_ledger()": set(),
}


def test_every_function_is_granted_to_the_roles_named_here_and_to_no_other(database: Database) -> None:
    rows = database.run(
        "postgres",
        "select replace(p.oid::regprocedure::text, 'kakunin.', ''), array("
        "   select substr(r.rolname, 9) from pg_roles r where starts_with(r.rolname, 'kakunin_')"
        "      and has_function_privilege(r.oid, p.oid, 'execute'))"
        " from pg_proc p where p.pronamespace = 'kakunin'::regnamespace",
    )
    granted = {function: set(roles) for function, roles in rows}
    assert granted == MAY_CALL


LOGIN_ROLES = {
    "agent_1": "agent", "pooled": "agent", "gateway": "gateway", "registrar": "registrar",
    "operator": "operator", "app": "operator", "worker": "worker", "auditor": "auditor", "stranger": None,
    "authenticator": None,
}  # fmt: skip


@pytest.mark.parametrize("caller", LOGIN_ROLES)
def test_a_login_can_call_what_its_role_may_and_nothing_else(database: Database, caller: str) -> None:
    role = LOGIN_ROLES[caller]
    with database.connect(caller, autocommit=True) as connection:
        for function, roles in MAY_CALL.items():
            name, types = function.rstrip(")").split("(")
            call = f"select kakunin.{name}({', '.join(f'null::{t}' for t in types.split(',') if t)})"
            try:
                connection.execute(call)
                outcome = ""
            except psycopg.Error as error:
                outcome = error.sqlstate or ""
            if name == "record_changes" and role in roles:
                assert outcome == "0A000", call  # it is a trigger's
            else:
                assert outcome in ("42501", "") or outcome.startswith("KA"), (call, outcome)
            assert (outcome != "42501") == (role in roles), (caller, call, outcome)


# Certificate authority ------------------------------------------------------------------------------


def openssl(*arguments: str | Path, data: bytes | None = None) -> str:
    return subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, check=True
    ).stdout.decode()


def verifies(*arguments: str | Path) -> bool:
    done = subprocess.run(["openssl", "verify", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == done.stdout.endswith("OK\n")
    return done.returncode == 0


def pem(tmp_path: Path, name: str, certificate: x509.Certificate) -> Path:
    path = tmp_path / name
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_openssl_verifies_a_certificate_against_its_authority_and_no_other(tmp_path: Path) -> None:
    root = pem(tmp_path, "ca.pem", _ca().certificate)
    leaf = pem(tmp_path, "agent.pem", issue(permitted_actions=["a:b"], tenant="acme").certificate)
    impostor = CertificateAuthority.create(LocalSigner.generate(), "Test CA")
    strict = ["-x509_strict", "-check_ss_sig", "-CAfile", root]
    assert verifies(*strict, root)
    assert verifies(*strict, "-purpose", "sslclient", leaf)
    assert not verifies(*strict, "-purpose", "sslserver", leaf)
    assert not verifies("-CAfile", pem(tmp_path, "impostor.pem", impostor.certificate), leaf)
    # An agent's certificate cannot issue another.
    agent = _any_signer()
    lifetime = dt.timedelta(days=1)
    below = CertificateAuthority(agent, issue().certificate).issue(
        uuid.uuid4(), impostor.signer.public_key(), lifetime=lifetime
    )
    assert not verifies("-CAfile", root, "-untrusted", leaf, pem(tmp_path, "below.pem", below.certificate))


def strings(der: bytes) -> list[tuple[int, str]]:
    """(depth, value) of each UTF8String, as `openssl asn1parse` reads it."""
    out = openssl("asn1parse", "-inform", "DER", "-dump", data=der) if der else ""
    assert all(
        re.match(r" *\d+:d=\d+ +hl=\d+ l= *\d+ (prim|cons)", line)
        for line in out.splitlines()
        if "d=" in line
    )
    return [(int(d), value) for d, value in re.findall(r"d=(\d+) .*UTF8STRING +:(.*)", out)]


def value(issued: AgentCertificate, oid: x509.ObjectIdentifier) -> bytes:
    extension = issued.certificate.extensions.get_extension_for_oid(oid)
    assert isinstance(extension.value, x509.UnrecognizedExtension)
    assert not extension.critical
    return extension.value.value


@pytest.mark.parametrize("length", [1, 127, 128, 255, 256])
def test_the_kits_extensions_decode_elsewhere(length: int) -> None:
    agent_id = uuid.uuid4()
    actions = ["a" * min(length, 128), "orders:*", "vault:read"]
    tenant = "t" * (length % 2) + "\u00e9" * (length // 2)  # so many bytes
    issued = issue(agent_id, permitted_actions=actions, tenant=tenant)
    assert strings(value(issued, AGENT_URN)) == [(0, f"urn:kakunin:agent:{agent_id}")]
    assert strings(value(issued, PERMITTED_ACTIONS)) == [(1, action) for action in actions]
    assert strings(value(issued, TENANT)) == [(0, tenant)]


def test_extensions_of_an_agent_without_actions_or_tenant() -> None:
    issued = issue()
    assert value(issued, PERMITTED_ACTIONS) == b"\x30\x00"
    with pytest.raises(x509.ExtensionNotFound):
        value(issued, TENANT)
    assert value(issue(tenant="\u65e5\u672c"), TENANT) == b"\x0c\x06" + "\u65e5\u672c".encode()


def test_a_certificate_says_what_it_is_for(tmp_path: Path) -> None:
    agent_id = uuid.uuid4()
    issued = issue(agent_id)
    certificate = issued.certificate
    extensions = certificate.extensions
    assert certificate.version == x509.Version.v3
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_cert_sign
    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:kakunin:agent:{agent_id}"]
    shown = openssl("x509", "-noout", "-serial", "-in", pem(tmp_path, "c.pem", certificate))
    assert normalize_serial(shown.strip().removeprefix("serial=")) == issued.serial
    shown_modulus = (
        openssl("x509", "-noout", "-modulus", "-in", tmp_path / "c.pem").strip().removeprefix("Modulus=")
    )
    assert modulus(issued.public_key).hex().upper() == shown_modulus


def test_serials_of_an_authority_differ_and_are_positive() -> None:
    serials = [issue().certificate.serial_number for _ in range(20)]
    assert len(set(serials)) == 20
    assert all(0 < s < 2**160 for s in serials)
    assert max(serials).bit_length() >= 64  # unpredictable: CA/Browser Forum asks for 64 bits


@pytest.mark.parametrize("lifetime", [dt.timedelta(0), -DAY, 365 * DAY + TICK, 366 * DAY, 3650 * DAY])
def test_a_lifetime_beyond_a_year_is_refused(lifetime: dt.timedelta) -> None:
    with pytest.raises(BadInputError, match="365 days"):
        issue(lifetime=lifetime)


@pytest.mark.parametrize("lifetime", [dt.timedelta(seconds=1), DAY, 90 * DAY, 365 * DAY])
def test_a_certificate_lives_as_long_as_asked(database: Database, lifetime: dt.timedelta) -> None:
    start = NOW + 3 * DAY
    agent_id = database.value("registrar", "select kakunin.create_agent('lifetime')")
    issued = issue(agent_id, not_before=start, lifetime=lifetime)
    assert issued.certificate.not_valid_before_utc == start
    assert issued.certificate.not_valid_after_utc == start + lifetime
    database.register(issued)
    assert bindable(database, issued.serial) == "KA003"  # not before its start


def test_a_new_certificate_is_good_at_once(database: Database) -> None:
    assert bindable(database, database.agent().serial) == "yes"


# Errors -----------------------------------------------------------------------------------------------

FOUNDATION = (sql_dir() / "10_foundation.sql").read_text()
STATES = sorted(re.findall(r"(KA\d{3}) \w", FOUNDATION.split("-- The files of this folder")[0]))


# Of the keys, of what was received, and of no database; and Postgres's own.
ELSEWHERE = {
    errors.SignerError,
    errors.SignerUnavailableError,
    errors.VerificationUnavailableError,
    errors.WebhookVerificationError,
}
POSTGRES = {errors.PolicyViolationError}


def classes() -> dict[str, type[KakuninError]]:
    return {
        cls.sqlstate: cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, KakuninError) and cls not in ELSEWHERE | POSTGRES
    }


def test_there_is_one_error_class_to_each_sqlstate_of_the_kit() -> None:
    assert len(STATES) == len(set(STATES)) >= 10
    by_state = classes()
    base = by_state.pop("")
    assert base is KakuninError
    assert sorted(by_state) == STATES
    assert len(set(by_state.values())) == len(by_state)
    for sqlstate, cls in by_state.items():
        assert (cls.__doc__ or "").startswith(f"{sqlstate}: ")
        assert cls.__module__ == "kakunin_db.errors"
        assert getattr(__import__("kakunin_db"), cls.__name__) is cls
    for cls in ELSEWHERE:
        assert not cls.sqlstate.startswith("KA")
        assert getattr(__import__("kakunin_db"), cls.__name__) is cls


def test_the_sql_raises_no_other_sqlstate_of_that_class() -> None:
    raised = {
        s for path in sql_dir().rglob("*.sql") for s in re.findall(r"errcode = '(\w+)'", path.read_text())
    }
    assert raised - {"PGRST"} <= set(STATES)  # which PostgREST makes an answer with a KA code of
    assert {"KA001", "KA002", "KA003", "KA004", "KA005", "KA008", "KA010"} <= raised


def raising(sqlstate: str) -> str:
    what = f"errcode = '{sqlstate}', message = 'the thing', hint = 'the remedy'"
    return f"do $$ begin raise exception using {what}; end $$"


@pytest.mark.parametrize("sqlstate", STATES)
def test_named_gives_the_error_its_class_message_and_remedy(database: Database, sqlstate: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        database.run("stranger", raising(sqlstate))
    found = errors.named(caught.value)
    assert type(found) is classes()[sqlstate]
    assert (str(found), found.hint) == ("the thing", "the remedy")

    engine = sqlalchemy.create_engine(database.url("stranger"))
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.DBAPIError) as wrapped:
        connection.exec_driver_sql(raising(sqlstate))
    engine.dispose()
    found = errors.named(wrapped.value)
    assert type(found) is classes()[sqlstate]
    assert (str(found), found.hint) == ("the thing", "the remedy")


async def test_named_knows_asyncpgs_errors_alone_and_through_sqlalchemy(database: Database) -> None:
    connection = await asyncpg.connect(database.url("stranger", "postgresql"))
    try:
        with pytest.raises(asyncpg.PostgresError) as caught:
            await connection.execute(raising("KA002"))
    finally:
        await connection.close()
    engine = create_async_engine(database.url("stranger", "postgresql+asyncpg"))
    async with engine.connect() as session:
        with pytest.raises(sqlalchemy.exc.DBAPIError) as wrapped:
            await session.exec_driver_sql(raising("KA002"))
    await engine.dispose()
    for error in (caught.value, wrapped.value):
        found = errors.named(error)
        assert type(found) is errors.CertificateRevokedError
        assert (str(found), found.hint) == ("the thing", "the remedy")


@pytest.mark.parametrize("sqlstate", ["42501", "P0001", "KA000", "KA013", "XX000"])
def test_named_leaves_other_errors_alone(database: Database, sqlstate: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        database.run("stranger", raising(sqlstate))
    assert errors.named(caught.value) is None
    assert errors.named(ValueError("KA002")) is None


def test_bad_input_is_also_a_value_error() -> None:
    with pytest.raises(ValueError, match="serial") as caught:
        normalize_serial("x")
    assert isinstance(caught.value, KakuninError)
    assert "3A:F2:91:CC" in (caught.value.hint or "")
    assert caught.value.sqlstate == "KA010"


@pytest.mark.parametrize(
    "wrong",
    [
        {"permitted_actions": ["*"]},
        {"permitted_actions": ["a b"]},
        {"permitted_actions": ["a" * 129]},
        {"permitted_actions": ["a"] * 257},
        {"permitted_actions": ["a" * 128] * 125},
        {"tenant": "a\0"},
        {"tenant": " "},
        {"model": "a\0", "model_hash": HASH},
        {"model": "m"},
        {"financial_scope": {"a": ["\0"]}},
        {"financial_scope": {"a\\\0": 1}},
        {"financial_scope": {"a": float("nan")}},
        {"lifetime": dt.timedelta(days=366)},
        {"lifetime": dt.timedelta(0)},
        {"not_before": dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=3650)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_authority_issues_nothing_that_registration_would_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInputError):
        issue(**wrong)


def test_the_authority_issues_no_limit_that_nothing_enforces() -> None:
    with pytest.raises(
        errors.BadInputError, match="what nothing enforces: currency, max_trade_usd"
    ) as refused:
        issue(financial_scope={"currency": "EUR", "max_trade_usd": 1, "daily_limit_usd": 1})
    assert "max_single_trade_usd" in str(refused.value.hint)


UNKNOWN = {"daily_limit_usd": 5, "max_transaction_usdd": 100, "": 1, "x\ny": 1}
SAID = r'the financial scope is refused: nothing enforces "", "max_transaction_usdd", "x\ny"'


def test_a_limit_that_nothing_enforces_is_not_registered(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever issued it: anew, or with an overlap in the place of another."""
    agent = database.agent(financial_scope={"daily_limit_usd": 5})
    monkeypatch.setattr(ca, "_LIMITS", (*ca._LIMITS, *UNKNOWN))  # as other software would
    for query, more, issued in (
        (REGISTER, [], for_new_agent(database, financial_scope=UNKNOWN)),
        (OVERLAPPING, [DAY], issue(agent.agent_id, financial_scope=UNKNOWN)),
    ):
        error = refused(database, "registrar", query, [issued.der, *more])
        assert (error.sqlstate, error.diag.message_primary) == ("KA010", SAID)
        assert error.diag.message_hint == f"It may have {', '.join(ca._LIMITS[:6])}."
        with database.connect("registrar") as connection, pytest.raises(BadInputError, match="usdd"):
            issued.register(connection)
    assert bindable(database, agent.serial) == "yes"


def test_a_limit_that_nothing_enforces_is_not_asked_for(database: Database) -> None:
    agent_id = new_agent(database)
    describe = "select kakunin.describe_agent(%s, '{}', %s::jsonb)"
    error = refused(database, "registrar", describe, [agent_id, json.dumps(UNKNOWN)])
    assert (error.sqlstate, error.diag.message_primary) == ("KA010", SAID)
    for wrong in ("[]", "1", "null", '{"permitted_venues": ' + "[" * 64 + "]" * 64 + "}"):
        assert refused(database, "registrar", describe, [agent_id, wrong]).sqlstate == "KA010"
    for scope in ({"daily_limit_usd": 5}, {}, None):
        database.run("registrar", describe, [agent_id, None if scope is None else json.dumps(scope)])
    rows = database.run(
        "registrar", "select financial_scope from kakunin.agent_descriptions where agent_id = %s", [agent_id]
    )
    assert rows == [({},)]


def test_everybody_knows_the_same_limits(database: Database) -> None:
    assert database.value("installer", "select kakunin_private.limits()") == list(ca._LIMITS)
    assert set(FinancialScope.model_fields) == set(ca._LIMITS)


@pytest.mark.parametrize(
    "certificate",
    [
        {"permitted_actions": ["a" * 128] * 114},  # nearly 16 KiB
        {"permitted_actions": ["a"] * 256},
        {"financial_scope": {"permitted_venues": {"a": "\\u0000", "\\\\u0000": "\u00e9\x01\U0001f600"}}},
        {"financial_scope": {"permitted_venues": [1e-300, 1e20, 0.1, -5, None, {"b": []}]}},
    ],
    ids=lambda c: ascii(c)[:50],
)
def test_what_the_authority_issues_registers(database: Database, certificate: dict[str, Any]) -> None:
    issued = for_new_agent(database, **certificate)
    database.register(issued)
    query = "select permitted_actions, financial_scope from kakunin.certificates where serial = %s"
    expected = (certificate.get("permitted_actions", []), certificate.get("financial_scope"))
    assert database.run("registrar", query, [issued.serial]) == [expected]
    assert (list(issued.permitted_actions), issued.financial_scope) == expected


VIEWS = {
    "agents": {"registrar", "operator", "auditor"},
    "certificates": {"registrar", "operator", "auditor"},
    "halts": SIGNING | {"auditor"},
    "authorities": ALL,
    "crls": ALL,
    "audit_log": {"agent", "gateway", "auditor"},
    "chains": {"auditor"},
    "ledger_keys": ALL,
    "tree_heads": ALL,
    "risk_by_hour": {"agent", "gateway", "operator", "auditor"},
    "risk_by_day": {"agent", "gateway", "operator", "auditor"},
    "risk_contributions": {"agent", "gateway", "operator", "auditor"},
    "risk_reviews": {"operator", "auditor"},
    "webhook_endpoints": {"operator"},
    "webhook_deliveries": {"operator"},
    "api_keys": {"operator"},
    "agent_descriptions": {"registrar", "operator", "auditor"},
    "decision_chains": {"gateway", "auditor"},
    "decision_chain_events": {"auditor"},
    "reports": {"auditor"},
}
PRIVATE = {
    "audit_log": "ledger",
    "risk_by_hour": "risk_hours",
    "risk_by_day": "risk_buckets",
    "risk_contributions": "risk_stops",
}
COLUMNS = {
    "agents": "agent_id",
    "halts": "receipt",
    "audit_log": "entry",
    "chains": "head",
    "tree_heads": "root",
    "risk_by_hour": "hour",
    "risk_by_day": "day",
    "risk_contributions": "events",
    "risk_reviews": "decision",
    "webhook_endpoints": "url",
    "webhook_deliveries": "state",
    "api_keys": "prefix",
    "agent_descriptions": "metadata",
    "decision_chains": "name",
    "decision_chain_events": "event_id",
    "reports": "document",
}


def test_every_view_is_named_here(database: Database) -> None:
    views = "select viewname from pg_views where schemaname in ('kakunin', 'kakunin_private')"
    # Beside these there is one that the others read.
    assert {view for (view,) in database.run("postgres", views)} == {*VIEWS, "risk_buckets"}


@pytest.mark.parametrize("caller", LOGIN_ROLES)
def test_the_views_are_for_those_who_look_things_up(database: Database, caller: str) -> None:
    """Agents see whom to trust and what is revoked, and nothing of each other."""
    role = LOGIN_ROLES[caller]
    with database.connect(caller, autocommit=True) as connection:
        for view, roles in VIEWS.items():
            for statement, allowed in (
                (f"select * from kakunin.{view}", role in roles),
                (f"delete from kakunin.{view}", False),
                (f"update kakunin.{view} set {COLUMNS.get(view, 'der')} = null", False),
                (f"select * from kakunin_private.{PRIVATE.get(view, view)}", False),
            ):
                if allowed:
                    connection.execute(statement)
                else:
                    # Those that nobody can write say so before they look at privileges.
                    with pytest.raises(
                        (psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState)
                    ):
                        connection.execute(statement)


def test_the_views_show_what_is_kept(database: Database) -> None:
    agent = database.agent("looked up", permitted_actions=["a:b"])
    for login in ("operator", "registrar"):
        query = "select name, suspended_at from kakunin.agents where agent_id = %s"
        assert database.run(login, query, [agent.agent_id]) == [("looked up", None)]
        query = "select permitted_actions, der, issuer_key_id from kakunin.certificates where serial = %s"
        found = database.run(login, query, [agent.serial])
        assert found == [(["a:b"], agent.issued.der, _ca().key_id)]
    query = "select der, distrusted_at from kakunin.authorities where key_id = %s"
    assert database.run("agent_1", query, [_ca().key_id]) == [(_ca().der, None)]
