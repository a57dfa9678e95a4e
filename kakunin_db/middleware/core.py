"""What a gateway decides about a request, without a framework and without input or output.

:func:`admit` is a generator: it yields what it has to know (a certificate's state, the content) and is sent
the outcome. asgi.py, wsgi.py and django.py perform its steps, through :mod:`kakunin_db.middleware.gateway`.
So the decision is written once, and every way out of it is either a :class:`VerifiedAgent` or a
:class:`Refused`.
"""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from ..client import CertificateVerification
from ..errors import (
    AgentSuspendedError,
    BadInputError,
    CertificateRevokedError,
    CertificateValidityError,
    CredentialRejectedError,
    KakuninError,
    ScopeViolationError,
    UnknownCertificateError,
)
from ..serials import SERIAL_HEADER, normalize_serial
from ..tickets import Admission, Ticket, read_ticket

if TYPE_CHECKING:
    from .signature import SignatureRules

ASSERTION_HEADER: Final = "X-Kakunin-Assertion"

Proof = Literal["serial", "signature", "assertion"]
_PROOFS: Final = ("serial", "signature", "assertion")

# Of an assertion, in SQL (kakunin.open_session).
_LONGEST_ASSERTION = 8192

_AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]|//|/\.\.?(?:/|\Z)")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2


class Refused(Exception):  # noqa: N818 - it is an answer
    """A request that goes no further, and what is answered: ``status`` and a JSON object with ``error``."""

    def __init__(self, status: int, error: str, message: str, *headers: tuple[str, str], **more: Any) -> None:
        super().__init__(message)
        self.status = status
        self.error = error
        self.content = json.dumps({"error": error, "message": message, **more}).encode()
        self.headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(self.content))),
            ("Cache-Control", "no-store"),
            *headers,
        ]


def unavailable() -> Refused:
    """Whoever asks learns no more than that: what failed is in the log."""
    message = "The certificate cannot be verified at the moment. Try again later."
    return Refused(503, "verify_unavailable", message, ("Retry-After", "1"))


@dataclass(frozen=True)
class VerifiedAgent(Admission):
    """The agent of an admitted request; ``bind_agent_session(client, agent)`` binds a session to it.

    ``proof`` is what was demanded of the agent: with ``serial`` it has named its certificate and proved
    nothing.
    """

    proof: Proof = "serial"
    certificate: CertificateVerification = field(default=None, repr=False)  # type: ignore[assignment]

    @property
    def agent_id(self) -> Any:
        return self.certificate.agent_id

    @property
    def name(self) -> str | None:
        return self.certificate.agent_name

    @property
    def tenant(self) -> str | None:
        return self.certificate.tenant

    @property
    def permitted_actions(self) -> tuple[str, ...]:
        return self.certificate.permitted_actions

    def has_scope(self, scope: str) -> bool:
        """Whether the certificate permits the action, exactly or by ``prefix:*``; as
        ``kakunin.has_scope()``."""
        return permits(self.certificate.permitted_actions, scope)

    def require_scope(self, scope: str) -> None:
        """Raises ScopeViolationError where :meth:`has_scope` says no."""
        if not self.has_scope(scope):
            raise ScopeViolationError(
                f"certificate {self.serial} does not permit {scope}", "Have the agent certified for it."
            )


def permits(actions: Iterable[str], scope: str) -> bool:
    return any(
        scope == action
        or (action.endswith(":*") and scope.startswith(action[:-1]) and len(scope) >= len(action))
        for action in actions
    )


# What is asked for -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Status:
    """What the cache says of a certificate."""

    serial: str


@dataclass(frozen=True)
class PublicKey:
    """The key of a registered certificate."""

    serial: str


@dataclass(frozen=True, repr=False)
class OpenSession:
    """The ticket for an assertion; its single use is committed before it is sent back."""

    assertion: str


@dataclass(frozen=True)
class Content:
    """The request's content, or None where it has more bytes than this."""

    limit: int


