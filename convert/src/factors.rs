//! Factors for the inputs of matrices: a few inputs with weights much wider than the rest would make every output's scale
//! coarse. So the weights of input `k` are divided by `f[k]`, and what meets them is multiplied by it.
//!
//! That moves a width from the weights to the activations, where it may do the same harm. How wide an activation is follows from
//! what makes it: the norm before, or the matrix whose output it is. With both known, `f` is the root of their ratio (as of
//! SmoothQuant, Xiao et al. 2023), a power of two so that dividing changes no digit. It is kept where, by a model of rounding
//! errors, it makes these smaller by much; ordinary matrices have none.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use engine::graph::weight::{OutputOrder, Stored, WeightKind, WeightSpec};
use engine::graph::{Network, OperandSpec, Origin};
use kernels::gemm::Activation;
use kernels::layout::{Encoding, Q4_GROUP};
use rayon::prelude::*;

use crate::error::Error;
use crate::family::{Recognized, Sources};
use crate::pack::{Job, Rows};

/// Outputs of a matrix that are looked at.
const OUTPUTS: usize = 32;
/// Rows that are read at a time.
const ROWS: usize = 64;
/// The error with factors, relative to that without, that makes them worth a place.
const WORTH: f64 = 0.8;
/// How far an activation reaches beyond its root mean square.
const PEAK: f64 = 3.0;
/// The largest exponent.
const LIMIT: f64 = 10.0;
/// From how large an exponent on a channel gets a factor: one set for networks as they are mostly, one that is thorough.
const THRESHOLDS: [f64; 2] = [2.0, 1.0];

/// The numbers of a vector of factors.
pub(crate) type Factors = Arc<Vec<f32>>;

/// Gives factors to the matrices of `network` that they pay for, in `stored`. Returns the vectors by name.
pub(crate) fn choose(
    sources: &Sources,
    recognized: &Recognized,
    network: &Network,
    stored: &mut [Stored],
) -> Result<HashMap<String, Factors>, Error> {
    let operands = network.operands();
    let look = Look { sources, recognized, specs: network.weights(), operands: &operands };
    let chosen: Vec<Option<Vec<f32>>> =
        operands.par_iter().map(|operand| look.factors(operand, stored)).collect::<Result<_, Error>>()?;
    let mut vectors = HashMap::new();
    for (operand, factors) in operands.iter().zip(chosen) {
        let Some(factors) = factors else { continue };
        let matrices: Vec<usize> = integers(operand, stored).collect();
        let first = &network.weights()[matrices[0]].name;
        let name = format!("{}.factors", first.strip_suffix(".weight").unwrap_or(first));
        matrices.iter().for_each(|&w| stored[w].factors = Some(name.clone()));
        vectors.insert(name, Arc::new(factors));
    }
    Ok(vectors)
}

/// The matrices of `operand` that have integer weights.
fn integers(operand: &OperandSpec, stored: &[Stored]) -> impl Iterator<Item = usize> {
    operand.matrices.iter().copied().filter(|&w| stored[w].encoding.is_some_and(Encoding::is_integer))
}

/// Some outputs of a matrix.
struct Sample {
    encoding: Encoding,
    taps: usize,
    k: usize,
    /// `[outputs, k, taps]`
    weights: Vec<f32>,
}

impl Sample {
    /// `[k, taps]` of each output.
    fn rows(&self) -> impl Iterator<Item = &[f32]> {
        self.weights.chunks_exact(self.k * self.taps)
    }
}

/// The checkpoint, seen through a network.
struct Look<'a> {
    sources: &'a Sources,
    recognized: &'a Recognized,
    specs: &'a [WeightSpec],
    operands: &'a [OperandSpec],
}

