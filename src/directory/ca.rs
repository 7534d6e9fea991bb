//! Certificate authorities given for an account.

use crate::config::check_authorities;

/// Longest text, in bytes; a certificate takes about 2 KiB.
pub const MAX_PEM: usize = 256 << 10;

/// Checks that the text is PEM with at least one certificate, and that each can be a trust anchor.
///
/// # Errors
/// Says which certificate is wrong.
pub fn check_pem(pem: &[u8]) -> Result<String, String> {
    if pem.len() > MAX_PEM {
        return Err(format!("the certificates are longer than {} KiB", MAX_PEM >> 10));
    }
    let text = str::from_utf8(pem).map_err(|_| "the certificates are not PEM text".to_owned())?;
    check_authorities(pem)?;
    // Postgres stores no NUL, and PEM allows text around the certificates.
    if text.contains('\0') {
        return Err("the certificates are not PEM text".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A self-signed authority: P-256, `CN=Test Authority`, until 2126.
    pub(crate) const AUTHORITY: &str = include_str!("ca/authority.pem");

    #[test]
    fn certificates_are_checked_one_by_one() {
        assert_eq!(check_pem(AUTHORITY.as_bytes()).unwrap(), AUTHORITY);
        assert!(check_pem(format!("Our own\n{AUTHORITY}{AUTHORITY}").as_bytes()).is_ok());
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (pem, part) in [
            (String::new(), "no certificate"),
            ("hello".to_owned(), "no certificate"),
            (broken.to_owned(), "certificate 1"),
            (format!("{AUTHORITY}{broken}"), "certificate 2"),
            (format!("{AUTHORITY}\0"), "not PEM"),
            ("x".repeat(MAX_PEM + 1), "longer"),
        ] {
            let error = check_pem(pem.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
