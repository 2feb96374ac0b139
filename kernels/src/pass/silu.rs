//! SiLU of 16-bit numbers, for what is rounded to 8 bits: a parabola for each piece of the range that an image's numbers have.
#![forbid(unsafe_code)]

use crate::simd::shorts::{MAX_PIECES, Pair, Shorts, Table};
use crate::view::Coding;

/// SiLU on a range of x: both x and the result are 16-bit numbers, in units of the table's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct SiluTable {
    /// x in units of the table is `factor * x + offset`.
    pub(super) factor: f32,
    pub(super) offset: f32,
    /// The results in units of the table are multiples of this; for a row with a scale of its own.
    pub(super) unit: f32,
    /// How far a result may be wrong, in units of the table.
    pub(super) error: f32,
    /// Of 1, v and v^2, v the place in the piece.
    coefficients: [Table; 3],
}

/// `-min x sigmoid(x)`.
pub(super) const DIP: f32 = 0.278_465;

/// Below this SiLU is nearly 0, and taken for what it is here.
const FAR: f32 = -9.0;

/// The largest third derivative of SiLU.
const BEND: f64 = 0.3082;

/// The error of 16-bit arithmetic, in units of the results: coefficients and products are rounded.
const ROUNDING: f64 = 2.0;

impl SiluTable {
    /// For x in `range`, of codes `silu(x) / scale + zero` less 128, in the high byte of each result with half a step added.
    /// None where they would be wrong by more than a ninth of a step.
    pub(super) fn codes(pieces: usize, range: [f32; 2], coding: Coding) -> Option<Self> {
        let unit = f64::from(coding.scale) / 256.0;
        let shift = f64::from(coding.zero - 128) * 256.0 + 128.0;
        Self::fit(pieces, range, unit, shift).filter(|table| table.error <= 256.0 / 9.0)
    }

    /// For x in `range`, of results that make use of 16 bits. None where the error isn't just a few units.
    pub(super) fn rows(pieces: usize, range: [f32; 2]) -> Option<Self> {
        let most = silu(f64::from(range[1])).max(0.3);
        Self::fit(pieces, range, most / 32_000.0, 0.0).filter(|table| table.error <= 16.0)
    }

    /// Results `silu(x) / unit + shift`.
    fn fit(pieces: usize, [low, high]: [f32; 2], unit: f64, shift: f64) -> Option<Self> {
        // From the first piece's middle to the last one's: a little beyond is still on the last piece.
        let (low, length) = (f64::from(low.max(FAR)), 65_536.0 / pieces as f64);
        let factor = (65_536.0 - length) / (f64::from(high) - low);
        let offset = -32_768.0 - low * factor;
        let half = 0.5 * length / factor;
        if !(half > 0.0 && half < 1e3 && unit > 1e-30) {
            return None;
        }
        let f = |x: f64| silu(x) / unit + shift;
        // Where the parabola that errs least agrees with the function, about.
        let root = 0.75f64.sqrt();
        let mut coefficients = [[0; MAX_PIECES]; 3];
        let first = -(pieces as i32) / 2;
        for i in first..-first {
            let middle = (f64::from(i) * length - offset) / factor;
            let [below, here, above] = [middle - half * root, middle, middle + half * root].map(f);
            let slope = (above - below) / (2.0 * root);
            let bend = (above + below - 2.0 * here) / (2.0 * root * root);
            if slope.abs() + bend.abs() > 32_766.0 {
                return None;
            }
            for (coefficients, x) in coefficients.iter_mut().zip([here, slope, bend]) {
                coefficients[i.rem_euclid(pieces as i32) as usize] = x.round() as i16;
            }
        }
        Some(SiluTable {
            factor: factor as f32,
            offset: offset as f32,
            unit: unit as f32,
            error: (BEND * half.powi(3) / 24.0 / unit + 0.6 / factor / unit + ROUNDING) as f32,
            coefficients: coefficients.map(Table::new),
        })
    }

