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
