"""DER and X.509 in SQL, each against a judge: tables for the rules, `cryptography` for whole certificates.

What is generated is generated from SEED: another one is KAKUNIN_TEST_SEED in the environment.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import functools
import json
import os
import random
import re
import ssl
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cryptography_vectors
import psycopg
import pytest
from cluster import Cluster
from conftest import Database, fresh_database
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from forge import (
    ACTIONS,
    ALTERNATIVE,
    ANY_USE,
    ARC,
    AUTHORITY_ID,
    BASIC,
    CLIENT,
    DAY,
    EXTENDED,
    MODEL,
    NOW,
    PSS,
    SCOPE,
    SERVER,
    SHA256_RSA,
    SUBJECT_ID,
    TENANT,
    URN,
    USAGE,
    Authority,
    Certificate,
    Parts,
    authority,
    certified,
    ec_key,
    header,
    modulus,
    name,
    nested,
    oid,
    raw_extension,
    resigned,
    rsa_key,
    sequence,
    size,
    split,
    tlv,
    usage,
    utf8,
)

from kakunin_db.resources import install_sql

SEED = int(os.environ.get("KAKUNIN_TEST_SEED", "61411"))
CERTIFICATES = 1700
SECOND = dt.timedelta(seconds=1)
VECTORS = Path(cryptography_vectors.__file__).parent / "x509"


# One element ------------------------------------------------------------------------------------------


REFUSED = "KA010"


@pytest.fixture(scope="module")
def owner(database: Database) -> Iterator[psycopg.Connection[Any]]:
    with database.connect("installer", autocommit=True) as connection:
        connection.execute("set statement_timeout = '20s'")
        connection.execute(
            "create function pg_temp.attempt(call text, ders bytea[]) returns text[] language plpgsql as $$"
            " declare answers text[] := '{}'; answer text; begin"
            " for i in 1..coalesce(array_length(ders, 1), 0) loop"
            " begin execute format('select kakunin_private.%s::text', call) into answer using ders[i];"
            " exception when others then answer := sqlstate; end;"
            " answers := array_append(answers, answer); end loop; return answers; end $$"
        )
        yield connection


def outcomes(connection: psycopg.Connection[Any], call: str, ders: Sequence[bytes | None]) -> list[Any]:
    """What a private function returns for each of these as its $1, as text, or the SQLSTATE."""
    row = connection.execute("select pg_temp.attempt(%s, %s::bytea[])", [call, list(ders)]).fetchone()
    assert row is not None
    return row[0]


def outcome(connection: psycopg.Connection[Any], function: str, der: bytes | None) -> Any:
    return outcomes(connection, f"{function}($1)", [der])[0]


LONG = bytes(128)
DEEP = functools.reduce(lambda inner, _: sequence(inner), range(15), b"\5\0")  # 15 levels around a NULL

GOOD_DER = {
    "null": "0500",
    "empty sequence": "3000",
    "empty set": "3100",
    "empty octets": "0400",
    "false": "010100",
    "true": "0101ff",
    "zero": "020100",
    "127": "02017f",
    "128": "02020080",
    "-128": "020180",
    "-129": "0202ff7f",
    "enumerated": "0a0101",
    "no bits": "030100",
    "eight bits": "030200ff",
    "seven bits": "030201fe",
    "one bit": "03020780",
    "a last byte of unused bits": "03020700",
    "oid": "06032a8648",
    "oid of one byte": "060100",
    "oid whose byte 80 is not a first one": "06032a8100",
    "oid with 81 80 00": "06042a818000",
    "utf-8, whatever is in it": "0c02ffff",
    "printable": "130141",
    "ia5": "160141",
    "utc time": "1700",
    "generalized time": "1800",
    "context, primitive, 0 to 30": sequence(*(tlv(0x80 + n) for n in range(31))).hex(),
    "context, constructed, 0 to 30": sequence(*(tlv(0xA0 + n, b"\5\0") for n in range(31))).hex(),
    "127 bytes": tlv(4, LONG[:127]).hex(),
    "128 bytes": tlv(4, LONG).hex(),
    "255 bytes": tlv(4, bytes(255)).hex(),
    "256 bytes": tlv(4, bytes(256)).hex(),
    "65535 bytes": tlv(4, bytes(65535)).hex(),
    "65536 bytes": tlv(4, bytes(65536)).hex(),
    "16 levels": sequence(DEEP).hex(),
    "siblings at 16 levels": sequence(DEEP, DEEP, b"\5\0").hex(),
    "a set in order": tlv(0x31, b"\2\1\1", b"\2\1\2", b"\2\2\1\0").hex(),
    "a set of equals": tlv(0x31, b"\2\1\1", b"\2\1\1").hex(),
}
BAD_DER = {
    "nothing": "",
    "half a header": "30",
    "tag without length": "04",
    "indefinite": "30800500",
    "indefinite, closed": "308005000000",
    "indefinite primitive": "04800000",
    "length of lengths cut off": "0482",
    "length cut off": "048201",
    "length 0 in two bytes": "048100",
    "length 127 in two bytes": "04817f" + "00" * 127,
    "length 128 in three bytes": "04820080" + "00" * 128,
    "length 255 in three bytes": "048200ff" + "00" * 255,
    "length 256 in four bytes": "0483000100" + "00" * 256,
    "four bytes of length": "04840000000100",
    "length in 126 bytes": "04fe" + "00" * 126,
    "reserved length ff": "04ff" + "00" * 127,
    "16 MiB that are not there": "0483ffffff00",
    "2 GiB that are not there": "04847fffffff00",
    "4 GiB that are not there": "3084ffffffff00",
    "content cut off": "040500",
    "content missing": "0401",
    "a byte after the end": "050000",
    "an element after the end": "05000500",
    "child longer than its parent": "30030402ffff",
    "child a byte longer than its parent": "30020401ff",
    "grandchild beyond its parent, inside its grandparent": "300630020402ffff",
    "end of contents": "0000",
    "end of contents inside": "30020000",
    "boolean, empty": "0100",
    "boolean 1": "010101",
    "boolean 7f": "01017f",
    "boolean fe": "0101fe",
    "boolean of two": "0102ffff",
    "integer, empty": "0200",
    "integer 00 00": "02020000",
    "integer 00 7f": "0202007f",
    "integer ff ff": "0202ffff",
    "integer ff 80": "0202ff80",
    "enumerated, empty": "0a00",
    "enumerated 00 01": "0a020001",
    "bits, empty": "0300",
    "bits, 1 unused of none": "030101",
    "bits, 7 unused of none": "030107",
    "bits, 8 unused": "03020800",
    "bits, 255 unused": "0302ff00",
    "bits, unused one is set": "03020101",
    "bits, unused seven are set": "0302077f",
    "null with content": "050100",
    "oid, empty": "0600",
    "oid begins with 80": "06028001",
    "oid, part begins with 80": "06032a8001",
    "oid, later part begins with 80": "06052a86488001",
    "oid, part begins with 80 after 81 00": "06052a81008001",
    "oid, part begins with 80 after 7f": "06042a7f8001",
    "oid cut off": "06022a86",
    "oid cut off, one byte": "0601ff",
    "17 levels": sequence(sequence(DEEP)).hex(),
    "17 levels of context": functools.reduce(lambda inner, _: tlv(0xA0, inner), range(17), b"").hex(),
    "17 levels, empty": functools.reduce(lambda inner, _: sequence(inner), range(17), b"").hex(),
    "high tag": "1f2000",
    "high context tag": "9f2000",
    "high constructed context tag": "bf200500",
    "application": "4000",
    "application, constructed": "6000",
    "private": "c000",
    "private, constructed": "e000",
    "sequence that is primitive": "1000",
    "set that is primitive": "1100",
    "octets in parts": "2403040100",
    "utf-8 in parts": "2c030c0100",
    "bits in parts": "2304030200ff",
    "real": "0900",
    "relative oid": "0d0101",
    "teletex": "140141",
    "videotex": "150141",
    "visible": "1a0141",
    "general": "1b0141",
    "bmp": "1e020041",
    "numeric": "120131",
    "universal string": "1c0400000041",
    "object descriptor": "070141",
    "external": "2800",
    "embedded pdv": "2b00",
    "reserved 14": "0e00",
    "a set out of order": tlv(0x31, b"\2\1\2", b"\2\1\1").hex(),
    "a set out of order by tag": tlv(0x31, b"\5\0", b"\2\1\1").hex(),
    "a set out of order, the last": tlv(0x31, b"\2\1\1", b"\2\1\2", b"\1\1\0").hex(),
    "a set out of order, inside": sequence(tlv(0x31, tlv(0x31, b"\2\1\2", b"\2\1\1"))).hex(),
    "a set of what ends too early": "31020402",
}


@pytest.mark.parametrize("case", GOOD_DER)
def test_der_has_this_form(owner: psycopg.Connection[Any], case: str) -> None:
    good = bytes.fromhex(GOOD_DER[case])
    assert outcome(owner, "der_check", good) == ""
    inside = sequence(b"\5\0", good, b"\5\0")
    assert outcome(owner, "der_check", inside) == (REFUSED if "16 levels" in case else "")


@pytest.mark.parametrize("case", BAD_DER)
def test_der_has_no_other_form(owner: psycopg.Connection[Any], case: str) -> None:
    bad = bytes.fromhex(BAD_DER[case])
    assert outcome(owner, "der_check", bad) == REFUSED
    for whole in (sequence(bad), sequence(b"\5\0", bad), tlv(0xA3, sequence(bad)), tlv(0x31, bad)):
        if case not in ("nothing", "an element after the end"):  # which are fine inside
            assert outcome(owner, "der_check", whole) == REFUSED


def test_every_tag_is_one_rfc_5280_uses_or_refused(owner: psycopg.Connection[Any]) -> None:
    used = {1, 2, 3, 4, 5, 6, 10, 12, 19, 22, 23, 24, 48, 49, *range(128, 159), *range(160, 191)}
    content = {1: b"\0", 2: b"\0", 3: b"\0", 6: b"\1", 10: b"\0"}
    taken = {t for t in range(256) if outcome(owner, "der_check", tlv(t, content.get(t, b""))) == ""}
    assert taken == used


def strict(der: bytes) -> bool:
    """Whether these bytes are one element in DER, told by writing again what was read."""
    try:
        value, rest = read(der, 1)
    except (ValueError, IndexError):
        return False
    return rest == b"" and write(value) == der


CHECKED: dict[int, Callable[[bytes], bool]] = {
    0x01: lambda c: c in (b"\0", b"\xff"),
    0x02: lambda c: c != b"" and number(int.from_bytes(c, "big", signed=True)) == c,
    0x0A: lambda c: c != b"" and number(int.from_bytes(c, "big", signed=True)) == c,
    0x03: lambda c: (
        c != b"" and c[0] < 8 and (len(c) > 1 or c == b"\0") and int.from_bytes(c[1:], "big") % 2 ** c[0] == 0
    ),
    0x05: lambda c: c == b"",
    0x06: lambda c: re.fullmatch(rb"([\x81-\xff][\x80-\xff]*[\0-\x7f]|[\0-\x7f])+", c, re.DOTALL) is not None,
}


def number(value: int) -> bytes:
    """The shortest two's complement."""
    length = (value + (value < 0)).bit_length() // 8 + 1
    return value.to_bytes(length, "big", signed=True)


def read(der: bytes, depth: int) -> tuple[tuple[int, Any], bytes]:
    start, end = header(der)
    tag, content = der[0], der[start:end]
    if end > len(der) or der[1] == 0x80:
        raise ValueError
    if tag in (0x30, 0x31) or 0xA0 <= tag <= 0xBE:
        if depth > 16:
            raise ValueError
        children = []
        while content:
            child, content = read(content, depth + 1)
            children.append(child)
        return (tag, children), der[end:]
    if tag not in (4, 12, 19, 22, 23, 24, *CHECKED) and not 0x80 <= tag <= 0x9E:
        raise ValueError
    if not CHECKED.get(tag, lambda c: True)(content):
        raise ValueError
    return (tag, content), der[end:]


def write(value: tuple[int, Any]) -> bytes:
    tag, content = value
    if isinstance(content, bytes):
        return tlv(tag, content)
    children = [write(child) for child in content]
    return tlv(tag, *(sorted(children) if tag == 0x31 else children))


