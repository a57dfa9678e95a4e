-- scope_gated_writes: each agent reads its own rows; only a certificate that permits 'orders:write' may
-- write them. kakunin.protect('agent_orders', write_scope => 'orders:write') writes the same.
-- Runs as it stands, in a database with the kit and a schema to create in: psql -f scope_gated_writes.sql

begin;

create table agent_orders (
  id                     bigint generated always as identity primary key,
  -- The default is for agents; whoever else inserts names the serial.
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  amount                 numeric not null check (amount > 0)
);
create index on agent_orders (permitted_agent_serial);

alter table agent_orders enable row level security;

create policy agent_orders_isolation on agent_orders
  for all to kakunin_agent, kakunin_gateway
  using (permitted_agent_serial = (select kakunin.current_cert_serial()))
  with check (permitted_agent_serial = (select kakunin.current_cert_serial()));

-- Restrictive policies only narrow. require_scope() raises KA005 where has_scope() would quietly let an
-- UPDATE or DELETE touch no row. An UPDATE policy also speaks for SELECT ... FOR UPDATE. They are for public,
-- because a member of a role can take that role out of policies (DROP OWNED BY).
create policy agent_orders_insert_scope on agent_orders as restrictive
  for insert to public
  with check ((select kakunin.require_scope('orders:write')));
create policy agent_orders_update_scope on agent_orders as restrictive
  for update to public
  using ((select kakunin.require_scope('orders:write')));
create policy agent_orders_delete_scope on agent_orders as restrictive
  for delete to public
  using ((select kakunin.require_scope('orders:write')));

grant select, insert, update, delete on agent_orders to kakunin_agent, kakunin_gateway;

commit;
