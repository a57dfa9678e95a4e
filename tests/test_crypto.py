"""Cryptography in SQL, against published vectors and, by property, against `cryptography` (OpenSSL)."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cryptography_vectors
import psycopg
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

VECTORS = Path(cryptography_vectors.__file__).parent
F4 = 65537
SHA256_INFO = bytes.fromhex("3031300d060960864801650304020105000420")

bounded = settings(max_examples=100, deadline=None, database=None)


class Check(NamedTuple):
    """The arguments of one verification."""

    modulus: bytes | None
    exponent: int | None
    message: bytes | None
    signature: bytes | None


@pytest.fixture(scope="module")
def sql(database: Any) -> Iterator[psycopg.Connection[Any]]:
    """The owner's connection, with verdict(): what the verification said, or how the key was refused."""
    with database.connect("installer", autocommit=True) as connection:
        connection.execute(
            """
            create function pg_temp.verdict(bytea, bigint, bytea, bytea) returns text language plpgsql as $$
            begin
              return kakunin_private.rsa_pkcs1_sha256_verify($1, $2, $3, $4)::text;
            exception
              when sqlstate 'KA010' then return 'KA010 ' || sqlerrm;
            end
            $$
            """
        )
        connection.execute("set statement_timeout = '60s'")
        yield connection


@pytest.fixture(scope="module")
def verdicts(sql: psycopg.Connection[Any]) -> Callable[..., list[str]]:
    """What SQL says of each check: 'true', 'false' or 'KA010 ...'."""

    def verdicts(*checks: Check) -> list[str]:
        rows = sql.execute(
            "select pg_temp.verdict(n, e, m, s)"
            " from unnest(%s::bytea[], %s::bigint[], %s::bytea[], %s::bytea[])"
            " with ordinality as t(n, e, m, s, at) order by at",
            [list(column) for column in zip(*checks, strict=True)],
        ).fetchall()
        assert len(rows) == len(checks)
        return [row[0] for row in rows]

    return verdicts


# Keys -----------------------------------------------------------------------------------------------


@functools.cache
def key(bits: int) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=F4, key_size=bits)


