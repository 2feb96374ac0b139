use super::*;
use crate::bf16;
use crate::reference::pass as reference;
use crate::simd::tests::tiers;
use crate::view::{Border, Coding};

fn noise(n: usize, seed: u32, mean: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| mean + next() + next() + next()).collect()
}

fn half(x: &[f32]) -> Vec<bf16> {
    x.iter().map(|&x| bf16::from_f32(x)).collect()
}

fn close(got: f32, want: f64, bound: f64, what: &str) {
    assert!((f64::from(got) - want).abs() <= bound * want.abs().max(1.0), "{what}: {got} for {want}");
}

/// Two parts, f32 and bf16, with sizes around the width of vectors; group sizes of 1, 2, 3, 10 and more.
const SHAPES: [(usize, usize, usize); 10] = [
    (1, 0, 1),
    (3, 0, 1),
    (16, 0, 8),
    (20, 10, 10),
    (64, 32, 32),
    (31, 33, 32),
    (17, 3, 2),
    (320, 0, 32),
    (40, 56, 32),
    (130, 62, 3),
];

const IMAGES: [ImageShape; 4] = [
    ImageShape::rows(5),
    ImageShape { batch: 2, h: 3, w: 5, border: Border { top: 1, left: 1, bottom: 1, right: 1 } },
    ImageShape { batch: 1, h: 2, w: 2, border: Border { top: 0, left: 0, bottom: 1, right: 1 } },
    ImageShape { batch: 3, h: 21, w: 17, border: Border { top: 0, left: 2, bottom: 0, right: 0 } },
];

#[test]
fn group_stats_agree_with_the_reference() {
    let workers = Workers::new(2);
    for isa in tiers() {
        for image in IMAGES {
            for (c0, c1, groups) in SHAPES {
                for mean in [0.0, 30.0] {
                    let (a, b) =
                        (noise(image.pixels() * c0, 1, mean), half(&noise(image.pixels() * c1, 2, mean)));
                    let source = Source::two((Rows::F32(&a), c0), (Rows::Bf16(&b), c1));
                    let mut stats = vec![f32::NAN; image.batch * stats_len(groups, c0 + c1)];
                    let mut sums = vec![f64::NAN; sums_len(&image, groups, c0 + c1)];
                    group_stats(&workers, isa, source, image, groups, 1e-5, &mut sums, &mut stats);
                    let want = reference::group_stats(source, image, groups, 1e-5);
                    for (&got, want) in stats.iter().zip(want) {
                        close(got, want, 1e-6, &format!("{isa:?} {image:?} {c0}+{c1}/{groups}"));
                    }
                }
            }
        }
    }
}

#[test]
fn passes_agree_with_the_reference() {
    let workers = Workers::new(2);
    for isa in tiers() {
        for image in IMAGES {
            for (i, (c0, c1, groups)) in SHAPES.into_iter().enumerate() {
                let c = c0 + c1;
                let (a, b) = (noise(image.pixels() * c0, 3, 0.5), half(&noise(image.pixels() * c1, 4, 0.5)));
                let source = Source::two((Rows::F32(&a), c0), (Rows::Bf16(&b), c1));
                let (gamma, beta) = (noise(c, 5, 1.0), noise(c, 6, 0.0));
                let mut stats = vec![f32::NAN; image.batch * stats_len(groups, c)];
                let mut sums = vec![f64::NAN; sums_len(&image, groups, c)];
                group_stats(&workers, isa, source, image, groups, 1e-5, &mut sums, &mut stats);
                let norms = [
                    Norm::None,
                    Norm::Group { stats: &stats, groups, gamma: &gamma, beta: &beta },
                    Norm::Layer { gamma: &gamma, beta: &beta, eps: 1e-3 },
                ];
                let activations = [Activation::None, Activation::Silu, Activation::GeluTanh];
                let factors: Vec<f32> = (0..c).map(|c| [1.0, 0.25, 32.0, 0.7][c % 4]).collect();
                for (norm, activation) in norms.into_iter().flat_map(|n| activations.map(|a| (n, a))) {
                    for factors in [None, Some(factors.as_slice())] {
                        let recipe = Recipe { norm, activation, factors };
                        let what = format!("{isa:?} {image:?} {c0}+{c1} {recipe:?}");
                        let stride = c.next_multiple_of(64) + 64 * (i % 2);
                        check(&workers, isa, source, image, recipe, stride, &what);
                    }
                }
            }
        }
    }
}

