"""Witnesses: where tree heads are kept out of reach of whoever owns the database.

A signed tree head proves what the ledger was; a witness that shows it later proves that nothing was taken off
the ledger's end since, and that no other ledger was shown to somebody else. What a witness returns is signed,
so it is not trusted for more than having kept it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from ..aws import InTime, check_time
from ..errors import BadInputError, KakuninError, LedgerIntegrityError
from ..logs import counted
from .heads import MAX_INTEGER, TreeHead

_FORMS = (
    "file:/path/heads.jsonl, s3://bucket/prefix?region=...&endpoint=...&retain_days=365, or a database:"
    " postgresql://user@host/name, or postgresql: with a libpq connection string after it"
)
# Seconds for connecting, and for each answer; requests to S3 are sent this often. As the keys in AWS KMS have
# it.
_TIMEOUT = 5.0
_ATTEMPTS = 4
# And seconds for all of a request to S3, with the pauses of botocore's standard mode and the answer's body.
_DEADLINE = 30.0
_in_time = InTime()
# Of a tree head's text, some 1000 bytes with the largest signature.
_MAX_HEAD = 4096
# Of S3's codes, those whose message says more than their name, and nothing secret.
_TELLING = {"AccessDenied", "InvalidRequest", "NoSuchBucket", "ObjectLockConfigurationNotFoundError"}
_LATER = {"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown", "Throttling"}


class WitnessError(KakuninError):
    """A witness refuses, or is not there. No SQLSTATE."""


class WitnessUnavailableError(WitnessError):
    """A witness does not answer now. Try again later."""


class Witness(Protocol):
    """Where tree heads are kept."""

    def publish(self, head: TreeHead) -> None:
        """Keeps a tree head. One that is there already is not kept twice.

        :raises WitnessError: it cannot; WitnessUnavailableError where trying again later may help.
        :raises LedgerIntegrityError: another head of this size and time is there.
        """
        ...

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        """The tree heads of an installation that were kept and are over more than ``beyond`` entries, oldest
        first. Nothing about them is verified.

        :raises WitnessError: as above.
        :raises LedgerIntegrityError: what was kept is no tree head.
        """
        ...


def open_witness(uri: str) -> Witness:
    """The witness a URI names: a file, a bucket of S3 or a database. Raises BadInputError for another URI.

    What a URI may hold in secret is never quoted.
    """
    scheme, colon, rest = uri.partition(":")
    if colon and scheme == "file":
        path = rest.removeprefix("//") if rest.startswith("///") else rest
        if not path or path.startswith("//") or "?" in path or "#" in path:
            raise BadInputError("a file: URI is a path, with ? as %3F and # as %23", f"Give {_FORMS}.")
        return FileWitness(unquote(path))
    if colon and scheme == "s3":
        return _open_s3(rest)
    if colon and scheme in ("postgresql", "postgres"):
        return PostgresWitness(uri if rest.startswith("//") else rest)
    raise BadInputError("this is not the URI of a witness", f"Give {_FORMS}.")


def _conflict(head: TreeHead) -> LedgerIntegrityError:
    return LedgerIntegrityError(
        f"the witness has another tree head of {head.installation} over {counted(head.tree_size)} of the same"
        " time",
        "Compare both: one of them is not of this ledger, or the ledger was rewritten.",
    )


# A file ---------------------------------------------------------------------------------------------


class FileWitness:
    """A file with one ``tree_head/1`` object a line, which only grows. For a volume that is mounted from
    elsewhere.

    A line that a crash cut short is completed by a line feed and passed over.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        # Of each installation, how many bytes and lines need not be read again, and the largest tree in them.
        self._passed: dict[uuid.UUID, tuple[int, int, int]] = {}

    def publish(self, head: TreeHead) -> None:
        line = json.dumps(head.to_json(), separators=(",", ":")).encode() + b"\n"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            created = not self._path.exists()
            with open(os.open(self._path, flags, 0o644), "rb+", 0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._append(file, line)
                # Also where it was there already: a crash may have come between.
                os.fsync(file.fileno())
            if created:
                folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as error:
            raise self._wrong(error, "written") from error

    @staticmethod
    def _append(file: FileIO, line: bytes) -> None:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - len(line) - 1))
        last = file.read(len(line) + 1)
        if last == line or last.endswith(b"\n" + line):
            return
        if last and not last.endswith(b"\n"):
            line = b"\n" + line
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, "the disk is full")

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        at, number, most = self._passed.get(installation, (0, 0, -1))
        try:
            with self._path.open("rb") as file:
                if most > beyond or at > file.seek(0, os.SEEK_END):
                    at, number, most = 0, 0, -1
                file.seek(at)
                last = b"\n"
                while line := file.readline(_MAX_HEAD):
                    at, number, last = at + len(line), number + 1, line
                    # The last character of an object: without it a crash has cut the line short.
                    if not line.rstrip(b"\n").endswith(b"}"):
                        continue
                    head = self._parse(line, number)
                    if head.installation == installation:
                        most = max(most, head.tree_size)
                        if head.tree_size > beyond:
                            yield head
                if not last.endswith(b"\n"):  # somebody writes it
                    at, number = at - len(last), number - 1
                self._passed[installation] = at, number, most
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._wrong(error, "read") from error

    def _parse(self, line: bytes, number: int) -> TreeHead:
        try:
            return TreeHead.from_json(line)
        except LedgerIntegrityError as error:
            raise LedgerIntegrityError(f"line {number} of the witness {self._path}: {error}") from error

    def _wrong(self, error: OSError, what: str) -> WitnessError:
        return WitnessError(
            f"the witness {self._path} cannot be {what}: {error.strerror}",
            "Check the path and the file's owner.",
        )

    def __repr__(self) -> str:
        return f"<FileWitness {self._path}>"


