-- The ledger: one row per job, the waiting room, the rolling limits, the workers and their leases.
-- Life of a job and the reasons behind each rule: docs/guarantees.md.
-- Lock order everywhere: rate rows, connection caps, jobs, lanes, health; each by key, bytewise (COLLATE "C": arguments have
-- the database's collation). A release takes lanes first, but waits for no lock at all; nor does whoever takes a probe, or
-- wakes lanes behind the lock of an account's health. Reports in the outbox are written behind all of it, cleared by number,
-- and passed over by everybody else while they are locked. What is left (a limit created in that very moment) ends as 40P01,
-- which callers repeat.
-- The functions of the hot path fix their plans: with the statistics of an empty table, or of one that has just grown,
-- the planner would walk all leased or all waiting jobs for every batch. A plan is kept until the next ANALYZE; so that a
-- table which was small when it was made is not read from end to end when it is large, rows are to look dear, and pages
-- cheap. What may change within a statement, as clock_timestamp(), is not compared with a column: no index is used then.
-- IS NOT DISTINCT FROM keeps it off the partial indexes on job: rows named by their key are to be found by their key. They
-- are in plpgsql, however small, because it keeps plans: a function in SQL that cannot be inlined is planned at every call.

CREATE TABLE worker (
    -- A time in microseconds, and not a sequence: after a database is restored or fails over, a sequence would give numbers
    -- again that workers who outlived that still have.
    epoch        bigint PRIMARY KEY DEFAULT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    name         text NOT NULL,
    version      text NOT NULL,
    started_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    heartbeat_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- Since when the heartbeats have come without a gap: only a steady worker may take over from others.
    steady_since timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- How long it may be silent, and after what time what it marks as in its final write is decided: its own settings, which
    -- need not be those of whoever takes over from it.
    lease        interval NOT NULL,
    deadline     interval NOT NULL,
    -- For ever: a worker that finds its epoch dead must not act on it again.
    dead         boolean NOT NULL DEFAULT false
);

CREATE TABLE job (
    tenant          text COLLATE "C" NOT NULL,
    id              text COLLATE "C" NOT NULL,
    -- 0 open: RabbitMQ owns the body; 1 leased; 2 waiting; 3 done; 4 uncertain, held; 5 cancelled before it came;
    -- 6 in the dead letters: it begins anew if an operator replays it
    state           smallint NOT NULL,
    level           smallint NOT NULL,
    account         text COLLATE "C" NOT NULL,
    digest          bytea NOT NULL,
    -- Reports are numbered from here: birth second * 1000, so that numbers rise over incarnations of an id too.
    born            bigint NOT NULL,
    seq             bigint NOT NULL,
    -- The lease: who may act. Kept after settling, so that a repeated settle recognises itself.
    epoch           bigint,
    claim           bigint,
    leased_at       timestamptz,
    -- 1: committed before the write that may end the message, for jobs with on_uncertain = hold.
    phase           smallint NOT NULL DEFAULT 0,
    -- The rate slot in use: when it was granted (µs) and for how many recipients.
    slot_at         bigint,
    slot_cost       integer,
    attempt         integer NOT NULL DEFAULT 0,
    -- When an attempt was first found to need another one: the age of retries is counted from here. Null before.
    tried_at        timestamptz,
    -- Attempts and leases of which nobody knows the outcome.
    uncertain       integer NOT NULL DEFAULT 0,
    -- Suspicion that the job crashes whoever works on it: panics, and deaths of workers while "marked" (our own code was at
    -- work on its content, and on no other suspect's). A death beside it suspects it once, and never convicts it.
    crashes         smallint NOT NULL DEFAULT 0,
    marked          boolean NOT NULL DEFAULT false,
    -- Workers that died with it in their hands, for whatever reason.
    deaths          smallint NOT NULL DEFAULT 0,
    -- Asked for while it could not be granted: the job ends as cancelled unless its attempt succeeds.
    cancel          boolean NOT NULL DEFAULT false,
    -- An earlier owner's acceptance was written into the row under the present lease: its owner knows too little.
    merged          boolean NOT NULL DEFAULT false,
    -- The waiting room: as received, with plain overrides sealed.
    body            bytea,
    body_size       integer,
    properties      jsonb,
    due_at          timestamptz,
    -- As the job says. Other than due_at it never changes.
    expires_at      timestamptz,
    reason          smallint,
    -- Cumulative results per recipient, as in reports; those still open are the envelope of the next attempt.
    recipients      jsonb,
    message_id      text,
    batch           text,
    created_at      timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    finished_at     timestamptz,
    outcome         text,
    last_error      text,
    -- What somebody decided about a held job: sent, not_sent, failed; who, and when.
    resolved        text,
    resolved_by     text,
    resolved_at     timestamptz,
    -- The number in the outbox of the report "seq", whether it is still there or not.
    report          bigint,
    PRIMARY KEY (tenant, id),
    CONSTRAINT job_waits_complete CHECK (state <> 2 OR (body IS NOT NULL AND due_at IS NOT NULL AND reason IS NOT NULL))
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
ALTER TABLE job ALTER body SET STORAGE EXTERNAL;

CREATE INDEX job_leased ON job (epoch) WHERE state = 1;
CREATE INDEX job_waiting ON job (account, level, tenant, due_at) WHERE state = 2;
-- What waits beyond it comes out, whatever its account's limits or health: see release_expired_v1.
CREATE INDEX job_expiring ON job (expires_at) WHERE state = 2 AND expires_at IS NOT NULL;
-- Cancelled while leased to a worker that then died: to be ended by whoever takes over.
CREATE INDEX job_cancelled ON job (tenant, id) WHERE cancel AND state IN (0, 2);
CREATE INDEX job_finished ON job (finished_at) WHERE state IN (3, 5, 6);
-- For operators, who are asked about these; its columns never change.
CREATE INDEX job_held ON job (tenant, id) WHERE state = 4;

-- How many jobs wait for which reason, and how many are held, as it was counted last, for all workers: a full waiting room
-- takes long to read.
CREATE TABLE census (
    waiting bigint[] NOT NULL DEFAULT '{}',                     -- by reason
    held    bigint NOT NULL DEFAULT 0,
    next_at timestamptz NOT NULL DEFAULT '-infinity'            -- not counted again before
);
INSERT INTO census DEFAULT VALUES;

-- Reports owed to the exchange, written with the outcomes they tell of; each goes by its own number once it is confirmed.
-- They stand by themselves: nothing is looked up here by job on the way of a mail, so there is no index for it. Its rows live
-- for a moment: vacuum has to come often, and need not give back space that is wanted again at once. All its statements fix
-- their plans, and statistics would tell of rows long gone.
CREATE TABLE outbox (
    n          bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    tenant     text COLLATE "C" NOT NULL,
    id         text COLLATE "C" NOT NULL,
    seq        bigint NOT NULL,
    -- Whose worker publishes it first; null: whoever comes first.
    epoch      bigint,
    -- Not published by anybody else before.
    due_at     timestamptz NOT NULL,
    created_at timestamptz NOT NULL,
    body       text NOT NULL
) WITH (autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_insert_threshold = -1,
        autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_threshold = 2147483647, vacuum_truncate = false);

-- How many of them there are, as it was counted last, for all workers, and where they begin.
CREATE TABLE outbox_census (
    owed      bigint NOT NULL DEFAULT 0,
    most      bigint NOT NULL DEFAULT 0,                        -- up to where: the most that anybody has asked for
    oldest_at timestamptz,                                      -- since when the oldest is
    -- Searches begin at this number, and not among the index entries of what has passed, which stay as long as any
    -- transaction is open anywhere (a backup). It lies below the lowest number found: numbers may commit out of order. What
    -- comes lower still is found by a search of the whole, now and then.
    first_n   bigint NOT NULL DEFAULT 0,
    whole_at  timestamptz NOT NULL DEFAULT '-infinity',         -- when that is
    next_at   timestamptz NOT NULL DEFAULT '-infinity'          -- not counted again before
);
INSERT INTO outbox_census DEFAULT VALUES;

-- One row per (account, level, tenant) that has waiting jobs: who is to be looked at, and when.
CREATE TABLE lane (
    account text COLLATE "C" NOT NULL,
    level   smallint NOT NULL,
    tenant  text COLLATE "C" NOT NULL,
    next_at timestamptz NOT NULL,
    -- Waiting jobs that keep their order (over a limit, or no connection free); later ones queue behind them.
    fifo    bigint NOT NULL DEFAULT 0,
    -- When its last turn was: of those that wait for the same limit, who has waited longest comes first.
    served_at timestamptz NOT NULL DEFAULT '-infinity',
    -- No job of the lane is due before: the search begins here, and not among the index entries of those long gone,
    -- which stay as long as any transaction is open anywhere (a backup).
    oldest_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (account, level, tenant)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX lane_next ON lane (level, next_at);
CREATE INDEX lane_tenant ON lane (tenant);

-- Rolling limits: per key one ring of counters for each limit. A ring covers the window and the time a slot may be
-- used after it was granted, in buckets of 1/120 window (no finer than 4 ms); the sum over the whole ring never exceeds the limit.
CREATE TABLE rate (
    key     text COLLATE "C" PRIMARY KEY,   -- 'acme/' the tenant, 'acme/main' an account
    per     bigint[] NOT NULL,              -- window, µs; the shortest first
    unit    smallint[] NOT NULL,            -- 0 messages, 1 recipients
    since   bigint[] NOT NULL,              -- µs; slots granted before were never counted here
    lim     integer[] NOT NULL,
    width   bigint[] NOT NULL,              -- bucket, µs
    size    integer[] NOT NULL,             -- buckets in the ring
    base    integer[] NOT NULL,             -- where the ring begins in "ring"
    ring    integer[] NOT NULL,
    used    integer[] NOT NULL,
    head    bigint[] NOT NULL,              -- newest bucket number
    last    bigint NOT NULL DEFAULT 0,      -- µs; time never runs backwards for a key
    next_at bigint NOT NULL DEFAULT 0       -- µs; nothing can be granted before
) WITH (fillfactor = 20, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
ALTER TABLE rate ALTER ring SET STORAGE PLAIN;

CREATE TABLE connection_cap (
    account   text COLLATE "C" PRIMARY KEY,
    cap       integer NOT NULL CHECK (cap > 0),
    -- When a worker last asked in vain: holders give up idle connections then.
    wanted_at timestamptz
);
CREATE INDEX connection_wanted ON connection_cap (wanted_at);
CREATE TABLE connection_lease (
    account text COLLATE "C" NOT NULL,
    epoch   bigint NOT NULL,
    held    integer NOT NULL,
    PRIMARY KEY (account, epoch)
);

-- Circuit breakers: one row per account with recent trouble; where all is well there is none.
CREATE TABLE account_health (
    account    text COLLATE "C" PRIMARY KEY,
    state      smallint NOT NULL DEFAULT 0,             -- 0 closed, 1 open, 2 half-open: a probe is under way
    faults     integer NOT NULL DEFAULT 0,              -- since the server last worked
    openings   integer NOT NULL DEFAULT 0,              -- in a row
    opened_at  timestamptz,                             -- the first of them
    -- The last transition: what was leased before says nothing about the time after it.
    changed_at timestamptz NOT NULL DEFAULT '-infinity',
    noted_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    until      timestamptz,                             -- open: end of the cooldown; half-open: deadline of the probe
    epoch      bigint,                                  -- who probes
    claim      bigint,
    class      text,                                    -- the latest fault
    reason     text,
    detail     text,
    event      bigint NOT NULL DEFAULT 0                -- number of the latest event
);
-- Whether mail has to do with any of them is asked for every batch: an installation of some size always has accounts in trouble.
CREATE INDEX account_trouble ON account_health (account) WHERE state > 0 OR faults > 0;
CREATE INDEX account_probe ON account_health (epoch) WHERE state = 2;
-- Events of accounts, owed to the reports exchange; each goes when its publish is confirmed.
CREATE TABLE account_event (
    event_id   text COLLATE "C" PRIMARY KEY,
    tenant     text COLLATE "C" NOT NULL,
    type       text COLLATE "C" NOT NULL,
    body       text NOT NULL,
    next_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- STABLE, as what they are made of: an immutable function of stable parts is not inlined, but planned anew by every statement.
CREATE FUNCTION micros(t timestamptz) RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT (extract(epoch FROM t) * 1000000)::bigint $$;

CREATE FUNCTION instant(us bigint) RETURNS timestamptz LANGUAGE sql STABLE PARALLEL SAFE
    AS $$ SELECT timestamptz 'epoch' + us * interval '1 microsecond' $$;

-- The limits a send counts against: the tenant's, the owner's of a borrowed account, the account's.
CREATE FUNCTION charged_keys(p_tenant text, p_account text) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$ SELECT CASE WHEN split_part(p_account, '/', 1) = p_tenant THEN ARRAY[p_tenant || '/', p_account]
                 ELSE ARRAY[p_tenant || '/', split_part(p_account, '/', 1) || '/', p_account] END $$;

-- ── Limits ───────────────────────────────────────────────────────────────────────────────────────────────────────

-- Jobs that wait for one of these limits are looked at again at once. p_wait: also behind locks; a caller that holds
-- lanes passes false. What is passed over then is looked at within a minute anyway (see blocked_until).
CREATE FUNCTION wake_lanes(p_keys text[], p_wait boolean) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_a text[]; v_l smallint[]; v_t text[]; v_now timestamptz := clock_timestamp();
BEGIN
    IF cardinality(p_keys) = 0 THEN
        RETURN;
    END IF;
    -- The account's, the tenant's, and those of whoever borrows one of the tenant's accounts ('0' comes after '/').
    SELECT array_agg(q.account), array_agg(q.level), array_agg(q.tenant) INTO v_a, v_l, v_t
    FROM (SELECT l.account, l.level, l.tenant FROM lane l WHERE l.account = ANY (p_keys)
          UNION
          SELECT f.* FROM unnest(p_keys) k(key)
          CROSS JOIN LATERAL (
              SELECT l.account, l.level, l.tenant FROM lane l WHERE l.tenant = rtrim(k.key, '/')
              UNION ALL
              SELECT l.account, l.level, l.tenant FROM lane l WHERE l.account > k.key AND l.account < rtrim(k.key, '/') || '0') f
          WHERE k.key LIKE '%/') q;
    IF p_wait THEN
        -- Those that are due too: a release may be putting them off in this moment, for what holds no longer.
        PERFORM 1 FROM lane l JOIN unnest(v_a, v_l, v_t) u(a, l, t) ON l.account = u.a AND l.level = u.l AND l.tenant = u.t
            ORDER BY l.account, l.level, l.tenant FOR UPDATE OF l;
    ELSE
        SELECT array_agg(q.account), array_agg(q.level), array_agg(q.tenant) INTO v_a, v_l, v_t
        FROM (SELECT l.account, l.level, l.tenant
              FROM lane l JOIN unnest(v_a, v_l, v_t) u(a, l, t) ON l.account = u.a AND l.level = u.l AND l.tenant = u.t
              WHERE l.next_at > v_now FOR UPDATE OF l SKIP LOCKED) q;
    END IF;
    UPDATE lane l SET next_at = v_now FROM unnest(v_a, v_l, v_t) u(a, l, t)
        WHERE l.account = u.a AND l.level = u.l AND l.tenant = u.t AND l.next_at > v_now;
END $$;

-- Until when a lane whose limit is shut is left alone: a minute at most, so that a wake-up lost to a race is made good.
-- Null, there is no limit: not at all.
CREATE FUNCTION blocked_until(us bigint) RETURNS timestamptz LANGUAGE sql VOLATILE
    AS $$ SELECT least(timestamptz 'epoch' + coalesce(us, 0) * interval '1 microsecond',
                       clock_timestamp() + interval '1 minute') $$;

-- Replaces the limits of a key; a limit of 0 is none. What has been sent under a limit of the same window and unit
-- still counts; a new window starts empty.
CREATE FUNCTION set_limits_v1(p_key text, p_limits jsonb) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    old rate; n integer; l integer := 0; o integer; e jsonb; w bigint; d bigint; v_now bigint;
    a_per bigint[] := '{}'; a_unit smallint[] := '{}'; a_since bigint[] := '{}'; a_lim integer[] := '{}';
    a_width bigint[] := '{}'; a_size integer[] := '{}'; a_base integer[] := '{}'; a_ring integer[] := '{}';
    a_used integer[] := '{}'; a_head bigint[] := '{}'; keep integer[];
BEGIN
    INSERT INTO rate (key, per, unit, since, lim, width, size, base, ring, used, head)
        VALUES (p_key, '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}') ON CONFLICT (key) DO NOTHING;
    SELECT * INTO old FROM rate WHERE key = p_key FOR UPDATE;
    v_now := greatest(micros(clock_timestamp()), old.last);
    FOR e IN SELECT q.value FROM jsonb_array_elements(coalesce(p_limits, '[]')) q ORDER BY (q.value ->> 'per')::bigint LOOP
        CONTINUE WHEN (e ->> 'limit')::integer <= 0;
        l := l + 1;
        IF l > 8 THEN
            RAISE EXCEPTION 'at most 8 limits' USING ERRCODE = '23514';
        END IF;
        w := (e ->> 'per')::bigint;
        d := greatest(w / 120, 250000);
        a_per[l] := w;
        a_unit[l] := CASE WHEN e ->> 'unit' = 'recipients' THEN 1 ELSE 0 END;
        a_since[l] := v_now + 1;
        a_lim[l] := (e ->> 'limit')::integer;
        a_width[l] := greatest(w / 120, d / 60);    -- a row must fit its page, however short the window
        -- as many whole buckets as window and validity can touch
        n := ((w + d + a_width[l] - 1) / a_width[l])::integer + 1;
        a_size[l] := n;
        a_base[l] := coalesce(array_length(a_ring, 1), 0);
        keep := array_fill(0, ARRAY[n]);
        a_used[l] := 0;
        a_head[l] := 0;
        FOR o IN 1 .. coalesce(array_length(old.per, 1), 0) LOOP
            IF old.per[o] = w AND old.unit[o] = a_unit[l] THEN
                keep := old.ring[old.base[o] + 1 : old.base[o] + old.size[o]];
                a_used[l] := old.used[o];
                a_head[l] := old.head[o];
                a_since[l] := old.since[o];
            END IF;
        END LOOP;
        a_ring := a_ring || keep;
    END LOOP;
    IF l = 0 THEN
        DELETE FROM rate WHERE key = p_key;
    ELSE
        UPDATE rate SET per = a_per, unit = a_unit, since = a_since, lim = a_lim, width = a_width, size = a_size,
            base = a_base, ring = a_ring, used = a_used, head = a_head, next_at = 0 WHERE key = p_key;
    END IF;
    PERFORM wake_lanes(ARRAY[p_key], true);
END $$;

-- The functions from here to refund_slots are called by those below, which set search_path.

-- What is left under the limits of one row at time t (µs): messages, recipients, the largest envelope that can ever
-- pass, and for how long (µs) a slot may be used.
CREATE FUNCTION rate_room(r rate, t bigint, OUT messages integer, OUT recipients integer, OUT largest integer,
                          OUT valid bigint)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    l integer; g bigint; i bigint; u integer;
BEGIN
    messages := 2147483647; recipients := 2147483647; largest := 2147483647; valid := 9223372036854775807;
    FOR l IN 1 .. array_length(r.lim, 1) LOOP
        g := t / r.width[l];
        u := r.used[l];
        IF g - r.head[l] >= r.size[l] THEN
            u := 0;
        ELSE
            i := r.head[l] + 1;
            WHILE i <= g LOOP
                u := u - r.ring[r.base[l] + (i % r.size[l])::integer + 1];
                i := i + 1;
            END LOOP;
        END IF;
        valid := least(valid, greatest(r.per[l] / 120, 250000));
        IF r.unit[l] = 0 THEN
            messages := least(messages, r.lim[l] - u);
        ELSE
            recipients := least(recipients, r.lim[l] - u);
            largest := least(largest, r.lim[l]);
        END IF;
    END LOOP;
END $$;

-- Whether there is room for so much, even if what has left the windows since the last count is not subtracted.
CREATE FUNCTION rate_fits(p_unit smallint[], p_lim integer[], p_used integer[], p_messages integer, p_recipients integer)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    l integer;
BEGIN
    FOR l IN 1 .. cardinality(p_lim) LOOP
        IF (CASE p_unit[l] WHEN 0 THEN p_messages ELSE p_recipients END) > p_lim[l] - p_used[l] THEN
            RETURN false;
        END IF;
    END LOOP;
    RETURN true;
END $$;

-- A row with its rings advanced to time t, what was granted counted, and when more can be had if something was denied
-- that needed so much.
CREATE FUNCTION rate_counted(r rate, t bigint, p_messages integer, p_recipients integer,
                             p_denied boolean, p_need_recipients integer) RETURNS rate
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    l integer; g bigint; i bigint; k integer; more integer; need integer; acc integer; free_at bigint := 0;
    v_ring integer[] := r.ring; v_used integer[] := r.used; v_head bigint[] := r.head;
BEGIN
    FOR l IN 1 .. array_length(r.lim, 1) LOOP
        g := t / r.width[l];
        IF g - v_head[l] >= r.size[l] THEN
            v_ring[r.base[l] + 1 : r.base[l] + r.size[l]] := array_fill(0, ARRAY[r.size[l]]);
            v_used[l] := 0;
        ELSE
            i := v_head[l] + 1;
            WHILE i <= g LOOP
                k := r.base[l] + (i % r.size[l])::integer + 1;
                v_used[l] := v_used[l] - v_ring[k];
                v_ring[k] := 0;
                i := i + 1;
            END LOOP;
        END IF;
        v_head[l] := greatest(g, v_head[l]);
        k := r.base[l] + (v_head[l] % r.size[l])::integer + 1;
        more := CASE WHEN r.unit[l] = 0 THEN p_messages ELSE p_recipients END;
        v_ring[k] := v_ring[k] + more;
        v_used[l] := v_used[l] + more;
        IF p_denied THEN
            need := v_used[l] + CASE WHEN r.unit[l] = 0 THEN 1 ELSE p_need_recipients END - r.lim[l];
            acc := 0;
            i := v_head[l] - r.size[l] + 1;
            WHILE acc < need AND i <= v_head[l] LOOP
                acc := acc + v_ring[r.base[l] + (((i % r.size[l]) + r.size[l]) % r.size[l])::integer + 1];
                IF acc >= need THEN
                    free_at := greatest(free_at, (i + r.size[l]) * r.width[l]);
                END IF;
                i := i + 1;
            END LOOP;
            IF need > acc THEN  -- the limit is lower than what is asked: nothing to wait for but a change
                free_at := greatest(free_at, t + 60000000);
            END IF;
        END IF;
    END LOOP;
    r.ring := v_ring; r.used := v_used; r.head := v_head; r.last := t; r.next_at := free_at;
    RETURN r;
END $$;

-- What jobs ask of the keys they count against: messages, recipients.
CREATE FUNCTION asked_of(p_tenants text[], p_accounts text[], p_costs integer[])
RETURNS TABLE (key text, messages integer, recipients integer) LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT q.k, count(*)::integer, sum(q.c)::integer
    FROM (SELECT unnest(charged_keys(j.t, j.a)) AS k, j.c FROM unnest(p_tenants, p_accounts, p_costs) j(t, a, c) WHERE j.c > 0) q
    GROUP BY q.k
$$;

-- Grants slots in the order given. granted: recipients covered, 0 if denied or if nothing is asked for (cost 0); slot_us: null
-- if nothing limits it. The locks come first and the clock is read after them, so that waiting for a lock cannot reopen a
-- window. Most calls end here: there is room for all (see rate_fits).
CREATE FUNCTION take_slots(p_tenants text[], p_accounts text[], p_costs integer[])
RETURNS TABLE (granted integer[], slot_us bigint, valid_us bigint[], next_us bigint[])
LANGUAGE plpgsql AS $$
DECLARE
    n integer := coalesce(array_length(p_tenants, 1), 0);
    v_names text[]; v_m integer[]; v_r integer[]; v_valid bigint[]; v_fits boolean; v_opens bigint;
    -- every key has one limit, which is still in the bucket it was counted in last from v_begin to v_end
    v_alone boolean; v_begin bigint; v_end bigint;
    i integer; key text;
BEGIN
    granted := p_costs;
    valid_us := array_fill(NULL::bigint, ARRAY[n]); next_us := valid_us;
    SELECT array_agg(q.key), array_agg(q.messages), array_agg(q.recipients), array_agg(greatest(q.per / 120, 250000)),
           bool_and(q.fits), max(q.next_at), greatest(micros(clock_timestamp()), max(q.last)),
           bool_and(q.alone), max(q.head * q.width), min((q.head + 1) * q.width)
        INTO v_names, v_m, v_r, v_valid, v_fits, v_opens, slot_us, v_alone, v_begin, v_end
        FROM (SELECT r.key, a.messages, a.recipients, cardinality(r.lim) = 1 AS alone, r.head[1] AS head, r.width[1] AS width,
                     r.per[1] AS per, r.last, r.next_at,
                     CASE WHEN cardinality(r.lim) = 1
                          THEN CASE r.unit[1] WHEN 0 THEN a.messages ELSE a.recipients END <= r.lim[1] - r.used[1]
                          ELSE rate_fits(r.unit, r.lim, r.used, a.messages, a.recipients) END AS fits
              FROM (SELECT * FROM asked_of(p_tenants, p_accounts, p_costs) k ORDER BY k.key COLLATE "C") a
                   CROSS JOIN LATERAL (SELECT * FROM rate y WHERE y.key = a.key FOR UPDATE) r) q;
    IF v_names IS NULL THEN
        slot_us := NULL;
    ELSIF NOT v_fits OR slot_us < v_opens THEN
        RETURN QUERY SELECT s.* FROM share_slots(p_tenants, p_accounts, p_costs, v_names) s;
        RETURN;
    ELSE
        UPDATE rate r SET
            ring[r.base[1] + (r.head[1] % r.size[1])::integer + 1] = r.ring[r.base[1] + (r.head[1] % r.size[1])::integer + 1]
                + (CASE r.unit[1] WHEN 0 THEN v_m ELSE v_r END)[array_position(v_names, r.key)],
            used[1] = r.used[1] + (CASE r.unit[1] WHEN 0 THEN v_m ELSE v_r END)[array_position(v_names, r.key)],
            last = slot_us, next_at = 0
            WHERE r.key = ANY (v_names) AND cardinality(r.lim) = 1 AND slot_us / r.width[1] = r.head[1];
        IF NOT v_alone OR slot_us < v_begin OR slot_us >= v_end THEN
            UPDATE rate r SET (ring, used, head, last, next_at) =
                (SELECT f.ring, f.used, f.head, f.last, f.next_at
                 FROM rate_counted(r, slot_us, v_m[array_position(v_names, r.key)], v_r[array_position(v_names, r.key)], false, 1) f)
                WHERE r.key = ANY (v_names) AND NOT (cardinality(r.lim) = 1 AND slot_us / r.width[1] = r.head[1]);
        END IF;
        FOR i IN 1 .. n LOOP
            CONTINUE WHEN p_costs[i] = 0;
            FOREACH key IN ARRAY charged_keys(p_tenants[i], p_accounts[i]) LOOP
                valid_us[i] := least(valid_us[i], v_valid[array_position(v_names, key)]);
            END LOOP;
        END LOOP;
    END IF;
    RETURN NEXT;
END $$;

-- The same, job by job, where there may not be room for all. p_held: the keys that are locked; what is not locked must not be
-- granted, even if it has become free since.
CREATE FUNCTION share_slots(p_tenants text[], p_accounts text[], p_costs integer[], p_held text[])
RETURNS TABLE (granted integer[], slot_us bigint, valid_us bigint[], next_us bigint[])
LANGUAGE plpgsql AS $$
DECLARE
    n integer := coalesce(array_length(p_tenants, 1), 0);
    v_keys text[]; v_rows rate[]; v_names text[]; v_next bigint[]; v_shut boolean[];
    v_m integer[]; v_r integer[]; v_largest integer[]; v_valid bigint[]; v_still boolean[];
    v_gm integer[]; v_gr integer[]; v_need integer[]; v_denied boolean[]; v_counted rate[] := '{}'; v_row rate;
    i integer; p integer; c integer; t bigint; shut bigint; ok boolean;
    v_pos integer[]; key text; v_tenant text; v_account text; v_most integer; v_until bigint;
BEGIN
    granted := p_costs; slot_us := NULL;
    valid_us := array_fill(NULL::bigint, ARRAY[n]); next_us := array_fill(NULL::bigint, ARRAY[n]);
    SELECT array_agg(DISTINCT u.k ORDER BY u.k) INTO v_keys
        FROM (SELECT DISTINCT j.t, j.a FROM unnest(p_tenants, p_accounts) j(t, a)) j, unnest(charged_keys(j.t, j.a)) u(k);
    SELECT array_agg(q.r), array_agg(q.key), array_agg(q.next_at),
           greatest(micros(clock_timestamp()), max(q.last) FILTER (WHERE q.key = ANY (p_held)))
        INTO v_rows, v_names, v_next, t
        FROM (SELECT r, r.key, r.next_at, r.last FROM rate r WHERE r.key = ANY (v_keys) ORDER BY r.key) q;
    IF v_rows IS NULL THEN
        RETURN NEXT;
        RETURN;
    END IF;
    slot_us := t;
    -- Most rows have one limit, and are still in the bucket they were counted in last: nothing to add up.
    SELECT array_agg(q.still), array_agg(q.messages), array_agg(q.recipients), array_agg(q.largest), array_agg(q.valid),
           array_agg(y.next_at > t OR y.key <> ALL (p_held))
        INTO v_still, v_m, v_r, v_largest, v_valid, v_shut
        FROM unnest(v_rows) y CROSS JOIN LATERAL (
            SELECT true AS still, CASE y.unit[1] WHEN 0 THEN y.lim[1] - y.used[1] ELSE 2147483647 END AS messages,
                   CASE y.unit[1] WHEN 1 THEN y.lim[1] - y.used[1] ELSE 2147483647 END AS recipients,
                   CASE y.unit[1] WHEN 1 THEN y.lim[1] ELSE 2147483647 END AS largest, greatest(y.per[1] / 120, 250000) AS valid
            WHERE cardinality(y.lim) = 1 AND t / y.width[1] = y.head[1]
            UNION ALL
            SELECT false, f.* FROM rate_room(y, t) f WHERE NOT (cardinality(y.lim) = 1 AND t / y.width[1] = y.head[1])) q;
    p := cardinality(v_rows);
    v_gm := array_fill(0, ARRAY[p]); v_need := array_fill(1, ARRAY[p]); v_denied := array_fill(false, ARRAY[p]);
    v_gr := v_gm;
    FOR i IN 1 .. n LOOP
        c := p_costs[i];
        CONTINUE WHEN c = 0;
        IF p_accounts[i] IS DISTINCT FROM v_account OR p_tenants[i] IS DISTINCT FROM v_tenant THEN
            v_account := p_accounts[i]; v_tenant := p_tenants[i];
            v_pos := '{}'; v_most := 2147483647; v_until := NULL;
            FOREACH key IN ARRAY charged_keys(v_tenant, v_account) LOOP
                p := array_position(v_names, key);
                CONTINUE WHEN p IS NULL;
                v_pos := v_pos || p; v_most := least(v_most, v_largest[p]); v_until := least(v_until, v_valid[p]);
            END LOOP;
        END IF;
        CONTINUE WHEN v_until IS NULL;
        ok := true; shut := NULL; c := least(c, v_most); valid_us[i] := v_until;
        FOREACH p IN ARRAY v_pos LOOP
            IF v_shut[p] THEN
                ok := false; shut := greatest(shut, v_next[p]);
            ELSIF v_m[p] < 1 OR v_r[p] < c THEN
                ok := false;
                IF NOT v_denied[p] THEN
                    -- Nothing smaller overtakes: what does not fit blocks its key for the rest of this call.
                    v_denied[p] := true; v_need[p] := c; v_m[p] := 0;
                END IF;
            END IF;
        END LOOP;
        IF ok THEN
            granted[i] := c;
            FOREACH p IN ARRAY v_pos LOOP
                v_m[p] := v_m[p] - 1; v_r[p] := v_r[p] - c; v_gm[p] := v_gm[p] + 1; v_gr[p] := v_gr[p] + c;
            END LOOP;
        ELSE
            granted[i] := 0; next_us[i] := shut;
        END IF;
    END LOOP;
    UPDATE rate r SET
        ring[r.base[1] + (r.head[1] % r.size[1])::integer + 1] = r.ring[r.base[1] + (r.head[1] % r.size[1])::integer + 1]
            + CASE r.unit[1] WHEN 0 THEN u.m ELSE u.r END,
        used[1] = r.used[1] + CASE r.unit[1] WHEN 0 THEN u.m ELSE u.r END, last = t, next_at = 0
        FROM (SELECT q.key, q.m, q.r
              FROM unnest(v_names, v_still, v_denied, v_gm, v_gr) q(key, still, denied, m, r)
              WHERE q.still AND NOT q.denied AND q.m > 0) u
        WHERE r.key = u.key;
    FOR p IN 1 .. cardinality(v_rows) LOOP
        CONTINUE WHEN v_shut[p] OR NOT v_denied[p] AND (v_still[p] OR v_gm[p] = 0);
        v_row := rate_counted(v_rows[p], t, v_gm[p], v_gr[p], v_denied[p], v_need[p]);
        v_next[p] := v_row.next_at;
        v_counted := v_counted || v_row;
    END LOOP;
    IF v_counted <> '{}' THEN
        UPDATE rate r SET ring = u.ring, used = u.used, head = u.head, last = u.last, next_at = u.next_at
            FROM unnest(v_counted) u WHERE r.key = u.key;
    END IF;
    IF 0 = ANY (granted) THEN
        FOR i IN 1 .. n LOOP
            CONTINUE WHEN granted[i] > 0 OR p_costs[i] = 0;
            FOREACH key IN ARRAY charged_keys(p_tenants[i], p_accounts[i]) LOOP
                p := array_position(v_names, key);
                CONTINUE WHEN p IS NULL OR NOT (v_denied[p] OR v_shut[p]);
                next_us[i] := greatest(next_us[i], v_next[p]);
            END LOOP;
        END LOOP;
    END IF;
    RETURN NEXT;
END $$;

-- Gives slots back that never reached MAIL FROM: out of the very bucket they were counted in, if it still counts.
-- Returns the keys that were shut: their lanes are to be woken. The caller has locked the keys and read the slots after.
CREATE FUNCTION refund_slots(p_tenants text[], p_accounts text[], p_costs integer[], p_slots bigint[]) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    g record; r rate; l integer; i integer; b bigint; k integer; c integer; v_open text[] := '{}';
BEGIN
    FOR g IN SELECT u.k AS key, array_agg(x.c) AS costs, array_agg(x.s) AS slots
             FROM unnest(p_tenants, p_accounts, p_costs, p_slots) x(t, a, c, s), unnest(charged_keys(x.t, x.a)) u(k)
             WHERE x.s IS NOT NULL GROUP BY u.k ORDER BY u.k COLLATE "C" LOOP
        SELECT * INTO r FROM rate WHERE key = g.key FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        FOR l IN 1 .. array_length(r.lim, 1) LOOP
            FOR i IN 1 .. array_length(g.slots, 1) LOOP
                b := g.slots[i] / r.width[l];
                CONTINUE WHEN g.slots[i] < r.since[l] OR b > r.head[l] OR b <= r.head[l] - r.size[l];
                k := r.base[l] + (b % r.size[l])::integer + 1;
                c := least(CASE WHEN r.unit[l] = 0 THEN 1 ELSE g.costs[i] END, r.ring[k]);
                r.ring[k] := r.ring[k] - c;
                r.used[l] := r.used[l] - c;
            END LOOP;
        END LOOP;
        UPDATE rate SET ring = r.ring, used = r.used, next_at = 0 WHERE key = g.key;
        IF r.next_at > 0 THEN
            v_open := v_open || g.key;
        END IF;
    END LOOP;
    RETURN v_open;
END $$;

-- ── Health ───────────────────────────────────────────────────────────────────────────────────────────────────────

-- Whether one job may try an open account: the cooldown is over, or whoever tried last is dead or too late.
CREATE FUNCTION probe_due(h account_health) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT h.state = 1 AND h.until <= clock_timestamp()
        OR h.state = 2 AND (h.until <= clock_timestamp()
                            OR NOT EXISTS (SELECT FROM worker w WHERE w.epoch = h.epoch AND NOT w.dead))
$$;

-- When lanes of an account in trouble are looked at again. While a probe is under way every second: who is just looking
-- at a lane when the probe succeeds is passed over by the wake-up.
CREATE FUNCTION ill_until(h account_health) RETURNS timestamptz LANGUAGE sql VOLATILE AS $$
    SELECT CASE h.state WHEN 2 THEN least(h.until, clock_timestamp() + interval '1 second') ELSE h.until END
$$;

-- Makes the job under this claim the one probe of an account, if one is due. Waits for no lock.
CREATE FUNCTION take_probe(p_account text, p_epoch bigint, p_claim bigint) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    UPDATE account_health x SET state = 2, epoch = p_epoch, claim = p_claim, until = clock_timestamp() + interval '5 minutes'
        FROM (SELECT h.account FROM account_health h WHERE h.account = p_account AND probe_due(h)
              FOR UPDATE SKIP LOCKED) d
        WHERE x.account = d.account;
    RETURN FOUND;
END $$;

CREATE FUNCTION iso(t timestamptz) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$ SELECT to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') $$;

-- Owes an event about an account. Its id is that of report::event_id in the worker: a hash of tenant, kind, subject and
-- number, each behind its length.
CREATE FUNCTION owe_account_event(h account_health, p_type text, p_now timestamptz) RETURNS void LANGUAGE sql AS $$
    INSERT INTO account_event (event_id, tenant, type, body)
    SELECT 'evt_' || encode(substr(sha256(string_agg(int8send(octet_length(b.part)::bigint) || b.part, '' ORDER BY b.o)), 1, 16),
                            'hex'),
           split_part(h.account, '/', 1), p_type,
           json_build_object('type', p_type, 'timestamp', iso(p_now), 'data', json_strip_nulls(json_build_object(
               'tenant', split_part(h.account, '/', 1), 'account', split_part(h.account, '/', 2), 'since', iso(h.opened_at),
               'reason', CASE WHEN h.state > 0 THEN h.reason END, 'class', CASE WHEN h.state > 0 THEN h.class END,
               'detail', CASE WHEN h.state > 0 THEN h.detail END, 'faults', CASE WHEN h.state > 0 THEN h.faults END,
               'next_attempt_at', CASE WHEN h.state > 0 THEN iso(h.until) END)))::text
    FROM (SELECT convert_to(u.part, 'UTF8') AS part, u.o
          FROM unnest(ARRAY[split_part(h.account, '/', 1), 'account', split_part(h.account, '/', 2), h.event::text])
               WITH ORDINALITY u(part, o)) b
    ON CONFLICT (event_id) DO NOTHING
$$;

-- Whether one of these accounts is in trouble or was of late, or one of these claims a probe.
CREATE FUNCTION concerns_health(p_epoch bigint, p_claims bigint[], p_accounts text[]) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT true FROM account_health h WHERE h.account = ANY (p_accounts) AND (h.state > 0 OR h.faults > 0) LIMIT 1)
               IS NOT NULL
        OR (SELECT true FROM account_health h WHERE h.state = 2 AND h.epoch = p_epoch AND h.claim = ANY (p_claims) LIMIT 1)
               IS NOT NULL;
END $$;

-- What settled attempts say about their accounts: kind 1 the server works, 2 a fault of the account or its server, 0 nothing
-- (but the claim may have been a probe). While an account is open only its probe counts: what was under way when it opened
-- must neither prolong the cooldown nor end it. change: 1 opened, 2 recovered, 3 opened again, 4 a probe came to nothing.
CREATE FUNCTION note_health(p_epoch bigint, p_claims bigint[], p_leased timestamptz[], p_accounts text[], p_kinds smallint[],
                            p_classes text[], p_reasons text[], p_details text[], p_faults integer, p_cooldown bigint, p_cap bigint)
RETURNS TABLE (account text, change smallint, until_us bigint)
LANGUAGE plpgsql AS $$
DECLARE
    v_account text; h account_health; v_before account_health; e record; v_now timestamptz; v_probe boolean;
    v_wake text[] := '{}';
BEGIN
    FOR v_account IN
        SELECT q.k FROM (
            SELECT u.a AS k FROM unnest(p_accounts, p_kinds) u(a, k) WHERE u.k = 2
            UNION SELECT y.account FROM account_health y WHERE y.account = ANY (p_accounts) AND (y.state > 0 OR y.faults > 0)
            UNION SELECT y.account FROM account_health y WHERE y.state = 2 AND y.epoch = p_epoch AND y.claim = ANY (p_claims)) q
        ORDER BY q.k COLLATE "C"
    LOOP
        INSERT INTO account_health AS y (account) SELECT v_account
            WHERE EXISTS (SELECT FROM unnest(p_accounts, p_kinds) u(a, k) WHERE u.a = v_account AND u.k = 2)
            ON CONFLICT ON CONSTRAINT account_health_pkey DO NOTHING;
        SELECT * INTO h FROM account_health y WHERE y.account = v_account FOR UPDATE;
        CONTINUE WHEN NOT FOUND;
        v_before := h; v_now := clock_timestamp(); account := v_account;
        v_probe := h.state = 2 AND h.epoch = p_epoch AND h.claim = ANY (p_claims);
        FOR e IN SELECT * FROM unnest(p_claims, p_leased, p_accounts, p_kinds, p_classes, p_reasons, p_details)
                 WITH ORDINALITY u(claim, leased, acc, kind, class, reason, detail, o)
                 WHERE u.acc = v_account AND u.kind > 0 ORDER BY u.o LOOP
            IF h.state = 0 THEN
                CONTINUE WHEN e.kind = 2 AND e.leased < h.changed_at;
                h.faults := CASE e.kind WHEN 1 THEN 0 ELSE h.faults + 1 END;
            ELSIF h.state = 2 AND h.epoch = p_epoch AND h.claim = e.claim
                  OR h.state = 1 AND h.until <= v_now AND e.leased >= h.changed_at THEN
                h.faults := CASE e.kind WHEN 1 THEN 0 ELSE h.faults + 1 END;
                h.state := CASE e.kind WHEN 1 THEN 0 ELSE 2 END;
            ELSE
                CONTINUE;
            END IF;
            IF e.kind = 2 THEN
                h.class := e.class; h.reason := e.reason; h.detail := e.detail;
            END IF;
            IF h.faults > 0 AND (h.state = 2 OR h.faults >= p_faults) THEN
                h.openings := h.openings + 1;
                h.opened_at := coalesce(h.opened_at, v_now);
                -- 30: far above any cap, and no overflow
                h.until := v_now + least(p_cooldown * 2 ^ least(h.openings - 1, 30), p_cap) * (0.9 + 0.2 * random())
                                   * interval '1 microsecond';
                h.state := 1; h.epoch := NULL; h.claim := NULL; h.changed_at := v_now;
            ELSIF v_before.state > 0 AND h.state = 0 THEN
                h.openings := 0; h.epoch := NULL; h.claim := NULL; h.until := NULL; h.changed_at := v_now;
            END IF;
        END LOOP;
        IF v_probe AND h.state = 2 THEN
            -- It never came to the server: the next one may try.
            h.state := 1; h.until := v_now; h.epoch := NULL; h.claim := NULL;
        END IF;
        IF h.state = 0 AND h.faults = 0 AND h.changed_at = '-infinity' THEN
            DELETE FROM account_health y WHERE y.account = v_account;
            CONTINUE;
        END IF;
        CONTINUE WHEN h = v_before;
        change := CASE WHEN v_before.state = 0 AND h.state > 0 THEN 1 WHEN v_before.state > 0 AND h.state = 0 THEN 2
                       WHEN h.openings > v_before.openings THEN 3 WHEN v_before.state <> h.state THEN 4 ELSE 0 END;
        IF change IN (1, 2) THEN
            h.event := greatest(h.event + 1, micros(v_now));
            PERFORM owe_account_event(h, CASE change WHEN 1 THEN 'account.unhealthy' ELSE 'account.recovered' END, v_now);
        END IF;
        IF h.state = 0 THEN
            h.opened_at := NULL;
        END IF;
        UPDATE account_health y SET state = h.state, faults = h.faults, openings = h.openings, opened_at = h.opened_at,
            changed_at = h.changed_at, noted_at = v_now, until = h.until, epoch = h.epoch, claim = h.claim,
            class = h.class, reason = h.reason, detail = h.detail, event = h.event WHERE y.account = v_account;
        IF change > 0 THEN
            until_us := greatest(micros(h.until) - micros(v_now), 0);
            IF change IN (2, 4) THEN
                v_wake := v_wake || v_account;
            END IF;
            RETURN NEXT;
        END IF;
    END LOOP;
    PERFORM wake_lanes(v_wake, false);
END $$;

-- The account was changed: what is known of its health no longer holds. An open one is tried by the next job, at once.
CREATE FUNCTION reset_health_v1(p_account text) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM account_health h WHERE h.account = p_account) THEN
        RETURN;
    END IF;
    PERFORM wake_lanes(ARRAY[p_account], true);
    DELETE FROM account_health h WHERE h.account = p_account AND h.state = 0;
    UPDATE account_health h SET state = 1, openings = 0, until = clock_timestamp(), changed_at = clock_timestamp(),
        epoch = NULL, claim = NULL WHERE h.account = p_account;
END $$;

-- Events that are owed, leased to the caller for a while.
CREATE FUNCTION owed_account_events_v1(p_max integer, p_hold interval)
RETURNS TABLE (event_id text, tenant text, type text, body text)
LANGUAGE sql SET search_path FROM CURRENT AS $$
    WITH mine AS (
        UPDATE account_event x SET next_at = clock_timestamp() + p_hold
        FROM (SELECT y.event_id FROM account_event y WHERE y.next_at <= clock_timestamp()
              ORDER BY y.created_at LIMIT p_max FOR UPDATE SKIP LOCKED) o
        WHERE x.event_id = o.event_id
        RETURNING x.*)
    SELECT m.event_id, m.tenant, m.type, m.body FROM mine m ORDER BY m.created_at
$$;

-- ── Admission ────────────────────────────────────────────────────────────────────────────────────────────────────

-- verdict: 1 go, 2 wait (leased, to be parked with its body), 3 in flight elsewhere, 4 waiting already, 5 done,
--          6 other content under this id, 7 held as uncertain, 8 go, but others wait in front, 9 expired, 10 cancelled
-- granted = 0 with verdict 1 or 8: the slot is still to be taken.
-- p_want: 0 claim only, 1 with a slot, 2 to be parked because its account is busy
-- p_detour: it need not wait for an account in trouble: the platform may send it
-- p_replay: an operator took it out of the dead letters
-- ill_us: its account is in trouble, for so long; probe: it is the one that may try it all the same
CREATE FUNCTION admit_v1(
    p_epoch bigint, p_claims bigint[], p_tenants text[], p_ids text[], p_levels smallint[], p_accounts text[],
    p_costs integer[], p_digests bytea[], p_send_at timestamptz[], p_expires_at timestamptz[], p_want smallint[],
    p_batches text[], p_detour boolean[], p_replay boolean[])
RETURNS TABLE (idx integer, verdict smallint, born bigint, seq bigint, attempt integer, created_us bigint,
               granted integer, slot_us bigint, valid_us bigint, wait_us bigint, reason smallint,
               recipients jsonb, message_id text, uncertain integer, crashes integer, deaths integer, ill_us bigint,
               probe boolean)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    n integer := coalesce(array_length(p_ids, 1), 0);
    v_now timestamptz := clock_timestamp(); v_us bigint; v_born bigint;
    -- nothing but a limit keeps a new job from going
    v_plain boolean; v_others boolean; v_opens bigint;
    -- per job: known already; granted and until when; when it may go
    v_known boolean[]; v_granted integer[]; v_valid bigint[]; v_wait bigint[]; v_verdict smallint[]; v_reason smallint[];
    v_ask integer[]; v_ill bigint[] := array_fill(NULL::bigint, ARRAY[n]);
    -- claims of the jobs entered here
    v_plain_claims bigint[] := '{}'; v_claims bigint[] := '{}';
    s record; j record; i integer; lost integer[]; v_own boolean; v_is_ill boolean;
BEGIN
    v_us := micros(v_now);
    -- One of the accounts in trouble; others in front; when the limits open, null without limits.
    SELECT EXISTS (SELECT FROM account_health h WHERE h.state > 0 OR h.faults > 0)
               AND (SELECT true FROM account_health h WHERE h.account = ANY (p_accounts) AND h.state > 0 LIMIT 1) IS NOT NULL,
           EXISTS (SELECT FROM (SELECT DISTINCT u.a FROM unnest(p_accounts) u(a)) d
                   WHERE (SELECT true FROM lane y WHERE y.account = d.a AND y.fifo > 0 LIMIT 1)),
           (SELECT max(z.next_at) FROM rate z WHERE z.key = ANY (ARRAY(SELECT unnest(charged_keys(d.t, d.a))
                FROM (SELECT DISTINCT u.t, u.a FROM unnest(p_tenants, p_accounts) u(t, a)) d)))
        INTO v_is_ill, v_others, v_opens;
    -- Most batches: nothing is asked for, and nothing known, that keeps a new job from going.
    v_plain := NOT v_is_ill AND NOT v_others AND 2 <> ALL (p_want);
    IF v_plain AND (array_remove(p_send_at, NULL) <> '{}' OR array_remove(p_expires_at, NULL) <> '{}') THEN
        v_plain := NOT EXISTS (SELECT FROM unnest(p_send_at, p_expires_at) u(sa, ea) WHERE u.sa > v_now OR u.ea <= v_now);
    END IF;
    IF v_plain AND v_opens IS NULL THEN
        v_born := floor(extract(epoch FROM v_now))::bigint * 1000;
        WITH made AS (
            INSERT INTO job AS x (tenant, id, state, level, account, digest, born, seq, epoch, claim, leased_at,
                                  expires_at, batch, created_at, updated_at)
            SELECT u.t, u.id, 1, u.l, u.a, u.d, v_born, v_born, p_epoch, u.c, v_now, u.ea, u.b, v_now, v_now
            FROM unnest(p_tenants, p_ids, p_levels, p_accounts, p_digests, p_claims, p_expires_at, p_batches)
                 u(t, id, l, a, d, c, ea, b)
            ORDER BY u.t COLLATE "C", u.id COLLATE "C"
            ON CONFLICT ON CONSTRAINT job_pkey DO NOTHING
            RETURNING x.claim)
        SELECT coalesce(array_agg(m.claim), '{}') INTO v_plain_claims FROM made m;
        RETURN QUERY SELECT q.p - 1, 1::smallint, v_born, v_born, 0, micros(v_now), p_costs[q.p] * p_want[q.p],
            NULL::bigint, NULL::bigint, NULL::bigint, NULL::smallint, NULL::jsonb, NULL::text, 0, 0, 0,
            NULL::bigint, false
            FROM (SELECT array_position(p_claims, m.claim) AS p FROM unnest(v_plain_claims) m(claim)) q;
        IF cardinality(v_plain_claims) = n THEN
            RETURN;
        END IF;
    END IF;
    IF v_is_ill THEN
        SELECT array_agg((SELECT greatest(micros(ill_until(h)) - micros(v_now), 0) FROM account_health h
                          WHERE h.account = u.a AND h.state > 0) ORDER BY u.o)
            INTO v_ill FROM unnest(p_accounts) WITH ORDINALITY u(a, o);
    END IF;
    -- what: 0 known, 1 over a limit, 3 for later, 4 its account is busy, 7 its account is in trouble (these are the reasons to
    -- wait), 8 others wait in front, 9 expired, 10 it may become the probe or take a detour, without a slot; 11 go.
    -- OFFSET 0: what was looked up is not to be looked up again wherever it is named.
    IF v_plain AND v_opens <= v_us AND 1 = ALL (p_want) THEN
        -- Slots decide; what turns out to be known gives its own back.
        v_known := array_fill(false, ARRAY[n]); v_verdict := array_fill(1::smallint, ARRAY[n]);
        v_reason := array_fill(NULL::smallint, ARRAY[n]); v_wait := array_fill(NULL::bigint, ARRAY[n]);
        v_ask := p_costs;
    ELSE
        SELECT array_agg(e.what = 0 ORDER BY e.o),
               array_agg(CASE WHEN e.what IN (8, 9) THEN e.what WHEN e.what IN (1, 3, 4, 7) THEN 2 ELSE 1 END::smallint ORDER BY e.o),
               array_agg(CASE WHEN e.what IN (1, 3, 4, 7) THEN e.what END::smallint ORDER BY e.o),
               array_agg(CASE e.what WHEN 1 THEN e.shut - v_us WHEN 3 THEN micros(e.sa) - v_us WHEN 4 THEN 0 WHEN 7 THEN e.ill END
                         ORDER BY e.o),
               array_agg(CASE WHEN e.what = 11 AND e.w = 1 THEN e.cost ELSE 0 END ORDER BY e.o)
            INTO v_known, v_verdict, v_reason, v_wait, v_ask
        FROM (SELECT d.*,
                     CASE WHEN d.known THEN 0 WHEN d.ea <= v_now THEN 9 WHEN d.sa > v_now THEN 3
                          WHEN d.ill IS NOT NULL THEN CASE d.w WHEN 2 THEN 7 ELSE 10 END
                          WHEN d.shut > v_us THEN 1 WHEN d.w = 2 THEN 4 WHEN d.behind THEN 8 ELSE 11 END AS what
              FROM (SELECT u.*,
                           (SELECT true FROM job x WHERE x.tenant = u.t AND x.id = u.id) IS NOT NULL AS known,
                           (SELECT true FROM lane y WHERE y.account = u.a AND y.level <= u.l AND y.fifo > 0 LIMIT 1)
                               IS NOT NULL AS behind,
                           (SELECT max(z.next_at) FROM rate z WHERE z.key = ANY (charged_keys(u.t, u.a))) AS shut
                    FROM unnest(p_tenants, p_ids, p_accounts, p_levels, p_costs, p_send_at, p_expires_at, p_want, v_ill)
                         WITH ORDINALITY u(t, id, a, l, cost, sa, ea, w, ill, o) OFFSET 0) d OFFSET 0) e;
    END IF;
    v_granted := v_ask; v_valid := v_ill;
    IF 0 < ANY (v_ask) THEN
        SELECT g.granted, g.slot_us, g.valid_us, g.next_us INTO s FROM take_slots(p_tenants, p_accounts, v_ask) g;
        v_granted := s.granted; v_valid := s.valid_us;
        IF 0 = ANY (s.granted) THEN
            FOR i IN 1 .. n LOOP
                CONTINUE WHEN v_ask[i] = 0 OR s.granted[i] > 0;
                v_verdict[i] := 2; v_reason[i] := 1; v_valid[i] := NULL;
                v_wait[i] := greatest(s.next_us[i] - s.slot_us, 0);
            END LOOP;
        END IF;
    ELSE
        SELECT NULL::bigint AS slot_us INTO s;
        v_valid := array_fill(NULL::bigint, ARRAY[n]);
    END IF;
    v_now := clock_timestamp();
    v_born := floor(extract(epoch FROM v_now))::bigint * 1000;
    WITH made AS (
        INSERT INTO job AS x (tenant, id, state, level, account, digest, born, seq, epoch, claim, leased_at,
                              slot_at, slot_cost, expires_at, batch, created_at, updated_at)
        SELECT u.t, u.id, 1, u.l, u.a, u.d, v_born, v_born, p_epoch, u.c, v_now, CASE WHEN u.v IS NOT NULL THEN s.slot_us END,
               CASE WHEN u.v IS NOT NULL THEN u.g END, u.ea, u.b, v_now, v_now
        FROM unnest(p_tenants, p_ids, p_levels, p_accounts, p_digests, p_claims, v_valid, v_granted, v_known, p_expires_at,
                    p_batches) u(t, id, l, a, d, c, v, g, k, ea, b)
        WHERE NOT u.k
        ORDER BY u.t COLLATE "C", u.id COLLATE "C"
        ON CONFLICT ON CONSTRAINT job_pkey DO NOTHING
        RETURNING x.claim)
    SELECT coalesce(array_agg(m.claim), '{}') INTO v_claims FROM made m;
    IF cardinality(v_claims) < n THEN
        -- Somebody else was faster: what was granted goes back.
        SELECT array_agg(q.o::integer) INTO lost FROM unnest(p_claims, v_valid) WITH ORDINALITY q(c, v, o)
            WHERE q.v IS NOT NULL AND q.c <> ALL (v_claims);
        IF lost IS NOT NULL THEN
            PERFORM wake_lanes(refund_slots((SELECT array_agg(p_tenants[l]) FROM unnest(lost) l),
                                            (SELECT array_agg(p_accounts[l]) FROM unnest(lost) l),
                                            (SELECT array_agg(v_granted[l]) FROM unnest(lost) l),
                                            (SELECT array_agg(s.slot_us) FROM unnest(lost) l)), false);
        END IF;
        FOR j IN
            SELECT x.tenant, x.id, x.state, x.epoch, x.claim, x.digest, x.cancel, x.born, x.seq, x.attempt, x.created_at,
                   x.recipients, x.message_id, x.uncertain, x.crashes, x.deaths,
                   (u.o - 1)::integer AS idx0, u.c AS my_claim, u.d AS my_digest, u.sa, u.ea, u.wa,
                   x.state = 6 AND u.re AS anew
            FROM job x JOIN unnest(p_tenants, p_ids, p_claims, p_digests, p_send_at, p_expires_at, p_want, p_replay)
                 WITH ORDINALITY u(t, id, c, d, sa, ea, wa, re, o) ON x.tenant = u.t AND x.id = u.id
            WHERE u.c <> ALL (v_claims) AND u.c <> ALL (v_plain_claims)
            ORDER BY x.tenant, x.id
            FOR UPDATE OF x
        LOOP
            idx := j.idx0; born := j.born; seq := j.seq; attempt := j.attempt; created_us := micros(j.created_at);
            granted := 0; slot_us := NULL; valid_us := NULL; wait_us := NULL; reason := NULL; recipients := j.recipients;
            message_id := j.message_id; uncertain := j.uncertain; crashes := j.crashes; deaths := j.deaths;
            ill_us := v_ill[j.idx0 + 1]; probe := false;
            -- this very statement, repeated after a lost COMMIT; a slot that it was granted goes back when one is taken
            v_own := j.state = 1 AND j.epoch = p_epoch AND j.claim = j.my_claim;
            IF j.digest <> j.my_digest AND j.state <> 5 AND NOT coalesce(v_own, false) THEN
                verdict := 6;
            ELSIF v_own OR j.state IN (0, 5) OR j.anew THEN
                verdict := CASE WHEN j.cancel OR j.state = 5 THEN 10 WHEN j.ea <= v_now THEN 9 WHEN j.sa > v_now THEN 2
                                WHEN j.wa = 2 THEN 2 ELSE 1 END;
                IF verdict = 2 THEN
                    reason := CASE WHEN j.sa > v_now THEN 3 WHEN ill_us IS NOT NULL THEN 7 ELSE 4 END;
                    wait_us := CASE reason WHEN 7 THEN ill_us ELSE greatest(micros(j.sa) - micros(v_now), 0) END;
                ELSIF verdict = 1 AND ill_us IS NOT NULL AND NOT p_detour[j.idx0 + 1] THEN
                    verdict := 2; reason := 7; wait_us := ill_us;
                END IF;
                IF j.anew THEN
                    attempt := 0; crashes := 0; deaths := 0; uncertain := 0; created_us := micros(v_now);
                    UPDATE job x SET attempt = 0, tried_at = NULL, crashes = 0, deaths = 0, uncertain = 0, created_at = v_now, outcome = NULL,
                        properties = NULL, finished_at = NULL WHERE x.tenant = j.tenant AND x.id = j.id;
                END IF;
                IF NOT coalesce(v_own, false) THEN
                    UPDATE job x SET state = 1, epoch = p_epoch, claim = j.my_claim, leased_at = v_now, phase = 0,
                        cancel = verdict = 10, merged = false, digest = j.my_digest, account = p_accounts[j.idx0 + 1],
                        level = p_levels[j.idx0 + 1], slot_at = NULL, slot_cost = NULL, expires_at = j.ea,
                        batch = coalesce(x.batch, p_batches[j.idx0 + 1]), updated_at = v_now
                        WHERE x.tenant = j.tenant AND x.id = j.id;
                END IF;
            ELSE
                verdict := CASE j.state WHEN 1 THEN 3 WHEN 2 THEN 4 WHEN 3 THEN 5 WHEN 6 THEN 5 ELSE 7 END;
            END IF;
            RETURN NEXT;
        END LOOP;
    END IF;
    -- Last, behind all locks that are waited for: probes.
    IF v_is_ill THEN
        FOR i IN 1 .. n LOOP
            CONTINUE WHEN p_claims[i] <> ALL (v_claims);
            idx := i - 1; verdict := v_verdict[i]; born := v_born; seq := born;
            attempt := 0; created_us := micros(v_now); granted := v_granted[i];
            slot_us := CASE WHEN v_valid[i] IS NOT NULL THEN s.slot_us END;
            valid_us := v_valid[i]; wait_us := v_wait[i]; reason := v_reason[i]; recipients := NULL; message_id := NULL;
            uncertain := 0; crashes := 0; deaths := 0; ill_us := v_ill[i]; probe := false;
            IF verdict = 1 AND ill_us IS NOT NULL THEN
                probe := take_probe(p_accounts[i], p_epoch, p_claims[i]);
                IF NOT probe AND NOT p_detour[i] THEN
                    verdict := 2; reason := 7; wait_us := ill_us;
                END IF;
            END IF;
            RETURN NEXT;
        END LOOP;
    ELSE
        RETURN QUERY SELECT (u.o - 1)::integer, u.verdict, v_born, v_born, 0, micros(v_now), u.granted,
            CASE WHEN u.v IS NOT NULL THEN s.slot_us END, u.v, u.wait, u.reason, NULL::jsonb, NULL::text, 0, 0, 0,
            NULL::bigint, false
            FROM unnest(p_claims, v_verdict, v_granted, v_valid, v_wait, v_reason)
                 WITH ORDINALITY u(c, verdict, granted, v, wait, reason, o)
            WHERE cardinality(v_claims) = n OR u.c = ANY (v_claims);
    END IF;
END $$;

-- Takes (or takes anew) the slots of jobs that are leased, on the account that will really send; an older slot of the
-- same job is given back first, unless it was used (p_keep). granted = 0: denied, wait_us says when to come again;
-- -1: the lease is lost.
CREATE FUNCTION slots_v1(p_epoch bigint, p_tenants text[], p_ids text[], p_claims bigint[], p_accounts text[],
                         p_costs integer[], p_keep boolean[])
RETURNS TABLE (idx integer, granted integer, valid_us bigint, wait_us bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    s record; o record; i integer; n integer; k integer := 0; v_open text[] := '{}'; v_ours boolean[];
    v_t text[]; v_a text[]; v_c integer[];
BEGIN
    -- All keys of the old and the new slots in one go, in order; then the jobs.
    PERFORM 1 FROM rate WHERE key = ANY (ARRAY(
        SELECT unnest(charged_keys(x.tenant, x.account))
            FROM unnest(p_tenants, p_ids) u(t, id) JOIN job x ON x.tenant = u.t AND x.id = u.id WHERE x.slot_at IS NOT NULL
        UNION SELECT unnest(charged_keys(u.t, u.a)) FROM unnest(p_tenants, p_accounts) u(t, a)))
        ORDER BY key FOR UPDATE;
    SELECT array_agg(q.ours ORDER BY q.o) AS ours,
           array_agg(q.tenant) FILTER (WHERE q.old) AS t, array_agg(q.account) FILTER (WHERE q.old) AS a,
           array_agg(q.slot_cost) FILTER (WHERE q.old) AS c, array_agg(q.slot_at) FILTER (WHERE q.old) AS s
        INTO o
        FROM (SELECT r.*, r.ours AND NOT r.k AND r.slot_at IS NOT NULL AS old
              FROM (SELECT u.o, u.k, x.tenant, x.account, x.slot_cost, x.slot_at,
                           coalesce(x.state = 1 AND x.epoch = p_epoch AND x.claim = u.c, false) AS ours
                    FROM job x JOIN unnest(p_tenants, p_ids, p_claims, p_keep) WITH ORDINALITY u(t, id, c, k, o)
                         ON x.tenant = u.t AND x.id = u.id
                    ORDER BY x.tenant, x.id FOR UPDATE OF x) r
              UNION ALL
              SELECT u.o, NULL, NULL, NULL, NULL, NULL, false, false FROM unnest(p_tenants, p_ids) WITH ORDINALITY u(t, id, o)
              WHERE NOT EXISTS (SELECT FROM job x WHERE x.tenant = u.t AND x.id = u.id)) q;
    IF o.t IS NOT NULL THEN
        v_open := refund_slots(o.t, o.a, o.c, o.s);
    END IF;
    v_ours := o.ours;
    SELECT array_agg(u.t ORDER BY u.o), array_agg(u.a ORDER BY u.o), array_agg(u.c ORDER BY u.o) INTO v_t, v_a, v_c
        FROM unnest(p_tenants, p_accounts, p_costs, v_ours) WITH ORDINALITY u(t, a, c, w, o) WHERE u.w;
    IF v_t IS NOT NULL THEN
        SELECT g.granted, g.slot_us, g.valid_us, g.next_us INTO s FROM take_slots(v_t, v_a, v_c) g;
        UPDATE job x SET account = u.a,
            slot_at = CASE WHEN u.g > 0 AND u.v IS NOT NULL THEN s.slot_us END,
            slot_cost = CASE WHEN u.g > 0 AND u.v IS NOT NULL THEN u.g END
            FROM (SELECT q.t, q.id, q.a, s.granted[q.n] AS g, s.valid_us[q.n] AS v
                  FROM (SELECT p.t, p.id, p.a, row_number() OVER (ORDER BY p.o)::integer AS n
                        FROM unnest(p_tenants, p_ids, p_accounts, v_ours) WITH ORDINALITY p(t, id, a, w, o) WHERE p.w) q) u
            WHERE x.tenant = u.t AND x.id = u.id;
    END IF;
    FOR i IN 1 .. array_length(p_ids, 1) LOOP
        idx := i - 1; granted := -1; valid_us := NULL; wait_us := NULL;
        IF v_ours[i] THEN
            k := k + 1;
            granted := s.granted[k]; valid_us := s.valid_us[k];
            wait_us := CASE WHEN granted > 0 THEN NULL ELSE greatest(s.next_us[k] - s.slot_us, 0) END;
        END IF;
        RETURN NEXT;
    END LOOP;
    PERFORM wake_lanes(v_open, false);
END $$;

-- The results p_known, one per recipient, with the acceptances among p_told in their places: what a server has taken is true,
-- whoever was told.
CREATE FUNCTION with_acceptances(p_known jsonb, p_told jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(jsonb_agg(coalesce(t.r, k.r) ORDER BY k.o), p_known)
    FROM jsonb_array_elements(p_known) WITH ORDINALITY k(r, o)
    LEFT JOIN LATERAL (SELECT a.r FROM jsonb_array_elements(p_told) a(r)
                       WHERE a.r->>'address' = k.r->>'address' AND a.r->>'status' = 'accepted' LIMIT 1) t ON true
$$;

-- Marks, for jobs with on_uncertain = hold, that the write that may end the message begins now, and notes to whom, under
-- which Message-ID: whoever decides about it has to find it in the server's log. Returns whose lease still stands.
CREATE FUNCTION mark_data_v1(p_epoch bigint, p_tenants text[], p_ids text[], p_claims bigint[], p_recipients text[],
                             p_message_ids text[])
RETURNS TABLE (idx integer)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    RETURN QUERY
    UPDATE job x SET phase = 1, leased_at = clock_timestamp(),
        -- What an earlier owner's server took is not overwritten by one who does not know of it.
        recipients = CASE WHEN x.merged THEN with_acceptances(coalesce(u.rc::jsonb, x.recipients), x.recipients)
                          ELSE coalesce(u.rc::jsonb, x.recipients) END,
        message_id = coalesce(u.mid, x.message_id)
    FROM (SELECT * FROM unnest(p_tenants, p_ids, p_claims, p_recipients, p_message_ids)
              WITH ORDINALITY q(t, id, c, rc, mid, o)
          ORDER BY q.t COLLATE "C", q.id COLLATE "C") u
    WHERE x.tenant = u.t AND x.id = u.id AND x.state IS NOT DISTINCT FROM 1
      AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = u.c
    RETURNING (u.o - 1)::integer;
END $$;

-- Says that work on the content of a suspect begins (or is over): a worker that dies in between died of it. Whether its
-- lease still stands.
CREATE FUNCTION mark_suspect_v1(p_epoch bigint, p_tenant text, p_id text, p_claim bigint, p_marked boolean) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE job x SET marked = p_marked WHERE x.tenant = p_tenant AND x.id = p_id AND x.state IS NOT DISTINCT FROM 1
        AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = p_claim;
    RETURN FOUND;
END $$;

-- Stores the body of jobs that are in flight elsewhere, so that their delivery can be acknowledged. Fills only what
-- is missing; a row that went on meanwhile needs nothing. Returns the jobs whose body is now safe (or not needed).
CREATE FUNCTION absorb_v1(p_tenants text[], p_ids text[], p_bodies bytea[], p_properties text[])
RETURNS TABLE (idx integer)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    j record;
BEGIN
    FOR j IN
        SELECT x.tenant, x.id, x.state, x.body IS NULL AS empty, u.b, u.p, (u.o - 1)::integer AS i
        FROM job x JOIN unnest(p_tenants, p_ids, p_bodies, p_properties) WITH ORDINALITY u(t, id, b, p, o)
             ON x.tenant = u.t AND x.id = u.id
        ORDER BY x.tenant, x.id FOR UPDATE OF x
    LOOP
        IF j.state = 0 THEN
            CONTINUE;   -- given back meanwhile: the delivery in hand is the job
        END IF;
        IF j.state IN (1, 4) AND j.empty THEN
            UPDATE job x SET body = j.b, body_size = octet_length(j.b), properties = j.p::jsonb
                WHERE x.tenant = j.tenant AND x.id = j.id;
        END IF;
        idx := j.i;
        RETURN NEXT;
    END LOOP;
END $$;

-- ── Settlement ───────────────────────────────────────────────────────────────────────────────────────────────────

-- kind: 1 done, 2 park, 3 give back, 4 hold as uncertain
-- answer: 1 written, 2 lease lost, 3 a cancel came in between: settle it as cancelled
-- p_reason: 1 rate, 2 retry, 3 schedule, 4 busy, 5 contract (a newer one), 6 key, 7 unhealthy
-- p_accounts: the account it waits for, where that is another than before
-- report: its number in the outbox. Of what is rarely there (p_refund, p_delay_us … p_accounts) an array may be empty.
-- p_h_*: what attempts say about the health of accounts, each with the place of its job; see note_health. Its changes come
-- as rows with idx -1. p_faults faults in a row open an account, for p_cooldown µs, doubling up to p_cap.
CREATE FUNCTION settle_v1(
    p_epoch bigint, p_tenants text[], p_ids text[], p_claims bigint[], p_kinds smallint[], p_outcomes text[],
    p_attempts integer[], p_recipients text[], p_message_ids text[], p_reports text[], p_seqs bigint[],
    p_refund boolean[], p_delay_us bigint[], p_reasons smallint[], p_bodies bytea[], p_properties text[],
    p_errors text[], p_uncertain smallint[], p_crashed smallint[], p_accounts text[],
    p_h_places integer[], p_h_accounts text[], p_h_kinds smallint[], p_h_classes text[], p_h_reasons text[],
    p_h_details text[], p_faults integer, p_cooldown bigint, p_cap bigint)
RETURNS TABLE (idx integer, answer smallint, report bigint, account text, change smallint, until_us bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz; o record; j record; i integer; v_open text[];
    -- What was written: its places, the numbers of its reports, when it was leased; and what waits now.
    v_o integer[]; v_n bigint[]; v_l timestamptz[]; v_t text[]; v_i text[];
BEGIN
    IF true = ANY (p_refund) THEN
        PERFORM 1 FROM rate WHERE key = ANY (ARRAY(
            SELECT unnest(charged_keys(x.tenant, x.account))
                FROM unnest(p_tenants, p_ids, p_refund) u(t, id, r) JOIN job x ON x.tenant = u.t AND x.id = u.id
                WHERE u.r AND x.slot_at IS NOT NULL))
            ORDER BY key FOR UPDATE;
        -- The slots are read behind the locks: another copy of this very statement may have given them back.
        -- All rows are locked here, in order: a WHERE outside would move in and lock some of them first.
        SELECT array_agg(q.tenant) FILTER (WHERE q.back) AS t, array_agg(q.account) FILTER (WHERE q.back) AS a,
               array_agg(q.slot_cost) FILTER (WHERE q.back) AS c, array_agg(q.slot_at) FILTER (WHERE q.back) AS s INTO o
            FROM (SELECT x.tenant, x.account, x.slot_cost, x.slot_at,
                         u.r AND x.state = 1 AND x.epoch = p_epoch AND x.claim = u.c AND x.slot_at IS NOT NULL
                         -- One that a cancel refuses keeps its slot, and gives it back when it is settled as cancelled.
                         AND (x.merged OR NOT (x.cancel AND u.k IN (2, 3))) AS back
                  FROM job x JOIN unnest(p_tenants, p_ids, p_claims, p_refund, p_kinds) u(t, id, c, r, k)
                       ON x.tenant = u.t AND x.id = u.id
                  ORDER BY x.tenant, x.id FOR UPDATE OF x) q;
        IF o.t IS NOT NULL THEN
            v_open := refund_slots(o.t, o.a, o.c, o.s);
        END IF;
    END IF;
    v_now := clock_timestamp();
    WITH hit AS (
        UPDATE job x SET
            state = CASE u.k WHEN 1 THEN 3 WHEN 2 THEN 2 WHEN 4 THEN 4
                             ELSE CASE WHEN coalesce(x.body, u.body) IS NULL THEN 0 ELSE 2 END END,
            phase = 0, slot_at = NULL, slot_cost = NULL,
            attempt = coalesce(u.at, x.attempt),
            tried_at = CASE WHEN u.k = 2 AND u.rs = 2 THEN coalesce(x.tried_at, v_now) ELSE x.tried_at END,
            marked = false,
            account = coalesce(u.ac, x.account),
            uncertain = x.uncertain + coalesce(u.un, 0),
            crashes = x.crashes + coalesce(u.cr, 0),
            seq = coalesce(u.sq, x.seq),
            report = CASE WHEN u.rp IS NULL THEN x.report ELSE nextval('outbox_n_seq') END,
            -- Who has the mail through an earlier owner stays known, and who has it through this one.
            recipients = CASE WHEN x.merged THEN with_acceptances(coalesce(u.rc::jsonb, x.recipients), x.recipients)
                              ELSE coalesce(u.rc::jsonb, x.recipients) END,
            message_id = coalesce(u.mid, x.message_id), merged = false,
            body = CASE WHEN u.k = 1 THEN NULL ELSE coalesce(x.body, u.body) END,
            body_size = CASE WHEN u.k = 1 THEN NULL ELSE coalesce(x.body_size, octet_length(u.body)) END,
            properties = coalesce(x.properties, u.pr::jsonb),
            -- Over a limit, or behind an open account, it may go at any time, in its old place: the lane knows when to look.
            due_at = CASE WHEN u.k = 1 THEN NULL WHEN u.k = 3 OR u.rs IN (1, 7) THEN least(x.due_at, v_now)
                          ELSE v_now + coalesce(u.dl, 0) * interval '1 microsecond' END,
            reason = CASE WHEN u.k = 2 THEN u.rs WHEN u.k = 3 THEN coalesce(x.reason, 4::smallint) END,
            outcome = CASE WHEN u.k = 1 THEN u.oc END,
            last_error = coalesce(u.er, x.last_error),
            finished_at = CASE WHEN u.k = 1 THEN v_now END,
            updated_at = v_now
        FROM (SELECT * FROM unnest(p_tenants, p_ids, p_claims, p_kinds, p_outcomes, p_attempts, p_recipients,
                    p_message_ids, p_reports, p_seqs, p_delay_us, p_reasons, p_bodies, p_properties, p_errors,
                    p_uncertain, p_crashed, p_accounts)
                  WITH ORDINALITY q(t, id, c, k, oc, at, rc, mid, rp, sq, dl, rs, body, pr, er, un, cr, ac, o)
              ORDER BY q.t COLLATE "C", q.id COLLATE "C") u
        WHERE x.tenant = u.t AND x.id = u.id AND x.state IS NOT DISTINCT FROM 1
          AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = u.c
          -- What may have been sent is not begun anew, whatever was merged.
          AND (NOT x.merged OR u.k = 4) AND NOT (x.cancel AND u.k IN (2, 3))
        RETURNING u.o::integer AS o, x.tenant, x.id, x.state, x.leased_at, x.seq, u.rp,
                  CASE WHEN u.rp IS NOT NULL THEN x.report END AS n
    ), owed AS (
        INSERT INTO outbox (n, tenant, id, seq, epoch, due_at, created_at, body)
        SELECT h.n, h.tenant, h.id, h.seq, p_epoch, v_now + interval '30 seconds', v_now, h.rp
        FROM hit h WHERE h.rp IS NOT NULL
    )
    SELECT array_agg(h.o), array_agg(h.n), array_agg(h.leased_at),
           array_agg(h.tenant) FILTER (WHERE h.state = 2), array_agg(h.id) FILTER (WHERE h.state = 2)
        INTO v_o, v_n, v_l, v_t, v_i FROM hit h;
    RETURN QUERY SELECT u.o - 1, 1::smallint, u.n, NULL::text, NULL::smallint, NULL::bigint FROM unnest(v_o, v_n) u(o, n);
    IF cardinality(v_o) IS DISTINCT FROM cardinality(p_ids) THEN
        FOR i IN 1 .. cardinality(p_ids) LOOP
            CONTINUE WHEN i = ANY (v_o);
            -- Decided without knowing what an earlier owner had brought about: nobody is sending now, so it begins anew
            -- with what is still open. Its own acceptances are true all the same, and it may die before it brings them.
            UPDATE job x SET state = CASE WHEN x.body IS NULL THEN 0 ELSE 2 END, claim = NULL, phase = 0, merged = false,
                recipients = with_acceptances(x.recipients, p_recipients[i]::jsonb),
                marked = false, due_at = least(x.due_at, v_now), reason = 2, slot_at = NULL, slot_cost = NULL, updated_at = v_now
                WHERE x.tenant = p_tenants[i] AND x.id = p_ids[i] AND x.state IS NOT DISTINCT FROM 1
                  AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = p_claims[i] AND x.merged;
            IF FOUND THEN
                v_t := v_t || p_tenants[i]; v_i := v_i || p_ids[i];
            END IF;
            idx := i - 1;
            SELECT CASE WHEN x.state = 1 AND x.epoch = p_epoch AND x.claim = p_claims[i] THEN 3
                        -- this very settlement, repeated after a lost COMMIT
                        WHEN x.epoch = p_epoch AND x.claim = p_claims[i] AND x.state <> 1
                             AND x.seq >= coalesce(p_seqs[i], x.seq) THEN 1
                        ELSE 2 END,
                   CASE WHEN x.seq = p_seqs[i] THEN x.report END INTO answer, report
                FROM job x WHERE x.tenant = p_tenants[i] AND x.id = p_ids[i];
            answer := coalesce(answer, 2);
            IF answer <> 1 THEN
                report := NULL;
            END IF;
            RETURN NEXT;
        END LOOP;
        report := NULL;
    END IF;
    IF v_t IS NOT NULL THEN
        PERFORM touch_lanes(v_t, v_i);
    END IF;
    IF cardinality(v_open) > 0 THEN
        PERFORM wake_lanes(v_open, false);
    END IF;
    IF v_o IS NOT NULL AND (2 = ANY (p_h_kinds) OR EXISTS (SELECT FROM account_health h WHERE h.state > 0 OR h.faults > 0)
                                                   AND concerns_health(p_epoch, p_claims, p_h_accounts)) THEN
        FOR j IN
            SELECT n.* FROM (
                SELECT array_agg(p_claims[q.p] ORDER BY q.p, q.o) AS c, array_agg(q.l ORDER BY q.p, q.o) AS l,
                       array_agg(q.a ORDER BY q.p, q.o) AS a, array_agg(q.k ORDER BY q.p, q.o) AS k,
                       array_agg(q.cl ORDER BY q.p, q.o) AS cl, array_agg(q.r ORDER BY q.p, q.o) AS r,
                       array_agg(q.d ORDER BY q.p, q.o) AS d
                -- What this call has written, and only that: a statement that comes twice counts once.
                FROM (SELECT w.p, w.l, u.a, u.k, u.cl, u.r, u.d, u.o
                      FROM unnest(p_h_places, p_h_accounts, p_h_kinds, p_h_classes, p_h_reasons, p_h_details)
                           WITH ORDINALITY u(p, a, k, cl, r, d, o) JOIN unnest(v_o, v_l) w(p, l) ON w.p = u.p + 1
                      UNION ALL
                      SELECT w.p, w.l, NULL, 0::smallint, NULL, NULL, NULL, 0 FROM unnest(v_o, v_l) w(p, l)) q) f,
                note_health(p_epoch, f.c, f.l, f.a, f.k, f.cl, f.r, f.d, p_faults, p_cooldown, p_cap) n
        LOOP
            idx := -1; answer := 0; account := j.account; change := j.change; until_us := j.until_us;
            RETURN NEXT;
        END LOOP;
    END IF;
END $$;

-- Enters jobs that have just become waiting into their lanes. Where a limit is known to be shut, the lane is not
-- looked at before.
CREATE FUNCTION touch_lanes(p_tenants text[], p_ids text[]) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    WITH j AS MATERIALIZED (    -- by primary key, whatever is known of the number of waiting jobs
        SELECT x.account, x.level, x.tenant, x.state, x.due_at, x.reason
        FROM unnest(p_tenants, p_ids) u(t, id) JOIN job x ON x.tenant = u.t AND x.id = u.id
    )
    INSERT INTO lane AS l (account, level, tenant, next_at, fifo, oldest_at)
    SELECT g.account, g.level, g.tenant,
           least(g.soonest, CASE WHEN g.limited THEN greatest(blocked_until(
               (SELECT max(r.next_at) FROM rate r WHERE r.key = ANY (charged_keys(g.tenant, g.account)))),
               clock_timestamp()) END,
               CASE WHEN g.ill THEN greatest(blocked_until(
               coalesce((SELECT micros(ill_until(h)) FROM account_health h WHERE h.account = g.account AND h.state > 0), 0)),
               clock_timestamp()) END),
           g.fifo, g.oldest
    FROM (SELECT x.account, x.level, x.tenant, min(x.due_at) AS oldest,
                 min(x.due_at) FILTER (WHERE x.reason NOT IN (1, 7)) AS soonest, bool_or(x.reason = 1) AS limited,
                 bool_or(x.reason = 7) AS ill, count(*) FILTER (WHERE x.reason IN (1, 4, 7)) AS fifo
          FROM j x WHERE x.state = 2
          GROUP BY x.account, x.level, x.tenant) g
    ORDER BY g.account, g.level, g.tenant
    ON CONFLICT (account, level, tenant) DO UPDATE
        SET next_at = least(l.next_at, excluded.next_at), fifo = l.fifo + excluded.fifo,
            oldest_at = least(l.oldest_at, excluded.oldest_at)
        WHERE l.next_at > excluded.next_at OR excluded.fifo > 0 OR l.oldest_at > excluded.oldest_at;
END $$;

-- Puts new jobs that are to be sent later straight into the waiting room: one statement and one version of their row for
-- what admit_v1 and settle_v1 (kind 2, reason 3) leave behind. Their claims are p_claim_base and those after it, in the
-- order of the arrays; p_born is a birth second * 1000. A job that is known already, due or expired is none for here: it
-- is not answered, and admit_v1 decides about it. A repeat after a lost COMMIT answers what it has parked and nobody has
-- touched since.
-- report: its number in the outbox. p_reports may be empty.
CREATE FUNCTION park_new_v1(
    p_epoch bigint, p_claim_base bigint, p_born bigint, p_tenants text[], p_ids text[], p_levels smallint[],
    p_accounts text[], p_digests bytea[], p_send_at timestamptz[], p_expires_at timestamptz[], p_batches text[],
    p_bodies bytea[], p_properties text[], p_reports text[])
RETURNS TABLE (idx integer, report bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp(); v_o integer[]; v_n bigint[];
BEGIN
    WITH made AS (
        INSERT INTO job AS x (tenant, id, state, level, account, digest, born, seq, epoch, claim, leased_at, body, body_size,
                              properties, due_at, expires_at, reason, batch, created_at, updated_at, report)
        SELECT u.t, u.id, 2, u.l, u.a, u.d, p_born, p_born + CASE WHEN u.rp IS NULL THEN 0 ELSE 1 END, p_epoch,
               p_claim_base + u.o - 1, v_now, u.body, octet_length(u.body), u.pr::jsonb, u.sa, u.ea, 3, u.b, v_now, v_now,
               CASE WHEN u.rp IS NOT NULL THEN nextval('outbox_n_seq') END
        FROM unnest(p_tenants, p_ids, p_levels, p_accounts, p_digests, p_send_at, p_expires_at, p_batches, p_bodies,
                    p_properties, p_reports) WITH ORDINALITY u(t, id, l, a, d, sa, ea, b, body, pr, rp, o)
        WHERE u.sa > v_now AND (u.ea <= v_now) IS NOT TRUE
        -- Of twins the first.
        ORDER BY u.t COLLATE "C", u.id COLLATE "C", u.o
        ON CONFLICT ON CONSTRAINT job_pkey DO NOTHING
        RETURNING x.tenant, x.id, x.seq, x.account, x.level, x.due_at, x.report AS n,
                  (x.claim - p_claim_base + 1)::integer AS o
    ), owed AS (
        INSERT INTO outbox (n, tenant, id, seq, epoch, due_at, created_at, body)
        SELECT m.n, m.tenant, m.id, m.seq, p_epoch, v_now + interval '30 seconds', v_now, p_reports[m.o]
        FROM made m WHERE m.n IS NOT NULL
    ), entered AS (
        -- As touch_lanes would: they wait for their time, and keep no order.
        INSERT INTO lane AS l (account, level, tenant, next_at, oldest_at)
        SELECT m.account, m.level, m.tenant, min(m.due_at), min(m.due_at) FROM made m
        GROUP BY m.account, m.level, m.tenant
        ORDER BY m.account, m.level, m.tenant
        ON CONFLICT (account, level, tenant) DO UPDATE
            SET next_at = least(l.next_at, excluded.next_at), oldest_at = least(l.oldest_at, excluded.oldest_at)
            WHERE l.next_at > excluded.next_at OR l.oldest_at > excluded.oldest_at
    )
    SELECT array_agg(m.o), array_agg(m.n) INTO v_o, v_n FROM made m;
    IF cardinality(v_o) = cardinality(p_ids) THEN
        RETURN QUERY SELECT u.o - 1, u.n FROM unnest(v_o, v_n) u(o, n);
    ELSE
        -- Also those that this very statement has parked before.
        RETURN QUERY SELECT (u.o - 1)::integer, x.report
            FROM unnest(p_tenants, p_ids) WITH ORDINALITY u(t, id, o) JOIN job x ON x.tenant = u.t AND x.id = u.id
            WHERE x.state IS NOT DISTINCT FROM 2 AND x.epoch IS NOT DISTINCT FROM p_epoch
              AND x.claim = p_claim_base + u.o - 1;
    END IF;
END $$;

-- How many jobs wait, by reason, and how many are held, counted up to p_most each. Counted anew by one caller at a time, not more
-- often than p_every, and for a fiftieth of the time at most; all others get what was counted last.
CREATE FUNCTION census_v1(p_most bigint, p_every interval) RETURNS TABLE (waiting bigint[], held bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_waiting bigint[] := array_fill(0::bigint, ARRAY[7]); v_held bigint; v_began timestamptz := clock_timestamp(); c record;
BEGIN
    PERFORM 1 FROM census s WHERE s.next_at <= v_began FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        FOR c IN SELECT w.reason, count(*) AS jobs FROM (SELECT x.reason FROM job x WHERE x.state = 2 LIMIT p_most) w GROUP BY 1 LOOP
            v_waiting[c.reason] := c.jobs;
        END LOOP;
        SELECT count(*) INTO v_held FROM (SELECT FROM job x WHERE x.state = 4 LIMIT p_most) w;
        UPDATE census s SET waiting = v_waiting, held = v_held,
            next_at = clock_timestamp() + greatest(p_every, 50 * (clock_timestamp() - v_began));
    END IF;
    RETURN QUERY SELECT s.waiting, s.held FROM census s;
END $$;

-- ── Release ──────────────────────────────────────────────────────────────────────────────────────────────────────

-- Levels of which a lane is due.
CREATE FUNCTION due_levels_v1() RETURNS TABLE (level smallint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN QUERY SELECT u.l FROM unnest(ARRAY[0, 1, 2, 3]::smallint[]) u(l)
        WHERE (SELECT true FROM lane y WHERE y.level = u.l AND y.next_at <= v_now LIMIT 1);
END $$;

-- Leases up to p_max due jobs of a level to a worker that has permits for them, lanes in turn, oldest first, with their
-- slots. Skips what others are working on; never waits for a lock. p_account: only this account, at this level and the
-- more urgent ones. Of an account in trouble (ill_us) one goes as its probe when that is due; else only what has been due
-- for longer than p_max_age µs (or its account's own) of that trouble, to be given up or to take a detour.
CREATE FUNCTION release_v1(p_epoch bigint, p_level smallint, p_max integer, p_max_bytes bigint, p_claim_base bigint,
                           p_exclude text[], p_account text, p_max_age bigint)
RETURNS TABLE (tenant text, id text, level smallint, account text, claim bigint, born bigint, seq bigint,
               attempt integer, created_us bigint, tried_us bigint, granted integer, valid_us bigint, reason smallint,
               recipients jsonb, message_id text, uncertain integer, body bytea, properties jsonb,
               crashes integer, deaths integer, ill_us bigint, probe boolean, cap integer)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp(); v_us bigint; v_held text[]; v_quantum integer; v_limited boolean;
    -- lanes in the order of their turn; what: 0 shut, 1 passed over, 2 behind a more urgent one, 3 ready, 4 ready and
    -- unlimited, 5 in trouble
    l_a text[]; l_l smallint[]; l_t text[]; l_from timestamptz[]; l_what integer[]; l_shut bigint[]; l_ready integer;
    -- chosen jobs
    j_o integer[]; j_t text[]; j_a text[]; j_id text[]; j_cost integer[]; j_reason smallint[];
    j_granted integer[]; j_valid bigint[]; j_next bigint[]; v_slot bigint; s record;
    -- of lanes whose account is in trouble: until when (µs), whether it is the one that may send the probe, and what is too old
    v_ill boolean; l_ill bigint[]; l_probe boolean[]; l_to timestamptz[]; v_probes text[];
BEGIN
    FOR round IN 1 .. 16 LOOP
        -- The lanes whose turn it is.
        IF p_account IS NULL THEN
            SELECT array_agg(y.account ORDER BY y.n), array_agg(y.level ORDER BY y.n), array_agg(y.tenant ORDER BY y.n),
                   array_agg(y.oldest_at ORDER BY y.n) INTO l_a, l_l, l_t, l_from
            FROM (SELECT d.*, row_number() OVER (ORDER BY d.served_at, d.next_at) AS n FROM (
                  SELECT z.account, z.level, z.tenant, z.served_at, z.next_at, z.oldest_at FROM lane z
                  WHERE z.level = p_level AND z.next_at <= v_now AND z.account <> ALL (p_exclude)
                  ORDER BY z.next_at LIMIT 64 FOR UPDATE SKIP LOCKED) d) y;
        ELSE
            SELECT array_agg(y.account ORDER BY y.n), array_agg(y.level ORDER BY y.n), array_agg(y.tenant ORDER BY y.n),
                   array_agg(y.oldest_at ORDER BY y.n) INTO l_a, l_l, l_t, l_from
            FROM (SELECT d.*, row_number() OVER (ORDER BY d.level, d.served_at, d.next_at) AS n FROM (
                  SELECT z.account, z.level, z.tenant, z.served_at, z.next_at, z.oldest_at FROM lane z
                  WHERE z.account = p_account AND z.level <= p_level AND z.next_at <= v_now
                    AND z.account <> ALL (p_exclude)
                  ORDER BY z.level, z.next_at LIMIT 64 FOR UPDATE SKIP LOCKED) d) y;
        END IF;
        IF l_a IS NULL THEN
            RETURN;
        END IF;
        l_ill := NULL; l_probe := NULL; l_to := NULL;
        v_ill := (SELECT true FROM account_health h WHERE h.account = ANY (l_a) AND h.state > 0 LIMIT 1) IS NOT NULL;
        IF v_ill THEN
            SELECT coalesce(array_agg(q.account), '{}') INTO v_probes FROM (
                SELECT h.account FROM account_health h WHERE h.account = ANY (l_a) AND probe_due(h) FOR UPDATE SKIP LOCKED) q;
            SELECT array_agg(CASE WHEN h.account IS NOT NULL THEN micros(ill_until(h)) END ORDER BY u.o),
                   array_agg(u.a = ANY (v_probes) AND u.place = 1 ORDER BY u.o),
                   -- What had waited for its time or for a limit before the trouble began has not waited for its end.
                   array_agg(CASE WHEN h.account IS NOT NULL AND NOT (u.a = ANY (v_probes) AND u.place = 1)
                                  THEN CASE WHEN h.opened_at <= e.since THEN e.since ELSE '-infinity' END
                             END ORDER BY u.o)
                INTO l_ill, l_probe, l_to
            FROM (SELECT q.a, q.o, row_number() OVER (PARTITION BY q.a ORDER BY q.o) AS place
                  FROM unnest(l_a) WITH ORDINALITY q(a, o)) u
            LEFT JOIN account_health h ON h.account = u.a AND h.state > 0
            LEFT JOIN account o ON o.tenant = split_part(u.a, '/', 1) AND o.id = split_part(u.a, '/', 2)
            CROSS JOIN LATERAL (
                SELECT v_now - coalesce(o.max_age_seconds * 1000000, p_max_age) * interval '1 microsecond') e(since);
        END IF;
        -- Their limits, read behind the lanes' locks: whoever opens a limit wakes its lanes afterwards.
        v_us := micros(clock_timestamp());
        SELECT coalesce(array_agg(q.key), '{}') INTO v_held
        FROM (SELECT r.key FROM rate r
              WHERE r.key = ANY (ARRAY(SELECT unnest(charged_keys(u.t, u.a)) FROM unnest(l_t, l_a) u(t, a))) AND r.next_at <= v_us
              FOR UPDATE SKIP LOCKED) q;
        SELECT array_agg(CASE WHEN l_to[q.o] IS NOT NULL THEN 5 WHEN q.n = 0 THEN 4 WHEN q.shut > v_us THEN 0 WHEN NOT q.held THEN 1
                              WHEN q.urgent THEN 2 ELSE 3 END ORDER BY q.o),
               array_agg(CASE WHEN l_to[q.o] IS NOT NULL THEN l_ill[q.o] ELSE q.shut END ORDER BY q.o)
            INTO l_what, l_shut
        FROM (SELECT u.o, count(r.key) AS n, max(r.next_at) AS shut, bool_and(r.key = ANY (v_held)) AS held,
                     p_account IS NULL AND EXISTS (SELECT FROM lane y WHERE y.account = u.a AND y.level < u.l
                                                   AND y.next_at <= v_now) AS urgent
              FROM unnest(l_t, l_a, l_l) WITH ORDINALITY u(t, a, l, o)
              LEFT JOIN LATERAL (SELECT y.key, y.next_at FROM rate y WHERE y.key = ANY (charged_keys(u.t, u.a)) OFFSET 0) r ON true
              GROUP BY u.o, u.a, u.l) q;
        l_ready := cardinality(array_positions(l_what, 3)) + cardinality(array_positions(l_what, 4));
        v_limited := cardinality(array_positions(l_what, 3)) > 0;
        v_quantum := greatest(1, (p_max + l_ready - 1) / greatest(l_ready, 1));
        -- Their oldest jobs: of every lane the first, then of every lane the second, …
        SELECT array_agg(q.o ORDER BY q.n), array_agg(q.tenant ORDER BY q.n), array_agg(q.account ORDER BY q.n),
               array_agg(q.id ORDER BY q.n), array_agg(q.cost ORDER BY q.n), array_agg(q.reason ORDER BY q.n)
            INTO j_o, j_t, j_a, j_id, j_cost, j_reason
        FROM (SELECT w.*, row_number() OVER turns AS n, sum(w.size) OVER turns - w.size AS before
              FROM (SELECT u.o, u.l, x.tenant, x.account, x.id, x.reason, x.cost, x.size,
                           row_number() OVER (PARTITION BY u.o ORDER BY x.due_at) AS place
                    FROM unnest(l_t, l_a, l_l, l_from, l_what, l_to, l_probe) WITH ORDINALITY
                         u(t, a, l, since, what, before, probe, o)
                    CROSS JOIN LATERAL (
                        SELECT y.tenant, y.account, y.id, y.reason, y.due_at, coalesce(y.body_size, 0) AS size,
                               greatest(coalesce(jsonb_array_length(jsonb_path_query_array(y.recipients,
                                   '$[*] ? (@.status == "pending" || @.status == "deferred")')),
                                   (y.properties ->> 'recipients')::integer, 1), 1) AS cost
                        FROM job y
                        WHERE y.account = u.a AND y.level = u.l AND y.tenant = u.t AND y.state = 2
                          AND y.due_at BETWEEN u.since AND coalesce(u.before, v_now) AND NOT y.cancel
                        -- No more at a time than there can be connections: the rest would hold permits, and come back. But as
                        -- many as new jobs of one account make way for: those would overtake the others.
                        ORDER BY y.due_at LIMIT CASE WHEN u.probe THEN 1 WHEN p_account IS NOT NULL THEN v_quantum
                            ELSE least(v_quantum, (SELECT c.cap FROM connection_cap c WHERE c.account = u.a)) END
                        FOR UPDATE SKIP LOCKED) x
                    WHERE u.what >= 3) w
              WINDOW turns AS (ORDER BY CASE WHEN p_account IS NULL THEN 0 ELSE w.l END, w.place, w.o)) q
        WHERE q.n <= p_max AND (q.before < p_max_bytes);
        j_granted := j_cost; j_valid := NULL; j_next := NULL; v_slot := NULL;
        IF v_limited AND j_id IS NOT NULL THEN
            SELECT g.granted, g.slot_us, g.valid_us, g.next_us INTO s FROM share_slots(j_t, j_a, j_cost, v_held) g;
            j_granted := s.granted; j_valid := s.valid_us; j_next := s.next_us; v_slot := s.slot_us;
        END IF;
        UPDATE job x SET state = 1, epoch = p_epoch, claim = p_claim_base + u.o - 1, leased_at = clock_timestamp(),
            phase = 0, merged = false, updated_at = clock_timestamp(),
            slot_at = CASE WHEN u.v IS NOT NULL THEN v_slot END, slot_cost = CASE WHEN u.v IS NOT NULL THEN u.g END
            FROM unnest(j_t, j_id, j_granted, j_valid) WITH ORDINALITY u(t, id, g, v, o)
            WHERE x.tenant = u.t AND x.id = u.id AND u.g > 0;
        -- Turns are over. Who got something goes behind all that are due; who did not come to its turn keeps its place;
        -- those stopped by a limit come back in the order of their turns.
        IF v_ill THEN
            -- Whose lane sends the probe, and has something to send.
            UPDATE account_health h SET state = 2, epoch = p_epoch, claim = p_claim_base + u.n - 1,
                until = clock_timestamp() + interval '5 minutes'
                FROM unnest(j_o, j_granted) WITH ORDINALITY u(o, g, n)
                WHERE l_probe[u.o] AND u.g > 0 AND h.account = l_a[u.o];
        END IF;
        WITH turn AS (
            SELECT u.a, u.l, u.t, u.o, u.what, u.shut, coalesce(g.fifo, 0) AS fifo, g.stopped, g.got,
                   CASE WHEN u.what >= 3 THEN
                       (SELECT min(x.due_at) FROM job x WHERE x.account = u.a AND x.level = u.l AND x.tenant = u.t
                                         AND x.due_at >= u.since AND x.state = 2 AND NOT x.cancel) END AS more
            FROM unnest(l_a, l_l, l_t, l_from, l_what, l_shut) WITH ORDINALITY u(a, l, t, since, what, shut, o)
            LEFT JOIN (SELECT q.o, count(*) FILTER (WHERE q.g > 0 AND q.r IN (1, 4, 7)) AS fifo,
                              max(coalesce(q.x, v_us)) FILTER (WHERE q.g = 0) AS stopped, bool_or(q.g > 0) AS got
                       FROM unnest(j_o, j_granted, j_reason, j_next) q(o, g, r, x) GROUP BY q.o) g ON g.o = u.o
        ), gone AS (
            DELETE FROM lane z USING turn u
            WHERE z.account = u.a AND z.level = u.l AND z.tenant = u.t AND u.what >= 3 AND u.more IS NULL
        )
        UPDATE lane z SET fifo = greatest(z.fifo - u.fifo, 0),
            served_at = CASE WHEN u.got THEN clock_timestamp() ELSE z.served_at END,
            oldest_at = coalesce(u.more, z.oldest_at),
            next_at = CASE WHEN u.what = 0 OR u.what = 5 AND u.got IS NOT TRUE
                               THEN greatest(blocked_until(u.shut), v_now) + u.o * interval '1 microsecond'
                           WHEN u.what = 2 THEN clock_timestamp() + interval '50 milliseconds'
                           WHEN u.stopped IS NOT NULL
                               THEN greatest(blocked_until(u.stopped), v_now) + u.o * interval '1 microsecond'
                           WHEN u.got OR u.more > v_now THEN greatest(u.more, clock_timestamp())
                           ELSE z.next_at END
            FROM turn u
            WHERE z.account = u.a AND z.level = u.l AND z.tenant = u.t AND u.what <> 1
              AND (u.what < 3 OR u.more IS NOT NULL);
        EXIT WHEN j_id IS NOT NULL AND 0 < ANY (j_granted) OR cardinality(l_a) < 64;
    END LOOP;
    RETURN QUERY
        SELECT x.tenant, x.id, x.level, x.account, x.claim, x.born, x.seq, x.attempt, micros(x.created_at),
               micros(x.tried_at), u.g, u.v, x.reason, x.recipients, x.message_id, x.uncertain, x.body, x.properties,
               x.crashes::integer, x.deaths::integer,
               CASE WHEN l_ill[u.o] IS NOT NULL THEN greatest(l_ill[u.o] - micros(v_now), 0) END, coalesce(l_probe[u.o], false),
               (SELECT c.cap FROM connection_cap c WHERE c.account = x.account)
        FROM unnest(j_t, j_id, j_granted, j_valid, j_o) u(t, id, g, v, o) JOIN job x ON x.tenant = u.t AND x.id = u.id
        WHERE u.g > 0;
END $$;

-- Leases what has expired in the waiting room, to be told so: without a slot, whatever its account's limits or health, the
-- earliest first. Jobs before lanes, as whoever settles takes them; what others are working on is passed over, and what cannot
-- be read (contract) rests as long as it does otherwise. p_recent: only what has expired within so many µs, if the caller has
-- looked for all before that: the index entries of jobs long gone stay as long as any transaction is open anywhere (a backup).
CREATE FUNCTION release_expired_v1(p_epoch bigint, p_max integer, p_max_bytes bigint, p_claim_base bigint, p_recent bigint)
RETURNS TABLE (tenant text, id text, level smallint, account text, claim bigint, born bigint, seq bigint,
               attempt integer, created_us bigint, tried_us bigint, granted integer, valid_us bigint, reason smallint,
               recipients jsonb, message_id text, uncertain integer, body bytea, properties jsonb,
               crashes integer, deaths integer, ill_us bigint, probe boolean, cap integer)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp(); v_t text[]; v_i text[];
    v_since timestamptz := coalesce(v_now - p_recent * interval '1 microsecond', '-infinity');
    -- lanes that have counted some of them
    l_a text[]; l_l smallint[]; l_t text[]; l_n bigint[];
BEGIN
    SELECT array_agg(q.tenant ORDER BY q.n), array_agg(q.id ORDER BY q.n) INTO v_t, v_i
    FROM (SELECT w.tenant, w.id, row_number() OVER turns AS n, sum(w.size) OVER turns - w.size AS before
          FROM (SELECT y.tenant, y.id, y.expires_at, coalesce(y.body_size, 0) AS size FROM job y
                WHERE y.state = 2 AND y.expires_at BETWEEN v_since AND v_now AND NOT y.cancel
                    AND (y.reason <> 5 OR y.due_at <= v_now)
                ORDER BY y.expires_at LIMIT p_max FOR UPDATE SKIP LOCKED) w
          WINDOW turns AS (ORDER BY w.expires_at, w.tenant, w.id)) q
    WHERE q.before < p_max_bytes;
    IF v_i IS NULL THEN
        RETURN;
    END IF;
    WITH taken AS (
        UPDATE job x SET state = 1, epoch = p_epoch, claim = p_claim_base + u.o - 1, leased_at = v_now, phase = 0,
            merged = false, updated_at = v_now, slot_at = NULL, slot_cost = NULL
        FROM unnest(v_t, v_i) WITH ORDINALITY u(t, id, o)
        WHERE x.tenant = u.t AND x.id = u.id
        RETURNING x.account, x.level, x.tenant, x.reason)
    SELECT array_agg(g.account), array_agg(g.level), array_agg(g.tenant), array_agg(g.jobs) INTO l_a, l_l, l_t, l_n
    FROM (SELECT k.account, k.level, k.tenant, count(*) AS jobs FROM taken k WHERE k.reason IN (1, 4, 7)
          GROUP BY k.account, k.level, k.tenant ORDER BY k.account, k.level, k.tenant) g;
    UPDATE lane l SET fifo = greatest(l.fifo - u.n, 0) FROM unnest(l_a, l_l, l_t, l_n) u(a, l, t, n)
        WHERE l.account = u.a AND l.level = u.l AND l.tenant = u.t;
    RETURN QUERY
        SELECT x.tenant, x.id, x.level, x.account, x.claim, x.born, x.seq, x.attempt, micros(x.created_at),
               micros(x.tried_at), 0, NULL::bigint, x.reason, x.recipients, x.message_id, x.uncertain, x.body, x.properties,
               x.crashes::integer, x.deaths::integer, NULL::bigint, false, NULL::integer
        FROM unnest(v_t, v_i) WITH ORDINALITY u(t, id, o) JOIN job x ON x.tenant = u.t AND x.id = u.id ORDER BY u.o;
END $$;

-- Waiting jobs for operators to look at, up to p_max of them by account: a full waiting room takes long to read. Those of a
-- tenant by its lanes, however many others wait.
CREATE FUNCTION waiting_jobs_v1(p_tenant text, p_max integer) RETURNS TABLE (tenant text, id text, created_at timestamptz)
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off SET enable_sort = off
SET jit = off AS $$
BEGIN
    IF p_tenant IS NULL THEN
        RETURN QUERY SELECT x.tenant, x.id, x.created_at FROM job x
            WHERE x.state = 2 ORDER BY x.account, x.level, x.tenant, x.due_at LIMIT p_max;
    ELSE
        RETURN QUERY SELECT w.tenant, w.id, w.created_at FROM lane l
            CROSS JOIN LATERAL (
                SELECT x.tenant, x.id, x.created_at FROM job x
                WHERE x.state = 2 AND x.account = l.account AND x.level = l.level AND x.tenant = l.tenant
                ORDER BY x.due_at LIMIT p_max) w
            WHERE l.tenant = p_tenant LIMIT p_max;
    END IF;
END $$;

-- ── Outbox ───────────────────────────────────────────────────────────────────────────────────────────────────────

-- Removes exactly the reports that were confirmed. Nobody waits for the disk: a removal that a crash of the server forgets
-- only means that those reports are published once more, under the same ids.
CREATE FUNCTION clear_outbox_v1(p_numbers bigint[]) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    DELETE FROM outbox x WHERE x.n = ANY (p_numbers);
END $$;

-- Reports that should have been published long ago, the oldest first, leased to the caller for a while. p_first: as
-- outbox_backlog_v1 said.
CREATE FUNCTION owed_reports_v1(p_max integer, p_hold interval, p_first bigint)
RETURNS TABLE (number bigint, tenant text, id text, seq bigint, report text)
LANGUAGE sql SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
    WITH due AS (
        UPDATE outbox x SET due_at = clock_timestamp() + p_hold
        WHERE x.n = ANY (ARRAY(SELECT y.n FROM outbox y WHERE y.n >= p_first AND y.due_at <= clock_timestamp()
                               ORDER BY y.n LIMIT p_max FOR UPDATE SKIP LOCKED))
        RETURNING x.n, x.tenant, x.id, x.seq, x.body)
    SELECT * FROM due ORDER BY n
$$;

-- Reports that the caller had taken and could not publish: whoever comes first.
CREATE FUNCTION leave_reports_v1(p_numbers bigint[]) RETURNS void
LANGUAGE sql SET search_path FROM CURRENT SET enable_seqscan = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
    UPDATE outbox SET due_at = clock_timestamp() WHERE n = ANY (p_numbers)
$$;

-- How many reports are owed, counted up to p_most or what others have asked for, the age of the oldest, whoever has taken it,
-- and the number at which a search for them begins. By the index: most of the table's pages hold only what is gone. Counted
-- anew by one caller at a time, not more often than p_every, and for a fiftieth of the time at most, but every ten seconds
-- however long it takes: by this number workers begin nothing, or begin again. All others get what was counted last.
CREATE FUNCTION outbox_backlog_v1(p_most bigint, p_every interval) RETURNS TABLE (owed bigint, oldest_us bigint, first_n bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    c outbox_census; v_began timestamptz := clock_timestamp(); v_last bigint; v_owed bigint; v_lowest bigint;
BEGIN
    SELECT * INTO c FROM outbox_census s
        WHERE s.next_at <= v_began OR s.most < p_most
           -- The clock has been set back.
           OR s.next_at > v_began + interval '10 seconds'
        FOR UPDATE SKIP LOCKED;
    IF FOUND THEN
        PERFORM set_config('synchronous_commit', 'off', true);
        c.most := greatest(c.most, p_most);
        -- Read before the search: whatever is drawn later is higher.
        SELECT q.last_value INTO v_last FROM outbox_n_seq q;
        c.first_n := least(c.first_n, v_last);
        SELECT count(*), min(o.n) INTO v_owed, v_lowest
            FROM (SELECT y.n FROM outbox y WHERE y.n >= c.first_n ORDER BY y.n LIMIT c.most) o;
        UPDATE outbox_census s SET owed = v_owed, oldest_at = (SELECT y.created_at FROM outbox y WHERE y.n = v_lowest),
            most = c.most, first_n = greatest(coalesce(v_lowest, v_last) - 2000, 0),
            next_at = clock_timestamp()
                + least(greatest(p_every, 50 * (clock_timestamp() - v_began)), interval '10 seconds');
    END IF;
    RETURN QUERY SELECT s.owed, micros(clock_timestamp()) - micros(s.oldest_at), s.first_n FROM outbox_census s;
END $$;

-- Whether it is for the caller to search the whole outbox now; for others not before p_every has passed. To be committed
-- before the search: one that fails, perhaps for taking too long, is not begun again at once by the next.
CREATE FUNCTION outbox_search_due_v1(p_every interval) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE outbox_census SET whole_at = clock_timestamp() + p_every
        WHERE whole_at <= clock_timestamp() OR whole_at > clock_timestamp() + p_every;
    RETURN FOUND;
END $$;

-- Lets searches begin at the lowest number there is, where that was committed below the number they begin at. Apart from the
-- count, which must not wait for it: it may walk all that has passed.
CREATE FUNCTION outbox_search_v1() RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_lowest bigint;
BEGIN
    SELECT y.n INTO v_lowest FROM outbox y ORDER BY y.n LIMIT 1;
    UPDATE outbox_census SET first_n = v_lowest WHERE first_n > v_lowest;
END $$;

-- ── Workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

-- Heartbeat; no row means: this epoch is dead, abandon everything not yet written.
CREATE FUNCTION heartbeat_v1(p_epoch bigint, p_gap interval) RETURNS TABLE (steady_us bigint)
LANGUAGE sql SET search_path FROM CURRENT AS $$
    UPDATE worker SET heartbeat_at = clock_timestamp(),
        steady_since = CASE WHEN heartbeat_at < clock_timestamp() - p_gap THEN clock_timestamp() ELSE steady_since END
    WHERE epoch = p_epoch AND NOT dead
    RETURNING micros(clock_timestamp()) - micros(steady_since)
$$;

-- Dead workers. An epoch without a row is dead as well: a worker may have slept for longer than its row was kept. Leases are
-- looked for between the epochs of the living: theirs are many, and mostly index entries of those long gone. OFFSET 0 keeps
-- the planner from reading all leases first, which it does while it believes the table to be small.
CREATE FUNCTION dead_epochs() RETURNS bigint[]
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    RETURN (SELECT array_agg(q.epoch) FROM (
        SELECT w.epoch FROM worker w WHERE w.dead
        UNION
        SELECT x.epoch
        FROM (SELECT a.epoch AS above, lead(a.epoch, 1, 9223372036854775807) OVER (ORDER BY a.epoch) AS below
              FROM (SELECT w.epoch FROM worker w WHERE NOT w.dead UNION ALL SELECT 0) a) g
        CROSS JOIN LATERAL (SELECT y.epoch FROM job y WHERE y.state = 1 AND y.epoch > g.above AND y.epoch < g.below OFFSET 0) x) q);
END $$;

-- Takes over from workers that are dead: marks their epoch first, for ever, then moves their jobs. Jobs whose body is
-- here wait again; those whose body RabbitMQ has are open for its redelivery; those marked in their final write stay
-- until p_deadline has passed and are then returned, to be settled as uncertain. Of two settings the longer one counts: a
-- worker trusts itself for as long as its own lease says, and whoever takes over knows only of outages that broke the
-- heartbeats by its own.
CREATE FUNCTION takeover_v1(p_epoch bigint, p_lease interval, p_deadline interval, p_max integer)
RETURNS TABLE (moved integer, opened integer, tenant text, id text)
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    v_now timestamptz := clock_timestamp(); v_t text[]; v_i text[]; d bigint[]; v_new bigint[];
    v_steady interval;
BEGIN
    SELECT v_now - w.steady_since INTO v_steady FROM worker w
        WHERE w.epoch = p_epoch AND NOT w.dead AND w.heartbeat_at > v_now - p_lease;
    IF NOT FOUND OR v_steady < p_lease THEN
        RETURN;
    END IF;
    WITH died AS (
        UPDATE worker w SET dead = true
        WHERE w.epoch IN (SELECT z.epoch FROM worker z WHERE z.epoch <> p_epoch AND NOT z.dead AND z.lease <= v_steady
                          AND z.heartbeat_at < v_now - greatest(z.lease, p_lease) ORDER BY z.epoch FOR UPDATE SKIP LOCKED)
          AND w.heartbeat_at < v_now - greatest(w.lease, p_lease)
        RETURNING w.epoch)
    SELECT array_agg(z.epoch) INTO v_new FROM died z;
    IF v_new IS NOT NULL THEN
        -- Their reports need not wait until a living worker would surely have published them.
        UPDATE outbox x SET due_at = v_now
            WHERE x.n = ANY (ARRAY(SELECT y.n FROM outbox y WHERE y.due_at > v_now AND y.epoch = ANY (v_new)
                                   LIMIT 10000 FOR UPDATE SKIP LOCKED));
    END IF;
    d := dead_epochs();
    moved := 0; opened := 0;
    IF d IS NOT NULL THEN
        WITH gone AS (
            SELECT x.tenant, x.id FROM job x
            WHERE x.state = 1 AND x.epoch = ANY (d) AND x.phase = 0
            ORDER BY x.tenant, x.id LIMIT p_max FOR UPDATE SKIP LOCKED
        ), done AS (
            -- The claim goes too: its late owner must not take the row for settled by itself. What came out of the waiting
            -- room goes back to its place.
            UPDATE job x SET state = CASE WHEN x.body IS NULL THEN 0 ELSE 2 END,
                claim = NULL, due_at = least(x.due_at, v_now), reason = 2,
                uncertain = x.uncertain + 1, slot_at = NULL, slot_cost = NULL, updated_at = v_now, marked = false,
                crashes = CASE WHEN x.marked THEN x.crashes + 1 ELSE greatest(x.crashes, 1) END,
                deaths = least(x.deaths + 1, 1000)
            FROM gone g WHERE x.tenant = g.tenant AND x.id = g.id
            RETURNING x.tenant, x.id, x.state
        )
        SELECT array_agg(n.tenant) FILTER (WHERE n.state = 2), array_agg(n.id) FILTER (WHERE n.state = 2),
               count(*) FILTER (WHERE n.state = 2), count(*) FILTER (WHERE n.state = 0)
            INTO v_t, v_i, moved, opened FROM done n;
        IF v_t IS NOT NULL THEN
            PERFORM touch_lanes(v_t, v_i);
        END IF;
        DELETE FROM connection_lease c WHERE c.epoch = ANY (d)
            AND NOT EXISTS (SELECT FROM job x WHERE x.state = 1 AND x.epoch = c.epoch AND x.phase = 1);
        DELETE FROM worker w WHERE w.dead AND w.heartbeat_at < v_now - interval '1 day'
            AND NOT EXISTS (SELECT FROM job x WHERE x.state = 1 AND x.epoch = w.epoch);
    END IF;
    RETURN NEXT;
    IF d IS NOT NULL THEN
        RETURN QUERY SELECT 0, 0, x.tenant, x.id FROM job x
            WHERE x.state = 1 AND x.epoch = ANY (d) AND x.phase = 1
              AND x.leased_at < v_now - greatest(p_deadline, (SELECT w.deadline FROM worker w WHERE w.epoch = x.epoch)) LIMIT p_max;
    END IF;
END $$;

-- ── Connection caps ──────────────────────────────────────────────────────────────────────────────────────────────

CREATE FUNCTION set_connection_cap_v1(p_account text, p_cap integer) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF coalesce(p_cap, 0) = 0 THEN
        DELETE FROM connection_cap WHERE account = p_account;
    ELSE
        INSERT INTO connection_cap (account, cap) VALUES (p_account, p_cap)
        ON CONFLICT (account) DO UPDATE SET cap = excluded.cap;
    END IF;
END $$;

-- One more connection of this account for this worker? Leases end with the worker's epoch.
CREATE FUNCTION acquire_connection_v1(p_epoch bigint, p_account text) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_cap integer;
BEGIN
    SELECT c.cap INTO v_cap FROM connection_cap c WHERE c.account = p_account FOR UPDATE;
    IF NOT EXISTS (SELECT FROM worker w WHERE w.epoch = p_epoch AND NOT w.dead) THEN
        RETURN false;
    END IF;
    IF v_cap IS NOT NULL AND v_cap <= (SELECT coalesce(sum(l.held), 0) FROM connection_lease l
                                       WHERE l.account = p_account) THEN
        UPDATE connection_cap SET wanted_at = clock_timestamp() WHERE account = p_account;
        RETURN false;
    END IF;
    INSERT INTO connection_lease AS l (account, epoch, held) VALUES (p_account, p_epoch, 1)
        ON CONFLICT (account, epoch) DO UPDATE SET held = l.held + 1;
    RETURN true;
END $$;

CREATE FUNCTION release_connection_v1(p_epoch bigint, p_account text) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    PERFORM 1 FROM connection_cap c WHERE c.account = p_account FOR UPDATE;
    UPDATE connection_lease SET held = held - 1 WHERE account = p_account AND epoch = p_epoch AND held > 0;
    DELETE FROM connection_lease WHERE account = p_account AND epoch = p_epoch AND held <= 0;
END $$;

-- Takes and returns whose answer got lost leave the count wrong: a worker says from time to time what it really has.
CREATE FUNCTION restate_connections_v1(p_epoch bigint, p_accounts text[], p_held integer[]) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    PERFORM 1 FROM connection_cap c
        WHERE c.account = ANY (p_accounts || ARRAY(SELECT l.account FROM connection_lease l WHERE l.epoch = p_epoch)::text[])
        ORDER BY c.account FOR UPDATE;
    IF (SELECT true FROM worker w WHERE w.epoch = p_epoch AND NOT w.dead) IS NULL THEN
        RETURN;
    END IF;
    DELETE FROM connection_lease l WHERE l.epoch = p_epoch AND l.account <> ALL (p_accounts);
    INSERT INTO connection_lease AS l (account, epoch, held)
        SELECT u.a, p_epoch, u.n FROM unnest(p_accounts, p_held) u(a, n) ORDER BY u.a COLLATE "C"
        ON CONFLICT (account, epoch) DO UPDATE SET held = excluded.held WHERE l.held <> excluded.held;
END $$;

-- Accounts of which this worker holds connections and others lately asked in vain.
CREATE FUNCTION wanted_connections_v1(p_epoch bigint) RETURNS TABLE (account text)
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_since timestamptz := clock_timestamp() - interval '3 seconds';
BEGIN
    RETURN QUERY SELECT c.account FROM connection_cap c
        WHERE c.wanted_at > v_since
          AND (SELECT true FROM connection_lease l WHERE l.account = c.account AND l.epoch = p_epoch) IS NOT NULL;
END $$;

-- Waiting jobs that could run now, for autoscaling and dashboards, one row per level: lanes that are due, and of their due
-- jobs as many as limits leave room for at this moment, at most 1000 per lane. Levels that share a limit count its room
-- each: an estimate, as all such numbers are. The view is stable; others may build on it. Who may read the view needs no
-- rights on the tables: the function, which tells nothing but these numbers, has its owner's.
CREATE FUNCTION runnable_jobs_v1() RETURNS TABLE (level text, lanes bigint, jobs bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
BEGIN
    RETURN QUERY
    WITH due AS (
        SELECT l.account, l.level AS lev, l.tenant,
               (SELECT count(*) FROM (SELECT FROM job x
                    WHERE x.account = l.account AND x.level = l.level AND x.tenant = l.tenant AND x.state = 2
                      AND x.due_at BETWEEN l.oldest_at AND v_now LIMIT 1000) q) AS n
        FROM lane l WHERE l.next_at <= v_now
    ), fitting AS (
        SELECT d.account, d.lev, least(d.n, runnable_room(charged_keys(d.tenant, d.account), v_now)) AS n FROM due d
    ), per_account AS (
        SELECT f.lev, count(*) AS lanes,
               least(sum(f.n)::bigint, runnable_room(ARRAY[split_part(f.account, '/', 1) || '/', f.account], v_now)) AS n
        FROM fitting f GROUP BY f.account, f.lev
    )
    SELECT names.name, coalesce(sum(p.lanes), 0)::bigint, coalesce(sum(p.n), 0)::bigint
    FROM unnest(ARRAY['immediate', 'high', 'medium', 'low']) WITH ORDINALITY names(name, place)
    LEFT JOIN per_account p ON p.lev = names.place - 1
    GROUP BY names.name, names.place ORDER BY names.place;
END $$;

-- Sends that the tightest of these limits still allows; null without a limit.
CREATE FUNCTION runnable_room(p_keys text[], p_at timestamptz) RETURNS bigint
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $$
    SELECT min(CASE WHEN r.next_at > micros(p_at) THEN 0 ELSE greatest(least(f.messages, f.recipients), 0) END)::bigint
    FROM rate r CROSS JOIN LATERAL rate_room(r, greatest(micros(p_at), r.last)) f
    WHERE r.key = ANY (p_keys) AND r.lim <> '{}'
$$;

CREATE VIEW runnable_jobs AS SELECT level, lanes, jobs FROM runnable_jobs_v1();
