//! Addresses in their three notations: `"a@b"`, `"Name <a@b>"`, `{address, name}`.
//! Messages here never show an address: they end in logs.

use super::bounds::{MAX_ADDRESS, MAX_ADDRESS_TEXT, MAX_LOCAL_PART, MAX_NAME};
use super::errors::{Errors, Pointer};
use super::json::Node;
use super::object::Fields;
use super::values;
use crate::address::{Address, Mailbox};

/// Fields of an address written as an object.
pub(super) const ADDRESS_FIELDS: &[&str] = &["address", "name"];

const NOTATIONS: &str = r#"an address: "a@b.example", "Name <a@b.example>" or {"address", "name"}"#;

/// One address in any notation.
pub(super) fn mailbox(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Mailbox> {
    match node {
        Node::String(text) => match from_text(&text) {
            Ok(mailbox) => Some(mailbox),
            Err(message) => {
                errors.push(at, message);
                None
            }
        },
        Node::Object(entries) => {
            let mut fields = Fields::new(entries, ADDRESS_FIELDS, at, errors);
            let name = fields
                .take("name")
                .and_then(|node| display_name(node, &at.key("name"), errors));
            let at_address = at.key("address");
            let Some(node) = fields.take("address") else {
                errors.push(&at_address, "is required: an address like `a@b.example`");
                return None;
            };
            let text = values::string(node, &at_address, errors)?;
            match bare(&text) {
                Ok(address) => Some(Mailbox { name, address }),
                Err(message) => {
                    errors.push(&at_address, message);
                    None
                }
            }
        }
        other => {
            values::mistyped(&other, NOTATIONS, at, errors);
            None
        }
    }
}

/// A list of addresses, or one without a list. `count` grows by those written, valid or not.
pub(super) fn mailboxes(
    node: Option<Node<'_>>,
    max: usize,
    at: &Pointer<'_>,
    errors: &mut Errors,
    count: &mut usize,
) -> Vec<Mailbox> {
    match node {
        None => Vec::new(),
        Some(Node::Array(items)) => {
            if items.len() > max {
                // One complaint is enough: it does not count towards the sum.
                *count += 1;
                errors.push(at, format!("holds {} addresses; at most {max}", items.len()));
                return Vec::new();
            }
            *count += items.len();
            items
                .into_iter()
                .enumerate()
                .filter_map(|(index, item)| mailbox(item, &at.index(index), errors))
                .collect()
        }
        Some(single) => {
            *count += 1;
            mailbox(single, at, errors).into_iter().collect()
        }
    }
}

/// An address without a display name, in any notation.
pub(super) fn nameless(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<Address> {
    let mailbox = mailbox(node, at, errors)?;
    if mailbox.name.is_some() {
        errors.push(at, "must be an address without a display name");
        return None;
    }
    Some(mailbox.address)
}

fn display_name(node: Node<'_>, at: &Pointer<'_>, errors: &mut Errors) -> Option<String> {
    let text = values::string(node, at, errors)?;
    match check_name(&text) {
        Ok(name) => name,
        Err(message) => {
            errors.push(at, message);
            None
        }
    }
}

fn check_name(name: &str) -> Result<Option<String>, String> {
    if !values::fits(name, MAX_NAME) || name.chars().any(char::is_control) {
        return Err(format!(
            "the display name must be at most {MAX_NAME} characters without line breaks or other control characters"
        ));
    }
    let name = name.trim();
    Ok((!name.is_empty()).then(|| name.to_owned()))
}

fn from_text(text: &str) -> Result<Mailbox, String> {
    let trimmed = text.trim();
    if !values::fits(text, MAX_ADDRESS_TEXT) || text.chars().any(char::is_control) {
        return Err(format!(
            "must be at most {MAX_ADDRESS_TEXT} characters without line breaks or other control characters"
        ));
    }
    let Some((name, address)) = trimmed.strip_suffix('>').and_then(|rest| rest.rsplit_once('<')) else {
        return Ok(Mailbox::bare(bare(trimmed)?));
    };
    let name = name.trim();
    let name = match unquote(name) {
        Some(unquoted) => check_name(&unquoted)?,
        // An `@` outside quotes means a second address; taking it for a name would lose a recipient.
        None if name.contains(['@', '<', '>']) => {
            return Err(format!(
                "must be {NOTATIONS}; one address only, and a name with @ < or > in double quotes"
            ));
        }
        None => check_name(name)?,
    };
    Ok(Mailbox {
        name,
        address: bare(address.trim())?,
    })
}

/// The content of a quoted string (RFC 5322 §3.2.4), if the whole of `text` is one.
fn unquote(text: &str) -> Option<String> {
    let inner = text.strip_prefix('"')?.strip_suffix('"')?;
    let mut content = String::with_capacity(inner.len());
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => content.push(chars.next()?),
            '"' => return None,
            c => content.push(c),
        }
    }
    Some(content)
}

