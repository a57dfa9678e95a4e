"""Serials, agents, certificates, and the Python pieces that make them: signer, authority, errors."""

from __future__ import annotations

import datetime as dt
import random
import re
import stat
import subprocess
import sys
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
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import create_async_engine

from kakunin_db import (
    AgentCertificate,
    BadInputError,
    KakuninError,
    LocalCA,
    LocalSigner,
    errors,
    normalize_serial,
)
from kakunin_db.ca import AGENT_URN, PERMITTED_ACTIONS, TENANT
from kakunin_db.resources import sql_dir

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
        " (select jsonb_agg(to_jsonb(c) order by serial) from kakunin_private.certificates c)",
    )


def refused(database: Database, login: str, query: str, params: Any = None) -> psycopg.Error:
    """The error of a call that must change nothing."""
    before = state(database)
    with pytest.raises(psycopg.Error) as caught:
        database.run(login, query, params)
    assert state(database) == before
    return caught.value


REGISTER = (
    "select kakunin.register_certificate(%(agent_id)s, %(der)s, %(serial)s, %(modulus)s,"
    " %(not_before)s, %(not_after)s, %(actions)s)"
)


def fields(database: Database, **changes: Any) -> dict[str, Any]:
    """What registers a new certificate, changed as told."""
    agent_id = changes.get("agent_id") or database.value("registrar", "select kakunin.create_agent('fields')")
    issued = issue(agent_id)
    return {
        "agent_id": agent_id,
        "der": issued.der,
        "serial": issued.serial,
        "modulus": issued.public_key_modulus,
        "not_before": issued.certificate.not_valid_before_utc,
        "not_after": issued.certificate.not_valid_after_utc,
        "actions": ["vault:read"],
    } | changes


_signer: list[LocalSigner] = []


def issue(agent_id: uuid.UUID | None = None, **certificate: Any) -> AgentCertificate:
    if not _signer:
        _signer.append(LocalSigner.generate())
    return _ca().issue(agent_id or uuid.uuid4(), _signer[0].public_key(), **certificate)


def bindable(database: Database, serial: str) -> str:
    """'yes', or the SQLSTATE that says why this certificate cannot be bound now."""
    try:
        database.run("gateway", "select kakunin.bind_serial(%s)", [serial])
    except psycopg.Error as error:
        return error.sqlstate or ""
    return "yes"


def test_an_agent_and_its_certificate_are_kept_as_given(database: Database) -> None:
    agent_id = database.value(
        "registrar", "select kakunin.create_agent(%s, %s)", ["Agent \u30ab 'x\"; --", "t" * 200]
    )
    taken = fields(database, agent_id=agent_id, actions=["a", "trade:*", "x.y_z/1-2:B"])
    serial = taken["serial"]
    taken["serial"] = "0x" + serial.replace(":", "").lower()
    assert database.value("registrar", REGISTER, taken) == serial
    row = database.run(
        "installer",
        "select a.name, a.tenant, a.suspended_at, c.serial, c.agent_id, c.der, c.public_key_modulus,"
        " c.not_before, c.not_after, c.permitted_actions, c.registered_by, c.revoked_at, c.revocation_reason"
        " from kakunin_private.agents a join kakunin_private.certificates c using (agent_id)"
        " where a.agent_id = %s",
        [agent_id],
    )
    assert row == [(
        "Agent \u30ab 'x\"; --", "t" * 200, None, serial, agent_id, taken["der"], taken["modulus"],
        taken["not_before"], taken["not_after"], taken["actions"], "registrar", None, None,
    )]  # fmt: skip
    assert bindable(database, serial) == "yes"


def test_an_agent_may_have_several_certificates(database: Database) -> None:
    first = fields(database)
    second = fields(database, agent_id=first["agent_id"])
    serials = [database.value("registrar", REGISTER, f) for f in (first, second)]
    database.run("operator", "select kakunin.revoke_certificate(%s)", [serials[0]])
    assert [bindable(database, s) for s in serials] == ["KA002", "yes"]


