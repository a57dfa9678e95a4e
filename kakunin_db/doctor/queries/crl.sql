select 'authority ' || a.key_id as object,
       case when l.next_update <= clock_timestamp() then format('its revocation list was good until %s', date_trunc('second', l.next_update))
            when l.key_id is null then format('it has revoked %s and published no list', r.revoked)
            else 'its revocation list leaves a revocation out' end as reason,
       'kakunin-db crl' as command
  from kakunin.crls_due() d
  join kakunin.authorities a on a.key_id = d.key_id
  left join kakunin.crls l on l.key_id = d.key_id
  cross join lateral (select count(*) as revoked, max(x.revoked_at) as latest from kakunin.certificates x
                       where x.issuer_key_id = a.key_id and x.revoked_at < clock_timestamp() - interval '10 minutes'
                         and x.not_after > clock_timestamp()) r
 where l.next_update <= clock_timestamp()
    or l.key_id is null and r.revoked > 0
    or r.latest > l.this_update
