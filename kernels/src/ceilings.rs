//! What the silicon can do, measured: the figures that a kernel's speed is compared with, in the same run.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::gemm::{Epilogue, Filter, Gemm, GemmKernel, Types, gemm_with, kernels, pick};
use crate::layout::{ALIGN, Encoding, Weight, WeightShape};
use crate::view::{Border, Coding, ImageShape, Operand, RowsMut};
use crate::{Isa, Workers};

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

/// A layer's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerShape {
    /// What it reads.
    pub input: ImageShape,
    /// Its filter.
    pub filter: Filter,
    /// Outputs.
    pub n: usize,
    /// Inputs of a tap.
    pub k: usize,
}

impl LayerShape {
    /// `m` rows by `[n, k]` weights.
    pub const fn linear(m: usize, n: usize, k: usize) -> Self {
        LayerShape { input: ImageShape::rows(m), filter: Filter::POINT, n, k }
    }

    /// A 3 x 3 convolution of `batch` pictures of `side` x `side` pixels that keeps their size.
    pub const fn conv3x3(batch: usize, side: usize, n: usize, k: usize) -> Self {
        let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
        let filter = Filter { kh: 3, kw: 3, stride: 1, upsample: false };
        LayerShape { input: ImageShape { batch, h: side, w: side, border }, filter, n, k }
    }

    /// Operations; a multiplication and its addition are two.
    pub fn ops(&self) -> f64 {
        2.0 * (self.rows() * self.n * self.filter.kh * self.filter.kw * self.k) as f64
    }

    fn rows(&self) -> usize {
        let (h, w) = self.filter.output(&self.input);
        self.input.batch * h * w
    }
}

/// A kernel's rates on a layer, one for each of `runs` (workers and weights), and the rate of its multiplications on registers on
/// the first workers, all in billions of operations per second and measured in turns for `time`, so that a slow second of the
/// machine meets all of them. From operand rows to f32 rows with a bias.
///
/// # Panics
/// Where the machine lacks the kernel's tier, the kernel doesn't take such weights, or there are no runs.
pub fn layer_gops(
    runs: &[(&Workers, Encoding)],
    kernel: &'static GemmKernel,
    shape: LayerShape,
    time: Duration,
) -> (Vec<f64>, f64) {
    let layer = |&(_, encoding): &(&Workers, Encoding)| Layer::new(kernel.types, encoding, shape);
    let mut layers: Vec<Layer> = runs.iter().map(layer).collect();
    let mut peak = PeakMeter::new(runs[0].0, kernel);
    let mut gops = vec![0.0f64; runs.len()];
    let start = Instant::now();
    while gops.contains(&0.0) || start.elapsed() < time {
        peak.batch();
        for ((layer, (workers, _)), gops) in layers.iter_mut().zip(runs).zip(&mut gops) {
            *gops = gops.max(shape.ops() / layer.run(workers, kernel) / 1e9);
        }
    }
    (gops, peak.best)
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
    let (encoding, shape) = (plain(kernel.types), LayerShape::linear(m, n, k));
    let (gops, peak) = layer_gops(&[(workers, encoding)], kernel, shape, 2 * MEASURING);
    let gops = gops[0];
    let picked =
        pick(isa, &Layer::new(kernel.types, encoding, shape).operand(), encoding).name == kernel.name;
    GemmFigure { kernel: kernel.name, m, n, k, gops, ceiling_ratio: gops / peak, picked }
}

/// The weights that kernels of these types take as they are.
pub const fn plain(types: Types) -> Encoding {
    match types {
        Types::U8S8 | Types::S16S16 => Encoding::Q8,
        Types::U8S4 => Encoding::Q4,
        Types::Bf16 => Encoding::Bf16,
        Types::F32 => Encoding::F32,
    }
}

/// A layer to be measured, with the rows and weights that kernels of `types` are for: those of [`Types::S16S16`] are bf16 by float
/// weights, to be rounded. 8-bit rows have a scale each, 8-bit images one.
struct Layer {
    types: Types,
    encoding: Encoding,
    shape: LayerShape,
    weight_shape: WeightShape,
    rows: Lines,
    scale: Vec<f32>,
    images: Vec<Coding>,
    weight: Lines,
    bias: Vec<f32>,
    out: Lines,
}

