//! Links to large files in the bodies of a mail. Pure; names and addresses are escaped, so that nothing a producer
//! calls a file can become markup.

use std::fmt::Write as _;

use jiff::tz::TimeZone;

use super::{Link, size};

mod insertion;

/// The sentences around links, in one language.
struct Wording {
    language: &'static str,
    heading: &'static str,
    /// Before a date; may hold `{}`.
    until: &'static str,
    decimal: char,
}

const WORDINGS: &[Wording] = &[
    Wording {
        language: "en",
        heading: "Files to download:",
        until: "available until {}",
        decimal: '.',
    },
    Wording {
        language: "it",
        heading: "File da scaricare:",
        until: "disponibile fino al {}",
        decimal: ',',
    },
    Wording {
        language: "de",
        heading: "Dateien zum Herunterladen:",
        until: "verfügbar bis {}",
        decimal: ',',
    },
    Wording {
        language: "fr",
        heading: "Fichiers à télécharger :",
        until: "disponible jusqu’au {}",
        decimal: ',',
    },
    Wording {
        language: "es",
        heading: "Archivos para descargar:",
        until: "disponible hasta el {}",
        decimal: ',',
    },
    Wording {
        language: "pt",
        heading: "Ficheiros para transferir:",
        until: "disponível até {}",
        decimal: ',',
    },
    Wording {
        language: "nl",
        heading: "Bestanden om te downloaden:",
        until: "beschikbaar tot {}",
        decimal: ',',
    },
];

/// The plain body with the links after it.
#[must_use]
pub fn into_text(body: &str, links: &[Link], locale: Option<&str>) -> String {
    let wording = wording(locale);
    let mut out = String::with_capacity(body.len() + 64 + links.len() * 256);
    out.push_str(body);
    if !body.is_empty() {
        out.push_str(if body.ends_with('\n') { "\r\n" } else { "\r\n\r\n" });
    }
    out.extend(["----------\r\n", wording.heading, "\r\n"]);
    for link in links {
        let _ = write!(
            out,
            "\r\n{} ({})\r\n{}\r\n",
            shown(&link.filename),
            details(link, wording),
            link.url
        );
    }
    out
}

/// The HTML body with the links at its end: before the last `</body>` that is markup (not in a comment or a script),
/// else after everything.
#[must_use]
pub fn into_html(body: &str, links: &[Link], locale: Option<&str>) -> String {
    let block = html_block(links, wording(locale));
    let at = insertion::point(body);
    let mut out = String::with_capacity(body.len() + block.len());
    out.extend([&body[..at], &block, &body[at..]]);
    out
}

fn html_block(links: &[Link], wording: &Wording) -> String {
    let mut out = String::with_capacity(256 + links.len() * 512);
    out.push_str("<div style=\"margin-top:1.5em;padding-top:1em;border-top:1px solid #999\"><p><strong>");
    out.push_str(wording.heading);
    out.push_str("</strong></p><ul>");
    for link in links {
        let _ = write!(
            out,
            "<li><a href=\"{}\">{}</a> ({})</li>",
            escaped(&link.url),
            escaped(&shown(&link.filename)),
            details(link, wording)
        );
    }
    out.push_str("</ul></div>");
    out
}

fn details(link: &Link, wording: &Wording) -> String {
    let size = size::human(link.size, wording.decimal);
    match link.expires_at {
        None => size,
        Some(at) => {
            // The ISO form is read the same everywhere.
            let date = at.to_zoned(TimeZone::UTC).date().to_string();
            format!("{size}, {}", wording.until.replace("{}", &date))
        }
    }
}

/// The wording for a BCP 47 tag, English if its language is not known.
fn wording(locale: Option<&str>) -> &'static Wording {
    let language = locale.and_then(|tag| tag.split(['-', '_']).next()).unwrap_or("");
    WORDINGS
        .iter()
        .find(|wording| wording.language.eq_ignore_ascii_case(language))
        .unwrap_or(&WORDINGS[0])
}

/// A file name without characters that break a line or turn the reading direction.
fn shown(filename: &str) -> String {
    let hidden = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    filename.chars().filter(|c| !hidden(*c)).collect()
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(filename: &str) -> Link {
        Link {
            filename: filename.to_owned(),
            size: 12_345_678,
            url: "https://s3.example/a?X-Amz-Signature=1&x=2".to_owned(),
            expires_at: Some("2026-11-09T12:00:00Z".parse().unwrap()),
        }
    }

    #[test]
    fn links_stand_at_the_end_of_the_text() {
        let text = into_text("Hello\r\n", &[link("a.pdf")], None);
        assert_eq!(
            text,
            "Hello\r\n\r\n----------\r\nFiles to download:\r\n\r\na.pdf (12.3 MB, available until 2026-11-09)\r\n\
             https://s3.example/a?X-Amz-Signature=1&x=2\r\n"
        );
    }

    #[test]
    fn links_stand_inside_the_body_of_the_html() {
        let html = into_html("<html><body><p>Hi</p></BODY></html>", &[link("a.pdf")], None);
        assert!(html.starts_with("<html><body><p>Hi</p><div"), "{html}");
        assert!(html.ends_with("</div></BODY></html>"), "{html}");
        assert!(
            html.contains("href=\"https://s3.example/a?X-Amz-Signature=1&amp;x=2\""),
            "{html}"
        );
    }

    #[test]
    fn the_wording_follows_the_locale() {
        for (locale, part) in [
            ("it-IT", "12,3 MB, disponibile fino al 2026-11-09"),
            ("DE", "verfügbar bis 2026-11-09"),
            ("fr_CA", "à télécharger"),
            ("es", "Archivos"),
            ("xx", "Files to download"),
            ("", "Files to download"),
        ] {
            let text = into_text("", &[link("a")], Some(locale));
            assert!(text.contains(part), "{locale}: {text}");
        }
    }

    #[test]
    fn a_file_name_cannot_become_markup_or_a_line() {
        let evil = link("\"><script>alert(1)</script>\r\n\u{202e}fdp.exe");
        let html = into_html("<body></body>", std::slice::from_ref(&evil), None);
        assert!(!html.contains("<script"), "{html}");
        assert!(html.contains("&quot;&gt;&lt;script&gt;"), "{html}");
        assert!(!into_text("", &[evil], None).contains("</script>\r\n\u{202e}"));
    }

    proptest! {
        #[test]
        fn a_body_is_kept_byte_for_byte_around_the_links(body in "(?s)(<!--|-->|</?[bB]ody>|<script>|</script|[a-z<>\"'/ \u{e9}]){0,20}", name in ".*") {
            let links = [link(&name)];
            let block = html_block(&links, wording(None));
            prop_assert_eq!(into_html(&body, &links, None).replacen(&block, "", 1), body.clone());
            prop_assert!(into_text(&body, &links, None).starts_with(&body));
            // One list, one item, one anchor: a name adds no tag.
            prop_assert_eq!(block.matches('<').count(), 12);
        }
    }
}
