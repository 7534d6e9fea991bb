//! What deploys Postroom agrees with the code and the documentation: dashboard, alerts, compose file, packages. Reads files,
//! and runs the linters of `dev/check-deployment`.
#![expect(clippy::unwrap_used, reason = "a file that cannot be read is a failed test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const ALERTS: &str = "helm/postroom/files/alerts.yaml";
const RUNBOOKS: &str = "https://github.com/postroom/postroom/blob/main/docs/runbooks.md#";

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(top().join(path)).unwrap()
}

fn dashboards() -> Vec<(String, Value)> {
    let folder = top().join("helm/postroom/files/dashboards");
    let all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (
                name,
                serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
            )
        })
        .collect();
    assert!(!all.is_empty());
    all
}

fn panels(dashboard: &Value) -> &[Value] {
    dashboard["panels"].as_array().unwrap()
}

/// Every query of a dashboard: of panels, variables and annotations.
fn queries(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dashboard];
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match value {
                        Value::String(text) if name == "expr" || name == "definition" => {
                            found.push(text.clone());
                        }
                        other => left.push(other),
                    }
                }
            }
            Value::Array(values) => left.extend(values),
            _ => {}
        }
    }
    found
}

/// Metrics of the operations page, with their labels.
fn documented() -> BTreeMap<String, BTreeSet<String>> {
    let page = read("docs/operations.md");
    let quoted =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let mut all = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> = row.split('|').collect();
        if let [_, name, kind, labels, _, _] = cells[..] {
            let mut labels: BTreeSet<_> = quoted(labels).into_iter().collect();
            let name = quoted(name).remove(0);
            if kind.trim() == "histogram" {
                labels.insert("le".to_owned());
                for suffix in ["bucket", "sum", "count"] {
                    all.insert(format!("{name}_{suffix}"), labels.clone());
                }
            }
            all.insert(name, labels);
        }
    }
    assert!(all.contains_key("postroom_jobs_total") && all.contains_key("rabbitmq_detailed_queue_consumers"));
    all
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Metrics of a query, each with the labels of its selector.
fn selectors(query: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    let mut rest = query;
    while let Some(at) = ["postroom_", "rabbitmq_", "process_", "kube_"]
        .iter()
        .filter_map(|prefix| rest.find(prefix))
        .min()
    {
        let inside_a_word = rest[..at].ends_with(is_name);
        rest = &rest[at..];
        let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        rest = after;
        if inside_a_word {
            continue;
        }
        let labels = after
            .strip_prefix('{')
            .and_then(|inner| inner.split_once('}'))
            .map(|(inner, _)| {
                let outside_of_quotes = inner.split('"').step_by(2).collect::<String>();
                outside_of_quotes
                    .split(',')
                    .map(|part| part.trim().trim_end_matches(['=', '~', '!']).to_owned())
                    .filter(|label| !label.is_empty())
                    .collect()
            });
        found.push((name.to_owned(), labels.unwrap_or_default()));
    }
    found
}

/// What a query asks for and nobody exports.
fn undocumented(query: &str, documented: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let scraped = ["namespace", "job", "instance", "pod"];
    let mut wrong = Vec::new();
    for (name, labels) in selectors(query) {
        match documented.get(&name) {
            None => wrong.push(format!("{name} in {query}")),
            Some(known) => wrong.extend(
                labels
                    .iter()
                    .filter(|label| !known.contains(*label) && !scraped.contains(&label.as_str()))
                    .map(|label| format!("{name}{{{label}}} in {query}")),
            ),
        }
    }
    wrong
}

