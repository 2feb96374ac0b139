//! The card of a model: everything about it but its weights. It is stored in the `.sdq` file as JSON, and the networks
//! are built from it; no model code assumes a size.
//!
//! Field names are those of diffusers' and transformers' `config.json` where they mean the same.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// What a checkpoint is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Which relatives it belongs to.
    pub family: Family,
    /// Text encoders in the order in which their outputs are joined: one for SD 1 and 2, two for SDXL.
    pub text_encoders: Vec<ClipConfig>,
    /// The denoiser.
    pub unet: UnetConfig,
    /// Pixels to latents and back.
    pub vae: VaeConfig,
    /// The noise schedule it was trained on.
    pub schedule: ScheduleConfig,
    /// What `gen` does when nothing else is said.
    pub defaults: Defaults,
    /// Which program wrote the file.
    pub provenance: Provenance,
}

/// Relatives that share an architecture and its defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Stable Diffusion 1.x.
    Sd15,
    /// Stable Diffusion 2.x.
    Sd2,
    /// Stable Diffusion XL.
    Sdxl,
    /// The SDXL refiner.
    SdxlRefiner,
}

/// A CLIP text model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClipConfig {
    /// Rows of the token table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Layers that are in the file.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_attention_heads: usize,
    /// Tokens in a window.
    pub max_position_embeddings: usize,
    /// Activation of the MLP.
    pub hidden_act: ClipActivation,
    /// Epsilon of the layer norms.
    pub layer_norm_eps: f32,
    /// First token of a window.
    pub bos_token_id: u32,
    /// Token that ends the text.
    pub eos_token_id: u32,
    /// Token that fills the window behind the end.
    pub pad_token_id: u32,
    /// Which hidden state conditions the denoiser: 1 is the last layer's, 2 the one before.
    pub output_layer: usize,
    /// Whether the final layer norm is applied to that hidden state.
    pub output_norm: bool,
    /// Width of the pooled embedding, where the denoiser wants one.
    pub projection_dim: Option<usize>,
}

/// Activation of a CLIP MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`: OpenAI's CLIP.
    QuickGelu,
    /// The exact GELU: OpenCLIP.
    Gelu,
}

/// A UNet2DConditionModel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnetConfig {
    /// Channels of the input: 4, or 9 (inpainting), or 8 (image editing).
    pub in_channels: usize,
    /// Channels of the prediction.
    pub out_channels: usize,
    /// Channels of each level.
    pub block_out_channels: Vec<usize>,
    /// For each level of the way down, for each residual block, how many transformer layers follow it (0: no attention).
    pub down_layers: Vec<Vec<usize>>,
    /// Transformer layers in the middle; `Some(0)` is a lone residual block, `None` no middle at all.
    pub mid_layers: Option<usize>,
    /// As `down_layers` for the way up, from the lowest level.
    pub up_layers: Vec<Vec<usize>>,
    /// Attention heads at each level.
    pub num_attention_heads: Vec<usize>,
    /// Width of the text embeddings.
    pub cross_attention_dim: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Whether a transformer's `proj_in` and `proj_out` are linear layers (SD 2, SDXL) or 1 x 1 convolutions (SD 1):
    /// the arithmetic is the same, the tensors' ranks differ.
    pub use_linear_projection: bool,
    /// Size and conditioning embedding (SDXL).
    pub addition_embed: Option<AdditionEmbed>,
    /// Width of the guidance embedding (latent consistency models).
    pub time_cond_proj_dim: Option<usize>,
}

/// SDXL's `text_time` embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdditionEmbed {
    /// Width of the embedding of one size number.
    pub time_embed_dim: usize,
    /// Width of the whole vector: pooled text and the size numbers.
    pub projection_input_dim: usize,
}

/// An AutoencoderKL; or, where there is `tiny`, an AutoencoderTiny, which has neither norms nor attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VaeConfig {
    /// Channels of the picture.
    pub in_channels: usize,
    /// Channels of the picture.
    pub out_channels: usize,
    /// Channels of the latents.
    pub latent_channels: usize,
    /// Channels of each level, highest resolution first.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more. 0 of an AutoencoderTiny.
    pub layers_per_block: usize,
    /// Groups of the group norms; 0 of an AutoencoderTiny.
    pub norm_num_groups: usize,
    /// Latents that the denoiser sees are the encoder's times this, after the shift is taken off.
    pub scaling_factor: f32,
    /// See `scaling_factor`.
    pub shift_factor: f32,
    /// Mean and deviation of each channel of the encoder's latents, where the denoiser sees them normalized before they are
    /// scaled (Playground 2.5); else empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latents_mean: Vec<f32>,
    /// See `latents_mean`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latents_std: Vec<f32>,
    /// Whether there are 1 x 1 convolutions around the latents.
    pub use_quant_conv: bool,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
    /// What an AutoencoderTiny is made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiny: Option<TinyBlocks>,
}

