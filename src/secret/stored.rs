//! Every column that holds sealed values: checked when a process starts, sealed anew when keys are rotated.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::Row;
use tokio_postgres::types::Type;

use super::keyring::{Keyring, SecretError};
use crate::db::{Database, DbError};
use crate::id::{AccountId, TenantId};

/// A text column of sealed values. Add one to [`COLUMNS`] and it is checked and rotated.
#[derive(Debug, Clone, Copy)]
pub struct SealedColumn {
    /// Table, without schema.
    pub table: &'static str,
    /// Its text columns that make up the additional data.
    pub keys: &'static [&'static str],
    /// The column; NULL where there is no secret.
    pub column: &'static str,
    /// The additional data, from the values of `keys`.
    pub aad: fn(&[&str]) -> String,
    /// Whether nothing works without the value. What is only kept for a while must not keep a process from starting.
    pub is_needed: bool,
}

/// All of them.
pub const COLUMNS: &[SealedColumn] = &[
    SealedColumn {
        table: "account",
        keys: &["tenant", "id"],
        column: "password",
        aad: |keys| format!("account:{}:password", keys.join("/")),
        is_needed: true,
    },
    SealedColumn {
        table: "endpoint",
        keys: ENDPOINT,
        column: "secret",
        aad: endpoint_secret,
        is_needed: true,
    },
    SealedColumn {
        table: "endpoint",
        keys: ENDPOINT,
        column: "previous_secret",
        aad: endpoint_secret,
        is_needed: false,
    },
    SealedColumn {
        table: "endpoint",
        keys: ENDPOINT,
        column: "credential",
        aad: |keys| format!("endpoint:{}:credential", keys.join("/")),
        is_needed: true,
    },
];

const ENDPOINT: &[&str] = &["tenant", "name"];

fn endpoint_secret(keys: &[&str]) -> String {
    format!("endpoint:{}:secret", keys.join("/"))
}

/// Additional data of an account's password.
#[must_use]
pub fn account_password_aad(tenant: &TenantId, account: &AccountId) -> String {
    format!("account:{tenant}/{account}:password")
}

/// Values of one key that are tried before the key is called wrong: one damaged row must not stop an installation.
const SAMPLES: i64 = 5;
const ROTATE_BATCH: i64 = 500;
const LIMIT: Duration = Duration::from_secs(30);

/// Why the keys do not fit the stored secrets.
#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    /// The database.
    #[error(transparent)]
    Database(#[from] DbError),
    /// Secrets were sealed with keys that are not configured.
    #[error(
        "POSTROOM_ENCRYPTION_KEYS lacks keys that stored secrets were sealed with: {}; add them after the active one, \
         or `KID:lost` for one that is gone for good",
        .0.join(", ")
    )]
    UnknownKeys(Vec<String>),
    /// A key has the right id but is another key.
    #[error(
        "POSTROOM_ENCRYPTION_KEYS: key `{0}` is not the key of that id that stored secrets were sealed with"
    )]
    WrongKey(String),
}

impl From<tokio_postgres::Error> for StoredError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Checks that the key ring opens what is stored. Every process that needs secrets does this before it starts.
///
/// # Errors
/// If a stored secret's key is missing or another one; or the database cannot be read.
pub async fn verify_keys(db: &Database, keys: &Keyring) -> Result<(), StoredError> {
    within(async {
        let mut unknown = Vec::new();
        for column in COLUMNS {
            let samples = sample(db, keys, column).await?;
            if !column.is_needed {
                warn_of_unopened(column, &samples);
                continue;
            }
            for (kid, opened) in best(&samples) {
                match opened {
                    Opened::Yes => {}
                    Opened::NoKey if keys.has_lost(kid) => {
                        tracing::warn!(
                            table = column.table,
                            key = kid,
                            "secrets sealed with a key that is lost must be set anew: `postroom key rotate` lists them"
                        );
                    }
                    Opened::NoKey => unknown.push(kid.to_owned()),
                    Opened::No => return Err(StoredError::WrongKey(kid.to_owned())),
                }
            }
        }
        unknown.sort();
        unknown.dedup();
        if unknown.is_empty() {
            Ok(())
        } else {
            Err(StoredError::UnknownKeys(unknown))
        }
    })
    .await
}

/// Checks that what is sealed with the ring can be opened by the processes that need it. A ring whose active key opens
/// something that is stored may seal, whatever else does not open: that is how a damaged secret is set anew.
///
/// # Errors
/// If nothing that was sealed with a key of the active one's id opens; where nothing was, as [`verify_keys`].
pub async fn verify_sealing(db: &Database, keys: &Keyring) -> Result<(), StoredError> {
    let is_proven = within(async {
        let mut is_proven = None;
        for column in COLUMNS {
            let samples = sample(db, keys, column).await?;
            match best(&samples).get(keys.active()) {
                Some(Opened::Yes) => return Ok(Some(true)),
                Some(_) if column.is_needed => is_proven = Some(false),
                _ => {}
            }
        }
        Ok(is_proven)
    })
    .await?;
    match is_proven {
        Some(true) => Ok(()),
        Some(false) => Err(StoredError::WrongKey(keys.active().to_owned())),
        None => verify_keys(db, keys).await,
    }
}

