//! The road from a prompt to pixels.
//!
//! A [`Pipeline`] is a model and a team. [`Pipeline::generate`] walks: tokens, text encoder, denoising loop (sampler and
//! network), decoder, pixels. The pieces are public too: they are what tests and tools look at.
#![forbid(unsafe_code)]

mod denoise;
mod text;
pub mod types;
mod vae;

use std::sync::OnceLock;
use std::time::Instant;

use kernels::Workers;

pub use denoise::Denoiser;
pub use text::{Conditioning, Prompt};
pub use types::{Control, Event, Latents, Memory, Noise, Part, Picture, Request, Settings, Timings, Warning};
pub use vae::Image;

use crate::card::Card;
use crate::error::{Error, Result};
use crate::format::ModelFile;
use crate::graph::{Network, Options, Plan};
use crate::memory;
use crate::rng::Rng;
use crate::sampler::{self, Run};
use crate::schedule::{Schedule, Spread};
use crate::text::Tokenizer;
use crate::weights;

/// A model, ready to make pictures.
#[derive(Debug)]
pub struct Pipeline {
    file: ModelFile,
    settings: Settings,
    workers: Workers,
    schedule: Schedule,
    tokenizer: OnceLock<Tokenizer>,
    opened: f64,
}

/// What a caller of [`Pipeline::generate`] does with an event.
pub type OnEvent<'a> = dyn FnMut(Event) -> Control + 'a;

impl Pipeline {
    /// A pipeline for the model in `file`.
    pub fn new(file: ModelFile, settings: Settings) -> Result<Pipeline> {
        let start = Instant::now();
        let workers = Workers::new(settings.threads);
        let schedule = Schedule::new(&file.card().schedule);
        let tokenizer = OnceLock::new();
        let opened = start.elapsed().as_secs_f64();
        Ok(Pipeline { file, settings, workers, schedule, tokenizer, opened })
    }

    /// The model's card.
    pub fn card(&self) -> &Card {
        self.file.card()
    }

    /// The model's file.
    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    /// How the machine is used.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// `network` lowered for the model's encodings and these settings.
    fn plan(&self, network: &Network) -> Result<Plan> {
        let encodings = weights::encodings(&self.file, network.weights())?;
        let Settings { precision, isa, threads, .. } = self.settings;
        Ok(Plan::new(network, &encodings, Options::new(precision, isa, threads)))
    }

    /// Makes a picture. `event` is told of each layer and step and can stop the run.
    pub fn generate(&self, request: &Request, event: &mut OnEvent<'_>) -> Result<Picture> {
        let start = Instant::now();
        request.validate(self.card())?;
        let mut timings = Timings { open_s: self.opened, ..Timings::default() };
        let mut memory = Memory { budget_bytes: self.settings.ram.unwrap_or(0), ..Memory::default() };

        let guided = request.guidance_scale != 1.0;
        let clock = Instant::now();
        let prompts = self.prompts(request, guided, event)?;
        let conditioning = self.encode(&prompts, &mut memory, event)?;
        tell(event, Event::Done(Part::Text))?;
        timings.text_s = clock.elapsed().as_secs_f64();

        let [c, h, w] = request.latents_shape(self.card());
        let mut rng = Rng::new(request.noise, request.seed);
        let mut latents = vec![0.0; c * h * w]; // [c, h, w]
        match &request.init_latents {
            Some(given) => latents.copy_from_slice(&given.data),
            None => rng.randn(&mut latents),
        }
        let entry = sampler::find(&request.sampler)?;
        let spread = Spread::find(&request.schedule)?;
        let run = Run { schedule: &self.schedule, steps: request.steps, spread, len: latents.len() };
        let mut sampler = (entry.new)(&run);
        let sigma = sampler.init_noise_sigma();
        latents.iter_mut().for_each(|x| *x *= sigma);

        let timesteps = sampler.timesteps().to_vec();
        let mut denoiser = Denoiser::new(self, h, w, conditioning, request, &mut memory)?;
        denoiser.run(event, |denoiser, event| {
            let mut input = vec![0.0; latents.len()];
            let mut noise = vec![0.0; latents.len()];
            for (i, &t) in timesteps.iter().enumerate() {
                let clock = Instant::now();
                sampler.scale_model_input(&latents, i, &mut input);
                denoiser.predict(&input, t, &mut noise, event)?;
                sampler.step(i, &noise, &mut latents, &mut rng);
                let seconds = clock.elapsed().as_secs_f64();
                timings.steps_s.push(seconds);
                tell(event, Event::Step { done: i + 1, of: timesteps.len(), seconds })?;
            }
            Ok(())
        })?;
        drop(denoiser);
        tell(event, Event::Done(Part::Denoiser))?;

        let clock = Instant::now();
        let latents = Latents { shape: [c, h, w], data: latents };
        let image = self.decode_with(&latents, &mut memory, event)?;
        tell(event, Event::Done(Part::Vae))?;
        timings.vae_s = clock.elapsed().as_secs_f64();
        timings.total_s = timings.open_s + start.elapsed().as_secs_f64();
        memory.measured_peak_bytes = memory::peak();
        let (width, height) = (image.width, image.height);
        Ok(Picture { width, height, rgb8: image.rgb8(), latents, timings, memory })
    }
}

/// Tells `event`, and stops where it says so.
fn tell(event: &mut OnEvent<'_>, what: Event) -> Result<()> {
    match event(what) {
        Control::Continue => Ok(()),
        Control::Stop => Err(Error::Stopped),
    }
}

/// The `after` of a session's pass: tells of layers.
fn layers<'e>(event: &'e mut OnEvent<'_>, part: Part, of: usize) -> impl FnMut(usize) -> bool + 'e {
    move |done| event(Event::Layer { part, done, of }) == Control::Continue
}
