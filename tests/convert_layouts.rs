//! One model, written in every layout that people have, converts to one and the same file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use convert::synthetic::{self, Layout, MODELS, Number, Tensor};
use convert::{Options, Quant, convert, inspect};
use engine::card::{Card, EdmConfig, Prediction, SigmaSchedule, TimestepSpacing};
use engine::format::ModelFile;
use half::f16;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo/model")
}

/// A path for the layout's file or folder.
fn place(folder: &Path, layout: Layout) -> PathBuf {
    folder.join(match layout {
        Layout::Diffusers => "diffusers",
        Layout::Sharded => "sharded",
        Layout::Ldm => "ldm.safetensors",
        Layout::Zip => "zip.ckpt",
        Layout::Pickle => "pickle.ckpt",
        Layout::Gguf => "model.gguf",
    })
}

fn converted(options: &Options) -> Vec<u8> {
    let output = options.output.as_ref().unwrap();
    let options = Options { force: true, ..options.clone() };
    convert(&options, &|_| {}).unwrap_or_else(|e| panic!("{}: {e}", options.checkpoint.display()));
    ModelFile::open(output).unwrap().verify().unwrap();
    std::fs::read(output).unwrap()
}

/// The values of the demo model's folder.
struct Demo(RefCell<HashMap<String, Vec<u8>>>);

impl Demo {
    fn values(&self, tensor: &Tensor) -> Vec<f32> {
        let (part, key) = tensor.name.split_once('.').unwrap();
        let stem = if part == "text_encoder" { "model" } else { "diffusion_pytorch_model" };
        let path = demo().join(part).join(format!("{stem}.safetensors"));
        let mut files = self.0.borrow_mut();
        let bytes = files.entry(part.to_owned()).or_insert_with(|| std::fs::read(path).unwrap());
        let file = SafeTensors::deserialize(bytes).unwrap();
        let view = file.tensor(key).unwrap();
        assert_eq!(view.shape(), tensor.shape, "{}", tensor.name);
        view.data().as_chunks().0.iter().map(|b: &[u8; 2]| f16::from_le_bytes(*b).to_f32()).collect()
    }
}

#[test]
fn the_demo_model() {
    let folder = tempfile::tempdir().unwrap();
    let output = Some(folder.path().join("out.sdq"));
    let base = Options { checkpoint: demo(), output, ..Options::default() };
    let expected = converted(&base);
    let card = ModelFile::open(base.output.as_deref().unwrap()).unwrap().card().clone();
    let demo_values = Demo(RefCell::new(HashMap::new()));
    for (name, layout) in Layout::ALL {
        let path = place(folder.path(), layout);
        synthetic::write(&card, &|t| demo_values.values(t), &path, layout, Number::F16).unwrap();
        // Its sizes are unusual: heads and the latents' scale can't be concluded from the shapes.
        let options = Options { checkpoint: path, config: Some(demo()), ..base.clone() };
        assert!(converted(&options) == expected, "{name}");
    }
}

/// A miniature that makes pictures as large as its family's, so that a single file tells all there is to know.
fn miniature(name: &str) -> Card {
    let mut card = synthetic::card(&format!("tiny-{name}")).unwrap();
    let large = synthetic::card(name).unwrap().defaults;
    (card.defaults.width, card.defaults.height) = (large.width, large.height);
    card
}

#[test]
fn miniatures_of_every_model() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let card = miniature(name);
        let values = synthetic::random(1);
        let mut expected: Option<Vec<u8>> = None;
        // Names and markers differ between these; the others share theirs.
        let all = ["sd15", "sd2", "sdxl", "sdxl-refiner", "playground-2.5"].contains(&name);
        let layouts = Layout::ALL.into_iter().filter(|(n, _)| all || ["diffusers", "ldm"].contains(n));
        for (layout_name, layout) in layouts {
            let path = place(folder.path(), layout);
            let _ = std::fs::remove_dir_all(&path);
            synthetic::write(&card, &values, &path, layout, Number::F16).unwrap();
            let options = Options {
                checkpoint: path.clone(),
                output: Some(folder.path().join("out.sdq")),
                quant: Quant::Q8,
                // Random weights don't tell what they predict.
                prediction: (name == "sd2-v").then_some(Prediction::V),
                ..Options::default()
            };
            let bytes = converted(&options);
            let found = ModelFile::open(options.output.as_deref().unwrap()).unwrap().card().clone();
            let provenance = found.provenance.clone();
            assert_eq!(found, Card { provenance, ..card.clone() }, "{name} as {layout_name}");
            match &expected {
                None => expected = Some(bytes),
                Some(expected) => assert!(bytes == *expected, "{name} as {layout_name}"),
            }
            let inspection = inspect(&path).unwrap();
            assert!(inspection.card.is_some(), "{name} as {layout_name}: {:?}", inspection.fault);
        }
    }
}

