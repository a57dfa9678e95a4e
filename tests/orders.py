"""Two agents, and tables of a Supabase project that both have rows in."""

from __future__ import annotations

from conftest import Database
from postgrest_server import PostgREST

TABLES = """
create table orders (
  id bigint generated always as identity primary key,
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  content text not null unique);
create index on orders (permitted_agent_serial);
create table items (
  id bigint generated always as identity primary key,
  order_id bigint not null references orders on delete cascade,
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  content text not null);
select kakunin.protect('orders', roles => '{kakunin_agent,authenticated}');
select kakunin.protect('items', roles => '{kakunin_agent,authenticated}');
grant select, insert, update, delete on orders, items to kakunin_agent, anon, authenticated;
create function run_sql(query text) returns json language plpgsql as $$
declare answer json; begin execute query into answer; return answer; end $$;
create function count_orders() returns bigint language sql as 'select count(*) from orders';
revoke execute on function run_sql(text), count_orders() from public;
grant execute on function run_sql(text), count_orders() to kakunin_agent;
"""


def create_tables(database: Database, rest: PostgREST) -> None:
    with database.cluster.session(database.name, "app") as app:
        app.execute(TABLES)
    rest.reload()


class Tables:
    """Tables `orders` and `items` under protect(), two rows each of two agents, and functions beside them."""

    def __init__(self, database: Database, rest: PostgREST) -> None:
        self.database = database
        self.rest = rest
        self.one = database.agent("one", permitted_actions=["orders:read", "orders:write"])
        self.two = database.agent("two", permitted_actions=["orders:read"])
        with database.cluster.session(database.name, "app") as app:
            app.execute("truncate orders, items")
            for agent in (self.one, self.two):
                name = "one" if agent is self.one else "two"
                for suffix in "ab":
                    app.execute(
                        "with o as (insert into orders (permitted_agent_serial, content) values (%s, %s)"
                        " returning id) insert into items (order_id, permitted_agent_serial, content)"
                        " select id, %s, %s from o",
                        [agent.serial, f"{name}-{suffix}", agent.serial, f"{name}-{suffix} item"],
                    )

    @property
    def contents(self) -> list[str]:
        return [row[0] for row in self.database.run("app", "select content from orders order by id")]
