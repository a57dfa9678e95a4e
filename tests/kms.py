"""Key stores for the tests: AWS KMS (moto's, over HTTP) behind a proxy that answers wrongly when told to, and
a token of SoftHSM."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import itertools
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from kakunin_db import KMSKeys, KMSSigner, PKCS11Keys, PKCS11Signer
from kakunin_db.signers import KMSECDSASigner, kms, pkcs11

ACCOUNT = "123456789012"
SECRET = "s3cret-Pin-or-password"

Answer = tuple[int, bytes]
# None hangs up; PASS has moto answer.
Fault = Callable[[dict[str, Any]], Answer | None]
PASS: Answer = (0, b"")


@functools.cache
def _primes() -> Iterator[tuple[int, int]]:
    keys = [rsa.generate_private_key(65537, 2048).private_numbers() for _ in range(12)]
    return itertools.combinations([prime for key in keys for prime in (key.p, key.q)], 2)


def quick_key() -> rsa.RSAPrivateKey:
    """An RSA key of 2048 bits, made of the primes of others: each is another, and all are weak."""
    p, q = next(_primes(), (0, 0))
    if not p:
        return rsa.generate_private_key(65537, 2048)
    d = pow(65537, -1, (p - 1) * (q - 1))
    return rsa.RSAPrivateNumbers(
        p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(65537, p * q)
    ).private_key(unsafe_skip_rsa_key_validation=True)


def _generate(public_exponent: int, key_size: int) -> rsa.RSAPrivateKey:
    return quick_key() if key_size == 2048 else rsa.generate_private_key(public_exponent, key_size)


class Wire:
    """AWS KMS at ``url``: moto, except for the answers a test sets, and for what moto gets wrong."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self.moto.start()
        self.calls: list[list[Any]] = []  # operation, request, answer
        self.faults: dict[str, list[Fault]] = {}
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                operation = self.headers["X-Amz-Target"].removeprefix("TrentService.")
                answer = wire.answer(operation, body, dict(self.headers.items()))
                if answer is None:
                    self.close_connection = True
                    return
                self.send_response(answer[0])
                self.send_header("Content-Type", "application/x-amz-json-1.1")
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # of a client that did not wait
                    self.wfile.write(answer[1])

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.moto.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, operation: str, body: bytes, headers: dict[str, str]) -> Answer | None:
        request = json.loads(body)
        call = [operation, request, b""]
        self.calls.append(call)
        faults = self.faults.get(operation, [])
        if faults:
            found = (faults[0] if len(faults) == 1 else faults.pop(0))(request)
            if found != PASS:
                return found
        connection = http.client.HTTPConnection(*self.moto.get_host_and_port(), timeout=60)
        connection.request("POST", "/", body, headers)
        response = connection.getresponse()
        status, data = response.status, response.read()
        connection.close()
        if operation == "Sign" and status == 200:
            data = json.dumps(json.loads(data) | self._digest_signed(request, json.loads(data))).encode()
        call[2] = data
        return status, data

    def _digest_signed(self, request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        """moto 5.2 hashes the message although MessageType is DIGEST, which AWS does not."""
        if request.get("MessageType") != "DIGEST":
            return {}
        key = self.key(answer["KeyId"]).private_key.private_key
        digest, sha256 = base64.b64decode(request["Message"]), utils.Prehashed(hashes.SHA256())
        if request["SigningAlgorithm"] == "ECDSA_SHA_256":
            signature = key.sign(digest, ec.ECDSA(sha256))
        else:
            assert request["SigningAlgorithm"] == "RSASSA_PKCS1_V1_5_SHA_256"
            signature = key.sign(digest, padding.PKCS1v15(), sha256)
        return {"Signature": base64.b64encode(signature).decode()}

    @property
    def _backend(self) -> Any:
        from moto.kms.models import kms_backends

        return kms_backends[ACCOUNT]["eu-west-1"]

    def key(self, name: str) -> Any:
        """moto's key of this id, ARN or alias."""
        return self._backend.keys[self._backend.get_key_id(self._backend.any_id_to_key_id(name))]

    def found(self) -> set[str]:
        """The keys that do not wait to be deleted, and the aliases."""
        keys = list(self._backend.keys.values())
        left = {key.id for key in keys if key.key_state != "PendingDeletion"}
        return left | {alias for key in keys for alias in key.aliases}

    def fault(self, operation: str, *faults: Fault) -> None:
        """What answers the next requests; the last one, all that follow."""
        self.faults[operation] = list(faults)

    def count(self, operation: str) -> int:
        return [call[0] for call in self.calls].count(operation)

    @functools.cached_property
    def client(self) -> Any:
        return kms._new_client("eu-west-1", self.url, 60, 1)  # moto loads much at its first request

    @functools.cached_property
    def arn(self) -> str:
        """A key for who changes nothing about it."""
        return self.made()

    def keys(self, **options: Any) -> KMSKeys:
        return KMSKeys(endpoint_url=self.url, **{"attempts": 2} | options)

    def signer(self, key: str, **options: Any) -> KMSSigner:
        return KMSSigner(key, endpoint_url=self.url, **{"timeout": 5, "attempts": 3} | options)

    def ecdsa_signer(self, key: str) -> KMSECDSASigner:
        return KMSECDSASigner(key, endpoint_url=self.url, timeout=5, attempts=3)

    def made(self, spec: str = "RSA_2048", usage: str = "SIGN_VERIFY") -> str:
        """The ARN of a new key."""
        answer = self.client.create_key(KeySpec=spec, KeyUsage=usage)
        return str(answer["KeyMetadata"]["Arn"])


def error(code: str, status: int = 400, message: str = "no") -> Fault:
    return lambda _: (status, json.dumps({"__type": code, "message": message}).encode())


def good(_: dict[str, Any]) -> Answer:
    """moto's own answer."""
    return PASS


def instead(**answer: Any) -> Fault:
    encoded = {k: base64.b64encode(v).decode() if isinstance(v, bytes) else v for k, v in answer.items()}
    return lambda _: (200, json.dumps(encoded).encode())


@contextlib.contextmanager
def serve_kms() -> Iterator[Wire]:
    """A Wire, with credentials for it in the environment and nothing else of AWS."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        patch.setattr("moto.kms.utils.rsa", types.SimpleNamespace(generate_private_key=_generate))
        kms._session.cache_clear()  # it keeps the credentials it found
        wire = Wire()
        yield wire
        wire.stop()
        kms._session.cache_clear()


@contextlib.contextmanager
def dripping(before: bytes, piece: bytes) -> Iterator[tuple[str, threading.Event, list[float]]]:
    """A server that answers by drops, each in time, until it is told to stop; and when it was asked."""
    over = threading.Event()
    asked: list[float] = []

    def answer(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.recv(65536)
            asked.append(time.monotonic())
            client.sendall(before)
            while not over.wait(0.05):
                client.sendall(piece)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed when the block ends
            while True:
                threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", over, asked
        over.set()


_PATHS = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so")
SOFTHSM = next((os.path.realpath(path) for path in _PATHS if Path(path).exists()), "")
PIN = "98-Pin-76"


class HSM:
    """SoftHSM with a token ``kk`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = folder / "tokens"
        self.tokens.mkdir()
        (folder / "conf").write_text(f"directories.tokendir = {self.tokens}\nobjectstore.backend = file\n")

    def add(self, label: str) -> None:
        subprocess.run(
            ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", "5678"],
            check=True,
            capture_output=True,
        )

    def restart(self) -> None:
        """Ends every session; the module reads its tokens anew."""
        import pkcs11 as library

        library.lib(SOFTHSM).reinitialize()

    def keys(self, pin: str = PIN) -> PKCS11Keys:
        return PKCS11Keys(SOFTHSM, "kk", pin)

    def signer(self, pin: str = PIN, **key: Any) -> PKCS11Signer:
        return PKCS11Signer(SOFTHSM, "kk", pin, **key)

    def make(self, label: str, id: bytes, **private: Any) -> None:
        """A key pair with these attributes of the private key, made without the kit."""
        import pkcs11 as library

        kind = private.pop("KIND", library.KeyType.RSA)
        bits, curve = private.pop("BITS", 2048), private.pop("CURVE", "secp256r1")
        template = {getattr(library.Attribute, name): value for name, value in private.items()}

        def work(session: Any) -> None:
            if kind is library.KeyType.EC:
                named = library.util.ec.encode_named_curve_parameters(curve)
                parameters = session.create_domain_parameters(
                    kind, {library.Attribute.EC_PARAMS: named}, local=True
                )
                parameters.generate_keypair(label=label, id=id, store=True, private_template=template)
            else:
                session.generate_keypair(
                    kind, bits, label=label, id=id, store=True, private_template=template
                )

        self.keys()._token.run("make a key", work, write=True)

    def make_ec(self, label: str, id: bytes, **private: Any) -> None:
        """The same on P-256, or the curve given as ``CURVE``."""
        import pkcs11 as library

        self.make(label, id, KIND=library.KeyType.EC, EXTRACTABLE=False, **private)

    def destroy(self, label: str) -> int:
        """How many objects were of this label."""
        import pkcs11 as library

        def work(session: Any) -> int:
            found = list(session.get_objects({library.Attribute.LABEL: label}))
            for each in found:
                each.destroy()
            return len(found)

        return self.keys()._token.run("destroy", work, write=True)

    def found(self) -> set[str]:
        """The ids of the private keys."""
        import pkcs11 as library

        wanted = {library.Attribute.CLASS: library.ObjectClass.PRIVATE_KEY}
        return self.keys()._token.run(
            "list keys", lambda session: {k[library.Attribute.ID].hex() for k in session.get_objects(wanted)}
        )


@contextlib.contextmanager
def softhsm(folder: Path) -> Iterator[HSM]:
    """An HSM with its tokens in this folder; skips the test where there is no SoftHSM."""
    if not SOFTHSM or not shutil.which("softhsm2-util"):
        pytest.skip("no SoftHSM on this machine: apt-get install softhsm2")
    with pytest.MonkeyPatch.context() as patch:
        hsm = HSM(folder)
        patch.setenv("SOFTHSM2_CONF", str(hsm.folder / "conf"))
        hsm.add("kk")
        hsm.restart()
        yield hsm
        # So that another test with tokens of its own does not meet these.
        pkcs11._tokens.clear()
