//! A job being written together with what must come of it.

use std::io::Write as _;

use jiff::SignedDuration;
use postroom::level::Level;
use serde_json::{Map, Value, json};

use super::letter::{self, Delivered, File};
use super::{Expect, Kind, Mail, Message, OWN_LOGIN, Surroundings};

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
pub(super) struct Draft {
    pub(super) message: Message,
    pub(super) json: Map<String, Value>,
    pub(super) mail: Mail,
}

impl Draft {
    /// A text mail of one of the shops to one recipient.
    pub(super) fn new(kind: Kind, n: usize) -> Self {
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

    /// Sets a field of the job.
    pub(super) fn set(&mut self, field: &str, value: Value) {
        self.json.insert(field.to_owned(), value);
    }

    pub(super) fn tenant(&mut self, tenant: &'static str) {
        self.message.tenant = tenant;
        self.set("tenant", json!(tenant));
    }

    /// A tenant for whom no mail is sent.
    pub(super) fn ends(&mut self, tenant: &'static str, expect: Expect) {
        self.tenant(tenant);
        self.set("from", json!("somebody@example.com"));
        self.message.expect = expect;
    }

    pub(super) fn bodies(&mut self, n: usize, text: bool, html: bool) {
        self.mail.text = text.then(|| letter::text(n));
        self.mail.html = html.then(|| letter::html(n, false));
        self.set("text", json!(self.mail.text));
        self.set("html", json!(self.mail.html));
    }

    /// Recipients who get it, and recipients whom the server refuses.
    pub(super) fn to(&mut self, accepted: &[&str], refused: &[&str]) {
        let owned = |list: &[&str]| list.iter().map(|&address| address.to_owned()).collect();
        (self.mail.accepted, self.mail.refused) = (owned(accepted), owned(refused));
        self.set("to", json!([accepted, refused].concat()));
    }

    pub(super) fn copies(&mut self, n: usize) {
        let address = |name: &str| format!("{name}-{n}@example.org");
        let (to, cc, bcc) = (address("ann"), address("carl"), address("secret"));
        self.set("to", json!({"address": to, "name": "Änne, \"the\" Müller"}));
        self.set("cc", json!([format!("Carl <{cc}>")]));
        self.set("bcc", json!([bcc]));
        self.mail.hidden = vec![bcc.clone()];
        self.mail.accepted = vec![to, cc, bcc];
    }

    pub(super) fn inline_image(&mut self, n: usize) {
        let html = letter::html(n, true);
        self.set("html", json!(html));
        self.mail.html = Some(html);
        let logo = letter::logo();
        let Delivered::Inline(cid) = logo.delivered else {
            return;
        };
        let inline =
            json!([{"filename": logo.name, "inline": true, "content_id": cid, "base64": logo.base64()}]);
        self.set("attachments", inline);
        self.mail.files = vec![logo];
    }

    /// A file in the job itself or behind a URL. Only the first two shops let large ones be rewritten.
    pub(super) fn attach(&mut self, file: &File, url: Option<&str>) {
        if file.delivered == Delivered::Linked && self.message.tenant == "initech" {
            self.shop(0);
        }
        let source = match url {
            Some(url) => json!({"filename": file.name, "url": url}),
            None => json!({"filename": file.name, "base64": file.base64()}),
        };
        self.set("attachments", json!([source]));
        self.mail.files = vec![file.clone()];
    }

    pub(super) fn shop(&mut self, index: usize) {
        let shop = &SHOPS[index];
        self.tenant(shop.tenant);
        (self.mail.login, self.mail.from) = (shop.login, shop.from);
    }

    pub(super) fn scheduled(&mut self, n: usize, around: &Surroundings) {
        let at = around.now + SignedDuration::from_millis(3000 + 300 * n as i64);
        self.set("send_at", json!(at.to_string()));
        self.mail.not_before = Some(at);
    }

    pub(super) fn newsletter(&mut self, kind: Kind) {
        self.shop(0);
        self.set("account", json!("news"));
        (self.mail.login, self.mail.from) = ("acme-news", "news@acme.example");
        self.message.level = if kind == Kind::Urgent {
            Level::Immediate
        } else {
            Level::Low
        };
    }

    pub(super) fn own_server(&mut self, kind: Kind, around: &Surroundings) {
        let mut server = json!({
            "host": "127.0.0.1", "port": around.own_port, "tls": "implicit",
            "username": OWN_LOGIN, "password": around.own_password,
        });
        if kind == Kind::SealedServer {
            server["tenant"] = json!(self.message.tenant);
            server["exp"] = json!(around.now.as_second() + 3600);
            server = json!(around.sealing.seal(&server));
        }
        self.set("smtp_override", server);
        self.set("from", json!("Ann <ann@own.example>"));
        (self.mail.login, self.mail.via, self.mail.from) = (OWN_LOGIN, "override", "ann@own.example");
    }

    pub(super) fn finish(self) -> Message {
        let Self {
            mut message,
            json,
            mail,
        } = self;
        if let Expect::Sent(expected) = &mut message.expect {
            **expected = mail;
        }
        message.body = Value::Object(json).to_string().into_bytes();
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
