//! DPM-Solver++(2M) and its stochastic form (Lu et al. 2022), as diffusers' `DPMSolverMultistepScheduler` with the midpoint
//! rule and a last step of first order to no noise.
//!
//! States are `alpha` times the picture plus `sigma` times noise, of unit variance, so that the network sees them as they
//! are. With named schedules noise is scaled as the WebUI does it.

use super::{Run, Sampler, add, combine};
use crate::card::Prediction;
use crate::rng::Rng;
use crate::schedule::Spread;

/// Factors of a step, all known before the run.
struct Factors {
    /// Of latents and model output: the picture predicted here.
    denoised: (f32, f32),
    /// Of the latents.
    latents: f32,
    /// Of the picture predicted here, of the one before it, and of fresh noise.
    now: f32,
    before: f32,
    noise: f32,
}

struct Dpmpp2m {
    timesteps: Vec<f32>,
    init_noise_sigma: f32,
    factors: Vec<Factors>,
    /// Pictures predicted here and in the step before.
    denoised: [Vec<f32>; 2],
    /// Empty where nothing is stochastic.
    noise: Vec<f32>,
}

pub(super) fn new(run: &Run<'_>) -> Box<dyn Sampler> {
    Box::new(solver(run, false))
}

pub(super) fn new_sde(run: &Run<'_>) -> Box<dyn Sampler> {
    Box::new(solver(run, true))
}

fn solver(run: &Run<'_>, stochastic: bool) -> Dpmpp2m {
    let (schedule, steps) = (run.schedule, run.steps);
    let (timesteps, sigmas) = if run.spread == Spread::Model {
        let timesteps = schedule.timesteps_before_last(steps);
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| schedule.sigma(t)).collect();
        sigmas.push(0.0);
        (timesteps.iter().map(|&t| t as f32).collect(), sigmas)
    } else {
        let levels = schedule.levels(steps, run.spread);
        (levels.timesteps, levels.sigmas)
    };
    let factors = (0..steps).map(|i| factors(&sigmas, i, schedule.prediction(), stochastic));
    let (_, sigma) = split(sigmas[0]);
    Dpmpp2m {
        factors: factors.collect(),
        init_noise_sigma: if run.spread == Spread::Model { 1.0 } else { sigma as f32 },
        timesteps,
        denoised: [vec![0.0; run.len], vec![0.0; run.len]],
        noise: vec![0.0; if stochastic { run.len } else { 0 }],
    }
}

/// `alpha` and `sigma` of unit variance whose ratio is the noise level.
fn split(level: f64) -> (f64, f64) {
    let alpha = 1.0 / (level * level + 1.0).sqrt();
    (alpha, level * alpha)
}

fn factors(levels: &[f64], i: usize, prediction: Prediction, stochastic: bool) -> Factors {
    let ((alpha, sigma), (alpha_to, sigma_to)) = (split(levels[i]), split(levels[i + 1]));
    let denoised = match prediction {
        Prediction::Epsilon => (1.0 / alpha, -sigma / alpha),
        Prediction::V => (alpha, -sigma),
    };
    // Logarithms of the levels are the time of the method; the last step is infinitely long.
    let h = levels[i].ln() - levels[i + 1].ln();
    let decay = if stochastic { (-h).exp() } else { 1.0 };
    let gain = -alpha_to * (if stochastic { -2.0 * h } else { -h }).exp_m1();
    let is_last = i + 2 == levels.len();
    let slope = match i.checked_sub(1).map(|last| levels[last].ln() - levels[i].ln()) {
        Some(h_before) if !is_last && h_before > 0.0 => 0.5 * gain * h / h_before,
        _ => 0.0,
    };
    let noise = if stochastic { sigma_to * (-(-2.0 * h).exp_m1()).sqrt() } else { 0.0 };
    Factors {
        denoised: (denoised.0 as f32, denoised.1 as f32),
        latents: (sigma_to / sigma * decay) as f32,
        now: (gain + slope) as f32,
        before: -slope as f32,
        noise: noise as f32,
    }
}

impl Sampler for Dpmpp2m {
    fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f32 {
        self.init_noise_sigma
    }

    fn scale_model_input(&self, latents: &[f32], _: usize, out: &mut [f32]) {
        out.copy_from_slice(latents);
    }

    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], rng: &mut Rng) {
        let factors = &self.factors[i];
        self.denoised.swap(0, 1);
        let [now, before] = &mut self.denoised;
        now.copy_from_slice(latents);
        combine(now, factors.denoised.0, model_output, factors.denoised.1);
        combine(latents, factors.latents, now, factors.now);
        if i > 0 {
            add(latents, before, factors.before);
        }
        if !self.noise.is_empty() {
            rng.randn(&mut self.noise);
            add(latents, &self.noise, factors.noise);
        }
    }
}
