//! AUTH (RFC 4954) with PLAIN (RFC 4616) or LOGIN.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::ExposeSecret as _;
use zeroize::Zeroizing;

use crate::failure::{Class, Failure, Fault, Reply, Stage};

use super::classify;
use super::connection::Connection;
use super::server::Credentials;
use super::trouble::Trouble;

/// Ways of logging in, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mechanism {
    Plain,
    Login,
}

impl Mechanism {
    const ALL: [Self; 2] = [Self::Plain, Self::Login];

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::Login => "LOGIN",
        }
    }
}

/// Logs in with the best mechanism the server offers.
pub(super) async fn log_in(connection: &mut Connection, credentials: &Credentials) -> Result<(), Failure> {
    let mechanism = choose(&connection.extensions.auth)?;
    let limit = connection.timeouts.command;
    let reply = match mechanism {
        Mechanism::Plain => plain(connection, credentials, limit).await,
        Mechanism::Login => login(connection, credentials, limit).await,
    };
    let reply = reply.map_err(|trouble| trouble.failure(Stage::Auth))?;
    if reply.code == 235 {
        return Ok(());
    }
    if reply.is_positive() {
        return Err(Trouble::Malformed.failure(Stage::Auth));
    }
    Err(classify::refusal(Stage::Auth, reply))
}

fn choose(offered: &[String]) -> Result<Mechanism, Failure> {
    let found = Mechanism::ALL
        .into_iter()
        .find(|mechanism| offered.iter().any(|name| name == mechanism.name()));
    found.ok_or_else(|| {
        let (reason, message) = if offered.is_empty() {
            (
                "auth_not_offered",
                "The server offers no login; is the port right?".to_owned(),
            )
        } else {
            let message = format!(
                "The server offers none of PLAIN and LOGIN but {}",
                offered.join(", ")
            );
            ("auth_mechanism_unsupported", message)
        };
        // Like a refused login: the provider may have lost its logins for an hour, and no mail is to blame.
        Failure::transient(Class::Auth, Fault::Sender, Stage::Auth, reason, message)
    })
}

async fn plain(
    connection: &mut Connection,
    credentials: &Credentials,
    limit: Duration,
) -> Result<Reply, Trouble> {
    let password = credentials.password.expose_secret();
    let response = Zeroizing::new(format!("\0{}\0{password}", credentials.username));
    let encoded = Zeroizing::new(STANDARD.encode(response.as_bytes()));
    let command = Zeroizing::new(format!("AUTH PLAIN {}\r\n", *encoded));
    let reply = connection.exchange(command.as_bytes(), limit).await?;
    Ok(without(reply, &[&encoded, password]))
}

/// User name and password each on request. What the requests say is not looked at: servers word them differently, and
/// the order is always this.
async fn login(
    connection: &mut Connection,
    credentials: &Credentials,
    limit: Duration,
) -> Result<Reply, Trouble> {
    let reply = connection.exchange(b"AUTH LOGIN\r\n", limit).await?;
    if reply.code != 334 {
        return Ok(reply);
    }
    let user = format!("{}\r\n", STANDARD.encode(&credentials.username));
    let reply = connection.exchange(user.as_bytes(), limit).await?;
    if reply.code != 334 {
        return Ok(reply);
    }
    let secret = credentials.password.expose_secret();
    let encoded = Zeroizing::new(STANDARD.encode(secret));
    let password = Zeroizing::new(format!("{}\r\n", *encoded));
    let reply = connection.exchange(password.as_bytes(), limit).await?;
    Ok(without(reply, &[&encoded, secret]))
}

/// Some servers quote the command they do not understand; a reply goes into reports and logs. The text was cut at its
/// longest, so a long secret may be there in part: from its beginning on nothing is kept.
fn without(mut reply: Reply, secrets: &[&str]) -> Reply {
    const BEGINNING: usize = 12;
    let mut text = reply.text.to_string();
    for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
        if text.contains(secret) {
            text = text.replace(secret, "***");
        }
        if let Some(beginning) = secret.get(..BEGINNING)
            && let Some(place) = text.find(beginning)
        {
            text.truncate(place);
            text.push_str("***");
        }
    }
    reply.text = text.into();
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_is_preferred_and_unknown_mechanisms_are_named() {
        let offered = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        assert_eq!(choose(&offered(&["LOGIN", "PLAIN"])).unwrap(), Mechanism::Plain);
        assert_eq!(choose(&offered(&["XOAUTH2", "LOGIN"])).unwrap(), Mechanism::Login);
        let failure = choose(&offered(&["XOAUTH2"])).unwrap_err();
        assert_eq!(failure.reason, "auth_mechanism_unsupported");
        assert!(failure.message.contains("XOAUTH2"));
        let none = choose(&[]).unwrap_err();
        assert_eq!(none.reason, "auth_not_offered");
        for failure in [failure, none] {
            assert!(failure.is_transient() && failure.is_of_account(), "{failure}");
        }
    }

    #[test]
    fn a_password_quoted_by_the_server_is_struck_out() {
        let reply = Reply::new(500, "unknown command AUTH PLAIN AGEAYg==");
        assert_eq!(
            &*without(reply, &["AGEAYg==", ""]).text,
            "unknown command AUTH PLAIN ***"
        );
    }

    #[test]
    fn a_quoted_password_cut_at_the_longest_reply_is_struck_out_as_well() {
        let password = "long-password-".repeat(200);
        let reply = Reply::new(500, &format!("unknown command {password}"));
        assert_eq!(&*without(reply, &[&password]).text, "unknown command ***");
    }
}
