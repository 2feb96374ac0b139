//! Runs of the denoiser that can be laid side by side.
#![forbid(unsafe_code)]

use engine::budget::MemoryPlan;
use engine::error::Result;
use engine::pipeline::{Conditioning, Control, Denoiser, Latents, Pipeline, Request};
use engine::rng::Rng;
use engine::sampler::{self, Run};
use engine::schedule::{Schedule, Spread};

use super::measure::relative_error;

/// A picture and how it came about.
#[derive(Debug)]
pub struct Trajectory {
    /// What the network saw at each evaluation, `[c, h, w]`.
    pub inputs: Vec<Vec<f32>>,
    /// The timestep of each evaluation.
    pub timesteps: Vec<f32>,
    /// What it predicted, for each conditioning.
    pub noises: Vec<Vec<Vec<f32>>>,
    /// The latents after each evaluation.
    pub latents: Vec<Vec<f32>>,
    /// `[h, w, 3]`
    pub rgb8: Vec<u8>,
}

/// Asked in between whether to go on.
pub type GoOn<'a> = &'a dyn Fn() -> Control;

/// Makes the picture of `request`.
pub fn run(pipeline: &Pipeline, request: &Request, go_on: GoOn<'_>) -> Result<Trajectory> {
    let card = pipeline.card();
    let shape = request.latents_shape(card);
    let (plan, conditioning) = conditioning(pipeline, request, go_on)?;
    let mut rng = Rng::new(request.noise, request.seed);
    let mut latents = vec![0.0; shape.iter().product()];
    match &request.init_latents {
        Some(given) => latents.copy_from_slice(&given.data),
        None => rng.randn(&mut latents),
    }
    let schedule = Schedule::new(&card.schedule);
    let spread = Spread::find(&request.schedule)?;
    let parts = Run { schedule: &schedule, steps: request.steps, spread, len: latents.len() };
    let mut sampler = (sampler::find(&request.sampler)?.new)(&parts);
    let sigma = sampler.init_noise_sigma();
    latents.iter_mut().for_each(|x| *x *= sigma);

    let timesteps = sampler.timesteps().to_vec();
    let (mut inputs, mut noises, mut along) = (vec![], vec![], vec![]);
    let mut event = |_| go_on();
    let mut denoiser = Denoiser::new(pipeline, &plan, conditioning, request)?;
    denoiser.run(&timesteps, &mut event, |predictor, event| {
        let mut noise = vec![0.0; latents.len()];
        for i in 0..timesteps.len() {
            let mut input = vec![0.0; latents.len()];
            sampler.scale_model_input(&latents, i, &mut input);
            predictor.predict(&input, i, &mut noise, event)?;
            inputs.push(input);
            noises.push(predictor.noises());
            sampler.step(i, &noise, &mut latents, &mut rng);
            along.push(latents.clone());
        }
        Ok(())
    })?;
    let rgb8 = pipeline.decode(&Latents { shape, data: latents })?.rgb8();
    Ok(Trajectory { inputs, timesteps, noises, latents: along, rgb8 })
}

/// Relative errors of the noise predictions of `pipeline`, for each conditioning, at every `stride`th evaluation of `along`.
pub fn errors(
    pipeline: &Pipeline,
    request: &Request,
    along: &Trajectory,
    stride: usize,
    go_on: GoOn<'_>,
) -> Result<Vec<f64>> {
    let (plan, conditioning) = conditioning(pipeline, request, go_on)?;
    let mut errors = vec![];
    let mut event = |_| go_on();
    let mut denoiser = Denoiser::new(pipeline, &plan, conditioning, request)?;
    denoiser.run(&along.timesteps, &mut event, |predictor, event| {
        for i in (0..along.inputs.len()).step_by(stride) {
            let mut noise = vec![0.0; along.inputs[i].len()];
            predictor.predict(&along.inputs[i], i, &mut noise, event)?;
            let pairs = predictor.noises().into_iter().zip(&along.noises[i]);
            errors.extend(pairs.map(|(got, want)| relative_error(&got, want)));
        }
        Ok(())
    })?;
    Ok(errors)
}

/// The plan of a run, and what it makes of the negative prompt and the prompt.
fn conditioning(
    pipeline: &Pipeline,
    request: &Request,
    go_on: GoOn<'_>,
) -> Result<(MemoryPlan, Vec<Conditioning>)> {
    let [_, h, w] = request.latents_shape(pipeline.card());
    let mut texts = vec![&request.negative_prompt, &request.prompt];
    if request.guidance_scale == 1.0 {
        texts.remove(0);
    }
    let prompts = texts.iter().map(|text| pipeline.tokenize(text)).collect::<Result<Vec<_>>>()?;
    let plan = pipeline.plan(h, w, prompts.len(), false)?;
    let conditioning = pipeline.encode(&plan, &prompts, &mut |_| go_on())?;
    Ok((plan, conditioning))
}
