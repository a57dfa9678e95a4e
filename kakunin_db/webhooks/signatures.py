"""Signatures of webhooks, and the secrets that make them.

Two families of headers, with the same key, HMAC-SHA256 (RFC 2104):

- Standard Webhooks 1.0: ``webhook-id``, ``webhook-timestamp`` (Unix seconds of this attempt) and
  ``webhook-signature``, ``v1,<base64>`` over ``<id>.<timestamp>.<body>``; several are separated by blanks.
- ``X-Kakunin-Signature``: ``t=<Unix seconds>,v1=<hex>`` over ``<t>.<body>``; several ``v1`` are possible.

There are two signatures while a secret is being rotated, the new one's first. A secret is ``whsec_`` and the
base64 of 24 to 64 random bytes, which are the key.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import os
import re
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import BadInputError, WebhookVerificationError

_PREFIX = "whsec_"
_NONCE = 12
_LONGEST = 4096  # of a header; ours have some 200 characters


def new_secret() -> str:
    """A new secret, of 32 random bytes."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _key(secret: str) -> bytes:
    key = _base64(secret[len(_PREFIX) :]) if isinstance(secret, str) and secret.startswith(_PREFIX) else b""
    if not 24 <= len(key) <= 64:
        raise BadInputError(
            "a webhook's secret is whsec_ and the base64 of 24 to 64 bytes",
            "kakunin-db webhooks add and rotate print it.",
        )
    return key


def _standard(key: bytes, message_id: str, timestamp: str, body: bytes) -> bytes:
    return hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")


def _kakunin(key: bytes, timestamp: str, body: bytes) -> bytes:
    return hmac.digest(key, f"{timestamp}.".encode() + body, "sha256")


def signed_headers(
    body: bytes, secrets_: Sequence[str], message_id: str, timestamp: int | None = None
) -> dict[str, str]:
    """The headers of both families, a signature for each secret.

    :param timestamp: Unix seconds; by default now.
    :raises BadInputError: a secret is not one.
    """
    at = str(int(time.time()) if timestamp is None else timestamp)
    keys = [_key(secret) for secret in secrets_]
    standard = [base64.b64encode(_standard(key, message_id, at, body)).decode() for key in keys]
    kakunin = [_kakunin(key, at, body).hex() for key in keys]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": at,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in standard),
        "X-Kakunin-Signature": ",".join([f"t={at}", *(f"v1={signature}" for signature in kakunin)]),
    }


def verify_webhook(
    payload: bytes,
    headers: Mapping[str, str],
    secret: str,
    *,
    tolerance: float = 300,
    now: float | None = None,
) -> dict[str, Any]:
    """What a received webhook says, once it is known who sent it, and when.

    Whether it was received before, its ``webhook-id`` tells, and ``data.event_id``: keep those for as long as
    a message may be sent again.

    :param payload: the body, byte for byte as it was received.
    :param headers: of the request, whatever their case. Those of Standard Webhooks decide where they are
        there, and ``X-Kakunin-Signature`` otherwise.
    :param secret: the endpoint's, ``whsec_...``.
    :param tolerance: how far the time of sending may be from now, in seconds.
    :param now: Unix seconds; by default the clock's.
    :raises WebhookVerificationError: it is not signed with this secret, too old, or no message.
    :raises BadInputError: the secret is not one.
    """
    key = _key(secret)
    if not isinstance(payload, (bytes, bytearray, memoryview)):
        raise BadInputError("a webhook is verified over the bytes of its body, as they were received")
    body = bytes(payload)
    found = {name.lower(): value for name, value in headers.items()}
    if any(name in found for name in ("webhook-id", "webhook-timestamp", "webhook-signature")):
        message_id, timestamp, signatures = (
            _header(found, name) for name in ("webhook-id", "webhook-timestamp", "webhook-signature")
        )
        given = [_base64(part[3:]) for part in signatures.split(" ") if part.startswith("v1,")]
        expected = _standard(key, message_id, timestamp, body)
    else:
        parts = [part.partition("=") for part in _header(found, "x-kakunin-signature").split(",")]
        times = [value for name, _, value in parts if name == "t"]
        if len(times) != 1:
            raise WebhookVerificationError("X-Kakunin-Signature has no time, or several")
        timestamp = times[0]
        given = [_hex(value) for name, _, value in parts if name == "v1"]
        expected = _kakunin(key, timestamp, body)
    if not any(hmac.compare_digest(signature, expected) for signature in given):
        raise WebhookVerificationError(
            "the webhook's signature is not that of this secret over this body",
            "Verify the body's bytes as they came, before anything parses them, with this endpoint's secret.",
        )
    if not re.fullmatch("[0-9]{1,12}", timestamp):
        raise WebhookVerificationError("the webhook's timestamp is not a number of seconds")
    if not abs((time.time() if now is None else now) - int(timestamp)) <= tolerance:
        raise WebhookVerificationError(
            f"the webhook was sent more than {tolerance:g} s from now",
            "It is an old one sent again by somebody, or the clocks differ.",
        )
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WebhookVerificationError("the webhook's body is not JSON") from error
    if not isinstance(message, dict):
        raise WebhookVerificationError("the webhook's body is not a JSON object")
    return message


