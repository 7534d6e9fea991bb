//! An SMTP server that takes mail, keeps it to itself, and misbehaves as told: for tests against Postroom, or any other
//! client. It prints what it took as one JSON object per line. See `docs/testing.md`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use postroom_testkit::smtp::{Builder, Plan, SmtpServer, TlsSetup};
use postroom_testkit::tls::{ServerCert, TestCa};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

/// Between two looks at what has come in.
const LOOK: Duration = Duration::from_millis(20);
/// A mail is printed when its reply has gone out, or after this time without.
const REPLY: Duration = Duration::from_secs(1);

/// Takes mail, keeps it to itself, and misbehaves as told. Prints one JSON object per mail.
#[derive(Debug, Parser)]
#[command(after_help = "Example:\n  \
    smtp-sink --listen 127.0.0.1:2525 --script trouble.json\n\n\
    A script file:\n  \
    {\"seed\": 1,\n   \
     \"rules\": [{\"at\": \"final_dot\", \"do\": \"take_then_close\", \"chance\": 0.01},\n             \
               {\"at\": \"mail\", \"do\": {\"reply\": \"451 4.3.0 Later\"}, \"after\": 10, \"times\": 5}],\n   \
     \"recipients\": [{\"local\": \"nobody\", \"reply\": \"550 5.1.1 No such user\"}]}\n\n\
    at: greeting, ehlo, start_tls, auth, mail, rcpt, data, bdat, content, final_dot, rset, noop, quit\n\
    do: {\"reply\": …}, {\"reply_then_close\": …}, {\"delay_ms\": …}, close, silence, take_then_close, take_then_silence")]
struct Arguments {
    /// Where to listen; port 0 takes a free one. The address is printed first, on standard error.
    #[arg(long, default_value = "127.0.0.1:2525")]
    listen: SocketAddr,
    /// A JSON file that says what to do differently from a well-behaved server
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// TLS
    #[arg(long, default_value = "none")]
    tls: Tls,
    /// The certificate shown
    #[arg(long, default_value = "good")]
    certificate: Certificate,
    /// Host name or IP address in the certificate
    #[arg(long, default_value = "localhost")]
    name: String,
    /// Where to write the certificate of the authority, made at every start, for clients to trust
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Demand this login; may be repeated. Passwords of a test, on the command line: not for real ones
    #[arg(long, value_name = "USER:PASSWORD", value_parser = login)]
    login: Vec<(String, String)>,
    /// Largest mail in bytes, announced by SIZE
    #[arg(long, value_name = "BYTES")]
    size: Option<u64>,
    /// Extensions not to announce; `starttls` is what an attacker who strips it leaves
    #[arg(long, value_name = "EXTENSION", value_delimiter = ',')]
    without: Vec<Extension>,
    /// Offer CHUNKING
    #[arg(long)]
    chunking: bool,
    /// Keep replies back for so many milliseconds, as a server far away does
    #[arg(long, value_name = "MS")]
    latency_ms: Option<u64>,
    /// End after so many mails
    #[arg(long, value_name = "N")]
    count: Option<usize>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Tls {
    None,
    Starttls,
    Implicit,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Certificate {
    Good,
    Expired,
    WrongName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Extension {
    Pipelining,
    #[value(name = "8bitmime")]
    EightBitMime,
    Smtputf8,
    Starttls,
}

fn login(text: &str) -> Result<(String, String), String> {
    let (user, password) = text.split_once(':').ok_or("a login is USER:PASSWORD")?;
    Ok((user.to_owned(), password.to_owned()))
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "smtp-sink: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), String> {
    let server = builder(&arguments)?.start().await;
    let _ = writeln!(std::io::stderr(), "listening on {}", server.addr());
    let failed = |error: std::io::Error| format!("signals: {error}");
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    tokio::select! {
        result = print(&server, arguments.count) => result,
        _ = interrupt.recv() => Ok(()),
        _ = terminate.recv() => Ok(()),
    }
}

fn builder(arguments: &Arguments) -> Result<Builder, String> {
    let keeps = |extension| !arguments.without.contains(&extension);
    let mut builder = SmtpServer::builder()
        .bind(arguments.listen)
        .tls(tls(arguments)?)
        .pipelining(keeps(Extension::Pipelining))
        .eight_bit_mime(keeps(Extension::EightBitMime))
        .smtputf8(keeps(Extension::Smtputf8))
        .chunking(arguments.chunking)
        .offer_starttls(keeps(Extension::Starttls));
    for (user, password) in &arguments.login {
        builder = builder.auth(user, password);
    }
    if let Some(millis) = arguments.latency_ms {
        builder = builder.latency(Duration::from_millis(millis));
    }
    if let Some(size) = arguments.size {
        builder = builder.size(size);
    }
    if let Some(file) = &arguments.script {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let plan = Plan::parse(&text).map_err(|error| format!("{}: {error}", file.display()))?;
        builder = builder.script(plan.script());
    }
    Ok(builder)
}

fn tls(arguments: &Arguments) -> Result<TlsSetup, String> {
    let ca = TestCa::new();
    if let Some(file) = &arguments.ca_file {
        std::fs::write(file, ca.ca_pem()).map_err(|error| format!("{}: {error}", file.display()))?;
    }
    let name = arguments.name.as_str();
    let certificate = || -> ServerCert {
        match arguments.certificate {
            Certificate::Good => ca.server(&[name]),
            Certificate::Expired => ca.expired(&[name]),
            Certificate::WrongName => ca.server(&["somebody-else.example"]),
        }
    };
    Ok(match arguments.tls {
        Tls::None => TlsSetup::None,
        Tls::Starttls => TlsSetup::StartTls(certificate()),
        Tls::Implicit => TlsSetup::Implicit(certificate()),
    })
}

/// One line per mail, in order, as soon as it is known whether its reply went out.
async fn print(server: &SmtpServer, count: Option<usize>) -> Result<(), String> {
    let mut printed = 0;
    while count.is_none_or(|count| printed < count) {
        let known =
            |mail: &postroom_testkit::smtp::Received| mail.answered.is_some() || mail.at.elapsed() > REPLY;
        for mail in server
            .received_from(printed)
            .iter()
            .take_while(|mail| known(mail))
        {
            let written = writeln!(std::io::stdout(), "{}", mail.json());
            if written.is_err() || count == Some(mail.id + 1) {
                return Ok(());
            }
            printed = mail.id + 1;
        }
        sleep(LOOK).await;
    }
    Ok(())
}
