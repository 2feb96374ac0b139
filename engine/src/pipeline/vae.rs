//! Latents to pixels.
#![forbid(unsafe_code)]

use super::denoise::to_pixels;
use super::{Latents, OnEvent, Pipeline};
use crate::budget::MemoryPlan;
use crate::error::{Error, Result};
use crate::models::{Part, bound_tiny_latents};
use crate::pipeline::types::Control;

/// What the decoder makes.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// `[height, width, 3]`, nominally -1 to 1.
    pub data: Vec<f32>,
}

impl Image {
    /// `[height, width, 3]` as bytes.
    pub fn rgb8(&self) -> Vec<u8> {
        let byte = |x: &f32| ((x / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
        self.data.iter().map(byte).collect()
    }
}

impl Pipeline {
    /// Decodes latents as the denoiser sees them.
    pub fn decode(&self, latents: &Latents) -> Result<Image> {
        let [_, h, w] = latents.shape;
        self.decode_with(&self.plan(h, w, 1, false)?, latents, &mut |_| Control::Continue)
    }

    pub(super) fn decode_with(
        &self,
        plan: &MemoryPlan,
        latents: &Latents,
        event: &mut OnEvent<'_>,
    ) -> Result<Image> {
        let cfg = &self.card().vae;
        let [c, h, w] = latents.shape;
        let mut scaled = latents.data.clone();
        cfg.unscale(&mut scaled);
        if cfg.tiny.is_some() {
            bound_tiny_latents(&mut scaled);
        }
        self.session(plan, Part::VaeDecoder, event, |session, watch| {
            to_pixels(&scaled, c, session.input("latents", 0));
            session.prologue(0, watch)?;
            let factor = cfg.factor();
            let mut data = session.output("image").to_vec();
            if cfg.tiny.is_some() {
                data.iter_mut().for_each(|x| *x = *x * 2.0 - 1.0);
            }
            Ok(Image { width: w * factor, height: h * factor, data })
        })
    }

    /// Mean and log variance of the latents of `image`, `[h / f * w / f, 2 * latent_channels]`, not scaled; of an
    /// AutoencoderTiny the latents alone, `[h / f * w / f, latent_channels]`.
    pub fn encode_image(&self, image: &Image) -> Result<Vec<f32>> {
        let cfg = &self.card().vae;
        if !cfg.has_encoder() {
            return Err(Error::NoEncoder);
        }
        let factor = cfg.factor();
        let plan = self.plan(image.height / factor, image.width / factor, 1, true)?;
        self.session(&plan, Part::VaeEncoder, &mut |_| Control::Continue, |session, watch| {
            let pixels = session.input("image", 0);
            pixels.copy_from_slice(&image.data);
            if cfg.tiny.is_some() {
                pixels.iter_mut().for_each(|x| *x = (*x + 1.0) / 2.0);
            }
            session.prologue(0, watch)?;
            Ok(session.output(if cfg.tiny.is_some() { "latents" } else { "moments" }).to_vec())
        })
    }
}
