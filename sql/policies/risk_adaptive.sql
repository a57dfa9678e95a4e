-- risk_adaptive: read-only from high. While an agent's risk is high it reads its rows and writes none (KA011); its score
-- falls by itself, or an operator looks at it. From critical on it is revoked and reads nothing either.
-- Runs as it stands, in a database with the kit and a schema to create in: psql -f risk_adaptive.sql

begin;

create table agent_notes (
  id                     bigint generated always as identity primary key,
  -- The default is for agents; whoever else inserts names the serial.
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  content                text not null
);
create index on agent_notes (permitted_agent_serial);

alter table agent_notes enable row level security;

create policy agent_notes_isolation on agent_notes
  for all to kakunin_agent, kakunin_gateway
  using (permitted_agent_serial = (select kakunin.current_cert_serial()))
  with check (permitted_agent_serial = (select kakunin.current_cert_serial()));

-- Once a statement. They are for public, because a member of a role can take that role out of policies (DROP OWNED BY).
-- To see what they would refuse before they do: require_risk_below('high', observe => true).
create policy agent_notes_insert_risk on agent_notes as restrictive
  for insert to public
  with check ((select kakunin.require_risk_below('high')));
create policy agent_notes_update_risk on agent_notes as restrictive
  for update to public
  using ((select kakunin.require_risk_below('high')));
create policy agent_notes_delete_risk on agent_notes as restrictive
  for delete to public
  using ((select kakunin.require_risk_below('high')));

grant select, insert, update, delete on agent_notes to kakunin_agent, kakunin_gateway;

commit;