def big_endian(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def modulus(bits: int) -> bytes:
    return big_endian(key(bits).public_key().public_numbers().n)


def sign(bits: int, message: bytes) -> bytes:
    return key(bits).sign(message, padding.PKCS1v15(), hashes.SHA256())


def sign_raw(bits: int, encoded: bytes) -> bytes:
    """A signature of any encoded message at all: the private operation without the padding rules."""
    numbers = key(bits).private_numbers()
    n = numbers.public_numbers.n
    return pow(int.from_bytes(encoded, "big"), numbers.d, n).to_bytes(len(modulus(bits)), "big")


def openssl_accepts(bits: int, message: bytes, signature: bytes) -> bool:
    try:
        key(bits).public_key().verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
    except InvalidSignature:
        return False
    return True


def encoded(bits: int, message: bytes) -> bytes:
    """EMSA-PKCS1-v1_5 (RFC 8017 section 9.2)."""
    tail = SHA256_INFO + hashlib.sha256(message).digest()
    return b"\x00\x01" + b"\xff" * (len(modulus(bits)) - len(tail) - 3) + b"\x00" + tail


# HMAC-SHA256 ----------------------------------------------------------------------------------------


def pads(key: bytes) -> tuple[bytes, bytes]:
    """ipad and opad of RFC 2104, under a key no longer than a block."""
    block = key.ljust(64, b"\x00")
    return bytes(b ^ 0x36 for b in block), bytes(b ^ 0x5C for b in block)


def test_a_sessions_mac_agrees_with_rfc_4231(sql: psycopg.Connection[Any]) -> None:
    """Section 4.3, test case 2."""
    got = sql.execute(
        "select kakunin_private.session_mac(%s, %s, 'what do ya want for nothing?')", pads(b"Jefe")
    ).fetchone()
    assert got == ("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",)


def test_a_sessions_mac_agrees_with_python(sql: psycopg.Connection[Any]) -> None:
    source = random.Random(1)
    keys = [source.randbytes(length) for length in range(65)]
    messages = ["ü" * source.choice([0, 1, 31, 32, 33, 500]) for _ in keys]
    inner, outer = zip(*map(pads, keys), strict=True)
    got = sql.execute(
        "select kakunin_private.session_mac(i, o, m)"
        " from unnest(%s::bytea[], %s::bytea[], %s::text[]) with ordinality as t(i, o, m, at) order by at",
        [list(inner), list(outer), messages],
    ).fetchall()
    assert got == [
        (hmac.new(k, m.encode(), "sha256").hexdigest(),) for k, m in zip(keys, messages, strict=True)
    ]


def test_a_sessions_key_is_kept_as_the_pads_of_32_bytes(sql: psycopg.Connection[Any]) -> None:
    ((inner, outer),) = sql.execute(
        "select inner_pad, outer_pad from kakunin_private.session_keys"
    ).fetchall()
    key = bytes(b ^ 0x36 for b in inner[:32])
    assert (inner, outer) == pads(key)
    assert len(set(key)) > 16


# base64url ------------------------------------------------------------------------------------------


def reference_decode(text: str) -> bytes | None:
    if not re.fullmatch("[A-Za-z0-9_-]*", text) or len(text) % 4 == 1:
        return None
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    return data if base64.urlsafe_b64encode(data).rstrip(b"=").decode() == text else None


def decode_all(sql: psycopg.Connection[Any], texts: list[str]) -> list[bytes | None]:
    rows = sql.execute(
        "select kakunin_private.base64url_decode(t)"
        " from unnest(%s::text[]) with ordinality as u(t, at) order by at",
        [texts],
    ).fetchall()
    return [row[0] for row in rows]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""), (b"f", "Zg"), (b"fo", "Zm8"), (b"foo", "Zm9v"),
        (b"foob", "Zm9vYg"), (b"fooba", "Zm9vYmE"), (b"foobar", "Zm9vYmFy"),  # RFC 4648 section 10
        (b"\x14\xfb\x9c\x03\xd9\x7e", "FPucA9l-"),  # RFC 4648 section 9, in the URL alphabet
        (bytes([3, 236, 255, 224, 193]), "A-z_4ME"),  # RFC 7515 appendix C
    ],
)  # fmt: skip
def test_base64url_agrees_with_the_rfcs(sql: psycopg.Connection[Any], data: bytes, text: str) -> None:
    query = "select kakunin_private.base64url_encode(%s), kakunin_private.base64url_decode(%s)"
    assert sql.execute(query, [data, text]).fetchone() == (text, data)


def test_base64url_round_trips_every_length(sql: psycopg.Connection[Any]) -> None:
    source = random.Random(2)
    data = [source.randbytes(length) for length in range(300)]
    rows = sql.execute(
        "select e, kakunin_private.base64url_decode(e)"
        " from unnest(%s::bytea[]) with ordinality as u(b, at), kakunin_private.base64url_encode(b) e"
        " order by at",
        [data],
    ).fetchall()
    assert rows == [(base64.urlsafe_b64encode(d).rstrip(b"=").decode(), d) for d in data]


def test_base64url_has_one_spelling_for_one_value(sql: psycopg.Connection[Any]) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    pairs = [a + b for a in alphabet for b in alphabet]
    triples = [a + "f" + b for a in "A_" for b in alphabet]
    decoded = decode_all(sql, pairs + triples)
    assert decoded == [reference_decode(text) for text in pairs + triples]
    assert sum(d is not None for d in decoded) == 256 + 2 * 16


