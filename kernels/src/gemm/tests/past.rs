//! Outputs that go past the caches.

use super::*;

/// `rows` of a call whose operand has as many.
fn part<'a>(left: &'a Left, stride: usize, rows: std::ops::Range<usize>) -> Operand<'a> {
    let elements = rows.start * stride..rows.end * stride;
    match left.rank {
        Rank::U8 => Operand::U8 { codes: &left.codes[elements], scale: &left.scale[rows] },
        _ => Operand::Bf16(&left.bf16[elements]),
    }
}

/// A large output, wherever it begins, is what small ones of some of its rows are. Values and gates of two pairs of panels make a
/// line, of inputs in one chunk and in two.
#[test]
fn large_outputs_are_what_small_ones_are() {
    const M: usize = 1100;
    const N: usize = 2112;
    let cases = [
        (Rank::U8, Activation::None, 70),
        (Rank::U8, Activation::Geglu, 70),
        (Rank::U8, Activation::Geglu, 1400),
        (Rank::Bf16, Activation::None, 70),
        (Rank::Bf16, Activation::Geglu, 300),
    ];
    for (rank, activation, k) in cases {
        let mut random = Random::new(5);
        let shape = WeightShape::linear(N, k);
        let left = Left::new(&mut random, rank, &ImageShape::rows(M), k, shape.k_padded());
        let bytes = weight_bytes(&mut random, Encoding::Q8, shape);
        let columns = activation.columns(N);
        for kernel in kernels_here().filter(|kernel| kernel.suits(&left.view(), Encoding::Q8)) {
            if kernel.isa == Isa::Scalar && k > 100 {
                continue;
            }
            let run = |rows: std::ops::Range<usize>, out: &mut [bf16]| {
                let call = Gemm {
                    operand: part(&left, shape.k_padded(), rows.clone()),
                    input: ImageShape::rows(rows.len()),
                    filter: Filter::POINT,
                    weight: Weight::new(Encoding::Q8, shape, &bytes),
                    epilogue: Epilogue { activation, ..Epilogue::default() },
                    out: RowsMut::Bf16(out),
                };
                gemm_with(&Workers::new(3), kernel, call);
            };
            let mut whole = vec![bf16::NAN; M * columns + 64];
            let line = whole.as_ptr().align_offset(64);
            for first in [line, line + 1] {
                let whole = &mut whole[first..][..M * columns];
                whole.fill(bf16::NAN);
                run(0..M, whole);
                for rows in [0..40, 500..533, M - 7..M] {
                    let mut out = vec![bf16::NAN; rows.len() * columns];
                    run(rows.clone(), &mut out);
                    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    let same = bits(&whole[rows.start * columns..rows.end * columns]) == bits(&out);
                    assert!(same, "{} {activation:?} {rows:?} of {k}", kernel.name);
                }
                assert!(whole.iter().all(|x| x.is_finite()), "{}", kernel.name);
            }
        }
    }
}

/// So is a large output of a filter.
#[test]
fn large_images_are_what_their_lines_are() {
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let input = ImageShape { batch: 1, h: 130, w: 130, border };
    let filter = Filter { kh: 3, kw: 3, stride: 1, upsample: false };
    let shape = WeightShape { n: 64, taps: 9, k: 40 };
    let mut random = Random::new(5);
    let bytes = weight_bytes(&mut random, Encoding::Q8, shape);
    for rank in [Rank::U8Uniform, Rank::Bf16] {
        let left = Left::new(&mut random, rank, &input, shape.k, shape.k_padded());
        let vector = |kernel: &&GemmKernel| kernel.isa != Isa::Scalar;
        for kernel in kernels_here().filter(vector).filter(|kernel| kernel.suits(&left.view(), Encoding::Q8))
        {
            let run = |rows: std::ops::Range<usize>, out: &mut [bf16]| {
                let call = Gemm {
                    operand: left.view(),
                    input,
                    filter,
                    weight: Weight::new(Encoding::Q8, shape, &bytes),
                    epilogue: Epilogue::default(),
                    out: RowsMut::Bf16(out),
                };
                let line = rows.start;
                super::super::driver::run(&Workers::new(2), kernel, call, Some(rows), line);
            };
            let columns = input.w * shape.n;
            let mut whole = vec![bf16::NAN; input.h * columns + 64];
            let line = whole.as_ptr().align_offset(64);
            let whole = &mut whole[line..][..input.h * columns];
            run(0..input.h, whole);
            assert!(whole.iter().all(|x| x.is_finite()), "{}", kernel.name);
            for rows in [0..9, 63..65, 129..130] {
                let mut out = vec![bf16::NAN; rows.len() * columns];
                run(rows.clone(), &mut out);
                let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let same = bits(&whole[rows.start * columns..rows.end * columns]) == bits(&out);
                assert!(same, "{} {rank:?} {rows:?}", kernel.name);
            }
        }
    }
}
