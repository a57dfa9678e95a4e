"""G5: a superuser who takes the triggers away changes the ledger, and `audit verify` says what and where."""

# ruff: noqa: E501  (the cases are a table)

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from cluster import Cluster
from conftest import Agent, Database, LedgerKey, OneKey, _ca, fresh_database

from kakunin_db import BadInputError, CertificateAuthority, LocalSigner, bind_agent_session
from kakunin_db.ledger import Report, TreeHead, verify_bundle
from kakunin_db.ledger.export import bundle_lines, tree_heads, verify_database
from kakunin_db.ledger.worker import Worker

# What a superuser may change and a test puts back, those that others refer to first.
TABLES = (
    "authorities", "certificates", "ledger_keys", "batches", "tree_heads", "tree_nodes", "tree", "chains",
    "partitions", "installation", "ledger",
)  # fmt: skip


def append(database: Database, agent: Agent, login: str, count: int) -> list[int]:
    """Entries of an agent in a transaction; their event ids."""
    with database.connect(login, autocommit=True) as connection:
        with bind_agent_session(connection, agent.credential):
            rows = connection.execute(
                "select (kakunin.audit_log_append('api_call', jsonb_build_object('n', n)) ->> 'event_id')::bigint"
                " from generate_series(1, %s) n",
                [count],
            ).fetchall()
    return [row[0] for row in rows]


@dataclasses.dataclass
class Original:
    """A ledger in a database that others are copied from: three batches, each with a signed head, the last
    one past the first node that is kept; then entries that are not sealed."""

    database: Database
    sizes: list[int]
    leaves: list[int]  # event ids, by index
    unsealed: list[int]
    heads: list[TreeHead]
    key: LedgerKey
    agents_first: int  # of agent one


@pytest.fixture(scope="module")
def original(cluster: Cluster) -> Iterator[Original]:
    with fresh_database(cluster) as database:
        key = database.ledger_key()
        one, two = database.agent("one"), database.agent("two")
        sizes: list[int] = []
        ids_of_one: list[int] = []
        for count in (60, 150, 90):
            ids_of_one += append(database, one, "agent_1", count)
            append(database, two, "agent_2", 20)
            sizes.append(database.seal_and_sign(key)[0])
        unsealed = append(database, one, "agent_1", 6)
        ids = database.run(
            "postgres",
            "select id from kakunin_private.batches, unnest(event_ids) with ordinality u(id, n)"
            " order by first_index + n",
        )
        with database.connect("auditor") as auditor:
            heads = tree_heads(auditor)
        assert sizes[-1] > 256
        yield Original(database, sizes, [row[0] for row in ids], unsealed, heads, key, ids_of_one[0])


class Tampered:
    """A copy, for a superuser to change."""

    def __init__(self, original: Original, database: Database) -> None:
        self.original = original
        self.database = database

    def sql(self, *statements: str) -> None:
        with self.database.connect("postgres") as connection:
            for statement in statements:
                connection.execute(statement.encode())

    @property
    def names(self) -> dict[str, Any]:
        o = self.original
        first, second, last = o.sizes
        return {
            "ledger": "kakunin_private.ledger",
            "first": o.leaves[0], "middle": o.leaves[100], "next": o.leaves[101], "last": o.leaves[-1],
            "unsealed": o.unsealed[2], "tail": o.unsealed[-1],
            "size1": first, "size2": second, "size3": last,
        }  # fmt: skip

    def verify(self, witnesses: Sequence[TreeHead] = ()) -> Report:
        with self.database.connect("auditor", autocommit=True) as auditor:
            return verify_database(auditor, [_ca().certificate], witnesses=witnesses)[0]

    def bundle(self) -> list[bytes]:
        with self.database.connect("auditor", autocommit=True) as auditor:
            return list(bundle_lines(auditor))

    def verify_bundle(self, witnesses: Sequence[TreeHead] = ()) -> Report:
        return verify_bundle(self.bundle(), [_ca().certificate], witnesses=witnesses)


