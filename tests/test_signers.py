"""Signers and key stores: keys in files, in AWS KMS (moto's, over HTTP) and in a token (SoftHSM).

kms.py has the proxy between boto3 and moto, which answers wrongly when told to, and the token.
"""

from __future__ import annotations

import base64
import functools
import json
import random
import re
import socket
import stat
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from kms import (
    HSM,
    PIN,
    SECRET,
    SOFTHSM,
    Fault,
    Wire,
    dripping,
    error,
    good,
    instead,
    serve_kms,
    softhsm,
)

from kakunin_db import (
    BadInputError,
    KeyStore,
    KMSKeys,
    KMSSigner,
    LocalKeys,
    LocalSigner,
    PKCS11Keys,
    PKCS11Signer,
    SignerError,
    SignerUnavailableError,
    aws,
    open_keys,
    open_signer,
)
from kakunin_db.signers import kms, pkcs11, subject_key_id

DIGEST = bytes(range(32))


def verify(key: rsa.RSAPublicKey, signature: bytes, digest: bytes = DIGEST) -> None:
    assert len(signature) == key.key_size // 8
    key.verify(signature, digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))


def chain(error: BaseException | None) -> str:
    """Whatever a traceback would print of it."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {getattr(error, 'hint', '')}\n"
        error = error.__cause__ or error.__context__
    return text


@functools.cache
def _any_signer() -> LocalSigner:
    return LocalSigner.generate()


# Files --------------------------------------------------------------------------------------------------


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


def test_keys_in_a_folder_are_private_to_their_user(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "keys"
    keys = LocalKeys(folder, SECRET.encode())
    assert not folder.exists()  # opening a store makes nothing
    signer = keys.create("agent x")
    path = folder / f"{subject_key_id(signer.public_key())}.pem"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (folder, path)] == [0o700, 0o600]
    assert path.read_bytes().startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(BadInputError, match="password") as caught:
        LocalKeys(folder, b"another").open(signer.public_key())
    assert "another" not in chain(caught.value)
    assert SECRET not in repr(keys)
    with pytest.raises(BadInputError, match="password"):
        LocalKeys(folder, b"")


def test_a_file_with_another_key_than_its_name_says_is_refused(tmp_path: Path) -> None:
    keys = LocalKeys(tmp_path, b"p")
    one, two = keys.create("one").public_key(), keys.create("two").public_key()
    (tmp_path / f"{subject_key_id(one)}.pem").replace(tmp_path / f"{subject_key_id(two)}.pem")
    with pytest.raises(SignerError, match="another key"):
        keys.open(two)


def test_a_folder_that_cannot_be_one_is_an_error_of_the_signer(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keys = LocalKeys(tmp_path / "file", b"p")
    with pytest.raises(SignerError, match="Not a directory|File exists"):
        keys.create("x")
    with pytest.raises(SignerError, match="Not a directory"):
        keys.discard(_any_signer())


# Every store --------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "kms", "pkcs11"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> KeyStore:
    if request.param == "local":
        return LocalKeys(tmp_path / "keys", SECRET.encode())
    if request.param == "kms":
        return request.getfixturevalue("wire").keys()
    return request.getfixturevalue("hsm").keys()


def test_a_store_makes_finds_and_discards_keys_by_their_public_half(store: KeyStore) -> None:
    signers = [store.create(f"agent {n}") for n in range(2)]
    publics = [signer.public_key() for signer in signers]
    assert publics[0] != publics[1]
    for signer, public in zip(signers, publics, strict=True):
        assert (public.key_size, public.public_numbers().e) == (2048, 65537)
        verify(public, signer.sign(DIGEST))
        again = store.open(public)
        assert again.public_key() == public
        verify(public, again.sign(DIGEST))
        with pytest.raises(InvalidSignature):
            verify(public, again.sign(b"e" * 32))
        assert signer.key_id in repr(signer)
    store.discard(store.open(publics[0]))
    with pytest.raises(SignerError) as caught:
        store.open(publics[0])
    assert type(caught.value) is SignerError
    assert subject_key_id(publics[0]) in str(caught.value).replace("%", "")
    verify(publics[1], store.open(publics[1]).sign(DIGEST))  # and no other is gone


def test_the_name_of_a_key_is_what_a_certificate_carries() -> None:
    public = _any_signer().public_key()
    assert bytes.fromhex(subject_key_id(public)) == x509.SubjectKeyIdentifier.from_public_key(public).digest
    assert re.fullmatch("[0-9a-f]{40}", subject_key_id(public))


def test_every_signer_takes_sha_256_digests_only(store: KeyStore) -> None:
    signer = store.create("x")
    for length in (0, 20, 31, 33, 64):
        with pytest.raises(BadInputError, match=f"32 bytes and this one {length}"):
            signer.sign(b"d" * length)


def test_a_signer_serves_many_threads(store: KeyStore) -> None:
    signers = [store.create("a"), store.create("b")]
    digests = [random.Random(n).randbytes(32) for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        signatures = list(pool.map(lambda n: signers[n % 2].sign(digests[n]), range(24)))
    for n, signature in enumerate(signatures):
        verify(signers[n % 2].public_key(), signature, digests[n])


def test_openssl_accepts_the_signatures(store: KeyStore, tmp_path: Path) -> None:
    signer = store.create("x")
    (tmp_path / "message").write_bytes(b"the message")
    digest = hashes.Hash(hashes.SHA256())
    digest.update(b"the message")
    (tmp_path / "signature").write_bytes(signer.sign(digest.finalize()))
    (tmp_path / "public.pem").write_bytes(
        signer.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    command = ["openssl", "dgst", "-sha256", "-verify", "public.pem", "-signature", "signature", "message"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verified OK\n")
    (tmp_path / "message").write_bytes(b"another message")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode != 0


# AWS KMS ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _wire() -> Iterator[Wire]:
    with serve_kms() as wire:
        yield wire


@pytest.fixture
def wire(_wire: Wire) -> Wire:
    _wire.faults.clear()
    _wire.calls.clear()
    return _wire


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long botocore would have waited between attempts."""
    found: list[float] = []
    monkeypatch.setattr("botocore.endpoint.time", types.SimpleNamespace(sleep=found.append))
    return found


