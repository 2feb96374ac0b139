//! The text encoder's names: those of OpenCLIP, and those of transformers with and without `text_model.`.
#![forbid(unsafe_code)]

use super::names::{Take, number, replace_start};

const OUTSIDE: [(&str, &str); 3] = [
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
];

const LAYER: [(&str, &str); 5] = [
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
];

/// Canonical keys of `(name, key)` pairs; a fused projection gives three. A key of no known place stays as it is.
pub(super) fn rename<'a>(keys: &[(&'a str, &'a str)]) -> Vec<(String, &'a str, Take)> {
    let mut renamed = Vec::with_capacity(keys.len());
    for &(name, key) in keys {
        let fused = key.strip_prefix("transformer.resblocks.").and_then(number);
        if let Some((layer, part)) =
            fused.and_then(|(layer, rest)| Some((layer, rest.strip_prefix("attn.in_proj_")?)))
        {
            for (third, projection) in ["q_proj", "k_proj", "v_proj"].into_iter().enumerate() {
                let key = format!("text_model.encoder.layers.{layer}.self_attn.{projection}.{part}");
                renamed.push((key, name, Take::Third(third)));
            }
        } else if key == "text_projection" {
            // OpenCLIP multiplies from the left, transformers from the right.
            renamed.push(("text_projection.weight".into(), name, Take::Transposed));
        } else {
            renamed.push((rename_one(key).unwrap_or_else(|| key.to_owned()), name, Take::Whole));
        }
    }
    renamed
}

fn rename_one(key: &str) -> Option<String> {
    if let Some((layer, rest)) = key.strip_prefix("transformer.resblocks.").and_then(number) {
        return Some(format!("text_model.encoder.layers.{layer}.{}", replace_start(rest, &LAYER)?));
    }
    let bare = ["embeddings.", "encoder.", "final_layer_norm."].iter().any(|start| key.starts_with(start));
    if bare {
        return Some(format!("text_model.{key}"));
    }
    replace_start(key, &OUTSIDE)
}