def unguard(database: Database) -> None:
    """What `session_replication_role` does not do: these triggers are ALWAYS. Foreign keys go with them."""
    with database.connect("postgres") as connection:
        tables = connection.execute(
            "select oid::regclass::text from pg_class where relnamespace = 'kakunin_private'::regnamespace"
            " and relkind in ('r', 'p')"
        ).fetchall()
        for (table,) in tables:
            connection.execute(f"alter table {table} disable trigger all")


@pytest.fixture(scope="module")
def copied(cluster: Cluster, original: Original) -> Iterator[Tampered]:
    with fresh_database(cluster, original.database.name) as database:
        unguard(database)
        with database.connect("postgres") as connection:
            # It stands for the original, that somebody has changed.
            connection.execute(
                "update kakunin_private.home set database ="
                " (select oid from pg_database where datname = current_database())"
            )
            connection.execute("create schema kept")
            for table in TABLES:
                connection.execute(f"create table kept.{table} as table kakunin_private.{table}")
        yield Tampered(original, database)


@pytest.fixture
def tampered(copied: Tampered) -> Iterator[Tampered]:
    """A copy; afterwards it is as it was."""
    yield copied
    with copied.database.connect("postgres") as connection:
        for table in reversed(TABLES):
            connection.execute(f"delete from kakunin_private.{table}")
        for table in TABLES:
            connection.execute(
                f"insert into kakunin_private.{table} overriding system value table kept.{table}"
            )


# For str.format: ids of the events at 0, 100, 101 and the end, and of two that are not sealed.
EDIT = "update {ledger} set entry = replace(entry, 'api_call', 'api_cal1') where event_id = "
LEAF = (
    "update kakunin_private.batches set leaf_hashes = overlay(leaf_hashes placing {hash}"
    " from (100 - first_index)::integer * 32 + 1) where tree_size = {size2}"
)
COPY = (
    "insert into {ledger} select 900000, recorded_at, agent_id, {xid},"
    " replace(entry, '\"event_id\":{middle},', '\"event_id\":900000,') from {ledger} where event_id = {middle}"
)
OTHERS = "case {of} when {middle} then {next} when {next} then {middle} else {of} end"
REORDERED = (
    "event_ids = (select array_agg(" + OTHERS.replace("{of}", "x") + " order by n)"
    " from unnest(event_ids) with ordinality u(x, n))"
)
HASHES_TOO = (
    "leaf_hashes = overlay(overlay(leaf_hashes"
    " placing substr(leaf_hashes, (101 - first_index)::integer * 32 + 1, 32)"
    "  from (100 - first_index)::integer * 32 + 1)"
    " placing substr(leaf_hashes, (100 - first_index)::integer * 32 + 1, 32)"
    "  from (101 - first_index)::integer * 32 + 1)"
)
BOTH = " where event_id in ({middle}, {next})"

