//! Sends remembered events to an endpoint again.

use jiff::Timestamp;
use tokio_postgres::types::Type;

use super::{EndpointError, store};
use crate::db::Database;
use crate::id::{AccountId, TenantId};

/// Events per transaction: the endpoint's lane is locked meanwhile.
const CHUNK: i64 = 1000;

/// Which events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replay {
    /// This one, whatever the endpoint's filter says.
    Event(String),
    /// Those received in this span that the endpoint wants, delivered ones too: receivers know them by their ids.
    Received {
        /// From then on.
        since: Timestamp,
        /// Up to then.
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
    let (mut after, mut replayed) = (0, 0);
    loop {
        let chunk = chunk(db, (tenant, name), what, after).await?;
        replayed += chunk.replayed;
        let Some(last) = chunk.last else { break };
        after = last;
    }
    if let (Replay::Event(id), 0) = (what, after) {
        return Err(EndpointError::UnknownEvent(id.clone()));
    }
    Ok(replayed)
}

/// Events that the endpoint wants, or the one that is named. Parameters: endpoint, the event before the first, the id of one
/// event, since, until, at most how many.
const WANTED: &str = "SELECT v.id FROM {s}.webhook_event v JOIN {s}.endpoint e ON e.id = $1 \
     WHERE v.id > $2 AND ($3 IS NULL OR v.event_id = $3) \
       AND ($4 IS NULL OR v.received_at >= $4) AND ($5 IS NULL OR v.received_at < $5) \
       AND e.tenant IN (v.tenant, '-') \
       AND ($3 IS NOT NULL OR {s}.endpoint_wants_v1(e, v.tenant, v.type, \
            NOT EXISTS (SELECT FROM {s}.endpoint o WHERE o.tenant = v.tenant))) \
     ORDER BY v.id LIMIT $6";

/// Events that were given up at the endpoint, and no others, however many there are: the deliveries first, each with its event
/// (OFFSET 0). Same parameters.
const FAILED: &str = "SELECT d.event AS id \
      FROM (SELECT f.event FROM {s}.webhook_delivery f \
             WHERE f.endpoint = $1 AND f.state = 'failed' AND f.event > $2 ORDER BY f.event OFFSET 0) d \
     CROSS JOIN LATERAL (SELECT v.received_at FROM {s}.webhook_event v WHERE v.id = d.event OFFSET 0) v \
     WHERE ($4 IS NULL OR v.received_at >= $4) AND ($5 IS NULL OR v.received_at < $5) \
     ORDER BY d.event LIMIT $6";

struct Chunk {
    replayed: u64,
    /// The last event looked at; `None` when there is no more.
    last: Option<i64>,
}

async fn chunk(
    db: &Database,
    (tenant, name): (&TenantId, &AccountId),
    what: &Replay,
    after: i64,
) -> Result<Chunk, EndpointError> {
    let mut client = db.client().await?;
    let transaction = client.transaction().await?;
    // The lane first, as everywhere.
    let sql = db.sql(
        "SELECT l.endpoint FROM {s}.endpoint_lane l JOIN {s}.endpoint e ON e.id = l.endpoint \
         WHERE e.tenant = $1 AND e.name = $2 FOR UPDATE OF l",
    );
    let row = transaction
        .query_typed_opt(
            &sql,
            &[(&tenant.as_str(), Type::TEXT), (&name.as_str(), Type::TEXT)],
        )
        .await?
        .ok_or_else(|| store::unknown(tenant, name))?;
    let endpoint: i64 = row.try_get(0)?;
    let (chosen, event, since, until) = match what {
        Replay::Event(id) => (WANTED, Some(id), None, None),
        Replay::Received { since, until } => (WANTED, None, Some(*since), *until),
        Replay::Failed { since, until } => (FAILED, None, *since, *until),
    };
    let sql = db.sql(&format!(
        "WITH chosen AS ({chosen}), \
         made AS ( \
           INSERT INTO {{s}}.webhook_delivery (event, endpoint) SELECT id, $1 FROM chosen ORDER BY id \
           ON CONFLICT (event, endpoint) DO UPDATE \
              SET state = 'pending', attempts = 0, next_at = clock_timestamp(), lease = NULL \
            WHERE webhook_delivery.state <> 'pending' RETURNING 1) \
         SELECT (SELECT count(*) FROM made), (SELECT max(id) FROM chosen), {{s}}.endpoint_wake_v1(ARRAY[$1])::text"
    ));
    let row = transaction
        .query_typed_one(
            &sql,
            &[
                (&endpoint, Type::INT8),
                (&after, Type::INT8),
                (&event, Type::TEXT),
                (&since, Type::TIMESTAMPTZ),
                (&until, Type::TIMESTAMPTZ),
                (&CHUNK, Type::INT8),
            ],
        )
        .await?;
    let (replayed, last): (i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?);
    transaction.commit().await?;
    Ok(Chunk {
        replayed: replayed.unsigned_abs(),
        last,
    })
}
