//! The card of a checkpoint: sizes from the shapes of its tensors, the rest from its `config.json` files or, where it has
//! none, from its family. So every layout of a model gives the same card.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use engine::card::{
    AdditionEmbed, Card, ClipActivation, ClipConfig, Family, Prediction, UnetConfig, VaeConfig,
};
use serde_json::Value;

use super::{Sources, View, Wishes, family_name, provenance, tiny_vae};
use crate::error::Error;
use crate::source::Configs;

/// Most of anything that is counted: more than any network has.
pub(super) const MANY: usize = 256;
/// Width of an attention head where no config says otherwise.
const HEAD: usize = 64;

/// Settings that are the same in every Stable Diffusion, as JSON; a config that mentions them must agree.
const UNET_MUST: [(&str, &[&str]); 20] = [
    ("act_fn", &["\"silu\"", "\"swish\""]),
    ("time_embedding_type", &["\"positional\""]),
    ("time_embedding_act_fn", &["null"]),
    ("timestep_post_act", &["null"]),
    ("class_embed_type", &["null"]),
    ("encoder_hid_dim", &["null"]),
    ("addition_embed_type", &["null", "\"text_time\""]),
    ("only_cross_attention", &["false"]),
    ("dual_cross_attention", &["false"]),
    ("cross_attention_norm", &["null"]),
    ("attention_type", &["\"default\""]),
    ("resnet_time_scale_shift", &["\"default\""]),
    ("resnet_skip_time_act", &["false"]),
    ("center_input_sample", &["false"]),
    ("flip_sin_to_cos", &["true"]),
    ("freq_shift", &["0"]),
    ("downsample_padding", &["1"]),
    ("norm_eps", &["1e-5"]),
    ("conv_in_kernel", &["3"]),
    ("conv_out_kernel", &["3"]),
];
const VAE_MUST: [(&str, &[&str]); 1] = [("act_fn", &["\"silu\"", "\"swish\""])];

/// Everything a card is concluded from.
pub(super) struct Evidence<'a> {
    pub(super) sources: &'a Sources,
    pub(super) tensors: &'a BTreeMap<String, View>,
    pub(super) configs: &'a Configs,
    pub(super) wishes: &'a Wishes<'a>,
}

