//! One noise prediction after another.
#![forbid(unsafe_code)]

use super::{Conditioning, Memory, OnEvent, Part, Pipeline, Request, layers};
use crate::card::UnetConfig;
use crate::error::{Error, Result};
use crate::graph::{Arena, Plan, Session};
use crate::models::{UnetInput, unet};
use crate::weights;

/// The denoiser for pictures of one size and one prompt.
#[derive(Debug)]
pub struct Denoiser<'p> {
    pipeline: &'p Pipeline,
    plan: Plan,
    arena: Option<Arena>,
    /// The negative prompt's first, where there is guidance.
    conditioning: Vec<Conditioning>,
    /// One for each conditioning: what the size embedding is made of.
    sizes: Vec<Vec<f32>>,
    guidance_scale: f32,
    /// `[h * w, c]` per image, in and out.
    pixels: usize,
    channels: usize,
}

/// The denoiser at work: what depends on the prompt alone is computed.
#[derive(Debug)]
pub struct Predictor<'s, 'p> {
    session: Session<'s>,
    denoiser: &'s Denoiser<'p>,
    of: usize,
}

impl<'p> Denoiser<'p> {
    /// For latents of `h * w`, with one conditioning, or two where there is guidance.
    pub fn new(
        pipeline: &'p Pipeline,
        h: usize,
        w: usize,
        conditioning: Vec<Conditioning>,
        request: &Request,
        memory: &mut Memory,
    ) -> Result<Self> {
        let cfg = &pipeline.card().unet;
        let input = UnetInput { batch: conditioning.len(), h, w, tokens: conditioning[0].tokens };
        let plan = pipeline.plan(&unet(cfg, input))?;
        let arena = pipeline.arena(plan.arena_bytes(1), memory)?;
        memory.weights_resident_bytes = plan.weight_bytes() as u64;
        let sizes = conditioning.iter().map(|c| size_vector(cfg, c, request)).collect();
        Ok(Denoiser {
            pipeline,
            plan,
            arena: Some(arena),
            conditioning,
            sizes,
            guidance_scale: request.guidance_scale,
            pixels: h * w,
            channels: cfg.in_channels,
        })
    }

    /// Prepares the prompt and calls `work` with the predictor.
    pub fn run<T>(
        &mut self,
        event: &mut OnEvent<'_>,
        work: impl FnOnce(&mut Predictor<'_, 'p>, &mut OnEvent<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut arena = self.arena.take().expect("the arena comes back after each run");
        let bytes = weights::bytes(&self.pipeline.file, self.plan.weights());
        let (workers, isa) = (&self.pipeline.workers, self.pipeline.settings.isa);
        let cfg = &self.pipeline.card().unet;
        let mut session = Session::new(&self.plan, bytes, &mut arena, 1, workers, isa);
        let context: Vec<&[f32]> = self.conditioning.iter().map(|c| &c.context[..]).collect();
        fill(session.input("context", 0), &context);
        if cfg.addition_embed.is_some() {
            let sizes: Vec<&[f32]> = self.sizes.iter().map(|s| &s[..]).collect();
            fill(session.input("size", 0), &sizes);
        }
        if let Some(dim) = cfg.time_cond_proj_dim {
            let row = guidance_embedding(self.guidance_scale, dim);
            session.input("guidance", 0).chunks_exact_mut(dim).for_each(|r| r.copy_from_slice(&row));
        }
        let (once, each) = self.plan.steps();
        session.prologue(0, layers(event, Part::Denoiser, once.len())).map_err(|_| Error::Stopped)?;
        let of = each.len();
        let out = work(&mut Predictor { session, denoiser: self, of }, event);
        self.arena = Some(arena);
        out
    }
}

impl Predictor<'_, '_> {
    /// The network's output at `timestep` for `latents` `[c, h, w]`, after guidance, into `out` `[c, h, w]`.
    pub fn predict(
        &mut self,
        latents: &[f32],
        timestep: f32,
        out: &mut [f32],
        event: &mut OnEvent<'_>,
    ) -> Result<()> {
        let d = self.denoiser;
        let (n, c) = (d.pixels, d.channels);
        for image in self.session.input("latents", 0).chunks_exact_mut(n * c) {
            to_pixels(latents, c, image);
        }
        let dim = d.pipeline.card().unet.block_out_channels[0];
        self.session
            .input("time", 0)
            .chunks_exact_mut(dim)
            .for_each(|row| sinusoid(timestep, dim, 10000.0, true, row));
        self.session.pass(0, layers(event, Part::Denoiser, self.of)).map_err(|_| Error::Stopped)?;
        let noise = self.session.output("noise"); // [batch, h * w, c]
        let c = out.len() / n;
        match noise.chunks_exact(n * c).collect::<Vec<_>>()[..] {
            [only] => from_pixels(only, c, out),
            [uncond, cond] => {
                let g = d.guidance_scale;
                for (i, (u, v)) in uncond.iter().zip(cond).enumerate() {
                    out[i % c * n + i / c] = u + g * (v - u);
                }
            }
            _ => unreachable!("one pass or two"),
        }
        Ok(())
    }

    /// The network's output of the last prediction before guidance, `[c, h, w]` for each conditioning.
    pub fn noises(&self) -> Vec<Vec<f32>> {
        let noise = self.session.output("noise");
        let each = noise.len() / self.denoiser.conditioning.len();
        let c = each / self.denoiser.pixels;
        let planar = |x| {
            let mut out = vec![0.0; each];
            from_pixels(x, c, &mut out);
            out
        };
        noise.chunks_exact(each).map(planar).collect()
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

/// The sinusoidal embedding of `t` (Vaswani et al. 2017): `dim / 2` cosines and as many sines, cosines first where
/// `cos_first`. In f32 throughout, as diffusers' `get_timestep_embedding` with `flip_sin_to_cos`.
fn sinusoid(t: f32, dim: usize, period: f32, cos_first: bool, out: &mut [f32]) {
    let half = dim / 2;
    for i in 0..half {
        let x = t * (-period.ln() * i as f32 / half as f32).exp();
        let (a, b) = if cos_first { (x.cos(), x.sin()) } else { (x.sin(), x.cos()) };
        (out[i], out[half + i]) = (a, b);
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
        sinusoid(x, embed.time_embed_dim, 10000.0, true, &mut out[at..]);
    }
    out.resize(embed.projection_input_dim, 0.0);
    out
}
