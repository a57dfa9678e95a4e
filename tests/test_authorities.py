"""Chains of authorities: whom trust_ca() pins, how far each reaches, and how that ends."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from conftest import Database
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from forge import (
    ANY_USE,
    AUTHORITY_ID,
    BASIC,
    CLIENT,
    DAY,
    EXTENDED,
    NOW,
    PSS,
    SERVER,
    SUBJECT_ID,
    USAGE,
    Authority,
    Certificate,
    authority,
    certified,
    ec_key,
    modulus,
    name,
    rsa_key,
    sequence,
    usage,
)

REFUSED = "KA010"
SECOND = dt.timedelta(seconds=1)


class Chains:
    """Trusts and registers in a transaction that ends with the test, at any time one likes."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def one(self, query: str, *arguments: Any) -> Any:
        row = self.connection.execute(query.encode(), arguments).fetchone()
        return row and row[0]

    def attempt(self, query: str, *arguments: Any) -> Any:
        """The value, or the KA010 with its message."""
        try:
            with self.connection.transaction():
                return self.one(query, *arguments)
        except psycopg.Error as error:
            if error.sqlstate != REFUSED:
                raise
            return f"KA010: {error.diag.message_primary}"

    def trust(self, der: bytes) -> Any:
        return self.attempt("select kakunin.trust_ca(%s)", der)

    def agent(self) -> uuid.UUID:
        return self.one("select kakunin.create_agent('x')")

    def register(self, issuer: Authority, **changes: Any) -> Any:
        """'' or the message, for a certificate of this authority that a new agent gets."""
        certificate = certified(issuer, self.agent(), **{"not_after": NOW + 10 * DAY, **changes})
        answer = self.attempt("select kakunin.register_certificate(%s)", certificate.der)
        return answer if answer.startswith("KA") else ""

    def distrust(self, trusted: Authority, reason: str = "unspecified") -> list[str]:
        return self.one("select kakunin.distrust_ca(%s, %s)", trusted.text_id, reason)

    def at(self, moment: dt.datetime) -> None:
        self.connection.execute(
            "create or replace function kakunin_private.clock() returns timestamptz"
            f" language sql volatile parallel safe return timestamptz '{moment.isoformat()}'"
        )

    def authority(self, trusted: Authority) -> Any:
        query = "select to_jsonb(a) from kakunin_private.authorities a where key_id = %s"
        return self.one(query, trusted.text_id)


@pytest.fixture
def chains(database: Database) -> Iterator[Chains]:
    with database.connect("installer") as connection:
        connection.execute("select 1")  # a transaction has begun: what follows is inside it
        yield Chains(connection)
        connection.rollback()


def new_root(number_: int = 11, called: str = "A root", **changes: Any) -> tuple[Authority, Certificate]:
    return authority(rsa_key(number_), called, **changes)


def test_a_root_is_pinned_as_its_certificate_says(chains: Chains) -> None:
    root, certificate = new_root(serial=0xAB01, path_length=3)
    der = certificate.der
    assert "not trusted" in chains.register(root)
    assert chains.trust(der) == root.text_id
    row = chains.authority(root)
    assert row.pop("trusted_at")
    assert {key: dt.datetime.fromisoformat(row.pop(key)) for key in ("not_before", "not_after")} == {
        "not_before": certificate.not_before,
        "not_after": certificate.not_after,
    }
    assert row == {
        "key_id": root.text_id, "der": "\\x" + der.hex(), "serial": "AB:01",
        "subject": "\\x" + root.subject.public_bytes().hex(), "issuer_key_id": root.text_id,
        "public_key_modulus": "\\x" + modulus(rsa_key(11).public_key()).hex(), "path_length": 3,
        "trusted_by": "installer", "distrusted_at": None, "distrust_reason": None,
    }  # fmt: skip
    assert chains.register(root) == ""


CA_USAGE = usage("key_cert_sign", "crl_sign")


def signed_with(certificate: Certificate, signer: Any, key: Any = None) -> None:
    """By another key, in its own name; and perhaps for another key."""
    certificate.issuer = Authority(signer, certificate.subject, certificate.issuer.key_id)
    if key is not None:
        certificate.public_key = key.public_key()


