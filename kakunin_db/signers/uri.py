"""Signers and key stores by URI. What a URI may hold in secret is never quoted."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from ..errors import BadInputError
from .base import ECDSASigner, KeyStore, Signer
from .kms import KMSKeys, KMSSigner, open_kms_jwt_signer
from .local import LocalKeys, load_jwt_signer, load_signer
from .pkcs11 import PKCS11Keys, PKCS11Signer, TokenName, open_pkcs11_jwt_signer

_SIGNERS = (
    "file:/path/key.pem (password in KAKUNIN_KEY_PASSWORD),"
    " awskms:<key id, ARN or alias/...>?region=...&endpoint=..., or"
    " pkcs11:token=...;object=...;id=%01%02?module-path=/path/library.so&pin-source=file:/path"
    " (or pin-value=..., or KAKUNIN_PKCS11_PIN)"
)
_STORES = (
    "file:/path/folder (password in KAKUNIN_KEY_PASSWORD),"
    " awskms:?region=...&prefix=kakunin&endpoint=..., or"
    " pkcs11:token=...?module-path=/path/library.so&pin-source=file:/path"
    " (or pin-value=..., or KAKUNIN_PKCS11_PIN)"
)
# Those of RFC 7512 that say which token it is, and TokenName's names for them.
_TOKEN = {"token": "label", "serial": "serial", "model": "model", "manufacturer": "manufacturer"}


def open_signer(uri: str, *, password: bytes | None = None) -> Signer:
    """The signer a URI names: a key in a file, in AWS KMS or in a PKCS #11 token.

    ``password`` opens the file; it is by default $KAKUNIN_KEY_PASSWORD. Raises BadInputError for another
    URI, and SignerError when there is no such key or it cannot sign.
    """
    scheme, rest = _split(uri, _SIGNERS)
    if scheme == "file":
        return load_signer(_path(rest, _SIGNERS), _password(password))
    if scheme == "awskms":
        key, region, endpoint = _kms_key(rest)
        return KMSSigner(key, region=region, endpoint_url=endpoint)
    module, token, pin, label, id = _token_key(rest)
    return PKCS11Signer(module, token, pin, label=label, id=id)


def open_jwt_signer(uri: str) -> Signer | ECDSASigner:
    """As :func:`open_signer`, for signing JWTs: the key may also be a P-256 one."""
    scheme, rest = _split(uri, _SIGNERS)
    if scheme == "file":
        return load_jwt_signer(_path(rest, _SIGNERS), _password(None))
    if scheme == "awskms":
        key, region, endpoint = _kms_key(rest)
        return open_kms_jwt_signer(key, region=region, endpoint_url=endpoint)
    module, token, pin, label, id = _token_key(rest)
    return open_pkcs11_jwt_signer(module, token, pin, label=label, id=id)


def open_keys(uri: str, *, password: bytes | None = None) -> KeyStore:
    """The key store a URI names: a folder of files, AWS KMS or a PKCS #11 token.

    Arguments and errors are as in :func:`open_signer`.
    """
    scheme, rest = _split(uri, _STORES)
    if scheme == "file":
        return LocalKeys(_path(rest, _STORES), _password(password))
    if scheme == "awskms":
        key, options = _query(rest, {"region", "endpoint", "prefix"}, _STORES)
        if key:
            raise BadInputError("an awskms: URI of a key store names no key", f"Give {_STORES}.")
        named: dict[str, Any] = {"prefix": options["prefix"]} if "prefix" in options else {}
        return KMSKeys(region=options.get("region"), endpoint_url=_endpoint(options), **named)
    module, token, pin, _ = _token(rest, _STORES, set())
    return PKCS11Keys(module, token, pin)


def _split(uri: str, forms: str) -> tuple[str, str]:
    scheme, colon, rest = uri.partition(":")
    if not colon or scheme not in ("file", "awskms", "pkcs11"):
        raise BadInputError("this is not the URI of a key", f"Give {forms}.")
    return scheme, rest


def _parts(text: str, separator: str, allowed: set[str], forms: str) -> dict[str, str]:
    """name=value, each name once. Names are quoted in errors; values, which may be secret, are not."""
    found: dict[str, str] = {}
    for part in text.split(separator) if text else []:
        name, equals, value = part.partition("=")
        if not equals or not value or not re.fullmatch("[a-z-]+", name):
            raise BadInputError("the URI of a key is made of name=value", f"Give {forms}.")
        if name not in allowed:
            raise BadInputError(f"{name}= does not belong in this URI of a key", f"Give {forms}.")
        if name in found:
            raise BadInputError(f"{name}= is there twice in the URI of a key", f"Give {forms}.")
        found[name] = value
    return found


def _query(rest: str, allowed: set[str], forms: str) -> tuple[str, dict[str, str]]:
    path, _, query = rest.partition("?")
    options = _parts(query, "&", allowed, forms)
    return path, {name: unquote(value) for name, value in options.items()}


def _path(rest: str, forms: str) -> Path:
    """RFC 8089's absolute path; or one from the working directory on, which that does not have."""
    path = rest.removeprefix("//") if rest.startswith("///") else rest
    if not path or path.startswith("//") or "?" in path or "#" in path:
        raise BadInputError("a file: URI is a path, with ? as %3F and # as %23", f"Give {forms}.")
    return Path(unquote(path))


