//! Help, tables, readers that go away, and Ctrl-C.

mod common;

use std::process::Stdio;

use common::{command, folder, sdconv, sdfast};

#[test]
fn help_and_version_are_results() {
    let dir = folder();
    for arguments in [&["--help"][..], &["--version"], &["gen", "--help"], &["-h"]] {
        let ran = sdfast(dir.path(), arguments).done();
        assert!(!ran.stdout.is_empty() && ran.stderr.is_empty(), "{arguments:?}");
    }
    for arguments in [&["--help"][..], &["--version"], &["inspect", "--help"]] {
        let ran = sdconv(dir.path(), arguments).done();
        assert!(!ran.stdout.is_empty() && ran.stderr.is_empty(), "{arguments:?}");
    }
    assert_eq!(sdfast(dir.path(), &[]).code, Some(1));
    sdfast(dir.path(), &["paint"]).refused("unrecognized subcommand 'paint'");
}

#[test]
fn kernels_are_listed_and_the_cap_is_kept() {
    let dir = folder();
    let table = sdfast(dir.path(), &["kernels"]).done().stdout;
    assert!(table.contains("scalar") && table.contains("gemm_f32_4x16_scalar"), "{table}");
    let ran: common::Ran = command(env!("CARGO_BIN_EXE_sdfast"), dir.path())
        .arg("kernels")
        .env("SDFAST_ISA", "scalar")
        .output()
        .expect("it starts")
        .into();
    let used: Vec<String> =
        ran.done().stdout.lines().filter(|l| l.contains("<- used")).map(str::to_string).collect();
    assert!(used.len() >= 2 && used.iter().all(|line| line.contains("scalar")), "{used:?}");
}

#[test]
fn benches_measure() {
    let dir = folder();
    let cache = dir.path().display().to_string();
    let sdfast = |arguments: &[&str]| -> common::Ran {
        let mut command = command(env!("CARGO_BIN_EXE_sdfast"), dir.path());
        command.args(arguments).env("XDG_CACHE_HOME", &cache).output().expect("it starts").into()
    };
    let gemm = sdfast(&["bench", "gemm", "32", "64", "128", "--isa", "scalar", "--json"]).done();
    let gemm: serde_json::Value = serde_json::from_str(&gemm.stdout).expect("one JSON object");
    assert_eq!(gemm["isa"], "scalar");
    let results = gemm["results"].as_array().expect("rows");
    assert!(!results.is_empty() && results.iter().all(|row| row["gops"].as_f64() > Some(0.0)), "{gemm}");
    assert!(results.iter().any(|row| row["picked"] == true), "{gemm}");
    sdfast(&["bench", "gemm", "32", "64"]).refused("3 values required");

    let arguments = ["bench", "model", "--family", "tiny-sd15", "--quant", "q4", "--steps", "1"];
    let table = sdfast(&arguments).done();
    assert!(table.stdout.contains("step") && table.stderr.contains("making up"), "{}", table.stderr);
    let again = sdfast(&[&arguments[..], &["--no-keep", "--json", "-q"]].concat()).done();
    assert_eq!(again.stderr, "");
    let again: serde_json::Value = serde_json::from_str(&again.stdout).expect("one JSON object");
    assert_eq!(again["model"]["quant"], "q4");
    assert_eq!(common::names(&dir.path().join("sdfast")), [""; 0]);
    sdfast(&["bench", "model", "--family", "nonsense"]).refused("no family named \"nonsense\"");
}

/// A reader that closes the pipe early is no fault of the program.
#[test]
fn a_reader_may_go_away() {
    let dir = folder();
    for arguments in [&["kernels"][..], &["--help"], &["gen", "x", "--steps", "1", "--json"]] {
        let mut child = command(env!("CARGO_BIN_EXE_sdfast"), dir.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(
            output.status.code(),
            Some(0),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_file() {
    use std::io::{BufRead, BufReader, Read};

    let dir = folder();
    let mut child = command(env!("CARGO_BIN_EXE_sdfast"), dir.path())
        .args(["gen", "x", "--steps", "1000", "-o", "x.png"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.starts_with("step 1/") {
        line.clear();
        assert!(stderr.read_line(&mut line).expect("text") > 0, "it ended early");
    }
    let id = child.id().to_string();
    let kill = std::process::Command::new("kill").args(["-INT", &id]).status().expect("kill runs");
    assert!(kill.success());
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
    assert!(rest.ends_with("error: stopped\n"), "{rest}");
    assert_eq!(common::names(dir.path()), [""; 0]);
}
