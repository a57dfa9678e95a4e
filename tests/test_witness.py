"""Witnesses: a file, S3 with Object Lock (moto), and a real Postgres."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import io
import json
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
from botocore import exceptions, loaders
from conftest import Database
from kms import dripping
from moto import mock_aws

from kakunin_db import LocalSigner
from kakunin_db.errors import BadInputError, LedgerIntegrityError
from kakunin_db.ledger import (
    FileWitness,
    PostgresWitness,
    S3Witness,
    TreeHead,
    Witness,
    WitnessError,
    WitnessUnavailableError,
    open_witness,
    witness_sql,
)
from kakunin_db.ledger import witness as module

ONE, TWO = uuid.UUID(int=1), uuid.UUID(int=2)
SECRET = "s3cret-password"


def head(
    size: int, installation: uuid.UUID = ONE, *, timestamp: int | None = None, root: bytes = b""
) -> TreeHead:
    """Nothing here verifies one, so the signature may be any."""
    return TreeHead(
        installation,
        size,
        1_700_000_000_000 + size if timestamp is None else timestamp,
        (root or hashlib.sha256(b"%d" % size).digest()).ljust(32, b"\0"),
        "9F:02",
        bytes(256),
    )


def keeps_heads(witness: Witness) -> None:
    """What every witness does."""
    assert list(witness.heads(ONE)) == []
    heads = [head(5), head(5, timestamp=1_800_000_000_000), head(40), head(100), head(2**40)]
    for one in heads:
        witness.publish(one)
        witness.publish(one)  # again, as after a crash
    witness.publish(head(7, TWO))
    assert list(witness.heads(ONE)) == heads
    for beyond in (0, 4, 5, 39, 40, 2**40):
        assert list(witness.heads(ONE, beyond)) == [one for one in heads if one.tree_size > beyond]
    assert list(witness.heads(TWO)) == [head(7, TWO)]
    assert list(witness.heads(uuid.UUID(int=3))) == []


# URIs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "heads.jsonl",
        "file:",
        "file://host/path",
        "file:/path?x",
        "https://example.org",
        "s3:bucket",
        "s3://",
        "s3://B_cket/x",
        "s3://bucket/x#y",
        "s3://bucket/x?retain_days=0",
        "s3://bucket/x?retain_days=-1",
        "s3://bucket/x?retain_days=99999",
        "s3://bucket/x?retain=1",
        "s3://bucket/x?region=",
        "s3://bucket/x?region=a&region=b",
        "s3://bucket/x?endpoint=ftp://host",
        f"s3://bucket/x?endpoint=https://user:{SECRET}@host",
        f"postgresql:host=x password={SECRET} nonsense",
        f"postgresql:host=x pass={SECRET}",
        f"postgresql://user:{SECRET}@host/name?sslmod=require",
        f"postgresql://user:{SECRET}@[host/name",
        f"mysql://user:{SECRET}@host/name",
    ],
)
def test_uris_that_are_none(uri: str) -> None:
    with pytest.raises(BadInputError) as caught:
        open_witness(uri)
    error: BaseException | None = caught.value
    while error is not None:  # what a traceback would show
        assert SECRET not in str(error)
        error = None if error.__suppress_context__ and error.__cause__ is None else error.__cause__
    assert SECRET not in (caught.value.hint or "")


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_witness(f"file:{tmp_path}/a%20b"), FileWitness)
    assert isinstance(open_witness(f"file://{tmp_path}/a"), FileWitness)
    for uri in (
        f"postgresql://user:{SECRET}@host:1/name",
        f"postgres://user:{SECRET}@host:1/name",
        f"postgresql:host=host port=1 dbname=name user=user password={SECRET}",
    ):
        witness = open_witness(uri)
        assert isinstance(witness, PostgresWitness)
        assert repr(witness) == "<PostgresWitness host=host port=1 dbname=name>"
    made: list[Any] = []
    monkeypatch.setattr(module, "_new_client", lambda *given: made.append(given))
    uri = "s3://bucket/some/pre%20fix/?region=eu-west-1&endpoint=http%3A//h:9000&retain_days=7"
    bucket = open_witness(uri)
    assert isinstance(bucket, S3Witness)
    assert made == [("eu-west-1", "http://h:9000")]
    assert repr(bucket) == "<S3Witness bucket/some/pre fix/>"


# A file -----------------------------------------------------------------------------------------------


def test_a_file_keeps_heads(tmp_path: Path) -> None:
    path = tmp_path / "heads.jsonl"
    keeps_heads(open_witness(f"file:{path}"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~_umask()
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["tree_size"] for line in lines] == [5, 5, 40, 100, 2**40, 7]


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_a_file_a_crash_has_cut(tmp_path: Path) -> None:
    path = tmp_path / "heads"
    witness = FileWitness(path)
    witness.publish(head(1))
    good = path.read_bytes()
    for cut in range(1, len(good)):
        path.write_bytes(good + good[:cut])
        # All but the line feed is a whole head.
        assert len(list(witness.heads(ONE))) == (2 if cut == len(good) - 1 else 1)
        witness.publish(head(2))
        assert path.read_bytes() == good + good[:cut] + b"\n" + _line(head(2))
        assert list(witness.heads(ONE))[-1] == head(2)


def _line(one: TreeHead) -> bytes:
    return json.dumps(one.to_json(), separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "line", [b"{}\n", b'{"kakunin":"tree_head/1"}\n', b"\xff}\n", b"x" * 10_000 + b"}\n"], ids=range(4)
)
def test_a_file_with_something_else(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "heads"
    path.write_bytes(_line(head(1)) + line)
    with pytest.raises(LedgerIntegrityError, match="line . of the witness"):
        list(FileWitness(path).heads(ONE))


def test_a_file_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    """What others have added is seen. What is asked for again is read again, and so is a file put back."""
    path = tmp_path / "heads"
    witness, other = FileWitness(path), FileWitness(path)
    heads = [head(5), head(40), head(7, TWO)]
    for one in heads:
        other.publish(one)
    assert list(witness.heads(ONE, 5)) == [head(40)]
    other.publish(head(30))
    other.publish(head(50))
    with path.open("ab") as file:
        file.write(_line(head(60))[:-20])  # being written
    assert list(witness.heads(ONE, 40)) == [head(50)]
    with path.open("ab") as file:
        file.write(_line(head(60))[-20:])
    assert list(witness.heads(ONE, 50)) == [head(60)]
    assert list(witness.heads(ONE)) == [head(5), head(40), head(30), head(50), head(60)]
    assert list(witness.heads(TWO, 6)) == [head(7, TWO)]
    path.write_bytes(_line(head(100)))
    assert list(witness.heads(ONE, 60)) == [head(100)]


def test_a_file_that_cannot_be(tmp_path: Path) -> None:
    witness = FileWitness(tmp_path / "no" / "such" / "folder")
    with pytest.raises(WitnessError, match="cannot be written: No such file"):
        witness.publish(head(1))
    assert list(witness.heads(ONE)) == []
    with pytest.raises(WitnessError, match="cannot be read: Is a directory"):
        list(FileWitness(tmp_path).heads(ONE))


def test_a_file_of_several_writers(tmp_path: Path) -> None:
    witness = FileWitness(tmp_path / "heads")

    def write(start: int) -> None:
        for size in range(start, start + 20):
            witness.publish(head(size))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(0, 100, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(h.tree_size for h in witness.heads(ONE)) == list(range(100))


# S3 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> Iterator[None]:
    """What boto3 knows of S3 is read once, and not by each session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "create_loader", functools.cache(loaders.create_loader))
        yield