def _password(password: bytes | None) -> bytes:
    if password is None:
        password = os.fsencode(os.environ.get("KAKUNIN_KEY_PASSWORD", ""))
    if not password:
        raise BadInputError("a key in a file has a password", "Set KAKUNIN_KEY_PASSWORD.")
    return password


def _kms_key(rest: str) -> tuple[str, str | None, str | None]:
    """Its name, region and endpoint."""
    key, options = _query(rest, {"region", "endpoint"}, _SIGNERS)
    key = unquote(key)
    if not re.fullmatch(r"[A-Za-z0-9:/_-]+", key):
        raise BadInputError("an awskms: URI names a key by id, ARN or alias/...", f"Give {_SIGNERS}.")
    return key, options.get("region"), _endpoint(options)


def _endpoint(options: dict[str, str]) -> str | None:
    endpoint = options.get("endpoint")
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise BadInputError("endpoint= is an http or https URL without a user")
    return endpoint


def _token_key(rest: str) -> tuple[str, TokenName, str, str | None, bytes | None]:
    """The module, the token, the PIN, and the key's label and id."""
    module, token, pin, key = _token(rest, _SIGNERS, {"object", "id", "type"})
    if unquote(key.get("type", "private")) != "private" or not key.keys() & {"object", "id"}:
        raise BadInputError("a pkcs11: URI names a private key by object=, id= or both", f"Give {_SIGNERS}.")
    label = unquote(key["object"]) if "object" in key else None
    return module, token, pin, label, unquote_to_bytes(key["id"]) if "id" in key else None


def _token(rest: str, forms: str, more: set[str]) -> tuple[str, TokenName, str, dict[str, str]]:
    """The module, the token, the PIN, and the attributes in ``more``, still encoded."""
    path, options = _query(rest, {"module-path", "pin-source", "pin-value"}, forms)
    attributes = _parts(path, ";", more | _TOKEN.keys(), forms)
    if not attributes.keys() & {"token", "serial"}:
        raise BadInputError("a pkcs11: URI names the token by token= or serial=", f"Give {forms}.")
    if "module-path" not in options:
        raise BadInputError("a pkcs11: URI says where the token's library is: module-path=", f"Give {forms}.")
    name = TokenName(**{_TOKEN[n]: unquote(value) for n, value in attributes.items() if n in _TOKEN})
    key = {n: value for n, value in attributes.items() if n in more}
    return options["module-path"], name, _pin(options), key


def _pin(options: dict[str, str]) -> str:
    if "pin-value" in options and "pin-source" in options:
        raise BadInputError("a pkcs11: URI has pin-value= or pin-source=, and not both")
    pin = options.get("pin-value") or os.environ.get("KAKUNIN_PKCS11_PIN", "")
    if "pin-source" in options:
        source = options["pin-source"].removeprefix("file:")
        source = source.removeprefix("//") if source.startswith("///") else source
        if not source.startswith("/"):
            raise BadInputError("pin-source= is the absolute path of a file: file:/path")
        try:
            pin = Path(source).read_text("utf-8").rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise BadInputError(f"the PIN cannot be read from {source}", "Check pin-source=.") from error
    if not pin:
        raise BadInputError(
            "the PKCS #11 token needs a PIN", "Give pin-source= or pin-value=, or set KAKUNIN_PKCS11_PIN."
        )
    return pin
