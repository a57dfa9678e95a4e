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
