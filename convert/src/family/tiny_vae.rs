//! TAESD (diffusers' `AutoencoderTiny`): halves that are flat lists of layers, told apart by the tensors that they have.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use engine::card::{TinyBlocks, VaeConfig};
use serde_json::Value;

use super::config::{Evidence, MANY};
use super::names::{Named, View, canonical_vae};
use crate::error::Error;
use crate::source::Source;

/// Settings of every TAESD, as JSON; a config that mentions them must agree.
const MUST: [(&str, &[&str]); 4] = [
    ("_class_name", &["\"AutoencoderTiny\""]),
    ("act_fn", &["\"relu\""]),
    ("upsample_fn", &["\"nearest\""]),
    ("upsampling_scaling_factor", &["2"]),
];

/// Whether these tensors, under canonical names, are those of a TAESD.
pub(super) fn is(tensors: &BTreeMap<String, View>) -> bool {
    ["decoder", "encoder"].iter().any(|half| tensors.contains_key(&format!("vae.{half}.layers.0.weight")))
}

/// The tensors of a checkpoint that is a TAESD and nothing else.
pub(super) fn alone(source: &Source, named: &Named) -> Option<BTreeMap<String, View>> {
    let tensors = canonical_vae(source);
    (is(&tensors) && named.tensors.keys().all(|name| name.starts_with("vae."))).then_some(tensors)
}

impl Evidence<'_> {
    pub(super) fn tiny_vae(&self, config: Option<&Value>) -> Result<VaeConfig, Error> {
        self.demand("VAE", config, &MUST)?;
        // The decoder's second layer is the rectifier, and an upsampling stands before each change of resolution.
        let (num_decoder_blocks, last) = self.blocks("vae.decoder.layers", 2, 1)?;
        let num_encoder_blocks = match self.has("vae.encoder.layers.0.weight") {
            true => self.blocks("vae.encoder.layers", 1, 0)?.0,
            false => Vec::new(),
        };
        let levels = num_decoder_blocks.len();
        let first = "vae.decoder.layers.0.weight";
        let out_channels = self.dim(&format!("vae.decoder.layers.{last}.weight"), 0)?;
        let setting =
            |key: &str, usual: f64| config.and_then(|c| c.get(key)?.as_f64()).unwrap_or(usual) as f32;
        Ok(VaeConfig {
            in_channels: match num_encoder_blocks.is_empty() {
                true => out_channels,
                false => self.dim("vae.encoder.layers.0.weight", 1)?,
            },
            out_channels,
            latent_channels: self.dim(first, 1)?,
            block_out_channels: vec![self.dim(first, 0)?; levels],
            layers_per_block: 0,
            norm_num_groups: 0,
            scaling_factor: setting("scaling_factor", 1.0),
            shift_factor: setting("shift_factor", 0.0),
            latents_mean: Vec::new(),
            latents_std: Vec::new(),
            use_quant_conv: false,
            mid_block_add_attention: false,
            tiny: Some(TinyBlocks { num_encoder_blocks, num_decoder_blocks }),
        })
    }

    /// Residual blocks between changes of resolution, each of which is a convolution `gap` layers behind the last block, in the
    /// list that begins with layer `at`; and the number of the last layer, which alone of these convolutions has a bias.
    fn blocks(&self, half: &str, mut at: usize, gap: usize) -> Result<(Vec<usize>, usize), Error> {
        let has = |at: usize, rest: &str| self.has(&format!("{half}.{at}.{rest}"));
        let mut levels = Vec::new();
        while at < MANY {
            let first = at;
            while has(at, "conv.0.weight") {
                at += 1;
            }
            levels.push(at - first);
            if has(at, "bias") {
                return Ok((levels, at));
            }
            if !has(at + gap, "weight") {
                break;
            }
            at += gap + 1;
        }
        Err(self.missing(&format!("{half}.{at}.weight")))
    }
}
