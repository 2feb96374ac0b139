//! Calibration: pictures of a few prompts are made with the model in 16 bits, and what its layers see says which rounding
//! errors cancel out.
//!
//! Moments of `k` inputs are `k * (k + 1) / 2` numbers, of all layers together more than a small machine has. So they are
//! gathered for as many layers as there is room for, in the order in which layers are packed, and the pictures are made again
//! for the next ones.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use engine::format::ModelFile;
use engine::graph::{Observer, Seen};
use engine::pipeline::{Control, Pipeline, Request, Settings};
use engine::precision::Precision;
use kernels::Isa;
use kernels::quantize::{Feedback, Moments};
use kernels::view::Operand;
use rayon::prelude::*;
use tempfile::TempDir;

use crate::error::Error;
use crate::pack::Job;
use crate::policy::Quant;
use crate::{Options, convert};

/// Bytes of moments that are held at a time, or those of one batch of layers.
const HELD_BYTES: u64 = 512 << 20;
/// Evaluations of the denoiser for each prompt.
const STEPS: usize = 10;
/// Rows that are looked at in one matrix product.
const ROWS: usize = 256;

/// Moments of the inputs of layers, by the names of their weights.
type Held = Mutex<HashMap<String, Moments>>;

/// The model in 16 bits, and what is known of its layers' inputs.
pub(crate) struct Calibration {
    pipeline: Pipeline,
    requests: Vec<Request>,
    held: Arc<Held>,
    isa: Isa,
    /// Holds the model in 16 bits.
    _folder: TempDir,
}

impl Calibration {
    /// With the prompts in the file `prompts`, one on each line. The model in 16 bits stands beside `output` meanwhile.
    pub(crate) fn new(options: &Options, prompts: &Path, output: &Path) -> Result<Calibration, Error> {
        let text = std::fs::read_to_string(prompts).map_err(Error::io("read", prompts))?;
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            return Err(Error::NoPrompts(prompts.into()));
        }
        let parent = output.parent().filter(|p| *p != Path::new("")).unwrap_or(Path::new("."));
        let builder = tempfile::Builder::new().prefix(".sdconv-").tempdir_in(parent);
        let folder = builder.map_err(Error::io("write to", parent))?;
        let path = folder.path().join("model.sdq");
        let plain = Options {
            output: Some(path.clone()),
            quant: Quant::F16,
            keep: vec![],
            report: None,
            calibrate: None,
            ..options.clone()
        };
        convert(&plain, &|_| {})?;
        let threads = options.threads.unwrap_or_else(Settings::default_threads);
        let settings = Settings { precision: Precision::High, threads, ..Settings::default() };
        let isa = settings.isa;
        let held = Arc::new(Held::default());
        let seen = Arc::clone(&held);
        let observer = Observer::new(move |product: Seen<'_>| {
            if let Some(moments) = locked(&seen).get_mut(product.name) {
                add(moments, isa, product.operand, product.stride);
            }
        });
        let pipeline = Pipeline::new(ModelFile::open(&path)?, settings)?.observed(observer);
        let requests = lines.into_iter().zip(0..).map(|(prompt, seed)| {
            let request = Request::new(prompt, pipeline.card());
            let steps = STEPS.min(request.steps);
            Request { seed, steps, ..request }
        });
        let requests = requests.collect();
        Ok(Calibration { pipeline, requests, held, isa, _folder: folder })
    }

    /// Makes sure that the first `batch` of `upcoming` have their moments, those of all others gone.
    pub(crate) fn prepare(
        &self,
        upcoming: &[Job],
        batch: usize,
        stop: Option<&AtomicBool>,
    ) -> Result<(), Error> {
        let quantized = |job: &&Job| job.encoding.is_integer();
        if upcoming[..batch]
            .iter()
            .filter(quantized)
            .all(|job| locked(&self.held).contains_key(&job.spec.name))
        {
            return Ok(());
        }
        let mut next = HashMap::new();
        let mut bytes = 0;
        for (i, job) in upcoming.iter().enumerate().filter(|(_, job)| quantized(job)) {
            let Some(shape) = job.spec.kind.shape() else { continue };
            bytes += 4 * Moments::len(shape.k) as u64;
            if i >= batch && bytes > HELD_BYTES {
                break;
            }
            next.insert(job.spec.name.clone(), Moments::new(shape.k));
        }
        *locked(&self.held) = next;
        let go_on = || match stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            true => Control::Stop,
            false => Control::Continue,
        };
        for request in &self.requests {
            self.pipeline.generate(request, &mut |_| go_on())?;
        }
        Ok(())
    }

    /// How rounding errors of a weight are fed back; `None` where its inputs were not seen often enough.
    pub(crate) fn feedback(&self, job: &Job) -> Option<Feedback> {
        let mut moments = locked(&self.held).remove(&job.spec.name)?;
        if let Some(factors) = &job.factors {
            moments.multiply(factors); // what the weights will meet
        }
        Feedback::new(self.isa, moments)
    }

    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }
}

fn locked(held: &Held) -> MutexGuard<'_, HashMap<String, Moments>> {
    held.lock().expect("nothing panics with it")
}

/// Adds some rows of the operand, evenly spread.
fn add(moments: &mut Moments, isa: Isa, operand: Operand<'_>, stride: usize) {
    let k = moments.inputs();
    let all = match operand {
        Operand::Bf16(rows) => rows.len() / stride,
        Operand::F32(rows) => rows.len() / stride,
        Operand::U8 { .. } | Operand::U8Uniform { .. } => unreachable!("16-bit weights meet 16-bit rows"),
    };
    let count = all.min(ROWS);
    let mut rows = Vec::with_capacity(count * k);
    for i in 0..count {
        let at = i * all / count * stride;
        match operand {
            Operand::Bf16(x) => rows.extend(x[at..at + k].iter().map(|x| x.to_f32())),
            Operand::F32(x) => rows.extend_from_slice(&x[at..at + k]),
            Operand::U8 { .. } | Operand::U8Uniform { .. } => {}
        }
    }
    moments.add(isa, &rows, |lines, line| lines.into_par_iter().with_min_len(16).for_each(line));
}
