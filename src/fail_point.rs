//! Fail points: named places at which a test makes this very process die, stand still, panic or lose an answer.
//!
//! They exist only in a build with the cargo feature `fail-points`, which `make test` uses and a release does not: without
//! it every call below is an empty function, and the variable is a setting nobody knows.
//!
//! ```sh
//! POSTROOM_FAIL_POINTS='admitted=error@1; replied=kill@2; leased=panic@job=poison; acked=pause(300ms); acked=kill'
//! ```
//!
//! | action | |
//! |---|---|
//! | `kill` | SIGKILL, at once |
//! | `stop` | SIGSTOP: the whole process stands still until somebody sends SIGCONT |
//! | `pause(300ms)` | this task stands still, the others go on |
//! | `panic` | |
//! | `error` | the answer gets lost although the other side has done its part; at points that ask for an answer |
//!
//! `@2` is the second time only, `@job=ID` only that job (or a batch that holds it). Several rules of one point act in the
//! order in which they stand. What cannot be read, such as the name of a point that is none, ends the process at its start.

#[cfg(feature = "fail-points")]
mod armed;

#[cfg(feature = "fail-points")]
pub use armed::{ArmError, arm, hit, is_variable, loses};

macro_rules! points {
    ($($(#[$doc:meta])+ $point:ident = $name:literal, $answers:literal;)+) => {
        /// A place in the life of a job or report.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Point {
            $($(#[$doc])+ $point,)+
        }

        #[cfg(feature = "fail-points")]
        impl Point {
            /// Every point: its name, and whether an answer can get lost there.
            const ALL: &[(Self, &str, bool)] = &[$((Self::$point, $name, $answers),)+];
        }
    };
}

// The order is that of a job's life, then that of a report.
points! {
    /// Delivered and decoded; the statement that admits or parks it is about to be sent.
    Delivered = "delivered", false;
    /// The admission is committed.
    Admitted = "admitted", true;
    /// A job that is over, or has to wait, before anything is tried: what is to be written of it is about to be planned.
    Planning = "planning", false;
    /// The attempt begins.
    Leased = "leased", false;
    /// The mail is about to be composed: of a suspect twice, the first time while it is watched.
    Composing = "composing", false;
    /// MAIL, RCPT and DATA are accepted, or will go in one flight with the mail; the lease is not looked at yet.
    EnvelopeAccepted = "envelope_accepted", false;
    /// The beginning of the final write of a job that is to be held is committed.
    DataMarked = "data_marked", true;
    /// The last look at the lease said yes.
    BeforeFinalWrite = "before_final_write", false;
    /// A block of the mail that is not its last is out.
    MailHalfWritten = "mail_half_written", false;
    /// The end of the mail is out; no reply yet.
    MailWritten = "mail_written", false;
    /// The attempt is over; its outcome is not written yet.
    Replied = "replied", false;
    /// An outcome, a wait or a give-back is committed.
    Settled = "settled", true;
    /// The worker knows that it is; the delivery is not acknowledged (or given back) yet.
    BeforeAck = "before_ack", false;
    /// The acknowledgement has been handed to the session; the report is not published yet.
    Acked = "acked", false;
    /// A report is confirmed; it is still in the outbox.
    ReportConfirmed = "report_confirmed", true;
    /// Due jobs of the waiting room are leased.
    Released = "released", true;
    /// The body of a job in flight elsewhere is stored; its delivery is not acknowledged yet.
    Absorbed = "absorbed", true;
    /// The jobs of dead epochs are taken over; those in their final write are not decided about yet.
    TakenOver = "taken_over", false;
    /// A dead letter is confirmed; its report is not published, its delivery not acknowledged.
    DeadLettered = "dead_lettered", false;
    /// The bridge has reports in hand that are not recorded.
    ReportsTaken = "reports_taken", false;
    /// They are recorded; their deliveries are not acknowledged.
    ReportsRecorded = "reports_recorded", true;
    /// A webhook has answered; the outcome is not recorded.
    WebhookAnswered = "webhook_answered", false;
}

/// A point is reached on behalf of these jobs (none, where nobody knows them).
#[cfg(not(feature = "fail-points"))]
#[inline]
pub fn hit<'a>(_: Point, _: impl IntoIterator<Item = &'a str>) {}

/// The same where an answer has come in: whether it is to be treated as lost.
#[cfg(not(feature = "fail-points"))]
#[inline]
#[must_use]
pub fn loses<'a>(_: Point, _: impl IntoIterator<Item = &'a str>) -> bool {
    false
}

/// Whether an environment variable is that of the fail points.
#[cfg(not(feature = "fail-points"))]
#[must_use]
pub const fn is_variable(_: &str) -> bool {
    false
}
