//! Every kernel of the table against the reference, over the shapes around every block edge.

mod exact;
#[cfg(target_os = "linux")]
mod guarded;
#[cfg(target_arch = "x86_64")]
mod past;

use super::*;
use crate::Isa;
use crate::bf16;
use crate::layout::WeightShape;
use crate::quantize;
use crate::reference::gemm as reference;
use crate::view::{Border, Coding};

/// Rounding error of an f32 sum, relative to the sum of magnitudes.
const F32_BUDGET: f64 = 4e-6;
/// Error of one rounding to bfloat16, relative to the number.
const BF16_ROUNDING: f64 = 1.0 / 256.0;
/// Error of floats as whole numbers of 12 bits, relative to the sum of magnitudes of numbers of like sizes.
const SHORT_ROUNDING: f64 = 5e-4;
/// The same where weights are exact, so that rows have 16 bits, or 15 where weights are sums.
const SHORT_ROW: f64 = 5e-5;
/// Error of a coarse activation function, relative to its largest input or 1.
const COARSE_BUDGET: f64 = 4e-4;
/// Error of an activation function, relative to its largest input.
const ACTIVATION_BUDGET: f64 = 1e-6;

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }
    fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }
    fn float(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 30) as f32 - 1.0
    }
    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rank {
    U8,
    U8Uniform,
    Bf16,
    F32,
}

/// An operand that owns its rows.
struct Left {
    rank: Rank,
    codes: Vec<u8>,
    scale: Vec<f32>,
    images: Vec<Coding>,
    bf16: Vec<bf16>,
    f32: Vec<f32>,
}

impl Left {
    /// Rows of `k` numbers in `stride`; the border's and the slack's are zero.
    fn new(random: &mut Random, rank: Rank, input: &ImageShape, k: usize, stride: usize) -> Left {
        let rows = input.operand_rows();
        let mut left = Left { rank, codes: vec![], scale: vec![], images: vec![], bf16: vec![], f32: vec![] };
        for row in 0..rows {
            let (y, x) = (row / input.full_w() % input.full_h(), row % input.full_w());
            let border = &input.border;
            let inside = (border.top..border.top + input.h).contains(&y)
                && (border.left..border.left + input.w).contains(&x);
            left.scale.push(random.float().abs() + 0.01);
            for i in 0..stride {
                let live = inside && i < k;
                left.codes.push(if live { (random.bits() % 255 + 1) as u8 } else { 128 });
                left.f32.push(if live { random.float() } else { 0.0 });
            }
        }
        left.bf16 = left.f32.iter().map(|&x| bf16::from_f32(x)).collect();
        if rank == Rank::U8Uniform {
            left.images = (0..input.batch)
                .map(|b| Coding { scale: left.scale[b], zero: 1 + (random.bits() % 255) as i32 })
                .collect();
            let each = left.codes.len() / input.batch.max(1);
            for (i, code) in left.codes.iter_mut().enumerate() {
                if left.f32[i] == 0.0 {
                    *code = left.images[i / each].zero as u8;
                }
            }
        }
        left
    }
    fn view(&self) -> Operand<'_> {
        match self.rank {
            Rank::U8 => Operand::U8 { codes: &self.codes, scale: &self.scale },
            Rank::U8Uniform => Operand::U8Uniform { codes: &self.codes, images: &self.images },
            Rank::Bf16 => Operand::Bf16(&self.bf16),
            Rank::F32 => Operand::F32(&self.f32),
        }
    }
}

fn weight_bytes(random: &mut Random, encoding: Encoding, shape: WeightShape) -> Vec<u8> {
    let mut bytes = vec![0; shape.bytes(encoding)];
    quantize::encode(encoding, shape, &random.floats(shape.n * shape.taps * shape.k), &mut bytes);
    bytes
}

fn kernels_here() -> impl Iterator<Item = &'static GemmKernel> {
    kernels().iter().copied().filter(|kernel| kernel.isa.is_available())
}

#[derive(Clone, Copy, Debug)]
struct Case {
    input: ImageShape,
    filter: Filter,
    n: usize,
    k: usize,
    encoding: Encoding,
    rank: Rank,
    activation: Activation,
    extras: bool,
    bf16_out: bool,
}

impl Case {
    fn linear(m: usize, n: usize, k: usize, encoding: Encoding, rank: Rank) -> Case {
        Case {
            input: ImageShape::rows(m),
            filter: Filter::POINT,
            n,
            k,
            encoding,
            rank,
            activation: Activation::None,
            extras: false,
            bf16_out: false,
        }
    }

