//! The road from a prompt to pixels.
//!
//! A [`Pipeline`] is a model and a team. [`Pipeline::generate`] walks: tokens, text encoder, denoising loop (sampler and
//! network), decoder, pixels. The pieces are public too: they are what tests and tools look at.
#![forbid(unsafe_code)]

mod denoise;
mod text;
pub mod types;
mod vae;

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kernels::Workers;

pub use denoise::Denoiser;
pub use text::{Conditioning, Prompt};
pub use types::{Control, Event, Latents, Memory, Noise, Part, Picture, Request, Settings, Timings, Warning};
pub use vae::Image;

use crate::budget::{self, MemoryPlan};
use crate::card::Card;
use crate::error::{Error, Result};
use crate::format::{ModelFile, VaeFile, WeightFile};
use crate::graph::weight::WeightSpec;
use crate::graph::{Arena, Observer, Profile, Session, Watch};
use crate::rng::Rng;
use crate::sampler::{self, Run};
use crate::schedule::{Schedule, Spread};
use crate::text::Tokenizer;
use crate::weights::{self, Stream};
use crate::{memory, models};

/// A model, ready to make pictures.
#[derive(Debug)]
pub struct Pipeline {
    file: ModelFile,
    /// Whose VAE stands in for the model's.
    vae: Option<VaeFile>,
    /// The model's, with the VAE that is used.
    card: Card,
    settings: Settings,
    workers: Workers,
    schedule: Schedule,
    tokenizer: Mutex<Option<Arc<Tokenizer>>>,
    opened: f64,
    observer: Option<Observer>,
    profile: Option<Profile>,
}

/// What a caller of [`Pipeline::generate`] does with an event.
pub type OnEvent<'a> = dyn FnMut(Event) -> Control + 'a;

impl Pipeline {
    /// A pipeline for the model in `file`.
    pub fn new(file: ModelFile, settings: Settings) -> Result<Pipeline> {
        let start = Instant::now();
        let workers = Workers::new(settings.threads);
        let schedule = Schedule::new(&file.card().schedule);
        let tokenizer = Mutex::new(None);
        let opened = start.elapsed().as_secs_f64();
        let card = file.card().clone();
        let (vae, profile, observer) = (None, None, None);
        Ok(Pipeline { file, vae, card, settings, workers, schedule, tokenizer, opened, profile, observer })
    }

    /// The same with another VAE in place of the model's.
    pub fn with_vae(self, vae: VaeFile) -> Result<Pipeline> {
        let card = self.card.with_vae(&vae.card().vae)?;
        Ok(Pipeline { vae: Some(vae), card, ..self })
    }

    /// Shows `observer` the operands of all matrix products.
    pub fn observed(self, observer: Observer) -> Pipeline {
        Pipeline { observer: Some(observer), ..self }
    }

    /// The same, with a note of each operation of the networks.
    pub fn profiled(self) -> Pipeline {
        Pipeline { profile: Some(Profile::default()), ..self }
    }

    /// What the networks have done, in a [`Pipeline::profiled`] one.
    pub fn profile(&self) -> Option<&Profile> {
        self.profile.as_ref()
    }

    /// The model's card, with the VAE that is used.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// The model's file.
    pub fn file(&self) -> &ModelFile {
        &self.file
    }

    /// How the machine is used.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// What a run over latents of `h * w` will hold, with `prompts` prompts (2 with guidance).
    pub fn plan(&self, h: usize, w: usize, prompts: usize, encodes: bool) -> Result<MemoryPlan> {
        let stored =
            |wanted: &[WeightSpec]| weights::stored(holder(&self.file, self.vae.as_ref(), wanted), wanted);
        let run = budget::Run { h, w, prompts, encodes };
        budget::plan(self.card(), &stored, &self.settings, run, budget::budget(&self.settings))
    }

