-- A column belongs to an agent by its name, by its default, or because a policy compares it with who is bound.
-- The same goes for what inherits from such a table, and what it inherits from: either shows its rows.
with recursive
asked as (
  select p.oid from pg_proc p
   where p.pronamespace = to_regnamespace('kakunin') and p.proname in ('current_cert_serial', 'current_agent_id')
),
of_kit as (
  select p.oid from pg_proc p where p.pronamespace = to_regnamespace('kakunin')
),
by_policy as (
  select p.polrelid as relid, p.oid as policy
    from pg_policy p
   where p.polname = 'kakunin_isolation'
      or exists (select from pg_depend d
                  where d.classid = 'pg_policy'::regclass and d.objid = p.oid
                    and d.refclassid = 'pg_proc'::regclass and d.refobjid in (select oid from of_kit))
),
columns as (
  select a.attrelid as relid, a.attnum, 1 as rank
    from pg_attribute a join pg_type t on t.oid = a.atttypid
   where a.attname = 'permitted_agent_serial' and a.attnum > 0 and not a.attisdropped
     and coalesce(nullif(t.typbasetype, 0), t.oid) in ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype)
  union all
  select b.relid, d.refobjsubid, 2
    from by_policy b
    join pg_depend d on d.classid = 'pg_policy'::regclass and d.objid = b.policy
                    and d.refclassid = 'pg_class'::regclass and d.refobjid = b.relid and d.refobjsubid > 0
    join pg_attribute a on a.attrelid = b.relid and a.attnum = d.refobjsubid
    join pg_type t on t.oid = a.atttypid
   where coalesce(nullif(t.typbasetype, 0), t.oid) in ('text'::regtype, 'varchar'::regtype, 'uuid'::regtype)
     and exists (select from pg_depend f
                  where f.classid = 'pg_policy'::regclass and f.objid = b.policy
                    and f.refclassid = 'pg_proc'::regclass and f.refobjid in (select oid from asked))
  union all
  select e.adrelid, e.adnum, 3
    from pg_depend d join pg_attrdef e on e.oid = d.objid
   where d.classid = 'pg_attrdef'::regclass and d.refclassid = 'pg_proc'::regclass
     and d.refobjid in (select oid from asked)
),
first as (
  select relid from by_policy union select relid from columns
),
family as (
  select f.relid from first f
  union
  select case when i.inhparent = y.relid then i.inhrelid else i.inhparent end
    from family y join pg_inherits i on y.relid in (i.inhparent, i.inhrelid)
)
select c.oid::bigint as oid, c.oid::regclass::text as name, quote_literal(c.oid::regclass) as literal, c.relname::text as bare, c.relkind::text as kind,
       c.relowner::bigint as owner, c.relrowsecurity as enabled, c.relforcerowsecurity as forced,
       k.name as column
  from family f
  left join (select distinct on (k.relid) k.relid, quote_literal(a.attname) as name
               from columns k join pg_attribute a on a.attrelid = k.relid and a.attnum = k.attnum
              order by k.relid, k.rank, k.attnum) k on k.relid = f.relid
  join pg_class c on c.oid = f.relid
  join pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p', 'f') and c.relpersistence <> 't'
   and n.nspname not in ('kakunin', 'kakunin_private', 'information_schema') and n.nspname !~ '^pg_'
