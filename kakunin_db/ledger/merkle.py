"""The Merkle tree of RFC 6962 section 2.1: its hashes, its growth, and the checks of its proofs.

Hashes are SHA-256, 32 bytes. Nothing here keeps the leaves: a :class:`Frontier` is at most 64 hashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from ..errors import BadInputError, LedgerIntegrityError
from ..logs import counted

HASH_SIZE = 32
# RFC 6962 section 2.1: the hash of an empty list.
EMPTY_ROOT = sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """The hash of a leaf with these bytes (RFC 6962 section 2.1)."""
    return sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of the node above these two (RFC 6962 section 2.1)."""
    return sha256(b"\1" + left + right).digest()


class Frontier:
    """A tree that grows to the right: the roots of its complete subtrees from left to right, one for each bit
    set in its size.

    :raises BadInputError: the hashes do not fit the size.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        if size < 0 or len(hashes) != size.bit_count() or any(len(h) != HASH_SIZE for h in hashes):
            raise BadInputError("a frontier has one hash of 32 bytes for each bit set in the tree's size")
        self._size = size
        self._hashes = list(hashes)

    @property
    def size(self) -> int:
        """How many leaves the tree has."""
        return self._size

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """From left to right, that is from the largest subtree to the smallest."""
        return tuple(self._hashes)

    def copy(self) -> Frontier:
        return Frontier(self._size, self._hashes)

    def append(self, leaf: bytes) -> None:
        """Adds a leaf by its hash."""
        if len(leaf) != HASH_SIZE:
            raise BadInputError(f"a leaf hash has 32 bytes and this one {len(leaf)}")
        self._push(leaf, 0)

    def extend(self, leaves: bytes) -> None:
        """Adds leaves by their hashes, one after the other in one string: several times as fast as one by
        one, because whole subtrees are hashed level by level."""
        count, rest = divmod(len(leaves), HASH_SIZE)
        if rest:
            raise BadInputError("leaf hashes have 32 bytes each")
        at = 0
        while at < count:
            # The largest complete subtree that may begin here and is there in full.
            level = (count - at).bit_length() - 1
            if self._size:
                level = min(level, (self._size & -self._size).bit_length() - 1)
            nodes = leaves[at * HASH_SIZE : (at + (1 << level)) * HASH_SIZE]
            for _ in range(level):
                nodes = b"".join(
                    [sha256(b"\1" + nodes[i : i + 64]).digest() for i in range(0, len(nodes), 2 * HASH_SIZE)]
                )
            self._push(nodes, level)
            at += 1 << level

    def _push(self, node: bytes, level: int) -> None:
        self._size += 1 << level
        bit = self._size - (1 << level) >> level
        while bit & 1:
            node = node_hash(self._hashes.pop(), node)
            bit >>= 1
        self._hashes.append(node)

    def root(self) -> bytes:
        """The Merkle tree hash of all leaves so far."""
        if not self._hashes:
            return EMPTY_ROOT
        root = self._hashes[-1]
        for left in self._hashes[-2::-1]:
            root = node_hash(left, root)
        return root


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> None:
    """Checks an audit path (RFC 6962 section 2.1.1; the algorithm is RFC 9162's, section 2.1.3.2).

    :param leaf: the leaf's hash, :param index: from 0, :param size: of the tree,
    :param path: from the leaf upwards.
    :raises LedgerIntegrityError: the leaf is not shown to be there.
    """
    if not 0 <= index < size:
        raise LedgerIntegrityError(f"a tree of {counted(size)} has none with the index {index}")
    place, last, node = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            raise LedgerIntegrityError("the audit path is too long")
        if place & 1 or place == last:
            node = node_hash(sibling, node)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        place, last = place >> 1, last >> 1
    if last != 0:
        raise LedgerIntegrityError("the audit path is too short")
    if node != root:
        raise LedgerIntegrityError(
            f"the audit path of entry {index} does not lead to the root of {counted(size)}"
        )


def verify_consistency(
    first_size: int, second_size: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]
) -> None:
    """Checks that a tree begins with all of an earlier one (RFC 6962 section 2.1.2; the algorithm is RFC
    9162's, section 2.1.4.2).

    :raises LedgerIntegrityError: that is not shown.
    """
    if not 0 <= first_size <= second_size:
        raise LedgerIntegrityError(f"a tree of {counted(second_size)} does not begin with {first_size}")
    wrong = LedgerIntegrityError(
        f"the tree of {counted(second_size)} is not shown to begin with that of {counted(first_size)}"
    )
    if first_size in (0, second_size):
        # Both are known without a path.
        same = first_root == (second_root if first_size == second_size else EMPTY_ROOT)
        if path or not same or (second_size == 0 and second_root != EMPTY_ROOT):
            raise wrong
        return
    steps = list(path)
    if first_size & (first_size - 1) == 0:
        steps.insert(0, first_root)
    if not steps:
        raise wrong
    place, last = first_size - 1, second_size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    first = second = steps[0]
    for step in steps[1:]:
        if last == 0:
            raise wrong
        if place & 1 or place == last:
            first, second = node_hash(step, first), node_hash(step, second)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            second = node_hash(second, step)
        place, last = place >> 1, last >> 1
    if last != 0 or first != first_root or second != second_root:
        raise wrong
