//! The sorts of messages, and how many there are of each.

/// Messages published in all.
pub(crate) const TOTAL: usize = 1000;

/// A sort of message; each is a row of the table at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Text,
    Html,
    Both,
    Copies,
    InlineImage,
    SmallFile,
    LargeFile,
    FetchedFile,
    FetchedLarge,
    Compressed,
    Scheduled,
    Newsletter,
    Urgent,
    Greylisted,
    PartlyGreylisted,
    PartlyRefused,
    Platform,
    SealedServer,
    PlainServer,
    Refused,
    NoSender,
    Expired,
    UnknownTenant,
    UnknownAccount,
    Malformed,
    Misspelt,
    SameIdOtherContent,
    Repeated,
}

/// How many messages of a kind there are.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) kind: Kind,
    pub(crate) count: usize,
    /// Begins the ids of its jobs.
    pub(crate) slug: &'static str,
    /// Its name in the table.
    pub(crate) label: &'static str,
}

const fn share(kind: Kind, count: usize, slug: &'static str, label: &'static str) -> Share {
    Share {
        kind,
        count,
        slug,
        label,
    }
}

/// All kinds, in the order of [`Kind`].
pub(crate) const SHARES: &[Share] = &[
    share(Kind::Text, 235, "text", "plain text"),
    share(Kind::Html, 120, "html", "HTML"),
    share(Kind::Both, 120, "both", "text and HTML, in five languages"),
    share(Kind::Copies, 60, "copies", "several recipients, Cc and Bcc"),
    share(Kind::InlineImage, 50, "image", "inline image"),
    share(Kind::SmallFile, 50, "file", "attachment"),
    share(Kind::LargeFile, 25, "large", "large attachment: becomes a link"),
    share(Kind::FetchedFile, 25, "fetched", "attachment from a URL"),
    share(
        Kind::FetchedLarge,
        10,
        "fetched-large",
        "large attachment from a URL: a link",
    ),
    share(Kind::Compressed, 30, "gzip", "published with gzip"),
    share(Kind::Scheduled, 10, "scheduled", "scheduled by send_at"),
    share(Kind::Newsletter, 119, "news", "rate-limited account"),
    share(Kind::Urgent, 1, "urgent", "the same account's immediate mail"),
    share(Kind::Greylisted, 20, "later", "deferred with 451, then taken"),
    share(
        Kind::PartlyGreylisted,
        5,
        "one-later",
        "one recipient of two deferred",
    ),
    share(Kind::PartlyRefused, 15, "partly", "one recipient of two refused"),
    share(Kind::Platform, 20, "platform", "sent by the platform instead"),
    share(Kind::SealedServer, 10, "sealed-server", "smtp_override, sealed"),
    share(Kind::PlainServer, 5, "plain-server", "smtp_override, plain"),
    share(Kind::Refused, 20, "refused", "recipient refused with 550"),
    share(Kind::NoSender, 5, "no-sender", "tenant without an account"),
    share(Kind::Expired, 5, "expired", "expired before it came"),
    share(Kind::UnknownTenant, 5, "who", "unknown tenant"),
    share(Kind::UnknownAccount, 4, "which", "unknown account"),
    share(Kind::Malformed, 5, "broken", "malformed JSON"),
    share(Kind::Misspelt, 6, "misspelt", "misspelt field"),
    share(Kind::SameIdOtherContent, 6, "conflict", "known id, other content"),
    share(Kind::Repeated, 14, "repeated", "known id, same content"),
];

const _: () = {
    let (mut index, mut sum) = (0, 0);
    while index < SHARES.len() {
        assert!(SHARES[index].kind as usize == index, "in the order of Kind");
        sum += SHARES[index].count;
        index += 1;
    }
    assert!(sum == TOTAL, "the kinds add up to the whole");
};

impl Kind {
    pub(crate) fn share(self) -> &'static Share {
        &SHARES[self as usize]
    }

    /// The id of the `n`th job of this kind.
    pub(crate) fn id(self, n: usize) -> String {
        format!("{}-{n:03}", self.share().slug)
    }

    /// Whether its jobs wait before they are sent, or are published late: they say nothing about speed.
    pub(crate) fn waits(self) -> bool {
        matches!(
            self,
            Self::Scheduled
                | Self::Newsletter
                | Self::Urgent
                | Self::Greylisted
                | Self::PartlyGreylisted
                | Self::FetchedFile
                | Self::SameIdOtherContent
                | Self::Repeated
        )
    }
}

/// What becomes of a message, in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Sent,
    Partial,
    Failed,
    Expired,
    Rejected,
    Duplicate,
}

impl Outcome {
    pub(crate) const ALL: [Self; 6] = [
        Self::Sent,
        Self::Partial,
        Self::Failed,
        Self::Expired,
        Self::Rejected,
        Self::Duplicate,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Partial => "partial",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Rejected => "rejected",
            Self::Duplicate => "duplicate",
        }
    }
}
