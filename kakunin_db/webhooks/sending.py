"""One HTTP POST to an address that was checked first.

The name is resolved once, every address is judged, and the connection is made to one of those that passed, so
that a name that says something else a moment later changes nothing. There is no library between:
http.client writes the request and reads the head of the answer over a socket of ours. No proxy, no redirect,
no cookie. Everything together, the resolving included, has one deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ..errors import BadInputError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_LONGEST_URL = 1000
_MOST_ADDRESSES = 4
_MOST_READ = 64 * 1024
_REST = 0.5  # seconds for the body of an answer, which nobody looks at

# Not public, or not one machine: IANA's special-purpose registries. What ipaddress itself has of them differs
# from release to release.
_NOT_PUBLIC_4 = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15",
        "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip
# Of IPv6 only 2000::/3 is public: that leaves out what has an IPv4 address inside (mapped, compatible,
# NAT64), unique local, link-local and multicast addresses. Inside it are Teredo and its neighbours,
# documentation and 6to4.
_PUBLIC_6 = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC_6 = [
    ipaddress.ip_network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]


class Unsent(Exception):  # noqa: N818
    """It was not received, and why; ``status`` where there was an answer."""

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__("".join(c for c in why if c.isprintable()))
        self.status = status


def is_public(address: Address) -> bool:
    """Whether it is a unicast address that is reachable over the Internet, and nothing wrapped in it."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in _NOT_PUBLIC_4)
    return (
        address.is_global
        and address in _PUBLIC_6
        and not any(address in network for network in _NOT_PUBLIC_6)
    )


def parse_networks(text: str) -> list[Network]:
    """Networks separated by commas or blanks. Raises BadInputError."""
    try:
        return [ipaddress.ip_network(part) for part in re.split(r"[,\s]+", text) if part]
    except ValueError as error:
        raise BadInputError(f"not a network: {error}", "As in 10.1.0.0/16 or fd00::/8.") from error


class Target:
    """A URL as it may be: http or https, a plain host, no user, no fragment. Raises BadInputError."""

    def __init__(self, url: str) -> None:
        if len(url) > _LONGEST_URL or not re.fullmatch(r"https?://[!-~]+", url):
            raise BadInputError("a webhook's URL is https, at most 1000 printable ASCII characters")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise BadInputError(f"this is not a URL: {error}") from error
        if "@" in parts.netloc:
            raise BadInputError("a webhook's URL names no user", "The signature says who sends it.")
        if "#" in url:
            raise BadInputError("a webhook's URL has no fragment")
        if ":" in host or "[" in parts.netloc:
            try:
                ipaddress.IPv6Address(host)
            except ValueError as error:
                raise BadInputError("a webhook's URL has something else than a host in it") from error
            if "%" in host:
                raise BadInputError("an address in a webhook's URL has no zone")
        elif not re.fullmatch(r"[A-Za-z0-9_-]([A-Za-z0-9._-]{0,251}[A-Za-z0-9_.-])?", host):
            raise BadInputError("a webhook's URL has something else than a host in it")
        if port == 0:
            raise BadInputError("a webhook's URL has no port 0")
        self.secure = parts.scheme == "https"
        self.host = host
        self.port = port or (443 if self.secure else 80)
        self.header = (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def permitted(self, address: Address, allowed: Sequence[Network]) -> bool:
        """Whether it may be sent there: to a public address over TLS, and to what was allowed by name."""
        return (self.secure and is_public(address)) or any(
            address.version == network.version and address in network
            for network in allowed
            if not is_public(address)
        )


SocketAddress = tuple[Any, ...]


def _resolve(host: str, port: int, deadline: float) -> list[tuple[socket.AddressFamily, SocketAddress]]:
    """In a thread, because getaddrinfo() knows no deadline: one that does not end is left behind."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP))
        except (OSError, UnicodeError) as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True, name="kakunin webhook resolver")
    thread.start()
    thread.join(_left(deadline))
    if not answers:
        raise TimeoutError
    if isinstance(answers[0], Exception):
        raise Unsent("the name does not resolve") from answers[0]
    return [(family, address) for family, _, _, _, address in answers[0]]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Reader(io.RawIOBase):
    """Reads until one deadline, and so much and no more."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._socket = sock
        self.deadline = deadline
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: _MOST_READ - self._read]
        if not room:
            raise Unsent("the head of the answer has no end")
        self._socket.settimeout(_left(self.deadline))
        count = self._socket.recv_into(room)
        self._read += count
        return count


