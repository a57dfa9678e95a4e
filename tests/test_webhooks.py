"""Webhooks: what is queued with a decision, how it is sent, and what others make of it."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cluster import Cluster
from conftest import Database, _ca, fresh_database
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from test_worker import stored_key, until

from kakunin_db import BadInputError, LocalSigner, WebhookVerificationError, verify_webhook
from kakunin_db.cli import main
from kakunin_db.ledger.worker import Metrics
from kakunin_db.webhooks import SecretKeys, new_secret, sending, signed_headers
from kakunin_db.webhooks.deliverer import Deliverer, Settings
from kakunin_db.webhooks.sending import Target, Unsent, is_public, parse_networks, post

KEY = base64.b64encode(bytes(range(32))).decode()
KEYS = SecretKeys([KEY])
LOOPBACK = parse_networks("127.0.0.0/8")
EVENTS = [
    "agent.created", "agent.high_risk", "agent.suspended", "certificate.expired", "certificate.issued",
    "certificate.revoked",
]  # fmt: skip


# Receivers --------------------------------------------------------------------------------------------

Request = tuple[dict[str, str], bytes]


class Receiver(ThreadingHTTPServer):
    """Keeps what it is sent. ``answer`` is a status, or what handles the request instead."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[Request] = []
        self.answer: int | Callable[[_Handler], None] = 200
        self.location = ""
        self.scheme = "https" if context else "http"
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.server_port}/hook?a=b"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up is not what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((dict(self.headers), body))
        if callable(self.server.answer):
            self.server.answer(self)
            return
        self.send_response(self.server.answer)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(context: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    with Receiver(context) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving() as server:
        yield server


@contextlib.contextmanager
def talking(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that reads the request's head and then does as it likes."""

    def talk(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.recv(65536)
            answer(client)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=talk, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost, its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return path


# Signatures -------------------------------------------------------------------------------------------

# Of the Standard Webhooks specification, "Signature scheme".
PUBLISHED = {
    "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "timestamp": 1614265330,
    "payload": b'{"test": 2432232314}',
    "signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}


def test_the_published_signature() -> None:
    p: dict[str, Any] = PUBLISHED
    headers = signed_headers(p["payload"], [p["secret"]], p["id"], p["timestamp"])
    assert headers["webhook-signature"] == p["signature"]
    assert verify_webhook(p["payload"], headers, p["secret"], now=p["timestamp"]) == {"test": 2432232314}


def test_another_implementation_agrees_both_ways() -> None:
    standardwebhooks = pytest.importorskip("standardwebhooks")
    secret, body = new_secret(), '{"type":"agent.created","data":{"name":"\u00e9"}}'.encode()
    theirs = standardwebhooks.Webhook(secret)
    assert theirs.verify(body, signed_headers(body, [new_secret(), secret], "msg_1")) == json.loads(body)
    now = dt.datetime.now(dt.timezone.utc)
    headers = {
        "Webhook-Id": "msg_2",
        "Webhook-Timestamp": str(int(now.timestamp())),
        "Webhook-Signature": theirs.sign("msg_2", now, body.decode()),
    }
    assert verify_webhook(body, headers, secret) == json.loads(body)


def kakunin_only(headers: dict[str, str]) -> dict[str, str]:
    return {"x-kakunin-signature": headers["X-Kakunin-Signature"]}


def standard_only(headers: dict[str, str]) -> dict[str, str]:
    return {name.upper(): value for name, value in headers.items() if name.startswith("webhook-")}


@pytest.mark.parametrize("family", [kakunin_only, standard_only, dict])
def test_a_signature_is_of_one_secret_body_and_time(family: Callable[..., dict[str, str]]) -> None:
    secret, body, now = new_secret(), b'{"type":"x"}', 1_800_000_000
    headers = family(signed_headers(body, [secret], "msg_1", now))
    for at in (now, now - 300, now + 300):
        assert verify_webhook(body, headers, secret, now=at) == {"type": "x"}
    assert verify_webhook(body, headers, secret, now=now + 900, tolerance=900)
    for wrong in (
        lambda: verify_webhook(body + b" ", headers, secret, now=now),
        lambda: verify_webhook(body, headers, new_secret(), now=now),
        lambda: verify_webhook(body, headers, secret, now=now + 301),
        lambda: verify_webhook(body, headers, secret, now=now - 301),
        lambda: verify_webhook(body, headers, secret),
        lambda: verify_webhook(body, {}, secret, now=now),
        lambda: verify_webhook(body, {name: ["x"] for name in headers}, secret, now=now),  # type: ignore[arg-type]
        lambda: verify_webhook(body, headers, secret, now=float("nan")),
    ):
        with pytest.raises(WebhookVerificationError):
            wrong()


def test_both_secrets_verify_while_one_takes_over() -> None:
    old, new, body = new_secret(), new_secret(), b"{}"
    headers = signed_headers(body, [new, old], "msg_1")
    for family in (kakunin_only, standard_only):
        for secret in (old, new):
            assert verify_webhook(body, family(headers), secret) == {}


def test_the_id_is_signed() -> None:
    secret = new_secret()
    headers = signed_headers(b"{}", [secret], "msg_1")
    with pytest.raises(WebhookVerificationError, match="signature"):
        verify_webhook(b"{}", {**headers, "webhook-id": "msg_2"}, secret)
    # And the family that does not sign it is not taken in its place.
    with pytest.raises(WebhookVerificationError, match="missing"):
        verify_webhook(b"{}", {"webhook-id": "msg_2", **kakunin_only(headers)}, secret)


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "x", "whsec_!!!!", "whsec_" + "A" * 28, None, "whsec_\u00e9" * 9]
)
def test_g8_without_a_real_secret_nothing_is_verified(secret: Any) -> None:
    with pytest.raises(BadInputError, match="whsec_"):
        verify_webhook(b"{}", {}, secret)


@pytest.mark.parametrize("body", [b"[]", b"1", b"nothing", b"\xff", b"[" * 100_000])
def test_g8_signed_but_no_message(body: bytes) -> None:
    secret = new_secret()
    with pytest.raises(WebhookVerificationError, match="JSON"):
        verify_webhook(body, signed_headers(body, [secret], "m"), secret)


_header_text = st.one_of(
    st.text(max_size=60),
    st.text("v1,=t0123456789abcdef+/ .", max_size=60),
    st.just("v1,"),
    st.just("t=1,v1="),
)


_header_name = st.sampled_from(
    ["webhook-id", "webhook-timestamp", "Webhook-Signature", "X-Kakunin-Signature"]
)


@settings(deadline=None)
@given(st.dictionaries(_header_name, _header_text))
def test_g8_whatever_the_headers_hold(headers: dict[str, str]) -> None:
    with pytest.raises(WebhookVerificationError):
        verify_webhook(b"{}", headers, "whsec_" + "A" * 32, now=1)


def test_secrets_at_rest() -> None:
    secret, installation, endpoint = new_secret(), uuid.uuid4(), uuid.uuid4()
    other = base64.b64encode(bytes(32)).decode()
    sealed = KEYS.encrypt(secret, installation, endpoint)
    assert sealed != KEYS.encrypt(secret, installation, endpoint)
    assert base64.b64decode(secret[6:]) not in sealed
    assert KEYS.decrypt(sealed, installation, endpoint) == secret
    assert SecretKeys.parse(f"{other}\n{KEY}\n").decrypt(sealed, installation, endpoint) == secret
    for keys, where in (
        (SecretKeys([other]), (installation, endpoint)),
        (KEYS, (uuid.uuid4(), endpoint)),
        (KEYS, (installation, uuid.uuid4())),
        (KEYS, (endpoint, installation)),
    ):
        with pytest.raises(BadInputError, match="another"):
            keys.decrypt(sealed, *where)
    for spoiled in (
        b"",
        sealed[:-1],
        bytes([sealed[0] ^ 1]) + sealed[1:],
        sealed[:-1] + bytes([sealed[-1] ^ 1]),
    ):
        with pytest.raises(BadInputError):
            KEYS.decrypt(spoiled, installation, endpoint)
    for bad in ("", "x", base64.b64encode(bytes(31)).decode(), "\u00e9" * 44):
        with pytest.raises(BadInputError, match="key for webhooks"):
            SecretKeys.parse(bad)


# Where it may be sent ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255",
        "192.168.1.1", "169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.8", "192.0.2.1",
        "192.88.99.1", "198.18.0.1", "198.51.100.1", "203.0.113.9", "224.0.0.1", "239.255.255.255",
        "240.0.0.1", "255.255.255.255", "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
        "64:ff9b::127.0.0.1", "64:ff9b::8.8.8.8", "64:ff9b:1::1", "100::1", "fe80::1", "fec0::1", "fc00::1",
        "fd12:3456::1", "ff02::1", "2001::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::",
        "3fff::1",        "5f00::1",
    ],
)  # fmt: skip
def test_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "LOCALHOST", "localhost.", "127.1", "0x7f.1", "0x7f000001", "2130706433",
        "017700000001", "0177.0.0.01", "0", "0.0.0.0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "169.254.169.254",
        "10.1.2.3", "[fe80::1]", "[fd00::1]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_private_address_is_refused_however_it_is_spelt(
    host: str, scheme: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_connect", lambda *_: pytest.fail("connected"))
    with pytest.raises(Unsent, match="not public, and not allowed|does not resolve|public address"):
        post(f"{scheme}://{host}:{receiver.server_port}/", b"{}", {})
    assert receiver.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.test/", "file:///etc/passwd", "a.test", "https://", "https:///x", "https://user@a.test/",
        "https://user:password@a.test/", "https://@a.test/", "https://a.test/#x", "https://a.test/x#",
        "https://a.test/ x", "https://a.test/\r\nX: y", "https://a.test\\@b.test/", "https://a.test\\b/",
        "https://a.test:99999/", "https://a.test:x/", "https://a.test:0/", "https://%31%32%37.0.0.1/",
        "https://[fe80::1%25eth0]/", "https://[::1", "https://[v1.x]/", "https://\u00e9.test/",
        "https://a.test/" + "x" * 1000, "https://127.0.0.1:80@a.test/", "https://a.test;b/", "https://.test/",
    ],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(BadInputError):
        Target(url)