    /// Runs every kernel of this machine that suits. They agree with the reference within the budget; the integer ones
    /// agree with each other bit for bit, unless an activation function follows.
    fn check(&self) {
        let mut random = Random::new(7);
        let shape = WeightShape { n: self.n, taps: self.filter.kh * self.filter.kw, k: self.k };
        let left = Left::new(&mut random, self.rank, &self.input, self.k, shape.k_padded());
        let bytes = weight_bytes(&mut random, self.encoding, shape);
        let weight = Weight::new(self.encoding, shape, &bytes);
        let (h, w) = self.filter.output(&self.input);
        let m = self.input.batch * h * w;
        let columns = self.activation.columns(self.n);
        let (bias, image_bias) = (random.floats(self.n), random.floats(self.input.batch * self.n));
        let residual = random.floats(m * columns);
        let residual_bf16: Vec<bf16> = residual.iter().map(|&x| bf16::from_f32(x)).collect();
        let mut epilogue = Epilogue { activation: self.activation, ..Epilogue::default() };
        if self.extras {
            let rows = if self.bf16_out { Rows::Bf16(&residual_bf16) } else { Rows::F32(&residual) };
            epilogue.bias = Some(&bias);
            epilogue.image_bias = Some(&image_bias);
            epilogue.residual = Some(rows);
        }
        let sums = reference::products(&left.view(), &self.input, &self.filter, &weight, false);
        let magnitudes = reference::products(&left.view(), &self.input, &self.filter, &weight, true);
        let expected = reference::epilogue(&sums, self.n, self.input.batch, &epilogue);
        let magnitude = magnitudes.iter().fold(1.0f64, |a, &b| a.max(b));
        let mut integers: Option<Vec<f32>> = None;
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), self.encoding)) {
            let workers = Workers::new(1);
            let (mut out, mut out_bf16) = (vec![f32::NAN; m * columns], vec![bf16::NAN; m * columns]);
            let target = if self.bf16_out { RowsMut::Bf16(&mut out_bf16) } else { RowsMut::F32(&mut out) };
            let (input, filter, operand) = (self.input, self.filter, left.view());
            gemm_with(&workers, kernel, Gemm { operand, input, filter, weight, epilogue, out: target });
            if self.bf16_out {
                out = out_bf16.iter().map(|x| x.to_f32()).collect();
            }
            let mut budget = magnitude * F32_BUDGET;
            if self.activation != Activation::None {
                budget += magnitude * magnitude * ACTIVATION_BUDGET;
            }
            let rounds = kernel.types == Types::S16S16 && self.rank == Rank::Bf16;
            if kernel.types == Types::Bf16 && self.encoding == Encoding::F16 {
                budget += magnitude * BF16_ROUNDING;
            } else if rounds {
                budget += magnitude * if self.encoding.is_integer() { SHORT_ROW } else { SHORT_ROUNDING };
            }
            for (i, (&y, &e)) in out.iter().zip(&expected).enumerate() {
                let budget = budget
                    + match (self.bf16_out, self.activation) {
                        (true, Activation::None) => e.abs() * BF16_ROUNDING,
                        // Coarse ones.
                        (true, _) => e.abs() * BF16_ROUNDING + magnitude.max(1.0) * COARSE_BUDGET,
                        _ => 0.0,
                    };
                let error = (f64::from(y) - e).abs();
                assert!(
                    error <= budget,
                    "{} {self:?} [{i}]: {y}, reference {e}, budget {budget}",
                    kernel.name
                );
            }
            if kernel.types.is_integer() && !rounds && self.activation == Activation::None {
                let first = integers.get_or_insert_with(|| out.clone());
                assert!(*first == out, "{} differs from the scalar kernel: {self:?}", kernel.name);
            }
        }
    }
}

/// Every kind of operand with every encoding it meets.
fn kinds() -> Vec<(Encoding, Rank)> {
    let mut kinds = vec![];
    for encoding in Encoding::ALL {
        for rank in [Rank::U8, Rank::U8Uniform, Rank::Bf16, Rank::F32] {
            if encoding.is_integer() || matches!(rank, Rank::Bf16 | Rank::F32) {
                kinds.push((encoding, rank));
            }
        }
    }
    kinds
}

#[test]
fn linear_layers_of_every_size() {
    for (encoding, rank) in kinds() {
        for m in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 47, 48, 49] {
            Case::linear(m, 35, 70, encoding, rank).check();
        }
        for n in [1, 3, 4, 15, 16, 17, 31, 32, 33, 48, 64, 65] {
            Case::linear(14, n, 33, encoding, rank).check();
        }
        for k in [0, 1, 2, 3, 4, 5, 8, 31, 63, 64, 65, 127, 128, 129, 320] {
            Case::linear(13, 20, k, encoding, rank).check();
        }
    }
}

