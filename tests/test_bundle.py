"""Bundles that were tampered with in every way, and what verification says of them."""

from __future__ import annotations

import base64
import copy
import dataclasses
import datetime as dt
import functools
import hashlib
import io
import json
import random
import shutil
import subprocess
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from kakunin_db import AgentCertificate, CertificateAuthority, LocalSigner
from kakunin_db.errors import BadInputError, LedgerIntegrityError
from kakunin_db.ledger import (
    EMPTY_ROOT,
    MAX_LINE,
    FalseSignatureError,
    Finding,
    Frontier,
    Report,
    TreeHead,
    TrustAnchors,
    UntrustedKeyError,
    archived_line,
    authority_line,
    certificate_line,
    end_line,
    header_line,
    leaf_hash,
    leaves_line,
    ledger_key_line,
    missing_line,
    tree_head_line,
    verify_bundle,
    verify_proof,
)

DAY = dt.timedelta(days=1)
MADE_AT = dt.datetime(2026, 11, 23, 8, 15, tzinfo=dt.timezone.utc)
INSTALLATION = uuid.UUID("4f0c0d3e-9a51-4d0c-8f5e-0a1b2c3d4e5f")
AGENTS = [uuid.UUID(int=n << 96 | 0x4000_8000_0000_0000_0000) for n in (1, 2, 3)]
SIZE, LEAVES, EVERY = 2400, 100, 300


class World:
    """Keys and certificates, made once."""

    def __init__(self) -> None:
        signers = [LocalSigner.generate() for _ in range(6)]
        root, below, self.ledger, agent, self.mallory, other = signers
        self.root = CertificateAuthority.create(root, "Root", path_length=1)
        self.authority = CertificateAuthority.create(below, "Below", issuer=self.root)
        self.stranger = CertificateAuthority.create(other, "Stranger")
        self.key = self.authority.issue_ledger_key(INSTALLATION, self.ledger.public_key())
        self.certificates = [self.authority.issue(a, agent.public_key()) for a in AGENTS]
        # Of the tree heads. An hour on, when a key that a test makes later is valid as well.
        self.now = int(self.key.not_valid_before_utc.timestamp() * 1000) + 3_600_000

    @property
    def roots(self) -> list[x509.Certificate]:
        return [self.root.certificate]


@functools.cache
def world() -> World:
    return World()


def key_id(certificate: x509.Certificate) -> str:
    return json.loads(ledger_key_line(certificate))["key_id"]


def sign(
    size: int,
    root: bytes,
    *,
    signer: LocalSigner | None = None,
    key: x509.Certificate | None = None,
    **changes: Any,
) -> TreeHead:
    """A tree head; its time is the later, the larger the tree."""
    timestamp = changes.pop("timestamp", world().now + size)
    tree = (size, timestamp, root)
    signature = (signer or world().ledger).sign(hashlib.sha256(TreeHead.bytes_to_sign(*tree)).digest())
    return TreeHead(
        changes.pop("installation", INSTALLATION),
        *tree,
        changes.pop("key_id", key_id(key or world().key)),
        changes.pop("signature", signature),
    )


@dataclass
class Leaf:
    """An entry to be, its members as they are in the text."""

    event_id: int
    chain: int
    sequence: int
    prev: bytes
    agent_id: str = "null"
    serial: str = "null"
    metadata: str = '{"table": "orders"}'
    event_type: str = "data_access"
    login: str = "agent_1"
    session_id: str = "null"
    risk: str = "null"
    installation: uuid.UUID = INSTALLATION

    @property
    def entry(self) -> bytes:
        return (
            f'{{"kakunin":"entry/1","installation":"{self.installation}","event_id":{self.event_id},'
            f'"recorded_at":"2026-11-23T08:15:00.123456Z","event_type":"{self.event_type}",'
            f'"agent_id":{self.agent_id},"serial":{self.serial},"login":"{self.login}",'
            f'"session_id":{self.session_id},"chain":{self.chain},"sequence":{self.sequence},'
            f'"prev":"{self.prev.hex()}","risk":{self.risk},"metadata":{self.metadata}}}'
        ).encode()

    @property
    def hash(self) -> bytes:
        return leaf_hash(self.entry)


class Book:
    """A ledger, its entries in six chains: two of the first agent, one each of the others, two of
    decisions."""

    def __init__(self, size: int, leaves: int = LEAVES, every: int = EVERY, seed: int = 7) -> None:
        chosen = random.Random(seed)
        w = world()
        owners = [0, 0, 1, 2, None, None]
        places: dict[int, tuple[int, bytes]] = {}
        self.leaves, self.every = leaves, every
        self.entries: list[Leaf] = []
        for i in range(size):
            chain = chosen.randrange(len(owners))
            owner = owners[chain]
            sequence, prev = places.get(chain, (0, bytes(32)))
            leaf = Leaf(i * 3 + 10, chain + 1, sequence + 1, prev)
            if owner is None:
                leaf.event_type, leaf.agent_id = "agent.halted", f'"{chosen.choice(AGENTS)}"'
            else:
                leaf.agent_id, leaf.serial = f'"{AGENTS[owner]}"', f'"{w.certificates[owner].serial}"'
            self.entries.append(leaf)
            places[chain] = leaf.sequence, leaf.hash
        self.hashes = [leaf.hash for leaf in self.entries]
        sizes = [*range(every, size, every), size] if size else []
        self.heads = [sign(n, self.root(n)) for n in sizes]
        self.installation = INSTALLATION
        self.first_index = 0

    def root(self, size: int, hashes: Sequence[bytes] | None = None) -> bytes:
        tree = Frontier()
        tree.extend(b"".join((hashes or self.hashes)[:size]))
        return tree.root()

    def certificate_lines(self) -> list[bytes]:
        w = world()
        return [
            authority_line(w.root.certificate),
            authority_line(w.authority.certificate),
            ledger_key_line(w.key),
            *[certificate_line(c.certificate) for c in w.certificates],
        ]

    def copy(self) -> Book:
        # What a leaf holds is immutable, as a head is.
        other = copy.copy(self)
        other.entries = [copy.copy(leaf) for leaf in self.entries]
        other.hashes, other.heads = [*self.hashes], [*self.heads]
        return other

    def relist(self) -> Book:
        """The listed hashes are those of the entries as they are now."""
        self.hashes = [leaf.hash for leaf in self.entries]
        return self

    def rechain(self, since: int) -> Book:
        """So do the chains fit, from an entry on."""
        last: dict[int, tuple[int, bytes]] = {}
        for i, leaf in enumerate(self.entries):
            if i > since and leaf.chain in last:
                leaf.sequence, leaf.prev = last[leaf.chain][0] + 1, last[leaf.chain][1]
            last[leaf.chain] = leaf.sequence, leaf.hash
        return self.relist()

    def resign(self) -> Book:
        """And the heads: what only the holder of the key can do."""
        sizes = {head.tree_size for head in self.heads if head.tree_size < len(self.hashes)} | {
            len(self.hashes)
        }
        self.heads = [sign(n, self.root(n)) for n in sorted(sizes)]
        return self

    def successor(self, index: int) -> int | None:
        chain = self.entries[index].chain
        return next((i for i in range(index + 1, len(self.entries)) if self.entries[i].chain == chain), None)

    def lines(self) -> list[bytes]:
        size, first = len(self.hashes), self.first_index
        tree = Frontier()
        tree.extend(b"".join(self.hashes[:first]))
        out = [header_line(self.installation, MADE_AT, first_index=first, frontier=tree.hashes)]
        out += self.certificate_lines()
        heads: dict[int, list[TreeHead]] = {}
        for head in self.heads:
            heads.setdefault(head.tree_size, []).append(head)
        stops = sorted({n for n in heads if n <= size} | {size} | set(range(0, size, self.leaves)))
        at = first
        out += map(tree_head_line, heads.get(first, []))
        for stop in stops:
            if stop <= at:
                continue
            out.append(leaves_line(at, b"".join(self.hashes[at:stop])))
            out += [leaf.entry + b"\n" for leaf in self.entries[at:stop]]
            out += map(tree_head_line, heads.get(stop, []))
            at = stop
        for n in sorted(n for n in heads if n > size):
            out += map(tree_head_line, heads[n])
        out.append(end_line(size, size - first))
        return out


