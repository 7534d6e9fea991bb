//! An S3 server in this process. It checks signatures and expiry like the real one, keeps its objects in a temporary
//! folder, and can be told to fail.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::{IF_MATCH, IF_NONE_MATCH};
use axum::response::{IntoResponse, Response};
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// The only access key.
pub const ACCESS_KEY: &str = "postroom-test";

/// Its secret.
pub const SECRET_KEY: &str = "not-a-secret-but-long-enough";

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub struct S3Server {
    address: SocketAddr,
    folder: tempfile::TempDir,
    bucket: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    service: S3Service,
    /// Requests still to be answered with 503; `u64::MAX` is until told.
    failing: AtomicU64,
    /// Whether conditional writes are answered with 501, as some servers do that speak S3.
    unconditional: AtomicBool,
    requests: Mutex<HashMap<String, u64>>,
}

impl S3Server {
    /// Starts a server with one empty bucket, on a port of its own.
    ///
    /// # Errors
    /// If the folder or the socket cannot be made.
    pub async fn start(bucket: &str) -> io::Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join(bucket))?;
        let files =
            s3s_fs::FileSystem::new(folder.path()).map_err(|error| io::Error::other(format!("{error:?}")))?;
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let shared = Arc::new(Shared {
            service: builder.build(),
            failing: AtomicU64::new(0),
            unconditional: AtomicBool::new(false),
            requests: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let app = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let task = tokio::spawn(async move {
            let _ = axum::serve(listener, app).await;
        });
        Ok(Self {
            address,
            folder,
            bucket: bucket.to_owned(),
            shared,
            task,
        })
    }

    /// Base URL, `http://127.0.0.1:port`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The variables an S3 client reads.
    #[must_use]
    pub fn env(&self) -> Vec<(String, String)> {
        [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", &self.endpoint()),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// Answers the next `count` requests with 503.
    pub fn fail_next(&self, count: u64) {
        self.shared.failing.store(count, Ordering::SeqCst);
    }

    /// Answers every request with 503, or none any more.
    pub fn fail(&self, on: bool) {
        self.fail_next(if on { u64::MAX } else { 0 });
    }

    /// Answers conditional writes with 501 from now on.
    pub fn refuse_conditions(&self) {
        self.shared.unconditional.store(true, Ordering::SeqCst);
    }

    /// Requests so far with this method, failed ones among them.
    #[must_use]
    pub fn requests(&self, method: &str) -> u64 {
        self.shared.counts().get(method).copied().unwrap_or(0)
    }

    /// All objects of the bucket, as keys with their sizes in bytes, sorted.
    #[must_use]
    pub fn objects(&self) -> Vec<(String, u64)> {
        let root = self.root();
        let mut found: Vec<_> = self
            .files()
            .into_iter()
            .map(|(path, size)| {
                let key = path.strip_prefix(&root).unwrap_or(&path).display().to_string();
                (key, size)
            })
            .collect();
        found.sort();
        found
    }

    /// Makes all objects as if they had been written so long ago.
    ///
    /// # Errors
    /// If a file cannot be changed.
    pub fn age(&self, by: Duration) -> io::Result<()> {
        let then = SystemTime::now() - by;
        for (path, _) in self.files() {
            std::fs::File::options()
                .write(true)
                .open(path)?
                .set_modified(then)?;
        }
        Ok(())
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join(&self.bucket)
    }

    /// The files of all objects, with their sizes in bytes.
    fn files(&self) -> Vec<(PathBuf, u64)> {
        let mut found = Vec::new();
        let mut folders = vec![self.root()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                    Ok(meta) => found.push((entry.path(), meta.len())),
                    Err(_) => {}
                }
            }
        }
        found
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Shared {
    fn counts(&self) -> std::sync::MutexGuard<'_, HashMap<String, u64>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn must_fail(&self) -> bool {
        let take = |left: u64| match left {
            0 => None,
            u64::MAX => Some(u64::MAX),
            left => Some(left - 1),
        };
        self.failing
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .is_ok()
    }
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    *shared.counts().entry(request.method().to_string()).or_default() += 1;
    if shared.must_fail() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    let headers = request.headers();
    let conditional = headers.contains_key(IF_NONE_MATCH) || headers.contains_key(IF_MATCH);
    if conditional && shared.unconditional.load(Ordering::SeqCst) {
        return StatusCode::NOT_IMPLEMENTED.into_response();
    }
    let request = request.map(s3s::Body::http_body_unsync);
    match shared.service.call(request).await {
        Ok(response) => response.map(Body::new),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
