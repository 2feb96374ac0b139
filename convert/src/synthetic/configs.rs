//! The `config.json` files of a diffusers folder.
#![forbid(unsafe_code)]

use engine::card::{
    BetaSchedule, Card, ClipActivation, ClipConfig, Family, Prediction, SigmaSchedule, TimestepSpacing,
    UnetConfig, VaeConfig,
};
use serde_json::{Value, json};

/// Paths inside the folder, and what stands there.
pub(super) fn all(card: &Card) -> Vec<(&'static str, Value)> {
    let latents = card.defaults.width / card.vae.factor();
    let mut files = vec![
        ("model_index.json", model_index(card)),
        ("unet/config.json", unet(&card.unet, latents)),
        ("vae/config.json", vae(&card.vae, card.defaults.width)),
        ("scheduler/scheduler_config.json", scheduler(card)),
        ("text_encoder/config.json", clip(&card.text_encoders[0])),
        ("tokenizer/tokenizer_config.json", tokenizer(&card.text_encoders[0])),
    ];
    if let Some(second) = card.text_encoders.get(1) {
        files.push(("text_encoder_2/config.json", clip(second)));
        files.push(("tokenizer_2/tokenizer_config.json", tokenizer(second)));
    }
    files
}

fn model_index(card: &Card) -> Value {
    let class = match card.family {
        Family::Sd15 | Family::Sd2 => "StableDiffusionPipeline",
        Family::Sdxl => "StableDiffusionXLPipeline",
        Family::SdxlRefiner => "StableDiffusionXLImg2ImgPipeline",
    };
    json!({ "_class_name": class, "_diffusers_version": "0.21.0" })
}

fn unet(cfg: &UnetConfig, sample_size: usize) -> Value {
    let types = |layers: &[Vec<usize>], attention: &str, plain: &str| -> Vec<String> {
        layers.iter().map(|l| if l.iter().any(|&d| d > 0) { attention } else { plain }.to_owned()).collect()
    };
    // A level without attention has any number but the lowest, whose number the middle takes.
    let mid_depth = cfg.mid_layers.unwrap_or(1).max(1);
    let depth = |layers: &Vec<usize>| match layers.as_slice() {
        [0, ..] => json!(mid_depth),
        [first, rest @ ..] if rest.iter().all(|d| d == first) => json!(first),
        layers => json!(layers),
    };
    let up_mirrors_down = cfg.down_layers.iter().rev().zip(&cfg.up_layers).all(|(d, u)| depth(d) == depth(u));
    let down_depth: Vec<Value> = cfg.down_layers.iter().map(depth).collect();
    let up_depth: Vec<Value> = cfg.up_layers.iter().map(depth).collect();
    let mid = match cfg.mid_layers {
        None => Value::Null,
        Some(0) => "UNetMidBlock2D".into(),
        Some(_) => "UNetMidBlock2DCrossAttn".into(),
    };
    json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "sample_size": sample_size,
        "block_out_channels": cfg.block_out_channels,
        "layers_per_block": cfg.down_layers.iter().map(Vec::len).collect::<Vec<_>>(),
        "down_block_types": types(&cfg.down_layers, "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": types(&cfg.up_layers, "CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": mid,
        "transformer_layers_per_block": down_depth,
        "reverse_transformer_layers_per_block": if up_mirrors_down { Value::Null } else { up_depth.into() },
        "attention_head_dim": cfg.num_attention_heads,
        "cross_attention_dim": cfg.cross_attention_dim,
        "norm_num_groups": cfg.norm_num_groups,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": true,
        "freq_shift": 0,
        "use_linear_projection": cfg.use_linear_projection,
        "addition_embed_type": cfg.addition_embed.map(|_| "text_time"),
        "addition_time_embed_dim": cfg.addition_embed.map(|a| a.time_embed_dim),
        "projection_class_embeddings_input_dim": cfg.addition_embed.map(|a| a.projection_input_dim),
        "time_cond_proj_dim": cfg.time_cond_proj_dim,
    })
}

