"""The commands about identity: ca, agent, verify, crl and model-hash, as the logins that run them."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import io
import json
import os
import pty
import queue
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from conftest import Database, fresh_database
from cryptography import x509

from kakunin_db import (
    AgentCredential,
    CertificateAuthority,
    LocalSigner,
    bind_agent_session,
    cli,
    commands,
    open_signer,
)
from kakunin_db.resources import install_sql

VARIABLES = ("KAKUNIN_DSN", "KAKUNIN_KEYS", "KAKUNIN_CA_KEYS", "KAKUNIN_CRL_URL", "KAKUNIN_KEY_PASSWORD")
PASSWORD = "correct-horse-battery"
HASH = "sha256:" + "ab" * 32
SERIAL = re.compile(r"[0-9A-F]{2}(:[0-9A-F]{2}){7,19}")


@dataclass
class Answer:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> dict[str, list[str]]:
        """What is beside each label."""
        found: dict[str, list[str]] = {}
        label = ""
        for line in self.out.splitlines():
            label = line.split(" ", 1)[0] or label
            found.setdefault(label, []).append(re.sub(r"\S* +", "", line, count=1))
        return found

    def __getitem__(self, label: str) -> str:
        (value,) = self.lines[label]
        return value


class Cli:
    """The command line in this process, as a login; keys are in a folder of their own."""

    def __init__(
        self,
        database: Database,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.database = database
        self.folder = folder
        self.keys = folder / "keys"
        self._capsys = capsys
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("KAKUNIN_KEYS", f"file:{self.keys}")
        monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", PASSWORD)
        monkeypatch.chdir(folder)

    def run(self, *arguments: object, user: str | None = "installer") -> Answer:
        dsn = [] if user is None else ["--dsn", self.database.dsn(user)]
        try:
            status = cli.main([*map(str, arguments), *dsn])
        except SystemExit as left:  # argparse
            status = int(left.code or 0)
        captured = self._capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    def ok(self, *arguments: object, user: str | None = "installer") -> Answer:
        answer = self.run(*arguments, user=user)
        assert (answer.status, answer.err) == (0, ""), answer
        return answer

    def refused(self, *arguments: object, user: str | None = "installer") -> str:
        """One line on stderr, nothing on stdout, status 1."""
        answer = self.run(*arguments, user=user)
        assert (answer.status, answer.out) == (1, ""), answer
        assert answer.err.startswith("kakunin-db: ")
        assert answer.err.count("\n") == 1
        return answer.err

    def misused(self, *arguments: object, user: str | None = "installer") -> str:
        answer = self.run(*arguments, user=user)
        assert (answer.status, answer.out) == (2, ""), answer
        return answer.err

    def agent(self, name: str = "atlas", *options: object) -> str:
        return self.ok("agent", "create", name, *options, user="registrar")["agent_id"]

    def certified(self, *options: object) -> tuple[str, str]:
        """A new agent's id, and its certificate's serial."""
        agent_id = self.agent()
        return agent_id, self.ok("agent", "certify", agent_id, *options, user="registrar")["serial"]

    def database_agent(self) -> str:
        """The serial of a new agent's certificate."""
        return self.certified()[1]

    def key_files(self) -> set[str]:
        return {path.name for path in self.keys.iterdir()} if self.keys.exists() else set()


@contextlib.contextmanager
def bare_kit(cluster: Cluster) -> Iterator[Database]:
    """The kit, and no authority yet."""
    with fresh_database(cluster, "template1") as database:
        with database.connect("installer") as installer:
            installer.execute(install_sql())
        yield database


@pytest.fixture
def kit(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cli]:
    with bare_kit(cluster) as database:
        yield Cli(database, tmp_path, capsys, monkeypatch)


@dataclass
class Site:
    """A database with a root and an intermediate that `ca init` made."""

    database: Database
    keys: Path
    chain: Path


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with bare_kit(cluster) as database:
        chain = folder / "ca.pem"
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            patch.setenv("KAKUNIN_KEY_PASSWORD", PASSWORD)
            patch.setenv("KAKUNIN_KEYS", f"file:{folder}/keys")
            status = cli.main(
                ["ca", "init", "--name", "Acme Root CA", "--intermediate", "Acme Agents CA",
                 "--out", str(chain), "--crl-url", "http://crl.test/{key_id}.crl",
                 "--dsn", database.dsn("operator")]
            )  # fmt: skip
        assert status == 0
        yield Site(database, folder / "keys", chain)


@pytest.fixture
def acme(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Cli:
    shutil.copytree(site.keys, tmp_path / "keys")
    shutil.copy(site.chain, tmp_path / "ca.pem")
    return Cli(site.database, tmp_path, capsys, monkeypatch)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**kept, "KAKUNIN_KEY_PASSWORD": PASSWORD, **more}