@pytest.mark.parametrize(
    "arguments",
    [
        [None, None], ["", None], [" ", None], ["x" * 201, None], ["\u00e9" * 201, None],
        ["x", ""], ["x", "  "], ["x", "x" * 201],
    ],
    ids=str,
)  # fmt: skip
def test_an_agent_has_a_name(database: Database, arguments: list[Any]) -> None:
    error = refused(database, "registrar", "select kakunin.create_agent(%s, %s)", arguments)
    assert error.sqlstate == "KA010"


@pytest.mark.parametrize(
    "changes",
    [
        *({"agent_id": v} for v in (None, uuid.uuid4())),
        *({"der": v} for v in (None, b"", b"x" * 16385)),
        *({"serial": v} for v in (None, "", "0", "zz", "3A:F", "\u0663\u0661", colons("01" + TWENTY))),
        *({"modulus": v} for v in (None, b"", b"\x81" * 128, b"\x81" * 513)),
        *({"modulus": v} for v in (b"\0" + b"\x81" * 256, b"\x82" * 256)),
        *({"not_before": v} for v in (None, "-infinity", "infinity", NOW - 400 * DAY, NOW + 400 * DAY)),
        *({"not_after": v} for v in (None, "-infinity", "infinity", NOW - 400 * DAY, NOW + 400 * DAY)),
        {"not_before": NOW, "not_after": NOW},
        {"not_before": NOW, "not_after": NOW - DAY},
        *(
            {"actions": v}
            for v in (
                [None], [""], ["a", None], ["a b"], ["a\n"], ["\na"], ["*"], ["a*"], [":*"], ["a:**"],
                ["a:*b"], ["*:a"], ["\u00e9"], ["\uff41"], ["a'"], ["a;"], ["x" * 129],
                ["x" * 127 + ":*"], ["a"] * 257,
                [["a", "b"], ["c", "d"]],
            )
        ),
    ],
    ids=lambda c: ascii(c)[:60],
)  # fmt: skip
def test_a_bad_field_registers_nothing(database: Database, changes: dict[str, Any]) -> None:
    arguments = fields(database) | changes
    assert refused(database, "registrar", REGISTER, arguments).sqlstate == "KA010"
    if "agent_id" not in changes:
        good = fields(database, agent_id=arguments["agent_id"])
        assert database.value("registrar", REGISTER, good) == good["serial"]  # so it was the bad field


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": None}, {"actions": []}, {"actions": ["x" * 128, "x" * 126 + ":*", *["a"] * 254]},
        {"der": b"x" * 16384}, {"not_before": NOW, "not_after": NOW + 365 * DAY},
        {"not_before": NOW, "not_after": NOW + dt.timedelta(seconds=1)}, {"modulus": b"\x81" * 512},
    ],
    ids=lambda c: ascii(c)[:60],
)  # fmt: skip
def test_the_largest_and_least_fields_register(database: Database, changes: dict[str, Any]) -> None:
    arguments = fields(database) | changes
    assert database.value("registrar", REGISTER, arguments) == arguments["serial"]


def test_a_serial_is_registered_once(database: Database) -> None:
    first = fields(database)
    database.run("registrar", REGISTER, first)
    for form in (first["serial"], first["serial"].replace(":", "").lower(), "00:" + first["serial"]):
        error = refused(database, "registrar", REGISTER, fields(database) | {"serial": form})
        assert error.sqlstate == "KA010"
        assert "registered already" in str(error)
    database.run("operator", "select kakunin.revoke_certificate(%s)", [first["serial"]])
    assert refused(database, "registrar", REGISTER, first).sqlstate == "KA010"  # nor after its revocation


@pytest.mark.parametrize(("first_ends", "second_gets"), [("commit", "KA010"), ("rollback", "yes")])
def test_one_of_two_at_once_registers_a_serial(database: Database, first_ends: str, second_gets: str) -> None:
    one, two = fields(database), fields(database)
    two["serial"] = one["serial"]
    outcome: list[str] = []

    with database.connect("registrar") as first, database.connect("registrar", autocommit=True) as second:
        first.execute(REGISTER, one)

        def register() -> None:
            try:
                second.execute(REGISTER, two)
                outcome.append("yes")
            except psycopg.Error as error:
                outcome.append(error.sqlstate or "")

        thread = threading.Thread(target=register)
        thread.start()
        pid = second.info.backend_pid
        while thread.is_alive() and not database.value(
            "postgres", "select pg_blocking_pids(%s) <> '{}'", [pid]
        ):
            pass
        assert outcome == []  # it waits for the first to end
        getattr(first, first_ends)()
        thread.join(timeout=30)
    assert outcome == [second_gets]
    owner = one if first_ends == "commit" else two
    query = "select agent_id from kakunin_private.certificates where serial = %s"
    assert database.run("installer", query, [one["serial"]]) == [(owner["agent_id"],)]