class _Timed:
    """What http.client wants of a socket, every step of which ends at one deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._socket = sock
        self._deadline = deadline
        self.reader = _Reader(sock, deadline)

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._socket.settimeout(_left(self._deadline))
            rest = rest[self._socket.send(rest) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self.reader)

    def close(self) -> None:
        """Nothing: http.client closes as soon as it has read the head, and whoever opened it closes it."""


def _connect(family: socket.AddressFamily, address: SocketAddress, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(_left(deadline))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    timeout: float = 10,
    allowed: Sequence[Network] = (),
    context: ssl.SSLContext | None = None,
    resolve: Callable[[str, int, float], list[tuple[socket.AddressFamily, SocketAddress]]] = _resolve,
) -> int:
    """Sends it and returns the status, 200 to 299.

    :param timeout: seconds for all of it.
    :param allowed: networks that are not public and may be sent to all the same; to those without TLS too.
    :param context: by default one that verifies by the system's authorities.
    :raises Unsent: anything else came of it. The message is ours; nothing of the answer is quoted.
    """
    deadline = time.monotonic() + timeout
    try:
        target = Target(url)
        found = resolve(target.host, target.port, deadline)
        addresses = [ipaddress.ip_address(str(address[0]).partition("%")[0]) for _, address in found]
        good = [each for each, at in zip(found, addresses, strict=True) if target.permitted(at, allowed)]
        if not good:
            where = ", ".join(str(at) for at in addresses[:_MOST_ADDRESSES])
            if any(is_public(at) for at in addresses):
                raise Unsent(f"{where}: without TLS nothing is sent to a public address")
            raise Unsent(f"{where} is not public, and not allowed")
        sock = _first(good[:_MOST_ADDRESSES], deadline)
        with contextlib.closing(sock):
            if target.secure:
                sock.settimeout(_left(deadline))
                sock = (context or ssl.create_default_context()).wrap_socket(
                    sock, server_hostname=target.host
                )
            with contextlib.closing(sock):
                return _exchange(sock, target, body, headers, deadline)
    except BadInputError as error:
        raise Unsent(str(error)) from error
    except TimeoutError as error:
        raise Unsent(f"it took longer than {timeout:g} s") from error
    except ssl.SSLCertVerificationError as error:
        raise Unsent(f"its certificate is not good: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise Unsent(f"TLS failed: {error.reason or 'the connection ended'}") from error
    except OSError as error:
        raise Unsent(error.strerror or type(error).__name__) from error
    except http.client.HTTPException as error:
        raise Unsent(f"the answer is not HTTP: {type(error).__name__}") from error


def _first(good: Sequence[tuple[socket.AddressFamily, SocketAddress]], deadline: float) -> socket.socket:
    """The first that takes a connection; each has its share of the time, so that a dead one leaves some."""
    for at, (family, address) in enumerate(good):
        last = at == len(good) - 1
        share = deadline if last else time.monotonic() + _left(deadline) / (len(good) - at)
        try:
            return _connect(family, address, share)
        except OSError:
            if last:
                raise
    raise AssertionError


def _exchange(
    sock: socket.socket, target: Target, body: bytes, headers: Mapping[str, str], deadline: float
) -> int:
    timed: Any = _Timed(sock, deadline)
    connection = http.client.HTTPConnection(target.host, target.port)
    connection.sock = timed
    connection.auto_open = 0
    connection.putrequest("POST", target.path, skip_host=True, skip_accept_encoding=True)
    for name, value in {
        "Host": target.header, "Content-Length": str(len(body)), "Connection": "close", **headers
    }.items():  # fmt: skip
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    if 300 <= response.status < 400:
        raise Unsent(f"it answers with a redirect ({response.status}), and none is followed", response.status)
    if not 200 <= response.status < 300:
        raise Unsent(f"it answers {response.status}", response.status)
    # Whoever is still writing is let finish, within bounds. What it says has been said.
    timed.reader.deadline = min(deadline, time.monotonic() + _REST)
    with contextlib.suppress(OSError, http.client.HTTPException, Unsent):
        response.read(_MOST_READ)
    return response.status
