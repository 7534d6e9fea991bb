//! The queue of deliveries in Postgres: leasing what is due, settling what was tried.

use secrecy::SecretString;
use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::{Bridge, BridgeError};
use crate::endpoint::{self, Auth};
use crate::secret::{Keyring, SecretError};

/// Beyond the time limit of a POST: what it takes to lease, to read the answer's rest and to settle.
const LEASE_MARGIN: f64 = 15.0;

/// One delivery leased to this process, with all that is needed to make it.
#[derive(Debug)]
pub(super) struct Leased {
    pub(super) event: i64,
    pub(super) endpoint: i64,
    pub(super) lease: i64,
    /// Attempts made before this one.
    pub(super) attempts: u32,
    pub(super) event_id: String,
    /// The tenant the event is about; not the endpoint's, which may be the platform.
    pub(super) tenant: String,
    pub(super) kind: String,
    pub(super) body: Vec<u8>,
    /// The endpoint's tenant.
    pub(super) owner: String,
    pub(super) name: String,
    pub(super) url: String,
    /// Signing secrets, the newest first.
    pub(super) secrets: Result<Vec<SecretString>, SecretError>,
    pub(super) auth: Result<Auth, SecretError>,
    /// Of the endpoint as it was read here.
    pub(super) version: i64,
}

/// What became of one delivery.
#[derive(Debug)]
pub(super) struct Settled {
    pub(super) event: i64,
    pub(super) endpoint: i64,
    /// Of the endpoint that was called: it may have been changed since.
    pub(super) version: i64,
    pub(super) lease: i64,
    pub(super) outcome: Outcome,
    pub(super) status: Option<u16>,
    pub(super) error: Option<String>,
    /// The endpoint itself is in trouble, not just this event.
    pub(super) blame: bool,
    /// How long the endpoint asked to be left alone, in seconds.
    pub(super) pause: f64,
    /// The endpoint said that it is gone.
    pub(super) gone: bool,
}

/// The next state of a delivery; delays in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Outcome {
    Delivered,
    Retry(f64),
    Failed,
    /// Not tried, for a reason of ours: no attempt is counted.
    Release(f64),
}

impl Outcome {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Retry(_) => "retry",
            Self::Failed => "failed",
            Self::Release(_) => "release",
        }
    }

    pub(super) fn delay(self) -> f64 {
        match self {
            Self::Delivered | Self::Failed => 0.0,
            Self::Retry(delay) | Self::Release(delay) => delay,
        }
    }
}

impl Bridge {
    /// Leases at most `limit` due deliveries, at most `per_endpoint` of each endpoint over all bridges.
    pub(super) async fn lease(&self, limit: usize, per_endpoint: usize) -> Result<Vec<Leased>, BridgeError> {
        let (limit, per_endpoint) = (limit as i32, per_endpoint as i32);
        let seconds = self.config.timeout.as_secs_f64() + LEASE_MARGIN;
        let sql = self
            .database
            .sql("SELECT * FROM {s}.webhook_lease_v1($1, $2, make_interval(secs => $3))");
        let rows = self
            .within(async {
                let client = self.database.client().await?;
                Ok(client
                    .query_typed(
                        &sql,
                        &[
                            (&limit, Type::INT4),
                            (&per_endpoint, Type::INT4),
                            (&seconds, Type::FLOAT8),
                        ],
                    )
                    .await?)
            })
            .await?;
        let keyring = self.keyring.current();
        rows.iter()
            .map(|row| leased(row, &keyring).map_err(BridgeError::from))
            .collect()
    }

