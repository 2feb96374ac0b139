//! Linear layers and convolutions.

use crate::gemm::{Activation, Epilogue, Filter};
use crate::layout::{TILE_N, Weight};
use crate::quantize;
use crate::view::{ImageShape, Operand, Rows};

/// Element `i` of operand row `row` of `stride` elements.
pub fn operand_element(operand: &Operand<'_>, row: usize, stride: usize, i: usize) -> f64 {
    let at = row * stride + i;
    match operand {
        Operand::U8 { codes, scale } => (f64::from(codes[at]) - 128.0) * f64::from(scale[row]),
        Operand::U8Uniform { codes, images } => {
            let image = images[row * images.len() / (codes.len() / stride)];
            (f64::from(codes[at]) - f64::from(image.zero)) * f64::from(image.scale)
        }
        Operand::Bf16(rows) => rows[at].to_f64(),
        Operand::F32(rows) => f64::from(rows[at]),
    }
}

/// The operand row that output pixel `(image, y, x)` meets at tap `(ky, kx)`.
pub fn operand_row(input: &ImageShape, filter: &Filter, [image, y, x, ky, kx]: [usize; 5]) -> usize {
    let (y, x) = if filter.upsample {
        // Pixel (y + ky - 1, x + kx - 1) of the upsampled image; its border is the input's.
        ((y + ky).div_ceil(2), (x + kx).div_ceil(2))
    } else {
        (y * filter.stride + ky, x * filter.stride + kx)
    };
    (image * input.full_h() + y) * input.full_w() + x
}

/// `[m, n]`: the sum over taps and inputs of operand * weight. With `magnitude`, of their absolute values: what a rounding
/// error is measured by.
pub fn products(
    operand: &Operand<'_>,
    input: &ImageShape,
    filter: &Filter,
    weight: &Weight<'_>,
    magnitude: bool,
) -> Vec<f64> {
    let (shape, stride) = (weight.shape, weight.shape.k_padded());
    let weights = quantize::decode(weight.encoding, shape, weight.bytes);
    let (h, w) = filter.output(input);
    let mut out = vec![];
    for pixel in 0..input.batch * h * w {
        let (image, y, x) = (pixel / (h * w), pixel / w % h, pixel % w);
        for n in 0..shape.n {
            let mut sum = 0.0;
            for tap in 0..shape.taps {
                let row = operand_row(input, filter, [image, y, x, tap / filter.kw, tap % filter.kw]);
                for k in 0..shape.k {
                    let w = f64::from(weights[(n * shape.taps + tap) * shape.k + k]);
                    let product = operand_element(operand, row, stride, k) * w;
                    sum += if magnitude { product.abs() } else { product };
                }
            }
            out.push(sum);
        }
    }
    out
}

/// The error function, by its Taylor series below 3 and its continued fraction above.
pub fn erf(x: f64) -> f64 {
    if x.abs() < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..100 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let mut fraction = x.abs();
    for n in (1..60).rev() {
        fraction = x.abs() + f64::from(n) / 2.0 / fraction;
    }
    let tail = (-x * x).exp() / fraction / std::f64::consts::PI.sqrt();
    x.signum() * (1.0 - tail)
}

/// An activation function on one number; [`Activation::Geglu`] is its gate's `gelu`.
pub fn activate(activation: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::None => x,
        Activation::Relu => x.max(0.0),
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu | Activation::Geglu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        Activation::QuickGelu => x * sigmoid(1.702 * x),
    }
}

/// `[m, columns]` from `sums` `[m, n]`, `m` rows of `batch` images.
pub fn epilogue(sums: &[f64], n: usize, batch: usize, epilogue: &Epilogue<'_>) -> Vec<f64> {
    let m = sums.len().checked_div(n).unwrap_or(0);
    let biased = |row: usize, n_at: usize| {
        let image = row * batch / m;
        let bias = epilogue.bias.map_or(0.0, |b| f64::from(b[n_at]));
        sums[row * n + n_at] + bias + epilogue.image_bias.map_or(0.0, |b| f64::from(b[image * n + n_at]))
    };
    let columns = epilogue.activation.columns(n);
    let mut out = vec![];
    for row in 0..m {
        for column in 0..columns {
            // The rectifier comes behind the residual.
            let (before, last) = match epilogue.activation {
                Activation::Relu => (Activation::None, Activation::Relu),
                other => (other, Activation::None),
            };
            let y = if before == Activation::Geglu {
                let value = column / TILE_N * 2 * TILE_N + column % TILE_N;
                biased(row, value) * activate(Activation::Geglu, biased(row, value + TILE_N))
            } else {
                activate(before, biased(row, column))
            };
            let residual = match epilogue.residual {
                Some(Rows::F32(rows)) => f64::from(rows[row * columns + column]),
                Some(Rows::Bf16(rows)) => rows[row * columns + column].to_f64(),
                None => 0.0,
            };
            out.push(activate(last, y + residual));
        }
    }
    out
}
