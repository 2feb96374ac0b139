//! The networks, each described once.
#![forbid(unsafe_code)]

mod clip;
mod tiny_vae;
mod unet;
mod vae;

pub use clip::clip;
pub use tiny_vae::bound as bound_tiny_latents;
pub use unet::{UnetInput, unet, unet_block};
pub use vae::{vae_decoder, vae_encoder};

use crate::card::{Card, VaeConfig};
use crate::graph::Network;
use crate::graph::weight::WeightSpec;

/// A network that holds memory on its own: no two of them do at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Text encoder 0 or 1.
    TextEncoder(usize),
    /// The denoiser.
    Unet,
    /// Latents to pixels.
    VaeDecoder,
    /// Pixels to latents.
    VaeEncoder,
}

impl Part {
    /// The name in reports and in the file.
    pub fn name(self) -> &'static str {
        match self {
            Part::TextEncoder(0) => "text_encoder",
            Part::TextEncoder(_) => "text_encoder_2",
            Part::Unet => "unet",
            Part::VaeDecoder => "vae_decoder",
            Part::VaeEncoder => "vae_encoder",
        }
    }
}

/// Timesteps whose embeddings a run makes at a time: their weights, a sixteenth of SD 1.5's, are then met once for so many steps.
pub const TIMESTEPS: usize = 16;

/// Every network of a model, at a small size: what weights there are doesn't depend on it. They are in the order in which a run
/// needs them, the encoder (which only some runs need) last.
pub fn networks(card: &Card) -> Vec<(Part, Network)> {
    let encoders = card.text_encoders.iter().enumerate();
    let mut parts: Vec<_> =
        encoders.map(|(i, c)| (Part::TextEncoder(i), clip(i, c, 1, c.output_layer))).collect();
    parts.push((
        Part::Unet,
        unet(&card.unet, UnetInput { batch: 1, h: 8, w: 8, tokens: 77, timesteps: TIMESTEPS }),
    ));
    parts.extend(vae_networks(&card.vae));
    parts
}

/// As [`networks`], of a VAE alone.
pub fn vae_networks(vae: &VaeConfig) -> Vec<(Part, Network)> {
    let mut parts = vec![(Part::VaeDecoder, vae_decoder(vae, 1, 8, 8))];
    if vae.has_encoder() {
        let side = 8 * vae.factor();
        parts.push((Part::VaeEncoder, vae_encoder(vae, 1, side, side)));
    }
    parts
}

/// Every weight of a model, by part, in execution order: what a checkpoint must supply and how the file is laid out.
pub fn weights(card: &Card) -> Vec<(Part, Vec<WeightSpec>)> {
    networks(card).into_iter().map(|(part, network)| (part, network.weights().to_vec())).collect()
}