# Statements; then kind, index and event of the first thing found: a name of an event, or None. What is found
# in the bundle as well, or nothing there: what was never exported, or is not in a bundle.
Expected = tuple[str, int | str, int | str | None]
CASES: dict[str, tuple[list[str], Expected, bool]] = {
    "entry-first": (["update {ledger} set entry = replace(entry, '{{', '{{ ') where event_id = {first}"],
                    ("altered", 0, None), True),
    "entry-middle": ([EDIT + "{middle}"], ("altered", 100, "middle"), True),
    "entry-last": ([EDIT + "{last}"], ("altered", "end", "last"), True),
    "entry-no-json": (["update {ledger} set entry = 'x' where event_id = {middle}"],
                      ("altered", 100, None), True),
    "entry-two-lines": (["update {ledger} set entry = entry || E'\\n' || entry where event_id = {middle}"],
                        ("altered", 100, None), True),
    "entry-of-megabytes": (["update {ledger} set entry = replace(entry, '\"n\"', '\"' || repeat('n', 2000000) || '\"')"
                            " where event_id = {middle}"], ("truncated", 100, None), True),
    "entry-of-other-types": (["update {ledger} set entry = regexp_replace(entry, '(\"recorded_at\":)\"[^\"]*\"', '\\1 5')"
                              " where event_id = {middle}"], ("altered", 100, None), True),
    "entry-sequence-a-text": (["update {ledger} set entry = regexp_replace(entry, '(\"sequence\":)([0-9]+)', '\\1\"\\2\"')"
                               " where event_id = {last}"], ("altered", "end", None), True),
    "unsealed-entry": ([EDIT + "{unsealed}"], ("altered", "end+1", "after-unsealed"), False),
    "unsealed-entry-newest": ([EDIT + "{tail}"], ("altered", "end+1", "tail"), False),
    "unsealed-entry-no-json": (["update {ledger} set entry = '[]' where event_id = {unsealed}"],
                               ("malformed", "end+1", "unsealed"), False),
    "unsealed-entry-of-other-types": (
        ["update {ledger} set entry = regexp_replace(entry, '(\"recorded_at\":)\"[^\"]*\"', '\\1 5')"
         " where event_id = {unsealed}"], ("malformed", "end+1", "unsealed"), False),
    "column-agent": (["update {ledger} set agent_id = gen_random_uuid() where event_id = {middle}"],
                     ("altered", 100, "middle"), False),
    "column-agent-null": (["update {ledger} set agent_id = null where event_id = {middle}"],
                          ("altered", 100, "middle"), False),
    "column-time": (["update {ledger} set recorded_at = recorded_at + interval '1 microsecond'"
                     " where event_id = {middle}"], ("altered", 100, "middle"), False),
    "column-event-id": (["update {ledger} set event_id = 900000 where event_id = {middle}"],
                        ("missing", 100, None), True),
    "column-xid-later": (["update {ledger} set xid = pg_current_xact_id() where event_id = {middle}"],
                         ("altered", "end+1", "middle"), False),
    "unsealed-column-agent": (["update {ledger} set agent_id = gen_random_uuid() where event_id = {unsealed}"],
                              ("altered", "end+1", "unsealed"), False),
    "unsealed-column-xid-earlier": (["update {ledger} set xid = '3' where event_id = {unsealed}"],
                                    ("inserted", "end+1", "unsealed"), False),
    "deleted": (["delete from {ledger} where event_id = {middle}"], ("missing", 100, None), True),
    "deleted-last": (["delete from {ledger} where event_id = {last}"], ("missing", "end", None), True),
    "unsealed-deleted": (["delete from {ledger} where event_id = {unsealed}"],
                         ("altered", "end+1", "after-unsealed"), False),
    "unsealed-deleted-newest": (["delete from {ledger} where event_id = {tail}"],
                                ("missing", "end+1", None), False),
    "unsealed-deleted-all": (["delete from {ledger} where event_id > {last}"],
                             ("missing", "end+1", None), False),
    "inserted-with-old-xid": ([COPY.replace("{xid}", "xid")], ("inserted", "end+1", 900000), False),
    "inserted-with-new-xid": ([COPY.replace("{xid}", "pg_current_xact_id()")],
                              ("altered", "end+1", 900000), False),
    "inserted-with-an-id-that-is": (
        ["insert into {ledger} select event_id, recorded_at + interval '1 second', agent_id, xid, entry"
         " from {ledger} where event_id = {middle}"], ("inserted", 101, "middle"), True),
    "inserted-other-with-an-id-that-is": (
        ["insert into {ledger} select event_id, recorded_at + interval '1 second', agent_id, xid,"
         " replace(entry, 'api_call', 'api_cal1') from {ledger} where event_id = {middle}"],
        ("inserted", 101, "middle"), True),
    "swapped-entries": (["update {ledger} l set entry = (select m.entry from {ledger} m where m.event_id = "
                         + OTHERS.replace("{of}", "l.event_id") + ")" + BOTH], ("reordered", 100, "next"), True),
    "swapped-ids": (["update {ledger} set event_id = " + OTHERS.replace("{of}", "event_id") + BOTH],
                    ("reordered", 100, "next"), True),
    "reordered-leaves": (["update kakunin_private.batches set " + REORDERED + " where tree_size = {size2}"],
                         ("reordered", 100, "next"), True),
    "reordered-leaves-and-hashes": (["update kakunin_private.batches set " + REORDERED + ", " + HASHES_TOO
                                     + " where tree_size = {size2}"], ("reordered", 100, "next"), True),
    "truncated-entries": (["delete from {ledger} where event_id >= {next}"], ("missing", 101, None), True),
    "truncated-all": (["delete from {ledger}"], ("missing", 0, None), True),
    "leaf": ([LEAF.replace("{hash}", "sha256('x')")], ("malformed", 100, "middle"), True),
    "leaf-and-entry": ([EDIT + "{middle}", LEAF.replace("{hash}",
                        "(select kakunin_private.leaf_hash(entry) from {ledger} where event_id = {middle})")],
                       ("altered", 100, "middle"), True),
    "batch-gone": (["delete from kakunin_private.batches where tree_size = {size2}"],
                   ("missing", "size1", None), True),
    "batch-gone-last": (["delete from kakunin_private.batches where tree_size = {size3}"],
                        ("missing", "size2", None), True),
    "head-root": (["update kakunin_private.tree_heads set root = sha256('x') where tree_size = {size2}"],
                  ("signature_false", "size2", None), True),
    "head-signature": (["update kakunin_private.tree_heads set signature ="
                        " set_byte(signature, 100, 255 - get_byte(signature, 100)) where tree_size = {size2}"],
                       ("signature_false", "size2", None), True),
    "head-size": (["update kakunin_private.tree_heads set tree_size = tree_size - 1 where tree_size = {size2}"],
                  ("signature_false", "size2-1", None), True),
    "head-time": (["update kakunin_private.tree_heads set timestamp = timestamp - 1 where tree_size = {size2}"],
                  ("signature_false", "size2", None), True),
    "tree-size": (["update kakunin_private.tree set tree_size = tree_size + 1"], ("missing", "size3", None), False),
    "tree-begun-anew": (["update kakunin_private.tree set sealed = null"], ("altered", "end+1", 1), False),
    "chain-hash": (["update kakunin_private.chains set head = sha256('x') where sequence > 100"],
                   ("altered", "end+1", "tail"), False),
    "chain-sequence": (["update kakunin_private.chains set sequence = sequence + 1 where sequence > 100"],
                       ("missing", "end+1", None), False),
    "chain-put-back": (["update kakunin_private.chains set sequence = sequence - 1 where sequence > 100"],
                       ("inserted", "end+1", "tail"), False),
    "chain-gone": (["delete from kakunin_private.chains where sequence > 100"],
                   ("missing", "end+1", "tail"), False),
    "ledger-key-another": (["update kakunin_private.ledger_keys set der ="
                            " (select der from kakunin_private.authorities limit 1)"],
                           ("untrusted_key", 0, None), True),
    "ledger-key-junk": (["update kakunin_private.ledger_keys set der = 'x'"],
                        ("untrusted_key", "size1", None), True),
    "ledger-key-of-another": (["update kakunin_private.ledger_keys set installation_id = gen_random_uuid()"],
                              ("untrusted_key", 0, None), True),
    "certificate-another": (["update kakunin_private.certificates set der ="
                             " (select der from kakunin_private.authorities limit 1)"],
                            ("certificate_false", 0, None), True),
    "certificate-junk": (["update kakunin_private.certificates set der = 'x'"],
                         ("certificate_false", "one", "one"), True),
    "certificate-gone": (["delete from kakunin_private.certificates"], ("certificate_false", "one", "one"), True),
}  # fmt: skip


