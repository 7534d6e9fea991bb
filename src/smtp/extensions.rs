//! What a server offers in its reply to EHLO (RFC 5321 §4.1.1.1).

/// The service extensions postroom uses or reports.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one per keyword of the EHLO reply")]
pub struct Extensions {
    /// STARTTLS (RFC 3207).
    pub starttls: bool,
    /// PIPELINING (RFC 2920).
    pub pipelining: bool,
    /// 8BITMIME (RFC 6152).
    pub eight_bit_mime: bool,
    /// SMTPUTF8 (RFC 6531).
    pub smtputf8: bool,
    /// CHUNKING (RFC 3030).
    pub chunking: bool,
    /// ENHANCEDSTATUSCODES (RFC 2034).
    pub enhanced_status_codes: bool,
    /// SIZE (RFC 1870); the limit in bytes, if the server names one.
    pub size: Option<Option<u64>>,
    /// Mechanisms of AUTH (RFC 4954), in upper case.
    pub auth: Vec<String>,
}

impl Extensions {
    /// Reads the text lines of an EHLO reply; the first is the server's name.
    #[must_use]
    pub fn parse<'a>(lines: impl IntoIterator<Item = &'a str>) -> Self {
        let mut found = Self::default();
        for line in lines.into_iter().skip(1) {
            // `AUTH=PLAIN` is how servers older than RFC 4954 say it.
            let mut words = line.split([' ', '=', '\t']).filter(|word| !word.is_empty());
            let keyword = words.next().unwrap_or_default().to_ascii_uppercase();
            match keyword.as_str() {
                "STARTTLS" => found.starttls = true,
                "PIPELINING" => found.pipelining = true,
                "8BITMIME" => found.eight_bit_mime = true,
                "SMTPUTF8" => found.smtputf8 = true,
                "CHUNKING" => found.chunking = true,
                "ENHANCEDSTATUSCODES" => found.enhanced_status_codes = true,
                "SIZE" => {
                    let limit = words.next().and_then(|limit| limit.parse().ok());
                    found.size = Some(limit.filter(|limit| *limit > 0));
                }
                "AUTH" => found.auth.extend(words.map(str::to_ascii_uppercase)),
                _ => {}
            }
        }
        found
    }

    /// The largest mail taken, in bytes, if there is a limit.
    #[must_use]
    pub fn size_limit(&self) -> Option<u64> {
        self.size.flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keywords_are_read_whatever_their_case() {
        let found = Extensions::parse([
            "mail.example PIPELINING",
            "size 35882577",
            "8bitmime",
            "AUTH LOGIN plain",
            "AUTH=XOAUTH2",
            "STARTTLS",
            "SMTPUTF8",
            "X-UNKNOWN yes",
        ]);
        assert!(found.starttls && found.eight_bit_mime && found.smtputf8);
        assert!(!found.pipelining, "the first line is the server's name");
        assert!(!found.chunking && !found.enhanced_status_codes);
        assert_eq!(found.size_limit(), Some(35_882_577));
        assert_eq!(found.auth, ["LOGIN", "PLAIN", "XOAUTH2"]);
    }

    #[test]
    fn a_size_of_nothing_or_zero_is_no_limit() {
        for line in ["SIZE", "SIZE 0", "SIZE many"] {
            let found = Extensions::parse(["x", line]);
            assert_eq!((found.size, found.size_limit()), (Some(None), None), "{line}");
        }
        assert_eq!(Extensions::parse(["x"]).size, None);
    }
}
