//! Servers that never come to an end: what they may say is bounded by size before it is bounded by time.

use lettre::transport::smtp::extension::ClientId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::smtp::connection::Connection;
use crate::smtp::wire::Wire;

/// Long, so that a test that needs it fails by its reason.
const NEVER: Duration = Duration::from_mins(2);

/// Says `first`, reads a command, and then says `endless` until nobody listens.
async fn hostile(first: &'static str, endless: String) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        if !first.is_empty() {
            stream.write_all(first.as_bytes()).await.unwrap();
            let _ = stream.read(&mut [0; 512]).await;
        }
        while stream.write_all(endless.as_bytes()).await.is_ok() {}
    });
    port
}

async fn greeted(port: u16) -> Result<Connection, Failure> {
    let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    let config = Setup::default().limit(NEVER).config;
    let hello = ClientId::Domain("client.example".to_owned());
    Connection::greet(Wire::new(stream), &hello, config.timeouts).await
}

#[tokio::test]
async fn an_endless_reply_ends_the_connection() {
    for (what, first, endless) in [
        ("a greeting without line end", "", "x".repeat(4096)),
        ("a greeting of endless lines", "", "220-x\r\n".repeat(100)),
        (
            "an EHLO reply of endless lines",
            "220 x\r\n",
            "250-SIZE 1\r\n".repeat(100),
        ),
        (
            "an EHLO reply of endless long lines",
            "220 x\r\n",
            format!("250-AUTH {}\r\n", "PLAIN ".repeat(1300)),
        ),
        (
            "an EHLO reply of one endless line",
            "220 x\r\n",
            "250-AUTH PLAIN ".repeat(300),
        ),
    ] {
        let failure = greeted(hostile(first, endless).await).await.err().unwrap();
        assert_eq!(failure.reason, "connection_lost", "{what}: {failure}");
        assert!(
            failure.is_transient() && failure.to_string().len() < 300,
            "{what}: {failure}"
        );
    }
}

#[tokio::test]
async fn a_long_list_of_extensions_is_read_and_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"220 x\r\n").await.unwrap();
        let _ = stream.read(&mut [0; 512]).await;
        let reply = format!(
            "250-x\r\n250-PIPELINING\r\n{}250 SMTPUTF8\r\n",
            "250-AUTH X Y Z\r\n".repeat(400)
        );
        stream.write_all(reply.as_bytes()).await.unwrap();
        let _ = stream.read(&mut [0; 512]).await;
    });
    let connection = greeted(port).await.unwrap();
    assert!(connection.extensions.pipelining && connection.extensions.smtputf8);
    assert_eq!(connection.extensions.auth.len(), 1200);
}