#[test]
fn numbers_of_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let values = synthetic::random(2);
    // What 8 bits hold, every type holds.
    let exact = |t: &Tensor| {
        let power = |v: f32| v.signum() * v.abs().clamp(1.0 / 64.0, 4.0).log2().round().exp2();
        values(t).into_iter().map(power).collect::<Vec<_>>()
    };
    for name in ["sd15", "sd2", "sdxl"] {
        let card = miniature(name);
        let mut expected: Option<Vec<u8>> = None;
        for (number_name, number) in Number::ALL {
            for (layout_name, layout) in Layout::ALL {
                let eight = number_name.starts_with("f8");
                if eight && matches!(layout, Layout::Pickle | Layout::Gguf)
                    || name != "sd15" && layout != Layout::Ldm
                {
                    continue;
                }
                let path = place(folder.path(), layout);
                synthetic::write(&card, &exact, &path, layout, number).unwrap();
                let output = Some(folder.path().join("out.sdq"));
                let options = Options { checkpoint: path, output, quant: Quant::Q4, ..Options::default() };
                let bytes = converted(&options);
                let expected = expected.get_or_insert_with(|| bytes.clone());
                assert!(bytes == *expected, "{name} as {layout_name} of {number_name}");
            }
        }
    }
}

#[test]
fn folders_with_variants_of_their_weights() {
    let folder = tempfile::tempdir().unwrap();
    let card = miniature("sd15");
    for layout in [Layout::Diffusers, Layout::Sharded] {
        let path = place(folder.path(), layout);
        synthetic::write(&card, &synthetic::random(1), &path, layout, Number::F16).unwrap();
        let output = Some(folder.path().join("out.sdq"));
        let options = Options { checkpoint: path.clone(), output, ..Options::default() };
        let expected = converted(&options);
        for part in ["unet", "vae", "text_encoder"] {
            let part = path.join(part);
            for file in std::fs::read_dir(&part).unwrap() {
                let file = file.unwrap().file_name().into_string().unwrap();
                // As diffusers names them: model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
                let name = match file.strip_suffix(".index.json") {
                    Some(start) => format!("{start}.index.fp16.json"),
                    None => file.replace("-0000", ".fp16-0000"),
                };
                let single = !name.contains("fp16") && name.ends_with(".safetensors");
                let name = if single { name.replace(".safetensors", ".fp16.safetensors") } else { name };
                std::fs::rename(part.join(file), part.join(&name)).unwrap();
                if name.ends_with(".index.fp16.json") {
                    let index = std::fs::read_to_string(part.join(&name)).unwrap();
                    std::fs::write(part.join(&name), index.replace("-0000", ".fp16-0000")).unwrap();
                }
            }
        }
        assert!(converted(&options) == expected, "{layout:?}");
    }
}

