select unnest(array['current_setting(text)'::regprocedure, 'current_setting(text,boolean)'::regprocedure])::oid::bigint as oid