/// The address itself. Stricter than the grammar where the grammar lets one out of `MAIL FROM:<…>`.
fn bare(text: &str) -> Result<Address, String> {
    if text.contains([',', ';']) && text.matches('@').count() > 1 {
        return Err("must be one address; write several as a JSON list".to_owned());
    }
    if text.len() > MAX_ADDRESS {
        return Err(format!("the address must be at most {MAX_ADDRESS} bytes long"));
    }
    if text.rfind('@').is_some_and(|end| end > MAX_LOCAL_PART) {
        return Err(format!(
            "the part before the `@` must be at most {MAX_LOCAL_PART} bytes long"
        ));
    }
    if text.contains(|c| values::is_blank(c) || matches!(c, '<' | '>')) {
        return Err(format!("must be {NOTATIONS}; the address itself without blanks"));
    }
    if let Some(c) = text.chars().find(|c| is_invisible(*c)) {
        return Err(format!(
            "holds the invisible character U+{:04X}: write the address without it",
            c as u32
        ));
    }
    text.parse::<Address>()
        .ok()
        .filter(|address| is_domain(address.domain()))
        .ok_or_else(|| format!("must be {NOTATIONS}"))
}

/// What nobody sees in an address and no mailbox has in its name: it came along when somebody copied it. Marks of direction
/// also show it otherwise than it is. The parser knows none of them in a domain.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
            | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'
    )
}

/// What the parser leaves open: literals hold an IP address, other names can be written in ASCII (RFC 5891).
fn is_domain(domain: &str) -> bool {
    match domain.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(literal) => match literal.strip_prefix("IPv6:") {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => literal.parse::<std::net::Ipv4Addr>().is_ok(),
        },
        None => domain.is_ascii() || matches!(url::Host::parse(domain), Ok(url::Host::Domain(_))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Option<String>, String), String> {
        from_text(text).map(|m| (m.name, m.address.to_string()))
    }

    #[test]
    fn every_notation_of_a_string_is_understood() {
        for (text, name, address) in [
            ("a@b", None, "a@b"),
            (" a@b.example ", None, "a@b.example"),
            ("<a@b.example>", None, "a@b.example"),
            ("Ann <a@b.example>", Some("Ann"), "a@b.example"),
            ("Doe, Ann <a@b.example>", Some("Doe, Ann"), "a@b.example"),
            (
                r#""Ann @ \"Work\" <x>" <a@b.example>"#,
                Some(r#"Ann @ "Work" <x>"#),
                "a@b.example",
            ),
            ("Ünal Çelik<a@b.example>", Some("Ünal Çelik"), "a@b.example"),
            ("用户@例え.jp", None, "用户@例え.jp"),
            ("o'neil+tag@b.example", None, "o'neil+tag@b.example"),
            ("a@[192.0.2.1]", None, "a@[192.0.2.1]"),
            ("a@[IPv6:2001:db8::1]", None, "a@[IPv6:2001:db8::1]"),
        ] {
            assert_eq!(
                read(text),
                Ok((name.map(str::to_owned), address.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn a_local_part_has_at_most_64_octets() {
        let of = |local: &str| read(&format!("{local}@b.example"));
        assert!(of(&"a".repeat(64)).is_ok() && of(&"é".repeat(32)).is_ok());
        for long in ["a".repeat(65), "é".repeat(33)] {
            assert!(of(&long).unwrap_err().contains("at most 64 bytes"), "{long}");
        }
    }

    #[test]
    fn an_address_with_a_character_that_nobody_sees_is_refused_and_the_character_named() {
        for c in [
            '\u{200b}', '\u{200e}', '\u{202a}', '\u{202e}', '\u{2066}', '\u{2069}', '\u{ad}',
        ] {
            let named = format!("U+{:04X}", c as u32);
            for text in [format!("a{c}nn@b.example"), format!("Ann <ann@b{c}.example>")] {
                let error = read(&text).unwrap_err();
                assert!(error.contains(&named), "{error}");
            }
        }
        assert!(read("\u{feff}ann@b.example").is_err());
    }

    #[test]
    fn what_is_not_one_address_is_refused() {
        let long = format!("{}@{}.example", "a".repeat(64), "b".repeat(200));
        for text in [
            "",
            "ann",
            "a@",
            "@b",
            "a b@c.example",
            "a@b.example, c@d.example",
            "a@b.example; c@d.example",
            "x@y.example, Ann <a@b.example>",
            "Ann <a@b.example> x",
            "Ann a@b.example",
            "<<a@b.example>>",
            "a@b.example\r\nBcc: x@y.example",
            "a@b.example>\u{0}",
            "a\u{a0}b@c.example",
            "\"a> SIZE=1\"@b.example",
            "a@[anything]",
            "a@-b.example",
            "a@b..example",
            &long,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
