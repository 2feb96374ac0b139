//! Statistics of groups of channels.

use std::ops::Range;

use bytemuck::cast_slice_mut;

use crate::Isa;
use crate::par::{Shared, Workers};
use crate::simd::{Element, Simd, SimdOp, dispatch};
use crate::view::{ImageShape, Rows};

use super::Source;
use super::rows::AHEAD;

/// Tasks that share one image.
const TASKS: usize = 64;

/// Pixels whose sums are kept in f32 before they are added up in f64.
const PIXELS: usize = 64;

/// Pixels that are added at a time.
const STEP: usize = 4;

/// Mean and reciprocal standard deviation of each group of channels over each image: `stats` is `[batch, groups, 2]`.
/// The biased variance, as PyTorch's `group_norm`. `sums` has [`sums_len`] numbers and needs no content.
///
/// # Panics
/// Where shapes don't agree.
#[allow(clippy::too_many_arguments)]
pub fn group_stats(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    groups: usize,
    eps: f32,
    sums: &mut [f64],
    stats: &mut [f32],
) {
    group_sums(workers, isa, source, image, groups, 0..image.h, sums);
    group_finish(image, source.columns(), groups, eps, sums, stats);
}

/// Pixels whose sums are kept together: a whole number of lines where these are long.
fn chunk_pixels(image: &ImageShape) -> usize {
    (image.h * image.w).div_ceil(TASKS).next_multiple_of(PIXELS).max(1)
}

/// How many numbers [`group_sums`] writes: a sum and a sum of squares for each image, chunk of pixels and group.
pub fn sums_len(image: &ImageShape, groups: usize) -> usize {
    image.batch * (image.h * image.w).div_ceil(chunk_pixels(image)) * groups * 2
}

/// Image rows that [`group_sums`] can be called with at a time are multiples of this, but for the last.
pub fn sums_rows(image: &ImageShape) -> usize {
    let chunk = chunk_pixels(image);
    // The least number of rows that is a whole number of chunks.
    (1..image.h).find(|rows| (rows * image.w).is_multiple_of(chunk)).unwrap_or(image.h)
}

/// Adds up rows `rows` of every image; `source` holds just these. `sums` is that of the whole images, so that bands make the
/// same numbers as the whole at once.
///
/// # Panics
/// Where shapes don't agree, or a band begins or ends inside a chunk ([`sums_rows`]).
pub fn group_sums(
    workers: &Workers,
    isa: Isa,
    source: Source<'_>,
    image: ImageShape,
    groups: usize,
    rows: Range<usize>,
    sums: &mut [f64],
) {
    let (columns, pixels) = (source.columns(), image.h * image.w);
    let part = rows.len() * image.w;
    source.check(image.batch * part);
    assert!(groups > 0 && columns.is_multiple_of(groups), "{columns} channels in {groups} groups");
    assert_eq!(sums.len(), sums_len(&image, groups), "sums of {image:?} in {groups} groups");
    let chunk = chunk_pixels(&image);
    let chunks = pixels.div_ceil(chunk);
    let (first, end) = (rows.start * image.w, rows.end * image.w);
    assert!(
        first.is_multiple_of(chunk) && (end == pixels || end.is_multiple_of(chunk)) && end <= pixels,
        "rows {rows:?} of {image:?}"
    );
    let here = first / chunk..end.div_ceil(chunk);
    let parts = Shared::new(sums);
    workers.for_each(image.batch * here.len(), |task, scratch| {
        let (at, c) = (task / here.len(), here.start + task % here.len());
        // SAFETY: each task has its own part.
        let sums = unsafe { parts.slice((at * chunks + c) * groups * 2, groups * 2) };
        sums.fill(0.0);
        let base = at * part;
        let rows = base + c * chunk - first..base + ((c + 1) * chunk).min(end) - first;
        dispatch(isa, Moments { source, rows, sums, scratch: cast_slice_mut(scratch) });
    });
}

/// Statistics from the sums of whole images of `channels` channels.
///
/// # Panics
/// Where shapes don't agree.
pub fn group_finish(
    image: ImageShape,
    channels: usize,
    groups: usize,
    eps: f32,
    sums: &[f64],
    stats: &mut [f32],
) {
    assert_eq!(sums.len(), sums_len(&image, groups), "sums of {image:?} in {groups} groups");
    assert_eq!(stats.len(), image.batch * groups * 2, "statistics of {} x {groups} groups", image.batch);
    let chunks = sums.len() / (image.batch * groups * 2).max(1);
    let count = (image.h * image.w * (channels / groups)) as f64;
    for (image, stats) in stats.chunks_exact_mut(groups * 2).enumerate() {
        for (g, stats) in stats.chunks_exact_mut(2).enumerate() {
            let parts = (0..chunks).map(|c| ((image * chunks + c) * groups + g) * 2);
            let (sum, squares) = parts.fold((0.0, 0.0), |(s, q), at| (s + sums[at], q + sums[at + 1]));
            let mean = sum / count;
            let variance = (squares / count - mean * mean).max(0.0);
            stats[0] = mean as f32;
            stats[1] = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
        }
    }
}

