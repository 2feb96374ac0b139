//! Euler's method to a lower noise level than the next one, and fresh noise up to that, as diffusers'
//! `EulerAncestralDiscreteScheduler`.

use super::sigma::OverSigmas;
use super::{Run, Sampler, add, combine};
use crate::rng::Rng;

struct EulerAncestral {
    over: OverSigmas,
    noise: Vec<f32>,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    Box::new(EulerAncestral { over: OverSigmas::new(run), noise: vec![0.0; run.len] })
}

impl Sampler for EulerAncestral {
    fn timesteps(&self) -> &[f32] {
        &self.over.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.over.init_noise_sigma()
    }

    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]) {
        self.over.scale_model_input(latents, self.over.levels.sigmas[i], out);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], rng: &mut Rng) {
        let (sigma, next) = (self.over.levels.sigmas[i], self.over.levels.sigmas[i + 1]);
        let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
        let down = (next * next - up * up).max(0.0).sqrt();
        let delta = down - sigma;
        let (of_latents, of_output) = self.over.derivative(sigma);
        combine(latents, (1.0 + delta * of_latents) as f32, model_output, (delta * of_output) as f32);
        rng.randn(&mut self.noise);
        add(latents, &self.noise, up as f32);
    }
}
