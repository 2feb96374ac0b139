//! `sdfast compare`: what quantization costs, along fixed trajectories and in whole pictures.
//!
//! The first model at `exact` is the reference. A sampler's trajectory is chaotic, so noise predictions are compared for
//! what the network saw along the reference's run; latents and pictures are those of each model's own run.
#![forbid(unsafe_code)]

mod layers;
pub mod measure;
pub mod numpy;
pub mod score;
pub mod trajectory;

use std::fmt::Write as _;
use std::path::Path;

use engine::format::ModelFile;
use engine::pipeline::{Pipeline, Request, Settings};
use engine::precision::Precision;

use crate::args::Compare;
use crate::failure::{Failure, Result};
use crate::output::Output;
use crate::progress::{Level, Progress};
use crate::{interrupt, model, picture, terminal};
use measure::{median, psnr, relative_error, ssim, worst};
use trajectory::Trajectory;

/// Columns of latent errors in the table: so many steps of the run.
const STEPS_SHOWN: usize = 5;
/// Weights in the table of the largest errors.
const WEIGHTS_SHOWN: usize = 12;
/// Layers in the table of the largest errors.
const LAYERS_SHOWN: usize = 12;

pub(crate) fn run(arguments: &Compare) -> Result<()> {
    let level = Level::from(arguments.voice);
    let requests = requests(arguments)?;
    let folder = arguments.output.clone();
    std::fs::create_dir_all(&folder).map_err(|e| Failure::io("create", &folder, &e))?;
    let sheet = Output::new(folder.join("sheet.png"))?;
    let table = Output::new(folder.join("compare.md"))?;
    let settings = Settings {
        threads: arguments.threads.map_or_else(Settings::default_threads, usize::from),
        isa: model::picked_isa(arguments.isa)?,
        ..Settings::default()
    };
    let mut candidates = vec![];
    for path in &arguments.models {
        for &precision in &arguments.precision {
            candidates.push((path.as_path(), precision.into()));
        }
    }
    let open = |path: &Path, precision: Precision| -> Result<Pipeline> {
        Ok(Pipeline::new(ModelFile::open(path)?, Settings { precision, ..settings.clone() })?)
    };

    let progress = Progress::new(level, "compare");
    let all = (requests.len() * (1 + candidates.len())) as u64;
    let reference = open(&arguments.models[0], Precision::Exact)?;
    let width = requests[0].width;
    let mut runs = vec![];
    for request in &requests {
        runs.push(trajectory::run(&reference, request, &interrupt::control)?);
        progress.at(runs.len() as u64, all, &format!("reference {} of {}", runs.len(), requests.len()));
    }
    let mut columns = vec![runs.iter().map(|run| run.rgb8.clone()).collect::<Vec<_>>()];
    let mut rows = vec![];
    let mut lists = String::new();
    for (path, precision) in candidates {
        let pipeline = open(path, precision)?;
        let mut row = Row::new(path, &pipeline);
        let mut pictures = vec![];
        for (request, want) in requests.iter().zip(&runs) {
            row.noise.extend(trajectory::errors(&pipeline, request, want, 1, &interrupt::control)?);
            let got = trajectory::run(&pipeline, request, &interrupt::control)?;
            row.add(&got, want, width);
            pictures.push(got.rgb8);
            let done = runs.len() * (rows.len() + 1) + pictures.len();
            progress.at(done as u64, all, &format!("{} {precision}", row.name));
        }
        if let Some(stride) = arguments.score {
            row.score = Some(prompt_score(&pipeline, stride.into())?);
        }
        columns.push(pictures);
        rows.push(row);
        if arguments.layers {
            let exact = open(&arguments.models[0], Precision::Exact)?;
            let errors = layers::errors(exact, pipeline, &requests[0], &runs[0], &interrupt::control)?;
            lists += &layer_table(rows.last().expect("just pushed"), &errors, path)?;
        }
    }
    drop(progress);

    let mut text = report(&rows, &requests[0], requests.len()) + &lists;
    if arguments.weights {
        for path in &arguments.models[1..] {
            text += &weights(reference.file(), &ModelFile::open(path)?, path);
        }
    }
    table.write(text.as_bytes())?;
    sheet.write(&contact_sheet(&columns, width))?;
    terminal::print(&text);
    level.say(&format!("{} and {}", table.path().display(), sheet.path().display()));
    Ok(())
}

