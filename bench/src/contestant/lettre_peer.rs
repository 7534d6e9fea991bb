//! The contestants in Rust: consume, decode, send with lettre, publish a report, and acknowledge once it is confirmed.

use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer, PublisherConfirm};
use lettre::message::{Attachment, Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::PoolConfig;
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Message, Tokio1Executor};
use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, mpsc};

use super::plain::Bare;
use crate::Failed;
use crate::installation::{JOBS, REPORTS};

/// Where to.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    amqp: String,
    #[arg(long)]
    pub(super) port: u16,
    #[arg(long)]
    connections: usize,
    /// TLS, verified by this authority, and a login.
    #[arg(long)]
    pub(super) ca: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Job<'a> {
    id: &'a str,
    tenant: &'a str,
    to: To,
    subject: &'a str,
    text: Option<String>,
    html: Option<String>,
    #[serde(default)]
    attachments: Vec<File<'a>>,
}

#[derive(Debug, Deserialize)]
struct File<'a> {
    filename: &'a str,
    base64: &'a str,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum To {
    One(String),
    Many(Vec<String>),
}

/// About as much as a report of the product says.
#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    id: String,
    tenant: &'a str,
    job: &'a str,
    time: String,
    message_id: String,
    results: Vec<Outcome<'a>>,
}

#[derive(Debug, Serialize)]
struct Outcome<'a> {
    address: &'a str,
    status: &'a str,
    reply: &'a str,
}

/// lettre's bare connection, one per task.
pub(crate) async fn plain(options: Options) -> Result<(), Failed> {
    let broker = Broker::connect(&options).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..options.connections {
        let (broker, options) = (broker.clone(), options.clone());
        tasks.spawn(async move {
            let mut connection = Bare::connect(&options).await?;
            while let Some(delivery) = broker.next().await? {
                let (message, report) = prepare(&delivery)?;
                connection.send(&message).await?;
                broker.report(report, delivery).await?;
            }
            Ok::<(), Failed>(())
        });
    }
    first_end(tasks).await
}

/// lettre's pool as released.
pub(crate) async fn pool(options: Options) -> Result<(), Failed> {
    let broker = Broker::connect(&options).await?;
    let size = PoolConfig::new().max_size(u32::try_from(options.connections)?);
    let transport = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous("127.0.0.1")
        .port(options.port)
        .pool_config(size)
        .build();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..options.connections {
        let (broker, transport) = (broker.clone(), transport.clone());
        tasks.spawn(async move {
            while let Some(delivery) = broker.next().await? {
                let (message, report) = prepare(&delivery)?;
                transport.send(message).await?;
                broker.report(report, delivery).await?;
            }
            Ok::<(), Failed>(())
        });
    }
    first_end(tasks).await
}

async fn first_end(mut tasks: tokio::task::JoinSet<Result<(), Failed>>) -> Result<(), Failed> {
    match tasks.join_next().await {
        Some(ended) => ended?,
        None => Ok(()),
    }
}

/// The mail, and the report with its routing key.
fn prepare(delivery: &Delivery) -> Result<(Message, (String, Vec<u8>)), Failed> {
    let job: Job<'_> = serde_json::from_slice(&delivery.data)?;
    let to = match &job.to {
        To::One(one) => std::slice::from_ref(one),
        To::Many(many) => many,
    };
    let mut message = Message::builder()
        .from("shop@example.com".parse::<Mailbox>()?)
        .subject(job.subject)
        .message_id(None);
    for address in to {
        message = message.to(address.parse()?);
    }
    let message = if let Some(html) = job.html {
        let mut parts = MultiPart::mixed().singlepart(SinglePart::html(html));
        for file in job.attachments {
            let content = STANDARD.decode(file.base64)?;
            let pdf = Attachment::new(file.filename.to_owned()).body(content, "application/pdf".parse()?);
            parts = parts.singlepart(pdf);
        }
        message.multipart(parts)?
    } else {
        message.body(job.text.unwrap_or_default())?
    };
    let id = message
        .headers()
        .get_raw("Message-ID")
        .unwrap_or_default()
        .to_owned();
    let outcome = |address| Outcome {
        address,
        status: "sent",
        reply: "250 2.0.0 taken",
    };
    let report = Report {
        kind: "mail.sent",
        id: format!("{}/{}/1", job.tenant, job.id),
        tenant: job.tenant,
        job: job.id,
        time: jiff::Timestamp::now().to_string(),
        message_id: id,
        results: to.iter().map(|address| outcome(address.as_str())).collect(),
    };
    let body = serde_json::to_vec(&report)?;
    Ok((message, (format!("report.{}.mail.sent", job.tenant), body)))
}

/// The session with `RabbitMQ`: one channel; confirms are awaited off the path of the mails.
#[derive(Clone)]
struct Broker {
    channel: Channel,
    consumer: Arc<Mutex<Consumer>>,
    confirms: mpsc::Sender<(PublisherConfirm, Delivery)>,
    _connection: Arc<Connection>,
}

impl Broker {
    async fn connect(options: &Options) -> Result<Self, Failed> {
        let connection = Connection::connect(&options.amqp, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        // What the product has in hand by default, too.
        channel.basic_qos(256, BasicQosOptions::default()).await?;
        let consumer = channel
            .basic_consume(
                JOBS.into(),
                "bench".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        let (confirms, confirmed) = mpsc::channel(256);
        tokio::spawn(acknowledge(confirmed));
        Ok(Self {
            channel,
            consumer: Arc::new(Mutex::new(consumer)),
            confirms,
            _connection: Arc::new(connection),
        })
    }

    async fn next(&self) -> Result<Option<Delivery>, Failed> {
        Ok(self.consumer.lock().await.next().await.transpose()?)
    }

    async fn report(&self, (key, body): (String, Vec<u8>), delivery: Delivery) -> Result<(), Failed> {
        let properties = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_type("application/json".into());
        let options = BasicPublishOptions::default();
        let publishing = self
            .channel
            .basic_publish(REPORTS.into(), key.into(), options, &body, properties);
        let confirm = publishing.await?;
        self.confirms
            .send((confirm, delivery))
            .await
            .map_err(|_| "the broker's session has ended".into())
    }
}

async fn acknowledge(mut confirmed: mpsc::Receiver<(PublisherConfirm, Delivery)>) {
    while let Some((confirm, delivery)) = confirmed.recv().await {
        // Without a confirm there is no ack: the job comes again.
        if confirm.await.is_ok_and(|confirm| confirm.is_ack()) {
            let _ = delivery.ack(BasicAckOptions::default()).await;
        }
    }
}
