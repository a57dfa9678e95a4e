"""Signed requests: RFC 9421 (HTTP Message Signatures) with the key of an agent's certificate.

What is signed is the method, the whole target URI, the content by its digest (RFC 9530), the fields that say
what the content is, when it was made and a nonce. The algorithm is rsa-v1_5-sha256 (section 3.3.2), which is
what a key in KMS produces, ``keyid`` the certificate's serial and ``tag`` this kit's, so that a signature
made for another purpose is none here. Parsing and building what is signed is http-message-signatures' (the
extra ``http``).
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
import secrets
import urllib.parse
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from http_message_signatures import (
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    MappingKeyResolver,
    algorithms,
)

from ..credential import AgentCredential
from ..errors import BadInputError
from ..serials import SERIAL_HEADER, normalize_serial
from .core import (
    Content,
    PublicKey,
    Refused,
    Request,
    Step,
    UseNonce,
    only,
    sent_path,
    unauthorized,
)

TAG: Final = "kakunin-db"
_LABEL = "kakunin"
_COVERED = ("@method", "@target-uri")
# What the content is taken for is as good as the content.
_DESCRIBING = ("content-type", "content-encoding")
_NONCE = re.compile(r"[!-~]{16,128}")
_LONGEST_FIELD = 8192
_PORTS = {"http": 80, "https": 443}


@dataclass
class _Message:
    """As the library takes it. A list of fields has every line, also where a name comes twice."""

    method: str
    url: str
    headers: Any


class _Fields(list[tuple[str, str]]):
    def items(self) -> list[tuple[str, str]]:
        return self


def public_url_of(url: str) -> str:
    """Scheme and authority in their one form (RFC 9421 section 2.2.2), and the path a proxy takes away."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    host = parts.hostname
    if (
        parts.scheme not in _PORTS or not host or not url.isascii()
        or parts.query or parts.fragment or "@" in parts.netloc
    ):  # fmt: skip
        raise BadInputError(f"not the URL of an application: {url!r}", "As in 'https://api.example.com'.")
    host = f"[{host}]" if ":" in host else host
    authority = host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}"
    return f"{parts.scheme}://{authority}{parts.path.rstrip('/')}"


