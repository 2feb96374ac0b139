//! The promise about memory, kept by the real program and measured by the kernel's own accounting.
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Stdio;

use common::{command, folder, names, sdfast};

fn model(dir: &Path) {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/demo.q8.sdq");
    fs::copy(built_in, dir.join("demo.sdq")).expect("the repository has it");
}

/// The bytes that a refusal at 1 MB says are enough, in MiB.
fn smallest(dir: &Path, size: &str) -> u64 {
    let refused = sdfast(dir, &["gen", "a tree", "-m", "demo.sdq", "-W", size, "-H", size, "--ram", "1M"])
        .refused("this picture needs ");
    let (_, rest) = refused.stderr.split_once("this picture needs ").expect("checked");
    rest.split(' ').next().expect("a number").parse().expect("a number")
}

#[test]
fn every_budget_is_kept_and_gives_the_same_picture() {
    let dir = folder();
    model(dir.path());
    for size in ["128", "384"] {
        let least = smallest(dir.path(), size);
        let mut first: Option<Vec<u8>> = None;
        for (ram, threads) in [(Some(least), "2"), (Some(least + least / 5), "1"), (None, "4"), (None, "1")] {
            let ram = ram.map(|mib| format!("{mib}M"));
            let mut arguments =
                vec!["gen", "a tree", "-m", "demo.sdq", "-W", size, "-H", size, "--seed", "3"];
            arguments.extend(["--steps", "2", "-o", "out.png", "-q", "--json", "--threads", threads]);
            if let Some(ram) = &ram {
                arguments.extend(["--ram", ram]);
            }
            let ran = sdfast(dir.path(), &arguments).done();
            let report: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
            let bytes = |key: &str| report["memory"][key].as_u64().expect("a number");
            let (measured, predicted) = (bytes("measured_peak_bytes"), bytes("predicted_peak_bytes"));
            let budget = bytes("budget_bytes");
            assert!(
                measured <= predicted && predicted <= budget,
                "{size}, {ram:?}: {measured} {predicted} {budget}"
            );
            let picture = fs::read(dir.path().join("out.png")).expect("written");
            assert!(*first.get_or_insert_with(|| picture.clone()) == picture, "{size}, {ram:?}, {threads}");
        }
    }
}

/// Runs `sdfast gen` with `demo.sdq` in the least memory, so that weights are read again and again, and does `harm` to the
/// folder when the first step is done.
fn harmed(dir: &Path, steps: &str, harm: impl FnOnce(&Path)) -> common::Ran {
    let ram = format!("{}M", smallest(dir, "128"));
    let mut arguments = vec!["gen", "a tree", "-m", "demo.sdq", "--seed", "3", "--steps", steps];
    arguments.extend(["-o", "out.png", "--ram", &ram]);
    let mut child = command(env!("CARGO_BIN_EXE_sdfast"), dir)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map(|l| l.expect("UTF-8"));
    assert!(lines.any(|line| line.starts_with("step 1/")), "no step");
    harm(dir);
    let stderr: Vec<String> = lines.collect();
    let ran = common::Ran::from(child.wait_with_output().expect("it ends"));
    common::Ran { stderr: stderr.join("\n"), ..ran }
}

#[track_caller]
fn noticed(dir: &Path, harm: impl FnOnce(&Path), words: &str) {
    let ran = harmed(dir, "1000", harm);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains(words), "{words:?} in {}", ran.stderr);
    assert_eq!((names(dir), ran.stdout), (vec!["demo.sdq".to_owned()], String::new()));
}

fn opened(dir: &Path) -> fs::File {
    fs::OpenOptions::new().write(true).open(dir.join("demo.sdq")).expect("there")
}

#[test]
fn a_file_that_changes_in_mid_run_is_an_error_and_leaves_nothing() {
    let dir = folder();
    let dir = dir.path();
    model(dir);
    noticed(dir, |dir| opened(dir).set_len(1 << 20).expect("cut"), "demo.sdq was cut short");
    model(dir);
    let other_bytes = |dir: &Path| {
        let mut file = opened(dir);
        file.seek(SeekFrom::Start(4 << 20)).expect("there");
        file.write_all(&[0x55; 4 << 20]).expect("written");
    };
    noticed(dir, other_bytes, "demo.sdq was written to");
    model(dir);
    let zeros = |dir: &Path| {
        let file = opened(dir);
        let len = file.metadata().expect("there").len();
        file.set_len(1 << 20).and_then(|()| file.set_len(len)).expect("cut and grown again");
    };
    noticed(dir, zeros, "demo.sdq was ");
}

#[test]
fn a_file_that_is_replaced_in_mid_run_is_read_to_the_end() {
    let dir = folder();
    let dir = dir.path();
    model(dir);
    let picture = |dir: &Path| fs::read(dir.join("out.png")).expect("written");
    harmed(dir, "100", |_| ()).done();
    let undisturbed = picture(dir);
    fs::remove_file(dir.join("out.png")).expect("there");
    let replace = |dir: &Path| {
        fs::write(dir.join("new"), vec![0x55; 16 << 20]).expect("written");
        fs::rename(dir.join("new"), dir.join("demo.sdq")).expect("renamed");
    };
    harmed(dir, "100", replace).done();
    assert!(picture(dir) == undisturbed);
    model(dir);
    fs::remove_file(dir.join("out.png")).expect("there");
    harmed(dir, "100", |dir| fs::remove_file(dir.join("demo.sdq")).expect("there")).done();
    assert!(picture(dir) == undisturbed);
}

#[test]
fn a_plan_needs_no_file_and_says_what_a_run_will_hold() {
    let dir = folder();
    let plan = |arguments: &[&str]| -> serde_json::Value {
        let ran = sdfast(dir.path(), &[&["plan", "--json"], arguments].concat()).done();
        serde_json::from_str(&ran.stdout).expect("one object")
    };
    let peak =
        |report: &serde_json::Value| report["memory"]["predicted_peak_bytes"].as_u64().expect("a number");
    let (sd15, sdxl) =
        (plan(&["--family", "sd15", "--ram", "8G"]), plan(&["--family", "sdxl", "--ram", "16G"]));
    assert!(peak(&sd15) > 1 << 30 && peak(&sdxl) > 2 * peak(&sd15));
    // The peaks that are promised for the published sizes.
    let tight = plan(&["--family", "sd15", "--ram", "190M", "-v", "--svg", "arena.svg"]);
    assert!(peak(&tight) <= 190 << 20);
    assert!(peak(&plan(&["--family", "sdxl", "--ram", "280M"])) <= 280 << 20);
    let parts = tight["parts"].as_array().expect("a list");
    let names: Vec<_> = parts.iter().map(|p| p["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["text_encoder", "unet", "vae_decoder"]);
    assert!(parts[1]["bytes_read_per_pass"].as_u64() > Some(500 << 20));
    assert!(parts[1]["layers"].as_array().expect("with -v").len() > 200);
    assert!(fs::read_to_string(dir.path().join("arena.svg")).expect("drawn").starts_with("<svg"));
    sdfast(dir.path(), &["plan", "--family", "sd99"]).refused("sd99");
    sdfast(dir.path(), &["plan", "--family", "sd15", "--ram", "20M"]).refused("needs");
}
