"""Binding Supabase's clients: every request carries a short-lived token of the agent.

The client's parts (PostgREST, storage, functions) each keep headers of their own, take the API key where
they are not told otherwise, and forget what they were told when somebody signs in. So nothing is told to
them: requests are given their headers as they leave, below all of that, by the transport of the HTTP client
that the parts share. A part that is told of another token cannot send it, and none is sent to another
origin, wherever a redirect points to. Realtime is a WebSocket and no HTTP client's, and is looked after here
by itself. ``auth``, which is for the users of a project and not for its agents, is left as it is.

No token is minted unless the certificate was verified, each time anew, and none is used once it is due for
renewal: a request that cannot have a good one is not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import json
import logging
import re
import threading
import uuid
from base64 import urlsafe_b64decode
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Final

import httpx
import psycopg
import supabase
from realtime import AsyncRealtimeClient
from supabase.lib.client_options import AsyncClientOptions, SyncClientOptions
from supabase_auth import AsyncMemoryStorage, SyncMemoryStorage

from ..cache import AsyncCertificateCache, CertificateCache, required
from ..credential import AgentCredential
from ..errors import (
    BadInputError,
    CredentialRejectedError,
    KakuninError,
    SignerUnavailableError,
    VerificationUnavailableError,
    with_sqlstate,
)
from ..logs import why
from ..results import CertificateVerification
from ..serials import SERIAL_HEADER, normalize_serial
from ..tokens import PRIVILEGED, Minter, Token

# Headers that say who asks, and go to no other origin.
_IDENTITY: Final = ("authorization", "apikey", SERIAL_HEADER.lower())
# Leaves the header Authorization. Without it httpx puts a user and password there that a URL, or the Location
# of a redirect, has.
_AS_IT_IS: Final = httpx.Auth()
# The first whose parts are known to share the HTTP client they are given, and whose Realtime is as below.
_OLDEST: Final = (2, 34)
# Seconds between attempts to renew what Realtime was told, while that is good still.
_PAUSE: Final = 5.0
# Seconds, where the client's options have none: httpx's own.
_TIMEOUT: Final = 5.0

_log = logging.getLogger("kakunin_db.supabase")


class _Agent:
    """Whom a client is bound to, and what a token of theirs is made of; no I/O."""

    def __init__(
        self, credential_or_serial: AgentCredential | str, client: supabase.Client | supabase.AsyncClient
    ) -> None:
        self.agent_id: uuid.UUID | None = None
        if isinstance(credential_or_serial, AgentCredential):
            self.serial = credential_or_serial.serial
            self.agent_id = credential_or_serial.agent_id
        else:
            self.serial = normalize_serial(credential_or_serial)
        if tuple(map(int, supabase.__version__.split(".")[:2])) < _OLDEST:
            raise BadInputError(
                f"supabase {supabase.__version__} keeps HTTP clients that cannot be bound",
                f"pip install 'supabase>={'.'.join(map(str, _OLDEST))}'",
            )
        self.url = httpx.URL(str(client.supabase_url))
        self.api_key = client.supabase_key
        if _bypasses(self.api_key):
            raise BadInputError(
                "this client has a key that row security does not bind, and an agent's never does",
                "Make it with the project's anon or publishable key.",
            )
        self._options = client.options
        self._auth = self.url.join("auth/v1/").path

    def question(self, token: str) -> dict[str, Any]:
        """The request that asks the project about the certificate."""
        return {
            "method": "POST",
            "url": self.url.join("rest/v1/rpc/verify_certificate"),
            "headers": {
                "apikey": self.api_key,
                "Authorization": f"Bearer {token}",
                "Accept": "application/json",
                "Content-Profile": "kakunin",
            },
            "json": {"serial": self.serial},
            "timeout": self.timeout("rest"),
        }

    def timeout(self, part: str) -> httpx.Timeout:
        """What the client's options say for a part of it, where its HTTP client is not the caller's."""
        options = self._options
        parts = {
            "rest": options.postgrest_client_timeout,
            "storage": options.storage_client_timeout,
            "functions": options.function_client_timeout,
        }
        return httpx.Timeout(parts.get(part, _TIMEOUT))

    def usable(self, answer: CertificateVerification) -> CertificateVerification:
        """The answer, of this agent's certificate and one that may be used; raises the error of any other."""
        if answer.serial_number != self.serial:
            raise CredentialRejectedError(
                f"asked about certificate {self.serial}, the project answered about another",
                "Check the project's URL.",
            )
        required(answer)
        if self.agent_id is not None and answer.agent_id != self.agent_id:
            raise CredentialRejectedError(
                f"certificate {self.serial} is of agent {answer.agent_id}, and the credential of"
                f" {self.agent_id}",
                "Make the credential from the certificate: AgentCredential.from_certificate().",
            )
        return answer

    def ours(self, request: httpx.Request) -> bool:
        """Whether the request is one of the agent's to the project; takes its identity off one that is for
        somebody else."""
        url, base = request.url, self.url
        if (url.scheme, url.host, url.port) != (base.scheme, base.host, base.port):
            for name in _IDENTITY:
                if name in request.headers:
                    del request.headers[name]
            return False
        return not f"{url.path}/".startswith(self._auth)

    def stamp(self, request: httpx.Request, token: Token) -> None:
        request.headers["Authorization"] = f"Bearer {token.text}"
        request.headers["apikey"] = self.api_key
        request.headers[SERIAL_HEADER] = self.serial

    def options(self, kind: Any, storage: Any, http: Any) -> Any:
        """The given client's options for the bound one: no user's session, and none of its headers that say
        who asks."""
        given = self._options
        fields = {f.name: getattr(given, f.name) for f in dataclasses.fields(kind) if hasattr(given, f.name)}
        fields["headers"] = {k: v for k, v in given.headers.items() if k.lower() not in _IDENTITY}
        return kind(**fields | {"storage": storage, "httpx_client": http} | dict.fromkeys(_SESSION, False))


