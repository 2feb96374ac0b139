//! What the silicon can do, measured: the figures that a kernel's speed is compared with, in the same run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::gemm::{Epilogue, Filter, Gemm, GemmKernel, Types, gemm_with, kernels, pick};
use crate::layout::{Encoding, Weight, WeightShape};
use crate::view::{ImageShape, Operand, RowsMut};
use crate::{Isa, Workers, bf16};

/// How long a figure is measured. The best of many short batches counts, so that other work on the machine doesn't.
const MEASURING: Duration = Duration::from_millis(300);
/// How long a batch of register work takes, about.
const BATCH: Duration = Duration::from_millis(1);

/// One kernel at one shape.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GemmFigure {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Rows.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Billions of operations per second; a multiplication and its addition are two.
    pub gops: f64,
    /// `gops` divided by the rate of the same multiplications on registers.
    pub ceiling_ratio: f64,
    /// Whether calls with this kernel's operand get it.
    pub picked: bool,
}

/// The rate of `kernel`'s multiplications on registers, on all workers at once, in billions of operations per second.
///
/// # Panics
/// Where the machine lacks the kernel's tier.
pub fn peak_gops(workers: &Workers, kernel: &GemmKernel) -> f64 {
    let mut peak = PeakMeter::new(workers, kernel);
    let start = Instant::now();
    while start.elapsed() < MEASURING {
        peak.batch();
    }
    peak.best
}

/// Every kernel that a machine of tier `isa` runs, on `m` rows by `[n, k]` weights: 8-bit weights for the integer kernels,
/// the kernel's own numbers for the others; from operand rows to f32 rows with a bias.
pub fn gemm_figures(workers: &Workers, isa: Isa, m: usize, n: usize, k: usize) -> Vec<GemmFigure> {
    let runs = |kernel: &&&GemmKernel| isa.includes(kernel.isa) && kernel.isa.is_available();
    kernels().iter().filter(runs).map(|kernel| gemm_figure(workers, isa, kernel, m, n, k)).collect()
}

fn gemm_figure(
    workers: &Workers,
    isa: Isa,
    kernel: &'static GemmKernel,
    m: usize,
    n: usize,
    k: usize,
) -> GemmFigure {
    let encoding = match kernel.types {
        Types::U8S8 | Types::S16S16 => Encoding::Q8,
        Types::Bf16 => Encoding::Bf16,
        Types::F32 => Encoding::F32,
    };
    let shape = WeightShape::linear(n, k);
    let elements = m * shape.k_padded();
    let (codes, scale) = (vec![129u8; elements], vec![1.0f32; m]);
    let wide = vec![bf16::ONE; if kernel.types == Types::Bf16 { elements } else { 0 }];
    let floats = vec![1.0f32; if kernel.types == Types::F32 { elements } else { 0 }];
    let bytes = Lines::new(shape.bytes(encoding));
    let bias = vec![0.5f32; n];
    let mut out = vec![0.0f32; m * n];
    let operand = match kernel.types {
        Types::U8S8 | Types::S16S16 => Operand::U8 { codes: &codes, scale: &scale },
        Types::Bf16 => Operand::Bf16(&wide),
        Types::F32 => Operand::F32(&floats),
    };
    let picked = pick(isa, &operand, encoding).name == kernel.name;

    let mut peak = PeakMeter::new(workers, kernel);
    let mut seconds = f64::INFINITY;
    let start = Instant::now();
    while seconds == f64::INFINITY || start.elapsed() < 2 * MEASURING {
        peak.batch();
        let call = Gemm {
            operand,
            input: ImageShape::rows(m),
            filter: Filter::POINT,
            weight: Weight::new(encoding, shape, bytes.get()),
            epilogue: Epilogue { bias: Some(&bias), ..Epilogue::default() },
            out: RowsMut::F32(&mut out),
        };
        let start = Instant::now();
        gemm_with(workers, kernel, call);
        seconds = seconds.min(start.elapsed().as_secs_f64());
        black_box(&mut out);
    }
    let gops = 2.0 * (m * n * k) as f64 / seconds / 1e9;
    GemmFigure { kernel: kernel.name, m, n, k, gops, ceiling_ratio: gops / peak.best, picked }
}

/// Measures a kernel's peak batch by batch.
struct PeakMeter<'a> {
    workers: &'a Workers,
    kernel: &'a GemmKernel,
    /// Rounds of a task.
    rounds: usize,
    /// The best rate so far.
    best: f64,
}

impl<'a> PeakMeter<'a> {
    fn new(workers: &'a Workers, kernel: &'a GemmKernel) -> Self {
        assert!(kernel.isa.is_available(), "{} on a machine without {}", kernel.name, kernel.isa.name());
        let mut meter = PeakMeter { workers, kernel, rounds: 64, best: 0.0 };
        while meter.batch() < BATCH {
            meter.rounds *= 2;
        }
        meter
    }

    fn batch(&mut self) -> Duration {
        const TASKS: usize = 4;
        let tasks = TASKS * self.workers.threads();
        let start = Instant::now();
        // SAFETY: the machine has the kernel's tier (asserted in `new`).
        self.workers.for_each(tasks, |_, _| unsafe { (self.kernel.peak.run)(self.rounds) });
        let elapsed = start.elapsed();
        let ops = tasks * self.rounds * self.kernel.peak.ops;
        self.best = self.best.max(ops as f64 / elapsed.as_secs_f64() / 1e9);
        elapsed
    }
}

/// Zeroed bytes that start at a multiple of 64.
struct Lines {
    buffer: Vec<u8>,
    start: usize,
    len: usize,
}

impl Lines {
    fn new(len: usize) -> Self {
        let buffer = vec![0; len + 64];
        let start = buffer.as_ptr().align_offset(64);
        Lines { buffer, start, len }
    }

    fn get(&self) -> &[u8] {
        &self.buffer[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_name_the_picked_kernels() {
        let workers = Workers::new(1);
        let isa = *Isa::available().last().expect("every machine has the scalar tier");
        let figures = gemm_figures(&workers, isa, 16, 32, 64);
        assert!(figures.iter().any(|figure| figure.picked));
        assert!(figures.iter().all(|figure| figure.gops > 0.0 && figure.ceiling_ratio > 0.0));
    }
}
