//! Which operand rows an output row meets, and how output rows are cut into tiles and blocks.
//!
//! A **run** is a sequence of output rows, evenly spaced in the output, whose operand rows are evenly spaced too, for
//! every tap: all rows of a linear layer, an output row of a convolution, every other pixel of such a row where the input
//! is upsampled. Tiles are pieces of runs, so that a tile function needs a pointer and a stride.
//!
//! Of a filter over an upsampled image, taps side by side often meet one pixel. Which do depends on the **phase**, whether
//! the output pixel's row and column are odd: each phase meets 2 x 2 pixels, with sums of taps ([`folded`]).
#![forbid(unsafe_code)]

use std::ops::Range;

use super::Filter;
use crate::view::ImageShape;

/// Rows of an output tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowTile {
    /// Output row of row 0.
    pub(crate) row: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// The image it belongs to.
    pub(crate) image: usize,
    /// Operand row of row 0, before the tap's offset.
    pub(crate) base: usize,
    /// Row of [`Geometry::offsets`].
    pub(crate) phase: usize,
}

/// Pixels that a phase of an upsampled image's filter meets.
pub(crate) const FOLDED_TAPS: usize = 4;

/// The taps of a 3 x 3 filter that meet pixel `pixel` of the [`FOLDED_TAPS`] of a phase.
pub(crate) fn folded(phase: usize, pixel: usize) -> impl Iterator<Item = usize> {
    let side = |odd: usize, second: usize| match (odd, second) {
        (0, 0) => 0..1,
        (0, _) => 1..3,
        (_, 0) => 0..2,
        _ => 2..3,
    };
    let columns = side(phase % 2, pixel % 2);
    side(phase / 2, pixel / 2).flat_map(move |y| columns.clone().map(move |x| 3 * y + x))
}

/// The tiles of a call.
#[derive(Debug)]
pub(crate) struct Geometry {
    /// All tiles in order.
    pub(crate) tiles: Vec<RowTile>,
    /// Output rows from one row of a tile to the next.
    pub(crate) row_step: usize,
    /// Operand rows from one row of a tile to the next.
    pub(crate) operand_step: usize,
    /// `[phase][tap]`: operand rows from a tile's base.
    offsets: Vec<Vec<usize>>,
}

impl Geometry {
    /// Cuts the output into tiles of at most `mr` rows. With `by_image` no tile holds rows of two images. `rows` chooses
    /// rows of pixels of each output image; the output then holds just these. With `fold`, a number of rows, the taps of an
    /// upsampled image's filter are those of [`folded`], and about so many rows of a phase follow one another.
    pub(crate) fn new(
        input: &ImageShape,
        filter: &Filter,
        mr: usize,
        by_image: bool,
        rows: Option<Range<usize>>,
        fold: Option<usize>,
    ) -> Geometry {
        let (h, w) = filter.output(input);
        let rows = rows.unwrap_or(0..h);
        let lines =
            || (0..input.batch * rows.len()).map(|y| (y, y / rows.len(), rows.start + y % rows.len()));
        let (full_h, full_w) = (input.full_h(), input.full_w());
        let taps = |offset: &dyn Fn(usize, usize) -> usize| -> Vec<usize> {
            (0..filter.kh * filter.kw).map(|tap| offset(tap / filter.kw, tap % filter.kw)).collect()
        };
        let mut geometry =
            Geometry { tiles: vec![], row_step: 1, operand_step: filter.stride, offsets: vec![] };
        if filter.upsample {
            geometry.row_step = 2;
            for phase in 0..4 {
                let (py, px) = (phase / 2, phase % 2);
                geometry.offsets.push(match fold {
                    Some(_) => (0..FOLDED_TAPS).map(|i| (py + i / 2) * full_w + px + i % 2).collect(),
                    None => taps(&|ky, kx| (py + ky).div_ceil(2) * full_w + (px + kx).div_ceil(2)),
                });
            }
            // Lines whose phases take turns: each line has two, and every other line the same.
            let group = fold.map_or(1, |rows| 2 * (rows / (w / 2).max(1)).max(1));
            let lines: Vec<_> = lines().collect();
            for lines in lines.chunks(group) {
                for phase in 0..4 {
                    for &(at, image, y) in lines.iter().filter(|line| line.2 % 2 == phase / 2) {
                        let base = (image * full_h + y / 2) * full_w;
                        geometry
                            .cut(RowTile { row: at * w + phase % 2, rows: w / 2, image, base, phase }, mr);
                    }
                }
            }
            return geometry;
        }
        geometry.offsets.push(taps(&|ky, kx| ky * full_w + kx));
        let point = filter.kh * filter.kw == 1 && filter.stride == 1 && input.border == Default::default();
        if point && rows.len() == h {
            let (runs, rows) = if by_image { (input.batch, h * w) } else { (1, input.batch * h * w) };
            for image in 0..runs {
                geometry.cut(RowTile { row: image * rows, rows, image, base: image * rows, phase: 0 }, mr);
            }
            return geometry;
        }
        for (at, image, y) in lines() {
            let base = (image * full_h + y * filter.stride) * full_w;
            geometry.cut(RowTile { row: at * w, rows: w, image, base, phase: 0 }, mr);
        }
        geometry
    }

