//! Euler's method on the probability-flow equation (Karras et al. 2022, algorithm 2 without churn), as diffusers'
//! `EulerDiscreteScheduler`.

use super::{Run, Sampler, combine, scale};
use crate::card::Prediction;
use crate::rng::Rng;
use crate::schedule::Levels;

struct Euler {
    levels: Levels,
    prediction: Prediction,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    Box::new(Euler {
        levels: run.schedule.levels(run.steps, run.spread),
        prediction: run.schedule.prediction(),
    })
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f32] {
        &self.levels.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.levels.init_noise_sigma as f32
    }

    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]) {
        let sigma = self.levels.sigmas[i];
        scale(latents, (1.0 / (sigma * sigma + 1.0).sqrt()) as f32, out);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], _: &mut Rng) {
        let (sigma, next) = (self.levels.sigmas[i], self.levels.sigmas[i + 1]);
        let delta = next - sigma;
        // (x - denoised) / sigma, written out for each kind of prediction.
        let (of_latents, of_output) = match self.prediction {
            Prediction::Epsilon => (0.0, 1.0),
            Prediction::V => (sigma / (sigma * sigma + 1.0), 1.0 / (sigma * sigma + 1.0).sqrt()),
        };
        combine(latents, (1.0 + delta * of_latents) as f32, model_output, (delta * of_output) as f32);
    }
}
