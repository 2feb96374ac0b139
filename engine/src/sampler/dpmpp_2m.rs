//! DPM-Solver++(2M) and its stochastic form (Lu et al. 2022), as diffusers' `DPMSolverMultistepScheduler` with the midpoint
//! rule and a last step of first order to no noise.
//!
//! States are `alpha` times the picture plus `sigma` times noise. They are of unit variance, so that the network sees them
//! as they are; with EDM's noise levels `alpha` is 1, as in diffusers' `EDMDPMSolverMultistepScheduler`. With named
//! schedules noise is scaled as the WebUI does it.

use super::sigma::Preconditioning;
use super::{Run, Sampler, add, combine, scale};
use crate::rng::Rng;
use crate::schedule::Spread;

/// Factors of a step, all known before the run.
struct Factors {
    /// Of the latents: what the network sees.
    input: f32,
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
    let preconditioning = Preconditioning::new(schedule);
    let levels = schedule.levels(steps, run.spread);
    let (timesteps, sigmas, init_noise_sigma) = if preconditioning.is_edm() {
        (levels.timesteps, levels.sigmas, levels.init_noise_sigma)
    } else if run.spread == Spread::Model {
        let timesteps = schedule.timesteps_before_last(steps);
        let mut sigmas: Vec<f64> = timesteps.iter().map(|&t| schedule.sigma(t)).collect();
        sigmas.push(0.0);
        (timesteps.iter().map(|&t| t as f32).collect(), sigmas, 1.0)
    } else {
        let (_, sigma) = split(levels.sigmas[0], &preconditioning);
        (levels.timesteps, levels.sigmas, sigma)
    };
    let factors = (0..steps).map(|i| factors(&sigmas, i, &preconditioning, stochastic));
    Dpmpp2m {
        factors: factors.collect(),
        init_noise_sigma: init_noise_sigma as f32,
        timesteps,
        denoised: [vec![0.0; run.len], vec![0.0; run.len]],
        noise: vec![0.0; if stochastic { run.len } else { 0 }],
    }
}

/// `alpha` and `sigma` of the state at a noise level, which is their ratio.
fn split(level: f64, preconditioning: &Preconditioning) -> (f64, f64) {
    let alpha = if preconditioning.is_edm() { 1.0 } else { preconditioning.input(level) };
    (alpha, level * alpha)
}

fn factors(levels: &[f64], i: usize, preconditioning: &Preconditioning, stochastic: bool) -> Factors {
    let [(alpha, sigma), (alpha_to, sigma_to)] = [i, i + 1].map(|i| split(levels[i], preconditioning));
    let (skip, out) = preconditioning.denoised(levels[i]);
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
        input: (preconditioning.input(levels[i]) / alpha) as f32,
        denoised: ((skip / alpha) as f32, out as f32),
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

    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]) {
        scale(latents, self.factors[i].input, out);
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
