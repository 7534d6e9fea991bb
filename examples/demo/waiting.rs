//! A look into the waiting room, for the live display.

use std::time::Duration;

use postroom::ledger::WaitReason;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

const LIMIT: Duration = Duration::from_secs(5);

/// A connection to the ledger.
pub(crate) struct WaitingRoom(Client);

impl WaitingRoom {
    pub(crate) async fn open(database: &str) -> Result<Self, String> {
        let (client, connection) = timeout(LIMIT, tokio_postgres::connect(database, NoTls))
            .await
            .map_err(|_| "the database does not answer")?
            .map_err(|error| format!("the database: {error}"))?;
        tokio::spawn(connection);
        Ok(Self(client))
    }

    /// Such as `80 for the rate limit, 6 for their time`.
    pub(crate) async fn shown(&self) -> String {
        // State 2 is waiting.
        let sql = "SELECT reason, count(*) FROM postroom.job WHERE state = 2 GROUP BY reason ORDER BY 2 DESC";
        let Ok(Ok(rows)) = timeout(LIMIT, self.0.query(sql, &[])).await else {
            return "unknown".to_owned();
        };
        let waiting: Vec<String> = rows
            .iter()
            .filter_map(|row| {
                let reason = WaitReason::from_number(row.try_get(0).ok()?)?;
                let count: i64 = row.try_get(1).ok()?;
                Some(format!("{count} {}", words(reason)))
            })
            .collect();
        if waiting.is_empty() {
            "nothing".to_owned()
        } else {
            waiting.join(", ")
        }
    }
}

fn words(reason: WaitReason) -> &'static str {
    match reason {
        WaitReason::Rate => "for the rate limit",
        WaitReason::Retry => "for another attempt",
        WaitReason::Schedule => "for their time",
        WaitReason::Busy => "for a connection",
        other => other.as_str(),
    }
}
