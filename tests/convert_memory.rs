//! Converting takes the memory of the largest tensor and a little more, however large the checkpoint is.
#![cfg(target_os = "linux")]

use convert::synthetic::{self, Layout, Number};
use convert::{Options, convert};

/// Resident memory of this process now and at its highest, in bytes.
fn resident() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap();
        1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    (field("VmRSS:"), field("VmHWM:"))
}

#[test]
fn as_much_as_the_largest_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let card = synthetic::card("bk-sdm-tiny").unwrap();
    let path = folder.path().join("model.safetensors");
    synthetic::write(&card, &synthetic::random(1), &path, Layout::Ldm, Number::F16).unwrap();
    let largest = synthetic::tensors(&card).iter().map(|t| t.shape.iter().product::<usize>()).max().unwrap();
    let largest = 2 * largest as u64;
    // From here on the highest is counted anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (before, _) = resident();
    let output = Some(folder.path().join("out.sdq"));
    let options = Options { checkpoint: path, output, threads: Some(2), ..Options::default() };
    let summary = convert(&options, &|_| {}).unwrap();
    let (_, highest) = resident();
    let taken = highest - before;
    sdfast_tests::report(&format!(
        "{} MB of {} MB, largest {} MB",
        taken >> 20,
        summary.source_bytes >> 20,
        largest >> 20
    ));
    assert!(summary.source_bytes > 4 * largest);
    assert!(taken <= largest + (64 << 20), "{taken} bytes for a largest tensor of {largest}");
}
