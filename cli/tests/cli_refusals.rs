//! Requests that can't be met: one sentence, a hint, exit code 1, and no file.

mod common;

use std::fs;

use common::{checkpoint, folder, names, sdconv, sdfast};

#[test]
fn pictures_that_cannot_be() {
    let dir = folder();
    let cases: &[(&[&str], &str)] = &[
        (&["-W", "0"], "0 pixels are outside 16 to 8192"),
        (&["-H", "8"], "8 pixels are outside"),
        (&["-W", "100000"], "100000 pixels are outside"),
        (&["-W", "100", "-H", "64"], "100 is not a multiple of 8"),
        (&["-W", "-8"], "unexpected argument '-8'"),
        (&["-W", "many"], "invalid value 'many'"),
        (&["--steps", "0"], "0 sampling steps"),
        (&["--steps", "1001"], "1001 sampling steps"),
        (&["--cfg", "nan"], "guidance scale"),
        (&["--cfg", "1e9"], "guidance scale"),
        (&["--sampler", "magic"], "no sampler named \"magic\""),
        (&["--schedule", "magic"], "no noise schedule named \"magic\""),
        (&["--sampler", "ddim", "--schedule", "karras"], "has its own noise schedule"),
        (&["--seed", "-1"], "unexpected argument '-1'"),
        (&["--seed", "99999999999999999999"], "invalid value"),
        (&["--threads", "0"], "invalid value '0'"),
        (&["--count", "0"], "invalid value '0'"),
        (&["--ram", "lots"], "invalid value 'lots'"),
        (&["--ram", "0%"], "invalid value '0%'"),
        (&["--isa", "sse9"], "invalid value 'sse9'"),
        (&["--precision", "perfect"], "invalid value 'perfect'"),
        (&["-q", "-v"], "cannot be used with"),
        (&["--no-such-flag"], "unexpected argument"),
        (&["-o", "missing/folder/x.png"], "can't write missing/folder/x.png"),
        (&["-o", "."], "it is a folder"),
        (&["--latents-out", "missing/l.safetensors"], "can't write missing/l.safetensors"),
        (&["-m", "missing.sdq"], "missing.sdq"),
        (&["-m", "."], "is not an .sdq file"),
    ];
    for (arguments, words) in cases {
        sdfast(dir.path(), &[&["gen", "x"], *arguments].concat()).refused(words);
        assert_eq!(names(dir.path()), [""; 0], "{arguments:?}");
    }
    let ran: common::Ran = common::command(env!("CARGO_BIN_EXE_sdfast"), dir.path())
        .args(["gen", "x"])
        .env("SDFAST_ISA", "sse9")
        .output()
        .expect("it starts")
        .into();
    ran.refused("SDFAST_ISA=sse9");
}

#[test]
fn files_that_are_no_models() {
    let dir = folder();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("written");
    let model = fs::read(checkpoint().join("../demo.q8.sdq")).expect("the built-in model");
    write("empty.sdq", b"");
    write("cut.sdq", &model[..model.len() / 2]);
    let mut changed = model.clone();
    changed[40] ^= 1;
    write("changed.sdq", &changed);
    write("text.sdq", b"this is no model, but long enough to have a header that could be read");
    for (name, words) in [
        ("empty.sdq", "is not an .sdq file"),
        ("cut.sdq", "should have"),
        ("changed.sdq", "is damaged"),
        ("text.sdq", "is not an .sdq file"),
    ] {
        sdfast(dir.path(), &["gen", "x", "-m", name, "-o", "x.png"]).refused(words);
    }
    sdfast(dir.path(), &["info", "text.sdq"]).refused("neither a PNG picture nor an .sdq model");
    sdfast(dir.path(), &["info", "cut.sdq"]).refused("should have");
    sdfast(dir.path(), &["info", "missing.png"]).refused("missing.png");
    sdfast(dir.path(), &["info", "."]).refused("is a folder");
    write("cut.png", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR");
    sdfast(dir.path(), &["info", "cut.png"]).refused("can't be read");
    assert!(!dir.path().join("x.png").exists());
}

#[test]
fn checkpoints_that_cannot_be_converted() {
    let dir = folder();
    let write = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).expect("written");
    let unet =
        fs::read(checkpoint().join("unet/diffusion_pytorch_model.safetensors")).expect("the demo's UNet");
    write("cut.safetensors", &unet[..unet.len() / 2]);
    write("tiny.safetensors", &unet[..4]);
    write("text.safetensors", b"hello, this is no checkpoint at all");
    write("picture.png", b"\x89PNG\r\n\x1a\n");
    fs::create_dir(dir.path().join("folder")).expect("made");
    let before = names(dir.path());
    for name in
        ["cut.safetensors", "tiny.safetensors", "text.safetensors", "picture.png", "folder", "missing"]
    {
        sdconv(dir.path(), &[name]).refused(name);
        sdconv(dir.path(), &["inspect", name]).refused(name);
        assert_eq!(names(dir.path()), before, "{name}");
    }
    sdconv(dir.path(), &[]).refused("no checkpoint is given");
    sdconv(dir.path(), &["x", "--quant", "q2"]).refused("invalid value 'q2'");
    let demo = checkpoint().display().to_string();
    sdconv(dir.path(), &[&demo, "-o", "missing/x.sdq"]).refused("missing/x.sdq");
    assert_eq!(names(dir.path()), before);
}

#[test]
fn folders_with_a_part_missing() {
    let demo = checkpoint();
    for part in ["unet", "vae", "text_encoder"] {
        let dir = folder();
        let model = dir.path().join("model");
        copy(&demo, &model);
        fs::remove_dir_all(model.join(part)).expect("removed");
        sdconv(dir.path(), &["model"]).refused("model");
        assert_eq!(names(dir.path()), ["model"], "{part}");
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir(to).expect("made");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}