@dataclass(frozen=True)
class UseNonce:
    """Whether this nonce of the agent's is new. It is remembered for so many seconds."""

    serial: str
    nonce: str
    seconds: float


Step = Status | PublicKey | OpenSession | Content | UseNonce
Steps = Generator[Step, Any, "VerifiedAgent | None"]


@dataclass(frozen=True)
class Request:
    """``path`` is decoded, as it is routed by, and with whatever the application is mounted on; ``raw_path``
    as it was sent, where the server says; ``routed`` what is left of ``path`` without a mount that the sender
    may have named. Header names are in lower case, values as in ISO 8859-1."""

    method: str
    path: str
    raw_path: str | None
    query: str
    headers: Sequence[tuple[str, str]]
    routed: str | None = None

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


# Rules -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    method: str | None
    prefix: str
    scopes: tuple[str, ...]

    def fits(self, method: str, path: str) -> bool:
        if self.method is not None and self.method != ("GET" if method == "HEAD" else method):
            return False
        return self.prefix in ("/", path) or path.startswith(self.prefix.rstrip("/") + "/")


def _scopes(given: str | Iterable[str]) -> tuple[str, ...]:
    scopes = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(scope, str) and scope and not scope.endswith(":*") for scope in scopes):
        raise BadInputError(
            "a required scope is an action, such as 'orders:write'", "prefix:* is for certificates."
        )
    return scopes


class Rules:
    """What is demanded of a request: the options of each middleware.

    :param proof: what an agent has to show. ``serial``: nothing. A serial number is no secret, and whoever
        sends it is taken for the agent, so this is for a place where something else has verified the caller
        (mutual TLS, a mesh, a proxy). ``signature``: its signature over this very request
        (:mod:`.signature`). ``assertion``: the JWT of a binding, which the database exchanges for a ticket.
    :param required_scope: what the certificate has to permit, all of it, on every path.
    :param scopes: what it has to permit beyond that, by ``"/prefix"`` or ``"METHOD /prefix"``; the longest
        prefix counts, and ``()`` means any agent. A path that none fits needs ``required_scope``; without one
        it is refused.
    :param public: paths, exact, for which nothing is verified.
    :param public_url: with ``signature``, how agents reach the application: scheme, authority, and the path
        that a proxy takes away if one does. Configured, because the Host field is the sender's: a request
        signed for another place would otherwise count here.
    :param max_age: seconds for which a signature counts; the clocks may be 5 s apart.
    :param max_content: bytes of content that are held in memory to compare its digest.
    :param signed_headers: fields that have to be signed where they are there: all that the application acts
        on. Content-Type and Content-Encoding always have to be.
    """

    def __init__(
        self,
        *,
        proof: Proof,
        required_scope: str | Iterable[str] | None = None,
        scopes: Mapping[str, str | Iterable[str]] | None = None,
        public: Iterable[str] = (),
        public_url: str | None = None,
        max_age: float = 60.0,
        max_content: int = 1 << 20,
        signed_headers: Iterable[str] = (),
    ) -> None:
        if proof not in _PROOFS:
            raise BadInputError("proof is 'serial', 'signature' or 'assertion'")
        if (public_url is not None) != (proof == "signature"):
            raise BadInputError(
                "proof='signature' needs public_url, and nothing else does",
                "public_url is how agents reach this application, as in 'https://api.example.com'.",
            )
        if isinstance(public, str):
            raise BadInputError("public is a list of paths")
        self.proof: Proof = proof
        self.signatures: SignatureRules | None = None
        if public_url is not None:
            from .signature import SignatureRules  # noqa: PLC0415 - the extra `http` is for signatures alone

            self.signatures = SignatureRules(public_url, max_age, max_content, signed_headers)
        self.required = None if required_scope is None else _scopes(required_scope)
        self.public = frozenset(public)
        self._rules = None if scopes is None else [_rule(key, value) for key, value in scopes.items()]
        for path in (*self.public, *(rule.prefix for rule in self._rules or ())):
            if not path.startswith("/") or is_ambiguous(path):
                raise BadInputError(f"not an absolute path without empty or dot segments: {path!r}")

    def scopes(self, method: str, path: str) -> tuple[str, ...] | None:
        """All that the request needs; None where nothing says what, which nobody may then do."""
        if self._rules is None:
            return self.required or ()
        fitting = [rule for rule in self._rules if rule.fits(method, path)]
        if not fitting:
            return self.required
        closest = max(fitting, key=lambda rule: (len(rule.prefix.rstrip("/")), rule.method is not None))
        return (self.required or ()) + closest.scopes