impl Layer {
    fn new(types: Types, encoding: Encoding, shape: LayerShape) -> Layer {
        let weight_shape = WeightShape { n: shape.n, taps: shape.filter.kh * shape.filter.kw, k: shape.k };
        let rows = shape.input.operand_rows();
        Layer {
            types,
            encoding,
            shape,
            weight_shape,
            rows: Lines::new(rows * weight_shape.k_padded() * types.row_bytes()),
            scale: vec![1.0; rows],
            images: vec![Coding { scale: 1.0, zero: 0 }; shape.input.batch],
            weight: Lines::new(weight_shape.bytes(encoding)),
            bias: vec![0.5; shape.n],
            out: Lines::new(shape.rows() * shape.n * 4),
        }
    }

    fn operand(&self) -> Operand<'_> {
        let rows = self.rows.get();
        match self.types {
            Types::S16S16 if !self.encoding.is_integer() => Operand::Bf16(bytemuck::cast_slice(rows)),
            Types::U8S8 | Types::S16S16 | Types::U8S4 => {
                let codes = &rows[..self.scale.len() * self.weight_shape.k_padded()];
                if self.shape.filter == Filter::POINT {
                    Operand::U8 { codes, scale: &self.scale }
                } else {
                    Operand::U8Uniform { codes, images: &self.images }
                }
            }
            Types::Bf16 => Operand::Bf16(bytemuck::cast_slice(rows)),
            Types::F32 => Operand::F32(bytemuck::cast_slice(rows)),
        }
    }

    /// Seconds of one call.
    fn run(&mut self, workers: &Workers, kernel: &'static GemmKernel) -> f64 {
        let mut out = std::mem::replace(&mut self.out, Lines::new(0));
        let call = Gemm {
            operand: self.operand(),
            input: self.shape.input,
            filter: self.shape.filter,
            weight: Weight::new(self.encoding, self.weight_shape, self.weight.get()),
            epilogue: Epilogue { bias: Some(&self.bias), ..Epilogue::default() },
            out: RowsMut::F32(bytemuck::cast_slice_mut(out.get_mut())),
        };
        let start = Instant::now();
        gemm_with(workers, kernel, call);
        let seconds = start.elapsed().as_secs_f64();
        self.out = black_box(out);
        seconds
    }
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

/// Zeroed bytes that start at a multiple of 64, as everything in an arena or a model file does.
struct Lines {
    buffer: Vec<u8>,
    start: usize,
    len: usize,
}

impl Lines {
    fn new(len: usize) -> Self {
        let buffer = vec![0; len + ALIGN];
        let start = buffer.as_ptr().align_offset(ALIGN);
        Lines { buffer, start, len }
    }

    fn get(&self) -> &[u8] {
        &self.buffer[self.start..][..self.len]
    }

    fn get_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..][..self.len]
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

    /// Whether the pick is within 10 % of the best kernel that could run the layer. All take turns, so that other work on
    /// the machine meets all of them.
    fn pick_is_best(workers: &Workers, isa: Isa, types: Types, [m, n, k]: [usize; 3]) -> bool {
        let mut layer = Layer::new(types, plain(types), LayerShape::linear(m, n, k));
        let picked = pick(isa, &layer.operand(), layer.encoding);
        let suits = |kernel: &&&'static GemmKernel| {
            isa.includes(kernel.isa) && kernel.suits(&layer.operand(), layer.encoding)
        };
        let suitable: Vec<&'static GemmKernel> = kernels().iter().filter(suits).copied().collect();
        let mut best = vec![f64::INFINITY; suitable.len()];
        for round in 0..8 {
            for (kernel, best) in suitable.iter().zip(&mut best) {
                if kernel.isa != Isa::Scalar || round == 0 {
                    *best = best.min(layer.run(workers, kernel));
                }
            }
        }
        let of_pick = suitable.iter().position(|kernel| kernel.name == picked.name).expect("the pick suits");
        best.iter().all(|&seconds| best[of_pick] <= 1.1 * seconds)
    }

    #[test]
    fn the_pick_is_the_best() {
        let workers = Workers::new(1);
        for &isa in Isa::available() {
            for types in [Types::U8S8, Types::U8S4, Types::Bf16, Types::F32] {
                for shape in [[96, 320, 320], [77, 768, 768], [64, 640, 1280]] {
                    // A disturbance that goes by is no verdict.
                    let best = (0..20).any(|attempt| {
                        std::thread::sleep(std::time::Duration::from_millis(100 * attempt));
                        pick_is_best(&workers, isa, types, shape)
                    });
                    assert!(best, "{isa:?} {types:?} {shape:?}");
                }
            }
        }
    }
}
