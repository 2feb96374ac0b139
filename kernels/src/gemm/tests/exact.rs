//! Sums that are known exactly, and what is no number.

use super::*;
use crate::layout::{Q4_GROUP, TILE_N};

/// `m` rows of `left` by `weight`, and nothing else.
fn linear(kernel: &'static GemmKernel, left: &Left, m: usize, weight: Weight<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; m * weight.shape.n];
    let call = Gemm {
        operand: left.view(),
        input: ImageShape::rows(m),
        filter: Filter::POINT,
        weight,
        epilogue: Epilogue::default(),
        out: RowsMut::F32(&mut out),
    };
    gemm_with(&Workers::new(1), kernel, call);
    out
}

/// Codes times int8 weights are exact, up to the largest sums of K = 10240.
#[test]
fn integer_sums_are_exact() {
    for (m, n, k) in [(3, 5, 10240), (13, 33, 64), (2, 16, 4100)] {
        let mut random = Random::new(3);
        let shape = WeightShape::linear(n, k);
        let mut left = Left::new(&mut random, Rank::U8, &ImageShape::rows(m), k, shape.k_padded());
        left.scale.fill(1.0);
        left.codes[..k].fill(255);
        // The widest weight of each output is 127, so its scale is 1.
        let mut src: Vec<f32> = (0..n * k).map(|_| (random.bits() % 255) as f32 - 127.0).collect();
        src.iter_mut().step_by(k).for_each(|w| *w = 127.0);
        src[..k].fill(127.0);
        let mut bytes = vec![0; shape.bytes(Encoding::Q8)];
        quantize::encode(Encoding::Q8, shape, &src, &mut bytes);
        let weight = Weight::new(Encoding::Q8, shape, &bytes);
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), Encoding::Q8)) {
            let out = linear(kernel, &left, m, weight);
            for (i, &y) in out.iter().enumerate() {
                let codes = &left.codes[i / n * shape.k_padded()..][..k];
                let weights = &src[i % n * k..][..k];
                let sum: i64 =
                    codes.iter().zip(weights).map(|(&c, &w)| (i64::from(c) - 128) * w as i64).sum();
                assert_eq!(y, sum as f32, "{} {m}x{n}x{k} [{i}]", kernel.name);
            }
        }
    }
}

/// So they are of a filter, up to the largest sums of 2100 inputs: transforms of rows and weights lose nothing.
#[test]
fn sums_of_filters_are_exact() {
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let filter = Filter { kh: 3, kw: 3, stride: 1, upsample: false };
    for (h, w, n, k, zero) in [(4, 5, 20, 2100, 1), (3, 2, 33, 64, 255), (5, 9, 17, 130, 128)] {
        let mut random = Random::new(9);
        let input = ImageShape { batch: 1, h, w, border };
        let shape = WeightShape { n, taps: 9, k };
        let mut left = Left::new(&mut random, Rank::U8Uniform, &input, k, shape.k_padded());
        left.images = vec![Coding { scale: 1.0, zero }];
        for (i, code) in left.codes.iter_mut().enumerate() {
            let (row, i) = (i / shape.k_padded(), i % shape.k_padded());
            let (y, x) = (row / input.full_w(), row % input.full_w());
            let inside = (1..=h).contains(&y) && (1..=w).contains(&x) && i < k;
            *code = match random.bits() % 3 {
                _ if !inside => zero as u8,
                0 => 1,
                _ => 255,
            };
        }
        // The widest weight of each output is 127, so its scale is 1; all of the first's are, and the second's take turns.
        let mut src: Vec<f32> = (0..n * 9 * k).map(|_| (random.bits() % 255) as f32 - 127.0).collect();
        src.iter_mut().step_by(9 * k).for_each(|w| *w = 127.0);
        src[..9 * k].fill(127.0);
        for (i, w) in src[9 * k..18 * k].iter_mut().enumerate() {
            *w = if (i / k).is_multiple_of(2) { 127.0 } else { -127.0 };
        }
        let mut bytes = vec![0; shape.bytes(Encoding::Q8)];
        quantize::encode(Encoding::Q8, shape, &src, &mut bytes);
        let weight = Weight::new(Encoding::Q8, shape, &bytes);
        let expected = reference::products(&left.view(), &input, &filter, &weight, false);
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), Encoding::Q8)) {
            let mut out = vec![f32::NAN; h * w * n];
            let (epilogue, to) = (Epilogue::default(), RowsMut::F32(&mut out));
            let call = Gemm { operand: left.view(), input, filter, weight, epilogue, out: to };
            gemm_with(&Workers::new(1), kernel, call);
            for (i, (&y, &sum)) in out.iter().zip(&expected).enumerate() {
                assert_eq!(y, sum as f32, "{} {h}x{w} {n}x{k} [{i}]", kernel.name);
            }
        }
    }
}