BAD_CAS: dict[str, Callable[[Certificate], Any]] = {
    "no basicConstraints": lambda c: c.put(BASIC, None),
    "basicConstraints not critical": lambda c: c.put(BASIC, x509.BasicConstraints(True, None), False),
    "no CA": lambda c: c.put(BASIC, x509.BasicConstraints(False, None), True),
    "path length 17": lambda c: c.put(BASIC, x509.BasicConstraints(True, 17), True),
    "path length 128": lambda c: c.put(BASIC, x509.BasicConstraints(True, 128), True),
    "no keyUsage": lambda c: c.put(USAGE, None),
    "no keyCertSign": lambda c: c.put(USAGE, usage("crl_sign", "digital_signature"), True),
    "no cRLSign": lambda c: c.put(USAGE, usage("key_cert_sign", "digital_signature"), True),
    "no subjectKeyIdentifier": lambda c: c.put(SUBJECT_ID, None),
    "short subjectKeyIdentifier": lambda c: c.put(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(7))),
    "long subjectKeyIdentifier": lambda c: c.put(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(33))),
    "another's authorityKeyIdentifier": lambda c: c.put(
        AUTHORITY_ID, x509.AuthorityKeyIdentifier(bytes(20), None, None)
    ),
    "extKeyUsage without clientAuth": lambda c: c.put(EXTENDED, x509.ExtendedKeyUsage([SERVER])),
    "nameConstraints": lambda c: c.put("2.5.29.30", x509.NameConstraints([x509.DNSName("a")], None)),
    "policyConstraints": lambda c: c.put("2.5.29.36", x509.PolicyConstraints(0, None)),
    "inhibitAnyPolicy": lambda c: c.put("2.5.29.54", x509.InhibitAnyPolicy(0)),
    "critical extKeyUsage": lambda c: c.put(EXTENDED, x509.ExtendedKeyUsage([CLIENT]), True),
    "critical nameConstraints": lambda c: c.put(
        "2.5.29.30", x509.NameConstraints([x509.DNSName("a")], None), True
    ),
    "critical and unknown": lambda c: c.put("1.2.3.4", b"\5\0", True),
    "expired": lambda c: (setattr(c, "not_before", NOW - 9 * DAY), setattr(c, "not_after", NOW - DAY)),
    "not valid yet": lambda c: setattr(c, "not_before", NOW + DAY),
    "signed by another key": lambda c: signed_with(c, rsa_key(12)),
    "signed with SHA-384": lambda c: setattr(c, "hash", hashes.SHA384()),
    "signed with PSS": lambda c: setattr(c, "padding", PSS),
    "RSA with 1024 bits": lambda c: signed_with(c, rsa_key(0, 1024), rsa_key(0, 1024)),
    "RSA with 2047 bits": lambda c: signed_with(c, rsa_key(0, 2047), rsa_key(0, 2047)),
    "RSA with exponent 3": lambda c: signed_with(c, rsa_key(0, 2048, 3), rsa_key(0, 2048, 3)),
    "elliptic": lambda c: signed_with(c, ec_key(), ec_key()),
    "no subject": lambda c: vars(c).update(
        subject=x509.Name([]), issuer=Authority(c.issuer.key, x509.Name([]), c.issuer.key_id)
    ),
    "version 1": lambda c: c.tweaks.append(lambda p: p.__dict__.update(fields=p.fields[1:7])),
    "path length without CA": lambda c: c.put(BASIC, sequence(b"\2\1\0"), True),
    "CA false and a path length": lambda c: c.put(BASIC, sequence(b"\1\1\0", b"\2\1\0"), True),
    "CA 01": lambda c: c.put(BASIC, sequence(b"\1\1\1"), True),
    "negative path length": lambda c: c.put(BASIC, sequence(b"\1\1\xff", b"\2\1\xff"), True),
    "more than a path length": lambda c: c.put(BASIC, sequence(b"\1\1\xff", b"\2\1\0", b"\2\1\0"), True),
    "keyUsage of nothing": lambda c: c.put(USAGE, b"\3\1\0", True),
    "keyUsage with a bit that is none": lambda c: c.put(USAGE, b"\3\3\4\6\x10", True),
    "keyUsage in too many bits": lambda c: c.put(USAGE, b"\3\2\0\6", True),
    "keyUsage in three bytes": lambda c: c.put(USAGE, b"\3\4\7\6\0\x80", True),
    "one bit of the signature changed": lambda c: c.tweaks.append(
        lambda p: setattr(p, "bits", lambda s: s[:-1] + bytes([s[-1] ^ 1]))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CAS)
