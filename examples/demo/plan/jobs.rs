//! The jobs of every kind, each with what must come of it.

use std::io::Write as _;

use jiff::SignedDuration;
use postroom::level::Level;
use serde_json::{Map, Value, json};

use super::kind::SHARES;
use super::letter::{self, Delivered, File};
use super::{Expect, Kind, LARGE_FILE_BYTES, Mail, Message, OWN_LOGIN, PLATFORM_FROM, Surroundings};

/// The account that sends most jobs of a tenant.
struct Shop {
    tenant: &'static str,
    login: &'static str,
    from: &'static str,
}

const SHOPS: [Shop; 3] = [
    Shop {
        tenant: "acme",
        login: "acme-main",
        from: "shop@acme.example",
    },
    Shop {
        tenant: "globex",
        login: "globex-main",
        from: "orders@globex.example",
    },
    Shop {
        tenant: "initech",
        login: "initech-main",
        from: "hello@initech.example",
    },
];

/// A job being written together with what is expected of it.
struct Draft {
    message: Message,
    json: Map<String, Value>,
    mail: Mail,
}

/// The `n`th message of a kind.
pub(super) fn message(kind: Kind, n: usize, around: &Surroundings) -> Message {
    match kind {
        Kind::Repeated => return repeated(n, around),
        Kind::SameIdOtherContent => return conflicting(n),
        _ => {}
    }
    let mut draft = Draft::new(kind, n);
    match kind {
        Kind::Html => draft.bodies(n, false, true),
        Kind::Both | Kind::Compressed => draft.bodies(n, true, true),
        Kind::Copies => draft.copies(n),
        Kind::InlineImage => draft.inline_image(n),
        Kind::SmallFile => draft.attach(&File::noise("terms.pdf", n, 2000, Delivered::Attached), None),
        Kind::LargeFile => {
            draft.bodies(n, true, n % 2 == 0);
            // Five contents for all of them: what is stored already is not stored again.
            let file = File::noise("catalogue.pdf", n % 5, LARGE_FILE_BYTES + 9000, Delivered::Linked);
            draft.attach(&file, None);
        }
        Kind::FetchedFile => {
            let (url, file) = &around.fetched[if n == 0 { around.fetched.len() - 1 } else { n % 3 }];
            draft.attach(file, Some(url));
            draft.mail.attempts = if n == 0 { 2 } else { 1 };
        }
        Kind::FetchedLarge => draft.attach(&around.fetched_large.1, Some(&around.fetched_large.0)),
        Kind::Scheduled => draft.scheduled(n, around),
        Kind::Newsletter | Kind::Urgent => draft.newsletter(kind),
        Kind::Greylisted => {
            draft.to(&[&format!("later-{n}@example.org")], &[]);
            draft.mail.attempts = 2;
        }
        Kind::PartlyGreylisted => {
            draft.to(
                &[
                    &format!("ready-{n}@example.org"),
                    &format!("later-again-{n}@example.org"),
                ],
                &[],
            );
            (draft.mail.attempts, draft.mail.mails) = (2, 2);
        }
        Kind::PartlyRefused => draft.to(
            &[&format!("here-{n}@example.org")],
            &[&format!("nobody-{n}@example.org")],
        ),
        Kind::Refused => {
            draft.to(&[], &[&format!("nobody-{n}@example.net")]);
            draft.message.expect = Expect::Failed("recipient_unknown");
        }
        Kind::Platform => {
            draft.tenant("hooli");
            draft
                .json
                .insert("from".to_owned(), json!("Hooli <news@hooli.example>"));
            (draft.mail.login, draft.mail.via, draft.mail.from) = ("platform", "platform", PLATFORM_FROM);
        }
        Kind::SealedServer | Kind::PlainServer => draft.own_server(kind, around),
        Kind::NoSender => draft.ends("umbrella", Expect::Failed("sender_not_configured")),
        Kind::Expired => {
            let past = around.now - SignedDuration::from_mins(1);
            draft
                .json
                .insert("expires_at".to_owned(), json!(past.to_string()));
            draft.message.expect = Expect::Expired;
        }
        Kind::UnknownTenant => draft.ends("nobody-knows", Expect::Rejected("unknown_tenant")),
        Kind::UnknownAccount => {
            draft.json.insert("account".to_owned(), json!("typo"));
            draft.message.expect = Expect::Rejected("unknown_account");
        }
        Kind::Malformed => draft.message.expect = Expect::Rejected("not_json"),
        Kind::Misspelt => {
            let subject = draft.json.remove("subject").unwrap_or_default();
            draft.json.insert("subjcet".to_owned(), subject);
            draft.message.expect = Expect::Rejected("invalid");
        }
        Kind::Text | Kind::Repeated | Kind::SameIdOtherContent => {}
    }
    draft.finish()
}