def _header(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name)
    if not isinstance(value, str) or not value:
        raise WebhookVerificationError(f"the header {name} is missing")
    if len(value) > _LONGEST or not value.isascii():
        raise WebhookVerificationError(f"the header {name} is none of ours")
    return value


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # the latter: not ASCII
        return b""


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


# At rest ----------------------------------------------------------------------------------------------


class SecretKeys:
    """Encrypts endpoints' secrets with AES-256-GCM, under keys that are not in the database.

    The associated data are the installation's and the endpoint's id: a ciphertext moved to another row, or to
    a database that has become another installation, does not decrypt.

    :param keys: each the base64 of 32 bytes. The first one encrypts, all decrypt.
    :raises BadInputError: there is none, or it is not one.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._ciphers = []
        for key in keys:
            raw = _base64(key)
            if len(raw) != 32:
                raise BadInputError(
                    "the key for webhooks' secrets is not the base64 of 32 bytes",
                    "Make one: openssl rand -base64 32",
                )
            self._ciphers.append(AESGCM(raw))
        if not self._ciphers:
            raise BadInputError("there is no key for webhooks' secrets", "Make one: openssl rand -base64 32")

    @classmethod
    def parse(cls, text: str) -> SecretKeys:
        """Of keys separated by blanks or lines: what a file or ``KAKUNIN_WEBHOOK_KEY`` holds."""
        return cls(text.split())

    def encrypt(self, secret: str, installation_id: uuid.UUID, endpoint_id: uuid.UUID) -> bytes:
        """Nonce, ciphertext and tag. Raises BadInputError."""
        nonce = os.urandom(_NONCE)
        return nonce + self._ciphers[0].encrypt(nonce, _key(secret), _about(installation_id, endpoint_id))

    def decrypt(self, ciphertext: bytes, installation_id: uuid.UUID, endpoint_id: uuid.UUID) -> str:
        """The secret. Raises BadInputError: it was encrypted under another key, or for somebody else."""
        for cipher in self._ciphers:
            try:
                key = cipher.decrypt(
                    ciphertext[:_NONCE], ciphertext[_NONCE:], _about(installation_id, endpoint_id)
                )
            except (InvalidTag, ValueError):
                continue
            return _PREFIX + base64.b64encode(key).decode()
        raise BadInputError(
            "the secret was encrypted under another key, or for another endpoint or installation",
            "Give the worker the key it was made with, or rotate it: kakunin-db webhooks rotate.",
        )


def _about(installation_id: uuid.UUID, endpoint_id: uuid.UUID) -> bytes:
    return b"kakunin webhook secret/1" + installation_id.bytes + endpoint_id.bytes
