-- PostgREST calls kakunin.pre_request() before each request. Where that cannot be set, nothing else may be believed
-- in its place: agents have no rows until it is.
do $hook$
declare
  v_present text;
begin
  select substr(c.setting, 22) into v_present
    from pg_db_role_setting s, unnest(s.setconfig) c(setting)
   where s.setrole = 'authenticator'::regrole
     and s.setdatabase in (0, (select d.oid from pg_database d where d.datname = current_database()))
     and starts_with(c.setting, 'pgrst.db_pre_request=')
   order by s.setdatabase desc limit 1;
  if v_present <> '' and v_present <> 'kakunin.pre_request' then
    raise warning using
      message = format('PostgREST calls %s before each request already, and agents have no rows until that calls kakunin.pre_request()', v_present),
      hint = 'Add to it: perform kakunin.pre_request();';
    return;
  end if;
  alter role authenticator set pgrst.db_pre_request = 'kakunin.pre_request';
exception when insufficient_privilege then
  raise warning using
    message = format('%I may not configure PostgREST''s login, and agents have no rows until somebody does', current_user),
    hint = 'Have run: alter role authenticator set pgrst.db_pre_request = ''kakunin.pre_request''; notify pgrst, ''reload config'';';
end
$hook$;
notify pgrst, 'reload config';
notify pgrst, 'reload schema';