@functools.cache
def _book() -> Book:
    return Book(SIZE)


@pytest.fixture
def book() -> Book:
    return _book().copy()


def verify(lines: Sequence[bytes] | Book, **options: Any) -> Report:
    return verify_bundle(lines.lines() if isinstance(lines, Book) else lines, world().roots, **options)


def found(report: Report) -> list[tuple[str, int]]:
    return [(finding.kind, finding.index) for finding in report.findings]


def only(report: Report) -> Finding:
    assert len(report.findings) == report.count == 1, report.findings
    return report.findings[0]


def at_entry(lines: list[bytes], index: int) -> int:
    """The place of an entry's line."""
    return [n for n, line in enumerate(lines) if line.startswith(b'{"kakunin":"entry/1"')][index]


def at_kind(lines: list[bytes], kind: str, number: int = 0) -> int:
    return [n for n, line in enumerate(lines) if line.startswith(b'{"kakunin":"%s"' % kind.encode())][number]


# The first entry, the last, either side of the borders of a leaves/1 and of a tree head, and one in the
# middle.
PLACES = [0, 1, 99, 100, 299, 300, 1250, 2398, 2399]
places = pytest.mark.parametrize("index", PLACES)

# What is in order -------------------------------------------------------------------------------------


def test_a_good_bundle(book: Book) -> None:
    reached: list[int] = []
    report = verify(book, progress=reached.append)
    assert report.ok
    assert report.findings == ()
    assert (report.tree_size, report.entries, report.heads, report.archived) == (SIZE, SIZE, 8, 0)
    assert report.last_head == book.heads[-1]
    assert reached == list(range(100, 2401, 100))


def test_from_a_file(book: Book, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    path.write_bytes(b"".join(book.lines()))
    with path.open("rb") as file:
        assert verify_bundle(file, world().roots).ok


def test_roots_agree_with_pymerkle(book: Book) -> None:
    tree = InmemoryTree(algorithm="sha256")
    for leaf in book.entries:
        tree.append_entry(leaf.entry)
    for head in book.heads:
        # pymerkle 6, which Python 3.10 gets, calls it a state.
        assert (tree.get_root if hasattr(tree, "get_root") else tree.get_state)(head.tree_size) == head.root


def test_an_empty_ledger() -> None:
    empty = Book(0)
    assert verify(empty).ok
    empty.heads = [sign(0, EMPTY_ROOT)]
    report = verify(empty)
    assert report.ok
    assert report.heads == 1
    empty.heads = [sign(0, bytes(32))]
    assert found(verify(empty)) == [("altered", 0)]


def test_what_entries_may_hold() -> None:
    book = Book(0)
    for n, (event_type, login, session, metadata) in enumerate(
        [
            ("api_call", "agent_1", "null", "{}"),
            ("api_call", 'say \\"hi\\" \\u00e9 \\\\', '"s"', "null"),
            ("agent.halted", "ägent", '"ü\\n"', '"text"'),
            ("x", "", '""', '[1, {"a": {"a": [true, false, null]}}]'),
            ("x", "y", "null", "-1.5e-7"),
            # What a float or Python's int() would not take; jsonb has up to 131072 digits.
            ("x", "y", "null", '{"n": 1' + "0" * 20000 + "}"),
            ("x", "y", "null", '{"entry": "{\\"kakunin\\":\\"entry/1\\"}", "ключ": "значение"}'),
        ]
    ):
        leaf = Leaf(n + 1, n + 1, 1, bytes(32), "null", "null", metadata, event_type, login, session)
        book.entries.append(leaf)
    book.relist().resign()
    assert verify(book).ok


def test_more_than_one_tree_head_of_a_size(book: Book) -> None:
    head = book.heads[3]
    later = sign(head.tree_size, head.root, timestamp=head.timestamp + 1)
    book.heads.insert(4, later)
    report = verify(book)
    assert report.ok
    assert report.heads == 9


def test_a_second_ledger_key(book: Book) -> None:
    w = world()
    key = w.root.issue_ledger_key(INSTALLATION, w.mallory.public_key())
    book.heads[4:] = [sign(h.tree_size, h.root, signer=w.mallory, key=key) for h in book.heads[4:]]
    lines = book.lines()
    lines.insert(at_kind(lines, "ledger_key/1"), ledger_key_line(key))
    assert verify(lines).ok


def test_an_installation_that_was_restored_under_another_name() -> None:
    """Entries and heads of both, each head by a key of its own installation."""
    w, other = world(), uuid.UUID(int=5)
    key = w.authority.issue_ledger_key(other, w.mallory.public_key())
    book = Book(20, 10, 10)
    for leaf in book.entries[10:]:
        leaf.installation = other
    book.rechain(-1).resign()
    book.heads[1] = sign(20, book.root(20), signer=w.mallory, key=key, installation=other)
    book.installation = other
    lines = book.lines()
    lines.insert(at_kind(lines, "ledger_key/1"), ledger_key_line(key))
    assert verify(lines).ok
    # Without that key the entries are nobody's.
    report = verify(book)
    assert {"untrusted_key", "malformed"} <= {kind for kind, _ in found(report)}
    assert ("malformed", 10) in found(report)


def test_flat_memory() -> None:
    """Of entries alone nothing is kept: more of them in as many chains do not take more."""

    def stream(book: Book) -> int:
        lines = book.lines()
        tracemalloc.start()
        assert verify_bundle(iter(lines), world().roots).ok
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    short, long = Book(500), Book(5000)
    stream(short)  # what is made once
    assert stream(long) < stream(short) + 50_000


# A later part, archived and missing entries -------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 300, 1200, 1500, 2400])
def test_a_later_part(book: Book, first: int) -> None:
    if not any(head.tree_size == first for head in book.heads):
        book.heads.insert(0, sign(first, book.root(first)))
    book.first_index = first
    book.heads = [head for head in book.heads if head.tree_size >= first]
    report = verify(book, witnesses=[sign(first - 1, bytes(32))])
    assert report.ok, report.findings
    assert (report.tree_size, report.entries) == (SIZE, SIZE - first)


def test_a_later_part_shows_the_head_it_begins_at(book: Book) -> None:
    book.first_index = 1200
    lines = book.lines()
    del lines[at_kind(lines, "tree_head/1")]
    assert found(verify(lines)) == [("unsigned", 1200)]
    wrong = book.copy()
    wrong.heads = [sign(1200, bytes(32)), *book.heads[4:]]
    assert found(verify(wrong)) == [("altered", 1200)]


def test_a_frontier_that_is_not_the_trees(book: Book) -> None:
    book.first_index = 1200
    lines = book.lines()
    header = json.loads(lines[0])
    header["frontier"][1] = "00" * 32
    lines[0] = json.dumps(header, separators=(",", ":")).encode() + b"\n"
    assert found(verify(lines))[0] == ("altered", 1200)
    header["frontier"].pop()
    lines[0] = json.dumps(header, separators=(",", ":")).encode() + b"\n"
    assert found(verify(lines)) == [("malformed", 0)]


@pytest.mark.parametrize(("first", "count"), [(0, 100), (500, 30), (370, 300), (0, 2400)])
def test_archived_entries(book: Book, first: int, count: int) -> None:
    lines, left = [], (first, first + count)
    index = 0
    pending: list[int] = []

    def flush() -> None:
        if pending:
            lines.append(archived_line(pending[0], len(pending)))
            pending.clear()

    for line in book.lines():
        if line.startswith(b'{"kakunin":"entry/1"'):
            index += 1
            if left[0] < index <= left[1]:
                pending.append(index - 1)
                continue
        flush()
        lines.append(line)
    lines[-1] = end_line(SIZE, SIZE - count)
    report = verify(lines)
    assert report.ok, report.findings
    assert (report.archived, report.entries) == (count, SIZE - count)


def test_archived_is_said_of_listed_leaves_only(book: Book) -> None:
    for wrong in (archived_line(0, 101), archived_line(100, 1), archived_line(5, 0), archived_line(99, 2)):
        lines = book.lines()
        lines[at_entry(lines, 0)] = wrong
        kinds = {kind for kind, _ in found(verify(lines))}
        assert "malformed" in kinds
        assert "missing" in kinds


def test_an_entry_and_its_archived_line(book: Book) -> None:
    lines = book.lines()
    lines.insert(at_entry(lines, 51), archived_line(50, 1))
    assert ("inserted", 51) in found(verify(lines))


@places
def test_what_the_database_does_not_have(book: Book, index: int) -> None:
    lines = book.lines()
    lines[at_entry(lines, index)] = missing_line(index)
    lines[-1] = end_line(SIZE, SIZE - 1)
    finding = only(verify(lines))
    assert (finding.kind, finding.index) == ("missing", index)
    assert finding.message == f"The database has no entry {index} any more."


# Entries changed ------------------------------------------------------------------------------------------


@places
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"orders", b"ordars"),
        (b'"event_id":', b'"event_id":1'),
        (b'"sequence":', b'"sequence":1'),
        (b'"chain":', b'"chain":7'),
        (b'"prev":"', b'"prev":"'),
        (b'"login":"agent_1"', b'"login":"agent_2"'),
        (b'"kakunin":"entry/1"', b'"kakunin":"entry/2"'),
        (b"orders", b"\xff"),
        (b'"metadata":', b'"metadata": '),
        (b"}\n", b"}}\n"),
        (b"}\n", b"}\r\n"),
    ],
    ids=["metadata", "event", "sequence", "chain", "prev", "login", "kind", "utf8", "blank", "brace", "crlf"],
)
def test_an_entry_was_changed(book: Book, index: int, old: bytes, new: bytes) -> None:
    lines = book.lines()
    at = at_entry(lines, index)
    changed = lines[at].replace(old, new)
    if old == new:
        changed = lines[at].replace(book.entries[index].prev.hex().encode(), b"ab" * 32)
    assert changed != lines[at]
    lines[at] = changed
    finding = only(verify(lines))
    assert (finding.kind, finding.index) == ("altered", index)
    if new == b"ordars":
        assert finding.event_id == book.entries[index].event_id
        assert finding.message == (
            f"Entry {index}, event {finding.event_id}, is not as it was listed: its bytes were changed."
        )


