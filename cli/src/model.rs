//! Opening a model, and how the machine is used for it.

use std::path::Path;

use convert::synthetic;
use engine::card::{Card, Provenance};
use engine::format::{ModelFile, VaeFile};
use engine::memory;
use engine::pipeline::{Pipeline, Settings};
use kernels::Isa;

use crate::args::Machine;
use crate::cache;
use crate::demo;
use crate::failure::{Failure, Result};
use crate::size::{self, Ram};

/// The model at `path`, or the one that is part of the program, and its name.
pub(crate) fn open(path: Option<&Path>) -> Result<(ModelFile, String)> {
    let Some(path) = path else { return Ok((demo::open()?, demo::NAME.into())) };
    let file = ModelFile::open(path)?;
    let name = name(path, &file.card().provenance);
    Ok((file, name))
}

/// The name of the file, without what a conversion adds to it.
fn name(path: &Path, provenance: &Provenance) -> String {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    stem.strip_suffix(&format!(".{}", provenance.quant)).unwrap_or(&stem).to_string()
}

/// A VAE to be used in place of a model's.
#[derive(Debug)]
pub(crate) struct Vae {
    pub(crate) file: VaeFile,
    pub(crate) name: String,
}

/// The VAE at `path`, where there is one.
pub(crate) fn open_vae(path: Option<&Path>) -> Result<Option<Vae>> {
    let Some(path) = path else { return Ok(None) };
    let file = VaeFile::open(path)?;
    let name = name(path, &file.card().provenance);
    Ok(Some(Vae { file, name }))
}

/// A pipeline for a model, with `vae` in place of its own.
pub(crate) fn pipeline(file: ModelFile, vae: Option<Vae>, settings: Settings) -> Result<Pipeline> {
    let pipeline = Pipeline::new(file, settings)?;
    Ok(match vae {
        Some(vae) => pipeline.with_vae(vae.file)?,
        None => pipeline,
    })
}

/// The card of a published model.
pub(crate) fn published(name: &str) -> Result<Card> {
    synthetic::card(name).ok_or_else(|| {
        Failure::new(format!("there is no family named {name:?}"))
            .hint(format!("known: {}; tiny- before one makes it small", synthetic::MODELS.join(", ")))
    })
}

/// The settings that the flags ask for.
pub(crate) fn settings(machine: &Machine) -> Result<Settings> {
    let isa = picked_isa(machine.isa)?;
    let threads = machine.threads.map_or_else(Settings::default_threads, usize::from);
    Ok(Settings {
        threads,
        isa,
        precision: machine.precision.into(),
        ram: ram(machine.ram)?,
        cache: cache::folder("embeddings"),
    })
}

/// The tier that flag, environment and machine agree on.
pub(crate) fn picked_isa(flag: Option<Isa>) -> Result<Isa> {
    let variable = std::env::var(kernels::cpu::ISA_VARIABLE).ok().filter(|name| !name.is_empty());
    if let Some(name) = variable.filter(|name| Isa::parse(name).is_none()) {
        let known = Isa::ALL.map(Isa::name).join(", ");
        return Err(Failure::new(format!("{}={name} names no instruction set", kernels::cpu::ISA_VARIABLE))
            .hint(format!("the tiers are {known}")));
    }
    Ok(flag.map_or_else(Isa::detect, Isa::capped))
}

fn ram(flag: Option<Ram>) -> Result<Option<u64>> {
    match flag {
        None => Ok(None),
        Some(Ram::Bytes(bytes)) => Ok(Some(bytes)),
        Some(Ram::Share(share)) => {
            let total = memory::total().ok_or_else(|| {
                Failure::new("the size of this machine's memory is unknown")
                    .hint("give --ram in bytes, as 2G")
            })?;
            Ok(Some((total as f64 * share) as u64))
        }
    }
}

/// `2.00 GiB`, or `unlimited`.
pub(crate) fn ram_text(ram: Option<u64>) -> String {
    ram.map_or("what is free".into(), size::bytes)
}
