//! Linear layers and convolutions: operand rows times encoded weight panels, with an epilogue.

mod call;
mod check;
mod chunks;
mod columns;
mod driver;
mod geometry;
mod shorts;
pub(crate) mod steps;
pub(crate) mod strip;
pub(crate) mod table;
#[cfg(test)]
mod tests;
pub(crate) mod tile;
mod unpack;
pub(crate) mod winograd;

pub use table::{GemmKernel, Types, kernels};

use std::ops::Range;

use crate::layout::{Encoding, Weight};
use crate::view::{ImageShape, Operand, Rows, RowsMut};
use crate::{Isa, Workers};

/// What happens to a finished tile while it is in L1, in this order:
/// `y = activation(acc + bias[n] + image_bias[image, n])`, `y += residual[m, n]`, `y += out[m, n]` where `accumulate`; the
/// rectifier ([`Activation::Relu`]) comes last.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// `[n]`.
    pub bias: Option<&'a [f32]>,
    /// `[batch, n]`, added to all pixels of an image: the time embedding of a residual block.
    pub image_bias: Option<&'a [f32]>,
    /// Applied before the residual, but for the rectifier.
    pub activation: Activation,
    /// `[m, n_out]`, row stride `n_out`, added last.
    pub residual: Option<Rows<'a>>,
    /// `out` holds rows that the result is added to: a residual that the sum replaces.
    pub accumulate: bool,
}

/// An activation function in an epilogue or a pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x`.
    #[default]
    None,
    /// `max(x, 0)`; in an epilogue of the sum with the residual: TAESD's blocks end so.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * Phi(x)`, with the exact error function.
    Gelu,
    /// `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x * sigmoid(1.702 x)`.
    QuickGelu,
    /// `value * gelu(gate)`: panels alternate, 16 outputs of value and then the 16 outputs of their gate, and half as many
    /// columns come out. Only in an epilogue.
    Geglu,
}

impl Activation {
    /// Columns that come out of `n` columns.
    pub const fn columns(self, n: usize) -> usize {
        if matches!(self, Activation::Geglu) { n / 2 } else { n }
    }
}

/// How output pixels map to input pixels. A linear layer is `Filter::POINT` over `ImageShape::rows(m)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Filter {
    /// Filter height.
    pub kh: usize,
    /// Filter width.
    pub kw: usize,
    /// 1 or 2, both ways.
    pub stride: usize,
    /// The input is read as if each pixel (border excluded) were 2 x 2 pixels: nearest upsampling folded into a 3 x 3
    /// convolution of stride 1 whose input has a border of 1.
    pub upsample: bool,
}

impl Filter {
    /// 1 x 1.
    pub const POINT: Filter = Filter { kh: 1, kw: 1, stride: 1, upsample: false };

    /// Height and width of the output for an input with its border.
    pub const fn output(&self, input: &ImageShape) -> (usize, usize) {
        if self.upsample {
            (2 * input.h, 2 * input.w)
        } else {
            ((input.full_h() - self.kh) / self.stride + 1, (input.full_w() - self.kw) / self.stride + 1)
        }
    }
}

/// One call: `out[m, n] = epilogue(sum over taps and k of operand * weight)`, `m = batch * out_h * out_w`.
#[derive(Debug)]
pub struct Gemm<'a> {
    /// Rows of `weight.shape.k_padded()` elements. `U8` wants an integer encoding.
    pub operand: Operand<'a>,
    /// The operand's pixels.
    pub input: ImageShape,
    /// Taps of the weight: `kh * kw`.
    pub filter: Filter,
    /// `[n, taps * k]`.
    pub weight: Weight<'a>,
    /// Applied to finished tiles.
    pub epilogue: Epilogue<'a>,
    /// `[m, columns]`, row stride `columns = epilogue.activation.columns(n)`.
    pub out: RowsMut<'a>,
}

/// The kernel that a call with this operand and these weights gets on a machine of tier `isa`.
///
/// f32 rows stay f32. bfloat16 rows meet bfloat16 weights where the tier multiplies those, and are rounded to whole numbers, as
/// float weights then are, on x86 without ([`Types::S16S16`]). f32 weights lose nothing: they, and all weights elsewhere, are met
/// in f32.
pub fn pick(isa: Isa, operand: &Operand<'_>, encoding: Encoding) -> &'static GemmKernel {
    let suits = |kernel: &&&'static GemmKernel| isa.includes(kernel.isa) && kernel.suits(operand, encoding);
    let kernel = kernels().iter().rfind(suits);
    kernel.expect("the scalar tier has a kernel for rows that suit the encoding")
}

/// Runs `call` with the best kernel of tier `isa`: the one that [`pick`] finds, unless another has fewer products to make.
///
/// # Panics
/// Where shapes don't agree, or the machine lacks tier `isa`.
pub fn gemm(workers: &Workers, isa: Isa, call: Gemm<'_>) {
    let kernel = best(isa, &call);
    gemm_with(workers, kernel, call);
}

/// As [`gemm`], but of each output image only rows `rows` are computed, and `out` and `residual` hold just these: a band of a
/// convolution whose operand holds the pixels that the band meets. The first of them is row `line` of the whole image: so the bands
/// of an image are what the image is, to the last bit.
pub fn gemm_rows(workers: &Workers, isa: Isa, call: Gemm<'_>, rows: Range<usize>, line: usize) {
    let kernel = best(isa, &call);
    run(workers, kernel, call, Some(rows), line);
}

/// The kernel for `call`: that of [`pick`], or of the same tier the one of 16-bit numbers where that has fewer products to make.
fn best(isa: Isa, call: &Gemm<'_>) -> &'static GemmKernel {
    let picked = pick(isa, &call.operand, call.weight.encoding);
    // A product of bytes takes half as long as one of 16-bit numbers, of which a filter has 16 instead of 36, or 9.
    if !(picked.types == Types::U8S4 || picked.types == Types::U8S8 && call.filter.upsample) {
        return picked;
    }
    let Gemm { operand, filter, weight, epilogue, .. } = call;
    let fewer = |kernel: &&&'static GemmKernel| {
        kernel.isa == picked.isa
            && winograd::suits(kernel, operand, filter, weight.shape, epilogue.activation)
    };
    kernels().iter().find(fewer).unwrap_or(&picked)
}

/// Runs `call` with `kernel`, which must suit its operand and weight.
///
/// # Panics
/// Where shapes don't agree, the kernel doesn't suit, or the machine lacks its tier.
pub fn gemm_with(workers: &Workers, kernel: &'static GemmKernel, call: Gemm<'_>) {
    run(workers, kernel, call, None, 0);
}

fn run(
    workers: &Workers,
    kernel: &'static GemmKernel,
    call: Gemm<'_>,
    rows: Option<Range<usize>>,
    line: usize,
) {
    assert!(kernel.isa.is_available(), "{} on a machine without {}", kernel.name, kernel.isa.name());
    assert!(
        kernel.suits(&call.operand, call.weight.encoding),
        "{} for {:?}",
        kernel.name,
        call.weight.encoding
    );
    check::shapes(&call, rows.as_ref());
    driver::run(workers, kernel, call, rows, line);
}
