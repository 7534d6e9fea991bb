//! A short fault campaign: see `postroom_testkit::chaos`, and `make chaos` for the long one.

use std::path::{Path, PathBuf};

use postroom_testkit::chaos::{self, Settings, table};

/// Any other must do as well; one that is fixed can be debugged.
const SEED: u64 = 3;

#[tokio::test]
async fn under_random_faults_no_job_is_lost_and_none_is_sent_twice_without_a_reason() {
    let name = format!("chaos-{}", std::process::id());
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let program = PathBuf::from(env!("CARGO_BIN_EXE_postroom"));
    let settings = Settings::short(SEED, program, folder.clone());
    let audit = Box::pin(chaos::run(&settings, &|line| eprintln!("{line}")))
        .await
        .unwrap();
    assert!(audit.is_good(), "{}", table::print(&audit));
    assert_eq!(audit.injected(), settings.faults);
    // The logs stay when the test failed.
    std::fs::remove_dir_all(folder).unwrap();
}