/// Every type of output.
fn check(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    recipe: Recipe<'_>,
    stride: usize,
    what: &str,
) {
    let rows = reference::rows(source, image, recipe);
    let want = reference::operand(&rows, image, stride);
    let n = image.operand_rows();
    let budget = 4e-6 * f64::from(recipe.factors.map_or(1.0, |f| f.iter().copied().fold(1.0, f32::max)));

    let mut plain = vec![f32::NAN; rows.len()];
    rows_pass(workers, isa, source, image, recipe, RowsMut::F32(&mut plain));
    rows.iter().zip(&plain).for_each(|(&want, &got)| close(got, want, budget, what));

    let mut wide = vec![f32::NAN; n * stride];
    operand_pass(workers, isa, source, image, recipe, OperandMut::F32(&mut wide), stride);
    want.iter().zip(&wide).for_each(|(&want, &got)| close(got, want, budget, what));

    // What is rounded to 8 bits takes SiLU less exactly.
    let coarse = if recipe.activation == Activation::Silu { 5e-4 } else { 0.0 };
    let mut narrow = vec![bf16::NAN; n * stride];
    operand_pass(workers, isa, source, image, recipe, OperandMut::Bf16(&mut narrow), stride);
    for (&got, &x) in narrow.iter().zip(&wide) {
        let error = (got.to_f32() - x).abs();
        assert!(error <= x.abs() * (1.0 / 256.0 + coarse) + f32::MIN_POSITIVE, "{what}: {got} for {x}");
    }

    let (mut codes, mut scale) = (vec![7u8; n * stride], vec![f32::NAN; n]);
    let out = OperandMut::U8 { codes: &mut codes, scale: &mut scale };
    operand_pass(workers, isa, source, image, recipe, out, stride);
    let quantized =
        |x: f32, inverse: f32| ((x * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
    for (i, row) in wide.chunks_exact(stride).enumerate() {
        let most = row.iter().fold(0f32, |m, x| m.max(x.abs()));
        // SiLU in 16 bits serves rows whose greatest has 11 bits at least.
        let scale_error = if coarse > 0.0 { 1.5e-3 } else { 0.0 };
        assert!((scale[i] - most / 127.0).abs() <= scale_error * scale[i], "{what}: scale of row {i}");
        let inverse = if most > 0.0 { 127.0 / most } else { 0.0 };
        for (&got, &x) in codes[i * stride..(i + 1) * stride].iter().zip(row) {
            let want = quantized(x, inverse);
            // Where the product isn't rounded first, it may lie next to the middle of two codes instead of there.
            let exact = f64::from(x) * f64::from(inverse) + 128.0;
            let nearest = (f64::from(got) - exact).abs() <= 0.5 + 1e-5;
            assert!(
                got == want || nearest || coarse > 0.0 && got.abs_diff(want) == 1,
                "{what}: row {i}: {got} for {want}"
            );
        }
    }

    let mut images: Vec<Coding> =
        (1..=image.batch as i32).map(|b| Coding { scale: b as f32 * 0.01, zero: 100 + b }).collect();
    if matches!(recipe.norm, Norm::Group { .. }) {
        group_codings(recipe, &mut images);
        let each = wide.len() / images.len();
        for (image, wide) in images.iter().zip(wide.chunks_exact(each)) {
            for x in wide {
                let code = f64::from(*x) / f64::from(image.scale) + f64::from(image.zero);
                assert!((0.4..255.6).contains(&code) || *x == 0.0, "{what}: {x} is {code} in {image:?}");
            }
        }
    }
    let out = OperandMut::U8Uniform { codes: &mut codes, images: &images };
    operand_pass(workers, isa, source, image, recipe, out, stride);
    let each = wide.len() / images.len();
    for (i, (&got, &x)) in codes.iter().zip(&wide).enumerate() {
        let Coding { scale, zero } = images[i / each];
        if i % stride >= source.columns() {
            continue; // meets weights that are zero
        }
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let want =
            (x.mul_add(inverse, (zero - 128) as f32).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
        // Where the tier doesn't fuse, a number halfway between two codes may go either way.
        assert!(
            got.abs_diff(want) <= u8::from(coarse > 0.0 || isa == Isa::Scalar),
            "{what}: uniform: {got} for {want}"
        );
    }
}

#[test]
fn threads_and_batches_do_not_change_a_bit() {
    let image =
        ImageShape { batch: 2, h: 33, w: 40, border: Border { top: 1, left: 1, bottom: 1, right: 1 } };
    let one = ImageShape { batch: 1, ..image };
    let (c, groups, stride) = (96, 32, 128);
    let x = noise(image.pixels() * c, 9, 2.0);
    let (gamma, beta) = (noise(c, 5, 1.0), noise(c, 6, 0.0));
    for isa in tiers() {
        let run = |threads: usize, image: ImageShape, x: &[f32]| {
            let workers = Workers::new(threads);
            let source = Source::one(Rows::F32(x), c);
            let mut stats = vec![0.0; image.batch * stats_len(groups, c)];
            let mut sums = vec![f64::NAN; sums_len(&image, groups, c)];
            group_stats(&workers, isa, source, image, groups, 1e-6, &mut sums, &mut stats);
            let norm = Norm::Group { stats: &stats, groups, gamma: &gamma, beta: &beta };
            let mut out = vec![f32::NAN; image.operand_rows() * stride];
            operand_pass(
                &workers,
                isa,
                source,
                image,
                Recipe::new(norm, Activation::Silu),
                OperandMut::F32(&mut out),
                stride,
            );
            out
        };
        let all = run(1, image, &x);
        assert_eq!(all, run(3, image, &x), "{isa:?}");
        let split: Vec<f32> = x.chunks(one.pixels() * c).flat_map(|x| run(2, one, x)).collect();
        assert_eq!(all, split, "{isa:?}");
    }
}

#[test]
fn rows_of_zeros_and_of_tiny_numbers_have_no_scale() {
    for isa in tiers() {
        let x = [vec![0.0; 20], vec![1e-38; 20], vec![1e-20; 20]].concat();
        let (mut codes, mut scale) = (vec![0u8; 3 * 64], vec![f32::NAN; 3]);
        let out = OperandMut::U8 { codes: &mut codes, scale: &mut scale };
        let source = Source::one(Rows::F32(&x), 20);
        operand_pass(
            &Workers::new(1),
            isa,
            source,
            ImageShape::rows(3),
            Recipe::new(Norm::None, Activation::None),
            out,
            64,
        );
        assert_eq!(scale, [0.0, 0.0, 1e-20 / 127.0], "{isa:?}");
        assert!(
            codes[..128].iter().all(|&c| c == 128) && codes[128..148].iter().all(|&c| c == 255),
            "{isa:?}"
        );
    }
}

/// Sums of bands, made one after the other, are those of the whole image.
#[test]
fn group_sums_of_bands_are_those_of_the_whole() {
    for (h, w) in [(1, 1), (7, 5), (40, 24), (128, 64), (33, 130)] {
        let image = ImageShape { batch: 1, h, w, border: Border::default() };
        let data: Vec<f32> = (0..h * w * 12).map(|i| (i as f32 * 0.37).sin() + 2.0).collect();
        let workers = Workers::new(2);
        let len = sums_len(&image, 4, 12);
        let (mut whole, mut banded) = (vec![f64::NAN; len], vec![f64::NAN; len]);
        let part = |rows: std::ops::Range<usize>| {
            Source::one(Rows::F32(&data[rows.start * w * 12..rows.end * w * 12]), 12)
        };
        group_sums(&workers, Isa::Scalar, part(0..h), image, 4, 0..h, &mut whole);
        let step = sums_rows(&image);
        for y in (0..h).step_by(step) {
            let rows = y..(y + step).min(h);
            group_sums(&workers, Isa::Scalar, part(rows.clone()), image, 4, rows, &mut banded);
        }
        assert_eq!(whole, banded, "{h}x{w}");
    }
}
