//! The card of a model: everything about it but its weights. It is stored in the `.sdq` file as JSON, and the networks
//! are built from it; no model code assumes a size.
//!
//! Field names are those of diffusers' and transformers' `config.json` where they mean the same.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

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

/// An AutoencoderKL.
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
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    /// Groups of the group norms.
    pub norm_num_groups: usize,
    /// Latents that the denoiser sees are the encoder's times this, after the shift is taken off.
    pub scaling_factor: f32,
    /// See `scaling_factor`.
    pub shift_factor: f32,
    /// Whether there are 1 x 1 convolutions around the latents.
    pub use_quant_conv: bool,
    /// Whether the middle has attention.
    pub mid_block_add_attention: bool,
}

impl VaeConfig {
    /// Pixels per latent, each way.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
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
