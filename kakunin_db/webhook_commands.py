"""What the commands about webhooks do and print: ``webhooks``."""

from __future__ import annotations

import argparse
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

from .commands import Refused, _answer, _answer_rows, _connect, _note, _read
from .errors import BadInputError

if TYPE_CHECKING:
    import psycopg

    from .webhooks import SecretKeys

_VARIABLE = "KAKUNIN_WEBHOOK_KEY"
_MAKE = "openssl rand -base64 32"


def secret_keys(options: argparse.Namespace) -> SecretKeys | None:
    """Of the file that is named, or the environment; None where there is neither. Raises Refused."""
    from .webhooks import SecretKeys  # noqa: PLC0415

    if options.webhook_key is not None:
        try:
            where, text = options.webhook_key, _read(options.webhook_key).decode("ascii", "replace")
        except Refused as error:
            raise Refused(
                str(error), f"It is the one endpoints were added with; the first is made by: {_MAKE} > FILE"
            ) from error
    elif os.environ.get(_VARIABLE):
        where, text = f"${_VARIABLE}", os.environ[_VARIABLE]
    else:
        return None
    try:
        return SecretKeys.parse(text)
    except BadInputError as error:
        raise Refused(f"{where}: {error}", error.hint, status=2) from error


def _needed(options: argparse.Namespace) -> SecretKeys:
    keys = secret_keys(options)
    if keys is None:
        raise Refused(
            "there is no key to encrypt the endpoint's secret under",
            f"Give --webhook-key or set {_VARIABLE}, as for the worker. Make one: {_MAKE}",
            status=2,
        )
    return keys


def _value(connection: psycopg.Connection[Any], query: str, *parameters: Any) -> Any:
    row = connection.execute(query.encode(), parameters).fetchone()
    return None if row is None else row[0]


def _encrypted(
    connection: psycopg.Connection[Any], keys: SecretKeys, endpoint_id: uuid.UUID
) -> tuple[str, bytes]:
    from .webhooks import new_secret  # noqa: PLC0415

    secret = new_secret()
    installation_id = _value(connection, "select kakunin.installation_id()")
    return secret, keys.encrypt(secret, installation_id, endpoint_id)


def add(options: argparse.Namespace) -> int:
    keys, endpoint_id = _needed(options), uuid.uuid4()
    with _connect(options) as connection:
        secret, ciphertext = _encrypted(connection, keys, endpoint_id)
        connection.execute(
            "select kakunin.add_webhook(%s, %s, %s, %s)",
            [endpoint_id, options.url, options.events, ciphertext],
        )
    _note("the secret is shown this once: give it to the receiver")
    _answer(
        options,
        {"endpoint_id": endpoint_id, "url": options.url, "events": options.events, "secret": secret},
        [("endpoint_id", endpoint_id), ("events", options.events), ("secret", secret)],
    )
    return 0


def rotate(options: argparse.Namespace) -> int:
    keys = _needed(options)
    with _connect(options) as connection:
        secret, ciphertext = _encrypted(connection, keys, options.endpoint_id)
        connection.execute(
            "select kakunin.rotate_webhook(%s, %s, %s)", [options.endpoint_id, ciphertext, options.overlap]
        )
    _note("the secret is shown this once: give it to the receiver before the overlap ends")
    _answer(
        options,
        {"endpoint_id": options.endpoint_id, "secret": secret},
        [("endpoint_id", options.endpoint_id), ("secret", secret)],
    )
    return 0


def status(options: argparse.Namespace) -> dict[str, Any]:
    """What kakunin.webhook_status() says. For ``health``, which is not an operator's alone."""
    with _connect(options) as connection:
        found: dict[str, Any] = _value(connection, "select kakunin.webhook_status()")
    return found


def listing(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        rows = connection.execute(
            "select endpoint_id, url, event_types, created_at, created_by, disabled_at, pending, dead"
            " from kakunin.webhook_endpoints order by created_at"
        ).fetchall()
    names = ("endpoint_id", "url", "events", "created_at", "created_by", "disabled_at", "pending", "dead")
    _answer_rows(
        options,
        [dict(zip(names, row, strict=True)) for row in rows],
        [
            (row[0], row[1], ",".join(row[2]), "disabled" if row[5] else "enabled", *row[6:])
            for row in rows
        ],
    )  # fmt: skip
    return 0


def _change(options: argparse.Namespace, call: str, *more: Any) -> int:
    with _connect(options) as connection:
        _value(connection, call, options.endpoint_id, *more)
    _answer(options, {"endpoint_id": options.endpoint_id}, [("endpoint_id", options.endpoint_id)])
    return 0


def remove(options: argparse.Namespace) -> int:
    return _change(options, "select kakunin.remove_webhook(%s)")


def enable(options: argparse.Namespace) -> int:
    return _change(options, "select kakunin.enable_webhook(%s)")


def disable(options: argparse.Namespace) -> int:
    return _change(options, "select kakunin.enable_webhook(%s, false)")


def deliveries(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        rows = connection.execute(
            "select message_id, endpoint_id, event_type, state, attempts, created_at, last_attempt_at,"
            "       last_status, last_error, next_attempt_at, payload"
            "  from kakunin.webhook_deliveries"
            " where (%(endpoint)s::uuid is null or endpoint_id = %(endpoint)s)"
            "   and (%(state)s::text is null or state = %(state)s)"
            " order by created_at desc limit %(limit)s",
            {"endpoint": options.endpoint, "state": options.state, "limit": options.limit},
        ).fetchall()
    names = (
        "message_id", "endpoint_id", "event_type", "state", "attempts", "created_at", "last_attempt_at",
        "last_status", "last_error", "next_attempt_at", "payload",
    )  # fmt: skip
    _answer_rows(
        options,
        [dict(zip(names, row, strict=True)) for row in rows],
        [(row[5], row[0], row[1], row[2], row[3], row[4], row[9], row[8]) for row in rows],
    )
    return 0


def replay(options: argparse.Namespace) -> int:
    if options.message is None and options.endpoint is None:
        raise Refused(
            "nothing is named that is to be sent again", "Give --message, --endpoint, or both.", status=2
        )
    with _connect(options) as connection:
        count = _value(
            connection, "select kakunin.replay_webhooks(%s, %s)", options.message, options.endpoint
        )
    _answer(options, {"deliveries": count}, [("deliveries", count)])
    return 0 if count else 1


def test(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        message_id = _value(connection, "select kakunin.test_webhook(%s)", options.endpoint_id)
        until = time.monotonic() + options.wait
        while True:
            row = connection.execute(
                "select state, attempts, last_status, last_error from kakunin.webhook_deliveries"
                " where message_id = %s",
                [message_id],
            ).fetchone()
            state, attempts, status, why = row or ("removed", 0, None, None)
            if state != "pending" or why is not None or time.monotonic() >= until:
                break
            time.sleep(0.2)
    if state == "pending" and why is None:
        why = (
            "no worker has sent it yet: is kakunin-db worker running, with the key?" if not attempts else None
        )
    names = {"message_id": message_id, "state": state, "status": status, "error": why}
    _answer(options, names, names.items())
    return 0 if state == "delivered" else 1