def test_the_judge_of_der_is_none_of_the_defendants(owner: psycopg.Connection[Any]) -> None:
    """Python's idea of DER, which the fuzzing below asks, agrees with the tables."""
    assert all(strict(bytes.fromhex(der)) for der in GOOD_DER.values())
    assert not any(strict(bytes.fromhex(der)) for der in BAD_DER.values())


def any_element(source: random.Random, depth: int = 0) -> bytes:
    """An element, more often right than wrong."""
    tag = source.choice([1, 2, 3, 4, 5, 6, 10, 12, 0x30, 0x30, 0x31, 0xA0, 0xA3, 0x80, source.randrange(256)])
    constructed = tag in (0x30, 0x31) or 0xA0 <= tag <= 0xBE
    if constructed and depth < 18:
        children = [any_element(source, depth + 1) for _ in range(source.choice([0, 1, 1, 2, 3]))]
        content = b"".join(sorted(children) if source.random() < 0.8 else children)
    else:
        content = source.choice([
            b"", b"\0", b"\xff", b"\1", b"\x80", b"\x7f", b"\0\x80", b"\0\x7f", b"\xff\x7f", b"\xff\x80",
            b"\x2a\x86\x48", b"\x2a\x80\x01", b"\7\x80", b"\3\xf8", b"\3\xf4",
            source.randbytes(source.randrange(6)),
        ])  # fmt: skip
    if source.random() < 0.97:
        return tlv(tag, content)
    length = source.choice([
        size(len(content) + 1), size(max(len(content) - 1, 0)), b"\x81" + size(len(content))[-1:], b"\x80",
        b"\x82\0" + size(len(content))[-1:],
    ])  # fmt: skip
    return bytes([tag]) + length + content


def test_sql_and_python_agree_on_what_der_is(owner: psycopg.Connection[Any]) -> None:
    source = random.Random(SEED)
    elements = [any_element(source) for _ in range(6000)]
    found = outcomes(owner, "der_check($1)", elements)
    assert set(found) == {"", REFUSED}
    assert [e.hex() for e, f in zip(elements, found, strict=True) if (f == "") != strict(e)] == []
    assert 1000 < found.count("") < 5000  # both are tried


def test_children_are_the_elements_inside(owner: psycopg.Connection[Any]) -> None:
    source = random.Random(SEED)
    for count in (0, 1, 2, 3, 200):
        children = [tlv(4, source.randbytes(source.randrange(300))) for _ in range(count)]
        found = owner.execute(
            "select kakunin_private.der_children(%s, 48, 'x')", [sequence(*children)]
        ).fetchone()
        assert found == (children,)
    for der, content in ((b"\4\0", b""), (tlv(4, LONG), LONG), (tlv(4, bytes(70000)), bytes(70000))):
        assert owner.execute("select kakunin_private.der_content(%s, 4, 'x')", [der]).fetchone() == (content,)
    for function in ("der_children", "der_content"):
        wrong = outcomes(owner, f"{function}($1, 48, 'x')", [None, b"\4\0", tlv(0x31), tlv(0xA0)])
        assert wrong == [REFUSED] * 4


def test_object_identifiers_are_read_as_cryptography_writes_them(owner: psycopg.Connection[Any]) -> None:
    source = random.Random(SEED)
    dotted = [
        "0.0",
        "0.39",
        "1.0",
        "1.39",
        "2.0",
        "2.39",
        "2.40",
        "2.47",
        "2.48",
        "2.999",
        "1.2.840.113549.1.1.11",
    ]
    dotted += [f"2.{2**63}.1", f"1.3.{2**128}", f"{ARC}.5"]
    for _ in range(500):
        first = source.randrange(3)
        rest = [
            source.getrandbits(source.choice([3, 7, 8, 14, 21, 32, 70])) for _ in range(source.randrange(6))
        ]
        dotted.append(
            ".".join(map(str, (first, source.randrange(40) if first < 2 else source.getrandbits(9), *rest)))
        )
    assert outcomes(owner, "der_oid($1, 'x')", [oid(d) for d in dotted]) == dotted
    for d in dotted:  # the encoding is not this file's word alone
        with contextlib.suppress(ValueError):  # parts that cryptography does not do
            extension = x509.UnrecognizedExtension(ObjectIdentifier(d), b"")
            assert oid(d) in builder_with(extension)
    long = [
        tlv(6, b"\x2a" + b"\1" * 63),
        tlv(6, b"\x2a" + b"\1" * 64),
        tlv(6, b"\x2a" + b"\xff" * 62 + b"\1"),
    ]
    found = outcomes(owner, "der_oid($1, 'x')", [*long, b"\5\0", None])
    assert found[0] == "1.2" + ".1" * 63
    assert found[1] == REFUSED
    assert found[2] == f"1.2.{2 ** (7 * 63) - 128 + 1}"
    assert found[3:] == [REFUSED] * 2


