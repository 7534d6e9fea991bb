//! What is broken, when and for how long, drawn from the seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::Settings;
use super::plan::SERVERS;
use super::smtp_moods::Mood;

/// Two parties with a network in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pair {
    /// A worker and `RabbitMQ`.
    WorkerRabbit,
    /// A worker and Postgres.
    WorkerPostgres,
    /// All workers and an SMTP server.
    WorkersSmtp,
    /// All workers and the object store.
    WorkersStore,
    /// A bridge and `RabbitMQ`.
    BridgeRabbit,
    /// A bridge and Postgres.
    BridgePostgres,
    /// All bridges and the webhook receiver.
    BridgesWebhook,
}

/// What happens to a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trouble {
    /// Bytes are held back.
    Stall,
    /// Connections are reset, new ones too.
    Reset,
    /// Bytes come late.
    Delay,
    /// Bytes vanish; connections are dead and do not know it.
    Cut,
}

/// A sort of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// SIGKILL; started again after a while.
    WorkerKilled,
    /// SIGSTOP for longer than the lease.
    WorkerStopped,
    /// SIGTERM, and a new one.
    WorkerRolled,
    /// SIGKILL.
    BridgeKilled,
    /// SIGSTOP.
    BridgeStopped,
    /// SIGTERM, and a new one.
    BridgeRolled,
    /// Orderly restart.
    RabbitStopped,
    /// SIGKILL and restart.
    RabbitKilled,
    /// All connections closed through the management API.
    RabbitDropped,
    /// Immediate shutdown, crash recovery at the start.
    PostgresKilled,
    /// `pg_terminate_backend` of everybody.
    PostgresDropped,
    /// A network.
    Net(Pair, Trouble),
    /// An SMTP server misbehaves.
    Smtp(Mood),
    /// The object store answers 503.
    StoreFails,
    /// The webhook receiver answers 500.
    WebhookFails,
    /// The webhook receiver does not answer.
    WebhookHangs,
}

impl Kind {
    /// Its name in the table.
    #[must_use]
    pub fn name(self) -> String {
        let fixed = match self {
            Self::WorkerKilled => "worker killed (SIGKILL)",
            Self::WorkerStopped => "worker stopped for longer than its lease (SIGSTOP)",
            Self::WorkerRolled => "worker rolled (SIGTERM)",
            Self::BridgeKilled => "bridge killed (SIGKILL)",
            Self::BridgeStopped => "bridge stopped (SIGSTOP)",
            Self::BridgeRolled => "bridge rolled (SIGTERM)",
            Self::RabbitStopped => "RabbitMQ restarted",
            Self::RabbitKilled => "RabbitMQ killed (SIGKILL)",
            Self::RabbitDropped => "RabbitMQ closed all connections",
            Self::PostgresKilled => "Postgres restarted (immediate)",
            Self::PostgresDropped => "Postgres terminated all backends",
            Self::StoreFails => "object store failed",
            Self::WebhookFails => "webhook receiver failed",
            Self::WebhookHangs => "webhook receiver hung",
            Self::Net(pair, trouble) => {
                let pair = match pair {
                    Pair::WorkerRabbit => "worker–RabbitMQ",
                    Pair::WorkerPostgres => "worker–Postgres",
                    Pair::WorkersSmtp => "workers–SMTP",
                    Pair::WorkersStore => "workers–object store",
                    Pair::BridgeRabbit => "bridge–RabbitMQ",
                    Pair::BridgePostgres => "bridge–Postgres",
                    Pair::BridgesWebhook => "bridges–webhook",
                };
                let trouble = match trouble {
                    Trouble::Stall => "stalled",
                    Trouble::Reset => "reset",
                    Trouble::Delay => "delayed",
                    Trouble::Cut => "cut half-open",
                };
                return format!("network {pair} {trouble}");
            }
            Self::Smtp(mood) => return format!("SMTP server {}", mood.name()),
        };
        fixed.to_owned()
    }

    /// How many there are to choose the target from.
    fn targets(self, settings: &Settings) -> usize {
        match self {
            Self::WorkerKilled
            | Self::WorkerStopped
            | Self::WorkerRolled
            | Self::Net(Pair::WorkerRabbit | Pair::WorkerPostgres, _) => settings.workers,
            Self::BridgeKilled
            | Self::BridgeStopped
            | Self::BridgeRolled
            | Self::Net(Pair::BridgeRabbit | Pair::BridgePostgres, _) => settings.bridges,
            // The limited account's server is spared what holds mail back on its way: the limit is measured there.
            Self::Smtp(_) | Self::Net(Pair::WorkersSmtp, Trouble::Reset) => SERVERS,
            _ => 1,
        }
    }

