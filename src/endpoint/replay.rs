//! Sends remembered events to an endpoint again.

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};

use super::{EndpointError, store};
use crate::db::Database;
use crate::id::{AccountId, TenantId};

/// Events per transaction: the endpoint's lane is locked meanwhile.
const CHUNK: usize = 1000;
/// Events looked at by one statement.
const LOOK: i64 = 5000;

/// Which events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replay {
    /// This one, whatever the endpoint's filter says.
    Event(String),
    /// Those received in this span that the endpoint wants, delivered ones too: receivers know them by their ids.
    Received {
        /// From then on.
        since: Timestamp,
        /// Up to then, at most to now.
        until: Option<Timestamp>,
    },
    /// Those that were given up.
    Failed {
        /// Received from then on.
        since: Option<Timestamp>,
        /// Received up to then.
        until: Option<Timestamp>,
    },
}

/// Makes events due again for an endpoint, with all their attempts before them. Those that wait already are left
/// alone. Answers how many.
///
/// # Errors
/// If there is no such endpoint or event, or the database fails; what was replayed before stays so.
pub async fn replay(
    db: &Database,
    tenant: &TenantId,
    name: &AccountId,
    what: &Replay,
) -> Result<u64, EndpointError> {
    let (endpoint, now) = find(db, tenant, name).await?;
    let mut replayed = 0;
    match what {
        Replay::Event(id) => {
            let event = named(db, endpoint, id).await?;
            replayed += make_due(db, endpoint, &[event]).await?;
        }
        Replay::Received { since, until } => {
            let mut after = (*since, 0);
            // Not what comes meanwhile: on a busy installation that has no end.
            let until = until.unwrap_or(now);
            while let Some(looked) = received(db, endpoint, after, until).await? {
                for chunk in looked.wanted.chunks(CHUNK) {
                    replayed += make_due(db, endpoint, chunk).await?;
                }
                after = looked.last;
            }
        }
        Replay::Failed { since, until } => {
            let mut after = 0;
            while let Some(looked) = failed(db, endpoint, after, (*since, *until)).await? {
                for chunk in looked.wanted.chunks(CHUNK) {
                    replayed += make_due(db, endpoint, chunk).await?;
                }
                after = looked.last;
            }
        }
    }
    Ok(replayed)
}

/// Some events in the order in which they are looked at.
struct Looked<C> {
    wanted: Vec<i64>,
    /// Where the next look begins.
    last: C,
}

