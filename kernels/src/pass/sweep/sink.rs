//! Where the blocks of a sweep go.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::arch::claim;
use crate::simd::shorts::{Pair, Shorts};
use crate::simd::{BLOCK_VECTORS, Block, Element, MAX_BLOCK, Simd};

use super::{AHEAD, Floats, Kind, Pairs, Row, shorts};

/// What takes the blocks of some rows.
pub(in crate::pass) trait Sink {
    /// Of its blocks.
    type Kind: Kind;
    /// What is known of a part of a row, and needed for it.
    type State<S: Simd>: Copy;
    /// What a number becomes.
    type Item;
    /// Before the first block of a part of a row.
    fn begin<S: Simd>(&self, s: S, row: &Row) -> Self::State<S>;
    /// Where a part of `N` rows, each with its number in the sweep, goes.
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [Self::Item]; N];
    /// Puts a block, in split order if `split`, into a slot of as many numbers or fewer.
    fn put<S: Simd>(
        s: S,
        state: &mut Self::State<S>,
        y: <Self::Kind as Kind>::Block<S>,
        split: bool,
        slot: &mut [Self::Item],
    );
    /// After the last block of a part of some rows, each with its number in the sweep: one row or two.
    fn end<S: Simd, const N: usize>(&mut self, s: S, states: [Self::State<S>; N], rows: [usize; N]);
}

/// Some columns.
#[derive(Clone, Copy, Debug)]
pub(in crate::pass) struct Part {
    /// Where they begin in a row of the output.
    pub(super) column: usize,
    /// How many there are.
    pub(super) columns: usize,
    /// Where they begin in a row that is filled up to whole blocks.
    pub(super) at: usize,
    /// How many there are, filled up.
    pub(super) filled: usize,
}

/// Parts of rows that lie apart from each other.
#[inline(always)]
fn disjoint<T, const N: usize>(all: &mut [T], parts: [Range<usize>; N]) -> [&mut [T]; N] {
    all.get_disjoint_mut(parts).expect("each row has its own place")
}

/// `round(y * inverse + shift) + 128` in rows of `stride`.
pub(in crate::pass) struct Codes<'a> {
    pub(in crate::pass) codes: &'a mut [u8],
    pub(in crate::pass) stride: usize,
    pub(in crate::pass) shift: f32,
}

impl Sink for Codes<'_> {
    type Kind = Floats;
    type State<S: Simd> = [S::F; 2];
    type Item = u8;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, row: &Row) -> Self::State<S> {
        [s.splat(row.inverse), s.splat(self.shift)]
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [u8]; N] {
        disjoint(self.codes, rows.map(|(_, row)| row.columns(self.stride, part)))
    }

    #[inline(always)]
    fn put<S: Simd>(
        s: S,
        [inverse, shift]: &mut Self::State<S>,
        mut y: Block<S::F>,
        split: bool,
        slot: &mut [u8],
    ) {
        for y in &mut y {
            *y = s.fma(*y, *inverse, *shift);
        }
        if slot.len() == S::BLOCK {
            s.store_codes_block(y, split, slot);
        } else {
            let mut all = [0; MAX_BLOCK];
            s.store_codes_block(y, split, &mut all);
            slot.copy_from_slice(&all[..slot.len()]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, _: S, _: [Self::State<S>; N], _: [usize; N]) {}
}

/// `round(y * inverse) + 128` in rows of `stride`, of magnitudes up to `127 / inverse`. The product is not rounded first where the
/// tier fuses.
pub(in crate::pass) struct ScaledCodes<'a> {
    pub(in crate::pass) codes: &'a mut [u8],
    pub(in crate::pass) stride: usize,
}

impl Sink for ScaledCodes<'_> {
    type Kind = Floats;
    type State<S: Simd> = S::F;
    type Item = u8;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, row: &Row) -> S::F {
        s.splat(row.inverse)
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [u8]; N] {
        disjoint(self.codes, rows.map(|(_, row)| row.columns(self.stride, part)))
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, inverse: &mut S::F, y: Block<S::F>, split: bool, slot: &mut [u8]) {
        if slot.len() == S::BLOCK {
            s.store_scaled_codes(y, *inverse, split, slot);
        } else {
            let mut all = [0; MAX_BLOCK];
            s.store_scaled_codes(y, *inverse, split, &mut all);
            slot.copy_from_slice(&all[..slot.len()]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, _: S, _: [S::F; N], _: [usize; N]) {}
}

/// `y` as elements of a tensor in rows of `stride`.
pub(in crate::pass) struct Elements<'a, T> {
    pub(in crate::pass) out: &'a mut [T],
    pub(in crate::pass) stride: usize,
}