#[test]
fn a_tokenizer_in_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = place(folder.path(), Layout::Diffusers);
    synthetic::write(&miniature("sd15"), &synthetic::random(1), &path, Layout::Diffusers, Number::F16)
        .unwrap();
    let output = folder.path().join("out.sdq");
    let options = Options { checkpoint: path.clone(), output: Some(output.clone()), ..Options::default() };
    let with_clips = converted(&options);
    let tokenizer = path.join("tokenizer");
    let read = |name: &str| std::fs::read_to_string(tokenizer.join(name)).unwrap();
    let lines = |merges: &str| -> Vec<String> {
        merges.lines().filter(|l| !l.starts_with("#version") && !l.is_empty()).map(String::from).collect()
    };
    let vocab: serde_json::Value = serde_json::from_str(&read("vocab.json")).unwrap();
    let merges = lines(&read("merges.txt"));
    std::fs::remove_file(tokenizer.join("vocab.json")).unwrap();
    std::fs::remove_file(tokenizer.join("merges.txt")).unwrap();
    let write = |vocab: &serde_json::Value, merges: &[serde_json::Value]| {
        let model = serde_json::json!({ "type": "BPE", "vocab": vocab, "merges": merges });
        let added = [serde_json::json!({ "id": 49406, "content": "<|startoftext|>", "special": true })];
        let whole = serde_json::json!({ "version": "1.0", "added_tokens": added, "model": model });
        std::fs::write(tokenizer.join("tokenizer.json"), whole.to_string()).unwrap();
    };
    // CLIP's own, with merges as texts and as pairs.
    let texts: Vec<serde_json::Value> = merges.iter().map(|m| m.as_str().into()).collect();
    let pairs: Vec<serde_json::Value> =
        merges.iter().map(|m| m.split(' ').collect::<Vec<_>>().into()).collect();
    for merges in [&texts, &pairs] {
        write(&vocab, merges);
        assert!(converted(&options) == with_clips);
    }
    // Another one wins over CLIP's.
    let mut other = vocab.clone();
    let ids = [&vocab["cat</w>"], &vocab["dog</w>"]].map(Clone::clone);
    (other["cat</w>"], other["dog</w>"]) = (ids[1].clone(), ids[0].clone());
    write(&other, &pairs);
    converted(&options);
    let model = ModelFile::open(&output).unwrap();
    assert_eq!(serde_json::from_slice::<serde_json::Value>(model.vocab()).unwrap(), other);
    assert_eq!(lines(std::str::from_utf8(model.merges()).unwrap()), merges);
    // One of another kind, or none at all.
    for text in ["{\"model\":{\"type\":\"WordPiece\",\"vocab\":{},\"merges\":[]}}", "{\"model\":5}", "{"] {
        std::fs::write(tokenizer.join("tokenizer.json"), text).unwrap();
        let error = convert(&Options { force: true, ..options.clone() }, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn names_that_tell_the_number_of_steps() {
    let folder = tempfile::tempdir().unwrap();
    for (name, file, sampler, steps, side) in [
        ("sd2", "sd_turbo", "euler", 4, 512),
        ("sdxl", "sd_xl_turbo_1.0_fp16", "euler_a", 4, 512),
        ("sdxl", "sdxl_lightning_8step", "euler", 8, 1024),
        ("sdxl", "Hyper-SDXL-1step", "euler", 1, 1024),
        ("sd15", "dreamshaper-LCM", "lcm", 4, 512),
    ] {
        let path = folder.path().join(file).with_extension("safetensors");
        let path =
            if file.contains("1.0") { folder.path().join(format!("{file}.safetensors")) } else { path };
        let card = miniature(name);
        synthetic::write(&card, &synthetic::random(3), &path, Layout::Ldm, Number::F16).unwrap();
        let found = inspect(&path).unwrap();
        assert!(found.notes.iter().any(|n| n.starts_with("its name says")), "{file}: {:?}", found.notes);
        let card = found.card.unwrap();
        assert_eq!(card.schedule.timestep_spacing, TimestepSpacing::Trailing, "{file}");
        let d = card.defaults;
        let told = (d.sampler.as_str(), d.steps, d.guidance_scale, d.width);
        assert_eq!(told, (sampler, steps, 1.0, side), "{file}");
    }
}

#[test]
fn prediction_of_sd2_is_seen_in_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let card = synthetic::card("tiny-sd2-v").unwrap();
    let path = place(folder.path(), Layout::Ldm);
    let values = synthetic::random(4);
    let wide = |t: &Tensor| {
        let scale = if t.name.ends_with("norm1.bias") { 10.0 } else { 1.0 };
        values(t).into_iter().map(|v| v * scale).collect::<Vec<_>>()
    };
    synthetic::write(&card, &wide, &path, Layout::Ldm, Number::F16).unwrap();
    let inspection = inspect(&path).unwrap();
    assert_eq!(inspection.card.unwrap().schedule.prediction_type, Prediction::V);
    let output = Some(folder.path().join("out.sdq"));
    let prediction = Some(Prediction::Epsilon);
    let options = Options { checkpoint: path, output, prediction, ..Options::default() };
    assert_eq!(
        convert(&options, &|_| {}).unwrap().card.model().unwrap().schedule.prediction_type,
        Prediction::Epsilon
    );
}

/// Adds tensors of one or more f32 numbers to a safetensors file.
fn add(path: &Path, extra: &[(&str, Vec<f32>)]) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data: Vec<(String, Vec<u8>)> = extra
        .iter()
        .map(|(n, v)| (n.to_string(), v.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let mut views = file.tensors();
    views.extend(data.iter().map(|(name, data)| {
        let view = TensorView::new(Dtype::F32, vec![data.len() / 4], data).unwrap();
        (name.clone(), view)
    }));
    let copy = path.with_extension("new");
    serialize_to_file(views, None, &copy).unwrap();
    std::fs::rename(copy, path).unwrap();
}

#[test]
fn markers_in_single_files() {
    let folder = tempfile::tempdir().unwrap();
    let card = synthetic::card("tiny-sdxl").unwrap();
    let path = place(folder.path(), Layout::Ldm);
    let schedule = |extra: &[(&str, Vec<f32>)]| {
        synthetic::write(&card, &synthetic::random(3), &path, Layout::Ldm, Number::F16).unwrap();
        add(&path, extra);
        inspect(&path).unwrap().card.map(|card| (card.schedule, card.vae.scaling_factor))
    };
    let (plain, scale) = schedule(&[("model_ema.decay", vec![0.99])]).unwrap();
    assert_eq!((plain.prediction_type, plain.rescale_betas_zero_snr), (Prediction::Epsilon, false));
    assert_eq!(scale, 0.13025);
    let (v, _) = schedule(&[("v_pred", vec![]), ("ztsnr", vec![])]).unwrap();
    assert_eq!((v.prediction_type, v.rescale_betas_zero_snr), (Prediction::V, true));
    let mut alphas = vec![0.5; 1000];
    assert!(!schedule(&[("alphas_cumprod", alphas.clone())]).unwrap().0.rescale_betas_zero_snr);
    alphas[999] = 4.9e-8;
    assert!(schedule(&[("alphas_cumprod", alphas)]).unwrap().0.rescale_betas_zero_snr);
    assert_eq!(schedule(&[("scale_factor", vec![0.25])]).unwrap().1, 0.25);
    let edm = |sigma_min, sigma_max, sigma_data, sigma_schedule| {
        Some(EdmConfig { sigma_min, sigma_max, sigma_data, sigma_schedule })
    };
    let (playground, scale) =
        schedule(&[("edm_mean", vec![0.5, -0.5, 1.0, 0.0]), ("edm_std", vec![8.0, 6.0, 7.0, 5.0])]).unwrap();
    assert_eq!(playground.edm, edm(0.002, 80.0, 0.5, SigmaSchedule::Karras));
    assert_eq!((playground.prediction_type, scale), (Prediction::Epsilon, 0.5));
    let (cosxl, _) = schedule(&[("edm_vpred.sigma_max", vec![100.0])]).unwrap();
    assert_eq!(cosxl.edm, edm(0.002, 100.0, 1.0, SigmaSchedule::Exponential));
    assert_eq!(cosxl.prediction_type, Prediction::V);
    assert!(schedule(&[("edm_vpred.sigma_max", vec![-1.0])]).is_none(), "impossible noise levels");
    assert!(schedule(&[("edm_mean", vec![0.0; 3])]).is_none(), "as many as channels");
    assert!(schedule(&[("edm_mean", vec![0.0; 4]), ("edm_std", vec![0.0; 4])]).is_none());
}

#[test]
fn another_vae() {
    let folder = tempfile::tempdir().unwrap();
    let card = synthetic::card("tiny-sd15").unwrap();
    let [model, other] = [5, 6].map(|seed| {
        let path = folder.path().join(format!("{seed}"));
        synthetic::write(&card, &synthetic::random(seed), &path, Layout::Diffusers, Number::F16).unwrap();
        path
    });
    let single = folder.path().join("other.safetensors");
    synthetic::write(&card, &synthetic::random(6), &single, Layout::Ldm, Number::F16).unwrap();
    let options =
        Options { checkpoint: model, output: Some(folder.path().join("out.sdq")), ..Options::default() };
    let without = converted(&options);
    let files: Vec<Vec<u8>> =
        [other.clone(), single, other.join("vae").join("diffusion_pytorch_model.safetensors")]
            .into_iter()
            .map(|vae| converted(&Options { vae: Some(vae), ..options.clone() }))
            .collect();
    assert!(files.iter().all(|f| *f == files[0]));
    assert!(files[0].len() == without.len() && files[0] != without);
}