def _rule(key: str, scopes: str | Iterable[str]) -> _Rule:
    method, _, path = key.rpartition(" ")
    if method and (not _TOKEN.fullmatch(method) or method != method.upper() or method == "HEAD"):
        raise BadInputError(f"not '/prefix' or 'METHOD /prefix': {key!r}", "HEAD is decided as GET is.")
    return _Rule(method or None, path, _scopes(scopes))


def is_ambiguous(path: str) -> bool:
    """Whether two parts of a system could take it for different places: a proxy or framework that merges
    slashes, resolves dots or takes a backslash for a slash, and a rule that does not."""
    return _AMBIGUOUS.search(path) is not None


# The decision ----------------------------------------------------------------------------------------


def admit(rules: Rules, request: Request, outer: Any = None) -> Steps:
    """The agent of a request, None for a public path. Raises Refused.

    ``outer`` is what another middleware has found before, if one has: what serves once (a nonce, an
    assertion) is not used a second time for the same agent and the same kind of proof.
    """
    method = request.method.upper()  # as frameworks see it, whatever was sent
    paths = _paths(request)
    if any(is_ambiguous(path) or not path.startswith("/") for path in paths):
        raise Refused(400, "ambiguous_path", "A path has no empty segments, dot segments or backslashes.")
    if paths <= rules.public:
        return None
    serial = _serial(request)
    certificate: CertificateVerification = yield Status(serial)
    check(certificate, serial)
    before = outer if isinstance(outer, VerifiedAgent) else None
    ticket = None
    if before is not None and (before.serial, before.proof) == (serial, rules.proof):
        ticket = before.ticket
    elif rules.signatures is not None:
        yield from rules.signatures.verify(request, serial)
    elif rules.proof == "assertion":
        ticket = yield from _session(request, serial)
    if rules.proof != "serial":
        # Proof takes time: content may come slowly. What counts is how the certificate is now.
        certificate = yield Status(serial)
        check(certificate, serial)
    wanted: list[str] = []
    for path in paths:
        scopes = rules.scopes(method, path)
        if scopes is None:
            raise Refused(403, "scope_violation", "No scope is named for this path, so nobody may use it.")
        wanted += [scope for scope in scopes if scope not in wanted]
    missing = [scope for scope in wanted if not permits(certificate.permitted_actions, scope)]
    if missing:
        message = f"The certificate does not permit {', '.join(missing)}."
        raise Refused(403, "scope_violation", message, required=wanted)
    return VerifiedAgent(serial, ticket, rules.proof, certificate)


def only(request: Request, name: str, error: str = "malformed_request") -> str | None:
    """The value of a field that may be there once."""
    values = request.values(name.lower())
    if len(values) > 1:
        raise Refused(400, error, f"{name} is there more than once.")
    return values[0].strip(" \t") if values else None


def _serial(request: Request) -> str:
    text = only(request, SERIAL_HEADER, "malformed_cert_serial")
    if not text:
        raise unauthorized(
            "missing_cert_serial", f"Send your certificate's serial number in {SERIAL_HEADER}."
        )
    try:
        return normalize_serial(text)
    except BadInputError:
        message = f"{SERIAL_HEADER} is one serial number, 1 to 20 bytes in hexadecimal, as in 3A:F2:91:CC."
        raise Refused(400, "malformed_cert_serial", message) from None


