select 'session key ' || k.key_id as object, format('in use since %s', date_trunc('day', k.created_at)::date) as reason,
       'select kakunin.rotate_session_key();' as sql
  from kakunin_private.session_keys k where k.valid_until is null and k.created_at < clock_timestamp() - interval '90 days'
