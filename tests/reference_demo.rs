//! The demo model against diffusers: the outputs that `models/demo/make_reference.py` has written.
#![forbid(unsafe_code)]

use convert::Quant;
use engine::pipeline::{Conditioning, Control, Denoiser, Latents, Pipeline, Request};
use engine::precision::Precision;
use engine::sampler::{self, Run};
use engine::schedule::{Schedule, Spread};
use sdfast_tests::{Golden, demo, median, psnr, relative_error, report};

/// Relative error of any one piece in f32 arithmetic.
const EXACT: f64 = 1e-4;
/// Relative error of the latents of a whole run in f32 arithmetic.
const RUN: f64 = 1e-2;
/// The least PSNR of such a run's picture, in dB.
const PSNR: f64 = 40.;
/// The median error of a noise prediction of quantized models: `high`, then `fast`.
const Q8: [f64; 2] = [0.0055, 0.0085];
const Q4: [f64; 2] = [0.030, 0.030];

const SAMPLERS: [&str; 2] = ["ddim", "euler"];
const PROMPTS: usize = 3;

fn reference(prompt: usize, sampler: &str) -> Golden {
    Golden::open(&demo().join(format!("reference/{prompt}_{sampler}.safetensors")))
}

fn pipeline(quant: Quant, precision: Precision) -> Pipeline {
    sdfast_tests::pipeline(&demo().join("model"), quant, precision)
}

fn request(golden: &Golden, pipeline: &Pipeline) -> Request {
    Request {
        steps: golden.values("timesteps").len(),
        guidance_scale: golden.number("guidance") as f32,
        sampler: golden.text("sampler").into(),
        init_latents: Some(Latents { shape: [4, 16, 16], data: golden.values("noise").to_vec() }),
        ..Request::new(golden.text("prompt"), pipeline.card())
    }
}

/// The negative prompt's, then the prompt's.
fn encode(golden: &Golden, pipeline: &Pipeline) -> Vec<Conditioning> {
    let prompts = ["negative_prompt", "prompt"].map(|p| pipeline.tokenize(golden.text(p)).unwrap());
    for (i, prompt) in prompts.iter().enumerate() {
        assert_eq!(prompt.windows[0].ids, golden.ids("input_ids", i));
    }
    let plan = pipeline.plan(16, 16, 2, false).unwrap();
    pipeline.encode(&plan, &prompts, &mut |_| Control::Continue).unwrap()
}

/// Errors of the noise predictions, unguided and guided by turns, at every `stride`th latents of the reference.
fn prediction_errors(golden: &Golden, pipeline: &Pipeline, stride: usize) -> Vec<f64> {
    let request = request(golden, pipeline);
    let timesteps = golden.values("timesteps");
    let schedule = Schedule::new(&pipeline.card().schedule);
    let run = Run { schedule: &schedule, steps: timesteps.len(), spread: Spread::Model, len: 4 * 16 * 16 };
    let sampler = (sampler::find(golden.text("sampler")).unwrap().new)(&run);
    assert_eq!(sampler.timesteps(), timesteps);
    assert!((sampler.init_noise_sigma() / golden.values("init_noise_sigma")[0] - 1.).abs() < 1e-6);

    let conditioning = encode(golden, pipeline);
    let plan = pipeline.plan(16, 16, 2, false).unwrap();
    let mut denoiser = Denoiser::new(pipeline, &plan, conditioning, &request).unwrap();
    let mut errors = vec![];
    let mut input = vec![0.; run.len];
    let mut guided = vec![0.; run.len];
    denoiser
        .run(timesteps, &mut |_| Control::Continue, |predictor, event| {
            for i in (0..timesteps.len()).step_by(stride) {
                let latents = match i {
                    0 => golden.values("noise").iter().map(|x| x * sampler.init_noise_sigma()).collect(),
                    _ => golden.row("latents", i - 1).to_vec(),
                };
                sampler.scale_model_input(&latents, i, &mut input);
                predictor.predict(&input, i, &mut guided, event)?;
                for (noise, name) in predictor.noises().iter().zip(["eps_uncond", "eps_cond"]) {
                    errors.push(relative_error(noise, golden.row(name, i)));
                }
            }
            Ok(())
        })
        .unwrap();
    errors
}

fn worst(errors: &[f64]) -> f64 {
    errors.iter().copied().fold(0., f64::max)
}