def test_several_were_changed(book: Book) -> None:
    lines = book.lines()
    for index in (5, 6, 99, 100, 1999):
        at = at_entry(lines, index)
        lines[at] = lines[at].replace(b"orders", b"ordars")
    assert found(verify(lines)) == [("altered", index) for index in (5, 6, 99, 100, 1999)]


def test_not_more_findings_are_kept_than_a_hundred(book: Book) -> None:
    report = verify([line.replace(b"orders", b"ordars") for line in book.lines()])
    assert len(report.findings) == 100
    assert report.count == SIZE
    assert not report.ok


@places
def test_an_entry_was_taken_out(book: Book, index: int) -> None:
    lines = book.lines()
    del lines[at_entry(lines, index)]
    lines[-1] = end_line(SIZE, SIZE - 1)
    finding = only(verify(lines))
    assert (finding.kind, finding.index) == ("missing", index)
    assert finding.message == f"Entry {index} is missing; the hash is listed."


@pytest.mark.parametrize(("first", "count"), [(0, 100), (10, 5), (95, 10), (2390, 10)])
def test_several_were_taken_out(book: Book, first: int, count: int) -> None:
    lines = book.lines()
    gone = [lines[at_entry(lines, i)] for i in range(first, first + count)]
    lines = [line for line in lines if line not in gone]
    report = verify(lines)
    assert report.findings[0].kind == "missing"
    assert report.findings[0].index == first
    # One finding for each leaves/1.
    assert report.count == len({i // LEAVES for i in range(first, first + count)})
    if report.count == 1:
        expected = f"The entries {first} to {first + count - 1} are missing; the hash is listed."
        assert report.findings[0].message == expected


@places
def test_an_entry_was_put_in(book: Book, index: int) -> None:
    lines = book.lines()
    leaf = dataclasses.replace(book.entries[index], event_id=99999, metadata="1")
    lines.insert(at_entry(lines, index), leaf.entry + b"\n")
    finding = only(verify(lines))
    assert (finding.kind, finding.index, finding.event_id) == ("inserted", index, 99999)


def test_an_entry_was_put_in_where_no_leaves_are(book: Book) -> None:
    lines = book.lines()
    leaf = dataclasses.replace(book.entries[0], event_id=99999)
    lines.insert(-1, leaf.entry + b"\n")
    assert found(verify(lines)) == [("inserted", SIZE)]
    lines = book.lines()
    lines.insert(1, leaf.entry + b"\n")
    assert found(verify(lines))[0] == ("inserted", 0)


@places
def test_an_entry_is_there_twice(book: Book, index: int) -> None:
    lines = book.lines()
    at = at_entry(lines, index)
    lines.insert(at, lines[at])
    finding = only(verify(lines))
    assert finding.kind == "inserted"
    assert finding.index in (index, index + 1)
    assert finding.event_id == book.entries[index].event_id


@pytest.mark.parametrize("far", [1, 2, 50, 99, 100, 1000])
@pytest.mark.parametrize("index", [0, 99, 100, 250, 1299])
def test_two_entries_changed_places(book: Book, index: int, far: int) -> None:
    lines = book.lines()
    a, b = at_entry(lines, index), at_entry(lines, index + far)
    lines[a], lines[b] = lines[b], lines[a]
    report = verify(lines)
    assert {finding.kind for finding in report.findings} == {"reordered"}, report.findings
    assert report.findings[0].index == index


@pytest.mark.parametrize(
    ("index", "to"), [(0, 50), (0, 99), (50, 0), (10, 1200), (1200, 10), (2399, 0), (0, 2399)]
)
def test_an_entry_was_moved(book: Book, index: int, to: int) -> None:
    lines = book.lines()
    to_line = at_entry(lines, to)
    line = lines.pop(at_entry(lines, index))
    lines.insert(to_line, line)
    report = verify(lines)
    assert {finding.kind for finding in report.findings} == {"reordered"}, report.findings
    assert report.findings[0].index == min(index, to)


# With the list of hashes changed as well ------------------------------------------------------------------


@places
def test_the_list_was_changed_as_well(book: Book, index: int) -> None:
    book.entries[index].metadata = '{"table": "ordars"}'
    book.relist()
    report = verify(book)
    finding = report.findings[0]
    after = book.successor(index)
    assert finding.kind == "altered"
    if after is not None:
        # The next of its chain names another hash.
        assert finding.index == index
        assert finding.event_id == book.entries[index].event_id
        assert report.count == 1
    else:
        assert index >= 2100
        assert finding.index == 2100
        assert "from 2100 to 2399" in finding.message


@pytest.mark.parametrize("index", [0, 100, 1250, 2100])
def test_an_entry_whose_prev_was_changed(book: Book, index: int) -> None:
    """Wrong on both sides: so it is this one, and not the one before it."""
    index = next(i for i in range(index, SIZE) if book.entries[i].sequence > 1 and book.successor(i))
    book.entries[index].prev = b"\xab" * 32
    book.relist()
    report = verify(book)
    assert found(report)[0] == ("altered", index)
    assert report.count == 1


@places
def test_the_chains_were_made_to_fit_as_well(book: Book, index: int) -> None:
    book.entries[index].metadata = '{"table": "ordars"}'
    book.rechain(index)
    finding = only(verify(book))
    before, after = index // EVERY * EVERY, (index // EVERY + 1) * EVERY
    assert (finding.kind, finding.index) == ("altered", before)
    fits = f"the tree head over {before} entries fits, and that over {after} does not"
    if not before:
        fits = f"the tree head over {after} entries does not fit"
    assert finding.message == (
        f"Entries were changed along with their listed hashes, somewhere from {before} to"
        f" {after - 1}: {fits}."
    )


@places
def test_only_the_list_was_changed(book: Book, index: int) -> None:
    """Then the entry is not blamed: it is as it was signed."""
    book.hashes[index] = leaf_hash(b"another")
    finding = only(verify(book))
    assert (finding.kind, finding.index) == ("malformed", index)
    assert finding.message == (
        f"The listed hash of entry {index} was changed; the entry is as it was signed."
    )


@pytest.mark.parametrize("index", [0, 99, 100, 1250, 2300])
def test_taken_out_of_the_list_as_well(book: Book, index: int) -> None:
    del book.entries[index], book.hashes[index]
    report = verify(book)
    assert report.findings[0].kind == "missing"
    assert index // EVERY * EVERY <= report.findings[0].index <= SIZE


@pytest.mark.parametrize("index", [0, 99, 100, 1250, 2300])
def test_put_into_the_list_as_well(book: Book, index: int) -> None:
    leaf = dataclasses.replace(book.entries[index], event_id=99999)
    book.entries.insert(index, leaf)
    report = verify(book.relist())
    assert not report.ok
    assert report.findings[0].index // EVERY == index // EVERY or report.findings[0].index == index


@pytest.mark.parametrize("index", [0, 99, 100, 1250, 2300])
def test_an_entry_is_in_the_list_twice(book: Book, index: int) -> None:
    book.entries.insert(index + 1, book.entries[index])
    report = verify(book.relist())
    assert found(report)[0] == ("inserted", index + 1)


@pytest.mark.parametrize("index", [0, 99, 100, 1250])
def test_reordered_in_the_list_as_well(book: Book, index: int) -> None:
    after = book.successor(index)
    assert after is not None
    book.entries[index], book.entries[after] = book.entries[after], book.entries[index]
    report = verify(book.relist())
    assert found(report)[0] == ("reordered", index), report.findings


def test_a_whole_leaves_line_was_taken_out(book: Book) -> None:
    lines = book.lines()
    first, last = at_kind(lines, "leaves/1", 4), at_kind(lines, "leaves/1", 5)
    report = verify(lines[:first] + lines[last:])
    assert found(report)[0] == ("missing", 400)
    assert report.findings[0].message.startswith("The entries 400 to 499 are missing")


def test_a_whole_leaves_line_is_there_twice(book: Book) -> None:
    lines = book.lines()
    first, last = at_kind(lines, "leaves/1", 4), at_kind(lines, "leaves/1", 5)
    report = verify(lines[:last] + lines[first:])
    assert report.findings[0].kind == "inserted"
    assert report.findings[0].index == 500


@pytest.mark.parametrize("change", ["count", "short", "none", "base64"])
def test_a_leaves_line_that_is_none(book: Book, change: str) -> None:
    lines = book.lines()
    at = at_kind(lines, "leaves/1", 4)
    content = json.loads(lines[at])
    if change == "count":
        content["count"] = 99
    elif change == "short":
        content["hashes"] = content["hashes"][:-4]
    elif change == "none":
        content.update(count=0, hashes="")
    else:
        content["hashes"] = "!" + content["hashes"][1:]
    lines[at] = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    assert found(verify(lines))[0] == ("malformed", 400)


# Wrong before it was sealed: the tree is signed, and the chains do not fit ---------------------------------


def test_an_entry_was_taken_out_before_it_was_sealed(book: Book) -> None:
    index = next(i for i in range(500, SIZE) if book.entries[i].sequence > 2)
    chain = book.entries[index].chain
    del book.entries[index]
    after = next(i for i in range(index, SIZE) if book.entries[i].chain == chain)
    finding = only(verify(book.relist().resign()))
    assert (finding.kind, finding.index) == ("missing", after)
    assert f"of chain {chain} are missing, as the ledger was signed." in finding.message


def test_the_first_of_a_chain_was_taken_out_before_it_was_sealed(book: Book) -> None:
    del book.entries[0]
    assert only(verify(book.relist().resign())).kind == "missing"


def test_an_entry_was_changed_before_it_was_sealed(book: Book) -> None:
    book.entries[700].metadata = "1"
    finding = only(verify(book.relist().resign()))
    assert (finding.kind, finding.index) == ("altered", 700)
    assert "next in its chain, names another hash, as the ledger was signed." in finding.message


def test_an_entry_behind_a_good_tree_head_is_not_blamed() -> None:
    """The one before it in the chain is in a part that a head covers; so it is the later one."""
    book = Book(400, 100, 300)
    last = {leaf.chain: i for i, leaf in enumerate(book.entries[:300])}
    after = next(i for i in range(300, 400) if book.entries[i].chain == 1)
    assert last[1] < 300
    while book.successor(after) is not None:  # nothing follows it in its chain
        del book.entries[book.successor(after)]
    book.entries[after].prev = bytes(range(32))
    book.relist()
    book.heads = [book.heads[0], sign(len(book.hashes), book.root(len(book.hashes)))]
    finding = only(verify(book))
    assert (finding.kind, finding.index) == ("altered", after)


def test_a_chain_is_one_agents(book: Book) -> None:
    w = world()
    index = next(i for i in range(500, SIZE) if book.entries[i].chain == 1)
    book.entries[index].agent_id = f'"{AGENTS[2]}"'
    book.entries[index].serial = f'"{w.certificates[2].serial}"'
    report = verify(book.rechain(index).resign())
    assert found(report)[0] == ("altered", index)
    assert "in the chain of another agent" in report.findings[0].message


def test_event_ids_rise_along_a_chain(book: Book) -> None:
    index = next(i for i in range(500, SIZE) if book.entries[i].chain == 1)
    book.entries[index].event_id = 1
    finding = only(verify(book.rechain(index).resign()))
    assert (finding.kind, finding.index) == ("altered", index)


def test_a_chain_that_begins_after_something() -> None:
    book = Book(0)
    book.entries = [Leaf(1, 1, 1, b"\1" * 32)]
    assert found(verify(book.relist().resign())) == [("altered", 0)]


@pytest.mark.parametrize(
    ("serial", "message"),
    [
        (lambda: f'"{world().certificates[1].serial}"', "is that of agent"),
        (lambda: '"3A:F2"', "is in no certificate of the bundle"),
    ],
    ids=["another's", "unknown"],
)
def test_a_serial_is_that_of_its_agent(book: Book, serial: Callable[[], str], message: str) -> None:
    index = next(i for i in range(500, SIZE) if book.entries[i].chain == 1)
    book.entries[index].serial = serial()
    finding = only(verify(book.rechain(index).resign()))
    assert (finding.kind, finding.index) == ("certificate_false", index)
    assert message in finding.message


@pytest.mark.parametrize(
    "metadata",
    [
        '1,"agent_id":null',
        '{"a": 1, "a": 2}',
        "NaN",
        "Infinity",
        "{",
        "",
        "[" * 100_000 + "]" * 100_000,
        '"\t"',
        "1 ",
        "'1'",
    ],
    ids=["members", "twice", "nan", "infinity", "open", "nothing", "deep", "tab", "blank", "quotes"],
)
def test_metadata_is_one_json_value(book: Book, metadata: str) -> None:
    """Even where the bytes are those that were signed: another reader might see another agent."""
    book.entries[555].metadata = metadata
    finding = only(verify(book.rechain(555).resign()))
    assert (finding.kind, finding.index) == ("malformed", 555)


RISK = '{"band": "low", "score": 0.1000, "factors": {}, "agent_band": "low", "agent_score": 0.0000}'


@pytest.mark.parametrize(
    "risk",
    [
        RISK,
        RISK.replace("{}", '{"rate": 0.412}'),
        RISK.replace("{}", '{"amount": 0.950, "venue": 0.750}, "revoked": true').replace("low", "critical"),
        RISK.replace("0.1000", "1.0000"),
    ],
)
def test_an_entry_has_what_it_was_scored_with(book: Book, risk: str) -> None:
    book.entries[555].risk = risk
    assert verify(book.rechain(555).resign()).ok


@pytest.mark.parametrize(
    "risk",
    [
        "",
        "0.1",
        "{}",
        "[]",
        "{" + RISK + "}",
        RISK.replace(": ", ":"),
        RISK.replace("0.1000", "1e9"),
        RISK.replace("0.1000", '"0.1000"'),
        RISK.replace("low", "none"),
        RISK.replace("{}", '{"rate": {"a": 1}}'),
        RISK.replace("{}", '{"rate": 0.412,}'),
        RISK.replace("{}", '{}, "band": "high"'),
        RISK + ',"agent_id":null',
    ],
)  # fmt: skip
def test_a_risk_is_of_the_form_the_database_writes(book: Book, risk: str) -> None:
    book.entries[555].risk = risk
    finding = only(verify(book.rechain(555).resign()))
    assert (finding.kind, finding.index) == ("malformed", 555)


# Tree heads -----------------------------------------------------------------------------------------------


def test_a_head_less_is_no_less_proof(book: Book) -> None:
    del book.heads[3]
    assert verify(book).ok


def test_nothing_is_after_the_last_head(book: Book) -> None:
    del book.heads[-1]
    finding = only(verify(book))
    assert (finding.kind, finding.index) == ("unsigned", 2100)
    assert finding.message == "No tree head that verifies covers the entries 2100 to 2399."
    book.heads = []
    assert found(verify(book)) == [("unsigned", 0)]


def test_the_same_head_twice_says_the_same(book: Book) -> None:
    book.heads.insert(3, book.heads[3])
    assert verify(book).ok


def test_heads_that_changed_places(book: Book) -> None:
    lines = book.lines()
    a, b = at_kind(lines, "tree_head/1", 3), at_kind(lines, "tree_head/1", 4)
    lines[a], lines[b] = lines[b], lines[a]
    assert found(verify(lines)) == [("reordered", 1500), ("reordered", 1200)]


def test_a_head_from_before(book: Book) -> None:
    lines = book.lines()
    lines.insert(at_kind(lines, "tree_head/1", 5) + 1, lines[at_kind(lines, "tree_head/1", 2)])
    finding = only(verify(lines))
    assert (finding.kind, finding.index) == ("tree_head_forked", 900)


def test_a_head_that_is_older_than_the_one_before(book: Book) -> None:
    head = book.heads[5]
    book.heads[5] = sign(head.tree_size, head.root, timestamp=book.heads[4].timestamp - 1)
    assert found(verify(book)) == [("tree_head_forked", 1800)]


def test_two_heads_of_a_size(book: Book) -> None:
    other = sign(1800, bytes(32))
    book.heads.insert(6, other)
    finding = only(verify(book))
    assert (finding.kind, finding.index) == ("tree_head_forked", 1800)
    assert finding.message == "Two signed tree heads over 1800 entries differ."


def test_a_head_signed_by_somebody_else(book: Book) -> None:
    head = book.heads[5]
    book.heads[5] = sign(head.tree_size, head.root, signer=world().mallory)
    assert found(verify(book)) == [("signature_false", 1800)]


@pytest.mark.parametrize("name", ["tree_size", "timestamp", "root"])
def test_a_head_whose_members_were_changed(book: Book, name: str) -> None:
    head = book.heads[5]
    value: Any = bytes(32) if name == "root" else getattr(head, name) + 1
    lines = book.lines()
    lines[at_kind(lines, "tree_head/1", 5)] = tree_head_line(dataclasses.replace(head, **{name: value}))
    assert [kind for kind, _ in found(verify(lines))] == ["signature_false"]


def test_a_head_of_an_unknown_key(book: Book) -> None:
    w = world()
    key = w.authority.issue_ledger_key(INSTALLATION, w.mallory.public_key())
    head = book.heads[5]
    book.heads[5] = sign(head.tree_size, head.root, signer=w.mallory, key=key)
    finding = only(verify(book))
    assert (finding.kind, finding.index) == ("untrusted_key", 1800)
    assert key_id(key) in finding.message


def test_a_head_of_another_installation(book: Book) -> None:
    book.heads[5] = dataclasses.replace(book.heads[5], installation=uuid.UUID(int=1))
    assert found(verify(book)) == [("untrusted_key", 1800)]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_head_from_when_the_key_was_not_valid(book: Book, moment: str) -> None:
    key = world().key
    if moment == "before":
        time, number = int(key.not_valid_before_utc.timestamp() * 1000) - 1, 0
    else:
        time, number = int((key.not_valid_after_utc.timestamp() + 1) * 1000), -1
    head = book.heads[number]
    book.heads[number] = sign(head.tree_size, head.root, timestamp=time)
    report = verify(book)
    assert found(report)[0] == ("untrusted_key", head.tree_size)
    # The very second is still good.
    book.heads[number] = sign(head.tree_size, head.root, timestamp=time + (1 if moment == "before" else -1))
    assert verify(book).ok


def test_rewritten_with_the_key(book: Book) -> None:
    """Whoever has the ledger's key can rewrite everything; only a witness tells."""
    kept = list(book.heads)
    book.entries[1000].metadata = "1"
    book.rechain(1000).resign()
    assert verify(book).ok
    report = verify(book, witnesses=kept)
    assert found(report) == [("tree_head_forked", head.tree_size) for head in kept[3:]]


# The end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 5, 7, 8, 50, 107, 108, 1000, -1])
def test_a_bundle_that_breaks_off(book: Book, keep: int) -> None:
    report = verify(book.lines()[:keep])
    assert "truncated" in {finding.kind for finding in report.findings}
    assert "missing" not in {finding.kind for finding in report.findings}


def test_a_bundle_that_breaks_off_within_a_line(book: Book) -> None:
    data = b"".join(book.lines())
    for size in (1, 100, 5000, 100_000, len(data) - 1):
        assert not verify_bundle(io.BytesIO(data[:size]), world().roots).ok


def test_an_end_that_does_not_fit(book: Book) -> None:
    for last in (end_line(SIZE + 1, SIZE), end_line(SIZE - 1, SIZE), end_line(SIZE, SIZE - 1)):
        assert found(verify([*book.lines()[:-1], last])) == [("truncated", SIZE)]


def test_lines_after_the_end(book: Book) -> None:
    lines = book.lines()
    for more in (lines[-1], lines[20], b"\n", b"x"):
        assert found(verify([*lines, more])) == [("malformed", SIZE)]


def test_the_end_was_taken_off(book: Book) -> None:
    """To the last tree head, and with a last line to fit: that only a witness tells."""
    kept = book.heads[-1]
    del book.entries[1800:], book.hashes[1800:], book.heads[6:]
    assert verify(book).ok
    witnesses = [kept, book.heads[2]]

    def made(at: str) -> Report:
        lines = book.lines()
        lines[0] = lines[0].replace(json.loads(lines[0])["made_at"].encode(), at.encode())
        return verify(lines, witnesses=witnesses)

    finding = only(made("2999-01-01T00:00:00.000000Z"))
    assert (finding.kind, finding.index) == ("truncated", 1800)
    ends = "The witness has a tree head over 2400 entries, and the ledger ends after 1800"
    assert finding.message == f"{ends}: its end was cut off."

    # Or it is a bundle of before, as anybody can say that it is: no more valid for that.
    report = made("2020-01-01T00:00:00.000000Z")
    assert not report.ok
    finding = only(report)
    assert (finding.kind, finding.index) == ("older", 1800)
    assert finding.message.startswith(f"{ends}: the bundle says that it was made before, at 2020-01-01T")
    assert "Export anew" in finding.message


# Witnesses ------------------------------------------------------------------------------------------------


def test_a_witness_agrees(book: Book) -> None:
    """Also about sizes within a leaves/1, at which the bundle has no head."""
    kept = [sign(size, book.root(size)) for size in (1, 99, 100, 101, 1234, 2399)]
    assert verify(book, witnesses=[sign(0, EMPTY_ROOT), *book.heads, *kept, *kept]).ok


@pytest.mark.parametrize("size", [1, 99, 100, 150, 1234, 2400])
def test_a_witness_has_another_root(book: Book, size: int) -> None:
    finding = only(verify(book, witnesses=[sign(size, leaf_hash(b"x")), *book.heads]))
    assert (finding.kind, finding.index) == ("tree_head_forked", size)


def test_a_witnesss_head_has_to_verify(book: Book) -> None:
    w = world()
    forged = sign(5000, bytes(32), signer=w.mallory)
    assert found(verify(book, witnesses=[forged])) == [("signature_false", 5000)]
    key = w.stranger.issue_ledger_key(INSTALLATION, w.mallory.public_key())
    foreign = sign(5000, bytes(32), signer=w.mallory, key=key)
    assert found(verify(book, witnesses=[foreign])) == [("untrusted_key", 5000)]


# Certificates ---------------------------------------------------------------------------------------------


def with_lines(book: Book, replaced: dict[bytes, bytes | None]) -> list[bytes]:
    lines = [replaced.get(line, line) for line in book.lines()]
    assert lines != book.lines()
    return [line for line in lines if line is not None]


def test_the_root_need_not_be_in_the_bundle(book: Book) -> None:
    assert verify(with_lines(book, {authority_line(world().root.certificate): None})).ok


def test_another_root_is_not_trusted(book: Book) -> None:
    report = verify_bundle(book.lines(), [world().stranger.certificate])
    assert report.findings[0].kind == "untrusted_key"
    assert report.heads == 0
    assert report.last_head is None
    assert ("unsigned", 0) in found(report)


def test_no_root(book: Book) -> None:
    with pytest.raises(BadInputError, match="nothing verifies without"):
        verify_bundle(book.lines(), [])
    with pytest.raises(BadInputError, match="a root certificate that was given does not do"):
        verify_bundle(book.lines(), [world().key])


def test_an_authority_in_between_is_needed(book: Book) -> None:
    report = verify(with_lines(book, {authority_line(world().authority.certificate): None}))
    assert report.findings[0].kind == "untrusted_key"


def test_an_authority_that_leads_nowhere(book: Book) -> None:
    lines = book.lines()
    lines.insert(1, authority_line(world().stranger.certificate))
    finding = only(verify(lines))
    assert finding.kind == "untrusted_key"
    assert "leads to no root" in finding.message
    assert "--ca" in finding.message


def test_an_authority_beyond_the_path_length(book: Book) -> None:
    w = world()
    # "Below" may have nobody below it. issue() of the kit's would not refuse, RFC 5280 does.
    third = CertificateAuthority.create(w.mallory, "Third", issuer=w.authority)
    lines = book.lines()
    lines.insert(3, authority_line(third.certificate))
    assert only(verify(lines)).kind == "untrusted_key"


@pytest.mark.parametrize("kind", ["agent", "authority", "other installation", "stranger"])
def test_a_ledger_key_that_is_none(book: Book, kind: str) -> None:
    w = world()
    key = {
        "agent": lambda: w.certificates[0].certificate,
        "authority": lambda: w.authority.certificate,
        "other installation": lambda: w.authority.issue_ledger_key(uuid.UUID(int=9), w.ledger.public_key()),
        "stranger": lambda: w.stranger.issue_ledger_key(INSTALLATION, w.ledger.public_key()),
    }[kind]()
    report = verify(with_lines(book, {ledger_key_line(w.key): ledger_key_line(key)}))
    assert "untrusted_key" in {finding.kind for finding in report.findings}
    assert report.heads == 0


def test_an_agents_certificate_by_a_stranger(book: Book) -> None:
    w = world()
    forged = w.stranger.issue(AGENTS[0], w.mallory.public_key())
    lines = book.lines()
    lines.insert(at_kind(lines, "certificate/1"), certificate_line(forged.certificate))
    finding = only(verify(lines))
    assert finding.kind == "certificate_false"
    assert forged.serial in finding.message


def test_an_agents_certificate_is_missing(book: Book) -> None:
    report = verify(with_lines(book, {certificate_line(world().certificates[1].certificate): None}))
    assert report.findings[0].kind == "certificate_false"
    first = next(i for i, leaf in enumerate(book.entries) if leaf.chain == 3)
    finding = only(report)
    assert (finding.index, finding.event_id) == (first, book.entries[first].event_id)


def test_a_certificate_under_another_name(book: Book) -> None:
    line = certificate_line(world().certificates[1].certificate)
    content = {**json.loads(line), "serial": world().certificates[0].serial}
    other = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    assert found(verify(with_lines(book, {line: other})))[0] == ("certificate_false", 0)


def test_certificates_in_another_order(book: Book) -> None:
    lines = book.lines()
    lines[1], lines[2] = lines[2], lines[1]  # authorities, among themselves: in any
    assert verify(lines).ok
    lines.insert(20, lines[1])
    assert not verify(lines).ok


def test_too_many_authorities(book: Book) -> None:
    lines = book.lines()
    lines[1:1] = [lines[1]] * 200
    assert found(verify(lines))[0] == ("malformed", 0)


def test_an_authority_counts_while_it_is_valid() -> None:
    """And all above it: the moment is that of the tree head."""
    w = world()
    head = sign(0, EMPTY_ROOT)
    trust = TrustAnchors(w.roots, [w.authority.certificate])
    trust.add_ledger_key(w.key)
    trust.verify(head)
    assert trust.installations == {INSTALLATION}
    assert trust.untrusted == []
    short = CertificateAuthority.create(w.mallory, "Short", issuer=w.root, lifetime=DAY)
    trust = TrustAnchors(w.roots, [short.certificate])
    key = short.issue_ledger_key(INSTALLATION, w.ledger.public_key())
    trust.add_ledger_key(key)
    after = int((short.certificate.not_valid_after_utc.timestamp() + 1) * 1000)
    trust.verify(sign(0, EMPTY_ROOT, timestamp=after - 1))
    with pytest.raises(UntrustedKeyError, match="was not valid at the time"):
        trust.verify(sign(0, EMPTY_ROOT, timestamp=after))


# Hostile input --------------------------------------------------------------------------------------------

LARGE = b'{"kakunin":"entry/1",' + b" " * MAX_LINE + b"}\n"
NASTY = [
    b"",
    b"\n",
    b"\r\n",
    b"\xff\xfe\n",
    b"\xef\xbb\xbf{}\n",
    b"null\n",
    b"[]\n",
    b"1\n",
    b"NaN\n",
    b'"text"\n',
    b"{}\n",
    b'{"kakunin":null}\n',
    b'{"kakunin":["entry/1"]}\n',
    b'{"kakunin":{"a":1}}\n',
    b'{"kakunin":"entry/1"}\n',
    b'{"kakunin":"entry/2"}\n',
    b'{"kakunin":"bundle/1"}\n',
    b'{"kakunin":"leaves/1","first_index":0,"count":true,"hashes":""}\n',
    b'{"kakunin":"leaves/1","first_index":NaN,"count":1,"hashes":""}\n',
    b'{"kakunin":"leaves/1","first_index":0,"count":1,"hashes":"\\ud800"}\n',
    b'{"kakunin":"leaves/1","first_index":0,"count":10001,"hashes":""}\n',
    b'{"kakunin":"leaves/1","first_index":9223372036854775807,"count":1,"hashes":"'
    + base64.b64encode(bytes(32))
    + b'"}\n',
    b'{"kakunin":"missing/1","index":-1}\n',
    b'{"kakunin":"missing/1","index":0,"index":0}\n',
    b'{"kakunin":"missing/1","index":' + b"9" * 5000 + b"}\n",
    b'{"kakunin":"archived/1","first_index":0,"count":9223372036854775807}\n',
    b'{"kakunin":"tree_head/1"}\n',
    b'{"kakunin":"end/1","tree_size":0,"entries":0.0}\n',
    b'{"kakunin":"end/1","entries":0,"tree_size":0}\n',
    b'{"kakunin":"authority/1","key_id":"00","der":"MAA="}\n',
    b'{"kakunin":"ledger_key/1","key_id":"00","der":""}\n',
    b'{"kakunin":"certificate/1","serial":"00","der":"!"}\n',
    b"[" * 100_000 + b"]" * 100_000 + b"\n",
    b'{"kakunin":' * 20_000 + b"\n",
    LARGE,
]
nasty = pytest.mark.parametrize("line", NASTY, ids=range(len(NASTY)))


@nasty
def test_nasty_lines_anywhere(line: bytes) -> None:
    lines = Book(30, 10, 10).lines()
    for at in range(len(lines) + 1):
        changed = [*lines[:at], line, *lines[at:]]
        assert not verify(changed).ok, at
        if at < len(lines):
            changed[at + 1 : at + 2] = []
            assert not verify(changed).ok, at


@nasty
def test_nasty_lines_alone(line: bytes) -> None:
    assert not verify([line]).ok
    assert not verify([line] * 20).ok
    assert not verify_bundle(io.BytesIO(line * 3), world().roots).ok


def test_nothing() -> None:
    assert found(verify([])) == [("malformed", 0)]


def test_a_long_line_is_not_read_to_its_end(book: Book) -> None:
    class Endless(io.RawIOBase):
        """Gigabytes without a line feed, after the beginning of a good bundle."""

        def __init__(self) -> None:
            self.lines = iter(book.lines()[:50])
            self.asked: list[int] = []

        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            self.asked.append(size)
            return next(self.lines, b"x" * size)

    source = Endless()
    report = verify_bundle(source, world().roots)
    assert set(source.asked) == {MAX_LINE + 1}
    assert len(source.asked) == 51
    assert "malformed" in {finding.kind for finding in report.findings}


def test_far_more_lines_than_leaves(book: Book) -> None:
    def lines() -> Iterator[bytes]:
        yield from book.lines()[:50]
        n = 0
        while True:  # without an end
            n += 1
            yield dataclasses.replace(book.entries[0], event_id=n).entry + b"\n"

    report = verify_bundle(lines(), world().roots)
    assert "malformed" in {finding.kind for finding in report.findings}
    assert 100 <= len(report.findings) <= 110


@pytest.mark.parametrize("kept", [0, 1, 50, 107, 2000])
@pytest.mark.parametrize("error", [ValueError, BadInputError, OSError, RecursionError])
def test_an_error_of_the_source_is_not_the_bundles(book: Book, kept: int, error: type[Exception]) -> None:
    def lines() -> Iterator[bytes]:
        yield from book.lines()[:kept]
        raise error("the connection is lost")

    with pytest.raises(error, match="the connection is lost"):
        verify_bundle(lines(), world().roots)


@given(st.lists(st.one_of(st.binary(max_size=60), st.sampled_from(NASTY[:-3])), max_size=20))
def test_noise(noise: list[bytes]) -> None:
    assert not verify(noise).ok
    assert not verify_bundle(io.BytesIO(b"".join(noise)), world().roots).ok


# Any change
# ---------------------------------------------------------------------------------------------------


@functools.cache
def _small() -> tuple[bytes, ...]:
    return tuple(Book(24, 5, 8, seed=3).lines())


def proves_the_same(changed: list[bytes]) -> bool:
    """Whether another bundle has all that this one proves: the same entries and lists in the same order, the
    same last tree head, the certificates its entries and heads need. A head less, or a certificate twice, is
    such a thing; so is another time at which it says it was made, which nobody signs."""

    def body(lines: Sequence[bytes]) -> list[bytes]:
        kinds = (b'{"kakunin":"entry/1"', b'{"kakunin":"leaves/1"', b'{"kakunin":"end/1"')
        return [line for line in lines if line.startswith(kinds)]

    def rest(lines: Sequence[bytes]) -> list[bytes]:
        return [line for line in lines[1:] if line not in body(lines)]

    original = list(_small())
    header = json.loads(changed[0])
    header["made_at"] = json.loads(original[0])["made_at"]
    heads = [line for line in changed if line.startswith(b'{"kakunin":"tree_head/1"')]
    needed = [line for line in original[2:7] if line not in changed]
    return (
        header == json.loads(original[0])
        and body(changed) == body(original)
        and set(rest(changed)) <= set(rest(original))
        and heads[-1] == [line for line in original if line.startswith(b'{"kakunin":"tree_head/1"')][-1]
        and not needed
    )


def fails_or_proves_the_same(changed: list[bytes]) -> None:
    ok = verify(changed).ok
    if ok:
        assert proves_the_same(changed)
    # Neither does reading it as a file raise anything.
    assert verify_bundle(io.BytesIO(b"".join(changed)), world().roots).ok == ok


def split(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True) if b"\r" not in data else list(io.BytesIO(data))


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_byte_changed(data: st.DataObject) -> None:
    lines = list(_small())
    at = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines[at]) - 1))
    old = lines[at]
    how = data.draw(st.sampled_from(["flip", "set", "delete", "insert"]))
    if how == "flip":
        bit = 1 << data.draw(st.integers(0, 7))
        lines[at] = old[:place] + bytes([old[place] ^ bit]) + old[place + 1 :]
    elif how == "set":
        lines[at] = old[:place] + bytes([data.draw(st.integers(0, 255))]) + old[place + 1 :]
    elif how == "delete":
        lines[at] = old[:place] + old[place + 1 :]
    else:
        lines[at] = old[:place] + bytes([data.draw(st.integers(0, 255))]) + old[place:]
    assume(lines[at] != old)
    fails_or_proves_the_same(list(io.BytesIO(b"".join(lines))))


