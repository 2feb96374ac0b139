//! Statistics of groups of channels.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};

use crate::Isa;
use crate::par::{Shared, Workers};
use crate::simd::{Element, MAX_BLOCK, Simd, SimdOp, dispatch};
use crate::view::{Coding, ImageShape, Rows};

use super::silu::DIP;
use super::sweep::{AHEAD, arrange, filled, restore, width};
use super::{Norm, Recipe, Source};
use crate::gemm::Activation;

/// Tasks that share one image.
const TASKS: usize = 32;

/// Pixels whose sums are kept in f32 before they are added up in f64.
const PIXELS: usize = 64;

/// Pixels that are added at a time.
const STEP: usize = 4;

/// How many numbers [`group_stats`] finds out about an image: mean and reciprocal standard deviation of each group, then least
/// and greatest element of each channel.
pub const fn stats_len(groups: usize, channels: usize) -> usize {
    2 * (groups + channels)
}

/// Statistics of each image: `stats` is `[batch, stats_len]`. The biased variance, as PyTorch's `group_norm`. `sums` has [`sums_len`] numbers and needs no content.
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

/// How many numbers [`group_sums`] writes: for each image and chunk of pixels the sum and the sum of squares of each group, then
/// least and greatest element of each channel, a pair of f32 in the place of a number.
pub fn sums_len(image: &ImageShape, groups: usize, channels: usize) -> usize {
    image.batch * (image.h * image.w).div_ceil(chunk_pixels(image)) * chunk_len(groups, channels)
}

/// The numbers that [`group_sums`] writes of a chunk.
const fn chunk_len(groups: usize, channels: usize) -> usize {
    2 * groups + channels
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
    assert_eq!(sums.len(), sums_len(&image, groups, columns), "sums of {image:?} in {groups} groups");
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
        let each = chunk_len(groups, columns);
        // SAFETY: each task has its own part.
        let sums = unsafe { parts.slice((at * chunks + c) * each, each) };
        let (moments, ranges) = sums.split_at_mut(2 * groups);
        moments.fill(0.0);
        let ranges = cast_slice_mut(ranges);
        let base = at * part;
        let rows = base + c * chunk - first..base + ((c + 1) * chunk).min(end) - first;
        dispatch(isa, Moments { source, rows, moments, ranges, scratch: cast_slice_mut(scratch) });
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
    let (each, chunk) = (stats_len(groups, channels), chunk_len(groups, channels));
    assert_eq!(sums.len(), sums_len(&image, groups, channels), "sums of {image:?} in {groups} groups");
    assert_eq!(stats.len(), image.batch * each, "statistics of {} x {groups} groups", image.batch);
    let count = (image.h * image.w * (channels / groups)) as f64;
    let chunks = sums.len() / (image.batch * chunk).max(1);
    for (stats, chunks) in stats.chunks_exact_mut(each).zip(sums.chunks_exact(chunks.max(1) * chunk)) {
        let (moments, ranges) = stats.split_at_mut(2 * groups);
        for (g, stats) in moments.as_chunks_mut().0.iter_mut().enumerate() {
            let parts = chunks.chunks_exact(chunk).map(|c| (c[2 * g], c[2 * g + 1]));
            let (sum, squares) = parts.fold((0.0, 0.0), |(s, q), (sum, squares)| (s + sum, q + squares));
            let mean = sum / count;
            let variance = (squares / count - mean * mean).max(0.0);
            *stats = [mean as f32, (1.0 / (variance + f64::from(eps)).sqrt()) as f32];
        }
        let ranges = ranges.as_chunks_mut().0;
        ranges.fill([f32::INFINITY, f32::NEG_INFINITY]);
        for chunk in chunks.chunks_exact(chunk) {
            let parts: &[[f32; 2]] = cast_slice(&chunk[2 * groups..]);
            for ([least, most], &[low, high]) in ranges.iter_mut().zip(parts) {
                *least = if low < *least { low } else { *least };
                *most = if high > *most { high } else { *most };
            }
        }
    }
}