# S3 -------------------------------------------------------------------------------------------------


def _open_s3(rest: str) -> S3Witness:
    parts = urlsplit("s3:" + rest)
    options: dict[str, str] = {}
    for part in parts.query.split("&") if parts.query else []:
        name, equals, value = part.partition("=")
        if name not in ("region", "endpoint", "retain_days") or not equals or not value or name in options:
            raise BadInputError(
                "the URI of a bucket has region=, endpoint= and retain_days=, each once", f"Give {_FORMS}."
            )
        options[name] = unquote(value)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc) or parts.fragment:
        raise BadInputError("an s3: URI names a bucket", f"Give {_FORMS}.")
    days = options.get("retain_days", "365")
    if not re.fullmatch("[1-9][0-9]{0,4}", days) or int(days) > 36500:
        raise BadInputError("retain_days= is a number of days, 1 to 36500")
    endpoint = options.get("endpoint")
    if endpoint is not None:
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
            raise BadInputError("endpoint= is an http or https URL without a user")
    return S3Witness(
        parts.netloc,
        unquote(parts.path).strip("/"),
        region=options.get("region"),
        endpoint_url=endpoint,
        retain_days=int(days),
    )


def _new_client(region: str | None, endpoint_url: str | None) -> Any:
    try:
        import boto3  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.config import Config  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise WitnessError(
            "a witness in S3 needs boto3, which is not installed", "pip install 'kakunin-db[aws]'"
        ) from error
    config = Config(
        connect_timeout=_TIMEOUT,
        read_timeout=_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        # Other servers than Amazon's have no host name for each bucket.
        s3={"addressing_style": "path"} if endpoint_url else None,
    )
    region = region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "eu-west-1"
    try:
        # A session of its own: boto3's default one is not safe to use from several threads.
        client = boto3.session.Session().client(
            "s3", region_name=region, endpoint_url=endpoint_url, config=config
        )
    except ValueError as error:
        raise BadInputError("the endpoint or region of S3 is not one", "Check both.") from error
    except BotoCoreError as error:
        raise WitnessError(
            f"no client of S3 can be made ({type(error).__name__})", "Check the AWS configuration."
        ) from error
    client.meta.events.register("before-send.s3", check_time)
    return client


