//! Samplers: from a prediction of the network to less noisy latents.
//!
//! A sampler is one file and one line of [`SAMPLERS`]. It is made for one run and knows all its coefficients then.
#![forbid(unsafe_code)]

mod ddim;
mod dpmpp_2m;
mod euler;
mod euler_ancestral;
mod heun;
mod lcm;
mod sigma;

use crate::error::{Error, Result};
use crate::rng::Rng;
use crate::schedule::{Schedule, Spread};

/// One run of a sampler. The pipeline calls, for each `i` of `timesteps`, in order: `scale_model_input`, the network at
/// `timesteps()[i]`, `step`.
pub trait Sampler: Send {
    /// Timestep of each evaluation of the network, falling. A sampler of higher order has more evaluations than steps.
    fn timesteps(&self) -> &[f32];

    /// What noise of unit variance is multiplied by before the first step.
    fn init_noise_sigma(&self) -> f32;

    /// Writes what the network sees at evaluation `i` to `out`; all slices are `[len]`.
    fn scale_model_input(&self, latents: &[f32], i: usize, out: &mut [f32]);

    /// Takes the step of evaluation `i` in place: `model_output` is the prediction after guidance. Samplers that add noise
    /// draw it from `rng`, one tensor at a time.
    fn step(&mut self, i: usize, model_output: &[f32], latents: &mut [f32], rng: &mut Rng);
}

/// What a sampler is made from.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// The noise schedule of the model.
    pub schedule: &'a Schedule,
    /// Steps asked for.
    pub steps: usize,
    /// How noise levels are spread.
    pub spread: Spread,
    /// Numbers in the latents.
    pub len: usize,
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// What people type.
    pub name: &'static str,
    /// What the WebUI calls it.
    pub label: &'static str,
    /// Whether it walks over noise levels, which can be spread in other ways than the model's and be continuous; others walk
    /// over timesteps.
    pub takes_schedule: bool,
    /// Makes it for a run.
    pub new: fn(&Run<'_>) -> Box<dyn Sampler>,
}

/// Every sampler.
#[rustfmt::skip]
pub static SAMPLERS: &[Entry] = &[
    Entry { name: "ddim", label: "DDIM", takes_schedule: false, new: ddim::new },
    Entry { name: "euler", label: "Euler", takes_schedule: true, new: euler::new },
    Entry { name: "euler_a", label: "Euler a", takes_schedule: true, new: euler_ancestral::new },
    Entry { name: "heun", label: "Heun", takes_schedule: true, new: heun::new },
    Entry { name: "dpmpp_2m", label: "DPM++ 2M", takes_schedule: true, new: dpmpp_2m::new },
    Entry { name: "dpmpp_2m_sde", label: "DPM++ 2M SDE", takes_schedule: true, new: dpmpp_2m::new_sde },
    Entry { name: "lcm", label: "LCM", takes_schedule: false, new: lcm::new },
];

/// The names in the table.
pub fn names() -> Vec<&'static str> {
    SAMPLERS.iter().map(|entry| entry.name).collect()
}

/// The row called `name`.
pub fn find(name: &str) -> Result<&'static Entry> {
    let unknown = || Error::UnknownSampler { name: name.into(), known: names() };
    SAMPLERS.iter().find(|entry| entry.name == name).ok_or_else(unknown)
}

/// `latents = a * latents + b * other`.
fn combine(latents: &mut [f32], a: f32, other: &[f32], b: f32) {
    assert_eq!(latents.len(), other.len(), "latents and what is added to them");
    latents.iter_mut().zip(other).for_each(|(x, y)| *x = a * *x + b * y);
}

/// `latents += factor * other`.
fn add(latents: &mut [f32], other: &[f32], factor: f32) {
    combine(latents, 1.0, other, factor);
}

/// `out = latents * factor`.
fn scale(latents: &[f32], factor: f32, out: &mut [f32]) {
    assert_eq!(latents.len(), out.len(), "latents and scaled latents");
    out.iter_mut().zip(latents).for_each(|(y, x)| *y = x * factor);
}

#[cfg(test)]
mod tests;