def test_a_key_in_kms_is_named_by_id_arn_or_alias(wire: Wire) -> None:
    arn = wire.made()
    wire.client.create_alias(AliasName="alias/agent", TargetKeyId=arn)
    for name in (arn, arn.rsplit("/")[-1], "alias/agent"):
        signer = wire.signer(name)
        assert signer.key_id == name
        verify(signer.public_key(), signer.sign(DIGEST))
    wire.client.delete_alias(AliasName="alias/agent")


@pytest.mark.parametrize("spec", ["RSA_3072", "RSA_4096"])
def test_longer_rsa_keys_sign_as_well(wire: Wire, spec: str) -> None:
    signer = wire.signer(wire.made(spec))
    assert signer.public_key().key_size == int(spec[4:])
    verify(signer.public_key(), signer.sign(DIGEST))


def test_kms_is_asked_for_the_public_key_once_and_for_the_digests_signature(wire: Wire) -> None:
    arn = wire.made()
    wire.calls.clear()
    signer = wire.signer(arn)
    for n in range(3):
        signer.sign(bytes([n]) * 32)
    assert [call[0] for call in wire.calls] == ["GetPublicKey", "Sign", "Sign", "Sign"]
    assert wire.calls[2][1] == {
        "KeyId": arn,
        "Message": base64.b64encode(b"\1" * 32).decode(),
        "MessageType": "DIGEST",
        "SigningAlgorithm": "RSASSA_PKCS1_V1_5_SHA_256",
    }


