//! Tiny random models of each family against diffusers: the outputs that `tests/data/make_models.py` has written.
#![forbid(unsafe_code)]

use convert::Quant;
use engine::pipeline::{Conditioning, Control, Denoiser, Image, Latents, Pipeline, Request};
use engine::precision::Precision;
use sdfast_tests::{Golden, cosine, data, relative_error, report};

/// Relative error with f16 weights in f32 arithmetic.
const EXACT: f64 = 5e-4;
/// The least cosine with q8 weights and int8 activations.
const COSINE: f64 = 0.999;

/// Latents of the golden pictures.
const H: usize = 9;
const W: usize = 7;

/// `[c, h * w]` to `[h * w, c]`.
fn pixels(planar: &[f32], c: usize) -> Vec<f32> {
    let n = planar.len() / c;
    (0..planar.len()).map(|i| planar[i % c * n + i / c]).collect()
}

fn encode(golden: &Golden, pipeline: &Pipeline) -> Vec<Conditioning> {
    let prompts = ["", golden.text("prompt")].map(|p| pipeline.tokenize(p).unwrap());
    let names: Vec<_> = ["input_ids", "input_ids_2"].into_iter().filter(|name| golden.has(name)).collect();
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(prompt.windows.len(), names.len());
        for (window, name) in prompt.windows.iter().zip(&names) {
            assert_eq!(window.ids, golden.ids(name, i), "{name}");
        }
    }
    let plan = pipeline.plan(H, W, prompts.len(), false).unwrap();
    pipeline.encode(&plan, &prompts, &mut |_| Control::Continue).unwrap()
}

/// The network's prediction for each row of the golden embeddings at that row's timestep.
fn predict(golden: &Golden, pipeline: &Pipeline) -> Vec<Vec<f32>> {
    let rows = [0, 1].map(|i| Conditioning {
        context: golden.row("text_embeddings", i).to_vec(),
        tokens: golden.shape("text_embeddings")[1],
        pooled: if golden.has("pooled") { golden.row("pooled", i).to_vec() } else { vec![] },
    });
    let request =
        Request { width: 8 * W, height: 8 * H, guidance_scale: 8., ..Request::new("", pipeline.card()) };
    let plan = pipeline.plan(H, W, 2, false).unwrap();
    let mut denoiser = Denoiser::new(pipeline, &plan, rows.to_vec(), &request).unwrap();
    let mut guided = vec![0.; 4 * H * W];
    denoiser
        .run(&mut |_| Control::Continue, |predictor, event| {
            let mut each = |i: usize| {
                let timestep = golden.values("timestep")[i];
                predictor.predict(golden.values("latents"), timestep, &mut guided, event)?;
                Ok::<_, engine::Error>(predictor.noises().swap_remove(i))
            };
            Ok(vec![each(0)?, each(1)?])
        })
        .unwrap()
}

fn decode(golden: &Golden, pipeline: &Pipeline) -> Vec<f32> {
    let scale = pipeline.card().vae.scaling_factor;
    let data = golden.values("vae_latents").iter().map(|x| x * scale).collect();
    pipeline.decode(&Latents { shape: [4, H, W], data }).unwrap().data
}

/// Mean and log variance of the golden picture, `[h * w, 2 * 4]`.
fn encode_picture(golden: &Golden, pipeline: &Pipeline) -> Vec<f32> {
    let data = pixels(golden.values("vae_picture"), 3);
    pipeline.encode_image(&Image { width: 8 * W, height: 8 * H, data }).unwrap()
}

fn equals_diffusers(name: &str) {
    let folder = data().join(name);
    let golden = Golden::open(&folder.join("golden.safetensors"));

    // What came out, and what should have.
    let outputs = |pipeline: &Pipeline| {
        let mut out: Vec<(String, Vec<f32>, Vec<f32>)> = vec![];
        for (i, c) in encode(&golden, pipeline).into_iter().enumerate() {
            out.push((format!("text embeddings {i}"), c.context, golden.row("text_embeddings", i).to_vec()));
            if golden.has("pooled") {
                out.push((format!("pooled {i}"), c.pooled, golden.row("pooled", i).to_vec()));
            }
        }
        for (i, noise) in predict(&golden, pipeline).into_iter().enumerate() {
            out.push((format!("prediction {i}"), noise, golden.row("prediction", i).to_vec()));
        }
        out.push(("decoded".into(), decode(&golden, pipeline), pixels(golden.values("vae_decoded"), 3)));
        let moments = [golden.values("vae_mean"), golden.values("vae_logvar")].concat();
        out.push(("encoded".into(), encode_picture(&golden, pipeline), pixels(&moments, 8)));
        out
    };

    for (what, got, wanted) in outputs(&sdfast_tests::pipeline(&folder, Quant::F16, Precision::Exact)) {
        let error = relative_error(&got, &wanted);
        report(&format!("{name}, f16 exact, {what}: relative error {error:.1e}"));
        assert!(error <= EXACT, "{what}");
    }
    for (what, got, wanted) in outputs(&sdfast_tests::pipeline(&folder, Quant::Q8, Precision::Fast)) {
        let cosine = cosine(&got, &wanted);
        report(&format!("{name}, q8 fast, {what}: cosine {cosine:.5}"));
        assert!(cosine >= COSINE, "{what}");
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
