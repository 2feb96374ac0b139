//! One noise prediction after another.
#![forbid(unsafe_code)]

use super::{Conditioning, OnEvent, Pipeline, Request, Watching};
use crate::budget::MemoryPlan;
use crate::card::UnetConfig;
use crate::error::Result;
use crate::graph::Session;
use crate::models::{Part, TIMESTEPS};
use crate::weights::Stream;

/// The denoiser for pictures of one size and one prompt.
#[derive(Debug)]
pub struct Denoiser<'p> {
    pipeline: &'p Pipeline,
    plan: &'p MemoryPlan,
    /// The negative prompt's first, where there is guidance.
    conditioning: Vec<Conditioning>,
    /// One for each conditioning: what the size embedding is made of.
    sizes: Vec<Vec<f32>>,
    guidance_scale: f32,
}

/// The denoiser at work: what depends on the prompt alone is computed, and what depends on timesteps for some of them.
pub struct Predictor<'s, 'a, 'f> {
    session: &'s mut Session<'a>,
    stream: &'s Stream<'f>,
    unet: &'s UnetConfig,
    banks: usize,
    timesteps: &'s [f32],
    /// The first of the timesteps, [`TIMESTEPS`] at most, whose embeddings are made.
    embedded: Option<usize>,
    guidance_scale: f32,
    /// The last prediction for each conditioning, `[h * w, c]`.
    noises: Vec<Vec<f32>>,
}

impl<'p> Denoiser<'p> {
    /// In the memory of `plan`, with one conditioning, or two where there is guidance.
    pub fn new(
        pipeline: &'p Pipeline,
        plan: &'p MemoryPlan,
        conditioning: Vec<Conditioning>,
        request: &Request,
    ) -> Result<Self> {
        let sizes = conditioning.iter().map(|c| size_vector(&pipeline.card().unet, c, request)).collect();
        Ok(Denoiser { pipeline, plan, conditioning, sizes, guidance_scale: request.guidance_scale })
    }

    /// Prepares the prompt and calls `work` with a predictor for `timesteps`.
    pub fn run<T>(
        &mut self,
        timesteps: &[f32],
        event: &mut OnEvent<'_>,
        work: impl FnOnce(&mut Predictor<'_, '_, '_>, &mut OnEvent<'_>) -> Result<T>,
    ) -> Result<T> {
        let unet = &self.pipeline.card().unet;
        let banks = self.plan.part(Part::Unet).banks;
        let batch = self.conditioning.len() / banks;
        self.pipeline.session(self.plan, Part::Unet, event, |session, watch| {
            for bank in 0..banks {
                let here = bank * batch..(bank + 1) * batch;
                let context: Vec<&[f32]> =
                    self.conditioning[here.clone()].iter().map(|c| &c.context[..]).collect();
                fill(session.input("context", bank), &context);
                if unet.addition_embed.is_some() {
                    let sizes: Vec<&[f32]> = self.sizes[here].iter().map(|s| &s[..]).collect();
                    fill(session.input("size", bank), &sizes);
                }
                if let Some(dim) = unet.time_cond_proj_dim {
                    let row = guidance_embedding(self.guidance_scale, dim);
                    let rows = session.input("guidance", bank).chunks_exact_mut(dim);
                    rows.for_each(|r| r.copy_from_slice(&row));
                }
                session.prologue(bank, watch)?;
            }
            let Watching { stream, event, .. } = watch;
            let noises = vec![vec![]; self.conditioning.len()];
            let guidance_scale = self.guidance_scale;
            let embedded = None;
            work(
                &mut Predictor { session, stream, unet, banks, timesteps, embedded, guidance_scale, noises },
                *event,
            )
        })
    }
}