/// The residual blocks of an AutoencoderTiny (TAESD).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TinyBlocks {
    /// Blocks at each level, highest resolution first; empty where there is no encoder.
    pub num_encoder_blocks: Vec<usize>,
    /// Blocks at each level, lowest resolution first.
    pub num_decoder_blocks: Vec<usize>,
}

/// The card of a file that holds a VAE alone, to be used beside a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VaeCard {
    /// The VAE.
    pub vae: VaeConfig,
    /// Which program wrote the file.
    pub provenance: Provenance,
}

impl VaeCard {
    /// Whether the networks it describes can be built; if not, what is wrong.
    pub fn check(&self) -> Result<(), String> {
        self.vae.check()?;
        self.provenance.check()
    }
}

impl VaeConfig {
    /// Pixels per latent, each way.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Whether pictures can be encoded, too.
    pub fn has_encoder(&self) -> bool {
        self.tiny.as_ref().is_none_or(|tiny| !tiny.num_encoder_blocks.is_empty())
    }

    /// From the denoiser's latents to the encoder's, in place: `[latent_channels, n]`.
    pub fn unscale(&self, latents: &mut [f32]) {
        let n = latents.len() / self.latent_channels;
        for (channel, plane) in latents.chunks_exact_mut(n).enumerate() {
            let mean = self.latents_mean.get(channel).copied().unwrap_or(0.0);
            let std = self.latents_std.get(channel).copied().unwrap_or(1.0);
            plane.iter_mut().for_each(|x| *x = *x / self.scaling_factor * std + (self.shift_factor + mean));
        }
    }
}

/// The noise schedule of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduleConfig {
    /// Usually 1000.
    pub num_train_timesteps: usize,
    /// First beta.
    pub beta_start: f64,
    /// Last beta.
    pub beta_end: f64,
    /// How the betas between lie.
    pub beta_schedule: BetaSchedule,
    /// What the network predicts.
    pub prediction_type: Prediction,
    /// Whether the betas are rescaled to zero terminal signal-to-noise ratio.
    pub rescale_betas_zero_snr: bool,
    /// Which timesteps a run visits.
    pub timestep_spacing: TimestepSpacing,
    /// Added to `leading` timesteps.
    pub steps_offset: usize,
    /// Whether DDIM's last step goes to alpha 1 or to that of timestep 0.
    pub set_alpha_to_one: bool,
    /// Continuous noise levels in place of timesteps and betas, which then count for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edm: Option<EdmConfig>,
}

/// Noise levels and preconditioning of Karras et al. 2022 ("EDM"): CosXL, Playground 2.5. What is called the noise
/// prediction is their `F` there, the velocity is its negative.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EdmConfig {
    /// Least noise level.
    pub sigma_min: f64,
    /// Largest noise level.
    pub sigma_max: f64,
    /// Deviation of the data.
    pub sigma_data: f64,
    /// How the levels of a run are spread when nothing else is said.
    pub sigma_schedule: SigmaSchedule,
}

/// diffusers' `sigma_schedule`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SigmaSchedule {
    /// Evenly in the seventh root.
    Karras,
    /// Evenly in the logarithm.
    Exponential,
}

/// How betas lie between their ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly.
    Linear,
    /// Their square roots evenly: Stable Diffusion.
    ScaledLinear,
}

/// What a network predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prediction {
    /// The noise.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// The velocity.
    #[serde(rename = "v")]
    V,
}

/// diffusers' `timestep_spacing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimestepSpacing {
    /// Evenly from the first to the last.
    Linspace,
    /// Multiples of a whole number, from 0.
    Leading,
    /// From the last, in even steps.
    Trailing,
}

/// What `gen` does when nothing else is said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Defaults {
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// Sampler steps.
    pub steps: usize,
    /// Classifier-free guidance; 1 is none.
    pub guidance_scale: f32,
    /// Name in the sampler table.
    pub sampler: String,
}

/// Where a file comes from. It holds nothing that depends on the layout of the checkpoint, so that all layouts of one
/// model give the same bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Program and version that wrote the file.
    pub converter: String,
    /// `--quant` it was written with.
    pub quant: String,
}

/// What a card may say at most, so that a hostile one can ask for nothing absurd.
mod limit {
    pub(super) const CHANNELS: usize = 1 << 16;
    pub(super) const LEVELS: usize = 8;
    pub(super) const BLOCKS: usize = 16;
    pub(super) const LAYERS: usize = 128;
    pub(super) const VOCABULARY: usize = 1 << 20;
    pub(super) const TOKENS: usize = 4096;
    pub(super) const PIXELS: usize = 1 << 14;
    pub(super) const STEPS: usize = 10_000;
    pub(super) const TEXT: usize = 256;
}

