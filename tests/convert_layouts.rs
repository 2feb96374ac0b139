//! One model, written in every layout that people have, converts to one and the same file.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use convert::synthetic::{self, Layout, MODELS, Number, Tensor};
use convert::{Options, Quant, convert, inspect};
use engine::card::{Card, Prediction};
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

#[test]
fn miniatures_of_every_model() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let card = synthetic::card(&format!("tiny-{name}")).unwrap();
        let values = synthetic::random(1);
        let mut expected: Option<(Vec<u8>, Card)> = None;
        // Names of the text encoders differ between these three; the others share theirs.
        let all = ["sd15", "sd2", "sdxl"].contains(&name);
        let layouts = Layout::ALL.into_iter().filter(|(n, _)| all || ["diffusers", "ldm"].contains(n));
        for (layout_name, layout) in layouts {
            let path = place(folder.path(), layout);
            let _ = std::fs::remove_dir_all(&path);
            synthetic::write(&card, &values, &path, layout, Number::F16).unwrap();
            let alone = !matches!(layout, Layout::Diffusers | Layout::Sharded);
            let options = Options {
                checkpoint: path.clone(),
                output: Some(folder.path().join("out.sdq")),
                quant: Quant::Q8,
                // A miniature is smaller than its family, and random weights don't tell what they predict.
                config: alone.then(|| place(folder.path(), Layout::Diffusers)),
                ..Options::default()
            };
            let bytes = converted(&options);
            let found = ModelFile::open(options.output.as_deref().unwrap()).unwrap().card().clone();
            match &expected {
                None => {
                    assert_eq!(found.family, card.family, "{name}");
                    assert_eq!(found.text_encoders, card.text_encoders, "{name}");
                    assert_eq!(found.unet, card.unet, "{name}");
                    assert_eq!(found.vae, card.vae, "{name}");
                    assert_eq!(found.schedule, card.schedule, "{name}");
                    assert_eq!(found.defaults, card.defaults, "{name}");
                    expected = Some((bytes, found));
                }
                Some((expected, _)) => assert!(bytes == *expected, "{name} as {layout_name}"),
            }
            let inspection = inspect(&path).unwrap();
            assert!(inspection.card.is_some(), "{name} as {layout_name}: {:?}", inspection.fault);
        }
    }
}

#[test]
fn numbers_of_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let card = synthetic::card("tiny-sd15").unwrap();
    let values = synthetic::random(2);
    // What bf16 holds, every type but f16 holds.
    let exact =
        |t: &Tensor| values(t).into_iter().map(|v| half::bf16::from_f32(v).to_f32()).collect::<Vec<_>>();
    let layouts = [Layout::Diffusers, Layout::Zip, Layout::Pickle, Layout::Gguf];
    let files: Vec<Vec<u8>> = [Number::F32, Number::Bf16]
        .into_iter()
        .flat_map(|number| layouts.map(|layout| (number, layout)))
        .map(|(number, layout)| {
            let path = place(folder.path(), layout);
            synthetic::write(&card, &exact, &path, layout, number).unwrap();
            let output = Some(folder.path().join("out.sdq"));
            let config = Some(place(folder.path(), Layout::Diffusers));
            converted(&Options { checkpoint: path, output, quant: Quant::Q4, config, ..Options::default() })
        })
        .collect();
    assert!(files.iter().all(|f| *f == files[0]));
}

#[test]
fn single_files_alone_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["sd15", "sd15-inpaint", "sd2", "sdxl", "sdxl-refiner", "ssd-1b"] {
        let card = synthetic::card(&format!("tiny-{name}")).unwrap();
        let path = place(folder.path(), Layout::Ldm);
        synthetic::write(&card, &synthetic::random(3), &path, Layout::Ldm, Number::F16).unwrap();
        let found = inspect(&path).unwrap().card.unwrap();
        assert_eq!(found.family, card.family, "{name}");
        assert_eq!(found.text_encoders, card.text_encoders, "{name}");
        assert_eq!(found.unet, card.unet, "{name}");
        assert_eq!(found.vae, card.vae, "{name}");
        assert_eq!(found.schedule, card.schedule, "{name}");
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
    assert_eq!(convert(&options, &|_| {}).unwrap().card.schedule.prediction_type, Prediction::Epsilon);
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
    assert!(
        schedule(&[("edm_mean", vec![0.0; 4])]).is_none(),
        "a noise schedule that isn't known is refused"
    );
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