def test_any_line_taken_out_or_doubled() -> None:
    lines = list(_small())
    for at in range(len(lines)):
        fails_or_proves_the_same(lines[:at] + lines[at + 1 :])
        fails_or_proves_the_same([*lines[:at], lines[at], *lines[at:]])


def test_any_two_lines_swapped() -> None:
    lines = list(_small())
    for a in range(len(lines)):
        for b in range(a + 1, len(lines)):
            changed = list(lines)
            changed[a], changed[b] = lines[b], lines[a]
            fails_or_proves_the_same(changed)


def test_any_part_taken_out() -> None:
    lines = list(_small())
    for a in range(len(lines)):
        for b in range(a + 1, len(lines) + 1):
            changed = lines[:a] + lines[b:]
            if changed:
                fails_or_proves_the_same(changed)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_lines_in_any_order(data: st.DataObject) -> None:
    lines = list(_small())
    changed = data.draw(st.lists(st.sampled_from(lines), min_size=1, max_size=60))
    fails_or_proves_the_same(changed)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(lines))] * 2)))
    mixed = data.draw(st.permutations(lines[a:b]))
    fails_or_proves_the_same([*lines[:a], *mixed, *lines[b:]])


# Tree heads by themselves, and proofs ---------------------------------------------------------------------


def test_what_is_signed() -> None:
    """RFC 6962 section 3.5, byte by byte."""
    head = sign(0x0102030405060708, bytes(range(32)), timestamp=0x1112131415161718)
    assert head.signed_bytes() == bytes.fromhex("000111121314151617180102030405060708") + bytes(range(32))
    assert len(head.signed_bytes()) == 50