def test_registered_by_is_the_login_and_not_a_role_it_took(database: Database) -> None:
    arguments = fields(database)
    with database.connect("registrar") as connection:
        connection.execute("set role kakunin_registrar")
        connection.execute(REGISTER, arguments)
    query = "select registered_by from kakunin_private.certificates where serial = %s"
    assert database.value("installer", query, [arguments["serial"]]) == "registrar"


# Revocation and suspension ------------------------------------------------------------------------------


def test_revocation_is_final_and_its_first_moment_and_reason_stay(database: Database) -> None:
    agent = database.agent()
    revoke = "select kakunin.revoke_certificate(%s, %s)"
    at = database.value("operator", revoke, [agent.serial, "keyCompromise"])
    before = state(database)
    assert database.value("operator", revoke, [agent.serial.lower(), "superseded"]) == at
    assert database.value("operator", "select kakunin.revoke_certificate(%s)", [agent.serial]) == at
    assert state(database) == before
    query = "select revoked_at, revocation_reason from kakunin_private.certificates where serial = %s"
    assert database.run("installer", query, [agent.serial]) == [(at, "keyCompromise")]
    agent.suspend()
    database.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    assert bindable(database, agent.serial) == "KA002"


def test_revocation_at_once_by_two_keeps_the_first(database: Database) -> None:
    agent = database.agent()
    later: list[Any] = []
    revoke = "select kakunin.revoke_certificate(%s, %s)"
    with database.connect("operator") as first, database.connect("operator", autocommit=True) as second:
        at = first.execute(revoke, [agent.serial, "keyCompromise"]).fetchone()

        def again() -> None:
            later.append(second.execute(revoke, [agent.serial, "superseded"]).fetchone())

        thread = threading.Thread(target=again)
        thread.start()
        pid = second.info.backend_pid
        while thread.is_alive() and not database.value(
            "postgres", "select pg_blocking_pids(%s) <> '{}'", [pid]
        ):
            pass
        first.commit()
        thread.join(timeout=30)
    assert later == [at]


@pytest.mark.parametrize(
    "reason",
    [
        "unspecified", "keyCompromise", "cACompromise", "affiliationChanged", "superseded",
        "cessationOfOperation", "privilegeWithdrawn", "aACompromise",
    ],
)  # fmt: skip
def test_the_reasons_are_those_of_rfc_5280(database: Database, reason: str) -> None:
    arguments = fields(database)
    database.run("registrar", REGISTER, arguments)
    database.run("operator", "select kakunin.revoke_certificate(%s, %s)", [arguments["serial"], reason])
    assert reason in {flag.value for flag in x509.ReasonFlags}  # an independent spelling of the RFC's names
    assert bindable(database, arguments["serial"]) == "KA002"


@pytest.mark.parametrize(
    "reason", [None, "", "KeyCompromise", "certificateHold", "removeFromCRL", "keyCompromise ", "1"]
)
def test_another_reason_revokes_nothing(database: Database, reason: str | None) -> None:
    arguments = fields(database)
    database.run("registrar", REGISTER, arguments)
    query = "select kakunin.revoke_certificate(%s, %s)"
    assert refused(database, "operator", query, [arguments["serial"], reason]).sqlstate == "KA010"
    assert bindable(database, arguments["serial"]) == "yes"


@pytest.mark.parametrize(
    ("serial", "sqlstate"), [("01:02", "KA001"), (None, "KA010"), ("", "KA010"), ("zz", "KA010")]
)
def test_what_is_not_there_cannot_be_revoked(database: Database, serial: str | None, sqlstate: str) -> None:
    error = refused(database, "operator", "select kakunin.revoke_certificate(%s)", [serial])
    assert error.sqlstate == sqlstate