@pytest.mark.parametrize(
    "text",
    [
        "A", "AAAAA", "Zg==", "Zg=", "Zg=A", "=", "====", "Zh", "Zm9", "Zm9vYh",
        "+A", "/A", "Zm9v Zm9v", " Zm9v", "Zm9v ", "Zm9v\n", "Zm\n9v", "Zm9v\r\n", "\tZm9v", "Zm9v.", "Zm9v,",
        "Zm9\u00e9", "\uff3am9v", "Zm9v\u200b", "\u0405\u0405", "Zm9v\u2028", "Zm9v\x7f", "Zm9v\x01", "%5a",
    ],
)  # fmt: skip
def test_base64url_refuses_what_it_would_not_write(sql: psycopg.Connection[Any], text: str) -> None:
    assert reference_decode(text) is None
    assert decode_all(sql, [text]) == [None]


def test_base64url_agrees_with_a_strict_decoder_on_any_text(sql: psycopg.Connection[Any]) -> None:
    near = st.text(alphabet="ABYZabyz0189-_+/= \n\r\t.\u00e9\uff21", max_size=12)
    anything = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)

    @bounded
    @given(st.lists(near | anything, min_size=1, max_size=50))
    def agrees(texts: list[str]) -> None:
        assert decode_all(sql, texts) == [reference_decode(text) for text in texts]

    agrees()


def test_base64url_takes_a_megabyte(sql: psycopg.Connection[Any]) -> None:
    data = random.Random(3).randbytes(1_000_000)
    assert decode_all(sql, [base64.urlsafe_b64encode(data).rstrip(b"=").decode()]) == [data]


# Numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", ["random", "zeros", "ones", "leading zeros"])
def test_bytes_are_read_as_a_big_endian_number(sql: psycopg.Connection[Any], fill: str) -> None:
    source = random.Random(4)
    make: dict[str, Callable[[int], bytes]] = {
        "random": source.randbytes,
        "zeros": lambda n: b"\0" * n,
        "ones": lambda n: b"\xff" * n,
        "leading zeros": lambda n: b"\0" * (n // 2) + source.randbytes(n - n // 2),
    }
    data = [make[fill](length) for length in range(601)]
    rows = sql.execute(
        "select kakunin_private.bytes_to_numeric(b)::text"
        " from unnest(%s::bytea[]) with ordinality as u(b, at) order by at",
        [data],
    ).fetchall()
    assert rows == [(str(int.from_bytes(d, "big")),) for d in data]


def test_no_bytes_are_no_number(sql: psycopg.Connection[Any]) -> None:
    assert sql.execute("select kakunin_private.bytes_to_numeric(null)").fetchone() == (None,)


# Which keys -----------------------------------------------------------------------------------------


def odd_modulus(bits: int) -> bytes:
    """A number of that many bits. It need not be a product of primes to be measured."""
    return big_endian(1 << (bits - 1) | 1)


@pytest.mark.parametrize("bits", [2048, 2049, 2050, 2055, 2056, 3072, 4095, 4096])
def test_keys_of_2048_to_4096_bits_are_taken(sql: psycopg.Connection[Any], bits: int) -> None:
    sql.execute("select kakunin_private.check_rsa_public_key(%s, 65537)", [odd_modulus(bits)])


@pytest.mark.parametrize(
    ("n", "e", "reason"),
    [
        *((odd_modulus(b), F4, f"of {b} bits") for b in [1, 8, 512, 1024, 2040, 2047, 4097, 4104, 8192]),
        *((odd_modulus(2048), e, f"exponent {e} ") for e in [-1, 0, 1, 3, 17, 65536, 65539, 2**63 - 1]),
        (b"\0" + odd_modulus(2048), F4, "zero byte"),
        (b"\0" * 256, F4, "zero byte"),
        (odd_modulus(2048)[:-1] + b"\0", F4, "even"),
        (odd_modulus(4096)[:-1] + b"\xfe", F4, "even"),
        (b"", F4, "incomplete"),
        (None, F4, "incomplete"),
        (odd_modulus(2048), None, "incomplete"),
    ],
    ids=lambda v: f"{len(v)}-bytes" if isinstance(v, bytes) else str(v).strip().replace(" ", "-"),
)  # fmt: skip
def test_other_keys_are_refused_by_name(
    sql: psycopg.Connection[Any], n: bytes | None, e: int | None, reason: str
) -> None:
    for call in (
        "check_rsa_public_key(%(n)s, %(e)s)",
        "rsa_pkcs1_sha256_verify(%(n)s, %(e)s, ''::bytea, decode(repeat('00', 256), 'hex'))",
        "rsa_pkcs1_sha256_verify(%(n)s, %(e)s, null, null)",
    ):
        with pytest.raises(psycopg.Error, match=reason) as caught:
            sql.execute(f"select kakunin_private.{call}", {"n": n, "e": e})
        assert caught.value.sqlstate == "KA010"


# RSASSA-PKCS1-v1_5: published vectors ---------------------------------------------------------------


class Vector(NamedTuple):
    bits: int
    e: int
    check: Check
    passes: bool


def nist(file: str) -> list[Vector]:
    """The SHA-256 cases of a NIST CAVP response file. A modulus or exponent holds until the next one."""
    vectors, now = [], {"Result": "P"}
    for line in (VECTORS / "asymmetric" / "RSA" / file).read_text().splitlines():
        name, found, value = line.strip("[]").partition("=")
        if not found:
            continue
        now[name.strip()] = value.strip()
        last = "S" if "SigGen" in file else "Result"
        if name.strip() == last and now["SHAAlg"] == "SHA256":
            n, e = big_endian(int(now["n"], 16)), int(now["e"], 16)
            check = Check(n, e, bytes.fromhex(now["Msg"]), bytes.fromhex(now["S"]))
            vectors.append(Vector(int(now["mod"]), e, check, now["Result"].startswith("P")))
    return vectors


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("FIPS_186-2/SigVer15_186-3.rsp", 90),
        ("SigVer15EMTest.txt", 30),
        ("FIPS_186-2/SigGen15_186-2.rsp", 50),
        ("FIPS_186-2/SigGen15_186-3.rsp", 50),
    ],
)
def test_verification_agrees_with_nist(verdicts: Callable[..., list[str]], file: str, count: int) -> None:
    vectors = nist(file)
    assert len(vectors) == count
    for vector, verdict in zip(vectors, verdicts(*(v.check for v in vectors)), strict=True):
        if vector.e != F4:
            assert verdict == f"KA010 RSA public exponent {vector.e} is not supported"
        elif vector.bits < 2048:
            assert verdict == f"KA010 RSA modulus of {vector.bits} bits is not supported"
        else:
            assert verdict == ("true" if vector.passes else "false"), vector
    supported = [v for v in vectors if v.e == F4 and v.bits >= 2048]
    if "SigVer15_186-3" in file:
        assert (
            {v.bits for v in supported if v.passes}
            == {v.bits for v in supported if not v.passes}
            == {2048, 3072, 4096}
        )


def test_verification_agrees_with_nist_pkits(verdicts: Callable[..., list[str]]) -> None:
    folder = VECTORS / "x509" / "PKITS_data" / "certs"
    root = x509.load_der_x509_certificate((folder / "TrustAnchorRootCertificate.crt").read_bytes())
    issuer = root.public_key()
    assert isinstance(issuer, rsa.RSAPublicKey)
    names = ["TrustAnchorRootCertificate", "GoodCACert", "BadSignedCACert"]
    certificates = [x509.load_der_x509_certificate((folder / f"{name}.crt").read_bytes()) for name in names]
    checks = [
        Check(big_endian(issuer.public_numbers().n), F4, c.tbs_certificate_bytes, c.signature)
        for c in certificates
    ]
    assert verdicts(*checks) == ["true", "true", "false"]


# RSASSA-PKCS1-v1_5: every signature that OpenSSL makes verifies, and nothing else does --------------

SIZES = [2048, 2049, 2050, 2056, 3072, 4096]
MESSAGE = b"header.claims"


