//! Tiny random models of each family against diffusers: the outputs that `tests/data/make_models.py` has written.
#![forbid(unsafe_code)]

use convert::Quant;
use engine::precision::Precision;
use sdfast_tests::families::outputs;
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
