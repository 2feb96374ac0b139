//! Buffers that end where memory ends, scratch memory full of NaN, and shapes that nobody chose.

use proptest::prelude::*;

use super::*;

/// A copy of a slice whose last element is the last before a page that may not be touched.
struct Guarded<T: Copy> {
    map: *mut u8,
    pages: usize,
    data: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    const PAGE: usize = 4096;

    fn new(src: &[T]) -> Self {
        let bytes = size_of_val(src);
        let pages = bytes.div_ceil(Self::PAGE) + 1;
        let (read_write, private) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping; its last page is taken away, and the copy ends before that.
        unsafe {
            let map =
                libc::mmap(std::ptr::null_mut(), pages * Self::PAGE, read_write, private, -1, 0).cast::<u8>();
            assert!(map.cast() != libc::MAP_FAILED);
            let guard = map.add((pages - 1) * Self::PAGE);
            assert_eq!(libc::mprotect(guard.cast(), Self::PAGE, libc::PROT_NONE), 0);
            let data = guard.sub(bytes).cast::<T>();
            std::ptr::copy_nonoverlapping(src.as_ptr(), data, src.len());
            Guarded { map, pages, data, len: src.len() }
        }
    }

    fn get(&self) -> &[T] {
        // SAFETY: `new` wrote these elements.
        unsafe { std::slice::from_raw_parts(self.data, self.len) }
    }

    fn get_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.data, self.len) }
    }
}

impl<T: Copy> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.map.cast(), self.pages * Self::PAGE) };
    }
}

/// Nothing beyond a buffer's end is read or written, and what scratch memory holds doesn't matter.
#[test]
fn buffers_end_where_memory_ends() {
    let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
    let filter = |kh, upsample| Filter { kh, kw: kh, stride: 1, upsample };
    let image = |h, w| ImageShape { batch: 1, h, w, border };
    let shapes = [
        (ImageShape::rows(37), Filter::POINT, 20, 70),
        (ImageShape::rows(1), Filter::POINT, 35, 4),
        (image(5, 7), filter(3, false), 36, 65),
        (image(3, 9), filter(3, true), 4, 3),
    ];
    for (encoding, rank) in kinds() {
        for (input, filter, n, k) in shapes {
            let mut random = Random::new(5);
            let shape = WeightShape { n, taps: filter.kh * filter.kw, k };
            let left = Left::new(&mut random, rank, &input, k, shape.k_padded());
            let bytes = Guarded::new(&weight_bytes(&mut random, encoding, shape));
            let weight = Weight::new(encoding, shape, bytes.get());
            let (h, w) = filter.output(&input);
            let (codes, scale) = (Guarded::new(&left.codes), Guarded::new(&left.scale));
            let images = Guarded::new(&left.images);
            let (rows_bf16, rows_f32) = (Guarded::new(&left.bf16), Guarded::new(&left.f32));
            let operand = match rank {
                Rank::U8 => Operand::U8 { codes: codes.get(), scale: scale.get() },
                Rank::U8Uniform => Operand::U8Uniform { codes: codes.get(), images: images.get() },
                Rank::Bf16 => Operand::Bf16(rows_bf16.get()),
                Rank::F32 => Operand::F32(rows_f32.get()),
            };
            let bias = Guarded::new(&random.floats(n));
            let residual = Guarded::new(&random.floats(h * w * n));
            let epilogue = Epilogue {
                bias: Some(bias.get()),
                image_bias: Some(bias.get()),
                residual: Some(Rows::F32(residual.get())),
                ..Epilogue::default()
            };
            for kernel in kernels_here().filter(|kernel| kernel.suits(&operand, encoding)) {
                let run = |scratch_byte: u8, out: RowsMut<'_>| {
                    let workers = Workers::new(1);
                    workers.for_each(1, |_, scratch| scratch.fill(scratch_byte));
                    gemm_with(&workers, kernel, Gemm { operand, input, filter, weight, epilogue, out });
                };
                let mut plain = vec![0.0; h * w * n];
                run(0, RowsMut::F32(&mut plain));
                let mut guarded = Guarded::new(&vec![f32::NAN; h * w * n]);
                run(0xFF, RowsMut::F32(guarded.get_mut()));
                assert!(plain == guarded.get(), "{} {encoding:?} {input:?} {filter:?}", kernel.name);
                let mut guarded = Guarded::new(&vec![bf16::NAN; h * w * n]);
                run(0xFF, RowsMut::Bf16(guarded.get_mut()));
                assert!(guarded.get().iter().all(|x| x.is_finite()), "{} to bf16", kernel.name);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_linear_layer(m in 1usize..70, n in 1usize..100, k in 0usize..300, kind in 0usize..64, extras: bool, bf16_out: bool) {
        let kinds = kinds();
        let (encoding, rank) = kinds[kind % kinds.len()];
        Case { extras, bf16_out, ..Case::linear(m, n, k, encoding, rank) }.check();
    }

    #[test]
    fn any_convolution(
        batch in 1usize..3, h in 1usize..8, w in 1usize..40, n in 1usize..40, k in 1usize..80, kind in 0usize..64,
        geometry in 0usize..3, extras: bool,
    ) {
        let kinds = kinds();
        let (encoding, rank) = kinds[kind % kinds.len()];
        let border = Border { top: 1, left: 1, bottom: 1, right: 1 };
        let filter = Filter { kh: 3, kw: 3, stride: 1 + geometry % 2, upsample: geometry == 2 };
        let input = ImageShape { batch, h, w, border };
        Case { input, filter, extras, ..Case::linear(1, n, k, encoding, rank) }.check();
    }
}