@pytest.fixture
def s3(models: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", SECRET)]:
        monkeypatch.setenv(name, value)
    with mock_aws():
        client = boto3.session.Session().client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        client.create_bucket(Bucket="plain")
        yield client


def locked() -> Witness:
    return open_witness("s3://locked/heads?region=us-east-1&retain_days=30")


def test_a_bucket_keeps_heads(s3: Any) -> None:
    keeps_heads(locked())
    versions = s3.list_object_versions(Bucket="locked")["Versions"]
    assert len(versions) == 6
    assert versions[0]["Key"] == f"heads/{ONE}/{5:020}-1700000000005.json"


def test_a_bucket_without_a_prefix(s3: Any) -> None:
    keeps_heads(open_witness("s3://locked?region=us-east-1"))
    assert s3.list_object_versions(Bucket="locked")["Versions"][0]["Key"].startswith(f"{ONE}/")


def test_an_object_is_locked(s3: Any) -> None:
    before = dt.datetime.now(dt.timezone.utc)
    locked().publish(head(5))
    (version,) = s3.list_object_versions(Bucket="locked")["Versions"]
    which = {"Bucket": "locked", "Key": version["Key"], "VersionId": version["VersionId"]}
    held = s3.head_object(**which)
    assert held["ObjectLockMode"] == "COMPLIANCE"
    kept = held["ObjectLockRetainUntilDate"] - before
    assert dt.timedelta(days=30, seconds=-1) <= kept <= dt.timedelta(days=30, minutes=5)
    with pytest.raises(exceptions.ClientError, match="AccessDenied"):
        s3.delete_object(**which)


def test_what_was_put_over_a_head_or_hides_it_is_seen(s3: Any) -> None:
    witness = locked()
    witness.publish(head(5))
    (version,) = s3.list_object_versions(Bucket="locked")["Versions"]
    s3.delete_object(Bucket="locked", Key=version["Key"])  # makes a delete marker
    assert "Contents" not in s3.list_objects_v2(Bucket="locked")
    assert list(witness.heads(ONE)) == [head(5)]
    witness.publish(head(5))
    other = head(5, root=b"another")
    s3.put_object(Bucket="locked", Key=version["Key"], Body=_line(other))
    assert set(witness.heads(ONE)) == {head(5), other}


def test_no_head_is_put_over_another(s3: Any) -> None:
    witness = locked()
    witness.publish(head(5))
    with pytest.raises(LedgerIntegrityError, match="the witness has another tree head"):
        witness.publish(head(5, root=b"another"))
    assert list(witness.heads(ONE)) == [head(5)]


def test_many_heads_are_listed_in_pages(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")  # a page; S3's has a thousand
    for size in range(25):
        one = head(size)
        key = f"heads/{ONE}/{size:020}-{one.timestamp}.json"
        s3.put_object(Bucket="locked", Key=key, Body=_line(one))
    page = s3.list_object_versions(Bucket="locked")
    assert (len(page["Versions"]), page["IsTruncated"]) == (10, True)
    assert [h.tree_size for h in locked().heads(ONE)] == list(range(25))
    client = Client(s3)
    witness = S3Witness("locked", "heads", client=client)
    for listings in (3, 1):  # the second time from the last one on that was passed over
        assert [h.tree_size for h in witness.heads(ONE, 22)] == [23, 24]
        assert [name for name, _ in client.calls].count("list_object_versions") == listings
        client.calls.clear()
    witness.publish(head(24, timestamp=1))
    witness.publish(head(1000))
    assert [h.tree_size for h in witness.heads(ONE, 23)] == [24, 24, 1000]
    assert [h.tree_size for h in witness.heads(ONE)] == [*range(25), 24, 1000]


def test_other_objects_in_the_bucket(s3: Any) -> None:
    s3.put_object(Bucket="locked", Key=f"heads/{ONE}/readme.txt", Body=b"hello")
    assert list(locked().heads(ONE)) == []
    s3.put_object(Bucket="locked", Key=f"heads/{ONE}/{5:020}-1.json", Body=b"hello")
    with pytest.raises(LedgerIntegrityError, match="in the witness locked: it is not JSON"):
        list(locked().heads(ONE))


def test_buckets_that_are_not_there_or_not_locked(s3: Any) -> None:
    nowhere = open_witness("s3://nowhere/x?region=us-east-1")
    for use in (lambda: nowhere.publish(head(1)), lambda: list(nowhere.heads(ONE))):
        with pytest.raises(WitnessError, match="NoSuchBucket") as caught:
            use()
        assert caught.value.hint == "Check the bucket's name, and the account and region it is in."
    with pytest.raises(WitnessError, match="S3 refuses s3:PutObject for plain"):
        open_witness("s3://plain/x?region=us-east-1").publish(head(1))


class Client:
    """A client of boto3 whose answers a test sets, an exception or a function of the arguments for each
    call."""

    def __init__(self, real: Any, **answers: Any) -> None:
        self.real, self.answers, self.meta = real, answers, real.meta
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            self.calls.append((name, arguments))
            answer = self.answers.get(name)
            if isinstance(answer, list):
                answer = answer.pop(0) if answer else None
            if isinstance(answer, Exception):
                raise answer
            return answer(arguments) if answer else getattr(self.real, name)(**arguments)

        return call


def refusal(code: str, status: int, message: str = SECRET) -> exceptions.ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": message},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return exceptions.ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refusal("SlowDown", 503), WitnessUnavailableError, "(?m)SlowDown$"),
        (refusal("InternalError", 500), WitnessUnavailableError, "(?m)InternalError$"),
        (refusal("ConditionalRequestConflict", 409), WitnessUnavailableError, "(?m)Conflict$"),
        (refusal("SignatureDoesNotMatch", 403), WitnessError, "(?m)SignatureDoesNotMatch$"),
        (refusal("AccessDenied", 403, "no s3:PutObject"), WitnessError, "(?m)AccessDenied: no s3:PutObject$"),
        (exceptions.NoCredentialsError(), WitnessError, r"(?m)\(NoCredentialsError\)$"),
        (exceptions.EndpointConnectionError(endpoint_url="http://h"), WitnessUnavailableError, "http://h"),
        (exceptions.ReadTimeoutError(endpoint_url="http://h"), WitnessUnavailableError, "did not answer"),
        (exceptions.SSLError(endpoint_url="http://h", error="x"), WitnessError, "cannot be trusted"),
        (ValueError("x"), WitnessError, "does not speak as S3"),
    ],
    ids=range(10),
)
def test_what_s3_may_answer(s3: Any, error: Exception, kind: type[Exception], message: str) -> None:
    witness = S3Witness("locked", client=Client(s3, put_object=error))
    with pytest.raises(WitnessError, match=message) as caught:
        witness.publish(head(1))
    assert type(caught.value) is kind
    assert caught.value.hint
    assert SECRET not in str(caught.value)