def test_a_key_made_in_kms_says_what_it_is_for_and_never_leaves_it(wire: Wire) -> None:
    keys = wire.keys(prefix="team/agents")
    signer = keys.create("agent 7")
    signer.sign(DIGEST)
    keys.open(signer.public_key()).sign(DIGEST)
    name = f"alias/team/agents/{subject_key_id(signer.public_key())}"
    operations = [call[0] for call in wire.calls]
    assert operations == ["CreateKey", "GetPublicKey", "CreateAlias", "Sign", "GetPublicKey", "Sign"]
    key = wire.key(name)
    assert (key.key_spec, key.key_usage, key.description) == ("RSA_2048", "SIGN_VERIFY", "agent 7")
    assert wire.client.list_resource_tags(KeyId=key.id)["Tags"] == [
        {"TagKey": "kakunin", "TagValue": "team/agents"}
    ]
    # The private key is in moto; nothing that came over the wire has a part of it.
    private = key.private_key.private_key.private_numbers()
    assert private.public_numbers == signer.public_key().public_numbers()
    received = b"".join(re.findall(rb"[A-Za-z0-9+/=]{60,}", b" ".join(call[2] for call in wire.calls)))
    decoded = [base64.b64decode(v) for _, _, b in wire.calls for v in strings_of(json.loads(b or b"{}"))]
    assert received
    for part in (private.d, private.p, private.q, private.dmp1, private.dmq1, private.iqmp):
        raw = part.to_bytes((part.bit_length() + 7) // 8, "big")
        assert not any(raw in data for data in decoded)
    modulus = private.public_numbers.n.to_bytes(256, "big")
    assert any(modulus in data for data in decoded)  # so that would have been seen
    keys.discard(signer)


def strings_of(value: Any) -> Iterator[str]:
    """The strings in an answer that may be base64."""
    for each in value.values() if isinstance(value, dict) else []:
        yield from strings_of(each)
        if isinstance(each, str) and re.fullmatch("[A-Za-z0-9+/]*={0,2}", each) and len(each) % 4 == 0:
            yield each


def test_throttling_is_waited_out(wire: Wire, pauses: list[float]) -> None:
    signer = wire.signer(wire.arn)
    wire.fault("Sign", error("ThrottlingException"), error("ThrottlingException"), good)
    verify(signer.public_key(), signer.sign(DIGEST))
    assert (wire.count("Sign"), len(pauses)) == (3, 2)
    wire.fault("GetPublicKey", error("ThrottlingException"), good)
    assert wire.signer(signer.key_id).public_key() == signer.public_key()


@pytest.mark.parametrize(
    "fault",
    [
        error("ThrottlingException"),
        error("RequestLimitExceeded"),
        error("KMSInternalException", 500),
        error("DependencyTimeoutException", 500),
        error("KeyUnavailableException", 500),
        lambda _: (503, b"<html>Service Unavailable</html>"),
        lambda _: (502, b""),
        lambda _: None,
    ],
    ids=["throttled", "limit", "internal", "dependency", "key-unavailable", "503", "502", "hung-up"],
)
def test_what_stays_is_to_be_tried_again_later(wire: Wire, pauses: list[float], fault: Fault) -> None:
    arn = wire.arn
    signer = wire.signer(arn)
    wire.fault("Sign", fault)
    with pytest.raises(SignerUnavailableError, match="kms:Sign") as caught:
        signer.sign(DIGEST)
    assert wire.count("Sign") == 3  # bounded
    assert len(pauses) == 2
    assert arn in str(caught.value)
    assert "again" in (caught.value.hint or "")
    assert caught.value.__cause__ is not None
    wire.fault("Sign", good)
    verify(signer.public_key(), signer.sign(DIGEST))
    wire.fault("GetPublicKey", fault)
    with pytest.raises(SignerUnavailableError, match="kms:GetPublicKey"):
        wire.signer(arn)


def test_an_answer_that_does_not_come_is_waited_for_no_longer_than_the_timeout(wire: Wire) -> None:
    arn = wire.made()
    signer = wire.signer(arn, timeout=0.2, attempts=2)
    over = threading.Event()

    def silent(_: dict[str, Any]) -> None:
        over.wait(5)

    wire.fault("Sign", silent)
    start = time.monotonic()
    with pytest.raises(SignerUnavailableError, match=f"(?s)did not answer kms:Sign with {arn}.*timeout"):
        signer.sign(DIGEST)
    assert 0.4 <= time.monotonic() - start < 4
    over.set()


def ended(check: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not check() and time.monotonic() < until:
        time.sleep(0.02)
    return check()


@pytest.mark.parametrize(
    ("before", "piece"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
        (b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    ],
    ids=["status line", "headers", "body", "chunks"],
)
def test_an_answer_by_drops_is_waited_for_no_longer_than_the_deadline(before: bytes, piece: bytes) -> None:
    with dripping(before, piece) as (url, over, asked):
        began = time.monotonic()
        with pytest.raises(SignerUnavailableError, match="GetPublicKey with alias/x: no whole answer within"):
            KMSSigner("alias/x", endpoint_url=url, timeout=1, attempts=4, deadline=0.5)
        assert 0.5 <= time.monotonic() - began < 2
        assert len(kms._in_time.hanging) == 1
        over.set()
        # What was given up asks no more, although botocore would try four times.
        assert ended(lambda: not kms._in_time.hanging)
        assert len(asked) == 1


def test_calls_that_hang_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws, "_MOST_HANGING", 3)
    with dripping(b"", b"H") as (url, over, asked):
        for _ in range(5):
            with pytest.raises(SignerUnavailableError) as caught:
                KMSSigner("alias/x", endpoint_url=url, timeout=1, attempts=1, deadline=0.2)
        assert "3 earlier calls have no answer yet" in str(caught.value)
        assert len(asked) == 3
        over.set()
        assert ended(lambda: not kms._in_time.hanging)


def test_nobody_listening_is_to_be_tried_again_later(wire: Wire) -> None:
    signer = wire.signer(wire.arn)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(SignerUnavailableError, match=f"alias/x.*{url}"):
            KMSSigner("alias/x", endpoint_url=url, timeout=0.4, attempts=2)
        broken = KMSSigner(signer.key_id, client=wire.client)
        broken._client = kms._new_client("eu-west-1", url, 0.4, 2)
        with pytest.raises(SignerUnavailableError, match="kms:Sign"):
            broken.sign(DIGEST)


REFUSALS = {
    "AccessDeniedException": r"Grant kms:(Sign|GetPublicKey) on {key} to the caller",
    "DisabledException": r"aws kms enable-key --key-id {key}$",
    "NotFoundException": r"account and region",
    "KMSInvalidStateException": r"aws kms describe-key --key-id {key}; .*cancel-key-deletion --key-id {key}$",
    "InvalidKeyUsageException": r"create-key --key-spec RSA_2048 --key-usage SIGN_VERIFY",
    "ExpiredTokenException": r"Renew the AWS credentials",
}


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("operation", ["Sign", "GetPublicKey"])
def test_a_refusal_names_the_key_and_the_remedy(
    wire: Wire, pauses: list[float], operation: str, code: str
) -> None:
    arn = wire.arn
    signer = wire.signer(arn)
    wire.calls.clear()
    wire.fault(operation, error(code, message="User: arn:aws:iam::1:role/agent said"))
    with pytest.raises(SignerError, match=f"kms:{operation} with {arn}: {code}") as caught:
        signer.sign(DIGEST) if operation == "Sign" else wire.signer(arn)
    assert type(caught.value) is SignerError
    assert re.search(REFUSALS[code].format(key=re.escape(arn)), caught.value.hint or "")
    assert ("role/agent" in str(caught.value)) == (code != "ExpiredTokenException")
    assert wire.count(operation) == 1  # again would be no better
    assert caught.value.sqlstate == ""
    assert type(caught.value.__cause__).__module__.startswith("botocore")


def test_an_alias_is_not_told_to_commands_that_take_none(wire: Wire) -> None:
    wire.fault("GetPublicKey", error("DisabledException"))
    with pytest.raises(SignerError, match="with alias/x: Disabled") as caught:
        wire.signer("alias/x")
    assert caught.value.hint == "Enable it: aws kms enable-key --key-id <the id of the key of alias/x>"


def test_what_may_quote_a_session_token_is_not_repeated(wire: Wire) -> None:
    wire.fault("GetPublicKey", error("InvalidSignatureException", message=f"x-amz-security-token:{SECRET}"))
    with pytest.raises(SignerError, match="InvalidSignatureException") as caught:
        wire.signer("alias/x")
    assert SECRET not in f"{caught.value!r} {caught.value.hint}"
    assert SECRET in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("spec", "usage"),
    [
        ("ECC_NIST_P256", "SIGN_VERIFY"),
        ("RSA_2048", "ENCRYPT_DECRYPT"),
        ("RSA_4096", "ENCRYPT_DECRYPT"),
    ],
)
def test_another_kind_of_key_in_kms_is_refused(wire: Wire, spec: str, usage: str) -> None:
    arn = wire.made(spec, usage)
    with pytest.raises(SignerError, match=f"{arn} is a key {spec} for {usage}") as caught:
        wire.signer(arn)
    assert "--key-spec RSA_2048 --key-usage SIGN_VERIFY" in (caught.value.hint or "")


def spki(key: Any) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


PSS_ONLY = {"SigningAlgorithms": ["RSASSA_PSS_SHA_256"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PublicKey": b"garbage"}, "no usable public key"),
        ({"PublicKey": b""}, "does not speak as AWS KMS"),
        ({"PublicKey": spki(ec.generate_private_key(ec.SECP256R1()))}, "not an RSA key"),
        ({"PublicKey": spki(rsa.generate_private_key(65537, 1024))}, "1024 bits"),
        ({"PublicKey": spki(rsa.generate_private_key(3, 2048))}, "exponent 3"),
        (PSS_ONLY, "RSASSA_PKCS1_V1_5_SHA_256"),
        ({"SigningAlgorithms": None}, "RSASSA_PKCS1_V1_5_SHA_256"),
        ({"KeySpec": None}, "a key None"),
        ({"KeyUsage": "ENCRYPT_DECRYPT"}, "a key RSA_2048 for ENCRYPT_DECRYPT"),
    ],
    ids=["garbage", "empty", "ec", "1024", "e3", "pss", "no-algorithms", "no-spec", "no-use"],
)
def test_an_unusable_answer_about_the_key_is_refused(wire: Wire, changes: dict[str, Any], said: str) -> None:
    answer = {
        "KeyId": "id",
        "KeySpec": "RSA_2048",
        "KeyUsage": "SIGN_VERIFY",
        "SigningAlgorithms": ["RSASSA_PKCS1_V1_5_SHA_256"],
        "PublicKey": spki(_any_signer()),
    }
    wire.fault("GetPublicKey", instead(**answer))
    assert wire.signer("alias/x").public_key() == _any_signer().public_key()
    wire.fault("GetPublicKey", instead(**{k: v for k, v in (answer | changes).items() if v is not None}))
    with pytest.raises(SignerError, match=said) as caught:
        wire.signer("alias/x")
    assert "alias/x" in str(caught.value)
    assert type(caught.value) is SignerError


def test_an_alias_that_was_moved_is_an_error_and_not_a_signature(wire: Wire) -> None:
    one, two = wire.made(), wire.made()
    client = wire.client
    client.create_alias(AliasName="alias/moved", TargetKeyId=one)
    signer = wire.signer("alias/moved")
    signer.sign(DIGEST)
    client.update_alias(AliasName="alias/moved", TargetKeyId=two)
    with pytest.raises(SignerError, match="not by the key that alias/moved was") as caught:
        signer.sign(DIGEST)
    assert one.rsplit("/")[-1] in str(caught.value)
    assert f"{two} made it" in str(caught.value)
    client.update_alias(AliasName="alias/moved", TargetKeyId=one)
    verify(signer.public_key(), signer.sign(DIGEST))
    client.delete_alias(AliasName="alias/moved")


@pytest.mark.parametrize(
    "body", [b"<html>Log in</html>", b"", b"[1]", b"null", b'{"PublicKey":5,"Signature":5}'], ids=ascii
)
def test_what_is_not_kms_is_an_error_that_says_so(wire: Wire, body: bytes) -> None:
    signer, keys = wire.signer(wire.arn), wire.keys()
    for operation, call in (
        ("Sign", lambda: signer.sign(DIGEST)),
        ("GetPublicKey", lambda: wire.signer(wire.arn)),
        ("CreateKey", lambda: keys.create("agent")),
    ):
        wire.fault(operation, lambda _: (200, body))
        with pytest.raises(SignerError, match=f"kms:{operation} .*does not speak as AWS KMS"):
            call()


@pytest.mark.parametrize("signature", [b"\x01" * 256, b"x", "of another digest"], ids=repr)
def test_a_wrong_signature_is_not_returned(wire: Wire, signature: Any) -> None:
    arn = wire.arn
    signer = wire.signer(arn)
    if isinstance(signature, str):
        signature = signer.sign(b"e" * 32)
    wire.fault("Sign", instead(KeyId=arn, Signature=signature))
    with pytest.raises(SignerError, match="not by the key"):
        signer.sign(DIGEST)


def test_a_key_without_its_alias_is_deleted_again(wire: Wire) -> None:
    wire.fault("CreateAlias", error("AccessDeniedException"))
    with pytest.raises(SignerError, match="kms:CreateAlias") as caught:
        wire.keys().create("agent x")
    assert "Grant kms:CreateAlias" in (caught.value.hint or "")
    (scheduled,) = [request for name, request, _ in wire.calls if name == "ScheduleKeyDeletion"]
    assert scheduled["PendingWindowInDays"] == 7
    assert wire.key(scheduled["KeyId"]).key_state == "PendingDeletion"
    # As is one whose public key cannot be had.
    wire.fault("GetPublicKey", error("AccessDeniedException"))
    with pytest.raises(SignerError, match="kms:GetPublicKey"):
        wire.keys().create("agent x")
    assert wire.count("ScheduleKeyDeletion") == 2


def test_a_key_left_behind_is_named(wire: Wire) -> None:
    wire.fault("CreateAlias", error("LimitExceededException"))
    wire.fault("ScheduleKeyDeletion", error("AccessDeniedException"))
    with pytest.raises(SignerError, match="kms:CreateAlias") as caught:
        wire.keys(attempts=1).create("agent x")
    arn = wire.calls[-1][1]["KeyId"]
    assert re.search(f"left behind .*{arn}.*delete it", caught.value.hint or "")
    assert wire.key(arn).key_state == "Enabled"


def test_a_new_key_that_kms_does_not_know_everywhere_yet_is_waited_for(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kms, "_SETTLING", (0.01, 0.01))
    unknown = error("NotFoundException")
    wire.fault("GetPublicKey", unknown, unknown, good)
    wire.fault("CreateAlias", unknown, good)
    signer = wire.keys().create("x")
    verify(signer.public_key(), signer.sign(DIGEST))
    assert (wire.count("CreateKey"), wire.count("GetPublicKey"), wire.count("CreateAlias")) == (1, 3, 2)
    wire.fault("GetPublicKey", unknown)
    with pytest.raises(SignerError, match="NotFoundException"):
        wire.keys().create("x")
    assert (wire.count("GetPublicKey"), wire.count("ScheduleKeyDeletion")) == (6, 1)


def test_an_answer_that_got_lost_does_not_lose_the_key(wire: Wire) -> None:
    def lose(request: dict[str, Any]) -> None:
        client = kms._new_client("eu-west-1", "http://{}:{}".format(*wire.moto.get_host_and_port()), 5, 1)
        client.create_alias(**request)

    wire.fault("CreateAlias", lose, good)
    signer = wire.keys().create("x")
    assert [call[0] for call in wire.calls] == ["CreateKey", "GetPublicKey", "CreateAlias", "CreateAlias"]
    assert b"AlreadyExistsException" in wire.calls[-1][2]
    assert wire.keys().open(signer.public_key()).public_key() == signer.public_key()


def test_no_key_is_made_where_that_is_denied(wire: Wire) -> None:
    wire.fault("CreateKey", error("AccessDeniedException"))
    with pytest.raises(SignerError, match="a new key for 'agent x'"):
        wire.keys().create("agent x")
    assert [call[0] for call in wire.calls] == ["CreateKey"]


def test_an_alias_to_another_key_than_its_name_says_is_refused(wire: Wire) -> None:
    keys = wire.keys()
    public = keys.create("x").public_key()
    wire.client.update_alias(AliasName=f"alias/kakunin/{subject_key_id(public)}", TargetKeyId=wire.made())
    with pytest.raises(SignerError, match="another key than its name says"):
        keys.open(public)


def test_discarding_a_key_in_kms_takes_its_alias_and_schedules_its_deletion(wire: Wire) -> None:
    keys = wire.keys()
    for discarded in (lambda s: s, lambda s: keys.open(s.public_key())):
        signer = keys.create("x")
        keys.discard(discarded(signer))
        assert wire.key(signer.key_id).key_state == "PendingDeletion"
        aliases = [a["AliasName"] for a in wire.client.list_aliases()["Aliases"]]
        assert f"alias/kakunin/{subject_key_id(signer.public_key())}" not in aliases
    signer = keys.create("x")
    wire.fault("DeleteAlias", error("NotFoundException"))  # gone already
    keys.discard(signer)
    assert wire.key(signer.key_id).key_state == "PendingDeletion"
    signer = keys.create("x")
    wire.fault("DeleteAlias", error("AccessDeniedException"))
    with pytest.raises(SignerError, match="kms:DeleteAlias"):
        keys.discard(signer)
    assert wire.key(signer.key_id).key_state == "PendingDeletion"
    with pytest.raises(BadInputError, match="not a key in AWS KMS"):
        keys.discard(_any_signer())


@pytest.mark.parametrize(
    "prefix", ["", "aws", "aws/x", "a b", "/a", "a/", "a//b", "a:b", "x" * 201, "\u00e9"]
)
def test_a_prefix_is_the_beginning_of_an_alias(wire: Wire, prefix: str) -> None:
    with pytest.raises(BadInputError, match="cannot begin an alias"):
        wire.keys(prefix=prefix)


def test_without_boto3_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(BadInputError, match="id, ARN or alias"):
        KMSSigner("")
    for make in (lambda: KMSSigner("alias/x"), KMSKeys):
        with pytest.raises(SignerError, match="boto3") as caught:
            make()
        assert caught.value.hint == "pip install 'kakunin-db[aws]'"


def test_without_credentials_the_error_says_so(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    kms._session.cache_clear()
    with pytest.raises(SignerError, match="NoCredentialsError") as caught:
        wire.signer("alias/x")
    kms._session.cache_clear()
    assert "credentials that may kms:GetPublicKey" in (caught.value.hint or "")
    assert wire.calls == []


def test_an_endpoint_that_cannot_be_trusted_is_not_tried_again_later(wire: Wire) -> None:
    with pytest.raises(SignerError, match="cannot be trusted") as caught:
        KMSSigner("alias/x", endpoint_url=wire.url.replace("http:", "https:"), timeout=0.4, attempts=1)
    assert type(caught.value) is SignerError


ARN = "arn:aws:kms:ap-south-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


@pytest.mark.parametrize(
    ("key", "region", "environment", "used"),
    [
        ("alias/x", None, {}, "eu-west-1"),
        ("alias/x", None, {"AWS_REGION": "us-east-2"}, "us-east-2"),
        ("alias/x", None, {"AWS_DEFAULT_REGION": "us-west-2"}, "us-west-2"),
        ("alias/x", None, {"AWS_REGION": "us-east-2", "AWS_DEFAULT_REGION": "us-west-2"}, "us-east-2"),
        ("alias/x", "eu-north-1", {"AWS_REGION": "us-east-2"}, "eu-north-1"),
        (ARN, None, {"AWS_REGION": "us-east-2"}, "ap-south-1"),
        (ARN, "ap-south-1", {}, "ap-south-1"),
    ],
)
def test_which_region_a_key_is_in(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, key: str, region: str, environment: Any, used: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wire.fault(
        "GetPublicKey",
        instead(
            KeySpec="RSA_2048",
            KeyUsage="SIGN_VERIFY",
            SigningAlgorithms=["RSASSA_PKCS1_V1_5_SHA_256"],
            PublicKey=spki(_any_signer()),
        ),
    )
    query = f"?endpoint={wire.url}" + (f"&region={region}" if region else "")
    for signer in (wire.signer(key, region=region), open_signer(f"awskms:{key}{query}")):
        assert signer._client.meta.region_name == used
        assert signer.key_id == key
    if not key.startswith("arn"):
        assert open_keys(f"awskms:{query}")._client.meta.region_name == used


def test_a_region_that_is_not_the_arns_is_refused() -> None:
    with pytest.raises(BadInputError, match="not in the region eu-west-1"):
        KMSSigner(ARN, region="eu-west-1")


def test_the_client_is_bounded_in_time_and_attempts(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "99")
    monkeypatch.setenv("AWS_RETRY_MODE", "legacy")
    config = KMSKeys()._client.meta.config
    assert (config.connect_timeout, config.read_timeout) == (3, 3)
    assert config.retries == {"mode": "standard", "total_max_attempts": 4}


# PKCS #11 -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hsm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HSM]:
    with softhsm(tmp_path_factory.mktemp("hsm")) as hsm:
        yield hsm


def test_a_key_made_in_a_token_cannot_leave_it(hsm: HSM) -> None:
    import pkcs11 as library

    signer = hsm.keys().create("agent 7")
    attribute = library.Attribute

    def look(session: Any) -> None:
        key = signer._private_key(session)
        assert key[attribute.ID].hex() == subject_key_id(signer.public_key())
        assert key[attribute.LABEL] == "agent 7"
        for name in (
            "SENSITIVE",
            "ALWAYS_SENSITIVE",
            "NEVER_EXTRACTABLE",
            "LOCAL",
            "PRIVATE",
            "TOKEN",
            "SIGN",
        ):
            assert key[getattr(attribute, name)] is True, name
        for name in ("EXTRACTABLE", "DECRYPT", "UNWRAP", "DERIVE"):
            assert key[getattr(attribute, name)] is False, name
        for name in ("PRIVATE_EXPONENT", "PRIME_1", "PRIME_2", "EXPONENT_1", "EXPONENT_2", "COEFFICIENT"):
            with pytest.raises(library.AttributeSensitive):
                key[getattr(attribute, name)]
        wrapping = session.generate_key(library.KeyType.AES, 256)
        with pytest.raises(library.PKCS11Error):
            wrapping.wrap_key(key)

    signer._token.run("look", look)


def test_a_key_in_a_token_is_named_by_label_or_id(hsm: HSM) -> None:
    hsm.make("by name", b"\x01\xff", EXTRACTABLE=False, SENSITIVE=True)
    for name in ({"label": "by name"}, {"id": b"\x01\xff"}, {"label": "by name", "id": b"\x01\xff"}):
        signer = hsm.signer(**name)
        verify(signer.public_key(), signer.sign(DIGEST))
    assert signer.key_id == "pkcs11:token=kk;object=by%20name;id=%01%ff"
    again = open_signer(f"{signer.key_id}?module-path={SOFTHSM}&pin-value={PIN}")
    assert again.public_key() == signer.public_key()
    for name in ({"label": "by name", "id": b"\x01"}, {"label": "none"}):
        with pytest.raises(SignerError, match="has no private keys pkcs11:token=kk;object="):
            hsm.signer(**name)
    with pytest.raises(BadInputError, match="label or its id"):
        hsm.signer()


def test_two_keys_of_a_name_are_none(hsm: HSM) -> None:
    for id in (b"1", b"2"):
        hsm.make("twins", id, EXTRACTABLE=False)
    with pytest.raises(SignerError, match="has 2 private keys pkcs11:token=kk;object=twins") as caught:
        hsm.signer(label="twins")
    assert "pkcs11-tool" in (caught.value.hint or "")
    hsm.signer(label="twins", id=b"2").sign(DIGEST)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({"EXTRACTABLE": True, "SENSITIVE": True}, "can leave the token: it is extractable"),
        ({"EXTRACTABLE": False, "SENSITIVE": False}, "can leave the token: .*not sensitive"),
        ({"EXTRACTABLE": False, "SIGN": False}, "not an RSA key for signing"),
        ({"EXTRACTABLE": False, "BITS": 1024}, "1024 bits"),
        ({"KIND": "EC"}, "not an RSA key for signing"),
    ],
    ids=str,
)
def test_a_key_that_could_leave_or_not_sign_is_refused(hsm: HSM, attributes: Any, said: str) -> None:
    import pkcs11 as library

    label = f"refused {attributes}"
    if attributes.get("KIND") == "EC":
        attributes = {"KIND": library.KeyType.EC}
    hsm.make(label, b"r", **attributes)
    with pytest.raises(SignerError, match=said) as caught:
        hsm.signer(label=label)
    assert "PKCS11Keys.create()" in (caught.value.hint or "")
    assert "object=refused" in str(caught.value)


def test_a_key_that_wants_the_pin_for_every_signature_gets_it(hsm: HSM) -> None:
    hsm.make("always", b"a", EXTRACTABLE=False, ALWAYS_AUTHENTICATE=True)
    signer = hsm.signer(label="always")
    for _ in range(2):
        verify(signer.public_key(), signer.sign(DIGEST))


def test_a_wrong_pin_is_an_error_without_the_pin_and_harms_no_other_signer(hsm: HSM) -> None:
    signer = hsm.keys().create("x")
    with pytest.raises(
        SignerError, match=r"the PKCS #11 token 'kk' refuses the PIN \(PinIncorrect\)"
    ) as caught:
        hsm.signer(SECRET, label="x")
    assert SECRET not in chain(caught.value)
    assert PIN not in chain(caught.value)
    assert "locks" in (caught.value.hint or "")
    verify(signer.public_key(), signer.sign(DIGEST))
    assert PIN not in f"{signer!r} {signer.key_id} {hsm.keys()!r} {signer._token!r} {signer._token}"
    with pytest.raises(BadInputError, match="without a PIN"):
        hsm.keys("")


def test_a_session_that_was_lost_is_opened_again(hsm: HSM) -> None:
    import pkcs11 as library

    keys = hsm.keys()
    one, two = keys.create("one"), keys.create("two")

    def log_everybody_out() -> None:  # as something else in this process could
        one._token._session.close()

    for each in (hsm.restart, log_everybody_out, library.lib(SOFTHSM).finalize):
        each()
        for signer in (one, two):
            verify(signer.public_key(), signer.sign(DIGEST))
        each()
        assert keys.open(two.public_key()).public_key() == two.public_key()
        each()
        three = keys.create("three")
        verify(three.public_key(), three.sign(DIGEST))
        each()
        keys.discard(three)
        with pytest.raises(SignerError, match="no private keys"):
            keys.open(three.public_key())


def test_a_token_that_something_else_in_the_process_uses_is_shared(hsm: HSM) -> None:
    import pkcs11 as library

    signer = hsm.keys().create("x")
    hsm.restart()
    other = library.lib(SOFTHSM).get_token(token_label="kk").open(user_pin=PIN)
    verify(signer.public_key(), signer.sign(DIGEST))
    other.close()  # which ends the login
    assert hsm.keys().open(signer.public_key()).public_key() == signer.public_key()
    verify(signer.public_key(), signer.sign(DIGEST))


def test_a_token_that_was_removed_is_to_be_tried_again_later(hsm: HSM) -> None:
    signer = hsm.keys().create("x")
    hsm.tokens.rename(hsm.folder / "away")
    hsm.tokens.mkdir()
    try:
        hsm.restart()
        for _ in range(2):
            with pytest.raises(SignerUnavailableError, match="token 'kk' is not there any more"):
                signer.sign(DIGEST)
        with pytest.raises(SignerError, match="no PKCS #11 tokens with label 'kk'"):
            hsm.keys()
    finally:
        hsm.tokens.rmdir()
        (hsm.folder / "away").rename(hsm.tokens)
        hsm.restart()
    verify(signer.public_key(), signer.sign(DIGEST))


def test_a_key_that_was_destroyed_is_an_error(hsm: HSM) -> None:
    signer = hsm.keys().create("x")
    script = (
        "import sys; from cryptography.hazmat.primitives import serialization\n"
        "from kakunin_db import open_keys\n"
        "key = serialization.load_pem_public_key(sys.stdin.buffer.read());"
        "keys = open_keys(sys.argv[1]); keys.discard(keys.open(key))"
    )
    pem = signer.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    uri = f"pkcs11:token=kk?module-path={SOFTHSM}&pin-value={PIN}"
    subprocess.run([sys.executable, "-c", script, uri], input=pem, check=True)
    with pytest.raises(SignerError, match="has no private keys") as caught:
        signer.sign(DIGEST)
    assert type(caught.value) is SignerError


def test_a_key_put_in_the_place_of_another_is_refused(hsm: HSM) -> None:
    hsm.make("place", b"p", EXTRACTABLE=False)
    signer = hsm.signer(label="place")
    hsm.destroy("place")
    hsm.make("place", b"p", EXTRACTABLE=False)
    hsm.restart()
    with pytest.raises(SignerError, match="another key than it was"):
        signer.sign(DIGEST)


def test_a_signature_the_token_got_wrong_is_not_returned(hsm: HSM, monkeypatch: pytest.MonkeyPatch) -> None:
    signer = hsm.keys().create("x")
    monkeypatch.setattr(pkcs11, "_SHA256_INFO", pkcs11._SHA256_INFO[:-1] + b"\x1f")
    with pytest.raises(SignerError, match="not by the key that pkcs11:token=kk;id="):
        signer.sign(DIGEST)


def test_a_pin_that_was_changed_is_not_tried_until_the_token_locks(
    hsm: HSM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hsm.add("changed")
    hsm.restart()
    keys = PKCS11Keys(SOFTHSM, "changed", PIN)
    signer = keys.create("x")
    keys._token.run("change its PIN", lambda session: session.set_pin(PIN, "4321"), write=True)
    hsm.restart()
    logins: list[Any] = []
    listing = pkcs11._tokens_named
    monkeypatch.setattr(pkcs11, "_tokens_named", lambda *a: logins.append(a) or listing(*a))
    for _ in range(5):
        with pytest.raises(SignerError, match="refuses the PIN"):
            signer.sign(DIGEST)
    assert len(logins) == 1
    with pytest.raises(SignerError, match="refuses the PIN"):
        PKCS11Keys(SOFTHSM, "changed", PIN)  # but who gives it anew is heard
    assert len(logins) == 3
    PKCS11Keys(SOFTHSM, "changed", "4321")
    verify(signer.public_key(), signer.sign(DIGEST))


def test_a_key_whose_id_cannot_be_set_is_destroyed(hsm: HSM, monkeypatch: pytest.MonkeyPatch) -> None:
    import pkcs11 as library

    def refuse(_: Any) -> str:
        raise library.AttributeReadOnly

    monkeypatch.setattr(pkcs11, "subject_key_id", refuse)
    with pytest.raises(SignerError, match="made a key for 'no id'.*AttributeReadOnly"):
        hsm.keys().create("no id")
    assert hsm.destroy("no id") == 0


def test_signing_goes_on_after_a_fork(hsm: HSM, tmp_path: Path) -> None:
    script = (
        "import os, sys; from kakunin_db import open_keys;"
        "keys = open_keys(sys.argv[1]); signer = keys.create('forked'); signature = signer.sign(b'd' * 32)\n"
        "child = os.fork()\n"
        "assert signer.sign(b'd' * 32) == signature\n"
        "assert signer._token._opened_by == os.getpid()  # SoftHSM would do without, and others would not\n"
        "if child: assert os.waitpid(child, 0)[1] == 0; keys.discard(signer); print('both')\n"
        "else: sys.stdout.flush(); os._exit(0)\n"
    )
    uri = f"pkcs11:token=kk?module-path={SOFTHSM}&pin-value={PIN}"
    done = subprocess.run([sys.executable, "-c", script, uri], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("both\n", "", 0)


def test_what_is_no_module_or_token_is_an_error_that_names_it(hsm: HSM, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    for module in (tmp_path / "none.so", tmp_path / "text.so"):
        with pytest.raises(SignerError, match=f"the PKCS #11 module {module} does not load") as caught:
            PKCS11Signer(str(module), "kk", PIN, label="x")
        assert caught.value.hint == "Check module-path."
    with pytest.raises(SignerError, match="no PKCS #11 tokens with label 'other'"):
        PKCS11Keys(SOFTHSM, "other", PIN)


def test_without_python_pkcs11_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pkcs11", None)
    with pytest.raises(SignerError, match="python-pkcs11") as caught:
        PKCS11Keys("/any.so", "kk", PIN)
    assert caught.value.hint == "pip install 'kakunin-db[pkcs11]'"


# URIs ---------------------------------------------------------------------------------------------------


def test_files_by_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", SECRET)
    folder = tmp_path / "a b"
    keys = open_keys(f"file:{tmp_path}/a%20b")
    signer = keys.create("x")
    (path,) = folder.iterdir()
    for uri in (f"file:{tmp_path}/a%20b/{path.name}", f"file://{tmp_path}/a%20b/{path.name}"):
        assert open_signer(uri).public_key() == signer.public_key()
    assert open_keys(f"file:{folder}").open(signer.public_key()).public_key() == signer.public_key()
    monkeypatch.delenv("KAKUNIN_KEY_PASSWORD")
    assert open_signer(uri, password=SECRET.encode()).public_key() == signer.public_key()
    for opened in (open_signer, open_keys):
        with pytest.raises(BadInputError, match="password") as caught:
            opened(uri)
        assert caught.value.hint == "Set KAKUNIN_KEY_PASSWORD."
    with pytest.raises(SignerError, match="none.pem cannot be read: No such file"):
        open_signer(f"file:{tmp_path}/none.pem", password=b"p")
    with pytest.raises(SignerError, match="is a folder of keys") as found:
        open_signer(f"file:{folder}", password=b"p")
    assert "subject key identifier" in (found.value.hint or "")


def test_kms_by_uri(wire: Wire) -> None:
    keys = open_keys(f"awskms:?region=eu-west-1&prefix=by/uri&endpoint={wire.url}")
    public = keys.create("x").public_key()
    key = f"alias/by/uri/{subject_key_id(public)}"
    for name in (key, wire.key(key).arn, wire.key(key).id):
        signer = open_signer(f"awskms:{name}?endpoint={wire.url}")
        verify(public, signer.sign(DIGEST))
    assert open_keys(f"awskms:?endpoint={wire.url}")._prefix == "kakunin"


def test_tokens_by_uri(hsm: HSM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pin").write_text(f"{PIN}\n")
    (tmp_path / "link.so").symlink_to(SOFTHSM)
    module = f"module-path={SOFTHSM}"
    by_file = f"{module}&pin-source=file:{tmp_path}/pin"
    keys = open_keys(f"pkcs11:token=kk?{by_file}")
    public = keys.create("by uri").public_key()
    id = "".join(f"%{byte:02X}" for byte in bytes.fromhex(subject_key_id(public)))
    import pkcs11 as library

    token = library.lib(SOFTHSM).get_token(token_label="kk")
    whole = f"model=SoftHSM%20v2;manufacturer=SoftHSM%20project;serial={token.serial.decode()};token=kk"
    monkeypatch.setenv("KAKUNIN_PKCS11_PIN", PIN)
    for uri in (
        f"pkcs11:token=kk;object=by%20uri?{by_file}",
        f"pkcs11:token=kk;object=by%20uri?{module}&pin-source=file://{tmp_path}/pin",
        f"pkcs11:token=kk;id={id}?{module}&pin-value={PIN.replace('-', '%2D')}",
        f"pkcs11:{whole};id={id};object=by%20uri;type=private?{module}",
        f"pkcs11:token=kk;id={id}?module-path={tmp_path}/link.so",
    ):
        signer = open_signer(uri)
        assert signer.public_key() == public
        verify(public, signer.sign(DIGEST))
    monkeypatch.setenv("KAKUNIN_PKCS11_PIN", "wrong")
    assert open_keys(f"pkcs11:{whole}?{by_file}").open(public).public_key() == public  # the URI's is stronger
    assert open_signer(f"pkcs11:token=kk;id={id}?{module}&pin-value={PIN}").public_key() == public
    with pytest.raises(BadInputError, match="and not both"):
        open_keys(f"pkcs11:token=kk?{by_file}&pin-value={PIN}")
    with pytest.raises(SignerError, match="refuses the PIN"):
        open_keys(f"pkcs11:token=kk?{module}")
    with pytest.raises(SignerError, match="no PKCS #11 tokens with label 'kk', model 'other'"):
        open_keys(f"pkcs11:token=kk;model=other?{by_file}")
    monkeypatch.delenv("KAKUNIN_PKCS11_PIN")
    with pytest.raises(BadInputError, match="needs a PIN"):
        open_keys(f"pkcs11:token=kk?{module}")
    with pytest.raises(BadInputError, match="cannot be read from /none"):
        open_keys(f"pkcs11:token=kk?{module}&pin-source=file:/none")


# No one can be a signer, and no one a store.
BAD_URIS = [
    "", "x", "alias/x", "https://kms.example", "kms:alias/x", f"postgres://u:{SECRET}@h", "FILE:/x",
    "file:", "file://host/x.pem", "file:/x?password=" + SECRET, f"file:/x#{SECRET}",
    "awskms:a b", "awskms:a;b", f"awskms:alias/x?password={SECRET}", "awskms:alias/x?region=",
    "awskms:alias/x?region", "awskms:alias/x?region=a&region=b", f"awskms:?endpoint=http://u:{SECRET}@host",
    "awskms:alias/x?endpoint=file:///x", "awskms:alias/x?endpoint=x", f"awskms:alias/x?endpoint={SECRET}",
    "pkcs11:", "pkcs11:token=kk", "pkcs11:object=x?module-path=/m.so", "pkcs11:token=kk;object=x",
    f"pkcs11:token=kk;object=x?pin-value={SECRET}", f"pkcs11:token=kk;pin-value={SECRET}?module-path=/m.so",
    f"pkcs11:token=kk;object=x?module-path=/m.so&pin-value={SECRET}&pin-source=file:/x",
    f"pkcs11:token=kk;object=x?module-path=/m.so&pin={SECRET}",
    f"pkcs11:token=kk;object=x?module-path=/m.so&pin-value={SECRET}&pin-value={SECRET}",
    f"pkcs11:token=kk;object=x?module-path=/m.so&{SECRET}",
    f"pkcs11:token=kk;object=x?module-path=/m.so&pin-source={SECRET}",
    f"pkcs11:token=kk;slot-id=1;object=x?module-path=/m.so&pin-value={SECRET}",
    f"pkcs11:token=kk;object=x;type=public?module-path=/m.so&pin-value={SECRET}",
]  # fmt: skip


@pytest.mark.parametrize("uri", BAD_URIS)
@pytest.mark.parametrize("opened", [open_signer, open_keys])
def test_another_uri_is_refused_and_no_secret_quoted(opened: Callable[..., Any], uri: str) -> None:
    with pytest.raises(BadInputError) as caught:
        opened(uri, password=b"p")
    assert SECRET not in chain(caught.value)


@pytest.mark.parametrize("uri", ["", "kms:x", "pkcs11:token=kk;pin=x", "awskms:alias/x?x=y"])
def test_the_hint_lists_the_forms(uri: str) -> None:
    for opened, form in ((open_signer, "awskms:<key id, ARN or alias/...>"), (open_keys, "awskms:?region=")):
        with pytest.raises(BadInputError) as caught:
            opened(uri)
        for scheme in ("file:/path", form, "pkcs11:token=...", "KAKUNIN_KEY_PASSWORD", "KAKUNIN_PKCS11_PIN"):
            assert scheme in (caught.value.hint or "")


def test_a_signer_is_no_store_and_a_store_no_signer() -> None:
    module = f"?module-path={SOFTHSM or '/m.so'}&pin-value={PIN}"
    for opened, uri in (
        (open_signer, "awskms:"),
        (open_signer, "awskms:?region=eu-west-1"),
        (open_signer, "awskms:alias/x?prefix=kakunin"),
        (open_signer, f"pkcs11:token=kk{module}"),
        (open_keys, "awskms:alias/x"),
        (open_keys, f"pkcs11:token=kk;object=x{module}"),
        (open_keys, f"pkcs11:token=kk;id=%01{module}"),
    ):
        with pytest.raises(BadInputError):
            opened(uri)
