//! Euler's method on the probability-flow equation (Karras et al. 2022, algorithm 2 without churn), as diffusers'
//! `EulerDiscreteScheduler`.

use super::sigma::OverSigmas;
use super::{Run, Sampler, combine};
use crate::rng::Rng;

struct Euler(OverSigmas);

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    Box::new(Euler(OverSigmas::new(run)))
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f32] {
        &self.0.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.0.init_noise_sigma()
    }

    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]) {
        self.0.scale_model_input(latents, self.0.levels.sigmas[i], out);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], _: &mut Rng) {
        let (sigma, next) = (self.0.levels.sigmas[i], self.0.levels.sigmas[i + 1]);
        let delta = next - sigma;
        let (of_latents, of_output) = self.0.derivative(sigma);
        combine(latents, (1.0 + delta * of_latents) as f32, model_output, (delta * of_output) as f32);
    }
}
