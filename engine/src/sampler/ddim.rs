//! DDIM with eta 0 (Song et al. 2020, formula 12), in the form of diffusers' `DDIMScheduler`.

use super::{Run, Sampler, combine};
use crate::card::Prediction;
use crate::rng::Rng;
use crate::schedule::SMALLEST_ALPHA;

/// Steps are linear in the latents and the prediction, so each is a pair of factors.
struct Ddim {
    timesteps: Vec<f32>,
    /// `[steps]`: of the latents, of the model output.
    factors: Vec<(f32, f32)>,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    let schedule = run.schedule;
    let stride = schedule.train_timesteps() / run.steps;
    let timesteps: Vec<usize> =
        schedule.timesteps(run.steps).iter().map(|t| t.round_ties_even() as usize).collect();
    let factors = timesteps.iter().map(|&t| {
        let previous = t.checked_sub(stride).map(|t| schedule.alpha_cumprod(t));
        factors(
            schedule.alpha_cumprod(t),
            previous.unwrap_or(schedule.final_alpha_cumprod()),
            schedule.prediction(),
        )
    });
    Box::new(Ddim { factors: factors.collect(), timesteps: timesteps.iter().map(|&t| t as f32).collect() })
}

/// From the picture's share `a` to the share `previous`.
fn factors(a: f64, previous: f64, prediction: Prediction) -> (f32, f32) {
    let (alpha, sigma) = (a.sqrt(), (1.0 - a).sqrt());
    let (alpha_to, sigma_to) = (previous.sqrt(), (1.0 - previous).sqrt());
    let (latents, output) = match prediction {
        Prediction::Epsilon => {
            // No picture is left to divide by at a share of zero.
            let alpha = alpha.max(SMALLEST_ALPHA.sqrt());
            (alpha_to / alpha, sigma_to - alpha_to * sigma / alpha)
        }
        Prediction::V => (alpha_to * alpha + sigma_to * sigma, sigma_to * alpha - alpha_to * sigma),
    };
    (latents as f32, output as f32)
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        1.0
    }

    fn scale_model_input(&self, latents: &[f32], _: usize, out: &mut [f32]) {
        out.copy_from_slice(latents);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], _: &mut Rng) {
        let (of_latents, of_output) = self.factors[i];
        combine(latents, of_latents, model_output, of_output);
    }
}
