//! From a checkpoint's tensors to the bytes of the file: read, reordered, encoded and written in one stream.
//!
//! Memory holds the tensors of one batch as encoded, those of the batch before it on their way to the disk, and a few
//! rows per thread.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::format::Writer;
use engine::graph::weight::{OutputOrder, WeightKind, WeightSpec};
use half::f16;
use kernels::Isa;
use kernels::layout::{Encoding, TILE_N, WeightShape};
use kernels::quantize::{self, Feedback};
use rayon::prelude::*;

use crate::Progress;
use crate::calibrate::Calibration;
use crate::error::Error;
use crate::factors::Factors;
use crate::family::{Sources, Take, View};
use crate::source::{RawTensor, Source};

/// Encoded bytes that are made before they are written.
const BATCH_BYTES: u64 = 16 << 20;
/// Values that one task takes at a time, where a panel isn't more.
const TASK_VALUES: usize = 1 << 16;

/// A tensor to be made.
#[derive(Debug)]
pub(crate) struct Job {
    /// Place in the output.
    pub(crate) place: usize,
    pub(crate) spec: WeightSpec,
    pub(crate) encoding: Encoding,
    pub(crate) view: View,
    /// Bytes in the output.
    pub(crate) bytes: u64,
    /// What weights of each input are divided by.
    pub(crate) factors: Option<Factors>,
}

impl Job {
    /// To be looked at only.
    pub(crate) fn new(spec: WeightSpec, encoding: Encoding, view: View) -> Job {
        Job { place: 0, spec, encoding, view, bytes: 0, factors: None }
    }
}

/// What was found while a tensor was made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stats {
    /// Values that are not finite; zero stands in their place.
    pub(crate) not_finite: u64,
    /// Largest magnitude.
    pub(crate) largest: f32,
    /// Sum of the squares.
    pub(crate) energy: f64,
    /// Sum of the squares of what the encoding changed.
    pub(crate) error: f64,
}

/// How the stream is to behave.
pub(crate) struct Settings<'a> {
    /// Whether the error of each tensor is wanted.
    pub(crate) measure: bool,
    /// Whether values that are not finite may pass as zeros.
    pub(crate) force: bool,
    pub(crate) stop: Option<&'a AtomicBool>,
    pub(crate) progress: &'a (dyn Fn(Progress<'_>) + Sync),
    pub(crate) calibration: Option<&'a Calibration>,
}

/// Checks that the checkpoint's shape is the one that the network has.
pub(crate) fn check_shape(spec: &WeightSpec, tensor: &str, found: &[usize]) -> Result<(), Error> {
    let expected = match spec.kind {
        WeightKind::Matrix { n, kh: 1, kw: 1, k, .. } => vec![n, k],
        WeightKind::Matrix { n, kh, kw, k, .. } => vec![n, k, kh, kw],
        WeightKind::Vector { len, .. } => vec![len],
        WeightKind::Table { rows, cols } => vec![rows, cols],
    };
    let rest = found.strip_prefix(expected.as_slice());
    if rest.is_some_and(|rest| rest.iter().all(|&n| n == 1)) {
        return Ok(());
    }
    Err(Error::Shape { tensor: tensor.to_owned(), found: found.to_vec(), expected })
}