#[test]
fn a_selector_is_read_with_its_labels() {
    assert_eq!(
        selectors(r#"sum(rate(postroom_a_total{x="1,2", y!~"}"}[5m])) / my_postroom_c"#),
        [(
            "postroom_a_total".to_owned(),
            vec!["x".to_owned(), "y".to_owned()]
        )]
    );
}

#[test]
fn dashboards_ask_for_nothing_but_documented_metrics() {
    let documented = documented();
    for (name, dashboard) in dashboards() {
        let queries = queries(&dashboard);
        assert!(queries.len() > 40, "{name}");
        let wrong: Vec<_> = queries
            .iter()
            .flat_map(|query| undocumented(query, &documented))
            .collect();
        assert!(wrong.is_empty(), "{name}: {wrong:#?}");
    }
}

#[test]
fn every_panel_has_a_title_a_description_and_a_place() {
    for (name, dashboard) in dashboards() {
        let mut seen = BTreeSet::new();
        let mut taken = BTreeSet::new();
        for panel in panels(&dashboard) {
            let title = panel["title"].as_str().unwrap();
            assert!(seen.insert(panel["id"].as_u64().unwrap()), "{name}: {title}: id");
            let is_row = panel["type"] == "row";
            assert!(
                is_row || panel["description"].as_str().is_some_and(|text| text.len() > 8),
                "{name}: {title}: description"
            );
            let place = |field: &str| panel["gridPos"][field].as_u64().unwrap();
            assert!(place("x") + place("w") <= 24, "{name}: {title}");
            for x in place("x")..place("x") + place("w") {
                for y in place("y")..place("y") + place("h") {
                    assert!(taken.insert((x, y)), "{name}: {title} lies over another panel");
                }
            }
        }
    }
}

/// The sum over workers would count every waiting job once per worker.
#[test]
fn what_every_process_shows_for_the_whole_installation_is_never_summed() {
    let whole = [
        "postroom_waiting_jobs",
        "postroom_held_jobs",
        "postroom_unhealthy_accounts",
        "postroom_outbox_jobs",
        "postroom_outbox_oldest_seconds",
        "postroom_outbox_full",
        "postroom_webhook_pending",
        "postroom_webhook_oldest_pending_seconds",
    ];
    let mut all: Vec<_> = dashboards()
        .iter()
        .flat_map(|(_, dashboard)| queries(dashboard))
        .collect();
    all.extend(rules().into_iter().map(|rule| rule.expr));
    let mut asked = 0;
    for query in all {
        for (name, _) in selectors(&query)
            .iter()
            .filter(|(name, _)| whole.contains(&name.as_str()))
        {
            asked += 1;
            let (before, _) = query.split_once(name.as_str()).unwrap();
            let aggregation = before.trim_end_matches('(').trim_end();
            let aggregation = aggregation
                .rsplit_once(" by ")
                .map_or(aggregation, |(outer, _)| outer);
            assert!(aggregation.ends_with("max"), "{query}");
        }
    }
    assert!(asked > 8, "{asked}");
}

/// Without it the largest of the reasons would pass for all of them.
#[test]
fn what_a_metric_is_divided_by_is_chosen_or_kept() {
    let mut asked = 0;
    let mut all: Vec<_> = dashboards().iter().flat_map(|(_, it)| queries(it)).collect();
    all.extend(rules().into_iter().map(|rule| rule.expr));
    for query in all.iter().filter(|query| query.contains("max")) {
        for part in query
            .split("postroom_waiting_jobs")
            .collect::<Vec<_>>()
            .windows(2)
        {
            asked += 1;
            let chosen = part[1].split('}').next().unwrap().contains("reason=\"");
            let (_, by) = part[0].rsplit_once("max by (").unwrap();
            let kept = by.split(')').next().unwrap().contains("reason");
            assert!(chosen || kept, "{query}");
        }
    }
    assert!(asked > 4, "{asked}");
}

/// One alert, as far as it is looked at here; `promtool` sees to the rest.
struct Rule {
    name: String,
    expr: String,
    text: String,
}

fn rules() -> Vec<Rule> {
    let file = read(ALERTS);
    let rules: Vec<_> = file
        .split("- alert: ")
        .skip(1)
        .map(|text| {
            let (name, rest) = text.split_once('\n').unwrap();
            let (_, expr) = rest.split_once("expr:").unwrap();
            let end = ["\n        for:", "\n        labels:"]
                .iter()
                .filter_map(|end| expr.find(end))
                .min()
                .unwrap();
            Rule {
                name: name.trim().to_owned(),
                expr: expr[..end].trim().to_owned(),
                text: text.to_owned(),
            }
        })
        .collect();
    assert!(rules.len() > 20);
    rules
}

#[test]
fn alerts_ask_for_nothing_but_documented_metrics() {
    let mut documented = documented();
    documented.insert(
        "kube_pod_container_resource_limits".to_owned(),
        BTreeSet::from(["resource".to_owned()]),
    );
    let wrong: Vec<_> = rules()
        .iter()
        .flat_map(|rule| undocumented(&rule.expr, &documented))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_alert_has_a_runbook_a_test_and_says_what_is_wrong() {
    let runbooks = read("docs/runbooks.md");
    let tests = read("tests/prometheus/alerts_test.yaml");
    for rule in rules() {
        let name = &rule.name;
        for part in ["severity: ", "summary: ", "description: "] {
            assert!(rule.text.contains(part), "{name} has no {part}");
        }
        let link = format!("runbook_url: {RUNBOOKS}{}\n", name.to_lowercase());
        assert!(rule.text.contains(&link), "{name} should have {link}");
        let (_, section) = runbooks
            .split_once(&format!("\n## {name}\n"))
            .unwrap_or_else(|| panic!("docs/runbooks.md has no section {name}"));
        let section = section.split("\n## ").next().unwrap();
        for part in ["**Means:**", "**Look at:**", "**Do:**"] {
            assert!(section.contains(part), "docs/runbooks.md, {name}: {part}");
        }
        let fires = format!("ALERTS{{alertname=\"{name}\", alertstate=\"firing\", ");
        assert!(tests.contains(&fires), "{name} has no test that it fires");
    }
    let names: BTreeSet<_> = rules().into_iter().map(|rule| rule.name).collect();
    let sections = runbooks
        .lines()
        .filter_map(|line| line.strip_prefix("## Postroom"));
    for section in sections {
        assert!(
            names.contains(&format!("Postroom{section}")),
            "no alert Postroom{section}"
        );
    }
}

#[test]
fn the_runbook_explains_every_class_of_errors_that_the_metric_has() {
    let code = read("src/db/error.rs");
    let (_, labels) = code.split_once("pub fn class(&self)").unwrap();
    let classes: BTreeSet<_> = labels
        .split("=> \"")
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
        .filter(|class| !["closed", "configuration"].contains(class))
        .chain(["timeout"])
        .collect();
    assert!(classes.len() >= 10, "{classes:?}");
    let runbooks = read("docs/runbooks.md");
    let (_, section) = runbooks.split_once("\n## PostroomDatabaseErrors\n").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let metrics = read("docs/operations.md");
    let row = metrics
        .lines()
        .find(|line| line.contains("`postroom_sql_errors_total`"))
        .unwrap();
    for class in classes {
        assert!(
            section.contains(&format!("`{class}`")),
            "docs/runbooks.md: {class}"
        );
        assert!(row.contains(class), "docs/operations.md: {class}");
    }
}

/// Variables that a file sets.
fn variables(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(|line| line.trim_start().trim_start_matches('#'))
        .filter(|line| line.starts_with("POSTROOM_") || line.starts_with("OTEL_"))
        .filter_map(|line| line.split([':', '=']).next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn only_settings_that_exist_are_spoken_of() {
    let page = read("docs/configuration.md");
    for file in [
        "docs/runbooks.md",
        "docs/observability.md",
        "docs/installing.md",
        "docs/publishing.md",
        "docs/webhooks.md",
        "docs/upgrading.md",
        "docs/moving-from-genro-mail-proxy.md",
        "docs/moving-from-celery.md",
        "helm/postroom/files/dashboards/overview.json",
    ] {
        let text = read(file);
        let is_in_a_name = |c: char| c.is_ascii_uppercase() || c == '_';
        for rest in text.split("POSTROOM_").skip(1) {
            let name = &rest[..rest.find(|c| !is_in_a_name(c)).unwrap_or(rest.len())];
            assert!(
                page.contains(&format!("`POSTROOM_{name}`")),
                "{file}: POSTROOM_{name}"
            );
        }
    }
}

#[test]
fn only_settings_that_exist_are_set() {
    let page = read("docs/configuration.md");
    for file in ["docker-compose.yml", "packaging/postroom.env"] {
        let set = variables(&read(file));
        assert!(!set.is_empty(), "{file}");
        for name in set {
            assert!(page.contains(&format!("`{name}`")), "{file}: {name}");
        }
    }
}

/// Containers and services that are stopped sooner than the grace period lose their leases in the middle of a mail.
#[test]
fn whoever_stops_a_worker_waits_longer_than_its_grace_period() {
    for (file, limit) in [
        ("docker-compose.yml", "stop_grace_period: 75s"),
        ("packaging/postroom-worker.service", "TimeoutStopSec=75s"),
        ("packaging/postroom-bridge.service", "TimeoutStopSec=75s"),
    ] {
        assert!(read(file).contains(limit), "{file}");
    }
    assert!(
        read("docs/configuration.md")
            .contains("| `POSTROOM_GRACE_PERIOD` | `--grace-period` | `DURATION` | `60s` |")
    );
}

/// The new program is what migrates, so a restart by the package would come before anybody could have done it.
#[test]
fn an_upgrade_of_the_package_restarts_nothing_before_the_schema_is_migrated() {
    let build = read("packaging/build-deb");
    let (_, script) = build.split_once("DEBIAN/postinst\" <<'SCRIPT'\n").unwrap();
    let (script, _) = script.split_once("\nSCRIPT\n").unwrap();
    let done: Vec<_> = script
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("systemctl"))
        .collect();
    assert_eq!(done, ["systemctl --system daemon-reload || true"]);
    let said: Vec<_> = script.split("echo ").skip(1).collect();
    assert!(said[0].contains("postroom migrate") && said[1].contains("systemctl try-restart"));
    let needrestart = read("packaging/needrestart.conf");
    assert!(needrestart.contains("{qr(^postroom-(worker|bridge))} = 0;"));

    let page = read("docs/upgrading.md");
    let steps = [
        "apt install ./postroom_",
        "postroom migrate --grant",
        "systemctl try-restart postroom-worker",
    ];
    let places = steps.map(|step| {
        page.find(step)
            .unwrap_or_else(|| panic!("docs/upgrading.md: {step}"))
    });
    assert!(places.is_sorted(), "{places:?}");
}

/// A setting in the common file wins over the line of the unit: an address there would be that of both.
#[test]
fn each_unit_has_a_file_of_settings_of_its_own_after_the_common_one() {
    for service in ["worker", "bridge"] {
        let unit = read(&format!("packaging/postroom-{service}.service"));
        let files: Vec<_> = unit
            .lines()
            .filter(|line| line.starts_with("EnvironmentFile="))
            .collect();
        let own = format!("EnvironmentFile=-/etc/postroom/{service}.env");
        assert_eq!(
            files,
            ["EnvironmentFile=-/etc/postroom/postroom.env", own.as_str()]
        );
    }
    assert!(!variables(&read("packaging/postroom.env")).contains("POSTROOM_HTTP_ADDR"));
}

#[test]
fn the_steps_of_an_installation_migrate_before_they_start() {
    let page = read("docs/installing.md");
    let steps = [
        "apt install",
        "> amqp-url",
        "> owner-database-url",
        "postroom migrate --grant",
        "systemctl enable --now",
    ];
    let places = steps.map(|step| {
        page.find(step)
            .unwrap_or_else(|| panic!("docs/installing.md: {step}"))
    });
    assert!(places.is_sorted(), "{places:?}");
    // Every secret that is a file has its place in a unit or in the page.
    let unit = read("packaging/postroom-worker.service");
    for secret in ["AMQP_URL", "DATABASE_URL", "ENCRYPTION_KEYS"] {
        assert!(unit.contains(&format!("POSTROOM_{secret}_FILE=%d/")), "{secret}");
    }
    for secret in [
        "POSTROOM_OVERRIDE_KEYS_FILE=%d/",
        "OTEL_EXPORTER_OTLP_HEADERS_FILE=%d/",
        "AWS_SECRET_ACCESS_KEY",
    ] {
        assert!(page.contains(secret), "{secret}");
    }
}

#[test]
fn the_image_is_built_from_the_toolchain_and_version_of_the_manifest() {
    let (docker, manifest) = (read("Dockerfile"), read("Cargo.toml"));
    let version = |text: &str, key: &str| -> Vec<u32> {
        let (_, rest) = text.split_once(key).unwrap();
        let value: String = rest
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        value.split('.').map(|part| part.parse().unwrap()).collect()
    };
    assert_eq!(
        version(&docker, "ARG VERSION="),
        version(&manifest, "\nversion = \"")
    );
    assert!(version(&docker, "ARG RUST_VERSION=") >= version(&manifest, "rust-version = \""));
    let last = docker.rsplit("\nFROM ").next().unwrap();
    assert!(last.contains("\nUSER 65532:65532\n"), "numeric and not root");
}

/// The jobs of a workflow: names and texts.
fn workflow_jobs(path: &str) -> Vec<(String, String)> {
    let file = read(path);
    let (_, jobs) = file.split_once("\njobs:\n").unwrap();
    let mut found: Vec<(String, String)> = Vec::new();
    for line in jobs.lines() {
        let name = line.strip_prefix("  ").and_then(|line| line.strip_suffix(':'));
        match name.filter(|name| !name.starts_with([' ', '#'])) {
            Some(name) => found.push((name.to_owned(), String::new())),
            None => found.last_mut().unwrap().1.extend([line, "\n"]),
        }
    }
    assert!(found.len() > 5, "{path}");
    found
}

const WORKFLOWS: [&str; 2] = [".github/workflows/ci.yml", ".github/workflows/release.yml"];

/// Elsewhere it is bash; in a container it is sh, to which half of bash is a syntax error.
#[test]
fn a_job_in_a_container_names_the_shell_of_its_steps() {
    let jobs: Vec<_> = WORKFLOWS.into_iter().flat_map(workflow_jobs).collect();
    let mut in_containers = 0;
    for (name, text) in jobs.iter().filter(|(_, text)| text.contains("\n    container: ")) {
        in_containers += 1;
        assert!(
            text.contains("\n    defaults: { run: { shell: bash } }\n"),
            "{name}: `{text}`"
        );
    }
    assert_eq!(in_containers, 1);
}

#[test]
fn nothing_of_a_release_gets_a_name_before_all_that_proves_it_has_worked() {
    let jobs: BTreeMap<_, _> = workflow_jobs(".github/workflows/release.yml")
        .into_iter()
        .collect();
    let needs = |job: &str| -> BTreeSet<String> {
        let (_, rest) = jobs[job].split_once("needs: ").unwrap();
        let names = rest.lines().next().unwrap().trim_matches(['[', ']']);
        names.split(", ").map(str::to_owned).collect()
    };
    let naming: Vec<_> = jobs
        .iter()
        .filter(|(_, text)| {
            ["imagetools create", "helm push", "gh release create"]
                .iter()
                .any(|it| text.contains(it))
        })
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(naming, ["manifest", "release"]);
    assert!(needs("release").contains("manifest"));
    for proof in ["version", "checks", "packages", "components", "image"] {
        assert!(needs("manifest").contains(proof), "{proof}");
    }
    assert!(jobs["checks"].contains("uses: ./.github/workflows/ci.yml"));
    assert!(jobs["image"].contains("push-by-digest=true"));
}

/// Without values the chart fails: it needs the names of three secrets.
#[test]
fn workflows_render_the_chart_with_values() {
    let mut rendered = 0;
    for path in WORKFLOWS {
        for line in read(path).lines().map(str::trim) {
            if line.contains("helm template ") || line.contains("helm lint ") {
                rendered += 1;
                assert!(
                    line.contains("helm/postroom --values \"$values\""),
                    "{path}: {line}"
                );
            }
        }
    }
    assert_eq!(rendered, 2);
    assert!(read(WORKFLOWS[0]).contains("for values in helm/postroom/ci/*-values.yaml; do\n"));
}

#[test]
fn linters_and_promtool_are_content() {
    let output = Command::new(top().join("dev/check-deployment")).output().unwrap();
    assert!(
        output.status.success(),
        "dev/check-deployment:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn what_is_shipped_reads_numbers_as_exactly_as_the_tests_do() {
    // A dependency of the tests switches this on for them: no other test would miss it.
    let manifest = read("Cargo.toml");
    let (_, dependencies) = manifest.split_once("\n[dependencies]\n").unwrap();
    let json = dependencies.lines().take_while(|line| !line.starts_with('['));
    let json = json
        .into_iter()
        .find(|line| line.starts_with("serde_json ="))
        .unwrap();
    assert!(json.contains("\"float_roundtrip\""), "{json}");
}