impl Evidence<'_> {
    pub(super) fn card(&self, notes: &mut Vec<String>) -> Result<Card, Error> {
        let mut unet = self.unet()?;
        let family = self.family(&unet)?;
        unet.use_linear_projection = family != Family::Sd15;
        unet.num_attention_heads = self.heads(&unet)?;
        let text_encoders = self.text_encoders(family)?;
        let vae = self.vae(family)?;
        let schedule = self.schedule(family, &unet, notes)?;
        let defaults = self.defaults(family, &unet, &vae, &schedule);
        notes.push(format!(
            "{}, predicts {}",
            describe(family, &unet),
            match schedule.prediction_type {
                Prediction::Epsilon => "the noise",
                Prediction::V => "the velocity",
            }
        ));
        let provenance = provenance(self.wishes);
        Ok(Card { family, text_encoders, unet, vae, schedule, defaults, provenance })
    }

    pub(super) fn unsupported(&self, what: impl Into<String>) -> Error {
        Error::Unsupported { path: self.sources.model.path.clone(), what: what.into() }
    }

    pub(super) fn missing(&self, name: &str) -> Error {
        Error::Missing { path: self.sources.model.path.clone(), names: vec![name.to_owned()] }
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|view| self.sources.shape(view))
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Dimension `i` of a tensor that must be there.
    pub(super) fn dim(&self, name: &str, i: usize) -> Result<usize, Error> {
        let shape = self.shape(name).ok_or_else(|| self.missing(name))?;
        let tensor = || self.tensors[name].name.clone();
        shape.get(i).copied().ok_or_else(|| Error::Shape {
            tensor: tensor(),
            found: shape,
            expected: vec![0; i + 1],
        })
    }

    /// How many of `PREFIX.0.`, `PREFIX.1.`, ... have tensors.
    fn count(&self, prefix: &str) -> usize {
        let any = |start: String| {
            let next = self.tensors.range(start.clone()..).next();
            next.is_some_and(|(name, _)| name.starts_with(&start))
        };
        (0..MANY).take_while(|i| any(format!("{prefix}.{i}."))).count()
    }

    /// For each residual block of a UNet's block, how many transformer layers follow it.
    fn layers(&self, block: &str) -> Vec<usize> {
        let resnets = self.count(&format!("{block}.resnets"));
        (0..resnets).map(|j| self.depth(&format!("{block}.attentions.{j}"))).collect()
    }

    fn depth(&self, attention: &str) -> usize {
        self.count(&format!("{attention}.transformer_blocks"))
    }

    fn unet(&self) -> Result<UnetConfig, Error> {
        let config = self.configs.get("unet");
        self.demand("UNet", config, &UNET_MUST)?;
        let levels = self.count("unet.down_blocks");
        let widths: Result<Vec<usize>, Error> = (0..levels)
            .map(|i| self.dim(&format!("unet.down_blocks.{i}.resnets.0.conv1.weight"), 0))
            .collect();
        let context =
            self.tensors.keys().find(|n| n.starts_with("unet.") && n.ends_with(".attn2.to_k.weight"));
        let context = context.ok_or_else(|| self.unsupported("its UNet takes no text"))?;
        let mid = self.count("unet.mid_block.resnets") > 0;
        let embed_dim = number(config, "addition_time_embed_dim").unwrap_or(256);
        let addition = self.shape("unet.add_embedding.linear_1.weight");
        Ok(UnetConfig {
            in_channels: self.dim("unet.conv_in.weight", 1)?,
            out_channels: self.dim("unet.conv_out.weight", 0)?,
            block_out_channels: widths?,
            down_layers: (0..levels).map(|i| self.layers(&format!("unet.down_blocks.{i}"))).collect(),
            mid_layers: mid.then(|| self.depth("unet.mid_block.attentions.0")),
            up_layers: (0..levels).map(|i| self.layers(&format!("unet.up_blocks.{i}"))).collect(),
            num_attention_heads: Vec::new(),
            cross_attention_dim: self.dim(context, 1)?,
            norm_num_groups: number(config, "norm_num_groups").unwrap_or(32),
            use_linear_projection: false,
            addition_embed: addition.and_then(|shape| {
                let projection_input_dim = *shape.get(1)?;
                Some(AdditionEmbed { time_embed_dim: embed_dim, projection_input_dim })
            }),
            time_cond_proj_dim: match self.has("unet.time_embedding.cond_proj.weight") {
                true => Some(self.dim("unet.time_embedding.cond_proj.weight", 1)?),
                false => None,
            },
        })
    }

    fn family(&self, unet: &UnetConfig) -> Result<Family, Error> {
        let seen = if let Some(embed) = unet.addition_embed {
            // SDXL's vector is the pooled text and six sizes, the refiner's has five.
            let last = if self.has("text_encoder_2.text_projection.weight") {
                "text_encoder_2"
            } else {
                "text_encoder"
            };
            let pooled = self.dim(&format!("{last}.text_projection.weight"), 0)?;
            match embed
                .projection_input_dim
                .checked_sub(pooled)
                .map(|rest| rest as f64 / embed.time_embed_dim as f64)
            {
                Some(6.0) => Family::Sdxl,
                Some(5.0) => Family::SdxlRefiner,
                _ => {
                    let what = format!("a size embedding of {} numbers", embed.projection_input_dim);
                    return Err(self.unsupported(what));
                }
            }
        } else {
            match (unet.cross_attention_dim, flag(self.configs.get("unet"), "use_linear_projection")) {
                (768, _) => Family::Sd15,
                (1024, _) => Family::Sd2,
                (_, Some(linear)) => {
                    if linear {
                        Family::Sd2
                    } else {
                        Family::Sd15
                    }
                }
                (_, None) => {
                    let projection = self.tensors.keys().find(|n| n.ends_with("proj_in.weight"));
                    match projection.and_then(|name| self.shape(name)).map(|shape| shape.len()) {
                        Some(2) => Family::Sd2,
                        _ => Family::Sd15,
                    }
                }
            }
        };
        // These two differ in what no shape tells, where the sizes are unusual.
        let alike = |family: Family| matches!(family, Family::Sd15 | Family::Sd2);
        match self.wishes.family {
            Some(wish) if alike(wish) && alike(seen) => Ok(wish),
            Some(wish) if wish != seen => {
                let (is, wish) = (family_name(seen), family_name(wish));
                Err(self.unsupported(format!("it is a {is} model, not {wish}")))
            }
            _ => Ok(seen),
        }
    }

    /// Heads per level: SD 1 has eight everywhere, the others 64 channels in each.
    fn heads(&self, unet: &UnetConfig) -> Result<Vec<usize>, Error> {
        let config = self.configs.get("unet");
        let levels = unet.block_out_channels.len();
        // diffusers calls the number of heads `attention_head_dim` unless `num_attention_heads` is there.
        let said = ["num_attention_heads", "attention_head_dim"]
            .iter()
            .find_map(|key| config?.get(key).filter(|v| !v.is_null()));
        match said {
            Some(Value::Array(list)) => list
                .iter()
                .map(|v| v.as_u64().map(|n| n as usize))
                .collect::<Option<Vec<usize>>>()
                .filter(|heads| heads.len() == levels)
                .ok_or_else(|| self.unsupported("its number of attention heads can't be read")),
            Some(value) => match value.as_u64() {
                Some(heads) => Ok(vec![heads as usize; levels]),
                None => Err(self.unsupported("its number of attention heads can't be read")),
            },
            None if unet.use_linear_projection => {
                Ok(unet.block_out_channels.iter().map(|c| (c / HEAD).max(1)).collect())
            }
            None => Ok(vec![8; levels]),
        }
    }

    fn text_encoders(&self, family: Family) -> Result<Vec<ClipConfig>, Error> {
        let count = if family == Family::Sdxl { 2 } else { 1 };
        (0..count).map(|i| self.text_encoder(family, i)).collect()
    }

    fn text_encoder(&self, family: Family, index: usize) -> Result<ClipConfig, Error> {
        let part = ["text_encoder", "text_encoder_2"][index];
        // The refiner's only encoder lies in the second one's folder.
        let config =
            self.configs.get(part).or_else(|| self.configs.get("text_encoder_2").filter(|_| index == 0));
        let table = format!("{part}.text_model.embeddings.token_embedding.weight");
        let hidden_size = self.dim(&table, 1)?;
        let first = format!("{part}.text_model.encoder.layers.0.mlp.fc1.weight");
        let mut layers = self.count(&format!("{part}.text_model.encoder.layers"));
        let openai = family == Family::Sd15 || (family == Family::Sdxl && index == 0);
        let hidden_act = match config.and_then(|c| c.get("hidden_act")).and_then(Value::as_str) {
            Some("quick_gelu") => ClipActivation::QuickGelu,
            Some("gelu") => ClipActivation::Gelu,
            Some(other) => {
                return Err(self.unsupported(format!("its text encoder has the activation {other}")));
            }
            None if openai => ClipActivation::QuickGelu,
            None => ClipActivation::Gelu,
        };
        let xl = matches!(family, Family::Sdxl | Family::SdxlRefiner);
        let pooled = xl && index + 1 == if family == Family::Sdxl { 2 } else { 1 };
        let projection = format!("{part}.text_projection.weight");
        if family == Family::Sd2 && layers == 24 {
            // The last of OpenCLIP's layers is never run; files of diffusers don't have it.
            layers = 23;
        }
        let vocab_size = self.dim(&table, 0)?;
        // OpenCLIP fills the window with token 0, CLIP with the end of the text.
        let end = if vocab_size == 49408 { 49407 } else { vocab_size.saturating_sub(1) as u32 };
        let pad = self.sources.model.tokenizer.as_ref().and_then(|t| t.pad[index].as_deref());
        let pad_token_id = match pad {
            Some("!") => 0,
            Some("<|endoftext|>") => end,
            _ if openai => end,
            _ => 0,
        };
        Ok(ClipConfig {
            vocab_size,
            hidden_size,
            intermediate_size: self.dim(&first, 0)?,
            num_hidden_layers: layers,
            num_attention_heads: number(config, "num_attention_heads").unwrap_or((hidden_size / HEAD).max(1)),
            max_position_embeddings: self
                .dim(&format!("{part}.text_model.embeddings.position_embedding.weight"), 0)?,
            hidden_act,
            layer_norm_eps: config.and_then(|c| c.get("layer_norm_eps")?.as_f64()).unwrap_or(1e-5) as f32,
            bos_token_id: end.saturating_sub(1),
            eos_token_id: end,
            pad_token_id,
            output_layer: if xl { 2 } else { 1 },
            output_norm: !xl,
            projection_dim: if pooled { Some(self.dim(&projection, 0)?) } else { None },
        })
    }

    fn vae(&self, family: Family) -> Result<VaeConfig, Error> {
        let config = match &self.sources.vae {
            Some(vae) => vae.configs.get("vae"),
            None => self.configs.get("vae"),
        };
        if tiny_vae::is(self.tensors) {
            return self.tiny_vae(config);
        }
        self.demand("VAE", config, &VAE_MUST)?;
        let levels = self.count("vae.encoder.down_blocks");
        let widths: Result<Vec<usize>, Error> = (0..levels)
            .map(|i| self.dim(&format!("vae.encoder.down_blocks.{i}.resnets.0.conv1.weight"), 0))
            .collect();
        let holder = self.sources.vae.as_ref().unwrap_or(&self.sources.model);
        let scale = match holder.tensors.get("scale_factor") {
            Some(tensor) if tensor.count() == 1 && tensor.dtype.is_float() => {
                Some(f64::from(holder.read_all(tensor)?[0]))
            }
            _ => None,
        };
        let scale = config.and_then(|c| c.get("scaling_factor")?.as_f64()).or(scale);
        let statistics = |key: &str, marker: &str| -> Result<Vec<f32>, Error> {
            match config.and_then(|c| c.get(key)).filter(|list| !list.is_null()) {
                Some(list) => serde_json::from_value(list.clone())
                    .map_err(|_| self.unsupported(format!("its VAE has {key} {list}"))),
                None if self.configs.get("scheduler").is_some() => Ok(Vec::new()),
                None => Ok(self.marked(marker)?.unwrap_or_default()),
            }
        };
        let latents_mean = statistics("latents_mean", "edm_mean")?;
        let latents_std = statistics("latents_std", "edm_std")?;
        let usual = match family {
            // Playground 2.5
            Family::Sdxl if !latents_std.is_empty() => 0.5,
            Family::Sdxl | Family::SdxlRefiner => 0.13025,
            Family::Sd15 | Family::Sd2 => 0.18215,
        };
        let latents = "vae.decoder.conv_in.weight";
        Ok(VaeConfig {
            in_channels: self.dim("vae.encoder.conv_in.weight", 1)?,
            out_channels: self.dim("vae.decoder.conv_out.weight", 0)?,
            latent_channels: self.dim(latents, 1)?,
            block_out_channels: widths?,
            layers_per_block: self.count("vae.encoder.down_blocks.0.resnets"),
            norm_num_groups: number(config, "norm_num_groups").unwrap_or(32),
            scaling_factor: scale.unwrap_or(usual) as f32,
            shift_factor: config.and_then(|c| c.get("shift_factor")?.as_f64()).unwrap_or(0.0) as f32,
            latents_mean,
            latents_std,
            use_quant_conv: self.has("vae.post_quant_conv.weight"),
            mid_block_add_attention: self.has("vae.decoder.mid_block.attentions.0.to_q.weight"),
            tiny: None,
        })
    }

    /// Refuses what no Stable Diffusion has, so that no network is run with parts of it left out.
    pub(super) fn demand(
        &self,
        what: &str,
        config: Option<&Value>,
        must: &[(&str, &[&str])],
    ) -> Result<(), Error> {
        for (key, allowed) in must {
            if let Some(value) = config.and_then(|c| c.get(key))
                && !allowed.iter().any(|a| serde_json::from_str::<Value>(a).is_ok_and(|a| a == *value))
            {
                return Err(self.unsupported(format!("its {what} has {key} {value}")));
            }
        }
        Ok(())
    }
}

/// What people call it.
fn describe(family: Family, unet: &UnetConfig) -> String {
    let variant = match unet.in_channels.checked_sub(unet.out_channels) {
        Some(5) => ", inpainting",
        Some(4) => ", InstructPix2Pix",
        _ if unet.time_cond_proj_dim.is_some() => ", latent consistency",
        _ => "",
    };
    format!("{}{variant}", family_name(family))
}

pub(super) fn number(config: Option<&Value>, key: &str) -> Option<usize> {
    config?.get(key)?.as_u64().map(|n| n as usize)
}

pub(super) fn flag(config: Option<&Value>, key: &str) -> Option<bool> {
    config?.get(key)?.as_bool()
}
