"""Bundles: an exported ledger as a stream of lines, written and verified (docs/ledger-format.md).

Verification never holds more than one ``leaves/1`` with the entries that follow it, a small record of each
chain, and the agents' serial numbers. A bundle is taken as what an attacker wrote: whatever is in it becomes
a finding.

Three things have to agree: the entries, the listed hashes, and the roots that were signed. The list says
which entry is wrong where only entries were changed; where the list was changed with them the chains of the
entries may still tell, and otherwise the two tree heads between which it happened.
"""

from __future__ import annotations

import base64
import bisect
import contextlib
import datetime as dt
import functools
import itertools
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from ..ca import key_id
from ..errors import BadInputError, LedgerIntegrityError
from ..logs import counted
from ..serials import normalize_serial
from .heads import (
    MAX_AUTHORITIES,
    MAX_INTEGER,
    FalseSignatureError,
    TreeHead,
    TrustAnchors,
    UntrustedKeyError,
    from_base64,
    from_hex,
    from_uuid,
    load_certificate,
    strict_json,
)
from .merkle import HASH_SIZE, Frontier, leaf_hash, verify_consistency, verify_inclusion

# Of entries to one leaves/1.
MAX_LEAVES = 10_000
# Bytes of a line. A leaves/1 has up to 427 kB.
MAX_LINE = 1 << 20
MAX_FINDINGS = 100

_ZEROS = "0" * 64

# Writing --------------------------------------------------------------------------------------------


def _line(kind: str, **members: Any) -> bytes:
    return _text({"kakunin": kind, **members}).encode() + b"\n"


def _text(members: Mapping[str, Any]) -> str:
    return json.dumps(members, ensure_ascii=False, separators=(",", ":"))


def _certificate(kind: str, name: str, value: str, certificate: x509.Certificate) -> bytes:
    der = base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()
    return _line(kind, **{name: value, "der": der})


