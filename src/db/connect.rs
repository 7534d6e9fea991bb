//! Opens connections: parameters every one of them gets, and TLS.

use std::future::Future;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use secrecy::ExposeSecret;
use tokio::task::JoinHandle;
use tokio_postgres::config::TargetSessionAttrs;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Error, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::DbError;
use super::pool::Clock;
use super::tls::{self, Proof};
use crate::config::{self, Dsn, SslMode};

/// Time after which the server ends a statement. Batches take milliseconds; what takes this long is stuck, and its
/// caller would rather try again than hold locks.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Time after which the server ends a session that does nothing in an open transaction: its client is gone or stands still,
/// and TCP would keep its locks for hours.
const IDLE_IN_TRANSACTION: Duration = Duration::from_secs(30);
/// TCP connect, per address.
const TCP_CONNECT: Duration = Duration::from_secs(5);
/// Bytes unacknowledged for this long mean that the peer is gone.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(20);
/// An idle connection is probed after this long.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);

/// Opens connections; clones open the same ones.
#[derive(Clone)]
pub(super) struct Connector(Arc<RwLock<Arc<Parameters>>>);

/// Everything needed to open a connection.
struct Parameters {
    /// With the server's time limits as start-up options.
    config: Config,
    /// Without: `PgBouncer` refuses options that it does not track.
    plain: Config,
    /// The server (or what stands in front of it) refused the options.
    refused: AtomicBool,
    tls: Option<MakeRustlsConnect>,
}

impl Connector {
    pub(super) fn new(database: &config::Database) -> Result<Self, DbError> {
        let parameters = Parameters::new(database)?;
        Ok(Self(Arc::new(RwLock::new(Arc::new(parameters)))))
    }

    /// Opens connections elsewhere from now on.
    pub(super) fn replace(&self, database: &config::Database) -> Result<(), DbError> {
        let parameters = Arc::new(Parameters::new(database)?);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = parameters;
        Ok(())
    }

    fn current(&self) -> Arc<Parameters> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Opens one connection, which ends when its clock says that it is late.
    pub(super) async fn open(&self, clock: &Arc<Clock>) -> Result<(Client, JoinHandle<()>), Error> {
        self.current().open(clock).await
    }
}

impl Parameters {
    fn new(database: &config::Database) -> Result<Self, DbError> {
        let dsn = Dsn::parse(database.url.expose_secret()).map_err(DbError::Url)?;
        let mut plain = dsn.for_driver().map_err(DbError::Url)?;
        let ca_files: Vec<&Path> = [database.ca_file.as_deref(), dsn.root_cert.as_deref()]
            .into_iter()
            .flatten()
            .collect();
        let mode = match dsn.mode {
            Some(mode) => mode,
            // Who names an authority wants it to be asked.
            None if !ca_files.is_empty() => SslMode::VerifyFull,
            None => SslMode::Prefer,
        };
        let (driver_mode, proof) = match mode {
            SslMode::Disable => (tokio_postgres::config::SslMode::Disable, None),
            SslMode::Prefer if ca_files.is_empty() => {
                (tokio_postgres::config::SslMode::Prefer, Some(Proof::Nothing))
            }
            SslMode::Prefer => (tokio_postgres::config::SslMode::Prefer, Some(Proof::ChainAndName)),
            SslMode::VerifyCa => (tokio_postgres::config::SslMode::Require, Some(Proof::Chain)),
            SslMode::VerifyFull => (
                tokio_postgres::config::SslMode::Require,
                Some(Proof::ChainAndName),
            ),
        };
        plain.ssl_mode(driver_mode);
        if plain.get_application_name().is_none() {
            plain.application_name("postroom");
        }
        if plain.get_connect_timeout().is_none() {
            plain.connect_timeout(TCP_CONNECT);
        }
        // A name may still lead to the old primary after a failover, and a list of hosts has standbys in it.
        if !dsn.has_target {
            plain.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        plain
            .tcp_user_timeout(TCP_USER_TIMEOUT)
            .keepalives_idle(KEEPALIVE_IDLE);
        let mut config = plain.clone();
        config.options(options(plain.get_options().unwrap_or_default()));
        let tls = proof.map(|proof| tls::connector(proof, &ca_files)).transpose()?;
        Ok(Self {
            config,
            plain,
            refused: AtomicBool::new(false),
            tls,
        })
    }

    async fn open(&self, clock: &Arc<Clock>) -> Result<(Client, JoinHandle<()>), Error> {
        if !self.refused.load(Ordering::Relaxed) {
            match self.open_with(&self.config, clock).await {
                Err(error) if is_refused_option(&error) => self.refused.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        self.open_with(&self.plain, clock).await
    }

    async fn open_with(
        &self,
        config: &Config,
        clock: &Arc<Clock>,
    ) -> Result<(Client, JoinHandle<()>), Error> {
        let clock = Arc::clone(clock);
        if let Some(tls) = &self.tls {
            let (client, connection) = config.connect(tls.clone()).await?;
            Ok((client, tokio::spawn(drive(connection, clock))))
        } else {
            let (client, connection) = config.connect(NoTls).await?;
            Ok((client, tokio::spawn(drive(connection, clock))))
        }
    }
}

/// The server's time limits, and what the URL says besides, which wins.
fn options(given: &str) -> String {
    let (statement, idle) = (STATEMENT_TIMEOUT.as_millis(), IDLE_IN_TRANSACTION.as_millis());
    let limits =
        format!("-c statement_timeout={statement} -c idle_in_transaction_session_timeout={idle} {given}");
    limits.trim().to_owned()
}

/// Runs a connection until it ends.
async fn drive(connection: impl Future<Output = Result<(), Error>>, clock: Arc<Clock>) {
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::warn!(error = %DbError::Statement(error), "database connection lost");
        },
        () = clock.late() => tracing::warn!("database connection given up: no answer in time"),
    }
}

/// `PgBouncer`: "unsupported startup parameter", with the SQLSTATE of a protocol violation.
fn is_refused_option(error: &Error) -> bool {
    error.code() == Some(&SqlState::PROTOCOL_VIOLATION)
        && error
            .as_db_error()
            .is_some_and(|db| db.message().contains("startup parameter"))
}
