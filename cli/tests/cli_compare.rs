//! `sdfast compare` and `sdconv --calibrate`.

mod common;

use std::fs;

use common::{checkpoint, folder, names, sdconv, sdfast};

/// The errors of noise predictions in a table, in its order.
fn errors(table: &str) -> Vec<f64> {
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    rows.map(|row| row.split('|').nth(3).expect("a column").trim().parse().expect("a number")).collect()
}

#[test]
fn calibration_lowers_the_error_that_compare_tells() {
    let dir = folder();
    let path = dir.path();
    fs::write(path.join("calibrate.txt"), "an orange star on a blue background\n\na pine forest at night\n")
        .expect("written");
    let model = checkpoint().display().to_string();
    sdconv(path, &[&model, "-q", "--quant", "f16", "-o", "f16.sdq"]).done();
    sdconv(path, &[&model, "-q", "--quant", "q4", "-o", "plain.sdq"]).done();
    sdconv(path, &[&model, "-q", "--quant", "q4", "-o", "fed.sdq", "--calibrate", "calibrate.txt"]).done();
    let all = ["calibrate.txt", "f16.sdq", "fed.sdq", "plain.sdq"];
    assert_eq!(names(path), all, "nothing else stays");
    fs::write(path.join("empty.txt"), "\n \n").expect("written");
    sdconv(path, &[&model, "-q", "-o", "none.sdq", "--calibrate", "empty.txt"])
        .refused("there are no prompts in empty.txt");

    let models = ["compare", "f16.sdq", "plain.sdq", "fed.sdq", "-o", "out"];
    let how = ["-p", "a red circle on a blue background", "--steps", "4", "--precision", "high"];
    let more = ["--weights", "--layers", "--score", "50"];
    let ran = sdfast(path, &[&models[..], &how[..], &more[..]].concat()).done();
    let table = fs::read_to_string(path.join("out/compare.md")).expect("a table");
    assert!(ran.stdout.contains(&table), "{}", ran.stdout);
    let [f16, plain, fed] = errors(table.split("\n\nLayers").next().expect("a table"))[..] else {
        panic!("three rows in {table}")
    };
    assert!(f16 < fed && fed < 0.9 * plain, "{f16} {plain} {fed}");
    assert!(table.contains(" of 2 |"), "prompts are scored: {table}");
    assert_eq!(table.matches("\n\nLayers of ").count(), 3, "{table}");
    assert_eq!(table.matches("\n\nWeights of ").count(), 2, "{table}");
    let sheet = fs::read(path.join("out/sheet.png")).expect("a contact sheet");
    assert_eq!(sheet[16..24], [0, 0, 2, 12, 0, 0, 0, 128], "4 pictures of 128 with gaps of 4, in one row");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let dir = folder();
    sdfast(dir.path(), &["compare", "missing.sdq", "-o", "out", "-p", "x"]).refused("missing.sdq");
    let model = checkpoint().join("../demo.q8.sdq").display().to_string();
    sdfast(dir.path(), &["compare", &model, "-o", "out"]).refused("no prompt");
    sdfast(dir.path(), &["compare", &model, "-o", "out", "-p", "x", "-W", "100"]).refused("100");
}
