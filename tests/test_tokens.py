"""Agents' JWTs: read by another implementation (PyJWT), refused where anything is missing."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils
from kms import HSM, PIN, SOFTHSM, Wire, error, good, instead, quick_key, serve_kms, softhsm

from kakunin_db import (
    BadInputError,
    CertificateValidityError,
    LocalSigner,
    SignerError,
    SignerUnavailableError,
    cli,
    open_signer,
)
from kakunin_db.client import CertificateVerification
from kakunin_db.signers import LocalECDSASigner, PKCS11ECDSASigner, PKCS11Signer, open_jwt_signer
from kakunin_db.tokens import AsymmetricKey, Minter, SecretKey, jwk, jwks, key_of, thumbprint

SECRET = "a secret of the project, and of nobody else"
# A private key whose public half has an x of fewer than 32 bytes.
SHORT_X = 379
AGENT = uuid.UUID("7d3b3f0c-54b1-4b7e-a6a1-9a1e0d3a0001")


def certificate(left: float = 86400.0, **fields: Any) -> CertificateVerification:
    now = dt.datetime.now(dt.timezone.utc)
    answer = CertificateVerification(
        serial_number="3A:F2:91:CC",
        valid=True,
        status="active",
        agent_id=AGENT,
        agent_name="atlas",
        tenant=None,
        model=None,
        model_hash=None,
        permitted_actions=("orders:read", "trade:*"),
        financial_scope=None,
        not_before=now - dt.timedelta(days=1),
        not_after=now + dt.timedelta(seconds=left),
        revoked_at=None,
        revocation_reason=None,
        issuer_key_id="AA",
    )
    return dataclasses.replace(answer, **fields)


def read(text: str, key: Any = SECRET, algorithm: str = "HS256", **options: Any) -> dict[str, Any]:
    return jwt.decode(text, key, algorithms=[algorithm], audience="authenticated", **options)


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    with serve_kms() as wire:
        yield wire


def test_a_token_says_who_the_agent_is_and_for_how_long() -> None:
    before = int(time.time())
    token = Minter(SecretKey(SECRET)).mint(certificate())
    claims = read(token.text)
    assert jwt.get_unverified_header(token.text) == {"alg": "HS256", "typ": "JWT"}
    assert before <= claims.pop("iat") <= time.time()
    assert claims.pop("exp") == token.expires
    assert before + 300 <= token.expires <= time.time() + 300
    assert claims == {
        "role": "kakunin_agent",
        "sub": str(AGENT),
        "kakunin_cert_serial": "3A:F2:91:CC",
        "scopes": ["orders:read", "trade:*"],
        "aud": "authenticated",
    }


def test_role_audience_issuer_lifetime_and_key_id_can_be_given() -> None:
    key = SecretKey(SECRET.encode(), "key-7")
    minter = Minter(key, role="authenticated", audience=None, issuer="https://agents.example", lifetime=30)
    token = minter.mint(certificate())
    claims = jwt.decode(token.text, SECRET, algorithms=["HS256"], issuer="https://agents.example")
    assert claims["role"] == "authenticated"
    assert claims["exp"] - claims["iat"] == 30
    assert "aud" not in claims
    assert jwt.get_unverified_header(token.text)["kid"] == "key-7"


def test_a_token_never_outlives_its_certificate() -> None:
    ends = certificate(12.5)
    assert ends.not_after
    token = Minter(SecretKey(SECRET)).mint(ends)
    assert token.expires == int(ends.not_after.timestamp())
    assert 0 < token.seconds_left <= 10
    for left in (0.0, -5.0):
        with pytest.raises(CertificateValidityError):
            Minter(SecretKey(SECRET)).mint(certificate(left))


def test_a_token_is_due_after_four_fifths_of_its_life_also_where_the_machine_slept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = Minter(SecretKey(SECRET), lifetime=100).mint(certificate())
    assert token.fresh
    assert 78 < token.seconds_left <= 80
    now, monotonic = time.time(), time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: monotonic + 81)
        assert not token.fresh
    with monkeypatch.context() as patch:  # CLOCK_MONOTONIC stands still while a machine is suspended
        patch.setattr(time, "time", lambda: now + 81)
        assert not token.fresh
        assert not token.expired
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + 101)
        assert token.expired


@pytest.mark.parametrize(
    "answer",
    [
        certificate(valid=False, status="revoked"),
        certificate(agent_id=None),
        certificate(not_after=None),
    ],
    ids=["not valid", "no agent", "no end"],
)
def test_nothing_is_minted_for_a_certificate_that_was_not_found_usable(
    answer: CertificateVerification,
) -> None:
    with pytest.raises(BadInputError):
        Minter(SecretKey(SECRET)).mint(answer)


@pytest.mark.parametrize("role", ["service_role", "authenticator", "postgres", "supabase_admin", "", None])
def test_no_token_names_a_role_that_row_security_does_not_bind(role: Any) -> None:
    with pytest.raises(BadInputError):
        Minter(SecretKey(SECRET), role=role)


@pytest.mark.parametrize("lifetime", [0, -1, 301, 1.5, "60"])
def test_a_token_lives_five_minutes_at_most(lifetime: Any) -> None:
    with pytest.raises(BadInputError):
        Minter(SecretKey(SECRET), lifetime=lifetime)


def test_there_is_one_key_and_it_is_told_to_nobody() -> None:
    with pytest.raises(BadInputError, match="no key"):
        key_of(None, None, None)
    with pytest.raises(BadInputError, match="not with both"):
        key_of(SECRET, "file:key.pem", None)
    for short in ("", "x" * 31, b"x" * 31):
        with pytest.raises(BadInputError, match="32 bytes"):
            key_of(short, None, None)
    with pytest.raises(BadInputError) as wrong:
        SecretKey("\udc80" + SECRET)
    assert wrong.value.__cause__ is None
    assert wrong.value.__suppress_context__  # whose text has the secret
    with pytest.raises(BadInputError):
        SecretKey(12345)  # type: ignore[arg-type]
    key = SecretKey(SECRET)
    token = Minter(key).mint(certificate())
    for shown in (repr(key), repr(Minter(key)), repr(token), str(vars(Minter(key)))):
        assert SECRET not in shown
        assert token.text not in shown


def test_a_token_to_ask_with_is_nobody_s() -> None:
    claims = read(Minter(SecretKey(SECRET)).asking())
    assert claims.keys() == {"role", "aud", "iat", "exp"}
    assert claims["exp"] - claims["iat"] == 60


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    n = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV"
        "4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7"
        "d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF4"
        "4-csFCur-kEgU8awapJzKnqDKgw"
    )
    modulus = int.from_bytes(jwt.utils.base64url_decode(n), "big")
    key = rsa.RSAPublicNumbers(65537, modulus).public_key()
    assert thumbprint(key) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"  # section 3.1
    assert jwk(key)["n"] == n


def test_an_ec_key_s_coordinates_have_32_bytes_also_where_they_begin_with_0() -> None:
    key = ec.derive_private_key(SHORT_X, ec.SECP256R1())
    x = key.public_key().public_numbers().x
    assert x < 1 << 248
    published = jwk(key.public_key())
    assert len(published["x"]) == len(published["y"]) == 43
    assert jwt.PyJWK(published).key.public_numbers() == key.public_key().public_numbers()
    required = json.dumps({name: published[name] for name in ("crv", "kty", "x", "y")}, separators=(",", ":"))
    digest = hashlib.sha256(required.encode()).digest()
    assert published["kid"] == thumbprint(key.public_key())
    assert jwt.utils.base64url_decode(published["kid"]) == digest


def verified(token: str, published: dict[str, Any]) -> dict[str, Any]:
    """As somebody who has the JWKS and nothing else."""
    key = jwt.PyJWKSet.from_dict(published)[jwt.get_unverified_header(token)["kid"]]
    return read(token, key.key, str(key.algorithm_name))


def test_the_published_jwks_verifies_tokens_also_after_a_rotation() -> None:
    old, new, short = LocalSigner.generate(), LocalSigner.generate(), LocalECDSASigner.generate()
    published = jwks([new.public_key(), old.public_key(), new.public_key(), short.public_key()])
    assert [key["alg"] for key in published["keys"]] == ["RS256", "RS256", "ES256"]
    for signer in (old, new, short):
        token = Minter(AsymmetricKey(signer)).mint(certificate())
        assert verified(token.text, published)["sub"] == str(AGENT)
    for signer in (LocalSigner.generate(), LocalECDSASigner.generate()):
        stranger = Minter(AsymmetricKey(signer)).mint(certificate())
        with pytest.raises(KeyError):
            verified(stranger.text, published)


def test_an_es256_signature_has_64_bytes_whatever_its_numbers() -> None:
    signer = LocalECDSASigner(ec.derive_private_key(SHORT_X, ec.SECP256R1()))
    for n in range(600):  # one in 128 has an r or s of fewer than 32 bytes
        digest = hashlib.sha256(str(n).encode()).digest()
        signature = signer.sign(digest)
        assert len(signature) == 64
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        signer.public_key().verify(
            utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        )
    with pytest.raises(BadInputError):
        signer.sign(b"short")


@pytest.mark.parametrize("curve", [ec.SECP256K1(), ec.SECP384R1()], ids=lambda curve: curve.name)
def test_only_p_256_signs_es256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, curve: Any) -> None:
    key = ec.generate_private_key(curve)
    with pytest.raises(BadInputError, match="P-256|not supported"):
        LocalECDSASigner(key)
    with pytest.raises(BadInputError, match="not supported"):
        jwk(key.public_key())
    file = tmp_path / "key.pem"
    save(key, file)
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "correct horse")
    with pytest.raises(BadInputError, match="not supported"):
        Minter(AsymmetricKey(f"file:{file}")).mint(certificate())


def test_an_ec_key_signs_jwts_and_nothing_else(tmp_path: Path, wire: Wire) -> None:
    file = tmp_path / "key.pem"
    LocalECDSASigner.generate().save(file, b"correct horse")
    with pytest.raises(BadInputError, match="not an RSA key"):
        open_signer(f"file:{file}", password=b"correct horse")
    with pytest.raises(SignerError, match="ECC_NIST_P256"):
        open_signer(f"awskms:{wire.made('ECC_NIST_P256')}?endpoint={wire.url}")


def test_a_key_that_cannot_be_published_signs_nothing() -> None:
    short = LocalSigner.generate()
    weak = rsa.generate_private_key(65537, 1024)
    short.public_key = weak.public_key  # type: ignore[method-assign]
    with pytest.raises(BadInputError, match="1024"):
        Minter(AsymmetricKey(short)).mint(certificate())


@pytest.mark.parametrize(
    ("spec", "kind"),
    [("RSA_2048", "KMSSigner"), ("RSA_3072", "KMSSigner"), ("ECC_NIST_P256", "KMSECDSASigner")],
)
def test_kms_signs_and_the_command_publishes_its_key(
    wire: Wire, capsys: pytest.CaptureFixture[str], spec: str, kind: str
) -> None:
    name = wire.made(spec)
    signer = open_jwt_signer(f"awskms:{name}?endpoint={wire.url}")
    assert signer.key_id == name
    assert repr(signer) == f"<{kind} {name}>"
    token = Minter(AsymmetricKey(signer)).mint(certificate())
    assert cli.main(["jwks", f"awskms:{name}?endpoint={wire.url}"]) == 0
    assert verified(token.text, json.loads(capsys.readouterr().out))["kakunin_cert_serial"] == "3A:F2:91:CC"

    wire.fault("Sign", error("DisabledException"))
    with pytest.raises(SignerError):
        Minter(AsymmetricKey(signer)).mint(certificate())
    wire.fault("Sign", *[error("ThrottlingException")] * 10)
    with pytest.raises(SignerUnavailableError):
        Minter(AsymmetricKey(signer)).mint(certificate())
    wire.fault("Sign", good)


def test_an_es256_signature_of_another_key_in_kms_is_no_signature(wire: Wire) -> None:
    signer = wire.ecdsa_signer(wire.made("ECC_NIST_P256"))
    other = ec.generate_private_key(ec.SECP256R1())
    digest = hashlib.sha256(b"message").digest()
    signature = other.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
    for forged in (signature, signature[:-1], b"no signature"):
        wire.fault("Sign", instead(Signature=forged, KeyId="another"), good)
        with pytest.raises(SignerError, match="another made it"):
            signer.sign(digest)
        assert len(signer.sign(digest)) == 64
    for spec in ("RSA_2048", "ECC_NIST_P384", "ECC_SECG_P256K1"):
        with pytest.raises(SignerError, match="ECC_NIST_P256") as refused:
            wire.ecdsa_signer(wire.made(spec))
        assert "--key-spec ECC_NIST_P256" in str(refused.value.hint)


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HSM]:
    with softhsm(tmp_path_factory.mktemp("hsm")) as hsm:
        yield hsm


def test_a_token_signs_and_the_command_publishes_its_key(
    hsm: HSM, capsys: pytest.CaptureFixture[str]
) -> None:
    hsm.make_ec("agents", b"\x01")
    hsm.make("agents", b"\x02", EXTRACTABLE=False)
    for id, kind, size in (("01", PKCS11ECDSASigner, 64), ("02", PKCS11Signer, 256)):
        uri = f"pkcs11:token=kk;object=agents;id=%{id}?module-path={SOFTHSM}&pin-value={PIN}"
        signer = open_jwt_signer(uri)
        assert type(signer) is kind
        assert signer.key_id == f"pkcs11:token=kk;object=agents;id=%{id}"
        assert repr(signer) == f"<{kind.__name__} {signer.key_id}>"
        assert len(signer.sign(hashlib.sha256(b"message").digest())) == size
        with pytest.raises(BadInputError):
            signer.sign(b"short")
        token = Minter(AsymmetricKey(signer)).mint(certificate())
        assert cli.main(["jwks", uri]) == 0
        published = json.loads(capsys.readouterr().out)
        assert verified(token.text, published)["kakunin_cert_serial"] == "3A:F2:91:CC"
    with pytest.raises(SignerError, match="has 2 private keys pkcs11:token=kk;object=agents"):
        open_jwt_signer(f"pkcs11:token=kk;object=agents?module-path={SOFTHSM}&pin-value={PIN}")


def test_an_es256_signature_of_a_token_is_found_again_after_a_lost_session(hsm: HSM) -> None:
    hsm.make_ec("lost", b"l")
    signer = PKCS11ECDSASigner(SOFTHSM, "kk", PIN, label="lost")
    hsm.restart()
    digest = hashlib.sha256(b"message").digest()
    for _ in range(200):  # one in 128 has an r or s of fewer than 32 bytes
        signature = signer.sign(digest)
        r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
        signer.public_key().verify(
            utils.encode_dss_signature(r, s), digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))
        )


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"CURVE": "secp384r1"}, "its curve is not P-256"),
        ({"SENSITIVE": False}, "can leave the token"),
        ({"SIGN": False}, "not an elliptic-curve key for signing"),
    ],
    ids=["P-384", "not sensitive", "not for signing"],
)
def test_another_key_in_a_token_signs_no_es256(hsm: HSM, attributes: Any, said: str) -> None:
    hsm.make_ec(said, b"r", **attributes)
    try:
        with pytest.raises(SignerError, match=said) as refused:
            PKCS11ECDSASigner(SOFTHSM, "kk", PIN, label=said)
    finally:
        hsm.destroy(said)
    assert "EC:prime256v1" in str(refused.value.hint)


def test_an_rsa_key_signs_no_es256(hsm: HSM) -> None:
    hsm.make("rsa", b"s", EXTRACTABLE=False)
    with pytest.raises(SignerError, match="not an elliptic-curve key for signing"):
        PKCS11ECDSASigner(SOFTHSM, "kk", PIN, label="rsa")


def test_an_es256_signature_that_is_not_of_the_public_key_in_the_token_is_none(hsm: HSM) -> None:
    """The public key is an object of its own, which another may have put there."""
    import pkcs11 as library

    attribute = library.Attribute
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    point = other.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)

    def of(id: bytes, point: bytes | None) -> Callable[[Any], None]:
        def work(session: Any) -> None:
            wanted = {attribute.CLASS: library.ObjectClass.PUBLIC_KEY, attribute.ID: id}
            [found] = list(session.get_objects(wanted))
            made = {**wanted, attribute.KEY_TYPE: library.KeyType.EC, attribute.TOKEN: True}
            made[attribute.EC_PARAMS] = found[attribute.EC_PARAMS]
            found.destroy()
            if point is not None:
                session.create_object({**made, attribute.EC_POINT: point})

        return work

    def opened(label: str, id: bytes, point: bytes | None) -> PKCS11ECDSASigner:
        hsm.make_ec(label, id)
        hsm.keys()._token.run("exchange it", of(id, point), write=True)
        return PKCS11ECDSASigner(SOFTHSM, "kk", PIN, label=label)

    with pytest.raises(SignerError, match="has no usable public key: the token has none with its id"):
        opened("alone", b"e0", None)
    signer = opened("exchanged", b"e1", b"\x04\x41" + point)
    assert signer.public_key() == other
    with pytest.raises(SignerError, match="not by the key that pkcs11:token=kk;object=exchanged was"):
        signer.sign(hashlib.sha256(b"message").digest())


def save(key: Any, file: Path) -> None:
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"correct horse"),
        )
    )


@pytest.mark.parametrize(
    "make", [quick_key, lambda: ec.generate_private_key(ec.SECP256R1())], ids=["RSA", "EC"]
)
def test_a_key_named_by_uri_is_opened_once_and_when_it_is_needed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], Any],
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "correct horse")
    file = tmp_path / "key.pem"
    key = AsymmetricKey(f"file:{file}")
    with pytest.raises(SignerError):
        Minter(key).mint(certificate())
    save(make(), file)
    first = Minter(key).mint(certificate())
    assert cli.main(["jwks", f"file:{file}"]) == 0
    published = json.loads(capsys.readouterr().out)
    file.unlink()
    second = Minter(key).mint(certificate())
    for token in (first, second):
        assert verified(token.text, published)["aud"] == "authenticated"
    assert cli.main(["jwks", f"file:{file}"]) == 1
    assert cli.main(["jwks", "pkcs11:token=t?module-path=/m&pin-value=0815"]) == 1
    said = capsys.readouterr()
    assert "0815" not in said.out + said.err