def test_what_is_no_authority_is_not_pinned(chains: Chains, case: str) -> None:
    root, certificate = new_root(called="B root")
    changed = certificate.changed()
    BAD_CAS[case](changed)
    assert chains.trust(changed.der).startswith("KA010")
    assert chains.authority(root) is None
    assert chains.trust(certificate.der) == root.text_id  # so it was that


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.put(AUTHORITY_ID, None),  # RFC 5280 lets a self-signed one do without
        lambda c: c.put(USAGE, usage("key_cert_sign", "crl_sign", "digital_signature"), False),
        lambda c: c.put(BASIC, x509.BasicConstraints(True, 16), True),
        lambda c: c.put(SUBJECT_ID, x509.SubjectKeyIdentifier(bytes(8))).put(AUTHORITY_ID, None),
        lambda c: c.put(SUBJECT_ID, x509.SubjectKeyIdentifier(b"\xff" * 32)).put(AUTHORITY_ID, None),
        lambda c: c.put("1.2.3.4", b"\5\0", False),
        lambda c: c.put(EXTENDED, x509.ExtendedKeyUsage([SERVER, CLIENT]), False),
        lambda c: c.put(EXTENDED, x509.ExtendedKeyUsage([ANY_USE]), False),
        lambda c: setattr(c, "not_after", dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.timezone.utc)),
    ],
)  # fmt: skip
def test_an_authority_may_differ(chains: Chains, change: Callable[[Certificate], Any]) -> None:
    _, certificate = new_root(called="C root")
    change(certificate)
    assert not chains.trust(certificate.der).startswith("KA010")


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_keys_of_every_size_sign(chains: Chains, bits: int) -> None:
    root, certificate = authority(rsa_key(0, bits), "sized")
    chains.trust(certificate.der)
    assert chains.register(root, public_key=rsa_key(1, bits).public_key()) == ""


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ([None, None, None], [None, None, None]),
        ([None, 0], [None, 0]),
        ([None, 0, None], [None, 0, "refused"]),
        ([0, None], [0, "refused"]),
        ([0, 0], [0, "refused"]),
        ([1, 0], [1, 0]),
        ([1, None], [1, 0]),
        ([1, 5], [1, 0]),
        ([1, None, None], [1, 0, "refused"]),
        ([2, None, None], [2, 1, 0]),
        ([2, 0, None], [2, 0, "refused"]),
        ([3, 1, 16, 0], [3, 1, 0, "refused"]),
        ([16, 16, 16], [16, 15, 14]),
    ],
    ids=str,
)
def test_a_path_is_as_long_as_those_above_allow(
    chains: Chains, lengths: list[int | None], kept: list[Any]
) -> None:
    above: Authority | None = None
    for depth, (length, expected) in enumerate(zip(lengths, kept, strict=True)):
        made, certificate = authority(
            rsa_key(20 + depth), f"level {depth}", issuer=above, path_length=length, not_after=NOW + 100 * DAY
        )
        answer = chains.trust(certificate.der)
        if expected == "refused":
            assert "pathLenConstraint 0" in answer
            assert "not trusted" in chains.register(made)
        else:
            assert answer == made.text_id
            assert chains.authority(made)["path_length"] == expected
            assert chains.authority(made)["issuer_key_id"] == (above or made).text_id
            assert chains.register(made) == ""  # agents are no authorities: they do not count
            above = made


@pytest.fixture
def two_levels(chains: Chains) -> tuple[Chains, Authority, Authority]:
    root, certificate = new_root(path_length=1, not_before=NOW - 10 * DAY, not_after=NOW + 100 * DAY)
    chains.trust(certificate.der)
    below, certificate = authority(
        rsa_key(21), "below", issuer=root, not_before=NOW - 5 * DAY, not_after=NOW + 50 * DAY
    )
    chains.trust(certificate.der)
    return chains, root, below


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"issuer": Authority(rsa_key(12), name("A root"), b"\1" * 20)}, "not trusted"),
        ({"issuer": Authority(rsa_key(12), name("A root"), None)}, "not trusted"),
        ({"not_before": NOW - 11 * DAY}, "not inside"),
        ({"not_after": NOW + 101 * DAY}, "not inside"),
        ({"not_before": NOW - 5 * DAY, "not_after": NOW - DAY}, "has expired, or is not valid yet"),
        ({"not_before": NOW + DAY}, "has expired, or is not valid yet"),
        ({"subject": name("A root")}, "signed itself"),
    ],
)
def test_an_intermediate_stands_below_an_authority(
    two_levels: tuple[Chains, Authority, Authority], changes: dict[str, Any], why: str
) -> None:
    chains, root, _ = two_levels
    made, certificate = authority(rsa_key(22), "wrong", issuer=root, not_after=NOW + 50 * DAY)
    wrong = certificate.changed(**changes)
    if "issuer" in changes:
        wrong.put(AUTHORITY_ID, x509.AuthorityKeyIdentifier(changes["issuer"].key_id, None, None))
    assert why in chains.trust(wrong.der)
    # Signed by another key in the issuer's name, and by the issuer in another's.
    stranger = Authority(rsa_key(12), root.subject, root.key_id)
    assert "its signature is not" in chains.trust(certificate.changed(issuer=stranger).der)
    renamed = Authority(root.key, name("B root"), root.key_id)
    assert "is not the subject" in chains.trust(certificate.changed(issuer=renamed).der)
    assert "does not name the key" in chains.trust(certificate.changed().put(AUTHORITY_ID, None).der)
    assert chains.trust(certificate.der) == made.text_id


