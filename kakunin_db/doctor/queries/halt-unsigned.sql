select 'halt ' || h.halt_id as object, format('halted at %s, and the receipt is not signed', date_trunc('second', h.halted_at)) as reason,
       'kakunin-db crl' as command
  from kakunin.halts h where h.signed_at is null and h.halted_at < clock_timestamp() - interval '10 minutes'