def test_a_server_without_conditional_writes(s3: Any) -> None:
    client = Client(s3, put_object=[refusal("NotImplemented", 501)])
    witness = S3Witness("locked", client=client)
    witness.publish(head(1))
    puts = [arguments for name, arguments in client.calls if name == "put_object"]
    assert ["IfNoneMatch" in arguments for arguments in puts] == [True, False]
    client.answers["put_object"] = [refusal("NotImplemented", 501)]
    with pytest.raises(LedgerIntegrityError, match="another tree head"):
        witness.publish(head(1, root=b"another"))
    assert list(witness.heads(ONE)) == [head(1)]


def test_an_answer_that_breaks_off(s3: Any) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise exceptions.ResponseStreamingError(error="x")

    witness = S3Witness("locked", client=Client(s3, get_object=lambda _: {"Body": Broken()}))
    witness.publish(head(1))
    with pytest.raises(WitnessUnavailableError, match="to the end"):
        list(witness.heads(ONE))


@pytest.mark.parametrize(
    ("before", "piece"),
    [(b"", b"H"), (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ")],
    ids=["status line", "body"],
)
def test_an_answer_by_drops_is_waited_for_no_longer_than_the_deadline(
    s3: Any, before: bytes, piece: bytes
) -> None:
    with dripping(before, piece) as (url, over, _):
        witness = S3Witness("locked", endpoint_url=url, deadline=0.5)
        for call in (lambda: witness.publish(head(1)), lambda: list(witness.heads(ONE))):
            began = time.monotonic()
            with pytest.raises(WitnessUnavailableError, match="no whole answer within 0.5 s"):
                call()
            assert 0.5 <= time.monotonic() - began < 2
        over.set()


def test_a_body_by_drops_is_waited_for_no_longer_than_the_deadline(s3: Any) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(1)
            return b"{}"

    witness = S3Witness("locked", client=Client(s3, get_object=lambda _: {"Body": Slow()}), deadline=0.3)
    witness.publish(head(1))
    with pytest.raises(WitnessUnavailableError, match=r"GetObject for locked: no whole answer within 0\.3 s"):
        list(witness.heads(ONE))


def test_a_client_has_time_limits(s3: Any) -> None:
    config = locked()._client.meta.config
    assert (config.connect_timeout, config.read_timeout) == (5, 5)
    assert config.retries["total_max_attempts"] == 4
    with pytest.raises(BadInputError, match="endpoint or region of S3"):
        open_witness("s3://locked?region=not%20one&endpoint=http://x y")


def test_boto3_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(WitnessError, match="needs boto3") as caught:
        locked()
    assert caught.value.hint == "pip install 'kakunin-db[aws]'"


# A database -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(database: Database) -> Database:
    with database.connect("installer", autocommit=True) as installer:
        installer.execute(witness_sql())
        installer.execute("grant usage on schema kakunin_witness to app")
        installer.execute("grant select, insert on kakunin_witness.tree_heads to app")
    return database


def test_a_database_keeps_heads(tables: Database) -> None:
    keeps_heads(open_witness("postgresql:" + tables.dsn("app")))


def test_a_database_keeps_no_other_head(tables: Database) -> None:
    witness = PostgresWitness(tables.dsn("app"))
    installation = uuid.uuid4()
    witness.publish(head(5, installation))
    with pytest.raises(LedgerIntegrityError, match="another tree head"):
        witness.publish(head(5, installation, root=b"another"))
    assert list(witness.heads(installation)) == [head(5, installation)]


def test_many_heads_are_read_in_pages(tables: Database) -> None:
    installation = uuid.uuid4()
    with tables.connect("app", autocommit=True) as app:
        app.execute(
            "insert into kakunin_witness.tree_heads"
            ' (installation, tree_size, "timestamp", root, key_id, signature)'
            " select %s, n / 2, n, %s, '9F:02', %s from generate_series(0, 2499) n",
            (installation, bytes(32), bytes(256)),
        )
    found = [(h.tree_size, h.timestamp) for h in PostgresWitness(tables.dsn("app")).heads(installation)]
    assert found == [(n // 2, n) for n in range(2500)]


@pytest.mark.parametrize("user", ["app", "installer"])
@pytest.mark.parametrize(
    "statement",
    [
        "update kakunin_witness.tree_heads set root = root",
        "update kakunin_witness.tree_heads set root = root where false",
        "delete from kakunin_witness.tree_heads",
        "truncate kakunin_witness.tree_heads",
    ],
    ids=["update", "update of none", "delete", "truncate"],
)
def test_a_witness_forgets_nothing(tables: Database, user: str, statement: str) -> None:
    with tables.connect(user) as connection, pytest.raises(psycopg.Error) as caught:
        connection.execute(statement)
    assert caught.value.sqlstate == ("KA006" if user == "installer" else "42501")


def test_not_even_as_a_replica(tables: Database) -> None:
    with tables.cluster.connect(tables.name) as admin:
        admin.execute("set session_replication_role = replica")
        with pytest.raises(psycopg.Error, match="a witness forgets nothing"):
            admin.execute("delete from kakunin_witness.tree_heads")


def test_a_database_that_is_not_prepared(tables: Database) -> None:
    witness = PostgresWitness(tables.cluster.dsn("postgres", "app"))
    for use in (lambda: witness.publish(head(1)), lambda: list(witness.heads(ONE))):
        with pytest.raises(WitnessError, match=r"has no table kakunin_witness.tree_heads") as caught:
            use()
        assert "witness_sql()" in (caught.value.hint or "")


def test_a_login_that_may_not(tables: Database) -> None:
    with pytest.raises(WitnessError, match="permission denied") as caught:
        PostgresWitness(tables.dsn("stranger")).publish(head(1))
    assert type(caught.value) is WitnessError


def test_a_database_that_does_not_answer(tables: Database) -> None:
    dsn = tables.dsn("app") + f" password={SECRET}"
    for wrong in ("port=1", "dbname=nowhere"):
        with pytest.raises(WitnessUnavailableError, match="did not answer") as caught:
            PostgresWitness(f"{dsn} {wrong}").publish(head(1))
        assert SECRET not in str(caught.value)


def test_a_lock_does_not_hold_it_for_ever(tables: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.1)
    with tables.connect("installer") as installer:
        installer.execute("lock table kakunin_witness.tree_heads")
        witness = PostgresWitness(tables.dsn("app") + " connect_timeout=5")
        with pytest.raises(WitnessUnavailableError, match="statement timeout"):
            witness.publish(head(123456))


def test_heads_of_a_real_signer_come_back_as_they_were(tables: Database, tmp_path: Path) -> None:
    signer, installation = LocalSigner.generate(), uuid.uuid4()
    root = hashlib.sha256(b"x").digest()
    signature = signer.sign(hashlib.sha256(TreeHead.bytes_to_sign(3, 4, root)).digest())
    one = TreeHead(installation, 3, 4, root, ":".join(["AB"] * 20), signature)
    for witness in (PostgresWitness(tables.dsn("app")), FileWitness(tmp_path / "heads")):
        witness.publish(one)
        assert list(witness.heads(installation)) == [one]