def first_wrong(report: Report) -> tuple[str, int, int | None]:
    found = report.findings[0]
    return found.kind, found.index, found.event_id


@pytest.mark.parametrize("case", CASES)
def test_g5_a_change_is_found_and_located(tampered: Tampered, case: str) -> None:
    statements, (kind, index, event), exported = CASES[case]
    tampered.sql(*(statement.format(**tampered.names) for statement in statements))
    o = tampered.original
    one = next(i for i, event_id in enumerate(o.leaves) if event_id == o.agents_first)
    places = {
        "end": len(o.leaves) - 1, "end+1": len(o.leaves), "size1": o.sizes[0], "size2": o.sizes[1],
        "size2-1": o.sizes[1] - 1, "size3": o.sizes[2], "one": one,
    }  # fmt: skip
    names = {**tampered.names, "after-unsealed": o.unsealed[3], "one": o.agents_first}
    expected = (
        kind,
        places[index] if isinstance(index, str) else index,
        names[event] if isinstance(event, str) else event,
    )
    report = tampered.verify()
    assert not report.ok
    assert first_wrong(report) == expected, report.findings[:3]
    assert report.count >= len(report.findings)
    bundle = tampered.verify_bundle()
    assert bundle.ok is not exported, bundle.findings[:3]
    if exported:
        assert first_wrong(bundle) == expected, bundle.findings[:3]


