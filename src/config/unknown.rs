//! Variables that look like settings and are none: a misspelt one must not go unnoticed.

use super::Sources;
use super::settings::SETTINGS;

impl Sources {
    /// A line for every `POSTROOM_*` variable that means nothing, with the name that may have been meant.
    #[must_use]
    pub fn unknown(&self) -> Vec<String> {
        let known: Vec<String> = SETTINGS
            .iter()
            .flat_map(|setting| {
                [
                    Some(setting.name.to_owned()),
                    setting.secret.then(|| setting.file_variable()),
                ]
            })
            .flatten()
            .collect();
        let unknown = self.env.keys().filter(|name| {
            name.starts_with("POSTROOM_")
                && !name.starts_with("POSTROOM_TEST_")
                && !is_service_link(name)
                && !crate::fail_point::is_variable(name)
                && !known.contains(name)
        });
        unknown
            .map(|name| match nearest(name, &known) {
                Some(meant) => format!("{name} is not a setting; did you mean {meant}?"),
                None => format!("{name} is not a setting; `postroom --help` lists them"),
            })
            .collect()
    }
}

/// Kubernetes sets these in every pod when a service is called `postroom`.
fn is_service_link(name: &str) -> bool {
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.ends_with("_PORT")
        || name.contains("_PORT_")
}

/// The known name with the fewest edits, if they are few.
fn nearest<'a>(name: &str, known: &'a [String]) -> Option<&'a str> {
    let best = known.iter().min_by_key(|candidate| edits(name, candidate))?;
    (edits(name, best) <= 4).then_some(best)
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