/// Codings of an operand with one for each image, whose codes span what `recipe` makes of that image, and zero, by what
/// [`group_stats`] knows.
///
/// # Panics
/// Where shapes don't agree, or for a norm that isn't [`Norm::Group`].
pub fn group_codings(recipe: Recipe<'_>, images: &mut [Coding]) {
    let Recipe { norm, activation, factors } = recipe;
    let Norm::Group { stats, groups, gamma, beta } = norm else { panic!("group statistics for {norm:?}") };
    let each = stats_len(groups, gamma.len());
    assert_eq!(stats.len(), images.len() * each, "statistics of {} x {groups} groups", images.len());
    let size = gamma.len() / groups.max(1);
    for (image, stats) in images.iter_mut().zip(stats.chunks_exact(each)) {
        let (moments, ranges) = stats.split_at(2 * groups);
        *image = coding(ranges.as_chunks().0, factors, |c, x| {
            let (mean, rstd) = (moments[2 * (c / size)], moments[2 * (c / size) + 1]);
            bound(activation, (x - mean) * (rstd * gamma[c]) + beta[c])
        });
    }
}

/// The coding whose codes 1 to 255 span zero and what `bound` makes of the least and the greatest element of each channel,
/// times its factor.
fn coding(ranges: &[[f32; 2]], factors: Option<&[f32]>, bound: impl Fn(usize, f32) -> f32) -> Coding {
    let (mut low, mut high) = (0f32, 0f32);
    for (c, range) in ranges.iter().enumerate() {
        let factor = factors.map_or(1.0, |factors| factors[c]);
        for y in range.map(|x| bound(c, x) * factor) {
            (low, high) = (low.min(y), high.max(y));
        }
    }
    let scale = (high - low) / 254.0;
    // A span of next to nothing, or of infinity, is coded as nothing.
    if !(1e-30..1e30).contains(&scale) {
        return Coding { scale: 0.0, zero: 128 };
    }
    Coding { scale, zero: 1 + (-low / scale).round() as i32 }
}

/// As [`group_codings`] for `x * factors`, where the statistics of `x` are those of a single group.
///
/// # Panics
/// Where shapes don't agree.
pub fn range_codings(stats: &[f32], channels: usize, factors: Option<&[f32]>, images: &mut [Coding]) {
    let each = stats_len(1, channels);
    assert_eq!(stats.len(), images.len() * each, "ranges of {} images", images.len());
    for (image, stats) in images.iter_mut().zip(stats.chunks_exact(each)) {
        *image = coding(stats[2..].as_chunks().0, factors, |_, x| x);
    }
}

/// The end farther from 0 of what `activation` makes of all t from 0 to `y`.
fn bound(activation: Activation, y: f32) -> f32 {
    match activation {
        Activation::Relu => y.max(0.0),
        Activation::Silu if y < 0.0 => y.max(-DIP),
        // Within the error of the coarse function.
        Activation::Silu => 1.001 * y / (1.0 + (-y).exp()),
        _ => y,
    }
}

/// Adds `rows` to the sums of groups, and finds the ranges of channels.
struct Moments<'a> {
    source: Source<'a>,
    rows: std::ops::Range<usize>,
    /// `[groups, 2]`: sum, sum of squares.
    moments: &'a mut [f64],
    /// `[channels, 2]`: least, greatest.
    ranges: &'a mut [[f32; 2]],
    scratch: &'a mut [f32],
}

impl Source<'_> {
    /// The mean of up to four of columns `first .. first + n` of a row.
    #[inline(always)]
    fn sample(&self, row: usize, first: usize, n: usize) -> f32 {
        let at = |mut column: usize| {
            for (part, c) in self.parts.iter().flatten() {
                if column < *c {
                    return match part {
                        Rows::F32(part) => part[row * c + column],
                        Rows::Bf16(part) => part[row * c + column].to_f32(),
                    };
                }
                column -= c;
            }
            0.0
        };
        0.25 * ((at(first) + at(first + n / 4)) + (at(first + n / 2) + at(first + n * 3 / 4)))
    }
}

