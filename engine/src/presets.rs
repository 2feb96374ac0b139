//! The cards of the families as published: what can be planned and measured before a checkpoint is there.
#![forbid(unsafe_code)]

use crate::card::{
    AdditionEmbed, BetaSchedule, Card, ClipActivation, ClipConfig, Defaults, Family, Prediction, Provenance,
    ScheduleConfig, TimestepSpacing, UnetConfig, VaeConfig,
};

/// The card of `family`'s first model: SD 1.5, SD 2.1, SDXL 1.0 base, SDXL 1.0 refiner.
pub fn card(family: Family) -> Card {
    let (text_encoders, unet) = match family {
        Family::Sd15 => (vec![clip_l(1, true)], unet(&[320, 640, 1280, 1280], &[1, 1, 1, 0], &[8; 4], 768)),
        Family::Sd2 => (vec![clip_h()], unet(&[320, 640, 1280, 1280], &[1, 1, 1, 0], &[5, 10, 20, 20], 1024)),
        Family::Sdxl => {
            (vec![clip_l(2, false), clip_g()], unet(&[320, 640, 1280], &[0, 2, 10], &[5, 10, 20], 2048))
        }
        Family::SdxlRefiner => {
            (vec![clip_g()], unet(&[384, 768, 1536, 1536], &[0, 4, 4, 0], &[6, 12, 24, 24], 1280))
        }
    };
    let xl = matches!(family, Family::Sdxl | Family::SdxlRefiner);
    let side = match family {
        Family::Sd15 => 512,
        Family::Sd2 => 768,
        Family::Sdxl | Family::SdxlRefiner => 1024,
    };
    let unet = UnetConfig {
        mid_layers: Some(match family {
            Family::Sdxl => 10,
            Family::SdxlRefiner => 4,
            _ => 1,
        }),
        use_linear_projection: family != Family::Sd15,
        addition_embed: xl.then_some(AdditionEmbed {
            time_embed_dim: 256,
            projection_input_dim: if family == Family::Sdxl { 2816 } else { 2560 },
        }),
        ..unet
    };
    let v = family == Family::Sd2;
    Card {
        family,
        text_encoders,
        unet,
        vae: VaeConfig {
            in_channels: 3,
            out_channels: 3,
            latent_channels: 4,
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            norm_num_groups: 32,
            scaling_factor: if xl { 0.13025 } else { 0.18215 },
            shift_factor: 0.0,
            latents_mean: Vec::new(),
            latents_std: Vec::new(),
            use_quant_conv: true,
            mid_block_add_attention: true,
            tiny: None,
        },
        schedule: ScheduleConfig {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            prediction_type: if v { Prediction::V } else { Prediction::Epsilon },
            rescale_betas_zero_snr: false,
            timestep_spacing: TimestepSpacing::Leading,
            steps_offset: 1,
            set_alpha_to_one: false,
            edm: None,
        },
        defaults: Defaults {
            width: side,
            height: side,
            steps: 20,
            guidance_scale: if xl { 5.0 } else { 7.5 },
            sampler: "euler".into(),
        },
        provenance: Provenance {
            converter: concat!("sdfast ", env!("CARGO_PKG_VERSION")).into(),
            quant: "q8".into(),
        },
    }
}

fn unet(channels: &[usize], depths: &[usize], heads: &[usize], cross_attention_dim: usize) -> UnetConfig {
    UnetConfig {
        in_channels: 4,
        out_channels: 4,
        block_out_channels: channels.to_vec(),
        down_layers: depths.iter().map(|&d| vec![d; 2]).collect(),
        mid_layers: None,
        up_layers: depths.iter().rev().map(|&d| vec![d; 3]).collect(),
        num_attention_heads: heads.to_vec(),
        cross_attention_dim,
        norm_num_groups: 32,
        use_linear_projection: false,
        addition_embed: None,
        time_cond_proj_dim: None,
    }
}

fn clip_l(output_layer: usize, output_norm: bool) -> ClipConfig {
    ClipConfig {
        vocab_size: 49408,
        hidden_size: 768,
        intermediate_size: 3072,
        num_hidden_layers: 12,
        num_attention_heads: 12,
        max_position_embeddings: 77,
        hidden_act: ClipActivation::QuickGelu,
        layer_norm_eps: 1e-5,
        bos_token_id: 49406,
        eos_token_id: 49407,
        pad_token_id: 49407,
        output_layer,
        output_norm,
        projection_dim: None,
    }
}

fn clip_h() -> ClipConfig {
    ClipConfig {
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 23,
        num_attention_heads: 16,
        hidden_act: ClipActivation::Gelu,
        pad_token_id: 0,
        ..clip_l(1, true)
    }
}

fn clip_g() -> ClipConfig {
    ClipConfig {
        hidden_size: 1280,
        intermediate_size: 5120,
        num_hidden_layers: 32,
        num_attention_heads: 20,
        projection_dim: Some(1280),
        output_layer: 2,
        output_norm: false,
        ..clip_h()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::weight::WeightKind;
    use crate::models::{Part, weights};

    /// Parameters of the published networks.
    #[test]
    fn the_published_sizes() {
        let count = |family, part| -> usize {
            let parts = weights(&card(family));
            let (_, specs) = parts.into_iter().find(|(p, _)| *p == part).expect("the family has the part");
            let each = specs.iter().map(|s| match s.kind {
                WeightKind::Matrix { n, kh, kw, k, .. } => n * kh * kw * k,
                WeightKind::Vector { len, .. } => len,
                WeightKind::Table { rows, cols } => rows * cols,
            });
            each.sum()
        };
        assert_eq!(count(Family::Sd15, Part::Unet), 859_520_964);
        assert_eq!(count(Family::Sd2, Part::Unet), 865_910_724);
        assert_eq!(count(Family::Sdxl, Part::Unet), 2_567_463_684);
        assert_eq!(count(Family::Sd15, Part::TextEncoder(0)), 123_060_480);
        assert_eq!(count(Family::Sdxl, Part::TextEncoder(1)), 694_659_840);
        assert_eq!(count(Family::Sd15, Part::VaeDecoder) + count(Family::Sd15, Part::VaeEncoder), 83_653_863);
    }
}
