//! `sdfast gen` and `info`, as people run them, with the model that is part of the program.

mod common;

use std::fs;

use common::{folder, names, sdfast};

#[test]
fn a_picture_with_its_settings() {
    let dir = folder();
    let ran =
        sdfast(dir.path(), &["gen", "a red circle", "--seed", "5", "--steps", "2", "-n", "blue"]).done();
    assert_eq!(ran.stdout, "sdfast-5.png\n");
    assert!(ran.stderr.contains("step 2/2"), "{}", ran.stderr);
    assert_eq!(names(dir.path()), ["sdfast-5.png"]);

    let png = fs::File::open(dir.path().join("sdfast-5.png")).expect("written");
    let reader = png::Decoder::new(std::io::BufReader::new(png)).read_info().expect("a PNG file");
    assert_eq!((reader.info().width, reader.info().height), (128, 128));

    let info = sdfast(dir.path(), &["info", "sdfast-5.png"]).done();
    assert!(
        info.stdout.starts_with("a red circle\nNegative prompt: blue\nSteps: 2, Sampler: "),
        "{}",
        info.stdout
    );
    assert!(info.stdout.contains("Seed: 5, Size: 128x128, Model: demo"), "{}", info.stdout);
}

#[test]
fn a_seed_is_a_picture() {
    let dir = folder();
    let picture = |name: &str, more: &[&str]| {
        let arguments = [&["gen", "two stars", "--steps", "2", "-q", "-o", name], more].concat();
        let ran = sdfast(dir.path(), &arguments).done();
        assert_eq!((ran.stdout, ran.stderr), (format!("{name}\n"), String::new()));
        fs::read(dir.path().join(name)).expect("written")
    };
    let one = picture("a.png", &["--seed", "1", "--threads", "1"]);
    assert!(one == picture("b.png", &["--seed", "1", "--threads", "2"]));
    assert!(one == picture("c.png", &["--seed", "1", "--threads", "3"]));
    assert!(one != picture("d.png", &["--seed", "2"]));
    assert!(one != picture("e.png", &["--seed", "1", "--rng", "philox"]));
}

#[test]
fn json_is_one_object() {
    let dir = folder();
    let arguments = [
        "gen", "x", "--count", "2", "--seed", "7", "--steps", "3", "--json", "-W", "64", "-H", "96", "-o",
        "p.png",
    ];
    let ran = sdfast(dir.path(), &arguments).done();
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one JSON object");
    assert_eq!(json["model"]["family"], "sd15");
    assert_eq!(json["model"]["quant"], "q8");
    assert_eq!(json["images"].as_array().map(Vec::len), Some(2));
    assert_eq!(json["images"][1]["seed"], 8);
    assert_eq!(json["images"][1]["path"], "p-8.png");
    assert_eq!(
        (json["images"][0]["width"].as_u64(), json["images"][0]["height"].as_u64()),
        (Some(64), Some(96))
    );
    assert_eq!(json["timings"]["steps_s"].as_array().map(Vec::len), Some(6));
    for field in ["version", "isa", "threads", "precision"] {
        assert!(!json[field].is_null(), "{field}");
    }
    for field in ["open_s", "text_s", "vae_s", "total_s"] {
        assert!(json["timings"][field].as_f64().is_some_and(|s| s > 0.0), "{field}");
    }
    for field in [
        "budget_bytes",
        "predicted_peak_bytes",
        "arena_bytes",
        "weights_resident_bytes",
        "weights_streamed_bytes",
    ] {
        assert!(json["memory"][field].is_u64(), "{field}");
    }
    assert_eq!(names(dir.path()), ["p-7.png", "p-8.png"]);
}

#[test]
fn latents_go_out_and_come_in() {
    let dir = folder();
    let run = |arguments: &[&str]| {
        sdfast(
            dir.path(),
            &[&["gen", "x", "--steps", "1", "-q", "--sampler", "ddim", "-o", "x.png"], arguments].concat(),
        )
    };
    run(&["--seed", "3", "--latents-out", "l.safetensors"]).done();
    let bytes = fs::read(dir.path().join("l.safetensors")).expect("written");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    assert_eq!(file.names(), ["latents"]);
    assert_eq!(file.tensor("latents").expect("there").shape(), [1, 4, 16, 16]);
    let picture = |seed| {
        run(&["--seed", seed, "--latents-in", "l.safetensors", "--latents-out", "m.safetensors"]).done();
        fs::read(dir.path().join("m.safetensors")).expect("written")
    };
    assert!(picture("1") == picture("2"), "latents stand in for the seed's noise");
    run(&["--latents-in", "l.safetensors", "-W", "64"]).refused("latents are [4, 16, 16]");
    run(&["--latents-in", "x.png"]).refused("holds no latents");
    run(&["--latents-in", "missing"]).refused("missing");
}

