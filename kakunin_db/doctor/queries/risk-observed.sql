select 'risk settings' as object, 'mode is observe: scores and alerts go on, and nobody is refused or revoked' as reason,
       $$select kakunin.set_risk('{"mode": "enforce"}');$$ as sql
 where exists (select from pg_type t join pg_namespace n on n.oid = t.typnamespace
                where n.nspname = 'kakunin_private' and t.typname = 'risk observed')