def builder_with(extension: x509.ExtensionType) -> bytes:
    request = x509.CertificateSigningRequestBuilder().subject_name(name("x")).add_extension(extension, False)
    return request.sign(ec_key(), hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def judge_time(tag: int, text: str) -> str:
    """RFC 5280 section 4.1.2.5, by Python's calendar."""
    if not re.fullmatch(r"[0-9]{12}Z" if tag == 23 else r"[0-9]{14}Z", text, re.ASCII):
        return REFUSED
    century = "" if tag == 24 else "20" if text < "50" else "19"
    try:
        at = dt.datetime.strptime(century + text, "%Y%m%d%H%M%SZ").replace(tzinfo=dt.timezone.utc)
    except ValueError:
        return REFUSED
    # strptime takes second 60 and 61 for the next minute's; X.509 has none. UTCTime is for until 2049.
    if text[-3:-1] > "59" or (tag == 24 and at.year < 2050):
        return REFUSED
    return f"{at:%Y-%m-%d %H:%M:%S}+00"


TIMES = [
    (23, t) for t in (
        "000101000000Z", "491231235959Z", "500101000000Z", "991231235959Z", "700101000000Z", "691231235959Z",
        "240229000000Z", "230229000000Z", "000229000000Z", "960229120000Z", "980229000000Z", "240230000000Z",
        "240431000000Z", "240430235959Z", "241301000000Z", "240001000000Z", "240100000000Z", "240132000000Z",
        "240101240000Z", "240101006000Z", "240101000060Z", "240101000061Z", "2401010000Z", "240101000000",
        "240101000000z", "240101000000+0000", "240101000000-0100", "240101000000Z ", " 40101000000Z",
        "240101000000Z\0", "\n40101000000Z", "240101000000Z\n", "2401010000\uff10\uff10Z", "", "Z",
        "24010100000\u0661Z",
        "20240101000000Z", "240101000000.5Z", "-40101000000Z", "+40101000000Z", "24010100000\\Z",
        "24010100000\\060Z",
    )
] + [
    (24, t) for t in (
        "20491231235959Z", "20500101000000Z", "20500228235959Z", "20500229000000Z", "20520229000000Z",
        "21000228000000Z", "21000229000000Z", "24000229000000Z", "99991231235959Z", "00000101000000Z",
        "00010101000000Z", "19500101000000Z", "20500101240000Z", "20500101000060Z", "205001010000Z",
        "2050010100Z", "20500101000000.0Z", "20500101000000.5Z", "20500101000000", "20500101000000+0000",
        "20501301000000Z", "20500001000000Z", "20500100000000Z", "20500132000000Z", "490101000000Z",
        "120500101000000Z", "20500101000000Z\0", "2050010100000\u0661Z", "",
    )
]  # fmt: skip


def test_times_are_those_of_the_calendar(owner: psycopg.Connection[Any]) -> None:
    source = random.Random(SEED)
    times = list(TIMES)
    for _ in range(4000):
        tag, year = source.choice([(23, ""), (24, str(source.choice([19, 20, 20, 21, 99])))])
        parts = [source.randrange(100), source.randrange(14), source.randrange(33), source.randrange(25)]
        parts += [source.randrange(61), source.randrange(61)]
        times.append((tag, year + "".join(f"{p:02}" for p in parts) + "Z"))
    owner.execute("set timezone = 'UTC'")
    expected = [judge_time(tag, text) for tag, text in times]
    found = outcomes(owner, "der_time($1, 'x')", [tlv(tag, text.encode()) for tag, text in times])
    assert [t for t, e, f in zip(times, expected, found, strict=True) if e != f] == []
    assert 1000 < expected.count(REFUSED) < 3500
    wrong = [None, b"\5\0", tlv(12, b"240101000000Z"), tlv(19, b"240101000000Z"), tlv(23, LONG)]
    assert outcomes(owner, "der_time($1, 'x')", wrong) == [REFUSED] * len(wrong)
    # Whatever zone the session is in, and whichever day its clocks change.
    summer = [tlv(23, b"260329010000Z"), tlv(23, b"260329020000Z"), tlv(23, b"261025010000Z")]
    for zone in ("Europe/Berlin", "America/New_York", "Pacific/Apia"):
        owner.execute("select set_config('timezone', %s, false)", [zone])
        rows = owner.execute(
            "select extract(epoch from kakunin_private.der_time(t, 'x'))::bigint from unnest(%s::bytea[]) t",
            [summer],
        ).fetchall()
        assert [r[0] for r in rows] == [1774746000, 1774749600, 1792890000]
    owner.execute("reset timezone")


def test_texts_are_utf8_and_nothing_else(owner: psycopg.Connection[Any]) -> None:
    for text in ("", "a", "\u00e9", "\u65e5\u672c", "\U0001f600", "\x01\x7f", "\ufeffx"):
        assert outcomes(owner, "der_utf8($1, 'x')", [utf8(text)]) == [text]
    bad = [
        b"\0",
        b"a\0",
        b"\xff",
        b"\xc0\x80",
        b"\xe2\x82",
        b"\xed\xa0\x80",
        b"\xf5\x80\x80\x80",
        b"\x80",
        b"\xe9",
    ]
    assert outcomes(owner, "der_utf8($1, 'x')", [tlv(12, b) for b in bad]) == [REFUSED] * len(bad)
    other = [tlv(tag, b"a") for tag in (4, 19, 22, 20, 30, 0x2C, 0x8C)] + [None, sequence(utf8("a"))]
    assert outcomes(owner, "der_utf8($1, 'x')", other) == [REFUSED] * len(other)


def test_serials_are_positive_and_at_most_twenty_octets(owner: psycopg.Connection[Any]) -> None:
    source = random.Random(SEED)
    good = [
        1,
        127,
        128,
        255,
        256,
        2**159 - 1,
        *(source.getrandbits(source.randint(1, 159)) | 1 for _ in range(200)),
    ]
    found = outcomes(owner, "x509_serial($1)", [tlv(2, number(n)) for n in good])
    assert [int(f.replace(":", ""), 16) for f in found] == good
    assert found[:3] == ["01", "7F", "80"]
    bad = [0, -1, -128, -129, 2**159, 2**160 - 1, 2**160, 2**1000, -(2**100)]
    wrong = [*(tlv(2, number(n)) for n in bad), tlv(10, b"\1"), tlv(4, b"\1"), None]
    assert outcomes(owner, "x509_serial($1)", wrong) == [REFUSED] * len(wrong)


# Whole certificates: the world they are for ---------------------------------------------------------------


@dataclass(frozen=True)
class Agent:
    agent_id: uuid.UUID
    tenant: str | None = None
    model: str | None = None
    model_hash: str | None = None
    suspended: bool = False


HASH = "sha256:" + "0123456789abcdef" * 4
OTHER_HASH = "sha256:" + "f" * 64
AGENTS = {
    agent.agent_id: agent
    for agent in (
        Agent(uuid.UUID(int=1 << 100)),
        Agent(uuid.UUID(int=2 << 100), tenant="acme"),
        Agent(uuid.UUID(int=3 << 100), model="gpt", model_hash=HASH),
        Agent(uuid.UUID(int=4 << 100), tenant="\u65e5\u672c", model="m\u00f6del"),
        Agent(uuid.UUID(int=5 << 100), suspended=True),
    )
}
UNKNOWN = uuid.UUID(int=99 << 100)
FAR = dt.datetime(2060, 1, 1, tzinfo=dt.timezone.utc)


@dataclass
class World:
    """Authorities with keys, and the certificates of those that are pinned."""

    authorities: dict[str, Authority]
    pinned: dict[str, x509.Certificate]  # by key id
    distrusted: set[str]


@functools.cache
def world() -> World:
    """The same for every server: RSA keys and signatures take their time."""
    ders: dict[str, bytes] = {}
    authorities: dict[str, Authority] = {}

    def add(called: str, key: Any, *, pin: bool = True, **arguments: Any) -> Authority:
        made, certificate = authority(key, arguments.pop("common_name", called), **arguments)
        authorities[called] = made
        if pin:
            made.certificate = ders[called] = certificate.der
        return made

    root = add("root", rsa_key(1), not_before=NOW - 700 * DAY, not_after=FAR)
    below = add("below", rsa_key(2), issuer=root, path_length=0, not_after=NOW + 200 * DAY)
    add("large", rsa_key(0, 4096), not_before=NOW - 700 * DAY)
    add("medium", rsa_key(0, 3072), key_id=bytes(range(32)))
    add("distrusted", rsa_key(3))
    add("expired", rsa_key(4), not_before=NOW - 300 * DAY, not_after=NOW - DAY)
    # Not pinned: strangers, and those that say they are somebody else.
    add("stranger", rsa_key(5), pin=False)
    add("rogue", rsa_key(5), pin=False, common_name="root", key_id=root.key_id)
    add("root by another name", rsa_key(1), pin=False, common_name="Root", key_id=root.key_id)
    add("root for below", rsa_key(1), pin=False, common_name="below", key_id=below.key_id)
    add("below for root", rsa_key(2), pin=False, common_name="root", key_id=root.key_id)
    add("root's name below's id", rsa_key(2), pin=False, common_name="root", key_id=below.key_id)
    add("unpinned below root", rsa_key(6), pin=False, issuer=root)
    add("elliptic", ec_key(), pin=False)
    add("elliptic root", ec_key(), pin=False, common_name="root", key_id=root.key_id)
    pinned = {authorities[n].text_id: x509.load_der_x509_certificate(der) for n, der in ders.items()}
    return World(authorities, pinned, {authorities["distrusted"].text_id})


@pytest.fixture(scope="module")
def judged(cluster: Cluster) -> Iterator[Database]:
    """A database with that world in it."""
    with fresh_database(cluster) as database:
        with database.connect("installer") as connection:
            for agent in AGENTS.values():
                connection.execute(
                    "insert into kakunin_private.agents (agent_id, name, tenant, model, model_hash)"
                    " values (%s, 'x', %s, %s, %s)",
                    [agent.agent_id, agent.tenant, agent.model, agent.model_hash],
                )
                if agent.suspended:
                    connection.execute("select kakunin.suspend_agent(%s, 'x')", [agent.agent_id])
            for called, known in world().authorities.items():
                if called == "expired":  # it was pinned while it was good
                    connection.execute(
                        "create or replace function kakunin_private.clock() returns timestamptz"
                        f" language sql volatile parallel safe return timestamptz '{NOW - 2 * DAY}'"
                    )
                if known.certificate:
                    assert connection.execute(
                        "select kakunin.trust_ca(%s)", [known.certificate]
                    ).fetchone() == (known.text_id,)
                connection.execute(
                    "create or replace function kakunin_private.clock() returns timestamptz"
                    " language sql volatile parallel safe return clock_timestamp()"
                )
            for key_id in world().distrusted:
                connection.execute("select kakunin.distrust_ca(%s)", [key_id])
        yield database


TRY = """
create function pg_temp.try(ders bytea[]) returns table (
  state text, message text, took double precision, serial text, agent_id uuid, issuer_key_id text, der bytea,
  modulus bytea, not_before timestamptz, not_after timestamptz, model text, model_hash text, actions text[],
  tenant text, scope jsonb
) language plpgsql as $$
#variable_conflict use_variable
declare
  started timestamptz;
begin
  for i in 1..array_length(ders, 1) loop
    state := 'registered'; message := null; serial := null; started := clock_timestamp();
    begin
      serial := kakunin.register_certificate(ders[i]);
      STORED
      raise exception using errcode = 'TRIED';
    exception
      when sqlstate 'TRIED' then null;
      when others then state := sqlstate; message := sqlerrm;
    end;
    took := extract(epoch from clock_timestamp() - started);
    return next;
  end loop;
end $$"""
STORED = """select c.agent_id, c.issuer_key_id, c.der, c.public_key_modulus, c.not_before, c.not_after,
  c.model, c.model_hash, c.permitted_actions, c.tenant, c.financial_scope
  into strict agent_id, issuer_key_id, der, modulus, not_before, not_after, model, model_hash, actions,
  tenant, scope
  from kakunin_private.certificates c where c.serial = try.serial;"""
SLOWEST = 2.0  # seconds that one certificate may take; a hundred times what it does


class Registrar:
    """Offers certificates, many a statement, and takes back what was registered."""

    def __init__(self, connection: psycopg.Connection[Any], stored: str) -> None:
        self.connection = connection
        connection.execute("set statement_timeout = '60s'")
        connection.execute(TRY.replace("STORED", stored).encode())

    def __call__(self, ders: Sequence[bytes]) -> list[Any]:
        found: list[Any] = []
        for at in range(0, len(ders), 250):
            batch = list(ders[at : at + 250])
            found += self.connection.execute("select * from pg_temp.try(%s::bytea[])", [batch]).fetchall()
        assert max(f.took for f in found) < SLOWEST
        return found


@pytest.fixture(scope="module")
def offer(judged: Database) -> Iterator[Registrar]:
    """As the owner, who can read what was stored."""
    rows = psycopg.rows.namedtuple_row
    with judged.connect("installer", autocommit=True, row_factory=rows) as connection:
        yield Registrar(connection, STORED)


# The judge ------------------------------------------------------------------------------------------------


UNREADABLE = (
    ValueError, TypeError, IndexError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip


class RefusedError(Exception):
    pass


def need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RefusedError(otherwise)


def text_of(der: bytes, what: str) -> str:
    need(der[:1] == b"\x0c", f"{what}: no UTF8String")
    start, end = header(der)
    text = der[start:end].decode()
    need(utf8(text) == der and "\0" not in text, f"{what}: not DER")
    return text


def texts_of(der: bytes, what: str) -> list[str]:
    need(der[:1] == b"\x30", f"{what}: no SEQUENCE")
    texts = [text_of(element, what) for element in split(der)]
    need(sequence(*map(utf8, texts)) == der, f"{what}: not DER")
    return texts


def short(text: str, what: str) -> str:
    need(0 < len(text) <= 200 and text.strip() != "", f"{what}: not 1 to 200 characters")
    return text


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inside in value.items() if isinstance(value, dict) else value:
            yield from strings(list(inside) if isinstance(inside, tuple) else inside)


LIMITS = {
    "max_single_trade_usd", "daily_limit_usd", "leverage_permitted", "max_leverage_ratio", "permitted_venues",
    "permitted_instruments",
}  # fmt: skip


def scope_of(der: bytes) -> Any:
    def constant(_: str) -> None:
        raise ValueError

    def number(text: str) -> float:
        need(abs(int(text.lower().partition("e")[2] or 0)) < 1000, "scope: a number out of range")
        return float(text)

    text = text_of(der, "scope")
    try:
        scope = json.loads(text, parse_constant=constant, parse_float=number)
    except (ValueError, RecursionError):
        raise RefusedError("scope: no JSON") from None
    need(isinstance(scope, dict), "scope: no object")
    need(set(scope) <= LIMITS, "scope: what is no limit")
    found = "".join(strings(scope))
    need("\0" not in found, "scope: a zero character")
    need(not re.search(r"[\ud800-\udfff]", found), "scope: half a character")
    return scope


def verdict(der: bytes) -> tuple[str, str, dict[str, Any]]:
    """'registered' or the SQLSTATE, why, and what is to be stored, as `cryptography` reads it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return "registered", "", judge(der)
    except RefusedError as refused:
        return (("KA008" if str(refused) == "suspended" else REFUSED), str(refused), {})
    except UNREADABLE as error:
        return REFUSED, f"cryptography: {error!r}", {}
    except Warning:
        return REFUSED, "cryptography: warning", {}


def judge(der: bytes) -> dict[str, Any]:
    need(len(der) <= 16384, "too large")
    certificate = x509.load_der_x509_certificate(der)
    # What cryptography takes without showing: the parameters of the algorithms, and fields nobody should use.
    tbs, algorithm, signature_bits = split(der)
    fields = split(tbs)
    need(len(fields) == 8, "not eight fields")
    need(certificate.version == x509.Version.v3, "not version 3")
    need(algorithm == fields[2] == SHA256_RSA, "not sha256WithRSAEncryption")
    need(split(fields[6])[0].hex() == "300d06092a864886f70d0101010500", "not rsaEncryption")
    need(signature_bits == tlv(3, b"\0" + certificate.signature), "signature of odd bits")
    need(0 < certificate.serial_number < 2**159, "serial")
    need(len(certificate.issuer.rdns) > 0 and len(certificate.subject.rdns) > 0, "no name")
    not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    need(not_before < not_after, "no validity")
    for at, time in zip((not_before, not_after), split(fields[4]), strict=True):
        need(time[0] == (23 if at.year < 2050 else 24), "validity: the other form of time")
    key = certificate.public_key()
    need(isinstance(key, rsa.RSAPublicKey), "key: not RSA")
    assert isinstance(key, rsa.RSAPublicKey)
    need(2048 <= key.key_size <= 4096 and key.public_numbers().e == 65537, "key: size or exponent")
    need(key.public_numbers().n % 2 == 1, "key: even")
    extensions = {extension.oid.dotted_string: extension for extension in certificate.extensions}
    need(len(extensions) <= 64, "extensions: too many")
    written = {split(e)[0]: split(e)[-1] for e in split(split(fields[7])[0])}
    for dotted in {BASIC, USAGE, EXTENDED, SUBJECT_ID, AUTHORITY_ID, ALTERNATIVE} & extensions.keys():
        again = extensions[dotted].value.public_bytes()
        need(written[oid(dotted)] == tlv(4, again), f"{dotted}: not DER")

    def value(dotted: str) -> Any:
        return extensions[dotted].value if dotted in extensions else None

    def raw(dotted: str) -> bytes | None:
        found = value(dotted)
        return None if found is None else found.value

    if SUBJECT_ID in extensions:
        need(8 <= len(value(SUBJECT_ID).digest) <= 32, "subjectKeyIdentifier: size")
    # Who signed it
    named = value(AUTHORITY_ID)
    need(named is not None and named.key_identifier is not None, "authorityKeyIdentifier: none")
    key_id = named.key_identifier.hex(":").upper()
    need(key_id in world().pinned, "authority: unknown")
    need(key_id not in world().distrusted, "authority: distrusted")
    issuer = world().pinned[key_id]
    issuer_key = issuer.public_key()
    assert isinstance(issuer_key, rsa.RSAPublicKey)
    try:
        issuer_key.verify(
            certificate.signature, certificate.tbs_certificate_bytes, padding.PKCS1v15(), hashes.SHA256()
        )
    except InvalidSignature:
        raise RefusedError("signature") from None
    need(issuer.subject.public_bytes() == certificate.issuer.public_bytes(), "issuer: another name")
    need(issuer.not_valid_before_utc <= NOW <= issuer.not_valid_after_utc, "authority: expired")
    need(
        issuer.not_valid_before_utc <= not_before and not_after <= issuer.not_valid_after_utc,
        "validity: not inside the authority's",
    )
    # What it may be used for
    known = {BASIC, USAGE, EXTENDED, ALTERNATIVE}
    critical = {d for d, e in extensions.items() if e.critical}
    need(critical <= known, "extensions: critical and unknown")
    need(not (value(BASIC) and value(BASIC).ca), "basicConstraints: cA")
    uses = value(USAGE)
    need(uses is not None and uses.digital_signature, "keyUsage: no digitalSignature")
    need(not uses.key_cert_sign and not uses.crl_sign, "keyUsage: keyCertSign or cRLSign")
    extended = value(EXTENDED)
    need(extended is not None and ExtendedKeyUsageOID.CLIENT_AUTH in extended, "extKeyUsage: no clientAuth")
    need(not_after - not_before <= 365 * DAY, "validity: longer than a year")
    need(not_after >= NOW, "expired")
    # What it says
    need(raw(URN) is not None, "urn: none")
    urn = text_of(raw(URN) or b"", "urn")
    need(
        re.fullmatch(r"urn:kakunin:agent:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", urn) is not None,
        "urn: form",
    )
    names = value(ALTERNATIVE)
    uris = [] if names is None else names.get_values_for_type(x509.UniformResourceIdentifier)
    need(all(uri == urn for uri in uris), "subjectAltName: another URI")
    model = model_hash = tenant = scope = None
    if (der_ := raw(MODEL)) is not None:
        texts = texts_of(der_, "model")
        need(len(texts) == 2, "model: not two")
        model, model_hash = short(texts[0], "model"), texts[1].lower()
        need(re.fullmatch("sha256:[0-9a-f]{64}", model_hash) is not None, "model: hash")
    actions = []
    if (der_ := raw(ACTIONS)) is not None:
        actions = texts_of(der_, "actions")
        need(len(actions) <= 256, "actions: too many")
        for action in actions:
            stem = action.removesuffix(":*")
            limit = 128 if stem == action else 126
            need(re.fullmatch(r"[A-Za-z0-9_.:/-]+", stem) is not None and len(stem) <= limit, "actions: name")
    if (der_ := raw(TENANT)) is not None:
        tenant = short(text_of(der_, "tenant"), "tenant")
    if (der_ := raw(SCOPE)) is not None:
        scope = scope_of(der_)
    # For whom
    agent = AGENTS.get(uuid.UUID(urn[-36:]))
    need(agent is not None, "agent: unknown")
    assert agent is not None
    need(not agent.suspended, "suspended")
    need(agent.tenant == tenant, "agent: tenant")
    need(agent.model_hash in (None, model_hash), "agent: model hash")
    need(None in (agent.model, model) or agent.model == model, "agent: model")
    authorities = (known.public_key() for known in world().pinned.values())
    need(modulus(key) not in map(modulus, authorities), "key: an authority's")
    return {
        "serial": f"{certificate.serial_number:x}", "agent_id": agent.agent_id, "issuer_key_id": key_id,
        "der": der,
        "modulus": modulus(key), "not_before": not_before, "not_after": not_after, "model": model,
        "model_hash": model_hash, "actions": actions, "tenant": tenant, "scope": scope,
    }  # fmt: skip


def disagreement(der: bytes, found: Any) -> str:
    """'' when SQL and the judge say the same of a certificate and all that is stored is what it says."""
    state, why, stored = verdict(der)
    if found.state != state:
        return f"SQL: {found.state} {found.message}; judge: {state} {why}; {der.hex()}"
    for column, expected in stored.items():
        kept = getattr(found, column)
        if column == "serial":
            kept = f"{int(kept.replace(':', ''), 16):x}"
        if kept != expected:
            return f"{column} is {kept!r} and should be {expected!r}; {der.hex()}"
    return ""


# Certificates of every kind -------------------------------------------------------------------------------

Change = Callable[[Certificate, Agent, random.Random], Any]


def urn_of(agent: Agent | uuid.UUID) -> str:
    return f"urn:kakunin:agent:{getattr(agent, 'agent_id', agent)}"


def good(agent: Agent) -> Certificate:
    """What registers for this agent."""
    made = certified(world().authorities["root"], agent.agent_id)
    if agent.tenant:
        made.put(TENANT, utf8(agent.tenant))
    if agent.model_hash:
        made.put(MODEL, sequence(utf8(agent.model or ""), utf8(agent.model_hash)))
    return made


def valid(start: dt.datetime, end: dt.datetime) -> Change:
    def change(c: Certificate, _a: Agent, _r: random.Random) -> None:
        c.not_before, c.not_after = start, end

    return change


def extension(dotted: str, value: Any, critical: bool = False) -> Change:
    return lambda c, a, r: c.put(dotted, value(a) if callable(value) else value, critical)


def by_hand(dotted: str, value: bytes) -> Change:
    return extension(dotted, value, dotted in (BASIC, USAGE))


def signed_by(called: str) -> Change:
    def change(c: Certificate, _a: Agent, _r: random.Random) -> None:
        c.issuer = world().authorities[called]
        c.put(AUTHORITY_ID, x509.AuthorityKeyIdentifier(c.issuer.key_id, None, None))

    return change


def of_key(make: Callable[[], Any]) -> Change:
    return lambda c, a, r: setattr(c, "public_key", make().public_key())


def named(*attributes: tuple[ObjectIdentifier, str], subject: bool = True) -> Change:
    made = x509.Name([x509.NameAttribute(kind, text) for kind, text in attributes])

    def change(c: Certificate, _a: Agent, _r: random.Random) -> None:
        if subject:
            c.subject = made
        else:
            c.issuer = Authority(c.issuer.key, made, c.issuer.key_id)

    return change


def tweak(change: Callable[[Parts], Any]) -> Change:
    def where_it_can_be(parts: Parts) -> None:
        with contextlib.suppress(
            IndexError, ValueError
        ):  # an earlier change took away what this one is about
            change(parts)

    return lambda c, a, r: c.tweaks.append(where_it_can_be)


def put_field(at: int, der: bytes) -> Change:
    return tweak(lambda p: p.fields.__setitem__(at, der))


def algorithm(inner: str | None, outer: str | None, hash_: hashes.HashAlgorithm | None = None) -> Change:
    """Another name for the algorithm, and perhaps another algorithm."""

    def change(p: Parts) -> None:
        p.fields[2] = bytes.fromhex(inner) if inner else p.fields[2]
        p.algorithm = bytes.fromhex(outer) if outer else p.algorithm
        p.hash = hash_ or p.hash

    return tweak(change)


def signature(bits: Callable[[bytes], bytes]) -> Change:
    return tweak(lambda p: setattr(p, "bits", bits))


def altered_extensions(change: Callable[[list[bytes]], list[bytes]]) -> Change:
    return tweak(lambda p: setattr(p, "extensions", change(p.extensions)))


def public_key(number_: Callable[[int], bytes], exponent: bytes = b"\2\3\1\0\1", *more: bytes) -> Change:
    """The key with another modulus or exponent."""

    def change(p: Parts) -> None:
        kind, bits = split(p.fields[6])
        if kind.hex() == "300d06092a864886f70d0101010500":
            n = int.from_bytes(split(bits[len(bits) - header(bits)[1] + header(bits)[0] + 1 :])[0][4:], "big")
            p.fields[6] = sequence(kind, tlv(3, b"\0" + sequence(tlv(2, number_(n)), exponent, *more)))

    return tweak(change)


def signed(n: int) -> bytes:
    return n.to_bytes(n.bit_length() // 8 + 1, "big", signed=True)


def serial_of(n: int) -> Change:
    return lambda c, a, r: setattr(c, "serial", n)


def key_usage(c: Certificate, _a: Agent, r: random.Random) -> None:
    bits = ["digital_signature"] * (r.random() < 0.8)
    bits += [b for b in ("content_commitment", "key_encipherment", "data_encipherment") if r.random() < 0.3]
    bits += [b for b in ("key_cert_sign", "crl_sign") if r.random() < 0.15]
    if r.random() < 0.3:
        bits += ["key_agreement", r.choice(["encipher_only", "decipher_only"])]
    c.put(USAGE, usage(*bits), r.random() < 0.7)


def alternative(*names: Any) -> Change:
    def change(c: Certificate, a: Agent, r: random.Random) -> None:
        made = [x509.UniformResourceIdentifier(n(a)) if callable(n) else n for n in names]
        c.put(ALTERNATIVE, x509.SubjectAlternativeName(made), r.random() < 0.2)

    return change


def uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


def authority_id(**parts: Any) -> Change:
    def change(c: Certificate, _a: Agent, r: random.Random) -> None:
        values = {
            "key_identifier": c.issuer.key_id, "authority_cert_issuer": None,
            "authority_cert_serial_number": None,
            **parts,
        }  # fmt: skip
        c.put(AUTHORITY_ID, x509.AuthorityKeyIdentifier(**values), r.random() < 0.1)

    return change


def several_actions(c: Certificate, _a: Agent, r: random.Random) -> None:
    letters = "abcXYZ019_.:/-"
    names = [
        "".join(r.choices(letters, k=r.choice([1, 3, 8]))) + r.choice(["", "", ":*"])
        for _ in range(r.randrange(9))
    ]
    c.put(ACTIONS, sequence(*map(utf8, names)))


CRL_POINTS = x509.CRLDistributionPoints(
    [x509.DistributionPoint([uri("http://a.example/crl")], None, None, None)]
)
ROOT_NAME = x509.DirectoryName(name("root"))
SHA1_RSA, SHA384_RSA = "300d06092a864886f70d0101050500", "300d06092a864886f70d01010c0500"
BARE_SHA256_RSA, ECDSA_SHA256 = "300b06092a864886f70d01010b", "300a06082a8648ce3d040302"
BAD_ACTIONS = [
    "", " ", "a b", "a\n", "\na", "*", "a*", ":*", "a:**", "a:*b", "*:a", "\u00e9", "\uff41", "a'", "a;",
    "x" * 129,
    "x" * 127 + ":*", "a\0", "a:*\n", "\u212a", "a,b", "a\\b", "[a]", "a:\u066d",
]  # fmt: skip
GOOD_ACTIONS = ["a", "x" * 128, "x" * 126 + ":*", "A/b-c_d.e:0", "::", "a::*", "-", "::*", "/:*"]
SCOPES = [
    "{}", '{"max_single_trade_usd": 100, "daily_limit_usd": null}',
    ' {"permitted_venues" : [1, 2.5, -3e2, true, null, {"b": "\\u00e9\\n"}] } ',
    '{"permitted_venues": "\u65e5\U0001f600"}', '{"permitted_instruments": "\\ud83d\\ude00"}',
    '{"daily_limit_usd": 1, "daily_limit_usd": 2}', '{"d\\u0061ily_limit_usd": 1}',
    '{"daily_limit_usd": 12345678901234567890.123}', '{"max_leverage_ratio": {"' + "k" * 3000 + '": 1}}',
    '{"leverage_permitted": ' + "[" * 200 + "]" * 200 + "}", '{"permitted_venues": {"\\\\u0000": 1}}',
]  # fmt: skip
BAD_SCOPES = [
    "", " ", "[]", '"{}"', "1", "null", "true", "{", "}", "{}{}", "{} x", "{'daily_limit_usd': 1}",
    "{daily_limit_usd: 1}", '{"daily_limit_usd": 1,}', "\ufeff{}", "/**/{}",
    *(f'{{"daily_limit_usd": {value}}}' for value in (
        "01", "NaN", "Infinity", '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\n"', "1e400000", ".5", "+1",
        '"\\x41"', "[" * 3000, "1e-400000",
    )),
    # No JSON is wrong with these, and no limit.
    '{"a": 1}', '{"": 1}', '{"max_transaction_usdd": 1}', '{"daily_limit_usd": 1, "currency": "EUR"}',
    '{"Daily_limit_usd": 1}', '{"daily_limit_usd ": 1}', '{"daily_limit_us\u0501": 1}', '{"limits": {}}',
    '{"\\\\u0000": 1}', '{"' + "k" * 3000 + '": 1}', '{"a": 1, "a": 2}',
]  # fmt: skip
BAD_URNS = [
    "", "{}", "urn:kakunin:agent:", "urn:kakunin:agent:{} ", " urn:kakunin:agent:{}",
    "urn:kakunin:agent:{}\n",
    "URN:kakunin:agent:{}", "urn:kakunin:user:{}", "urn:kakunin:agent:{{{}}}", "urn:kakunin:agent:{}0",
    "urn:kakunin:agent:{}#x", "urn:kakunin:agent:urn:kakunin:agent:{}", "urn:kakunin:agent:{}\x00",
]  # fmt: skip

CHANGES: dict[str, list[Change]] = {
    "validity": [
        valid(NOW - 100 * DAY, NOW - DAY), valid(NOW - 2 * DAY, NOW - DAY), valid(NOW + DAY, NOW + 90 * DAY),
        valid(NOW + 3650 * DAY, NOW + 3650 * DAY + 365 * DAY), valid(NOW - DAY, NOW + 364 * DAY),
        valid(NOW - DAY, NOW + 364 * DAY + SECOND), valid(NOW - DAY, NOW + 700 * DAY),
        valid(NOW - 800 * DAY, NOW + DAY),
        valid(NOW - 300 * DAY, NOW + 60 * DAY), valid(NOW + DAY, NOW + DAY),
        valid(NOW + DAY, NOW + DAY + SECOND),
        valid(NOW - 701 * DAY, NOW - 600 * DAY), valid(NOW, NOW + 210 * DAY),
        valid(NOW + 4000 * DAY, NOW + 4100 * DAY),
        valid(FAR - 365 * DAY, FAR), valid(FAR - 365 * DAY, FAR + SECOND), valid(FAR - 366 * DAY, FAR),
        valid(dt.datetime(2049, 6, 1), dt.datetime(2050, 5, 1)),
        valid(dt.datetime(2049, 12, 31), dt.datetime(2050, 1, 1)),
        valid(dt.datetime(2050, 1, 1), dt.datetime(2050, 1, 2)),
        valid(dt.datetime(2044, 2, 29), dt.datetime(2045, 2, 28)),
        valid(dt.datetime(2049, 12, 31, 23, 59, 59), dt.datetime(2050, 12, 31, 23, 59, 59)),
        valid(dt.datetime(2051, 3, 1), dt.datetime(2052, 2, 29)),
        valid(dt.datetime(2051, 3, 1), dt.datetime(2052, 3, 1)),
    ],
    "basicConstraints": [
        extension(BASIC, None), extension(BASIC, x509.BasicConstraints(False, None)),
        *(extension(BASIC, x509.BasicConstraints(True, n), True) for n in (None, 0, 3)),
        extension(BASIC, x509.BasicConstraints(True, None)),
        *(
            by_hand(BASIC, raw)
            for raw in (
                b"", b"\x30\0", sequence(b"\1\1\0"), sequence(b"\2\1\0"), sequence(b"\1\1\0", b"\2\1\0"),
                b"\5\0",
                sequence(b"\1\1\xff", b"\2\1\xff"), sequence(b"\1\1\xff", b"\2\1\0", b"\5\0"), b"\x31\0",
                sequence(b"\5\0"),
            )
        ),
    ],
    "keyUsage": [
        *[key_usage] * 6, extension(USAGE, None), by_hand(USAGE, b"\3\2\7\x80"),
        by_hand(USAGE, b"\3\3\7\x88\x80"),
        *(
            by_hand(USAGE, raw)
            for raw in (
                b"", b"\3\1\0", b"\3\2\0\x80", b"\3\2\6\x80", b"\3\3\7\x80\0", b"\3\3\6\x80\x40",
                b"\3\3\0\x80\1",
                b"\3\4\7\x80\0\x80", b"\4\2\7\x80", b"\3\2\7\x80\0", b"\x23\4\3\2\7\x80",
            )
        ),
    ],
    "extKeyUsage": [
        extension(EXTENDED, None), extension(EXTENDED, x509.ExtendedKeyUsage([SERVER])),
        extension(EXTENDED, x509.ExtendedKeyUsage([ANY_USE])),
        extension(EXTENDED, x509.ExtendedKeyUsage([SERVER, CLIENT])),
        extension(EXTENDED, x509.ExtendedKeyUsage([CLIENT]), True),
        extension(EXTENDED, x509.ExtendedKeyUsage([ObjectIdentifier("1.3.6.1.5.5.7.3.2.1")]), True),
        *(
            by_hand(EXTENDED, raw)
            for raw in (
                b"", b"\x30\0", oid(CLIENT.dotted_string), tlv(0x31, oid(CLIENT.dotted_string)),
                sequence(oid(CLIENT.dotted_string), b"\5\0"), sequence(b"\2\1\1", oid(CLIENT.dotted_string)),
                sequence(oid(CLIENT.dotted_string)) * 2,
                sequence(oid(CLIENT.dotted_string), oid(CLIENT.dotted_string)),
            )
        ),
    ],
    "subjectAltName": [
        extension(ALTERNATIVE, None), alternative(urn_of), alternative(uri("urn:kakunin:agent:x")),
        alternative(urn_of, uri("https://a.example")), alternative(uri(urn_of(UNKNOWN)), urn_of),
        alternative(lambda a: urn_of(a).upper()), alternative(lambda a: urn_of(a) + "/"),
        alternative(x509.DNSName("a.example")), alternative(urn_of, x509.DNSName("urn:kakunin:agent:x")),
        alternative(x509.RFC822Name("a@a.example"), urn_of), alternative(x509.DirectoryName(name("x"))),
        alternative(x509.RegisteredID(ObjectIdentifier("1.2.3")), urn_of), alternative(urn_of, urn_of),
        alternative(x509.OtherName(ObjectIdentifier("1.2.3"), utf8("x"))),
        *(
            by_hand(ALTERNATIVE, raw)
            for raw in (
                b"", b"\x30\0", b"\5\0", sequence(b"\5\0"), sequence(tlv(0xA3, b"\5\0")),
                sequence(tlv(0xA5, b"\5\0")),
                sequence(tlv(0xA6, tlv(0x86, b"x"))), sequence(tlv(0x86, b"")), sequence(tlv(0x86, b"\xff")),
                sequence(tlv(0x89, b"x")), tlv(0x31, tlv(0x82, b"x")), sequence(tlv(0x16, b"x")),
            )
        ),
    ],
    "authorityKeyIdentifier": [
        extension(AUTHORITY_ID, None),
        authority_id(key_identifier=None, authority_cert_issuer=[ROOT_NAME], authority_cert_serial_number=1),
        authority_id(authority_cert_issuer=[ROOT_NAME], authority_cert_serial_number=1), authority_id(),
        *(authority_id(key_identifier=k) for k in (b"", b"\1", bytes(20), bytes(33), b"\xff" * 200)),
        by_hand(AUTHORITY_ID, b""), by_hand(AUTHORITY_ID, b"\5\0"), by_hand(AUTHORITY_ID, b"\x30\0"),
        *(
            lambda c, a, r, more=more: c.put(
                AUTHORITY_ID, sequence(*(m or tlv(0x80, c.issuer.key_id or b"") for m in more))
            )
            for more in (
                (None, b"\x82\1\1"), (None, tlv(0xA1, b"\x82\1x")), (b"\x82\1\1", None), (None, None),
                (None, tlv(0xA1, b"\x82\1x"), b"\x82\1\1"), (None, b"\x82\1\1", tlv(0xA1, b"\x82\1x")),
                (None, tlv(0xA1, b"\x82\1x"), b"\x82\1\1", b"\5\0"), (None, b"\5\0"),
            )
        ),
        lambda c, a, r: c.put(AUTHORITY_ID, sequence(tlv(0xA0, tlv(4, c.issuer.key_id or b"")))),
        lambda c, a, r: c.put(AUTHORITY_ID, sequence(tlv(4, c.issuer.key_id or b""))),
        lambda c, a, r: c.put(AUTHORITY_ID, tlv(4, c.issuer.key_id or b"")),
    ],
    "subjectKeyIdentifier": [
        *(extension(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(n))) for n in (0, 1, 7, 8, 20, 32, 33)),
        extension(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(20)), True),
        *(
            by_hand(SUBJECT_ID, raw)
            for raw in (
                b"", b"\4\0", tlv(3, bytes(21)), sequence(tlv(4, bytes(20))), tlv(4, bytes(20)) + b"\0",
                bytes(20),
            )
        ),
        lambda c, a, r: c.put(SUBJECT_ID, x509.SubjectKeyIdentifier(c.issuer.key_id or b"")),
    ],
    "names": [
        named(), named((NameOID.COMMON_NAME, "x" * 64)),
        named((NameOID.ORGANIZATION_NAME, "\u00e9"), (NameOID.COMMON_NAME, "y")),
        named((NameOID.COMMON_NAME, "Root"), subject=False),
        named((NameOID.COMMON_NAME, "root "), subject=False),
        named((NameOID.COMMON_NAME, "root"), (NameOID.COMMON_NAME, "root"), subject=False),
        named(subject=False),
        named((NameOID.ORGANIZATION_NAME, "root"), subject=False), named((NameOID.COMMON_NAME, "root")),
        lambda c, a, r: setattr(c, "issuer", Authority(c.issuer.key, x509.Name([x509.NameAttribute(
            NameOID.COMMON_NAME, "root", x509.name._ASN1Type.PrintableString)]), c.issuer.key_id)),
        lambda c, a, r: setattr(c, "subject", c.issuer.subject),
        lambda c, a, r: setattr(c, "subject", x509.Name([x509.RelativeDistinguishedName([
            x509.NameAttribute(NameOID.COMMON_NAME, "b"), x509.NameAttribute(NameOID.SERIAL_NUMBER, "a")])])),
    ],
    "issuer": [
        signed_by("below"), signed_by("below"), signed_by("large"), signed_by("medium"),
        *(signed_by(called) for called in (
            "distrusted", "expired", "stranger", "rogue", "root by another name", "root for below",
            "below for root",
            "root's name below's id", "unpinned below root", "elliptic", "elliptic root",
        )),
        lambda c, a, r: vars(c).update(
            public_key=rsa_key(9).public_key(), issuer=Authority(rsa_key(9), c.subject)
        ),
        lambda c, a, r: setattr(c, "issuer", Authority(rsa_key(9), c.issuer.subject, c.issuer.key_id)),
    ],
    "algorithm": [
        *(
            lambda c, a, r, h=h: setattr(c, "hash", h)
            for h in (hashes.SHA224(), hashes.SHA384(), hashes.SHA512())
        ),
        lambda c, a, r: isinstance(c.issuer.key, rsa.RSAPrivateKey) and setattr(c, "padding", PSS),
        algorithm(SHA1_RSA, SHA1_RSA, hashes.SHA1()), algorithm(SHA384_RSA, None),
        algorithm(None, SHA384_RSA),
        algorithm(BARE_SHA256_RSA, BARE_SHA256_RSA), algorithm(None, BARE_SHA256_RSA),
        algorithm(BARE_SHA256_RSA, None),
        algorithm(None, None, hashes.SHA1()), algorithm(None, None, hashes.SHA384()),
        algorithm(ECDSA_SHA256, ECDSA_SHA256),
        algorithm(SHA384_RSA, SHA384_RSA),
    ],
    "key": [
        of_key(lambda: rsa_key(0, 1024)), of_key(lambda: rsa_key(0, 2047)), of_key(lambda: rsa_key(0, 3072)),
        of_key(lambda: rsa_key(0, 4096)), of_key(lambda: rsa_key(0, 2048, 3)), of_key(ec_key),
        of_key(lambda: rsa_key(8)),
        of_key(lambda: ec.derive_private_key(7, ec.SECP384R1())), of_key(lambda: rsa_key(1)),
        of_key(lambda: ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))),
        public_key(lambda n: signed(n - 1)), public_key(lambda n: signed(n)[1:]),
        public_key(lambda n: b"\0" + signed(n)),
        public_key(lambda n: signed(n << 2049 | 1)), public_key(signed, b"\2\1\1"),
        public_key(signed, b"\2\1\0"),
        public_key(signed, b"\2\1\xff"), public_key(signed, tlv(2, b"\1" + bytes(40))),
        public_key(signed, b"\2\4\1\0\1\1"),
        public_key(signed, b"\2\3\1\0\1", b"\5\0"), public_key(signed, b""), public_key(lambda n: b"\0"),
    ],
    "serial": [
        *(serial_of(n) for n in (1, 127, 128, 255, 256, 2**64, 2**128, 2**151, 2**152, 2**158, 2**159 - 1)),
        *(put_field(1, tlv(2, n)) for n in (b"\0", b"\xff", b"\x80", b"\1" * 21, b"\0\1", b"")),
        put_field(1, tlv(2, b"\0" + b"\xff" * 20)),
        put_field(1, tlv(2, b"\0" + b"\xff" * 19)), put_field(1, tlv(2, b"\1" * 20)),
        put_field(1, b"\x0a\1\1"),
    ],
    "agent": [
        extension(URN, None), extension(URN, lambda a: utf8(urn_of(a)), True),
        extension(URN, utf8(urn_of(UNKNOWN))),
        extension(URN, lambda a: utf8(urn_of(a)) + b"\0"), extension(URN, lambda a: urn_of(a).encode()),
        extension(URN, lambda a: utf8(urn_of(a).replace("agent:0", "agent:g"))), extension(URN, b""),
        extension(URN, lambda a: utf8("urn:kakunin:agent:" + "AB" + str(a.agent_id)[2:])),
        extension(URN, lambda a: utf8("urn:kakunin:agent:" + a.agent_id.hex)),
        extension(URN, lambda a: sequence(utf8(urn_of(a)))),
        *(extension(URN, lambda a, t=t: tlv(t, urn_of(a).encode())) for t in (19, 22, 4, 30, 0x2C)),
        *(extension(URN, lambda a, u=u: utf8(u.format(a.agent_id))) for u in BAD_URNS),
    ],
    "model": [
        extension(MODEL, None), extension(MODEL, sequence(utf8("gpt"), utf8(HASH))),
        extension(MODEL, sequence(utf8("gpt"), utf8(HASH.upper()))),
        extension(MODEL, sequence(utf8("GPT"), utf8(HASH))),
        extension(MODEL, sequence(utf8("gpt"), utf8(OTHER_HASH))),
        extension(MODEL, sequence(utf8("m\u00f6del"), utf8(HASH))),
        extension(MODEL, sequence(utf8("gpt"))),
        extension(MODEL, sequence(utf8("gpt"), utf8(HASH), utf8(HASH))),
        extension(MODEL, sequence()), extension(MODEL, utf8("gpt")),
        extension(MODEL, tlv(0x31, utf8("gpt"), utf8(HASH))),
        extension(MODEL, sequence(tlv(19, b"gpt"), utf8(HASH))),
        extension(MODEL, sequence(utf8("gpt"), tlv(22, HASH.encode()))),
        extension(MODEL, sequence(utf8("gpt"), utf8(HASH), b"\5\0")),
        extension(MODEL, sequence(utf8("gpt"), utf8(HASH)), True),
        *(
            extension(MODEL, sequence(utf8(m), utf8(HASH)))
            for m in ("", "  ", "x" * 200, "x" * 201, "\u65e5" * 200, "a\0b")
        ),
        *(
            extension(MODEL, sequence(utf8("gpt"), utf8(h)))
            for h in ("", HASH[7:], HASH[:-1], HASH + "0", HASH + "\n", " " + HASH)
        ),
    ],
    "actions": [
        several_actions, several_actions, extension(ACTIONS, None), extension(ACTIONS, sequence()),
        extension(ACTIONS, b""),
        *(extension(ACTIONS, sequence(utf8("ok"), utf8(a))) for a in (*BAD_ACTIONS, *GOOD_ACTIONS)),
        extension(ACTIONS, sequence(*[utf8("a")] * 256)), extension(ACTIONS, sequence(*[utf8("a")] * 257)),
        extension(ACTIONS, utf8("a")), extension(ACTIONS, sequence(sequence(utf8("a")))),
        extension(ACTIONS, tlv(0x31, utf8("a"))),
        extension(ACTIONS, sequence(tlv(19, b"a"))), extension(ACTIONS, sequence(tlv(22, b"a"), utf8("a"))),
        extension(ACTIONS, sequence(utf8("a")) + b"\0"), extension(ACTIONS, sequence(utf8("a")), True),
        extension(ACTIONS, sequence(tlv(12, b"\xff"))),
        extension(ACTIONS, sequence(*[utf8("x" * 128)] * 110)),
        extension(ACTIONS, sequence(*[utf8("x" * 128)] * 130)), extension(ACTIONS, b"\x30\x80\x0c\x01a\0\0"),
    ],
    "tenant": [
        extension(TENANT, None), extension(TENANT, utf8("acme")), extension(TENANT, utf8("Acme")),
        extension(TENANT, utf8("acme ")),
        extension(TENANT, utf8("\u65e5\u672c")), extension(TENANT, utf8("")), extension(TENANT, utf8("   ")),
        extension(TENANT, utf8("x" * 201)), extension(TENANT, tlv(19, b"acme")),
        extension(TENANT, tlv(12, b"\xc3")),
        extension(TENANT, utf8("acme\0")), extension(TENANT, sequence(utf8("acme"))),
        extension(TENANT, utf8("acme"), True),
        extension(TENANT, utf8("acme") + utf8("acme")), extension(TENANT, b""),
        extension(TENANT, b"\x0c\x81\x04acme"),
    ],
    "financial scope": [
        *(extension(SCOPE, utf8(s)) for s in SCOPES * 2), *(extension(SCOPE, utf8(s)) for s in BAD_SCOPES),
        extension(SCOPE, tlv(12, b'{"daily_limit_usd": "\xff"}')), extension(SCOPE, tlv(19, b"{}")),
        extension(SCOPE, b""), extension(SCOPE, sequence(utf8("{}"))), extension(SCOPE, utf8("{}"), True),
        extension(SCOPE, utf8("{}\0")),
    ],
    "other extensions": [
        extension("1.2.3.4", b""), extension("1.2.3.4", b"\xff"), extension("1.2.3.4", b"\5\0", True),
        extension(f"{ARC}.6", utf8("x")), extension(f"{ARC}.6", utf8("x"), True),
        extension(f"{ARC}.1.1", utf8("x")),
        extension(ARC, utf8("x")), extension("2.5.29.54", x509.InhibitAnyPolicy(0), True),
        extension("2.5.29.30", x509.NameConstraints([x509.DNSName("a.example")], None), True),
        extension("2.5.29.30", x509.NameConstraints([x509.DNSName("a.example")], None)),
        extension("2.5.29.31", CRL_POINTS),
        altered_extensions(lambda e: [*e, e[0]]), altered_extensions(lambda e: [e[5], *e]),
        altered_extensions(lambda e: e[::-1]),
        altered_extensions(lambda e: [*e, raw_extension(f"{ARC}.3", sequence(utf8("everything:*")))]),
        altered_extensions(lambda e: [raw_extension(f"{ARC}.1", utf8(urn_of(UNKNOWN))), *e]),
        altered_extensions(lambda e: [*e, raw_extension("1.2.3.5", b"", b"\1\1\0")]),
        altered_extensions(lambda e: [*e, raw_extension("1.2.3.5", b"", b"\1\1\1")]),
        altered_extensions(lambda e: [*e, raw_extension("1.2.3.5", b"", b"\5\0")]),
        altered_extensions(lambda e: [*e, raw_extension("1.2.3.5", b"", b"", b"\5\0")]),
        altered_extensions(lambda e: [*e, sequence(oid("1.2.3.5"))]),
        altered_extensions(lambda e: [*e, sequence(oid("1.2.3.5"), b"\5\0")]),
        altered_extensions(lambda e: [*e, sequence()]), altered_extensions(lambda e: [*e, b"\5\0"]),
        altered_extensions(lambda e: []),
        altered_extensions(lambda e: [*e, *(raw_extension(f"1.2.3.{n}", b"") for n in range(64 - len(e)))]),
        altered_extensions(lambda e: [*e, *(raw_extension(f"1.2.3.{n}", b"") for n in range(65 - len(e)))]),
    ],
    "shape": [
        tweak(lambda p: p.fields.pop(0)), put_field(0, bytes.fromhex("a003020101")),
        put_field(0, bytes.fromhex("a003020100")),
        put_field(0, bytes.fromhex("a003020103")), put_field(0, b"\2\1\2"), tweak(lambda p: p.fields.pop()),
        tweak(lambda p: p.fields.pop(1)),
        tweak(lambda p: p.fields.insert(7, b"\x81\2\0\1")),
        tweak(lambda p: p.fields.insert(7, b"\x82\2\0\1")),
        tweak(lambda p: p.fields.append(b"\5\0")), tweak(lambda p: p.fields.append(p.fields[-1])),
        put_field(-1, b"\xa3\0"),
        tweak(lambda p: p.fields.__setitem__(-1, tlv(0xA3, sequence(), sequence()))),
        put_field(-1, tlv(0xA3, b"\5\0")),
        put_field(4, sequence(tlv(24, b"20300101000000Z"), tlv(24, b"20300201000000Z"))),
        put_field(4, sequence()),
        put_field(4, sequence(tlv(23, b"3001010000Z"), tlv(23, b"3002010000Z"))),
        put_field(4, sequence(tlv(23, b"300101000000Z"))),
        put_field(4, sequence(tlv(23, b"300101000000Z"), tlv(24, b"20500201000000Z"))),
        put_field(4, tlv(23, b"300101000000Z")),
        put_field(4, sequence(*[tlv(23, b"300101000000Z")] * 3)),
        put_field(4, sequence(tlv(23, b"300101000000Z"), tlv(23, b"300202000000Z"))),
        put_field(4, sequence(tlv(23, b"300230000000Z"), tlv(23, b"300301000000Z"))),
        put_field(3, sequence(b"\5\0")), put_field(3, b"\5\0"),
        put_field(3, b"\x30\x80\0\0"), put_field(5, b"\5\0"), put_field(6, b"\5\0"), put_field(6, sequence()),
        put_field(2, sequence()),
        signature(lambda s: s + b"\0"), signature(lambda s: s[:-1]), signature(lambda s: b"\0"),
        signature(lambda s: b"\0" + s),
        signature(lambda s: b"\1" + s[1:-1] + bytes([s[-1] & 0xFE])), signature(lambda s: b"\0" + bytes(256)),
        signature(lambda s: b"\0" + s[:0:-1]),
        signature(lambda s: b"\0" + b"\xff" * 256),
    ],
}  # fmt: skip


@functools.cache
def certificates() -> list[bytes]:
    """Good ones with none to four things changed, for better or worse, and each change once alone."""
    source = random.Random(SEED)
    agents = list(AGENTS.values())
    made = []
    for _ in range(CERTIFICATES):
        aspects = source.sample(list(CHANGES), source.choice([0, 1, 1, 1, 2, 2, 3, 4]))
        made.append([source.choice(CHANGES[aspect]) for aspect in aspects])
    made += [[change] for changes in CHANGES.values() for change in changes]
    ders = []
    for changes in made:
        agent = source.choice(agents if source.random() < 0.7 else agents[:1])
        certificate = good(agent)
        certificate.public_key = rsa_key(source.choice([7, 8, 9])).public_key()
        for change in changes:
            change(certificate, agent, source)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ders.append(certificate.der)
    return ders


def test_sql_agrees_with_cryptography_on_certificates_of_every_kind(offer: Registrar) -> None:
    ders = certificates()
    assert len(ders) > 2000
    found = offer(ders)
    disagreements = [d for der, f in zip(ders, found, strict=True) if (d := disagreement(der, f))]
    assert disagreements == []
    states = Counter(f.state for f in found)
    assert set(states) == {"registered", REFUSED, "KA008"}
    assert states["registered"] > 300
    assert states["KA008"] > 50


def test_those_certificates_are_refused_for_every_reason() -> None:
    """Or the test above would not be about them."""
    reasons = {verdict(der)[1].partition(":")[0] for der in certificates()}
    assert reasons >= {
        "", "too large", "not eight fields", "not sha256WithRSAEncryption", "signature of odd bits",
        "serial", "no name", "no validity", "key", "extensions", "subjectKeyIdentifier",
        "authorityKeyIdentifier",
        "authority", "signature", "issuer", "validity", "basicConstraints", "keyUsage", "extKeyUsage",
        "expired",
        "urn", "subjectAltName", "model", "actions", "tenant", "scope", "agent", "suspended", "cryptography",
    }  # fmt: skip


# Certificates that are broken -----------------------------------------------------------------------------


@functools.cache
def whole() -> list[bytes]:
    """Good certificates with every extension there is."""
    ders = []
    for agent in AGENTS.values():
        if not agent.suspended:
            made = (
                good(agent)
                .put(SCOPE, utf8('{"daily_limit_usd": 100}'))
                .put(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(20)))
            )
            made.put("2.5.29.31", x509.CRLDistributionPoints([
                x509.DistributionPoint([uri("http://a.example/crl")], None, None, None)
            ]))  # fmt: skip
            ders.append(made.der)
    return ders


def flipped(der: bytes, bit: int) -> bytes:
    return der[: bit // 8] + bytes([der[bit // 8] ^ 1 << bit % 8]) + der[bit // 8 + 1 :]


def mangled(der: bytes, source: random.Random) -> bytes:
    """Some bytes changed, put in, taken out, moved or repeated."""
    for _ in range(source.choice([1, 1, 1, 2, 5])):
        at, length = source.randrange(len(der)), source.choice([1, 1, 2, 4, 16, 100])
        to = source.randrange(len(der))
        piece = der[at : at + length]
        match source.randrange(6):
            case 0:
                der = flipped(der, 8 * at + source.randrange(8))
            case 1:
                der = der[:at] + source.choice([b"\0", b"\x80", b"\xff", b"\x30", b"\x7f"]) + der[at + 1 :]
            case 2:
                der = der[:at] + source.randbytes(length) + der[at:]
            case 3:
                der = der[:at] + der[at + length :] or b"\0"
            case 4:
                der = der[:to] + piece + der[to:]
            case 5:
                der = der[:to] + piece + der[to + length :]
    return der


def length_edits(der: bytes) -> Iterator[bytes]:
    """Every length in it, wrong: by one, in a longer form, indefinite, huge."""
    for at in nested(der):
        start, end = header(der, at)
        length = end - start
        forms = [
            size(length + 1),
            b"\x80",
            b"\x84" + bytes([0x7F, 0xFF, 0xFF, 0xFF]),
            b"\x83\xff\xff\xff",
            b"\xff",
            b"\0",
        ]
        forms += [b"\x81" + size(length)] if length < 128 else [b"\x83" + length.to_bytes(3, "big"), b"\x7f"]
        forms += [size(length - 1)] if length else []
        for form in forms:
            if form != der[at + 1 : start]:
                yield der[: at + 1] + form + der[start:]
                if form == b"\x80":  # closed as BER has it
                    yield der[: at + 1] + form + der[start:end] + b"\0\0" + der[end:]


def other_forms(der: bytes) -> dict[str, bytes]:
    """Other ways to write it. What is signed and its signature are untouched: a lenient reader takes it."""
    tbs, algorithm, bits = split(der)
    content = tbs + algorithm + bits
    length = len(content)
    bare = bytes.fromhex(BARE_SHA256_RSA)
    s = int.from_bytes(bits[-256:], "big")
    n = rsa_key(1).public_key().public_numbers().n
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    return {
        "a byte after it": der + b"\0",
        "end of contents after it": der + b"\0\0",
        "another after it": der + der,
        "a newline after it": der + b"\n",
        "a byte before it": b"\0" + der,
        "in a sequence": sequence(der),
        "in a context tag": tlv(0xA0, der),
        "in octets": tlv(4, der),
        "length in three bytes": b"\x30\x83" + length.to_bytes(3, "big") + content,
        "length in four bytes": b"\x30\x84" + length.to_bytes(4, "big") + content,
        "indefinite": b"\x30\x80" + content + b"\0\0",
        "tbs as a set": sequence(b"\x31" + tbs[1:], algorithm, bits),
        "all as a set": tlv(0x31, content),
        "a fourth element": sequence(tbs, algorithm, bits, b"\5\0"),
        "a fourth element that is the signature": sequence(tbs, algorithm, bits, bits),
        "two of what is signed": sequence(tbs, tbs, algorithm, bits),
        "algorithm without null": sequence(tbs, bare, bits),
        "algorithm with a long null": sequence(tbs, b"\x30\x0e" + bare[2:] + b"\5\x81\0", bits),
        "algorithm with another parameter": sequence(tbs, sequence(bare[2:], b"\4\0"), bits),
        "algorithm with two nulls": sequence(tbs, sequence(bare[2:], b"\5\0\5\0"), bits),
        "algorithm with a long oid": sequence(tbs, b"\x30\x0e\x06\x81\x09" + bare[4:] + b"\5\0", bits),
        "another algorithm": sequence(tbs, bytes.fromhex(SHA384_RSA), bits),
        "rsaEncryption": sequence(tbs, bytes.fromhex("300d06092a864886f70d0101010500"), bits),
        "sha256WithRSA of OIW": sequence(tbs, bytes.fromhex("300906052b0e03021d0500"), bits),
        "no algorithm": sequence(tbs, bits),
        "signature first": sequence(bits, algorithm, tbs),
        "signature as octets": sequence(tbs, algorithm, tlv(4, bits[-256:])),
        "signature in octets in bits": sequence(tbs, algorithm, tlv(3, b"\0" + tlv(4, bits[-256:]))),
        "signature with an unused bit": sequence(
            tbs, algorithm, tlv(3, b"\1" + bits[-256:-1] + bytes([bits[-1] & 0xFE]))
        ),
        "signature with 8 unused bits": sequence(tbs, algorithm, tlv(3, b"\x08" + bits[-256:])),
        "signature in parts": sequence(
            tbs, algorithm, tlv(0x23, tlv(3, b"\0" + bits[-256:-128]), tlv(3, b"\0" + bits[-128:]))
        ),
        "signature, length in three bytes": sequence(tbs, algorithm, b"\x03\x83\0\1\1" + b"\0" + bits[-256:]),
        "signature with a byte more": sequence(tbs, algorithm, tlv(3, b"\0" + bits[-256:] + b"\0")),
        "signature with a zero before": sequence(tbs, algorithm, tlv(3, b"\0\0" + bits[-256:])),
        "signature plus the modulus": sequence(tbs, algorithm, tlv(3, b"\0" + (s + n).to_bytes(257, "big"))),
        "modulus minus signature": sequence(tbs, algorithm, tlv(3, b"\0" + (n - s).to_bytes(256, "big"))),
        "no signature": sequence(tbs, algorithm, b"\3\1\0"),
        "empty signature": sequence(tbs, algorithm, b"\3\0"),
        "PEM": pem,
        "PEM without a line end": pem.strip(),
        "hex": der.hex().encode(),
        "what is signed alone": tbs,
    }  # fmt: skip


def hostile() -> Iterator[bytes]:
    """Shapes that cost a careless reader time, memory or its stack."""
    whole_size = 16384
    yield b""
    yield b"\0" * whole_size
    yield b"\xff" * whole_size
    yield b"\x30" * whole_size
    yield b"\x30\x80" * (whole_size // 2)
    yield b"\xa0\x80" * (whole_size // 2)
    yield b"\x24\x80" * (whole_size // 2)
    yield b"\x30\x84\xff\xff\xff\xff" * 2000
    yield b"\x30\x83\xff\xff\xff" * 3000
    yield sequence(b"\5\0" * 8190)
    yield sequence(b"\x30\0" * 8190)
    yield sequence(sequence(b"\5\0" * 8000), SHA256_RSA, b"\3\1\0")
    yield sequence(tlv(4, bytes(16000)), SHA256_RSA, b"\3\1\0")
    yield sequence(tlv(6, b"\x81" * 16000 + b"\1"))
    yield sequence(tlv(6, b"\1" * 16000))
    yield sequence(tlv(2, b"\1" * 16000))
    yield tlv(0x31, *[tlv(4, n.to_bytes(2, "big")) for n in range(4000)])
    yield functools.reduce(lambda inner, _: tlv(0x31, inner, b"\5\0"), range(4000), b"")[:whole_size]
    deep = b""
    while len(deep) < whole_size - 8:
        deep = sequence(deep)
    yield deep
    yield sequence(b"\5\0" * 8000, deep[: len(deep) // 3])
    # Good at first sight: the fields of a certificate, one of them enormous, and no signature.
    tbs, algorithm, bits = split(whole()[0])
    fields = split(tbs)
    for at in range(len(fields)):
        for big in (
            b"\5\0" * 7000,
            sequence(b"\x30\0" * 7000),
            tlv(2, b"\1" * 14000),
            tlv(6, b"\xff" * 14000 + b"\1"),
        ):
            wrapped = [*fields[:at], tlv(fields[at][0], big), *fields[at + 1 :]]
            yield sequence(sequence(*wrapped), algorithm, bits)
    many = b"".join(raw_extension(f"1.{n % 40}.{n}", b"") for n in range(1100))
    yield sequence(sequence(*fields[:7], tlv(0xA3, sequence(many))), algorithm, bits)
    yield sequence(
        sequence(*fields[:7], tlv(0xA3, sequence(raw_extension("1.2.3", b"") * 1000))), algorithm, bits
    )
    yield whole()[0] + bytes(whole_size)


@pytest.fixture
def registrar(judged: Database) -> Iterator[Registrar]:
    """As the login that registers, and whatever it offers, the tables stay as they are."""
    rows = psycopg.rows.namedtuple_row
    count = "select count(*), max(registered_at) from kakunin_private.certificates"
    before = judged.run("installer", count)
    with judged.connect("registrar", autocommit=True, row_factory=rows) as connection:
        yield Registrar(connection, "")
    assert judged.run("installer", count) == before


def refused(found: Sequence[Any], ders: Sequence[bytes]) -> None:
    """Each with KA010: what is not as it was signed gets no further, whomever it is for."""
    assert [
        (f.state, f.message, d.hex()) for f, d in zip(found, ders, strict=True) if f.state != REFUSED
    ] == []


def test_what_is_fuzzed_registers_when_left_alone(registrar: Registrar) -> None:
    assert {f.state for f in registrar(whole())} == {"registered"}


def test_fuzz_every_beginning_of_a_certificate(registrar: Registrar) -> None:
    der = whole()[2]
    ders = [der[:n] for n in range(len(der))]
    refused(registrar(ders), ders)
    # With the outer length put right, so that the end is missing further in
    ders = [sequence(der[4:n]) for n in range(4, len(der), 3)]
    refused(registrar(ders), ders)


def test_fuzz_bits_and_bytes(registrar: Registrar) -> None:
    source = random.Random(SEED)
    ders = []
    for der in whole():
        ders += [flipped(der, bit) for bit in source.sample(range(8 * len(der)), 200)]
        ders += [flipped(der, bit) for bit in range(64)]
        ders += [mangled(der, source) for _ in range(200)]
    ders = [der for der in ders if der not in whole()]
    refused(registrar(ders), ders)


def test_fuzz_lengths(registrar: Registrar) -> None:
    ders = list(length_edits(whole()[1]))
    assert len(ders) > 300
    refused(registrar(ders), ders)


def test_fuzz_splices_of_two_certificates(registrar: Registrar) -> None:
    source = random.Random(SEED)
    ders = []
    one, two = whole()[0], whole()[1]
    for _ in range(150):
        at = source.randrange(4, len(one))
        ders += [one[:at] + two[at:], sequence((one[:at] + two[at:])[4:])]
    # By elements: the fields of one, signed for the other.
    (tbs, algorithm, bits), (other, _, other_bits) = split(one), split(two)
    fields, others = split(tbs), split(other)
    ders += [sequence(tbs, algorithm, other_bits), sequence(other, algorithm, bits)]
    for at in range(8):
        ders.append(sequence(sequence(*fields[:at], *others[at:]), algorithm, bits))
        ders.append(sequence(sequence(*fields[:at], others[at], *fields[at + 1 :]), algorithm, bits))
    ders = [der for der in ders if der not in (one, two)]
    refused(registrar(ders), ders)


def test_fuzz_other_encodings_of_what_was_signed(registrar: Registrar) -> None:
    for der in (
        *whole()[:2],
        good(AGENTS[uuid.UUID(int=5 << 100)]).der,
    ):  # the last one for a suspended agent
        forms = other_forms(der)
        found = registrar(list(forms.values()))
        assert {f: r.state for f, r in zip(forms, found, strict=True) if r.state != REFUSED} == {}


def test_fuzz_noise(registrar: Registrar) -> None:
    source = random.Random(SEED)
    ders = [source.randbytes(source.choice([1, 2, 3, 10, 100, 1000, 16384])) for _ in range(200)]
    ders += [sequence(*(any_element(source) for _ in range(source.randrange(1, 5)))) for _ in range(500)]
    tbs, algorithm, bits = split(whole()[0])
    for _ in range(500):  # further and further in
        fields = split(tbs)
        fields[source.randrange(8)] = any_element(source)
        ders.append(sequence(sequence(*fields), algorithm, bits))
    ders = [der[:16384] for der in ders]
    refused(registrar(ders), ders)


def test_hostile_shapes_are_refused_soon(registrar: Registrar) -> None:
    ders = list(hostile())
    found = registrar(ders)
    refused(found, ders)
    assert max(f.took for f in found) < 0.5


def test_what_comes_out_of_a_table_is_read_as_fast(owner: psycopg.Connection[Any]) -> None:
    """Not decompressed again for each byte that is looked at: that would take a minute here."""
    der = sequence(*(sequence(tlv(2, number(n)), tlv(4, b"abcd")) for n in range(30000)))
    owner.execute("create temp table given (der bytea)")
    owner.execute("insert into given values (%s)", [der])
    compressed = owner.execute("select pg_column_size(der) from given").fetchone()
    assert compressed
    assert compressed[0] < len(der) // 2
    owner.execute("select kakunin_private.der_check(der) from given")  # or statement_timeout ends it


ENCODED: dict[str, Change] = {
    "as it is": extension("1.2.3.4", b""),
    "a tenant": extension(TENANT, utf8("\u65e5\u672c")),
    "a model": extension(MODEL, sequence(utf8("\u65e5"), utf8(HASH))),
    "an action": extension(ACTIONS, sequence(utf8("\u65e5"))),
    "an agent": extension(URN, utf8("urn:kakunin:agent:\u65e5")),
    **{scope: extension(SCOPE, utf8(scope)) for scope in (
        f'{{"permitted_venues": "{text}"}}'
        for text in ("\u65e5", "\\u65e5", "\\u00e9", "\\ud83d\\ude00", "\\u0000")
    )},
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_in_another_encoding_refuses_what_it_cannot_hold(cluster: Cluster, encoding: str) -> None:
    called = f"in_{encoding.lower()}"
    with cluster.connect(autocommit=True) as admin:
        admin.execute(
            f"create database {called} encoding '{encoding}' lc_collate 'C' lc_ctype 'C' template template0"
        )
        admin.execute(f"grant create on database {called} to installer")
    database = Database(cluster, called)
    states = {}
    with database.connect(
        "installer", client_encoding="UTF8" if encoding == "LATIN1" else "SQL_ASCII"
    ) as owner:
        owner.execute(install_sql().encode("ascii", "ignore"))
        owner.execute("select kakunin.trust_ca(%s)", [world().authorities["root"].certificate])
        for what, change in ENCODED.items():
            found = owner.execute("select kakunin.create_agent('x')").fetchone()
            assert found
            made = certified(world().authorities["root"], found[0])
            change(made, Agent(found[0]), random.Random(SEED))
            try:
                with owner.transaction():
                    owner.execute("select kakunin.register_certificate(%s)", [made.der])
                states[what] = "registered"
            except psycopg.Error as error:
                states[what] = error.sqlstate or "?"
        owner.rollback()
    with cluster.connect(autocommit=True) as admin:
        admin.execute(f"drop database {called}")
    assert states["as it is"] == "registered"
    assert set(states.values()) == {"registered", REFUSED}
    assert Counter(states.values())["registered"] == (2 if encoding == "LATIN1" else 3)


def test_null_is_refused(judged: Database) -> None:
    for login, call in (("registrar", "register_certificate(null)"), ("operator", "trust_ca(null)")):
        with pytest.raises(psycopg.Error) as caught:
            judged.run(login, f"select kakunin.{call}")
        assert caught.value.sqlstate == REFUSED


# Behind the signature -------------------------------------------------------------------------------------


class Node:
    """An element that can be changed in any way, strings that hold elements opened too."""

    def __init__(self, der: bytes) -> None:
        start, end = header(der)
        self.tag, self.children, self.content = der[0], list[Node](), der[start:end]
        self.length: bytes | None = None  # instead of the right one
        skip = 1 if self.tag == 3 else 0
        self.prefix = self.content[:skip]
        if self.tag in (0x30, 0x31, 0xA0, 0xA3) or (self.tag in (3, 4) and strict(self.content[skip:])):
            self.children = [Node(child) for child in split(tlv(0x30, self.content[skip:]))]

    def __bytes__(self) -> bytes:
        content = self.prefix + b"".join(map(bytes, self.children)) if self.children else self.content
        return bytes([self.tag]) + (size(len(content)) if self.length is None else self.length) + content

    def all(self) -> Iterator[Node]:
        yield self
        for child in self.children:
            yield from child.all()


def rearranged(tbs: bytes, source: random.Random) -> bytes:
    """One or a few elements dropped, repeated, moved, retagged, refilled or written otherwise."""
    root = Node(tbs)
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        nodes = list(root.all())
        node = source.choice(nodes)
        parent = next((n for n in nodes if node in n.children), root)
        at = parent.children.index(node) if node in parent.children else 0
        donor = copy.deepcopy(source.choice(nodes))
        match source.randrange(12):
            case 0:
                del parent.children[at : at + 1]
            case 1:
                parent.children.insert(at, copy.deepcopy(node))
            case 2:
                source.shuffle(parent.children)
            case 3:
                parent.children[at : at + 1] = [donor]
            case 4:
                parent.children.insert(at, donor)
            case 5:
                node.tag = source.choice(
                    [1, 2, 3, 4, 5, 6, 10, 12, 19, 22, 23, 24, 0x30, 0x31, 0x80, 0x86, 0xA0, 0xA3]
                )
            case 6:
                node.children, node.content = (
                    [],
                    source.choice([b"", b"\0", b"\xff", b"\x80", LONG, node.content + b"\0"]),
                )
            case 7:
                node.children, node.content = [], node.content[: source.randrange(len(node.content) + 1)]
            case 8 if not node.children and node.content:
                node.content = flipped(node.content, source.randrange(8 * len(node.content)))
            case 9:
                length = len(bytes(node)) - 2
                node.length = source.choice(
                    [b"\x80", b"\x81" + size(length), size(length + 1), size(max(length - 1, 0))]
                )
            case 10:
                node.children, node.content = [], bytes(any_element(source))
            case _ if not node.children:
                node.content = mangled(node.content, source) if node.content else b"\0"
    return bytes(root)


READ = {BASIC, USAGE, EXTENDED, SUBJECT_ID, AUTHORITY_ID, ALTERNATIVE, URN, MODEL, ACTIONS, TENANT, SCOPE}


def as_it_is_read(der: bytes) -> bytes:
    """The certificate with what the kit does not look into, and `cryptography` does, put right: what is in
    the subject, alternative names that are no URIs, and extensions that are not for the kit."""
    tbs, _, _ = split(der)
    fields = split(tbs)
    extensions = [split(extension) for extension in split(split(fields[7])[0])]
    again = tlv(0xA3, sequence(*(sequence(*parts) for parts in extensions)))
    if sequence(*fields[:7], again) != tbs:
        return der  # no certificate's shape at all
    if len(fields[5]) > 2 and fields[5][0] == 0x30:
        fields[5] = name("x").public_bytes()
    others = sorted({parts[0] for parts in extensions} - set(map(oid, READ)))
    for parts in extensions:
        if parts[0] in others and parts[0][0] == 6 and len(parts[0]) < 66:
            parts[0] = oid(f"1.2.3.{others.index(parts[0])}")
        if (
            parts[0] == oid(ALTERNATIVE)
            and parts[-1][0] == 4
            and strict(value := parts[-1][header(parts[-1])[0] :])
        ):
            dns = tlv(0x82, b"x")  # another kind of name
            names = [dns if n[0] in (0xA0, 0x81, 0x82, 0xA4, 0x87, 0x88) else n for n in split(value)]
            if value[0] == 0x30:
                parts[-1] = tlv(4, sequence(*names))
    fields[7] = tlv(0xA3, sequence(*(sequence(*parts) for parts in extensions)))
    put_right = sequence(*fields)
    return der if put_right == tbs else resigned(put_right, rsa_key(1))


def test_fuzz_what_the_authority_signed(offer: Registrar) -> None:
    """The parser behind the signature: broken bytes that the pinned key did sign are read as `cryptography`
    reads them, or refused."""
    source = random.Random(SEED)
    root = rsa_key(1)
    ders = []
    for _ in range(1000):
        tbs = split(source.choice(whole()))[0]
        if source.random() < 0.3:
            tbs = source.choice([flipped(tbs, source.randrange(8 * len(tbs))), mangled(tbs, source)])
        else:
            tbs = rearranged(tbs, source)
        ders.append(resigned(tbs, root))
    found = offer(ders)
    assert {f.state for f in found} <= {"registered", REFUSED, "KA008"}
    assert len([f for f in found if f.state == "registered"]) > 80
    for der, f in zip(ders, found, strict=True):
        if not strict(der):
            assert f.state == REFUSED, der.hex()
            continue
        read = der
        with contextlib.suppress(ValueError, IndexError):
            read = as_it_is_read(der)
        assert f.state != "registered" or f.der == der
        assert disagreement(read, f._replace(der=read)) == "", der.hex()


# Certificates of others -----------------------------------------------------------------------------------


def certificates_of_others() -> list[tuple[str, bytes]]:
    """NIST's PKITS, and what else `cryptography` is tested with."""
    found = []
    for path in sorted(VECTORS.rglob("*")):
        if path.suffix in (".crt", ".der", ".pem"):
            data = path.read_bytes()
            if path.suffix == ".pem":
                pems = re.findall(
                    rb"-----BEGIN CERTIFICATE-----\n.+?-----END CERTIFICATE-----", data, re.DOTALL
                )
                for pem in pems:
                    with contextlib.suppress(ValueError):
                        found.append((path.name, ssl.PEM_cert_to_DER_cert(pem.decode())))
            else:
                found.append((path.name, data))
    return found


def read_by_cryptography(der: bytes) -> dict[str, Any] | None:
    """What a certificate says, when it is of the kind the kit reads: v3, RSA with SHA-256, and so on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            certificate = x509.load_der_x509_certificate(der)
            key = certificate.public_key()
            extensions = {
                extension.oid.dotted_string: extension.value for extension in certificate.extensions
            }
    except (*UNREADABLE, Warning):
        return None
    tbs, algorithm, bits = split(der)
    basic, uses, authority = (extensions.get(dotted) for dotted in (BASIC, USAGE, AUTHORITY_ID))
    own = extensions.get(SUBJECT_ID)
    if (
        certificate.version != x509.Version.v3
        or not isinstance(key, rsa.RSAPublicKey)
        or not (algorithm == split(tbs)[2] == SHA256_RSA and 2048 <= key.key_size <= 4096)
        or key.public_numbers().e != 65537
        or not (len(split(tbs)) == 8 and certificate.issuer.rdns and certificate.subject.rdns)
        or not 0 < certificate.serial_number < 2**159
        or (authority is not None and authority.key_identifier is None)
        or not (strict(der) and len(der) <= 16384)
        # RFC 5280 has other times in another form, and a signature is a whole number of bytes.
        or any(t[0] == 24 and t[2:6] < b"2050" for t in split(split(tbs)[4]))
        or bits != tlv(3, b"\0" + certificate.signature)
    ):
        return None
    names = [
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign",
    ]  # fmt: skip
    used = uses and sum(getattr(uses, n) << (7 - i) for i, n in enumerate(names))
    if uses is not None and uses.key_agreement:
        used += uses.encipher_only
    return {
        "serial": f"{certificate.serial_number:x}", "not_before": certificate.not_valid_before_utc,
        "not_after": certificate.not_valid_after_utc, "modulus": modulus(key),
        "key_id": own and own.digest.hex(":").upper(),
        "authority_key_id": authority and authority.key_identifier.hex(":").upper(),
        "ca": bool(basic and basic.ca), "path_length": basic and basic.path_length, "key_usage": used,
        "issuer": split(tbs)[3], "subject": split(tbs)[5],
    }  # fmt: skip


def test_certificates_of_others_are_read_as_cryptography_reads_them(database: Database) -> None:
    read = (
        "create function pg_temp.read(der bytea) returns kakunin_private.x509_certificate"
        " language plpgsql as $$ begin return kakunin_private.x509_read_certificate(der);"
        " exception when sqlstate 'KA010' then return null; end $$"
    )
    differing, total = [], 0
    rows = psycopg.rows.dict_row
    with database.connect("installer", row_factory=rows) as connection:
        connection.execute(read)
        for called, der in certificates_of_others():
            row = connection.execute("select (r).* from (select pg_temp.read(%s) r) x", [der]).fetchone()
            assert row is not None
            expected = read_by_cryptography(der)
            if row["serial"] is None:
                found = None
            else:
                total += 1
                found = {**row, "serial": f"{int(row['serial'].replace(':', ''), 16):x}"}
                found = {key: found[key] for key in (expected or found)}
            if found != expected:
                differing.append(called)
    # What is broken in these is in extensions that the kit does not look into.
    assert set(differing) <= {
        "badssl-sct-anonymous-sig.der", "badssl-sct-none-hash.der", "belgian-eid-invalid-visiblestring.pem",
        "invalid-sct-length.der", "invalid-sct-version.der", "nc_invalid_ip4_netmask.der",
        "nc_invalid_ip_netmask.pem", "nc_ip_invalid_length.pem",
    }  # fmt: skip
    assert total > 400
