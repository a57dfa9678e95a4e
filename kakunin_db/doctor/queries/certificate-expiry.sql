-- What lives for days only is renewed in its last fifth.
select 'certificate ' || c.serial as object,
       format('of agent %s (%s): it expires at %s, and there is none after it', c.agent_id, a.name, date_trunc('second', c.not_after)) as reason,
       'kakunin-db agent rotate ' || c.agent_id as command
  from kakunin.certificates c join kakunin.agents a on a.agent_id = c.agent_id
 where c.revoked_at is null and a.suspended_at is null and c.not_after > clock_timestamp()
   and c.not_after < clock_timestamp() + least(interval '7 days', (c.not_after - c.not_before) / 5)
   and not exists (select from kakunin.certificates n
                    where n.agent_id = c.agent_id and n.revoked_at is null and n.not_after > c.not_after)
