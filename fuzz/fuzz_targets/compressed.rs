#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| postroom::properties::compressed(data));