def test_suspension_stops_every_certificate_of_the_agent_until_it_is_lifted(database: Database) -> None:
    one, other = fields(database), fields(database)
    two = fields(database, agent_id=one["agent_id"])
    serials = [database.value("registrar", REGISTER, f) for f in (one, two, other)]
    suspend = "select kakunin.suspend_agent(%s, %s)"
    since = "select suspended_at from kakunin_private.agents where agent_id = %s"
    database.run("operator", suspend, [one["agent_id"], "odd trades"])
    assert [bindable(database, s) for s in serials] == ["KA008", "KA008", "yes"]
    at = database.value("installer", since, [one["agent_id"]])
    database.run("operator", suspend, [one["agent_id"], "still odd"])
    assert database.value("installer", since, [one["agent_id"]]) == at
    for _ in range(2):  # lifting it twice is the same as once
        database.run("operator", "select kakunin.reinstate_agent(%s)", [one["agent_id"]])
        assert [bindable(database, s) for s in serials] == ["yes", "yes", "yes"]
    database.run("operator", suspend, [one["agent_id"], "again"])
    assert database.value("installer", since, [one["agent_id"]]) > at
    assert bindable(database, serials[0]) == "KA008"


@pytest.mark.parametrize("reason", [None, "", "   ", "x" * 1001])
def test_a_suspension_has_a_reason(database: Database, reason: str | None) -> None:
    arguments = fields(database)
    database.run("registrar", REGISTER, arguments)
    query = "select kakunin.suspend_agent(%s, %s)"
    assert refused(database, "operator", query, [arguments["agent_id"], reason]).sqlstate == "KA010"
    assert bindable(database, arguments["serial"]) == "yes"


@pytest.mark.parametrize("agent_id", [None, uuid.uuid4()], ids=["null", "unknown"])
@pytest.mark.parametrize("call", ["suspend_agent(%s, 'x')", "reinstate_agent(%s)"])
def test_an_unknown_agent_is_refused(database: Database, call: str, agent_id: uuid.UUID | None) -> None:
    assert refused(database, "operator", f"select kakunin.{call}", [agent_id]).sqlstate == "KA010"


# Validity -------------------------------------------------------------------------------------------


@pytest.fixture
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
    serial = database.value("registrar", REGISTER, fields(database, not_before=start, not_after=end))
    expected = {start - TICK: "KA003", start: "yes", start + TICK: "yes", end: "yes", end + TICK: "KA003"}
    for at, outcome in expected.items():
        set_clock(at)
        assert (at, bindable(database, serial)) == (at, outcome)


def test_g3_validity_and_revocation_reach_an_open_session_at_its_next_statement(clock: Any) -> None:
    database, set_clock = clock
    start, end = NOW + 1000 * DAY, NOW + 1090 * DAY
    arguments = fields(database, not_before=start, not_after=end)
    serial = database.value("registrar", REGISTER, arguments)
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

        bound, nothing = (serial, arguments["agent_id"], True), (None, None, False)
        for at, answer in {
            start: bound, end: bound, end + TICK: nothing, start - TICK: nothing, start + TICK: bound,
        }.items():  # fmt: skip
            set_clock(at)
            assert (at, seen()) == (at, answer)
        database.run("operator", "select kakunin.suspend_agent(%s, 'x')", [arguments["agent_id"]])
        assert seen() == nothing
        database.run("operator", "select kakunin.reinstate_agent(%s)", [arguments["agent_id"]])
        assert seen() == bound
        database.run("operator", "select kakunin.revoke_certificate(%s)", [serial])
        assert seen() == nothing


# Who may call what ----------------------------------------------------------------------------------

