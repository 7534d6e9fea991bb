//! A migrated schema of its own for each test that needs Postgres; dropped with [`Scratch::end`].

use std::sync::Arc;

use crate::config;
use crate::db::{self, Database};
use crate::secret::Keyring;

/// Bytes 0 to 31.
pub(crate) const KEY: &str = "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
/// Another key under another id.
pub(crate) const OTHER_KEY: &str = "k2:ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8=";

pub(crate) struct Scratch {
    pub(crate) db: Database,
}

impl Scratch {
    pub(crate) async fn new() -> Self {
        Self::connected(4).await
    }

    /// The same, with at most so many connections.
    pub(crate) async fn connected(pool_size: usize) -> Self {
        let url = std::env::var("POSTROOM_TEST_DATABASE_URL")
            .expect("POSTROOM_TEST_DATABASE_URL must name a Postgres server for tests: run `make test`");
        let config = config::Database {
            url: url.into(),
            schema: format!("t_dir_{}", uuid::Uuid::new_v4().simple()),
            ca_file: None,
            pool_size,
        };
        db::migrate(&config).await.unwrap();
        Self {
            db: Database::connect(&config).unwrap(),
        }
    }

    pub(crate) fn store(&self) -> super::Store {
        super::Store::new(self.db.clone(), Some(keys(KEY)))
    }

    /// Runs statements with `{s}` for the schema.
    pub(crate) async fn execute(&self, sql: &str) {
        let sql = self.db.sql(sql);
        self.db.client().await.unwrap().batch_execute(&sql).await.unwrap();
    }

    /// The first column of the only row, as text.
    pub(crate) async fn text(&self, sql: &str) -> String {
        let sql = self.db.sql(sql);
        self.db
            .client()
            .await
            .unwrap()
            .query_one(&sql, &[])
            .await
            .unwrap()
            .get(0)
    }

    pub(crate) async fn end(self) {
        self.execute("DROP SCHEMA {s} CASCADE").await;
    }
}

pub(crate) fn keys(text: &str) -> Arc<Keyring> {
    Arc::new(Keyring::parse(&text.into()).unwrap())
}

/// A job of tenant `acme` from Ann, with nothing special about it.
pub(crate) fn job() -> crate::job::MailJob {
    crate::job::MailJob {
        id: "order-1".parse().unwrap(),
        tenant: "acme".parse().unwrap(),
        account: None,
        from: Some(super::row::parse_mailbox("Ann <ann@acme.example>").unwrap()),
        to: vec![super::row::parse_mailbox("bob@example.com").unwrap()],
        cc: vec![],
        bcc: vec![],
        reply_to: vec![],
        return_path: None,
        subject: None,
        text: Some("hello".to_owned()),
        html: None,
        headers: vec![],
        locale: None,
        list_unsubscribe: None,
        attachments: vec![],
        send_at: None,
        expires_at: None,
        batch: None,
        tags: vec![],
        metadata: None,
        smtp_override: None,
        fallback: None,
        on_uncertain: None,
        digest: [0; 32],
    }
}