class S3Witness:
    """A bucket with Object Lock: each tree head is an object that nobody can delete or change for
    ``retain_days``, not even the account's root user (compliance mode). The caller needs s3:PutObject,
    s3:PutObjectRetention, s3:GetObject, s3:GetObjectVersion and s3:ListBucketVersions. ``deadline`` is in
    seconds, for a request in all.

    All versions are read: a delete marker, or another object put over one, hides nothing.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        retain_days: int = 365,
        client: Any = None,
        deadline: float = _DEADLINE,
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix + "/" if prefix else ""
        self._retention = dt.timedelta(days=retain_days)
        self._client = client or _new_client(region, endpoint_url)
        self._deadline = deadline
        # Of each folder, the keys that were listed last, from the newest that was asked to be passed over.
        self._listed: dict[str, list[tuple[int, str]]] = {}

    def _folder(self, installation: uuid.UUID) -> str:
        return f"{self._prefix}{installation}/"

    def publish(self, head: TreeHead) -> None:
        key = f"{self._folder(head.installation)}{head.tree_size:020}-{head.timestamp}.json"
        request = {
            "Bucket": self._bucket,
            "Key": key,
            "Body": json.dumps(head.to_json(), separators=(",", ":")).encode(),
            "ContentType": "application/json",
            # Object Lock wants a checksum.
            "ChecksumAlgorithm": "SHA256",
            "ObjectLockMode": "COMPLIANCE",
            "ObjectLockRetainUntilDate": dt.datetime.now(dt.timezone.utc) + self._retention,
        }
        # Not every boto3 and not every server knows it. Without it a head that is there is looked for first;
        # two that publish at once then make two versions, which are both read.
        members = self._client.meta.service_model.operation_model("PutObject").input_shape.members
        if "IfNoneMatch" in members and self._put({**request, "IfNoneMatch": "*"}):
            return
        kept = list(self._versions(key))
        if not kept:
            self._call("PutObject", **request)
        elif head not in kept or len(set(kept)) > 1:
            raise _conflict(head)

    def _put(self, request: dict[str, Any]) -> bool:
        """Whether it was kept now; not where it is there already, or the server knows no conditions."""
        from botocore.exceptions import ClientError  # noqa: PLC0415

        try:
            self._call("PutObject", **request)
        except WitnessError as error:
            cause = error.__cause__
            code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
            if code in ("PreconditionFailed", "NotImplemented"):
                return False
            raise
        return True

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        yield from self._versions(self._folder(installation), beyond)

    def _versions(self, prefix: str, beyond: int = -1) -> Iterator[TreeHead]:
        name = re.compile(r"([0-9]{20})-[0-9]{1,19}\.json")
        # All keys are listed once, a thousand a request, and later from one on that is there: servers do not
        # agree on what another KeyMarker skips.
        passed = [key for key in self._listed.get(prefix, []) if key[0] <= beyond][-1:]
        marker = {"KeyMarker": passed[0][1]} if passed else {}
        listed: list[tuple[int, str]] = []
        while True:
            page = self._call("ListObjectVersions", Bucket=self._bucket, Prefix=prefix, **marker)
            for version in page.get("Versions", ()):
                found = name.fullmatch(version["Key"].rpartition("/")[2])
                if found and int(found[1]) > beyond:
                    listed.append((int(found[1]), version["Key"]))
                    yield self._get(version["Key"], version["VersionId"])
                elif found:
                    passed = [(int(found[1]), version["Key"])]
            if not page.get("IsTruncated"):
                if prefix.endswith("/"):  # and is not one key
                    self._listed[prefix] = passed + listed
                return
            marker = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def _get(self, key: str, version: str) -> TreeHead:
        which = {} if version == "null" else {"VersionId": version}
        answer = self._call("GetObject", Bucket=self._bucket, Key=key, **which)
        try:
            return TreeHead.from_json(answer["Body"])
        except LedgerIntegrityError as error:
            raise LedgerIntegrityError(f"{key} in the witness {self._bucket}: {error}") from error

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """One request; the body of its answer, where it has one, as far as a tree head goes."""
        from botocore import exceptions, parsers  # type: ignore[import-untyped]  # noqa: PLC0415

        method = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
        what = f"s3:{operation} for {self._bucket}"
        try:
            answer: dict[str, Any] = _in_time(
                lambda: self._whole(getattr(self._client, method)(**arguments), what), self._deadline
            )
        except exceptions.ClientError as error:
            raise self._refusal(error.response, what) from error
        except exceptions.SSLError as error:
            raise WitnessError(
                f"S3 cannot be trusted for {what}: {error}",
                "Check the endpoint and the certificates this machine trusts.",
            ) from error
        except (exceptions.ConnectionError, exceptions.HTTPClientError, TimeoutError) as error:
            raise WitnessUnavailableError(
                f"S3 did not answer {what}: {error}",
                "Try again; if it stays so, check the network and the endpoint.",
            ) from error
        except exceptions.BotoCoreError as error:
            raise WitnessError(
                f"S3 was not asked for {what} ({type(error).__name__})", "Give the process AWS credentials."
            ) from error
        except (parsers.ResponseParserError, AttributeError, TypeError, ValueError) as error:
            raise WitnessError(f"what answers {what} does not speak as S3", "Check the endpoint.") from error
        return answer

    @staticmethod
    def _whole(answer: dict[str, Any], what: str) -> dict[str, Any]:
        if (body := answer.get("Body")) is None:
            return answer
        try:
            with contextlib.closing(body):
                return {**answer, "Body": body.read(_MAX_HEAD)}
        except Exception as error:  # urllib3's, of many kinds
            raise WitnessUnavailableError(f"S3 did not answer {what} to the end", "Try again.") from error

    def _refusal(self, response: dict[str, Any], what: str) -> WitnessError:
        code = str(response.get("Error", {}).get("Code", ""))
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        said = f"{code}: {response['Error'].get('Message', '')}" if code in _TELLING else code
        message = f"S3 refuses {what}: {said}"
        if code in _LATER or status == 429 or (status >= 500 and code != "NotImplemented"):
            return WitnessUnavailableError(message, "Try again later.")
        hints = {
            "AccessDenied": "Grant s3:PutObject, s3:PutObjectRetention, s3:GetObject, s3:GetObjectVersion and"
            " s3:ListBucketVersions to the caller.",
            "InvalidRequest": "The bucket needs Object Lock:"
            " aws s3api create-bucket --object-lock-enabled-for-bucket",
            "NoSuchBucket": "Check the bucket's name, and the account and region it is in.",
        }
        return WitnessError(
            message, hints.get(code, "Check the bucket and the AWS credentials of this process.")
        )

    def __repr__(self) -> str:
        return f"<S3Witness {self._bucket}/{self._prefix}>"


# A database -----------------------------------------------------------------------------------------

_SQL = """\
-- For a witness of tree heads: run it once, as the owner of a database that is not the ledger's own.
-- Who publishes needs: grant usage on schema kakunin_witness to <role>;
--                      grant select, insert on kakunin_witness.tree_heads to <role>;
create schema kakunin_witness;