ALL = {"agent", "gateway", "registrar", "operator", "worker", "auditor"}
MAY_CALL = {
    "installation_id()": ALL,
    "normalize_serial(text)": ALL,
    "open_session(text)": {"agent", "gateway"},
    "bind_session(text,boolean)": {"agent", "gateway"},
    "unbind_session()": {"agent", "gateway"},
    "current_cert_serial()": {"agent", "gateway"},
    "current_agent_id()": {"agent", "gateway"},
    "has_scope(text)": {"agent", "gateway"},
    "require_session()": {"agent", "gateway"},
    "require_scope(text)": {"agent", "gateway"},
    "bind_serial(text)": {"gateway"},
    "create_agent(text,text)": {"registrar"},
    "register_certificate(uuid,bytea,text,bytea,timestamp with time zone,timestamp with time zone,text[])": {
        "registrar"
    },
    "revoke_certificate(text,text)": {"operator"},
    "suspend_agent(uuid,text)": {"operator"},
    "reinstate_agent(uuid)": {"operator"},
    "rotate_session_key(interval)": {"operator"},
    "protect(regclass,name,name[],text,boolean,boolean)": {"operator"},
    "unprotect(regclass)": {"operator"},
    "set_gateway_logins(name[])": set(),
    "renew_installation()": set(),
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
    "operator": "operator", "app": "operator", "stranger": None, "authenticator": None,
}  # fmt: skip
CALLERS = [*LOGIN_ROLES, "kakunin_worker", "kakunin_auditor"]


@pytest.mark.parametrize("caller", CALLERS)
def test_a_login_can_call_what_its_role_may_and_nothing_else(database: Database, caller: str) -> None:
    role = LOGIN_ROLES.get(caller, caller.removeprefix("kakunin_"))
    login = caller if caller in LOGIN_ROLES else "postgres"
    with database.connect(login, autocommit=True) as connection:
        if login == "postgres":
            connection.execute(f"set role {caller}")
        for function, roles in MAY_CALL.items():
            name, types = function.rstrip(")").split("(")
            call = f"select kakunin.{name}({', '.join(f'null::{t}' for t in types.split(',') if t)})"
            try:
                connection.execute(call)
                outcome = ""
            except psycopg.Error as error:
                outcome = error.sqlstate or ""
            assert outcome == "42501" or outcome == "" or outcome.startswith("KA"), (call, outcome)
            assert (outcome != "42501") == (role in roles), (caller, call, outcome)


# Signer -------------------------------------------------------------------------------------------------


def test_a_signer_is_saved_encrypted_for_its_user_alone_and_loads_again(tmp_path: Path) -> None:
    signer = LocalSigner.generate()
    path = tmp_path / "agent.pem"
    signer.save(path, b"correct horse")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    again = LocalSigner.load(str(path), b"correct horse")
    assert again.key_id == signer.key_id
    assert again.public_key().public_numbers() == signer.public_key().public_numbers()
    again.public_key().verify(
        again.sign(b"d" * 32), b"d" * 32, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())
    )
    assert signer.sign(b"d" * 32) == again.sign(b"d" * 32)


def test_a_saved_key_is_private_under_any_umask(tmp_path: Path) -> None:
    script = (
        "import os, sys; from kakunin_db import LocalSigner; os.umask(0);"
        "LocalSigner.generate().save(sys.argv[1], b'p'); print(oct(os.stat(sys.argv[1]).st_mode & 0o7777))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "k"], check=True, capture_output=True, text=True
    )
    assert out.stdout.strip() == "0o600"


def test_a_signer_never_overwrites_a_file_nor_follows_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "agent.pem", tmp_path / "link.pem"
    LocalSigner.generate().save(path, b"p")
    before = path.read_bytes()
    link.symlink_to(tmp_path / "elsewhere")
    for target in (path, link):
        with pytest.raises(FileExistsError):
            _any_signer().save(target, b"p")
    assert path.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()


def _any_signer() -> LocalSigner:
    issue()
    return _signer[0]


