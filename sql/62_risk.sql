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