/// One for each prompt and seed.
fn requests(arguments: &Compare) -> Result<Vec<Request>> {
    let file = ModelFile::open(&arguments.models[0])?;
    let mut prompts = arguments.prompt.clone();
    if let Some(path) = &arguments.prompts {
        let text = std::fs::read_to_string(path).map_err(|e| Failure::io("read", path, &e))?;
        prompts.extend(text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from));
    }
    if prompts.is_empty() {
        return Err(Failure::new("no prompt is given").hint("add --prompt TEXT or --prompts FILE"));
    }
    let mut requests = vec![];
    for prompt in prompts {
        for seed in arguments.seed..arguments.seed + u64::from(arguments.count) {
            let mut request = Request::new(prompt.clone(), file.card());
            request.seed = seed;
            request.steps = arguments.steps.unwrap_or(request.steps);
            request.guidance_scale = arguments.cfg.unwrap_or(request.guidance_scale);
            request.width = arguments.width.unwrap_or(request.width);
            request.height = arguments.height.unwrap_or(request.height);
            request.sampler = arguments.sampler.clone().unwrap_or(request.sampler);
            request.validate(file.card())?;
            requests.push(request);
        }
    }
    Ok(requests)
}

/// What was found of a model at a precision.
struct Row {
    name: String,
    precision: Precision,
    /// Relative errors of noise predictions along the reference.
    noise: Vec<f64>,
    /// Relative errors of the latents after each step, for each picture.
    latents: Vec<Vec<f64>>,
    psnr: Vec<f64>,
    ssim: Vec<f64>,
    /// Prompts whose pictures show what they say, and all that were drawn.
    score: Option<(usize, usize)>,
}

impl Row {
    fn new(path: &Path, pipeline: &Pipeline) -> Row {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let precision = pipeline.settings().precision;
        Row { name, precision, noise: vec![], latents: vec![], psnr: vec![], ssim: vec![], score: None }
    }

    fn add(&mut self, got: &Trajectory, want: &Trajectory, width: usize) {
        let pairs = got.latents.iter().zip(&want.latents);
        self.latents.push(pairs.map(|(got, want)| relative_error(got, want)).collect());
        self.psnr.push(psnr(&got.rgb8, &want.rgb8));
        self.ssim.push(ssim(&got.rgb8, &want.rgb8, width));
    }
}

/// The Markdown table.
fn report(rows: &[Row], request: &Request, pictures: usize) -> String {
    let evaluations = rows.first().and_then(|row| row.latents.first()).map_or(0, Vec::len);
    let count = STEPS_SHOWN.min(evaluations);
    let shown: Vec<usize> = (1..=count).map(|i| i * evaluations / count - 1).collect();
    let mut text = format!(
        "{pictures} pictures of {}x{}, {} steps of {}, guidance {:?}. Medians; errors relative to the first model at exact.\n\n",
        request.width, request.height, request.steps, request.sampler, request.guidance_scale
    );
    text += "| model | precision | noise prediction | worst |";
    shown.iter().for_each(|i| text += &format!(" latents, step {} |", i + 1));
    let scored = rows.iter().any(|row| row.score.is_some());
    text += " PSNR, dB | worst | SSIM | worst |";
    text += if scored { " prompts right |\n|---|---|" } else { "\n|---|---|" };
    text += &"--:|".repeat(6 + shown.len() + usize::from(scored));
    for row in rows {
        let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
        let noise = (median(&row.noise), worst(&row.noise));
        let _ = write!(text, "\n| {} | {} | {:.4} | {:.4} |", row.name, row.precision, noise.0, noise.1);
        for &i in &shown {
            let errors: Vec<f64> = row.latents.iter().map(|errors| errors[i]).collect();
            let _ = write!(text, " {:.4} |", median(&errors));
        }
        let (psnr, ssim) = (&row.psnr, &row.ssim);
        let _ = write!(text, " {:.1} | {:.1} |", median(psnr), least(psnr));
        let _ = write!(text, " {:.4} | {:.4} |", median(ssim), least(ssim));
        if let Some((passed, drawn)) = row.score {
            let _ = write!(text, " {passed} of {drawn} |");
        }
    }
    text
}

