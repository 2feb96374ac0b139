//! `sdconv`, and what the other program makes of its output.

mod common;

use std::fs;

use common::{checkpoint, folder, names, sdconv, sdfast};

/// Whoever changes the converter or the format makes the model anew: `cargo run --release -p sdfast --bin sdconv --
/// models/demo/model -o models/demo/demo.q8.sdq --force`.
#[test]
fn the_built_in_model_is_what_the_converter_makes() {
    let dir = folder();
    sdconv(dir.path(), &[&checkpoint().display().to_string(), "-q", "-o", "demo.q8.sdq"]).done();
    let made = fs::read(dir.path().join("demo.q8.sdq")).expect("written");
    let built_in = fs::read(checkpoint().join("../demo.q8.sdq")).expect("the built-in model");
    assert!(made == built_in, "models/demo/demo.q8.sdq is not what sdconv makes of models/demo/model");
}

#[test]
fn converting_says_what_it_does() {
    let dir = folder();
    let demo = checkpoint().display().to_string();
    let ran = sdconv(dir.path(), &[&demo, "--quant", "f16", "--threads", "2", "-v"]).done();
    assert_eq!(ran.stdout, "model.f16.sdq\n");
    assert!(
        ran.stderr.contains("Stable Diffusion 1.x") && ran.stderr.contains("bits per weight"),
        "{}",
        ran.stderr
    );
    sdconv(dir.path(), &[&demo, "--quant", "f16"]).refused("model.f16.sdq exists");
    let quiet = sdconv(dir.path(), &[&demo, "--quant", "f16", "--force", "-q"]).done();
    assert_eq!(quiet.stderr, "");
    assert_eq!(names(dir.path()), ["model.f16.sdq"]);

    let json = sdconv(dir.path(), &["inspect", "model.f16.sdq", "--json"]).done();
    let json: serde_json::Value = serde_json::from_str(&json.stdout).expect("one JSON object");
    assert_eq!(json["card"]["family"], "sd15");
    for program in
        [sdconv(dir.path(), &["inspect", "model.f16.sdq"]), sdfast(dir.path(), &["info", "model.f16.sdq"])]
    {
        let text = program.done().stdout;
        assert!(text.contains("family      sd15") && text.contains("unet"), "{text}");
    }
    let text = sdconv(dir.path(), &["inspect", &demo]).done().stdout;
    assert!(text.contains("layout      diffusers folder"), "{text}");
}

#[test]
fn every_quantization_makes_pictures() {
    let dir = folder();
    let demo = checkpoint().display().to_string();
    for quant in ["q8", "q4", "f16"] {
        let model = format!("{quant}.sdq");
        sdconv(dir.path(), &[&demo, "--quant", quant, "-q", "-o", &model]).done();
        for precision in ["fast", "high", "exact"] {
            let arguments =
                ["gen", "x", "-m", &model, "--precision", precision, "--steps", "1", "--json", "-o", "x.png"];
            let ran = sdfast(dir.path(), &arguments).done();
            let json: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one JSON object");
            assert_eq!((&json["model"]["quant"], &json["precision"]), (&quant.into(), &precision.into()));
        }
    }
}

/// A file that grows beyond what the process may write: as a disk that fills up.
#[cfg(unix)]
#[test]
fn no_room_for_the_output() {
    let dir = folder();
    let checkpoint = checkpoint().display().to_string();
    let mut shell = common::command("sh", dir.path());
    shell.args(["-c", "ulimit -f 1000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_sdconv")]);
    let ran: common::Ran = shell.args([&checkpoint, "-q", "-o", "x.sdq"]).output().expect("it starts").into();
    let told = ran.refused("no room for the");
    assert!(told.stderr.contains("hint: free some space"), "{}", told.stderr);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn synthetic_checkpoints_of_every_layout() {
    let dir = folder();
    for (layout, file) in [
        ("ldm", "a.safetensors"),
        ("zip", "a.ckpt"),
        ("pickle", "b.ckpt"),
        ("gguf", "a.gguf"),
        ("sharded", "a"),
    ] {
        sdconv(dir.path(), &["synthetic", "tiny-sdxl", "--layout", layout, "-o", file]).done();
        sdconv(dir.path(), &[file, "-q", "--force", "-o", "a.sdq"]).done();
    }
    sdconv(dir.path(), &["synthetic", "tiny-sdxl", "-o", "a.ckpt"]).refused("a.ckpt exists");
    sdconv(dir.path(), &["synthetic", "sd9", "-o", "b"]).refused("no family named");
    sdconv(dir.path(), &["synthetic", "sdxl", "--layout", "rar", "-o", "b"]).refused("rar");
    sdconv(dir.path(), &["synthetic", "sdxl", "--layout", "gguf", "--dtype", "f8_e4m3", "-o", "b"])
        .refused("no numbers of 8 bits");
    assert_eq!(names(dir.path()), ["a", "a.ckpt", "a.gguf", "a.safetensors", "a.sdq", "b.ckpt"]);
}

#[test]
fn models_that_need_more_or_less_than_others() {
    let dir = folder();
    let make = |name: &str| {
        let (checkpoint, model) = (format!("{name}.safetensors"), format!("{name}.sdq"));
        sdconv(dir.path(), &["synthetic", &format!("tiny-{name}"), "-o", &checkpoint]).done();
        sdconv(dir.path(), &[&checkpoint, "-q", "-o", &model]).done();
        model
    };
    let model = make("sdxl-inpaint");
    sdfast(dir.path(), &["gen", "x", "-m", &model]).refused("this model edits pictures");
    for name in ["cosxl", "playground-2.5"] {
        let model = make(name);
        let small = ["gen", "x", "-m", &model, "-W", "64", "-H", "64", "--steps", "2", "-o", "x.png"];
        sdfast(dir.path(), &small).done();
        sdfast(dir.path(), &[&small[..], &["--schedule", "normal"]].concat()).done();
        sdfast(dir.path(), &[&small[..], &["--sampler", "ddim"]].concat()).refused("needs timesteps");
        let told = sdfast(dir.path(), &["info", &model]).done().stdout;
        assert!(told.contains("EDM noise levels"), "{told}");
    }
}
