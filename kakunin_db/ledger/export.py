"""The ledger read out of a database: bundles, proofs, and what only the database can be asked.

The database is not asked to judge itself: what it gives goes through the same verification as a bundle.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
from cryptography import x509
from psycopg.rows import dict_row

from ..errors import BadInputError
from ..jsonb import loads
from ..logs import counted
from .bundle import (
    MAX_LEAVES,
    Finding,
    Report,
    archived_line,
    authority_line,
    certificate_line,
    end_line,
    header_line,
    leaves_line,
    ledger_key_line,
    missing_line,
    tree_head_line,
    verify_bundle,
)
from .heads import TreeHead
from .merkle import leaf_hash

Connection = psycopg.Connection[Any]


def _rows(connection: Connection, query: str, *parameters: Any) -> list[dict[str, Any]]:
    with psycopg.Cursor(connection, row_factory=dict_row) as cursor:
        cursor.execute(query.encode(), parameters)
        return cursor.fetchall()


_HEADS = 'select installation_id, tree_size, "timestamp", root, key_id, signature from kakunin.tree_heads'


def tree_heads(connection: Connection, first_size: int = 0, last_size: int | None = None) -> list[TreeHead]:
    """The signed tree heads of these sizes, the smallest first. Needs any of the kit's roles."""
    rows = _rows(
        connection,
        f"{_HEADS} where tree_size >= %s and tree_size <= coalesce(%s, tree_size) order by tree_size",
        first_size,
        last_size,
    )
    return [TreeHead(*row.values()) for row in rows]


def _head(connection: Connection, tree_size: int | None) -> TreeHead:
    heads = (
        [TreeHead(*row.values()) for row in _rows(connection, f"{_HEADS} order by tree_size desc limit 1")]
        if tree_size is None
        else tree_heads(connection, tree_size, tree_size)
    )
    if not heads:
        raise BadInputError(
            "the ledger has no signed tree head yet"
            if tree_size is None
            else f"there is no signed tree head of size {tree_size}",
            "The worker signs them: kakunin-db health says how far it is.",
        )
    return heads[0]


def _certificates(
    connection: Connection, query: str, line: Callable[[x509.Certificate], bytes]
) -> Iterator[bytes]:
    """Their lines. Where one cannot be read it is left out, and what it was for then fails to verify."""
    for row in _rows(connection, query):
        with contextlib.suppress(ValueError):
            yield line(x509.load_der_x509_certificate(row["der"]))


_AUTHORITIES = "select der from kakunin.authorities order by not_before, key_id"
_KEYS = "select der from kakunin.ledger_keys order by not_before, key_id"
_CERTIFICATES = "select der from kakunin.certificates order by registered_at, serial"


