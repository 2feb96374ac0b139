//! Canonical names as those of the original code (LDM) and of OpenCLIP.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use engine::card::{Card, Family, Prediction, UnetConfig};

use super::{Entry, Number, Tensor};

/// The tensors of a single file.
pub(super) fn ldm(card: &Card, tensors: &[Tensor], number: Number) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(tensors.len());
    // Queries, keys and values that become one tensor.
    let mut fused: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for tensor in tensors {
        let (part, key) = tensor.name.split_once('.').expect("canonical names have a part");
        let mut shape = tensor.shape.clone();
        let mut transposed = false;
        let name = match part {
            "unet" => format!("model.diffusion_model.{}", unet(&card.unet, key)),
            "vae" => {
                if key.contains("mid_block.attentions") && key.ends_with("weight") && shape.len() == 2 {
                    shape.extend([1, 1]);
                }
                format!("first_stage_model.{}", vae(card.vae.block_out_channels.len(), key))
            }
            _ => match text_prefix(card.family, part) {
                (prefix, false) => format!("{prefix}{key}"),
                (prefix, true) => {
                    if let Some(name) = fused_name(key) {
                        fused.entry(format!("{prefix}{name}")).or_default().push(tensor.clone());
                        continue;
                    }
                    transposed = key == "text_projection.weight";
                    if transposed {
                        shape.reverse();
                    }
                    format!("{prefix}{}", openclip(key))
                }
            },
        };
        let from = vec![tensor.clone()];
        entries.push(Entry { name, shape, number, from, transposed, marker: Vec::new() });
    }
    for (name, mut from) in fused {
        // q before k before v
        from.sort_by_key(|t| ["q_proj", "k_proj", "v_proj"].iter().position(|p| t.name.contains(p)));
        let mut shape = from[0].shape.clone();
        shape[0] *= 3;
        entries.push(Entry { name, shape, number, from, transposed: false, marker: Vec::new() });
    }
    entries.extend(markers(card));
    entries
}

/// What tells the noise schedule of an unusual SDXL in a single file.
fn markers(card: &Card) -> Vec<Entry> {
    let marker = |name: &str, shape: &[usize], marker: Vec<f32>| {
        let (name, shape, number) = (name.to_owned(), shape.to_vec(), Number::F32);
        Entry { name, shape, number, from: Vec::new(), transposed: false, marker }
    };
    let s = &card.schedule;
    match (s.edm, s.prediction_type) {
        _ if card.family != Family::Sdxl => Vec::new(),
        (Some(edm), Prediction::V) => vec![
            marker("edm_vpred.sigma_min", &[], vec![edm.sigma_min as f32]),
            marker("edm_vpred.sigma_max", &[], vec![edm.sigma_max as f32]),
        ],
        (Some(_), Prediction::Epsilon) => vec![
            marker("edm_mean", &[1, 4, 1, 1], card.vae.latents_mean.clone()),
            marker("edm_std", &[1, 4, 1, 1], card.vae.latents_std.clone()),
        ],
        (None, Prediction::V) => {
            let mut markers = vec![marker("v_pred", &[0], Vec::new())];
            if s.rescale_betas_zero_snr {
                markers.push(marker("ztsnr", &[0], Vec::new()));
            }
            markers
        }
        (None, Prediction::Epsilon) => Vec::new(),
    }
}

/// How a text encoder's names begin, and whether they are OpenCLIP's.
fn text_prefix(family: Family, part: &str) -> (&'static str, bool) {
    match (family, part) {
        (Family::Sd15, _) => ("cond_stage_model.transformer.", false),
        (Family::Sd2, _) => ("cond_stage_model.model.", true),
        (Family::Sdxl, "text_encoder") => ("conditioner.embedders.0.transformer.", false),
        (Family::Sdxl, _) => ("conditioner.embedders.1.model.", true),
        (Family::SdxlRefiner, _) => ("conditioner.embedders.0.model.", true),
    }
}

fn replaced(key: &str, rules: &[(&str, &str)]) -> Option<String> {
    rules.iter().find_map(|(from, to)| Some(format!("{to}{}", key.strip_prefix(from)?)))
}

/// `12.rest` as `(12, "rest")`.
fn number(text: &str) -> (usize, &str) {
    let (digits, rest) = text.split_once('.').expect("an index is followed by a dot");
    (digits.parse().expect("an index is a number"), rest)
}