_SESSION: Final = ("auto_refresh_token", "persist_session")


def _bypasses(key: str) -> bool:
    """Whether an API key is one of those that bypass row security: a secret key, or such a role's JWT."""
    if key.startswith("sb_secret_"):
        return True
    parts = key.split(".")
    if len(parts) != 3:
        return False
    try:
        claims = json.loads(urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return False
    return isinstance(claims, dict) and claims.get("role") in PRIVILEGED


def _answered(response: httpx.Response, serial: str) -> CertificateVerification:
    """What the project said of the certificate; raises where it said nothing of use."""
    body: Any = None
    with contextlib.suppress(ValueError, RecursionError):  # nested a thousand deep
        body = response.json()
    if response.status_code == 200:
        try:
            return _verification(body)
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationUnavailableError(
                f"what answers for certificate {serial} does not speak as the kit does",
                "Check the project's URL, and that the kit in it is of this version.",
            ) from error
    said = body if isinstance(body, dict) else {}
    message, code = str(said.get("message") or ""), said.get("code")
    if (cls := with_sqlstate(code)) is not None:
        raise cls(message, said.get("hint"))
    if response.status_code == 401:
        raise CredentialRejectedError(
            f"the project does not accept the token: {message or 'HTTP 401'}",
            "Check jwt_secret or jwt_signer, whether the project trusts that key, and the clocks.",
        )
    if response.status_code in (403, 404, 406):
        raise KakuninError(
            f"the project does not let certificates be verified: {message or f'HTTP {response.status_code}'}",
            "Expose the schema kakunin in the API's settings, and grant kakunin_agent to the role that the"
            " token names.",
        )
    raise VerificationUnavailableError(
        f"certificate {serial} could not be verified: HTTP {response.status_code}"
        + (f", {message}" if message else ""),
        "Try again; if it stays so, see the project's logs.",
    )


def _verification(body: Any) -> CertificateVerification:
    """Raises KeyError, TypeError or ValueError for what is not an answer of kakunin.verify_certificate()."""
    if not isinstance(body["valid"], bool) or not isinstance(body["serial_number"], str):
        raise TypeError("not an answer")
    agent_id = body.get("agent_id")
    if body["valid"] and (agent_id is None or body["not_after"] is None):
        raise ValueError("nobody's, or without an end")
    return CertificateVerification(
        **{f.name: body.get(f.name) for f in dataclasses.fields(CertificateVerification)}
        | {
            "agent_id": None if agent_id is None else uuid.UUID(str(agent_id)),
            "status": body["status"],
            "permitted_actions": tuple(map(str, body.get("permitted_actions") or ())),
        }
        | {name: _moment(body.get(name)) for name in ("not_before", "not_after", "revoked_at")}
    )


def _moment(text: Any) -> dt.datetime | None:
    if text is None:
        return None
    # Python 3.10 reads three digits of a second or six.
    text = re.sub(r"\.(\d{1,6})", lambda found: "." + found[1].ljust(6, "0"), text)
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without its zone")
    return moment


def _unreachable(serial: str, error: Exception) -> VerificationUnavailableError:
    return VerificationUnavailableError(
        f"certificate {serial} could not be verified: {why(error)}",
        "Try again; if it stays so, check the network and the address.",
    )


class _Tokens:
    """An agent's token for a ``Client``, renewed by whoever needs it first. Safe to use from several
    threads."""

    def __init__(
        self, agent: _Agent, minter: Minter, http: httpx.Client, certificates: CertificateCache | None
    ) -> None:
        self._agent = agent
        self._minter = minter
        self._http = http
        self._certificates = certificates
        self._lock = threading.Lock()
        self._token: Token | None = None

    def get(self) -> Token:
        """Raises the kit's errors; never gives a token that should have been renewed."""
        token = self._token
        if token is not None and token.fresh:
            return token
        with self._lock:
            if self._token is None or not self._token.fresh:
                self._token = None
                self._token = self._minter.mint(self._agent.usable(self._verify()))
            return self._token

    def _verify(self) -> CertificateVerification:
        serial = self._agent.serial
        try:
            if self._certificates is not None:
                return self._certificates.status(serial)
            request = self._http.build_request(**self._agent.question(self._minter.asking()))
            response = self._http.send(request, auth=_AS_IT_IS, follow_redirects=False)
        except (httpx.HTTPError, psycopg.Error) as error:
            raise _unreachable(serial, error) from error
        return _answered(response, serial)


class _AsyncTokens:
    """:class:`_Tokens` for an ``AsyncClient``, in one event loop."""

    def __init__(
        self,
        agent: _Agent,
        minter: Minter,
        http: httpx.AsyncClient,
        certificates: AsyncCertificateCache | None,
    ) -> None:
        self._agent = agent
        self._minter = minter
        self._http = http
        self._certificates = certificates
        self._lock = asyncio.Lock()
        self.token: Token | None = None

    async def get(self) -> Token:
        token = self.token
        if token is not None and token.fresh:
            return token
        async with self._lock:
            if self.token is None or not self.token.fresh:
                self.token = None
                certificate = self._agent.usable(await self._verify())
                self.token = await self._signed(lambda: self._minter.mint(certificate))
            return self.token

    async def _signed(self, sign: Callable[[], Any]) -> Any:
        # A KMS or token may take a while.
        return await asyncio.to_thread(sign) if self._minter.key.blocking else sign()

    async def _verify(self) -> CertificateVerification:
        serial = self._agent.serial
        try:
            if self._certificates is not None:
                return await self._certificates.status(serial)
            asking = await self._signed(self._minter.asking)
            request = self._http.build_request(**self._agent.question(asking))
            response = await self._http.send(request, auth=_AS_IT_IS, follow_redirects=False)
        except (httpx.HTTPError, psycopg.Error) as error:
            raise _unreachable(serial, error) from error
        return _answered(response, serial)


class _Transport(httpx.BaseTransport):
    """Sends with another HTTP client what it first gives the agent's headers."""

    def __init__(self, agent: _Agent, tokens: _Tokens, http: httpx.Client, *, owned: bool) -> None:
        self._agent = agent
        self._tokens = tokens
        self._http = http
        self._owned = owned

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self._agent.ours(request):
            self._agent.stamp(request, self._tokens.get())
        _set_timeout(request, self._agent, self._owned)
        return self._http.send(request, auth=_AS_IT_IS, follow_redirects=False, stream=True)

    def close(self) -> None:
        if self._owned:
            self._http.close()


class _AsyncTransport(httpx.AsyncBaseTransport):
    def __init__(self, agent: _Agent, tokens: _AsyncTokens, http: httpx.AsyncClient, *, owned: bool) -> None:
        self._agent = agent
        self._tokens = tokens
        self._http = http
        self._owned = owned

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._agent.ours(request):
            self._agent.stamp(request, await self._tokens.get())
        _set_timeout(request, self._agent, self._owned)
        return await self._http.send(request, auth=_AS_IT_IS, follow_redirects=False, stream=True)

    async def aclose(self) -> None:
        if self._owned:
            await self._http.aclose()


def _set_timeout(request: httpx.Request, agent: _Agent, owned: bool) -> None:
    """That of the client's options for this part, where the HTTP client is not the caller's own."""
    if not owned:
        return
    part = request.url.path[len(agent.url.path) :].partition("/")[0]
    request.extensions["timeout"] = agent.timeout(part).as_dict()


def _like(given: httpx.Client | httpx.AsyncClient | None) -> dict[str, Any]:
    """What an HTTP client adds to requests before its transport, for one in front of it; by default what
    Supabase's clients make."""
    if given is None:
        return {"follow_redirects": True}
    return {
        "headers": {k: v for k, v in given.headers.items() if k.lower() not in _IDENTITY},
        "params": given.params,
        "cookies": given.cookies,
        "timeout": given.timeout,
        "base_url": given.base_url,
        "follow_redirects": given.follow_redirects,
        "max_redirects": given.max_redirects,
    }


class BoundClient(supabase.Client):
    """A ``supabase.Client`` whose requests are an agent's.

    Close it, or use it in a ``with`` block: no request can be made with it afterwards.
    """

    def __init__(
        self,
        client: supabase.Client,
        credential_or_serial: AgentCredential | str,
        minter: Minter,
        certificates: CertificateCache | None,
    ) -> None:
        agent = _Agent(credential_or_serial, client)
        given = client.options.httpx_client
        http = given or httpx.Client(http2=True)
        self._tokens = _Tokens(agent, minter, http, certificates)
        transport = _Transport(agent, self._tokens, http, owned=given is None)
        self._bound_http = httpx.Client(transport=transport, **_like(given))
        try:
            self._tokens.get()
        except BaseException:
            self._bound_http.close()
            raise
        options = agent.options(SyncClientOptions, SyncMemoryStorage(), self._bound_http)
        super().__init__(str(client.supabase_url), client.supabase_key, options)

    def __enter__(self) -> BoundClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the binding. The client that was given goes on."""
        self._bound_http.close()

    def _listen_to_auth_events(self, *_: Any) -> None:
        """Whoever signs in, the client stays its agent's."""


class BoundAsyncClient(supabase.AsyncClient):
    """A ``supabase.AsyncClient`` whose requests are an agent's.

    The certificate is verified before the first request; ``await`` it, or use it in an ``async with`` block,
    to have that done at once. Close it, or use such a block: no request can be made with it afterwards.
    """

    def __init__(
        self,
        client: supabase.AsyncClient,
        credential_or_serial: AgentCredential | str,
        minter: Minter,
        certificates: AsyncCertificateCache | None,
    ) -> None:
        agent = _Agent(credential_or_serial, client)
        given = client.options.httpx_client
        http = given or httpx.AsyncClient(http2=True)
        self._tokens = _AsyncTokens(agent, minter, http, certificates)
        transport = _AsyncTransport(agent, self._tokens, http, owned=given is None)
        self._bound_http = httpx.AsyncClient(transport=transport, **_like(given))
        options = agent.options(AsyncClientOptions, AsyncMemoryStorage(), self._bound_http)
        super().__init__(str(client.supabase_url), client.supabase_key, options)
        self.realtime: _Realtime = _Realtime(
            self._tokens, str(self.realtime_url), token=self.supabase_key, **(self.options.realtime or {})
        )

    def __await__(self) -> Generator[Any, None, BoundAsyncClient]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> BoundAsyncClient:
        try:
            await self._tokens.get()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the binding, with the connection to Realtime. The client that was given goes on."""
        await self.realtime.close()
        await self._bound_http.aclose()

    def _listen_to_auth_events(self, *_: Any) -> None:
        """Whoever signs in, the client stays its agent's."""


class _Realtime(AsyncRealtimeClient):
    """Realtime as the agent: a token when it connects, and each next one while it is connected."""

    def __init__(self, tokens: _AsyncTokens, url: str, **options: Any) -> None:
        self._tokens = tokens
        self._keeper: asyncio.Task[None] | None = None
        super().__init__(url, **options)

    @property
    def access_token(self) -> str:
        token = self._tokens.token
        if token is None or token.expired:
            raise CredentialRejectedError(
                "the agent has no token for Realtime at this moment",
                "Connect first: await client.realtime.connect().",
            )
        return token.text

    @access_token.setter
    def access_token(self, token: str | None) -> None:
        """Nothing else is told to it than what the agent's tokens are."""

    async def connect(self) -> None:
        if not self.is_connected:
            await self._renew()
        await super().connect()
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper is not asyncio.current_task():
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        await super().close()

    async def set_auth(self, token: str | None) -> None:
        raise BadInputError(
            "Realtime of a bound client has its agent's token and no other", "Bind another client."
        )

    async def _renew(self) -> Token:
        token = await self._tokens.get()
        await super().set_auth(token.text)
        return token

    async def _keep(self) -> None:
        """Tells the server each new token before the old one ends, and leaves when there is none."""
        told: Token | None = None
        while True:
            try:
                told = await self._renew()
                await asyncio.sleep(max(told.seconds_left, 0.0))
            except Exception as error:
                later = isinstance(error, (SignerUnavailableError, VerificationUnavailableError))
                if later and told is not None and not told.expired:
                    _log.warning("the token for Realtime is not renewed yet: %s", why(error))
                    await asyncio.sleep(_PAUSE)
                    continue
                _log.warning("Realtime is left: %s", why(error))
                self._set_channels_errored(error)
                await self.close()
                return


def bind(
    client: supabase.Client,
    credential_or_serial: AgentCredential | str,
    minter: Minter,
    certificates: object,
) -> BoundClient:
    if not isinstance(certificates, (CertificateCache, type(None))):
        raise BadInputError("certificates is a CertificateCache for a Client")
    return BoundClient(client, credential_or_serial, minter, certificates)


def bind_async(
    client: supabase.AsyncClient,
    credential_or_serial: AgentCredential | str,
    minter: Minter,
    certificates: object,
) -> BoundAsyncClient:
    if not isinstance(certificates, (AsyncCertificateCache, type(None))):
        raise BadInputError("certificates is an AsyncCertificateCache for an AsyncClient")
    return BoundAsyncClient(client, credential_or_serial, minter, certificates)
