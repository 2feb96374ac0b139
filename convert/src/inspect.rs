//! What is in a checkpoint or an `.sdq` file.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::card::{Card, VaeCard};
use engine::format::{ModelFile, VaeFile, WeightFile};
use serde::Serialize;

use crate::error::Error;
use crate::family::{self, Sources, Subject, Wishes};
use crate::report;
use crate::source::Source;

/// What is in a file.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The file or folder.
    pub path: PathBuf,
    /// What it is: `safetensors file`, `diffusers folder`, `.sdq file`, ...
    pub layout: String,
    /// The model; nothing where the file is none, see `fault`.
    pub card: Option<Card>,
    /// The VAE, where the file holds one alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vae: Option<VaeCard>,
    /// The networks in it.
    pub parts: Vec<PartInfo>,
    /// What was concluded and what would be left out.
    pub notes: Vec<String>,
    /// Why it can't be converted.
    pub fault: Option<String>,
}

/// A network of a file.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PartInfo {
    /// `unet`, `vae`, `text_encoder`, ...
    pub name: String,
    /// Tensors.
    pub tensors: usize,
    /// Numbers.
    pub parameters: u64,
    /// Bytes they take.
    pub bytes: u64,
    /// Bytes of each number type or encoding.
    pub types: BTreeMap<String, u64>,
}

/// Looks into a checkpoint or an `.sdq` file.
pub fn inspect(path: &Path) -> Result<Inspection, Error> {
    match ModelFile::open(path) {
        Ok(file) => return Ok(Inspection { card: Some(file.card().clone()), ..inspect_file(path, &file) }),
        Err(engine::format::Error::VaeAlone { .. }) => {
            let file = VaeFile::open(path)?;
            return Ok(Inspection { vae: Some(file.card().clone()), ..inspect_file(path, &file) });
        }
        Err(engine::format::Error::NotSdq { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    let sources = Sources { model: Source::open(path)?, vae: None };
    let source = &sources.model;
    let (subject, tensors, notes, fault) = match family::recognize(&sources, &Wishes::default()) {
        Ok(found) => (Some(found.subject), found.tensors, found.notes, None),
        Err(error) => (None, BTreeMap::new(), Vec::new(), Some(error.to_string())),
    };
    let part_of: BTreeMap<&str, &str> = tensors
        .iter()
        .map(|(name, view)| (view.name.as_str(), name.split_once('.').map_or("", |(part, _)| part)))
        .collect();
    let mut parts = Parts::default();
    for (name, tensor) in &source.tensors {
        let part = part_of.get(name.as_str()).copied().unwrap_or("other");
        parts.add(part, tensor.count() as u64, tensor.bytes(), tensor.dtype.name());
    }
    let layout = source.layout.to_owned();
    let card = subject.as_ref().and_then(Subject::model).cloned();
    let vae = subject.as_ref().and_then(Subject::vae).cloned();
    Ok(Inspection { path: path.to_owned(), layout, card, vae, parts: parts.0, notes, fault })
}

fn inspect_file(path: &Path, file: &WeightFile) -> Inspection {
    let mut parts = Parts::default();
    for part in file.parts() {
        for tensor in &file.tensors()[part.tensors.clone()] {
            let count = report::shape_of(&tensor.kind).iter().map(|&n| n as u64).product();
            parts.add(&part.name, count, tensor.len, tensor.encoding.name());
        }
    }
    Inspection {
        path: path.to_owned(),
        layout: ".sdq file".into(),
        card: None,
        vae: None,
        parts: parts.0,
        notes: Vec::new(),
        fault: None,
    }
}

#[derive(Default)]
struct Parts(Vec<PartInfo>);

impl Parts {
    fn add(&mut self, name: &str, parameters: u64, bytes: u64, kind: &str) {
        if self.0.iter().all(|p| p.name != name) {
            self.0.push(PartInfo { name: name.to_owned(), ..PartInfo::default() });
        }
        let part = self.0.iter_mut().find(|p| p.name == name).expect("just pushed");
        part.tensors += 1;
        part.parameters += parameters;
        part.bytes += bytes;
        *part.types.entry(kind.to_owned()).or_default() += bytes;
    }
}
