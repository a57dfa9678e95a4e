"""Agents' JWTs: read by another implementation (PyJWT), refused where anything is missing."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kms import Wire, error, quick_key, serve_kms

from kakunin_db import (
    BadInputError,
    CertificateValidityError,
    LocalSigner,
    SignerError,
    SignerUnavailableError,
    cli,
)
from kakunin_db.client import CertificateVerification
from kakunin_db.tokens import AsymmetricKey, Minter, SecretKey, jwk, jwks, key_of, thumbprint

SECRET = "a secret of the project, and of nobody else"
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


def verified(token: str, published: dict[str, Any]) -> dict[str, Any]:
    """As somebody who has the JWKS and nothing else."""
    keys = jwt.PyJWKSet.from_dict(published)
    return read(token, keys[jwt.get_unverified_header(token)["kid"]].key, "RS256")


def test_the_published_jwks_verifies_tokens_also_after_a_rotation() -> None:
    old, new = LocalSigner.generate(), LocalSigner.generate()
    published = jwks([new.public_key(), old.public_key(), new.public_key()])
    assert len(published["keys"]) == 2
    for signer in (old, new):
        token = Minter(AsymmetricKey(signer)).mint(certificate())
        assert verified(token.text, published)["sub"] == str(AGENT)
    stranger = Minter(AsymmetricKey(LocalSigner.generate())).mint(certificate())
    with pytest.raises(KeyError):
        verified(stranger.text, published)


def test_a_key_that_cannot_be_published_signs_nothing() -> None:
    short = LocalSigner.generate()
    weak = rsa.generate_private_key(65537, 1024)
    short.public_key = weak.public_key  # type: ignore[method-assign]
    with pytest.raises(BadInputError, match="1024"):
        Minter(AsymmetricKey(short)).mint(certificate())


def test_kms_signs_and_the_command_publishes_its_key(wire: Wire, capsys: pytest.CaptureFixture[str]) -> None:
    name = wire.made()
    signer = wire.signer(name)
    token = Minter(AsymmetricKey(signer)).mint(certificate())
    assert cli.main(["jwks", f"awskms:{name}?endpoint={wire.url}"]) == 0
    assert verified(token.text, json.loads(capsys.readouterr().out))["kakunin_cert_serial"] == "3A:F2:91:CC"

    wire.fault("Sign", error("DisabledException"))
    with pytest.raises(SignerError):
        Minter(AsymmetricKey(signer)).mint(certificate())
    wire.fault("Sign", *[error("ThrottlingException")] * 10)
    with pytest.raises(SignerUnavailableError):
        Minter(AsymmetricKey(signer)).mint(certificate())


def test_a_key_named_by_uri_is_opened_once_and_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "correct horse")
    file = tmp_path / "key.pem"
    key = AsymmetricKey(f"file:{file}")
    with pytest.raises(SignerError):
        Minter(key).mint(certificate())
    private = quick_key()
    file.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"correct horse"),
        )
    )
    file.chmod(0o600)
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
