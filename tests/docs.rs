//! What the documentation says about the code, checked against the code: links, metrics, report fields, reasons, layers,
//! names of tests. Reads files only.
#![expect(clippy::unwrap_used, reason = "a file that cannot be read is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(top().join(path)).unwrap()
}

/// Files with this extension below a folder of the project.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![top().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    found
}

fn documents() -> Vec<PathBuf> {
    let mut all = files("docs", "md");
    let at_the_top = fs::read_dir(top()).unwrap().map(|entry| entry.unwrap().path());
    all.extend(at_the_top.filter(|path| path.extension().is_some_and(|e| e == "md")));
    all
}

/// The text without fenced code.
fn prose(markdown: &str) -> String {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in markdown.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// The anchor of a heading, as GitHub makes it.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn anchors(markdown: &str) -> BTreeSet<String> {
    let text = prose(markdown);
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(anchor)
        .collect()
}

/// Targets of `[text](target)`.
fn links(markdown: &str) -> Vec<String> {
    let text = prose(markdown);
    let after = text.split("](").skip(1);
    after
        .filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()))
        .collect()
}

#[test]
fn relative_links_lead_somewhere() {
    let mut broken = Vec::new();
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in links(&text).iter().filter(|link| !link.contains("://")) {
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                document.clone()
            } else {
                document.parent().unwrap().join(path)
            };
            let leads = target.exists()
                && (heading.is_empty() || anchors(&fs::read_to_string(&target).unwrap()).contains(heading));
            if !leads {
                broken.push(format!("{}: {link}", document.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The beginning of each metric's row in the documentation: name, type, labels.
fn metric_rows() -> Vec<String> {
    let source = read("src/telemetry/metrics.rs");
    let (_, table) = source.split_once("\nmetrics! {").unwrap();
    let (table, _) = table.split_once("\n}").unwrap();
    let lines = table
        .lines()
        .map(str::trim)
        .filter(|line| !line.starts_with("//"));
    lines
        .filter_map(|line| {
            let (_, definition) = line.split_once(": ")?;
            let kind = definition.split(' ').next()?.trim_start_matches("Int");
            let kind = kind.trim_end_matches("Vec").to_lowercase();
            let mut quoted = definition.split('"').skip(1).step_by(2);
            let name = quoted.next()?;
            let labels: Vec<String> = quoted.map(|label| format!("`{label}`")).collect();
            Some(format!("| `{name}` | {kind} | {} |", labels.join(", ")))
        })
        .collect()
}

#[test]
fn every_metric_is_in_the_operations_page() {
    let page = read("docs/operations.md");
    let rows = metric_rows();
    assert!(
        rows.len() > 20,
        "the table of metrics is written otherwise than this test reads it"
    );
    let missing: Vec<_> = rows.iter().filter(|row| !page.contains(row.as_str())).collect();
    assert!(
        missing.is_empty(),
        "docs/operations.md should have these rows:\n{missing:#?}"
    );
}

/// Words that begin with `POSTROOM_`; not that alone, which stands for all.
fn variables(text: &str) -> BTreeSet<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.split(|c| !is_part(c))
        .filter(|word| word.starts_with("POSTROOM_") && !word.ends_with('_'))
        .collect()
}

#[test]
fn every_variable_in_the_documentation_is_a_setting() {
    let settings = read("src/config/settings.rs");
    let tools = [
        "dev/lib/roots.sh",
        "dev/servers",
        "src/fail_point.rs",
        "src/ledger/tests/model.rs",
        "src/properties/tests.rs",
    ]
    .map(read)
    .concat();
    let is_known = |name: &str| {
        let quoted = |name: &str| settings.contains(&format!("\"{name}\""));
        quoted(name) || name.strip_suffix("_FILE").is_some_and(quoted) || variables(&tools).contains(name)
    };
    let mut wrong = Vec::new();
    for document in documents()
        .into_iter()
        .chain([top().join("helm/postroom/README.md")])
    {
        let text = fs::read_to_string(&document).unwrap();
        let unknown = variables(&text).into_iter().filter(|name| !is_known(name));
        wrong.extend(unknown.map(|name| format!("{}: {name}", document.display())));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_report_type_and_field_is_in_the_reports_page() {
    let page = read("docs/reports.md");
    let source = read("src/report.rs");
    let types = source
        .split('"')
        .skip(1)
        .step_by(2)
        .filter(|text| text.starts_with("mail."));
    let missing: Vec<_> = types
        .filter(|kind| !page.contains(&format!("`{kind}`")))
        .collect();
    assert!(missing.is_empty(), "types: {missing:?}");
    let (_, data) = source.split_once("pub struct ReportData {").unwrap();
    let (data, _) = data.split_once("\n}").unwrap();
    let fields = data.lines().filter_map(|line| line.trim().strip_prefix("pub "));
    let names = fields.map(|field| field.split(':').next().unwrap());
    let missing: Vec<_> = names
        .map(|name| if name == "is_final" { "final" } else { name })
        .filter(|name| !page.contains(&format!("| `{name}` |")))
        .collect();
    assert!(missing.is_empty(), "fields of data: {missing:?}");
}

#[test]
fn every_reason_of_a_refused_mail_is_in_the_reports_page() {
    let page = read("docs/reports.md");
    let source = read("src/smtp/classify/verdict.rs");
    let is_word = |text: &&str| {
        !text.is_empty()
            && text
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    let reasons: Vec<_> = source.split('"').skip(1).step_by(2).filter(is_word).collect();
    assert!(
        reasons.len() > 20,
        "reasons are written otherwise than this test reads them"
    );
    let missing: Vec<_> = reasons
        .iter()
        .filter(|reason| !page.contains(&format!("`{reason}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// The words of several parts in a file's literals, without its tests and comments.
fn words(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    let code: Vec<_> = lines.collect();
    let is_word = |text: &&str| {
        let parts: Vec<_> = text.split('_').collect();
        let is_part = |part: &&str| {
            !part.is_empty() && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
        };
        parts.len() > 1 && parts.iter().all(is_part)
    };
    let code = code.join("\n");
    // Every piece: a quote among the characters would turn the literals out.
    code.split('"')
        .skip(1)
        .filter(is_word)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_reason_of_a_report_is_in_the_reports_page() {
    /// Words of these modules that are none: why the platform sends, a column, a decision.
    const OTHERS: &[&str] = &["not_configured", "send_error", "in_order", "not_sent"];
    let modules = [
        "attachment",
        "compose",
        "directory",
        "smtp",
        "pipeline",
        "ledger/odd",
    ];
    let mut sources: Vec<_> = modules
        .iter()
        .flat_map(|module| files(&format!("src/{module}"), "rs"))
        .collect();
    sources.extend(modules.map(|module| top().join(format!("src/{module}.rs"))));
    sources.extend(["failure", "settlement", "worker/bury"].map(|file| top().join(format!("src/{file}.rs"))));
    sources.retain(|path| !path.iter().any(|part| part == "tests" || part == "tests.rs"));
    let reasons: BTreeSet<_> = sources.iter().flat_map(|path| words(path)).collect();
    assert!(
        reasons.len() > 60,
        "reasons are written otherwise than this test reads them: {reasons:?}"
    );
    let page = read("docs/reports.md");
    let is_missing =
        |reason: &&String| !OTHERS.contains(&reason.as_str()) && !page.contains(&format!("`{reason}`"));
    let missing: Vec<_> = reasons.iter().filter(is_missing).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_reason_of_a_rejection_is_in_the_contract() {
    let page = read("docs/contract.md");
    let source = read("src/job/decode.rs");
    let (_, table) = source.split_once("\nreasons! {").unwrap();
    let (table, _) = table.split_once("\n}").unwrap();
    let reasons: Vec<_> = table.lines().filter_map(|line| line.split('"').nth(1)).collect();
    assert!(reasons.len() > 10, "{reasons:?}");
    let missing: Vec<_> = reasons
        .iter()
        .filter(|reason| !page.contains(&format!("`{reason}`")))
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn programs_in_python_and_node_are_run_by_a_test() {
    let mut tests = String::new();
    for file in files("tests/it", "rs") {
        tests.push_str(&fs::read_to_string(file).unwrap());
    }
    let mut programs = 0;
    for page in ["docs/publishing.md", "docs/webhooks.md"] {
        let text = read(page);
        let lines: Vec<_> = text.lines().collect();
        for (at, _) in lines
            .iter()
            .enumerate()
            .filter(|(_, line)| matches!(**line, "```python" | "```js"))
        {
            let mark = at.checked_sub(1).map_or("", |before| lines[before]);
            let name = mark
                .strip_prefix("<!-- run: ")
                .and_then(|rest| rest.strip_suffix(" -->"));
            let name = name.unwrap_or_else(|| panic!("{page}, line {}: not marked to be run", at + 1));
            assert!(
                tests.contains(&format!("\"{name}\"")),
                "{page}: nobody runs {name}"
            );
            programs += 1;
        }
    }
    assert!(programs > 8, "{programs}");
}

/// The first column and the names in the second, row by row.
fn layers() -> Vec<BTreeSet<String>> {
    let page = read("docs/architecture.md");
    let (_, table) = page.split_once("| layer | modules |").unwrap();
    table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|row| row.split('`').skip(1).step_by(2).map(str::to_owned).collect())
        .collect()
}

#[test]
fn modules_use_their_own_layer_and_those_below() {
    let mut place = BTreeMap::new();
    for (layer, modules) in layers().iter().enumerate() {
        place.extend(modules.iter().map(|module| (module.clone(), layer)));
    }
    let mut wrong = Vec::new();
    for file in files("src", "rs") {
        let path = file.strip_prefix(top().join("src")).unwrap();
        let module = path.iter().next().unwrap().to_string_lossy();
        let module = module.trim_end_matches(".rs");
        let is_test = path.iter().any(|part| part == "tests" || part == "tests.rs");
        if is_test || matches!(module, "lib" | "main" | "properties") {
            continue;
        }
        let Some(own) = place.get(module) else {
            wrong.push(format!("`{module}` is in no layer of docs/architecture.md"));
            continue;
        };
        let text = fs::read_to_string(&file).unwrap();
        let (code, _) = text
            .split_once("#[cfg(test)]\nmod tests {")
            .unwrap_or((&text, ""));
        let code = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        for used in code.flat_map(|line| line.split("crate::").skip(1)) {
            let used: String = used
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            let is_exception = (module, used.as_str()) == ("config", "secret");
            if !is_exception && place.get(&used).is_some_and(|layer| layer < own) {
                wrong.push(format!("{} uses `{used}`, which is above it", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn tests_named_in_the_documentation_exist() {
    let mut code = String::new();
    for folder in ["src", "tests", "testkit/src"] {
        for file in files(folder, "rs") {
            code.push_str(&fs::read_to_string(file).unwrap());
        }
    }
    let page = ["docs/guarantees.md", "docs/security.md", "SECURITY.md"]
        .map(read)
        .join("\n");
    let names = page.split('`').skip(1).step_by(2).filter(|name| {
        let words = name.split('_').count();
        words > 3
            && name
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    });
    let missing: Vec<_> = names
        .filter(|name| !code.contains(&format!("fn {name}(")) && !code.contains(&format!(" {name}: \"")))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_failure_in_the_guarantees_names_its_test_or_says_why_there_is_none() {
    let page = read("docs/guarantees.md");
    let mut rows = 0;
    for heading in ["## Failure windows", "## What the leases withstand"] {
        let (_, table) = page.split_once(heading).unwrap();
        let table = table
            .trim_start()
            .lines()
            .take_while(|line| line.starts_with('|'));
        for row in table.skip(2) {
            let last = row
                .trim_end_matches([' ', '|'])
                .rsplit('|')
                .next()
                .unwrap()
                .trim();
            assert!(last.starts_with('`') || last.starts_with("not tested: "), "{row}");
            rows += 1;
        }
    }
    assert!(rows > 40, "{rows}");
}

#[test]
fn every_fail_point_has_a_test_that_acts_there() {
    let source = read("src/fail_point.rs");
    let mut tests = String::new();
    for file in files("tests/it", "rs") {
        tests.push_str(&fs::read_to_string(file).unwrap());
    }
    let points: Vec<_> = source
        .lines()
        .filter_map(|line| line.trim().split_once(" = \"")?.1.split_once("\", "))
        .map(|(name, _)| name)
        .collect();
    assert!(
        points.len() > 15,
        "points are written otherwise than this test reads them: {points:?}"
    );
    let acts = |name: &&str| tests.contains(&format!("\"{name}\"")) || tests.contains(&format!("{name}="));
    let idle: Vec<_> = points.iter().filter(|name| !acts(name)).collect();
    assert!(idle.is_empty(), "{idle:?}");
}