/// Adds the sums and the sums of squares of `rows` to `sums`, `[groups, 2]`.
struct Moments<'a> {
    source: Source<'a>,
    rows: std::ops::Range<usize>,
    sums: &'a mut [f64],
    scratch: &'a mut [f32],
}

impl SimdOp for Moments<'_> {
    type Output = ();

    /// Sums over [`PIXELS`] pixels at a time, per channel, of the differences to the first of them: these are small where
    /// the mean is far from zero.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.source.columns();
        let size = columns / (self.sums.len() / 2);
        let (shift, rest) = self.scratch.split_at_mut(columns);
        let (sum, rest) = rest.split_at_mut(columns);
        let squares = &mut rest[..columns];
        let last = self.rows.end;
        for first in self.rows.step_by(PIXELS) {
            let n = PIXELS.min(last - first);
            sum.fill(0.0);
            squares.fill(0.0);
            let mut start = 0;
            for (part, c) in self.source.parts.into_iter().flatten() {
                let range = start..start + c;
                start += c;
                let channels = Channels {
                    shift: &mut shift[range.clone()],
                    sum: &mut sum[range.clone()],
                    squares: &mut squares[range],
                };
                match part.slice(first * c..(first + n) * c) {
                    Rows::F32(pixels) => channels.add_all(s, pixels),
                    Rows::Bf16(pixels) => channels.add_all(s, pixels),
                }
            }
            for (g, out) in self.sums.chunks_exact_mut(2).enumerate() {
                let (mut total, mut total_squares) = (0.0, 0.0);
                for c in g * size..(g + 1) * size {
                    let (k, sum, squares) = (f64::from(shift[c]), f64::from(sum[c]), f64::from(squares[c]));
                    total += n as f64 * k + sum;
                    total_squares += (n as f64 * k + 2.0 * sum) * k + squares;
                }
                out[0] += total;
                out[1] += total_squares;
            }
        }
    }
}

/// Running sums of some channels.
struct Channels<'a> {
    /// What is subtracted first.
    shift: &'a mut [f32],
    sum: &'a mut [f32],
    squares: &'a mut [f32],
}

impl Channels<'_> {
    /// Adds `[pixels, channels]`.
    #[inline(always)]
    fn add_all<S: Simd, T: Element>(mut self, s: S, pixels: &[T]) {
        let c = self.shift.len();
        if c == 0 {
            return;
        }
        let mut i = 0;
        while i < c {
            let end = c.min(i + S::LANES);
            if end == i + S::LANES {
                s.store(T::load(s, &pixels[i..end]), &mut self.shift[i..end]);
            } else {
                s.store_partial(T::load_partial(s, &pixels[i..end]), &mut self.shift[i..end]);
            }
            i = end;
        }
        let mut steps = pixels.chunks_exact(STEP * c);
        for step in &mut steps {
            self.add::<S, T, STEP>(s, step);
        }
        for pixel in steps.remainder().chunks_exact(c) {
            self.add::<S, T, 1>(s, pixel);
        }
    }

    /// Adds `[N, channels]`.
    #[inline(always)]
    fn add<S: Simd, T: Element, const N: usize>(&mut self, s: S, pixels: &[T]) {
        let c = self.shift.len();
        let pixels: [&[T]; N] = std::array::from_fn(|p| &pixels[p * c..(p + 1) * c]);
        let (shift, sum, squares) = (&self.shift[..c], &mut self.sum[..c], &mut self.squares[..c]);
        let mut i = 0;
        while i + S::LANES <= c {
            let end = i + S::LANES;
            let k = s.load(&shift[i..end]);
            let (mut a, mut b) = (s.load(&sum[i..end]), s.load(&squares[i..end]));
            for pixel in pixels {
                s.prefetch(&pixel[i..end], AHEAD);
                let d = s.sub(T::load(s, &pixel[i..end]), k);
                a = s.add(a, d);
                b = s.fma(d, d, b);
            }
            s.store(a, &mut sum[i..end]);
            s.store(b, &mut squares[i..end]);
            i = end;
        }
        if i < c {
            let k = s.load_partial(&shift[i..]);
            let (mut a, mut b) = (s.load_partial(&sum[i..]), s.load_partial(&squares[i..]));
            for pixel in pixels {
                let d = s.sub(T::load_partial(s, &pixel[i..]), k);
                a = s.add(a, d);
                b = s.fma(d, d, b);
            }
            s.store_partial(a, &mut sum[i..]);
            s.store_partial(b, &mut squares[i..]);
        }
    }
}
