//! A receiver of webhooks: takes every POST (RFC 9112), reads it to its end, and answers 204.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{READ, Shared};

pub(super) async fn serve(mut stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    shared
        .connections
        .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let mut input = Vec::with_capacity(READ);
    // A client that goes away is none of the sink's business.
    while let Some(length) = length(&input) {
        if input.len() >= length {
            input.drain(..length);
            let delay = shared.mode().delay_ms;
            if delay > 0 {
                tokio::time::sleep(Duration::from_millis(delay)).await;
            }
            shared.took();
            if stream
                .write_all(b"HTTP/1.1 204 No Content\r\n\r\n")
                .await
                .is_err()
            {
                return;
            }
        } else if stream.read_buf(&mut input).await.map_or(0, |read| read) == 0 {
            return;
        }
    }
}

/// How long a request is, with head and body; one byte more than there is while the head is not there. `None`: it says no
/// length.
fn length(input: &[u8]) -> Option<usize> {
    let Some(head) = memchr::memmem::find(input, b"\r\n\r\n") else {
        return Some(input.len() + 1);
    };
    let lines = input[..head].split(|byte| *byte == b'\n');
    let mut lengths = lines.filter_map(|line| {
        let (name, value) = std::str::from_utf8(line).ok()?.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    Some(head + 4 + lengths.next()?)
}