impl<T: Element> Sink for Elements<'_, T> {
    type Kind = Floats;
    type State<S: Simd> = ();
    type Item = T;

    #[inline(always)]
    fn begin<S: Simd>(&self, _: S, _: &Row) {}

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [T]; N] {
        disjoint(self.out, rows.map(|(_, row)| row.columns(self.stride, part)))
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, (): &mut (), y: Block<S::F>, split: bool, slot: &mut [T]) {
        let y = if split { s.join(y) } else { y };
        if slot.len() == S::BLOCK {
            for (y, slot) in y.into_iter().zip(slot.chunks_exact_mut(S::LANES)) {
                T::store(s, y, slot);
            }
        } else {
            let mut all = [T::ZERO; MAX_BLOCK];
            for (y, all) in y.into_iter().zip(all.chunks_exact_mut(S::LANES)) {
                T::store(s, y, all);
            }
            slot.copy_from_slice(&all[..slot.len()]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, _: S, _: [(); N], _: [usize; N]) {}
}

/// Keeps the rows, `width` each, in the order of blocks, and their greatest magnitudes.
pub(in crate::pass) struct Keep<'a> {
    pub(in crate::pass) kept: &'a mut [f32],
    pub(in crate::pass) width: usize,
    pub(in crate::pass) most: &'a mut [f32],
}

impl Sink for Keep<'_> {
    type Kind = Floats;
    type State<S: Simd> = Block<S::F>;
    type Item = f32;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, _: &Row) -> Block<S::F> {
        [s.splat(0.0); BLOCK_VECTORS]
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [f32]; N] {
        disjoint(self.kept, rows.map(|(i, _)| part.of_kept(i, self.width)))
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, most: &mut Block<S::F>, y: Block<S::F>, _: bool, slot: &mut [f32]) {
        for ((y, most), slot) in y.into_iter().zip(most).zip(slot.chunks_exact_mut(S::LANES)) {
            s.store(y, slot);
            *most = s.max_abs(y, *most);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, s: S, most: [Block<S::F>; N], rows: [usize; N]) {
        note_greatest(s, most, rows, self.most);
    }
}

/// Raises what `all` says of one or two rows to the greatest lanes of their blocks.
#[inline(always)]
fn note_greatest<S: Simd, const N: usize>(s: S, most: [Block<S::F>; N], rows: [usize; N], all: &mut [f32]) {
    let mut lanes = [s.splat(0.0); 2];
    for (lanes, [a, b, c, d]) in lanes.iter_mut().zip(most) {
        *lanes = s.max(s.max(a, b), s.max(c, d));
    }
    for (most, row) in s.max_lanes(lanes).into_iter().zip(rows) {
        all[row] = most.max(all[row]);
    }
}

/// Slots of what is not written, which take no memory.
fn nowhere<const N: usize>(columns: usize) -> [&'static mut [()]; N] {
    std::array::from_fn(|_| Vec::leak(vec![(); columns]))
}

/// The greatest magnitudes of rows.
pub(in crate::pass) struct Most<'a>(pub(in crate::pass) &'a mut [f32]);

impl Sink for Most<'_> {
    type Kind = Floats;
    type State<S: Simd> = Block<S::F>;
    type Item = ();

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, _: &Row) -> Block<S::F> {
        [s.splat(0.0); BLOCK_VECTORS]
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, _: [(usize, &Row); N], part: Part) -> [&mut [()]; N] {
        nowhere(part.columns)
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, most: &mut Block<S::F>, y: Block<S::F>, _: bool, _: &mut [()]) {
        for (y, most) in y.into_iter().zip(most) {
            *most = s.max_abs(y, *most);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, s: S, most: [Block<S::F>; N], rows: [usize; N]) {
        note_greatest(s, most, rows, self.0);
    }
}

/// Sums of rows, and sums of squares.
pub(in crate::pass) struct Sums<'a>(pub(in crate::pass) &'a mut [[f32; 2]]);

impl Sink for Sums<'_> {
    type Kind = Floats;
    type State<S: Simd> = [Block<S::F>; 2];
    type Item = ();

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, _: &Row) -> Self::State<S> {
        [[s.splat(0.0); BLOCK_VECTORS]; 2]
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, _: [(usize, &Row); N], part: Part) -> [&mut [()]; N] {
        nowhere(part.columns)
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, sums: &mut Self::State<S>, y: Block<S::F>, _: bool, _: &mut [()]) {
        for i in 0..BLOCK_VECTORS {
            sums[0][i] = s.add(y[i], sums[0][i]);
            sums[1][i] = s.fma(y[i], y[i], sums[1][i]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, s: S, states: [Self::State<S>; N], rows: [usize; N]) {
        let mut lanes = [s.splat(0.0); 4];
        for (lanes, state) in lanes.as_chunks_mut::<2>().0.iter_mut().zip(states) {
            for (lanes, [a, b, c, d]) in lanes.iter_mut().zip(state) {
                *lanes = s.add(s.add(a, b), s.add(c, d));
            }
        }
        for (&[sum, squares], row) in s.sums(lanes).as_chunks().0.iter().zip(rows) {
            let [to_sum, to_squares] = &mut self.0[row];
            *to_sum += sum;
            *to_squares += squares;
        }
    }
}

/// The codes that 16-bit numbers hold in their high bytes, in rows of `stride`.
pub(in crate::pass) struct HighCodes<'a> {
    pub(in crate::pass) codes: &'a mut [u8],
    pub(in crate::pass) stride: usize,
}