/// Prompts of the demo model's score that pass, and all that were drawn.
fn prompt_score(pipeline: &Pipeline, stride: usize) -> Result<(usize, usize)> {
    if !score::applies_to(pipeline) {
        return Err(Failure::new("prompts are scored for the demo model only").hint("leave out --score"));
    }
    let (passed, drawn) = score::score(pipeline, stride, &interrupt::control)?;
    Ok((passed.len(), drawn.len()))
}

/// The products of a model that are off most, given exact inputs.
fn layer_table(row: &Row, errors: &[(String, f64)], path: &Path) -> Result<String> {
    let file = ModelFile::open(path)?;
    let all: Vec<f64> = errors.iter().map(|(_, error)| *error).collect();
    let mut text = format!(
        "\n\nLayers of {} at {}, given exact inputs: the median is off by {:.4}. The largest errors:\n\n\
         | layer | encoding | error |\n|---|---|--:|",
        row.name,
        row.precision,
        median(&all)
    );
    for (name, error) in errors.iter().take(LAYERS_SHOWN) {
        let tensor = file.tensor(&format!("{name}.weight")).expect("a layer has a weight");
        let _ = write!(text, "\n| {name} | {} | {error:.4} |", tensor.encoding.name());
    }
    Ok(text)
}

/// The matrices of `other` that are furthest from those of `reference`.
fn weights(reference: &ModelFile, other: &ModelFile, path: &Path) -> String {
    let mut errors = vec![];
    for (tensor, same) in other.tensors().iter().filter_map(|t| Some((t, reference.tensor(&t.name)?))) {
        let Some(shape) = tensor.kind.shape().filter(|_| tensor.kind == same.kind) else { continue };
        let [got, want] = [(other, tensor), (reference, same)].map(|(file, tensor)| {
            let mut numbers = kernels::quantize::decode(tensor.encoding, shape, file.bytes(tensor));
            if let Some(factors) = file.factors(tensor) {
                numbers.iter_mut().zip(factors.iter().cycle()).for_each(|(x, f)| *x *= f);
            }
            numbers
        });
        errors.push((relative_error(&got, &want), tensor.encoding, tensor.name.as_str()));
    }
    errors.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut text = format!(
        "\n\nWeights of {}, the largest errors:\n\n| weight | encoding | error |\n|---|---|--:|",
        path.display()
    );
    for (error, encoding, name) in errors.iter().take(WEIGHTS_SHOWN) {
        let _ = write!(text, "\n| {name} | {} | {error:.4} |", encoding.name());
    }
    text
}

/// Pixels between pictures of the contact sheet.
const GAP: usize = 4;

/// A PNG file of all pictures: a row for each request, first the reference's, then the candidates' in the order of the
/// table.
fn contact_sheet(columns: &[Vec<Vec<u8>>], width: usize) -> Vec<u8> {
    let height = columns[0][0].len() / 3 / width;
    let full_width = columns.len() * (width + GAP) - GAP;
    let full_height = columns[0].len() * (height + GAP) - GAP;
    let mut sheet = vec![255; full_width * full_height * 3];
    for (x, column) in columns.iter().enumerate() {
        for (y, picture) in column.iter().enumerate() {
            for (line, pixels) in picture.chunks_exact(3 * width).enumerate() {
                let at = (y * (height + GAP) + line) * full_width + x * (width + GAP);
                sheet[3 * at..][..3 * width].copy_from_slice(pixels);
            }
        }
    }
    picture::encode_rgb8(&sheet, full_width, None)
}
