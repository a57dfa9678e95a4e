"""What the command ``mcp`` does."""

from __future__ import annotations

import argparse
import logging
import sys

from .commands import Refused


def serve(options: argparse.Namespace) -> int:
    """Serves one agent's tools over stdio."""
    from .mcp.session import Session  # noqa: PLC0415
    from .mcp.sql_tool import Limits, SQLTool  # noqa: PLC0415
    from .serials import normalize_serial  # noqa: PLC0415
    from .signers import open_signer  # noqa: PLC0415

    for name, value in (
        ("--serial or KAKUNIN_CERT_SERIAL", options.serial),
        ("--signer or KAKUNIN_SIGNER", options.signer),
    ):
        if not value:
            raise Refused("the server has no agent", f"Give {name}.", status=2)
    if options.sql and sys.platform == "win32":
        raise Refused("--sql limits what is read in a way that Windows does not have", "Run it under WSL.")
    # stdout is the protocol's.
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="kakunin-db mcp: %(message)s")
    signer = open_signer(options.signer)
    session = Session(options.dsn, normalize_serial(options.serial), signer, options.installation)
    try:
        limits = Limits(options.max_rows, options.max_bytes, options.timeout)
        sql_tool = SQLTool(session, limits) if options.sql else None
        # Not before all is well: the SDK takes longer to import than everything up to here.
        try:
            import anyio  # noqa: PLC0415

            from .mcp import server  # noqa: PLC0415
        except ImportError as error:
            if (error.name or "").startswith("kakunin_db"):
                raise
            raise Refused(
                f"the MCP server needs {error.name or error}", "Run: pip install 'kakunin-db[mcp]'"
            ) from error
        anyio.run(server.serve, session, sql_tool)
    finally:
        session.close()
    return 0