    /// In seconds, from and to.
    fn lasts(self, lease: f64) -> (f64, f64) {
        match self {
            Self::WorkerKilled | Self::BridgeKilled => (0.2, 4.0),
            Self::WorkerStopped | Self::BridgeStopped => (lease * 1.2, lease * 2.0),
            Self::WorkerRolled | Self::BridgeRolled | Self::RabbitDropped | Self::PostgresDropped => {
                (0.0, 0.1)
            }
            Self::RabbitStopped | Self::RabbitKilled | Self::PostgresKilled => (0.5, 3.0),
            Self::Net(_, Trouble::Reset) => (0.3, 3.0),
            Self::Net(..) => (lease * 0.6, lease * 1.8),
            Self::Smtp(_) | Self::StoreFails | Self::WebhookFails | Self::WebhookHangs => (3.0, 8.0),
        }
    }
}

/// A fault to come.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// When, from the beginning.
    pub at: Duration,
    /// What.
    pub kind: Kind,
    /// Which of them: worker, bridge or server, from 0.
    pub target: usize,
    /// For how long.
    pub lasts: Duration,
}

/// Every sort at least once, if there are enough of them, in an order of its own.
#[must_use]
pub fn draw(settings: &Settings) -> Vec<Fault> {
    let mut dice = StdRng::seed_from_u64(settings.seed ^ 0xfa17);
    let mut kinds = Vec::with_capacity(settings.faults);
    while kinds.len() < settings.faults {
        let mut deck = deck(settings);
        deck.shuffle(&mut dice);
        kinds.extend(deck);
    }
    kinds.truncate(settings.faults);
    let span = settings.span.as_secs_f64();
    let mut faults: Vec<Fault> = kinds
        .into_iter()
        .map(|kind| {
            let (from, to) = kind.lasts(settings.lease.as_secs_f64());
            Fault {
                at: Duration::from_secs_f64(dice.random_range(span * 0.05..span * 0.92)),
                kind,
                target: dice.random_range(0..kind.targets(settings)),
                lasts: Duration::from_secs_f64(dice.random_range(from..to)),
            }
        })
        .collect();
    faults.sort_by_key(|fault| fault.at);
    faults
}

fn deck(settings: &Settings) -> Vec<Kind> {
    use Pair::{
        BridgePostgres, BridgeRabbit, BridgesWebhook, WorkerPostgres, WorkerRabbit, WorkersSmtp, WorkersStore,
    };
    let mut deck = vec![
        Kind::WorkerKilled,
        Kind::WorkerKilled,
        Kind::WorkerKilled,
        Kind::WorkerStopped,
        Kind::WorkerStopped,
        Kind::WorkerRolled,
        Kind::WorkerRolled,
        Kind::BridgeKilled,
        Kind::BridgeStopped,
        Kind::BridgeRolled,
        Kind::RabbitDropped,
        Kind::PostgresDropped,
        Kind::StoreFails,
        Kind::WebhookFails,
        Kind::WebhookHangs,
    ];
    if settings.restarts {
        deck.extend([
            Kind::RabbitStopped,
            Kind::RabbitKilled,
            Kind::PostgresKilled,
            Kind::PostgresKilled,
        ]);
    }
    let troubles = [Trouble::Stall, Trouble::Reset, Trouble::Delay, Trouble::Cut];
    for pair in [WorkerRabbit, WorkerPostgres, WorkersSmtp] {
        deck.extend(troubles.map(|trouble| Kind::Net(pair, trouble)));
    }
    for (pair, trouble) in [
        (WorkersStore, Trouble::Reset),
        (WorkersStore, Trouble::Stall),
        (BridgeRabbit, Trouble::Reset),
        (BridgeRabbit, Trouble::Cut),
        (BridgePostgres, Trouble::Stall),
        (BridgePostgres, Trouble::Cut),
        (BridgesWebhook, Trouble::Reset),
        (BridgesWebhook, Trouble::Stall),
    ] {
        deck.push(Kind::Net(pair, trouble));
    }
    deck.extend(Mood::ALL.map(Kind::Smtp));
    deck
}