fn unet(cfg: &UnetConfig, key: &str) -> String {
    let outside = replaced(
        key,
        &[
            ("time_embedding.linear_1.", "time_embed.0."),
            ("time_embedding.linear_2.", "time_embed.2."),
            ("time_embedding.cond_proj.", "time_embed.cond_proj."),
            ("add_embedding.linear_1.", "label_emb.0.0."),
            ("add_embedding.linear_2.", "label_emb.0.2."),
            ("conv_in.", "input_blocks.0.0."),
            ("conv_norm_out.", "out.0."),
            ("conv_out.", "out.2."),
        ],
    );
    if let Some(name) = outside {
        return name;
    }
    let resnet = |rest: &str| {
        let rules = [
            ("norm1.", "in_layers.0."),
            ("conv1.", "in_layers.2."),
            ("norm2.", "out_layers.0."),
            ("conv2.", "out_layers.3."),
            ("time_emb_proj.", "emb_layers.1."),
            ("conv_shortcut.", "skip_connection."),
        ];
        replaced(rest, &rules).expect("a residual block has these layers")
    };
    if let Some(rest) = key.strip_prefix("mid_block.") {
        let (kind, rest) = rest.split_once('.').expect("blocks have layers");
        let (i, rest) = number(rest);
        return match kind {
            "resnets" => format!("middle_block.{}.{}", 2 * i, resnet(rest)),
            _ => format!("middle_block.1.{rest}"),
        };
    }
    let (direction, rest) = key.split_once('.').expect("blocks have indices");
    let (level, rest) = number(rest);
    let (kind, rest) = rest.split_once('.').expect("blocks have layers");
    let (j, rest) = number(rest);
    if direction == "down_blocks" {
        let first = 1 + cfg.down_layers[..level].iter().map(|l| l.len() + 1).sum::<usize>();
        return match kind {
            "resnets" => format!("input_blocks.{}.0.{}", first + j, resnet(rest)),
            "attentions" => format!("input_blocks.{}.1.{rest}", first + j),
            _ => {
                let rest = rest.strip_prefix("conv.").expect("a downsampler is a convolution");
                format!("input_blocks.{}.0.op.{rest}", first + cfg.down_layers[level].len())
            }
        };
    }
    let first = cfg.up_layers[..level].iter().map(Vec::len).sum::<usize>();
    match kind {
        "resnets" => format!("output_blocks.{}.0.{}", first + j, resnet(rest)),
        "attentions" => format!("output_blocks.{}.1.{rest}", first + j),
        _ => {
            let last = cfg.up_layers[level].len() - 1;
            let layer = if cfg.up_layers[level][last] > 0 { 2 } else { 1 };
            format!("output_blocks.{}.{layer}.{rest}", first + last)
        }
    }
}

fn vae(levels: usize, key: &str) -> String {
    let (half, rest) = key.split_once('.').expect("a VAE has halves");
    let resnet = |rest: &str| rest.replacen("conv_shortcut.", "nin_shortcut.", 1);
    if let Some(rest) = rest.strip_prefix("mid_block.attentions.0.") {
        let rules = [
            ("group_norm.", "norm."),
            ("to_q.", "q."),
            ("to_k.", "k."),
            ("to_v.", "v."),
            ("to_out.0.", "proj_out."),
        ];
        return format!("{half}.mid.attn_1.{}", replaced(rest, &rules).expect("attention has these layers"));
    }
    if let Some(rest) = rest.strip_prefix("mid_block.resnets.") {
        let (i, rest) = number(rest);
        return format!("{half}.mid.block_{}.{}", i + 1, resnet(rest));
    }
    if let Some(rest) = rest.strip_prefix("conv_norm_out.") {
        return format!("{half}.norm_out.{rest}");
    }
    let (blocks, sampler) = match half {
        "encoder" => (rest.strip_prefix("down_blocks."), "down"),
        _ => (rest.strip_prefix("up_blocks."), "up"),
    };
    let Some(rest) = blocks else { return key.to_owned() };
    let (level, rest) = number(rest);
    let level = if half == "encoder" { level } else { levels - 1 - level };
    match rest.strip_prefix("resnets.") {
        Some(rest) => {
            let (j, rest) = number(rest);
            format!("{half}.{sampler}.{level}.block.{j}.{}", resnet(rest))
        }
        None => {
            let rest = rest.split_once(".0.").expect("a resampler has one layer").1;
            format!("{half}.{sampler}.{level}.{sampler}sample.{rest}")
        }
    }
}

/// The fused projection that a query, key or value projection belongs to.
fn fused_name(key: &str) -> Option<String> {
    let (layer, rest) = number(key.strip_prefix("text_model.encoder.layers.")?);
    let rest = rest.strip_prefix("self_attn.")?;
    let kind = ["q_proj.", "k_proj.", "v_proj."].iter().find_map(|p| rest.strip_prefix(p))?;
    Some(format!("transformer.resblocks.{layer}.attn.in_proj_{kind}"))
}

fn openclip(key: &str) -> String {
    let rules = [
        ("text_model.embeddings.token_embedding.", "token_embedding."),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.", "ln_final."),
        ("text_projection.weight", "text_projection"),
    ];
    if let Some(name) = replaced(key, &rules) {
        return name;
    }
    let (layer, rest) = number(key.strip_prefix("text_model.encoder.layers.").expect("the rest are layers"));
    let rules = [
        ("layer_norm1.", "ln_1."),
        ("layer_norm2.", "ln_2."),
        ("self_attn.out_proj.", "attn.out_proj."),
        ("mlp.fc1.", "mlp.c_fc."),
        ("mlp.fc2.", "mlp.c_proj."),
    ];
    format!("transformer.resblocks.{layer}.{}", replaced(rest, &rules).expect("a layer has these parts"))
}
