//! Accounts: set, show, list, remove.

use std::collections::HashMap;

use deadpool_postgres::Transaction;
use secrecy::ExposeSecret;
use tokio_postgres::types::Type;

use super::change::{AccountChange, connects_differently};
use super::{Store, StoredAccount, limits, within};
use crate::directory::{DirectoryError, row};
use crate::id::{AccountId, AccountKey, TenantId};
use crate::ledger::health;
use crate::secret::stored::{account_password_aad, verify_sealing};

impl Store {
    /// Creates the account if it is missing and changes what is named. The first account of a tenant becomes its
    /// default.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], [`DirectoryError::Incomplete`] for a new account without host, port or TLS mode,
    /// if a value makes no sense, or the database fails; then nothing was changed.
    pub async fn set_account(
        &self,
        tenant: &TenantId,
        id: &AccountId,
        change: &AccountChange,
    ) -> Result<StoredAccount, DirectoryError> {
        if change.password.is_some() {
            let keys = self.keys.as_ref().ok_or(DirectoryError::NoKeys)?;
            // A password sealed with a wrong key would be lost to every worker.
            verify_sealing(&self.db, keys).await?;
        }
        within(self.set_account_now(tenant, id, change)).await
    }

    async fn set_account_now(
        &self,
        tenant: &TenantId,
        id: &AccountId,
        change: &AccountChange,
    ) -> Result<StoredAccount, DirectoryError> {
        let mut client = self.db.client().await?;
        let tx = client.transaction().await?;
        self.lock_tenant(&tx, tenant).await?;
        let siblings = self.read_accounts(&tx, tenant).await?;
        let stored = siblings.iter().find(|account| account.id == *id);
        let current = stored.map_or_else(|| change.blank(tenant, id), |account| Ok(account.clone()))?;
        let mut next = change.apply(&current)?;
        self.apply_password(change, &mut next)?;
        next.is_default |= siblings.is_empty();
        if stored.is_none() {
            self.write_account(&tx, &next).await?;
        } else if next != current {
            next.version += i64::from(connects_differently(&current, &next));
            self.write_account(&tx, &next).await?;
        }
        let key = next.key();
        if next.limits != current.limits {
            self.set_limits(&tx, key.as_str(), &next.limits).await?;
        }
        if next.max_connections != current.max_connections {
            self.set_cap(&tx, key.as_str(), next.max_connections).await?;
        }
        if stored.is_none() || next.version != current.version {
            self.reset_health(&tx, key.as_str()).await?;
        }
        // What is known is of an account that had its name before.
        if stored.is_none() {
            self.forget_health(&tx, key.as_str()).await?;
        }
        let written = self.read_accounts(&tx, tenant).await?;
        tx.commit().await?;
        written
            .into_iter()
            .find(|account| account.id == *id)
            .ok_or(DirectoryError::NoAccount(key))
    }

    /// Seals a new password; the same one again changes nothing.
    fn apply_password(&self, change: &AccountChange, next: &mut StoredAccount) -> Result<(), DirectoryError> {
        if next.username.is_none() {
            next.password = None;
            return match &change.password {
                Some(_) => Err(DirectoryError::Invalid(
                    "a password needs a user name: add --username".to_owned(),
                )),
                None => Ok(()),
            };
        }
        if let Some(password) = &change.password {
            let keys = self.keys.as_ref().ok_or(DirectoryError::NoKeys)?;
            let aad = account_password_aad(&next.tenant, &next.id);
            let same = next.password.as_ref().is_some_and(|sealed| {
                keys.open(sealed, &aad)
                    .is_ok_and(|old| old.expose_secret() == password.expose_secret())
            });
            if password.expose_secret().is_empty() {
                return Err(DirectoryError::Invalid("the password is empty".to_owned()));
            }
            if password.expose_secret().len() > 4_096 || password.expose_secret().contains('\0') {
                return Err(DirectoryError::Invalid(
                    "the password is too long, or contains a NUL".to_owned(),
                ));
            }
            if !same {
                next.password = Some(keys.seal(password.expose_secret().as_bytes(), &aad));
            }
        }
        if next.password.is_none() {
            return Err(DirectoryError::Invalid(
                "a user name needs a password: add --password-stdin".to_owned(),
            ));
        }
        Ok(())
    }

    async fn write_account(
        &self,
        tx: &Transaction<'_>,
        account: &StoredAccount,
    ) -> Result<(), DirectoryError> {
        let (tenant, id) = (account.tenant.as_str(), account.id.as_str());
        if account.is_default {
            let sql = self.db.sql(
                "UPDATE {s}.account SET is_default = false, updated_at = clock_timestamp() \
                 WHERE tenant = $1 AND id <> $2 AND is_default",
            );
            tx.execute_typed(&sql, &[(&tenant, Type::TEXT), (&id, Type::TEXT)])
                .await?;
        }
        // A new account begins at the time in microseconds: above every version that a removed one of its name had.
        let sql = self.db.sql(
            "INSERT INTO {s}.account AS a (tenant, id, host, port, tls, username, password, allow_plaintext_auth, \
             ca_pem, from_address, limits, max_connections, max_attempts, max_age_seconds, is_default, version) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, \
             (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) \
             ON CONFLICT (tenant, id) DO UPDATE SET host = $3, port = $4, tls = $5, username = $6, password = $7, \
             allow_plaintext_auth = $8, ca_pem = $9, from_address = $10, limits = $11, max_connections = $12, \
             max_attempts = $13, max_age_seconds = $14, is_default = $15, version = $16, \
             updated_at = clock_timestamp()",
        );
        let number = |n: Option<u32>| n.map(|n| n as i32);
        let age = account.max_age.map(|age| age.as_secs() as i64);
        tx.execute_typed(
            &sql,
            &[
                (&tenant, Type::TEXT),
                (&id, Type::TEXT),
                (&account.host, Type::TEXT),
                (&i32::from(account.port), Type::INT4),
                (&account.tls.as_str(), Type::TEXT),
                (&account.username, Type::TEXT),
                (&account.password, Type::TEXT),
                (&account.allow_plaintext_auth, Type::BOOL),
                (&account.ca_pem, Type::TEXT),
                (&account.from.as_ref().map(ToString::to_string), Type::TEXT),
                (&limits::to_json(&account.limits), Type::JSONB),
                (&number(account.max_connections), Type::INT4),
                (&number(account.max_attempts), Type::INT4),
                (&age, Type::INT8),
                (&account.is_default, Type::BOOL),
                (&account.version, Type::INT8),
            ],
        )
        .await?;
        Ok(())
    }