def test_g5_nothing_was_changed(tampered: Tampered) -> None:
    """What the other tests compare with; and after each of them it is so again."""
    heads = tampered.original.heads
    for report in (tampered.verify(heads), tampered.verify_bundle(heads)):
        assert report.ok, report.findings
        assert (report.tree_size, report.heads) == (tampered.original.sizes[-1], 3)


def test_g5_an_entry_of_a_full_list_twice(tampered: Tampered, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more than a leaves/1 may have."""
    monkeypatch.setattr("kakunin_db.ledger.export.MAX_LEAVES", 10)
    monkeypatch.setattr("kakunin_db.ledger.bundle.MAX_LEAVES", 10)
    tampered.sql(
        "insert into kakunin_private.ledger select event_id, recorded_at + interval '1 second', agent_id, xid,"
        f" entry from kakunin_private.ledger where event_id = {tampered.names['middle']}"
    )
    assert first_wrong(tampered.verify()) == ("inserted", 101, tampered.names["middle"])


# The end cut off --------------------------------------------------------------------------------------


def cut(tampered: Tampered) -> None:
    """Everything past the second tree head is gone, and all there is agrees about it."""
    names = tampered.names
    tampered.sql(
        f"delete from kakunin_private.tree_heads where tree_size > {names['size2']}",
        f"delete from kakunin_private.batches where tree_size > {names['size2']}",
        "delete from kakunin_private.ledger l where not exists"
        " (select from kakunin_private.batches b where l.event_id = any (b.event_ids))",
        f"update kakunin_private.tree set tree_size = {names['size2']}",
        "delete from kakunin_private.chains c where not exists (select from kakunin_private.ledger l"
        " where (l.entry::jsonb ->> 'chain')::bigint = c.chain_id)",
        "update kakunin_private.chains c set sequence = e.sequence, head = e.hash from ("
        " select distinct on (chain) (entry::jsonb ->> 'chain')::bigint as chain,"
        "  (entry::jsonb ->> 'sequence')::bigint as sequence, kakunin_private.leaf_hash(entry) as hash"
        " from kakunin_private.ledger order by chain, sequence desc) e where e.chain = c.chain_id",
    )


def test_g5_a_tail_cut_off_is_the_witness_s_to_tell(tampered: Tampered) -> None:
    cut(tampered)
    second, last = tampered.original.sizes[1:]
    for verify in (tampered.verify, tampered.verify_bundle):
        assert verify().ok, "nobody can tell without a witness"
        assert verify(tampered.original.heads[:2]).ok
        report = verify(tampered.original.heads)
        assert first_wrong(report) == ("truncated", second, None)
        assert f"over {last} entries" in report.findings[0].message


def test_g5_the_last_head_taken_away_is_the_witness_s_to_tell(tampered: Tampered) -> None:
    tampered.sql(f"delete from kakunin_private.tree_heads where tree_size = {tampered.names['size3']}")
    for verify in (tampered.verify, tampered.verify_bundle):
        assert verify().ok
        assert first_wrong(verify(tampered.original.heads))[0] == "truncated"


@pytest.mark.parametrize("table", ["tree_heads", "ledger_keys"])
def test_g5_no_head_is_left(tampered: Tampered, table: str) -> None:
    tampered.sql(f"delete from kakunin_private.{table}")
    for verify in (tampered.verify, tampered.verify_bundle):
        with pytest.raises(BadInputError, match="no signed tree head"):
            verify()


def test_g5_sealed_and_not_signed(tampered: Tampered) -> None:
    """Entries past the last head: the chains tell, and the hash in the batch."""
    sizes = tampered.original.sizes
    head = f"delete from kakunin_private.tree_heads where tree_size = {sizes[2]}"
    gone = tampered.original.leaves[sizes[1] + 5]
    tampered.sql(head, f"delete from kakunin_private.ledger where event_id = {gone}")
    assert first_wrong(tampered.verify()) == ("missing", sizes[1] + 5, gone)


def test_g5_rewritten_and_signed_by_whoever_has_the_key(tampered: Tampered) -> None:
    """A ledger made anew, with a tree, chains and a signature that all agree: the witness has another head."""
    o = tampered.original
    cut(tampered)
    # Signed by the ledger's own key, over what is left and another root: as a stolen key would.
    root = b"\1" * 32
    timestamp = o.heads[1].timestamp
    signature = o.key.sign(o.sizes[1], timestamp, root)
    with tampered.database.connect("postgres") as connection:
        connection.execute(
            "update kakunin_private.tree_heads set root = %s, signature = %s where tree_size = %s",
            [root, signature, o.sizes[1]],
        )
    report = tampered.verify()
    assert first_wrong(report)[:2] == ("altered", o.sizes[0])
    forged = TreeHead(o.database.installation_id, o.sizes[1], timestamp, root, o.key.key_id, signature)
    report = tampered.verify([forged])
    assert "tree_head_forked" in [found.kind for found in report.findings]


def test_g5_the_roots_of_another(tampered: Tampered) -> None:
    """A superuser may pin another authority, and have it certify another key: not who verifies."""
    other = CertificateAuthority.create(LocalSigner.generate(), "Other")
    with tampered.database.connect("auditor", autocommit=True) as auditor:
        report, _ = verify_database(auditor, [other.certificate])
    assert report.findings[0].kind == "untrusted_key"
    assert report.heads == 0


def test_g5_a_partition_detached(cluster: Cluster, original: Original) -> None:
    with fresh_database(cluster, original.database.name) as database:
        copy = Tampered(original, database)
        unguard(database)
        (partition,) = {
            row[0]
            for row in database.run("postgres", "select tableoid::regclass::text from kakunin_private.ledger")
        }
        copy.sql(f"alter table kakunin_private.ledger detach partition {partition}")
        for report in (copy.verify(), copy.verify_bundle()):
            assert first_wrong(report) == ("missing", 0, None)
            assert report.count >= len(original.leaves)


# Not seen by what is signed, and harmless -------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "update kakunin_private.tree_nodes set hash = sha256('x')",
        "update kakunin_private.tree set frontier = (select array_agg(case when f is not null then"
        " sha256('x') end order by n) from unnest(frontier) with ordinality u(f, n))",
    ],
    ids=["nodes", "edge"],
)
def test_g5_what_proofs_are_made_of(tampered: Tampered, change: str) -> None:
    """Inner nodes are kept for speed: with false ones proofs fail, and no worker signs what comes next."""
    sizes = tampered.original.sizes
    tampered.sql(change)
    tampered.database.seal()
    worker = Worker(tampered.database.dsn("worker"), OneKey(tampered.original.key))
    thread = threading.Thread(target=worker.run)
    thread.start()
    for _ in range(300):
        if worker.metrics.errors["integrity"]:
            break
        time.sleep(0.1)
    worker.stop()
    thread.join()
    assert worker.metrics.errors["integrity"]
    assert (
        tampered.database.value("postgres", "select max(tree_size) from kakunin_private.tree_heads")
        == sizes[2]
    )
