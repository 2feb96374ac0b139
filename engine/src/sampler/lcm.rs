//! Sampling of latent consistency models (Luo et al. 2023), as diffusers' `LCMScheduler`: each evaluation predicts the
//! picture, and noise of the next timestep is added to it.

use super::{Run, Sampler, add, combine};
use crate::card::Prediction;
use crate::rng::Rng;
use crate::schedule::SMALLEST_ALPHA;

/// Steps of the solver that the model was distilled from.
const ORIGINAL_STEPS: usize = 50;
/// The boundary condition's timestep scaling and data deviation.
const TIMESTEP_SCALING: f64 = 10.0;
const SIGMA_DATA: f64 = 0.5;

struct Lcm {
    timesteps: Vec<f32>,
    /// `[steps]`: of the latents, of the model output, of fresh noise.
    factors: Vec<(f32, f32, f32)>,
    noise: Vec<f32>,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    let (schedule, steps) = (run.schedule, run.steps);
    let total = schedule.train_timesteps();
    let original = ORIGINAL_STEPS.max(steps).min(total);
    let stride = total / original;
    let timestep = |i: usize| (original - i * original / steps) * stride - 1;
    let timesteps: Vec<usize> = (0..steps).map(timestep).collect();
    let factors = timesteps.iter().enumerate().map(|(i, &t)| {
        let (alpha, sigma) = split(schedule.alpha_cumprod(t));
        let (of_latents, of_output) = match schedule.prediction() {
            Prediction::Epsilon => {
                // No picture is left to divide by at a share of zero.
                let alpha = alpha.max(SMALLEST_ALPHA.sqrt());
                (1.0 / alpha, -sigma / alpha)
            }
            Prediction::V => (alpha, -sigma),
        };
        let scaled = t as f64 * TIMESTEP_SCALING;
        let size = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        let (skip, out) = (SIGMA_DATA * SIGMA_DATA / size, scaled / size.sqrt());
        let (alpha_to, sigma_to) = match timesteps.get(i + 1) {
            Some(&next) => split(schedule.alpha_cumprod(next)),
            None => (1.0, 0.0),
        };
        let latents = alpha_to * (out * of_latents + skip);
        (latents as f32, (alpha_to * out * of_output) as f32, sigma_to as f32)
    });
    let factors = factors.collect();
    let timesteps = timesteps.iter().map(|&t| t as f32).collect();
    Box::new(Lcm { timesteps, factors, noise: vec![0.0; run.len] })
}

fn split(alpha_cumprod: f64) -> (f64, f64) {
    (alpha_cumprod.sqrt(), (1.0 - alpha_cumprod).sqrt())
}

impl Sampler for Lcm {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn scale_model_input(&self, latents: &[f32], _: usize, out: &mut [f32]) {
        out.copy_from_slice(latents);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], rng: &mut Rng) {
        let (of_latents, of_output, of_noise) = self.factors[i];
        combine(latents, of_latents, model_output, of_output);
        if i + 1 < self.factors.len() {
            rng.randn(&mut self.noise);
            add(latents, &self.noise, of_noise);
        }
    }
}
