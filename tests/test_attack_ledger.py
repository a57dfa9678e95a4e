"""Attacks on the ledger, as the logins that would make them, with any SQL they like."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import Any

import psycopg
import pytest
from conftest import Database, Vault, fresh_database

from kakunin_db import bind_agent_session
from kakunin_db.errors import named


@pytest.fixture
def audited(vault: Vault) -> Vault:
    vault.database.run("app", "select kakunin.protect('vault', audit => true)")
    return vault


def entries(database: Database, kind: str) -> list[dict[str, Any]]:
    query = "select entry from kakunin.audit_log where event_type = %s order by event_id"
    return [json.loads(row[0]) for row in database.run("auditor", query, [kind])]


def test_g5_many_at_once_fork_no_chain(cluster: Any) -> None:
    """Whoever continues a chain continues its newest entry, also one newer than the snapshot."""
    with fresh_database(cluster) as database:
        agent = database.agent()
        ready = threading.Barrier(6)

        def write() -> None:
            with database.connect("agent_1", autocommit=True) as session:
                ready.wait()
                for _ in range(60):
                    with bind_agent_session(session, agent.credential):
                        session.execute("select kakunin.audit_log_append('api_call')")

        writers = [threading.Thread(target=write) for _ in range(6)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        made = entries(database, "api_call")
        assert len(made) == 360
        assert set(Counter((e["chain"], e["sequence"]) for e in made).values()) == {1}
        by_place = {(e["chain"], e["sequence"]): e for e in made}
        for (chain, sequence), entry in by_place.items():
            if sequence > 1:
                assert by_place[chain, sequence - 1]["event_id"] < entry["event_id"]
        assert database.value("postgres", "select count(*) from kakunin_private.chains") <= 8


@pytest.mark.parametrize(
    "unbind",
    [
        "set_config('kakunin.session', '', false)",
        "(select kakunin.unbind_session())::text",
    ],
)
def test_g6_an_agent_cannot_change_an_audited_table_as_nobody(audited: Vault, unbind: str) -> None:
    database = audited.database
    before = database.run("app", "select * from vault order by id")
    with database.connect("agent_1") as session:
        with bind_agent_session(session, audited.one.credential), pytest.raises(psycopg.Error) as caught:
            session.execute(f"update vault set content = 'mine' returning {unbind}".encode())
        session.rollback()
    error = named(caught.value) or caught.value
    assert error.sqlstate == "KA004"
    assert database.run("app", "select * from vault order by id") == before
    assert entries(database, "table.update") == []


def test_g6_a_revocation_in_the_midst_of_a_statement_stops_it(audited: Vault) -> None:
    database = audited.database
    with database.connect("agent_1") as session:
        with bind_agent_session(session, audited.one.credential), pytest.raises(psycopg.Error) as caught:
            begun = threading.Timer(0.5, audited.one.revoke)
            begun.start()
            session.execute("update vault set content = 'mine' from pg_sleep(2)")
        session.rollback()
        begun.join()
    error = named(caught.value) or caught.value
    assert error.sqlstate == "KA002"


def test_g4_the_trigger_of_audit_runs_no_code_of_a_tables_owner(database: Database) -> None:
    """Without its transition table the name would be anybody's: a view with a function in it."""
    with database.connect("operator") as attacker:
        attacker.execute("create table mine (a int)")
        attacker.execute(
            "create function evil() returns boolean language plpgsql as"
            " $$begin raise exception 'evil as %', current_user; end$$"
        )
        attacker.execute("create temp view kakunin_rows as select 1 as a where public.evil()")
        attacker.execute("grant select on kakunin_rows to public")
        attacker.execute(
            "create trigger t after insert on mine for each statement"
            " execute function kakunin.record_changes()"
        )
        with pytest.raises(psycopg.Error) as caught:
            attacker.execute("insert into mine values (1)")
    assert caught.value.sqlstate == "KA010"


def test_g4_keys_are_written_without_casts_that_somebody_made(database: Database) -> None:
    with database.connect("app") as owner:
        owner.execute("create type odd as (x int)")
        owner.execute(
            "create function evil_text(odd) returns text language plpgsql as"
            " $$begin raise exception 'evil as %', current_user; end$$"
        )
        owner.execute("create cast (odd as text) with function evil_text(odd) as implicit")
        owner.execute("create table odd_keys (k odd primary key, permitted_agent_serial text)")
        owner.execute("select kakunin.protect('odd_keys', audit_keys => true)")
        owner.execute("insert into odd_keys values (row(7), null)")
        owner.commit()
    assert entries(database, "table.insert")[-1]["metadata"]["keys"] == [["(7)"]]


def test_g6_what_keys_read_as_is_not_up_to_the_session(database: Database) -> None:
    database.run("app", "create table dated (d date primary key, permitted_agent_serial text)")
    database.run("app", "select kakunin.protect('dated', audit_keys => true)")
    with database.connect("app", autocommit=True) as owner:
        owner.execute("set datestyle = 'SQL, DMY'; set quote_all_identifiers = on")
        owner.execute("insert into dated values ('2026-02-01')")
    metadata = entries(database, "table.insert")[-1]["metadata"]
    assert (metadata["keys"], metadata["table"]) == ([["2026-02-01"]], "public.dated")


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_g3_no_open_transaction_of_an_agent_holds_up_a_halt(audited: Vault, isolation: str) -> None:
    database = audited.database
    with database.connect("agent_1") as session, database.connect("operator") as operator:
        operator.execute(f"set transaction isolation level {isolation}".encode())
        operator.execute("select 1")
        with bind_agent_session(session, audited.one.credential):
            session.execute("select kakunin.audit_log_append('api_call')")
            session.execute("update vault set content = 'mine'")
            # Other decisions come between.
            database.agent()
            operator.execute("set lock_timeout = '2s'")
            operator.execute("select kakunin.halt_agent(%s, 'why')", [audited.one.agent_id])
            operator.commit()
            session.rollback()
    assert entries(database, "agent.halted")[-1]["agent_id"] == str(audited.one.agent_id)


def test_g6_a_root_that_may_still_be_undone_is_not_signed(cluster: Any) -> None:
    with fresh_database(cluster) as database, database.connect("worker") as worker:
        key = database.ledger_key()
        database.agent()
        worker.execute("select kakunin.seal_ledger()")
        assert worker.execute("select * from kakunin.tree_head_to_sign()").fetchone() is None
        worker.rollback()
        assert database.seal_and_sign(key)[0] > 0


@pytest.mark.parametrize(
    ("metadata", "state"),
    [("[" * 65 + "]" * 65, "KA010"), ("[" * 64 + "]" * 64, None), (f'["{"[" * 500}"]', None)],
    ids=["65", "64", "in a text"],
)
def test_g8_metadata_that_readers_choke_on_is_refused(vault: Vault, metadata: str, state: str | None) -> None:
    with vault.database.connect("agent_1") as session, bind_agent_session(session, vault.one.credential):
        if state is None:
            session.execute("select kakunin.audit_log_append('x', %s)", [metadata])
        else:
            with pytest.raises(psycopg.Error) as caught:
                session.execute("select kakunin.audit_log_append('x', %s)", [metadata])
            error = named(caught.value) or caught.value
            assert error.sqlstate == state
            session.rollback()