impl SimdOp for Moments<'_> {
    type Output = ();

    /// Sums over [`PIXELS`] pixels at a time, per channel, of the differences to a sample of its group in the first pixel: these
    /// are small where the mean is far from zero.
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.source.columns();
        let size = columns / (self.moments.len() / 2);
        let width = width::<S>(&self.source);
        let (shift, rest) = self.scratch.split_at_mut(width);
        let (sum, rest) = rest.split_at_mut(width);
        let (squares, rest) = rest.split_at_mut(width);
        let (least, rest) = rest.split_at_mut(width);
        let (most, rest) = rest.split_at_mut(width);
        let (natural, ordered) = rest.split_at_mut(columns);
        let ordered = &mut ordered[..columns];
        least.fill(f32::INFINITY);
        most.fill(f32::NEG_INFINITY);
        let last = self.rows.end;
        for (g, group) in natural.chunks_exact_mut(size).enumerate() {
            group.fill(self.source.sample(self.rows.start, g * size, size));
        }
        arrange::<S>(&self.source, natural, shift);
        for first in self.rows.step_by(PIXELS) {
            let n = PIXELS.min(last - first);
            sum.fill(0.0);
            squares.fill(0.0);
            let mut at = 0;
            for (part, c) in self.source.parts.into_iter().flatten() {
                let range = at..at + filled::<S>(c);
                at = range.end;
                let channels = Channels {
                    shift: &shift[range.clone()],
                    sum: &mut sum[range.clone()],
                    squares: &mut squares[range.clone()],
                    least: &mut least[range.clone()],
                    most: &mut most[range],
                };
                match part.slice(first * c..(first + n) * c) {
                    Rows::F32(pixels) => channels.add_all(s, pixels, c),
                    Rows::Bf16(pixels) => channels.add_all(s, pixels, c),
                }
            }
            let moments = self.moments.as_chunks_mut::<2>().0;
            let count = (n * size) as f64;
            restore(s, &self.source, sum, ordered);
            let group_sums = &mut sum[..moments.len()];
            sum_groups(s, ordered, size, group_sums);
            for (g, (&mut sum, moments)) in group_sums.iter_mut().zip(&mut *moments).enumerate() {
                let (k, sum) = (f64::from(natural[g * size]), f64::from(sum));
                moments[0] += count * k + sum;
                moments[1] += (count * k + 2.0 * sum) * k;
            }
            restore(s, &self.source, squares, ordered);
            sum_groups(s, ordered, size, group_sums);
            for (&mut squares, moments) in group_sums.iter_mut().zip(moments) {
                moments[1] += f64::from(squares);
            }
        }
        restore(s, &self.source, least, sum);
        restore(s, &self.source, most, squares);
        for (range, (&least, &most)) in self.ranges.iter_mut().zip(sum.iter().zip(&*squares)) {
            *range = [least, most];
        }
    }
}

/// Sums of groups of `size` channels.
#[inline(always)]
fn sum_groups<S: Simd>(s: S, channels: &[f32], size: usize, sums: &mut [f32]) {
    for (sums, groups) in sums.chunks_mut(4).zip(channels.chunks(4 * size)) {
        let mut lanes = [s.splat(0.0); 4];
        for (lanes, group) in lanes.iter_mut().zip(groups.chunks_exact(size)) {
            let mut whole = group.chunks_exact(S::LANES);
            for channels in &mut whole {
                *lanes = s.add(s.load(channels), *lanes);
            }
            *lanes = s.add(s.load_partial(whole.remainder()), *lanes);
        }
        sums.copy_from_slice(&s.sums(lanes)[..sums.len()]);
    }
}

