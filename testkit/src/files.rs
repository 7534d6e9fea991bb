//! A web server that gives out files, and misbehaves when told.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// How a path is answered.
#[derive(Debug, Clone)]
pub struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: Bytes,
    /// What Content-Length says; none is no such header, the body then ends with the connection.
    declared: Option<u64>,
    delay: Duration,
    /// Answered with 503 so many times first.
    failures: u64,
}

impl Answer {
    /// 200 with this content.
    #[must_use]
    pub fn file(body: impl Into<Bytes>) -> Self {
        let body = body.into();
        Self {
            status: 200,
            headers: Vec::new(),
            declared: Some(body.len() as u64),
            body,
            delay: Duration::ZERO,
            failures: 0,
        }
    }

    /// This status with an empty body.
    #[must_use]
    pub fn status(status: u16) -> Self {
        Self {
            status,
            ..Self::file(Bytes::new())
        }
    }

    /// 302 to this address.
    #[must_use]
    pub fn redirect(location: &str) -> Self {
        Self::status(302).header("Location", location)
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Waits before the answer.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// Fails with 503 so many times first.
    #[must_use]
    pub fn failing(self, failures: u64) -> Self {
        Self { failures, ..self }
    }

    /// Lies about the length, or says nothing of it.
    #[must_use]
    pub fn declaring(self, declared: Option<u64>) -> Self {
        Self { declared, ..self }
    }
}

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub struct FileServer {
    address: SocketAddr,
    shared: Arc<Mutex<Shared>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    answers: HashMap<String, Answer>,
    requests: HashMap<String, u64>,
}

impl FileServer {
    /// Starts a server without files, on a port of its own.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let shared = Arc::<Mutex<Shared>>::default();
        let state = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = Arc::clone(&state);
                tokio::spawn(async move {
                    let _ = serve(stream, &state).await;
                });
            }
        });
        Ok(Self {
            address,
            shared,
            task,
        })
    }

    /// Sets the answer for a path, which begins with `/`, and returns its URL.
    pub fn put(&self, path: &str, answer: Answer) -> String {
        lock(&self.shared).answers.insert(path.to_owned(), answer);
        self.url(path)
    }

    /// The URL of a path.
    #[must_use]
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Requests for a path so far.
    #[must_use]
    pub fn requests(&self, path: &str) -> u64 {
        lock(&self.shared).requests.get(path).copied().unwrap_or(0)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers one request and closes: by hand, because no HTTP library lies about lengths.
async fn serve(mut stream: TcpStream, shared: &Mutex<Shared>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < 64 << 10 {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head);
    let path = head.split(' ').nth(1).unwrap_or("/");
    let answer = next_answer(&mut lock(shared), path);
    tokio::time::sleep(answer.delay).await;

    let mut out = format!("HTTP/1.1 {} Answer\r\nConnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        out.extend([name, ": ", value, "\r\n"]);
    }
    if let Some(declared) = answer.declared {
        out.extend(["Content-Length: ", &declared.to_string(), "\r\n"]);
    }
    out.push_str("\r\n");
    stream.write_all(out.as_bytes()).await?;
    stream.write_all(&answer.body).await?;
    stream.shutdown().await
}

fn next_answer(shared: &mut Shared, path: &str) -> Answer {
    *shared.requests.entry(path.to_owned()).or_default() += 1;
    match shared.answers.get_mut(path) {
        None => Answer::status(404),
        Some(answer) if answer.failures > 0 => {
            answer.failures -= 1;
            Answer {
                headers: answer.headers.clone(),
                ..Answer::status(503)
            }
        }
        Some(answer) => answer.clone(),
    }
}