#[test]
fn blocks_and_chunks_join() {
    for (encoding, rank) in kinds() {
        Case::linear(300, 40, 64, encoding, rank).check();
        Case::linear(5, 600, 64, encoding, rank).check();
        Case::linear(15, 33, 2700, encoding, rank).check();
    }
}

#[test]
fn convolutions_of_every_geometry() {
    let one = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let corner = Border { bottom: 1, right: 1, ..Border::default() };
    let filter = |kh, stride, upsample| Filter { kh, kw: kh, stride, upsample };
    let geometries = [
        (one, filter(3, 1, false)),
        (one, filter(3, 2, false)),
        (corner, filter(3, 2, false)),
        (one, filter(3, 1, true)),
        (one, filter(1, 1, false)),
        (Border::default(), filter(1, 2, false)),
        (corner, filter(2, 1, false)),
    ];
    for (encoding, rank) in kinds() {
        for (border, filter) in geometries {
            for (batch, h, w, n, k) in
                [(2, 4, 6, 20, 4), (1, 3, 17, 33, 65), (2, 2, 2, 4, 9), (1, 9, 33, 3, 8)]
            {
                let input = ImageShape { batch, h, w, border };
                Case { input, filter, ..Case::linear(1, n, k, encoding, rank) }.check();
            }
        }
    }
}

#[test]
fn chunked_convolutions() {
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let filter = Filter { kh: 3, kw: 3, stride: 1, upsample: false };
    for (encoding, rank) in kinds() {
        // Many inputs; a line of more pixels than a block; more panels than a task keeps.
        for (h, w, n, k) in [(3, 5, 17, 2100), (2, 300, 20, 40), (3, 4, 210, 64)] {
            let input = ImageShape { batch: 1, h, w, border };
            Case { input, filter, ..Case::linear(1, n, k, encoding, rank) }.check();
        }
    }
}

#[test]
fn epilogues() {
    use Activation::*;
    for (encoding, rank) in [(Encoding::Q8, Rank::U8), (Encoding::F32, Rank::F32), (Encoding::Q4, Rank::Bf16)]
    {
        for activation in [None, Relu, Silu, Gelu, GeluTanh, QuickGelu, Geglu] {
            for (extras, bf16_out) in [(false, false), (true, false), (true, true)] {
                for n in [32, 96, 40] {
                    if activation == Geglu && n == 40 {
                        continue;
                    }
                    let input = ImageShape { batch: 3, h: 2, w: 5, border: Border::default() };
                    let case = Case::linear(1, n, 24, encoding, rank);
                    Case { input, activation, extras, bf16_out, ..case }.check();
                }
            }
        }
    }
}

/// A row's result depends neither on the rows around it nor on the number of threads.
#[test]
fn rows_are_independent() {
    for (encoding, rank) in kinds() {
        let mut random = Random::new(11);
        let (m, n, k) = (310, 40, 400);
        let shape = WeightShape::linear(n, k);
        let left = Left::new(&mut random, rank, &ImageShape::rows(m), k, shape.k_padded());
        let bytes = weight_bytes(&mut random, encoding, shape);
        let weight = Weight::new(encoding, shape, &bytes);
        let rows_of = |first: usize, rows: usize| {
            let (a, b) = (first * shape.k_padded(), (first + rows) * shape.k_padded());
            match rank {
                Rank::U8 => Operand::U8 { codes: &left.codes[a..b], scale: &left.scale[first..first + rows] },
                Rank::U8Uniform => Operand::U8Uniform { codes: &left.codes[a..b], images: &left.images },
                Rank::Bf16 => Operand::Bf16(&left.bf16[a..b]),
                Rank::F32 => Operand::F32(&left.f32[a..b]),
            }
        };
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), encoding)) {
            let run = |threads: usize, first: usize, rows: usize| {
                let mut out = vec![f32::NAN; rows * n];
                let call = Gemm {
                    operand: rows_of(first, rows),
                    input: ImageShape::rows(rows),
                    filter: Filter::POINT,
                    weight,
                    epilogue: Epilogue { activation: Activation::Gelu, ..Epilogue::default() },
                    out: RowsMut::F32(&mut out),
                };
                gemm_with(&Workers::new(threads), kernel, call);
                out
            };
            let whole = run(1, 0, m);
            assert!(whole == run(3, 0, m), "{} with 3 threads", kernel.name);
            for (first, rows) in [(0, 1), (77, 1), (13, 29), (20, 260), (309, 1)] {
                let part = run(2, first, rows);
                assert!(whole[first * n..][..rows * n] == part, "{} rows {first} + {rows}", kernel.name);
            }
        }
    }
}

