-- spend_limits: an agent orders within the limits of its certificate: max_single_trade_usd, daily_limit_usd and
-- permitted_venues of its signed financial scope. Whoever owns the table cannot raise them, only the authority can, by
-- another certificate. Runs as it stands, in a database with the kit and a schema to create in: psql -f spend_limits.sql

begin;

create table agent_trades (
  id                     bigint generated always as identity primary key,
  -- The default is for agents; whoever else inserts names the serial.
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  amount_usd             numeric not null,
  venue                  text not null
);
create index on agent_trades (permitted_agent_serial);

alter table agent_trades enable row level security;

create policy agent_trades_isolation on agent_trades
  for all to kakunin_agent, kakunin_gateway
  using (permitted_agent_serial = (select kakunin.current_cert_serial()))
  with check (permitted_agent_serial = (select kakunin.current_cert_serial()));

-- Once a row, and not (select ...): each one counts towards the day. KA009 where a limit is passed. To see what it would
-- refuse before it does: observe => true.
create policy agent_trades_spend on agent_trades as restrictive
  for insert to public
  with check (kakunin.require_spend(amount_usd, venue));

-- No UPDATE: an order that is changed would be spent at its first amount.
grant select, insert on agent_trades to kakunin_agent, kakunin_gateway;

commit;
