//! What goes into the pipeline and what comes out.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use kernels::Isa;
use serde::Serialize;

use crate::budget::MemoryPlan;
use crate::card::Card;
use crate::error::{Error, Result};
use crate::precision::Precision;
use crate::sampler;
use crate::schedule::Spread;

/// How the machine is used. None of it but the precision changes the picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Threads that compute.
    pub threads: usize,
    /// Instruction sets that may be used.
    pub isa: Isa,
    /// How activations are held.
    pub precision: Precision,
    /// Bytes that the process may hold in memory; `None` is what is free on the machine, less a margin.
    pub ram: Option<u64>,
    /// Folder for the embeddings of prompts; `None` keeps none.
    pub cache: Option<PathBuf>,
}

impl Default for Settings {
    /// All processors, the best instruction sets.
    fn default() -> Self {
        Settings {
            threads: Settings::default_threads(),
            isa: Isa::detect(),
            precision: Precision::default(),
            ram: None,
            cache: None,
        }
    }
}

impl Settings {
    /// As many threads as there are processors.
    pub fn default_threads() -> usize {
        std::thread::available_parallelism().map_or(1, |n| n.get())
    }
}

/// One picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What is to be seen; may be empty.
    pub prompt: String,
    /// What is not to be seen; may be empty. Unused where `guidance_scale` is 1.
    pub negative_prompt: String,
    /// Pixels, a multiple of [`VaeConfig::factor`](crate::card::VaeConfig::factor).
    pub width: usize,
    /// Pixels, as `width`.
    pub height: usize,
    /// Steps of the sampler.
    pub steps: usize,
    /// Classifier-free guidance: `uncond + scale (cond - uncond)`. 1 is none and needs one network pass a step, not two.
    pub guidance_scale: f32,
    /// Seed of the noise.
    pub seed: u64,
    /// Name in the table of samplers ([`sampler::names`]).
    pub sampler: String,
    /// How noise levels are spread: a name that [`Spread::find`] knows.
    pub schedule: String,
    /// Where the noise comes from.
    pub noise: Noise,
    /// Starting noise of unit variance in place of that of `seed`; the sampler multiplies it by its `init_noise_sigma`.
    pub init_latents: Option<Latents>,
}

/// Shortest side of a picture, in pixels.
pub const MIN_SIDE: usize = 16;
/// Longest side of a picture, in pixels.
pub const MAX_SIDE: usize = 8192;
/// Largest guidance scale.
pub const MAX_GUIDANCE: f32 = 100.0;

impl Request {
    /// A picture of `prompt` with the model's defaults.
    pub fn new(prompt: impl Into<String>, card: &Card) -> Self {
        let defaults = &card.defaults;
        Request {
            prompt: prompt.into(),
            negative_prompt: String::new(),
            width: defaults.width,
            height: defaults.height,
            steps: defaults.steps,
            guidance_scale: defaults.guidance_scale,
            seed: 0,
            sampler: defaults.sampler.clone(),
            schedule: Spread::default().name().into(),
            noise: Noise::default(),
            init_latents: None,
        }
    }

    /// Whether the model of `card` can make it.
    pub fn validate(&self, card: &Card) -> Result<()> {
        let (width, height) = (self.width, self.height);
        let multiple = card.vae.factor();
        for side in [width, height] {
            if !(MIN_SIDE..=MAX_SIDE).contains(&side) {
                return Err(Error::SizeOutOfRange { width, height, side, min: MIN_SIDE, max: MAX_SIDE });
            }
            if !side.is_multiple_of(multiple) {
                return Err(Error::SizeNotMultiple { width, height, side, multiple });
            }
        }
        let (found, latents) = (card.unet.in_channels, card.vae.latent_channels);
        if found != latents {
            return Err(Error::EditsPictures { found, latents });
        }
        let max = card.schedule.num_train_timesteps;
        if !(1..=max).contains(&self.steps) {
            return Err(Error::Steps { steps: self.steps, max });
        }
        if !(-MAX_GUIDANCE..=MAX_GUIDANCE).contains(&self.guidance_scale) {
            return Err(Error::GuidanceScale(self.guidance_scale));
        }
        let entry = sampler::find(&self.sampler)?;
        if Spread::find(&self.schedule)? != Spread::Model && !entry.takes_schedule {
            return Err(Error::OwnSchedule { sampler: entry.name });
        }
        if card.schedule.edm.is_some() && !entry.takes_schedule {
            return Err(Error::NoTimesteps { sampler: entry.name });
        }
        if let Some(latents) = &self.init_latents {
            let expected = self.latents_shape(card);
            let found = latents.shape;
            if found != expected || latents.data.len() != expected.iter().product::<usize>() {
                return Err(Error::LatentsShape { found, expected });
            }
            if !latents.data.iter().all(|x| x.is_finite()) {
                return Err(Error::LatentsNotFinite);
            }
        }
        Ok(())
    }

