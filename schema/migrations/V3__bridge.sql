-- Webhooks: where a tenant's reports go, which reports there are, and what has become of each at each endpoint.
-- Lock order everywhere: endpoint, endpoint_lane, webhook_delivery; several rows of one table by ascending key.
-- The functions on the way of an event fix their plans, and are worded, as those of the ledger (V2).

CREATE TABLE endpoint (
    id                    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant                text COLLATE "C" NOT NULL REFERENCES tenant ON DELETE CASCADE,
    name                  text COLLATE "C" NOT NULL CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$'),
    url                   text NOT NULL,
    secret                text,          -- sealed "whsec_…"; null: deliveries are not signed
    previous_secret       text,          -- sealed; signs too until the time below, while the receiver changes over
    previous_secret_until timestamptz,
    auth                  text NOT NULL DEFAULT 'none' CHECK (auth IN ('none', 'bearer', 'basic')),
    username              text,
    credential            text,          -- sealed token or password
    events                text[],        -- null: all but mail.deferred; '*': all
    -- An endpoint of the platform gets the reports of tenants that have no endpoint, or those of all.
    all_tenants           boolean NOT NULL DEFAULT false CHECK (NOT all_tenants OR tenant = '-'),
    enabled               boolean NOT NULL DEFAULT true,
    disabled_reason       text,
    disabled_at           timestamptz,
    version               bigint NOT NULL DEFAULT 1,
    created_at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (tenant, name),
    CHECK ((auth = 'none') = (credential IS NULL) AND (auth = 'basic') = (username IS NOT NULL))
);

-- The part of an endpoint that moves with every delivery, kept apart because it is rewritten all the time. Its row
-- lock is the right to decide about the endpoint's deliveries.
CREATE TABLE endpoint_lane (
    endpoint      bigint PRIMARY KEY REFERENCES endpoint ON DELETE CASCADE,
    -- When to look at the endpoint next: never later than its first due delivery, except while it is paused.
    due_at        timestamptz DEFAULT clock_timestamp(),
    paused_until  timestamptz,
    -- The part of that for which it asked itself (Retry-After): nothing ends it before.
    rests_until   timestamptz,
    -- Rounds without a success. From the third on the endpoint is probed with one request at a time.
    failures      integer NOT NULL DEFAULT 0,
    failing_since timestamptz,
    last_status   integer,
    last_error    text
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.1, autovacuum_vacuum_threshold = 200);
CREATE INDEX endpoint_lane_due ON endpoint_lane (due_at) WHERE due_at IS NOT NULL;