/// A row with a number that is none gives outputs that are none, and so does one that is infinite; the others don't.
#[test]
fn what_is_not_finite_stays_so() {
    let (m, n, k) = (14, 33, 700);
    for encoding in [Encoding::Q8, Encoding::F16, Encoding::Bf16] {
        let shape = WeightShape::linear(n, k);
        let mut random = Random::new(5);
        let mut left = Left::new(&mut random, Rank::Bf16, &ImageShape::rows(m), k, shape.k_padded());
        left.bf16[3 * shape.k_padded() + 699] = bf16::NAN;
        left.bf16[7 * shape.k_padded()] = bf16::NEG_INFINITY;
        let bytes = weight_bytes(&mut random, encoding, shape);
        let weight = Weight::new(encoding, shape, &bytes);
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), encoding)) {
            let out = linear(kernel, &left, m, weight);
            for (i, y) in out.iter().enumerate() {
                let finite = !matches!(i / n, 3 | 7);
                assert_eq!(y.is_finite(), finite, "{} {encoding:?} row {}: {y}", kernel.name, i / n);
            }
        }
    }
}

/// 4-bit codes of the greatest magnitude, all of one sign, by the greatest activations: the largest sums of a group.
#[test]
fn sums_of_groups_are_exact() {
    let (m, k) = (13, 10240);
    for n in [1, 16, 33] {
        let shape = WeightShape::linear(n, k);
        let mut left = Left::new(&mut Random::new(3), Rank::U8, &ImageShape::rows(m), k, shape.k_padded());
        left.scale.fill(1.0);
        left.codes.fill(255);
        // Codes are 0, which is -8; outputs take turns between the widest group scales of both signs.
        let group = |n: usize| if n.is_multiple_of(2) { 15i8 } else { -15 };
        let mut bytes = vec![0; shape.bytes(Encoding::Q4)];
        for panel in bytes.chunks_exact_mut(shape.panel_bytes(Encoding::Q4)) {
            for n in 0..TILE_N {
                panel[4 * n..][..4].copy_from_slice(&1.0f32.to_le_bytes());
                let sum = -8 * k as i32 * i32::from(group(n));
                panel[4 * (TILE_N + n)..][..4].copy_from_slice(&sum.to_le_bytes());
                let groups = &mut panel[4 * 2 * TILE_N..][..k / Q4_GROUP * TILE_N];
                groups.iter_mut().skip(n).step_by(TILE_N).for_each(|g| *g = group(n) as u8);
            }
        }
        let weight = Weight::new(Encoding::Q4, shape, &bytes);
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), Encoding::Q4)) {
            let out = linear(kernel, &left, m, weight);
            for (i, &y) in out.iter().enumerate() {
                let sum = (255 - 128) * -8 * k as i32 * i32::from(group(i % n % TILE_N));
                assert_eq!(y, sum as f32, "{} {m}x{n}x{k} [{i}]", kernel.name);
            }
        }
    }
}
