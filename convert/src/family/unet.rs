//! The UNet's names: those of the original code (LDM) and those of diffusers.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::names::{Take, number, replace_start};

/// What stands outside the blocks.
const OUTSIDE: [(&str, &str); 8] = [
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("time_embed.cond_proj.", "time_embedding.cond_proj."),
    ("label_emb.0.0.", "add_embedding.linear_1."),
    ("label_emb.0.2.", "add_embedding.linear_2."),
    ("input_blocks.0.0.", "conv_in."),
    ("out.0.", "conv_norm_out."),
    ("out.2.", "conv_out."),
];

/// Inside a residual block.
const RESNET: [(&str, &str); 6] = [
    ("in_layers.0.", "norm1."),
    ("in_layers.2.", "conv1."),
    ("out_layers.0.", "norm2."),
    ("out_layers.3.", "conv2."),
    ("emb_layers.1.", "time_emb_proj."),
    ("skip_connection.", "conv_shortcut."),
];

/// Whether a name without a prefix is one of a UNet.
pub(super) fn is_key(name: &str) -> bool {
    const STARTS: [&str; 14] = [
        "input_blocks.",
        "middle_block.",
        "output_blocks.",
        "time_embed.",
        "label_emb.",
        "out.",
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
        "time_embedding.",
        "add_embedding.",
        "conv_in.",
        "conv_out.",
        "conv_norm_out.",
    ];
    STARTS.iter().any(|start| name.starts_with(start))
}

/// Canonical keys of `(name, key)` pairs. A key of no known place stays as it is.
pub(super) fn rename<'a>(keys: &[(&'a str, &'a str)]) -> Vec<(String, &'a str, Take)> {
    let blocks = Blocks::new(keys.iter().map(|(_, key)| *key));
    let rename = |key: &str| blocks.rename(key).unwrap_or_else(|| key.to_owned());
    keys.iter().map(|(name, key)| (rename(key), *name, Take::Whole)).collect()
}

/// What stands at a place in LDM's flat lists of blocks.
#[derive(Clone, Copy)]
struct Place {
    /// Counted in the direction of the list.
    level: usize,
    /// Residual block of the level, or the one that a change of resolution follows.
    block: usize,
    /// Whether it is a change of resolution alone.
    resample: bool,
}

/// LDM numbers all blocks of a direction; where a level ends is seen from its change of resolution.
struct Blocks {
    input: Vec<Place>,
    output: Vec<Place>,
}

impl Blocks {
    fn new<'a>(keys: impl Iterator<Item = &'a str>) -> Blocks {
        let (mut inputs, mut downs) = (BTreeSet::new(), BTreeSet::new());
        let (mut outputs, mut ups) = (BTreeSet::new(), BTreeSet::new());
        for key in keys {
            if let Some((n, rest)) = key.strip_prefix("input_blocks.").and_then(number) {
                inputs.insert(n);
                if rest.starts_with("0.op.") {
                    downs.insert(n);
                }
            } else if let Some((n, rest)) = key.strip_prefix("output_blocks.").and_then(number) {
                outputs.insert(n);
                if rest.starts_with("1.conv.") || rest.starts_with("2.conv.") {
                    ups.insert(n);
                }
            }
        }
        let (mut level, mut block) = (0, 0);
        let input = (1..=inputs.len().saturating_sub(1))
            .map(|n| {
                let place = Place { level, block, resample: downs.contains(&n) };
                (level, block) = if place.resample { (level + 1, 0) } else { (level, block + 1) };
                place
            })
            .collect();
        let (mut level, mut block) = (0, 0);
        let output = (0..outputs.len())
            .map(|n| {
                let place = Place { level, block, resample: false };
                (level, block) = if ups.contains(&n) { (level + 1, 0) } else { (level, block + 1) };
                place
            })
            .collect();
        Blocks { input, output }
    }

    fn rename(&self, key: &str) -> Option<String> {
        if let Some(key) = replace_start(key, &OUTSIDE) {
            return Some(key);
        }
        if let Some((n, rest)) = key.strip_prefix("input_blocks.").and_then(number) {
            let Place { level, block, resample } = *self.input.get(n.checked_sub(1)?)?;
            let (layer, rest) = number(rest)?;
            return match (layer, resample) {
                (0, true) => {
                    Some(format!("down_blocks.{level}.downsamplers.0.conv.{}", rest.strip_prefix("op.")?))
                }
                (0, false) => {
                    Some(format!("down_blocks.{level}.resnets.{block}.{}", replace_start(rest, &RESNET)?))
                }
                (1, false) => Some(format!("down_blocks.{level}.attentions.{block}.{rest}")),
                _ => None,
            };
        }
        if let Some((layer, rest)) = key.strip_prefix("middle_block.").and_then(number) {
            return match layer {
                0 | 2 => Some(format!("mid_block.resnets.{}.{}", layer / 2, replace_start(rest, &RESNET)?)),
                1 => Some(format!("mid_block.attentions.0.{rest}")),
                _ => None,
            };
        }
        let (n, rest) = key.strip_prefix("output_blocks.").and_then(number)?;
        let Place { level, block, .. } = *self.output.get(n)?;
        let (layer, rest) = number(rest)?;
        match layer {
            0 => Some(format!("up_blocks.{level}.resnets.{block}.{}", replace_start(rest, &RESNET)?)),
            1 | 2 if rest.starts_with("conv.") => Some(format!("up_blocks.{level}.upsamplers.0.{rest}")),
            1 => Some(format!("up_blocks.{level}.attentions.{block}.{rest}")),
            _ => None,
        }
    }
}