class SignatureRules:
    """What a signed request has to be; :class:`.core.Rules` has the parameters."""

    def __init__(
        self, public_url: str, max_age: float, max_content: int, signed_headers: Iterable[str]
    ) -> None:
        if not 1 <= max_age <= 300:
            raise BadInputError("max_age is 1 to 300 seconds")
        if max_content < 0:
            raise BadInputError("max_content is a number of bytes")
        if isinstance(signed_headers, str):
            raise BadInputError("signed_headers is a list of names")
        self.public_url = public_url_of(public_url)
        self.max_age = dt.timedelta(seconds=max_age)
        self.max_content = max_content
        self.signed_headers = tuple(dict.fromkeys((*_DESCRIBING, *(name.lower() for name in signed_headers))))
        # RFC 9421 section 5.1
        covered = " ".join(f'"{name}"' for name in (*_COVERED, "content-digest"))
        self._accepted = (
            "Accept-Signature",
            f'{_LABEL}=({covered});created;alg="rsa-v1_5-sha256";tag="{TAG}"',
        )

    def verify(self, request: Request, serial: str) -> Generator[Step, Any, None]:
        """Raises Refused unless the holder of this certificate's key signed the request, just now and for
        once."""
        for name in ("Signature-Input", "Signature"):
            values = request.values(name.lower())
            if not values:
                raise unauthorized(
                    "missing_signature",
                    "Sign the request (RFC 9421) with the certificate's key.",
                    self._accepted,
                )
            if sum(map(len, values)) > _LONGEST_FIELD:
                raise Refused(400, "malformed_request", f"{name} is too long.")
        declared = self._declared(request)
        key = yield PublicKey(serial)
        query = f"?{request.query}" if request.query else ""
        url = f"{self.public_url}{sent_path(request)}{query}"
        message = _Message(request.method, url, _Fields(request.headers))
        required = [*_COVERED, *(n for n in (*self.signed_headers, "content-digest") if request.values(n))]
        verifier = HTTPMessageVerifier(
            signature_algorithm=algorithms.RSA_V1_5_SHA256, key_resolver=_OneKey(serial, key)
        )
        try:
            results = verifier.verify(
                message, max_age=self.max_age, expect_tag=TAG, require_components=required
            )
        except HTTPMessageSignaturesException as error:
            raise self._invalid(str(error) or "It is not that of the certificate's key.") from error
        if len(results) != 1:
            raise self._invalid(f"There is more than one signature with tag {TAG}.")
        nonce = results[0].nonce
        if nonce is None or not _NONCE.fullmatch(nonce):
            raise self._invalid("Its nonce is not 16 to 128 visible characters.")
        if declared is not None and declared > self.max_content:
            raise self._too_large()
        content = yield Content(self.max_content)
        if content is None:
            raise self._too_large()
        try:
            verifier.verify_body(message, results, content)
            # Content may come slowly: what is too old by now may have a nonce that is forgotten.
            verifier.verify(message, max_age=self.max_age, expect_tag=TAG)
        except HTTPMessageSignaturesException as error:
            raise self._invalid(str(error) or "It is not that of the certificate's key.") from error
        # Last, so that only who holds the key can use a nonce up. Kept while a repetition could count.
        seconds = (self.max_age + 2 * verifier.max_clock_skew).total_seconds() + 1
        if not (yield UseNonce(serial, nonce, seconds)):
            raise self._invalid("Its nonce was used before.")

    def _declared(self, request: Request) -> int | None:
        text = only(request, "Content-Length")
        if not text:
            return None
        if not re.fullmatch("[0-9]{1,18}", text):
            raise Refused(400, "malformed_request", "Content-Length is a number of bytes.")
        return int(text)

    def _invalid(self, why: str) -> Refused:
        message = f"The signature is refused. {why.rstrip('.')}."
        return unauthorized("invalid_signature", message, self._accepted)

    def _too_large(self) -> Refused:
        return Refused(413, "content_too_large", f"Signed content has at most {self.max_content} bytes.")


class _OneKey(MappingKeyResolver):
    """The key that was looked up before, under any form of its serial."""

    def __init__(self, serial: str, key: Any) -> None:
        super().__init__(public_keys={serial: key}, private_keys={})

    def resolve_public_key(self, key_id: str) -> Any:
        try:
            return super().resolve_public_key(normalize_serial(key_id))
        except BadInputError:
            return None


def sign_request(
    credential: AgentCredential,
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    content: bytes = b"",
    *,
    signed_headers: Iterable[str] = (),
) -> dict[str, str]:
    """The fields to add to a request so that a gateway with ``proof='signature'`` admits it, once.

    ``url`` and ``content`` are as they will be sent, and ``headers`` has at least those that are signed:
    Content-Type and Content-Encoding where they are there, and ``signed_headers``. May block on the signer.

    Raises BadInputError for a URL or headers that cannot be signed, and SignerError.
    """
    parts = urllib.parse.urlsplit(url)
    base = public_url_of(f"{parts.scheme}://{parts.netloc}")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    given = {name.lower(): value for name, value in (headers or {}).items()}
    wanted = [n for n in dict.fromkeys((*_DESCRIBING, *(n.lower() for n in signed_headers))) if n in given]
    fields: dict[str, str] = {name: given[name] for name in wanted}  # what is added has names of its own
    message = _Message(method.upper(), base + target, fields)
    signer = HTTPMessageSigner(signature_algorithm=algorithms.RSA_V1_5_SHA256)
    try:
        prepared = signer.prepare(
            message,
            key_id=credential.serial,
            nonce=secrets.token_urlsafe(24),
            label=_LABEL,
            tag=TAG,
            covered_component_ids=(*_COVERED, *wanted),
            body=content or None,
        )
        signature = credential.signer.sign(hashlib.sha256(prepared.signature_base).digest())
        signer.apply(message, prepared, signature)
    except (HTTPMessageSignaturesException, ValueError) as error:
        raise BadInputError(f"the request cannot be signed: {error}") from error
    added = ("Content-Digest", "Signature-Input", "Signature")
    return {SERIAL_HEADER: credential.serial, **{name: fields[name] for name in added if name in fields}}
