//! Tenants: set, show, list, remove.

use deadpool_postgres::Transaction;
use tokio_postgres::types::Type;

use super::{Store, StoredTenant, check_text, limits, within};
use crate::attachment::LargeFileAction;
use crate::directory::limits::LimitChanges;
use crate::directory::{DirectoryError, row};
use crate::id::TenantId;
use crate::job::{Fallback, OnUncertain};

/// What is to be changed about a tenant; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct TenantChange {
    /// Name for people; empty removes it.
    pub name: Option<String>,
    /// Whether the platform may send for it.
    pub fallback: Option<Fallback>,
    /// What to do about uncertain outcomes.
    pub on_uncertain: Option<OnUncertain>,
    /// Rate limits over all its accounts.
    pub limits: LimitChanges,
    /// Size in bytes from which an attachment is large; 0 removes it.
    pub large_file_bytes: Option<u64>,
    /// What to do with large attachments.
    pub large_file_action: Option<LargeFileAction>,
}

impl TenantChange {
    fn apply(&self, tenant: &StoredTenant) -> Result<StoredTenant, DirectoryError> {
        let mut next = tenant.clone();
        if let Some(name) = &self.name {
            check_text("the name", name)?;
            next.name = (!name.trim().is_empty()).then(|| name.trim().to_owned());
        }
        next.fallback = self.fallback.unwrap_or(next.fallback);
        next.on_uncertain = self.on_uncertain.unwrap_or(next.on_uncertain);
        next.limits = self
            .limits
            .apply(&tenant.limits)
            .map_err(DirectoryError::Invalid)?;
        if let Some(bytes) = self.large_file_bytes {
            if i64::try_from(bytes).is_err() {
                return Err(DirectoryError::Invalid(
                    "the size of large files is too big".to_owned(),
                ));
            }
            next.large_files.threshold = (bytes > 0).then_some(bytes);
        }
        next.large_files.action = self.large_file_action.unwrap_or(next.large_files.action);
        Ok(next)
    }
}

impl Store {
    /// Creates the tenant if it is missing and changes what is named.
    ///
    /// # Errors
    /// If a value makes no sense, or the database fails; then nothing was changed.
    pub async fn set_tenant(
        &self,
        id: &TenantId,
        change: &TenantChange,
    ) -> Result<StoredTenant, DirectoryError> {
        within(async {
            let mut client = self.db.client().await?;
            let tx = client.transaction().await?;
            let insert = self
                .db
                .sql("INSERT INTO {s}.tenant (id) VALUES ($1) ON CONFLICT (id) DO NOTHING");
            tx.execute_typed(&insert, &[(&id.as_str(), Type::TEXT)]).await?;
            self.lock_tenant(&tx, id).await?;
            let columns = row::TENANT_COLUMNS;
            let select = self
                .db
                .sql(&format!("SELECT {columns} FROM {{s}}.tenant t WHERE id = $1"));
            let current = tx.query_typed_one(&select, &[(&id.as_str(), Type::TEXT)]).await?;
            let current = row::tenant(&current)?;
            let next = change.apply(&current)?;
            if next != current {
                self.write_tenant(&tx, &next).await?;
            }
            if next.limits != current.limits {
                self.set_limits(&tx, &limits_key(id), &next.limits).await?;
            }
            tx.commit().await?;
            Ok(next)
        })
        .await
    }

    async fn write_tenant(&self, tx: &Transaction<'_>, tenant: &StoredTenant) -> Result<(), DirectoryError> {
        let sql = self.db.sql(
            "UPDATE {s}.tenant SET name = $2, fallback = $3, on_uncertain = $4, limits = $5, \
             large_file_bytes = $6, large_file_action = $7, updated_at = clock_timestamp() WHERE id = $1",
        );
        let bytes = tenant.large_files.threshold.map(|bytes| bytes as i64);
        tx.execute_typed(
            &sql,
            &[
                (&tenant.id.as_str(), Type::TEXT),
                (&tenant.name, Type::TEXT),
                (&tenant.fallback.as_str(), Type::TEXT),
                (&tenant.on_uncertain.as_str(), Type::TEXT),
                (&limits::to_json(&tenant.limits), Type::JSONB),
                (&bytes, Type::INT8),
                (&tenant.large_files.action.as_str(), Type::TEXT),
            ],
        )
        .await?;
        Ok(())
    }

