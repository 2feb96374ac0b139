//! Runs of the denoiser that can be laid side by side.
#![forbid(unsafe_code)]

use engine::pipeline::{Denoiser, Latents, Pipeline, Request};
use engine::rng::Rng;
use engine::sampler::{self, Run};
use engine::schedule::{Schedule, Spread};

use super::measure::relative_error;
use crate::failure::Result;
use crate::interrupt;

/// A picture and how it came about.
pub(super) struct Trajectory {
    /// What the network saw at each evaluation, `[c, h, w]`.
    inputs: Vec<Vec<f32>>,
    /// What it predicted, for each conditioning.
    noises: Vec<Vec<Vec<f32>>>,
    /// The latents after each evaluation.
    pub(super) latents: Vec<Vec<f32>>,
    /// `[h, w, 3]`
    pub(super) rgb8: Vec<u8>,
}

/// Errors of the noise predictions for what the network saw along another run.
pub(super) type Along<'a> = (&'a Trajectory, &'a mut Vec<f64>);

/// Makes the picture of `request`, and for each evaluation appends the errors of the predictions along another run.
pub(super) fn run(
    pipeline: &Pipeline,
    request: &Request,
    mut along: Option<Along<'_>>,
) -> Result<Trajectory> {
    let card = pipeline.card();
    let shape = request.latents_shape(card);
    let mut texts = vec![&request.negative_prompt, &request.prompt];
    if request.guidance_scale == 1.0 {
        texts.remove(0);
    }
    let prompts =
        texts.iter().map(|text| pipeline.tokenize(text)).collect::<engine::error::Result<Vec<_>>>()?;
    let plan = pipeline.plan(shape[1], shape[2], prompts.len(), false)?;
    let mut event = |_| interrupt::control();
    let conditioning = pipeline.encode(&plan, &prompts, &mut event)?;

    let mut rng = Rng::new(request.noise, request.seed);
    let mut latents = vec![0.0; shape.iter().product()];
    rng.randn(&mut latents);
    let schedule = Schedule::new(&card.schedule);
    let spread = Spread::find(&request.schedule)?;
    let parts = Run { schedule: &schedule, steps: request.steps, spread, len: latents.len() };
    let mut sampler = (sampler::find(&request.sampler)?.new)(&parts);
    let sigma = sampler.init_noise_sigma();
    latents.iter_mut().for_each(|x| *x *= sigma);

    let mut made = Trajectory { inputs: vec![], noises: vec![], latents: vec![], rgb8: vec![] };
    let timesteps = sampler.timesteps().to_vec();
    Denoiser::new(pipeline, &plan, conditioning, request)?.run(&mut event, |predictor, event| {
        let mut noise = vec![0.0; latents.len()];
        for (i, &t) in timesteps.iter().enumerate() {
            if let Some((other, errors)) = &mut along {
                predictor.predict(&other.inputs[i], t, &mut noise, event)?;
                let pairs = predictor.noises().into_iter().zip(&other.noises[i]);
                errors.extend(pairs.map(|(got, want)| relative_error(&got, want)));
            }
            let mut input = vec![0.0; latents.len()];
            sampler.scale_model_input(&latents, i, &mut input);
            predictor.predict(&input, t, &mut noise, event)?;
            made.inputs.push(input);
            made.noises.push(predictor.noises());
            sampler.step(i, &noise, &mut latents, &mut rng);
            made.latents.push(latents.clone());
        }
        Ok(())
    })?;
    made.rgb8 = pipeline.decode(&Latents { shape, data: latents })?.rgb8();
    Ok(made)
}