/// A job published once more, without a change: some at once, some while the first waits for its account, some after
/// its final report.
fn repeated(n: usize, around: &Surroundings) -> Message {
    let original = if n % 7 == 6 {
        message(Kind::Newsletter, 100 + n, around)
    } else {
        message(Kind::Text, n, around)
    };
    Message {
        kind: Kind::Repeated,
        after_original: n % 2 == 1 && original.kind == Kind::Text,
        expect: Expect::Duplicate,
        ..original
    }
}

/// Another mail under the id of a job that is over.
fn conflicting(n: usize) -> Message {
    let mut draft = Draft::new(Kind::Text, 100 + n);
    draft
        .json
        .insert("subject".to_owned(), json!("Something else altogether"));
    draft.message.kind = Kind::SameIdOtherContent;
    draft.message.after_original = true;
    draft.message.expect = Expect::Conflict;
    draft.finish()
}

impl Draft {
    /// A text mail of one of the shops to one recipient.
    fn new(kind: Kind, n: usize) -> Self {
        let shop = &SHOPS[n % SHOPS.len()];
        let id = kind.id(n);
        let subject = letter::subject(n, &id);
        let to = format!("customer-{}-{n}@example.org", kind.share().slug);
        let mail = Mail {
            login: shop.login,
            via: "account",
            from: shop.from,
            accepted: vec![to.clone()],
            refused: Vec::new(),
            hidden: Vec::new(),
            mails: 1,
            attempts: 1,
            subject: subject.clone(),
            text: None,
            html: None,
            files: Vec::new(),
            not_before: None,
        };
        let json =
            json!({"id": id, "tenant": shop.tenant, "to": to, "subject": subject, "metadata": {"n": n}});
        let message = Message {
            kind,
            level: Level::ALL[n % 4],
            tenant: shop.tenant,
            id: Some(id),
            body: Vec::new(),
            gzip: kind == Kind::Compressed,
            after_original: false,
            expect: Expect::Duplicate,
        };
        let mut draft = Self {
            json: json.as_object().cloned().unwrap_or_default(),
            mail: mail.clone(),
            message,
        };
        draft.message.expect = Expect::Sent(Box::new(mail));
        draft.bodies(n, true, false);
        draft
    }

    fn tenant(&mut self, tenant: &'static str) {
        self.message.tenant = tenant;
        self.json.insert("tenant".to_owned(), json!(tenant));
    }

    /// A tenant for whom no mail is sent.
    fn ends(&mut self, tenant: &'static str, expect: Expect) {
        self.tenant(tenant);
        self.json.insert("from".to_owned(), json!("somebody@example.com"));
        self.message.expect = expect;
    }

    fn bodies(&mut self, n: usize, text: bool, html: bool) {
        self.mail.text = text.then(|| letter::text(n));
        self.mail.html = html.then(|| letter::html(n, false));
        self.json.insert("text".to_owned(), json!(self.mail.text));
        self.json.insert("html".to_owned(), json!(self.mail.html));
    }

    /// Recipients who get it, and recipients whom the server refuses.
    fn to(&mut self, accepted: &[&str], refused: &[&str]) {
        let owned = |list: &[&str]| list.iter().map(|&address| address.to_owned()).collect();
        (self.mail.accepted, self.mail.refused) = (owned(accepted), owned(refused));
        self.json
            .insert("to".to_owned(), json!([accepted, refused].concat()));
    }