/// Running sums of some channels, filled up to whole blocks.
struct Channels<'a> {
    /// What is subtracted first.
    shift: &'a [f32],
    sum: &'a mut [f32],
    squares: &'a mut [f32],
    least: &'a mut [f32],
    most: &'a mut [f32],
}

impl Channels<'_> {
    /// Adds `[pixels, c]`.
    #[inline(always)]
    fn add_all<S: Simd, T: Element>(mut self, s: S, pixels: &[T], c: usize) {
        if c == 0 {
            return;
        }
        let mut steps = pixels.chunks_exact(STEP * c);
        for step in &mut steps {
            self.add::<S, T, STEP>(s, step, c);
        }
        for pixel in steps.remainder().chunks_exact(c) {
            self.add::<S, T, 1>(s, pixel, c);
        }
    }

    /// Adds `[N, c]`.
    #[inline(always)]
    fn add<S: Simd, T: Element, const N: usize>(&mut self, s: S, pixels: &[T], c: usize) {
        let pixels: [&[T]; N] = std::array::from_fn(|p| &pixels[p * c..(p + 1) * c]);
        let step = 2 * S::LANES;
        let whole = c - c % step;
        // Whole pixels, and as many as go together: each asks for what its successor needs.
        let ahead = AHEAD.next_multiple_of(N * c * size_of::<T>());
        for i in (0..whole).step_by(step) {
            let pixels = pixels.map(|pixel| &pixel[i..i + step]);
            for pixel in pixels {
                s.prefetch(pixel, ahead);
            }
            self.add_pairs(s, pixels, i);
        }
        if whole < c {
            let mut last = [[T::ZERO; MAX_BLOCK / 2]; N];
            for (last, pixel) in last.iter_mut().zip(pixels) {
                last[..c - whole].copy_from_slice(&pixel[whole..]);
            }
            self.add_pairs(s, last.each_ref().map(|last| &last[..step]), whole);
        }
    }

    /// Adds two vectors' worth of channels of each pixel, from channel `at` on.
    #[inline(always)]
    fn add_pairs<S: Simd, T: Element, const N: usize>(&mut self, s: S, pixels: [&[T]; N], at: usize) {
        let range = at..at + 2 * S::LANES;
        let (sum, squares) = (&mut self.sum[range.clone()], &mut self.squares[range.clone()]);
        let (least, most) = (&mut self.least[range.clone()], &mut self.most[range.clone()]);
        let k = f32::load_pair(s, &self.shift[range]);
        let (mut a, mut b) = (f32::load_pair(s, sum), f32::load_pair(s, squares));
        let (mut low, mut high) = (f32::load_pair(s, least), f32::load_pair(s, most));
        let mut x = [k; N];
        for (x, pixel) in x.iter_mut().zip(pixels) {
            *x = T::load_pair(s, pixel);
        }
        for i in 0..2 {
            let (mut least, mut most, mut d) = ([x[0][i]; N], [x[0][i]; N], [x[0][i]; N]);
            for (p, x) in x.into_iter().enumerate() {
                (least[p], most[p], d[p]) = (x[i], x[i], s.sub(x[i], k[i]));
                b[i] = s.fma(d[p], d[p], b[i]);
            }
            // In pairs, so that little waits for what came before.
            let mut n = N;
            while n > 1 {
                n /= 2;
                for p in 0..n {
                    least[p] = s.min(least[p], least[p + n]);
                    most[p] = s.max(most[p], most[p + n]);
                    d[p] = s.add(d[p], d[p + n]);
                }
            }
            (low[i], high[i]) = (s.min(least[0], low[i]), s.max(most[0], high[i]));
            a[i] = s.add(d[0], a[i]);
        }
        for (to, v) in [(sum, a), (squares, b), (least, low), (most, high)] {
            s.store(v[0], to);
            s.store(v[1], &mut to[S::LANES..]);
        }
    }
}