def openssl(*arguments: object, status: int = 0) -> str:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl on this machine")
    done = subprocess.run([program, *map(str, arguments)], check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_command_imports_what_it_needs() -> None:
    """Half of the time in which most of them start would be SQLAlchemy's."""
    program = (
        "import sys, kakunin_db.cli\n"
        "names = ('alembic', 'boto3', 'mcp', 'pkcs11', 'psycopg_pool', 'sqlalchemy', 'supabase')\n"
        "assert not [name for name in names if name in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_where_there_is_no_libpq_the_last_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kakunin_db.cli"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.splitlines()[-2:] == [
        "ImportError: no pq wrapper available",
        "Install libpq (Debian: libpq5) or run: pip install 'kakunin-db[binary]'",
    ]


# A whole life ----------------------------------------------------------------------------------------


def test_the_life_of_an_agent(acme: Cli) -> None:
    database, folder = acme.database, acme.folder
    (folder / "agent.json").write_text('{"model":"gpt-4o"}')
    (folder / "scope.json").write_text('{"max_single_trade_usd": 10000, "permitted_venues": ["NYSE"]}')
    model_hash = acme.ok("model-hash", "agent.json", user=None).out.strip()
    assert model_hash == "sha256:" + hashlib.sha256(b'{"model":"gpt-4o"}').hexdigest()

    created = acme.ok(
        "agent", "create", "atlas", "--model", "gpt-4o", "--model-version", "2", "--model-hash", model_hash,
        "--tenant", "acme", user="registrar",
    )  # fmt: skip
    agent_id = created["agent_id"]
    assert str(uuid.UUID(agent_id)) == agent_id
    assert (created["name"], created["tenant"], created["model"], created["model_version"]) == (
        "atlas", "acme", "gpt-4o", "2",
    )  # fmt: skip
    assert created["status"] == "active"

    certified = acme.ok(
        "agent", "certify", agent_id, "--action", "orders:read", "--action", "trade:*", "--days", "30",
        "--financial-scope", "@scope.json", "--crl-url", "http://crl.test/{key_id}.crl", "--out", "atlas.pem",
        user="registrar",
    )  # fmt: skip
    serial = certified["serial"]
    assert SERIAL.fullmatch(serial)
    assert certified.lines["actions"] == ["orders:read", "trade:*"]
    assert json.loads(certified["financial_scope"]) == json.loads((folder / "scope.json").read_text())
    assert certified["written"] == "atlas.pem"
    # What KAKUNIN_SIGNER is for an agent's process.
    signer = open_signer(certified["signer"])
    certificate = x509.load_pem_x509_certificate(Path("atlas.pem").read_bytes())
    assert signer.public_key() == certificate.public_key()
    text = openssl("x509", "-in", "atlas.pem", "-noout", "-text", "-serial", "-enddate")
    assert f"serial={serial.replace(':', '')}" in text
    assert "http://crl.test/" in text
    # The first in the file issues agents' certificates, the last is the root.
    assert openssl("x509", "-in", "ca.pem", "-noout", "-subject").split("=")[-1].strip() == "Acme Agents CA"
    assert openssl("verify", "-CAfile", "ca.pem", "atlas.pem") == "atlas.pem: OK\n"

    # The agent's process needs the file and its key.
    credential = AgentCredential.from_certificate(
        Path("atlas.pem").read_bytes(), f"file:{acme.keys}", database.installation_id
    )
    with database.connect("agent_1") as connection, bind_agent_session(connection, credential):
        assert connection.execute("select kakunin.current_cert_serial()").fetchone() == (serial,)

    (folder / "order.json").write_text('{"order":17}')
    signature = acme.ok("agent", "sign", agent_id, "order.json", user="registrar").out
    (folder / "order.sig").write_bytes(base64.b64decode(signature, validate=False))
    Path("atlas.pub").write_text(openssl("x509", "-in", "atlas.pem", "-noout", "-pubkey"))
    checked = openssl("dgst", "-sha256", "-verify", "atlas.pub", "-signature", "order.sig", "order.json")
    assert checked == "Verified OK\n"
    assert database.value(
        "operator", "select kakunin.verify_message(%s, %s, %s) ->> 'valid'",
        [serial, b'{"order":17}', (folder / "order.sig").read_bytes()],
    ) == "true"  # fmt: skip

    valid = acme.ok("verify", serial.lower(), user="agent_1")
    assert (valid["valid"], valid["status"], valid["name"]) == ("yes", "active", "atlas")

    # Renewed: the present one counts for the overlap.
    renewed = acme.ok(
        "agent", "rotate", agent_id, "--overlap", "30m", "--out", "second.pem", user="registrar"
    )
    assert renewed["serial"] != serial
    assert renewed.lines["actions"] == ["orders:read", "trade:*"]
    shown = acme.ok("agent", "show", agent_id, user="operator")
    assert [line.split()[0] for line in shown.lines["certificate"]] == [renewed["serial"], serial]
    assert "superseded" in shown.lines["certificate"][1]
    assert acme.run("verify", serial).status == 0

    # Revoked: the list that openssl reads says so at once.
    revoked = acme.ok("agent", "revoke", "--serial", serial, "--reason", "keyCompromise", user="operator")
    assert revoked["revoked"].startswith(serial)
    gone = acme.run("verify", serial)
    assert (gone.status, gone["valid"], gone["status"], gone["reason"]) == (
        1,
        "no",
        "revoked",
        "keyCompromise",
    )
    acme.ok("crl", "--out", "list.pem", user="operator")
    for name, status, expected in (("atlas.pem", 2, "certificate revoked"), ("second.pem", 0, "OK")):
        said = openssl(
            "verify", "-crl_check", "-CRLfile", "list.pem", "-CAfile", "ca.pem", name, status=status
        )
        assert expected in said
    acme.ok("crl", "--out", "list.crl", user="operator")
    # verify_crl: the signature is the issuing authority's, the first in the file.
    assert "verify OK" in openssl("crl", "-in", "list.crl", "-inform", "DER", "-noout", "-CAfile", "ca.pem")

    # Another model: the certificate that names the old one goes.
    updated = acme.ok(
        "agent", "update", agent_id, "--model-hash", HASH, "--name", "atlas 2", user="registrar"
    )
    assert updated["revoked"] == renewed["serial"]
    assert "Certify the agent anew" in updated["next"]
    assert (updated["name"], updated["model_hash"]) == ("atlas 2", HASH)
    third = acme.ok("agent", "certify", agent_id, user="registrar")["serial"]

    suspended = acme.ok("agent", "suspend", agent_id, "--reason", "odd trades", user="operator")
    assert (suspended["status"], suspended["reason"]) == ("suspended", "odd trades")
    assert acme.run("verify", third)["status"] == "suspended"
    listed = acme.ok("agent", "list", "--status", "suspended", user="operator").out
    assert listed.split()[:2] == [agent_id, "suspended"]
    assert acme.ok("agent", "reinstate", agent_id, user="operator")["status"] == "active"
    assert acme.ok("verify", third)["valid"] == "yes"

    (folder / "receipts").mkdir()
    halted = acme.ok(
        "agent", "halt", agent_id, "--reason", "unusual volatility", "--terminate", "--out", "receipts",
        user="operator",
    )  # fmt: skip
    assert (halted["revoked"], halted["backends"]) == (third, "0 ended")
    assert halted["receipt"].startswith("signed by ")
    body, proof = map(Path, halted.lines["written"])
    assert body == Path("receipts") / f"{halted['halt_id']}.json"
    assert json.loads(body.read_text())["reason"] == "unusual volatility"
    Path("ca.pub").write_text(openssl("x509", "-in", "ca.pem", "-noout", "-pubkey"))
    assert openssl("dgst", "-sha256", "-verify", "ca.pub", "-signature", proof, body) == "Verified OK\n"
    shown = acme.ok("agent", "show", agent_id, user="operator")
    assert shown["halt"].startswith(halted["halt_id"])
    assert "signed by" in shown["halt"]
    assert "is suspended: unusual volatility (KA008)" in acme.refused("agent", "certify", agent_id)


def test_every_answer_is_json_as_well(acme: Cli) -> None:
    def ask(*arguments: object, user: str = "registrar") -> Any:
        return acme.ok(*arguments, "--json", user=user).json

    authorities = ask("ca", "list")
    assert {a["name"] for a in authorities} == {"CN=Acme Root CA", "CN=Acme Agents CA"}
    assert all(a["pem"].startswith("-----BEGIN CERTIFICATE-----") for a in authorities)
    assert ask("ca", "trust", "ca.pem", user="operator")[0]["key_id"] in {a["key_id"] for a in authorities}
    agent = ask("agent", "create", "json", "--model", "m")
    agent_id = agent["agent_id"]
    assert (agent["status"], agent["model"], agent["tenant"]) == ("active", "m", None)
    assert dt.datetime.fromisoformat(agent["created_at"]).tzinfo is not None
    certificate = ask("agent", "certify", agent_id, "--action", "a:*")
    assert certificate["permitted_actions"] == ["a:*"]
    assert certificate["written"] is None
    assert "der" not in certificate
    # Whoever gave no --out finds it again.
    shown = ask("agent", "show", agent_id)
    assert shown["certificates"][0]["pem"] == certificate["pem"]
    assert ask("agent", "list", "--limit", 1000)[0]["agent_id"] == agent_id
    rotated = ask("agent", "rotate", agent_id, "--out", "r.pem")
    assert rotated["written"] == "r.pem"
    assert Path("r.pem").read_text() == rotated["pem"]
    Path("m").write_text("message")
    assert ask("agent", "sign", agent_id, "m")["algorithm"] == "RSASSA_PKCS1_V1_5_SHA_256"
    assert ask("verify", rotated["serial_number"])["valid"] is True
    assert ask("agent", "update", agent_id, "--tenant", "t")["certificates_revoked"] != []
    assert ask("agent", "suspend", agent_id, "--reason", "r", user="operator")["status"] == "suspended"
    assert ask("agent", "reinstate", agent_id, user="operator")["suspended_at"] is None
    serial = ask("agent", "certify", agent_id)["serial_number"]
    (revoked,) = ask("agent", "revoke", agent_id, user="operator")
    assert (revoked["serial_number"], revoked["crl_pending"]) == (serial, None)
    halted = ask("agent", "halt", agent_id, "--reason", "r", "--out", ".", user="operator")
    assert [Path(path).suffix for path in halted["written"]] == [".json", ".sig"]
    assert json.loads(halted["receipt"])["halt_id"] == halted["halt_id"]
    lists = ask("crl", "--out", "l.pem", user="operator")
    assert {crl["key_id"] for crl in lists["lists"]} == {a["key_id"] for a in authorities}
    assert lists["written"] == "l.pem"
    assert Path("l.pem").read_text() in [crl["pem"] for crl in lists["lists"]]
    answer = acme.ok("model-hash", "m", "--json", user=None)
    assert answer.json == {"model_hash": "sha256:" + hashlib.sha256(b"message").hexdigest()}
    unknown = acme.run("verify", "11:22", "--json")
    assert (unknown.status, unknown.err, unknown.json["status"]) == (1, "", "unknown")


def test_as_a_program(acme: Cli) -> None:
    program = Path(sys.executable).with_name("kakunin-db")

    def run(*arguments: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        dsn = acme.database.dsn("registrar")
        return subprocess.run(
            [program, *arguments], check=False, capture_output=True, env=environment(KAKUNIN_DSN=dsn), **more
        )

    hashed = run("model-hash", "-", input=b"weights" * 1_000_000)
    assert hashed.stdout.decode() == f"sha256:{hashlib.sha256(b'weights' * 1_000_000).hexdigest()}\n"
    # What cannot be written in the locale is escaped, and what a terminal would obey.
    agent_id = acme.agent("at\x1b[2Jlas \u202e \u043a")
    shown = subprocess.run(
        [program, "agent", "show", agent_id], check=False, capture_output=True,
        env=environment(KAKUNIN_DSN=acme.database.dsn("registrar"), PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert (shown.returncode, shown.stderr) == (0, b"")
    assert rb"name      at\x1b[2Jlas \u202e \u043a" in shown.stdout
    unsigned = run("agent", "sign", agent_id, "-", input=b"message")
    assert (unsigned.returncode, unsigned.stdout) == (2, b"")
    assert unsigned.stderr.startswith(b"kakunin-db: no key store is named. Give --keys or set KAKUNIN_KEYS")


def test_the_reader_may_leave_early(acme: Cli) -> None:
    acme.agent()
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kakunin_db.cli", "agent", "list"]
    try:
        done = subprocess.run(
            command, check=False, stdout=write, stderr=subprocess.PIPE,
            env=environment(KAKUNIN_DSN=acme.database.dsn("registrar")),
        )  # fmt: skip
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


# Authorities -----------------------------------------------------------------------------------------


def test_authorities(kit: Cli) -> None:
    answer = kit.run("ca", "list", user="registrar")
    assert (answer.status, answer.out) == (0, "")
    assert answer.err == "kakunin-db: no authority is trusted here. kakunin-db ca init makes one.\n"
    agent_id = kit.agent()
    assert (
        "no certificate authority for agents is trusted here (KA010). Make one with kakunin-db ca init"
        in (kit.refused("agent", "certify", agent_id, user="registrar"))
    )
    assert kit.key_files() == set()

    # A root alone certifies agents itself.
    made = kit.ok("ca", "init", "--out", "one.pem", user="operator")
    one, until, days, name = made["authority"].split(maxsplit=3)
    assert (until, name) == ("until", "CN=Kakunin CA")
    assert dt.date.fromisoformat(days) > dt.date.today() + dt.timedelta(days=3640)
    assert made["written"] == "one.pem"
    keys = kit.key_files()
    assert keys == {one.replace(":", "").lower() + ".pem"}

    # Another one only when that is meant.
    refused = kit.refused("ca", "init", "--out", "two.pem", user="operator")
    assert f"an authority is trusted here already: {one}, CN=Kakunin CA (KA010)." in refused
    assert "--another makes one more" in refused
    assert kit.key_files() == keys
    assert not Path("two.pem").exists()
    more = kit.ok("ca", "init", "--another", "--name", "Root", "--intermediate", "Below", "--out", "two.pem")
    below, root = (line.split()[0] for line in more.lines["authority"])
    assert Path("two.pem").read_text().count("BEGIN CERTIFICATE") == 2
    listed = {line.split()[0]: line.split(maxsplit=4)[1:] for line in kit.ok("ca", "list").out.splitlines()}
    assert set(listed) == {one, root, below}
    assert listed[below][3] == "CN=Below, below CN=Root"
    assert {values[0] for values in listed.values()} == {"trusted"}

    # A distrusted one is in the way of nothing.
    _, serial = kit.certified("--authority", below.replace(":", "").lower())
    kit.ok("crl", user="operator")
    gone = kit.ok("ca", "distrust", below, "--reason", "keyCompromise", user="operator")
    assert (gone["distrusted"], gone["revoked"]) == (below, serial)
    assert "distrusted: keyCompromise" in kit.ok("ca", "list").out
    # The root's list says so already.
    entries = {
        crl["key_id"]: crl["entries"] for crl in kit.ok("crl", "--json", user="operator").json["lists"]
    }
    assert entries[root] == 1
    kit.ok("ca", "distrust", one, user="operator")
    kit.ok("ca", "distrust", root, user="operator")
    kit.ok("ca", "init", user="operator")
    assert f"no authority {one} is trusted here (KA010)" in kit.refused(
        "agent", "certify", agent_id, "--authority", one
    )


def test_a_distrusted_authority_without_keys(kit: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    key_id = kit.ok("ca", "init", user="operator")["authority"].split()[0]
    monkeypatch.delenv("KAKUNIN_KEYS")
    answer = kit.run("ca", "distrust", key_id, user="operator")
    assert (answer.status, answer["distrusted"]) == (0, key_id)
    assert answer.err == (
        "kakunin-db: the revocation lists do not say so yet. kakunin-db crl publishes them.\n"
    )
    assert "no authority with this key id is trusted here (KA010)" in kit.refused("ca", "distrust", "00" * 20)


def test_an_authority_of_ones_own_is_pinned(kit: Cli) -> None:
    root = CertificateAuthority.create(LocalSigner.generate(), "Own Root", path_length=2)
    middle = CertificateAuthority.create(LocalSigner.generate(), "Own Middle", issuer=root, path_length=1)
    below = CertificateAuthority.create(LocalSigner.generate(), "Own Below", issuer=middle)
    pem = {ca.key_id: Path(f"{n}.pem") for n, ca in enumerate((root, middle, below))}
    for ca in (root, middle, below):
        pem[ca.key_id].write_text(kit_pem(ca))
    Path("root.der").write_bytes(root.der)
    assert f"the authority with key id {root.key_id} is not trusted here (KA010)" in kit.refused(
        "ca", "trust", pem[middle.key_id], user="operator"
    )
    assert kit.ok("ca", "trust", "root.der", user="operator")["trusted"].startswith(root.key_id)
    # As ca init writes it: the root last. Pinning again is nothing.
    Path("chain.pem").write_text("Three of them.\n" + "".join(map(kit_pem, (below, middle, root))))
    pinned = kit.ok("ca", "trust", "chain.pem", user="operator").lines["trusted"]
    assert [line.split()[0] for line in pinned] == [root.key_id, middle.key_id, below.key_id]
    assert len(kit.ok("ca", "list").out.splitlines()) == 3
    for name, content in (("no.pem", b"-----BEGIN CERTIFICATE-----\nx\n"), ("no.der", b"0"), ("none", b"")):
        Path(name).write_bytes(content)
        assert f"{name} is not a certificate (KA010). Give the certificate" in kit.refused(
            "ca", "trust", name
        )
    assert "missing.pem cannot be read: No such file or directory" in kit.refused(
        "ca", "trust", "missing.pem"
    )
    assert ". cannot be read: Is a directory" in kit.refused("ca", "trust", ".")
    # The keys are elsewhere: nothing is signed, and the reason is said.
    agent_id = kit.agent()
    assert "cannot be read" in kit.refused("agent", "certify", agent_id, user="registrar")
    assert kit.key_files() == set()


def kit_pem(ca: CertificateAuthority) -> str:
    return (
        "-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(ca.der).decode() + "-----END CERTIFICATE-----\n"
    )


# Agents ----------------------------------------------------------------------------------------------


def test_agents_are_listed_the_newest_first(acme: Cli) -> None:
    ids = [acme.agent(f"agent {n}") for n in range(3)]
    answer = acme.run("agent", "list", "--limit", 2, user="registrar")
    assert [line.split()[0] for line in answer.out.splitlines()] == [ids[2], ids[1]]
    assert answer.err == "kakunin-db: there are more than 2. --limit shows them.\n"
    acme.ok("agent", "suspend", ids[0], "--reason", "r")
    listed = acme.ok("agent", "list", "--status", "suspended", "--json").json
    assert ids[0] in {a["agent_id"] for a in listed}
    assert {a["status"] for a in listed} == {"suspended"}
    active = acme.ok("agent", "list", "--status", "active", "--limit", 1000).out
    assert ids[0] not in active
    assert ids[1] in active


def test_one_certificate_at_a_time(acme: Cli) -> None:
    agent_id, first = acme.certified()
    keys = acme.key_files()
    said = acme.refused("agent", "certify", agent_id, "--out", "x.pem", user="registrar")
    assert f"agent {agent_id} has an active certificate already, {first} (KA010). Give --overlap 1h" in said
    # No key was made, and no file is left.
    assert acme.key_files() == keys
    assert not Path("x.pem").exists()
    second = acme.ok("agent", "certify", agent_id, "--overlap", "1h", user="registrar")["serial"]
    assert acme.run("verify", first)["valid"] == "yes"
    # Both count, so both are meant.
    revoked = acme.ok("agent", "revoke", agent_id, "--reason", "cessationOfOperation").lines["revoked"]
    assert {line.split()[0] for line in revoked} == {first, second}
    assert {acme.run("verify", serial)["status"] for serial in (first, second)} == {"revoked"}
    assert f"agent {agent_id} has no active certificate (KA010)" in acme.refused("agent", "revoke", agent_id)
    third = acme.ok("agent", "certify", agent_id, user="registrar")["serial"]
    replaced = acme.ok("agent", "rotate", agent_id, "--overlap", "0s", "--days", "10", user="registrar")
    assert acme.run("verify", third)["status"] == "revoked"
    valid_from, _, valid_to = replaced["valid"].partition(" to ")
    assert dt.datetime.fromisoformat(valid_to.replace("Z", "+00:00")) - dt.datetime.fromisoformat(
        valid_from.replace("Z", "+00:00")
    ) == dt.timedelta(days=10)


def test_revoking_does_not_wait_for_the_list(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    agent_id, first = acme.certified()
    acme.ok("agent", "rotate", agent_id, user="registrar")
    monkeypatch.delenv("KAKUNIN_KEYS")
    answer = acme.run("agent", "revoke", agent_id, user="operator")
    assert answer.status == 0
    assert len(answer.lines["revoked"]) == 2
    assert answer.err.startswith(
        "kakunin-db: the revocation stands, and is not on the revocation list yet: no key store is named."
    )
    assert answer.err.count("\n") == 1
    assert acme.run("verify", first)["status"] == "revoked"


def test_nobody_is_halted_twice_over_a_signature(acme: Cli) -> None:
    agent_id, serial = acme.certified()
    acme.keys.rename("away")
    answer = acme.run("agent", "halt", agent_id, "--reason", "now", "--out", ".", user="operator")
    assert (answer.status, answer["revoked"], answer["receipt"]) == (0, serial, "not signed yet")
    assert answer.err.startswith("kakunin-db: the halt stands; the signature of its receipt is pending: ")
    assert answer.err.endswith(" kakunin-db crl signs it later.\n")
    assert answer.err.count("\n") == 1
    assert answer["written"] == f"{answer['halt_id']}.json"  # and no signature
    assert acme.run("verify", serial)["status"] == "revoked"
    assert "not signed yet" in acme.ok("agent", "show", agent_id)["halt"]

    # What could not be signed is an error of crl, for cron to report.
    waiting = acme.run("crl", user="operator")
    assert waiting.status == 1
    assert "kakunin-db: not everything could be signed" in waiting.err
    assert any(answer["halt_id"] in line for line in waiting.lines["waiting"])
    Path("away").rename(acme.keys)
    signed = acme.ok("crl", user="operator")
    assert f"receipt of halt {answer['halt_id']}" in signed.lines["signed"]
    (halt,) = acme.ok("agent", "show", agent_id, "--json").json["halts"]
    Path("late.sig").write_bytes(base64.b64decode(halt["signature"]))
    Path("ca.pub").write_text(openssl("x509", "-in", "ca.pem", "-noout", "-pubkey"))
    receipt = f"{answer['halt_id']}.json"
    assert (
        openssl("dgst", "-sha256", "-verify", "ca.pub", "-signature", "late.sig", receipt) == "Verified OK\n"
    )


def test_an_interrupted_halt_may_stand(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    agent_id, serial = acme.certified()
    monkeypatch.setattr(CertificateAuthority, "sign_receipt", interrupted)
    answer = acme.run("agent", "halt", agent_id, "--reason", "r", user="operator")
    assert (answer.status, answer.out) == (130, "")
    assert answer.err == (
        f"kakunin-db: interrupted, and the halt may stand. kakunin-db agent show {agent_id} says so;"
        " kakunin-db crl signs its receipt.\n"
    )
    assert acme.run("verify", serial)["status"] == "revoked"


def test_backends_that_may_not_be_ended_are_counted(acme: Cli) -> None:
    agent_id = acme.agent()
    acme.ok("agent", "certify", agent_id, "--out", "a.pem", user="registrar")
    credential = AgentCredential.from_certificate(
        Path("a.pem").read_bytes(), f"file:{acme.keys}", acme.database.installation_id
    )
    with acme.database.connect("agent_1") as connection, bind_agent_session(connection, credential):
        connection.execute("select kakunin.current_cert_serial()")
        answer = acme.run("agent", "halt", agent_id, "--reason", "r", "--terminate", user="operator")
        connection.rollback()
    assert (answer.status, answer["backends"]) == (0, "0 ended")
    assert answer.err.startswith(
        "kakunin-db: the halt stands; backends not ended: 1. Backends of other logins"
    )
    assert "grant pg_signal_backend to installer" in answer.err


# Refusals --------------------------------------------------------------------------------------------

AGENT = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("ca", "required"),
        ("agent", "required"),
        ("agent nonsense", "invalid choice"),
        ("ca init --name ''", "1 to 64 characters"),
        (f"ca init --name {'x' * 65}", "1 to 64 characters"),
        ("ca init --name A --intermediate A", "a root and its intermediate have different names"),
        ("ca init --crl-url ftp://x", "an http or https URL"),
        ("ca distrust nonsense", "a key id is hexadecimal"),
        ("ca distrust 00112233445566778899 --reason whim", "invalid choice: 'whim'"),
        ("agent create ' '", "1 to 200 characters"),
        ("agent create a --model-hash sha256:1", "a model hash is sha256: and 64 hexadecimal digits"),
        ("agent show 17", "an agent id is a UUID"),
        ("agent list --limit 0", "a whole number from 1"),
        ("agent list --limit -1", "a whole number from 1"),
        ("agent list --status retired", "invalid choice: 'retired'"),
        (f"agent update {AGENT}", "nothing is to be changed. Give --name, --model"),
        (f"agent certify {AGENT} --days 366", "a whole number from 1 to 365"),
        (f"agent certify {AGENT} --days 1.5", "a whole number from 1 to 365"),
        (f"agent certify {AGENT} --overlap 1", "as in 30m, 1h or 7d"),
        (f"agent certify {AGENT} --overlap -1h", "expected one argument"),
        (f"agent certify {AGENT} --overlap 31d", "at most 30 days"),
        (f"agent certify {AGENT} --action 'a b'", "1 to 128 characters from"),
        (f"agent certify {AGENT} --action a*", "only a whole last part may be a star"),
        (f"agent certify {AGENT} --financial-scope '[1]'", "a JSON object, such as"),
        (f"agent certify {AGENT} --financial-scope '{{'", "this is not JSON"),
        (f"agent certify {AGENT} --financial-scope '{{\"a\": NaN}}'", "no canonical JSON form"),
        (f'agent certify {AGENT} --financial-scope \'{{"a": 1, "a": 2}}\'', "a name is there twice"),
        (f"agent certify {AGENT} --financial-scope '{{\"a\": 9007199254740993}}'", "no canonical JSON form"),
        (f"agent certify {AGENT} --financial-scope @missing", "cannot be read: No such file or directory"),
        (f"agent certify {AGENT} --authority x", "a key id is hexadecimal"),
        ("agent revoke", "one of the arguments AGENT_ID --serial is required"),
        (f"agent revoke {AGENT} --serial 11", "not allowed with argument"),
        ("agent revoke --serial xyz", "not a certificate serial number"),
        (f"agent revoke {AGENT} --reason certificateHold", "invalid choice: 'certificateHold'"),
        (f"agent suspend {AGENT}", "the following arguments are required: --reason"),
        (f"agent halt {AGENT}", "the following arguments are required: --reason"),
        (f"agent halt {AGENT} --reason ' '", "1 to 1000 characters"),
        (f"agent halt {AGENT} --reason r --term", "unrecognized arguments: --term"),
        ("verify 11:2", "not a certificate serial number. Give 1 to 20 bytes in hexadecimal"),
        ("crl --days 91", "a whole number from 1 to 90"),
        ("crl --watch --json", "--watch writes lines to stderr as it goes, and no JSON"),
        ("crl --watch --every 0", "a whole number from 1 to 3600"),
        ("model-hash", "required"),
    ],
)
def test_what_is_not_understood(
    acme: Cli, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.setenv("KAKUNIN_DSN", acme.database.dsn("installer"))
    keys = acme.key_files()
    err = acme.misused(*shlex.split(arguments), user=None)
    assert said in err
    assert err.splitlines()[-1].startswith("kakunin-db")
    assert acme.key_files() == keys


def test_what_needs_a_database_or_a_key_store(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["ca", "list"], ["agent", "list"], ["verify", "11"], ["crl"], ["agent", "show", AGENT]):
        assert acme.misused(*command, user=None) == (
            "kakunin-db: no database is named. Give --dsn or set KAKUNIN_DSN.\n"
        )
    monkeypatch.setenv("KAKUNIN_DSN", acme.database.dsn("registrar"))
    acme.ok("agent", "list", user=None)
    monkeypatch.setenv("KAKUNIN_KEYS", "")
    message = "agent", "sign", AGENT, "-"
    for arguments in (
        ["ca", "init"],
        ["agent", "certify", AGENT],
        ["agent", "rotate", AGENT],
        message,
        ["crl"],
    ):
        assert "no key store is named. Give --" in acme.misused(*arguments)
    monkeypatch.setenv("KAKUNIN_CA_KEYS", f"file:{acme.keys}")
    acme.ok("crl", user="operator")
    # Options come before the environment.
    agent_id = acme.agent()
    acme.ok("agent", "certify", agent_id, "--keys", f"file:{acme.folder}/theirs", user="registrar")
    assert len(list(Path("theirs").iterdir())) == 1


def test_what_the_database_does_not_have(acme: Cli) -> None:
    keys = acme.key_files()
    reason = "--reason", "r"
    for command in (
        ["show", AGENT], ["certify", AGENT], ["update", AGENT, "--name", "x"], ["revoke", AGENT],
        ["suspend", AGENT, *reason], ["reinstate", AGENT], ["halt", AGENT, *reason],
    ):  # fmt: skip
        assert f"no agent {AGENT} (KA010)" in acme.refused("agent", *command)
    for command in (["rotate", AGENT], ["sign", AGENT, "ca.pem"]):
        assert "has no active certificate (KA001)" in acme.refused("agent", *command)
    assert "(KA001)" in acme.refused("agent", "revoke", "--serial", "11:22")
    agent_id = acme.agent()
    assert "no authority 00:00" in acme.refused("agent", "certify", agent_id, "--authority", "00" * 20)
    assert acme.key_files() == keys
    assert "could be a session assertion" in acme.refused(
        "agent", "sign", acme.certified()[0], assertion_like(acme.folder), user="registrar"
    )


def assertion_like(folder: Path) -> Path:
    path = folder / "jws"
    path.write_bytes(base64.urlsafe_b64encode(b'{"alg":"RS256"}').rstrip(b"=") + b".e30")
    return path


def test_no_kit(cluster: Cluster, acme: Cli) -> None:
    with fresh_database(cluster, "template1") as empty:
        acme.database = empty
        for command in (["ca", "list"], ["verify", "11"], ["agent", "create", "a"], ["crl"]):
            said = acme.refused(*command)
            assert "The kit is not in this database, or an older one: run kakunin-db migrate." in said


@pytest.mark.parametrize(
    ("arguments", "user", "role"),
    [
        ("ca init --another", "registrar", "kakunin_operator"),
        ("ca trust ca.pem", "registrar", "kakunin_operator"),
        ("ca distrust 00112233445566778899", "registrar", "kakunin_operator"),
        ("ca list", "stranger", "kakunin_auditor"),
        ("agent create a", "operator", "kakunin_registrar"),
        ("agent certify {}", "operator", "kakunin_registrar"),
        ("agent rotate {}", "operator", "kakunin_registrar"),
        ("agent update {} --name b", "agent_1", "kakunin_registrar"),
        ("agent show {}", "agent_1", "kakunin_auditor"),
        ("agent list", "stranger", "kakunin_auditor"),
        ("agent sign {} ca.pem", "agent_1", "kakunin_auditor"),
        ("agent revoke {}", "registrar", "kakunin_operator"),
        ("agent revoke --serial 11", "registrar", "kakunin_operator"),
        ("agent suspend {} --reason r", "registrar", "kakunin_operator"),
        ("agent reinstate {}", "registrar", "kakunin_operator"),
        ("agent halt {} --reason r --out .", "registrar", "kakunin_operator"),
        ("verify 11", "stranger", "kakunin_auditor"),
        ("crl", "agent_1", "kakunin_worker"),
        ("crl --watch", "agent_1", "kakunin_worker"),
    ],
)
def test_whoever_may_not_is_told_the_role(acme: Cli, arguments: str, user: str, role: str) -> None:
    agent_id = acme.agent()
    if "rotate" in arguments or "revoke {}" in arguments:
        acme.ok("agent", "certify", agent_id, user="registrar")
    keys, files = acme.key_files(), set(acme.folder.iterdir())
    said = acme.refused(*arguments.format(agent_id).split(), user=user)
    assert said.startswith("kakunin-db: permission denied for ")
    assert said.endswith(f" (42501). Its login needs the role: grant {role} to <login>\n")
    # Keys that were made meanwhile are taken away again.
    assert acme.key_files() == keys
    assert set(acme.folder.iterdir()) == files


def test_the_role_that_is_named_is_enough(acme: Cli) -> None:
    """No login of conftest has kakunin_auditor or kakunin_worker, which remedies of 42501 name."""
    agent_id, serial = acme.certified()
    with acme.database.cluster.connect(autocommit=True) as admin:
        admin.execute("create role sole login")
    try:
        for role, commands_ in (
            ("kakunin_auditor", ["ca list", "agent list", f"agent show {agent_id}", f"verify {serial}",
                                 f"agent sign {agent_id} ca.pem"]),
            ("kakunin_worker", ["crl", "crl --out list.pem"]),
        ):  # fmt: skip
            with acme.database.cluster.connect(autocommit=True) as admin:
                admin.execute(f"grant {role} to sole")
            for command in commands_:
                acme.ok(*command.split(), user="sole")
            with acme.database.cluster.connect(autocommit=True) as admin:
                admin.execute(f"revoke {role} from sole")
    finally:
        with acme.database.cluster.connect(autocommit=True) as admin:
            admin.execute("drop role sole")


# Files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ca init --another", "agent certify {}", "agent rotate {}"])
def test_no_file_is_written_over(acme: Cli, command: str) -> None:
    agent_id = acme.agent()
    if "rotate" in command:
        acme.ok("agent", "certify", agent_id, user="registrar")
    arguments = command.format(agent_id).split()
    keys = acme.key_files()
    state = acme.ok("agent", "show", agent_id).out, acme.ok("ca", "list").out
    Path("there").write_text("mine")
    Path("dangling").symlink_to("nowhere")
    for name in ("there", "dangling"):
        said = acme.refused(*arguments, "--out", name)
        assert f"{name} is there already, and nothing is written over it. Name another file." in said
    assert Path("there").read_text() == "mine"
    assert not Path("nowhere").exists()
    assert "no/x.pem cannot be written: No such file or directory" in acme.refused(
        *arguments, "--out", "no/x.pem"
    )
    assert acme.key_files() == keys
    assert (acme.ok("agent", "show", agent_id).out, acme.ok("ca", "list").out) == state
    # A place that is kept is given back when nothing comes of it.
    acme.keys.rename("away")
    (acme.folder / "keys").write_text("not a folder")
    acme.refused(*arguments, "--out", "new.pem")
    assert not Path("new.pem").exists()


def test_what_cannot_be_written_after_all_is_not_lost(kit: Cli) -> None:
    def full(path: str, mode: str) -> Any:
        open(path, mode).close()
        return open("/dev/full", "wb", buffering=0)

    agent_id = kit.agent()
    for command in (["ca", "init"], ["agent", "certify", agent_id]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commands, "open", full, raising=False)
            answer = kit.run(*command, "--out", "new.pem", "--json")
        assert answer.status == 1
        assert "new.pem cannot be written: No space left on device. The " in answer.err
        assert "--json has it" in answer.err
        assert answer.json["written"] is None
        assert not Path("new.pem").exists()


def test_a_halt_is_not_begun_without_its_folder(acme: Cli) -> None:
    agent_id, serial = acme.certified()
    Path("file").touch()
    for name in ("missing", "file", "file/below"):
        said = acme.refused("agent", "halt", agent_id, "--reason", "r", "--out", name)
        assert said.endswith(
            f"{name} is not a folder that can be written to. Nothing was halted."
            " Name another one, or leave --out away.\n"
        )
    assert acme.run("verify", serial)["valid"] == "yes"


def test_only_a_revocation_list_is_replaced(acme: Cli) -> None:
    acme.certified()
    Path("mine").write_text("mine")
    for name in ("mine", "ca.pem"):
        assert f"{name} is there already and is no revocation list" in acme.refused("crl", "--out", name)
    assert Path("mine").read_text() == "mine"
    for name in ("missing/list.crl", "."):
        assert f"{name} cannot be written. Its folder has to be there" in acme.refused("crl", "--out", name)
    for name in ("list.pem", "list.crl", "list.der"):
        acme.ok("crl", "--out", name)
    assert Path("list.crl").read_bytes() == Path("list.der").read_bytes()
    assert Path("list.pem").read_text().startswith("-----BEGIN X509 CRL-----")
    assert stat.S_IMODE(Path("list.pem").stat().st_mode) & 0o444 == 0o444
    before = Path("list.crl").read_bytes()
    acme.ok("agent", "revoke", acme.certified()[0])
    assert acme.ok("crl", "--out", "list.crl")["written"] == "list.crl"
    assert Path("list.crl").read_bytes() != before
    # The root's, when that is asked for.
    root = acme.ok("ca", "list", "--json").json
    (key_id,) = [
        a["key_id"] for a in root if a["key_id"] == a["issuer_key_id"] and a["name"] == "CN=Acme Root CA"
    ]
    acme.ok("crl", "--out", "root.pem", "--authority", key_id)
    assert "Acme Root CA" in openssl("crl", "-in", "root.pem", "-noout", "-issuer")
    said = acme.run("crl", "--out", "other.pem", "--authority", "00" * 20)
    assert said.status == 1
    assert "has no revocation list yet (KA010)" in said.err
    assert sorted(path.name for path in acme.folder.glob(".*")) == []


# Secrets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["agent", "list", "--dsn", "postgresql://kit:hunter2@secret@127.0.0.1/x"],
        ["agent", "list", "--dsn", "host=127.0.0.1 password=hunter2 secret"],
        ["agent", "list", "--dsn", "postgresql://kit:hunter2@127.0.0.1:1/x"],
        ["crl", "--watch", "--dsn", "postgresql://kit:hunter2@127.0.0.1:1/x"],
        ["agent", "list", "postgresql://kit:hunter2@127.0.0.1/x"],
        ["agent", "show", "host=127.0.0.1 password=hunter2"],
        ["host=127.0.0.1 password=hunter2"],
        ["agent", "postgresql://kit:hunter2@127.0.0.1/x"],
        ["ca", "list", "pkcs11:token=t?module-path=/x&pin-value=hunter2"],
        ["agent", "list", "--status", "pkcs11:token=t?module-path=/x&pin-value=hunter2"],
    ],
)
def test_no_secret_is_repeated(acme: Cli, arguments: list[str]) -> None:
    answer = acme.run(*arguments, user=None)
    assert answer.status in (1, 2)
    assert answer.out == ""
    assert "hunter2" not in answer.err
    assert "secret" not in answer.err.replace("it may hold a secret", "")
    assert answer.err.splitlines()[-1].startswith("kakunin-db")


def test_no_secret_of_a_key_store_is_repeated(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    agent_id = acme.agent()
    for uri in (
        "pkcs11:token=t?module-path=/missing.so&pin-value=hunter2",
        "awskms:hunter2?region=x",
        "hunter2",
    ):
        assert "hunter2" not in acme.refused("agent", "certify", agent_id, "--keys", uri, user="registrar")
    monkeypatch.setenv("KAKUNIN_KEY_PASSWORD", "hunter2")
    assert "hunter2" not in acme.refused("agent", "certify", agent_id, user="registrar")
    monkeypatch.delenv("KAKUNIN_KEY_PASSWORD")
    assert "Set KAKUNIN_KEY_PASSWORD." in acme.refused("agent", "certify", agent_id, user="registrar")


def test_an_interruption_is_one_line(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    answer = acme.run("agent", "list")
    assert (answer.status, answer.out, answer.err) == (130, "", "kakunin-db: interrupted\n")


# Watching --------------------------------------------------------------------------------------------


class Watch:
    """`crl --watch` in a process of its own, and the lines it logs."""

    def __init__(self, acme: Cli, *arguments: str, **more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kakunin_db.cli", "crl", "--watch", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=acme.folder,
            env=environment(
                KAKUNIN_DSN=acme.database.dsn("operator"), KAKUNIN_KEYS=f"file:{acme.keys}", **more
            ),
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line.rstrip("\n"))

    def wait(self, text: str, seconds: float = 10) -> str:
        """The next line with this text; those before it are passed over."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no line with {text!r} in {seconds} s, but {self.seen}")
            self.seen.append(line)
            if text in line:
                return line

    def end(self, number: int = signal.SIGTERM, seconds: float = 3) -> None:
        self.process.send_signal(number)
        assert self.process.wait(seconds) == 0
        self._reader.join()
        while not self._lines.empty():
            self.seen.append(self._lines.get())
        assert self.seen[-1].endswith("Z ended")
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in self.seen)
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""


@pytest.fixture
def watching(acme: Cli) -> Iterator[Callable[..., Watch]]:
    started: list[Watch] = []

    def start(*arguments: str, **more: str) -> Watch:
        started.append(Watch(acme, *arguments, **more))
        return started[-1]

    yield start
    for watch in started:
        watch.process.kill()
        watch.process.wait()
        for pipe in (watch.process.stdout, watch.process.stderr):
            if pipe is not None:
                watch._reader.join()
                pipe.close()


def listed(path: str) -> str:
    return openssl("crl", "-in", path, "-noout", "-text")


def test_watching(acme: Cli, watching: Callable[..., Watch]) -> None:
    database = acme.database
    agents = [acme.database_agent() for _ in range(4)]
    watch = watching("--every", "1", "--out", "list.pem")
    watch.wait("watching, every 1 s")
    watch.wait("wrote list.pem")

    def revoked(serial: str, seconds: float = 5) -> None:
        database.run("operator", "select kakunin.revoke_certificate(%s)", [serial])
        watch.wait("signed revocation list", seconds)
        watch.wait("wrote list.pem")
        assert serial.replace(":", "") in listed("list.pem")

    revoked(agents[0])

    # Its connection is ended; what happens meanwhile is not missed.
    with database.cluster.connect(database.name, autocommit=True) as admin:
        ended = admin.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and application_name = 'kakunin-db crl --watch'"
        ).fetchall()
    assert ended == [(True,)]
    database.run("operator", "select kakunin.revoke_certificate(%s)", [agents[1]])
    watch.wait("trying again in 1 s")
    watch.wait("connected again")
    watch.wait("wrote list.pem")
    assert agents[1].replace(":", "") in listed("list.pem")

    # The key store is gone for a while.
    acme.keys.rename("away")
    database.run("operator", "select kakunin.revoke_certificate(%s)", [agents[2]])
    waiting = watch.wait("waiting: revocation list of ")
    assert "cannot be read" in waiting
    receipt = database.value(
        "operator", "select kakunin.halt_agent(agent_id, 'r') ->> 'halt_id' from kakunin.certificates"
        " where serial = %s", [agents[3]],
    )  # fmt: skip
    watch.wait(f"waiting: receipt of halt {receipt}")
    Path("away").rename(acme.keys)
    watch.wait(f"signed the receipt of halt {receipt}", 15)
    watch.wait("wrote list.pem")
    for serial in agents[2:]:
        assert serial.replace(":", "") in listed("list.pem")
    # And it is not said again in every round.
    assert len([line for line in watch.seen if f"waiting: receipt of halt {receipt}" in line]) == 1
    watch.end()


def test_watching_sees_the_time_of_a_superseded_certificate_come(
    acme: Cli, watching: Callable[..., Watch]
) -> None:
    agent_id, first = acme.certified()
    acme.ok("crl", user="operator")
    acme.ok("agent", "rotate", agent_id, "--overlap", "2s", user="registrar")
    watch = watching("--every", "1", "--out", "list.pem")
    watch.wait("watching")
    watch.wait("signed revocation list")
    watch.wait("wrote list.pem")
    text = listed("list.pem")
    assert first.replace(":", "") in text
    assert "Superseded" in text
    watch.end(signal.SIGINT)


def test_watching_with_a_kms_that_does_not_answer(acme: Cli, watching: Callable[..., Watch]) -> None:
    acme.ok("crl", user="operator")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        secrets = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "hunter2", "AWS_MAX_ATTEMPTS": "1"}
        watch = watching(
            "--every",
            "1",
            "--ca-keys",
            f"awskms:?region=eu-west-1&endpoint=http://127.0.0.1:{port}",
            **secrets,
        )
        watch.wait("watching", 20)
        acme.database.run("operator", "select kakunin.revoke_certificate(%s)", [acme.database_agent()])
        silent.settimeout(10)
        connection, _ = silent.accept()
        with connection:
            # In the middle of a call it ends at once all the same.
            watch.end()
        assert not any("hunter2" in line for line in watch.seen)


def test_watching_begins_only_with_a_database(acme: Cli) -> None:
    said = acme.refused("crl", "--watch", "--dsn", "host=127.0.0.1 port=1 user=kit", user=None)
    assert "127.0.0.1" in said


# The hash of a model ---------------------------------------------------------------------------------


def test_model_hash(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3_000_000)
    Path("weights").write_bytes(content)
    expected = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert acme.ok("model-hash", "weights", user=None).out == expected + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert acme.ok("model-hash", "-", user=None).out == expected + "\n"
    assert "cannot read 'missing': No such file or directory (KA010)" in acme.refused(
        "model-hash", "missing", user=None
    )
    assert "(KA010)" in acme.refused("model-hash", ".", user=None)
    # The common options are not its: it asks no database.
    assert "unrecognized arguments" in acme.misused("model-hash", "weights", "--dsn", "x", user=None)


def test_the_bar_is_for_terminals(acme: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("weights").write_bytes(b"x" * 3_000_000)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kakunin_db.cli", "model-hash", "weights"], check=False,
            stdout=subprocess.PIPE, stderr=theirs, env=environment(TERM="xterm", COLUMNS="100"),
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nothing more is there
            while data := os.read(ours, 4096):
                shown += data
    finally:
        os.close(ours)
    assert (done.returncode, len(done.stdout)) == (0, 72)
    assert b"100%" in shown
    # And where rich is: without it there is a hash all the same.
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert acme.ok("model-hash", "weights", user=None).out.encode() == done.stdout