#[test]
fn text_embeddings_are_diffusers() {
    let pipeline = pipeline(Quant::F16, Precision::Exact);
    for n in 0..PROMPTS {
        let golden = reference(n, "ddim");
        for (i, conditioning) in encode(&golden, &pipeline).iter().enumerate() {
            let error = relative_error(&conditioning.context, golden.row("text_embeddings", i));
            report(&format!("text embeddings, prompt {n}, row {i}: relative error {error:.1e}"));
            assert!(error <= EXACT);
        }
    }
}

#[test]
fn noise_predictions_are_diffusers() {
    let pipeline = pipeline(Quant::F16, Precision::Exact);
    for n in 0..PROMPTS {
        for sampler in SAMPLERS {
            let errors = prediction_errors(&reference(n, sampler), &pipeline, 4);
            report(&format!(
                "noise predictions, prompt {n}, {sampler}: relative error {:.1e}",
                worst(&errors)
            ));
            assert!(worst(&errors) <= EXACT);
        }
    }
}

#[test]
fn decoded_latents_are_diffusers() {
    let pipeline = pipeline(Quant::F16, Precision::Exact);
    let decode =
        |data: &[f32]| pipeline.decode(&Latents { shape: [4, 16, 16], data: data.to_vec() }).unwrap();

    let golden = Golden::open(&demo().join("reference/vae.safetensors"));
    let scale = pipeline.card().vae.scaling_factor;
    let latents: Vec<f32> = golden.values("mean").iter().map(|x| x * scale).collect();
    let planar = golden.values("decoded"); // [3, 128 * 128]
    let wanted: Vec<f32> = (0..planar.len()).map(|i| planar[i % 3 * (128 * 128) + i / 3]).collect();
    let error = relative_error(&decode(&latents).data, &wanted);
    report(&format!("decoded mean: relative error {error:.1e}"));
    assert!(error <= EXACT);

    for n in 0..PROMPTS {
        for sampler in SAMPLERS {
            let golden = reference(n, sampler);
            let image = decode(golden.row("latents", golden.shape("latents")[0] - 1));
            let clipped: Vec<f32> = image.data.iter().map(|x| (x / 2. + 0.5).clamp(0., 1.)).collect();
            let error = relative_error(&clipped, golden.values("image"));
            report(&format!("decoded latents, prompt {n}, {sampler}: relative error {error:.1e}"));
            assert!(error <= EXACT);
        }
    }
}

#[test]
fn whole_runs_are_diffusers() {
    let pipeline = pipeline(Quant::F16, Precision::Exact);
    for n in 0..PROMPTS {
        for sampler in SAMPLERS {
            let golden = reference(n, sampler);
            let got = pipeline.generate(&request(&golden, &pipeline), &mut |_| Control::Continue).unwrap();
            let error =
                relative_error(&got.latents.data, golden.row("latents", golden.shape("latents")[0] - 1));
            let wanted = image::open(demo().join(format!("reference/{n}_{sampler}.png"))).unwrap().to_rgb8();
            let psnr = psnr(&got.rgb8, wanted.as_raw());
            report(&format!("picture {n}, {sampler}: latents off by {error:.1e}, PSNR {psnr:.1} dB"));
            assert!(error <= RUN && psnr >= PSNR);
        }
    }
}

/// The error of every noise prediction along all reference trajectories, and the PSNR of the pictures, which is only told:
/// a trajectory is chaotic.
fn quantized(quant: Quant, budgets: [f64; 2]) {
    for (precision, budget) in [Precision::High, Precision::Fast].into_iter().zip(budgets) {
        let pipeline = pipeline(quant, precision);
        let (mut errors, mut decibels) = (vec![], vec![]);
        for n in 0..PROMPTS {
            for sampler in SAMPLERS {
                let golden = reference(n, sampler);
                errors.extend(prediction_errors(&golden, &pipeline, 1));
                let got =
                    pipeline.generate(&request(&golden, &pipeline), &mut |_| Control::Continue).unwrap();
                let wanted =
                    image::open(demo().join(format!("reference/{n}_{sampler}.png"))).unwrap().to_rgb8();
                decibels.push(psnr(&got.rgb8, wanted.as_raw()));
            }
        }
        report(&format!(
            "{} {precision}: noise predictions off by {:.4} (median; worst {:.4}), pictures {:.1} dB (median)",
            quant.name(),
            median(&errors),
            worst(&errors),
            median(&decibels)
        ));
        assert!(median(&errors) <= budget);
    }
}

#[test]
fn q8_stays_close_along_the_trajectory() {
    quantized(Quant::Q8, Q8);
}

#[test]
fn q4_stays_close_along_the_trajectory() {
    quantized(Quant::Q4, Q4);
}
