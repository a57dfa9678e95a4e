-- Those that certify: an authority that has another one below it does not.
select max(a.not_after) as until, clock_timestamp() as now, count(*) as present,
       (select a.key_id from kakunin.authorities a order by a.not_after desc limit 1) as key_id
  from kakunin.authorities a
 where a.distrusted_at is null
   and not exists (select from kakunin.authorities b
                    where b.issuer_key_id = a.key_id and b.key_id <> a.key_id and b.distrusted_at is null)
