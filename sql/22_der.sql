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