def unauthorized(error: str, message: str, *headers: tuple[str, str]) -> Refused:
    # RFC 9110 section 15.5.2 wants a challenge.
    return Refused(401, error, message, ("WWW-Authenticate", "Kakunin"), *headers)


def check(certificate: CertificateVerification, serial: str) -> None:
    """Raises Refused unless this is the answer about this serial, and the certificate may be used now."""
    if certificate.serial_number != serial:
        raise unavailable()
    if certificate.valid is True and certificate.status == "active":
        return
    raise _STATUS.get(certificate.status, unavailable)()


def _unknown() -> Refused:
    return unauthorized("unknown_cert_serial", "No such certificate is registered here.")


def _revoked() -> Refused:
    return Refused(403, "agent_revoked", "The certificate was revoked, which is final.")


def _expired() -> Refused:
    return Refused(403, "agent_expired", "The certificate has expired.")


def _early() -> Refused:
    return Refused(403, "agent_not_yet_valid", "The certificate is not valid yet.")


def _suspended() -> Refused:
    return Refused(403, "agent_suspended", "The agent is suspended until an operator reinstates it.")


_STATUS = {
    "unknown": _unknown,
    "revoked": _revoked,
    "expired": _expired,
    "not_yet_valid": _early,
    "suspended": _suspended,
}

_ERRORS: dict[type[KakuninError], Callable[[], Refused]] = {
    UnknownCertificateError: _unknown,
    CertificateRevokedError: _revoked,
    AgentSuspendedError: _suspended,
}


def _session(request: Request, serial: str) -> Generator[Step, Any, Ticket]:
    text = only(request, ASSERTION_HEADER)
    if not text:
        raise unauthorized(
            "missing_assertion", f"Send an assertion of the certificate's agent in {ASSERTION_HEADER}."
        )
    if len(text) > _LONGEST_ASSERTION or not text.isascii() or text.count(".") != 2:
        raise unauthorized("invalid_assertion", f"{ASSERTION_HEADER} is one JWT in compact form (RFC 7523).")
    ticket: Ticket = yield OpenSession(text)
    if read_ticket(ticket.text)[0] != serial:
        raise unauthorized("invalid_assertion", "The assertion is of another certificate than the one named.")
    return ticket


def refusal(error: BaseException) -> Refused | None:
    """What is answered where the database says, in a handler or for an assertion, that the agent may not;
    None for an error that is about something else."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ScopeViolationError):
        return Refused(403, "scope_violation", f"{error}.")
    if isinstance(error, CertificateValidityError):
        return _early() if "not valid yet" in str(error) else _expired()
    return next((answer() for kind, answer in _ERRORS.items() if isinstance(error, kind)), None)


def rejected(error: KakuninError) -> Refused:
    """What is answered where open_session() refuses an assertion."""
    if isinstance(error, (CredentialRejectedError, BadInputError)):
        return unauthorized("invalid_assertion", f"{error}.")
    return refusal(error) or unavailable()


def _paths(request: Request) -> set[str]:
    """The path that is routed by, and the one that was sent where that is another: some frameworks take away
    what an application is mounted on before a middleware sees it. Rules are for both, and for what is left of
    the path without a mount that may be the sender's."""
    paths = {request.path}
    if request.routed is not None:
        paths.add(request.routed)
    if request.raw_path is not None and request.raw_path != request.path:
        paths.add(urllib.parse.unquote(request.raw_path, errors="surrogateescape"))
    return paths


def sent_path(request: Request) -> str:
    """The path as the agent wrote it, which is what it has signed; where the server does not say it, the
    routed one in its plainest encoding. Raises Refused."""
    raw = request.raw_path
    if raw is None:
        raw = urllib.parse.quote(request.path.encode("utf-8", "surrogateescape"), safe="/!$&'()*+,;=:@-._~")
    if "#" in raw or "?" in raw or "#" in request.query:
        raise Refused(400, "malformed_request", "A request's target has no fragment.")
    return raw