    /// The function, step by step for all vectors: their chains of operations are too long to be followed one after the other.
    #[inline(always)]
    pub(super) fn of<H: Shorts, const N: usize>(&self, h: H, x: [Pair<H::V>; N]) -> [Pair<H::V>; N] {
        let [a, b, c] = &self.coefficients;
        let mut y = x;
        let (mut index, mut place) = ([h.index(x[0]); N], x);
        for i in 0..N {
            index[i] = h.index(x[i]);
            for j in 0..2 {
                place[i][j] = h.in_turn(h.place(x[i][j]));
            }
        }
        for i in 0..N {
            let c = h.lookup(c, index[i]);
            for j in 0..2 {
                y[i][j] = h.in_turn(h.mul(c[j], place[i][j]));
            }
        }
        for i in 0..N {
            let b = h.lookup(b, index[i]);
            for j in 0..2 {
                y[i][j] = h.in_turn(h.add(b[j], y[i][j]));
            }
        }
        for i in 0..2 * N {
            let (i, j) = (i / 2, i % 2);
            y[i][j] = h.in_turn(h.mul(place[i][j], y[i][j]));
        }
        for i in 0..N {
            let a = h.lookup(a, index[i]);
            for j in 0..2 {
                y[i][j] = h.add_saturating(a[j], y[i][j]);
            }
        }
        y
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::tiers;
    use crate::simd::{Element, Simd, SimdOp, dispatch};

    /// Codes of x, and results for rows, in multiples of 1.
    struct Run<'a> {
        x: &'a [f32],
        range: [f32; 2],
        coding: Coding,
    }

    impl SimdOp for Run<'_> {
        type Output = Option<()>;

        fn run<S: Simd>(self, s: S) -> Option<()> {
            let h = s.shorts()?;
            let tables = [
                SiluTable::codes(S::Shorts::PIECES, self.range, self.coding),
                SiluTable::rows(S::Shorts::PIECES, self.range),
            ];
            for (i, table) in tables.into_iter().enumerate() {
                let table = table?;
                for x in self.x.chunks_exact(S::BLOCK) {
                    let units: Vec<f32> = x.iter().map(|x| x.mul_add(table.factor, table.offset)).collect();
                    let pair = [h.round_block(f32::load_block(s, &units), false)];
                    let [pair] = table.of(h, pair);
                    if i == 0 {
                        let mut codes = vec![0; S::BLOCK];
                        h.store_codes_high(pair, false, &mut codes);
                        for (x, code) in x.iter().zip(codes) {
                            let Coding { scale, zero } = self.coding;
                            let want = silu(f64::from(*x)) / f64::from(scale) + f64::from(zero);
                            assert!(
                                (f64::from(code) - want).abs() <= 0.5 + 1.0 / 9.0,
                                "{x}: {code} for {want}"
                            );
                        }
                        continue;
                    }
                    let mut got = [0; 64];
                    let mut want = vec![0.0; S::BLOCK];
                    h.store(pair[0], &mut got);
                    h.store(pair[1], &mut got[2 * S::LANES..]);
                    let mut got = got[..S::BLOCK].to_vec();
                    want.iter_mut()
                        .zip(x)
                        .for_each(|(w, &x)| *w = silu(f64::from(x)) / f64::from(table.unit));
                    // In an order of their own.
                    got.sort_unstable();
                    want.sort_by(f64::total_cmp);
                    for (got, want) in got.iter().zip(want) {
                        assert!((f64::from(*got) - want).abs() <= f64::from(table.error), "{got} for {want}");
                    }
                }
            }
            Some(())
        }
    }

    #[test]
    fn tables_keep_their_bounds() {
        for range in
            [[-0.3, 0.4], [-3.0, 1.5], [-6.0, 7.0], [-40.0, 12.0], [-1.0, 15.0], [0.0, 5.0], [-4.0, 0.0]]
        {
            let [low, high] = range;
            let x: Vec<f32> = (0..=8191).map(|i| low + (high - low) * i as f32 / 8191.0).collect();
            let least = x.iter().map(|&x| silu(f64::from(x))).fold(0.0, f64::min);
            let scale = (silu(f64::from(high)).max(0.0) - least) / 254.0;
            let coding = Coding { scale: scale as f32, zero: 1 + (-least / scale).round() as i32 };
            for isa in tiers() {
                let served = dispatch(isa, Run { x: &x, range, coding }).is_some();
                assert_eq!(served, crate::simd::lanes(isa) > 4, "{isa:?} {range:?}");
            }
        }
    }
}