impl Card {
    /// The same model with another VAE.
    pub fn with_vae(&self, vae: &VaeConfig) -> Result<Card, Error> {
        let card = Card { vae: vae.clone(), ..self.clone() };
        card.check().map_err(|what| Error::VaeMisfit { what })?;
        Ok(card)
    }

    /// Whether the networks it describes can be built; if not, what is wrong.
    pub fn check(&self) -> Result<(), String> {
        inside("text encoders", self.text_encoders.len(), 1, 2)?;
        self.text_encoders.iter().try_for_each(ClipConfig::check)?;
        self.unet.check()?;
        self.vae.check()?;
        self.schedule.check()?;
        let width: usize = self.text_encoders.iter().map(|t| t.hidden_size).sum();
        if width != self.unet.cross_attention_dim {
            let wanted = self.unet.cross_attention_dim;
            return Err(format!("the text encoders are {width} wide, the UNet wants {wanted}"));
        }
        if self.unet.out_channels != self.vae.latent_channels
            || self.unet.in_channels < self.unet.out_channels
        {
            return Err(format!(
                "a UNet from {} to {} channels and a VAE of {}",
                self.unet.in_channels, self.unet.out_channels, self.vae.latent_channels
            ));
        }
        let Defaults { width, height, steps, guidance_scale, sampler } = &self.defaults;
        for pixels in [*width, *height] {
            inside("pixels", pixels, self.vae.factor(), limit::PIXELS)?;
            divides("pixels", pixels, self.vae.factor())?;
        }
        inside("steps", *steps, 1, limit::STEPS)?;
        finite("guidance_scale", f64::from(*guidance_scale))?;
        inside("characters of a name", sampler.len(), 0, limit::TEXT)?;
        self.provenance.check()
    }
}

impl Provenance {
    fn check(&self) -> Result<(), String> {
        let texts = [&self.converter, &self.quant];
        texts.into_iter().try_for_each(|text| inside("characters of a name", text.len(), 0, limit::TEXT))
    }
}

impl ClipConfig {
    fn check(&self) -> Result<(), String> {
        inside("vocab_size", self.vocab_size, 1, limit::VOCABULARY)?;
        inside("hidden_size", self.hidden_size, 1, limit::CHANNELS)?;
        inside("intermediate_size", self.intermediate_size, 1, limit::CHANNELS)?;
        inside("num_hidden_layers", self.num_hidden_layers, 1, limit::LAYERS)?;
        inside("num_attention_heads", self.num_attention_heads, 1, self.hidden_size)?;
        divides("hidden_size", self.hidden_size, self.num_attention_heads)?;
        inside("max_position_embeddings", self.max_position_embeddings, 2, limit::TOKENS)?;
        inside("output_layer", self.output_layer, 1, self.num_hidden_layers)?;
        inside("projection_dim", self.projection_dim.unwrap_or(1), 1, limit::CHANNELS)?;
        for token in [self.bos_token_id, self.eos_token_id, self.pad_token_id] {
            inside("a token", token as usize, 0, self.vocab_size - 1)?;
        }
        positive("layer_norm_eps", f64::from(self.layer_norm_eps))
    }
}

impl UnetConfig {
    fn check(&self) -> Result<(), String> {
        let levels = self.block_out_channels.len();
        inside("levels of the UNet", levels, 1, limit::LEVELS)?;
        inside("in_channels", self.in_channels, 1, limit::CHANNELS)?;
        inside("out_channels", self.out_channels, 1, limit::CHANNELS)?;
        inside("cross_attention_dim", self.cross_attention_dim, 1, limit::CHANNELS)?;
        channels(&self.block_out_channels, self.norm_num_groups)?;
        for len in [self.down_layers.len(), self.up_layers.len(), self.num_attention_heads.len()] {
            inside("levels of a list", len, levels, levels)?;
        }
        for (level, down) in self.down_layers.iter().enumerate() {
            let up = &self.up_layers[levels - 1 - level];
            inside("residual blocks", down.len(), 1, limit::BLOCKS)?;
            inside("residual blocks on the way up", up.len(), down.len() + 1, down.len() + 1)?;
            for &layers in down.iter().chain(up) {
                inside("transformer layers", layers, 0, limit::LAYERS)?;
            }
        }
        inside("transformer layers", self.mid_layers.unwrap_or(0), 0, limit::LAYERS)?;
        for (&width, &heads) in self.block_out_channels.iter().zip(&self.num_attention_heads) {
            inside("num_attention_heads", heads, 1, width)?;
            divides("channels", width, heads)?;
        }
        if let Some(embed) = self.addition_embed {
            inside("addition time_embed_dim", embed.time_embed_dim, 2, limit::CHANNELS)?;
            divides("addition time_embed_dim", embed.time_embed_dim, 2)?;
            inside(
                "projection_input_dim",
                embed.projection_input_dim,
                embed.time_embed_dim,
                limit::CHANNELS,
            )?;
        }
        divides("channels of the first level", self.block_out_channels[0], 2)?;
        let guidance = self.time_cond_proj_dim.unwrap_or(2);
        inside("time_cond_proj_dim", guidance, 2, limit::CHANNELS)?;
        divides("time_cond_proj_dim", guidance, 2)
    }
}