@pytest.mark.parametrize("bits", SIZES)
def test_every_signature_verifies(verdicts: Callable[..., list[str]], bits: int) -> None:
    source = random.Random(bits)
    messages = [source.randbytes(length) for length in [0, 1, 55, 56, 63, 64, 65, 8192, *range(200, 232)]]
    assert set(verdicts(*(Check(modulus(bits), F4, m, sign(bits, m)) for m in messages))) == {"true"}


@pytest.mark.parametrize("bits", [2048, 2050])
def test_every_bit_flip_of_a_signature_fails(sql: psycopg.Connection[Any], bits: int) -> None:
    signature = sign(bits, MESSAGE)
    row = sql.execute(
        """
        select count(*), count(*) filter (where kakunin_private.rsa_pkcs1_sha256_verify(
                 %(n)s, 65537, %(m)s, set_bit(%(s)s, i, 1 - get_bit(%(s)s, i))) is not false),
               bool_and(kakunin_private.rsa_pkcs1_sha256_verify(%(n)s, 65537, %(m)s, %(s)s))
          from generate_series(0, length(%(s)s::bytea) * 8 - 1) i
        """.replace("%(s)s", "%(s)s::bytea"),
        {"n": modulus(bits), "m": MESSAGE, "s": signature},
    ).fetchone()
    assert row == (len(signature) * 8, 0, True)


def flips(data: bytes) -> list[bytes]:
    return [
        (int.from_bytes(data, "big") ^ 1 << bit).to_bytes(len(data), "big") for bit in range(len(data) * 8)
    ]


def test_every_bit_flip_of_a_message_fails(verdicts: Callable[..., list[str]]) -> None:
    signature = sign(2048, MESSAGE)
    checks = [Check(modulus(2048), F4, message, signature) for message in flips(MESSAGE)]
    assert set(verdicts(*checks)) == {"false"}


def test_every_bit_flip_of_a_modulus_fails(verdicts: Callable[..., list[str]]) -> None:
    signature = sign(2048, MESSAGE)
    said = verdicts(*(Check(n, F4, MESSAGE, signature) for n in flips(modulus(2048))))
    assert said[0].startswith("KA010 RSA modulus is even")
    assert re.fullmatch("KA010 RSA modulus of 20[0-4][0-9] bits is not supported", said[-1])
    assert set(said[1:-1]) == {"false"}


def test_another_key_fails(verdicts: Callable[..., list[str]]) -> None:
    other = rsa.generate_private_key(public_exponent=F4, key_size=2048)
    signature = other.sign(MESSAGE, padding.PKCS1v15(), hashes.SHA256())
    n = big_endian(other.public_key().public_numbers().n)
    checks = [Check(modulus(2048), F4, MESSAGE, signature), Check(n, F4, MESSAGE, signature)]
    assert verdicts(*checks) == ["false", "true"]