impl Sink for HighCodes<'_> {
    type Kind = Pairs;
    type State<S: Simd> = ();
    type Item = u8;

    #[inline(always)]
    fn begin<S: Simd>(&self, _: S, _: &Row) {}

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [u8]; N] {
        disjoint(self.codes, rows.map(|(_, row)| row.columns(self.stride, part)))
    }

    #[inline(always)]
    fn put<S: Simd>(s: S, (): &mut (), y: <Pairs as Kind>::Block<S>, split: bool, slot: &mut [u8]) {
        if slot.len() == S::BLOCK {
            claim(slot.as_ptr().wrapping_add(AHEAD / 2));
            shorts(s).store_codes_high(y, split, slot);
        } else {
            let mut all = [0; MAX_BLOCK];
            shorts(s).store_codes_high(y, split, &mut all);
            slot.copy_from_slice(&all[..slot.len()]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, _: S, _: [(); N], _: [usize; N]) {}
}

/// Multiples `times / 2^15` of 16-bit numbers, as codes in rows of `stride`.
pub(in crate::pass) struct LowCodes<'a> {
    pub(in crate::pass) codes: &'a mut [u8],
    pub(in crate::pass) stride: usize,
}

impl Sink for LowCodes<'_> {
    type Kind = Pairs;
    type State<S: Simd> = <S::Shorts as Shorts>::V;
    type Item = u8;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, row: &Row) -> Self::State<S> {
        shorts(s).splat(row.times)
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [u8]; N] {
        disjoint(self.codes, rows.map(|(_, row)| row.columns(self.stride, part)))
    }

    #[inline(always)]
    fn put<S: Simd>(
        s: S,
        times: &mut Self::State<S>,
        [a, b]: Pair<<S::Shorts as Shorts>::V>,
        split: bool,
        slot: &mut [u8],
    ) {
        let y = [shorts(s).mul(a, *times), shorts(s).mul(b, *times)];
        if slot.len() == S::BLOCK {
            shorts(s).store_codes_low(y, split, slot);
        } else {
            let mut all = [0; MAX_BLOCK];
            shorts(s).store_codes_low(y, split, &mut all);
            slot.copy_from_slice(&all[..slot.len()]);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, _: S, _: [Self::State<S>; N], _: [usize; N]) {}
}

/// As [`Keep`] of 16-bit numbers, but the greatest of these and 0.
pub(in crate::pass) struct KeepPairs<'a> {
    pub(in crate::pass) kept: &'a mut [i16],
    pub(in crate::pass) width: usize,
    pub(in crate::pass) most: &'a mut [u16],
}

impl Sink for KeepPairs<'_> {
    type Kind = Pairs;
    type State<S: Simd> = <Pairs as Kind>::Block<S>;
    type Item = i16;

    #[inline(always)]
    fn begin<S: Simd>(&self, s: S, _: &Row) -> Self::State<S> {
        [shorts(s).splat(0); 2]
    }

    #[inline(always)]
    fn slots<const N: usize>(&mut self, rows: [(usize, &Row); N], part: Part) -> [&mut [i16]; N] {
        disjoint(self.kept, rows.map(|(i, _)| part.of_kept(i, self.width)))
    }

    #[inline(always)]
    fn put<S: Simd>(
        s: S,
        most: &mut Self::State<S>,
        y: <Pairs as Kind>::Block<S>,
        _: bool,
        slot: &mut [i16],
    ) {
        for ((y, most), slot) in y.into_iter().zip(most).zip(slot.chunks_exact_mut(2 * S::LANES)) {
            shorts(s).store(y, slot);
            *most = shorts(s).max(y, *most);
        }
    }

    #[inline(always)]
    fn end<S: Simd, const N: usize>(&mut self, s: S, most: [Self::State<S>; N], rows: [usize; N]) {
        for ([a, b], row) in most.into_iter().zip(rows) {
            self.most[row] = shorts(s).max_lane(shorts(s).max(a, b)).max(self.most[row]);
        }
    }
}