/// Makes and writes all tensors. Returns what was found, in the order of the jobs.
pub(crate) fn run(
    sources: &Sources,
    jobs: &[Job],
    writer: &Writer,
    settings: &Settings<'_>,
) -> Result<Vec<Stats>, Error> {
    let total = jobs.iter().map(|j| sources.of(&j.view).tensors[&j.view.name].bytes()).sum();
    let mut done = 0;
    let mut stats = Vec::with_capacity(jobs.len());
    let largest = jobs.iter().map(|j| j.bytes).max().unwrap_or(0).max(BATCH_BYTES);
    // One is made while the other is written; only the first has room for a tensor larger than a batch.
    let (mut wide, mut narrow) = (Batch::with_capacity(largest), Batch::with_capacity(BATCH_BYTES));
    let mut wide_is_next = true;
    let scratch = Mutex::new(Vec::new());
    while stats.len() < jobs.len() {
        if settings.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Err(Error::Stopped);
        }
        let first = stats.len();
        let batch = &jobs[first..first + batch_len(&jobs[first..])];
        if let Some(calibration) = settings.calibration {
            calibration.prepare(&jobs[first..], batch.len(), settings.stop)?;
        }
        if !wide_is_next && batch.len() == 1 && batch[0].bytes > BATCH_BYTES {
            wide.write(writer)?;
            wide_is_next = true;
        }
        let (next, made) = if wide_is_next { (&mut wide, &mut narrow) } else { (&mut narrow, &mut wide) };
        let (written, found) =
            rayon::join(|| made.write(writer), || next.encode(sources, batch, settings, &scratch));
        written?;
        let found = found?;
        for (job, found) in batch.iter().zip(&found) {
            check_values(job, found, settings.force)?;
            done += sources.of(&job.view).tensors[&job.view.name].bytes();
        }
        stats.extend(found);
        wide_is_next = !wide_is_next;
        (settings.progress)(Progress { done, total, tensor: &batch[batch.len() - 1].spec.name });
    }
    wide.write(writer)?;
    narrow.write(writer)?;
    Ok(stats)
}

/// How many jobs make a batch: at least one.
fn batch_len(jobs: &[Job]) -> usize {
    let mut bytes = 0;
    let fits = jobs.iter().take_while(|job| {
        bytes += job.bytes;
        bytes <= BATCH_BYTES
    });
    fits.count().max(1)
}

fn check_values(job: &Job, stats: &Stats, force: bool) -> Result<(), Error> {
    if stats.not_finite > 0 && !force {
        return Err(Error::NotFinite { tensor: job.view.name.clone(), count: stats.not_finite });
    }
    if job.encoding == Encoding::F16 && stats.largest > f16::MAX.to_f32() {
        let (tensor, encoding) = (job.spec.name.clone(), job.encoding.name());
        return Err(Error::Overflow { tensor, largest: stats.largest, encoding });
    }
    Ok(())
}

/// A run of rows of one tensor, and where their bytes go.
struct Task<'a> {
    job: usize,
    /// Rows as stored.
    rows: Range<usize>,
    out: &'a mut [u8],
}

/// Tensors that are made and not yet written.
struct Batch {
    /// Place and bytes of each.
    places: Vec<(usize, usize)>,
    bytes: Vec<u8>,
}

impl Batch {
    fn with_capacity(bytes: u64) -> Batch {
        Batch { places: Vec::new(), bytes: Vec::with_capacity(bytes as usize) }
    }

    /// Writes the tensors, and is empty.
    fn write(&mut self, writer: &Writer) -> Result<(), Error> {
        let mut rest = self.bytes.as_slice();
        let of = |&(place, len)| (place, rest.split_off(..len).expect("as made"));
        let tensors: Vec<(usize, &[u8])> = self.places.iter().map(of).collect();
        tensors.par_iter().try_for_each(|&(place, bytes)| writer.write(place, bytes))?;
        self.places.clear();
        Ok(())
    }

    /// Makes the tensors of these jobs.
    fn encode(
        &mut self,
        sources: &Sources,
        jobs: &[Job],
        settings: &Settings<'_>,
        scratch: &Mutex<Vec<Scratch>>,
    ) -> Result<Vec<Stats>, Error> {
        let rows: Vec<Rows<'_>> = jobs
            .par_iter()
            .map(|job| {
                let feedback = settings.calibration.and_then(|c| Some((c.feedback(job)?, c.isa())));
                Ok(Rows { feedback, ..Rows::new(sources, job)? })
            })
            .collect::<Result<_, Error>>()?;
        self.places = jobs.iter().map(|job| (job.place, job.bytes as usize)).collect();
        self.bytes.resize(self.places.iter().map(|(_, len)| len).sum(), 0);
        let mut tasks = Vec::new();
        let mut rest = self.bytes.as_mut_slice();
        for (i, (rows, &(_, len))) in rows.iter().zip(&self.places).enumerate() {
            let (step, bytes) = rows.task();
            let buffer = rest.split_off_mut(..len).expect("as long as all tensors");
            for (part, out) in buffer.chunks_mut(bytes).enumerate() {
                tasks.push(Task { job: i, rows: part * step..((part + 1) * step).min(rows.stored), out });
            }
        }
        let run = |task: Task<'_>| {
            let mut own = scratch.lock().expect("no task panics with it").pop().unwrap_or_default();
            let stats = rows[task.job].encode(task.rows, task.out, &mut own, settings.measure)?;
            scratch.lock().expect("no task panics with it").push(own);
            Ok((task.job, stats))
        };
        let found: Vec<(usize, Stats)> = tasks.into_par_iter().map(run).collect::<Result<_, Error>>()?;
        let mut stats = vec![Stats::default(); jobs.len()];
        for (job, found) in found {
            let sum = &mut stats[job];
            sum.not_finite += found.not_finite;
            sum.largest = sum.largest.max(found.largest);
            sum.energy += found.energy;
            sum.error += found.error;
        }
        Ok(stats)
    }
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    raw: Vec<u8>,
    /// Rows as the checkpoint has them.
    source: Vec<f32>,
    /// Rows as the encoder takes them, taps outermost.
    rows: Vec<f32>,
}

