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
