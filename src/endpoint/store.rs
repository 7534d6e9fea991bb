//! Endpoints in Postgres.

use jiff::Timestamp;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::{Change, Endpoint, EndpointError, Known, SealedAuth};
use crate::db::Database;
use crate::id::{AccountId, TenantId};

/// Until when a receiver may know nothing but the secret before this one: the rotation that gave it is not over.
const ROTATES_UNTIL: &str = "CASE WHEN previous_secret IS NOT NULL AND previous_secret_until > clock_timestamp() \
     THEN previous_secret_until END";

/// Changes what the change names, creating the endpoint if it is new. Whether it is new.
///
/// # Errors
/// If the tenant does not exist, a new endpoint has no URL, a rotation would cut off a receiver, or the database fails.
pub async fn set(
    db: &Database,
    tenant: &TenantId,
    name: &AccountId,
    change: &Change,
) -> Result<bool, EndpointError> {
    if change.all_tenants == Some(true) && !tenant.is_platform() {
        return Err(EndpointError::NotPlatform);
    }
    let mut client = db.client().await?;
    let transaction = client.transaction().await?;
    let (tenant, name) = (tenant.as_str(), name.as_str());
    let sql =
        format!("SELECT id, {ROTATES_UNTIL} FROM {{s}}.endpoint WHERE tenant = $1 AND name = $2 FOR UPDATE");
    let found = transaction
        .query_typed_opt(&db.sql(&sql), &[(&tenant, Type::TEXT), (&name, Type::TEXT)])
        .await?;
    let is_new = found.is_none();
    let id: i64 = match found {
        Some(row) => {
            may_rotate(change, row.try_get(1)?)?;
            row.try_get(0)?
        }
        None => create(db, &transaction, (tenant, name), change).await?,
    };
    update(db, &transaction, id, change).await?;
    // Whatever was wrong may be mended now: the pause ends, and the days of failing are counted anew.
    let sql = db.sql(
        "INSERT INTO {s}.endpoint_lane (endpoint) VALUES ($1) ON CONFLICT (endpoint) DO UPDATE \
         SET due_at = clock_timestamp(), paused_until = NULL, rests_until = NULL, failures = 0, failing_since = NULL",
    );
    transaction.execute_typed(&sql, &[(&id, Type::INT8)]).await?;
    transaction.commit().await?;
    Ok(is_new)
}

/// The signing secret of an endpoint as it is stored: sealed.
///
/// # Errors
/// If the database fails.
pub async fn stored_secret(
    db: &Database,
    tenant: &TenantId,
    name: &AccountId,
) -> Result<Option<String>, EndpointError> {
    let client = db.client().await?;
    let sql = db.sql("SELECT secret FROM {s}.endpoint WHERE tenant = $1 AND name = $2");
    let (tenant, name) = (tenant.as_str(), name.as_str());
    let row = client
        .query_typed_opt(&sql, &[(&tenant, Type::TEXT), (&name, Type::TEXT)])
        .await?;
    let secret: Option<Option<String>> = row.map(|row| row.try_get(0)).transpose()?;
    Ok(secret.flatten())
}

/// Of the two secrets that sign during a rotation one has to go for another one, and only the operator knows which of them
/// the receiver has.
fn may_rotate(change: &Change, until: Option<Timestamp>) -> Result<(), EndpointError> {
    let keeps = change.secret.is_some() && !change.keep_previous.is_zero();
    match until {
        Some(until) if keeps && change.receiver_has.is_none() => Err(EndpointError::Rotating { until }),
        _ => Ok(()),
    }
}

async fn create(
    db: &Database,
    transaction: &deadpool_postgres::Transaction<'_>,
    (tenant, name): (&str, &str),
    change: &Change,
) -> Result<i64, EndpointError> {
    let Some(url) = &change.url else {
        return Err(EndpointError::UrlMissing {
            tenant: tenant.to_owned(),
            name: name.to_owned(),
        });
    };
    let sql = db.sql("INSERT INTO {s}.endpoint (tenant, name, url) VALUES ($1, $2, $3) RETURNING id");
    let row = transaction
        .query_typed_one(
            &sql,
            &[(&tenant, Type::TEXT), (&name, Type::TEXT), (url, Type::TEXT)],
        )
        .await
        .map_err(|error| match error.code() {
            Some(&SqlState::FOREIGN_KEY_VIOLATION) => EndpointError::UnknownTenant(tenant.to_owned()),
            _ => error.into(),
        })?;
    Ok(row.try_get(0)?)
}

