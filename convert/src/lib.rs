//! Checkpoint in, `.sdq` out.
//!
//! A weight goes from the checkpoint (`source`) under its canonical name (`family`) through the choice of its encoding
//! (`policy`) into the file (`pack`). What a model needs is asked of the engine's description of its networks.
#![forbid(unsafe_code)]

mod calibrate;
mod dtype;
mod error;
mod factors;
mod family;
mod inspect;
mod pack;
mod policy;
mod report;
mod source;
pub mod synthetic;
mod tokenizer;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use engine::card::{Family, Prediction};
use engine::format::{Layout, Tokenizer, Writer};
use engine::graph::Network;
use engine::graph::weight::{Stored, WeightSpec};

pub use error::Error;
pub use family::Subject;
pub use inspect::{Inspection, PartInfo, inspect};
pub use policy::{Quant, stored};
pub use report::{FactorsReport, Summary, TensorReport, Total};

use calibrate::Calibration;
use family::{Recognized, Sources, Wishes};
use pack::{Job, Settings, Stats};
use policy::Policy;
use source::Source;

/// What to convert, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A file or a diffusers folder.
    pub checkpoint: PathBuf,
    /// The file to write; without it the checkpoint's stem and `.q8.sdq` in the current folder.
    pub output: Option<PathBuf>,
    /// How far to quantize.
    pub quant: Quant,
    /// Rules `GLOB=ENCODING` over canonical names; the last one that fits counts.
    pub keep: Vec<String>,
    /// A file or folder whose VAE replaces the checkpoint's.
    pub vae: Option<PathBuf>,
    /// What the checkpoint must be.
    pub family: Option<Family>,
    /// What the network predicts, where the checkpoint doesn't say it.
    pub prediction: Option<Prediction>,
    /// A diffusers folder whose configurations hold, for a model with unusual ones; its weights aren't read.
    pub config: Option<PathBuf>,
    /// Where to write the [`Summary`] as JSON, with the error of each tensor.
    pub report: Option<PathBuf>,
    /// A file with a prompt on each line, whose pictures show what the layers see: rounding errors are then fed back.
    pub calibrate: Option<PathBuf>,
    /// Threads; without it one for each core.
    pub threads: Option<usize>,
    /// Replace an existing output, leave unexpected tensors out, put zeros for values that are not finite.
    pub force: bool,
    /// Set by the caller to stop.
    pub stop: Option<Arc<AtomicBool>>,
}

/// How far a conversion is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Bytes of the checkpoint that are converted.
    pub done: u64,
    /// Bytes of the checkpoint to be converted.
    pub total: u64,
    /// The last tensor that was converted.
    pub tensor: &'a str,
}

impl Options {
    /// The file to write.
    pub fn output_path(&self) -> PathBuf {
        self.output.clone().unwrap_or_else(|| {
            let folder = self.checkpoint.is_dir();
            let name = if folder { self.checkpoint.file_name() } else { self.checkpoint.file_stem() };
            let name = name.map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
            PathBuf::from(format!("{name}.{}.sdq", self.quant.name()))
        })
    }
}