def test_a_signer_is_not_saved_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(BadInputError):
        _any_signer().save(tmp_path / "k", b"")
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_does_not_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.pem"
    _any_signer().save(path, b"right")
    for password in (b"wrong", b"", b"Right"):
        with pytest.raises(BadInputError, match="password") as caught:
            LocalSigner.load(path, password)
        assert password.decode() not in str(caught.value) or not password
    with pytest.raises(FileNotFoundError):
        LocalSigner.load(tmp_path / "none", b"right")


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    def write(name: str, key: Any) -> Path:
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"p"),
        )
        (tmp_path / name).write_bytes(pem)
        return tmp_path / name

    with pytest.raises(BadInputError, match="not an RSA key"):
        LocalSigner.load(write("ec", ec.generate_private_key(ec.SECP256R1())), b"p")
    with pytest.raises(BadInputError, match="1024 bits"):
        LocalSigner.load(write("small", rsa.generate_private_key(65537, 1024)), b"p")
    (tmp_path / "text").write_text("not a key")
    with pytest.raises(BadInputError):
        LocalSigner.load(tmp_path / "text", b"p")


@pytest.mark.parametrize(("e", "bits"), [(65537, 1024), (65537, 2047), (3, 2048), (65537, 4104)])
def test_a_signer_takes_only_keys_the_database_can_verify(e: int, bits: int) -> None:
    with pytest.raises(BadInputError, match=f"{bits} bits with exponent {e}"):
        LocalSigner(rsa.generate_private_key(e, bits))


def test_a_signer_signs_digests_and_shows_no_secret() -> None:
    signer = _any_signer()
    with pytest.raises(ValueError, match="digest"):
        signer.sign(b"too short")
    with pytest.raises(InvalidSignature):
        signer.public_key().verify(
            signer.sign(b"d" * 32), b"e" * 32, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256())
        )
    assert repr(signer) == f"<LocalSigner {signer.key_id}>"
    assert re.fullmatch("local:[0-9a-f]{16}", signer.key_id)


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
    strict = ["-x509_strict", "-check_ss_sig", "-CAfile", root]
    assert verifies(*strict, root)
    assert verifies(*strict, "-purpose", "sslclient", leaf)
    assert not verifies(*strict, "-purpose", "sslserver", leaf)
    assert not verifies("-CAfile", pem(tmp_path, "impostor.pem", LocalCA.create().certificate), leaf)
    # An agent's certificate cannot issue another.
    agent = _any_signer()
    lifetime = dt.timedelta(days=1)
    below = LocalCA(agent._key, issue().certificate).issue(
        uuid.uuid4(), agent.public_key(), lifetime=lifetime
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
    issued = issue(agent_id, permitted_actions=actions, tenant="t" * length)
    assert strings(value(issued, AGENT_URN)) == [(0, f"urn:kakunin:agent:{agent_id}")]
    assert strings(value(issued, PERMITTED_ACTIONS)) == [(1, action) for action in actions]
    assert strings(value(issued, TENANT)) == [(0, "t" * length)]


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
    modulus = (
        openssl("x509", "-noout", "-modulus", "-in", tmp_path / "c.pem").strip().removeprefix("Modulus=")
    )
    assert issued.public_key_modulus.hex().upper() == modulus


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


def classes() -> dict[str, type[KakuninError]]:
    return {
        cls.sqlstate: cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, KakuninError)
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


def test_the_sql_raises_no_other_sqlstate_of_that_class() -> None:
    raised = {
        s for path in sql_dir().rglob("*.sql") for s in re.findall(r"errcode = '(\w+)'", path.read_text())
    }
    assert raised <= set(STATES)
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


@pytest.mark.parametrize("sqlstate", ["42501", "P0001", "KA000", "KA011", "XX000"])
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
        {"lifetime": dt.timedelta(days=366)},
        {"lifetime": dt.timedelta(0)},
        {"not_before": dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=3650)},
    ],
    ids=str,
)
def test_the_authority_issues_nothing_that_registration_would_refuse(wrong: dict[str, Any]) -> None:
    with pytest.raises(errors.BadInputError):
        issue(**wrong)


def test_operators_look_agents_and_certificates_up_and_agents_do_not(database: Database) -> None:
    agent = database.agent("looked up", permitted_actions=["a:b"])
    for login in ("operator", "registrar"):
        assert database.value(login, "select name from kakunin.agents where agent_id = %s", [agent.agent_id])
        found = "select permitted_actions from kakunin.certificates where serial = %s"
        assert database.value(login, found, [agent.serial]) == ["a:b"]
    for login in ("agent_1", "gateway", "stranger"):
        for view in ("agents", "certificates"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                database.run(login, f"select from kakunin.{view}")
