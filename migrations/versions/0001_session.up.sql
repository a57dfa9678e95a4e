-- Foundation: schemas, roles, the installation and the clock.
--
-- Two schemas. `kakunin` is what others may call: functions and views, nothing else. `kakunin_private`
-- holds tables, keys and helpers; nobody but the owner has USAGE on it, so a function there can be
-- reached only from inside one of ours.
--
-- The owner is the login that installs. It needs CREATEROLE and CREATE on the database and is not
-- superuser. Functions that touch the private tables are SECURITY DEFINER and run as that owner, each
-- with `search_path = pg_catalog, pg_temp`. The order matters: with an empty path pg_temp is searched
-- first for types and tables, and a caller's `create temp table jsonb(...)` would change what `::jsonb`
-- means inside the function.
--
-- Six roles, none of which can log in. The DBA grants them to real logins:
--
--   kakunin_agent      an agent's own session: opens, binds, asks who it is
--   kakunin_gateway    trusted server code that has verified its caller and may bind by serial
--   kakunin_registrar  registers agents and certificates
--   kakunin_operator   suspends, revokes, rotates the session key, protects tables
--   kakunin_worker     the signer
--   kakunin_auditor    reads the ledger and its proofs
--
-- Roles belong to the cluster, not to the database: they may exist already (a second database with the
-- kit) and they are kept at uninstallation while anybody uses them.
--
-- Two more things a caller brings along. Text arguments come with the caller's collation, and a
-- nondeterministic one can make any two texts equal: columns that decide something are collate "C", and so
-- are the variables that are compared with them. Bodies of functions have no backslash outside
-- E'...': what it means elsewhere is up to the caller's standard_conforming_strings.
--
-- Errors carry their own SQLSTATEs, one class a cause (docs/errors.md, kakunin_db/errors.py):
--   KA001 unknown certificate       KA006 the ledger is append-only
--   KA002 certificate revoked       KA007 ledger integrity
--   KA003 outside its validity      KA008 agent suspended
--   KA004 assertion or ticket       KA009 spend limit
--   KA005 outside certified scope   KA010 bad input
--   KA011 risk too high             KA012 the standby is too far behind

-- The files of this folder are applied in name order in one transaction (psql -1, or `kakunin-db migrate`).
-- Names below resolve here and nowhere else, whatever search_path the installing session came with.
set local search_path = pg_catalog, pg_temp;

create schema if not exists kakunin_private;  -- may hold the migration's version table already
create schema kakunin;
comment on schema kakunin is 'kakunin-db: functions an application, an operator or a policy may call';
comment on schema kakunin_private is 'kakunin-db: tables, keys and helpers. No role but the owner has USAGE, on purpose';

do $roles$
declare
  v_role record;
begin
  for v_role in
    select * from (values
      ('kakunin_agent',     'an agent''s session: opens, binds, asks who it is'),
      ('kakunin_gateway',   'trusted server code that has verified its caller and may bind by serial'),
      ('kakunin_registrar', 'registers agents and certificates'),
      ('kakunin_operator',  'suspends, revokes, rotates the session key, protects tables'),
      ('kakunin_worker',    'the signer of the ledger'),
      ('kakunin_auditor',   'reads the ledger and its proofs')
    ) as r(name, purpose)
  loop
    -- Made beforehand, by a DBA for an installer without CREATEROLE or by another database's installation.
    continue when to_regrole(v_role.name) is not null;
    begin
      execute format('create role %I nologin', v_role.name);
      execute format('comment on role %I is %L', v_role.name, 'kakunin-db: ' || v_role.purpose);
    exception
      -- another database's installation makes the same role at this very moment
      when duplicate_object or unique_violation then null;
    end;
  end loop;
end
$roles$;

create table kakunin_private.installation (
  only_row        boolean primary key default true check (only_row),
  installation_id uuid not null default gen_random_uuid(),
  installed_at    timestamptz not null default now()
);
comment on table kakunin_private.installation is
  'One row. The id is the audience of assertions, so that one made for another database is refused here';
insert into kakunin_private.installation default values;

create function kakunin.installation_id() returns uuid
language plpgsql stable parallel safe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (select i.installation_id from kakunin_private.installation i);
end
$$;
comment on function kakunin.installation_id() is
  'This installation''s id. Assertions name it as their audience: kakunin:<installation id>. For all the kit''s roles';

-- Everything that asks for the time asks here, so that a test can move the clock by replacing one
-- function instead of sleeping. It is the wall clock, not the transaction's start: a certificate must
-- expire inside a long transaction too.
create function kakunin_private.clock() returns timestamptz
language sql volatile parallel safe
return clock_timestamp();
comment on function kakunin_private.clock() is 'The present time, for every check the kit makes';

-- A standby answers by what it has replayed, so a revocation that it has not got yet is none there. How far behind it is
-- says the newest commit it has replayed: everything committed on the primary before that is there. Nothing is
-- committed on an idle primary but the worker's lease, every two seconds, and that is enough of a heartbeat. A standby that
-- is cut off, paused or behind sees no commit, and is closed once the newest is older than max_lag, whatever
-- state it believes replication to be in.
create table kakunin_private.replicas (
  only_row boolean primary key default true check (only_row),
  max_lag  interval default '1 minute'
);
comment on table kakunin_private.replicas is 'How far behind a standby may be that answers agents';
comment on column kakunin_private.replicas.max_lag is 'Age of the newest commit it has replayed; NULL where any age will do';
insert into kakunin_private.replicas default values;

-- Asked only in recovery, and apart from what is inlined: on a primary a statement pays for pg_is_in_recovery() alone.
create function kakunin_private.replica_is_fresh() returns boolean
language plpgsql volatile parallel safe
as $$
begin
  return coalesce((select r.max_lag is null or pg_last_xact_replay_timestamp() > kakunin_private.clock() - r.max_lag
                     from kakunin_private.replicas r), false);
end
$$;
comment on function kakunin_private.replica_is_fresh() is
  'On a standby: whether what it has replayed is no older than the limit. False as well where it has replayed no commit since it started';

create function kakunin_private.check_replica() returns void
language plpgsql volatile parallel safe
as $$
begin
  if pg_is_in_recovery() and not kakunin_private.replica_is_fresh() then
    raise exception using errcode = 'KA012',
      message = format('this standby has replayed what was committed until %s, and is closed to agents when that is more than %s ago',
        coalesce(to_char(pg_last_xact_replay_timestamp() at time zone interval '0', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'), '(nothing yet)'),
        (select r.max_lag from kakunin_private.replicas r)),
      hint = 'Ask the primary, or wait. If nothing is behind, no worker runs on the primary, or the clocks differ. kakunin.set_replica_lag() sets the limit.';
  end if;
end
$$;
comment on function kakunin_private.check_replica() is 'KA012 on a standby that is too far behind';

-- Cryptography from core functions only: no pgcrypto, no extension at all.
--
-- Core has sha256() and arbitrary-precision numeric, and that is enough for what the kit checks:
--
--   base64url (RFC 4648 section 5)    the three parts of a JWT
--   RSASSA-PKCS1-v1_5 with SHA-256    (RFC 8017 section 8.2.2) assertions, certificates and tree heads
--
-- The HMAC of session tickets and bindings is kakunin_private.session_mac(), in 40_session.sql.
--
-- Verification only ever uses public values, so it needs no constant-time arithmetic. The encoded
-- message is built from the digest and compared whole, as a number; the padding a signature carries is
-- never parsed. Parsing it is how forgeries with e = 3 and garbage after the hash were possible.

create function kakunin_private.base64url_encode(p_bytes bytea) returns text
language sql immutable strict parallel safe
return translate(encode(p_bytes, 'base64'), E'+/=\n', '-_');
comment on function kakunin_private.base64url_encode(bytea) is 'base64url without padding (RFC 4648 section 5, RFC 7515)';

create function kakunin_private.base64url_decode(p_text text) returns bytea
language plpgsql immutable strict parallel safe
as $$
declare
  v_bytes bytea;
begin
  -- decode() alone is too kind: it skips white space and ignores stray bits in the last character.
  if p_text !~ '^[A-Za-z0-9_-]*$' or length(p_text) % 4 = 1 then
    return null;
  end if;
  v_bytes := decode(translate(p_text, '-_', '+/') || repeat('=', (4 - length(p_text) % 4) % 4), 'base64');
  if kakunin_private.base64url_encode(v_bytes) <> p_text then
    return null;
  end if;
  return v_bytes;
end
$$;
comment on function kakunin_private.base64url_decode(text) is
  'Strict base64url: NULL for anything that is not exactly what base64url_encode writes';

create function kakunin_private.bytes_to_numeric(p_bytes bytea) returns numeric
language plpgsql immutable strict parallel safe
as $$
declare
  v_hex    text := encode(p_bytes, 'hex');
  v_result numeric := 0::numeric;
  v_at     integer := 1;
  v_take   integer := length(v_hex) % 14;
begin
  -- Seven bytes at a time: the widest whole-byte chunk that a bigint holds without its sign bit.
  if v_take > 0 then
    v_result := ('x' || lpad(left(v_hex, v_take), 16, '0'))::bit(64)::bigint::numeric;
    v_at := 1 + v_take;
  end if;
  while v_at < length(v_hex) loop
    v_result := v_result * 72057594037927936  -- 2 ^ 56
      + ('x00' || substr(v_hex, v_at, 14))::bit(64)::bigint;
    v_at := v_at + 14;
  end loop;
  return v_result;
end
$$;
comment on function kakunin_private.bytes_to_numeric(bytea) is
  'OS2IP (RFC 8017 section 4.2): big-endian bytes as a non-negative number';

create function kakunin_private.check_rsa_public_key(p_modulus bytea, p_exponent bigint) returns void
language plpgsql immutable parallel safe
as $$
declare
  v_bits integer;
begin
  if p_modulus is null or p_exponent is null or length(p_modulus) = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA public key is incomplete: the modulus and the exponent are both needed';
  end if;
  if p_exponent <> 65537 then
    raise exception using errcode = 'KA010',
      message = format('RSA public exponent %s is not supported', p_exponent),
      hint = 'Use a key with public exponent 65537.';
  end if;
  if get_byte(p_modulus, 0) = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA modulus begins with a zero byte',
      hint = 'Give it big-endian, without leading zeros.';
  end if;
  v_bits := length(p_modulus) * 8 - 8 + length(ltrim(get_byte(p_modulus, 0)::bit(8)::text, '0'));
  if v_bits not between 2048 and 4096 then
    raise exception using errcode = 'KA010',
      message = format('RSA modulus of %s bits is not supported', v_bits),
      hint = 'Use a key of 2048 to 4096 bits.';
  end if;
  if get_byte(p_modulus, length(p_modulus) - 1) % 2 = 0 then
    raise exception using errcode = 'KA010',
      message = 'RSA modulus is even, so it is not the product of two odd primes';
  end if;
end
$$;
comment on function kakunin_private.check_rsa_public_key(bytea, bigint) is
  'KA010 unless the key is RSA of 2048 to 4096 bits with public exponent 65537';

create function kakunin_private.rsa_pkcs1_sha256_verify(
  p_modulus bytea, p_exponent bigint, p_message bytea, p_signature bytea
) returns boolean
language plpgsql immutable parallel safe
as $$
declare
  v_length    integer := length(p_modulus);
  v_modulus   numeric;
  v_signature numeric;
  v_power     numeric;
begin
  perform kakunin_private.check_rsa_public_key(p_modulus, p_exponent);
  if p_message is null or p_signature is null or length(p_signature) <> v_length then
    return false;
  end if;
  v_modulus := kakunin_private.bytes_to_numeric(p_modulus);
  v_signature := kakunin_private.bytes_to_numeric(p_signature);
  if v_signature >= v_modulus then
    return false;  -- RFC 8017 section 5.2.2: s and s + n must not both be signatures
  end if;
  -- 65537 = 2^16 + 1: sixteen squarings and one multiplication.
  v_power := v_signature;
  for i in 1..16 loop
    v_power := (v_power * v_power) % v_modulus;
  end loop;
  v_power := (v_power * v_signature) % v_modulus;
  -- EMSA-PKCS1-v1_5 (section 9.2): 00 01 ff..ff 00, DigestInfo of SHA-256 with its NULL, the digest.
  return v_power = kakunin_private.bytes_to_numeric(
    E'\\x0001'::bytea
    || decode(repeat('ff', v_length - 54), 'hex')
    || E'\\x003031300d060960864801650304020105000420'::bytea
    || sha256(p_message));
end
$$;
comment on function kakunin_private.rsa_pkcs1_sha256_verify(bytea, bigint, bytea, bytea) is
  'RSASSA-PKCS1-v1_5 with SHA-256 (RFC 8017 section 8.2.2). False for a wrong signature, KA010 for a key it does not do';

-- DER: reading the encoding of certificates and revocation lists (X.690), strictly.
--
-- One value has one encoding, or two readers could see two certificates in the same signed bytes. So whatever
-- X.690 section 10 leaves no choice about is checked: definite lengths in their shortest form, integers,
-- booleans, object identifiers and bit strings in theirs, the elements of a SET in their order, nothing left
-- over after the last element. Tags that RFC 5280 has no use for are refused, as are elements nested deeper
-- than certificates ever are.
--
-- der_check() goes once through the whole tree. After it, der_children() and der_content() take it apart, each
-- element as its own bytes, and need no checks beyond "is this what is expected here".

create function kakunin_private.refuse(p_what text, p_why text, p_hint text default '') returns void
language plpgsql volatile parallel safe  -- not to be worked out at planning, which would raise it before its time
as $$
begin
  if p_hint = '' then
    raise exception using errcode = 'KA010', message = format('%s is refused: %s', p_what, p_why);
  end if;
  raise exception using errcode = 'KA010', message = format('%s is refused: %s', p_what, p_why), hint = p_hint;
end
$$;
comment on function kakunin_private.refuse(text, text, text) is 'Raises KA010: this thing is refused, why, and what to do';

create function kakunin_private.colon_hex(p_bytes bytea) returns text
language sql immutable strict parallel safe
return rtrim(regexp_replace(upper(encode(p_bytes, 'hex')), '(..)', E'\\1:', 'g'), ':');
comment on function kakunin_private.colon_hex(bytea) is 'Upper-case hexadecimal bytes joined by colons, as serials and key ids are written';

create function kakunin_private.der_header(
  p_der bytea, p_at integer, p_end integer, out tag integer, out content_at integer, out next_at integer
)
language plpgsql immutable parallel safe
as $$
declare
  v_length integer;
  v_bytes  integer;
begin
  if p_at + 2 > p_end then
    perform kakunin_private.refuse('the encoding', format('it ends inside the element at byte %s', p_at));
  end if;
  tag := get_byte(p_der, p_at);
  v_length := get_byte(p_der, p_at + 1);
  content_at := p_at + 2;
  if v_length >= 128 then
    v_bytes := v_length - 128;
    -- 128 alone is the indefinite form; three bytes count to 16 MiB, more than anything read here may have.
    if v_bytes not between 1 and 3 or content_at + v_bytes > p_end then
      perform kakunin_private.refuse('the encoding', format('the length at byte %s is indefinite, too long or cut off', p_at + 1));
    end if;
    v_length := 0;
    for i in 1..v_bytes loop
      v_length := v_length * 256 + get_byte(p_der, content_at);
      content_at := content_at + 1;
    end loop;
    if v_length < 128 or v_length < 1 << (8 * (v_bytes - 1)) then
      perform kakunin_private.refuse('the encoding', format('the length at byte %s is not in its shortest form', p_at + 1));
    end if;
  end if;
  next_at := content_at + v_length;
  if next_at > p_end then
    perform kakunin_private.refuse('the encoding', format('the element at byte %s is longer than what holds it', p_at));
  end if;
end
$$;
comment on function kakunin_private.der_header(bytea, integer, integer) is
  'Tag, first content byte and end of the element at a byte (from 0) that must end by p_end; KA010 for a bad header';

create function kakunin_private.der_check(p_der bytea) returns void
language plpgsql immutable parallel safe
as $$
declare
  c_depth  constant integer := 16;  -- certificates need 8
  v_length constant integer := octet_length(p_der);
  v_der    constant bytea := p_der || ''::bytea;  -- out of a table, it would be decompressed for each byte that is read
  v_ends   integer[] := '{}'::integer[];
  v_depth  integer := 0;
  v_at     integer := 0;
  v_header record;
  v_size   integer;
  v_wrong  text;
begin
  v_header := kakunin_private.der_header(v_der, 0, v_length);
  if v_header.next_at <> v_length then
    perform kakunin_private.refuse('the encoding', format('%s bytes follow its end', v_length - v_header.next_at));
  end if;
  while v_at < v_length loop
    v_header := kakunin_private.der_header(v_der, v_at, case when v_depth = 0 then v_length else v_ends[v_depth] end);
    v_size := v_header.next_at - v_header.content_at;
    if v_header.tag in (48, 49) or v_header.tag between 160 and 190 then  -- SEQUENCE, SET, [0] to [30]
      v_depth := v_depth + 1;
      if v_depth > c_depth then
        perform kakunin_private.refuse('the encoding', format('it is nested deeper than %s levels', c_depth));
      end if;
      if v_header.tag = 49 and exists (
        select from (
          select u.element, lag(u.element) over (order by u.n) as before
            from unnest(kakunin_private.der_children(
              substr(v_der, v_at + 1, v_header.next_at - v_at), 49, 'the encoding')) with ordinality as u(element, n)) s
         where s.element < s.before) then
        perform kakunin_private.refuse('the encoding', format('the elements of the set at byte %s are not in order', v_at));
      end if;
      v_ends[v_depth] := v_header.next_at;
      v_at := v_header.content_at;
    else
      v_wrong := case v_header.tag
        when 1 then  -- BOOLEAN
          case when v_size <> 1 or get_byte(v_der, v_header.content_at) not in (0, 255) then 'boolean' end
        when 2 then null  -- INTEGER, below
        when 10 then null  -- ENUMERATED, below
        when 3 then  -- BIT STRING: the count of unused bits, which are zero
          case when v_size < 1 then 'bit string'
               when get_byte(v_der, v_header.content_at) > case when v_size > 1 then 7 else 0 end
                 or get_byte(v_der, v_header.next_at - 1) & ((1 << get_byte(v_der, v_header.content_at)) - 1) <> 0
               then 'bit string' end
        when 5 then case when v_size <> 0 then 'null' end
        when 6 then  -- OBJECT IDENTIFIER: parts end with a byte below 128, and none begins with 128
          case when v_size < 1 then 'object identifier'
               when get_byte(v_der, v_header.next_at - 1) >= 128 or get_byte(v_der, v_header.content_at) = 128
                 or encode(substr(v_der, v_header.content_at + 1, v_size), 'hex') ~ '^(..)*[0-7].80'
               then 'object identifier' end
        when 4 then null   -- OCTET STRING
        when 12 then null  -- UTF8String; strings and times are read where they are used
        when 19 then null  -- PrintableString
        when 22 then null  -- IA5String
        when 23 then null  -- UTCTime
        when 24 then null  -- GeneralizedTime
        else case when v_header.tag not between 128 and 158 then 'tag' end
      end;
      if v_header.tag in (2, 10) then
        if v_size < 1 then
          v_wrong := 'integer';
        elsif v_size > 1 and get_byte(v_der, v_header.content_at) in (0, 255)
          and (get_byte(v_der, v_header.content_at) = 0) = (get_byte(v_der, v_header.content_at + 1) < 128) then
          v_wrong := 'integer';  -- nine leading bits alike
        end if;
      end if;
      if v_wrong is not null then
        perform kakunin_private.refuse('the encoding', format('the %s at byte %s is not one DER has', v_wrong, v_at));
      end if;
      v_at := v_header.next_at;
    end if;
    while v_depth > 0 and v_at = v_ends[v_depth] loop
      v_depth := v_depth - 1;
    end loop;
  end loop;
end
$$;
comment on function kakunin_private.der_check(bytea) is 'Returns when the bytes are one element in strict DER and nothing more; otherwise KA010';

create function kakunin_private.der_content(p_element bytea, p_tag integer, p_what text) returns bytea
language plpgsql immutable parallel safe
as $$
begin
  if p_element is null or get_byte(p_element, 0) <> p_tag then
    perform kakunin_private.refuse(p_what, 'it is missing, or not of the type it has in RFC 5280');
  end if;
  return substr(p_element, 1 + (kakunin_private.der_header(p_element, 0, octet_length(p_element))).content_at);
end
$$;
comment on function kakunin_private.der_content(bytea, integer, text) is
  'The content of an element that passed der_check() and must have this tag; p_what names it in the error';

create function kakunin_private.der_children(p_element bytea, p_tag integer, p_what text) returns bytea[]
language plpgsql immutable parallel safe
as $$
declare
  v_length   constant integer := octet_length(p_element);
  v_children bytea[] := '{}'::bytea[];
  v_header   record;
  v_at       integer;
begin
  if p_element is null or get_byte(p_element, 0) <> p_tag then
    perform kakunin_private.refuse(p_what, 'it is missing, or not of the type it has in RFC 5280');
  end if;
  v_header := kakunin_private.der_header(p_element, 0, v_length);
  v_at := v_header.content_at;
  while v_at < v_length loop
    v_header := kakunin_private.der_header(p_element, v_at, v_length);
    v_children := v_children || substr(p_element, v_at + 1, v_header.next_at - v_at);
    v_at := v_header.next_at;
  end loop;
  return v_children;
end
$$;
comment on function kakunin_private.der_children(bytea, integer, text) is
  'The elements inside a constructed element that passed der_check() and must have this tag, each whole';

create function kakunin_private.der_oid(p_element bytea, p_what text) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_content constant bytea := kakunin_private.der_content(p_element, 6, p_what);
  v_part    numeric := 0::numeric;
  v_oid     text;
begin
  if octet_length(v_content) > 64 then
    perform kakunin_private.refuse(p_what, 'its object identifier is longer than 64 bytes');
  end if;
  for i in 0..octet_length(v_content) - 1 loop
    v_part := v_part * 128 + (get_byte(v_content, i) & 127);
    if get_byte(v_content, i) < 128 then
      -- X.690 section 8.19.4: the first number stands for two
      v_oid := case when v_oid is not null then v_oid || '.' || v_part
        else least(div(v_part, 40), 2) || '.' || v_part - 40 * least(div(v_part, 40), 2) end;
      v_part := 0;
    end if;
  end loop;
  return v_oid;
end
$$;
comment on function kakunin_private.der_oid(bytea, text) is 'An object identifier in dotted form';

create function kakunin_private.der_utf8(p_element bytea, p_what text) returns text
language plpgsql immutable parallel unsafe
as $$
begin
  return convert_from(kakunin_private.der_content(p_element, 12, p_what), 'UTF8');
exception
  -- not UTF-8, a zero byte, or a character that this database's encoding has not
  when character_not_in_repertoire or untranslatable_character then
    perform kakunin_private.refuse(p_what, 'it is not UTF-8 text that this database can hold');
    return null;
end
$$;
comment on function kakunin_private.der_utf8(bytea, text) is 'The text of a UTF8String';

create function kakunin_private.der_time(p_element bytea, p_what text) returns timestamptz
language plpgsql stable parallel safe
as $$
declare
  v_tag   integer;
  v_text  text collate "C";
  v_parts integer[];
begin
  if p_element is null then
    perform kakunin_private.refuse(p_what, 'it is missing');
  end if;
  v_tag := get_byte(p_element, 0);
  v_text := encode(substr(p_element, 3), 'escape');
  -- RFC 5280 section 4.1.2.5: UTCTime until 2049, GeneralizedTime from 2050, both to the second and in Zulu.
  if (v_tag = 23 and v_text ~ '^[0-9]{12}Z$') then
    v_text := case when v_text < '50' then '20' else '19' end || v_text;
  elsif (v_tag <> 24 or v_text !~ '^[0-9]{14}Z$' or v_text < '2050') then
    perform kakunin_private.refuse(p_what, 'it is not a time in the form RFC 5280 has for it');
  end if;
  v_parts := array[left(v_text, 4), substr(v_text, 5, 2), substr(v_text, 7, 2),
                   substr(v_text, 9, 2), substr(v_text, 11, 2), substr(v_text, 13, 2)]::integer[];
  if v_parts[2] not between 1 and 12 or v_parts[4] > 23 or v_parts[5] > 59 or v_parts[6] > 59
    or v_parts[3] not between 1 and extract(day from make_date(v_parts[1], least(greatest(v_parts[2], 1), 12), 1) + interval '1 month -1 day') then
    perform kakunin_private.refuse(p_what, 'there is no such day or time');
  end if;
  -- UTC as an offset: from 18 on a session can give the name UTC another meaning (set timezone = 'UTC+167').
  return make_timestamp(v_parts[1], v_parts[2], v_parts[3], v_parts[4], v_parts[5], v_parts[6]) at time zone interval '0';
end
$$;
comment on function kakunin_private.der_time(bytea, text) is 'A Time of RFC 5280, UTCTime or GeneralizedTime';

-- X.509: reading certificates and revocation lists (RFC 5280), of the kind the kit issues.
--
-- Nothing here decides whom to trust. It takes signed bytes apart into fields, refuses what is not strictly a
-- v3 certificate or v2 list over RSA with SHA-256, and leaves it to identity to ask who signed them.
--
-- The kit's own extensions, below 1.3.6.1.4.1.61411.1, are not critical and say what an agent is:
--
--   .1  agent             UTF8String                              urn:kakunin:agent:<uuid>
--   .2  model             SEQUENCE { model, modelHash }           UTF8String each; sha256:<64 hex digits>
--   .3  permittedActions  SEQUENCE OF UTF8String                  orders:read, orders:*
--   .4  tenant            UTF8String
--   .5  financialScope    UTF8String                              a JSON object, limits() its members
--
-- A key id is the subject key identifier (section 4.2.1.2) that a CA's certificate carries and what it signs
-- names, in the text form serials have.

create type kakunin_private.x509_extension as (oid text, critical boolean, value bytea);
comment on type kakunin_private.x509_extension is 'One extension (RFC 5280 section 4.2); value is what the OCTET STRING holds';

create type kakunin_private.x509_certificate as (
  tbs              bytea,
  signature        bytea,
  serial           text,
  issuer           bytea,
  subject          bytea,
  not_before       timestamptz,
  not_after        timestamptz,
  modulus          bytea,
  key_id           text,
  authority_key_id text,
  ca               boolean,
  path_length      integer,
  key_usage        integer,
  extensions       kakunin_private.x509_extension[]
);
comment on type kakunin_private.x509_certificate is
  'What a certificate says. issuer and subject are the DER of the names, key_usage its first eight bits, digitalSignature 128';

create function kakunin_private.x509_extensions(p_element bytea, p_what text) returns kakunin_private.x509_extension[]
language plpgsql immutable parallel safe
as $$
declare
  v_extensions kakunin_private.x509_extension[] := '{}'::kakunin_private.x509_extension[];
  v_elements   bytea[];
  v_element    bytea;
  v_parts      bytea[];
  v_oid        text;
begin
  v_elements := kakunin_private.der_children(p_element, 48, p_what);
  if cardinality(v_elements) > 64 then  -- each is compared with those before it
    perform kakunin_private.refuse(p_what, 'it has more than 64 extensions');
  end if;
  foreach v_element in array v_elements loop
    v_parts := kakunin_private.der_children(v_element, 48, 'an extension');
    v_oid := kakunin_private.der_oid(v_parts[1], 'an extension''s name');
    if cardinality(v_parts) = 3 then
      -- DER leaves a default out, so what is there is true.
      if v_parts[2] <> E'\\x0101ff' then
        perform kakunin_private.refuse(p_what, format('extension %s does not say critical in DER', v_oid));
      end if;
    elsif cardinality(v_parts) <> 2 then
      perform kakunin_private.refuse(p_what, format('extension %s has no value, or too much', v_oid));
    end if;
    if exists (select from unnest(v_extensions) x where x.oid = v_oid) then
      perform kakunin_private.refuse(p_what, format('extension %s is there twice', v_oid));
    end if;
    v_extensions := v_extensions
      || row(v_oid, cardinality(v_parts) = 3,
             kakunin_private.der_content(v_parts[cardinality(v_parts)], 4, 'an extension''s value'))::kakunin_private.x509_extension;
  end loop;
  return v_extensions;
end
$$;
comment on function kakunin_private.x509_extensions(bytea, text) is 'The extensions of a certificate, a list or an entry; KA010 when one is there twice';

create function kakunin_private.x509_extension_value(p_extensions kakunin_private.x509_extension[], p_oid text) returns bytea
language plpgsql immutable parallel safe
as $$
declare
  v_value bytea;
begin
  select x.value into v_value from unnest(p_extensions) x where x.oid = p_oid;
  if v_value is not null then
    perform kakunin_private.der_check(v_value);
  end if;
  return v_value;
end
$$;
comment on function kakunin_private.x509_extension_value(kakunin_private.x509_extension[], text) is
  'The DER element in the extension, checked to be one; NULL when the extension is not there';

create function kakunin_private.x509_check_critical(p_extensions kakunin_private.x509_extension[], p_known text[], p_what text) returns void
language plpgsql immutable parallel safe
as $$
declare
  v_oid text;
begin
  select x.oid into v_oid from unnest(p_extensions) x where x.critical and x.oid <> all (p_known) limit 1;
  if found then
    perform kakunin_private.refuse(p_what, format('its critical extension %s is not understood here', v_oid));
  end if;
end
$$;
comment on function kakunin_private.x509_check_critical(kakunin_private.x509_extension[], text[], text) is
  'KA010 when a critical extension is not among the known ones (RFC 5280 section 4.2)';

create function kakunin_private.x509_authority_key_id(p_extensions kakunin_private.x509_extension[]) returns text
language plpgsql immutable parallel safe
as $$
declare
  c_what  constant text := 'authorityKeyIdentifier';
  v_value constant bytea := kakunin_private.x509_extension_value(p_extensions, '2.5.29.35');
  v_parts bytea[];
begin
  if v_value is null then
    return null;
  end if;
  v_parts := kakunin_private.der_children(v_value, 48, c_what);
  -- The key id, and perhaps the name [1] and the serial [2] of the issuer's certificate, both or neither.
  if cardinality(v_parts) <> 1 and (cardinality(v_parts) <> 3 or get_byte(v_parts[2], 0) <> 161 or get_byte(v_parts[3], 0) <> 130) then
    perform kakunin_private.refuse(c_what, 'it is not a key id, with or without an issuer and a serial number');
  end if;
  return kakunin_private.colon_hex(kakunin_private.der_content(v_parts[1], 128, c_what));
end
$$;
comment on function kakunin_private.x509_authority_key_id(kakunin_private.x509_extension[]) is
  'The key id of the issuer (RFC 5280 section 4.2.1.1); NULL when the extension is not there';

create function kakunin_private.x509_check_signed(p_outer bytea[], p_algorithm bytea, p_what text) returns bytea
language plpgsql immutable parallel safe
as $$
declare
  -- sha256WithRSAEncryption with its NULL (RFC 4055 section 5)
  c_sha256_rsa constant bytea := decode('300d06092a864886f70d01010b0500', 'hex');
  v_signature  bytea;
begin
  if cardinality(p_outer) <> 3 then
    perform kakunin_private.refuse(p_what, 'it is not what was signed, an algorithm and a signature');
  end if;
  -- Inside what was signed and outside of it.
  if p_algorithm is distinct from c_sha256_rsa or p_outer[2] <> c_sha256_rsa then
    perform kakunin_private.refuse(p_what, 'its signature algorithm is not sha256WithRSAEncryption');
  end if;
  v_signature := kakunin_private.der_content(p_outer[3], 3, 'the signature');
  if get_byte(v_signature, 0) <> 0 then
    perform kakunin_private.refuse(p_what, 'its signature is not a whole number of bytes');
  end if;
  return substr(v_signature, 2);
end
$$;
comment on function kakunin_private.x509_check_signed(bytea[], bytea, text) is
  'The signature of a signed structure whose algorithm, inside and outside, is RSA with SHA-256; otherwise KA010';

create function kakunin_private.x509_positive(p_element bytea, p_what text) returns bytea
language plpgsql immutable parallel safe
as $$
declare
  v_content constant bytea := kakunin_private.der_content(p_element, 2, p_what);
begin
  if get_byte(v_content, 0) >= 128 or v_content = E'\\x00' then
    perform kakunin_private.refuse(p_what, 'it is not a positive number');
  end if;
  return ltrim(v_content, E'\\x00');
end
$$;
comment on function kakunin_private.x509_positive(bytea, text) is 'A positive INTEGER, big-endian, without its sign byte';

create function kakunin_private.x509_serial(p_element bytea) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_content constant bytea := kakunin_private.x509_positive(p_element, 'the serial number');
begin
  -- RFC 5280 section 4.1.2.2: at most 20 octets, sign byte included
  if octet_length(kakunin_private.der_content(p_element, 2, 'the serial number')) > 20 then
    perform kakunin_private.refuse('the serial number', 'it is longer than 20 octets');
  end if;
  return kakunin_private.colon_hex(v_content);
end
$$;
comment on function kakunin_private.x509_serial(bytea) is 'A CertificateSerialNumber in the canonical text form';

create function kakunin_private.x509_read_certificate(p_der bytea) returns kakunin_private.x509_certificate
language plpgsql stable parallel safe
as $$
declare
  c_what        constant text := 'the certificate';
  c_rsa         constant bytea := decode('300d06092a864886f70d0101010500', 'hex');  -- rsaEncryption, NULL
  v_certificate kakunin_private.x509_certificate;
  v_outer       bytea[];
  v_fields      bytea[];
  v_parts       bytea[];
  v_value       bytea;
begin
  if p_der is null or octet_length(p_der) not between 1 and 16384 then
    perform kakunin_private.refuse(c_what, 'it is 1 to 16384 bytes of DER');
  elsif substr(p_der, 1, 5) = '-----' then
    perform kakunin_private.refuse(c_what, 'it is PEM', 'Give the DER that PEM wraps in base64.');
  end if;
  perform kakunin_private.der_check(p_der);
  v_outer := kakunin_private.der_children(p_der, 48, c_what);
  v_fields := kakunin_private.der_children(v_outer[1], 48, 'the TBSCertificate');
  -- Version, serial, algorithm, issuer, validity, subject, key, extensions: all there, in this order, and
  -- none of the unique identifiers that RFC 5280 section 4.1.2.8 says not to use.
  if cardinality(v_fields) <> 8 or v_fields[1] <> decode('a003020102', 'hex') then
    perform kakunin_private.refuse(c_what, 'it is not version 3 with extensions and nothing beyond them');
  end if;
  v_certificate.tbs := v_outer[1];
  v_certificate.signature := kakunin_private.x509_check_signed(v_outer, v_fields[3], c_what);
  v_certificate.serial := kakunin_private.x509_serial(v_fields[2]);
  v_certificate.issuer := v_fields[4];
  v_certificate.subject := v_fields[6];
  if cardinality(kakunin_private.der_children(v_fields[4], 48, 'the issuer')) = 0
    or cardinality(kakunin_private.der_children(v_fields[6], 48, 'the subject')) = 0 then
    perform kakunin_private.refuse(c_what, 'its issuer or its subject is empty');
  end if;

  v_parts := kakunin_private.der_children(v_fields[5], 48, 'the validity');
  if cardinality(v_parts) <> 2 then
    perform kakunin_private.refuse('the validity', 'it is not two times');
  end if;
  v_certificate.not_before := kakunin_private.der_time(v_parts[1], 'notBefore');
  v_certificate.not_after := kakunin_private.der_time(v_parts[2], 'notAfter');
  if v_certificate.not_after <= v_certificate.not_before then
    perform kakunin_private.refuse(c_what, 'its notAfter does not come after its notBefore');
  end if;

  v_parts := kakunin_private.der_children(v_fields[7], 48, 'the public key');
  if cardinality(v_parts) <> 2 or v_parts[1] <> c_rsa then
    perform kakunin_private.refuse(c_what, 'its key is not RSA', 'Use an RSA key of 2048 to 4096 bits.');
  end if;
  v_value := kakunin_private.der_content(v_parts[2], 3, 'the public key');
  if get_byte(v_value, 0) <> 0 or octet_length(v_value) = 1 then
    perform kakunin_private.refuse('the public key', 'it is not a whole number of bytes');
  end if;
  perform kakunin_private.der_check(substr(v_value, 2));
  v_parts := kakunin_private.der_children(substr(v_value, 2), 48, 'the public key');
  if cardinality(v_parts) <> 2 then
    perform kakunin_private.refuse('the public key', 'it is not a modulus and an exponent');
  end if;
  v_certificate.modulus := kakunin_private.x509_positive(v_parts[1], 'the modulus');
  v_value := kakunin_private.x509_positive(v_parts[2], 'the exponent');
  if octet_length(v_value) > 7 then
    perform kakunin_private.refuse('the exponent', 'it is longer than 7 bytes');
  end if;
  perform kakunin_private.check_rsa_public_key(
    v_certificate.modulus, kakunin_private.bytes_to_numeric(v_value)::bigint);

  v_parts := kakunin_private.der_children(v_fields[8], 163, 'the extensions');  -- [3]
  if cardinality(v_parts) <> 1 then
    perform kakunin_private.refuse('the list of extensions', 'it is not one list');
  end if;
  v_certificate.extensions := kakunin_private.x509_extensions(v_parts[1], c_what);
  v_certificate.authority_key_id := kakunin_private.x509_authority_key_id(v_certificate.extensions);
  v_value := kakunin_private.x509_extension_value(v_certificate.extensions, '2.5.29.14');
  if v_value is not null then
    v_value := kakunin_private.der_content(v_value, 4, 'subjectKeyIdentifier');
    if octet_length(v_value) not between 8 and 32 then
      perform kakunin_private.refuse('subjectKeyIdentifier', 'it is not 8 to 32 bytes');
    end if;
    v_certificate.key_id := kakunin_private.colon_hex(v_value);
  end if;

  v_value := kakunin_private.x509_extension_value(v_certificate.extensions, '2.5.29.15');
  if v_value is not null then
    v_value := kakunin_private.der_content(v_value, 3, 'keyUsage');
    if octet_length(v_value) not between 2 and 3 or (octet_length(v_value) = 3 and get_byte(v_value, 0) <> 7) then
      perform kakunin_private.refuse('keyUsage', 'it is not one to nine bits');
    end if;
    -- X.690 section 11.2.2: a list of named bits ends with one that is set
    if get_byte(v_value, octet_length(v_value) - 1) & (1 << get_byte(v_value, 0)) = 0 then
      perform kakunin_private.refuse('keyUsage', 'it ends with a bit that is not set');
    end if;
    v_certificate.key_usage := get_byte(v_value, 1);
  end if;

  v_certificate.ca := false;
  v_value := kakunin_private.x509_extension_value(v_certificate.extensions, '2.5.29.19');
  if v_value is not null then
    v_parts := kakunin_private.der_children(v_value, 48, 'basicConstraints');
    if cardinality(v_parts) > 0 then
      -- cA is false by default and DER leaves a default out; without it there is no path length either.
      if v_parts[1] <> E'\\x0101ff' or cardinality(v_parts) > 2 then
        perform kakunin_private.refuse('basicConstraints', 'it is neither empty nor cA with a path length');
      end if;
      v_certificate.ca := true;
      if cardinality(v_parts) = 2 then
        v_value := kakunin_private.der_content(v_parts[2], 2, 'pathLenConstraint');
        if octet_length(v_value) <> 1 or get_byte(v_value, 0) > 16 then
          perform kakunin_private.refuse('pathLenConstraint', 'it is not 0 to 16');
        end if;
        v_certificate.path_length := get_byte(v_value, 0);
      end if;
    end if;
  end if;
  return v_certificate;
end
$$;
comment on function kakunin_private.x509_read_certificate(bytea) is
  'What a certificate in DER says, before anybody is asked whether to believe it; KA010 for anything but a strict v3 RSA certificate';

-- Identity: certificate authorities, agents and their X.509 certificates.
--
-- Postgres checks the certificate. trust_ca() pins a certificate authority by its certificate; from then on
-- register_certificate() takes the DER of an agent's certificate and nothing else, verifies that a pinned
-- key signed it, and takes every field from what was signed. So a login with kakunin_registrar can register
-- what the authority issued, and cannot make an identity, widen a scope or extend a validity.
--
-- An agent is a row; what it may do is in its certificate. A certificate row is never edited to mean
-- something else: the only change it ever sees is its revocation, which is final. Suspension is the
-- agent's, can be lifted, and stops every certificate the agent has. Both take effect at the next
-- statement of every session, because current_cert_serial() looks here each time it is asked.
--
-- An agent has one active certificate. Registering the next one says for how long the one before it still
-- counts: its revocation is written at once, with a time that lies ahead.
--
-- A serial has one text form everywhere, that of the X-Kakunin-Cert-Serial header: upper-case hex bytes
-- joined by colons, no leading zero byte (3A:F2:91:CC).

create function kakunin.normalize_serial(serial text) returns text
language plpgsql immutable parallel safe set search_path = pg_catalog, pg_temp
as $$
declare
  v_hex text collate "C" := serial;
begin
  -- Refused by length first: the patterns below never see more than this.
  if v_hex is not null and octet_length(v_hex) <= 100 then
    v_hex := upper(regexp_replace(btrim(v_hex), '^0[xX]', ''));
    if v_hex ~ '^[0-9A-F]{1,2}((:[0-9A-F]{2})*|(-[0-9A-F]{2})*|( [0-9A-F]{2})*)$' or v_hex ~ '^[0-9A-F]+$' then
      v_hex := ltrim(translate(v_hex, ':- ', ''), '0');
      if length(v_hex) between 1 and 40 then  -- RFC 5280 section 4.1.2.2: positive, at most 20 octets
        v_hex := repeat('0', length(v_hex) % 2) || v_hex;
        return rtrim(regexp_replace(v_hex, '(..)', E'\\1:', 'g'), ':');
      end if;
    end if;
  end if;
  raise exception using errcode = 'KA010',
    message = 'not a certificate serial number',
    hint = 'Give 1 to 20 bytes in hexadecimal, as in 3A:F2:91:CC, 3af291cc or 0x3AF291CC.';
end
$$;
comment on function kakunin.normalize_serial(text) is
  'The canonical form of a certificate serial, 3A:F2:91:CC, from any common hexadecimal form; KA010 for anything else. For all the kit''s roles';

create table kakunin_private.agents (
  agent_id         uuid primary key default gen_random_uuid(),
  name             text not null check (length(name) between 1 and 200),
  tenant           text check (length(tenant) between 1 and 200),
  model            text check (length(model) between 1 and 200),
  model_version    text check (length(model_version) between 1 and 200),
  model_hash       text collate "C" check (model_hash ~ '^sha256:[0-9a-f]{64}$'),
  created_at       timestamptz not null default now(),
  suspended_at     timestamptz,
  suspended_reason text,
  risk_exempt      boolean not null default false,
  risk_factor      double precision not null default 1 check (risk_factor between 0.1 and 10),
  risk_epoch       integer not null default 0,
  reinstated_at    timestamptz,
  check ((suspended_at is null) = (suspended_reason is null)),
  check (model is not null or model_hash is null)
);
comment on table kakunin_private.agents is 'One row an agent. Suspension stops all its certificates and can be lifted';
comment on column kakunin_private.agents.risk_exempt is 'Scored, but nothing follows from it';
comment on column kakunin_private.agents.risk_factor is 'What its excess is multiplied by: above 1 it is judged more severely';
comment on column kakunin_private.agents.risk_epoch is 'Counts reinstatements: what was scored before the last one is not held against it';
comment on column kakunin_private.agents.reinstated_at is 'The last one: drift is of what came after it';
comment on column kakunin_private.agents.model_hash is
  'What the agent is to run, as compute_model_hash() gives it; a certificate for another is not registered';

create table kakunin_private.authorities (
  key_id             text collate "C" primary key check (key_id ~ '^[0-9A-F]{2}(:[0-9A-F]{2}){7,31}$'),
  der                bytea not null,
  serial             text collate "C" not null,
  subject            bytea not null,
  issuer_key_id      text collate "C" not null references kakunin_private.authorities,
  public_key_modulus bytea not null,
  not_before         timestamptz not null,
  not_after          timestamptz not null,
  path_length        integer,
  trusted_at         timestamptz not null default now(),
  trusted_by         name not null,
  distrusted_at      timestamptz,
  distrust_reason    text,
  check ((distrusted_at is null) = (distrust_reason is null))
);
comment on table kakunin_private.authorities is
  'Pinned certificate authorities. A root is its own issuer; an intermediate is below one that was pinned before it';
comment on column kakunin_private.authorities.key_id is 'The subject key identifier (RFC 5280 section 4.2.1.2), which certificates name their issuer by';
comment on column kakunin_private.authorities.path_length is
  'How many authorities may be below it, the constraints of those above it included; NULL is any number';

create table kakunin_private.certificates (
  serial             text collate "C" primary key check (serial ~ '^[0-9A-F]{2}(:[0-9A-F]{2}){0,19}$'),
  agent_id           uuid not null references kakunin_private.agents,
  issuer_key_id      text collate "C" not null references kakunin_private.authorities,
  der                bytea not null check (octet_length(der) between 1 and 16384),
  public_key_modulus bytea not null,
  not_before         timestamptz not null,
  not_after          timestamptz not null check (not_after > not_before),
  model              text,
  model_hash         text collate "C",
  permitted_actions  text[] collate "C" not null,
  tenant             text,
  financial_scope    jsonb,
  registered_at      timestamptz not null default now(),
  registered_by      name not null,
  revoked_at         timestamptz,
  revocation_reason  text,
  check ((revoked_at is null) = (revocation_reason is null))
);
create index certificates_agent_id on kakunin_private.certificates (agent_id);
create index certificates_public_key_modulus on kakunin_private.certificates (public_key_modulus);
create index certificates_revoked on kakunin_private.certificates (issuer_key_id) where revoked_at is not null;
comment on table kakunin_private.certificates is
  'Certificates the kit accepts, each signed by a pinned authority. Rows are added by register_certificate, changed only by revocation, never deleted';
comment on column kakunin_private.certificates.permitted_actions is
  'Scopes the certificate carries; has_scope() reads them. prefix:* covers every action below prefix:';
comment on column kakunin_private.certificates.public_key_modulus is
  'RSA modulus, big-endian; the public exponent is always 65537';
comment on column kakunin_private.certificates.revoked_at is
  'From this moment on it is revoked. It lies ahead where another certificate takes its place after an overlap';

-- Written in the agent's own transaction, which may stay open: so it locks nothing that an operator's decision needs, nor
-- another transaction of the agent, each of which has a chain of its own.
create table kakunin_private.risk_stops (
  agent_id   uuid not null,
  chain_id   bigint not null,
  stopped_at timestamptz not null,
  reason     text not null,
  primary key (agent_id, chain_id)
);
comment on table kakunin_private.risk_stops is
  'Agents that their own score has revoked (62_risk.sql), until settle_risk() has revoked their certificates. No foreign key: checking one locks the agent''s row';

-- Stops: a transaction that keeps its snapshot (REPEATABLE READ, SERIALIZABLE) does not see a revocation
-- committed since, and SET TRANSACTION SNAPSHOT hands an old snapshot to ever new transactions. But names in
-- the catalog are looked up as committed, whatever the snapshot. So every revocation, suspension and
-- retired session key also leaves a name there, and is asked for it in such transactions only. The name is a
-- domain's, because making one takes no lock that an agent's own DDL could hold against a revocation. The longest
-- is that of a serial with 'end ' before it: 63 bytes, and no name may be longer.
-- A reinstatement takes the suspension's name away, and leaves one that carries its number: what a snapshot from before
-- it shows of the agent's risk is of the epoch before, and counted by nobody.
create function kakunin_private.stop(p_name text) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  if not kakunin_private.is_stopped(p_name) then
    execute format('create domain kakunin_private.%I as boolean', p_name);
  end if;
end
$$;
comment on function kakunin_private.stop(text) is
  'Makes known beyond snapshots a revocation (name: serial), one that lies ahead (end and the serial), a suspension (agent id), a stop by risk (risk and the agent id), a reinstatement (epoch, the agent id and its number), a retired session key (key and its id) or that risk is observed alone (risk observed)';

create function kakunin_private.is_stopped(p_name text) returns boolean
language sql stable parallel safe
return to_regtype('kakunin_private.' || quote_ident(p_name)) is not null;
comment on function kakunin_private.is_stopped(text) is 'Whether stop() was committed for this name, whatever the snapshot shows';

create function kakunin_private.snapshot_is_fresh() returns boolean
language sql stable parallel safe
return current_setting('transaction_isolation') in ('read committed', 'read uncommitted');
comment on function kakunin_private.snapshot_is_fresh() is
  'Whether each statement takes a snapshot of its own, so that what it sees is what is committed';

create function kakunin_private.check_snapshot_is_fresh(p_what text) returns void
language plpgsql stable parallel safe
as $$
begin
  if not kakunin_private.snapshot_is_fresh() then
    raise exception using errcode = 'KA010',
      message = format('%s is for READ COMMITTED transactions: in this one (%s) it might miss what was decided since it began',
        p_what, current_setting('transaction_isolation')),
      hint = 'Begin the transaction READ COMMITTED.';
  end if;
end
$$;
comment on function kakunin_private.check_snapshot_is_fresh(text) is 'KA010 where what is committed may differ from what this transaction sees';

create function kakunin_private.is_reinstated_since(p_agent_id uuid) returns boolean
language sql stable parallel safe
begin atomic
  select exists (
    select from kakunin_private.agents a
     where a.agent_id = p_agent_id and kakunin_private.is_stopped('epoch ' || p_agent_id || ' ' || a.risk_epoch + 1));
end;
comment on function kakunin_private.is_reinstated_since(uuid) is
  'Whether the agent was reinstated after this transaction took its snapshot';

-- A snapshot taken before a revocation that lies ahead was written shows none, and cannot tell when it comes: refused.
create function kakunin_private.is_stopped_since(p_serial text, p_revoked_at timestamptz, p_agent_id uuid) returns boolean
language plpgsql stable parallel safe
as $$
begin
  -- First the one that settle() replaces by the others: between two looks it may do so.
  return kakunin_private.is_stopped('risk ' || p_agent_id)
    or kakunin_private.is_stopped(p_serial) or kakunin_private.is_stopped(p_agent_id::text)
    or (p_revoked_at is null and kakunin_private.is_stopped('end ' || p_serial))
    or kakunin_private.is_reinstated_since(p_agent_id);
end
$$;
comment on function kakunin_private.is_stopped_since(text, timestamptz, uuid) is
  'Whether certificate or agent was stopped, or the agent reinstated, after this transaction took its snapshot. Apart from is_usable() because whatever is inlined there costs every statement, and few transactions keep their snapshot';

-- The one definition of "this certificate may be used now"; bind and every statement's check share it.
-- notAfter is the last moment of validity, not the first one after it (RFC 5280 section 4.1.2.5).
-- Plain columns, not row types, so that the planner can inline it.
create function kakunin_private.is_usable(
  p_serial text, p_revoked_at timestamptz, p_not_before timestamptz, p_not_after timestamptz,
  p_agent_id uuid, p_suspended_at timestamptz
) returns boolean
language sql volatile parallel safe
return coalesce(p_revoked_at > kakunin_private.clock(), true)
   and p_suspended_at is null
   and kakunin_private.clock() between p_not_before and p_not_after
   and (kakunin_private.snapshot_is_fresh() or not kakunin_private.is_stopped_since(p_serial, p_revoked_at, p_agent_id));
comment on function kakunin_private.is_usable(text, timestamptz, timestamptz, timestamptz, uuid, timestamptz) is
  'Certificate not revoked, agent not suspended, and now inside the validity';

create function kakunin_private.check_certificate(p_serial text) returns void
language plpgsql volatile parallel restricted
as $$
declare
  v_certificate kakunin_private.certificates;
  v_agent       kakunin_private.agents;
  v_risk        text;
  v_now         timestamptz := kakunin_private.clock();
begin
  perform kakunin_private.check_replica();
  select * into v_certificate from kakunin_private.certificates c where c.serial = p_serial;
  if not found then
    raise exception using errcode = 'KA001',
      message = format('certificate %s is not registered here', p_serial),
      hint = 'Register it with kakunin.register_certificate(der), or check that this is the right database.';
  end if;
  select * into v_agent from kakunin_private.agents a where a.agent_id = v_certificate.agent_id;
  select r.reason into v_risk from kakunin_private.risk_stops r where r.agent_id = v_certificate.agent_id order by r.stopped_at limit 1;
  if v_risk is not null or v_certificate.revoked_at <= v_now or kakunin_private.is_stopped('risk ' || v_certificate.agent_id) or kakunin_private.is_stopped(p_serial)
    or (v_certificate.revoked_at is null and not kakunin_private.snapshot_is_fresh()
        and kakunin_private.is_stopped('end ' || p_serial)) then
    raise exception using errcode = 'KA002',
      message = format('certificate %s was revoked: %s', p_serial,
        coalesce(v_risk, v_certificate.revocation_reason, 'after this transaction took its snapshot')),
      hint = 'Revocation is final. Certify the agent anew.';
  elsif v_now < v_certificate.not_before then
    raise exception using errcode = 'KA003',
      message = format('certificate %s is not valid yet', p_serial),
      hint = 'Wait for its notBefore, or compare the clocks of the certificate authority and of this server.';
  elsif v_now > v_certificate.not_after then
    raise exception using errcode = 'KA003',
      message = format('certificate %s has expired', p_serial),
      hint = 'Certify the agent anew.';
  elsif v_agent.suspended_at is not null or kakunin_private.is_stopped(v_agent.agent_id::text) then
    raise exception using errcode = 'KA008',
      message = format('agent %s is suspended: %s', v_agent.agent_id,
        coalesce(v_agent.suspended_reason, 'after this transaction took its snapshot')),
      hint = 'After review, an operator lifts it with kakunin.reinstate_agent().';
  elsif not kakunin_private.snapshot_is_fresh() and kakunin_private.is_reinstated_since(v_agent.agent_id) then
    raise exception using errcode = 'KA008',
      message = format('agent %s was reinstated after this transaction took its snapshot', v_agent.agent_id),
      hint = 'Begin another transaction.';
  end if;
end
$$;
comment on function kakunin_private.check_certificate(text) is
  'Returns when the certificate may be used now; otherwise KA001, KA002, KA003 or KA008 says why not';

create function kakunin_private.check_text(p_what text, p_value text, p_max integer) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_value text collate "C" := p_value;
begin
  if v_value is null or v_value !~ '[^[:space:]]' or length(v_value) > p_max then
    raise exception using errcode = 'KA010',
      message = format('%s must be 1 to %s characters', p_what, p_max);
  end if;
  return v_value;
end
$$;
comment on function kakunin_private.check_text(text, text, integer) is 'The value, or KA010 when it is missing, blank or too long';

create function kakunin_private.check_known_agent(p_agent_id uuid) returns void
language plpgsql stable parallel restricted
as $$
begin
  if not exists (select from kakunin_private.agents a where a.agent_id = p_agent_id) then
    raise exception using errcode = 'KA010',
      message = format('no agent %s', coalesce(p_agent_id::text, 'given')),
      hint = 'Create it with kakunin.create_agent().';
  end if;
end
$$;
comment on function kakunin_private.check_known_agent(uuid) is 'KA010 when there is no such agent';

create function kakunin_private.check_model_hash(p_value text) returns text
language plpgsql immutable parallel safe
as $$
declare
  v_value text collate "C" := lower(p_value);
begin
  if v_value !~ '^sha256:[0-9a-f]{64}$' then
    raise exception using errcode = 'KA010',
      message = 'a model hash is sha256: and 64 hexadecimal digits',
      hint = 'compute_model_hash() in Python, or kakunin-db model-hash, makes one.';
  end if;
  return v_value;
end
$$;
comment on function kakunin_private.check_model_hash(text) is 'The hash in lower case, or KA010; NULL for NULL';

-- Authorities ------------------------------------------------------------------------------------------

-- The authority whose key made this signature, as far as what it signs lies inside its own certificate.
create function kakunin_private.issuer_of(p_certificate kakunin_private.x509_certificate) returns kakunin_private.authorities
language plpgsql volatile parallel restricted
as $$
declare
  c_what      constant text := 'the certificate';
  v_now       constant timestamptz := kakunin_private.clock();
  v_authority kakunin_private.authorities;
begin
  perform kakunin_private.check_snapshot_is_fresh('trusting or registering a certificate');
  if p_certificate.authority_key_id is null then
    perform kakunin_private.refuse(c_what, 'it does not name the key that signed it (authorityKeyIdentifier)');
  end if;
  -- The lock makes distrust_ca() wait for this transaction, or this one for it: distrust reaches all there is.
  select * into v_authority from kakunin_private.authorities a
   where a.key_id = p_certificate.authority_key_id and a.distrusted_at is null
     for key share;
  if not found then
    perform kakunin_private.refuse(c_what,
      format('the authority with key id %s is not trusted here', p_certificate.authority_key_id),
      'An operator pins it with kakunin.trust_ca(der), if it is to be trusted.');
  end if;
  if not kakunin_private.rsa_pkcs1_sha256_verify(
    v_authority.public_key_modulus, 65537, p_certificate.tbs, p_certificate.signature) then
    perform kakunin_private.refuse(c_what, 'its signature is not that of the authority it names');
  end if;
  if v_authority.subject <> p_certificate.issuer then
    perform kakunin_private.refuse(c_what, 'its issuer is not the subject of the authority that signed it');
  end if;
  if v_now not between v_authority.not_before and v_authority.not_after
    or p_certificate.not_before < v_authority.not_before or p_certificate.not_after > v_authority.not_after then
    perform kakunin_private.refuse(c_what, 'its validity is not inside that of its authority, or the authority''s has ended',
      'Issue it for a shorter time, or renew the authority''s certificate.');
  end if;
  return v_authority;
end
$$;
comment on function kakunin_private.issuer_of(kakunin_private.x509_certificate) is
  'The trusted authority that signed this certificate; KA010 when there is none, or its constraints forbid it';

create function kakunin.trust_ca(der bytea) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what   constant text := 'the certificate';
  v_ca     kakunin_private.x509_certificate := kakunin_private.x509_read_certificate(trust_ca.der);
  v_issuer kakunin_private.authorities;
  v_length integer;
  v_value  bytea;
begin
  perform kakunin_private.x509_check_critical(v_ca.extensions, '{2.5.29.15,2.5.29.19}', c_what);
  if not v_ca.ca or not exists (select from unnest(v_ca.extensions) x where x.oid = '2.5.29.19' and x.critical) then
    perform kakunin_private.refuse(c_what, 'it is not that of an authority (basicConstraints, critical, with cA)');
  end if;
  if coalesce(v_ca.key_usage & 6, 0) <> 6 then
    perform kakunin_private.refuse(c_what, 'its keyUsage lacks keyCertSign or cRLSign');
  end if;
  if v_ca.key_id is null then
    perform kakunin_private.refuse(c_what, 'it has no subjectKeyIdentifier of its own');
  end if;
  -- Constraints that other verifiers would apply to what it signs, and that are not applied here.
  if exists (select from unnest(v_ca.extensions) x where x.oid in ('2.5.29.30', '2.5.29.36', '2.5.29.54')) then
    perform kakunin_private.refuse(c_what, 'name and policy constraints are not understood here');
  end if;
  v_value := kakunin_private.x509_extension_value(v_ca.extensions, '2.5.29.37');
  if v_value is not null
    and not kakunin_private.der_children(v_value, 48, 'extKeyUsage')
      && array[decode('06082b06010505070302', 'hex'), decode('0604551d2500', 'hex')] then  -- clientAuth, any
    perform kakunin_private.refuse(c_what, 'its extKeyUsage does not have clientAuth');
  end if;
  if exists (select from kakunin_private.authorities a where a.public_key_modulus = v_ca.modulus and a.key_id <> v_ca.key_id)
    or exists (select from kakunin_private.certificates c where c.public_key_modulus = v_ca.modulus)
    or exists (select from kakunin_private.ledger_keys k where k.public_key_modulus = v_ca.modulus) then
    perform kakunin_private.refuse(c_what, 'its key is that of another authority here, of an agent or of the ledger');
  end if;
  v_length := v_ca.path_length;
  if v_ca.subject = v_ca.issuer then
    if v_ca.authority_key_id <> v_ca.key_id
      or not kakunin_private.rsa_pkcs1_sha256_verify(v_ca.modulus, 65537, v_ca.tbs, v_ca.signature) then
      perform kakunin_private.refuse(c_what, 'it says that it signed itself, and its key did not');
    end if;
  else
    v_issuer := kakunin_private.issuer_of(v_ca);
    if v_issuer.path_length = 0 then
      perform kakunin_private.refuse(c_what, 'the authority that signed it may have none below it (pathLenConstraint 0)');
    end if;
    v_length := least(v_length, v_issuer.path_length - 1);
  end if;
  if kakunin_private.clock() not between v_ca.not_before and v_ca.not_after then
    perform kakunin_private.refuse(c_what, 'it has expired, or is not valid yet');
  end if;
  insert into kakunin_private.authorities as a
    (key_id, der, serial, subject, issuer_key_id, public_key_modulus, not_before, not_after, path_length, trusted_by)
  values
    (v_ca.key_id, trust_ca.der, v_ca.serial, v_ca.subject, coalesce(v_issuer.key_id, v_ca.key_id), v_ca.modulus,
     v_ca.not_before, v_ca.not_after, v_length, session_user)
  on conflict on constraint authorities_pkey do update
    set der = excluded.der, serial = excluded.serial, issuer_key_id = excluded.issuer_key_id,
        not_before = excluded.not_before, not_after = excluded.not_after, path_length = excluded.path_length,
        trusted_at = now(), trusted_by = session_user
    where a.distrusted_at is null and a.subject = excluded.subject and a.public_key_modulus = excluded.public_key_modulus;
  if not found then
    perform kakunin_private.refuse(c_what,
      format('key id %s is that of another authority here, or of one no longer trusted', v_ca.key_id),
      'Distrust is final. Make an authority with a new key.');
  end if;
  perform kakunin_private.record('authority.trusted', null, jsonb_build_object(
    'key_id', v_ca.key_id, 'serial', v_ca.serial, 'sha256', encode(sha256(trust_ca.der), 'hex')));
  return v_ca.key_id;
end
$$;
comment on function kakunin.trust_ca(bytea) is
  'Pins a certificate authority by its certificate (DER) and returns its key id: a root, or an intermediate below one that is pinned. Its renewal, same key and subject, replaces it. For kakunin_operator';

-- Agents ---------------------------------------------------------------------------------------------

create function kakunin.create_agent(
  name text, tenant text default null, model text default null, model_version text default null, model_hash text default null
) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_agent_id uuid;
begin
  if create_agent.model is null and create_agent.model_hash is not null then
    raise exception using errcode = 'KA010', message = 'a model hash is that of a model, and none is named',
      hint = 'Give the model with it.';
  end if;
  insert into kakunin_private.agents (name, tenant, model, model_version, model_hash)
  values (
    kakunin_private.check_text('an agent''s name', create_agent.name, 200),
    case when create_agent.tenant is not null
      then kakunin_private.check_text('a tenant', create_agent.tenant, 200) end,
    case when create_agent.model is not null
      then kakunin_private.check_text('a model', create_agent.model, 200) end,
    case when create_agent.model_version is not null
      then kakunin_private.check_text('a model''s version', create_agent.model_version, 200) end,
    kakunin_private.check_model_hash(create_agent.model_hash))
  returning agent_id into v_agent_id;
  perform kakunin_private.record('agent.created', v_agent_id, jsonb_build_object(
    'name', create_agent.name, 'tenant', create_agent.tenant, 'model', create_agent.model,
    'model_version', create_agent.model_version, 'model_hash', lower(create_agent.model_hash)));
  return v_agent_id;
end
$$;
comment on function kakunin.create_agent(text, text, text, text, text) is
  'Makes an agent and returns its id. It can do nothing until a certificate is registered for it. For kakunin_registrar';

create function kakunin.update_agent(
  agent_id uuid, name text default null, tenant text default null,
  model text default null, model_version text default null, model_hash text default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_hash    text collate "C" := kakunin_private.check_model_hash(update_agent.model_hash);
  v_serials text[];
begin
  perform kakunin_private.lock_agent(update_agent.agent_id);
  if v_hash is not null and update_agent.model is null
    and exists (select from kakunin_private.agents a where a.agent_id = update_agent.agent_id and a.model is null) then
    raise exception using errcode = 'KA010', message = 'a model hash is that of a model, and none is named',
      hint = 'Give the model with it.';
  end if;
  update kakunin_private.agents a
     set name = kakunin_private.check_text('an agent''s name', coalesce(update_agent.name, a.name), 200),
         tenant = case when update_agent.tenant is not null
           then kakunin_private.check_text('a tenant', update_agent.tenant, 200) else a.tenant end,
         model = case when update_agent.model is not null
           then kakunin_private.check_text('a model', update_agent.model, 200) else a.model end,
         model_version = case when update_agent.model_version is not null
           then kakunin_private.check_text('a model''s version', update_agent.model_version, 200) else a.model_version end,
         model_hash = coalesce(v_hash, a.model_hash)
   where a.agent_id = update_agent.agent_id;
  -- What a certificate says of the agent is no longer so: RFC 5280 calls that affiliationChanged.
  select coalesce(array_agg(c.serial order by c.serial), '{}') into v_serials
    from kakunin_private.certificates c join kakunin_private.agents a on a.agent_id = c.agent_id
   where c.agent_id = update_agent.agent_id
     and coalesce(c.revoked_at > kakunin_private.clock(), true) and c.not_after >= kakunin_private.clock()
     and ((v_hash is not null and c.model_hash is distinct from v_hash)
          or (update_agent.model is not null and c.model is distinct from update_agent.model)
          or (update_agent.tenant is not null and c.tenant is distinct from update_agent.tenant));
  perform kakunin_private.record('agent.updated', update_agent.agent_id, jsonb_strip_nulls(jsonb_build_object(
    'name', update_agent.name, 'tenant', update_agent.tenant, 'model', update_agent.model,
    'model_version', update_agent.model_version, 'model_hash', v_hash)));
  perform kakunin_private.revoke(v_serials, 'affiliationChanged');
  return jsonb_build_object(
    'agent_id', update_agent.agent_id,
    'certificates_revoked', to_jsonb(v_serials),
    'next', case when cardinality(v_serials) > 0
      then 'The certificate named another model or tenant and is revoked. Certify the agent anew.' end);
end
$$;
comment on function kakunin.update_agent(uuid, text, text, text, text, text) is
  'Changes what is given; certificates that say otherwise of model, model hash or tenant are revoked with it. Returns agent_id, certificates_revoked and what to do next. For kakunin_registrar and kakunin_operator';

create function kakunin_private.lock_agent(p_agent_id uuid) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- Not FOR UPDATE: a transaction whose snapshot is older than what the one before it did would get that lock
  -- and not see what was done. After an update it fails (40001).
  update kakunin_private.agents a set name = a.name where a.agent_id = p_agent_id;
  perform kakunin_private.check_known_agent(p_agent_id);
end
$$;
comment on function kakunin_private.lock_agent(uuid) is
  'Takes the agent''s row: what decides about all of its certificates happens one after the other. KA010 when there is none';

-- Certificates ---------------------------------------------------------------------------------------

create function kakunin_private.limits() returns text[]
language sql immutable parallel safe
return '{max_single_trade_usd,daily_limit_usd,leverage_permitted,max_leverage_ratio,permitted_venues,permitted_instruments}'::text[];
comment on function kakunin_private.limits() is 'What a financial scope may have: the members that violations() enforces';

create function kakunin_private.unknown_limits(p_scope jsonb) returns text
language sql immutable parallel safe
return (
  select left(string_agg(to_jsonb(k)::text, ', ' order by k collate "C"), 300)
    from jsonb_object_keys(p_scope - kakunin_private.limits()) k);
comment on function kakunin_private.unknown_limits(jsonb) is 'The names in a financial scope that limit nothing, for a message; NULL when there are none';

-- A limit that is misspelt would be none. Asked where a scope comes in, and not by a constraint: rows that are there stay
-- loadable from a dump, and violations() lets them permit nothing.
create function kakunin_private.check_financial_scope(p_scope jsonb) returns jsonb
language plpgsql immutable parallel safe
as $$
declare
  c_what    constant text := 'the financial scope';
  v_unknown text;
begin
  if jsonb_typeof(p_scope) <> 'object' then
    perform kakunin_private.refuse(c_what, 'it is not a JSON object');
  end if;
  v_unknown := kakunin_private.unknown_limits(p_scope);
  if v_unknown is not null then
    perform kakunin_private.refuse(c_what, 'nothing enforces ' || v_unknown,
      format('It may have %s.', array_to_string(kakunin_private.limits(), ', ')));
  end if;
  return p_scope;
end
$$;
comment on function kakunin_private.check_financial_scope(jsonb) is
  'The scope, or KA010 when it is no object or has a member that nothing enforces; NULL for NULL';

create function kakunin_private.financial_scope(p_element bytea) returns jsonb
language plpgsql immutable parallel unsafe
as $$
begin
  return kakunin_private.check_financial_scope(kakunin_private.der_utf8(p_element, 'the financial scope')::jsonb);
exception
  -- no JSON, a number or a text jsonb cannot hold, nested too deep; an escape that 15 cannot convert to this encoding
  when invalid_text_representation or untranslatable_character or numeric_value_out_of_range or program_limit_exceeded
    or feature_not_supported then
    perform kakunin_private.refuse('the financial scope', 'it is not JSON that this database can hold');
    return null;
end
$$;
comment on function kakunin_private.financial_scope(bytea) is 'The financial scope in extension 1.3.6.1.4.1.61411.1.5; KA010 for anything else';

create function kakunin.register_certificate(der bytea, overlap interval default null) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what     constant text := 'the certificate';
  c_once     constant text := 'A serial is used once. Issue a new certificate.';
  v_now      constant timestamptz := kakunin_private.clock();
  v_read     kakunin_private.x509_certificate := kakunin_private.x509_read_certificate(register_certificate.der);
  v_issuer   kakunin_private.authorities := kakunin_private.issuer_of(v_read);
  v_value    bytea;
  v_parts    bytea[];
  v_urn      text collate "C";
  v_agent    kakunin_private.agents;
  v_model    text;
  v_hash     text collate "C";
  v_actions  text[] := '{}'::text[];
  v_tenant   text;
  v_scope    jsonb;
  v_overlap  double precision := extract(epoch from register_certificate.overlap)::double precision;
  v_active   text;
begin
  -- From here on it is known that the authority signed this; what follows is whether it may.
  perform kakunin_private.x509_check_critical(
    v_read.extensions, '{2.5.29.15,2.5.29.17,2.5.29.19,2.5.29.37}', c_what);
  if v_read.ca or coalesce(v_read.key_usage & 134, 0) <> 128 then  -- digitalSignature, and neither keyCertSign nor cRLSign
    perform kakunin_private.refuse(c_what, 'it is not one for signing alone (no cA; keyUsage digitalSignature without keyCertSign and cRLSign)');
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '2.5.29.37');
  if v_value is null
    or decode('06082b06010505070302', 'hex') <> all (kakunin_private.der_children(v_value, 48, 'extKeyUsage'))
    or exists (select from unnest(kakunin_private.der_children(v_value, 48, 'extKeyUsage')) e where get_byte(e, 0) <> 6) then
    perform kakunin_private.refuse(c_what, 'its extKeyUsage does not have clientAuth');
  end if;
  if v_read.not_after - v_read.not_before > interval '365 days' then
    perform kakunin_private.refuse(c_what, 'it is valid for more than 365 days');
  end if;
  if v_read.not_after < v_now then
    perform kakunin_private.refuse(c_what, 'it has expired', 'Issue a new one.');
  end if;

  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.1');
  if v_value is null then
    perform kakunin_private.refuse(c_what, 'it names no agent (extension 1.3.6.1.4.1.61411.1.1)');
  end if;
  v_urn := kakunin_private.der_utf8(v_value, 'the agent''s name');
  if v_urn !~ '^urn:kakunin:agent:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then
    perform kakunin_private.refuse('the agent''s name', 'it is not urn:kakunin:agent:<uuid> in lower case');
  end if;
  -- A reader of the alternative names must not find another agent there.
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '2.5.29.17');
  if v_value is not null and exists (
    select from unnest(kakunin_private.der_children(v_value, 48, 'subjectAltName')) n
     -- [0] and [4] are constructed, the others not; [6] is uniformResourceIdentifier. [3] and [5] nobody reads.
     where get_byte(n, 0) not in (160, 129, 130, 164, 134, 135, 136)
        or (get_byte(n, 0) = 134
            and kakunin_private.der_content(n, 134, 'subjectAltName') <> convert_to(v_urn, 'UTF8'))) then
    perform kakunin_private.refuse('subjectAltName', 'its URI is not the agent''s name, or it has what is no name');
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.2');
  if v_value is not null then
    v_parts := kakunin_private.der_children(v_value, 48, 'the model');
    if cardinality(v_parts) <> 2 then
      perform kakunin_private.refuse('the model', 'it is not a name and a hash');
    end if;
    v_model := kakunin_private.check_text('a model', kakunin_private.der_utf8(v_parts[1], 'the model'), 200);
    v_hash := kakunin_private.check_model_hash(kakunin_private.der_utf8(v_parts[2], 'the model hash'));
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.3');
  if v_value is not null then
    v_parts := kakunin_private.der_children(v_value, 48, 'the permitted actions');
    if cardinality(v_parts) > 256 then
      perform kakunin_private.refuse('the list of permitted actions', 'there are more than 256 of them');
    end if;
    select coalesce(array_agg(kakunin_private.der_utf8(p, 'a permitted action') order by n), '{}') into v_actions
      from unnest(v_parts) with ordinality as u(p, n);
    if exists (select from unnest(v_actions) a
                where a collate "C" !~ '^[A-Za-z0-9_.:/-]{1,128}$' and a collate "C" !~ '^[A-Za-z0-9_.:/-]{1,126}:[*]$') then
      perform kakunin_private.refuse('a permitted action',
        'it is not 1 to 128 characters from A-Z a-z 0-9 _ . : / -',
        'Only a whole last part may be a star, as in trade:*.');
    end if;
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.4');
  if v_value is not null then
    v_tenant := kakunin_private.check_text('a tenant', kakunin_private.der_utf8(v_value, 'the tenant'), 200);
  end if;
  v_value := kakunin_private.x509_extension_value(v_read.extensions, '1.3.6.1.4.1.61411.1.5');
  if v_value is not null then
    v_scope := kakunin_private.financial_scope(v_value);
  end if;

  -- The agent's row is locked, so that of two certificates at once the second finds the first.
  perform kakunin_private.lock_agent(right(v_urn, 36)::uuid);
  select * into strict v_agent from kakunin_private.agents a where a.agent_id = right(v_urn, 36)::uuid;
  if v_agent.suspended_at is not null then
    raise exception using errcode = 'KA008',
      message = format('agent %s is suspended: %s', v_agent.agent_id, v_agent.suspended_reason),
      hint = 'After review, an operator lifts it with kakunin.reinstate_agent(); then register the certificate.';
  end if;
  if v_agent.model_hash <> coalesce(v_hash, '') or v_agent.model <> v_model or v_agent.tenant is distinct from v_tenant then
    perform kakunin_private.refuse(c_what, 'its model, its model hash or its tenant is not the agent''s',
      'Certify the agent as it is now, or change it with kakunin.update_agent().');
  end if;
  -- In seconds: months and days compare as if a month had 30 of them, and add as what they are.
  if v_overlap not between 0 and 30 * 86400 then
    raise exception using errcode = 'KA010', message = 'an overlap is 0 to 30 days';
  end if;
  -- The first question, because a certificate given twice is its agent's active one as well; asked again below.
  if exists (select from kakunin_private.certificates c where c.serial = v_read.serial) then
    perform kakunin_private.refuse(c_what, format('serial %s is registered already', v_read.serial), c_once);
  end if;
  select c.serial into v_active from kakunin_private.certificates c
   where c.agent_id = v_agent.agent_id and c.revoked_at is null and c.not_after >= v_now;
  if found and register_certificate.overlap is null then
    perform kakunin_private.refuse(c_what, format('agent %s has an active one already, %s', v_agent.agent_id, v_active),
      'Revoke that, or give the overlap after which it is superseded.');
  end if;
  -- What an authority issued and nobody registered cannot be revoked. So once a later one is here, or was, it is too late.
  if exists (select from kakunin_private.certificates c
              where c.agent_id = v_agent.agent_id and least(c.not_before, c.registered_at) > v_read.not_before) then
    perform kakunin_private.refuse(c_what, format('agent %s has been given a later one already', v_agent.agent_id),
      'Issue a new one.');
  end if;
  if exists (select from kakunin_private.authorities a where a.public_key_modulus = v_read.modulus)
    or exists (select from kakunin_private.certificates c
                where c.public_key_modulus = v_read.modulus and c.revocation_reason = 'keyCompromise')
    or exists (select from kakunin_private.ledger_keys k where k.public_key_modulus = v_read.modulus) then
    perform kakunin_private.refuse(c_what, 'its key is an authority''s, or the ledger''s, or one that was compromised', 'Make a new key.');
  end if;
  insert into kakunin_private.certificates
    (serial, agent_id, issuer_key_id, der, public_key_modulus, not_before, not_after,
     model, model_hash, permitted_actions, tenant, financial_scope, registered_by)
  values
    (v_read.serial, v_agent.agent_id, v_issuer.key_id, register_certificate.der, v_read.modulus, v_read.not_before, v_read.not_after,
     v_model, v_hash, v_actions, v_tenant, v_scope, session_user)
  on conflict on constraint certificates_pkey do nothing;  -- the same serial for another agent, at this moment
  if not found then
    perform kakunin_private.refuse(c_what, format('serial %s is registered already', v_read.serial), c_once);
  end if;
  perform kakunin_private.record('certificate.issued', v_agent.agent_id, jsonb_build_object(
    'serial', v_read.serial, 'sha256', encode(sha256(register_certificate.der), 'hex'), 'issuer_key_id', v_issuer.key_id,
    'not_after', kakunin_private.rfc3339(v_read.not_after)));
  if v_active is not null then
    perform kakunin_private.revoke(
      array[v_active], 'superseded', greatest(v_now, v_read.not_before) + make_interval(secs => v_overlap));
  end if;
  return v_read.serial;
end
$$;
comment on function kakunin.register_certificate(bytea, interval) is
  'Registers a certificate (DER) that a trusted authority signed and returns its serial; all it says is read from what was signed. With an overlap (0 to 30 days) the agent''s active certificate is superseded after it. For kakunin_registrar';

-- Verification -----------------------------------------------------------------------------------------

create function kakunin_private.certificate_status(
  p_serial text, p_revoked_at timestamptz, p_not_before timestamptz, p_not_after timestamptz,
  p_agent_id uuid, p_suspended_at timestamptz
) returns text
language sql volatile parallel safe
return case
  when exists (select from kakunin_private.risk_stops r where r.agent_id = p_agent_id) then 'revoked'
  when kakunin_private.is_usable(p_serial, p_revoked_at, p_not_before, p_not_after, p_agent_id, p_suspended_at) then 'active'
  when p_revoked_at <= kakunin_private.clock() then 'revoked'
  when kakunin_private.clock() < p_not_before then 'not_yet_valid'
  when kakunin_private.clock() > p_not_after then 'expired'
  when p_suspended_at is not null or kakunin_private.is_stopped(p_agent_id::text) then 'suspended'
  else 'revoked'  -- since the snapshot
end;
comment on function kakunin_private.certificate_status(text, timestamptz, timestamptz, timestamptz, uuid, timestamptz) is
  'active where is_usable(), otherwise what it is instead: revoked, not_yet_valid, expired or suspended';

create function kakunin.verify_certificate(serial text) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(verify_certificate.serial);
begin
  perform kakunin_private.check_replica();
  return coalesce((
    select jsonb_build_object(
             'serial_number', c.serial,
             'valid', s.status = 'active',
             'status', s.status,
             'agent_id', a.agent_id,
             'agent_name', a.name,
             'tenant', c.tenant,
             'model', c.model,
             'model_hash', c.model_hash,
             'permitted_actions', to_jsonb(c.permitted_actions),
             'financial_scope', c.financial_scope,
             'not_before', c.not_before,
             'not_after', c.not_after,
             'revoked_at', c.revoked_at,
             'revocation_reason', c.revocation_reason,
             'issuer_key_id', c.issuer_key_id)
      from kakunin_private.certificates c
      join kakunin_private.agents a on a.agent_id = c.agent_id
      cross join lateral (select kakunin_private.certificate_status(
        c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at) as status) s
     where c.serial = v_serial),
    jsonb_build_object('serial_number', v_serial, 'valid', false, 'status', 'unknown'));
end
$$;
comment on function kakunin.verify_certificate(text) is
  'Whether a certificate may be used now (valid), its status (active, revoked, expired, not_yet_valid, suspended, unknown), and what it says of its agent. For all the kit''s roles';

create function kakunin.certificate_der(serial text) returns bytea
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(certificate_der.serial);
begin
  return (select c.der from kakunin_private.certificates c where c.serial = v_serial);
end
$$;
comment on function kakunin.certificate_der(text) is
  'A registered certificate, whatever its status, or NULL: for who checks signatures of its key outside the database. For all the kit''s roles';

create function kakunin.verify_message(serial text, payload bytea, signature bytea) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_certificate jsonb := kakunin.verify_certificate(verify_message.serial);
  v_modulus     bytea;
  v_genuine     boolean := false;
begin
  if payload is null or signature is null then
    raise exception using errcode = 'KA010', message = 'a payload and its signature are both needed';
  end if;
  select c.public_key_modulus into v_modulus from kakunin_private.certificates c
   where c.serial = v_certificate ->> 'serial_number';
  if found then
    v_genuine := kakunin_private.rsa_pkcs1_sha256_verify(v_modulus, 65537, payload, signature);
  end if;
  return jsonb_build_object(
    'valid', v_genuine and (v_certificate -> 'valid')::boolean,
    'signature_valid', v_genuine,
    'certificate_status', v_certificate -> 'status',
    'certificate_serial', v_certificate -> 'serial_number',
    'agent_id', v_certificate -> 'agent_id',
    'agent_name', v_certificate -> 'agent_name',
    'model_hash', v_certificate -> 'model_hash');
end
$$;
comment on function kakunin.verify_message(text, bytea, bytea) is
  'Whether the agent''s key signed the payload (RSASSA-PKCS1-v1_5, SHA-256) and its certificate may be used now: valid is both. For all the kit''s roles';

-- What an operator looks up before naming an agent or a serial. Plain views: they read the private tables
-- with their owner's rights, and only the roles they are granted to can read them.
create view kakunin.agents with (security_barrier = true) as
  select a.agent_id, a.name, a.tenant, a.model, a.model_version, a.model_hash,
         a.created_at, a.suspended_at, a.suspended_reason
    from kakunin_private.agents a;
comment on view kakunin.agents is 'Agents, and whether they are suspended. For kakunin_registrar, kakunin_operator, kakunin_auditor';

create view kakunin.certificates with (security_barrier = true) as
  select c.serial, c.agent_id, c.issuer_key_id, c.not_before, c.not_after, c.model, c.model_hash, c.permitted_actions,
         c.tenant, c.financial_scope, c.registered_at, c.registered_by, c.revoked_at, c.revocation_reason, c.der
    from kakunin_private.certificates c;
comment on view kakunin.certificates is 'Registered certificates. For kakunin_registrar, kakunin_operator, kakunin_auditor';

create view kakunin.authorities with (security_barrier = true) as
  select a.key_id, a.issuer_key_id, a.serial, a.not_before, a.not_after, a.path_length,
         a.trusted_at, a.trusted_by, a.distrusted_at, a.distrust_reason, a.der
    from kakunin_private.authorities a;
comment on view kakunin.authorities is 'Pinned certificate authorities, for whoever builds a chain. For all the kit''s roles';

-- Sessions: how a connection proves which certificate it works for, and how policies ask.
--
-- Every policy asks one function, current_cert_serial(). It answers NULL unless the session carries a
-- binding that this database made, for this backend and this transaction, and the certificate behind it
-- may be used at this moment. There are three ways to get a binding:
--
--   Proof.    The agent signs a JWT assertion (RFC 7523) with its certificate's key. open_session()
--             verifies the RSA signature and gives a ticket; bind_session(ticket) runs at the start of
--             every transaction and costs microseconds. This is the way for direct connections: it holds
--             against an agent that sends any SQL it likes.
--   Gateway.  bind_serial(serial), for server code that has verified its caller by other means. Whoever
--             may call it can become any agent: never grant kakunin_gateway to a login that runs SQL an
--             agent wrote.
--   Claims.   PostgREST verifies a JWT and puts its claims into request.jwt.claims. Anybody can set that
--             setting, so it is believed only where session_user is a configured gateway login, and where
--             that login is hooked, only by pre_request() before the request's own SQL (46_postgrest.sql).
--
-- A ticket is    kkn1.<key>.<serial>.<issued>.<expires>.<mac>             (times in seconds since 1970)
-- A binding is        <key>|<serial>|<x or s>|<expires>|<mac>             in the setting kakunin.session
--
-- Both MACs are HMAC-SHA256 under a key in session_keys. What they cover is more than what is written: the
-- login and the database; the binding's also the backend's pid and, with x, the transaction's start. So a
-- ticket is no use to another login, and a binding copied out of current_setting() is no use to another
-- backend or a later transaction. A binding with s is for autocommit connections: it lasts for the session,
-- but never longer than its ticket.
--
-- A transaction is told by its backend and its start time. Several transactions packed into one
-- simple-query message share that start, so whoever sent that one message could keep its binding from one
-- to the next; it held the ticket anyhow, and the next message starts another time.
--
-- Revocation does not wait for any of these to expire: the certificate is looked up again by
-- every statement.

create table kakunin_private.session_keys (
  key_id      text collate "C" primary key check (key_id ~ '^[0-9]{1,10}$'),
  inner_pad   bytea not null check (octet_length(inner_pad) = 64),
  outer_pad   bytea not null check (octet_length(outer_pad) = 64),
  created_at  timestamptz not null,
  valid_until timestamptz
);
-- At most one key makes new MACs; two rotations at once cannot both leave theirs.
create unique index session_keys_current on kakunin_private.session_keys ((true)) where valid_until is null;
comment on table kakunin_private.session_keys is
  'HMAC keys of tickets and bindings. The key without valid_until signs; the others only verify, until then';
comment on column kakunin_private.session_keys.inner_pad is
  'The key xor 0x36.. (RFC 2104 ipad), kept instead of the key so that a MAC is two sha256() calls';
comment on column kakunin_private.session_keys.outer_pad is 'The key xor 0x5c.. (RFC 2104 opad)';

create sequence kakunin_private.session_key_ids;
comment on sequence kakunin_private.session_key_ids is 'Never gives a key id twice, so an old ticket cannot meet a new key';

create table kakunin_private.used_assertions (
  serial     text collate "C" not null,
  jti        text collate "C" not null,
  expires_at timestamptz not null,
  primary key (serial, jti)
);
create index used_assertions_expires_at on kakunin_private.used_assertions (expires_at);
comment on table kakunin_private.used_assertions is
  'The jti of every assertion exchanged, until it has expired: a second exchange is a replay';

create table kakunin_private.gateway_logins (login name primary key, hooked boolean not null default false);
comment on table kakunin_private.gateway_logins is
  'Logins whose request.jwt.claims are believed, because only PostgREST connects as them';
comment on column kakunin_private.gateway_logins.hooked is
  'Believed by pre_request() alone: what SQL of the request sets later is not';

-- As text, and not cast: the planner may work an expression out before the MAC in front of it is checked,
-- and what a caller wrote need not be a number.
create function kakunin_private.is_future(p_seconds text) returns boolean
language sql volatile parallel safe
return lpad(p_seconds, 12, '0') > lpad(floor(extract(epoch from kakunin_private.clock()))::text, 12, '0') collate "C";
comment on function kakunin_private.is_future(text) is 'Whether whole seconds since 1970, as we wrote them, are yet to come';

create function kakunin_private.key_is_good(p_key_id text, p_valid_until timestamptz) returns boolean
language sql volatile parallel safe
return coalesce(p_valid_until > kakunin_private.clock(), true)
  and (kakunin_private.snapshot_is_fresh() or not kakunin_private.is_stopped('key ' || p_key_id));
comment on function kakunin_private.key_is_good(text, timestamptz) is 'Whether what this key has signed still counts';

create function kakunin_private.session_mac(p_inner bytea, p_outer bytea, p_message text) returns text
language sql stable strict parallel safe
return encode(sha256(p_outer || sha256(p_inner || convert_to(p_message, 'UTF8'))), 'hex');
comment on function kakunin_private.session_mac(bytea, bytea, text) is 'HMAC-SHA256 (RFC 2104) in hexadecimal, from the pads that session_keys keeps';

-- The login and the database come first, and quoted: neither a name with a bar in it nor what
-- a caller puts into the rest can make one message read as another. One concat_ws() for all, because every
-- operator of an expression costs something each time a transaction first uses it.
create function kakunin_private.ticket_context(p_body text) returns text
language sql stable parallel restricted
return concat_ws('|', 'ticket', quote_literal(session_user), quote_literal(current_database()), p_body);
comment on function kakunin_private.ticket_context(text) is
  'What a ticket''s MAC covers: its text, the login it was issued to and the database';

create function kakunin_private.binding_context(p_body text, p_is_local boolean) returns text
language sql stable parallel restricted
return concat_ws('|', 'binding', quote_literal(session_user), quote_literal(current_database()), p_body, pg_backend_pid(),
  case when p_is_local then extract(epoch from transaction_timestamp()) end);
comment on function kakunin_private.binding_context(text, boolean) is
  'What a binding''s MAC covers: its text, this backend, this transaction (or the session), login and database';

-- The next three are written to be inlined into a statement that reads the key from its table (not STRICT,
-- and no argument dear enough to be kept apart). That is for more than speed: a key must never be in a
-- PL/pgSQL variable. The planner puts variables into plans as constants, and anybody can have plans
-- printed (debug_print_plan, client_min_messages = log).
create function kakunin_private.make_binding(p_inner bytea, p_outer bytea, p_body text, p_is_local boolean) returns text
language sql stable parallel restricted
return p_body || '|' || kakunin_private.session_mac(
  p_inner, p_outer, kakunin_private.binding_context(p_body, p_is_local));
comment on function kakunin_private.make_binding(bytea, bytea, text, boolean) is 'The binding: p_body and its MAC';

-- Both sides of a comparison are hashed once more: that leaves no prefix to guess by timing.
create function kakunin_private.binding_is_genuine(p_inner bytea, p_outer bytea, p_binding text) returns boolean
language sql stable parallel restricted
return sha256(convert_to(p_binding, 'UTF8')) = sha256(convert_to(
  kakunin_private.make_binding(
    p_inner, p_outer, left(p_binding, -65), split_part(p_binding, '|', 3) <> 's'), 'UTF8'));
comment on function kakunin_private.binding_is_genuine(bytea, bytea, text) is
  'Whether the key made this binding for this backend, login and transaction. Says nothing of its expiry';

create function kakunin_private.ticket_is_genuine(p_inner bytea, p_outer bytea, p_ticket text) returns boolean
language sql stable parallel restricted
return sha256(convert_to(p_ticket, 'UTF8')) = sha256(convert_to(
  left(p_ticket, -65) || '.' || kakunin_private.session_mac(
    p_inner, p_outer, kakunin_private.ticket_context(left(p_ticket, -65))), 'UTF8'));
comment on function kakunin_private.ticket_is_genuine(bytea, bytea, text) is
  'Whether the key made this ticket for this login. Says nothing of its expiry';

create function kakunin_private.new_session_key() returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- Core has no random bytes, but gen_random_uuid() draws 122 bits from the server's strong source. All in
  -- one statement, so that the key is never in a variable.
  insert into kakunin_private.session_keys (key_id, inner_pad, outer_pad, created_at)
  select nextval('kakunin_private.session_key_ids')::text,
         string_agg(set_byte(E'\\x00', 0, b.byte # 54), '' order by b.at),  -- ipad, 0x36
         string_agg(set_byte(E'\\x00', 0, b.byte # 92), '' order by b.at),  -- opad, 0x5c
         kakunin_private.clock()
    from (
      select i.at, case when i.at < 32 then get_byte(r.key, i.at) else 0 end as byte
        from (select sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
                         || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())) as key offset 0) r,
             generate_series(0, 63) as i(at)) b;
end
$$;
comment on function kakunin_private.new_session_key() is 'Adds the key that signs from now on';

do $$ begin perform kakunin_private.new_session_key(); end $$;

create function kakunin_private.no_session_key() returns void
language plpgsql volatile parallel safe
as $$
begin
  raise exception using errcode = 'KA004',
    message = format('the session key was rotated after this %s transaction took its snapshot',
      current_setting('transaction_isolation')),
    hint = 'Begin another transaction.';
end
$$;
comment on function kakunin_private.no_session_key() is 'Raises KA004: the key this snapshot shows has been retired';

create function kakunin.rotate_session_key(grace interval default '1 hour') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now timestamptz := kakunin_private.clock();
begin
  if rotate_session_key.grace is null
    or rotate_session_key.grace < interval '0' or rotate_session_key.grace > interval '1 day' then
    raise exception using errcode = 'KA010',
      message = 'the grace of a session key is 0 to 24 hours',
      hint = 'Tickets live 5 minutes; open transactions keep their binding for the grace. Give 0 if the key may be known.';
  end if;
  -- Serialises rotations; SHARE ROW EXCLUSIVE conflicts with itself and lets readers through.
  lock table kakunin_private.session_keys in share row exclusive mode;
  perform kakunin_private.stop('key ' || k.key_id) from kakunin_private.session_keys k where k.valid_until <= v_now;
  delete from kakunin_private.session_keys k where k.valid_until <= v_now;
  -- least(): a rotation with a shorter grace also shortens that of the keys before.
  update kakunin_private.session_keys k
     set valid_until = least(coalesce(k.valid_until, 'infinity'), v_now + rotate_session_key.grace);
  perform kakunin_private.stop('key ' || k.key_id) from kakunin_private.session_keys k where k.valid_until <= v_now;
  perform kakunin_private.new_session_key();
  perform kakunin_private.record('key.rotated', null, jsonb_build_object('key', 'session', 'grace', rotate_session_key.grace::text));
end
$$;
comment on function kakunin.rotate_session_key(interval) is
  'Makes a new session key; what the old one signed stays good for the grace, or for nothing at 0. For kakunin_operator';

create function kakunin.renew_installation() returns uuid
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '5s'  -- appends queue up behind reseal()
as $$
declare
  v_before constant uuid := kakunin.installation_id();
begin
  update kakunin_private.installation set installation_id = gen_random_uuid();
  perform kakunin.rotate_session_key('0');
  perform kakunin_private.reseal();
  perform kakunin_private.record('installation.renewed', null, jsonb_build_object('before', v_before));
  return kakunin.installation_id();
end
$$;
comment on function kakunin.renew_installation() is
  'For a copy of a database: a new installation id and session key, so that no assertion, ticket or binding is good in both. Returns the id. For the owner alone';

create function kakunin.set_gateway_logins(logins name[], hooked name[] default '{}') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_unknown name;
begin
  select l into v_unknown from unnest(set_gateway_logins.logins) l
   where l is null or not exists (select from pg_roles r where r.rolname = l and r.rolcanlogin) limit 1;
  if found or set_gateway_logins.logins is null then
    raise exception using errcode = 'KA010',
      message = format('%s is not a role that can log in', coalesce(quote_ident(v_unknown), 'NULL')),
      hint = 'Name the logins PostgREST connects as, such as authenticator, or give an empty array.';
  elsif set_gateway_logins.hooked is null or not set_gateway_logins.hooked <@ set_gateway_logins.logins then
    raise exception using errcode = 'KA010',
      message = 'the hooked logins are some of the gateway logins',
      hint = 'Hooked are those whose PostgREST has db-pre-request = kakunin.pre_request.';
  end if;
  delete from kakunin_private.gateway_logins;
  insert into kakunin_private.gateway_logins
  select distinct l, l = any (set_gateway_logins.hooked) from unnest(set_gateway_logins.logins) l;
  perform kakunin_private.record('settings.changed', null, jsonb_build_object(
    'gateway_logins', to_jsonb(set_gateway_logins.logins), 'hooked', to_jsonb(set_gateway_logins.hooked)));
end
$$;
comment on function kakunin.set_gateway_logins(name[], name[]) is
  'Sets the logins whose request.jwt.claims are believed, and which of them only by pre_request(). For the owner alone: who may call this can become any agent';

create function kakunin.set_replica_lag(max_lag interval) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if set_replica_lag.max_lag < interval '5 seconds' or set_replica_lag.max_lag > interval '1 day' then
    raise exception using errcode = 'KA010',
      message = 'the limit of a standby''s lag is 5 seconds to 1 day, or NULL',
      hint = 'A worker commits every two seconds on an idle primary; a shorter limit would close what is up to date.';
  end if;
  update kakunin_private.replicas r set max_lag = set_replica_lag.max_lag;
  perform kakunin_private.record('settings.changed', null, jsonb_build_object('max_lag', set_replica_lag.max_lag::text));
end
$$;
comment on function kakunin.set_replica_lag(interval) is
  'Sets how far behind a standby may be that answers agents (1 minute at first): beyond it they see no row there, and KA012. NULL: any lag will do. For kakunin_operator';

-- Reading a binding ---------------------------------------------------------------------------------

create function kakunin_private.serial_from_claims(p_claims text) returns text
language plpgsql stable parallel restricted
as $$
declare
  v_serial text;
begin
  if p_claims is null or p_claims = ''
    or not exists (select from kakunin_private.gateway_logins g where g.login = session_user and not g.hooked) then
    return null;
  end if;
  -- No EXCEPTION block: a policy may call this in parallel mode, where Postgres before 17 has no
  -- subtransactions. PostgREST writes valid JSON; what is not ends the statement.
  v_serial := p_claims::json ->> 'kakunin_cert_serial';
  return case when v_serial is not null then kakunin.normalize_serial(v_serial) end;
end
$$;
comment on function kakunin_private.serial_from_claims(text) is
  'The kakunin_cert_serial claim, where session_user is a configured gateway login that is not hooked; otherwise NULL';

-- A binding is at most 250 characters; a longer one is refused before any work is spent on it.
create function kakunin_private.bound_serial() returns text
language plpgsql stable parallel restricted
as $$
declare
  v_binding text collate "C" := current_setting('kakunin.session', true);
begin
  if v_binding <> '' then
    return (
      select split_part(v_binding, '|', 2)
        from kakunin_private.session_keys k
       where octet_length(v_binding) <= 250
         and k.key_id = split_part(v_binding, '|', 1)
         and kakunin_private.key_is_good(k.key_id, k.valid_until)
         and kakunin_private.binding_is_genuine(k.inner_pad, k.outer_pad, v_binding)
         and (split_part(v_binding, '|', 3) = 'x' or kakunin_private.is_future(split_part(v_binding, '|', 4))));
  end if;
  return kakunin_private.serial_from_claims(current_setting('request.jwt.claims', true));
end
$$;
comment on function kakunin_private.bound_serial() is
  'The serial this session is bound to, whatever the state of the certificate; NULL without a binding that verifies';

-- Which backend is bound to what, for halt_agent(terminate => true): an advisory lock of the transaction. The
-- agent's SQL cannot let go of it but by rolling back to a savepoint, and may then put the binding back, which it
-- can read. So current_cert_serial() takes the lock too: what a transaction has read or written as an agent, and
-- not undone, it holds the lock for. Its second number is a hash of the serial. The first is one that nobody
-- else can tell beforehand, to hold the lock and so keep a binding from being made.
create function kakunin_private.mark_bound(p_binding text, p_serial text) returns boolean
language sql volatile parallel restricted
return pg_try_advisory_xact_lock_shared(
  hashtext(p_binding collate "C") # timestamp_hash(transaction_timestamp() at time zone interval '0'), hashtext(p_serial collate "C"));
comment on function kakunin_private.mark_bound(text, text) is 'Marks this transaction as bound to the serial; false where another session holds the lock';

create type kakunin_private.bound as (
  serial text, agent_id uuid, financial_scope jsonb, risk_exempt boolean, risk_factor double precision, risk_epoch integer
);
comment on type kakunin_private.bound is 'What a session is bound to, and what scoring its events needs';

-- The certificate behind a binding, if the binding is genuine and the certificate may be used now; no row otherwise.
-- bound_serial() and is_usable() in one, written to be inlined: every statement on a protected table pays for this, and
-- a second query would double that.
create function kakunin_private.bound_certificate(p_binding text) returns setof kakunin_private.bound
language sql stable parallel restricted rows 1
begin atomic
  select c.serial, c.agent_id, c.financial_scope, a.risk_exempt, a.risk_factor, a.risk_epoch
    from kakunin_private.session_keys k
    join kakunin_private.certificates c on c.serial = split_part(p_binding, '|', 2)
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where octet_length(p_binding) <= 250
     and k.key_id = split_part(p_binding, '|', 1)
     and kakunin_private.key_is_good(k.key_id, k.valid_until)
     and kakunin_private.binding_is_genuine(k.inner_pad, k.outer_pad, p_binding)
     and (split_part(p_binding, '|', 3) = 'x' or kakunin_private.is_future(split_part(p_binding, '|', 4)))
     and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
     and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
     and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id);
end;
comment on function kakunin_private.bound_certificate(text) is
  'Serial and agent of a binding that this session may use now. Whoever believes it marks the transaction: mark_bound()';

create function kakunin_private.usable_serial(p_serial text) returns setof text
language sql stable parallel restricted rows 1
begin atomic
  select c.serial
    from kakunin_private.certificates c
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where c.serial = p_serial
     and kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
     and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
     and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id);
end;
comment on function kakunin_private.usable_serial(text) is 'The serial, in its canonical form, if its certificate may be used now; no row otherwise. Inlined';

create function kakunin.current_cert_serial() returns text
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_binding text collate "C" := current_setting('kakunin.session', true);
  v_claims  text collate "C";
  v_serial  text collate "C";
begin
  if v_binding <> '' then
    return (
      select case when kakunin_private.mark_bound(v_binding, b.serial) then b.serial end
        from kakunin_private.bound_certificate(v_binding) b);
  end if;
  v_claims := current_setting('request.jwt.claims', true);
  if v_claims is null or strpos(v_claims, 'kakunin_cert_serial') = 0 then
    return null;
  end if;
  -- As almost every claim is: the canonical serial, in one statement. Claims are read as JSON only where the login is one that is believed.
  v_serial := (
    select u.serial
      from kakunin_private.gateway_logins g,
           kakunin_private.usable_serial(case when g.login = session_user then v_claims::json ->> 'kakunin_cert_serial' end) u(serial)
     where g.login = session_user and not g.hooked);
  if v_serial is not null then
    return v_serial;
  end if;
  v_serial := kakunin_private.serial_from_claims(v_claims);
  if v_serial is null then
    return null;
  end if;
  return (select u.serial from kakunin_private.usable_serial(v_serial) u(serial));
end
$$;
comment on function kakunin.current_cert_serial() is
  'The serial bound to this session if its certificate may be used now, otherwise NULL. In a policy write (select kakunin.current_cert_serial()), which runs once a statement. For kakunin_agent and kakunin_gateway';

create function kakunin.current_agent_id() returns uuid
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.current_cert_serial();
begin
  return (select c.agent_id from kakunin_private.certificates c where c.serial = v_serial);
end
$$;
comment on function kakunin.current_agent_id() is
  'The agent of the certificate bound to this session, or NULL as current_cert_serial(). For kakunin_agent and kakunin_gateway; views call it for kakunin_operator and kakunin_auditor';

create function kakunin.has_scope(scope text) returns boolean
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.current_cert_serial();
  v_scope  text collate "C" := scope;
begin
  -- Exact, or prefix:* in the certificate; never a substring.
  return exists (
    select from kakunin_private.certificates c, unnest(c.permitted_actions) p
     where c.serial = v_serial
       and (p = v_scope
            or (right(p, 2) = ':*' and starts_with(v_scope, left(p, -1)) and length(v_scope) >= length(p))));
end
$$;
comment on function kakunin.has_scope(text) is
  'Whether the bound certificate permits the action, exactly or by prefix:*; false without a binding. For kakunin_agent and kakunin_gateway';

create function kakunin.require_session() returns text
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin_private.bound_serial();
begin
  if v_serial is null then
    raise exception using errcode = 'KA004',
      message = 'no certificate is bound to this session',
      hint = 'Bind one in this transaction with kakunin.bind_session(ticket).';
  end if;
  perform kakunin_private.check_certificate(v_serial);
  return v_serial;
end
$$;
comment on function kakunin.require_session() is
  'current_cert_serial(), but where that is NULL the named error says why: KA004, KA001, KA002, KA003, KA008 or KA012. For kakunin_agent and kakunin_gateway';

create function kakunin.require_scope(scope text) returns boolean
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.require_session();
begin
  if not kakunin.has_scope(require_scope.scope) then
    raise exception using errcode = 'KA005',
      message = format('certificate %s does not permit %s', v_serial, coalesce(quote_literal(left(require_scope.scope, 128)), 'NULL')),
      hint = 'Have the agent certified for this action, or do not attempt it.';
  end if;
  return true;
end
$$;
comment on function kakunin.require_scope(text) is
  'True where has_scope() is; otherwise raises KA005, or what require_session() raises. For policies that refuse aloud. For kakunin_agent and kakunin_gateway';

-- Making a binding ----------------------------------------------------------------------------------

create function kakunin_private.claims_object(p_claims text) returns jsonb
language plpgsql immutable strict parallel unsafe
as $$
declare
  v_object jsonb := '{}'::jsonb;
begin
  if jsonb_typeof(p_claims::jsonb) = 'object' then
    v_object := p_claims::jsonb;
  end if;
  return v_object;
exception
  when others then return '{}'::jsonb;
end
$$;
comment on function kakunin_private.claims_object(text) is 'The claims as an object; an empty one when the text is not a JSON object';

-- For policies that read the claim, as the product's first ones did. Other claims of the transaction are
-- kept. On a direct connection such a policy can be forged; current_cert_serial() does not read this there.
create function kakunin_private.claims_with(p_claims text, p_serial text) returns text
language sql stable parallel unsafe
return case when p_claims <> '' then (kakunin_private.claims_object(p_claims)
    || jsonb_build_object('kakunin_cert_serial', p_serial))::text
  else '{"kakunin_cert_serial":"' || p_serial || '"}' end;
comment on function kakunin_private.claims_with(text, text) is 'These claims, with kakunin_cert_serial set to the serial';

-- Reads no catalog that databases share: locking one takes room in the lock table, and an agent may have used it up.
create function kakunin_private.bound_backends(p_serials text[]) returns integer[]
language sql stable parallel restricted
return coalesce((
  select array_agg(distinct l.pid)
    from pg_locks l, unnest(p_serials) s
   where l.locktype = 'advisory' and l.objsubid = 2 and l.mode = 'ShareLock' and l.granted
     and l.database = (select o.database from pg_locks o
                        where o.pid = pg_backend_pid() and o.locktype = 'relation' and o.relation = 'pg_locks'::regclass)
     and l.pid <> pg_backend_pid()
     and l.objid = (hashtext(s collate "C")::bigint & 4294967295)::oid), '{}');
comment on function kakunin_private.bound_backends(text[]) is 'Other backends whose transaction or session is bound to one of these serials';

-- The lock of a session cannot be protected from its own SQL, and need not be drawn anew: taken once, at 0.
create function kakunin_private.mark_session(p_serial text, p_bound boolean) returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_lock constant integer := hashtext(p_serial collate "C");
  v_held constant boolean := exists (
    select from pg_locks l
     where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 2 and l.classid = 0::oid
       and l.objid = (v_lock::bigint & 4294967295)::oid and l.granted);
begin
  if p_bound and not v_held then
    perform pg_try_advisory_lock_shared(0, v_lock);
  elsif v_held and not p_bound then
    perform pg_advisory_unlock_shared(0, v_lock);
  end if;
end
$$;
comment on function kakunin_private.mark_session(text, boolean) is 'Takes, or lets go of, the lock of a session-scoped binding';

create function kakunin_private.not_marked() returns text
language plpgsql stable parallel restricted
as $$
begin
  raise exception using errcode = 'KA004',
    message = format('the lock that marks a binding of backend %s is held by another one', pg_backend_pid()),
    hint = 'Bind again.';
end
$$;
comment on function kakunin_private.not_marked() is 'Raises KA004: the binding could not be marked, which takes a collision of random numbers';

-- One expression that reads no table: evaluated without the cost of a statement, a third of the whole here.
create function kakunin_private.bind(p_serial text, p_binding text, p_is_local boolean) returns text
language plpgsql volatile parallel unsafe
as $$
begin
  if not p_is_local then
    if exists (select from kakunin_private.gateway_logins g where g.login = session_user) then
      raise exception using errcode = 'KA010',
        message = format('a session of %s is not bound beyond a transaction: others use it next', quote_ident(session_user)),
        hint = 'Bind each transaction: kakunin.bind_session(ticket).';
    end if;
    perform kakunin_private.mark_session(p_serial, true);
  end if;
  return case when
    kakunin_private.mark_bound(p_binding, p_serial)
    and set_config('kakunin.session', p_binding, p_is_local) is not null
    and set_config('request.jwt.claims', kakunin_private.claims_with(
      case when p_is_local then current_setting('request.jwt.claims', true) end, p_serial), p_is_local) is not null
    then p_serial else kakunin_private.not_marked() end;
end
$$;
comment on function kakunin_private.bind(text, text, boolean) is
  'Puts a binding into effect, for the transaction or, not local, for the session; returns the serial';

-- Runs in every transaction, so key, certificate and the new binding come from one statement, and what
-- refuses is looked for only when something does. The binding is made with the ticket's key: it lasts no
-- longer than the grace of that key.
create function kakunin.bind_session(ticket text, is_local boolean default true) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_ticket text collate "C" := ticket;
  v_found  record;
begin
  select c.serial,
         kakunin_private.is_future(split_part(v_ticket, '.', 5)) as fresh,
         kakunin_private.is_usable(c.serial, c.revoked_at, c.not_before, c.not_after, a.agent_id, a.suspended_at)
           and (not pg_is_in_recovery() or kakunin_private.replica_is_fresh())
           and not exists (select from kakunin_private.risk_stops r where r.agent_id = c.agent_id) as usable,
         kakunin_private.make_binding(
           k.inner_pad, k.outer_pad,
           k.key_id || '|' || c.serial || case when is_local then '|x|0' else '|s|' || split_part(v_ticket, '.', 5) end,
           is_local) as binding
    into v_found
    from kakunin_private.session_keys k
    join kakunin_private.certificates c on c.serial = split_part(v_ticket, '.', 3)
    join kakunin_private.agents a on a.agent_id = c.agent_id
   where octet_length(v_ticket) <= 250
     and k.key_id = split_part(v_ticket, '.', 2)
     and kakunin_private.key_is_good(k.key_id, k.valid_until)
     and kakunin_private.ticket_is_genuine(k.inner_pad, k.outer_pad, v_ticket);
  if v_found.fresh and v_found.usable and is_local is not null then
    return kakunin_private.bind(v_found.serial, v_found.binding, is_local);
  elsif is_local is null then
    raise exception using errcode = 'KA010', message = 'is_local must be true or false';
  elsif v_found.serial is null then
    raise exception using errcode = 'KA004',
      message = 'the ticket was not issued by this database to this login, or its key has been retired',
      hint = 'Open a new session with kakunin.open_session(assertion).';
  elsif not v_found.fresh then
    raise exception using errcode = 'KA004',
      message = 'the ticket has expired',
      hint = 'Open a new session with kakunin.open_session(assertion).';
  end if;
  perform kakunin_private.check_certificate(v_found.serial);
  -- Usable after all: it became so between the two looks.
  return kakunin_private.bind(v_found.serial, v_found.binding, is_local);
end
$$;
comment on function kakunin.bind_session(text, boolean) is
  'Binds this transaction (or, not local, this session until the ticket expires) to the ticket''s certificate and returns its serial. Pass the ticket as a bound parameter only. For kakunin_agent and kakunin_gateway';

create function kakunin_private.bind_transaction(p_serial text) returns text
language plpgsql volatile parallel unsafe
as $$
declare
  v_binding text;
begin
  select kakunin_private.make_binding(k.inner_pad, k.outer_pad, k.key_id || '|' || p_serial || '|x|0', true)
    into v_binding from kakunin_private.session_keys k
   where k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
  if not found then
    perform kakunin_private.no_session_key();
  end if;
  return kakunin_private.bind(p_serial, v_binding, true);
end
$$;
comment on function kakunin_private.bind_transaction(text) is
  'Binds this transaction to a serial, which the caller has found usable, without a ticket; returns the serial';

create function kakunin.bind_serial(serial text) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.normalize_serial(bind_serial.serial);
begin
  perform kakunin_private.check_certificate(v_serial);
  return kakunin_private.bind_transaction(v_serial);
end
$$;
comment on function kakunin.bind_serial(text) is
  'Binds this transaction to a serial on the caller''s word. For kakunin_gateway: trusted server code that sends no SQL of an agent''s making';

create function kakunin.unbind_session() returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_binding text := current_setting('kakunin.session', true);
  v_claims  text := current_setting('request.jwt.claims', true);
begin
  -- Not local: what a session-wide binding left must go too, and '' is what an unset one reads as.
  perform set_config('kakunin.session', '', false);
  if split_part(v_binding, '|', 3) = 's' then
    perform kakunin_private.mark_session(split_part(v_binding, '|', 2), false);
    perform set_config('request.jwt.claims', '{}', false);
  elsif v_claims <> '' then
    perform set_config('request.jwt.claims', (kakunin_private.claims_object(v_claims) - 'kakunin_cert_serial')::text, true);
  end if;
end
$$;
comment on function kakunin.unbind_session() is 'Takes the binding off this session and this transaction. For kakunin_agent and kakunin_gateway';

-- Opening a session ---------------------------------------------------------------------------------

create function kakunin_private.jwt_part(p_text text) returns jsonb
language plpgsql stable strict parallel unsafe
as $$
declare
  v_object jsonb;
begin
  v_object := convert_from(kakunin_private.base64url_decode(p_text), 'UTF8')::jsonb;
  return case when jsonb_typeof(v_object) = 'object' then v_object end;
exception
  -- Not UTF-8, not JSON, nested too deep, a \u0000: one answer for all, none of them is ours to interpret.
  when others then return null;
end
$$;
comment on function kakunin_private.jwt_part(text) is 'A JWT''s header or claims set as an object, or NULL when it is not one';

create function kakunin_private.numeric_date(p_claims jsonb, p_name text) returns numeric
language sql immutable parallel safe
return case when jsonb_typeof(p_claims -> p_name) = 'number' then (p_claims ->> p_name)::numeric end;
comment on function kakunin_private.numeric_date(jsonb, text) is
  'A NumericDate claim (RFC 7519 section 2), seconds since 1970; NULL when missing or not a number';

create function kakunin.open_session(assertion text) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_leeway    constant integer := 30;   -- seconds a client's clock may run ahead
  c_longest   constant integer := 300;  -- seconds an assertion, and the ticket for it, may live
  c_remedy    constant text :=
    'Make a new one: RS256, kid = certificate serial, aud = kakunin:<installation id>, at most 300 seconds of life.';
  v_assertion text collate "C" := assertion;
  v_parts     text[] collate "C";
  v_header    jsonb;
  v_claims    jsonb;
  v_now       numeric := extract(epoch from kakunin_private.clock());
  v_iat       numeric;
  v_exp       numeric;
  v_serial    text;
  v_agent_id  uuid;
  v_modulus   bytea;
  v_until     numeric;
  v_body      text;
begin
  if current_setting('transaction_read_only')::boolean then
    raise exception 'the assertion is refused: its single use cannot be recorded in a read-only transaction'
      using errcode = 'KA004', hint = 'Open the session on the primary, in a read-write transaction; the ticket also binds on a standby.';
  end if;
  if v_assertion is null or octet_length(v_assertion) > 8192 then
    raise exception 'the assertion is refused: it is missing, or longer than 8192 bytes'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_parts := string_to_array(v_assertion, '.');
  if cardinality(v_parts) <> 3 then
    raise exception 'the assertion is refused: it is not a JWT in compact form'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_header := kakunin_private.jwt_part(v_parts[1]);
  v_claims := kakunin_private.jwt_part(v_parts[2]);
  if v_header is null or v_claims is null then
    raise exception 'the assertion is refused: its header or its claims are not base64url of a JSON object'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_header -> 'alg' is distinct from '"RS256"' then
    raise exception 'the assertion is refused: its alg is not RS256'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_header ? 'crit' then
    raise exception 'the assertion is refused: it has critical header parameters, and none is understood'
      using errcode = 'KA004', hint = c_remedy;  -- RFC 7515 section 4.1.11
  end if;
  if jsonb_typeof(v_header -> 'kid') is distinct from 'string' then
    raise exception 'the assertion is refused: it has no kid naming the certificate'
      using errcode = 'KA004', hint = c_remedy;
  end if;

  v_serial := kakunin.normalize_serial(v_header ->> 'kid');
  select c.agent_id, c.public_key_modulus, extract(epoch from c.not_after)
    into v_agent_id, v_modulus, v_until
    from kakunin_private.certificates c where c.serial = v_serial;
  if not found then
    perform kakunin_private.check_certificate(v_serial);  -- says KA001
  end if;
  -- The signature before anything else that it covers: until it is found right, nobody is told what
  -- state the certificate is in.
  if kakunin_private.rsa_pkcs1_sha256_verify(
       v_modulus, 65537,
       convert_to(v_parts[1] || '.' || v_parts[2], 'UTF8'),
       kakunin_private.base64url_decode(v_parts[3])) is not true then
    raise exception 'the assertion is refused: its signature is not that of the certificate''s key'
      using errcode = 'KA004', hint = c_remedy;
  end if;

  if v_claims -> 'iss' is distinct from to_jsonb('urn:kakunin:agent:' || v_agent_id)
    or v_claims -> 'sub' is distinct from v_claims -> 'iss' then
    raise exception 'the assertion is refused: its iss and sub are not the URN of the certificate''s agent'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  -- RFC 7519 section 4.1.3 allows a list. One with other audiences beside us could be replayed there, so
  -- a list counts only when it names nobody else.
  if v_claims -> 'aud' is distinct from to_jsonb('kakunin:' || kakunin.installation_id())
    and v_claims -> 'aud' is distinct from jsonb_build_array('kakunin:' || kakunin.installation_id()) then
    raise exception 'the assertion is refused: its aud is not this installation'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  v_iat := kakunin_private.numeric_date(v_claims, 'iat');
  v_exp := kakunin_private.numeric_date(v_claims, 'exp');
  if v_iat is null or v_exp is null or v_exp <= v_iat or v_exp - v_iat > c_longest then
    raise exception 'the assertion is refused: its iat and exp are missing, or more than 300 seconds apart'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_exp <= v_now then
    raise exception 'the assertion is refused: it has expired'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  if v_iat > v_now + c_leeway
    or (v_claims ? 'nbf' and coalesce(kakunin_private.numeric_date(v_claims, 'nbf') > v_now + c_leeway, true)) then
    raise exception 'the assertion is refused: it is not valid yet'
      using errcode = 'KA004', hint = 'Compare the clocks of the agent and of this server.';
  end if;
  if jsonb_typeof(v_claims -> 'jti') is distinct from 'string' or length(v_claims ->> 'jti') not between 16 and 128 then
    raise exception 'the assertion is refused: its jti is not a string of 16 to 128 characters'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  perform kakunin_private.check_certificate(v_serial);

  -- Two exchanges at once: the second waits here for the first to commit, then finds the jti used.
  insert into kakunin_private.used_assertions (serial, jti, expires_at)
  values (v_serial, v_claims ->> 'jti', to_timestamp(v_exp::double precision))
  on conflict do nothing;
  if not found then
    raise exception 'the assertion is refused: it has been used before'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  -- Once more: this may have begun long ago, because a client can have its backend pause (it prints plans and waits for them
  -- to be read), and an earlier use have been swept meanwhile.
  v_now := extract(epoch from kakunin_private.clock());
  if v_exp <= v_now then
    raise exception 'the assertion is refused: it has expired'
      using errcode = 'KA004', hint = c_remedy;
  end if;
  -- Each exchange sweeps a few expired ones, so the table stays as small as the last minutes' traffic.
  delete from kakunin_private.used_assertions u
   where u.ctid = any (array(
     select e.ctid from kakunin_private.used_assertions e
      where e.expires_at < to_timestamp(v_now::double precision) order by e.expires_at limit 8 for update skip locked));

  v_now := floor(v_now);
  v_body := '.' || v_serial || '.' || v_now || '.' || floor(least(v_now + c_longest, v_until));
  select t.body || '.' || kakunin_private.session_mac(
           k.inner_pad, k.outer_pad, kakunin_private.ticket_context(t.body))
    into v_body
    from kakunin_private.session_keys k, lateral (select 'kkn1.' || k.key_id || v_body as body) t
   where k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
  if not found then
    perform kakunin_private.no_session_key();
  end if;
  return v_body;
end
$$;
comment on function kakunin.open_session(text) is
  'Exchanges an assertion signed by the agent''s key (RFC 7523) for a ticket of at most 300 seconds. Pass it as a bound parameter. For kakunin_agent and kakunin_gateway';

-- Revocation: taking an agent's access away, and telling the world.
--
-- Three ways, from the mildest:
--
--   suspend_agent()       stops all certificates of an agent until reinstate_agent()
--   revoke_certificate()  ends one certificate for good
--   halt_agent()          the kill switch: suspends the agent, revokes all its certificates and records both, at
--                         once; with terminate => true it also ends the backends bound to them
--
-- None of them waits for a signature, and all take effect at the next statement of every session. What other
-- systems are told is signed by the authority's key, which is not in the database, so it follows: a
-- certificate revocation list (RFC 5280 section 5) for each authority, and for each halt a receipt. The
-- signer reads what is due (crls_due(), kakunin.halts), signs, and hands it in; the database verifies the
-- signature with the pinned key, and that a list leaves nothing out, before it stores it.
--
-- A receipt is the UTF-8 of a JSON text in canonical form (RFC 8785), so that a verifier hashes the bytes as
-- they are. What is due to be signed is a question. Caches of certificates' states are told at once, on the channel
-- kakunin_revocation and with the agent's id; but any login can fill the queue of notifications, and no revocation may
-- fail by it or wait for it, so none is sent where it is half full or held: a cache must not keep an answer for long anyhow.
--
-- Which backend is bound to what is known from locks, which a binding takes: mark_bound() in the file on sessions.

create function kakunin_private.check_revocation_reason(p_reason text) returns void
language plpgsql immutable parallel safe
as $$
begin
  -- RFC 5280 section 5.3.1. certificateHold and removeFromCRL are left out: a hold is a suspension,
  -- which is the agent's, and nothing is ever taken off the list.
  if p_reason is null or p_reason collate "C" not in
    ('unspecified', 'keyCompromise', 'cACompromise', 'affiliationChanged', 'superseded',
     'cessationOfOperation', 'privilegeWithdrawn', 'aACompromise') then
    raise exception using errcode = 'KA010',
      message = 'not a revocation reason of RFC 5280',
      hint = 'Use unspecified, keyCompromise, cACompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn or aACompromise.';
  end if;
end
$$;
comment on function kakunin_private.check_revocation_reason(text) is 'KA010 unless it is a reason of RFC 5280 that can be given for good';

-- Who notifies holds, as it commits, a lock on "all databases" (object 0 of pg_database, 1262) and the queue's own, and where
-- the queue is half full warns its client meanwhile: any login can come to a halt there by not reading, and cannot even be
-- terminated. Whoever then so much as asks how full the queue is waits with it, and is not to be cancelled. So the lock is
-- looked for first. Where others notify all the time somebody always holds it, and not always the same one.
create function kakunin_private.may_notify() returns boolean
language plpgsql volatile parallel unsafe
as $$
declare
  v_holder  text collate "C";
  v_before  text collate "C";
  v_changes integer := 0;
begin
  for i in 1..10 loop
    v_holder := (select l.virtualtransaction from pg_locks l
                  where l.locktype = 'object' and l.database = 0::oid and l.classid = 1262::oid and l.objid = 0::oid and l.granted);
    v_changes := v_changes + case when v_holder <> v_before then 1 else 0 end;
    if v_holder is null or v_changes = 2 then
      return pg_notification_queue_usage() < 0.5;
    end if;
    v_before := v_holder;
    perform pg_sleep(0.005);
  end loop;
  return false;
end
$$;
comment on function kakunin_private.may_notify() is
  'Whether a notification would be taken at once: the queue is less than half full, and nobody is stuck in it';

-- Asked once for however many: an authority that is distrusted may have certified thousands.
create function kakunin_private.notify_revocation(p_agent_ids uuid[]) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  if kakunin_private.may_notify() then
    perform pg_notify('kakunin_revocation', a::text) from unnest(p_agent_ids) a;
  end if;
end
$$;
comment on function kakunin_private.notify_revocation(uuid[]) is
  'Tells whoever listens on kakunin_revocation that these agents, or certificates of theirs, were stopped or let go on';

create function kakunin_private.revoke(p_serials text[], p_reason text, p_at timestamptz default null) returns text[]
language plpgsql volatile parallel unsafe
as $$
declare
  v_now     constant timestamptz := kakunin_private.clock();
  v_at      constant timestamptz := coalesce(p_at, v_now);
  v_serials text[];
  v_serial  text;
begin
  -- A revocation is brought forward, but never put off: the first moment and reason are the ones that count.
  with revoked as (
    update kakunin_private.certificates c
       set revoked_at = v_at, revocation_reason = p_reason
     where c.serial = any (p_serials) and coalesce(c.revoked_at > v_at, true)
    returning c.serial
  )
  select coalesce(array_agg(r.serial order by r.serial), '{}') into v_serials from revoked r;
  foreach v_serial in array v_serials loop
    perform kakunin_private.stop(case when v_at > v_now then 'end ' else '' end || v_serial);
    perform kakunin_private.record('certificate.revoked', c.agent_id, jsonb_build_object(
              'serial', c.serial, 'reason', p_reason, 'revoked_at', kakunin_private.rfc3339(v_at)))
       from kakunin_private.certificates c where c.serial = v_serial;
  end loop;
  if v_serials <> '{}' then
    perform kakunin_private.notify_revocation(array(
      select distinct c.agent_id from kakunin_private.certificates c where c.serial = any (v_serials)));
  end if;
  return v_serials;
end
$$;
comment on function kakunin_private.revoke(text[], text, timestamptz) is
  'Revokes certificates from a moment on, by default now; returns those for which this changed anything';

create function kakunin.revoke_certificate(serial text, reason text default 'unspecified') returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial     text collate "C" := kakunin.normalize_serial(revoke_certificate.serial);
  v_revoked_at timestamptz;
begin
  perform kakunin_private.check_revocation_reason(revoke_certificate.reason);
  perform kakunin_private.revoke(array[v_serial], revoke_certificate.reason);
  select c.revoked_at into v_revoked_at from kakunin_private.certificates c where c.serial = v_serial;
  if not found then
    perform kakunin_private.check_certificate(v_serial);  -- says KA001
  end if;
  return v_revoked_at;
end
$$;
comment on function kakunin.revoke_certificate(text, text) is
  'Revokes a certificate for good; returns when it was first revoked. Reasons are those of RFC 5280, such as keyCompromise, superseded, cessationOfOperation. For kakunin_operator';

create function kakunin.suspend_agent(agent_id uuid, reason text) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_text('a reason', suspend_agent.reason, 1000);
  perform kakunin_private.lock_agent(suspend_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = coalesce(a.suspended_at, kakunin_private.clock()),
         suspended_reason = coalesce(a.suspended_reason, suspend_agent.reason)
   where a.agent_id = suspend_agent.agent_id;
  perform kakunin_private.stop(suspend_agent.agent_id::text);
  perform kakunin_private.record('agent.suspended', suspend_agent.agent_id, jsonb_build_object('reason', suspend_agent.reason));
  perform kakunin_private.notify_revocation(array[suspend_agent.agent_id]);
end
$$;
comment on function kakunin.suspend_agent(uuid, text) is
  'Stops every certificate of the agent at the next statement, until reinstate_agent(); the first moment and reason stay. For kakunin_operator';

create function kakunin.reinstate_agent(agent_id uuid) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_epoch integer;
begin
  perform kakunin_private.lock_agent(reinstate_agent.agent_id);
  -- What its score stopped is revoked first: that is final, and a reinstated agent needs another certificate.
  perform kakunin_private.settle(reinstate_agent.agent_id);
  update kakunin_private.agents a
     set suspended_at = null, suspended_reason = null, risk_epoch = a.risk_epoch + 1, reinstated_at = kakunin_private.clock()
   where a.agent_id = reinstate_agent.agent_id
  returning a.risk_epoch into v_epoch;
  -- Drift is not of one epoch. A chain that a transaction of the agent's holds keeps its own: nobody waits for that.
  update kakunin_private.chains c set drift = 0
   where c.drift > 0
     and c.chain_id = any (array(select h.chain_id from kakunin_private.chains h where h.agent_id = reinstate_agent.agent_id for update skip locked));
  perform kakunin_private.stop('epoch ' || reinstate_agent.agent_id || ' ' || v_epoch);
  execute format('drop domain if exists kakunin_private.%I', reinstate_agent.agent_id);
  perform kakunin_private.record('agent.reinstated', reinstate_agent.agent_id, '{}');
  perform kakunin_private.notify_revocation(array[reinstate_agent.agent_id]);
end
$$;
comment on function kakunin.reinstate_agent(uuid) is
  'Lifts a suspension and begins the agent''s risk score anew, drift included. Revoked certificates stay revoked, and transactions that keep a snapshot of before serve the agent no more. For kakunin_operator';

create function kakunin.distrust_ca(key_id text, reason text default 'unspecified') returns text[]
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serials text[] := '{}'::text[];
begin
  perform kakunin_private.check_revocation_reason(distrust_ca.reason);
  if not exists (select from kakunin_private.authorities a where a.key_id = distrust_ca.key_id collate "C") then
    raise exception using errcode = 'KA010',
      message = 'no authority with this key id is trusted here',
      hint = 'select key_id from kakunin.authorities lists them.';
  end if;
  perform kakunin_private.check_snapshot_is_fresh('distrust');
  -- Registrations that have begun hold their authority's row. What they register is seen by the next statement.
  lock table kakunin_private.authorities in exclusive mode;
  with recursive below as (
    select distrust_ca.key_id collate "C" as key_id
    union
    select a.key_id from kakunin_private.authorities a join below b on a.issuer_key_id = b.key_id
  ), distrusted as (
    update kakunin_private.authorities a
       set distrusted_at = coalesce(a.distrusted_at, kakunin_private.clock()), distrust_reason = distrust_ca.reason
      from below b
     where a.key_id = b.key_id
       -- One already distrusted may turn out to be compromised, but not the other way round.
       and (a.distrusted_at is null
            or (distrust_ca.reason in ('keyCompromise', 'cACompromise')
                and a.distrust_reason not in ('keyCompromise', 'cACompromise')))
  )
  select array_agg(c.serial) into v_serials
    from kakunin_private.certificates c join below b on b.key_id = c.issuer_key_id
   where distrust_ca.reason in ('keyCompromise', 'cACompromise');
  perform kakunin_private.record('authority.distrusted', null, jsonb_build_object(
    'key_id', distrust_ca.key_id, 'reason', distrust_ca.reason));
  return kakunin_private.revoke(coalesce(v_serials, '{}'), 'cACompromise');
end
$$;
comment on function kakunin.distrust_ca(text, text) is
  'Registers nothing more that this authority, or one below it, has signed. For keyCompromise and cACompromise all their certificates are revoked too; returns the serials of those. Final. For kakunin_operator';

-- Halting --------------------------------------------------------------------------------------------

create table kakunin_private.halts (
  halt_id   uuid primary key default gen_random_uuid(),
  agent_id  uuid not null references kakunin_private.agents,
  reason    text not null,
  serials   text[] collate "C" not null,
  halted_at timestamptz not null,
  halted_by name not null,
  receipt   text not null,
  key_id    text collate "C" references kakunin_private.authorities,
  signature bytea,
  signed_at timestamptz,
  check (num_nulls(key_id, signature, signed_at) in (0, 3))
);
create index halts_agent_id on kakunin_private.halts (agent_id);
comment on table kakunin_private.halts is 'Every halt, with the receipt an authority signs. The signature is added once and nothing else changes';
comment on column kakunin_private.halts.receipt is
  'What is signed: the UTF-8 of this JSON text, in canonical form (RFC 8785). RSASSA-PKCS1-v1_5 with SHA-256';

create function kakunin_private.terminate(p_serials text[], inout p_ended integer[], out p_others integer[])
language plpgsql volatile parallel unsafe
as $$
declare
  v_pid integer;
begin
  p_others := '{}';
  foreach v_pid in array kakunin_private.bound_backends(p_serials) loop
    begin
      if v_pid <> all (p_ended) and pg_terminate_backend(v_pid) then
        p_ended := p_ended || v_pid;
      end if;
    exception
      -- Ending another login's backend needs pg_signal_backend, which only a superuser can grant. The halt stands.
      when insufficient_privilege then p_others := p_others || v_pid;
    end;
  end loop;
end
$$;
comment on function kakunin_private.terminate(text[], integer[]) is
  'Ends the other backends bound to these certificates: adds them to those that are ending already, and says which ones the owner of the kit may not end';

create function kakunin.halt_agent(agent_id uuid, reason text, terminate boolean default false) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now     constant timestamptz := kakunin_private.clock();
  v_halt_id constant uuid := gen_random_uuid();
  v_serials text[];
  v_all     text[];
  v_receipt text;
  v_ended   integer[] := '{}'::integer[];
  v_others  integer[] := '{}'::integer[];
begin
  perform kakunin_private.check_text('a reason', halt_agent.reason, 1000);
  if terminate is null then
    raise exception using errcode = 'KA010', message = 'terminate must be true or false';
  end if;
  -- Before anything is written as well as after: a backend of the agent's may have used up the server's locks, and
  -- then nothing can be written. Ending it does not need this transaction to succeed.
  if halt_agent.terminate then
    select t.p_ended into v_ended from kakunin_private.terminate(
      array(select c.serial from kakunin_private.certificates c where c.agent_id = halt_agent.agent_id), v_ended) t;
  end if;
  perform kakunin_private.lock_agent(halt_agent.agent_id);
  v_all := array(select c.serial from kakunin_private.certificates c where c.agent_id = halt_agent.agent_id and c.not_after >= v_now);
  perform kakunin.suspend_agent(halt_agent.agent_id, halt_agent.reason);
  v_serials := kakunin_private.revoke(v_all, 'privilegeWithdrawn');
  -- Members in the order of their names and no blanks, as RFC 8785 has it; all are texts, and what to_json()
  -- escapes in a text is what RFC 8785 has escaped.
  v_receipt := '{"agent_id":' || to_json(halt_agent.agent_id::text)
    || ',"certificates":' || coalesce((select '[' || string_agg(to_json(s)::text, ',' order by n) || ']'
                                         from unnest(v_serials) with ordinality as u(s, n)), '[]')
    || ',"halt_id":' || to_json(v_halt_id::text)
    || ',"halted_at":' || to_json(kakunin_private.rfc3339(v_now))
    || ',"halted_by":' || to_json(session_user::text)
    || ',"installation":' || to_json(kakunin.installation_id()::text)
    || ',"reason":' || to_json(halt_agent.reason)
    || ',"type":"kakunin.halt"}';
  insert into kakunin_private.halts (halt_id, agent_id, reason, serials, halted_at, halted_by, receipt)
  values (v_halt_id, halt_agent.agent_id, halt_agent.reason, v_serials, v_now, session_user, v_receipt);
  perform kakunin_private.record('agent.halted', halt_agent.agent_id, jsonb_build_object(
    'halt_id', v_halt_id, 'reason', halt_agent.reason, 'certificates', to_jsonb(v_serials)));
  if halt_agent.terminate then
    select t.p_ended, t.p_others into v_ended, v_others from kakunin_private.terminate(v_all, v_ended) t;
  end if;
  return jsonb_build_object(
    'halt_id', v_halt_id,
    'agent_id', halt_agent.agent_id,
    'halted_at', v_now,
    'certificates_revoked', to_jsonb(v_serials),
    'backends_terminated', cardinality(v_ended),
    'backends_not_terminated', cardinality(v_others),
    'hint', case when cardinality(v_others) > 0
      then format('Backends of other logins see nothing from their next statement on, but were not ended. A superuser allows it: grant pg_signal_backend to %I', current_user) end,
    'receipt', v_receipt);
end
$$;
comment on function kakunin.halt_agent(uuid, text, boolean) is
  'Suspends the agent, revokes its certificates and records it, in this transaction; terminate also ends the backends bound to them. Returns halt_id, what was done and the receipt, which an authority signs afterwards. For kakunin_operator';

create function kakunin.sign_halt(halt_id uuid, key_id text, signature bytea) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_halt    kakunin_private.halts;
  v_modulus bytea;
begin
  select * into v_halt from kakunin_private.halts h where h.halt_id = sign_halt.halt_id for update;
  if not found then
    raise exception using errcode = 'KA010', message = format('no halt %s', coalesce(sign_halt.halt_id::text, 'given')),
      hint = 'kakunin.halts shows them.';
  end if;
  select a.public_key_modulus into v_modulus from kakunin_private.authorities a
   where a.key_id = sign_halt.key_id collate "C" and a.distrusted_at is null;
  if not found or not kakunin_private.rsa_pkcs1_sha256_verify(
    v_modulus, 65537, convert_to(v_halt.receipt, 'UTF8'), sign_halt.signature) then
    perform kakunin_private.refuse('the signature', 'it is not that of a trusted authority over the receipt');
  end if;
  -- The first signature stays.
  update kakunin_private.halts h
     set key_id = sign_halt.key_id, signature = sign_halt.signature, signed_at = kakunin_private.clock()
   where h.halt_id = sign_halt.halt_id and h.signature is null;
  if found then
    perform kakunin_private.record('halt.signed', v_halt.agent_id, jsonb_build_object(
      'halt_id', sign_halt.halt_id, 'key_id', sign_halt.key_id, 'signature', encode(sign_halt.signature, 'hex')));
  end if;
end
$$;
comment on function kakunin.sign_halt(uuid, text, bytea) is
  'Adds an authority''s signature (RSASSA-PKCS1-v1_5, SHA-256) over the receipt, once it has been verified; the first one stays. For kakunin_registrar, kakunin_operator, kakunin_worker';

create view kakunin.halts with (security_barrier = true) as
  select h.halt_id, h.agent_id, h.reason, h.serials, h.halted_at, h.halted_by, h.receipt, h.key_id, h.signature, h.signed_at
    from kakunin_private.halts h;
comment on view kakunin.halts is
  'Halts and their receipts; one without a signature waits for it. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

-- Revocation lists -----------------------------------------------------------------------------------

create table kakunin_private.crls (
  key_id       text collate "C" primary key references kakunin_private.authorities,
  number       numeric not null,
  this_update  timestamptz not null,
  next_update  timestamptz not null,
  serials      text[] collate "C" not null,
  der          bytea not null,
  published_at timestamptz not null,
  published_by name not null
);
comment on table kakunin_private.crls is 'The newest list of each authority';
comment on column kakunin_private.crls.serials is
  'What it lists: a revocation that was not committed when the list was made may be dated before it';

create function kakunin.revocations(key_id text) returns table (serial text, revoked_at timestamptz, reason text)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  -- An entry stays for a week after its certificate has expired, so that it is on at least one list issued
  -- after that (RFC 5280 section 3.3).
  v_since constant timestamptz := kakunin_private.clock() - interval '7 days';
begin
  return query
    select c.serial, c.revoked_at, c.revocation_reason
      from kakunin_private.certificates c
     where c.issuer_key_id = revocations.key_id collate "C" and c.revoked_at <= kakunin_private.clock() and c.not_after > v_since
    union all
    select a.serial, a.distrusted_at, a.distrust_reason
      from kakunin_private.authorities a
     where a.issuer_key_id = revocations.key_id collate "C" and a.issuer_key_id <> a.key_id
       and a.distrusted_at is not null and a.not_after > v_since
    union all
    select k.serial, k.revoked_at, k.revocation_reason
      from kakunin_private.ledger_keys k
     where k.issuer_key_id = revocations.key_id collate "C" and k.revoked_at is not null and k.not_after > v_since;
end
$$;
comment on function kakunin.revocations(text) is
  'What the revocation list of the authority with this key id has to list now. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

create function kakunin.crls_due() returns table (key_id text, next_number numeric)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select a.key_id, coalesce(l.number, 0) + 1
      from kakunin_private.authorities a
      left join kakunin_private.crls l on l.key_id = a.key_id
     where a.not_after > kakunin_private.clock()
       -- Compromised, its word counts for nothing any more; distrusted for another reason, it still says what it revoked.
       and coalesce(a.distrust_reason not in ('keyCompromise', 'cACompromise'), true)
       and (l.key_id is null
            or kakunin_private.clock() > l.this_update + (l.next_update - l.this_update) / 2
            or exists (select r.serial from kakunin.revocations(a.key_id) r except select unnest(l.serials)))
     order by a.key_id;
end
$$;
comment on function kakunin.crls_due() is
  'Authorities whose list is missing, leaves a revocation out or is past half its time, and the number of the next one. For kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor';

create function kakunin.publish_crl(der bytea) returns numeric
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what       constant text := 'the CRL';
  v_now        constant timestamptz := kakunin_private.clock();
  v_outer      bytea[];
  v_fields     bytea[];
  v_parts      bytea[];
  v_extensions kakunin_private.x509_extension[];
  v_entries    bytea[] := '{}'::bytea[];
  v_entry      bytea;
  v_signature  bytea;
  v_value      bytea;
  v_this       timestamptz;
  v_next       timestamptz;
  v_number     numeric;
  v_authority  kakunin_private.authorities;
  v_serials    text[] := '{}'::text[];
  v_reasons    text[] := '{}'::text[];
  v_dates      timestamptz[] := '{}'::timestamptz[];
  v_reason     integer;
  v_wrong      text;
begin
  if publish_crl.der is null or octet_length(publish_crl.der) not between 1 and 8388608 then
    perform kakunin_private.refuse(c_what, 'it is 1 byte to 8 MiB of DER');
  elsif substr(publish_crl.der, 1, 5) = '-----' then
    perform kakunin_private.refuse(c_what, 'it is PEM', 'Give the DER that PEM wraps in base64.');
  end if;
  perform kakunin_private.check_snapshot_is_fresh('publishing a CRL');
  perform kakunin_private.der_check(publish_crl.der);
  v_outer := kakunin_private.der_children(publish_crl.der, 48, c_what);
  v_fields := kakunin_private.der_children(v_outer[1], 48, 'the TBSCertList');
  -- Version 2, algorithm, issuer, thisUpdate, nextUpdate, perhaps entries, extensions (RFC 5280 section 5.1)
  if cardinality(v_fields) not between 6 and 7 or v_fields[1] <> decode('020101', 'hex') then
    perform kakunin_private.refuse(c_what, 'it is not version 2 with nextUpdate and extensions');
  end if;
  v_signature := kakunin_private.x509_check_signed(v_outer, v_fields[2], c_what);
  v_this := kakunin_private.der_time(v_fields[4], 'thisUpdate');
  v_next := kakunin_private.der_time(v_fields[5], 'nextUpdate');
  if cardinality(v_fields) = 7 then
    v_entries := kakunin_private.der_children(v_fields[6], 48, 'the entries');
  end if;
  v_parts := kakunin_private.der_children(v_fields[cardinality(v_fields)], 160, 'the extensions');  -- [0]
  if cardinality(v_parts) <> 1 then
    perform kakunin_private.refuse('the list of extensions', 'it is not one list');
  end if;
  v_extensions := kakunin_private.x509_extensions(v_parts[1], c_what);
  perform kakunin_private.x509_check_critical(v_extensions, '{}', c_what);

  select * into v_authority from kakunin_private.authorities a
   where a.key_id = kakunin_private.x509_authority_key_id(v_extensions) and a.subject = v_fields[3]
     and coalesce(a.distrust_reason not in ('keyCompromise', 'cACompromise'), true)
     for no key update;
  if not found then
    perform kakunin_private.refuse(c_what, 'its issuer is not an authority that is trusted here');
  end if;
  if not kakunin_private.rsa_pkcs1_sha256_verify(v_authority.public_key_modulus, 65537, v_outer[1], v_signature) then
    perform kakunin_private.refuse(c_what, 'its signature is not that of its issuer');
  end if;

  v_value := kakunin_private.x509_positive(
    kakunin_private.x509_extension_value(v_extensions, '2.5.29.20'), 'the CRL number');
  if octet_length(v_value) > 20 then
    perform kakunin_private.refuse('the CRL number', 'it is longer than 20 octets');
  end if;
  v_number := kakunin_private.bytes_to_numeric(v_value);
  if exists (select from kakunin_private.crls l
              where l.key_id = v_authority.key_id and (l.number >= v_number or l.this_update > v_this)) then
    perform kakunin_private.refuse(c_what, 'it is not newer than the one that is published');
  end if;
  if v_this > v_now + interval '5 minutes' or v_next <= v_now or v_next - v_this > interval '90 days' then
    perform kakunin_private.refuse(c_what, 'it is not of now, or is to last more than 90 days');
  end if;

  foreach v_entry in array v_entries loop
    v_parts := kakunin_private.der_children(v_entry, 48, 'an entry');
    if cardinality(v_parts) not between 2 and 3 then
      perform kakunin_private.refuse('an entry', 'it is not a serial number, a date and extensions');
    end if;
    v_reason := 0;
    if cardinality(v_parts) = 3 then
      v_extensions := kakunin_private.x509_extensions(v_parts[3], 'an entry');
      perform kakunin_private.x509_check_critical(v_extensions, '{}', 'an entry');
      v_value := kakunin_private.x509_extension_value(v_extensions, '2.5.29.21');
      if v_value is not null then
        v_value := kakunin_private.der_content(v_value, 10, 'the reason');
        v_reason := case when octet_length(v_value) = 1 then get_byte(v_value, 0) else 255 end;  -- 255 is none
      end if;
    end if;
    v_serials := v_serials || kakunin_private.x509_serial(v_parts[1]);
    v_dates := v_dates || kakunin_private.der_time(v_parts[2], 'the revocation date');
    v_reasons := v_reasons || coalesce((array['unspecified', 'keyCompromise', 'cACompromise', 'affiliationChanged',
      'superseded', 'cessationOfOperation', null, null, null, 'privilegeWithdrawn', 'aACompromise'])[v_reason + 1], '');
  end loop;
  select coalesce(r.serial, e.serial) into v_wrong
    from (select * from unnest(v_serials, v_dates, v_reasons) as u(serial, revoked_at, reason)) e
    full join kakunin.revocations(v_authority.key_id) r
      on r.serial = e.serial and date_trunc('second', r.revoked_at) = e.revoked_at and r.reason = e.reason
   where r.serial is null or e.serial is null
   limit 1;
  if found or cardinality(v_serials) <> (select count(distinct s) from unnest(v_serials) s) then
    perform kakunin_private.refuse(c_what,
      format('it does not list what is revoked here, as of %s', coalesce(v_wrong, 'one that is listed twice')),
      'Make it from kakunin.revocations(key_id), at once.');
  end if;

  insert into kakunin_private.crls as l
    (key_id, number, this_update, next_update, serials, der, published_at, published_by)
  values
    (v_authority.key_id, v_number, v_this, v_next, v_serials, publish_crl.der, v_now, session_user)
  on conflict on constraint crls_pkey do update
    set number = excluded.number, this_update = excluded.this_update, next_update = excluded.next_update,
        serials = excluded.serials, der = excluded.der, published_at = excluded.published_at, published_by = excluded.published_by;
  perform kakunin_private.record('crl.published', null, jsonb_build_object(
    'key_id', v_authority.key_id, 'number', v_number, 'sha256', encode(sha256(publish_crl.der), 'hex')));
  return v_number;
end
$$;
comment on function kakunin.publish_crl(bytea) is
  'Stores a revocation list (DER) once it is known to be its authority''s, newer than the last, and to list exactly what is revoked here; returns its number. For kakunin_registrar, kakunin_operator, kakunin_worker';

create view kakunin.crls with (security_barrier = true) as
  select l.key_id, l.number, l.this_update, l.next_update, cardinality(l.serials) as entries, l.published_at, l.published_by, l.der
    from kakunin_private.crls l;
comment on view kakunin.crls is 'The newest revocation list of each authority, DER, for any node to serve. For all the kit''s roles';

-- PostgREST: what runs before each of its requests, and what it answers an agent that may not go on.
--
-- PostgREST verifies a JWT, takes its role and puts its claims into request.jwt.claims. The policies do without
-- what is below: a certificate that may not be used is nobody's (40_session.sql), and there are no rows. A client
-- told "no rows" cannot know why, so pre_request(), configured as db-pre-request, looks first and says it:
--
--   401  the header X-Kakunin-Cert-Serial does not name the certificate that the token names
--   403  the token's certificate may not be used now; the error's code is the KA... that says why
--   503  a standby is too far behind the primary to tell (KA012)
--
-- Requests without the claim and without the header are none of its business and pass.
--
-- It also binds the transaction to the certificate, before any of the request's own SQL. Where the login is hooked
-- (set_gateway_logins()) nothing else believes the claims: a function that runs SQL its caller wrote can set them to
-- another agent's, and gets no rows for it. For that the hook itself must not be such SQL's to call again, so it
-- binds only where it is the whole of the statement that the client sent, `select "kakunin"."pre_request"()` or a
-- function of the project's that calls it. PostgREST's other statements begin with WITH, and the names in them are
-- all that a request contributes to their text.
--
-- That is for the request alone. What SQL of the caller's can still do there is what PostgREST's login can do, `set role`
-- to any role that it is a member of, service_role with its BYPASSRLS among them; and what it leaves on PostgREST's
-- session, prepared statements and temporary types for two, runs in others' requests. See docs/supabase-trust.md.

create function kakunin_private.refuse_request(p_status integer, p_code text, p_message text, p_hint text) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- PostgREST makes its answer of these two (docs.postgrest.org, "Errors: RAISE errors with HTTP status codes").
  raise exception using errcode = 'PGRST',
    message = json_build_object('code', p_code, 'message', p_message, 'details', null, 'hint', p_hint)::text,
    detail = json_build_object('status', p_status, 'headers', case p_status
      when 401 then json_build_object('WWW-Authenticate', 'Bearer error="invalid_token"')  -- RFC 6750 section 3
      else json_build_object() end)::text;
end
$$;
comment on function kakunin_private.refuse_request(integer, text, text, text) is
  'Ends the request with this HTTP status and PostgREST''s JSON error';

create function kakunin.pre_request() returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_claim   text collate "C" := nullif(current_setting('request.jwt.claims', true), '')::json ->> 'kakunin_cert_serial';
  v_header  text collate "C" := nullif(current_setting('request.headers', true), '')::json ->> 'x-kakunin-cert-serial';
  v_serial  text collate "C";
  v_binding text;
  v_hooked  boolean;
  v_is_hook boolean := current_query() collate "C" ~ '^select ("[^"]+"[.])?"[^"]+"[(][)]$';
  v_code    text;
  v_message text;
  v_hint    text;
begin
  if v_claim is null and v_header is null then
    -- PostgREST's sessions are shared, and SQL of an earlier request's may have left something.
    if v_is_hook and current_setting('kakunin.session', true) <> '' then
      perform set_config('kakunin.session', '', true);
    end if;
    return;
  elsif v_is_hook and v_header = v_claim is not false then
    -- As almost every request has it: the canonical serial of a certificate that may be used. One statement, and the
    -- claims stay as they are; whatever is otherwise goes on below.
    select kakunin_private.make_binding(k.inner_pad, k.outer_pad, k.key_id || '|' || u.serial || '|x|0', true)
      into v_binding
      from kakunin_private.gateway_logins g, kakunin_private.session_keys k, kakunin_private.usable_serial(v_claim) u(serial)
     where g.login = session_user and k.valid_until is null and kakunin_private.key_is_good(k.key_id, k.valid_until);
    if found and kakunin_private.mark_bound(v_binding, v_claim) then
      perform set_config('kakunin.session', v_binding, true);
      return;
    end if;
  end if;
  if v_claim is null then
    perform kakunin_private.refuse_request(401, 'KA004',
      'the header X-Kakunin-Cert-Serial names a certificate and the token names none',
      'Send a token with the claim kakunin_cert_serial. The header by itself proves nothing.');
  end if;
  select g.hooked into v_hooked from kakunin_private.gateway_logins g where g.login = session_user;
  if not found then
    perform kakunin_private.refuse_request(403, 'KA004',
      format('the claims that %s brings are not believed', quote_ident(session_user)),
      'The owner of the kit names PostgREST''s login: kakunin.set_gateway_logins().');
  elsif v_hooked and not v_is_hook then
    perform kakunin_private.refuse_request(403, 'KA004',
      'pre_request() binds only as the whole of a statement, which a request''s own SQL is not',
      'Name it, or a function of yours that calls it, in PostgREST''s db-pre-request.');
  end if;
  begin
    v_serial := kakunin.normalize_serial(v_claim);
    if v_header is not null and kakunin.normalize_serial(v_header) <> v_serial then
      v_serial := null;
    end if;
  exception when sqlstate 'KA010' then
    v_serial := null;
  end;
  if v_serial is null then
    perform kakunin_private.refuse_request(401, 'KA004',
      'the header X-Kakunin-Cert-Serial does not name the certificate that the token names',
      'Send the serial of the claim kakunin_cert_serial, as upper-case hex bytes joined by colons, or no header.');
  end if;
  begin
    perform kakunin_private.check_certificate(v_serial);
  exception when sqlstate 'KA001' or sqlstate 'KA002' or sqlstate 'KA003' or sqlstate 'KA008' or sqlstate 'KA012' then
    get stacked diagnostics v_code = returned_sqlstate, v_message = message_text, v_hint = pg_exception_hint;
  end;
  if v_code is not null then
    perform kakunin_private.refuse_request(case v_code when 'KA012' then 503 else 403 end, v_code, v_message, v_hint);
  elsif v_is_hook then
    perform kakunin_private.bind_transaction(v_serial);
  end if;
end
$$;
comment on function kakunin.pre_request() is
  'For PostgREST''s db-pre-request: binds the request to the token''s certificate; 403 where that may not be used now, 503 on a standby that is too far behind, 401 for a header that is not the claim''s. For kakunin_agent and kakunin_gateway';

-- Policies: putting row-level security on a table of yours.
--
-- protect() writes what sql/policies/agent_vault.sql shows by hand: one permissive policy that lets a
-- bound session see and change the rows whose serial column equals its own. Where that column is a uuid it
-- holds the agent's id instead, and the rows stay the agent's when its certificate is renewed. A role the policy does not
-- name, and a session without a binding, sees no row. With write_scope, three restrictive policies
-- refuse aloud (KA005) any write, by anybody, without a certificate that permits that action.
--
-- Both functions run with their caller's rights: only a table's owner can protect it. They keep no list
-- of their own. The policies in the catalog are the record, so a dump carries it and nothing can drift;
-- the four named in c_policies are theirs. Partitions and inheritance children get the same
-- policies, because a query that names a child goes by the child's policies and not by the parent's.
-- Run protect() again after adding a partition.
--
-- With audit, triggers put every statement that changed rows of the table into the ledger, in the same transaction, as
-- the bound agent's or, without a binding, with the login alone.
--
-- Row security does not cover everything that can be granted. TRUNCATE ignores it, TRIGGER lets the
-- grantee run code on other agents' rows, REFERENCES lets a foreign key probe for them, and MAINTAIN (from
-- 17) lets it lock them away: protect() takes these from the roles it lets in, and unprotect() does not
-- give them back.

-- Runs as the owner of the kit, so nothing in it may run code of the table's owner: keys are written by their types'
-- output functions, which only a superuser can make, and not by casts, which anybody can.
create function kakunin.record_changes() returns trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
-- What keys read as is not up to the session.
set datestyle = 'ISO, YMD' set intervalstyle = 'iso_8601' set timezone = 'UTC' set bytea_output = 'hex'
set extra_float_digits = 1 set quote_all_identifiers = off
as $$
declare
  v_serial   text collate "C" := kakunin.current_cert_serial();
  v_role     constant name := coalesce(nullif(current_setting('role'), 'none')::name, session_user);
  v_agent_id uuid;
  v_rows     bigint;
  v_keys     jsonb;
  v_metadata jsonb := jsonb_build_object(
    'table', format('%I.%I', tg_table_schema, tg_table_name), 'operation', tg_op);
begin
  if tg_op <> 'TRUNCATE' then
    -- Without its transition table this would be any relation of that name, a temporary view with functions in it too.
    if not exists (select from pg_trigger t where t.tgrelid = tg_relid and t.tgname = tg_name
                      and 'kakunin_rows' in (t.tgnewtable, t.tgoldtable)) then
      raise exception using errcode = 'KA010', message = 'record_changes() is for the triggers that kakunin.protect() makes';
    end if;
    select count(*) into v_rows from kakunin_rows;
    if v_rows = 0 then
      return null;
    end if;
    v_metadata := v_metadata || jsonb_build_object('rows', v_rows);
    if tg_nargs > 0 then
      -- A hundred of them, and those shortened: an entry has its limit, and a statement must not fail by it. The columns are
      -- those of the primary key now; a name that is no column would be a function of that name.
      if exists (select from pg_index x where x.indrelid = tg_relid and x.indisprimary) then
        execute format('select jsonb_agg(k.key) from (select jsonb_build_array(%s) as key from kakunin_rows r limit 100) k',
          (select string_agg(format('left(format(''%%s'', r.%I), 100)', a.attname), ', ' order by array_position(x.indkey::smallint[], a.attnum))
             from pg_index x join pg_attribute a on a.attrelid = x.indrelid and a.attnum = any (x.indkey::smallint[])
            where x.indrelid = tg_relid and x.indisprimary))
          into v_keys;
      end if;
      v_metadata := v_metadata || case when coalesce(octet_length(v_keys::text), 12001) > 12000
        then jsonb_build_object('keys_omitted', v_rows)
        else jsonb_build_object('keys', v_keys, 'keys_omitted', greatest(v_rows - 100, 0)) end;
    end if;
  end if;
  select c.agent_id into v_agent_id from kakunin_private.certificates c where c.serial = v_serial;
  -- An agent that unbinds in the midst of its statement, or is revoked in it, must not change a row as nobody. Others
  -- than agents need no binding: the owner, and whom row security does not bind.
  if v_serial is null and v_role <> current_user
    and not (select r.rolsuper or r.rolbypassrls from pg_roles r where r.rolname = v_role)
    and (pg_has_role(v_role, 'kakunin_agent', 'member') or pg_has_role(v_role, 'kakunin_gateway', 'member'))
    and not pg_has_role(v_role, (select c.relowner from pg_class c where c.oid = tg_relid), 'usage') then
    perform kakunin.require_session();
    perform kakunin_private.not_marked();
  end if;
  -- Changes by others have chains of their own, beside those of decisions.
  perform kakunin_private.append(
    'table.' || lower(tg_op), v_agent_id, v_serial, null, v_metadata::text, coalesce(v_agent_id, 'ffffffff-ffff-ffff-ffff-ffffffffffff'));
  return null;
end
$$;
comment on function kakunin.record_changes() is
  'Trigger of protect(..., audit => true): an entry of the ledger for each statement that changed rows. For kakunin_operator';

create function kakunin.audit_changes(target regclass, audit boolean, keys boolean) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  v_event     text;
  v_arguments text := '';
begin
  if num_nulls(target, audit, keys) > 0 then
    raise exception using errcode = 'KA010', message = 'audit_changes() needs a table, and true or false twice';
  end if;
  foreach v_event in array '{insert,update,delete,truncate}'::text[] loop
    if exists (select from pg_trigger t where t.tgrelid = target and t.tgname = 'kakunin_audit_' || v_event) then
      execute format('drop trigger %I on %s', 'kakunin_audit_' || v_event, target);
    end if;
  end loop;
  if not audit then
    return;
  end if;
  if keys then
    if not exists (select from pg_index x where x.indrelid = target and x.indisprimary) then
      raise exception using errcode = 'KA010',
        message = format('%s has no primary key, so there are no keys to record', target),
        hint = 'Add one, or leave audit_keys away: the number of rows is recorded.';
    end if;
    v_arguments := quote_literal('keys');
  end if;
  foreach v_event in array '{insert,update,delete,truncate}'::text[] loop
    execute format('create trigger %I after %s on %s %s for each statement execute function kakunin.record_changes(%s)',
      'kakunin_audit_' || v_event, v_event, target,
      case v_event when 'truncate' then '' when 'delete' then 'referencing old table as kakunin_rows'
        else 'referencing new table as kakunin_rows' end,
      v_arguments);
    execute format('comment on trigger %I on %s is %L', 'kakunin_audit_' || v_event, target,
      'Written by kakunin.protect(audit => true): changes are entries of the ledger');
  end loop;
end
$$;
comment on function kakunin.audit_changes(regclass, boolean, boolean) is
  'What protect() calls: puts the triggers of audit on a table, or takes them away. For the table''s owner, who needs kakunin_operator';

-- Says what the catalog says, whatever its caller would have it say.
create function kakunin.record_policy(target regclass) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp set quote_all_identifiers = off
as $$
declare
  v_table    record;
  v_policies jsonb;
begin
  select format('%I.%I', n.nspname, c.relname) as name, c.relrowsecurity, c.relforcerowsecurity,
         exists (select from pg_trigger t where t.tgrelid = c.oid and t.tgfoid = 'kakunin.record_changes'::regproc) as audit
    into v_table
    from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = target;
  if not found then
    raise exception using errcode = 'KA010', message = 'record_policy() needs a table';
  end if;
  -- The first hundred: an entry is not to grow with what somebody else made.
  select coalesce(jsonb_object_agg(p.polname, jsonb_build_object(
           'permissive', p.polpermissive, 'using', left(pg_get_expr(p.polqual, p.polrelid), 500),
           'check', left(pg_get_expr(p.polwithcheck, p.polrelid), 500))), '{}') into v_policies
    from (select * from pg_policy y where y.polrelid = target order by y.polname <> 'kakunin_isolation', y.polname limit 100) p;
  perform kakunin_private.record(
    case when v_table.relrowsecurity and v_policies ? 'kakunin_isolation' then 'policy.protected' else 'policy.unprotected' end,
    null, jsonb_build_object('table', v_table.name, 'row_security', v_table.relrowsecurity, 'forced', v_table.relforcerowsecurity,
      'audit', v_table.audit, 'policies', v_policies));
end
$$;
comment on function kakunin.record_policy(regclass) is
  'What protect() and unprotect() call: an entry of the ledger that says how row security stands on a table. For kakunin_operator';

create function kakunin.protect(
  target regclass,
  serial_column name default 'permitted_agent_serial',
  roles name[] default '{kakunin_agent,kakunin_gateway}',
  write_scope text default null,
  force boolean default false,
  keep_policies boolean default false,
  audit boolean default false,
  audit_keys boolean default false
) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies  constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_isolation text;
  v_scope     text;
  v_roles     text;
  v_role      name;
  v_table     record;
  v_other     text;
  v_before    text;
  v_grant     record;
  v_policy    name;
begin
  if protect.target is null or serial_column is null
    or num_nulls(protect.force, keep_policies, protect.audit, audit_keys) > 0 then
    raise exception using errcode = 'KA010',
      message = 'protect() needs a table, a column, and true or false for force, keep_policies, audit and audit_keys';
  end if;
  select r into v_role from unnest(roles) r
   where r is null or (r <> 'public' and not exists (select from pg_roles p where p.rolname = r)) limit 1;
  if found or coalesce(cardinality(roles), 0) = 0 then
    raise exception using errcode = 'KA010',
      message = format('%s is not a role the policies can name', coalesce(quote_ident(v_role), 'NULL')),
      hint = 'Give the roles agents have, such as {kakunin_agent}.';
  end if;
  if (current_setting('server_version_num')::integer < case current_setting('server_version_num')::integer / 10000
        when 15 then 150020 when 16 then 160016 when 17 then 170012 when 18 then 180007 else 0 end) then
    raise warning 'kakunin.protect: Postgres % gives rows that policies hide to the WHERE of INSERT ... ON CONFLICT DO UPDATE (CVE-2026-120154)',
      current_setting('server_version')
      using hint = 'Update to 15.20, 16.16, 17.12, 18.7 or later, or put the serial column into every unique key.';
  end if;
  if write_scope is not null and write_scope !~ '^[A-Za-z0-9_.:/-]{1,128}$' then
    raise exception using errcode = 'KA010',
      message = 'write_scope is 1 to 128 characters from A-Z a-z 0-9 _ . : / -';
  end if;
  select string_agg(quote_ident(r), ', ') into v_roles from unnest(roles) r;
  v_scope := format('(select kakunin.require_scope(%L))', write_scope);

  for v_table in
    with recursive family as (
      select protect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid, c.relkind, c.relacl, c.relowner, c.relrowsecurity, c.relforcerowsecurity,
           a.attnum, coalesce(nullif(t.typbasetype, 0), t.oid) as column_type, l.collisdeterministic
      from family f
      join pg_class c on c.oid = f.relid
      left join pg_attribute a on a.attrelid = c.oid and a.attname = serial_column and a.attnum > 0 and not a.attisdropped
      left join pg_type t on t.oid = a.atttypid
      left join pg_collation l on l.oid = a.attcollation
     order by c.oid
  loop
    if v_table.relkind not in ('r', 'p') then
      raise exception using errcode = 'KA010',
        message = format('%s is not a table, and only a table can have row-level security', v_table.name),
        hint = 'Protect the tables below it; make views over them with security_invoker = true.';
    end if;
    if v_table.attnum is null or v_table.column_type not in ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype) then
      raise exception using errcode = 'KA010',
        message = format('%s has no column %I of type text, varchar or uuid', v_table.name, serial_column),
        hint = 'Add it, or name the column that holds the serial, or the agent id, that a row belongs to.';
    end if;
    v_isolation := format('%I = (select kakunin.%I())', serial_column,
      case when v_table.column_type = 'uuid'::regtype then 'current_agent_id' else 'current_cert_serial' end);
    if not v_table.collisdeterministic then
      raise exception using errcode = 'KA010',
        message = format('the column %I of %s has a nondeterministic collation, under which two serials may be equal',
          serial_column, v_table.name),
        hint = 'Give it collate "C".';
    end if;
    -- Turned on by ALTER TABLE ... FORCE earlier and asleep until now: enabling would bind the owner too.
    if v_table.relforcerowsecurity and not protect.force then
      raise exception using errcode = 'KA010',
        message = format('row security is forced on %s, so its owner would see only rows of a bound certificate', v_table.name),
        hint = 'Say force => true if that is meant, or ALTER TABLE ... NO FORCE ROW LEVEL SECURITY first.';
    end if;
    select string_agg(quote_ident(p.polname), ', ' order by p.polname) into v_other
      from pg_policy p
     where p.polrelid = v_table.oid and p.polpermissive and p.polname <> all (c_policies);
    if v_other is not null and not keep_policies then
      raise exception using errcode = 'KA010',
        message = format('%s has permissive policies that would let rows through beside this one: %s', v_table.name, v_other),
        hint = 'Drop them or make them restrictive; if they are meant to widen access, say keep_policies => true.';
    end if;

    -- How the table stood before the first protect(), which a repeated one must not forget.
    select substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+, [a-z]+)[.]') into v_before
      from pg_policy p where p.polrelid = v_table.oid and p.polname = 'kakunin_isolation';
    v_before := coalesce(v_before,
      case when v_table.relrowsecurity then 'on' else 'off' end || ', '
      || case when v_table.relforcerowsecurity then 'forced' else 'unforced' end);

    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    execute format('create policy kakunin_isolation on %s for all to %s using (%s) with check (%3$s)',
      v_table.name, v_roles, v_isolation);
    execute format('comment on policy kakunin_isolation on %s is %L', v_table.name,
      format('Written by kakunin.protect(): rows of the bound certificate only. Row security before: %s.', v_before));
    if write_scope is not null then
      -- To public, not to the roles: a member of a role can DROP OWNED BY it, which takes the role out of
      -- policies. Out of the permissive one that closes; out of a restrictive one it would open.
      execute format('create policy kakunin_insert_scope on %s as restrictive for insert to public with check (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_update_scope on %s as restrictive for update to public using (%s)',
        v_table.name, v_scope);
      execute format('create policy kakunin_delete_scope on %s as restrictive for delete to public using (%s)',
        v_table.name, v_scope);
    end if;
    execute format('alter table %s enable row level security, %s force row level security',
      v_table.name, case when protect.force then '' else 'no' end);
    perform kakunin.audit_changes(v_table.name, protect.audit or audit_keys, audit_keys);
    perform kakunin.record_policy(v_table.name);

    -- Everybody who may be an agent and holds one of them, directly, through another role or on a column.
    for v_grant in
      select coalesce(r.rolname, 'public') as grantee, pg_get_userbyid(g.grantor) as grantor,
             g.grantor = v_table.relowner as by_owner,
             string_agg(distinct lower(g.privilege_type), ', ') as privileges
        from (select (aclexplode(v_table.relacl)).*
              union all
              select (aclexplode(a.attacl)).* from pg_attribute a where a.attrelid = v_table.oid) g
        left join pg_roles r on r.oid = g.grantee
       where g.privilege_type in ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'MAINTAIN')
         and g.grantee <> v_table.relowner
         and not coalesce(r.rolsuper, false)
         and (g.grantee = 0 or 'public' = any (roles)
              or exists (
                select from pg_roles m, unnest(roles) n
                 where not m.rolsuper and pg_has_role(m.oid, n, 'MEMBER') and pg_has_role(m.oid, g.grantee, 'MEMBER')))
       group by 1, 2, 3
       order by 1, 2
    loop
      if not v_grant.by_owner then
        raise exception using errcode = 'KA010',
          message = format('%I has %s on %s from %I, and row security does not cover that',
            v_grant.grantee, v_grant.privileges, v_table.name, v_grant.grantor),
          hint = format('First: revoke %s on %s from %I cascade', v_grant.privileges, v_table.name, v_grant.grantor);
      end if;
      execute format('revoke %s on %s from %I', v_grant.privileges, v_table.name, v_grant.grantee);
      raise notice 'kakunin.protect: revoked % on % from %: row security does not cover that',
        v_grant.privileges, v_table.name, v_grant.grantee;
    end loop;
    if not exists (select from pg_index x where x.indrelid = v_table.oid and x.indkey[0] = v_table.attnum and x.indpred is null) then
      raise notice 'kakunin.protect: no index on % begins with %, so every query reads the whole table', v_table.name, serial_column;
    end if;
  end loop;
end
$$;
comment on function kakunin.protect(regclass, name, name[], text, boolean, boolean, boolean, boolean) is
  'Enables row-level security on a table and its partitions, so that the named roles see and change only rows whose serial_column is that of their bound certificate, or its agent where the column is a uuid. write_scope: writes need that scope as well; force: the owner is bound too; keep_policies: other permissive policies may widen access; audit: each statement that changes rows is an entry of the ledger, with the number of rows, and with audit_keys their primary keys. Can be repeated. For the table''s owner, who needs kakunin_operator';

create function kakunin.unprotect(target regclass) returns void
language plpgsql volatile parallel unsafe set search_path = pg_catalog, pg_temp
as $$
declare
  c_policies constant name[] :=
    '{kakunin_isolation,kakunin_insert_scope,kakunin_update_scope,kakunin_delete_scope}'::name[];
  v_table    record;
  v_policy   name;
begin
  if unprotect.target is null then
    raise exception using errcode = 'KA010', message = 'unprotect() needs a table';
  end if;
  for v_table in
    with recursive family as (
      select unprotect.target::oid as relid
      union
      select i.inhrelid from pg_inherits i join family f on i.inhparent = f.relid
    )
    select c.oid::regclass as name, c.oid,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: ([a-z]+), [a-z]+[.]') as enabled_before,
           substring(obj_description(p.oid, 'pg_policy') from 'Row security before: [a-z]+, ([a-z]+)[.]') as forced_before
      from family f
      join pg_class c on c.oid = f.relid
      join pg_policy p on p.polrelid = c.oid and p.polname = 'kakunin_isolation'
     order by c.oid
  loop
    for v_policy in
      select p.polname from pg_policy p where p.polrelid = v_table.oid and p.polname = any (c_policies)
    loop
      execute format('drop policy %I on %s', v_policy, v_table.name);
    end loop;
    perform kakunin.audit_changes(v_table.name, false, false);
    -- Without the comment nobody knows how it stood, and then closed is the safe answer.
    if v_table.forced_before = 'unforced' then
      execute format('alter table %s no force row level security', v_table.name);
    end if;
    if exists (select from pg_policy p where p.polrelid = v_table.oid) then
      raise notice 'kakunin.unprotect: % keeps row security on, for its other policies', v_table.name;
    elsif v_table.enabled_before = 'off' then
      execute format('alter table %s disable row level security', v_table.name);
      raise notice 'kakunin.unprotect: row security is off on %, so privileges alone decide who reads it', v_table.name;
    end if;
    perform kakunin.record_policy(v_table.name);
  end loop;
end
$$;
comment on function kakunin.unprotect(regclass) is
  'Takes away what protect() put on a table and its partitions, and leaves row security as it stood before, privileges as they are now. For the table''s owner, who needs kakunin_operator';

-- Ledger: what agents did and what was decided about them, append-only.
--
-- An entry is one line of JSON, built here once and never built again: its UTF-8 bytes are what is hashed, sealed,
-- exported and verified (docs/ledger-format.md). The columns beside it are for finding it; verification
-- compares them with what the entry says.
--
-- Who writes. audit_log_append() for the agent bound to the session; the triggers of protect(..., audit => true) for
-- changes of a protected table; and the functions of this kit, for what they decide (certificate.issued, agent.halted,
-- settings.changed, ...). A name with a dot in it is the kit's own, so an agent cannot make an entry look like a decision.
--
-- Chains. Each entry has the hash of the one before it in its chain. An agent has a chain of its own, and one
-- more for each of its transactions that append at the same time: whoever appends takes the first
-- chain that nobody holds, so nobody ever waits for another transaction, least of all a halt. What is decided goes to
-- chains that no agent can hold.
--
-- Never changed. Triggers that fire ALWAYS refuse UPDATE, DELETE and TRUNCATE to everybody, the owner included;
-- other roles have no privilege on the table either. Detaching a partition is DDL, which only an event trigger can
-- refuse, and only a superuser can make one: sql/superuser/guard_ledger.sql. A superuser can take all of this away. That is
-- what the signed tree in the next file is for: it does not prevent, it proves.
--
-- Partitions are by month, made ahead by make_partitions(). Where that was forgotten the default partition takes the
-- entries: an append, and with it a halt, must not fail for want of a table.

create type kakunin_private.baseline as (n double precision, mean double precision, square double precision);
comment on type kakunin_private.baseline is
  'What is usual of a number: how often it was given, the mean of its logarithm and the sum of squared differences from that';

create table kakunin_private.chains (
  chain_id bigint generated always as identity primary key,
  agent_id uuid not null,
  sequence bigint not null,
  head     bytea not null,  -- no checks here: they are parsed anew by every append
  -- What the events appended to it add to the risk of their agent: 62_risk.sql.
  risk_epoch    integer not null default 0,
  risk_at       timestamptz not null default 'epoch',  -- not infinity, which 15 and 16 cannot subtract
  hard          double precision not null default 0,
  soft          double precision not null default 0,
  drift         double precision not null default 0,
  alerted       boolean not null default false,
  hour          timestamptz,
  hour_soft     double precision not null default 0,
  hour_events   bigint not null default 0,
  counts        jsonb not null default '{}',
  expected      double precision,
  usual_amount  kakunin_private.baseline not null default row(0, 0, 0),
  usual_read    kakunin_private.baseline not null default row(0, 0, 0),
  usual_written kakunin_private.baseline not null default row(0, 0, 0),
  known         integer not null default 0,
  spent_on      timestamptz,
  spent_usd     numeric not null default 0
) with (fillfactor = 50);  -- room for its next version on the same page
create index chains_agent_id on kakunin_private.chains (agent_id, chain_id);
comment on table kakunin_private.chains is 'The chains of the ledger and where each one stands';
comment on column kakunin_private.chains.agent_id is 'Whose it is; the nil UUID for decisions, and the one of ones for changes of a table by others than agents';
comment on column kakunin_private.chains.head is 'The hash of its newest entry; zeros before the first';
comment on column kakunin_private.chains.hard is 'Excess of its events at risk_at, what is certain; soft what is unusual, hour_soft its part in this hour, of hour_events events';
comment on column kakunin_private.chains.drift is 'Excess that drift stands for, at the beginning of the hour; it fades as well';
comment on column kakunin_private.chains.alerted is 'Whether an alert was sent since its agent was last clearly below high';
comment on column kakunin_private.chains.counts is
  'By event type, what this hour had: events, excess, amounts, their sum, the sum of their logarithms and of those squared';
comment on column kakunin_private.chains.expected is 'Events that are not unusual in this hour; NULL while the history is too short';
comment on column kakunin_private.chains.usual_amount is 'Of amounts in USD; usual_read of rows read, usual_written of rows written';
comment on column kakunin_private.chains.known is 'Rows it has added to risk_known';
comment on column kakunin_private.chains.spent_usd is 'Amounts of transaction_initiated on the day spent_on (UTC)';

comment on sequence kakunin_private.chains_chain_id_seq is 'Ids of chains';

create sequence kakunin_private.event_ids;
comment on sequence kakunin_private.event_ids is 'Ids of events. What was rolled back leaves a gap';

create table kakunin_private.ledger (
  event_id    bigint not null,
  recorded_at timestamptz not null,
  agent_id    uuid,
  xid         xid8 not null,
  entry       text collate "C" not null,
  primary key (event_id, recorded_at)  -- a key of a partitioned table has the partition's column in it
) partition by range (recorded_at);
create index ledger_agent_id on kakunin_private.ledger (agent_id, event_id);
create index ledger_xid on kakunin_private.ledger (xid, event_id);
comment on table kakunin_private.ledger is 'The entries. Rows are added and nothing else';
comment on column kakunin_private.ledger.agent_id is 'The agent that did it, or whom it is about';
comment on column kakunin_private.ledger.xid is 'The transaction that wrote it: what tells the sealer which entries are committed';
comment on column kakunin_private.ledger.entry is 'The entry. Its bytes in UTF-8 are what is hashed and signed';

create table kakunin_private.partitions (
  name        name primary key,
  from_at     timestamptz not null,
  to_at       timestamptz not null,
  archived_at timestamptz,
  archived    int8multirange,
  check ((archived_at is null) = (archived is null))
);
comment on table kakunin_private.partitions is 'The partitions of the ledger by time: those that are live, and those that were archived';
comment on column kakunin_private.partitions.archived is 'Which leaves of the tree its entries are';

-- A row each for what is written at different moments by different people: none waits for another.
create table kakunin_private.sleeper (
  only_row boolean primary key default true check (only_row),
  asleep   boolean not null default false
) with (fillfactor = 10);
insert into kakunin_private.sleeper default values;
comment on table kakunin_private.sleeper is 'Whether the worker sleeps and is to be notified of the next entry';

-- Never changed --------------------------------------------------------------------------------------

create function kakunin_private.refuse_change() returns trigger
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  raise exception using errcode = 'KA006',
    message = format('%s of %I.%I is refused: the ledger is append-only', tg_op, tg_table_schema, tg_table_name),
    hint = 'What is wrong in it is corrected by another entry. Partitions leave by kakunin.archive_partition().';
end
$$;
comment on function kakunin_private.refuse_change() is 'Trigger: KA006, whatever the statement and whoever sends it';

create function kakunin_private.make_append_only(p_table regclass) returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- A statement's trigger fires where the table is named, so a partition has its own; and when no row is touched.
  execute format('create trigger append_only before update or delete or truncate on %s'
    ' for each statement execute function kakunin_private.refuse_change()', p_table);
  -- ALWAYS: also with session_replication_role = replica.
  execute format('alter table %s enable always trigger append_only', p_table);
  execute format('comment on trigger append_only on %s is %L', p_table, 'KA006 for every change');
end
$$;
comment on function kakunin_private.make_append_only(regclass) is 'Puts the trigger on a table that refuses every change but INSERT';

do $$ begin perform kakunin_private.make_append_only('kakunin_private.ledger'); end $$;

create table kakunin_private.ledger_default partition of kakunin_private.ledger default;
comment on table kakunin_private.ledger_default is 'Entries of a time for which no partition was made ahead';
do $$ begin perform kakunin_private.make_append_only('kakunin_private.ledger_default'); end $$;

create function kakunin.make_partitions(ahead interval default '3 months') returns name[]
language plpgsql volatile parallel unsafe security definer
-- Attaching waits for whoever has read the default partition and has not ended; others queue up behind that.
set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  v_month timestamp := date_trunc('month', kakunin_private.clock() at time zone interval '0');
  v_end   timestamp;
  v_name  text;
  v_made  name[] := '{}'::name[];
begin
  if coalesce(make_partitions.ahead not between '0' and interval '10 years', true) then
    raise exception using errcode = 'KA010', message = 'partitions are made 0 to 10 years ahead';
  end if;
  v_end := kakunin_private.clock() at time zone interval '0' + make_partitions.ahead;
  -- One at a time: two workers at once would make the same one. Nobody but them queues up here, so this may take longer.
  perform set_config('lock_timeout', '30s', true);
  lock table kakunin_private.partitions in share row exclusive mode;
  perform set_config('lock_timeout', '200ms', true);
  while v_month <= v_end loop
    v_name := 'ledger_' || to_char(v_month, 'YYYYMM');
    -- A month that the default partition has entries of stays there: nothing is ever moved.
    if not exists (select from kakunin_private.partitions p where p.name = v_name::name)
      and not exists (select from kakunin_private.ledger_default l
                       where l.recorded_at >= v_month at time zone interval '0'
                         and l.recorded_at < (v_month + interval '1 month') at time zone interval '0') then
      insert into kakunin_private.partitions (name, from_at, to_at)
      values (v_name::name, v_month at time zone interval '0', (v_month + interval '1 month') at time zone interval '0');
      -- Made first and attached then: that lets appends to the other partitions go on.
      execute format('create table kakunin_private.%I (like kakunin_private.ledger including all)', v_name);
      execute format('comment on table kakunin_private.%I is %L', v_name, 'Entries of ' || to_char(v_month, 'YYYY-MM') || ' (UTC)');
      perform kakunin_private.make_append_only(format('kakunin_private.%I', v_name)::regclass);
      execute format('alter table kakunin_private.ledger attach partition kakunin_private.%I for values from (%L) to (%L)',
        v_name, to_char(v_month, 'YYYY-MM-DD') || ' 00:00:00+00',
        to_char(v_month + interval '1 month', 'YYYY-MM-DD') || ' 00:00:00+00');
      v_made := v_made || v_name::name;
    end if;
    v_month := v_month + interval '1 month';
  end loop;
  return v_made;
end
$$;
comment on function kakunin.make_partitions(interval) is
  'Makes the ledger''s monthly partitions that are missing from now until so far ahead; returns their names. A month that came before it had one stays in the default partition. The worker calls it. For kakunin_worker, kakunin_operator';

-- Appending ------------------------------------------------------------------------------------------

create function kakunin_private.rfc3339(p_at timestamptz) returns text
language sql stable parallel safe
return to_char(p_at at time zone interval '0', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
comment on function kakunin_private.rfc3339(timestamptz) is 'The moment in UTC with microseconds, as entries have it';

create function kakunin_private.leaf_hash(p_entry text) returns bytea
language sql stable parallel safe
return sha256(E'\\x00'::bytea || convert_to(p_entry, 'UTF8'));
comment on function kakunin_private.leaf_hash(text) is 'The hash of an entry, RFC 6962 section 2.1: of a zero byte and its bytes';

-- Not in a halt's or a revocation's way: NOTIFY takes a lock of the whole cluster and fails where its queue is full (may_notify()).
create function kakunin_private.wake_worker() returns void
language plpgsql volatile parallel unsafe
as $$
begin
  -- One transaction wakes it, and the others go on. A queue that somebody else has half filled is left alone: the
  -- worker looks by itself as well.
  if kakunin_private.may_notify() then
    update kakunin_private.sleeper s set asleep = false
     where s.only_row = (select w.only_row from kakunin_private.sleeper w where w.asleep for update skip locked);
    if found then
      perform pg_notify('kakunin_ledger', '');
    end if;
  end if;
end
$$;
comment on function kakunin_private.wake_worker() is 'Notifies the worker if it sleeps and nobody has yet';

create type kakunin_private.taken as (chain kakunin_private.chains, installation uuid, asleep boolean);
comment on type kakunin_private.taken is 'A chain that this transaction has locked, and what appending to it needs to know';

create type kakunin_private.assessed as (chain kakunin_private.chains, risk jsonb);
comment on type kakunin_private.assessed is 'A chain as it is after an event, and what is said of the event';

-- Nobody ever waits here: chains that others hold are passed over, and where there is no other one it makes one.
create function kakunin_private.take_chain(p_chain_of uuid) returns kakunin_private.taken
language plpgsql volatile parallel unsafe
as $$
declare
  c_decisions constant uuid := '00000000-0000-0000-0000-000000000000'::uuid;
  -- A transaction that keeps its snapshot cannot continue a chain that went on since (40001). An agent's has to be run
  -- again, as with any row; a decision must not fail by the one before it, and begins another chain.
  v_any   constant boolean := p_chain_of <> c_decisions or kakunin_private.snapshot_is_fresh();
  v_taken kakunin_private.taken;
  v_made  bigint;  -- its xmin is that of a subtransaction, where there is one
begin
  loop
    select c as chain, (select i.installation_id from kakunin_private.installation i) as installation,
           (select s.asleep from kakunin_private.sleeper s) as asleep
      into v_taken
      from kakunin_private.chains c
     where c.agent_id = p_chain_of and (v_any or c.xmin = pg_current_xact_id()::xid or c.chain_id = v_made)
     order by c.chain_id
     limit 1
       for update of c skip locked;
    exit when found;
    insert into kakunin_private.chains (agent_id, sequence, head) values (p_chain_of, 0, decode(repeat('00', 32), 'hex'))
    returning chain_id into v_made;
  end loop;
  return v_taken;
end
$$;
comment on function kakunin_private.take_chain(uuid) is
  'Locks the first free chain of an owner (the nil UUID for decisions), or a new one, for this transaction';

create function kakunin_private.write_entry(
  p_chain kakunin_private.chains, p_installation uuid,
  p_event_type text, p_agent_id uuid, p_serial text, p_session_id text, p_metadata text, p_risk jsonb
) returns jsonb
language plpgsql volatile parallel unsafe
as $$
declare
  v_event_id    bigint;
  v_recorded_at timestamptz;
  v_entry       text;
  v_hash        bytea;
begin
  -- The id is drawn while the chain is held, so that ids rise along it; and while the ledger's table is, which the
  -- statement has from its beginning, for reseal().
  insert into kakunin_private.ledger (event_id, recorded_at, agent_id, xid, entry)
  select n.event_id, n.recorded_at, p_agent_id, pg_current_xact_id(), concat(
           '{"kakunin":"entry/1","installation":"', p_installation,
           '","event_id":', n.event_id,
           ',"recorded_at":"', kakunin_private.rfc3339(n.recorded_at),
           '","event_type":"', p_event_type,
           case when p_agent_id is null then '","agent_id":null' else '","agent_id":"' || p_agent_id || '"' end,
           case when p_serial is null then ',"serial":null' else ',"serial":"' || p_serial || '"' end,
           ',"login":', to_json(session_user::text),
           ',"session_id":', coalesce(to_json(p_session_id)::text, 'null'),
           ',"chain":', p_chain.chain_id, ',"sequence":', p_chain.sequence + 1, ',"prev":"', encode(p_chain.head, 'hex'),
           '","risk":', coalesce(p_risk::text, 'null'), ',"metadata":', p_metadata, '}')
    from (select nextval('kakunin_private.event_ids') as event_id, kakunin_private.clock() as recorded_at offset 0) n
  returning event_id, recorded_at, entry into v_event_id, v_recorded_at, v_entry;
  v_hash := kakunin_private.leaf_hash(v_entry);
  -- By its key, and not its ctid: what is locked may be a newer version of the row than a snapshot has.
  update kakunin_private.chains c
     set sequence = p_chain.sequence + 1, head = v_hash, risk_epoch = p_chain.risk_epoch, risk_at = p_chain.risk_at,
         hard = p_chain.hard, soft = p_chain.soft, drift = p_chain.drift, alerted = p_chain.alerted, hour = p_chain.hour,
         hour_soft = p_chain.hour_soft, hour_events = p_chain.hour_events, counts = p_chain.counts,
         expected = p_chain.expected, usual_amount = p_chain.usual_amount, usual_read = p_chain.usual_read,
         usual_written = p_chain.usual_written, known = p_chain.known, spent_on = p_chain.spent_on, spent_usd = p_chain.spent_usd
   where c.chain_id = p_chain.chain_id;
  return jsonb_build_object(
    'event_id', v_event_id, 'event_type', p_event_type, 'agent_id', p_agent_id,
    'recorded_at', kakunin_private.rfc3339(v_recorded_at),
    'chain', p_chain.chain_id, 'sequence', p_chain.sequence + 1, 'hash', encode(v_hash, 'hex'), 'prev', encode(p_chain.head, 'hex'));
end
$$;
comment on function kakunin_private.write_entry(kakunin_private.chains, uuid, text, uuid, text, text, text, jsonb) is
  'Appends an entry to a chain that this transaction has taken, stores the chain as it is given and says where the entry stands';

create function kakunin_private.append(
  p_event_type text, p_agent_id uuid, p_serial text, p_session_id text, p_metadata text, p_chain_of uuid
) returns jsonb
language plpgsql volatile parallel unsafe
as $$
declare
  v_taken constant kakunin_private.taken := kakunin_private.take_chain(p_chain_of);
  v_entry jsonb;
begin
  v_entry := kakunin_private.write_entry(
    v_taken.chain, v_taken.installation, p_event_type, p_agent_id, p_serial, p_session_id, p_metadata, null);
  if v_taken.asleep and p_serial is not null then  -- of an agent, and nobody else
    perform kakunin_private.wake_worker();
  end if;
  return v_entry;
end
$$;
comment on function kakunin_private.append(text, uuid, text, text, text, uuid) is
  'Appends an entry to the first free chain of its owner (the nil UUID for decisions) and says where it stands. It is not scored';

create function kakunin_private.record(p_event_type text, p_agent_id uuid, p_metadata jsonb) returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_entry constant jsonb := kakunin_private.append(
    p_event_type, p_agent_id, null, null, p_metadata::text, '00000000-0000-0000-0000-000000000000');
begin
  if p_event_type collate "C" = any (kakunin_private.webhook_events()) then
    perform kakunin_private.queue_webhook(p_event_type, p_agent_id, p_metadata, v_entry, null);
  end if;
end
$$;
comment on function kakunin_private.record(text, uuid, jsonb) is
  'Appends what was decided, and about which agent, to a chain that no agent can hold, and tells the webhooks that want to know';

-- What reads JSON stops at some depth: jq at 256, others at a thousand. Looked at only where there are brackets enough.
create function kakunin_private.is_too_deep(p_value jsonb) returns boolean
language sql immutable parallel safe
return (
  with recursive nested as (
    select p_value as value, 1 as depth
    union all
    select e.value, n.depth + 1
      from nested n,
           lateral (select v.value from jsonb_array_elements(case jsonb_typeof(n.value) when 'array' then n.value else '[]' end) v
                    union all
                    select v.value from jsonb_each(case jsonb_typeof(n.value) when 'object' then n.value else '{}' end) v) e
     where jsonb_typeof(e.value) in ('array', 'object') and n.depth <= 64
  )
  select max(n.depth) > 64 from nested n);
comment on function kakunin_private.is_too_deep(jsonb) is 'Whether arrays and objects are nested more than 64 deep';

create function kakunin_private.is_event_type(p_text text) returns boolean
language sql immutable parallel safe
return p_text collate "C" ~ '^[A-Za-z][A-Za-z0-9_:-]{0,63}$';
comment on function kakunin_private.is_event_type(text) is 'Whether an agent''s event may have this type. One with a dot is the kit''s own';

create function kakunin.audit_log_append(
  event_type text, metadata jsonb default '{}', session_id text default null, occurred_at timestamptz default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer
-- Planning one of its statements anew takes longer than running all of them.
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_generic_plan
as $$
declare
  v_now      constant timestamptz := kakunin_private.clock();
  v_type     text collate "C" := event_type;
  v_event    jsonb := coalesce(metadata, '{}');
  v_metadata text collate "C";
  v_binding  text collate "C" := current_setting('kakunin.session', true);
  v_bound    kakunin_private.bound;
  v_taken    kakunin_private.taken;
  v_scored   kakunin_private.assessed;
  v_entry    jsonb;
begin
  if v_type is null or not kakunin_private.is_event_type(v_type) then
    raise exception using errcode = 'KA010',
      message = 'an event type is 1 to 64 characters from A-Z a-z 0-9 _ : -, and begins with a letter',
      hint = 'Such as api_call, data_access or transaction_initiated. Names with a dot are the kit''s own.';
  end if;
  if audit_log_append.occurred_at is not null then
    -- Clocks differ; what is further ahead would move the agent's hours.
    if audit_log_append.occurred_at > v_now + interval '30 seconds' or audit_log_append.occurred_at < v_now - interval '720 hours' then
      raise exception using errcode = 'KA010',
        message = 'an event occurred within the last 30 days, and not later than now',
        hint = 'Compare the clocks. What is older an operator brings in with kakunin.import_events().';
    elsif jsonb_typeof(v_event) = 'object' then
      v_event := v_event || jsonb_build_object('occurred_at', kakunin_private.rfc3339(audit_log_append.occurred_at));
    end if;
  end if;
  v_metadata := v_event::text;
  -- Small enough to stay in the row's page, so that sealing and verifying read no other.
  if octet_length(v_metadata) > 16384 or octet_length(session_id) > 200 then
    raise exception using errcode = 'KA010',
      message = format('an event''s metadata is at most 16384 bytes of JSON and its session id 200; these have %s and %s',
        octet_length(v_metadata), coalesce(octet_length(session_id), 0)),
      hint = 'Keep what is large elsewhere, and put its SHA-256 here.';
  elsif length(v_metadata) - length(translate(v_metadata, '[{', '')) > 64 and kakunin_private.is_too_deep(metadata) then
    raise exception using errcode = 'KA010', message = 'an event''s metadata is nested more than 64 deep';
  end if;
  select b.* into v_bound from kakunin_private.bound_certificate(v_binding) b
   where kakunin_private.mark_bound(v_binding, b.serial);
  if not found then
    -- By another way than a binding, or it raises what is wrong.
    v_bound.serial := kakunin.require_session();
    if v_binding <> '' then
      perform kakunin_private.not_marked();
    end if;
    select c.serial, c.agent_id, c.financial_scope, a.risk_exempt, a.risk_factor, a.risk_epoch into v_bound
      from kakunin_private.certificates c join kakunin_private.agents a on a.agent_id = c.agent_id where c.serial = v_bound.serial;
  end if;
  v_taken := kakunin_private.take_chain(v_bound.agent_id);
  v_scored := kakunin_private.assess(
    v_taken.chain, v_type, v_event, v_bound, coalesce(audit_log_append.occurred_at, v_now), v_now);
  v_entry := kakunin_private.write_entry(
    v_scored.chain, v_taken.installation, v_type, v_bound.agent_id, v_bound.serial, session_id, v_metadata,
    v_scored.risk);
  if v_taken.asleep then
    perform kakunin_private.wake_worker();
  end if;
  return v_entry || v_scored.risk;
end
$$;
comment on function kakunin.audit_log_append(text, jsonb, text, timestamptz) is
  'Appends an event of the agent bound to this session to the ledger and scores it; returns event_id, chain, sequence and hashes, the event''s score, band and factors, and the agent''s agent_score and agent_band. It stands when the transaction commits. For kakunin_agent and kakunin_gateway';

-- Two branches, so that an agent reads its own by the index and an auditor scans. What an entry says is read from the
-- entry. A view's functions are called with its reader's rights, so none here is of the private schema.
create view kakunin.audit_log with (security_barrier = true) as
  select e.event_id, e.recorded_at, j.entry ->> 'event_type' as event_type, e.agent_id, j.entry ->> 'serial' as serial,
         j.entry ->> 'login' as login, j.entry ->> 'session_id' as session_id, j.entry -> 'metadata' as metadata,
         nullif(j.entry -> 'risk', 'null') as risk,
         (j.entry ->> 'chain')::bigint as chain, (j.entry ->> 'sequence')::bigint as sequence, j.entry ->> 'prev' as prev,
         encode(sha256(E'\\x00'::bytea || convert_to(e.entry, 'UTF8')), 'hex') as hash, e.entry
    from (select l.* from kakunin_private.ledger l where (select pg_has_role(current_user, 'kakunin_auditor', 'usage'))
          union all
          select l.* from kakunin_private.ledger l
           where not (select pg_has_role(current_user, 'kakunin_auditor', 'usage'))
             and l.agent_id = (select kakunin.current_agent_id())) e,
         lateral (select e.entry::jsonb as entry) j;
comment on view kakunin.audit_log is
  'The ledger''s entries: the bound agent''s own, or all of them for kakunin_auditor. For kakunin_agent, kakunin_gateway, kakunin_auditor';

do $$ begin perform kakunin.make_partitions(); end $$;

-- Risk: what an agent's events say about it, and what follows from that in the same commit.
--
-- Every event of audit_log_append() gets a score from 0 to 1: its type's base, raised by what is known of it.
--
--   hard    what is certain: the base of its type, and violations of the certificate's financial scope (a trade over
--           its limit, a venue it may not use). At 0.85 (critical) or more it revokes by itself.
--   soft    what is unusual for this agent: more events than at this time of the day before, larger amounts or more rows,
--           a venue, tool or table it never used, metadata that is no use. It raises the event's score to 0.84 at most.
--
-- Bands: low below 0.30, medium, high from 0.75, critical from 0.85.
--
-- The agent's own score is a noisy-or of what its events had in excess of 0.525, each fading with a half-life:
--
--   e_i = max(0, (s_i - 0.525) / 0.475)  R = 1 - prod (1 - e_i) ^ (2 ^ (-age_i / half-life))
--
-- At 0.525 and with base scores of 0.75, three refused attempts within an hour are critical, three in a morning are not, and two are
-- not even high: people and programs make a mistake twice.
--
-- In logarithms that is a sum, w_i = -ln(1 - e_i), which fades as a whole. So one number and the moment it was worked out at are
-- all of the history that an event needs: its cost does not grow, time alone never raises a score, and another event
-- never lowers it. Of what is unusual each amount and each number of rows counts, and of the rest only the most of each hour. What
-- is unusual and drift take R to soft_limit at most, also together with what is certain: by them an agent comes to be high, and is
-- read-only under a risk-adaptive policy, but it is revoked by what is certain alone.
--
-- Where the numbers are. In the row of the chain (60_ledger.sql) that the event is appended to, which its transaction
-- has locked anyway: so nobody waits for another transaction's score. An agent that appends from several
-- transactions at once has several chains, and its score is the sum over them. What concurrent transactions add is not
-- seen by either; the next event sees it, and so does settle_risk(), which the worker calls.
--
-- What a critical score does. The agent's own transaction writes one row, into risk_stops (30_identity.sql), which every check of a certificate
-- looks at: from its commit on no statement of any of its sessions is served. It does not lock its agent or certificates: it may
-- stay open for as long as the agent likes, and the operator who halts it meanwhile must not wait. settle_risk() turns the stop into
-- a suspension and revocations like an operator's, for revocation lists and for whoever asks later.
--
-- Whether it counts is decided with the agent's clock out of it: an event is scored, and counted, at the moment it is recorded. One
-- said to have occurred earlier is also counted in the hour it is of, but apart: a baseline is not moved by hindsight, nor avoided.

create table kakunin_private.risk_settings (
  only_row        boolean primary key default true check (only_row),
  mode            text collate "C" not null default 'enforce' check (mode in ('enforce', 'observe')),
  base            jsonb not null default
    '{"api_call": 0.1, "data_access": 0.1, "data_mutation": 0.3, "transaction_initiated": 0.3, "unauthorized_access_attempt": 0.75, "transaction_anomaly": 0.75, "other": 0.3}',
  medium          double precision not null default 0.30,
  high            double precision not null default 0.75,
  critical        double precision not null default 0.85,
  half_life       interval not null default '24 hours' check (half_life between '1 hour' and '30 days'),
  soft_limit      double precision not null default 0.82 check (soft_limit between 0 and 0.99),
  violation       double precision not null default 0.75 check (violation between 0 and 1),
  gross           double precision not null default 0.95 check (gross between 0 and 1),
  gross_ratio     double precision not null default 10 check (gross_ratio > 1 and gross_ratio < 'infinity'),
  rate_weight     double precision not null default 0.9 check (rate_weight between 0 and 0.99),
  amount_weight   double precision not null default 0.6 check (amount_weight between 0 and 0.99),
  rows_weight     double precision not null default 0.8 check (rows_weight between 0 and 0.99),
  novelty_weight  double precision not null default 0.25 check (novelty_weight between 0 and 0.99),
  malformed_weight double precision not null default 0.3 check (malformed_weight between 0 and 0.99),
  drift_weight    double precision not null default 0.8 check (drift_weight between 0 and 0.99),
  rate_floor      double precision not null default 20 check (rate_floor >= 1 and rate_floor < 'infinity'),
  quiet_floor     double precision not null default 4 check (quiet_floor >= 1 and quiet_floor < 'infinity'),
  history_days    integer not null default 7 check (history_days between 1 and 30),
  check (0 < medium and medium < high and high < critical and critical < 1),
  check (violation < critical and gross >= critical)
);
insert into kakunin_private.risk_settings default values;
comment on table kakunin_private.risk_settings is 'How events are scored and what follows. Changed by kakunin.set_risk()';
comment on column kakunin_private.risk_settings.mode is 'observe: scores are worked out and alerts recorded, but nobody is revoked and nothing refused';
comment on column kakunin_private.risk_settings.base is 'The base score of each event type; "other" is for those not named';
comment on column kakunin_private.risk_settings.medium is 'The score an agent''s band is medium from';
comment on column kakunin_private.risk_settings.high is 'The score its band is high from';
comment on column kakunin_private.risk_settings.critical is 'The score it is revoked from, its own or that of what is certain of one event';
comment on column kakunin_private.risk_settings.half_life is 'How long it takes an attempt to count half as much';
comment on column kakunin_private.risk_settings.soft_limit is 'The score that what is unusual takes an agent to at most, drift included';
comment on column kakunin_private.risk_settings.violation is 'The hard score of an event outside the certificate''s financial scope';
comment on column kakunin_private.risk_settings.gross is 'The hard score of one gross_ratio times over a limit, or more';
comment on column kakunin_private.risk_settings.gross_ratio is 'How many times over a limit is gross';
comment on column kakunin_private.risk_settings.rate_weight is 'The most of the factor rate: more events than at this time of the day before';
comment on column kakunin_private.risk_settings.amount_weight is 'The most of the factor amount_deviation';
comment on column kakunin_private.risk_settings.rows_weight is 'The most of the factor rows';
comment on column kakunin_private.risk_settings.novelty_weight is 'The most of the factor novelty: a venue, tool or table that the agent never named';
comment on column kakunin_private.risk_settings.malformed_weight is 'The most of the factor malformed_metadata';
comment on column kakunin_private.risk_settings.drift_weight is 'The score that drift takes an agent to at most';
comment on column kakunin_private.risk_settings.rate_floor is 'Events an hour that are not unusual whatever the baseline says';
comment on column kakunin_private.risk_settings.quiet_floor is 'The same at hours of the day at which the agent does not work';
comment on column kakunin_private.risk_settings.history_days is 'Days of history before anything is called unusual';

create table kakunin_private.risk_hours (
  agent_id   uuid not null,
  hour       timestamptz not null,
  chain_id   bigint not null,  -- 0 for what an operator imported
  event_type text collate "C" not null,
  events     bigint not null,
  late       bigint not null default 0,
  excess     double precision not null default 0,
  amounts    bigint not null default 0,
  amount_usd numeric not null default 0,
  log_sum    double precision not null default 0,
  log_square double precision not null default 0,
  primary key (agent_id, hour, chain_id, event_type)
);
create index risk_hours_hour on kakunin_private.risk_hours (hour);
comment on table kakunin_private.risk_hours is
  'What each agent did, by hour; the present hour is in its chains. Kept for 60 days';
comment on column kakunin_private.risk_hours.late is 'Events said to be of this hour that were recorded after it, and are among the "events" of the hour they were recorded in';
comment on column kakunin_private.risk_hours.excess is 'The sum of -ln(1 - e), for the contribution of a type to the score';
comment on column kakunin_private.risk_hours.log_sum is 'Sum of the natural logarithms of amounts, and log_square of their squares';

create table kakunin_private.risk_known (
  agent_id uuid not null,
  digest   bytea not null,
  chain_id bigint not null,
  primary key (agent_id, digest, chain_id)
);
comment on table kakunin_private.risk_known is 'Venues, tools and tables each agent has used, 256 a chain';
comment on column kakunin_private.risk_known.digest is 'The first 16 bytes of SHA-256 of the kind, a colon and the value';

create table kakunin_private.risk_reviews (
  review_id  bigint generated always as identity primary key,
  agent_id   uuid not null,
  raised_at  timestamptz not null,
  score      double precision not null,
  factors    jsonb not null,
  decided_at timestamptz,
  decided_by name,
  decision   text collate "C",
  check (num_nulls(decided_at, decided_by, decision) in (0, 3))
);
create index risk_reviews_open on kakunin_private.risk_reviews (agent_id) where decided_at is null;
comment on table kakunin_private.risk_reviews is 'Revocation checks: agents whose score came to be high, for an operator to look at';
comment on sequence kakunin_private.risk_reviews_review_id_seq is 'Ids of revocation checks';

-- Arithmetic -----------------------------------------------------------------------------------------

create function kakunin_private.risk_band(p_score double precision, p_settings kakunin_private.risk_settings) returns text
language sql immutable parallel safe
return case when p_score >= (p_settings).critical then 'critical' when p_score >= (p_settings).high then 'high'
            when p_score >= (p_settings).medium then 'medium' else 'low' end;
comment on function kakunin_private.risk_band(double precision, kakunin_private.risk_settings) is 'low, medium, high or critical';

create function kakunin_private.excess(p_score double precision) returns double precision
language sql immutable parallel safe
return -ln(1 - least(greatest(p_score - 0.525, 0) / 0.475, 0.999));
comment on function kakunin_private.excess(double precision) is 'What a score adds: -ln(1 - e), e = max(0, (s - 0.525) / 0.475)';

-- After a hundred half-lives it fades no more: what is left of the least that is stored is a number even when it has faded twice.
create function kakunin_private.faded(p_at timestamptz, p_now timestamptz, p_half_life interval) returns double precision
language sql immutable parallel safe
return power(0.5, least(greatest(extract(epoch from p_now - p_at)::double precision, 0)
  / extract(epoch from p_half_life)::double precision, 100));
comment on function kakunin_private.faded(timestamptz, timestamptz, interval) is 'What is left of one after so long';

-- The one definition of an agent's score, from what its chains sum up to. What is unusual takes it to the limit at most, together
-- with what is certain and whatever the factor: beyond that only what is certain counts. Postgres raises what is too small for a
-- number, so exponents, and factors below, are kept from it: an agent whose score could not be worked out would fail settle_risk() for all.
create function kakunin_private.agent_score(
  p_hard double precision, p_soft double precision, p_drift double precision, p_factor double precision, p_limit double precision
) returns double precision
language sql immutable parallel safe
return 1 - exp(-least(greatest(p_factor * p_hard, least(p_factor * (p_hard + p_soft + p_drift), -ln(1 - p_limit))), 700));
comment on function kakunin_private.agent_score(double precision, double precision, double precision, double precision, double precision) is
  'R, of hard and soft excess and drift; p_factor is the agent''s own (kakunin.set_agent_risk)';

-- What a caller wrote, whatever it wrote: NULL where it is no number, or none that an amount could be.
create function kakunin_private.number_of(p_text text) returns numeric
language sql immutable parallel safe
return case when p_text ~ '^[0-9]{1,18}([.][0-9]{1,18})?$' then p_text::numeric end;
comment on function kakunin_private.number_of(text) is 'The number from zero to below 10^18 that this text is, or NULL';

-- No more than stable, as convert_to() is: else it is not inlined.
create function kakunin_private.known_digest(p_kind text, p_value text) returns bytea
language sql stable parallel safe
return substr(sha256(convert_to(p_kind || ':' || p_value, 'UTF8')), 1, 16);
comment on function kakunin_private.known_digest(text, text) is 'How risk_known has a value';

create function kakunin_private.spread(p_usual kakunin_private.baseline) returns double precision
language sql immutable parallel safe
return greatest(sqrt(greatest((p_usual).square / (p_usual).n, 0)), 0.25);
comment on function kakunin_private.spread(kakunin_private.baseline) is 'The standard deviation, and 0.25 at least';

create function kakunin_private.beyond(p_value double precision, p_usual kakunin_private.baseline) returns double precision
language sql immutable parallel safe
return case when (p_usual).n >= 30
  then 1 - 1 / (1 + greatest((p_value - (p_usual).mean) / kakunin_private.spread(p_usual) - 3, 0)) else 0 end;
comment on function kakunin_private.beyond(double precision, kakunin_private.baseline) is
  'How far the logarithm of a value is beyond what is usual: 0 up to three standard deviations above the mean, towards 1 beyond';

-- Welford's, with what is older than some thousand events fading. What is beyond three standard deviations counts as if it were
-- there, so that who goes far beyond does not make it usual. In two expressions, each of which is inlined.
create function kakunin_private.off(p_usual kakunin_private.baseline, p_value double precision) returns double precision
language sql immutable parallel safe
return case when abs(p_value - (p_usual).mean) <= 1e-9 then 0
            when (p_usual).n >= 30 then least(p_value - (p_usual).mean, 3 * kakunin_private.spread(p_usual))
            else p_value - (p_usual).mean end;
comment on function kakunin_private.off(kakunin_private.baseline, double precision) is
  'How far the logarithm of a value is off the mean, three standard deviations at most';

create function kakunin_private.learned(p_usual kakunin_private.baseline, p_off double precision) returns kakunin_private.baseline
language sql immutable parallel safe
return row(
  least((p_usual).n, 2000) + 1,
  (p_usual).mean + p_off / (least((p_usual).n, 2000) + 1),
  greatest((p_usual).square * least(1, 2000 / (least((p_usual).n, 2000) + 1)) + p_off ^ 2 * least((p_usual).n, 2000) / (least((p_usual).n, 2000) + 1), 1e-9)
)::kakunin_private.baseline;
comment on function kakunin_private.learned(kakunin_private.baseline, double precision) is
  'What is usual after another value that is so far off';

-- Limits of a certificate's financial scope. A limit that is there and cannot be read permits nothing, nor does one that is not
-- known: no such certificate is registered, but one may have been.
create function kakunin_private.violations(
  p_scope jsonb, p_amount numeric, p_spent numeric, p_venue text, p_instrument text, p_leverage numeric
) returns table (violation text, ratio double precision, reason text)
language sql immutable parallel safe
begin atomic
  select l.violation, l.ratio, l.reason
    from (select 'amount', p_amount / nullif(m.value, 0), format('amount %s exceeds max_single_trade_usd %s', left(p_amount::text, 40), left(p_scope ->> 'max_single_trade_usd', 40))
            from (select kakunin_private.number_of(p_scope ->> 'max_single_trade_usd')) m(value)
           where p_scope ? 'max_single_trade_usd' and p_amount > coalesce(m.value, 0)
          union all
          select 'daily_amount', (p_spent + p_amount) / nullif(m.value, 0), format('%s today exceeds daily_limit_usd %s', left((p_spent + p_amount)::text, 40), left(p_scope ->> 'daily_limit_usd', 40))
            from (select kakunin_private.number_of(p_scope ->> 'daily_limit_usd')) m(value)
           where p_scope ? 'daily_limit_usd' and p_amount > 0 and p_spent + p_amount > coalesce(m.value, 0)
          union all
          select 'leverage', p_leverage / nullif(m.value, 0), format('leverage %s exceeds max_leverage_ratio %s', left(p_leverage::text, 40), left(p_scope ->> 'max_leverage_ratio', 40))
            from (select kakunin_private.number_of(p_scope ->> 'max_leverage_ratio')) m(value)
           where p_scope ? 'max_leverage_ratio' and p_leverage > coalesce(m.value, 0)
          union all
          select 'leverage', p_leverage, format('leverage %s is not permitted', left(p_leverage::text, 40))
           where p_scope ? 'leverage_permitted' and p_scope -> 'leverage_permitted' <> 'true' and p_leverage > 1
          union all
          select 'venue', 1, format('venue %s is not in permitted_venues', quote_literal(left(p_venue, 100)))
           where p_scope ? 'permitted_venues' and p_venue is not null
             and not coalesce(jsonb_typeof(p_scope -> 'permitted_venues') = 'array' and p_scope -> 'permitted_venues' ? p_venue, false)
          union all
          select 'instrument', 1, format('instrument %s is not in permitted_instruments', quote_literal(left(p_instrument, 100)))
           where p_scope ? 'permitted_instruments' and p_instrument is not null
             and not coalesce(jsonb_typeof(p_scope -> 'permitted_instruments') = 'array' and p_scope -> 'permitted_instruments' ? p_instrument, false)
          union all
          select 'unknown_limit', 1, format('nothing enforces %s of its financial scope', kakunin_private.unknown_limits(p_scope))
           where p_scope - kakunin_private.limits() <> '{}' and num_nonnulls(p_amount, p_venue, p_instrument, p_leverage) > 0
         ) l(violation, ratio, reason);
end;
comment on function kakunin_private.violations(jsonb, numeric, numeric, text, text, numeric) is
  'What of this is outside a financial scope: max_single_trade_usd, daily_limit_usd, leverage_permitted, max_leverage_ratio, permitted_venues, permitted_instruments, or all of it where it has another member; ratio is how many times over';

-- Drift: the last 7 days against those 28 to 60 days back, so that what changes slowly is seen against a time before it; with
-- less than 42 days of history, against all before the 7. By the mix of event types (square root of the Jensen-Shannon divergence, in
-- bits), by how far the mean logarithm of amounts has moved (in standard deviations) and by events a day. Each has a
-- dead zone that sampling, a weekly rhythm and healthy growth stay within. What came before the agent was last reinstated has been
-- looked at: of the 7 days those since then count. In the mix each hour counts with the square root
-- of its events, so that one burst of the same call is not a change of habits, and what sampling does to it goes
-- with the hours there are, not the events: those of an hour come together.
create function kakunin_private.risk_drift(p_agent_id uuid, p_at timestamptz, out drift double precision, out factors jsonb)
language sql stable parallel safe
begin atomic
  with window_of as (
    select greatest(p_at - interval '168 hours', max(a.reinstated_at)) as recent
      from kakunin_private.agents a where a.agent_id = p_agent_id
  ), buckets as (
    select h.event_type, h.hour, sum(h.events)::double precision as events, sum(h.amounts)::double precision as amounts,
           sum(h.log_sum) as log_sum, sum(h.log_square) as log_square
      from kakunin_private.risk_hours h
     where h.agent_id = p_agent_id and h.hour >= p_at - interval '1440 hours' and h.hour < p_at
     group by h.event_type, h.hour having sum(h.events) > 0  -- not hours of which there is but hindsight
  ), span as (
    select s.since, case when s.since <= p_at - interval '1008 hours' then p_at - interval '672 hours' else p_at - interval '168 hours' end as until
      from (select min(b.hour) as since from buckets b) s
  ), hours as (
    select b.*, b.hour >= w.recent as recent
      from buckets b, span s, window_of w
     where b.hour >= w.recent or b.hour < s.until
  ), types as (
    select t.event_type,
           t.recent / nullif(sum(t.recent) over (), 0) as p, t.before / nullif(sum(t.before) over (), 0) as q
      from (select h.event_type, coalesce(sum(sqrt(h.events)) filter (where h.recent), 0) as recent,
                   coalesce(sum(sqrt(h.events)) filter (where not h.recent), 0) as before
              from hours h group by h.event_type) t
  ), mix as (
    select sqrt(greatest(sum(
             case when t.p > 0 then t.p * ln(2 * t.p / (t.p + t.q)) else 0 end
             + case when t.q > 0 then t.q * ln(2 * t.q / (t.p + t.q)) else 0 end) / (2 * ln(2::double precision)), 0)) as distance
      from types t
  ), totals as (
    select coalesce(sum(h.events) filter (where h.recent), 0) as recent, coalesce(sum(h.events) filter (where not h.recent), 0) as before,
           count(distinct h.hour) filter (where h.recent) as hours,
           sum(h.log_sum) filter (where h.recent) / nullif(sum(h.amounts) filter (where h.recent), 0) as mean_recent,
           sum(h.log_sum) filter (where not h.recent) / nullif(sum(h.amounts) filter (where not h.recent), 0) as mean_before,
           sum(h.log_square) filter (where not h.recent) / nullif(sum(h.amounts) filter (where not h.recent), 0) as square_before,
           least(sum(h.amounts) filter (where h.recent), sum(h.amounts) filter (where not h.recent)) as amounts
      from hours h
  ), parts as (
    select t.recent >= 50 and t.before >= 200 as enough, m.distance, t.hours, t.amounts,
           case when t.amounts >= 30
             then (t.mean_recent - t.mean_before) / greatest(sqrt(greatest(t.square_before - t.mean_before ^ 2, 0)), 0.25) end as shift,
           t.recent / greatest(extract(epoch from p_at - w.recent)::double precision / 86400, 1) / nullif(t.before / greatest(extract(epoch from s.until - s.since)::double precision / 86400, 1), 0) as growth
      from totals t, mix m, span s, window_of w
  ), shares as (
    select p.enough, p.distance, p.shift, p.growth,
           least(greatest((coalesce(p.distance, 0) - 0.05 - 1 / sqrt(greatest(p.hours, 1))) / 0.15, 0), 1) as mix,
           least(greatest((coalesce(p.shift, 0) - 0.3 - 2 / sqrt(greatest(p.amounts, 1))) / 0.5, 0), 1) as amount,
           least(greatest((coalesce(p.growth, 0) - 5) / 10, 0), 1) as rate
      from parts p
  )
  select case when s.enough then greatest(s.mix, s.amount, s.rate) end,
         case when s.enough then jsonb_build_object(
           'event_mix', round(s.mix::numeric, 3), 'amount', round(s.amount::numeric, 3), 'rate', round(s.rate::numeric, 3),
           'event_mix_distance', round(s.distance::numeric, 3), 'amount_shift', round(s.shift::numeric, 3),
           'events_a_day_ratio', round(s.growth::numeric, 3)) end
    from shares s;
end;
comment on function kakunin_private.risk_drift(uuid, timestamptz) is
  'Drift of an agent from 0 to 1 and what it consists of; NULL with less than 50 events in the last 7 days or 200 before';

-- An event ------------------------------------------------------------------------------------------

-- Once an hour and chain, and drift once a day, or each hour while there is some. What it reads is bounded by 30 and 60 days, and
-- nothing of it is done by the events between.
create function kakunin_private.roll(p_chain kakunin_private.chains, p_hour timestamptz) returns kakunin_private.chains
language plpgsql volatile parallel unsafe
as $$
declare
  c_from   constant timestamptz := p_hour - interval '720 hours';  -- days are those of the session's time zone, which the agent may set
  c_today  constant boolean := coalesce(date_bin('1 day', p_chain.hour, 'epoch') = date_bin('1 day', p_hour, 'epoch'), false);
  v_set    kakunin_private.risk_settings;
  v_other  record;
  v_rate   record;
  v_faded  double precision;
begin
  select * into v_set from kakunin_private.risk_settings s;
  insert into kakunin_private.risk_hours as h
    (agent_id, hour, chain_id, event_type, events, excess, amounts, amount_usd, log_sum, log_square)
  select p_chain.agent_id, p_chain.hour, p_chain.chain_id, e.key, (e.value ->> 0)::bigint, (e.value ->> 1)::double precision,
         (e.value ->> 2)::bigint, (e.value ->> 3)::numeric, (e.value ->> 4)::double precision, (e.value ->> 5)::double precision
    from jsonb_each(p_chain.counts) e
  on conflict (agent_id, hour, chain_id, event_type) do update
     set events = h.events + excluded.events, excess = h.excess + excluded.excess, amounts = h.amounts + excluded.amounts,
         amount_usd = h.amount_usd + excluded.amount_usd, log_sum = h.log_sum + excluded.log_sum, log_square = h.log_square + excluded.log_square;
  -- It fades as all else does, so that no event makes less of it than time has.
  v_faded := case when p_chain.drift > 1e-6 then p_chain.drift * kakunin_private.faded(p_chain.hour, p_hour, v_set.half_life) else 0 end;
  p_chain.hour := p_hour;
  p_chain.counts := '{}';
  p_chain.hour_soft := 0;
  p_chain.hour_events := 0;
  -- Another chain of this agent has worked it out for this hour.
  select c.expected, c.drift into v_other from kakunin_private.chains c
   where c.agent_id = p_chain.agent_id and c.chain_id <> p_chain.chain_id and c.hour = p_hour and c.risk_epoch = p_chain.risk_epoch
   limit 1;
  if found then
    p_chain.expected := v_other.expected;
    p_chain.drift := greatest(v_faded, v_other.drift);
    return p_chain;
  end if;
  -- Of the same hour of the day and the ones beside it, the most there was; and what a growing agent does anyhow. Where it has
  -- worked at this time of the day on no more than a tenth of its days, what was then is no measure: a thief's
  -- first night does not make the second one usual.
  select min(h.hour) as since, sum(h.events) / greatest(extract(epoch from p_hour - min(h.hour)) / 3600, 1) as overall,
         max(h.events) filter (where h.near) as most,
         count(distinct date_bin('1 day', h.hour, 'epoch')) as days, count(distinct date_bin('1 day', h.hour, 'epoch')) filter (where h.near) as days_near,
         sum(h.amounts)::double precision as amounts, sum(h.log_sum) as log_sum, sum(h.log_square) as log_square
    into v_rate
    from (select g.hour, (extract(epoch from p_hour - g.hour)::bigint / 3600 + 1) % 24 <= 2 as near, sum(g.events) as events, sum(g.amounts) as amounts, sum(g.log_sum) as log_sum, sum(g.log_square) as log_square
            from kakunin_private.risk_hours g
           where g.agent_id = p_chain.agent_id and g.hour >= c_from and g.hour < p_hour
           group by g.hour having sum(g.events) > 0) h;
  p_chain.expected := case when v_rate.since <= p_hour - make_interval(hours => 24 * v_set.history_days)
    then case when v_rate.days >= 10 and v_rate.days_near <= v_rate.days / 10 then v_set.quiet_floor
              else greatest(v_set.rate_floor, 2 * coalesce(v_rate.most, 0), v_rate.overall) end end;
  -- A chain that is new knows no amounts, but its agent has had some.
  if (p_chain.usual_amount).n < 30 and v_rate.amounts > 0 then
    p_chain.usual_amount := row(v_rate.amounts, v_rate.log_sum / v_rate.amounts,
      greatest(v_rate.log_square - v_rate.log_sum ^ 2 / v_rate.amounts, 0))::kakunin_private.baseline;
  end if;
  p_chain.drift := v_faded;
  if (not c_today or v_faded > 0.05) and v_rate.since <= p_hour - interval '336 hours' then
    p_chain.drift := greatest(v_faded, kakunin_private.excess(0.525 + 0.475 * v_set.drift_weight
      * coalesce((select d.drift from kakunin_private.risk_drift(p_chain.agent_id, p_hour) d), 0)));
  end if;
  return p_chain;
end
$$;
comment on function kakunin_private.roll(kakunin_private.chains, timestamptz) is
  'Begins another hour of a chain: stores the last one, and works out what is usual in this one';

create function kakunin_private.assess(
  p_chain kakunin_private.chains, p_event_type text, p_metadata jsonb, p_bound kakunin_private.bound,
  p_occurred_at timestamptz, p_recorded_at timestamptz
) returns kakunin_private.assessed
language plpgsql volatile parallel unsafe
as $$
declare
  v_hour       constant timestamptz := date_bin('1 hour', p_recorded_at, 'epoch');
  v_today      constant timestamptz := date_bin('1 day', p_recorded_at, 'epoch');
  v_set        kakunin_private.risk_settings;
  v_type       text collate "C" := p_event_type;
  v_row        record;
  v_given      record;
  v_venue      text;
  v_instrument text;
  v_digests    bytea[];
  v_amount     numeric;
  v_rows       numeric;
  v_leverage   numeric;
  v_log        double precision;
  v_log_rows   double precision;
  v_off        double precision;
  v_hard       double precision;
  v_score      double precision;
  v_part       double precision;
  v_usual      double precision := 1::double precision;
  v_own        double precision := 0::double precision;
  v_soft       double precision;
  v_fade       double precision;
  v_total      double precision;
  v_other_hard double precision := 0::double precision;
  v_other_soft double precision := 0::double precision;
  v_drift      double precision := 0::double precision;
  v_events     bigint := 0::bigint;
  v_spent      numeric := 0.0;
  v_malformed  boolean := false;
  v_factors    jsonb := '{}'::jsonb;
  v_counts     jsonb;
  v_risk       jsonb;
begin
  if p_chain.risk_epoch <> p_bound.risk_epoch then  -- an operator let it begin anew
    p_chain.risk_epoch := p_bound.risk_epoch;
    p_chain.hard := 0;
    p_chain.soft := 0;
    p_chain.hour_soft := 0;
    p_chain.drift := 0;
    p_chain.alerted := false;
  end if;
  if coalesce(p_chain.hour < v_hour, true) then
    p_chain := kakunin_private.roll(p_chain, v_hour);
  end if;
  if p_chain.spent_on is distinct from v_today then
    p_chain.spent_on := v_today;
    p_chain.spent_usd := 0;
  end if;
  -- The settings, and the agent's other chains; mostly there is none, and then none of this is worked out.
  for v_row in
    select s as settings, c.risk_at, c.hard, c.soft, c.drift, c.hour, c.hour_events, c.spent_on, c.spent_usd
      from kakunin_private.risk_settings s
      left join kakunin_private.chains c
        on c.agent_id = p_chain.agent_id and c.chain_id <> p_chain.chain_id and c.risk_epoch = p_chain.risk_epoch
  loop
    v_set := v_row.settings;
    if v_row.hour is not null then
      v_fade := kakunin_private.faded(v_row.risk_at, p_recorded_at, v_set.half_life);
      v_other_hard := v_other_hard + v_row.hard * v_fade;
      v_other_soft := v_other_soft + v_row.soft * v_fade;
      v_drift := greatest(v_drift, v_row.drift * kakunin_private.faded(v_row.hour, p_recorded_at, v_set.half_life));
      v_events := v_events + case when v_row.hour = v_hour then v_row.hour_events else 0 end;
      v_spent := v_spent + case when v_row.spent_on = v_today then v_row.spent_usd else 0 end;
    end if;
  end loop;
  if not v_set.base ? v_type then
    v_type := 'other';
  end if;

  -- What it says. Nothing of it is believed but that it was said.
  if jsonb_typeof(p_metadata) is distinct from 'object' then
    v_malformed := true;
  elsif p_metadata <> '{}' then
    select p_metadata ->> 'amount_usd' as amount_usd, p_metadata ->> 'amountUsd' as amount_usd_2, p_metadata ->> 'rows' as rows,
           p_metadata ->> 'row_count' as row_count, p_metadata ->> 'leverage' as leverage, p_metadata ->> 'venue' as venue,
           coalesce(p_metadata ->> 'instrument', p_metadata ->> 'symbol') as instrument,
           coalesce(p_metadata ->> 'tool', p_metadata ->> 'action') as tool, p_metadata ->> 'table' as relation,
           -- Names are texts, and none is empty: as texts, what else they may be is not in it.
           jsonb_strip_nulls(jsonb_build_object(
             'venue', p_metadata ->> 'venue', 'instrument', p_metadata ->> 'instrument', 'symbol', p_metadata ->> 'symbol',
             'tool', p_metadata ->> 'tool', 'action', p_metadata ->> 'action', 'table', p_metadata ->> 'table')) as names
      into v_given;
    if num_nonnulls(v_given.amount_usd, v_given.amount_usd_2, v_given.rows, v_given.row_count, v_given.leverage) > 0 then
      -- Of two spellings the larger counts.
      v_amount := greatest(kakunin_private.number_of(v_given.amount_usd), kakunin_private.number_of(v_given.amount_usd_2));
      v_rows := greatest(kakunin_private.number_of(v_given.rows), kakunin_private.number_of(v_given.row_count));
      v_leverage := kakunin_private.number_of(v_given.leverage);
      v_malformed := num_nonnulls(v_given.amount_usd, v_given.amount_usd_2, v_given.rows, v_given.row_count, v_given.leverage)
        > num_nonnulls(kakunin_private.number_of(v_given.amount_usd), kakunin_private.number_of(v_given.amount_usd_2),
                       kakunin_private.number_of(v_given.rows), kakunin_private.number_of(v_given.row_count), v_leverage);
    end if;
    v_venue := v_given.venue;
    v_instrument := v_given.instrument;
    if v_venue is not null then
      v_digests := v_digests || kakunin_private.known_digest('venue', v_venue);
    end if;
    if v_given.tool is not null then
      v_digests := v_digests || kakunin_private.known_digest('tool', v_given.tool);
    end if;
    if v_given.relation is not null then
      v_digests := v_digests || kakunin_private.known_digest('table', v_given.relation);
    end if;
    if greatest(length(v_venue), length(v_instrument), length(v_given.tool), length(v_given.relation)) > 200
      or not p_metadata @> v_given.names
      or '' in (v_venue, p_metadata ->> 'instrument', p_metadata ->> 'symbol', p_metadata ->> 'tool', p_metadata ->> 'action', v_given.relation) then
      v_malformed := true;
    end if;
    if v_digests is not null and (
      select count(distinct n.digest) from kakunin_private.risk_known n
       where n.agent_id = p_chain.agent_id and n.digest = any (v_digests)) = cardinality(v_digests) then
      v_digests := null;
    end if;
  end if;

  -- Certain.
  v_hard := (v_set.base ->> v_type)::double precision;
  if p_bound.financial_scope is not null and num_nonnulls(v_amount, v_leverage, v_venue, v_instrument) > 0 then
    for v_row in
      select v.violation, v.ratio from kakunin_private.violations(
        p_bound.financial_scope, v_amount, case when v_type = 'transaction_initiated' then v_spent + p_chain.spent_usd else 0 end,
        v_venue, v_instrument, v_leverage) v
    loop
      v_part := case when coalesce(v_row.ratio >= v_set.gross_ratio, true) then v_set.gross else v_set.violation end;
      v_factors := v_factors || jsonb_build_object(v_row.violation, round(v_part::numeric, 3));
      v_hard := greatest(v_hard, v_part);
    end loop;
  end if;

  -- Unusual.
  if v_malformed then
    v_factors := v_factors || jsonb_build_object('malformed_metadata', round(v_set.malformed_weight::numeric, 3));
    v_usual := v_usual * (1 - v_set.malformed_weight);
  end if;
  if v_digests is not null then
    if p_chain.known < 256 then
      insert into kakunin_private.risk_known (agent_id, digest, chain_id)
      select distinct p_chain.agent_id, d, p_chain.chain_id from unnest(v_digests) d on conflict do nothing;
      p_chain.known := p_chain.known + cardinality(v_digests);
    end if;
    if p_chain.expected is not null then
      v_factors := v_factors || jsonb_build_object('novelty', round(v_set.novelty_weight::numeric, 3));
      v_usual := v_usual * (1 - v_set.novelty_weight);
    end if;
  end if;
  if 1 + v_events + p_chain.hour_events > p_chain.expected then
    v_part := v_set.rate_weight * (1 - p_chain.expected / (1 + v_events + p_chain.hour_events));
    if v_part >= 0.01 then
      v_factors := v_factors || jsonb_build_object('rate', round(v_part::numeric, 3));
      v_usual := v_usual * (1 - v_part);
    end if;
  end if;
  if v_amount > 0 then
    v_log := ln(greatest(v_amount, 0.01))::double precision;
    if p_chain.expected is not null then
      v_part := v_set.amount_weight * kakunin_private.beyond(v_log, p_chain.usual_amount);
      if v_part >= 0.01 then
        v_factors := v_factors || jsonb_build_object('amount_deviation', round(v_part::numeric, 3));
        v_usual := v_usual * (1 - v_part);
        v_own := v_own - ln(1 - v_part) / 2;
      end if;
    end if;
    if v_type = 'transaction_initiated' then
      p_chain.spent_usd := p_chain.spent_usd + v_amount;
    end if;
    v_off := kakunin_private.off(p_chain.usual_amount, v_log);
    p_chain.usual_amount := kakunin_private.learned(p_chain.usual_amount, v_off);
  end if;
  if v_rows > 0 then
    v_log_rows := ln(v_rows)::double precision;
    if v_type = 'data_mutation' then  -- rows written are not of the size of those read
      v_part := v_set.rows_weight * kakunin_private.beyond(v_log_rows, p_chain.usual_written);
      v_off := kakunin_private.off(p_chain.usual_written, v_log_rows);
      p_chain.usual_written := kakunin_private.learned(p_chain.usual_written, v_off);
    else
      v_part := v_set.rows_weight * kakunin_private.beyond(v_log_rows, p_chain.usual_read);
      v_off := kakunin_private.off(p_chain.usual_read, v_log_rows);
      p_chain.usual_read := kakunin_private.learned(p_chain.usual_read, v_off);
    end if;
    if p_chain.expected is not null and v_part >= 0.01 then
      v_factors := v_factors || jsonb_build_object('rows', round(v_part::numeric, 3));
      v_usual := v_usual * (1 - v_part);
      v_own := v_own - ln(1 - v_part) / 2;
    end if;
  end if;
  v_score := 1 - (1 - v_hard) * v_usual;
  if v_hard < v_set.critical then
    v_score := greatest(v_hard, least(v_score, v_set.critical - 0.01));
  end if;

  -- The agent's.
  v_fade := kakunin_private.faded(p_chain.risk_at, p_recorded_at, v_set.half_life);
  p_chain.risk_at := greatest(p_chain.risk_at, p_recorded_at);
  p_chain.hard := case when p_chain.hard > 1e-6 then p_chain.hard * v_fade else 0 end + kakunin_private.excess(v_hard);
  -- What is unusual is weighed as if it were of an event that is medium at most: what is certain has its own weight already, and a
  -- mistake is often one with a tool or an amount that is new.
  v_part := least(v_hard, v_set.medium);
  v_soft := kakunin_private.excess(1 - (1 - v_part) * v_usual) - kakunin_private.excess(v_part);
  -- Amounts and rows far beyond what is usual are so rare that each is evidence: half of what it weighs, also where it is
  -- not the most of its hour. Some five in a row make an agent high, a single large export does not.
  p_chain.soft := case when p_chain.soft > 1e-6 then p_chain.soft * v_fade else 0 end + greatest(v_soft - p_chain.hour_soft, v_own, 0);
  -- Twice what the limit needs, so that no flood of what is unusual is still there weeks later.
  p_chain.soft := least(p_chain.soft, -2 * ln(1 - v_set.soft_limit) / least(p_bound.risk_factor, 1));
  p_chain.hour_soft := greatest(p_chain.hour_soft, v_soft);
  v_total := kakunin_private.agent_score(
    v_other_hard + p_chain.hard, v_other_soft + p_chain.soft,
    greatest(v_drift, p_chain.drift * kakunin_private.faded(p_chain.hour, p_recorded_at, v_set.half_life)), p_bound.risk_factor, v_set.soft_limit);

  -- Where it is counted: events, excess, amounts, their sum, that of their logarithms and of those squared. As numeric, because
  -- the digits that a double precision has in JSON are up to the session (extra_float_digits).
  v_counts := coalesce(p_chain.counts -> v_type, '[0,0,0,0,0,0]');
  if p_occurred_at < v_hour then
    insert into kakunin_private.risk_hours as h (agent_id, hour, chain_id, event_type, events, late)
    values (p_chain.agent_id, date_bin('1 hour', p_occurred_at, 'epoch'), p_chain.chain_id, v_type, 0, 1)
    on conflict (agent_id, hour, chain_id, event_type) do update set late = h.late + 1;
  end if;
  p_chain.hour_events := p_chain.hour_events + 1;
  p_chain.counts := p_chain.counts || jsonb_build_object(v_type, jsonb_build_array(
    (v_counts -> 0)::bigint + 1,
    ((v_counts -> 1)::double precision + kakunin_private.excess(v_score))::numeric,
    (v_counts -> 2)::bigint + case when v_log is null then 0 else 1 end, (v_counts -> 3)::numeric + coalesce(v_amount, 0),
    ((v_counts -> 4)::double precision + coalesce(v_log, 0))::numeric, ((v_counts -> 5)::double precision + coalesce(v_log ^ 2, 0))::numeric));

  v_risk := jsonb_build_object('score', round(v_score::numeric, 4), 'band', kakunin_private.risk_band(v_score, v_set), 'factors', v_factors,
    'agent_score', round(v_total::numeric, 4), 'agent_band', kakunin_private.risk_band(v_total, v_set));
  if not p_bound.risk_exempt then
    if v_total >= v_set.high or v_hard >= v_set.critical then
      v_risk := v_risk || kakunin_private.react(p_chain, p_bound.serial, v_risk,
        v_set.mode = 'enforce' and (v_total >= v_set.critical or v_hard >= v_set.critical));
      p_chain.alerted := true;
    elsif v_total < v_set.high - 0.05 then  -- a score that goes back and forth about the threshold is one alert
      p_chain.alerted := false;
    end if;
  end if;
  return (p_chain, v_risk);
end
$$;
comment on function kakunin_private.assess(kakunin_private.chains, text, jsonb, kakunin_private.bound, timestamptz, timestamptz) is
  'Scores an event of the bound agent: what its chain is after it, and what is said of it';

-- Another transaction of the agent may have made the name and stay open. Then it is left to that one, or to settle_risk():
-- whoever takes a snapshot for every statement sees the row of risk_stops anyhow.
create function kakunin_private.stop_at_once(p_name text) returns void
language plpgsql volatile parallel unsafe set lock_timeout = '10ms'
as $$
begin
  perform kakunin_private.stop(p_name);
exception
  when lock_not_available then
    null;
end
$$;
comment on function kakunin_private.stop_at_once(text) is 'stop(), but for a name that another transaction is just making';

create function kakunin_private.react(p_chain kakunin_private.chains, p_serial text, p_risk jsonb, p_revoke boolean) returns jsonb
language plpgsql volatile parallel unsafe
as $$
declare
  v_known constant jsonb := p_risk || jsonb_build_object('serial', p_serial);
begin
  if not p_chain.alerted and not exists (
    select from kakunin_private.risk_reviews r
     where r.agent_id = p_chain.agent_id and r.decided_at is null and r.raised_at > kakunin_private.clock() - interval '1 hour') then
    insert into kakunin_private.risk_reviews (agent_id, raised_at, score, factors)
    values (p_chain.agent_id, kakunin_private.clock(), (p_risk ->> 'agent_score')::double precision, p_risk);
    perform kakunin_private.record('agent.high_risk', p_chain.agent_id, v_known);
  end if;
  if p_revoke then
    insert into kakunin_private.risk_stops (agent_id, chain_id, stopped_at, reason)
    values (p_chain.agent_id, p_chain.chain_id, kakunin_private.clock(),
            format('risk score %s (%s), event score %s', p_risk ->> 'agent_score', p_risk ->> 'agent_band', p_risk ->> 'score'))
    on conflict (agent_id, chain_id) do nothing;
    if found then
      perform kakunin_private.stop_at_once('risk ' || p_chain.agent_id);
      perform kakunin_private.record('agent.revoked', p_chain.agent_id, v_known);
      perform kakunin_private.notify_revocation(array[p_chain.agent_id]);
    end if;
  end if;
  return jsonb_build_object('revoked', p_revoke);
end
$$;
comment on function kakunin_private.react(kakunin_private.chains, text, jsonb, boolean) is
  'What follows from a high score: a revocation check and an alert, at most one an hour, and at a critical one the stop';

-- An agent's score -----------------------------------------------------------------------------------

create function kakunin_private.risk_of(
  p_agent_id uuid, out score double precision, out drift double precision, out hard double precision, out soft double precision,
  out spent_usd numeric, out band text, out established boolean
)
language sql stable parallel restricted
begin atomic
  with moment as (
    select kakunin_private.clock() as at
  ), summed as (
    select coalesce(sum(c.hard * kakunin_private.faded(c.risk_at, m.at, s.half_life)), 0) as hard,
           coalesce(sum(c.soft * kakunin_private.faded(c.risk_at, m.at, s.half_life)), 0) as soft,
           coalesce(max(c.drift * kakunin_private.faded(c.hour, m.at, s.half_life)), 0) as drift,
           coalesce(sum(c.spent_usd) filter (where c.spent_on = date_bin('1 day', m.at, 'epoch')), 0) as spent,
           coalesce(bool_or(c.expected is not null), false) as established
      from moment m cross join kakunin_private.risk_settings s
      left join kakunin_private.agents a on a.agent_id = p_agent_id
      left join kakunin_private.chains c on c.agent_id = a.agent_id and c.risk_epoch = a.risk_epoch
  ), scored as (
    select kakunin_private.agent_score(u.hard, u.soft, u.drift, a.risk_factor, s.soft_limit) as score, u.*, s as settings
      from summed u cross join kakunin_private.risk_settings s
      join kakunin_private.agents a on a.agent_id = p_agent_id
  )
  select r.score, r.drift, r.hard, r.soft, r.spent,
         case when exists (select from kakunin_private.risk_stops t where t.agent_id = p_agent_id) then 'critical'
              else kakunin_private.risk_band(r.score, r.settings) end,
         r.established
    from scored r;
end;
comment on function kakunin_private.risk_of(uuid) is 'Where the risk of an agent stands at this moment; no row for an agent that is unknown';

create function kakunin_private.risk_profile(p_agent_id uuid) returns jsonb
language plpgsql stable parallel restricted
as $$
declare
  v_now  constant timestamptz := kakunin_private.clock();
  v_risk record;
  v_day  record;
  v_drift record;
  v_types jsonb;
begin
  v_risk := kakunin_private.risk_of(p_agent_id);
  select coalesce(sum(h.excess) filter (where h.hour >= v_now - interval '24 hours'), 0) as day,
         coalesce(sum(h.excess) filter (where h.hour < v_now - interval '24 hours' and h.hour >= v_now - interval '168 hours'), 0) / 6 as before,
         coalesce(sum(h.events), 0) as events
    into v_day
    from kakunin_private.risk_buckets h
   where h.agent_id = p_agent_id and h.hour >= v_now - interval '720 hours';
  select coalesce(jsonb_object_agg(t.event_type, jsonb_build_object('events', t.events, 'contribution', t.contribution)), '{}') into v_types
    from (select h.event_type, sum(h.events) as events,
                 round((sum(h.excess) / nullif(sum(sum(h.excess)) over (), 0))::numeric, 4) as contribution
            from kakunin_private.risk_buckets h
           where h.agent_id = p_agent_id and h.hour >= v_now - interval '720 hours'
           group by h.event_type) t;
  v_drift := kakunin_private.risk_drift(p_agent_id, v_now);
  return jsonb_build_object(
    'agent_id', p_agent_id,
    'score', round(v_risk.score::numeric, 4),
    'band', v_risk.band,
    'window_days', 30,
    'events', v_day.events,
    'by_event_type', v_types,
    'trend', case when not v_risk.established then 'insufficient_data'
                  when v_day.day > 1.25 * v_day.before + 0.05 then 'rising'
                  when v_day.day < 0.8 * v_day.before - 0.05 then 'falling' else 'stable' end,
    'drift', case when v_drift.drift is null then '"insufficient_data"'::jsonb
                  else jsonb_build_object('score', round(v_drift.drift::numeric, 4), 'factors', v_drift.factors) end,
    'recommendation', case v_risk.band
      when 'low' then 'Proceed.'
      when 'medium' then 'Throttle: reduce transaction limits.'
      when 'high' then 'Stop writing and notify a human operator.'
      else 'Stop: the agent is revoked, or about to be. Notify a human operator.' end);
end
$$;
comment on function kakunin_private.risk_profile(uuid) is 'What check_risk_score() answers';

create function kakunin.check_risk_score() returns jsonb
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.require_session();
begin
  return kakunin_private.risk_profile((select c.agent_id from kakunin_private.certificates c where c.serial = v_serial));
end
$$;
comment on function kakunin.check_risk_score() is
  'The bound agent''s risk over 30 days: score, band, trend, drift, by_event_type and recommendation. Raises what require_session() raises. For kakunin_agent and kakunin_gateway';

create function kakunin.agent_risk(agent_id uuid) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_known_agent(agent_risk.agent_id);
  return kakunin_private.risk_profile(agent_risk.agent_id);
end
$$;
comment on function kakunin.agent_risk(uuid) is 'What check_risk_score() answers this agent. For kakunin_operator and kakunin_auditor';

create function kakunin.verify_agent_scope(
  action text, amount_usd numeric default null, venue text default null, instrument text default null, leverage numeric default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial  text collate "C";
  v_bound   record;
  v_risk    record;
  v_reasons jsonb := '[]'::jsonb;
  v_message text;
  v_state   text;
begin
  begin
    v_serial := kakunin.require_session();
  exception
    -- The answer of a tool, not an error of the transaction it is asked in. Anything but these goes on up.
    when sqlstate 'KA001' or sqlstate 'KA002' or sqlstate 'KA003' or sqlstate 'KA004' or sqlstate 'KA008' then
      get stacked diagnostics v_message = message_text, v_state = returned_sqlstate;
      return jsonb_build_object('allowed', false, 'action', action, 'reason', v_message, 'code', v_state);
  end;
  select c.agent_id, c.permitted_actions, c.financial_scope into v_bound from kakunin_private.certificates c where c.serial = v_serial;
  v_risk := kakunin_private.risk_of(v_bound.agent_id);
  if not coalesce(kakunin.has_scope(verify_agent_scope.action), false) then
    v_reasons := v_reasons || jsonb_build_array(format(
      'the certificate does not permit %s', coalesce(quote_literal(left(verify_agent_scope.action, 128)), 'NULL')));
  end if;
  -- Neither is a number that a limit can be compared with.
  if not coalesce(verify_agent_scope.amount_usd between 0 and 1e18, true) or not coalesce(verify_agent_scope.leverage between 0 and 1e18, true) then
    v_reasons := v_reasons || '["amount and leverage must be zero or more"]'::jsonb;
  else
    v_reasons := v_reasons || coalesce((
      select jsonb_agg(v.reason) from kakunin_private.violations(
        v_bound.financial_scope, verify_agent_scope.amount_usd, v_risk.spent_usd, verify_agent_scope.venue, verify_agent_scope.instrument,
        verify_agent_scope.leverage) v), '[]');
  end if;
  return jsonb_build_object(
    'allowed', v_reasons = '[]', 'action', verify_agent_scope.action,
    'reason', case when v_reasons = '[]' then 'permitted by the certificate' else (select string_agg(r, '; ') from jsonb_array_elements_text(v_reasons) r) end,
    'code', case when v_reasons <> '[]' then 'KA005' end,
    'agent_id', v_bound.agent_id, 'certificate_serial', v_serial,
    'risk_score', round(v_risk.score::numeric, 4), 'risk_band', v_risk.band);
end
$$;
comment on function kakunin.verify_agent_scope(text, numeric, text, text, numeric) is
  'Whether the bound certificate permits this action, amount, venue, instrument and leverage: allowed and reason, and code where it is not. It decides nothing by itself: policies do. For kakunin_agent and kakunin_gateway';

-- For policies ---------------------------------------------------------------------------------------

create table kakunin_private.spending (
  agent_id   uuid not null,
  day        timestamptz not null,
  amount_usd numeric not null,
  primary key (agent_id, day)
);
create index spending_day on kakunin_private.spending (day);
comment on table kakunin_private.spending is 'What require_spend() has let through, by day (UTC). Kept for a few days';

create function kakunin_private.refused(
  p_observe boolean, p_agent_id uuid, p_serial text, p_code text, p_message text, p_hint text
) returns boolean
language plpgsql volatile parallel unsafe
as $$
begin
  -- A snapshot may be older than the end of observing, and be handed to ever new transactions: there its name decides.
  if p_observe or ((select s.mode = 'observe' from kakunin_private.risk_settings s)
    and (kakunin_private.snapshot_is_fresh() or kakunin_private.is_stopped('risk observed'))) then
    raise warning using message = 'observed, and would be refused: ' || p_message;
    -- In a chain of the agent's: as a decision, each of its transactions above READ COMMITTED would begin another chain of those.
    perform kakunin_private.append(
      'policy.observed', p_agent_id, p_serial, null, jsonb_build_object('code', p_code, 'reason', p_message)::text, p_agent_id);
    return true;
  end if;
  raise exception using errcode = p_code, message = p_message, hint = p_hint;
end
$$;
comment on function kakunin_private.refused(boolean, uuid, text, text, text, text) is
  'Raises, or in observe mode records that it would have, and says true';

create function kakunin.require_spend(
  amount_usd numeric, venue text default null, instrument text default null, leverage numeric default null, observe boolean default false
) returns boolean
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_serial text collate "C" := kakunin.require_session();
  v_now    constant timestamptz := kakunin_private.clock();
  v_bound  record;
  v_spent  numeric := 0.0;
  v_reason text;
begin
  select c.agent_id, coalesce(c.financial_scope, '{}') as scope into v_bound from kakunin_private.certificates c where c.serial = v_serial;
  if require_spend.amount_usd is null or not require_spend.amount_usd between 0 and 1e18
    or not coalesce(require_spend.leverage between 0 and 1e18, true) then
    return kakunin_private.refused(require_spend.observe, v_bound.agent_id, v_serial, 'KA009',
      format('certificate %s may not spend %s: amounts and leverage are zero or more', v_serial, coalesce(left(require_spend.amount_usd::text, 40), 'NULL')),
      'Give the amount in USD.');
  end if;
  if v_bound.scope ? 'daily_limit_usd' then
    -- The row is held until the transaction ends: two of an agent's cannot both spend what is left. No other agent waits.
    insert into kakunin_private.spending as s (agent_id, day, amount_usd)
    values (v_bound.agent_id, date_bin('1 day', v_now, 'epoch'), require_spend.amount_usd)
    on conflict (agent_id, day) do update set amount_usd = s.amount_usd + excluded.amount_usd
    returning s.amount_usd - require_spend.amount_usd into v_spent;
  end if;
  -- A scope that names venues permits no trade that names none: the column may be NULL, or the policy have left it away.
  select string_agg(v.reason, '; ') into v_reason from (
    select r.reason from kakunin_private.violations(
      v_bound.scope, require_spend.amount_usd, v_spent, require_spend.venue, require_spend.instrument, require_spend.leverage) r
    union all
    select 'no venue is given, and permitted_venues is a limit' where require_spend.venue is null and v_bound.scope ? 'permitted_venues'
    union all
    select 'no instrument is given, and permitted_instruments is a limit'
     where require_spend.instrument is null and v_bound.scope ? 'permitted_instruments') v;
  if v_reason is not null then
    return kakunin_private.refused(require_spend.observe, v_bound.agent_id, v_serial, 'KA009',
      format('certificate %s: %s', v_serial, v_reason), 'Have the agent certified for more, or spend less.');
  end if;
  return true;
end
$$;
comment on function kakunin.require_spend(numeric, text, text, numeric, boolean) is
  'True where the bound certificate''s financial scope permits to spend this, which is then counted towards daily_limit_usd; otherwise KA009. For policies, WITH CHECK, a row at a time; observe: records instead of refusing. For kakunin_agent and kakunin_gateway';

create function kakunin.require_risk_below(band text default 'high', observe boolean default false) returns boolean
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_bands constant text[] collate "C" := '{low,medium,high,critical}'::text[];
  v_serial text collate "C" := kakunin.require_session();
  v_agent  record;
  v_risk   record;
begin
  if coalesce(band collate "C" not in ('medium', 'high', 'critical'), true) then
    raise exception using errcode = 'KA010', message = 'the band is medium, high or critical';
  end if;
  select a.agent_id, a.risk_exempt into v_agent
    from kakunin_private.certificates c join kakunin_private.agents a on a.agent_id = c.agent_id where c.serial = v_serial;
  v_risk := kakunin_private.risk_of(v_agent.agent_id);
  if not v_agent.risk_exempt and array_position(c_bands, v_risk.band) >= array_position(c_bands, require_risk_below.band collate "C") then
    return kakunin_private.refused(require_risk_below.observe, v_agent.agent_id, v_serial, 'KA011',
      format('the risk of agent %s is %s (%s), and this is for agents below %s', v_agent.agent_id, v_risk.band, round(v_risk.score::numeric, 2), band),
      'Wait until the score has fallen, or have an operator review it.');
  elsif not kakunin_private.snapshot_is_fresh() then
    return kakunin_private.refused(require_risk_below.observe, v_agent.agent_id, v_serial, 'KA010',
      format('what risk forbids is for READ COMMITTED transactions: this one (%s) has a snapshot, and shows the score of then',
        current_setting('transaction_isolation')),
      'Write in a READ COMMITTED transaction.');
  end if;
  return true;
end
$$;
comment on function kakunin.require_risk_below(text, boolean) is
  'True while the bound agent''s band is below this one; otherwise KA011, and KA010 above READ COMMITTED, where the band is that of the snapshot. For policies: (select kakunin.require_risk_below(''high'')) makes a table read-only; observe: records instead of refusing. For kakunin_agent and kakunin_gateway';

-- Operators ------------------------------------------------------------------------------------------

create function kakunin.set_risk(settings jsonb) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_before kakunin_private.risk_settings;
  v_after  kakunin_private.risk_settings;
  v_name   text;
begin
  select * into v_before from kakunin_private.risk_settings s for update;
  if coalesce(jsonb_typeof(settings), 'null') <> 'object' then
    raise exception using errcode = 'KA010', message = 'the settings of risk are a JSON object', hint = 'Such as {"half_life": "12 hours"}.';
  end if;
  select k into v_name from jsonb_object_keys(settings) k where k = 'only_row' or not to_jsonb(v_before) ? k limit 1;
  if found then
    raise exception using errcode = 'KA010', message = format('no setting of risk is named %s', quote_literal(left(v_name, 64))),
      hint = 'set_risk(''{}'') shows them.';
  end if;
  if settings ? 'base' and (
    coalesce(jsonb_typeof(settings -> 'base') <> 'object', true) or not settings -> 'base' ? 'other'
    or exists (select from jsonb_each(case jsonb_typeof(settings -> 'base') when 'object' then settings -> 'base' else '{}' end) e
                where not kakunin_private.is_event_type(e.key) or jsonb_typeof(e.value) <> 'number' or (e.value::text)::numeric not between 0 and 0.999
                   or scale((e.value::text)::numeric) > 6)
    or (select count(*) from jsonb_object_keys(settings -> 'base')) > 100) then
    raise exception using errcode = 'KA010',
      message = 'base is an object of at most 100 event types and their scores from 0 to 0.999 with at most six decimals, "other" among them';
  end if;
  begin
    v_after := jsonb_populate_record(v_before, settings);
    update kakunin_private.risk_settings s
       set (mode, base, medium, high, critical, half_life, soft_limit, violation, gross, gross_ratio, rate_weight, amount_weight,
            rows_weight, novelty_weight, malformed_weight, drift_weight, rate_floor, quiet_floor, history_days)
         = (select v_after.mode, v_after.base, v_after.medium, v_after.high, v_after.critical, v_after.half_life, v_after.soft_limit,
                   v_after.violation, v_after.gross, v_after.gross_ratio, v_after.rate_weight, v_after.amount_weight,
                   v_after.rows_weight, v_after.novelty_weight, v_after.malformed_weight, v_after.drift_weight,
                   v_after.rate_floor, v_after.quiet_floor, v_after.history_days);
  exception
    when check_violation or not_null_violation or data_exception then
      raise exception using errcode = 'KA010', message = format('a setting of risk is not what it must be: %s', sqlerrm),
        hint = 'Thresholds rise from medium to critical, weights are 0 to 0.99, half_life is an hour to 30 days.';
  end;
  if v_after.mode = 'observe' then
    perform kakunin_private.stop('risk observed');
  else
    drop domain if exists kakunin_private."risk observed";
  end if;
  perform kakunin_private.record('settings.changed', null, jsonb_build_object('risk', settings));
  return to_jsonb(v_after) - 'only_row';
end
$$;
comment on function kakunin.set_risk(jsonb) is
  'Changes settings of risk (those named), which the ledger records; returns all of them. set_risk(''{}'') shows them. For kakunin_operator';

create function kakunin.set_agent_risk(agent_id uuid, reason text, exempt boolean default null, factor double precision default null)
returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_text('a reason', set_agent_risk.reason, 1000);
  if num_nulls(exempt, factor) = 2 or not coalesce(factor between 0.1 and 10, true) then
    raise exception using errcode = 'KA010', message = 'set_agent_risk() needs exempt (true or false) or a factor from 0.1 to 10';
  end if;
  perform kakunin_private.lock_agent(set_agent_risk.agent_id);
  update kakunin_private.agents a
     set risk_exempt = coalesce(exempt, a.risk_exempt), risk_factor = coalesce(factor, a.risk_factor)
   where a.agent_id = set_agent_risk.agent_id;
  perform kakunin_private.record('agent.risk_set', set_agent_risk.agent_id,
    jsonb_build_object('reason', set_agent_risk.reason, 'exempt', exempt, 'factor', factor));
end
$$;
comment on function kakunin.set_agent_risk(uuid, text, boolean, double precision) is
  'Exempts an agent from what its score would do, or has it judged more (above 1) or less severely. For kakunin_operator';

create function kakunin_private.settle(p_agent_id uuid, p_reason text default null) returns boolean
language plpgsql volatile parallel unsafe
as $$
declare
  v_reason text := p_reason;
begin
  -- The worker waits for nobody, or its other work would too: an agent that somebody is deciding about is for the next time.
  perform from kakunin_private.agents a where a.agent_id = p_agent_id for no key update skip locked;
  if not found then
    return false;
  end if;
  if v_reason is null then
    select r.reason into v_reason from kakunin_private.risk_stops r where r.agent_id = p_agent_id order by r.stopped_at limit 1;
    if not found then
      return false;
    end if;
    delete from kakunin_private.risk_stops r where r.agent_id = p_agent_id;
    -- Here, where its row was seen: a stop that commits while the agent is reinstated keeps its name.
    execute format('drop domain if exists kakunin_private.%I', 'risk ' || p_agent_id);
  end if;
  perform kakunin.suspend_agent(p_agent_id, v_reason);
  perform kakunin_private.revoke(
    array(select c.serial from kakunin_private.certificates c where c.agent_id = p_agent_id and c.not_after >= kakunin_private.clock()),
    'privilegeWithdrawn');
  return true;
end
$$;
comment on function kakunin_private.settle(uuid, text) is
  'Suspends an agent that its score has stopped, or for a reason that is given, and revokes its certificates; false where there is neither, or somebody else has the agent locked';

create function kakunin.settle_risk() returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_settled integer := 0;
  v_agent   record;
begin
  perform kakunin_private.check_snapshot_is_fresh('settling risk');
  -- Those that are stopped, and what the transactions of an agent added side by side, or in a snapshot in which nothing followed
  -- from it: it was exempt, or all was observed. Nothing is put into risk_stops: an agent's open transaction may have its
  -- row there, and whoever adds another one waits for it.
  for v_agent in
    select distinct r.agent_id, null::double precision as score from kakunin_private.risk_stops r
    union all
    select m.agent_id, r.score
      from (select c.agent_id
              from kakunin_private.risk_settings s, kakunin_private.chains c join kakunin_private.agents a on a.agent_id = c.agent_id
             where c.hard + c.soft > 0.05 and not a.risk_exempt and a.suspended_at is null and c.risk_epoch = a.risk_epoch
               and not exists (select from kakunin_private.risk_stops t where t.agent_id = c.agent_id)
             group by c.agent_id
            having count(*) > 1 or sum(c.hard) * max(a.risk_factor) >= -ln(1 - max(s.critical))) m,
           lateral kakunin_private.risk_of(m.agent_id) r
     where r.score >= (select s.critical from kakunin_private.risk_settings s where s.mode = 'enforce')
     order by agent_id
  loop
    if kakunin_private.settle(v_agent.agent_id, case when v_agent.score is not null
      then format('risk score %s, of all its transactions', round(v_agent.score::numeric, 4)) end) then
      v_settled := v_settled + 1;
      if v_agent.score is not null then
        perform kakunin_private.record('agent.revoked', v_agent.agent_id, jsonb_build_object('agent_score', round(v_agent.score::numeric, 4)));
      end if;
    end if;
  end loop;
  -- The moment in a subselect: a volatile function beside an indexed column would be asked of every row.
  delete from kakunin_private.risk_hours h
   where h.ctid = any (array(select o.ctid from kakunin_private.risk_hours o where o.hour < (select kakunin_private.clock() - interval '60 days') order by o.hour limit 1000 for update skip locked));
  delete from kakunin_private.spending p
   where p.ctid = any (array(select o.ctid from kakunin_private.spending o where o.day < (select kakunin_private.clock() - interval '3 days') order by o.day limit 1000 for update skip locked));
  return v_settled;
end
$$;
comment on function kakunin.settle_risk() is
  'Revokes the certificates of agents that their score has stopped, for revocation lists, and suspends them; returns how many. The worker calls it. For kakunin_worker, kakunin_operator';

create function kakunin.review_risk(review_id bigint, decision text) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_agent_id uuid;
begin
  update kakunin_private.risk_reviews r
     set decided_at = kakunin_private.clock(), decided_by = session_user, decision = kakunin_private.check_text('a decision', review_risk.decision, 1000)
   where r.review_id = review_risk.review_id and r.decided_at is null
  returning r.agent_id into v_agent_id;
  if not found then
    raise exception using errcode = 'KA010', message = format('no revocation check %s is open', coalesce(review_risk.review_id::text, 'given')),
      hint = 'kakunin.risk_reviews shows them.';
  end if;
  perform kakunin_private.record('risk.reviewed', v_agent_id, jsonb_build_object('review_id', review_risk.review_id, 'decision', review_risk.decision));
end
$$;
comment on function kakunin.review_risk(bigint, text) is
  'Closes a revocation check with what was decided; suspending, revoking or reinstating is done by their own functions. For kakunin_operator';

create function kakunin.import_events(agent_id uuid, events jsonb) returns bigint
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   constant timestamptz := kakunin_private.clock();
  v_base  constant jsonb := (select s.base from kakunin_private.risk_settings s);
  v_count bigint;
  v_wrong bigint;
begin
  perform kakunin_private.check_known_agent(import_events.agent_id);
  if coalesce(jsonb_typeof(events) <> 'array', true) or jsonb_array_length(events) not between 1 and 10000 then
    raise exception using errcode = 'KA010', message = 'events are a JSON array of 1 to 10000',
      hint = 'Each {"occurred_at": "<RFC 3339>", "event_type": "...", "metadata": {...}}.';
  end if;
  select min(e.at) into v_wrong
    from jsonb_array_elements(events) with ordinality as e(event, at)
   where not coalesce(jsonb_typeof(e.event -> 'event_type') = 'string' and kakunin_private.is_event_type(e.event ->> 'event_type')
     and jsonb_typeof(e.event -> 'occurred_at') = 'string'
     and e.event ->> 'occurred_at' ~ '^[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})$', false);
  if v_wrong is not null then
    raise exception using errcode = 'KA010', message = format('event %s has no event_type, or no occurred_at as in RFC 3339', v_wrong);
  end if;
  begin
    select min(e.at) into v_wrong
      from jsonb_array_elements(events) with ordinality as e(event, at)
     where (e.event ->> 'occurred_at')::timestamptz > v_now + interval '30 seconds';
  exception
    when data_exception then
      raise exception using errcode = 'KA010', message = format('an occurred_at is not a moment: %s', sqlerrm);
  end;
  if v_wrong is not null then
    raise exception using errcode = 'KA010', message = format('event %s lies in the future', v_wrong);
  end if;
  with parsed as (
    select (e.event ->> 'occurred_at')::timestamptz as occurred_at,
           case when v_base ? (e.event ->> 'event_type') then e.event ->> 'event_type' else 'other' end as event_type,
           greatest(kakunin_private.number_of(e.event -> 'metadata' ->> 'amount_usd'), kakunin_private.number_of(e.event -> 'metadata' ->> 'amountUsd')) as amount
      from jsonb_array_elements(events) e(event)
  )
  insert into kakunin_private.risk_hours as h (agent_id, hour, chain_id, event_type, events, amounts, amount_usd, log_sum, log_square)
  select import_events.agent_id, date_bin('1 hour', p.occurred_at, 'epoch'), 0, p.event_type, count(*),
         count(*) filter (where p.amount > 0), coalesce(sum(p.amount), 0),
         coalesce(sum(ln(greatest(p.amount, 0.01))) filter (where p.amount > 0), 0),
         coalesce(sum(ln(greatest(p.amount, 0.01)) ^ 2) filter (where p.amount > 0), 0)
    from parsed p group by 2, 4
  on conflict on constraint risk_hours_pkey do update
     set events = h.events + excluded.events, amounts = h.amounts + excluded.amounts, amount_usd = h.amount_usd + excluded.amount_usd,
         log_sum = h.log_sum + excluded.log_sum, log_square = h.log_square + excluded.log_square;
  insert into kakunin_private.risk_known (agent_id, digest, chain_id)
  select distinct import_events.agent_id, kakunin_private.known_digest(k.kind, k.value), 0
    from jsonb_array_elements(events) e(event),
         lateral (values ('venue', e.event -> 'metadata' ->> 'venue'),
                         ('tool', coalesce(e.event -> 'metadata' ->> 'tool', e.event -> 'metadata' ->> 'action')),
                         ('table', e.event -> 'metadata' ->> 'table')) k(kind, value)
   where k.value is not null
   limit 1000
  on conflict do nothing;
  select count(*) into v_count from jsonb_array_elements(events);
  perform kakunin_private.record('events.imported', import_events.agent_id, jsonb_build_object(
    'events', v_count, 'sha256', encode(sha256(convert_to(events::text, 'UTF8')), 'hex')));
  return v_count;
end
$$;
comment on function kakunin.import_events(uuid, jsonb) is
  'Brings in an agent''s history from elsewhere as its baseline, marked as imported: [{"occurred_at", "event_type", "metadata"}]. The ledger records the digest, not the events; they add nothing to the score. For kakunin_operator';

-- For reading ----------------------------------------------------------------------------------------

create view kakunin_private.risk_buckets as
  select h.agent_id, h.hour, h.event_type, h.chain_id = 0 as imported, h.events, h.late, h.excess, h.amount_usd
    from kakunin_private.risk_hours h
  union all
  select c.agent_id, c.hour, e.key, false, (e.value ->> 0)::bigint, 0, (e.value ->> 1)::double precision, (e.value ->> 3)::numeric
    from kakunin_private.chains c, jsonb_each(c.counts) e;
comment on view kakunin_private.risk_buckets is 'What each agent did by hour, the present one included';

-- Two branches, as in kakunin.audit_log: an agent reads its own hours by the index.
create view kakunin.risk_by_hour with (security_barrier = true) as
  select b.agent_id, b.hour, b.event_type, sum(b.events)::bigint as events, sum(b.late)::bigint as late,
         sum(b.events) filter (where b.imported)::bigint as imported, sum(b.amount_usd) as amount_usd, sum(b.excess) as excess,
         sum(sum(b.events)) over (partition by b.agent_id, b.event_type order by b.hour
           range between '30 days' preceding and current row)::bigint as events_30_days
    from (select r.* from kakunin_private.risk_buckets r
           where (select pg_has_role(current_user, 'kakunin_auditor', 'usage') or pg_has_role(current_user, 'kakunin_operator', 'usage'))
          union all
          select r.* from kakunin_private.risk_buckets r
           where not (select pg_has_role(current_user, 'kakunin_auditor', 'usage') or pg_has_role(current_user, 'kakunin_operator', 'usage'))
             and r.agent_id = (select kakunin.current_agent_id())) b
   group by b.agent_id, b.hour, b.event_type;
comment on view kakunin.risk_by_hour is
  'Events and excess by hour and type, with the rolling 30 days: the bound agent''s own, or all for operators and auditors. For kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor';

create view kakunin.risk_by_day with (security_barrier = true) as
  select d.agent_id, d.day, d.events, d.late, d.amount_usd, d.excess,
         sum(d.events) over days_30 as events_30_days, sum(d.excess) over days_30 as excess_30_days,
         avg(d.events) over days_7 as events_a_day_7_days, avg(d.events) over days_30 as events_a_day_30_days,
         d.excess - lag(d.excess) over (partition by d.agent_id order by d.day) as trend
    from (select h.agent_id, date_bin('1 day', h.hour, 'epoch') as day, sum(h.events)::bigint as events, sum(h.late)::bigint as late,
                 sum(h.amount_usd) as amount_usd, sum(h.excess) as excess
            from kakunin.risk_by_hour h group by 1, 2) d
  window days_30 as (partition by d.agent_id order by d.day range between '29 days' preceding and current row),
         days_7 as (partition by d.agent_id order by d.day range between '6 days' preceding and current row);
comment on view kakunin.risk_by_day is
  'The same by day, with means of 7 and 30 days and the change from the day before. For kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor';

-- A view's functions are its reader's to call, and the clock is the private schema's.
create function kakunin.risk_window() returns timestamptz
language plpgsql stable parallel safe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return kakunin_private.clock() - interval '720 hours';
end
$$;
comment on function kakunin.risk_window() is
  'Where the 30 days of risk_contributions begin. For kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor';

create view kakunin.risk_contributions with (security_barrier = true) as
  select h.agent_id, h.event_type, sum(h.events)::bigint as events, sum(h.excess) as excess,
         sum(h.excess) / nullif(sum(sum(h.excess)) over (partition by h.agent_id), 0) as contribution
    from kakunin.risk_by_hour h
   where h.hour >= (select kakunin.risk_window())
   group by h.agent_id, h.event_type;
comment on view kakunin.risk_contributions is
  'What each event type contributed in the last 30 days. For kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor';

create view kakunin.risk_reviews with (security_barrier = true) as
  select r.review_id, r.agent_id, r.raised_at, r.score, r.factors, r.decided_at, r.decided_by, r.decision from kakunin_private.risk_reviews r;
comment on view kakunin.risk_reviews is 'Revocation checks; one without a decision waits for it. For kakunin_operator, kakunin_auditor';

-- Tree: the ledger sealed, signed and provable.
--
-- All committed entries become leaves of one Merkle tree (RFC 6962). The worker calls seal_ledger() again and again; each
-- call takes what was committed since, in one batch, and computes the new root here, so that nobody can have
-- a root signed that is not of these entries. Then the worker signs a tree head with the ledger's key, which is in a
-- KMS, and brings it to publish_tree_head(), which verifies the signature before it stores it. One
-- signature covers all entries before it. Killed at any moment, the worker leaves a batch without a signature at worst, and
-- the next signature covers that too.
--
-- Which entries are new? Ids are no answer: transactions commit out of order. Each entry has its transaction's id,
-- and the tree keeps the snapshot it was sealed up to. What is visible in a later snapshot, and was not in that one, is
-- new: exactly once, however long a transaction was open, and without waiting for the oldest one in the cluster.
--
-- Leaves are kept a batch a row: which entry each is, and its hash. So an entry that is changed afterwards, or
-- gone, is named exactly. Of the inner nodes those of every eighth level are kept, from which any proof is
-- a few hundred hashes away. Rows here are added and never changed, like the ledger's.
--
-- One ledger, one place. What is restored, copied or upgraded has another system identifier, another database oid or
-- another oid of the ledger's table than where it was sealed last, and a promoted standby, or a server recovered to a point in time, another timeline. A
-- copy would sign another history under the same name and by the same key; so in another place nothing is sealed and
-- nothing is published until the owner says which of the two it is: continue_ledger() or renew_installation(). Another
-- timeline is no reason to stop, because a failover must go on by itself; the worker asks whether somebody remembers
-- what was signed last. A copy of the disk looks like the original here: a witness is what tells them apart.
--
-- The key. register_ledger_key() takes a certificate that a pinned authority issued for this installation's ledger. So
-- whoever trusts that authority's root can verify a tree head, and an operator cannot slip another key in.

create table kakunin_private.tree (
  only_row  boolean primary key default true check (only_row),
  tree_size bigint not null default 0,
  frontier  bytea[] not null default '{}',
  sealed    pg_snapshot,
  sealing   pg_snapshot,
  after     bigint not null default 0,
  floor     bigint not null default 0
);
insert into kakunin_private.tree default values;
comment on table kakunin_private.tree is 'Where sealing stands. The sealer holds this row, so there is one at a time';
comment on column kakunin_private.tree.frontier is
  'Hashes of the complete subtrees on the right edge: element n + 1 is that of 2^n leaves, NULL where that bit of the size is 0';
comment on column kakunin_private.tree.sealed is 'All that is visible in this snapshot is in the tree';
comment on column kakunin_private.tree.sealing is 'The next one, while what is new in it takes more than one batch';
comment on column kakunin_private.tree.after is 'The last event of it that is in the tree';
comment on column kakunin_private.tree.floor is 'Everything up to this event is in the tree: what a copy was restored with, whose transactions were another server''s';

create table kakunin_private.batches (
  tree_size   bigint primary key,
  first_index bigint not null unique,
  event_ids   bigint[] not null,
  leaf_hashes bytea not null,
  root        bytea not null,
  oldest      timestamptz not null,
  sealed_at   timestamptz not null,
  xid         xid8 not null default pg_current_xact_id(),
  check (cardinality(event_ids) = tree_size - first_index and octet_length(leaf_hashes) = 32 * (tree_size - first_index))
);
alter table kakunin_private.batches alter leaf_hashes set storage external;  -- hashes do not compress, and are read in slices
comment on table kakunin_private.batches is 'The leaves, and the root of the tree up to and including each batch';
comment on column kakunin_private.batches.xid is 'The transaction that sealed it: until that has ended nothing of it may be signed, because it could be undone';

create table kakunin_private.tree_nodes (
  level smallint not null,
  index bigint not null,
  hash  bytea not null check (octet_length(hash) = 32),
  primary key (level, index)
);
comment on table kakunin_private.tree_nodes is 'Complete subtrees of 2^level leaves, at levels 8, 16, 24, ...: the hash of each, from the left';

create table kakunin_private.ledger_keys (
  key_id             text collate "C" primary key,
  serial             text collate "C" not null unique,
  der                bytea not null,
  installation_id    uuid not null,
  issuer_key_id      text collate "C" not null references kakunin_private.authorities,
  public_key_modulus bytea not null unique,
  not_before         timestamptz not null,
  not_after          timestamptz not null,
  registered_at      timestamptz not null,
  registered_by      name not null,
  revoked_at         timestamptz,
  revocation_reason  text,
  check ((revoked_at is null) = (revocation_reason is null))
);
comment on table kakunin_private.ledger_keys is 'Keys that sign tree heads, each certified by a pinned authority for one installation';

create table kakunin_private.tree_heads (
  tree_size    bigint primary key references kakunin_private.batches,
  "timestamp"  bigint not null unique,
  root         bytea not null,
  key_id       text collate "C" not null references kakunin_private.ledger_keys,
  signature    bytea not null,
  published_at timestamptz not null,
  published_by name not null
);
comment on table kakunin_private.tree_heads is 'Signed tree heads (RFC 6962 section 3.5)';
comment on column kakunin_private.tree_heads."timestamp" is 'Milliseconds since 1970, as signed';

create table kakunin_private.exports (
  tree_size   bigint not null references kakunin_private.tree_heads,
  exported_at timestamptz not null,
  exported_by name not null
);
comment on table kakunin_private.exports is 'Exports of the ledger that ended: all entries up to this size, and its signed head, are elsewhere';

create table kakunin_private.leader (
  only_row   boolean primary key default true check (only_row),
  worker     uuid,
  name       text,
  since      timestamptz,
  problem    text,
  expires_at timestamptz not null default '-infinity'
) with (fillfactor = 10);
insert into kakunin_private.leader default values;
comment on table kakunin_private.leader is 'Which worker leads, and until when unless it says so again';
comment on column kakunin_private.leader.problem is 'What keeps it from signing or from its witness, as it says';

create table kakunin_private.home (
  only_row          boolean primary key default true check (only_row),
  system_identifier text collate "C",
  database          oid,
  ledger            oid,
  timeline          bigint
);
insert into kakunin_private.home default values;
comment on table kakunin_private.home is 'Where this ledger is sealed and signed: nowhere before the first time';
comment on column kakunin_private.home.system_identifier is 'Of the server, from initdb; NULL where the owner of the kit may not read it';
comment on column kakunin_private.home.database is 'The database''s oid';
comment on column kakunin_private.home.ledger is
  'The oid of the ledger''s table: a dump that is restored in place of what was there has another';
comment on column kakunin_private.home.timeline is
  'The timeline that the newest tree head was published on; before the first one, that of the first sealing';

do $$
begin
  perform kakunin_private.make_append_only('kakunin_private.batches');
  perform kakunin_private.make_append_only('kakunin_private.tree_nodes');
  perform kakunin_private.make_append_only('kakunin_private.tree_heads');
  perform kakunin_private.make_append_only('kakunin_private.exports');
end
$$;

-- The tree -------------------------------------------------------------------------------------------

create function kakunin_private.node_hash(p_left bytea, p_right bytea) returns bytea
language sql immutable parallel safe
return sha256(E'\\x01'::bytea || p_left || p_right);
comment on function kakunin_private.node_hash(bytea, bytea) is 'RFC 6962 section 2.1: SHA-256(0x01 || left || right)';

create function kakunin_private.parents(p_nodes bytea) returns bytea
language sql immutable parallel safe
return (select coalesce(string_agg(sha256(E'\\x01'::bytea || substr(p_nodes, i * 64 + 1, 64)), ''::bytea order by i), ''::bytea)
          from generate_series(0, octet_length(p_nodes) / 64 - 1) i);
comment on function kakunin_private.parents(bytea) is 'The nodes above these, both as hashes of 32 bytes one after the other; one without a right neighbour has none';

create function kakunin_private.root_hash(p_frontier bytea[]) returns bytea
language plpgsql immutable parallel safe
as $$
declare
  v_root bytea;
  v_node bytea;
begin
  foreach v_node in array p_frontier loop
    v_root := case when v_node is null then v_root when v_root is null then v_node else kakunin_private.node_hash(v_node, v_root) end;
  end loop;
  return coalesce(v_root, sha256(''::bytea));
end
$$;
comment on function kakunin_private.root_hash(bytea[]) is 'The root over the complete subtrees on the right edge, the smallest first; of nothing, the hash of nothing';

create function kakunin_private.grow(p_size bigint, p_frontier bytea[], p_leaves bytea) returns bytea[]
language plpgsql volatile parallel unsafe
as $$
declare
  v_frontier bytea[] := '{}'::bytea[];
  v_nodes    bytea := p_leaves;
  v_first    bigint := p_size;                                   -- how many nodes this level had
  v_count    bigint := p_size + octet_length(p_leaves) / 32;     -- and has
  v_level    integer := 0;
begin
  while v_count > 0 loop
    if v_level > 0 and v_level % 8 = 0 and octet_length(v_nodes) > 0 then
      insert into kakunin_private.tree_nodes (level, index, hash)
      select v_level, v_first + i, substr(v_nodes, i * 32 + 1, 32) from generate_series(0, octet_length(v_nodes) / 32 - 1) i;
    end if;
    -- The last one on the right waited for its right neighbour.
    if v_first % 2 = 1 then
      v_nodes := p_frontier[v_level + 1] || v_nodes;
    end if;
    v_frontier[v_level + 1] := case when v_count % 2 = 1 then substr(v_nodes, octet_length(v_nodes) - 31) end;
    v_nodes := kakunin_private.parents(v_nodes);
    v_first := v_first / 2;
    v_count := v_count / 2;
    v_level := v_level + 1;
  end loop;
  return v_frontier;
end
$$;
comment on function kakunin_private.grow(bigint, bytea[], bytea) is
  'The right edge of a tree of this size once these leaves (32 bytes each) have been added; keeps the nodes of every eighth level';

-- Sealing --------------------------------------------------------------------------------------------

-- A transaction is not among those under way in its own snapshots; here it has to be, for what it may append yet.
create function kakunin_private.committed_snapshot() returns pg_snapshot
language sql stable parallel restricted
return (
  select case when o.own < pg_snapshot_xmax(o.now)
    then format('%s:%s:%s', least(pg_snapshot_xmin(o.now), o.own), pg_snapshot_xmax(o.now),
      (select string_agg(x::text, ',' order by x) from (select pg_snapshot_xip(o.now) as x union select o.own) r))::pg_snapshot
    else o.now end
    from (select pg_current_snapshot() as now, pg_current_xact_id_if_assigned() as own) o);
comment on function kakunin_private.committed_snapshot() is 'pg_current_snapshot() with this transaction among those that have not ended';

create function kakunin_private.add_batch(p_ids bigint[], p_leaves bytea, p_oldest timestamptz) returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_tree     kakunin_private.tree;
  v_frontier bytea[];
begin
  select * into strict v_tree from kakunin_private.tree t;
  v_frontier := kakunin_private.grow(v_tree.tree_size, v_tree.frontier, p_leaves);
  insert into kakunin_private.batches (tree_size, first_index, event_ids, leaf_hashes, root, oldest, sealed_at)
  values (v_tree.tree_size + cardinality(p_ids), v_tree.tree_size, p_ids, p_leaves, kakunin_private.root_hash(v_frontier), p_oldest,
          kakunin_private.clock());
  update kakunin_private.tree t set tree_size = v_tree.tree_size + cardinality(p_ids), frontier = v_frontier;
end
$$;
comment on function kakunin_private.add_batch(bigint[], bytea, timestamptz) is 'Adds leaves to the tree: which events they are, and their hashes';

-- By IF, because a function that is not permitted is refused wherever an expression has it.
create function kakunin_private.here() returns kakunin_private.home
language plpgsql volatile parallel unsafe
as $$
declare
  v_here kakunin_private.home;
begin
  if has_function_privilege('pg_control_system()', 'execute') then
    v_here.system_identifier := (select c.system_identifier::text from pg_control_system() c);
  end if;
  v_here.database := (select d.oid from pg_database d where d.datname = current_database());
  v_here.ledger := 'kakunin_private.ledger'::regclass;
  if not pg_is_in_recovery() then
    v_here.timeline := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint;
  end if;
  return v_here;
end
$$;
comment on function kakunin_private.here() is
  'Where this is: the server''s system identifier, the oids of the database and of the ledger''s table, and the timeline';

create function kakunin_private.is_elsewhere(p_home kakunin_private.home, p_here kakunin_private.home) returns boolean
language sql immutable parallel safe
return (p_home).database is not null
  and ((p_home).system_identifier, (p_home).database, (p_home).ledger)
      is distinct from ((p_here).system_identifier, (p_here).database, (p_here).ledger);
comment on function kakunin_private.is_elsewhere(kakunin_private.home, kakunin_private.home) is
  'Whether the one place is not the other; the timeline is no matter, and nowhere is no place';

create function kakunin_private.settle_home(p_here kakunin_private.home) returns void
language sql volatile parallel unsafe
begin atomic
  update kakunin_private.home h
     set system_identifier = (p_here).system_identifier, database = (p_here).database, ledger = (p_here).ledger, timeline = (p_here).timeline;
end;
comment on function kakunin_private.settle_home(kakunin_private.home) is 'Makes this the ledger''s place';

create function kakunin_private.check_home() returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_home kakunin_private.home;
  v_here constant kakunin_private.home := kakunin_private.here();
begin
  select * into strict v_home from kakunin_private.home h;
  if v_home.database is null then
    -- With its timeline: a recovery to a point before the first tree head is told by that.
    perform kakunin_private.settle_home(v_here);
  elsif kakunin_private.is_elsewhere(v_home, v_here) then
    raise exception using errcode = 'KA007',
      message = format('this ledger was sealed as table %s in database %s of server %s, and this is table %s in database %s of server %s: a copy, or the ledger was moved or put back',
        v_home.ledger, v_home.database, coalesce(v_home.system_identifier, '(unknown)'),
        v_here.ledger, v_here.database, coalesce(v_here.system_identifier, '(unknown)')),
      hint = 'kakunin-db recover shows what is here, and gives a copy an identity of its own or goes on in place of the original.';
  end if;
end
$$;
comment on function kakunin_private.check_home() is
  'KA007 where the ledger was last sealed as another table, in another database or on another server; the first time it settles here';

-- For a copy, where the transactions in the ledger's rows are those of another server: all there is becomes leaves, and
-- what comes from now on goes by this server's.
create function kakunin_private.reseal() returns void
language plpgsql volatile parallel unsafe
as $$
declare
  v_ids    bigint[];
  v_leaves bytea;
  v_oldest timestamptz;
begin
  perform kakunin_private.check_snapshot_is_fresh('settling a ledger in another place');
  -- Waits for those who are appending, so that everything is committed.
  lock table kakunin_private.ledger in share mode;
  perform from kakunin_private.tree t for update;
  select array_agg(l.event_id order by l.event_id), string_agg(kakunin_private.leaf_hash(l.entry), '' order by l.event_id), min(l.recorded_at)
    into v_ids, v_leaves, v_oldest
    from kakunin_private.ledger l
   where not exists (select from (select unnest(b.event_ids) as id from kakunin_private.batches b) s where s.id = l.event_id);
  if v_ids is not null then
    perform kakunin_private.add_batch(v_ids, v_leaves, v_oldest);
  end if;
  update kakunin_private.tree t
     set sealed = kakunin_private.committed_snapshot(), sealing = null, after = 0,
         floor = (select coalesce(max(l.event_id), 0) from kakunin_private.ledger l);
  -- A copy made from a template has values of sequences that its log does not have: a crash would give them out again.
  -- Logical replication brings none at all. Far ahead, because others draw from them between the two calls.
  perform setval(s.oid::regclass, nextval(s.oid::regclass) + 1000)
     from pg_class s where s.relkind = 'S' and s.relnamespace = 'kakunin_private'::regnamespace;
  perform setval('kakunin_private.event_ids', greatest(nextval('kakunin_private.event_ids'), (select t.floor from kakunin_private.tree t)));
  perform kakunin_private.settle_home(kakunin_private.here());
end
$$;
comment on function kakunin_private.reseal() is
  'Seals every entry that is not in the tree, counts by this server''s transactions from now on, and makes this the ledger''s place';

create function kakunin.seal_ledger(max_entries integer default 100000) returns jsonb
language plpgsql volatile parallel unsafe security definer
-- A plan for any xid would read the whole ledger.
set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan
as $$
declare
  v_tree    kakunin_private.tree;
  v_sealing pg_snapshot;
  v_since   xid8;
  v_running xid8[];
  v_ids     bigint[];
  v_leaves  bytea;
  v_oldest  timestamptz;
  v_count   bigint;
begin
  if coalesce(max_entries not between 1 and 1000000, true) then
    raise exception using errcode = 'KA010', message = 'a batch is of 1 to 1000000 entries';
  end if;
  perform kakunin_private.check_snapshot_is_fresh('sealing');
  perform kakunin_private.check_home();
  -- Looked at first without a lock: it is asked every second, and mostly there is nothing.
  select * into strict v_tree from kakunin_private.tree t;
  v_since := coalesce(pg_snapshot_xmax(v_tree.sealed), '0');
  v_running := array(select pg_snapshot_xip(v_tree.sealed));
  if v_tree.sealing is null
    and pg_snapshot_xmax(pg_current_snapshot())::text::numeric - v_since::text::numeric between 0 and 10000
    and not exists (select from kakunin_private.ledger l where l.xid >= v_since and l.event_id > v_tree.floor)
    and not exists (select from kakunin_private.ledger l where l.xid = any (v_running) and l.event_id > v_tree.floor) then
    return jsonb_build_object('sealed', 0, 'more', false, 'tree_size', v_tree.tree_size);
  end if;
  select * into strict v_tree from kakunin_private.tree t for update;
  v_since := coalesce(pg_snapshot_xmax(v_tree.sealed), '0');
  v_running := array(select pg_snapshot_xip(v_tree.sealed));
  v_sealing := coalesce(v_tree.sealing, kakunin_private.committed_snapshot());
  if v_since > pg_snapshot_xmax(v_sealing) then
    raise exception using errcode = 'KA007',
      message = 'the ledger was sealed by another server, whose transactions are ahead of this one''s: this is a copy',
      hint = 'kakunin-db recover shows what is here, and gives a copy an identity of its own or goes on in place of the original.';
  end if;
  select coalesce(array_agg(n.event_id order by n.event_id), '{}'), string_agg(kakunin_private.leaf_hash(n.entry), '' order by n.event_id),
         min(n.recorded_at), count(*)
    into v_ids, v_leaves, v_oldest, v_count
    from (select u.event_id, u.entry, u.recorded_at
            from (select l.event_id, l.xid, l.entry, l.recorded_at from kakunin_private.ledger l where l.xid >= v_since
                  union all
                  select l.event_id, l.xid, l.entry, l.recorded_at from kakunin_private.ledger l where l.xid = any (v_running)) u
           where u.event_id > greatest(v_tree.after, v_tree.floor)
             and pg_visible_in_snapshot(u.xid, v_sealing)
           order by u.event_id
           limit max_entries) n;
  if v_count > 0 then
    perform kakunin_private.add_batch(v_ids, v_leaves, v_oldest);
  end if;
  update kakunin_private.tree t
     set sealed = case when v_count < max_entries then v_sealing else t.sealed end,
         sealing = case when v_count < max_entries then null else v_sealing end,
         after = case when v_count < max_entries then 0 else v_ids[v_count] end;
  -- A tree head signed over what a crash then loses would be a fork.
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
  return jsonb_build_object('sealed', v_count, 'more', v_count = max_entries,
    'tree_size', v_tree.tree_size + v_count);
end
$$;
comment on function kakunin.seal_ledger(integer) is
  'Takes committed entries that are not in the tree yet into it, at most so many; returns sealed, more (call again) and tree_size. For kakunin_worker';

create function kakunin.tree_head_to_sign() returns table (tree_size bigint, "timestamp" bigint, root bytea, since timestamptz)
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select b.tree_size,
           greatest(floor(extract(epoch from kakunin_private.clock()) * 1000)::bigint,
                    (select max(h."timestamp") + 1 from kakunin_private.tree_heads h)),
           b.root,
           (select min(u.oldest) from kakunin_private.batches u
             where u.tree_size > coalesce((select max(h.tree_size) from kakunin_private.tree_heads h), 0))
      from kakunin_private.batches b
     where b.tree_size > coalesce((select max(h.tree_size) from kakunin_private.tree_heads h), 0)
       and b.xid is distinct from pg_current_xact_id_if_assigned()
     order by b.tree_size desc
     limit 1;
end
$$;
comment on function kakunin.tree_head_to_sign() is
  'What a tree head is to say now: size, milliseconds since 1970, root; since is when the oldest entry without a signature was recorded. No row where all is signed. For kakunin_worker';

create function kakunin.publish_tree_head(tree_size bigint, "timestamp" bigint, key_id text, signature bytea) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what  constant text := 'the tree head';
  v_root  bytea;
  v_last  kakunin_private.tree_heads;
  v_key   kakunin_private.ledger_keys;
  v_now   constant timestamptz := kakunin_private.clock();
  v_timeline bigint;
begin
  perform kakunin_private.check_snapshot_is_fresh('publishing a tree head');
  perform kakunin_private.check_home();
  -- One at a time, so that sizes and timestamps go up together.
  lock table kakunin_private.tree_heads in share row exclusive mode;
  select b.root into v_root from kakunin_private.batches b
   where b.tree_size = publish_tree_head.tree_size and b.xid is distinct from pg_current_xact_id_if_assigned();
  if not found then
    perform kakunin_private.refuse(c_what, format('the tree never ended a batch at size %s', coalesce(publish_tree_head.tree_size::text, 'NULL')),
      'Sign what kakunin.tree_head_to_sign() gives.');
  end if;
  select * into v_last from kakunin_private.tree_heads h order by h.tree_size desc limit 1;
  if v_last.tree_size >= publish_tree_head.tree_size or v_last."timestamp" >= publish_tree_head."timestamp" then
    perform kakunin_private.refuse(c_what, format('one of size %s is published already', v_last.tree_size),
      'Sign what kakunin.tree_head_to_sign() gives.');
  end if;
  select k.* into v_key from kakunin_private.ledger_keys k
    join kakunin_private.authorities a on a.key_id = k.issuer_key_id
   where k.key_id = publish_tree_head.key_id collate "C" and k.installation_id = kakunin.installation_id()
     and k.revoked_at is null and v_now between k.not_before and k.not_after
     and coalesce(a.distrust_reason not in ('keyCompromise', 'cACompromise'), true);
  if not found then
    perform kakunin_private.refuse(c_what, 'its key is not one of this ledger''s, or was revoked, or its certificate has expired',
      'Register a key with kakunin.register_ledger_key(der).');
  end if;
  -- A leap of an hour would keep everybody from signing for an hour.
  if publish_tree_head."timestamp" is null or abs(publish_tree_head."timestamp" - extract(epoch from v_now) * 1000) > 300000 then
    perform kakunin_private.refuse(c_what, 'its timestamp is not of now, give or take five minutes');
  end if;
  if not kakunin_private.rsa_pkcs1_sha256_verify(
    v_key.public_key_modulus, 65537,
    E'\\x0001'::bytea || int8send(publish_tree_head."timestamp") || int8send(publish_tree_head.tree_size) || v_root,
    publish_tree_head.signature) then
    perform kakunin_private.refuse('the signature', 'it is not that of the ledger''s key over this tree head');
  end if;
  insert into kakunin_private.tree_heads (tree_size, "timestamp", root, key_id, signature, published_at, published_by)
  values (publish_tree_head.tree_size, publish_tree_head."timestamp", v_root, v_key.key_id, publish_tree_head.signature, v_now, session_user);
  v_timeline := (kakunin_private.here()).timeline;
  update kakunin_private.home h set timeline = v_timeline where h.timeline is distinct from v_timeline;
  if current_setting('synchronous_commit') = 'off' then
    perform set_config('synchronous_commit', 'on', true);
  end if;
end
$$;
comment on function kakunin.publish_tree_head(bigint, bigint, text, bytea) is
  'Stores a signed tree head once the signature (RSASSA-PKCS1-v1_5, SHA-256, over RFC 6962''s TreeHeadSignature) is known to be a ledger key''s over the root computed here. For kakunin_worker';

-- Keys -----------------------------------------------------------------------------------------------

create function kakunin.register_ledger_key(der bytea) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_what   constant text := 'the certificate';
  v_read   kakunin_private.x509_certificate := kakunin_private.x509_read_certificate(register_ledger_key.der);
  v_issuer kakunin_private.authorities := kakunin_private.issuer_of(v_read);
  v_names  bytea[];
  v_urn    constant text := 'urn:kakunin:ledger:' || kakunin.installation_id();
begin
  perform kakunin_private.check_home();
  perform kakunin_private.x509_check_critical(v_read.extensions, '{2.5.29.15,2.5.29.17,2.5.29.19}', c_what);
  if v_read.ca or coalesce(v_read.key_usage & 134, 0) <> 128 then  -- digitalSignature, and neither keyCertSign nor cRLSign
    perform kakunin_private.refuse(c_what, 'it is not one for signing alone (no cA; keyUsage digitalSignature without keyCertSign and cRLSign)');
  end if;
  v_names := kakunin_private.der_children(
    coalesce(kakunin_private.x509_extension_value(v_read.extensions, '2.5.29.17'), decode('3000', 'hex')), 48, 'subjectAltName');
  if cardinality(v_names) <> 1 or get_byte(v_names[1], 0) <> 134
    or kakunin_private.der_content(v_names[1], 134, 'subjectAltName') <> convert_to(v_urn, 'UTF8') then
    perform kakunin_private.refuse(c_what, 'its subjectAltName is not ' || v_urn || ' alone', 'kakunin-db audit init makes one.');
  end if;
  if v_read.key_id is null then
    perform kakunin_private.refuse(c_what, 'it has no subjectKeyIdentifier of its own');
  end if;
  if kakunin_private.clock() not between v_read.not_before and v_read.not_after then
    perform kakunin_private.refuse(c_what, 'it has expired, or is not valid yet');
  end if;
  -- A key that also signs something else could be made to sign one for the other.
  if exists (select from kakunin_private.authorities a where a.public_key_modulus = v_read.modulus)
    or exists (select from kakunin_private.certificates c where c.public_key_modulus = v_read.modulus) then
    perform kakunin_private.refuse(c_what, 'its key is an authority''s, or an agent''s', 'Make a key for the ledger alone.');
  end if;
  insert into kakunin_private.ledger_keys
    (key_id, serial, der, installation_id, issuer_key_id, public_key_modulus, not_before, not_after, registered_at, registered_by)
  values
    (v_read.key_id, v_read.serial, register_ledger_key.der, kakunin.installation_id(), v_issuer.key_id, v_read.modulus,
     v_read.not_before, v_read.not_after, kakunin_private.clock(), session_user)
  on conflict do nothing;
  if not found then
    perform kakunin_private.refuse(c_what, 'its key, or its serial, is registered already', 'Make a new key.');
  end if;
  perform kakunin_private.record('ledger.key_registered', null, jsonb_build_object(
    'key_id', v_read.key_id, 'serial', v_read.serial, 'sha256', encode(sha256(register_ledger_key.der), 'hex')));
  return v_read.key_id;
end
$$;
comment on function kakunin.register_ledger_key(bytea) is
  'Takes a certificate (DER) that a trusted authority issued for the key that signs this ledger''s tree heads; returns its key id. Earlier keys stay good. For kakunin_operator';

create function kakunin.revoke_ledger_key(key_id text, reason text default 'unspecified') returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_at timestamptz;
begin
  perform kakunin_private.check_revocation_reason(revoke_ledger_key.reason);
  update kakunin_private.ledger_keys k
     set revoked_at = kakunin_private.clock(), revocation_reason = revoke_ledger_key.reason
   where k.key_id = revoke_ledger_key.key_id collate "C" and k.revoked_at is null
  returning k.revoked_at into v_at;
  if found then
    perform kakunin_private.record('ledger.key_revoked', null, jsonb_build_object(
      'key_id', revoke_ledger_key.key_id, 'reason', revoke_ledger_key.reason));
    return v_at;
  end if;
  select k.revoked_at into v_at from kakunin_private.ledger_keys k where k.key_id = revoke_ledger_key.key_id collate "C";
  if not found then
    raise exception using errcode = 'KA010', message = 'no ledger key with this key id is registered here',
      hint = 'select key_id from kakunin.ledger_keys lists them.';
  end if;
  return v_at;
end
$$;
comment on function kakunin.revoke_ledger_key(text, text) is
  'Takes no more tree heads by this key, and puts its certificate on the revocation list; returns when it was first revoked. For kakunin_operator';

create view kakunin.ledger_keys with (security_barrier = true) as
  select k.key_id, k.serial, k.installation_id, k.issuer_key_id, k.not_before, k.not_after, k.registered_at, k.registered_by,
         k.revoked_at, k.revocation_reason, k.der
    from kakunin_private.ledger_keys k;
comment on view kakunin.ledger_keys is 'Keys that sign tree heads, and their certificates. For all the kit''s roles';

create view kakunin.tree_heads with (security_barrier = true) as
  select k.installation_id, h.tree_size, h."timestamp", h.root, h.key_id, h.signature, h.published_at, h.published_by
    from kakunin_private.tree_heads h join kakunin_private.ledger_keys k on k.key_id = h.key_id;
comment on view kakunin.tree_heads is 'Signed tree heads, for whoever keeps them elsewhere. For all the kit''s roles';

-- The worker -----------------------------------------------------------------------------------------

-- A lease, and no advisory lock, which any login could take. Two that believe they lead do no harm: sealing is one at a
-- time, and a tree head of a size is stored once.
create function kakunin.lead_ledger(worker uuid, name text, lease interval default '6 seconds', problem text default null) returns boolean
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now constant timestamptz := kakunin_private.clock();
begin
  if lead_ledger.worker is null or coalesce(lead_ledger.lease not between '0' and interval '5 minutes', true) then
    raise exception using errcode = 'KA010', message = 'a worker leads by its id, for 0 seconds to 5 minutes';
  end if;
  update kakunin_private.leader l
     set worker = lead_ledger.worker, name = left(lead_ledger.name, 200), problem = left(lead_ledger.problem, 1000),
         since = case when l.worker = lead_ledger.worker and l.expires_at >= v_now then l.since else v_now end,
         expires_at = v_now + lead_ledger.lease
   where l.worker = lead_ledger.worker or l.expires_at < v_now;
  return found;
end
$$;
comment on function kakunin.lead_ledger(uuid, text, interval, text) is
  'Makes this worker the one that leads, for so long, unless another one does; a lease of 0 gives it up. problem is what fails at the moment, for ledger_status(). Returns whether it leads. For kakunin_worker';

create function kakunin.sleep_ledger() returns boolean
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  -- Locked, somebody is about to wake it.
  update kakunin_private.sleeper s set asleep = true
   where s.only_row = (select w.only_row from kakunin_private.sleeper w for update skip locked) and not s.asleep;
  return found;
end
$$;
comment on function kakunin.sleep_ledger() is
  'Says that the worker sleeps: the next entry of an agent notifies kakunin_ledger. Seal once more before sleeping. For kakunin_worker';

create function kakunin_private.unsealed() returns setof kakunin_private.ledger
language plpgsql stable parallel restricted set plan_cache_mode = force_custom_plan
as $$
declare
  v_tree    kakunin_private.tree;
  v_since   xid8;
  v_running xid8[];
begin
  select * into strict v_tree from kakunin_private.tree t;
  v_since := coalesce(pg_snapshot_xmax(v_tree.sealed), '0');
  v_running := array(select pg_snapshot_xip(v_tree.sealed));
  return query
    select u.event_id, u.recorded_at, u.agent_id, u.xid, u.entry
      from (select l.* from kakunin_private.ledger l where l.xid >= v_since
            union all
            select l.* from kakunin_private.ledger l where l.xid = any (v_running)) u
     where u.event_id > v_tree.floor
       and (v_tree.sealing is null or u.event_id > v_tree.after or not pg_visible_in_snapshot(u.xid, v_tree.sealing));
end
$$;
comment on function kakunin_private.unsealed() is 'Committed entries that are not in the tree yet';

create function kakunin.ledger_status() returns jsonb
language plpgsql volatile parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now      constant timestamptz := kakunin_private.clock();
  v_tree     kakunin_private.tree;
  v_head     kakunin_private.tree_heads;
  v_waiting  bigint;
  v_oldest   timestamptz;
  v_leader   kakunin_private.leader;
begin
  select * into strict v_tree from kakunin_private.tree;
  select * into v_head from kakunin_private.tree_heads h order by h.tree_size desc limit 1;
  select * into strict v_leader from kakunin_private.leader;
  select count(*), min(u.recorded_at) into v_waiting, v_oldest from kakunin_private.unsealed() u;
  v_oldest := least(v_oldest, (select min(b.oldest) from kakunin_private.batches b where b.tree_size > coalesce(v_head.tree_size, 0)));
  return jsonb_build_object(
    'tree_size', v_tree.tree_size,
    'signed_size', coalesce(v_head.tree_size, 0),
    'lag_entries', v_tree.tree_size - coalesce(v_head.tree_size, 0) + v_waiting,
    'lag_seconds', coalesce(round(extract(epoch from greatest(v_now - v_oldest, interval '0')), 3), 0),
    'last_signed_at', v_head.published_at,
    'leader', case when v_leader.expires_at >= v_now then v_leader.name end,
    'leader_since', case when v_leader.expires_at >= v_now then v_leader.since end,
    'problem', case when v_leader.expires_at >= v_now then v_leader.problem end,
    'exported_size', coalesce((select max(e.tree_size) from kakunin_private.exports e), 0),
    'partitions_until', (select max(p.to_at) from kakunin_private.partitions p where p.archived_at is null),
    'in_default_partition', exists (select from kakunin_private.ledger_default),
    'key_expires_at', (select max(k.not_after) from kakunin_private.ledger_keys k
                        where k.revoked_at is null and k.installation_id = kakunin.installation_id()));
end
$$;
comment on function kakunin.ledger_status() is
  'How far sealing and signing are: sizes, lag_entries and lag_seconds (of the oldest entry without a signature), who leads and what fails there, until when there are partitions. For kakunin_worker, kakunin_operator, kakunin_auditor';

-- Another place -----------------------------------------------------------------------------------------

create function kakunin.ledger_home() returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_home kakunin_private.home;
  v_here constant kakunin_private.home := kakunin_private.here();
begin
  select * into strict v_home from kakunin_private.home h;
  return jsonb_build_object(
    'home', case when v_home.database is not null then to_jsonb(v_home) - 'only_row' end,
    'here', to_jsonb(v_here) - 'only_row',
    'moved', kakunin_private.is_elsewhere(v_home, v_here),
    'promoted', coalesce(v_home.timeline <> v_here.timeline, false));
end
$$;
comment on function kakunin.ledger_home() is
  'Where the ledger is sealed and signed and where this is (system_identifier, database, ledger, timeline): moved where the server, the database or the ledger''s table is another, promoted where the timeline is. For kakunin_worker, kakunin_operator, kakunin_auditor';

create function kakunin.continue_ledger() returns jsonb
language plpgsql volatile parallel unsafe security definer
set search_path = pg_catalog, pg_temp set lock_timeout = '5s'  -- appends queue up behind reseal()
as $$
declare
  v_home constant jsonb := kakunin.ledger_home();
begin
  if (v_home -> 'moved')::boolean then
    perform kakunin_private.reseal();
  elsif (v_home -> 'promoted')::boolean then
    update kakunin_private.home h set timeline = (v_home -> 'here' ->> 'timeline')::bigint;
  else
    return v_home;
  end if;
  perform kakunin_private.record('ledger.continued', null, v_home);
  return kakunin.ledger_home();
end
$$;
comment on function kakunin.continue_ledger() is
  'For a ledger that was moved here, and whose original is gone: it goes on under its name and by its key. Returns what ledger_home() does. Where the original goes on as well, use renew_installation(). For the owner alone';

-- Proofs ---------------------------------------------------------------------------------------------

create function kakunin_private.leaf_hashes(p_first bigint, p_count bigint) returns bytea
language sql stable parallel safe
return (select string_agg(substr(b.leaf_hashes, (greatest(p_first - b.first_index, 0) * 32 + 1)::integer,
                                 ((least(p_first + p_count, b.tree_size) - greatest(p_first, b.first_index)) * 32)::integer),
                          ''::bytea order by b.first_index)
          from kakunin_private.batches b
         where b.first_index < p_first + p_count and b.tree_size > p_first);
comment on function kakunin_private.leaf_hashes(bigint, bigint) is 'The hashes of these leaves, 32 bytes each';

create function kakunin_private.subtree_hash(p_first bigint, p_count bigint) returns bytea
language plpgsql stable parallel safe
as $$
declare
  v_first bigint := p_first;
  v_left  bigint := p_count;
  v_base  integer;
  v_nodes bytea;
  v_edge  bytea[] := '{}'::bytea[];
begin
  -- Complete subtrees from the left, the largest first; then they are joined from the right.
  for v_level in reverse 62..0 loop
    continue when v_left < (1::bigint << v_level);
    v_base := v_level / 8 * 8;
    if v_base = 0 then
      v_nodes := kakunin_private.leaf_hashes(v_first, 1::bigint << v_level);
    else
      select string_agg(n.hash, '' order by n.index) into v_nodes from kakunin_private.tree_nodes n
       where n.level = v_base and n.index >= v_first >> v_base and n.index < (v_first >> v_base) + (1::bigint << (v_level - v_base));
    end if;
    while octet_length(v_nodes) > 32 loop
      v_nodes := kakunin_private.parents(v_nodes);
    end loop;
    v_edge := v_nodes || v_edge;
    v_first := v_first + (1::bigint << v_level);
    v_left := v_left - (1::bigint << v_level);
  end loop;
  return kakunin_private.root_hash(v_edge);
end
$$;
comment on function kakunin_private.subtree_hash(bigint, bigint) is
  'MTH of RFC 6962 section 2.1 over so many leaves from this one on, where a subtree may begin';

create function kakunin_private.largest_power(p_below bigint) returns bigint
language sql immutable parallel safe
return (select max(1::bigint << i) from generate_series(0, 62) i where 1::bigint << i < p_below);
comment on function kakunin_private.largest_power(bigint) is 'The largest power of two below a number from 2 on: where RFC 6962 splits a tree';

create function kakunin_private.check_tree_size(p_size bigint, p_signed boolean default true) returns void
language plpgsql stable parallel restricted
as $$
begin
  if not exists (select from kakunin_private.tree_heads h where h.tree_size = p_size)
    and not (p_signed is false and exists (select from kakunin_private.batches b where b.tree_size = p_size)) then
    raise exception using errcode = 'KA010',
      message = format('there is no signed tree head of size %s', coalesce(p_size::text, 'NULL')),
      hint = 'select tree_size from kakunin.tree_heads lists them.';
  end if;
end
$$;
comment on function kakunin_private.check_tree_size(bigint, boolean) is 'KA010 unless a tree head of this size was signed, or is to be';

create function kakunin.inclusion_proof(event_id bigint, tree_size bigint default null) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_entry text;
  v_agent uuid;
  v_index bigint;
  v_size  bigint := inclusion_proof.tree_size;
  v_first bigint := 0::bigint;
  v_count bigint;
  v_split bigint;
  v_path  jsonb := '[]'::jsonb;
begin
  select l.entry, l.agent_id into v_entry, v_agent from kakunin_private.ledger l where l.event_id = inclusion_proof.event_id;
  if not found or not (pg_has_role(session_user, 'kakunin_auditor', 'usage') or coalesce(v_agent = kakunin.current_agent_id(), false)) then
    raise exception using errcode = 'KA010',
      message = format('no event %s', coalesce(inclusion_proof.event_id::text, 'NULL')),
      hint = 'Ids are in kakunin.audit_log. What was archived is proved from its export.';
  end if;
  select b.first_index + array_position(b.event_ids, inclusion_proof.event_id) - 1 into v_index
    from kakunin_private.batches b where b.event_ids @> array[inclusion_proof.event_id] limit 1;
  if v_size is null then
    select min(h.tree_size) into v_size from kakunin_private.tree_heads h where h.tree_size > v_index;
  else
    perform kakunin_private.check_tree_size(v_size);
  end if;
  if v_index is null or v_size is null or v_index >= v_size then
    raise exception using errcode = 'KA010',
      message = format('event %s is not covered by that signed tree head yet', inclusion_proof.event_id),
      hint = 'The worker signs within seconds: kakunin-db health says how far it is.';
  end if;
  v_count := v_size;
  while v_count > 1 loop
    v_split := kakunin_private.largest_power(v_count);
    if v_index < v_first + v_split then
      v_path := to_jsonb(encode(kakunin_private.subtree_hash(v_first + v_split, v_count - v_split), 'hex')) || v_path;
      v_count := v_split;
    else
      v_path := to_jsonb(encode(kakunin_private.subtree_hash(v_first, v_split), 'hex')) || v_path;
      v_first := v_first + v_split;
      v_count := v_count - v_split;
    end if;
  end loop;
  return jsonb_build_object('index', v_index, 'tree_size', v_size, 'path', v_path, 'entry', v_entry);
end
$$;
comment on function kakunin.inclusion_proof(bigint, bigint) is
  'That an event is in the tree of this size, by default the first signed one it is in: index, tree_size, path (RFC 6962 section 2.1.1) and the entry. For kakunin_auditor; for kakunin_agent and kakunin_gateway the bound agent''s own';

create function kakunin.consistency_proof(first_size bigint, second_size bigint) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_first bigint := 0::bigint;
  v_left  bigint := first_size;
  v_count bigint := second_size;
  v_split bigint;
  v_whole boolean := true;
  v_path  jsonb := '[]'::jsonb;
begin
  perform kakunin_private.check_tree_size(first_size, false);
  perform kakunin_private.check_tree_size(second_size, false);
  if first_size > second_size then
    raise exception using errcode = 'KA010', message = 'the first tree of a consistency proof is not larger than the second';
  end if;
  -- SUBPROOF of RFC 6962 section 2.1.2, from the root down.
  while v_left <> v_count loop
    v_split := kakunin_private.largest_power(v_count);
    if v_left <= v_split then
      v_path := to_jsonb(encode(kakunin_private.subtree_hash(v_first + v_split, v_count - v_split), 'hex')) || v_path;
      v_count := v_split;
    else
      v_path := to_jsonb(encode(kakunin_private.subtree_hash(v_first, v_split), 'hex')) || v_path;
      v_first := v_first + v_split;
      v_left := v_left - v_split;
      v_count := v_count - v_split;
      v_whole := false;
    end if;
  end loop;
  if not v_whole then
    v_path := to_jsonb(encode(kakunin_private.subtree_hash(v_first, v_count), 'hex')) || v_path;
  end if;
  return jsonb_build_object('first_size', first_size, 'second_size', second_size, 'path', v_path);
end
$$;
comment on function kakunin.consistency_proof(bigint, bigint) is
  'That the tree of the second size begins with that of the first: the path of RFC 6962 section 2.1.2. For kakunin_auditor, and for kakunin_worker, which signs nothing that does not continue what it signed';

-- Reading it out -------------------------------------------------------------------------------------

create function kakunin.ledger_leaves(first_index bigint, max_entries integer default 1000)
returns table (index bigint, leaf_hash bytea, event_id bigint, recorded_at timestamptz, agent_id uuid, entry text, archived boolean)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select n.index, n.leaf_hash, n.event_id, l.recorded_at, l.agent_id, l.entry,
           l.entry is null and exists (select from kakunin_private.partitions p where p.archived @> n.index)
      from (select b.first_index + s.first + e.at - 2 as index,
                   substr(b.leaf_hashes, ((s.first + e.at - 2) * 32 + 1)::integer, 32) as leaf_hash, e.event_id
              from kakunin_private.batches b,
                   lateral (select (greatest(ledger_leaves.first_index - b.first_index, 0) + 1)::integer as first,
                                   (least(ledger_leaves.first_index + max_entries, b.tree_size) - b.first_index)::integer as last) s,
                   -- A slice: each element by itself would have the whole array read anew.
                   lateral unnest(b.event_ids[s.first:s.last]) with ordinality e(event_id, at)
             where b.tree_size > ledger_leaves.first_index and b.first_index < ledger_leaves.first_index + max_entries) n
      left join kakunin_private.ledger l on l.event_id = n.event_id
     order by n.index, l.recorded_at;
end
$$;
comment on function kakunin.ledger_leaves(bigint, integer) is
  'Leaves of the tree from this one on, with their entries: NULL where the ledger has none, archived where it was archived. For kakunin_auditor';

create function kakunin.frontier(tree_size bigint) returns bytea[]
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_first bigint := 0::bigint;
  v_edge  bytea[] := '{}'::bytea[];
begin
  perform kakunin_private.check_tree_size(frontier.tree_size);
  for v_level in reverse 62..0 loop
    continue when frontier.tree_size & (1::bigint << v_level) = 0;
    v_edge := v_edge || kakunin_private.subtree_hash(v_first, 1::bigint << v_level);
    v_first := v_first + (1::bigint << v_level);
  end loop;
  return v_edge;
end
$$;
comment on function kakunin.frontier(bigint) is
  'The complete subtrees of the tree of this size, from left to right: what a bundle of later entries begins with. For kakunin_auditor';

create function kakunin.unsealed_entries() returns table (event_id bigint, recorded_at timestamptz, agent_id uuid, entry text)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select u.event_id, u.recorded_at, u.agent_id, u.entry from kakunin_private.unsealed() u order by u.event_id;
end
$$;
comment on function kakunin.unsealed_entries() is 'Committed entries that are not in the tree yet. For kakunin_auditor';

create function kakunin.stray_entries() returns table (event_id bigint, entry text)
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return query
    select l.event_id, l.entry
      from kakunin_private.ledger l
     where l.event_id not in (select u.event_id from kakunin_private.unsealed() u)
       and not exists (
         select from (select s.id, substr(b.leaf_hashes, ((s.at - 1) * 32 + 1)::integer, 32) as hash
                        from kakunin_private.batches b, unnest(b.event_ids) with ordinality s(id, at)) s
          where s.id = l.event_id and s.hash = kakunin_private.leaf_hash(l.entry))
       -- One that was altered is in the tree; verification finds that.
       and (not exists (select from (select unnest(b.event_ids) as id from kakunin_private.batches b) s where s.id = l.event_id)
            or exists (select from kakunin_private.ledger o where o.event_id = l.event_id and o.recorded_at <> l.recorded_at))
     order by l.event_id;
end
$$;
comment on function kakunin.stray_entries() is
  'Entries that are in the ledger, neither sealed nor about to be: only somebody who went around the kit can put them there. For kakunin_auditor';

create view kakunin.chains with (security_barrier = true) as
  select c.chain_id as chain,
         case when c.agent_id not in ('00000000-0000-0000-0000-000000000000', 'ffffffff-ffff-ffff-ffff-ffffffffffff') then c.agent_id end as agent_id, c.sequence, c.head
    from kakunin_private.chains c;
comment on view kakunin.chains is 'The chains of the ledger: how many entries each has and the hash of its newest. For kakunin_auditor';

create function kakunin.record_read(command text, details jsonb default '{}') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if record_read.command is null or record_read.command !~ '^[a-z]{1,20}$' or octet_length(record_read.details::text) > 2000
    or kakunin_private.is_too_deep(record_read.details) then
    raise exception using errcode = 'KA010',
      message = 'a reading is recorded by the name of the command, and 2000 bytes of details at most, nested at most 64 deep';
  end if;
  perform kakunin_private.record('ledger.read', null, jsonb_build_object(
    'command', record_read.command, 'details', coalesce(record_read.details, '{}')));
end
$$;
comment on function kakunin.record_read(text, jsonb) is 'Puts it on record that the ledger is being read. For kakunin_auditor';

create function kakunin.record_export(tree_size bigint, first_index bigint, sha256 text) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.check_tree_size(record_export.tree_size);
  if record_export.first_index is null or record_export.first_index not between 0 and record_export.tree_size
    or coalesce(record_export.sha256 collate "C" !~ '^[0-9a-f]{64}$', true) then
    raise exception using errcode = 'KA010', message = 'an export is from an index up to a tree size, with the SHA-256 of the bundle';
  end if;
  -- What came before it has to have been exported as well.
  if record_export.first_index <= coalesce((select max(e.tree_size) from kakunin_private.exports e), 0) then
    insert into kakunin_private.exports (tree_size, exported_at, exported_by)
    values (record_export.tree_size, kakunin_private.clock(), session_user);
  end if;
  perform kakunin_private.record('ledger.exported', null, jsonb_build_object(
    'first_index', record_export.first_index, 'tree_size', record_export.tree_size, 'sha256', record_export.sha256));
end
$$;
comment on function kakunin.record_export(bigint, bigint, text) is
  'Puts it on record that the entries up to a signed tree head have been exported, which is what lets their partitions be archived. For kakunin_auditor';

create function kakunin.archive_partition(partition name) returns bigint
language plpgsql volatile parallel unsafe security definer
-- Detaching waits for whoever has read the ledger and has not ended; others queue up behind that.
set search_path = pg_catalog, pg_temp set lock_timeout = '200ms'
as $$
declare
  v_exported constant bigint := coalesce((select max(e.tree_size) from kakunin_private.exports e), 0);
  v_to       timestamptz;
  v_ids      bigint[];
  v_leaves   int8multirange;
  v_count    bigint;
  v_covered  bigint;
begin
  perform kakunin_private.check_snapshot_is_fresh('archiving');
  select p.to_at into v_to from kakunin_private.partitions p
   where p.name = archive_partition.partition and p.archived_at is null for update;
  if not found then
    raise exception using errcode = 'KA010', message = format('the ledger has no partition %s', coalesce(quote_ident(archive_partition.partition), 'NULL')),
      hint = 'They are named by their month, such as ledger_202611.';
  end if;
  if v_to > kakunin_private.clock() - interval '1 hour' then
    raise exception using errcode = 'KA006', message = format('partition %I is live: its time has not passed', archive_partition.partition),
      hint = 'Archive it an hour after its month has ended.';
  end if;
  -- Nothing is added from here on, and nothing uncommitted is in it.
  execute format('lock table kakunin_private.%I in share mode', archive_partition.partition);
  execute format('select count(*), coalesce(array_agg(l.event_id), ''{}'') from kakunin_private.%I l', archive_partition.partition)
    into v_count, v_ids;
  select coalesce(range_agg(int8range(n.index, n.index + 1)), '{}'), count(*) into v_leaves, v_covered
    from (select b.first_index + s.at - 1 as index
            from kakunin_private.batches b, unnest(b.event_ids) with ordinality s(id, at)
           where b.tree_size <= v_exported and s.id = any (v_ids)) n;
  if v_covered < v_count then
    raise exception using errcode = 'KA006',
      message = format('partition %I is live: %s of its entries are not covered by an exported, signed tree head',
        archive_partition.partition, v_count - v_covered),
      hint = 'Export the ledger first: kakunin-db audit export.';
  end if;
  update kakunin_private.partitions p set archived_at = kakunin_private.clock(), archived = v_leaves
   where p.name = archive_partition.partition;
  execute format('alter table kakunin_private.ledger detach partition kakunin_private.%I', archive_partition.partition);
  perform kakunin_private.record('ledger.archived', null, jsonb_build_object(
    'partition', archive_partition.partition, 'entries', v_count, 'leaves', left(v_leaves::text, 1000), 'exported_size', v_exported));
  return v_count;
end
$$;
comment on function kakunin.archive_partition(name) is
  'Takes a partition whose time has passed, and whose entries an exported, signed tree head covers, out of the ledger; returns how many entries it has. Its table stays, for the owner to move or drop. For kakunin_operator';

-- Webhooks: telling other systems what was decided.
--
-- An operator names endpoints and the events each one wants. record() puts a message into the outbox, in the
-- transaction that decides: what is rolled back is never told, and what is committed is told at least once. The worker
-- claims what is due, sends it, and reports how that went. Claimed is leased: where a worker is killed between the
-- sending and the report, the message is sent again when the lease ends, under the same id, by which its receiver
-- knows it. What fails is tried ten times over three days, and is dead after that; replay_webhooks() sends it again.
--
-- In nobody's way. A halt only reads the endpoints and adds rows of its own: no foreign keys, whose checks wait for
-- whoever holds an endpoint, and fail under SERIALIZABLE for a neighbour's sake; no notification; no row that others
-- change. And what takes something away goes ahead of all else that an endpoint has still to get.
--
-- Secrets sign what is sent, and are here as ciphertext alone: AES-256-GCM under a key that the worker and the operator's
-- command have and the database has not, over the key's bytes, with this installation's and the endpoint's
-- id as associated data. A copy of a database that was made an installation of its own cannot read them, and so
-- sends nothing to the receivers of the first.
--
-- certificate.expired is an event like the others, but nobody decides it: the worker asks expire_certificates()
-- which certificates have expired since.

create table kakunin_private.webhook_endpoints (
  endpoint_id     uuid primary key,
  url             text not null check (url collate "C" ~ '^https?://[!-~]+$' and octet_length(url) <= 1000),
  event_types     text[] collate "C" not null check (cardinality(event_types) > 0),
  secret          bytea not null check (octet_length(secret) between 52 and 92),
  previous_secret bytea check (octet_length(previous_secret) between 52 and 92),
  previous_until  timestamptz,
  created_at      timestamptz not null,
  created_by      name not null,
  disabled_at     timestamptz,
  check ((previous_secret is null) = (previous_until is null))
);
comment on table kakunin_private.webhook_endpoints is 'Who is told of what';
comment on column kakunin_private.webhook_endpoints.secret is
  'Nonce (12 bytes), ciphertext and tag (16 bytes) of 24 to 64 bytes, AES-256-GCM; the key is not in the database';
comment on column kakunin_private.webhook_endpoints.previous_secret is 'The one before it, which signs as well until previous_until';

create table kakunin_private.webhook_messages (
  message_id text collate "C" primary key,
  event_type text collate "C" not null,
  payload    text not null,
  created_at timestamptz not null
);
create index webhook_messages_created_at on kakunin_private.webhook_messages (created_at);
comment on table kakunin_private.webhook_messages is 'The outbox: what is sent, byte for byte';

create table kakunin_private.webhook_deliveries (
  message_id      text collate "C" not null,
  endpoint_id     uuid not null,
  urgent          boolean not null,
  state           text collate "C" not null default 'pending' check (state in ('pending', 'delivered', 'dead')),
  attempts        integer not null default 0,
  created_at      timestamptz not null,
  next_attempt_at timestamptz not null,
  leased_until    timestamptz,
  last_attempt_at timestamptz,
  last_status     integer,
  last_error      text,
  primary key (message_id, endpoint_id)
);
create index webhook_deliveries_due on kakunin_private.webhook_deliveries (endpoint_id, urgent, next_attempt_at)
  include (created_at) where state = 'pending';
create index webhook_deliveries_leased on kakunin_private.webhook_deliveries (endpoint_id, leased_until) where leased_until is not null;
create index webhook_deliveries_dead on kakunin_private.webhook_deliveries (endpoint_id) where state = 'dead';
comment on table kakunin_private.webhook_deliveries is 'How far each message is with each endpoint';
comment on column kakunin_private.webhook_deliveries.urgent is 'Whether it is sent before others that are due';
comment on column kakunin_private.webhook_deliveries.attempts is 'Counted when one begins, so that one that ends the worker counts as well';
comment on column kakunin_private.webhook_deliveries.leased_until is 'Until when nobody else sends it; NULL where nobody does';

create table kakunin_private.expirations (
  serial    text collate "C" primary key,
  not_after timestamptz not null
);
comment on table kakunin_private.expirations is
  'Certificates whose expiry is on record, from a day before expiry_sweep on: a registration that was committed late is found still';

create table kakunin_private.expiry_sweep (
  only_row    boolean primary key default true check (only_row),
  swept_until timestamptz not null default now()
);
insert into kakunin_private.expiry_sweep default values;
comment on table kakunin_private.expiry_sweep is 'One row. Every expiry before it, but for those of its last day, is on record';
create index certificates_not_after on kakunin_private.certificates (not_after);

-- The outbox -----------------------------------------------------------------------------------------

create function kakunin_private.webhook_events() returns text[]
language sql immutable parallel safe
return array['agent.created', 'agent.high_risk', 'agent.suspended',
             'certificate.expired', 'certificate.issued', 'certificate.revoked'];
comment on function kakunin_private.webhook_events() is 'The events an endpoint can have; names of the ledger';

create function kakunin_private.queue_webhook(p_event_type text, p_agent_id uuid, p_metadata jsonb, p_entry jsonb, p_endpoint_id uuid) returns text
language plpgsql volatile parallel unsafe
as $$
declare
  v_now        constant timestamptz := kakunin_private.clock();
  v_message_id text collate "C";
begin
  with wanted as materialized (
    select e.endpoint_id from kakunin_private.webhook_endpoints e
     where e.disabled_at is null
       and case when p_endpoint_id is null then p_event_type collate "C" = any (e.event_types) else e.endpoint_id = p_endpoint_id end
  ), message as (
    insert into kakunin_private.webhook_messages as m (message_id, event_type, payload, created_at)
    select 'msg_' || translate(gen_random_uuid()::text, '-', ''), p_event_type,
           concat('{"type":', to_json(p_event_type),
             ',"timestamp":"', coalesce(p_entry ->> 'recorded_at', kakunin_private.rfc3339(v_now)), '","data":',
             p_metadata || jsonb_build_object(
               'installation', kakunin.installation_id(), 'event_id', p_entry -> 'event_id', 'agent_id', p_agent_id), '}'),
           v_now
     where exists (select from wanted)
    returning m.message_id
  ), queued as (
    insert into kakunin_private.webhook_deliveries (message_id, endpoint_id, urgent, created_at, next_attempt_at)
    select m.message_id, w.endpoint_id,
           p_event_type collate "C" in ('agent.high_risk', 'agent.suspended', 'certificate.revoked'), v_now, v_now
      from message m, wanted w
  )
  select m.message_id into v_message_id from message m;
  return v_message_id;
end
$$;
comment on function kakunin_private.queue_webhook(text, uuid, jsonb, jsonb, uuid) is
  'Puts a message into the outbox for the enabled endpoints that want it, or for this one; returns its id, NULL where nobody does. Waits for nobody';

create function kakunin.expire_certificates(max_certificates integer default 1000) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now         constant timestamptz := kakunin_private.clock();
  v_from        timestamptz;
  v_until       timestamptz;
  v_certificate record;
  v_count       integer := 0;
begin
  if coalesce(expire_certificates.max_certificates not between 1 and 10000, true) then
    raise exception using errcode = 'KA010', message = 'expiries are recorded 1 to 10000 at a time';
  end if;
  perform kakunin_private.check_snapshot_is_fresh('recording expiries');
  -- One at a time, and no certificate's row is touched: a revocation would wait for it.
  select s.swept_until into v_from from kakunin_private.expiry_sweep s for update skip locked;
  if not found then
    return 0;
  end if;
  for v_certificate in
    select c.serial, c.agent_id, c.not_after from kakunin_private.certificates c
     where c.not_after >= v_from - interval '24 hours' and c.not_after < v_now
       and coalesce(c.revoked_at > c.not_after, true)
       and not exists (select from kakunin_private.expirations x where x.serial = c.serial)
     order by c.not_after
     limit expire_certificates.max_certificates
  loop
    insert into kakunin_private.expirations (serial, not_after) values (v_certificate.serial, v_certificate.not_after);
    perform kakunin_private.record('certificate.expired', v_certificate.agent_id, jsonb_build_object(
      'serial', v_certificate.serial, 'not_after', kakunin_private.rfc3339(v_certificate.not_after)));
    v_until := v_certificate.not_after;
    v_count := v_count + 1;
  end loop;
  v_until := greatest(v_from, case when v_count < expire_certificates.max_certificates then v_now else v_until end);
  update kakunin_private.expiry_sweep s set swept_until = v_until where s.only_row;
  delete from kakunin_private.expirations x where x.not_after < v_until - interval '24 hours';
  return v_count;
end
$$;
comment on function kakunin.expire_certificates(integer) is
  'Records certificate.expired once for each certificate that has expired and was not revoked before; returns how many. The worker calls it. For kakunin_worker';

-- Delivering -----------------------------------------------------------------------------------------

create function kakunin_private.webhook_delay(p_attempts integer) returns interval
language sql immutable parallel safe
return (array['5 seconds', '5 minutes', '30 minutes', '2 hours', '5 hours', '10 hours', '14 hours', '20 hours', '24 hours']::interval[])[p_attempts];
comment on function kakunin_private.webhook_delay(integer) is
  'How long to wait after so many failed attempts, as Standard Webhooks advises; NULL after the last';

create function kakunin.claim_webhooks(lease interval default '30 seconds')
returns table (message_id text, endpoint_id uuid, attempt integer, url text, secrets bytea[], payload text)
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_at_once constant integer := 4;
  v_now     constant timestamptz := kakunin_private.clock();
begin
  if coalesce(claim_webhooks.lease not between interval '1 second' and interval '10 minutes', true) then
    raise exception using errcode = 'KA010', message = 'a delivery is leased for 1 second to 10 minutes';
  end if;
  -- A few for each endpoint: one that does not answer keeps no other waiting, and what is claimed is sent at once.
  return query
    with due as materialized (
      select p.message_id, p.endpoint_id
        from kakunin_private.webhook_endpoints e,
             lateral (select d.message_id, d.endpoint_id from kakunin_private.webhook_deliveries d
                       where d.endpoint_id = e.endpoint_id and d.state = 'pending' and d.next_attempt_at <= v_now
                         and coalesce(d.leased_until <= v_now, true)
                       order by d.urgent desc, d.next_attempt_at
                       limit greatest(0, c_at_once - (
                         select count(*) from kakunin_private.webhook_deliveries l
                          where l.endpoint_id = e.endpoint_id and l.leased_until > v_now))
                         for update of d skip locked) p
       where e.disabled_at is null
    ), claimed as (
      update kakunin_private.webhook_deliveries d
         set attempts = d.attempts + 1,
             state = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null then 'pending' else 'dead' end,
             leased_until = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null
               then v_now + claim_webhooks.lease end,
             last_error = case when d.attempts = 0 or kakunin_private.webhook_delay(d.attempts) is not null
               then d.last_error else 'the worker ended during the last attempt' end,
             last_attempt_at = v_now
        from due u
       where d.message_id = u.message_id and d.endpoint_id = u.endpoint_id
      returning d.message_id, d.endpoint_id, d.attempts, d.state
    )
    select c.message_id, c.endpoint_id, c.attempts, e.url,
           array[e.secret] || case when e.previous_until > v_now then array[e.previous_secret] else '{}' end,
           m.payload
      from claimed c
      join kakunin_private.webhook_endpoints e on e.endpoint_id = c.endpoint_id
      join kakunin_private.webhook_messages m on m.message_id = c.message_id
     where c.state = 'pending';
end
$$;
comment on function kakunin.claim_webhooks(interval) is
  'Leases what is due, at most four deliveries at once to an endpoint, with the ciphertexts of the secrets to sign it with. For kakunin_worker';

create function kakunin.report_webhook(message_id text, endpoint_id uuid, attempt integer, status integer default null, error text default null)
returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   constant timestamptz := kakunin_private.clock();
  v_state text collate "C";
begin
  -- A failure of an attempt that has been overtaken says nothing; a success always counts.
  update kakunin_private.webhook_deliveries d
     set state = case when report_webhook.error is null then 'delivered'
                      when kakunin_private.webhook_delay(d.attempts) is null then 'dead'
                      else 'pending' end,
         -- A fifth earlier or later, so that what failed together does not come back together.
         next_attempt_at = v_now + coalesce(kakunin_private.webhook_delay(d.attempts), '0') * (0.8 + 0.4 * random()),
         leased_until = null,
         last_status = case when report_webhook.status between 100 and 599 then report_webhook.status end,
         last_error = left(report_webhook.error, 200)
   where d.message_id = report_webhook.message_id collate "C" and d.endpoint_id = report_webhook.endpoint_id
     and (report_webhook.error is null and d.state <> 'delivered'
          or d.state = 'pending' and d.attempts = report_webhook.attempt and d.leased_until is not null)
  returning d.state into v_state;
  return v_state;
end
$$;
comment on function kakunin.report_webhook(text, uuid, integer, integer, text) is
  'Records how an attempt went; no error is success. Returns delivered, pending (it is tried again) or dead; NULL where another attempt has overtaken it. For kakunin_worker';

create function kakunin.clean_webhooks() returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_count integer;
begin
  with old as materialized (
    select m.message_id from kakunin_private.webhook_messages m
     where m.created_at < (select kakunin_private.clock() - interval '720 hours')  -- once, so that an index bounds it
       and not exists (select from kakunin_private.webhook_deliveries d
                         join kakunin_private.webhook_endpoints e on e.endpoint_id = d.endpoint_id
                        where d.message_id = m.message_id and d.state = 'pending' and e.disabled_at is null)
     order by m.created_at
     limit 1000
       for update of m skip locked
  ), done as (
    delete from kakunin_private.webhook_deliveries d using old o where d.message_id = o.message_id
  )
  delete from kakunin_private.webhook_messages m using old o where m.message_id = o.message_id;
  get diagnostics v_count = row_count;
  return v_count;
end
$$;
comment on function kakunin.clean_webhooks() is
  'Deletes up to 1000 messages that are older than 30 days and that nobody is still to get; returns how many. The worker calls it. For kakunin_worker';

create function kakunin.webhook_status() returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
begin
  return (
    select jsonb_build_object(
             'endpoints', count(*),
             'disabled', (select count(*) from kakunin_private.webhook_endpoints e where e.disabled_at is not null),
             'pending', coalesce(sum(p.pending), 0),
             'dead', coalesce(sum(d.dead), 0),
             'oldest_pending_seconds', coalesce(extract(epoch from kakunin_private.clock() - min(p.oldest)), 0))
      from kakunin_private.webhook_endpoints e,
           lateral (select count(*) as pending, min(w.created_at) as oldest from kakunin_private.webhook_deliveries w
                     where w.endpoint_id = e.endpoint_id and w.state = 'pending') p,
           lateral (select count(*) as dead from kakunin_private.webhook_deliveries w
                     where w.endpoint_id = e.endpoint_id and w.state = 'dead') d
     where e.disabled_at is null);
end
$$;
comment on function kakunin.webhook_status() is
  'How far deliveries to enabled endpoints are: endpoints, pending, dead, oldest_pending_seconds; and how many are disabled. For kakunin_worker, kakunin_operator, kakunin_auditor';

-- Endpoints ------------------------------------------------------------------------------------------

create function kakunin_private.check_webhook_secret(p_secret bytea) returns void
language plpgsql immutable parallel safe
as $$
begin
  if coalesce(octet_length(p_secret) not between 52 and 92, true) then
    raise exception using errcode = 'KA010',
      message = 'a webhook''s secret comes encrypted: 52 to 92 bytes',
      hint = 'kakunin-db webhooks makes and encrypts it.';
  end if;
end
$$;
comment on function kakunin_private.check_webhook_secret(bytea) is 'KA010 unless it has the size of an encrypted secret';

create function kakunin_private.lock_webhook(p_endpoint_id uuid) returns kakunin_private.webhook_endpoints
language plpgsql volatile parallel unsafe
as $$
declare
  v_endpoint kakunin_private.webhook_endpoints;
begin
  select * into v_endpoint from kakunin_private.webhook_endpoints e where e.endpoint_id = p_endpoint_id for update;
  if not found then
    raise exception using errcode = 'KA010',
      message = format('no webhook endpoint %s', coalesce(p_endpoint_id::text, 'given')),
      hint = 'kakunin-db webhooks list has them.';
  end if;
  return v_endpoint;
end
$$;
comment on function kakunin_private.lock_webhook(uuid) is 'The endpoint, held until the transaction ends; KA010 when there is none';

create function kakunin.add_webhook(endpoint_id uuid, url text, event_types text[], secret bytea) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  c_most constant integer := 32;
  v_url  text collate "C" := add_webhook.url;
begin
  if add_webhook.endpoint_id is null then
    raise exception using errcode = 'KA010', message = 'an endpoint''s id is needed: its secret is encrypted for it';
  elsif v_url is null or octet_length(v_url) > 1000 or v_url !~ '^https?://([A-Za-z0-9._-]+|[[][0-9A-Fa-f:.]+[]])(:[0-9]{1,5})?([/?][!-~]*)?$'
    or strpos(v_url, '#') > 0 then
    raise exception using errcode = 'KA010',
      message = 'a webhook''s URL is http or https, at most 1000 printable ASCII characters, without a user and without a fragment';
  elsif coalesce(cardinality(add_webhook.event_types) not between 1 and 20, true)
    or not (add_webhook.event_types collate "C") <@ kakunin_private.webhook_events() then
    raise exception using errcode = 'KA010',
      message = 'an endpoint wants one or more of ' || array_to_string(kakunin_private.webhook_events(), ', ');
  end if;
  perform kakunin_private.check_webhook_secret(add_webhook.secret);
  -- Halts read the table, and are not kept by this.
  lock table kakunin_private.webhook_endpoints in share row exclusive mode;
  if (select count(*) from kakunin_private.webhook_endpoints e) >= c_most then
    raise exception using errcode = 'KA010', message = format('there are %s endpoints already, and no more than that', c_most),
      hint = 'kakunin-db webhooks remove takes one away.';
  end if;
  insert into kakunin_private.webhook_endpoints (endpoint_id, url, event_types, secret, created_at, created_by)
  values (add_webhook.endpoint_id, v_url,
          array(select distinct t from unnest(add_webhook.event_types) t order by t), add_webhook.secret, kakunin_private.clock(), session_user)
  on conflict on constraint webhook_endpoints_pkey do nothing;
  if not found then
    raise exception using errcode = 'KA010', message = format('there is an endpoint %s already', add_webhook.endpoint_id),
      hint = 'Give a new one an id of its own.';
  end if;
  -- Without its path, which may be what protects it.
  perform kakunin_private.record('webhook.added', null, jsonb_build_object(
    'endpoint_id', add_webhook.endpoint_id, 'origin', substring(v_url from '^https?://[^/?]+'), 'event_types', to_jsonb(add_webhook.event_types)));
end
$$;
comment on function kakunin.add_webhook(uuid, text, text[], bytea) is
  'Adds an endpoint: its id, URL, the events it wants, and its secret as kakunin-db has encrypted it for this id. For kakunin_operator';

create function kakunin.enable_webhook(endpoint_id uuid, enabled boolean default true) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if enable_webhook.enabled is null then
    raise exception using errcode = 'KA010', message = 'enabled must be true or false';
  end if;
  perform kakunin_private.lock_webhook(enable_webhook.endpoint_id);
  update kakunin_private.webhook_endpoints e
     set disabled_at = case when not enable_webhook.enabled then coalesce(e.disabled_at, kakunin_private.clock()) end
   where e.endpoint_id = enable_webhook.endpoint_id;
  perform kakunin_private.record(case when enable_webhook.enabled then 'webhook.enabled' else 'webhook.disabled' end, null,
    jsonb_build_object('endpoint_id', enable_webhook.endpoint_id));
end
$$;
comment on function kakunin.enable_webhook(uuid, boolean) is
  'Enables or disables an endpoint. While it is disabled it gets no new messages, and what it had still to get waits. For kakunin_operator';

create function kakunin.remove_webhook(endpoint_id uuid) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  perform kakunin_private.lock_webhook(remove_webhook.endpoint_id);
  delete from kakunin_private.webhook_endpoints e where e.endpoint_id = remove_webhook.endpoint_id;
  delete from kakunin_private.webhook_deliveries d where d.endpoint_id = remove_webhook.endpoint_id;
  perform kakunin_private.record('webhook.removed', null, jsonb_build_object('endpoint_id', remove_webhook.endpoint_id));
end
$$;
comment on function kakunin.remove_webhook(uuid) is 'Takes an endpoint away, and what it had still to get. For kakunin_operator';

create function kakunin.rotate_webhook(endpoint_id uuid, secret bytea, overlap interval default '24 hours') returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_seconds constant numeric := extract(epoch from rotate_webhook.overlap);
  v_until   timestamptz;
begin
  perform kakunin_private.check_webhook_secret(rotate_webhook.secret);
  if coalesce(v_seconds not between 0 and 30 * 86400, true) then
    raise exception using errcode = 'KA010', message = 'an overlap is 0 to 30 days';
  end if;
  perform kakunin_private.lock_webhook(rotate_webhook.endpoint_id);
  if v_seconds > 0 then
    v_until := kakunin_private.clock() + make_interval(secs => v_seconds::double precision);
  end if;
  update kakunin_private.webhook_endpoints e
     set previous_secret = case when v_until is not null then e.secret end, previous_until = v_until,
         secret = rotate_webhook.secret
   where e.endpoint_id = rotate_webhook.endpoint_id;
  perform kakunin_private.record('webhook.rotated', null, jsonb_build_object(
    'endpoint_id', rotate_webhook.endpoint_id, 'previous_until', kakunin_private.rfc3339(v_until)));
end
$$;
comment on function kakunin.rotate_webhook(uuid, bytea, interval) is
  'Gives an endpoint another secret, encrypted; the one before it signs as well for so long (0 to 30 days). For kakunin_operator';

create function kakunin.test_webhook(endpoint_id uuid) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
begin
  if (kakunin_private.lock_webhook(test_webhook.endpoint_id)).disabled_at is not null then
    raise exception using errcode = 'KA010', message = 'the endpoint is disabled', hint = 'kakunin-db webhooks enable lets it go on.';
  end if;
  return kakunin_private.queue_webhook('webhook.test', null, '{}', null, test_webhook.endpoint_id);
end
$$;
comment on function kakunin.test_webhook(uuid) is
  'Puts a message of type webhook.test into the outbox for this endpoint; returns its id. For kakunin_operator';

create function kakunin.replay_webhooks(message_id text default null, endpoint_id uuid default null) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now   constant timestamptz := kakunin_private.clock();
  v_count integer;
begin
  if replay_webhooks.message_id is null and replay_webhooks.endpoint_id is null then
    raise exception using errcode = 'KA010', message = 'say what to send again: a message, an endpoint, or a message to an endpoint';
  end if;
  with again as materialized (
    select d.message_id, d.endpoint_id
      from kakunin_private.webhook_deliveries d
      join kakunin_private.webhook_endpoints e on e.endpoint_id = d.endpoint_id
     where (replay_webhooks.message_id is null or d.message_id = replay_webhooks.message_id collate "C")
       and (replay_webhooks.endpoint_id is null or d.endpoint_id = replay_webhooks.endpoint_id)
       -- What was delivered is sent again only where it is named.
       and (d.state <> 'delivered' or replay_webhooks.message_id is not null)
       and coalesce(d.leased_until <= v_now, true)
     order by d.created_at
     limit 10000
       for update of d skip locked
  )
  update kakunin_private.webhook_deliveries d
     set state = 'pending', attempts = 0, next_attempt_at = v_now, leased_until = null
    from again a
   where d.message_id = a.message_id and d.endpoint_id = a.endpoint_id;
  get diagnostics v_count = row_count;
  if v_count > 0 then
    perform kakunin_private.record('webhook.replayed', null, jsonb_build_object(
      'message_id', left(replay_webhooks.message_id, 100), 'endpoint_id', replay_webhooks.endpoint_id, 'deliveries', v_count));
  end if;
  return v_count;
end
$$;
comment on function kakunin.replay_webhooks(text, uuid) is
  'Sends again, under the same id: a message, whatever became of it; or what an endpoint did not get, the dead and what waits for another attempt. Returns how many deliveries, at most 10000 at a time. For kakunin_operator';

create view kakunin.webhook_endpoints with (security_barrier = true) as
  select e.endpoint_id, e.url, e.event_types, e.created_at, e.created_by, e.disabled_at, e.previous_until,
         (select count(*) from kakunin_private.webhook_deliveries d where d.endpoint_id = e.endpoint_id and d.state = 'pending') as pending,
         (select count(*) from kakunin_private.webhook_deliveries d where d.endpoint_id = e.endpoint_id and d.state = 'dead') as dead
    from kakunin_private.webhook_endpoints e;
comment on view kakunin.webhook_endpoints is 'Endpoints of webhooks, without their secrets. For kakunin_operator';

create view kakunin.webhook_deliveries with (security_barrier = true) as
  select d.message_id, d.endpoint_id, m.event_type, d.state, d.attempts, d.created_at, d.last_attempt_at, d.last_status, d.last_error,
         case when d.state = 'pending' then d.next_attempt_at end as next_attempt_at, m.payload
    from kakunin_private.webhook_deliveries d
    join kakunin_private.webhook_messages m on m.message_id = d.message_id;
comment on view kakunin.webhook_deliveries is 'What was sent or is to be, to whom, and how that went. For kakunin_operator';

-- API: what `kakunin-db serve` keeps in the database (docs/api.md).
--
-- Keys. An API key is 256 random bits behind a prefix that finds it. The database has its SHA-256: what that many random bits
-- hash to tells nothing of them, so nothing slower is needed. Whoever reads this table, or a backup, has no key. A key has scopes,
-- ends at a moment if it was given one, and may be one agent's: then it is good for that agent alone, and for no scope that
-- reaches beyond it. authenticate_api_key() is asked by every request, so a revocation counts for the next one.
--
-- Descriptions. What an application says of its agents, and what it asks their certificates to permit. Nothing here
-- is believed: what an agent may do is in its certificate, and kakunin-db serve certifies nothing that its own
-- configuration does not let it.
--
-- Decision chains group events, of several agents perhaps, that led to one decision. Such an event is an entry of the ledger like any
-- other, and names its chain. A decision chain has a hash: 32 zero bytes before the first event, and with each event SHA-256 of the
-- hash so far and the entry's leaf hash (RFC 6962 section 2.1). Closing one puts that into the ledger. Not to be confused
-- with the chains of 60_ledger.sql, which order one agent's entries.
--
-- Reports are what the database knows of an agent and a period, as JSON; the ledger has their SHA-256.

-- Keys -------------------------------------------------------------------------------------------------

create table kakunin_private.api_keys (
  key_id       uuid primary key default gen_random_uuid(),
  prefix       text collate "C" not null unique check (prefix ~ '^[0-9a-f]{16}$'),
  digest       bytea not null check (octet_length(digest) = 32),
  name         text not null,
  scopes       text[] collate "C" not null check (cardinality(scopes) > 0),
  agent_id     uuid references kakunin_private.agents,
  created_at   timestamptz not null,
  created_by   name not null,
  expires_at   timestamptz,
  revoked_at   timestamptz,
  last_used_at timestamptz
);
comment on table kakunin_private.api_keys is 'API keys. Revoked ones stay, so that what was done with them can be told';
comment on column kakunin_private.api_keys.prefix is 'The part of the key that is no secret and finds it';
comment on column kakunin_private.api_keys.digest is 'SHA-256 of the whole key';
comment on column kakunin_private.api_keys.agent_id is 'The only agent it is good for; NULL for all';
comment on column kakunin_private.api_keys.last_used_at is 'To the minute or so: servers tell it together, not with each request';

create function kakunin_private.api_scopes() returns text[]
language sql immutable parallel safe
return array['agents:read', 'agents:write', 'agents:certify', 'agents:sign', 'agents:suspend', 'agents:halt',
             'events:read', 'events:write', 'chains:read', 'chains:write', 'reports:read', 'reports:write']::text[];
comment on function kakunin_private.api_scopes() is 'Scopes that an API key may have';

create function kakunin.create_api_key(
  prefix text, digest bytea, name text, scopes text[], agent_id uuid default null, expires_at timestamptz default null
) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now    constant timestamptz := kakunin_private.clock();
  v_prefix text collate "C" := create_api_key.prefix;
  v_scopes text[] collate "C";
  v_key_id uuid;
begin
  perform kakunin_private.check_text('a key''s name', create_api_key.name, 200);
  if not coalesce(v_prefix ~ '^[0-9a-f]{16}$' and octet_length(create_api_key.digest) = 32, false) then
    raise exception using errcode = 'KA010', message = 'a key has a prefix of 16 hexadecimal digits and a SHA-256 of 32 bytes',
      hint = 'kakunin-db serve keys create makes them.';
  end if;
  v_scopes := array(select distinct s collate "C" from unnest(create_api_key.scopes) s order by 1);
  if cardinality(v_scopes) = 0 or not v_scopes <@ kakunin_private.api_scopes() then
    raise exception using errcode = 'KA010', message = 'a key has scopes, and only those there are',
      hint = array_to_string(kakunin_private.api_scopes(), ', ');
  end if;
  if create_api_key.agent_id is not null then
    perform kakunin_private.check_known_agent(create_api_key.agent_id);
    if not v_scopes <@ array['agents:read', 'agents:sign', 'agents:halt', 'events:read', 'events:write']::text[] then
      raise exception using errcode = 'KA010', message = 'a key of one agent has scopes that are about that agent alone',
        hint = 'agents:read, agents:sign, agents:halt, events:read, events:write';
    end if;
  end if;
  if create_api_key.expires_at <= v_now then
    raise exception using errcode = 'KA010', message = 'a key that has expired is of no use';
  end if;
  insert into kakunin_private.api_keys (prefix, digest, name, scopes, agent_id, created_at, created_by, expires_at)
  values (v_prefix, create_api_key.digest, create_api_key.name, v_scopes, create_api_key.agent_id, v_now, session_user, create_api_key.expires_at)
  on conflict on constraint api_keys_prefix_key do nothing
  returning key_id into v_key_id;
  if not found then
    raise exception using errcode = 'KA010', message = 'there is a key with this prefix already', hint = 'Make another.';
  end if;
  perform kakunin_private.record('api_key.created', create_api_key.agent_id, jsonb_build_object(
    'key_id', v_key_id, 'prefix', v_prefix, 'name', create_api_key.name, 'scopes', to_jsonb(v_scopes),
    'expires_at', kakunin_private.rfc3339(create_api_key.expires_at)));
  return v_key_id;
end
$$;
comment on function kakunin.create_api_key(text, bytea, text, text[], uuid, timestamptz) is
  'Takes in an API key by its SHA-256, with scopes, and where given for one agent or until a moment; returns its id. For kakunin_operator';

create function kakunin.revoke_api_key(key_id uuid) returns timestamptz
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_key kakunin_private.api_keys;
  v_now constant timestamptz := kakunin_private.clock();
begin
  update kakunin_private.api_keys k set revoked_at = v_now
   where k.key_id = revoke_api_key.key_id and k.revoked_at is null
  returning * into v_key;
  if found then
    perform kakunin_private.record('api_key.revoked', v_key.agent_id, jsonb_build_object(
      'key_id', v_key.key_id, 'prefix', v_key.prefix, 'name', v_key.name));
    return v_now;
  end if;
  select * into v_key from kakunin_private.api_keys k where k.key_id = revoke_api_key.key_id;
  if not found then
    raise exception using errcode = 'KA010', message = format('no API key %s', coalesce(revoke_api_key.key_id::text, 'given')),
      hint = 'kakunin-db serve keys list has them.';
  end if;
  return v_key.revoked_at;
end
$$;
comment on function kakunin.revoke_api_key(uuid) is
  'Ends an API key for good, from the next request on; returns when it was first revoked. For kakunin_operator';

create function kakunin.authenticate_api_key(prefix text, digest bytea) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_prefix text collate "C" := authenticate_api_key.prefix;
  v_salt   constant bytea := uuid_send(gen_random_uuid());
  v_now    constant timestamptz := kakunin_private.clock();
  v_key    kakunin_private.api_keys;
begin
  perform kakunin_private.check_replica();
  select * into v_key from kakunin_private.api_keys k where k.prefix = v_prefix;
  -- What is compared are hashes under a salt of this call: how long it takes tells nothing of the digest. Where there
  -- is no such key the same is done.
  if not coalesce(sha256(v_salt || coalesce(v_key.digest, sha256(v_salt))) = sha256(v_salt || authenticate_api_key.digest), false)
    or v_key.key_id is null then
    return null;
  end if;
  return jsonb_build_object(
    'key_id', v_key.key_id, 'prefix', v_key.prefix, 'name', v_key.name, 'scopes', to_jsonb(v_key.scopes), 'agent_id', v_key.agent_id,
    'status', case when v_key.revoked_at is not null then 'revoked' when v_key.expires_at <= v_now then 'expired' else 'active' end);
end
$$;
comment on function kakunin.authenticate_api_key(text, bytea) is
  'The key with this prefix and SHA-256: its id, name, scopes, agent and whether it is active, revoked or expired; NULL where there is none. For kakunin_gateway';

create function kakunin.note_api_keys(key_ids uuid[]) returns integer
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_noted integer;
begin
  -- In the order of ids, and nobody waits: two servers tell of the same keys at once.
  update kakunin_private.api_keys k set last_used_at = kakunin_private.clock()
   where k.key_id = any (array(select l.key_id from kakunin_private.api_keys l
                                where l.key_id = any (note_api_keys.key_ids) order by l.key_id for no key update skip locked));
  get diagnostics v_noted = row_count;
  return v_noted;
end
$$;
comment on function kakunin.note_api_keys(uuid[]) is
  'Says that these keys were used just now; returns how many that was noted of. For kakunin_gateway';

create view kakunin.api_keys with (security_barrier = true) as
  select k.key_id, k.prefix, k.name, k.scopes, k.agent_id, k.created_at, k.created_by, k.expires_at, k.revoked_at, k.last_used_at
    from kakunin_private.api_keys k;
comment on view kakunin.api_keys is 'API keys, without what would let anybody in. For kakunin_operator';

-- Descriptions -----------------------------------------------------------------------------------------

create table kakunin_private.agent_descriptions (
  agent_id        uuid primary key references kakunin_private.agents,
  metadata        jsonb not null,
  financial_scope jsonb
);
comment on table kakunin_private.agent_descriptions is 'What an application says of its agents. It decides nothing';
comment on column kakunin_private.agent_descriptions.financial_scope is 'What its certificate is asked to limit it to';

create function kakunin.describe_agent(agent_id uuid, metadata jsonb, financial_scope jsonb default null) returns void
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_size constant integer := octet_length(metadata::text) + coalesce(octet_length(financial_scope::text), 0);
begin
  if coalesce(jsonb_typeof(metadata) <> 'object', true) or v_size > 16384
    or kakunin_private.is_too_deep(metadata) or kakunin_private.is_too_deep(financial_scope) then
    raise exception using errcode = 'KA010',
      message = 'metadata and financial scope are JSON objects of at most 16384 bytes together, nested at most 64 deep';
  end if;
  perform kakunin_private.check_financial_scope(financial_scope);
  perform kakunin_private.check_known_agent(describe_agent.agent_id);
  insert into kakunin_private.agent_descriptions as d (agent_id, metadata, financial_scope)
  values (describe_agent.agent_id, describe_agent.metadata, describe_agent.financial_scope)
  on conflict on constraint agent_descriptions_pkey do update
    set metadata = excluded.metadata, financial_scope = coalesce(excluded.financial_scope, d.financial_scope);
  perform kakunin_private.record('agent.described', describe_agent.agent_id, jsonb_strip_nulls(jsonb_build_object(
    'metadata_sha256', encode(sha256(convert_to(metadata::text, 'UTF8')), 'hex'),
    'scopes', metadata -> 'scopes', 'financial_scope', financial_scope)));
end
$$;
comment on function kakunin.describe_agent(uuid, jsonb, jsonb) is
  'Keeps what an application says of an agent, in place of what it said before; a financial scope that is not given stays. For kakunin_registrar';

create view kakunin.agent_descriptions with (security_barrier = true) as
  select d.agent_id, d.metadata, d.financial_scope from kakunin_private.agent_descriptions d;
comment on view kakunin.agent_descriptions is 'What applications say of their agents. For kakunin_registrar, kakunin_operator, kakunin_auditor';

-- Decision chains --------------------------------------------------------------------------------------

create table kakunin_private.decision_chains (
  chain_id    uuid primary key default gen_random_uuid(),
  name        text not null,
  description text,
  metadata    jsonb,
  created_at  timestamptz not null,
  created_by  name not null,
  closed_at   timestamptz,
  events      integer not null default 0,
  hash        bytea not null default decode(repeat('00', 32), 'hex')
);
create index decision_chains_created_at on kakunin_private.decision_chains (created_at, chain_id);
comment on table kakunin_private.decision_chains is 'Groups of events that led to one decision';
comment on column kakunin_private.decision_chains.hash is 'SHA-256 of what it was before the newest event and that event''s leaf hash';

create table kakunin_private.decision_chain_events (
  chain_id uuid not null references kakunin_private.decision_chains,
  sequence integer not null,
  event_id bigint not null,
  primary key (chain_id, sequence)
);
comment on table kakunin_private.decision_chain_events is 'Which entries of the ledger a decision chain has, in their order';

create function kakunin.open_decision_chain(name text, description text default null, metadata jsonb default null) returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain_id uuid;
begin
  if length(description) > 2000 or jsonb_typeof(metadata) <> 'object' or octet_length(metadata::text) > 16384
    or kakunin_private.is_too_deep(metadata) then
    raise exception using errcode = 'KA010',
      message = 'a description is at most 2000 characters, and metadata a JSON object of at most 16384 bytes, nested at most 64 deep';
  end if;
  insert into kakunin_private.decision_chains (name, description, metadata, created_at, created_by)
  values (kakunin_private.check_text('a decision chain''s name', open_decision_chain.name, 200), description, metadata, kakunin_private.clock(), session_user)
  returning chain_id into v_chain_id;
  perform kakunin_private.record('chain.opened', null, jsonb_build_object('chain_id', v_chain_id, 'name', open_decision_chain.name));
  return v_chain_id;
end
$$;
comment on function kakunin.open_decision_chain(text, text, jsonb) is 'Begins a decision chain and returns its id. For kakunin_gateway';

create function kakunin_private.lock_decision_chain(p_chain_id uuid) returns kakunin_private.decision_chains
language plpgsql volatile parallel unsafe
as $$
declare
  v_chain kakunin_private.decision_chains;
begin
  perform kakunin_private.check_snapshot_is_fresh('a decision chain');
  select * into v_chain from kakunin_private.decision_chains d where d.chain_id = p_chain_id for no key update;
  if not found then
    raise exception using errcode = 'KA010', message = format('no decision chain %s', coalesce(p_chain_id::text, 'given')),
      hint = 'kakunin.decision_chains shows them.';
  elsif v_chain.closed_at is not null then
    raise exception using errcode = 'KA010', message = format('decision chain %s is closed', p_chain_id),
      hint = 'Open another.';
  end if;
  return v_chain;
end
$$;
comment on function kakunin_private.lock_decision_chain(uuid) is 'An open decision chain, locked; KA010 where there is none';

create function kakunin.append_to_decision_chain(
  chain_id uuid, event_type text, metadata jsonb default '{}', session_id text default null, occurred_at timestamptz default null
) returns jsonb
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain constant kakunin_private.decision_chains := kakunin_private.lock_decision_chain(append_to_decision_chain.chain_id);
  v_entry jsonb;
begin
  if coalesce(jsonb_typeof(metadata) <> 'object', true) then
    raise exception using errcode = 'KA010', message = 'the metadata of an event in a decision chain is a JSON object';
  elsif v_chain.events >= 1000 then
    raise exception using errcode = 'KA010', message = 'a decision chain has at most 1000 events', hint = 'Close it and open another.';
  end if;
  v_entry := kakunin.audit_log_append(
    event_type, metadata || jsonb_build_object('decision_chain', v_chain.chain_id), session_id, occurred_at);
  insert into kakunin_private.decision_chain_events (chain_id, sequence, event_id)
  values (v_chain.chain_id, v_chain.events + 1, (v_entry ->> 'event_id')::bigint);
  update kakunin_private.decision_chains d
     set events = d.events + 1, hash = sha256(d.hash || decode(v_entry ->> 'hash', 'hex'))
   where d.chain_id = v_chain.chain_id;
  return v_entry;
end
$$;
comment on function kakunin.append_to_decision_chain(uuid, text, jsonb, text, timestamptz) is
  'audit_log_append() of an event that belongs to this open decision chain. For kakunin_gateway';

create function kakunin.close_decision_chain(chain_id uuid) returns text
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain constant kakunin_private.decision_chains := kakunin_private.lock_decision_chain(close_decision_chain.chain_id);
begin
  update kakunin_private.decision_chains d set closed_at = kakunin_private.clock() where d.chain_id = v_chain.chain_id;
  perform kakunin_private.record('chain.closed', null, jsonb_build_object(
    'chain_id', v_chain.chain_id, 'events', v_chain.events, 'hash', encode(v_chain.hash, 'hex')));
  return encode(v_chain.hash, 'hex');
end
$$;
comment on function kakunin.close_decision_chain(uuid) is
  'Closes a decision chain for good and returns its hash, which the ledger has from now on. For kakunin_gateway';

create function kakunin.verify_decision_chain(chain_id uuid) returns jsonb
language plpgsql stable parallel restricted security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_chain  kakunin_private.decision_chains;
  v_hash   bytea := decode(repeat('00', 32), 'hex');
  v_events integer := 0;
  v_gap    integer;
  v_event  record;
begin
  select * into v_chain from kakunin_private.decision_chains d where d.chain_id = verify_decision_chain.chain_id;
  if not found then
    return null;
  end if;
  for v_event in
    select e.sequence, l.entry
      from kakunin_private.decision_chain_events e left join kakunin_private.ledger l on l.event_id = e.event_id
     where e.chain_id = v_chain.chain_id order by e.sequence
  loop
    v_events := v_events + 1;
    if v_event.entry is null or v_event.sequence <> v_events then
      v_gap := coalesce(v_gap, v_event.sequence);
    else
      v_hash := sha256(v_hash || kakunin_private.leaf_hash(v_event.entry));
    end if;
  end loop;
  return jsonb_build_object(
    'chain_id', v_chain.chain_id, 'name', v_chain.name, 'event_count', v_chain.events,
    'status', case when v_chain.closed_at is null then 'open' else 'closed' end,
    'chain_hash', encode(v_chain.hash, 'hex'), 'created_at', v_chain.created_at, 'closed_at', v_chain.closed_at,
    'verified', v_gap is null and v_hash = v_chain.hash and v_events = v_chain.events,
    'note', case when v_gap is not null then format('entry %s is not in this database: it was archived, or removed', v_gap)
                 when v_hash <> v_chain.hash or v_events <> v_chain.events then 'the ledger''s entries are not those this chain was made of'
                 when v_chain.closed_at is null then 'it is open: more events may follow' end);
end
$$;
comment on function kakunin.verify_decision_chain(uuid) is
  'Works a decision chain''s hash out again from the ledger''s entries: verified, and a note where there is something to say; NULL for one that is unknown. For kakunin_gateway and kakunin_auditor';

create view kakunin.decision_chains with (security_barrier = true) as
  select d.chain_id, d.name, d.description, d.metadata, d.created_at, d.created_by, d.closed_at, d.events, encode(d.hash, 'hex') as hash
    from kakunin_private.decision_chains d;
comment on view kakunin.decision_chains is 'Decision chains and their hashes. For kakunin_gateway and kakunin_auditor';

create view kakunin.decision_chain_events with (security_barrier = true) as
  select e.chain_id, e.sequence, e.event_id from kakunin_private.decision_chain_events e;
comment on view kakunin.decision_chain_events is 'Which entries of kakunin.audit_log a decision chain has. For kakunin_auditor';

-- Reports ----------------------------------------------------------------------------------------------

create table kakunin_private.reports (
  report_id    uuid primary key,
  agent_id     uuid not null references kakunin_private.agents,
  period_start timestamptz not null,
  period_end   timestamptz not null,
  created_at   timestamptz not null,
  created_by   name not null,
  document     text not null
);
comment on table kakunin_private.reports is 'Compliance reports as they were made';
comment on column kakunin_private.reports.document is 'JSON. The ledger has the SHA-256 of its UTF-8';

-- Where what a standard asks for is shown. Members of the report, by control.
create function kakunin_private.report_standards(p_frameworks text[]) returns jsonb
language sql immutable parallel safe
return (
  select coalesce(jsonb_object_agg(s.framework, s.controls), '{}')
    from (values
      ('iso_27001', '{"A.5.16": ["agent", "certificates"], "A.5.18": ["certificates", "decisions"], "A.5.26": ["halts", "decisions"], "A.8.15": ["events", "ledger"], "A.8.16": ["risk", "events"], "A.8.24": ["certificates", "ledger"]}'::jsonb),
      ('nist_csf', '{"PR.AA-01": ["agent", "certificates"], "PR.AA-05": ["certificates"], "PR.PS-04": ["events", "ledger"], "DE.CM-09": ["risk", "events"], "RS.MI-01": ["halts", "decisions"]}'::jsonb)
    ) s(framework, controls)
   where s.framework = any (p_frameworks));
comment on function kakunin_private.report_standards(text[]) is
  'Controls of ISO/IEC 27001:2022 annex A and NIST CSF 2.0, and the members of a report that are evidence for each';

create function kakunin.create_report(agent_id uuid, days integer default 30, notes text default null, frameworks text[] default '{}') returns uuid
language plpgsql volatile parallel unsafe security definer set search_path = pg_catalog, pg_temp
as $$
declare
  v_now       constant timestamptz := kakunin_private.clock();
  v_report_id constant uuid := gen_random_uuid();
  v_from      timestamptz;
  v_document  text;
begin
  perform kakunin_private.check_known_agent(create_report.agent_id);
  if not coalesce(days between 1 and 366, false) or length(notes) > 2000
    or not coalesce(frameworks <@ array['iso_27001', 'nist_csf']::text[], false) then
    raise exception using errcode = 'KA010', message = 'a report is of 1 to 366 days, with notes of at most 2000 characters',
      hint = 'frameworks are iso_27001 and nist_csf';
  end if;
  v_from := v_now - make_interval(hours => 24 * days);
  v_document := (jsonb_build_object(
    'type', 'kakunin.report/1', 'report_id', v_report_id, 'installation', kakunin.installation_id(),
    'period', jsonb_build_object('start', kakunin_private.rfc3339(v_from), 'end', kakunin_private.rfc3339(v_now), 'days', days),
    'notes', notes,
    'agent', (select jsonb_build_object('agent_id', a.agent_id, 'name', a.name, 'tenant', a.tenant, 'model', a.model,
                'model_version', a.model_version, 'model_hash', a.model_hash, 'created_at', kakunin_private.rfc3339(a.created_at),
                'suspended_at', kakunin_private.rfc3339(a.suspended_at), 'suspended_reason', a.suspended_reason)
                from kakunin_private.agents a where a.agent_id = create_report.agent_id),
    'certificates', (select coalesce(jsonb_agg(
                kakunin.verify_certificate(c.serial) || jsonb_build_object('sha256', encode(sha256(c.der), 'hex'))
                order by c.registered_at), '[]')
                from kakunin_private.certificates c
               where c.agent_id = create_report.agent_id and c.not_after >= v_from),
    'risk', kakunin_private.risk_profile(create_report.agent_id),
    'halts', (select coalesce(jsonb_agg(jsonb_build_object('halt_id', h.halt_id, 'halted_at', kakunin_private.rfc3339(h.halted_at),
                'reason', h.reason, 'certificates', to_jsonb(h.serials), 'signed', h.signature is not null) order by h.halted_at), '[]')
                from kakunin_private.halts h where h.agent_id = create_report.agent_id and h.halted_at >= v_from),
    'ledger', (select jsonb_build_object('tree_size', t.tree_size, 'root', encode(t.root, 'hex'), 'key_id', t.key_id)
                from kakunin.tree_heads t order by t.tree_size desc limit 1),
    'standards', kakunin_private.report_standards(frameworks)
  ) || (
    with entries as (
      select l.event_id, l.recorded_at, l.entry::jsonb as entry
        from kakunin_private.ledger l
       where l.agent_id = create_report.agent_id and l.recorded_at >= v_from and l.recorded_at <= v_now
    ), events as (
      select e.entry ->> 'event_type' as event_type, e.entry -> 'risk' ->> 'band' as band, (e.entry -> 'risk' ->> 'score')::double precision as score
        from entries e where e.entry -> 'risk' <> 'null'
    )
    select jsonb_build_object(
      'events', jsonb_build_object(
        'total', (select count(*) from events), 'highest_score', (select max(v.score) from events v),
        'by_type', (select coalesce(jsonb_object_agg(t.event_type, t.n), '{}') from (select v.event_type, count(*) as n from events v group by 1) t),
        'by_band', (select coalesce(jsonb_object_agg(t.band, t.n), '{}') from (select v.band, count(*) as n from events v group by 1) t)),
      'decisions', (select coalesce(jsonb_agg(jsonb_build_object(
          'event_id', e.event_id, 'recorded_at', kakunin_private.rfc3339(e.recorded_at), 'event_type', e.entry -> 'event_type', 'metadata', e.entry -> 'metadata')
          order by e.event_id), '[]') from entries e
         -- What was decided about it. What it did itself (an audited table, say) is as much as it likes, and would be more than
         -- a document holds.
         where e.entry -> 'risk' = 'null' and e.entry -> 'serial' = 'null'))))::text;
  insert into kakunin_private.reports (report_id, agent_id, period_start, period_end, created_at, created_by, document)
  values (v_report_id, create_report.agent_id, v_from, v_now, v_now, session_user, v_document);
  perform kakunin_private.record('report.created', create_report.agent_id, jsonb_build_object(
    'report_id', v_report_id, 'sha256', encode(sha256(convert_to(v_document, 'UTF8')), 'hex')));
  return v_report_id;
end
$$;
comment on function kakunin.create_report(uuid, integer, text, text[]) is
  'Makes a report of what the database knows of an agent and the last days, keeps it, and returns its id. For kakunin_auditor';

create view kakunin.reports with (security_barrier = true) as
  select r.report_id, r.agent_id, r.period_start, r.period_end, r.created_at, r.created_by, r.document from kakunin_private.reports r;
comment on view kakunin.reports is 'Compliance reports. For kakunin_auditor';

-- Privileges: who may call what, all in one place.
--
-- PUBLIC may call nothing. What a role may call is named here and nowhere else; a function that is not
-- listed belongs to the owner alone: set_gateway_logins(), because who may say whose claims are believed can
-- become any agent, and renew_installation() and continue_ledger(), which say what a copy of a database is.

revoke all on all functions in schema kakunin, kakunin_private from public;

-- Default privileges of the login that installs (ALTER DEFAULT PRIVILEGES) are granted on what it makes, to anybody:
-- bind_serial() or the session key would be theirs with it.
do $defaults$
declare
  v_grantee text;
begin
  for v_grantee in
    select distinct case a.grantee when 0 then 'public' else a.grantee::regrole::text end
      from (select n.oid as schema, n.nspowner as owner, n.nspacl as acl from pg_namespace n
            union all select c.relnamespace, c.relowner, c.relacl from pg_class c
            union all select p.pronamespace, p.proowner, p.proacl from pg_proc p) o,
           aclexplode(o.acl) a
     where o.schema in ('kakunin'::regnamespace, 'kakunin_private'::regnamespace) and a.grantee <> o.owner
  loop
    execute format('revoke all on all functions in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on all tables in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on all sequences in schema kakunin, kakunin_private from %s', v_grantee);
    execute format('revoke all on schema kakunin, kakunin_private from %s', v_grantee);
  end loop;
end
$defaults$;

grant usage on schema kakunin to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant execute on function kakunin.installation_id(), kakunin.normalize_serial(text) to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

-- Proof, and what policies ask. The gateway runs statements under policies too.
grant execute on function
  kakunin.open_session(text), kakunin.bind_session(text, boolean), kakunin.unbind_session(),
  kakunin.current_cert_serial(), kakunin.current_agent_id(),
  kakunin.has_scope(text), kakunin.require_session(), kakunin.require_scope(text)
  to kakunin_agent, kakunin_gateway;

grant execute on function kakunin.bind_serial(text) to kakunin_gateway;

-- PostgREST calls it in the role of the request: the owner also grants it to every role that a token may name.
grant execute on function kakunin.pre_request() to kakunin_agent, kakunin_gateway;

grant execute on function
  kakunin.create_agent(text, text, text, text, text), kakunin.register_certificate(bytea, interval)
  to kakunin_registrar;

grant execute on function kakunin.update_agent(uuid, text, text, text, text, text) to kakunin_registrar, kakunin_operator;

-- Verification tells what a certificate says, which its holder shows to everybody.
grant execute on function kakunin.verify_certificate(text), kakunin.certificate_der(text), kakunin.verify_message(text, bytea, bytea) to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant select on kakunin.authorities, kakunin.crls to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;

grant select on kakunin.agents, kakunin.certificates to kakunin_registrar, kakunin_operator, kakunin_auditor;

-- What the holder of an authority's key has to sign, and brings back. The database verifies the signatures.
grant select on kakunin.halts to kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.crls_due(), kakunin.revocations(text) to
  kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.publish_crl(bytea), kakunin.sign_halt(uuid, text, bytea) to
  kakunin_registrar, kakunin_operator, kakunin_worker;

grant execute on function kakunin.audit_log_append(text, jsonb, text, timestamptz) to kakunin_agent, kakunin_gateway;
grant select on kakunin.audit_log to kakunin_agent, kakunin_gateway, kakunin_auditor;
grant execute on function kakunin.current_agent_id() to kakunin_auditor, kakunin_operator;  -- the view calls it, and a view's functions are its reader's to call

-- Risk: the three tools of an agent, what policies ask, and what follows.
grant execute on function
  kakunin.check_risk_score(), kakunin.verify_agent_scope(text, numeric, text, text, numeric),
  kakunin.require_spend(numeric, text, text, numeric, boolean), kakunin.require_risk_below(text, boolean)
  to kakunin_agent, kakunin_gateway;
grant execute on function kakunin.agent_risk(uuid) to kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.set_risk(jsonb), kakunin.set_agent_risk(uuid, text, boolean, double precision), kakunin.review_risk(bigint, text),
  kakunin.import_events(uuid, jsonb)
  to kakunin_operator;
grant execute on function kakunin.settle_risk() to kakunin_worker, kakunin_operator;
grant execute on function kakunin.risk_window() to kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor;  -- a view calls it
grant select on kakunin.risk_by_hour, kakunin.risk_by_day, kakunin.risk_contributions to
  kakunin_agent, kakunin_gateway, kakunin_operator, kakunin_auditor;
grant select on kakunin.risk_reviews to kakunin_operator, kakunin_auditor;

-- The worker seals and signs. It reads no entry.
grant execute on function
  kakunin.seal_ledger(integer), kakunin.tree_head_to_sign(), kakunin.publish_tree_head(bigint, bigint, text, bytea),
  kakunin.lead_ledger(uuid, text, interval, text), kakunin.sleep_ledger(), kakunin.consistency_proof(bigint, bigint)
  to kakunin_worker;
grant execute on function kakunin.make_partitions(interval) to kakunin_worker, kakunin_operator;
grant execute on function kakunin.ledger_status(), kakunin.ledger_home() to kakunin_worker, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.register_ledger_key(bytea), kakunin.revoke_ledger_key(text, text), kakunin.archive_partition(name)
  to kakunin_operator;

-- The worker delivers webhooks, and has their secrets encrypted. What is sent to whom is the operator's to see.
grant execute on function
  kakunin.expire_certificates(integer), kakunin.claim_webhooks(interval),
  kakunin.report_webhook(text, uuid, integer, integer, text), kakunin.clean_webhooks()
  to kakunin_worker;
grant execute on function kakunin.webhook_status() to kakunin_worker, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.add_webhook(uuid, text, text[], bytea), kakunin.enable_webhook(uuid, boolean), kakunin.remove_webhook(uuid),
  kakunin.rotate_webhook(uuid, bytea, interval), kakunin.test_webhook(uuid), kakunin.replay_webhooks(text, uuid)
  to kakunin_operator;
grant select on kakunin.webhook_endpoints, kakunin.webhook_deliveries to kakunin_operator;

-- Proof is for whoever asks; what it is about, for the auditor, and an agent for its own.
grant select on kakunin.ledger_keys, kakunin.tree_heads to
  kakunin_agent, kakunin_gateway, kakunin_registrar, kakunin_operator, kakunin_worker, kakunin_auditor;
grant execute on function kakunin.inclusion_proof(bigint, bigint) to kakunin_agent, kakunin_gateway, kakunin_auditor;
grant select on kakunin.chains to kakunin_auditor;
grant execute on function
  kakunin.consistency_proof(bigint, bigint), kakunin.ledger_leaves(bigint, integer), kakunin.frontier(bigint),
  kakunin.unsealed_entries(), kakunin.stray_entries(), kakunin.record_read(text, jsonb), kakunin.record_export(bigint, bigint, text)
  to kakunin_auditor;

-- The API. Its server is a gateway; keys are made and ended by the operator.
grant execute on function
  kakunin.authenticate_api_key(text, bytea), kakunin.note_api_keys(uuid[]), kakunin.open_decision_chain(text, text, jsonb),
  kakunin.append_to_decision_chain(uuid, text, jsonb, text, timestamptz), kakunin.close_decision_chain(uuid)
  to kakunin_gateway;
grant execute on function kakunin.verify_decision_chain(uuid) to kakunin_gateway, kakunin_auditor;
grant select on kakunin.decision_chains to kakunin_gateway, kakunin_auditor;
grant select on kakunin.decision_chain_events, kakunin.reports to kakunin_auditor;
grant execute on function kakunin.create_report(uuid, integer, text, text[]) to kakunin_auditor;
grant execute on function kakunin.describe_agent(uuid, jsonb, jsonb) to kakunin_registrar;
grant select on kakunin.agent_descriptions to kakunin_registrar, kakunin_operator, kakunin_auditor;
grant execute on function
  kakunin.create_api_key(text, bytea, text, text[], uuid, timestamptz), kakunin.revoke_api_key(uuid)
  to kakunin_operator;
grant select on kakunin.api_keys to kakunin_operator;

-- protect() and unprotect() run with the caller's rights: the privilege alone protects no table. An owner of
-- tables who is no operator is granted the two, the three below them that they call, and USAGE on schema kakunin, by name.
grant execute on function
  kakunin.trust_ca(bytea), kakunin.distrust_ca(text, text),
  kakunin.revoke_certificate(text, text), kakunin.suspend_agent(uuid, text), kakunin.reinstate_agent(uuid),
  kakunin.halt_agent(uuid, text, boolean),
  kakunin.rotate_session_key(interval), kakunin.set_replica_lag(interval),
  kakunin.protect(regclass, name, name[], text, boolean, boolean, boolean, boolean), kakunin.unprotect(regclass),
  kakunin.audit_changes(regclass, boolean, boolean), kakunin.record_policy(regclass), kakunin.record_changes()
  to kakunin_operator;