    /// `[channels, height, width]` of its latents.
    pub fn latents_shape(&self, card: &Card) -> [usize; 3] {
        let factor = card.vae.factor();
        [card.vae.latent_channels, self.height / factor, self.width / factor]
    }
}

/// Where noise comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Noise {
    /// `torch.randn` on a CPU: diffusers, ComfyUI, the WebUI with RNG "CPU".
    #[default]
    Torch,
    /// CUDA's Philox: the WebUI with RNG "GPU" or "NV".
    Philox,
}

/// Latents as the denoiser sees them (the VAE's, times its scaling factor).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Latents {
    /// `[channels, height, width]`
    pub shape: [usize; 3],
    /// Row-major.
    pub data: Vec<f32>,
}

/// The networks, in the order in which a run needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// The text encoders.
    Text,
    /// The denoiser.
    Denoiser,
    /// The decoder.
    Vae,
}

/// What the pipeline tells while it runs.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Something to know that doesn't keep the picture from being made.
    Warning(Warning),
    /// A layer of a pass through a network is done: the moment at which the pipeline can stop.
    Layer {
        /// The network.
        part: Part,
        /// Whether it is of what the denoiser computes ahead of its passes, from the prompt or from timesteps.
        ahead: bool,
        /// Layers of this pass that are done, from 1.
        done: usize,
        /// Layers of a pass.
        of: usize,
    },
    /// A network has done all its work of this picture, except for the denoiser, which tells its steps.
    Done(Part),
    /// A sampler step is done.
    Step {
        /// Steps that are done, from 1.
        done: usize,
        /// All of them.
        of: usize,
        /// How long it took.
        seconds: f64,
    },
}

/// Something to know that doesn't keep the picture from being made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// Tokens beyond the window of the text encoder have no effect.
    #[error("the {which} is too long by {dropped} tokens: they have no effect")]
    PromptTruncated {
        /// `prompt` or `negative prompt`.
        which: &'static str,
        /// Tokens that were cut off.
        dropped: usize,
    },
    /// The negative prompt is unused without guidance.
    #[error("the negative prompt has no effect with a guidance scale of 1")]
    NegativeWithoutGuidance,
}

/// What the caller wants after an [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Give up: `generate` returns [`Error::Stopped`].
    Stop,
}

/// A finished picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Picture {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `[height, width, 3]`
    pub rgb8: Vec<u8>,
    /// What the decoder made it from.
    pub latents: Latents,
    /// How long it took.
    pub timings: Timings,
    /// What it took.
    pub memory: Memory,
}

/// Wall-clock seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Opening the model and making the plan.
    pub open_s: f64,
    /// Text encoders.
    pub text_s: f64,
    /// Each sampler step.
    pub steps_s: Vec<f64>,
    /// The decoder.
    pub vae_s: f64,
    /// Everything, opening included.
    pub total_s: f64,
}

/// Bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// What the process was allowed to hold.
    pub budget_bytes: u64,
    /// What the plan said it would hold at most.
    pub predicted_peak_bytes: u64,
    /// What it did hold at most; not known on every system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub measured_peak_bytes: Option<u64>,
    /// Activations and scratch of the largest part.
    pub arena_bytes: u64,
    /// Weights that stay: of all networks, or of the one with the most where they take turns.
    pub weights_resident_bytes: u64,
    /// Weights that are read again for every pass.
    pub weights_streamed_bytes: u64,
}

impl Memory {
    /// What `plan` says, and what the process has held at most so far.
    pub fn new(plan: &MemoryPlan) -> Self {
        Memory {
            budget_bytes: plan.budget,
            predicted_peak_bytes: plan.predicted_peak,
            measured_peak_bytes: crate::memory::peak(),
            arena_bytes: plan.parts.iter().map(|p| p.arena_bytes()).max().unwrap_or(0),
            weights_resident_bytes: match plan.keeps {
                true => plan.parts.iter().map(|p| p.resident_bytes).sum(),
                false => plan.parts.iter().map(|p| p.resident_bytes).max().unwrap_or(0),
            },
            weights_streamed_bytes: plan.parts.iter().map(|p| p.streamed_bytes).sum(),
        }
    }
}
