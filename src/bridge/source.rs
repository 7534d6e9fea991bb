//! What the bridge needs of the broker: batches of reports in, a report of its own out.

use bytes::Bytes;

/// A report as it lies in the queue.
#[derive(Debug)]
pub struct Delivery<H> {
    /// What the source needs to ack it.
    pub handle: H,
    /// AMQP `message_id`: the event id.
    pub event_id: Option<String>,
    /// `report.<tenant>.<type>`.
    pub routing_key: String,
    /// The report.
    pub body: Bytes,
}

/// Where reports come from: the queue `mail.reports.bridge`.
pub trait ReportSource: Send {
    /// Names one delivery. A handle of a session that is gone is simply ignored: the broker delivers it again.
    type Handle: Send;

    /// Waits for reports and gives all that are there, at most `max`, in order of delivery. Reconnects by itself;
    /// `None` when it is closed for good. Must be cancel-safe: what was not returned stays unacked in the queue.
    fn next_batch(&mut self, max: usize) -> impl Future<Output = Option<Vec<Delivery<Self::Handle>>>> + Send;

    /// Acks reports that are in Postgres, in order of delivery and with nothing older outstanding, so that one
    /// `basic.ack` with `multiple` will do.
    fn ack(&mut self, batch: Vec<Self::Handle>) -> impl Future<Output = ()> + Send;

    /// Moves something that is no report to `mail.reports.dead`, with `x-dead-reason` and `x-dead-detail`, and takes
    /// it off the queue once that is confirmed. If it cannot be confirmed, it is rejected without requeueing, so that
    /// the queue's own dead-letter exchange takes it: left unacked, the next [`ack`](Self::ack) would take it along.
    fn dead_letter(
        &mut self,
        handle: Self::Handle,
        reason: &'static str,
        detail: String,
    ) -> impl Future<Output = ()> + Send;
}

/// A report of the bridge's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnReport {
    /// Goes into `message_id`.
    pub event_id: String,
    /// Of the reports exchange.
    pub routing_key: String,
    /// The JSON.
    pub body: Vec<u8>,
}

/// Where the bridge's own reports go: the reports exchange, from which they come back like any other.
pub trait ReportSink: Send + Sync {
    /// Publishes with confirm, within a time limit of its own. The text of an error is for the log.
    fn publish(&self, report: OwnReport) -> impl Future<Output = Result<(), String>> + Send;
}