fn vae(cfg: &VaeConfig, sample_size: usize) -> Value {
    let levels = cfg.block_out_channels.len();
    json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": cfg.in_channels,
        "out_channels": cfg.out_channels,
        "latent_channels": cfg.latent_channels,
        "block_out_channels": cfg.block_out_channels,
        "layers_per_block": cfg.layers_per_block,
        "down_block_types": vec!["DownEncoderBlock2D"; levels],
        "up_block_types": vec!["UpDecoderBlock2D"; levels],
        "norm_num_groups": cfg.norm_num_groups,
        "sample_size": sample_size,
        "scaling_factor": json_f32(cfg.scaling_factor),
        "shift_factor": (cfg.shift_factor != 0.0).then(|| json_f32(cfg.shift_factor)),
        "latents_mean": list(&cfg.latents_mean),
        "latents_std": list(&cfg.latents_std),
        "use_quant_conv": cfg.use_quant_conv,
        "use_post_quant_conv": cfg.use_quant_conv,
        "mid_block_add_attention": cfg.mid_block_add_attention,
    })
}

/// Numbers for each channel, where there are any.
fn list(values: &[f32]) -> Value {
    if values.is_empty() { Value::Null } else { values.iter().copied().map(json_f32).collect() }
}

/// The number as people write it: 0.18215, not the f64 nearest to the f32.
fn json_f32(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

fn clip(cfg: &ClipConfig) -> Value {
    let pooled = cfg.projection_dim.is_some();
    json!({
        "architectures": [if pooled { "CLIPTextModelWithProjection" } else { "CLIPTextModel" }],
        "model_type": "clip_text_model",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "max_position_embeddings": cfg.max_position_embeddings,
        "hidden_act": match cfg.hidden_act {
            ClipActivation::QuickGelu => "quick_gelu",
            ClipActivation::Gelu => "gelu",
        },
        "layer_norm_eps": 1e-5,
        "projection_dim": cfg.projection_dim.unwrap_or(cfg.hidden_size),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    })
}

fn tokenizer(cfg: &ClipConfig) -> Value {
    json!({
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": if cfg.pad_token_id == cfg.eos_token_id { "<|endoftext|>" } else { "!" },
        "model_max_length": cfg.max_position_embeddings,
        "do_lower_case": true,
    })
}

fn scheduler(card: &Card) -> Value {
    let s = &card.schedule;
    let prediction = match s.prediction_type {
        Prediction::Epsilon => "epsilon",
        Prediction::V => "v_prediction",
    };
    if let Some(edm) = s.edm {
        return json!({
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "num_train_timesteps": s.num_train_timesteps,
            "prediction_type": prediction,
            "sigma_min": edm.sigma_min,
            "sigma_max": edm.sigma_max,
            "sigma_data": edm.sigma_data,
            "sigma_schedule": match edm.sigma_schedule {
                SigmaSchedule::Karras => "karras",
                SigmaSchedule::Exponential => "exponential",
            },
            "rho": 7.0,
            "final_sigmas_type": "zero",
        });
    }
    json!({
        "_class_name": if card.defaults.sampler == "lcm" { "LCMScheduler" } else { "EulerDiscreteScheduler" },
        "num_train_timesteps": s.num_train_timesteps,
        "beta_start": s.beta_start,
        "beta_end": s.beta_end,
        "beta_schedule": match s.beta_schedule {
            BetaSchedule::Linear => "linear",
            BetaSchedule::ScaledLinear => "scaled_linear",
        },
        "prediction_type": prediction,
        "timestep_spacing": match s.timestep_spacing {
            TimestepSpacing::Linspace => "linspace",
            TimestepSpacing::Leading => "leading",
            TimestepSpacing::Trailing => "trailing",
        },
        "steps_offset": s.steps_offset,
        "set_alpha_to_one": s.set_alpha_to_one,
        "rescale_betas_zero_snr": s.rescale_betas_zero_snr,
    })
}
