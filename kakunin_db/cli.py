"""The command line: reads it, has the command performed, and says in one line what went wrong."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib
import importlib.metadata
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import (
    audit_commands,
    commands,
    database_commands,
    doctor_commands,
    export_commands,
    mcp_commands,
    serve_commands,
    webhook_commands,
)
from .errors import BadInputError, KakuninError

# Server states whose own message does not say what to do.
_REMEDIES = {
    "42501": "Run it as the login that owns the kit.",
    "42P06": "If sql/ was applied by hand, record that instead: alembic stamp <revision>.",
}

_WITHOUT_KIT = dict.fromkeys(
    ("3F000", "42883", "42P01"), "The kit is not in this database, or an older one: run kakunin-db migrate."
)

# RFC 5280 section 5.3.1, those that can be given for good.
_REASONS = (
    "unspecified", "keyCompromise", "cACompromise", "affiliationChanged", "superseded",
    "cessationOfOperation", "privilegeWithdrawn", "aACompromise",
)  # fmt: skip


_EVENTS = (
    "certificate.issued", "certificate.revoked", "certificate.expired", "agent.high_risk", "agent.created",
    "agent.suspended",
)  # fmt: skip


class _Failed(Exception):  # noqa: N818  (never leaves this module)
    def __init__(
        self, message: object, hint: str | None = None, sqlstate: str | None = None, status: int = 1
    ) -> None:
        # One line, whatever the driver made of it.
        text = " ".join(str(message).split()) + (f" ({sqlstate})" if sqlstate else "")
        super().__init__(commands.printable(f"{text}. {hint}" if hint else text))
        self.status = status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 when it failed, 2 when it was not understood."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except _Failed as failed:
        print(f"kakunin-db: {failed}", file=sys.stderr)
        return failed.status
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        # argparse quotes what it did not understand, which may be a DSN or a key's URI in the wrong place.
        if re.search(r"://|pass|pkcs11:|pin-|host=", message, re.IGNORECASE):
            message = message.partition(": ")[0] + ": this is not repeated here, because it may hold a secret"
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="kakunin-db",
        description="Cryptographic identity and row-level isolation for AI agents in Postgres.",
    )
    version = importlib.metadata.version("kakunin-db")
    parser.add_argument("--version", action="version", version=f"kakunin-db {version}")
    groups = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text, default in (
        ("migrate", "take a database to the newest revision, or to a given one", "head"),
        ("downgrade", "take a database back; to base, which removes the kit and all its data", "base"),
    ):
        command = groups.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=_migrations)
        command.add_argument(
            "--dsn",
            default=os.environ.get("KAKUNIN_DSN"),
            help="libpq connection string or URL; default $KAKUNIN_DSN",
        )
        command.add_argument(
            "--revision", default=default, help="default: %(default)s; with --sql also FROM:TO"
        )
        command.add_argument(
            "--sql", action="store_true", help="print the script for psql and touch no database"
        )
    uninstall = _add(
        groups,
        "uninstall",
        database_commands.uninstall,
        "take policies and triggers off without opening a table, then remove the kit with all its data",
        role=None,
    )
    uninstall.add_argument(
        "--dry-run", action="store_true", help="print the script for psql and change nothing"
    )
    uninstall.add_argument(
        "--without-export", action="store_true", help="although entries of the ledger are in no export"
    )
    _authority_commands(_group(groups, "ca", "certificate authorities"))
    _agent_commands(_group(groups, "agent", "agents, their certificates, and taking them away"))
    _other_commands(groups)
    _audit_commands(_group(groups, "audit", "the ledger: its key, its proofs, reading it out"))
    _recover_command(groups)
    _worker_commands(groups)
    _webhook_commands(_group(groups, "webhooks", "who is told what was decided"))
    _export_commands(_group(groups, "export", "the kit as files that others apply"))
    _mcp_command(groups)
    _serve_commands(groups)
    _doctor_command(groups)
    demo = groups.add_parser("demo", help="start a Postgres, show who sees what, and verify the ledger")
    demo.add_argument(
        "--serve",
        action="store_true",
        help="leave the server up, with its agents, and print an MCP client's configuration, until Ctrl-C",
    )
    demo.set_defaults(run=_demo)
    return parser


# The commands about identity ------------------------------------------------------------------------


def _group(groups: Any, name: str, text: str) -> Any:
    group = groups.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    return group.add_subparsers(dest="subcommand", required=True, metavar="command")


def _add(
    parent: Any,
    name: str,
    do: Callable[[argparse.Namespace], int],
    text: str,
    *,
    role: str | None = "kakunin_registrar",
    needs: str = "a database",
) -> argparse.ArgumentParser:
    """A command and what all have in common; ``role`` is what a login needs, None that it owns the kit."""
    command: argparse.ArgumentParser = parent.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=_identity, do=do, role=role, needs=needs)
    common = command.add_argument_group("common options")
    if needs != "nothing":
        for option, kind, metavar, what in (
            ("--dsn", str, "DSN", "libpq connection string or URL"),
            ("--keys", str, "URI", "where agents' keys are: awskms:, file:/path/folder or pkcs11:..."),
            ("--ca-keys", str, "URI", "where authorities' keys are, if elsewhere"),
            (
                "--crl-url",
                _url,
                "URL",
                "what certificates say of where the revocation list is; may have {key_id}",
            ),
        ):
            variable = "KAKUNIN_" + option.lstrip("-").replace("-", "_").upper()
            common.add_argument(
                option,
                type=kind,
                metavar=metavar,
                default=os.environ.get(variable) or None,
                help=f"{what}; default ${variable}",
            )
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return command


def _authority_commands(group: Any) -> None:
    operator = "kakunin_operator"
    command = _add(
        group,
        "init",
        commands.ca_init,
        "make an authority and pin it",
        role=operator,
        needs="authority's key",
    )
    command.add_argument(
        "--name", type=_text(64), default="Kakunin CA", help="of the root; default: %(default)s"
    )
    command.add_argument(
        "--intermediate",
        type=_text(64),
        metavar="NAME",
        help="make one below the root, which certifies agents",
    )
    command.add_argument("--out", metavar="FILE", help="write the certificates there, PEM, the root last")
    command.add_argument("--another", action="store_true", help="even where an authority is trusted already")

    _add(group, "list", commands.ca_list, "list the authorities", role="kakunin_auditor")

    command = _add(group, "trust", commands.ca_trust, "pin an authority by its certificate", role=operator)
    command.add_argument("file", metavar="FILE", help="PEM or DER; PEM may hold several; - for stdin")

    command = _add(
        group, "distrust", commands.ca_distrust, "register nothing more that it signed; final", role=operator
    )
    command.add_argument("key_id", metavar="KEY_ID", type=_key_id)
    _add_reason(command, "with keyCompromise or cACompromise its certificates are revoked too")


def _agent_commands(group: Any) -> None:
    operator = "kakunin_operator"
    command = _add(group, "create", commands.agent_create, "make an agent")
    command.add_argument("name", metavar="NAME", type=_text(200))
    _add_attributes(command)

    command = _add(
        group, "certify", commands.agent_certify, "make an agent's key and certificate", needs="keys"
    )
    _add_agent_id(command)
    command.add_argument(
        "--action",
        action="append",
        default=[],
        type=_action,
        help="such as orders:read or orders:*; repeatable",
    )
    command.add_argument(
        "--financial-scope", metavar="JSON", type=_scope, help="a JSON object, or @FILE that holds one"
    )
    command.add_argument(
        "--days",
        metavar="N",
        type=_days(365),
        default=dt.timedelta(days=90),
        help="how long it is valid; default 90",
    )
    command.add_argument(
        "--overlap", type=_overlap, help="how long an active certificate still counts: 30m, 1h, 7d"
    )
    command.add_argument(
        "--authority",
        metavar="KEY_ID",
        type=_key_id,
        help="who is to issue it; default: one that has none below it",
    )
    _add_out(command)

    command = _add(
        group,
        "show",
        commands.agent_show,
        "show an agent, its certificates and halts",
        role="kakunin_auditor",
    )
    _add_agent_id(command)

    command = _add(
        group, "list", commands.agent_list, "list agents, the newest first", role="kakunin_auditor"
    )
    command.add_argument("--status", choices=("active", "suspended"))
    command.add_argument(
        "--limit", metavar="N", type=_number(1, 1_000_000), default=50, help="default: %(default)s"
    )

    command = _add(
        group,
        "update",
        commands.agent_update,
        "change an agent; a certificate that says otherwise is revoked",
    )
    _add_agent_id(command)
    command.add_argument("--name", type=_text(200))
    _add_attributes(command)

    command = _add(
        group, "rotate", commands.agent_rotate, "give an agent a new key and certificate", needs="keys"
    )
    _add_agent_id(command)
    command.add_argument(
        "--overlap",
        type=_overlap,
        default=dt.timedelta(hours=1),
        help="how long the present certificate still counts: 30m, 1h, 7d; default 1h",
    )
    command.add_argument(
        "--days",
        metavar="N",
        type=_days(365),
        help="how long the new one is valid; default: as the present one",
    )
    _add_out(command)

    command = _add(group, "revoke", commands.agent_revoke, "end certificates for good", role=operator)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "agent_id", nargs="?", metavar="AGENT_ID", type=_agent_id, help="its active certificates"
    )
    which.add_argument("--serial", type=_serial, help="this certificate alone")
    _add_reason(command)

    command = _add(
        group,
        "suspend",
        commands.agent_suspend,
        "stop an agent's certificates until reinstate",
        role=operator,
    )
    _add_agent_id(command)
    command.add_argument("--reason", metavar="TEXT", type=_text(1000), required=True)

    command = _add(group, "reinstate", commands.agent_reinstate, "lift a suspension", role=operator)
    _add_agent_id(command)

    command = _add(
        group,
        "halt",
        commands.agent_halt,
        "the kill switch: suspend an agent and revoke its certificates",
        role=operator,
    )
    _add_agent_id(command)
    command.add_argument("--reason", metavar="TEXT", type=_text(1000), required=True)
    command.add_argument("--terminate", action="store_true", help="also end the backends bound to them")
    command.add_argument(
        "--out",
        metavar="FOLDER",
        help="write the receipt there, <halt id>.json, and its signature, <halt id>.sig",
    )

    command = _add(
        group,
        "sign",
        commands.agent_sign,
        "sign a message with an agent's key; prints the signature in base64",
        role="kakunin_auditor",
        needs="keys",
    )
    _add_agent_id(command)
    command.add_argument("file", metavar="FILE", help="the message; - for stdin")


def _other_commands(groups: Any) -> None:
    command = _add(
        groups,
        "verify",
        commands.verify,
        "say whether a certificate may be used now; exit status 1 if not",
        role="kakunin_auditor",
    )
    command.add_argument("serial", metavar="SERIAL", type=_serial)

    command = _add(
        groups,
        "crl",
        commands.crl,
        "sign the revocation lists and receipts that are due",
        role="kakunin_worker",
        needs="authority's key",
    )
    command.add_argument(
        "--days",
        metavar="N",
        type=_days(90),
        default=dt.timedelta(days=7),
        help="how long a list is good; default 7",
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        help="write the newest list of the issuing authority there: PEM, or DER to .crl and .der;"
        " an older list is replaced, and nothing else",
    )
    command.add_argument(
        "--authority",
        metavar="KEY_ID",
        type=_key_id,
        help="whose list that is; default: one that certifies agents",
    )
    command.add_argument("--watch", action="store_true", help="stay, and sign what becomes due")
    command.add_argument(
        "--every",
        metavar="SECONDS",
        type=_number(1, 3600),
        default=5,
        help="with --watch: how often to look; default: %(default)s",
    )

    command = _add(
        groups,
        "model-hash",
        commands.model_hash,
        "the hash of a model's configuration or weights",
        needs="nothing",
    )
    command.add_argument("path", metavar="PATH", help="a file; - for stdin")

    command = _add(
        groups,
        "jwks",
        commands.jwks,
        "the public keys that verify agents' JWTs, as a JWK set",
        needs="nothing",
    )
    command.add_argument(
        "signers",
        nargs="+",
        metavar="URI",
        help="a key: awskms:<key id, ARN or alias/...>, file:/path/key.pem or pkcs11:...;"
        " of several, the one in use and those that are about to be or were",
    )


def _export_commands(group: Any) -> None:
    for name, do, text, metavar, where in (
        (
            "supabase",
            export_commands.export_supabase,
            "write a migration for a Supabase project",
            "FOLDER",
            "default: supabase/migrations",
        ),
        (
            "sql",
            export_commands.export_sql,
            "print the kit as one file for psql",
            "FILE",
            "write it there instead",
        ),
        (
            "extension",
            export_commands.export_extension,
            "write the files that CREATE EXTENSION kakunin reads",
            "FOLDER",
            "the server's, $(pg_config --sharedir)/extension; default: this one",
        ),
    ):
        command = _add(group, name, do, text, needs="nothing")
        command.add_argument("--out", metavar=metavar, help=where.replace("%", "%%"))


def _audit_commands(group: Any) -> None:
    auditor = "kakunin_auditor"
    command = _add(
        group,
        "init",
        audit_commands.init,
        "make the key that signs tree heads",
        role="kakunin_operator",
        needs="keys",
    )
    command.add_argument(
        "--days", metavar="N", type=_days(3652), help="how long its certificate is valid; default 5 years"
    )
    command.add_argument("--another", action="store_true", help="even where the ledger has a key already")

    command = _add(
        group,
        "verify",
        audit_commands.verify,
        "verify a bundle, a proof or the ledger in a database; exit status 1 where anything is wrong",
        role=auditor,
        needs="nothing",
    )
    command.add_argument(
        "file", nargs="?", metavar="FILE", help="a bundle or a proof; - for stdin; default: the database"
    )
    command.add_argument("--dsn", default=os.environ.get("KAKUNIN_DSN"), help="default $KAKUNIN_DSN")
    command.add_argument(
        "--ca",
        action="append",
        default=[],
        metavar="FILE",
        help="the certificate of a root authority that you trust, PEM or DER; repeatable",
    )
    _add_witness(command, "where tree heads were kept; repeatable")

    command = _add(
        group, "export", audit_commands.export, "write the ledger to a bundle, JSON lines", role=auditor
    )
    command.add_argument("--out", metavar="FILE", required=True, help="never over a file; - for stdout")
    command.add_argument(
        "--from",
        dest="start",
        metavar="SIZE",
        type=_number(0, 10**15),
        default=0,
        help="begin where an export that ended at this tree size left off",
    )
    command.add_argument(
        "--size", metavar="SIZE", type=_number(1, 10**15), help="of the tree head to end with"
    )

    command = _add(group, "prove", audit_commands.prove, "prove that an event is in the ledger", role=auditor)
    command.add_argument("event_id", metavar="EVENT_ID", type=_number(1, 10**15))
    command.add_argument(
        "--size", metavar="SIZE", type=_number(1, 10**15), help="of the tree head to prove it by"
    )

    command = _add(
        group,
        "consistency",
        audit_commands.consistency,
        "prove that one tree head continues another",
        role=auditor,
    )
    command.add_argument("first", metavar="SIZE", type=_number(1, 10**15))
    command.add_argument("second", metavar="SIZE", type=_number(1, 10**15))

    command = _add(group, "list", audit_commands.listing, "list the newest entries", role=auditor)
    command.add_argument("--agent", metavar="AGENT_ID", type=_agent_id)
    command.add_argument("--type", metavar="EVENT_TYPE", type=_text(64))
    command.add_argument("--since", metavar="TIME", type=_time, help="ISO 8601, as 2026-11-23T08:00Z")
    command.add_argument(
        "--limit", metavar="N", type=_number(1, 1_000_000), default=50, help="default: %(default)s"
    )

    _add(
        group,
        "witness-sql",
        audit_commands.witness_sql,
        "print what a database needs that is to be a witness",
        needs="nothing",
    )
    _add(
        group,
        "guard-sql",
        audit_commands.guard_sql,
        "print what a superuser may run so that DDL on the ledger is refused as well",
        needs="nothing",
    )


def _recover_command(groups: Any) -> None:
    command = _add(
        groups,
        "recover",
        database_commands.recover,
        "say whether this is where the ledger was sealed, and what is missing; after a restore, an upgrade or"
        " a promotion, go on or begin a ledger of its own; exit status 1 where somebody has to decide",
        role=None,
    )
    _add_witness(command, "where tree heads were kept; repeatable")
    action = command.add_mutually_exclusive_group()
    for name, text in (
        ("continue", "the original is gone for good: this goes on as the same ledger"),
        ("renew", "the original goes on elsewhere, or the end is lost: this becomes a ledger of its own"),
    ):
        action.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    command.add_argument(
        "--without-witness",
        action="store_true",
        help="continue although no witness can tell whether the end is missing",
    )
    command.add_argument(
        "--crl",
        action="append",
        default=[],
        metavar="FILE",
        help="a revocation list that was published, PEM or DER: what it has and this database forgot is"
        " revoked; repeatable",
    )


def _worker_commands(groups: Any) -> None:
    command = _add(
        groups,
        "worker",
        audit_commands.worker,
        "seal the ledger and sign its tree heads, until it is told to stop",
        role="kakunin_worker",
        needs="keys",
    )
    for option, kind, default, text in (
        ("--interval", _seconds(0.1, 60), 1.0, "seconds between two rounds: entries are signed within it"),
        ("--poll", _seconds(0.1, 60), 1.0, "seconds after which it looks though nobody has woken it"),
        ("--lease", _seconds(1, 300), 6.0, "seconds after which another worker takes over"),
        ("--batch", _number(1, 1_000_000), 100_000, "entries to one transaction"),
        ("--witness-every", _seconds(1, 86400), 60.0, "seconds between two tree heads for a witness"),
    ):
        variable = "KAKUNIN_WORKER_" + option.lstrip("-").replace("-", "_").upper()
        command.add_argument(
            option,
            type=kind,
            metavar="N",
            default=os.environ.get(variable) or default,  # a text is read by type
            help=f"{text}; default ${variable} or {default:g}",
        )
    _add_witness(command, "where tree heads are kept as well; repeatable")
    _add_webhook_key(command, "; without one, this worker delivers no webhooks")
    command.add_argument(
        "--allow-private-webhooks",
        metavar="NETWORKS",
        type=_networks,
        default=os.environ.get("KAKUNIN_ALLOW_PRIVATE_WEBHOOKS") or [],
        help="networks that are not public and to which webhooks may be sent all the same, also without TLS,"
        " as in 10.1.0.0/16,fd00::/8; default $KAKUNIN_ALLOW_PRIVATE_WEBHOOKS or none",
    )
    command.add_argument(
        "--metrics",
        metavar="[HOST:]PORT",
        type=_address,
        help="serve Prometheus metrics; default host 127.0.0.1",
    )
    command.add_argument(
        "--log-format", choices=("json", "text"), default="json", help="default: %(default)s"
    )
    command.add_argument("--verbose", action="store_true", help="log every batch")

    command = _add(
        groups,
        "health",
        audit_commands.health,
        "say how far sealing, signing and webhooks are; exit status 1 where somebody should look",
        role="kakunin_auditor",
    )
    command.add_argument(
        "--max-lag", metavar="SECONDS", type=_seconds(0, 86400), default=30.0, help="default: %(default)g"
    )


def _webhook_commands(group: Any) -> None:
    operator = "kakunin_operator"
    command = _add(
        group, "add", webhook_commands.add, "add an endpoint; its secret is shown this once", role=operator
    )
    command.add_argument("url", metavar="URL", type=_webhook_url)
    command.add_argument(
        "--events",
        metavar="EVENT,...",
        type=_events,
        required=True,
        help=", ".join(_EVENTS),
    )
    _add_webhook_key(command)

    _add(group, "list", webhook_commands.listing, "list the endpoints", role=operator)

    for name, do, text in (
        ("remove", webhook_commands.remove, "take an endpoint away, and what it had still to get"),
        ("disable", webhook_commands.disable, "send an endpoint nothing until enable"),
        ("enable", webhook_commands.enable, "let an endpoint that was disabled go on"),
    ):
        _add_endpoint(_add(group, name, do, text, role=operator))

    command = _add(
        group,
        "rotate",
        webhook_commands.rotate,
        "give an endpoint another secret, shown this once",
        role=operator,
    )
    _add_endpoint(command)
    command.add_argument(
        "--overlap",
        type=_overlap,
        default=dt.timedelta(days=1),
        help="how long the present secret signs as well: 30m, 1h, 7d; default 1d",
    )
    _add_webhook_key(command)

    command = _add(
        group,
        "deliveries",
        webhook_commands.deliveries,
        "list deliveries, the newest first",
        role=operator,
    )
    command.add_argument("--endpoint", metavar="ENDPOINT_ID", type=_endpoint_id)
    command.add_argument("--state", choices=("pending", "delivered", "dead"))
    command.add_argument(
        "--limit", metavar="N", type=_number(1, 1_000_000), default=50, help="default: %(default)s"
    )

    command = _add(
        group,
        "replay",
        webhook_commands.replay,
        "send again: a message, or all that an endpoint did not get",
        role=operator,
    )
    command.add_argument("--message", metavar="MESSAGE_ID", type=_text(100))
    command.add_argument("--endpoint", metavar="ENDPOINT_ID", type=_endpoint_id)

    command = _add(
        group,
        "test",
        webhook_commands.test,
        "send an endpoint a message of type webhook.test; exit status 1 if it is not delivered",
        role=operator,
    )
    _add_endpoint(command)
    command.add_argument(
        "--wait",
        metavar="SECONDS",
        type=_seconds(0, 3600),
        default=15.0,
        help="how long to wait for the worker; default: %(default)g",
    )


def _mcp_command(groups: Any) -> None:
    text = "serve one agent's tools to MCP clients, over stdin and stdout"
    command = groups.add_parser(
        "mcp", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=_identity, do=mcp_commands.serve, role="kakunin_agent", needs="a database")
    for option, metavar, variable, what in (
        ("--dsn", "DSN", "DSN", "libpq connection string or URL"),
        ("--serial", "SERIAL", "CERT_SERIAL", "of the agent's certificate"),
        ("--signer", "URI", "SIGNER", "its key: file:/path/key.pem, awskms:... or pkcs11:..."),
        (
            "--installation",
            "UUID",
            "INSTALLATION_ID",
            "the database it is for: select kakunin.installation_id()",
        ),
    ):
        help_text = f"{what}; default $KAKUNIN_{variable}"
        default = os.environ.get(f"KAKUNIN_{variable}") or None
        command.add_argument(option, metavar=metavar, default=default, help=help_text)
    command.add_argument(
        "--sql",
        action="store_true",
        help="also query, explain and describe_schema; the login must be kakunin_agent alone",
    )
    for option, kind, limit, what in (
        ("--max-rows", _number(1, 100_000), 500, "rows of an answer"),
        ("--max-bytes", _number(10_000, 100_000_000), 250_000, "bytes of an answer"),
        ("--timeout", _seconds(0.1, 600), 15.0, "seconds of a call"),
    ):
        command.add_argument(
            option, metavar="N", type=kind, default=limit, help=f"{what}; default: %(default)s"
        )


def _serve_commands(groups: Any) -> None:
    command = _add(
        groups, "serve", serve_commands.serve, "serve the REST API of the SDK", role="kakunin_gateway"
    )
    for option, kind, default, what in (
        ("--listen", _address, ("127.0.0.1", 8400), "where; default 127.0.0.1:8400"),
        (
            "--permits",
            _actions,
            [],
            "actions that it certifies at most, as in orders:read,trade:*; * for any",
        ),
        ("--operator-role", _text(63), "kakunin_operator", "role that halts, suspends and revokes"),
        ("--tls-cert", str, None, "its certificate with the chain, PEM"),
        ("--tls-key", str, None, "the key of that, PEM"),
        ("--behind-proxy", str, None, "addresses of proxies that end TLS and say who asks"),
    ):
        variable = "KAKUNIN_SERVE_" + option.lstrip("-").replace("-", "_").upper()
        command.add_argument(
            option,
            type=kind,
            metavar=option.lstrip("-").upper(),
            default=os.environ.get(variable) or default,
            help=f"{what}; default ${variable}",
        )
    for option, metavar, number, default_number, what in (
        ("--days", "N", _days(365), dt.timedelta(days=90), "how long its certificates are valid; default 90"),
        ("--timeout", "SECONDS", _seconds(0.1, 60), 5.0, "for an answer of the database; default 5"),
        ("--connections", "N", _number(1, 100), 4, "to the database at most, of each role; default 4"),
        ("--concurrency", "N", _number(1, 10_000), 200, "requests at once, beyond which 503; default 200"),
        ("--rate-limit", "N", _number(1, 1_000_000), 600, "requests of a key a minute; default 600"),
        ("--public-rate-limit", "N", _number(1, 1_000_000), 120, "without a key, of an address; default 120"),
        ("--max-body", "BYTES", _number(1_000, 10_000_000), 65_536, "of a request; default 65536"),
    ):
        command.add_argument(option, metavar=metavar, type=number, default=default_number, help=what)
    command.add_argument(
        "--log-format", choices=("json", "text"), default="json", help="default: %(default)s"
    )
    _key_commands(command.add_subparsers(dest="subcommand", metavar="keys"))


def _key_commands(groups: Any) -> None:
    group = _group(groups, "keys", "API keys")
    operator = "kakunin_operator"
    command = _add(group, "create", serve_commands.create_key, "make a key, shown this once", role=operator)
    command.add_argument("name", metavar="NAME", type=_text(200))
    command.add_argument(
        "--scopes", metavar="SCOPE,...", type=_list, required=True, help="such as agents:read,events:write"
    )
    command.add_argument("--agent", metavar="AGENT_ID", type=_agent_id, help="the only one it is good for")
    command.add_argument(
        "--expires", metavar="DURATION", type=_lasting, help="how long it is good: 1h, 90d; default: always"
    )
    _add(group, "list", serve_commands.list_keys, "list the keys", role=operator)
    command = _add(group, "revoke", serve_commands.revoke_key, "end a key for good", role=operator)
    command.add_argument("key_id", metavar="KEY_ID", type=_api_key_id)


def _doctor_command(groups: Any) -> None:
    command = _add(
        groups,
        "doctor",
        doctor_commands.doctor,
        "read a live database and say what to mend; exit status 3 after a warning, 4 after worse",
        role="kakunin_auditor",
        needs="nothing",
    )
    command.add_argument("--dsn", default=os.environ.get("KAKUNIN_DSN"), help="default $KAKUNIN_DSN")
    command.add_argument(
        "--ignore",
        metavar="ID[=OBJECT]",
        action="append",
        default=[],
        help="leave out what a check finds, or what it finds about this object; repeatable",
    )
    command.add_argument(
        "--fail-on",
        choices=("critical", "warning", "notice", "never"),
        default="warning",
        help="the mildest that is not exit status 0; after a notice it is 5; default: %(default)s",
    )
    command.add_argument(
        "--complete", action="store_true", help="what could not be checked counts as a warning"
    )
    command.add_argument(
        "--max-lag", metavar="SECONDS", type=_seconds(0, 86400), default=30.0, help="default: %(default)g"
    )
    command.add_argument(
        "--max-skew",
        metavar="SECONDS",
        type=_seconds(0, 3600),
        default=5.0,
        help="of clocks; default: %(default)g",
    )


def _add_endpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("endpoint_id", metavar="ENDPOINT_ID", type=_endpoint_id)


def _add_webhook_key(command: argparse.ArgumentParser, text: str = "") -> None:
    command.add_argument(
        "--webhook-key",
        metavar="FILE",
        help="what endpoints' secrets are encrypted under: the base64 of 32 bytes (openssl rand -base64 32);"
        f" more lines hold earlier keys. Default: what $KAKUNIN_WEBHOOK_KEY holds{text}",
    )


def _add_witness(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument(
        "--witness",
        action="append",
        default=[],
        metavar="URI",
        help=f"{text}: file:/path, s3://bucket/prefix or postgresql://...",
    )


def _add_agent_id(command: argparse.ArgumentParser) -> None:
    command.add_argument("agent_id", metavar="AGENT_ID", type=_agent_id)


def _add_attributes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=_text(200), help="such as gpt-4o")
    command.add_argument("--model-version", metavar="VERSION", type=_text(200))
    command.add_argument(
        "--model-hash", metavar="HASH", type=_model_hash, help="as kakunin-db model-hash prints it"
    )
    command.add_argument("--tenant", type=_text(200))


def _add_reason(command: argparse.ArgumentParser, text: str | None = None) -> None:
    command.add_argument("--reason", choices=_REASONS, default=_REASONS[0], help=text)


def _add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="FILE", help="write the certificate there, PEM; never over a file")


def _identity(options: argparse.Namespace) -> int:
    grant = (
        f"Its login needs the role: grant {options.role} to <login>" if options.role else _REMEDIES["42501"]
    )
    try:
        with _said_in_one_line({**_WITHOUT_KIT, "42501": grant}):
            status = commands.run(options)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interrupted:
        raise _Failed("interrupted", _notes(interrupted), status=130) from interrupted
    except BrokenPipeError:
        # The reader has had enough. Nothing more is to be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# What arguments are -----------------------------------------------------------------------------------


def _checked(check: Callable[[str], Any], text: str) -> Any:
    """What ``check`` makes of it; argparse quotes the message of an ArgumentTypeError alone."""
    try:
        return check(text)
    except BadInputError as error:
        raise argparse.ArgumentTypeError(f"{error}. {error.hint}" if error.hint else str(error)) from error


def _text(longest: int) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise argparse.ArgumentTypeError("this is not UTF-8") from error
        if not text.strip() or len(text) > longest:
            raise argparse.ArgumentTypeError(f"1 to {longest} characters, and not blank")
        return text

    return check


def _number(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if not re.fullmatch("[0-9]{1,15}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most}")
        return int(text)

    return check


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def check(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or not least <= float(text) <= most:
            raise argparse.ArgumentTypeError(f"seconds from {least:g} to {most:g}")
        return float(text)

    return check


def _address(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"(?:(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+):)?([0-9]{1,5})", text)
    if not found or not 1 <= int(found[2]) <= 65535:
        raise argparse.ArgumentTypeError("a port, or host:port")
    return (found[1] or "127.0.0.1").strip("[]"), int(found[2])


def _time(text: str) -> dt.datetime:
    try:
        moment = dt.datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text))
    except ValueError as error:
        raise argparse.ArgumentTypeError("a time of ISO 8601, as 2026-11-23T08:00Z") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=dt.timezone.utc)


def _days(most: int) -> Callable[[str], dt.timedelta]:
    number = _number(1, most)
    return lambda text: dt.timedelta(days=number(text))


def _overlap(text: str) -> dt.timedelta:
    found = re.fullmatch("([0-9]{1,7})([smhd])", text)
    seconds = int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else -1
    if not 0 <= seconds <= 30 * 86400:
        raise argparse.ArgumentTypeError("a number with s, m, h or d, as in 30m, 1h or 7d; at most 30 days")
    return dt.timedelta(seconds=seconds)


def _lasting(text: str) -> dt.timedelta:
    found = re.fullmatch("([1-9][0-9]{0,6})([hd])", text)
    if not found or int(found[1]) * {"h": 1, "d": 24}[found[2]] > 3652 * 24:
        raise argparse.ArgumentTypeError("a number with h or d, as in 1h or 90d; at most 10 years")
    return dt.timedelta(hours=int(found[1]) * {"h": 1, "d": 24}[found[2]])


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _actions(text: str) -> list[str]:
    return [action if action == "*" else _action(action) for action in _list(text)]


def _api_key_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("a key id is a UUID. kakunin-db serve keys list has them") from error


def _agent_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError("an agent id is a UUID. kakunin-db agent list has them") from error


def _endpoint_id(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            "an endpoint id is a UUID. kakunin-db webhooks list has them"
        ) from error


def _events(text: str) -> list[str]:
    events = [event.strip() for event in text.split(",")]
    if unknown := [event for event in events if event not in _EVENTS]:
        raise argparse.ArgumentTypeError(f"no event {unknown[0]!r}; there are {', '.join(_EVENTS)}")
    return events


def _webhook_url(text: str) -> str:
    from .webhooks.sending import Target  # noqa: PLC0415

    _checked(Target, text)
    return text


def _networks(text: str) -> Any:
    from .webhooks.sending import parse_networks  # noqa: PLC0415

    return _checked(parse_networks, text)


def _key_id(text: str) -> str:
    digits = text.replace(":", "").upper()
    if not re.fullmatch("([0-9A-F]{2}){8,32}", digits):
        raise argparse.ArgumentTypeError(
            "a key id is hexadecimal, as in 9F:02:... kakunin-db ca list has them"
        )
    return ":".join(digits[at : at + 2] for at in range(0, len(digits), 2))


def _serial(text: str) -> str:
    from .serials import normalize_serial  # noqa: PLC0415

    serial: str = _checked(normalize_serial, text)
    return serial


def _model_hash(text: str) -> str:
    from .model_hash import check_model_hash  # noqa: PLC0415

    value: str = _checked(check_model_hash, text)
    return value


def _action(text: str) -> str:
    from .ca import _ACTION  # noqa: PLC0415

    if not _ACTION.fullmatch(text):
        raise argparse.ArgumentTypeError(
            "1 to 128 characters from A-Z a-z 0-9 _ . : / -;"
            " only a whole last part may be a star, as in trade:*"
        )
    return text


def _url(text: str) -> str:
    if not re.fullmatch(r"https?://[!-~]+", text) or len(text) > 1000:
        raise argparse.ArgumentTypeError("an http or https URL of printable ASCII, without spaces")
    return text


def _scope(text: str) -> dict[str, Any]:
    from .ca import canonical_json  # noqa: PLC0415

    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise argparse.ArgumentTypeError(f"the file cannot be read: {reason}") from error

    def once(members: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(members)) < len(members):
            raise ValueError("a name is there twice")
        return dict(members)

    try:
        scope = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"this is not JSON: {error}") from error
    if not isinstance(scope, dict):
        raise argparse.ArgumentTypeError('a JSON object, such as {"max_single_trade_usd": 10000}')
    _checked(lambda _: canonical_json(scope), text)
    return scope


# What went wrong --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _said_in_one_line(remedies: dict[str, str]) -> Iterator[None]:
    import psycopg  # noqa: PLC0415

    try:
        yield
    except commands.Refused as error:
        raise _Failed(error, error.hint, status=error.status) from error
    except KakuninError as error:
        raise _Failed(error, error.hint, error.sqlstate) from error
    except psycopg.Error as error:
        hint = error.diag.message_hint or remedies.get(error.sqlstate or "")
        hint = " ".join(filter(None, [hint, _notes(error)])) or None
        raise _Failed(error.diag.message_primary or error, hint, error.sqlstate) from error


def _notes(error: BaseException) -> str | None:
    """What the client adds to an error of others: a key that was left behind."""
    return " ".join(getattr(error, "__notes__", [])) or None


# The other commands -----------------------------------------------------------------------------------


def _migrations(options: argparse.Namespace) -> int:
    with _said_in_one_line(_REMEDIES):
        from alembic.util import CommandError  # noqa: PLC0415

        from . import migrate  # noqa: PLC0415

        upwards = options.command == "migrate"
        try:
            if options.sql:
                print((migrate.migrate_sql if upwards else migrate.downgrade_sql)(options.revision), end="")
                return 0
            change = (migrate.migrate if upwards else migrate.downgrade)(
                commands.checked_dsn(options),
                options.revision,
                on_notice=lambda text: print(f"NOTICE: {text}", file=sys.stderr),
            )
        except CommandError as error:
            raise _Failed(error) from error
    before, after = change.before or "base", change.after or "base"
    print(f"already at {after}" if before == after else f"from {before} to {after}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        status: int | None = importlib.import_module("kakunin_db.demo").main(serve=options.serve)
    except ImportError as error:
        # Its own extra's packages; a name of ours that is missing is a bug.
        if (error.name or "").startswith("kakunin_db"):
            raise
        raise _Failed(
            f"the demo needs {error.name or error}",
            f"Run: pip install 'kakunin-db[{'demo,mcp' if options.serve else 'demo'}]'",
        ) from error
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