    /// Cuts a run into tiles of nearly equal size.
    fn cut(&mut self, run: RowTile, mr: usize) {
        let pieces = run.rows.div_ceil(mr);
        for i in 0..pieces {
            let (first, end) = (run.rows * i / pieces, run.rows * (i + 1) / pieces);
            self.tiles.push(RowTile {
                row: run.row + first * self.row_step,
                rows: end - first,
                base: run.base + first * self.operand_step,
                ..run
            });
        }
    }

    /// Operand rows from a tile's base to the one that its row 0 meets at `tap`.
    #[inline(always)]
    pub(crate) fn offset(&self, phase: usize, tap: usize) -> usize {
        self.offsets[phase][tap]
    }

    /// Cuts the tiles into blocks of at most `rows` rows, and `copied` operand rows where taps of lines of `line` share those, or
    /// one tile; `by_phase`, of one phase each.
    pub(crate) fn blocks(
        &self,
        rows: usize,
        line: usize,
        copied: usize,
        by_phase: bool,
    ) -> Vec<Range<usize>> {
        let mut blocks: Vec<Range<usize>> = vec![];
        let mut filled = rows;
        let mut places = Places::new(line);
        for (i, tile) in self.tiles.iter().enumerate() {
            filled += tile.rows;
            places.place(tile);
            let same = |block: &Range<usize>| !by_phase || self.tiles[block.start].phase == tile.phase;
            match blocks.last_mut() {
                Some(block) if filled <= rows && places.rows() <= copied && same(block) => block.end = i + 1,
                _ => {
                    blocks.push(i..i + 1);
                    filled = tile.rows;
                    places = Places::new(line);
                    places.place(tile);
                }
            }
        }
        blocks
    }
}

/// Where the operand rows of tiles lie that are copied one after another: each row once that tiles which follow one another meet
/// at the taps of a line of a filter.
#[derive(Debug)]
pub(crate) struct Places {
    /// Taps side by side, 1 where operand rows aren't.
    line: usize,
    /// Rows copied so far.
    rows: usize,
    /// Base and phase of the tile that would follow the last one.
    following: Option<(usize, usize)>,
}

impl Places {
    pub(crate) fn new(line: usize) -> Places {
        Places { line, rows: 0, following: None }
    }

    /// `(at, copied)`: the rows of `tile` begin at `at` for the line's first tap, at `at + 1` for its second, and `copied` of
    /// them are there already.
    #[inline(always)]
    pub(crate) fn place(&mut self, tile: &RowTile) -> (usize, usize) {
        let follows = self.following == Some((tile.base, tile.phase));
        let copied = if follows { self.line - 1 } else { 0 };
        let at = self.rows - copied;
        self.rows = at + tile.rows + self.line - 1;
        self.following = Some((tile.base + tile.rows, tile.phase));
        (at, copied)
    }

    /// Rows of all tiles placed so far.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::Border;

    #[test]
    fn tiles_that_follow_one_another_share_rows() {
        let tile = |base, rows| RowTile { row: 0, rows, image: 0, base, phase: 0 };
        let tiles = [tile(10, 4), tile(14, 3), tile(20, 2), tile(22, 1)];
        let mut places = Places::new(3);
        assert_eq!(tiles.map(|tile| places.place(&tile)), [(0, 0), (4, 2), (9, 0), (11, 2)]);
        assert_eq!(places.rows(), 14);
        let mut places = Places::new(1);
        assert_eq!(tiles.map(|tile| places.place(&tile)), [(0, 0), (4, 0), (7, 0), (9, 0)]);
        assert_eq!(places.rows(), 10);
    }

