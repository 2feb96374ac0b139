//! Latents to pixels.
#![forbid(unsafe_code)]

use super::denoise::to_pixels;
use super::{Latents, Memory, OnEvent, Part, Pipeline, layers};
use crate::error::{Error, Result};
use crate::graph::Session;
use crate::models::vae_decoder;
use crate::pipeline::types::Control;
use crate::weights;

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
        self.decode_with(latents, &mut Memory::default(), &mut |_| Control::Continue)
    }

    pub(super) fn decode_with(
        &self,
        latents: &Latents,
        memory: &mut Memory,
        event: &mut OnEvent<'_>,
    ) -> Result<Image> {
        let cfg = &self.card().vae;
        let [c, h, w] = latents.shape;
        let plan = self.plan(&vae_decoder(cfg, 1, h, w))?;
        let mut arena = self.arena(plan.arena_bytes(1), memory)?;
        let bytes = weights::bytes(&self.file, plan.weights());
        let mut session = Session::new(&plan, bytes, &mut arena, 1, &self.workers, self.settings.isa);
        let scaled: Vec<f32> =
            latents.data.iter().map(|x| x / cfg.scaling_factor + cfg.shift_factor).collect();
        to_pixels(&scaled, c, session.input("latents", 0));
        let of = plan.steps().0.len();
        session.prologue(0, layers(event, Part::Vae, of)).map_err(|_| Error::Stopped)?;
        let factor = cfg.factor();
        Ok(Image { width: w * factor, height: h * factor, data: session.output("image").to_vec() })
    }
}
