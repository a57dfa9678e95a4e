"""What the commands about the API do: ``serve`` and ``serve keys``."""

from __future__ import annotations

import argparse
import datetime as dt
import ipaddress
import logging
import sys
from typing import TYPE_CHECKING

from .commands import Refused, _answer, _answer_rows, _connect, _note

if TYPE_CHECKING:
    import socket


def serve(options: argparse.Namespace) -> int:
    """Serves the API until it is told to stop."""
    import asyncio  # noqa: PLC0415 - other commands start sooner without

    try:
        import uvicorn  # noqa: PLC0415

        from .serve.app import App  # noqa: PLC0415
        from .serve.backend import Settings  # noqa: PLC0415
    except ImportError as error:
        if (error.name or "").startswith("kakunin_db"):
            raise
        raise Refused(
            f"the API needs {error.name or error}", "Run: pip install 'kakunin-db[serve]'"
        ) from error
    from .logs import JSONFormatter, TextFormatter  # noqa: PLC0415

    host, port = options.listen
    if bool(options.tls_cert) != bool(options.tls_key):
        raise Refused("TLS needs a certificate and its key", "Give --tls-cert and --tls-key.", status=2)
    if not (options.tls_cert or options.behind_proxy or _is_loopback(host)):
        raise Refused(
            f"API keys would be sent in the clear to {host}",
            "Give --tls-cert and --tls-key, or --behind-proxy ADDRESSES where a proxy ends TLS.",
            status=2,
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if options.log_format == "json" else TextFormatter())
    log = logging.getLogger("kakunin_db.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    app = App(
        Settings(
            options.dsn,
            keys=options.keys,
            ca_keys=options.ca_keys,
            crl_url=options.crl_url,
            operator=options.operator_role,
            permits=options.permits,
            lifetime=options.days,
            timeout=options.timeout,
            connections=options.connections,
            per_minute=options.rate_limit,
            public_per_minute=options.public_rate_limit,
            max_body=options.max_body,
        )
    )
    config = uvicorn.Config(
        app.asgi,
        host=host,
        port=port,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
        proxy_headers=bool(options.behind_proxy),
        forwarded_allow_ips=options.behind_proxy or "",
        access_log=False,  # it has paths and queries as they were sent
        server_header=False,
        date_header=False,
        lifespan="on",
        log_config=None,
        limit_concurrency=options.concurrency,
        timeout_graceful_shutdown=10,
    )
    asyncio.run(app.backend.check())

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                scheme = "https" if options.tls_cert else "http"
                name = f"[{host}]" if ":" in host else host
                url = f"{scheme}://{name}:{port}"
                log.info("listening on %s", url, extra={"event": "listening", "fields": {"url": url}})

    server = Server(config)
    server.run()
    return 0 if server.started else 1


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def create_key(options: argparse.Namespace) -> int:
    from .serve.keys import ApiKey  # noqa: PLC0415

    key = ApiKey.generate()
    with _connect(options) as connection:
        row = connection.execute(
            "select kakunin.create_api_key(%s, %s, %s, %s, %s, now() + %s)",
            [key.prefix, key.digest, options.name, options.scopes, options.agent, options.expires],
        ).fetchone()
    assert row is not None  # noqa: S101 - a function's row
    _note("the key is shown this once")
    named = {"key_id": row[0], "name": options.name, "scopes": options.scopes, "agent_id": options.agent}
    _answer(options, {**named, "key": key.text}, [*named.items(), ("key", key.text)])
    return 0


def list_keys(options: argparse.Namespace) -> int:
    names = (
        "key_id", "prefix", "name", "scopes", "agent_id", "created_at", "created_by", "expires_at",
        "revoked_at", "last_used_at",
    )  # fmt: skip
    with _connect(options) as connection:
        rows = connection.execute(
            f"select {', '.join(names)}, now() from kakunin.api_keys order by created_at".encode()  # noqa: S608
        ).fetchall()
    _answer_rows(
        options,
        [dict(zip(names, row[:-1], strict=True)) for row in rows],
        [
            (row[0], row[2], _state(row[8], row[7], row[10]), ",".join(row[3]), row[4], row[7], row[9])
            for row in rows
        ],
    )
    return 0


def _state(revoked: dt.datetime | None, expires: dt.datetime | None, now: dt.datetime) -> str:
    if revoked is not None:
        return "revoked"
    return "expired" if expires is not None and expires <= now else "active"


def revoke_key(options: argparse.Namespace) -> int:
    with _connect(options) as connection:
        row = connection.execute("select kakunin.revoke_api_key(%s)", [options.key_id]).fetchone()
    assert row is not None  # noqa: S101
    _answer(
        options,
        {"key_id": options.key_id, "revoked_at": row[0]},
        [("key_id", options.key_id), ("revoked_at", row[0])],
    )
    return 0
