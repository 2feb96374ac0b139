//! From a checkpoint's tensors to the bytes of the file: read, reordered, encoded and written in one stream.
//!
//! Memory holds the tensors of one batch as encoded, those of the batch before it on their way to the disk, and a few
//! rows per thread.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::format::Writer;
use engine::graph::weight::{OutputOrder, WeightKind, WeightSpec};
use half::f16;
use kernels::layout::{Encoding, TILE_N, WeightShape};
use kernels::quantize;
use rayon::prelude::*;

use crate::Progress;
use crate::error::Error;
use crate::family::{Sources, Take, View};
use crate::source::{RawTensor, Source};

/// Encoded bytes that are made before they are written.
const BATCH_BYTES: u64 = 16 << 20;
/// Values that one task takes at a time, where a panel isn't more.
const TASK_VALUES: usize = 1 << 16;

/// A tensor to be made.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) spec: WeightSpec,
    pub(crate) encoding: Encoding,
    pub(crate) view: View,
    /// Bytes in the output.
    pub(crate) bytes: u64,
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
    // Tensors that are made, and the first one's place.
    let mut made: (usize, Vec<Vec<u8>>) = (0, Vec::new());
    while stats.len() < jobs.len() {
        if settings.stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
            return Err(Error::Stopped);
        }
        let first = stats.len();
        let batch = &jobs[first..first + batch_len(&jobs[first..])];
        let (written, next) =
            rayon::join(|| write(writer, &made), || encode_batch(sources, batch, settings.measure));
        written?;
        let (buffers, batch_stats) = next?;
        for (job, stats) in batch.iter().zip(&batch_stats) {
            check_values(job, stats, settings.force)?;
            done += sources.of(&job.view).tensors[&job.view.name].bytes();
        }
        stats.extend(batch_stats);
        made = (first, buffers);
        (settings.progress)(Progress { done, total, tensor: &batch[batch.len() - 1].spec.name });
    }
    write(writer, &made)?;
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

fn write(writer: &Writer, (first, buffers): &(usize, Vec<Vec<u8>>)) -> Result<(), Error> {
    buffers.par_iter().enumerate().try_for_each(|(i, bytes)| writer.write(first + i, bytes))?;
    Ok(())
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

fn encode_batch(sources: &Sources, jobs: &[Job], measure: bool) -> Result<(Vec<Vec<u8>>, Vec<Stats>), Error> {
    let rows: Vec<Rows<'_>> = jobs.iter().map(|job| Rows::new(sources, job)).collect::<Result<_, _>>()?;
    let mut buffers: Vec<Vec<u8>> = jobs.iter().map(|job| vec![0; job.bytes as usize]).collect();
    let mut tasks = Vec::new();
    for (i, (rows, buffer)) in rows.iter().zip(&mut buffers).enumerate() {
        let (step, bytes) = rows.task();
        for (part, out) in buffer.chunks_mut(bytes).enumerate() {
            tasks.push(Task { job: i, rows: part * step..((part + 1) * step).min(rows.stored), out });
        }
    }
    let found: Vec<(usize, Stats)> = tasks
        .into_par_iter()
        .map_init(Scratch::default, |scratch, task| {
            let stats = rows[task.job].encode(task.rows, task.out, scratch, measure)?;
            Ok((task.job, stats))
        })
        .collect::<Result<_, Error>>()?;
    let mut stats = vec![Stats::default(); jobs.len()];
    for (job, found) in found {
        let sum = &mut stats[job];
        sum.not_finite += found.not_finite;
        sum.largest = sum.largest.max(found.largest);
        sum.energy += found.energy;
        sum.error += found.error;
    }
    Ok((buffers, stats))
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
struct Rows<'a> {
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
}

impl<'a> Rows<'a> {
    fn new(sources: &'a Sources, job: &'a Job) -> Result<Self, Error> {
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
        Ok(Rows { job, source, tensor, held, first, count, stored: order.stored(count), len, taps, order })
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
        let values: &[f32] = if self.taps == 1 {
            source
        } else {
            values.resize(source.len(), 0.0);
            taps_outermost(source, values, self.taps, self.len);
            values
        };
        match self.job.spec.kind {
            WeightKind::Matrix { .. } => {
                quantize::encode(self.job.encoding, self.shape(rows.len()), values, out);
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
            stats.energy = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            if let WeightKind::Matrix { .. } = self.job.spec.kind {
                let decoded = quantize::decode(self.job.encoding, self.shape(rows.len()), out);
                stats.error = values.iter().zip(&decoded).map(|(v, d)| f64::from(v - d).powi(2)).sum();
            }
        }
        Ok(stats)
    }

    /// Copies the stored rows into `out`; rows of padding stay zero.
    fn gather(&self, rows: Range<usize>, out: &mut [f32], raw: &mut Vec<u8>) -> Result<(), Error> {
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
