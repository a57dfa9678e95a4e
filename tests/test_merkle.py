"""The Merkle tree: published vectors, RFC 6962's own definition, and pymerkle, which is not ours."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree

from kakunin_db.errors import BadInputError, LedgerIntegrityError
from kakunin_db.ledger import (
    EMPTY_ROOT,
    Frontier,
    leaf_hash,
    node_hash,
    verify_consistency,
    verify_inclusion,
)

# The vectors of the reference implementation of Certificate Transparency (merkle_tree_test.cc).
INPUTS = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def definition(entries: list[bytes]) -> bytes:
    """MTH of RFC 6962 section 2.1, as it is written there."""
    if not entries:
        return sha256().digest()
    if len(entries) == 1:
        return sha256(b"\0" + entries[0]).digest()
    k = 1
    while 2 * k < len(entries):
        k *= 2
    return sha256(b"\1" + definition(entries[:k]) + definition(entries[k:])).digest()


def entries(count: int) -> list[bytes]:
    return [b"entry %d" % i for i in range(count)]


def peer(count: int) -> InmemoryTree:
    tree = InmemoryTree(algorithm="sha256")
    for entry in entries(count):
        tree.append_entry(entry)
    return tree


def root_of(tree: InmemoryTree, size: int) -> bytes:
    """pymerkle 6, which Python 3.10 gets, calls it a state."""
    return bytes(tree.get_root(size) if hasattr(tree, "get_root") else tree.get_state(size))


def inclusion(tree: InmemoryTree, index: int, size: int) -> list[bytes]:
    """An audit path: pymerkle's begins with the leaf itself."""
    return list(tree.prove_inclusion(index + 1, size).path)[1:]


def consistency(first: int, second: int) -> list[bytes]:
    """PROOF of RFC 6962 section 2.1.2, as it is written there. (pymerkle's has other nodes where the first
    tree is complete.)"""

    def subproof(m: int, part: list[bytes], whole: bool) -> list[bytes]:
        if m == len(part):
            return [] if whole else [definition(part)]
        k = 1
        while 2 * k < len(part):
            k *= 2
        if m <= k:
            return [*subproof(m, part[:k], whole), definition(part[k:])]
        return [*subproof(m - k, part[k:], False), definition(part[:k])]

    return subproof(first, entries(second), True) if first else []


def frontier(count: int) -> Frontier:
    tree = Frontier()
    tree.extend(b"".join(map(leaf_hash, entries(count))))
    return tree


def test_the_reference_vectors() -> None:
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    tree = Frontier()
    assert tree.root() == EMPTY_ROOT
    for size, (data, root) in enumerate(zip(INPUTS, ROOTS, strict=True), 1):
        tree.append(leaf_hash(data))
        assert (tree.size, tree.root().hex()) == (size, root)