    /// Another server or login: what is known of the health of the old one does not hold. Behind limits and caps: see the
    /// lock order in `V2__ledger.sql`.
    async fn reset_health(&self, tx: &Transaction<'_>, key: &str) -> Result<(), DirectoryError> {
        let sql = self.db.sql("SELECT {s}.reset_health_v1($1)");
        tx.execute_typed(&sql, &[(&key, Type::TEXT)]).await?;
        Ok(())
    }

    pub(super) async fn forget_health(&self, tx: &Transaction<'_>, key: &str) -> Result<(), DirectoryError> {
        let sql = self.db.sql("DELETE FROM {s}.account_health WHERE account = $1");
        tx.execute_typed(&sql, &[(&key, Type::TEXT)]).await?;
        Ok(())
    }

    async fn read_accounts(
        &self,
        tx: &Transaction<'_>,
        tenant: &TenantId,
    ) -> Result<Vec<StoredAccount>, DirectoryError> {
        let columns = row::ACCOUNT_COLUMNS;
        let sql = self.db.sql(&format!(
            "SELECT {columns} FROM {{s}}.account a WHERE tenant = $1 ORDER BY id"
        ));
        let rows = tx.query_typed(&sql, &[(&tenant.as_str(), Type::TEXT)]).await?;
        rows.iter()
            .filter_map(|row| row::account(row, 0).transpose())
            .collect()
    }

    /// The accounts of a tenant by name.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], or if the database fails.
    pub async fn accounts(&self, tenant: &TenantId) -> Result<Vec<StoredAccount>, DirectoryError> {
        within(async {
            let mut client = self.db.client().await?;
            let tx = client.transaction().await?;
            let accounts = self.read_accounts(&tx, tenant).await?;
            if accounts.is_empty() {
                self.lock_tenant(&tx, tenant).await?;
            }
            tx.rollback().await?;
            Ok(accounts)
        })
        .await
    }

    /// The accounts of all tenants, by tenant and name.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn all_accounts(&self) -> Result<Vec<StoredAccount>, DirectoryError> {
        within(async {
            let columns = row::ACCOUNT_COLUMNS;
            let sql = self.db.sql(&format!(
                "SELECT {columns} FROM {{s}}.account a ORDER BY tenant, id"
            ));
            let rows = self.db.client().await?.query_typed(&sql, &[]).await?;
            rows.iter()
                .filter_map(|row| row::account(row, 0).transpose())
                .collect()
        })
        .await
    }

    /// One account.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], [`DirectoryError::NoAccount`], or if the database fails.
    pub async fn account(&self, tenant: &TenantId, id: &AccountId) -> Result<StoredAccount, DirectoryError> {
        let accounts = self.accounts(tenant).await?;
        accounts
            .into_iter()
            .find(|account| account.id == *id)
            .ok_or_else(|| DirectoryError::NoAccount(AccountKey::new(tenant, id)))
    }

    /// The state of an account's circuit breaker as listings show it: state, since, until, faults, reason and detail.
    /// `None`: it is closed.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn health(&self, key: &AccountKey) -> Result<Option<serde_json::Value>, DirectoryError> {
        within(async {
            let health = health::read(&self.db, key).await?;
            Ok(health.map(|health| health.to_json()))
        })
        .await
    }

    /// [`Self::health`] of all accounts whose breaker is not closed.
    ///
    /// # Errors
    /// If the database fails.
    pub async fn unhealthy(&self) -> Result<HashMap<AccountKey, serde_json::Value>, DirectoryError> {
        within(async {
            let all = health::read_all(&self.db).await?;
            Ok(all
                .into_iter()
                .map(|(key, health)| (key, health.to_json()))
                .collect())
        })
        .await
    }

    /// Removes an account and its limits. If it was the default, the tenant has none until another is made it.
    ///
    /// # Errors
    /// [`DirectoryError::NoTenant`], [`DirectoryError::NoAccount`], or if the database fails.
    pub async fn remove_account(&self, tenant: &TenantId, id: &AccountId) -> Result<(), DirectoryError> {
        within(async {
            let key = AccountKey::new(tenant, id);
            let mut client = self.db.client().await?;
            let tx = client.transaction().await?;
            self.lock_tenant(&tx, tenant).await?;
            let sql = self
                .db
                .sql("DELETE FROM {s}.account WHERE tenant = $1 AND id = $2");
            let parameters: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
                [(&tenant.as_str(), Type::TEXT), (&id.as_str(), Type::TEXT)];
            if tx.execute_typed(&sql, &parameters).await? == 0 {
                return Err(DirectoryError::NoAccount(key));
            }
            self.set_limits(&tx, key.as_str(), &[]).await?;
            self.set_cap(&tx, key.as_str(), None).await?;
            self.forget_health(&tx, key.as_str()).await?;
            tx.commit().await?;
            Ok(())
        })
        .await
    }
}
