//! Receivers that never come to an end, or are not who they should be.

use std::sync::Arc;
use std::time::Duration;

use postroom_testkit::proxy::Proxy;
use postroom_testkit::webhook::WebhookReceiver;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::bridge::client::{Answer, Client, Post};
use crate::config;
use crate::egress::EgressGuard;
use crate::endpoint::Auth;

/// Long, so that a test that needs it fails by its outcome.
const NEVER: Duration = Duration::from_mins(2);

/// Says `first`, then `endless` until nobody listens.
async fn hostile(first: &'static str, endless: &'static str) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        stream.write_all(first.as_bytes()).await.unwrap();
        let block = endless.repeat(100);
        while stream.write_all(block.as_bytes()).await.is_ok() {}
    });
    port
}

async fn post(port: u16) -> Answer {
    post_to(&format!("http://127.0.0.1:{port}/")).await
}

async fn post_to(url: &str) -> Answer {
    let guard = EgressGuard::new(config::Egress {
        allow: vec!["127.0.0.0/8".parse().unwrap()],
    });
    let client = Client::new(Arc::new(guard), NEVER).unwrap();
    let report = Post {
        url,
        event_id: "evt_1",
        body: b"{}".to_vec(),
        secrets: &[],
        auth: &Auth::None,
        traceparent: None,
    };
    client.post(report).await
}

#[tokio::test]
async fn an_endless_answer_is_read_only_so_far() {
    const HEAD: &str = "HTTP/1.1 500 no\r\ncontent-type: text/plain\r\n\r\n";
    let Answer::Refused(refusal) = post(hostile(HEAD, "sorry\r\n\0").await).await else {
        panic!("not refused");
    };
    assert_eq!(refusal.status, Some(500));
    assert!(refusal.error.len() < 1100 && !refusal.error.contains(char::is_control));

    let taken = post(hostile("HTTP/1.1 200 OK\r\n\r\n", "x").await).await;
    assert_eq!(taken, Answer::Taken(200));

    for head in ["HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 "] {
        let Answer::Refused(refusal) = post(hostile(head, "x-more: y\r\n").await).await else {
            panic!("{head}: a head without end is an answer");
        };
        assert!(
            refusal.error.len() < 300 && refusal.status.is_none(),
            "{refusal:?}"
        );
        assert!(
            !refusal.error.contains("no answer in time"),
            "{head}: {refusal:?}"
        );
    }
}

#[tokio::test]
async fn a_receiver_whose_certificate_nobody_vouches_for_gets_nothing() {
    let hook = WebhookReceiver::start().await.unwrap();
    let tls = Proxy::start_tls(hook.address().to_string()).await;
    let Answer::Refused(refusal) = post_to(&format!("https://localhost:{}/", tls.port())).await else {
        panic!("not refused");
    };
    assert!(refusal.error.contains("certificate"), "{refusal:?}");
    assert_eq!((hook.received_count(), refusal.status), (0, None));
    assert_eq!(post(hook.address().port()).await, Answer::Taken(204));
}