impl VaeConfig {
    fn check(&self) -> Result<(), String> {
        inside("levels of the VAE", self.block_out_channels.len(), 1, limit::LEVELS)?;
        inside("in_channels", self.in_channels, 1, limit::CHANNELS)?;
        inside("out_channels", self.out_channels, 1, limit::CHANNELS)?;
        inside("latent_channels", self.latent_channels, 1, limit::CHANNELS / 2)?;
        match &self.tiny {
            Some(tiny) => tiny.check(&self.block_out_channels)?,
            None => {
                inside("layers_per_block", self.layers_per_block, 1, limit::BLOCKS)?;
                channels(&self.block_out_channels, self.norm_num_groups)?;
            }
        }
        positive("scaling_factor", f64::from(self.scaling_factor))?;
        for list in [&self.latents_mean, &self.latents_std] {
            if !list.is_empty() {
                inside(
                    "numbers for the latents' channels",
                    list.len(),
                    self.latent_channels,
                    self.latent_channels,
                )?;
            }
        }
        self.latents_mean.iter().try_for_each(|&mean| finite("latents_mean", f64::from(mean)))?;
        self.latents_std.iter().try_for_each(|&std| positive("latents_std", f64::from(std)))?;
        finite("shift_factor", f64::from(self.shift_factor))
    }
}

impl TinyBlocks {
    fn check(&self, widths: &[usize]) -> Result<(), String> {
        let (first, levels) = (widths[0], widths.len());
        inside("channels", first, 1, limit::CHANNELS)?;
        widths.iter().try_for_each(|&width| inside("channels of another level", width, first, first))?;
        inside("levels of the decoder", self.num_decoder_blocks.len(), levels, levels)?;
        if !self.num_encoder_blocks.is_empty() {
            inside("levels of the encoder", self.num_encoder_blocks.len(), levels, levels)?;
        }
        let blocks = self.num_decoder_blocks.iter().chain(&self.num_encoder_blocks);
        blocks.into_iter().try_for_each(|&blocks| inside("residual blocks", blocks, 0, limit::BLOCKS))
    }
}

impl ScheduleConfig {
    fn check(&self) -> Result<(), String> {
        inside("num_train_timesteps", self.num_train_timesteps, 1, limit::STEPS)?;
        inside("steps_offset", self.steps_offset, 0, self.num_train_timesteps)?;
        if let Some(EdmConfig { sigma_min, sigma_max, sigma_data, .. }) = self.edm {
            positive("sigma_min", sigma_min)?;
            positive("sigma_data", sigma_data)?;
            finite("sigma_max", sigma_max)?;
            if sigma_min >= sigma_max {
                return Err(format!("noise levels from {sigma_min} to {sigma_max}"));
            }
        }
        positive("beta_start", self.beta_start)?;
        if self.beta_start <= self.beta_end && self.beta_end < 1.0 {
            return Ok(());
        }
        Err(format!("betas from {} to {}", self.beta_start, self.beta_end))
    }
}

fn channels(widths: &[usize], groups: usize) -> Result<(), String> {
    widths.iter().try_for_each(|&width| {
        inside("channels", width, 1, limit::CHANNELS)?;
        inside("norm_num_groups", groups, 1, width)?;
        divides("channels", width, groups)
    })
}

fn inside(what: &str, value: usize, min: usize, max: usize) -> Result<(), String> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(format!("{what}: {value}, which should be {min} to {max}"))
}

fn divides(what: &str, value: usize, by: usize) -> Result<(), String> {
    if value.is_multiple_of(by) { Ok(()) } else { Err(format!("{what}: {value} isn't a multiple of {by}")) }
}

fn finite(what: &str, value: f64) -> Result<(), String> {
    if value.is_finite() { Ok(()) } else { Err(format!("{what}: {value}")) }
}

fn positive(what: &str, value: f64) -> Result<(), String> {
    if value > 0.0 && value.is_finite() {
        Ok(())
    } else {
        Err(format!("{what}: {value}, which should be above 0"))
    }
}