    /// Operand row of an output row, from the definition.
    fn expected(input: &ImageShape, filter: &Filter, row: usize, tap: usize) -> usize {
        let (h, w) = filter.output(input);
        let (image, y, x) = (row / (h * w), row / w % h, row % w);
        let (ky, kx) = (tap / filter.kw, tap % filter.kw);
        let (y, x) = if filter.upsample {
            // Pixel (y + ky - 1, x + kx - 1) of the upsampled image, halved, in an image with a border of 1.
            ((y + ky).div_ceil(2), (x + kx).div_ceil(2))
        } else {
            (y * filter.stride + ky, x * filter.stride + kx)
        };
        (image * input.full_h() + y) * input.full_w() + x
    }

    #[test]
    fn tiles_cover_every_output_row_once_and_meet_their_pixels() {
        let one = Border { top: 1, left: 1, bottom: 1, right: 1 };
        let corner = Border { bottom: 1, right: 1, ..Border::default() };
        for (border, kh, stride, upsample) in [
            (Border::default(), 1, 1, false),
            (one, 3, 1, false),
            (one, 3, 2, false),
            (corner, 3, 2, false),
            (one, 3, 1, true),
        ] {
            for (batch, h, w, mr) in [(1, 4, 4, 3), (2, 6, 10, 4), (3, 2, 34, 16), (1, 1, 25, 12)] {
                let input = ImageShape { batch, h, w, border };
                let filter = Filter { kh, kw: kh, stride, upsample };
                if input.full_h() < kh {
                    continue;
                }
                let (oh, ow) = filter.output(&input);
                let some = Some(oh / 3..oh - oh / 4);
                for (by_image, rows, fold) in [
                    (false, None, None),
                    (true, None, Some(7)),
                    (true, some.clone(), None),
                    (false, some, Some(20)),
                ] {
                    let fold = fold.filter(|_| upsample);
                    let geometry = Geometry::new(&input, &filter, mr, by_image, rows.clone(), fold);
                    let rows = rows.unwrap_or(0..oh);
                    let mut seen = vec![0; batch * rows.len() * ow];
                    for tile in &geometry.tiles {
                        assert!(tile.rows <= mr);
                        for r in 0..tile.rows {
                            let row = tile.row + r * geometry.row_step;
                            seen[row] += 1;
                            let image = row / (rows.len() * ow);
                            assert!(!by_image || image == tile.image);
                            let row = (image * oh + rows.start + row / ow % rows.len()) * ow + row % ow;
                            let taps: Vec<_> = match fold {
                                Some(_) => (0..FOLDED_TAPS)
                                    .flat_map(|i| folded(tile.phase, i).map(move |tap| (i, tap)))
                                    .collect(),
                                None => (0..kh * kh).map(|tap| (tap, tap)).collect(),
                            };
                            assert_eq!(taps.len(), kh * kh);
                            for (i, tap) in taps {
                                let at =
                                    tile.base + geometry.offset(tile.phase, i) + r * geometry.operand_step;
                                assert_eq!(
                                    at,
                                    expected(&input, &filter, row, tap),
                                    "{input:?} {filter:?} {row} {tap}"
                                );
                            }
                        }
                    }
                    assert!(seen.iter().all(|&n| n == 1));
                    let blocks = geometry.blocks(20, 2, 21, fold.is_some());
                    for block in &blocks {
                        let mut places = Places::new(2);
                        geometry.tiles[block.clone()].iter().for_each(|tile| {
                            places.place(tile);
                        });
                        assert!(places.rows() <= 21 || block.len() == 1);
                    }
                    assert_eq!(blocks.iter().map(|b| b.len()).sum::<usize>(), geometry.tiles.len());
                    let phase = |i: usize| geometry.tiles[i].phase;
                    assert!(
                        fold.is_none()
                            || blocks.iter().all(|b| b.clone().all(|i| phase(i) == phase(b.start)))
                    );
                }
            }
        }
    }
}
