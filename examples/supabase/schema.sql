-- The article's table, for a project that has the kit: docs/supabase.md. An agent's requests have the role
-- kakunin_agent, so that is what the table is granted to.

create table agent_vault (
  id                     bigint generated always as identity primary key,
  permitted_agent_serial text collate "C" not null default kakunin.current_cert_serial(),
  content                text not null
);
create index on agent_vault (permitted_agent_serial);

select kakunin.protect('agent_vault');

grant select, insert, update, delete on agent_vault to kakunin_agent;