-- A report as it came. The body is stored once, as the bytes that are signed and sent.
CREATE TABLE webhook_event (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id    text COLLATE "C" NOT NULL UNIQUE,
    tenant      text COLLATE "C" NOT NULL,
    type        text COLLATE "C" NOT NULL,
    body        bytea NOT NULL,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX webhook_event_received ON webhook_event (received_at);

CREATE TABLE webhook_delivery (
    event       bigint NOT NULL REFERENCES webhook_event ON DELETE CASCADE,
    -- No foreign key: removing an endpoint must not touch a million rows; theirs go with their events.
    endpoint    bigint NOT NULL,
    state       text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    attempts    integer NOT NULL DEFAULT 0,
    -- When it is due; while it is leased, when the lease ends.
    next_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    lease       bigint,
    last_at     timestamptz,
    last_status integer,
    last_error  text,
    PRIMARY KEY (event, endpoint)
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
        autovacuum_analyze_scale_factor = 0.02);
CREATE INDEX webhook_delivery_due ON webhook_delivery (endpoint, next_at, event) WHERE state = 'pending';
CREATE INDEX webhook_delivery_leased ON webhook_delivery (endpoint, next_at) WHERE lease IS NOT NULL;
CREATE INDEX webhook_delivery_failed ON webhook_delivery (endpoint, event) WHERE state = 'failed';
CREATE SEQUENCE webhook_lease;

-- Reports about things that are not jobs, owed to the reports exchange; a row goes when its publish is confirmed.
CREATE TABLE event_outbox (
    event_id   text COLLATE "C" PRIMARY KEY,
    tenant     text COLLATE "C" NOT NULL,
    type       text COLLATE "C" NOT NULL,
    body       bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Whether an endpoint is meant for reports of this tenant and type. `p_alone`: the tenant has no endpoint of its own.
CREATE FUNCTION endpoint_wants_v1(p_endpoint endpoint, p_tenant text, p_type text, p_alone boolean)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT (p_endpoint.tenant = p_tenant
            OR p_endpoint.tenant = '-' AND (p_alone OR p_endpoint.all_tenants OR p_type = 'endpoint.disabled'))
       AND CASE WHEN p_endpoint.events IS NULL THEN p_type <> 'mail.deferred'
                ELSE p_type = ANY (p_endpoint.events) OR '*' = ANY (p_endpoint.events) END
$$;

-- Takes reports in, each once: the answer is how many were new to us and wanted by somebody. An event wanted only by
-- disabled endpoints is kept for a replay, without deliveries.
CREATE FUNCTION webhook_record_v1(p_event_id text[], p_tenant text[], p_type text[], p_body bytea[])
RETURNS bigint LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_lanes bigint[];
    v_new   bigint;
BEGIN
    WITH incoming AS MATERIALIZED (
        SELECT i.*, (SELECT true FROM endpoint o WHERE o.tenant = i.tenant LIMIT 1) IS NULL AS alone
          FROM unnest(p_event_id, p_tenant, p_type, p_body) AS i (event_id, tenant, type, body)
    ), added AS (
        INSERT INTO webhook_event (event_id, tenant, type, body)
        SELECT i.event_id, i.tenant, i.type, i.body
          FROM incoming i
         WHERE (SELECT true FROM endpoint e
                 WHERE e.tenant IN (i.tenant, '-') AND endpoint_wants_v1(e, i.tenant, i.type, i.alone) LIMIT 1)
         ORDER BY i.event_id
            ON CONFLICT (event_id) DO NOTHING
        RETURNING id, tenant, type
    ), owed AS (
        INSERT INTO webhook_delivery (event, endpoint)
        SELECT a.id, e.id
          FROM added a
         CROSS JOIN LATERAL (SELECT e.* FROM endpoint e WHERE e.tenant IN (a.tenant, '-') AND e.enabled OFFSET 0) e
         WHERE endpoint_wants_v1(e, a.tenant, a.type, (SELECT true FROM endpoint o WHERE o.tenant = a.tenant LIMIT 1) IS NULL)
        RETURNING endpoint
    )
    SELECT (SELECT count(*) FROM added), (SELECT array_agg(DISTINCT endpoint) FROM owed) INTO v_new, v_lanes;
    PERFORM endpoint_wake_v1(v_lanes);
    RETURN v_new;
END $$;

-- Makes sure that lanes are looked at. The lock is taken even where nothing changes: a lease that is just deciding
-- "nothing is due here" must be waited for, since it cannot see our rows.
CREATE FUNCTION endpoint_wake_v1(p_endpoint bigint[])
RETURNS void LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
BEGIN
    PERFORM FROM endpoint_lane WHERE endpoint = ANY (p_endpoint) ORDER BY endpoint FOR UPDATE;
    UPDATE endpoint_lane SET due_at = greatest(clock_timestamp(), paused_until)
     WHERE endpoint = ANY (p_endpoint)
       AND (due_at IS NULL OR due_at > greatest(clock_timestamp(), paused_until));
END $$;

-- Hands out due deliveries, endpoints in turn (the one that waited longest first), each at most `p_per_endpoint` in
-- flight over all bridges. A lease lost with an unsynced commit only means a repeat under the same event id.
CREATE FUNCTION webhook_lease_v1(p_limit integer, p_per_endpoint integer, p_lease interval)
RETURNS TABLE (event bigint, endpoint bigint, lease bigint, attempts integer, event_id text, tenant text, type text,
               body bytea, owner text, name text, url text, secret text, previous_secret text, auth text,
               username text, credential text, version bigint)
LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
#variable_conflict use_column
DECLARE
    v_lane  endpoint_lane;
    v_to    endpoint;
    v_begun timestamptz := clock_timestamp();
    v_now   timestamptz;
    v_cap   integer;
    v_busy  integer;
    v_got   integer;
    v_given integer := 0;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    FOR v_lane IN
        SELECT l.* FROM endpoint_lane l WHERE l.due_at <= v_begun
         ORDER BY l.due_at LIMIT p_limit FOR UPDATE SKIP LOCKED
    LOOP
        EXIT WHEN v_given >= p_limit;
        v_now := clock_timestamp();
        v_got := 0;
        SELECT e.* INTO v_to FROM endpoint e WHERE e.id = v_lane.endpoint;
        v_cap := CASE WHEN NOT v_to.enabled THEN 0 WHEN v_lane.failures >= 3 THEN 1 ELSE p_per_endpoint END;
        SELECT count(*) INTO v_busy FROM webhook_delivery d
         WHERE d.endpoint = v_lane.endpoint AND d.lease IS NOT NULL AND d.next_at > v_now;
        IF v_busy < v_cap THEN
            RETURN QUERY
            WITH due AS (
                SELECT d.event FROM webhook_delivery d
                 WHERE d.endpoint = v_lane.endpoint AND d.state = 'pending' AND d.next_at <= v_now
                 ORDER BY d.next_at, d.event LIMIT least(v_cap - v_busy, p_limit - v_given)
                   FOR UPDATE SKIP LOCKED
            ), taken AS (
                UPDATE webhook_delivery d SET lease = nextval('webhook_lease'), next_at = v_now + p_lease
                  FROM due WHERE d.event = due.event AND d.endpoint = v_lane.endpoint
                RETURNING d.event, d.lease, d.attempts
            )
            SELECT t.event, v_to.id, t.lease, t.attempts, v.event_id, v.tenant, v.type, v.body,
                   v_to.tenant, v_to.name, v_to.url, v_to.secret,
                   CASE WHEN v_to.previous_secret_until > v_now THEN v_to.previous_secret END,
                   v_to.auth, v_to.username, v_to.credential, v_to.version
              FROM taken t JOIN webhook_event v ON v.id = t.event
             ORDER BY t.event;
            GET DIAGNOSTICS v_got = ROW_COUNT;
            v_given := v_given + v_got;
        END IF;
        UPDATE endpoint_lane l SET due_at = CASE
            WHEN v_cap = 0 THEN NULL
            -- No room: settling makes some, or else the end of a lease does.
            WHEN v_busy + v_got >= v_cap THEN (
                SELECT min(d.next_at) FROM webhook_delivery d
                 WHERE d.endpoint = l.endpoint AND d.lease IS NOT NULL AND d.next_at > v_now)
            ELSE (
                SELECT greatest(min(d.next_at), clock_timestamp()) FROM webhook_delivery d
                 WHERE d.endpoint = l.endpoint AND d.state = 'pending' HAVING min(d.next_at) IS NOT NULL)
        END WHERE l.endpoint = v_lane.endpoint;
    END LOOP;
END $$;

-- Writes what became of leased deliveries. `p_outcome`: delivered; retry (again after `p_delay` seconds); failed
-- (given up); release (not tried for a reason of ours: again after `p_delay`, no attempt counted). `p_pause`: seconds
-- for which the endpoint asked to be left alone. `p_blame`: the endpoint itself is in trouble, not just this event.
-- A success counts whoever reports it; anything else only from the holder of the lease.
-- Answers with the endpoints that have been failing for `p_disable_after` or longer.
CREATE FUNCTION webhook_settle_v1(
    p_event bigint[], p_endpoint bigint[], p_lease bigint[], p_outcome text[], p_delay double precision[],
    p_status integer[], p_error text[], p_blame boolean[], p_pause double precision[],
    p_scale double precision, p_disable_after interval)
RETURNS SETOF bigint LANGUAGE plpgsql SET search_path FROM CURRENT SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_bitmapscan = off SET random_page_cost = 0 SET cpu_tuple_cost = 1 SET jit = off AS $$
DECLARE
    v_now timestamptz;
BEGIN
    PERFORM FROM endpoint_lane WHERE endpoint = ANY (p_endpoint) ORDER BY endpoint FOR UPDATE;
    v_now := clock_timestamp();
    UPDATE webhook_delivery d SET
           state = CASE u.outcome WHEN 'delivered' THEN 'delivered' WHEN 'failed' THEN 'failed' ELSE 'pending' END,
           attempts = d.attempts + CASE u.outcome WHEN 'release' THEN 0 ELSE 1 END,
           next_at = v_now + make_interval(secs => u.delay),
           lease = NULL,
           last_at = v_now, last_status = u.status, last_error = u.error
      FROM unnest(p_event, p_endpoint, p_lease, p_outcome, p_delay, p_status, p_error)
           AS u (event, endpoint, lease, outcome, delay, status, error)
     WHERE d.event = u.event AND d.endpoint = u.endpoint AND d.state IS NOT DISTINCT FROM 'pending'
       AND (d.lease = u.lease OR u.outcome = 'delivered');
    RETURN QUERY
    WITH round AS (
        SELECT u.endpoint,
               bool_or(u.outcome = 'delivered') AS ok,
               bool_or(u.outcome IN ('retry', 'failed')) AS failed,
               bool_or(u.blame) AS blame,
               max(u.pause) AS pause,
               max(u.pause) FILTER (WHERE u.outcome <> 'release') AS rest,
               (array_agg(u.error) FILTER (WHERE u.outcome IN ('retry', 'failed')))[1] AS error,
               (array_agg(u.status) FILTER (WHERE u.outcome IN ('retry', 'failed')))[1] AS status
          FROM unnest(p_endpoint, p_outcome, p_status, p_error, p_blame, p_pause)
               AS u (endpoint, outcome, status, error, blame, pause)
         GROUP BY u.endpoint
    ), next AS (
        SELECT r.*, l.failing_since AS since,
               CASE WHEN r.ok THEN 0 WHEN r.blame THEN l.failures + 1 ELSE l.failures END AS failures,
               -- Not ended by what was in flight beside it, which began before.
               greatest(l.rests_until, v_now + make_interval(secs => r.rest)) AS rests
          FROM round r JOIN endpoint_lane l USING (endpoint)
    ), paused AS (
        -- 5 s after the third round without a success, doubling up to 5 minutes.
        SELECT n.*, greatest(n.rests, v_now + make_interval(secs => greatest(n.pause,
                   CASE WHEN n.blame AND n.failures >= 3
                        THEN least(5 * 2 ^ least(n.failures - 3, 10), 300) * p_scale ELSE 0 END))) AS until
          FROM next n
    )
    UPDATE endpoint_lane l SET
           failures = p.failures,
           failing_since = CASE WHEN p.ok THEN NULL WHEN p.failed THEN coalesce(p.since, v_now) ELSE p.since END,
           last_status = CASE WHEN p.failed THEN p.status ELSE l.last_status END,
           last_error = CASE WHEN p.failed THEN p.error ELSE l.last_error END,
           paused_until = p.until,
           rests_until = p.rests,
           due_at = p.until
      FROM paused p WHERE l.endpoint = p.endpoint
    RETURNING CASE WHEN l.failing_since <= v_now - p_disable_after THEN l.endpoint END;
END $$;