def addresses(*given: str) -> Callable[..., Any]:
    """A resolver that gives these, whatever it is asked."""

    def resolve(host: str, port: int, deadline: float) -> Any:
        return [(socket.AF_INET6 if ":" in at else socket.AF_INET, (at, port)) for at in given]

    return resolve


def test_what_may_be_sent_where() -> None:
    private, public = ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("8.8.8.8")
    allowed = parse_networks("10.1.0.0/16 fd00::/8,::1/128")
    everything = parse_networks("0.0.0.0/0")
    https, http = Target("https://a.test"), Target("http://a.test")
    assert https.permitted(public, [])
    assert not https.permitted(private, [])
    assert https.permitted(private, allowed)
    assert http.permitted(private, allowed)
    assert not https.permitted(ipaddress.ip_address("10.2.0.1"), allowed)
    assert not http.permitted(public, everything)
    for bad in ("x", "10.0.0.1/8", "10.0.0.0/33"):
        with pytest.raises(BadInputError):
            parse_networks(bad)


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: public when it is asked first, loopback afterwards."""
    asked: list[str] = []
    connected: list[Any] = []

    def getaddrinfo(host: Any, port: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        at = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (at, receiver.server_port))]

    def connect(family: Any, address: Any, deadline: float) -> Any:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(sending, "_connect", connect)
    with pytest.raises(Unsent, match="refused"):
        post(f"https://rebinding.test:{receiver.server_port}/", b"{}", {})
    assert (asked, connected) == (["rebinding.test"], ["8.8.8.8"])
    with pytest.raises(Unsent, match="not public"):
        post(f"https://rebinding.test:{receiver.server_port}/", b"{}", {})
    assert connected == ["8.8.8.8"]


def test_of_several_addresses_only_those_that_may_be_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def connect(family: Any, address: Any, deadline: float) -> Any:
        tried.append(address[0])
        raise TimeoutError

    monkeypatch.setattr(sending, "_connect", connect)
    resolve = addresses("10.0.0.1", "8.8.8.8", "::1", "2606:4700::1", "fe80::1")
    with pytest.raises(Unsent, match="longer"):
        post("https://a.test/", b"", {}, resolve=resolve)
    assert tried == ["8.8.8.8", "2606:4700::1"]


def test_an_address_that_is_dead_leaves_time_for_the_next(receiver: Receiver) -> None:
    # 127.0.0.2 is loopback too, and nobody listens there.
    resolve = addresses("127.0.0.2", "127.0.0.1")
    assert post(receiver.url, b"{}", {}, allowed=LOOPBACK, resolve=resolve) == 200


# Sending ----------------------------------------------------------------------------------------------


def send(url: str, **options: Any) -> int:
    return post(url, b"{}", {"X-Test": "1"}, allowed=LOOPBACK, **options)


def test_what_is_sent(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert send(receiver.url) == 200
    [(headers, body)] = receiver.requests
    assert body == b"{}"
    assert headers == {
        "Host": f"localhost:{receiver.server_port}", "Content-Length": "2", "Connection": "close",
        "X-Test": "1",
    }  # fmt: skip


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 304])
def test_no_redirect_is_followed(receiver: Receiver, status: int) -> None:
    with serving() as inside:
        receiver.answer, receiver.location = status, inside.url
        with pytest.raises(Unsent, match=rf"redirect \({status}\)") as refused:
            send(receiver.url)
        assert refused.value.status == status
        assert inside.requests == []


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503])
def test_what_is_not_2xx_has_failed(receiver: Receiver, status: int) -> None:
    receiver.answer = status
    with pytest.raises(Unsent, match=str(status)):
        send(receiver.url)


def drip(piece: bytes) -> Callable[[socket.socket], None]:
    def answer(client: socket.socket) -> None:
        for _ in range(600):
            client.sendall(piece)
            time.sleep(0.05)

    return answer


def flood(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
    def answer(client: socket.socket) -> None:
        client.sendall(head)
        for _ in range(100_000):
            client.sendall(piece * 100)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b""),
        drip(b"H"),
        lambda client: (client.sendall(b"HTTP/1.1 200 OK\r\n"), drip(b"X: y\r\n")(client)),
        drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["silence", "status line", "headers", "continue"],
)
def test_who_answers_by_drops_is_left_at_the_deadline(answer: Callable[[socket.socket], None]) -> None:
    with talking(answer) as port:
        began = time.monotonic()
        with pytest.raises(Unsent, match="longer than 1 s"):
            send(f"http://127.0.0.1:{port}/", timeout=1)
        assert 0.9 < time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", b"A"),
        (b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 1000 + b"\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["no HTTP", "headers", "continue"],
)
def test_an_endless_head_is_not_read_to_its_end(head: bytes, piece: bytes) -> None:
    with talking(flood(head, piece)) as port:
        with pytest.raises(Unsent, match="no end|not HTTP"):
            send(f"http://127.0.0.1:{port}/", timeout=30)


@pytest.mark.parametrize(
    "body",
    [
        flood(b"HTTP/1.1 200 OK\r\n\r\n", b"A" * 1000),
        lambda client: (client.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), drip(b"A")(client)),
    ],
    ids=["huge", "drops"],
)
def test_an_endless_body_delays_nothing(body: Callable[[socket.socket], None]) -> None:
    with talking(body) as port:
        began = time.monotonic()
        assert send(f"http://127.0.0.1:{port}/", timeout=30) == 200
        assert time.monotonic() - began < 3


def test_a_receiver_that_reads_by_drops_is_left_at_the_deadline() -> None:
    with talking(lambda client: time.sleep(30)) as port:
        began = time.monotonic()
        with pytest.raises(Unsent, match="longer"):
            post(f"http://127.0.0.1:{port}/", bytes(50_000_000), {}, allowed=LOOPBACK, timeout=1)
        assert time.monotonic() - began < 3


def test_a_name_that_resolves_too_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(30) and [])
    with pytest.raises(Unsent, match="longer than 0.3 s"):
        post("https://slow.test/", b"", {}, timeout=0.3)
    done.set()


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 99999 x\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x46"]
)
def test_what_is_not_http(answer: bytes) -> None:
    with talking(lambda client: client.sendall(answer)) as port:
        for scheme in ("http", "https"):
            with pytest.raises(Unsent):
                send(f"{scheme}://127.0.0.1:{port}/", timeout=5)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(Unsent, match="refused"):
        send(f"http://127.0.0.1:{port}/")


def test_tls_is_verified_by_the_name(tls: Path) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tls)
    trusting = ssl.create_default_context(cafile=str(tls))
    with serving(server) as receiver:
        assert send(receiver.url, context=trusting) == 200
        with pytest.raises(Unsent, match="certificate is not good"):
            send(receiver.url)  # an authority that nobody knows
        other = f"https://other.test:{receiver.server_port}/"
        with pytest.raises(Unsent, match="certificate is not good"):
            send(other, context=trusting, resolve=addresses("127.0.0.1"))
        with pytest.raises(Unsent, match="certificate is not good"):
            send(f"https://127.0.0.1:{receiver.server_port}/", context=trusting)
        assert len(receiver.requests) == 1


# In the database --------------------------------------------------------------------------------------


@pytest.fixture
def hooks(cluster: Cluster) -> Iterator[Database]:
    with fresh_database(cluster) as database:
        yield database


def add(database: Database, url: str, events: list[str] = EVENTS) -> tuple[uuid.UUID, str]:
    endpoint, secret = uuid.uuid4(), new_secret()
    sealed = KEYS.encrypt(secret, database.installation_id, endpoint)
    database.run("operator", "select kakunin.add_webhook(%s, %s, %s, %s)", [endpoint, url, events, sealed])
    return endpoint, secret


def deliverer(database: Database, **options: Any) -> Deliverer:
    options = {"keys": KEYS, "allowed": LOOPBACK, "settings": Settings(poll=0.05, timeout=5), **options}
    return Deliverer(database.dsn("worker"), **options)


def deliver(database: Database, **options: Any) -> int:
    with database.connect("worker", autocommit=True) as worker:
        return deliverer(database, **options).deliver(worker)


def deliveries(database: Database, columns: str = "event_type, state") -> list[tuple[Any, ...]]:
    return database.run(
        "operator", f"select {columns} from kakunin.webhook_deliveries order by created_at, event_type"
    )


def later(database: Database, by: str) -> None:
    """Moves the kit's clock from now on."""
    database.run(
        "installer",
        "create or replace function kakunin_private.clock() returns timestamptz language sql volatile"
        f" parallel safe return clock_timestamp() + interval '{by}'",
    )