/// Its number, and the time of the database.
async fn find(db: &Database, tenant: &TenantId, name: &AccountId) -> Result<(i64, Timestamp), EndpointError> {
    let sql = db.sql("SELECT id, clock_timestamp() FROM {s}.endpoint WHERE tenant = $1 AND name = $2");
    let key: [(&(dyn ToSql + Sync), Type); 2] =
        [(&tenant.as_str(), Type::TEXT), (&name.as_str(), Type::TEXT)];
    let row = db.client().await?.query_typed_opt(&sql, &key).await?;
    let row = row.ok_or_else(|| store::unknown(tenant, name))?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// The event of this id, if it is the endpoint's to see.
async fn named(db: &Database, endpoint: i64, id: &str) -> Result<i64, EndpointError> {
    let sql = db.sql(
        "SELECT v.id FROM {s}.webhook_event v JOIN {s}.endpoint e ON e.id = $1 \
         WHERE v.event_id = $2 AND e.tenant IN (v.tenant, '-')",
    );
    let row = db
        .client()
        .await?
        .query_typed_opt(&sql, &[(&endpoint, Type::INT8), (&id, Type::TEXT)])
        .await?;
    let row = row.ok_or_else(|| EndpointError::UnknownEvent(id.to_owned()))?;
    Ok(row.try_get(0)?)
}

/// Looks at the next events of all tenants, by the time they came: however few are the endpoint's, a statement reads no more
/// than these.
async fn received(
    db: &Database,
    endpoint: i64,
    after: (Timestamp, i64),
    until: Timestamp,
) -> Result<Option<Looked<(Timestamp, i64)>>, EndpointError> {
    let sql = db.sql(
        "SELECT v.received_at, v.id, e.tenant IN (v.tenant, '-') AND {s}.endpoint_wants_v1(e, v.tenant, v.type, \
                NOT EXISTS (SELECT FROM {s}.endpoint o WHERE o.tenant = v.tenant)) \
         FROM (SELECT received_at, id, tenant, type FROM {s}.webhook_event \
                WHERE received_at >= $2 AND (received_at, id) > ($2, $3) AND received_at < $4 \
                ORDER BY received_at, id LIMIT $5) v \
         JOIN {s}.endpoint e ON e.id = $1 ORDER BY v.received_at, v.id",
    );
    let client = db.client().await?;
    let rows = client
        .query_typed(
            &sql,
            &[
                (&endpoint, Type::INT8),
                (&after.0, Type::TIMESTAMPTZ),
                (&after.1, Type::INT8),
                (&until, Type::TIMESTAMPTZ),
                (&LOOK, Type::INT8),
            ],
        )
        .await?;
    let Some(last) = rows.last() else { return Ok(None) };
    Ok(Some(Looked {
        wanted: chosen(&rows, 1, 2)?,
        last: (last.try_get(0)?, last.try_get(1)?),
    }))
}

/// Looks at the next events that were given up at the endpoint, and at no others.
async fn failed(
    db: &Database,
    endpoint: i64,
    after: i64,
    (since, until): (Option<Timestamp>, Option<Timestamp>),
) -> Result<Option<Looked<i64>>, EndpointError> {
    let sql = db.sql(
        "SELECT d.event, ($3 IS NULL OR v.received_at >= $3) AND ($4 IS NULL OR v.received_at < $4) \
         FROM (SELECT event FROM {s}.webhook_delivery \
                WHERE endpoint = $1 AND state = 'failed' AND event > $2 ORDER BY event LIMIT $5) d \
         CROSS JOIN LATERAL (SELECT received_at FROM {s}.webhook_event WHERE id = d.event OFFSET 0) v \
         ORDER BY d.event",
    );
    let client = db.client().await?;
    let rows = client
        .query_typed(
            &sql,
            &[
                (&endpoint, Type::INT8),
                (&after, Type::INT8),
                (&since, Type::TIMESTAMPTZ),
                (&until, Type::TIMESTAMPTZ),
                (&LOOK, Type::INT8),
            ],
        )
        .await?;
    let Some(last) = rows.last() else { return Ok(None) };
    Ok(Some(Looked {
        wanted: chosen(&rows, 0, 1)?,
        last: last.try_get(0)?,
    }))
}

/// Ids of the rows that say so.
fn chosen(rows: &[Row], id: usize, is_wanted: usize) -> Result<Vec<i64>, tokio_postgres::Error> {
    let mut ids = Vec::new();
    for row in rows {
        if row.try_get::<_, bool>(is_wanted)? {
            ids.push(row.try_get(id)?);
        }
    }
    Ok(ids)
}

/// Makes these events due at the endpoint, and wakes it. Only for this is its lane locked: whoever takes reports in for it
/// waits meanwhile.
async fn make_due(db: &Database, endpoint: i64, events: &[i64]) -> Result<u64, EndpointError> {
    let mut client = db.client().await?;
    let transaction = client.transaction().await?;
    // The lane first, as everywhere.
    let lane = db.sql("SELECT FROM {s}.endpoint_lane WHERE endpoint = $1 FOR UPDATE");
    transaction
        .execute_typed(&lane, &[(&endpoint, Type::INT8)])
        .await?;
    // Some may have been forgotten since they were looked at.
    let sql = db.sql(
        "WITH chosen AS (SELECT id FROM {s}.webhook_event WHERE id = ANY ($2) ORDER BY id FOR KEY SHARE), \
         made AS ( \
           INSERT INTO {s}.webhook_delivery (event, endpoint) SELECT id, $1 FROM chosen ORDER BY id \
           ON CONFLICT (event, endpoint) DO UPDATE \
              SET state = 'pending', attempts = 0, next_at = clock_timestamp(), lease = NULL \
            WHERE webhook_delivery.state <> 'pending' RETURNING 1) \
         SELECT (SELECT count(*) FROM made), {s}.endpoint_wake_v1(ARRAY[$1])::text",
    );
    let row = transaction
        .query_typed_one(&sql, &[(&endpoint, Type::INT8), (&events, Type::INT8_ARRAY)])
        .await?;
    let made: i64 = row.try_get(0)?;
    transaction.commit().await?;
    Ok(made.unsigned_abs())
}
