//! Heun's method (Karras et al. 2022, algorithm 2 without churn), as diffusers' `HeunDiscreteScheduler`: two evaluations a
//! step, one for the last.

use super::sigma::OverSigmas;
use super::{Run, Sampler, add, combine};
use crate::rng::Rng;

struct Heun {
    over: OverSigmas,
    /// Of each evaluation: the first, then each twice.
    timesteps: Vec<f32>,
    /// The latents at the beginning of a step.
    start: Vec<f32>,
    /// The derivative there.
    derivative: Vec<f32>,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    let over = OverSigmas::new(run);
    let [first, rest @ ..] = &over.levels.timesteps[..] else { unreachable!("a run has a step") };
    let timesteps = std::iter::once(*first).chain(rest.iter().flat_map(|&t| [t, t])).collect();
    Box::new(Heun { over, timesteps, start: vec![0.0; run.len], derivative: vec![0.0; run.len] })
}

impl Sampler for Heun {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.over.init_noise_sigma()
    }

    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]) {
        self.over.scale_model_input(latents, self.over.levels.sigmas[i.div_ceil(2)], out);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], _: &mut Rng) {
        let sigmas = &self.over.levels.sigmas;
        let (sigma, next) = (sigmas[i / 2], sigmas[i / 2 + 1]);
        let (of_latents, of_output) = self.over.derivative(sigmas[i.div_ceil(2)]);
        let predictor = i.is_multiple_of(2);
        if predictor {
            self.start.copy_from_slice(latents);
        }
        // The derivative here.
        combine(latents, of_latents as f32, model_output, of_output as f32);
        let delta = (next - sigma) as f32;
        if predictor {
            self.derivative.copy_from_slice(latents);
            combine(latents, delta, &self.start, 1.0);
        } else {
            add(latents, &self.derivative, 1.0);
            combine(latents, 0.5 * delta, &self.start, 1.0);
        }
    }
}