def header_line(
    installation: uuid.UUID, made_at: dt.datetime, *, first_index: int = 0, frontier: Sequence[bytes] = ()
) -> bytes:
    """``bundle/1``. ``made_at`` has a time zone; ``frontier`` is that of a tree of ``first_index`` leaves."""
    made = made_at.astimezone(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return _line(
        "bundle/1",
        installation=str(installation),
        made_at=made,
        first_index=first_index,
        frontier=[node.hex() for node in frontier],
    )


def authority_line(certificate: x509.Certificate) -> bytes:
    """``authority/1``."""
    return _certificate("authority/1", "key_id", key_id(certificate), certificate)


def ledger_key_line(certificate: x509.Certificate) -> bytes:
    """``ledger_key/1``."""
    return _certificate("ledger_key/1", "key_id", key_id(certificate), certificate)


def certificate_line(certificate: x509.Certificate) -> bytes:
    """``certificate/1``, of an agent."""
    serial = normalize_serial(certificate.serial_number)
    return _certificate("certificate/1", "serial", serial, certificate)


def leaves_line(first_index: int, hashes: bytes) -> bytes:
    """``leaves/1``: 1 to 10,000 hashes, one after the other.

    :raises BadInputError: there are more, or none.
    """
    count, rest = divmod(len(hashes), HASH_SIZE)
    if rest or not 1 <= count <= MAX_LEAVES:
        raise BadInputError(f"a leaves/1 has 1 to {MAX_LEAVES} hashes of 32 bytes")
    return _line("leaves/1", first_index=first_index, count=count, hashes=base64.b64encode(hashes).decode())


def missing_line(index: int) -> bytes:
    """``missing/1``."""
    return _line("missing/1", index=index)


def archived_line(first_index: int, count: int) -> bytes:
    """``archived/1``, for entries of one ``leaves/1``."""
    return _line("archived/1", first_index=first_index, count=count)


def tree_head_line(head: TreeHead) -> bytes:
    """``tree_head/1``."""
    return _text(head.to_json()).encode() + b"\n"


def end_line(tree_size: int, entries: int) -> bytes:
    """``end/1``."""
    return _line("end/1", tree_size=tree_size, entries=entries)


# Reading --------------------------------------------------------------------------------------------

_MEMBERS: dict[str, dict[str, type]] = {
    "bundle/1": {"installation": str, "made_at": str, "first_index": int, "frontier": list},
    "authority/1": {"key_id": str, "der": str},
    "ledger_key/1": {"key_id": str, "der": str},
    "certificate/1": {"serial": str, "der": str},
    "leaves/1": {"first_index": int, "count": int, "hashes": str},
    "missing/1": {"index": int},
    "archived/1": {"first_index": int, "count": int},
    "tree_head/1": {
        "installation": str,
        "tree_size": int,
        "timestamp": int,
        "root": str,
        "key_id": str,
        "signature": str,
    },
    "end/1": {"tree_size": int, "entries": int},
}
_KIND = re.compile(rb'\{"kakunin":"([a-z_]+/1)"')
# What may stand for a leaf; a line of any other kind ends those of a leaves/1.
_OTHERS = _MEMBERS.keys() - {"missing/1", "archived/1"}
_MOMENT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")

_STRING = r'"[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*"'
_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NUMBER = r"[1-9][0-9]{0,18}"
_SCORE = r"[01]\.[0-9]{3,4}"
_BAND = '"(?:low|medium|high|critical)"'
_FACTOR = rf'"[a-z_]+": {_SCORE}'
_RISK = (
    rf'\{{"band": {_BAND}, "score": {_SCORE}, "factors": \{{(?:{_FACTOR}(?:, {_FACTOR})*)?\}}'
    rf'(?:, "revoked": (?:true|false))?, "agent_band": {_BAND}, "agent_score": {_SCORE}\}}'
)


def _entry_pattern(installations: Iterable[uuid.UUID] | None) -> re.Pattern[str]:
    """An entry up to its metadata. Groups: event_id, agent_id, serial, chain, sequence, prev; a text keeps
    its quotation marks, so that it differs from null."""
    ours = _UUID if installations is None else "(?:" + "|".join(sorted(map(str, installations))) + ")"
    return re.compile(
        rf'\{{"kakunin":"entry/1","installation":"{ours}","event_id":({_NUMBER})'
        r',"recorded_at":"[0-9]{4,6}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z"'
        rf',"event_type":{_STRING},"agent_id":(null|"{_UUID}"),"serial":(null|"[0-9A-F:]{{2,59}}")'
        rf',"login":{_STRING},"session_id":(?:null|{_STRING})'
        rf',"chain":({_NUMBER}),"sequence":({_NUMBER}),"prev":"([0-9a-f]{{64}})"'
        rf',"risk":(?:null|{_RISK}),"metadata":'
    )


_ANY_ENTRY = _entry_pattern(None)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is there twice")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Metadata is only read to see that it is one JSON value: where it was more, another reader of the line would
# see members that stand before it differently. Numbers as floats: int() refuses those with thousands of
# digits, which jsonb holds.
_decoder = json.JSONDecoder(object_pairs_hook=_members, parse_int=float, parse_constant=_constant)
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once  # type: ignore[attr-defined]
_ERRORS = (ValueError, RecursionError, StopIteration)


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """A line that is no entry: its kind, and its members. Raises LedgerIntegrityError unless it is, byte for
    byte, what the functions above write."""
    try:
        text = line.decode()
        content = json.loads(text)
        same = _text(content) + "\n" == text
    except _ERRORS as error:
        raise LedgerIntegrityError("it is not JSON in UTF-8") from error
    kind = content.pop("kakunin", None) if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _MEMBERS:
        raise LedgerIntegrityError("it is none of the lines that a bundle has")
    expected = _MEMBERS[kind]
    if (
        not same
        or list(content) != list(expected)
        or any(type(content[name]) is not what for name, what in expected.items())
        or any(not 0 <= value <= MAX_INTEGER for value in content.values() if isinstance(value, int))
    ):
        raise LedgerIntegrityError(f"it is not a {kind} as the format has it")
    return kind, content


def _parse_header(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise LedgerIntegrityError("there is none")
    if len(line) > MAX_LINE:
        raise LedgerIntegrityError("it is longer than any line may be")
    kind, content = _parse(line)
    if kind != "bundle/1" or not _MOMENT.fullmatch(content["made_at"]):
        raise LedgerIntegrityError("it is not a bundle/1")
    return content


Kind = Literal[
    "altered",
    "missing",
    "inserted",
    "reordered",
    "unsigned",
    "signature_false",
    "tree_head_forked",
    "truncated",
    "older",
    "malformed",
    "untrusted_key",
    "certificate_false",
]


@dataclass(frozen=True)
class Finding:
    """Something wrong. ``index`` is the leaf's (from 0), or the size of the tree a tree head is about, or
    where in the tree the line stands; ``event_id`` that of the entry, where it is known."""

    kind: Kind
    index: int
    event_id: int | None
    message: str


@dataclass(frozen=True)
class Report:
    """What verifying a bundle found: ``findings`` are the first 100 of ``count``, and those about its end.

    ``tree_size`` is how many leaves the bundle lists up to its end, those before a later part included;
    ``entries`` how many entries it has; ``heads`` how many tree heads verified, signature and root;
    ``archived`` how many leaves stand without their entry because it was archived; ``last_head`` the last of
    the heads that verified.
    """

    findings: tuple[Finding, ...]
    count: int
    tree_size: int
    entries: int
    heads: int
    archived: int
    last_head: TreeHead | None

    @property
    def ok(self) -> bool:
        return not self.count


class _Entry(NamedTuple):
    event_id: int
    agent_id: str  # with quotation marks, or null; serial likewise
    serial: str
    chain: str
    sequence: int
    prev: str


class _Slot(NamedTuple):
    """A line that stands for a leaf, where the lines of a leaves/1 are not all as they should be."""

    digest: bytes
    entry: _Entry | None = None
    # Why it is no good entry, whatever its hash.
    problem: str | None = None
    # The leaf that a missing/1 or archived/1 stands for, as an offset into the leaves/1.
    claim: int | None = None

    @property
    def event_id(self) -> int | None:
        return self.entry.event_id if self.entry else None

    @property
    def name(self) -> str:
        return f"event {self.entry.event_id}" if self.entry else "a line that is no entry"


# Of a chain: the next sequence, the hash of its last entry, that entry's event_id, whose it is, its index,
# and how many holes (archived or missing entries) there were by then.
_Chain = tuple[int, str, int, str, int, int]


@dataclass(eq=False)
class _Suspect:
    """A break of a chain, not yet told: what it means depends on the next tree head."""

    kind: Kind
    index: int
    event_id: int | None
    message: str
    # Of a jump: the sequences that were not there.
    gap: range = range(0)


class _Stop(Exception):  # noqa: N818  (not an error)
    """Reading further makes no sense."""


def _longest_increasing(values: Sequence[int]) -> list[int]:
    """The places of a longest strictly increasing subsequence."""
    tails: list[int] = []  # values
    places: list[int] = []
    before: list[int] = []
    for place, value in enumerate(values):
        at = bisect.bisect_left(tails, value)
        before.append(places[at - 1] if at else -1)
        if at == len(tails):
            tails.append(value)
            places.append(place)
        else:
            tails[at], places[at] = value, place
    found = []
    place = places[-1] if places else -1
    while place >= 0:
        found.append(place)
        place = before[place]
    return found[::-1]


class _Verifier:
    def __init__(
        self,
        roots: Sequence[x509.Certificate],
        witnesses: Iterable[TreeHead],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.roots = roots
        self.trust = TrustAnchors(roots)
        self.witnesses = list(witnesses)
        self.progress = progress or (lambda _: None)
        self.findings: list[Finding] = []
        self.limit = MAX_FINDINGS
        self.count = 0
        self.entries = self.heads = self.archived = 0
        # How far certificates have come: 0 authorities, 1 ledger keys, 2 agents' certificates, 3 the ledger
        # itself.
        self.stage = 0
        self.authorities: list[x509.Certificate] = []
        self.installation: uuid.UUID | None = None
        self.made_at = ""
        self.agents: dict[str, str] = {"null": "null"}
        self.wrong_agents: set[tuple[str, str]] = set()
        self.pattern = _ANY_ENTRY
        # The tree of the listed hashes; and of the entries' own, where these differ since the last tree head.
        self.frontier = Frontier()
        self.own: Frontier | None = None
        self.first_index = 0
        self.expect_first_head = False
        # Of heads: the last that stood where it should, and the last whose root was right as well.
        self.last: TreeHead | None = None
        self.good: TreeHead | None = None
        self.covered = 0  # entries below this are as they were signed
        self.reached = 0  # the largest size that a signature is over
        self.lost = False  # the tree is known to differ, so that roots tell nothing more
        self.damage: tuple[int | None, int, int] | None = None  # its finding, and between which sizes
        self.ahead: dict[int, tuple[int | None, bytes]] = {}  # heads that stood too early
        self.boundaries: dict[int, bytes] = {}  # roots where a leaves/1 ended, since the last good head
        self.since_head = 0  # findings before it are from before the last head
        self.forks: list[Finding] = []
        self.chains: dict[str, _Chain] = {}
        self.holes = 0
        self.suspects: list[_Suspect] = []
        self.broken: dict[str, _Suspect] = {}  # by chain: its last link broke
        # Hashes without their entry, and entries without their hash: those of another leaves/1 were moved.
        self.unseen: dict[bytes, tuple[int | None, int]] = {}
        self.strays: dict[bytes, tuple[int | None, int]] = {}
        self.ended = False

    @property
    def position(self) -> int:
        return self.frontier.size

    # Findings

    def find(self, kind: Kind, index: int, message: str, event_id: int | None = None) -> int | None:
        """Its place among the findings that are kept."""
        self.count += 1
        if len(self.findings) >= self.limit:
            return None
        self.findings.append(Finding(kind, index, event_id, message))
        return len(self.findings) - 1

    def replace(
        self, place: int | None, kind: Kind, index: int, message: str, event_id: int | None = None
    ) -> None:
        if place is not None:
            self.findings[place] = Finding(kind, index, event_id, message)

    def report(self) -> Report:
        return Report(
            tuple(self.findings),
            self.count,
            self.position,
            self.entries,
            self.heads,
            self.archived,
            self.good,
        )

    # Lines

    def run(self, lines: Iterable[bytes]) -> Report:
        read = getattr(lines, "readline", None)
        source: Iterator[bytes] = (
            iter(functools.partial(read, MAX_LINE + 1), b"") if callable(read) else iter(lines)
        )
        # A line that is too long, or that nothing can follow, ends it.
        with contextlib.suppress(_Stop):
            line = next(source, None)
            self.header(line)
            line = next(source, None)
            while line is not None:
                line = self.line(line, source)
        self.finish()
        return self.report()

    def header(self, line: bytes | None) -> None:
        try:
            content = _parse_header(line)
            installation = from_uuid(content["installation"])
            first = content["first_index"]
            self.frontier = Frontier(first, [from_hex(node, HASH_SIZE) for node in content["frontier"]])
        except (LedgerIntegrityError, BadInputError) as error:
            self.find("malformed", 0, f"The first line is not that of a bundle: {error}.")
            raise _Stop from error
        self.installation, self.made_at = installation, content["made_at"]
        self.first_index = self.covered = self.reached = first
        self.expect_first_head = first > 0
        # What a chain was before the bundle is not known.
        self.holes = 1 if first else 0

    def line(self, line: bytes, source: Iterator[bytes]) -> bytes | None:
        """Takes a line, and those that belong to it; returns the next."""
        if len(line) > MAX_LINE:
            self.find(
                "malformed",
                self.position,
                f"A line is longer than {MAX_LINE} bytes; nothing after it was read.",
            )
            raise _Stop
        if self.ended:
            self.find("malformed", self.position, "There are lines after the last one of the bundle.")
            raise _Stop
        try:
            kind, content = _parse(line)
        except LedgerIntegrityError as error:
            self.begin()
            self.unknown(line, str(error))
            return next(source, None)
        if kind in ("authority/1", "ledger_key/1", "certificate/1"):
            self.certificate(kind, content)
        elif kind == "leaves/1":
            self.begin()
            return self.leaves(content, source)
        elif kind == "tree_head/1":
            self.begin()
            self.head(line)
        elif kind == "end/1":
            self.begin()
            self.end(content)
        elif kind == "bundle/1":
            self.find("malformed", self.position, "The first line of a bundle stands in the middle.")
        else:
            self.begin()
            self.find(
                "malformed",
                self.position,
                f"A line {kind} stands where no leaf is left that it could be for.",
            )
        return next(source, None)

    def unknown(self, line: bytes, why: str) -> None:
        slot = self.slot(line)
        if slot is not None and slot.entry is not None:
            self.entries += 1
            self.find(
                "inserted",
                self.position,
                f"Event {slot.event_id} stands where no entry belongs: no leaves/1 lists it.",
                slot.event_id,
            )
        else:
            self.find("malformed", self.position, f"After {counted(self.position)} a line is wrong: {why}.")

    # Certificates

    def certificate(self, kind: str, content: dict[str, Any]) -> None:
        stage = {"authority/1": 0, "ledger_key/1": 1, "certificate/1": 2}[kind]
        if stage < self.stage:
            self.find(
                "malformed", self.position, f"A {kind} stands after what it is for: certificates come first."
            )
            return
        try:
            certificate = load_certificate(from_base64(content["der"]))
            named = content.get("key_id", content.get("serial"))
            said = key_id(certificate) if stage < 2 else normalize_serial(certificate.serial_number)
        except (LedgerIntegrityError, BadInputError) as error:
            self.find("certificate_false", self.position, f"A {kind} has no certificate: {error}.")
            return
        if named != said:
            self.find("certificate_false", self.position, f"A {kind} is called {named}, and it is {said}.")
            return
        self.advance(stage)
        try:
            if stage == 0:
                self.authorities.append(certificate)
                if len(self.authorities) > MAX_AUTHORITIES:
                    self.find("malformed", 0, f"The bundle has more than {MAX_AUTHORITIES} authorities.")
                    self.authorities.clear()
                    raise _Stop
            elif stage == 1:
                self.trust.add_ledger_key(certificate)
            else:
                self.agent(*self.trust.check_agent(certificate))
        except UntrustedKeyError as error:
            self.find("untrusted_key", 0, f"The ledger key {said} is not to be trusted: {error}.")
        except LedgerIntegrityError as error:
            self.find("certificate_false", 0, f"The certificate {said} does not verify: {error}.")

    def agent(self, serial: str, agent: uuid.UUID) -> None:
        if self.agents.setdefault(f'"{serial}"', f'"{agent}"') != f'"{agent}"':
            raise LedgerIntegrityError("another agent's certificate has the same serial number")

    def advance(self, stage: int) -> None:
        if self.stage == 0 < stage:
            self.trust = TrustAnchors(self.roots, self.authorities)
            for certificate, why in self.trust.untrusted:
                self.find(
                    "untrusted_key", 0, f"The authority {key_id(certificate)} is not to be trusted: {why}."
                )
        self.stage = stage

    def begin(self) -> None:
        """The ledger itself begins: the certificates are complete."""
        if self.stage == 3:
            return
        self.advance(3)
        assert self.installation is not None  # noqa: S101  (there was a header)
        ours = self.trust.installations or {self.installation}
        if self.installation not in ours:
            self.find(
                "untrusted_key",
                self.position,
                f"The bundle is of the installation {self.installation}, and its ledger keys are of others.",
            )
        self.pattern = _entry_pattern(ours)
        witnessed = []
        for head in self.witnesses:
            try:
                self.trust.verify(head)
            except LedgerIntegrityError as error:
                self.find(
                    "signature_false" if isinstance(error, FalseSignatureError) else "untrusted_key",
                    head.tree_size,
                    f"The witness's tree head over {counted(head.tree_size)} does not verify: {error}.",
                )
            else:
                witnessed.append(head)
        # The last comes off first.
        self.witnesses = sorted(witnessed, key=lambda h: (h.tree_size, h.timestamp), reverse=True)
        while self.witnesses and self.witnesses[-1].tree_size < self.first_index:
            self.witnesses.pop()
        self.witnessed()

    # The tree

    def witnessed(self) -> None:
        """Compares the witness's heads over as many leaves as there are now."""
        while self.witnesses and self.witnesses[-1].tree_size == self.position:
            head = self.witnesses.pop()
            if head.root != self.frontier.root():
                size = head.tree_size
                message = f"The witness has another tree head over {counted(size)}: the ledger was rewritten."
                self.forks.append(Finding("tree_head_forked", head.tree_size, None, message))

    def grow(self, listed: bytes) -> None:
        at, start = 0, self.position
        while self.witnesses and self.witnesses[-1].tree_size <= start + len(listed) // HASH_SIZE:
            to = (self.witnesses[-1].tree_size - start) * HASH_SIZE
            self.frontier.extend(listed[at:to])
            at = to
            self.witnessed()
        self.frontier.extend(listed[at:])

    def head(self, line: bytes) -> None:
        try:
            head = TreeHead.from_json(line)
            self.trust.verify(head)
        except FalseSignatureError as error:
            size = head.tree_size
            self.find(
                "signature_false", size, f"The tree head over {counted(size)} does not verify: {error}."
            )
        except UntrustedKeyError as error:
            size = head.tree_size
            self.find("untrusted_key", size, f"The tree head over {counted(size)} does not verify: {error}.")
        except LedgerIntegrityError as error:
            self.find("malformed", self.position, f"A tree head is none: {error}.")
        else:
            self.signed(head)
        self.expect_first_head = False

    def signed(self, head: TreeHead) -> None:
        """Compares a tree head whose signature verifies with what came before it."""
        size = head.tree_size
        self.reached = max(self.reached, size)
        if self.last is not None:
            if size < self.last.tree_size or head.timestamp < self.last.timestamp:
                self.find(
                    "tree_head_forked",
                    size,
                    f"A tree head over {counted(size)} comes after one over {self.last.tree_size}, or is"
                    " older.",
                )
                return
            if size == self.last.tree_size and head.root != self.last.root:
                self.find("tree_head_forked", size, f"Two signed tree heads over {counted(size)} differ.")
                return
        if size != self.position:
            self.misplaced(head)
            return
        self.last = head
        root = self.frontier.root()
        if head.root == root:
            self.good, self.covered, self.lost = head, size, False
            self.heads += 1
            self.tell_suspects("as the ledger was signed")
        elif self.own is not None and self.own.root() == head.root:
            self.list_was_changed()
            self.good, self.covered, self.lost = head, size, False
            self.heads += 1
            self.tell_suspects("as the ledger was signed")
        else:
            self.wrong_root(head)
        self.own = None
        self.boundaries = {}
        self.since_head = len(self.findings)
        self.findings_of_forks()

    def findings_of_forks(self) -> None:
        for fork in self.forks:
            self.find(fork.kind, fork.index, fork.message)
        self.forks = []

    def list_was_changed(self) -> None:
        for place in range(self.since_head, len(self.findings)):
            found = self.findings[place]
            if found.kind == "altered":
                message = (
                    f"The listed hash of entry {found.index} was changed; the entry is as it was signed."
                )
                self.replace(place, "malformed", found.index, message, found.event_id)
        assert self.own is not None  # noqa: S101  (the caller has looked)
        self.frontier = self.own

    def wrong_root(self, head: TreeHead) -> None:
        if self.lost:
            self.tell_suspects("in a part that is not as it was signed")
            return
        self.lost = True
        size, known = head.tree_size, bool(self.suspects)
        self.tell_suspects("and the signed tree head does not fit")
        if not known:
            fits = f"the tree head over {counted(self.covered)} fits, and that over {size} does not"
            if not self.covered:
                fits = f"the tree head over {counted(size)} does not fit"
            place = self.find(
                "altered",
                self.covered,
                f"Entries were changed along with their listed hashes, somewhere from {self.covered}"
                f" to {size - 1}: {fits}.",
            )
            self.damage = place, self.covered, size

    def misplaced(self, head: TreeHead) -> None:
        size, position = head.tree_size, self.position
        known = bool(self.suspects)
        if size > position:
            self.tell_suspects("and the signed tree head does not fit")
            if self.ahead or self.lost:
                return
            place = None
            if not known:
                place = self.find(
                    "missing",
                    self.covered,
                    f"The tree head over {counted(size)} comes after {position}: entries from {self.covered}"
                    " on were taken out along with their listed hashes.",
                )
                self.ahead[size] = place, head.root
            else:
                self.lost = True
        elif self.boundaries.get(size) == head.root:
            self.find("reordered", size, f"The tree head over {counted(size)} stands after {position}.")
        else:
            self.tell_suspects("and the signed tree head does not fit")
            if not known and not self.lost:
                self.find(
                    "inserted",
                    self.covered,
                    f"The tree head over {counted(size)} comes after {position}: entries from {self.covered}"
                    " on were put in along with their listed hashes.",
                )
            self.lost = True

    # Entries

    def leaves(self, content: dict[str, Any], source: Iterator[bytes]) -> bytes | None:
        """Takes a leaves/1 and what stands for its leaves; returns the line after those."""
        first, count = content["first_index"], content["count"]
        try:
            listed = from_base64(content["hashes"])
        except LedgerIntegrityError:
            listed = b""
        if not 1 <= count <= MAX_LEAVES or len(listed) != count * HASH_SIZE:
            self.find("malformed", self.position, "A leaves/1 does not have as many hashes as it says.")
            # Its entries have nothing to be compared with.
            self.lost = True
            listed = listed[: min(len(listed) // HASH_SIZE, MAX_LEAVES) * HASH_SIZE]
        if self.expect_first_head:
            self.expect_first_head = False
            self.find(
                "unsigned",
                self.first_index,
                f"The bundle begins at entry {self.first_index} without the tree head over those before it.",
            )
        if first > self.position:
            self.find(
                "missing",
                self.position,
                f"The entries {self.position} to {first - 1} are missing, and so are their listed hashes.",
            )
            self.lost = True
        elif first < self.position:
            self.find(
                "inserted" if first < self.covered or not self.lost else "malformed",
                self.position,
                f"Hashes from entry {first} on are listed again after {counted(self.position)}.",
            )
            self.lost = True
        before = self.frontier.copy()
        line = self.segment(listed, source, before)
        root = self.frontier.root()
        self.boundaries[self.position] = root
        if len(self.boundaries) > 128:
            del self.boundaries[next(iter(self.boundaries))]
        place, early = self.ahead.pop(self.position, (None, b""))
        if early == root:
            # So nothing is missing: it was the head.
            size = self.position
            self.replace(place, "reordered", size, f"The tree head over {counted(size)} stands before them.")
        self.progress(self.position)
        return line

    def segment(self, listed: bytes, source: Iterator[bytes], before: Frontier) -> bytes | None:
        # The hot loop: everything it needs is local, and whatever is out of order leaves it.
        hexes, start = listed.hex(), self.position
        match, scan, chains, agents, holes = self.pattern.match, _scan, self.chains, self.agents, self.holes
        at, index = 0, start
        line: bytes | None = None
        for line in source:
            try:  # around nothing that reads: an error of the source is not the bundle's
                text = line.decode()
                found = match(text)
                if found is None or len(line) > MAX_LINE:
                    break
                digest = sha256(b"\0" + line[:-1]).hexdigest()
                if digest != hexes[at : at + 64]:
                    break
                _, end = scan(text, found.end())
            except _ERRORS:
                break
            if text[end:] != "}\n":
                break
            event, agent, serial, chain, number, prev = found.groups()
            event_id, sequence = int(event), int(number)
            if agents.get(serial) != agent and serial != "null":
                self.wrong_agent(index, event_id, agent, serial)
            owner = "null" if serial == "null" else agent
            known = chains.get(chain)
            if (
                known is not None
                and known[0] == sequence
                and known[1] == prev
                and known[2] < event_id
                and known[3] == owner
            ):
                chains[chain] = (sequence + 1, digest, event_id, owner, index, holes)
            else:
                self.link(_Entry(event_id, agent, serial, chain, sequence, prev), digest, index)
            at += 64
            index += 1
        else:
            line = None
        self.entries += index - start
        if at < len(hexes) or (line is not None and not self.is_other(line)):
            line = self.odd_segment(listed, at // 64, line, source, before)
        else:
            if self.own is not None:
                self.own.extend(listed)
            self.grow(listed)
        return line

    @staticmethod
    def is_other(line: bytes) -> bool:
        """Whether it ends the lines of a leaves/1."""
        kind = _KIND.match(line)
        return len(line) > MAX_LINE or (kind is not None and kind[1].decode() in _OTHERS)

    def wrong_agent(self, index: int, event_id: int, agent: str, serial: str) -> None:
        # Once, or each entry of an agent whose certificate is not good would be one.
        if (agent, serial) in self.wrong_agents or len(self.wrong_agents) > MAX_FINDINGS:
            return
        self.wrong_agents.add((agent, serial))
        known = self.agents.get(serial)
        why = f"is that of agent {known}" if known else "is in no certificate of the bundle that verifies"
        self.find(
            "certificate_false",
            index,
            f"Event {event_id} is of agent {agent}, and its serial number {serial} {why}.",
            event_id,
        )

    def slot(self, line: bytes) -> _Slot | None:
        """What the line stands for; None where it is another kind of line."""
        if self.is_other(line):
            return None
        body = line.removesuffix(b"\n")
        digest = leaf_hash(body)
        problem = "it is no entry as the format has it"
        try:
            text = line.decode()
            found = self.pattern.match(text)
            if found is None:
                found = _ANY_ENTRY.match(text)
                problem = "no ledger key of the bundle is of its installation"
                if found is None:
                    raise ValueError
            else:
                problem = ""
            _, end = _scan(text, found.end())
            if text[end:] != "}\n":
                raise ValueError
        except _ERRORS:
            return _Slot(digest, problem="it is no entry as the format has it")
        event, agent, serial, chain, number, prev = found.groups()
        entry = _Entry(int(event), agent, serial, chain, int(number), prev)
        return _Slot(digest, entry, problem or None)

    def claims(self, line: bytes, listed: bytes) -> list[_Slot] | None:
        """The leaves that a missing/1 or archived/1 stands for; None where it is neither."""
        kind = _KIND.match(line)
        if kind is None or kind[1] not in (b"missing/1", b"archived/1"):
            return None
        try:
            name, content = _parse(line)
        except LedgerIntegrityError as error:
            self.find("malformed", self.position, f"After {counted(self.position)} a line is wrong: {error}.")
            return []
        first: int = content["index"] if name == "missing/1" else content["first_index"]
        count: int = content.get("count", 1)
        offset = first - self.position
        if offset < 0 or not 1 <= count <= len(listed) // HASH_SIZE - offset:
            self.find("malformed", self.position, f"A {name} is for leaves that are not listed before it.")
            return []
        if name == "archived/1":
            self.archived += count
        else:
            self.find("missing", first, f"The database has no entry {first} any more.")
        return [
            _Slot(listed[i * HASH_SIZE : (i + 1) * HASH_SIZE], claim=i) for i in range(offset, offset + count)
        ]

    def odd_segment(
        self, listed: bytes, at: int, line: bytes | None, source: Iterator[bytes], before: Frontier
    ) -> bytes | None:
        """The rest of a leaves/1, from its leaf ``at`` on, where ``line`` is not the entry that is listed."""
        size = len(listed) // HASH_SIZE
        slots: list[_Slot] = []
        stop = False
        while line is not None:
            claimed = self.claims(line, listed)
            if claimed is not None:
                slots += claimed
            else:
                slot = self.slot(line)
                if slot is None:
                    break
                self.entries += slot.entry is not None
                slots.append(slot)
            if len(slots) > 3 * MAX_LEAVES:
                stop = True
                self.find(
                    "malformed", self.position, "There are far more lines than leaves; reading ended here."
                )
                break
            line = next(source, None)
        # Where the bundle breaks off, what has not come is truncated and not missing.
        cut = line is None or len(line) > MAX_LINE
        placed = self.compare(listed, at, slots, cut)
        own = b"".join(slot.digest for slot in slots)
        if self.own is None and own != listed[at * HASH_SIZE :]:
            self.own = before
        if self.own is not None:
            self.own.extend(listed[: at * HASH_SIZE] + own)
        for offset in range(at, size):
            found = placed.get(offset)
            index = self.position + offset
            if found is None or found.entry is None or found.problem:
                self.holes += 1
                if found is not None and found.claim is None:
                    self.find(
                        "malformed", index, f"Entry {index} is listed, and {found.problem}.", found.event_id
                    )
                continue
            entry = found.entry
            if entry.serial != "null" and self.agents.get(entry.serial) != entry.agent_id:
                self.wrong_agent(index, entry.event_id, entry.agent_id, entry.serial)
            self.link(entry, found.digest.hex(), index)
        self.grow(listed)
        if stop:
            raise _Stop
        return line

    def compare(  # noqa: PLR0912, PLR0915  (one pass, and everything in it needs everything)
        self, listed: bytes, at: int, slots: list[_Slot], cut: bool
    ) -> dict[int, _Slot]:
        """Tells how the lines differ from the listed leaves from ``at`` on; returns which line is which
        leaf."""
        size, base = len(listed) // HASH_SIZE, self.position
        hashes = [listed[i : i + HASH_SIZE] for i in range(0, len(listed), HASH_SIZE)]
        where: dict[bytes, int] = {}
        for offset in range(size - 1, -1, -1):
            where[hashes[offset]] = offset
        offsets = [where.get(s.digest) if s.claim is None else s.claim for s in slots]
        # Those that stand in order, as many as possible.
        known = [(n, offset) for n, offset in enumerate(offsets) if offset is not None and offset >= at]
        anchors = [known[place] for place in _longest_increasing([offset for _, offset in known])]
        placed = {offset: slots[n] for n, offset in anchors}
        anchored = {n for n, _ in anchors}
        moved: dict[int, int] = {}
        for n, offset in known:
            if n not in anchored and offset not in placed:
                moved[n] = offset
                placed[offset] = slots[n]
        found: list[tuple[Kind, int, int | None, str, bytes | None, bytes | None]] = []
        last_slot, last_offset = -1, at - 1
        for n, offset in [*anchors, (len(slots), size)]:
            absent = [o for o in range(last_offset + 1, offset) if o not in placed]
            extra: list[_Slot] = []
            for between in range(last_slot + 1, n):
                slot, stands = slots[between], base + last_offset + 1
                if between in moved:
                    index = base + moved[between]
                    message = f"Entry {index}, {slot.name}, stands where entry {stands} should."
                    found.append(("reordered", min(index, stands), slot.event_id, message, None, None))
                elif offsets[between] is not None:
                    message = f"Entry {base + (offsets[between] or 0)}, {slot.name}, is there again."
                    found.append(("inserted", stands, slot.event_id, message, None, None))
                elif slot.digest in self.unseen:
                    place, index = self.unseen.pop(slot.digest)
                    message = f"Entry {index}, {slot.name}, stands where entry {stands} should."
                    self.replace(place, "reordered", min(index, stands), message, slot.event_id)
                else:
                    extra.append(slot)
            for o in [o for o in absent if hashes[o] in self.strays]:
                place, stands = self.strays.pop(hashes[o])
                message = f"Entry {base + o} stands where entry {stands} should."
                self.replace(place, "reordered", stands, message)
                absent.remove(o)
            for o, slot in zip(absent, extra, strict=False):
                message = f"Entry {base + o}, {slot.name}, is not as it was listed: its bytes were changed."
                if slot.entry is None:
                    message = f"Entry {base + o} is not as it was listed: its line is no entry any more."
                found.append(("altered", base + o, slot.event_id, message, hashes[o], slot.digest))
            for slot in extra[len(absent) :]:
                message = f"Before entry {base + offset} stands {slot.name}, which no leaf is for."
                found.append(("inserted", base + offset, slot.event_id, message, None, slot.digest))
            rest = absent[len(extra) :]
            for _, run in itertools.groupby(enumerate(rest), lambda pair: pair[1] - pair[0]):
                gone = [o for _, o in run]
                which = (
                    f"Entry {base + gone[0]} is"
                    if len(gone) == 1
                    else (f"The entries {base + gone[0]} to {base + gone[-1]} are")
                )
                ends = cut and gone[-1] == size - 1
                kind: Kind = "truncated" if ends else "missing"
                message = f"{which} missing" + (
                    ": the bundle breaks off." if ends else "; the hash is listed."
                )
                found.append((kind, base + gone[0], None, message, hashes[gone[0]], None))
            last_slot, last_offset = n, offset
        for kind, index, event_id, message, gone_hash, stray in sorted(found, key=lambda f: f[1]):
            place = self.find(kind, index, message, event_id)
            if gone_hash is not None and len(self.unseen) < MAX_FINDINGS:
                self.unseen[gone_hash] = place, index
            if stray is not None and len(self.strays) < MAX_FINDINGS:
                self.strays[stray] = place, index
        return placed

    # Chains

    def link(self, entry: _Entry, digest: str, index: int) -> None:
        """Follows a chain to its next entry."""
        event_id, _, _, chain, sequence, prev = entry
        owner = "null" if entry.serial == "null" else entry.agent_id
        known = self.chains.get(chain)
        broke = self.broken.pop(chain, None)
        if known is None:
            if sequence == 1:
                if prev != _ZEROS:
                    self.suspect(
                        "altered", index, event_id, f"Event {event_id} begins a chain after another entry"
                    )
            elif not self.holes:
                self.suspect(
                    "missing",
                    index,
                    event_id,
                    f"Before event {event_id} the entries 1 to {sequence - 1} of chain {chain} are missing",
                    range(1, sequence),
                )
        else:
            following, last_digest, last_event, last_owner, last_index, holes = known
            if sequence < following:
                self.back(entry, index)
                return
            if sequence > following:
                if holes == self.holes:
                    self.suspect(
                        "missing",
                        index,
                        event_id,
                        f"Before event {event_id} the entries {following} to {sequence - 1} of chain {chain}"
                        " are missing",
                        range(following, sequence),
                    )
            elif prev != last_digest:
                self.break_link(entry, index, last_event, last_index, broke)
            if event_id <= last_event:
                self.suspect(
                    "altered", index, event_id, f"Event {event_id} follows event {last_event} in a chain"
                )
            if owner == "null":
                owner = last_owner
            elif last_owner not in ("null", owner):
                self.suspect(
                    "altered",
                    index,
                    event_id,
                    f"Event {event_id} is in the chain of another agent, {last_owner}",
                )
        self.chains[chain] = (sequence + 1, digest, event_id, owner, index, self.holes)

    def break_link(
        self, entry: _Entry, index: int, last_event: int, last_index: int, broke: _Suspect | None
    ) -> None:
        """An entry does not name the one before it in its chain. Which of the two is wrong? That before it,
        unless a signed root has it as it is, or it was named wrongly by both its neighbours."""
        if broke is not None and broke in self.suspects:
            broke.index, broke.event_id = last_index, last_event
            broke.message = (
                f"Event {last_event} fits neither the entry before it in its chain nor the one after it"
            )
            return
        if last_index < self.covered:
            blamed, event_id = index, entry.event_id
            message = f"Event {event_id} was changed: it does not name the entry before it in its chain"
        else:
            blamed, event_id = last_index, last_event
            message = (
                f"Event {event_id} was changed: event {entry.event_id}, next in its chain, names another hash"
            )
        made = self.suspect("altered", blamed, event_id, message)
        if made is not None:
            self.broken[entry.chain] = made

    def back(self, entry: _Entry, index: int) -> None:
        """An entry whose place in its chain is behind. The chain stays where it is."""
        for suspect in self.suspects:
            if suspect.kind in ("missing", "reordered") and entry.sequence in suspect.gap:
                suspect.kind = "reordered"
                suspect.message = f"Event {entry.event_id} comes after event {suspect.event_id} of its chain"
                return
        self.suspect(
            "inserted",
            index,
            entry.event_id,
            f"Event {entry.event_id} has the sequence {entry.sequence}, which its chain {entry.chain} has"
            " passed",
        )

    def suspect(
        self, kind: Kind, index: int, event_id: int, message: str, gap: range = range(0)
    ) -> _Suspect | None:
        if len(self.suspects) >= MAX_FINDINGS:
            self.count += 1
            return None
        made = _Suspect(kind, index, event_id, message, gap)
        self.suspects.append(made)
        return made

    def tell_suspects(self, how: str) -> None:
        for found in self.suspects:
            message = f"{found.message}, {how}."
            if self.damage is not None and self.damage[1] <= found.index < self.damage[2]:
                # Now it is known which one it was.
                self.replace(self.damage[0], found.kind, found.index, message, found.event_id)
                self.damage = None
            else:
                self.find(found.kind, found.index, message, found.event_id)
        self.suspects = []
        self.broken = {}

    # The end

    def end(self, content: dict[str, Any]) -> None:
        self.ended = True
        size, entries = content["tree_size"], content["entries"]
        if size != self.position:
            self.find(
                "truncated",
                self.position,
                f"The bundle was made of {counted(size)}, and {self.position} are listed in it.",
            )
        elif entries != self.entries and not self.count:
            self.find(
                "truncated",
                self.position,
                f"The bundle was made with {counted(entries)}, and {self.entries} are in it.",
            )

    def finish(self) -> None:
        if self.installation is None:
            return
        self.begin()
        # What is about the whole is told however much was found before.
        self.limit = len(self.findings) + 10
        self.tell_suspects(
            "in a part that no tree head covers" if self.position > self.reached else "unsigned"
        )
        if self.expect_first_head:
            self.find(
                "unsigned",
                self.first_index,
                f"The bundle begins at entry {self.first_index} without the tree head over those before it.",
            )
        if self.position > self.reached:
            self.find(
                "unsigned",
                self.reached,
                f"No tree head that verifies covers the entries {self.reached} to {self.position - 1}.",
            )
        if not self.ended:
            self.find("truncated", self.position, "The bundle breaks off: its last line is not there.")
        self.findings_of_forks()
        if self.witnesses:
            size = self.witnesses[0].tree_size
            witness = f"The witness has a tree head over {counted(size)}"
            ends = f"and the ledger ends after {self.position}"
            # A ledger that was cut off can be exported with any time in the bundle's first line.
            if self.made_at < min(_moment(head.timestamp) for head in self.witnesses):
                self.find(
                    "older",
                    self.position,
                    f"{witness}, {ends}: the bundle says that it was made before, at {self.made_at}."
                    " Nobody signed that. Export anew, and verify that: what ends there as well was cut off.",
                )
            else:
                self.find("truncated", self.position, f"{witness}, {ends}: its end was cut off.")


def _moment(timestamp: int) -> str:
    """A tree head's as ``made_at`` is written; of one that no calendar has, what is before them all."""
    try:
        moment = dt.datetime(1970, 1, 1) + dt.timedelta(milliseconds=timestamp)
    except OverflowError:
        return ""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def verify_bundle(
    lines: Iterable[bytes],
    roots: Sequence[x509.Certificate],
    *,
    witnesses: Iterable[TreeHead] = (),
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Verifies an exported ledger.

    :param lines: the bundle: a binary file, or its lines, each with its LF. Of a file no more than 1 MiB is
        held at a time, however long a line is.
    :param roots: the certificates of the root authorities that the verifier trusts.
    :param witnesses: tree heads that were kept elsewhere (:func:`open_witness`); all are held.
    :param progress: called with the index reached, after each ``leaves/1`` and its entries.
    :returns: what is wrong, in the order in which it was met. Whatever the bundle is, nothing is raised for
        it.
    :raises BadInputError: ``roots`` has none, or a certificate that is no authority's.
    """
    return _Verifier(roots, witnesses, progress).run(lines)


# Proofs ---------------------------------------------------------------------------------------------


def verify_proof(document: Mapping[str, Any] | str | bytes, roots: Sequence[x509.Certificate]) -> TreeHead:
    """Verifies an ``inclusion_proof/1`` or a ``consistency_proof/1``; returns the signed tree head that it
    leads to, of a consistency proof the second.

    :param roots: the certificates of the root authorities that the verifier trusts.
    :raises LedgerIntegrityError: it proves nothing; UntrustedKeyError and FalseSignatureError are among
    these.
    :raises BadInputError: ``roots`` has none, or a certificate that is no authority's.
    """
    content = strict_json(document) if isinstance(document, str | bytes) else document
    kind = content.get("kakunin") if isinstance(content, Mapping) else None
    expected = {
        "inclusion_proof/1": {"kakunin", "entry", "index", "tree_head", "path", "certificates"},
        "consistency_proof/1": {"kakunin", "first", "second", "path", "certificates"},
    }
    if not isinstance(kind, str) or kind not in expected or content.keys() != expected[kind]:
        raise LedgerIntegrityError("it is neither an inclusion_proof/1 nor a consistency_proof/1")
    path = content["path"]
    if not isinstance(path, list) or len(path) > 128:
        raise LedgerIntegrityError("the path of a proof is a list of hashes")
    steps = [from_hex(step, HASH_SIZE) for step in path]
    trust = _trust(content["certificates"], roots)
    if kind == "consistency_proof/1":
        first, second = TreeHead.from_json(content["first"]), TreeHead.from_json(content["second"])
        trust.verify(first)
        trust.verify(second)
        if first.timestamp > second.timestamp:
            raise LedgerIntegrityError("the second tree head is older than the first")
        verify_consistency(first.tree_size, second.tree_size, first.root, second.root, steps)
        return second
    head, index, entry = TreeHead.from_json(content["tree_head"]), content["index"], content["entry"]
    trust.verify(head)
    if type(index) is not int or not isinstance(entry, str):
        raise LedgerIntegrityError("the entry or the index of the proof is none")
    check_entry(entry, trust.installations)
    verify_inclusion(leaf_hash(entry.encode()), index, head.tree_size, steps, head.root)
    return head


def check_entry(entry: str, installations: Iterable[uuid.UUID]) -> None:
    """Raises LedgerIntegrityError unless this is an entry of one of these installations."""
    try:
        entry.encode()
        found = _entry_pattern(installations).match(entry)
        if found is None or entry[_scan(entry, found.end())[1] :] != "}":
            raise ValueError
    except _ERRORS as error:
        raise LedgerIntegrityError(
            "it is no entry as the format has it, or of another installation"
        ) from error


def _trust(certificates: Any, roots: Sequence[x509.Certificate]) -> TrustAnchors:
    if not isinstance(certificates, list) or len(certificates) > 2 * MAX_AUTHORITIES:
        raise LedgerIntegrityError("the certificates of a proof are a list")
    found: dict[str, list[x509.Certificate]] = {"authority/1": [], "ledger_key/1": []}
    for one in certificates:
        kind = one.get("kakunin") if isinstance(one, Mapping) else None
        if not isinstance(kind, str) or kind not in found or one.keys() != {"kakunin", "key_id", "der"}:
            raise LedgerIntegrityError("a proof has certificates of authorities and of ledger keys only")
        certificate = load_certificate(from_base64(one["der"]))
        if key_id(certificate) != one["key_id"]:
            raise LedgerIntegrityError("a certificate of the proof is called something else than it is")
        found[kind].append(certificate)
    trust = TrustAnchors(roots, found["authority/1"])
    for certificate in found["ledger_key/1"]:
        trust.add_ledger_key(certificate)
    return trust