    /// Makes a picture. `event` is told of each layer and step and can stop the run.
    pub fn generate(&self, request: &Request, event: &mut OnEvent<'_>) -> Result<Picture> {
        let start = Instant::now();
        request.validate(self.card())?;
        let mut timings = Timings { open_s: self.opened, ..Timings::default() };
        let guided = request.guidance_scale != 1.0;
        let [c, h, w] = request.latents_shape(self.card());
        let plan = self.plan(h, w, 1 + usize::from(guided), false)?;

        let clock = Instant::now();
        let conditioning = self.conditioning(&plan, request, guided, event)?;
        tell(event, Event::Done(Part::Text))?;
        timings.text_s = clock.elapsed().as_secs_f64();

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
        Denoiser::new(self, &plan, conditioning, request)?.run(&timesteps, event, |predictor, event| {
            let mut input = vec![0.0; latents.len()];
            let mut noise = vec![0.0; latents.len()];
            for i in 0..timesteps.len() {
                let clock = Instant::now();
                sampler.scale_model_input(&latents, i, &mut input);
                predictor.predict(&input, i, &mut noise, event)?;
                sampler.step(i, &noise, &mut latents, &mut rng);
                let seconds = clock.elapsed().as_secs_f64();
                timings.steps_s.push(seconds);
                tell(event, Event::Step { done: i + 1, of: timesteps.len(), seconds })?;
            }
            Ok(())
        })?;
        tell(event, Event::Done(Part::Denoiser))?;

        let clock = Instant::now();
        let latents = Latents { shape: [c, h, w], data: latents };
        let image = self.decode_with(&plan, &latents, event)?;
        tell(event, Event::Done(Part::Vae))?;
        timings.vae_s = clock.elapsed().as_secs_f64();
        timings.total_s = timings.open_s + start.elapsed().as_secs_f64();
        let (width, height) = (image.width, image.height);
        Ok(Picture { width, height, rgb8: image.rgb8(), latents, timings, memory: Memory::new(&plan) })
    }

    /// Runs `work` in a session of `part`, and lets go of its memory as the plan says.
    fn session<T>(
        &self,
        plan: &MemoryPlan,
        part: models::Part,
        event: &mut OnEvent<'_>,
        work: impl FnOnce(&mut Session<'_>, &mut Watching<'_, '_, '_>) -> Result<T>,
    ) -> Result<T> {
        let part = plan.part(part);
        let bytes = part.plan.arena_bytes(part.banks);
        let mut arena = Arena::new(bytes).map_err(|_| Error::NoMemory { bytes })?;
        let file = holder(&self.file, self.vae.as_ref(), part.plan.weights());
        let weights = weights::bytes(file, part.plan.weights());
        let (workers, isa) = (&self.workers, self.settings.isa);
        let mut session = Session::new(&part.plan, weights, &mut arena, part.banks, workers, isa)
            .profiled(self.profile.as_ref())
            .observed(self.observer.as_ref());
        let stream = Stream::new(file, part, workers);
        let kind = match part.part {
            models::Part::TextEncoder(_) => Part::Text,
            models::Part::Unet => Part::Denoiser,
            models::Part::VaeDecoder | models::Part::VaeEncoder => Part::Vae,
        };
        let out = work(
            &mut session,
            &mut Watching { stream: &stream, event, part: kind, ahead: kind == Part::Denoiser },
        );
        if !plan.keeps {
            stream.release();
            memory::trim();
        }
        out
    }
}

/// Which of the files holds the network with the weights `wanted`: a VAE of its own, or the model.
fn holder<'f>(model: &'f ModelFile, vae: Option<&'f VaeFile>, wanted: &[WeightSpec]) -> &'f WeightFile {
    match vae {
        Some(vae) if wanted.first().is_some_and(WeightSpec::is_of_vae) => vae,
        _ => model,
    }
}

/// What goes on around a session's steps: weights come and go, the caller is told of layers.
struct Watching<'a, 'f, 'e> {
    stream: &'a Stream<'f>,
    event: &'a mut OnEvent<'e>,
    part: Part,
    /// See [`Event::Layer`].
    ahead: bool,
}

impl Watch<Error> for Watching<'_, '_, '_> {
    fn before(&mut self, i: usize, among: Range<usize>) {
        self.stream.before(i, among);
    }

    fn after(&mut self, i: usize, among: Range<usize>) -> Result<()> {
        self.stream.after(i)?;
        let (done, of) = (i + 1 - among.start, among.len());
        tell(self.event, Event::Layer { part: self.part, ahead: self.ahead, done, of })
    }
}

/// Tells `event`, and stops where it says so.
fn tell(event: &mut OnEvent<'_>, what: Event) -> Result<()> {
    match event(what) {
        Control::Continue => Ok(()),
        Control::Stop => Err(Error::Stopped),
    }
}