def test_openssl_verifies_a_tree_head(book: Book, tmp_path: Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    key = (
        world()
        .key.public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    head = book.heads[0]
    for name, data in [("key", key), ("signed", head.signed_bytes()), ("signature", head.signature)]:
        (tmp_path / name).write_bytes(data)
    command = [program, "dgst", "-sha256", "-verify", "key", "-signature", "signature", "signed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "Verified OK\n")
    (tmp_path / "signed").write_bytes(head.signed_bytes()[:-1] + b"x")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_a_tree_head_as_json(book: Book) -> None:
    head = book.heads[0]
    assert TreeHead.from_json(head.to_json()) == head
    assert TreeHead.from_json(json.dumps(head.to_json())) == head
    assert TreeHead.from_json(tree_head_line(head)) == head


@pytest.mark.parametrize(
    "change",
    [
        {"kakunin": "tree_head/2"},
        {"more": 1},
        {"installation": str(INSTALLATION).upper()},
        {"installation": None},
        {"tree_size": -1},
        {"tree_size": True},
        {"tree_size": "1"},
        {"tree_size": 1.0},
        {"tree_size": 2**63},
        {"timestamp": None},
        {"root": "00"},
        {"root": "0" * 63 + "G"},
        {"root": "AB" * 32},
        {"key_id": "ab"},
        {"key_id": 1},
        {"key_id": ""},
        {"signature": "AA=="},
        {"signature": "A" * 341 + "="},
        {"signature": None},
        {"signature": "é"},
    ],
    ids=lambda change: "-".join(map(str, change.items())),
)
def test_a_tree_head_that_is_none(book: Book, change: dict[str, Any]) -> None:
    with pytest.raises(LedgerIntegrityError):
        TreeHead.from_json({**book.heads[0].to_json(), **change})


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "{" * 100_000, '{"kakunin":"tree_head/1"}', b"\xff", '{"a":1,"a":1}'],
    ids=range(8),
)  # fmt: skip
def test_a_text_that_is_no_tree_head(text: str | bytes) -> None:
    with pytest.raises(LedgerIntegrityError):
        TreeHead.from_json(text)


def certificates() -> list[dict[str, Any]]:
    w = world()
    lines = [authority_line(w.authority.certificate), ledger_key_line(w.key)]
    return [json.loads(line) for line in lines]


def inclusion_proof(book: Book, index: int, head: TreeHead) -> dict[str, Any]:
    """By pymerkle, whose paths begin with the leaf."""
    tree = InmemoryTree(algorithm="sha256")
    for leaf in book.entries:
        tree.append_entry(leaf.entry)
    return {
        "kakunin": "inclusion_proof/1",
        "entry": book.entries[index].entry.decode(),
        "index": index,
        "tree_head": head.to_json(),
        "path": [node.hex() for node in list(tree.prove_inclusion(index + 1, head.tree_size).path)[1:]],
        "certificates": certificates(),
    }


@pytest.mark.parametrize("index", [0, 1, 299, 1199])
def test_an_inclusion_proof(book: Book, index: int) -> None:
    head = book.heads[3]
    proof = inclusion_proof(book, index, head)
    assert verify_proof(proof, world().roots) == head
    assert verify_proof(json.dumps(proof), world().roots) == head


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"index": 6}, LedgerIntegrityError),
        ({"index": 1200}, LedgerIntegrityError),
        ({"index": True}, LedgerIntegrityError),
        ({"path": []}, LedgerIntegrityError),
        ({"path": "00"}, LedgerIntegrityError),
        ({"path": [1]}, LedgerIntegrityError),
        ({"path": ["00" * 32] * 1000}, LedgerIntegrityError),
        ({"certificates": []}, UntrustedKeyError),
        ({"certificates": None}, LedgerIntegrityError),
        ({"certificates": [{}]}, LedgerIntegrityError),
        ({"certificates": [{"kakunin": "authority/1", "key_id": "00", "der": "MAA="}]}, LedgerIntegrityError),
        ({"entry": "x"}, LedgerIntegrityError),
        ({"entry": 1}, LedgerIntegrityError),
        ({"entry": "\ud800"}, LedgerIntegrityError),
        ({"tree_head": None}, LedgerIntegrityError),
        ({"kakunin": "inclusion_proof/2"}, LedgerIntegrityError),
        ({"kakunin": ["inclusion_proof/1"]}, LedgerIntegrityError),
        ({"more": 1}, LedgerIntegrityError),
    ],
    ids=range(18),
)
def test_an_inclusion_proof_that_proves_nothing(
    book: Book, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        verify_proof({**inclusion_proof(book, 5, book.heads[3]), **change}, world().roots)


def test_whose_proof_it_is(book: Book) -> None:
    w = world()
    proof = inclusion_proof(book, 5, book.heads[3])
    with pytest.raises(UntrustedKeyError):
        verify_proof(proof, [w.stranger.certificate])
    forged = sign(1200, book.root(1200), signer=w.mallory)
    with pytest.raises(FalseSignatureError):
        verify_proof({**proof, "tree_head": forged.to_json()}, w.roots)
    for no_document in ("[]", "1", "{", b"\xff"):
        with pytest.raises(LedgerIntegrityError):
            verify_proof(no_document, w.roots)


def test_a_consistency_proof() -> None:
    book = Book(8, 4, 4)
    first, second = book.heads
    proof = {
        "kakunin": "consistency_proof/1",
        "first": first.to_json(),
        "second": second.to_json(),
        # RFC 6962 section 2.1.3: of four to eight it is the right half.
        "path": [book.root(4, book.hashes[4:]).hex()],
        "certificates": certificates(),
    }
    assert verify_proof(proof, world().roots) == second
    with pytest.raises(LedgerIntegrityError, match="not shown to begin"):
        verify_proof({**proof, "path": [bytes(32).hex()]}, world().roots)
    with pytest.raises(LedgerIntegrityError, match="older than the first"):
        verify_proof({**proof, "first": second.to_json(), "second": first.to_json()}, world().roots)
    older = sign(8, second.root, timestamp=first.timestamp - 1)
    with pytest.raises(LedgerIntegrityError, match="older"):
        verify_proof({**proof, "second": older.to_json()}, world().roots)


def test_lines_that_are_not_written() -> None:
    for hashes in (b"", b"x" * 31, b"x" * 32 * 10_001):
        with pytest.raises(BadInputError, match="1 to 10000 hashes"):
            leaves_line(0, hashes)


def test_lines_as_the_format_has_them() -> None:
    assert header_line(INSTALLATION, MADE_AT, first_index=1, frontier=[bytes(32)]) == (
        b'{"kakunin":"bundle/1","installation":"%s","made_at":"2026-11-23T08:15:00.000000Z","first_index":1,'
        b'"frontier":["%s"]}\n' % (str(INSTALLATION).encode(), b"0" * 64)
    )
    assert missing_line(7) == b'{"kakunin":"missing/1","index":7}\n'
    assert archived_line(7, 2) == b'{"kakunin":"archived/1","first_index":7,"count":2}\n'
    assert end_line(9, 2) == b'{"kakunin":"end/1","tree_size":9,"entries":2}\n'
    assert leaves_line(0, bytes(32)) == (
        b'{"kakunin":"leaves/1","first_index":0,"count":1,"hashes":"%s"}\n' % base64.b64encode(bytes(32))
    )
    issued: AgentCertificate = world().certificates[0]
    assert json.loads(certificate_line(issued.certificate)) == {
        "kakunin": "certificate/1",
        "serial": issued.serial,
        "der": base64.b64encode(issued.der).decode(),
    }
    assert json.loads(authority_line(world().root.certificate))["key_id"] == world().root.key_id