#[test]
fn empty_and_endless_prompts_are_prompts() {
    let dir = folder();
    sdfast(dir.path(), &["gen", "", "--steps", "1", "-o", "a.png"]).done();
    sdfast(dir.path(), &["gen", "--steps", "1", "-o", "b.png"]).done();
    let long = "a red circle and ".repeat(2500);
    let ran = sdfast(dir.path(), &["gen", &long, "--steps", "1", "-o", "c.png"]).done();
    assert!(ran.stderr.contains("warning: the prompt is too long by 9925 tokens"), "{}", ran.stderr);
    let odd = "naïve 赤い円 🙂 \u{200b} \"quotes\"\nsecond line: a, b";
    sdfast(dir.path(), &["gen", odd, "--steps", "1", "-o", "d.png"]).done();
    let info = sdfast(dir.path(), &["info", "d.png"]).done();
    assert!(info.stdout.starts_with(odd), "{}", info.stdout);
}

#[test]
fn samplers_and_schedules_make_pictures() {
    let dir = folder();
    for sampler in ["ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "lcm"] {
        sdfast(dir.path(), &["gen", "x", "--steps", "2", "--sampler", sampler, "-o", "a.png"]).done();
    }
    sdfast(
        dir.path(),
        &["gen", "x", "--steps", "2", "--sampler", "dpmpp_2m", "--schedule", "karras", "-o", "a.png"],
    )
    .done();
    let info = sdfast(dir.path(), &["info", "a.png"]).done();
    assert!(info.stdout.contains("Sampler: DPM++ 2M, Schedule type: Karras"), "{}", info.stdout);
}

#[test]
fn a_repeated_prompt_is_remembered() {
    let dir = folder();
    let picture = |name: &str| {
        let arguments = ["gen", "a snowy mountain", "--seed", "4", "--steps", "1", "-q", "-o", name];
        let program = env!("CARGO_BIN_EXE_sdfast");
        let output = common::command(program, dir.path())
            .env("SDFAST_CACHE", dir.path().join("kept"))
            .args(arguments)
            .output()
            .expect("it starts");
        common::Ran::from(output).done();
        fs::read(dir.path().join(name)).expect("written")
    };
    let first = picture("a.png");
    let kept = dir.path().join("kept/embeddings");
    let files = names(&kept);
    assert_eq!(files.len(), 2, "prompt and negative prompt: {files:?}");
    assert!(first == picture("b.png"));
    // A damaged file counts as absent, and is made again.
    fs::write(kept.join(&files[0]), b"sdfemb").expect("writable");
    assert!(first == picture("c.png"));
    assert_eq!(names(&kept), files);
    fs::remove_dir_all(&kept).expect("safe to delete");
    assert!(first == picture("d.png"));
}

/// With its prompt known, a run begins its first step at once; the best of three, as others may be at work on the machine.
#[test]
fn a_warm_run_starts_at_once() {
    let dir = folder();
    let run = || {
        let start = std::time::Instant::now();
        let output = common::command(env!("CARGO_BIN_EXE_sdfast"), dir.path())
            .env("SDFAST_CACHE", dir.path().join("kept"))
            .args(["gen", "a star", "--seed", "1", "--steps", "1", "-o", "a.png", "--json"])
            .output()
            .expect("it starts");
        let wall = start.elapsed().as_secs_f64();
        let ran = common::Ran::from(output).done();
        let json: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one JSON object");
        let seconds = |field: &str| json["timings"][field].as_f64().expect("a number");
        let step = json["timings"]["steps_s"][0].as_f64().expect("a number");
        // What isn't the step or the decoder comes before them, but for writing the picture.
        wall - step - seconds("vae_s")
    };
    run();
    let best = (0..3).map(|_| run()).fold(f64::INFINITY, f64::min);
    assert!(best <= 0.2, "{best} s beside the step and the decoder");
}

/// The table adds up to what the run took, and the trace holds every call of it.
#[test]
fn a_profile_as_a_table_and_as_a_trace() {
    let dir = folder();
    let gen_with = |profile| {
        sdfast(dir.path(), &["gen", "a star", "--steps", "1", "-o", "a.png", "--seed", "1", profile]).done()
    };
    let table = gen_with("--profile").stderr;
    for word in ["network", "unet", "vae", "conv", "attention", "GOP/s"] {
        assert!(table.contains(word), "no {word}: {table}");
    }
    gen_with("--profile=trace.json");
    let trace = fs::read(dir.path().join("trace.json")).expect("written");
    let trace: serde_json::Value = serde_json::from_slice(&trace).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("a list");
    assert!(events.len() > 100, "{} events", events.len());
    let number = |event: &serde_json::Value, key: &str| event[key].as_f64().expect("a number");
    for pair in events.windows(2) {
        assert_eq!(pair[0]["ph"], "X");
        let end = number(&pair[0], "ts") + number(&pair[0], "dur");
        assert!(number(&pair[1], "ts") >= end - 1.0, "{pair:?}");
    }
    assert!(names(dir.path()).contains(&"trace.json".to_string()));
}