    /// One tenant.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], or if the database fails.
    pub async fn tenant(&self, id: &TenantId) -> Result<StoredTenant, DirectoryError> {
        within(async {
            let columns = row::TENANT_COLUMNS;
            let sql = self
                .db
                .sql(&format!("SELECT {columns} FROM {{s}}.tenant t WHERE id = $1"));
            let client = self.db.client().await?;
            let found = client
                .query_typed_opt(&sql, &[(&id.as_str(), Type::TEXT)])
                .await?;
            row::tenant(&found.ok_or_else(|| DirectoryError::NoTenant(id.clone()))?)
        })
        .await
    }

    /// All tenants by name, the platform first.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn tenants(&self) -> Result<Vec<StoredTenant>, DirectoryError> {
        within(async {
            let columns = row::TENANT_COLUMNS;
            let sql = self
                .db
                .sql(&format!("SELECT {columns} FROM {{s}}.tenant t ORDER BY id"));
            let rows = self.db.client().await?.query_typed(&sql, &[]).await?;
            rows.iter().map(row::tenant).collect()
        })
        .await
    }

    /// Refuses if jobs of the tenant wait: without it they fail. Some may begin to wait at any time; they fare no worse than
    /// those that come later.
    ///
    /// # Errors
    /// [`DirectoryError::JobsWait`], or if the database fails.
    pub async fn check_none_waits(&self, id: &TenantId) -> Result<(), DirectoryError> {
        within(async {
            let sql = self.db.sql("SELECT FROM {s}.waiting_jobs_v1($1, 1)");
            let client = self.db.client().await?;
            let found = client.query_typed(&sql, &[(&id.as_str(), Type::TEXT)]).await?;
            if found.is_empty() {
                Ok(())
            } else {
                Err(DirectoryError::JobsWait(id.clone()))
            }
        })
        .await
    }

    /// Removes a tenant with its accounts, their limits, what is known of their health, and its endpoints with what waits for
    /// them.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], [`DirectoryError::Platform`], or if the database fails.
    pub async fn remove_tenant(&self, id: &TenantId) -> Result<(), DirectoryError> {
        if id.is_platform() {
            return Err(DirectoryError::Platform);
        }
        within(async {
            let mut client = self.db.client().await?;
            let tx = client.transaction().await?;
            self.lock_tenant(&tx, id).await?;
            let accounts = self.remove_rows(&tx, id).await?;
            self.lock_limits(&tx, id).await?;
            for key in &accounts {
                self.set_cap(&tx, key, None).await?;
            }
            self.set_limits(&tx, &limits_key(id), &[]).await?;
            for key in &accounts {
                self.set_limits(&tx, key, &[]).await?;
            }
            for key in &accounts {
                self.forget_health(&tx, key).await?;
            }
            tx.commit().await?;
            Ok(())
        })
        .await
    }

    /// Deletes the tenant and its accounts; gives the accounts' keys in their order.
    async fn remove_rows(&self, tx: &Transaction<'_>, id: &TenantId) -> Result<Vec<String>, DirectoryError> {
        let accounts = self
            .db
            .sql("DELETE FROM {s}.account WHERE tenant = $1 RETURNING tenant || '/' || id");
        let rows = tx.query_typed(&accounts, &[(&id.as_str(), Type::TEXT)]).await?;
        let mut keys: Vec<String> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        keys.sort_unstable();
        let tenant = self.db.sql("DELETE FROM {s}.tenant WHERE id = $1");
        tx.execute_typed(&tenant, &[(&id.as_str(), Type::TEXT)]).await?;
        Ok(keys)
    }

    /// Locks the limiter's rows of a tenant and its accounts, by key. A changed limit wakes lanes, and no row of the limiter
    /// is locked behind a lane: see the lock order in `V2__ledger.sql`.
    async fn lock_limits(&self, tx: &Transaction<'_>, id: &TenantId) -> Result<(), DirectoryError> {
        // '0' comes after '/'.
        let sql = self
            .db
            .sql("SELECT FROM {s}.rate WHERE key >= $1 || '/' AND key < $1 || '0' ORDER BY key FOR UPDATE");
        tx.query_typed(&sql, &[(&id.as_str(), Type::TEXT)]).await?;
        Ok(())
    }
}

/// The limiter's key of a tenant's own limits.
fn limits_key(id: &TenantId) -> String {
    format!("{id}/")
}