def test_an_agents_validity_lies_inside_its_authoritys(
    two_levels: tuple[Chains, Authority, Authority],
) -> None:
    chains, _, below = two_levels
    start, end = NOW - 5 * DAY, NOW + 50 * DAY  # the root's is longer
    assert "not inside" in chains.register(below, not_before=start - SECOND, not_after=end)
    assert "not inside" in chains.register(below, not_before=start, not_after=end + SECOND)
    assert chains.register(below, not_before=start, not_after=end) == ""


def test_an_authority_registers_from_its_first_moment_to_its_last(
    two_levels: tuple[Chains, Authority, Authority],
) -> None:
    chains, root, below = two_levels
    tick = dt.timedelta(microseconds=1)
    for moment, by_root, by_below in (
        (NOW - 10 * DAY - tick, False, False), (NOW - 10 * DAY, True, False),
        (NOW - 5 * DAY - tick, True, False),
        (NOW - 5 * DAY, True, True), (NOW + 50 * DAY, True, True), (NOW + 50 * DAY + tick, True, False),
        (NOW + 100 * DAY, True, False), (NOW + 100 * DAY + tick, False, False),
    ):  # fmt: skip
        chains.at(moment)
        for issuer, expected, end in ((root, by_root, NOW + 100 * DAY), (below, by_below, NOW + 50 * DAY)):
            answer = chains.register(issuer, not_before=NOW - 5 * DAY, not_after=end)
            assert (answer == "") == expected, (moment, answer)
            assert expected or "the authority's has ended" in answer or "not trusted" in answer


def test_a_certificate_registers_to_its_last_moment(two_levels: tuple[Chains, Authority, Authority]) -> None:
    chains, root, _ = two_levels
    end = NOW + 10 * DAY
    for moment, answer in (
        (end, ""),
        (end + dt.timedelta(microseconds=1), "KA010: the certificate is refused: it has expired"),
    ):
        chains.at(moment)
        assert chains.register(root, not_after=end) == answer


@pytest.mark.parametrize("reason", ["unspecified", "superseded", "keyCompromise", "cACompromise"])
@pytest.mark.parametrize("which", ["root", "below"])
def test_distrust_reaches_down_and_is_final(
    two_levels: tuple[Chains, Authority, Authority], reason: str, which: str
) -> None:
    chains, root, below = two_levels
    assert chains.register(below) == ""
    distrusted = root if which == "root" else below
    revoked = chains.distrust(distrusted, reason)
    assert len(revoked) == (reason in ("keyCompromise", "cACompromise"))
    status = (
        "select kakunin.verify_certificate(serial) ->> 'status' from kakunin.certificates"
        " where issuer_key_id = %s"
    )
    assert chains.one(status, below.text_id) == ("revoked" if revoked else "active")
    assert "not trusted" in chains.register(below)
    assert ("not trusted" in chains.register(root)) == (which == "root")
    # Neither is it pinned again, nor is anything below it.
    _, root_again = new_root(path_length=1)
    _, below_again = authority(rsa_key(21), "below", issuer=root, not_after=NOW + 50 * DAY)
    assert chains.trust(root_again.der).startswith("KA010") == (which == "root")
    assert chains.trust(below_again.der).startswith("KA010")
    _, certificate = authority(rsa_key(23), "under it", issuer=distrusted, not_after=NOW + DAY)
    assert "not trusted" in chains.trust(certificate.der)


@pytest.mark.parametrize("key_id", [None, "", "00", "zz"])
def test_what_is_not_pinned_is_not_distrusted(chains: Chains, key_id: str | None) -> None:
    assert "no authority" in chains.attempt("select kakunin.distrust_ca(%s)", key_id)
    assert "reason" in chains.attempt("select kakunin.distrust_ca(%s, 'removeFromCRL')", key_id)


