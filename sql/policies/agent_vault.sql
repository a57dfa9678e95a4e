-- agent_vault: each agent sees and changes only its own rows. The isolation policy of the first article
-- about the product, in the form that cannot be forged; kakunin.protect('agent_vault') writes the same.
-- Runs as it stands, in a database with the kit and a schema to create in: psql -f agent_vault.sql

begin;

create table agent_vault (
  id                     bigint generated always as identity primary key,
  -- The default is for agents; whoever else inserts names the serial.
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  content                text not null
);
-- Every query of an agent filters by this column.
create index on agent_vault (permitted_agent_serial);

alter table agent_vault enable row level security;

-- (select ...) makes the planner ask once a statement instead of once a row.
create policy agent_vault_isolation on agent_vault
  for all to kakunin_agent, kakunin_gateway
  using (permitted_agent_serial = (select kakunin.current_cert_serial()))
  with check (permitted_agent_serial = (select kakunin.current_cert_serial()));

-- Not TRUNCATE, TRIGGER or REFERENCES: row security does not cover them.
grant select, insert, update, delete on agent_vault to kakunin_agent, kakunin_gateway;

commit;
