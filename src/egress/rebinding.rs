//! Names that change where they lead between two looks (DNS rebinding). 127.0.0.2 plays a public address here.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

pub(crate) const OUTSIDE: &str = "127.0.0.2";
pub(crate) const INSIDE: &str = "127.0.0.1";

/// A resolver that gives its answers one after the other.
#[derive(Debug)]
pub(crate) struct Names(Mutex<VecDeque<Vec<IpAddr>>>);

impl Names {
    pub(super) fn look_up(&self, port: u16) -> Vec<SocketAddr> {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = answers.pop_front().unwrap_or_default();
        found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect()
    }
}

/// A guard that allows [`OUTSIDE`] alone, and looks names up in this list.
pub(crate) fn guard(answers: &[&[&str]]) -> Arc<EgressGuard> {
    let parsed = answers
        .iter()
        .map(|answer| answer.iter().map(|ip| ip.parse().unwrap()).collect());
    Arc::new(EgressGuard {
        config: config::Egress {
            allow: vec![format!("{OUTSIDE}/32").parse().unwrap()],
        },
        names: Some(Arc::new(Names(Mutex::new(parsed.collect())))),
    })
}

/// Two servers on the same port, one at each address; each counts its visitors.
pub(crate) struct Sites {
    pub(crate) port: u16,
    outside: Arc<AtomicUsize>,
    inside: Arc<AtomicUsize>,
}

impl Sites {
    /// Both answer with this, whatever they are asked.
    pub(crate) async fn start(answer: &'static str) -> Self {
        loop {
            let outside = TcpListener::bind((OUTSIDE, 0)).await.unwrap();
            let port = outside.local_addr().unwrap().port();
            // Taken by somebody else at the other address: another port.
            if let Ok(inside) = TcpListener::bind((INSIDE, port)).await {
                let (outside, inside) = (serve(outside, answer), serve(inside, answer));
                return Self {
                    port,
                    outside,
                    inside,
                };
            }
        }
    }

    pub(crate) fn visits(&self) -> (usize, usize) {
        (
            self.outside.load(Ordering::SeqCst),
            self.inside.load(Ordering::SeqCst),
        )
    }
}

fn serve(listener: TcpListener, answer: &'static str) -> Arc<AtomicUsize> {
    let visits = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&visits);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(answer.as_bytes()).await;
            });
        }
    });
    visits
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok";

async fn get(client: &reqwest::Client, port: u16) -> Result<u16, reqwest::Error> {
    let response = client
        .get(format!("http://rebind.example:{port}/"))
        .send()
        .await?;
    Ok(response.status().as_u16())
}

#[tokio::test]
async fn the_address_that_was_checked_is_the_one_that_is_dialled() {
    let sites = Sites::start(OK).await;
    let limit = Duration::from_secs(20);
    // A second look would lead inside: there is none for a connection.
    let client = http_client(guard(&[&[OUTSIDE], &[INSIDE], &[INSIDE, OUTSIDE]]), limit, limit).unwrap();
    assert_eq!(get(&client, sites.port).await.unwrap(), 200);
    assert_eq!(sites.visits(), (1, 0));
    // The next connection looks again, and is refused.
    let error = get(&client, sites.port).await.unwrap_err();
    assert!(
        matches!(EgressError::find(&error), Some(EgressError::Refused { .. })),
        "{error:?}"
    );
    assert_eq!(sites.visits(), (1, 0));
    // Of a mixed answer only what is allowed is tried.
    assert_eq!(get(&client, sites.port).await.unwrap(), 200);
    assert_eq!(sites.visits(), (2, 0));
}