create table kakunin_witness.tree_heads (
  installation uuid not null,
  tree_size    bigint not null check (tree_size >= 0),
  "timestamp"  bigint not null check ("timestamp" >= 0),  -- milliseconds since 1970
  root         bytea not null check (octet_length(root) = 32),
  key_id       text not null,
  signature    bytea not null check (octet_length(signature) between 256 and 512),
  witnessed_at timestamptz not null default now(),
  primary key (installation, tree_size, "timestamp")
);
comment on table kakunin_witness.tree_heads is
  'Signed tree heads of kakunin-db ledgers. Rows are added and nothing else';

create function kakunin_witness.refuse_change() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'KA006',
    message = format('%s of %I.%I is refused: a witness forgets nothing',
      tg_op, tg_table_schema, tg_table_name);
end
$$;

create trigger append_only before update or delete or truncate on kakunin_witness.tree_heads
  for each statement execute function kakunin_witness.refuse_change();
-- ALWAYS: also with session_replication_role = replica.
alter table kakunin_witness.tree_heads enable always trigger append_only;
"""


def witness_sql() -> str:
    """The script that makes ``kakunin_witness.tree_heads`` in a witness's database, to be run once by its
    owner."""
    return _SQL


class PostgresWitness:
    """The table ``kakunin_witness.tree_heads`` of a database that :func:`witness_sql` has prepared.

    ``conninfo`` is a URI or connection string of libpq. A password is better kept in ~/.pgpass.

    :raises BadInputError: it is neither.
    """

    def __init__(self, conninfo: str) -> None:
        try:
            given = conninfo_to_dict(conninfo)
            limits = {"connect_timeout": int(_TIMEOUT), "tcp_user_timeout": int(_TIMEOUT * 1000)}
            own = {name: value for name, value in limits.items() if name not in given}
            self._conninfo = make_conninfo(conninfo, **own, application_name="kakunin-db witness")
        except psycopg.Error:
            # libpq quotes what it does not understand, and that may be the password.
            raise BadInputError("this is not a connection string of libpq", f"Give {_FORMS}.") from None
        self._name = " ".join(
            f"{name}={given[name]}" for name in ("host", "port", "dbname") if given.get(name)
        )

    @contextlib.contextmanager
    def _connect(self) -> Iterator[psycopg.Connection[Any]]:
        try:
            with psycopg.connect(self._conninfo, autocommit=True) as connection:
                # A setting and not an option of the connection, which poolers refuse.
                connection.execute(f"set statement_timeout = {int(_TIMEOUT * 1000)}")
                yield connection
        except psycopg.errors.UndefinedTable as error:
            raise WitnessError(
                f"the database {self._name} has no table kakunin_witness.tree_heads",
                "Run the script of kakunin_db.ledger.witness_sql() there.",
            ) from error
        except psycopg.OperationalError as error:
            raise WitnessUnavailableError(
                f"the witness {self._name} did not answer: {error}", "Check its address, and try again."
            ) from error
        except psycopg.Error as error:
            raise WitnessError(
                f"the witness {self._name} refuses: {error}", "Check the role's rights."
            ) from error

    def publish(self, head: TreeHead) -> None:
        key = (head.installation, head.tree_size, head.timestamp)
        with self._connect() as connection:
            connection.execute(
                "insert into kakunin_witness.tree_heads"
                ' (installation, tree_size, "timestamp", root, key_id, signature)'
                " values (%s, %s, %s, %s, %s, %s) on conflict do nothing",
                (*key, head.root, head.key_id, head.signature),
            )
            row = connection.execute(
                "select root, key_id, signature from kakunin_witness.tree_heads"
                ' where installation = %s and tree_size = %s and "timestamp" = %s',
                key,
            ).fetchone()
        if row != (head.root, head.key_id, head.signature):
            raise _conflict(head)

    def heads(self, installation: uuid.UUID, beyond: int = -1) -> Iterator[TreeHead]:
        with self._connect() as connection:
            after = (beyond, MAX_INTEGER)
            # In pages, so that a long list is neither held nor cut off by the time limit.
            while True:
                rows = connection.execute(
                    'select tree_size, "timestamp", root, key_id, signature from kakunin_witness.tree_heads'
                    ' where installation = %s and (tree_size, "timestamp") > (%s, %s)'
                    ' order by tree_size, "timestamp" limit 1000',
                    (installation, *after),
                ).fetchall()
                for row in rows:
                    yield TreeHead(installation, *row)
                if not rows:
                    return
                after = rows[-1][:2]

    def __repr__(self) -> str:
        return f"<PostgresWitness {self._name}>"
