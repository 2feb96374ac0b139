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

/// Predictions of the miniature `name` with the weights and inputs of a seed, f16 `exact` and q8 `fast`, at `h` x `w` latents.
fn miniature(name: &str, seed: u64, (h, w): (usize, usize)) -> [Vec<f32>; 2] {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let random = synthetic::random(seed);
    let made = |name: &str, shape: &[usize]| {
        // The formula scales by the inputs of a row, so there is one.
        let shape = vec![shape.iter().product::<usize>()];
        random(&Tensor { name: name.to_owned(), shape, role: Role::Conv })
    };
    let card = synthetic::card(&format!("tiny-{name}")).unwrap();
    synthetic::write(&card, &random, &path, Layout::Ldm, Number::F16).unwrap();
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
    [(Quant::F16, Precision::Exact), (Quant::Q8, Precision::Fast)]
        .map(|(quant, precision)| predict(&inputs, &pipeline(&path, quant, precision)).concat())
}

/// The miniature of every model that there are synthetic checkpoints of, from a single file alone. Random networks differ in how
/// much they make of a rounding error; where the first makes too much, the median of three counts.
#[test]
fn every_variant() {
    let golden = Golden::open(&data().join("variants.safetensors"));
    for name in MODELS {
        let (wanted, shape) = (golden.values(name), golden.shape(name));
        let size = (shape[2], shape[3]);
        let [exact, fast] = miniature(name, 1, size);
        let (error, mut cosine_fast) = (relative_error(&exact, wanted), cosine(&fast, wanted));
        report(&format!("{name}: f16 exact off by {error:.1e}, q8 fast cosine {cosine_fast:.5}"));
        if cosine_fast < COSINE {
            let more = [2, 3].map(|seed| {
                let [exact, fast] = miniature(name, seed, size);
                cosine(&fast, &exact)
            });
            let mut three = [cosine_fast, more[0], more[1]];
            three.sort_by(f64::total_cmp);
            report(&format!("{name}: q8 fast cosines of three networks {three:.5?}"));
            cosine_fast = three[1];
        }
        assert!(error <= EXACT, "{name}");
        assert!(cosine_fast >= COSINE, "{name}");
    }
}