/// Converts a checkpoint. The output appears complete or not at all.
pub fn convert(options: &Options, progress: &(dyn Fn(Progress<'_>) + Sync)) -> Result<Summary, Error> {
    let output = options.output_path();
    if output.exists() && !options.force {
        return Err(Error::Exists { path: output });
    }
    let policy = Policy::new(options.quant, &options.keep)?;
    let model = Source::open(&options.checkpoint)?;
    let vae = options.vae.as_deref().map(Source::open).transpose()?;
    let sources = Sources { model, vae };
    let wishes = Wishes {
        family: options.family,
        prediction: options.prediction,
        config: options.config.as_deref(),
        quant: options.quant.name(),
    };
    let mut recognized = family::recognize(&sources, &wishes)?;
    let networks = recognized.subject.networks();
    let specs = || networks.iter().flat_map(|(_, network)| network.weights());
    policy.check(specs())?;
    check_names(&sources, &mut recognized, specs(), options.force)?;
    for spec in specs() {
        let view = &recognized.tensors[&spec.name];
        pack::check_shape(spec, &view.name, &sources.shape(view))?;
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(options.threads.unwrap_or(0)).build();
    let pool = pool.map_err(|e| Error::Io {
        action: "start threads for",
        path: options.checkpoint.clone(),
        source: std::io::Error::other(e),
    })?;

    let mut vectors = HashMap::new();
    let mut parts = Vec::new();
    for (part, network) in &networks {
        let mut stored = policy.stored(part.name(), network.weights());
        vectors.extend(pool.install(|| factors::choose(&sources, &recognized, network, &mut stored))?);
        parts.push((part.name(), with_factors(network, &stored)));
    }
    let layout = match &recognized.subject {
        Subject::Model(card) => {
            let files = tokenizer::choose(sources.model.tokenizer.as_ref());
            Layout::new(card, Tokenizer { vocab: &files.vocab, merges: &files.merges }, &parts)?
        }
        Subject::Vae(card) => Layout::of_vae(card, &parts)?,
    };
    let specs = parts.iter().flat_map(|(part, specs)| specs.iter().map(move |s| (*part, s)));
    let mut names = Vec::new();
    let mut jobs = Vec::new();
    for (place, ((part, (spec, stored)), tensor)) in specs.zip(layout.tensors()).enumerate() {
        if vectors.contains_key(&spec.name) {
            continue;
        }
        let view = recognized.tensors[&spec.name].clone();
        let factors = stored.factors.as_ref().map(|name| vectors[name].clone());
        names.push(part);
        let (spec, encoding, bytes) = (spec.clone(), tensor.encoding, tensor.len);
        jobs.push(Job { place, spec, encoding, view, bytes, factors });
    }

    // A VAE alone makes no pictures, and has no weights of 8 bits.
    let calibration = options.calibrate.as_deref().filter(|_| recognized.subject.model().is_some());
    let calibration = calibration.map(|path| Calibration::new(options, path, &output)).transpose()?;
    let writer = Writer::create(&output, layout)?;
    let settings = Settings {
        measure: options.report.is_some(),
        force: options.force,
        stop: options.stop.as_deref(),
        progress,
        calibration: calibration.as_ref(),
    };
    for (place, tensor) in writer.layout().tensors().iter().enumerate() {
        if let Some(numbers) = vectors.get(&tensor.name) {
            let bytes: Vec<u8> = numbers.iter().flat_map(|f| f.to_le_bytes()).collect();
            writer.write(place, &bytes)?;
        }
    }
    let stats = pool.install(|| pack::run(&sources, &jobs, &writer, &settings))?;
    let summary = summarize(&sources, recognized, &names, &jobs, &stats, &settings, &output, &writer);
    if let Some(path) = &options.report {
        let json = serde_json::to_vec_pretty(&summary).expect("a summary is plain data");
        std::fs::write(path, json).map_err(Error::io("write", path))?;
    }
    writer.finish()?;
    Ok(summary)
}

/// The tensors of a part as the file has them, those of factors among them.
fn with_factors(network: &Network, stored: &[Stored]) -> Vec<(WeightSpec, Stored)> {
    let by_name: HashMap<&str, &Stored> =
        network.weights().iter().map(|spec| spec.name.as_str()).zip(stored).collect();
    let (network, _) = network.stored(stored);
    let each = network.weights().iter().map(|spec| {
        (spec.clone(), by_name.get(spec.name.as_str()).map_or_else(Stored::default, |&s| s.clone()))
    });
    each.collect()
}

/// Names what is missing and what has no place; notes what is left out.
fn check_names<'a>(
    sources: &Sources,
    recognized: &mut Recognized,
    specs: impl Iterator<Item = &'a WeightSpec> + Clone,
    force: bool,
) -> Result<(), Error> {
    let path = sources.model.path.clone();
    let wanted: HashSet<&str> = specs.clone().map(|s| s.name.as_str()).collect();
    let all = specs.map(|s| &s.name);
    let missing: Vec<String> = all.filter(|name| !recognized.tensors.contains_key(*name)).cloned().collect();
    if !missing.is_empty() {
        return Err(Error::Missing { path, names: missing });
    }
    let extra = recognized.tensors.iter().filter(|(name, _)| !wanted.contains(name.as_str()));
    // Text encoders come with layers and heads that no picture needs.
    let (unused, unexpected): (Vec<_>, Vec<_>) =
        extra.partition(|(name, _)| name.starts_with("text_encoder"));
    if !unused.is_empty() {
        recognized
            .notes
            .push(format!("{} tensors of the text encoders are never used and left out", unused.len()));
    }
    if !unexpected.is_empty() {
        let names: Vec<String> = unexpected.into_iter().map(|(_, view)| view.name.clone()).collect();
        if !force {
            let family = recognized.subject.name().to_owned();
            return Err(Error::Unexpected { path, family, names });
        }
        recognized.notes.push(format!("{} unexpected tensors are left out, {} first", names.len(), names[0]));
    }
    if let Some(first) = recognized.strangers.first() {
        let count = recognized.strangers.len();
        recognized
            .notes
            .push(format!("{count} tensors belong to no network and are left out, {first} first"));
    }
    Ok(())
}

/// What the report says of the factors of a matrix.
fn factors_of(job: &Job, layout: &Layout) -> Option<FactorsReport> {
    let vector = &layout.tensors()[layout.tensors()[job.place].factors?];
    Some(FactorsReport::new(vector.name.clone(), job.factors.as_ref()?))
}

#[allow(clippy::too_many_arguments)]
fn summarize(
    sources: &Sources,
    recognized: Recognized,
    parts: &[&str],
    jobs: &[Job],
    stats: &[Stats],
    settings: &Settings<'_>,
    output: &Path,
    writer: &Writer,
) -> Summary {
    let tensors: Vec<TensorReport> = parts
        .iter()
        .zip(jobs)
        .zip(stats)
        .map(|((part, job), stats)| {
            let matrix = job.spec.kind.shape().is_some() && settings.measure;
            TensorReport {
                name: job.spec.name.clone(),
                source: job.view.name.clone(),
                part: (*part).to_owned(),
                role: job.spec.role,
                shape: report::shape_of(&job.spec.kind),
                from: sources.of(&job.view).tensors[&job.view.name].dtype.name().to_owned(),
                encoding: job.encoding.name().to_owned(),
                bytes: job.bytes,
                factors: factors_of(job, writer.layout()),
                error: matrix.then(|| (stats.error / stats.energy.max(f64::MIN_POSITIVE)).sqrt()),
                largest: stats.largest,
            }
        })
        .collect();
    let mut notes = recognized.notes;
    let replaced: u64 = stats.iter().map(|s| s.not_finite).sum();
    if replaced > 0 {
        notes.push(format!("{replaced} values that were not finite became zeros"));
    }
    Summary {
        output: output.to_owned(),
        file_bytes: writer.layout().file_bytes(),
        source_bytes: jobs.iter().map(|j| sources.of(&j.view).tensors[&j.view.name].bytes()).sum(),
        card: recognized.subject,
        notes,
        parts: report::totals(&tensors, |t| &t.part),
        encodings: report::totals(&tensors, |t| &t.encoding),
        unet_bits_per_weight: report::unet_bits(&tensors, writer.layout()),
        tensors,
    }
}
