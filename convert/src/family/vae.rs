//! The VAE's names: those of the original code (LDM), and those of diffusers, old and new; TAESD's, which are numbers.
#![forbid(unsafe_code)]

use super::names::{Take, number, replace_start};

/// The attention of the middle, after `mid.attn_1.` (LDM) or `mid_block.attentions.0.` (old diffusers).
const ATTENTION: [(&str, &str); 9] = [
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
    ("query.", "to_q."),
    ("key.", "to_k."),
    ("value.", "to_v."),
    ("proj_attn.", "to_out.0."),
];

/// Whether a name without a prefix is one of a VAE.
pub(super) fn is_key(name: &str) -> bool {
    let starts =
        ["encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "taesd_encoder.", "taesd_decoder."];
    starts.iter().any(|start| name.starts_with(start))
}

/// Canonical keys of `(name, key)` pairs. A key of no known place stays as it is.
pub(super) fn rename<'a>(keys: &[(&'a str, &'a str)]) -> Vec<(String, &'a str, Take)> {
    let up = |key: &str| number(key.strip_prefix("decoder.up.")?).map(|(n, _)| n);
    let last = keys.iter().filter_map(|(_, key)| up(key)).max().unwrap_or(0);
    let rename = |key: &str| rename_one(key, last).unwrap_or_else(|| key.to_owned());
    keys.iter().map(|(name, key)| (rename(key), *name, Take::Whole)).collect()
}

/// LDM numbers the decoder's levels from the highest resolution, diffusers in execution order; `last` is the lowest.
fn rename_one(key: &str, last: usize) -> Option<String> {
    let (half, rest) = key.strip_prefix("taesd_").unwrap_or(key).split_once('.')?;
    if half != "encoder" && half != "decoder" {
        return None;
    }
    if let Some((layer, rest)) = number(rest) {
        // TAESD's own decoder has one layer more than diffusers', before all others.
        return Some(format!("{half}.layers.{}.{rest}", layer.checked_sub(usize::from(half == "decoder"))?));
    }
    if let Some(rest) =
        rest.strip_prefix("mid.attn_1.").or_else(|| rest.strip_prefix("mid_block.attentions.0."))
    {
        return Some(format!("{half}.mid_block.attentions.0.{}", replace_start(rest, &ATTENTION)?));
    }
    if let Some((block, rest)) = rest.strip_prefix("mid.block_").and_then(number) {
        return Some(format!("{half}.mid_block.resnets.{}.{}", block.checked_sub(1)?, resnet(rest)));
    }
    if let Some(rest) = rest.strip_prefix("norm_out.") {
        return Some(format!("{half}.conv_norm_out.{rest}"));
    }
    let (level, rest, blocks, sampler) = match half {
        "encoder" => {
            let (level, rest) = number(rest.strip_prefix("down.")?)?;
            (level, rest, "down_blocks", ("downsample.", "downsamplers"))
        }
        _ => {
            let (level, rest) = number(rest.strip_prefix("up.")?)?;
            (last.checked_sub(level)?, rest, "up_blocks", ("upsample.", "upsamplers"))
        }
    };
    if let Some((block, rest)) = rest.strip_prefix("block.").and_then(number) {
        return Some(format!("{half}.{blocks}.{level}.resnets.{block}.{}", resnet(rest)));
    }
    Some(format!("{half}.{blocks}.{level}.{}.0.{}", sampler.1, rest.strip_prefix(sampler.0)?))
}

fn resnet(rest: &str) -> String {
    replace_start(rest, &[("nin_shortcut.", "conv_shortcut.")]).unwrap_or_else(|| rest.to_owned())
}
