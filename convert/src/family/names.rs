//! From the names of every layout to the canonical ones: the folder of the network in a diffusers model, a dot, and the
//! key that diffusers uses.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::{clip, unet, vae};
use crate::source::Source;

/// Where the values of a canonical tensor are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Name in the checkpoint.
    pub(crate) name: String,
    pub(crate) take: Take,
    /// Whether the checkpoint is the one given for the VAE alone.
    pub(crate) from_vae: bool,
}

/// Which of a tensor's values are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Take {
    Whole,
    /// One third of the rows: queries, keys or values of a fused projection.
    Third(usize),
    /// The matrix with rows and columns exchanged.
    Transposed,
}

/// A checkpoint's tensors under canonical names.
#[derive(Debug, Default)]
pub(crate) struct Named {
    pub(crate) tensors: BTreeMap<String, View>,
    /// How many tensors are leftovers of training.
    pub(crate) ignored: usize,
    /// Tensors that belong to no network.
    pub(crate) strangers: Vec<String>,
    /// Whether the UNet stands without the prefix that it has in a whole model.
    pub(crate) bare_unet: bool,
}

/// A network of a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Network {
    Unet,
    Vae,
    Text,
    Text2,
}

/// How names of a network begin; a longer prefix stands before a shorter one that it begins with.
const PREFIXES: [(&str, Network); 20] = [
    ("model.diffusion_model.", Network::Unet),
    ("unet.", Network::Unet),
    ("first_stage_model.", Network::Vae),
    ("vae.", Network::Vae),
    ("cond_stage_model.transformer.", Network::Text),
    ("cond_stage_model.model.", Network::Text),
    ("cond_stage_model.1.transformer.", Network::Text2),
    ("cond_stage_model.1.model.", Network::Text2),
    ("conditioner.embedders.0.transformer.", Network::Text),
    ("conditioner.embedders.0.model.", Network::Text),
    ("conditioner.embedders.1.transformer.", Network::Text2),
    ("conditioner.embedders.1.model.", Network::Text2),
    ("text_encoders.clip_l.transformer.", Network::Text),
    ("text_encoders.clip_h.transformer.", Network::Text),
    ("text_encoders.clip_g.transformer.", Network::Text2),
    ("text_encoder_2.", Network::Text2),
    ("text_encoder.", Network::Text),
    ("te.", Network::Text),
    ("te1.", Network::Text),
    ("te2.", Network::Text2),
];

/// Leftovers of training and markers: beginnings of names.
const LEFTOVERS: [&str; 18] = [
    "model_ema.",
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus_",
    "posterior_",
    "logvar",
    "lvlb_weights",
    "denoiser.",
    "embedding_manager",
    "scale_factor",
    "global_step",
    "first_stage_model.loss.",
    "loss.",
    "ztsnr",
    "v_pred",
    "edm_",
    "callbacks",
];
/// The same: ends of names.
const LEFTOVER_ENDS: [&str; 4] = ["position_ids", "logit_scale", "attn_mask", ".num_batches_tracked"];

fn is_leftover(name: &str) -> bool {
    LEFTOVERS.iter().any(|p| name.starts_with(p)) || LEFTOVER_ENDS.iter().any(|e| name.ends_with(e))
}

/// Sorts a checkpoint's tensors by network and gives them their canonical names.
pub(crate) fn canonical(source: &Source) -> Named {
    let mut named = Named::default();
    let mut networks: BTreeMap<Network, Vec<(&str, &str)>> = BTreeMap::new();
    let mut bare = Vec::new();
    for name in source.tensors.keys() {
        if is_leftover(name) {
            named.ignored += 1;
        } else if let Some((network, key)) = split(name) {
            networks.entry(network).or_default().push((name, key));
        } else if unet::is_key(name) {
            bare.push((name.as_str(), name.as_str()));
        } else {
            named.strangers.push(name.clone());
        }
    }
    if !bare.is_empty() && !networks.contains_key(&Network::Unet) {
        named.bare_unet = true;
        networks.insert(Network::Unet, bare);
    } else {
        named.strangers.extend(bare.into_iter().map(|(name, _)| name.to_owned()));
    }
    // The refiner's only text encoder is the second one's kind; it is the first of its own model.
    let alone = !networks.contains_key(&Network::Text);
    for (network, keys) in networks {
        let part = match network {
            Network::Unet => "unet",
            Network::Vae => "vae",
            Network::Text2 if !alone => "text_encoder_2",
            Network::Text | Network::Text2 => "text_encoder",
        };
        let renamed = match network {
            Network::Unet => unet::rename(&keys),
            Network::Vae => vae::rename(&keys),
            Network::Text | Network::Text2 => clip::rename(&keys),
        };
        insert(&mut named.tensors, part, renamed, false);
    }
    named
}

/// The tensors of the VAE in a file that holds one, alone or in a model.
pub(crate) fn canonical_vae(source: &Source) -> BTreeMap<String, View> {
    let names = source.tensors.keys().filter(|name| !is_leftover(name));
    let inside: Vec<(&str, &str)> = names
        .clone()
        .filter_map(|name| {
            split(name).filter(|(n, _)| *n == Network::Vae).map(|(_, key)| (name.as_str(), key))
        })
        .collect();
    let alone: Vec<(&str, &str)> =
        names.filter(|name| vae::is_key(name)).map(|name| (name.as_str(), name.as_str())).collect();
    let mut tensors = BTreeMap::new();
    insert(&mut tensors, "vae", vae::rename(if inside.is_empty() { &alone } else { &inside }), true);
    tensors
}

fn insert(
    tensors: &mut BTreeMap<String, View>,
    part: &str,
    renamed: Vec<(String, &str, Take)>,
    from_vae: bool,
) {
    for (key, name, take) in renamed {
        tensors.insert(format!("{part}.{key}"), View { name: name.to_owned(), take, from_vae });
    }
}

fn split(name: &str) -> Option<(Network, &str)> {
    PREFIXES.iter().find_map(|(prefix, network)| Some((*network, name.strip_prefix(prefix)?)))
}

/// Replaces the beginning of a key by the first rule that fits.
pub(super) fn replace_start(key: &str, rules: &[(&str, &str)]) -> Option<String> {
    rules.iter().find_map(|(from, to)| Some(format!("{to}{}", key.strip_prefix(from)?)))
}

/// `12.rest` as `(12, "rest")`.
pub(super) fn number(text: &str) -> Option<(usize, &str)> {
    let (digits, rest) = text.split_once('.')?;
    Some((digits.parse().ok()?, rest))
}
