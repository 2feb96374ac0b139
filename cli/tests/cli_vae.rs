//! `--vae`: a TAESD beside the model, as people use it.

mod common;

use std::fs;
use std::path::Path;

use common::{checkpoint, folder, names, sdconv, sdfast};

/// `taesd.sdq`, of the miniature with random weights.
fn taesd(dir: &Path) {
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/taesd-tiny");
    let checkpoint = checkpoint.to_str().expect("UTF-8");
    sdconv(dir, &[checkpoint, "-o", "taesd.sdq", "-q"]).done();
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).expect("one JSON object")
}

#[test]
fn a_picture_says_which_vae_made_it() {
    let dir = folder();
    taesd(dir.path());
    let base = ["gen", "a tree", "--steps", "1", "--seed", "1", "-q", "-o", "a.png"];
    sdfast(dir.path(), &base).done();
    let own = fs::read(dir.path().join("a.png")).expect("written");
    let told = sdfast(dir.path(), &[&base[..], &["--vae", "taesd.sdq", "--json"]].concat()).done();
    assert_eq!(json(&told.stdout)["model"]["vae"], "taesd");
    assert!(fs::read(dir.path().join("a.png")).expect("written") != own);
    let info = sdfast(dir.path(), &["info", "a.png"]).done();
    assert!(info.stdout.contains("Model: demo, VAE: taesd, "), "{}", info.stdout);

    // A model's own VAE is one, too, and gives the model's own picture.
    let checkpoint = checkpoint();
    sdconv(dir.path(), &[checkpoint.to_str().expect("UTF-8"), "-o", "m.sdq", "-q"]).done();
    sdfast(dir.path(), &[&base[..], &["--vae", "m.sdq"]].concat()).done();
    let pixels = |bytes: &[u8]| {
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().expect("a PNG file");
        let mut pixels = vec![0; reader.output_buffer_size().expect("it fits")];
        reader.next_frame(&mut pixels).expect("a picture");
        pixels
    };
    assert!(pixels(&fs::read(dir.path().join("a.png")).expect("written")) == pixels(&own));
}

#[test]
fn what_it_is_and_what_it_costs() {
    let dir = folder();
    taesd(dir.path());
    for program in [sdfast(dir.path(), &["info", "taesd.sdq"]), sdconv(dir.path(), &["inspect", "taesd.sdq"])]
    {
        let text = program.done().stdout;
        assert!(text.contains("tiny VAE") && text.contains("vae_encoder"), "{text}");
    }
    let plan = |more: &[&str]| {
        let arguments = [&["plan", "--json", "-W", "256", "-H", "256"], more].concat();
        let told = json(&sdfast(dir.path(), &arguments).done().stdout);
        let parts = told["parts"].as_array().expect("a list").clone();
        let of = |name: &str| parts.iter().find(|p| p["name"] == name).expect("it is there").clone();
        (of("vae_decoder")["weights_bytes"].as_u64().expect("a number"), of("unet"))
    };
    let (own, unet) = plan(&[]);
    let (tiny, same_unet) = plan(&["--vae", "taesd.sdq"]);
    assert!(tiny < own / 3 && unet == same_unet, "{tiny} for {own}");
    assert_eq!(plan(&["--family", "sd15", "--vae", "taesd.sdq"]).0, tiny);
}

#[test]
fn refusals() {
    let dir = folder();
    taesd(dir.path());
    sdfast(dir.path(), &["gen", "x", "-m", "taesd.sdq"]).refused("holds a VAE alone, no model");
    sdfast(dir.path(), &["gen", "x", "--vae", "missing.sdq"]).refused("missing.sdq");
    fs::write(dir.path().join("a.png"), b"\x89PNG\r\n\x1a\n and so on, for a while yet").expect("writable");
    sdfast(dir.path(), &["gen", "x", "--vae", "a.png"]).refused("is not an .sdq file");
    assert_eq!(names(dir.path()), ["a.png", "taesd.sdq"]);
}

/// Convolutions alone: bands of any height give the same bits.
#[cfg(target_os = "linux")]
#[test]
fn every_budget_is_kept_and_gives_the_same_picture() {
    let dir = folder();
    taesd(dir.path());
    let base =
        ["gen", "a tree", "--vae", "taesd.sdq", "-W", "384", "-H", "384", "--seed", "3", "--steps", "1"];
    let refused = sdfast(dir.path(), &[&base[..], &["--ram", "1M"]].concat()).refused("this picture needs ");
    let (_, rest) = refused.stderr.split_once("this picture needs ").expect("checked");
    let least: u64 = rest.split(' ').next().expect("a number").parse().expect("a number");
    let mut first: Option<Vec<u8>> = None;
    for (ram, threads) in [(Some(least), "2"), (Some(least + least / 5), "1"), (None, "2")] {
        let ram = ram.map(|mib| format!("{mib}M"));
        let mut arguments = [&base[..], &["-o", "out.png", "-q", "--json", "--threads", threads]].concat();
        if let Some(ram) = &ram {
            arguments.extend(["--ram", ram]);
        }
        let report = json(&sdfast(dir.path(), &arguments).done().stdout);
        let bytes = |key: &str| report["memory"][key].as_u64().expect("a number");
        let (measured, predicted) = (bytes("measured_peak_bytes"), bytes("predicted_peak_bytes"));
        assert!(
            measured <= predicted && predicted <= bytes("budget_bytes"),
            "{ram:?}: {measured} {predicted}"
        );
        let picture = fs::read(dir.path().join("out.png")).expect("written");
        assert!(*first.get_or_insert_with(|| picture.clone()) == picture, "{ram:?}, {threads}");
    }
}