async fn update(
    db: &Database,
    transaction: &deadpool_postgres::Transaction<'_>,
    id: i64,
    change: &Change,
) -> Result<(), EndpointError> {
    let (auth, username, credential) = match &change.auth {
        None => (None, None, None),
        Some(SealedAuth::None) => (Some("none"), None, None),
        Some(SealedAuth::Bearer(token)) => (Some("bearer"), None, Some(token)),
        Some(SealedAuth::Basic { username, password }) => (Some("basic"), Some(username), Some(password)),
    };
    let events = change.events.clone().flatten();
    let keeps = format!("$12 AND ({ROTATES_UNTIL}) IS NOT NULL");
    let sql = format!(
        "UPDATE {{s}}.endpoint SET url = coalesce($2, url), \
         previous_secret = CASE WHEN $3 IS NULL OR ($4 > 0 AND {keeps}) THEN previous_secret \
             WHEN $4 > 0 THEN secret END, \
         previous_secret_until = CASE WHEN $3 IS NULL THEN previous_secret_until \
             WHEN $4 > 0 AND secret IS NOT NULL THEN clock_timestamp() + make_interval(secs => $4) END, \
         secret = coalesce($3, secret), \
         auth = coalesce($5, auth), \
         username = CASE WHEN $5 IS NULL THEN username ELSE $6 END, \
         credential = CASE WHEN $5 IS NULL THEN credential ELSE $7 END, \
         events = CASE WHEN $8 THEN $9 ELSE events END, \
         all_tenants = coalesce($10, all_tenants), \
         enabled = coalesce($11, enabled), \
         disabled_reason = CASE $11 WHEN true THEN NULL WHEN false THEN 'operator' ELSE disabled_reason END, \
         disabled_at = CASE $11 WHEN true THEN NULL WHEN false THEN coalesce(disabled_at, clock_timestamp()) \
             ELSE disabled_at END, \
         version = version + 1, updated_at = clock_timestamp() WHERE id = $1",
    );
    transaction
        .execute_typed(
            &db.sql(&sql),
            &[
                (&id, Type::INT8),
                (&change.url, Type::TEXT),
                (&change.secret, Type::TEXT),
                (&change.keep_previous.as_secs_f64(), Type::FLOAT8),
                (&auth, Type::TEXT),
                (&username, Type::TEXT),
                (&credential, Type::TEXT),
                (&change.events.is_some(), Type::BOOL),
                (&events, Type::TEXT_ARRAY),
                (&change.all_tenants, Type::BOOL),
                (&change.enabled, Type::BOOL),
                (&(change.receiver_has == Some(Known::Previous)), Type::BOOL),
            ],
        )
        .await?;
    Ok(())
}

/// Shows one endpoint with its counts.
///
/// # Errors
/// If there is none, or the database fails.
pub async fn show(db: &Database, tenant: &TenantId, name: &AccountId) -> Result<Endpoint, EndpointError> {
    let found = select(db, Some(tenant.as_str()), Some(name.as_str())).await?;
    found.into_iter().next().ok_or_else(|| unknown(tenant, name))
}

/// Lists the endpoints of a tenant, or all, by name.
///
/// # Errors
/// If the database fails.
pub async fn list(db: &Database, tenant: Option<&TenantId>) -> Result<Vec<Endpoint>, EndpointError> {
    select(db, tenant.map(TenantId::as_str), None).await
}

/// Removes an endpoint. Its deliveries are never made; they go with their events.
///
/// # Errors
/// If there is none, or the database fails.
pub async fn remove(db: &Database, tenant: &TenantId, name: &AccountId) -> Result<(), EndpointError> {
    let sql = db.sql("DELETE FROM {s}.endpoint WHERE tenant = $1 AND name = $2");
    let client = db.client().await?;
    let removed = client
        .execute_typed(
            &sql,
            &[(&tenant.as_str(), Type::TEXT), (&name.as_str(), Type::TEXT)],
        )
        .await?;
    if removed == 0 {
        Err(unknown(tenant, name))
    } else {
        Ok(())
    }
}

pub(super) fn unknown(tenant: &TenantId, name: &AccountId) -> EndpointError {
    EndpointError::Unknown {
        tenant: tenant.to_string(),
        name: name.to_string(),
    }
}

async fn select(
    db: &Database,
    tenant: Option<&str>,
    name: Option<&str>,
) -> Result<Vec<Endpoint>, EndpointError> {
    let sql = db.sql(
        "SELECT e.*, e.secret IS NOT NULL AS has_secret, e.credential IS NOT NULL AS has_credential, \
           CASE WHEN e.previous_secret_until > clock_timestamp() THEN e.previous_secret_until END AS previous_until, \
           l.failing_since, l.last_status, l.last_error, \
           (SELECT count(*) FROM {s}.webhook_delivery d WHERE d.endpoint = e.id AND d.state = 'pending') AS pending, \
           (SELECT count(*) FROM {s}.webhook_delivery d WHERE d.endpoint = e.id AND d.state = 'failed') AS failed \
         FROM {s}.endpoint e LEFT JOIN {s}.endpoint_lane l ON l.endpoint = e.id \
         WHERE ($1 IS NULL OR e.tenant = $1) AND ($2 IS NULL OR e.name = $2) ORDER BY e.tenant, e.name",
    );
    let client = db.client().await?;
    let rows = client
        .query_typed(&sql, &[(&tenant, Type::TEXT), (&name, Type::TEXT)])
        .await?;
    rows.iter()
        .map(|row| endpoint(row).map_err(EndpointError::from))
        .collect()
}

fn endpoint(row: &Row) -> Result<Endpoint, tokio_postgres::Error> {
    Ok(Endpoint {
        tenant: row.try_get("tenant")?,
        name: row.try_get("name")?,
        url: row.try_get("url")?,
        has_secret: row.try_get("has_secret")?,
        previous_secret_until: row.try_get("previous_until")?,
        auth: row.try_get("auth")?,
        username: row.try_get("username")?,
        has_credential: row.try_get("has_credential")?,
        events: row.try_get("events")?,
        all_tenants: row.try_get("all_tenants")?,
        enabled: row.try_get("enabled")?,
        disabled_reason: row.try_get("disabled_reason")?,
        disabled_at: row.try_get("disabled_at")?,
        failing_since: row.try_get("failing_since")?,
        last_status: row.try_get("last_status")?,
        last_error: row.try_get("last_error")?,
        pending: row.try_get("pending")?,
        failed: row.try_get("failed")?,
        created_at: row.try_get("created_at")?,
        updated_at: row.try_get("updated_at")?,
    })
}
