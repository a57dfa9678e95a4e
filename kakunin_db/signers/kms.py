"""Keys in AWS KMS: they are made there, sign there and cannot leave it.

boto3 comes with the extra ``aws`` and is imported when a client is made.
"""

from __future__ import annotations

import functools
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa, utils

from ..aws import InTime, check_time
from ..errors import BadInputError, SignerError, SignerUnavailableError
from .base import (
    Signer,
    check_digest,
    check_ec_key,
    check_rsa_key,
    check_signature,
    joined,
    subject_key_id,
)

_MAKE_ONE = "Make one: aws kms create-key --key-spec {} --key-usage SIGN_VERIFY"

# A key that was just made is not known everywhere in KMS at once: seconds between attempts to use it.
_SETTLING = (0.2, 0.4, 0.8, 1.6, 3.2)

# Seconds for connecting, and for each piece of an answer; how often a request is sent; and seconds for all of
# it, with the pauses of botocore's standard mode.
_TIMEOUT = 3.0
_ATTEMPTS = 4
_DEADLINE = 30.0

# Codes whose message in KMS's answer is worth repeating. Others may quote the request with its session token.
_TELLING = {
    "AccessDeniedException",
    "DisabledException",
    "InvalidKeyUsageException",
    "KMSInvalidStateException",
    "LimitExceededException",
    "NotFoundException",
    "ValidationException",
}
# With a status of 4xx; those of KMS's own failures are 5xx.
_LATER = {
    "RequestLimitExceeded",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_CREDENTIALS = {
    "ExpiredTokenException",
    "IncompleteSignatureException",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationTokenException",
    "UnrecognizedClientException",
}

_in_time = InTime()

_Result = TypeVar("_Result")
_PublicKey = TypeVar("_PublicKey", rsa.RSAPublicKey, ec.EllipticCurvePublicKey)


def _region_of(key: str, region: str | None) -> str:
    named = re.match(r"arn:[^:]+:kms:([^:]+):", key)
    if named and region and region != named[1]:
        raise BadInputError(f"{key} is not in the region {region}", "Leave the region out: the ARN has it.")
    if named:
        return named[1]
    return region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "eu-west-1"


# The description of KMS is read once to a session, and takes a while and megabytes. Unlike clients, a session
# is not thread-safe.
_session_lock = threading.Lock()


@functools.cache
def _session(boto3: Any) -> Any:
    return boto3.session.Session()


def _new_client(region: str, endpoint_url: str | None, timeout: float, attempts: int) -> Any:
    try:
        import boto3  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.config import Config  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise SignerError(
            "keys in AWS KMS need boto3, which is not installed", "pip install 'kakunin-db[aws]'"
        ) from error
    config = Config(
        connect_timeout=timeout,
        read_timeout=timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    try:
        with _session_lock:
            client = _session(boto3).client(
                "kms", region_name=region, endpoint_url=endpoint_url, config=config
            )
    except ValueError as error:
        raise BadInputError("the endpoint or region of AWS KMS is not one", "Check both.") from error
    except BotoCoreError as error:
        raise SignerError(
            f"no client of AWS KMS can be made ({type(error).__name__})", "Check the AWS configuration."
        ) from error
    client.meta.events.register("before-send.kms", check_time)
    return client


def _call(client: Any, operation: str, key: str, deadline: float, **arguments: Any) -> dict[str, Any]:
    """One request, with ``operation`` as IAM calls it. Raises SignerError about ``key``."""
    from botocore import exceptions, parsers  # type: ignore[import-untyped]  # noqa: PLC0415

    method = re.sub(r"(?<!^)(?=[A-Z])", "_", operation).lower()
    try:
        answer: dict[str, Any] = _in_time(lambda: getattr(client, method)(**arguments), deadline)
    except exceptions.ClientError as error:
        raise _refusal(error.response, operation, key) from error
    except exceptions.SSLError as error:
        raise SignerError(
            f"AWS KMS cannot be trusted for kms:{operation} with {key}: {error}",
            "Check the endpoint and the certificates this machine trusts.",
        ) from error
    except (exceptions.ConnectionError, exceptions.HTTPClientError, TimeoutError) as error:
        raise SignerUnavailableError(
            f"AWS KMS did not answer kms:{operation} with {key}: {error}",
            "Try again; if it stays so, check the network and the endpoint.",
        ) from error
    except exceptions.BotoCoreError as error:
        raise SignerError(
            f"AWS KMS was not asked for kms:{operation} with {key} ({type(error).__name__})",
            f"Give the process AWS credentials that may kms:{operation}.",
        ) from error
    except (parsers.ResponseParserError, AttributeError, TypeError, ValueError) as error:
        raise _unreadable(operation, key) from error
    return answer


def _part(answer: dict[str, Any], name: str, operation: str, key: str) -> Any:
    # Of an answer that is no JSON botocore makes an empty one.
    if not answer.get(name):
        raise _unreadable(operation, key)
    return answer[name]


def _unreadable(operation: str, key: str) -> SignerError:
    return SignerError(
        f"what answers kms:{operation} with {key} does not speak as AWS KMS",
        "Check the endpoint and proxies.",
    )


def _refusal(response: dict[str, Any], operation: str, key: str) -> SignerError:
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{code}: {response['Error'].get('Message', '')}" if code in _TELLING else code
    message = f"AWS KMS refuses kms:{operation} with {key}: {said}"
    if code in _LATER or status == 429 or status >= 500:
        return SignerUnavailableError(message, "Try again later.")
    # These commands take the id of a key, and not an alias.
    target = f"<the id of the key of {key}>" if "alias/" in key else key
    hints = {
        "AccessDeniedException": f"Grant kms:{operation} on {key} to the caller, in IAM or the key's policy.",
        "DisabledException": f"Enable it: aws kms enable-key --key-id {target}",
        "KMSInvalidStateException": f"See its state: aws kms describe-key --key-id {key}; if it waits to be"
        f" deleted: aws kms cancel-key-deletion --key-id {target}",
        "NotFoundException": "Check the key's name, and the account and region it is in.",
        "InvalidKeyUsageException": _MAKE_ONE.format("RSA_2048"),
        "LimitExceededException": "Delete what is not needed, or ask AWS for a higher quota.",
    }
    if code in _CREDENTIALS:
        return SignerError(message, "Renew the AWS credentials of this process, and check its clock.")
    return SignerError(message, hints.get(code))


class _KMSKey(Generic[_PublicKey]):
    _SPECS: ClassVar[tuple[str, ...]]
    _ALGORITHM: ClassVar[str]

    def __init__(
        self,
        key: str,
        *,
        region: str | None = None,
        client: Any = None,
        endpoint_url: str | None = None,
        timeout: float = _TIMEOUT,
        attempts: int = _ATTEMPTS,
        deadline: float = _DEADLINE,
    ) -> None:
        if not key:
            raise BadInputError("a key in AWS KMS is named by its id, ARN or alias")
        if client is None:
            client = _new_client(_region_of(key, region), endpoint_url, timeout, attempts)
        self._set(client, key, deadline, _call(client, "GetPublicKey", key, deadline, KeyId=key))

    def _set(self, client: Any, key: str, deadline: float, answer: dict[str, Any]) -> None:
        self._client = client
        self._key = key
        self._deadline = deadline
        self._target: str = answer.get("KeyId") or key
        self._public_key: _PublicKey = self._usable(answer, key)

    @property
    def key_id(self) -> str:
        return self._key

    def public_key(self) -> _PublicKey:
        return self._public_key

    def sign(self, digest: bytes) -> bytes:
        check_digest(digest)
        answer = _call(
            self._client,
            "Sign",
            self._key,
            self._deadline,
            KeyId=self._key,
            Message=digest,
            MessageType="DIGEST",
            SigningAlgorithm=self._ALGORITHM,
        )
        signature: bytes = _part(answer, "Signature", "Sign", self._key)
        wrong = SignerError(
            f"the signature from AWS KMS is not by the key that {self._key} was, {self._target}:"
            f" {answer.get('KeyId')} made it",
            "Let the alias point to that key again, or certify the agent with the new one.",
        )
        return self._checked(signature, digest, wrong)

    def _usable(self, answer: dict[str, Any], key: str) -> _PublicKey:
        der: bytes = _part(answer, "PublicKey", "GetPublicKey", key)
        spec = _spec(answer)
        usage, algorithms = answer.get("KeyUsage"), answer.get("SigningAlgorithms") or []
        if spec not in self._SPECS or usage != "SIGN_VERIFY" or self._ALGORITHM not in algorithms:
            raise SignerError(
                f"{key} is a key {spec} for {usage}, and signatures are made by one of"
                f" {', '.join(self._SPECS)} for SIGN_VERIFY with {self._ALGORITHM}",
                _MAKE_ONE.format(self._SPECS[0]),
            )
        try:
            return self._read(der)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise SignerError(
                f"AWS KMS gave no usable public key for {key}: {error}", "Check the endpoint and proxies."
            ) from error

    def _read(self, der: bytes) -> _PublicKey:
        raise NotImplementedError

    def _checked(self, signature: bytes, digest: bytes, wrong: SignerError) -> bytes:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._key}>"


class KMSSigner(_KMSKey[rsa.RSAPublicKey]):
    """An RSA key in AWS KMS, given by id, ARN or alias.

    Its public key is asked for here, once, and pinned: every signature is verified against it before it is
    returned, so that an alias moved to another key is an error and not a signature nobody accepts.

    ``region`` is by default the ARN's, $AWS_REGION, or eu-west-1. ``timeout`` is in seconds, for connecting
    and for each piece of an answer; ``attempts`` is how often a request is sent when it is throttled or not
    answered; ``deadline`` is in seconds, for a call in all. A ``client`` of boto3 brings its own region,
    endpoint, timeouts and retries. The caller needs kms:GetPublicKey and kms:Sign.

    Raises SignerError when the key cannot sign, and of those SignerUnavailableError when it may later.
    """

    _SPECS = ("RSA_2048", "RSA_3072", "RSA_4096")
    _ALGORITHM = "RSASSA_PKCS1_V1_5_SHA_256"

    def _read(self, der: bytes) -> rsa.RSAPublicKey:
        key = serialization.load_der_public_key(der)
        if not isinstance(key, rsa.RSAPublicKey):
            raise BadInputError("it is not an RSA key")
        check_rsa_key(key)
        return key

    def _checked(self, signature: bytes, digest: bytes, wrong: SignerError) -> bytes:
        check_signature(self._public_key, signature, digest, wrong)
        return signature


class KMSECDSASigner(_KMSKey[ec.EllipticCurvePublicKey]):
    """A P-256 key in AWS KMS, for JWTs (ES256); otherwise as :class:`KMSSigner`."""

    _SPECS = ("ECC_NIST_P256",)
    _ALGORITHM = "ECDSA_SHA_256"

    def _read(self, der: bytes) -> ec.EllipticCurvePublicKey:
        key = serialization.load_der_public_key(der)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise BadInputError("it is not an elliptic-curve key")
        check_ec_key(key)
        return key

    def _checked(self, signature: bytes, digest: bytes, wrong: SignerError) -> bytes:
        try:
            self._public_key.verify(signature, digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        except InvalidSignature as error:
            raise wrong from error
        return joined(signature)


def open_kms_jwt_signer(
    key: str, *, region: str | None = None, endpoint_url: str | None = None
) -> KMSSigner | KMSECDSASigner:
    """The key as the signer of its kind, which KMS is asked for. Raises SignerError."""
    client = _new_client(_region_of(key, region), endpoint_url, _TIMEOUT, _ATTEMPTS)
    answer = _call(client, "GetPublicKey", key, _DEADLINE, KeyId=key)
    kind: type[KMSSigner | KMSECDSASigner]
    kind = KMSECDSASigner if _spec(answer) in KMSECDSASigner._SPECS else KMSSigner
    signer = kind.__new__(kind)
    signer._set(client, key, _DEADLINE, answer)
    return signer


def _spec(answer: dict[str, Any]) -> Any:
    return answer.get("KeySpec") or answer.get("CustomerMasterKeySpec")


class KMSKeys:
    """Makes keys in AWS KMS and finds them by their aliases, ``alias/<prefix>/<subject key id>``.

    Creating needs kms:CreateKey, kms:TagResource, kms:CreateAlias and kms:GetPublicKey, and
    kms:ScheduleKeyDeletion to clean up; discarding kms:DeleteAlias and kms:ScheduleKeyDeletion. Keys carry
    the tag ``kakunin=<prefix>``: one without an alias was left behind when an answer of KMS got lost.

    ``region`` and the rest are as in :class:`KMSSigner`.
    """

    def __init__(
        self,
        *,
        region: str | None = None,
        client: Any = None,
        endpoint_url: str | None = None,
        prefix: str = "kakunin",
        timeout: float = _TIMEOUT,
        attempts: int = _ATTEMPTS,
        deadline: float = _DEADLINE,
    ) -> None:
        if not re.fullmatch(r"(?!aws/|aws\Z)[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*", prefix) or len(prefix) > 200:
            raise BadInputError(
                f"{prefix!r} cannot begin an alias in AWS KMS",
                "Use letters, digits, _ and -, in parts with / between; 'aws' is Amazon's.",
            )
        self._prefix = prefix
        self._client = client or _new_client(_region_of("", region), endpoint_url, timeout, attempts)
        self._deadline = deadline

    def _alias(self, public_key: rsa.RSAPublicKey) -> str:
        return f"alias/{self._prefix}/{subject_key_id(public_key)}"

    def _call(self, operation: str, key: str, **arguments: Any) -> dict[str, Any]:
        return _call(self._client, operation, key, self._deadline, **arguments)

    def _open(self, key: str) -> KMSSigner:
        return KMSSigner(key, client=self._client, deadline=self._deadline)

    def create(self, label: str) -> KMSSigner:
        made = self._call(
            "CreateKey",
            f"a new key for {label!r}",
            KeySpec="RSA_2048",
            KeyUsage="SIGN_VERIFY",
            Description=label,
            Tags=[{"TagKey": "kakunin", "TagValue": self._prefix}],
        )
        metadata = _part(made, "KeyMetadata", "CreateKey", label)
        arn, id = metadata["Arn"], metadata["KeyId"]
        try:
            signer = _once_known(lambda: self._open(arn))
            _once_known(lambda: self._name(signer, arn))
        except BaseException as error:
            self._give_up(arn, id, error)
            raise
        return signer

    def _name(self, signer: KMSSigner, arn: str) -> None:
        alias = self._alias(signer.public_key())
        try:
            self._call("CreateAlias", arn, AliasName=alias, TargetKeyId=arn)
        except SignerError as error:
            # Nobody else could have named it: KMS did so, and its answer got lost.
            if _code(error) != "AlreadyExistsException":
                raise

    def _give_up(self, arn: str, id: str, error: BaseException) -> None:
        try:
            self._delete(id)
        except SignerError as left:
            if isinstance(error, SignerError):
                error.hint = (
                    f"{error.hint or ''} The new key {arn} is left behind ({left}): delete it.".strip()
                )

    def _delete(self, key: str) -> None:
        # The shortest wait there is.
        self._call("ScheduleKeyDeletion", key, KeyId=key, PendingWindowInDays=7)

    def open(self, public_key: rsa.RSAPublicKey) -> KMSSigner:
        """Raises SignerError when the alias is missing, or points to another key."""
        alias = self._alias(public_key)
        signer = self._open(alias)
        if signer.public_key() != public_key:
            raise SignerError(
                f"{alias} points to another key than its name says", "Point it back: aws kms update-alias"
            )
        return signer

    def discard(self, signer: Signer) -> None:
        """Deletes the alias and schedules the key's deletion in 7 days."""
        if not isinstance(signer, KMSSigner):
            raise BadInputError(f"{signer.key_id} is not a key in AWS KMS")
        alias = self._alias(signer.public_key())
        try:
            self._call("DeleteAlias", alias, AliasName=alias)
        except SignerError as error:
            if _code(error) != "NotFoundException":
                raise
        finally:
            self._delete(signer._target)

    def __repr__(self) -> str:
        return f"<KMSKeys alias/{self._prefix}/>"


def _code(error: SignerError) -> str:
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return str(response.get("Error", {}).get("Code", ""))


def _once_known(call: Callable[[], _Result]) -> _Result:
    for pause in _SETTLING:
        try:
            return call()
        except SignerError as error:
            if _code(error) != "NotFoundException":
                raise
        time.sleep(pause)
    return call()
