//! Cards of published models beyond the families' first ones, and miniatures.
#![forbid(unsafe_code)]

use engine::card::{AdditionEmbed, Card, EdmConfig, Family, Prediction, SigmaSchedule, TimestepSpacing};
use engine::presets;

/// Names that [`card`] knows; `tiny-` before one gives its miniature.
pub const MODELS: [&str; 21] = [
    "sd15",
    "sd15-inpaint",
    "sd15-edit",
    "sd15-lcm",
    "bk-sdm-base",
    "bk-sdm-small",
    "bk-sdm-tiny",
    "sd2",
    "sd2-v",
    "sd2-inpaint",
    "sd2-edit",
    "sdxl",
    "sdxl-v",
    "sdxl-inpaint",
    "sdxl-edit",
    "sdxl-refiner",
    "cosxl",
    "cosxl-edit",
    "playground-2.5",
    "ssd-1b",
    "vega",
];

/// The card of a published model, or of its miniature: the same structure with few channels.
pub fn card(name: &str) -> Option<Card> {
    let (name, tiny) = name.strip_prefix("tiny-").map_or((name, false), |name| (name, true));
    if !MODELS.contains(&name) {
        return None;
    }
    let mut card = presets::card(match name {
        _ if name.starts_with("sd15") || name.starts_with("bk-sdm-") => Family::Sd15,
        _ if name.starts_with("sd2") => Family::Sd2,
        "sdxl-refiner" => Family::SdxlRefiner,
        _ => Family::Sdxl,
    });
    let unet = &mut card.unet;
    match name {
        _ if name.ends_with("-inpaint") => unet.in_channels = 9,
        _ if name.ends_with("-edit") => unet.in_channels = 8,
        "sd15-lcm" => {
            unet.time_cond_proj_dim = Some(256);
            card.defaults.sampler = "lcm".into();
            (card.defaults.steps, card.defaults.guidance_scale) = (4, 8.0);
        }
        // Kim et al. 2023: one residual block per level on the way down; then without the middle; then also without the
        // lowest level.
        "bk-sdm-base" | "bk-sdm-small" | "bk-sdm-tiny" => {
            unet.down_layers.iter_mut().for_each(|l| l.truncate(1));
            unet.up_layers.iter_mut().for_each(|l| l.truncate(2));
            if name != "bk-sdm-base" {
                unet.mid_layers = None;
            }
            if name == "bk-sdm-tiny" {
                unet.block_out_channels.truncate(3);
                unet.num_attention_heads.truncate(3);
                unet.down_layers.truncate(3);
                unet.up_layers.remove(0);
            }
        }
        // Gupta et al. 2024: fewer transformer layers, a lone residual block in the middle.
        "ssd-1b" => {
            unet.down_layers = vec![vec![0, 0], vec![2, 2], vec![4, 4]];
            unet.mid_layers = Some(0);
            unet.up_layers = vec![vec![4, 4, 10], vec![2, 1, 1], vec![0, 0, 0]];
        }
        "vega" => {
            unet.down_layers = vec![vec![0, 0], vec![1, 1], vec![2, 2]];
            unet.mid_layers = Some(0);
            unet.up_layers = vec![vec![2, 2, 2], vec![1, 1, 1], vec![0, 0, 0]];
        }
        _ => {}
    }
    match name {
        // NoobAI's and others' velocity models, with zero terminal SNR.
        "sdxl-v" => {
            card.schedule.prediction_type = Prediction::V;
            card.schedule.rescale_betas_zero_snr = true;
            card.schedule.timestep_spacing = TimestepSpacing::Trailing;
        }
        "cosxl" | "cosxl-edit" => {
            card.schedule.prediction_type = Prediction::V;
            let sigma_schedule = SigmaSchedule::Exponential;
            card.schedule.edm =
                Some(EdmConfig { sigma_min: 0.002, sigma_max: 120.0, sigma_data: 1.0, sigma_schedule });
        }
        "playground-2.5" => {
            let sigma_schedule = SigmaSchedule::Karras;
            card.schedule.edm =
                Some(EdmConfig { sigma_min: 0.002, sigma_max: 80.0, sigma_data: 0.5, sigma_schedule });
            card.vae.scaling_factor = 0.5;
            card.vae.latents_mean = vec![-1.6574, 1.886, -1.383, 2.5155];
            card.vae.latents_std = vec![8.4927, 5.9022, 6.5498, 5.2299];
            card.defaults.guidance_scale = 3.0;
        }
        _ => {}
    }
    if card.schedule.edm.is_some() {
        card.defaults.sampler = "dpmpp_2m".into();
    }
    if card.family == Family::Sd2 && name != "sd2-v" {
        card.schedule.prediction_type = Prediction::Epsilon;
        (card.defaults.width, card.defaults.height) = (512, 512);
    }
    if tiny {
        shrink(&mut card);
    }
    Some(card)
}

/// Few channels, few layers; head widths stay what the family's are.
fn shrink(card: &mut Card) {
    let unet = &mut card.unet;
    for (i, width) in unet.block_out_channels.iter_mut().enumerate() {
        *width = if i == 0 { 64 } else { 128 };
    }
    for (heads, width) in unet.num_attention_heads.iter_mut().zip(&unet.block_out_channels) {
        *heads = if unet.use_linear_projection { width / 64 } else { 8 };
    }
    for text in &mut card.text_encoders {
        text.hidden_size = 64;
        text.intermediate_size = 128;
        text.num_attention_heads = 1;
        text.num_hidden_layers = 3;
        text.projection_dim = text.projection_dim.map(|_| 64);
    }
    unet.cross_attention_dim = 64 * card.text_encoders.len();
    if let Some(embed) = &mut unet.addition_embed {
        let sizes = if card.family == Family::Sdxl { 6 } else { 5 };
        *embed = AdditionEmbed { time_embed_dim: 256, projection_input_dim: 64 + sizes * 256 };
    }
    card.vae.block_out_channels = vec![32, 32, 64, 64];
    card.vae.layers_per_block = 1;
    (card.defaults.width, card.defaults.height) = (card.defaults.width / 8, card.defaults.height / 8);
}