impl Predictor<'_, '_, '_> {
    /// The network's output at timestep number `i` for `latents` `[c, h, w]`, after guidance, into `out` `[c, h, w]`.
    ///
    /// # Panics
    /// Where there are not so many timesteps.
    pub fn predict(
        &mut self,
        latents: &[f32],
        i: usize,
        out: &mut [f32],
        event: &mut OnEvent<'_>,
    ) -> Result<()> {
        let c = self.unet.in_channels;
        let batch = self.noises.len() / self.banks;
        assert!(i < self.timesteps.len(), "timestep {i} of {}", self.timesteps.len());
        let first = self.embed(i, event)?;
        for bank in 0..self.banks {
            for image in self.session.input("latents", bank).chunks_exact_mut(latents.len()) {
                to_pixels(latents, c, image);
            }
            let mut watch =
                Watching { stream: self.stream, event, part: super::Part::Denoiser, ahead: false };
            self.session.pass(bank, i - first, &mut watch)?;
            let noise = self.session.output("noise"); // [batch, h * w, c]
            for (kept, noise) in
                self.noises[bank * batch..].iter_mut().zip(noise.chunks_exact(noise.len() / batch))
            {
                kept.clear();
                kept.extend_from_slice(noise);
            }
        }
        let c = self.unet.out_channels;
        let n = out.len() / c;
        match &self.noises[..] {
            [only] => from_pixels(only, c, out),
            [uncond, cond] => {
                let g = self.guidance_scale;
                for (i, (u, v)) in uncond.iter().zip(cond).enumerate() {
                    out[i % c * n + i / c] = u + g * (v - u);
                }
            }
            _ => unreachable!("one prompt or two"),
        }
        Ok(())
    }

    /// Sees to it that the embedding of timestep number `i` is made, and gives the number of the first that are.
    fn embed(&mut self, i: usize, event: &mut OnEvent<'_>) -> Result<usize> {
        let first = i / TIMESTEPS * TIMESTEPS;
        if self.embedded == Some(first) {
            return Ok(first);
        }
        let timesteps = &self.timesteps[first..];
        let dim = self.unet.block_out_channels[0];
        for bank in 0..self.banks {
            for image in self.session.input("time", bank).chunks_exact_mut(dim * TIMESTEPS) {
                image.fill(0.0);
                let rows = image.chunks_exact_mut(dim);
                rows.zip(timesteps).for_each(|(row, &timestep)| sinusoid(timestep, dim, row));
            }
            let mut watch = Watching { stream: self.stream, event, part: super::Part::Denoiser, ahead: true };
            self.session.schedule(bank, &mut watch)?;
        }
        self.embedded = Some(first);
        Ok(first)
    }

    /// The network's output of the last prediction before guidance, `[c, h, w]` for each conditioning.
    pub fn noises(&self) -> Vec<Vec<f32>> {
        let c = self.unet.out_channels;
        let planar = |pixels: &Vec<f32>| {
            let mut out = vec![0.0; pixels.len()];
            from_pixels(pixels, c, &mut out);
            out
        };
        self.noises.iter().map(planar).collect()
    }
}

fn fill(out: &mut [f32], parts: &[&[f32]]) {
    let len = out.len() / parts.len();
    for (row, part) in out.chunks_exact_mut(len).zip(parts) {
        row.copy_from_slice(part);
    }
}

/// `[c, n]` to `[n, c]`.
pub(super) fn to_pixels(planar: &[f32], c: usize, pixels: &mut [f32]) {
    let n = planar.len() / c;
    for (i, x) in pixels.iter_mut().enumerate() {
        *x = planar[i % c * n + i / c];
    }
}

/// `[n, c]` to `[c, n]`.
pub(super) fn from_pixels(pixels: &[f32], c: usize, planar: &mut [f32]) {
    let n = pixels.len() / c;
    for (i, x) in pixels.iter().enumerate() {
        planar[i % c * n + i / c] = *x;
    }
}

/// The sinusoidal embedding of `t` (Vaswani et al. 2017): `dim / 2` cosines, then as many sines. In f32 throughout, as
/// diffusers' `get_timestep_embedding` with `flip_sin_to_cos`.
fn sinusoid(t: f32, dim: usize, out: &mut [f32]) {
    let half = dim / 2;
    for i in 0..half {
        let x = t * (-(10000f32.ln()) * i as f32 / half as f32).exp();
        (out[i], out[half + i]) = (x.cos(), x.sin());
    }
}

/// The guidance embedding of latent consistency models: sines first, the last frequency is `1 / 10000`.
fn guidance_embedding(guidance_scale: f32, dim: usize) -> Vec<f32> {
    let half = dim / 2;
    let w = (guidance_scale - 1.0) * 1000.0;
    let mut out = vec![0.0; dim];
    for i in 0..half {
        let x = w * (-(10000f32.ln()) * i as f32 / (half - 1) as f32).exp();
        (out[i], out[half + i]) = (x.sin(), x.cos());
    }
    out
}

/// SDXL's conditioning vector: pooled text, then the embeddings of original height and width, crop top and left, and target
/// height and width; the refiner has an aesthetic score in place of the last two.
fn size_vector(cfg: &UnetConfig, conditioning: &Conditioning, request: &Request) -> Vec<f32> {
    let Some(embed) = cfg.addition_embed else { return vec![] };
    let mut out = conditioning.pooled.clone();
    let (h, w) = (request.height as f32, request.width as f32);
    let count = embed.projection_input_dim.saturating_sub(out.len()) / embed.time_embed_dim;
    let numbers = if count == 5 { vec![h, w, 0.0, 0.0, 6.0] } else { vec![h, w, 0.0, 0.0, h, w] };
    for x in numbers {
        let at = out.len();
        out.resize(at + embed.time_embed_dim, 0.0);
        sinusoid(x, embed.time_embed_dim, &mut out[at..]);
    }
    out.resize(embed.projection_input_dim, 0.0);
    out
}
