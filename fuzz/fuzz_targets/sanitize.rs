#![no_main]

#[allow(dead_code)] // Each target uses one of them.
#[path = "../../tests/local/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::sanitize(bytes));