impl Look<'_> {
    /// The factors of an operand, where they pay.
    fn factors(&self, operand: &OperandSpec, stored: &[Stored]) -> Result<Option<Vec<f32>>, Error> {
        let samples: Vec<Sample> = integers(operand, stored)
            .map(|w| self.sample(w, stored[w].encoding.expect("an integer one")))
            .collect::<Result<_, _>>()?;
        if samples.is_empty() {
            return Ok(None);
        }
        let scale = self.scale(operand.origin, samples[0].k)?;
        Ok(best(&samples, &scale))
    }

    fn sample(&self, weight: usize, encoding: Encoding) -> Result<Sample, Error> {
        let (n, taps, k) = self.shape(weight);
        let count = n.min(OUTPUTS);
        let row = taps * k;
        let mut weights = vec![0.0; count * row];
        let spread = weights.chunks_exact_mut(row).enumerate().map(|(i, out)| (i * n / count, out));
        self.read(weight, row, spread)?;
        Ok(Sample { encoding, taps, k, weights })
    }

    /// The root mean square of each of `k` channels of a value, as far as its origin tells it; of others it is 1.
    fn scale(&self, origin: Origin, k: usize) -> Result<Vec<f64>, Error> {
        match origin {
            Origin::Norm { gamma, beta, activation } => {
                let (gamma, beta) = (self.vector(gamma)?, self.vector(beta)?);
                let pairs = gamma.iter().zip(&beta);
                Ok(pairs.map(|(&g, &b)| spread(activation, g.into(), b.into())).collect())
            }
            Origin::Matrix { weight, bias, activation } => {
                let (n, taps, inputs) = self.shape(weight);
                let reads = self.operands.iter().find(|o| o.matrices.contains(&weight));
                let x = match reads.map(|o| o.origin) {
                    Some(Origin::Norm { .. }) => self.scale(reads.expect("as matched").origin, inputs)?,
                    _ => vec![1.0; inputs],
                };
                let row = taps * inputs;
                let mut rows = vec![0.0; ROWS.min(n) * row];
                let mut out = Vec::with_capacity(n);
                for first in (0..n).step_by(ROWS) {
                    let rows = &mut rows[..ROWS.min(n - first) * row];
                    self.read(weight, row, std::iter::once((first, &mut *rows)))?;
                    let width = |row: &[f32]| {
                        let terms = row.chunks_exact(taps).zip(&x);
                        terms.map(|(w, x)| energy(w) * *x as f32 * *x as f32).sum::<f32>().sqrt()
                    };
                    out.extend(rows.chunks_exact(row).map(|row| f64::from(width(row))));
                }
                let bias = bias.map_or(Ok(vec![0.0; n]), |b| self.vector(b))?;
                let each = |i: usize| (out[i], f64::from(bias[i]));
                if activation != Activation::Geglu {
                    return Ok((0..n).map(|i| spread(activation, each(i).0, each(i).1)).collect());
                }
                let (values, gates) = ((0..n / 2).map(each), (n / 2..n).map(each));
                let pairs = values.zip(gates);
                Ok(pairs.map(|(v, g)| v.0.hypot(v.1) * spread(Activation::Gelu, g.0, g.1)).collect())
            }
            Origin::Other => Ok(vec![1.0; k]),
        }
    }

    /// `n, taps, k` of a matrix.
    fn shape(&self, weight: usize) -> (usize, usize, usize) {
        match self.specs[weight].kind {
            WeightKind::Matrix { n, kh, kw, k, .. } => (n, kh * kw, k),
            _ => unreachable!("operands meet matrices"),
        }
    }

    fn vector(&self, weight: usize) -> Result<Vec<f32>, Error> {
        let WeightKind::Vector { len, .. } = self.specs[weight].kind else {
            unreachable!("norms and biases are vectors")
        };
        let mut out = vec![0.0; len];
        self.read(weight, 1, std::iter::once((0, out.as_mut_slice())))?;
        Ok(out)
    }

    /// Reads rows of `row` numbers of a tensor, in the order of the checkpoint: for each pair as many as there is room for, from the
    /// first one named.
    fn read<'b>(
        &self,
        weight: usize,
        row: usize,
        rows: impl Iterator<Item = (usize, &'b mut [f32])>,
    ) -> Result<(), Error> {
        let mut spec = self.specs[weight].clone();
        if let WeightKind::Matrix { order, .. } | WeightKind::Vector { order, .. } = &mut spec.kind {
            *order = OutputOrder::Plain;
        }
        let view = self.recognized.tensors[&spec.name].clone();
        let job = Job::new(spec, Encoding::F32, view);
        let from = Rows::new(self.sources, &job)?;
        let mut raw = vec![];
        for (first, out) in rows {
            from.gather(first..first + out.len() / row, out, &mut raw)?;
            out.iter_mut().filter(|x| !x.is_finite()).for_each(|x| *x = 0.0);
        }
        Ok(())
    }
}