    fn copies(&mut self, n: usize) {
        let address = |name: &str| format!("{name}-{n}@example.org");
        let (to, cc, bcc) = (address("ann"), address("carl"), address("secret"));
        self.json.insert(
            "to".to_owned(),
            json!({"address": to, "name": "Änne, \"the\" Müller"}),
        );
        self.json.insert("cc".to_owned(), json!([format!("Carl <{cc}>")]));
        self.json.insert("bcc".to_owned(), json!([bcc]));
        self.mail.hidden = vec![bcc.clone()];
        self.mail.accepted = vec![to, cc, bcc];
    }

    fn inline_image(&mut self, n: usize) {
        let html = letter::html(n, true);
        self.json.insert("html".to_owned(), json!(html));
        self.mail.html = Some(html);
        let logo = letter::logo();
        let Delivered::Inline(cid) = logo.delivered else {
            return;
        };
        let inline =
            json!([{"filename": logo.name, "inline": true, "content_id": cid, "base64": logo.base64()}]);
        self.json.insert("attachments".to_owned(), inline);
        self.mail.files = vec![logo];
    }

    /// A file in the job itself or behind a URL. Only the first two shops let large ones be rewritten.
    fn attach(&mut self, file: &File, url: Option<&str>) {
        if file.delivered == Delivered::Linked && self.message.tenant == "initech" {
            self.shop(0);
        }
        let source = match url {
            Some(url) => json!({"filename": file.name, "url": url}),
            None => json!({"filename": file.name, "base64": file.base64()}),
        };
        self.json.insert("attachments".to_owned(), json!([source]));
        self.mail.files = vec![file.clone()];
    }

    fn shop(&mut self, index: usize) {
        let shop = &SHOPS[index];
        self.tenant(shop.tenant);
        (self.mail.login, self.mail.from) = (shop.login, shop.from);
    }

    fn scheduled(&mut self, n: usize, around: &Surroundings) {
        let at = around.now + SignedDuration::from_millis(3000 + 300 * n as i64);
        self.json.insert("send_at".to_owned(), json!(at.to_string()));
        self.mail.not_before = Some(at);
    }

    fn newsletter(&mut self, kind: Kind) {
        self.shop(0);
        self.json.insert("account".to_owned(), json!("news"));
        (self.mail.login, self.mail.from) = ("acme-news", "news@acme.example");
        self.message.level = if kind == Kind::Urgent {
            Level::Immediate
        } else {
            Level::Low
        };
    }

    fn own_server(&mut self, kind: Kind, around: &Surroundings) {
        let mut server = json!({
            "host": "127.0.0.1", "port": around.own_port, "tls": "implicit",
            "username": OWN_LOGIN, "password": around.own_password,
        });
        if kind == Kind::SealedServer {
            server["tenant"] = json!(self.message.tenant);
            server["exp"] = json!(around.now.as_second() + 3600);
            server = json!(around.sealing.seal(&server));
        }
        self.json.insert("smtp_override".to_owned(), server);
        self.json
            .insert("from".to_owned(), json!("Ann <ann@own.example>"));
        (self.mail.login, self.mail.via, self.mail.from) = (OWN_LOGIN, "override", "ann@own.example");
    }

    fn finish(self) -> Message {
        let Self {
            mut message,
            json,
            mail,
        } = self;
        if let Expect::Sent(expected) = &mut message.expect {
            **expected = mail;
        }
        message.body = Value::Object(json).to_string().into_bytes();
        if message.kind == Kind::Malformed {
            message.body.truncate(message.body.len() / 2);
            message.id = None;
        }
        if message.gzip {
            message.body = compressed(&message.body);
        }
        message
    }
}

fn compressed(body: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    // Writing to memory does not fail.
    let _ = encoder.write_all(body);
    encoder.finish().unwrap_or_default()
}

const _: () = assert!(
    SHARES[Kind::Text as usize].count >= 106 && SHARES[Kind::Newsletter as usize].count >= 114,
    "the jobs that are repeated exist"
);