/// A stored value that was tried.
struct Sample {
    kid: String,
    aad: String,
    opened: Opened,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opened {
    Yes,
    No,
    NoKey,
}

/// Tries some values of every key id found in the column.
async fn sample(db: &Database, keys: &Keyring, column: &SealedColumn) -> Result<Vec<Sample>, StoredError> {
    let (key_list, name) = (column.keys.join(", "), column.column);
    let sql = db.sql(&format!(
        "SELECT {name}, {key_list} FROM (SELECT {name}, {key_list}, \
         row_number() OVER (PARTITION BY split_part({name}, ':', 2) ORDER BY {key_list}) AS n \
         FROM {{s}}.{table} WHERE {name} IS NOT NULL) AS sampled WHERE n <= $1",
        table = column.table
    ));
    let rows = db
        .client()
        .await?
        .query_typed(&sql, &[(&SAMPLES, Type::INT8)])
        .await?;
    let mut samples = Vec::new();
    for row in &rows {
        let (sealed, aad) = sealed_and_aad(row, column)?;
        let Ok(kid) = Keyring::kid_of(sealed) else {
            tracing::warn!(
                table = column.table,
                column = name,
                aad,
                "a stored secret has no known form: set it anew"
            );
            continue;
        };
        let opened = match keys.open_bytes(sealed, &aad) {
            Ok(_) => Opened::Yes,
            Err(SecretError::UnknownKey { .. }) => Opened::NoKey,
            Err(SecretError::Corrupt | SecretError::Format) => Opened::No,
        };
        let kid = kid.to_owned();
        samples.push(Sample { kid, aad, opened });
    }
    Ok(samples)
}

/// By key id: whether any of its values opened.
fn best(samples: &[Sample]) -> BTreeMap<&str, Opened> {
    let mut found = BTreeMap::new();
    for sample in samples {
        let best = found.entry(sample.kid.as_str()).or_insert(sample.opened);
        if sample.opened == Opened::Yes {
            *best = sample.opened;
        }
    }
    found
}

fn warn_of_unopened(column: &SealedColumn, samples: &[Sample]) {
    for sample in samples.iter().filter(|sample| sample.opened != Opened::Yes) {
        tracing::warn!(
            table = column.table,
            column = column.column,
            aad = sample.aad,
            key = sample.kid,
            "a stored secret does not open: it is not used any more"
        );
    }
}

fn sealed_and_aad<'a>(row: &'a Row, column: &SealedColumn) -> Result<(&'a str, String), StoredError> {
    let keys: Vec<&str> = (1..=column.keys.len())
        .map(|index| row.try_get(index))
        .collect::<Result<_, _>>()?;
    Ok((row.try_get(0)?, (column.aad)(&keys)))
}

/// What [`rotate`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rotated {
    /// Values sealed anew with the active key.
    pub resealed: u64,
    /// Where values are that could not be opened, as additional data; at most 100 of them are named.
    pub unopened: Vec<String>,
    /// How many those are.
    pub failed: u64,
}

const NAMED: usize = 100;

/// Seals with the active key whatever was sealed with another. Workers may run meanwhile; a secret that is changed at
/// the same moment keeps the change.
///
/// # Errors
/// If the database fails; what was done until then stays.
pub async fn rotate(db: &Database, keys: &Keyring) -> Result<Rotated, StoredError> {
    let mut rotated = Rotated::default();
    for column in COLUMNS {
        let mut after = Vec::new();
        while let Some(last) = within(rotate_batch(db, keys, column, &after, &mut rotated)).await? {
            after = last;
        }
    }
    Ok(rotated)
}

/// Rotates the next rows in key order; returns the keys of the last one, or `None` at the end.
async fn rotate_batch(
    db: &Database,
    keys: &Keyring,
    column: &SealedColumn,
    after: &Vec<String>,
    rotated: &mut Rotated,
) -> Result<Option<Vec<String>>, StoredError> {
    let (key_list, name, table) = (column.keys.join(", "), column.column, column.table);
    let client = db.client().await?;
    let select = db.sql(&format!(
        "SELECT {name}, {key_list} FROM {{s}}.{table} WHERE {name} IS NOT NULL \
         AND split_part({name}, ':', 2) <> $1 AND ARRAY[{key_list}]::text[] COLLATE \"C\" > $2 \
         ORDER BY ARRAY[{key_list}]::text[] COLLATE \"C\" LIMIT $3"
    ));
    let active = keys.active();
    let rows = client
        .query_typed(
            &select,
            &[
                (&active, Type::TEXT),
                (after, Type::TEXT_ARRAY),
                (&ROTATE_BATCH, Type::INT8),
            ],
        )
        .await?;
    let Some(last) = rows.last() else {
        return Ok(None);
    };
    let last = (1..=column.keys.len())
        .map(|index| last.try_get(index))
        .collect::<Result<_, _>>()?;
    let (mut old, mut new) = (Vec::new(), Vec::new());
    for row in &rows {
        let (sealed, aad) = sealed_and_aad(row, column)?;
        if let Ok(resealed) = keys.reseal(sealed, &aad) {
            old.push(sealed);
            new.push(resealed);
        } else if column.is_needed {
            rotated.failed += 1;
            if rotated.unopened.len() < NAMED {
                rotated.unopened.push(aad);
            }
        }
    }
    // Sealed values are unique, as their nonces are; so the old value finds its row, and only if it is still there.
    let update = db.sql(&format!(
        "UPDATE {{s}}.{table} AS t SET {name} = u.new \
         FROM unnest($1, $2) AS u(old, new) WHERE t.{name} = u.old"
    ));
    rotated.resealed += client
        .execute_typed(&update, &[(&old, Type::TEXT_ARRAY), (&new, Type::TEXT_ARRAY)])
        .await?;
    Ok(Some(last))
}

async fn within<T>(work: impl Future<Output = Result<T, StoredError>>) -> Result<T, StoredError> {
    tokio::time::timeout(LIMIT, work)
        .await
        .map_err(|_| StoredError::Database(DbError::Timeout))?
}

#[cfg(test)]
mod tests;
