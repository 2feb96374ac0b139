//! What `--json` prints.

use engine::format::ModelFile;
use engine::pipeline::{Memory, Pipeline, Timings};
use serde::Serialize;

/// `gen --json`
#[derive(Debug, Serialize)]
pub(crate) struct Generated {
    version: &'static str,
    model: Model,
    isa: &'static str,
    threads: usize,
    precision: &'static str,
    pub(crate) images: Vec<Image>,
    pub(crate) timings: Timings,
    pub(crate) memory: Memory,
}

/// The model.
#[derive(Debug, Serialize)]
pub(crate) struct Model {
    family: engine::card::Family,
    quant: String,
    file_bytes: u64,
    /// Name of the VAE, where it isn't the model's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    vae: Option<String>,
}

/// One picture.
#[derive(Debug, Serialize)]
pub(crate) struct Image {
    pub(crate) path: String,
    pub(crate) seed: u64,
    pub(crate) width: usize,
    pub(crate) height: usize,
}

impl Model {
    fn new(file: &ModelFile, vae: Option<String>) -> Model {
        let card = file.card();
        let (quant, file_bytes) = (card.provenance.quant.clone(), file.file_bytes());
        Model { family: card.family, quant, file_bytes, vae }
    }
}

impl Generated {
    /// Of pictures that `pipeline` makes, with another VAE than the model's where that has a name.
    pub(crate) fn new(pipeline: &Pipeline, vae: Option<String>) -> Generated {
        let settings = pipeline.settings();
        Generated {
            version: env!("CARGO_PKG_VERSION"),
            model: Model::new(pipeline.file(), vae),
            isa: settings.isa.name(),
            threads: settings.threads,
            precision: settings.precision.name(),
            images: vec![],
            timings: Timings::default(),
            memory: Memory::default(),
        }
    }

    /// Adds a picture.
    pub(crate) fn add(&mut self, image: Image, timings: &Timings, memory: &Memory) {
        self.add_unseen(timings, memory);
        self.images.push(image);
    }

    /// Adds what a picture took: times add up, memory is the most that any of them took.
    pub(crate) fn add_unseen(&mut self, timings: &Timings, memory: &Memory) {
        let sum = &mut self.timings;
        if sum.steps_s.is_empty() {
            sum.open_s = timings.open_s;
            sum.total_s = timings.open_s;
        }
        sum.text_s += timings.text_s;
        sum.steps_s.extend_from_slice(&timings.steps_s);
        sum.vae_s += timings.vae_s;
        sum.total_s += timings.total_s - timings.open_s;
        if memory.predicted_peak_bytes >= self.memory.predicted_peak_bytes {
            self.memory = memory.clone();
        }
    }
}

/// JSON for people and programs.
pub(crate) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).expect("reports are plain data")
}

/// The name that a card has for a value.
pub(crate) fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).expect("names are plain data");
    value.as_str().unwrap_or_default().to_string()
}
