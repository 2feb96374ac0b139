//! Latents to pixels.
#![forbid(unsafe_code)]

use super::denoise::to_pixels;
use super::{Latents, OnEvent, Pipeline};
use crate::budget::MemoryPlan;
use crate::error::Result;
use crate::models::Part;
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
        self.session(plan, Part::VaeDecoder, event, |session, watch| {
            to_pixels(&scaled, c, session.input("latents", 0));
            session.prologue(0, watch)?;
            let factor = cfg.factor();
            Ok(Image { width: w * factor, height: h * factor, data: session.output("image").to_vec() })
        })
    }

    /// Mean and log variance of the latents of `image`, `[h / f * w / f, 2 * latent_channels]`, not scaled.
    pub fn encode_image(&self, image: &Image) -> Result<Vec<f32>> {
        let factor = self.card().vae.factor();
        let plan = self.plan(image.height / factor, image.width / factor, 1, true)?;
        self.session(&plan, Part::VaeEncoder, &mut |_| Control::Continue, |session, watch| {
            session.input("image", 0).copy_from_slice(&image.data);
            session.prologue(0, watch)?;
            Ok(session.output("moments").to_vec())
        })
    }
}
