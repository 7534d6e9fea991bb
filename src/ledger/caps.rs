//! Connection caps of accounts, kept by all workers together.

use super::{Epoch, Ledger};
use crate::db::DbError;
use crate::id::AccountKey;

impl Ledger {
    /// One more connection for this worker, if the account's cap allows it.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn acquire_connection(&self, epoch: &Epoch, account: &AccountKey) -> Result<bool, DbError> {
        let sql = self.db.sql("SELECT {s}.acquire_connection_v1($1, $2)");
        let client = self.db.client().await?;
        let row = client
            .query_one(&sql, &[&epoch.number(), &account.as_str()])
            .await?;
        Ok(row.try_get(0)?)
    }

    /// What this worker really has, if the answers to some of its calls got lost: so many connections of these accounts,
    /// and none of any other.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn restate_connections(
        &self,
        epoch: &Epoch,
        held: &[(AccountKey, u32)],
    ) -> Result<(), DbError> {
        let sql = self.db.sql("SELECT {s}.restate_connections_v1($1, $2, $3)");
        let accounts: Vec<&str> = held.iter().map(|(account, _)| account.as_str()).collect();
        let counts: Vec<i32> = held
            .iter()
            .map(|(_, count)| i32::try_from(*count).unwrap_or(i32::MAX))
            .collect();
        let client = self.db.client().await?;
        client
            .execute(&sql, &[&epoch.number(), &accounts, &counts])
            .await?;
        Ok(())
    }

    /// One connection less.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn release_connection(&self, epoch: i64, account: &AccountKey) -> Result<(), DbError> {
        let sql = self.db.sql("SELECT {s}.release_connection_v1($1, $2)");
        self.db
            .client()
            .await?
            .execute(&sql, &[&epoch, &account.as_str()])
            .await?;
        Ok(())
    }

    /// Accounts whose connections this worker holds while another worker asked in vain.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn wanted_connections(&self, epoch: &Epoch) -> Result<Vec<AccountKey>, DbError> {
        let sql = self.db.sql("SELECT account FROM {s}.wanted_connections_v1($1)");
        let rows = self.db.client().await?.query(&sql, &[&epoch.number()]).await?;
        Ok(rows
            .iter()
            .filter_map(|row| row.try_get(0).ok().map(AccountKey::from_stored))
            .collect())
    }
}