def messages(receiver: Receiver, secret: str) -> list[dict[str, Any]]:
    return [verify_webhook(body, headers, secret) for headers, body in receiver.requests]


def test_every_event_reaches_its_receiver_signed(hooks: Database, receiver: Receiver) -> None:
    _, secret = add(hooks, receiver.url)
    agent = hooks.agent("one", lifetime=dt.timedelta(hours=1))
    other = hooks.agent("two")
    hooks.run("operator", "select kakunin.halt_agent(%s, 'why')", [other.agent_id])
    hooks.run(
        "installer",
        "select kakunin_private.record('agent.high_risk', %s, '{\"score\": 0.8}')", [agent.agent_id],
    )  # fmt: skip
    later(hooks, "2 hours")
    assert hooks.value("worker", "select kakunin.expire_certificates()") == 1
    count = deliver(hooks, metrics=(metrics := Metrics()))
    while more := deliver(hooks):
        count += more
    got = messages(receiver, secret)
    assert count == len(got) == 8
    assert metrics.counters["kakunin_webhooks_delivered"] == 4
    told = {(m["type"], m["data"]["agent_id"], m["data"].get("serial")) for m in got}
    assert told == {
        ("agent.created", str(agent.agent_id), None),
        ("certificate.issued", str(agent.agent_id), agent.serial),
        ("agent.high_risk", str(agent.agent_id), None),
        ("certificate.expired", str(agent.agent_id), agent.serial),
        ("agent.created", str(other.agent_id), None),
        ("certificate.issued", str(other.agent_id), other.serial),
        ("agent.suspended", str(other.agent_id), None),
        ("certificate.revoked", str(other.agent_id), other.serial),
    }
    assert {state for _, state in deliveries(hooks)} == {"delivered"}
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 8
    # Each is an entry of the ledger, word for word.
    entries = {
        row[0]: row[1:]
        for row in hooks.run("auditor", "select event_id, event_type, metadata, entry from kakunin.audit_log")
    }
    for message in got:
        data = message["data"]
        event_type, metadata, entry = entries[data["event_id"]]
        assert message["type"] == event_type
        assert data.items() >= metadata.items()
        assert data["installation"] == str(hooks.installation_id)
        assert message["timestamp"] == json.loads(entry)["recorded_at"]
    for headers, body in receiver.requests:
        assert headers["Content-Type"] == "application/json"
        verify_webhook(body, kakunin_only(headers), secret)