/// A row of pixels of a convolution depends neither on the rows around it nor on their number. So many inputs are cut in two where
/// a full block is widened, and would not be where a few rows had a longer chunk.
#[test]
fn rows_of_pixels_are_independent() {
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    for (encoding, rank) in kinds() {
        let mut random = Random::new(13);
        for (h, w, upsample) in [(70, 6, false), (6, 70, false), (16, 12, true)] {
            let input = ImageShape { batch: 1, h, w, border };
            let filter = Filter { kh: 3, kw: 3, stride: 1, upsample };
            let shape = WeightShape { n: 20, taps: 9, k: 300 };
            let left = Left::new(&mut random, rank, &input, shape.k, shape.k_padded());
            let bytes = weight_bytes(&mut random, encoding, shape);
            let weight = Weight::new(encoding, shape, &bytes);
            let (h, w) = filter.output(&input);
            for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), encoding)) {
                let run = |rows: std::ops::Range<usize>| {
                    let mut out = vec![f32::NAN; rows.len() * w * shape.n];
                    let (epilogue, to) = (Epilogue::default(), RowsMut::F32(&mut out));
                    let call = Gemm { operand: left.view(), input, filter, weight, epilogue, out: to };
                    let line = rows.start;
                    super::driver::run(&Workers::new(1), kernel, call, Some(rows), line);
                    out
                };
                let whole = run(0..h);
                for rows in [0..1, 1..3, h / 2..h] {
                    let want = &whole[rows.start * w * shape.n..rows.end * w * shape.n];
                    assert!(want == run(rows.clone()), "{} {encoding:?} {rows:?} of {h} x {w}", kernel.name);
                }
            }
        }
    }
}

/// Rows that a result is added to in place, and a window of an output, are what the whole call with a residual gives.
#[test]
fn in_place_and_in_part_as_a_whole() {
    for &isa in Isa::available() {
        for rank in [Rank::U8, Rank::U8Uniform, Rank::Bf16] {
            for (upsample, activation) in
                [(false, Activation::None), (true, Activation::None), (false, Activation::Relu)]
            {
                let filter = Filter { kh: 3, kw: 3, stride: 1, upsample };
                in_place_and_in_part(isa, rank, filter, activation);
            }
        }
    }
}

fn in_place_and_in_part(isa: Isa, rank: Rank, filter: Filter, activation: Activation) {
    let mut random = Random::new(11);
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let input = ImageShape { batch: 2, h: 6, w: 9, border };
    let shape = WeightShape { n: 20, taps: 9, k: 70 };
    let left = Left::new(&mut random, rank, &input, shape.k, shape.k_padded());
    let bytes = weight_bytes(&mut random, Encoding::Q8, shape);
    let weight = Weight::new(Encoding::Q8, shape, &bytes);
    let (h, w) = filter.output(&input);
    let residual = random.floats(2 * h * w * shape.n);
    let run = |epilogue, out: &mut [f32], rows: Option<std::ops::Range<usize>>| {
        let out = RowsMut::F32(out);
        let call = Gemm { operand: left.view(), input, filter, weight, epilogue, out };
        let workers = Workers::new(2);
        match rows {
            Some(rows) => {
                let line = rows.start;
                gemm_rows(&workers, isa, call, rows, line);
            }
            None => gemm(&workers, isa, call),
        }
    };
    let mut whole = vec![f32::NAN; residual.len()];
    let plain = Epilogue { activation, ..Epilogue::default() };
    run(Epilogue { residual: Some(Rows::F32(&residual)), ..plain }, &mut whole, None);
    let mut in_place = residual.clone();
    run(Epilogue { accumulate: true, ..plain }, &mut in_place, None);
    assert_eq!(whole, in_place, "{isa:?} {rank:?} {filter:?}");
    for window in [2..h - 1, 1..2, 3..h] {
        let part = |x: &[f32]| -> Vec<f32> {
            let line = w * shape.n;
            x.chunks_exact(h * line)
                .flat_map(|x| &x[window.start * line..window.end * line])
                .copied()
                .collect()
        };
        let mut in_part = part(&residual);
        run(Epilogue { accumulate: true, ..plain }, &mut in_part, Some(window.clone()));
        assert_eq!(part(&whole), in_part, "{isa:?} {rank:?} {filter:?} {window:?}");
    }
}
