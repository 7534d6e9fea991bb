//! The properties over what fuzzers found worth keeping, over that with damage, and over generated input.

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use super::{ALL, Property};

/// Inputs of a target, in the order of their names.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// What may be put in, in place of anything: bytes with a meaning somewhere.
const PIECES: &[&[u8]] = &[
    b"\xff",
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b".",
    b"\r\n.\r\n",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"<",
    b">",
    b"@",
    b"=?utf-8?b?",
    b"?=",
    b"--",
    b"\xc3\xbc",
    b"\xe2\x80\xae",
    b"\xf0\x9f\x98\x80",
    b"\\u0000",
    b"\\ud800",
    b"null",
    b"1e999",
    b"127.0.0.1",
    b"[::1]",
    b"@[IPv6:::1]",
    b"%00",
    b"%0d%0a",
    b"Bcc: x@y.example",
    b"</body>",
    b"<!--",
    b"message/rfc822",
    b"multipart/mixed; boundary=x",
    b"       ",
    b"smtp_override",
    b"250-",
    b"4.7.1 ",
    b"\x1f\x8b\x08",
];

#[derive(Debug, Clone)]
enum Damage {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index, prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Repeat(prop::sample::Index, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let piece = prop_oneof![
        4 => prop::sample::select(PIECES).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..12),
    ];
    prop_oneof![
        (any::<prop::sample::Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Flip(at, byte)),
        (any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map(|(a, b)| Damage::Cut(a, b)),
        (any::<prop::sample::Index>(), piece).prop_map(|(at, piece)| Damage::Insert(at, piece)),
        (any::<prop::sample::Index>(), 1_usize..1200).prop_map(|(at, times)| Damage::Repeat(at, times)),
    ]
}

fn damaged(mut data: Vec<u8>, all: &[Damage]) -> Vec<u8> {
    for damage in all {
        let place = |at: &prop::sample::Index| at.index(data.len() + 1);
        match damage {
            Damage::Flip(at, byte) => {
                let at = place(at);
                if let Some(old) = data.get_mut(at) {
                    *old = *byte;
                }
            }
            Damage::Cut(a, b) => {
                let (a, b) = (place(a), place(b));
                data.drain(a.min(b)..a.max(b).min(a.min(b) + 16));
            }
            Damage::Insert(at, piece) => {
                let at = place(at);
                data.splice(at..at, piece.iter().copied());
            }
            Damage::Repeat(at, times) => {
                let at = place(at);
                let piece = data[at..data.len().min(at + 4)].repeat(*times);
                data.splice(at..at, piece);
            }
        }
    }
    data
}

/// `POSTROOM_PROPERTY_CASES` makes it longer; the same seed every time, so that a run can be repeated.
fn cases() -> u32 {
    let wanted = std::env::var("POSTROOM_PROPERTY_CASES").ok();
    wanted.and_then(|text| text.parse().ok()).unwrap_or(300)
}

fn run(property: Property, inputs: impl Strategy<Value = Vec<u8>>) {
    let config = Config {
        cases: cases(),
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&inputs, |data| {
        // The runner catches panics of the property and makes the input smaller.
        property(&data);
        Ok::<(), TestCaseError>(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

fn holds(target: &str) {
    let (_, property) = ALL.iter().find(|(name, _)| *name == target).unwrap();
    let inputs = corpus(target);
    assert!(!inputs.is_empty(), "no corpus for {target}");
    for input in &inputs {
        property(input);
    }
    let damaged = (
        prop::sample::select(inputs),
        prop::collection::vec(damage(), 1..6),
    )
        .prop_map(|(data, damages)| damaged(data, &damages));
    run(*property, damaged);
    run(*property, prop::collection::vec(any::<u8>(), 0..200));
}

macro_rules! over_corpus {
    ($($test:ident: $target:literal,)+) => {
        $(#[test] fn $test() { holds($target); })+

        #[test]
        fn every_property_is_tested() {
            let tested = [$($target),+];
            assert_eq!(ALL.map(|(name, _)| name).as_slice(), tested.as_slice());
            for target in tested {
                let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/fuzz_targets/{target}.rs"));
                assert!(file.exists(), "{}", file.display());
            }
        }
    };
}

over_corpus! {
    any_body_is_a_job_or_refused_with_bounded_errors: "job",
    any_address_is_one_recipient_or_refused: "address",
    any_compressed_body_stays_within_its_bound: "compressed",
    any_text_makes_a_mail_of_the_same_shape: "compose",
    any_body_is_kept_around_links: "rewrite",
    any_mail_comes_out_of_its_dots_unchanged: "stuffing",
    any_server_reply_is_read_within_bounds: "smtp_reply",
    any_sealed_value_opens_only_if_it_was_sealed: "secrets",
    any_url_leads_outside_or_is_refused: "url",
    any_report_fits_a_webhook_or_is_refused: "report",
}