/// The rows of a tensor, from the checkpoint to the encoder.
pub(crate) struct Rows<'a> {
    job: &'a Job,
    source: &'a Source,
    tensor: &'a RawTensor,
    /// All values, where rows can't be read one by one.
    held: Option<Vec<f32>>,
    /// First row of the checkpoint's tensor that belongs to this one.
    first: usize,
    /// Rows of this tensor in the checkpoint, and as stored.
    count: usize,
    stored: usize,
    /// Values per row.
    len: usize,
    taps: usize,
    order: OutputOrder,
    /// Where rounding errors go, after calibration.
    feedback: Option<(Feedback, Isa)>,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(sources: &'a Sources, job: &'a Job) -> Result<Self, Error> {
        let source = sources.of(&job.view);
        let tensor = &source.tensors[&job.view.name];
        if !tensor.dtype.is_float() {
            let (tensor, dtype) = (job.view.name.clone(), tensor.dtype.name().to_owned());
            return Err(Error::Dtype { tensor, dtype });
        }
        let (count, len, taps, order) = match job.spec.kind {
            WeightKind::Matrix { n, kh, kw, k, order } => (n, kh * kw * k, kh * kw, order),
            WeightKind::Vector { len, order } => (len, 1, 1, order),
            WeightKind::Table { rows, cols } => (rows, cols, 1, OutputOrder::Plain),
        };
        let (block, _) = tensor.dtype.block();
        let by_row =
            job.view.take != Take::Transposed && Source::is_contiguous(tensor) && len.is_multiple_of(block);
        let held = match (by_row, job.view.take) {
            (true, _) => None,
            (false, Take::Transposed) => Some(transposed(&source.read_all(tensor)?, count, len)),
            (false, _) => Some(source.read_all(tensor)?),
        };
        let first = if let Take::Third(third) = job.view.take { third * count } else { 0 };
        let stored = order.stored(count);
        Ok(Rows { job, source, tensor, held, first, count, stored, len, taps, order, feedback: None })
    }

    /// Rows of a task, and the bytes they become.
    fn task(&self) -> (usize, usize) {
        let rows = (TASK_VALUES / self.len).max(1).next_multiple_of(TILE_N);
        let bytes = match self.job.spec.kind {
            WeightKind::Matrix { .. } => self.shape(rows).bytes(self.job.encoding),
            WeightKind::Vector { .. } => rows * 4,
            WeightKind::Table { .. } => rows * self.len * 2,
        };
        (rows, bytes)
    }

    fn shape(&self, rows: usize) -> WeightShape {
        WeightShape { n: rows, taps: self.taps, k: self.len / self.taps }
    }

    fn encode(
        &self,
        rows: Range<usize>,
        out: &mut [u8],
        scratch: &mut Scratch,
        measure: bool,
    ) -> Result<Stats, Error> {
        let Scratch { raw, source, rows: values } = scratch;
        source.resize(rows.len() * self.len, 0.0);
        self.gather(rows.clone(), source, raw)?;
        let mut stats = Stats { largest: largest(source), ..Stats::default() };
        if !stats.largest.is_finite() {
            for value in source.iter_mut().filter(|v| !v.is_finite()) {
                stats.not_finite += 1;
                *value = 0.0;
            }
            stats.largest = largest(source);
        }
        if let Some(factors) = &self.job.factors {
            let inputs = source.chunks_exact_mut(self.taps).zip(factors.iter().cycle());
            inputs.for_each(|(weights, f)| weights.iter_mut().for_each(|w| *w /= f));
        }
        let values: &[f32] = if self.taps == 1 {
            source
        } else {
            values.resize(source.len(), 0.0);
            taps_outermost(source, values, self.taps, self.len);
            values
        };
        match self.job.spec.kind {
            WeightKind::Matrix { .. } => {
                let (encoding, shape) = (self.job.encoding, self.shape(rows.len()));
                match &self.feedback {
                    Some((feedback, isa)) => {
                        quantize::encode_with(encoding, shape, values, feedback, *isa, out);
                    }
                    None => quantize::encode(encoding, shape, values, out),
                }
            }
            WeightKind::Vector { .. } => {
                out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes());
            }
            WeightKind::Table { .. } => {
                let words = out.as_chunks_mut().0.iter_mut();
                words.zip(values).for_each(|(o, v)| *o = f16::from_f32(*v).to_le_bytes());
            }
        }
        if measure {
            // As the matrix was before it was divided.
            let factor = |i: usize| self.job.factors.as_ref().map_or(1.0, |f| f[i % f.len()]);
            let square = |(i, x): (usize, f32)| f64::from(x * factor(i)).powi(2);
            stats.energy = values.iter().copied().enumerate().map(square).sum();
            if let WeightKind::Matrix { .. } = self.job.spec.kind {
                let decoded = quantize::decode(self.job.encoding, self.shape(rows.len()), out);
                let errors = values.iter().zip(&decoded).map(|(v, d)| v - d);
                stats.error = errors.enumerate().map(square).sum();
            }
        }
        Ok(stats)
    }

    /// Copies the stored rows into `out`; rows of padding stay zero.
    pub(crate) fn gather(&self, rows: Range<usize>, out: &mut [f32], raw: &mut Vec<u8>) -> Result<(), Error> {
        let mut at = rows.start;
        while at < rows.end {
            let Some(from) = self.order.source(self.count, at) else {
                out[(at - rows.start) * self.len..][..self.len].fill(0.0);
                at += 1;
                continue;
            };
            // Rows that follow each other in the checkpoint are read together.
            let next = |i: usize| self.order.source(self.count, at + i) == Some(from + i);
            let run = (1..rows.end - at).take_while(|&i| next(i)).count() + 1;
            let out = &mut out[(at - rows.start) * self.len..][..run * self.len];
            let start = (self.first + from) * self.len;
            match &self.held {
                Some(values) => out.copy_from_slice(&values[start..start + out.len()]),
                None => self.read(start, out, raw)?,
            }
            at += run;
        }
        Ok(())
    }

    fn read(&self, start: usize, out: &mut [f32], raw: &mut Vec<u8>) -> Result<(), Error> {
        self.source.read(self.tensor, start, out, raw)
    }
}

/// The largest magnitude; infinite or NaN where a value is.
fn largest(values: &[f32]) -> f32 {
    // Without their signs, numbers are ordered as their bits are, and NaNs come last.
    let bits = |v: &f32| (v.to_bits() & 0x7FFF_FFFF) as i32;
    f32::from_bits(values.iter().map(bits).fold(0, i32::max) as u32)
}

/// `[rows, k, taps]` to `[rows, taps, k]`.
fn taps_outermost(source: &[f32], out: &mut [f32], taps: usize, len: usize) {
    /// Channels that are moved at a time, so that what is read stays in the cache for all taps.
    const CHANNELS: usize = 64;
    let k = len / taps;
    for (source, out) in source.chunks_exact(len).zip(out.chunks_exact_mut(len)) {
        for (block, source) in source.chunks(CHANNELS * taps).enumerate() {
            for tap in 0..taps {
                let out = &mut out[tap * k + block * CHANNELS..][..source.len() / taps];
                out.iter_mut().zip(source[tap..].iter().step_by(taps)).for_each(|(o, s)| *o = *s);
            }
        }
    }
}

/// `[cols, rows]` to `[rows, cols]`.
fn transposed(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..rows * cols).map(|i| values[i % cols * rows + i / cols]).collect()
}
