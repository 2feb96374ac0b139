//! Tiny random models of each family against diffusers: the outputs that `tests/data/make_models.py` and
//! `tests/data/make_variants.py` have written.
#![forbid(unsafe_code)]

use convert::Quant;
use convert::synthetic::{self, Layout, MODELS, Number, Tensor};
use engine::graph::weight::Role;
use engine::precision::Precision;
use sdfast_tests::families::{outputs, predict};
use sdfast_tests::{Golden, cosine, data, pipeline, relative_error, report};

/// Relative error with f16 weights in f32 arithmetic.
const EXACT: f64 = 5e-4;
/// The least cosine with q8 weights and int8 activations.
const COSINE: f64 = 0.999;

fn equals_diffusers(name: &str) {
    let folder = data().join(name);
    let golden = Golden::open(&folder.join("golden.safetensors"));
    for out in outputs(&golden, &pipeline(&folder, Quant::F16, Precision::Exact)) {
        let error = relative_error(&out.got, &out.wanted);
        report(&format!("{name}, f16 exact, {}: relative error {error:.1e}", out.what));
        assert!(error <= EXACT, "{}", out.what);
    }
    for out in outputs(&golden, &pipeline(&folder, Quant::Q8, Precision::Fast)) {
        let cosine = cosine(&out.got, &out.wanted);
        report(&format!("{name}, q8 fast, {}: cosine {cosine:.5}", out.what));
        assert!(cosine >= COSINE, "{}", out.what);
    }
}

#[test]
fn sd15() {
    equals_diffusers("sd15-tiny");
}

#[test]
fn sd2() {
    equals_diffusers("sd2-tiny");
}

#[test]
fn sdxl() {
    equals_diffusers("sdxl-tiny");
}

#[test]
fn sdxl_refiner() {
    equals_diffusers("refiner-tiny");
}

#[test]
fn inpainting() {
    equals_diffusers("inpaint-tiny");
}

#[test]
fn latent_consistency() {
    equals_diffusers("lcm-tiny");
}

/// The miniature of every model that there are synthetic checkpoints of, from a single file alone.
#[test]
fn every_variant() {
    let folder = tempfile::tempdir().unwrap();
    let golden = Golden::open(&data().join("variants.safetensors"));
    let random = synthetic::random(1);
    let made = |name: &str, shape: &[usize]| {
        // The formula scales by the inputs of a row, so there is one.
        let shape = vec![shape.iter().product::<usize>()];
        random(&Tensor { name: name.to_owned(), shape, role: Role::Conv })
    };
    for name in MODELS {
        let card = synthetic::card(&format!("tiny-{name}")).unwrap();
        let path = folder.path().join("model.safetensors");
        synthetic::write(&card, &random, &path, Layout::Ldm, Number::F16).unwrap();
        let wanted = golden.values(name);
        let (h, w) = (golden.shape(name)[2], golden.shape(name)[3]);
        let shapes = [
            ("latents", vec![1, card.unet.in_channels, h, w]),
            ("text_embeddings", vec![2, 77, card.unet.cross_attention_dim]),
            ("pooled", vec![2, 64]),
        ];
        let mut inputs: Vec<_> = shapes
            .into_iter()
            .map(|(name, shape)| {
                let values = made(if name == "text_embeddings" { "texts" } else { name }, &shape);
                (name, shape, values)
            })
            .collect();
        inputs.push(("timestep", vec![2], vec![981.0, 261.0]));
        let inputs = Golden::of(inputs);
        for (quant, precision) in [(Quant::F16, Precision::Exact), (Quant::Q8, Precision::Fast)] {
            let got = predict(&inputs, &pipeline(&path, quant, precision)).concat();
            let (error, cosine) = (relative_error(&got, wanted), cosine(&got, wanted));
            report(&format!("{name}, {}: relative error {error:.1e}, cosine {cosine:.5}", quant.name()));
            assert!(error <= EXACT || precision != Precision::Exact, "{name}");
            assert!(cosine >= COSINE, "{name}");
        }
    }
}
