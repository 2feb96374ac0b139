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
