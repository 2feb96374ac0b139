//! What a checkpoint is: its tensors under canonical names, and its card.
#![forbid(unsafe_code)]

mod clip;
mod config;
mod kind;
mod names;
mod schedule;
mod tiny_vae;
mod unet;
mod vae;

use std::collections::BTreeMap;
use std::path::Path;

use engine::card::{Card, Family, Prediction, Provenance, VaeCard};
use engine::graph::Network;
use engine::models::{self, Part};
use serde::Serialize;

use crate::error::Error;
use crate::source::{Configs, Source, read_configs};
pub(crate) use names::{Take, View};

/// What a checkpoint holds.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Subject {
    /// A whole model.
    Model(Box<Card>),
    /// A VAE alone.
    Vae(Box<VaeCard>),
}

impl Subject {
    /// The networks that a file of it has.
    pub(crate) fn networks(&self) -> Vec<(Part, Network)> {
        match self {
            Subject::Model(card) => models::networks(card),
            Subject::Vae(card) => models::vae_networks(&card.vae),
        }
    }

    /// What people call it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Subject::Model(card) => family_name(card.family),
            Subject::Vae(_) => "tiny VAE (TAESD)",
        }
    }

    /// The card of a whole model.
    pub fn model(&self) -> Option<&Card> {
        match self {
            Subject::Model(card) => Some(card),
            Subject::Vae(_) => None,
        }
    }

    /// The card of a VAE alone.
    pub fn vae(&self) -> Option<&VaeCard> {
        match self {
            Subject::Model(_) => None,
            Subject::Vae(card) => Some(card),
        }
    }
}

/// A checkpoint that has been understood.
#[derive(Debug)]
pub(crate) struct Recognized {
    pub(crate) subject: Subject,
    /// Where each tensor is found, by canonical name.
    pub(crate) tensors: BTreeMap<String, View>,
    /// For people: what was left out, what was concluded from what.
    pub(crate) notes: Vec<String>,
    /// Tensors of the checkpoint that belong to no network.
    pub(crate) strangers: Vec<String>,
}

/// What the caller knows better than the checkpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes<'a> {
    pub(crate) family: Option<Family>,
    pub(crate) prediction: Option<Prediction>,
    pub(crate) config: Option<&'a Path>,
    pub(crate) quant: &'a str,
}

/// Where tensors of several checkpoints are found: the model, and a VAE that replaces its own.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) model: Source,
    pub(crate) vae: Option<Source>,
}

impl Sources {
    pub(crate) fn of(&self, view: &View) -> &Source {
        match (&self.vae, view.from_vae) {
            (Some(vae), true) => vae,
            _ => &self.model,
        }
    }

    /// The shape of a tensor as it will be used.
    pub(crate) fn shape(&self, view: &View) -> Vec<usize> {
        let mut shape = self.of(view).tensors[&view.name].shape.clone();
        match view.take {
            Take::Whole => {}
            Take::Third(_) => shape[0] /= 3,
            Take::Transposed => shape.reverse(),
        }
        shape
    }
}

/// Finds out what it is.
pub(crate) fn recognize(sources: &Sources, wishes: &Wishes<'_>) -> Result<Recognized, Error> {
    let model = &sources.model;
    let mut named = names::canonical(model);
    let mut notes = Vec::new();
    if named.ignored > 0 {
        notes
            .push(format!("{} tensors of training are left out (EMA copies, schedules, ...)", named.ignored));
    }
    if let Some(vae) = &sources.vae {
        let mut replacement = names::canonical_vae(vae);
        if replacement.is_empty() {
            let hint =
                String::from("give a VAE's .safetensors or .pt file, or a model that has one, with --vae");
            return Err(Error::Kind { path: vae.path.clone(), what: "no VAE".into(), hint });
        }
        named.tensors.retain(|name, _| !name.starts_with("vae."));
        named.tensors.append(&mut replacement);
        notes.push(format!("the VAE comes from {}", vae.path.display()));
    }
    let unsupported = |what| Error::Unsupported { path: model.path.clone(), what };
    if sources.vae.is_none()
        && let Some(tensors) = tiny_vae::alone(model, &named)
    {
        let evidence = config::Evidence { sources, tensors: &tensors, configs: &model.configs, wishes };
        let vae = evidence.tiny_vae(model.configs.get("vae"))?;
        notes.push("a tiny VAE (TAESD), to be used beside a model".into());
        let card = VaeCard { vae, provenance: provenance(wishes) };
        card.check().map_err(unsupported)?;
        let strangers = named.strangers.into_iter().filter(|name| tensors.values().all(|v| v.name != *name));
        let strangers = strangers.collect();
        return Ok(Recognized { subject: Subject::Vae(Box::new(card)), tensors, notes, strangers });
    }
    kind::check(model, &named)?;
    let lent;
    let configs: &Configs = match wishes.config {
        Some(folder) => {
            lent = read_configs(folder)?;
            if lent.is_empty() {
                let why = String::from("the folder given with --config has no config.json in its subfolders");
                return Err(Error::NotACheckpoint { path: folder.to_owned(), why });
            }
            &lent
        }
        None => &model.configs,
    };
    let evidence = config::Evidence { sources, tensors: &named.tensors, configs, wishes };
    let card = evidence.card(&mut notes)?;
    card.check().map_err(unsupported)?;
    let subject = Subject::Model(Box::new(card));
    Ok(Recognized { subject, tensors: named.tensors, notes, strangers: named.strangers })
}

fn provenance(wishes: &Wishes<'_>) -> Provenance {
    let converter = concat!("sdconv ", env!("CARGO_PKG_VERSION")).to_owned();
    Provenance { converter, quant: wishes.quant.to_owned() }
}

/// What people call a family.
pub(crate) fn family_name(family: Family) -> &'static str {
    match family {
        Family::Sd15 => "Stable Diffusion 1.x",
        Family::Sd2 => "Stable Diffusion 2.x",
        Family::Sdxl => "Stable Diffusion XL",
        Family::SdxlRefiner => "Stable Diffusion XL refiner",
    }
}
