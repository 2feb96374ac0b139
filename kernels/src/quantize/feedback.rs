//! Error feedback: what rounding the weight of one input leaves over is made up for by inputs that vary with it.
//!
//! With `x` the inputs of a layer and `H = E[x x^T] = L D L^T` (`L` unit lower triangular), inputs are rounded from the last
//! to the first, and input `j` is rounded after `sum_i L[i, j] (w_i - q_i)` over the later ones was added to it: "LDLQ" of
//! QuIP (Chee et al. 2023), which rounds as OPTQ does (Frantar et al. 2022). All taps of a filter see the same pixels, so
//! they share `H`, and each is rounded on its own.
#![forbid(unsafe_code)]

use crate::Isa;
use crate::simd::{Simd, SimdOp, dispatch};

/// Added to the diagonal of `H`, relative to its mean: inputs that hardly varied while moments were gathered stay modest.
const DAMPING: f64 = 0.01;
/// Columns that are eliminated before the rest of the matrix is updated.
const BLOCK: usize = 64;

/// Sums of products of a layer's inputs.
#[derive(Clone, Debug)]
pub struct Moments {
    k: usize,
    rows: usize,
    /// Row `i` of the lower triangle has `i + 1` numbers.
    sums: Vec<f32>,
}

impl Moments {
    /// Of `k` inputs, with nothing seen.
    pub fn new(k: usize) -> Self {
        Moments { k, rows: 0, sums: vec![0.0; Self::len(k)] }
    }

    /// Numbers of the lower triangle of `[k, k]`.
    pub const fn len(k: usize) -> usize {
        k * (k + 1) / 2
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// Rows that were added.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds rows `[rows, k]`. `each` calls its argument for all lines of the triangle, in any order, on any thread.
    pub fn add(
        &mut self,
        isa: Isa,
        rows: &[f32],
        each: impl FnOnce(Vec<Line<'_>>, &(dyn Fn(Line<'_>) + Sync)),
    ) {
        let k = self.k;
        assert!(rows.len().is_multiple_of(k), "{} numbers in rows of {k}", rows.len());
        self.rows += rows.len() / k;
        each(lines(&mut self.sums, k), &|Line { i, sums }| {
            let factors: Vec<f32> = rows.chunks_exact(k).map(|row| row[i]).collect();
            dispatch(isa, AddProducts { out: sums, factors: &factors, rows, stride: k });
        });
    }
}

impl Moments {
    /// Makes them those of inputs multiplied by `factors`.
    ///
    /// # Panics
    /// Where there isn't one for each input.
    pub fn multiply(&mut self, factors: &[f32]) {
        assert_eq!(factors.len(), self.k, "factors of {} inputs", self.k);
        for Line { i, sums } in lines(&mut self.sums, self.k) {
            sums.iter_mut().zip(factors).for_each(|(sum, f)| *sum *= factors[i] * f);
        }
    }
}

/// A line of a lower triangle.
#[derive(Debug)]
pub struct Line<'a> {
    i: usize,
    sums: &'a mut [f32],
}

fn lines(mut triangle: &mut [f32], k: usize) -> Vec<Line<'_>> {
    let next = |i| Line { i, sums: triangle.split_off_mut(..i + 1).expect("a triangle of k lines") };
    (0..k).map(next).collect()
}

/// How the rounding errors of a layer's inputs are fed back.
#[derive(Clone, Debug)]
pub struct Feedback {
    k: usize,
    /// The lower triangle of `L`.
    lower: Vec<f32>,
    /// The diagonal of `D`: what an error of an input costs when all other inputs did what they can.
    cost: Vec<f32>,
}

impl Feedback {
    /// From the moments of the layer's inputs; `None` where too little was seen to know how they vary together.
    pub fn new(isa: Isa, moments: Moments) -> Option<Feedback> {
        let Moments { k, rows, sums: mut lower } = moments;
        let diagonal = |i: usize| i * (i + 1) / 2 + i;
        let mean = (0..k).map(|i| f64::from(lower[diagonal(i)])).sum::<f64>() / k.max(1) as f64;
        if rows < 2 * k || mean <= 0.0 || !mean.is_finite() {
            return None;
        }
        for i in 0..k {
            lower[diagonal(i)] += (DAMPING * mean) as f32;
        }
        let mut cost = vec![0.0f32; k];
        let mut lines = lines(&mut lower, k);
        let mut panel = vec![0.0f32; BLOCK * k]; // [column of the block][line]: L D
        for first in (0..k).step_by(BLOCK) {
            let end = (first + BLOCK).min(k);
            let (above, below) = lines.split_at_mut(end);
            for i in first..end {
                let (above, rest) = above.split_at_mut(i);
                eliminate(rest[0].sums, &above[first..], &cost, first);
                let (done, diagonal) = rest[0].sums[first..].split_at_mut(i - first);
                let spent: f32 = done.iter().zip(&cost[first..]).map(|(l, d)| l * l * d).sum();
                cost[i] = diagonal[0] - spent;
                diagonal[0] = 1.0;
                if cost[i] <= 0.0 {
                    return None; // beyond what f32 can tell apart
                }
            }
            for line in below.iter_mut() {
                eliminate(line.sums, &above[first..], &cost, first);
                for c in first..end {
                    panel[(c - first) * k + line.i] = line.sums[c] * cost[c];
                }
            }
            for line in below.iter_mut() {
                let (factors, out) = line.sums.split_at_mut(end);
                let factors: Vec<f32> = factors[first..].iter().map(|x| -x).collect();
                dispatch(isa, AddProducts { out, factors: &factors, rows: &panel[end..], stride: k });
            }
        }
        Some(Feedback { k, lower, cost })
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.k
    }