def test_a_key_id_belongs_to_one_key_and_one_name(chains: Chains) -> None:
    root, certificate = new_root()
    chains.trust(certificate.der)
    kept = chains.authority(root)
    for key, called, key_id in (
        (12, "A root", root.key_id), (11, "Another root", root.key_id), (12, "Another root", root.key_id),
        (11, "A root", b"another key id"), (11, "Another root", b"another key id"),
    ):  # fmt: skip
        _, other = authority(rsa_key(key), called, key_id=key_id)
        assert "that of another authority" in chains.trust(other.der)
    assert chains.authority(root) == kept
    assert chains.register(root) == ""
    impostor = Authority(rsa_key(12), root.subject, root.key_id)
    assert "its signature is not" in chains.register(impostor)


def test_authorities_of_one_name_are_told_apart_by_key_id(chains: Chains) -> None:
    one, first = new_root(11, "A root")
    two, second = new_root(12, "A root")
    assert chains.trust(first.der) != chains.trust(second.der)
    assert [chains.register(one), chains.register(two)] == ["", ""]
    crossed = Authority(one.key, one.subject, two.key_id)
    assert "its signature is not" in chains.register(crossed)
    chains.distrust(one)
    assert "not trusted" in chains.register(one)
    assert chains.register(two) == ""


def test_renewal_keeps_the_key_and_the_name_and_brings_a_new_validity(chains: Chains) -> None:
    root, certificate = new_root(not_after=NOW + 10 * DAY, serial=1, path_length=0)
    chains.trust(certificate.der)
    assert "not inside" in chains.register(root, not_after=NOW + 20 * DAY)
    renewed = certificate.changed(not_after=NOW + 30 * DAY, serial=2)
    renewed.put(BASIC, x509.BasicConstraints(True, 1), True)
    # Not by one that is not good itself, and not by another's key.
    early = renewed.changed(not_before=NOW + DAY)
    forged = renewed.changed(issuer=Authority(rsa_key(12), root.subject, root.key_id))
    for bad in (early, forged, renewed.changed(public_key=rsa_key(12).public_key())):
        assert chains.trust(bad.der).startswith("KA010")
        assert chains.authority(root)["serial"] == "01"
    assert chains.trust(renewed.der) == root.text_id
    row = chains.authority(root)
    assert (row["serial"], row["path_length"], row["issuer_key_id"]) == ("02", 1, root.text_id)
    assert chains.register(root, not_after=NOW + 20 * DAY) == ""
    assert chains.one("select count(*) from kakunin_private.authorities where key_id = %s", root.text_id) == 1
    # After it has ended it can still be renewed.
    chains.at(NOW + 31 * DAY)
    assert "has ended" in chains.register(root, not_after=NOW + 30 * DAY)
    assert chains.trust(renewed.changed(not_after=NOW + 60 * DAY).der) == root.text_id
    assert chains.register(root, not_after=NOW + 59 * DAY) == ""


def test_an_agents_certificate_issues_nothing(chains: Chains) -> None:
    """Not even with a key id of its own, and the rights of an operator."""
    root, certificate = new_root()
    chains.trust(certificate.der)
    agent = chains.agent()
    holder = Authority(rsa_key(30), name(str(agent)))
    leaf = certified(root, agent, holder.key.public_key())
    leaf.put(SUBJECT_ID, x509.SubjectKeyIdentifier(holder.key_id or b""))
    assert not chains.attempt("select kakunin.register_certificate(%s)", leaf.der).startswith("KA")
    assert "not that of an authority" in chains.trust(leaf.der)
    assert "not trusted" in chains.register(holder)
    for subject in (root.subject, holder.subject):
        assert "its signature is not" in chains.register(Authority(holder.key, subject, root.key_id))
    # Its key in a certificate for an authority, signed by itself and by the root: the key is an agent's.
    _, own = authority(holder.key, str(agent))
    _, below = authority(holder.key, "below", issuer=root)
    for made in (own, below):
        assert "of an agent" in chains.trust(made.der)


def test_a_key_is_an_authoritys_or_an_agents(chains: Chains) -> None:
    root, certificate = new_root()
    chains.trust(certificate.der)
    other, certificate = new_root(12, "Another root")
    chains.trust(certificate.der)
    for key in (root.key, other.key):
        assert "its key is an authority's" in chains.register(root, public_key=key.public_key())
    chains.distrust(other)
    assert "its key is an authority's" in chains.register(root, public_key=other.key.public_key())
    assert chains.register(root, public_key=rsa_key(31).public_key()) == ""


def test_an_authoritys_certificate_is_no_agents(two_levels: tuple[Chains, Authority, Authority]) -> None:
    chains, root, below = two_levels
    for made in (root, below):
        der = bytes.fromhex(chains.authority(made)["der"][2:])
        assert "not one for signing alone" in chains.attempt("select kakunin.register_certificate(%s)", der)