    /// Writes outcomes, all in one statement. Answers with the endpoints that have been failing for too long.
    pub(super) async fn settle(&self, batch: &[Settled]) -> Result<Vec<i64>, BridgeError> {
        let events = column(batch, |s| s.event);
        let endpoints = column(batch, |s| s.endpoint);
        let leases = column(batch, |s| s.lease);
        let outcomes = column(batch, |s| s.outcome.as_str());
        let delays = column(batch, |s| s.outcome.delay());
        let statuses = column(batch, |s| s.status.map(i32::from));
        let errors = column(batch, |s| s.error.as_deref());
        let blames = column(batch, |s| s.blame);
        let pauses = column(batch, |s| s.pause);
        let (scale, disable_after) = (self.config.retry_scale, self.config.disable_after.as_secs_f64());
        let sql = self.database.sql(
            "SELECT {s}.webhook_settle_v1($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, make_interval(secs => $11))",
        );
        let rows = self
            .within(async {
                let client = self.database.client().await?;
                Ok(client
                    .query_typed(
                        &sql,
                        &[
                            (&events, Type::INT8_ARRAY),
                            (&endpoints, Type::INT8_ARRAY),
                            (&leases, Type::INT8_ARRAY),
                            (&outcomes, Type::TEXT_ARRAY),
                            (&delays, Type::FLOAT8_ARRAY),
                            (&statuses, Type::INT4_ARRAY),
                            (&errors, Type::TEXT_ARRAY),
                            (&blames, Type::BOOL_ARRAY),
                            (&pauses, Type::FLOAT8_ARRAY),
                            (&scale, Type::FLOAT8),
                            (&disable_after, Type::FLOAT8),
                        ],
                    )
                    .await?)
            })
            .await?;
        let failing = rows
            .iter()
            .filter_map(|row| row.try_get::<_, Option<i64>>(0).transpose())
            .collect::<Result<_, _>>()?;
        Ok(failing)
    }
}

fn column<'a, T>(batch: &'a [Settled], field: impl Fn(&'a Settled) -> T) -> Vec<T> {
    batch.iter().map(field).collect()
}

fn leased(row: &Row, keyring: &Keyring) -> Result<Leased, tokio_postgres::Error> {
    let (owner, name): (String, String) = (row.try_get("owner")?, row.try_get("name")?);
    let secrets = secrets(row, keyring, &endpoint::secret_aad(&owner, &name))?;
    let auth = auth(row, keyring, &endpoint::credential_aad(&owner, &name))?;
    Ok(Leased {
        event: row.try_get("event")?,
        endpoint: row.try_get("endpoint")?,
        lease: row.try_get("lease")?,
        attempts: row.try_get::<_, i32>("attempts")?.unsigned_abs(),
        event_id: row.try_get("event_id")?,
        tenant: row.try_get("tenant")?,
        kind: row.try_get("type")?,
        body: row.try_get("body")?,
        url: row.try_get("url")?,
        version: row.try_get("version")?,
        owner,
        name,
        secrets,
        auth,
    })
}

/// The secret that signs, and the one before it if it opens: the receiver is to change over to the new one anyway.
fn secrets(
    row: &Row,
    keyring: &Keyring,
    aad: &str,
) -> Result<Result<Vec<SecretString>, SecretError>, tokio_postgres::Error> {
    let (present, previous): (Option<&str>, Option<&str>) =
        (row.try_get("secret")?, row.try_get("previous_secret")?);
    let previous = previous.and_then(|sealed| keyring.open(sealed, aad).ok());
    let present = present.map(|sealed| keyring.open(sealed, aad)).transpose();
    Ok(present.map(|present| present.into_iter().chain(previous).collect()))
}

fn auth(row: &Row, keyring: &Keyring, aad: &str) -> Result<Result<Auth, SecretError>, tokio_postgres::Error> {
    let credential: Option<&str> = row.try_get("credential")?;
    let username: Option<String> = row.try_get("username")?;
    let Some(credential) = credential else {
        return Ok(Ok(Auth::None));
    };
    Ok(keyring.open(credential, aad).map(|secret| match username {
        Some(username) => Auth::Basic {
            username,
            password: secret,
        },
        None => Auth::Bearer(secret),
    }))
}