/// The factors of an operand whose channels have these scales, where they pay.
fn best(samples: &[Sample], scale: &[f64]) -> Option<Vec<f32>> {
    let ratio = ratio(&widths(samples), scale);
    if ratio.iter().all(|r| r.abs() < THRESHOLDS[1]) {
        return None;
    }
    let mut best = (WORTH * error(samples, scale, &vec![1.0; scale.len()]), None);
    for threshold in THRESHOLDS {
        let exponent = |&r: &f64| if r.abs() < threshold { 0.0 } else { r.round().clamp(-LIMIT, LIMIT) };
        let factors: Vec<f64> = ratio.iter().map(|r| exponent(r).exp2()).collect();
        let with = error(samples, scale, &factors);
        if with < best.0 {
            best = (with, Some(factors));
        }
    }
    Some(best.1?.into_iter().map(|f| f as f32).collect())
}

/// The sum of the squares.
fn energy(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0.0f32; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * x);
    }
    lanes.iter().sum::<f32>() + rest.iter().map(|x| x * x).sum::<f32>()
}

/// The root mean square of `activation(g * z + b)` for normally distributed `z`, about.
fn spread(activation: Activation, g: f64, b: f64) -> f64 {
    /// Where `z` is looked at, and how often it is there.
    const POINTS: [(f64, f64); 7] = [
        (-3.0, 0.0044),
        (-2.0, 0.0540),
        (-1.0, 0.2420),
        (0.0, 0.3989),
        (1.0, 0.2420),
        (2.0, 0.0540),
        (3.0, 0.0044),
    ];
    if activation == Activation::None {
        return g.hypot(b);
    }
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let value = |x: f64| match activation {
        Activation::Relu => x.max(0.0),
        Activation::Silu => x * sigmoid(x),
        // All kinds of GELU are about the same.
        _ => x * sigmoid(1.702 * x),
    };
    POINTS.iter().map(|(z, weight)| weight * value(g * z + b).powi(2)).sum::<f64>().sqrt()
}

/// For each input, the root mean square of its weights relative to those of the same outputs: the widest of all matrices.
fn widths(samples: &[Sample]) -> Vec<f64> {
    let mut widths = vec![];
    for sample in samples {
        let mut sums = vec![0.0f32; sample.k];
        for row in sample.rows() {
            let total = energy(row);
            if total > 0.0 {
                let inputs = row.chunks_exact(sample.taps);
                sums.iter_mut().zip(inputs).for_each(|(sum, w)| *sum += energy(w) / total);
            }
        }
        widths.resize(sums.len(), 0.0f64);
        widths.iter_mut().zip(&sums).for_each(|(w, s)| *w = w.max(f64::from(s.sqrt())));
    }
    widths
}

/// The binary logarithm of the factor that makes weights and activations of each channel equally wide, both relative to the
/// median channel.
fn ratio(widths: &[f64], scale: &[f64]) -> Vec<f64> {
    let median = |x: &[f64]| {
        let mut x = x.to_vec();
        x.sort_by(f64::total_cmp);
        x.get(x.len() / 2).copied().unwrap_or(0.0)
    };
    let (width, mid) = (median(widths), median(scale));
    let each = widths.iter().zip(scale).map(|(w, s)| ((w / width) / (s / mid)).log2() / 2.0);
    each.map(|ratio| if ratio.is_finite() { ratio } else { 0.0 }).collect()
}

