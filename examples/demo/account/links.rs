//! Links to large files, followed as a reader of the mail would.

use futures_util::StreamExt as _;

use crate::setup::World;

/// Downloads at once.
const AT_ONCE: usize = 8;

/// A link in a mail.
pub(super) struct Link {
    /// `tenant/id` of the job.
    pub(super) job: String,
    pub(super) url: String,
    pub(super) expected: Vec<u8>,
}

impl Link {
    /// The stored object.
    pub(super) fn path(&self) -> &str {
        self.url.split('?').next().unwrap_or_default()
    }
}

/// Downloads all and compares; how many were right, and what was not.
pub(super) async fn download(world: &World, links: &[Link]) -> (usize, Vec<String>) {
    let wrong = links.iter().map(|link| follow(world, link));
    let wrong: Vec<Option<String>> = futures_util::stream::iter(wrong)
        .buffered(AT_ONCE)
        .collect()
        .await;
    let good = wrong.iter().filter(|wrong| wrong.is_none()).count();
    let mut problems: Vec<String> = wrong.into_iter().flatten().collect();
    match links.first() {
        Some(link) => problems.extend(refused(world, link).await),
        None => problems.push("no mail holds a link".to_owned()),
    }
    (good, problems)
}

async fn follow(world: &World, link: &Link) -> Option<String> {
    let answer = match world.http.get(&link.url).send().await {
        Ok(answer) => answer,
        Err(error) => return Some(format!("{}: its link: {}", link.job, error.without_url())),
    };
    let status = answer.status();
    let bytes = answer.bytes().await.unwrap_or_default();
    if status.is_success() && bytes == link.expected {
        return None;
    }
    Some(format!(
        "{}: its link gives {status} and {} bytes, expected the {} bytes of the job",
        link.job,
        bytes.len(),
        link.expected.len()
    ))
}

/// A link without its signature must not work: else the server would not have checked the others.
async fn refused(world: &World, link: &Link) -> Option<String> {
    let status = world.http.get(link.path()).send().await.ok()?.status();
    (!status.is_client_error())
        .then(|| format!("a link without its signature gives {status}, expected a refusal"))
}