    /// What an error of each input costs.
    pub(super) fn cost(&self) -> &[f32] {
        &self.cost
    }

    /// Adds the errors of input `i`, one for each of `errors.len()` lanes, to the inputs before it: `weights` is
    /// `[i or more][lanes]`.
    pub(super) fn feed(&self, isa: Isa, i: usize, errors: &[f32], weights: &mut [f32]) {
        let line = &self.lower[i * (i + 1) / 2..][..i];
        dispatch(isa, AddOuter { out: weights, column: line, row: errors });
    }
}

/// Columns `first..` of the line that `above` has finished: `L[i, c] = (H[i, c] - sum_b L[i, b] D[b] L[c, b]) / D[c]`.
fn eliminate(line: &mut [f32], above: &[Line<'_>], cost: &[f32], first: usize) {
    for (c, other) in (first..).zip(above) {
        let (done, rest) = line[first..].split_at_mut(c - first);
        let known = done.iter().zip(&other.sums[first..]).zip(&cost[first..]);
        rest[0] = (rest[0] - known.map(|((a, b), d)| a * b * d).sum::<f32>()) / cost[c];
    }
}

/// `out += sum_r factors[r] * rows[r * stride..]`.
struct AddProducts<'a> {
    out: &'a mut [f32],
    factors: &'a [f32],
    rows: &'a [f32],
    stride: usize,
}

impl SimdOp for AddProducts<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let len = self.out.len();
        for (r, &factor) in self.factors.iter().enumerate() {
            for (out, x) in self.out.iter_mut().zip(&self.rows[r * self.stride..][..len]) {
                *out += factor * x;
            }
        }
    }
}

/// `out[j, ..] += column[j] * row`.
struct AddOuter<'a> {
    out: &'a mut [f32],
    column: &'a [f32],
    row: &'a [f32],
}

impl SimdOp for AddOuter<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (out, &factor) in self.out.chunks_exact_mut(self.row.len()).zip(self.column) {
            for (out, x) in out.iter_mut().zip(self.row) {
                *out += factor * x;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_multiply_to_the_moments() {
        for k in [1, 5, 64, 65, 150] {
            let mut state = 7u32;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            // Inputs that vary together: each a mix of its own noise and that of the one before.
            let rows: Vec<f32> = (0..4 * k)
                .flat_map(|_| {
                    let mut last = 0.0;
                    let row: Vec<f32> = (0..k)
                        .map(|_| {
                            last = 0.7 * last + next();
                            last
                        })
                        .collect();
                    row
                })
                .collect();
            let mut moments = Moments::new(k);
            let serial =
                |lines: Vec<Line<'_>>, line: &(dyn Fn(Line<'_>) + Sync)| lines.into_iter().for_each(line);
            let isa = Isa::detect();
            moments.add(isa, &rows[..2 * k * k], serial);
            assert!(moments.rows() == 2 * k);
            moments.add(isa, &rows[2 * k * k..], serial);
            let sums = moments.sums.clone();
            let want = |i: usize, j: usize| -> f64 {
                rows.chunks_exact(k).map(|r| f64::from(r[i]) * f64::from(r[j])).sum()
            };
            let mean = (0..k).map(|i| want(i, i)).sum::<f64>() / k as f64;
            let feedback = Feedback::new(isa, moments).expect("enough rows");
            let l = |i: usize, j: usize| f64::from(feedback.lower[i * (i + 1) / 2 + j]);
            for i in 0..k {
                for j in 0..=i {
                    assert!((f64::from(sums[i * (i + 1) / 2 + j]) - want(i, j)).abs() < 1e-4 * mean);
                    let damping = if i == j { DAMPING * mean } else { 0.0 };
                    let got: f64 = (0..=j).map(|c| l(i, c) * f64::from(feedback.cost[c]) * l(j, c)).sum();
                    assert!((got - damping - want(i, j)).abs() < 1e-4 * mean, "k {k} [{i}, {j}]");
                }
            }
        }
    }

    #[test]
    fn too_few_rows_are_not_enough() {
        let mut moments = Moments::new(4);
        moments.add(Isa::detect(), &[1.0; 4 * 7], |lines, line| lines.into_iter().for_each(line));
        assert!(Feedback::new(Isa::detect(), moments).is_none());
    }
}