/// The relative error that rounding weights and activations leaves in the outputs, by a model in which errors are even within
/// a step and independent.
fn error(samples: &[Sample], scale: &[f64], factors: &[f64]) -> f64 {
    let x: Vec<f64> = scale.iter().zip(factors).map(|(s, f)| s * f).collect();
    // A whole step of an activation.
    let step = 2.0 * PEAK * x.iter().copied().fold(0.0, f64::max) / 254.0;
    let mut sum = 0.0;
    let mut count = 0.0;
    for sample in samples {
        for row in sample.rows() {
            let (mut signal, mut error, mut sizes) = (0.0, 0.0, 0.0);
            let mut group = (0.0f64, 0.0); // widest weight, energy of its inputs
            for (k, weights) in row.chunks_exact(sample.taps).enumerate() {
                let squares = f64::from(energy(weights));
                signal += squares * scale[k].powi(2);
                sizes += squares / factors[k].powi(2);
                let widest = f64::from(weights.iter().fold(0.0f32, |m, w| m.max(w.abs()))) / factors[k];
                group = (group.0.max(widest), group.1 + x[k].powi(2) * sample.taps as f64);
                let full = sample.encoding == Encoding::Q4 && (k + 1).is_multiple_of(Q4_GROUP);
                if full || k + 1 == sample.k {
                    let steps = if sample.encoding == Encoding::Q4 { 7.5 } else { 127.0 };
                    error += (group.0 / steps).powi(2) / 12.0 * group.1;
                    group = (0.0, 0.0);
                }
            }
            error += step.powi(2) / 12.0 * sizes;
            if signal > 0.0 {
                sum += error / signal;
                count += 1.0;
            }
        }
    }
    (sum / f64::max(count, 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernels::layout::WeightShape;
    use kernels::quantize::{decode, encode};

    const N: usize = 64;
    const K: usize = 320;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next() + next() + next()).collect()
    }

    /// Relative error of a product of 8-bit rows and a rounded matrix, divided by its factors; and whether it has some.
    fn product_error(encoding: Encoding, weights: &[f32], rows: &[f32], scale: &[f64]) -> (f64, bool) {
        let sample = Sample { encoding, taps: 1, k: K, weights: weights.to_vec() };
        let chosen = best(&[sample], scale);
        let factors = chosen.clone().unwrap_or(vec![1.0; K]);
        let shape = WeightShape::linear(N, K);
        let divided: Vec<f32> = weights.iter().zip(factors.iter().cycle()).map(|(w, f)| w / f).collect();
        let mut bytes = vec![0; shape.bytes(encoding)];
        encode(encoding, shape, &divided, &mut bytes);
        let rounded = decode(encoding, shape, &bytes);
        let (mut error, mut signal) = (0.0, 0.0);
        for row in rows.chunks_exact(K) {
            let wide: Vec<f32> = row.iter().zip(&factors).map(|(x, f)| x * f).collect();
            let step = wide.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
            let coded: Vec<f32> = wide.iter().map(|x| (x / step).round() * step).collect();
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
            for (want, got) in weights.chunks_exact(K).zip(rounded.chunks_exact(K)) {
                let want = dot(row, want);
                error += (dot(&coded, got) - want).powi(2);
                signal += want.powi(2);
            }
        }
        (f64::sqrt(error / signal), chosen.is_some())
    }

    /// Four channels whose weights, or activations, are 30 times wider than the rest; made up for on the other side or not.
    #[test]
    fn wide_channels_cost_little() {
        let times = |numbers: &[f32], factor: f32| -> Vec<f32> {
            let wide = |i: usize| if i % K % 80 == 7 { factor } else { 1.0 };
            numbers.iter().enumerate().map(|(i, x)| x * wide(i)).collect()
        };
        let (weights, rows) = (noise(N * K, 1), noise(32 * K, 2));
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let (plain, none) = product_error(encoding, &weights, &rows, &[1.0; K]);
            assert!(!none, "ordinary channels need no factors");
            for (w, x) in
                [(30.0, 1.0 / 30.0), (1.0 / 30.0, 30.0), (30.0, 1.0), (1.0, 30.0), (1.0, 1.0 / 30.0)]
            {
                let scale: Vec<f64> = times(&[1.0; K], x).into_iter().map(f64::from).collect();
                let (got, _) = product_error(encoding, &times(&weights, w), &times(&rows, x), &scale);
                assert!(got <= 1.5 * plain, "{encoding:?}, weights {w}, activations {x}: {got} for {plain}");
            }
        }
    }
}