def test_the_outbox_is_written_with_the_decision_or_not_at_all(hooks: Database) -> None:
    add(hooks, "https://a.test")
    agent = hooks.agent()
    before = deliveries(hooks, "message_id")
    with hooks.connect("operator") as operator:
        operator.execute("select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
        assert deliveries(hooks, "message_id") == before  # not before it is committed
        operator.rollback()
        assert deliveries(hooks, "message_id") == before
        operator.execute("select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
    assert len(deliveries(hooks)) == len(before) + 2


def test_only_what_an_enabled_endpoint_wants_is_queued(hooks: Database) -> None:
    endpoint, _ = add(hooks, "https://a.test/one", ["certificate.revoked"])
    add(hooks, "https://a.test/two", ["certificate.revoked", "certificate.issued"])
    hooks.run("operator", "select kakunin.enable_webhook(%s, false)", [endpoint])
    hooks.agent().revoke()
    assert deliveries(hooks) == [("certificate.issued", "pending"), ("certificate.revoked", "pending")]
    hooks.run("operator", "select kakunin.enable_webhook(%s)", [endpoint])
    agent = hooks.agent()
    agent.revoke()
    assert len(deliveries(hooks)) == 2 + 3
    # One message for both: the same id.
    assert hooks.value("postgres", "select count(*) from kakunin_private.webhook_messages") == 4
    hooks.run("operator", "select kakunin.reinstate_agent(%s)", [agent.agent_id])
    hooks.run("operator", "select kakunin.rotate_session_key()")
    assert len(deliveries(hooks)) == 5


def test_nothing_is_queued_where_nobody_listens(hooks: Database) -> None:
    hooks.agent().revoke()
    assert hooks.value("postgres", "select count(*) from kakunin_private.webhook_messages") == 0


def test_retries_back_off_until_it_is_dead_and_are_replayed(hooks: Database, receiver: Receiver) -> None:
    endpoint, secret = add(hooks, receiver.url, ["certificate.revoked"])
    hooks.agent().revoke()
    receiver.answer = 503
    waits = []
    moved = 0.0
    for attempt in range(1, 11):
        assert deliver(hooks) == 1, attempt
        assert deliver(hooks) == 0, attempt  # not due
        [(state, attempts, status, error, wait)] = deliveries(
            hooks,
            "state, attempts, last_status, last_error,"
            " extract(epoch from next_attempt_at - last_attempt_at)::float8",
        )
        assert (attempts, status) == (attempt, 503)
        assert "503" in error
        if attempt < 10:
            assert state == "pending"
            waits.append(wait)
            moved += wait
            later(hooks, f"{moved} seconds")
    assert (state, wait) == ("dead", None)
    schedule = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    for waited, planned in zip(waits, schedule, strict=True):
        assert 0.8 * planned - 1 <= waited <= 1.2 * planned + 5  # the attempt itself takes a moment
    assert moved < 4 * 86400
    later(hooks, "30 days")
    assert deliver(hooks) == 0
    assert hooks.value("worker", "select kakunin.webhook_status()")["dead"] == 1
    receiver.answer = 200
    assert hooks.value("operator", "select kakunin.replay_webhooks(endpoint_id => %s)", [endpoint]) == 1
    assert deliver(hooks) == 1
    assert deliveries(hooks, "state, attempts") == [("delivered", 1)]
    # The receiver can tell.
    assert len({headers["webhook-id"] for headers, _ in receiver.requests}) == 1
    assert len(receiver.requests) == 11
    assert len({body for _, body in receiver.requests}) == 1
    verify_webhook(receiver.requests[-1][1], receiver.requests[-1][0], secret)
    replayed = "select metadata from kakunin.audit_log where event_type = 'webhook.replayed'"
    assert hooks.run("auditor", replayed) == [
        ({"message_id": None, "endpoint_id": str(endpoint), "deliveries": 1},)
    ]


def test_the_waiting_is_not_the_same_for_all(hooks: Database, receiver: Receiver) -> None:
    add(hooks, receiver.url, ["agent.created"])
    receiver.answer = 500
    for _ in range(8):
        hooks.run("registrar", "select kakunin.create_agent('a')")
    while deliver(hooks):
        pass
    waits = {
        round(row[0], 2) for row in deliveries(hooks, "extract(epoch from next_attempt_at - last_attempt_at)")
    }
    assert len(waits) > 4


def test_replaying(hooks: Database, receiver: Receiver) -> None:
    endpoint, _ = add(hooks, receiver.url, ["certificate.revoked"])
    hooks.agent().revoke()
    hooks.agent().revoke()
    assert deliver(hooks) == 2
    [one, two] = [row[0] for row in deliveries(hooks, "message_id")]

    def replay(**named: Any) -> int:
        given = ", ".join(f"{name} => %({name})s" for name in named)
        return hooks.value("operator", f"select kakunin.replay_webhooks({given})", named)

    assert replay(endpoint_id=endpoint) == 0  # what was delivered, by its name alone
    assert replay(message_id="msg_0") == replay(message_id=one, endpoint_id=uuid.uuid4()) == 0
    assert replay(message_id=one) == 1
    assert deliver(hooks) == 1
    assert [headers["webhook-id"] for headers, _ in receiver.requests].count(one) == 2
    # Not while it is under way.
    assert replay(message_id=two) == 1
    with hooks.connect("worker", autocommit=True) as worker:
        assert len(worker.execute("select * from kakunin.claim_webhooks()").fetchall()) == 1
        assert replay(message_id=two) == 0
    with pytest.raises(psycopg.Error) as refused:
        replay()
    assert refused.value.sqlstate == "KA010"


def test_what_is_leased_is_nobody_elses_and_comes_back(hooks: Database) -> None:
    add(hooks, "https://a.test", ["certificate.revoked"])
    hooks.agent().revoke()
    claim = "select message_id, endpoint_id, attempt from kakunin.claim_webhooks('10 seconds')"
    [(message, endpoint, first)] = hooks.run("worker", claim)
    assert hooks.run("worker", claim) == []
    later(hooks, "11 seconds")
    assert hooks.run("worker", claim) == [(message, endpoint, first + 1)]
    report = "select kakunin.report_webhook(%s, %s, %s, %s, %s)"
    # The first is overtaken: its failure says nothing, its success does.
    assert hooks.value("worker", report, [message, endpoint, first, 500, "late"]) is None
    assert deliveries(hooks, "state, last_error") == [("pending", None)]
    assert hooks.value("worker", report, [message, endpoint, first, 200, None]) == "delivered"
    assert hooks.value("worker", report, [message, endpoint, first + 1, 500, "x"]) is None
    assert deliveries(hooks, "state, last_error") == [("delivered", None)]


def test_one_that_ends_the_worker_each_time_is_given_up(hooks: Database) -> None:
    add(hooks, "https://a.test", ["certificate.revoked"])
    hooks.agent().revoke()
    for attempt in range(1, 11):
        later(hooks, f"{attempt} hours")
        assert len(hooks.run("worker", "select * from kakunin.claim_webhooks()")) == 1
    later(hooks, "11 hours")
    assert hooks.run("worker", "select * from kakunin.claim_webhooks()") == []
    assert deliveries(hooks, "state, last_error") == [("dead", "the worker ended during the last attempt")]


def test_claims_at_once_never_overlap_and_leave_room_for_others(hooks: Database) -> None:
    add(hooks, "https://slow.test", ["agent.created"])
    for _ in range(30):
        hooks.run("registrar", "select kakunin.create_agent('a')")
    assert len(hooks.run("worker", "select * from kakunin.claim_webhooks()")) == 4
    assert hooks.run("worker", "select * from kakunin.claim_webhooks()") == []
    add(hooks, "https://quick.test", ["agent.created"])
    hooks.run("registrar", "select kakunin.create_agent('a')")
    [(url,)] = hooks.run("worker", "select url from kakunin.claim_webhooks()")
    assert url == "https://quick.test"
    hooks.run("postgres", "update kakunin_private.webhook_deliveries set leased_until = null, attempts = 0")
    with hooks.connect("worker") as one, hooks.connect("worker", autocommit=True) as two:
        claim = "select message_id, endpoint_id from kakunin.claim_webhooks()"
        first = one.execute(claim).fetchall()
        two.execute("set lock_timeout = '2s'")
        second = two.execute(claim).fetchall()
        assert first
        assert not set(first) & set(second)


def test_what_takes_something_away_goes_ahead(hooks: Database) -> None:
    add(hooks, "https://a.test")
    agent = hooks.agent()
    for _ in range(20):
        hooks.run("registrar", "select kakunin.create_agent('a')")
    hooks.run("operator", "select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
    claimed = hooks.run("worker", "select payload from kakunin.claim_webhooks()")
    types = [json.loads(payload)["type"] for (payload,) in claimed]
    assert {"agent.suspended", "certificate.revoked"} < set(types)
    assert len(types) == 4


def test_two_deliverers_send_each_message_once(hooks: Database, receiver: Receiver) -> None:
    add(hooks, receiver.url, ["agent.created"])
    for _ in range(40):
        hooks.run("registrar", "select kakunin.create_agent('a')")
    with running(deliverer(hooks)), running(deliverer(hooks)):
        until(lambda: {state for _, state in deliveries(hooks)} == {"delivered"}, "the delivery of all")
    assert len(receiver.requests) == len({headers["webhook-id"] for headers, _ in receiver.requests}) == 40


@contextlib.contextmanager
def running(work: Deliverer) -> Iterator[Deliverer]:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield work
    finally:
        work.stop()
        thread.join(30)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def test_g3_word_of_a_revocation_comes_in_under_2_s_though_others_do_not_answer(
    hooks: Database, receiver: Receiver
) -> None:
    at: list[float] = []
    receiver.answer = lambda handler: (
        at.append(time.monotonic()),
        handler.send_response(200),
        handler.end_headers(),
    )
    with talking(drip(b"")) as silent, talking(drip(b"HTTP/1.1 100 Continue\r\n\r\n")) as drops:
        for port in (silent, silent, drops):
            add(hooks, f"http://127.0.0.1:{port}/", ["agent.created", "certificate.revoked"])
        agents = [hooks.agent() for _ in range(5)]
        add(hooks, receiver.url, ["certificate.revoked"])
        work = deliverer(hooks, settings=Settings(timeout=3))  # and the default poll
        with running(work):
            until(lambda: work.metrics.gauges["kakunin_webhooks_pending"], "the first round")
            for agent in agents:
                at.clear()
                agent.revoke()
                committed = time.monotonic()
                until(lambda: at, "the word of it")
                assert at[0] - committed < 2
        assert work.metrics.gauges["kakunin_webhooks_oldest_pending_seconds"] > 0


def test_stopping_reports_what_was_under_way(hooks: Database, receiver: Receiver) -> None:
    arrived = threading.Event()

    def answer(handler: _Handler) -> None:
        arrived.set()
        time.sleep(0.5)
        handler.send_response(200)
        handler.end_headers()

    receiver.answer = answer
    add(hooks, receiver.url, ["agent.created"])
    with running(deliverer(hooks)):
        hooks.run("registrar", "select kakunin.create_agent('a')")
        assert arrived.wait(30)
    assert deliveries(hooks) == [("agent.created", "delivered")]


def test_g9_a_lost_connection_is_made_again(hooks: Database, receiver: Receiver) -> None:
    _, secret = add(hooks, receiver.url, ["agent.created"])
    with running(deliverer(hooks)) as work:
        for name in ("before", "after"):
            hooks.run("registrar", "select kakunin.create_agent(%s)", [name])
            until(lambda name=name: name in [m["data"]["name"] for m in messages(receiver, secret)], name)
            hooks.run(
                "postgres",
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where usename = 'worker' and datname = current_database()",
            )
        until(lambda: work.metrics.errors["database"], "the loss")


def test_a_login_without_the_role_is_told(database: Database) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        Deliverer(database.dsn("stranger"), KEYS).run()


def test_the_old_secret_signs_as_well_for_a_while(hooks: Database, receiver: Receiver) -> None:
    endpoint, old = add(hooks, receiver.url, ["agent.created"])
    new = new_secret()
    sealed = KEYS.encrypt(new, hooks.installation_id, endpoint)
    hooks.run("operator", "select kakunin.rotate_webhook(%s, %s, '1 hour')", [endpoint, sealed])
    hooks.run("registrar", "select kakunin.create_agent('a')")
    assert deliver(hooks) == 1
    assert messages(receiver, old) == messages(receiver, new)
    later(hooks, "61 minutes")
    receiver.requests.clear()
    hooks.run("registrar", "select kakunin.create_agent('a')")
    assert deliver(hooks) == 1
    assert messages(receiver, new)
    with pytest.raises(WebhookVerificationError):
        messages(receiver, old)
    hooks.run("operator", "select kakunin.rotate_webhook(%s, %s, '0')", [endpoint, sealed])
    previous = "select previous_secret, previous_until from kakunin_private.webhook_endpoints"
    assert hooks.run("postgres", previous) == [(None, None)]


def test_a_copy_of_the_database_tells_the_first_ones_receivers_nothing(
    hooks: Database, receiver: Receiver
) -> None:
    add(hooks, receiver.url, ["agent.created"])
    hooks.run("installer", "select kakunin.renew_installation()")
    hooks.run("registrar", "select kakunin.create_agent('a')")
    assert deliver(hooks) == 1
    assert receiver.requests == []
    assert "another key" in deliveries(hooks, "last_error")[0][0]
    assert deliveries(hooks) == [("agent.created", "pending")]


def test_a_private_receiver_is_refused_unless_it_is_allowed(hooks: Database, receiver: Receiver) -> None:
    add(hooks, receiver.url, ["agent.created"])
    hooks.run("registrar", "select kakunin.create_agent('a')")
    assert deliver(hooks, allowed=parse_networks("10.0.0.0/8")) == 1
    assert receiver.requests == []
    assert "not public" in deliveries(hooks, "last_error")[0][0]


def test_what_is_old_and_done_is_deleted(hooks: Database, receiver: Receiver) -> None:
    add(hooks, receiver.url, ["agent.created"])
    add(hooks, receiver.url, ["agent.created"])
    waiting, _ = add(hooks, "http://127.0.0.1:1/", ["agent.suspended"])
    agent = hooks.agent()
    agent.suspend()
    assert deliver(hooks) == 3
    later(hooks, "29 days")
    assert hooks.value("worker", "select kakunin.clean_webhooks()") == 0
    later(hooks, "31 days")
    assert hooks.value("worker", "select kakunin.clean_webhooks()") == 1
    assert deliveries(hooks) == [("agent.suspended", "pending")]
    hooks.run("operator", "select kakunin.remove_webhook(%s)", [waiting])
    assert deliveries(hooks) == []
    assert hooks.value("worker", "select kakunin.clean_webhooks()") == 1
    assert hooks.value("postgres", "select count(*) from kakunin_private.webhook_messages") == 0
    assert hooks.value("worker", "select kakunin.webhook_status()") == {
        "endpoints": 2, "disabled": 0, "pending": 0, "dead": 0, "oldest_pending_seconds": 0
    }  # fmt: skip


# Expiry -----------------------------------------------------------------------------------------------


def expired(database: Database) -> list[str]:
    rows = database.run(
        "auditor",
        "select metadata ->> 'serial' from kakunin.audit_log where event_type = 'certificate.expired'"
        " order by 1",
    )
    return [row[0] for row in rows]


def test_each_certificate_expires_once_and_a_revoked_one_not_at_all(hooks: Database) -> None:
    hour = dt.timedelta(hours=1)
    short = [hooks.agent(lifetime=hour) for _ in range(5)]
    revoked = hooks.agent(lifetime=hour)
    revoked.revoke()
    hooks.agent(lifetime=hour * 48)
    # Superseded, but its time ended before the overlap did.
    superseded = hooks.agent(lifetime=hour)
    hooks.renew(superseded, hour * 24, lifetime=hour * 100)
    expire = "select kakunin.expire_certificates(%s)"
    assert hooks.value("worker", expire, [2]) == 0
    later(hooks, "2 hours")
    assert [hooks.value("worker", expire, [2]) for _ in range(5)] == [2, 2, 2, 0, 0]
    assert expired(hooks) == sorted([*(agent.serial for agent in short), superseded.serial])
    later(hooks, "30 hours")
    # Late, and after the sweep has passed.
    hooks.run(
        "installer", "update kakunin_private.expiry_sweep set swept_until = swept_until - interval '10 hours'"
    )
    assert hooks.value("worker", expire, [1000]) == 0
    later(hooks, "3 days")
    assert hooks.value("worker", expire, [1000]) == 1
    later(hooks, "10 days")
    assert hooks.value("worker", expire, [1000]) == 1
    assert hooks.value("worker", expire, [1000]) == 0
    kept = "select count(*) from kakunin_private.expirations"
    assert hooks.value("postgres", kept) == 0  # markers do not stay


def test_a_registration_that_is_committed_late_is_found(hooks: Database) -> None:
    agent_id = hooks.value("registrar", "select kakunin.create_agent('late')")
    issued = _ca().issue(agent_id, LocalSigner.generate().public_key(), lifetime=dt.timedelta(hours=1))
    with hooks.connect("registrar") as registrar:
        issued.register(registrar)
        later(hooks, "12 hours")
        assert hooks.value("worker", "select kakunin.expire_certificates()") == 0
    assert hooks.value("worker", "select kakunin.expire_certificates()") == 1
    assert expired(hooks) == [issued.serial]


def test_two_workers_at_once_record_an_expiry_once(hooks: Database) -> None:
    agent = hooks.agent(lifetime=dt.timedelta(hours=1))
    later(hooks, "2 hours")
    with hooks.connect("worker") as one:
        assert one.execute("select kakunin.expire_certificates()").fetchone() == (1,)
        assert hooks.value("worker", "select kakunin.expire_certificates()") == 0  # and waits for nobody
        with hooks.connect("operator") as operator:
            operator.execute("set local lock_timeout = '500ms'")
            operator.execute("select kakunin.halt_agent(%s, 'why')", [agent.agent_id])
            operator.execute("select kakunin.revoke_certificate(%s)", [agent.serial])
    assert hooks.value("worker", "select kakunin.expire_certificates()") == 0
    assert expired(hooks) == [agent.serial]


# In nobody's way --------------------------------------------------------------------------------------


HELD = {
    "add": ("operator", "select kakunin.add_webhook(gen_random_uuid(), 'https://b.test', '{agent.created}',"
            " %(secret)s)"),
    "disable": ("operator", "select kakunin.enable_webhook(%(endpoint)s, false)"),
    "rotate": ("operator", "select kakunin.rotate_webhook(%(endpoint)s, %(secret)s)"),
    "remove": ("operator", "select kakunin.remove_webhook(%(endpoint)s)"),
    "test": ("operator", "select kakunin.test_webhook(%(endpoint)s)"),
    "replay": ("operator", "select kakunin.replay_webhooks(endpoint_id => %(endpoint)s)"),
    "claim": ("worker", "select count(*) from kakunin.claim_webhooks()"),
    "clean": ("worker", "select kakunin.clean_webhooks()"),
    "expire": ("worker", "select kakunin.expire_certificates()"),
    "tables": ("postgres", "lock table kakunin_private.webhook_endpoints, kakunin_private.webhook_messages,"
               " kakunin_private.webhook_deliveries in share update exclusive mode"),
    "its rows": ("postgres", "select from kakunin_private.webhook_endpoints for update"),
}  # fmt: skip


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("isolation", ["read committed", "serializable"])
def test_g3_a_halt_waits_for_nothing_that_webhooks_do(database: Database, held: str, isolation: str) -> None:
    endpoint, _ = add(database, "https://a.test")
    agent = database.agent()
    login, query = HELD[held]
    with database.connect(login) as holder:
        holder.execute(query, {"endpoint": endpoint, "secret": bytes(60)})
        with database.connect("operator") as operator:
            operator.execute(f"set transaction isolation level {isolation}")
            operator.execute("set local lock_timeout = '500ms'")
            operator.execute("select kakunin.halt_agent(%s, 'why', true)", [agent.agent_id])
        holder.rollback()
    queued = database.run(
        "operator",
        "select event_type from kakunin.webhook_deliveries where payload like %s and endpoint_id = %s",
        [f"%{agent.agent_id}%", endpoint],
    )
    assert {("agent.suspended",), ("certificate.revoked",)} < set(queued)
    for row in database.run("operator", "select endpoint_id from kakunin.webhook_endpoints"):
        database.run("operator", "select kakunin.remove_webhook(%s)", row)


def test_removing_and_queueing_at_once_leaves_nothing_that_is_sent(
    hooks: Database, receiver: Receiver
) -> None:
    endpoint, _ = add(hooks, receiver.url)
    with hooks.connect("registrar") as registrar:
        registrar.execute("select kakunin.create_agent('a')")
        hooks.run("operator", "select kakunin.remove_webhook(%s)", [endpoint])
    assert len(deliveries(hooks)) == 1
    assert deliver(hooks) == 0
    assert receiver.requests == []


# As an attacker ---------------------------------------------------------------------------------------


def test_g1_no_other_login_reads_or_changes_anything_of_it(database: Database) -> None:
    add(database, "https://a.test")
    tables = ["webhook_endpoints", "webhook_messages", "webhook_deliveries", "expirations", "expiry_sweep"]
    for login in ("agent_1", "gateway", "registrar", "operator", "worker", "auditor", "stranger"):
        with database.connect(login, autocommit=True) as session:
            for table in tables:
                with pytest.raises(psycopg.errors.InsufficientPrivilege), session.transaction():
                    session.execute(f"lock table kakunin_private.{table} in access share mode")
                for attempt in (
                    f"select * from kakunin_private.{table}",
                    f"insert into kakunin_private.{table} default values",
                    f"delete from kakunin_private.{table}",
                ):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        session.execute(attempt)
            for attempt in (
                "select kakunin_private.queue_webhook('certificate.revoked', null, '{}', null, null)",
                "select kakunin_private.record('certificate.revoked', null, '{}')",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute(attempt)
            if login != "operator":
                for view in ("webhook_endpoints", "webhook_deliveries"):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        session.execute(f"select * from kakunin.{view}")


def test_an_agents_entry_is_never_a_webhook(hooks: Database) -> None:
    add(hooks, "https://a.test")
    agent = hooks.agent()
    before = len(deliveries(hooks))
    ticket = hooks.ticket(agent, "agent_1")
    with hooks.connect("agent_1") as session:
        session.execute("select kakunin.bind_session(%s)", [ticket])
        for name in ("certificate_revoked", "certificate:revoked"):
            session.execute("select kakunin.audit_log_append(%s)", [name])
        with pytest.raises(psycopg.Error) as refused:
            session.execute("select kakunin.audit_log_append('certificate.revoked')")
        assert refused.value.sqlstate == "KA010"
    assert len(deliveries(hooks)) == before


def test_secrets_are_never_in_the_database_in_clear(hooks: Database, receiver: Receiver) -> None:
    endpoint, old = add(hooks, receiver.url)
    new = new_secret()
    sealed = KEYS.encrypt(new, hooks.installation_id, endpoint)
    hooks.run("operator", "select kakunin.rotate_webhook(%s, %s)", [endpoint, sealed])
    hooks.agent().revoke()
    assert deliver(hooks)
    relations = hooks.run(
        "postgres",
        "select oid::regclass::text from pg_class where relkind in ('r', 'p', 'v')"
        " and relnamespace in ('kakunin'::regnamespace, 'kakunin_private'::regnamespace)",
    )
    everything = ""
    for (relation,) in relations:
        everything += hooks.value(
            "postgres", f"select coalesce(string_agg(t::text, ''), '') from {relation} t"
        )
    assert sealed.hex() in everything  # so that it would be found
    for secret in (old, new, KEY):
        raw = base64.b64decode(secret.removeprefix("whsec_"))
        for form in (
            secret.removeprefix("whsec_"),
            raw.hex(),
            raw.hex().upper(),
            base64.urlsafe_b64encode(raw).decode(),
        ):
            assert form not in everything
    assert "/hook" not in hooks.value(
        "auditor", "select string_agg(entry, '') from kakunin.audit_log where event_type like 'webhook%'"
    )


def test_a_name_that_tries_to_be_json_stays_a_name(hooks: Database, receiver: Receiver) -> None:
    _, secret = add(hooks, receiver.url, ["agent.created"])
    name = '","type":"certificate.revoked"}\\\u2028\u00e9\U0001f600\n\t"'
    hooks.run("registrar", "select kakunin.create_agent(%s)", [name])
    assert deliver(hooks) == 1
    [message] = messages(receiver, secret)
    assert (message["type"], message["data"]["name"]) == ("agent.created", name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add_webhook(null, 'https://a.test', '{agent.created}', %(ok)s)", "id is needed"),
        ("add_webhook(%(id)s, null, '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, 'ftp://a.test', '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, 'https://u@a.test', '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, 'https://a.test/#', '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, E'https://a.test/\\n', '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, 'https://a.test/' || repeat('x', 1000), '{agent.created}', %(ok)s)", "URL"),
        ("add_webhook(%(id)s, 'https://a.test', '{agent.halted}', %(ok)s)", "one or more of"),
        ("add_webhook(%(id)s, 'https://a.test', '{agent.created,null}', %(ok)s)", "one or more of"),
        ("add_webhook(%(id)s, 'https://a.test', '{}', %(ok)s)", "one or more of"),
        ("add_webhook(%(id)s, 'https://a.test', null, %(ok)s)", "one or more of"),
        ("add_webhook(%(id)s, 'https://a.test', '{agent.created}', 'whsec_in_clear')", "encrypted"),
        ("add_webhook(%(id)s, 'https://a.test', '{agent.created}', null)", "encrypted"),
        ("rotate_webhook(%(id)s, %(ok)s)", "no webhook endpoint"),
        ("rotate_webhook(%(id)s, null)", "encrypted"),
        ("rotate_webhook(%(id)s, %(ok)s, '31 days')", "overlap"),
        ("rotate_webhook(%(id)s, %(ok)s, '-1 s')", "overlap"),
        ("remove_webhook(%(id)s)", "no webhook endpoint"),
        ("enable_webhook(%(id)s)", "no webhook endpoint"),
        ("enable_webhook(%(id)s, null)", "true or false"),
        ("test_webhook(%(id)s)", "no webhook endpoint"),
        ("replay_webhooks()", "say what"),
    ],
)
def test_g8_what_is_wrong_is_named(database: Database, call: str, message: str) -> None:
    with pytest.raises(psycopg.Error, match=message) as refused:
        database.run("operator", f"select kakunin.{call}", {"id": uuid.uuid4(), "ok": bytes(60)})
    assert refused.value.sqlstate == "KA010"


@pytest.mark.parametrize(
    "call", ["claim_webhooks('1 hour')", "claim_webhooks(null)", "expire_certificates(0)"]
)
def test_g8_what_the_worker_asks_is_bounded(database: Database, call: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        database.run("worker", f"select kakunin.{call}")
    assert refused.value.sqlstate == "KA010"


def test_endpoints_are_bounded_and_once_only(hooks: Database) -> None:
    endpoint = uuid.uuid4()
    query = "select kakunin.add_webhook(%s, 'https://a.test', '{agent.created}', %s)"
    hooks.run("operator", query, [endpoint, bytes(60)])
    with pytest.raises(psycopg.Error, match="already"):
        hooks.run("operator", query, [endpoint, bytes(60)])
    for _ in range(31):
        hooks.run("operator", query, [uuid.uuid4(), bytes(60)])
    with pytest.raises(psycopg.Error, match="32 endpoints already"):
        hooks.run("operator", query, [uuid.uuid4(), bytes(60)])
    [row] = hooks.run("operator", "select * from kakunin.webhook_endpoints limit 1")
    assert bytes(60) not in row


# Commands and the process -----------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    try:
        code = main(["webhooks", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_commands(
    hooks: Database, receiver: Receiver, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("KAKUNIN_DSN", hooks.dsn("operator"))
    monkeypatch.delenv("KAKUNIN_WEBHOOK_KEY", raising=False)
    (tmp_path / "key").write_text(KEY + "\n")
    key = ["--webhook-key", str(tmp_path / "key")]
    code, _, err = command(capsys, "add", receiver.url, "--events", "agent.created")
    assert code == 2
    assert "openssl rand -base64 32" in err
    code, _, err = command(capsys, "add", receiver.url, "--events", "agent.created", "--webhook-key", "none")
    assert code == 1
    assert "none cannot be read: No such file or directory. It is the one endpoints were added with" in err
    code, out, _ = command(
        capsys, "add", receiver.url, "--events", "agent.created,certificate.revoked", *key, "--json"
    )
    assert code == 0
    added = json.loads(out)
    endpoint, secret = added["endpoint_id"], added["secret"]
    code, out, _ = command(capsys, "list", "--json")
    [listed] = json.loads(out)
    assert listed["events"] == ["agent.created", "certificate.revoked"]
    assert secret not in out
    code, out, _ = command(capsys, "list")
    assert receiver.url in out
    with running(deliverer(hooks)):
        code, out, err = command(capsys, "test", endpoint, "--json", "--wait", "30")
        assert (code, json.loads(out)["state"]) == (0, "delivered"), err
        assert messages(receiver, secret)[0]["type"] == "webhook.test"
        code, out, _ = command(capsys, "rotate", endpoint, "--overlap", "1h", *key, "--json")
        rotated = json.loads(out)["secret"]
        receiver.answer = 302
        code, out, _ = command(capsys, "test", endpoint, "--json", "--wait", "30")
        assert code == 1
        assert "redirect" in json.loads(out)["error"]
    verify_webhook(*reversed(receiver.requests[-1]), rotated)
    code, out, _ = command(capsys, "deliveries", "--state", "pending", "--json")
    [waiting] = json.loads(out)
    assert (waiting["attempts"], waiting["last_status"]) == (1, 302)
    code, out, _ = command(capsys, "deliveries", "--endpoint", endpoint)
    assert "webhook.test" in out
    code, out, _ = command(capsys, "replay", "--message", waiting["message_id"], "--json")
    assert (code, json.loads(out)) == (0, {"deliveries": 1})
    code, _, err = command(capsys, "replay")
    assert code == 2
    code, out, _ = command(capsys, "disable", endpoint)
    assert code == 0
    code, _, err = command(capsys, "test", endpoint)
    assert code == 1
    assert "disabled" in err
    assert command(capsys, "enable", endpoint)[0] == 0
    assert command(capsys, "remove", endpoint)[0] == 0
    assert json.loads(command(capsys, "list", "--json")[1]) == []
    types = hooks.run(
        "auditor",
        "select event_type from kakunin.audit_log where event_type like 'webhook%' order by event_id",
    )
    assert [row[0] for row in types] == [
        "webhook.added", "webhook.rotated", "webhook.replayed", "webhook.disabled", "webhook.enabled",
        "webhook.removed",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["https://u:p@a.test/", "--events", "agent.created"], "names no user"),
        (["http://a.test/#x", "--events", "agent.created"], "fragment"),
        (["https://a.test/", "--events", "agent.halted"], "no event"),
    ],
)
def test_commands_that_are_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("KAKUNIN_DSN", "host=/nowhere")
    code, _, err = command(capsys, "add", *arguments)
    assert code == 2
    assert message in err
    assert "u:p" not in err


@contextlib.contextmanager
def process(database: Database, keys: Path, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "KAKUNIN_KEY_PASSWORD": "password", "KAKUNIN_WEBHOOK_KEY": KEY}
    started = subprocess.Popen(
        [
            sys.executable, "-m", "kakunin_db.cli", "worker", "--dsn", database.dsn("worker"), "--keys",
            f"file:{keys}", "--lease", "1", "--allow-private-webhooks", "127.0.0.0/8,::1/128", *more,
        ],
        env=environment, stderr=subprocess.PIPE,
    )  # fmt: skip
    with started:
        try:
            yield started
        finally:
            started.kill()


def test_g9_killed_between_sending_and_recording_it_delivers_again_and_the_receiver_can_tell(
    hooks: Database, receiver: Receiver, tmp_path: Path
) -> None:
    keys = stored_key(hooks, tmp_path / "keys")
    _, secret = add(hooks, receiver.url, ["certificate.revoked"])
    killed = threading.Event()

    def kill(handler: _Handler) -> None:
        if not killed.is_set():
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            killed.set()
        handler.send_response(200)
        handler.end_headers()

    receiver.answer = kill
    with process(hooks, keys) as worker:
        hooks.agent().revoke()
        assert killed.wait(60)
    assert deliveries(hooks, "state, attempts") == [("pending", 1)]
    with process(hooks, keys):
        time.sleep(1)
        assert len(receiver.requests) == 1  # its lease is not over
        later(hooks, "31 seconds")
        until(lambda: deliveries(hooks, "state, attempts") == [("delivered", 2)], "the second delivery")
    first, second = receiver.requests
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]
    assert len({m["data"]["event_id"] for m in messages(receiver, secret)}) == 1


def test_the_worker_delivers_seals_and_ends_cleanly(
    hooks: Database, receiver: Receiver, tmp_path: Path
) -> None:
    keys = stored_key(hooks, tmp_path / "keys")
    _, secret = add(hooks, receiver.url)
    soon = hooks.agent(lifetime=dt.timedelta(hours=1))
    later(hooks, "2 hours")
    with process(hooks, keys, "--verbose") as worker:
        until(lambda: len(receiver.requests) == 3, "the deliveries")
        until(
            lambda: hooks.value("worker", "select kakunin.ledger_status()")["lag_entries"] == 0,
            "the signature",
        )
        worker.send_signal(signal.SIGTERM)
        _, logged = worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert {(m["type"], m["data"]["agent_id"]) for m in messages(receiver, secret)} == {
        (event, str(soon.agent_id))
        for event in ("agent.created", "certificate.issued", "certificate.expired")
    }
    assert b"webhook_delivered" in logged
    assert secret.encode() not in logged
    assert KEY.encode() not in logged
    assert receiver.url.encode() not in logged


def test_g3_word_of_a_revocation_by_score_comes_in_under_2_s(
    hooks: Database, receiver: Receiver, tmp_path: Path
) -> None:
    """The agent's commit stops it; the worker, at its defaults, settles that and sends the word of it."""
    keys = stored_key(hooks, tmp_path / "keys")
    at: dict[str, float] = {}

    def answer(handler: _Handler) -> None:
        body = handler.server.requests[-1][1]  # type: ignore[attr-defined]
        at[json.loads(body)["type"]] = time.monotonic()
        handler.send_response(200)
        handler.end_headers()

    receiver.answer = answer
    wanted = {"agent.high_risk", "agent.suspended", "certificate.revoked"}
    add(hooks, receiver.url, ["agent.created", *sorted(wanted)])
    with process(hooks, keys):
        agents = [hooks.agent() for _ in range(5)]
        until(lambda: "agent.created" in at, "the worker")
        for agent in agents:
            at.clear()
            with hooks.connect("gateway") as session:
                session.execute("select kakunin.bind_serial(%s)", [agent.serial])
                for _ in range(3):
                    session.execute("select kakunin.audit_log_append('unauthorized_access_attempt')")
                session.commit()
                committed = time.monotonic()
            until(lambda: at.keys() >= wanted, "the word of it")
            assert max(at[event] for event in wanted) - committed < 2


def test_a_worker_whose_webhook_key_is_none_does_not_begin(
    hooks: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "password")
    monkeypatch.setenv("KAKUNIN_WEBHOOK_KEY", "not a key")
    assert main(["worker", "--dsn", hooks.dsn("worker"), "--keys", f"file:{tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "openssl" in err
    assert "not a key" not in err