def bundle_lines(
    connection: Connection,
    *,
    first_index: int = 0,
    tree_size: int | None = None,
    on_entry: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[bytes]:
    """The lines of a bundle of the entries from a signed tree head's size on up to another's.

    Memory holds one ``leaves/1`` and its entries at a time. On a connection in autocommit no transaction
    stays open: what is sealed does not change. Needs ``kakunin_auditor``.

    :param first_index: 0, or the size of the signed tree head that an earlier bundle ended with.
    :param tree_size: of the tree head it ends with; default: the newest.
    :param on_entry: called with each leaf's row (index, event_id, recorded_at, agent_id, entry, ...).
    :raises BadInputError: there are no signed tree heads of these sizes.
    """
    last = _head(connection, tree_size)
    if not 0 <= first_index <= last.tree_size:
        raise BadInputError(f"a bundle up to {last.tree_size} cannot begin at {first_index}")
    heads = tree_heads(connection, max(first_index, 1), last.tree_size)
    if first_index and (not heads or heads[0].tree_size != first_index):
        raise BadInputError(
            f"there is no signed tree head of size {first_index}", "Begin where an earlier export ended."
        )
    frontier: Sequence[bytes] = (
        _rows(connection, "select kakunin.frontier(%s)", first_index)[0]["frontier"] if first_index else ()
    )
    yield header_line(
        last.installation, dt.datetime.now(dt.timezone.utc), first_index=first_index, frontier=frontier
    )
    yield from _certificates(connection, _AUTHORITIES, authority_line)
    yield from _certificates(connection, _KEYS, ledger_key_line)
    yield from _certificates(connection, _CERTIFICATES, certificate_line)
    entries = 0
    index = first_index
    for head in heads:
        while index < head.tree_size:
            count = min(MAX_LEAVES, head.tree_size - index)
            leaves = _rows(connection, "select * from kakunin.ledger_leaves(%s, %s)", index, count)
            for run in _runs(leaves):
                # A leaf has more than one row where somebody went around the kit; the verifier sees that.
                hashes = {leaf["index"]: leaf["leaf_hash"] for leaf in run}
                yield leaves_line(run[0]["index"], b"".join(hashes.values()))
                for gone, group in itertools.groupby(run, lambda leaf: leaf["archived"]):
                    if gone:
                        members = list(group)
                        yield archived_line(members[0]["index"], len(members))
                        continue
                    for leaf in group:
                        if on_entry is not None:
                            on_entry(leaf)
                        if leaf["entry"] is None:
                            yield missing_line(leaf["index"])
                        else:
                            entries += 1
                            yield leaf["entry"].encode() + b"\n"
            index += count
        yield tree_head_line(head)
    yield end_line(index, entries)


def _runs(leaves: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Leaves that follow one another: all of them, unless batches are gone."""
    start = 0
    for at in range(1, len(leaves) + 1):
        if at == len(leaves) or leaves[at]["index"] > leaves[at - 1]["index"] + 1:
            yield leaves[start:at]
            start = at


def verify_database(
    connection: Connection,
    roots: Sequence[x509.Certificate],
    *,
    witnesses: Iterable[TreeHead] = (),
    progress: Callable[[int], None] | None = None,
) -> tuple[Report, int]:
    """Verifies the ledger in a database, here: all that :func:`~.bundle.verify_bundle` looks at, and besides
    that the columns beside the entries say the same, that no entry is there that was never sealed, and that
    those not sealed yet continue their chains.

    Needs ``kakunin_auditor``. Parameters and errors are those of ``verify_bundle``.

    :returns: the report, and how many entries are not sealed yet.
    """
    columns: list[Finding] = []
    # Where each chain stands at the end of the tree.
    chains: dict[int, _Stand] = {}

    def look(leaf: dict[str, Any]) -> None:
        if leaf["entry"] is None:
            return
        try:
            entry = loads(leaf["entry"])
            chain, sequence = _place(entry)
            chains[chain] = _Stand(sequence, leaf["leaf_hash"].hex(), leaf["event_id"])
            finding = _columns(entry, leaf, leaf["index"])
        except _NO_ENTRY:
            return  # the bundle's verification says what is wrong with it
        if finding is not None:
            columns.append(finding)

    # One snapshot for what is not sealed, what is in no batch, and what every chain has to reach; then the
    # tree, which only grows.
    with connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        strays = _rows(connection, "select event_id, entry from kakunin.stray_entries()")
        unsealed = _rows(connection, "select * from kakunin.unsealed_entries()")
        stands = _rows(connection, "select chain, sequence, head from kakunin.chains")
        sizes = _rows(connection, "select (kakunin.ledger_status() ->> 'tree_size')::bigint as size")
        head = _head(connection, None)
        tail = [
            row
            for first in range(head.tree_size, sizes[0]["size"], MAX_LEAVES)
            for row in _rows(connection, "select * from kakunin.ledger_leaves(%s, %s)", first, MAX_LEAVES)
        ]
    report = verify_bundle(
        bundle_lines(connection, tree_size=head.tree_size, on_entry=look),
        roots,
        witnesses=witnesses,
        progress=progress,
    )
    found = columns[:100]
    for row in strays:
        found.append(
            Finding(
                "inserted", report.tree_size, row["event_id"],
                f"event {row['event_id']} is in the ledger's table and was never sealed",
            )
        )  # fmt: skip
    sealed = head.tree_size + len({row["index"] for row in tail})
    if sealed != sizes[0]["size"]:
        found.append(
            Finding(
                "missing", sealed, None,
                f"the tree has {sizes[0]['size']} leaves, and the batches have {sealed} of them",
            )
        )  # fmt: skip
    found += _tail(tail + unsealed, chains, head.tree_size)
    found += _stands(stands, chains, report)
    count = report.count + len(found)
    together = (*report.findings, *found)[:100]
    return (
        Report(
            together, count, report.tree_size, report.entries, report.heads, report.archived, report.last_head
        ),
        len(tail) + len(unsealed),
    )


class _Stand(NamedTuple):
    """Of a chain: its last entry."""

    sequence: int
    digest: str
    event_id: int | None


_START = _Stand(0, "0" * 64, None)
# What reading what is no entry raises.
_NO_ENTRY = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


def _place(entry: dict[str, Any]) -> tuple[int, int]:
    """Its chain, and its number there."""
    chain, sequence = entry["chain"], entry["sequence"]
    if type(chain) is not int or type(sequence) is not int:
        raise TypeError
    return chain, sequence


def _stands(rows: list[dict[str, Any]], chains: dict[int, _Stand], report: Report) -> Iterator[Finding]:
    """Compares where every chain should end with where its entries do."""
    for row in rows:
        sequence, digest, event_id = chains.get(row["chain"], _START)
        if sequence < row["sequence"] and not report.archived:
            yield Finding(
                "missing", report.tree_size, None,
                f"chain {row['chain']} has {counted(row['sequence'])} and the ledger {sequence} of them",
            )  # fmt: skip
        elif sequence > row["sequence"]:
            yield Finding(
                "inserted", report.tree_size, event_id,
                f"chain {row['chain']} has {counted(row['sequence'])}, and event {event_id} would be number"
                f" {sequence}",
            )  # fmt: skip
        elif sequence == row["sequence"] and digest != bytes(row["head"]).hex():
            yield Finding(
                "altered", report.tree_size, event_id,
                f"event {event_id} was altered, or what chain {row['chain']} ends with was",
            )  # fmt: skip
    for chain in chains.keys() - {row["chain"] for row in rows}:
        yield Finding(
            "missing", report.tree_size, chains[chain].event_id,
            f"chain {chain} is not among the chains, and event {chains[chain].event_id} is in it",
        )  # fmt: skip


def _columns(entry: dict[str, Any], row: dict[str, Any], index: int) -> Finding | None:
    agent = None if entry["agent_id"] is None else uuid.UUID(entry["agent_id"])
    recorded = dt.datetime.fromisoformat(entry["recorded_at"].replace("Z", "+00:00"))
    if (entry["event_id"], agent, recorded) == (row["event_id"], row["agent_id"], row["recorded_at"]):
        return None
    return Finding(
        "altered", index, row["event_id"],
        f"the columns of event {row['event_id']} do not say what the entry says: its agent, id or time",
    )  # fmt: skip


def _tail(rows: list[dict[str, Any]], chains: dict[int, _Stand], index: int) -> Iterator[Finding]:
    """Entries that no tree head covers yet have only their chains to be judged by."""
    for row in rows:
        if row["entry"] is None:
            yield Finding(
                "missing", row["index"], row["event_id"],
                f"the database has no event {row['event_id']}, sealed and not signed yet",
            )  # fmt: skip
            continue
        try:
            entry = loads(row["entry"])
            finding = _columns(entry, row, index)
            chain, sequence = _place(entry)
            before = chains.get(chain, _START)
            linked = (sequence - 1, entry["prev"]) == before[:2]
            if sequence > before.sequence:
                digest = leaf_hash(row["entry"].encode()).hex()
                chains[chain] = _Stand(sequence, digest, row["event_id"])
        except _NO_ENTRY:
            yield Finding(
                "malformed", index, row["event_id"],
                f"event {row['event_id']}, not sealed yet, is no entry",
            )  # fmt: skip
            continue
        if finding is not None:
            yield finding
        if not linked:
            yield Finding(
                "altered", index, row["event_id"],
                f"event {row['event_id']}, not sealed yet, does not continue its chain: it, or the one before"
                " it, was altered or is gone",
            )  # fmt: skip


# Proofs ---------------------------------------------------------------------------------------------


def _vouching(connection: Connection) -> list[dict[str, Any]]:
    lines = [
        *_certificates(connection, _AUTHORITIES, authority_line),
        *_certificates(connection, _KEYS, ledger_key_line),
    ]
    return [json.loads(line) for line in lines]


def inclusion_proof(connection: Connection, event_id: int, tree_size: int | None = None) -> dict[str, Any]:
    """An ``inclusion_proof/1`` that an event is in the tree of this size, by default the first signed one
    that has it (RFC 6962 section 2.1.1). Needs ``kakunin_auditor``, or a session bound to the event's agent.

    :raises BadInputError: there is no such event, or no signed tree head covers it yet.
    """
    proof = _rows(connection, "select kakunin.inclusion_proof(%s, %s)", event_id, tree_size)[0][
        "inclusion_proof"
    ]
    return {
        "kakunin": "inclusion_proof/1",
        "entry": proof["entry"],
        "index": proof["index"],
        "tree_head": _head(connection, proof["tree_size"]).to_json(),
        "path": proof["path"],
        "certificates": _vouching(connection),
    }


def consistency_proof(connection: Connection, first_size: int, second_size: int) -> dict[str, Any]:
    """A ``consistency_proof/1`` that the tree of the second size begins with that of the first (RFC 6962
    section 2.1.2). Needs ``kakunin_auditor``.

    :raises BadInputError: there are no signed tree heads of these sizes.
    """
    first, second = _head(connection, first_size), _head(connection, second_size)
    proof = _rows(connection, "select kakunin.consistency_proof(%s, %s)", first_size, second_size)[0][
        "consistency_proof"
    ]
    return {
        "kakunin": "consistency_proof/1",
        "first": first.to_json(),
        "second": second.to_json(),
        "path": proof["path"],
        "certificates": _vouching(connection),
    }
