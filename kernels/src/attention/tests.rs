use super::*;
use crate::reference::attention as reference;

/// Every tier whose attention is a different one.
fn tiers() -> Vec<Isa> {
    let mut tiers = crate::simd::tests::tiers();
    let others = [Isa::AvxVnni, Isa::Amx];
    tiers.extend(others.into_iter().filter(|isa| isa.is_available()));
    tiers
}

/// Uniform numbers with a standard deviation of `deviation`.
fn noise(n: usize, seed: u32, deviation: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * 3f32.sqrt() * deviation).collect()
}

fn half(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

/// Operands of a call: q, k and v are column ranges of wider rows, and what lies between is NaN.
struct Operands {
    shape: AttentionShape,
    slack: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
}

impl Operands {
    fn new(shape: AttentionShape, slack: usize, sharpness: f32) -> Self {
        let columns = shape.heads * shape.d;
        let rows = |rows: usize, seed: u32, deviation: f32| {
            let mut data = vec![f32::NAN; rows * (columns + slack)];
            let numbers = noise(rows * columns, seed, deviation);
            for (row, from) in data.chunks_exact_mut(columns + slack).zip(numbers.chunks_exact(columns)) {
                row[..columns].copy_from_slice(from);
            }
            data
        };
        let (nq, nk) = (shape.batch * shape.nq, shape.batch * shape.nk);
        let bias = noise(shape.heads * shape.nq * shape.nk, 4, 2.0);
        Operands { shape, slack, q: rows(nq, 1, sharpness), k: rows(nk, 2, 1.0), v: rows(nk, 3, 1.0), bias }
    }

    /// The greatest error relative to the greatest output, with operands (and output) of f32 or bf16.
    fn error(&self, isa: Isa, workers: &Workers, mask: Mask<'_>, products: Products, narrow: bool) -> f64 {
        let columns = self.shape.heads * self.shape.d;
        let stride = columns + self.slack;
        let (q16, k16, v16) = (half(&self.q), half(&self.k), half(&self.v));
        let rows = |wide, narrow16| if narrow { Rows::Bf16(narrow16) } else { Rows::F32(wide) };
        let n = self.shape.batch * self.shape.nq * columns;
        let (mut out, mut out16) = (vec![f32::NAN; n], vec![bf16::NAN; n]);
        let call = Attention {
            shape: self.shape,
            q: rows(&self.q, &q16),
            q_stride: stride,
            k: rows(&self.k, &k16),
            v: rows(&self.v, &v16),
            kv_stride: stride,
            scale: 1.0 / (self.shape.d as f32).sqrt(),
            mask,
            products,
            out: if narrow { RowsMut::Bf16(&mut out16) } else { RowsMut::F32(&mut out) },
        };
        let want = reference::attention(&call);
        let bytes = workspace_bytes(&self.shape, isa, products, workers.threads());
        let mut lines = vec![[f32::NAN; 16]; bytes.div_ceil(64) + 1];
        let workspace: &mut [u8] = cast_slice_mut(&mut lines);
        let skew = workspace.as_ptr().align_offset(64);
        attention(workers, isa, call, &mut workspace[skew..skew + bytes]);
        let got: Vec<f64> = if narrow {
            out16.iter().map(|x| f64::from(x.to_f32())).collect()
        } else {
            out.iter().map(|&x| f64::from(x)).collect()
        };
        let most = want.iter().fold(0f64, |m, x| m.max(x.abs()));
        got.iter().zip(&want).fold(0.0, |e: f64, (g, w)| {
            assert!(g.is_finite(), "{isa:?} {:?}: {g} for {w}", self.shape);
            e.max((g - w).abs() / most)
        })
    }
}

/// Relative error of `Products::F32` with f32 operands.
const EXACT: f64 = 3e-6;
/// Relative error of bf16 products, and of bf16 outputs.
const NARROW: f64 = 1e-2;

/// Relative error of products of bytes, for scores with a deviation of 1: AVX2 has 7 bits of some, and of AMX only the
/// scores are such products.
fn bytes_bound(isa: Isa) -> f64 {
    match isa {
        Isa::Avx2 => 5e-2,
        Isa::Amx => 1.5e-2,
        _ => 3e-2,
    }
}

/// Relative error of integer products of so few keys that they have 16 bits, for the same scores.
const SHORT: f64 = 2e-3;

/// Whether products of bytes are others than of bf16.
fn takes_bytes(isa: Isa) -> bool {
    has_dot(isa) || isa == Isa::Amx
}

fn shape(batch: usize, nq: usize, nk: usize, heads: usize, d: usize) -> AttentionShape {
    AttentionShape { batch, nq, nk, heads, d }
}

/// Sizes around the edges of vectors, blocks of queries, panels and blocks of keys.
fn shapes() -> Vec<AttentionShape> {
    let mut shapes = vec![shape(1, 1, 1, 1, 8), shape(2, 3, 5, 3, 12), shape(1, 7, 300, 2, 40)];
    for n in [15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 96, 97] {
        shapes.push(shape(1, n, 2 * n - 1, 2, 16));
    }
    for nk in [7, 8, 9, 31, 32, 33, 77, 127, 128, 129, 255, 256, 257, 512] {
        shapes.push(shape(1, 33, nk, 1, 20));
    }
    for nk in [31, 32, 64, 95, 96, 97, 192] {
        shapes.push(shape(1, 17, nk, 1, 80));
    }
    for d in [1, 8, 12, 16, 31, 32, 33, 40, 48, 64, 80, 96, 128, 160, 512] {
        shapes.push(shape(2, 19, 45, 2, d));
    }
    shapes
}

#[test]
fn every_tier_agrees_with_the_reference() {
    let workers = Workers::new(2);
    for shape in shapes() {
        let operands = Operands::new(shape, 5, 1.0);
        for isa in tiers() {
            for products in [Products::F32, Products::Bf16, Products::Int8] {
                let bound = match products {
                    Products::F32 => EXACT,
                    Products::Int8 if has_dot(isa) && shape.d <= integers::MAX_D && shape.nk < BYTES_KEYS => {
                        SHORT
                    }
                    Products::Int8 if takes_bytes(isa) => bytes_bound(isa),
                    _ => NARROW,
                };
                let e = operands.error(isa, &workers, Mask::None, products, false);
                assert!(e <= bound, "{isa:?} {products:?} {shape:?}: {e}");
                let e = operands.error(isa, &workers, Mask::Bias(&operands.bias), products, true);
                assert!(e <= NARROW, "{isa:?} {products:?} {shape:?} with a bias: {e}");
            }
        }
    }
}

#[test]
fn products_of_bytes_agree_with_the_reference() {
    let workers = Workers::new(2);
    let mut shapes = vec![shape(2, 100, 700, 2, 40)];
    for nk in [255, 256, 257, 259, 260, 263, 264, 265, 383, 384, 385] {
        shapes.push(shape(1, 25, nk, 1, 20));
    }
    for d in [1, 3, 4, 5, 8, 31, 32, 33, 40, 64, 80, 96, 128, 160, 253, 256, 257] {
        shapes.push(shape(1, 49, 290, 1, d));
    }
    for nk in [511, 512, 513, 543, 544, 545, 575, 576, 577] {
        shapes.push(shape(1, 17, nk, 1, 40));
    }
    for d in [32, 33, 47, 48, 63, 64, 65, 80, 95, 96, 97] {
        shapes.push(shape(1, 65, 600, 1, d));
    }
    for shape in shapes {
        let columns = shape.heads * shape.d;
        for (sharpness, offset, narrow) in [(1.0, 0.0, true), (3.0, 0.0, false), (1.0, 10.0, false)] {
            let mut operands = Operands::new(shape, 5, sharpness);
            // Columns of K and V around numbers of their own.
            let offsets = noise(columns, 9, offset);
            for rows in [&mut operands.k, &mut operands.v] {
                for row in rows.chunks_exact_mut(columns + 5) {
                    row.iter_mut().zip(&offsets).for_each(|(x, offset)| *x += offset);
                }
            }
            for isa in tiers().into_iter().filter(|&isa| takes_bytes(isa)) {
                let e = operands.error(isa, &workers, Mask::None, Products::Int8, narrow);
                let bound = bytes_bound(isa) * if sharpness > 1.0 { 2.0 } else { 1.0 };
                assert!(e <= bound, "{isa:?} {shape:?} {sharpness} {offset}: {e}");
            }
        }
    }
}

#[test]
fn a_key_unlike_the_others_leaves_them_bits() {
    let workers = Workers::new(2);
    for (nk, d) in [(77, 40), (77, 80), (77, 160), (154, 64), (231, 40), (8, 256)] {
        let shape = shape(1, 50, nk, 2, d);
        let mut operands = Operands::new(shape, 5, 1.0);
        let columns = 2 * d;
        // The first key has one column far beyond the others', and attracts every query; its value is next to nothing.
        for head in 0..2 {
            operands.k[head * d + 3] = 60.0;
            for row in operands.q.chunks_exact_mut(columns + 5) {
                row[head * d + 3] = 5.0 * (d as f32).sqrt() / 60.0;
            }
        }
        operands.v[..columns].iter_mut().for_each(|x| *x *= 0.01);
        for isa in tiers().into_iter().filter(|&isa| has_dot(isa)) {
            let e = operands.error(isa, &workers, Mask::None, Products::Int8, false);
            assert!(e <= 2.0 * SHORT, "{isa:?} {shape:?}: {e}");
        }
    }
}

#[test]
fn products_of_bytes_want_no_more_memory() {
    for nk in [256, 257, 300, 384, 385, 1024, 4096, 9216, 16384] {
        for d in [1, 8, 12, 40, 64, 80, 128, 160, 256] {
            for heads in [1, 2, 8, 16, 20] {
                let shape = shape(2, nk, nk, heads, d);
                for isa in tiers() {
                    let [bytes, others] = [Products::Int8, Products::Bf16]
                        .map(|products| workspace_bytes(&shape, isa, products, 2));
                    assert!(bytes <= others, "{isa:?} {shape:?}: {bytes} for {others}");
                }
            }
        }
    }
}

#[test]
fn weights_of_bytes_sum_to_one() {
    let workers = Workers::new(1);
    for (nk, growth) in [(700, -0.1), (700, 0.0), (700, 0.1), (77, 0.0), (180, 0.1)] {
        let shape = shape(1, 50, nk, 1, 40);
        let mut operands = Operands::new(shape, 0, 30.0);
        for (j, key) in operands.k.chunks_exact_mut(40).enumerate() {
            key.iter_mut().for_each(|x| *x *= 70.0 + growth * j as f32);
        }
        operands
            .v
            .chunks_exact_mut(40)
            .for_each(|v| v.iter_mut().enumerate().for_each(|(c, x)| *x = c as f32));
        // Queries and keys of nothing but zeros, too.
        operands.q[..80].fill(0.0);
        for zeros in [false, true] {
            if zeros {
                operands.k.fill(0.0);
            }
            for isa in tiers().into_iter().filter(|&isa| takes_bytes(isa)) {
                let e = operands.error(isa, &workers, Mask::None, Products::Int8, false);
                assert!(e <= EXACT, "{isa:?} {nk} {growth} {zeros}: {e}");
            }
        }
    }
}

#[test]
fn causal_masks_agree_with_the_reference() {
    let workers = Workers::new(2);
    for n in [1, 2, 15, 16, 17, 32, 33, 48, 49, 77, 127, 128, 129, 200, 300] {
        let operands = Operands::new(shape(2, n, n, 2, 24), 3, 1.0);
        for isa in tiers() {
            for (products, bound) in
                [(Products::F32, EXACT), (Products::Bf16, NARROW), (Products::Int8, NARROW)]
            {
                let e = operands.error(isa, &workers, Mask::Causal, products, false);
                assert!(e <= bound, "{isa:?} {products:?} causal {n}: {e}");
            }
        }
    }
}

#[test]
fn sharp_and_growing_scores_do_not_overflow() {
    let workers = Workers::new(1);
    let shape = shape(1, 40, 700, 1, 32);
    let mut operands = Operands::new(shape, 0, 30.0);
    // Later keys score higher, so that the running maximum moves all the time.
    for (j, key) in operands.k.chunks_exact_mut(32).enumerate() {
        key.iter_mut().for_each(|x| *x *= j as f32 / 100.0);
    }
    for isa in tiers() {
        // The score itself, about 200, is good to 2^-24 of its size.
        let e = operands.error(isa, &workers, Mask::None, Products::F32, false);
        assert!(e <= 2e-4, "{isa:?}: {e}");
        let hidden: Vec<f32> =
            (0..40 * 700).map(|i| if i % 700 < 600 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let e = operands.error(isa, &workers, Mask::Bias(&hidden), Products::F32, false);
        assert!(e <= 2e-4, "{isa:?} with keys hidden: {e}");
    }
}

#[test]
fn scores_far_from_zero_have_the_same_softmax() {
    let workers = Workers::new(2);
    let shape = shape(1, 70, 300, 1, 24);
    for offset in [-65536.0, -1024.0, -512.0, -256.0, 256.0, 512.0, 1024.0, 65536.0] {
        // The first keys score lower, as the rest, or higher.
        for first in [2.0, 1.0, 0.5] {
            let mut operands = Operands::new(shape, 0, 1.0);
            operands.q.chunks_exact_mut(24).for_each(|q| q[23] = 1.0);
            for (j, k) in operands.k.chunks_exact_mut(24).enumerate() {
                k[23] = if j < 200 { offset * first } else { offset };
            }
            let hidden: Vec<f32> =
                (0..70 * 300).map(|i| if i % 300 < 130 { f32::NEG_INFINITY } else { 0.0 }).collect();
            for isa in tiers() {
                for mask in [Mask::None, Mask::Bias(&hidden)] {
                    let e = operands.error(isa, &workers, mask, Products::Bf16, false);
                    assert!(e <= NARROW, "{isa:?} {offset} {first} {}: {e}", matches!(mask, Mask::None));
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let shape = shape(2, 100, 600, 3, 40);
    let operands = Operands::new(shape, 0, 2.0);
    for isa in tiers() {
        for products in [Products::F32, Products::Bf16, Products::Int8] {
            let run = |threads: usize| {
                let mut out = vec![f32::NAN; operands.q.len()];
                let call = Attention {
                    shape,
                    q: Rows::F32(&operands.q),
                    q_stride: 120,
                    k: Rows::F32(&operands.k),
                    v: Rows::F32(&operands.v),
                    kv_stride: 120,
                    scale: 0.2,
                    mask: Mask::None,
                    products,
                    out: RowsMut::F32(&mut out),
                };
                let mut lines = vec![[0f32; 16]; workspace_bytes(&shape, isa, products, threads) / 64 + 2];
                let workspace: &mut [u8] = cast_slice_mut(&mut lines);
                let skew = workspace.as_ptr().align_offset(64);
                let bytes = workspace.len() - 64;
                attention(&Workers::new(threads), isa, call, &mut workspace[skew..skew + bytes]);
                out
            };
            assert_eq!(run(1), run(3), "{isa:?} {products:?}");
        }
    }
}
