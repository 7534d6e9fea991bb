//! What stands in the mails: subjects, bodies and files.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// A file of a job, and how it must arrive.
#[derive(Clone)]
pub(crate) struct File {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) delivered: Delivered,
}

/// How a file arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivered {
    Attached,
    /// With this Content-ID.
    Inline(&'static str),
    /// As a link in every body.
    Linked,
}

impl File {
    /// Bytes that do not compress, always the same for a `seed`.
    pub(crate) fn noise(name: &str, seed: usize, len: usize, delivered: Delivered) -> Self {
        let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
        let bytes = std::iter::repeat_with(|| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        });
        Self {
            name: name.to_owned(),
            bytes: bytes.take(len).collect(),
            delivered,
        }
    }

    pub(crate) fn base64(&self) -> String {
        STANDARD.encode(&self.bytes)
    }
}

/// A PNG of one red pixel.
pub(crate) const PIXEL: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";

/// The pixel as a file that the HTML shows as `cid:logo@demo`.
pub(crate) fn logo() -> File {
    File {
        name: "logo.png".to_owned(),
        bytes: STANDARD.decode(PIXEL).unwrap_or_default(),
        delivered: Delivered::Inline("logo@demo"),
    }
}

/// Subject and greeting in five languages.
const WORDS: [(&str, &str); 5] = [
    ("Your order", "Thank you for your order. It is on its way."),
    (
        "Ihre Rechnung über 12,50 €",
        "Grüße aus Köln. Die Rechnung liegt bei.",
    ),
    (
        "Votre colis est arrivé à l’étape",
        "Merci ! Votre colis part aujourd’hui.",
    ),
    ("Подтверждение заказа", "Спасибо! Ваш заказ уже в пути."),
    ("ご注文の確認", "ご注文ありがとうございます。本日発送いたします。"),
];

/// The subject of a job: every one is different.
pub(crate) fn subject(n: usize, id: &str) -> String {
    format!("{} [{id}]", WORDS[n % WORDS.len()].0)
}

/// A plain body with lines that need care: a dot at the start of one, a long one, one that begins with "From".
pub(crate) fn text(n: usize) -> String {
    let long = "All work and no play makes a dull mail. ".repeat(n % 40);
    format!(
        "Hello,\n\n{}\n.hidden files begin with a dot\nFrom here on: {}{long}\n",
        WORDS[n % WORDS.len()].1,
        n * 37,
    )
}

/// An HTML body; `logo` shows the inline image.
pub(crate) fn html(n: usize, logo: bool) -> String {
    let image = if logo {
        "<img src=\"cid:logo@demo\" alt=\"\">"
    } else {
        ""
    };
    let rows = (0..n % 12).fold(String::new(), |rows, row| {
        rows + &format!("<tr><td>{row}</td></tr>")
    });
    format!(
        "<!doctype html><html><body>{image}<h1>{}</h1><p>{}</p><table>{rows}</table></body></html>",
        WORDS[n % WORDS.len()].0,
        WORDS[n % WORDS.len()].1,
    )
}