# Also from there.
@pytest.mark.parametrize(
    ("first", "second", "path"),
    [
        (1, 1, []),
        (
            1,
            8,
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            6,
            8,
            [
                "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
        (
            2,
            5,
            [
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            ],
        ),
    ],
)
def test_the_reference_vectors_of_consistency(first: int, second: int, path: list[str]) -> None:
    roots = [bytes.fromhex(ROOTS[size - 1]) for size in (first, second)]
    verify_consistency(first, second, *roots, list(map(bytes.fromhex, path)))


@pytest.mark.parametrize(
    ("index", "size", "path"),
    [
        (0, 1, []),
        (
            0,
            8,
            [
                "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
                "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
                "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
            ],
        ),
        (
            5,
            8,
            [
                "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
                "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
                "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            ],
        ),
        (2, 3, ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"]),
    ],
)
def test_the_reference_vectors_of_inclusion(index: int, size: int, path: list[str]) -> None:
    steps, root = list(map(bytes.fromhex, path)), bytes.fromhex(ROOTS[size - 1])
    verify_inclusion(leaf_hash(INPUTS[index]), index, size, steps, root)


def test_hashes() -> None:
    assert leaf_hash(b"") == sha256(b"\0").digest()
    assert node_hash(b"a" * 32, b"b" * 32) == sha256(b"\1" + b"a" * 32 + b"b" * 32).digest()


def test_every_small_tree_is_that_of_the_definition_and_of_pymerkle() -> None:
    tree, peers = Frontier(), peer(130)
    for size in range(1, 131):
        tree.append(leaf_hash(entries(size)[-1]))
        assert tree.root() == definition(entries(size)) == root_of(peers, size)
        assert len(tree.hashes) == size.bit_count()


@given(st.lists(st.integers(0, 70), max_size=8))
def test_leaves_may_be_added_in_any_portions(portions: list[int]) -> None:
    leaves = list(map(leaf_hash, entries(sum(portions))))
    tree, at = Frontier(), 0
    for portion in portions:
        tree.extend(b"".join(leaves[at : at + portion]))
        at += portion
        tree = Frontier(tree.size, tree.hashes)  # as it is handed on in a bundle
    one_by_one = Frontier()
    for leaf in leaves:
        one_by_one.append(leaf)
    assert (tree.size, tree.hashes, tree.root()) == (one_by_one.size, one_by_one.hashes, one_by_one.root())
    assert tree.root() == definition(entries(sum(portions)))


def test_a_copy_grows_by_itself() -> None:
    tree = frontier(5)
    other = tree.copy()
    other.append(leaf_hash(b"another"))
    assert (tree.size, tree.root()) == (5, frontier(5).root())
    assert other.size == 6


@pytest.mark.parametrize(
    ("size", "hashes"),
    [(-1, []), (1, []), (0, [b"x" * 32]), (3, [b"x" * 32]), (1, [b"x" * 31])],
    ids=["negative", "too few", "too many", "of two one", "short"],
)
def test_a_frontier_has_the_hashes_of_its_size(size: int, hashes: list[bytes]) -> None:
    with pytest.raises(BadInputError, match="one hash of 32 bytes for each bit"):
        Frontier(size, hashes)


def test_leaves_are_hashes() -> None:
    with pytest.raises(BadInputError, match="32 bytes and this one 31"):
        Frontier().append(b"x" * 31)
    with pytest.raises(BadInputError, match="32 bytes each"):
        Frontier().extend(b"x" * 63)


def test_pymerkles_inclusion_proofs_verify() -> None:
    tree = peer(40)
    for size in range(1, 41):
        for index in range(size):
            leaf = leaf_hash(entries(40)[index])
            verify_inclusion(leaf, index, size, inclusion(tree, index, size), root_of(tree, size))


def test_consistency_proofs_verify() -> None:
    tree = peer(40)
    for second in range(41):
        for first in range(second + 1):
            path = consistency(first, second)
            roots = [root_of(tree, size) if size else EMPTY_ROOT for size in (first, second)]
            verify_consistency(first, second, *roots, path)


@given(st.integers(1, 80), st.data())
def test_no_changed_inclusion_proof_verifies(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    tree = peer(size)
    leaf, path, root = leaf_hash(entries(size)[index]), inclusion(tree, index, size), root_of(tree, size)
    wrong = list(path)
    change = data.draw(st.sampled_from(["leaf", "root", "longer", "index", "shorter", "hash", "swapped"]))
    if change in ("shorter", "hash") and not path:
        change = "longer"
    if change == "swapped" and len(path) < 2:
        change = "leaf"
    if change == "leaf":
        leaf = leaf_hash(b"another")
    elif change == "root":
        root = leaf_hash(b"another")
    elif change == "longer":
        wrong.insert(data.draw(st.integers(0, len(path))), data.draw(st.sampled_from([leaf, root])))
    elif change == "shorter":
        del wrong[data.draw(st.integers(0, len(path) - 1))]
    elif change == "hash":
        wrong[data.draw(st.integers(0, len(path) - 1))] = root
    elif change == "swapped":
        at = data.draw(st.integers(0, len(path) - 2))
        wrong[at], wrong[at + 1] = wrong[at + 1], wrong[at]
    else:
        index = data.draw(st.integers(-1, size).filter(lambda i: i != index))
    with pytest.raises(LedgerIntegrityError):
        verify_inclusion(leaf, index, size, wrong, root)


@given(st.integers(1, 60), st.data())
def test_no_changed_consistency_proof_verifies(second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, second))
    tree = peer(second)
    path, a, b = consistency(first, second), root_of(tree, first), root_of(tree, second)
    change = data.draw(st.sampled_from(["first", "second", "longer", "shorter", "hash", "backwards", "size"]))
    if change in ("shorter", "hash") and not path:
        change = "first"
    if change == "backwards" and first == second:
        change = "second"
    if change == "first":
        a = leaf_hash(b"another")
    elif change == "second":
        b = leaf_hash(b"another")
    elif change == "longer":
        path.insert(data.draw(st.integers(0, len(path))), leaf_hash(b"another"))
    elif change == "shorter":
        del path[data.draw(st.integers(0, len(path) - 1))]
    elif change == "hash":
        path[data.draw(st.integers(0, len(path) - 1))] = leaf_hash(b"another")
    elif change == "backwards":
        first, second, a, b = second, first, b, a
    else:
        first = data.draw(st.integers(0, second).filter(lambda n: n != first))
    with pytest.raises(LedgerIntegrityError):
        verify_consistency(first, second, a, b, path)


def test_messages_say_what_is_wrong() -> None:
    leaf, root = leaf_hash(b"entry 0"), frontier(2).root()
    sibling = leaf_hash(b"entry 1")
    for path, message in [
        ([], "too short"),
        ([sibling] * 2, "too long"),
        ([leaf], "the audit path of entry 0 does not lead to the root of 2 entries"),
    ]:
        with pytest.raises(LedgerIntegrityError, match=message):
            verify_inclusion(leaf, 0, 2, path, root)
    with pytest.raises(LedgerIntegrityError, match="has none with the index 2"):
        verify_inclusion(leaf, 2, 2, [], root)
    with pytest.raises(LedgerIntegrityError, match="a tree of 1 entry does not begin with 2"):
        verify_consistency(2, 1, root, root, [])