@pytest.mark.parametrize("bits", SIZES)
def test_a_signature_has_the_length_of_the_modulus(verdicts: Callable[..., list[str]], bits: int) -> None:
    s = sign(bits, MESSAGE)
    # A message whose signature begins with a zero byte, so that stripping it keeps the number.
    message = next(m for m in (str(i).encode() for i in range(100_000)) if sign(2049, m)[0] == 0)
    short = sign(2049, message)
    wrong = [b"", b"\0", s[1:], s[:-1], s + b"\0", b"\0" + s, s + s, s[: len(s) // 2], b"\0" * (len(s) + 1)]
    checks = [Check(modulus(bits), F4, MESSAGE, w) for w in wrong]
    checks.append(Check(modulus(2049), F4, message, short[1:]))
    assert set(verdicts(*checks)) == {"false"}
    assert verdicts(Check(modulus(2049), F4, message, short)) == ["true"]


def test_a_signature_has_one_number(verdicts: Callable[..., list[str]]) -> None:
    """s + n, s + 2n, ... are one residue, and only s counts. A 2050-bit key leaves room for 63 of them."""
    bits, size = 2050, len(modulus(2050))
    n = int.from_bytes(modulus(bits), "big")
    s = int.from_bytes(sign(bits, MESSAGE), "big")
    same = [s + times * n for times in range(1, (2 ** (8 * size) - 1 - s) // n + 1)]
    assert len(same) >= 63
    checks = [Check(modulus(bits), F4, MESSAGE, other.to_bytes(size, "big")) for other in same]
    assert set(verdicts(*checks)) == {"false"}


@pytest.mark.parametrize("bits", SIZES)
def test_trivial_signatures_fail(verdicts: Callable[..., list[str]], bits: int) -> None:
    n, size = int.from_bytes(modulus(bits), "big"), len(modulus(bits))
    s = int.from_bytes(sign(bits, MESSAGE), "big")
    trivial = [0, 1, 2, n - 1, n, n - s, int.from_bytes(encoded(bits, MESSAGE), "big"), 2 ** (8 * size) - 1]
    checks = [Check(modulus(bits), F4, MESSAGE, number.to_bytes(size, "big")) for number in trivial]
    assert set(verdicts(*checks)) == {"false"}


def forgeries(bits: int) -> dict[str, bytes]:
    """Encoded messages that a verifier which parses the padding has been known to take."""
    size = len(modulus(bits))
    digest = hashlib.sha256(MESSAGE).digest()
    right = encoded(bits, MESSAGE)
    tail = SHA256_INFO + digest

    def padded(tail: bytes, kind: bytes = b"\x01", fill: bytes = b"\xff") -> bytes:
        return b"\x00" + kind + fill * (size - len(tail) - 3) + b"\x00" + tail

    def info(oid: str, null: str, digest: bytes, octet: int = 0x04) -> bytes:
        algorithm = bytes.fromhex(oid + null)
        algorithm = bytes([0x30, len(algorithm)]) + algorithm
        body = algorithm + bytes([octet, len(digest)]) + digest
        return bytes([0x30, len(body)]) + body

    sha256 = "0609608648016503040201"
    assert padded(tail) == right == padded(info(sha256, "0500", digest))
    garbage = bytes(range(1, 101))
    early = b"\x00\x01" + b"\xff" * 8 + b"\x00" + tail
    return {
        "block type 02": padded(tail, b"\x02"),
        "block type 00": padded(tail, b"\x00", b"\x00"),
        "padding of zeros": padded(tail, fill=b"\x00"),
        "padding of 01": padded(tail, fill=b"\x01"),
        "one wrong padding byte, first": right[:2] + b"\xfe" + right[3:],
        "one wrong padding byte, last": right[: size - 53] + b"\xfe" + right[size - 52 :],
        "separator missing": b"\x00\x01" + b"\xff" * (size - len(tail) - 2) + tail,
        "separator twice": b"\x00\x01" + b"\xff" * (size - len(tail) - 4) + b"\x00\x00" + tail,
        "short padding, zeros behind": early.ljust(size, b"\x00"),
        "short padding, garbage behind": early + (garbage * 10)[: size - len(early)],
        "no padding, garbage behind": (b"\x00\x01\x00" + tail).ljust(size, b"\xaa"),
        "garbage before the hash": padded(SHA256_INFO + b"\x00" * 8 + digest),
        "a byte after the hash": padded(tail + b"\x00"),
        "garbage after the hash": padded(tail + garbage),
        "hash without DigestInfo": padded(digest),
        "hash cut short": padded(SHA256_INFO[:-1] + b"\x1f" + digest[:-1]),
        "hash empty": padded(info(sha256, "0500", b"")),
        "NULL missing": padded(info(sha256, "", digest)),
        "NULL with content": padded(info(sha256, "050100", digest)),
        "parameters other than NULL": padded(info(sha256, "0400", digest)),
        "garbage in the parameters": padded(info(sha256, "0420" + "aa" * 32, digest)),
        "BIT STRING for OCTET STRING": padded(info(sha256, "0500", digest, octet=0x03)),
        "long form of the length": padded(b"\x30\x81\x31" + SHA256_INFO[2:] + digest),
        "OID of SHA-1 over a SHA-256 hash": padded(info("06052b0e03021a", "0500", digest)),
        "SHA-1": padded(info("06052b0e03021a", "0500", hashlib.sha1(MESSAGE).digest())),
        "SHA-224": padded(info("0609608648016503040204", "0500", hashlib.sha224(MESSAGE).digest())),
        "SHA-384": padded(info("0609608648016503040202", "0500", hashlib.sha384(MESSAGE).digest())),
        "SHA-512": padded(info("0609608648016503040203", "0500", hashlib.sha512(MESSAGE).digest())),
        "SHA-512/256": padded(info("0609608648016503040206", "0500", digest)),
        "hash of another message": encoded(bits, MESSAGE + b"!"),
        "hash of the hash": encoded(bits, digest),
        "hash reversed": padded(SHA256_INFO + digest[::-1]),
        "the whole shifted left": right[1:] + b"\x00",
        "the whole zero": b"\x00" * size,
    }


@pytest.mark.parametrize("bits", [2048, 2050, 3072])
def test_only_the_one_right_encoding_verifies(verdicts: Callable[..., list[str]], bits: int) -> None:
    right = sign_raw(bits, encoded(bits, MESSAGE))
    assert right == sign(bits, MESSAGE)  # so sign_raw() signs, and what fails below fails for its encoding
    n = int.from_bytes(modulus(bits), "big")
    forged = {name: em for name, em in forgeries(bits).items() if int.from_bytes(em, "big") < n}
    assert len(forged) > 30
    assert encoded(bits, MESSAGE) not in forged.values()
    checks = [Check(modulus(bits), F4, MESSAGE, sign_raw(bits, em)) for em in forged.values()]
    said = dict(zip(forged, verdicts(*checks), strict=True))
    assert {name: verdict for name, verdict in said.items() if verdict != "false"} == {}


def test_verification_agrees_with_openssl_on_altered_encodings(verdicts: Callable[..., list[str]]) -> None:
    """Whatever bytes of the encoded message are changed, or none: both say the same."""
    edits = st.lists(st.tuples(st.integers(1, 255), st.binary(min_size=1, max_size=3)), max_size=2)

    @bounded
    @given(st.binary(max_size=100), edits, st.sampled_from([2048, 2050]))
    def agrees(message: bytes, edits: list[tuple[int, bytes]], bits: int) -> None:
        em = bytearray(encoded(bits, message))
        for at, new in edits:
            em[at : at + len(new)] = new[: len(em) - at]
        signature = sign_raw(bits, bytes(em))
        expected = openssl_accepts(bits, message, signature)
        assert expected == (bytes(em) == encoded(bits, message))
        assert verdicts(Check(modulus(bits), F4, message, signature)) == [str(expected).lower()]

    agrees()


def test_verification_agrees_with_openssl_on_any_bytes(verdicts: Callable[..., list[str]]) -> None:
    source = random.Random(5)
    signatures = [source.randbytes(256) for _ in range(200)]
    checks = [Check(modulus(2048), F4, MESSAGE, s) for s in signatures]
    assert not any(openssl_accepts(2048, MESSAGE, s) for s in signatures)
    assert set(verdicts(*checks)) == {"false"}


def test_a_missing_message_or_signature_is_no_proof(verdicts: Callable[..., list[str]]) -> None:
    n, s = modulus(2048), sign(2048, MESSAGE)
    checks = [Check(n, F4, None, s), Check(n, F4, MESSAGE, None), Check(n, F4, None, None)]
    assert verdicts(*checks) == ["false"] * 3
    assert verdicts(Check(n, F4, b"", sign(2048, b""))) == ["true"]
